"""Training paths through weight space: how far along a straight line they run, and how far off it.

A path may hold more checkpoints than fit into memory. They are opened one after the other, and
never are more than three of them in use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from losscli.errors import CheckpointError, UsageError
from losscli.weight_space.slices import Line
from losscli.weight_space.vectors import (
    Weights,
    dimension,
    distance,
    norm,
    pieces,
    real,
    working_type,
)

__all__ = ["Opener", "Path", "measure", "principal_axes", "random_walks", "ribbon"]

Opener = Callable[[int], Weights]
"""Opens the checkpoint of a step, such as by mapping its file into memory."""

_Matrix = NDArray[np.float64]
_Block = list[tuple[str, int, int]]

# What sums of many float64 numbers may be off by, as a share of the largest.
_ROUNDING = 2.0**-43

# Bytes of float64 that a piece of all checkpoints may take.
_BLOCK_BYTES = 256 << 20


@dataclass(frozen=True)
class Path:
    """A path θ_0 … θ_n seen from the straight line between its ends, d = θ_n − θ_0.

    Attributes:
        projection: p_t = ⟨θ_t − θ_0, d⟩ / ‖d‖², which is 0 at the first step and 1 at the last.
        residual: r_t = ‖θ_t − θ_0 − p_t d‖; 0 where rounding alone puts θ_t off the line.
        distance: ‖θ_t − θ_0‖.
        turn: The angle between the residuals of t and t − 1, in degrees; None where there is no
            such angle, as one of the two is zero.
        steps: ‖θ_t − θ_{t−1}‖ from t = 1 on.
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

    Each checkpoint is opened twice, and gone through twice each time.

    Args:
        open_: Opens the checkpoint of a step.
        count: How many checkpoints there are, n + 1.
        names: The parameters that move. Buffers do not count.

    Returns:
        The path. Its turns are good to about 10⁻¹⁵ radians times step · distance / residual², with
        the distance from the nearer end, and near 0 and 180 degrees to the root of that.

    Raises:
        CheckpointError: A checkpoint has weights that are not finite.
        UsageError: There are fewer than three checkpoints, or the first and the last are equal.
    """
    _require_three(count)
    projection, residual, far, length = _places(open_, count, names)
    steps, turn = _turns(open_, projection, residual, length, names)
    return Path(tuple(projection), tuple(residual), tuple(far), tuple(turn), tuple(steps), length)


def _places(
    open_: Opener, count: int, names: Sequence[str]
) -> tuple[list[float], list[float], list[float], float]:
    """Finds projections, residuals and distances, with both ends and one more step at a time."""
    first, last = open_(0), open_(count - 1)
    sizes = norm(first, names), norm(last, names)
    _require_finite(sizes[0], 0)
    _require_finite(sizes[1], count - 1)
    length = distance(first, last, names)
    if length == 0:
        raise UsageError(
            "the first and the last checkpoint have the same parameters: there is no straight line "
            "between them",
            "Give a path that ends elsewhere",
        )
    # The lengths of d that a point moves along it, at most, if all weights change by their size.
    spread = sum(sizes) / length
    projection, residual, far = [0.0], [0.0], [0.0]
    for t in range(1, count - 1):
        p, r, x = _place(first, last, open_(t), length, spread, names)
        _require_finite(x, t)
        projection.append(p)
        residual.append(r)
        far.append(x)
    return [*projection, 1.0], [*residual, 0.0], [*far, length], length


def _place(
    first: Weights,
    last: Weights,
    point: Weights,
    length: float,
    spread: float,
    names: Sequence[str],
) -> tuple[float, float, float]:
    from_first = from_last = square = 0.0
    for name in names:
        for a, b, x in pieces(first[name], last[name], point[name]):
            d, step = b - a, x - a
            from_first += float(step.dot(d))
            from_last += float((x - b).dot(d))
            square += float(step.dot(step))
    # From the nearer end: so a point that is one of the ends has its place to the last bit.
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
            # A point that was put on the line, then rounded to the type it is stored in, is this
            # much off it at most, in every single weight: its own rounding, and by that of all
            # weights together its place on the line. Such a residual has no direction.
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
    """Finds the lengths of the steps and the turns, from one checkpoint to the next."""
    steps: list[float] = []
    turns: list[float | None] = [None]
    current = open_(0)
    for t in range(1, len(projection)):
        # In this order: the new one is opened when no more than two others are held.
        previous = current
        current = open_(t)
        steps.append(distance(previous, current, names))
        along = abs(projection[t] - projection[t - 1]) * length
        turns.append(_turn(residual[t - 1], residual[t], steps[-1], along))
    return steps, turns


def _turn(r: float, s: float, step: float, along: float) -> float | None:
    """The angle between two residuals, by their lengths and the step between their checkpoints."""
    # The residuals themselves take four checkpoints, their two and both ends. But the step less its
    # part along d is the third side of their triangle. Here the sides give the angle by
    # tan² φ/2 = (1 − cos φ) / (1 + cos φ): small ones, too, of which the cosine knows little.
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
    """Lays the line across a path at one of its steps, θ_0 + p_t d + b v_t for 0 ≤ b ≤ reach.

    Args:
        open_: Opens the checkpoint of a step.
        path: What `measure` found.
        t: The step.
        names: The tensors that move: those that were measured, and buffers, which follow the same
            combination of the checkpoints.
        reach: The largest b.
        dtype: The least type of its tensors; each end is made in float64 and rounded once.

    Returns:
        The line, on which b is at α = b / reach: at α = 0 is the foot θ_0 + p_t d, and the
        checkpoint at b = r_t. Where r_t = 0 the foot is the checkpoint, and the direction is that
        of the nearest step that has a residual; the earlier of two. None where no step has one: a
        straight path has no second direction.
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
        foot = {n: _made(dtype, partial(_foot, p), *three) for n, three in tensors.items()}
        end = {n: _made(dtype, partial(_end, p, share), *three) for n, three in tensors.items()}
        return Line(foot, end)
    rest = {
        name: _made(dtype, partial(_rest, p, share), first[name], last[name], point[name])
        for name in names
    }
    del first, last, point
    here = open_(t)
    foot = {name: here[name].to(rest[name].dtype) for name in names}
    return Line(foot, {name: tensor + rest[name] for name, tensor in foot.items()})


