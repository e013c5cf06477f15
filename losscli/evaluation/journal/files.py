"""Locked files, and writes that survive a loss of power."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from losscli.errors import OutputError, printable
from losscli.evaluation.journal.frames import holder

__all__ = [
    "explained",
    "is_at",
    "lock",
    "open_regular",
    "set_aside",
    "sync",
    "sync_folder",
]

_BUSY = {errno.EAGAIN, errno.EACCES, errno.EDEADLK}
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


def _flags() -> int:
    # Does not follow links, block on a FIFO or translate newlines.
    flags = os.O_RDWR | os.O_CREAT
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, name, 0)
    return flags


def open_regular(path: Path) -> FileIO:
    """Opens a regular file for reading and writing, or creates it.

    Returns:
        The file.

    Raises:
        OutputError: It is a link, a folder or a FIFO.
        OSError: It cannot be opened.
    """
    kinds = {
        stat.S_ISLNK: "a symbolic link",
        stat.S_ISDIR: "a folder",
        stat.S_ISFIFO: "a pipe",
        stat.S_ISREG: "",
    }
    with contextlib.suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        kind = next((name for test, name in kinds.items() if test(mode)), "not a regular file")
        if kind:
            raise OutputError(
                f"{_named(path)} is {kind}, but a run's journal must be a regular file",
                "Remove it, or choose another --out",
            )
    file = FileIO(os.open(path, _flags(), 0o666), "r+b")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OutputError(f"{_named(path)} is not a regular file", "Choose another --out")
    return file


def is_at(file: FileIO, path: Path) -> bool:
    """Whether a path still names an open file, and not one that replaced it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except FileNotFoundError:
        return False


def lock(file: FileIO, path: Path) -> bool:
    """Locks a file until it is closed or the process ends.

    Returns:
        Whether it is locked; False if the file system has no locks.

    Raises:
        OutputError: Another run holds the lock.
        OSError: The system fails in another way.
    """
    # On NFS, Linux turns this into a lock of the server, which works across machines.
    try:
        _lock_now(file.fileno())
    except OSError as error:
        if error.errno in _BUSY:
            raise OutputError(
                f"{_named(path)} is in use by another run{holder(file)} that writes the same "
                "results",
                "Wait for that run to end, or choose another --out",
            ) from None
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def set_aside(path: Path) -> str:
    """Renames a file that losscli did not write.

    Returns:
        A note.

    Raises:
        OutputError: The new name is taken.
    """
    other = path.with_name(f"{path.name}.old")
    if os.path.lexists(other):
        raise OutputError(
            f"{_named(path)} is not a journal of losscli and cannot be renamed to "
            f"{_named(other)}, which exists",
            "Move one of them away, or choose another --out",
        )
    path.rename(other)
    return f"it was not a journal of losscli and was renamed to {_named(other)}"


if sys.platform == "win32":
    import msvcrt

    def _lock_now(number: int) -> None:
        # Others cannot read locked bytes; no journal extends to these.
        os.lseek(number, 1 << 62, os.SEEK_SET)
        msvcrt.locking(number, msvcrt.LK_NBLCK, 1)
        os.lseek(number, 0, os.SEEK_SET)

else:
    import fcntl

    def _lock_now(number: int) -> None:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)


def sync(file: FileIO) -> None:
    """Flushes a file to the disk, so that it survives a loss of power."""
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flushes a folder to the disk, so that a rename in it survives a loss of power."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        # Some file systems write folders at once and do not support this.
        if error.errno not in _NO_LOCKS:
            raise
    finally:
        os.close(number)


def _named(path: Path) -> str:
    return printable(str(path))


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns errors of the operating system for a file into an `OutputError` with advice."""
    try:
        yield
    except OSError as error:
        what = f"{_named(path)} cannot be written: {error.strerror}"
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            cure = "Make room"
        else:
            cure = "Choose another --out"
        raise OutputError(what, cure) from None
