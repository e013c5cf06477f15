"""Several processes that share one run, as torchrun starts them.

All ranks execute the same program: each reads the checkpoints and the data and reaches the same
calls of `Ranks.distribute`, which gives each task to the first rank that is free, and its result to
all ranks. Only rank 0 reads and writes the journal and the results, and prints.

Ranks communicate through the store of torch.distributed, which torchrun keeps outside of the ranks.
There is no process group: no rank blocks in a collective because another died, and the results of a
rank outlive it. The values are small and do not depend on the device.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from losscli.errors import ChangedError, LosscliError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch._C._distributed_c10d import Store

__all__ = [
    "Arrays",
    "Ranks",
    "RanksError",
    "reason",
]

# A string, because --help must not import NumPy.
Arrays: TypeAlias = "Mapping[str, NDArray[Any]]"

_T = TypeVar("_T")

# Times in seconds: between two polls of the store within a computation, or the longest while
# waiting; the shortest between two polls while waiting; between two heartbeats; after which a rank
# without a heartbeat counts as gone; and for which rank 0 waits for the others at the end, or after
# an error, if the store ends with its process.
_POLL = 0.1
_FIRST_POLL = 0.002
_HEARTBEAT = 5.0
_TIMEOUT = 60.0
_LINGER = 30.0
_LINGER_AFTER_ERROR = 2.0

# Bytes of a value: the store takes at most 8 MiB.
_PIECE = 4 << 20

# Units of progress per point: the store has integer counters only.
_PROGRESS_UNITS = 1000


class RanksError(LosscliError):
    """Another rank has failed or is gone."""


class Ranks:
    """The ranks that share a run, from the view of one of them.

    Args:
        store: The store that all ranks share.
        rank: The rank of this process.
        size: The number of ranks.
        local: The rank of this process among those on this machine.

    Attributes:
        rank: The rank of this process; rank 0 is the leader.
        size: The number of ranks.
        local: The rank of this process among those on this machine, which chooses its GPU.
    """

    def __init__(self, store: Store, rank: int, size: int, local: int = 0) -> None:
        self.rank = rank
        self.size = size
        self.local = local
        self._store: Any = _GuardedStore(store)
        self._step = 0
        self._current: _Distribution | None = None
        self._past: list[_Distribution] = []
        self._last_poll = self._last_check = 0.0
        self._heartbeats = {r: (-1, time.monotonic()) for r in range(size)}
        self._left = threading.Event()
        self._heart = threading.Thread(target=self._send_heartbeats, daemon=True)
        self._heart.start()

    @property
    def is_leader(self) -> bool:
        """Whether this is rank 0, the only one that reads and writes results, and prints."""
        return self.rank == 0

    def gather(self, value: _T) -> list[_T]:
        """Gathers a value of JSON types from every rank.

        Returns:
            The values in rank order, the same on all ranks.

        Raises:
            RanksError: A rank has failed or is gone.
        """
        step = self._next_step()
        self._store.set(f"{step}/{self.rank}", json.dumps(value))
        keys = [f"{step}/{r}" for r in range(self.size)]
        self._wait(lambda: self._store.check(keys))
        return [json.loads(text) for text in self._store.multi_get(keys)]

    def decide(self, value: _T) -> _T:
        """Returns the value, of JSON types, that rank 0 passes.

        Raises:
            RanksError: A rank has failed or is gone.
        """
        key = f"{self._next_step()}/decided"
        if self.is_leader:
            self._store.set(key, json.dumps(value))
            return value
        self._wait(lambda: self._store.check([key]))
        decided: _T = json.loads(self._store.get(key))
        return decided

    def check_same(self, digests: Mapping[str, str]) -> None:
        """Checks that all ranks have the same inputs.

        Args:
            digests: A digest of each input, by its name.

        Raises:
            UsageError: They differ.
        """
        hosts = self.gather(socket.gethostname())
        first, *others = self.gather(dict(digests))
        # Only rank 0 raises; the others receive its error.
        for rank, other in enumerate(others if self.is_leader else (), 1):
            for name in dict.fromkeys([*first, *other]):
                if first.get(name) != other.get(name):
                    raise UsageError(
                        f"{name}: not the same for rank 0 on {hosts[0]} and rank {rank} on "
                        f"{hosts[rank]}",
                        "Give every machine the same files and versions, and order in code that "
                        "lists files or draws at random",
                    )
        self.decide(None)

    def distribute(
        self,
        sizes: Sequence[float],
        work: Callable[[int, Callable[[float], None]], Arrays],
        *,
        known: Mapping[int, Arrays] | None = None,
        on_result: Callable[[int, Arrays], None] | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> list[Arrays]:
        """Distributes tasks over the ranks, each to the first rank that is free.

        Args:
            sizes: The size of each task, in the unit of progress.
            work: Performs a task and reports how much of it is done.
            known: Results that are known already; those of rank 0 are used.
            on_result: Called on rank 0 with each new result of any rank, as soon as it arrives.
            progress: Called on rank 0 with how much all ranks have done.

        Returns:
            The result of each task, the same on all ranks.

        Raises:
            RanksError: A rank has failed or is gone.
        """
        step = self._next_step()
        leads = self.is_leader
        current = _Distribution(step, on_result if leads else None, progress if leads else None)
        for i, arrays in (known or {}).items() if leads else ():
            current.results[i] = arrays
            self._publish(current, i, arrays)
        todo = self.decide([i for i in range(len(sizes)) if i not in current.results])
        current.recalled = sum(sizes) - sum(sizes[i] for i in todo)
        self._current = current
        try:
            self._delete_past()
            while (k := self._store.add(f"{step}/next", 1) - 1) < len(todo):
                i = todo[k]
                before = current.done_here

                def report(done: float, before: float = before) -> None:
                    current.done_here = before + done
                    self.poll()

                arrays = work(i, report)
                current.done_here = before + sizes[i]
                current.results[i] = arrays
                self._publish(current, i, arrays)
                if current.on_result is not None:
                    current.on_result(i, arrays)
                self._poll_now()
            self._wait(lambda: len(current.results) == len(sizes))
        except BaseException:
            # Results of other ranks are kept in any case.
            with contextlib.suppress(LosscliError):
                self._collect(current)
            raise
        finally:
            self._current = None
        if current.progress is not None:
            current.progress(sum(sizes))
        self._store.add(f"{step}/read", 1)
        self._past.append(current)
        return [current.results[i] for i in range(len(sizes))]

    def poll(self) -> None:
        """Receives results and errors of other ranks. To be called often in long computations.

        Raises:
            RanksError: A rank has failed or is gone.
        """
        if time.monotonic() - self._last_poll >= _POLL:
            self._poll_now()

    def fail(self, text: str, *, changed: bool = False) -> None:
        """Reports why this rank ends, which ends the others too; the first report counts.

        Args:
            text: The error, in one line.
            changed: Whether it is a `ChangedError`, after which nothing is kept.
        """
        with contextlib.suppress(RanksError):
            report = json.dumps([self.rank, socket.gethostname(), text, changed])
            self._store.compare_set("error", "", report)

    def leave(self, status: int) -> None:
        """Ends the participation of this rank; report an error with `fail` first."""
        # This rank is done, so an error of the store no longer matters.
        with contextlib.suppress(RanksError):
            if self.is_leader:
                self._store.set("over", "")
                if status <= 128 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                    # After an error at once, others may not have joined yet.
                    self._wait_until_others_left(_LINGER_AFTER_ERROR if status else _LINGER)
            elif 0 < status <= 128:
                # When a rank ends with an error, torchrun kills all others: so rank 0 has to print
                # the error first.
                while not self._store.check(["over"]):
                    self._check_heartbeats()
                    time.sleep(_POLL)
            self._store.add("left", 1)
        self._left.set()
        self._heart.join(timeout=1)

    def _wait_until_others_left(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        pause = _FIRST_POLL
        while self._store.add("left", 0) < self.size - 1 and time.monotonic() < until:
            time.sleep(pause)
            pause = min(2 * pause, _POLL)

    def _next_step(self) -> int:
        self._step += 1
        return self._step

    def _wait(self, until: Callable[[], bool]) -> None:
        """Polls until a condition holds; no call blocks, so that signals interrupt it."""
        pause = _FIRST_POLL
        while True:
            self._poll_now()
            if until():
                return
            time.sleep(pause)
            pause = min(2 * pause, _POLL)

    def _poll_now(self) -> None:
        self._last_poll = time.monotonic()
        if self._store.check(["error"]):
            rank, host, text, changed = json.loads(self._store.get("error"))
            kind = ChangedError if changed else RanksError
            raise kind(f"rank {rank} on {host}: {text}")
        self._check_heartbeats()
        current = self._current
        if current is None:
            return
        self._collect(current)
        units = round(current.done_here * _PROGRESS_UNITS) - current.reported
        if units:
            current.reported += units
        if units or current.progress is not None:
            done = self._store.add(f"{current.step}/points", units) / _PROGRESS_UNITS
            if current.progress is not None:
                current.progress(current.recalled + done)

    def _collect(self, current: _Distribution) -> None:
        """Receives the new results of other ranks."""
        while self._store.check([f"{current.step}/log/{current.log_read}"]):
            i, pieces = json.loads(self._store.get(f"{current.step}/log/{current.log_read}"))
            current.log_read += 1
            if i in current.results:
                continue
            keys = [f"{current.step}/{i}/{j}" for j in range(pieces)]
            arrays = _unpack(b"".join(self._store.get(key) for key in keys))
            current.results[i] = arrays
            if current.on_result is not None:
                current.on_result(i, arrays)

    def _publish(self, current: _Distribution, i: int, arrays: Arrays) -> None:
        content = _pack(arrays)
        pieces = range(0, len(content), _PIECE)
        for j, at in enumerate(pieces):
            self._store.set(f"{current.step}/{i}/{j}", content[at : at + _PIECE])
        entry = self._store.add(f"{current.step}/done", 1) - 1
        self._store.set(f"{current.step}/log/{entry}", json.dumps([i, len(pieces)]))

    def _delete_past(self) -> None:
        """Deletes results from the store that all ranks have read."""
        if not self.is_leader:
            self._past.clear()
            return
        for past in list(self._past):
            if self._store.add(f"{past.step}/read", 0) < self.size:
                continue
            for entry in range(past.log_read):
                i, pieces = json.loads(self._store.get(f"{past.step}/log/{entry}"))
                for j in range(pieces):
                    self._store.delete_key(f"{past.step}/{i}/{j}")
                self._store.delete_key(f"{past.step}/log/{entry}")
            self._past.remove(past)

    def _send_heartbeats(self) -> None:
        """Runs in a separate thread, because a batch may take long."""
        with contextlib.suppress(RanksError):
            while True:
                self._store.add(f"beat/{self.rank}", 1)
                if self._left.wait(_HEARTBEAT):
                    return

    def _check_heartbeats(self) -> None:
        """Checks that others are alive: rank 0 checks all ranks, the others check rank 0."""
        now = time.monotonic()
        if now - self._last_check < _HEARTBEAT:
            return
        self._last_check = now
        for rank in range(1, self.size) if self.is_leader else (0,):
            beats = self._store.add(f"beat/{rank}", 0)
            before, since = self._heartbeats[rank]
            if beats != before:
                self._heartbeats[rank] = beats, now
            elif now - since > _TIMEOUT:
                raise RanksError(
                    f"rank {rank} has sent nothing for {now - since:.0f} s",
                    "Check that every rank runs the same command; without RANK and WORLD_SIZE "
                    "in the environment losscli runs as a single process",
                )


class _GuardedStore:
    """Makes a one-line error of every failure of a store.

    Only keys that exist are read, so any failure means that the store is gone.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._store, name)

        def call(*arguments: Any) -> Any:
            try:
                return method(*arguments)
            except RuntimeError as error:
                raise RanksError(
                    f"the run's store is gone: torchrun, or the machine that kept it, has ended "
                    f"({reason(error)})",
                    "Give the same command to torchrun again",
                ) from None

        return call


def reason(error: BaseException) -> str:
    """The first line of an error of torch, without the C++ stack frames."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


class _Distribution:
    """The state of one call of `Ranks.distribute` on this rank."""

    def __init__(
        self,
        step: int,
        on_result: Callable[[int, Arrays], None] | None,
        progress: Callable[[float], None] | None,
    ) -> None:
        self.step = step
        self.on_result = on_result
        self.progress = progress
        self.results: dict[int, Arrays] = {}
        self.log_read = 0  # entries read of the log of results
        self.recalled = 0.0  # size of the tasks with known results
        self.done_here = 0.0  # progress of this rank
        self.reported = 0  # units of that progress added to the store's counter


def _pack(arrays: Arrays) -> bytes:
    import numpy as np

    room = io.BytesIO()
    # NumPy 1.26 would store an argument allow_pickle as one more array.
    columns: dict[str, Any] = {**arrays}
    np.savez(room, **columns)
    return room.getvalue()


def _unpack(content: bytes) -> dict[str, NDArray[Any]]:
    import numpy as np

    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return dict(arrays)
