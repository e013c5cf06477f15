"""A batch at one point as a CUDA graph: all its kernels are launched at once.

A small model leaves a GPU waiting for the host, which launches preparation, forward pass, loss and
sums kernel by kernel. A graph records these launches for a batch of some shape and repeats them:
the batch is copied to where the recorded one lies, and the weights move within their memory
(`SinglePointWeights`). What Python decides is not decided again, so this is only for models of
known parts: modules of torch and losscli without code of the user, and built-in losses and metrics.
Code that reads a value from the device cannot be recorded at all.

A graph is used only after its first replay gave the bits that the same batch gives without it. So
far this has been tested with a double on the CPU, and not on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from losscli.data import Split, leaves
from losscli.errors import LosscliError, one_line

__all__ = [
    "LEAST_REPLAYS",
    "BatchGraphs",
    "CudaCapture",
    "EvaluateBatch",
    "GraphCapture",
    "graph_capture",
]

LEAST_REPLAYS = 16
"""The fewest replays for which graphs are recorded: to record one, the device is waited for, which
takes as long as a few batches. Not measured."""

Sums = Mapping[str | None, Tensor]
"""The sums of metrics by name, ``[P]`` each."""

EvaluateBatch = Callable[[Split, Tensor, Sums], None]
"""Evaluates a batch with the present weights; writes its losses ``[1, B]`` and its sums, P = 1."""


class GraphCapture(Protocol):
    """Records work on a device."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Records the kernels that a function launches.

        Args:
            work: The function. It reads and writes memory that outlives the graph.

        Returns:
            A function that launches them again, on the same memory.

        Raises:
            RuntimeError: The function waits for the device, or does something else that cannot be
                recorded.
        """


class CudaCapture:
    """Records CUDA graphs.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Records the kernels that a function launches.

        Args:
            work: The function. It must have run before, which initialises the device's libraries.

        Returns:
            A function that launches them again.
        """
        with torch.cuda.device(self._device):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                work()
        replay: Callable[[], None] = graph.replay
        return replay


def graph_capture(device: torch.device) -> GraphCapture | None:
    """Returns what records graphs on a device; None if it has none."""
    return CudaCapture(device) if device.type == "cuda" else None


@dataclass(frozen=True)
class _Graph:
    """A recorded batch: replaying reads ``batch`` and writes ``losses`` and ``sums``."""

    batch: Split
    losses: Tensor
    sums: Sums
    replay: Callable[[], None]

    def run(self, batch: Split, losses: Tensor, sums: Sums) -> None:
        """Evaluates a batch of the recorded shape."""
        for own, new in zip(_tensors(self.batch), _tensors(batch), strict=True):
            own.copy_(new)
        self.replay()
        losses.copy_(self.losses)
        for name, total in self.sums.items():
            sums[name].copy_(total)


class BatchGraphs:
    """Graphs of the evaluation of a batch at one point, one per shape of batch.

    Args:
        capture: Records them.
        evaluate: Evaluates a batch without a graph.

    Attributes:
        reason: Why some batches are evaluated without a graph; empty if none is.
    """

    def __init__(self, capture: GraphCapture, evaluate: EvaluateBatch) -> None:
        self._capture = capture
        self._evaluate = evaluate
        self._graphs: dict[tuple[object, ...], _Graph | None] = {}
        self.reason = ""

    def evaluate(self, batch: Split, losses: Tensor, sums: Sums) -> None:
        """Evaluates a batch with the present weights, as a graph if that gives the same bits.

        Args:
            batch: The batch, as stored, on the device.
            losses: Receives its losses, ``[1, B]``.
            sums: Receive the sums of its metrics, ``[1]`` each.
        """
        shape = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in _tensors(batch))
        graph = self._graphs.get(shape)
        if graph is not None:
            graph.run(batch, losses, sums)
            return
        self._evaluate(batch, losses, sums)
        if shape not in self._graphs:
            self._graphs[shape] = self._record(batch, losses, sums)

    def _record(self, batch: Split, losses: Tensor, sums: Sums) -> _Graph | None:
        """Records a batch; None if that fails, or a replay gives other bits than those given."""
        own = batch.map(Tensor.clone)
        own_losses = torch.empty_like(losses)
        own_sums = {name: torch.empty_like(total) for name, total in sums.items()}
        try:
            replay = self._capture.record(lambda: self._evaluate(own, own_losses, own_sums))
            graph = _Graph(own, own_losses, own_sums, replay)
            found = (
                torch.full_like(losses, -1),
                {n: torch.full_like(t, -1) for n, t in sums.items()},
            )
            # Not what recording wrote there.
            for written in (own_losses, *own_sums.values()):
                written.fill_(-1)
            graph.run(batch, *found)
        except (RuntimeError, LosscliError) as error:
            self.reason = one_line(error)
            return None
        if not _same_bits(losses, found[0]) or not all(
            _same_bits(total, found[1][name]) for name, total in sums.items()
        ):
            self.reason = "a graph gives other bits"
            return None
        return graph


def _tensors(batch: Split) -> list[Tensor]:
    return [*leaves(batch.inputs), *leaves(batch.targets)]


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, nan included."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
