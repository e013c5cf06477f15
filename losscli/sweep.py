"""Walks many points in chunks that fit the memory; what does not fit is halved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch

from losscli.datasets import Examples
from losscli.errors import OutOfMemoryError
from losscli.geometry import Slice
from losscli.journal import Journal
from losscli.objective import Evaluation, Objective
from losscli.recording import Log
from losscli.weights import Weights

__all__ = ["check", "halving", "points_that_fit", "settle", "sweep", "sweep_plain"]

_T = TypeVar("_T")

_CPU_STACK = 256 << 20
_GPU_SHARE = 0.25


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
        log = Log.of_slice(journal, objective, splits, slice_, coordinates)
    parts: list[dict[str, Evaluation]] = []
    done = 0
    while done < len(coordinates):
        known = None if log is None else log.recall_chunk(done)
        if known is not None:
            part, number, chunk = known
            parts.append(part)
            done += number
            if journal is not None and progress is not None:
                journal.skipped += number
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
            log.record_chunk(done, part, len(points), chunk)
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
        log = None if journal is None else Log(journal, objective, splits, "plain", [weights])
        known = None if log is None else log.recall_chunk(0)
        if known is not None:
            # What comes next may find these weights where a slice moves nothing.
            objective.load(weights)
            results.append(known[0])
            if journal is not None and progress is not None:
                journal.skipped += 1
                progress(len(results))
            continue

        def evaluate(weights: Weights = weights, done: int = len(results)) -> dict[str, Evaluation]:
            return objective.plain(weights, splits, _Tally(done, progress).add)

        found = halving(objective, evaluate)
        if log is not None:
            log.record_chunk(0, found, 1, 1)
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
