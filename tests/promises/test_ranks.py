"""Several processes, as torchrun starts them, find what one finds."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore, TCPStore
from torch.distributed import run as elastic

from losscli.cli import run
from losscli.cli.console import Console
from losscli.errors import ChangedError, UsageError
from losscli.evaluation import memory, rendezvous
from losscli.evaluation import ranks as module
from losscli.evaluation.journal import Journal
from losscli.evaluation.objective import Objective
from losscli.evaluation.ranks import Arrays, Ranks, RanksError
from losscli.evaluation.rendezvous import is_distributed
from losscli.evaluation.strategies.base import Strategy
from losscli.evaluation.sweep import _divide, _synchronise
from tests.conftest import ROOT, Losscli, Outcome, fill, invoke
from tests.forks import PATIENCE, child, ended, fork
from tests.moments import save_trained

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
# Of a fork beside threads: the child has one thread, and uses no other.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")

# If a rank other than 0 writes a file in the current folder, it makes a folder that says so.
HEARING = """
import os, sys
from pathlib import Path

def hear(event, args):
    if event == "open" and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR):
        path = Path(args[0]).absolute()
        if path.parent == Path.cwd() and not path.name.startswith("evaluated."):
            path.with_name(f"{path.name} of another rank").mkdir()

if rank:
    sys.addaudithook(hear)
"""

# Runs commands one after the other in each process that torchrun starts, and stores their outcomes.
DRIVER = f"""
import io, json, os
from losscli.cli import run
from losscli.cli.console import Console
from losscli.data import objects
from losscli.evaluation import memory

rank = int(os.environ["RANK"])
objects.host_budget = lambda: 10
heard = open(f"heard/{{rank}}", "w")
{HEARING}
for line in sys.argv[1:]:
    if "own.py:loss" in line:
        memory._CPU_STACK = 1  # a point at a time
    console = Console(io.StringIO(), io.StringIO())
    status = run(line.split(), console)
    outcome = status, console.stdout.getvalue(), console.stderr.getvalue()
    print(json.dumps(outcome), file=heard, flush=True)
sys.exit(status)
"""

# A loss that records its mean, and after a number of evaluations kills or holds its process.
LOSS = """
import os, signal, time
from pathlib import Path
import torch

def loss(outputs, targets):
    found = torch.nn.functional.cross_entropy(outputs, targets, reduction="none")
    me = ".".join(os.environ[x] for x in ("RUN", "TORCHELASTIC_RESTART_COUNT", "RANK"))
    name = f"evaluated.{me}"
    if len(outputs) == 29:
        done = len(Path(name).read_text().splitlines()) if os.path.exists(name) else 0
        if f"{me}.{done}" in os.environ["KILL"].split():
            os.kill(os.getpid(), signal.SIGKILL)
        while f"{me}.{done}" in os.environ["HOLD"].split():
            time.sleep(0.01)
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

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 9
    def __getitem__(self, i):
        return torch.rand(6, generator=torch.Generator().manual_seed(i)), i % 3

def streamed():
    return Rows()
