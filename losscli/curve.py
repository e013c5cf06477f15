"""What can be said of a curve that was seen at some points, with the errors of what is said.

Every standard error is one of paired differences: both losses are of the same examples, so what
makes an example hard at both points drops out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["describe", "standard_error"]

Losses = NDArray[np.floating[Any]]


def standard_error(values: Losses) -> float:
    """Computes the standard error of a mean.

    Args:
        values: One number an example, ``[N]``.

    Returns:
        The sample standard deviation (n − 1) over √n; nan for a single example.
    """
    if len(values) < 2:
        return math.nan
    return float(np.std(values, ddof=1, dtype=np.float64) / math.sqrt(len(values)))


def describe(
    alphas: Sequence[float], losses: Losses, loss_a: Losses, loss_b: Losses
) -> dict[str, Any]:
    """Describes a curve on one split.

    Points whose mean loss is not finite are left out and counted; the two ends count as seen
    whether or not they are among the points.

    Args:
        alphas: The P points, rising.
        losses: The loss of each example at each of them, ``[P, N]``.
        loss_a: The loss of each example at α = 0, ``[N]``.
        loss_b: The same at α = 1.

    Returns:
        ``loss_a``, ``loss_b``; ``minimum``, the lowest point, with ``below_b``, how much it lies
        below B; ``barrier`` (Entezari et al. 2022, arXiv 2110.06296) and ``largest_rise`` (Lucas
        et al. 2021, arXiv 2104.11044) over 0 ≤ α ≤ 1, None where no point between the ends was
        looked at; ``monotonic``, whether the largest rise is 0, None where the points do not reach
        from end to end or one of them is not finite; ``local_minima`` with their depth (their
        topographic prominence); ``not_finite``, the number of points left out.
    """
    means = _means(losses)
    a, b = (
        _Point(x, float(_means(row[None])[0]), row) for x, row in ((0.0, loss_a), (1.0, loss_b))
    )
    points = [_Point(x, float(m), row) for x, m, row in zip(alphas, means, losses, strict=True)]
    between = [a, *(p for p in points if 0 < p.alpha < 1), b]
    finite = [p for p in points if p.finite]
    seen = [p for p in between if p.finite]
    looked = len(between) > 2
    rise = _largest_rise(seen) if looked else None
    monotonic: bool | None = None
    if rise is not None:
        whole = len(seen) == len(between) and alphas[0] <= 0 and alphas[-1] >= 1
        monotonic = False if rise["height"] > 0 else True if whole else None
    return {
        "loss_a": a.loss,
        "loss_b": b.loss,
        "minimum": _minimum(finite, b),
        "barrier": _barrier(seen, a, b) if looked else None,
        "largest_rise": rise,
        "monotonic": monotonic,
        "local_minima": _local_minima(points),
        "not_finite": len(points) - len(finite),
    }


class _Point:
    """A point of the curve: where, its mean loss, and the loss of each example there."""

    def __init__(self, alpha: float, loss: float, row: Losses) -> None:
        self.alpha = alpha
        self.loss = loss
        self.row = row
        self.finite = math.isfinite(loss)

    def above(self, other: _Point) -> float:
        return standard_error(self.row.astype(np.float64) - other.row)


def _means(losses: Losses) -> NDArray[np.float64]:
    # Overflow to inf and inf − inf are answers here, not accidents.
    with np.errstate(all="ignore"):
        means: NDArray[np.float64] = np.mean(losses, axis=1, dtype=np.float64)
    return means


def _minimum(points: Sequence[_Point], b: _Point) -> dict[str, Any] | None:
    if not points:
        return None
    lowest = min(points, key=lambda p: p.loss)
    return {
        "alpha": lowest.alpha,
        "loss": lowest.loss,
        "below_b": b.loss - lowest.loss,
        "below_b_stderr": b.above(lowest) if b.finite else None,
    }


def _barrier(points: Sequence[_Point], a: _Point, b: _Point) -> dict[str, Any] | None:
    if not (a.finite and b.finite):
        return None

    def excess(p: _Point) -> float:
        # By what was lost at the ends, not by rounding, an end lies on its own chord.
        if p is a or p is b:
            return 0.0
        return p.loss - ((1 - p.alpha) * a.loss + p.alpha * b.loss)

    top = max(points, key=excess)
    chord = (1 - top.alpha) * a.row.astype(np.float64) + top.alpha * b.row.astype(np.float64)
    height = excess(top)
    return {
        "height": height,
        "stderr": standard_error(top.row - chord) if height > 0 else 0.0,
        "alpha": top.alpha,
    }


def _largest_rise(points: Sequence[_Point]) -> dict[str, Any]:
    best: dict[str, Any] = {"height": 0.0, "stderr": 0.0, "alpha_from": None, "alpha_to": None}
    pair = None
    lowest = None
    for point in points:
        if lowest is None or point.loss < lowest.loss:
            lowest = point
        elif point.loss - lowest.loss > best["height"]:
            best["height"] = point.loss - lowest.loss
            pair = lowest, point
    if pair is not None:
        low, high = pair
        best |= {"stderr": high.above(low), "alpha_from": low.alpha, "alpha_to": high.alpha}
    return best


def _local_minima(points: Sequence[_Point]) -> list[dict[str, Any]]:
    # The depth of a minimum is how high one must climb from it, on the easier side, before one can
    # go lower than it or reaches the end of the curve: its topographic prominence. Points that are
    # not finite end the curve.
    minima = []
    for segment in _segments(points):
        for i in range(1, len(segment) - 1):
            here = segment[i]
            left, right = _rim(segment[i - 1 :: -1], here), _rim(segment[i + 1 :], here)
            # Of a flat bottom its first point stands for all.
            if left is None or right is None or segment[i - 1].loss == here.loss:
                continue
            rim = min(left, right, key=lambda p: p.loss)
            minima.append({
                "alpha": here.alpha,
                "loss": here.loss,
                "depth": rim.loss - here.loss,
                "depth_stderr": rim.above(here),
            })
    return minima


def _segments(points: Sequence[_Point]) -> list[list[_Point]]:
    segments: list[list[_Point]] = [[]]
    for point in points:
        if point.finite:
            segments[-1].append(point)
        else:
            segments.append([])
    return segments


def _rim(way: Sequence[_Point], here: _Point) -> _Point | None:
    """The highest point on the way out of a minimum; None where the way does not lead up."""
    highest = None
    for point in way:
        if point.loss < here.loss:
            break
        if point.loss > here.loss and (highest is None or point.loss > highest.loss):
            highest = point
    return highest
