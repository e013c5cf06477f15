"""Evaluates many points of a slice in chunks that fit into memory, on one or several ranks.

`sweep` recalls chunks that a journal holds; evaluates the others by `Objective.at`, which binds the
points' weights to the model (`losscli.evaluation.strategies.points`) and returns the losses; and
joins them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial

import torch

from losscli.data import Examples, allocations
from losscli.evaluation.memory import halve_batch, halving, is_streamed, points_at_once
from losscli.evaluation.objective import Evaluation, Objective
from losscli.evaluation.ranks import Arrays
from losscli.evaluation.records import decode, encode, record_key, restore, slice_key, state_of
from losscli.evaluation.strategies.base import Strategy
from losscli.evaluation.strategy_choice import find_strategy
from losscli.evaluation.task_checks import check_independence, check_task
from losscli.evaluation.tasks import ALONE, Execution, Task
from losscli.weight_space.slices import Slice
from losscli.weight_space.vectors import Weights

__all__ = ["check", "join_points", "sweep", "sweep_each", "sweep_plain"]

# Points in a chunk for a rank, at least while others are left: a chunk costs about three more.
_MIN_CHUNK = 8

# Slices per rank that are distributed at once.
_SLICES_PER_RANK = 8


def check(objective: Objective, weights: Weights, other: Weights | None = None) -> None:
    """Checks that model, loss and data work together; if memory runs out, the batch is halved.

    Args:
        objective: The objective.
        weights: All tensors of the model; they stay loaded.
        other: The tensors of another point, at which losses must not depend on their batch either.
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

    If memory runs out, the chunk of points is halved, down to one point, then the batch, down to
    one example; finished chunks are kept.

    Args:
        objective: The objective. Tensors that the slice does not move keep the values last loaded.
        slice_: The slice, its ends on the objective's device.
        coordinates: The P points.
        chunk: Points in a chunk; None chooses by memory and cost.
        splits: The examples; all by default.
        execution: How chunks are executed. Progress counts points.

    Returns:
        For each split the evaluation at the P points, in order.

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
    (evaluations,) = _evaluate_among_ranks(
        objective, [lambda: slice_], slice_.ends[0], coordinates, chunk, splits, execution, [key]
    )
    return evaluations


