"""Data as code gives it: tensors, batches, DataLoaders and Datasets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from losscli.datasets.split import DataSet, Inputs, Split, leaves
from losscli.errors import DataError, one_line

__all__ = ["from_object", "to_tensor"]

_TARGETS = ("targets", "target", "labels", "label", "y")
_DECODING_BATCH = 512


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
        rest = {str(key): to_tensor(v, where, key) for key, v in batch.items() if key != keys[0]}
        inputs: Inputs = next(iter(rest.values())) if len(rest) == 1 else rest
        targets = batch[keys[0]]
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        first, targets = batch
        if isinstance(first, Mapping):
            inputs = {str(key): to_tensor(value, where, key) for key, value in first.items()}
        elif isinstance(first, tuple | list):
            inputs = tuple(to_tensor(value, where, i) for i, value in enumerate(first))
        else:
            inputs = to_tensor(first, where, "inputs")
    else:
        size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise DataError(
            f"{where}: a {type(batch).__name__}{size} is not understood as a batch",
            "Give (inputs, targets), or a mapping with a key such as targets or labels",
        )
    if not leaves(inputs):
        raise DataError(f"{where}: a batch has targets and no inputs", "Give (inputs, targets)")
    return Split(inputs, to_tensor(targets, where, "targets"))


def to_tensor(value: object, where: str, key: object) -> Tensor:
    """Makes a tensor of what stands for one.

    Args:
        value: A tensor or a NumPy array.
        where: What to call the data in errors.
        key: What to call the value in errors.

    Returns:
        A dense tensor of real numbers on the CPU.

    Raises:
        DataError: It is something else.
    """
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
