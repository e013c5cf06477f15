"""Sharpness of the loss of one split around one point of weight space.

Average: E over δ ~ N(0, ρ² diag(c²)) of L(θ + δ) − L(θ), from draws of `perturbation_line`.
Worst-case: max over ‖δ/c‖ ≤ ρ of L(θ + δ) − L(θ). c is 1, or abs(θ) elementwise if adaptive
(Andriushchenko et al. 2023, arXiv 2302.07011). SAM: L(θ + ρ g/‖g‖) − L(θ), g = ∇L(θ) (Foret et al.
2021), adaptive: L(θ + ρ c²g/‖cg‖) − L(θ) (Kwon et al. 2021). Critical: λ_c = 2/η_c with the
smallest step η_c along −g that raises the loss (Kalra et al. 2026, arXiv 2601.16979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self, get_args

import numpy as np
import torch
from torch import Tensor

from losscli.data import Examples
from losscli.evaluation.critical_step import Crossing, Reason, find_crossing
from losscli.evaluation.finite_differences import sample_size
from losscli.evaluation.hessian.curvature import Curvature
from losscli.evaluation.hessian.curvature_check import check_derivatives, float64_copy
from losscli.evaluation.line_search import LineSearch
from losscli.evaluation.loss_rounding import ROUNDING_EXAMPLES, loss_rounding
from losscli.evaluation.objective import Evaluation, Objective
from losscli.evaluation.ranks import Arrays
from losscli.evaluation.records import idle_layers
from losscli.evaluation.sweep import sweep_plain
from losscli.evaluation.tasks import Execution
from losscli.weight_space.curve import standard_error
from losscli.weight_space.directions import gaussian_direction
from losscli.weight_space.slices import Line
from losscli.weight_space.vectors import Weights, norm, unflatten, working_type

__all__ = [
    "MAX_GRADIENTS",
    "GradientSharpness",
    "SharpnessTest",
    "perturbation_line",
    "rises",
    "widened",
]

MAX_GRADIENTS = 20
"""The most gradients of an ascent to the largest loss in a ball."""

# The ascent starts with steps of twice the radius, which a projection shortens. It ends when its
# steps are below this share of the radius, or when they raise the loss by less than this share.
_FIRST_STEP, _LAST_STEP = 2.0, 1 / 32
_GAIN = 1e-4

# A critical step with a larger relative error is computed in float64.
_PRECISION = 1e-4

# A critical step with a larger relative error, also in float64, is not reported.
_LARGEST_ERROR = 0.1


def rises(found: Evaluation, here: Evaluation) -> list[tuple[float, float]]:
    """Computes how much higher the mean loss at each point is than at one point.

    Args:
        found: A split at P points.
        here: The same split at the one point.

    Returns:
        For each of the P points the mean of the paired differences, taken in float64, and their
        standard error over the examples.
    """
    own = here.losses[0].double().numpy()
    weights = None if here.weights is None else here.weights.numpy()
    with np.errstate(all="ignore"):
        differences = [losses.double().numpy() - own for losses in found.losses]
        return [(float(d.mean()), standard_error(d, weights)) for d in differences]


def widened(objective: Objective, weights: Weights) -> Weights:
    """Converts weights to float64 for a forward pass in float64, so that steps are exact too."""
    if objective.dtype != torch.float64:
        return weights
    return {n: t.double() if t.is_floating_point() else t for n, t in weights.items()}


def perturbation_line(
    weights: Weights,
    names: Sequence[str],
    *,
    radius: float,
    adaptive: bool,
    seed: int,
    number: int,
) -> Line:
    """Makes the line from a point to θ + ρ c z with a Gaussian vector z.

    Args:
        weights: The point θ.
        names: The parameters that move.
        radius: ρ.
        adaptive: Whether c is abs(θ) and not 1.
        seed: Of the random numbers.
        number: The number of the draw. It has the same z at every point.

    Returns:
        The line.
    """
    draws = gaussian_direction(weights, names, seed, number)
    start = {name: weights[name].to(working_type(weights[name])) for name in names}
    end = {n: x + radius * (x.abs() if adaptive else 1) * draws[n].to(x) for n, x in start.items()}
    return Line(start, end)


@dataclass(frozen=True)
class GradientSharpness:
    """SAM sharpness and critical sharpness at one point on one split.

    Attributes:
        loss: The mean loss.
        gradient_norm: ‖∇L‖.
        rounding: The largest difference of mean losses that may be rounding.
        sam: SAM sharpness and its standard error for each radius; empty where the gradient, or its
            product with abs(θ) if adaptive, is 0.
        step: The critical step; 0 where the loss rises at once, nan where there is none.
        step_error: How far rounding may move it.
        reason: Why there is no critical step, or why it is 0.
        unverified: Which derivatives could not be compared with differences; empty if none.
        seed_error: The standard error of the mean loss over seeds; nan without several.
    """

    loss: float
    gradient_norm: float
    rounding: float
    sam: Sequence[tuple[float, float]]
    step: float
    step_error: float
    reason: Reason
    unverified: str
    seed_error: float

    @property
    def critical(self) -> float:
        """The critical sharpness 2/η_c: inf for a step of 0."""
        return 2 / self.step if self.step else math.inf

    @property
    def critical_error(self) -> float:
        """How far rounding may move the critical sharpness."""
        return self.critical * self.step_error / self.step if self.step else math.nan

    def to_arrays(self, objective: Objective) -> Arrays:
        """Returns the arrays of a record, with the state of the objective."""
        numbers = [self.loss, self.gradient_norm, self.rounding, self.step, self.step_error]
        numbers.append(self.seed_error)
        return {
            "numbers": np.array(numbers, np.float64),
            "sam": np.array(self.sam, np.float64),
            "reason": np.array(get_args(Reason).index(self.reason)),
            "unverified": np.frombuffer(self.unverified.encode(), np.uint8),
            **_state(objective),
        }

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Self:
        """Reads the arrays of a record."""
        loss, gradient_norm, rounding, step, step_error, seed_error = arrays["numbers"].tolist()
        return cls(
            *(loss, gradient_norm, rounding),
            [(value, stderr) for value, stderr in arrays["sam"].tolist()],
            *(step, step_error),
            get_args(Reason)[int(arrays["reason"])],
            arrays["unverified"].tobytes().decode(),
            seed_error,
        )


@dataclass(frozen=True)
class _Point:
    """One split around one point: its loss, its gradient, and losses along directions.

    Attributes:
        objective: The model, the loss and the data.
        weights: The point: all tensors of the model.
        names: The parameters that move.
        split: The name of the split.
        execution: Evaluates losses; its progress is not counted.
    """

    objective: Objective
    weights: Weights
    names: Sequence[str]
    split: str
    execution: Execution

    @property
    def examples(self) -> dict[str, Examples]:
        """The split by its name."""
        return {self.split: self.objective.splits[self.split]}

    @cached_property
    def here(self) -> Evaluation:
        """The losses at the point."""
        execution = self.execution.quiet
        (losses,) = sweep_plain(
            self.objective, [self.weights], splits=self.examples, execution=execution
        )
        return losses[self.split]

    @cached_property
    def gradient(self) -> Tensor:
        """∇L, ``[n]``."""
        return self.differentiate(self.weights, self.split)[1]

    def differentiate(self, weights: Weights, split: str) -> tuple[float, Tensor]:
        """Computes the mean loss of a split and its gradient at any point."""

        def attend(_: float) -> None:
            # Another rank may have failed meanwhile.
            self.execution.poll()

        every = self.objective.splits[split]
        with Curvature(self.objective, weights, self.names, every, attend) as curvature:
            return curvature.loss, curvature.gradient()

    def at(self, vector: Tensor) -> Weights:
        """Returns all tensors of the model at another point ``[n]``."""
        moved = unflatten(vector, self.weights, self.names)
        return {
            **self.weights,
            **{n: t.to(working_type(self.weights[n])) for n, t in moved.items()},
        }

    def flat(self) -> Tensor:
        """Returns θ as a vector ``[n]`` in float64."""
        return torch.cat([self.weights[name].reshape(-1).double() for name in self.names])

    def rises(self, direction: Tensor, distances: Sequence[float]) -> list[tuple[float, float]]:
        """Computes the rises of the loss at distances along a direction ``[n]``."""
        execution = self.execution.quiet
        named = unflatten(direction, self.weights, self.names)
        search = LineSearch(
            self.objective, self.weights, self.names, self.examples, self.here, execution
        )
        return rises(search.evaluate(named, distances), self.here)

    def rounding(self, float64: Objective | None, seed: int) -> float:
        """Measures how much of a difference of mean losses may be rounding."""
        sample, rows = self.objective.splits[self.split].spread(ROUNDING_EXAMPLES)
        measured = (sample.to(self.objective.device), rows)
        return loss_rounding(
            self.objective, float64, self.weights, self.names, self.here, measured, seed
        )

    def critical_step(self, direction_split: str, rounding: float) -> tuple[Crossing, float]:
        """Finds the crossing along the negative gradient of a split, and returns its norm."""
        direction = self.gradient
        if direction_split != self.split:
            direction = self.differentiate(self.weights, direction_split)[1]
        size = float(direction.norm())
        if not math.isfinite(size) or not self.here.losses.isfinite().all():
            return Crossing(reason="not finite"), size
        if not size:
            return Crossing(reason="zero gradient"), size
        if float(direction @ self.gradient) < 0:
            return Crossing(0.0, 0.0, "ascends"), size
        length = norm(self.weights, self.names) or 1.0
        downhill = -direction / size

        def evaluate(distances: Sequence[float]) -> list[float]:
            return [rise for rise, _ in self.rises(downhill, distances)]

        return find_crossing(evaluate, length, rounding), size


@dataclass(frozen=True)
class SharpnessTest:
    """Measures sharpness that needs gradients.

    Attributes:
        objective: The model, the loss and the data.
        names: The parameters that move, each tied parameter under one name.
        adaptive: Whether the ball of SAM and worst-case sharpness is scaled by abs(θ).
        seed: Of random vectors.
    """

    objective: Objective
    names: Sequence[str]
    adaptive: bool
    seed: int

    @cached_property
    def float64(self) -> Objective | None:
        """The objective in float64; None if there is none."""
        return float64_copy(self.objective)

    def along_gradient(
        self,
        weights: Weights,
        split: str,
        direction_split: str,
        radii: Sequence[float],
        execution: Execution,
    ) -> Arrays:
        """Measures SAM sharpness and critical sharpness.

        Args:
            weights: The point: all tensors of the model.
            split: The name of the split.
            direction_split: The split with the gradient that the critical step is along.
            radii: The radii ρ of SAM sharpness.
            execution: Evaluates losses.

        Returns:
            The record of a `GradientSharpness`.

        Raises:
            LosscliError: The model or the loss fails on the data, or has no derivatives.
        """
        objective = self.objective
        point = _Point(objective, weights, self.names, split, execution)
        with objective.frozen_statistics():
            objective.load(point.weights)
            float64 = self.float64
            rounding = point.rounding(float64, self.seed)
            unverified = self._verify(point)
            sam = self._sam(point, radii)
            crossing, size = point.critical_step(direction_split, rounding)
            imprecise = crossing.error > _PRECISION * crossing.distance
            wider = None if float64 is objective else float64
            if wider is not None and (crossing.reason == "rounding" or imprecise):
                exact = widened(wider, weights)
                wide = _Point(wider, exact, self.names, split, execution)
                with wider.frozen_statistics():
                    crossing, size = wide.critical_step(
                        direction_split, wide.rounding(wider, self.seed)
                    )
            if crossing.error > _LARGEST_ERROR * crossing.distance:
                crossing = Crossing(reason="rounding")
            objective.load(point.weights)
        return GradientSharpness(
            float(point.here.losses[0].double().mean()),
            float(point.gradient.norm()),
            rounding,
            sam,
            crossing.distance / size if size else math.nan,
            crossing.error / size if size else math.nan,
            crossing.reason,
            unverified,
            point.here.seed_error,
        ).to_arrays(objective)

    def worst_case(
        self, weights: Weights, split: str, radius: float, execution: Execution
    ) -> Arrays:
        """Searches for the largest loss in the ball ‖δ/c‖ ≤ ρ by projected gradient ascent in δ/c.

        The first point is the perturbation of SAM. Steps along the normalised gradient are
        projected onto the ball, and halved when they raise the loss by little or not at all.

        Args:
            weights: The point: all tensors of the model.
            split: The name of the split.
            radius: ρ.
            execution: Evaluates losses.

        Returns:
            The record: ``worst``, the largest rise of the loss that was found and its standard
            error, and the number of gradients.

        Raises:
            LosscliError: The model or the loss fails on the data, or has no derivatives.
        """
        objective = self.objective
        point = _Point(objective, weights, self.names, split, execution)
        generator = torch.Generator().manual_seed(self.seed)
        with objective.frozen_statistics():
            own, slope = loss, _ = point.differentiate(point.weights, split)
            theta = point.flat().to(slope)
            scale = theta.abs() if self.adaptive else 1.0
            best, step, gradients = torch.zeros_like(theta), _FIRST_STEP, 1
            while gradients <= MAX_GRADIENTS and step >= _LAST_STEP:
                uphill = scale * slope
                if not uphill.any():
                    # At a critical point no direction is better than another.
                    noise = torch.randn(theta.shape, generator=generator, dtype=torch.float64)
                    uphill = scale * noise.to(theta)
                length = float(uphill.norm())
                if not 0 < length < math.inf:
                    break
                trial = uphill.mul_(step * radius / length).add_(best)
                trial *= radius / max(float(trial.norm()), radius)
                there, derivative = point.differentiate(point.at(theta + scale * trial), split)
                gradients += 1
                gain = there - loss
                if gain > 0:
                    best, loss, slope = trial, there, derivative
                if not gain > _GAIN * (loss - own):
                    step /= 2
            weights = point.at(theta + scale * best)
            (found,) = sweep_plain(
                objective, [weights], splits=point.examples, execution=execution.quiet
            )
            (worst,) = rises(found[split], point.here)
            objective.load(point.weights)
        return {"worst": np.array([*worst, gradients]), **_state(objective)}

    def _verify(self, point: _Point) -> str:
        """Compares the gradient with differences of the loss; returns a note if that failed."""
        objective = self.objective
        every = objective.splits[point.split]
        few = every.spread(sample_size(objective))[0].to(objective.device)
        float64 = self.float64 or objective
        return check_derivatives(
            float64, point.weights, self.names, few, {}, self.seed, twice=False
        )

    def _sam(self, point: _Point, radii: Sequence[float]) -> list[tuple[float, float]]:
        """Measures SAM sharpness; empty if the gradient has no direction."""
        scale = point.flat().to(point.gradient).abs() if self.adaptive else 1.0
        direction = scale * point.gradient
        length = float(direction.norm())
        if not math.isfinite(length):
            return [(math.nan, math.nan)] * len(radii)
        return point.rises(scale * direction / length, radii) if length else []


def _state(objective: Objective) -> Arrays:
    """Returns the state of an objective that belongs to a record."""
    return {"batch size": np.array(objective.batch_size), "idle": idle_layers(objective)}
