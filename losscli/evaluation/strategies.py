"""Points of a slice on a batch of examples: several strategies, one answer.

The surest strategy loads each point plainly. The others make the weights of all points first and
bind the model's tensors to them, share what a first layer gives, and take the points in turn, in
threads, or all at once. Which of them gives the same numbers is for the objective to prove.
"""

from __future__ import annotations

import copy
import enum
import itertools
import queue
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from losscli.data import Inputs
from losscli.errors import ModelError
from losscli.evaluation.first_layer import FirstLayer, FirstLayerFound, Watch
from losscli.evaluation.recalibration import Layer, Statistics, estimating, layers_of
from losscli.evaluation.spectral import SpectralLayer, normalise
from losscli.weight_space.slices import Slice
from losscli.weight_space.vectors import Weights

__all__ = [
    "Loaded",
    "Network",
    "NothingSharedError",
    "Plain",
    "Points",
    "Record",
    "Stacked",
    "Strategy",
    "combining_type",
    "is_known",
    "tensors_of",
]


# Values that are taken into another type at once: on a CPU so few that they stay in its cache.
_STRETCH = 1 << 14
_STRETCH_ELSEWHERE = 1 << 22


class NothingSharedError(ModelError):
    """A strategy cannot be proved at points where the products at the ends nearly cancel."""


class Record(Protocol):
    """Takes down what the model returns."""

    def one(self, p: int, outputs: Any) -> None:
        """Takes the outputs at one point.

        Args:
            p: Its place among the points.
            outputs: What the model returned for the batch.
        """

    def all(self, outputs: Any) -> None:
        """Takes the outputs at all points.

        Args:
            outputs: What the model returned for the batch, each tensor with a first dimension P.
        """


class Network(Protocol):
    """A model whose weights can be set, as far as points are concerned."""

    model: nn.Module
    tensors: Mapping[str, Tensor]
    dtype: torch.dtype
    spectral: Sequence[SpectralLayer]

    @property
    def statistics(self) -> Sequence[Layer]:
        """The BatchNorm layers whose statistics are estimated anew at every point."""

    def load(self, weights: Weights) -> None:
        """Loads tensors plainly.

        Args:
            weights: The tensors.
        """

    def forward(self, model: Callable[..., Any], inputs: Inputs) -> Any:
        """Runs the model, or what stands in for it.

        Args:
            model: What to call.
            inputs: A prepared batch.

        Returns:
            Its outputs.
        """


class Strategy(enum.Enum):
    """How points are evaluated, from the fastest to the surest."""

    STACKED = enum.auto()
    """All at once, the model mapped over their stacked weights, the first layer shared."""
    THREADS = enum.auto()
    """Bound to replicas of the model in threads, the first layer shared."""
    SHARED = enum.auto()
    """Bound to the model one after the other, the first layer shared."""
    BOUND = enum.auto()
    """Bound to the model one after the other."""
    LOADED = enum.auto()
    """Loaded plainly."""


