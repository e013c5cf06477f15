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

from losscli.summaries import Extremum, Height, LineSplit, LowestOnLine, Rise

__all__ = ["describe", "lowest", "near_rounding", "relative", "standard_error"]

# The relative rounding of one operation in each type that a forward pass may have, and how many
# such errors a loss may have gathered on its way through a model.
_ROUNDING = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
_GATHERED = 16

# An extremum is beyond noise where its depth is more than so many standard errors of it.
_STANDARD_ERRORS = 2

Losses = NDArray[np.floating[Any]]


Weights = NDArray[np.float64]


def standard_error(values: Losses, weights: Weights | None = None) -> float:
    """Computes the standard error of a mean.

    Args:
        values: One number an example, ``[N]``: a loss, or a sum of multiples of its losses; with
            weights times the example's weight over the mean weight.
        weights: The weights w of the examples, ``[N]``; None where all are 1.

    Returns:
        The sample standard deviation (n − 1) over √n; nan for a single example. With weights the
        error of the ratio Σwl/Σw: the same of the residuals, n being the examples with a weight.
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
    """Divides weights by their mean.

    Args:
        weights: The weights of examples, ``[N]``.

    Returns:
        Weights with the mean 1; zeros where all are.
    """
    mean = float(weights.mean()) if len(weights) else 0.0
    return weights / mean if mean else weights


def lowest(losses: Sequence[float]) -> list[int]:
    """Finds the points with the lowest finite loss.

    Args:
        losses: The mean loss at each point, ``[P]``.

    Returns:
        The places of all that share it, rising; empty where no loss is finite.
    """
    least = min((loss for loss in losses if math.isfinite(loss)), default=None)
    return [i for i, loss in enumerate(losses) if loss == least]


def near_rounding(alphas: Sequence[float], losses: Sequence[float], dtype: str) -> list[float]:
    """Finds the points that decide about extrema which rounding could have made.

    Such an extremum is no deeper, or higher, than what rounding may do to a loss. A study that
    evaluates these points in float64, and asks again with the losses found until no new points
    come, has only extrema of the curve itself.

    Args:
        alphas: The P points, rising.
        losses: The mean loss at each, ``[P]``.
        dtype: The type of the forward pass, such as ``float32``.

    Returns:
        Each such extremum, its neighbours, and the point that its depth is measured to, rising.
    """
    points = [_Point(x, y, np.empty(0)) for x, y in zip(alphas, losses, strict=True)]
    doubt = _GATHERED * _ROUNDING[dtype]
    found = set()
    for segment in _segments(points):
        for sign in (1, -1):
            for i, k in _extrema([sign * p.loss for p in segment]):
                here, rim = segment[i].loss, segment[k].loss
                if abs(rim - here) < doubt * max(abs(rim), abs(here)):
                    found |= {segment[j].alpha for j in (i - 1, i, i + 1, k)}
    return sorted(found)


def describe(
    alphas: Sequence[float],
    losses: Losses,
    loss_a: Losses,
    loss_b: Losses,
    weights: Weights | None = None,
) -> LineSplit:
    """Describes a curve on one split.

    Points whose mean loss is not finite are left out and counted; the two ends count as seen
    whether or not they are among the points.

    Args:
        alphas: The P points, rising.
        losses: The loss of each example at each of them, ``[P, N]``.
        loss_a: The loss of each example at α = 0, ``[N]``.
        loss_b: The same at α = 1.
        weights: The weights of the examples, ``[N]``, which the losses are multiplied by, over
            their mean; None where all are 1.

    Returns:
        ``loss_a``, ``loss_b``; ``minimum``, the lowest point, the first where several are as low,
        with ``ties``, how many points have that loss, and ``below_b``, how much it lies below B;
        ``barrier`` (Entezari et al. 2022, arXiv 2110.06296) and ``largest_rise`` (Lucas
        et al. 2021, arXiv 2104.11044) over 0 ≤ α ≤ 1, None where no point between the ends was
        looked at; ``monotonic``, whether the largest rise is 0, None where the points do not reach
        from end to end or one of them is not finite; ``local_minima`` with their depth (their
        topographic prominence) and ``local_maxima`` with their height, its mirror image, each with
        its paired standard error, and ``beyond_noise``, whether it is more than twice that, which
        nobody can say from a single example; ``not_finite``, the number of points left out.
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
        "local_minima": _local(points, 1),
        "local_maxima": _local(points, -1),
        "not_finite": len(points) - len(finite),
    }


