"""Finding the other ranks of a run, as torchrun starts them."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from losscli.errors import UsageError
from losscli.evaluation.ranks import Ranks, RanksError, reason

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["is_distributed", "join_ranks"]

_T = TypeVar("_T")

# Times in seconds: for all ranks to arrive, after which a note says that some are missing, between
# two checks of a blocking call, and between two checks of the store.
_JOIN = 600.0
_NOTE = 20.0
_POLL = 0.1
_STORE_POLL = 0.002


def is_distributed() -> bool:
    """Whether this process was started as one of several ranks, as torchrun does.

    Returns:
        Whether it was.

    Raises:
        UsageError: RANK is set without the variables that say where the other ranks are.
    """
    if not os.environ.get("RANK") or os.environ.get("WORLD_SIZE") == "1":
        return False
    needed = "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
    if missing := [name for name in needed if not os.environ.get(name)]:
        raise UsageError(
            f"RANK is set in the environment ({os.environ['RANK']}), and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not",
            "Start all ranks with torchrun, or a single process with env -u RANK losscli …",
        )
    return True


@contextlib.contextmanager
def join_ranks(note: Callable[[str], None] = lambda _: None) -> Iterator[Ranks]:
    """Joins the other ranks.

    Args:
        note: Called with a note if they take long to arrive.

    Yields:
        The ranks.

    Raises:
        RanksError: They cannot be reached.
    """
    from torch._C._distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    wait = _WaitNote(note)
    try:
        store, rank, size = _call_in_thread(
            lambda: next(rendezvous("env://", timeout=timedelta(seconds=_JOIN))), wait
        )
        store = PrefixStore("losscli", store)
        prefix, local = _choose_prefix(store, rank, size, wait)
        # Only torchrun sets it; MPI and Slurm use other names.
        local = int(os.environ.get("LOCAL_RANK") or local)
        store = PrefixStore(prefix, store)
    except (RuntimeError, ValueError) as error:
        raise RanksError(
            f"the other ranks cannot be reached: {reason(error)}",
            "Start all of them with torchrun, or leave RANK and WORLD_SIZE out of the environment",
        ) from None
    yield Ranks(store, rank, size, local)


class _WaitNote:
    """Notes once that other ranks take long to arrive."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note: Callable[[str], None] | None = note
        self._start = time.monotonic()

    def check(self) -> None:
        """Notes it if it is time."""
        if self._note is not None and time.monotonic() - self._start > _NOTE:
            name = "RANK {RANK}, WORLD_SIZE {WORLD_SIZE}, MASTER_ADDR {MASTER_ADDR}"
            self._note(
                f"waiting up to {_JOIN:.0f} s for the other ranks, which the environment lists "
                f"({name.format(**os.environ)})"
            )
            self._note = None


def _call_in_thread(call: Callable[[], _T], wait: _WaitNote) -> _T:
    """Makes a call that signals do not interrupt in a thread, and waits where they do."""
    answer: queue.SimpleQueue[_T | BaseException] = queue.SimpleQueue()

    def work() -> None:
        try:
            answer.put(call())
        except BaseException as error:  # noqa: BLE001 - raised in the main thread
            answer.put(error)

    threading.Thread(target=work, name="rendezvous", daemon=True).start()
    while True:
        wait.check()
        with contextlib.suppress(queue.Empty):
            result = answer.get(timeout=_POLL)
            if isinstance(result, BaseException):
                raise result
            return result


def _choose_prefix(store: Store, rank: int, size: int, wait: _WaitNote) -> tuple[str, int]:
    """Agrees on a key prefix that is unique to these processes.

    When torchrun restarts ranks, it may give them the store of those that died, with all its keys.
    So each rank registers under a random name, and rank 0 publishes the names that it has seen. The
    name of the machine is a part of it.

    Returns:
        The prefix, the same on all ranks; and the number of lower ranks on this machine.

    Raises:
        RanksError: Some ranks did not arrive.
    """
    host = socket.gethostname()
    own = f"{uuid.uuid4().hex} {host}"
    store.set(f"hello/{rank}", own)
    until = time.monotonic() + _JOIN
    while time.monotonic() < until:
        if rank:
            if store.check(["welcome"]):
                name, seen = json.loads(store.get("welcome"))
                if seen[rank] == own:
                    store.set(f"{name}/here/{rank}", "")
                    # The names of others may still be missing, or those of processes that died.
                    if store.check([f"{name}/all"]):
                        lower = json.loads(store.get(f"{name}/all"))[:rank]
                        return name, [other.partition(" ")[2] for other in lower].count(host)
        else:
            keys = (f"hello/{r}" for r in range(size))
            seen = [store.get(key).decode() if store.check([key]) else "" for key in keys]
            store.set("welcome", json.dumps([own, seen]))
            if store.check([f"{own}/here/{r}" for r in range(1, size)]):
                store.set(f"{own}/all", json.dumps(seen))
                return own, 0
        wait.check()
        time.sleep(_STORE_POLL)
    raise RanksError(
        f"not all of the {size} ranks joined within {_JOIN:.0f} s",
        "Check that every rank runs the same command; without RANK and WORLD_SIZE in the "
        "environment losscli runs as a single process",
    )
