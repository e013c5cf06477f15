"""Model, loss and data: per-example losses at points of weight space. The room for all devices.

However points are evaluated, one law holds: the numbers of the checkpoint loaded plainly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from losscli.datasets import DataSet, Inputs, Split, leaves, map_inputs
from losscli.errors import (
    LosscliError,
    LossError,
    ModelError,
    NondeterministicModelError,
    one_line,
)
from losscli.geometry import Slice
from losscli.losses import PerExample, cross_entropy
from losscli.weights import Weights

__all__ = ["Evaluation", "Objective", "Progress"]

Progress = Callable[[float], None]
"""Called with the share of a point that was done since the last call."""

_BATCH = {"cpu": 512}
_BATCH_ELSEWHERE = 4096


@dataclass(frozen=True)
class Evaluation:
    """What a split gives at P points.

    Attributes:
        losses: The loss of each example at each point, ``[P, N]``, on the CPU; float64 for a
            forward pass in float64, else float32.
        metrics: The mean of each metric at each point, ``[P]``, float64, on the CPU.
    """

    losses: Tensor
    metrics: Mapping[str, Tensor]


class Objective:
    """The empirical risk of a model on a data set, as a function of the model's weights.

    Args:
        model: The model. The objective takes it over: moves it, puts it into eval mode and
            overwrites its weights.
        loss: The per-example loss.
        metrics: The per-example metrics by name.
        data: The data; each split is moved to the device once.
        device: Where to compute.
        dtype: The type of the forward pass. Losses of half-precision outputs are taken in float32.
        batch_size: Examples a forward pass; by the device where it is None.

    Attributes:
        tensors: The model's parameters and buffers by the names of its state dict.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: PerExample,
        metrics: Mapping[str, PerExample],
        data: DataSet,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        batch_size: int | None = None,
    ) -> None:
        self.model = model.to(device=device, dtype=dtype).eval().requires_grad_(requires_grad=False)
        self.loss = loss
        self.metrics = dict(metrics)
        self.data = data
        self.device = device
        self.dtype = dtype
        self.batch_size = batch_size or _BATCH.get(device.type, _BATCH_ELSEWHERE)
        self.splits = {name: split.to(device) for name, split in data.splits.items()}
        self.tensors: dict[str, Tensor] = {
            name: tensor
            for name, tensor in self.model.state_dict(keep_vars=True).items()
            if isinstance(tensor, Tensor)
        }
        self._copies_inputs = False

    def first_batches(self) -> dict[str, Split]:
        """Takes a sample of the data for checks.

        Returns:
            The first batch of each split.
        """
        return {name: split.take(slice(0, self.batch_size)) for name, split in self.splits.items()}

    @torch.no_grad()
    def load(self, weights: Weights) -> None:
        """Loads every tensor plainly; what a slice does not move stays as it was last loaded.

        Args:
            weights: All tensors of the model.
        """
        self.model.load_state_dict(dict(weights), strict=False)

    @torch.no_grad()
    def check(self, weights: Weights) -> None:
        """Makes sure that the model, the loss and the data work together, on a first batch.

        Args:
            weights: All tensors of the model; they stay loaded.

        Raises:
            LossError: Labels are out of the model's range.
            NondeterministicModelError: One point has two answers.
        """
        self.load(weights)
        for name, split in self.first_batches().items():
            inputs = self.data.prepare(map_inputs(Tensor.clone, split.inputs), self.dtype)
            versions = [tensor._version for tensor in leaves(inputs)]
            outputs = self._forward(inputs)
            # A model that writes on its inputs would spoil them for every later point.
            self._copies_inputs |= versions != [tensor._version for tensor in leaves(inputs)]
            self._check_labels(outputs, name)
            self._per_example(self.loss, outputs, split.targets, "loss")
            for metric, function in self.metrics.items():
                self._per_example(function, outputs, split.targets, f"metric {metric!r}")
            first, second = (self._walk(_Plain(self), split).losses for _ in range(2))
            if not torch.allclose(first, second, rtol=1e-5, atol=1e-7, equal_nan=True):
                raise NondeterministicModelError(
                    "the model gives two answers for the same weights and data, even in eval mode",
                    "Take the randomness (dropout outside nn.Dropout, sampling) out of its forward",
                )

    @torch.no_grad()
    def plain(
        self,
        weights: Weights,
        splits: Mapping[str, Split] | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Evaluation]:
        """Evaluates one point as anybody would: ``load_state_dict``, then batch by batch.

        Args:
            weights: All tensors of the model; they stay loaded.
            splits: The examples; all by default.
            progress: Told how far it is.

        Returns:
            For each split its evaluation at this one point, P = 1.
        """
        self.load(weights)
        return self._evaluate(_Plain(self), splits, progress)

    @torch.no_grad()
    def at(
        self,
        slice_: Slice,
        coordinates: Sequence[Sequence[float]],
        splits: Mapping[str, Split] | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Evaluation]:
        """Evaluates points of a slice: their weights are made once, then the data goes by once.

        Args:
            slice_: The slice, its ends on this objective's device. Tensors that it does not move
                keep the values last loaded; those that it moves are left at an unknown point.
            coordinates: The P points.
            splits: The examples; all by default.
            progress: Told how far it is.

        Returns:
            For each split its evaluation at the P points.
        """
        points = _Points(self, slice_, coordinates)
        try:
            return self._evaluate(points, splits, progress)
        finally:
            points.release()

    def _evaluate(
        self,
        points: _Plain | _Points,
        splits: Mapping[str, Split] | None,
        progress: Progress | None,
    ) -> dict[str, Evaluation]:
        splits = self.splits if splits is None else splits
        total = sum(map(len, splits.values()))

        def tell(examples: int) -> None:
            if progress is not None:
                progress(examples / total)

        return {name: self._walk(points, split, tell) for name, split in splits.items()}

    def _walk(
        self,
        points: _Plain | _Points,
        split: Split,
        tell: Callable[[int], None] = lambda _: None,
    ) -> Evaluation:
        """Takes all points through the data, a batch at a time, without waiting for the device."""
        exact = torch.float64 if self.dtype == torch.float64 else torch.float32
        losses = torch.empty(len(points), len(split), dtype=exact, device=self.device)
        # float64 where the device has it: MPS does not, and counts of examples fit float32 there.
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        sums = {
            name: torch.zeros(len(points), dtype=wide, device=self.device) for name in self.metrics
        }
        for start in range(0, len(split), self.batch_size):
            stop = min(start + self.batch_size, len(split))
            batch = split.take(slice(start, stop))
            inputs = self.data.prepare(batch.inputs, self.dtype)
            for p, outputs in enumerate(points.outputs(inputs)):
                losses[p, start:stop] = self._per_example(self.loss, outputs, batch.targets, "loss")
                for name, function in self.metrics.items():
                    values = self._per_example(function, outputs, batch.targets, f"metric {name!r}")
                    sums[name][p] += values.to(wide).sum()
                tell(stop - start)
        return Evaluation(
            losses.cpu(),
            {name: total.cpu().to(torch.float64) / len(split) for name, total in sums.items()},
        )

    def _forward(self, inputs: Inputs) -> Any:
        if self._copies_inputs:
            inputs = map_inputs(Tensor.clone, inputs)
        try:
            if isinstance(inputs, Tensor):
                outputs = self.model(inputs)
            elif isinstance(inputs, tuple):
                outputs = self.model(*inputs)
            else:
                outputs = self.model(**inputs)
        except (torch.OutOfMemoryError, MemoryError, LosscliError):
            raise
        except Exception as error:
            shapes = " and ".join(str(list(tensor.shape)) for tensor in leaves(inputs))
            raise ModelError(
                f"the model fails on inputs of shape {shapes}: {one_line(error)}",
                "Do --model and --data belong together? (flatten=true flattens images)",
            ) from error
        # Hugging Face models wrap their scores.
        outputs = getattr(outputs, "logits", outputs)
        half = isinstance(outputs, Tensor) and outputs.dtype in {torch.float16, torch.bfloat16}
        return outputs.float() if half else outputs

    def _per_example(
        self, function: PerExample, outputs: Any, targets: Tensor, what: str
    ) -> Tensor:
        try:
            values = function(outputs, targets)
        except (torch.OutOfMemoryError, MemoryError, LosscliError):
            raise
        except Exception as error:
            raise LossError(f"the {what} fails: {one_line(error)}") from error
        if not isinstance(values, Tensor) or values.shape != targets.shape[:1]:
            got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise LossError(
                f"the {what} gives {got} for a batch of {len(targets)} examples",
                "Return one number an example, as with reduction=none",
            )
        return values

    def _check_labels(self, outputs: Any, name: str) -> None:
        """Finds labels out of range before a GPU kernel does, which would end the process."""
        if self.loss is not cross_entropy or not isinstance(outputs, Tensor) or outputs.ndim < 2:
            return
        targets = self.splits[name].targets
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= outputs.shape[1]:
            wrong = low if low < 0 else high
            raise LossError(
                f"the split {name!r} has the label {wrong}, and the model's {outputs.shape[1]} "
                f"outputs stand for the labels 0 to {outputs.shape[1] - 1}",
                "Choose a model or data with as many classes",
            )


