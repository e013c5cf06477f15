"""Compares derivatives by automatic differentiation with finite differences.

A gradient that is stopped (``detach``, ``no_grad``, a rounding with a gradient of its own) raises
no error, and the derivatives that it leaves out look like any others.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = [
    "CURE",
    "DETACHED",
    "NEEDED",
    "POINTS",
    "SAMPLE",
    "Comparison",
    "Differences",
    "Outcome",
    "are_verified",
    "noise_of",
    "rules",
    "unverified",
]

SAMPLE = 16
"""Examples on which derivatives are compared with differences."""

POINTS = 4
"""Points at which they are compared. None is special: ReLU has its kink at zero weights, say."""

NEEDED = 2
"""Points that decide. One may lie next to a kink."""

DETACHED = "part of the forward pass is detached from autograd"
CURE = (
    "Remove detach(), no_grad() and roundings with a gradient of their own from the model's "
    "forward and from the loss"
)

# Consecutive differences that must agree with each other, and how well, as a share of their
# distance from the derivative.
_AGREEING = 3
_APART = 1 / 8

# A difference with a larger error, as a share of the derivative, shows nothing.
_COARSE = 0.02

# A derivative below this share of what is differentiated, per unit, counts as zero.
_FLAT = 1e-4

# Roundings of a mean loss in units of ε, at least; and standard deviations of measured noise.
_ROUNDINGS = 8
_DEVIATIONS = 6


class Outcome(enum.Enum):
    """What differences say of a derivative at one point."""

    RIGHT = enum.auto()
    WRONG = enum.auto()
    HIDDEN = enum.auto()
    """Rounding, jumps or kinks hide it."""
    NOT_FINITE = enum.auto()


@dataclass(frozen=True)
class Comparison:
    """A derivative and its differences at one point.

    Attributes:
        outcome: What they say.
        limit: What the differences converge to, if that contradicts the derivative.
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
        error: How far rounding and truncation may take the difference from the derivative.
        apart: How far it is from the derivative that was found.
    """

    step: float
    value: Tensor
    scale: float
    error: float
    apart: float


@dataclass(frozen=True)
class Differences:
    """The step sizes h of central differences D(h) = (f(t + h) - f(t - h)) / 2h, and their rule.

    Let s be the derivative found and f' the true one. If s = f', then D(h) is the mean of f' over
    [t - h, t + h], so that abs(D(h) - s) <= V(h) + ρ/h, where V(h) is the variation of f' over
    that interval and ρ is the rounding of f. V(h) goes to 0 as h² where f is smooth, and is exactly
    that of a smooth function once h is below the distance to the next kink. If a part of the
    derivative is missing, s = f' - c, then D(h) - s goes to c: the differences agree with each
    other and not with s.

    Both terms are measured at each step. The fourth difference of f at t ± h, t ± h/2 and t has
    the standard deviation √70 σ, σ that of rounding (Moré & Wild 2011, SIAM J. Sci. Comput.
    33(3)), and D(h) - D(h/2) shows truncation. The error is

        e(h) = max(6 σ/h, 2 abs(D(h) - D(h/2)), 8 ε abs(f)/h),

    and D(h) is resolved if e(h) is at most 2 % of the derivative. From the smallest step up:

    - right: the first resolved D(h) has abs(D(h) - s) <= share · max(abs(s), abs(D(h))) + e(h).
    - wrong: that is so for no h; and three D(h) in a row, with errors of at most an eighth of
      abs(D(h) - s), are as close to each other, and differ from s by more than the share ``wrong``.
    - hidden: all else. Jumps, such as those of a rounding, are right on average over wide steps
      and wrong for narrow ones.

    A single kink is taken for a wrong derivative only if it lies within the smallest h of t. If f'
    jumps by more than 2 · wrong · abs(s) at k kinks per unit, this has the probability 2 k h_min at
    one point, and at two of four points at most 6 (2 k h_min)². As the jumps add up to the
    variation V of f', k <= V / (2 · wrong · abs(s)). With V = 10 abs(s) and h_min = 1e-6 this gives
    6e-4 at worst, and 1e-9 where the jumps are those of a few hundred kinks. Second derivatives see
    no kinks, and need steps so small that no interval has any: h <= 1e-7, which float32 does not
    resolve.

    Steps are shares of the norm of the weights.

    Attributes:
        steps: The steps, rising.
        share: By how much a right derivative may differ from a difference, as a share.
        wrong: By how much a wrong one differs at least; infinite if none is found wrong.
        finest: Differences count against a derivative only if the smallest of the three has a step
            up to this one.
        epsilon: The rounding unit of f.
        zero: Whether differences of exactly 0 count against a derivative. Else they mean that the
            step is below what the model resolves.
    """

    steps: Sequence[float]
    share: float
    wrong: float
    finest: float
    epsilon: float
    zero: bool

    def compare(
        self, found: Tensor, size: float, here: Tensor, function: Callable[[float], Tensor]
    ) -> Comparison:
        """Compares a derivative with differences.

        Args:
            found: The derivative, of any shape.
            size: The size of what is differentiated, per unit of its argument.
            here: f(t), as terms ``[N, …]`` whose mean it is: those of single examples show rounding
                better than their mean.
            function: Computes f(t + h) for h, as such terms.

        Returns:
            What the differences say.
        """
        found = found.detach().to(torch.float64)
        if not found.isfinite().all():
            return Comparison(Outcome.NOT_FINITE)
        here = here.detach().to(torch.float64)
        against: list[_Difference] = []
        for step in self.steps:
            one = self._difference(step, found, size, here, function)
            unresolved = not (self.zero or one.value.any()) and bool(found.any())
            if unresolved or not one.error <= _COARSE * one.scale:
                continue
            if one.apart <= self.share * one.scale + one.error:
                # If finer steps say otherwise, this one goes over jumps.
                return Comparison(Outcome.HIDDEN if against else Outcome.RIGHT)
            if one.error <= _APART * one.apart:
                against.append(one)
        return self._judge(against)

    def decides(self, comparisons: Sequence[Comparison], left: int) -> bool:
        """Says whether the verdict is the same whatever the points say that are left.

        Args:
            comparisons: Those of some points.
            left: How many points are left.

        Returns:
            Whether the derivative is wrong at as many points as are needed, or can no longer
            become so, and is verified or can no longer be.
        """
        outcomes = [c.outcome for c in comparisons]
        wrong, right, useless = (
            outcomes.count(outcome)
            for outcome in (Outcome.WRONG, Outcome.RIGHT, Outcome.NOT_FINITE)
        )
        if wrong >= NEEDED:
            return True
        if math.isfinite(self.wrong) and wrong + left >= NEEDED:
            return False
        finite = len(outcomes) - useless
        return right >= NEEDED or (finite >= NEEDED and right + left < NEEDED)

    def _difference(
        self,
        step: float,
        found: Tensor,
        size: float,
        here: Tensor,
        function: Callable[[float], Tensor],
    ) -> _Difference:
        behind, back, front, ahead = (
            function(share * step).detach().to(torch.float64) for share in (-1, -0.5, 0.5, 1)
        )
        value = (ahead - behind).mean(0) / (2 * step)
        closer = (front - back).mean(0) / step
        noise = noise_of([behind, back, here, front, ahead])
        error = max(
            _DEVIATIONS * noise / step,
            2 * float((value - closer).norm()),
            _ROUNDINGS * self.epsilon * size / step,
        )
        scale = max(float(found.norm()), float(value.norm()), _FLAT * size)
        return _Difference(step, value, scale, error, float((value - found).norm()))

    def _judge(self, against: Sequence[_Difference]) -> Comparison:
        """Looks for differences that agree with each other, of those that contradict."""
        for start in range(len(against) - _AGREEING + 1):
            row = against[start : start + _AGREEING]
            if row[0].step > self.finest:
                break
            best = min(row, key=lambda one: one.error)
            off = max(float((one.value - best.value).norm()) for one in row)
            if off <= _APART * best.apart and best.apart > self.wrong * best.scale:
                return Comparison(Outcome.WRONG, best.value)
        return Comparison(Outcome.HIDDEN)


def noise_of(values: Sequence[Tensor]) -> float:
    """Measures the rounding of a function by its fourth difference.

    Args:
        values: The function at five evenly spaced points, ``[N, …]`` each.

    Returns:
        The root mean square, over the N terms, of the norm of their rounding.
    """
    weights = 1, -4, 6, -4, 1
    fourth = torch.stack([w * v for w, v in zip(weights, values, strict=True)]).sum(0)
    return float(fourth.norm()) / math.sqrt(len(fourth) * sum(w * w for w in weights))


def are_verified(comparisons: Iterable[Comparison]) -> bool:
    """Says whether differences show that a derivative is right.

    Args:
        comparisons: Those of all points.

    Returns:
        Whether they do at two points or more, of those where it is finite.
    """
    outcomes = [c.outcome for c in comparisons if c.outcome is not Outcome.NOT_FINITE]
    return outcomes.count(Outcome.RIGHT) >= min(NEEDED, len(outcomes))


def unverified(what: str, of: str) -> str:
    """Says that derivatives could not be verified.

    Args:
        what: The derivatives.
        of: What they are compared with differences of.

    Returns:
        A note.
    """
    return f"{what} not verified: rounding or jumps hide differences of the {of} on a few examples"


_FIRST = Differences(
    steps=[10 ** (-6 + k / 2) for k in range(7)],
    share=1e-3,
    wrong=1e-3,
    finest=1.0,
    epsilon=torch.finfo(torch.float64).eps,
    zero=True,
)
"""For the derivatives of a loss in float64: h from 1e-6 to 1e-3."""

_FIRST_ROUNDED = replace(
    _FIRST, steps=[10 ** (-5 + k / 2) for k in range(9)], share=1e-2, wrong=0.1, zero=False
)
"""Where something is computed in a narrower type: h from 1e-5 to 0.1."""

_SECOND = Differences(
    steps=[10 ** (-8 + k / 2) for k in range(9)],
    share=1e-2,
    wrong=1e-2,
    finest=1e-7,
    epsilon=torch.finfo(torch.float64).eps,
    zero=False,
)
"""For the derivatives of a gradient in float64: h from 1e-8 to 1e-4."""

_SECOND_ROUNDED = replace(
    _SECOND, steps=[10 ** (-4 + k / 2) for k in range(7)], share=5e-2, wrong=math.inf
)
"""Where something is computed in a narrower type: h from 1e-4 to 0.1, with kinks in between."""


def rules(narrowest: torch.dtype) -> tuple[Differences, Differences]:
    """Chooses how first and second derivatives are compared.

    Args:
        narrowest: The narrowest type that the model and the loss compute in.

    Returns:
        The rule for the first derivatives, and that for the second.
    """
    if narrowest == torch.float64:
        return _FIRST, _SECOND
    if narrowest.itemsize < torch.float32.itemsize:
        # Rounding may hide a part of the network whole, which then looks as if detached.
        return replace(_FIRST_ROUNDED, wrong=math.inf), _SECOND_ROUNDED
    return _FIRST_ROUNDED, _SECOND_ROUNDED
