"""Gradients that are kept with their graphs, so that each can be differentiated many times.

A Hessian-vector product differentiates the gradient. About half of its operations are the forward
pass and the gradient, which are the same in every product at one point.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from losscli.data import device_budget, host_budget

__all__ = ["GradientGraphs", "Gradients", "graph_budget", "graph_bytes"]

Gradients = Mapping[int, Tensor]
"""The parts of the gradient of a batch that are not constant, by the index of their parameter."""

_HOST_BUDGET = 1 << 30


def graph_budget(device: torch.device) -> int:
    """Returns the most bytes of the graphs that are kept.

    Args:
        device: The device.

    Returns:
        A quarter of the free memory of a GPU; on the host 1 GiB, but at most a quarter of all its
        memory.
    """
    free = device_budget(device)
    return min(_HOST_BUDGET, host_budget()) if free is None else free


def graph_bytes(differentiate: Callable[[], Gradients], known: Iterable[Tensor]) -> int:
    """Measures the memory of a gradient and of the tensors that its graph holds.

    Args:
        differentiate: Computes a gradient with its graph.
        known: Tensors that exist without the graph.

    Returns:
        The bytes.
    """
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        gradients = differentiate()
        own = sum(part.numel() * part.element_size() for part in gradients.values())
    for tensor in known:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return own + sum(storages.values())


class GradientGraphs:
    """The gradients of the first batches of a split, with their graphs.

    The first product at a point keeps nothing, because it is often the only one. The second keeps
    as many graphs as fit. Each thread of a CPU differentiates another graph, so that
    threads do not wait for each other within an operation.

    Args:
        tensors: The tensors of the model, which the graphs depend on.
        budget: The most bytes of all graphs.
        threads: How many graphs are differentiated at once; 1 for a GPU.

    Attributes:
        batches: The number of examples of each batch, and its gradient.
    """

    def __init__(self, tensors: Collection[Tensor], budget: int, threads: int) -> None:
        self._tensors = tensors
        self._budget = budget
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._versions: list[tuple[int, int]] = []
        self._products = 0
        self._batch_bytes = 0
        self.batches: list[tuple[int, Gradients]] = []

    @property
    def examples(self) -> int:
        """The number of examples with a graph."""
        return sum(number for number, _ in self.batches)

    @property
    def has_room(self) -> bool:
        """Whether the product that has begun may keep one more graph."""
        needed = (len(self.batches) + 1) * max(1, self._batch_bytes)
        return self._products == 2 and needed <= self._budget

    @property
    def most_batches(self) -> int:
        """How many graphs fit; known in the second product."""
        return self._budget // max(1, self._batch_bytes)

    def begin(self, measure: Callable[[], int]) -> None:
        """Begins a product; ``measure`` returns the bytes of the graph of one batch."""
        versions = [(tensor._version, tensor.data_ptr()) for tensor in self._tensors]
        if versions != self._versions:
            self._versions = versions
            self._products = 0
            self.batches.clear()
        self._products += 1
        if self._products == 2 and self._budget:
            self._batch_bytes = measure()

    def map(self, function: Callable[[Gradients], Tensor]) -> list[Tensor]:
        """Calls a function, from several threads, with each gradient in the order of batches."""
        gradients = [gradient for _, gradient in self.batches]
        workers = min(self._threads, len(gradients))
        if workers < 2:
            return [function(gradient) for gradient in gradients]
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, threads // workers))
        try:
            self._pool = self._pool or ThreadPoolExecutor(workers)
            return list(self._pool.map(function, gradients))
        finally:
            torch.set_num_threads(threads)

    def release(self) -> bool:
        """Frees all graphs and keeps no more; returns whether there were any."""
        had = bool(self.batches)
        self.batches.clear()
        self._budget = 0
        if self._pool is not None:
            self._pool.shutdown(wait=False)
            self._pool = None
        return had
