"""The first layer of a model, computed once for all points of a slice.

Until a forward pass first uses a moving tensor, nothing in it depends on the point. If that first
use is a layer which is affine in its weight and bias, its output at a point is the same combination
of its outputs at the ends of the slice as the point is of the ends: one product per end serves all
points. The first use is found by watching a forward pass on every batch, for any model. What a
watcher cannot see, such as compiled code, shows in the numbers, which the objective compares with
those of loaded points before it relies on them. Points at which the weights of a unit nearly cancel
are evaluated without sharing, because the rounding errors of the products would not cancel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.overrides import TorchFunctionMode

from losscli.evaluation import gpu_thresholds
from losscli.evaluation.device import launches_kernels, uses_tensor_cores
from losscli.evaluation.function_mode import METADATA, FunctionMode
from losscli.evaluation.strategies.prefix import Prefix, PrefixRecorder
from losscli.weight_space.slices import Slice

__all__ = ["FirstLayer", "FirstLayerFound", "FirstLayerWatcher"]

# Functions that are affine in their weight and bias.
_AFFINE = frozenset({F.linear, F.embedding, F.conv1d, F.conv2d, F.conv3d})

# Largest ratio of the terms of a combination to the combination itself. The rounding error of a
# shared layer is then at most this many times that of an ordinary forward pass.
_LARGEST_TERMS = 8

# Units times points that are computed together.
_NUMBERS = 1 << 20


@dataclass(frozen=True)
class FirstLayer:
    """The outputs of a first layer on one batch, at the ends of a slice.

    Attributes:
        function: The layer's function.
        weight: The name of its weight.
        products: Its output at each end.
        slice_: The slice.
        gram: ``[R, K, K]``, for each of its R units the inner products of its weights at the K
            ends; None if it was not requested.
    """

    function: Callable[..., Any]
    weight: str
    products: Sequence[Tensor]
    slice_: Slice
    gram: Tensor | None = None

    def nearly_cancels(self, points: Sequence[Sequence[float]]) -> list[bool]:
        """Finds the points at which the products nearly cancel, so that digits are lost.

        The rounding error of each product is relative to its own size. If Σ |c_i| ‖W_i‖ is much
        larger than ‖Σ c_i W_i‖ for some unit, the combination of products has a larger error than
        the product with the combined weights.

        Returns:
            For each point, whether the terms of some unit are too large.
        """
        assert self.gram is not None
        units = list(torch.eye(len(self.products), dtype=torch.float64))
        coefficients = torch.stack([self.slice_.combine(units, point) for point in points])
        gram = self.gram.cpu().double()
        sizes = gram.diagonal(dim1=1, dim2=2).sqrt()
        cancels: list[bool] = []
        for c in torch.split(coefficients, max(1, _NUMBERS // max(1, len(gram)))):
            squares = torch.einsum("pi,rij,pj->pr", c, gram, c).clamp(min=0)
            too_large = c.abs() @ sizes.T > _LARGEST_TERMS * squares.sqrt()
            cancels += too_large.any(1).tolist()
        return cancels

    def output(self, point: Sequence[float]) -> Tensor:
        """Combines the outputs at the ends to the layer's output at a point."""
        return self.slice_.combine(self.products, point)

    def outputs(self, points: Sequence[Sequence[float]]) -> Tensor:
        """Combines the outputs at the ends for several points.

        Args:
            points: The coordinates of P points.

        Returns:
            The layer's outputs, stacked over the points.
        """
        stack = self.products[0].new_empty(len(points), *self.products[0].shape)
        for row, point in zip(stack.unbind(0), points, strict=True):
            self.slice_.combine(self.products, point, row)
        return stack

    def replay(
        self,
        output: Tensor,
        tensors: Mapping[str, Tensor],
        on_use: Callable[[], None] | None = None,
    ) -> TorchFunctionMode:
        """Replaces the layer's first call by an output; all other calls are made.

        Args:
            output: The output.
            tensors: The tensors of the model that is run.
            on_use: Called before any other call that uses the layer's weight; None for nothing.

        Returns:
            A context to run the forward pass in.
        """
        return _Replay(self.function, tensors[self.weight], output, on_use)


