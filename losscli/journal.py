"""The journal of a run: what it has finished, so that it goes on where it was broken off.

A file beside the results, STEM.journal, that only ever grows::

    losscli journal 1       the magic, and a newline: 18 bytes
    PID HOST                who holds it, for the eyes of another run: 110 bytes, under no seal
    frame                   the head: the identity of the run, and what went into that
    frame                   a record: its key and its arrays
    …

A frame is the length of its body (8 bytes, little-endian), the body, and a seal of 32 bytes: the
SHA-256 of the seal before it, the length and the body. So a frame is whole, and stands behind those
that it was written behind, or it does not count, and neither does what comes after it. Zeros, which
a file system may leave where it lost power, are no frame. A body is the length of a description
(4 bytes), the description in JSON, and the bytes of the arrays one after the other.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import socket
import stat
import sys
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from losscli.errors import OutputError, printable

__all__ = ["Journal", "differences"]

_NAME = b"losscli journal "
_MAGIC = _NAME + b"1\n"
_HOLDER = 110
_FIRST = len(_MAGIC) + _HOLDER
_SEAL = 32
_LENGTH = 8
_DESCRIPTION = 4

# So much is read or written at once.
_PIECE = 1 << 22

_TYPE = re.compile(r"[<>|][biufc]\d{1,2}")
_CONTENT = re.compile(r"[0-9a-f]{64}")

# A longer value is not told.
_LONGEST = 60

_BUSY = {errno.EAGAIN, errno.EACCES, errno.EDEADLK}
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class _Array(NamedTuple):
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class _Frame:
    """A frame that is whole.

    Attributes:
        start: Its first byte.
        length: Of its body.
        before: The seal of the frame before.
        seal: Its own.
        description: What it is said to hold.
        room: The bytes that its arrays have.
    """

    start: int
    length: int
    before: bytes
    seal: bytes
    description: Mapping[str, Any]
    room: int

    @property
    def end(self) -> int:
        return self.start + _LENGTH + self.length + _SEAL

    def arrays(self) -> tuple[_Array, ...]:
        """Reads the description of a record.

        Returns:
            Its arrays.

        Raises:
            ValueError: It does not describe what is there.
        """
        arrays = []
        for name, kind, shape in self.description["arrays"]:
            if not _TYPE.fullmatch(kind) or not all(type(n) is int and n >= 0 for n in shape):
                raise ValueError(kind)
            arrays.append(_Array(name, np.dtype(kind), tuple(shape)))
        if sum(array.nbytes for array in arrays) != self.room:
            raise ValueError(self.room)
        return tuple(arrays)


class Journal:
    """What a run has finished, on the disk; made by `Journal.open`.

    A journal is held by one run at a time: others are refused until it is closed or its process
    has ended, in whatever way. Nothing is written but the holder's name before there is a first
    record: a command that fails before that leaves an older journal as it was.

    Attributes:
        path: The file.
        anew: Why what was in the file is not gone on with; None where it is, or nothing was.
        changes: What is told otherwise than by the run that began the journal, each in words.
        cut: The bytes of broken or half-written records that were cut off.
        locked: Whether other runs are kept out; False where the file system has no locks.
        skipped: How much of what progress counts was recalled: whoever recalls it adds to it.
    """

    path: Path
    anew: str | None
    changes: tuple[str, ...]
    cut: int
    locked: bool
    skipped: float

    def __init__(self, path: Path, file: FileIO, head: Mapping[str, Any], *, locked: bool) -> None:
        self.path = path
        self.anew = None
        self.changes = ()
        self.cut = 0
        self.locked = locked
        self.skipped = 0.0
        self._file = file
        self._head = head
        self._index: dict[str, tuple[_Frame, tuple[_Array, ...]]] = {}
        # The last whole frame: behind it the next one goes. None before there is a head.
        self._last: _Frame | None = None
        # Whether what is there is of some other run, and stays until this one has a record.
        self._foreign = False
        _HELD.add(self)

    @classmethod
    def open(cls, stem: Path, identity: str, told: Mapping[str, Any]) -> Self:
        """Opens the journal of a run, or begins one.

        Args:
            stem: That of the results: the journal is ``STEM.journal``.
            identity: A digest of all that settles the numbers: records of another identity are
                never recalled.
            told: What the user may know of it, by names that make sense in a sentence, such as
                ``--limit``; made of JSON's types. A digest of a content is written as 64
                hexadecimal digits. It may tell more than goes into the identity.

        Returns:
            The journal, held until it is closed.

        Raises:
            OutputError: Another run holds it, or the file cannot be read or written, or is no
                regular file.
        """
        path = stem.with_name(f"{stem.name}.journal")
        head = {"identity": identity, "told": json.loads(json.dumps(told))}
        aside = None
        with _told(path):
            while True:
                file = _open_regular(path)
                try:
                    locked = _lock(file, path)
                    # It may have been removed or replaced before the lock was had.
                    if _is_at(file, path):
                        if _is_journal(file):
                            journal = cls(path, file, head, locked=locked)
                            journal._read()
                            journal.anew = journal.anew or aside
                            return journal
                        aside = _set_aside(path)
                except BaseException:
                    file.close()
                    raise
                file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """The number of keys that are recalled."""
        return len(self._index)

    def recall(self, key: str) -> dict[str, NDArray[Any]] | None:
        """Recalls what was recorded, by this run or by the one that was broken off.

        Args:
            key: Of the record; of several the last.

        Returns:
            The arrays, to the bit; None where there is no such record.
        """
        if key not in self._index:
            return None
        frame, described = self._index[key]
        found = {}
        try:
            self._file.seek(frame.start)
            seal = hashlib.sha256(frame.before)
            for piece in _pieces(self._file, _LENGTH + frame.length - frame.room):
                seal.update(piece)
            for array in described:
                found[array.name] = np.empty(array.shape, array.dtype)
                content = _bytes(found[array.name])
                _fill(self._file, content)
                seal.update(content)
            if seal.digest() == frame.seal:
                return found
        except (OSError, ValueError):
            pass
        # It was whole when the journal was opened; what has become of it is evaluated anew.
        del self._index[key]
        return None

    def record(self, key: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Records what was evaluated; once this returns, it survives a loss of power.

        Args:
            key: What tells it from all else that this run evaluates.
            arrays: Arrays of numbers by name.

        Raises:
            OutputError: The disk is full, or cannot be written to; what was recorded before stays.
        """
        with _told(self.path):
            if self._last is None:
                self._begin()
            assert self._last is not None
            described = tuple(_Array(n, a.dtype, a.shape) for n, a in arrays.items())
            description = {"key": key, "arrays": [(n, d.str, s) for n, d, s in described]}
            start = self._last.end
            try:
                frame = _write(self._file, start, self._last.seal, description, arrays)
                _sync(self._file)
            except BaseException:
                # What is half written would be found out, but takes room that may be needed.
                with contextlib.suppress(OSError):
                    self._file.truncate(start)
                raise
            self._last = frame
            self._index[key] = frame, described

    def finish(self) -> None:
        """Removes the journal, since the results stand; and lets go of it."""
        if sys.platform != "win32":
            # The results have to be there after a loss of power too.
            with contextlib.suppress(OSError):
                _sync_folder(self.path.parent)
        self._close(remove=True)
        self._index.clear()

    def close(self) -> None:
        """Lets go of the journal; it stays where it is if there is anything in it."""
        self._close(remove=self._last is None and not self._foreign)

    def _close(self, *, remove: bool) -> None:
        if self._file.closed:
            return
        with contextlib.suppress(OSError):
            if remove and _is_at(self._file, self.path):
                if sys.platform == "win32":
                    self._file.close()  # what is open cannot be removed there
                self.path.unlink()
        self._file.close()
        _HELD.discard(self)

    def _read(self) -> None:
        """Reads the index, and cuts off what is broken."""
        size = os.fstat(self._file.fileno()).st_size
        self._file.seek(0)
        magic = _take(self._file, min(size, len(_MAGIC)))
        if magic != _MAGIC and magic.startswith(_NAME) and len(magic) == len(_MAGIC):
            self.anew = "it was written by another version of losscli"
            self._foreign = True
            return
        self._read_frames(size)
        if self._last is None and not self._foreign:
            self._file.truncate(0)
        _sign(self._file)

    def _read_frames(self, size: int) -> None:
        frames = _frames(self._file, size)
        head = next(frames, None)
        told = {} if head is None else head.description.get("told")
        if head is None or not isinstance(told, dict):
            self.anew = "its beginning is damaged" if size > _FIRST else None
            return
        self.changes = tuple(differences(told, self._head["told"]))
        if head.description.get("identity") != self._head["identity"]:
            self.anew = "; ".join(self.changes) or "it is of another run"
            self._foreign = True
            return
        self._last = head
        for frame in frames:
            try:
                self._index[frame.description["key"]] = frame, frame.arrays()
            except (ValueError, TypeError, KeyError):
                break
            self._last = frame
        self.cut = size - self._last.end
        if self.cut:
            self._file.truncate(self._last.end)
            _sync(self._file)

    def _begin(self) -> None:
        """Writes the head, to a new file that then takes the place of the old one."""
        if sys.platform == "win32":
            self._file.truncate(0)  # what is open cannot be replaced there
            file = self._file
        else:
            # Who holds the journal has this name for itself too; a run that was killed may have
            # left one.
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            temporary.unlink(missing_ok=True)
            file = FileIO(os.open(temporary, _flags() | os.O_EXCL, 0o666), "r+b")
        try:
            _sign(file)
            frame = _write(file, _FIRST, _first_seal(), self._head, {})
            _sync(file)
            if file is not self._file:
                # Held before anybody can find it.
                self.locked = _lock(file, self.path)
                temporary.replace(self.path)
                _sync_folder(self.path.parent)
        except BaseException:
            if file is not self._file:
                file.close()
                temporary.unlink(missing_ok=True)
            raise
        if file is not self._file:
            self._file, file = file, self._file
            file.close()
        self._last, self._foreign = frame, False


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Says in words what two runs were told otherwise.

    Args:
        before: What the earlier one was told, by name.
        now: What the later one was told.

    Returns:
        For each difference a part of a sentence, such as ``--limit was 100 and is 200``.
    """
    told = []
    for name in dict.fromkeys([*before, *now]):
        was, is_ = (json.dumps(side.get(name), sort_keys=True) for side in (before, now))
        if was == is_ and (name in before) == (name in now):
            continue
        one, other = (_value(side.get(name)) for side in (before, now))
        label = printable(name)
        if name not in now:
            told.append(f"{label} is no longer there")
        elif name not in before:
            told.append(f"{label} was not there")
        elif all(_CONTENT.fullmatch(str(side[name])) for side in (before, now)):
            told.append(f"{label} was changed since")
        elif max(len(one), len(other)) > _LONGEST:
            told.append(f"{label} is not what it was")
        else:
            told.append(f"{label} was {one} and is {other}")
    return told


def _value(value: Any) -> str:
    if value is None:
        return "not given"
    if isinstance(value, str):
        return printable(value)
    return printable(json.dumps(value, ensure_ascii=False, sort_keys=True))


def _frames(file: FileIO, size: int) -> Iterator[_Frame]:
    """Reads the whole frames, up to the first that is not."""
    start, before = _FIRST, _first_seal()
    while size - start >= _LENGTH + _DESCRIPTION + _SEAL:
        file.seek(start)
        number = _take(file, _LENGTH)
        length = int.from_bytes(number, "little")
        # No more is read, let alone allocated, than there is.
        if not _DESCRIPTION <= length <= size - start - _LENGTH - _SEAL:
            return
        seal = hashlib.sha256(before + number)
        for piece in _pieces(file, length):
            seal.update(piece)
        if seal.digest() != _take(file, _SEAL):
            return
        file.seek(start + _LENGTH)
        told = int.from_bytes(_take(file, _DESCRIPTION), "little")
        room = length - _DESCRIPTION - told
        try:
            description = json.loads(_take(file, told)) if room >= 0 else None
        except (ValueError, RecursionError):
            return
        if not isinstance(description, dict):
            return
        frame = _Frame(start, length, before, seal.digest(), description, room)
        yield frame
        start, before = frame.end, frame.seal


def _write(
    file: FileIO,
    start: int,
    before: bytes,
    description: Mapping[str, Any],
    arrays: Mapping[str, NDArray[Any]],
) -> _Frame:
    """Writes a frame. Of the arrays no copy is made but of strided ones, one at a time."""
    for name, array in arrays.items():
        if not _TYPE.fullmatch(array.dtype.str):
            raise ValueError(f"{name} is of {array.dtype}, which is not of numbers")
    told = json.dumps(description).encode("ascii")
    room = sum(array.nbytes for array in arrays.values())
    length = _DESCRIPTION + len(told) + room
    number = length.to_bytes(_LENGTH, "little")
    seal = hashlib.sha256(before)
    file.seek(start)
    # Whatever is behind is of a record whose writing was stopped.
    file.truncate(start)
    for part in (number, len(told).to_bytes(_DESCRIPTION, "little"), told):
        seal.update(part)
        _put(file, memoryview(part))
    for array in arrays.values():
        content = _bytes(np.asarray(array, order="C"))
        for at in range(0, len(content), _PIECE):
            piece = content[at : at + _PIECE]
            seal.update(piece)
            _put(file, piece)
    _put(file, memoryview(seal.digest()))
    return _Frame(start, length, before, seal.digest(), description, room)


def _is_journal(file: FileIO) -> bool:
    """Whether losscli wrote a file: it has the magic, or is what is left of its first line."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    first = _take(file, min(size, _FIRST))
    if size <= _FIRST and not any(first):
        return True
    return first.startswith(_NAME) or _MAGIC.startswith(first)


