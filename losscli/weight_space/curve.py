"""Minimum, barrier, rises and local extrema of a sampled loss curve, with standard errors.

All standard errors are those of paired differences. Both losses are of the same examples, so the
variation between examples that is common to both points cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from losscli.results.summaries import Extremum, Height, LineSplit, LowestOnLine, Rise

__all__ = [
    "describe",
    "lowest",
    "near_rounding",
    "relative",
    "relative_rounding",
    "standard_error",
    "unit_of_rounding",
]

# Relative rounding error of one operation by the precision of a forward pass, and the number of
# such errors that may accumulate in a loss.
_ROUNDING = {
    "float64": 2.0**-52,
    "float32": 2.0**-23,
    "tf32": 2.0**-10,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
}
_ACCUMULATED_ERRORS = 16

# An extremum is significant if its depth is more than this many standard errors.
_STANDARD_ERRORS = 2

Losses = NDArray[np.floating[Any]]


Weights = NDArray[np.float64]


def standard_error(values: Losses, weights: Weights | None = None) -> float:
    """Computes the standard error of a mean.

    Args:
        values: One number per example, ``[N]``: a loss, or a linear combination of losses. With
            weights, it is multiplied by the weight of the example over the mean weight.
        weights: The weights w of the examples, ``[N]``; None if all are 1.

    Returns:
        The sample standard deviation (with n − 1) over √n; nan for a single example. With weights,
        the standard error of the ratio Σwl/Σw: the same formula for the residuals, where n counts
        the examples with a nonzero weight.
    """
    number = len(values) if weights is None else int(np.count_nonzero(weights))
    if number < 2:
        return math.nan
    if weights is None:
        return float(np.std(values, ddof=1, dtype=np.float64) / math.sqrt(number))
    residuals = values - np.mean(values, dtype=np.float64) * relative(weights)
    squares = float(np.square(residuals).sum())
    return math.sqrt(squares / (number - 1) / number) * (number / len(values))


def relative(weights: Weights) -> Weights:
    """Divides the weights of examples, ``[N]``, by their mean; zeros stay zeros."""
    mean = float(weights.mean()) if len(weights) else 0.0
    return weights / mean if mean else weights


def lowest(losses: Sequence[float]) -> list[int]:
    """Returns the indices of all points with the lowest finite loss, ascending; maybe none."""
    minimum = min((loss for loss in losses if math.isfinite(loss)), default=None)
    return [i for i, loss in enumerate(losses) if loss == minimum]


def unit_of_rounding(precision: str) -> float:
    """Returns the relative rounding error of one operation, for example in ``float32``."""
    return _ROUNDING[precision]


def relative_rounding(precision: str) -> float:
    """Returns the relative rounding error of a loss, for example in ``float32``."""
    return _ACCUMULATED_ERRORS * _ROUNDING[precision]


def near_rounding(alphas: Sequence[float], losses: Sequence[float], precision: str) -> list[float]:
    """Finds the points of extrema that may be caused by rounding.

    The depth or height of such an extremum is within the rounding error of a loss. To remove these
    extrema, evaluate the returned points in float64 and call this function again with the new
    losses, until it returns no new points.

    Args:
        alphas: The P points, ascending.
        losses: The mean loss at each point, ``[P]``.
        precision: The precision of the forward pass, such as ``float32`` or ``tf32``.

    Returns:
        Each such extremum, its neighbours, and the rim that its depth is measured to, ascending.
    """
    points = [_Point(x, y, np.empty(0)) for x, y in zip(alphas, losses, strict=True)]
    relative_error = relative_rounding(precision)
    doubtful = set()
    for segment in _segments(points):
        for sign in (1, -1):
            for i, k in _extrema([sign * p.loss for p in segment]):
                loss, rim = segment[i].loss, segment[k].loss
                if abs(rim - loss) < relative_error * max(abs(rim), abs(loss)):
                    doubtful |= {segment[j].alpha for j in (i - 1, i, i + 1, k)}
    return sorted(doubtful)


def describe(
    alphas: Sequence[float],
    losses: Losses,
    loss_a: Losses,
    loss_b: Losses,
    weights: Weights | None = None,
) -> LineSplit:
    """Describes a curve on one split.

    Points with a mean loss that is not finite are excluded and counted. The two ends are included
    even if they are not among the points.

    Args:
        alphas: The P points, ascending.
        losses: The loss of each example at each point, ``[P, N]``.
        loss_a: The loss of each example at α = 0, ``[N]``.
        loss_b: The loss of each example at α = 1, ``[N]``.
        weights: The weights of the examples, ``[N]``; the losses are already multiplied by the
            weight over the mean weight. None if all are 1.

    Returns:
        A dictionary with these keys:

        - ``loss_a``, ``loss_b``: the mean losses at the ends.
        - ``minimum``: the lowest point, the first one if several have the same loss; ``ties`` is
          the number of these points, and ``below_b`` the loss at B minus the minimum.
        - ``barrier`` (Entezari et al. 2022, arXiv 2110.06296) and ``largest_rise`` (Lucas et al.
          2021, arXiv 2104.11044) over 0 ≤ α ≤ 1; None without points between the ends.
        - ``monotonic``: whether the largest rise is 0; None if the points do not cover 0 to 1, or
          if a loss is not finite, unless a rise was found.
        - ``local_minima`` with their depth (topographic prominence) and ``local_maxima`` with
          their height (the prominence of −loss), each with its paired standard error;
          ``beyond_noise`` is whether it exceeds two standard errors, False for a single example.
        - ``not_finite``: the number of excluded points.
    """
    means = _means(losses)
    a, b = (
        _Point(x, float(_means(row[None])[0]), row, weights)
        for x, row in ((0.0, loss_a), (1.0, loss_b))
    )
    points = [
        _Point(x, float(m), row, weights) for x, m, row in zip(alphas, means, losses, strict=True)
    ]
    between = [a, *(p for p in points if 0 < p.alpha < 1), b]
    finite = [p for p in points if p.finite]
    finite_between = [p for p in between if p.finite]
    has_interior = len(between) > 2
    rise = _largest_rise(finite_between) if has_interior else None
    monotonic: bool | None = None
    if rise is not None:
        complete = len(finite_between) == len(between) and alphas[0] <= 0 and alphas[-1] >= 1
        monotonic = False if rise["height"] > 0 else True if complete else None
    return {
        "loss_a": a.loss,
        "loss_b": b.loss,
        "minimum": _minimum(finite, b),
        "barrier": _barrier(finite_between, a, b) if has_interior else None,
        "largest_rise": rise,
        "monotonic": monotonic,
        "local_minima": _local(points, 1),
        "local_maxima": _local(points, -1),
        "not_finite": len(points) - len(finite),
    }


class _Point:
    """A point of the curve: α, the mean loss, and the loss of each example."""

    def __init__(
        self, alpha: float, loss: float, row: Losses, weights: Weights | None = None
    ) -> None:
        self.alpha = alpha
        self.loss = loss
        self.row = row
        self.weights = weights
        self.finite = math.isfinite(loss)

    def stderr_to(self, other: _Point) -> float:
        return standard_error(self.row.astype(np.float64) - other.row, self.weights)


def _means(losses: Losses) -> NDArray[np.float64]:
    # Overflow to inf and inf − inf are valid results here.
    with np.errstate(all="ignore"):
        means: NDArray[np.float64] = np.mean(losses, axis=1, dtype=np.float64)
    return means


def _minimum(points: Sequence[_Point], b: _Point) -> LowestOnLine | None:
    if not points:
        return None
    minima = lowest([p.loss for p in points])
    first = points[minima[0]]
    return {
        "alpha": first.alpha,
        "loss": first.loss,
        "ties": len(minima),
        "below_b": b.loss - first.loss,
        "below_b_stderr": b.stderr_to(first) if b.finite else None,
    }


def _barrier(points: Sequence[_Point], a: _Point, b: _Point) -> Height | None:
    if not (a.finite and b.finite):
        return None

    def excess(p: _Point) -> float:
        # The ends lie on the chord by definition, without a rounding error.
        if p is a or p is b:
            return 0.0
        return p.loss - ((1 - p.alpha) * a.loss + p.alpha * b.loss)

    top = max(points, key=excess)
    chord = (1 - top.alpha) * a.row.astype(np.float64) + top.alpha * b.row.astype(np.float64)
    height = excess(top)
    return {
        "height": height,
        "stderr": standard_error(top.row - chord, a.weights) if height > 0 else 0.0,
        "alpha": top.alpha,
    }


def _largest_rise(points: Sequence[_Point]) -> Rise:
    best: Rise = {"height": 0.0, "stderr": 0.0, "alpha_from": None, "alpha_to": None}
    pair = None
    low = None
    for point in points:
        if low is None or point.loss < low.loss:
            low = point
        elif point.loss - low.loss > best["height"]:
            best["height"] = point.loss - low.loss
            pair = low, point
    if pair is not None:
        low, high = pair
        best |= {
            "stderr": high.stderr_to(low),
            "alpha_from": low.alpha,
            "alpha_to": high.alpha,
        }
    return best


def _local(points: Sequence[_Point], sign: int) -> list[Extremum]:
    """Lists minima (sign 1, by depth) or maxima (sign −1, by height)."""
    extrema: list[Extremum] = []
    for segment in _segments(points):
        for i, k in _extrema([sign * p.loss for p in segment]):
            point, rim = segment[i], segment[k]
            height = sign * (rim.loss - point.loss)
            error = rim.stderr_to(point)
            size: Extremum = (
                {"depth": height, "depth_stderr": error}
                if sign > 0
                else {"height": height, "height_stderr": error}
            )
            extrema.append({
                "alpha": point.alpha,
                "loss": point.loss,
                **size,
                "beyond_noise": math.isfinite(error) and height > _STANDARD_ERRORS * error,
            })
    return extrema


def _segments(points: Sequence[_Point]) -> list[list[_Point]]:
    segments: list[list[_Point]] = [[]]
    for point in points:
        if point.finite:
            segments[-1].append(point)
        else:
            segments.append([])
    return segments


def _extrema(losses: Sequence[float]) -> list[tuple[int, int]]:
    """Returns the index of each minimum and of its rim, the point that its depth is measured to.

    The depth is the topographic prominence: the smaller of the two heights to climb, on the left
    and on the right, before the curve falls below the minimum or ends. The curve ends at points
    that are not finite.
    """
    last = len(losses) - 1
    rights = [None if k is None else last - k for k in reversed(_rims(losses[::-1]))]
    minima = []
    for i, (left, right) in enumerate(zip(_rims(losses), rights, strict=True)):
        # A flat bottom is represented by its first point.
        if left is None or right is None or losses[i - 1] == losses[i]:
            continue
        minima.append((i, min(left, right, key=lambda k: losses[k])))
    return minima


def _rims(losses: Sequence[float]) -> list[int | None]:
    """Returns for each point the index of the highest point on its left before a lower one.

    It is None if the curve does not rise on the left. Each point stays on a stack, with its rim,
    until a lower point removes it, so the total time is linear.
    """
    rims: list[int | None] = []
    stack: list[int] = []
    for i, loss in enumerate(losses):
        highest: int | None = None
        while stack and losses[stack[-1]] >= loss:
            removed = stack.pop()
            for k in (removed, rims[removed]):
                above = loss if highest is None else losses[highest]
                if k is not None and losses[k] > above:
                    highest = k
        rims.append(highest)
        stack.append(i)
    return rims
