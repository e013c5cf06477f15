"""The vector space of named tensors: norms, distances and comparisons.

Tensors keep their storage dtype. Sums are computed in float64 piece by piece, without a float64
copy of a large tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from losscli.errors import UsageError

__all__ = [
    "Part",
    "Weights",
    "can_move",
    "cosine",
    "dimension",
    "distance",
    "divide",
    "flatten_real",
    "identical",
    "known_buffers",
    "mismatches",
    "norm",
    "number_kind",
    "pieces",
    "select_names",
    "to_device",
    "unflatten",
    "working_type",
]

Weights = Mapping[str, Tensor]

Part = tuple[str, int, int]
"""A part of a vector: its name, where it starts, and where it stops."""

_PIECE = 1 << 20

_NARROW = {torch.float64: torch.float32, torch.complex128: torch.complex64}


def can_move(tensor: Tensor) -> bool:
    """Returns whether a tensor can move along a line: real or complex floating-point numbers."""
    return tensor.is_floating_point() or tensor.is_complex()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Moves a tensor to a device; MPS, which has no float64, takes such numbers as float32."""
    if device.type == "mps":
        tensor = tensor.to(_NARROW.get(tensor.dtype, tensor.dtype))
    return tensor.to(device)


def flatten_real(tensor: Tensor) -> Tensor:
    """Flattens a tensor into a real vector.

    Returns:
        The values, ``[n]``, or the real and imaginary parts of complex values, ``[2n]``. A view
        if the tensor is contiguous.
    """
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).reshape(
        -1
    )


def unflatten(vector: Tensor, like: Weights, names: Iterable[str]) -> dict[str, Tensor]:
    """Splits a vector, ``[n]``, into views with the shapes of the named tensors, in their order."""
    names = list(names)
    parts = torch.split(vector, [like[name].numel() for name in names])
    return {name: part.view(like[name].shape) for name, part in zip(names, parts, strict=True)}


def dimension(weights: Weights, names: Iterable[str]) -> int:
    """Counts the real numbers in the named tensors: two for each complex number."""
    return sum(weights[n].numel() * (2 if weights[n].is_complex() else 1) for n in names)


def divide(sizes: Mapping[str, int], width: int) -> Iterator[list[Part]]:
    """Yields consecutive blocks of vectors with ``width`` values; the last one may have fewer.

    ``sizes`` are the sizes of the vectors by their names.
    """
    block: list[Part] = []
    free = width
    for name, size in sizes.items():
        start = 0
        while start < size:
            stop = min(size, start + free)
            block.append((name, start, stop))
            free -= stop - start
            start = stop
            if not free:
                yield block
                block, free = [], width
    if block:
        yield block


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yields the same piece of each of several tensors of one shape, flattened, in float64."""
    flat = [flatten_real(tensor) for tensor in tensors]
    for start in range(0, flat[0].numel(), _PIECE):
        yield tuple(t[start : start + _PIECE].to(torch.float64) for t in flat)


def working_type(*tensors: Tensor) -> torch.dtype:
    """Returns the promoted dtype of tensors, at least float32 or complex64."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def norm(weights: Weights, names: Iterable[str] | None = None) -> float:
    """Computes the Euclidean norm ‖θ‖ over the named tensors together; all by default."""
    total = 0.0
    for name in weights if names is None else names:
        for (x,) in pieces(weights[name]):
            total += float(x.dot(x))
    return math.sqrt(total)


def distance(a: Weights, b: Weights, names: Iterable[str] | None = None) -> float:
    """Computes the Euclidean distance ‖b − a‖ over the named tensors; all of ``a`` by default."""
    total = 0.0
    for name in a if names is None else names:
        for x, y in pieces(a[name], b[name]):
            d = y - x
            total += float(d.dot(d))
    return math.sqrt(total)


def identical(a: Tensor, b: Tensor) -> bool:
    """Returns whether two tensors have the same dtype, shape and values."""
    return a.dtype == b.dtype and torch.equal(a, b)


def cosine(a: Tensor, b: Tensor) -> float:
    """Computes ⟨a, b⟩ / (‖a‖ ‖b‖) of two tensors of one shape; nan where one of them is zero."""
    product = sum(float(x.dot(y)) for x, y in pieces(a, b))
    lengths = norm({"": a}) * norm({"": b})
    return product / lengths if lengths else math.nan


def mismatches(found: Weights, expected: Weights) -> list[str]:
    """Describes the differences between available and required tensors.

    Returns:
        One phrase per name that is missing, unexpected, or has another shape or kind of number
        (floating-point, integer, complex); empty if all match.
    """
    phrases = [
        f"missing {name} {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name not in found
    ]
    for name, tensor in found.items():
        if name not in expected:
            phrases.append(f"unexpected {name} {list(tensor.shape)}")
        elif tensor.shape != expected[name].shape:
            phrases.append(
                f"{name} is {list(tensor.shape)}, not {list(expected[name].shape)} as needed"
            )
        elif number_kind(tensor) != number_kind(expected[name]):
            phrases.append(f"{name} is {_type(tensor)}, not {_type(expected[name])} as needed")
    return phrases


def select_names(names: Iterable[str], only: Iterable[str], excluded: Iterable[str]) -> list[str]:
    """Returns the names that match one of the shell patterns ``only`` and none of ``excluded``.

    If there are no patterns ``only``, all names match.

    Raises:
        UsageError: A pattern matches no name, or no name is left.
    """
    names, only, excluded = list(names), list(only), list(excluded)
    for pattern in [*only, *excluded]:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(
                f"the pattern {pattern!r} matches none of the {len(names)} tensors",
                f"Examples: {', '.join(names[:3])}",
            )
    selected = [
        name
        for name in names
        if (not only or any(fnmatchcase(name, p) for p in only))
        and not any(fnmatchcase(name, p) for p in excluded)
    ]
    if not selected:
        raise UsageError("--only and --except leave no tensor to move", "Widen the patterns")
    return selected


def known_buffers(names: Iterable[str]) -> list[str]:
    """Lists the floating-point buffers of PyTorch layers, recognised by their names.

    A file does not say which of its tensors are parameters. Recognised are the running statistics
    of BatchNorm, the vectors of spectral normalisation, and the masks of pruning.

    Returns:
        The names of buffers, in their order.
    """
    names = list(names)
    known = set(names)

    def is_buffer(name: str) -> bool:
        prefix, _, last = name.rpartition(".")
        if last in {"running_mean", "running_var"}:
            return True
        if last in {"_u", "_v"}:
            return "parametrizations" in prefix.split(".")
        stem, _, kind = name.rpartition("_")
        return kind in {"u", "v", "mask"} and f"{stem}_orig" in known

    return [name for name in names if is_buffer(name)]


def number_kind(tensor: Tensor) -> tuple[bool, bool]:
    """Returns whether numbers are floating-point, and whether they are complex."""
    return tensor.is_floating_point(), tensor.is_complex()


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
