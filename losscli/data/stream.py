"""Examples that are decoded as they are needed, anew in each pass over the data."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.context import BaseContext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from losscli.data.batch import RaggedError, is_language, join, parse_batch
from losscli.data.images import Images
from losscli.data.memory import host_budget
from losscli.data.randomness import private_randomness, seed_all
from losscli.data.split import Batches, Examples, Split, leaves, remark_on
from losscli.errors import DataError, one_line
from losscli.spec import own_folders_in_path

__all__ = [
    "BatchDecoder",
    "Decoder",
    "Failure",
    "Parcel",
    "Prepare",
    "Stream",
    "Workers",
    "children_unheard",
    "own",
    "signals_held",
]

# Bytes of examples for which no worker is started: that takes as long as decoding them.
_TINY = 64 << 20

_MOST_WORKERS = 8

# Files that a worker keeps open in this process, and those that are left for everything else.
_FILES_EACH = 4
_FILES_LEFT = 24

# Open files that a process may have, where batches have some of their own.
_FILES_TO_SHARE = 1024

# So many examples, evenly spaced, tell others than those that were.
_TELLING = 16

# What is decoded at once on the way into memory.
_DECODED_EXAMPLES = 512
_DECODED_BYTES = 64 << 20

# Signals that end a run.
_ENDING = {signal.SIGINT, signal.SIGTERM}

_GOLDEN = 0x9E3779B97F4A7C15


class Decoder:
    """Decodes examples of a map-style data set by their positions.

    Before each example the generators of Python, NumPy and torch are seeded by its position: what
    an example is drawn to be does not depend on the pass, the batch or the worker.

    Args:
        dataset: The data set.
        collate: Makes a batch of a list of its examples.
        where: What to call it in errors.
        seed: Of everything random in it.
    """

    def __init__(
        self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any], where: str, seed: int
    ) -> None:
        self.where = where
        self._dataset = dataset
        self._collate = collate
        self._seed = seed

    def state(self, positions: list[int]) -> str:
        """Tells one state of what examples are decoded from, from another, as far as is known.

        Args:
            positions: Of the examples.

        Returns:
            What the data set says; nothing where it is the user's own.
        """
        return self._dataset.state(positions) if isinstance(self._dataset, Images) else ""

    def __call__(self, positions: list[int]) -> Split:
        """Decodes a batch.

        Args:
            positions: Of its examples.

        Returns:
            The batch.

        Raises:
            DataError: An example cannot be decoded, or the batch is not understood.
        """
        batch = parse_batch(self.collated(positions), self.where)
        if len(batch) != len(positions):
            raise DataError(
                f"{self.where}: a batch of {len(positions)} examples is collated to {len(batch)}",
                "Leave examples out in the Dataset (torch.utils.data.Subset), not in collate_fn",
            )
        return batch

    def collated(self, positions: list[int]) -> Any:
        """Decodes a batch, and leaves it as it is.

        Args:
            positions: Of its examples.

        Returns:
            The batch as the user's code gives it.

        Raises:
            DataError: An example cannot be decoded.
        """
        with private_randomness():
            examples = [self._example(position) for position in positions]
            try:
                return self._collate(examples)
            except DataError:
                raise
            except Exception as error:
                raise DataError(
                    f"{self.where} failed on the batch from example {positions[0]} on: "
                    f"{one_line(error)}"
                ) from error

    def _example(self, position: int) -> Any:
        seed = (self._seed * _GOLDEN + position) % (1 << 63)
        seed_all(seed)
        try:
            return self._dataset[position]
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"{self.where} failed at example {position}: {one_line(error)}"
            ) from error


class BatchDecoder(Decoder):
    """Decodes whole batches by their positions.

    Args:
        decoder: Decodes their examples.
        parts: The positions of the examples of each batch.
    """

    def __init__(self, decoder: Decoder, parts: Sequence[list[int]]) -> None:
        super().__init__(decoder._dataset, decoder._collate, decoder.where, decoder._seed)
        self.parts = parts

    def state(self, positions: list[int]) -> str:
        """Tells one state of what batches are decoded from, from another, as far as is known.

        Args:
            positions: Of the batches.

        Returns:
            The positions of their examples, and what the data set says of these.
        """
        parts = [self.parts[position] for position in positions]
        return json.dumps(parts) + super().state([row for part in parts for row in part])

    def __call__(self, positions: list[int]) -> Split:
        """Decodes a batch.

        Args:
            positions: Its position, alone.

        Returns:
            The batch, which counts as one example.

        Raises:
            DataError: An example cannot be decoded, or the batch is not understood.
        """
        return Batches.of(parse_batch(self.collated(positions), self.where))

    def collated(self, positions: list[int]) -> Any:
        """Decodes a batch, and leaves it as it is.

        Args:
            positions: Its position, alone.

        Returns:
            The batch as the user's code gives it.

        Raises:
            DataError: An example cannot be decoded.
        """
        (position,) = positions
        return super().collated(self.parts[position])


@dataclass(frozen=True)
class Parcel:
    """A batch on its way from where it is decoded.

    Attributes:
        keys: The names of its inputs, or how many they are, or None for one.
        columns: The inputs and targets: type, shape and bytes.
        language: Whether its targets are the tokens of its inputs.
        sizes: Of the whole batches that it consists of, the number of examples; None of examples.
    """

    keys: tuple[str, ...] | int | None
    columns: tuple[tuple[torch.dtype, torch.Size, Tensor | NDArray[np.uint8]], ...]
    language: bool = False
    sizes: tuple[int, ...] | None = None

    @classmethod
    def pack(cls, batch: Split, *, language: bool = False) -> Parcel:
        """Packs a batch.

        Args:
            batch: The batch.
            language: Whether its targets are the tokens of its inputs.

        Returns:
            Its bytes.
        """
        inputs = batch.inputs
        keys = None if isinstance(inputs, Tensor) else len(inputs)
        # Through shared memory it goes four times as fast as through a pipe; but that takes an
        # open file for each tensor, and where there is no room for it a worker dies.
        through_pipe = get_worker_info() is not None and not _may_share(batch.nbytes)

        def content(tensor: Tensor) -> Tensor | NDArray[np.uint8]:
            flat = tensor.contiguous().reshape(-1).view(torch.uint8)
            return flat.numpy() if through_pipe else flat

        columns = tuple((t.dtype, t.shape, content(t)) for t in (*leaves(inputs), batch.targets))
        sizes = batch.sizes if isinstance(batch, Batches) else None
        return cls(tuple(inputs) if isinstance(inputs, dict) else keys, columns, language, sizes)

    def unpack(self) -> Split:
        """Unpacks the batch.

        Returns:
            The batch.
        """
        *inputs, targets = (
            torch.as_tensor(content).view(dtype).reshape(shape)
            for dtype, shape, content in self.columns
        )
        if self.keys is None:
            split = Split(inputs[0], targets)
        elif isinstance(self.keys, int):
            split = Split(tuple(inputs), targets)
        else:
            split = Split(dict(zip(self.keys, inputs, strict=True)), targets)
        return split if self.sizes is None else Batches(split.inputs, split.targets, self.sizes)


def _may_share(size: int) -> bool:
    return _open_files() >= _FILES_TO_SHARE and _shared_bytes() >= 2 * _MOST_WORKERS * size


@dataclass(frozen=True)
class Failure:
    """What went wrong in a worker."""

    what: str
    cure: str


class _Remote(Dataset[Any]):
    """A decoder inside a worker: its items are batches."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def __getitem__(self, positions: list[int]) -> Parcel | Failure:
        try:
            return Parcel.pack(self._decoder(positions))
        except DataError as error:
            return Failure(error.what, error.cure)
        except Exception as error:  # noqa: BLE001 - one line of it is told
            return Failure(f"{self._decoder.where} failed: {one_line(error)}", "")