class _Plain:
    """The one point that is loaded."""

    def __init__(self, objective: Objective) -> None:
        self._forward = objective._forward

    def __len__(self) -> int:
        return 1

    def outputs(self, inputs: Inputs) -> Iterator[Any]:
        yield self._forward(inputs)


class _Points:
    """P points of a slice, one after the other; their first layer is computed for all at once."""

    def __init__(
        self, objective: Objective, slice_: Slice, coordinates: Sequence[Sequence[float]]
    ) -> None:
        self._objective = objective
        self._slice = slice_
        self._coordinates = coordinates
        moving = {name: objective.tensors[name] for name in slice_.ends[0]}
        self._moving = moving
        self._names = {id(tensor): name for name, tensor in moving.items()}
        self._own = {name: tensor.data for name, tensor in moving.items()}
        if len(coordinates) == 1:
            # A single point needs no memory of its own: the model's will do.
            stacks = {name: own.unsqueeze(0) for name, own in self._own.items()}
        else:
            stacks = {
                name: own.new_empty(len(coordinates), *own.shape) for name, own in self._own.items()
            }
        for name, stack in stacks.items():
            ends = [_working(end[name], objective.dtype) for end in slice_.ends]
            for out, point in zip(stack, coordinates, strict=True):
                if out.dtype == ends[0].dtype:
                    slice_.combine(ends, point, out)
                else:
                    out.copy_(slice_.combine(ends, point))
        self._stacks = stacks

    def __len__(self) -> int:
        return len(self._coordinates)

    def outputs(self, inputs: Inputs) -> Iterator[Any]:
        first = self._first_layer(inputs)
        for p, point in enumerate(self._coordinates):
            for name, tensor in self._moving.items():
                tensor.data = self._stacks[name][p]
            if first is None:
                yield self._objective._forward(inputs)
            else:
                with first.at(point):
                    outputs = self._objective._forward(inputs)
                yield outputs

    def release(self) -> None:
        for name, tensor in self._moving.items():
            tensor.data = self._own[name]

    def _first_layer(self, inputs: Inputs) -> _FirstLayer | None:
        """Finds the first use of a moving tensor; what goes into it is the same at all points."""
        if len(self._coordinates) <= len(self._slice.ends):
            return None
        try:
            with _FirstUse(self._names):
                self._objective._forward(inputs)
        except _Found as found:
            call = found.call
        else:
            return None
        weight, bias = call.argument(1, "weight"), call.argument(2, "bias")
        if call.function not in _AFFINE or id(weight) not in self._names:
            return None
        if call.function is F.embedding:
            # Behind its weight an embedding has options, not a bias.
            if call.argument(3, "max_norm") is not None:
                return None
        elif bias is not None and id(bias) not in self._names and not self._slice.barycentric:
            return None
        products = [
            call.with_tensors({
                id(self._moving[name]): end[name].to(self._objective.dtype)
                for name in map(self._names.get, (id(weight), id(bias)))
                if name is not None
            })
            for end in self._slice.ends
        ]
        return _FirstLayer(call.function, weight, products, self._slice)


