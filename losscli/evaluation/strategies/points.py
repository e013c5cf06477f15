"""Points of weight space, and how a batch of examples is evaluated at them.

`LoadedPoint` and `LoadedPoints` load every point with `load_state_dict`: the slow reference. The
others compute the weights of all points first and bind the model's tensors to them: one point after
the other, in threads, or all at once. `losscli.evaluation.strategies.sequential_points` has one set
of weights for all points. All numbers are compared with the reference before they are relied on
(`losscli.evaluation.strategy_choice`).
"""

from __future__ import annotations

import itertools
import queue
import warnings
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from operator import itemgetter
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_leaves

from losscli.data import Nest, length, map_nest
from losscli.errors import ModelError
from losscli.evaluation.recalibration import Statistics, recording
from losscli.evaluation.spectral import SpectralLayer, normalise
from losscli.evaluation.strategies.base import Network, NothingSharedError, OutputRecorder, Strategy
from losscli.evaluation.strategies.first_layer import FirstLayer, FirstLayerFound, FirstLayerWatcher
from losscli.evaluation.strategies.point_weights import PointWeights, weights_at
from losscli.evaluation.strategies.prefix import Prefix, PrefixChanged
from losscli.evaluation.strategies.replicas import (
    Replica,
    forward_with,
    is_stateless,
    make_replicas,
)
from losscli.evaluation.strategies.stacked_linear import (
    StackedLinear,
    examples_at_once,
    is_perceptron,
)
from losscli.weight_space.slices import Slice

__all__ = [
    "BoundPoints",
    "LoadedPoint",
    "LoadedPoints",
    "Points",
    "StackedPoints",
    "cudnn_weights",
    "moving_spectral_layers",
]

_TakeBatch = Callable[[int, Replica, AbstractContextManager[Any]], None]
"""Evaluates a batch at a point with a replica; the context is for the forward pass."""


class _OnePass:
    """Points that take each batch together."""

    def passes(self) -> Iterator[range]:
        """Iterates over the passes through the data.

        Yields:
            The indices of the points that take part in the next pass: all in the only one.
        """
        yield range(len(self))

    @abstractmethod
    def __len__(self) -> int:
        """The number of points."""


class LoadedPoint(_OnePass):
    """The point with the weights that are loaded.

    Args:
        network: The model.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self._statistics = Statistics(1)
        self._point = 0

    def __len__(self) -> int:
        return 1

    def record_statistics(self, inputs: Nest) -> Iterator[int]:
        """Records BatchNorm's statistics of a prepared training batch; yields the point."""
        with recording(self._network.statistics) as statistics:
            self._network.forward(self._network.model, inputs)
        self._statistics.add(0, statistics)
        yield 0

    def use_statistics(self) -> Collection[str]:
        """Sets the statistics to the means over the recorded batches; returns their names."""
        tensors = self._network.tensors
        means = self._statistics.at(0, tensors)
        for name, value in means.items():
            tensors[name].copy_(value)
        return means

    def evaluate(self, inputs: Nest, recorder: OutputRecorder) -> Iterator[int]:
        """Evaluates a prepared batch; yields the point when it is done."""
        with self._network.deferring():
            outputs = self._network.forward(self._network.model, inputs)
        recorder.one(self._point, outputs)
        yield self._point


class LoadedPoints(_OnePass):
    """P points of a slice, each loaded for every batch: the slow reference.

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

    def record_statistics(self, inputs: Nest) -> Iterator[int]:
        """Records BatchNorm's statistics of a batch; yields each point when it is done."""
        for p, point in enumerate(self._coordinates):
            self._load(p, point)
            with recording(self._network.statistics) as statistics:
                self._network.forward(self._network.model, inputs)
            self._statistics.add(p, statistics)
            yield p

    def use_statistics(self) -> Collection[str]:
        """Loads every point with the means of its recorded statistics; returns their names."""
        return self._statistics.names

    def evaluate(self, inputs: Nest, recorder: OutputRecorder) -> Iterator[int]:
        """Evaluates a prepared batch; yields each point when it is done."""
        for p, point in enumerate(self._coordinates):
            self._load(p, point)
            with self._network.deferring():
                outputs = self._network.forward(self._network.model, inputs)
            recorder.one(p, outputs)
            yield p

    def _load(self, p: int, point: Sequence[float]) -> None:
        weights = weights_at(self._slice, self._network.tensors, point)
        estimated = self._statistics.at(p, self._network.tensors)
        self._network.load({**weights, **self._own, **estimated})


