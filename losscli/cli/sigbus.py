"""Handles SIGBUS: a memory-mapped file was truncated while it was read."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["exit_on_lost_pages"]


def exit_on_lost_pages(report: Callable[[str], None]) -> None:
    """Installs a SIGBUS handler that reports a truncated file and ends the process.

    A file that is overwritten in place is empty for a moment. Reading its mapped pages then raises
    SIGBUS, which Python code cannot catch. The handler may run in any thread and does not return
    if a file was truncated; otherwise the default action follows. It is installed only on Linux.

    Args:
        report: Writes an error in one line.
    """
    if sys.platform != "linux":
        return

    library = ctypes.CDLL(None)

    def handle(number: int, info: int, _: int) -> None:
        try:
            # The layout of siginfo_t on 64-bit Linux.
            code = ctypes.c_int.from_address(info + 8).value
            address = ctypes.c_uint64.from_address(info + 16).value
            file = _truncated_file(address) if code > 0 else None
            if file is not None:
                report(
                    f"{file} was truncated while losscli read it. Run again when no program "
                    "writes to it"
                )
                os._exit(1)
        finally:
            library.signal(number, None)  # SIG_DFL; signal.signal works only in the main thread
            os.kill(os.getpid(), number)

    with contextlib.suppress(OSError, AttributeError):
        action = _Action(_HANDLER(handle), flags=_WITH_INFORMATION)
        library.sigaction(signal.SIGBUS, ctypes.byref(action), None)
        _ACTIONS.append(action)


_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_WITH_INFORMATION = 4  # SA_SIGINFO


class _Action(ctypes.Structure):
    """``struct sigaction`` of the C library."""

    _fields_ = (
        ("handler", _HANDLER),
        ("mask", ctypes.c_uint8 * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


# Keeps the handlers alive, since C code holds only pointers to them.
_ACTIONS: list[_Action] = []


class _Region(NamedTuple):
    """A memory region that is mapped from a file.

    Attributes:
        start: The first address.
        stop: The address after the last.
        offset: The offset of the start in the file.
        path: The file.
    """

    start: int
    stop: int
    offset: int
    path: str


def _mapped_regions() -> Iterator[_Region]:
    """Lists the memory-mapped regions of this process."""
    with contextlib.suppress(OSError):
        for line in os.fsdecode(Path("/proc/self/maps").read_bytes()).split("\n"):
            addresses, _, offset, _, inode, *path = [*line.split(maxsplit=5), *[""] * 5][:6]
            if inode not in {"0", ""}:
                start, stop = addresses.split("-")
                yield _Region(int(start, 16), int(stop, 16), int(offset, 16), "".join(path))


def _truncated_file(address: int) -> str | None:
    """Returns the file mapped at an address if it now ends before that address."""
    for mapping in _mapped_regions():
        if mapping.start <= address < mapping.stop:
            path = mapping.path.replace("\\012", "\n")
            try:
                size = Path(path).stat().st_size
            except OSError:
                # A deleted local file is still intact; one on a network file system is lost.
                return None if path.endswith(" (deleted)") else path
            if size <= mapping.offset + address - mapping.start:
                return path
    return None
