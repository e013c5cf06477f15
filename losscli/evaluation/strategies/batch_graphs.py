"""A batch at one point as a CUDA graph: all its kernels are launched at once.

A small model leaves a GPU waiting for the host, which launches preparation, forward pass, loss and
sums kernel by kernel. A graph records these launches for a batch of some shape and repeats them:
the batch is copied to where the recorded one lies, and the weights move within their memory
(`SinglePointWeights`). What Python decides is not decided again, so this is only for models of
known parts, modules of torch and losscli without code of the user; for built-in losses and metrics;
and for examples that are tensors. Code that reads a value from the device cannot be recorded.

A graph is used only after its first replay gave the bits that the same batch gives without it. So
far this has been tested with a double on the CPU, and not on a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from losscli.data import Split
from losscli.errors import LosscliError, one_line

__all__ = ["BatchGraphs", "CudaCapture", "Evaluate", "GraphCapture", "graph_capture"]

Evaluate = Callable[[Split, Sequence[Tensor]], None]
"""Evaluates a batch with the present weights, and writes the results to tensors."""


class GraphCapture(Protocol):
    """Records work on a device."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Records the kernels that a function launches.

        Args:
            work: The function. It reads and writes memory that outlives the graph, and leaves no
                result elsewhere.

        Returns:
            A function that launches them again, on the same memory.

        Raises:
            RuntimeError: The function waits for the device, or does something else that cannot be
                recorded.
        """


class CudaCapture:
    """Records CUDA graphs.

    The graphs share one pool of memory. That is safe in any order of replays, because no result
    stays in it.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # As long as it exists, so does the pool.
        self._first: torch.cuda.CUDAGraph | None = None

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Records the kernels that a function launches.

        Args:
            work: The function. It must have run before, which initialises the device's libraries.

        Returns:
            A function that launches them again.
        """
        with torch.cuda.device(self._device):
            stream = _capture_stream(self._device)
            current = torch.cuda.current_stream()
            # A failed recording leaves PyTorch's allocator and random generator in the state of a
            # recording, so what would fail is found before. This run also allocates the workspaces
            # of libraries for this stream outside of the pool.
            stream.wait_stream(current)
            with torch.cuda.stream(stream), _refusing_to_wait():
                work()
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            pool = None if self._first is None else self._first.pool()
            # If a recording fails, `torch.cuda.graph` leaves its stream as the current one. Other
            # threads, such as those of a DataLoader, may use the device meanwhile.
            with (
                torch.cuda.stream(current),
                torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"),
            ):
                work()
            self._first = self._first or graph
        replay: Callable[[], None] = graph.replay
        return replay


@lru_cache(maxsize=1)
def _capture_stream(device: torch.device) -> Any:
    """Returns the stream of all recordings: libraries keep a workspace for each stream."""
    new_stream: Callable[..., Any] = torch.cuda.Stream
    return new_stream(device)


@contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """Makes operations that wait for the device fail."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():  # PyTorch says that this does not detect every such operation
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def graph_capture(device: torch.device) -> GraphCapture | None:
    """Returns what records graphs on a device; None if it has none."""
    return CudaCapture(device) if device.type == "cuda" else None


@dataclass(frozen=True)
class _Graph:
    """A recorded batch: replaying reads ``batch`` and writes ``results``."""

    batch: Sequence[Tensor]
    results: Sequence[Tensor]
    replay: Callable[[], None]

    def run(self, batch: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Evaluates a batch of the recorded shape."""
        for own, new in zip(self.batch, batch, strict=True):
            own.copy_(new)
        self.replay()
        for result, own in zip(results, self.results, strict=True):
            result.copy_(own)


class BatchGraphs:
    """Graphs of the evaluation of a batch at one point, one per shape of batch.

    Args:
        capture: Records them.
        evaluate: Evaluates a batch without a graph.

    Attributes:
        reason: Why some batches are evaluated without a graph; empty if none is.
    """

    def __init__(self, capture: GraphCapture, evaluate: Evaluate) -> None:
        self._capture = capture
        self._evaluate = evaluate
        self._graphs: dict[tuple[object, ...], _Graph | None] = {}
        self.reason = ""

    def evaluate(self, batch: Split, results: Sequence[Tensor]) -> None:
        """Evaluates a batch with the present weights, as a graph if that gives the same bits.

        Args:
            batch: The batch, as stored, on the device.
            results: Receive the results; of the same shapes for every batch of one shape.
        """
        if not batch.holds_tensors_only:
            # A graph would keep the other values of the first batch.
            self.reason = "examples are not only tensors"
            self._evaluate(batch, results)
            return
        tensors, structure = tree_flatten((batch.inputs, batch.targets))
        shape = repr(structure), *((t.shape, t.stride(), t.dtype) for t in tensors)
        graph = self._graphs.get(shape)
        if graph is not None:
            graph.run(tensors, results)
            return
        self._evaluate(batch, results)
        if shape not in self._graphs:
            self._graphs[shape] = self._record(batch, results)

    def _record(self, batch: Split, results: Sequence[Tensor]) -> _Graph | None:
        """Records a batch; None if that fails, or a replay gives other bits than those given."""
        own = batch.map(Tensor.clone)
        own_results = [torch.empty_like(result) for result in results]
        tensors, _ = tree_flatten((batch.inputs, batch.targets))
        own_tensors, _ = tree_flatten((own.inputs, own.targets))
        try:
            replay = self._capture.record(lambda: self._evaluate(own, own_results))
            graph = _Graph(own_tensors, own_results, replay)
            # Not what recording wrote there.
            for written in own_results:
                written.fill_(-1)
            found = [torch.full_like(result, -1) for result in results]
            graph.run(tensors, found)
        except (RuntimeError, LosscliError) as error:
            self.reason = one_line(_first(error))
            return None
        if not all(map(_same_bits, results, found)):
            self.reason = "a graph gives other bits"
            return None
        return graph


def _first(error: BaseException) -> BaseException:
    """The error that caused another one, such as the failure to end a recording."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, nan included."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