def _set_aside(path: Path) -> str:
    """Gives a file that losscli did not write another name; returns what to tell of that."""
    other = path.with_name(f"{path.name}.old")
    if os.path.lexists(other):
        raise OutputError(
            f"{_named(path)} is no journal of losscli", "Move it away, or choose another --out"
        )
    path.rename(other)
    return f"it was no journal of losscli, and is now {_named(other)}"


def _bytes(array: NDArray[Any]) -> memoryview:
    """The memory of a contiguous array."""
    return array.reshape(-1).view(np.uint8).data


def _take(file: FileIO, number: int) -> bytes:
    room = bytearray(number)
    _fill(file, memoryview(room))
    return bytes(room)


def _pieces(file: FileIO, number: int) -> Iterator[memoryview]:
    """Reads so many bytes, a piece at a time, all into the same memory."""
    room = memoryview(bytearray(min(number, _PIECE)))
    while number:
        piece = room[: min(number, _PIECE)]
        _fill(file, piece)
        number -= len(piece)
        yield piece


def _fill(file: FileIO, room: memoryview) -> None:
    while room:
        number = file.readinto(room)
        if not number:
            raise OSError(errno.EIO, "it ends too early")
        room = room[number:]


def _put(file: FileIO, content: memoryview) -> None:
    while content:
        # On a disk that is nearly full, less may be written than is given.
        content = content[file.write(content) :]


