"""The mean loss over directions around a point, its spread, and the radius of the basin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["BAND", "Profile", "Radius", "radius"]

Losses = NDArray[np.float64]

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
        """Describes losses.

        Args:
            losses: ``[K, P]``. A loss that is not finite leaves nothing known at its point.

        Returns:
            The profile.
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
        at_least: Whether the mean loss does not cross the threshold where it is known: the radius
            may be larger.
    """

    distance: float
    error: float
    at_least: bool


def radius(positions: Sequence[float], losses: Losses, threshold: float) -> Radius:
    """Finds the radius of the basin around a point.

    Between two points the mean loss is taken to be linear. With points on both sides, the radius
    is that of the side on which it is smaller. Its standard error is that of the jackknife, the
    directions left out one at a time (Efron & Stein 1981): √((K − 1)/K Σ (r_k − r̄)²).

    Args:
        positions: The positions of the P points, ascending; negative on the other side of the
            centre, which is one of them, at 0.
        losses: The losses of K directions there, ``[K, P]``.
        threshold: What the mean loss stays below.

    Returns:
        The radius. Its error is nan for one direction, and if the mean without one of the
        directions does not cross the threshold.
    """
    number = len(losses)
    with np.errstate(all="ignore"):
        distance, at_least = _crossing(positions, losses.mean(axis=0), threshold)
        if at_least or number < 2:
            return Radius(distance, math.nan, at_least)
        without = [
            _crossing(positions, np.delete(losses, k, axis=0).mean(axis=0), threshold)
            for k in range(number)
        ]
    if any(beyond for _, beyond in without):
        return Radius(distance, math.nan, at_least)
    found = np.array([distance for distance, _ in without])
    error = math.sqrt((number - 1) / number * float(np.square(found - found.mean()).sum()))
    return Radius(distance, error, at_least)


def _crossing(positions: Sequence[float], mean: Losses, threshold: float) -> tuple[float, bool]:
    """Returns how far a curve is below a threshold, and whether it may be so farther out."""
    points = list(zip(positions, mean.tolist(), strict=True))
    sides = (
        [(x, loss) for x, loss in points if x >= 0],
        [(-x, loss) for x, loss in reversed(points) if x <= 0],
    )
    return min(_one_side(side, threshold) for side in sides if len(side) > 1)


def _one_side(side: Sequence[tuple[float, float]], threshold: float) -> tuple[float, bool]:
    before, below = side[0]
    if not below < threshold:
        return 0.0, False
    for x, loss in side[1:]:
        if not math.isfinite(loss):
            break
        if loss >= threshold:
            return before + (x - before) * (threshold - below) / (loss - below), False
        before, below = x, loss
    return before, True
