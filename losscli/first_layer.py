"""A first layer, computed for all points of a slice at once.

Before a forward pass first uses a moving tensor, nothing in it depends on the point. So where that
first use is a layer which is affine in its weight and bias, its output at a point is the same
combination of its outputs at the ends of the slice as the point itself is of the ends: a product
for each end serves all points. The first use is found by watching a forward pass on every batch,
whatever the model. What a watcher cannot see, such as compiled code, is found out by numbers: the
objective holds the result against the plain way before it relies on it.
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

__all__ = ["FirstLayer", "Watch"]

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

    def at(self, point: Sequence[float], tensors: Mapping[str, Tensor]) -> TorchFunctionMode:
        """Answers the layer's first call from what is known; everything else goes through.

        Args:
            point: The coordinates of the point.
            tensors: The tensors of the model that is run.

        Returns:
            A context to run the forward pass in.
        """
        return _Replay(self, tensors[self.weight], point)


class Watch(TorchFunctionMode):
    """Watches a forward pass for its first use of a moving tensor.

    Args:
        tensors: The moving tensors by name.
        slice_: The slice that they move in.
        dtype: The type of the forward pass.

    Attributes:
        layer: The first layer; None where the first use is not affine, or before it.
    """

    def __init__(self, tensors: Mapping[str, Tensor], slice_: Slice, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer: FirstLayer | None = None
        self._names = {id(tensor): name for name, tensor in tensors.items()}
        self._slice = slice_
        self._dtype = dtype
        self._seen = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not self._seen and func not in _HARMLESS and self._uses((args, kwargs)):
            self._seen = True
            # Here and now: the layer's input may be overwritten later in the pass.
            self.layer = self._compute(func, args, kwargs)
        return func(*args, **kwargs)

    def _compute(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> FirstLayer | None:
        weight, bias = _argument(args, kwargs, 1, "weight"), _argument(args, kwargs, 2, "bias")
        if func not in _AFFINE or id(weight) not in self._names:
            return None
        parts = [weight]
        if func is F.embedding:
            # Behind its weight an embedding has options, and one of them changes the weight.
            if _argument(args, kwargs, 3, "max_norm") is not None:
                return None
        elif id(bias) in self._names:
            parts.append(bias)
        elif bias is not None and not self._slice.barycentric:
            return None
        ids = {id(part) for part in parts}
        rest = [value for value in (*args, *kwargs.values()) if id(value) not in ids]
        # In two moving tensors a product is not affine.
        if self._uses(rest):
            return None
        moving = {key: self._names[key] for key in ids}
        try:
            products = [
                _with_tensors(
                    func, args, kwargs, {k: end[n].to(self._dtype) for k, n in moving.items()}
                )
                for end in self._slice.ends
            ]
        except RuntimeError:  # as within functorch's transforms
            return None
        return FirstLayer(func, self._names[id(weight)], products, self._slice)

    def _uses(self, value: Any) -> bool:
        if isinstance(value, Tensor):
            return id(value) in self._names
        if isinstance(value, Mapping):
            value = value.values()
        elif not isinstance(value, tuple | list):
            return False
        return any(map(self._uses, value))


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int, name: str) -> Any:
    return args[position] if len(args) > position else kwargs.get(name)


def _with_tensors(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tensors: Mapping[int, Tensor],
) -> Tensor:
    """Makes a call with other tensors in the place of those with the given ids."""
    result: Tensor = func(
        *(tensors.get(id(value), value) for value in args),
        **{key: tensors.get(id(value), value) for key, value in kwargs.items()},
    )
    return result


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
            and _argument(args, kwargs, 1, "weight") is self._weight
        ):
            self._layer = None
            return layer.slice_.combine(layer.products, self._point)
        return func(*args, **kwargs)
