"""The same command, after whatever ended it, goes on where it stopped and writes the same bytes."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from losscli.cli.console import Console
from losscli.evaluation.journal import Journal
from losscli.models import MLP
from tests.cases import sample
from tests.conftest import Losscli
from tests.forks import child, ended

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork"),
    # Of a fork beside threads: the child has one thread, and uses no other.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded"),
    pytest.mark.usefixtures("folder", "unlaid"),
]

TO = ["--no-figure", "-o", "out"]
LINE = ["interpolate", "a.pt", "b.pt", "--points", "7", *TO]
COMMANDS = {
    "interpolate": ["interpolate", "a.pt", "b.pt", "--points", "7", "-o", "out"],
    "trajectory": ["trajectory", "a.pt", "b.pt", "init:3", "--residuals", "4", *TO],
    "plane": ["plane", "a.pt", "--points", "4", *TO],
    "barriers": [
        *("barriers", "a.pt", "b.pt", "init:3", "--points", "5", "--disagreement", "--cka", *TO),
    ],
    "around": ["around", "a.pt", "b.pt", "--directions", "2", "--points", "5", *TO],
    "eigenvectors": [
        *("plane", "a.pt", "--axes", "hessian", "--path", "b.pt", "--points", "3", *TO),
    ],
    "along": ["around", "a.pt", "b.pt", "--along", "hessian", "--points", "5", *TO],
    "sharpness": ["sharpness", "a.pt", "b.pt", "--samples", "2", "--split", "test", *TO],
    "check": ["check", "a.pt", "b.pt", "--split", "test", "--tolerance", "10", *TO],
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small chunks, so that there is something between the first and the last."""
    monkeypatch.setattr("losscli.evaluation.memory.points_that_fit", lambda *_: 2)


def dies(records: int, number: int = signal.SIGKILL) -> Callable[[], None]:
    """Ends the process by a signal, once it has so many records."""

    def arm() -> None:
        real, left = Journal.record, [records]

        def record(self: Journal, *rest: Any) -> None:
            real(self, *rest)
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), number)

        Journal.record = record  # type: ignore[method-assign]

    return arm


def results(folder: Path) -> dict[str, Any]:
    """All that a run wrote, the seconds apart."""
    found: dict[str, Any] = {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if "out" in path.name and path.suffix != ".json"
    }
    summary = json.loads((folder / "out.json").read_text())
    del summary["seconds"]
    return {**found, "out.json": summary}


def truth(command: list[str], folder: Path, losscli: Losscli) -> dict[str, Any]:
    """What an unbroken run writes."""
    said(command, losscli)
    return taken(folder)


def said(command: list[str], losscli: Losscli) -> str:
    """Runs a command to its end in this process; returns what it says."""
    done = losscli(*command)
    assert done.status == 0, done.stderr
    return done.stderr


def taken(folder: Path) -> dict[str, Any]:
    """Takes what a run wrote away."""
    found = results(folder)
    for path in folder.glob("out*"):
        path.unlink()
    return found


@pytest.fixture
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "stderr"


