"""Taylor polynomials of degree two along a line, computed forward through a model.

With θ(α + t) = W + t V every tensor of a forward pass is x(t) = x + t x₁ + t² x₂ / 2 up to terms of
order t³. A product of a tensor and a weight needs five products for all three coefficients,
x W, x₁ W + x V and x₂ W + 2 x₁ V; forward mode nested in itself needs eight, since it computes
x₁ twice (Griewank & Walther 2008, Evaluating Derivatives, chapter 13). The coefficients of any
other function follow from its first and second directional derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.func import jvp
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

__all__ = ["TaylorTensor", "apply", "values"]

# Affine in their input, and in their weight and bias together.
_LAYERS = frozenset({F.linear, F.conv1d, F.conv2d, F.conv3d})

# Linear in their first argument.
_LINEAR = frozenset({
    torch.flatten, torch.mean, torch.permute, torch.reshape, torch.squeeze, torch.sum,
    torch.transpose, torch.unsqueeze, Tensor.__getitem__, Tensor.contiguous, Tensor.flatten,
    Tensor.mean, Tensor.permute, Tensor.reshape, Tensor.squeeze, Tensor.sum, Tensor.transpose,
    Tensor.unflatten, Tensor.unsqueeze, Tensor.view, F.adaptive_avg_pool2d, F.avg_pool2d,
    torch.div, Tensor.div, Tensor.__truediv__,
})  # fmt: skip

# Linear in both arguments together, and in each alone.
_SUMS = frozenset({
    torch.add, torch.sub, Tensor.__add__, Tensor.__radd__, Tensor.__sub__, Tensor.add, Tensor.sub,
})  # fmt: skip
_PRODUCTS = frozenset({
    torch.bmm, torch.matmul, torch.mul, Tensor.__matmul__, Tensor.__mul__, Tensor.__rmul__,
    Tensor.bmm, Tensor.matmul, Tensor.mul,
})  # fmt: skip

_RELU = frozenset({F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_})


_Parts = tuple[Any, Any, Any]


@dataclass
class _Coefficients:
    """A value with its first and second derivative; None is zero."""

    value: Tensor
    first: Tensor | None
    second: Tensor | None


class TaylorTensor(Tensor):
    """A tensor that depends on t, as x + t x₁ + t² x₂ / 2.

    Args:
        value: x.
        first: x₁; None if zero.
        second: x₂; None if zero.
    """

    coefficients: _Coefficients

    @staticmethod
    def __new__(cls, value: Tensor, first: Tensor | None, second: Tensor | None = None) -> Self:
        """Makes a tensor that has the shape, type and device of the value."""
        self: Self = Tensor._make_subclass(cls, value)
        self.coefficients = _Coefficients(value, first, second)
        return self

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Computes the coefficients of a function's result."""
        kwargs = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            if func in _LAYERS:
                return _layer(func, *args, **kwargs)
            if func in _RELU:
                return _relu(func, *args, **kwargs)
            others = tree_flatten((args[1:], kwargs))[0]
            # A division may round its result, and then it is not linear.
            linear = func in _LINEAR and "rounding_mode" not in kwargs
            if linear and not any(isinstance(x, TaylorTensor) for x in others):
                return _linear(func, args[0], args[1:], kwargs)
            if func in _PRODUCTS and len(args) == 2 and not kwargs:
                return _product(func, *map(_parts, args))
            if func in _SUMS and len(args) == 2 and not kwargs:
                return _sum(func, *map(_parts, args))
            name = getattr(func, "__name__", "")
            if name == "__get__" and not isinstance(shape := func(*values(args)), Tensor):
                # A property such as the shape, but not the transpose.
                return shape
            if "out" in kwargs or name == "__setitem__":
                raise NotImplementedError(f"{name} of a Taylor polynomial")
            modifies = name.endswith("_") and not name.endswith("__") and bool(args)
            result = _generic(func, args, kwargs, modifies=modifies)
            return _modified(args[0], result) if modifies else result


def values(tree: Any) -> Any:
    """Returns any nest with the value of each Taylor tensor in its place."""
    return tree_map_only(TaylorTensor, lambda x: x.coefficients.value, tree)


def apply(function: Callable[..., Any], *args: Any) -> Any:
    """Applies any function to Taylor tensors.

    Args:
        function: The function.
        args: Its arguments: any nests.

    Returns:
        Its result, each tensor of floating-point numbers a Taylor tensor.
    """
    with torch._C.DisableTorchFunctionSubclass():
        return _generic(function, args, {}, modifies=False)


def _modified(target: Any, result: TaylorTensor) -> TaylorTensor:
    """Gives a tensor that a function has modified its new coefficients."""
    if not isinstance(target, TaylorTensor):
        raise NotImplementedError("a tensor that becomes a Taylor polynomial in place")
    target.coefficients = result.coefficients
    return target