class _Plan:
    """The batches of the pass that is under way."""

    def __init__(self) -> None:
        self.index = torch.empty(0, dtype=torch.long)
        self.size = 1

    def __iter__(self) -> Iterator[list[int]]:
        return (part.tolist() for part in torch.split(self.index, self.size))

    def __len__(self) -> int:
        return math.ceil(len(self.index) / self.size)


@dataclass(frozen=True)
class Prepare:
    """Prepares a worker: Ctrl-C reaches it too, but the process that started it ends it.

    Attributes:
        then: What else prepares it.
    """

    then: Callable[[int], None] | None = None

    def __call__(self, worker: int) -> None:
        """Prepares this process.

        Args:
            worker: Its number.
        """
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
        # The thread that hands over shared memory prints a traceback by this hook, and by it alone,
        # if the process that started this one ends meanwhile. That process reports what it lacks.
        sys.excepthook = lambda *_: None
        if self.then is not None:
            self.then(worker)


@contextmanager
def children_unheard() -> Iterator[None]:
    """Starts workers without a signal handler that raises, wherever this process is, when one dies.

    Their loader finds out by itself when it waits for a batch.

    Yields:
        Nothing.
    """
    number = getattr(signal, "SIGCHLD", None)
    before = signal.getsignal(number) if number is not None else None
    try:
        yield
    finally:
        if number is not None and before is not None and _is_main_thread():
            signal.signal(number, before)


