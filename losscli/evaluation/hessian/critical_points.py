"""Is a point of weight space critical, and is it a minimum or a saddle?

The gradient and the extreme eigenvalues of the Hessian give a verdict (`verdict`), and the losses
around the point have to confirm it (`Evidence.confirm`): at a saddle the loss falls on both sides
along the most negative curvature, a minimum is critical to the accuracy of its loss, and the loss
does not fall next to it (`CriticalPointTest.contradiction`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from losscli.data import Examples, Split
from losscli.evaluation.finite_differences import sample_size
from losscli.evaluation.hessian.curvature import DENSE_LIMIT, Curvature
from losscli.evaluation.hessian.curvature_check import check_derivatives, float64_copy
from losscli.evaluation.hessian.eigenvalues import DenseHessian, Eigenpair, Extremes
from losscli.evaluation.hessian.rounding import add_rounding, hessian_rounding
from losscli.evaluation.hessian.verdict import Verdict, verdict
from losscli.evaluation.line_search import CLOSE_STEPS, LineSearch
from losscli.evaluation.loss_rounding import ROUNDING_EXAMPLES, loss_rounding
from losscli.evaluation.objective import Objective, recalibrated
from losscli.evaluation.perturbation import displaced
from losscli.evaluation.ranks import Arrays
from losscli.evaluation.records import idle_layers
from losscli.evaluation.sampling import Estimate
from losscli.evaluation.sweep import sweep_plain
from losscli.evaluation.tasks import Execution
from losscli.results.summaries import CheckedPoint, Predicted, Step
from losscli.weight_space.vectors import Weights, unflatten

__all__ = [
    "CONTRADICTION_STEPS",
    "EXPECTED_PRODUCTS",
    "CriticalPointTest",
    "Evidence",
    "PointAnalysis",
    "batch_size_of",
    "verdict_of",
]

# Largest residual norm of a converged eigenpair, as a share of |λ|.
_TOLERANCE = 1e-4

EXPECTED_PRODUCTS = 100
"""Approximate number of Hessian-vector products that the analysis of a point takes."""

# The largest share of the progress of an analysis before its search for eigenvalues has ended.
_MOST_SEARCHED = 0.9

# A predicted change of the loss beyond this many times its accuracy is significant.
_FAR = 10

# Directions along which a minimum is checked: two eigenvectors, two random directions, and a
# difference of gradients.
_RANDOM_DIRECTIONS = 2
_DIRECTIONS = 2 + _RANDOM_DIRECTIONS + 1

# The distance of those gradients from the point as a share of its norm.
_NEARBY = 2.0**-10

CONTRADICTION_STEPS = _DIRECTIONS * 2 * len(CLOSE_STEPS)
"""The most evaluations of a split that check a minimum or a maximum."""

# The keys of the steps on either side in a record.
_SIDES = "negative", "positive"

# The prefix of the tensors of a direction in a record.
_DIRECTION = "down "


@dataclass(frozen=True)
class Evidence:
    """The evidence for a verdict in addition to the gradient and the eigenvalues.

    Attributes:
        reason: Why the verdict is undecided; empty for other verdicts.
        slope: ⟨∇L, v⟩, v the eigenvector of λ_min.
        loss_rounding: The largest change of the mean loss that may be rounding.
        change: By how much the loss is predicted to change towards a minimum (downwards) or a
            maximum (upwards); nan for other points. An upper bound if it is not exact.
        exact: Whether ``change`` is ½ gᵀ|H|⁻¹g, and not its bound ‖g‖² / 2 min abs(λ).
        sides: The best step on the negative and on the positive side along v, each None if no step
            lowers the loss; None if the curvature is not negative.
        measured: Examples on which the rounding of eigenvalues was measured.
        scattered: Whether it was measured without float64, from the scatter at nearby points.
        unverified: Which derivatives could not be compared with differences; empty if none.
        seed_error: The standard error of the mean loss over seeds; nan without several.
    """

    reason: str = ""
    slope: float = math.nan
    loss_rounding: float = math.nan
    change: float = math.nan
    exact: bool = False
    sides: tuple[Step | None, Step | None] | None = None
    measured: int = 0
    scattered: bool = False
    unverified: str = ""
    seed_error: float = math.nan

    def confirm(
        self, decided: Verdict, smallest: Eigenpair, largest: Eigenpair, stored: float
    ) -> tuple[Verdict, Self]:
        """Withdraws a verdict that the losses do not confirm, and gives the reason.

        Args:
            decided: The verdict by the gradient and the eigenvalues.
            smallest: λ_min.
            largest: λ_max.
            stored: How much rounding of the stored weights changes the loss at a minimum.

        Returns:
            The verdict, and this evidence with the reason.
        """
        reason = ""
        if decided == "saddle":
            falls = [bool(side and side["falls"]) for side in self.sides or ()]
            at = f"⟨∇L, v⟩ = {self.slope:.3g} and λ min = {smallest.value:.3g}"
            if not all(falls):
                where = "falls on one side only" if any(falls) else "does not fall beyond rounding"
                reason = f"along the eigenvector v of λ min the loss {where}: {at}"
        elif decided in {"minimum", "maximum"}:
            accuracy = self.loss_rounding + stored
            if not self.change <= _FAR * accuracy:
                step = "a Newton step" if self.exact else "a step"
                may = "would" if self.exact else "could"
                verb = "lower" if decided == "minimum" else "raise"
                bound = "" if self.exact else "up to "
                reason = (
                    f"{step} {may} {verb} the loss by {bound}{self.change:.2g}, and the loss "
                    f"is known to {accuracy:.2g}: the point is near a {decided}, not at it"
                )
        elif decided == "undecided":
            figures = smallest.value, smallest.error, largest.value, largest.error
            if not all(map(math.isfinite, figures)):
                reason = "the loss or its derivatives are not finite"
            elif smallest.value > smallest.error:
                reason = "the search for λ min has not converged"
            else:
                reason = "λ min may be zero: it is within its error of zero"
        return "undecided" if reason else decided, replace(self, reason=reason)

    def summary(self) -> CheckedPoint:
        """Returns the part of the summary."""
        predicted: Predicted = {"change": self.change, "exact": self.exact}
        return {
            "reason": self.reason or None,
            "slope_along_lambda_min": self.slope,
            "loss_rounding": self.loss_rounding,
            "predicted": predicted if math.isfinite(self.change) else None,
            "sides": self.sides and {"negative": self.sides[0], "positive": self.sides[1]},
            "rounding_measured_on": self.measured,
            "unverified": self.unverified or None,
            "loss_seed_stderr": None if math.isnan(self.seed_error) else self.seed_error,
        }

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Returns the arrays of a record."""
        numbers = [self.slope, self.loss_rounding, self.change, self.exact]
        numbers += [self.measured, self.scattered, self.seed_error]
        sides = dict(zip(_SIDES, self.sides, strict=True)) if self.sides else {}
        return {
            "judgement": np.array(numbers, np.float64),
            "reason": np.frombuffer(self.reason.encode(), np.uint8),
            "unverified": np.frombuffer(self.unverified.encode(), np.uint8),
            **{name: _step_array(side) for name, side in sides.items()},
        }

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Self:
        """Reads the arrays of a record."""
        slope, rounding, change, exact, *last = arrays["judgement"].tolist()
        measured, scattered, seed_error = last
        sides = [_step(arrays[side]) for side in _SIDES if side in arrays]
        return cls(
            arrays["reason"].tobytes().decode(),
            *(slope, rounding, change, bool(exact)),
            (sides[0], sides[1]) if sides else None,
            int(measured),
            bool(scattered),
            arrays["unverified"].tobytes().decode(),
            seed_error,
        )


