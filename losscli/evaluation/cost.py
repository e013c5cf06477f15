"""Measures on one batch how long a run will take."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from losscli.data import Split
from losscli.evaluation.memory import halving
from losscli.evaluation.objective import Objective
from losscli.evaluation.strategy_choice import find_strategy, record_choice
from losscli.evaluation.task_checks import check_task
from losscli.weight_space.slices import Slice
from losscli.weight_space.vectors import Weights

__all__ = ["Clock", "Timings", "measure", "timed"]

Clock = Callable[[], float]
"""Returns the time in seconds from an arbitrary start."""

# The most repetitions of a timed call, and the seconds after which no more are made.
_REPETITIONS = 3
_ENOUGH = 0.3

# Seconds for evaluating points together; with a slow model on a part of the batch only.
_BUDGET = 0.5

# Points that are evaluated together: enough to share a first layer and to keep all threads busy.
_POINTS = 8
_POINTS_ELSEWHERE = 64

# About how many points are evaluated to choose a strategy.
_CHOICE_POINTS = 8


@dataclass(frozen=True)
class Timings:
    """The times of the parts of a run, in seconds.

    Attributes:
        examples: The number of examples in the timed batch.
        batch: The batch at one loaded point.
        decoding: Decoding of one example in each pass; 0 for data in memory.
        plain: One example at a checkpoint.
        point: One example at a point evaluated together with others; that at a checkpoint if there
            are none.
        making: Computing the weights of a point.
        statistics: One training example at a point, if statistics are estimated there.
    """

    examples: int
    batch: float
    decoding: float
    plain: float
    point: float
    making: float
    statistics: float


def measure(
    objective: Objective,
    origin: Weights,
    slice_: Slice | None,
    points: Sequence[Sequence[float]],
    clock: Clock,
) -> Timings:
    """Times the evaluation of one batch of the first split, as in a run.

    The batch is checked first, which also serves as a warm-up.

    Args:
        objective: The objective.
        origin: All tensors of the first checkpoint.
        slice_: A slice like those that will be swept; None if there will be none.
        points: As many of its points as will be evaluated at once.
        clock: The clock.

    Returns:
        The timings.

    Raises:
        LosscliError: The model or the loss fails on the batch, or one example does not fit.
    """
    name, split = next(iter(objective.splits.items()))
    start = clock()
    first = split.first(objective.batch_size)
    decoding = (clock() - start) / len(first) / split.decoders
    decoding = 0.0 if isinstance(split, Split) else decoding
    halving(objective, lambda: check_task(objective, origin, [name]))
    batch = split.first(objective.batch_size).to(objective.device)
    with objective.frozen_statistics():
        seconds = timed(objective, lambda: objective.plain(origin, {name: batch}), clock)
    plain = point = seconds / len(batch)
    making = statistics = 0.0
    if objective.recalibration is not None:
        with objective.first_batch_only():
            both = timed(objective, lambda: objective.plain(origin, {name: batch}), clock)
        statistics = max(0.0, both - seconds) / objective.recalibration.size
    if slice_ is not None and points:
        number = _POINTS_ELSEWHERE
        if objective.device.type == "cpu":
            number = max(_POINTS, 2 * torch.get_num_threads())
        points = points[:number]
        point, making = _time_points(objective, slice_, points, name, batch, plain, clock)
        statistics *= min(1.0, point / plain) if plain else 1.0
    return Timings(batch.rows, seconds, decoding, plain, point, making, statistics)


def _time_points(
    objective: Objective,
    slice_: Slice,
    points: Sequence[Sequence[float]],
    name: str,
    batch: Split,
    plain: float,
    clock: Clock,
) -> tuple[float, float]:
    """Times points evaluated together: one example at each, and the weights of each."""

    def affordable(number: int, most: int) -> int:
        return max(1, most if not plain else min(most, int(_BUDGET / (number * plain))))

    examples = affordable(_CHOICE_POINTS, len(batch))
    halving(objective, lambda: find_strategy(objective, slice_, points, examples))
    record_choice(objective, slice_)
    part = batch.take(slice(0, affordable(len(points), len(batch))))
    with objective.frozen_statistics():
        # Warm-up.
        objective.at(slice_, points, {name: part})
        once, twice = (
            timed(objective, partial(objective.at, slice_, points, parts), clock)
            for parts in ({name: part}, {name: part, "again": part})
        )
    # The difference is one batch, the rest the computation of the weights; bounded against noise.
    one = min(max(twice - once, twice / 8), twice / 2)
    return one / len(points) / len(part), max(0.0, twice - 2 * one) / len(points)


def timed(objective: Objective, work: Callable[[], object], clock: Clock) -> float:
    """Times a function on the objective's device: a short one by the minimum of a few calls."""
    best, spent = math.inf, 0.0
    for _ in range(_REPETITIONS):
        _synchronise(objective.device)
        start = clock()
        work()
        _synchronise(objective.device)
        seconds = clock() - start
        best, spent = min(best, seconds), spent + seconds
        if spent >= _ENOUGH:
            break
    return best


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