def _first_seal() -> bytes:
    return hashlib.sha256(_MAGIC).digest()


def _sign(file: FileIO) -> None:
    """Writes who holds the file; others read it where they are refused."""
    text = f"{os.getpid()} {socket.gethostname()}".encode("ascii", "replace")
    file.seek(0)
    _put(file, memoryview(_MAGIC + text[: _HOLDER - 1].ljust(_HOLDER - 1) + b"\n"))


def _holder(file: FileIO) -> str:
    """Says who holds a file, as far as it tells."""
    try:
        file.seek(len(_MAGIC))
        text = (file.read(_HOLDER) or b"").decode("ascii", "replace").split()
    except OSError:
        text = []
    if len(text) != 2 or not text[0].isdigit():
        return ""
    pid, host = text
    if host != socket.gethostname():
        return f" (process {pid} on {printable(host)})"
    return " (this process)" if int(pid) == os.getpid() else f" (process {pid})"


def _flags() -> int:
    # No link is followed, no reader of a pipe waited for, and no newline translated.
    flags = os.O_RDWR | os.O_CREAT
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, name, 0)
    return flags


def _open_regular(path: Path) -> FileIO:
    kinds = {
        stat.S_ISLNK: "a symbolic link",
        stat.S_ISDIR: "a folder",
        stat.S_ISFIFO: "a pipe",
        stat.S_ISREG: "",
    }
    with contextlib.suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        kind = next((name for test, name in kinds.items() if test(mode)), "no regular file")
        if kind:
            raise OutputError(
                f"{_named(path)} is {kind}, and a run's journal has to be a file of its own",
                "Remove it, or choose another --out",
            )
    file = FileIO(os.open(path, _flags(), 0o666), "r+b")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OutputError(f"{_named(path)} is no regular file", "Choose another --out")
    return file