@dataclass(frozen=True)
class PointAnalysis:
    """The derivatives of the loss of one split at one point, and the verdict.

    Attributes:
        loss: The mean loss.
        gradient_norm: ‖∇L‖.
        extremes: The smallest and the largest eigenvalues of the Hessian.
        shares: The shares of positive, negative and undecided eigenvalues, and the trace; empty if
            the Hessian was not computed as a whole.
        spectrum: Each known eigenvalue and its error, in ascending order.
        verdict: The kind of the point.
        descent: At a point that is not critical, the best step along −∇L; None if there is none.
        evidence: The other evidence for the verdict.
    """

    loss: float
    gradient_norm: float
    extremes: Extremes
    shares: Sequence[float]
    spectrum: Sequence[tuple[float, float]]
    verdict: Verdict
    descent: Step | None
    evidence: Evidence

    @property
    def smallest(self) -> Eigenpair:
        """λ_min."""
        return self.extremes.smallest[0]

    @property
    def largest(self) -> Eigenpair:
        """λ_max."""
        return self.extremes.largest[0]

    def summary(self) -> CheckedPoint:
        """Returns the results that have no column in the table."""
        return {
            "verdict": self.verdict,
            **self.evidence.summary(),
            "lambda_min_converged": self.smallest.converged,
            "lambda_max_converged": self.largest.converged,
            "exact": self.extremes.exact,
            "products": self.extremes.products,
            "descent": self.descent,
        }

    def to_arrays(self, direction: Weights | None, objective: Objective) -> dict[str, NDArray[Any]]:
        """Returns the arrays of a record.

        Args:
            direction: The eigenvector of λ_min, if it is to be kept.
            objective: Its batch size and idle layers belong to the record.

        Returns:
            The arrays.
        """
        ends = {"smallest": self.extremes.smallest, "largest": self.extremes.largest}
        kind = get_args(Verdict).index(self.verdict)
        counts = [self.extremes.products, self.extremes.exact, kind, objective.batch_size]
        return {
            "numbers": np.array([self.loss, self.gradient_norm, *self.shares]),
            "counts": np.array(counts),
            **{
                end: np.array([(pair.value, pair.error, pair.converged) for pair in pairs])
                for end, pairs in ends.items()
            },
            "idle": idle_layers(objective),
            "spectrum": np.array(self.spectrum),
            "descent": _step_array(self.descent),
            **self.evidence.to_arrays(),
            **{f"{_DIRECTION}{name}": t.cpu().numpy() for name, t in (direction or {}).items()},
        }

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> tuple[Self, Weights | None]:
        """Reads the arrays of a record: all but the eigenvectors; and the direction, if any."""
        loss, gradient_norm, *shares = arrays["numbers"].tolist()
        products, exact, *_ = arrays["counts"].tolist()
        no_vector = torch.empty(0, dtype=torch.float64)
        smallest, largest = (
            tuple(
                Eigenpair(value, error, no_vector, bool(converged))
                for value, error, converged in arrays[end].tolist()
            )
            for end in ("smallest", "largest")
        )
        direction = {
            key.removeprefix(_DIRECTION): torch.from_numpy(array)
            for key, array in arrays.items()
            if key.startswith(_DIRECTION)
        }
        analysis = cls(
            *(loss, gradient_norm),
            Extremes(smallest, largest, products, bool(exact)),
            shares,
            [(value, error) for value, error in arrays["spectrum"].tolist()],
            verdict_of(arrays),
            _step(arrays["descent"]),
            Evidence.from_arrays(arrays),
        )
        return analysis, direction or None


