"""The figure of a trained path: its curves, and its plane with bends and ends."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from losscli.plotting.connect import draw_connect
from losscli.results.drawing import Drawing
from losscli.results.result import Run
from losscli.table import Table
from tests.cases import sample

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
    figure = draw_connect(run(), Drawing(size=size))
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


def test_a_plane_without_a_summary_is_left_out() -> None:
    bare = replace(run(), summary={})
    for size in ("full", "slide"):
        figure = draw_connect(bare, Drawing(size=size))
        assert [axes.get_ylabel().partition("\n")[0] for axes in figure.axes] == [
            "loss",
            "accuracy",
        ]
