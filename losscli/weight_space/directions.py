"""Random filter-normalised directions in weight space.

The loss of most networks does not change if a filter is scaled and the next layer is scaled back.
Filter normalisation removes this invariance, so that planes of networks with small and with large
weights can be compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from losscli.errors import UsageError
from losscli.weight_space.vectors import Weights, working_type

__all__ = [
    "NO_DIRECTION",
    "gaussian_direction",
    "has_filters",
    "normalisation_parameters",
    "random_direction",
    "random_directions",
]

NO_DIRECTION = (
    "filter-normalised directions are zero in biases, normalisation parameters and zero weights",
    "Let a weight of two or more dimensions move",
)
"""Why there may be no random direction, and what to do."""

_NORMALISATION = (
    nn.modules.batchnorm._NormBase,  # batch and instance normalisation
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)

# Number of weights that are converted to float64 at once.
_PIECE = 1 << 20


def normalisation_parameters(model: nn.Module) -> set[str]:
    """Lists the parameters of normalisation layers, which have no filters."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, _NORMALISATION)
        for name, _ in module.named_parameters(recurse=False)
    }


def has_filters(tensor: Tensor) -> bool:
    """Returns whether a tensor has the shape of one with filters: two dimensions or more."""
    return tensor.ndim > 1 and tensor.numel() > 0


def random_direction(
    weights: Weights, names: Iterable[str], seed: int, number: int
) -> dict[str, Tensor]:
    """Draws one of many independent directions, filter-normalised (Li et al. 2018).

    For each filter, a Gaussian vector is rescaled to the norm of the filter in the weights. The
    norm over all tensors is therefore that of the weights, for every direction.

    The random numbers of a tensor depend on the seed, its name and the number of the direction
    only: other weights have the same draws, scaled to their own filters.

    Args:
        weights: The origin of the direction.
        names: The tensors that move, all with filters.
        seed: Random seed.
        number: The number of the direction.

    Returns:
        The direction. The dtype is float32, or float64 for float64 weights.
    """
    return {
        name: _draw(weights[name], 1, _generator(f"{name} {number}", seed), _rescale)[0]
        for name in names
    }


def random_directions(
    weights: Weights, names: Sequence[str], still: Collection[str], seed: int
) -> tuple[Weights, Weights]:
    """Draws two random directions, filter-normalised (Li et al. 2018, arXiv 1712.09913).

    A filter is a slice of a tensor along its first dimension. For each filter, two Gaussian vectors
    are orthogonalised and rescaled to the norm of the filter in the weights. The two directions are
    therefore orthogonal and filter-normalised. If the filters have a single weight, the whole
    tensor is treated as one filter. Biases and other tensors with at most one dimension do not
    move.

    The random numbers of a tensor depend on the seed and its name only, so excluding a tensor does
    not change the others.

    Args:
        weights: The origin of the directions.
        names: The tensors that move.
        still: Tensors among them with zero directions: normalisation parameters and buffers.
        seed: Random seed.

    Returns:
        Two directions for the tensors in ``names``, zero for tensors that do not move. The dtype
        is float32, or float64 for float64 weights.

    Raises:
        UsageError: A direction is zero.
    """
    directions: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    moves = [False, False]
    for name in names:
        tensor = weights[name]
        if has_filters(tensor) and name not in still:
            pair = _draw(tensor, 2, _generator(name, seed), _orthogonalise)
        else:
            pair = [_zeros(tensor), _zeros(tensor)]
        for k in range(2):
            directions[k][name] = pair[k]
            moves[k] = moves[k] or bool(pair[k].any())
    if not all(moves):
        reason, cure = NO_DIRECTION
        raise UsageError(f"the tensors that move do not span a plane: {reason}", cure)
    return directions


def gaussian_direction(
    weights: Weights, names: Iterable[str], seed: int, number: int
) -> dict[str, Tensor]:
    """Draws one of many independent standard Gaussian vectors.

    The random numbers of a tensor depend on the seed, its name and the number of the vector only:
    other weights have the same draws.

    Args:
        weights: Tensors with the shapes and types of the vector; real numbers.
        names: The tensors that move.
        seed: Random seed.
        number: The number of the vector.

    Returns:
        The vector. The dtype is float32, or float64 for float64 weights.
    """
    return {
        name: torch.randn(weights[name].shape, generator=_generator(f"{name} {number}", seed)).to(
            working_type(weights[name])
        )
        for name in names
    }


def _draw(
    tensor: Tensor, number: int, generator: torch.Generator, normalise: Callable[..., None]
) -> list[Tensor]:
    """Draws Gaussian tensors and normalises their rows; ``normalise`` takes the filters first."""
    if tensor.is_complex():
        # A complex Gaussian vector has independent real and imaginary parts.
        real = torch.view_as_real(tensor.resolve_conj())
        return [torch.view_as_complex(t) for t in _draw(real, number, generator, normalise)]
    dtype = working_type(tensor)
    drawn = [torch.randn(tensor.shape, generator=generator).to(dtype) for _ in range(number)]
    filters = len(tensor) if tensor.numel() > len(tensor) else 1
    matrices = [t.reshape(filters, -1) for t in (tensor, *drawn)]
    height = max(1, _PIECE // matrices[0].shape[1])
    for start in range(0, filters, height):
        normalise(*(matrix[start : start + height] for matrix in matrices))
    return drawn


def _rescale(filters: Tensor, direction: Tensor) -> None:
    """Gives the rows of a matrix the norms of ``filters``, in place."""

    def squares(rows: Tensor) -> Tensor:
        parts = (part.to(torch.float64).square() for part in torch.split(rows, _PIECE, 1))
        return torch.stack([part.sum(1, keepdim=True) for part in parts]).sum(0)

    factors = _quotient(squares(filters), squares(direction)).sqrt()
    for part in torch.split(direction, _PIECE, 1):
        part.copy_(part * factors)


def _orthogonalise(filters: Tensor, first: Tensor, second: Tensor) -> None:
    """Orthogonalises the rows of two matrices and gives them the norms of ``filters``, in place."""
    columns = range(0, filters.shape[1], _PIECE)
    overlaps: list[Tensor] = []

    def pieces() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for start in columns:
            w, u, v = (
                m[:, start : start + _PIECE].to(torch.float64) for m in (filters, first, second)
            )
            for overlap in overlaps:
                v = v - overlap * u
            yield w, u, v

    def dots(i: int, k: int) -> Tensor:
        total = torch.zeros(len(filters), 1, dtype=torch.float64)
        for parts in pieces():
            total += (parts[i] * parts[k]).sum(1, keepdim=True)
        return total

    lengths, squares = dots(0, 0), dots(1, 1)
    # Orthogonalise twice: for nearly parallel vectors, the first result is mostly rounding error.
    overlaps.append(_quotient(dots(1, 2), squares))
    overlaps.append(_quotient(dots(1, 2), squares))
    # In one dimension the orthogonal component is zero, apart from rounding errors.
    residuals = dots(2, 2) if filters.shape[1] > 1 else torch.zeros_like(squares)
    for start, (_, u, v) in zip(columns, pieces(), strict=True):
        second[:, start : start + _PIECE] = v * _quotient(lengths, residuals).sqrt()
        first[:, start : start + _PIECE] = u * _quotient(lengths, squares).sqrt()


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """Divides a by b; the result is zero where b is zero."""
    return torch.where(b > 0, a / b, 0)


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=working_type(tensor))


def _generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
