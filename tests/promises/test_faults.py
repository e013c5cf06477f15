"""Faults on purpose: what a run meets on machines that are full, small, foreign or interrupted."""

from __future__ import annotations

import csv
import ctypes
import io
import json
import logging
import os
import random
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from losscli.cli import main
from losscli.evaluation.journal import Journal
from losscli.evaluation.objective import Objective
from losscli.models import MLP
from losscli.studies import interpolation
from tests.cases import sample
from tests.conftest import ROOT, Losscli
from tests.forks import child, close_inherited, ended, fork

RUN = ["interpolate", "a.pt", "b.pt", "-o", "out", "--points", "5"]

TO = ["--no-figure", "-o", "out"]
STUDIES = {
    "interpolate": ["interpolate", "a.pt", "b.pt", "--points", "5", "--layerwise", *TO],
    "trajectory": [
        "trajectory",
        "a.pt",
        "b.pt",
        "init:3",
        "--residuals",
        "3",
        "--random-walk",
        *TO,
    ],
    "plane": ["plane", "a.pt", "b.pt", "init:3", "--points", "3", *TO],
    "barriers": ["barriers", "a.pt", "b.pt", "init:3", "--points", "3", *TO],
    "around": ["around", "a.pt", "b.pt", "--directions", "2", "--points", "3", *TO],
    "sharpness": ["sharpness", "a.pt", "b.pt", "--samples", "2", "--split", "test", *TO],
    "check": ["check", "a.pt", "b.pt", "--split", "test", "--tolerance", "10", *TO],
}
# All that write files; the last two draw what the first finds.
WRITING = {
    **STUDIES,
    "picture": RUN,
    "align": ["align", "a.pt", "b.pt", "-o", "out.safetensors"],
    "export": ["export", "a.pt", "b.pt", "--alpha", "0.5", "-o", "out.safetensors"],
    "soup": ["soup", "a.pt", "b.pt", "-o", "out.safetensors"],
    "plot": ["plot", "line.csv", "--figure", "out.png"],
    "inspect": ["inspect", "a.pt", "b.pt", "--figure", "out.png"],
}

forking = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


@pytest.fixture
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "stderr"


def ready(name: str, losscli: Losscli) -> list[str]:
    """A command, and what it needs."""
    if name == "plot":
        assert losscli(*RUN[:3], "--points", 3, "--no-figure", "-o", "line").status == 0
    return WRITING[name]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, *arguments],
        check=False,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
    )


def listing(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()} - {"__pycache__"}


def begin(command: list[str], errors: Path) -> int:
    """Begins a command as a shell does, in a fork of this process; returns the fork."""
    both = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, both)  # a fork is not itself at once
    pid = fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
        return pid
    try:
        # Until the command has set its own, as a shell would have it.
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
        signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
        os.setpgid(0, 0)
        with errors.open("w", 1, encoding="utf-8") as stderr, redirect_stderr(stderr):
            os.dup2(stderr.fileno(), 2)
            with redirect_stdout(io.StringIO()):
                main(command)
    except SystemExit as end:
        os._exit(int(end.code or 0))
    finally:
        os._exit(99)


