"""Model, loss and data: per-example losses at points of weight space. The room for all devices.

However points are evaluated, one law holds: the numbers of the checkpoint loaded plainly.
"""

from __future__ import annotations

import copy
import enum
import itertools
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from losscli.datasets import DataSet, Inputs, Split, leaves, map_inputs
from losscli.errors import (
    LosscliError,
    LossError,
    ModelError,
    NondeterministicModelError,
    one_line,
)
from losscli.first_layer import Watch
from losscli.geometry import Slice
from losscli.losses import LOSSES, METRICS, PerExample, cross_entropy
from losscli.weights import Weights

__all__ = ["Evaluation", "Objective", "Progress"]

Progress = Callable[[float], None]
"""Called with the share of a point that was done since the last call."""

# Bytes of prepared inputs in a batch, and the most examples. On two cores of an Ice Lake Xeon the
# MLP 784-512-512-10 is fastest at 1,000 examples and ResNet-20 between 64 and 256: larger batches
# fall out of the caches.
_BATCH = {"cpu": (4 << 20, 1024)}
_BATCH_ELSEWHERE = (256 << 20, 4096)

# Examples on which a way to evaluate is held against the plain one.
_PROOF_EXAMPLES = 256

# Above this size a model has no second copy, and few enough points at once that none is missed.
_LARGE_BYTES = 64 << 20

