"""Memory that is mapped from files: pages are given back once looked at, and may be lost."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import signal
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    # The command line, which is here for `tell_of_lost_pages`, begins without torch.
    from torch import Tensor

__all__ = ["is_mapped", "let_go", "tell_of_lost_pages"]

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
    files = sorted((m.start, m.stop) for m in _mapped())
    for first, last in ranges:
        # Pages that are shared with a neighbour are kept.
        start, stop = -(-first // page) * page, last // page * page
        i = bisect_right(files, (start, sys.maxsize)) - 1
        if i >= 0 and start < stop <= files[i][1]:
            advise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)


def is_mapped(tensor: Tensor) -> bool:
    """Tells whether `let_go` would have an effect on a tensor.

    Args:
        tensor: The tensor.

    Returns:
        Whether it is large, and lies in memory that is mapped from a file.
    """
    if tensor.nbytes < _LEAST or tensor.device.type != "cpu":
        return False
    return any(m.start <= tensor.data_ptr() < m.stop for m in _mapped())


def tell_of_lost_pages(tell: Callable[[str], None]) -> None:
    """Has a process that reads where a file was cut off end with an error, from now on.

    A file that is written anew in its place is empty for a moment. To read from it as it was
    mapped is then an error that no code can catch: the system ends the process by SIGBUS. So the
    handler, in whichever thread it is called, never returns to where it came from, unless no file
    was cut off. On other systems than Linux nothing is done.

    Args:
        tell: Tells the user of an error, in one line.
    """
    if sys.platform != "linux":
        return

    library = ctypes.CDLL(None)

    def handle(number: int, info: int, _: int) -> None:
        try:
            # As Linux lays out what it tells of a fault, on all machines of 64 bits.
            code = ctypes.c_int.from_address(info + 8).value
            place = ctypes.c_uint64.from_address(info + 16).value
            file = _beyond(place) if code > 0 else None
            if file is not None:
                tell(
                    f"{file} was cut off while it was looked at. Start again once it is left alone"
                )
                os._exit(1)
        finally:
            library.signal(number, None)  # as it was; Python's own is for one thread alone
            os.kill(os.getpid(), number)

    with contextlib.suppress(OSError, AttributeError):
        action = _Action(_HANDLER(handle), flags=_WITH_INFORMATION)
        library.sigaction(signal.SIGBUS, ctypes.byref(action), None)
        _KEPT.append(action)


_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_WITH_INFORMATION = 4  # SA_SIGINFO


class _Action(ctypes.Structure):
    """What a process does on a signal: the C library's ``struct sigaction``."""

    _fields_ = (
        ("handler", _HANDLER),
        ("mask", ctypes.c_uint8 * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


# What the system calls has to stay.
_KEPT: list[_Action] = []


class _Mapping(NamedTuple):
    """A stretch of memory that is a file: where it is, and what of the file."""

    start: int
    stop: int
    offset: int
    path: str


def _mapped() -> Iterator[_Mapping]:
    """Yields the stretches of memory that are files; pages of all else would be lost."""
    with contextlib.suppress(OSError):
        for line in os.fsdecode(Path("/proc/self/maps").read_bytes()).split("\n"):
            addresses, _, offset, _, inode, *path = [*line.split(maxsplit=5), *[""] * 5][:6]
            if inode not in {"0", ""}:
                start, stop = addresses.split("-")
                yield _Mapping(int(start, 16), int(stop, 16), int(offset, 16), "".join(path))


def _beyond(place: int) -> str | None:
    """Names the file that is mapped at a place in memory and no longer goes as far."""
    for mapping in _mapped():
        if mapping.start <= place < mapping.stop:
            path = mapping.path.replace("\\012", "\n")
            try:
                size = Path(path).stat().st_size
            except OSError:
                # One that another machine keeps and deletes is lost; one of this machine is not.
                return None if path.endswith(" (deleted)") else path
            if size <= mapping.offset + place - mapping.start:
                return path
    return None


@functools.cache
def _madvise() -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    try:
        advise: Callable[..., int] = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    return advise
