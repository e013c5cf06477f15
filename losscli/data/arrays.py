"""Data files of arrays: safetensors, NumPy archives and the IDX files of MNIST."""

from __future__ import annotations

import gzip
import io
import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TypeVar, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from losscli.data.batch import Pixels, to_tensor
from losscli.data.memory import require_memory
from losscli.errors import DataError, SpecError, one_line
from losscli.files import refuse_placeholder

__all__ = ["load_mnist", "load_npz", "load_safetensors", "scaled"]

# Largest compression ratio of the deflate algorithm.
_MAX_DEFLATE_RATIO = 1032

_Array = TypeVar("_Array")


def _pairs(arrays: Mapping[str, _Array], where: str) -> dict[str, tuple[_Array, _Array]]:
    """Groups arrays into splits by name: NAME_inputs and NAME_targets, or inputs and targets."""
    if not arrays:
        raise DataError(f"{where} is empty", "Give it arrays inputs and targets")
    splits: dict[str, dict[str, _Array]] = {}
    for key, tensor in arrays.items():
        split, _, part = key.rpartition("_")
        if part not in {"inputs", "targets"}:
            raise DataError(
                f"{where}: the array {key!r} is not recognised",
                "Name the arrays inputs and targets, or train_inputs, train_targets, …",
            )
        splits.setdefault(split or "data", {})[part] = tensor
    for split, parts in splits.items():
        if len(parts) < 2:
            present, missing = sorted(("inputs", "targets"), key=parts.__contains__, reverse=True)
            raise DataError(
                f"{where}: the split {split!r} has only {present}",
                f"Add {missing if split == 'data' else f'{split}_{missing}'}",
            )
    # Some files sort their arrays by name; readers expect the training data first.
    order = sorted(splits, key=lambda split: split != "train")
    return {split: (splits[split]["inputs"], splits[split]["targets"]) for split in order}


