"""Tests whether the loss of an example is independent of the other examples in its batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from losscli.data import Split
from losscli.errors import LossError, ModelError
from losscli.evaluation.device import Narrowest

__all__ = ["Difference", "Evaluate", "Values", "compare", "is_dependent"]

Values = Mapping[str, Tensor]
"""The loss and the metrics of each example of a batch, ``[B]``, float64 on the CPU."""

Evaluate = Callable[[Split], Values]
"""Evaluates a batch."""

# The largest difference that counts as rounding without a further test, relative to the loss of the
# example; and a tenth of it relative to the mean loss.
_ROUNDING = {
    torch.float64: 1e-8,
    torch.float32: 1e-6,
    torch.bfloat16: 1e-6,
    torch.float16: 1e-6,
}

# The same relative to the norm of all losses, if no wider type can decide: a deep network may
# amplify rounding, and a small cross-entropy is the difference of large scores.
_AMPLIFIED = {torch.float64: 0.0, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}

# Examples on which a wider type decides, unless the difference is too large for rounding.
_FEW = 32


@dataclass(frozen=True)
class Difference:
    """The difference between the values of examples in a whole batch and in other batches.

    Attributes:
        what: The loss or the metric with the largest difference.
        row: The example with the largest difference.
        whole: Its value in the whole batch.
        other: Its value in another batch.
        excess: The largest difference as a multiple of the rounding that is accepted.
        share: The norm of the differences relative to the norm of the values.
        worst: The examples by descending difference.
    """

    what: str
    row: int
    whole: float
    other: float
    excess: float
    share: float
    worst: Tensor


def compare(
    evaluate: Evaluate, batch: Split, whole: Values, dtype: torch.dtype
) -> Difference | None:
    """Evaluates the examples of a batch again in two random halves.

    Random halves also separate pairs and blocks of rows. They keep the order of rows, because a
    batch may be sorted. If a model accepts only whole batches, one half fills a batch twice.

    Args:
        evaluate: Evaluates a batch.
        batch: The batch, of at least two examples.
        whole: The values for the whole batch.
        dtype: The type of the computation.

    Returns:
        The largest difference; None if neither halves nor a doubled half can be evaluated.
    """
    size = len(batch)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(size))
    halves = [half.sort().values for half in order.tensor_split(2)]
    parts = list(_evaluated(evaluate, batch, halves))
    if not parts:
        # Each row of one half twice; for an odd number of rows the last one once.
        parts = list(_evaluated(evaluate, batch, [halves[0].repeat_interleave(2)[:size]]))
    differences = [
        _difference(what, values, rows, part[what], _ROUNDING[dtype])
        for rows, part in parts
        for what, values in whole.items()
    ]
    return max(differences, key=lambda difference: difference.excess, default=None)


def _evaluated(
    evaluate: Evaluate, batch: Split, parts: Iterable[Tensor]
) -> Iterable[tuple[Tensor, Values]]:
    for rows in parts:
        try:
            yield rows, evaluate(batch.take(rows))
        except (ModelError, LossError, torch.OutOfMemoryError, MemoryError):
            continue


def _difference(what: str, values: Tensor, rows: Tensor, other: Tensor, share: float) -> Difference:
    truth = values[rows]
    finite = truth.isfinite() & other.isfinite()
    size = torch.where(finite, truth.abs(), 0.0)
    off = torch.where(finite, (other - truth).abs(), 0.0)
    # A small cross-entropy is e^−z: its relative rounding is that of the scores times z.
    scores = 1 + torch.where(size > 0, size.log().abs(), 0.0)
    rounding = share * (size * scores + size.mean() / 10)
    # One value is finite and the other is not.
    broken = truth.isfinite() != other.isfinite()
    excess = torch.where(off > 0, off / rounding, 0.0).masked_fill(broken, math.inf)
    at = int(excess.argmax())
    total = float(off.norm() / size.norm()) if off.any() else 0.0
    return Difference(
        what,
        int(rows[at]),
        float(truth[at]),
        float(other[at]),
        float(excess[at]),
        math.inf if broken.any() else total,
        rows[excess.argsort(descending=True)],
    )


def is_dependent(
    difference: Difference,
    batch: Split,
    dtype: torch.dtype,
    wider: Iterable[tuple[Evaluate, Narrowest]],
) -> bool:
    """Decides whether a difference is more than rounding, which is smaller in a wider type.

    Args:
        difference: The difference.
        batch: The batch.
        dtype: The type in which it was computed.
        wider: The same model in wider types, from the narrowest on, each with its type detector; as
            far as the model can be run in them.

    Returns:
        Whether the values of an example depend on the others in its batch.
    """
    all_rows = torch.arange(len(batch))
    chosen = {*difference.worst[: _FEW // 2].tolist(), *all_rows[: _FEW // 2].tolist()}
    few = torch.tensor(sorted(chosen))
    for evaluate, narrowest in wider:
        in_wider = None
        for rows in (few, all_rows):
            part = batch.take(rows)
            try:
                in_wider = compare(evaluate, part, evaluate(part), narrowest.dtype)
            except (ModelError, LossError, torch.OutOfMemoryError, MemoryError):
                # Some models accept only whole batches, and some no other type.
                continue
            # For a difference too large for rounding, a few examples are not enough.
            if in_wider is not None and (
                in_wider.excess > 1 or difference.share <= _AMPLIFIED[dtype]
            ):
                break
        if in_wider is None:
            break
        if in_wider.excess <= 1:
            return False
        difference, dtype = in_wider, narrowest.dtype
    return difference.share > _AMPLIFIED[dtype]
