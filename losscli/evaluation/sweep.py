"""Walks many points in chunks that fit the memory; what does not fit is halved."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from losscli.data import Examples, Split
from losscli.errors import OutOfMemoryError
from losscli.evaluation.journal import Journal
from losscli.evaluation.objective import Evaluation, Objective
from losscli.evaluation.ranks import Arrays, Ranks, current
from losscli.evaluation.records import Log, pack, unpack
from losscli.evaluation.strategies import Way
from losscli.evaluation.task_checks import check_independence, check_task
from losscli.weight_space.slices import Slice
from losscli.weight_space.vectors import Weights

__all__ = [
    "check",
    "halving",
    "points_at_once",
    "points_that_fit",
    "settle",
    "sweep",
    "sweep_each",
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

# Slices for each of several ranks that are dealt at once.
_SHARES = 8


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


def check(objective: Objective, weights: Weights, other: Weights | None = None) -> None:
    """Makes sure that model, loss and data work together; out of memory, the batch is halved.

    Args:
        objective: What will be evaluated.
        weights: All tensors of the model; what no slice moves stays loaded.
        other: The same at another point, where losses must not depend on their batch either.
    """
    halving(objective, lambda: check_task(objective, weights))
    if other is not None:
        halving(objective, lambda: check_independence(objective, other))
        objective.load(weights)


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
        logs = [log] if log is not None else []
        halving(objective, lambda: objective.settle(slice_, coordinates[:chunk]))
        (found,) = _deal(
            ranks, objective, [lambda: slice_], coordinates, chunk, splits, progress, journal, logs
        )
        return found
    return _walk(objective, slice_, coordinates, chunk, splits, progress, journal, log)


def sweep_each(
    objective: Objective,
    slices: Iterable[Callable[[], Slice]],
    coordinates: Sequence[Sequence[float]],
    *,
    moving: Iterable[str],
    splits: Mapping[str, Examples] | None = None,
    progress: Callable[[float], None] | None = None,
    journal: Journal | None = None,
) -> Iterator[dict[str, Evaluation]]:
    """Evaluates the same points of many slices, several ranks at slices of their own.

    What a whole slice costs beside its points, such as reading its ends and what a first layer
    gives there, is then paid by one rank.

    Args:
        objective: What to evaluate.
        slices: Makes a slice, its ends on the objective's device, and loads the tensors that it
            does not move. Called when the slice is needed, more than once for some. How points are
            evaluated has been settled on one along which something moves.
        coordinates: The P points.
        moving: The tensors that the slices move at the most.
        splits: The examples; all by default.
        progress: Called with the points done so far, a growing number.
        journal: Where finished chunks are recorded, and recalled from instead of evaluated.

    Yields:
        For each slice in turn what `sweep` returns.
    """
    splits = objective.splits if splits is None else splits
    ranks, done, remaining = current(), 0, iter(slices)

    def tell(further: float) -> None:
        if progress is not None:
            progress(done + further)

    if ranks is None or not coordinates:
        for make in remaining:
            yield sweep(
                objective, make(), coordinates, splits=splits, progress=tell, journal=journal
            )
            done += len(coordinates)
        return
    names = list(moving)
    # Some at a time: of slices that were yielded nothing is held.
    while some := list(itertools.islice(remaining, _SHARES * ranks.size)):
        chunk = min(points_at_once(objective, names, splits), len(coordinates))
        logs = []
        if journal is not None:
            logs = [Log.of_slice(journal, objective, splits, m(), coordinates) for m in some]
        yield from _deal(ranks, objective, some, coordinates, chunk, splits, tell, journal, logs)
        done += len(some) * len(coordinates)


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
        name: replace(
            parts[0][name],
            losses=torch.cat([part[name].losses for part in parts]),
            metrics={
                metric: torch.cat([part[name].metrics[metric] for part in parts])
                for metric in objective.metrics
            },
        )
        for name in parts[0]
    }


def _deal(
    ranks: Ranks,
    objective: Objective,
    slices: Sequence[Callable[[], Slice]],
    coordinates: Sequence[Sequence[float]],
    chunk: int,
    splits: Mapping[str, Examples],
    progress: Callable[[float], None] | None,
    journal: Journal | None,
    logs: Sequence[Log],
) -> list[dict[str, Evaluation]]:
    """Evaluates points of slices together with other ranks, chunks going to whoever is free."""
    known = [_known(log, len(coordinates)) for log in logs] or [{} for _ in slices]
    most = _agree(ranks, objective, chunk, [arrays for of in known for arrays in of.values()])
    # What is decoded in each pass goes by as seldom as may be.
    streamed = _is_streamed(splits)
    # More than a line has ends, or a plane: so many share a first layer.
    shared = objective.way not in {Way.BOUND, Way.LOADED}
    least = len(coordinates[0]) + 2 if shared else 1
    # Whole slices, as long as there is one for each rank; of the rest each has parts.
    whole = len(slices) // ranks.size * ranks.size
    parts = math.ceil(ranks.size / max(1, len(slices) - whole))
    chunks: list[tuple[int, int, int]] = []
    for k, of in enumerate(known):
        taken = [(start, start + _number(arrays)) for start, arrays in of.items()]
        shares = 1 if k < whole else parts
        even = streamed or shares == 1
        cuts = _cut(len(coordinates), taken, most, shares, least=least, even=even)
        chunks += [(k, start, stop) for start, stop in cuts]
    chunks = ranks.decide(chunks)

    def work(i: int, tell: Callable[[float], None]) -> Arrays:
        k, start, stop = chunks[i]
        points = coordinates[start:stop]
        found = _walk(objective, slices[k](), points, len(points), splits, tell)
        return pack(objective, splits, found, len(points), most)

    def keep(i: int, arrays: Arrays) -> None:
        if logs:
            k, start, _ = chunks[i]
            logs[k].record(start, arrays)

    had = {i: known[k][start] for i, (k, start, _) in enumerate(chunks) if start in known[k]}
    if journal is not None and progress is not None:
        journal.skipped += sum(map(_number, had.values()))
    found = ranks.deal(
        [stop - start for _, start, stop in chunks],
        work,
        known=had,
        found=keep,
        progress=progress,
    )
    joined = []
    for k, _ in enumerate(slices):
        own = [arrays for (of, *_), arrays in zip(chunks, found, strict=True) if of == k]
        joined.append(_join(objective, [unpack(objective, splits, arrays)[0] for arrays in own]))
    return joined


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
    if len({way for *_, way in told if way}) > 1:
        # On devices of several kinds, one way that is right on all of them.
        objective.way = Way.LOADED
    return min(chunk for chunk, *_ in told)


def _cut(
    number: int,
    taken: Sequence[tuple[int, int]],
    most: int,
    ranks: int,
    *,
    least: int,
    even: bool,
) -> list[tuple[int, int]]:
    """Cuts points into chunks, whatever of them was taken before.

    Args:
        number: How many points there are.
        taken: The chunks that are known, the first points rising.
        most: Points at a time.
        ranks: How many take them.
        least: Points that a chunk has, if there are so many and so many fit. With fewer than
            share a first layer a loss may have other last digits.
        even: Whether each rank takes as many, at once; otherwise each takes two thirds of what
            would be its share, and so on with what is left as long as that is worth it, so that
            no rank waits long for another (factoring, Hummel, Schonberg & Flynn 1992, CACM 35(8),
            there with halves). The last round has equal chunks.

    Returns:
        The chunks, from the first point up to that behind the last.
    """
    sizes: list[int] = []
    left, worth = number, least
    while left:
        share = math.ceil(2 * left / (3 * ranks))
        if even or left - ranks * share < ranks * worth:
            pieces = min(ranks, max(1, left // least))
            if pieces * most < left:
                pieces = ranks * math.ceil(left / (ranks * most))
            sizes += [left // pieces + (i < left % pieces) for i in range(pieces)]
            break
        sizes += [min(share, most)] * ranks
        left -= ranks * min(share, most)
        worth = _FEW
    cuts = [0, *itertools.accumulate(sizes)]
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
    if objective.batch_loss:
        raise OutOfMemoryError(
            f"one point and one batch do not fit into the memory of {objective.device}, and with "
            "--batch-loss batches are never halved",
            "Give smaller batches, --device cpu or --dtype bfloat16",
        )
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
