"""Where to look next at a curve, so that it is known to a tolerance and no extremum is missed.

A grid that is fine enough for the sharpest bend of a curve is wasted on the rest of it. From the
points seen so far follow those that are worth the next look, until nothing surprises any more.
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
"""To how much of the range the position of an extremum, or of an edge to inf or nan, is found."""

# No interval narrower than this share of the range is split.
_FLOOR = 2.0**-20

# An interval may be this many times as wide as the one beside it: a curve that needs a close look
# here is not trusted to be plain there. Intervals below a share of the range count as that wide,
# so that the closest look at an extremum spreads no further.
_GRADING = 3.0
_GRADED = 1 / 128

# A point to end a search is not worth evaluating this share of that width from another one.
_APART = 8

# The most that Hermite's cubic makes of a slope, 4/27 of it times the width of the interval.
_SLOPE_SHARE = 4 / 27

_Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """What is known of one curve.

    Attributes:
        losses: The mean loss at each of the P points; inf and nan are answers.
        slopes: Its derivative at each, nan where it is not known; None where it is nowhere.
    """

    losses: Sequence[float]
    slopes: Sequence[float] | None = None


@dataclass(frozen=True)
class Proposal:
    """What to evaluate next.

    Attributes:
        alphas: The new points, rising; none when the curves are known.
        exhausted: Whether there were more to look at than the limit on points lets.
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
    """Proposes the points to evaluate next, from all that were evaluated so far.

    To be called again with the points that it proposed until it proposes none. An interval is
    halved where the cubic through its neighbours does not predict the curve: each point is left
    out in turn, and predicted from its two neighbours on either side, or by Hermite's cubic from
    the nearest one on either side where their slopes are known, in which case its own slope is
    predicted too. As the gap is then twice as wide as the intervals are, a prediction that holds
    promises more for the intervals themselves. What leaves no trace at any point, such as a wave
    that the grid meets always in the same phase, is not found: begin with a grid that is fine
    enough, or with slopes.

    Besides, each local minimum and maximum is closed in on, from both sides, until its neighbours
    are within `POSITION` of the range and a parabola through the three says that its loss is
    known to the tolerance; and so is each edge between finite losses and others, as far as its
    position. A change that rounding could make is no extremum, and no surprise.

    Args:
        alphas: The P points, in any order, no two of them equal.
        curves: What is known of each curve at these points; each curve is looked at by itself, and
            all get the points that one of them needs.
        tolerance: The error to allow, as a share of a curve's height, highest − lowest finite loss.
        noise: The rounding error of a loss, as a share of it; of a slope, of the largest one.
        limit: The most points, with those at hand.

    Returns:
        The new points.
    """
    x = np.asarray(alphas, dtype=np.float64)
    order = np.argsort(x)
    x = x[order]
    middles: set[float] = set()
    points: set[float] = set()
    for curve in curves.values():
        y = np.asarray(curve.losses, dtype=np.float64)[order]
        s = np.full(len(x), math.nan)
        if curve.slopes is not None:
            s = np.asarray(curve.slopes, dtype=np.float64)[order]
        look = _Look(x, y, s, tolerance, noise)
        middles |= look.middles()
        points |= look.points
    new = sorted(middles)
    for point in sorted(points):
        if np.abs(x - point).min() >= look.near / _APART and (
            not new or min(abs(other - point) for other in new) >= look.near / _APART
        ):
            new.append(point)
    new.sort()
    room = max(0, limit - len(x))
    if len(new) <= room:
        return Proposal(tuple(new), exhausted=False)
    # The widest gaps first.
    places = np.searchsorted(x, new)
    width = x[places] - x[places - 1]
    first = sorted(range(len(new)), key=lambda i: (-width[i], new[i]))[:room]
    return Proposal(tuple(sorted(new[i] for i in first)), exhausted=True)


