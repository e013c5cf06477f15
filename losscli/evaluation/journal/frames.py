"""The file format of a journal: a chain of frames, each with a checksum.

The file STEM.journal is in the folder of the results and is only appended to::

    losscli journal 1       magic bytes and a newline: 18 bytes
    PID HOST                the process that holds it, for messages of other runs: 110 bytes,
                            not part of any checksum
    frame                   the head: the identity of the run and its conditions
    frame                   a record: its key and its arrays
    …

A frame is the length of its body (8 bytes, little-endian), the body, and a seal of 32 bytes: the
SHA-256 of the previous seal, the length and the body. So a frame is valid only if it is complete
and follows the frames that it was written after. Reading stops at the first invalid frame. Zeros,
which a file system may leave after a loss of power, are not a valid frame. A body is the length of
a description (4 bytes), the description in JSON, and the bytes of the arrays.
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
    "write",
    "write_header",
]

_NAME = b"losscli journal "
_MAGIC = _NAME + b"1\n"
_HOLDER = 110
FIRST = len(_MAGIC) + _HOLDER
_SEAL = 32
_LENGTH = 8
_DESCRIPTION = 4

# Bytes that are read or written at once.
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
    """A valid frame.

    Attributes:
        start: The offset of its first byte.
        length: The length of its body.
        before: The seal of the previous frame.
        seal: Its seal.
        description: Its description.
        room: The number of bytes of its arrays.
    """

    start: int
    length: int
    before: bytes
    seal: bytes
    description: Mapping[str, Any]
    room: int

    @property
    def end(self) -> int:
        """The offset of the first byte after it."""
        return self.start + _LENGTH + self.length + _SEAL

    def arrays(self) -> tuple[_Array, ...]:
        """Reads the types and shapes of the arrays from the description.

        Returns:
            The arrays, without their values.

        Raises:
            ValueError: The description does not match the bytes.
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
    """Whether a file starts with the magic bytes, or is a truncated or zeroed beginning."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    first = _take(file, min(size, FIRST))
    if size <= FIRST and not any(first):
        return True
    return first.startswith(_NAME) or _MAGIC.startswith(first)


def is_of_another_version(file: FileIO, size: int) -> bool:
    """Whether a journal of ``size`` bytes has the format of another version of losscli."""
    file.seek(0)
    magic = _take(file, min(size, len(_MAGIC)))
    return magic != _MAGIC and magic.startswith(_NAME) and len(magic) == len(_MAGIC)


def write_header(file: FileIO) -> None:
    """Writes the magic bytes and the process that holds the journal."""
    text = f"{os.getpid()} {socket.gethostname()}".encode("ascii", "replace")
    file.seek(0)
    _put(file, memoryview(_MAGIC + text[: _HOLDER - 1].ljust(_HOLDER - 1) + b"\n"))


def holder(file: FileIO) -> str:
    """Describes the process that holds a journal: `` (process 12 on node3)``, or an empty text."""
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
    """Returns the seal that precedes the first frame."""
    return hashlib.sha256(_MAGIC).digest()


def frames(file: FileIO, size: int) -> Iterator[Frame]:
    """Reads frames up to the first invalid one.

    Args:
        file: The journal.
        size: Its size in bytes.

    Yields:
        The frames, without the values of their arrays.
    """
    start, before = FIRST, first_seal()
    while size - start >= _LENGTH + _DESCRIPTION + _SEAL:
        file.seek(start)
        number = _take(file, _LENGTH)
        length = int.from_bytes(number, "little")
        # Neither reads nor allocates more than the file has.
        if not _DESCRIPTION <= length <= size - start - _LENGTH - _SEAL:
            return
        seal = hashlib.sha256(before + number)
        for piece in _pieces(file, length):
            seal.update(piece)
        if seal.digest() != _take(file, _SEAL):
            return
        file.seek(start + _LENGTH)
        described = int.from_bytes(_take(file, _DESCRIPTION), "little")
        room = length - _DESCRIPTION - described
        try:
            description = json.loads(_take(file, described)) if room >= 0 else None
        except (ValueError, RecursionError):
            return
        if not isinstance(description, dict):
            return
        frame = Frame(start, length, before, seal.digest(), description, room)
        yield frame
        start, before = frame.end, frame.seal


def read(file: FileIO, frame: Frame) -> dict[str, NDArray[Any]] | None:
    """Reads the arrays of a record.

    Returns:
        The arrays; None if the frame is no longer valid.

    Raises:
        OSError: It cannot be read.
        ValueError: The frame is not a record of arrays.
    """
    arrays = {}
    file.seek(frame.start)
    seal = hashlib.sha256(frame.before)
    for piece in _pieces(file, _LENGTH + frame.length - frame.room):
        seal.update(piece)
    for array in frame.arrays():
        arrays[array.name] = np.empty(array.shape, array.dtype)
        content = _bytes(arrays[array.name])
        _fill(file, content)
        seal.update(content)
    return arrays if seal.digest() == frame.seal else None


def write(
    file: FileIO,
    start: int,
    before: bytes,
    description: Mapping[str, Any],
    arrays: Mapping[str, NDArray[Any]],
) -> Frame:
    """Writes a frame. Only non-contiguous arrays are copied, one at a time.

    Args:
        file: The journal.
        start: The offset of the frame. The file is truncated there first.
        before: The seal of the previous frame.
        description: The description.
        arrays: The arrays.

    Returns:
        The frame.

    Raises:
        ValueError: An array is not numeric.
    """
    for name, array in arrays.items():
        if not _TYPE.fullmatch(array.dtype.str):
            raise ValueError(f"{name} is of {array.dtype}, which is not of numbers")
    text = json.dumps(description).encode("ascii")
    room = sum(array.nbytes for array in arrays.values())
    length = _DESCRIPTION + len(text) + room
    number = length.to_bytes(_LENGTH, "little")
    seal = hashlib.sha256(before)
    file.seek(start)
    # Remove the rest of a record that was not written completely.
    file.truncate(start)
    for part in (number, len(text).to_bytes(_DESCRIPTION, "little"), text):
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
    """Reads bytes piece by piece into the same buffer."""
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
        # Less may be written than requested if the disk is nearly full.
        content = content[file.write(content) :]
