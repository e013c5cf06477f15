"""Is a point critical, and is it a minimum or a saddle? Gradient, eigenvalues, a verdict."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from itertools import starmap
from typing import Any, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from losscli.arguments import checked
from losscli.checkpoint import CheckpointLike, name_checkpoints, order_path
from losscli.data import Examples, Split
from losscli.errors import UsageError
from losscli.evaluation.cost import Clock, Timings, timed
from losscli.evaluation.curvature import DENSE_LIMIT, PRODUCT_LIMIT, ROWS_PER_PASS, Curvature
from losscli.evaluation.curvature_check import check_derivatives
from losscli.evaluation.device import float32_precision
from losscli.evaluation.eigenvalues import DenseHessian, Eigenpair, Extremes
from losscli.evaluation.finite_differences import noise_of, sample_size
from losscli.evaluation.hessian_rounding import add_rounding, hessian_rounding
from losscli.evaluation.lanczos import MIN_PRODUCTS
from losscli.evaluation.objective import Evaluation, Objective, recalibrated
from losscli.evaluation.perturbation import nearby
from losscli.evaluation.precision import in_float64
from losscli.evaluation.ranks import Arrays, Ranks
from losscli.evaluation.records import idle_layers, record_key, restore
from losscli.evaluation.sampling import Estimate
from losscli.evaluation.sweep import check as check_objective
from losscli.evaluation.sweep import sweep, sweep_plain
from losscli.evaluation.tasks import ALONE, Execution, Task
from losscli.evaluation.verdict import Verdict, verdict
from losscli.results import Result
from losscli.settings import Settings
from losscli.studies.base import Study, count
from losscli.studies.notes import general_notes, spectral_notes
from losscli.studies.problem import prepare
from losscli.studies.registry import COMMANDS
from losscli.studies.verification import check_differentiable, verify_fresh_model
from losscli.summaries import (
    CheckedPoint,
    CheckSummary,
    CostEstimate,
    Description,
    Escape,
    Predicted,
    Step,
)
from losscli.table import Cell, Table
from losscli.weight_space.curve import standard_error
from losscli.weight_space.slices import Line
from losscli.weight_space.vectors import Weights, norm

__all__ = ["Check", "check"]

# What a residual norm may be, as a share of |λ|, for an eigenvalue to count as found.
_TOLERANCE = 1e-4

# So many eigenvectors of a small network still fit into memory.
_MOST_EIGENVALUES = 10_000

# Lengths of steps that are tried, as shares of the norm of the weights.
_STEPS = tuple(2.0**k for k in range(4, -21, -1))

# Points of the escape's curve to either side.
_SIDE = 20

# Examples on which rounding is measured against float64.
_MEASURED = 256

# Weights beside a point: a model that keeps what it computed from the point shows it there.
_BESIDE = 1.01

# Roundings of a loss, in units of ε: as many as decide about extrema of curves.
_ROUNDINGS = 16

# A predicted change of the loss this many times its accuracy is far beyond it.
_FAR = 10

# The sides of a point, seen along an eigenvector.
_SIDES = "negative", "positive"

# Before the names of tensors in a record.
_DOWN = "down "

# Functions with kinks, at which a second derivative does not exist, by their names in torch.
_KINKED = frozenset({
    "abs", "amax", "amin", "clamp", "clip", "hardsigmoid", "hardswish", "hardtanh", "l1_loss",
    "leaky_relu", "max", "max_pool1d", "max_pool2d", "max_pool3d", "maximum", "min", "minimum",
    "prelu", "relu", "relu6", "relu_", "rrelu", "threshold",
})  # fmt: skip


@checked(Settings)
def check(
    names: CheckpointLike | Iterable[CheckpointLike],
    *,
    tolerance: float = 1e-3,
    eigenvalues: int = 1,
    learning_rate: float | None = None,
    keep_order: bool = False,
    momentum: float | None = None,
    progress: Callable[[float], None] | None = None,
    **settings: Any,
) -> Result[CheckSummary]:
    """Checks whether checkpoints are critical points, and of which kind.

    Args:
        names: The checkpoints, in the order of training where there are several.
        tolerance: The largest gradient norm of a critical point.
        eigenvalues: How many eigenvalues of either end of the Hessian's spectrum are found.
        learning_rate: The learning rate η of training. The largest eigenvalue is compared with
            2/η, above which full-batch gradient descent is unstable.
        momentum: The momentum β of training, with which that is (2 + 2β)/η; heavy ball, without
            dampening or Nesterov's correction.
        keep_order: Take the checkpoints in the order of their names as they are given, and all
            files of a folder; by default they are ordered as `trajectory` does.
        progress: Called with the number of checkpoints done so far.
        **settings: The attributes of `losscli.settings.Settings`: ``model``, ``data``, ….

    Returns:
        The result: its table has a row for each checkpoint and split, ``more["spectrum"]`` one for
        each eigenvalue where there are more than two, and ``more["escape"]`` the loss along the
        most negative curvature of the last checkpoint, if it has any.

    Raises:
        LosscliError: Something is missing, broken or does not fit.
    """
    plan = Check.plan(
        name_checkpoints(names),
        Settings(**settings),
        tolerance=tolerance,
        eigenvalues=eigenvalues,
        learning_rate=learning_rate,
        keep_order=keep_order,
        momentum=momentum,
    )
    return plan.run(Execution(progress))


@dataclass(frozen=True)
class _Found:
    """What was found at one checkpoint on one split."""

    checkpoint: str
    split: str
    loss: float
    gradient_norm: float
    extremes: Extremes
    shares: Sequence[float]
    spectrum: Sequence[tuple[float, float]]
    verdict: str
    descent: Step | None
    judgement: _Judgement

    @property
    def smallest(self) -> Eigenpair:
        return self.extremes.smallest[0]

    @property
    def largest(self) -> Eigenpair:
        return self.extremes.largest[0]

    @classmethod
    def recalled(
        cls, checkpoint: str, split: str, known: Mapping[str, NDArray[Any]]
    ) -> tuple[Self, Weights | None]:
        """Takes what `arrays` gave, but for eigenvectors; and the way down, if any."""
        loss, size, *shares = known["numbers"].tolist()
        products, exact, *_ = known["counts"].tolist()
        nothing = torch.empty(0, dtype=torch.float64)
        smallest, largest = (
            tuple(
                Eigenpair(x, error, nothing, bool(sure)) for x, error, sure in known[end].tolist()
            )
            for end in ("smallest", "largest")
        )
        descent = _told(known["descent"].tolist())
        down = {
            key.removeprefix(_DOWN): torch.from_numpy(array)
            for key, array in known.items()
            if key.startswith(_DOWN)
        }
        one = cls(
            *(checkpoint, split, loss, size),
            Extremes(smallest, largest, products, bool(exact)),
            shares,
            [(value, error) for value, error in known["spectrum"].tolist()],
            _verdict(known),
            descent,
            _Judgement.recalled(known),
        )
        return one, down or None

    def arrays(self, down: Weights | None, objective: Objective) -> dict[str, NDArray[Any]]:
        """All that is to be known again, with the way down and the objective's state."""
        batch_size = objective.batch_size
        ends = {"smallest": self.extremes.smallest, "largest": self.extremes.largest}
        kind = get_args(Verdict).index(self.verdict)
        return {
            "numbers": np.array([self.loss, self.gradient_norm, *self.shares]),
            "counts": np.array([self.extremes.products, self.extremes.exact, kind, batch_size]),
            **{
                end: np.array([(pair.value, pair.error, pair.converged) for pair in pairs])
                for end, pairs in ends.items()
            },
            "idle": idle_layers(objective),
            "spectrum": np.array(self.spectrum),
            "descent": np.array([*self.descent.values()] if self.descent else []),
            **self.judgement.arrays(),
            **{f"{_DOWN}{key}": t.cpu().numpy() for key, t in (down or {}).items()},
        }

    def row(self) -> list[Cell]:
        # The trace of a whole Hessian is exact.
        positive, negative, undecided, trace, stderr = (
            (*self.shares, 0.0) if self.shares else [None] * 5
        )
        return [
            *(self.checkpoint, self.split, self.loss, self.gradient_norm),
            *(self.smallest.value, self.smallest.error),
            *(self.largest.value, self.largest.error),
            *(positive, positive, negative, undecided, trace, stderr, self.verdict),
        ]

    def told(self) -> CheckedPoint:
        """What the table does not hold."""
        return {
            "checkpoint": self.checkpoint,
            "split": self.split,
            "verdict": self.verdict,
            **self.judgement.told(),
            "lambda_min_converged": self.smallest.converged,
            "lambda_max_converged": self.largest.converged,
            "exact": self.extremes.exact,
            "products": self.extremes.products,
            "descent": self.descent,
        }


