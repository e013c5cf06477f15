"""Copies batches to a GPU while it computes, on a stream of their own.

Only copies from pinned memory are asynchronous. Two sets of pinned buffers take turns: while one is
filled by the host, the device may still read from the other. Three waits keep the order: the host
waits for the last copy out of a buffer before it writes to it; the device waits for a copy before
it computes with it; and memory of the device is not used again before the last computation with it.

So far this has been tested with a double on the CPU, and not on a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from losscli.data.memory import allocations
from losscli.data.split import Split

__all__ = ["CopyStream", "copy_stream", "transferred"]


class CopyStream(Protocol):
    """A queue of copies to a device."""

    def pinned(self, nbytes: int) -> Tensor:
        """Allocates memory of the host, ``[nbytes]`` of uint8, that the device can copy from."""

    def copy(self, batch: Split) -> tuple[Split, Any]:
        """Starts to copy a batch in pinned memory.

        Args:
            batch: The batch.

        Returns:
            The batch on the device, and an event that happens when it is complete.
        """

    def wait_on_host(self, event: Any) -> None:
        """Waits for an event."""

    def wait_on_device(self, event: Any, batch: Split) -> None:
        """Makes the device wait for an event before it computes with a batch."""


class _CudaCopyStream:
    """Copies on a stream of a GPU that no kernel runs on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        new_stream: Callable[..., Any] = torch.cuda.Stream
        self._stream = new_stream(device)

    @staticmethod
    def pinned(nbytes: int) -> Tensor:
        """Allocates pinned memory."""
        with allocations():
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, batch: Split) -> tuple[Split, Any]:
        """Starts to copy a batch in pinned memory."""
        with torch.cuda.stream(self._stream), allocations():
            copied = batch.map(lambda tensor: tensor.to(self._device, non_blocking=True))
            return copied, self._stream.record_event()

    @staticmethod
    def wait_on_host(event: Any) -> None:
        """Waits for an event."""
        event.synchronize()

    def wait_on_device(self, event: Any, batch: Split) -> None:
        """Makes the device wait for an event before it computes with a batch."""
        current: Any = torch.cuda.current_stream(self._device)
        current.wait_event(event)

        def record(tensor: Tensor) -> Tensor:
            tensor.record_stream(current)
            return tensor

        batch.map(record)


@lru_cache(maxsize=1)
def copy_stream(device: torch.device) -> CopyStream | None:
    """Returns the queue of copies to a device; None if it has none."""
    # The same for all passes: memory that a stream has used is kept for that stream.
    return _CudaCopyStream(device) if device.type == "cuda" else None


def transferred(
    batches: Iterable[Split], device: torch.device, stream: CopyStream | None
) -> Iterator[Split]:
    """Moves batches to a device.

    Args:
        batches: The batches.
        device: The device.
        stream: Copies those that are on the host; None to copy each when it is needed.

    Yields:
        The batches on the device. With a stream the next copy has been started by then.
    """
    if stream is None:
        yield from (batch if batch.is_on(device) else batch.to(device) for batch in batches)
        return
    buffers: list[list[Tensor]] = [[], []]
    events: list[Any] = [None, None]
    turns = itertools.cycle((0, 1))
    # The batch that is yielded next, and the event that completes it.
    pending: tuple[Split, Any] | None = None
    for batch in batches:
        if batch.is_on(device):
            following = batch, None
        elif not batch.holds_tensors_only:
            # The tensors of other columns are made when the batch is used, too late for a buffer.
            following = batch.to(device), None
        else:
            turn = next(turns)
            if events[turn] is not None:
                stream.wait_on_host(events[turn])
            following = stream.copy(_pinned(batch, buffers[turn], stream))
            events[turn] = following[1]
        if pending is not None:
            yield _ready(*pending, stream)
        pending = following
    if pending is not None:
        yield _ready(*pending, stream)


def _ready(batch: Split, event: Any, stream: CopyStream) -> Split:
    if event is not None:
        stream.wait_on_device(event, batch)
    return batch


def _pinned(batch: Split, buffers: list[Tensor], stream: CopyStream) -> Split:
    """Copies a batch to pinned buffers, one per tensor, which grow as needed."""
    places = itertools.count()

    def copy(tensor: Tensor) -> Tensor:
        place = next(places)
        if place == len(buffers):
            buffers.append(stream.pinned(tensor.nbytes))
        elif buffers[place].nbytes < tensor.nbytes:
            buffers[place] = stream.pinned(tensor.nbytes)
        # The layout of the tensor, but without gaps.
        layout = torch.empty_like(tensor, device="meta").stride()
        flat = buffers[place][: tensor.nbytes].view(tensor.dtype)
        return flat.as_strided(tensor.shape, layout).copy_(tensor)

    return batch.map(copy)