class _Point:
    """A point of the curve: where, its mean loss, and the loss of each example there."""

    def __init__(
        self, alpha: float, loss: float, row: Losses, weights: Weights | None = None
    ) -> None:
        self.alpha = alpha
        self.loss = loss
        self.row = row
        self.weights = weights
        self.finite = math.isfinite(loss)

    def above(self, other: _Point) -> float:
        return standard_error(self.row.astype(np.float64) - other.row, self.weights)


def _means(losses: Losses) -> NDArray[np.float64]:
    # Overflow to inf and inf − inf are answers here, not accidents.
    with np.errstate(all="ignore"):
        means: NDArray[np.float64] = np.mean(losses, axis=1, dtype=np.float64)
    return means


def _minimum(points: Sequence[_Point], b: _Point) -> LowestOnLine | None:
    if not points:
        return None
    shared = lowest([p.loss for p in points])
    first = points[shared[0]]
    return {
        "alpha": first.alpha,
        "loss": first.loss,
        "ties": len(shared),
        "below_b": b.loss - first.loss,
        "below_b_stderr": b.above(first) if b.finite else None,
    }


def _barrier(points: Sequence[_Point], a: _Point, b: _Point) -> Height | None:
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
        best |= {"stderr": high.above(low), "alpha_from": low.alpha, "alpha_to": high.alpha}
    return best


def _local(points: Sequence[_Point], sign: int) -> list[Extremum]:
    """Lists minima (sign 1, by depth) or maxima (sign −1, by height)."""
    found: list[Extremum] = []
    for segment in _segments(points):
        for i, k in _extrema([sign * p.loss for p in segment]):
            here, rim = segment[i], segment[k]
            height = sign * (rim.loss - here.loss)
            error = rim.above(here)
            size: Extremum = (
                {"depth": height, "depth_stderr": error}
                if sign > 0
                else {"height": height, "height_stderr": error}
            )
            found.append({
                "alpha": here.alpha,
                "loss": here.loss,
                **size,
                "beyond_noise": math.isfinite(error) and height > _STANDARD_ERRORS * error,
            })
    return found


def _segments(points: Sequence[_Point]) -> list[list[_Point]]:
    segments: list[list[_Point]] = [[]]
    for point in points:
        if point.finite:
            segments[-1].append(point)
        else:
            segments.append([])
    return segments


def _extrema(losses: Sequence[float]) -> list[tuple[int, int]]:
    """Finds minima, and for each its rim, the point that its depth is measured to."""
    # The depth of a minimum is how high one must climb from it, on the easier side, before one can
    # go lower than it or reaches the end of the curve: its topographic prominence. Points that are
    # not finite end the curve.
    last = len(losses) - 1
    rights = [None if k is None else last - k for k in reversed(_rims(losses[::-1]))]
    found = []
    for i, (left, right) in enumerate(zip(_rims(losses), rights, strict=True)):
        # Of a flat bottom its first point stands for all.
        if left is None or right is None or losses[i - 1] == losses[i]:
            continue
        found.append((i, min(left, right, key=lambda k: losses[k])))
    return found


def _rims(losses: Sequence[float]) -> list[int | None]:
    """For each point the highest on the way to its left, up to where that goes lower."""
    # Each point waits, with its rim, until a lower one has passed over it: a point is looked at as
    # often as it is passed over, which is once. None where the way does not lead up.
    rims: list[int | None] = []
    waiting: list[int] = []
    for i, loss in enumerate(losses):
        highest: int | None = None
        while waiting and losses[waiting[-1]] >= loss:
            passed = waiting.pop()
            for k in (passed, rims[passed]):
                above = loss if highest is None else losses[highest]
                if k is not None and losses[k] > above:
                    highest = k
        rims.append(highest)
        waiting.append(i)
    return rims
