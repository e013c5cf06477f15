"""Faults on purpose: what a run meets on machines that are full, small, foreign or interrupted."""

from __future__ import annotations

import json
import os
import random
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from losscli.models import MLP
from tests.conftest import ROOT, Losscli

RUN = ["interpolate", "a.pt", "b.pt", "-o", "out", "--points", "5"]


def command(
    *arguments: str, limit: Callable[[], None] | None = None, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "losscli", *arguments],
        check=False,
        capture_output=True,
        preexec_fn=limit,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
    )


def listing(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()} - {"__pycache__"}


# What a process does between its start and its end, once losscli is loaded: a fork for each.
_FORKS = """
import os, signal, sys, time
import torch, typer
import losscli.cli, losscli.cli.app, losscli.studies.interpolation, losscli.figure
import matplotlib.backends.backend_agg
from losscli.console import Console

both = {signal.SIGINT, signal.SIGTERM}

def run():
    # Until the command has set its own, as a shell would have it.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
    os.setpgid(0, 0)
    with open(sys.argv[1] + "/stderr", "wb") as errors, open(os.devnull, "wb") as nothing:
        os.dup2(errors.fileno(), 2)
        os.dup2(nothing.fileno(), 1)
    try:
        losscli.cli.main(sys.argv[2:])
    except SystemExit as ended:
        os._exit(ended.code or 0)

# Once here: torch imports much of itself late.
where = [a.replace("out", sys.argv[1] + "/warm") for a in sys.argv[2:]]
if losscli.cli.run(where, Console(open(os.devnull, "w"), sys.stderr)):
    sys.exit(1)

for line in sys.stdin:
    number, delay = line.split()
    signal.pthread_sigmask(signal.SIG_BLOCK, both)  # a child is not itself at once
    child = os.fork()
    if not child:
        try:
            run()
        finally:
            os._exit(99)
    if int(number):
        time.sleep(float(delay))
        os.kill(child, int(number))
    begun = time.monotonic()
    _, status = os.waitpid(child, 0)
    try:
        os.killpg(child, 0)
        orphans = 1
    except ProcessLookupError:
        orphans = 0
    print(os.waitstatus_to_exitcode(status), orphans, flush=True)
"""


