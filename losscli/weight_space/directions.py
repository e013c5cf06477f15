"""Random filter-normalised directions in weight space.

The loss of most networks does not change if a filter is scaled and the next layer is scaled back.
Filter normalisation removes this invariance, so that planes of networks with small and with large
weights can be compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from losscli.errors import UsageError
from losscli.weight_space.vectors import Weights, working_type

__all__ = ["gaussian_direction", "random_directions"]

# Number of weights that are converted to float64 at once.
_PIECE = 1 << 20


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
        if tensor.ndim > 1 and tensor.numel() and name not in still:
            pair = _normalised(tensor, _generator(name, seed))
        else:
            pair = (_zeros(tensor), _zeros(tensor))
        for k in range(2):
            directions[k][name] = pair[k]
            moves[k] = moves[k] or bool(pair[k].any())
    if not all(moves):
        raise UsageError(
            "no tensor that moves spans a plane: filter-normalised directions are "
            "zero in biases, in normalisation parameters, and where the weights are zero",
            "Let a weight of two or more dimensions move",
        )
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


def _normalised(tensor: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    if tensor.is_complex():
        # A complex Gaussian vector has independent real and imaginary parts.
        pair = _normalised(torch.view_as_real(tensor.resolve_conj()), generator)
        return torch.view_as_complex(pair[0]), torch.view_as_complex(pair[1])
    dtype = working_type(tensor)
    first, second = (torch.randn(tensor.shape, generator=generator).to(dtype) for _ in range(2))
    filters = len(tensor) if tensor.numel() > len(tensor) else 1
    matrices = [t.reshape(filters, -1) for t in (tensor, first, second)]
    height = max(1, _PIECE // matrices[0].shape[1])
    for start in range(0, filters, height):
        _normalise(*(matrix[start : start + height] for matrix in matrices))
    return first, second


def _normalise(filters: Tensor, first: Tensor, second: Tensor) -> None:
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
