"""The mean loss over directions around a point, its spread, and the radius of the basin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["BAND", "Profile", "Radius", "radius"]

Losses = NDArray[np.float64]

Bound = Literal["at least", "at most", ""]

BAND = (0.1, 0.9)
"""The quantiles over directions that a band lies between."""


class Profile(NamedTuple):
    """The losses of K directions at P points, over the directions.

    Attributes:
        mean: The mean, ``[P]``.
        deviation: The standard deviation with K − 1, ``[P]``; nan for one direction.
        low: The lower quantile of `BAND`, between the sorted losses linearly, ``[P]``; nan for one
            direction.
        high: The upper quantile, ``[P]``.
    """

    mean: Losses
    deviation: Losses
    low: Losses
    high: Losses

    @classmethod
    def of(cls, losses: Losses) -> Profile:
        """Returns the profile of losses, ``[K, P]``.

        Where a loss is inf or nan, nothing is known of the point.
        """
        # Overflow, and inf − inf, are answers here.
        with np.errstate(all="ignore"):
            mean: Losses = losses.mean(axis=0)
            if len(losses) < 2:
                nothing = np.full_like(mean, math.nan)
                return cls(mean, nothing, nothing, nothing)
            low, high = np.quantile(losses, BAND, axis=0)
            return cls(mean, losses.std(axis=0, ddof=1), low, high)


class Radius(NamedTuple):
    """The largest distance up to which the mean loss stays below a threshold.

    Attributes:
        distance: The distance.
        error: Its jackknife standard error over directions; nan if it is not known.
        positions: Where the mean loss crosses the threshold at this distance: at ``distance``, at
            ``-distance`` or at both; empty for a bound, and if it is not below it anywhere.
        bound: Whether the radius is ``at least`` the distance, since the mean loss does not cross
            the threshold where it is known; or ``at most``, since it crosses the threshold before
            the first point beside the centre; else empty.
    """

    distance: float
    error: float
    positions: tuple[float, ...]
    bound: Bound


def radius(positions: Sequence[float], losses: Losses, threshold: float) -> Radius:
    """Finds the radius of the basin around a point.

    A crossing is that of the parabola through the points before and behind it and the one before
    these. With points on both sides of the centre, the radius is that of the side on which it is
    smaller. Its standard error is that of the jackknife, with one direction left out at a time
    (Efron & Stein 1981): √((K − 1)/K Σ (r_k − r̄)²).

    Args:
        positions: The positions of the P points, ascending; negative on the other side of the
            centre, which is one of them, at 0.
        losses: The losses of K directions there, ``[K, P]``.
        threshold: What the mean loss stays below.

    Returns:
        The radius; 0 if the loss is not below the threshold at the centre. Its error is nan then,
        for one direction, and if only a bound is known of the radius or of that without one of
        the directions.
    """
    number = len(losses)
    with np.errstate(all="ignore"):
        found = _radius(positions, losses.mean(axis=0), threshold)
        if found.bound or not found.distance or number < 2:
            return found
        without = [
            _radius(positions, np.delete(losses, k, axis=0).mean(axis=0), threshold)
            for k in range(number)
        ]
    if any(other.bound for other in without):
        return found
    distances = np.array([other.distance for other in without])
    squares = float(np.square(distances - distances.mean()).sum())
    return found._replace(error=math.sqrt((number - 1) / number * squares))


def _radius(positions: Sequence[float], mean: Losses, threshold: float) -> Radius:
    """Finds the radius of a single curve, without an error."""
    points = list(zip(positions, mean.tolist(), strict=True))
    sides = {
        1: [(x, loss) for x, loss in points if x >= 0],
        -1: [(-x, loss) for x, loss in reversed(points) if x <= 0],
    }
    found = {sign: _crossing(side, threshold) for sign, side in sides.items() if len(side) > 1}
    distance = min(x for x, _ in found.values())
    bounds: list[Bound] = [bound for x, bound in found.values() if x == distance]
    if any(bound == "at most" for _, bound in found.values()):
        # Whatever the radius of the other side, the smaller one may be close to 0.
        distance = min(x for x, bound in found.values() if bound != "at least")
        return Radius(distance, math.nan, (), "at most")
    if "" not in bounds:
        return Radius(distance, math.nan, (), "at least")
    crossed = [
        sign * distance for sign, (x, bound) in found.items() if x == distance > 0 and not bound
    ]
    return Radius(distance, math.nan, tuple(crossed), "")


def _crossing(side: Sequence[tuple[float, float]], threshold: float) -> tuple[float, Bound]:
    """Returns where a curve first reaches a threshold, on one side of the centre."""
    (x, loss), before = side[0], None
    if not loss < threshold:
        return 0.0, ""
    for x_next, loss_next in side[1:]:
        if not math.isfinite(loss_next):
            break
        if loss_next >= threshold:
            if before is None:
                return x_next, "at most"
            # In Newton's form, p(t) = loss + slope t + bend t (t − step) at x + t.
            step = x_next - x
            slope = (loss_next - loss) / step
            bend = (slope - (loss - before[1]) / (x - before[0])) / (x_next - before[0])
            start = slope - bend * step
            missing = threshold - loss
            root = math.sqrt(max(0.0, start**2 + 4 * bend * missing))
            return x + min(2 * missing / (start + root), step), ""
        before, x, loss = (x, loss), x_next, loss_next
    return x, "at least"