def _generic(
    function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], *, modifies: bool
) -> Any:
    """Applies a function by two nested forward modes: D f[x₁] and D² f[x₁, x₁] + D f[x₂]."""
    leaves, structure = tree_flatten((args, dict(kwargs)))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, TaylorTensor)]
    if not places:
        return function(*args, **kwargs)
    parts = [leaves[i].coefficients for i in places]
    number = len(parts)
    layout: list[Any] = []

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        filled = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            filled[i] = tensor.clone() if modifies and i == 0 else tensor
        own_args, own_kwargs = tree_unflatten(filled, structure)
        found, out = tree_flatten(function(*own_args, **own_kwargs))
        moving = [isinstance(x, Tensor) and x.is_floating_point() for x in found]
        layout[:] = [found, moving, out]
        moved = [x for x, moves in zip(found, moving, strict=True) if moves]
        # One more, as forward mode needs one, and a function may return sizes only.
        return (*moved, tensors[0].new_zeros(()))

    def once(*both: Tensor) -> Any:
        return jvp(call, both[:number], both[number:])

    value = tuple(x.value for x in parts)
    first, second = (
        tuple(
            torch.zeros_like(x.value) if t is None else t for x, t in zip(parts, own, strict=True)
        )
        for own in ([x.first for x in parts], [x.second for x in parts])
    )
    nested: Any = jvp(once, (*value, *first), (*first, *second))
    (y, y1), (_, y2) = nested
    found, moving, out = layout
    results = map(TaylorTensor, y[:-1], y1, y2)
    return tree_unflatten(
        [next(results) if moves else x for x, moves in zip(found, moving, strict=True)], out
    )


def _linear(
    function: Callable[..., Any], x: TaylorTensor, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> TaylorTensor:
    own = x.coefficients
    value, first, second = (
        None if part is None else function(part, *args, **kwargs)
        for part in (own.value, own.first, own.second)
    )
    assert value is not None
    return TaylorTensor(value, first, second)


def _relu(function: Callable[..., Any], x: TaylorTensor, inplace: bool = False) -> TaylorTensor:
    own = x.coefficients
    value = torch.relu(own.value)
    first, second = (
        None if part is None else torch.ops.aten.threshold_backward(part, value, 0)
        for part in (own.first, own.second)
    )
    result = TaylorTensor(value, first, second)
    modifies = inplace or function in {torch.relu_, Tensor.relu_}
    return _modified(x, result) if modifies else result


def _parts(x: Any) -> _Parts:
    """Returns the coefficients of an argument: a tensor, a number or None."""
    if isinstance(x, TaylorTensor):
        own = x.coefficients
        return own.value, own.first, own.second
    return x, None, None


def _layer(
    function: Callable[..., Tensor],
    input: Tensor,  # noqa: A002 - the names are PyTorch's
    weight: Tensor,
    bias: Tensor | None = None,
    *rest: Any,
    **options: Any,
) -> TaylorTensor:
    """A linear layer or a convolution, by the rule for products."""
    x, w = _parts(input), _parts(weight)
    product = _product(lambda x, w: function(x, w, None, *rest, **options), x, w).coefficients
    shape = (-1,) if function is F.linear else (-1, *[1] * (weight.ndim - 2))
    parts: list[Any] = [product.value, product.first, product.second]
    for order, own in enumerate(_parts(bias)):
        if own is not None:
            added = own.view(shape)
            part = parts[order]
            parts[order] = added.expand_as(parts[0]) if part is None else part.add_(added)
    return TaylorTensor(*parts)


def _product(function: Callable[[Any, Any], Tensor], x: _Parts, w: _Parts) -> TaylorTensor:
    """A function that is linear in each of two arguments, by Leibniz' rule."""
    results: list[Any] = []
    for terms in (((1, 0, 0),), ((1, 1, 0), (1, 0, 1)), ((1, 2, 0), (1, 0, 2), (2, 1, 1))):
        total = None
        for factor, i, k in terms:
            if x[i] is None or w[k] is None:
                continue
            term = function(x[i], w[k])
            term = term if factor == 1 else term.mul_(factor)
            total = term if total is None else total.add_(term)
        results.append(total)
    return TaylorTensor(*results)


def _sum(function: Callable[[Any, Any], Tensor], x: _Parts, y: _Parts) -> TaylorTensor:
    """A function that is linear in two arguments together."""
    value = function(x[0], y[0])
    zero = value.new_zeros(())
    return TaylorTensor(
        value,
        *(
            None
            if a is None and b is None
            else function(zero if a is None else a, zero if b is None else b).expand_as(value)
            for a, b in zip(x[1:], y[1:], strict=True)
        ),
    )
