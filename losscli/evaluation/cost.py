"""How fast a run will be, told from one batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from losscli.data import Split
from losscli.evaluation.memory import halving
from losscli.evaluation.objective import Objective
from losscli.evaluation.strategy_choice import find_strategy
from losscli.evaluation.task_checks import check_task
from losscli.weight_space.slices import Slice
from losscli.weight_space.vectors import Weights

__all__ = ["Clock", "Timings", "measure", "timed"]

Clock = Callable[[], float]
"""Tells the time in seconds, from whenever on."""

# What is looked at is looked at a few times, and no longer than it takes to be sure.
_TIMES = 3
_ENOUGH = 0.3

# Seconds for the points that are tried; with a slow model these see a part of the batch.
_SPEND = 0.5

# Points that are tried at once: enough that a first layer is shared and no thread waits.
_TRIED = 8
_TRIED_ELSEWHERE = 64

# Points that are evaluated where a strategy is proven, about.
_PROOF = 8


@dataclass(frozen=True)
class Timings:
    """What a run's parts take, in seconds.

    Attributes:
        examples: Those of the batch that was looked at.
        batch: The batch at one point that is loaded plainly.
        decoding: Decoding an example, in each pass; 0 where the data is in memory.
        plain: An example at a checkpoint.
        point: An example at a point among others; that of a checkpoint where none was tried.
        making: Making the weights of a point.
        statistics: A training example at a point, where statistics are estimated there.
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
    """Evaluates one batch of the first split as a run will, and looks at the clock.

    The batch is checked first, and so has been seen before it is timed.

    Args:
        objective: What will be evaluated.
        origin: All tensors of the first checkpoint.
        slice_: A slice like those that will be swept; None where none will be.
        points: As many points of it as will be taken at a time.
        clock: The clock.

    Returns:
        The timings.

    Raises:
        LosscliError: The model or the loss fails on the batch, or one example does not fit.
    """
    name, split = next(iter(objective.splits.items()))
    begun = clock()
    first = split.first(objective.batch_size)
    decoding = (clock() - begun) / len(first) / split.decoders
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
        tried = _TRIED_ELSEWHERE
        if objective.device.type == "cpu":
            tried = max(_TRIED, 2 * torch.get_num_threads())
        points = points[:tried]
        point, making = _among_others(objective, slice_, points, name, batch, plain, clock)
        statistics *= min(1.0, point / plain) if plain else 1.0
    return Timings(batch.rows, seconds, decoding, plain, point, making, statistics)


def _among_others(
    objective: Objective,
    slice_: Slice,
    points: Sequence[Sequence[float]],
    name: str,
    batch: Split,
    plain: float,
    clock: Clock,
) -> tuple[float, float]:
    """Times points that are taken together: an example at each, and the weights of each."""

    def affordable(number: int, most: int) -> int:
        return max(1, most if not plain else min(most, int(_SPEND / (number * plain))))

    halving(
        objective, lambda: find_strategy(objective, slice_, points, affordable(_PROOF, len(batch)))
    )
    part = batch.take(slice(0, affordable(len(points), len(batch))))
    with objective.frozen_statistics():
        # Once, so that what is set up is set up.
        objective.at(slice_, points, {name: part})
        once, twice = (
            timed(objective, partial(objective.at, slice_, points, parts), clock)
            for parts in ({name: part}, {name: part, "again": part})
        )
    # Of twice, what is not the batches is the weights; whatever the clock says.
    one = min(max(twice - once, twice / 8), twice / 2)
    return one / len(points) / len(part), max(0.0, twice - 2 * one) / len(points)


def timed(objective: Objective, work: Callable[[], object], clock: Clock) -> float:
    """Times something.

    Args:
        objective: Whose device is waited for.
        work: What to do.
        clock: The clock.

    Returns:
        The seconds, the least of a few where these are short.
    """
    best, spent = math.inf, 0.0
    for _ in range(_TIMES):
        _wait(objective.device)
        begun = clock()
        work()
        _wait(objective.device)
        took = clock() - begun
        best, spent = min(best, took), spent + took
        if spent >= _ENOUGH:
            break
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
