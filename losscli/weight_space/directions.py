"""Random directions through weight space, each filter as long as that of the weights.

The loss of most networks stays the same when a filter is scaled and the next layer is scaled back.
Filter normalisation takes that freedom from the picture: planes of networks with small and with
large weights may be compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from losscli.errors import UsageError
from losscli.weight_space.vectors import Weights, working_type

__all__ = ["random_directions"]

# Weights that are in float64 at a time.
_PIECE = 1 << 20


def random_directions(
    weights: Weights, names: Sequence[str], still: Collection[str], seed: int
) -> tuple[Weights, Weights]:
    """Draws two random directions, filter-normalised (Li et al. 2018, arXiv 1712.09913).

    A filter is what stands at one index of a tensor's first dimension. Within each, two Gaussian
    vectors are made orthogonal, and each is rescaled to the norm of that filter in the weights. So
    the directions are orthogonal as a whole, and both are filter-normalised. Where filters have a
    single weight, in which nothing is orthogonal, the tensor is taken for one filter. Biases, and
    whatever else has no more than one dimension, do not move.

    Each tensor has random numbers of its own, by the seed and its name: leaving out a tensor
    changes none of the others.

    Args:
        weights: The point that the directions start at.
        names: The tensors that move.
        still: Those among them that stay: normalisation parameters and buffers.
        seed: Another seed, other directions.

    Returns:
        Two directions with the tensors of the names, zero where nothing moves; in float32, or in
        float64 where the weights are.

    Raises:
        UsageError: Nothing moves, or no more than one weight of each tensor.
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


def _normalised(tensor: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    if tensor.is_complex():
        # Independent real and imaginary parts make a complex Gaussian vector.
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
    """Makes the rows of two matrices orthogonal, and as long as those of a third; in place."""
    columns = range(0, filters.shape[1], _PIECE)
    overlaps: list[Tensor] = []

    def stretches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for start in columns:
            w, u, v = (
                m[:, start : start + _PIECE].to(torch.float64) for m in (filters, first, second)
            )
            for overlap in overlaps:
                v = v - overlap * u
            yield w, u, v

    def dots(i: int, k: int) -> Tensor:
        total = torch.zeros(len(filters), 1, dtype=torch.float64)
        for parts in stretches():
            total += (parts[i] * parts[k]).sum(1, keepdim=True)
        return total

    lengths, squares = dots(0, 0), dots(1, 1)
    # Once is not enough: of two vectors that are nearly parallel, rounding is most of what is left.
    overlaps.append(_quotient(dots(1, 2), squares))
    overlaps.append(_quotient(dots(1, 2), squares))
    # A single weight has nothing orthogonal to it, whatever rounding has left.
    rests = dots(2, 2) if filters.shape[1] > 1 else torch.zeros_like(squares)
    for start, (_, u, v) in zip(columns, stretches(), strict=True):
        second[:, start : start + _PIECE] = v * _quotient(lengths, rests).sqrt()
        first[:, start : start + _PIECE] = u * _quotient(lengths, squares).sqrt()


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """Divides; by zero, it gives zero."""
    return torch.where(b > 0, a / b, 0)


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=working_type(tensor))


def _generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