# A token id stands for a vector: it is counted as one of a thousand floats.
_TOKEN_BYTES = 4096


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
        self.model = model.to(device=device, dtype=dtype).eval()
        self.loss = loss
        self.metrics = dict(metrics)
        self.data = data
        self.device = device
        self.dtype = dtype
        self.batch_size = batch_size or self._default_batch()
        self.splits = {name: split.to(device) for name, split in data.splits.items()}
        self.tensors = _tensors_of(self.model)
        self._copies_inputs = False
        self._way: _Way | None = None

    def _default_batch(self) -> int:
        """The power of two that fits the bytes a batch may have; the same for every run."""
        budget, most = _BATCH.get(self.device.type, _BATCH_ELSEWHERE)
        example = max(
            sum(t[0].numel() * _bytes_in_forward(t) for t in leaves(split.inputs))
            for split in self.data.splits.values()
        )
        return 1 << (min(most, max(1, budget // max(1, example))).bit_length() - 1)

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
        # Some models fold their weights into others when they are put into eval mode.
        if self._folds:
            self.model.train()
        self.model.load_state_dict(dict(weights), strict=False)
        if self._folds:
            self.model.eval()

    @property
    def _folds(self) -> bool:
        return any(type(module).train is not nn.Module.train for module in self.model.modules())

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
            outputs = self.forward(self.model, inputs)
            if not isinstance(outputs, Tensor) and self.loss in LOSSES.values():
                raise LossError(
                    f"the model returns a {type(outputs).__name__}, and the loss takes a tensor",
                    "Give a --loss of your own that takes it, or a model that returns its scores",
                )
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
        way = self._way or _Way.LOADED
        if way is _Way.LOADED:
            return self._evaluate(_Loaded(self, slice_, coordinates), splits, progress)
        with _Points(self, slice_, coordinates, way) as points:
            return self._evaluate(points, splits, progress)

    @torch.no_grad()
    def settle(self, slice_: Slice, coordinates: Sequence[Sequence[float]]) -> None:
        """Chooses the fastest way to evaluate points that gives the numbers of the plain one.

        A few points are evaluated on a part of a batch by loading each plainly, then in every
        way from the fastest on until one agrees. The choice is made once.

        Args:
            slice_: The slice.
            coordinates: As many points as will be evaluated at once.
        """
        if self._way is not None:
            return
        moving = sum(self.tensors[name].nbytes for name in slice_.ends[0])
        if moving > _LARGE_BYTES and not self._folds:
            # The proof would cost a second copy. Whoever sweeps a line compares its ends anyway.
            self._way = _Way.BOUND
            return
        name, split = next(iter(self.splits.items()))
        sample = {name: split.take(slice(0, min(self.batch_size, _PROOF_EXAMPLES)))}
        few = [tuple(coordinates[i * (len(coordinates) - 1) // 3]) for i in range(4)]
        few = list(dict.fromkeys(few))
        truth = self._evaluate(_Loaded(self, slice_, few), sample, None)[name].losses
        for way in self._ways():
            self._way = way
            try:
                found = self.at(slice_, few, sample)[name].losses
            except ModelError:
                continue
            if _agree(found, truth, self.dtype):
                return
        self._way = _Way.LOADED

    def _ways(self) -> list[_Way]:
        if self._folds:
            return []
        functions = [self.loss, *self.metrics.values()]
        known = [*LOSSES.values(), *METRICS.values()]
        if (
            self.device.type == "cpu"
            and all(function in known for function in functions)
            and _is_known(self.model)
        ):
            return [_Way.THREADS, _Way.SHARED, _Way.BOUND]
        return [_Way.SHARED, _Way.BOUND]

    def _evaluate(
        self,
        points: _Plain | _Loaded | _Points,
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
        points: _Plain | _Loaded | _Points,
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
        before: tuple[Iterator[int], int] = iter(()), 0
        for start in range(0, len(split), self.batch_size):
            batch = split.take(slice(start, start + self.batch_size))
            inputs = self.data.prepare(batch.inputs, self.dtype)
            columns = losses[:, start : start + self.batch_size]
            done = points.evaluate(inputs, self._recorder(batch.targets, columns, sums))
            # One batch ahead, so that no thread waits for the last point of the one before.
            self._finish(*before, tell)
            before = done, len(batch)
        self._finish(*before, tell)
        return Evaluation(
            losses.cpu(),
            {name: total.cpu().to(torch.float64) / len(split) for name, total in sums.items()},
        )

    @staticmethod
    def _finish(points: Iterator[int], examples: int, tell: Callable[[int], None]) -> None:
        for _ in points:
            tell(examples)

    def _recorder(
        self, targets: Tensor, losses: Tensor, sums: Mapping[str, Tensor]
    ) -> Callable[[int, Any], None]:
        def record(p: int, outputs: Any) -> None:
            losses[p] = self._per_example(self.loss, outputs, targets, "loss")
            for name, function in self.metrics.items():
                values = self._per_example(function, outputs, targets, f"metric {name!r}")
                sums[name][p] += values.to(sums[name].dtype).sum()

        return record

    def forward(self, model: nn.Module, inputs: Inputs) -> Any:
        """Runs the model, or a replica of it.

        Args:
            model: The one to run.
            inputs: A prepared batch.

        Returns:
            What the model returns; half-precision scores in float32.

        Raises:
            ModelError: The model fails.
        """
        if self._copies_inputs:
            inputs = map_inputs(Tensor.clone, inputs)
        try:
            if isinstance(inputs, Tensor):
                outputs = model(inputs)
            elif isinstance(inputs, tuple):
                outputs = model(*inputs)
            else:
                outputs = model(**inputs)
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
        self._objective = objective

    def __len__(self) -> int:
        return 1

    def evaluate(self, inputs: Inputs, record: Callable[[int, Any], None]) -> Iterator[int]:
        record(0, self._objective.forward(self._objective.model, inputs))
        yield 0


class _Loaded:
    """P points of a slice, each loaded plainly for every batch: slow, and the truth."""

    def __init__(
        self, objective: Objective, slice_: Slice, coordinates: Sequence[Sequence[float]]
    ) -> None:
        self._objective = objective
        self._slice = slice_
        self._coordinates = coordinates

    def __len__(self) -> int:
        return len(self._coordinates)

    def evaluate(self, inputs: Inputs, record: Callable[[int, Any], None]) -> Iterator[int]:
        """Takes a batch to all points, as the points are asked for."""
        for p, point in enumerate(self._coordinates):
            self._load(point)
            record(p, self._objective.forward(self._objective.model, inputs))
            yield p

    def _load(self, point: Sequence[float]) -> None:
        dtype = self._objective.dtype
        self._objective.load({
            name: self._slice.combine(_working_ends(self._slice, name, dtype), point)
            for name in self._slice.ends[0]
        })


class _Way(enum.Enum):
    """How points are evaluated, from the fastest to the surest."""

    THREADS = enum.auto()
    """Bound to replicas of the model in threads, the first layer shared."""
    SHARED = enum.auto()
    """Bound to the model one after the other, the first layer shared."""
    BOUND = enum.auto()
    """Bound to the model one after the other."""
    LOADED = enum.auto()
    """Loaded plainly."""


class _Points:
    """P points of a slice, their weights in memory; a batch is taken to all of them.

    What a first layer gives is computed for all points at once, where that can be. On a CPU the
    points are dealt to as many threads as the operators may use, each with a replica of the model
    and operators of a single thread: so no operator has to wait for its slowest part.
    """

    def __init__(
        self,
        objective: Objective,
        slice_: Slice,
        coordinates: Sequence[Sequence[float]],
        way: _Way,
    ) -> None:
        self._objective = objective
        self._slice = slice_
        self._coordinates = coordinates
        # Beside the ends there must be enough points for their products to pay.
        self._shares = way is not _Way.BOUND and len(coordinates) > len(slice_.ends)
        self._own = {name: objective.tensors[name].data for name in slice_.ends[0]}
        self._stacks = self._materialise()
        self._threads = torch.get_num_threads()
        self._workers = min(self._threads, len(coordinates)) if way is _Way.THREADS else 1
        # The first, the model itself, looks ahead where others do the work.
        self._first, *others = _replicas(
            objective.model, self._workers + 1 if self._workers > 1 else 1
        )
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
            self._objective.tensors[name].data = own

    def __len__(self) -> int:
        return len(self._coordinates)

    def evaluate(self, inputs: Inputs, record: Callable[[int, Any], None]) -> Iterator[int]:
        """Begins to take a batch to all points.

        Args:
            inputs: The batch, prepared.
            record: Called with each point and its outputs, from several threads at a time.

        Returns:
            The points as they are done; without threads, the work is done as it is asked for.
        """
        layer = None
        begin = 0
        if self._shares:
            tensors = {name: self._first.tensors[name] for name in self._own}
            watch = Watch(tensors, self._slice, self._objective.dtype)
            record(0, self._outputs(0, self._first, inputs, watch))
            layer = watch.layer
            begin = 1

        def work(p: int) -> int:
            replica = self._replicas.get()
            try:
                point = self._coordinates[p]
                replay = nullcontext() if layer is None else layer.at(point, replica.tensors)
                with torch.no_grad():
                    record(p, self._outputs(p, replica, inputs, replay))
            finally:
                self._replicas.put(replica)
            return p

        points = range(begin, len(self))
        if self._pool is None:
            return itertools.chain(range(begin), map(work, points))
        futures = [self._pool.submit(work, p) for p in points]
        return itertools.chain(range(begin), (f.result() for f in as_completed(futures)))

    def _outputs(
        self, p: int, replica: _Replica, inputs: Inputs, mode: AbstractContextManager[Any]
    ) -> Any:
        for name, stack in self._stacks.items():
            replica.tensors[name].data = stack[p]
        with mode:
            return self._objective.forward(replica.model, inputs)

    def _materialise(self) -> dict[str, Tensor]:
        """Makes the weights of all points, ``[P, *shape]`` for each tensor."""
        stacks = {}
        for name, own in self._own.items():
            # A single point needs no memory of its own: the model's will do.
            alone = len(self._coordinates) == 1
            stack = own.unsqueeze(0) if alone else own.new_empty(len(self._coordinates), *own.shape)
            ends = _working_ends(self._slice, name, own.dtype)
            for out, point in zip(stack, self._coordinates, strict=True):
                if out.dtype == ends[0].dtype:
                    self._slice.combine(ends, point, out)
                else:
                    out.copy_(self._slice.combine(ends, point))
            stacks[name] = stack
        return stacks


@dataclass(frozen=True)
class _Replica:
    """A model whose tensors can be bound to other values than those of its twins."""

    model: nn.Module
    tensors: Mapping[str, Tensor]


def _replicas(model: nn.Module, number: int) -> list[_Replica]:
    """Makes replicas that share the model's memory; the model itself is the first."""
    replicas = [_Replica(model, _tensors_of(model))]
    for _ in range(number - 1):
        shared: dict[int, Any] = {
            id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()
        }
        twin = copy.deepcopy(model, shared)
        replicas.append(_Replica(twin, _tensors_of(twin)))
    return replicas


def _bytes_in_forward(inputs: Tensor) -> int:
    whole = not inputs.is_floating_point() and inputs.dtype not in {torch.uint8, torch.bool}
    return _TOKEN_BYTES if whole else 4


def _is_known(model: nn.Module) -> bool:
    """Whether all of a model's code is known to share nothing between its replicas."""
    # Code of a user's own may: a closure that copying does not reach, a table that a hook fills.
    return all(
        type(module).__module__.startswith(("torch.nn.", "losscli.models"))
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in module.__dict__
        for module in model.modules()
    )


def _working_ends(slice_: Slice, name: str, dtype: torch.dtype) -> list[Tensor]:
    """A tensor at the ends in the type that it moves in: half-precision moves in float32."""
    working = torch.float64 if dtype == torch.float64 else torch.float32
    return [end[name].to(working) for end in slice_.ends]


def _agree(found: Tensor, truth: Tensor, dtype: torch.dtype) -> bool:
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 5e-2)
    finite = truth.isfinite()
    if not torch.equal(found.isfinite(), finite):
        return False
    found, truth = found.double()[finite], truth.double()[finite]
    return bool((found - truth).norm() <= tolerance * truth.norm())


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor)
    }