def sweep_each(
    objective: Objective,
    slices: Iterable[Callable[[], Slice]],
    coordinates: Sequence[Sequence[float]],
    *,
    moving: Iterable[str],
    splits: Mapping[str, Examples] | None = None,
    execution: Execution = ALONE,
) -> Iterator[dict[str, Evaluation]]:
    """Evaluates the same points of many slices; each of several ranks takes whole slices.

    So the fixed cost of a slice, such as reading its ends and the first layer's products there, is
    paid by one rank only.

    Args:
        objective: The objective; its strategy has been chosen.
        slices: Functions that make a slice, its ends on the objective's device, and load the
            tensors that it does not move. Called when a slice is needed, for some more than once.
        coordinates: The P points.
        moving: The names of all tensors that a slice may move.
        splits: The examples; all by default.
        execution: How chunks are executed. Progress counts points.

    Yields:
        The result of `sweep` for each slice, in order.
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

    # In groups, so that results are not kept in memory once they are yielded.
    done = 0
    while group := list(itertools.islice(remaining, _SLICES_PER_RANK * execution.size)):
        chunk = min(points_at_once(objective, names, splits), number)
        keys = [execution.key(partial(key, make)) for make in group]
        own = execution.after(done)
        yield from _evaluate_among_ranks(
            objective, group, names, coordinates, chunk, splits, own, keys
        )
        done += len(group) * number


def _evaluate_alone(
    objective: Objective,
    slice_: Slice,
    coordinates: Sequence[Sequence[float]],
    chunk: int,
    splits: Mapping[str, Examples],
    execution: Execution,
    key: str | None = None,
) -> dict[str, Evaluation]:
    """Evaluates points chunk by chunk in this process."""

    def evaluate(points: Sequence[Sequence[float]], chunk: int, own: Execution) -> Arrays:
        find_strategy(objective, slice_, points)
        evaluations = objective.at(slice_, points, splits, _ProgressSum(own.report).add)
        return encode(objective, splits, evaluations, len(points), chunk)

    parts: list[dict[str, Evaluation]] = []
    start = 0
    while start < len(coordinates):
        known = execution.recall(key, start)
        number = chunk if known is None else state_of(known).number
        points = coordinates[start : start + number]
        task = Task(len(points), partial(evaluate, points, chunk), key, start, known)
        arrays: Arrays | None = None
        with suppress(torch.OutOfMemoryError, MemoryError), allocations():
            (arrays,) = execution.after(start).run([task])
        if arrays is None:
            # Outside of the handler the error is freed, and with it the tensors in its traceback.
            if len(points) > 1:
                chunk = len(points) // 2
            else:
                halve_batch(objective)
            continue
        parts.append(_continue_from(objective, splits, arrays))
        chunk = state_of(arrays).points_at_once
        start += len(points)
    if not parts:
        # A line may have no points but its ends, which are loaded and not swept.
        metrics = {metric: torch.empty(0, dtype=torch.float64) for metric in objective.columns}
        return {
            name: Evaluation(torch.empty(0, len(split), dtype=objective.loss_type), metrics)
            for name, split in splits.items()
        }
    return join_points(parts)


def _continue_from(
    objective: Objective, splits: Mapping[str, Examples], arrays: Arrays
) -> dict[str, Evaluation]:
    """Decodes a chunk and restores the state that its evaluation left."""
    state = state_of(arrays)
    restore(objective, state.batch_size, state.idle, state.strategy)
    return decode(arrays, splits, objective.columns)


def join_points(parts: Sequence[Mapping[str, Evaluation]]) -> dict[str, Evaluation]:
    """Concatenates, for each split, the points of several evaluations."""
    return {
        name: replace(
            own,
            losses=torch.cat([part[name].losses for part in parts]),
            metrics={
                metric: torch.cat([part[name].metrics[metric] for part in parts])
                for metric in own.metrics
            },
        )
        for name, own in parts[0].items()
    }


def _evaluate_among_ranks(
    objective: Objective,
    slices: Sequence[Callable[[], Slice]],
    moving: Iterable[str],
    coordinates: Sequence[Sequence[float]],
    chunk: int,
    splits: Mapping[str, Examples],
    execution: Execution,
    keys: Sequence[str | None],
) -> list[dict[str, Evaluation]]:
    """Evaluates points of slices on all ranks; each chunk goes to the first rank that is free."""
    known = [_recall_chunks(execution, key, len(coordinates)) for key in keys]
    recorded = [arrays for chunks in known for arrays in chunks.values()]
    most = _synchronise(execution, objective, chunk, recorded)
    # Data that is decoded in each pass should be read as few times as possible.
    streamed = is_streamed(splits)
    # More points than the ends of a line or plane, so that they share a first layer.
    plain = objective.is_large(moving) or objective.strategy in {Strategy.BOUND, Strategy.LOADED}
    least = 1 if plain else len(coordinates[0]) + 2
    # Whole slices as long as there is one for each rank; the rest are divided among ranks.
    whole = len(slices) // execution.size * execution.size
    parts = math.ceil(execution.size / max(1, len(slices) - whole))
    chunks: list[tuple[int, int, int]] = []
    for k, known_chunks in enumerate(known):
        taken = [(start, start + state_of(arrays).number) for start, arrays in known_chunks.items()]
        ranks = 1 if k < whole else parts
        even = streamed or ranks == 1
        cuts = _divide(len(coordinates), taken, most, ranks, least=least, even=even)
        chunks += [(k, start, stop) for start, stop in cuts]
    chunks = execution.decide(chunks)

    def evaluate(k: int, points: Sequence[Sequence[float]], own: Execution) -> Arrays:
        evaluations = _evaluate_alone(objective, slices[k](), points, len(points), splits, own)
        return encode(objective, splits, evaluations, len(points), most)

    def task(k: int, start: int, stop: int) -> Task:
        work = partial(evaluate, k, coordinates[start:stop])
        return Task(stop - start, work, keys[k], start, known[k].get(start))

    tasks = itertools.starmap(task, chunks)
    parts_of: list[list[dict[str, Evaluation]]] = [[] for _ in slices]
    for (k, *_), arrays in zip(chunks, execution.run(tasks), strict=True):
        parts_of[k].append(_continue_from(objective, splits, arrays))
    return [join_points(evaluations) for evaluations in parts_of]


def _recall_chunks(execution: Execution, key: str | None, number: int) -> dict[int, Arrays]:
    """Recalls the recorded chunks of a slice, by the index of their first point."""
    known: dict[int, Arrays] = {}
    start = 0
    while start < number:
        arrays = execution.recall(key, start)
        if arrays is None:
            start += 1
        else:
            known[start] = arrays
            start += state_of(arrays).number
    return known


def _synchronise(
    execution: Execution, objective: Objective, chunk: int, known: Iterable[Arrays]
) -> int:
    """Gives all ranks the same batch size and strategy; returns the smallest of their chunks."""
    batch = min([objective.batch_size, *(state_of(arrays).batch_size for arrays in known)])
    strategy = objective.strategy
    states = execution.gather([chunk, batch, strategy.value if strategy else 0])
    objective.batch_size = min(batch for _, batch, _ in states)
    if len({strategy for *_, strategy in states if strategy}) > 1:
        # On different kinds of devices, the strategy that is right on all of them.
        objective.strategy = Strategy.LOADED
    return min(chunk for chunk, *_ in states)


def _divide(
    number: int,
    taken: Sequence[tuple[int, int]],
    most: int,
    ranks: int,
    *,
    least: int,
    even: bool,
) -> list[tuple[int, int]]:
    """Divides points into chunks for several ranks, around chunks that are known.

    Args:
        number: The number of points.
        taken: The known chunks as (start, stop), ascending.
        most: The most points in a chunk.
        ranks: The number of ranks that evaluate them.
        least: The fewest points in a chunk, if so many are left and fit. With too few to share a
            first layer, the last digits of a loss may differ.
        even: Whether each rank takes an equal share at once. Otherwise each takes two thirds of
            its share, then two thirds of its share of the rest, and so on as long as chunks are
            worth it, so that no rank waits long for another (factoring, Hummel, Schonberg & Flynn
            1992, CACM 35(8), there with halves). The last round has equal chunks.

    Returns:
        The chunks as (start, stop).
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
        worth = _MIN_CHUNK
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
    """Evaluates checkpoints by loading each; if memory runs out, the batch is halved.

    Args:
        objective: The objective. The last checkpoint stays loaded.
        checkpoints: All tensors of the model for each point; an item is read when it is needed.
        splits: The examples; all by default.
        execution: How points are executed. Progress counts points.

    Returns:
        For each checkpoint and split the evaluation at this point.
    """
    splits = objective.splits if splits is None else splits
    read = lru_cache(maxsize=1)(checkpoints.__getitem__)
    last, loaded = len(checkpoints) - 1, -1

    def key(i: int) -> str:
        return record_key(objective, splits, "plain", [read(i)])

    def evaluate(i: int, own: Execution) -> Arrays:
        nonlocal loaded
        weights, loaded = read(i), i
        evaluations = halving(
            objective, lambda: objective.plain(weights, splits, _ProgressSum(own.report).add)
        )
        return encode(objective, splits, evaluations, 1, 1)

    def task(i: int) -> Task:
        own = execution.key(partial(key, i))
        return Task(1, partial(evaluate, i), own, 0, execution.recall(own, 0))

    tasks: Iterable[Task] = map(task, range(len(checkpoints)))
    if execution.size > 1 and checkpoints:
        tasks = list(tasks)
        _synchronise(execution, objective, 1, [t.known for t in tasks if t.known is not None])
    evaluations = [_continue_from(objective, splits, arrays) for arrays in execution.run(tasks)]
    if loaded != last:
        # All checkpoints may have been recalled; but the last one has to be loaded.
        objective.load(read(last))
    return evaluations


class _ProgressSum:
    """Reports the sum of the shares that are done."""

    def __init__(self, report: Callable[[float], None]) -> None:
        self._done = 0.0
        self._report = report

    def add(self, share: float) -> None:
        self._done += share
        self._report(self._done)