"""


def torchrun(
    lines: Sequence[str],
    restarts: int = 0,
    meanwhile: Callable[[int], None] = lambda _: None,
    **environment: str,
) -> list[list[Outcome]]:
    """Runs commands one after the other in two processes that torchrun starts.

    torchrun itself is a fork of this process: nothing is imported again.

    Args:
        lines: The commands.
        restarts: How often it may start both processes again.
        meanwhile: Called here with the id of torchrun's process.
        environment: Variables for the processes.

    Returns:
        For each process the outcome of each command, of the last start.
    """
    Path("heard").mkdir()
    Path("heard/driver.py").write_text(DRIVER)
    pid = fork()
    if not pid:
        try:
            os.environ.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", **environment)
            warnings.simplefilter("ignore")
            for own, name in enumerate((os.devnull, os.devnull, "heard/log")):
                os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), own)
            elastic.main(["--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}",
                          "heard/driver.py", *lines])  # fmt: skip
        finally:
            os._exit(0)
    meanwhile(pid)
    ended(pid)
    texts = [Path(f"heard/{rank}").read_text().splitlines() for rank in (0, 1)]
    log = Path("heard/log").read_text()
    shutil.rmtree("heard")
    assert [len(text) for text in texts] == [len(lines)] * 2, log
    return [[Outcome(*json.loads(line)) for line in text] for text in texts]


# Linux may give a free port from 32,768 on to another socket before a test opens it. These are
# lower, and differ between two processes that run tests.
_FIRST_PORT = 10_000 + os.getpid() % 200 * 100
_NEXT_PORT = itertools.cycle(range(_FIRST_PORT, _FIRST_PORT + 100))


def ports(number: int) -> list[int]:
    """Finds ports that nobody listens at."""
    found: list[int] = []
    while len(found) < number:
        with (
            contextlib.suppress(OSError),
            socket.create_server(("127.0.0.1", port := next(_NEXT_PORT))),
        ):
            found.append(port)
    return found


def forked(
    commands: Sequence[str],
    size: int,
    before: Callable[[int], None] = lambda _: None,
    meanwhile: Callable[[Sequence[int]], None] = lambda _: None,
) -> list[list[Outcome]]:
    """Runs commands one after the other in processes with the environment that torchrun gives.

    They are forks of this one: nothing is imported anew.

    Args:
        commands: The commands.
        size: How many processes.
        before: Called in each with its rank.
        meanwhile: Called here with their ids.

    Returns:
        For each process the outcome of each command.
    """
    heard = Path("heard")
    heard.mkdir(exist_ok=True)
    free = ports(len(commands))
    pids = []
    for rank in range(size):
        if pid := fork():
            pids.append(pid)
            continue
        try:
            before(rank)
            outcomes = []
            for i, line in enumerate(commands):
                os.environ.update(
                    RANK=str(rank),
                    WORLD_SIZE=str(size),
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(free[i]),
                )
                console = Console(io.StringIO(), io.StringIO())
                status = run(line.split(), console)
                texts = (stream.getvalue() for stream in (console.stdout, console.stderr))  # type: ignore[union-attr]
                outcomes.append([status, *texts])
            (heard / f"{rank}.json").write_text(json.dumps(outcomes))
        finally:
            os._exit(0)
    meanwhile(pids)
    for pid in pids:
        os.waitpid(pid, 0)
    files = (heard / f"{rank}.json" for rank in range(size))
    told = [[Outcome(*of) for of in json.loads(file.read_text())] for file in files]
    shutil.rmtree(heard)
    return told


def alone(commands: Sequence[str]) -> list[Outcome]:
    """Runs commands in this process, with the one thread that a fork has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [invoke(*line.split()) for line in commands]
    finally:
        torch.set_num_threads(threads)


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
            text_columns = {
                "split",
                "checkpoint",
                "direction",
                "a",
                "b",
                "block",
                "path",
                "verdict",
            }
            if key in text_columns or text == "":
                assert there[key] == text
            else:
                assert math.isclose(float(there[key]), float(text), rel_tol=1e-6, abs_tol=1e-7)


def summary(stem: str) -> dict[str, Any]:
    """The summary of a run, without its time and number of processes."""
    told: dict[str, Any] = json.loads(Path(f"{stem}.json").read_text())
    return {key: told[key] for key in told if key not in {"seconds", "processes"}}


@pytest.fixture
def more(folder: Path) -> Path:
    """A folder with four checkpoints and code."""
    fill_more(folder)
    return folder


def fill_more(folder: Path) -> None:
    """Writes the files that the fixture `more` adds to those of `folder`."""
    for seed in (2, 3):
        save_trained(folder / f"{'abcd'[seed]}.pt", seed=seed)
    (folder / "own.py").write_text(LOSS)
    (folder / "own_data.py").write_text(DATA)


THREE = "a.pt b.pt c.pt -m mlp:6-5-3"
FOUR = "a.pt b.pt c.pt d.pt -m mlp:6-5-3"


# Where every line and every search is one rank's, or the arithmetic is that of a CPU, the numbers
# are the same to the last bit; so --refine adds the same points.
SAME_BITS = {
    "refine": "interpolate a.pt b.pt --points 11 --refine 0.02",
    "trajectory": f"trajectory {THREE} --residuals 3",
    "eigenvectors": "plane a.pt --axes hessian --path b.pt --path c.pt --points 3 -m mlp:6-5-3",
}
SAME_NUMBERS = {
    "derivatives": "interpolate a.pt b.pt --points 3 --derivatives --split test",
    "sampling": f"barriers {THREE} --points 9 --sampling-error 0.5 --disagreement --cka",
}
# These run in forks, since they need imports that take long in a new process.
FORKED_SAME_BITS = {
    "sharpness": "sharpness a.pt b.pt --rho 0.1 --samples 2 --split test",
    "check": "check c.pt d.pt -m mlp:6-5-3 --split test --optimizer adam --density --blocks "
    "--probes 2 --lanczos 4",
}
FORKED_SAME_NUMBERS = {"connect": "connect a.pt b.pt --steps 3 --points 9 --no-plane"}
FORKED_TABLES = {"check.density", "check.curvature", "check.escape"}
MORE_SAME_BITS = {
    "barriers": f"barriers {THREE} --points 5",
    "around": "around a.pt b.pt --directions 3 --points 5",
    "along": "around a.pt b.pt --along hessian --points 3 --split test",
}
MORE_SAME_NUMBERS = {
    "line": "interpolate a.pt b.pt --points 9 --sampling-error 0.5",
    "plane": f"plane {THREE} --points 5",
}

