"""Compares derivatives by automatic differentiation with finite differences.

A gradient that is stopped (``detach``, ``no_grad``, a rounding with a gradient of its own) raises
no error, and the derivatives that it leaves out look like any others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "CURE",
    "DETACHED",
    "FIRST",
    "FIRST_IN_FLOAT32",
    "NEEDED",
    "POINTS",
    "SAMPLE",
    "SECOND",
    "Differences",
]

SAMPLE = 16
"""Examples on which derivatives are compared with differences."""

POINTS = 4
"""Points at which they are compared. None is special: ReLU has its kink at zero weights, say."""

NEEDED = 2
"""Points at which they must contradict each other. One may lie next to a kink."""

DETACHED = "part of the forward pass is detached from autograd"
CURE = (
    "Remove detach(), no_grad() and roundings with a gradient of their own from the model's "
    "forward and from the loss"
)

# Consecutive differences that must agree with each other, and how well, as a share of their
# distance from the derivative.
_AGREEING = 3
_APART = 1 / 8

# Roundings of a mean loss, in units of ε.
_ROUNDINGS = 8


@dataclass(frozen=True)
class Differences:
    """The step sizes h of central differences D(h) = (f(t + h) - f(t - h)) / 2h, and their rule.

    Let s be the derivative found and f' the true one. If s = f', then D(h) is the mean of f' over
    [t - h, t + h], so that

        abs(D(h) - s) <= V(h) + ρ/h,

    where V(h) is the variation of f' over that interval and ρ is the rounding of f. V(h) goes to 0
    as h² where f is smooth, and is exactly that of a smooth function once h is below the distance
    to the next kink. So some h has D(h) = s up to a small share, or ρ/h hides it. If a part of the
    derivative is missing, s = f' - c, then D(h) - s goes to c: the differences agree with each
    other and not with s. A contradiction is therefore

        abs(D(h) - s) > share · max(abs(s), abs(D(h))) + ρ/h_min  for every h, and
        abs(D(h) - D(h')) <= abs(D(h) - s) / 8                    for three steps in a row.

    Rounding fails the second condition, as ρ/h grows from step to step. A single kink meets both
    only if it lies within the smallest h of t. If f' jumps by more than 2 · share · abs(s) at k
    kinks per unit, this has the probability 2 k h_min at one point, and at two of four points at
    most 6 (2 k h_min)². As the jumps add up to the variation V of f', k <= V / (2 · share ·
    abs(s)). With V = 10 abs(s) and share = 1e-3, h_min = 1e-6 gives 6e-4 at worst, and 1e-9 where
    the jumps are those of a few hundred kinks. Second derivatives need steps so small that no
    interval has any kink, as they see none: h_min = 1e-10.

    Steps are shares of the norm of the weights, so that they are well above the rounding of
    whatever a model computes in float32 in between.

    Attributes:
        steps: The steps, falling.
        share: By how much a derivative may differ from a difference, as a share.
        finest: Differences count against a derivative only for steps up to this one.
        epsilon: The rounding unit of f.
        zero: Whether differences of exactly 0 count. Where f is a slope they mean that the step is
            below what the model resolves.
    """

    steps: Sequence[float]
    share: float
    finest: float
    epsilon: float
    zero: bool

    def contradicting(
        self, found: Tensor, size: float, difference: Callable[[float], Tensor]
    ) -> Tensor | None:
        """Compares a derivative with differences.

        Args:
            found: The derivative, of any shape.
            size: The size of what is differentiated, per unit of its argument.
            difference: Computes D(h).

        Returns:
            What the differences converge to, if that contradicts the derivative; else None.
        """
        found = found.detach().to(torch.float64)
        if not found.isfinite().all():
            return None
        rounding = _ROUNDINGS * self.epsilon * size / self.steps[-1]
        seen: list[Tensor] = []
        converged = None
        for step in self.steps:
            seen.append(difference(step).detach().to(torch.float64))
            last = seen[-1]
            apart, scale = (
                float((last - found).norm()),
                max(float(found.norm()), float(last.norm())),
            )
            if apart <= self.share * scale + rounding:
                return None
            if step > self.finest or len(seen) < _AGREEING or not (self.zero or last.any()):
                continue
            if all(float((x - last).norm()) <= _APART * apart for x in seen[-_AGREEING:]):
                converged = last
        return converged


FIRST = Differences(
    [10 ** (-3 - k / 2) for k in range(7)], 1e-3, 1.0, torch.finfo(torch.float64).eps, zero=True
)
"""For the derivatives of a loss in float64: h from 1e-3 to 1e-6."""

FIRST_IN_FLOAT32 = Differences(
    [10 ** (-1 - k / 2) for k in range(5)], 0.1, 1.0, torch.finfo(torch.float32).eps, zero=True
)
"""Where there is no float64: h from 0.1 to 1e-3."""

SECOND = Differences(
    [10.0 ** (-4 - k) for k in range(7)], 1e-2, 1e-7, torch.finfo(torch.float64).eps, zero=False
)
"""For the derivatives of a gradient in float64: h from 1e-4 to 1e-10."""
