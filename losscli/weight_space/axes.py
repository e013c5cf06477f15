"""Axes of tensors as products and sums of leaves that may be permuted.

A leaf of size n stands for n units that may be permuted, or that may not if the leaf is pinned. An
axis is a leaf, a product of axes (such as a flattened channels × height × width), or a sum of axes
(a concatenation). Axes that must be permuted together are tied. Tying, splitting and pinning only
reduce the possible permutations, so earlier conclusions about an axis stay valid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["Axis", "concatenate", "cut", "multiply", "pin", "regroup", "tie", "units"]

# A product with a larger outer factor is pinned instead of being expanded into a sum.
_MAX_TERMS = 4096


class Axis:
    """One axis of a tensor; a node of a union-find structure of tied axes.

    Args:
        size: Size of the axis.
        pinned: Whether nothing on it may be permuted.
    """

    __slots__ = ("_factors", "_forward", "_terms", "pinned", "size")

    def __init__(self, size: int, *, pinned: bool = False) -> None:
        self.size = size
        self.pinned = pinned
        self._factors: list[Axis] = []
        self._terms: list[Axis] = []
        self._forward: Axis | None = None


def multiply(axes: Sequence[Axis]) -> Axis:
    """Flattens axes, the outermost first, into their product."""
    factors = [f for axis in axes for f in _factors(axis)]
    if len(factors) == 1:
        return factors[0]
    product = Axis(_product(factors), pinned=not factors)
    product._factors = factors
    return product


def concatenate(axes: Sequence[Axis]) -> Axis:
    """Concatenates axes into their sum."""
    terms = [t for axis in axes for t in _terms(axis)]
    if len(terms) == 1:
        return terms[0]
    total = Axis(sum(t.size for t in terms), pinned=not terms)
    total._terms = terms
    return total


def pin(axis: Axis) -> None:
    """Excludes everything on an axis from permutations."""
    axis = _find(axis)
    parts = axis._factors or axis._terms
    if not parts:
        axis.pinned = True
    for part in parts:
        pin(part)


def tie(a: Axis, b: Axis) -> None:
    """Ties two axes of the same size, so that they are permuted together."""
    a, b = _find(a), _find(b)
    if a is b:
        return
    if _is_leaf(b):
        a, b = b, a
    if not _is_leaf(a):
        _tie_parts(a, b)
    elif a.pinned:
        pin(b)
    a._forward = b


def cut(axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """Cuts an axis into consecutive pieces of the given sizes, with its own size as their sum."""
    left = _terms(axis)
    pieces = []
    for size in sizes:
        piece: list[Axis] = []
        missing = size
        while missing:
            # An earlier cut of a tied axis may have divided this term.
            left[:1] = _terms(left[0])
            if left[0].size > missing:
                left[:1] = _divide(left[0], missing)
            else:
                missing -= left[0].size
                piece.append(left.pop(0))
        pieces.append(concatenate(piece))
    return pieces


def regroup(axes: Sequence[Axis], sizes: Sequence[int]) -> list[Axis]:
    """Reshapes axes in row-major order to the given sizes, which have the same product.

    Returns:
        The new axes. If the factors of old and new axes do not match, both are pinned.
    """
    left = [f for axis in axes for f in _factors(axis)]
    regrouped = []
    for size in sizes:
        factors: list[Axis] = []
        missing = size
        while missing > 1:
            left[:1] = _factors(left[0])
            if missing % left[0].size == 0:
                missing //= left[0].size
                factors.append(left.pop(0))
            elif left[0].size % missing == 0:
                left[:1] = _split(left[0], missing)
            else:
                for axis in axes:
                    pin(axis)
                return [Axis(s, pinned=True) for s in sizes]
        regrouped.append(multiply(factors))
    return regrouped


def units(axis: Axis) -> Iterator[tuple[Axis, Tensor]]:
    """Yields each leaf on an axis that is not pinned, and the positions of its units on the axis.

    The positions are ``[units, block]``. A leaf that occurs several times is yielded several times.
    """
    yield from _units(axis, torch.arange(axis.size).unsqueeze(1))


def _units(axis: Axis, positions: Tensor) -> Iterator[tuple[Axis, Tensor]]:
    axis = _find(axis)
    if axis._factors:
        by_factor = positions.reshape([f.size for f in axis._factors] + [-1])
        for i, factor in enumerate(axis._factors):
            yield from _units(factor, by_factor.movedim(i, 0).reshape(factor.size, -1))
    elif axis._terms:
        start = 0
        for term in axis._terms:
            yield from _units(term, positions[start : start + term.size])
            start += term.size
    elif axis.size > 1 and not axis.pinned:
        yield axis, positions


def _find(axis: Axis) -> Axis:
    while axis._forward is not None:
        axis = axis._forward
    return axis


def _is_leaf(axis: Axis) -> bool:
    return not axis._factors and not axis._terms


def _product(axes: Sequence[Axis]) -> int:
    size = 1
    for axis in axes:
        size *= axis.size
    return size


def _factors(axis: Axis) -> list[Axis]:
    """Returns the factors of an axis, without nested products and factors of size 1."""
    axis = _find(axis)
    if axis._factors:
        return [f for factor in axis._factors for f in _factors(factor)]
    return [axis] if axis.size != 1 else []


def _terms(axis: Axis) -> list[Axis]:
    """Returns the terms of an axis, without nested sums and empty terms."""
    axis = _find(axis)
    if axis._terms:
        return [t for term in axis._terms for t in _terms(term)]
    return [axis] if axis.size else []


def _tie_parts(a: Axis, b: Axis) -> None:
    if a._terms or b._terms:
        for axis in (a, b):
            if axis._factors:
                _expand(axis)
        _tie_terms(_terms(a), _terms(b))
        return
    left, right = _factors(a), _factors(b)
    while left and right:
        left[:1], right[:1] = _factors(left[0]), _factors(right[0])
        x, y = left[0], right[0]
        if x.size == y.size:
            tie(left.pop(0), right.pop(0))
        elif x.size % y.size == 0:
            left[:1] = _split(x, y.size)
        elif y.size % x.size == 0:
            right[:1] = _split(y, x.size)
        else:
            for axis in (*left, *right):
                pin(axis)
            return


def _tie_terms(left: list[Axis], right: list[Axis]) -> None:
    while left and right:
        left[:1], right[:1] = _terms(left[0]), _terms(right[0])
        x, y = left[0], right[0]
        if x.size == y.size:
            tie(left.pop(0), right.pop(0))
        elif x.size > y.size:
            left[:1] = _divide(x, y.size)
        else:
            right[:1] = _divide(y, x.size)


def _split(axis: Axis, outer: int) -> list[Axis]:
    """Splits a leaf or a sum into a product with an outer factor of the given size."""
    inner = axis.size // outer
    if axis._terms:
        # Terms of equal size become tied copies of the first, in a fixed order.
        first, *others = _terms(axis)
        if all(t.size == inner for t in (first, *others)):
            for other in others:
                tie(first, other)
            factors = [Axis(outer, pinned=True), first]
        else:
            pin(axis)
            factors = [Axis(outer, pinned=True), Axis(inner, pinned=True)]
        axis._terms = []
    else:
        factors = [Axis(outer, pinned=axis.pinned), Axis(inner, pinned=axis.pinned)]
    axis._factors = factors
    return factors


def _divide(axis: Axis, size: int) -> list[Axis]:
    """Divides a leaf or a product into terms, with a boundary at the given size if it is a leaf."""
    if axis._factors:
        _expand(axis)
        return _terms(axis)
    axis._terms = [
        Axis(size, pinned=axis.pinned),
        Axis(axis.size - size, pinned=axis.pinned),
    ]
    return axis._terms[:]


def _expand(axis: Axis) -> None:
    """Expands a product into a sum over its outer factor, which is pinned."""
    outer, *inner = _factors(axis)
    if outer._terms:
        terms = [multiply([term, *inner]) for term in _terms(outer)]
    elif outer.size > _MAX_TERMS:
        pin(axis)
        terms = [Axis(axis.size, pinned=True)]
    else:
        pin(outer)
        terms = [multiply(inner)] * outer.size
    axis._factors = []
    axis._terms = terms