LAZY = "-q --no-figure --data own_data.py:streamed"
STREAMED = [
    f"interpolate a.pt b.pt --points 5 {LAZY} -o @line",
    f"barriers {FOUR} --points 5 {LAZY} -o @pairs",
]
FAILING = [
    "interpolate a.pt b.pt --points 5 --loss own.py:fails -o failed",
    "interpolate a.pt b.pt --points 5 --data own_data.py:data -o failed",
    f"check {FOUR} --loss own.py:fails -o failed",
    f"barriers {FOUR} --data own_data.py:data -o failed",
    "barriers a.pt -o failed",
    "interpolate a.pt b.pt --points none",
]


class Ran(NamedTuple):
    """Outcomes of commands in one process and in two, and the files before and after the two."""

    alone: list[Outcome]
    first: list[Outcome]
    other: list[Outcome]
    before: set[str]
    new: set[str]


def run_both(
    lines: Sequence[str],
    more: Sequence[str] = (),
    start: Callable[[Sequence[str]], list[list[Outcome]]] | None = None,
) -> Ran:
    """Runs commands in this process and in two processes; @ in them is one here and two there.

    Args:
        lines: The commands.
        more: Commands that run only in the two processes.
        start: Runs commands in two processes; by default in forks.
    """
    expected = alone([line.replace("@", "one") for line in lines])
    before = {path.name for path in Path().iterdir()}
    start = start or partial(forked, size=2, before=lambda rank: exec(HEARING, {"rank": rank}))
    first, other = start([*(line.replace("@", "two") for line in lines), *more])
    new = {path.name for path in Path().iterdir()} - before
    return Ran(expected, first, other, before, new)


def written(commands: dict[str, str]) -> list[str]:
    """Returns commands that write files named after their keys."""
    return [f"{line} -q --no-figure -o @{name}" for name, line in commands.items()]


