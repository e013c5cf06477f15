"""Evaluates many points in chunks that fit into memory; a chunk that does not fit is halved."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial

import torch

from losscli.data import Examples
from losscli.evaluation.memory import halve_batch, halving, is_streamed, points_at_once
from losscli.evaluation.objective import Evaluation, Objective
from losscli.evaluation.ranks import Arrays
from losscli.evaluation.records import decode, encode, record_key, restore, slice_key, state_of
from losscli.evaluation.strategies import Strategy
from losscli.evaluation.strategy_choice import find_strategy
from losscli.evaluation.task_checks import check_independence, check_task
from losscli.evaluation.tasks import ALONE, Execution, Task
from losscli.weight_space.slices import Slice
from losscli.weight_space.vectors import Weights

__all__ = ["check", "sweep", "sweep_each", "sweep_plain"]

# Points that share a first layer have to be some: a chunk costs about three more.
_FEW = 8

# Slices for each of several ranks that are dealt at once.
_SHARES = 8


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


def sweep(
    objective: Objective,
    slice_: Slice,
    coordinates: Sequence[Sequence[float]],
    *,
    chunk: int | None = None,
    splits: Mapping[str, Examples] | None = None,
    execution: Execution = ALONE,
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
        execution: How chunks are executed. Progress counts points.

    Returns:
        For each split its evaluation at all P points, in their order.

    Raises:
        OutOfMemoryError: One point and one example do not fit.
    """
    splits = objective.splits if splits is None else splits
    chunk = chunk or points_at_once(objective, slice_.ends[0], splits)
    chunk = min(chunk, max(1, len(coordinates)))
    key = execution.key(lambda: slice_key(objective, splits, slice_, coordinates))
    if execution.size == 1 or not coordinates:
        return _evaluate_alone(objective, slice_, coordinates, chunk, splits, execution, key)
    halving(objective, lambda: find_strategy(objective, slice_, coordinates[:chunk]))
    (found,) = _evaluate_among_ranks(
        objective, [lambda: slice_], coordinates, chunk, splits, execution, [key]
    )
    return found


def sweep_each(
    objective: Objective,
    slices: Iterable[Callable[[], Slice]],
    coordinates: Sequence[Sequence[float]],
    *,
    moving: Iterable[str],
    splits: Mapping[str, Examples] | None = None,
    execution: Execution = ALONE,
) -> Iterator[dict[str, Evaluation]]:
    """Evaluates the same points of many slices, several ranks at slices of their own.

    What a whole slice costs beside its points, such as reading its ends and what a first layer
    gives there, is then paid by one rank.

    Args:
        objective: What to evaluate.
        slices: Makes a slice, its ends on the objective's device, and loads the tensors that it
            does not move. Called when the slice is needed, more than once for some. The strategy
            has been chosen on one along which something moves.
        coordinates: The P points.
        moving: The tensors that the slices move at the most.
        splits: The examples; all by default.
        execution: How chunks are executed. Progress counts points.

    Yields:
        For each slice in turn what `sweep` returns.
    """
    splits = objective.splits if splits is None else splits
    number, remaining, names = len(coordinates), iter(slices), list(moving)
    if execution.size == 1 or not coordinates:
        for i, make in enumerate(remaining):
            own = execution.after(i * number)
            yield sweep(objective, make(), coordinates, splits=splits, execution=own)
        return

    def key(make: Callable[[], Slice]) -> str:
        return slice_key(objective, splits, make(), coordinates)

    # Some at a time: of slices that were yielded nothing is held.
    done = 0
    while some := list(itertools.islice(remaining, _SHARES * execution.size)):
        chunk = min(points_at_once(objective, names, splits), number)
        keys = [execution.key(partial(key, make)) for make in some]
        own = execution.after(done)
        yield from _evaluate_among_ranks(objective, some, coordinates, chunk, splits, own, keys)
        done += len(some) * number


def _evaluate_alone(
    objective: Objective,
    slice_: Slice,
    coordinates: Sequence[Sequence[float]],
    chunk: int,
    splits: Mapping[str, Examples],
    execution: Execution,
    key: str | None = None,
) -> dict[str, Evaluation]:
    """Evaluates points chunk by chunk, by this process alone."""

    def evaluate(points: Sequence[Sequence[float]], chunk: int, own: Execution) -> Arrays:
        find_strategy(objective, slice_, points)
        found = objective.at(slice_, points, splits, _Tally(own.tell).add)
        return encode(objective, splits, found, len(points), chunk)

    parts: list[dict[str, Evaluation]] = []
    start = 0
    while start < len(coordinates):
        known = execution.recall(key, start)
        number = chunk if known is None else state_of(known).number
        points = coordinates[start : start + number]
        task = Task(len(points), partial(evaluate, points, chunk), key, start, known)
        try:
            (arrays,) = execution.after(start).run([task])
        except (torch.OutOfMemoryError, MemoryError):
            if len(points) > 1:
                chunk = len(points) // 2
            else:
                halve_batch(objective)
            continue
        parts.append(_continue_from(objective, splits, arrays))
        chunk = state_of(arrays).points_at_once
        start += len(points)
    if not parts:
        # Of a line, the ends may be all there is to see; they are loaded plainly.
        exact = torch.float64 if objective.dtype == torch.float64 else torch.float32
        nothing = {metric: torch.empty(0, dtype=torch.float64) for metric in objective.metrics}
        return {
            name: Evaluation(torch.empty(0, len(split), dtype=exact), nothing)
            for name, split in splits.items()
        }
    return _join(objective, parts)


