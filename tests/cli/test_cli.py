"""The command line: streams, exit statuses, files; in this process, and as a real one."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import losscli as library
from losscli.cli import main, run
from losscli.cli.console import Console
from losscli.errors import CheckpointError
from losscli.models import MLP
from tests.cases import sample
from tests.conftest import ROOT, Losscli
from tests.forks import child, ended, fork

pytestmark = pytest.mark.usefixtures("unlaid")

COMMAND = [sys.executable, "-m", "losscli"]


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_interpolate_writes_a_csv_a_picture_and_a_summary(losscli: Losscli, folder: Path) -> None:
    before = files(folder)
    done = losscli("interpolate", "a.pt", "b.pt", "-o", "out")
    assert done.status == 0
    assert files(folder) - before == {"out.csv", "out.png", "out.json"}
    with Path("out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["alpha", "split", "loss", "loss_stderr", "accuracy"]
    assert len(rows) == 51 * 2
    summary = json.loads(Path("out.json").read_text())
    keys = {
        "loss_a", "loss_b", "minimum", "barrier", "largest_rise", "monotonic", "local_minima",
    }  # fmt: skip
    assert keys <= summary["splits"]["train"].keys()
    assert summary["checkpoints"][0]["path"] == "a.pt"
    assert len(summary["checkpoints"][0]["sha256"]) == 64
    assert {"sweep", "total"} == summary["seconds"].keys()
    assert summary["examples"] == {"train": 29, "test": 11}
    with Image.open("out.png") as image:
        assert min(image.size) > 5 * image.info["dpi"][0]  # inches
    assert "lowest seen" in done.stdout
    assert done.stderr == "note: wrote out.csv, out.png, out.json\n"


def test_the_csv_is_that_of_the_library(losscli: Losscli, folder: Path) -> None:
    done = losscli("interpolate", "a.pt", "b.pt", "-o", "-", "--points", 7)
    assert done.stdout == library.interpolate("a.pt", "b.pt", points=7).table.to_csv()
    assert done.stderr == ""
    assert not any(name.endswith((".csv", ".png", ".json")) for name in files(folder))


@pytest.mark.usefixtures("unseen")
def test_the_default_stem_is_named_after_the_command_and_the_checkpoints(
    losscli: Losscli, folder: Path
) -> None:
    losscli("interpolate", "a.pt", "b.pt", "--points", 3)
    assert Path(f"interpolate-{folder.name}-a-b.csv").exists()
    spec = ["-m", "mlp:6-5-3", "-d", "npz:data.npz"]
    losscli("interpolate", "init:0", "init:1", *spec, "--points", 3)
    assert Path("interpolate-init-0-init-1.csv").exists()


@pytest.mark.usefixtures("unseen")
def test_json_is_one_object_on_one_line(losscli: Losscli, folder: Path) -> None:
    done = losscli("interpolate", "a.pt", "b.pt", "-o", "out", "--json", "-q", "--points", 3)
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    assert json.loads(done.stdout) == json.loads(Path("out.json").read_text())


def test_a_dry_run_counts_and_evaluates_nothing(losscli: Losscli, folder: Path) -> None:
    before = files(folder)
    done = losscli("interpolate", "a.pt", "b.pt", "--dry-run")
    assert done.status == 0
    assert "points       51, 49 at once" in done.stdout
    plan = json.loads(losscli("interpolate", "a.pt", "b.pt", "--dry-run", "--json").stdout)
    assert plan["forward_passes"] == 51 * 40
    assert plan["passes_over_data"] == 3  # the two ends, and all other points together
    assert not plan["streamed"]
    assert plan["bytes_of_data"] == 40 * (6 * 4 + 8)
    assert plan["moving"] == {"tensors": 4, "values": 53}
    assert files(folder) == before


@pytest.mark.usefixtures("unseen")
def test_named_figures_replace_the_png(losscli: Losscli, folder: Path) -> None:
    before = files(folder)
    run = ("interpolate", "a.pt", "b.pt", "--points", 3)
    losscli(*run, "-o", "x", "--figure", "p.svg", "--figure", "p.pdf")
    assert files(folder) - before == {"x.csv", "x.json", "p.svg", "p.pdf"}
    losscli(*run, "-o", "y", "--no-figure")
    assert {"y.csv", "y.json"} <= files(folder)
    assert "y.png" not in files(folder)


def test_plot_draws_the_same_bytes_again(losscli: Losscli, folder: Path) -> None:
    names = [f"x{suffix}" for suffix in (".png", ".svg", ".pdf", ".html")]
    figures = [f"--figure={name}" for name in names]
    losscli("interpolate", "a.pt", "b.pt", "-o", "x", "--points", 5, *figures, "--log")
    before = [Path(name).read_bytes() for name in names]
    for content, start in zip(before, (b"\x89PNG", b"<?xml", b"%PDF", b"<!DOCTYPE"), strict=True):
        assert content.lstrip()[: len(start)] == start
    again = losscli("plot", "x.csv", *figures, "--log")
    assert again.status == 0, again.stderr
    assert again.stdout.splitlines() == names
    assert [Path(name).read_bytes() for name in names] == before
    for figure in (figures[0], figures[-1]):
        other = losscli("plot", "x.csv", figure, "--title", "Something else")
        assert other.status == 1
        assert "another figure" in other.stderr
    assert [Path(name).read_bytes() for name in names] == before


@pytest.mark.usefixtures("unseen")
def test_plot_overlays_several_csvs(losscli: Losscli, folder: Path) -> None:
    losscli("interpolate", "a.pt", "b.pt", "-o", "x", "--no-figure", "--points", 3)
    losscli("interpolate", "b.pt", "a.pt", "-o", "y", "--no-figure", "--points", 3)
    done = losscli("plot", "x.csv", "y.csv", "--label", "forth", "--label", "back", "-o", "both")
    assert done.stdout == "both.png\n"
    drawn = losscli("plot", "x.csv", "y.csv", "--label", "forth", "--label", "back", "--terminal")
    assert drawn.status == 0
    assert "forth" in drawn.stdout
    assert "back" in drawn.stdout
    assert "\x1b" not in drawn.stdout


def beginning_at_once(at_hand: Path) -> dict[str, str]:
    """An environment with a losscli that has imported everything."""
    return {**os.environ, "PATH": f"{at_hand}{os.pathsep}{os.environ['PATH']}"}


def test_plot_reads_stdin(folder: Path, at_hand: Path) -> None:
    drawn = subprocess.run(
        "losscli interpolate a.pt b.pt -q -o - | losscli plot - --terminal",
        shell=True,
        check=True,
        capture_output=True,
        text=True,
        env=beginning_at_once(at_hand),
    )
    assert drawn.stderr == ""
    assert re.search("[\u2801-\u28ff]", drawn.stdout)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no header"),
        ("a,b\r\n1,2\r\n", "its columns are a, b"),
        ("alpha,split,loss,loss_stderr\r\n", "no rows"),
        ("alpha,split,loss,loss_stderr\r\n1,x\r\n", "record 2"),
        ("alpha,split,loss,loss_stderr\r\n1,x,y,z\r\n", "record 2"),
    ],
)
def test_plot_refuses_files_that_are_not_tables(
    content: str, message: str, losscli: Losscli, folder: Path
) -> None:
    Path("bad.csv").write_text(content)
    done = losscli("plot", "bad.csv")
    assert done.status == 1
    assert message in done.stderr
    assert not Path("bad.png").exists()
    assert losscli("plot", "absent.csv").status == 1
    assert losscli("plot", "-", "-").status == 2


@pytest.mark.parametrize(
    ("run", "number"),
    sample(
        [
            (("interpolate", "a.pt", "b.pt", "--points", 3), 2),
            (("sharpness", "a.pt", "b.pt", "--samples", 1, "--split", "test"), 2),
            (("barriers", "a.pt", "b.pt", "init:1", "--points", 3), 3),
            (("around", "a.pt", "b.pt", "--directions", 2, "--points", 3), 2),
        ],
        0,
        2,
    ),
)
def test_plot_takes_a_label_for_each_checkpoint(
    run: tuple[str, ...], number: int, losscli: Losscli, folder: Path
) -> None:
    assert losscli(*run, "-o", "x", "--no-figure").status == 0
    labels = [f"--label=run {i}" for i in range(number + 1)]
    done = losscli("plot", "x.csv", *labels)
    assert done.status == 2
    told = f"losscli: {number + 1} labels for {number} checkpoints. Give --label once for each"
    assert done.stderr == f"{told}, in order\n"
    assert not Path("x.svg").exists()
    assert losscli("plot", "x.csv", *labels[:-1], "--figure", "x.svg").status == 0
    drawn = Path("x.svg").read_text()
    assert all(re.search(rf"<!-- .*\brun {i}\b", drawn) for i in range(number))


@pytest.mark.usefixtures("unseen")
def test_results_of_another_run_are_kept(losscli: Losscli, folder: Path) -> None:
    run = ["interpolate", "a.pt", "b.pt", "-o", "out", "--points", "5"]
    losscli(*run)
    before = Path("out.csv").read_bytes()
    assert losscli(*run).status == 0
    swapped = ("interpolate", "b.pt", "a.pt", "-o", "out", "--points", 3)
    other = losscli(*swapped)
    assert other.status == 1
    assert "another run" in other.stderr
    assert "--force" in other.stderr
    assert Path("out.csv").read_bytes() == before
    assert losscli(*swapped, "--force").status == 0
    assert Path("out.csv").read_bytes() != before
    Path("mine.png").write_bytes(b"a picture of my cat")
    assert losscli("interpolate", "a.pt", "b.pt", "-o", "mine", "--points", 3).status == 1
    assert Path("mine.png").read_bytes() == b"a picture of my cat"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--nonsense"], 2, "No such option"),
        (["nonsense"], 2, "No such command"),
        (["interpolate", "a.pt"], 2, "Missing argument"),
        (["interpolate", "a.pt", "b.pt", "--points", "many"], 2, "points"),
        (["interpolate", "a.pt", "b.pt", "--range", "0"], 2, "range"),
        (["interpolate", "a.pt", "b.pt", "--range", "1", "0"], 2, "reversed"),
        (["interpolate", "a.pt", "b.pt", "--points", "0"], 2, "nothing to evaluate"),
        (["interpolate", "a.pt", "b.pt", "--dtype", "int8"], 2, "float32"),
        (["interpolate", "a.pt", "b.pt", "--figure", "x.gif"], 2, ".png, .svg, .pdf, .html"),
        (["interpolate", "a.pt", "b.pt", "--figure", "x.png", "--no-figure"], 2, "contradict"),
        (["interpolate", "a.pt", "b.pt", "-o", "-", "--json"], 2, "--json has no effect"),
        (["interpolate", "a.pt", "b.pt", "-o", ""], 2, "is a folder"),
        (["interpolate", "a.pt", "b.pt", "-o", "."], 2, "is a folder"),
        (["interpolate", "a.pt", "b.pt", "-o", "x/"], 2, "is a folder"),
        (["interpolate", "a.pt", "b.pt", "--seed", "9" * 30], 2, "not a seed"),
        (["interpolate", "a.pt", "b.pt", "-d", "leaves.py:data"], 1, "SystemExit"),
        (
            ["interpolate", "a.pt", "b.pt", "-o", "a.pt/x"],
            1,
            "a.pt is not a folder. Choose another",
        ),
        (["interpolate", "a.pt", "absent.pt"], 1, "no checkpoint absent.pt"),
        (["interpolate", "a.pt", "data.npz"], 1, "not a checkpoint that torch can read"),
        (["interpolate", "a.pt", "empty.pt"], 1, "empty.pt is empty"),
        (["interpolate", "a.pt", "text.pt"], 1, "not a checkpoint that torch can read"),
        (["interpolate", "a.pt", "evil.pt"], 1, "nothing was run"),
        (["interpolate", "a.pt", "."], 1, "is a folder"),
        (["interpolate", "a.pt", "b.pt", "-m", "cnn:3"], 1, "does not fit the model"),
        (["interpolate", "a.pt", "b.pt", "-m", "mlp"], 2, "sizes"),
        (["interpolate", "a.pt", "b.pt", "-d", "mnist:."], 1, "no IDX files"),
        (["interpolate", "a.pt", "b.pt", "-d", "ragged.npz"], 2, "unknown data"),
        (["interpolate", "a.pt", "b.pt", "-d", "npz:ragged.npz"], 1, "5 inputs for 4 targets"),
        (["interpolate", "a.pt", "b.pt", "-d", "npz:none.npz"], 1, "is empty"),
        (["interpolate", "a.pt", "b.pt", "-d", "npz:labels.npz"], 1, "labels 0 to 2"),
        (
            ["interpolate", "a.pt", "b.pt", "-d", "npz:wide.npz"],
            1,
            "fails on inputs of shape [5, 9]",
        ),
        (["inspect", "a.pt", "b.pt", "a.pt"], 2, "one checkpoint or two"),
        (["inspect", "absent.pt"], 1, "no checkpoint"),
        (["export", "a.pt", "b.pt", "--alpha", "0.5", "-o", "x.npz"], 2, "safetensors"),
        (["export", "a.pt", "b.pt", "--alpha", "0.5", "-o", "no/x.safetensors"], 1, "mkdir -p no"),
        (["list", "nonsense"], 2, "nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_leaves_no_file(
    arguments: list[str], status: int, message: str, losscli: Losscli, folder: Path
) -> None:
    Path("empty.pt").touch()
    Path("text.pt").write_text("not a checkpoint\n")

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, ("touch ran",)

    torch.save({"state_dict": {"w": torch.ones(1)}, "more": [Evil()]}, "evil.pt")
    x = np.ones((5, 6), np.float32)
    Path("leaves.py").write_text("import sys\ndef data(): sys.exit(3)\n")
    np.savez("ragged.npz", inputs=x, targets=np.zeros(4, int))
    np.savez("none.npz", inputs=x[:0], targets=np.zeros(0, int))
    np.savez("labels.npz", inputs=x, targets=np.arange(5))
    np.savez("wide.npz", inputs=np.ones((5, 9), np.float32), targets=np.zeros(5, int))
    before = files(folder)
    done = losscli(*arguments)
    assert done.status == status, done.stderr
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("losscli: ")
    assert done.stdout == ""
    assert files(folder) == before


def test_a_folder_that_cannot_be_written_to(
    losscli: Losscli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    done = losscli("interpolate", "a.pt", "b.pt", "-o", "out")
    assert done.status == 1
    assert "cannot be written to" in done.stderr


@pytest.mark.usefixtures("unseen")
def test_a_write_that_fails_leaves_nothing_behind(
    losscli: Losscli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(folder)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    done = losscli("interpolate", "a.pt", "b.pt", "-o", "out")
    assert done.status == 1
    assert "No space left" in done.stderr
    assert files(folder) == before


def test_names_from_files_bring_no_escape_codes_to_the_terminal(
    losscli: Losscli, folder: Path
) -> None:
    state = MLP("6-5-3").state_dict()
    torch.save(state | {"\x1b[2J\nevil": torch.ones(1)}, "x.pt")
    for arguments in (["interpolate", "a.pt", "x.pt", "-m", "mlp:6-5-3"], ["inspect", "x.pt"]):
        done = losscli(*arguments)
        assert "\x1b" not in done.stderr + done.stdout
        assert "\\x1b[2J\\nevil" in done.stderr + done.stdout


def test_traceback_shows_where_an_error_comes_from(losscli: Losscli, folder: Path) -> None:
    with pytest.raises(CheckpointError, match="absent"):
        losscli("interpolate", "a.pt", "absent.pt", "--traceback")


@pytest.mark.usefixtures("unseen")
def test_inspect_and_export_and_list(losscli: Losscli, folder: Path) -> None:
    assert "layers.0.weight  5×6" in losscli("inspect", "a.pt").stdout
    both = json.loads(losscli("inspect", "a.pt", "b.pt", "--json").stdout)
    assert both["rows"][0]["tensor"] == "layers.0.weight"
    assert "‖B − A‖" in losscli("inspect", "a.pt", "b.pt").stdout
    export = ["export", "a.pt", "b.pt", "--alpha", "0.5", "-o", "half.safetensors"]
    assert losscli(*export).stdout == "half.safetensors\n"
    assert losscli(*export).status == 1
    assert losscli(*export, "--force").status == 0
    done = losscli("interpolate", "half.safetensors", "b.pt", "--points", 2, "--json", "-o", "h")
    whole = losscli(
        "interpolate", "a.pt", "b.pt", "--points", 3, "--json", "-o", "w", "--range", 0, 1
    )
    assert done.status == 0
    with Path("w.csv").open(newline="") as file:
        middle = [r for r in csv.DictReader(file) if r["alpha"] == "0.5" and r["split"] == "train"]
    found = json.loads(done.stdout)["splits"]["train"]["loss_a"]
    assert found == pytest.approx(float(middle[0]["loss"]), rel=1e-6)
    assert whole.status == 0
    for kind, entry in (
        ("models", "mlp:"),
        ("data", "mnist:"),
        ("losses", "bce"),
        ("metrics", "accuracy"),
    ):
        listed = losscli("list", kind).stdout
        assert entry in listed
        assert "``" not in listed


def test_the_device_may_come_from_the_environment(
    losscli: Losscli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOSSCLI_DEVICE", "abacus")
    done = losscli("interpolate", "a.pt", "b.pt")
    assert done.status == 2
    assert "'abacus'" in done.stderr


_LOADED = """
import sys
import losscli, losscli.cli.app
from losscli.cli import run
from losscli.cli.console import Console
for arguments in (["--help"], ["interpolate", "--help"], ["--version"], ["plot", "--help"]):
    assert run(arguments, Console()) == 0
