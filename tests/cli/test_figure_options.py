"""The options of figures: stored, redrawn, and refused before anything is evaluated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cases import sample
from tests.conftest import Losscli

STUDIES: dict[str, tuple[object, ...]] = {
    "interpolate": ("interpolate", "a.pt", "b.pt", "--points", 5),
    "layerwise": ("interpolate", "a.pt", "b.pt", "--points", 5, "--layerwise"),
    "trajectory": ("trajectory", "a.pt", "init:5", "b.pt", "--residuals", 3),
    "plane": ("plane", "a.pt", "b.pt", "init:5", "--points", 4),
    "around": ("around", "a.pt", "b.pt", "--directions", 2, "--points", 3),
    "check": ("check", "a.pt", "b.pt"),
    "sharpness": ("sharpness", "a.pt", "b.pt", "--samples", 1),
    "barriers": ("barriers", "a.pt", "b.pt", "init:5", "--points", 3),
}


@pytest.mark.usefixtures("unlaid")
@pytest.mark.parametrize("name", sample(STUDIES, 0, 4))
def test_plot_draws_the_same_bytes_with_the_stored_options(
    name: str, losscli: Losscli, folder: Path
) -> None:
    Path("journal.mplstyle").write_text("font.size: 7\naxes.grid: False  # no lines\n")
    run = STUDIES[name]
    checkpoints = [a for a in run[1:] if str(a).endswith(".pt") or str(a).startswith("init")]
    labels = [f"--label=net {k}" for k, _ in enumerate(checkpoints)]
    options = ("--size", "5x4", "--ylim", 0.5, 2.5, "--log", "--no-markers", *labels)
    style = ("--style", "journal.mplstyle")
    done = losscli(*run, "--limit", 8, *options, *style, "-o", "x.svg")
    assert done.status == 0, done.stderr
    stored = json.loads(Path("x.json").read_text())["drawing"]
    assert stored == {
        "log": True,
        "size": "5x4",
        "label": [label.removeprefix("--label=") for label in labels],
        "ylim": [0.5, 2.5],
        "style": {"font.size": "7", "axes.grid": "False"},
        "no_markers": True,
    }
    Path("journal.mplstyle").unlink()
    assert losscli("plot", "x.csv", "--figure", "again.svg").status == 0
    assert Path("again.svg").read_bytes() == Path("x.svg").read_bytes()
    other = losscli(
        "plot", "x.csv", "--no-log", "--markers", "--size=full", "--figure", "other.svg"
    )
    assert other.status == 0
    assert Path("other.svg").read_bytes() != Path("x.svg").read_bytes()


@pytest.mark.usefixtures("unseen")
def test_options_that_all_csvs_share_are_used(losscli: Losscli, folder: Path) -> None:
    run = STUDIES["interpolate"]
    for stem, more in (("x", ("--log",)), ("y", ("--label=one", "--label=two"))):
        losscli(*run, "--size", "paper", *more, "-o", stem, "--no-figure")
    drawn: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("losscli.cli.plot.draw", lambda runs, drawing: drawn.append((runs, drawing)))
        patch.setattr(
            "losscli.results.result.Output.render",
            lambda _output, runs, draw, drawing, *_: draw(runs, drawing) or {},
        )
        losscli("plot", "x.csv", "y.csv")
        losscli("plot", "x.csv", "y.csv", "--label=p", "--label=q", "--log")
    (runs, plain), (labelled, given) = drawn
    assert (plain.size, plain.log, plain.label) == ("paper", False, ())
    assert [run.label for run in runs] == ["", ""]
    assert (given.size, given.log) == ("paper", True)
    assert [run.label for run in labelled] == ["p", "q"]


def test_a_default_figure_stores_nothing(losscli: Losscli, folder: Path) -> None:
    assert losscli(*STUDIES["interpolate"], "-o", "x", "--no-figure").status == 0
    assert json.loads(Path("x.json").read_text())["drawing"] == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--size", "huge"), "--size 'huge' is not a size. Give full, paper, slide or WxH"),
        (("--size", "1x1"), "--size 1x1 is not between 2x1.5 and 40x40 inches"),
        (("--ylim", 2, 1), "--ylim 2 1 is not a range. Give the lower limit first"),
        (("--ylim", 0, 1, "--log"), "--ylim 0 1 has no logarithm"),
        (("--style", "absent.mplstyle"), "the style sheet absent.mplstyle cannot be read"),
        (("--style", "losscli.toml"), "losscli.toml, line 1: 'data = "),
        (("--label", "x"), "1 labels for 2 checkpoints. Give --label once for each, in order"),
    ],
)
def test_bad_options_are_refused_before_anything_is_evaluated(
    options: tuple[object, ...],
    message: str,
    losscli: Losscli,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("losscli.cli.run_study._evaluate")
    before = sorted(Path().iterdir())
    for output in (("-o", "x"), ("-o", "-")):
        done = losscli(*STUDIES["interpolate"], *options, *output)
        assert (done.status, done.stdout) == (2, "")
        assert done.stderr.startswith(f"losscli: {message}")
        assert done.stderr.count("\n") == 1
        assert sorted(Path().iterdir()) == before


@pytest.mark.usefixtures("unseen")
def test_plot_names_a_stored_option_that_cannot_be_drawn(losscli: Losscli, folder: Path) -> None:
    losscli(*STUDIES["interpolate"], "-o", "x", "--no-figure", "--size", "paper")
    summary = json.loads(Path("x.json").read_text())
    for drawing, message in (
        ({"size": "huge"}, "x.json, drawing: --size 'huge' is not a size"),
        ({"style": {"lines.nothing": "1"}}, "x.json, drawing: 'lines.nothing' is not a setting"),
        ({"size": 3}, "x.json was not written by losscli: drawing.size is not text"),
    ):
        Path("x.json").write_text(json.dumps({**summary, "drawing": drawing}))
        done = losscli("plot", "x.csv")
        assert done.status == 1
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
        assert not Path("x.png").exists()
