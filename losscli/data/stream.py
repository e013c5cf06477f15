"""Map-style data sets that do not fit in memory: examples are decoded on every pass."""

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
from dataclasses import dataclass, field, replace
from functools import cached_property
from multiprocessing.context import BaseContext
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from losscli.data.batch import RaggedError, is_language, join, parse_batch
from losscli.data.images import Images
from losscli.data.memory import host_budget
from losscli.data.nests import Build, dump, exchange
from losscli.data.randomness import private_randomness, seed_all
from losscli.data.split import Batches, Examples, Split, batch_size_remarks
from losscli.errors import DataError, one_line
from losscli.spec import user_folders_on_path

__all__ = [
    "BatchDecoder",
    "Decoder",
    "PackedBatch",
    "Stream",
    "WorkerInit",
    "Workers",
    "default_sigchld",
    "deferred_signals",
    "leave_shared_memory",
]

# Below this size in bytes no worker is started: decoding is as fast as starting one.
_TINY = 64 << 20

_MOST_WORKERS = 8

# Workers are started, and shared memory is used for their batches, only if the process may open
# this many files: each worker takes four, each tensor in shared memory one.
_FILES_FOR_WORKERS = 256
_FILES_TO_SHARE = 1024

# Number of evenly spaced examples in a digest.
_DIGEST_EXAMPLES = 16

# Largest batch, in examples and bytes, when a split is decoded into memory.
_DECODED_EXAMPLES = 512
_DECODED_BYTES = 64 << 20

# Signals that terminate a run.
_TERMINATING = {signal.SIGINT, signal.SIGTERM}

_GOLDEN = 0x9E3779B97F4A7C15


