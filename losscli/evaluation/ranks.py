"""Several processes that share one run, as torchrun starts them.

Every rank does the same: reads the checkpoints and the data, and comes to the same places where
there is work to deal. There pieces of work go to whoever is free, and what is found goes to all.
Rank 0 alone reads and writes the journal and the results, and talks.

All of it goes through the store of torch.distributed, which torchrun keeps outside of the ranks.
No process group is made: nobody waits within a collective for a rank that died, and what a rank
found outlives it. The numbers are small, and the same on any device.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import queue
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from losscli.errors import ChangedError, LosscliError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch._C._distributed_c10d import Store

__all__ = [
    "Arrays",
    "Ranks",
    "RanksError",
    "is_one_of_many",
    "joined",
]

# A text: help is printed without numpy.
Arrays: TypeAlias = "Mapping[str, NDArray[Any]]"

_T = TypeVar("_T")

# Seconds: for all ranks to be there; after which it is told that they are not; between two looks at
# the store within a computation; before the second look while there is nothing else to do; between
# two signs of life; after which one is missed; and for which rank 0 stays when it is done, where
# the store is its own.
_JOIN = 600.0
_UNUSUAL = 20.0
_LOOK = 0.1
_IDLE = 0.002
_BEAT = 5.0
_MISSED = 60.0
_STAY = 30.0

# The store takes no values above 8 MiB.
_PIECE = 4 << 20

# Shares of a point that are counted: the store counts in whole numbers.
_PARTS = 1000


class RanksError(LosscliError):
    """Another rank failed, or is gone."""


class Ranks:
    """The ranks that share a run, as one of them sees them.

    Args:
        store: What all of them read and write.
        rank: Which of them this one is.
        size: How many there are.
        local: Which of those on this machine this one is.

    Attributes:
        rank: Which of them this one is; rank 0 leads.
        size: How many there are.
        local: Which of those on this machine this one is, and so whose is the GPU of that number.
    """

    def __init__(self, store: Store, rank: int, size: int, local: int = 0) -> None:
        self.rank = rank
        self.size = size
        self.local = local
        self._store: Any = _Guarded(store)
        self._step = 0
        self._deal: _Deal | None = None
        self._past: list[_Deal] = []
        self._looked = self._watched = 0.0
        self._heard = {r: (-1, time.monotonic()) for r in range(size)}
        self._over = threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True)
        self._beating.start()

    @property
    def is_leader(self) -> bool:
        """Whether this is rank 0, which alone reads and writes results, and talks."""
        return self.rank == 0

    def gather(self, value: _T) -> list[_T]:
        """Tells all ranks a value, and hears theirs.

        Args:
            value: Of JSON's types.

        Returns:
            The values in the order of the ranks, the same for all.

        Raises:
            RanksError: A rank failed or is gone.
        """
        step = self._next()
        self._store.set(f"{step}/{self.rank}", json.dumps(value))
        keys = [f"{step}/{r}" for r in range(self.size)]
        self._wait(lambda: self._store.check(keys))
        return [json.loads(text) for text in self._store.multi_get(keys)]

    def decide(self, value: _T) -> _T:
        """Leaves a decision to rank 0.

        Args:
            value: What this rank would say, of JSON's types.

        Returns:
            What rank 0 says.

        Raises:
            RanksError: A rank failed or is gone.
        """
        key = f"{self._next()}/decided"
        if self.is_leader:
            self._store.set(key, json.dumps(value))
            return value
        self._wait(lambda: self._store.check([key]))
        decided: _T = json.loads(self._store.get(key))
        return decided

    def agree(self, told: Mapping[str, str]) -> None:
        """Makes sure that all ranks look at the same things.

        Args:
            told: For each thing, by what it is called, something that tells it from others.

        Raises:
            UsageError: They do not.
        """
        hosts = self.gather(socket.gethostname())
        first, *others = self.gather(dict(told))
        # Rank 0 judges, and the others hear of it.
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

    def deal(
        self,
        sizes: Sequence[float],
        work: Callable[[int, Callable[[float], None]], Arrays],
        *,
        known: Mapping[int, Arrays] | None = None,
        found: Callable[[int, Arrays], None] | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> list[Arrays]:
        """Deals pieces of work to the ranks as these come free.

        Args:
            sizes: How large the pieces are, in what progress counts.
            work: Does a piece, and tells how much of it is done.
            known: Pieces that need no work; rank 0's count.
            found: Called on rank 0 with each piece that is done, by whichever rank, as soon as
                rank 0 hears of it.
            progress: Called on rank 0 with how much is done by all ranks.

        Returns:
            What was found of each piece, the same on all ranks.

        Raises:
            RanksError: A rank failed or is gone.
        """
        step = self._next()
        deal = _Deal(step, found if self.is_leader else None, progress if self.is_leader else None)
        for i, arrays in (known or {}).items() if self.is_leader else ():
            deal.have[i] = arrays
            self._publish(deal, i, arrays)
        todo = self.decide([i for i in range(len(sizes)) if i not in deal.have])
        deal.base = sum(sizes) - sum(sizes[i] for i in todo)
        self._deal = deal
        try:
            self._forget()
            while (k := self._store.add(f"{step}/next", 1) - 1) < len(todo):
                i = todo[k]
                before = deal.mine

                def tell(done: float, before: float = before) -> None:
                    deal.mine = before + done
                    self.attend()

                arrays = work(i, tell)
                deal.mine = before + sizes[i]
                deal.have[i] = arrays
                self._publish(deal, i, arrays)
                if deal.found is not None:
                    deal.found(i, arrays)
                self._look()
            self._wait(lambda: len(deal.have) == len(sizes))
        except BaseException:
            # What others have finished is kept whatever ends this.
            with contextlib.suppress(LosscliError):
                self._collect(deal)
            raise
        finally:
            self._deal = None
        if deal.progress is not None:
            deal.progress(sum(sizes))
        self._store.add(f"{step}/read", 1)
        self._past.append(deal)
        return [deal.have[i] for i in range(len(sizes))]

    def attend(self) -> None:
        """Looks, now and then, what others did meanwhile. To be called within long computations.

        Raises:
            RanksError: A rank failed or is gone.
        """
        if time.monotonic() - self._looked >= _LOOK:
            self._look()

    def fail(self, text: str, *, changed: bool = False) -> None:
        """Tells the others why this rank ends, so that they end too; of several errors the first.

        Args:
            text: The error, in one line.
            changed: Whether it is a `ChangedError`, after which nothing is kept.
        """
        with contextlib.suppress(RanksError):
            told = json.dumps([self.rank, socket.gethostname(), text, changed])
            self._store.compare_set("error", "", told)

    def leave(self, status: int) -> None:
        """Takes leave of the other ranks.

        Args:
            status: The exit status; an error is told to `fail` before.
        """
        # Whatever becomes of the store now, this rank has done its part.
        with contextlib.suppress(RanksError):
            if self.is_leader:
                self._store.set("over", "")
                if not status and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                    self._stay()
            elif 0 < status <= 128:
                # A rank that ends with an error is heard by torchrun, which then ends all of them:
                # not before rank 0 has told of it.
                self._patiently(lambda: self._store.check(["over"]))
            self._store.add("left", 1)
        self._over.set()
        self._beating.join(timeout=1)

    def _stay(self) -> None:
        """Waits for the others where the store ends with this process."""
        until = time.monotonic() + _STAY
        while self._store.add("left", 0) < self.size - 1 and time.monotonic() < until:
            time.sleep(_LOOK)

    def _next(self) -> int:
        self._step += 1
        return self._step

    def _wait(self, until: Callable[[], bool]) -> None:
        """Waits, and looks what others do; never within a call that no signal interrupts."""
        pause = _IDLE
        while True:
            self._look()
            if until():
                return
            time.sleep(pause)
            pause = min(2 * pause, _LOOK)

    def _patiently(self, until: Callable[[], bool]) -> None:
        """Waits for something of rank 0, as long as rank 0 is there."""
        while not until():
            self._watch()
            time.sleep(_LOOK)

    def _look(self) -> None:
        self._looked = time.monotonic()
        if self._store.check(["error"]):
            rank, host, text, changed = json.loads(self._store.get("error"))
            kind = ChangedError if changed else RanksError
            raise kind(f"rank {rank} on {host}: {text}")
        self._watch()
        deal = self._deal
        if deal is None:
            return
        self._collect(deal)
        parts = round(deal.mine * _PARTS) - deal.counted
        if parts:
            deal.counted += parts
        if parts or deal.progress is not None:
            done = self._store.add(f"{deal.step}/points", parts) / _PARTS
            if deal.progress is not None:
                deal.progress(deal.base + done)

    def _collect(self, deal: _Deal) -> None:
        """Takes what others found since."""
        while self._store.check([f"{deal.step}/log/{deal.heard}"]):
            i, pieces = json.loads(self._store.get(f"{deal.step}/log/{deal.heard}"))
            deal.heard += 1
            if i in deal.have:
                continue
            keys = [f"{deal.step}/{i}/{j}" for j in range(pieces)]
            arrays = _unpack(b"".join(self._store.get(key) for key in keys))
            deal.have[i] = arrays
            if deal.found is not None:
                deal.found(i, arrays)

    def _publish(self, deal: _Deal, i: int, arrays: Arrays) -> None:
        content = _pack(arrays)
        pieces = range(0, len(content), _PIECE)
        for j, at in enumerate(pieces):
            self._store.set(f"{deal.step}/{i}/{j}", content[at : at + _PIECE])
        place = self._store.add(f"{deal.step}/done", 1) - 1
        self._store.set(f"{deal.step}/log/{place}", json.dumps([i, len(pieces)]))

    def _forget(self) -> None:
        """Makes room in the store, where all have read what was in it."""
        if not self.is_leader:
            self._past.clear()
            return
        for deal in list(self._past):
            if self._store.add(f"{deal.step}/read", 0) < self.size:
                continue
            for place in range(deal.heard):
                i, pieces = json.loads(self._store.get(f"{deal.step}/log/{place}"))
                for j in range(pieces):
                    self._store.delete_key(f"{deal.step}/{i}/{j}")
                self._store.delete_key(f"{deal.step}/log/{place}")
            self._past.remove(deal)

    def _beat(self) -> None:
        """Gives signs of life. In a thread of its own: a batch may take its time."""
        with contextlib.suppress(RanksError):
            while True:
                self._store.add(f"beat/{self.rank}", 1)
                if self._over.wait(_BEAT):
                    return

    def _watch(self) -> None:
        """Makes sure that the others live: rank 0 that all do, they that rank 0 does."""
        now = time.monotonic()
        if now - self._watched < _BEAT:
            return
        self._watched = now
        for rank in range(1, self.size) if self.is_leader else (0,):
            beats = self._store.add(f"beat/{rank}", 0)
            before, since = self._heard[rank]
            if beats != before:
                self._heard[rank] = beats, now
            elif now - since > _MISSED:
                raise RanksError(
                    f"rank {rank} was not heard of for {now - since:.0f} s",
                    "Does every rank run the same command? Without RANK and WORLD_SIZE in the "
                    "environment it runs alone",
                )


class _Guarded:
    """A store whose failures are an error in one line.

    Nothing is asked for that may not be there yet, so any failure means that the store is gone.

    Args:
        store: What the ranks read and write.
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
                    f"({_reason(error)})",
                    "Give the same command to torchrun again",
                ) from None

        return call


