"""Adaptive refinement of a curve to a tolerance, with all extrema located.

A uniform grid that resolves the sharpest bend of a curve wastes points elsewhere. The evaluated
points determine which points to evaluate next, until every prediction is within the tolerance.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["POSITION", "Curve", "Proposal", "propose", "uniform_points"]

POSITION = 1 / 1024
"""Accuracy of the position of an extremum, or of an edge to inf or nan, as a share of the range."""

# Intervals narrower than this share of the range are not split.
_MIN_WIDTH = 2.0**-20

# Largest ratio of the widths of adjacent intervals: next to a fine interval, a coarse one may miss
# structure. Intervals below a share of the range count as that wide, so that the finest intervals
# around an extremum do not spread.
_MAX_RATIO = 3.0
_MIN_GRADED_WIDTH = 1 / 128

# A bracketing point is dropped within `POSITION` / this of another point.
_SEPARATION = 8

# Largest contribution of a slope to the Hermite cubic, in units of slope times interval width.
_SLOPE_SHARE = 4 / 27

_Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """The evaluated values of one curve.

    Attributes:
        losses: The mean loss at each of the P points; inf and nan are allowed.
        slopes: The derivative at each point, nan if unknown; None if it is unknown everywhere.
    """

    losses: Sequence[float]
    slopes: Sequence[float] | None = None


@dataclass(frozen=True)
class Proposal:
    """The points to evaluate next.

    Attributes:
        alphas: The new points, ascending; empty when the refinement is complete.
        exhausted: Whether the limit on points excluded some.
    """

    alphas: tuple[float, ...]
    exhausted: bool


def propose(
    alphas: Sequence[float],
    curves: Mapping[str, Curve],
    tolerance: float,
    *,
    noise: float = 1e-7,
    limit: int = 2000,
) -> Proposal:
    """Proposes the points to evaluate next from the points evaluated so far.

    Call it repeatedly with all points, including those that it proposed, until it proposes none.

    An interval is halved if an interpolating cubic does not predict the curve. Each point is left
    out in turn and predicted from its two neighbours on either side, or, if slopes are known, by
    the Hermite cubic from the nearest point on either side; its slope is then predicted as well.
    The gap of the prediction is twice as wide as the intervals, so the error inside an interval is
    smaller than that of the prediction. Structure without effect on any point, such as a wave that
    is sampled at the same phase everywhere, is not found: start with a grid that is fine enough,
    or with slopes.

    In addition, each local minimum and maximum is bracketed until its neighbours are within
    `POSITION` of the range and the parabola through the three points gives its loss to the
    tolerance. The position of each edge between finite and other losses is bracketed as well.
    Changes within the rounding error are ignored.

    Args:
        alphas: The P points, in any order, all different.
        curves: The values of each curve at these points. Each curve is analysed separately, and
            the proposed points are the union over the curves.
        tolerance: Allowed error relative to the range of the finite losses of a curve.
        noise: Relative rounding error of a loss; for slopes, relative to the largest slope.
        limit: Maximum number of points, including those already evaluated.

    Returns:
        The new points.
    """
    x = np.asarray(alphas, dtype=np.float64)
    order = np.argsort(x)
    x = x[order]
    midpoints: set[float] = set()
    points: set[float] = set()
    for curve in curves.values():
        y = np.asarray(curve.losses, dtype=np.float64)[order]
        s = np.full(len(x), math.nan)
        if curve.slopes is not None:
            s = np.asarray(curve.slopes, dtype=np.float64)[order]
        analysis = _Analysis(x, y, s, tolerance, noise)
        midpoints |= analysis.midpoints()
        points |= analysis.points
    new = sorted(midpoints)
    for point in sorted(points):
        separation = analysis.accuracy / _SEPARATION
        if np.abs(x - point).min() >= separation and (
            not new or min(abs(other - point) for other in new) >= separation
        ):
            new.append(point)
    new.sort()
    room = max(0, limit - len(x))
    if len(new) <= room:
        return Proposal(tuple(new), exhausted=False)
    # The widest gaps first.
    indices = np.searchsorted(x, new)
    width = x[indices] - x[indices - 1]
    selected = sorted(range(len(new)), key=lambda i: (-width[i], new[i]))[:room]
    return Proposal(tuple(sorted(new[i] for i in selected)), exhausted=True)


def uniform_points(alphas: Sequence[float]) -> int:
    """Estimates the size of a uniform grid with the resolution of a refined grid.

    The uniform grid must be everywhere as fine as the refined grid at its finest: it has the range
    over the narrowest interval. Bracketing points of an extremum may be closer than the accuracy
    of its position. Intervals below `POSITION` of the range therefore count as that wide, unless
    two adjacent intervals are so narrow that only repeated splitting can explain them.

    Args:
        alphas: The points after refinement, in any order.

    Returns:
        The number of points of the uniform grid.
    """
    x = np.sort(np.asarray(alphas, dtype=np.float64))
    if len(x) < 2:
        return len(x)
    gaps = np.diff(x)
    width = float(x[-1] - x[0])
    adjacent = np.maximum(gaps[1:], gaps[:-1])
    step = max(float(gaps.min()), width * POSITION)
    if len(adjacent) and adjacent.min() < width * POSITION / _SEPARATION:
        step = float(adjacent.min())
    return math.ceil(width / step - 1e-9) + 1


class _Analysis:
    """Finds the intervals of one curve to split, and further points to evaluate.

    Args:
        x: The points, ascending, ``[P]``.
        y: The losses, ``[P]``.
        s: The slopes, ``[P]``.
        tolerance: Allowed error relative to the range of the losses.
        noise: Relative rounding error.

    Attributes:
        accuracy: Absolute accuracy of positions.
        points: Points to evaluate in addition to the midpoints.
    """

    def __init__(
        self, x: _Numbers, y: _Numbers, s: _Numbers, tolerance: float, noise: float
    ) -> None:
        self.x, self.y, self.s = x, y, s
        self.noise = noise
        self.span = float(x[-1] - x[0]) if len(x) else 0.0
        finite = y[np.isfinite(y)]
        self.allowed = tolerance * float(np.ptp(finite)) if len(finite) else 0.0
        known = np.abs(s[np.isfinite(s)])
        self.slope_noise = noise * float(known.max()) if len(known) else 0.0
        self.accuracy = POSITION * self.span
        self.points: set[float] = set()
        self._split: set[int] = set()
        self._analyse()

    def midpoints(self) -> set[float]:
        """Returns the midpoints of the intervals to split."""
        return {
            0.5 * (float(self.x[i]) + float(self.x[i + 1]))
            for i in self._split
            if self._width(i) > _MIN_WIDTH * self.span
        }

    def _analyse(self) -> None:
        finite = np.isfinite(self.y)
        for i in np.flatnonzero(finite[1:] != finite[:-1]).tolist():
            if self._width(i) > self.accuracy:
                self._split.add(i)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], finite.astype(int), [0]])))
        for first, last in edges.reshape(-1, 2):
            segment = range(int(first), int(last))
            self._check_predictions(segment)
            self._grade(segment)
            self._bracket_extrema(segment)
            self._bracket_extrema_at_ends(segment)
            self._bracket_slope_changes(segment)

    def _width(self, i: int) -> float:
        return float(self.x[i + 1] - self.x[i])

    def _check_predictions(self, segment: range) -> None:
        """Splits the intervals around each point that its neighbours do not predict."""
        if len(segment) < 5:
            # A prediction needs four other points. A shorter segment between losses that are not
            # finite is split until its intervals are as narrow as an edge.
            self._split |= {i for i in segment[:-1] if self._width(i) > self.accuracy}
            return
        for i in segment[1:-1]:
            if self._exceeds_tolerance(i, segment):
                left, right = self._width(i - 1), self._width(i)
                # The wider one, and the other unless it has less than half of that width.
                self._split |= {
                    k for k, w in ((i - 1, left), (i, right)) if 2 * w > 0.999 * max(left, right)
                }

    def _exceeds_tolerance(self, i: int, segment: range) -> bool:
        """Returns whether the error of the prediction of a point exceeds the tolerance."""
        x, y, s = self.x, self.y, self.s
        others = self._support(i, segment)
        left, right = others[1], others[2]
        with np.errstate(all="ignore"):
            if left < i < right and np.isfinite(s[left]) and np.isfinite(s[right]):
                value, slope, rounding = self._hermite(left, right, float(x[i]))
                error = abs(float(y[i]) - value)
                rounding += self.noise * abs(float(y[i]))
                if np.isfinite(s[i]):
                    width = max(self._width(i - 1), self._width(i))
                    error = max(error, _SLOPE_SHARE * width * abs(float(s[i]) - slope))
                    rounding += width * self.slope_noise
            else:
                weights = _lagrange(x[others], float(x[i]))
                error = abs(float(y[i]) - float(weights @ y[others]))
                rounding = self.noise * float(np.abs(weights) @ np.abs(y[others]) + abs(y[i]))
        return error > self.allowed + rounding

    def _support(self, i: int, segment: range) -> list[int]:
        """Chooses two points on either side to predict a point from, or three and one at an end."""
        # The prediction must span gaps as wide as the wider interval beside the point, because it
        # decides whether that interval is split. Closer points would make it too easy.
        spacing = 0.499 * max(self._width(i - 1), self._width(i))
        sides: list[list[int]] = []
        for candidates in (range(i - 1, segment[0] - 1, -1), range(i + 1, segment[-1] + 1)):
            selected, previous = [], i
            for k in candidates:
                if abs(self.x[k] - self.x[previous]) >= spacing:
                    selected.append(k)
                    previous = k
                if len(selected) == 3:
                    break
            sides.append(selected)
        left, right = sides
        if len(left) + len(right) < 4 or not (left and right):
            start = min(max(i - 2, segment[0]), segment[-1] - 4)
            return [k for k in range(start, start + 5) if k != i]
        n_right = 2 if len(left) >= 2 and len(right) >= 2 else len(right) if len(right) < 2 else 3
        return [*reversed(left[: 4 - n_right]), *right[:n_right]]

    def _hermite(self, i: int, k: int, x: float) -> tuple[float, float, float]:
        """Returns value, slope and rounding error of the Hermite cubic through two points."""
        h = float(self.x[k] - self.x[i])
        t = (x - float(self.x[i])) / h
        y0, y1, s0, s1 = (float(v) for v in (self.y[i], self.y[k], self.s[i], self.s[k]))
        b0, b1 = (1 + 2 * t) * (1 - t) ** 2, t * t * (3 - 2 * t)
        c0, c1 = t * (1 - t) ** 2, t * t * (t - 1)
        value = b0 * y0 + b1 * y1 + h * (c0 * s0 + c1 * s1)
        slope = 6 * t * (1 - t) * (y1 - y0) / h + (1 - t) * (1 - 3 * t) * s0 + t * (3 * t - 2) * s1
        return value, slope, self.noise * max(abs(y0), abs(y1)) * 3 + h * self.slope_noise

    def _grade(self, segment: range) -> None:
        """Splits intervals that are much wider than an adjacent one."""
        min_width = _MIN_GRADED_WIDTH * self.span
        widths = [self._width(i) for i in segment[:-1]]
        for i, (left, right) in enumerate(itertools.pairwise(widths), segment[0]):
            if left > _MAX_RATIO * max(right, min_width):
                self._split.add(i)
            elif right > _MAX_RATIO * max(left, min_width):
                self._split.add(i + 1)

    def _bracket_extrema(self, segment: range) -> None:
        for sign in (1.0, -1.0):
            for first, last in _valleys(sign * self.y[segment.start : segment.stop], self.noise):
                self._bracket(segment.start + first, segment.start + last)

    def _bracket(self, first: int, last: int) -> None:
        """Brackets an extremum that lies strictly between two points with other losses."""
        inner = list(range(first + 1, last))
        if len(inner) > 1:
            # A flat bottom: only its edges are refined. A bottom of two points may have the
            # extremum between them, so this interval is refined as well.
            ends = {first, last - 1} | ({inner[0]} if len(inner) == 2 else set())
            self._split |= {i for i in ends if self._width(i) > self.accuracy}
            return
        (i,) = inner
        left, right = self._width(i - 1), self._width(i)
        vertex, depth = self._parabola(i)
        if max(left, right) <= self.accuracy and depth <= self.allowed + self.noise * abs(
            self.y[i]
        ):
            return
        # Bisection of the wider side always makes progress. If the parabola is accurate, the two
        # points around its vertex end the search.
        self._split.add(i - 1 if left > right else i)
        self._add_around(vertex, i - 1, i + 1)

    def _parabola(self, i: int) -> tuple[float, float]:
        """Returns the vertex of the parabola through a point and its neighbours, and its depth."""
        x, y = self.x, self.y
        with np.errstate(all="ignore"):
            rise_left = (y[i - 1] - y[i]) / (x[i] - x[i - 1])
            rise_right = (y[i + 1] - y[i]) / (x[i + 1] - x[i])
            bend = (rise_left + rise_right) / (x[i + 1] - x[i - 1])
            slope = rise_right - bend * (x[i + 1] - x[i])
            step = float(-slope / (2 * bend))
            depth = abs(float(slope) * step / 2)
        if not math.isfinite(step + depth):
            return float(x[i]), 0.0
        return float(x[i]) + step, depth

    def _bracket_extrema_at_ends(self, segment: range) -> None:
        """Brackets extrema inside the first or the last interval, found by a cubic."""
        if len(segment) < 4:
            return
        for support, i in ((segment[:4], segment[0]), (segment[-4:], segment[-2])):
            width = self._width(i)
            if width <= self.accuracy:
                continue
            x, y = self.x[support[0] : support[-1] + 1], self.y[support[0] : support[-1] + 1]
            with np.errstate(all="ignore"):
                cubic = np.polynomial.Polynomial(
                    np.linalg.solve(np.vander((x - self.x[i]) / width, increasing=True), y)
                )
            if not np.isfinite(cubic.coef).all():
                continue
            min_depth = 8 * self.noise * float(np.abs(y).max())
            for root in np.roots(cubic.deriv().coef[::-1]):
                if root.imag or not 0 < root.real < 1:
                    continue
                if (
                    min(abs(cubic(root.real) - self.y[i]), abs(cubic(root.real) - self.y[i + 1]))
                    > min_depth
                ):
                    self._split.add(i)
                    self._add_around(float(self.x[i]) + float(root.real) * width, i, i + 1)

    def _bracket_slope_changes(self, segment: range) -> None:
        """Brackets the extrema between slopes of opposite signs."""
        for i in segment[:-1]:
            s0, s1, width = float(self.s[i]), float(self.s[i + 1]), self._width(i)
            if not (math.isfinite(s0) and math.isfinite(s1)) or s0 * s1 >= 0:
                continue
            rounding = self.noise * max(abs(self.y[i]), abs(self.y[i + 1]))
            if width > self.accuracy and width * min(abs(s0), abs(s1)) > rounding:
                self._split.add(i)
                self._add_around(float(self.x[i]) + width * s0 / (s0 - s1), i, i + 1)

    def _add_around(self, vertex: float, first: int, last: int) -> None:
        """Adds a point on either side of a predicted extremum, within the required accuracy."""
        step = 0.45 * self.accuracy
        for point in (vertex - step, vertex + step):
            if float(self.x[first]) < point < float(self.x[last]):
                self.points.add(point)


def _lagrange(x: _Numbers, at: float) -> _Numbers:
    """Returns the Lagrange weights of the cubic through four points, evaluated at a point."""
    weights = np.ones(len(x))
    for j, node in enumerate(x):
        for k, other in enumerate(x):
            if k != j:
                weights[j] *= (at - other) / (node - other)
    return weights


def _valleys(y: _Numbers, noise: float) -> list[tuple[int, int]]:
    """Returns the indices of the points that enclose each minimum.

    The curve must rise from a minimum by more than the rounding error on both sides. The minimum
    lies strictly between the nearest points that are higher by this error.
    """
    valleys = []
    lowest = highest = 0
    falling = False
    for i in range(len(y)):
        if y[i] > y[highest]:
            highest = i
        if y[i] < y[lowest]:
            lowest = i
        rounding = 2 * noise * max(abs(y[i]), abs(y[highest]), abs(y[lowest]))
        if not falling and y[highest] - y[i] > rounding:
            falling, lowest = True, i
        elif falling and y[i] - y[lowest] > rounding:
            left = lowest
            while y[left] - y[lowest] <= rounding:
                left -= 1
            valleys.append((left, i))
            falling, highest = False, i
    return valleys
