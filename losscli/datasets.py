"""Data sets: files or code in; named splits of whole tensors, decoded once for all points, out."""

from __future__ import annotations

import gzip
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from losscli.errors import DataError, SpecError, UsageError, one_line
from losscli.spec import Spec, call, look_up

__all__ = [
    "DATASETS",
    "DataSet",
    "Inputs",
    "Split",
    "Task",
    "from_object",
    "leaves",
    "load",
    "map_inputs",
]

Task = Literal["classification", "regression"]

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
"""What a model takes: one tensor, several by position, or several by name; each ``[N, *]``."""

_TARGETS = ("targets", "target", "labels", "label", "y")
_COMMON = ("mean", "std", "flatten", "limit")
_DECODING_BATCH = 512


def map_inputs(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """Applies a function to every tensor of a model's inputs.

    Args:
        function: What to apply.
        inputs: The inputs.

    Returns:
        Inputs of the same structure.
    """
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, tuple):
        return tuple(map(function, inputs))
    return {key: function(tensor) for key, tensor in inputs.items()}


def leaves(inputs: Inputs) -> list[Tensor]:
    """Lists the tensors of a model's inputs.

    Args:
        inputs: The inputs.

    Returns:
        Every tensor in them, in order.
    """
    if isinstance(inputs, Tensor):
        return [inputs]
    return list(inputs if isinstance(inputs, tuple) else inputs.values())


@dataclass(frozen=True)
class Split:
    """One split.

    Attributes:
        inputs: The inputs of all its examples as stored: images may be uint8.
        targets: Their targets, ``[N, *]``: int64 for classification, floating-point else.
    """

    inputs: Inputs
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, index: Tensor | slice) -> Split:
        """Picks examples.

        Args:
            index: Which ones: positions ``[n]`` or a slice.

        Returns:
            Those examples.
        """
        return Split(map_inputs(lambda t: t[index], self.inputs), self.targets[index])

    def to(self, device: torch.device) -> Split:
        """Moves the split to a device.

        Args:
            device: Where to.

        Returns:
            The split there, in the types it is stored in.
        """
        return Split(map_inputs(lambda t: t.to(device), self.inputs), self.targets.to(device))


