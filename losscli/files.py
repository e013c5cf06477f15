"""Regular files, pipes and memory that is mapped from files.

Reading does not block on a FIFO and refuses devices. Errors are an OSError, so that each reader can
add what it was about to read. Files are created only where nothing has their name.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import stat
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator
from io import BufferedReader, FileIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

if TYPE_CHECKING:
    # Help and pictures are made without torch.
    from torch import Tensor

__all__ = [
    "IrregularError",
    "MappedRegion",
    "create",
    "is_mapped",
    "mapped_regions",
    "open_regular",
    "read_pipe",
    "read_regular",
    "read_text",
    "release_pages",
    "stand_in",
]

# The largest tables are of planes: some 60 bytes for each point and split.
_MOST = 256 << 20
_LONGEST = 1 << 20
_BLOCK = 1 << 16

# The pages of smaller tensors are not worth a system call.
_LARGE = 1 << 20

_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class IrregularError(OSError):
    """What is to be read is no regular file, or does not end as one does.

    Args:
        what: What is wrong and the cure.
    """

    def __init__(self, what: str) -> None:
        super().__init__(errno.EINVAL, what)

    def __str__(self) -> str:
        return str(self.strerror)


def create(path: Path) -> FileIO:
    """Creates a file.

    Args:
        path: Its name, which nothing has yet: no link is followed, and no file is opened that
            somebody else has put there.

    Returns:
        The file, to be read and written.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    for name in ("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, name, 0)
    return FileIO(os.open(path, flags, 0o666), "r+b")


def open_regular(path: Path) -> BufferedReader:
    """Opens a regular file, and waits for nobody who may write to a pipe.

    Args:
        path: Its name, or that of a link to it.

    Returns:
        The file, to be read.

    Raises:
        IrregularError: It is a pipe, a socket or a device.
        IsADirectoryError: It is a folder.
        OSError: The system does not let it be opened.
    """
    _require_regular(path.stat().st_mode)  # to open a device may do something
    file = _open(path)
    try:
        _require_regular(os.fstat(file.fileno()).st_mode)
    except OSError:
        file.close()
        raise
    return file


def read_regular(path: Path) -> bytes:
    """Reads the whole of a regular file.

    Args:
        path: Its name, or that of a link to it.

    Returns:
        What is in it.
    """
    with open_regular(path) as file:
        return file.read()


def stand_in(path: Path) -> tuple[str, str] | None:
    """Tells what lies in the place of a file that was not downloaded itself.

    Args:
        path: The file.

    Returns:
        What it is and the cure; None where it is no such thing.
    """
    try:
        with open_regular(path) as file:
            start = file.read(512).lstrip().lower()
    except OSError:
        return None
    if start.startswith(b"version https://git-lfs"):
        return (
            "a pointer of Git LFS, not the file itself",
            f"Fetch the file: git lfs pull --include {path.name}",
        )
    if start.startswith((b"<!doctype html", b"<html")):
        return (
            "an HTML page, not the file itself",
            "Download it again, from the address of the file and not of the page that shows it",
        )
    return None


def read_pipe(path: Path) -> bytes:
    """Reads the text of a table from a regular file, or from a pipe that somebody writes to.

    Args:
        path: Its name, such as ``/dev/fd/63`` of a shell's ``<(…)``.

    Returns:
        What is in it.

    Raises:
        IrregularError: Nobody writes to the pipe, or what comes is no text of a table.
        IsADirectoryError: It is a folder.
    """
    with _open(path) as file:
        mode = os.fstat(file.fileno()).st_mode
        first = b""
        if stat.S_ISFIFO(mode):
            try:
                first = os.read(file.fileno(), _BLOCK)
            except BlockingIOError:
                pass  # a writer has it open and takes its time
            else:
                if not first:
                    raise IrregularError(
                        "it is a pipe to which nobody writes, and no regular file. Begin to write "
                        "before it is read, or copy what it is to hold to a file and name that"
                    )
            os.set_blocking(file.fileno(), True)
        return read_text(file, first)


def read_text(file: BinaryIO, first: bytes = b"") -> bytes:
    """Reads the text of a table; from what is no regular file, no more than a table may be.

    Args:
        file: The file, or stdin.
        first: What was read from it before.

    Returns:
        The text.

    Raises:
        IrregularError: It holds zero bytes, its first line does not end, or it does not.
    """
    try:
        endless = not stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    except OSError:  # in memory
        endless = False
    text, in_first_line = bytearray(), True
    block = first or file.read(_BLOCK)
    while block:
        if not text and b"\0" in block:
            raise IrregularError("it holds zero bytes, which no text does. Give a CSV file")
        in_first_line = in_first_line and b"\n" not in block and b"\r" not in block
        text += block
        if in_first_line and len(text) > _LONGEST:
            raise IrregularError(
                f"its first line is longer than {_LONGEST >> 20} MiB. Give a CSV file"
            )
        if endless and len(text) > _MOST:
            raise IrregularError(
                f"more than {_MOST >> 20} MiB come out of it, and it is no regular file. Copy what "
                "it holds to a file, and name that"
            )
        block = file.read(_BLOCK)
    return bytes(text)


def release_pages(*tensors: Tensor) -> None:
    """Returns the pages of tensors that are mapped from files to the system.

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
        if tensor.nbytes >= _LARGE and tensor.device.type == "cpu" and tensor.is_contiguous()
    ]
    advise = _madvise() if ranges else None
    if advise is None:
        return
    page = mmap.PAGESIZE
    files = sorted((m.start, m.stop) for m in mapped_regions())
    for first, last in ranges:
        # Pages that are shared with a neighbour are kept.
        start, stop = -(-first // page) * page, last // page * page
        i = bisect_right(files, (start, sys.maxsize)) - 1
        if i >= 0 and start < stop <= files[i][1]:
            advise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)


def is_mapped(tensor: Tensor) -> bool:
    """Tells whether `release_pages` would have an effect on a tensor.

    Args:
        tensor: The tensor.

    Returns:
        Whether it is large, and lies in memory that is mapped from a file.
    """
    if tensor.nbytes < _LARGE or tensor.device.type != "cpu":
        return False
    return any(m.start <= tensor.data_ptr() < m.stop for m in mapped_regions())


class MappedRegion(NamedTuple):
    """Memory that is mapped from a file.

    Attributes:
        start: Its first address.
        stop: The address behind its last.
        offset: Where in the file it begins.
        path: The file.
    """

    start: int
    stop: int
    offset: int
    path: str


def mapped_regions() -> Iterator[MappedRegion]:
    """Lists the memory of this process that is mapped from files.

    Yields:
        Each region; nothing on other systems than Linux.
    """
    with contextlib.suppress(OSError):
        for line in os.fsdecode(Path("/proc/self/maps").read_bytes()).split("\n"):
            addresses, _, offset, _, inode, *path = [*line.split(maxsplit=5), *[""] * 5][:6]
            if inode not in {"0", ""}:
                start, stop = addresses.split("-")
                yield MappedRegion(int(start, 16), int(stop, 16), int(offset, 16), "".join(path))


def _open(path: Path) -> BufferedReader:
    flags = os.O_RDONLY
    for name in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, name, 0)
    number = os.open(path, flags)
    try:
        return os.fdopen(number, "rb")
    except OSError:  # a folder
        os.close(number)
        raise


def _require_regular(mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "something else")
        cure = "Write what comes out of it to a file, and name that"
        raise IrregularError(
            f"it is {kind} and no regular file. {cure if stat.S_ISFIFO(mode) else 'Name a file'}"
        )


@functools.cache
def _madvise() -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    try:
        advise: Callable[..., int] = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    return advise
