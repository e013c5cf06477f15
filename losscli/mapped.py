"""Memory that is mapped from files: its pages are given back once they were looked at."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

__all__ = ["let_go"]

# Below it, to ask is more work than to keep.
_LEAST = 1 << 20


def let_go(*tensors: Tensor) -> None:
    """Lets the system have back the pages of tensors that are mapped from files.

    Pages of a file count as a process's own from when they are first read: two checkpoints that
    are compared would be held twice over. The tensors stay as they are; where they are read
    again, the pages come from the system's cache of the file. On other systems than Linux, and
    for tensors that are not mapped, nothing is done.

    Args:
        *tensors: The tensors, which nobody has written on.
    """
    ranges = [
        (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)
        for tensor in tensors
        if tensor.nbytes >= _LEAST and tensor.device.type == "cpu" and tensor.is_contiguous()
    ]
    advise = _madvise() if ranges else None
    if advise is None:
        return
    page = mmap.PAGESIZE
    files = sorted(_files())
    for first, last in ranges:
        # Pages that are shared with a neighbour are kept.
        start, stop = -(-first // page) * page, last // page * page
        i = bisect_right(files, (start, sys.maxsize)) - 1
        if i >= 0 and start < stop <= files[i][1]:
            advise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)


def _files() -> Iterator[tuple[int, int]]:
    """Yields the stretches of memory that are files; pages of all else would be lost."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
            addresses, _, _, _, inode, *_ = line.split()
            if inode != "0":
                start, stop = addresses.split("-")
                yield int(start, 16), int(stop, 16)


@functools.cache
def _madvise() -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    try:
        advise: Callable[..., int] = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    return advise