@dataclass(frozen=True)
class DataSet:
    """Named splits, and how the inputs are scaled on their way into a model.

    Attributes:
        splits: The splits by name.
        mean: Subtracted from each channel (dimension 1) after scaling to 0…1; None for none.
        std: Divides each channel after that; None for none.
        flatten: Whether each example is flattened to one dimension.
    """

    splits: Mapping[str, Split]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    flatten: bool = False

    @property
    def task(self) -> Task:
        """What the targets ask for: whole numbers are classes, others are to be regressed."""
        floating = any(split.targets.is_floating_point() for split in self.splits.values())
        return "regression" if floating else "classification"

    def prepare(self, inputs: Inputs, dtype: torch.dtype) -> Inputs:
        """Makes stored inputs what the model takes.

        Args:
            inputs: A batch as stored.
            dtype: The type of the forward pass.

        Returns:
            uint8 scaled to 0…1, floating-point as ``dtype``, then normalised and flattened; other
            integers (token ids) and booleans (masks) as they are.
        """
        return map_inputs(lambda tensor: self._prepare(tensor, dtype), inputs)

    def _prepare(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if x.dtype == torch.uint8:
            x = x.to(dtype).div_(255)
        elif x.is_floating_point():
            x = x.to(dtype)
        else:
            return x
        for values, apply in ((self.mean, torch.sub), (self.std, torch.div)):
            if values is not None:
                channel = torch.tensor(values, dtype=dtype, device=x.device)
                x = apply(x, channel.view(-1, *[1] * (x.ndim - 2)))
        return x.flatten(1) if self.flatten else x

    def select(self, names: Sequence[str], limit: int | None, seed: int) -> DataSet:
        """Picks splits, and examples of each.

        Args:
            names: The splits wanted; none names all.
            limit: How many examples of each; None for all.
            seed: Of the draw without replacement.

        Returns:
            The smaller data set; the examples keep their order.

        Raises:
            UsageError: There is no such split, or the limit is below 1.
        """
        for name in names:
            if name not in self.splits:
                raise UsageError(
                    f"the data has no split {name!r}", f"It has {', '.join(self.splits)}"
                )
        if limit is not None and limit < 1:
            raise UsageError(f"a limit of {limit} leaves no examples", "Give 1 or more")
        chosen = {}
        for name in dict.fromkeys(names or self.splits):
            split = self.splits[name]
            if limit is not None and limit < len(split):
                generator = torch.Generator().manual_seed(seed)
                drawn = torch.randperm(len(split), generator=generator)[:limit]
                split = split.take(drawn.sort().values)
            chosen[name] = split
        return replace(self, splits=chosen)


def load(text: str, *, trusted: bool, folder: Path | None = None, seed: int = 0) -> DataSet:
    """Loads the data set that a spec names.

    Args:
        text: The spec; beside its entry's own keys it may have ``mean``, ``std``, ``flatten`` and
            ``limit``.
        trusted: Whether it may name code.
        folder: What relative paths in it are relative to; the current folder by default.
        seed: Of everything random: the draw of ``limit``, the order of a loader.

    Returns:
        The data set.

    Raises:
        DataError: The data cannot be read or understood.
        SpecError: The spec names nothing known, or its keys are wrong.
        UntrustedCodeError: It names code and is not trusted.
    """
    spec = Spec.parse(text)
    function, arguments = look_up(spec, DATASETS, "data", trusted=trusted)
    options = dict(spec.options)
    common = {key: options.pop(key, None) for key in _COMMON}
    normalisation: dict[str, Any] = {
        key: _channels(common[key], key, text) for key in ("mean", "std") if common[key] is not None
    }
    if common["flatten"] is not None:
        normalisation["flatten"] = common["flatten"]
        if not isinstance(common["flatten"], bool):
            raise SpecError(
                f"data {text!r}: flatten={common['flatten']} is neither true nor false",
                "Write flatten=true",
            )
    limit = common["limit"]
    if limit is not None and not (type(limit) is int and limit > 0):
        raise SpecError(f"data {text!r}: limit={limit} is no number of examples", "Give 1 or more")
    if function in DATASETS.values():
        if not arguments:
            name = spec.target.rstrip(":")
            raise SpecError(f"data {text!r} names no file", f"Write {name}:PATH")
        paths: tuple[str | Path, ...] = (Path(folder or "", arguments[0]),)
    else:
        paths = arguments
    torch.manual_seed(seed)
    try:
        loaded = call(function, paths, options, f"data {text!r}", also=_COMMON)
    except (DataError, SpecError):
        raise
    except Exception as error:
        raise DataError(f"data {text!r} failed: {one_line(error)}") from error
    data = replace(from_object(loaded, f"data {text!r}"), **normalisation)
    _check_channels(data, text)
    return data.select([], limit, seed)


def from_object(loaded: object, where: str) -> DataSet:
    """Makes a data set of what the user's own code gives.

    Args:
        loaded: A mapping from split names to ``(inputs, targets)``, DataLoaders or Datasets; or
            one DataLoader or Dataset, which becomes the split ``data``.
        where: What to call it in errors.

    Returns:
        The data set, every example of it in memory.

    Raises:
        DataError: It is none of these, a batch is not understood, or examples do not fit
            together.
    """
    if isinstance(loaded, DataSet):
        return loaded
    if isinstance(loaded, DataLoader | Dataset):
        loaded = {"data": loaded}
    if not isinstance(loaded, Mapping) or not loaded:
        raise DataError(
            f"{where} gives a {type(loaded).__name__}",
            "Return a mapping from split names to (inputs, targets), or a DataLoader or Dataset",
        )
    splits = {}
    for name, content in loaded.items():
        here = f"{where}, split {name!r}"
        if isinstance(content, DataLoader | Dataset):
            split = _concatenate([_batch(b, here) for b in _batches(content, here)], here)
        else:
            split = _batch(content, here)
        splits[str(name)] = _checked(split, here)
    floating = {split.targets.is_floating_point() for split in splits.values()}
    if len(floating) > 1:
        raise DataError(
            f"{where}: some splits have whole-number targets and some do not",
            "Give all of them whole numbers for classes, or none",
        )
    return DataSet(splits)


def _batches(content: DataLoader[Any] | Dataset[Any], where: str) -> Iterator[Any]:
    if not isinstance(content, DataLoader):
        size = getattr(content, "__len__", None)
        if size is None and not isinstance(content, IterableDataset):
            raise DataError(
                f"{where}: the Dataset has no length", "Give it __len__, or an IterableDataset"
            )
        content = DataLoader(content, batch_size=_DECODING_BATCH)
    elif content.drop_last or getattr(content.batch_sampler, "drop_last", False):
        raise DataError(
            f"{where}: the DataLoader drops the last batch where it is not full",
            "Build it with drop_last=False",
        )
    try:
        yield from content
    except Exception as error:
        raise DataError(f"{where} failed: {one_line(error)}") from error


def _batch(batch: object, where: str) -> Split:
    """Finds inputs and targets in a batch; what is not understood is an error, never skipped."""
    if isinstance(batch, Mapping):
        keys = [key for key in batch if key in _TARGETS]
        if len(keys) != 1:
            raise DataError(
                f"{where}: a batch with the keys {', '.join(map(str, batch))} has "
                f"{'no' if not keys else 'more than one'} key for its targets",
                f"Call them one of {', '.join(_TARGETS)}",
            )
        rest = {str(key): _tensor(v, where, key) for key, v in batch.items() if key != keys[0]}
        inputs: Inputs = next(iter(rest.values())) if len(rest) == 1 else rest
        targets = batch[keys[0]]
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        first, targets = batch
        if isinstance(first, Mapping):
            inputs = {str(key): _tensor(value, where, key) for key, value in first.items()}
        elif isinstance(first, tuple | list):
            inputs = tuple(_tensor(value, where, i) for i, value in enumerate(first))
        else:
            inputs = _tensor(first, where, "inputs")
    else:
        size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise DataError(
            f"{where}: a {type(batch).__name__}{size} is not understood as a batch",
            "Give (inputs, targets), or a mapping with a key such as targets or labels",
        )
    if not leaves(inputs):
        raise DataError(f"{where}: a batch has targets and no inputs", "Give (inputs, targets)")
    return Split(inputs, _tensor(targets, where, "targets"))


def _tensor(value: object, where: str, key: object) -> Tensor:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.itemsize <= 8:
        # torch takes arrays of the machine's own byte order that may be written to.
        value = torch.from_numpy(np.require(value, value.dtype.newbyteorder("="), ["C", "W"]))
    if (
        not isinstance(value, Tensor)
        or value.is_complex()
        or value.is_quantized
        or value.layout != torch.strided
    ):
        raise DataError(
            f"{where}: {key!r} is a {type(value).__name__}, not a dense tensor of real numbers",
            "Give tensors or NumPy arrays",
        )
    return value.detach().cpu()


def _concatenate(batches: Sequence[Split], where: str) -> Split:
    if not batches:
        raise DataError(f"{where} is empty")
    first = batches[0].inputs
    if isinstance(first, dict):
        # Later batches may have the keys in another order.
        batches = [
            Split({key: b.inputs[key] for key in first}, b.targets)
            if isinstance(b.inputs, dict) and b.inputs.keys() == first.keys()
            else b
            for b in batches
        ]
    rows = [[*leaves(b.inputs), b.targets] for b in batches]
    structures = {
        (type(b.inputs), *(b.inputs if isinstance(b.inputs, dict) else ()), *(t.dtype for t in row))
        for b, row in zip(batches, rows, strict=True)
    }
    if len(structures) > 1:
        raise DataError(
            f"{where}: the batches differ in their structure or types",
            "Give every batch the same inputs, in the same types",
        )
    try:
        *columns, targets = (torch.cat(column) for column in zip(*rows, strict=True))
    except (RuntimeError, TypeError) as error:
        raise DataError(
            f"{where}: the batches do not fit together: {one_line(error)}",
            "Pad the examples to one size",
        ) from None
    if isinstance(first, Tensor):
        return Split(columns[0], targets)
    if isinstance(first, tuple):
        return Split(tuple(columns), targets)
    return Split(dict(zip(first, columns, strict=True)), targets)


def _checked(split: Split, where: str) -> Split:
    targets = split.targets
    if any(t.ndim == 0 for t in [*leaves(split.inputs), targets]):
        raise DataError(f"{where}: a single number is no column of examples", "Give tensors [N, …]")
    sizes = {len(t) for t in [*leaves(split.inputs), targets]}
    if len(sizes) > 1:
        counts = " and ".join(str(len(t)) for t in leaves(split.inputs))
        raise DataError(
            f"{where}: {counts} inputs for {len(targets)} targets", "Give one target an example"
        )
    if sizes == {0}:
        raise DataError(f"{where} is empty")
    return replace(split, targets=targets if targets.is_floating_point() else targets.long())


def _channels(value: Any, key: str, text: str) -> tuple[float, ...] | None:
    if value is None:
        return None
    values = value if isinstance(value, list) else [value]
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        raise SpecError(
            f"data {text!r}: {key}={value} is no number a channel", f"Write {key}=0.5-0.4-0.5"
        )
    if not all(map(math.isfinite, values)) or (key == "std" and min(values) <= 0):
        raise SpecError(
            f"data {text!r}: {key}={value} is not {'above 0' if key == 'std' else 'finite'}",
            f"Write {key}=0.5, or {key}=0.5-0.4-0.5 for three channels",
        )
    return tuple(map(float, values))


def _check_channels(data: DataSet, text: str) -> None:
    for split in data.splits.values():
        for tensor in leaves(split.inputs):
            if not (tensor.is_floating_point() or tensor.dtype == torch.uint8):
                continue
            for values in (data.mean, data.std):
                channels = tensor.shape[1] if tensor.ndim > 1 else 1
                if values is not None and len(values) not in {1, channels}:
                    raise DataError(
                        f"data {text!r}: {len(values)} values of mean or std for "
                        f"{channels} channels",
                        "Give one value, or one a channel",
                    )


def _pairs(arrays: Mapping[str, Tensor], where: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Sorts the arrays of a file into splits: NAME_inputs and NAME_targets, or those alone."""
    if not arrays:
        raise DataError(f"{where} is empty", "Give it arrays inputs and targets")
    splits: dict[str, dict[str, Tensor]] = {}
    for key, tensor in arrays.items():
        split, _, part = key.rpartition("_")
        if part not in {"inputs", "targets"}:
            raise DataError(
                f"{where}: the array {key!r} is not understood",
                "Name the arrays inputs and targets, or train_inputs, train_targets, …",
            )
        splits.setdefault(split or "data", {})[part] = tensor
    for split, parts in splits.items():
        if len(parts) < 2:
            there, missing = sorted(("inputs", "targets"), key=parts.__contains__, reverse=True)
            raise DataError(
                f"{where}: the split {split!r} has {there} alone",
                f"Add {missing if split == 'data' else f'{split}_{missing}'}",
            )
    # Some files sort their arrays by name; readers expect the training data first.
    order = sorted(splits, key=lambda split: split != "train")
    return {split: (splits[split]["inputs"], splits[split]["targets"]) for split in order}


def _load_safetensors(path: Path, /) -> dict[str, tuple[Tensor, Tensor]]:
    _exists(path)
    try:
        # safetensors takes a file that may not be read for a missing one.
        with path.open("rb"), safe_open(path, framework="pt") as file:
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise DataError(
            f"{path} is no whole safetensors file: {one_line(error)}", "Was its writing cut off?"
        ) from None
    return _pairs(arrays, str(path))


def _load_npz(path: Path, /) -> dict[str, tuple[Tensor, Tensor]]:
    _exists(path)
    try:
        with path.open("rb") as stream:
            # What is no archive at all, NumPy takes for a pickle and advises to run.
            if not zipfile.is_zipfile(stream):
                raise ValueError("no zip archive, or not all of one")  # noqa: TRY301
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as file:
                arrays = {key: _tensor(file[key], str(path), key) for key in file.files}
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - a broken archive makes its reader raise anything
        raise DataError(
            f"{path} is no NumPy archive of numbers: {one_line(error)}",
            "Write it with numpy.savez, arrays of numbers alone",
        ) from None
    return _pairs(arrays, str(path))


def _load_mnist(path: Path, /) -> dict[str, tuple[Tensor, Tensor]]:
    if not path.is_dir():
        raise DataError(f"there is no folder {path}", "Name the folder of the IDX files")
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = (_idx_file(path, prefix, part) for part in ("images-idx3", "labels-idx1"))
        if images and labels:
            splits[split] = (_read_idx(images, 3).unsqueeze(1), _read_idx(labels, 1))
        elif images or labels:
            raise DataError(
                f"{path}: the split {split!r} has {'images' if images else 'labels'} alone",
                f"Add {prefix}-{'labels-idx1' if images else 'images-idx3'}-ubyte, or its .gz",
            )
    if not splits:
        raise DataError(
            f"{path} holds no IDX files such as t10k-images-idx3-ubyte.gz",
            "Name the folder of the IDX files",
        )
    return splits


def _idx_file(folder: Path, prefix: str, part: str) -> Path | None:
    names = (f"{prefix}-{part}-ubyte", f"{prefix}-{part.replace('-', '.')}-ubyte")
    candidates = (folder / f"{name}{suffix}" for name in names for suffix in ("", ".gz"))
    return next((path for path in candidates if path.is_file()), None)


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """Reads an IDX file of bytes: 0, 0, type, dimensions, big-endian sizes, the values."""
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read: {one_line(error)}", "Was its download cut off?"
        ) from None
    start = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, 8, dimensions]):
        raise DataError(
            f"{path} is no IDX file of bytes in {dimensions} dimensions",
            "Is it another file, or a labels file in the place of images?",
        )
    sizes = content[4:start].ljust(start - 4, b"\xff")
    shape = np.frombuffer(sizes, ">u4").astype(int).tolist()
    if math.prod(shape) != len(content) - start:
        raise DataError(
            f"{path}: {max(len(content) - start, 0)} values for the shape {shape}",
            "Was its download cut off?",
        )
    values = np.frombuffer(bytearray(content), np.uint8, offset=start)
    return torch.from_numpy(values.reshape(shape))


def _exists(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"there is no data file {path}", f"Relative names start at {Path.cwd()}")


DATASETS: dict[str, Callable[..., Any]] = {
    "safetensors": _load_safetensors,
    "npz": _load_npz,
    "mnist": _load_mnist,
}
