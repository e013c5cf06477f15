"""``losscli init``: a losscli.toml that has been tried."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import losscli as package
from losscli.cli import run
from losscli.cli.console import Console
from losscli.models import MLP
from losscli.spec import Spec
from losscli.studies.config import config_content, read_config
from losscli.studies.project import _next
from tests.conftest import Losscli, Outcome

CODE = """
import torch
from losscli.models import MLP

def net(width=5):
    return MLP(f"6-{width}-3")

def data():
    return {"all": (torch.rand(300, 6, generator=torch.Generator().manual_seed(0)),
                    torch.arange(300) % 3)}

def fails():
    raise ValueError("no such disk")

def loss(outputs, targets):
    return torch.nn.functional.cross_entropy(outputs, targets, reduction="none") ** 2

def margin(outputs, targets):
    return outputs.max(1).values

def task(model, batch):
    return loss(model(batch[0]), batch[1])
"""

OWN = ("-m", "mine.py:net", "-d", "mine.py:data")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with code and checkpoints."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    folder = tmp_path / "project"
    (folder / "runs").mkdir(parents=True)
    monkeypatch.chdir(folder)
    Path("mine.py").write_text(CODE)
    for step in range(3):
        torch.manual_seed(step)
        torch.save(MLP("6-5-3").state_dict(), f"runs/step-{step}.pt")
    torch.save({**MLP("6-5-3").state_dict(), "extra": torch.ones(2)}, "more.pt")
    named = {"state_dict": MLP("6-5-3").state_dict(), "losscli.model": "mlp:6-5-3"}
    torch.save(named, "named.pt")
    return folder


def follow(done: Outcome, losscli: Losscli) -> Mapping[str, object]:
    """Runs the command that init prints last, and returns the summary of that run."""
    program, *arguments = shlex.split(done.stdout.splitlines()[-1].removeprefix("next"))
    assert program == "losscli"
    more = ["--residuals", 3] if arguments[0] == "trajectory" else ["--points", 3]
    done = losscli(*arguments, *more, "--no-figure", "-o", "next", "--force")
    assert done.status == 0, done.stderr
    told: Mapping[str, object] = json.loads(Path("next.json").read_text())
    return told


def test_own_model_and_data_are_tried_and_written(project: Path, losscli: Losscli) -> None:
    more = ("--loss", "mine.py:loss", "--metric", "accuracy", "--metric", "mine.py:margin")
    done = losscli("init", "runs/step-1.pt", *OWN, *more)
    assert done.status == 0, done.stderr
    assert Path("losscli.toml").read_text() == (
        'model = "mine.py:net"\ndata = "mine.py:data"\nloss = "mine.py:loss"\n'
        'metric = ["accuracy", "mine.py:margin"]\n'
    )
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[0] == "checkpoint runs/step-1.pt: fits the model"
    assert lines[1] == "model mine.py:net: 53 parameters in 4 tensors"
    assert lines[3] == f"loss mine.py:loss ({project}/losscli.toml)"
    assert lines[-1] == "next losscli interpolate init:0 runs/step-1.pt --trust"
    assert done.stderr == (
        "note: losscli.toml names code, or data on the hub: commands need --trust, unless your "
        "configuration lists this folder (see the README)\n"
        "note: init:0 is a new initialisation, not that of your training: if you saved a "
        "checkpoint before the first step, give it instead of init:0\n"
        f"note: wrote {project}/losscli.toml\n"
    )
    told = follow(done, losscli)
    assert told["model"] == "mine.py:net"
    assert told["metrics"] == ["accuracy", "mine.py:margin"]


def test_the_loss_of_the_first_batch_is_that_of_a_plain_loop(
    project: Path, losscli: Losscli
) -> None:
    done = losscli("init", "runs/step-2.pt", *OWN, "--limit", 300, "--batch-size", 70, "--json")
    told = json.loads(done.stdout)
    network = MLP("6-5-3").double()
    network.load_state_dict(torch.load("runs/step-2.pt"))
    x = torch.rand(300, 6, generator=torch.Generator().manual_seed(0)).double()[:70]
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(network(x), torch.arange(70) % 3).item()
    assert told["first_batch"] == {"all": {"examples": 70, "loss": pytest.approx(loss, rel=1e-6)}}
    assert told["next"] == (
        "losscli interpolate init:0 runs/step-2.pt --limit 300 --batch-size 70 --trust"
    )
    assert (told["command"], told["needs_trust"]) == ("init", True)
    note = "losscli.toml does not store --limit, --batch-size: give them to each command"
    assert note in told["notes"]
    done = losscli("init", "runs/step-2.pt", *OWN, "--limit", 300, "--trust", "--force")
    assert "losscli.toml does not store --limit: give it to each command\n" in done.stderr


def test_an_objective_is_written_and_tried(project: Path, losscli: Losscli) -> None:
    done = losscli("init", "runs/step-1.pt", *OWN, "--objective", "mine.py:task", "-q")
    assert done.status == 0, done.stderr
    assert Path("losscli.toml").read_text().endswith('objective = "mine.py:task"\n')
    assert follow(done, losscli)["objective"] == "mine.py:task"
    done = losscli("init", *OWN, "--objective", "mine.py:task", "--loss", "mse", "--force")
    assert (done.status, done.stderr.count("\n")) == (2, 1)
    assert "losscli.toml names a loss and an objective, which computes the loss" in done.stderr


NEXT = {
    "": "losscli interpolate init:0 init:1",
    "init:7": "losscli interpolate init:7 init:8",
    "runs": "losscli trajectory runs",
    "runs/step-0.pt": "losscli interpolate init:0 runs/step-0.pt",
    "more.pt --ignore-unexpected": "losscli interpolate init:0 more.pt --ignore-unexpected",
    "more.pt --rename extra=other --ignore-unexpected --seed 3": (
        "losscli interpolate init:0 more.pt --ignore-unexpected --rename extra=other --seed 3"
    ),
    "two": "losscli interpolate two/step-0.pt two/step-1.pt",
}


def test_the_loss_of_the_first_of_two_checkpoints_is_named(project: Path, losscli: Losscli) -> None:
    done = losscli("init", "runs", *OWN, "-q")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[0] == "checkpoint runs/step-0.pt and runs/step-2.pt: fit the model"
    (first,) = (line for line in lines if line.startswith("first batch"))
    assert first.endswith(" at runs/step-0.pt")


@pytest.mark.parametrize("arguments", NEXT)
def test_the_next_command_runs(arguments: str, project: Path, losscli: Losscli) -> None:
    Path("two").mkdir()
    for step in range(2):
        shutil.copy(f"runs/step-{step}.pt", "two")
    built_in = ("-m", "mlp:6-5-3", "-d", "npz:data.npz")
    import numpy as np

    np.savez("data.npz", inputs=np.eye(9, 6, dtype=np.float32), targets=np.arange(9) % 3)
    done = losscli("init", *arguments.split(), *built_in, "-q")
    assert (done.status, done.stderr) == (0, "")
    # Nothing but code needs trust.
    assert done.stdout.splitlines()[-1] == f"next         {NEXT[arguments]}"
    assert follow(done, losscli)["data"] == "npz:data.npz"


def test_the_next_command_begins_where_there_is_a_beginning() -> None:
    # An adapter changes its base, and a saved program has no initialisation.
    assert _next(["tuned"], "tuned", "my base", "transformers:my base") == (
        "losscli interpolate 'my base' tuned"
    )
    assert _next(["a.pt"], "a.pt", "a.pt", "pt2:m.pt2") == "losscli around a.pt"


def test_a_trusted_folder_needs_no_option(project: Path, losscli: Losscli) -> None:
    config = project.parent / "config/losscli/config.toml"
    config.parent.mkdir(parents=True)
    config.write_text(f'trusted = ["{project}"]\n')
    done = losscli("init", *OWN, "-q")
    assert done.stdout.splitlines()[-1] == "next         losscli interpolate init:0 init:1"
    assert "init:0 is a new" not in losscli("init", *OWN, "--force").stderr
    assert follow(done, losscli)["model"] == "mine.py:net"


FAILING = {
    "": (2, "init has nothing to write: no model and no data are given. Give --model and --data"),
    "-m mine.py:net": (2, "no data set given"),
    "-d mine.py:data": (2, "no model given"),
    "runs/step-0.pt -m mine.py:net,width=4 -d mine.py:data": (
        1,
        "The model is mine.py:net,width=4; choose with -m",
    ),
    "more.pt -m mine.py:net -d mine.py:data": (1, "or give --ignore-unexpected"),
    "runs/step-0.pt -m mine.py:net -d mine.py:data --rename x=y": (2, "no tensor of runs/step-0.p"),
    "none.pt -m mine.py:net -d mine.py:data": (1, "none.pt"),
    "-m mine.py:nett -d mine.py:data": (2, "Did you mean 'net'?"),
    "-m mine.py:net -d mine.py:fails": (1, "ValueError: no such disk"),
    "-m mine.py:net -d mine.py:data --loss mine.py:fails": (1, "the loss fails"),
    "-m mlp:6-5-2 -d mine.py:data": (1, "has the label 2, and the model's 2 outputs"),
    "-m mlp:5-5-3 -d mine.py:data": (1, "mat1 and mat2 shapes cannot be multiplied"),
    "-m code.toml -d mine.py:data": (1, "code.toml names code to run as its model"),
    "named.pt -m mine.py:net -d mine.py:data --limit 0": (2, "--limit 0 leaves no examples"),
}


@pytest.mark.parametrize("arguments", FAILING)
def test_nothing_is_written_if_the_trial_fails(
    arguments: str, project: Path, losscli: Losscli
) -> None:
    Path("code.toml").write_text('name = "mine.py:net"\n')
    before = sorted(project.rglob("*"))
    done = losscli("init", *arguments.split())
    status, message = FAILING[arguments]
    assert (done.status, done.stderr.count("\n"), done.stdout) == (status, 1, ""), done.stderr
    assert message in done.stderr
    assert [p for p in sorted(project.rglob("*")) if "__pycache__" not in str(p)] == before


def test_an_existing_file_is_overwritten_only_with_force(project: Path, losscli: Losscli) -> None:
    file = project / "losscli.toml"
    for content in ('data = "mine.py:data"\nloss = "mine.py:loss"\n', "broken = "):
        file.write_text(content)
        done = losscli("init", *OWN)
        assert (done.status, done.stderr) == (
            1, f"losscli: {file} exists. Edit it, or overwrite it with --force\n",
        )  # fmt: skip
        # What it held takes no part in the trial.
        assert losscli("init", "-m", "mine.py:net", "--force").status == 2
        assert file.read_text() == content
        done = losscli("init", *OWN, "--force")
        assert done.status == 0, done.stderr
        assert "cross_entropy (default for integer targets)" in done.stdout
        assert file.read_text() == 'model = "mine.py:net"\ndata = "mine.py:data"\n'


def test_a_line_that_has_no_effect_is_noted(project: Path, losscli: Losscli) -> None:
    done = losscli("init", "named.pt", *OWN)
    assert done.status == 0
    assert "model        mlp:6-5-3: 53 parameters" in done.stdout
    assert (
        'note: the line model = "mine.py:net" has no effect on this checkpoint: '
        "checkpoint metadata comes first\n"
    ) in done.stderr
    Path("runs/losscli.toml").write_text('data = "../mine.py:data"\n')
    done = losscli("init", "runs/step-0.pt", *OWN, "--force")
    assert done.status == 1  # init's own trust does not cover the other file
    assert f"{project}/runs/losscli.toml names code to run as its data" in done.stderr
    done = losscli("init", "runs/step-0.pt", *OWN, "--force", "--trust")
    assert done.status == 0, done.stderr
    assert (
        'note: the line data = "mine.py:data" has no effect on this checkpoint: '
        f"{project}/runs/losscli.toml comes first\n"
    ) in done.stderr
    assert done.stdout.splitlines()[-1].endswith("interpolate init:0 runs/step-0.pt --trust")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("arguments", "typed", "asked"),
    [
        (
            "",
            "runs/step-0.pt\nmine.py:net\nmine.py:data\n\n",
            ["Checkpoint", "Model", "Data", "Loss"],
        ),
        ("", "\n  mine.py:net \nmine.py:data\n\n", ["Checkpoint", "Model", "Data", "Loss"]),
        ("runs/step-0.pt -m mine.py:net", "mine.py:data\n\n", ["Data", "Loss"]),
        ("-m mine.py:net -d mine.py:data", "", []),
        ("named.pt", "\nmine.py:data\nmine.py:loss\n", ["Model", "Data", "Loss"]),
    ],
)
def test_a_terminal_is_asked_for_missing_values(
    arguments: str, typed: str, asked: list[str], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stdin(text: str) -> SimpleNamespace:
        return SimpleNamespace(isatty=lambda: True, buffer=io.BytesIO(text.encode()))

    monkeypatch.setattr("sys.stdin", stdin(typed))
    terminal = Terminal()
    status = run(["init", *arguments.split()], Console(io.StringIO(), terminal))
    told = terminal.getvalue()
    assert status == 0, told
    assert [
        told.count(word) for word in ("Checkpoint to", "Model, as", "Data, as", "Loss, as")
    ] == [int(word in asked) for word in ("Checkpoint", "Model", "Data", "Loss")]
    specs = read_config(project / "losscli.toml")
    assert specs["data"] == "mine.py:data"
    assert specs.get("model") == (None if "named" in arguments else "mine.py:net")
    assert specs.get("loss") == ("mine.py:loss" if "loss" in typed else None)
    if asked:
        # Without an answer nothing happens.
        Path("losscli.toml").unlink()
        monkeypatch.setattr("sys.stdin", stdin(""))
        terminal = Terminal()
        assert run(["init", *arguments.split()], Console(io.StringIO(), terminal)) == 2
        assert terminal.getvalue().endswith(
            "losscli: no answer: stdin ended. Give options instead of answers\n"
        )
        assert not Path("losscli.toml").exists()


def test_the_recorder_writes_the_same_file_as_init(project: Path, losscli: Losscli) -> None:
    specs = {"model_spec": "mine.py:net", "data_spec": "mine.py:data"}
    package.Recorder(MLP("6-5-3"), ".", steps=1, **specs).close()
    recorded = Path("losscli.toml").read_text()
    assert losscli("init", *OWN).status == 1
    assert losscli("init", *OWN, "--force", "-q").status == 0
    assert Path("losscli.toml").read_text() == recorded
    # And a recorder takes the file of init.
    Path("step-00000.safetensors").unlink()
    package.Recorder(MLP("6-5-3"), ".", steps=1, **specs).close()
    assert Path("losscli.toml").read_text() == recorded


@pytest.mark.parametrize(
    "specs",
    [
        {"model": "mine.py:net"},
        {"model": 'a "b"\\.py:net', "data": "x\n\ty.py:f", "metric": ["accuracy", "α.py:m"]},
        {"metric": "none"},
    ],
)
def test_the_written_file_is_read_back(specs: dict[str, str | list[str]], tmp_path: Path) -> None:
    file = tmp_path / "losscli.toml"
    file.write_bytes(config_content(specs))
    assert read_config(file) == specs
    assert all(Spec.parse(text) for text in specs.values() if isinstance(text, str))


def test_a_name_that_toml_cannot_hold_is_refused(project: Path, losscli: Losscli) -> None:
    name = os.fsdecode(b"\xff.py")
    shutil.copy("mine.py", name)
    done = losscli("init", "-m", f"{name}:net", "-d", "mine.py:data")
    assert (done.status, done.stderr.count("\n")) == (2, 1)
    assert "a losscli.toml is UTF-8, and a name in" in done.stderr
    assert not Path("losscli.toml").exists()