COMPARED = [
    *written({**SAME_BITS, **SAME_NUMBERS}),
    "interpolate a.pt b.pt --points 3 --dry-run",
    "list losses",
    "interpolate a.pt b.pt --points 5 -o - -q",
]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """Runs commands in a torchrun that SIGTERM ends in the last one; yields their outcomes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("ran"))
        fill(Path())
        fill_more(Path())
        with pytest.MonkeyPatch.context() as single:
            line = in_single_points(single)
            assert invoke(*line("whole").split()).status == 0
            last = line("broken")
        most = points("whole", [0])[1] + 6

        def interrupt(pid: int) -> None:
            wait_for_both("broken", most)
            os.kill(pid, signal.SIGTERM)

        patch.setattr("losscli.data.objects.host_budget", lambda: 10)
        start = partial(
            torchrun,
            meanwhile=interrupt,
            RUN="broken",
            KILL="",
            HOLD=f"broken.0.0.{most} broken.0.1.{most}",
        )
        yield run_both([*COMPARED, *STREAMED], [*FAILING, last], start)


def assert_results_of_one(
    ran: Ran, same_bits: dict[str, str], same_numbers: dict[str, str], tables: set[str]
) -> None:
    # What rank 0 writes are the files of one process.
    new = {name for name in ran.new if not name.startswith(("broken", "evaluated."))}
    assert new == {x.replace("one", "two") for x in ran.before if x.startswith("one")}
    for name in same_bits | same_numbers:
        for file in Path().glob(f"one{name}*.csv"):
            assert_same(file.name, file.name.replace("one", "two"))
    assert {f"one{table}.csv" for table in tables} <= ran.before
    for name in same_bits:
        assert summary(f"two{name}") == summary(f"one{name}")
        assert json.loads(Path(f"two{name}.json").read_text())["processes"] == 2
        assert json.loads(Path(f"one{name}.json").read_text())["processes"] == 1


def assert_one_talks(*outcomes: list[Outcome]) -> None:
    """All succeeded here, on rank 0 and on rank 1, which wrote nothing."""
    assert {outcome.status for of in outcomes for outcome in of} == {0}, outcomes
    assert {outcome.stdout + outcome.stderr for outcome in outcomes[-1]} == {""}


@forks
def test_two_processes_give_the_results_of_one(ran: Ran) -> None:
    expected, first, other = (of[: len(COMPARED)] for of in (ran.alone, ran.first, ran.other))
    assert_one_talks(expected, first, other)
    assert_results_of_one(ran, SAME_BITS, SAME_NUMBERS, {"trajectory.surface"})
    # Rank 0 says what one process says, but how long that took.
    for i in (-3, -2):
        told, said = (of[i].stdout.partition("\ntime ")[0] for of in (expected, first))
        assert told == said
    assert len(first[-1].stdout.splitlines()) == len(expected[-1].stdout.splitlines())


@forks
@pytest.mark.parametrize(
    ("same_bits", "same_numbers", "tables"),
    [
        (FORKED_SAME_BITS, FORKED_SAME_NUMBERS, FORKED_TABLES),
        pytest.param(
            MORE_SAME_BITS, MORE_SAME_NUMBERS, {"barriers.curves"}, marks=pytest.mark.stress
        ),
    ],
    ids=["", "more"],
)
@pytest.mark.usefixtures("more")
def test_two_forks_give_the_results_of_one_process(
    same_bits: dict[str, str], same_numbers: dict[str, str], tables: set[str]
) -> None:
    ran = run_both(written({**same_bits, **same_numbers}))
    assert_one_talks(ran.alone, ran.first, ran.other)
    assert_results_of_one(ran, same_bits, same_numbers, tables)


@forks
def test_a_failure_or_difference_on_one_rank_is_one_line(ran: Ran) -> None:
    first, other = (of[-1 - len(FAILING) : -1] for of in (ran.first, ran.other))
    assert [outcome.status for outcome in first] == [1, 2, 1, 2, 2, 2]
    assert all(outcome.status for outcome in other)
    # Each error is one line, once; what failed on rank 1 alone is told by rank 0.
    errors = [outcome.stderr for outcome in first]
    assert all(error.startswith("losscli: ") and error.count("\n") == 1 for error in errors)
    for i in (0, 2):
        assert re.match("losscli: rank 1 on .*: the loss fails: ValueError: of rank 1", errors[i])
    for i in (1, 3):
        assert "the examples of train: not the same for rank 0 on" in errors[i]
    assert not list(Path().glob("failed*"))
    assert {outcome.stdout + outcome.stderr for outcome in other} == {""}


@forks
def test_streamed_data(ran: Ran) -> None:
    streamed = slice(len(COMPARED), len(COMPARED) + len(STREAMED))
    outcomes = [outcome for of in (ran.alone, ran.first, ran.other) for outcome in of[streamed]]
    assert [outcome.status for outcome in outcomes] == [0] * 3 * len(STREAMED), outcomes
    for of in ("line", "pairs"):
        notes = summary(f"two{of}")["notes"]
        assert any("decoded again in each pass" in note for note in notes)
        assert notes == summary(f"one{of}")["notes"]
        assert_same(f"one{of}.csv", f"two{of}.csv")


@forks
@pytest.mark.parametrize(
    "command",
    [
        "interpolate a.pt b.pt --points 9",
        pytest.param("check a.pt b.pt --split test", marks=pytest.mark.stress),
        pytest.param(f"barriers {FOUR} --points 5", marks=pytest.mark.stress),
    ],
)
def test_a_rank_out_of_memory_takes_smaller_batches(command: str, more: Path) -> None:
    line = f"{command} -q --no-figure -o"
    real = Objective.forward

    def cramped(rank: int) -> None:
        def forward(self: Objective, model: Callable[..., Any], inputs: Any) -> Any:
            if len(inputs) > 4:
                (more / f"full {rank}").touch()
                raise torch.OutOfMemoryError("on purpose")
            return real(self, model, inputs)

        if rank:
            Objective.forward = forward  # type: ignore[method-assign]

    plain = alone([f"{line} one"])
    first, other = forked([f"{line} two"], 2, cramped)
    assert [outcome.status for outcome in (*plain, *first, *other)] == [0] * 3, (first, other)
    assert (more / "full 1").exists()
    assert_same("one.csv", "two.csv")


LINE = "interpolate a.pt b.pt --points 41 --loss own.py:loss --split train --no-figure"


@pytest.fixture
def line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Makes a command that takes a point at a time, and writes down the points that it takes."""
    (folder / "own.py").write_text(LOSS)
    return in_single_points(monkeypatch)