class Plain:
    """The one point that is loaded.

    Args:
        network: The model.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self._statistics = Statistics(1)

    def __len__(self) -> int:
        return 1

    def estimate(self, inputs: Inputs) -> Iterator[int]:
        """Takes the statistics of a training batch at the point.

        Args:
            inputs: The batch, prepared.

        Yields:
            The point, done.
        """
        with estimating(self._network.statistics) as seen:
            self._network.forward(self._network.model, inputs)
        self._statistics.add(0, seen)
        yield 0

    def adopt(self) -> Collection[str]:
        """Gives the point the statistics of the batches seen.

        Returns:
            The names of these statistics.
        """
        tensors = self._network.tensors
        found = self._statistics.at(0, tensors)
        for name, value in found.items():
            tensors[name].copy_(value)
        return found

    def evaluate(self, inputs: Inputs, record: Record) -> Iterator[int]:
        """Takes a batch to the point.

        Args:
            inputs: The batch, prepared.
            record: Told what the model returns.

        Yields:
            The point, done.
        """
        record.one(0, self._network.forward(self._network.model, inputs))
        yield 0


class Loaded:
    """P points of a slice, each loaded plainly for every batch: slow, and the truth.

    Args:
        network: The model.
        slice_: The slice.
        coordinates: The points.
    """

    def __init__(
        self, network: Network, slice_: Slice, coordinates: Sequence[Sequence[float]]
    ) -> None:
        self._network = network
        self._slice = slice_
        self._coordinates = coordinates
        self._statistics = Statistics(len(coordinates))
        self._own = {
            name: network.tensors[name].clone()
            for layer in network.statistics
            for name in layer.names
        }

    def __len__(self) -> int:
        return len(self._coordinates)

    def estimate(self, inputs: Inputs) -> Iterator[int]:
        """Takes the statistics of a training batch at all points, as the points are asked for.

        Args:
            inputs: The batch, prepared.

        Yields:
            Each point when it is done.
        """
        for p, point in enumerate(self._coordinates):
            self._load(p, point)
            with estimating(self._network.statistics) as seen:
                self._network.forward(self._network.model, inputs)
            self._statistics.add(p, seen)
            yield p

    def adopt(self) -> Collection[str]:
        """Gives every point its statistics of the batches seen: they are loaded with it.

        Returns:
            The names of these statistics.
        """
        return self._statistics.names

    def evaluate(self, inputs: Inputs, record: Record) -> Iterator[int]:
        """Takes a batch to all points, as the points are asked for.

        Args:
            inputs: The batch, prepared.
            record: Told what the model returns.

        Yields:
            Each point when it is done.
        """
        for p, point in enumerate(self._coordinates):
            self._load(p, point)
            record.one(p, self._network.forward(self._network.model, inputs))
            yield p

    def _load(self, p: int, point: Sequence[float]) -> None:
        weights = {}
        for name in self._slice.ends[0]:
            own = self._network.tensors[name]
            ends = [end[name].to(combining_type(own)) for end in self._slice.ends]
            weights[name] = self._slice.combine(ends, point).to(own.dtype)
        estimated = self._statistics.at(p, self._network.tensors)
        self._network.load({**weights, **self._own, **estimated})


class Points:
    """P points of a slice, their weights in memory; a batch is taken to all of them.

    What a first layer gives is computed for all points at once, where that can be. On a CPU the
    points are dealt to as many threads as the operators may use, each with a replica of the model
    and operators of a single thread: so no operator has to wait for its slowest part.

    Args:
        network: The model. Within the context its tensors are bound to those of the points.
        slice_: The slice.
        coordinates: The points.
        strategy: How to evaluate them.
        proving: Whether the strategy is being proved: some point has to share a first layer.
    """

    def __init__(
        self,
        network: Network,
        slice_: Slice,
        coordinates: Sequence[Sequence[float]],
        strategy: Strategy,
        *,
        proving: bool = False,
    ) -> None:
        self._network = network
        self._slice = slice_
        self._coordinates = coordinates
        # Beside the ends there must be enough points for their products to pay.
        self._shares = strategy is not Strategy.BOUND and len(coordinates) > len(slice_.ends)
        self._proving = proving
        # The points where the products at the ends nearly cancel: they share nothing.
        self._apart: frozenset[int] | None = None
        self._known = is_known(network.model)
        self._estimated = [name for layer in network.statistics for name in layer.names]
        self._spectral = [
            layer
            for layer in network.spectral
            if not slice_.ends[0].keys().isdisjoint(layer.sources)
        ]
        self._normalised = [name for layer in self._spectral for name in layer.names]
        names = [*slice_.ends[0], *self._estimated, *self._normalised]
        self._own = {name: network.tensors[name].data for name in names}
        self._statistics = Statistics(len(coordinates))
        for name in self._estimated:
            # Each training batch is written to it.
            network.tensors[name].data = self._own[name].clone()
        self._stacks = self._materialise()
        if self._spectral:
            self._normalise()
        self._threads = torch.get_num_threads()
        self._workers = min(self._threads, len(coordinates)) if strategy is Strategy.THREADS else 1
        # The first, the model itself, looks ahead where others do the work.
        self._first, *others = _replicas(network, self._workers + 1 if self._workers > 1 else 1)
        self._replicas: queue.SimpleQueue[_Replica] = queue.SimpleQueue()
        for replica in others or [self._first]:
            self._replicas.put(replica)
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        if self._workers > 1:
            torch.set_num_threads(max(1, self._threads // self._workers))
            self._pool = ThreadPoolExecutor(self._workers)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._pool is not None:
            # After Ctrl-C nobody waits for a thread.
            self._pool.shutdown(wait=error is None, cancel_futures=True)
            torch.set_num_threads(self._threads)
        for name, own in self._own.items():
            self._network.tensors[name].data = own

    def __len__(self) -> int:
        return len(self._coordinates)

    def evaluate(self, inputs: Inputs, record: Record) -> Iterator[int]:
        """Begins to take a batch to all points.

        Args:
            inputs: The batch, prepared.
            record: Told what the model returns, from several threads at a time.

        Returns:
            The points as they are done; without threads, the work is done as it is asked for.
        """

        def take(p: int, replica: _Replica, mode: AbstractContextManager[Any]) -> None:
            record.one(p, self._outputs(p, replica, inputs, mode))

        return self._each(take)

    def estimate(self, inputs: Inputs) -> Iterator[int]:
        """Begins to take the statistics of a training batch at all points.

        Args:
            inputs: The batch, prepared.

        Returns:
            The points as they are done. No further batch may be begun before they all are.
        """

        def take(p: int, replica: _Replica, mode: AbstractContextManager[Any]) -> None:
            with estimating(replica.layers) as seen:
                self._outputs(p, replica, inputs, mode)
            # Not of a pass that was left in its middle.
            self._statistics.add(p, seen)

        return self._each(take)

    def adopt(self) -> Collection[str]:
        """Gives every point its statistics of the batches seen.

        Returns:
            The names of these statistics.
        """
        tensors = self._network.tensors
        found = [self._statistics.at(p, tensors) for p in range(len(self))]
        for name in self._statistics.names:
            self._stacks[name] = torch.stack([at.get(name, self._own[name]) for at in found])
        return self._statistics.names

    def _each(self, take: _Take) -> Iterator[int]:
        """Does something at all points; what the first layer gives is shared."""
        layer, done = self._look_ahead(take)

        def work(p: int) -> int:
            replica = self._replicas.get()
            try:
                replay: AbstractContextManager[Any] = nullcontext()
                if layer is not None and p not in (self._apart or ()):
                    replay = layer.at(self._coordinates[p], replica.tensors)
                with torch.no_grad():
                    take(p, replica, replay)
            finally:
                self._replicas.put(replica)
            return p

        points = range(len(done), len(self))
        if self._pool is None:
            return itertools.chain(done, map(work, points))
        futures = [self._pool.submit(work, p) for p in points]
        return itertools.chain(done, (f.result() for f in as_completed(futures)))

    def _look_ahead(self, take: _Take) -> tuple[FirstLayer | None, range]:
        """Finds the first layer on a batch; returns it and the points done on the way."""
        if not self._shares:
            return None, range(0)
        tensors = {name: self._first.tensors[name] for name in self._own}
        # Code of a user's own is never left in the middle of a forward pass.
        watch = Watch(tensors, self._slice, stops=self._known, measures=self._apart is None)
        done = range(1)
        try:
            take(0, self._first, watch)
        except FirstLayerFound:
            done = range(0)
        if watch.layer is not None and self._apart is None:
            lost = watch.layer.cancels(self._coordinates)
            self._apart = frozenset(p for p, one in enumerate(lost) if one)
            if all(lost) and self._proving:
                raise NothingSharedError("no point shares the first layer")
            self._shares = self._proving or len(self) - len(self._apart) > len(self._slice.ends)
        return (watch.layer if self._shares else None), done

    def _outputs(
        self, p: int, replica: _Replica, inputs: Inputs, mode: AbstractContextManager[Any]
    ) -> Any:
        self._bind(replica.tensors, p)
        with mode:
            return self._network.forward(replica.model, inputs)

    def _bind(self, tensors: Mapping[str, Tensor], p: int) -> None:
        for name, stack in self._stacks.items():
            tensors[name].data = stack[p]

    def _normalise(self) -> None:
        """Computes the singular vectors of spectrally normalised weights at all points."""
        number, tensors = len(self._coordinates), self._network.tensors
        for name in self._normalised:
            self._stacks[name] = self._own[name].new_empty(number, *self._own[name].shape)
        for p in range(number):
            self._bind(tensors, p)
            normalise(self._spectral, tensors)

    def _materialise(self) -> dict[str, Tensor]:
        """Makes the weights of all points, ``[P, *shape]`` for each tensor."""
        number = len(self._coordinates)
        last = _channels_last(self._network)
        stacks = {}
        for name, own in self._own.items():
            if name in self._estimated or name in self._normalised:
                continue
            if name in last:
                # The layout of each point's kernels, [out, in, h, w], is out, h, w, in.
                o, i, h, w = own.shape
                stack = own.new_empty(number, o, h, w, i).permute(0, 1, 4, 2, 3)
            elif number == 1:
                # A single point needs no memory of its own: the model's will do.
                stack = own.unsqueeze(0)
            else:
                stack = own.new_empty(number, *own.shape)
            _fill(stack, self._slice, name, self._coordinates)
            stacks[name] = stack
        return stacks


class Stacked(Points):
    """P points at once: one forward pass, mapped over their stacked weights.

    A GPU waits for the host where a model is small: P points then cost the launches of one.

    Args:
        network: The model.
        slice_: The slice.
        coordinates: The points.
        proving: Whether the strategy is being proved.
    """

    def __init__(
        self,
        network: Network,
        slice_: Slice,
        coordinates: Sequence[Sequence[float]],
        *,
        proving: bool = False,
    ) -> None:
        super().__init__(network, slice_, coordinates, Strategy.STACKED, proving=proving)

    def evaluate(self, inputs: Inputs, record: Record) -> Iterator[int]:
        """Takes a batch to all points.

        Args:
            inputs: The batch, prepared.
            record: Told what the model returns.

        Returns:
            The points, done.
        """

        def take(p: int, replica: _Replica, mode: AbstractContextManager[Any]) -> None:
            # Point 0 comes again with the others: what is seen of it here must not count twice.
            self._outputs(p, replica, inputs, mode)

        layer, _ = self._look_ahead(take)
        # One forward pass cannot share the layer at some points and not at others.
        layer = None if self._apart else layer
        products = None
        if layer is not None:
            products = torch.stack([layer.output(point) for point in self._coordinates])
        model = self._first.model

        def at(tensors: Mapping[str, Tensor], product: Tensor | None) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                return functional_call(model, dict(tensors), args, kwargs)

            replay: AbstractContextManager[Any] = nullcontext()
            if layer is not None and product is not None:
                replay = layer.replay(product, tensors)
            with replay:
                return self._network.forward(call, inputs)

        with warnings.catch_warnings():
            # What vmap does one by one is not worth it: an error, so that another is taken.
            warnings.filterwarnings("error", "There is a performance drop")
            mapped = vmap(at, in_dims=(0, None if products is None else 0))
            record.all(mapped(self._stacks, products))
        return iter(range(len(self)))


@dataclass(frozen=True)
class _Replica:
    """A model whose tensors can be bound to other values than those of its twins."""

    model: nn.Module
    tensors: Mapping[str, Tensor]
    layers: Sequence[Layer]


_Take = Callable[[int, _Replica, AbstractContextManager[Any]], None]
"""Takes a batch to a point, by a replica, in a context to run the forward pass in."""


def _replicas(network: Network, number: int) -> list[_Replica]:
    """Makes replicas that share the model's memory; the model itself is the first."""
    replicas = [_Replica(network.model, network.tensors, network.statistics)]
    for _ in range(number - 1):
        shared: dict[int, Any] = {
            id(p): nn.Parameter(p.detach(), p.requires_grad) for p in network.model.parameters()
        }
        twin = copy.deepcopy(network.model, shared)
        tensors = tensors_of(twin)
        layers = layers_of(twin, tensors) if network.statistics else ()
        replicas.append(_Replica(twin, tensors, layers))
    return replicas


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Names a model's tensors.

    Args:
        model: The model.

    Returns:
        Its parameters and buffers themselves, by the names of its state dict.
    """
    return {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor)
    }


def is_known(model: nn.Module) -> bool:
    """Tells whether all of a model's code is known to keep nothing beside its tensors.

    Args:
        model: The model.

    Returns:
        Whether replicas of it may run side by side, and a forward pass be left in its middle.
    """
    # Code of a user's own may: a closure that copying does not reach, a table that a hook fills.
    return all(
        type(module).__module__.startswith(("torch.nn.", "losscli.models"))
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in module.__dict__
        for module in model.modules()
    )


def _channels_last(network: Network) -> frozenset[str]:
    """The kernels of 2-D convolutions, where these are faster with the channels last."""
    # On two cores of an Ice Lake Xeon ResNet-20 takes 1.3 to 1.4 times as long with the channels
    # first. A GPU's tensor cores want them last, its float32 units do not.
    tensors = network.tensors
    device = next(iter(tensors.values())).device.type if tensors else "cpu"
    half = network.dtype in {torch.float16, torch.bfloat16}
    if device != "cpu" and not (device == "cuda" and (half or torch.backends.cudnn.allow_tf32)):
        return frozenset()
    kernels = {
        id(module.weight) for module in network.model.modules() if isinstance(module, nn.Conv2d)
    }
    return frozenset(name for name, tensor in tensors.items() if id(tensor) in kernels)


def _fill(stack: Tensor, slice_: Slice, name: str, coordinates: Sequence[Sequence[float]]) -> None:
    """Writes a tensor at all points, ``[P, *shape]``: combined in float64, then rounded once.

    Where the terms of a combination nearly cancel, one made in float32 would have lost its digits.
    """
    ends = [end[name] for end in slice_.ends]
    working = combining_type(stack)
    if all(tensor.dtype == working for tensor in (stack, *ends)):
        for out, point in zip(stack, coordinates, strict=True):
            slice_.combine(ends, point, out)
    elif not stack[0].is_contiguous():
        values = [end.to(working) for end in ends]
        for out, point in zip(stack, coordinates, strict=True):
            out.copy_(slice_.combine(values, point))
    else:
        # No second copy of a large tensor exists.
        rows, flat = [out.view(-1) for out in stack], [end.reshape(-1) for end in ends]
        length = _STRETCH if stack.device.type == "cpu" else _STRETCH_ELSEWHERE
        for start in range(0, len(flat[0]), length):
            part = slice(start, start + length)
            values = [end[part].to(working) for end in flat]
            buffer = torch.empty_like(values[0])
            for row, point in zip(rows, coordinates, strict=True):
                row[part].copy_(slice_.combine(values, point, buffer))


def combining_type(tensor: Tensor) -> torch.dtype:
    """Finds the type that a tensor is combined in.

    Args:
        tensor: A tensor of the model.

    Returns:
        float64, or complex128; on MPS, which has neither, its own type but for half precision.
    """
    narrow = tensor.device.type == "mps"
    return torch.promote_types(tensor.dtype, torch.float32 if narrow else torch.float64)
