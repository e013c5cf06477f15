"""Compares derivatives by automatic differentiation with finite differences.

A detached gradient (``detach``, ``no_grad``, a straight-through rounding) raises no error: the
derivatives are finite numbers, and wrong.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from losscli.evaluation.objective import Objective

__all__ = [
    "CURE",
    "DETACHED",
    "NEEDED",
    "POINTS",
    "Comparison",
    "Differences",
    "Outcome",
    "finer",
    "noise_of",
    "rules",
    "sample_size",
    "unverified",
]

POINTS = 4
"""Points at which derivatives are compared. None is special, as zero weights are for a ReLU."""

NEEDED = 2
"""Points that have to agree for a decision: a single one may lie next to a kink."""

DETACHED = "part of the forward pass is detached from autograd"
CURE = (
    "Remove detach(), no_grad() and roundings with a custom gradient from the model's forward and "
    "from the loss"
)

# Examples on which derivatives are compared with differences: the fewest, the most, and the budget
# of floating-point operations of their forward passes in between; and the fewest whole batches.
_FEWEST = 16
_FEWEST_BATCHES = 2
_MOST = 64
_OPERATIONS = 10**8

# Consecutive differences that must agree with each other, and their largest spread relative to
# their distance from the derivative.
_AGREEING = 3
_SPREAD = 1 / 8

# A difference with a larger error relative to the derivative is not resolved.
_RESOLVED = 0.02

# A derivative below this share of the function, per unit of its argument, counts as zero.
_FLAT = 1e-4

# Roundings of a mean loss in units of ε, at least; and standard deviations of measured noise.
_ROUNDINGS = 8
_DEVIATIONS = 6


class Outcome(enum.Enum):
    """Result of comparing a derivative with differences at one point."""

    RIGHT = enum.auto()
    WRONG = enum.auto()
    HIDDEN = enum.auto()
    """Undecided: rounding, jumps or kinks hide the derivative."""
    NOT_FINITE = enum.auto()


@dataclass(frozen=True)
class Comparison:
    """A derivative and its differences at one point.

    Attributes:
        outcome: The result.
        limit: The limit of the differences, if it contradicts the derivative.
    """

    outcome: Outcome
    limit: Tensor | None = None


@dataclass(frozen=True)
class _Difference:
    """A central difference.

    Attributes:
        step: Its step.
        value: The difference.
        scale: The size of the derivative.
        error: Bound of its rounding and truncation errors.
        distance: Its distance from the derivative.
    """

    step: float
    value: Tensor
    scale: float
    error: float
    distance: float


@dataclass(frozen=True)
class Differences:
    """Decision rule for comparing a derivative with central differences of several step sizes h.

    D(h) = (f(t + h) - f(t - h)) / 2h. Let s be the derivative to test and f' the true one. If
    s = f', then D(h) is the mean of f' over [t - h, t + h], so that abs(D(h) - s) <= V(h) + ρ/h,
    with V(h) the variation of f' over that interval and ρ the rounding of f. V(h) vanishes as h²
    where f is smooth, and has no contribution of kinks once h is below the distance to the next
    one. If a part of the derivative is missing, s = f' - c, then D(h) - s converges to c: the
    differences agree with each other and not with s.

    Both terms are measured at each step. The fourth difference of f at t ± h, t ± h/2 and t has
    the standard deviation √70 σ, with σ that of rounding (Moré & Wild 2011, SIAM J. Sci. Comput.
    33(3)), and D(h) - D(h/2) shows truncation. The error is

        e(h) = max(6 σ/h, 2 abs(D(h) - D(h/2)), 8 ε abs(f)/h),

    and D(h) is resolved if e(h) is at most 2 % of the derivative. From the smallest step up:

    - right: the first resolved D(h) has abs(D(h) - s) <= share · max(abs(s), abs(D(h))) + e(h). If
      f is computed in float64 and this holds without e(h), D(h) counts as resolved, and e(h) is
      not measured: rounding and jumps make D(h) and s equal only by chance.
    - wrong: this holds for no h; and three consecutive D(h), with errors of at most an eighth of
      abs(D(h) - s), agree with each other to the same precision and differ from s by more than the
      share ``wrong``.
    - hidden: everything else. At jumps, such as those of a rounding, wide steps agree with the
      derivative and narrow ones do not.

    A single kink is taken for a wrong derivative only if it lies within the smallest h of t. If f'
    jumps by more than 2 · wrong · abs(s) at k kinks per unit, this has the probability 2 k h_min at
    one point, and at two of four points at most 6 (2 k h_min)². As the jumps add up to the
    variation V of f', k <= V / (2 · wrong · abs(s)). With V = 10 abs(s) and h_min = 1e-6 this gives
    6e-4 at worst, and 1e-9 where the jumps are those of a few hundred kinks. Second derivatives see
    no kinks, and need steps so small that no interval has any: h <= 1e-7, which float32 does not
    resolve.

    Steps are shares of the norm of the weights.

    Attributes:
        steps: The steps, ascending.
        share: Largest relative difference of a right derivative.
        wrong: Smallest relative difference of a wrong derivative; infinite if none may be called
            wrong.
        finest: Three differences count against a derivative only if the smallest of their steps is
            at most this.
        epsilon: The rounding unit of f.
        zero: Whether differences of exactly 0 count against a derivative. Otherwise they mean that
            the step is below the resolution of the model.
        precise: Whether f is computed in float64.
    """

    steps: Sequence[float]
    share: float
    wrong: float
    finest: float
    epsilon: float
    zero: bool
    precise: bool

    def compare(
        self, derivative: Tensor, size: float, function: Callable[[float], Tensor]
    ) -> Comparison:
        """Compares a derivative with differences.

        Args:
            derivative: The derivative, of any shape.
            size: The size of the function, per unit of its argument.
            function: Computes f(t + h) for h, as terms ``[N, …]`` with mean f(t + h): the terms of
                single examples show rounding better than their mean.

        Returns:
            The comparison.
        """
        derivative = derivative.detach().to(torch.float64)
        if not derivative.isfinite().all():
            return Comparison(Outcome.NOT_FINITE)

        def f(h: float) -> Tensor:
            return function(h).detach().to(torch.float64)

        middle = cache(partial(f, 0.0))
        contradicting: list[_Difference] = []
        for step in self.steps:
            low, high = f(-step), f(step)
            difference = (high - low).mean(0) / (2 * step)
            scale = max(float(derivative.norm()), float(difference.norm()), _FLAT * size)
            distance = float((difference - derivative).norm())
            if self.precise and distance <= self.share * scale and not contradicting:
                return Comparison(Outcome.RIGHT)
            if not (self.zero or difference.any()) and bool(derivative.any()):
                continue
            half_low, half_high = f(-step / 2), f(step / 2)
            half_step = (half_high - half_low).mean(0) / step
            noise = noise_of([low, half_low, middle(), half_high, high])
            error = max(
                _DEVIATIONS * noise / step,
                2 * float((difference - half_step).norm()),
                _ROUNDINGS * self.epsilon * size / step,
            )
            if not error <= _RESOLVED * scale:
                continue
            if distance <= self.share * scale + error:
                # If finer steps contradict the derivative, this one spans jumps.
                return Comparison(Outcome.HIDDEN if contradicting else Outcome.RIGHT)
            if error <= _SPREAD * distance:
                contradicting.append(_Difference(step, difference, scale, error, distance))
        return self._judge(contradicting)

    def decides(self, comparisons: Sequence[Comparison], left: int) -> bool:
        """Whether the remaining points cannot change the decision.

        Args:
            comparisons: Those of the points so far.
            left: The number of remaining points.

        Returns:
            Whether enough points show that the derivative is wrong; or, if too few are left for
            that, whether it is verified or too few are left to verify it.
        """
        outcomes = [c.outcome for c in comparisons]
        wrong, right, not_finite = (
            outcomes.count(outcome)
            for outcome in (Outcome.WRONG, Outcome.RIGHT, Outcome.NOT_FINITE)
        )
        if wrong >= NEEDED:
            return True
        if math.isfinite(self.wrong) and wrong + left >= self._objecting:
            return False
        finite = len(outcomes) - not_finite
        return right >= NEEDED or (finite >= NEEDED and right + left < NEEDED)

    def verifies(self, comparisons: Iterable[Comparison]) -> bool:
        """Whether differences confirm a derivative at two of the points where it is finite.

        Args:
            comparisons: Those of the points.

        Returns:
            Whether the derivative counts as right. Where f is rounded, it does not if a single
            point contradicts it: others may agree by chance.
        """
        outcomes = [c.outcome for c in comparisons if c.outcome is not Outcome.NOT_FINITE]
        wrong, right = (outcomes.count(o) for o in (Outcome.WRONG, Outcome.RIGHT))
        return wrong < self._objecting and right >= min(NEEDED, len(outcomes))

    @property
    def _objecting(self) -> int:
        """Points that must contradict a derivative for it to count as not verified."""
        return NEEDED if self.precise else 1

    def _judge(self, contradicting: Sequence[_Difference]) -> Comparison:
        """Looks for consecutive differences that agree with each other."""
        for start in range(len(contradicting) - _AGREEING + 1):
            row = contradicting[start : start + _AGREEING]
            if row[0].step > self.finest:
                break
            best = min(row, key=lambda one: one.error)
            spread = max(float((one.value - best.value).norm()) for one in row)
            if spread <= _SPREAD * best.distance and best.distance > self.wrong * best.scale:
                return Comparison(Outcome.WRONG, best.value)
        return Comparison(Outcome.HIDDEN)


def sample_size(objective: Objective) -> int:
    """Chooses the number of examples on which derivatives are compared with differences.

    Args:
        objective: The objective.

    Returns:
        The number, of batches with ``batch_loss``; larger for a small model, so that it includes
        rare examples.
    """
    fewest = _FEWEST_BATCHES if objective.batch_loss else _FEWEST
    return min(max(fewest, _OPERATIONS // objective.operations), _MOST)


def noise_of(values: Sequence[Tensor]) -> float:
    """Estimates the rounding of a function from its fourth difference.

    Args:
        values: The function at five evenly spaced points, ``[N, …]`` each.

    Returns:
        Root mean square over the N terms of the norm of their rounding.
    """
    weights = 1, -4, 6, -4, 1
    fourth = torch.stack([w * v for w, v in zip(weights, values, strict=True)]).sum(0)
    return float(fourth.norm()) / math.sqrt(len(fourth) * sum(w * w for w in weights))


def unverified(what: str, of: str) -> str:
    """Returns the note that differences of a function do not confirm its derivatives."""
    return (
        f"{what} not verified: on a few examples, rounding or jumps hide differences of the {of}, "
        "or a single one of them disagrees"
    )


_FIRST = Differences(
    steps=[10 ** (-6 + k / 2) for k in range(7)],
    share=1e-3,
    wrong=1e-3,
    finest=1.0,
    epsilon=torch.finfo(torch.float64).eps,
    zero=True,
    precise=True,
)
"""For the derivatives of a loss in float64: h from 1e-6 to 1e-3."""

_FIRST_ROUNDED = replace(
    _FIRST,
    steps=[10 ** (-5 + k / 2) for k in range(9)],
    share=1e-2,
    wrong=0.1,
    zero=False,
    precise=False,
)
"""The same where something is computed in a narrower type: h from 1e-5 to 0.1."""

_SECOND = Differences(
    steps=[10 ** (-8 + k / 2) for k in range(9)],
    share=1e-2,
    wrong=1e-2,
    finest=1e-7,
    epsilon=torch.finfo(torch.float64).eps,
    zero=False,
    precise=True,
)
"""For the derivatives of a gradient in float64: h from 1e-8 to 1e-4."""

_SECOND_ROUNDED = replace(
    _SECOND,
    steps=[10 ** (-4 + k / 2) for k in range(7)],
    share=5e-2,
    wrong=math.inf,
    precise=False,
)
"""The same where something is computed in a narrower type: h from 1e-4 to 0.1, across kinks."""


def rules(narrowest: torch.dtype) -> tuple[Differences, Differences]:
    """Returns the rules for first and second derivatives, by the narrowest type of computation."""
    if narrowest == torch.float64:
        return _FIRST, _SECOND
    if narrowest.itemsize < torch.float32.itemsize:
        # Rounding may hide a whole part of the network, which then looks detached.
        return replace(_FIRST_ROUNDED, wrong=math.inf), _SECOND_ROUNDED
    return _FIRST_ROUNDED, _SECOND_ROUNDED


def finer(rule: Differences) -> Differences:
    """Replaces the steps of a rule for first derivatives by those for second derivatives.

    They are shorter: a straight-through rounding may be right on average over all longer steps.

    Args:
        rule: The rule.

    Returns:
        The rule with shorter steps.
    """
    return replace(rule, steps=_SECOND.steps)
