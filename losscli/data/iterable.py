"""Data sets that can only be read sequentially, and are iterated again on every pass."""

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
from torch.utils.data import DataLoader, IterableDataset, default_collate

from losscli.data.batch import RaggedError, is_language, join, parse_batch
from losscli.data.randomness import capture, private_randomness, restore, seed_all
from losscli.data.split import Batches, Examples, Split, batch_size_remarks
from losscli.data.stream import (
    PackedBatch,
    WorkerInit,
    default_sigchld,
    deferred_signals,
    leave_shared_memory,
)
from losscli.errors import DataError, one_line
from losscli.spec import user_folders_on_path

__all__ = ["IterableStream", "Source"]

# Default batch size for an iterable that yields single examples.
_BATCH_SIZE = 64

# Seconds after which to warn that a stream may be infinite.
_SLOW_SECONDS = 10.0

_LOG = logging.getLogger("losscli")

# Number of examples in a digest.
_DIGEST_EXAMPLES = 16

# The line between the tracebacks of chained exceptions.
_CHAINED = re.compile(
    r"^(?:The above exception was the direct cause of the following exception"
    r"|During handling of the above exception, another exception occurred):$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class _Collate:
    """Collates and serializes batches, in a worker or in this process."""

    collate: Callable[[Any], Any]
    where: str
    in_batches: bool
    in_rows: bool
    whole: bool

    def __call__(self, rows: Any) -> PackedBatch | DataError:
        try:
            raw = self.collate(rows)
            known = rows if self.in_rows else None
            batch = parse_batch(raw, self.where, known, self.collate, whole=self.whole)
            batch = Batches.of(batch) if self.in_batches else batch
            return PackedBatch.pack(batch, language=is_language(raw))
        except DataError as error:
            return error
        except Exception as error:  # noqa: BLE001 - reported in one line
            cure = (
                "If it yields batches, give torch.utils.data.DataLoader(it, batch_size=None); if "
                "examples differ in shape, give a DataLoader with a collate_fn"
                if self.collate is default_collate
                else ""
            )
            return DataError(f"{self.where} failed: {one_line(error)}", cure)


class _First(IterableDataset[Any]):
    """The first examples of an iterable data set; it requests no further ones."""

    def __init__(self, dataset: IterableDataset[Any], number: int | None) -> None:
        self._dataset = dataset
        self._number = number

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self._dataset), self._number)


class Source:
    """Reads the batches of an iterable; every pass starts from the same seed.

    Args:
        data: A DataLoader, which is not modified, or a data set of single examples.
        where: Name of the data in error messages.
        seed: Random seed of each pass.
        clock: Returns the time in seconds.
        size: Examples per batch for a data set of single examples.
        in_batches: Whether each batch counts as one example.
        whole: As for `parse_batch`.

    Attributes:
        language: Whether the targets of any batch read so far are the tokens of its inputs.
    """

    def __init__(
        self,
        data: DataLoader[Any] | IterableDataset[Any],
        where: str,
        seed: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        size: int = _BATCH_SIZE,
        in_batches: bool = False,
        whole: bool = False,
    ) -> None:
        self.where = where
        self.in_batches = in_batches
        self.language = False
        self.clock = clock
        self._dataset = None if isinstance(data, DataLoader) else data
        self._size = size
        loader = data if isinstance(data, DataLoader) else self._load(data, None)
        self._collate = _Collate(
            loader.collate_fn,
            where,
            in_batches,
            in_rows=loader.batch_sampler is not None,
            whole=whole,
        )
        self._loader = copy.copy(loader)
        self._loader.collate_fn = self._collate
        self._loader._iterator = None
        if not isinstance(loader.worker_init_fn, WorkerInit):
            self._loader.worker_init_fn = WorkerInit(loader.worker_init_fn)
        with private_randomness():
            seed_all(seed)
            self._start = capture()

    def _load(self, dataset: IterableDataset[Any], stop: int | None) -> DataLoader[Any]:
        if stop is not None and self.in_batches:
            stop *= self._size
        return DataLoader(_First(dataset, stop), batch_size=self._size)

    def batches(self, stop: int | None = None) -> Iterator[Split]:
        """Yields the batches, of any size, of one pass over the data.

        Args:
            stop: Number of examples needed; a DataLoader may yield more. None for all.

        Raises:
            DataError: The user's code fails, or a batch cannot be interpreted.
        """
        state, count, loader = self._start, 0, self._loader
        if self._dataset is not None and stop is not None:
            loader = self._load(self._dataset, stop)
            loader.collate_fn = self._collate
        batches: Iterator[PackedBatch | DataError] | None = None
        try:
            while True:
                # Code that runs between two batches must not affect the random state of the data.
                with private_randomness(), default_sigchld(), user_folders_on_path():
                    restore(state)
                    try:
                        if batches is None:
                            # Without workers this runs user code, which may take long.
                            with deferred_signals() if loader.num_workers else nullcontext():
                                batches = iter(loader)
                        packed = next(batches, None)
                    except Exception as error:
                        # torch waits five seconds for a worker with a failed iterable.
                        for worker in getattr(batches, "_workers", ()):
                            worker.terminate()
                        raise DataError(
                            f"{self.where} failed after {count} examples: {_cause(error)}"
                        ) from error
                    state = capture()
                if packed is None:
                    return
                if isinstance(packed, DataError):
                    raise packed
                self.language |= packed.language
                batch = packed.unpack(self._collate.collate)
                count += len(batch)
                yield batch
        finally:
            # Deleting the iterator waits for its workers, and a signal would be lost meanwhile.
            with default_sigchld():
                for worker in getattr(batches, "_workers", ()):
                    worker.terminate()
                batches = None


