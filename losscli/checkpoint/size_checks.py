"""What files of torch claim of their own content, held against their size before it is believed.

torch takes room for as many numbers as the pickle in a file speaks of, and only then looks for them
in the file, if it looks at all.
"""

from __future__ import annotations

import io
import math
import mmap
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn, cast

import torch

from losscli.checkpoint.pickles import BrokenPickleError, load
from losscli.errors import one_line
from losscli.files import open_regular

__all__ = [
    "OLD_FORMAT",
    "AmbiguousError",
    "Fixed",
    "RepeatedError",
    "SizeError",
    "check_sizes",
]

OLD_FORMAT = 0x1950A86A20F9469CFC6C
"""The number with which files begin that torch wrote before version 1.6."""

# A tensor may repeat what it holds (stride 0): so many bytes more than are in the file.
_REPEATED = 16 << 20


class SizeError(BrokenPickleError):
    """A file claims to hold more than it does."""


class RepeatedError(SizeError):
    """A tensor repeats what it holds (stride 0), and is far larger than that."""


class AmbiguousError(BrokenPickleError):
    """Two readers of an archive may find different content under one name."""


class Fixed(type):
    """Keeps a pickle from setting attributes of the classes that it is given."""

    def __setattr__(cls, name: str, _value: object) -> NoReturn:
        raise TypeError(f"{cls.__name__}.{name} stays as it is")


