"""Batches from user code: finding inputs and targets, and joining batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from losscli.data.nests import (
    Build,
    Nest,
    Ragged,
    concatenate,
    is_container,
    leaves,
    map_nest,
    only,
    structure,
)
from losscli.data.split import Batches, Split
from losscli.errors import DataError, one_line

__all__ = [
    "TARGETS",
    "Pixels",
    "RaggedError",
    "is_language",
    "join",
    "model_inputs",
    "parse_batch",
    "separated",
    "to_tensor",
]

TARGETS = ("targets", "target", "labels", "label", "y")


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


def parse_batch(
    batch: object,
    where: str,
    rows: list[Any] | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    *,
    whole: bool = False,
) -> Split:
    """Finds inputs and targets in a batch; anything that cannot be interpreted is an error.

    Args:
        batch: ``(inputs, targets)``, a mapping with a key for its targets, or an object with such
            an attribute, such as a batch of graphs. Inputs and targets may be nested.
        where: Name of the data in error messages.
        rows: The examples that were collated to the batch, if they are known.
        collate: The function that collated them.
        whole: Whether the inputs are the whole batch, of any structure. The targets are then those
            that it has, or zeros. A batch with parts of different lengths is one example.

    Returns:
        The examples.

    Raises:
        DataError: The batch has another structure, or not exactly one target per example.
    """
    sides = _whole_sides(batch, where) if whole else _sides(batch, where)
    parsers = [_Parser(where, size, rows, collate) for size in _sizes(sides, rows)]
    for parser in parsers:
        try:
            nests = [parser.nest(*side) for side in sides]
            if any(isinstance(nest, Ragged) for nest in nests):
                # Then a list of equally long tensors on the other side has an element per example.
                rows_first = replace(parser, rows_first=True)
                nests = [rows_first.nest(*side) for side in sides]
        except _UnequalError:
            continue
        if parser.size == 0:
            raise DataError(f"{where} is empty", "Give it at least one example")
        if not leaves(nests):
            raise DataError(f"{where}: the batch has no tensors", "Give tensors or NumPy arrays")
        inputs, *targets = nests
        # Inputs by position; default_collate makes a list of a tuple.
        inputs = tuple(inputs) if isinstance(inputs, list) and not whole else inputs
        return Split(inputs, _with_operators(targets[0] if targets else _none(parser.size), where))
    inputs = sides[0][0]
    if whole and (is_container(inputs) or rows is None):
        return Split(Ragged([inputs], Build(only)), _none(1))
    if collate is None or rows is None or is_container(inputs) or _is_array(inputs):
        return _refuse(sides, where)
    # Graphs may have a target per node.
    inputs, *targets = (Ragged(rows, Build(collate, path)) for _, path, _ in sides)
    return Split(inputs, targets[0] if targets else _none(len(rows)))


def _none(size: int) -> Tensor:
    """Returns the targets of examples without targets."""
    return torch.zeros(size)


def _whole_sides(batch: object, where: str) -> list[_Side]:
    """Returns the whole batch and, where it has them, its targets."""
    whole: _Side = (batch, (), "the batch")
    try:
        return [whole, _sides(batch, where)[1]]
    except DataError:
        return [whole]


def separated(batch: object) -> tuple[Any, Any]:
    """Separates the inputs of the model from the targets in a whole batch.

    Returns:
        The inputs as `ScoredModel` takes them, a tensor, a mapping or a tuple; and the targets,
        None where the batch has no form with targets, and where they are part of a mapping.
    """
    targets = None
    if isinstance(batch, tuple | list) and len(batch) == 2:
        batch, targets = batch
    if isinstance(batch, list):
        return tuple(batch), targets
    return (batch if isinstance(batch, Tensor | Mapping | tuple) else (batch,)), targets


def model_inputs(batch: object) -> Any:
    """Returns the inputs of the model in a whole batch, in the form of `separated`.

    The batch has any form that `parse_batch` takes without ``whole``.

    Raises:
        DataError: The batch has another structure.
    """
    inputs = _sides(batch, "the data")[0][0]
    return separated((inputs, None))[0]


def _sides(batch: object, where: str) -> list[_Side]:
    """Returns the inputs and the targets of a batch."""
    if isinstance(batch, Mapping):
        keys = [key for key in batch if key in TARGETS]
        if len(keys) != 1:
            raise DataError(
                f"{where}: a batch with the keys {', '.join(map(str, batch))} has "
                f"{'no' if not keys else 'more than one'} key for its targets",
                f"Call them one of {', '.join(TARGETS)}",
            )
        inputs = {key: value for key, value in batch.items() if key != keys[0]}
        found = [(inputs, (), "inputs"), (batch[keys[0]], (keys[0],), "targets")]
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        found = [(batch[0], (0,), "inputs"), (batch[1], (1,), "targets")]
    elif callable(getattr(batch, "to", None)) and not isinstance(batch, Tensor):
        names = [name for name in TARGETS if getattr(batch, name, None) is not None]
        if len(names) != 1:
            raise DataError(
                f"{where}: a batch of the type {type(batch).__name__} has "
                f"{'no' if not names else 'more than one'} attribute for its targets",
                f"Call it one of {', '.join(TARGETS)}, or give (inputs, targets)",
            )
        found = [(batch, (), "inputs"), (getattr(batch, names[0]), (names[0],), "targets")]
    else:
        several = isinstance(batch, tuple | list)
        what = f"{len(batch)}-element batch" if several else f"{type(batch).__name__} as a batch"  # type: ignore[arg-type]
        raise DataError(
            f"{where}: cannot interpret a {what}; expected (inputs, targets)",
            "Group several inputs as ((x1, x2), y)"
            if several and len(batch) > 2  # type: ignore[arg-type]
            else "Give (inputs, targets), or a mapping with a key such as targets or labels",
        )
    if is_container(found[0][0]) and not found[0][0]:
        raise DataError(f"{where}: a batch has targets and no inputs", "Give (inputs, targets)")
    return found


_Side = tuple[Any, tuple[Any, ...], str]
"""Inputs or targets, their path in the batch, and their name in error messages."""


class _UnequalError(Exception):
    """A tensor or a list does not have one entry per example."""


@dataclass(frozen=True)
class _Parser:
    """Converts inputs or targets to a nest of columns with one entry per example.

    Attributes:
        where: Name of the data in error messages.
        size: The number of examples.
        rows: The examples that were collated to the batch, if they are known.
        collate: The function that collated them.
        rows_first: Whether a list that may have one element per example has.
    """

    where: str
    size: int
    rows: list[Any] | None
    collate: Callable[[list[Any]], Any] | None
    rows_first: bool = False

    def nest(self, value: Any, path: tuple[Any, ...], key: object) -> Nest:
        """Converts a value, which has a path in the batch and a name in error messages."""
        if isinstance(value, Mapping):
            return {str(k): self.nest(part, (*path, k), k) for k, part in value.items()}
        if isinstance(value, list | tuple) and not any(map(_has_numbers, value)):
            return self._sequence(value, path)
        if _is_array(value) or is_container(value) or _is_plain(value) or self.collate is None:
            column = to_tensor(value, self.where, key)
            if column.ndim == 0:
                raise DataError(
                    f"{self.where}: a scalar is not a batch of examples", "Give tensors [N, …]"
                )
            if len(column) != self.size:
                raise _UnequalError
            return column
        # An object such as a graph: for other examples they are collated again.
        if self.rows is None or len(self.rows) != self.size:
            raise _UnequalError
        return Ragged(self.rows, Build(self.collate, path))

    def _sequence(self, value: list[Any] | tuple[Any, ...], path: tuple[Any, ...]) -> Nest:
        """Converts a sequence, either of columns or with one element per example."""
        ragged = Ragged(list(value), Build(list if isinstance(value, list) else tuple))
        is_rows = len(value) == self.size and len(set(map(_kind, value))) == 1
        # Two inputs of two examples may look like two examples.
        likely = self.rows_first or (value and not _is_array(value[0]))
        if is_rows and (likely if self.collate is None else self._grows(path)):
            return ragged
        try:
            parts = [self.nest(part, (*path, i), i) for i, part in enumerate(value)]
        except _UnequalError:
            if is_rows:
                return ragged
            raise
        if hasattr(value, "_make"):
            return value._make(parts)
        return parts if isinstance(value, list) else tuple(parts)

    def _grows(self, path: tuple[Any, ...]) -> bool:
        """Whether a sequence of the batch has more elements if there are more examples."""
        if self.collate is None or self.rows is None or len(self.rows) != self.size:
            return False
        try:
            return len(Build(self.collate, path)(self.rows * 2)) == 2 * self.size
        except Exception:  # noqa: BLE001 - the user's function may accept only whole batches
            return False


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | float | type(None))


def _has_numbers(value: object) -> bool:
    """Whether an element of a sequence is a number or a string, or a sequence of such."""
    return _is_plain(value) or (isinstance(value, list | tuple) and any(map(_has_numbers, value)))


def _is_array(value: object) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _kind(value: object) -> object:
    """The kind of an element of a sequence: the elements of a ragged column are of one."""
    kinds = (Tensor | np.ndarray, Mapping, list | tuple)
    return next((kind for kind in kinds if isinstance(value, kind)), type(value))


def _sizes(sides: Sequence[_Side], rows: list[Any] | None) -> list[int]:
    """Lists the numbers of examples that a batch may have, the most likely first."""

    def of(value: Any) -> Iterator[int]:
        if isinstance(value, Tensor | np.ndarray):
            yield from [len(value)] if value.ndim else []
        elif isinstance(value, Mapping):
            for part in value.values():
                yield from of(part)
        elif isinstance(value, list | tuple):
            yield from of(value[0]) if value else ()
            yield len(value)

    known = [] if rows is None else [len(rows)]
    found = [size for value, *_ in reversed(sides) for size in of(value)]
    return list(dict.fromkeys([*known, *found])) or [0]


def _refuse(sides: Sequence[_Side], where: str) -> NoReturn:
    """Raises the error for inputs and targets of different lengths."""

    def lengths(value: Any, others: set[int]) -> list[int]:
        if _is_array(value):
            return [len(value)]
        if not is_container(value):
            return []
        parts = value.values() if isinstance(value, Mapping) else value
        inner = [n for part in parts for n in lengths(part, others)]
        # A list of columns, one of which has the right length, or of examples.
        columns = all(map(_is_array, parts)) and not others.isdisjoint(inner)
        columns |= isinstance(value, Mapping)
        return inner if columns else [len(value)]

    found = [
        lengths(value, set(_sizes([other], None)))
        for (value, *_), other in zip(sides, reversed(sides), strict=True)
    ]
    inputs, targets = (" and ".join(map(str, each[:3])) for each in found)
    raise DataError(
        f"{where}: {inputs or 'no'} inputs for {targets or 'no'} targets",
        "Give one target per example",
    )


def _with_operators(targets: Nest, where: str) -> Nest:
    """Converts unsigned targets, for which torch has few operators."""
    if isinstance(targets, Ragged):
        return targets

    def convert(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.uint64 and (tensor.long() < 0).any():
            largest = int(tensor.numpy().max())
            raise DataError(
                f"{where}: the target {largest} is above 2^63 - 1", "Number classes from 0"
            )
        wide = tensor.dtype in {torch.uint16, torch.uint32, torch.uint64}
        return tensor.long() if wide else tensor

    return map_nest(convert, targets)


def is_language(batch: object) -> bool:
    """Returns whether a batch has one target per token.

    It is a mapping with integer ``labels`` of the shape of its ``decoder_input_ids``, or of its
    ``input_ids`` if it has no ``decoder_input_ids``.
    """
    if not isinstance(batch, Mapping):
        return False
    scored = "decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"
    tokens, labels = (getattr(batch.get(key), "shape", None) for key in (scored, "labels"))
    # Floating-point labels are probabilities, even if there are as many as tokens.
    integer = "float" not in str(getattr(batch.get("labels"), "dtype", ""))
    return tokens is not None and len(tokens) > 1 and tokens == labels and integer


def to_tensor(value: object, where: str, key: object) -> Tensor:
    """Returns a tensor or a NumPy array as a dense tensor of real numbers on the CPU.

    Args:
        value: The value.
        where: Name of the data in error messages.
        key: Name of the value in error messages.

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
    """Returns the concatenation of batches; ``where`` is the name of the data in error messages.

    Raises:
        DataError: There are no batches.
        RaggedError: The batches differ in structure or dtype, or in the shape of their examples.
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
    batches = _with_ragged_targets(batches)
    if len({structure((batch.inputs, batch.targets)) for batch in batches}) > 1:
        raise RaggedError(
            f"{where}: the batches differ in their structure or types",
            "Give every batch the same inputs, in the same types",
        )
    try:
        inputs, targets = concatenate([(batch.inputs, batch.targets) for batch in batches])
    except (RuntimeError, TypeError) as error:
        raise RaggedError(
            f"{where}: the batches cannot be combined: {one_line(error)}",
            "Pad the examples to one size",
        ) from None
    return Split(inputs, targets)


def _with_ragged_targets(batches: Sequence[Split]) -> Sequence[Split]:
    """Makes ragged targets of all if any are: a batch may have a target per graph by chance."""
    ragged = [batch.targets for batch in batches if isinstance(batch.targets, Ragged)]
    if not ragged:
        return batches
    build: Build = ragged[0].build
    return [
        Split(batch.inputs, Ragged(batch.inputs.rows, build))
        if isinstance(batch.targets, Tensor) and isinstance(batch.inputs, Ragged)
        else batch
        for batch in batches
    ]
