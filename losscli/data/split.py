"""Splits of examples, and the data set that they make."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Self

import torch
from torch import Tensor

from losscli.errors import UsageError
from losscli.weight_space.digest import digest

__all__ = ["Batches", "DataSet", "Examples", "Inputs", "Split", "Task", "leaves", "map_inputs"]

Task = Literal["classification", "regression", "language"]

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
"""What a model takes: one tensor, several by position, or several by name; each ``[N, *]``."""


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


class Examples(ABC):
    """The examples of one split, in a fixed order, wherever they are."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of examples."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """The bytes that they take in memory; nothing where they are decoded in each pass."""

    @property
    def rows(self) -> int:
        """The number of examples, also of those in whole batches."""
        return len(self)

    @property
    def in_batches(self) -> bool:
        """Whether each of them is a whole batch, as for a loss that is one number per batch."""
        return False

    @property
    @abstractmethod
    def digest(self) -> str:
        """A digest of what they are, 64 hexadecimal digits, as far as it can be told at once."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """What to know about them."""
        return ()

    @property
    def decoders(self) -> int:
        """How many processes decode them at a time."""
        return 1

    def order(self, generator: torch.Generator) -> Tensor:
        """Draws a random order to look at them in.

        Args:
            generator: Of the draw.

        Returns:
            Positions, ``[N]``; ascending where examples are to be had in their own order alone.
        """
        return torch.randperm(len(self), generator=generator)

    def position(self, index: int) -> int:
        """Finds an example in the data that these are a part of.

        Args:
            index: Its place among these examples.

        Returns:
            Its position there, where it is known; else its place among these.
        """
        return index

    @abstractmethod
    def take(self, index: Tensor | slice) -> Examples:
        """Picks examples.

        Args:
            index: Which ones: positions ``[n]`` or a slice, in this order.

        Returns:
            Those examples.
        """

    def draw(self, number: int, generator: torch.Generator) -> Examples:
        """Draws examples without replacement.

        Args:
            number: How many; all where there are fewer.
            generator: Of the draw.

        Returns:
            Those examples, in the order that they had.
        """
        if number >= len(self):
            return self
        return self.take(self.order(generator)[:number].sort().values)

    @abstractmethod
    def batches(self, size: int, order: Tensor | None = None) -> Iterator[Split]:
        """Goes by the examples once, a batch at a time.

        Args:
            size: Examples a batch; the last one may have fewer.
            order: Positions ``[n]``, as `order` draws them, or a part of them; all in their own
                order where it is None.

        Yields:
            The batches, in memory where the examples are.
        """

    def spread(self, number: int) -> tuple[Split, Tensor]:
        """Takes examples from all parts of a split that is in memory; else the first ones.

        Args:
            number: How many; all where there are fewer.

        Returns:
            Those examples, and their positions.
        """
        few = self.first(number)
        return few, torch.arange(len(few))

    @abstractmethod
    def first(self, number: int) -> Split:
        """Takes the first examples into memory.

        Args:
            number: How many; all where there are fewer.

        Returns:
            Those examples.
        """


@dataclass(frozen=True)
class Split(Examples):
    """Examples that are in memory.

    Attributes:
        inputs: Their inputs as stored: images may be uint8.
        targets: Their targets, ``[N, *]``: whole numbers or bool for classification,
            floating-point else.
    """

    inputs: Inputs
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def nbytes(self) -> int:
        """The bytes that they take in memory."""
        return sum(tensor.nbytes for tensor in (*leaves(self.inputs), self.targets))

    @property
    def rows(self) -> int:
        """The number of examples."""
        return len(self.targets)

    @cached_property
    def digest(self) -> str:
        """A digest of all of them."""
        keys = list(self.inputs) if isinstance(self.inputs, dict) else []
        columns = [*leaves(self.inputs), self.targets]
        return digest({f"{i} {keys[i : i + 1]}": column for i, column in enumerate(columns)})

    def take(self, index: Tensor | slice) -> Split:
        """Picks examples.

        Args:
            index: Which ones: positions ``[n]`` or a slice.

        Returns:
            Those examples; by a slice, without a copy.
        """
        if isinstance(index, Tensor):
            index = index.to(self.targets.device)
        return Split(map_inputs(lambda t: t[index], self.inputs), self.targets[index])

    def batches(self, size: int, order: Tensor | None = None) -> Iterator[Split]:
        """Goes by the examples once, a batch at a time.

        Args:
            size: Examples a batch; the last one may have fewer.
            order: Positions ``[n]``; all in their own order where it is None.

        Yields:
            The batches.
        """
        for start in range(0, len(self) if order is None else len(order), size):
            part = slice(start, start + size)
            yield self.take(part if order is None else order[part])

    def first(self, number: int) -> Split:
        """Takes the first examples.

        Args:
            number: How many; all where there are fewer.

        Returns:
            Those examples.
        """
        return self.take(slice(0, number))

    def spread(self, number: int) -> tuple[Split, Tensor]:
        """Takes examples from all parts of the split: sorted data begin with a single class.

        Positions are random, and the same in each call: where kinds of examples alternate, evenly
        spaced positions miss some. Each class gives as many examples as the others, as far as it
        has them.

        Args:
            number: How many; all where there are fewer.

        Returns:
            Those examples in their order, and their positions.
        """
        rows = torch.arange(len(self))
        if number < len(self):
            rows = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))
            if self.has_classes:
                rows = rows[_alternate(self.targets.cpu()[rows])]
            rows = rows[:number].sort().values
        return self.take(rows), rows

    @property
    def has_classes(self) -> bool:
        """Whether each example has one class: a whole number."""
        whole = not (self.targets.is_floating_point() or self.targets.is_complex())
        return whole and self.targets.ndim == 1 and not self.in_batches

    def to(self, device: torch.device) -> Self:
        """Moves the split to a device.

        Args:
            device: Where to.

        Returns:
            The split there, in the types it is stored in.
        """
        return self.map(lambda tensor: tensor.to(device))

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Applies a function to the inputs and the targets.

        Args:
            function: What to apply; it keeps the number of examples.

        Returns:
            The split of the results.
        """
        inputs = map_inputs(function, self.inputs)
        return replace(self, inputs=inputs, targets=function(self.targets))

    def send(self, device: torch.device) -> Self:
        """Moves a batch to a device without waiting for it.

        Args:
            device: Where to.

        Returns:
            The batch there; itself, where it is there already.
        """
        if self.is_on(device):
            return self
        if device.type != "cuda" or self.targets.device.type != "cpu":
            return self.to(device)

        # Only what is pinned is copied while the host goes on.
        def copy(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(device, non_blocking=True)

        return self.map(copy)

    def is_on(self, device: torch.device) -> bool:
        """Tells where the split is.

        Args:
            device: A device.

        Returns:
            Whether it is there.
        """
        here = self.targets.device
        return here.type == device.type and device.index in {None, here.index}


@dataclass(frozen=True)
class Batches(Split):
    """Whole batches that are in memory: each of them counts as one example.

    Attributes:
        sizes: The number of examples in each batch, in order.
    """

    sizes: tuple[int, ...]

    @classmethod
    def of(cls, split: Split, size: int | None = None) -> Self:
        """Cuts examples into batches, in their order.

        Args:
            split: The examples.
            size: Examples per batch, of which the last one may have fewer; None for one batch.

        Returns:
            The batches.
        """
        rows = split.rows
        size = size or rows
        sizes = tuple(min(size, rows - start) for start in range(0, rows, size))
        return cls(split.inputs, split.targets, sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def in_batches(self) -> bool:
        """Each of them is a whole batch."""
        return True

    @cached_property
    def digest(self) -> str:
        """A digest of all examples and of how they are cut."""
        return digest({super().digest: torch.tensor(self.sizes)})

    @property
    def remarks(self) -> tuple[str, ...]:
        """Whether the batches differ in size."""
        return remark_on(self.sizes)

    def take(self, index: Tensor | slice) -> Batches:
        """Picks batches.

        Args:
            index: Which ones: positions ``[n]`` or a slice.

        Returns:
            Those batches; by a slice, without a copy.
        """
        starts = [0, *itertools.accumulate(self.sizes)]
        if isinstance(index, slice):
            first, last, _ = index.indices(len(self))
            rows = slice(starts[first], starts[max(first, last)])
            return Batches(*self._rows(rows), self.sizes[first:last])
        chosen = index.tolist()
        spans = [torch.arange(starts[i], starts[i + 1]) for i in chosen]
        order = torch.cat([torch.empty(0, dtype=torch.long), *spans]).to(self.targets.device)
        return Batches(*self._rows(order), tuple(self.sizes[i] for i in chosen))

    def _rows(self, index: Tensor | slice) -> tuple[Inputs, Tensor]:
        return map_inputs(lambda t: t[index], self.inputs), self.targets[index]


def _alternate(classes: Tensor) -> Tensor:
    """Orders examples so that the first of each class come first, then the second ones, and so on.

    Args:
        classes: The class of each example, ``[N]``.

    Returns:
        Their positions, ``[N]``.
    """
    _, index, counts = classes.unique(return_inverse=True, return_counts=True)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    place = torch.empty_like(index)
    place[index.argsort(stable=True)] = torch.arange(len(classes)) - starts
    return place.argsort(stable=True)


def remark_on(sizes: Iterable[int]) -> tuple[str, ...]:
    """Says whether batches differ in size.

    Args:
        sizes: The number of examples in each batch.

    Returns:
        The remark, if they do.
    """
    least, most = min(sizes := set(sizes)), max(sizes)
    if least == most:
        return ()
    return (f"the batches have {least} to {most} examples, and each batch counts the same",)


@dataclass(frozen=True)
class DataSet:
    """Named splits, and how the inputs are scaled on their way into a model.

    Attributes:
        splits: The splits by name.
        scale: Whether uint8 inputs are divided by 255, as those of the readers of images are.
        mean: Subtracted from each channel (dimension 1) after that; None for none.
        std: Divides each channel after that; None for none.
        flatten: Whether each example is flattened to one dimension.
        language: Whether the targets are the tokens of the inputs themselves.
        notes: What the user should know about the inputs.
    """

    splits: Mapping[str, Examples]
    scale: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    flatten: bool = False
    language: bool = False
    notes: tuple[str, ...] = ()

    @property
    def task(self) -> Task:
        """What the targets ask for: whole numbers are classes, others are to be regressed."""
        if self.language:
            return "language"
        firsts = (split.first(1) for split in self.splits.values())
        floating = any(first.targets.is_floating_point() for first in firsts)
        return "regression" if floating else "classification"

    def prepare(self, inputs: Inputs, dtype: torch.dtype) -> Inputs:
        """Makes stored inputs what the model takes.

        Args:
            inputs: A batch as stored.
            dtype: The type of the forward pass.

        Returns:
            Floating-point as ``dtype``; uint8 too, where it is scaled or normalised. Both are
            then normalised and flattened. Other integers (token ids) and booleans (masks) as they
            are.
        """
        return map_inputs(lambda tensor: self._prepare(tensor, dtype), inputs)

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
            if limit is not None:
                split = split.draw(limit, torch.Generator().manual_seed(seed))
            chosen[name] = split
        return replace(self, splits=chosen)
