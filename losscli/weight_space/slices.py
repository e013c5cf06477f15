"""Lines and planes through weight space: points as coordinates on axes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol, Self

import torch
from torch import Tensor

from losscli.errors import CheckpointError, UsageError
from losscli.weight_space.vectors import Weights, distance, equal, norm, pieces, working_type

__all__ = ["Line", "Slice", "Span", "Triangle", "grid", "midpoint", "require_room"]


# Farther out, products with weights leave the range of float32.
_FAR = 1e30

# A row of a table takes some hundred bytes.
_MOST_POINTS = 10_000_000

# Three points are on a line if the sine of each angle between them is under this.
_FLAT = 1e-6

# Two axes are parallel if the least eigenvalue of their cosines is under this share of the largest.
_PARALLEL = 1e-12


class Slice(Protocol):
    """An affine family of points in weight space, θ(c) for coordinates c.

    Every tensor of θ(c), and so everything that is affine in the tensors of θ(c), is one and the
    same combination of its values at the slice's ends. `combine` is that combination; it serves
    the weights and the outputs of first layers alike.
    """

    @property
    def ends(self) -> tuple[Weights, ...]:
        """The moving tensors that span the slice."""

    @property
    def barycentric(self) -> bool:
        """Whether the combination's coefficients sum to one: what all ends share stays as it is."""

    def combine(
        self, values: Sequence[Tensor], coordinates: Sequence[float], out: Tensor | None = None
    ) -> Tensor:
        """Combines the values at the ends into the value at a point.

        Args:
            values: One tensor for each end, all of one shape and type.
            coordinates: The point.
            out: Where to write the result, of the same shape and type.

        Returns:
            The value at the point.
        """


@dataclass(frozen=True)
class Line:
    """θ(α) = A + α (B − A), exact at both ends (Goodfellow et al. 2015, arXiv 1412.6544).

    Attributes:
        a: The moving tensors at α = 0.
        b: Those at α = 1, of the same names and shapes.
    """

    a: Weights
    b: Weights

    @property
    def ends(self) -> tuple[Weights, Weights]:
        """A and B."""
        return self.a, self.b

    @property
    def barycentric(self) -> bool:
        """Its coefficients are 1 − α and α."""
        return True

    def combine(
        self, values: Sequence[Tensor], coordinates: Sequence[float], out: Tensor | None = None
    ) -> Tensor:
        """Combines the values at A and B into the value at α.

        It works from the nearer end. That makes it exact at both, whatever they hold, and makes
        the line from B to A the mirror of the line from A to B, to the last bit.

        Args:
            values: The value at A and the value at B.
            coordinates: α.
            out: Where to write the result.

        Returns:
            (1 − α) values[0] + α values[1].
        """
        a, b = values
        (alpha,) = coordinates
        return _between(a, b, alpha, out)


