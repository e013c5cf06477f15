"""Where a plane lies in weight space, where the checkpoints are on it, and which part is evaluated.

A plane goes through three checkpoints, or along two directions from one: random ones, principal
components of a path, or eigenvectors of the Hessian.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from losscli.errors import CheckpointError, ModelError, UsageError
from losscli.results.summaries import Derivative, PlaneAxis
from losscli.studies.problem import Problem, differing_tensors, require_finite
from losscli.weight_space.directions import normalisation_parameters, random_directions
from losscli.weight_space.slices import Span, Triangle, grid
from losscli.weight_space.trajectory import principal_axes
from losscli.weight_space.vectors import Weights, distance

__all__ = [
    "Layout",
    "Spanned",
    "curvature_radii",
    "span_eigenvectors",
    "span_plane",
    "with_margin",
]

# The margin around the checkpoints, as a share of their bounding box.
_MARGIN = 0.25

# Farther out, products with weights leave the range of float32.
_FAR = 1e29

# The change of the loss by the curvature at the edge of a plane along eigenvectors, as a share.
_CHANGE = 0.1

# The smallest reach of a plane along eigenvectors, as a share of the norm of the parameters.
_NEAREST = 1e-3

# Minimum ratio of the height of the box to its width, so that no figure becomes a thin strip.
_THINNEST = 0.2


@dataclass(frozen=True)
class Spanned:
    """A plane and what its axes are.

    Attributes:
        slice_: The plane, its tensors where the checkpoints are.
        axes: What the axes are.
        shares: Of a path, the share of the variance of each principal component, in descending
            order.
    """

    slice_: Triangle | Span
    axes: tuple[PlaneAxis, PlaneAxis]
    shares: tuple[float, ...] = ()

    def combine(self, point: Sequence[float], dtype: torch.dtype) -> Weights:
        """Computes the tensors that move at a point, in ``dtype`` or the wider type of a tensor."""
        ends = self.slice_.ends
        return {
            name: self.slice_.combine(
                [end[name].to(torch.promote_types(end[name].dtype, dtype)) for end in ends], point
            )
            for name in ends[0]
        }


@dataclass(frozen=True)
class Layout:
    """A plane with the checkpoints and the grid on it.

    Attributes:
        spanned: The plane.
        places: Of each checkpoint its x, its y and its distance from the plane.
        xs: The values of x, in ascending order.
        ys: The values of y, in ascending order.
    """

    spanned: Spanned
    places: tuple[tuple[float, float, float], ...]
    xs: tuple[float, ...]
    ys: tuple[float, ...]

    @classmethod
    def of(
        cls,
        problem: Problem,
        spanned: Spanned,
        points: int,
        range_: tuple[float, float] | None,
        reach: tuple[float, float],
    ) -> Layout:
        """Places the checkpoints and the grid on a plane.

        Args:
            problem: The checkpoints.
            spanned: The plane.
            points: Values of each coordinate.
            range_: The lowest and the highest value of both coordinates; None for a box that holds
                the checkpoints and a margin.
            reach: How far the box reaches in x and in y, at least, from checkpoints on one point.

        Returns:
            The layout.

        Raises:
            CheckpointError: A checkpoint is too far away, or not finite.
        """
        places = tuple(_place(problem, spanned.slice_, t) for t, _ in enumerate(problem.names))
        if range_ is not None:
            values = tuple(grid(points, *range_))
            return cls(spanned, places, values, values)
        if max(abs(value) for place in places for value in place) > _FAR:
            raise CheckpointError(
                "the checkpoints lie too far apart for a plane that float32 can hold",
                "Look at the weights with losscli inspect",
            )
        boxes = [(min(values), max(values)) for values in list(zip(*places, strict=True))[:2]]
        widest = max(high - low for low, high in boxes)
        spanning = {place[:2] for place in places[: len(problem.spanning)]}
        grids = []
        for axis, ((low, high), most) in enumerate(zip(boxes, reach, strict=True)):
            if len(spanning) == 1:
                (point,) = spanning
                margin = _MARGIN * (high - low)
                ends = min(low - margin, point[axis] - most), max(high + margin, point[axis] + most)
            else:
                ends = with_margin(low, high, widest)
            grids.append(tuple(grid(points, *map(_short, ends))))
        return cls(spanned, places, grids[0], grids[1])

    @property
    def points(self) -> list[tuple[float, float]]:
        """The points of the grid, row by row."""
        return [(x, y) for y in self.ys for x in self.xs]


def span_plane(problem: Problem, *, pca: bool) -> Spanned:
    """Spans the plane that the checkpoints determine.

    Args:
        problem: The checkpoints: one, three, or with ``pca`` a path.
        pca: Whether they are a path.

    Returns:
        The plane.

    Raises:
        LosscliError: No plane is determined by the checkpoints.
    """
    if len(problem.spanning) == 1:
        return _random(problem)
    moving = differing_tensors(problem)
    counted = problem.parameters(moving)
    if moving and not counted:
        raise UsageError(
            "the checkpoints differ only in buffers: no plane of parameters is determined by them",
            "Compare two of them with losscli interpolate",
        )
    if pca:
        return _principal(problem, moving, counted)
    a, b, c = (_select(problem.open(t).weights, moving) for t in (0, 1, 2))
    axes = _axis("along B − A"), _axis("at right angles to B − A")
    return Spanned(Triangle.through(a, b, c, counted), axes)


def span_eigenvectors(
    problem: Problem,
    moving: Sequence[str],
    vectors: Sequence[Weights],
    described: Sequence[Derivative],
) -> Spanned:
    """Spans the plane along two eigenvectors of the Hessian at the first checkpoint.

    Args:
        problem: The checkpoint.
        moving: The parameters that are differentiated.
        vectors: The eigenvectors of λ_max and λ_min, of length one, by parameters.
        described: Their eigenvalues.

    Returns:
        The plane.

    Raises:
        ModelError: The eigenvalues are not finite, or both are zero within their errors.
    """
    if not all(math.isfinite(d["eigenvalue"]) for d in described):
        raise ModelError(
            f"the Hessian at {problem.names[0]} is not finite", "Give another checkpoint"
        )
    if all(abs(d["eigenvalue"]) <= d["error"] for d in described):
        raise ModelError(
            f"the Hessian at {problem.names[0]} is zero within rounding, so it has no directions "
            "of curvature",
            "Leave --axes out for random directions",
        )
    axes: list[PlaneAxis] = [
        {
            "name": f"along the eigenvector of {name}",
            "explained_variance": None,
            "eigenvalue": found["eigenvalue"],
            "error": found["error"],
            "converged": found["converged"],
        }
        for name, found in zip(("λ_max", "λ_min"), described, strict=True)
    ]
    slice_ = Span(_select(problem.origin, moving), *vectors)
    return Spanned(slice_, (axes[0], axes[1]))


def curvature_radii(axes: Sequence[PlaneAxis], loss: float, size: float) -> tuple[float, float]:
    """Returns how far the plane along eigenvectors reaches by default, in each direction.

    √(0.2 |L| / |λ|), where the curvature alone changes the loss L by a tenth of it: near enough for
    the quadratic model, and curvatures of very different sizes are both visible. But between
    0.001 ‖θ‖ and ‖θ‖.

    Args:
        axes: The axes, with their eigenvalues λ.
        loss: L, the loss at the checkpoint.
        size: ‖θ‖, the norm of the parameters; 1 is taken instead of 0.

    Returns:
        The largest x and the largest y.
    """
    size = size or 1.0
    first, second = (
        max(
            _NEAREST * size, min(size, math.sqrt(2 * _CHANGE * abs(loss) / abs(axis["eigenvalue"])))
        )
        if axis["eigenvalue"]
        else size
        for axis in axes
    )
    return first, second


def with_margin(low: float, high: float, widest: float) -> tuple[float, float]:
    """Returns a range with a margin around the points of a plane.

    Args:
        low: Their lowest coordinate.
        high: Their highest coordinate.
        widest: The larger extent of both coordinates.

    Returns:
        The lowest and the highest value.
    """
    half = (0.5 + _MARGIN) * max(high - low, _THINNEST * widest)
    return (low + high) / 2 - half, (low + high) / 2 + half


def _axis(name: str, explained: float | None = None) -> PlaneAxis:
    return {"name": name, "explained_variance": explained}


def _select(weights: Weights, names: Sequence[str]) -> Weights:
    return {name: weights[name] for name in names}


def _random(problem: Problem) -> Spanned:
    """Spans the plane along two random directions."""
    still = normalisation_parameters(problem.objective.model).union(problem.buffers)
    weights = problem.first.weights
    u, v = random_directions(weights, problem.moving, still, problem.settings.seed)
    names = [name for name in problem.moving if u[name].any() or v[name].any()]
    axes = _axis("random direction 1"), _axis("random direction 2")
    return Spanned(Span(*(_select(end, names) for end in (weights, u, v))), axes)


def _principal(problem: Problem, moving: Sequence[str], counted: Sequence[str]) -> Spanned:
    """Spans the plane of the first two principal components of a path."""
    along = [name for name in moving if name not in counted]
    number = len(problem.spanning)
    directions, shares = principal_axes(
        lambda t: problem.open(t).weights, number, counted, along, problem.working_type
    )
    axes = (
        _axis("principal component 1", shares[0]),
        _axis("principal component 2", shares[1]),
    )
    return Spanned(Span(_select(problem.last.weights, moving), *directions), axes, shares)


def _place(problem: Problem, slice_: Triangle | Span, t: int) -> tuple[float, float, float]:
    """Returns the x and the y of a checkpoint, and its distance from the plane.

    The distance is over all parameters that may move, also those that the plane does not move.
    """
    weights, origin = problem.open(t).weights, slice_.ends[0]
    counted = problem.parameters(origin)
    rest: list[str] = []
    if t >= len(problem.spanning):
        # The tensors that do not span the plane are equal in all checkpoints that span it.
        first = problem.first.weights
        rest = [
            name
            for name in problem.parameters(problem.moving)
            if name not in origin and not torch.equal(first[name], weights[name])
        ]
        require_finite(problem.names[t], weights, [*counted, *rest])
    x, y, off = slice_.project(weights, counted)
    return x, y, math.hypot(off, distance(problem.first.weights, weights, rest)) if rest else off


def _short(value: float) -> float:
    """Rounds a default value to a few significant digits."""
    return float(f"{value:.4g}")
