"""Check the tensor sizes in files of torch against the file size before torch loads them.

torch allocates memory for the sizes that the pickle states. It checks them against the content
later, or not at all.
"""

from __future__ import annotations

import io
import math
import mmap
import pickletools
import struct
import zipfile
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, NoReturn, cast

import torch

from losscli.checkpoint.pickles import BrokenPickleError, load
from losscli.errors import one_line
from losscli.files import open_regular

__all__ = [
    "ARCHIVE_MAGIC",
    "LEGACY_MAGIC",
    "AmbiguousError",
    "Immutable",
    "RepeatedError",
    "SizeError",
    "check_sizes",
]

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""The magic number of files that torch wrote before version 1.6."""

ARCHIVE_MAGIC = b"PK\x03\x04"
"""The first bytes of an archive, which torch writes since version 1.6."""

# Bytes that a tensor with repeated elements (stride 0) may have beyond those of its storage.
_MAX_REPEATED = 16 << 20


class SizeError(BrokenPickleError):
    """A file states larger tensors than it contains."""


class RepeatedError(SizeError):
    """A tensor with repeated elements (stride 0) is far larger than its storage."""


class AmbiguousError(BrokenPickleError):
    """An archive in which two readers may read different directories."""


class Immutable(type):
    """Metaclass that prevents a pickle from setting class attributes."""

    def __setattr__(cls, name: str, _value: object) -> NoReturn:
        raise TypeError(f"{cls.__name__}.{name} stays as it is")


class _Inert(metaclass=Immutable):
    """Replaces any object in a pickle. It accepts all arguments and operations and ignores them."""

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
    """The size of a storage and of one element, in bytes."""

    __slots__ = ("itemsize", "nbytes")

    def __init__(self, nbytes: int, itemsize: float) -> None:
        self.nbytes, self.itemsize = nbytes, itemsize


class _Tensor(_Inert):
    def __new__(cls, *arguments: Any, **_: Any) -> Any:
        """Checks that offset, sizes and strides of a tensor lie within its storage."""
        if len(arguments) >= 4 and isinstance(arguments[0], _Storage):
            storage, offset, sizes, strides = arguments[:4]
            numbers = [offset, *sizes, *strides]
            if len(sizes) != len(strides) or not all(type(n) is int and n >= 0 for n in numbers):
                raise SizeError("the shape of a tensor is not of whole numbers")
            if all(sizes):
                # Types without a storage class are passed as an argument.
                types = (a.itemsize for a in arguments if isinstance(a, torch.dtype))
                itemsize = next(types, storage.itemsize)
                last = offset + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True)) + 1
                repeated = math.prod(sizes) * itemsize - storage.nbytes
                if last * itemsize <= storage.nbytes and repeated > _MAX_REPEATED:
                    raise RepeatedError(
                        f"a tensor of the shape {list(sizes)} that repeats the "
                        f"{storage.nbytes:,} bytes it holds"
                    )
                if last * itemsize > storage.nbytes:
                    raise SizeError(
                        f"a tensor of the shape {list(sizes)} in {storage.nbytes:,} bytes"
                    )
        return super().__new__(cls)


# Bytes per element by storage class; the last two pack several elements into a byte.
_ITEM_SIZES: dict[str, float] = {
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


_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class _Dictionary(dict[Any, Any], metaclass=Immutable):
    """Replaces the dictionary classes of collections, which state dicts use."""

    def __setstate__(self, _: Any) -> None:
        pass


class _DefaultDictionary(_Inert):
    def __new__(cls, *_: Any, **__: Any) -> Any:
        return _Dictionary()


_COLLECTIONS: dict[tuple[str, str], type] = {
    ("collections", "OrderedDict"): _Dictionary,
    ("collections", "Counter"): _Dictionary,
    ("collections", "defaultdict"): _DefaultDictionary,
}


class _InertGlobals(dict[tuple[str, str], Any]):
    """Maps each global name of a pickle to a replacement. Nothing is imported."""

    def __missing__(self, key: tuple[str, str]) -> Any:
        module, name = key
        if module in {"torch", "torch.storage"} and name in _ITEM_SIZES:
            return name  # a pickle cannot call a string
        if module == "torch._utils" and name.startswith(("_rebuild_tensor", "_rebuild_qtensor")):
            return _Tensor
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        return _Inert


def check_sizes(file: Path | BufferedReader | io.BytesIO | mmap.mmap) -> None:
    """Checks that a file of torch contains the bytes of all its tensors.

    Files of another format pass, since torch rejects them itself.

    Args:
        file: The path of an archive, an open file, or a file in memory. The position of a file
            that is not a path is reset to its start. An archive is not in mapped memory.

    Raises:
        SizeError: The file states larger tensors than it contains.
        BrokenPickleError: The pickle or the archive is broken.
    """
    if isinstance(file, Path):
        with open_regular(file) as stream:
            _check_archive(stream)
        return
    if isinstance(file, mmap.mmap):
        _check_legacy(file)
    else:
        magic = file.read(4)
        file.seek(0)
        (_check_archive if magic == ARCHIVE_MAGIC else _check_legacy)(file)
    file.seek(0)


def _check_archive(file: BufferedReader | io.BytesIO) -> None:
    """Checks an archive. Its parts are found by the reader that ``torch.load`` uses."""
    sizes = _check_parts(file)
    file.seek(0)
    try:
        # The stubs of torch lack methods of this class.
        reader: Any = torch._C.PyTorchFileReader(file)
        if "constants.pkl" in reader.get_all_records():
            return  # a TorchScript program, which torch refuses
        content = reader.get_record("data.pkl")
    except RuntimeError as error:
        raise BrokenPickleError(f"its archive is broken ({one_line(error)})") from None

    def fits(key: str, nbytes: int) -> bool:
        try:
            return nbytes <= sizes.get(reader.get_record_offset(f"data/{key}"), -1)
        except RuntimeError:
            return False

    _check_pickle(content, fits)


# Parts that torch reads before it refuses a TorchScript program, whose other parts are compressed.
_FIRST_PARTS = ("/version", "/serialization_id")


def _check_parts(file: BufferedReader | io.BytesIO) -> dict[int, int]:
    """Checks that each part lies in the file; returns its size by the offset of its data."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            _require_one_directory(file, archive.start_dir, len(entries))
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise BrokenPickleError(f"its archive is broken ({error})") from None
    program = any(e.filename.partition("/")[2] == "constants.pkl" for e in entries)
    size = file.seek(0, io.SEEK_END)
    sizes = {}
    for entry in entries:
        if program and not entry.filename.lower().endswith(_FIRST_PARTS):
            continue
        # torch never compresses, and maps the parts directly from the file.
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise SizeError(f"its part {entry.filename!r} is compressed, which torch never does")
        start = entry.header_offset + _LOCAL_HEADER.size
        if start + entry.file_size > size:
            raise SizeError(f"its part {entry.filename!r} is of {entry.file_size:,} bytes")
        file.seek(entry.header_offset)
        start += sum(_LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size)))
        sizes[start] = entry.file_size
    return sizes