def _continue_from(
    objective: Objective, splits: Mapping[str, Examples], arrays: Arrays
) -> dict[str, Evaluation]:
    """Takes a chunk, whoever evaluated it, and goes on in the state that it was left in."""
    state = state_of(arrays)
    restore(objective, state.batch_size, state.idle, state.strategy)
    return decode(arrays, splits, objective.metrics)


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


def _evaluate_among_ranks(
    objective: Objective,
    slices: Sequence[Callable[[], Slice]],
    coordinates: Sequence[Sequence[float]],
    chunk: int,
    splits: Mapping[str, Examples],
    execution: Execution,
    keys: Sequence[str | None],
) -> list[dict[str, Evaluation]]:
    """Evaluates points of slices together with other ranks, chunks going to whoever is free."""
    known = [_recall_chunks(execution, key, len(coordinates)) for key in keys]
    most = _agree(execution, objective, chunk, [a for of in known for a in of.values()])
    # What is decoded in each pass goes by as seldom as may be.
    streamed = is_streamed(splits)
    # More than a line has ends, or a plane: so many share a first layer.
    shared = objective.strategy not in {Strategy.BOUND, Strategy.LOADED}
    least = len(coordinates[0]) + 2 if shared else 1
    # Whole slices, as long as there is one for each rank; of the rest each has parts.
    whole = len(slices) // execution.size * execution.size
    parts = math.ceil(execution.size / max(1, len(slices) - whole))
    chunks: list[tuple[int, int, int]] = []
    for k, of in enumerate(known):
        taken = [(start, start + state_of(arrays).number) for start, arrays in of.items()]
        shares = 1 if k < whole else parts
        even = streamed or shares == 1
        cuts = _cut(len(coordinates), taken, most, shares, least=least, even=even)
        chunks += [(k, start, stop) for start, stop in cuts]
    chunks = execution.decide(chunks)

    def evaluate(k: int, points: Sequence[Sequence[float]], own: Execution) -> Arrays:
        found = _evaluate_alone(objective, slices[k](), points, len(points), splits, own)
        return encode(objective, splits, found, len(points), most)

    def task(k: int, start: int, stop: int) -> Task:
        work = partial(evaluate, k, coordinates[start:stop])
        return Task(stop - start, work, keys[k], start, known[k].get(start))

    tasks = itertools.starmap(task, chunks)
    joined: list[list[dict[str, Evaluation]]] = [[] for _ in slices]
    for (k, *_), arrays in zip(chunks, execution.run(tasks), strict=True):
        joined[k].append(_continue_from(objective, splits, arrays))
    return [_join(objective, of) for of in joined]


def _recall_chunks(execution: Execution, key: str | None, number: int) -> dict[int, Arrays]:
    """Recalls chunks, whoever took them, by their first points."""
    known: dict[int, Arrays] = {}
    start = 0
    while start < number:
        found = execution.recall(key, start)
        if found is None:
            start += 1
        else:
            known[start] = found
            start += state_of(found).number
    return known


def _agree(execution: Execution, objective: Objective, chunk: int, known: Iterable[Arrays]) -> int:
    """Makes ranks evaluate alike: returns the points at a time that fit the least of them."""
    batch = min([objective.batch_size, *(state_of(arrays).batch_size for arrays in known)])
    strategy = objective.strategy
    told = execution.gather([chunk, batch, strategy.value if strategy else 0])
    objective.batch_size = min(batch for _, batch, _ in told)
    if len({strategy for *_, strategy in told if strategy}) > 1:
        # On devices of several kinds, one strategy that is right on all of them.
        objective.strategy = Strategy.LOADED
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
    execution: Execution = ALONE,
) -> list[dict[str, Evaluation]]:
    """Evaluates checkpoints, each loaded plainly; out of memory, the batch is halved.

    Args:
        objective: What to evaluate. The last checkpoint stays loaded.
        checkpoints: All tensors of the model, for each point; each is taken when it is needed.
        splits: The examples; all by default.
        execution: How points are executed. Progress counts points.

    Returns:
        For each checkpoint and split the evaluation at this one point.
    """
    splits = objective.splits if splits is None else splits
    opened = lru_cache(maxsize=1)(checkpoints.__getitem__)
    last, loaded = len(checkpoints) - 1, -1

    def key(i: int) -> str:
        return record_key(objective, splits, "plain", [opened(i)])

    def evaluate(i: int, own: Execution) -> Arrays:
        nonlocal loaded
        weights, loaded = opened(i), i
        found = halving(objective, lambda: objective.plain(weights, splits, _Tally(own.tell).add))
        return encode(objective, splits, found, 1, 1)

    def task(i: int) -> Task:
        own = execution.key(partial(key, i))
        return Task(1, partial(evaluate, i), own, 0, execution.recall(own, 0))

    tasks: Iterable[Task] = map(task, range(len(checkpoints)))
    if execution.size > 1 and checkpoints:
        tasks = list(tasks)
        _agree(execution, objective, 1, [t.known for t in tasks if t.known is not None])
    found = [_continue_from(objective, splits, arrays) for arrays in execution.run(tasks)]
    if loaded != last:
        # What comes next may find these weights where a slice moves nothing.
        objective.load(opened(last))
    return found


class _Tally:
    """Adds up the shares that are done."""

    def __init__(self, tell: Callable[[float], None]) -> None:
        self._done = 0.0
        self._tell = tell

    def add(self, share: float) -> None:
        self._done += share
        self._tell(self._done)