def _reason(error: BaseException) -> str:
    """The first line of an error of torch, behind which the frames of its C++ are listed."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


class _Deal:
    """What this rank knows of work that is dealt."""

    def __init__(
        self,
        step: int,
        found: Callable[[int, Arrays], None] | None,
        progress: Callable[[float], None] | None,
    ) -> None:
        self.step = step
        self.found = found
        self.progress = progress
        self.have: dict[int, Arrays] = {}
        self.heard = 0  # entries of the log of finished pieces
        self.base = 0.0  # what was known before
        self.mine = 0.0  # what this rank has done
        self.counted = 0  # what of that the others know, in parts


def is_one_of_many() -> bool:
    """Tells whether this process was started as one of several, as torchrun does.

    Returns:
        Whether it was.

    Raises:
        UsageError: The environment says so in part, and not where the others are.
    """
    if not os.environ.get("RANK") or os.environ.get("WORLD_SIZE") == "1":
        return False
    needed = "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
    if missing := [name for name in needed if not os.environ.get(name)]:
        raise UsageError(
            f"RANK is set in the environment ({os.environ['RANK']}), and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not",
            "Start all ranks with torchrun, or run alone without it: env -u RANK losscli …",
        )
    return True


@contextlib.contextmanager
def joined(tell: Callable[[str], None] = lambda _: None) -> Iterator[Ranks]:
    """Joins the other processes.

    Args:
        tell: Called with a note where they are long in coming.

    Yields:
        The ranks.

    Raises:
        RanksError: They cannot be reached.
    """
    from torch._C._distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    wait = _Wait(tell)
    try:
        store, rank, size = _apart_from_signals(
            lambda: next(rendezvous("env://", timeout=timedelta(seconds=_JOIN))), wait
        )
        local = int(os.environ.get("LOCAL_RANK", "0"))
        store = PrefixStore("losscli", store)
        store = PrefixStore(_meet(store, rank, size, wait), store)
    except (RuntimeError, ValueError) as error:
        raise RanksError(
            f"the other ranks cannot be reached: {_reason(error)}",
            "Start all of them with torchrun, or leave RANK and WORLD_SIZE out of the environment "
            "to run alone",
        ) from None
    yield Ranks(store, rank, size, local)


class _Wait:
    """Waits for other ranks, and says so once where that takes longer than it should.

    Args:
        tell: Called with the note.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell: Callable[[str], None] | None = tell
        self._begun = time.monotonic()

    def look(self) -> None:
        """Says it, if it is time."""
        if self._tell is not None and time.monotonic() - self._begun > _UNUSUAL:
            name = "RANK {RANK}, WORLD_SIZE {WORLD_SIZE}, MASTER_ADDR {MASTER_ADDR}"
            self._tell(
                f"waiting up to {_JOIN:.0f} s for the other ranks, which the environment tells of "
                f"({name.format(**os.environ)})"
            )
            self._tell = None


