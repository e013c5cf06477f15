"""The figure of a trained path: its curves, and its plane with bends and ends."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import to_hex

from losscli.plotting.connect import connect_views, draw_connect
from losscli.plotting.style import PALETTE, text_width
from losscli.results.drawing import Drawing
from losscli.results.result import Run, draw
from losscli.table import Table
from tests.cases import sample
from tests.plotting.test_interpolation import legend, texts

COLUMNS = ("path", "t", "split", "loss", "loss_stderr", "accuracy")
CORNERS = ((0.0, 0.0), (12.0, 0.0), (18.0, 12.0))


def run(splits: Sequence[str] = ("train", "test")) -> Run:
    """A path with a barrier on its straight line, and a plane that is wider than high."""
    t = np.linspace(0, 1, 7).tolist()
    hill = {"curve": 0.1, "line": 2.0}
    rows = [
        (path, at, split, 0.1 + height * math.sin(math.pi * at), 0.02, 1 - 0.3 * at * (1 - at))
        for path, height in hill.items()
        for split in splits
        for at in t
    ]
    plane = [
        (x, y, split, 0.1 + 0.01 * (x - y) ** 2, 0.02)
        for x in np.linspace(-4, 22, 6).tolist()
        for y in np.linspace(-3, 14, 5).tolist()
        for split in splits
    ]
    a, c, b = map(np.array, CORNERS)
    curve = [((1 - s) ** 2 * a + 2 * s * (1 - s) * c + s * s * b).tolist() for s in t]
    more = {"plane": Table.build(("x", "y", "split", "loss", "loss_stderr"), plane)}
    about = {"plane": {"curve": curve, "corners": [list(corner) for corner in CORNERS]}}
    return Run(Table.build(COLUMNS, rows), about, "", more)


@pytest.mark.usefixtures("laid_out")
@pytest.mark.parametrize("size", sample(["full", "paper", "slide", "8x4"], 3, 4))
def test_panels_fill_their_page(size: str) -> None:
    figure = draw_connect([run()], Drawing(size=size))
    width, height = figure.get_size_inches()
    wanted = {"slide": (10.0, 5.625), "8x4": (8.0, 4.0)}
    assert (width, height) == wanted.get(size, (width, height))
    figure.draw_without_rendering()
    inches = [axes.get_tightbbox().transformed(figure.dpi_scale_trans.inverted())
              for axes in figure.axes if axes.get_label() != "<colorbar>"]  # fmt: skip
    # The panels of the first column, from top to bottom.
    column = sorted((box for box in inches if box.x0 < width / 4), key=lambda box: -box.y0)
    assert len(column) == {"full": 3, "paper": 4}.get(size, 2)
    gaps = [upper.y0 - lower.y1 for upper, lower in itertools.pairwise(column)]
    assert all(-0.02 < gap < 0.3 for gap in gaps), gaps


@pytest.mark.usefixtures("laid_out")
@pytest.mark.parametrize("size", sample(["12x4", "16x4", "8x4"], 0, 2))
def test_no_gap_is_left_between_the_curves_and_the_planes(size: str) -> None:
    figure = draw_connect([run()], Drawing(size=size))
    figure.draw_without_rendering()
    boxes = sorted(
        (axes.get_tightbbox().transformed(figure.dpi_scale_trans.inverted()).intervalx
         for axes in figure.axes),
        key=lambda interval: interval[0],
    )  # fmt: skip
    right, gaps = 0.0, []
    for left, end in boxes:
        gaps.append(left - right)
        right = max(right, end)
    assert max(gaps) < 0.6, gaps
    assert right > figure.get_figwidth() - 0.3


def test_a_plane_without_a_summary_is_left_out() -> None:
    bare = replace(run(), summary={})
    for size in ("full", "slide"):
        figure = draw_connect([bare], Drawing(size=size))
        assert [axes.get_ylabel().partition("\n")[0] for axes in figure.axes] == [
            "loss",
            "accuracy",
        ]


@pytest.mark.usefixtures("laid_out")
def test_labels_of_contours_overlap_neither_each_other_nor_the_path() -> None:
    one = run(("train",))
    rows = [(x, y, split, loss / 1e7, 0.0) for x, y, split, loss, _ in one.more["plane"].rows]
    small = {"plane": Table.build(one.more["plane"].columns, rows)}
    figure = draw_connect([replace(one, more=small)], Drawing(size="slide"))
    (panel,) = [axes for axes in figure.axes if axes.get_title(loc="left") == "train"]
    labels = [text for text in panel.texts if text.get_text().strip() not in {*"ABC"}]
    assert len(labels) > 3
    to_points = 72 / figure.dpi
    at = [panel.transData.transform(label.get_position()) * to_points for label in labels]
    widths = [text_width(figure, text.get_text(), text.get_fontsize()) for text in labels]
    for i, j in itertools.combinations(range(len(labels)), 2):
        assert np.hypot(*(at[i] - at[j])) > 0.95 * (widths[i] + widths[j]) / 2
    curve = panel.transData.transform(run().summary["plane"]["curve"]) * to_points
    assert min(np.hypot(*(curve - place).T).min() for place in at) > 15


def test_several_runs_are_overlaid_with_a_colour_each() -> None:
    other = run()
    rows = [{**row, "loss": float(row["loss"]) + 1} for row in other.table.records()]
    other = replace(other, table=Table.build(COLUMNS, [list(row.values()) for row in rows]))
    runs = [replace(run(), label="one"), replace(other, label="two")]
    figure = draw([*runs])
    loss, accuracy = figure.axes
    assert accuracy.get_ylabel() == "accuracy"
    curves = [line for line in loss.get_lines() if len(line.get_xdata()) == 7]
    found = {(to_hex(c.get_color()), tuple(c.get_ydata())) for c in curves if c.get_linewidth() > 1}
    expected = {
        (colour.lower(), tuple(rows.floats("loss")))
        for colour, one in zip(PALETTE, runs, strict=False)
        for split in ("train", "test")
        for rows in [one.table.where("path", "curve").where("split", split)]
    }
    assert expected <= found
    assert {"one", "two", "trained path", "straight line"} < set(legend(figure))
    assert any("each run has its own" in text for text in texts(figure))
    assert not any("each run has its own" in text for text in texts(draw([run()])))


def test_the_page_has_a_trace_for_each_path_and_the_plane_of_a_single_run() -> None:
    one = run(("train",))
    path, surface, contours = connect_views([one])
    losses = {item.tags["path"]: item.trace["y"] for item in path.items
              if item.tags["quantity"] == "loss"}  # fmt: skip
    for name in ("curve", "line"):
        rows = one.table.where("path", name)
        assert losses[name] == rows.floats("loss")
        solid = [item.trace for item in surface.items
                 if item.trace["type"] == "scatter3d" and item.trace["z"] == rows.floats("loss")
                 and item.trace["mode"] == "lines"]  # fmt: skip
        (a, _, b), ts = CORNERS, rows.floats("t")
        places = one.summary["plane"]["curve"] if name == "curve" else [
            [a[k] + t * (b[k] - a[k]) for k in (0, 1)] for t in ts
        ]  # fmt: skip
        np.testing.assert_allclose(np.array([solid[0]["x"], solid[0]["y"]]).T, places)
    assert contours.items[0].trace["type"] == "contour"
    assert [view.name for view in connect_views([one, one])] == ["path"]
