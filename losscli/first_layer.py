"""A first layer, computed for all points of a slice at once.

Before a forward pass first uses a moving tensor, nothing in it depends on the point. So where that
first use is a layer which is affine in its weight and bias, its output at a point is the same
combination of its outputs at the ends of the slice as the point itself is of the ends: a product
for each end serves all points. The first use is found by watching the forward pass of every batch,
whatever the model; nothing about its structure is assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.overrides import TorchFunctionMode

from losscli.geometry import Slice

__all__ = ["FirstLayer"]

# The functions that are affine in their weight and bias.
_AFFINE = frozenset({F.linear, F.embedding, F.conv1d, F.conv2d, F.conv3d})

# What may be asked of a tensor without using its values.
_HARMLESS = frozenset({
    Tensor.dim,
    Tensor.element_size,
    Tensor.is_contiguous,
    Tensor.is_floating_point,
    Tensor.numel,
    Tensor.size,
    Tensor.stride,
    *(
        getattr(Tensor, name).__get__
        for name in ("device", "dtype", "is_cuda", "layout", "ndim", "requires_grad", "shape")
    ),
})


@dataclass(frozen=True)
class FirstLayer:
    """The outputs of a first layer on one batch, at the ends of a slice.

    Attributes:
        function: The layer's function.
        weight: The name of its weight.
        products: Its output at each end.
        slice_: The slice.
    """

    function: Callable[..., Any]
    weight: str
    products: Sequence[Tensor]
    slice_: Slice

    @classmethod
    def find(
        cls,
        forward: Callable[[], Any],
        tensors: Mapping[str, Tensor],
        slice_: Slice,
        dtype: torch.dtype,
    ) -> FirstLayer | None:
        """Finds the first use of a moving tensor and computes it at the ends of the slice.

        Args:
            forward: A forward pass on the batch, with the tensors.
            tensors: The moving tensors by name.
            slice_: The slice that they move in.
            dtype: The type of the forward pass.

        Returns:
            The layer; None where the first use is not affine.
        """
        names = {id(tensor): name for name, tensor in tensors.items()}
        try:
            with _FirstUse(names):
                forward()
        except _Found as found:
            call = found.call
        else:
            return None
        weight, bias = call.argument(1, "weight"), call.argument(2, "bias")
        if call.function not in _AFFINE or id(weight) not in names:
            return None
        if call.function is F.embedding:
            # Behind its weight an embedding has options, and one of them changes the weight.
            if call.argument(3, "max_norm") is not None:
                return None
        elif bias is not None and id(bias) not in names and not slice_.barycentric:
            return None
        moving = [names[id(t)] for t in (weight, bias) if id(t) in names]
        products = [
            call.with_tensors({id(tensors[name]): end[name].to(dtype) for name in moving})
            for end in slice_.ends
        ]
        return cls(call.function, names[id(weight)], products, slice_)

    def at(self, point: Sequence[float], tensors: Mapping[str, Tensor]) -> TorchFunctionMode:
        """Answers the layer's first call from what is known; everything else goes through.

        Args:
            point: The coordinates of the point.
            tensors: The tensors of the model that is run.

        Returns:
            A context to run the forward pass in.
        """
        return _Replay(self, tensors[self.weight], point)


@dataclass(frozen=True)
class _Call:
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def argument(self, position: int, name: str) -> Any:
        return self.args[position] if len(self.args) > position else self.kwargs.get(name)

    def with_tensors(self, tensors: Mapping[int, Tensor]) -> Tensor:
        """Makes the call with other tensors in the place of those with the given ids."""
        args = [tensors.get(id(value), value) for value in self.args]
        kwargs = {key: tensors.get(id(value), value) for key, value in self.kwargs.items()}
        result: Tensor = self.function(*args, **kwargs)
        return result


class _Found(BaseException):
    """The first use was found: a signal, and one that no model's ``except`` may catch."""

    def __init__(self, call: _Call) -> None:
        self.call = call


class _FirstUse(TorchFunctionMode):
    """Stops a forward pass where it first uses one of some tensors."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self._names = names

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _HARMLESS and self._uses((args, kwargs)):
            raise _Found(_Call(func, args, kwargs))
        return func(*args, **kwargs)

    def _uses(self, value: Any) -> bool:
        if isinstance(value, Tensor):
            return id(value) in self._names
        if isinstance(value, Mapping):
            value = value.values()
        elif not isinstance(value, tuple | list):
            return False
        return any(map(self._uses, value))


class _Replay(TorchFunctionMode):
    def __init__(self, layer: FirstLayer, weight: Tensor, point: Sequence[float]) -> None:
        super().__init__()
        self._layer: FirstLayer | None = layer
        self._weight = weight
        self._point = point

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        layer = self._layer
        if (
            layer is not None
            and func is layer.function
            and _Call(func, args, kwargs).argument(1, "weight") is self._weight
        ):
            self._layer = None
            return layer.slice_.combine(layer.products, self._point)
        return func(*args, **kwargs)
