"""The critical step: the smallest step along −∇L that raises the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy.optimize import brentq

__all__ = ["MAX_SCANNED", "Crossing", "Reason", "find_crossing"]

Reason = Literal["", "zero gradient", "ascends", "not finite", "no crossing", "rounding"]
"""Why there is no critical step, or why it is 0 (``ascends``); empty where one was found."""

# Distances are scanned from short to long, by factors of two, as shares of the norm of the weights:
# from 2^-20 to 2^4, and down to 2^-60 where the shortest one raises the loss already.
_SHORTEST, _LONGEST, _LEAST = -20, 4, -60
_BLOCK = 5

# Largest relative error of a crossing by the search, and the most points that it takes.
_TOLERANCE = 1e-6
_MOST = 40

MAX_SCANNED = _LONGEST - _SHORTEST + 1 + 8
"""About the most points that a critical step takes; most searches end long before."""


class _NotFiniteError(ArithmeticError):
    """A loss between two finite ones is not finite."""


@dataclass(frozen=True)
class Crossing:
    """The distance at which the loss rises above that of the point.

    Attributes:
        distance: The distance; nan without a crossing, or if it is not known.
        error: How far rounding may move it.
        reason: Why there is no crossing.
    """

    distance: float = math.nan
    error: float = math.nan
    reason: Reason = ""


def find_crossing(
    rises: Callable[[Sequence[float]], Sequence[float]], size: float, rounding: float
) -> Crossing:
    """Finds the smallest distance at which the loss rises above that of the point.

    The loss is scanned first, at distances that double, up to the first rise beyond rounding. The
    crossing lies between this distance and the last one with a fall beyond rounding, and is the
    root of r(t)/t with the rise r(t): for a quadratic loss, r(t)/t is linear. A fall and a rise
    between two scanned distances are not seen, so that an earlier crossing may be missed.

    Args:
        rises: Computes r at distances: the mean loss there minus that of the point.
        size: The norm of the weights.
        rounding: How much of a rise may be rounding.

    Returns:
        The crossing.
    """
    known: dict[float, float] = {}

    def look(exponents: Sequence[int]) -> Iterator[tuple[float, float]]:
        distances = [size * 2.0**k for k in exponents]
        yield from zip(distances, rises(distances), strict=True)

    upper = math.nan
    for start in range(_SHORTEST, _LONGEST + 1, _BLOCK):
        known |= look(range(start, start + _BLOCK))
        # Losses beyond the first rise do not matter.
        upper = next((t for t, r in known.items() if not r <= rounding), math.nan)
        if math.isfinite(upper):
            break
    else:
        falls = any(r < -rounding for r in known.values())
        return Crossing(reason="no crossing" if falls else "rounding")
    if not math.isfinite(known[upper]):
        return Crossing(reason="not finite")
    start = _SHORTEST
    while known[min(known)] > rounding and start > _LEAST:
        start -= _BLOCK
        known |= look(range(start, start + _BLOCK))
        upper = min(t for t, r in known.items() if r > rounding)
    lower = max((t for t, r in known.items() if t < upper and r < -rounding), default=math.nan)
    if not math.isfinite(lower):
        return Crossing(reason="rounding")

    def slope(t: float) -> float:
        rise = known[t] if t in known else rises([t])[0]
        if not math.isfinite(rise):
            raise _NotFiniteError
        return rise / t

    try:
        distance = float(
            brentq(slope, lower, upper, xtol=_TOLERANCE * upper, maxiter=_MOST, disp=False)
        )
    except _NotFiniteError:
        return Crossing(reason="not finite")
    # r(t) = t · (r(t)/t) has the derivative t · (r(t)/t)' at its root.
    steepness = distance * (slope(upper) - slope(lower)) / (upper - lower)
    return Crossing(distance, rounding / steepness + _TOLERANCE * distance)
