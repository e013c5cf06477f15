"""Code that a losscli.toml names is run only where the user trusts the file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import losscli
from losscli.errors import SpecError, UntrustedCodeError, UsageError
from losscli.models import MLP
from losscli.studies import trust
from losscli.studies.trust import cure_for_distrust
from tests.conftest import Losscli
from tests.promises.test_ranks import forked, forks, pytestmark  # noqa: F401

CODE = """
import torch
from losscli.models import MLP

with open({marker!r}, "a") as file:
    file.write("ran")

def net(width=5):
    return MLP(f"6-{{width}}-3")

def data():
    generator = torch.Generator().manual_seed(0)
    return {{"all": (torch.rand(7, 6, generator=generator), torch.arange(7) % 3)}}

def loss(outputs, targets):
    return torch.nn.functional.cross_entropy(outputs, targets, reduction="none") ** 2

def margin(outputs, targets):
    return outputs.max(1).values

def task(model, batch):
    x, y = batch
    return loss(model(x), y)
"""

CALLABLES = {"model": "net,width=5", "data": "data", "loss": "loss", "metric": "margin"}
RUN = ("interpolate", "project/runs/a.pt", "project/runs/b.pt", "--points", 3, "--no-figure", "-q")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Writes the user's configuration."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    file = tmp_path / "config/losscli/config.toml"
    file.parent.mkdir(parents=True)

    def write(content: str) -> Path:
        file.write_text(content)
        return file

    return write


@pytest.fixture
def project(tmp_path: Path, config: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with code, a losscli.toml and two checkpoints; the command runs above it."""
    folder = tmp_path / "project"
    (folder / "runs").mkdir(parents=True)
    (folder / "src").mkdir()
    (folder / "src/trusted_code.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    name_code(folder)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        torch.save(MLP("6-5-3").state_dict(), folder / f"runs/{name}.pt")
    monkeypatch.chdir(tmp_path)
    return folder


def name_code(folder: Path, form: str = "src/trusted_code.py", **others: str) -> None:
    specs = {kind: f"{form}:{name}" for kind, name in CALLABLES.items()} | others
    lines = [f'{kind} = "{spec}"\n' for kind, spec in specs.items()]
    (folder / "losscli.toml").write_text("".join(lines))


@pytest.mark.parametrize("kind", CALLABLES)
def test_without_trust_an_error_names_the_file_and_the_options(
    kind: str, project: Path, losscli: Losscli
) -> None:
    built_in = {"model": "mlp:6-5-3", "data": "npz:none.npz", "loss": "mse", "metric": "accuracy"}
    code = f"src/trusted_code.py:{CALLABLES[kind]}"
    name_code(project, **(built_in | {kind: code}))
    own = ["-d", "project/data.npz"] if kind != "data" else []
    if own:
        import numpy as np

        np.savez(project / "data.npz", inputs=np.ones((3, 6), np.float32), targets=np.arange(3))
        own[1] = f"npz:{own[1]}"
    for more in ([], ["--dry-run"]):
        done = losscli(*RUN, *own, *more, "-o", "x")
        assert done.status == 1
        assert done.stderr == (
            f"losscli: {project}/losscli.toml names code to run as its {kind}, '{code}', and is "
            f"not trusted. If you trust it, give --trust, or write --{kind} project/{code}\n"
        )
    assert not Path("ran").exists()
    assert not list(Path().glob("x.*"))


def test_trusted_code_gives_the_bytes_that_options_give(
    project: Path,
    config: Callable[[str], Path],
    losscli: Losscli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = "project/src/trusted_code.py"
    options = [text for kind, name in CALLABLES.items() for text in (f"--{kind}", f"{code}:{name}")]
    expected = losscli(*RUN, *options, "-o", "-").stdout
    assert expected.splitlines()[0] == "alpha,split,loss,loss_stderr,margin"
    # A module is found in the folder of the file, and not in the current folder.
    shutil.copy(project / "src/trusted_code.py", project / "trusted_project_code.py")
    Path("trusted_project_code.py").write_text("open('evil', 'w')\n")
    for form in ("src/trusted_code.py", "trusted_project_code", f"{project}/src/trusted_code.py"):
        name_code(project, form)
        assert losscli(*RUN, "--trust", "-o", "-").stdout == expected
    config(f'trusted = ["~/elsewhere", "{project.parent}"]\n')
    assert losscli(*RUN, "-o", "out").status == 0
    identity = json.loads(Path("out.json").read_text())["identity"]
    # How the code became trusted is no part of the run: a run is resumed either way.
    Path("config/losscli/config.toml").unlink()
    done = losscli(*RUN, "--trust", "-o", "out")
    assert (done.status, done.stderr) == (0, "")
    assert json.loads(Path("out.json").read_text())["identity"] == identity
    # Nor does it depend on where the command runs.
    Path("deep").mkdir()
    monkeypatch.chdir("deep")
    done = losscli(*(f"../{x}" if "/" in str(x) else x for x in RUN), "--trust", "-o", "-")
    assert done.stdout == expected
    assert not Path("../evil").exists()


def test_trust_is_needed_in_python_too(project: Path) -> None:
    names = ("project/runs/a.pt", "project/runs/b.pt")
    with pytest.raises(UntrustedCodeError, match="give --trust"):
        losscli.interpolate(*names, points=3)
    result = losscli.interpolate(*names, points=3, trust=True)
    assert result.summary["loss"] == "src/trusted_code.py:loss"
    assert result.summary["metrics"] == ["src/trusted_code.py:margin"]


def test_several_metrics(project: Path) -> None:
    names = ("project/runs/a.pt", "project/runs/b.pt")
    file = project / "losscli.toml"
    text = file.read_text().replace(
        '"src/trusted_code.py:margin"', '["accuracy", "src/trusted_code.py:margin"]'
    )
    file.write_text(text)
    result = losscli.interpolate(*names, points=3, trust=True, loss="cross_entropy")
    assert list(result.table.columns[-2:]) == ["accuracy", "margin"]
    assert result.summary["sources"] == {"loss": "--loss", "metrics": str(file)}
    # An option comes first.
    result = losscli.interpolate(*names, points=3, trust=True, loss="cross_entropy", metric="none")
    assert result.table.columns[-1] == "loss_stderr"
    for wrong in ("[]", "[3]", "3"):
        file.write_text(text.replace('["accuracy", "src/trusted_code.py:margin"]', wrong))
        with pytest.raises(SpecError, match=r"losscli\.toml: 'metric' is not recognised"):
            losscli.interpolate(*names, points=3, trust=True)


def test_an_objective_replaces_a_loss(project: Path) -> None:
    names = ("project/runs/a.pt", "project/runs/b.pt")
    file, code = project / "losscli.toml", "src/trusted_code.py"
    start = f'model = "mlp:6-5-3"\ndata = "{code}:data"\n'
    loss, task = f'loss = "{code}:loss"\n', f'objective = "{code}:task"\n'

    def run(*names: str, **options: object) -> losscli.Result:
        return losscli.interpolate(*names, points=3, metric="none", **options)

    file.write_text(start + loss)
    expected = run(*names, trust=True)
    file.write_text(start + task)
    with pytest.raises(UntrustedCodeError, match=r"as its objective.* give --trust, or write --o"):
        run(*names, data="project/src/trusted_code.py:data")
    result = run(*names, trust=True)
    assert result.table["loss"] == pytest.approx(expected.table["loss"], rel=1e-6)
    option = run(*names, trust=True, objective="project/src/trusted_code.py:task")
    assert result.table == option.table
    assert result.summary["objective"] == f"{code}:task"
    assert result.summary["sources"]["loss"] == str(file)
    # An option, the metadata of a checkpoint or a nearer file is the first source of either.
    assert run(*names, trust=True, loss="cross_entropy").summary["objective"] is None
    other = {"state_dict": MLP("6-5-3").state_dict(), "losscli.loss": "cross_entropy"}
    torch.save(other, project / "runs/named.pt")
    assert run("project/runs/named.pt", names[1], trust=True).summary["objective"] is None
    (project / "runs/losscli.toml").write_text('loss = "cross_entropy"\n')
    assert run(*names, trust=True).summary["objective"] is None
    (project / "runs/losscli.toml").write_text('objective = "model"\n')
    with pytest.raises(UsageError, match="has no batches of its own, and with --batch-loss"):
        run(*names, trust=True)
    file.write_text(start + loss + task)
    (project / "runs/losscli.toml").unlink()
    with pytest.raises(SpecError, match=r"losscli\.toml names a loss and an objective, which com"):
        run(*names, trust=True)


@pytest.mark.parametrize("kind", CALLABLES)
def test_neither_metadata_nor_another_toml_file_is_trusted(
    kind: str, project: Path, config: Callable[[str], Path], losscli: Losscli
) -> None:
    config(f'trusted = ["{project}"]\n')
    code = f"../src/trusted_code.py:{CALLABLES[kind]}"
    state = MLP("6-5-3").state_dict()
    torch.save({"state_dict": state, f"losscli.{kind}": code}, project / "runs/a.pt")
    (project / "runs/losscli.toml").write_text(f'{kind} = "x.toml"\n')
    (project / "runs/x.toml").write_text('name = "../src/trusted_code.py:net"\n')
    options = [f"--{k}={v}" for k, v in (("model", "mlp:6-5-3"), ("data", "npz:x")) if k != kind]
    options[1:] = ["--data=project/src/trusted_code.py:data"] if kind != "data" else []
    for first in ("a", "b"):
        done = losscli(
            *RUN[:1], f"project/runs/{first}.pt", *RUN[2:], "--trust", *options, "-o", "x"
        )
        assert done.status == 1
        assert "and code is run only when the command line names it. If you trust" in done.stderr
        assert "give --trust" not in done.stderr
        assert done.stderr.count("\n") == 1
    assert not list(Path().glob("x.*"))


def test_a_trusted_file_may_name_data_on_the_hub(project: Path, losscli: Losscli) -> None:
    name_code(project, data="hf:someone/numbers")
    done = losscli(*RUN, "-m", "mlp:6-5-3", "-o", "x")
    assert done.status == 1
    assert "names 'hf:someone/numbers', a data set on the hub, and is not trusted" in done.stderr
    assert "give --trust, or write --data hf:someone/numbers" in done.stderr


def test_the_current_folder_comes_after_that_of_the_checkpoint(
    project: Path, losscli: Losscli, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.move(project / "runs", "runs")
    (project / "deep").mkdir()
    monkeypatch.chdir(project / "deep")
    names = [f"../../runs/{name}.pt" for name in "ab"]
    run = ("interpolate", *names, "--points", 3, "--no-figure", "--trust")
    done = losscli(*run, "-o", "here")
    assert done.status == 0, done.stderr
    assert losscli("interpolate", "init:0", "init:1", *run[3:], "-o", "drawn").status == 0
    Path("../../runs/losscli.toml").write_text('loss = "cross_entropy"\n')
    assert losscli(*run, "-o", "beside").status == 0
    told = {x: json.loads(Path(f"{x}.json").read_text()) for x in ("here", "drawn", "beside")}
    assert [t["loss"] for t in told.values()] == [
        *["src/trusted_code.py:loss"] * 2,
        "cross_entropy",
    ]
    assert {t["model"] for t in told.values()} == {"src/trusted_code.py:net,width=5"}


def test_modules_of_one_name_are_not_mixed_up(project: Path) -> None:
    for folder in (Path("other"), project):
        folder.mkdir(exist_ok=True)
        shutil.copy(project / "src/trusted_code.py", folder / "trusted_twin.py")
        name_code(folder, "trusted_twin")
    for name in "ab":
        shutil.copy(project / f"runs/{name}.pt", f"other/{name}.pt")
    losscli.interpolate("other/a.pt", "other/b.pt", points=3, trust=True)
    with pytest.raises(
        SpecError, match=r"Python loads only one module of each name: .*other.*project"
    ):
        losscli.interpolate("project/runs/a.pt", "project/runs/b.pt", points=3, trust=True)


# --- which folders are trusted ---------------------------------------------------------------

PLACES: dict[str, tuple[str, str, bool]] = {
    "the folder": ("{tmp}/project", "project", True),
    "a folder in it": ("{tmp}/project", "project/runs", True),
    "the folder above": ("{tmp}", "project", True),
    "a folder in it alone": ("{tmp}/project/runs", "project", False),
    "one whose name begins with it": ("{tmp}/pro", "project", False),
    "home": ("~/project", "project", True),
    "home itself": ("~", "project", True),
    "a link to the folder": ("{tmp}/link", "project", True),
    "a checkpoint behind a link": ("{tmp}/project", "link", True),
    "out of it": ("{tmp}/project", "project/out", False),
    "a link to a trusted file": ("{tmp}/project", "evil", False),
    "a file behind a link": ("{tmp}/project", "project/shared", False),
    "dots": ("{tmp}/project/runs/../../project", "project", True),
    "dots after a link": ("{tmp}/link/..", "project", True),
    "none": ("{tmp}/none", "project", False),
    "a loop": ("{tmp}/loop", "project", False),
    "the root": ("/", "project", True),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_trusted_folder_covers_those_in_it_after_links_are_followed(
    name: str,
    tmp_path: Path,
    config: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("project/runs", "evil", "theirs", "project/shared"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "link").symlink_to("project")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "project/out").symlink_to("../theirs")
    for folder in ("project", "project/runs", "theirs"):
        (tmp_path / folder / "losscli.toml").touch()
    (tmp_path / "evil/losscli.toml").symlink_to("../project/losscli.toml")
    (tmp_path / "project/shared/losscli.toml").symlink_to("../../theirs/losscli.toml")
    entry, place, trusted = PLACES[name]
    config(f'trusted = ["{entry.format(tmp=tmp_path)}"]\n')
    file = tmp_path / place / "losscli.toml"
    assert file.is_file()
    assert cure_for_distrust(file, trust=False) == (
        "" if trusted else "If you trust it, give --trust"
    )
    assert cure_for_distrust(file, trust=True) == ""


BAD = {
    "trusted = 3": "config.toml is not recognised. It may have the line trusted = [",
    "trusted = [3]": "config.toml is not recognised. It may have the line trusted = [",
    "trust = true": "config.toml is not recognised. It may have the line trusted = [",
    "trusted = ": "config.toml cannot be read: TOMLDecodeError",
    'trusted = ["."]': "the trusted folder '.' is relative. Write a path that starts with / or ~",
    'trusted = [""]': "the trusted folder '.' is relative. Write a path that starts with / or ~",
    'trusted = ["$HOME"]': "the trusted folder '$HOME' is relative. Write a path that",
    'trusted = ["~nobody-here"]': "the trusted folder '~nobody-here' is relative. Write",
}


@pytest.mark.parametrize("content", BAD)
def test_an_invalid_configuration_is_refused_in_one_line(
    content: str, project: Path, config: Callable[[str], Path], losscli: Losscli
) -> None:
    config(f"{content}\n")
    done = losscli(*RUN, "-o", "x")
    assert done.status == 1
    assert "names code to run as its model" in done.stderr
    assert BAD[content] in done.stderr
    assert ", or write --model project/src/trusted_code.py:net,width=5" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not Path("ran").exists()
    # It is not read where it is not needed.
    assert cure_for_distrust(project / "losscli.toml", trust=True) == ""


def test_a_truncated_configuration_trusts_nothing(
    project: Path, config: Callable[[str], Path]
) -> None:
    content = f'# mine\ntrusted = ["{project}", "{project.parent}/other"]'
    file = project / "losscli.toml"
    for end in range(len(content)):
        config(content[:end])
        assert cure_for_distrust(file, trust=False)
    config(content)
    assert not cure_for_distrust(file, trust=False)


@pytest.mark.parametrize("variable", ["", ".", "relative"])
def test_a_configuration_in_the_current_folder_is_not_used(
    variable: str, project: Path, losscli: Losscli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", variable)
    place = Path(variable, "losscli")
    place.mkdir(parents=True)
    (place / "config.toml").write_text('trusted = ["/"]\n')
    done = losscli(*RUN, "-o", "x")
    assert (done.status, done.stderr.count("\n")) == (1, 1)
    assert "If you trust it, give --trust" in done.stderr
    assert not Path("ran").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no owner")
def test_files_that_others_may_have_written(
    project: Path,
    config: Callable[[str], Path],
    losscli: Losscli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs: list[Path] = []
    found = trust._owners
    monkeypatch.setattr(trust, "_owners", lambda p: {4242} if p in theirs else found(p))
    file = project / "losscli.toml"
    for theirs[:] in ([project], [file]):
        for more in ([], ["--trust"]):
            done = losscli(*RUN, *more, "-o", "x")
            assert (done.status, done.stderr.count("\n")) == (1, 1)
            said = (
                f"{theirs[0]} belongs to another user, which --trust does not cover. If you trust"
            )
            assert (
                f"{said} it, add its folder to trusted = […] in {Path().absolute()}/" in done.stderr
            )
    assert not Path("ran").exists()
    # The user's own configuration may list the folders of others, as git's safe.directory does.
    own = config(f'trusted = ["{project}"]\n')
    assert losscli(*RUN, "-o", "x").status == 0
    for theirs[:] in ([file, own], [file, own.parent], [file]):
        if theirs == [file]:
            own.chmod(0o666)
        done = losscli(*RUN, "-o", "y")
        assert (done.status, done.stderr.count("\n")) == (1, 1)
        assert f"{own} is not used, since another user can write to it. Make it yo" in done.stderr
    assert not list(Path().glob("y.*"))


@forks
def test_each_process_needs_trust_of_its_own(
    project: Path, config: Callable[[str], Path], losscli: Losscli
) -> None:
    run = "interpolate project/runs/a.pt project/runs/b.pt --points 3 --no-figure -q -o"
    config(f'trusted = ["{project}"]\n')
    (Path("other/losscli")).mkdir(parents=True)
    assert losscli(*run.split(), "one").status == 0

    def elsewhere(rank: int) -> None:
        os.environ["XDG_CONFIG_HOME"] = str(Path("other" if rank else "config").absolute())

    first, other = forked([f"{run} two --trust", f"{run} none"], 2, elsewhere)
    assert [(first[0].status, other[0].status), bool(first[1].status)] == [(0, 0), True]
    assert Path("two.csv").read_bytes() == Path("one.csv").read_bytes()
    assert first[1].stderr.startswith("losscli: rank 1 on ")
    assert "give --trust" in first[1].stderr
    assert not list(Path().glob("none.*"))