class _Anything(metaclass=Fixed):
    """Stands for whatever a pickle names, and takes whatever it does to that."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass

    def extend(self, _: Any) -> None:
        pass

    def add(self, _: Any) -> None:
        pass


class _Storage:
    """The bytes behind a tensor: how many there are, and how many make one number."""

    __slots__ = ("itemsize", "nbytes")

    def __init__(self, nbytes: int, itemsize: float) -> None:
        self.nbytes, self.itemsize = nbytes, itemsize


class _Tensor(_Anything):
    def __new__(cls, *arguments: Any, **_: Any) -> Any:
        """Checks the claim of a tensor: an offset, sizes and strides in a storage."""
        if len(arguments) >= 4 and isinstance(arguments[0], _Storage):
            storage, offset, sizes, strides = arguments[:4]
            numbers = [offset, *sizes, *strides]
            if len(sizes) != len(strides) or not all(type(n) is int and n >= 0 for n in numbers):
                raise SizeError("a tensor has a shape of no whole numbers")
            if all(sizes):
                # Types without a storage of their own name themselves.
                types = (a.itemsize for a in arguments if isinstance(a, torch.dtype))
                itemsize = next(types, storage.itemsize)
                last = offset + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True)) + 1
                repeated = math.prod(sizes) * itemsize - storage.nbytes
                if last * itemsize <= storage.nbytes and repeated > _REPEATED:
                    raise RepeatedError(
                        f"a tensor of the shape {list(sizes)} that repeats the "
                        f"{storage.nbytes:,} bytes it holds"
                    )
                if last * itemsize > storage.nbytes:
                    raise SizeError(
                        f"a tensor of the shape {list(sizes)} in {storage.nbytes:,} bytes"
                    )
        return super().__new__(cls)


# Bytes of a number in the storages that pickles name; the last two pack several into a byte.
_SIZES: dict[str, float] = {
    "UntypedStorage": 1,
    **dict.fromkeys(("ByteStorage", "CharStorage", "BoolStorage", "QInt8Storage"), 1),
    **dict.fromkeys(("ShortStorage", "HalfStorage", "BFloat16Storage"), 2),
    **dict.fromkeys(("IntStorage", "FloatStorage", "QInt32Storage"), 4),
    **dict.fromkeys(("LongStorage", "DoubleStorage", "ComplexFloatStorage"), 8),
    "ComplexDoubleStorage": 16,
    "QUInt8Storage": 1,
    "QUInt4x2Storage": 1 / 2,
    "QUInt2x4Storage": 1 / 4,
}


_TYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class _Dictionary(dict[Any, Any], metaclass=Fixed):
    """Stands for those of collections, which state dicts are."""

    def __setstate__(self, _: Any) -> None:
        pass


class _Defaults(_Anything):
    def __new__(cls, *_: Any, **__: Any) -> Any:
        return _Dictionary()


_COLLECTIONS: dict[tuple[str, str], type] = {
    ("collections", "OrderedDict"): _Dictionary,
    ("collections", "Counter"): _Dictionary,
    ("collections", "defaultdict"): _Defaults,
}


class _Names(Mapping[tuple[str, str], Any]):
    """What stands for each name in a pickle: nothing of it is imported."""

    def __getitem__(self, key: tuple[str, str]) -> Any:
        module, name = key
        if module in {"torch", "torch.storage"} and name in _SIZES:
            return name  # a text has nothing that a pickle could call
        if module == "torch._utils" and name.startswith(("_rebuild_tensor", "_rebuild_qtensor")):
            return _Tensor
        if module == "torch" and name in _TYPES:
            return _TYPES[name]
        return _COLLECTIONS.get(key, _Anything)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __contains__(self, _: object) -> bool:
        return True


def check_sizes(file: Path | io.BytesIO | mmap.mmap) -> None:
    """Makes sure that a file of torch is as large as what it claims to hold.

    What is no such file passes: torch has a word on it.

    Args:
        file: An archive, or any such file in memory, left at its beginning.

    Raises:
        SizeError: It claims more.
        BrokenPickleError: The pickle in it is broken.
    """
    if isinstance(file, Path):
        with open_regular(file) as stream:
            _archive(stream)
        return
    magic = file.read(4)
    file.seek(0)
    if magic == b"PK\x03\x04":
        # zipfile asks more of a file than mapped memory has.
        _archive(file if isinstance(file, io.BytesIO) else io.BufferedReader(_Mapped(file)))
    else:
        _old(file)
    file.seek(0)


class _Mapped(io.RawIOBase):
    """Mapped memory as a file."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self._mapped, self._at = mapped, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = offset + (0, self._at, len(self._mapped))[whence]
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        piece = self._mapped[self._at : self._at + len(buffer)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


def _archive(file: IO[bytes]) -> None:
    size = file.seek(0, io.SEEK_END)
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise BrokenPickleError(f"its archive is broken ({error})") from None
    with archive:
        entries = archive.infolist()
        _require_one_directory(file, archive.start_dir, len(entries))
        records = _records(entries)
        # Of a program, which is refused as such, torch reads no more than the version.
        if b"constants.pkl" in (record.name for record in records):
            records = [record for record in records if record.folded in _VERSIONS]
        held: dict[bytes, int] = {}
        for record in records:
            entry = record.entry
            # torch compresses nothing, and maps what it reads as it lies in the file.
            packed = entry.compress_type != zipfile.ZIP_STORED
            if packed or entry.file_size != entry.compress_size:
                raise SizeError(f"its part {entry.filename!r} is compressed, as torch writes none")
            if entry.header_offset + entry.file_size > size:
                raise SizeError(f"its part {entry.filename!r} is of {entry.file_size:,} bytes")
            held[record.folded] = entry.file_size
        for record in records:
            if record.folded != b"data.pkl":
                continue
            try:
                content = archive.read(record.entry)
            except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError) as error:
                raise BrokenPickleError(f"its archive is broken ({error})") from None
            _read(content, lambda key, nbytes: nbytes <= held.get(_folded(f"data/{key}"), -1))


# What torch's reader looks up before it refuses a program.
_VERSIONS = {b"version", b".data/version"}


@dataclass(frozen=True)
class _Record:
    """A part of an archive as torch's reader names it: without the folder that all are in.

    Attributes:
        entry: The part.
        name: Its name in the folder; empty for a part outside the folder.
        folded: The name as it is looked up, without regard to the case of ASCII letters.
    """

    entry: zipfile.ZipInfo
    name: bytes
    folded: bytes


def _folded(name: str) -> bytes:
    """Writes a name as torch's reader (miniz) compares it: ASCII letters in lower case."""
    return name.encode("utf-8", "surrogatepass").lower()


