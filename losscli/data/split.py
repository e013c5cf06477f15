"""Splits of examples, and data sets of named splits."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any, Literal, Self

import torch
from torch import Tensor

from losscli.data.nests import (
    Nest,
    Ragged,
    dump,
    holds_tensors_only,
    leaves,
    length,
    map_nest,
    only,
    realise,
    take,
)
from losscli.errors import UsageError
from losscli.weight_space.digest import digest
from losscli.weight_space.vectors import to_device

__all__ = ["Batches", "DataSet", "Examples", "Split", "Task"]

Task = Literal["classification", "regression", "language"]


class Examples(ABC):
    """The examples of one split in a fixed order, in memory or decoded on demand."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of examples."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Size in memory in bytes; 0 if the examples are decoded on every pass."""

    @property
    def rows(self) -> int:
        """The number of examples, counting those inside whole batches."""
        return len(self)

    @property
    def in_batches(self) -> bool:
        """Whether each element is a whole batch, for a loss with one value per batch."""
        return False

    @property
    @abstractmethod
    def digest(self) -> str:
        """A digest of the examples, 64 hexadecimal digits; of a sample if not in memory."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """Remarks for the user about the examples."""
        return ()

    @property
    def decoders(self) -> int:
        """The number of processes that decode examples in parallel."""
        return 1

    def order(self, generator: torch.Generator) -> Tensor:
        """Draws a random order, ``[N]``; ascending if the examples can only be read in sequence."""
        return torch.randperm(len(self), generator=generator)

    def position(self, index: int) -> int:
        """Returns the position of an example in the original data set, if it is known."""
        return index

    @abstractmethod
    def take(self, index: Tensor | slice) -> Examples:
        """Selects examples by indices ``[n]`` in any order, or by a slice."""

    def draw(self, number: int, generator: torch.Generator) -> Examples:
        """Draws up to ``number`` examples without replacement, in their original order."""
        if number >= len(self):
            return self
        return self.take(self.order(generator)[:number].sort().values)

    @abstractmethod
    def batches(self, size: int, order: Tensor | None = None) -> Iterator[Split]:
        """Yields the examples once, batch by batch.

        Args:
            size: Examples per batch; the last batch may have fewer.
            order: Indices ``[n]`` from `order`, or a part of them; all examples in order if None.
        """

    def spread(self, number: int) -> tuple[Split, Tensor]:
        """Selects up to ``number`` examples of all kinds, as far as they can be read in any order.

        Returns:
            Those examples and their indices: the first ones if they are not in memory.
        """
        examples = self.first(number)
        return examples, torch.arange(len(examples))

    @abstractmethod
    def first(self, number: int) -> Split:
        """Loads up to ``number`` first examples into memory."""


@dataclass(frozen=True)
class Split(Examples):
    """Examples in memory.

    Attributes:
        inputs: The inputs as stored; images may be uint8. A dict holds inputs by name, a tuple
            inputs by position.
        targets: The targets, ``[N, *]``: integer or bool for classification, floating-point for
            regression; or a nest of them.
    """

    inputs: Nest
    targets: Nest

    def __len__(self) -> int:
        return length(self.targets)

    @property
    def nbytes(self) -> int:
        """Size in memory in bytes."""
        # Of ragged columns the examples, not what is built from all of them.
        return sum(tensor.nbytes for tensor in dump((self.inputs, self.targets))[1])

    @property
    def rows(self) -> int:
        """The number of examples."""
        return length(self.targets)

    @cached_property
    def digest(self) -> str:
        """A digest of all examples."""
        content, columns, _ = dump((self.inputs, self.targets))
        structure = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return digest({"structure": structure, **{str(i): c for i, c in enumerate(columns)}})

    @property
    def is_undivided(self) -> bool:
        """Whether elements are batches with parts of different lengths, which have no examples."""
        return isinstance(self.inputs, Ragged) and self.inputs.build.collate is only

    def take(self, index: Tensor | slice) -> Split:
        """Selects examples; views if ``index`` is a slice."""
        return Split(take(self.inputs, index), take(self.targets, index))

    def batches(self, size: int, order: Tensor | None = None) -> Iterator[Split]:
        """Iterates over the examples once, batch by batch."""
        for start in range(0, len(self) if order is None else len(order), size):
            part = slice(start, start + size)
            yield self.take(part if order is None else order[part])

    def first(self, number: int) -> Split:
        """Returns the first examples."""
        return self.take(slice(0, number))

    def spread(self, number: int) -> tuple[Split, Tensor]:
        """Selects random examples, the same in each call, since sorted data begin with one class.

        Evenly spaced ones would miss some kinds of examples if these alternate. Each class gets
        the same number of examples, as far as it has them.

        Returns:
            Those examples in their order, and their indices.
        """
        rows = torch.arange(len(self))
        if number < len(self):
            rows = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))
            if self.has_classes and not self.in_batches:
                rows = rows[_alternate(self.targets.cpu()[rows])]
            rows = rows[:number].sort().values
        return self.take(rows), rows

    @property
    def has_classes(self) -> bool:
        """Whether each example has one class: a whole number."""
        targets = self.targets
        if not isinstance(targets, Tensor):
            return False
        return targets.ndim == 1 and not (targets.is_floating_point() or targets.is_complex())

    def to(self, device: torch.device) -> Self:
        """Moves the split to a device, with unchanged dtypes but for `to_device`."""
        return self.map(partial(to_device, device=device))

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Applies a function, which keeps the number of examples, to inputs and targets."""
        inputs, targets = (map_nest(function, nest) for nest in (self.inputs, self.targets))
        return replace(self, inputs=inputs, targets=targets)

    @property
    def holds_tensors_only(self) -> bool:
        """Whether inputs and targets are nests of tensors, without `Ragged` columns."""
        return holds_tensors_only((self.inputs, self.targets))

    def is_on(self, device: torch.device) -> bool:
        """Returns whether the split is on a device."""
        current = self.device
        return current.type == device.type and device.index in {None, current.index}

    @property
    def device(self) -> torch.device:
        """The device of its tensors; the CPU if it has none."""
        tensors = leaves(take((self.targets, self.inputs), slice(0, 1)))
        return tensors[0].device if tensors else torch.device("cpu")