def scaled(
    splits: dict[str, tuple[Tensor, Tensor]], where: str, scale: bool | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Marks uint8 inputs as pixels that are scaled from 0…255 to 0…1.

    Args:
        splits: Inputs and targets of each split.
        where: Name of the data in error messages.
        scale: Whether to scale; None scales inputs with three or more dimensions.

    Returns:
        The splits, as `Pixels` if they are scaled.

    Raises:
        SpecError: ``scale`` is True and there are no uint8 inputs.
    """
    if scale is not None and not isinstance(scale, bool):
        raise SpecError(f"{where}: scale={scale} must be true or false", "Write scale=true")
    arrays = [inputs for inputs, _ in splits.values()]
    bytes_ = [array for array in arrays if array.dtype == torch.uint8]
    if scale and not bytes_:
        kind = str(arrays[0].dtype).removeprefix("torch.")
        raise SpecError(
            f"{where}: scale=true is for uint8 inputs, and these are {kind}", "Leave out scale="
        )
    if scale is None and bytes_ and all(array.ndim >= 3 for array in bytes_):
        note = "uint8 inputs are scaled from 0…255 to 0…1: scale=false leaves them as they are"
        return Pixels(splits, note)
    return Pixels(splits) if scale else splits


def load_safetensors(
    path: Path, /, *, scale: bool | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Reads a safetensors file of arrays.

    Returns:
        Inputs and targets of each split; ``scale`` is as for `scaled`.

    Raises:
        DataError: The file is missing or broken, or has another structure.
    """
    _require_file(path)
    try:
        # safetensors reports an unreadable file as missing, so open it first.
        with path.open("rb"), safe_open(path, framework="pt") as file:
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        refuse_placeholder(path, str(path), DataError)
        raise DataError(
            f"{path} is not a valid safetensors file: {one_line(error)}",
            "It may be incomplete: save or copy it again",
        ) from None
    return scaled(_pairs(arrays, str(path)), str(path), scale)


def load_npz(path: Path, /, *, scale: bool | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """Reads a NumPy archive of arrays.

    Returns:
        Inputs and targets of each split; ``scale`` is as for `scaled`.

    Raises:
        DataError: The file is missing or broken, or has another structure.
    """
    _require_file(path)
    try:
        with path.open("rb") as stream:
            # NumPy takes any other file for a pickle and recommends loading it.
            if not zipfile.is_zipfile(stream):
                raise ValueError("not a complete zip archive")  # noqa: TRY301
            stream.seek(0)
            shapes = _check_sizes(stream, str(path))
            if shapes:
                _check_counts(shapes, str(path))
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as file:
                arrays = {key: to_tensor(file[key], str(path), key) for key in file.files}
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - readers raise any exception for a broken archive
        refuse_placeholder(path, str(path), DataError)
        raise DataError(
            f"{path} is not a NumPy archive of numbers: {one_line(error)}",
            "Write it with numpy.savez, with arrays of numbers only",
        ) from None
    return scaled(_pairs(arrays, str(path)), str(path), scale)


def _check_sizes(stream: IO[bytes], where: str) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all arrays, after checking sizes before memory is allocated.

    The result is empty if the archive has members that are not plain arrays.
    """
    shapes = {}
    with zipfile.ZipFile(stream) as archive:
        for entry in archive.infolist():
            if entry.file_size > (entry.compress_size + 1) * _MAX_DEFLATE_RATIO:
                raise ValueError(f"{entry.filename!r} cannot be of {entry.file_size:,} bytes")
            with archive.open(entry) as opened:
                file = cast("zipfile.ZipExtFile", opened)
                if not file.peek(6).startswith(b"\x93NUMPY"):
                    continue  # not an array; reported by the caller
                version = np.lib.format.read_magic(file)
                read = _HEADERS.get(version)
                if read is None:
                    continue  # a version for structured arrays, which have no plain numbers
                shape, _, dtype = read(file)
                nbytes = entry.file_size - file.tell()
                if math.prod(shape) * dtype.itemsize != nbytes and not dtype.hasobject:
                    raise ValueError(
                        f"{entry.filename!r} claims {dtype} {list(shape)} in {nbytes:,} bytes"
                    )
                shapes[entry.filename.removesuffix(".npy")] = shape
        require_memory(sum(entry.file_size for entry in archive.infolist()), where)
        return shapes if len(shapes) == len(archive.infolist()) else {}


def _check_counts(shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Compares the numbers of inputs and targets before the arrays are decompressed."""
    for split, (inputs, targets) in _pairs(shapes, where).items():
        if inputs and targets and inputs[0] != targets[0]:
            raise DataError(
                f"{where}, split {split!r}: {inputs[0]} inputs for {targets[0]} targets",
                "Give one target per example",
            )


_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def load_mnist(path: Path, /) -> Pixels:
    """Reads the IDX files of MNIST, Fashion-MNIST or K-MNIST.

    Returns:
        Inputs and targets of each split.

    Raises:
        DataError: The file is missing or broken, or has another structure.
    """
    if not path.is_dir():
        raise DataError(f"there is no folder {path}", "Name the folder of the IDX files")
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = (_idx_file(path, prefix, part) for part in ("images-idx3", "labels-idx1"))
        if images and labels:
            splits[split] = (_read_idx(images, 3).unsqueeze(1), _read_idx(labels, 1))
        elif images or labels:
            raise DataError(
                f"{path}: the split {split!r} has only {'images' if images else 'labels'}",
                f"Add {prefix}-{'labels-idx1' if images else 'images-idx3'}-ubyte, or its .gz",
            )
    if not splits:
        raise DataError(
            f"{path} contains no IDX files such as t10k-images-idx3-ubyte.gz",
            "Name the folder of the IDX files",
        )
    return Pixels(splits)


def _idx_file(folder: Path, prefix: str, part: str) -> Path | None:
    names = (f"{prefix}-{part}-ubyte", f"{prefix}-{part.replace('-', '.')}-ubyte")
    candidates = (folder / f"{name}{suffix}" for name in names for suffix in ("", ".gz"))
    return next((path for path in candidates if path.is_file()), None)


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """Reads an IDX file of bytes: 0, 0, type, dimensions, big-endian sizes, the values."""
    start = 4 + 4 * dimensions
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            limit = len(content) * _MAX_DEFLATE_RATIO
            with gzip.open(io.BytesIO(content)) as file:
                content = file.read(start)
                words = np.frombuffer(content[4:].ljust(start - 4, b"\xff"), ">u4")
                claimed = min(math.prod(words.tolist()), limit)
                require_memory(2 * claimed, str(path))  # it is copied once
                # One byte more than expected, to detect a wrong size below.
                content += file.read(claimed + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read: {one_line(error)}",
            "The download may be incomplete: download it again",
        ) from None
    if content[:4] != bytes([0, 0, 8, dimensions]):
        refuse_placeholder(path, str(path), DataError)
        raise DataError(
            f"{path} is not an IDX file of bytes in {dimensions} dimensions",
            "It may be another file, or a file of labels instead of images",
        )
    sizes = content[4:start].ljust(start - 4, b"\xff")
    shape = np.frombuffer(sizes, ">u4").astype(int).tolist()
    if math.prod(shape) != len(content) - start:
        raise DataError(
            f"{path}: {max(len(content) - start, 0)} values for the shape {shape}",
            "The download may be incomplete: download it again",
        )
    values = np.frombuffer(bytearray(content), np.uint8, offset=start)
    return torch.from_numpy(values.reshape(shape))


def _require_file(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is not a regular file", "Name a file of arrays on a disk")
    if not path.is_file():
        raise DataError(f"there is no data file {path}", f"Relative paths start at {Path.cwd()}")
