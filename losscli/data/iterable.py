"""Examples that come one after the other, from an iterable that is iterated anew in each pass."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from losscli.data.batch import RaggedError, is_language, join, parse_batch
from losscli.data.randomness import capture, private_randomness, restore, seed_all
from losscli.data.split import Batches, Examples, Split, remark_on
from losscli.data.stream import Failure, Parcel, Prepare, children_unheard, own, signals_held
from losscli.errors import DataError, one_line
from losscli.spec import own_folders_in_path

__all__ = ["IterableStream", "Source"]

# Examples that an iterable without batches of its own is asked for at a time.
_AT_A_TIME = 64

# Seconds of counting after which a stream may be endless.
_LONG = 10.0

_LOG = logging.getLogger("losscli")

# So many examples tell others than those that were.
_TELLING = 16

# Between the tracebacks of errors of which one led to the next.
_CHAINED = re.compile(
    r"^(?:The above exception was the direct cause of the following exception"
    r"|During handling of the above exception, another exception occurred):$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class _Collate:
    """Makes parcels of what a loader collates, wherever it does."""

    collate: Callable[[Any], Any]
    where: str
    in_batches: bool

    def __call__(self, rows: Any) -> Parcel | Failure:
        try:
            raw = self.collate(rows)
            batch = parse_batch(raw, self.where)
            whole = Batches.of(batch) if self.in_batches else batch
            return Parcel.pack(whole, language=is_language(raw))
        except DataError as error:
            return Failure(error.what, error.cure)
        except Exception as error:  # noqa: BLE001 - one line of it is told
            return Failure(f"{self.where} failed: {one_line(error)}", "")


class _First(IterableDataset[Any]):
    """The first examples of an iterable data set; no further one is asked for."""

    def __init__(self, dataset: IterableDataset[Any], number: int | None) -> None:
        self._dataset = dataset
        self._number = number

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self._dataset), self._number)


class Source:
    """Gives batches, anew in each pass, and from the same seed.

    Args:
        data: A loader that gives them, which is left as it is; or a data set without batches.
        where: What to call it in errors.
        seed: Of everything random in a pass.
        clock: Tells seconds.
        size: Examples per batch of a data set without batches.
        in_batches: Whether each batch counts as one example.

    Attributes:
        language: Whether the targets of the batches seen are the tokens of the inputs.
    """

    def __init__(
        self,
        data: DataLoader[Any] | IterableDataset[Any],
        where: str,
        seed: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        size: int = _AT_A_TIME,
        in_batches: bool = False,
    ) -> None:
        self.where = where
        self.in_batches = in_batches
        self.language = False
        self.clock = clock
        self._dataset = None if isinstance(data, DataLoader) else data
        self._size = size
        loader = data if isinstance(data, DataLoader) else self._load(data, None)
        self._collate = _Collate(loader.collate_fn, where, in_batches)
        self._loader = copy.copy(loader)
        self._loader.collate_fn = self._collate
        self._loader._iterator = None
        if not isinstance(loader.worker_init_fn, Prepare):
            self._loader.worker_init_fn = Prepare(loader.worker_init_fn)
        with private_randomness():
            seed_all(seed)
            self._start = capture()

    def _load(self, dataset: IterableDataset[Any], stop: int | None) -> DataLoader[Any]:
        if stop is not None and self.in_batches:
            stop *= self._size
        return DataLoader(_First(dataset, stop), batch_size=self._size)

    def batches(self, stop: int | None = None) -> Iterator[Split]:
        """Goes by the data once.

        Args:
            stop: How many examples are needed. Batches of the user's own are whole.

        Yields:
            The batches as they come, of any size.

        Raises:
            DataError: Its code fails, or a batch is not understood.
        """
        state, seen, loader = self._start, 0, self._loader
        if self._dataset is not None and stop is not None:
            loader = self._load(self._dataset, stop)
            loader.collate_fn = self._collate
        batches: Iterator[Parcel | Failure] | None = None
        try:
            while True:
                # What it draws is no matter of whoever draws between two batches.
                with private_randomness(), children_unheard(), own_folders_in_path():
                    restore(state)
                    try:
                        if batches is None:
                            # Without workers this runs the user's own code, for any time.
                            with signals_held() if loader.num_workers else nullcontext():
                                batches = iter(loader)
                        found = next(batches, None)
                    except Exception as error:
                        # torch waits five seconds for a worker whose iterable has failed.
                        for worker in getattr(batches, "_workers", ()):
                            worker.terminate()
                        raise DataError(
                            f"{self.where} failed after {seen} examples: {_cause(error)}"
                        ) from error
                    state = capture()
                if found is None:
                    return
                if isinstance(found, Failure):
                    raise DataError(found.what, found.cure)
                self.language |= found.language
                batch = found.unpack()
                seen += len(batch)
                yield batch
        finally:
            # An iterator that is dropped waits for its workers, where a signal would be lost.
            with children_unheard():
                for worker in getattr(batches, "_workers", ()):
                    worker.terminate()
                batches = None


def _cause(error: BaseException) -> str:
    """The type and text of an error; of one in a worker, out of the traceback it comes with."""
    report = re.match(r"Caught (\w+) .*\.\nOriginal Traceback", text := str(error))
    if report is None:
        return one_line(error)
    kind = report[1]
    # The text may have several lines; those of the traceback are indented.
    last = _CHAINED.split(text)[-1]
    found = re.search(rf"(?ms)^(?:[\w.<>]+\.)?({kind}(?::.*)?)\Z", last.strip())
    return " ".join(found[1].split()) if found else kind


class IterableStream(Examples):
    """Examples of an iterable, in the order in which it gives them.

    Args:
        source: Gives them.
        start: How many of its examples come before these.
        stop: How many it gives at most until the last of these; to its end where None.
    """

    nbytes = 0

    def __init__(self, source: Source, start: int = 0, stop: int | None = None) -> None:
        self._source = source
        self._start = start
        self._stop = stop
        self._length: int | None = None
        self._sizes: list[int] = []
        self._checksum: int | None = None
        self._firsts: dict[int, Split] = {}

    def __len__(self) -> int:
        if self._length is None:
            count = sum(map(len, self._pass()))
            self._length = count
        return self._length

    @property
    def in_batches(self) -> bool:
        """Whether each of them is a whole batch."""
        return self._source.in_batches

    @property
    def rows(self) -> int:
        """The number of examples, also of those in whole batches."""
        count = len(self)
        return sum(self._sizes) if self.in_batches else count

    @property
    def language(self) -> bool:
        """Whether the targets are the tokens of the inputs."""
        self.first(1)
        return self._source.language

    @cached_property
    def digest(self) -> str:
        """A digest of the first of them, of where they are, and of all where these were seen."""
        told = [self.first(_TELLING).digest, self._start, len(self), self._checksum]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    @property
    def remarks(self) -> tuple[str, ...]:
        """What to know about these examples."""
        anew = "iterated anew in each pass over the data"
        part = f"{anew}; a part of it is its first examples, and not drawn"
        return part, *(remark_on(self._sizes) if self.in_batches and self._sizes else ())

    def order(self, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """Tells the only order in which the examples are to be had.

        Args:
            generator: Not drawn from.

        Returns:
            Positions, ``[N]``, ascending.
        """
        return torch.arange(len(self))

    def draw(self, number: int, generator: torch.Generator) -> IterableStream:  # noqa: ARG002
        """Takes the first examples: there is nothing to draw from.

        Args:
            number: How many; all where there are fewer.
            generator: Not drawn from.

        Returns:
            Those examples, not counted yet.
        """
        stop = self._start + number
        if self._stop is not None:
            stop = min(stop, self._stop)
        return IterableStream(self._source, self._start, stop)

    def take(self, index: Tensor | slice) -> IterableStream:
        """Picks examples that follow each other.

        Args:
            index: Which ones: ascending positions ``[n]``, or a slice.

        Returns:
            Those examples.
        """
        if isinstance(index, Tensor):
            index = slice(int(index[0]), int(index[-1]) + 1)
        start, stop, _ = index.indices(len(self))
        part = IterableStream(self._source, self._start + start, self._start + stop)
        part._length = stop - start
        return part

    def batches(self, size: int, order: Tensor | None = None) -> Iterator[Split]:
        """Goes by the examples once, a batch at a time.

        Args:
            size: Examples a batch; the last one may have fewer.
            order: Ascending positions ``[n]`` that follow each other; all where it is None.

        Yields:
            The batches.

        Raises:
            DataError: They are other examples than in the first pass, or more, or fewer.
        """
        if order is not None:
            yield from self.take(order).batches(size)
            return
        if self.in_batches:
            yield from self._pass()
            return
        waiting: list[Split] = []
        count = 0
        for batch in self._pass():
            waiting.append(batch)
            count += len(batch)
            if count < size:
                continue
            whole = join(waiting, self._source.where)
            full = count - count % size
            for start in range(0, full, size):
                yield whole.take(slice(start, start + size))
            waiting = [whole.take(slice(full, None))] if count > full else []
            count -= full
        if waiting:
            yield join(waiting, self._source.where)

    def first(self, number: int) -> Split:
        """Takes the first examples into memory, and remembers them.

        Args:
            number: How many; all where there are fewer.

        Returns:
            Those examples.
        """
        if number not in self._firsts:
            # Where there is none at all, the pass says so.
            part = self.draw(number, torch.Generator())
            self._firsts[number] = next(part.batches(number))
        return self._firsts[number]

    def decode(self, budget: int) -> Split | None:
        """Takes all examples into memory, where they fit; else they are counted.

        Args:
            budget: The bytes that they may take.

        Returns:
            The examples; None where they take more.

        Raises:
            DataError: They cannot be had, or do not fit together.
        """
        batches: list[Split] | None = []
        taken = 0
        for batch in self._pass():
            taken += batch.nbytes
            if batches is not None:
                batches.append(own(batch))
            if taken > budget:
                batches = None
        try:
            return None if batches is None else join(batches, self._source.where)
        except RaggedError:
            # Batches that count as one need not be joined: they come anew in each pass.
            if self.in_batches:
                return None
            raise

    def _pass(self) -> Iterator[Split]:
        """Goes by the examples in batches as they come, and holds each pass against the first."""
        position, count, checksum = 0, 0, 0
        begun = self._source.clock() if self._stop is None and self._length is None else None
        sizes: list[int] = []
        for batch in self._source.batches(self._stop):
            if begun is not None and (spent := self._source.clock() - begun) >= _LONG:
                _LOG.warning(
                    "%s: %s examples in %.0f s and no end yet. If it is endless, give --limit",
                    *(self._source.where, f"{position:,}", spent),
                )
                begun = None
            first = max(0, self._start - position)
            last = len(batch) if self._stop is None else min(len(batch), self._stop - position)
            position += len(batch)
            if first < last:
                part = batch.take(slice(first, last))
                count += len(part)
                sizes.append(part.rows)
                for _, _, content in Parcel.pack(part).columns:
                    checksum = zlib.crc32(np.asarray(content).data, checksum)
                yield part
            if position == self._stop or last < len(batch):
                break
        if not count:
            raise DataError(f"{self._source.where} is empty")
        if self._length not in {None, count}:
            wrong = f"gives {count} examples in one pass and {self._length} in another"
        elif self._checksum not in {None, checksum}:
            wrong = "gives other examples, or another order, in each pass"
        else:
            self._length, self._checksum, self._sizes = count, checksum, sizes
            return
        raise DataError(
            f"{self._source.where} {wrong}",
            "Losses of one example are compared: seed its generator where its iteration begins",
        )