def test_ctrl_c_at_any_instant_ends_with_130_or_a_whole_run(folder: Path) -> None:
    """At 50 random instants, and SIGTERM at 10: one line, whole files or none, no orphans."""
    aside = folder / "aside"
    aside.mkdir()
    rng = random.Random(0)
    with subprocess.Popen(
        [sys.executable, "-c", _FORKS, str(aside), *RUN, "--no-figure"],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def interrupt(number: int, delay: float) -> tuple[int, str]:
            server.stdin.write(f"{number} {delay}\n")  # type: ignore[union-attr]
            server.stdin.flush()  # type: ignore[union-attr]
            status, orphans = map(int, server.stdout.readline().split())  # type: ignore[union-attr]
            assert orphans == 0
            return status, (aside / "stderr").read_text()

        before = listing(folder)
        whole = before | {"out.csv", "out.json"}
        assert interrupt(0, 0)[0] == 0  # which waits until the server is there
        (folder / "out.json").unlink()
        (folder / "out.csv").unlink()
        begun = time.monotonic()
        assert interrupt(0, 0)[0] == 0
        length = time.monotonic() - begun
        assert listing(folder) == whole
        unbroken = (folder / "out.csv").read_bytes()
        for i in range(60):
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
                notes, last = stderr.splitlines()[:-1], stderr.splitlines()[-1:]
                assert all(line.startswith("note: ") for line in notes), stderr
                assert all(line.startswith("losscli: ") for line in last), stderr
                # No temporary file: at most what the next run goes on from.
                assert left <= whole | {"out.journal"}
                # What it had written when it was interrupted is whole.
                if "out.json" in left:
                    json.loads((folder / "out.json").read_text())
        server.stdin.close()


def test_a_file_that_is_too_large_for_the_disk_leaves_none_behind(folder: Path) -> None:
    before = listing(folder)
    for size in (300, 5_000):  # full in a table, in the picture

        def limit(size: int = size) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        done = command(*RUN, limit=limit, PYTHONDONTWRITEBYTECODE="1")
        assert done.returncode == 1
        last = done.stderr.decode().splitlines()[-1]
        assert last.startswith("losscli: ")
        assert "File too large" in last
        assert {name for name in listing(folder) - before if not name.endswith(".journal")} == set()


@pytest.mark.parametrize("which", ["planning", "running"])
def test_a_checkpoint_that_vanishes_is_one_line(
    which: str, losscli: Losscli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from losscli.studies import interpolation

    lost = Path("b.pt")
    method = {"planning": "plan", "running": "run"}[which]
    original = getattr(interpolation.Interpolation, method)

    def late(*arguments: object, **options: object) -> object:
        if which == "planning":
            study = original(*arguments, **options)
            lost.unlink()
            return study
        lost.unlink()
        return original(*arguments, **options)

    wrapped = staticmethod(late) if which == "planning" else late
    monkeypatch.setattr(interpolation.Interpolation, method, wrapped)
    before = listing(folder)
    done = losscli(*RUN)
    # Both ends are mapped: they live on until the run is over, or it says what it misses.
    assert done.status in {0, 1}
    if done.status:
        assert done.stderr.count("\n") == 1
        assert listing(folder) == before - {"b.pt"}
    else:
        assert {"out.csv", "out.json", "out.png"} <= listing(folder)


def test_a_clock_that_jumps_changes_no_number(
    losscli: Losscli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = losscli(*RUN[:3], "-o", "-", "--points", 5)
    jumps = random.Random(0)
    for name in ("time", "monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, lambda: jumps.uniform(-1e9, 1e9))
    again = losscli(*RUN[:3], "-o", "-", "--points", 5)
    assert again.stdout == first.stdout
    done = losscli(*RUN)
    assert done.status == 0, done.stderr


def test_a_locale_without_utf_8_and_a_foreign_path(folder: Path) -> None:
    """The whole command with α and Δ to write, in an encoding that has neither."""
    place = folder / "a b\n'\"中é"
    place.mkdir()
    for name in ("a.pt", "b.pt"):
        (folder / name).rename(place / f"Δ {name}")
    names = [str(place / "Δ a.pt"), str(place / "Δ b.pt")]
    for out in ("-", str(place / "out")):
        done = command("interpolate", *names, "-o", out, "--points", "3", LC_ALL="C",
                       PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")  # fmt: skip
        assert done.returncode == 0, done.stderr
        done.stdout.decode("ascii")
        done.stderr.decode("ascii")
    assert {"out.csv", "out.json", "out.png"} <= {p.name for p in place.iterdir()}


def test_many_points_and_few_open_files(folder: Path) -> None:
    """10,000 points under ulimit -n 64."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    done = command("interpolate", "a.pt", "b.pt", "-o", "-", "--points", "10000", "-q", limit=limit)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 20_000


def test_two_thousand_checkpoints_under_few_open_files(folder: Path) -> None:
    many = folder / "many"
    many.mkdir()
    torch.manual_seed(0)
    weights = MLP("6-5-3").state_dict()
    for step in range(2000):
        moved = {name: t + 0.001 * step + 0.01 * torch.randn_like(t) for name, t in weights.items()}
        torch.save({"state_dict": moved, "losscli.model": "mlp:6-5-3"}, many / f"{step}.pt")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    done = command("trajectory", "many", "-o", "path", "--no-surface", "--no-figure", "-q",
                   "--limit", "5", limit=limit)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(Path("path.csv").read_text().splitlines()) == 1 + 2000 * 2


def test_a_pipe_that_breaks_in_a_shell_is_one_line(folder: Path) -> None:
    shell = " ".join(map(shlex.quote, [sys.executable, "-m", "losscli", *RUN[:3], "-o", "-"]))
    done = subprocess.run(
        ["bash", "-c", f"{shell} --points 3000 | head -1"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.startswith("alpha,split,loss")
    assert done.stderr == "losscli: stdout was closed before the result was written to it\n"