def _is_at(file: FileIO, path: Path) -> bool:
    """Whether an open file is the one that a path names."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except FileNotFoundError:
        return False


def _lock(file: FileIO, path: Path) -> bool:
    """Keeps other runs out, and says whether that worked: some file systems have no locks."""
    # On NFS, Linux makes a lock of the server's of it, which holds between machines too.
    try:
        _lock_now(file.fileno())
    except OSError as error:
        if error.errno in _BUSY:
            raise OutputError(
                f"{_named(path)} is held by another run{_holder(file)}, which writes the same "
                "results",
                "Wait for that run to end, or choose another --out",
            ) from None
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


if sys.platform == "win32":
    import msvcrt

    def _lock_now(number: int) -> None:
        # Locked bytes cannot be read by others; these are ones that no journal reaches.
        os.lseek(number, 1 << 62, os.SEEK_SET)
        msvcrt.locking(number, msvcrt.LK_NBLCK, 1)
        os.lseek(number, 0, os.SEEK_SET)

else:
    import fcntl

    def _lock_now(number: int) -> None:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _sync(file: FileIO) -> None:
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a loss of power."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        # Some file systems keep no folders back that they would have to write.
        if error.errno not in _NO_LOCKS:
            raise
    finally:
        os.close(number)


def _named(path: Path) -> str:
    return printable(str(path))


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Says what the operating system does not let be done, and what helps."""
    try:
        yield
    except OSError as error:
        what = f"{_named(path)} cannot be written: {error.strerror}"
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            cure = "Make room"
        else:
            cure = "Choose another --out"
        raise OutputError(what, cure) from None


# A forked child, such as a worker that reads data, has the journal too, and with it the lock. It
# must not keep that from the next run when its parent is gone.
_HELD: weakref.WeakSet[Journal] = weakref.WeakSet()


def _let_go() -> None:
    for journal in list(_HELD):
        journal._file.close()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_let_go)
