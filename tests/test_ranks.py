"""Several processes, as torchrun starts them, find what one finds."""

from __future__ import annotations

import csv
import itertools
import math
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore

from losscli import ranks as module
from losscli.errors import UsageError
from losscli.ranks import Arrays, Ranks, RanksError, current, is_one_of_many
from losscli.sweep import _cut
from tests.conftest import ROOT, Losscli

# Runs commands one after the other in the processes that torchrun started, and tells of files that
# others than rank 0 open to write.
DRIVER = """
import os, sys
from losscli import sweep
from losscli.cli import run
from losscli.console import Console

def hear(event, args):
    if event == "open" and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR):
        if os.path.dirname(os.path.abspath(args[0])) == os.getcwd():
            print(f"rank {os.environ['RANK']} writes {args[0]}", file=sys.stderr, flush=True)

if os.environ["RANK"] != "0":
    sys.addaudithook(hear)
if "ONE_BY_ONE" in os.environ:
    sweep._CPU_STACK = 1
for i, line in enumerate(open("commands.txt").read().splitlines()):
    os.environ["COMMAND"] = str(i)
    if i == 0 and os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        continue
    status = run(line.split(), Console())
    if os.environ["RANK"] == "0":
        print(f"status {status}", file=sys.stderr, flush=True)
    if status > 128:
        os._exit(status)
"""

# A loss that writes down what it found, and kills its process where it is told to.
LOSS = """
import os, signal, time
import torch

def loss(outputs, targets):
    found = torch.nn.functional.cross_entropy(outputs, targets, reduction="none")
    me = ".".join(os.environ[x] for x in ("COMMAND", "TORCHELASTIC_RESTART_COUNT", "RANK"))
    name = f"evaluated.{me}"
    if len(outputs) == 29:
        done = len(open(name).readlines()) if os.path.exists(name) else 0
        if os.environ["KILL"].startswith(me[:4]):
            time.sleep(0.02)  # it takes torchrun a tenth of a second to notice
        if os.environ["KILL"] == f"{me}.{done}":
            os.kill(os.getpid(), signal.SIGKILL)
        number = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(number, f"{found.double().mean().item()!r}\\n".encode())
        os.close(number)
    return found

def fails(outputs, targets):
    if os.environ.get("RANK") == "1":
        raise ValueError("of rank 1 alone")
    return torch.nn.functional.cross_entropy(outputs, targets, reduction="none")
"""

DATA = """
import os
import torch

def data():
    generator = torch.Generator().manual_seed(int(os.environ.get("RANK", "0")))
    return {"train": (torch.rand(9, 6, generator=generator), torch.arange(9) % 3)}
"""