def uniform_points(alphas: Sequence[float]) -> int:
    """Estimates how many evenly spaced points would show as much as refined ones.

    An even grid must be everywhere as fine as the refined one is where it had to be finest: the
    range over the narrowest interval. As searches for an extremum may meet nearer to each other
    than the position of an extremum is found, intervals below `POSITION` of the range count as
    that wide unless they are so narrow that only the splitting of intervals, on both sides of a
    point, has led there.

    Args:
        alphas: The points after refinement, in any order.

    Returns:
        The number of points of the even grid.
    """
    x = np.sort(np.asarray(alphas, dtype=np.float64))
    if len(x) < 2:
        return len(x)
    gaps = np.diff(x)
    reach = float(x[-1] - x[0])
    both = np.maximum(gaps[1:], gaps[:-1])
    needed = max(float(gaps.min()), reach * POSITION)
    if len(both) and both.min() < reach * POSITION / _APART:
        needed = float(both.min())
    return math.ceil(reach / needed - 1e-9) + 1


class _Look:
    """A look at one curve.

    Args:
        x: The points, rising, ``[P]``.
        y: The losses, ``[P]``.
        s: The slopes, ``[P]``.
        tolerance: The error to allow.
        noise: The rounding error.

    Attributes:
        near: The width to which positions are found.
        points: Points to evaluate beside the middles.
    """

    def __init__(
        self, x: _Numbers, y: _Numbers, s: _Numbers, tolerance: float, noise: float
    ) -> None:
        self.x, self.y, self.s = x, y, s
        self.noise = noise
        self.reach = float(x[-1] - x[0]) if len(x) else 0.0
        finite = y[np.isfinite(y)]
        self.allowed = tolerance * float(np.ptp(finite)) if len(finite) else 0.0
        known = np.abs(s[np.isfinite(s)])
        self.slope_noise = noise * float(known.max()) if len(known) else 0.0
        self.near = POSITION * self.reach
        self.points: set[float] = set()
        self._split: set[int] = set()
        self._explore()

    def middles(self) -> set[float]:
        """Lists the middles of the intervals to split."""
        return {
            0.5 * (float(self.x[i]) + float(self.x[i + 1]))
            for i in self._split
            if self._width(i) > _FLOOR * self.reach
        }

    def _explore(self) -> None:
        finite = np.isfinite(self.y)
        for i in np.flatnonzero(finite[1:] != finite[:-1]).tolist():
            if self._width(i) > self.near:
                self._split.add(i)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], finite.astype(int), [0]])))
        for first, last in edges.reshape(-1, 2):
            segment = range(int(first), int(last))
            self._predict(segment)
            self._grade(segment)
            self._close_in(segment)
            self._close_in_at_the_ends(segment)
            self._close_in_on_slopes(segment)

    def _width(self, i: int) -> float:
        return float(self.x[i + 1] - self.x[i])

    def _predict(self, segment: range) -> None:
        """Leaves out each point in turn; where it surprises, the intervals beside it are split."""
        if len(segment) < 5:
            # Too few to predict any from four others. The surroundings of a few points between
            # some that are not finite are known once they are as narrow as an edge is.
            self._split |= {i for i in segment[:-1] if self._width(i) > self.near}
            return
        for i in segment[1:-1]:
            if self._surprises(i, segment):
                left, right = self._width(i - 1), self._width(i)
                # The wider one, and the other where it is not already finer than the rest.
                self._split |= {
                    k for k, w in ((i - 1, left), (i, right)) if 2 * w > 0.999 * max(left, right)
                }

    def _surprises(self, i: int, segment: range) -> bool:
        x, y, s = self.x, self.y, self.s
        others = self._others(i, segment)
        left, right = others[1], others[2]
        with np.errstate(all="ignore"):
            if left < i < right and np.isfinite(s[left]) and np.isfinite(s[right]):
                value, slope, doubt = self._hermite(left, right, float(x[i]))
                surprise = abs(float(y[i]) - value)
                doubt += self.noise * abs(float(y[i]))
                if np.isfinite(s[i]):
                    width = max(self._width(i - 1), self._width(i))
                    bend = _SLOPE_SHARE * width * abs(float(s[i]) - slope)
                    surprise = max(surprise, bend)
                    doubt += width * self.slope_noise
            else:
                shares = _lagrange(x[others], float(x[i]))
                surprise = abs(float(y[i]) - float(shares @ y[others]))
                doubt = self.noise * float(np.abs(shares) @ np.abs(y[others]) + abs(y[i]))
        return surprise > self.allowed + doubt

    def _others(self, i: int, segment: range) -> list[int]:
        """Chooses two points on either side to predict a point from; at an end, three and one."""
        # Points that are much nearer than the wider interval beside the point is wide would make
        # the prediction easier than that interval is, which it is to vouch for.
        apart = 0.499 * max(self._width(i - 1), self._width(i))
        sides: list[list[int]] = []
        for way in (range(i - 1, segment[0] - 1, -1), range(i + 1, segment[-1] + 1)):
            chosen, at = [], i
            for k in way:
                if abs(self.x[k] - self.x[at]) >= apart:
                    chosen.append(k)
                    at = k
                if len(chosen) == 3:
                    break
            sides.append(chosen)
        left, right = sides
        if len(left) + len(right) < 4 or not (left and right):
            start = min(max(i - 2, segment[0]), segment[-1] - 4)
            return [k for k in range(start, start + 5) if k != i]
        ahead = 2 if len(left) >= 2 and len(right) >= 2 else len(right) if len(right) < 2 else 3
        return [*reversed(left[: 4 - ahead]), *right[:ahead]]

    def _hermite(self, i: int, k: int, x: float) -> tuple[float, float, float]:
        """Hermite's cubic from two points: its value and slope, and what rounding does to it."""
        h = float(self.x[k] - self.x[i])
        t = (x - float(self.x[i])) / h
        y0, y1, s0, s1 = (float(v) for v in (self.y[i], self.y[k], self.s[i], self.s[k]))
        b0, b1 = (1 + 2 * t) * (1 - t) ** 2, t * t * (3 - 2 * t)
        c0, c1 = t * (1 - t) ** 2, t * t * (t - 1)
        value = b0 * y0 + b1 * y1 + h * (c0 * s0 + c1 * s1)
        bend = 6 * t * (1 - t)
        slope = bend * (y1 - y0) / h + (1 - t) * (1 - 3 * t) * s0 + t * (3 * t - 2) * s1
        return value, slope, self.noise * max(abs(y0), abs(y1)) * 3 + h * self.slope_noise

    def _grade(self, segment: range) -> None:
        """Splits intervals that are far wider than the one beside them."""
        least = _GRADED * self.reach
        widths = [self._width(i) for i in segment[:-1]]
        for i, (one, other) in enumerate(itertools.pairwise(widths), segment[0]):
            if one > _GRADING * max(other, least):
                self._split.add(i)
            elif other > _GRADING * max(one, least):
                self._split.add(i + 1)

    def _close_in(self, segment: range) -> None:
        for sign in (1.0, -1.0):
            for first, last in _valleys(sign * self.y[segment.start : segment.stop], self.noise):
                self._bracket(segment.start + first, segment.start + last)

    def _bracket(self, first: int, last: int) -> None:
        """Closes in on an extremum that lies strictly between two points of other losses."""
        inner = list(range(first + 1, last))
        if len(inner) > 1:
            # A flat bottom: its rims are closed in on. Its inside has been looked at unless it is
            # but two points, with the extremum between them.
            ends = {first, last - 1} | ({inner[0]} if len(inner) == 2 else set())
            self._split |= {i for i in ends if self._width(i) > self.near}
            return
        (i,) = inner
        left, right = self._width(i - 1), self._width(i)
        vertex, beyond = self._parabola(i)
        if max(left, right) <= self.near and beyond <= self.allowed + self.noise * abs(self.y[i]):
            return
        # Half of the wider side falls away in any case. If the parabola is right, its two points
        # on either side of the vertex end the search.
        self._split.add(i - 1 if left > right else i)
        self._around(vertex, i - 1, i + 1)

    def _parabola(self, i: int) -> tuple[float, float]:
        """The vertex of the parabola through a point and its neighbours, and how far beyond it."""
        x, y = self.x, self.y
        with np.errstate(all="ignore"):
            rise_left = (y[i - 1] - y[i]) / (x[i] - x[i - 1])
            rise_right = (y[i + 1] - y[i]) / (x[i + 1] - x[i])
            bend = (rise_left + rise_right) / (x[i + 1] - x[i - 1])
            slope = rise_right - bend * (x[i + 1] - x[i])
            step = float(-slope / (2 * bend))
            beyond = abs(float(slope) * step / 2)
        if not math.isfinite(step + beyond):
            return float(x[i]), 0.0
        return float(x[i]) + step, beyond

    def _close_in_at_the_ends(self, segment: range) -> None:
        """Closes in on extrema in the first or the last interval, which no point need show."""
        if len(segment) < 4:
            return
        for four, i in ((segment[:4], segment[0]), (segment[-4:], segment[-2])):
            width = self._width(i)
            if width <= self.near:
                continue
            x, y = self.x[four[0] : four[-1] + 1], self.y[four[0] : four[-1] + 1]
            with np.errstate(all="ignore"):
                cubic = np.polynomial.Polynomial(
                    np.linalg.solve(np.vander((x - self.x[i]) / width, increasing=True), y)
                )
            if not np.isfinite(cubic.coef).all():
                continue
            least = 8 * self.noise * float(np.abs(y).max())
            for root in np.roots(cubic.deriv().coef[::-1]):
                if root.imag or not 0 < root.real < 1:
                    continue
                if (
                    min(abs(cubic(root.real) - self.y[i]), abs(cubic(root.real) - self.y[i + 1]))
                    > least
                ):
                    self._split.add(i)
                    self._around(float(self.x[i]) + float(root.real) * width, i, i + 1)

    def _close_in_on_slopes(self, segment: range) -> None:
        """Closes in on the extrema that slopes of opposite signs enclose."""
        for i in segment[:-1]:
            s0, s1, width = float(self.s[i]), float(self.s[i + 1]), self._width(i)
            if not (math.isfinite(s0) and math.isfinite(s1)) or s0 * s1 >= 0:
                continue
            rounding = self.noise * max(abs(self.y[i]), abs(self.y[i + 1]))
            if width > self.near and width * min(abs(s0), abs(s1)) > rounding:
                self._split.add(i)
                self._around(float(self.x[i]) + width * s0 / (s0 - s1), i, i + 1)

    def _around(self, vertex: float, first: int, last: int) -> None:
        """Wants two points on either side of where an extremum should be, near enough to end it."""
        step = 0.45 * self.near
        for point in (vertex - step, vertex + step):
            if float(self.x[first]) < point < float(self.x[last]):
                self.points.add(point)


def _lagrange(x: _Numbers, at: float) -> _Numbers:
    """The shares of four values in the cubic through them, at a point."""
    shares = np.ones(len(x))
    for j, own in enumerate(x):
        for k, other in enumerate(x):
            if k != j:
                shares[j] *= (at - other) / (own - other)
    return shares


def _valleys(y: _Numbers, noise: float) -> list[tuple[int, int]]:
    """Finds the minima that rounding does not explain, each by the points that enclose it."""
    # A minimum counts where the curve rises from it by more than rounding on both sides; it lies
    # strictly between the nearest points that are so much higher.
    found = []
    lowest = highest = 0
    falling = False
    for i in range(len(y)):
        if y[i] > y[highest]:
            highest = i
        if y[i] < y[lowest]:
            lowest = i
        doubt = 2 * noise * max(abs(y[i]), abs(y[highest]), abs(y[lowest]))
        if not falling and y[highest] - y[i] > doubt:
            falling, lowest = True, i
        elif falling and y[i] - y[lowest] > doubt:
            left = lowest
            while y[left] - y[lowest] <= doubt:
                left -= 1
            found.append((left, i))
            falling, highest = False, i
    return found
