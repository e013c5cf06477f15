"""CIFAR-10 and CIFAR-100, in their binary and Python versions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from losscli.checkpoint.pickles import BrokenPickleError, ForbiddenPickleError, load
from losscli.data.batch import Pixels
from losscli.errors import DataError, SpecError, one_line

__all__ = ["load_cifar10", "load_cifar100"]

_PIXELS = 3 * 32 * 32
_SOURCE = "https://www.cs.toronto.edu/~kriz/cifar.html"

Bytes = npt.NDArray[np.uint8]
_Reader = Callable[[Path], tuple[Bytes, npt.NDArray[np.int64]]]
_Files = dict[str, list[Path]]


def load_cifar10(path: Path, /) -> Pixels:
    """Reads the binary or Python version of CIFAR-10, without running pickled code.

    Args:
        path: The folder of data_batch_1.bin … or data_batch_1 …, or its parent.

    Returns:
        Images ``[N, 3, 32, 32]`` as uint8 and classes of the splits train and test, from the files
        that exist; not all training batches are required.

    Raises:
        DataError: There are no such files, or a file is broken or contains code.
    """
    files, binary = _find(
        path,
        {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
        ("cifar-10-batches-bin", "cifar-10-batches-py"),
    )
    python = partial(_read_python, key="labels")
    read = partial(_read_binary, labels=1, label=0) if binary else python
    return Pixels({split: _read_all(names, read, 10) for split, names in files.items()})


def load_cifar100(path: Path, /, *, labels: str = "fine") -> Pixels:
    """Reads the binary or Python version of CIFAR-100, with 100 fine or 20 coarse classes.

    Args:
        path: The folder of train.bin and test.bin or of train and test, or its parent.
        labels: ``fine`` or ``coarse``.

    Returns:
        Images ``[N, 3, 32, 32]`` as uint8 and classes of the splits train and test, from the files
        that exist.

    Raises:
        DataError: There are no such files, or a file is broken or contains code.
        SpecError: ``labels`` has another value.
    """
    if labels not in {"fine", "coarse"}:
        raise SpecError(f"cifar100 has no labels {labels!r}", "Write labels=fine or labels=coarse")
    files, binary = _find(
        path,
        {"train": ["train"], "test": ["test"]},
        ("cifar-100-binary", "cifar-100-python"),
    )
    python = partial(_read_python, key=f"{labels}_labels")
    read = partial(_read_binary, labels=2, label=int(labels == "fine")) if binary else python
    count = 100 if labels == "fine" else 20
    return Pixels({split: _read_all(names, read, count) for split, names in files.items()})


def _find(
    folder: Path, names: Mapping[str, list[str]], subfolders: tuple[str, str]
) -> tuple[_Files, bool]:
    """Returns the files of the version with more files, and whether it is the binary version."""
    candidates: list[tuple[_Files, bool]] = []
    for parent in (folder, *(folder / name for name in subfolders)):
        for suffix in (".bin", ""):
            paths = {s: [parent / f"{name}{suffix}" for name in each] for s, each in names.items()}
            existing = {split: [p for p in each if p.is_file()] for split, each in paths.items()}
            files = {split: each for split, each in existing.items() if each}
            candidates.append((files, bool(suffix)))
    best = max(candidates, key=lambda version: sum(map(len, version[0].values())))
    if best[0]:
        return best
    archives = [folder, *sorted(folder.glob("cifar-*.tar.gz"))] if folder.exists() else []
    for archive in archives:
        if archive.is_file():
            raise DataError(
                f"{archive} is not a folder of CIFAR's files",
                f"Unpack it if it is an archive (tar -xzf {archive.name}) and name the folder",
            )
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}", "Name the folder of CIFAR's files")
    raise DataError(
        f"{folder} contains none of "
        f"{', '.join(f'{name}.bin' for each in names.values() for name in each)}, with or "
        "without .bin",
        f"Name the folder of an unpacked archive from {_SOURCE}",
    )


def _read_all(files: list[Path], read: _Reader, classes: int) -> tuple[Tensor, Tensor]:
    images, labels = [], []
    for file in files:
        image, label = read(file)
        if not len(label):
            raise DataError(f"{file} is empty", "It may be incomplete: save or copy it again")
        if not 0 <= label.min() <= label.max() < classes:
            raise DataError(
                f"{file} has labels from {label.min()} to {label.max()} for {classes} classes",
                "It may be a file of the other CIFAR, or damaged",
            )
        images.append(torch.from_numpy(image.reshape(-1, 3, 32, 32)))
        labels.append(torch.from_numpy(label))
    return torch.cat(images), torch.cat(labels)


def _read(file: Path) -> bytearray:
    try:
        return bytearray(file.read_bytes())
    except OSError as error:
        raise DataError(f"{file} cannot be read: {one_line(error)}") from None


def _read_binary(file: Path, labels: int, label: int) -> tuple[Bytes, npt.NDArray[np.int64]]:
    """Reads records of ``labels`` label bytes and the red, green and blue pixels, row by row."""
    content = _read(file)
    size = labels + _PIXELS
    if len(content) % size:
        raise DataError(
            f"{file}: {len(content)} bytes are not a multiple of records of {size} bytes",
            "The download may be incomplete: download it again",
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    return records[:, labels:], records[:, label].astype(np.int64)


def _read_python(file: Path, key: str) -> tuple[Bytes, npt.NDArray[np.int64]]:
    try:
        batch = load(bytes(_read(file)), _REPLACEMENTS, encoding="bytes")
    except ForbiddenPickleError as error:
        raise DataError(
            f"{file} is a pickle that would run code ({error.wanted}); nothing was run",
            f"Get the original from {_SOURCE}",
        ) from None
    except BrokenPickleError as error:
        raise DataError(
            f"{file} is not a complete pickle ({error})", f"Get the original from {_SOURCE}"
        ) from None
    try:
        images, labels = _entry(batch, "data"), _entry(batch, key)
        if images.dtype != np.uint8 or images.shape != (len(images), _PIXELS):
            raise ValueError(  # noqa: TRY301
                f"data are {images.dtype} {list(images.shape)}, not uint8 [N, {_PIXELS}]"
            )
        if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
            raise ValueError(  # noqa: TRY301
                f"{key} are {labels.dtype} {list(labels.shape)} for {len(images)} images"
            )
        return images, labels.astype(np.int64)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(
            f"{file} is not a batch of CIFAR: {one_line(error)}", f"Get the original from {_SOURCE}"
        ) from None


def _entry(batch: Any, key: str) -> npt.NDArray[Any]:
    for name in (key, key.encode()):
        if isinstance(batch, dict) and name in batch:
            value = batch[name]
            return value.numpy() if isinstance(value, _Array) else _numbers(value)
    raise ValueError(f"it has no {key!r}")


def _numbers(values: Any) -> npt.NDArray[np.int64]:
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise TypeError("its labels are not a list of integers")
    return np.array(values, np.int64)


# Replacements of NumPy's classes in a pickle, which would not validate the pickled state.


class _DType:
    """A pickled dtype: its code, such as u1, and its byte order."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        self.code, self.order = _text(code), "|"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = _text(state[1])

    def numpy(self) -> np.dtype[Any]:
        """Returns the NumPy dtype; raises TypeError unless it is an integer dtype."""
        if self.code not in {"u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8"}:
            raise TypeError(f"an array is of the type {self.code!r}")
        return np.dtype(f"{self.order if self.order in {'<', '>'} else '='}{self.code}")


