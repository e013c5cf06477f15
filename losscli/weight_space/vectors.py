"""The vector space of named tensors: differences, norms, and whether two of them match.

Tensors keep the type they are stored in; sums are made in float64, a piece at a time, so that no
float64 copy of a large tensor ever exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from losscli.errors import UsageError
from losscli.files import release_pages

__all__ = [
    "Weights",
    "can_move",
    "choose",
    "cosine",
    "dimension",
    "distance",
    "equal",
    "kind",
    "known_buffers",
    "mismatches",
    "norm",
    "pieces",
    "real",
    "working_type",
]

Weights = Mapping[str, Tensor]

_PIECE = 1 << 20


def can_move(tensor: Tensor) -> bool:
    """Tells whether a tensor can move along a line.

    Args:
        tensor: The tensor.

    Returns:
        Whether its values are real or complex floating-point numbers.
    """
    return tensor.is_floating_point() or tensor.is_complex()


def real(tensor: Tensor) -> Tensor:
    """Flattens a tensor into real numbers.

    Args:
        tensor: The tensor.

    Returns:
        Its values, ``[n]``; of complex numbers the real and imaginary parts, ``[2n]``. A view
        where the tensor is contiguous.
    """
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).reshape(
        -1
    )


def dimension(weights: Weights, names: Iterable[str]) -> int:
    """Counts the real numbers in tensors: two for each complex number.

    Args:
        weights: The tensors.
        names: Which of them count.

    Returns:
        The dimension of the space that they span.
    """
    return sum(weights[n].numel() * (2 if weights[n].is_complex() else 1) for n in names)


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Goes through tensors a piece at a time, for sums in float64.

    Args:
        *tensors: Tensors of one shape.

    Yields:
        The same stretch of each, flattened, in float64.
    """
    flat = [real(tensor) for tensor in tensors]
    for start in range(0, flat[0].numel(), _PIECE):
        yield tuple(t[start : start + _PIECE].to(torch.float64) for t in flat)


def working_type(*tensors: Tensor) -> torch.dtype:
    """Finds the type that points between tensors are made in.

    Args:
        *tensors: The tensors, of any floating-point or complex types.

    Returns:
        The widest of their types; float32 for half precision, complex64 where it is complex.
    """
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def norm(weights: Weights, names: Iterable[str] | None = None) -> float:
    """Computes the Euclidean norm over all tensors together.

    Args:
        weights: The tensors.
        names: Which of them count; all by default.

    Returns:
        ‖θ‖.
    """
    total = 0.0
    for name in weights if names is None else names:
        for (x,) in pieces(weights[name]):
            total += float(x.dot(x))
        release_pages(weights[name])
    return math.sqrt(total)


def distance(a: Weights, b: Weights, names: Iterable[str] | None = None) -> float:
    """Computes the Euclidean distance of two points in weight space.

    Args:
        a: The one point.
        b: The other, with tensors of the same names and shapes.
        names: Which of them count; all of ``a``'s by default.

    Returns:
        ‖b − a‖.
    """
    total = 0.0
    for name in a if names is None else names:
        for x, y in pieces(a[name], b[name]):
            d = y - x
            total += float(d.dot(d))
        release_pages(a[name], b[name])
    return math.sqrt(total)


def equal(a: Tensor, b: Tensor) -> bool:
    """Tells whether two tensors are the same to the last bit of their values.

    Args:
        a: The one tensor.
        b: The other.

    Returns:
        Whether they have one shape and the same values.
    """
    same = torch.equal(a, b)
    release_pages(a, b)
    return same


def cosine(a: Tensor, b: Tensor) -> float:
    """Computes the cosine of the angle between two tensors seen as vectors.

    Args:
        a: The one tensor.
        b: The other, of the same shape.

    Returns:
        ⟨a, b⟩ / (‖a‖ ‖b‖); nan where one of them is zero.
    """
    product = sum(float(x.dot(y)) for x, y in pieces(a, b))
    lengths = norm({"": a}) * norm({"": b})
    return product / lengths if lengths else math.nan


def mismatches(found: Weights, expected: Weights) -> list[str]:
    """Lists in words what keeps tensors from standing in for others.

    Args:
        found: The tensors at hand.
        expected: Those that are needed.

    Returns:
        One phrase for each name that is missing, unexpected, of another shape, or of another kind
        of number (floating-point, whole, complex); empty where all fit.
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
        elif kind(tensor) != kind(expected[name]):
            phrases.append(f"{name} is {_type(tensor)}, not {_type(expected[name])} as needed")
    return phrases


def choose(names: Iterable[str], only: Iterable[str], but: Iterable[str]) -> list[str]:
    """Picks names by shell patterns.

    Args:
        names: The names to pick from.
        only: Patterns of which one must fit; none at all lets every name through.
        but: Patterns of which none may fit.

    Returns:
        The names picked, in their order.

    Raises:
        UsageError: A pattern fits no name, or none is left.
    """
    names, only, but = list(names), list(only), list(but)
    for pattern in [*only, *but]:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(
                f"the pattern {pattern!r} fits none of the {len(names)} tensors",
                f"Their names are such as {', '.join(names[:3])}",
            )
    chosen = [
        name
        for name in names
        if (not only or any(fnmatchcase(name, p) for p in only))
        and not any(fnmatchcase(name, p) for p in but)
    ]
    if not chosen:
        raise UsageError("--only and --except leave no tensor to move", "Widen the patterns")
    return chosen


def known_buffers(names: Iterable[str]) -> list[str]:
    """Lists the floating-point buffers that PyTorch itself registers, known by their names.

    A file does not say which of its tensors are parameters. These are BatchNorm's running
    statistics, the vectors of spectral normalisation, and the masks of pruning.

    Args:
        names: The names of a state dict.

    Returns:
        Those of buffers, in their order.
    """
    names = list(names)
    known = set(names)

    def registered(name: str) -> bool:
        prefix, _, last = name.rpartition(".")
        if last in {"running_mean", "running_var"}:
            return True
        if last in {"_u", "_v"}:
            return "parametrizations" in prefix.split(".")
        stem, _, kind_ = name.rpartition("_")
        return kind_ in {"u", "v", "mask"} and f"{stem}_orig" in known

    return [name for name in names if registered(name)]


def kind(tensor: Tensor) -> tuple[bool, bool]:
    """Tells what numbers a tensor holds.

    Args:
        tensor: The tensor.

    Returns:
        Whether they are floating-point, and whether they are complex; neither where they are whole.
    """
    return tensor.is_floating_point(), tensor.is_complex()


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
