"""The objective: per-example losses of a model on data, at points of weight space.

Every strategy gives the numbers of the checkpoint loaded with ``load_state_dict``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from losscli.data import (
    DataSet,
    Examples,
    Nest,
    RandomnessDetector,
    Split,
    allocations,
    copy_stream,
    device_budget,
    leaves,
    placing,
    transferred,
)
from losscli.errors import (
    ModelError,
    NondeterministicModelError,
    OutOfMemoryError,
)
from losscli.evaluation import gpu_thresholds
from losscli.evaluation.device import launches_kernels
from losscli.evaluation.flops import Trace, operations
from losscli.evaluation.forward import (
    ScoredModel,
    is_registered,
)
from losscli.evaluation.independence import Values
from losscli.evaluation.losses.built_in import PerExample
from losscli.evaluation.losses.doubts import Doubt
from losscli.evaluation.losses.metrics import SEED_ERROR, loss_seed_stderr
from losscli.evaluation.losses.targets import (
    check_lengths,
    check_probabilities,
    check_range,
    first_not_finite,
    is_of_classes,
    target_error,
)
from losscli.evaluation.objective_functions import ObjectiveFunction
from losscli.evaluation.output_collector import OutputCollector, join_weights
from losscli.evaluation.recalibration import BatchNormLayer, Recalibration, batchnorm_layers
from losscli.evaluation.strategies.base import Strategy
from losscli.evaluation.strategies.batch_graphs import BatchGraphs, GraphCapture, graph_capture
from losscli.evaluation.strategies.first_layer import FirstLayerFound, FirstLayerWatcher
from losscli.evaluation.strategies.points import (
    BoundPoints,
    LoadedPoint,
    LoadedPoints,
    Points,
    StackedPoints,
)
from losscli.evaluation.strategies.replicas import is_stateless
from losscli.evaluation.strategies.sequential_points import SequentialPoints
from losscli.results.summaries import StrategyChoice
from losscli.weight_space.slices import Line, Slice
from losscli.weight_space.vectors import Weights

__all__ = [
    "AGREEMENT",
    "DETERMINISTIC",
    "PROBE",
    "Evaluation",
    "Objective",
    "Progress",
    "is_close",
    "recalibrated",
    "relative_difference",
]

Progress = Callable[[float], None]
"""Called with the share of a point done since the last call."""

# Bytes of prepared inputs in a batch, and the most examples. On two cores of an Ice Lake Xeon the
# MLP 784-512-512-10 is fastest at 2,048 examples (1.12 times as fast as at 1,024 and 1.3 times as
# at 256, where the threads wait for Python) and ResNet-20 between 64 and 256.
_BATCH = {"cpu": (8 << 20, 2048)}
_BATCH_ELSEWHERE = (256 << 20, 4096)

# Examples used to measure the outputs of one example. Not 1: code may squeeze that dimension.
PROBE = 2

AGREEMENT = {"float64": 1e-10, "float32": 1e-5, "tf32": 5e-3, "float16": 5e-2, "bfloat16": 5e-2}
"""Largest relative difference of two evaluations of the same losses, by `Objective.precision`."""

DETERMINISTIC = (
    "Take the randomness (dropout outside nn.Dropout, sampling) out of the forward pass; if it is "
    "on purpose, give --stochastic N, for means over N fixed seeds"
)
"""Advice for a model with random outputs."""

# Bytes of moving weights of which no second copy is made.
_LARGE = 64 << 20

# A token id is looked up as a vector, counted as one of a thousand floats.
_TOKEN_BYTES = 4096


@dataclass(frozen=True)
class Evaluation:
    """Losses and metrics of a split at P points.

    Attributes:
        losses: The loss of each example at each point, ``[P, N]``, on the CPU; float64 for a
            forward pass in float64, else float32. If examples have weights w, it is the weighted
            loss over the mean of w, so that its mean over examples is Σwl/Σw.
        metrics: The mean of each metric at each point, ``[P]``, float64, on the CPU; with seeds
            also the standard error of the mean loss over them.
        weights: The weight of each example, ``[N]``, float64, on the CPU; None if all are 1.
        counts: The number of examples that a metric is averaged over, if not all.
    """

    losses: Tensor
    metrics: Mapping[str, Tensor]
    weights: Tensor | None = None
    counts: Mapping[str, float] = field(default_factory=dict)

    @property
    def seed_error(self) -> float:
        """The standard error over seeds of the mean loss at the first point; nan without seeds."""
        errors = self.metrics.get(SEED_ERROR)
        return math.nan if errors is None else float(errors[0])


@dataclass
class _Sums:
    """The losses and sums of metrics of a split at P points, on the device.

    Attributes:
        losses: The losses of N examples, ``[P, N]``.
        totals: The sums of each metric, ``[P]``; those of the losses of S seeds, ``[P, S]``, under
            None.
        weights: The weights of each batch, see `OutputCollector`.
    """

    losses: Tensor
    totals: dict[str | None, Tensor]
    weights: list[Mapping[str | None, Tensor | None]] = field(default_factory=list)


@dataclass(frozen=True)
class _Graphs:
    """Graphs at points that take all batches in turn.

    Attributes:
        losses: Those of batches.
        statistics: Those of training batches, for BatchNorm's statistics.
    """

    losses: BatchGraphs
    statistics: BatchGraphs

    @property
    def reason(self) -> str:
        """Why some batches are evaluated without a graph; empty if none is."""
        return self.losses.reason or self.statistics.reason


class Objective(ScoredModel):
    """The empirical risk of a model on a data set, as a function of the model's weights.

    Args:
        model: The model. The objective owns it: moves it, sets eval mode and overwrites its
            weights.
        loss: The per-example loss.
        metrics: The per-example metrics by name.
        data: The data; each split is moved to the device once.
        device: Where to compute.
        dtype: The type of the forward pass. Built-in losses convert its outputs to a wider type;
            other functions get half-precision outputs in float32.
        batch_size: Examples per forward pass; None chooses for the device.
        recalibration: The examples on which BatchNorm's statistics are re-estimated at every point;
            None keeps those that are loaded.
        batch_loss: Whether the loss is one number per batch: each example of the data is a whole
            batch, and the batch size is 1.
        function: An objective, which replaces the loss.
        seeds: The seeds of a random model.
        optional: The metrics that are omitted if they do not apply.
        tf32: Whether a GPU computes float32 products in TF32.

    Attributes:
        left_out: The omitted metrics with the reason.
        batchnorm: The model's BatchNorm layers that track statistics.
        idle: The BatchNorm layers that did not run when statistics were last estimated.
        doubts: Signs that the loss is the wrong one, common to the first batches of all splits.
        unchecked: The splits on which the model accepts the first batch only as a whole, so that
            it is unknown whether losses depend on other examples in the batch.
        unused: The parameters without influence on the outputs of a first batch.
        constant: Whether different checkpoints have the same losses on first batches.
        strategy: How points are evaluated; None before it is chosen.
        provisional: The strategy for points at which none could be tested.
        difference: The largest relative difference of the losses of the strategy from those of
            loaded points, as far as it was measured.
        graph: Whether batches are evaluated as graphs of the device, ``used`` or the reason why
            not; None where the device has none, or no strategy has been tested yet.
        first_choice: The first strategy of a run, for its summary.
        proving: Whether a strategy is being tested.
        traced: Whether a forward pass has been traced.
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
        recalibration: Recalibration | None = None,
        batch_loss: bool = False,
        function: ObjectiveFunction | None = None,
        seeds: Sequence[int] = (),
        optional: Collection[str] = (),
        tf32: bool = False,
    ) -> None:
        super().__init__(
            *(model, loss, metrics),
            device=device,
            dtype=dtype,
            batch_loss=batch_loss,
            function=function,
            seeds=seeds,
        )
        self.data = data
        self.batch_size = 1 if batch_loss else batch_size or _default_batch(data, device)
        self.chooses_batch = batch_size is None and not batch_loss
        self.splits: Mapping[str, Examples] = _place(data.splits, device)
        self.classes: int | None = None
        self.batchnorm = batchnorm_layers(self.model, self.tensors)
        self.recalibration = recalibration and _placed_recalibration(
            recalibration, data.splits, self.splits, device
        )
        self.idle: Sequence[BatchNormLayer] = ()
        self.doubts: frozenset[Doubt] = frozenset()
        self.left_out: dict[str, str] = {}
        self.optional = frozenset(optional)
        self.tf32 = tf32
        self._notes: dict[str, None] = {}
        self.strategy: Strategy | None = None
        self.provisional: Strategy | None = None
        self.difference: float | None = None
        self.graph: str | None = None
        self.first_choice: StrategyChoice | None = None
        self.proving = False
        self._shared: dict[frozenset[str], bool] = {}
        self._operations: int | None = None
        self._activations = 0
        self.traced = False
        self.unchecked: set[str] = set()
        self.unused: tuple[str, ...] = ()
        self.constant = False

    @property
    def columns(self) -> Mapping[str, PerExample]:
        """The functions evaluated in addition to the loss, by the names of their columns."""
        return self.metrics | ({SEED_ERROR: loss_seed_stderr} if len(self.seeds) > 1 else {})

    @property
    def loss_type(self) -> torch.dtype:
        """The type of the losses: float64 for a forward pass in float64, else float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def factor_type(self) -> torch.dtype:
        """A type with the significant bits that the factors of products are rounded to.

        TF32 has as many as float16.
        """
        rounds = self.tf32 and self.device.type == "cuda" and self.dtype == torch.float32
        return torch.float16 if rounds else self.dtype

    @property
    def precision(self) -> str:
        """The precision of the forward pass: ``tf32``, or the name of its type."""
        tf32 = self.factor_type != self.dtype
        return "tf32" if tf32 else str(self.dtype).removeprefix("torch.")

    def add_note(self, text: str) -> None:
        """Adds a note, unless it is empty or was added before."""
        if text:
            self._notes[text] = None

    @property
    def notes(self) -> list[str]:
        """Notes on the targets, metrics and derivatives so far."""
        left_out = (f"{name} is left out: {why}" for name, why in self.left_out.items())
        return [*self._notes, *left_out]

    @property
    def statistics(self) -> Sequence[BatchNormLayer]:
        """The BatchNorm layers with statistics that are re-estimated at every point."""
        return () if self.recalibration is None else self.batchnorm

    def first_batch_only(self) -> AbstractContextManager[None]:
        """Estimates BatchNorm's statistics on the first training batch only, in a context."""
        return self._recalibrating(self.recalibration and self.recalibration.first_batch())

    def frozen_statistics(self) -> AbstractContextManager[None]:
        """Keeps BatchNorm's statistics as loaded."""
        return self._recalibrating(None)

    @contextmanager
    def estimating_on(self, batch: Split) -> Iterator[None]:
        """Estimates BatchNorm's statistics on a given batch at every point, in a context."""
        idle, order = self.idle, torch.arange(len(batch))
        try:
            with self._recalibrating(Recalibration("", batch, len(batch), order)):
                yield
        finally:
            self.idle = idle

    @contextmanager
    def _recalibrating(self, recalibration: Recalibration | None) -> Iterator[None]:
        own, self.recalibration = self.recalibration, recalibration
        try:
            yield
        finally:
            self.recalibration = own

    def first_batches(self) -> dict[str, Split]:
        """Returns the first batch of each split, for checks."""
        firsts = ((name, split.first(self.batch_size)) for name, split in self.splits.items())
        return {name: first.to(self.device) for name, first in firsts}

    def batches(
        self, split: Examples, size: int | None = None, order: Tensor | None = None
    ) -> Iterator[Split]:
        """Iterates once over the examples of a split.

        Args:
            split: The examples, on any device.
            size: Examples in a batch; None takes the objective's batch size.
            order: Indices ``[n]`` into the split; None takes all in order.

        Returns:
            The batches, as stored, on the device.
        """
        batches = self._checked_batches(split, size, order)
        return transferred(batches, self.device, copy_stream(self.device))

    def _checked_batches(
        self, split: Examples, size: int | None, order: Tensor | None
    ) -> Iterator[Split]:
        """Iterates over the batches of a split where they are stored."""
        # Examples that are decoded in each pass have not been checked before.
        unchecked = not isinstance(split, Split)
        done, lengths = 0, set[torch.Size]()
        for batch in split.batches(size or self.batch_size, order):
            if unchecked:
                self._check_targets(batch.targets, lengths)
                row = first_not_finite(batch.targets) if self._needs_finite else None
                if row is not None:
                    index = done + row if order is None else int(order[done + row])
                    raise target_error(batch.targets[row], self.where(split), split.position(index))
            done += len(batch)
            yield batch

    @property
    def _needs_finite(self) -> bool:
        return is_registered(self.loss) and not self.batch_loss

    def _check_targets(self, targets: Nest, lengths: set[torch.Size]) -> None:
        """Checks the targets of a batch; ``lengths`` collects their shapes over batches."""
        if not isinstance(targets, Tensor):
            return
        if self.classes is not None:
            self.add_note(check_range(self.loss, targets, self.classes, "the data"))
        if is_of_classes(self.loss) and not self.batch_loss:
            lengths.add(targets.shape[1:])
            check_lengths(lengths)
        check_probabilities(self.loss, targets, "the data")

    def where(self, split: Examples) -> str:
        """Returns the name of the examples of a split in errors."""
        names = [name for name, examples in self.splits.items() if examples is split]
        return f"the split {names[0]!r}" if names else "the data"

    def prepare(self, batch: Split) -> Nest:
        """Prepares a batch for the forward pass: its inputs, or all of it for an objective."""
        if self.function is None:
            return self.data.prepare(batch.inputs, self.dtype)
        return self.data.prepare_batch(batch, self.dtype)

    def values(self, batch: Split) -> Values:
        """Returns the loss of each example of a batch, and metrics that may not be per example."""
        with self.deferring():
            outputs = self.forward(self.model, self.prepare(batch))
        loss = self.per_example(self.loss, outputs, batch.targets, "loss")
        return self.own_values(outputs, batch.targets, loss)

    @property
    def operations(self) -> int:
        """The floating-point operations of one example's forward pass: at least two per weight."""
        return self.count_operations() if self._operations is None else self._operations

    @property
    def activations(self) -> int:
        """The bytes of one example's activations that one operator reads and writes, at most.

        0 for a model that cannot be traced.
        """
        if self._operations is None:
            self.count_operations()
        return self._activations

    def count_operations(self, trace: Trace | None = None) -> int:
        """Counts the operations of a forward pass on a few examples.

        Args:
            trace: Receives the operations and reads of the pass.

        Returns:
            The floating-point operations of one example: at least two per weight.
        """
        trace = trace or Trace()
        self._operations = max(1, 2 * sum(p.numel() for p in self.model.parameters()))
        split = next(iter(self.splits.values()))
        # Some models accept only whole batches, and some cannot be traced.
        for number in dict.fromkeys((min(PROBE, self.batch_size), self.batch_size)):
            few = split.first(number).to(self.device)
            inputs = self.prepare(few.map(Tensor.clone))
            with contextlib.suppress(ModelError):
                count = operations(self.model, partial(self.forward, self.model, inputs), trace)
                self._operations = max(self._operations, count // len(few))
                self._activations = trace.largest // len(few)
                break
        return self._operations

    @torch.no_grad()
    def plain(
        self,
        weights: Weights,
        splits: Mapping[str, Examples] | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Evaluation]:
        """Evaluates a point, P = 1, the usual way: ``load_state_dict``, then batch by batch."""
        self.load(weights)
        return self.evaluate(LoadedPoint(self), splits, progress)

    def is_large(self, names: Iterable[str]) -> bool:
        """Whether points are bound to the model without a comparison with loaded ones.

        The comparison would cost a second copy of the weights that move, and few points of many
        weights fit into memory together, so that there is little to share. Studies verify the ends
        of every line anyway.

        Returns:
            Whether they are large. False for a model that has to be loaded.
        """
        return sum(self.tensors[name].nbytes for name in names) > _LARGE and not self.folds

    def takes_points_in_turn(
        self, names: Collection[str], splits: Mapping[str, Examples] | None = None
    ) -> bool:
        """Whether each point takes all batches before the next point.

        On a GPU with its examples in memory, unless points share a part of their forward passes. On
        a CPU both orders take the same time (an MLP and a ResNet-20, measured), and replicas of the
        model in threads need weights of their own.

        Returns:
            Whether `SequentialPoints` evaluate them.
        """
        strategy = self.strategy_for(names)
        splits = self.splits if splits is None else splits
        examples = [*splits.values(), *([self.recalibration.split] if self.recalibration else [])]
        return (
            launches_kernels(self.device)
            and strategy in {Strategy.SHARED, Strategy.BOUND}
            and all(isinstance(own, Split) and own.is_on(self.device) for own in examples)
            and not (strategy is Strategy.SHARED and self._shares(names))
        )

    @torch.no_grad()
    def _shares(self, names: Collection[str]) -> bool:
        """Whether points share the first layer, or layers before the first moving tensor."""
        key = frozenset(names)
        if key not in self._shared:
            moving = {name: self.tensors[name] for name in names}
            watcher = FirstLayerWatcher(
                moving, self.tensors, Line(moving, moving), stops=is_stateless(self), measures=False
            )
            batch = next(iter(self.first_batches().values()))
            with contextlib.suppress(FirstLayerFound), self.deferring(), watcher:
                self.forward(self.model, self.prepare(batch))
            self._shared[key] = watcher.layer is not None or watcher.prefix is not None
        return self._shared[key]

    def strategy_for(self, names: Iterable[str]) -> Strategy:
        """Returns how points are evaluated if tensors of these names move."""
        if self.is_large(names):
            return Strategy.BOUND
        return self.strategy or self.provisional or Strategy.LOADED

    @torch.no_grad()
    def at(
        self,
        slice_: Slice,
        coordinates: Sequence[Sequence[float]],
        splits: Mapping[str, Examples] | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Evaluation]:
        """Evaluates points of a slice in one pass over the data.

        Args:
            slice_: The slice, its ends on this objective's device. Tensors that it does not move
                keep the values last loaded; those that it moves are left at an arbitrary point.
            coordinates: The P points.
            splits: The examples; all by default.
            progress: Called with the progress.

        Returns:
            For each split the evaluation at the P points.
        """
        strategy = self.strategy_for(slice_.ends[0])
        if strategy is Strategy.LOADED:
            return self.evaluate(LoadedPoints(self, slice_, coordinates), splits, progress)
        points: BoundPoints | SequentialPoints
        if strategy is Strategy.STACKED:
            points = StackedPoints(self, slice_, coordinates, proving=self.proving)
        elif self.takes_points_in_turn(slice_.ends[0], splits):
            points = SequentialPoints(self, slice_, coordinates)
        else:
            points = BoundPoints(self, slice_, coordinates, strategy, proving=self.proving)
        with points:
            return self.evaluate(points, splits, progress)

    def evaluate(
        self,
        points: Points,
        splits: Mapping[str, Examples] | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Evaluation]:
        """Evaluates points with the given splits, by default all of them."""
        splits = self.splits if splits is None else splits
        total = sum(map(len, splits.values()))
        if self.recalibration is not None:
            total += len(self.recalibration)

        def report(examples: int) -> None:
            if progress is not None:
                progress(examples / total)

        with allocations(), RandomnessDetector(self.device) as draws:
            sums = {name: self._zeros(len(points), len(split)) for name, split in splits.items()}
            graphs = self._graphs_for(points, splits.values())
            for indices in points.passes():
                later = graphs if indices.start else None
                statistics = None if later is None else later.statistics
                self.recalibrate(points, report, statistics)
                for name, split in splits.items():
                    if later is None:
                        self._add_split(points, split, sums[name], indices, report)
                    else:
                        self._replay_split(later.losses, split, sums[name], indices.start, report)
            if graphs is not None and self.proving:
                self.graph = graphs.reason or "used"
            evaluations = {name: self._means(sums[name], len(splits[name])) for name in splits}
        if draws.names:
            raise NondeterministicModelError(
                f"the forward pass draws random numbers from {' and '.join(draws.names)}, even in "
                "eval mode",
                DETERMINISTIC,
            )
        return evaluations

    def recalibrate(
        self,
        points: Points,
        report: Callable[[int], None] = lambda _: None,
        graphs: BatchGraphs | None = None,
    ) -> None:
        """Estimates BatchNorm's statistics at all points, a batch at a time.

        Args:
            points: The points.
            report: Called with the number of examples of each finished batch.
            graphs: Graphs of the batches, for points after the first that take them in turn.

        Raises:
            OutOfMemoryError: One point and one batch do not fit.
        """
        if self.recalibration is None:
            return
        try:
            batches = self.recalibration.batches()
            batches = transferred(batches, self.device, copy_stream(self.device))
            if graphs is not None and isinstance(points, SequentialPoints):
                self._replay_statistics(graphs, points, batches, report)
            else:
                for batch in batches:
                    inputs = self.prepare(batch)
                    self._finish(points.record_statistics(inputs), len(batch), report)
            updated = points.use_statistics()
        except (torch.OutOfMemoryError, MemoryError):
            # Fewer points at once may fit; but the batch must not be halved.
            if len(points) > 1:
                raise
            raise OutOfMemoryError(
                f"a batch of {self.recalibration.size} training examples, which --buffers "
                f"recalibrate takes at a time, does not fit into the memory of {self.device}",
                "Try --device cpu or --dtype bfloat16",
            ) from None
        self.idle = [layer for layer in self.batchnorm if layer.mean not in updated]

    def _zeros(self, points: int, examples: int) -> _Sums:
        losses = torch.empty(points, examples, dtype=self.loss_type, device=self.device)
        zeros = torch.zeros(points, dtype=self.sum_type, device=self.device)
        totals: dict[str | None, Tensor] = {name: zeros.clone() for name in self.metrics}
        if SEED_ERROR in self.columns:
            totals[None] = zeros.unsqueeze(1).repeat(1, len(self.seeds))
        return _Sums(losses, totals)

    def _add_split(
        self,
        points: Points,
        split: Examples,
        sums: _Sums,
        indices: range,
        report: Callable[[int], None],
    ) -> None:
        """Evaluates the points of a pass batch by batch, without waiting for the device."""
        # Each batch has sums of its own, added when all its points are done: two threads may
        # evaluate two batches at one point, and the order of addition determines the last digit.
        previous: tuple[Iterator[int], int, dict[str | None, Tensor]] = iter(()), 0, {}
        start = 0
        for batch in self.batches(split):
            inputs = self.prepare(batch)
            columns = sums.losses[:, start : start + len(batch)]
            start += len(batch)
            own = {name: torch.zeros_like(total) for name, total in sums.totals.items()}
            collector = OutputCollector(self, batch.targets, columns, own)
            if 0 in indices:
                sums.weights.append(collector.weights)
            done = points.evaluate(inputs, collector)
            # One batch ahead, so that no thread waits for the last point of the previous batch.
            self._add(*previous, sums.totals, report)
            previous = done, len(batch), own
        self._add(*previous, sums.totals, report)

    def graph_bytes(self, splits: Iterable[Examples]) -> int:
        """Estimates the memory of graphs, which is not used for anything else.

        Args:
            splits: The examples.

        Returns:
            The bytes of a batch as stored, and of its activations: what one operator reads and
            writes, and as much that others keep.
        """
        size = self.batch_size
        if self.recalibration is not None:
            size = max(size, self.recalibration.size)
        stored = max(split.first(1).nbytes for split in splits)
        return size * (stored + 2 * self.activations)

    def why_no_graphs(self, splits: Iterable[Examples]) -> str:
        """Returns why batches cannot be evaluated as graphs on a device that has them; or nothing.

        Args:
            splits: The examples.
        """
        functions = [self.loss, *self.metrics.values()]
        if self.seeds or not (is_stateless(self) and all(map(is_registered, functions))):
            return "the model or the loss has code of its own"
        budget = device_budget(self.device)
        if budget is not None and self.graph_bytes(splits) > budget:
            return "the graph of a batch takes more than a quarter of the free memory"
        return ""

    def _graphs_for(self, points: Points, splits: Collection[Examples]) -> _Graphs | None:
        """Returns graphs for batches at points that take all batches in turn, if they pay."""
        capture = graph_capture(self.device)
        if capture is None or not isinstance(points, SequentialPoints):
            return None
        if reason := self.why_no_graphs(splits):
            self.graph = reason
            return None
        if self.proving:
            return self._new_graphs(capture, points)
        if self.graph not in {None, "used"}:
            # They were not right when the strategy was tested.
            return None
        batches = sum(math.ceil(len(split) / self.batch_size) for split in splits)
        if self.recalibration is not None:
            batches += math.ceil(len(self.recalibration) / self.recalibration.size)
        # The first point is evaluated without.
        pays = (len(points) - 1) * batches >= gpu_thresholds.LEAST_REPLAYS
        return self._new_graphs(capture, points) if pays else None

    def _new_graphs(self, capture: GraphCapture, points: SequentialPoints) -> _Graphs:
        """Makes graphs of evaluating a batch with the weights that the model is bound to."""

        def evaluate(batch: Split, results: Sequence[Tensor]) -> None:
            losses, *sums = results
            own: dict[str | None, Tensor] = dict(zip(self.metrics, sums, strict=True))
            collector = OutputCollector(self, batch.targets, losses, own, weighs=False)
            for _ in LoadedPoint(self).evaluate(self.prepare(batch), collector):
                pass

        def estimate(batch: Split, results: Sequence[Tensor]) -> None:
            points.write_statistics(self.prepare(batch), results[0])

        return _Graphs(BatchGraphs(capture, evaluate), BatchGraphs(capture, estimate))

    def _replay_split(
        self,
        graphs: BatchGraphs,
        split: Examples,
        sums: _Sums,
        p: int,
        report: Callable[[int], None],
    ) -> None:
        """Evaluates a point after the first batch by batch, as graphs."""
        start = 0
        for batch in self.batches(split):
            losses = sums.losses[p : p + 1, start : start + len(batch)]
            own = [torch.empty_like(total[:1]) for total in sums.totals.values()]
            graphs.evaluate(batch, [losses, *own])
            for total, values in zip(sums.totals.values(), own, strict=True):
                total[p : p + 1].add_(values)
            start += len(batch)
            report(len(batch))

    @staticmethod
    def _replay_statistics(
        graphs: BatchGraphs,
        points: SequentialPoints,
        batches: Iterable[Split],
        report: Callable[[int], None],
    ) -> None:
        """Estimates BatchNorm's statistics at a point after the first, as graphs."""
        total: Tensor | None = None
        for batch in batches:
            own = points.empty_statistics()
            graphs.evaluate(batch, [own])
            total = own if total is None else total + own
            report(len(batch))
        if total is not None:
            points.set_statistics(total)

    def _means(self, sums: _Sums, examples: int) -> Evaluation:
        """Moves losses and the means of the metrics to the CPU."""
        weights = {name: join_weights(sums.weights, name) for name in (None, *self.metrics)}
        counts = {name: float(w.sum()) for name, w in weights.items() if name and w is not None}
        losses, own = sums.losses.cpu(), weights[None]
        if own is not None:
            # nan if all targets are ignored.
            losses /= own.mean()
        seeds = sums.totals.pop(None, None)
        metrics = {
            name: total.cpu().to(torch.float64) / counts.get(str(name), examples)
            for name, total in sums.totals.items()
            if name is not None
        }
        if seeds is not None:
            means = seeds.cpu().double() / (examples if own is None else float(own.sum()))
            metrics[SEED_ERROR] = means.std(1) / math.sqrt(len(self.seeds))
        return Evaluation(losses, metrics, own, counts)

    def _add(
        self,
        points: Iterator[int],
        examples: int,
        sums: Mapping[str | None, Tensor],
        totals: Mapping[str | None, Tensor],
        report: Callable[[int], None],
    ) -> None:
        self._finish(points, examples, report)
        for name, values in sums.items():
            totals[name].add_(values)

    @staticmethod
    def _finish(points: Iterator[int], examples: int, report: Callable[[int], None]) -> None:
        for _ in points:
            report(examples)


def _default_batch(data: DataSet, device: torch.device) -> int:
    """The largest power of two within the byte limit of a batch; the same for every run."""
    budget, most = _BATCH.get(device.type, _BATCH_ELSEWHERE)
    example = max(
        sum(map(_bytes_in_forward, leaves(split.first(1).inputs))) for split in data.splits.values()
    )
    return 1 << (min(most, max(1, budget // max(1, example))).bit_length() - 1)


def _place(splits: Mapping[str, Examples], device: torch.device) -> dict[str, Examples]:
    """Moves splits in memory to the device as long as they fit."""
    budget = device_budget(device)
    placed: dict[str, Examples] = {}
    for name, split in splits.items():
        new = split.nbytes if isinstance(split, Split) and not split.is_on(device) else 0
        fits = budget is None or new <= budget
        with placing(f"the examples of {name}", device, "--limit"):
            placed[name] = split.to(device) if isinstance(split, Split) and fits else split
        if budget is not None and fits:
            budget -= new
    return placed


def _placed_recalibration(
    recalibration: Recalibration,
    splits: Mapping[str, Examples],
    placed: Mapping[str, Examples],
    device: torch.device,
) -> Recalibration:
    """Moves training examples to the device if they fit, or takes a split that is already there."""
    split, budget = recalibration.split, device_budget(device)
    there = [placed[name] for name, own in splits.items() if own is split]
    if there:
        split = there[0]
    elif isinstance(split, Split) and (budget is None or split.nbytes <= budget):
        with placing(f"the examples of {recalibration.name}", device, "--limit"):
            split = split.to(device)
    order = recalibration.order
    if isinstance(split, Split) and split.holds_tensors_only and not split.in_batches:
        # Else every batch would wait for a copy of its indices.
        order = order.to(split.device)
    return replace(recalibration, split=split, order=order)


def _bytes_in_forward(inputs: Tensor) -> int:
    """Estimates the bytes of one example in a forward pass from a tensor of its inputs."""
    whole = not inputs.is_floating_point() and inputs.dtype not in {torch.uint8, torch.bool}
    # The first layer gives an image more channels.
    factor = _TOKEN_BYTES if whole else 4 * (2 if inputs.ndim > 2 else 1)
    return inputs.numel() * factor


def is_close(losses: Tensor, truth: Tensor, tolerance: float) -> bool:
    """Whether losses are finite in the same places, and their `relative_difference` is small."""
    return relative_difference(losses, truth) <= tolerance


def relative_difference(losses: Tensor, truth: Tensor) -> float:
    """Computes ‖l − t‖ / ‖t‖ over the finite losses.

    Args:
        losses: The losses l.
        truth: The reference t.

    Returns:
        The difference; infinite if other losses are finite than in the reference.
    """
    finite = truth.isfinite()
    if not torch.equal(losses.isfinite(), finite):
        return math.inf
    losses, truth = losses.double()[finite], truth.double()[finite]
    if torch.equal(losses, truth):
        return 0.0
    # Scaled, since squares of large or small losses may leave the range of float64.
    largest = truth.abs().max()
    if not largest:
        return math.inf
    return float(((losses - truth) / largest).norm() / (truth / largest).norm())


@torch.no_grad()
def recalibrated(objective: Objective, weights: Weights) -> Weights:
    """Estimates BatchNorm's statistics at a point.

    Args:
        objective: The objective.
        weights: All tensors of the model; they stay loaded, but for the statistics.

    Returns:
        The weights with the new statistics; unchanged if there are none.
    """
    if objective.recalibration is None:
        return weights
    objective.load(weights)
    objective.recalibrate(LoadedPoint(objective))
    names = [name for layer in objective.statistics for name in layer.names]
    return {**weights, **{n: objective.tensors[n].to(weights[n].device, copy=True) for n in names}}
