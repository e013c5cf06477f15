"""A first layer, computed for all points of a slice at once.

Before a forward pass first uses a moving tensor, nothing in it depends on the point. So where that
first use is a layer which is affine in its weight and bias, its output at a point is the same
combination of its outputs at the ends of the slice as the point itself is of the ends: a product
for each end serves all points. The first use is found by watching a forward pass on every batch,
whatever the model. What a watcher cannot see, such as compiled code, is found out by numbers: the
objective holds the result against the plain way before it relies on it. Points where the weights of
a unit nearly cancel are evaluated without it, as the rounding errors of the products would not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.overrides import TorchFunctionMode

from losscli.evaluation.function_mode import FunctionMode
from losscli.weight_space.slices import Slice

__all__ = ["FirstLayer", "FirstLayerFound", "Watch"]

# The functions that are affine in their weight and bias.
_AFFINE = frozenset({F.linear, F.embedding, F.conv1d, F.conv2d, F.conv3d})

# How much larger the terms of a combination may be than the combination itself: so many times as
# large as that of a plain forward pass is then the rounding error of a shared layer, at most.
_LARGEST_TERMS = 8

# Units times points that are looked at together.
_NUMBERS = 1 << 20

# What may be asked of a tensor without using its values.
_HARMLESS = frozenset({
    Tensor.dim,
    Tensor.element_size,
    Tensor.is_complex,
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
        gram: ``[R, K, K]``: for each of its R units the inner products of its weights at the K
            ends; None where it was not asked for.
    """

    function: Callable[..., Any]
    weight: str
    products: Sequence[Tensor]
    slice_: Slice
    gram: Tensor | None = None

    def cancels(self, points: Sequence[Sequence[float]]) -> list[bool]:
        """Finds the points where the products nearly cancel, and with them their digits.

        Each product has a rounding error of its own size. Where Σ |c_i| ‖W_i‖ is much larger than
        ‖Σ c_i W_i‖ for some unit, the combination of products has a larger error than the product
        with the combined weights.

        Args:
            points: The coordinates of the points.

        Returns:
            For each point whether some unit's terms are too large.
        """
        assert self.gram is not None
        units = list(torch.eye(len(self.products), dtype=torch.float64))
        shares = torch.stack([self.slice_.combine(units, point) for point in points])
        gram = self.gram.cpu().double()
        sizes = gram.diagonal(dim1=1, dim2=2).sqrt()
        found: list[bool] = []
        for some in torch.split(shares, max(1, _NUMBERS // max(1, len(gram)))):
            squares = torch.einsum("pi,rij,pj->pr", some, gram, some).clamp(min=0)
            lost = some.abs() @ sizes.T > _LARGEST_TERMS * squares.sqrt()
            found += lost.any(1).tolist()
        return found

    def at(self, point: Sequence[float], tensors: Mapping[str, Tensor]) -> TorchFunctionMode:
        """Answers the layer's first call with its output at a point.

        Args:
            point: The coordinates of the point.
            tensors: The tensors of the model that is run.

        Returns:
            A context to run the forward pass in.
        """
        return self.replay(self.output(point), tensors)

    def output(self, point: Sequence[float]) -> Tensor:
        """Combines what is known of the ends.

        Args:
            point: The coordinates of a point.

        Returns:
            The layer's output at the point.
        """
        return self.slice_.combine(self.products, point)

    def replay(self, output: Tensor, tensors: Mapping[str, Tensor]) -> TorchFunctionMode:
        """Answers the layer's first call with an output; everything else goes through.

        Args:
            output: The output.
            tensors: The tensors of the model that is run.

        Returns:
            A context to run the forward pass in.
        """
        return _Replay(self.function, tensors[self.weight], output)


class FirstLayerFound(BaseException):
    """Ends a forward pass whose first layer is known; no handler of errors takes it for one."""


class Watch(FunctionMode):
    """Watches a forward pass for its first use of a moving tensor.

    Args:
        tensors: The moving tensors by name.
        slice_: The slice that they move in.
        stops: Whether `FirstLayerFound` ends the forward pass once the first layer is known.
        measures: Whether the first layer's Gram matrix is computed.

    Attributes:
        layer: The first layer; None where the first use is not affine, or before it.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], slice_: Slice, *, stops: bool, measures: bool
    ) -> None:
        super().__init__()
        self.layer: FirstLayer | None = None
        self._stops = stops
        self._measures = measures
        self._names = {id(tensor): name for name, tensor in tensors.items()}
        self._slice = slice_
        self._seen = False

    def intercept(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Computes the layer of the first call that uses a moving tensor."""
        if not self._seen and function not in _HARMLESS and self._uses((args, kwargs)):
            self._seen = True
            # Here and now: the layer's input may be overwritten later in the pass.
            self.layer = self._compute(function, args, kwargs)
            if self._stops and self.layer is not None:
                raise FirstLayerFound
        return function(*args, **kwargs)

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
        ids = {id(part) for part in parts}
        # What stays is part of every end whose coefficients sum to one; else of the first alone.
        without: dict[int, Tensor | None] = {}
        if func is not F.embedding and len(parts) == 1 and not self._slice.barycentric:
            without = {id(bias): None}
        rest = [value for value in (*args, *kwargs.values()) if id(value) not in ids]
        # In two moving tensors a product is not affine.
        if self._uses(rest):
            return None
        try:
            # In the type and the layout of the part that each stands in for.
            standins = [
                {
                    **(without if k else {}),
                    **{
                        id(part): torch.empty_like(part).copy_(end[self._names[id(part)]])
                        for part in parts
                    },
                }
                for k, end in enumerate(self._slice.ends)
            ]
            products = [_with_tensors(func, args, kwargs, tensors) for tensors in standins]
            # Within functorch's transforms there is no memory to take out of them.
            for product in products:
                product.data_ptr()
            gram = None
            if self._measures:
                inputs = _argument(args, kwargs, 0, "input")
                ends = [(s.get(id(weight), weight), s.get(id(bias), bias)) for s in standins]
                gram = _gram(func, inputs, ends, products)
        except RuntimeError:
            return None
        return FirstLayer(func, self._names[id(weight)], products, self._slice, gram)

    def _uses(self, value: Any) -> bool:
        if isinstance(value, Tensor):
            return id(value) in self._names
        if isinstance(value, Mapping):
            value = value.values()
        elif not isinstance(value, tuple | list):
            return False
        return any(map(self._uses, value))


def _gram(
    function: Callable[..., Any],
    inputs: Tensor,
    ends: Sequence[tuple[Tensor, Tensor | None]],
    products: Sequence[Tensor],
) -> Tensor:
    """Computes the inner products of each unit's weights at the ends, weighted by its inputs."""
    # With inputs of the mean square s², the rounding error of a unit's product with its weights w
    # is about ε ‖s w‖. The bias is one more weight, with the input 1.
    wide = torch.float32 if inputs.device.type == "mps" else torch.float64

    def real(tensor: Tensor) -> Tensor:
        parts = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        return parts.flatten(1).to(wide)

    if function is F.embedding:
        # Its units are tokens, and its products exact.
        rows = [real(product.flatten(0, -2)) for product in products]
    else:
        squares = inputs.abs().to(wide).square()
        if function is F.linear:
            size = squares.flatten(0, -2).mean(0).sqrt()
        else:
            size = _sizes_of_channels(squares, ends[0][0])
        rows = []
        for weight, bias in ends:
            row = real(weight.flatten(1) * size)
            rows.append(row if bias is None else torch.cat([row, real(bias[:, None])], 1))
    return torch.stack([torch.stack([(x * y).sum(1) for y in rows], 1) for x in rows], 1)


def _sizes_of_channels(squares: Tensor, weight: Tensor) -> Tensor:
    """The root mean square of the input at each weight of a kernel, ``[out, in/groups · k]``."""
    batched = squares.ndim == weight.ndim
    channels = squares.transpose(0, 1) if batched else squares
    sizes = channels.flatten(1).mean(1).sqrt().view(-1, weight.shape[1])
    of_units = sizes.repeat_interleave(weight.shape[0] // len(sizes), 0)
    return of_units.repeat_interleave(weight[0, 0].numel(), 1)


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int, name: str) -> Any:
    return args[position] if len(args) > position else kwargs.get(name)


def _with_tensors(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tensors: Mapping[int, Tensor | None],
) -> Tensor:
    """Makes a call with others in the place of the tensors with the given ids."""
    result: Tensor = func(
        *(tensors.get(id(value), value) for value in args),
        **{key: tensors.get(id(value), value) for key, value in kwargs.items()},
    )
    return result


class _Replay(FunctionMode):
    def __init__(self, function: Callable[..., Any], weight: Tensor, output: Tensor) -> None:
        super().__init__()
        self._output: Tensor | None = output
        self._function = function
        self._weight = weight

    def intercept(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        if (
            self._output is not None
            and function is self._function
            and _argument(args, kwargs, 1, "weight") is self._weight
        ):
            output, self._output = self._output, None
            return output
        return function(*args, **kwargs)
