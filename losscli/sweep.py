"""Walks many points in chunks that fit the memory; what does not fit is halved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from losscli.datasets import Examples, leaves
from losscli.errors import OutOfMemoryError
from losscli.geometry import Slice
from losscli.journal import Journal
from losscli.mapped import let_go
from losscli.objective import Evaluation, Objective
from losscli.points import Way
from losscli.weights import Weights

__all__ = ["check", "halving", "points_that_fit", "settle", "sweep", "sweep_plain"]

_T = TypeVar("_T")

_CPU_STACK = 256 << 20
_GPU_SHARE = 0.25

# So many examples of a split tell it from another block of the same data.
_TELLING = 16


def points_that_fit(objective: Objective, names: Iterable[str]) -> int:
    """Finds how many points may have their weights in memory at once.

    Args:
        objective: The objective.
        names: The tensors that move.

    Returns:
        At least 1; the weights of so many points take at most 256 MiB on a CPU, or a quarter of
        the free memory of a GPU.
    """
    size = sum(objective.tensors[name].nbytes for name in names)
    for layer in objective.statistics:
        # Of statistics there are the sums too, in float64.
        own = [objective.tensors[name] for name in layer.names]
        size += sum(tensor.nbytes + 8 * tensor.numel() for tensor in own)
    if objective.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(objective.device)
        budget = int(free * _GPU_SHARE)
    else:
        budget = _CPU_STACK
    return max(1, budget // max(1, size))


def check(objective: Objective, weights: Weights) -> None:
    """Makes sure that model, loss and data work together; out of memory, the batch is halved.

    Args:
        objective: What will be evaluated.
        weights: All tensors of the model; what no slice moves stays loaded.
    """
    halving(objective, lambda: objective.check(weights))


def settle(objective: Objective, slice_: Slice, coordinates: Sequence[Sequence[float]]) -> None:
    """Settles how points are evaluated; out of memory, the batch is halved.

    Args:
        objective: What will be evaluated.
        slice_: The slice.
        coordinates: The points.
    """
    halving(objective, lambda: objective.settle(slice_, coordinates))


def sweep(
    objective: Objective,
    slice_: Slice,
    coordinates: Sequence[Sequence[float]],
    *,
    chunk: int | None = None,
    splits: Mapping[str, Examples] | None = None,
    progress: Callable[[float], None] | None = None,
    journal: Journal | None = None,
) -> dict[str, Evaluation]:
    """Evaluates any number of points of a slice.

    Out of memory, the chunk of points is halved, down to one point, then the batch, down to one
    example; what was finished stays.

    Args:
        objective: What to evaluate. Tensors that the slice does not move are as last loaded.
        slice_: The slice, its ends on the objective's device.
        coordinates: The P points.
        chunk: Points at a time; by the memory at hand where it is None.
        splits: The examples; all by default.
        progress: Called with the points done so far, a growing number up to P.
        journal: Where finished chunks are recorded, and recalled from instead of evaluated.

    Returns:
        For each split its evaluation at all P points, in their order.

    Raises:
        OutOfMemoryError: One point and one example do not fit.
    """
    chunk = min(chunk or points_that_fit(objective, slice_.ends[0]), max(1, len(coordinates)))
    log = None
    if journal is not None:
        log = _Log.of_slice(journal, objective, splits, slice_, coordinates)
    parts: list[dict[str, Evaluation]] = []
    done = 0
    while done < len(coordinates):
        known = None if log is None else log.recall(done)
        if known is not None:
            part, number, chunk = known
            parts.append(part)
            done += number
            if progress is not None:
                progress(done)
            continue
        points = coordinates[done : done + chunk]
        tell = _Tally(done, progress)
        try:
            objective.settle(slice_, points)
            part = objective.at(slice_, points, splits, tell.add)
        except (torch.OutOfMemoryError, MemoryError):
            if len(points) > 1:
                chunk = len(points) // 2
            else:
                _halve_batch(objective)
            continue
        if log is not None:
            log.record(done, part, len(points), chunk)
        parts.append(part)
        done += len(points)
    if not parts:
        # Of a line, the ends may be all there is to see; they are loaded plainly.
        exact = torch.float64 if objective.dtype == torch.float64 else torch.float32
        nothing = {metric: torch.empty(0, dtype=torch.float64) for metric in objective.metrics}
        chosen = objective.splits if splits is None else splits
        return {
            name: Evaluation(torch.empty(0, len(split), dtype=exact), nothing)
            for name, split in chosen.items()
        }
    return {
        name: Evaluation(
            torch.cat([part[name].losses for part in parts]),
            {
                metric: torch.cat([part[name].metrics[metric] for part in parts])
                for metric in objective.metrics
            },
        )
        for name in (objective.splits if splits is None else splits)
    }


def sweep_plain(
    objective: Objective,
    checkpoints: Iterable[Weights],
    *,
    splits: Mapping[str, Examples] | None = None,
    progress: Callable[[float], None] | None = None,
    journal: Journal | None = None,
) -> list[dict[str, Evaluation]]:
    """Evaluates checkpoints, each loaded plainly; out of memory, the batch is halved.

    Args:
        objective: What to evaluate.
        checkpoints: All tensors of the model, for each point.
        splits: The examples; all by default.
        progress: Called with the points done so far.
        journal: Where finished points are recorded, and recalled from instead of evaluated.

    Returns:
        For each checkpoint and split the evaluation at this one point.
    """
    results: list[dict[str, Evaluation]] = []
    for weights in checkpoints:
        log = None if journal is None else _Log(journal, objective, splits, "plain", [weights])
        known = None if log is None else log.recall(0)
        if known is not None:
            # What comes next may find these weights where a slice moves nothing.
            objective.load(weights)
            results.append(known[0])
            if progress is not None:
                progress(len(results))
            continue

        def evaluate(weights: Weights = weights, done: int = len(results)) -> dict[str, Evaluation]:
            return objective.plain(weights, splits, _Tally(done, progress).add)

        found = halving(objective, evaluate)
        if log is not None:
            log.record(0, found, 1, 1)
        results.append(found)
    return results


def halving(objective: Objective, work: Callable[[], _T]) -> _T:
    """Does some work, anew with half the batch whenever it is out of memory.

    Args:
        objective: Whose batch.
        work: What to do.

    Returns:
        What the work returns.

    Raises:
        OutOfMemoryError: One example does not fit.
    """
    while True:
        try:
            return work()
        except (torch.OutOfMemoryError, MemoryError):
            _halve_batch(objective)


def _halve_batch(objective: Objective) -> None:
    if objective.batch_size == 1:
        raise OutOfMemoryError(
            f"one point and one example do not fit into the memory of {objective.device}",
            "Try --device cpu or --dtype bfloat16",
        )
    objective.batch_size //= 2
    if objective.device.type == "cuda":
        torch.cuda.empty_cache()


class _Tally:
    """Adds shares of points to those that were done before."""

    def __init__(self, done: float, progress: Callable[[float], None] | None) -> None:
        self._done = done
        self._progress = progress

    def add(self, share: float) -> None:
        self._done += share
        if self._progress is not None:
            self._progress(self._done)


class _Log:
    """The part of one sweep in a journal, chunk by chunk.

    With its losses a chunk has the state that evaluation was in: the points at a time, the batch
    and the way. The run that recalls it goes on in that state. So it takes the very chunks that the
    run which was broken off took, and would have taken, whatever halved them.

    Args:
        journal: The journal.
        objective: What is evaluated.
        splits: The examples; all where it is None.
        kind: What is done.
        weights: The tensors that points are made of.
        numbers: The points, made of JSON's types.
    """

    def __init__(
        self,
        journal: Journal,
        objective: Objective,
        splits: Mapping[str, Examples] | None,
        kind: str,
        weights: Sequence[Weights],
        numbers: object = None,
    ) -> None:
        self._journal = journal
        self._objective = objective
        self._splits = objective.splits if splits is None else splits
        training = objective.recalibration
        told = [
            *(kind, numbers, str(objective.dtype), list(objective.metrics)),
            training and [training.name, training.size, len(training)],
            *self._examples(),
        ]
        ends = [_content(end) for end in (*weights, self._rest(weights[0]))]
        for end in weights:
            let_go(*end.values())
        self._key = hashlib.sha256(json.dumps([told, ends]).encode()).hexdigest()

    @classmethod
    def of_slice(
        cls,
        journal: Journal,
        objective: Objective,
        splits: Mapping[str, Examples] | None,
        slice_: Slice,
        coordinates: Sequence[Sequence[float]],
    ) -> _Log:
        """Finds the part of points of a slice."""
        # Beside its ends a slice has numbers that are made of them, such as the place of a corner.
        numbers = [value for value in vars(slice_).values() if not isinstance(value, Mapping)]
        kind = type(slice_).__name__
        points = [list(point) for point in coordinates]
        return cls(journal, objective, splits, kind, slice_.ends, [numbers, points])

    def recall(self, start: int) -> tuple[dict[str, Evaluation], int, int] | None:
        """Recalls the chunk from a point on, its points, and how many were taken at a time."""
        found = self._journal.recall(f"{self._key} {start}")
        if found is None:
            return None
        number, chunk, self._objective.batch_size, way = found["state"].tolist()
        self._objective.way = Way(way) if way else None
        self._objective.idle = [self._objective.batchnorm[i] for i in found["idle"].tolist()]
        evaluations = {
            name: Evaluation(
                torch.from_numpy(found[f"{i}"]),
                {
                    metric: torch.from_numpy(found[f"{i} {k}"])
                    for k, metric in enumerate(self._objective.metrics)
                },
            )
            for i, name in enumerate(self._splits)
        }
        return evaluations, number, chunk

    def record(self, start: int, found: Mapping[str, Evaluation], number: int, chunk: int) -> None:
        """Records a chunk."""
        way = self._objective.way
        state = [number, chunk, self._objective.batch_size, way.value if way else 0]
        layers = self._objective.batchnorm
        idle = [i for i, layer in enumerate(layers) if layer in self._objective.idle]
        arrays = {"state": np.array(state), "idle": np.array(idle, np.int64)}
        for i, name in enumerate(self._splits):
            arrays[f"{i}"] = found[name].losses.numpy()
            for k, metric in enumerate(self._objective.metrics):
                arrays[f"{i} {k}"] = found[name].metrics[metric].numpy()
        self._journal.record(f"{self._key} {start}", arrays)

    def _examples(self) -> list[list[object]]:
        told: list[list[object]] = []
        for name, split in self._splits.items():
            first = split.first(_TELLING)
            tensors = [*leaves(first.inputs), first.targets]
            content = _content({str(i): tensor for i, tensor in enumerate(tensors)})
            told.append([name, len(split), content])
        return told

    def _rest(self, weights: Weights) -> Weights:
        """The tensors that stay as they are loaded, under whatever name a tensor goes."""
        tensors = self._objective.tensors
        estimated = (name for layer in self._objective.statistics for name in layer.names)
        moving = {id(tensors[name]) for name in (*weights, *estimated) if name in tensors}
        return {name: tensor for name, tensor in tensors.items() if id(tensor) not in moving}


def _content(weights: Weights) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