def _cause(error: BaseException) -> str:
    """Returns the type and message of an error, extracted from the traceback of a worker."""
    report = re.match(r"Caught (\w+) .*\.\nOriginal Traceback", text := str(error))
    if report is None:
        return one_line(error)
    kind = report[1]
    # The message may have several lines; those of the traceback are indented.
    last = _CHAINED.split(text)[-1]
    message = re.search(rf"(?ms)^(?:[\w.<>]+\.)?({kind}(?::.*)?)\Z", last.strip())
    return " ".join(message[1].split()) if message else kind


class IterableStream(Examples):
    """Examples ``start`` to ``stop`` of an iterable, in its order.

    Args:
        source: The source of the examples.
        start: Index of the first example.
        stop: Index after the last example; None for the end of the iterable.
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
        """Whether each element is a whole batch."""
        return self._source.in_batches

    @property
    def rows(self) -> int:
        """The number of examples, counting those inside whole batches."""
        count = len(self)
        return sum(self._sizes) if self.in_batches and all(self._sizes) else count

    @property
    def language(self) -> bool:
        """Whether the targets are the tokens of the inputs."""
        self.first(1)
        return self._source.language

    @cached_property
    def digest(self) -> str:
        """A digest of the first examples, of their range, and of the checksum if it is known."""
        content = [self.first(_DIGEST_EXAMPLES).digest, self._start, len(self), self._checksum]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def remarks(self) -> tuple[str, ...]:
        """Remarks for the user about these examples."""
        sequential = (
            "iterated again in each pass over the data; a part of it is its first examples, which "
            "are not drawn at random"
        )
        return sequential, *(
            batch_size_remarks(self._sizes) if self.in_batches and self._sizes else ()
        )

    def order(self, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """Returns the sequential order, since an iterable has no random access."""
        return torch.arange(len(self))

    def draw(self, number: int, generator: torch.Generator) -> IterableStream:  # noqa: ARG002
        """Selects the first examples, since an iterable has no random access."""
        stop = self._start + number
        if self._stop is not None:
            stop = min(stop, self._stop)
        return IterableStream(self._source, self._start, stop)

    def take(self, index: Tensor | slice) -> IterableStream:
        """Selects consecutive examples."""
        if isinstance(index, Tensor):
            index = slice(int(index[0]), int(index[-1]) + 1)
        start, stop, _ = index.indices(len(self))
        part = IterableStream(self._source, self._start + start, self._start + stop)
        part._length, part._sizes = stop - start, self._sizes[start:stop]
        return part

    def batches(self, size: int, order: Tensor | None = None) -> Iterator[Split]:
        """Yields the batches of one pass; ``order`` are consecutive indices ``[n]``.

        Raises:
            DataError: The examples or their number differ from the first pass.
        """
        if order is not None:
            yield from self.take(order).batches(size)
            return
        if self.in_batches:
            yield from self._pass()
            return
        pending: list[Split] = []
        count = 0
        for batch in self._pass():
            pending.append(batch)
            count += len(batch)
            if count < size:
                continue
            whole = join(pending, self._source.where)
            full = count - count % size
            for start in range(0, full, size):
                yield whole.take(slice(start, start + size))
            pending = [whole.take(slice(full, None))] if count > full else []
            count -= full
        if pending:
            yield join(pending, self._source.where)

    def first(self, number: int) -> Split:
        """Loads the first examples into memory and caches them."""
        if number not in self._firsts:
            # An empty iterable raises in `batches`.
            part = self.draw(number, torch.Generator())
            self._firsts[number] = next(part.batches(number))
        return self._firsts[number]

    def decode(self, budget: int) -> Split | None:
        """Returns all examples in memory; None if they need more than ``budget`` bytes.

        They are counted either way.

        Raises:
            DataError: The examples cannot be read or joined.
        """
        batches: list[Split] | None = []
        size = 0
        for batch in self._pass():
            size += batch.nbytes
            if batches is not None:
                batches.append(leave_shared_memory(batch))
            if size > budget:
                batches = None
        try:
            return None if batches is None else join(batches, self._source.where)
        except RaggedError:
            # Whole batches of different shapes can be read again on every pass.
            if self.in_batches:
                return None
            raise

    def _pass(self) -> Iterator[Split]:
        """Iterates over the batches of the source and compares each pass with the first."""
        position, count, checksum = 0, 0, 0
        started = self._source.clock() if self._stop is None and self._length is None else None
        sizes: list[int] = []
        for batch in self._source.batches(self._stop):
            if started is not None and (elapsed := self._source.clock() - started) >= _SLOW_SECONDS:
                _LOG.warning(
                    "%s: %s examples in %.0f s and no end yet. If it is endless, give --limit",
                    *(self._source.where, f"{position:,}", elapsed),
                )
                started = None
            first = max(0, self._start - position)
            last = len(batch) if self._stop is None else min(len(batch), self._stop - position)
            position += len(batch)
            if first < last:
                part = batch.take(slice(first, last))
                count += len(part)
                sizes.append(0 if part.is_undivided else part.rows)
                for _, _, content in PackedBatch.pack(part).columns:
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