@pytest.mark.parametrize("kills", [1, pytest.param(8, marks=pytest.mark.stress)])
@pytest.mark.parametrize("name", sample(COMMANDS, 0, 5))
def test_kill_9_at_any_instant_and_the_same_bytes(
    name: str, kills: int, folder: Path, log: Path, losscli: Losscli
) -> None:
    command = COMMANDS[name]
    begun = time.monotonic()
    # In this process: what is imported late is then there in every fork.
    assert losscli(*command).status == 0
    seconds = time.monotonic() - begun
    whole = taken(folder)
    assert ended(child(command, log, dies(2))) == -signal.SIGKILL
    assert (folder / "out.journal").exists()
    instants = random.Random(name)
    for _ in range(kills):
        pid = child(command, log)
        time.sleep(instants.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        ended(pid)
    said(command, losscli)
    # Neither the journal nor anything temporary is left.
    assert results(folder) == whole


@pytest.mark.parametrize(
    ("number", "status", "how"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")],
)
def test_a_signal_keeps_finished_work_and_names_the_journal(
    number: int, status: int, how: str, folder: Path, log: Path, losscli: Losscli
) -> None:
    whole = truth(LINE, folder, losscli)
    assert ended(child(LINE, log, dies(2, number))) == status
    assert log.read_text().splitlines()[-1] == (
        f"losscli: {how}; finished work is in out.journal: the same command resumes from there"
    )
    assert [path.name for path in folder.glob("*out*")] == ["out.journal"]
    assert "resuming from out.journal\n" in said(LINE, losscli)
    assert results(folder) == whole


def test_killed_between_two_files_of_the_results(folder: Path, log: Path, losscli: Losscli) -> None:
    whole = truth(LINE, folder, losscli)

    def arm(files: int) -> Callable[[], None]:
        def patch() -> None:
            real, left = Path.replace, [files]

            def replace(self: Path, target: Any) -> Any:
                if not str(target).endswith(".journal"):
                    if not left[0]:
                        os.kill(os.getpid(), signal.SIGKILL)
                    left[0] -= 1
                return real(self, target)

            Path.replace = replace  # type: ignore[method-assign]

        return patch

    for files in range(2):
        assert ended(child(LINE, log, arm(files))) == -signal.SIGKILL
        assert not (folder / "out.csv").exists()
    said(LINE, losscli)
    assert results(folder) == whole


def test_a_full_disk_keeps_finished_work(folder: Path, log: Path, losscli: Losscli) -> None:
    command = [*LINE, "--batch-size", "8"]
    whole = truth(command, folder, losscli)
    assert ended(child(command, log, dies(1))) == -signal.SIGKILL
    room = (folder / "out.journal").stat().st_size + 700

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    assert ended(child(command, log, limit)) == 1
    assert (folder / "out.journal").stat().st_size <= room
    (folder / "out.journal").rename(folder / "kept")
    (folder / "kept").rename(folder / "out.journal")
    said(command, losscli)
    assert results(folder) == whole


def broken(command: list[str], log: Path) -> None:
    assert ended(child(command, log, dies(2))) == -signal.SIGKILL


def changed(what: str, folder: Path) -> list[str]:
    if what == "checkpoint":
        torch.manual_seed(9)
        torch.save(MLP("6-5-3").state_dict(), folder / "b.pt")
    elif what == "data":
        with np.load(folder / "data.npz") as arrays:
            content = dict(arrays)
        content["test_inputs"][-1, -1] += 1
        np.savez(folder / "data.npz", **content)
    elif what == "code":
        code = folder / "code_of_mine.py"
        code.write_text(code.read_text().replace("2 *", "3 *"))
    elif what == "imported late":
        (folder / "helper_of_mine.py").write_text("POWER = 2\n")
    elif what == "metric":
        return ["--metric", "code_of_mine.py:most,k=2"]
    return ["--limit", "9"] if what == "option" else []


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("checkpoint", "the checkpoint b.pt changed"),
        pytest.param("option", "--limit was not given and is 9", marks=pytest.mark.stress),
        pytest.param("data", "the examples of test changed", marks=pytest.mark.stress),
        pytest.param("code", "code_of_mine.py changed", marks=pytest.mark.stress),
        ("imported late", "helper_of_mine.py changed"),
        ("metric", '--metric was ["code_of_mine.py:most,k=1"] and is ["code_of_mine.py:most,k=2"]'),
    ],
)
def test_a_changed_input_starts_the_run_over_and_the_reason_is_reported(
    what: str, told: str, folder: Path, log: Path
) -> None:
    (folder / "code_of_mine.py").write_text(
        "import torch.nn.functional as F\n"
        "def loss(x, y):\n    return 2 * F.cross_entropy(x, y, reduction='none')\n"
        "def most(x, y, k):\n"
        "    from helper_of_mine import POWER\n"
        "    return x.topk(k).values.sum(-1) ** POWER\n"
    )
    (folder / "helper_of_mine.py").write_text("POWER = 1\n")
    command = [*LINE, "-m", "mlp:6-5-3", "--loss", "code_of_mine.py:loss"]
    first = [*command, "--metric", "code_of_mine.py:most,k=1"]
    broken(first, log)
    more = changed(what, folder)
    command = [*(command if "--metric" in more else first), *more]
    assert ended(child(command, log)) == 0, log.read_text()
    (note,) = [line for line in log.read_text().splitlines() if "starting over" in line]
    assert note.startswith("note: starting over instead of resuming out.journal: ")
    assert told in note
    found = results(folder)
    assert ended(child([*command, "--force"], log)) == 0, log.read_text()
    assert found == results(folder)


def test_two_runs_on_one_stem_at_a_time(folder: Path, losscli: Losscli) -> None:
    with Journal.open(folder / "out", "another", {}):
        done = losscli(*LINE)
    assert done.status == 1
    assert done.stderr.startswith("losscli: out.journal is in use by another run (this process)")
    assert done.stderr.count("\n") == 1
    assert not list(folder.glob("out*"))
    assert losscli(*LINE).status == 0