@forking
def test_ctrl_c_while_a_finished_command_cleans_up_changes_nothing(
    losscli: Losscli, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []

    def interrupt(self: logging.Logger, _: object) -> None:
        heard.append(self.name)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(logging.Logger, "setLevel", interrupt)
    done = losscli("list", "losses")
    assert (done.status, done.stderr) == (0, "")
    assert heard == ["matplotlib"]


@forking
def test_a_second_ctrl_c_while_the_first_is_reported_cuts_no_message(
    losscli: Losscli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> list[object]:
        signal.raise_signal(signal.SIGINT)
        return []

    for _ in range(2):  # the second run is interrupted like the first
        with monkeypatch.context() as patch:
            patch.setattr(Path, "cwd", interrupt)
            patch.setattr("multiprocessing.active_children", interrupt)
            done = losscli("list", "losses")
        assert (done.status, done.stderr) == (130, "losscli: interrupted; nothing was written\n")


@forking
@pytest.mark.parametrize("instants", [6, pytest.param(60, marks=pytest.mark.stress)])
def test_ctrl_c_at_any_instant_ends_with_130_or_a_whole_run(
    instants: int, folder: Path, log: Path, losscli: Losscli
) -> None:
    """At random instants, and SIGTERM at every sixth: one line, whole files or none, no orphans."""
    command = [*RUN, "--no-figure"]
    rng = random.Random(0)
    # torch imports much of itself late: once here, and not in each fork.
    assert losscli(*command[:3], "--points", "3", "--no-figure", "-o", "warm").status == 0

    def interrupt(number: int, delay: float) -> tuple[int, str]:
        log.write_bytes(b"")
        pid = begin(command, log)
        if number:
            time.sleep(delay)
            os.kill(pid, number)
        status = ended(pid)
        with pytest.raises(ProcessLookupError):
            os.killpg(pid, 0)
        return status, log.read_text()

    before = listing(folder)
    whole = before | {"out.csv", "out.json"}
    begun = time.monotonic()
    assert interrupt(0, 0)[0] == 0
    length = time.monotonic() - begun
    assert listing(folder) == whole
    unbroken = (folder / "out.csv").read_bytes()
    for i in range(instants):
        for name in whole - before:
            (folder / name).unlink(missing_ok=True)
        number = signal.SIGTERM if i % 6 == 5 else signal.SIGINT
        status, stderr = interrupt(number, rng.random() * length * 1.05)
        left = listing(folder)
        if status == 0:
            assert left == whole
            assert (folder / "out.csv").read_bytes() == unbroken
        else:
            assert status == 128 + number, stderr
            told = [line for line in stderr.splitlines() if not line.startswith("note: ")]
            assert all(line.startswith("losscli: ") for line in told), stderr
            # Before it has begun, and once all is written, there is nothing to say.
            assert len(told) <= 1, stderr
            # No temporary file: at most what the next run goes on from.
            assert left <= whole | {"out.journal"}
            # What it had written when it was interrupted is whole.
            if "out.json" in left:
                json.loads((folder / "out.json").read_text())


def contents_of_new(folder: Path, before: set[str]) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in listing(folder) - before}


def numbers(files: dict[str, bytes]) -> dict[str, bytes]:
    """All but the summaries, which tell the time."""
    return {name: content for name, content in files.items() if not name.endswith(".json")}


@contextmanager
def limited(resource_: int, most: int) -> Iterator[None]:
    """Lets this process have no more of something."""
    _, hard = before = resource.getrlimit(resource_)
    resource.setrlimit(resource_, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource_, before)


@pytest.mark.usefixtures("unlaid")
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.stress)])
@pytest.mark.parametrize("name", sample(WRITING, 1))
def test_a_full_disk_leaves_whole_files_or_none(
    name: str, every: bool, folder: Path, losscli: Losscli
) -> None:
    """The disk is full from the start, and in the largest file or in each; then there is room."""
    command = ready(name, losscli)
    before = listing(folder)
    done = losscli(*command)
    assert done.status == 0, done.stderr
    whole = contents_of_new(folder, before)
    assert whole
    for file in whole:
        (folder / file).unlink()
    sizes = sorted({9, *(len(content) * 9 // 10 for content in whole.values())})
    for size in sizes if every else (sizes[0], sizes[-1]):
        # Python ignores the signal that comes with it.
        with limited(resource.RLIMIT_FSIZE, size):
            done = losscli(*command)
        assert done.status == 1
        last = done.stderr.splitlines()[-1]
        assert last.startswith("losscli: ")
        assert "File too large" in last
        left = contents_of_new(folder, before)
        assert left.keys() <= {"out.journal"}
        # No journal stays in which there is nothing.
        assert all(b'"key"' in content for content in left.values())
        # What is kept is told of.
        told = "inished work is in out.journal: the same command resumes from there" in last
        assert told == (b'"key"' in left.get("out.journal", b""))
    done = losscli(*command)
    assert done.status == 0, done.stderr
    assert numbers(contents_of_new(folder, before)) == numbers(whole)


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("name", sample([*STUDIES, "picture"], 1, 2))
def test_a_folder_with_the_name_of_a_result_prevents_all_results(
    name: str, folder: Path, losscli: Losscli
) -> None:
    assert losscli(*WRITING[name]).status == 0
    (folder / "out.csv").unlink()
    (folder / "out.csv").mkdir()
    before = contents_of_new(folder, {"out.csv"})
    done = losscli(*WRITING[name], "--force")
    assert done.status == 1
    assert "out.csv is a folder. Move it away" in done.stderr
    assert contents_of_new(folder, {"out.csv"}) == before


def _without_privilege() -> None:
    """Gives up what lets root write into folders that forbid it (CAP_DAC_OVERRIDE)."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    assert libc.capget(header, sets) == 0
    for i in range(2):
        sets[i] &= ~2
    assert libc.capset(header, sets) == 0


@forking
@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are of Linux")
@pytest.mark.parametrize("name", sample(WRITING, 0, 2))
def test_a_folder_without_write_permission_is_an_error(
    name: str, folder: Path, log: Path, losscli: Losscli
) -> None:
    command = ready(name, losscli)
    closed = folder / "closed"
    closed.mkdir()
    for end in ("", ".safetensors", ".png"):
        command = [f"closed/out{end}" if word == f"out{end}" else word for word in command]
    closed.chmod(0o555)
    before = listing(folder)
    assert ended(child(command, log, _without_privilege)) == 1
    told = log.read_text()
    assert "cannot be written" in told
    assert told.count("\n") == 1
    assert listing(closed) == set()
    assert listing(folder) == before


# A file that is not what it was


@pytest.mark.parametrize(
    ("when", "lost", "missed"),
    [
        ("planning", "a.pt", False),
        ("planning", "b.pt", True),
        ("running", "a.pt", False),
        ("running", "b.pt", True),
    ],
)
def test_a_removed_checkpoint_matters_only_if_it_is_read_again(
    when: str,
    lost: str,
    missed: bool,
    losscli: Losscli,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once everything is planned, or when half of the points are finished."""
    assert losscli(*RUN, "--no-figure").status == 0
    unbroken = Path("out.csv").read_bytes()
    for name in ("out.csv", "out.json"):
        Path(name).unlink()
    content, before = Path(lost).read_bytes(), listing(folder)
    with monkeypatch.context() as patch:
        if when == "planning":
            original = interpolation.Interpolation.plan

            def late(*arguments: Any, **options: Any) -> Any:
                study = original(*arguments, **options)
                Path(lost).unlink()
                return study

            patch.setattr(interpolation.Interpolation, "plan", staticmethod(late))
        else:
            meanwhile(patch, Path(lost).unlink)
        done = losscli(*RUN, "--no-figure")
    assert not Path(lost).exists()
    if missed:
        assert done.status == 1
        assert done.stderr.startswith("losscli: ")
        assert done.stderr.count("\n") == 1
        assert lost in done.stderr
        # What was finished is of the file as it was.
        assert listing(folder) - before <= {"out.journal"}
        Path(lost).write_bytes(content)
        assert losscli(*RUN, "--no-figure").status == 0
    else:
        # What was mapped of it stays as it was.
        assert done.status == 0, done.stderr
    assert Path("out.csv").read_bytes() == unbroken


def meanwhile(patch: pytest.MonkeyPatch, what: Callable[[], Any]) -> None:
    """Has something happen when a run has its first record."""
    original, happened = Journal.record, []

    def record(self: Journal, *rest: Any) -> None:
        original(self, *rest)
        if not happened:
            happened.append(True)
            what()

    patch.setattr(Journal, "record", record)


@pytest.mark.parametrize(
    ("how", "lost"),
    [
        ("in place", "a.pt"),
        ("replaced", "b.pt"),
        pytest.param("in place", "b.pt", marks=pytest.mark.stress),
        pytest.param("replaced", "a.pt", marks=pytest.mark.stress),
    ],
)
@pytest.mark.parametrize("name", sample(STUDIES, 1, 2))
def test_a_checkpoint_that_changes_ends_the_run(
    name: str, how: str, lost: str, losscli: Losscli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is mapped changes with its file: no result may be of a mixture, nor be kept."""
    before = listing(folder)
    content = bytearray(Path(lost).read_bytes())

    def change() -> None:
        at = content.index(torch.load(lost)["state_dict"]["layers.0.weight"].numpy().tobytes())
        content[at : at + 40] = bytes(40)
        if how == "replaced":
            Path("new").write_bytes(content)
            Path("new").replace(lost)
        else:
            with Path(lost).open("r+b") as file:
                file.write(content)

    meanwhile(monkeypatch, change)
    done = losscli(*WRITING[name])
    assert done.status == 1, done.stderr
    assert done.stderr == (
        f"losscli: {lost} was changed while losscli read it. Run again when no program "
        "writes to it\n"
    )
    assert listing(folder) == before


# Memory


# How many points, and how many examples, fit into memory.
FIT = ((3, 64), (2, 7), (1, 64), (1, 2), (1, 1))


@pytest.mark.parametrize("fit", [FIT[1::3], pytest.param(FIT, marks=pytest.mark.stress)])
@pytest.mark.parametrize(
    "name", sample(["interpolate", "trajectory", "plane", "barriers", "around"], 0)
)
def test_out_of_memory_at_any_size_gives_the_same_numbers(
    name: str,
    fit: Sequence[tuple[int, int]],
    losscli: Losscli,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
) -> None:
    command = [*WRITING[name][:-1], "-", "--dtype", "float64", "--split", "test"]
    truth = list(csv.reader(losscli(*command).stdout.splitlines()))
    real_at, real_plain = Objective.at, Objective.plain
    for points, batch in fit:

        def at(
            self: Objective, slice_: Any, coordinates: Sequence[Any], *rest: Any,
            points: int = points, batch: int = batch,
        ) -> Any:  # fmt: skip
            if len(coordinates) > points or self.batch_size > batch:
                raise torch.OutOfMemoryError("on purpose")
            return real_at(self, slice_, coordinates, *rest)

        def plain(self: Objective, *rest: Any, batch: int = batch) -> Any:
            if self.batch_size > batch:
                raise MemoryError
            return real_plain(self, *rest)

        monkeypatch.setattr(Objective, "at", at)
        monkeypatch.setattr(Objective, "plain", plain)
        done = losscli(*command)
        assert done.status == 0, (points, batch, done.stderr)
        found = list(csv.reader(done.stdout.splitlines()))
        assert len(found) == len(truth)
        for one, other in zip(found, truth, strict=True):
            for cell, value in zip(one, other, strict=True):
                try:
                    assert float(cell) == pytest.approx(
                        float(value), rel=1e-9, abs=1e-12, nan_ok=True
                    )
                except ValueError:
                    assert cell == value
    monkeypatch.setattr(Objective, "plain", lambda *_: (_ for _ in ()).throw(MemoryError()))
    before = listing(folder)
    done = losscli(*WRITING[name])
    assert done.status == 1
    assert done.stderr.startswith("losscli: one point and one example do not fit into the memory")
    assert done.stderr.count("\n") == 1
    assert listing(folder) == before


def test_a_clock_that_jumps_changes_no_number(
    losscli: Losscli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = losscli(*RUN[:3], "-o", "-", "--points", 5)
    jumps = random.Random(0)
    for name in ("time", "monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, lambda: jumps.uniform(-1e9, 1e9))
    again = losscli(*RUN[:3], "-o", "-", "--points", 5)
    assert again.stdout == first.stdout
    done = losscli(*RUN, "--no-figure")
    assert done.status == 0, done.stderr


def test_a_locale_without_utf_8_a_foreign_path_and_a_missing_backend(
    folder: Path,
) -> None:
    """The whole command with α and Δ to write, in an encoding that has neither.

    With own code, whose folder has files with the names of libraries.
    """
    for name in ("torch", "numpy", "matplotlib", "sqlite3", "json", "losscli"):
        (folder / f"{name}.py").write_text("raise SystemExit('a file of the folder was run')\n")
    (folder / "own.py").write_text(
        "from losscli.models import MLP\ndef net():\n    import sqlite3\n    return MLP('6-5-3')\n"
    )
    place = folder / "a b\n'\"中é"
    place.mkdir()
    for name in ("a.pt", "b.pt"):
        (folder / name).rename(place / f"Δ {name}")
    names = [str(place / "Δ a.pt"), str(place / "Δ b.pt")]
    code = (
        "import sys\nfrom losscli.cli import main\n"
        "for out in sys.argv[-2:]:\n"
        "    try:\n        main([*sys.argv[1:-2], out])\n"
        "    except SystemExit as ended:\n        assert not ended.code\n"
    )
    done = python("-P", "-c", code, "interpolate", *names, "-m", "own.py:net", "--points", "3",
                  "-o", "-", str(place / "out"), LC_ALL="C", PYTHONUTF8="0",
                  PYTHONCOERCECLOCALE="0", MPLBACKEND="nope")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("ascii")
    assert done.stderr.decode("ascii")
    assert {"out.csv", "out.json", "out.png"} <= {p.name for p in place.iterdir()}


def few_files(most: int = 64) -> None:
    close_inherited()
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@forking
@pytest.mark.parametrize("points", [200, pytest.param(10_000, marks=pytest.mark.stress)])
def test_many_points_and_few_open_files(points: int, folder: Path, log: Path) -> None:
    """Under ulimit -n 64."""
    line = ["interpolate", "a.pt", "b.pt", "-o", "out", "--points", str(points), "--no-figure"]
    assert ended(child(line, log, few_files)) == 0, log.read_text()
    assert len(Path("out.csv").read_text().splitlines()) > 2 * points


@forking
@pytest.mark.parametrize(
    ("number", "files"), [(70, 32), pytest.param(2000, 64, marks=pytest.mark.stress)]
)
def test_many_checkpoints_under_few_open_files(
    number: int, files: int, folder: Path, log: Path
) -> None:
    """Of either kind more than the files that may be open."""
    many = folder / "many"
    many.mkdir()
    torch.manual_seed(0)
    weights = MLP("6-5-3").state_dict()
    for step in range(number):
        moved = {name: t + 0.001 * step + 0.01 * torch.randn_like(t) for name, t in weights.items()}
        if step % 2:
            save_file(moved, many / f"{step}.safetensors")
        else:
            torch.save({"state_dict": moved, "losscli.model": "mlp:6-5-3"}, many / f"{step}.pt")
    line = ["trajectory", "many", "-o", "path", "--no-surface", "--no-figure", "--split", "test"]
    assert ended(child(line, log, lambda: few_files(files))) == 0, log.read_text()
    assert len(Path("path.csv").read_text().splitlines()) == 1 + number


def in_a_shell(line: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a line of bash, in which {losscli} is the command with its arguments."""
    losscli = " ".join(map(shlex.quote, [sys.executable, "-m", "losscli", *arguments]))
    return subprocess.run(
        ["bash", "-c", line.format(losscli=losscli)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_a_removed_current_folder_is_one_line(folder: Path) -> None:
    done = in_a_shell("mkdir gone && cd gone && rmdir ../gone && {losscli}", "inspect", "a.pt")
    assert done.returncode == 2
    # What the shell itself says comes before.
    told = [line for line in done.stderr.splitlines() if not line.startswith("shell-init")]
    assert told == ["losscli: the current folder no longer exists. Change to a folder that exists"]
