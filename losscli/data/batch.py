"""Batches from user code: finding inputs and targets, and joining batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from losscli.data.split import Batches, Inputs, Split, leaves
from losscli.errors import DataError, one_line

__all__ = ["Pixels", "RaggedError", "is_language", "join", "parse_batch", "to_tensor"]

_TARGETS = ("targets", "target", "labels", "label", "y")


class Pixels(dict[str, Any]):
    """Splits by name, with uint8 inputs that are scaled from 0…255 to 0…1.

    Args:
        splits: Inputs and targets of each split, or a Dataset of them.
        note: Note for the user.
    """

    def __init__(self, splits: Mapping[str, Any], note: str = "") -> None:
        super().__init__(splits)
        self.note = note


class RaggedError(DataError):
    """Batches cannot be joined because their examples have different shapes."""


def parse_batch(batch: object, where: str) -> Split:
    """Finds inputs and targets in a batch; anything that cannot be interpreted is an error.

    Args:
        batch: ``(inputs, targets)``, or a mapping with a key for its targets.
        where: Name of the data in error messages.

    Returns:
        The examples.

    Raises:
        DataError: The batch has another structure, or not exactly one target per example.
    """
    if isinstance(batch, Mapping):
        keys = [key for key in batch if key in _TARGETS]
        if len(keys) != 1:
            raise DataError(
                f"{where}: a batch with the keys {', '.join(map(str, batch))} has "
                f"{'no' if not keys else 'more than one'} key for its targets",
                f"Call them one of {', '.join(_TARGETS)}",
            )
        inputs: Inputs = {
            str(key): to_tensor(value, where, key) for key, value in batch.items() if key != keys[0]
        }
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
        several = isinstance(batch, tuple | list)
        what = f"{len(batch)}-element batch" if several else f"{type(batch).__name__} as a batch"  # type: ignore[arg-type]
        raise DataError(
            f"{where}: cannot interpret a {what}; expected (inputs, targets)",
            "Group several inputs as ((x1, x2), y)"
            if several and len(batch) > 2  # type: ignore[arg-type]
            else "Give (inputs, targets), or a mapping with a key such as targets or labels",
        )
    if not leaves(inputs):
        raise DataError(f"{where}: a batch has targets and no inputs", "Give (inputs, targets)")
    return _checked(Split(inputs, to_tensor(targets, where, "targets")), where)


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
        raise DataError(f"{where} is empty", "Give it at least one example")
    if targets.dtype == torch.uint64 and (targets.long() < 0).any():
        largest = int(targets.numpy().max())
        raise DataError(f"{where}: the target {largest} is above 2^63 - 1", "Number classes from 0")
    # torch has few operators for these dtypes.
    if targets.dtype in {torch.uint16, torch.uint32, torch.uint64}:
        return replace(split, targets=targets.long())
    return split


def is_language(batch: object) -> bool:
    """Returns whether a batch has one target per token.

    Args:
        batch: A batch from user code.

    Returns:
        Whether it is a mapping with integer ``labels`` of the shape of its
        ``decoder_input_ids``, or of its ``input_ids`` if it has no ``decoder_input_ids``.
    """
    if not isinstance(batch, Mapping):
        return False
    scored = "decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"
    tokens, labels = (getattr(batch.get(key), "shape", None) for key in (scored, "labels"))
    # Floating-point labels are probabilities, even if there are as many as tokens.
    integer = "float" not in str(getattr(batch.get("labels"), "dtype", ""))
    return tokens is not None and len(tokens) > 1 and tokens == labels and integer


def to_tensor(value: object, where: str, key: object) -> Tensor:
    """Converts a value to a tensor.

    Args:
        value: A tensor or a NumPy array.
        where: Name of the data in error messages.
        key: Name of the value in error messages.

    Returns:
        A dense tensor of real numbers on the CPU.

    Raises:
        DataError: The value is of another type.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.itemsize <= 8:
        # torch requires a writable array in native byte order.
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


def join(batches: Sequence[Split], where: str) -> Split:
    """Concatenates batches.

    Args:
        batches: The batches.
        where: Name of the data in error messages.

    Returns:
        All their examples.

    Raises:
        DataError: There are no batches, or they differ in structure or dtype.
        RaggedError: The batches differ in the shape of their examples.
    """
    if not batches:
        raise DataError(f"{where} is empty")
    if len(batches) == 1:
        return batches[0]
    if all(isinstance(batch, Batches) for batch in batches):
        sizes = tuple(batch.rows for batch in batches)
        plain = [Split(batch.inputs, batch.targets) for batch in batches]
        joined = join(plain, where)
        return Batches(joined.inputs, joined.targets, sizes)
    first = batches[0].inputs
    if isinstance(first, dict):
        # Later batches may have another key order.
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
        raise RaggedError(
            f"{where}: the batches do not fit together: {one_line(error)}",
            "Pad the examples to one size",
        ) from None
    if isinstance(first, Tensor):
        return Split(columns[0], targets)
    if isinstance(first, tuple):
        return Split(tuple(columns), targets)
    return Split(dict(zip(first, columns, strict=True)), targets)