def _records(entries: list[zipfile.ZipInfo]) -> list[_Record]:
    """Names the parts of an archive as torch's reader does, which takes the first one's folder.

    Args:
        entries: The parts, in the order of the directory.

    Returns:
        The parts with the names that torch asks for.

    Raises:
        AmbiguousError: Two parts have one name to that reader, or a name ends early to one.
    """
    seen: dict[bytes, str] = {}
    for entry in entries:
        name = entry.orig_filename
        if "\0" in name:
            raise AmbiguousError(f"the name of its part {name!r} holds a zero byte")
        if (other := seen.get(_folded(name))) is not None:
            raise AmbiguousError(
                f"its parts {other!r} and {name!r} have the same name"
                + (" but for upper and lower case" if other != name else "")
            )
        seen[_folded(name)] = name
    folder = entries[0].orig_filename.partition("/")[0] + "/" if entries else ""
    records = []
    for entry in entries:
        name = entry.orig_filename
        # An archive with parts outside of its folder is refused by torch, whatever their names.
        inside = _folded(name).startswith(_folded(folder))
        inner = name[len(folder) :] if inside else ""
        records.append(_Record(entry, inner.encode("utf-8", "surrogatepass"), _folded(inner)))
    return records


def _require_one_directory(file: IO[bytes], start: int, count: int) -> None:
    """Makes sure that torch's reader (miniz) finds the directory that Python's zipfile found.

    Python looks for the directory right before the end record, which describes it;
    miniz looks where that record says.

    Args:
        file: The archive.
        start: Where the directory is that zipfile read.
        count: How many entries it has.

    Raises:
        AmbiguousError: miniz would read another directory.
    """
    size = file.seek(0, io.SEEK_END)
    tail_start = max(0, size - _TAIL)
    file.seek(tail_start)
    tail = file.read()
    at = tail.rfind(b"PK\5\6", 0, len(tail) - _END.size + 4)
    found = _END.unpack_from(tail, at) if at >= 0 else (0, -1, 0, -1)
    total, offset = found[1], found[3]
    if at >= _LOCATOR.size:
        signature, place = _LOCATOR.unpack_from(tail, at - _LOCATOR.size)
        if signature == b"PK\6\7" and place + _END_64.size <= size:
            file.seek(place)
            signature, _, total_64, _, offset_64 = _END_64.unpack(file.read(_END_64.size))
            if signature == b"PK\6\6":
                total, offset = total_64, offset_64
    if (total, offset) != (count, start):
        raise AmbiguousError("it has more than one directory of its parts")


# The records at the end of an archive: the signature, then of the directory the number of entries
# on this disk and in all, its size, and where it starts; those of 64 bits, and what tells where
# these are.
_END = struct.Struct("<8x2HII2x")
_LOCATOR = struct.Struct("<4s4xQ4x")
_END_64 = struct.Struct("<4s20x4Q")
# The comment behind the last record is no longer than 64 KiB.
_TAIL = (1 << 16) + _END.size


def _old(file: io.BytesIO | mmap.mmap) -> None:
    """Looks into what torch wrote before version 1.6: three small pickles, the content, data."""
    start = 0
    try:
        for number in range(4):
            start = file.tell()
            values = [value for _, value, _ in pickletools.genops(cast("IO[bytes]", file))]
            if number == 0 and OLD_FORMAT not in values:
                return
    except ValueError as error:
        raise BrokenPickleError(one_line(error)) from None
    stop = file.tell()
    size = file.seek(0, io.SEEK_END) or file.tell()  # mapped memory does not say where it went
    left: dict[str, int] = {}
    total = 0

    def fits(key: str, nbytes: int) -> bool:
        nonlocal total
        total += max(0, nbytes - left.get(key, 0))
        left[key] = max(nbytes, left.get(key, 0))
        return total <= size - stop

    file.seek(start)
    _read(file.read(stop - start), fits)


def _read(content: bytes, fits: Callable[[str, int], bool]) -> None:
    def storage(claim: Any) -> Any:
        if claim[0] == "module":  # a class, which is code: torch has a word on it
            return _Anything
        kind, name, key, _, count, *_ = claim
        if kind != "storage" or name not in _SIZES or type(count) is not int or count < 0:
            raise SizeError("a tensor has no storage")
        found = _Storage(count * max(1, int(_SIZES[name])), _SIZES[name])
        if not fits(str(key), found.nbytes):
            raise SizeError(f"{found.nbytes:,} bytes of a tensor that are not in it")
        return found

    load(content, _Names(), encoding="latin-1", persistent=storage)
