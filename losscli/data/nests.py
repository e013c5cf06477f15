"""Nests: inputs and targets of any structure, as user code returns them.

A nest is a tensor, or a dict, list or tuple of nests. What no tensor holds, such as the boxes of
each image or a graph, is a `Ragged` column of examples.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from losscli.errors import DataError, one_line

__all__ = [
    "Build",
    "Nest",
    "Ragged",
    "concatenate",
    "dump",
    "exchange",
    "holds_tensors_only",
    "is_container",
    "leaves",
    "length",
    "map_nest",
    "only",
    "realise",
    "structure",
    "take",
]

Nest = Any
"""A tensor ``[N, *]``, a `Ragged` column of N examples, or a dict, list or tuple of nests."""

# Unsigned types by which torch 2.6 does not select rows, and types of the same size.
_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}

_PLAIN = (str, bytes, bool, int, float, complex, type(None), np.ndarray, np.generic)


@dataclass(frozen=True)
class Build:
    """Makes what the model or the loss gets from a list of examples.

    Attributes:
        collate: The type of the sequence of the examples, `only`, or the collate function of a
            DataLoader.
        path: The keys, indices or attribute names that lead to a part of the batch.
        then: Functions of a tensor, applied to each tensor of the result.
    """

    collate: Callable[[list[Any]], Any]
    path: tuple[Any, ...] = ()
    then: tuple[Callable[[Tensor], Tensor], ...] = ()

    @property
    def is_custom(self) -> bool:
        """Whether it calls the collate function of a DataLoader, which need not be picklable."""
        return not isinstance(self.collate, type) and self.collate is not only

    def __call__(self, rows: list[Any]) -> Any:
        """Makes the value of examples."""
        value = self.collate(rows)
        for key in self.path:
            value = value[key] if is_container(value) else getattr(value, key)
        for function in self.then:
            value = map_nest(function, value)
        return value


def only(rows: list[Any]) -> Any:
    """Returns the only element of a list."""
    return rows[0]


class Ragged:
    """A column of examples that no tensor holds.

    Args:
        rows: The examples.
        build: Makes what the model or the loss gets from the examples.
    """

    def __init__(self, rows: list[Any], build: Build) -> None:
        self.rows = rows
        self.build = build

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return {"rows": self.rows, "build": self.build}

    @cached_property
    def value(self) -> Any:
        """What the model or the loss gets."""
        return self.build(self.rows)


def is_container(value: object) -> bool:
    """Whether a value is a mapping, a list or a tuple."""
    return isinstance(value, Mapping | list | tuple)


def _children(nest: Any) -> Sequence[Any]:
    return list(nest.values()) if isinstance(nest, Mapping) else nest


def _like(nest: Any, children: Sequence[Any]) -> Any:
    """Returns a container of the type of another one, with other values."""
    if isinstance(nest, Mapping):
        return dict(zip(nest, children, strict=True))
    if hasattr(nest, "_make"):
        return nest._make(children)
    return tuple(children) if isinstance(nest, tuple) else list(children)


def map_nest(function: Callable[[Tensor], Tensor], nest: Nest) -> Nest:
    """Returns a nest with a function applied to every tensor, also to those inside other objects.

    It is applied to the tensors of a `Ragged` column when these are built.

    Raises:
        DataError: An object in it cannot be pickled.
    """
    if isinstance(nest, Tensor):
        return function(nest)
    if isinstance(nest, Ragged):
        build = nest.build
        return Ragged(nest.rows, replace(build, then=(*build.then, function)))
    if is_container(nest):
        return _like(nest, [map_nest(function, child) for child in _children(nest)])
    if isinstance(nest, _PLAIN):
        return nest
    _, tensors, _ = dump(nest)
    return exchange(nest, tensors, [function(tensor) for tensor in tensors])


def leaves(nest: Nest) -> list[Tensor]:
    """Lists the tensors of a nest in order; of a `Ragged` column those of its value."""
    if isinstance(nest, Tensor):
        return [nest]
    if isinstance(nest, Ragged):
        return leaves(nest.value)
    if is_container(nest):
        return [leaf for child in _children(nest) for leaf in leaves(child)]
    return [] if isinstance(nest, _PLAIN) else dump(nest)[1]


def holds_tensors_only(nest: Nest) -> bool:
    """Whether a nest holds tensors and nothing else, such as `Ragged` columns or objects."""
    if is_container(nest):
        return all(map(holds_tensors_only, _children(nest)))
    return isinstance(nest, Tensor)


def realise(nest: Nest) -> Nest:
    """Returns what the model or the loss gets: the nest with the values of `Ragged` columns."""
    if isinstance(nest, Ragged):
        return nest.value
    if is_container(nest):
        return _like(nest, [realise(child) for child in _children(nest)])
    return nest


def length(nest: Nest) -> int:
    """Returns the number of examples of a nest."""
    if isinstance(nest, Tensor | Ragged):
        return len(nest)
    return length(_children(nest)[0])


def take(nest: Nest, index: Tensor | slice) -> Nest:
    """Selects examples by indices ``[n]``, or by a slice, which gives views."""
    if isinstance(nest, Tensor):
        signed = _SIGNED.get(nest.dtype, nest.dtype)
        index = index if isinstance(index, slice) else index.to(nest.device)
        return nest.view(signed)[index].view(nest.dtype)
    if isinstance(nest, Ragged):
        if isinstance(index, slice):
            return Ragged(nest.rows[index], nest.build)
        return Ragged([nest.rows[i] for i in index.tolist()], nest.build)
    return _like(nest, [take(child, index) for child in _children(nest)])


def structure(nest: Nest) -> object:
    """Returns an object that is equal for nests that can be concatenated, up to the shapes."""
    if isinstance(nest, Tensor):
        return nest.dtype
    if isinstance(nest, Ragged):
        return Ragged
    if isinstance(nest, Mapping):
        return dict, frozenset((key, structure(value)) for key, value in nest.items())
    return type(nest), *map(structure, nest)


def concatenate(nests: Sequence[Nest]) -> Nest:
    """Concatenates nests of the same structure."""
    first = nests[0]
    if isinstance(first, Tensor):
        return torch.cat(list(nests))
    if isinstance(first, Ragged):
        return Ragged([row for nest in nests for row in nest.rows], first.build)
    keys = list(first) if isinstance(first, Mapping) else range(len(first))
    return _like(first, [concatenate([nest[key] for nest in nests]) for key in keys])


class _Pickler(pickle.Pickler):
    """Pickles an object without its tensors and the functions of `Ragged` columns."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.tensors: list[Tensor] = []
        self.builds: list[Build] = []

    def persistent_id(self, value: Any) -> tuple[str, int] | None:
        """Returns the place of a tensor or a function; None for other objects."""
        if isinstance(value, Tensor):
            self.tensors.append(value)
            return "tensors", len(self.tensors)
        if isinstance(value, Build):
            self.builds.append(value)
            return "builds", len(self.builds)
        return None


def dump(nest: Any) -> tuple[bytes, list[Tensor], list[Build]]:
    """Returns the pickled structure of any object, its tensors, and its `Ragged` functions.

    Raises:
        DataError: It holds an object that cannot be pickled.
    """
    file = io.BytesIO()
    pickler = _Pickler(file)
    try:
        pickler.dump(nest)
    except Exception as error:  # noqa: BLE001 - the user's objects may raise anything
        raise DataError(
            f"an object of the type {type(nest).__name__} in the data cannot be copied: "
            f"{one_line(error)}",
            "Give tensors, or an object that pickle accepts",
        ) from None
    return file.getvalue(), pickler.tensors, pickler.builds


def exchange(nest: Any, old: Sequence[object], new: Sequence[object]) -> Any:
    """Copies any object with some objects in it exchanged; numbers and strings are shared."""
    return copy.deepcopy(nest, {id(x): y for x, y in zip(old, new, strict=True)})
