"""``losscli trajectory`` and ``losscli plane`` as commands: names, files, pictures, errors."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

import losscli as library
from losscli.errors import CheckpointError
from losscli.models import MLP
from losscli.settings import Settings
from losscli.studies.trajectory import Trajectory
from tests.cases import sample
from tests.conftest import Losscli

pytestmark = pytest.mark.usefixtures("unlaid")


@pytest.fixture
def path(folder: Path) -> list[str]:
    """Six checkpoints of a bent path, in the folder ``path``."""
    (folder / "path").mkdir()
    a, b = (torch.load(folder / f"{name}.pt")["state_dict"] for name in "ab")
    torch.manual_seed(7)
    aside = MLP("6-5-3").state_dict()
    names = []
    for t in range(6):
        share = t / 5
        state = {n: a[n] + share * (b[n] - a[n]) + share * (1 - share) * aside[n] for n in a}
        names.append(f"path/step-{2 * t + 1}.pt")
        # Metadata says what the model is.
        torch.save({"state_dict": state, "losscli.model": "mlp:6-5-3"}, folder / names[-1])
    return names


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.usefixtures("unseen")
def test_trajectory_writes_path_surface_and_walk(
    losscli: Losscli, folder: Path, path: list[str]
) -> None:
    before = files(folder)
    done = losscli("trajectory", "path", "-o", "out", "--random-walk", "--residuals", 3)
    assert done.status == 0, done.stderr
    assert files(folder) - before == {
        "out.csv", "out.surface.csv", "out.walk.csv", "out.png", "out.json",
    }  # fmt: skip
    columns = {
        "out.csv": "step,checkpoint,projection,residual,distance,turn_degrees,split,loss,"
        "loss_stderr,accuracy",
        "out.surface.csv": "step,projection,residual,split,loss,loss_stderr",
        "out.walk.csv": "walk,step,projection,residual,distance,turn_degrees",
    }
    for name, header in columns.items():
        assert Path(name).read_text().splitlines()[0] == header
    rows = list(csv.DictReader(io.StringIO(Path("out.csv").read_text())))
    # step-9 comes before step-11, and every split has its rows.
    assert [row["checkpoint"] for row in rows[::2]] == path
    summary = json.loads(Path("out.json").read_text())
    assert summary["tables"] == ["surface", "walk"]
    assert len(summary["checkpoints"]) == 6
    assert summary["path"]["walked"] > summary["path"]["length"] > 0
    far = summary["path"]["farthest"]["step"]
    assert f"‖d‖, at checkpoint {far + 1} of 6 ({path[far]}), where p = " in done.stdout
    low = summary["splits"]["train"]["lowest"]["step"]
    assert re.search(rf"lowest seen .* at checkpoint {low + 1} of 6 \({path[low]}\)\n", done.stdout)


def test_names_come_from_stdin_in_their_order(folder: Path, path: list[str], at_hand: Path) -> None:
    done = subprocess.run(
        [at_hand / "losscli", "trajectory", "-", "-o", "-", "--no-surface"],
        input="\n".join(reversed(path)) + "\n\n",
        capture_output=True,
        text=True,
        check=True,
    )
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [row["checkpoint"] for row in rows[::2]] == path[::-1]
    assert done.stderr == ""


DRAWN: list[tuple[list[str], set[str]]] = [
    (["trajectory", "path", "--random-walk", "--residuals", "2"], {"surface", "walk"}),
    (["plane", "a.pt", "--points", "3", "--surface"], {"path"}),
    (["trajectory", "path", "--no-surface"], set()),
    (["plane", "a.pt", "b.pt", "path/step-5.pt", "--points", "3"], {"path"}),
    (["plane", "--pca", "path", "--points", "3", "--log"], {"path"}),
]


def assert_drawn_again(
    arguments: list[str], further: set[str], losscli: Losscli, suffix: str
) -> None:
    done = losscli(*arguments, "-o", "out", "--figure", f"first{suffix}")
    assert done.status == 0, done.stderr
    assert {p.name.split(".")[1] for p in Path().glob("out.*.csv")} == further
    log = ["--log"] if "--log" in arguments else []
    done = losscli("plot", "out.csv", *log, "--figure", f"again{suffix}")
    assert done.status == 0, done.stderr
    assert Path(f"again{suffix}").read_bytes() == Path(f"first{suffix}").read_bytes()


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(("arguments", "further"), sample(DRAWN, 0, 4))
def test_plot_draws_the_same_bytes_again(
    arguments: list[str], further: set[str], losscli: Losscli
) -> None:
    assert_drawn_again(arguments, further, losscli, ".svg")


@pytest.mark.stress
@pytest.mark.usefixtures("path", "laid_out")
@pytest.mark.parametrize(("arguments", "further"), DRAWN)
@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_plot_draws_the_same_layout_again(
    arguments: list[str], further: set[str], suffix: str, losscli: Losscli
) -> None:
    assert_drawn_again(arguments, further, losscli, suffix)


def test_without_its_summary_a_path_is_drawn_with_all_tables_of_its_stem(
    losscli: Losscli, folder: Path, path: list[str]
) -> None:
    losscli("trajectory", *path[:3], "-o", "out", "--residuals", 2, "--no-figure")
    Path("out.json").unlink()
    assert losscli("plot", "out.csv", "-o", "with.svg").status == 0
    Path("out.surface.csv").unlink()
    assert losscli("plot", "out.csv", "-o", "without.svg").status == 0
    assert Path("with.svg").read_bytes() != Path("without.svg").read_bytes()


def test_an_older_surface_is_not_drawn_with_a_path_that_has_none(
    losscli: Losscli, folder: Path, path: list[str]
) -> None:
    losscli("trajectory", *path[:3], "-o", "out", "--residuals", 2, "--no-figure")
    losscli("trajectory", *path[:3], "-o", "out", "--no-surface", "--force")
    assert losscli("plot", "out.csv", "-o", "again").status == 0
    assert Path("again.png").read_bytes() == Path("out.png").read_bytes()


@pytest.mark.usefixtures("unseen")
def test_several_paths_are_overlaid(losscli: Losscli, folder: Path, path: list[str]) -> None:
    losscli("trajectory", *path, "-o", "one", "--no-figure", "--residuals", 3)
    losscli("trajectory", *path[::2], "b.pt", "-o", "two", "--no-surface", "--no-figure")
    done = losscli("plot", "one.csv", "two.csv", "--label", "all", "--label", "some", "-o", "both")
    assert done.status == 0, done.stderr
    assert done.stdout == "both.png\n"


def test_the_csv_is_that_of_the_library(losscli: Losscli, folder: Path, path: list[str]) -> None:
    done = losscli("trajectory", *path, "-o", "-", "--residuals", 2)
    assert done.stdout == library.trajectory(path, residuals=2).table.to_csv()
    done = losscli("plane", "a.pt", "-o", "-", "--points", 3)
    assert done.stdout == library.plane(["a.pt"], points=3).table.to_csv()


@pytest.mark.parametrize(
    ("arguments", "points"),
    [
        (["trajectory", "path"], 6 * 22),
        (["trajectory", "path", "--no-surface"], 6),
        (["plane", "a.pt", "--points", "4"], 4 * 4 + 1),
        (["plane", "--pca", "path"], 31 * 31 + 6),
    ],
)
def test_a_dry_run_counts_and_evaluates_nothing(
    arguments: list[str], points: int, losscli: Losscli, folder: Path, path: list[str]
) -> None:
    before = files(folder)
    done = losscli(*arguments, "--dry-run", "--json")
    assert done.status == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["points"] == points
    assert plan["forward_passes"] == points * 40
    assert files(folder) == before
    assert losscli(*arguments, "--dry-run").status == 0


def test_stems_are_named_after_the_command_and_the_ends(
    losscli: Losscli, folder: Path, path: list[str]
) -> None:
    assert losscli("trajectory", *path, "--no-surface", "--no-figure").status == 0
    assert losscli("plane", "a.pt", "--points", 2, "--no-figure").status == 0
    assert Path("trajectory-path-step-1-step-11.csv").exists()
    assert any(name.startswith("plane-") and name.endswith("a.csv") for name in files(folder))


def assert_refused(arguments: str, status: int, text: str, losscli: Losscli, folder: Path) -> None:
    before = files(folder)
    done = losscli(*arguments.split())
    assert done.status == status, done.stderr
    assert done.stderr.startswith("losscli: ")
    assert done.stderr.count("\n") == 1
    assert text in done.stderr
    assert files(folder) == before


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        ("trajectory a.pt b.pt", 2, "three checkpoints or more, and got 2"),
        ("trajectory a.pt b.pt a.pt", 2, "no straight line between them"),
        ("trajectory path absent.pt b.pt", 1, "absent.pt"),
        ("trajectory empty", 1, "the folder empty contains no checkpoints"),
        ("trajectory path --residuals 1", 2, "--residuals 1 is not a surface"),
        ("trajectory path --reach -1", 2, "--reach -1.0 is not a multiple"),
        ("trajectory path other.pt b.pt", 1, "other.pt does not fit the model"),
        ("plane a.pt b.pt", 2, "one checkpoint or three, and got 2"),
        ("plane a.pt b.pt b.pt", 2, "B and C have the same parameters"),
        ("plane --pca a.pt b.pt", 2, "with --pca three checkpoints or more"),
        ("plane a.pt --points 1", 2, "--points must be at least 2, not 1"),
        ("plane a.pt --range 1 1", 2, "--range 1.0 1.0 is empty"),
        ("plane a.pt b.pt other.pt", 1, "other.pt does not fit the model"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_file(
    arguments: str, status: int, text: str, losscli: Losscli, folder: Path, path: list[str]
) -> None:
    (folder / "empty").mkdir()
    torch.save(MLP("6-4-3").state_dict(), "other.pt")
    assert_refused(arguments, status, text, losscli, folder)


def test_plot_refuses_tables_in_one_line_and_leaves_no_file(
    losscli: Losscli, folder: Path, path: list[str]
) -> None:
    losscli("interpolate", "a.pt", "b.pt", "-o", "line", "--no-figure", "--points", 3)
    losscli("trajectory", "path", "-o", "way", "--no-figure", "--residuals", 2)
    losscli("plane", "a.pt", "-o", "square", "--no-figure", "--points", 2)
    for arguments, status, text in (
        ("line.csv way.csv", 2, "have no axes in common"),
        ("square.csv square.csv", 2, "cannot be overlaid"),
        ("way.csv --terminal", 2, "only tables of interpolate"),
        ("way.surface.csv", 1, "is not a table that losscli can draw"),
    ):
        assert_refused(f"plot {arguments}", status, text, losscli, folder)


def test_stdin_is_read_once(losscli: Losscli, folder: Path) -> None:
    done = losscli("trajectory", "-", "-")
    assert done.status == 2
    assert "stdin can be read only once" in done.stderr


def test_results_of_another_path_are_kept(losscli: Losscli, folder: Path, path: list[str]) -> None:
    run = ["trajectory", *path[:3], "-o", "out", "--no-figure", "--residuals", "2"]
    assert losscli(*run).status == 0
    assert losscli(*run).status == 0
    done = losscli(*run[:-1], "3")
    assert done.status == 1
    assert "contains the results of another run" in done.stderr
    assert losscli(*run[:-1], "3", "--force").status == 0


def test_further_tables_of_another_run_are_kept_too(losscli: Losscli, folder: Path) -> None:
    losscli("interpolate", "a.pt", "b.pt", "-o", "run.path", "--no-figure", "--points", 3)
    before = Path("run.path.csv").read_bytes()
    done = losscli("plane", "a.pt", "-o", "run", "--no-figure", "--points", 2)
    assert done.status == 1
    assert "run.path.csv contains the results of another run" in done.stderr
    assert Path("run.path.csv").read_bytes() == before


def test_tables_of_an_older_run_are_removed(
    losscli: Losscli, folder: Path, path: list[str]
) -> None:
    run = ["trajectory", *path[:3], "-o", "out", "--no-figure", "--residuals", "2"]
    losscli(*run, "--random-walk")
    assert {p.name for p in folder.glob("out.*.csv")} == {"out.surface.csv", "out.walk.csv"}
    losscli(*run, "--no-surface", "--force")
    assert not list(folder.glob("out.*.csv"))


def test_a_surface_of_another_run_is_not_drawn(
    losscli: Losscli, folder: Path, path: list[str]
) -> None:
    losscli("trajectory", *path[:3], "-o", "one", "--no-figure", "--residuals", 2)
    losscli("trajectory", *path[2::-1], "-o", "two", "--no-figure", "--residuals", 2)
    Path("two.surface.csv").replace("one.surface.csv")
    done = losscli("plot", "one.csv")
    assert done.status == 1
    assert "one.surface.csv is of another run than one.csv" in done.stderr


def test_an_empty_name_is_refused(losscli: Losscli, folder: Path, path: list[str]) -> None:
    done = losscli("trajectory", path[0], "", path[1])
    assert done.status == 2
    assert "the name of a checkpoint is empty" in done.stderr


def test_an_initialisation_is_not_taken_for_a_folder(
    losscli: Losscli, folder: Path, path: list[str]
) -> None:
    (folder / "init:7").mkdir()
    Path(path[0]).rename("init:7/x.pt")
    done = losscli("trajectory", path[1], "init:7", path[2], "--no-surface", "-o", "-")
    assert done.status == 0, done.stderr
    assert ",init:7," in done.stdout
    done = losscli("trajectory", path[1], "init:7/x.pt", path[2], "--no-surface", "-o", "-")
    assert done.status == 2
    assert "./init:7/x.pt for a file" in done.stderr
    done = losscli("trajectory", path[1], "./init:7/x.pt", path[2], "--no-surface", "-o", "-")
    assert done.status == 0, done.stderr


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_names_on_stdin_end_where_their_lines_do(
    ending: str, folder: Path, path: list[str], at_hand: Path
) -> None:
    odd = "path/\u2028x\x0b.pt"
    Path(path[1]).rename(odd)
    done = subprocess.run(
        [at_hand / "losscli", "trajectory", "-", "-o", "-", "--no-surface"],
        input=("\ufeff" + ending.join([path[0], odd, path[2]]) + ending).encode(),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert odd in done.stdout.decode()


def test_a_checkpoint_that_changes_during_the_run_ends_it(
    folder: Path, path: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Trajectory.plan(
        path, Settings(), surface=True, residuals=2, reach=1.0, random_walk=False
    )
    Path(path[3]).write_bytes(Path(path[2]).read_bytes())
    with pytest.raises(CheckpointError, match=r"step-7\.pt was changed while losscli read it"):
        plan.run()
