"""Averages of points in weight space, which are opened one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from losscli.weight_space.vectors import Weights, can_move, pieces

__all__ = ["average"]

# Values that are summed before the next ones are read: 256 MiB in float64. A larger tensor is
# summed alone.
_GROUP = 1 << 25


def average(
    points: Sequence[Callable[[], Weights]], coefficients: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """Computes the average of points, Σ c_k θ_k.

    Sums are in float64 and rounded once. Every point is opened again for each group of tensors, so
    that the result, one group and the mapped pages of one point are in memory.

    Args:
        points: Functions that open the points, which have the same names and shapes.
        coefficients: c_k, which sum to 1; by default all are equal. A point with coefficient 0 is
            not used, whatever its values.

    Returns:
        The average. A tensor has the promoted dtype of those of the points. Tensors of whole
        numbers are copies of those of the first point. A tensor that is the same at all points is
        copied, and one tensor under two names at all points remains one.
    """
    dtypes: dict[str, torch.dtype] = {}
    sizes: dict[str, int] = {}
    keys: dict[str, list[object]] = {}
    for read in points:
        for name, tensor in read().items():
            dtypes[name] = torch.promote_types(dtypes.get(name, tensor.dtype), tensor.dtype)
            sizes[name] = tensor.numel()
            place = (tensor.data_ptr(), tensor.shape, tensor.stride())
            keys.setdefault(name, []).append(place if tensor.numel() else name)
    first_of: dict[object, str] = {}
    original = {name: first_of.setdefault(tuple(key), name) for name, key in keys.items()}
    found: dict[str, Tensor] = {}
    for group in _groups({name: sizes[name] for name in first_of.values()}):
        found |= _average_group(group, points, coefficients, dtypes)
    return {name: found[first] for name, first in original.items()}


def _groups(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Divides tensors into groups."""
    group: list[str] = []
    total = 0
    for name, size in sizes.items():
        if group and total + size > _GROUP:
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    yield group


def _average_group(
    names: Iterable[str],
    points: Sequence[Callable[[], Weights]],
    coefficients: Sequence[float] | None,
    dtypes: Mapping[str, torch.dtype],
) -> dict[str, Tensor]:
    """Averages some tensors."""
    sums: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}
    # k x / k is x if the sum has more digits than x, which it has not in float64.
    first: dict[str, Tensor] = {}
    for k, read in enumerate(points):
        weights, share = read(), 1.0 if coefficients is None else coefficients[k]
        for name in names:
            tensor = weights[name]
            if not can_move(tensor):
                whole.setdefault(name, tensor.clone())
            elif share and name not in sums:
                sums[name] = _scaled(tensor, share)
                if dtypes[name] in {torch.float64, torch.complex128}:
                    first[name] = tensor.to(dtypes[name], copy=True)
            elif share:
                for total, value in pieces(sums[name], tensor):
                    total.add_(value, alpha=share)
                if name in first and not torch.equal(first[name], tensor.to(dtypes[name])):
                    del first[name]
    for total in sums.values():
        if coefficients is None:
            total.div_(len(points))
    return whole | {name: first.get(name, sums[name]).to(dtypes[name]) for name in sums}


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    """Returns a contiguous multiple of a tensor in float64 or complex128."""
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    copy = tensor.to(wide, copy=True, memory_format=torch.contiguous_format)
    return copy if factor == 1 else copy.mul_(factor)
