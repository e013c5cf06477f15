"""Sizes, labels, limits, style sheets and marks: laws over the figures of all studies."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from losscli.errors import UsageError
from losscli.plotting.style import render
from losscli.plotting.style_sheet import read
from losscli.plotting.terminal import draw as draw_in_terminal
from losscli.registry import COMMANDS
from losscli.results.drawing import Drawing
from losscli.results.result import Result, Run, draw, label_runs
from losscli.table import Table
from tests.cases import in_turn, sample
from tests.plotting import (
    test_around,
    test_barriers,
    test_check,
    test_connect,
    test_parts,
    test_plane,
    test_sharpness,
    test_trajectory,
)
from tests.plotting.test_interpolation import stored, texts

BOTH = ("train", "test")
RUNS: dict[str, Callable[[], Run[Any]]] = {
    "interpolate": lambda: stored("gaps"),
    "layerwise": lambda: test_parts.layered(test_parts.layers(8), BOTH),
    "trajectory": lambda: test_trajectory.run(splits=BOTH, walks=1),
    "plane": lambda: test_plane.run(splits=BOTH),
    "plane with a path": lambda: test_plane.solid(test_plane.winding()),
    "around": lambda: test_around.run(["runs/a.pt", "runs/b.pt"]),
    "check": lambda: test_check.run(escape=True, learning_rate=0.05),
    "check with a density": lambda: test_check.run(1, spectra=True),
    "sharpness": lambda: test_sharpness.run(["runs/a.pt", "runs/b.pt"]),
    "barriers": lambda: test_barriers.run(test_barriers.seeds(4), splits=BOTH),
    "connect": lambda: test_connect.run(BOTH),
    "inspect": lambda: test_parts.moved(test_parts.transformer(1)),
}


@functools.cache
def full(name: str) -> Figure:
    """A figure with the default options and without its layout."""
    return draw([RUNS[name]()])


SHORT_NAMES = {"runs", "final", "init", ".pt", ".safetensors", "n = "}


def boxes(figure: Figure) -> list[tuple[str, Any]]:
    """What must not overlap: the panels with their labels, and the legend."""
    found = [
        (f"panel {k}", axes.get_tightbbox())
        for k, axes in enumerate(figure.axes)
        if axes.get_label() != "<colorbar>"
    ]
    return [*found, *(("legend", legend.get_window_extent()) for legend in figure.legends)]


@pytest.mark.usefixtures("laid_out")
@pytest.mark.parametrize(
    ("name", "size"),
    sample([*((name, "paper") for name in RUNS), ("check", "slide"), ("plane", "4x5")], 3, 4),
)
def test_compact_figures_fit_their_page(name: str, size: str) -> None:
    figure = draw([RUNS[name]()], Drawing(size=size))
    figure.draw_without_rendering()
    width, height = figure.get_size_inches()
    wanted = {"paper": (3.25, 0.0), "slide": (10.0, 5.625), "4x5": (4.0, 5.0)}[size]
    assert width == wanted[0]
    assert height >= wanted[1]
    page = figure.bbox.padded(2)
    for label, box in boxes(figure):
        assert page.x0 <= box.x0 < box.x1 <= page.x1, label
        assert page.y0 <= box.y0 < box.y1 <= page.y1, label
    # A few pixels of 300 per inch: the descenders of an empty line.
    shrunk = [(label, box.padded(-6)) for label, box in boxes(figure)]
    for (one, box), (other, next_to) in itertools.combinations(shrunk, 2):
        assert not box.overlaps(next_to), (one, other)


@pytest.mark.parametrize(
    ("name", "size", "points"),
    sample(
        (
            (name, *size)
            for name in RUNS
            for size in (("paper", 8.0), ("slide", 14.0), ("6x4", 8.0))
        ),
        0,
        5,
    ),
)
def test_compact_figures_have_no_notes_and_no_names_of_files(
    name: str, size: str, points: float
) -> None:
    figure = draw([RUNS[name]()], Drawing(size=size))
    said = texts(figure)
    assert not [text for text in said if any(part in text for part in SHORT_NAMES)]
    assert all(not box.get_title().get_text() for box in figure.legends)
    # Legends are short.
    assert all(len(entry) < 30 for entry in entries(figure))
    labels = [t for axes in figure.axes for t in (axes.xaxis.label, axes.yaxis.label, axes.title)]
    labels += [entry for box in figure.legends for entry in box.get_texts()]
    assert {label.get_fontsize() for label in labels if label.get_text()} == {points}


def test_full_figures_have_notes_where_compact_ones_have_none() -> None:
    compact = draw([RUNS["check"]()], Drawing(size="paper"))
    notes, none = (
        [box.get_title().get_text() for box in figure.legends]
        for figure in (full("check"), compact)
    )
    assert "Verdicts:" in notes[0]
    assert none == [""]


@pytest.mark.parametrize(
    ("name", "size"),
    sample(
        itertools.product(
            ("interpolate", "around", "sharpness", "barriers", "check", "plane"), ("full", "paper")
        ),
        0,
    ),
)
def test_labels_name_checkpoints_in_their_order(name: str, size: str) -> None:
    run = RUNS[name]()
    labels = [f"model {k}" for k in range(len(run.checkpoints))]
    (labelled,) = label_runs([run], labels)
    said = " ".join(texts(draw([labelled], Drawing(size=size))))
    assert all(label in said for label in (labels if name != "check" else labels[-1:]))
    assert not any(checkpoint in said for checkpoint in run.checkpoints)


LONG = ["WideResNet28-10" * 20, "runs/ViT-Tiny" * 20]


@pytest.mark.parametrize(
    "name",
    sample(["interpolate", "around", "sharpness", "barriers", "check", "plane with a path"], 1),
)
def test_a_long_label_is_cut_at_its_end(name: str) -> None:
    run = RUNS[name]()
    if not run.checkpoints:
        named = [{"name": each} for each in run.more["path"].unique("checkpoint")]
        run = replace(run, summary={**run.summary, "checkpoints": named})
    labels = [LONG[0], *["short"] * (len(run.checkpoints) - 2), LONG[1]]
    said = texts(draw([replace(run, checkpoint_labels=labels)]))
    cut = [text for text in said if "…" in text]
    assert cut
    beginnings = tuple(label[:12] for label in LONG)
    for text in cut:
        kept = [start for start in beginnings if start in text]
        assert kept, text
        assert "…" not in text[: text.index(kept[0])]


def test_the_long_label_of_a_run_is_cut_at_its_end() -> None:
    runs = label_runs([RUNS["interpolate"]()] * 2, LONG)
    cut = [entry for entry in entries(draw(runs)) if entry.endswith("…")]
    assert [entry[:12] for entry in cut] == [label[:12] for label in LONG]


def test_a_label_for_each_checkpoint_or_run() -> None:
    line, around = RUNS["interpolate"](), RUNS["around"]()
    assert label_runs([line], ["one line"])[0].label == "one line"
    assert label_runs([line, line], ["x", "y"])[1].label == "y"
    assert label_runs([around], ["x", "y"])[0].label_of("runs/b.pt") == "y"
    for runs, labels, message in (
        ([line], ["x", "y", "z"], "3 labels for 2 checkpoints"),
        ([line, line], ["x"], "1 labels for 2 CSV files"),
        ([replace(line, summary={})], ["x", "y"], "2 labels for 1 CSV files"),
    ):
        with pytest.raises(UsageError, match=message):
            label_runs(runs, labels)


def entries(figure: Figure) -> list[str]:
    return [t.get_text() for box in figure.legends for t in box.get_texts() if t.get_text()]


def loss_axes(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.get_ylabel().startswith(("loss", "rise"))]


@pytest.mark.parametrize(
    ("name", "log"),
    in_turn(("interpolate", "layerwise", "around", "check", "sharpness"), False, True),
)
def test_limits_are_those_of_the_axes_of_the_loss(name: str, log: bool) -> None:
    figure = draw([RUNS[name]()], Drawing(log=log, ylim=(0.25, 4.0)))
    panels = loss_axes(figure)
    assert panels
    np.testing.assert_allclose([axes.get_ylim() for axes in panels], [(0.25, 4.0)] * len(panels))
    others = [axes for axes in figure.axes if axes not in panels]
    assert all(axes.get_ylim() != (0.25, 4.0) for axes in others)


@pytest.mark.parametrize(
    ("name", "size"),
    sample(
        [
            *(
                (name, "full")
                for name in ("interpolate", "around", "check", "sharpness", "connect")
            ),
            ("layerwise", "paper"),
        ],
        1,
    ),
)
def test_limits_that_show_no_curve_say_so(name: str, size: str) -> None:
    run, empty = RUNS[name](), "no value between"
    # Sharpness is on a logarithmic axis, and the limits of that are positive.
    below = (1e-150, 2e-150) if name == "sharpness" else (-2e150, -1e150)
    for limits, side in (((1e150, 2e150), "lower"), (below, "higher")):
        (first, *_) = loss_axes(draw([run], Drawing(size=size, ylim=limits)))
        (said,) = [text.get_text() for text in first.texts if empty in text.get_text()]
        assert said.endswith(f": all are {side}")
    shown = draw([run], Drawing(size=size, ylim=(-1.0, 1e150)))
    assert not any(empty in text for text in texts(shown))


def zeros(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Run[Any]:
    return Run(Table.build(columns, rows), {})


LINE = ("alpha", "split", "loss", "loss_stderr", "accuracy")
PAIRS = ("a", "b", "step", *test_barriers.COLUMNS[2:])
ZEROS = {
    "a line": zeros(LINE, [(k / 4, "train", 0.0, 0.0, 0.0) for k in range(5)]),
    "pairs": zeros(PAIRS, [("a", "b", k, "train", 1.0, 0.0, 0.0, 0.5, 0, 0) for k in range(3)]),
}


@pytest.mark.parametrize("name", ZEROS)
def test_an_axis_of_zeros_has_no_negative_numbers(name: str) -> None:
    figure = draw([ZEROS[name]])
    for axes in figure.axes:
        low, high = axes.get_ylim()
        shown = [tick for tick in axes.get_yticks() if low <= tick <= high]
        assert low < 0 < high
        assert 0 in shown
        assert min(shown) == 0
    if name == "pairs":
        assert [label.get_text() for label in figure.axes[0].get_xticklabels()][1:-1] == list("012")
    else:
        drawn = draw_in_terminal([("", ZEROS[name].table)], width=60, height=20, colour=False)
        assert not any(row.lstrip().startswith(("−", "-")) for row in drawn.splitlines())


@pytest.mark.parametrize(
    "name", ["plane", pytest.param("trajectory", marks=pytest.mark.stress), "barriers"]
)
def test_limits_are_those_of_the_colours_of_the_loss(name: str) -> None:
    run = RUNS[name]()
    free = full(name)
    limited = draw([run], Drawing(ylim=(0.25, 0.5)))
    bar = limited.axes[-1] if name != "trajectory" else limited.axes[4]
    shown = [float(label.get_text()) for label in bar.get_yticklabels() if label.get_text()]
    assert shown
    assert all(0.25 <= loss <= 0.5 for loss in shown)
    assert render(free, ".png") != render(limited, ".png")
    if name != "barriers":
        assert any("Losses below 0.25 or above 0.5" in text for text in texts(limited))
        assert not any("Losses below" in text for text in texts(free))


def marks(figure: Figure) -> int:
    """The number of marks on curves: dots, diamonds and stars, but no crosses of missing values."""
    return sum(
        len(line.get_xdata())
        for axes in figure.axes
        for line in axes.lines
        if line.get_marker() not in {"None", "", "x", None}
    )


@pytest.mark.parametrize("name", ["interpolate", "layerwise", "trajectory", "around"])
def test_figures_without_markers(name: str) -> None:
    run = RUNS[name]()
    assert marks(full(name)) > 0
    bare = draw([run], Drawing(no_markers=True))
    assert marks(bare) == 0
    assert not [
        e for e in entries(bare) if e.startswith(("lowest", "local", "start", "end", "rad"))
    ]
    assert not [c for axes in bare.axes for c in axes.collections if c.get_label() == "dots"]


def test_a_point_without_neighbours_keeps_its_dot_without_markers() -> None:
    table = Table.build(("alpha", "split", "loss", "loss_stderr"), [(0.5, "train", 1.0, 0.0)])
    figure = draw([Run(table, {})], Drawing(no_markers=True))
    assert marks(figure) == 1


STYLE = """
# As a journal wants it
font.size: 11        # points
lines.linewidth : 3.0
axes.prop_cycle: cycler("color", ["#ff0000", "#00ff00"])
text.parse_math: True
savefig.bbox: tight
"font.family": "serif"
"""


def test_a_style_sheet_is_followed(tmp_path: Path) -> None:
    file = tmp_path / "journal.mplstyle"
    file.write_text(STYLE.replace('"font.family"', "font.family"))
    settings = read(file)
    assert settings["font.family"] == "serif"
    assert settings["axes.prop_cycle"] == 'cycler("color", ["#ff0000", "#00ff00"])'
    run = RUNS["interpolate"]()
    drawing = Drawing(size="4x3", style=settings)
    figure = draw([run], drawing)
    curve = figure.axes[0].lines[0]
    assert (to_hex(curve.get_color()), curve.get_linewidth()) == ("#ff0000", 3.0)
    assert figure.axes[0].yaxis.label.get_fontsize() == 11.0
    assert not figure.axes[0].yaxis.label.get_parse_math()
    # Two runs have both colours.
    colours = {to_hex(line.get_color()) for line in draw([run, run], drawing).axes[0].lines}
    assert {"#ff0000", "#00ff00"} <= colours
    # The page keeps its size.
    assert figure.get_size_inches().tolist() == [4.0, 3.0]
    assert render(draw([run], drawing), ".svg", drawing) == render(figure, ".svg", drawing)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file or directory. Give a file of Matplotlib settings"),
        (b"\xff\xfe", "cannot be read: it is not UTF-8 text"),
        ("axes.grid: True\nnonsense\n", "line 2: 'nonsense' has no colon"),
        ("lines.width: 1", r"line 1: 'lines.width' is not a setting of Matplotlib"),
        ("lines.linewidth: thick", "line 1: .*Could not convert 'thick' to float"),
        ("text.usetex: True", "line 1: text.usetex needs names in TeX"),
    ],
)
def test_a_bad_style_sheet_is_refused(
    text: str | bytes | None, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "bad.mplstyle"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=message) as caught:
        read(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "huge"}, "--size 'huge' is not a size. Give full, paper, slide or WxH in inches"),
        ({"size": "3"}, "--size '3' is not a size"),
        ({"size": "-3x4"}, "--size '-3x4' is not a size"),
        ({"size": "1x4"}, "--size 1x4 is not between 2x1.5 and 40x40 inches"),
        ({"size": "4x400"}, "--size 4x400 is not between"),
        ({"size": 3}, "size must be a string"),
        ({"ylim": (3, 1)}, "--ylim 3 1 is not a range"),
        ({"ylim": (1, 1)}, "--ylim 1 1 is not a range"),
        ({"ylim": (0, float("inf"))}, "--ylim 0 inf is not a range"),
        ({"ylim": (-1, 1), "log": True}, "--ylim -1 1 has no logarithm"),
        ({"ylim": 3}, "ylim must be two numbers"),
        ({"label": 3}, "label must be a string"),
        ({"sise": "paper"}, "no argument 'sise'. Did you mean 'size'"),
    ],
)
def test_misuse_from_python_is_refused(options: dict[str, Any], message: str) -> None:
    run = RUNS["interpolate"]()
    result = Result(run.table, run.summary, COMMANDS["interpolate"].draw, run.more)
    with pytest.raises(UsageError, match=message):
        result.figure(**options)


def test_the_options_are_stored_unless_they_are_defaults() -> None:
    assert Drawing(title="A title").stored == {}
    drawing = Drawing(
        log=True,
        size="5x3",
        label=("a", "b"),
        ylim=(1, 2),
        style={"font.size": "9"},
        no_markers=True,
    )
    assert drawing.stored == {
        "log": True,
        "size": "5x3",
        "label": ["a", "b"],
        "ylim": [1.0, 2.0],
        "style": {"font.size": "9"},
        "no_markers": True,
    }
    options: Any = drawing.stored
    assert Drawing(**options) == drawing
