"""Line search: losses at many step lengths from one point along a direction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from losscli.data import Examples
from losscli.evaluation.objective import Evaluation, Objective
from losscli.evaluation.sampling import Estimate
from losscli.evaluation.sweep import sweep
from losscli.evaluation.tasks import Execution
from losscli.results.summaries import Step
from losscli.weight_space.curve import standard_error
from losscli.weight_space.slices import Line
from losscli.weight_space.vectors import Weights, norm, to_device

__all__ = ["CLOSE_STEPS", "MAX_CURVE_POINTS", "STEP_LENGTHS", "LineSearch", "best_step"]

STEP_LENGTHS = tuple(2.0**k for k in range(4, -21, -1))
"""The step lengths that are tried, from the longest down, as shares of the norm of the weights."""

CLOSE_STEPS = STEP_LENGTHS[:3:-4]
"""The step lengths at which the sign of a curvature is checked, from the shortest up."""

# By which factor the bend of a curve grows from one of these to the next between t² and t³.
_CUBIC_GROWTH = 16**2.5

# Points of a curve through the point, on either side of it.
_CURVE_POINTS = 20

MAX_CURVE_POINTS = 2 * _CURVE_POINTS + 4
"""The most points of `LineSearch.curve`, which goes through two known steps and their mirrors."""


@dataclass(frozen=True)
class LineSearch:
    """Evaluates one split along directions from a point.

    Attributes:
        objective: The model and the loss.
        weights: The point: all tensors of the model.
        names: The parameters that directions are made of.
        splits: The split by its name.
        here: The split at the point.
        execution: How the evaluations are executed.
    """

    objective: Objective
    weights: Weights
    names: Sequence[str]
    splits: Mapping[str, Examples]
    here: Evaluation
    execution: Execution

    @property
    def norm(self) -> float:
        """The norm of the parameters; 1 where it is 0."""
        return norm(self.weights, self.names) or 1.0

    def evaluate(self, direction: Weights, distances: Sequence[float]) -> Evaluation:
        """Evaluates the split at distances, of either sign, along a direction of length one."""
        objective = self.objective
        start = {name: to_device(self.weights[name], objective.device) for name in direction}
        end = {
            name: (start[name] + to_device(step, objective.device)).to(
                torch.promote_types(start[name].dtype, torch.float32)
            )
            for name, step in direction.items()
        }
        objective.load(self.weights)
        points = [(distance,) for distance in distances]
        line = Line(start, end)
        found = sweep(objective, line, points, splits=self.splits, execution=self.execution)
        return next(iter(found.values()))

    def descend(self, direction: Weights) -> Step | None:
        """Returns the step along a unit vector that lowers the loss most; None if none does."""
        distances = [self.norm * share for share in STEP_LENGTHS]
        return best_step(distances, self.evaluate(direction, distances), self.here)

    def descend_both_ways(
        self, direction: Weights, slope: float, curvature: float, rounding: float
    ) -> tuple[Step | None, Step | None]:
        """Searches for the best step on either side along a direction of negative curvature.

        With the slope g and the curvature λ < 0 the loss rises by g² / 2 abs(λ) on one side before
        it falls. A fall beyond a much higher hill has nothing to do with this point.

        Args:
            direction: A direction v of length one.
            slope: ⟨∇L, v⟩.
            curvature: vᵀHv, which is negative.
            rounding: How much of a change of the mean loss may be rounding.

        Returns:
            The best step on the negative and on the positive side, which says whether the loss
            ``falls`` beyond rounding before it rises above the hill; None if no step lowers it.
        """
        hill = 2 * slope**2 / (2 * abs(curvature)) + rounding
        size = self._visible_size(curvature, rounding)
        sides = []
        for sign in (-1, 1):
            distances = [sign * size * share for share in STEP_LENGTHS]
            found = self.evaluate(direction, distances)
            best = best_step(distances, found, self.here)
            rises = Estimate.of_evaluation(found).mean - Estimate.of_evaluation(self.here).mean[0]
            for rise in rises[::-1]:  # from the shortest step on
                if rise < -rounding or not rise <= hill:
                    break
            falls = bool(rise < -rounding)
            sides.append(best and Step(**best, falls=falls))
        return sides[0], sides[1]

    def contradicting_step(
        self, direction: Weights, slope: float, curvature: float, rounding: float
    ) -> tuple[float, float] | None:
        """Searches for a step near the point where the loss contradicts the sign of a curvature.

        The bend L(θ + tv) − L(θ) − t⟨∇L, v⟩ is about ½ t² vᵀHv where the loss is smooth. At a kink
        it may have the opposite sign, since H is that of one smooth piece. What counts is the
        shortest step on either side at which the bend exceeds twice the rounding. Terms of third
        order, which may hide a small curvature there, grow with t³; those of a kink grow with t.
        The bend at the next step shows which of these it is.

        Args:
            direction: A direction v of length one.
            slope: ⟨∇L, v⟩.
            curvature: An estimate of vᵀHv with its sign; not zero.
            rounding: How much of a change of the mean loss may be rounding.

        Returns:
            The distance, and the change of the loss, which exceeds rounding and has the opposite
            sign to the curvature; None if there is no such step.
        """
        size, sign = self._visible_size(curvature, rounding), math.copysign(1.0, curvature)
        own = Estimate.of_evaluation(self.here).mean[0]
        for side in (-1, 1):
            distances = [side * size * share for share in CLOSE_STEPS]
            changes = Estimate.of_evaluation(self.evaluate(direction, distances)).mean - own
            bends = sign * (changes - slope * np.array(distances))
            for i, further in enumerate(bends[1:]):
                if bends[i] < -2 * rounding and sign * changes[i] < -2 * rounding:
                    if further > bends[i] * _CUBIC_GROWTH:
                        return distances[i], float(changes[i])
                    break
                if not abs(bends[i]) <= 2 * rounding:
                    break
        return None

    def _visible_size(self, curvature: float, rounding: float) -> float:
        """Returns the norm, or the step at which the loss changes visibly if that is longer."""
        # Steps as short as √(2ρ / abs(λ)) change the loss by no more than its rounding ρ.
        visible = math.sqrt(2 * rounding / abs(curvature)) if rounding < math.inf else 0.0
        return max(self.norm, visible)

    def curve(
        self, direction: Weights, steps: Sequence[float]
    ) -> tuple[list[float], Evaluation, Step | None]:
        """Evaluates the loss on either side of the point, twice as far as known steps reach.

        Args:
            direction: A direction of length one.
            steps: The distances of steps that lower the loss, which the curve goes through.

        Returns:
            The distances in ascending order, without 0; the split there; and the best step of
            these, None if none lowers the loss.
        """
        # If no step lowers the loss, the valley is narrower than the shortest step.
        reach = max((2 * abs(step) for step in steps), default=self.norm * STEP_LENGTHS[-1])
        grid = [reach * i / _CURVE_POINTS for i in range(-_CURVE_POINTS, _CURVE_POINTS + 1) if i]
        # A step may lie between these, or be one of them up to rounding.
        known = {sign * step for step in steps for sign in (1, -1)}
        other = [x for x in grid if not any(math.isclose(x, step) for step in known)]
        distances = sorted({*other, *known})
        found = self.evaluate(direction, distances)
        return distances, found, best_step(distances, found, self.here)


def best_step(distances: Sequence[float], found: Evaluation, here: Evaluation) -> Step | None:
    """Finds the step to the lowest loss.

    Returns:
        The step, its gain with the standard error of paired differences; None if no finite loss is
        below that of the point.
    """
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
