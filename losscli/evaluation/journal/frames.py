"""The file of a journal: bytes that are whole, or do not count.

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

import errno
import hashlib
import json
import math
import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from losscli.errors import printable

__all__ = [
    "FIRST",
    "Frame",
    "first_seal",
    "frames",
    "holder",
    "is_journal",
    "is_of_another_version",
    "read",
    "sign",
    "write",
]

_NAME = b"losscli journal "
_MAGIC = _NAME + b"1\n"
_HOLDER = 110
FIRST = len(_MAGIC) + _HOLDER
_SEAL = 32
_LENGTH = 8
_DESCRIPTION = 4

# So much is read or written at once.
_PIECE = 1 << 22

_TYPE = re.compile(r"[<>|][biufc]\d{1,2}")


class _Array(NamedTuple):
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class Frame:
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
        """The first byte behind it."""
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


def is_journal(file: FileIO) -> bool:
    """Tells a journal from what losscli did not write.

    Args:
        file: A file.

    Returns:
        Whether it has the magic, or is what is left of its first line.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    first = _take(file, min(size, FIRST))
    if size <= FIRST and not any(first):
        return True
    return first.startswith(_NAME) or _MAGIC.startswith(first)


def is_of_another_version(file: FileIO, size: int) -> bool:
    """Tells a journal whose frames are not understood.

    Args:
        file: A journal.
        size: Its bytes.

    Returns:
        Whether another version of losscli wrote it.
    """
    file.seek(0)
    magic = _take(file, min(size, len(_MAGIC)))
    return magic != _MAGIC and magic.startswith(_NAME) and len(magic) == len(_MAGIC)


def sign(file: FileIO) -> None:
    """Writes who holds a journal; others read it where they are refused.

    Args:
        file: The journal.
    """
    text = f"{os.getpid()} {socket.gethostname()}".encode("ascii", "replace")
    file.seek(0)
    _put(file, memoryview(_MAGIC + text[: _HOLDER - 1].ljust(_HOLDER - 1) + b"\n"))


def holder(file: FileIO) -> str:
    """Says who holds a journal, as far as it tells.

    Args:
        file: The journal.

    Returns:
        A part of a sentence, such as ``(process 12 on node3)`` behind a space, or nothing.
    """
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


def first_seal() -> bytes:
    """Seals the beginning of every journal.

    Returns:
        What the first frame is written behind.
    """
    return hashlib.sha256(_MAGIC).digest()


def frames(file: FileIO, size: int) -> Iterator[Frame]:
    """Reads the whole frames, up to the first that is not.

    Args:
        file: The journal.
        size: Its bytes.

    Yields:
        The frames, their arrays not read yet.
    """
    start, before = FIRST, first_seal()
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
        frame = Frame(start, length, before, seal.digest(), description, room)
        yield frame
        start, before = frame.end, frame.seal


def read(file: FileIO, frame: Frame) -> dict[str, NDArray[Any]] | None:
    """Reads a record.

    Args:
        file: The journal.
        frame: The record's.

    Returns:
        Its arrays; None where it is no longer what it was.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no record of arrays.
    """
    found = {}
    file.seek(frame.start)
    seal = hashlib.sha256(frame.before)
    for piece in _pieces(file, _LENGTH + frame.length - frame.room):
        seal.update(piece)
    for array in frame.arrays():
        found[array.name] = np.empty(array.shape, array.dtype)
        content = _bytes(found[array.name])
        _fill(file, content)
        seal.update(content)
    return found if seal.digest() == frame.seal else None


def write(
    file: FileIO,
    start: int,
    before: bytes,
    description: Mapping[str, Any],
    arrays: Mapping[str, NDArray[Any]],
) -> Frame:
    """Writes a frame. Of the arrays no copy is made but of strided ones, one at a time.

    Args:
        file: The journal.
        start: Where the frame begins: what is behind is cut off.
        before: The seal of the frame before.
        description: What the frame holds.
        arrays: The arrays that it holds.

    Returns:
        The frame.

    Raises:
        ValueError: An array is not one of numbers.
    """
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
    return Frame(start, length, before, seal.digest(), description, room)


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