@dataclass(frozen=True)
class Batches(Split):
    """Whole batches in memory; each batch counts as one example.

    Attributes:
        sizes: The number of examples in each batch, in order; 1 if they cannot be counted.
    """

    sizes: tuple[int, ...]

    @classmethod
    def of(cls, split: Split, size: int | None = None) -> Self:
        """Divides examples into consecutive batches; without a size, into a single one."""
        rows = split.rows
        size = size or rows
        sizes = tuple(min(size, rows - start) for start in range(0, rows, size))
        return cls(split.inputs, split.targets, sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def in_batches(self) -> bool:
        """Always True: each element is a whole batch."""
        return True

    @cached_property
    def digest(self) -> str:
        """A digest of all examples and of the batch sizes."""
        return digest({super().digest: torch.tensor(self.sizes)})

    @property
    def remarks(self) -> tuple[str, ...]:
        """A remark if the batches differ in size."""
        return batch_size_remarks([0] if self.is_undivided else self.sizes)

    def take(self, index: Tensor | slice) -> Batches:
        """Selects batches; views if ``index`` is a slice."""
        starts = [0, *itertools.accumulate(self.sizes)]
        if isinstance(index, slice):
            first, last, _ = index.indices(len(self))
            rows = slice(starts[first], starts[max(first, last)])
            return Batches(*self._rows(rows), self.sizes[first:last])
        indices = index.tolist()
        spans = [torch.arange(starts[i], starts[i + 1]) for i in indices]
        order = torch.cat([torch.empty(0, dtype=torch.long), *spans])
        return Batches(*self._rows(order), tuple(self.sizes[i] for i in indices))

    def _rows(self, index: Tensor | slice) -> tuple[Nest, Nest]:
        return take(self.inputs, index), take(self.targets, index)


def _alternate(classes: Tensor) -> Tensor:
    """Orders examples so that the first of each class come first, then the second ones, and so on.

    Returns:
        Their positions, ``[N]``.
    """
    _, index, counts = torch.unique(classes, return_inverse=True, return_counts=True)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    place = torch.empty_like(index)
    place[index.argsort(stable=True)] = torch.arange(len(classes)) - starts
    return place.argsort(stable=True)


def batch_size_remarks(sizes: Iterable[int]) -> tuple[str, ...]:
    """Returns a remark for the user if batches differ in size; 0 is an unknown size."""
    smallest, largest = min(sizes := set(sizes)), max(sizes)
    if not smallest:
        unknown = "the parts of a batch differ in length, so its examples are not counted"
        return (f"{unknown}; each batch counts the same",)
    if smallest == largest:
        return ()
    return (f"the batches have {smallest} to {largest} examples, and each batch counts the same",)


@dataclass(frozen=True)
class DataSet:
    """Named splits and the preprocessing of their inputs.

    The preprocessing steps are applied in the order of the attributes.

    Attributes:
        splits: The splits by name.
        scale: Whether uint8 inputs are divided by 255, as for image files.
        mean: Mean per channel (dimension 1) to subtract; None to skip.
        std: Standard deviation per channel to divide by; None to skip.
        flatten: Whether each example is flattened to one dimension.
        language: Whether the targets are the tokens of the inputs.
        notes: Notes for the user about the inputs.
        whole: Whether the inputs of a split are whole batches, see `parse_batch`.
    """

    splits: Mapping[str, Examples]
    scale: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    flatten: bool = False
    language: bool = False
    notes: tuple[str, ...] = ()
    whole: bool = False

    @property
    def task(self) -> Task:
        """The task: integer targets mean classification, other targets regression."""
        if self.language:
            return "language"
        firsts = (realise(split.first(1).targets) for split in self.splits.values())
        floating = any(not isinstance(t, Tensor) or t.is_floating_point() for t in firsts)
        return "regression" if floating else "classification"

    def prepare(self, inputs: Nest, dtype: torch.dtype) -> Nest:
        """Returns a batch of stored inputs as the model gets them.

        Floating-point tensors are converted to ``dtype``, and so are uint8 tensors if they are
        scaled or normalised; both are then normalised and flattened. Other integers (token ids) and
        booleans (masks) are unchanged. A list of examples, or an object, becomes the only
        positional argument.
        """
        if isinstance(inputs, Ragged):
            inputs = (inputs,)
        return map_nest(lambda tensor: self._prepare(tensor, dtype), realise(inputs))

    def prepare_batch(self, batch: Split, dtype: torch.dtype) -> Any:
        """Returns a whole batch as an objective gets it.

        It is as the user's code returns it, or ``(inputs, targets)`` of a built-in format, with the
        inputs of `prepare`. All floating-point tensors are converted to ``dtype``.
        """

        def convert(x: Tensor) -> Tensor:
            # A tensor of its own, so that requires_grad_ does not reach the stored one.
            return x.detach().to(dtype) if x.is_floating_point() else x

        if self.whole:
            return realise(map_nest(convert, batch.inputs))
        inputs = self.prepare(batch.inputs, dtype)
        return map_nest(Tensor.detach, inputs), realise(map_nest(convert, batch.targets))

    def _prepare(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if x.dtype == torch.uint8:
            if self.scale:
                x = x.to(dtype).div_(255)
            elif self.mean is not None or self.std is not None:
                x = x.to(dtype)
        elif x.is_floating_point():
            x = x.to(dtype)
        else:
            return x
        for values, apply in ((self.mean, torch.sub), (self.std, torch.div)):
            if values is not None:
                channel = _channels(values, dtype, x.device)
                x = apply(x, channel.view(-1, *[1] * (x.ndim - 2)))
        return x.flatten(1) if self.flatten else x

    def select(self, names: Sequence[str], limit: int | None, seed: int) -> DataSet:
        """Returns the data set of drawn examples, in their original order, of some splits.

        Args:
            names: Names of the splits; all if empty.
            limit: Number of examples per split; None for all.
            seed: Random seed of the draw.

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
        selected: dict[str, Examples] = {}
        for name in dict.fromkeys(names or self.splits):
            split = self.splits[name]
            if limit is not None:
                split = split.draw(limit, torch.Generator().manual_seed(seed))
            selected[name] = split
        return replace(self, splits=selected)


@lru_cache(maxsize=8)
def _channels(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Makes a tensor of a number per channel once: copying it to a GPU would block every batch."""
    return torch.tensor(values, dtype=dtype, device=device)
