"""Whether the loss of an example depends on its own example alone."""

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

# The largest difference that is taken for rounding without a closer look: as a share of the loss of
# the example, and a tenth of it as a share of the mean loss.
_ROUNDING = {
    torch.float64: 1e-8,
    torch.float32: 1e-6,
    torch.bfloat16: 1e-6,
    torch.float16: 1e-6,
}

# The same as a share of the norm of all losses, where no wider type can decide: a deep network may
# amplify rounding, and a small cross-entropy is the difference of large scores.
_AMPLIFIED = {torch.float64: 0.0, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}

# Examples on which a wider type decides, unless a difference is too large for rounding.
_FEW = 32


@dataclass(frozen=True)
class Difference:
    """How far a batch that is evaluated whole is from the same examples in other batches.

    Attributes:
        what: The loss or the metric with the largest difference.
        row: The example with the largest difference.
        whole: Its value in the whole batch.
        other: Its value in another batch.
        excess: The largest difference as a multiple of what is taken for rounding.
        share: The norm of the differences as a share of the norm of the values.
        worst: The examples, those with the largest differences first.
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
    """Evaluates the examples of a batch again, in two random halves of it.

    Random halves break pairs and blocks of rows too, and keep their order, for a batch may be
    sorted. Where a model takes whole batches alone, one half fills a batch twice.

    Args:
        evaluate: Evaluates a batch.
        batch: The batch, of at least two examples.
        whole: What it gave for the whole batch.
        dtype: The type that it computes in.

    Returns:
        The largest difference; None where neither halves nor a batch filled twice can be evaluated.
    """
    size = len(batch)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(size))
    halves = [half.sort().values for half in order.tensor_split(2)]
    parts = list(_evaluated(evaluate, batch, halves))
    if not parts:
        # Each row of one half twice; of an odd number of rows the last one once.
        parts = list(_evaluated(evaluate, batch, [halves[0].repeat_interleave(2)[:size]]))
    found = [
        _difference(what, values, rows, part[what], _ROUNDING[dtype])
        for rows, part in parts
        for what, values in whole.items()
    ]
    return max(found, key=lambda difference: difference.excess, default=None)


def _evaluated(
    evaluate: Evaluate, batch: Split, parts: Iterable[Tensor]
) -> Iterable[tuple[Tensor, Values]]:
    for rows in parts:
        try:
            yield rows, evaluate(batch.take(rows))
        except (ModelError, LossError, torch.OutOfMemoryError, MemoryError):
            continue


def _difference(what: str, values: Tensor, rows: Tensor, found: Tensor, share: float) -> Difference:
    truth = values[rows]
    finite = truth.isfinite() & found.isfinite()
    size = torch.where(finite, truth.abs(), 0.0)
    off = torch.where(finite, (found - truth).abs(), 0.0)
    # A small cross-entropy is e^−z: the rounding of the scores, a share of z, is a share of it.
    scores = 1 + torch.where(size > 0, size.log().abs(), 0.0)
    rounding = share * (size * scores + size.mean() / 10)
    # One of two is not finite, and the other is.
    broken = truth.isfinite() != found.isfinite()
    excess = torch.where(off > 0, off / rounding, 0.0).masked_fill(broken, math.inf)
    at = int(excess.argmax())
    total = float(off.norm() / size.norm()) if off.any() else 0.0
    return Difference(
        what,
        int(rows[at]),
        float(truth[at]),
        float(found[at]),
        float(excess[at]),
        math.inf if broken.any() else total,
        rows[excess.argsort(descending=True)],
    )


def is_dependent(
    found: Difference,
    batch: Split,
    dtype: torch.dtype,
    wider: Iterable[tuple[Evaluate, Narrowest]],
) -> bool:
    """Decides whether a difference is more than rounding, which a wider type makes smaller.

    Args:
        found: The difference.
        batch: The batch.
        dtype: The type that it was computed in.
        wider: The same model in wider types, from the narrowest on, each with the context that it
            is evaluated in; as far as the model can be run in them.

    Returns:
        Whether the numbers of an example depend on the others in its batch.
    """
    everything = torch.arange(len(batch))
    some = {*found.worst[: _FEW // 2].tolist(), *everything[: _FEW // 2].tolist()}
    few = torch.tensor(sorted(some))
    for evaluate, narrowest in wider:
        closer = None
        for rows in (few, everything):
            part = batch.take(rows)
            try:
                closer = compare(evaluate, part, evaluate(part), narrowest.dtype)
            except (ModelError, LossError, torch.OutOfMemoryError, MemoryError):
                # Some models take whole batches alone, and some no other type.
                continue
            # So large a difference is not acquitted by a few examples.
            if closer is not None and (closer.excess > 1 or found.share <= _AMPLIFIED[dtype]):
                break
        if closer is None:
            break
        if closer.excess <= 1:
            return False
        found, dtype = closer, narrowest.dtype
    return found.share > _AMPLIFIED[dtype]