def _working(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Half-precision tensors move in float32."""
    return tensor.to(torch.float64 if dtype == torch.float64 else torch.float32)


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
    def __init__(self, call: _Call) -> None:
        self.call = call


class _FirstUse(TorchFunctionMode):
    """Stops a forward pass where it first uses one of some tensors."""

    def __init__(self, ids: Mapping[int, str]) -> None:
        super().__init__()
        self._ids = ids

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
            return id(value) in self._ids
        if isinstance(value, Mapping):
            value = value.values()
        elif not isinstance(value, tuple | list):
            return False
        return any(map(self._uses, value))


@dataclass(frozen=True)
class _FirstLayer:
    """A layer whose input is the same at all points, and which is affine in its weights.

    So its output at a point is the same combination of its outputs at the ends of the slice as
    the point itself is of the ends: one product for each end serves all points.
    """

    function: Callable[..., Any]
    weight: Tensor
    products: Sequence[Tensor]
    slice_: Slice

    def at(self, point: Sequence[float]) -> _Replay:
        return _Replay(self, point)


class _Replay(TorchFunctionMode):
    """Answers the first call of a layer from what is known, and lets everything else through."""

    def __init__(self, layer: _FirstLayer, point: Sequence[float]) -> None:
        super().__init__()
        self._layer: _FirstLayer | None = layer
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
            and _Call(func, args, kwargs).argument(1, "weight") is layer.weight
        ):
            self._layer = None
            return layer.slice_.combine(layer.products, self._point)
        return func(*args, **kwargs)