def verdict_of(arrays: Arrays) -> Verdict:
    """Reads the verdict in a record of `PointAnalysis`."""
    verdicts: Sequence[Verdict] = get_args(Verdict)
    return verdicts[int(arrays["counts"][2])]


def batch_size_of(arrays: Arrays) -> int:
    """Reads the batch size in a record of `PointAnalysis`."""
    return int(arrays["counts"][-1])


def _step_array(step: Step | None) -> NDArray[Any]:
    return np.array([*step.values()] if step else [])


def _step(array: NDArray[Any]) -> Step | None:
    if not array.size:
        return None
    distance, loss, gain, stderr, *falls = array.tolist()
    step: Step = {"distance": distance, "loss": loss, "gain": gain, "gain_stderr": stderr}
    return {**step, "falls": bool(falls[0])} if falls else step


@dataclass(frozen=True)
class CriticalPointTest:
    """Tests whether points are critical, and of which kind.

    Attributes:
        objective: The model, the loss and the data.
        names: The parameters that are differentiated, each tied parameter under one name.
        tolerance: The largest gradient norm of a critical point.
        eigenvalues: How many eigenvalues of either end of the spectrum are computed.
        seed: Of random vectors.
    """

    objective: Objective
    names: Sequence[str]
    tolerance: float
    eigenvalues: int
    seed: int

    @cached_property
    def float64(self) -> Objective | None:
        """The objective in float64; None if there is none."""
        return float64_copy(self.objective)

    def differentiated(self, weights: Weights) -> Objective:
        """Returns the objective that is differentiated: for a whole Hessian that in float64."""
        small = sum(weights[name].numel() for name in self.names) <= DENSE_LIMIT
        return (self.float64 if small else None) or self.objective

    def analyse(
        self, point: Weights, split: str, kept: Collection[str], execution: Execution
    ) -> Arrays:
        """Analyses one point on one split.

        Args:
            point: The point: all tensors of the model, the parameters as they are stored.
            split: The name of the split.
            kept: The verdicts for which the eigenvector of a negative λ_min is kept.
            execution: Evaluates losses. Its progress goes from 0 to 1.

        Returns:
            The record, see `PointAnalysis.from_arrays`.

        Raises:
            LosscliError: The model or the loss fails on the data, or has no derivatives.
        """
        objective, quiet, seed = self.objective, execution.quiet, self.seed
        every = objective.splits[split]
        examples = {split: every}
        weights = recalibrated(objective, point)
        # The loss that is differentiated and followed is a function of the parameters alone.
        with objective.frozen_statistics():
            (losses,) = sweep_plain(objective, [weights], splits=examples, execution=quiet)
            here = losses[split]
            sample, rows = every.spread(ROUNDING_EXAMPLES)
            sample = sample.to(objective.device)
            float64 = self.float64
            gradient, extremes, dense = self.differentiate(weights, every, execution)
            size = float(gradient.norm())
            vector = extremes.smallest[0].vector
            eigenvector = unflatten(vector, weights, self.names)
            downhill = unflatten(-gradient / size, weights, self.names) if size > 0 else None
            few = every.spread(sample_size(objective))[0].to(objective.device)
            directions = {"λ min": vector, "λ max": extremes.largest[0].vector}
            unverified = check_derivatives(
                float64 or objective, weights, self.names, few, directions, seed
            )
            objective.load(weights)
            smallest, largest = extremes.smallest[0], extremes.largest[0]
            decided = verdict(size, self.tolerance, smallest, largest)
            change = math.nan
            if decided in {"minimum", "maximum"}:
                least = abs(smallest.value if decided == "minimum" else largest.value)
                change = size**2 / (2 * least)
                if dense is not None:
                    change = abs(dense.newton_change(gradient.cpu().numpy()))
            evidence = Evidence(
                slope=float(gradient @ vector),
                loss_rounding=loss_rounding(
                    objective, float64, weights, self.names, here, (sample, rows), seed
                ),
                change=change,
                exact=dense is not None,
                measured=len(sample),
                scattered=float64 is None,
                unverified=unverified,
                seed_error=here.seed_error,
            )
            search = LineSearch(objective, weights, self.names, examples, here, quiet)
            if smallest.value + smallest.error < 0 and decided in {*kept, "saddle"}:
                sides = search.descend_both_ways(
                    eigenvector, evidence.slope, smallest.value, evidence.loss_rounding
                )
                evidence = replace(evidence, sides=sides)
            descent = None
            if decided == "not critical" and downhill is not None and math.isfinite(size):
                descent = search.descend(downhill)
            stored = self._stored_rounding(weights, dense, largest.value)
            decided, evidence = evidence.confirm(decided, smallest, largest, stored)
            if decided in {"minimum", "maximum"}:
                accuracy = evidence.loss_rounding + stored
                reason = self.contradiction(
                    decided, search, gradient, extremes, (sample, rows), accuracy
                )
                if reason:
                    decided, evidence = "undecided", replace(evidence, reason=reason)
        if dense is None:
            pairs = [*extremes.smallest, *reversed(extremes.largest)]
            spectrum = [(pair.value, pair.error) for pair in pairs]
        else:
            spectrum = [(float(value), dense.error) for value in dense.eigenvalues]
        analysis = PointAnalysis(
            float(Estimate.of_evaluation(here).mean[0]),
            size,
            extremes,
            () if dense is None else (*dense.shares, float(np.trace(dense.matrix))),
            spectrum,
            decided,
            descent,
            evidence,
        )
        is_kept = evidence.sides and decided in kept
        return analysis.to_arrays(eigenvector if is_kept else None, objective)

    def contradiction(
        self,
        decided: Verdict,
        search: LineSearch,
        gradient: Tensor,
        extremes: Extremes,
        sample: tuple[Split, Tensor],
        rounding: float,
    ) -> str:
        """Checks a minimum or a maximum by the losses next to it, over the whole split.

        At a kink gradient and Hessian are those of one smooth piece, and the loss may fall next to
        a point at which they show a minimum: w² + u² − |u| at 0. The losses are evaluated along the
        eigenvectors of λ_min and λ_max, along random directions r, and along
        ∇L(θ + hr) − ∇L(θ − hr), which is normal to a kink between the two points if h is small. All
        this is computed in float64 if the Hessian was.

        Args:
            decided: ``minimum`` or ``maximum``.
            search: Evaluates the split along directions.
            gradient: ∇L, ``[n]``.
            extremes: The ends of the spectrum.
            sample: Some examples of the split on the device, and their positions in it.
            rounding: How much of a change of the mean loss may be rounding.

        Returns:
            The reason against the verdict; empty if the losses do not contradict it.
        """
        weights, names = search.weights, self.names
        (every,) = search.splits.values()
        differentiated = self.differentiated(weights)
        if differentiated is not search.objective:
            # Steps in a narrower type would be rounded.
            weights = {**weights, **{name: weights[name].double() for name in names}}
            (losses,) = sweep_plain(
                differentiated, [weights], splits=search.splits, execution=search.execution
            )
            (here,) = losses.values()
            search = replace(search, objective=differentiated, weights=weights, here=here)
            rounding = loss_rounding(
                differentiated, differentiated, weights, names, here, sample, self.seed
            )
        smallest, largest = extremes.smallest[0], extremes.largest[0]
        directions = {
            "the eigenvector of λ min": smallest.vector,
            "the eigenvector of λ max": largest.vector,
        }
        generator = torch.Generator().manual_seed(self.seed)
        for k in range(_RANDOM_DIRECTIONS):
            drawn = torch.randn(len(gradient), generator=generator, dtype=torch.float64)
            directions[f"random direction {k + 1}"] = drawn / drawn.norm()
        # The last random direction leads to both sides of most kinks that the point lies on.
        point = {name: weights[name] for name in names}
        parts = unflatten(drawn / drawn.norm() * search.norm, weights, names)
        step = {name: part.to(point[name]) for name, part in parts.items()}
        before, after = (
            self.gradient({**weights, **displaced(point, step, h)}, every, search.execution)
            for h in (-_NEARBY, _NEARBY)
        )
        jump = after.double() - before.double()
        if float(jump.norm()) > 0:
            directions["a difference of gradients nearby"] = jump / jump.norm()
        curvature = smallest.value if decided == "minimum" else largest.value
        moves, model = ("falls", "rises") if decided == "minimum" else ("rises", "falls")
        for name, vector in directions.items():
            slope = float(gradient @ vector.to(gradient))
            direction = unflatten(vector, weights, names)
            found = search.contradicting_step(direction, slope, curvature, rounding)
            if found:
                distance, change = found
                return (
                    f"the loss {moves} by {abs(change):.2g} along {name}, at a distance of "
                    f"{abs(distance):.2g}, though gradient and curvature say that it {model}: "
                    "the point lies on a kink"
                )
        return ""

    def gradient(self, weights: Weights, every: Examples, execution: Execution) -> Tensor:
        """Computes the gradient at a point, ``[n]``; fails if another rank has failed."""
        with self.curvature(weights, every, execution) as curvature:
            return curvature.gradient()

    def differentiate(
        self, weights: Weights, every: Examples, execution: Execution
    ) -> tuple[Tensor, Extremes, DenseHessian | None]:
        """Computes the gradient and the ends of the spectrum at a point.

        Args:
            weights: The point.
            every: The examples.
            execution: Its progress goes from 0 to 1, by the number of products that are expected.

        Returns:
            The gradient, ``[n]``; the ends of the spectrum, with measured rounding in their errors;
            and the whole Hessian of a small model.
        """
        done = 0.0

        def attend(share: float) -> None:
            nonlocal done
            execution.poll()
            # The gradient that the first product needs counts as one more.
            done += share / (products + 1)
            execution.report(min(done, _MOST_SEARCHED))

        with self.curvature(weights, every, execution, attend=attend) as curvature:
            products = curvature.size if curvature.size <= DENSE_LIMIT else EXPECTED_PRODUCTS
            gradient = curvature.gradient()
            dense = curvature.dense() if curvature.size <= DENSE_LIMIT else None
            extremes = curvature.extremes(self.eigenvalues, tolerance=_TOLERANCE, seed=self.seed)
        sample = every.spread(ROUNDING_EXAMPLES)[0].to(self.objective.device)
        extremes, dense = self._with_rounding(
            weights, extremes, dense, sample, whole=len(sample) == len(every)
        )
        return gradient, extremes, dense

    def largest_eigenvalue(
        self,
        weights: Weights,
        names: Sequence[str],
        every: Examples,
        operator: Callable[..., Curvature],
        execution: Execution,
    ) -> Eigenpair:
        """Computes λ_max of a diagonal block of a matrix, with measured rounding in its error."""
        with self.curvature(weights, every, execution, names, operator) as curvature:
            extremes = curvature.extremes(1, tolerance=_TOLERANCE, seed=self.seed)
        differentiated = self.differentiated(weights)
        sample, _ = every.spread(ROUNDING_EXAMPLES)
        extremes = add_rounding(
            extremes,
            differentiated,
            None if self.float64 is differentiated else self.float64,
            weights,
            names,
            sample.to(self.objective.device),
            whole=len(sample) == len(every),
            seed=self.seed,
            operator=operator,
        )
        return extremes.largest[0]

    def curvature(
        self,
        weights: Weights,
        every: Examples,
        execution: Execution,
        names: Sequence[str] | None = None,
        operator: Callable[..., Curvature] = Curvature,
        attend: Callable[[float], None] | None = None,
    ) -> Curvature:
        """Makes the operator of second derivatives at a point, in float64 for a small model."""
        differentiated = self.differentiated(weights)
        # Another rank may fail meanwhile.
        watch = attend or (lambda _: execution.poll())
        return operator(differentiated, weights, names or self.names, every, watch)

    def _with_rounding(
        self,
        weights: Weights,
        extremes: Extremes,
        dense: DenseHessian | None,
        sample: Split,
        *,
        whole: bool,
    ) -> tuple[Extremes, DenseHessian | None]:
        """Adds the rounding that is measured on a sample to the errors of eigenvalues."""
        if dense is None:
            wider = None if self.float64 is self.objective else self.float64
            given = extremes, self.objective, wider, weights, self.names, sample
            return add_rounding(*given, whole=whole, seed=self.seed), None
        added = hessian_rounding(
            self.differentiated(weights), weights, self.names, sample, whole=whole, seed=self.seed
        )
        return extremes.widened(added), replace(dense, error=dense.error + added)

    def _stored_rounding(
        self, weights: Weights, dense: DenseHessian | None, largest: float
    ) -> float:
        """Returns how much rounding θ in a file raises the loss at a minimum: ½ Σ Hᵢᵢ (u θᵢ)²."""
        stored = {name: weights[name] for name in self.names}
        units = {name: torch.finfo(tensor.dtype).eps / 2 for name, tensor in stored.items()}
        steps = torch.cat([t.cpu().double().reshape(-1) * units[n] for n, t in stored.items()])
        curvatures = abs(largest) if dense is None else torch.from_numpy(dense.matrix).diag().abs()
        weighted: Tensor = steps.square() * curvatures
        return float(weighted.sum()) / 2