assert not {"torch", "matplotlib", "numpy"} & {*sys.modules}
assert run(["plot", "x.csv"], Console()) == 0
assert run(["plot", "x.csv", "--terminal"], Console()) == 0
assert "matplotlib" in sys.modules
assert "torch" not in sys.modules
"""


def test_help_loads_no_libraries_and_plot_does_not_load_torch(folder: Path) -> None:
    Path("x.csv").write_text(f"{_LINE}\n0,train,1,1\n1,train,2,1\n")
    subprocess.run(
        [sys.executable, "-c", _LOADED],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"},
    )
    assert Path("x.png").exists()


@pytest.mark.parametrize("unbuffered", [False, pytest.param(True, marks=pytest.mark.stress)])
def test_a_reader_that_closes_the_pipe_early_is_reported_in_one_line(
    unbuffered: bool, folder: Path, at_hand: Path
) -> None:
    command = [sys.executable, "-u", "-m", "losscli"] if unbuffered else ["losscli"]
    with subprocess.Popen(
        [*command, "interpolate", "a.pt", "b.pt", "-o", "-", "--points", "1001", "-q"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=beginning_at_once(at_hand) | {"PYTHONPATH": str(ROOT)},
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline() == b"alpha,split,loss,loss_stderr,accuracy\r\n"
        child.stdout.close()
        assert child.wait() == 1
        assert child.stderr.read() == (
            b"losscli: stdout was closed before the result was written to it\n"
        )


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        pytest.param(["plot", "--help"], 0, marks=pytest.mark.stress),
        (["--show-completion"], 0),
        (["--version"], 1),
    ],
)
def test_closing_the_pipe_of_a_help_text_is_not_an_error(arguments: list[str], status: int) -> None:
    """As by head. A result that is read no further is one."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as stdout:
        done = subprocess.run(
            # Completion is that of the shell that runs the command.
            ["bash", "-c", '"$0" "$@"; exit $?', *COMMAND, *arguments],
            check=False,
            stdout=stdout,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    assert done.returncode == status
    told = b"losscli: stdout was closed before the result was written to it\n"
    assert done.stderr == (told if status else b"")


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize("shell", [[], pytest.param(["bash"], marks=pytest.mark.stress)])
def test_completion_is_shown_and_installed_without_an_error(
    shell: list[str], tmp_path: Path
) -> None:
    for option in ("--show-completion", "--install-completion"):
        done = subprocess.run(
            ["bash", "-c", '"$0" "$@"; exit $?', *COMMAND, option, *shell],
            check=False,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path),
                 "SHELL": shutil.which("bash") or ""},
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        assert "_losscli_completion" in done.stdout or "completion installed" in done.stdout
    # What is installed is a script that bash can read, and that completes.
    asked = "source .bashrc && COMP_WORDS=(losscli insp) COMP_CWORD=1 && complete -p losscli"
    done = subprocess.run(
        ["bash", "-c", asked], check=False, capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0
    assert "_losscli_completion" in done.stdout


def test_a_command_that_exits_is_reported_even_if_an_argument_looks_like_completion(
    folder: Path, losscli: Losscli
) -> None:
    (folder / "exits.py").write_text("def net(): raise SystemExit(0)\n")
    done = losscli("interpolate", "init:0", "init:1", "-m", "exits.py:net", "-o",
                   "--install-completion")  # fmt: skip
    assert done.status == 1
    assert "code that this command runs ended with SystemExit(0)" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        ("interpolate a.pt b.pt --range 0,2", "--range 0 2"),
        ("interpolate a.pt b.pt --range -0.5,1.5", "--range -0.5 1.5"),
        ("plane a.pt --range 0,1e-3", "--range 0 1e-3"),
    ],
)
def test_numbers_separated_by_a_comma_are_reported(
    arguments: str, written: str, folder: Path, losscli: Losscli
) -> None:
    done = losscli(*arguments.split(), "-o", "out")
    assert (done.status, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.endswith(f". Separate the numbers by spaces: {written}\n")
    assert not list(folder.glob("out*"))


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("out", "options", "written"),
    sample(
        [
            ("line.png", [], {"line.csv", "line.json", "line.png"}),
            ("line.pdf", [], {"line.csv", "line.json", "line.pdf"}),
            ("line.html", [], {"line.csv", "line.json", "line.html"}),
            ("line.SVG", [], {"line.csv", "line.json", "line.SVG"}),
            ("line.csv", [], {"line.csv", "line.json", "line.png"}),
            ("line.svg", ["--no-figure"], {"line.csv", "line.json"}),
            ("line.svg", ["--figure", "p.png"], {"line.csv", "line.json", "p.png"}),
            ("line.1", [], {"line.1.csv", "line.1.json", "line.1.png"}),
            (".png", [], {".png.csv", ".png.json", ".png.png"}),
            ("new/deep/line", [], {f"new/deep/line.{s}" for s in ("csv", "json", "png")}),
            ("new/line.pdf", [], {f"new/line.{s}" for s in ("csv", "json", "pdf")}),
        ],
        0,
        2,
    ),
)
def test_out_is_a_stem_or_a_file_that_is_written_and_its_folder_is_made(
    out: str,
    options: list[str],
    written: set[str],
    folder: Path,
    losscli: Losscli,
) -> None:
    before = set(folder.rglob("*"))
    run = ("interpolate", "a.pt", "b.pt", "--points", 3, "-o", out, *options)
    if "new" in out:
        assert losscli(*run, "--dry-run").status == 0
        assert set(folder.rglob("*")) == before
    done = losscli(*run)
    assert done.status == 0, done.stderr
    files = {path for path in set(folder.rglob("*")) - before if path.is_file()}
    assert files == {folder / name for name in written}
    if "new" in out:  # the same command again is the same run
        assert losscli(*run).status == 0
    if out.endswith((".pdf", ".png")) and len(out) > 4 and not options:
        drawn = losscli("plot", str(Path(out).with_suffix(".csv")), "-o", f"again/{out}")
        assert (drawn.status, drawn.stdout) == (0, f"again/{out}\n")
        assert (folder / "again" / out).exists()