class _Array:
    """A pickled array: shape, dtype, memory order, bytes."""

    shape: Any = ()
    dtype: Any = None
    fortran: Any = False
    content: Any = b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.dtype, self.fortran, self.content = state

    def numpy(self) -> npt.NDArray[Any]:
        """Returns the NumPy array; raises an error if its parts are inconsistent."""
        shape, content = self.shape, self.content
        if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
            raise TypeError("an array has no shape")
        if not isinstance(self.dtype, _DType) or not isinstance(content, bytes | bytearray):
            raise TypeError("an array has no numbers")
        dtype = self.dtype.numpy()
        if math.prod(shape) * dtype.itemsize != len(content):
            raise ValueError(f"{len(content)} bytes for an array {dtype} {list(shape)}")
        values = np.frombuffer(bytearray(content), dtype)
        return values.reshape(shape, order="F" if self.fortran else "C")


def _text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _reconstruct(*_: Any) -> _Array:
    """Creates an array without a state."""
    return _Array()


def _frombuffer(content: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    """Creates an array with its state, as in pickle protocol 5."""
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", content))
    return array


def _encode(text: str, *_: Any) -> bytes:
    """Restores bytes that Python 3 pickled for Python 2."""
    return text.encode("latin-1")


def _replacements() -> Iterator[tuple[tuple[str, str], object]]:
    yield ("numpy", "dtype"), _DType
    yield ("numpy", "ndarray"), None  # an argument of every array that is not needed
    yield ("_codecs", "encode"), _encode
    for core in ("core", "_core"):  # before NumPy 2, and from NumPy 2 on
        yield (f"numpy.{core}.multiarray", "_reconstruct"), _reconstruct
        yield (f"numpy.{core}.numeric", "_frombuffer"), _frombuffer


_REPLACEMENTS = dict(_replacements())