@dataclass(frozen=True)
class Triangle:
    """The plane through three points (Garipov et al. 2018, arXiv 1802.10026), exact at all three.

    Its axes are orthonormal: a step of one in a coordinate is a step of one in weight space.

    Attributes:
        a: The moving tensors at (0, 0).
        b: Those at (``corner_b``, 0), of the same names and shapes.
        c: Those at ``corner_c``.
        corner_b: ‖B − A‖.
        corner_c: How far C lies from A along B − A, and how far off it, which is above 0.
    """

    a: Weights
    b: Weights
    c: Weights
    corner_b: float
    corner_c: tuple[float, float]

    @classmethod
    def through(
        cls, a: Weights, b: Weights, c: Weights, names: Iterable[str] | None = None
    ) -> Self:
        """Lays the plane through three points.

        Args:
            a: The moving tensors at the origin.
            b: Those that the first axis points to, of the same names and shapes.
            c: Those that the second axis leans to.
            names: Which of them count in lengths and angles; all by default. The others follow
                the same combinations of the corners.

        Returns:
            The plane.

        Raises:
            CheckpointError: A point has weights that are not finite.
            UsageError: Two of the points are equal, or the three are on a line.
        """
        names = list(a) if names is None else list(names)
        corners = {"A": a, "B": b, "C": c}
        edges = {(x, y): distance(corners[x], corners[y], names) for x, y in ("AB", "AC", "BC")}
        if not math.isfinite(sum(edges.values())):
            wrong = [x for x, w in corners.items() if not math.isfinite(norm(w, names))]
            raise CheckpointError(
                f"{' and '.join(wrong)} has weights that are infinite or not a number",
                "Give a checkpoint from before the training failed",
            )
        for (one, other), edge in edges.items():
            if edge == 0:
                raise UsageError(
                    f"{one} and {other} have the same parameters: two points determine no plane",
                    "Give three different checkpoints",
                )
        b_x = edges["A", "B"]
        c_x = sum(float((y - x).dot(z - x)) for x, y, z in _stretches(names, a, b, c)) / b_x
        square = 0.0
        for x, y, z in _stretches(names, a, b, c):
            height = (z - x).sub_(y - x, alpha=c_x / b_x)
            square += float(height.dot(height))
        c_y = math.sqrt(square)
        # The largest sine is at the corner between the two shorter edges. By that measure a
        # triangle with one short edge is no line, whichever of its corners comes first.
        short, middle, _ = sorted(edges.values())
        if b_x * c_y < _FLAT * short * middle:
            raise UsageError(
                "A, B and C are on one line, and no plane is determined by a line",
                "Give a third checkpoint off the line through the others",
            )
        return cls(a, b, c, b_x, (c_x, c_y))

    @property
    def ends(self) -> tuple[Weights, Weights, Weights]:
        """A, B and C."""
        return self.a, self.b, self.c

    @property
    def barycentric(self) -> bool:
        """Its coefficients are the barycentric coordinates."""
        return True

    def combine(
        self, values: Sequence[Tensor], coordinates: Sequence[float], out: Tensor | None = None
    ) -> Tensor:
        """Combines the values at A, B and C into the value at (x, y).

        On an edge it is the line through two corners, to the last bit. Elsewhere two differences
        are added to the corner of the largest coefficient. So where a corner is near another, and
        the coefficients of the two are large and opposite, their difference is small, and exact.

        Args:
            values: The values at A, B and C.
            coordinates: x and y.
            out: Where to write the result.

        Returns:
            (1 − β − γ) values[0] + β values[1] + γ values[2], where γ = y / ``corner_c[1]`` and
            β = (x − γ ``corner_c[0]``) / ``corner_b``.
        """
        x, y = coordinates
        b_x, (c_x, c_y) = self.corner_b, self.corner_c
        gamma = y / c_y
        beta = (x - gamma * c_x) / b_x
        shares = 1 - beta - gamma, beta, gamma
        corners = sorted(zip(shares, values, strict=True), key=lambda corner: -abs(corner[0]))
        (_, base), (share, other), (least, last) = corners
        if least == 0:
            return _between(base, other, share, out)
        return _between(base, last, least, out).add_(other - base, alpha=share)

    def project(
        self, weights: Weights, names: Iterable[str] | None = None
    ) -> tuple[float, float, float]:
        """Projects a point onto the plane, orthogonally.

        It works from the nearest corner, so that a corner is projected onto itself exactly.

        Args:
            weights: The point.
            names: The tensors that count, those that counted in `through`; all that the plane
                moves by default.

        Returns:
            The x and y of its projection, and its distance from the plane.
        """
        corners = (0.0, 0.0), (self.corner_b, 0.0), self.corner_c
        squares, along = [0.0] * 3, [[0.0, 0.0] for _ in range(3)]
        names = list(self.a) if names is None else list(names)
        for *ends, point in _stretches(names, self.a, self.b, self.c, weights):
            axes = self._axes(*ends)
            for i, end in enumerate(ends):
                step = point - end
                squares[i] += float(step.dot(step))
                for k, axis in enumerate(axes):
                    along[i][k] += float(axis.dot(step))
        nearest = squares.index(min(squares))
        dx, dy = along[nearest]
        square = 0.0
        for *ends, point in _stretches(names, self.a, self.b, self.c, weights):
            first, second = self._axes(*ends)
            rest = (point - ends[nearest]).sub_(first, alpha=dx).sub_(second, alpha=dy)
            square += float(rest.dot(rest))
        x, y = corners[nearest]
        return x + dx, y + dy, math.sqrt(square)

    def _axes(self, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """The orthonormal axes, from a stretch of the corners."""
        along, height = self.corner_c
        first = (b - a).div_(self.corner_b)
        return first, (c - a).sub_(first, alpha=along).div_(height)


@dataclass(frozen=True)
class Span:
    """The plane θ(x, y) = O + x u + y v, exact at O (Li et al. 2018, arXiv 1712.09913).

    Attributes:
        origin: The moving tensors at (0, 0), O.
        first: The direction of x, of the same names and shapes; it need not be of length one.
        second: The direction of y; it need not be orthogonal to the first.
    """

    origin: Weights
    first: Weights
    second: Weights

    @property
    def ends(self) -> tuple[Weights, Weights, Weights]:
        """O, u and v."""
        return self.origin, self.first, self.second

    @property
    def barycentric(self) -> bool:
        """Its coefficients are 1, x and y."""
        return False

    def combine(
        self, values: Sequence[Tensor], coordinates: Sequence[float], out: Tensor | None = None
    ) -> Tensor:
        """Combines the values at the origin and of the two directions into the value at (x, y).

        Args:
            values: The values of O, u and v.
            coordinates: x and y.
            out: Where to write the result.

        Returns:
            values[0] + x values[1] + y values[2].
        """
        origin, first, second = values
        x, y = coordinates
        # Adding nothing is not the same as adding zero times a direction: −0 + 0 is 0.
        if x != 0:
            point = torch.add(origin, first, alpha=x, out=out)
        else:
            point = origin.clone() if out is None else out.copy_(origin)
        return point if y == 0 else point.add_(second, alpha=y)

    def project(
        self, weights: Weights, names: Iterable[str] | None = None
    ) -> tuple[float, float, float]:
        """Projects a point onto the plane, orthogonally, whatever the angle between the axes.

        Args:
            weights: The point.
            names: The tensors that count; all that the plane moves by default.

        Returns:
            The x and y of its projection, and its distance from the plane. Where the axes span no
            plane, such as where one is zero, the x and y nearest to zero.
        """
        gram = torch.zeros(2, 2, dtype=torch.float64)
        along = torch.zeros(2, dtype=torch.float64)
        names = list(self.origin) if names is None else list(names)
        ends = self.ends
        for origin, u, v, point in _stretches(names, *ends, weights):
            step, axes = point - origin, (u, v)
            for i in range(2):
                along[i] += float(axes[i].dot(step))
                for k in range(2):
                    gram[i, k] += float(axes[i].dot(axes[k]))
        lengths = gram.diagonal().sqrt()
        lengths = torch.where(lengths > 0, lengths, 1)
        cosines = gram / torch.outer(lengths, lengths)
        solve = torch.linalg.pinv(cosines, rtol=_PARALLEL, hermitian=True)
        x, y = (solve @ (along / lengths) / lengths).tolist()
        square = 0.0
        for origin, u, v, point in _stretches(names, *ends, weights):
            rest = (point - origin).sub_(u, alpha=x).sub_(v, alpha=y)
            square += float(rest.dot(rest))
        return x, y, math.sqrt(square)


def midpoint(a: Weights, b: Weights, names: Iterable[str]) -> Weights:
    """Returns the point in the middle of two.

    Args:
        a: All tensors of the one point.
        b: All tensors of the other point.
        names: The tensors that move; the others are those of ``a``.

    Returns:
        All tensors of the point.
    """
    line = Line({}, {})
    wide = {name: working_type(a[name], b[name]) for name in names if not equal(a[name], b[name])}
    return {**a} | {n: line.combine([a[n].to(w), b[n].to(w)], (0.5,)) for n, w in wide.items()}


def grid(points: int, low: float, high: float, *, include: Sequence[float] = ()) -> list[float]:
    """Spaces coordinates evenly.

    Args:
        points: How many.
        low: The first.
        high: The last.
        include: Values to have among them, where they lie in the range, beside the even ones.

    Returns:
        The coordinates in rising order, each the float nearest to its exact value, so that a step
        of a twentieth gives 0.15 and not 0.15000000000000002.

    Raises:
        UsageError: There are no points, or the range is empty, reversed or not finite.
    """
    if points < 1:
        raise UsageError(f"--points {points} leaves nothing to evaluate", "Give 1 or more")
    require_room("--points", points, points)
    try:
        first, last = Fraction(repr(float(low))), Fraction(repr(float(high)))
    except ValueError:
        raise UsageError(f"--range {low} {high} is not finite", "Give two numbers") from None
    if max(abs(first), abs(last)) > _FAR:
        raise UsageError(f"--range {low} {high} is beyond what float32 can hold")
    if first >= last:
        raise UsageError(
            f"--range {low} {high} is {'empty' if first == last else 'reversed'}",
            "Give the lower end first",
        )
    step = (last - first) / max(points - 1, 1)
    # Over one denominator, since a division of whole numbers is rounded once, too, and is faster.
    below = math.lcm(first.denominator, step.denominator)
    start, stride = int(first * below), int(step * below)
    even = {(start + i * stride) / below for i in range(points)}
    return sorted(even | {float(x) for x in include if low <= x <= high})


def require_room(option: str, value: int, points: int) -> None:
    """Makes sure that a table is not longer than any memory and any patience.

    Args:
        option: What decides how long it is.
        value: What was given.
        points: How many points it has then.

    Raises:
        UsageError: It has too many.
    """
    if points > _MOST_POINTS:
        raise UsageError(
            f"{option} {value} makes more than {_MOST_POINTS} points, and each has its row in "
            "memory",
            "Give fewer",
        )


def _between(a: Tensor, b: Tensor, alpha: float, out: Tensor | None) -> Tensor:
    """Computes (1 − α) a + α b from the nearer end."""
    if alpha > 0.5:
        a, b, alpha = b, a, 1 - alpha
    if alpha == 0:
        return a.clone() if out is None else out.copy_(a)
    if alpha == 0.5:
        # Both ends are as near, and neither may come first.
        return torch.mul(a, 0.5, out=out).add_(b, alpha=0.5)
    return torch.lerp(a, b, alpha, out=out)


def _stretches(names: Iterable[str], *points: Weights) -> Iterator[tuple[Tensor, ...]]:
    """Yields the same stretch of each point, in float64, over some names."""
    for name in names:
        yield from pieces(*(point[name] for point in points))