@contextmanager
def signals_held() -> Iterator[None]:
    """Holds Ctrl-C and SIGTERM back while workers start: in them until they are prepared.

    Yields:
        Nothing.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _unchanged(batch: Any) -> Any:
    return batch


@dataclass
class Workers:
    """Processes that decode, started once and kept over all passes.

    Attributes:
        decoder: What they do.
        number: How many; by the cores, the bytes of a batch and the limit of open files where it
            is None.
        options: Further arguments of their DataLoader.
    """

    decoder: Decoder
    number: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    _plan: _Plan = field(default_factory=_Plan)
    _loader: DataLoader[Any] | None = None
    _busy: bool = False

    def decode(self, index: Tensor, size: int, example: int) -> Iterator[Split]:
        """Decodes examples, a batch at a time.

        Args:
            index: Their positions, ``[n]``.
            size: Examples a batch.
            example: The bytes of one of them.

        Yields:
            The batches, in this order.

        Raises:
            DataError: An example cannot be decoded.
        """
        if not self._ready(len(index), size, example):
            for part in torch.split(index, size):
                yield self.decoder(part.tolist())
            return
        assert self._loader is not None
        self._plan.index, self._plan.size, self._busy = index, size, True
        try:
            for found in self._loader:
                if isinstance(found, Failure):
                    raise DataError(found.what, found.cure)
                yield found.unpack()
        except (RuntimeError, OSError, EOFError) as error:
            self._loader = None
            raise DataError(
                f"{self.decoder.where}: a worker that decodes was lost: {one_line(error)}",
                "Is there memory enough? Try a DataLoader with num_workers=0",
            ) from None
        finally:
            self._busy = False

    def _ready(self, examples: int, size: int, example: int) -> bool:
        """Makes sure that there are workers; not where they are not worth it, or cannot be."""
        if self._busy:
            return False
        if self._loader is not None:
            return True
        number = self.worth(examples, size, example)
        context = self.options.get("multiprocessing_context") or _context()
        if not number or not _travels(self.decoder, context):
            return False
        options = {"worker_init_fn": Prepare(), **self.options, "multiprocessing_context": context}
        self._plan.index = self._plan.index[:0]
        try:
            with warnings.catch_warnings(), children_unheard(), own_folders_in_path():
                # The user's own loader has said so.
                warnings.filterwarnings("ignore", "This DataLoader will create")
                # The threads of a pool that waits hold no lock that a worker needs.
                warnings.filterwarnings("ignore", "This process .* is multi-threaded")
                loader: DataLoader[Any] = DataLoader(
                    _Remote(self.decoder),
                    batch_size=None,
                    sampler=self._plan,
                    collate_fn=_unchanged,
                    num_workers=number,
                    persistent_workers=True,
                    generator=torch.Generator(),
                    **options,
                )
                with signals_held():
                    iter(loader)
        except OSError:  # no more processes, files or semaphores: then without
            self.number = 0
            return False
        self._loader = loader
        return True

    def worth(self, examples: int, size: int, example: int) -> int:
        """Tells how many workers some examples are worth.

        Args:
            examples: Their number.
            size: Examples a batch.
            example: The bytes of one of them.

        Returns:
            The workers; 0 where this process is as fast, or where there can be none.
        """
        number = self.number
        if number is None:
            if examples * example < _TINY:
                return 0
            # Two batches of each worker are on their way at a time.
            fits = host_budget() // (16 * size * max(1, example))
            number = min(_MOST_WORKERS, _cores(), fits)
        # torch collates a worker's batch in shared memory.
        shared = _shared_bytes() // (2 * size * max(1, example))
        return max(0, min(number, _files() // _FILES_EACH, shared))


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _files() -> int:
    """How many files more may be opened for workers."""
    try:
        return _open_files() - len(os.listdir("/dev/fd")) - _FILES_LEFT  # noqa: PTH208
    except OSError:
        return _FILES_EACH * _MOST_WORKERS


def _open_files() -> int:
    """How many files a process may have open."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return _FILES_TO_SHARE
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _shared_bytes() -> int:
    """How much shared memory is free: few containers have more than 64 MiB."""
    try:
        return shutil.disk_usage("/dev/shm").free  # noqa: S108
    except OSError:
        return 1 << 62