# The lengths of the name and of the extra field before the data of a part.
_LOCAL_HEADER = struct.Struct("<26x2H")


def _require_one_directory(file: IO[bytes], start: int, count: int) -> None:
    """Checks that torch's reader (miniz) reads the same directory as Python's zipfile.

    zipfile expects the directory, of ``count`` entries at ``start``, directly before the end
    record; miniz uses the offset in that record.
    """
    size = file.seek(0, io.SEEK_END)
    tail_start = max(0, size - _MAX_TAIL)
    file.seek(tail_start)
    tail = file.read()
    position = tail.rfind(b"PK\5\6", 0, len(tail) - _END_RECORD.size + 4)
    found = _END_RECORD.unpack_from(tail, position) if position >= 0 else (0, -1, 0, -1)
    total, offset = found[1], found[3]
    if position >= _LOCATOR.size:
        signature, offset_64_record = _LOCATOR.unpack_from(tail, position - _LOCATOR.size)
        if signature == b"PK\6\7" and offset_64_record + _END_RECORD_64.size <= size:
            file.seek(offset_64_record)
            signature, _, total_64, _, offset_64 = _END_RECORD_64.unpack(
                file.read(_END_RECORD_64.size)
            )
            if signature == b"PK\6\6":
                total, offset = total_64, offset_64
    if (total, offset) != (count, start):
        raise AmbiguousError("it has more than one directory of its parts")


# The records at the end of an archive. The end records (32 and 64 bits) have the number of entries
# in the directory on this disk and in total, the size of the directory, and its offset. The locator
# has the offset of the 64-bit end record.
_END_RECORD = struct.Struct("<8x2HII2x")
_LOCATOR = struct.Struct("<4s4xQ4x")
_END_RECORD_64 = struct.Struct("<4s20x4Q")
# The comment after the last record has at most 64 KiB.
_MAX_TAIL = (1 << 16) + _END_RECORD.size


def _check_legacy(file: BufferedReader | io.BytesIO | mmap.mmap) -> None:
    """Checks a file of the format before torch 1.6: four pickles (content last), data."""
    start = 0
    try:
        for number in range(4):
            start = file.tell()
            values = [value for _, value, _ in pickletools.genops(cast("IO[bytes]", file))]
            if number == 0 and LEGACY_MAGIC not in values:
                return
    except ValueError as error:
        raise BrokenPickleError(one_line(error)) from None
    stop = file.tell()
    size = file.seek(0, io.SEEK_END) or file.tell()  # mmap.seek returns None
    largest: dict[str, int] = {}
    total = 0

    def fits(key: str, nbytes: int) -> bool:
        nonlocal total
        total += max(0, nbytes - largest.get(key, 0))
        largest[key] = max(nbytes, largest.get(key, 0))
        return total <= size - stop

    file.seek(start)
    _check_pickle(file.read(stop - start), fits)


def _check_pickle(content: bytes, fits: Callable[[str, int], bool]) -> None:
    def storage(persistent_id: Any) -> Any:
        if persistent_id[0] == "module":  # a class, which is code: torch refuses it itself
            return _Inert
        kind, name, key, _, count, *_ = persistent_id
        if kind != "storage" or name not in _ITEM_SIZES or type(count) is not int or count < 0:
            raise SizeError("a tensor has no storage")
        stored = _Storage(count * max(1, int(_ITEM_SIZES[name])), _ITEM_SIZES[name])
        if not fits(str(key), stored.nbytes):
            raise SizeError(f"{stored.nbytes:,} bytes of a tensor that are not in it")
        return stored

    load(content, _InertGlobals(_COLLECTIONS), encoding="latin-1", persistent=storage)
