"""Lines, curves and planes in weight space."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from losscli.errors import CheckpointError, UsageError
from losscli.weight_space.vectors import Weights, distance, norm, pieces, working_type

__all__ = [
    "Line",
    "Path",
    "PathKind",
    "Slice",
    "Span",
    "Triangle",
    "check_point_count",
    "grid",
    "path_coefficients",
    "point_between",
]

PathKind = Literal["bezier", "chain"]
"""A Bézier curve, or straight lines from each point to the next."""


# Largest coordinate; products of larger ones with weights overflow float32.
_MAX_COORDINATE = 1e30

# Longest table; a row takes a few hundred bytes.
_MAX_POINTS = 10_000_000

# Three points are collinear if the sine of every angle of their triangle is below this.
_COLLINEAR_SINE = 1e-6

# Nodes of the quadrature of the length of a curve.
_NODES = 200

# Two axes are parallel if the ratio of the eigenvalues of their cosine matrix is below this.
_PARALLEL_RATIO = 1e-12


class Slice(Protocol):
    """An affine family of points in weight space, θ(c) for coordinates c.

    Every tensor of θ(c) is the same linear combination of its values at the ends of the slice, and
    so is every affine function of the tensors. `combine` computes this combination, for weights
    and for the outputs of first layers.
    """

    @property
    def ends(self) -> tuple[Weights, ...]:
        """The moving tensors that span the slice."""

    @property
    def barycentric(self) -> bool:
        """Whether the coefficients sum to one, so that values shared by all ends are unchanged."""

    def combine(
        self, values: Sequence[Tensor], coordinates: Sequence[float], out: Tensor | None = None
    ) -> Tensor:
        """Combines the values at the ends into the value at a point.

        Args:
            values: One tensor per end, all with the same shape and dtype.
            coordinates: Coordinates of the point.
            out: Output tensor with the same shape and dtype; None allocates one.

        Returns:
            The value at the point.
        """


@dataclass(frozen=True)
class Line:
    """θ(α) = A + α (B − A), exact at both ends (Goodfellow et al. 2015, arXiv 1412.6544).

    Attributes:
        a: The moving tensors at α = 0.
        b: The moving tensors at α = 1, with the same names and shapes.
    """

    a: Weights
    b: Weights
    barycentric: ClassVar = True

    @property
    def ends(self) -> tuple[Weights, Weights]:
        """A and B."""
        return self.a, self.b

    def combine(
        self, values: Sequence[Tensor], coordinates: Sequence[float], out: Tensor | None = None
    ) -> Tensor:
        """Combines the values at A and B into the value at α.

        It is computed from the nearer end. It is therefore exact at both ends, and the line from B
        to A is bit for bit the reverse of the line from A to B.

        Returns:
            (1 − α) values[0] + α values[1].
        """
        a, b = values
        (alpha,) = coordinates
        return _lerp(a, b, alpha, out)


@dataclass(frozen=True)
class Triangle:
    """The plane through three points (Garipov et al. 2018, arXiv 1802.10026), exact at all three.

    The axes are orthonormal, so distances in coordinates are distances in weight space.

    Attributes:
        a: The moving tensors at (0, 0).
        b: The moving tensors at (``corner_b``, 0), with the same names and shapes.
        c: The moving tensors at ``corner_c``.
        corner_b: ‖B − A‖.
        corner_c: Coordinates of C: the component of C − A along B − A, and its distance from the
            line through A and B, which is positive.
    """

    a: Weights
    b: Weights
    c: Weights
    corner_b: float
    corner_c: tuple[float, float]
    barycentric: ClassVar = True

    @classmethod
    def through(
        cls, a: Weights, b: Weights, c: Weights, names: Iterable[str] | None = None
    ) -> Self:
        """Constructs the plane through three points.

        Args:
            a: The moving tensors at the origin.
            b: The moving tensors on the first axis, with the same names and shapes.
            c: The moving tensors on the positive side of the first axis.
            names: The tensors that define lengths and angles; all by default. The others use the
                same combinations of the corners.

        Returns:
            The plane.

        Raises:
            CheckpointError: A point has weights that are not finite.
            UsageError: Two points are equal, or the three points are collinear.
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
        for (first, second), edge in edges.items():
            if edge == 0:
                raise UsageError(
                    f"{first} and {second} have the same parameters: two points do not define a "
                    "plane",
                    "Give three different checkpoints",
                )
        b_x = edges["A", "B"]
        c_x = sum(float((y - x).dot(z - x)) for x, y, z in _common_pieces(names, a, b, c)) / b_x
        square = 0.0
        for x, y, z in _common_pieces(names, a, b, c):
            height = (z - x).sub_(y - x, alpha=c_x / b_x)
            square += float(height.dot(height))
        c_y = math.sqrt(square)
        # The largest sine is at the corner between the two shorter edges. A triangle with one short
        # edge is therefore not collinear, independent of the order of its corners.
        shortest, middle, _ = sorted(edges.values())
        if b_x * c_y < _COLLINEAR_SINE * shortest * middle:
            raise UsageError(
                "A, B and C are on one line, which does not define a plane",
                "Give a third checkpoint off the line through the others",
            )
        return cls(a, b, c, b_x, (c_x, c_y))

    @property
    def ends(self) -> tuple[Weights, Weights, Weights]:
        """A, B and C."""
        return self.a, self.b, self.c

    def combine(
        self, values: Sequence[Tensor], coordinates: Sequence[float], out: Tensor | None = None
    ) -> Tensor:
        """Combines the values at A, B and C into the value at (x, y).

        On an edge it equals the line through two corners bit for bit. Elsewhere, two differences
        are added to the corner with the largest coefficient. If two corners are close and their
        coefficients are large and opposite, their difference is small and exact.

        Returns:
            (1 − β − γ) values[0] + β values[1] + γ values[2], where γ = y / ``corner_c[1]`` and
            β = (x − γ ``corner_c[0]``) / ``corner_b``.
        """
        x, y = coordinates
        b_x, (c_x, c_y) = self.corner_b, self.corner_c
        gamma = y / c_y
        beta = (x - gamma * c_x) / b_x
        terms = zip((1 - beta - gamma, beta, gamma), values, strict=True)
        (_, base), (large, middle), (small, last) = sorted(terms, key=lambda term: -abs(term[0]))
        if small == 0:
            return _lerp(base, middle, large, out)
        return _lerp(base, last, small, out).add_(middle - base, alpha=large)

    def project(
        self, weights: Weights, names: Iterable[str] | None = None
    ) -> tuple[float, float, float]:
        """Projects a point orthogonally onto the plane.

        It is computed from the nearest corner, so that the projection of a corner is exact.

        Args:
            weights: The point.
            names: The tensors to use, as in `through`; all moving tensors by default.

        Returns:
            The coordinates x and y of the projection, and the distance from the plane.
        """
        corners = (0.0, 0.0), (self.corner_b, 0.0), self.corner_c
        squares, products = [0.0] * 3, [[0.0, 0.0] for _ in range(3)]
        names = list(self.a) if names is None else list(names)
        for *ends, point in _common_pieces(names, self.a, self.b, self.c, weights):
            axes = self._axes(*ends)
            for i, end in enumerate(ends):
                step = point - end
                squares[i] += float(step.dot(step))
                for k, axis in enumerate(axes):
                    products[i][k] += float(axis.dot(step))
        nearest = squares.index(min(squares))
        dx, dy = products[nearest]
        square = 0.0
        for *ends, point in _common_pieces(names, self.a, self.b, self.c, weights):
            first, second = self._axes(*ends)
            residual = (point - ends[nearest]).sub_(first, alpha=dx).sub_(second, alpha=dy)
            square += float(residual.dot(residual))
        x, y = corners[nearest]
        return x + dx, y + dy, math.sqrt(square)

    def _axes(self, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the orthonormal axes for one piece of the corners."""
        along, height = self.corner_c
        first = (b - a).div_(self.corner_b)
        return first, (c - a).sub_(first, alpha=along).div_(height)


@dataclass(frozen=True)
class Span:
    """The plane θ(x, y) = O + x u + y v, exact at O (Li et al. 2018, arXiv 1712.09913).

    Attributes:
        origin: The moving tensors at (0, 0), O.
        first: The direction of x, with the same names and shapes; not necessarily of length one.
        second: The direction of y; not necessarily orthogonal to ``first``.
    """

    origin: Weights
    first: Weights
    second: Weights
    barycentric: ClassVar = False

    @property
    def ends(self) -> tuple[Weights, Weights, Weights]:
        """O, u and v."""
        return self.origin, self.first, self.second

    def combine(
        self, values: Sequence[Tensor], coordinates: Sequence[float], out: Tensor | None = None
    ) -> Tensor:
        """Combines the values of the origin and the two directions into the value at (x, y).

        Returns:
            values[0] + x values[1] + y values[2].
        """
        origin, first, second = values
        x, y = coordinates
        # A zero coefficient is skipped, not multiplied: −0 + 0 is 0, and 0 · inf is nan.
        if x != 0:
            point = torch.add(origin, first, alpha=x, out=out)
        else:
            point = origin.clone() if out is None else out.copy_(origin)
        return point if y == 0 else point.add_(second, alpha=y)

    def project(
        self, weights: Weights, names: Iterable[str] | None = None
    ) -> tuple[float, float, float]:
        """Projects a point orthogonally onto the plane, for any angle between the axes.

        Args:
            weights: The point.
            names: The tensors to use; all moving tensors by default.

        Returns:
            The coordinates x and y of the projection, and the distance from the plane. If the axes
            are linearly dependent, x and y are the minimum-norm solution.
        """
        gram = torch.zeros(2, 2, dtype=torch.float64)
        products = torch.zeros(2, dtype=torch.float64)
        names = list(self.origin) if names is None else list(names)
        ends = self.ends
        for origin, u, v, point in _common_pieces(names, *ends, weights):
            step, axes = point - origin, (u, v)
            for i in range(2):
                products[i] += float(axes[i].dot(step))
                for k in range(2):
                    gram[i, k] += float(axes[i].dot(axes[k]))
        lengths = gram.diagonal().sqrt()
        lengths = torch.where(lengths > 0, lengths, 1)
        cosines = gram / torch.outer(lengths, lengths)
        inverse = torch.linalg.pinv(cosines, rtol=_PARALLEL_RATIO, hermitian=True)
        x, y = (inverse @ (products / lengths) / lengths).tolist()
        square = 0.0
        for origin, u, v, point in _common_pieces(names, *ends, weights):
            residual = (point - origin).sub_(u, alpha=x).sub_(v, alpha=y)
            square += float(residual.dot(residual))
        return x, y, math.sqrt(square)


@dataclass(frozen=True)
class Path:
    """A path from A over bends to B, exact at both ends (Garipov et al. 2018, arXiv 1802.10026).

    Attributes:
        kind: Its kind.
        ends: The moving tensors at A, at each bend in order, and at B, with the same names and
            shapes.
    """

    kind: PathKind
    ends: tuple[Weights, ...]
    barycentric: ClassVar = True

    def combine(
        self, values: Sequence[Tensor], coordinates: Sequence[float], out: Tensor | None = None
    ) -> Tensor:
        """Combines the values at A, the bends and B into the value at t.

        Differences are added to the value with the largest coefficient, as in `Triangle.combine`.

        Returns:
            Σ w_k values[k] with the coefficients w of `path_coefficients`.
        """
        coefficients = path_coefficients(self.kind, len(values), *coordinates)
        terms = [(w, value) for w, value in zip(coefficients, values, strict=True) if w]
        (_, base), *others = sorted(terms, key=lambda term: -abs(term[0]))
        if not others:
            return _lerp(base, base, 0.0, out)
        *middle, (small, last) = others
        point = _lerp(base, last, small, out)
        for coefficient, value in middle:
            point.add_(value - base, alpha=coefficient)
        return point

    def length(self, names: Iterable[str]) -> float:
        """Computes the length ∫ ‖dφ/dt‖ dt.

        Args:
            names: The tensors to use.

        Returns:
            The sum of the lengths of a chain. For a Bézier curve, Gauss-Legendre quadrature: the
            integrand is smooth but where the curve turns back at a point.
        """
        number = len(self.ends) - 1
        gram = np.zeros((number, number))
        for parts in _common_pieces(names, *self.ends):
            steps = torch.stack([y - x for x, y in itertools.pairwise(parts)]).reshape(number, -1)
            gram += (steps @ steps.T).cpu().numpy()
        if self.kind == "chain":
            return float(np.sqrt(np.diag(gram)).sum())
        nodes, weights = np.polynomial.legendre.leggauss(_NODES)
        basis = [path_coefficients("bezier", number, (1 + node) / 2) for node in nodes]
        squares = np.einsum("pi,ij,pj->p", basis, gram, basis)
        return float(number * (weights / 2 * np.sqrt(np.maximum(squares, 0))).sum())


def path_coefficients(kind: PathKind, number: int, t: float) -> list[float]:
    """Returns the coefficients of the points that determine a path.

    Args:
        kind: The kind of the path.
        number: The number of points: the two ends and the bends.
        t: The position on the path: 0 at the first point, 1 at the last.

    Returns:
        w with sum 1: for a Bézier curve the Bernstein polynomials binom(n, k) t^k (1 − t)^(n−k),
        n = number − 1; for a chain those of the straight line between two points.
    """
    degree = number - 1
    if kind == "bezier":
        return [math.comb(degree, k) * t**k * (1 - t) ** (degree - k) for k in range(number)]
    segment = min(int(t * degree), degree - 1)
    along = t * degree - segment
    coefficients = [0.0] * number
    coefficients[segment : segment + 2] = 1 - along, along
    return coefficients


def point_between(a: Weights, b: Weights, names: Iterable[str], alpha: float) -> Weights:
    """Returns all tensors of a point of the line through two points.

    Args:
        a: All tensors of the first point.
        b: All tensors of the second point.
        names: The tensors that move; the others are taken from ``a``.
        alpha: The point, 0 for ``a`` and 1 for ``b``.
    """
    line = Line({}, {})
    dtypes = {n: working_type(a[n], b[n]) for n in names if not torch.equal(a[n], b[n])}
    return {**a} | {n: line.combine([a[n].to(t), b[n].to(t)], (alpha,)) for n, t in dtypes.items()}


def grid(points: int, low: float, high: float, *, include: Sequence[float] = ()) -> list[float]:
    """Returns evenly spaced coordinates.

    Args:
        points: Number of points.
        low: First coordinate.
        high: Last coordinate.
        include: Further coordinates to add if they lie in the range.

    Returns:
        The coordinates in ascending order, each correctly rounded: a step of 1/20 gives 0.15, not
        0.15000000000000002.

    Raises:
        UsageError: ``points`` is below 1, or the range is empty, reversed or not finite.
    """
    if points < 1:
        raise UsageError(f"--points {points} leaves nothing to evaluate", "Give 1 or more")
    check_point_count("--points", points, points)
    try:
        first, last = Fraction(repr(float(low))), Fraction(repr(float(high)))
    except ValueError:
        raise UsageError(f"--range {low} {high} is not finite", "Give two numbers") from None
    if max(abs(first), abs(last)) > _MAX_COORDINATE:
        raise UsageError(f"--range {low} {high} is beyond what float32 can hold")
    if first >= last:
        raise UsageError(
            f"--range {low} {high} is {'empty' if first == last else 'reversed'}",
            "Give the lower end first",
        )
    step = (last - first) / max(points - 1, 1)
    # Integers over a common denominator: their division is correctly rounded, and faster than
    # fractions.
    denominator = math.lcm(first.denominator, step.denominator)
    start, stride = int(first * denominator), int(step * denominator)
    even = {(start + i * stride) / denominator for i in range(points)}
    return sorted(even | {float(x) for x in include if low <= x <= high})


def check_point_count(option: str, value: int, points: int) -> None:
    """Checks that ``option`` with a value gives a table of at most ten million points.

    Raises:
        UsageError: The table has too many points.
    """
    if points > _MAX_POINTS:
        raise UsageError(
            f"{option} {value} gives more than {_MAX_POINTS} points, and each takes a row in "
            "memory",
            "Give fewer",
        )


def _lerp(a: Tensor, b: Tensor, alpha: float, out: Tensor | None) -> Tensor:
    """Computes (1 − α) a + α b from the nearer end."""
    if alpha > 0.5:
        a, b, alpha = b, a, 1 - alpha
    if alpha == 0:
        return a.clone() if out is None else out.copy_(a)
    if alpha == 0.5:
        # Both ends are equally near; this formula is symmetric.
        return torch.mul(a, 0.5, out=out).add_(b, alpha=0.5)
    return torch.lerp(a, b, alpha, out=out)


def _common_pieces(names: Iterable[str], *points: Weights) -> Iterator[tuple[Tensor, ...]]:
    """Yields the same piece of each point in float64, over all given names."""
    for name in names:
        yield from pieces(*(point[name] for point in points))