class BoundPoints(_OnePass):
    """P points of a slice with their weights in memory; each batch is evaluated at all of them.

    The outputs of the first layer are computed for all points at once if possible. On a CPU the
    points are distributed over as many threads as the operators may use, each with a replica of the
    model and single-threaded operators: so no operator waits for its slowest thread.

    Args:
        network: The model. Within the context its tensors are bound to those of the points.
        slice_: The slice.
        coordinates: The points.
        strategy: How to evaluate them.
        proving: Whether the strategy is being tested, so that some point has to share the first
            layer.
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
        # With fewer points than ends, products at the ends are not worth it, except as a test.
        many = len(coordinates) > len(slice_.ends)
        self._shares = strategy is not Strategy.BOUND and (many or proving)
        self._proving = proving
        # The points that cannot share the first layer, as its products at the ends nearly cancel.
        self._unshared: frozenset[int] | None = None
        self._stateless = is_stateless(network)
        self._estimated = [name for layer in network.statistics for name in layer.names]
        self._spectral = moving_spectral_layers(network, slice_)
        self._normalised = [name for layer in self._spectral for name in layer.names]
        names = [*slice_.ends[0], *self._estimated, *self._normalised]
        self._own = {name: network.tensors[name].data for name in names}
        self._statistics = Statistics(len(coordinates))
        for name in self._estimated:
            # Each training batch overwrites it.
            network.tensors[name].data = self._own[name].clone()
        computed = {*self._estimated, *self._normalised}
        moving = {name: own for name, own in self._own.items() if name not in computed}
        self._weights = PointWeights(network, slice_, coordinates, moving)
        self._stacks = dict(self._weights.stacks)
        self._rows = dict(self._weights.rows)
        self._copied = cudnn_weights(network) & moving.keys()
        # The first layer's weight, which a point that shares its products does not need.
        self._lazy: str | None = None
        # Whether recorded prefixes give the right outputs; None before the first one.
        self._reuses: bool | None = None
        if self._spectral:
            self._fill()
            self._normalise()
        self._threads = torch.get_num_threads()
        self._workers = min(self._threads, len(coordinates)) if strategy is Strategy.THREADS else 1
        # With threads, the first replica, the model itself, only finds the first layer.
        self._first, *others = make_replicas(network, self._workers + 1 if self._workers > 1 else 1)
        self._replicas: queue.SimpleQueue[Replica] = queue.SimpleQueue()
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
            # After Ctrl-C no thread is waited for.
            self._pool.shutdown(wait=error is None, cancel_futures=True)
            torch.set_num_threads(self._threads)
        for name, own in self._own.items():
            self._network.tensors[name].data = own

    def __len__(self) -> int:
        return len(self._coordinates)

    def evaluate(self, inputs: Nest, recorder: OutputRecorder) -> Iterator[int]:
        """Starts to evaluate a batch at all points; its recorder is called from several threads.

        Returns:
            The points as they are done. Without threads they are evaluated lazily.
        """

        def take(p: int, replica: Replica, mode: AbstractContextManager[Any]) -> None:
            recorder.one(p, self._outputs(p, replica, inputs, mode))

        return self._each(take, inputs)

    def record_statistics(self, inputs: Nest) -> Iterator[int]:
        """Starts to record BatchNorm's statistics of a training batch at all points.

        Returns:
            The points as they are done. All must be done before the next batch is started.
        """

        def take(p: int, replica: Replica, mode: AbstractContextManager[Any]) -> None:
            with recording(replica.layers) as statistics:
                self._outputs(p, replica, inputs, mode)
            # Only after a complete pass: finding the first layer may interrupt one.
            self._statistics.add(p, statistics)

        return self._each(take, inputs)

    def use_statistics(self) -> Collection[str]:
        """Sets the statistics of every point to the recorded means; returns their names."""
        tensors = self._network.tensors
        points = [self._statistics.at(p, tensors) for p in range(len(self))]
        for name in self._statistics.names:
            means = [point.get(name, self._own[name]) for point in points]
            stack = torch.stack(means)
            self._stacks[name], self._rows[name] = stack, stack.unbind(0)
        return self._statistics.names

    def _each(self, take: _TakeBatch, inputs: Nest) -> Iterator[int]:
        """Evaluates a batch at all points; all before the first moving tensor is shared."""
        layer, prefix, done = self._find_first_layer(take)
        # In a user's code the weight may also be used where no watcher sees it.
        if layer is not None and self._lazy is None and self._stateless:
            self._lazy = layer.weight
        self._fill()
        points = range(len(done), len(self))
        if prefix is not None and points and self._reuses is None:
            self._reuses = self._gives_the_same(prefix, points[0], layer, inputs)
        prefix = prefix if self._reuses else None

        def work(p: int) -> int:
            replica = self._replicas.get()
            try:
                with torch.no_grad():
                    try:
                        take(p, replica, self._shared(p, replica, layer, prefix))
                    except PrefixChanged:
                        take(p, replica, self._shared(p, replica, layer, None))
            finally:
                self._replicas.put(replica)
            return p

        if self._pool is None:
            return itertools.chain(done, map(work, points))
        futures = [self._pool.submit(work, p) for p in points]
        return itertools.chain(done, (f.result() for f in as_completed(futures)))

    @contextmanager
    def _shared(
        self, p: int, replica: Replica, layer: FirstLayer | None, prefix: Prefix | None
    ) -> Iterator[None]:
        """Replaces the shared parts of a forward pass at a point."""
        shares = layer is not None and p not in (self._unshared or ())
        fill: Callable[[], None] | None = partial(self._fill_lazy, p)
        if layer is None or not shares or layer.weight != self._lazy:
            self._fill_lazy(p)
            fill = None
        with ExitStack() as stack:
            if layer is not None and shares:
                output = layer.output(self._coordinates[p])
                replay = layer.replay(output, replica.tensors, fill)
                stack.enter_context(replay)
            if prefix is not None:
                stack.enter_context(prefix.replay(replica.tensors))
            yield
            if prefix is not None:
                prefix.check_unmodified()

    def _gives_the_same(
        self, prefix: Prefix, p: int, layer: FirstLayer | None, inputs: Nest
    ) -> bool:
        """Whether the outputs at a point are the same bits with a recorded prefix as without."""
        outputs = []
        try:
            for recorded in (None, prefix):
                mode = self._shared(p, self._first, layer, recorded)
                outputs.append(tree_leaves(self._outputs(p, self._first, inputs, mode)))
        except (ModelError, PrefixChanged):
            return False
        return len(outputs[0]) == len(outputs[1]) and all(
            not isinstance(x, Tensor) or torch.equal(x, y) for x, y in zip(*outputs, strict=True)
        )

    def _find_first_layer(self, take: _TakeBatch) -> tuple[FirstLayer | None, Prefix | None, range]:
        """Finds the first layer on a batch, the prefix before it, and the points that are done."""
        if not self._shares:
            return None, None, range(0)
        for name in self._weights.stacks:
            self._weights.fill(name, range(1))
        tensors = {name: self._first.tensors[name] for name in self._own}
        # The forward pass of a user's code is never interrupted.
        watcher = FirstLayerWatcher(
            tensors,
            self._first.tensors,
            self._slice,
            stops=self._stateless,
            measures=self._unshared is None,
        )
        done = range(1)
        try:
            take(0, self._first, watcher)
        except FirstLayerFound:
            done = range(0)
        if watcher.layer is not None and self._unshared is None:
            cancels = watcher.layer.nearly_cancels(self._coordinates)
            self._unshared = frozenset(p for p, cancel in enumerate(cancels) if cancel)
            # The first point has the layer's own input, and tests nothing.
            if all(cancels[1:]) and self._proving:
                raise NothingSharedError("no other point shares the first layer")
            self._shares = self._proving or len(self) - len(self._unshared) > len(self._slice.ends)
        return (watcher.layer if self._shares else None), watcher.prefix, done

    def _outputs(
        self, p: int, replica: Replica, inputs: Nest, mode: AbstractContextManager[Any]
    ) -> Any:
        self._bind(replica.tensors, p)
        # The mode sees the layer before it is deferred, since it may replace it.
        with self._network.deferring(), mode:
            return self._network.forward(replica.model, inputs)

    def _bind(self, tensors: Mapping[str, Tensor], p: int) -> None:
        for name, rows in self._rows.items():
            if name in self._copied and name != self._lazy:
                tensors[name].data.copy_(rows[p])
            else:
                tensors[name].data = rows[p]

    def _fill(self) -> None:
        """Computes the weights of all points, but for the one that is computed when it is used."""
        for name in self._weights.stacks:
            if name != self._lazy:
                self._weights.fill(name, range(len(self)))

    def _fill_lazy(self, p: int) -> None:
        if self._lazy is not None:
            self._weights.fill(self._lazy, [p])

    def _normalise(self) -> None:
        """Computes the singular vectors of spectrally normalised weights at all points."""
        number, tensors = len(self._coordinates), self._network.tensors
        for name in self._normalised:
            stack = self._own[name].new_empty(number, *self._own[name].shape)
            self._stacks[name], self._rows[name] = stack, stack.unbind(0)
        for p in range(number):
            self._bind(tensors, p)
            normalise(self._spectral, tensors)


class StackedPoints(BoundPoints):
    """P points at once: one forward pass with their stacked weights.

    With a small model a GPU waits for the host to launch kernels: P points then take as many
    launches as one. A perceptron runs on stacked activations, other models are mapped.

    Args:
        network: The model.
        slice_: The slice.
        coordinates: The points.
        proving: Whether the strategy is being tested.
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
        self._is_perceptron = self._stateless and is_perceptron(network.model)

    def evaluate(self, inputs: Nest, recorder: OutputRecorder) -> Iterator[int]:
        """Evaluates a batch at all points."""

        def take(p: int, replica: Replica, mode: AbstractContextManager[Any]) -> None:
            # Not recorded: point 0 is evaluated again with the others.
            self._outputs(p, replica, inputs, mode)

        layer, _, _ = self._find_first_layer(take)
        # All of them: the forward pass may use any, and estimating statistics leaves one out.
        for name in self._weights.stacks:
            self._weights.fill(name, range(len(self)))
        # One forward pass cannot share the layer at some points only.
        layer = None if self._unshared else layer
        products = None if layer is None else layer.outputs(self._coordinates)
        if self._is_perceptron:
            recorder.all(self._pass_stacked(inputs, layer, products))
        else:
            recorder.all(self._pass_mapped(inputs, layer, products))
        return iter(range(len(self)))

    def _pass_stacked(
        self, inputs: Nest, layer: FirstLayer | None, products: Tensor | None
    ) -> Tensor:
        """Runs a perceptron on activations ``[P, B, *]``, some examples at a time."""
        tensors, number = self._network.tensors, len(self)
        stacks = {id(tensors[name]): stack for name, stack in self._stacks.items()}
        first = None if layer is None else id(tensors[layer.weight])
        size = examples_at_once(self._network.model, number)
        parts = []
        for start in range(0, length(inputs), size):
            some = slice(start, start + size)
            given = None if products is None else products[:, some]
            with StackedLinear(stacks, number, first, given):
                own = map_nest(itemgetter(some), inputs)
                parts.append(self._network.forward(self._network.model, own))
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def _pass_mapped(self, inputs: Nest, layer: FirstLayer | None, products: Tensor | None) -> Any:
        """Maps a forward pass over the points."""

        def at(tensors: Mapping[str, Tensor], product: Tensor | None) -> Any:
            replay: AbstractContextManager[Any] = nullcontext()
            if layer is not None and product is not None:
                replay = layer.replay(product, tensors)
            with replay:
                return forward_with(self._network, tensors, inputs)

        with warnings.catch_warnings():
            # An operator that vmap runs in a loop is too slow: raise, so that another strategy is
            # chosen.
            warnings.filterwarnings("error", "There is a performance drop")
            mapped = vmap(at, in_dims=(0, None if products is None else 0))
            return mapped(self._stacks, products)


def moving_spectral_layers(network: Network, slice_: Slice) -> list[SpectralLayer]:
    """Returns the spectrally normalised weights that move along a slice."""
    moving = slice_.ends[0].keys()
    return [layer for layer in network.spectral if not moving.isdisjoint(layer.sources)]


def cudnn_weights(network: Network) -> frozenset[str]:
    """Returns the weights of recurrent layers on a GPU, which cuDNN keeps in one buffer."""
    # `flatten_parameters` made them views of it. If they were bound to other memory, every call
    # would warn and copy them into a new buffer.
    flat = {
        id(weight)
        for module in network.model.modules()
        if isinstance(module, nn.RNNBase)
        for weight in module.parameters(recurse=False)
        if _is_in_cudnn(weight)
    }
    return frozenset(name for name, tensor in network.tensors.items() if id(tensor) in flat)


def _is_in_cudnn(weight: Tensor) -> bool:
    return weight.is_cuda


Points = LoadedPoint | LoadedPoints | BoundPoints
"""Points of any class, for `Objective.evaluate`."""
