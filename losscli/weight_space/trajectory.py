"""Training paths through weight space, measured relative to the line between their ends.

A path may hold more checkpoints than fit in memory. They are opened one at a time, and at most
three of them are in use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from losscli.errors import CheckpointError, UsageError
from losscli.weight_space.slices import Line
from losscli.weight_space.vectors import (
    Part,
    Weights,
    dimension,
    distance,
    divide,
    flatten_real,
    norm,
    pieces,
    working_type,
)

__all__ = ["Opener", "Path", "measure", "principal_axes", "random_walks", "ribbon"]

Opener = Callable[[int], Weights]
"""Opens the checkpoint of a step, for example by mapping its file into memory."""

_Matrix = NDArray[np.float64]

# Relative rounding error of a sum of many float64 numbers.
_ROUNDING = 2.0**-43

# Size in bytes of a float64 block of weights over all checkpoints.
_BLOCK_BYTES = 256 << 20


@dataclass(frozen=True)
class Path:
    """Geometry of a path θ_0 … θ_n relative to the line between its ends, d = θ_n − θ_0.

    Attributes:
        projection: p_t = ⟨θ_t − θ_0, d⟩ / ‖d‖², which is 0 at the first step and 1 at the last.
        residual: r_t = ‖θ_t − θ_0 − p_t d‖; 0 if only rounding separates θ_t from the line.
        distance: ‖θ_t − θ_0‖.
        turn: The angle between the residuals of t and t − 1, in degrees; None if one of the two
            is zero.
        steps: ‖θ_t − θ_{t−1}‖ for t ≥ 1.
        length: ‖d‖.
    """

    projection: tuple[float, ...]
    residual: tuple[float, ...]
    distance: tuple[float, ...]
    turn: tuple[float | None, ...]
    steps: tuple[float, ...]
    length: float


def measure(open_: Opener, count: int, names: Sequence[str]) -> Path:
    """Measures a training path.

    Each checkpoint is opened twice and read twice each time.

    Args:
        open_: Opens the checkpoint of a step.
        count: Number of checkpoints, n + 1.
        names: The parameters that move, without buffers.

    Returns:
        The path. The error of a turn is about 10⁻¹⁵ radians times step · distance / residual²,
        with the distance from the nearer end, and the square root of that near 0 and 180 degrees.

    Raises:
        CheckpointError: A checkpoint has weights that are not finite.
        UsageError: There are fewer than three checkpoints, or the first and the last are equal.
    """
    _require_three(count)
    projection, residual, distances, length = _coordinates(open_, count, names)
    steps, turn = _turns(open_, projection, residual, length, names)
    return Path(
        tuple(projection), tuple(residual), tuple(distances), tuple(turn), tuple(steps), length
    )


def _coordinates(
    open_: Opener, count: int, names: Sequence[str]
) -> tuple[list[float], list[float], list[float], float]:
    """Computes projections, residuals, distances and ‖d‖; three checkpoints are in use."""
    first, last = open_(0), open_(count - 1)
    norms = norm(first, names), norm(last, names)
    _require_finite(norms[0], 0)
    _require_finite(norms[1], count - 1)
    length = distance(first, last, names)
    if length == 0:
        raise UsageError(
            "the first and the last checkpoint have the same parameters: there is no straight line "
            "between them",
            "Give a path that ends elsewhere",
        )
    # Upper bound on the change of a projection if every weight changes by its own size.
    spread = sum(norms) / length
    projection, residual, distances = [0.0], [0.0], [0.0]
    for t in range(1, count - 1):
        p, r, x = _project(first, last, open_(t), length, spread, names)
        _require_finite(x, t)
        projection.append(p)
        residual.append(r)
        distances.append(x)
    return [*projection, 1.0], [*residual, 0.0], [*distances, length], length


def _project(
    first: Weights,
    last: Weights,
    point: Weights,
    length: float,
    spread: float,
    names: Sequence[str],
) -> tuple[float, float, float]:
    """Returns the projection, the residual and the distance from the first checkpoint."""
    from_first = from_last = square = 0.0
    for name in names:
        for a, b, x in pieces(first[name], last[name], point[name]):
            d, step = b - a, x - a
            from_first += float(step.dot(d))
            from_last += float((x - b).dot(d))
            square += float(step.dot(step))
    # Measured from the nearer end, so that the ends themselves are exact.
    near_last = from_first > -from_last
    share = (from_last if near_last else from_first) / length**2
    rest_square, off_line = 0.0, False
    for name in names:
        tensors = first[name], last[name], point[name]
        unit = _rounding(*tensors)
        for a, b, x in pieces(*tensors):
            d = b - a
            rest = (x - (b if near_last else a)).sub_(d, alpha=share)
            rest_square += float(rest.dot(rest))
            # Upper bound on the distance of each weight from the line for a point on the line that
            # was rounded to its storage dtype: the rounding of the weight itself, and the rounding
            # of all weights through the projection. Such a residual has no direction.
            if not off_line:
                size = a.abs() + b.abs() + x.abs() + spread * d.abs()
                off_line = bool((rest.abs() > unit * size).any())
    residual = math.sqrt(rest_square) if off_line else 0.0
    return (1 + share if near_last else share), residual, math.sqrt(square)


def _turns(
    open_: Opener,
    projection: Sequence[float],
    residual: Sequence[float],
    length: float,
    names: Sequence[str],
) -> tuple[list[float], list[float | None]]:
    """Computes the lengths of the steps and the turns between consecutive checkpoints."""
    steps: list[float] = []
    turns: list[float | None] = [None]
    current = open_(0)
    for t in range(1, len(projection)):
        # This releases checkpoint t − 2 before checkpoint t is opened.
        previous = current
        current = open_(t)
        steps.append(distance(previous, current, names))
        along = abs(projection[t] - projection[t - 1]) * length
        turns.append(_turn(residual[t - 1], residual[t], steps[-1], along))
    return steps, turns


def _turn(r: float, s: float, step: float, along: float) -> float | None:
    """Computes the angle between two residuals from their lengths and the step between them."""
    # The residual vectors would need four checkpoints: their own two and both ends. Instead, the
    # residuals and the component of the step orthogonal to d form a triangle, and its sides give
    # the angle by tan² φ/2 = (1 − cos φ) / (1 + cos φ), which is accurate for small angles.
    if r == 0 or s == 0:
        return None
    square = (step - along) * (step + along)
    near, far = square - (r - s) ** 2, (r + s) ** 2 - square
    return math.degrees(2 * math.atan2(math.sqrt(max(0.0, near)), math.sqrt(max(0.0, far))))


def ribbon(
    open_: Opener,
    path: Path,
    t: int,
    names: Sequence[str],
    reach: float,
    dtype: torch.dtype = torch.float32,
) -> Line | None:
    """Returns the line across a path at step t, θ_0 + p_t d + b v_t for 0 ≤ b ≤ reach.

    Args:
        open_: Opens the checkpoint of a step.
        path: The geometry of the path, from `measure`.
        t: The step.
        names: The tensors that move: the measured parameters, and buffers, which use the same
            combination of the checkpoints.
        reach: The largest b.
        dtype: Minimum precision of the tensors; each end is computed in float64 and rounded once.

    Returns:
        The line, with α = b / reach. The foot θ_0 + p_t d is at α = 0, and the checkpoint at
        b = r_t. If r_t = 0, the foot is the checkpoint, and the direction v_t is that of the
        nearest step with a residual, the earlier one in case of a tie. None if no step has a
        residual: a straight path has no second direction.
    """
    bent = [s for s, r in enumerate(path.residual) if r > 0]
    if not bent:
        return None
    source = min(bent, key=lambda s: (abs(s - t), s))
    share, p = reach / path.residual[source], path.projection[source]
    first, last = open_(0), open_(len(path.residual) - 1)
    point = open_(source)
    if source == t:
        tensors = {name: (first[name], last[name], point[name]) for name in names}
        foot = {n: _map_pieces(dtype, partial(_foot, p), *x) for n, x in tensors.items()}
        end = {n: _map_pieces(dtype, partial(_end, p, share), *x) for n, x in tensors.items()}
        return Line(foot, end)
    residual = {
        name: _map_pieces(dtype, partial(_residual, p, share), first[name], last[name], point[name])
        for name in names
    }
    del first, last, point
    checkpoint = open_(t)
    foot = {name: checkpoint[name].to(residual[name].dtype) for name in names}
    return Line(foot, {name: tensor + residual[name] for name, tensor in foot.items()})


def _foot(p: float, a: Tensor, b: Tensor, _: Tensor) -> Tensor:
    return Line({}, {}).combine([a, b], (p,))


def _end(p: float, share: float, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    foot = _foot(p, a, b, x)
    return foot + (x - foot) * share


def _residual(p: float, share: float, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return (x - a).sub_(b - a, alpha=p).mul_(share)


def _map_pieces(
    min_dtype: torch.dtype, function: Callable[..., Tensor], *tensors: Tensor
) -> Tensor:
    """Applies an elementwise function in float64, piece by piece."""
    dtype = torch.promote_types(working_type(*tensors), min_dtype)
    result = torch.empty(tensors[0].shape, dtype=dtype)
    flat, start = flatten_real(result), 0
    for parts in pieces(*tensors):
        values = function(*parts)
        flat[start : start + len(values)] = values
        start += len(values)
    return result


def random_walks(steps: Sequence[float], dimension: int, number: int, seed: int) -> list[Path]:
    """Draws random walks with given step lengths and uniformly random directions.

    The geometry of a path depends only on the inner products of its n steps. The direction of a
    standard Gaussian vector is uniform. The inner products of n such vectors in D dimensions, a
    Wishart matrix, equal those of the rows of a lower triangular matrix: independent standard
    Gaussians below the diagonal, and on it the square roots of χ² variables with D, D − 1, …
    degrees of freedom (Bartlett 1933, Proc. R. Soc. Edinburgh 53; Smith & Hocking 1972, Applied
    Statistics 21, AS 53). A walk through millions of dimensions therefore takes n²/2 numbers,
    without approximation. If D < n, the matrix has only the first D columns.

    Args:
        steps: Lengths of the steps, such as those of a training path; two or more.
        dimension: D, the number of weights.
        number: Number of walks.
        seed: Random seed. With the same seed, the first walks do not depend on ``number``.

    Returns:
        The walks. A walk that returns to its start, which can happen in one dimension, is drawn
        again.

    Raises:
        UsageError: There are fewer than two steps, all lengths are zero, or D < 1.
    """
    _require_three(len(steps) + 1)
    lengths = np.asarray(steps, dtype=np.float64)
    total = float(lengths.sum())
    if dimension < 1 or not 0 < total < math.inf:
        raise UsageError(
            f"a random walk of length {total:g} in {dimension} dimensions does not move",
            "Give a path that moves, in one dimension or more",
        )
    generator = np.random.Generator(np.random.PCG64(seed))
    walks: list[Path] = []
    while len(walks) < number:
        directions = _bartlett(len(lengths), dimension, generator)
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        points = np.cumsum(lengths[:, None] * directions, axis=0)
        if np.linalg.norm(points[-1]) > _ROUNDING * total:
            walks.append(_measure_walk(np.vstack([np.zeros_like(points[:1]), points]), lengths))
    return walks


def _bartlett(n: int, dimension: int, generator: np.random.Generator) -> _Matrix:
    """Draws rows with the inner products of n standard Gaussian vectors in D dimensions."""
    width = min(n, dimension)
    vectors = np.tril(generator.standard_normal((n, width)), -1)
    diagonal = np.arange(width)
    vectors[diagonal, diagonal] = np.sqrt(generator.chisquare(dimension - diagonal))
    return vectors


def _measure_walk(points: _Matrix, lengths: _Matrix) -> Path:
    """Measures a walk that starts at zero."""
    d = points[-1]
    length = float(np.linalg.norm(d))
    projection = points @ d / length**2
    projection[0], projection[-1] = 0, 1
    residuals = points - projection[:, None] * d
    residual = np.linalg.norm(residuals, axis=1)
    residual[residual <= _ROUNDING * lengths.sum()] = 0
    residual[[0, -1]] = 0
    turn: list[float | None] = [None]
    for t in range(1, len(points)):
        turn.append(None)
        if residual[t - 1] and residual[t]:
            u, v = residuals[t - 1] / residual[t - 1], residuals[t] / residual[t]
            # Unlike arccos, the diagonals of the rhombus are accurate for every angle.
            angle = 2 * math.atan2(np.linalg.norm(v - u), np.linalg.norm(v + u))
            turn[t] = math.degrees(angle)
    return Path(
        tuple(projection.tolist()),
        tuple(residual.tolist()),
        tuple(np.linalg.norm(points, axis=1).tolist()),
        tuple(turn),
        tuple(lengths.tolist()),
        length,
    )


def principal_axes(
    open_: Opener,
    count: int,
    names: Sequence[str],
    along: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
) -> tuple[tuple[Weights, Weights], tuple[float, ...]]:
    """Computes the first two principal components of a path (Li et al. 2018, arXiv 1712.09913).

    They are the components of θ_t − θ_n over all steps, with the mean subtracted as in
    scikit-learn. There are few checkpoints and many weights, so the components are computed from
    the Gram matrix of the checkpoints, block by block; each block opens each checkpoint once.

    Args:
        open_: Opens the checkpoint of a step.
        count: Number of checkpoints, n + 1.
        names: The tensors that define the components.
        along: Further tensors, such as buffers, that use the same combinations of the checkpoints.
        dtype: Minimum precision of the directions.

    Returns:
        Two orthonormal directions over ``names``, in ``dtype``, or in float64 if the weights are
        float64; and the share of the variance of each component, in descending order. Signs: the
        first step has a larger first coordinate than the last step, and the step farthest from
        the last along the second axis has a larger second coordinate. If the path ends at its
        start along the first axis, its sign is chosen like that of the second.

    Raises:
        CheckpointError: A checkpoint has weights that are not finite.
        UsageError: There are fewer than three checkpoints, all are equal, or all are on a line.
    """
    _require_three(count)
    zeros = _zeros(open_(count - 1), [*names, *along], dtype)
    axes = zeros, {name: tensor.clone() for name, tensor in zeros.items()}
    width = max(1, _BLOCK_BYTES // (8 * count))
    blocks, others = (
        list(divide({name: dimension(axes[0], [name]) for name in some}, width))
        for some in (names, along)
    )
    gram = torch.zeros(count, count, dtype=torch.float64)
    noise = 0.0
    for block in blocks:
        rows, last = _centred(open_, count, block)
        gram += rows @ rows.T
        noise += _noise(rows, last, block, axes[0])
    variances, scores = torch.linalg.eigh(gram)
    first, second = float(variances[-1]), float(variances[-2])
    if first <= 0:
        raise UsageError(
            "all checkpoints have the same parameters: they have no principal axes",
            "Give checkpoints from different times of the training",
        )
    if second <= max(noise, _ROUNDING * first):
        raise UsageError(
            "the checkpoints are on one line: they have no second principal axis",
            "Give one that is off the line, or use losscli interpolate, which shows the line",
        )
    shares = torch.stack([
        _signed(scores[:, -1], start=True) / math.sqrt(first),
        _signed(scores[:, -2], start=False) / math.sqrt(second),
    ])
    for block in (*blocks, *others):
        rows, _ = _centred(open_, count, block)
        for row, axis in zip(shares @ rows, axes, strict=True):
            _scatter(row, block, axis)
    for axis in axes:
        # An axis with a small share of the variance comes with a large error in its length.
        length = norm(axis, names)
        for name in axis:
            axis[name] /= length
    total = float(gram.trace())
    return axes, tuple(max(0.0, v) / total for v in variances.flip(0).tolist())


def _zeros(weights: Weights, names: Sequence[str], min_dtype: torch.dtype) -> dict[str, Tensor]:
    dtypes = {n: torch.promote_types(working_type(weights[n]), min_dtype) for n in names}
    return {name: torch.zeros(weights[name].shape, dtype=dtype) for name, dtype in dtypes.items()}


def _centred(open_: Opener, count: int, block: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """Returns a block of all checkpoints minus its mean, and the block of the last checkpoint."""
    rows = torch.empty(count, sum(stop - start for _, start, stop in block), dtype=torch.float64)
    for t in range(count):
        rows[t] = _gather(open_(t), block)  # without a name that keeps the checkpoint open
        _require_finite(float(rows[t].sum()), t)
    last = rows[-1].clone()
    # Subtracting the last checkpoint first keeps the rounding error of the mean small.
    rows -= last
    rows -= rows.mean(dim=0)
    return rows, last


def _noise(rows: Tensor, last: Tensor, block: Sequence[Part], like: Weights) -> float:
    """Returns the variance that rounding to the storage dtype may add to weights that move."""
    total = 0.0
    moving = last * rows.any(dim=0)
    parts = torch.split(moving, [stop - start for _, start, stop in block])
    for (name, _, _), part in zip(block, parts, strict=True):
        total += _rounding(like[name]) ** 2 * float(part.dot(part))
    return total


def _gather(weights: Weights, block: Sequence[Part]) -> Tensor:
    return torch.cat([flatten_real(weights[name])[start:stop] for name, start, stop in block])


def _scatter(row: Tensor, block: Sequence[Part], axis: Weights) -> None:
    parts = torch.split(row, [stop - start for _, start, stop in block])
    for (name, start, stop), part in zip(block, parts, strict=True):
        flatten_real(axis[name])[start:stop] = part


def _signed(scores: Tensor, *, start: bool) -> Tensor:
    """Fixes the sign of a component by the coordinates of the steps relative to the last."""
    relative = scores - scores[-1]
    sizes = relative.abs()
    # The first step with the largest coordinate, up to rounding.
    reference = int((sizes > (1 - 1e-9) * sizes.max()).nonzero()[0])
    if start and sizes[0] > 1e-9 * sizes.max():
        reference = 0
    return scores if relative[reference] > 0 else -scores


def _rounding(*tensors: Tensor) -> float:
    """Returns the relative rounding error of a computed and stored weight."""
    # Not the precision of half types: weights trained in these really move in steps of that size.
    exact = all(tensor.dtype in {torch.float64, torch.complex128} for tensor in tensors)
    return _ROUNDING if exact else torch.finfo(torch.float32).eps


def _require_three(count: int) -> None:
    if count < 3:
        raise UsageError(
            f"a path of {count} checkpoints has no checkpoint between its ends",
            "Give three or more",
        )


def _require_finite(size: float, t: int) -> None:
    if not math.isfinite(size):
        raise CheckpointError(
            f"checkpoint {t} of the path, counted from 0, has weights that are infinite or not a "
            "number",
            "Leave it out",
        )
