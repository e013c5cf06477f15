"""Walks many points in chunks that fit the memory; what does not fit is halved."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch

from losscli.datasets import Examples, Split
from losscli.errors import OutOfMemoryError
from losscli.geometry import Slice
from losscli.journal import Journal
from losscli.objective import Evaluation, Objective
from losscli.points import Way
from losscli.ranks import Arrays, Ranks, current
from losscli.recording import Log, pack, unpack
from losscli.weights import Weights

__all__ = [
    "check",
    "halving",
    "points_at_once",
    "points_that_fit",
    "settle",
    "sweep",
    "sweep_plain",
]

_T = TypeVar("_T")

_CPU_STACK = 256 << 20
_GPU_SHARE = 0.25

# Points that share a first layer have to be some: a chunk costs about three more.
_FEW = 8

# Floating-point operations of a chunk of points, about a minute's: so much at most is lost where a
# run is killed. Counted, not timed: the same command takes the same chunks.
_WORK = {"cpu": 2 * 10**12, "cuda": 10**15}
_WORK_ELSEWHERE = 3 * 10**13

# Fewer points than these are no chunk, whatever they cost.
_LEAST = 16

# What decoding an example is counted as: where it takes longer than evaluating it at the points of
# a chunk, these are more.
_DECODING = {"cpu": 10**9}
_DECODING_ELSEWHERE = 10**10


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


def points_at_once(
    objective: Objective, names: Iterable[str], splits: Mapping[str, Examples] | None = None
) -> int:
    """Settles how many points are taken at a time: as many as fit, but no more than a minute's.

    Args:
        objective: The objective.
        names: The tensors that move.
        splits: The examples; all by default.

    Returns:
        At least 1. Where their weights fit, at least 16, and where data is decoded in each pass
        so many that evaluating takes about as long as decoding.
    """
    splits = objective.splits if splits is None else splits
    examples = sum(map(len, splits.values()))
    if objective.recalibration is not None:
        examples += len(objective.recalibration)
    kind, each = objective.device.type, objective.operations
    most = _WORK.get(kind, _WORK_ELSEWHERE) // (each * max(1, examples))
    least = _LEAST
    if _is_streamed(splits):
        least = max(least, _DECODING.get(kind, _DECODING_ELSEWHERE) // each)
    return min(points_that_fit(objective, names), max(least, most))


def _is_streamed(splits: Mapping[str, Examples]) -> bool:
    return any(not isinstance(split, Split) for split in splits.values())


def check(objective: Objective, weights: Weights) -> None:
    """Makes sure that model, loss and data work together; out of memory, the batch is halved.

    Args:
        objective: What will be evaluated.
        weights: All tensors of the model; what no slice moves stays loaded.
    """
    halving(objective, lambda: objective.check(weights))


def settle(objective: Objective, slice_: Slice, coordinates: Sequence[Sequence[float]]) -> None:
    """Settles how points are evaluated; out of memory, for fewer points, then for half the batch.

    Args:
        objective: What will be evaluated.
        slice_: The slice.
        coordinates: The points.
    """
    for few in (coordinates, [coordinates[0], coordinates[-1]]):
        try:
            objective.settle(slice_, few)
        except (torch.OutOfMemoryError, MemoryError):
            continue
        return
    halving(objective, lambda: objective.settle(slice_, coordinates[-1:]))


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
        chunk: Points at a time; by the memory at hand and what they cost where it is None.
        splits: The examples; all by default.
        progress: Called with the points done so far, a growing number up to P.
        journal: Where finished chunks are recorded, and recalled from instead of evaluated.

    Returns:
        For each split its evaluation at all P points, in their order.

    Raises:
        OutOfMemoryError: One point and one example do not fit.
    """
    splits = objective.splits if splits is None else splits
    chunk = chunk or points_at_once(objective, slice_.ends[0], splits)
    chunk = min(chunk, max(1, len(coordinates)))
    log = None
    if journal is not None:
        log = Log.of_slice(journal, objective, splits, slice_, coordinates)
    ranks = current()
    if ranks is not None and coordinates:
        return _deal(ranks, objective, slice_, coordinates, chunk, splits, progress, journal, log)
    return _walk(objective, slice_, coordinates, chunk, splits, progress, journal, log)