@dataclass(frozen=True)
class _Judgement:
    """What a verdict rests on beside the eigenvalues.

    Attributes:
        reason: Why nothing is decided; empty where something is.
        slope: ⟨∇L, v⟩, v the eigenvector of λ_min.
        loss_rounding: How much of a change of the mean loss may be rounding.
        change: By how much the loss is predicted to change towards a minimum (downwards) or a
            maximum (upwards); nan for other points. An upper bound where it is not exact.
        exact: Whether ``change`` is ½ gᵀ|H|⁻¹g, and not its bound ‖g‖² / 2 min abs(λ).
        sides: The lowest loss to the negative and to the positive side of v, as far as it is
            below that of the point; None where the curvature is not negative.
        measured: Examples on which the rounding of eigenvalues was measured.
        scattered: Whether there was no float64 to measure it against, or to compute in.
        unverified: What derivatives could not be compared with differences; empty if none.
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

    @classmethod
    def recalled(cls, known: Mapping[str, NDArray[Any]]) -> Self:
        slope, rounding, change, exact, measured, scattered = known["judgement"].tolist()
        sides = [_told(known[side].tolist()) for side in _SIDES if side in known]
        return cls(
            known["reason"].tobytes().decode(),
            *(slope, rounding, change, bool(exact)),
            (sides[0], sides[1]) if sides else None,
            int(measured),
            bool(scattered),
            known["unverified"].tobytes().decode(),
        )

    def decide(
        self, decided: Verdict, smallest: Eigenpair, largest: Eigenpair, stored: float
    ) -> tuple[Verdict, Self]:
        """Withdraws a verdict that says more than the losses show, and says why.

        Args:
            decided: The verdict by the gradient and the eigenvalues.
            smallest: λ_min.
            largest: λ_max.
            stored: What rounding of the weights themselves does to the loss at a minimum.

        Returns:
            The verdict, and what it rests on.
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
                way = "lower" if decided == "minimum" else "raise"
                bound = "" if self.exact else "up to "
                reason = (
                    f"{step} {may} {way} the loss by {bound}{self.change:.2g}, and the loss "
                    f"is known to {accuracy:.2g}: the point is beside a {decided}, not at it"
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

    def arrays(self) -> dict[str, NDArray[Any]]:
        numbers = [self.slope, self.loss_rounding, self.change, self.exact]
        numbers += [self.measured, self.scattered]
        sides = dict(zip(_SIDES, self.sides, strict=True)) if self.sides else {}
        return {
            "judgement": np.array(numbers, np.float64),
            "reason": np.frombuffer(self.reason.encode(), np.uint8),
            "unverified": np.frombuffer(self.unverified.encode(), np.uint8),
            **{name: np.array([*side.values()] if side else []) for name, side in sides.items()},
        }

    def told(self) -> CheckedPoint:
        predicted: Predicted = {"change": self.change, "exact": self.exact}
        return {
            "reason": self.reason or None,
            "slope_along_lambda_min": self.slope,
            "loss_rounding": self.loss_rounding,
            "predicted": predicted if math.isfinite(self.change) else None,
            "sides": self.sides and {"negative": self.sides[0], "positive": self.sides[1]},
            "rounding_measured_on": self.measured,
            "unverified": self.unverified or None,
        }


@dataclass(frozen=True)
class Check(Study):
    """Checkpoints that are ready to be checked.

    Attributes:
        tolerance: The largest gradient norm of a critical point.
        eigenvalues: How many of either end are found.
        learning_rate: That of training, if known.
        momentum: Likewise; 0 where it is None.
    """

    command = "check"

    tolerance: float
    eigenvalues: int
    learning_rate: float | None
    momentum: float | None

    @classmethod
    def plan(
        cls,
        names: Sequence[str],
        settings: Settings,
        *,
        tolerance: float,
        eigenvalues: int,
        learning_rate: float | None,
        keep_order: bool = False,
        momentum: float | None = None,
        ranks: Ranks | None = None,
    ) -> Check:
        """Reads and matches everything, and evaluates nothing.

        Args:
            names: The checkpoints.
            settings: The settings.
            tolerance: The largest gradient norm of a critical point.
            eigenvalues: How many of either end will be found.
            learning_rate: That of training.
            keep_order: Whether the names stay in the order in which they are given.
            momentum: Likewise.
            ranks: The processes that share the run, if there are several.

        Returns:
            The plan.

        Raises:
            LosscliError: Something is missing, broken or does not fit.
        """
        begun = time.perf_counter()
        names, notes = order_path(names, keep_order=keep_order)
        if not names:
            raise UsageError("check needs a checkpoint", "Give one or more")
        if len(set(names)) < len(names):
            twice = next(name for name in names if list(names).count(name) > 1)
            raise UsageError(f"{twice} is named twice", "Name each checkpoint once")
        if not 0 <= tolerance < math.inf:
            raise UsageError(f"--tolerance {tolerance} is no gradient norm", "Give 1e-3")
        if eigenvalues < 1:
            raise UsageError(f"--eigenvalues {eigenvalues} leaves none", "Give 1 or more")
        if eigenvalues > _MOST_EIGENVALUES:
            raise UsageError(
                f"--eigenvalues {eigenvalues} needs as many vectors of the network's size",
                f"Give {_MOST_EIGENVALUES} or fewer",
            )
        if learning_rate is not None and not 1e-12 <= learning_rate <= 1e12:
            raise UsageError(f"--learning-rate {learning_rate} is none", "Give 0.1")
        if momentum is not None and learning_rate is None:
            raise UsageError(
                "--momentum changes the threshold of a learning rate, and none is given",
                "Add --learning-rate",
            )
        if momentum is not None and not 0 <= momentum < 1:
            raise UsageError(f"--momentum {momentum} is not in [0, 1)", "Give 0.9")
        if settings.batch_loss:
            raise UsageError(
                "--batch-loss is not available for check",
                "Give a --loss that is one number per example",
            )
        if settings.sampling_error is not None:
            raise UsageError(
                "a gradient is that of all examples, so --sampling-error has no place in a check",
                "Look at fewer with --limit",
            )
        problem = prepare(names, settings, notes, ranks)
        # The loss is a function of the parameters; statistics of BatchNorm are no part of θ here.
        moving = problem.parameters(problem.moving)
        if not moving:
            raise UsageError("no parameter is left to differentiate", "Widen --only")
        check_differentiable(problem, moving, "check")
        return cls(problem, moving, begun, tolerance, eigenvalues, learning_rate, momentum)

    @property
    def options(self) -> dict[str, Any]:
        """What decides and how much is found."""
        return {
            "tolerance": self.tolerance,
            "eigenvalues": self.eigenvalues,
            "learning_rate": self.learning_rate,
            "momentum": self.momentum,
        }

    @property
    def threshold(self) -> float | None:
        """The largest λ_max at which full-batch training is stable: (2 + 2β)/η."""
        # Cohen et al. 2021 (arXiv 2103.00065), of heavy ball without dampening.
        if self.learning_rate is None:
            return None
        return (2 + 2 * (self.momentum or 0.0)) / self.learning_rate

    def extra_description(self, description: Description) -> Description:
        """Returns the work beside evaluating the checkpoints.

        Args:
            description: What every study describes.

        Returns:
            The most Hessian-vector products, each of which costs a few passes over the data, and
            the most points along directions, each of which costs one.
        """
        size = description["moving"]["values"]
        splits = len(self.problem.objective.splits)
        most = size if size <= DENSE_LIMIT else PRODUCT_LIMIT
        return {
            "products_at_most": most * splits * len(self.problem.names),
            "steps_at_most": self._steps * splits,
        }

    @property
    def _steps(self) -> int:
        """Points along directions at which a split is evaluated, at most."""
        # Each checkpoint is followed along −∇L, or along v to both sides, and the last one both
        # ways; one of them has its loss drawn.
        return len(_STEPS) * (2 * len(self.problem.names) + 1) + 2 * _SIDE + 4

    def extra_cost(self, timings: Timings, clock: Clock, seconds: float) -> CostEstimate:
        """Tells what gradients and products with the Hessian take; their number is not known.

        Args:
            timings: How fast points are evaluated.
            clock: The clock.
            seconds: What their evaluation takes.

        Returns:
            ``seconds`` for the fewest products, ``seconds_at_most`` for the most, and what a
            ``product`` takes on all examples of the splits.
        """
        objective, origin = self.problem.objective, self.problem.origin
        batch = next(iter(objective.splits.values())).first(objective.batch_size)
        batch = batch.to(objective.device)
        with objective.frozen_statistics():
            differentiated = self._differentiated(origin)
            with Curvature(differentiated, origin, self.moving, batch) as curvature:
                whole = curvature.size <= DENSE_LIMIT
                v = curvature.gradient().expand(ROWS_PER_PASS if whole else 1, -1)
                # Once, so that what is set up is set up.
                curvature.product(v)
                took = timed(differentiated, lambda: curvature.product(v), clock) / len(v)
        examples = sum(map(len, objective.splits.values()))
        product = took * examples / len(batch)
        number, size = len(self.problem.names), curvature.size
        # A gradient takes no more than a product.
        fewest, most = (size, size) if whole else (MIN_PRODUCTS, PRODUCT_LIMIT)
        measured = 1 + 2 * self.eigenvalues
        return {
            "seconds": seconds + number * fewest * product,
            "kind": "at least",
            "seconds_at_most": seconds
            + number * (most + measured) * product
            + self._steps * examples * timings.plain,
            "product": {"seconds": product},
        }

    @property
    def slices(self) -> tuple[int, int]:
        """None is swept by plan; where there is a way down, it is."""
        return 0, 0

    @property
    def evaluations(self) -> int:
        """The checkpoints."""
        return len(self.problem.names)

    @property
    def unit(self) -> str:
        """What progress counts."""
        return "checkpoints"

    def run(self, execution: Execution = ALONE) -> Result[CheckSummary]:
        """Finds gradients and eigenvalues, and says what follows.

        Args:
            execution: How its tasks are executed. Progress counts checkpoints.

        Returns:
            The result.

        Raises:
            LosscliError: The model or the loss fails on the data or has no derivatives, gives two
                answers for one point, or does not fit into the memory.
        """
        objective = self.problem.objective
        names, splits = self.problem.names, list(objective.splits)
        with float32_precision(tf32=self.problem.settings.tf32):
            swept = time.perf_counter()
            last = self.problem.place(self.problem.last.weights)
            check_objective(objective, self.problem.origin, last)
            # Beside the point, where the way down and differences are evaluated.
            verify_fresh_model(
                self.problem, {**last, **{n: last[n] * _BESIDE for n in self.moving}}
            )
            objective.load(self.problem.origin)
            del last
            heard = self._heard()
            records = self._look_at_all(execution)
            seen = {
                (t, split): _Found.recalled(names[t], split, records[t, split])
                for t, _ in enumerate(names)
                for split in splits
            }
            found = [one for one, _ in seen.values()]
            # A saddle's way out is shown before that of a point which is not critical.
            escape: Escape | None = None
            curve: Table | None = None
            ways = [t for t, _ in enumerate(names) if seen[t, splits[0]][1] is not None]
            if ways:
                t = max(ways, key=lambda t: (seen[t, splits[0]][0].verdict == "saddle", t))
                escape, curve = self._escape(t, *seen[t, splits[0]], execution.quiet)
            seconds = self.seconds(swept)
        more = {}
        if any(len(one.spectrum) > 2 for one in found):
            more["spectrum"] = Table.build(
                ["checkpoint", "split", "eigenvalue", "error"],
                ([one.checkpoint, one.split, *pair] for one in found for pair in one.spectrum),
            )
        if curve is not None:
            more["escape"] = curve
        table = Table.build(
            [
                *("checkpoint", "split", "loss", "gradient_norm"),
                *("lambda_min", "lambda_min_error", "lambda_max", "lambda_max_error"),
                *("minimal_ratio", "positive", "negative", "undecided"),
                *("trace", "trace_stderr", "verdict"),
            ],
            (one.row() for one in found),
        )
        summary: CheckSummary = {
            **self.origin(),
            "tables": list(more),
            "tolerance": self.tolerance,
            "learning_rate": self.learning_rate,
            "momentum": self.momentum,
            "threshold": self.threshold,
            "examples": {name: len(split) for name, split in objective.splits.items()},
            "splits": {
                name: {"points": [one.told() for one in found if one.split == name]}
                for name in objective.splits
            },
            "escape": escape,
            "notes": [*general_notes(self), *spectral_notes(self), *self._notes(heard, found)],
            "seconds": seconds,
        }
        return Result(table, summary, COMMANDS[self.command].draw, more)

    def _look_at_all(self, execution: Execution) -> dict[tuple[int, str], Arrays]:
        """Looks at all checkpoints on all splits.

        Each checkpoint and split is looked at by one rank: a search for eigenvalues is a row of
        products, each of which begins where the one before has ended. So where there is but one
        checkpoint and one split, the other ranks wait for it. The way down is swept by all.

        Args:
            execution: How that is executed.

        Returns:
            What `_Found.recalled` takes of each.
        """
        objective, seed = self.problem.objective, self.problem.settings.seed
        splits = objective.splits
        # The last checkpoint comes first: of saddles, the way out of the last one is shown.
        pieces = [(t, split) for t in range(len(self.problem.names))[::-1] for split in splits]
        if execution.size > 1:
            # The longest first, so that no rank is left alone with one of these.
            pieces.sort(key=lambda piece: -len(splits[piece[1]]))
        placed = lru_cache(maxsize=1)(self._placed)
        found: dict[tuple[int, str], Arrays] = {}

        def key(t: int, split: str) -> str:
            numbers = [list(self.moving), self.eigenvalues, self.tolerance, seed]
            return record_key(objective, {split: splits[split]}, "check", [placed(t)], numbers)

        def evaluate(t: int, split: str, own: Execution) -> Arrays:
            wanted = self._wanted(t, split, found)
            found[t, split] = self._look(t, split, placed(t), wanted, own)
            return found[t, split]

        def task(t: int, split: str) -> Task:
            own = execution.key(partial(key, t, split))
            return Task(1 / len(splits), partial(evaluate, t, split), own, "")

        tasks = starmap(task, pieces)
        for piece, arrays in zip(pieces, execution.run(tasks), strict=True):
            restore(objective, int(arrays["counts"][-1]), arrays["idle"].tolist())
            found[piece] = arrays
        return found

    def _placed(self, t: int) -> Weights:
        return self.problem.place(self.problem.open(t).weights)

    def _wanted(
        self, t: int, split: str, found: Mapping[tuple[int, str], Arrays]
    ) -> Collection[str]:
        """The verdicts with which a way down is kept, by what was found of later checkpoints."""
        if split != next(iter(self.problem.objective.splits)):
            return ()
        if t == len(self.problem.names) - 1:
            return get_args(Verdict)
        later = (_verdict(arrays) for (_, of), arrays in found.items() if of == split)
        # It has a number for every weight.
        return () if "saddle" in later else ("saddle",)

    def _look(
        self,
        t: int,
        split: str,
        placed: Weights,
        wanted: Collection[str],
        execution: Execution,
    ) -> Arrays:
        """Looks at one checkpoint on one split; also for a way down, if the verdict is wanted."""
        objective, quiet = self.problem.objective, execution.quiet
        examples = {split: objective.splits[split]}
        weights = recalibrated(objective, placed)
        # What is differentiated, and followed, is a function of the parameters alone.
        with objective.frozen_statistics():
            (losses,) = sweep_plain(objective, [weights], splits=examples, execution=quiet)
            here = losses[split]
            every, seed = objective.splits[split], self.problem.settings.seed
            sample, rows = every.spread(_MEASURED)
            sample = sample.to(objective.device)
            precise = self._precise

            def attend(_: float) -> None:
                # How far a search is nobody knows, but others may have failed meanwhile.
                execution.poll()

            differentiated = self._differentiated(weights)
            with Curvature(differentiated, weights, self.moving, every, attend) as curvature:
                gradient = curvature.gradient()
                size = float(gradient.norm())
                whole = curvature.size <= DENSE_LIMIT
                dense = curvature.dense() if whole else None
                extremes = curvature.extremes(self.eigenvalues, tolerance=_TOLERANCE, seed=seed)
                vector = extremes.smallest[0].vector
                down = curvature.named(vector)
                along = curvature.named(-gradient / size) if size > 0 else None
            is_whole = len(sample) == len(every)
            if dense is None:
                wider = None if precise is objective else precise
                given = extremes, objective, wider, weights, self.moving, sample
                extremes = add_rounding(*given, whole=is_whole, seed=seed)
            else:
                added = hessian_rounding(
                    differentiated, weights, self.moving, sample, whole=is_whole, seed=seed
                )
                dense = replace(dense, error=dense.error + added)
                extremes = extremes.widened(added)
            ends = {"λ min": vector, "λ max": extremes.largest[0].vector}
            few = every.spread(sample_size(objective.operations))[0].to(objective.device)
            unverified = check_derivatives(
                precise or objective, weights, self.moving, few, ends, seed
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
            judgement = _Judgement(
                slope=float(gradient @ vector),
                loss_rounding=self._loss_rounding(weights, here, sample, rows),
                change=change,
                exact=dense is not None,
                measured=len(sample),
                scattered=precise is None,
                unverified=unverified,
            )
            if smallest.value + smallest.error < 0 and decided in {*wanted, "saddle"}:
                judgement = self._fall(
                    weights, down, smallest.value, examples, here, judgement, quiet
                )
            descent = None
            if decided == "not critical" and along is not None and math.isfinite(size):
                descent = self._descend(weights, along, examples, here, quiet)
            stored = self._stored_rounding(t, weights, dense, largest.value)
            decided, judgement = judgement.decide(decided, smallest, largest, stored)
        if dense is None:
            pairs = [*extremes.smallest, *reversed(extremes.largest)]
            spectrum = [(pair.value, pair.error) for pair in pairs]
        else:
            spectrum = [(float(value), dense.error) for value in dense.eigenvalues]
        one = _Found(
            self.problem.names[t],
            split,
            float(Estimate.of_evaluation(here).mean[0]),
            size,
            extremes,
            () if dense is None else (*dense.shares, float(np.trace(dense.matrix))),
            spectrum,
            decided,
            descent,
            judgement,
        )
        return one.arrays(down if judgement.sides and decided in wanted else None, objective)

    @cached_property
    def _precise(self) -> Objective | None:
        """The objective in float64, if there is one."""
        objective = self.problem.objective
        split = next(iter(objective.splits.values()))
        sample, _ = split.spread(sample_size(objective.operations))
        return in_float64(objective, sample.to(objective.device), inside=True)

    def _differentiated(self, weights: Weights) -> Objective:
        """Returns what gradient and eigenvalues are computed with: a whole Hessian in float64."""
        small = sum(weights[name].numel() for name in self.moving) <= DENSE_LIMIT
        return (self._precise if small else None) or self.problem.objective

    def _loss_rounding(
        self, weights: Weights, here: Evaluation, sample: Split, rows: Tensor
    ) -> float:
        """Returns how much of a change of the mean loss may be rounding.

        Args:
            weights: The point.
            here: The split at the point.
            sample: Some examples of the split.
            rows: Their positions.
        """
        # Where activations cancel, that is far more than some roundings of the losses.
        own = here.losses[0].double()
        objective = self.problem.objective
        dtype = objective.dtype
        rounding = _ROUNDINGS * torch.finfo(dtype).eps * float(own.abs().mean())
        if self._precise is None or self._precise is objective:
            near = nearby(weights, self.moving, dtype, self.problem.settings.seed)
            losses = [objective.plain(at, {"": sample})[""].losses[0].double() for at in near]
            objective.load(weights)
            rounding = max(rounding, noise_of(losses))
        else:
            (found,) = self._precise.plain(weights, {"": sample}).values()
            apart = own[rows] - found.losses[0]
            rounding = max(rounding, float(apart.square().mean().sqrt()))
        return rounding

    def _stored_rounding(
        self, t: int, weights: Weights, dense: DenseHessian | None, largest: float
    ) -> float:
        """Returns what rounding θ for its file does to the loss at a minimum: ½ Σ Hᵢᵢ (u θᵢ)²."""
        stored = self.problem.open(t).weights
        units = {n: torch.finfo(stored[n].dtype).eps / 2 for n in self.moving}
        steps = torch.cat([weights[n].cpu().double().reshape(-1) * units[n] for n in self.moving])
        curvatures = abs(largest) if dense is None else torch.from_numpy(dense.matrix).diag().abs()
        weighted: Tensor = steps.square() * curvatures
        return float(weighted.sum()) / 2

    def _fall(
        self,
        weights: Weights,
        direction: Weights,
        curvature: float,
        splits: Mapping[str, Examples],
        here: Evaluation,
        judgement: _Judgement,
        execution: Execution,
    ) -> _Judgement:
        """Tries steps to both sides along the most negative curvature."""
        # With the slope g and the curvature λ < 0 the loss rises by g² / 2 abs(λ) on one side
        # before it falls. A fall beyond a much higher hill has nothing to do with this point.
        rounding = judgement.loss_rounding
        hill = 2 * judgement.slope**2 / (2 * abs(curvature)) + rounding
        # Steps as short as √(2ρ / abs(λ)) change the loss by no more than its rounding ρ.
        size = norm(weights, self.moving) or 1.0
        size = max(size, math.sqrt(2 * rounding / abs(curvature)) if rounding < math.inf else 0.0)
        sides = []
        for sign in (-1, 1):
            distances = [sign * size * share for share in _STEPS]
            found = self._along(weights, direction, distances, splits, execution)
            best = _best(distances, found, here)
            rise = Estimate.of_evaluation(found).mean - Estimate.of_evaluation(here).mean[0]
            # From the shortest step on.
            for change in rise[::-1]:
                if change < -rounding or not change <= hill:
                    break
            falls = bool(change < -rounding)
            sides.append(best and {**best, "falls": falls})
        return replace(judgement, sides=(sides[0], sides[1]))

    def _along(
        self,
        weights: Weights,
        direction: Weights,
        distances: Sequence[float],
        splits: Mapping[str, Examples],
        execution: Execution,
    ) -> Evaluation:
        """Evaluates one split at distances along a direction of length one."""
        objective = self.problem.objective
        start = self.on_device(weights, direction)
        end = {
            name: (start[name] + step.to(start[name].device)).to(
                torch.promote_types(start[name].dtype, torch.float32)
            )
            for name, step in direction.items()
        }
        objective.load(weights)
        points = [(distance,) for distance in distances]
        found = sweep(objective, Line(start, end), points, splits=splits, execution=execution)
        return next(iter(found.values()))

    def _descend(
        self,
        weights: Weights,
        direction: Weights,
        splits: Mapping[str, Examples],
        here: Evaluation,
        execution: Execution,
    ) -> Step | None:
        """Tries steps of many lengths; returns the one that gains most."""
        size = norm(weights, self.moving) or 1.0
        distances = [size * share for share in _STEPS]
        found = self._along(weights, direction, distances, splits, execution)
        return _best(distances, found, here)

    def _escape(
        self, t: int, one: _Found, direction: Weights | None, execution: Execution
    ) -> tuple[Escape, Table]:
        """Follows the most negative curvature both ways, as far as the loss falls and beyond."""
        assert direction is not None
        objective = self.problem.objective
        splits = {one.split: objective.splits[one.split]}
        weights = recalibrated(objective, self._placed(t))
        with objective.frozen_statistics():
            (plain,) = sweep_plain(objective, [weights], splits=splits, execution=execution)
            return self._follow(one, weights, direction, plain[one.split], splits, execution)

    def _follow(
        self,
        one: _Found,
        weights: Weights,
        direction: Weights,
        here: Evaluation,
        splits: Mapping[str, Examples],
        execution: Execution,
    ) -> tuple[Escape, Table]:
        sides = [side for side in one.judgement.sides or () if side]
        # Where nothing was gained, the valley is finer than the steps tried.
        shortest = (norm(weights, self.moving) or 1.0) * _STEPS[-1]
        reach = max((2 * abs(side["distance"]) for side in sides), default=shortest)
        grid = [reach * i / _SIDE for i in range(-_SIDE, _SIDE + 1) if i]
        # A fall may be too close to be among these, or be one of them up to rounding.
        falls = {sign * side["distance"] for side in sides for sign in (1, -1)}
        apart = [x for x in grid if not any(math.isclose(x, fall) for fall in falls)]
        steps = sorted({*apart, *falls})
        found = self._along(weights, direction, steps, splits, execution)
        lowest = _best(steps, found, here)
        along, own = Estimate.of_evaluation(found), Estimate.of_evaluation(here)
        rows: list[list[Cell]] = [[step, *along.row(i, {})] for i, step in enumerate(steps)]
        rows.insert(len(rows) // 2, [0.0, *own.row(0, {})])
        nothing: Step = {"distance": 0.0, "loss": one.loss, "gain": 0.0, "gain_stderr": 0.0}
        told: Escape = {
            "checkpoint": one.checkpoint,
            "split": one.split,
            "eigenvalue": one.smallest.value,
            "slope": one.judgement.slope,
            **(lowest or nothing),
        }
        return told, Table.build(["distance", "loss", "loss_stderr"], rows)

    def _heard(self) -> set[str]:
        """The functions of torch that the model or the loss calls on a first batch."""
        objective = self.problem.objective
        batch = next(iter(objective.first_batches().values()))
        inputs = objective.data.prepare(batch.inputs, objective.dtype)
        with torch.no_grad(), _Listening() as heard:
            outputs = objective.forward(objective.model, inputs)
            objective.per_example(objective.loss, outputs, batch.targets, "loss")
        names: set[str] = heard.names
        return names

    def _notes(self, heard: set[str], found: Sequence[_Found]) -> Iterator[str]:
        model = self.problem.objective.model
        if self.problem.chosen:
            yield (
                f"gradient and Hessian are those of {count(len(self.moving), 'tensor')}, and the "
                "verdict is one on these alone"
            )
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
            yield "BatchNorm is in eval mode: its statistics are constants, not functions of θ"
        if "scaled_dot_product_attention" in heard:
            yield "attention is differentiated by its math kernel: the fused ones cannot be twice"
        if kinks := sorted(heard & _KINKED):
            have = "have" if len(kinks) > 1 else "has"
            yield (
                f"{', '.join(kinks)} {have} kinks: the Hessian is that of the smooth piece around "
                "each checkpoint, and says nothing of the kinks beside it"
            )
        yield from dict.fromkeys(
            one.judgement.unverified for one in found if one.judgement.unverified
        )
        if any(one.judgement.scattered for one in found):
            yield (
                "no float64 copy of the model can be made: errors of eigenvalues include rounding "
                "only as far as products at points nearby show it"
            )
        lost = [one for one in found if not math.isfinite(one.smallest.value)]
        if lost:
            yield (
                f"loss or derivatives are not finite at {len(lost)} of {len(found)} points: "
                "nothing is decided there"
            )
        missed = [
            one
            for one in found
            if one not in lost and not (one.smallest.converged and one.largest.converged)
        ]
        if missed:
            yield (
                f"the search for eigenvalues has not converged at {len(missed)} of "
                f"{len(found)} points: no minimum or maximum is claimed there"
            )


def _told(numbers: Sequence[float]) -> Step | None:
    """A step that was recorded, if there was one."""
    if not numbers:
        return None
    distance, loss, gain, stderr, *falls = numbers
    step: Step = {"distance": distance, "loss": loss, "gain": gain, "gain_stderr": stderr}
    return {**step, "falls": bool(falls[0])} if falls else step


def _verdict(arrays: Arrays) -> str:
    """The verdict in what `_Found.arrays` made."""
    kinds: Sequence[str] = get_args(Verdict)
    return kinds[int(arrays["counts"][2])]


class _Listening(TorchFunctionMode):
    """Writes down which functions are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self.names.add(getattr(func, "__name__", "").lstrip("_"))
        return func(*args, **(kwargs or {}))


def _best(distances: Sequence[float], found: Evaluation, here: Evaluation) -> Step | None:
    """The distance with the lowest loss, if it is below that at zero; errors are paired."""
    losses, own = found.losses.numpy(), here.losses[0].numpy()
    weights = None if here.weights is None else here.weights.numpy()
    with np.errstate(all="ignore"):
        means = losses.mean(axis=1, dtype=np.float64)
        mean = float(own.mean(dtype=np.float64))
    finite = [i for i in range(len(means)) if math.isfinite(means[i])]
    best = min(finite, key=means.__getitem__, default=None)
    if best is None or not means[best] < mean:
        return None
    return {
        "distance": float(distances[best]),
        "loss": float(means[best]),
        "gain": mean - float(means[best]),
        "gain_stderr": standard_error(own.astype(np.float64) - losses[best], weights),
    }