def torchrun(
    *arguments: str, restarts: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    return subprocess.run(
        [*start, f"--max-restarts={restarts}", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def drive(*commands: str, restarts: int = 0, **environment: str) -> tuple[str, list[str], int]:
    """Runs commands in two processes; returns stdout, and of stderr what losscli says."""
    Path("driver.py").write_text(DRIVER)
    Path("commands.txt").write_text("\n".join(commands))
    done = torchrun("driver.py", restarts=restarts, **environment)
    own = re.compile("losscli: |note: |status |rank ")
    return done.stdout, [x for x in done.stderr.splitlines() if own.match(x)], done.returncode


def rows(file: str) -> list[dict[str, str]]:
    with Path(file).open(newline="") as lines:
        return list(csv.DictReader(lines))


def assert_same(one: str, other: str) -> None:
    """The same words to the letter, and the same numbers to 1e-6."""
    expected, found = rows(one), rows(other)
    assert len(expected) == len(found) > 0
    for here, there in zip(expected, found, strict=True):
        assert here.keys() == there.keys()
        for key, text in here.items():
            if key in {"split", "checkpoint"} or text == "":
                assert there[key] == text
            else:
                assert math.isclose(float(there[key]), float(text), rel_tol=1e-6, abs_tol=1e-7)


def test_two_processes_find_what_one_finds(folder: Path, losscli: Losscli) -> None:
    for seed in (2, 3):
        torch.manual_seed(seed)
        from losscli.models import MLP

        torch.save({"state_dict": MLP("6-5-3").state_dict()}, f"{'abcd'[seed]}.pt")
    (folder / "own.py").write_text(LOSS)
    commands = [
        "interpolate a.pt b.pt --points 11 --refine 0.02 --dtype float64 -q --no-figure",
        "interpolate a.pt b.pt --points 9 --derivatives -q --no-figure",
        "interpolate a.pt b.pt --points 9 --sampling-error 0.5 -q --no-figure",
        "trajectory a.pt b.pt c.pt d.pt -m mlp:6-5-3 --residuals 4 -q --no-figure",
        "plane a.pt b.pt c.pt -m mlp:6-5-3 --points 5 -q --no-figure",
        "interpolate a.pt b.pt --points 3 --dry-run",
        "list losses",
        "interpolate a.pt b.pt --points 5 -o - -q",
        "interpolate a.pt b.pt --points 5 --loss own.py:fails -o failed",
        "interpolate a.pt b.pt --points 5 --data own_data.py:data -o failed",
        "interpolate a.pt b.pt --points none",
    ]
    (folder / "own_data.py").write_text(DATA)
    numbered = [
        f"{line} -o @{i}" if "--no-figure" in line else line for i, line in enumerate(commands)
    ]
    expected = []
    for line in (line.replace("@", "one") for line in numbered):
        if "own" not in line and "none" not in line:
            expected.append(outcome := losscli(*line.split()))
            assert outcome.status == 0, outcome.stderr
    before = {path.name for path in folder.iterdir()}
    stdout, told, _ = drive(*(line.replace("@", "two") for line in numbered))

    assert [x for x in told if x.startswith("status")] == [
        f"status {code}" for code in [*[0] * 8, 1, 2, 2]
    ]
    # Each error is one line, once; what failed on rank 1 alone is told by rank 0.
    errors = [x for x in told if x.startswith("losscli: ")]
    assert len(errors) == 3
    assert re.match("losscli: rank 1 on .*: the loss fails: ValueError: of rank 1 alone", errors[0])
    assert "the examples of train: not the same for rank 0 on" in errors[1]
    # No other rank than 0 writes, and what rank 0 writes are the files that one process writes.
    assert not [x for x in told if x.startswith("rank ")]
    new = {path.name for path in folder.iterdir()} - before
    new -= {"driver.py", "commands.txt", "__pycache__"}
    assert new == {x.replace("one", "two") for x in before if x.startswith("one")}
    for name in before:
        if name.startswith("one") and name.endswith(".csv"):
            assert_same(name, name.replace("one", "two"))
    # stdout has every text once.
    texts = [outcome.stdout for outcome in expected]
    assert len(stdout.splitlines()) == len("".join(texts).splitlines())


def evaluated(command: int, attempt: int) -> list[list[str]]:
    """What each rank evaluated, in its order."""
    files = (Path(f"evaluated.{command}.{attempt}.{rank}") for rank in (0, 1))
    return [file.read_text().splitlines() for file in files]


def test_a_rank_that_dies_takes_nothing_finished_with_it(folder: Path) -> None:
    (folder / "own.py").write_text(LOSS)
    command = "interpolate a.pt b.pt --points 41 --loss own.py:loss --split train --no-figure"
    # In the second command rank 1 is killed, with some points done.
    kill = {"KILL": "1.0.1.32", "ONE_BY_ONE": "1"}
    _, told, status = drive(f"{command} -o whole", f"{command} -o broken", restarts=1, **kill)
    assert status == 0, told
    assert Path("broken.csv").read_bytes() == Path("whole.csv").read_bytes()
    assert not list(folder.glob("*.journal"))
    assert sum("goes on where broken.journal ends" in x for x in told) == 1

    # Of the points that no check looks at, each was evaluated once, but that at which rank 0 was
    # when it was told to end.
    usual = Counter(itertools.chain(*evaluated(0, 0)))
    points = {repr(float(row["loss"])) for row in rows("whole.csv")}
    points = {point for point in points if usual[point] == 1}
    assert len(points) > 30
    first, second = (
        Counter(x for x in itertools.chain(*evaluated(1, attempt)) if x in points)
        for attempt in (0, 1)
    )
    assert first.keys() | second.keys() == points
    assert sum((first + second).values()) <= len(points) + 1
    assert min(len(first), len(second)) > 1


def together(size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """Does something in a thread for each rank; returns what each found, or what it raised."""
    store = HashStore()
    found: list[Any] = [None] * size

    def one(rank: int) -> None:
        own = Ranks(store, rank, size)
        try:
            found[rank] = work(own)
        except Exception as error:  # noqa: BLE001 - looked at below
            found[rank] = error
            own.fail(str(error))
        finally:
            own.leave(0)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def test_work_is_dealt_once_and_found_by_all() -> None:
    sizes = [3, 1, 4, 1, 5, 9, 2, 6]
    done: list[int] = []
    kept: dict[int, Arrays] = {}
    progress: list[float] = []

    def share(ranks: Ranks) -> list[list[Arrays]]:
        def work(i: int, tell: Callable[[float], None]) -> Arrays:
            done.append(i)
            tell(sizes[i] / 2)
            return {"square": np.array([i * i, np.nan]), "nothing": np.empty((0, 3), np.float32)}

        known = {2: {"square": np.array([-1.0])}}
        first = ranks.deal(
            sizes, work, known=known, found=kept.__setitem__, progress=progress.append
        )
        return [first, ranks.deal([1], work), ranks.deal([], work)]

    found = together(3, share)
    assert sorted(done) == [0, 0, 1, 3, 4, 5, 6, 7]
    for first, second, third in found:
        assert [x["square"].tolist()[0] for x in first] == [0, 1, -1, 9, 16, 25, 36, 49]
        assert all(np.isnan(first[i]["square"][1]) for i in (0, 7))
        assert first[0]["nothing"].shape == (0, 3)
        assert first[0]["nothing"].dtype == np.float32
        assert len(second) == 1
        assert third == []
    assert sorted(kept) == [0, 1, 3, 4, 5, 6, 7]
    assert progress == sorted(progress)
    assert progress[-1] == sum(sizes)


def test_arrays_larger_than_what_the_store_takes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", 1000)
    large = np.arange(5000.0)
    found = together(2, lambda ranks: ranks.deal([1], lambda i, tell: {"x": large}))
    assert all(np.array_equal(arrays["x"], large) for (arrays,) in found)


def test_ranks_hear_of_each_other() -> None:
    found = together(3, lambda r: [r.gather(r.rank * 1.5), r.decide(f"rank {r.rank}"), r.leads])
    assert found == [[[0.0, 1.5, 3.0], "rank 0", rank == 0] for rank in range(3)]


def test_ranks_do_not_take_those_that_died_for_each_other() -> None:
    store = HashStore()
    names: list[list[str]] = []
    for _ in range(3):
        found: dict[int, str] = {}

        def meet(rank: int, found: dict[int, str] = found) -> None:
            found[rank] = module._meet(store, rank, 3)

        threads = [threading.Thread(target=meet, args=(rank,)) for rank in (2, 0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        names.append(list(found.values()))
    assert all(len(set(of)) == 1 and len(of) == 3 for of in names)
    assert len({of[0] for of in names}) == 3


def test_what_differs_between_ranks_is_an_error() -> None:
    def share(ranks: Ranks) -> None:
        ranks.agree({"--seed": "1"})
        ranks.agree({"the examples of test": f"{ranks.rank // 2}"})

    for error in together(3, share):
        assert isinstance(error, UsageError | RanksError)
        assert "the examples of test: not the same for rank 0" in str(error)
        assert "rank 2" in str(error)


def test_an_error_of_one_rank_ends_all() -> None:
    def late(ranks: Ranks) -> None:
        if ranks.rank == 1:
            raise ValueError("out of luck")
        ranks.gather(None)

    first, second = together(2, late)
    assert isinstance(second, ValueError)
    assert isinstance(first, RanksError)
    assert re.fullmatch("rank 1 on .*: out of luck", str(first))


def test_a_rank_that_is_gone_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MISSED", 0.2)
    monkeypatch.setattr(module, "_BEAT", 0.05)
    leader = Ranks(HashStore(), 0, 2)
    with pytest.raises(RanksError, match=r"rank 1 was not heard of for .* Does every rank run"):
        leader.gather(None)
    leader.leave(1)


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert current() is None
    assert not is_one_of_many()
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    assert not is_one_of_many()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not is_one_of_many()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert is_one_of_many()


@given(
    st.integers(1, 200),
    st.integers(1, 64),
    st.integers(2, 9),
    st.booleans(),
    st.sets(st.integers(0, 200)),
)
def test_points_are_cut_without_gaps(
    number: int, most: int, ranks: int, even: bool, taken: set[int]
) -> None:
    whole = _cut(number, [], most, ranks, even=even)
    known = [chunk for i, chunk in enumerate(whole) if i in taken]
    # What another number of processes took, too.
    other = [chunk for i, chunk in enumerate(_cut(number, [], 7, 1, even=False)) if i in taken]
    for before in ([], known, other):
        chunks = _cut(number, before, most, ranks, even=even)
        assert [i for chunk in chunks for i in range(*chunk)] == list(range(number))
        assert set(before) <= set(chunks)
        assert all(b - a <= most for a, b in set(chunks) - set(before))
    # Chunks that this many processes took leave the others as they were.
    assert _cut(number, known, most, ranks, even=even) == whole
    assert sum(b - a for a, b in whole[:1]) <= math.ceil(number / ranks)
