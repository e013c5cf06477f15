"""Averages of points in weight space, which are opened one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from losscli.weight_space.vectors import Part, Weights, can_move, divide, flatten_real, pieces

__all__ = ["average"]

# Numbers that are summed before the next ones are read: 128 MiB in float64.
_GROUP = 1 << 24


def average(
    points: Sequence[Callable[[], Weights]], coefficients: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """Computes the average of points, Σ c_k θ_k.

    Sums are in float64 and converted once. Every point is opened again for each group of numbers,
    so that the result, one group and the mapped pages of one point are in memory.

    Args:
        points: Functions that open the points, which have the same names and shapes.
        coefficients: c_k, which sum to 1; by default all are equal. A point with coefficient 0 is
            not used, whatever its values.

    Returns:
        The average. A tensor has the promoted dtype of those of the points. Tensors of whole
        numbers are copies of those of the first point. A tensor that is the same at all points is
        copied, and one tensor under two names at all points remains one.
    """
    keys: dict[str, list[object]] = {}
    found: dict[str, Tensor] = {}
    for read in points:
        for name, tensor in read().items():
            place = (tensor.data_ptr(), tensor.shape, tensor.stride())
            keys.setdefault(name, []).append(place if tensor.numel() else name)
            if name not in found:
                found[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
                if not can_move(tensor):
                    found[name].copy_(tensor)
            elif can_move(tensor):
                wider = torch.promote_types(found[name].dtype, tensor.dtype)
                found[name] = found[name].to(wider)
    first_of: dict[object, str] = {}
    original = {name: first_of.setdefault(tuple(key), name) for name, key in keys.items()}
    found = {name: found[first] for name, first in original.items()}
    moved = {n: flatten_real(found[n]) for n in first_of.values() if can_move(found[n])}
    for group in divide({name: len(flat) for name, flat in moved.items()}, _GROUP):
        _average_group(group, points, coefficients, moved)
    return found


def _average_group(
    group: Iterable[Part],
    points: Sequence[Callable[[], Weights]],
    coefficients: Sequence[float] | None,
    found: Mapping[str, Tensor],
) -> None:
    """Averages some numbers into ``found``, the flat tensors of the average."""
    sums: dict[Part, Tensor] = {}
    # The sum of k equal numbers of float32 is exact in float64, but that of float64 is not.
    first: dict[Part, Tensor] = {}
    for k, read in enumerate(points):
        share = 1.0 if coefficients is None else coefficients[k]
        if not share:
            continue
        weights = read()
        for part in group:
            name, start, stop = part
            values = flatten_real(weights[name])[start:stop]
            if part not in sums:
                sums[part] = values.to(torch.float64, copy=True)
                if found[name].dtype == torch.float64:
                    first[part] = sums[part].clone()
                if share != 1:
                    sums[part].mul_(share)
                continue
            if part in first and not torch.equal(first[part], values.to(torch.float64)):
                del first[part]
            for total, value in pieces(sums[part], values):
                total.add_(value, alpha=share)
    for part, total in sums.items():
        name, start, stop = part
        if coefficients is None:
            total.div_(len(points))
        found[name][start:stop].copy_(first.get(part, total))
