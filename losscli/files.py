"""Regular files and pipes.

Reading does not block on a FIFO and refuses devices. Errors are an OSError, so that each caller can
add the name of the file. Creating never overwrites a file.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Iterator
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any, BinaryIO

from losscli.errors import LosscliError

__all__ = [
    "IrregularError",
    "create",
    "open_regular",
    "read_object",
    "read_pipe",
    "read_regular",
    "read_text",
    "refuse_placeholder",
    "walk",
]

# The largest table from a pipe and the longest first line, in bytes. The largest tables are planes,
# with about 60 bytes per point and split.
_MOST = 256 << 20
_LONGEST = 1 << 20
_BLOCK = 1 << 16

_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class IrregularError(OSError):
    """The file is not a regular file, or its content is too long.

    Args:
        what: The problem and its fix.
    """

    def __init__(self, what: str) -> None:
        super().__init__(errno.EINVAL, what)

    def __str__(self) -> str:
        return str(self.strerror)


def create(path: Path) -> FileIO:
    """Creates a file; fails if the path exists, also as a link.

    Args:
        path: The path.

    Returns:
        The file, opened for reading and writing.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    for name in ("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, name, 0)
    return FileIO(os.open(path, flags, 0o666), "r+b")


def open_regular(path: Path) -> BufferedReader:
    """Opens a regular file for reading; does not block on a FIFO.

    Args:
        path: The path of the file or of a link to it.

    Returns:
        The file.

    Raises:
        IrregularError: The path is a pipe, a socket or a device.
        IsADirectoryError: The path is a folder.
        OSError: The file cannot be opened.
    """
    _require_regular(path.stat().st_mode)  # opening a device may have effects
    file = _open(path)
    try:
        _require_regular(os.fstat(file.fileno()).st_mode)
    except OSError:
        file.close()
        raise
    return file


def read_regular(path: Path) -> bytes:
    """Reads a regular file.

    Args:
        path: The path of the file or of a link to it.

    Returns:
        The content.
    """
    with open_regular(path) as file:
        return file.read()


def read_object(path: Path) -> dict[str, Any]:
    """Reads the JSON object in a regular file; ``{}`` if the file is missing or has none."""
    try:
        content = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def walk(
    folder: Path, onerror: Callable[[OSError], object] | None = None
) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walks a folder as `os.walk` does, through links, without hidden folders.

    Args:
        folder: The folder.
        onerror: Called with the error of a folder that cannot be read, which is left out.

    Yields:
        Each folder, the names of the folders in it, and those of the files in it.
    """
    for parent, folders, files in os.walk(folder, onerror=onerror, followlinks=True):
        resolved = Path(parent).resolve()
        folders[:] = [
            name
            for name in folders
            # A link to one of its parents would be followed forever.
            if name[0] != "." and not resolved.is_relative_to(Path(parent, name).resolve())
        ]
        yield parent, folders, files


def refuse_placeholder(path: Path, name: str, error: type[LosscliError]) -> None:
    """Refuses a placeholder for a file that was not downloaded: a Git LFS pointer or HTML.

    Args:
        path: The file.
        name: Its name in the error.
        error: The kind of error that is raised.
    """
    try:
        with open_regular(path) as file:
            start = file.read(512).lstrip().lower()
    except OSError:
        return
    if start.startswith(b"version https://git-lfs"):
        raise error(
            f"{name} is a pointer of Git LFS, not the file itself",
            f"Fetch the file: git lfs pull --include {path.name}",
        ) from None
    if start.startswith((b"<!doctype html", b"<html")):
        raise error(
            f"{name} is an HTML page, not the file itself",
            "Download the file itself, not the page that shows it",
        ) from None


def read_pipe(path: Path) -> bytes:
    """Reads a table as text from a regular file or a pipe.

    Args:
        path: The path, such as ``/dev/fd/63`` of a shell's ``<(…)``.

    Returns:
        The content.

    Raises:
        IrregularError: No process writes to the pipe, or the content is not text of a table.
        IsADirectoryError: The path is a folder.
    """
    with _open(path) as file:
        mode = os.fstat(file.fileno()).st_mode
        first = b""
        if stat.S_ISFIFO(mode):
            try:
                first = os.read(file.fileno(), _BLOCK)
            except BlockingIOError:
                pass  # a writer has opened the pipe but not written yet
            else:
                if not first:
                    raise IrregularError(
                        "it is a pipe with no writer. Start the writer first, or write the data to "
                        "a file and give that"
                    )
            os.set_blocking(file.fileno(), True)
        return read_text(file, first)


def read_text(file: BinaryIO, first: bytes = b"") -> bytes:
    """Reads a table as text, with a size limit unless the file is regular.

    Args:
        file: The file, or stdin.
        first: Bytes that were already read from it.

    Returns:
        The content.

    Raises:
        IrregularError: The content has zero bytes, its first line is too long, or it is too large.
    """
    try:
        limited = not stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    except OSError:  # an in-memory file
        limited = False
    text, in_first_line = bytearray(), True
    block = first or file.read(_BLOCK)
    while block:
        if not text and b"\0" in block:
            raise IrregularError("it contains NUL bytes, so it is not a text file. Give a CSV file")
        in_first_line = in_first_line and b"\n" not in block and b"\r" not in block
        text += block
        if in_first_line and len(text) > _LONGEST:
            raise IrregularError(
                f"its first line is longer than {_LONGEST >> 20} MiB. Give a CSV file"
            )
        if limited and len(text) > _MOST:
            raise IrregularError(
                f"it is not a regular file and gives more than {_MOST >> 20} MiB. Write the data "
                "to a file and give that"
            )
        block = file.read(_BLOCK)
    return bytes(text)


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
        cure = "Write its output to a file and give that"
        raise IrregularError(
            f"it is {kind}, not a regular file. {cure if stat.S_ISFIFO(mode) else 'Name a file'}"
        )