def _context() -> str | None:
    # A worker that is forked needs nothing sent to it; elsewhere than on Linux that is not safe.
    return "fork" if sys.platform == "linux" else None


def _travels(decoder: Decoder, context: str | BaseContext | None) -> bool:
    """Tells whether workers can be given the decoder."""
    if context == "fork" or getattr(context, "_name", None) == "fork":
        return True
    try:
        # Code from a file is known by its name in this process alone.
        return b"losscli_user_" not in pickle.dumps(decoder)
    except Exception:  # noqa: BLE001 - the user's objects may raise anything
        return False


def own(batch: Split) -> Split:
    """Takes a batch out of shared memory, so that it keeps no file open.

    Args:
        batch: A batch that came from a worker, perhaps.

    Returns:
        The batch in this process's own memory.
    """
    if not batch.targets.is_shared():  # type: ignore[no-untyped-call]
        return batch
    return batch.map(Tensor.clone)


class Stream(Examples):
    """Examples of a map-style data set, decoded as they are needed.

    Args:
        workers: Decode them.
        index: Their positions in the data set, ``[N]``.
    """

    nbytes = 0

    def __init__(self, workers: Workers, index: Tensor) -> None:
        self._workers = workers
        self._index = index
        self._firsts: dict[int, Split] = {}

    def __len__(self) -> int:
        return len(self._index)

    @property
    def _parts(self) -> list[list[int]] | None:
        """The positions of the examples of each batch; None where these are single examples."""
        decoder = self._workers.decoder
        if not isinstance(decoder, BatchDecoder):
            return None
        return [decoder.parts[position] for position in self._index.tolist()]

    @property
    def in_batches(self) -> bool:
        """Whether each of them is a whole batch."""
        return isinstance(self._workers.decoder, BatchDecoder)

    @property
    def rows(self) -> int:
        """The number of examples, those of whole batches before they are collated."""
        parts = self._parts
        return len(self) if parts is None else sum(map(len, parts))

    def cut(self, parts: Sequence[list[int]]) -> Stream:
        """Makes whole batches of the examples.

        Args:
            parts: The examples of each batch, by their positions among these.

        Returns:
            The batches, not decoded yet.
        """
        workers, positions = self._workers, self._index.tolist()
        batches = [[positions[i] for i in part] for part in parts]
        decoder = BatchDecoder(workers.decoder, batches)
        return Stream(Workers(decoder, workers.number, workers.options), torch.arange(len(batches)))

    @property
    def language(self) -> bool:
        """Whether the targets are the tokens of the inputs."""
        return is_language(self._workers.decoder.collated(self._index[:1].tolist()))

    @cached_property
    def digest(self) -> str:
        """A digest of their positions, of a few that are decoded, and of the state of files."""
        positions = self._index.tolist()
        telling = 1 if self.in_batches else min(_TELLING, len(self))
        places = torch.linspace(0, len(self) - 1, telling).round().long()
        few = self._workers.decoder(self._index[places].tolist())
        told = [few.digest, positions, self._workers.decoder.state(positions)]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    @property
    def remarks(self) -> tuple[str, ...]:
        """What to know about these examples."""
        sizes = [] if self._parts is None else remark_on(map(len, self._parts))
        return ("decoded anew in each pass over the data", *sizes)

    @property
    def decoders(self) -> int:
        """How many workers there are for them, or this process alone."""
        return max(1, self._workers.worth(len(self), 1, self.first(1).nbytes))

    def position(self, index: int) -> int:
        """Finds an example in the data set.

        Args:
            index: Its place among these examples.

        Returns:
            Its position in the data set.
        """
        return int(self._index[index])

    def take(self, index: Tensor | slice) -> Stream:
        """Picks examples.

        Args:
            index: Which ones: positions ``[n]`` or a slice.

        Returns:
            Those examples, not decoded yet.
        """
        return Stream(self._workers, self._index[index])

    def batches(self, size: int, order: Tensor | None = None) -> Iterator[Split]:
        """Decodes the examples once, a batch at a time.

        Args:
            size: Examples a batch; the last one may have fewer.
            order: Positions ``[n]``; all in their own order where it is None.

        Returns:
            The batches.
        """
        index = self._index if order is None else self._index[order]
        return self._workers.decode(index, size, self.first(1).nbytes)

    def first(self, number: int) -> Split:
        """Decodes the first examples, and remembers them.

        Args:
            number: How many; all where there are fewer.

        Returns:
            Those examples.
        """
        number = 1 if self.in_batches else min(number, len(self))
        if number not in self._firsts:
            self._firsts[number] = self._workers.decoder(self._index[:number].tolist())
        return self._firsts[number]

    def decode(self, budget: int) -> Split | None:
        """Decodes all examples into memory, where they fit.

        Args:
            budget: The bytes that they may take.

        Returns:
            The examples; None where they take more, or have different sizes from batch to batch.

        Raises:
            DataError: They cannot be decoded, or do not fit together.
        """
        example = self.first(1).nbytes
        if len(self) * example > budget:
            return None
        size = max(1, min(_DECODED_EXAMPLES, _DECODED_BYTES // max(1, example)))
        size = 1 if self.in_batches else size
        batches, taken = [], 0
        for batch in self.batches(size):
            batches.append(own(batch))
            taken += batch.nbytes
            if taken > budget:
                return None
        try:
            return join(batches, self._workers.decoder.where)
        except RaggedError:
            return None

    def check(self) -> None:
        """Makes sure that an example is the same each time it is decoded.

        Raises:
            DataError: It is not.
        """
        decoder = self._workers.decoder
        position = self._index[:1].tolist()
        first, second = (Parcel.pack(decoder(position)) for _ in range(2))
        if any(
            not np.array_equal(a[-1], b[-1])
            for a, b in zip(first.columns, second.columns, strict=True)
        ):
            raise DataError(
                f"{decoder.where}: example {position[0]} is another each time it is decoded",
                "Take the randomness out of it, or draw from the generators of random, "
                "numpy.random and torch",
            )