class Decoder:
    """Decodes examples of a map-style data set by position.

    The generators of Python, NumPy and torch are seeded from the position before each example, so
    random augmentation does not depend on the pass, the batch or the worker.

    Args:
        dataset: The data set.
        collate: Collates a list of examples into a batch.
        where: Name of the data set in error messages.
        seed: Base seed.
        whole: As for `parse_batch`.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        collate: Callable[[list[Any]], Any],
        where: str,
        seed: int,
        *,
        whole: bool = False,
    ) -> None:
        self.where = where
        self.dataset = dataset
        self.collate = collate
        self._seed = seed
        self._whole = whole

    def state(self, positions: list[int]) -> str:
        """Returns a fingerprint of the files of examples; empty for a data set from user code."""
        return self.dataset.state(positions) if isinstance(self.dataset, Images) else ""

    def __call__(self, positions: list[int]) -> Split:
        """Returns the batch of the examples at some positions.

        Raises:
            DataError: An example cannot be decoded, or the batch cannot be interpreted.
        """
        batch = self.parsed(positions)
        if len(batch) != len(positions):
            cure = "Leave examples out in the Dataset (torch.utils.data.Subset), not in collate_fn"
            if self._whole:
                cure = "If the loss is one number per batch, give --batch-loss"
            raise DataError(
                f"{self.where}: a batch of {len(positions)} examples is collated to {len(batch)}",
                cure,
            )
        return batch

    def parsed(self, positions: list[int]) -> Split:
        """Returns the batch of the examples at some positions, of any number of examples.

        Raises:
            DataError: An example cannot be decoded, or the batch cannot be interpreted.
        """
        rows, batch = self.collated(positions)
        with private_randomness():
            return parse_batch(batch, self.where, rows, self.collate, whole=self._whole)

    def collated(self, positions: list[int]) -> tuple[list[Any], Any]:
        """Returns the examples at some positions, and the output of the collate function.

        Raises:
            DataError: An example cannot be decoded.
        """
        with private_randomness():
            examples = [self._example(position) for position in positions]
            try:
                return examples, self.collate(examples)
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
            return self.dataset[position]
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"{self.where} failed at example {position}: {one_line(error)}"
            ) from error


class BatchDecoder(Decoder):
    """Decodes whole batches by the position of the batch.

    Args:
        decoder: Decoder of the examples.
        parts: Positions of the examples of each batch.
    """

    def __init__(self, decoder: Decoder, parts: Sequence[list[int]]) -> None:
        super().__init__(
            *(decoder.dataset, decoder.collate, decoder.where, decoder._seed),
            whole=decoder._whole,
        )
        self.parts = parts

    def state(self, positions: list[int]) -> str:
        """Returns the positions of the examples of batches, and the fingerprint of their files."""
        parts = [self.parts[position] for position in positions]
        return json.dumps(parts) + super().state([row for part in parts for row in part])

    def __call__(self, positions: list[int]) -> Split:
        """Returns the batch at the only position, which counts as one example.

        Raises:
            DataError: An example cannot be decoded, or the batch cannot be interpreted.
        """
        return Batches.of(self.parsed(positions))

    def collated(self, positions: list[int]) -> tuple[list[Any], Any]:
        """Decodes one batch without interpreting it."""
        (position,) = positions
        return super().collated(self.parts[position])


class _Place:
    """The place of a tensor in a packed batch."""


def _absent(rows: list[Any]) -> NoReturn:
    """Stands for a collate function, which need not be picklable."""
    raise NotImplementedError


@dataclass(frozen=True)
class PackedBatch:
    """A batch serialized for transfer between processes.

    Attributes:
        structure: The inputs and targets, with objects in the places of tensors.
        places: These objects, one per tensor.
        columns: Dtype, shape and bytes of each tensor.
        builds: The functions of ragged columns, with `_absent` in the place of collate functions.
        language: Whether the targets are the tokens of the inputs.
        sizes: Number of examples per batch for whole batches; None for single examples.
    """

    structure: tuple[Any, Any]
    places: tuple[_Place, ...]
    columns: tuple[tuple[torch.dtype, torch.Size, Tensor | NDArray[np.uint8]], ...]
    builds: tuple[Build, ...] = ()
    language: bool = False
    sizes: tuple[int, ...] | None = None

    @classmethod
    def pack(cls, batch: Split, *, language: bool = False) -> PackedBatch:
        """Serializes a batch; ``language`` is whether its targets are the tokens of its inputs."""
        nest = (batch.inputs, batch.targets)
        _, tensors, builds = dump(nest)
        places = tuple(_Place() for _ in tensors)
        sent = tuple(Build(_absent, b.path) if b.is_custom else b for b in builds)
        # Shared memory is four times as fast as a pipe, but it takes an open file per tensor, and
        # a worker dies if shared memory is full.
        through_pipe = get_worker_info() is not None and not _may_share(batch.nbytes)

        def content(tensor: Tensor) -> Tensor | NDArray[np.uint8]:
            flat = tensor.contiguous().reshape(-1).view(torch.uint8)
            return flat.numpy() if through_pipe else flat

        columns = tuple((t.dtype, t.shape, content(t)) for t in tensors)
        structure = exchange(nest, [*tensors, *builds], [*places, *sent])
        sizes = batch.sizes if isinstance(batch, Batches) else None
        return cls(structure, places, columns, sent, language, sizes)

    def unpack(self, collate: Callable[[list[Any]], Any]) -> Split:
        """Restores the batch, with the collate function that is not serialized."""
        tensors = [
            torch.as_tensor(content).view(dtype).reshape(shape)
            for dtype, shape, content in self.columns
        ]
        builds = [Build(collate, b.path) if b.is_custom else b for b in self.builds]
        places = [*self.places, *self.builds]
        inputs, targets = exchange(self.structure, places, [*tensors, *builds])
        if self.sizes is None:
            return Split(inputs, targets)
        return Batches(inputs, targets, self.sizes)


def _may_share(size: int) -> bool:
    return _open_files() >= _FILES_TO_SHARE and _shared_bytes() >= 2 * _MOST_WORKERS * size


class _WorkerDataset(Dataset[Any]):
    """Data set of batches for a worker; an item is requested by a list of positions."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def __getitem__(self, positions: list[int]) -> PackedBatch | DataError:
        try:
            return PackedBatch.pack(self._decoder(positions))
        except DataError as error:
            return error
        except Exception as error:  # noqa: BLE001 - reported in one line
            return DataError(f"{self._decoder.where} failed: {one_line(error)}")


class _BatchSampler:
    """Sampler over the batches of the current pass."""

    def __init__(self) -> None:
        self.index = torch.empty(0, dtype=torch.long)
        self.size = 1

    def __iter__(self) -> Iterator[list[int]]:
        return (part.tolist() for part in torch.split(self.index, self.size))

    def __len__(self) -> int:
        return math.ceil(len(self.index) / self.size)