def _walk(
    objective: Objective,
    slice_: Slice,
    coordinates: Sequence[Sequence[float]],
    chunk: int,
    splits: Mapping[str, Examples],
    progress: Callable[[float], None] | None,
    journal: Journal | None = None,
    log: Log | None = None,
) -> dict[str, Evaluation]:
    """Evaluates points chunk by chunk."""
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
        return {
            name: Evaluation(torch.empty(0, len(split), dtype=exact), nothing)
            for name, split in splits.items()
        }
    return _join(objective, parts)


def _join(objective: Objective, parts: Sequence[Mapping[str, Evaluation]]) -> dict[str, Evaluation]:
    """Lays the points of several chunks one after the other."""
    return {
        name: Evaluation(
            torch.cat([part[name].losses for part in parts]),
            {
                metric: torch.cat([part[name].metrics[metric] for part in parts])
                for metric in objective.metrics
            },
        )
        for name in parts[0]
    }


def _deal(
    ranks: Ranks,
    objective: Objective,
    slice_: Slice,
    coordinates: Sequence[Sequence[float]],
    chunk: int,
    splits: Mapping[str, Examples],
    progress: Callable[[float], None] | None,
    journal: Journal | None,
    log: Log | None,
) -> dict[str, Evaluation]:
    """Evaluates points together with other ranks, chunks going to whoever is free."""
    known = {} if log is None else _known(log, len(coordinates))
    halving(objective, lambda: objective.settle(slice_, coordinates[:chunk]))
    most = _agree(ranks, objective, chunk, known.values())
    # What is decoded in each pass goes by as seldom as may be.
    streamed = _is_streamed(splits)
    taken = [(start, start + _number(arrays)) for start, arrays in known.items()]
    chunks = ranks.decide(_cut(len(coordinates), taken, most, ranks.size, even=streamed))

    def work(i: int, tell: Callable[[float], None]) -> Arrays:
        points = coordinates[slice(*chunks[i])]
        found = _walk(objective, slice_, points, len(points), splits, tell)
        return pack(objective, splits, found, len(points), most)

    def keep(i: int, arrays: Arrays) -> None:
        if log is not None:
            log.record(chunks[i][0], arrays)

    if journal is not None and progress is not None:
        journal.skipped += sum(stop - start for start, stop in taken)
    parts = ranks.deal(
        [stop - start for start, stop in chunks],
        work,
        known={i: known[start] for i, (start, _) in enumerate(chunks) if start in known},
        found=keep,
        progress=progress,
    )
    return _join(objective, [unpack(objective, splits, part)[0] for part in parts])


def _known(log: Log, number: int) -> dict[int, Arrays]:
    """Recalls chunks, whoever took them, by their first points."""
    known: dict[int, Arrays] = {}
    start = 0
    while start < number:
        found = log.recall(start)
        if found is None:
            start += 1
        else:
            known[start] = found
            start += _number(found)
    return known


def _number(arrays: Arrays) -> int:
    return int(arrays["state"][0])


def _agree(ranks: Ranks, objective: Objective, chunk: int, known: Iterable[Arrays]) -> int:
    """Makes ranks evaluate alike: returns the points at a time that fit the least of them."""
    batch = min([objective.batch_size, *(int(arrays["state"][2]) for arrays in known)])
    way = objective.way
    told = ranks.gather([chunk, batch, way.value if way else 0])
    objective.batch_size = min(batch for _, batch, _ in told)
    if len({way for *_, way in told}) > 1:
        # On devices of several kinds, one way that is right on all of them.
        objective.way = Way.LOADED
    return min(chunk for chunk, *_ in told)