class FirstLayerFound(BaseException):
    """Ends a forward pass once the first layer is known.

    Not an `Exception`, so that no error handler in the model catches it.
    """


class FirstLayerWatcher(FunctionMode):
    """Watches a forward pass for its first use of a moving tensor.

    Args:
        tensors: The moving tensors by name.
        model_tensors: All tensors of the model by name.
        slice_: The slice that they move in.
        stops: Whether `FirstLayerFound` ends the forward pass once the first layer is known.
        measures: Whether the first layer's Gram matrix is computed.

    Attributes:
        layer: The first layer; None before the first use, or if that is not affine.
        prefix: The calls before it; None before the first use, or if they contain no layer.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        model_tensors: Mapping[str, Tensor],
        slice_: Slice,
        *,
        stops: bool,
        measures: bool,
    ) -> None:
        super().__init__()
        self.prefix: Prefix | None = None
        self._recorder = PrefixRecorder(model_tensors)
        self.layer: FirstLayer | None = None
        self._stops = stops
        self._measures = measures
        self._names = {id(tensor): name for name, tensor in tensors.items()}
        self._slice = slice_
        self._found_use = False

    def intercept(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Computes the layer of the first call that uses a moving tensor."""
        if self._found_use:
            return function(*args, **kwargs)
        if function in METADATA or not _uses((*args, *kwargs.values()), self._names):
            return self._recorder.record(function, args, kwargs)
        self._found_use = True
        self.prefix = self._recorder.finish()
        # Computed now, because the layer's input may be overwritten later in the pass.
        self.layer = self._compute(function, args, kwargs)
        if self._stops and self.layer is not None:
            raise FirstLayerFound
        return function(*args, **kwargs)

    def _compute(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> FirstLayer | None:
        weight, bias = _argument(args, kwargs, 1, "weight"), _argument(args, kwargs, 2, "bias")
        if func not in _AFFINE or id(weight) not in self._names or not _pays(func, weight):
            return None
        parts = [weight]
        if func is F.embedding:
            # With max_norm an embedding changes its weight.
            if _argument(args, kwargs, 3, "max_norm") is not None:
                return None
        elif id(bias) in self._names:
            parts.append(bias)
        ids = {id(part) for part in parts}
        # A fixed bias is part of every product if the coefficients sum to one; else of the first.
        without: dict[int, Tensor | None] = {}
        if func is not F.embedding and len(parts) == 1 and not self._slice.barycentric:
            without = {id(bias): None}
        rest = [value for value in (*args, *kwargs.values()) if id(value) not in ids]
        # A product of two moving tensors is not affine.
        if _uses(rest, self._names):
            return None
        try:
            # In the type and the layout of the tensors that they replace.
            replacements = [
                {
                    **(without if k else {}),
                    **{
                        id(part): torch.empty_like(part).copy_(end[self._names[id(part)]])
                        for part in parts
                    },
                }
                for k, end in enumerate(self._slice.ends)
            ]
            products = [_with_tensors(func, args, kwargs, tensors) for tensors in replacements]
            # Raises within functorch's transforms, from which no tensor may be kept.
            for product in products:
                product.data_ptr()
            gram = None
            if self._measures:
                inputs = _argument(args, kwargs, 0, "input")
                ends = [(s.get(id(weight), weight), s.get(id(bias), bias)) for s in replacements]
                gram = _gram(func, inputs, ends, products)
        except RuntimeError:
            return None
        return FirstLayer(func, self._names[id(weight)], products, self._slice, gram)


def _pays(function: Callable[..., Any], weight: Tensor) -> bool:
    """Whether combining a layer's outputs takes less time than computing it at every point."""
    # On one core of an Ice Lake Xeon sharing pays from about 16 weights of a unit, and for fewer
    # both take next to no time.
    if function is F.embedding or not launches_kernels(weight.device):
        return True
    least = (
        gpu_thresholds.WORTH_SHARING_ON_TENSOR_CORES
        if uses_tensor_cores(weight.device, weight.dtype)
        else gpu_thresholds.WORTH_SHARING
    )
    return weight[0].numel() >= least


def _gram(
    function: Callable[..., Any],
    inputs: Tensor,
    ends: Sequence[tuple[Tensor, Tensor | None]],
    products: Sequence[Tensor],
) -> Tensor:
    """Computes the inner products of each unit's weights at the ends, scaled by its inputs."""
    # For inputs with the mean square s², the rounding error of a unit's product with its weights w
    # is about ε ‖s w‖. The bias is one more weight, with the input 1.
    wide = torch.float32 if inputs.device.type == "mps" else torch.float64

    def real(tensor: Tensor) -> Tensor:
        parts = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        return parts.flatten(1).to(wide)

    if function is F.embedding:
        # Its units are tokens, and its outputs are exact.
        rows = [real(product.flatten(0, -2)) for product in products]
    else:
        size = _input_sizes(function, inputs, ends[0][0], wide)
        rows = []
        for weight, bias in ends:
            row = real(weight.flatten(1) * size)
            rows.append(row if bias is None else torch.cat([row, real(bias[:, None])], 1))
    gram = rows[0].new_empty(len(rows[0]), len(rows), len(rows))
    for i, x in enumerate(rows):
        for j, y in enumerate(rows[: i + 1]):
            gram[:, i, j] = gram[:, j, i] = torch.linalg.vecdot(x, y)
    return gram


def _input_sizes(
    function: Callable[..., Any], inputs: Tensor, weight: Tensor, wide: torch.dtype
) -> Tensor:
    """The root mean square of the input at each weight: ``[in]``, or ``[out, in/groups · k]``."""
    wide = torch.promote_types(inputs.dtype, wide)
    if function is F.linear:
        rows = inputs.reshape(-1, inputs.shape[-1])
        norms: Tensor = torch.linalg.vector_norm(rows, dim=0, dtype=wide)
        return norms / math.sqrt(len(rows))
    batched = inputs.ndim == weight.ndim
    channels = (inputs.transpose(0, 1) if batched else inputs).flatten(1)
    norms = torch.linalg.vector_norm(channels, dim=1, dtype=wide)
    sizes = (norms / math.sqrt(channels.shape[1])).view(-1, weight.shape[1])
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
    """Makes a call with some of its tensors, given by their ids, replaced."""
    result: Tensor = func(
        *(tensors.get(id(value), value) for value in args),
        **{key: tensors.get(id(value), value) for key, value in kwargs.items()},
    )
    return result


class _Replay(FunctionMode):
    def __init__(
        self,
        function: Callable[..., Any],
        weight: Tensor,
        output: Tensor,
        on_use: Callable[[], None] | None,
    ) -> None:
        super().__init__()
        self._output: Tensor | None = output
        self._function = function
        self._weight = weight
        self._ids = {id(weight)}
        self._on_use = on_use

    def intercept(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        # PyTorch does not let a mode end within a call. From here on it takes one microsecond per
        # call.
        if self._output is None and self._on_use is None:
            return function(*args, **kwargs)
        if (
            self._output is not None
            and function is self._function
            and _argument(args, kwargs, 1, "weight") is self._weight
        ):
            output, self._output = self._output, None
            return output
        if (
            self._on_use is not None
            and function not in METADATA
            and _uses((*args, *kwargs.values()), self._ids)
        ):
            self._on_use()
            # It computes the weight only once.
            self._on_use = None
        return function(*args, **kwargs)


def _uses(values: Iterable[Any], ids: Collection[int]) -> bool:
    """Whether arguments are, or contain, one of the tensors with these ids."""
    for value in values:
        if isinstance(value, Tensor):
            if id(value) in ids:
                return True
        elif isinstance(value, tuple | list):
            if _uses(value, ids):
                return True
        elif isinstance(value, Mapping) and _uses(value.values(), ids):
            return True
    return False
