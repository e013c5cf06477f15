"""How many points and examples are evaluated at once, by the memory and the cost."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import TypeVar

import torch

from losscli.data import Examples, Split, allocations, device_memory
from losscli.errors import OutOfMemoryError
from losscli.evaluation.objective import Objective
from losscli.evaluation.strategies.base import Strategy

__all__ = [
    "halve_batch",
    "halving",
    "is_streamed",
    "minute_of_work",
    "points_at_once",
    "points_that_fit",
]

_T = TypeVar("_T")

_CPU_STACK = 256 << 20
_GPU_SHARE = 0.25

# Floating-point operations of a chunk of points: about a minute, the most that a killed run loses.
# Counted and not timed, so that the same command evaluates the same chunks.
_WORK = {"cpu": 2 * 10**12, "cuda": 10**15}
_WORK_ELSEWHERE = 3 * 10**13

# The fewest points in a chunk that fits into memory, at any cost.
_LEAST = 16

# Floating-point operations that correspond to decoding an example. If decoding takes longer than
# evaluating the points of a chunk, the chunk gets more points.
_DECODING = {"cpu": 10**9}
_DECODING_ELSEWHERE = 10**10


def points_that_fit(
    objective: Objective, names: Collection[str], splits: Mapping[str, Examples] | None = None
) -> int:
    """Returns how many points fit into memory at once.

    A point takes its losses; its weights and statistics, unless points are evaluated in turn; and
    its activations if all points are evaluated in one forward pass.

    Returns:
        At least 1. They take at most 256 MiB on a CPU, or a quarter of the free memory of
        a GPU, together with the graphs that they are evaluated by.
    """
    splits = objective.splits if splits is None else splits
    size = sum(map(len, splits.values())) * objective.loss_type.itemsize
    in_turn = objective.takes_points_in_turn(names, splits)
    if not in_turn:
        size += sum(objective.tensors[name].nbytes for name in names)
        for layer in objective.statistics:
            # Estimated statistics also have float64 sums.
            own = [objective.tensors[name] for name in layer.names]
            size += sum(tensor.nbytes + 8 * tensor.numel() for tensor in own)
    if objective.strategy_for(names) is Strategy.STACKED:
        # The output of the first layer is kept while the operators after it run.
        size += 2 * objective.batch_size * objective.activations
    if objective.device.type == "cuda":
        budget = int(device_memory(objective.device) * _GPU_SHARE)
        if in_turn and not objective.why_no_graphs(splits.values()):
            budget -= objective.graph_bytes(splits.values())
    else:
        budget = _CPU_STACK
    return max(1, budget // max(1, size))


def points_at_once(
    objective: Objective, names: Collection[str], splits: Mapping[str, Examples] | None = None
) -> int:
    """Chooses how many points are evaluated at once: as many as fit, but at most a minute's work.

    Returns:
        At least 1. If they fit, at least 16; and if data is decoded in each pass, enough to make
        evaluation take about as long as decoding.
    """
    splits = objective.splits if splits is None else splits
    examples = sum(map(len, splits.values()))
    if objective.recalibration is not None:
        examples += len(objective.recalibration)
    kind, each = objective.device.type, objective.operations
    most = minute_of_work(objective) // (each * max(1, examples))
    least = _LEAST
    if is_streamed(splits):
        least = max(least, _DECODING.get(kind, _DECODING_ELSEWHERE) // each)
    return min(points_that_fit(objective, names, splits), max(least, most))


def minute_of_work(objective: Objective) -> int:
    """Returns the floating-point operations of about a minute on the device."""
    return _WORK.get(objective.device.type, _WORK_ELSEWHERE)


def is_streamed(splits: Mapping[str, Examples]) -> bool:
    """Whether examples of some split are decoded in each pass."""
    return any(not isinstance(split, Split) for split in splits.values())


def halving(objective: Objective, work: Callable[[], _T]) -> _T:
    """Calls a function, and again with half the batch size whenever memory runs out.

    Args:
        objective: The objective with the batch size.
        work: The function.

    Returns:
        The result of the function.

    Raises:
        OutOfMemoryError: One example does not fit.
    """
    while True:
        with suppress(torch.OutOfMemoryError, MemoryError), allocations():
            return work()
        # Outside of the handler the error is freed, and with it the tensors in its traceback.
        halve_batch(objective)


def halve_batch(
    objective: Objective, what: str = "one point and", cure: str = "--dtype bfloat16"
) -> None:
    """Halves the batch of an objective.

    Args:
        objective: The objective.
        what: The computation that does not fit, for the error.
        cure: What may help in addition to another device.

    Raises:
        OutOfMemoryError: The batch is one example, or must not be halved.
    """
    if objective.batch_loss or objective.seeds:
        # The random numbers of a batch depend on its size.
        option = "--batch-loss" if objective.batch_loss else "--stochastic"
        raise OutOfMemoryError(
            f"{what} one batch do not fit into the memory of {objective.device}, and with "
            f"{option} batches are never halved",
            f"Give smaller batches, --device cpu or {cure}",
        )
    if objective.batch_size == 1:
        raise OutOfMemoryError(
            f"{what} one example do not fit into the memory of {objective.device}",
            f"Try --device cpu or {cure}",
        )
    objective.batch_size //= 2
    if objective.device.type == "cuda":
        torch.cuda.empty_cache()