def test_results_of_another_run_and_force(folder: Path, log: Path, losscli: Losscli) -> None:
    other = [*LINE, "--points", "5"]
    said(other, losscli)
    before = results(folder)
    assert losscli(*LINE).status == 1
    assert results(folder) == before
    broken([*LINE, "--force"], log)
    assert {n: c for n, c in results(folder).items() if n != "out.journal"} == before
    said([*LINE, "--force"], losscli)
    found = results(folder)
    assert found == truth([*LINE, "--force"], folder, losscli)


def test_losses_that_are_zero_or_nan_are_recalled(
    folder: Path, log: Path, losscli: Losscli
) -> None:
    (folder / "odd.py").write_text(
        "import torch\ndef loss(x, y):\n"
        "    return torch.where(y == 0, 0.0, torch.where(y == 1, torch.nan, torch.inf))\n"
    )
    command = [*LINE, "--loss", "odd.py:loss"]
    whole = truth(command, folder, losscli)
    assert b"nan" in whole["out.csv"]
    broken(command, log)
    said(command, losscli)
    assert results(folder) == whole


def test_a_run_without_files_has_no_journal(folder: Path, losscli: Losscli) -> None:
    before = sorted(folder.iterdir())
    assert losscli(*LINE[:-1], "-").status == 0
    assert losscli(*LINE, "--dry-run").status == 0
    assert losscli(*LINE, "--loss", "nothing").status == 2
    assert sorted(folder.iterdir()) == before


def test_a_folder_that_cannot_be_written_to(
    folder: Path, losscli: Losscli, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "closed").mkdir(mode=0o500)
    command = [*LINE[:-1], "closed/out"]
    done = losscli(*command)
    if done.status == 0:  # root may write everywhere

        def refuse(path: Any, flags: int, *rest: Any, original: Any = os.open) -> Any:
            if flags & (os.O_WRONLY | os.O_RDWR):
                raise PermissionError(13, "Permission denied")
            return original(path, flags, *rest)

        for path in (folder / "closed").iterdir():
            path.unlink()
        monkeypatch.setattr("losscli.evaluation.journal.files.os.open", refuse)
        done = losscli(*command)
    assert done.status == 1
    assert "cannot be written" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list((folder / "closed").iterdir())


def test_state_dicts_of_one_file_are_different_runs(folder: Path, losscli: Losscli) -> None:
    states = {}
    for seed, key in enumerate(("ema", "model")):
        torch.manual_seed(seed)
        states[key] = MLP("6-5-3").state_dict()
    torch.save(states, folder / "two.pt")
    command = ["interpolate", "a.pt", "two.pt#ema", "-m", "mlp:6-5-3", *TO]
    assert losscli(*command, "--points", "3").status == 0
    command[2] = "two.pt#model"
    done = losscli(*command, "--points", "3")
    assert done.status == 1
    assert "another run" in done.stderr


def test_recalled_points_do_not_count_in_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("losscli.progress.time.monotonic", lambda: clock[0])
    stderr = io.StringIO()
    skipped = [0.0]
    with Console(io.StringIO(), stderr).progress(100, "points", lambda: skipped[0]) as tell:
        skipped[0] = 80
        tell(80)
        clock[0] = 20
        tell(80)
        tell(90)
    assert stderr.getvalue() == "90/100 points, 0:00:20 left\n"


@pytest.mark.parametrize(
    "name", sample(["interpolate", "trajectory", "plane", "barriers", "around"], 1, 2)
)
def test_recorded_points_are_skipped(
    name: str, folder: Path, log: Path, losscli: Losscli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All points that were finished, and no others, are left out of the rate."""
    broken(COMMANDS[name], log)
    kept: list[float] = []
    real_open, real_finish = Journal.open, Journal.finish

    def opened(*arguments: Any) -> Journal:
        journal = real_open(*arguments)
        records = [journal.recall(key) for key in journal._index]
        kept.append(sum(float(r["state"][0]) for r in records if r is not None))
        return journal

    def finished(self: Journal) -> None:
        kept.append(self.recalled)
        real_finish(self)

    monkeypatch.setattr(Journal, "open", opened)
    monkeypatch.setattr(Journal, "finish", finished)
    done = losscli(*COMMANDS[name])
    assert done.status == 0, done.stderr
    assert kept[0] == kept[1] > 0