_WARNS = """
import logging, warnings
import torch, matplotlib
from torch import nn
def net():
    torch.nn.functional.mse_loss(torch.ones(2), torch.ones(2, 1))
    torch.nn.functional.dropout2d(torch.ones(2, 3))
    warnings.warn("Glyph 26085 missing", UserWarning)
    logging.getLogger("matplotlib.font_manager").warning("findfont: Font family not found.")
    return nn.Linear(6, 3)
"""


@pytest.mark.parametrize("quiet", [True, False])
def test_quiet_leaves_the_warnings_of_libraries_out(
    quiet: bool, folder: Path, at_hand: Path
) -> None:
    (folder / "warns.py").write_text(_WARNS)
    command = "interpolate init:0 init:1 -m warns.py:net -d npz:data.npz --points 3 -o out"
    done = subprocess.run(
        ["losscli", *command.split(), *["-q"] * quiet],
        check=False,
        capture_output=True,
        text=True,
        env=beginning_at_once(at_hand),
    )
    assert done.returncode == 0, done.stderr
    if quiet:
        assert done.stderr == ""
    for told in ("target size", "dropout2d", "Glyph 26085", "findfont"):
        assert (told in done.stderr) is not quiet, told


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize(
    "command",
    [
        "interpolate a.pt b.pt --points 3 --no-figure -o out",
        "align a.pt b.pt -o out.safetensors",
        "export a.pt b.pt --alpha 0.5 -o out.safetensors",
        "inspect a.pt b.pt --figure out.png",
        "plot line.csv --figure out.png",
    ],
)
def test_a_signal_during_the_report_says_that_the_results_are_written(
    command: str, losscli: Losscli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("line.csv").write_text(f"{_LINE}\n0,train,1,1\n1,train,2,1\n")
    monkeypatch.setattr(Console, "result", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    done = losscli(*command.split())
    assert (done.status, done.stderr) == (130, "losscli: interrupted; the results are written\n")
    assert list(folder.glob("out*"))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_one_line_and_no_file(
    sent: signal.Signals, status: int, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    Path("slow.py").write_text(
        "import pathlib, time, torch\n"
        "class Slow(torch.nn.Linear):\n"
        "    def __init__(self): super().__init__(6, 3)\n"
        "    def forward(self, x):\n"
        "        pathlib.Path('begun').touch()\n"
        "        time.sleep(0.05)\n"
        "        return super().forward(x)\n"
    )
    for seed, name in enumerate("cd"):
        torch.manual_seed(seed)
        torch.save(torch.nn.Linear(6, 3).state_dict(), f"{name}.pt")
    before = files(folder) | {"begun"}
    log = tmp_path_factory.mktemp("log") / "stderr"
    run = ["interpolate", "c.pt", "d.pt", "-m", "slow.py:Slow", "--points", "9999"]
    pid = child(run, log, lambda: setattr(sys, "dont_write_bytecode", True))
    while not Path("begun").exists():
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        time.sleep(0.01)
    os.kill(pid, sent)
    assert ended(pid) == status
    assert log.read_text().count("\n") == 1
    assert files(folder) == before


def test_a_closed_stdout_is_reported_in_one_line(folder: Path) -> None:
    (folder / "g.csv").write_text(f"{_LINE}\n0,train,1,1\n1,train,2,1\n")
    done = subprocess.run(
        f"{sys.executable} -m losscli plot g.csv --terminal >&-",
        shell=True,
        check=False,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1
    assert done.stderr == b"losscli: stdout was closed before the result was written to it\n"


def test_the_output_of_a_model_does_not_reach_stdout(folder: Path, at_hand: Path) -> None:
    Path("talking.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Linear):\n"
        "    def __init__(self): super().__init__(6, 3); print('built')\n"
        "    def forward(self, x): print('forward'); return super().forward(x)\n"
    )
    command = "losscli interpolate init:0 init:1 -m talking.py:Net -d npz:data.npz --points 3 -o -"
    done = subprocess.run(
        command.split(),
        check=False,
        capture_output=True,
        text=True,
        env=beginning_at_once(at_hand),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("alpha,split")
    assert "built" not in done.stdout
    assert "forward" not in done.stdout
    assert "forward" in done.stderr


TO_A_CLOSED_STDERR = "interpolate a.pt b.pt --points 3 --no-figure -o out"


@pytest.mark.stress
def test_a_closed_stderr_is_not_a_failure(folder: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m losscli {TO_A_CLOSED_STDERR} 2>&- >/dev/null",
        shell=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0
    assert Path("out.csv").exists()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_fork_with_a_closed_stderr_does_not_fail(folder: Path) -> None:
    pid = fork()
    if not pid:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.stdout = os.fdopen(1, "w")
            os.close(2)
            sys.stderr = None  # as Python has it that begins with a closed one
            main(TO_A_CLOSED_STDERR.split())
            os._exit(0)
        except SystemExit as end:
            os._exit(int(end.code or 0))
        finally:
            os._exit(99)
    assert ended(pid) == 0
    assert Path("out.csv").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize(
    "arguments", ["interpolate a.pt b.pt --points 3 -o -", "--help", "list models"]
)
def test_a_full_stdout_is_one_line(arguments: str, folder: Path, at_hand: Path) -> None:
    done = subprocess.run(
        f"losscli {arguments} >/dev/full",
        shell=True,
        check=False,
        stderr=subprocess.PIPE,
        text=True,
        env=beginning_at_once(at_hand),
    )
    assert done.returncode == 1
    assert "No space left" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize(
    "summary",
    [
        '{"command": "interpolate", "checkpoints": null, "splits": [1]}',
        '{"command": "interpolate", "checkpoints": "abc", "splits": {}}',
        '{"command": "interpolate", "checkpoints": [], "splits": {"train": 3}, "examples": {}}',
        '{"command": "interpolate", "checkpoints": [], "splits": {}, "examples": {}, "tables": 5}',
        "[]",
        "not json",
    ],
)
def test_plot_ignores_a_summary_that_is_not_its_own(
    summary: str, losscli: Losscli, folder: Path
) -> None:
    Path("x.csv").write_text(f"{_LINE}\n0,train,1,1\n1,train,2,1\n")
    Path("x.json").write_text(summary)
    assert losscli("plot", "x.csv").status == 0
    assert losscli("plot", "x.csv", "--terminal").status == 0


def test_plot_names_a_summary_that_losscli_did_not_write(losscli: Losscli, folder: Path) -> None:
    losscli("interpolate", "a.pt", "b.pt", "-o", "x", "--no-figure", "--points", 3)
    whole = Path("x.json").read_text()
    for place, value, fault in (
        (("splits", "train", "local_maxima"), ["x"], "[0] is not an object"),
        (("splits", "train", "local_minima"), [[]], "[0] is not an object"),
        (("splits", "train", "local_minima"), {"x": None}, " is not a list"),
        (("examples", "train"), [5], " is not a whole number"),
        (("stays", "\n"), 5, " is not a list"),
    ):
        summary = json.loads(whole)
        inner = summary
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        Path("x.json").write_text(json.dumps(summary))
        done = losscli("plot", "x.csv")
        assert done.status == 1
        where = ".".join(place).replace("\n", "\\n")
        told = f"losscli: x.json was not written by losscli: {where}{fault}. Move it, or"
        assert done.stderr.startswith(told)
        assert done.stderr.count("\n") == 1
        assert not Path("x.png").exists()


def test_plot_does_not_name_a_summary_that_is_not_the_cause(
    losscli: Losscli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losscli("interpolate", "a.pt", "b.pt", "-o", "x", "--no-figure", "--points", 3)

    def fails(*_: Any, **__: Any) -> Any:
        raise TypeError("of losscli")

    monkeypatch.setattr("losscli.plotting.interpolation.draw_interpolation", fails)
    done = losscli("plot", "x.csv")
    assert done.status == 1
    assert "unexpected TypeError: of losscli. This is a bug in losscli" in done.stderr


GRIDS = {
    "plane": ("x.csv", "x,y,split,loss,loss_stderr", "{i},{i},t,1,0"),
    "surface": (
        "x.surface.csv",
        "step,projection,residual,split,loss,loss_stderr",
        "{i},{p},{i},t,1,0",
    ),
    "barriers": (
        "x.csv",
        "a,b,split,distance,barrier,barrier_stderr,alpha,loss_a,loss_b",
        "a{i},b{i},t,1,0.5,0,0.5,1,1",
    ),
}


@pytest.mark.parametrize("kind", GRIDS)
def test_plot_refuses_an_almost_empty_grid(kind: str, losscli: Losscli, folder: Path) -> None:
    """It would be held as a whole: 20,000 rows would take gigabytes."""
    file, header, row = GRIDS[kind]
    rows = [row.format(i=i, p=i / 19_999) for i in range(20_000)]
    Path(file).write_text("\n".join([header, *rows, ""]))
    if kind == "surface":
        path = "step,checkpoint,projection,residual,distance,turn_degrees,split,loss,loss_stderr"
        Path("x.csv").write_text(f"{path}\n0,a,0,0,0,,t,1,0\n1,b,1,0,1,,t,1,0\n")
    done = losscli("plot", "x.csv")
    assert (done.status, done.stdout) == (1, "")
    assert done.stderr.startswith(f"losscli: {file} has 20,000 rows for the ")
    assert done.stderr.count("\n") == 1
    assert not Path("x.png").exists()


def test_no_more_than_three_names_that_do_not_fit_are_listed(
    losscli: Losscli, folder: Path
) -> None:
    torch.save({f"w{i}": torch.ones(1) for i in range(300)}, "many.pt")
    done = losscli("interpolate", "a.pt", "many.pt", "-o", "out")
    assert done.status == 1
    listed = "missing layers.0.weight [5, 6]; missing layers.0.bias [5]; unexpected w0 [1]"
    assert f"many.pt does not fit the model: {listed} and 301 more. " in done.stderr


@pytest.mark.usefixtures("unseen")
def test_plot_reads_a_csv_that_a_spreadsheet_saved(losscli: Losscli, folder: Path) -> None:
    losscli("interpolate", "a.pt", "b.pt", "-o", "x", "--no-figure", "--points", 3)
    Path("x.csv").write_bytes(b"\xef\xbb\xbf" + Path("x.csv").read_bytes())
    assert losscli("plot", "x.csv").status == 0


@pytest.mark.usefixtures("unseen")
def test_a_name_that_is_not_utf_8_works(losscli: Losscli, folder: Path) -> None:
    name = os.fsdecode(b"\xff.pt")
    Path("a.pt").rename(name)
    done = losscli("interpolate", name, "b.pt", "-o", "out", "--points", 3)
    assert done.status == 0, done.stderr
    assert json.loads(Path("out.json").read_text())["checkpoints"][0]["name"] == name


@pytest.mark.usefixtures("unseen")
def test_a_range_outside_the_line_gives_no_statements_about_the_line(
    losscli: Losscli, folder: Path
) -> None:
    done = losscli("interpolate", "a.pt", "b.pt", "--range", 1.5, 2, "--points", 3, "-o", "x")
    assert done.stdout.count("not evaluated: no point between A and B") == 4
    assert re.search("; (A|B|A and B), outside the range, (is|are) lower", done.stdout)
    assert losscli("plot", "x.csv").status == 0


def test_a_shell_receives_completions(folder: Path) -> None:
    done = subprocess.run(
        COMMAND,
        check=False,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "_LOSSCLI_COMPLETE": "complete_bash",
            "COMP_WORDS": "losscli in",
            "COMP_CWORD": "1",
        },
    )
    assert done.returncode == 0
    assert done.stdout.split() == ["interpolate", "inspect", "init"]
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("interpolate a.pt b.pt --batch-size 9999999999999999999999999", "2^31"),
        ("check a.pt --batch-size 9999999999999999999999999", "2^31"),
        ("align a.pt b.pt -o z.safetensors --batch-size 4294967296", "2^31"),
        ("interpolate a.pt b.pt --limit 9999999999999999999999999", "--limit 9999"),
        ("interpolate a.pt b.pt --points 99999999999999999999", "10000000 points"),
        ("interpolate a.pt b.pt --points 1000000000", "10000000 points"),
        (f"plane a.pt --points {'9' * 4000}", "10000000 points"),
        ("plane a.pt --points 4000", "10000000 points"),
        ("barriers a.pt b.pt init:0 --points 5000000", "10000000 points"),
        ("trajectory a.pt init:0 b.pt --residuals 5000000", "10000000 points"),
        ("around a.pt --directions 5000000", "--directions 5000000 gives more than 10000000"),
        ("around a.pt --points 99999999", "--points 99999999 gives more than 10000000"),
        (f"connect a.pt b.pt --steps 1{'0' * 30}", "is above 100,000,000. Give fewer"),
        ("around a.pt --along hessian --points 5000000", "--points 5000000 gives more than"),
        ("check a.pt --eigenvalues 99999999999999999999", "10000 or fewer"),
        ("sharpness a.pt --samples 99999999", "--samples 99999999 gives more than 10000000"),
        ("interpolate a.pt init:-1", "init:-1 has no seed"),
        ("align a.pt init:-1 -o z.safetensors", "init:-1 has no seed"),
        ("align a.pt b.pt -o z.safetensors --seed -1", "--seed -1 is not a seed"),
    ],
    ids=lambda value: value[:60],
)
def test_invalid_integers_are_refused(
    command: str, message: str, losscli: Losscli, folder: Path
) -> None:
    before = set(folder.iterdir())
    done = losscli(*command.split())
    assert done.status == 2
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert set(folder.iterdir()) == before


_LINE = "alpha,split,loss,loss_stderr"
_CHECK = "checkpoint,split,loss,gradient_norm,lambda_min,lambda_min_error,lambda_max,"
_CHECK += "lambda_max_error,minimal_ratio,verdict"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"{_LINE}\n0,train,1,1\n-1e308,train,1e308,1e308\n", "x.csv, record 3: alpha is -1e+308"),
        (f"{_LINE}\n0,train,1,1\n,train,1,1\n", "x.csv, record 3: alpha is nan"),
        (f"{_LINE}\n0,train,1,-1\n", "x.csv, record 2: loss_stderr is -1.0"),
        (f"{_LINE},examples\n0,train,1,1,{'9' * 400}\n", "record 2: the number under 'examples'"),
        (f"{_CHECK}\na,train,1,1,-1,-.1,1,.1,,saddle\n", "record 2: lambda_min_error is -0.1"),
        (
            ",".join([_LINE, *(f"m{k}" for k in range(25))]) + "\n0,train" + ",1" * 27 + "\n",
            "x.csv: a figure can have at most 24 metrics, not 25",
        ),
        (
            _LINE + "\n" + "".join(f"0,s{k},1,1\n" for k in range(201)),
            "a figure can show at most 200 curves, not 201. Choose fewer with --split",
        ),
        (
            "x,y,split,loss,loss_stderr\n" + "".join(f"0,0,s{k},1,1\n" for k in range(25)),
            "x.csv: a figure can have at most 24 splits, not 25",
        ),
    ],
    ids=["far", "nowhere", "stderr", "examples", "error", "metrics", "curves", "panels"],
)
@pytest.mark.parametrize("log", [[], ["--log"]], ids=["", "log"])
def test_plot_refuses_values_that_no_figure_can_show(
    content: str,
    message: str,
    log: list[str],
    losscli: Losscli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.csv").write_text(content)
    done = losscli("plot", "x.csv", *log)
    assert done.status in {1, 2}
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"]


def test_a_run_of_too_many_panels_is_refused_before_it_is_evaluated(
    losscli: Losscli, folder: Path
) -> None:
    before = set(folder.iterdir())
    (folder / "m.py").write_text(
        "".join(f"def m{k}(outputs, targets):\n    return targets.float()\n" for k in range(25))
    )
    metrics = [word for k in range(25) for word in ("--metric", f"m.py:m{k}")]
    done = losscli("interpolate", "a.pt", "b.pt", "--points", 3, *metrics)
    assert done.status == 2
    assert "at most 24 metrics, not 25" in done.stderr
    assert {path for path in folder.iterdir() if path.suffix != ".py"} - {
        folder / "__pycache__"
    } == before


@pytest.mark.parametrize("out", [".", "/", "..", "x/", ""])
@pytest.mark.parametrize(
    "command",
    [
        "interpolate a.pt b.pt", "trajectory a.pt b.pt init:1", "plane a.pt", "check a.pt",
        "barriers a.pt b.pt", "around a.pt", "sharpness a.pt", "plot g.csv", "align a.pt b.pt",
        "export a.pt b.pt --alpha 0",
    ],
)  # fmt: skip
def test_out_cannot_be_a_folder(command: str, out: str, losscli: Losscli, folder: Path) -> None:
    (folder / "g.csv").write_text(f"{_LINE}\n0,train,1,1\n1,train,2,1\n")
    before = set(folder.iterdir())
    done = losscli(*command.split(), "-o", out)
    assert done.status == 2
    assert done.stderr.startswith("losscli: --out '") or "the name of a safetensors" in done.stderr
    assert done.stderr.count("\n") == 1
    assert set(folder.iterdir()) == before


def test_a_picture_does_not_go_to_stdout(losscli: Losscli, folder: Path) -> None:
    (folder / "g.csv").write_text(f"{_LINE}\n0,train,1,1\n1,train,2,1\n")
    before = set(folder.iterdir())
    done = losscli("plot", "g.csv", "-o", "-")
    assert (done.status, done.stdout) == (2, "")
    assert "a figure cannot be written to stdout. Give --out STEM" in done.stderr
    assert set(folder.iterdir()) == before


@pytest.mark.parametrize("command", ["plot - --terminal", "trajectory -", "check -"])
def test_a_closed_stdin_is_one_line(
    command: str, losscli: Losscli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    done = losscli(*command.split())
    assert done.status == 2
    assert done.stderr == (
        "losscli: stdin is closed, so - gives no names. Give names, or a pipe to stdin\n"
    )


@pytest.mark.parametrize("arguments", [["--help"], ["plot", "-h"], ["--version"]])
def test_help_and_version_say_that_stdout_is_closed(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    err = io.StringIO()
    monkeypatch.setattr("sys.stdout", None)
    assert run(arguments, Console(None, err)) == 1
    assert err.getvalue() == "losscli: stdout was closed before the result was written to it\n"


def test_a_missing_command_is_reported(losscli: Losscli) -> None:
    done = losscli()
    assert (done.status, done.stderr) == (2, "losscli: no command given. See losscli --help\n")


def test_a_picture_too_large_for_the_disk_is_named(
    losscli: Losscli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(number: int) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr("losscli.results.result.os.fsync", fail)
    done = losscli("inspect", "a.pt", "--figure", "q.png")
    assert done.status == 1
    assert done.stderr == "losscli: q.png cannot be written: File too large. Make room\n"
    assert not list(folder.glob("*q.png*"))


def test_export_does_not_skip_a_lowest_point_without_an_alpha(
    losscli: Losscli, folder: Path
) -> None:
    (folder / "t.csv").write_text(f"{_LINE}\n0,test,2,1\n,test,1,1\n1,test,3,1\n")
    done = losscli(*[
        "export",
        "a.pt",
        "b.pt",
        "--best",
        "test",
        "--csv",
        "t.csv",
        "-o",
        "e.safetensors",
    ])
    assert done.status == 1
    assert "t.csv: the lowest loss on test, 1, is in a row without an alpha" in done.stderr
    assert not (folder / "e.safetensors").exists()


# The signal may fall between opening a file and the block that closes it.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_signal_during_a_finaliser_is_not_lost(losscli: Losscli, folder: Path) -> None:
    Path("code.py").write_text(
        "import os, signal, torch\n"
        "class Closing:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        [None for _ in range(1000)]\n"
        "def loss(outputs, targets):\n"
        "    if not os.path.exists('sent'):\n"
        "        open('sent', 'w').close()\n"
        "        Closing()\n"
        "    return torch.nn.functional.cross_entropy(outputs, targets, reduction='none')\n"
    )
    done = losscli("interpolate", "a.pt", "b.pt", "--loss", "code.py:loss", "--points", 2001)
    assert Path("sent").exists()
    assert done.status == 143
    assert done.stderr.startswith("losscli: terminated")
