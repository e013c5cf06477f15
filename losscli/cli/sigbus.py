"""Ends a process in one line if a file that it has mapped into memory was truncated."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from losscli.files import mapped_regions

__all__ = ["exit_on_lost_pages"]


def exit_on_lost_pages(tell: Callable[[str], None]) -> None:
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


def _beyond(place: int) -> str | None:
    """Names the file that is mapped at a place in memory and no longer goes as far."""
    for mapping in mapped_regions():
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