def in_single_points(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    monkeypatch.setattr("losscli.evaluation.memory._CPU_STACK", 1)
    alone = {"TORCHELASTIC_RESTART_COUNT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    alone |= {"KILL": "", "HOLD": ""}
    for name, value in alone.items():
        monkeypatch.setenv(name, value)

    def begin(stem: str) -> str:
        monkeypatch.setenv("RUN", stem)
        return f"{LINE} -o {stem}"

    return begin


def evaluated(run: str, attempt: int) -> list[list[str]]:
    """What each rank evaluated, in its order."""
    files = (Path(f"evaluated.{run}.{attempt}.{rank}") for rank in (0, 1))
    return [file.read_text().splitlines() for file in files]


def points(run: str, ranks: Sequence[int] = (0, 1)) -> tuple[set[str], int]:
    """The points of a whole run that no check looks at, and how many evaluations come before."""
    files = (Path(f"evaluated.{run}.0.{rank}") for rank in ranks)
    orders = [file.read_text().splitlines() for file in files]
    usual = Counter(itertools.chain(*orders))
    losses = {repr(float(row["loss"])) for row in rows(f"{run}.csv")}
    found = {loss for loss in losses if usual[loss] == 1}
    assert len(found) > 30
    checks = [len(list(itertools.takewhile(lambda x: x not in found, of))) for of in orders]
    return found, max(checks)


def by_forks(command: str, **environment: str) -> list[str]:
    """Does what torchrun does: keeps the store, and starts all again when one dies."""
    (port,) = ports(1)
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    for attempt in range(3):
        pids: list[int] = []
        for rank in range(2):
            there = {
                **environment,
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": str(attempt),
            }
            before = partial(os.environ.update, there)
            pids.append(child(command.split(), Path(f"log.{rank}"), before))
            os.setpgid(pids[-1], pids[0])
        first, status = os.waitpid(-pids[0], 0)
        (other,) = {*pids} - {first}
        if os.WIFSIGNALED(status):
            os.kill(other, signal.SIGTERM)
        if ended(other) == 0:
            break
    del store
    return Path("log.0").read_text().splitlines()


def by_torchrun(command: str, **environment: str) -> list[str]:
    (first,), (other,) = torchrun([command], 2, **environment)
    assert (first.status, other.status) == (0, 0), first.stderr
    return first.stderr.splitlines()


@forks
@pytest.mark.parametrize("start", [by_forks, pytest.param(by_torchrun, marks=pytest.mark.stress)])
def test_finished_work_survives_the_death_of_a_rank(
    start: Callable[..., list[str]], folder: Path, line: Callable[[str], str]
) -> None:
    first, other = forked([line("whole")], 2)
    assert [outcome.status for outcome in (*first, *other)] == [0, 0], first
    found, checks = points("whole")
    # Rank 1 is killed with some points done, and later rank 0, which alone writes. Meanwhile the
    # other has no more than as many, however fast it is.
    most = checks + 6
    told = start(
        line("broken"),
        KILL=f"broken.0.1.{most} broken.1.0.{most}",
        HOLD=f"broken.0.0.{most} broken.1.1.{most}",
    )
    assert any("resuming from broken.journal" in x for x in told)
    assert Path("broken.csv").read_bytes() == Path("whole.csv").read_bytes()
    assert summary("broken") == summary("whole")
    assert not list(folder.glob("*.journal"))

    attempts = [[found & set(of) for of in evaluated("broken", i)] for i in range(3)]
    (lead, died), (dead, _), last = attempts
    assert min(map(len, (died, dead, set().union(*last)))) > 1
    assert set().union(*itertools.chain(*attempts)) == found
    # What either had finished is not evaluated again, but for the point at which rank 0 was when
    # it was told to end; nor what rank 0 had when it died.
    assert len((lead | died) & set().union(*attempts[1], *last)) <= 1
    assert not dead & set().union(*last)


def wait_for_both(run: str, most: int) -> None:
    """Waits until both ranks are held."""
    until = time.monotonic() + PATIENCE
    files = [Path(f"evaluated.{run}.0.{rank}") for rank in (0, 1)]
    while not all(file.exists() and file.read_text().count("\n") == most for file in files):
        assert time.monotonic() < until
        time.sleep(0.01)


@forks
def test_sigterm_to_torchrun_ends_all_ranks_and_names_the_journal(ran: Ran) -> None:
    assert (ran.first[-1].status, ran.other[-1].status) == (143, 143)
    message = ran.first[-1].stderr.splitlines()[-1]
    assert message.startswith("losscli: terminated; finished work is in broken.journal")
    assert Path("broken.journal").exists()


@forks
@pytest.mark.parametrize(
    ("number", "status", "how"),
    [
        (signal.SIGINT, 130, "interrupted"),
        pytest.param(signal.SIGTERM, 143, "terminated", marks=pytest.mark.stress),
    ],
)
def test_a_signal_ends_all_ranks_and_the_next_run_resumes(
    number: int,
    status: int,
    how: str,
    line: Callable[[str], str],
    losscli: Losscli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = losscli(*line("whole").split())
    _, checks = points("whole", [0])
    most = checks + 6
    monkeypatch.setenv("HOLD", f"broken.0.0.{most} broken.0.1.{most}")

    def interrupt(pids: Sequence[int]) -> None:
        wait_for_both("broken", most)
        for pid in pids:
            os.kill(pid, number)

    first, other = forked([line("broken")], 2, meanwhile=interrupt)
    assert [outcome.status for outcome in (*first, *other)] == [status, status]
    assert f"losscli: {how}; finished work is in broken.journal" in first[0].stderr
    monkeypatch.setenv("HOLD", "")
    # Nobody holds the journal, and what is in it is known again, also by one process.
    done = losscli(*line("broken").split())
    assert (whole.status, done.status) == (0, 0), done.stderr
    assert "resuming from broken.journal" in done.stderr
    assert_same("whole.csv", "broken.csv")
    assert not Path("broken.journal").exists()


@forks
def test_a_checkpoint_that_changes_for_one_rank_leaves_nothing(
    folder: Path, line: Callable[[str], str]
) -> None:
    real = Objective.at

    def before(rank: int) -> None:
        def at(self: Objective, *rest: Any) -> Any:
            if Path("changed.journal").exists():
                raise ChangedError("b.pt was changed", "Start again")
            return real(self, *rest)

        if rank:
            Objective.at = at  # type: ignore[method-assign]

    first, other = forked([line("changed")], 2, before)
    assert [outcome.status for outcome in (*first, *other)] == [1, 1]
    assert re.fullmatch(r"losscli: rank 1 on .*: b.pt was changed. Start again\n", first[0].stderr)
    # What was finished may be of what the file was for a moment.
    assert not list(folder.glob("changed*"))


def test_ranks_without_a_strategy_take_that_of_the_others() -> None:
    def agree(*ways: Strategy | None) -> Strategy | None:
        told = [[3, 8, way.value if way else 0] for way in ways]
        ranks = SimpleNamespace(gather=lambda _: told)
        objective = SimpleNamespace(batch_size=8, strategy=ways[0])
        assert _synchronise(ranks, objective, 3, []) == 3  # type: ignore[arg-type]
        way: Strategy | None = objective.strategy
        return way

    assert agree(Strategy.SHARED, Strategy.SHARED) == Strategy.SHARED
    assert agree(Strategy.SHARED, None) == Strategy.SHARED
    assert agree(None, Strategy.SHARED) is None
    assert agree(Strategy.SHARED, Strategy.BOUND) == Strategy.LOADED
    assert agree(None, Strategy.SHARED, Strategy.BOUND) == Strategy.LOADED


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
        thread.join(PATIENCE)
    return found


def test_each_task_is_done_once_and_its_result_is_on_all_ranks() -> None:
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
        first = ranks.distribute(
            sizes, work, known=known, on_result=kept.__setitem__, progress=progress.append
        )
        return [first, ranks.distribute([1], work), ranks.distribute([], work)]

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


def test_arrays_larger_than_a_message_of_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", 1000)
    large = np.arange(5000.0)
    found = together(2, lambda ranks: ranks.distribute([1], lambda i, tell: {"x": large}))
    assert all(np.array_equal(arrays["x"], large) for (arrays,) in found)


def test_ranks_exchange_values() -> None:
    found = together(3, lambda r: [r.gather(r.rank * 1.5), r.decide(f"rank {r.rank}"), r.is_leader])
    assert found == [[[0.0, 1.5, 3.0], "rank 0", rank == 0] for rank in range(3)]


@pytest.mark.parametrize(
    ("hosts", "local"),
    [("aaa", [0, 1, 2]), ("aab", [0, 1, 0]), ("aba", [0, 0, 1]), ("abc", [0, 0, 0])],
)
def test_restarted_ranks_do_not_mistake_dead_ranks_for_live_ones(
    hosts: str, local: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = HashStore()
    names: list[list[str]] = []
    monkeypatch.setattr(
        "losscli.evaluation.rendezvous.socket.gethostname",
        lambda: hosts[int(threading.current_thread().name)],
    )
    for _ in range(3):
        found: dict[int, tuple[str, int]] = {}

        def meet(rank: int, found: dict[int, tuple[str, int]] = found) -> None:
            found[rank] = rendezvous._choose_prefix(
                store, rank, 3, rendezvous._WaitNote(lambda _: None)
            )

        threads = [
            threading.Thread(target=meet, args=(rank,), name=str(rank)) for rank in (2, 0, 1)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        names.append([name for name, _ in found.values()])
        # The number among the ranks of one machine, which is the GPU where LOCAL_RANK is not set.
        assert [found[rank][1] for rank in range(3)] == local
    assert all(len(set(of)) == 1 and len(of) == 3 for of in names)
    assert len({of[0] for of in names}) == 3


def test_a_difference_between_ranks_is_an_error() -> None:
    def share(ranks: Ranks) -> None:
        ranks.check_same({"--seed": "1"})
        ranks.check_same({"the examples of test": f"{ranks.rank // 2}"})

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


def test_a_rank_that_has_ended_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TIMEOUT", 0.2)
    monkeypatch.setattr(module, "_HEARTBEAT", 0.05)
    monkeypatch.setattr(module, "_LINGER_AFTER_ERROR", 0.0)
    leader = Ranks(HashStore(), 0, 2)
    with pytest.raises(
        RanksError, match=r"rank 1 has sent nothing for .* Check that every rank runs"
    ):
        leader.gather(None)
    leader.leave(1)


def test_one_process_is_not_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_distributed()
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not is_distributed()
    monkeypatch.setenv("RANK", "0")
    assert is_distributed()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not is_distributed()


NEEDED = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize("missing", [NEEDED, NEEDED[:1], NEEDED[1:], NEEDED[2:]])
@pytest.mark.parametrize("rank", ["0", "3"])
def test_an_incomplete_environment_of_ranks_is_reported_in_one_line(
    rank: str,
    missing: tuple[str, ...],
    losscli: Losscli,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", rank)
    for name in NEEDED:
        if name in missing:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, "2")
    done = losscli("interpolate", "a.pt", "b.pt", "-o", "out")
    assert (done.status, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    are = "is" if len(missing) == 1 else "are"
    told = f"RANK is set in the environment ({rank}), and {', '.join(missing)} {are} not"
    assert told in done.stderr
    assert done.stderr.endswith("env -u RANK losscli …\n")
    assert not list(folder.glob("out*"))


def test_a_long_wait_for_other_ranks_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("losscli.evaluation.rendezvous.time.monotonic", lambda: now[0])
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "node1")):
        monkeypatch.setenv(name, value)
    told: list[str] = []
    wait = rendezvous._WaitNote(told.append)
    for now[0] in (0.0, 19.9, 20.1, 300.0):
        wait.check()
        assert len(told) == (now[0] > 20)
    assert "waiting up to 600 s for the other ranks" in told[0]
    assert "(RANK 0, WORLD_SIZE 2, MASTER_ADDR node1)" in told[0]


def test_a_store_that_has_ended_is_an_error_of_one_line() -> None:
    (port,) = ports(1)
    server = [TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)]
    calls: dict[str, Callable[[Ranks], Any]] = {
        "gather": lambda ranks: ranks.gather(1),
        "decide": lambda ranks: [ranks.decide(1), ranks.poll()],
        "check_same": lambda ranks: ranks.check_same({}),
        "distribute": lambda ranks: ranks.distribute([1.0], lambda i, tell: {}),
        "poll": lambda ranks: ranks.poll(),
    }
    clients = {
        (name, rank): Ranks(TCPStore("127.0.0.1", port, is_master=False), rank, 2)
        for name in calls
        for rank in (0, 1)
    }
    server.clear()
    for (name, rank), ranks in clients.items():
        with pytest.raises(RanksError) as caught:
            calls[name](ranks)
        assert "the run's store is gone: torchrun, or" in str(caught.value), (name, rank)
        assert str(caught.value).endswith("Give the same command to torchrun again")
        assert "\n" not in str(caught.value)
        assert "frame #" not in str(caught.value)
        # What cannot be told to others is no error of its own.
        ranks.fail("another")
        ranks.leave(1)


@forks
@pytest.mark.parametrize("when", ["at work", "all is written"])
def test_a_killed_store_ends_the_run_in_one_line_and_keeps_its_results(
    when: str, more: Path, losscli: Losscli
) -> None:
    """As when torchrun's own process is killed, which keeps the store."""
    command = "interpolate a.pt b.pt -m mlp:6-5-3 --points 21 --no-figure -o"
    whole = losscli(*command.split(), "whole")
    assert whole.status == 0, whole.stderr
    (port,) = ports(1)
    server = fork()
    if not server:
        kept = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        time.sleep(PATIENCE)
        del kept
        os._exit(0)

    def before(rank: int) -> None:
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        records = [0]
        record, finish = Journal.record, Journal.finish

        def counted(self: Journal, *rest: Any) -> None:
            record(self, *rest)
            records[0] += 1
            if records[0] == 3 and when == "at work":
                os.kill(server, signal.SIGKILL)

        def finished(self: Journal) -> None:
            if when != "at work":
                os.kill(server, signal.SIGKILL)
            finish(self)

        memory._CPU_STACK = 1
        if rank == 0:
            Journal.record, Journal.finish = counted, finished  # type: ignore[method-assign]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "ports", lambda number: [port] * number)
        first, _ = forked([f"{command} out"], 2, before)
    assert ended(server) == -signal.SIGKILL
    told = [line for line in first[0].stderr.splitlines() if not line.startswith("note: ")]
    if when == "at work":
        assert first[0].status == 1
        (line,) = told
        assert "losscli: the run's store is gone: torchrun, or the machine" in line
        assert line.endswith("Finished work is in out.journal: the same command resumes from "
                             "there")  # fmt: skip
        assert not Path("out.csv").exists()
        again = losscli(*command.split(), "out")
        assert again.status == 0, again.stderr
        assert "resuming from out.journal" in again.stderr
    else:
        assert (first[0].status, told) == (0, [])
    assert_same("whole.csv", "out.csv")
    assert not Path("out.journal").exists()


@given(
    st.integers(1, 200),
    st.integers(1, 64),
    st.integers(2, 9),
    st.booleans(),
    st.sets(st.integers(0, 200)),
)
def test_points_are_divided_without_gaps(
    number: int, most: int, ranks: int, even: bool, taken: set[int]
) -> None:
    cut = partial(_divide, most=most, ranks=ranks, least=3, even=even)
    whole = cut(number, [])
    known = [chunk for i, chunk in enumerate(whole) if i in taken]
    # What another number of processes took, too.
    alone = _divide(number, [], 7, 1, least=3, even=True)
    other = [chunk for i, chunk in enumerate(alone) if i in taken]
    for before in ([], known, other):
        chunks = cut(number, before)
        assert [i for chunk in chunks for i in range(*chunk)] == list(range(number))
        assert set(before) <= set(chunks)
        assert all(b - a <= most for a, b in set(chunks) - set(before))
    # Chunks that this many processes took leave the others as they were.
    assert cut(number, known) == whole
    # No rank has more than its share, and no chunk fewer points than share a first layer.
    sizes = [b - a for a, b in whole]
    assert max(sizes) <= max(math.ceil(number / ranks), 5)
    assert min(sizes) >= min(number, most, 3) or most < 6


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("number", [49, 99, 199, 961])
def test_no_rank_waits_long_for_another(number: int, ranks: int) -> None:
    chunks = _divide(number, [], number, ranks, least=3, even=False)

    def ends(speeds: Sequence[float]) -> float:
        """When all is done, as a share of the least time; a chunk costs three points more."""
        free = [0.0] * len(speeds)
        for start, stop in chunks:
            rank = min(range(len(free)), key=free.__getitem__)
            free[rank] += (stop - start + 3) / speeds[rank]
        return max(free) * sum(speeds) / (number + 3 * len(speeds))

    assert ends([1.0] * ranks) < 1.26
    # Even shares would take 1.5 to 2 times as long beside a rank of half the speed.
    assert ends([0.5, *[1.0] * (ranks - 1)]) < (2.1 if number < 3 * ranks * ranks else 1.47)


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGTERM, "0"), (signal.SIGINT, "1")])
def test_a_signal_ends_the_wait_for_other_ranks(
    number: signal.Signals, rank: str, folder: Path
) -> None:
    (port,) = ports(1)
    with socket.create_server(("127.0.0.1", port)) if rank == "1" else contextlib.nullcontext():
        there = {
            "RANK": rank,
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": f"{port}",
        }

        def before() -> None:
            os.environ.update(there)
            threading.Thread(target=tell, daemon=True).start()

        def tell() -> None:
            while not any(thread.name == "rendezvous" for thread in threading.enumerate()):
                time.sleep(0.01)
            Path("waiting").touch()

        pid = child(["interpolate", "a.pt", "b.pt", "-o", "out"], Path("log"), before)
        while not Path("waiting").exists():
            assert os.waitpid(pid, os.WNOHANG) == (0, 0)
            time.sleep(0.01)
        os.kill(pid, number)
        assert ended(pid) == 128 + number
    assert Path("log").read_text().count("\n") == 1
    assert not list(folder.glob("out*"))