def _apart_from_signals(call: Callable[[], _T], wait: _Wait) -> _T:
    """Calls what no signal interrupts in a thread of its own, and waits where one does."""
    answer: queue.SimpleQueue[_T | BaseException] = queue.SimpleQueue()

    def work() -> None:
        try:
            answer.put(call())
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            answer.put(error)

    threading.Thread(target=work, name="rendezvous", daemon=True).start()
    while True:
        wait.look()
        with contextlib.suppress(queue.Empty):
            found = answer.get(timeout=_LOOK)
            if isinstance(found, BaseException):
                raise found
            return found


def _meet(store: Store, rank: int, size: int, wait: _Wait) -> str:
    """Finds a name for what these very processes have in a store.

    Where torchrun starts ranks anew it may give them the store of those that died, and all that
    these left there. So each says hello by a name that nobody had before, and rank 0 tells whom it
    heard.

    Args:
        store: What all of them read and write.
        rank: Which of them this one is.
        size: How many there are.
        wait: Says so where they are long in coming.

    Returns:
        A name that nobody had before, the same for all.

    Raises:
        RanksError: Some did not come.
    """
    own = uuid.uuid4().hex
    store.set(f"hello/{rank}", own)
    until = time.monotonic() + _JOIN
    while time.monotonic() < until:
        if rank:
            if store.check(["welcome"]):
                name, heard = json.loads(store.get("welcome"))
                if heard[rank] == own:
                    store.set(f"{name}/here/{rank}", "")
                    return str(name)
        else:
            there = (f"hello/{r}" for r in range(size))
            heard = [store.get(key).decode() if store.check([key]) else "" for key in there]
            store.set("welcome", json.dumps([own, heard]))
            if store.check([f"{own}/here/{r}" for r in range(1, size)]):
                return own
        wait.look()
        time.sleep(_IDLE)
    raise RanksError(
        f"not all of the {size} ranks came within {_JOIN:.0f} s",
        "Does every rank run the same command? Without RANK and WORLD_SIZE in the environment it "
        "runs alone",
    )


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