def _cut(
    number: int, taken: Sequence[tuple[int, int]], most: int, ranks: int, *, even: bool
) -> list[tuple[int, int]]:
    """Cuts points into chunks, whatever of them was taken before.

    Args:
        number: How many points there are.
        taken: The chunks that are known, the first points rising.
        most: Points at a time.
        ranks: How many take them.
        even: Whether each rank takes as many, at once; otherwise each takes two thirds of what
            would be its share, and so on with what is left, so that no rank waits long for another
            (factoring, Hummel, Schonberg & Flynn 1992, CACM 35(8), there with halves).

    Returns:
        The chunks, from the first point up to that behind the last.
    """
    cuts, fair, share = [0], math.ceil(number / ranks), 0
    while cuts[-1] < number:
        left = number - cuts[-1]
        if not (len(cuts) - 1) % ranks:
            share = fair if even else min(fair, max(_FEW, math.ceil(2 * left / (3 * ranks))))
        cuts.append(cuts[-1] + min(left, most, share))
    chunks: list[tuple[int, int]] = []
    start = 0
    for begin, end in (*taken, (number, number)):
        ends = [cut for cut in cuts if start < cut < begin]
        chunks += itertools.pairwise([start, *ends, begin] if start < begin else [])
        chunks += [(begin, end)] if begin < end else []
        start = end
    return chunks


def sweep_plain(
    objective: Objective,
    checkpoints: Sequence[Weights],
    *,
    splits: Mapping[str, Examples] | None = None,
    progress: Callable[[float], None] | None = None,
    journal: Journal | None = None,
) -> list[dict[str, Evaluation]]:
    """Evaluates checkpoints, each loaded plainly; out of memory, the batch is halved.

    Args:
        objective: What to evaluate.
        checkpoints: All tensors of the model, for each point; each is taken when it is needed.
        splits: The examples; all by default.
        progress: Called with the points done so far.
        journal: Where finished points are recorded, and recalled from instead of evaluated.

    Returns:
        For each checkpoint and split the evaluation at this one point.
    """
    splits = objective.splits if splits is None else splits
    ranks = current()
    if ranks is not None and checkpoints:
        return _deal_plain(ranks, objective, checkpoints, splits, progress, journal)
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
        tell = _Tally(len(results), progress)
        found = _plain(objective, weights, splits, tell)
        if log is not None:
            log.record_chunk(0, found, 1, 1)
        results.append(found)
    return results


def _plain(
    objective: Objective, weights: Weights, splits: Mapping[str, Examples], tally: _Tally
) -> dict[str, Evaluation]:
    def evaluate() -> dict[str, Evaluation]:
        return objective.plain(weights, splits, tally.anew().add)

    return halving(objective, evaluate)


def _deal_plain(
    ranks: Ranks,
    objective: Objective,
    checkpoints: Sequence[Weights],
    splits: Mapping[str, Examples],
    progress: Callable[[float], None] | None,
    journal: Journal | None,
) -> list[dict[str, Evaluation]]:
    """Evaluates checkpoints together with other ranks; each opens those that it evaluates."""
    logs: list[Log] = []
    known: dict[int, Arrays] = {}
    if journal is not None:
        for i, weights in enumerate(checkpoints):
            logs.append(Log(journal, objective, splits, "plain", [weights]))
            found = logs[i].recall(0)
            if found is not None:
                known[i] = found
    _agree(ranks, objective, 1, known.values())

    def work(i: int, tell: Callable[[float], None]) -> Arrays:
        found = _plain(objective, checkpoints[i], splits, _Tally(0, tell))
        return pack(objective, splits, found, 1, 1)

    def keep(i: int, arrays: Arrays) -> None:
        if logs:
            logs[i].record(0, arrays)

    if journal is not None and progress is not None:
        journal.skipped += len(known)
    parts = ranks.deal([1] * len(checkpoints), work, known=known, found=keep, progress=progress)
    # What comes next may find these weights where a slice moves nothing.
    objective.load(checkpoints[-1])
    return [unpack(objective, splits, part)[0] for part in parts]


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
        self._begun = done
        self._progress = progress

    def anew(self) -> _Tally:
        """Begins anew, after what was done was lost."""
        self._done = self._begun
        return self

    def add(self, share: float) -> None:
        self._done += share
        if self._progress is not None:
            self._progress(self._done)
