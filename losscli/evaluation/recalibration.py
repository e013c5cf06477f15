"""BatchNorm's statistics, re-estimated at a point from training examples.

A checkpoint holds running statistics that were gathered during training. Those of two checkpoints,
interpolated, are not the statistics of the data in between, and may cause much of a barrier (Jordan
et al. 2022, arXiv 2211.08403). They are re-estimated as `torch.optim.swa_utils.update_bn` does: the
layers normalise each batch by its own statistics, and their running statistics become the means of
these over the batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from losscli.data import Examples, Split

__all__ = [
    "BATCH",
    "BatchNormLayer",
    "Recalibration",
    "Statistics",
    "batchnorm_layers",
    "recording",
]

BATCH = 256
"""The most examples in a batch, on every device and for every batch size of the losses, because the
result depends on the batches."""

BatchStatistics = dict[str, tuple[Tensor, int]]
"""Sums of statistics over the calls of a forward pass, and their number, by buffer name."""


@dataclass(frozen=True)
class Recalibration:
    """The training examples that statistics are estimated on.

    Attributes:
        name: The name of their split.
        split: The split.
        size: Examples per batch.
        order: The indices of the examples in the split, in whole batches.
    """

    name: str
    split: Examples
    size: int
    order: Tensor

    @classmethod
    def plan(cls, name: str, split: Examples, seed: int) -> Self:
        """Divides examples into batches in a random order, because files are often sorted by class.

        The batches are as few as possible and have the same size, so that each counts the same.
        Fewer examples are left out than there are batches. Whole batches of the data are kept.

        Returns:
            The examples and the batches.
        """
        number = len(split) if split.in_batches else math.ceil(len(split) / BATCH)
        size = len(split) // number
        order = split.order(torch.Generator().manual_seed(seed))
        return cls(name, split, size, order[: size * number])

    def batches(self) -> Iterator[Split]:
        """Iterates over the batches."""
        return self.split.batches(self.size, self.order)

    def first_batch(self) -> Self:
        """Keeps only the first batch, which is enough to compare two strategies."""
        return replace(self, order=self.order[: self.size])

    def __len__(self) -> int:
        return len(self.order)

    @property
    def examples(self) -> int:
        """The number of examples, counting those inside whole batches."""
        return self.split.rows if self.split.in_batches else len(self)


@dataclass(frozen=True)
class BatchNormLayer:
    """A BatchNorm layer that tracks its statistics.

    Attributes:
        module: The layer.
        mean: The name of its running mean.
        variance: The name of its running variance.
    """

    module: _BatchNorm
    mean: str
    variance: str

    @property
    def names(self) -> tuple[str, str]:
        """The names of both."""
        return self.mean, self.variance

    def is_fresh(self, weights: Mapping[str, Tensor]) -> bool:
        """Whether weights have the initial statistics: a running mean of 0, a variance of 1."""
        return not weights[self.mean].any() and bool((weights[self.variance] == 1).all())


def batchnorm_layers(model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[BatchNormLayer, ...]:
    """Finds the BatchNorm layers that track their statistics, in the model's order."""
    names = {id(tensor): name for name, tensor in tensors.items()}
    return tuple(
        BatchNormLayer(module, names[id(module.running_mean)], names[id(module.running_var)])
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        and module.track_running_stats
        and id(module.running_mean) in names
        and id(module.running_var) in names
    )


@contextmanager
def recording(layers: Sequence[BatchNormLayer]) -> Iterator[BatchStatistics]:
    """Makes BatchNorm layers normalise by the statistics of the batch, and records these.

    Only these layers are in train mode: dropout and everything else stay as they are.

    Args:
        layers: The layers. Their buffers are left with the statistics of the last batch.

    Yields:
        The statistics, which are filled in as the layers run.
    """
    statistics: BatchStatistics = {}
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_recording(layer, statistics))
        yield statistics


@contextmanager
def _recording(layer: BatchNormLayer, statistics: BatchStatistics) -> Iterator[None]:
    module, own = layer.module, layer.module.__dict__.get("forward")
    kept = module.training, module.momentum, module.num_batches_tracked
    forward: Callable[..., Any] = module.forward
    mean, variance = module.running_mean, module.running_var
    assert mean is not None  # `batchnorm_layers` finds only layers that have them
    assert variance is not None

    def record(*args: Any, **kwargs: Any) -> Any:
        # With a momentum of 1 the running statistics become those of the batch. They are reset
        # because infinity would stay: 0 times infinity is nan.
        mean.zero_()
        variance.fill_(1)
        outputs = forward(*args, **kwargs)
        for name, tensor in zip(layer.names, (mean, variance), strict=True):
            wide = torch.float32 if tensor.device.type == "mps" else torch.float64
            value = tensor.to(wide, copy=True)
            # A layer may run more than once.
            total, calls = statistics.get(name, (None, 0))
            statistics[name] = value if total is None else total + value, calls + 1
        return outputs

    module.training, module.momentum = True, 1.0
    if module.num_batches_tracked is not None:
        # A temporary counter, because the layer's own is a tensor of the checkpoint.
        module.num_batches_tracked = torch.zeros((), dtype=torch.long)
    # Not a hook, which is not called if the model calls forward directly.
    module.forward = record  # type: ignore[method-assign]
    try:
        yield
    finally:
        module.training, module.momentum, module.num_batches_tracked = kept
        if own is None:
            del module.forward
        else:
            module.forward = own  # type: ignore[method-assign]


class Statistics:
    """The statistics of batches at P points, summed in float64.

    Args:
        points: P.
    """

    def __init__(self, points: int) -> None:
        self._sums: list[BatchStatistics] = [{} for _ in range(points)]

    def add(self, p: int, statistics: BatchStatistics) -> None:
        """Adds the statistics of a batch at a point."""
        for name, (value, calls) in statistics.items():
            total, before = self._sums[p].get(name, (None, 0))
            self._sums[p][name] = value if total is None else total + value, before + calls

    def totals(self, p: int) -> list[Tensor]:
        """Returns the sums at a point, in the order of the names there."""
        return [total for total, _ in self._sums[p].values()]

    def set_totals(self, p: int, totals: Tensor, like: Statistics) -> None:
        """Sets the sums at a point.

        Args:
            p: The point.
            totals: The sums, one after another.
            like: Statistics of the first point of others, over as many calls of the same layers.
        """
        sums = like._sums[0]
        parts = torch.split(totals, [total.numel() for total, _ in sums.values()])
        self._sums[p] = {
            name: (part, sums[name][1]) for name, part in zip(sums, parts, strict=True)
        }

    @property
    def names(self) -> Collection[str]:
        """The names of the statistics recorded at any point."""
        return {name: None for sums in self._sums for name in sums}

    def at(self, p: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the means over all batches at a point, in the types of the model's tensors."""
        return {
            name: (total / calls).to(tensors[name].dtype)
            for name, (total, calls) in self._sums[p].items()
        }
