"""BatchNorm's statistics, estimated anew at a point from training examples.

A checkpoint holds running statistics that were gathered on the way of training. Those of two
checkpoints, combined, are not the statistics that the data have between them, and much of a barrier
may be theirs alone (Jordan et al. 2022, arXiv 2211.08403). They are estimated anew as
`torch.optim.swa_utils.update_bn` does: the layers take each batch by its own statistics, and the
mean of these over the batches is what they get.
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

__all__ = ["BATCH", "Layer", "Recalibration", "Statistics", "estimating", "layers_of"]

BATCH = 256
"""The most examples that statistics are taken of at once, whatever the device and the batch size of
the losses: the statistics of a batch are part of what is computed."""

Seen = dict[str, tuple[Tensor, int]]
"""Sums of statistics in a forward pass, and of how many calls, by the names of the buffers."""


@dataclass(frozen=True)
class Recalibration:
    """The training examples that statistics are estimated on.

    Attributes:
        name: The name of their split.
        split: The split.
        size: Examples a batch.
        order: Which of the split's examples, and in which order: whole batches.
    """

    name: str
    split: Examples
    size: int
    order: Tensor

    @classmethod
    def plan(cls, name: str, split: Examples, seed: int) -> Self:
        """Deals examples to batches, in one random order: files are often sorted by their classes.

        The batches are as few as can be, and all of one size, so that each counts as much as any
        other. Fewer examples are left over than there are batches.

        Args:
            name: The name of the split.
            split: The split, of two examples or more.
            seed: Of the order.

        Returns:
            The examples and the batches.
        """
        number = math.ceil(len(split) / BATCH)
        size = len(split) // number
        order = split.order(torch.Generator().manual_seed(seed))
        return cls(name, split, size, order[: size * number])

    def batches(self) -> Iterator[Split]:
        """Goes by the examples once.

        Returns:
            The batches.
        """
        return self.split.batches(self.size, self.order)

    def brief(self) -> Self:
        """Takes the first batch alone.

        Returns:
            What is enough to hold two ways to evaluate against each other.
        """
        return replace(self, order=self.order[: self.size])

    def __len__(self) -> int:
        return len(self.order)


@dataclass(frozen=True)
class Layer:
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
        """Tells whether some weights hold no statistics yet.

        Args:
            weights: The tensors of a checkpoint.

        Returns:
            Whether the running mean is 0 and the running variance 1, as at the start.
        """
        return not weights[self.mean].any() and bool((weights[self.variance] == 1).all())


def layers_of(model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[Layer, ...]:
    """Finds the BatchNorm layers that track their statistics.

    Args:
        model: The model.
        tensors: Its tensors by name; of the names of a tied one the last counts.

    Returns:
        The layers in the model's order.
    """
    names = {id(tensor): name for name, tensor in tensors.items()}
    return tuple(
        Layer(module, names[id(module.running_mean)], names[id(module.running_var)])
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        and module.track_running_stats
        and id(module.running_mean) in names
        and id(module.running_var) in names
    )


@contextmanager
def estimating(layers: Sequence[Layer]) -> Iterator[Seen]:
    """Lets BatchNorm layers take a batch by its own statistics, and takes these down.

    Only these layers are in train mode: dropout and all else stay as they are.

    Args:
        layers: The layers. Those that are run are left with the statistics of their last batch.

    Yields:
        What is seen in a forward pass; it is filled in as the layers are run.
    """
    seen: Seen = {}
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_listening(layer, seen))
        yield seen


@contextmanager
def _listening(layer: Layer, seen: Seen) -> Iterator[None]:
    module, own = layer.module, layer.module.__dict__.get("forward")
    kept = module.training, module.momentum, module.num_batches_tracked
    forward: Callable[..., Any] = module.forward
    mean, variance = module.running_mean, module.running_var
    assert mean is not None  # of such layers are those that `layers_of` finds
    assert variance is not None

    def listen(*args: Any, **kwargs: Any) -> Any:
        # With a momentum of 1 the running statistics become those of the batch; but what is not
        # finite would stay, since 0 times infinity is no number.
        mean.zero_()
        variance.fill_(1)
        outputs = forward(*args, **kwargs)
        for name, tensor in zip(layer.names, (mean, variance), strict=True):
            wide = torch.float32 if tensor.device.type == "mps" else torch.float64
            value = tensor.to(wide, copy=True)
            # A layer may be run more than once.
            total, calls = seen.get(name, (None, 0))
            seen[name] = value if total is None else total + value, calls + 1
        return outputs

    module.training, module.momentum = True, 1.0
    if module.num_batches_tracked is not None:
        # The count of batches is a tensor of the checkpoint: another one is raised.
        module.num_batches_tracked = torch.zeros((), dtype=torch.long)
    # In the place of a hook, which a call of forward itself would not meet.
    module.forward = listen  # type: ignore[method-assign]
    try:
        yield
    finally:
        module.training, module.momentum, module.num_batches_tracked = kept
        if own is None:
            del module.forward
        else:
            module.forward = own  # type: ignore[method-assign]


class Statistics:
    """The statistics of batches at P points, added up in float64.

    Args:
        points: P.
    """

    def __init__(self, points: int) -> None:
        self._seen: list[Seen] = [{} for _ in range(points)]

    def add(self, p: int, seen: Seen) -> None:
        """Adds those of a batch.

        Args:
            p: The point.
            seen: What was seen there.
        """
        for name, (value, calls) in seen.items():
            total, before = self._seen[p].get(name, (None, 0))
            self._seen[p][name] = value if total is None else total + value, before + calls

    @property
    def names(self) -> Collection[str]:
        """The statistics that were seen at any point."""
        return {name: None for seen in self._seen for name in seen}

    def at(self, p: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Takes the means over all batches.

        Args:
            p: The point.
            tensors: The model's tensors, for their types.

        Returns:
            The running statistics of the layers that were run.
        """
        return {
            name: (total / calls).to(tensors[name].dtype)
            for name, (total, calls) in self._seen[p].items()
        }