@dataclass(frozen=True)
class WorkerInit:
    """Initializes a worker: it ignores Ctrl-C, since its parent terminates it.

    Attributes:
        then: Further initialization, such as the user's ``worker_init_fn``.
    """

    then: Callable[[int], None] | None = None

    def __call__(self, worker: int) -> None:
        """Initializes this process."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _TERMINATING)
        # The thread that transfers shared memory prints a traceback through this hook if the parent
        # ends meanwhile. The parent reports the error.
        sys.excepthook = lambda *_: None
        if self.then is not None:
            self.then(worker)


@contextmanager
def default_sigchld() -> Iterator[None]:
    """Restores the SIGCHLD handler after starting workers.

    The handler that torch installs raises at an arbitrary point of the main thread when a worker
    dies. A loader detects a dead worker itself when it waits for a batch.
    """
    number = getattr(signal, "SIGCHLD", None)
    before = signal.getsignal(number) if number is not None else None
    try:
        yield
    finally:
        if number is not None and before is not None and _is_main_thread():
            signal.signal(number, before)


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Blocks SIGINT and SIGTERM while workers start; `WorkerInit` unblocks them in each worker."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _TERMINATING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@dataclass
class Workers:
    """Decoding processes, started once and reused in every pass.

    Attributes:
        decoder: The decoder.
        number: Number of processes; None chooses it from the number of cores, the size of a batch
            and the limit on open files.
        options: Further arguments of the DataLoader.
    """

    decoder: Decoder
    number: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    _sampler: _BatchSampler = field(default_factory=_BatchSampler)
    _loader: DataLoader[Any] | None = None
    _busy: bool = False

    def decode(self, index: Tensor, size: int, example: int) -> Iterator[Split]:
        """Yields the decoded examples batch by batch.

        Args:
            index: Positions of the examples, ``[n]``.
            size: Examples per batch.
            example: Size of one example in bytes.

        Raises:
            DataError: An example cannot be decoded.
        """
        if not self._start(len(index), size, example):
            for part in torch.split(index, size):
                yield self.decoder(part.tolist())
            return
        assert self._loader is not None
        self._sampler.index, self._sampler.size, self._busy = index, size, True
        try:
            for batch in self._loader:
                if isinstance(batch, DataError):
                    raise batch
                yield batch.unpack(self.decoder.collate)
        except (RuntimeError, OSError, EOFError) as error:
            self._loader = None
            raise DataError(
                f"{self.decoder.where}: a worker process was lost: {one_line(error)}",
                "Memory may be short: try a DataLoader with num_workers=0",
            ) from None
        finally:
            self._busy = False

    def _start(self, examples: int, size: int, example: int) -> bool:
        """Starts workers if necessary; returns whether they can take this pass."""
        if self._busy:
            return False
        if self._loader is not None:
            return True
        number = self.useful_number(examples, size, example)
        context = self.options.get("multiprocessing_context") or _start_method()
        if not number or not _can_send(self.decoder, context):
            return False
        options = {
            "worker_init_fn": WorkerInit(),
            **self.options,
            "multiprocessing_context": context,
        }
        self._sampler.index = self._sampler.index[:0]
        try:
            with warnings.catch_warnings(), default_sigchld(), user_folders_on_path():
                # The user's own DataLoader has already shown this warning.
                warnings.filterwarnings("ignore", "This DataLoader will create")
                # Idle threads of a pool hold no lock that a worker needs.
                warnings.filterwarnings("ignore", "This process .* is multi-threaded")
                loader: DataLoader[Any] = DataLoader(
                    _WorkerDataset(self.decoder),
                    batch_size=None,
                    sampler=self._sampler,
                    num_workers=number,
                    persistent_workers=True,
                    generator=torch.Generator(),
                    **options,
                )
                with deferred_signals():
                    iter(loader)
        except OSError:  # no more processes, files or semaphores: decode in this process
            self.number = 0
            return False
        self._loader = loader
        return True

    def useful_number(self, examples: int, size: int, example: int) -> int:
        """Returns how many workers to use for a number of examples.

        It is 0 if this process is as fast, or if no worker can be started. The size of a batch is
        in examples, that of an example in bytes.
        """
        number = self.number
        if number is None:
            if examples * example < _TINY:
                return 0
            # Each worker prefetches two batches.
            fits = host_budget() // (16 * size * max(1, example))
            number = min(_MOST_WORKERS, _cores(), fits)
        if _open_files() < _FILES_FOR_WORKERS:
            return 0
        # In a worker, torch collates a batch in shared memory.
        return max(0, min(number, _shared_bytes() // (2 * size * max(1, example))))


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _open_files() -> int:
    """Returns the limit on open files of this process."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return _FILES_TO_SHARE
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


def _shared_bytes() -> int:
    """Returns the free shared memory; many containers have only 64 MiB."""
    try:
        return shutil.disk_usage("/dev/shm").free  # noqa: S108
    except OSError:
        return 1 << 62


def _start_method() -> str | None:
    # A forked worker needs no pickled decoder, but fork is safe on Linux only.
    return "fork" if sys.platform == "linux" else None


def _can_send(decoder: Decoder, context: str | BaseContext | None) -> bool:
    """Returns whether the decoder can be sent to workers."""
    if context == "fork" or getattr(context, "_name", None) == "fork":
        return True
    try:
        # A module loaded from a user's file can be imported by name in this process only.
        return b"losscli_user_" not in pickle.dumps(decoder)
    except Exception:  # noqa: BLE001 - the user's objects may raise anything
        return False