def _foot(p: float, a: Tensor, b: Tensor, _: Tensor) -> Tensor:
    return Line({}, {}).combine([a, b], (p,))


def _end(p: float, share: float, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    foot = _foot(p, a, b, x)
    return foot + (x - foot) * share


def _rest(p: float, share: float, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return (x - a).sub_(b - a, alpha=p).mul_(share)


def _made(least: torch.dtype, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Makes a tensor a piece at a time, the function applied in float64."""
    dtype = torch.promote_types(working_type(*tensors), least)
    made = torch.empty(tensors[0].shape, dtype=dtype)
    flat, start = real(made), 0
    for parts in pieces(*tensors):
        values = function(*parts)
        flat[start : start + len(values)] = values
        start += len(values)
    return made


def random_walks(steps: Sequence[float], dimension: int, number: int, seed: int) -> list[Path]:
    """Draws random walks: steps of given lengths, each in a uniformly random direction.

    A path's places depend on no more than the inner products of its n steps. A direction is
    uniform if it is that of a standard Gaussian vector, and the inner products of n such vectors
    in D dimensions, a Wishart matrix, are those of the rows of a triangular matrix: above the
    diagonal zero, below it independent standard Gaussians, on it the roots of χ² variables with D,
    D − 1, … degrees of freedom (Bartlett 1933, Proc. R. Soc. Edinburgh 53; Smith & Hocking 1972,
    Applied Statistics 21, AS 53). So a walk through millions of dimensions takes n²/2 numbers, and
    nothing is approximated. Where D < n the first D columns are all there is.

    Args:
        steps: The lengths of the steps, such as those of a training path; two or more.
        dimension: D, the number of weights.
        number: How many walks to draw.
        seed: Another seed, other walks. Of more walks with one seed, the first are the same.

    Returns:
        The walks. Those that end where they began, as on a line they may, are drawn again.

    Raises:
        UsageError: There are fewer than two steps, none has a length, or there is no dimension.
    """
    _require_three(len(steps) + 1)
    lengths = np.asarray(steps, dtype=np.float64)
    total = float(lengths.sum())
    if dimension < 1 or not 0 < total < math.inf:
        raise UsageError(
            f"a random walk of length {total:g} in {dimension} dimensions goes nowhere",
            "Give a path that moves, in one dimension or more",
        )
    generator = np.random.Generator(np.random.PCG64(seed))
    walks: list[Path] = []
    while len(walks) < number:
        directions = _bartlett(len(lengths), dimension, generator)
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        places = np.cumsum(lengths[:, None] * directions, axis=0)
        if np.linalg.norm(places[-1]) > _ROUNDING * total:
            walks.append(_walk(np.vstack([np.zeros_like(places[:1]), places]), lengths))
    return walks


def _bartlett(n: int, dimension: int, generator: np.random.Generator) -> _Matrix:
    """Draws vectors with the inner products of n standard Gaussian ones in D dimensions."""
    width = min(n, dimension)
    vectors = np.tril(generator.standard_normal((n, width)), -1)
    diagonal = np.arange(width)
    vectors[diagonal, diagonal] = np.sqrt(generator.chisquare(dimension - diagonal))
    return vectors


def _walk(places: _Matrix, lengths: _Matrix) -> Path:
    """Measures a walk that begins at zero."""
    d = places[-1]
    length = float(np.linalg.norm(d))
    projection = places @ d / length**2
    projection[0], projection[-1] = 0, 1
    rests = places - projection[:, None] * d
    residual = np.linalg.norm(rests, axis=1)
    residual[residual <= _ROUNDING * lengths.sum()] = 0
    residual[[0, -1]] = 0
    turn: list[float | None] = [None]
    for t in range(1, len(places)):
        turn.append(None)
        if residual[t - 1] and residual[t]:
            u, v = rests[t - 1] / residual[t - 1], rests[t] / residual[t]
            # Unlike its cosine, the sides of the rhombus give every angle to its last digits.
            angle = 2 * math.atan2(np.linalg.norm(v - u), np.linalg.norm(v + u))
            turn[t] = math.degrees(angle)
    return Path(
        tuple(projection.tolist()),
        tuple(residual.tolist()),
        tuple(np.linalg.norm(places, axis=1).tolist()),
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
    """Finds the first two principal components of a path (Li et al. 2018, arXiv 1712.09913).

    They are those of θ_t − θ_n over all steps, centred by their mean as scikit-learn centres them.
    The checkpoints are few and the weights many: so the components come from the inner products of
    the checkpoints, a piece of all weights at a time, for which each checkpoint is opened once.

    Args:
        open_: Opens the checkpoint of a step.
        count: How many checkpoints there are, n + 1.
        names: The tensors that count.
        along: Tensors that do not, and follow the same combinations of the checkpoints: buffers.
        dtype: The least type of the directions.

    Returns:
        Two directions, orthogonal and of length one over the tensors that count, in this type, or
        in float64 where the weights are; and the share that each principal component has in the
        variance, falling. Along the first axis the path begins on the positive side of its end;
        along the second the step farthest from the end is on the positive side, as it is along
        the first where the path ends as it began.

    Raises:
        CheckpointError: A checkpoint has weights that are not finite.
        UsageError: There are fewer than three checkpoints, all are equal, or all are on a line.
    """
    _require_three(count)
    axes = _empty(open_(count - 1), [*names, *along], dtype)
    width = max(1, _BLOCK_BYTES // (8 * count))
    blocks, others = (list(_blocks(axes[0], some, width)) for some in (names, along))
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
            "Give one that is off the line, or look at the line alone with losscli interpolate",
        )
    shares = torch.stack([
        _signed(scores[:, -1], start=True) / math.sqrt(first),
        _signed(scores[:, -2], start=False) / math.sqrt(second),
    ])
    for block in (*blocks, *others):
        rows, _ = _centred(open_, count, block)
        _scatter(shares @ rows, block, axes)
    for axis in axes:
        # The less of the variance an axis has, the less exact is the length it comes with.
        length = norm(axis, names)
        for name in axis:
            axis[name] /= length
    total = float(gram.trace())
    return axes, tuple(max(0.0, v) / total for v in variances.flip(0).tolist())


def _empty(
    weights: Weights, names: Sequence[str], least: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Makes room for two directions."""
    one, other = (
        {
            name: torch.zeros(
                weights[name].shape, dtype=torch.promote_types(working_type(weights[name]), least)
            )
            for name in names
        }
        for _ in range(2)
    )
    return one, other


def _blocks(weights: Weights, names: Sequence[str], width: int) -> Iterator[_Block]:
    """Deals weights into blocks of a width, each some stretches of flattened tensors."""
    block: _Block = []
    room = width
    for name in names:
        size, start = dimension(weights, [name]), 0
        while start < size:
            stop = min(start + room, size)
            block.append((name, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield block
                block, room = [], width
    if block:
        yield block


def _centred(open_: Opener, count: int, block: _Block) -> tuple[Tensor, Tensor]:
    """Reads a block of all checkpoints, less its mean over them; and that of the last as it is."""
    rows = torch.empty(count, sum(stop - start for _, start, stop in block), dtype=torch.float64)
    for t in range(count):
        _gather(open_(t), block, rows[t])
        _require_finite(float(rows[t].sum()), t)
    last = rows[-1].clone()
    # Less the last before the mean: the mean of large numbers would be rounded as they are.
    rows -= last
    rows -= rows.mean(dim=0)
    return rows, last


def _noise(rows: Tensor, last: Tensor, block: _Block, like: Weights) -> float:
    """The variance that rounding to the type of the storage may give to weights that move."""
    total, at = 0.0, 0
    for name, start, stop in block:
        stretch = slice(at, at + stop - start)
        moving = last[stretch] * rows[:, stretch].any(dim=0)
        total += _rounding(like[name]) ** 2 * float(moving.dot(moving))
        at = stretch.stop
    return total


def _gather(weights: Weights, block: _Block, row: Tensor) -> None:
    at = 0
    for name, start, stop in block:
        row[at : at + stop - start] = real(weights[name])[start:stop]
        at += stop - start


def _scatter(rows: Tensor, block: _Block, axes: Sequence[Weights]) -> None:
    at = 0
    for name, start, stop in block:
        for row, axis in zip(rows, axes, strict=True):
            real(axis[name])[start:stop] = row[at : at + stop - start]
        at += stop - start


def _signed(scores: Tensor, *, start: bool) -> Tensor:
    """Gives a component its sign, by the checkpoints' coordinates relative to the last."""
    seen = scores - scores[-1]
    sizes = seen.abs()
    # The first of those that are the largest but for rounding.
    telling = int((sizes > (1 - 1e-9) * sizes.max()).nonzero()[0])
    if start and sizes[0] > 1e-9 * sizes.max():
        telling = 0
    return scores if seen[telling] > 0 else -scores


def _rounding(*tensors: Tensor) -> float:
    """What a weight that was computed, then stored, may be off by, as a share of itself."""
    # Half precision is no excuse: what was trained in it moves by its units.
    exact = all(tensor.dtype in {torch.float64, torch.complex128} for tensor in tensors)
    return _ROUNDING if exact else torch.finfo(torch.float32).eps


def _require_three(count: int) -> None:
    if count < 3:
        raise UsageError(
            f"a path of {count} checkpoints has nothing between its ends", "Give three or more"
        )


def _require_finite(size: float, t: int) -> None:
    if not math.isfinite(size):
        raise CheckpointError(
            f"checkpoint {t} of the path, counted from 0, has weights that are infinite or not a "
            "number",
            "Leave it out",
        )