def leave_shared_memory(batch: Split) -> Split:
    """Copies a batch out of shared memory, so that it keeps no file open."""
    nest = (batch.inputs, batch.targets)
    _, tensors, _ = dump(nest)
    if not any(tensor.is_shared() for tensor in tensors):  # type: ignore[no-untyped-call]
        return batch
    inputs, targets = exchange(nest, tensors, [tensor.clone() for tensor in tensors])
    return replace(batch, inputs=inputs, targets=targets)


class Stream(Examples):
    """Examples of a map-style data set, decoded on demand.

    Args:
        workers: The decoding processes.
        index: Positions of the examples in the data set, ``[N]``.
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
        """Positions of the examples of each batch; None for single examples."""
        decoder = self._workers.decoder
        if not isinstance(decoder, BatchDecoder):
            return None
        return [decoder.parts[position] for position in self._index.tolist()]

    @property
    def in_batches(self) -> bool:
        """Whether each element is a whole batch."""
        return isinstance(self._workers.decoder, BatchDecoder)

    @property
    def rows(self) -> int:
        """The number of examples; for whole batches, counted before collation."""
        parts = self._parts
        return len(self) if parts is None else sum(map(len, parts))

    def cut(self, parts: Sequence[list[int]]) -> Stream:
        """Groups the examples into whole batches by their indices, without decoding them."""
        workers, positions = self._workers, self._index.tolist()
        batches = [[positions[i] for i in part] for part in parts]
        decoder = BatchDecoder(workers.decoder, batches)
        return Stream(Workers(decoder, workers.number, workers.options), torch.arange(len(batches)))

    @property
    def language(self) -> bool:
        """Whether the targets are the tokens of the inputs."""
        return is_language(self._workers.decoder.collated(self._index[:1].tolist())[1])

    @cached_property
    def digest(self) -> str:
        """A digest of the positions, of a few decoded examples, and of the files."""
        positions = self._index.tolist()
        number = 1 if self.in_batches else min(_DIGEST_EXAMPLES, len(self))
        indices = torch.linspace(0, len(self) - 1, number).round().long()
        sample = self._workers.decoder(self._index[indices].tolist())
        content = [sample.digest, positions, self._workers.decoder.state(positions)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def remarks(self) -> tuple[str, ...]:
        """Remarks for the user about these examples."""
        sizes = [] if self._parts is None else batch_size_remarks(map(len, self._parts))
        return ("decoded again in each pass over the data", *sizes)

    @property
    def decoders(self) -> int:
        """The number of decoding processes; 1 if this process decodes alone."""
        return max(1, self._workers.useful_number(len(self), 1, self.first(1).nbytes))

    def position(self, index: int) -> int:
        """Returns the position of an example in the data set."""
        return int(self._index[index])

    def take(self, index: Tensor | slice) -> Stream:
        """Selects examples, not decoded yet."""
        return Stream(self._workers, self._index[index])

    def batches(self, size: int, order: Tensor | None = None) -> Iterator[Split]:
        """Decodes the examples once, batch by batch."""
        index = self._index if order is None else self._index[order]
        return self._workers.decode(index, size, self.first(1).nbytes)

    def first(self, number: int) -> Split:
        """Decodes the first examples and caches them."""
        number = 1 if self.in_batches else min(number, len(self))
        if number not in self._firsts:
            self._firsts[number] = self._workers.decoder(self._index[:number].tolist())
        return self._firsts[number]

    def decode(self, budget: int) -> Split | None:
        """Returns all examples in memory if they fit.

        The result is None if they need more than ``budget`` bytes, or if the shapes of examples
        differ between batches.

        Raises:
            DataError: The examples cannot be decoded or joined.
        """
        example = self.first(1).nbytes
        if len(self) * example > budget:
            return None
        size = max(1, min(_DECODED_EXAMPLES, _DECODED_BYTES // max(1, example)))
        size = 1 if self.in_batches else size
        batches, taken = [], 0
        for batch in self.batches(size):
            batches.append(leave_shared_memory(batch))
            taken += batch.nbytes
            if taken > budget:
                return None
        try:
            return join(batches, self._workers.decoder.where)
        except RaggedError:
            return None

    def check(self) -> None:
        """Checks that decoding an example twice gives the same result.

        Raises:
            DataError: The results differ.
        """
        decoder = self._workers.decoder
        position = self._index[:1].tolist()
        first, second = (PackedBatch.pack(decoder(position)) for _ in range(2))
        if any(
            not np.array_equal(a[-1], b[-1])
            for a, b in zip(first.columns, second.columns, strict=True)
        ):
            raise DataError(
                f"{decoder.where}: example {position[0]} differs each time it is decoded",
                "Take the randomness out of it, or draw from the generators of random, "
                "numpy.random and torch",
            )
