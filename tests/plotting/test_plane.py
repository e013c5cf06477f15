"""The figure of a plane: what it shows, what it says, what it survives.

The tables come from fixed formulas: three hollows, a bowl, and a path that winds into it.
"""

from __future__ import annotations

import io
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from losscli.plotting.plane import draw_plane
from losscli.plotting.style import render
from losscli.results.drawing import Drawing
from losscli.results.result import Run
from losscli.table import Table
from tests.cases import sample
from tests.plotting.test_interpolation import check_golden, legend, note, texts
from tests.plotting.test_trajectory import contour_panels, reliefs, sentence

NAN = math.nan
COLUMNS = ("x", "y", "split", "loss", "loss_stderr")
PATH = ("step", "checkpoint", "x", "y", "off_plane", "split", "loss")

CORNERS = ((0.0, 0.0, 0.0), (10.0, 0.0, 0.0), (4.0, 8.0, 0.0))
WINDING = tuple(
    (-12 * (1 - t / 20), 3.5 * math.sin(t / 6) * (1 - t / 20), 0.08 * t * (20 - t) / 5)
    for t in range(21)
)


def hollows(x: float, y: float) -> float:
    """Low at the three corners, with a hill between them."""
    deep = sum(math.exp(-((x - a) ** 2 + (y - b) ** 2) / 9) for a, b, _ in CORNERS)
    far = 0.004 * ((x - 5) ** 2 + (y - 3) ** 2)
    return 0.003 + (1 + far) * max(0.0, 1 - deep)


def bowl(x: float, y: float) -> float:
    return 0.01 + 2.4 * (1 - math.exp(-(x * x + 2 * y * y) / 60))


def run(
    kind: str = "points",
    checkpoints: Sequence[tuple[float, float, float]] = CORNERS,
    loss: Callable[[float, float], float] = hollows,
    splits: Sequence[str] = ("train",),
    size: tuple[int, int] = (17, 13),
    box: tuple[float, float, float, float] = (-3, 13, -3, 11),
    own: Callable[[float, float], float] | None = None,
) -> Run:
    """A run on a grid of this size, and these checkpoints (x, y, off the plane)."""
    xs = np.linspace(box[0], box[1], size[0]).tolist()
    ys = np.linspace(box[2], box[3], size[1]).tolist()
    rows = [(x, y, s, loss(x, y), 0.01) for x in xs for y in ys for s in splits]
    path = [
        (k, f"runs/{k}.pt", x, y, off, s, (own or loss)(x, y))
        for k, (x, y, off) in enumerate(checkpoints)
        for s in splits
    ]
    summary: dict[str, Any] = {
        "plane": kind,
        "loss": "cross_entropy",
        "axes": [
            {"name": "first", "explained_variance": 0.947},
            {"name": "second", "explained_variance": None},
        ],
    }
    return Run(Table.build(COLUMNS, rows), summary, "", {"path": Table.build(PATH, path)})


def with_paths(drawn: Run, *paths: Sequence[tuple[float, float, float]], loss: float = 0.5) -> Run:
    """The same run with projected paths: of each checkpoint x, y, and the distance."""
    own = drawn.more["path"]
    rows = [("", *row) for row in own.rows]
    splits = own.unique("split")
    for number, path in enumerate(paths):
        rows += [
            (f"runs/{number}", t, f"runs/{number}/step-{10 * t}.pt", *place, split, loss)
            for t, place in enumerate(path)
            for split in splits
        ]
    return replace(drawn, more={"path": Table.build(("path", *PATH), rows)})


STRAIGHT = tuple((t, 10 - t, 4 - t / 2) for t in range(9))


def winding() -> Run:
    return run("pca", WINDING, bowl, box=(-15, 4, -5, 6))


def solid(drawn: Run) -> Run:
    """The same run, with its surface in three dimensions too."""
    return replace(drawn, summary={**drawn.summary, "surface": True})


PICTURES = {
    "plane-points": lambda: draw_plane(
        run(splits=("train", "test")), Drawing(title="Three solutions")
    ),
    "plane-pca": lambda: draw_plane(solid(winding())),
}


def dots(figure: Figure) -> PathCollection:
    (found,) = [c for c in figure.axes[0].collections if isinstance(c, PathCollection)]
    return found


@pytest.mark.usefixtures("laid_out")
@pytest.mark.parametrize("name", sample(PICTURES, 1, 2))
def test_golden(name: str) -> None:
    check_golden(name, PICTURES[name]())


def test_picture_from_the_csv_in_any_order_is_the_same() -> None:
    def read(table: Table) -> Table:
        again = Table.from_csv(io.StringIO(table.to_csv(), newline=""), "x")
        return Table(again.columns, tuple(random.Random(0).sample(again.rows, len(again.rows))))

    drawn = run()
    again = replace(
        drawn, table=read(drawn.table), more={k: read(t) for k, t in drawn.more.items()}
    )
    figure = draw_plane(solid(drawn))
    assert render(figure, ".svg") == render(draw_plane(solid(again)), ".svg")


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_panel_for_each_split(number: int) -> None:
    splits = ["train", "test", "other", "last"][:number]
    figure = draw_plane(run(splits=splits))
    assert [axes.get_title("left") for axes in contour_panels(figure)] == splits
    assert len(figure.axes) == number + 1
    assert not reliefs(figure)
    if number < 3:
        both = draw_plane(solid(run(splits=splits)))
        assert len(contour_panels(both)) == len(reliefs(both)) == number


def test_axes_are_named_by_the_plane() -> None:
    def labels(drawn: Run) -> tuple[str, str]:
        panel = draw_plane(drawn).axes[0]
        return panel.get_xlabel(), panel.get_ylabel()

    assert labels(run("points")) == ("distance along B − A", "distance orthogonal to B − A")
    assert labels(run("random", [(0, 0, 0)])) == (
        "x: random direction δ, filter-normalised",
        "y: random direction η, filter-normalised",
    )
    assert labels(winding()) == (
        "first principal component (94.7 % of the variance)",
        "second principal component",
    )
    assert labels(run("other")) == ("first", "second")
    assert labels(replace(run(), summary={})) == ("x", "y")


def test_axes_along_eigenvectors_have_their_eigenvalues() -> None:
    axes = [
        {"name": "u", "eigenvalue": 12.345, "error": 1e-4, "converged": True},
        {"name": "v", "eigenvalue": -0.5, "error": 0.2, "converged": False},
    ]
    summary = {"plane": "hessian", "axes": axes}
    panel = draw_plane(replace(run("hessian", [(0, 0, 0)]), summary=summary)).axes[0]
    assert panel.get_xlabel() == "x: along the eigenvector\nof λₘₐₓ = 12.3 ± 10⁻⁴"
    assert panel.get_ylabel() == "y: along the eigenvector\nof λₘᵢₙ = −0.5 ± 0.2, not converged"
    assert panel.get_aspect() == 1
    assert draw_plane(run("hessian", [(0, 0, 0)])).axes[0].get_xlabel().endswith("of λₘₐₓ")


def test_projected_paths_have_their_distances_below() -> None:
    figure = draw_plane(with_paths(run(splits=("train", "test")), STRAIGHT))
    assert {"  A", "  B", "  C"} <= set(texts(figure))
    below = next(a for a in figure.axes if a.get_ylabel() == "distance from\nthe plane")
    assert below.get_xlabel() == "step"
    (line, *_) = below.get_lines()
    np.testing.assert_array_equal(line.get_xdata(), [10 * t for t in range(9)])
    np.testing.assert_array_equal(line.get_ydata(), [off for *_, off in STRAIGHT])
    for panel in contour_panels(figure):
        path = next(a for a in panel.get_lines() if len(np.asarray(a.get_xdata())) == 9)
        np.testing.assert_array_equal(path.get_xydata(), [place[:2] for place in STRAIGHT])
    start, end = "runs/0/step-0.pt", "runs/0/step-80.pt"
    assert legend(figure) == ["path of the 9 checkpoints", f"start  {start}", f"end  {end}"]
    assert "The checkpoints of the path are up to 4 away from the plane" in sentence(figure)
    far = [(50.0, 0.0, 0.0), (-50.0, 0.0, 0.0)]
    both = draw_plane(with_paths(winding(), STRAIGHT, far))
    entries = [text for text in legend(both) if not text.startswith(("start  ", "end  "))]
    assert [text for text in entries if text] == ["path of the 21 checkpoints", "runs/0", "runs/1"]
    assert "9 of 9 checkpoints of the path runs/0" not in sentence(both)
    assert "2 of 2 checkpoints of the path runs/1 are outside the plotted range." in sentence(both)
    on_plane = [(0.0, 0.0, 0.0), (1.0, 0.0, 1e-8)]
    notes = sentence(draw_plane(with_paths(run(), on_plane, STRAIGHT)))
    assert "All checkpoints of the path runs/0 lie on the plane." in notes
    assert "The checkpoints of the path runs/1 are up to 4 away from the plane" in notes
    # Each path has a colour of its own, the same in both panels.
    below = next(a for a in both.axes if a.get_ylabel() == "distance from\nthe plane")
    colours = [a.get_color() for a in both.axes[0].get_lines() if a.get_linestyle() == "-"]
    lines = [a.get_color() for a in below.get_lines() if a.get_linestyle() == "-"]
    assert len(set(colours)) == 3
    assert lines == colours[1:]


def test_losses_of_a_projected_path_do_not_change_the_colours_of_the_plane() -> None:
    said = "Dots with losses beyond an end of the colour bar have the colour of that end."
    bars = []
    for figure in (
        draw_plane(run()),
        draw_plane(with_paths(run(), STRAIGHT)),
        draw_plane(with_paths(run(), STRAIGHT, loss=1e3)),
    ):
        bars.append(next(a for a in figure.axes if a.get_label() == "<colorbar>").get_yticks())
        assert (said in sentence(figure)) is (len(bars) == 3)
    np.testing.assert_array_equal(bars[0], bars[1])
    np.testing.assert_array_equal(bars[0], bars[2])


def test_distances_are_equal_on_both_axes() -> None:
    long = (-30.0, 30.0, -1.0, 1.0)
    assert draw_plane(run("points", box=long)).axes[0].get_aspect() == 1
    assert draw_plane(run("points")).axes[0].get_aspect() == 1
    figure = draw_plane(run("pca", WINDING))
    assert figure.axes[0].get_aspect() == 1
    assert "scales" not in note(figure)
    stretched = draw_plane(run("pca", WINDING, box=long))
    assert stretched.axes[0].get_aspect() == "auto"
    said = "The scales of the axes differ: y is stretched 30 times relative to x."
    assert said in note(stretched)
    high = draw_plane(run("pca", WINDING, box=(-1.0, 1.0, -5.0, 5.0)))
    assert "x is stretched 5 times relative to y." in note(high)


def test_checkpoints_are_described_one_by_one() -> None:
    figure = draw_plane(
        run(checkpoints=[(0, 0, 0), (10, 0, 1e-9), (4, 8, 3.2)], own=lambda x, y: x)
    )
    assert {"  A", "  B", "  C"} <= set(texts(figure))
    assert note(figure).splitlines()[:3] == [
        "A  runs/0.pt: loss 0; on the plane",
        "B  runs/1.pt: loss 10; on the plane",
        "C  runs/2.pt: loss 4; 3.2 away from the plane",
    ]
    assert "up to 3.2 away from the plane, where the contours do not show" in sentence(figure)
    two = draw_plane(run(splits=("train", "test")))
    assert "A  runs/0.pt: loss 0.003 (train), 0.003 (test); on the plane" in note(two)
    assert "away from the plane" not in note(two)


def test_a_path_has_its_ends_and_its_farthest_distance() -> None:
    figure = draw_plane(winding())
    assert legend(figure) == ["path of the 21 checkpoints", "start  runs/0.pt", "end  runs/20.pt"]
    assert "The checkpoints are up to 1.6 away from the plane" in note(figure)
    assert note(figure).startswith("Start  runs/0.pt: loss ")
    assert not {"  A", "  B"} & set(texts(figure))
    flat = draw_plane(run("pca", [(x, y, 0) for x, y, _ in WINDING], bowl))
    assert "All checkpoints lie on the plane." in note(flat)


def test_dots_have_the_colour_of_their_own_loss() -> None:
    def true(x: float, y: float) -> float:
        return 2.0 if x == 0 else 0.5 if x == 10 else NAN

    figure = draw_plane(run(loss=lambda x, y: 1 + x / 13, own=true))
    first, second, third = (to_rgb(c) for c in dots(figure).get_facecolor())
    # Yellow stands for much, blue for little, white for what is not finite.
    assert first[0] > first[2]
    assert second[2] > second[0]
    assert third == (1, 1, 1)
    assert "C  runs/2.pt: loss not finite" in note(figure)


def test_checkpoints_beyond_the_edges_do_not_stretch_the_picture() -> None:
    figure = draw_plane(run("pca", [*WINDING, (50.0, 0.0, 0.0)], bowl, box=(-15, 4, -5, 6)))
    assert figure.axes[0].get_xlim() == (-15, 4)
    assert "1 checkpoint is outside the plotted range." in note(figure)
    assert "outside" not in note(draw_plane(winding()))


def test_losses_that_are_not_finite_are_blank() -> None:
    figure = draw_plane(run(loss=lambda x, y: NAN if x > 9 and y > 5 else hollows(x, y)))
    (panel,) = contour_panels(figure)
    (cross,) = [line for line in panel.get_lines() if line.get_marker() == "x"]
    missing = len(cross.get_xdata())  # type: ignore[arg-type]
    assert missing == 4 * 6
    assert f"{missing} points of train: loss not finite, left blank (×)" in note(figure)
    zeros = draw_plane(run(loss=lambda x, y: max(x, 0.0)), Drawing(log=True))
    assert ": loss not above 0, left blank (×)" in note(zeros)


def test_contour_lines_are_few_and_labelled() -> None:
    figure = draw_plane(run())
    bar = figure.axes[-1]
    ticks = [t.get_text() for t in bar.get_yticklabels()]
    assert 4 <= len(ticks) <= 10
    assert bar.get_ylabel() == "loss (cross_entropy), log scale"
    written = {t.get_text() for t in figure.axes[0].texts} & set(ticks)
    assert len(written) >= 3


def pit(x: float, y: float) -> float:
    return 1.1 - math.exp(-(x * x + y * y) / 2)


def hill(x: float, y: float) -> float:
    return 2.2 - pit(x, y)


@pytest.mark.parametrize(
    ("loss", "point", "hidden"),
    [
        (lambda x, y: 1 + 0.01 * x, (0, 0), False),
        (pit, (0, 0), True),  # at the bottom of a pit, behind its near wall
        (pit, (-8, 8), False),
        (hill, (0, 0), False),  # on top of a hill
        (hill, (-1.2, 2.4), True),  # on its far side
        (hill, (1.2, -2.4), False),  # on its near side
    ],
)
def test_points_hidden_by_the_surface_are_pale(
    loss: Callable[[float, float], float], point: tuple[float, float], hidden: bool
) -> None:
    drawn = run("random", [(*point, 0.0)], loss, size=(81, 81), box=(-10, 10, -10, 10))
    figure = draw_plane(solid(drawn))
    (relief,) = reliefs(figure)
    (mark,) = [c for c in relief.collections if isinstance(c, PathCollection)]
    (letter,) = [text for text in relief.texts if text.get_text() == "  A"]
    opacity = 0.4 if hidden else 1.0
    assert (mark.get_alpha() or 1.0, letter.get_alpha()) == (opacity, opacity)
    assert ("behind the surface" in note(figure)) == hidden
    (flat,) = [c for c in figure.axes[0].collections if isinstance(c, PathCollection)]
    assert flat.get_alpha() is None


@pytest.mark.usefixtures("laid_out")
@pytest.mark.parametrize("box", [(-1, 1, -1, 1), (0, 1000, -0.01, 0.01)])
def test_labels_of_a_surface_do_not_overlap(box: tuple[float, float, float, float]) -> None:
    figure = draw_plane(solid(run("random", [(0, 0, 0)], size=(9, 9), box=box)))
    figure.draw_without_rendering()
    (relief,) = reliefs(figure)
    labels = [
        tick.label1.get_window_extent()
        for axis in (relief.xaxis, relief.yaxis, relief.zaxis)
        for tick in axis.get_major_ticks()
    ]
    assert len(labels) > 9
    assert not [pair for pair in itertools.combinations(labels, 2) if pair[0].overlaps(pair[1])]


ODD = {
    "no rows": run(size=(0, 0), checkpoints=[]),
    "one point": run(size=(1, 1)),
    "one column": run(size=(1, 9)),
    "constant": run(loss=lambda x, y: 0.7),
    "nan": run(loss=lambda x, y: NAN),
    "huge": run(loss=lambda x, y: 1e30 * (1 + x * x)),
    "tiny": run(loss=lambda x, y: 1e-30 * (1 + x * x)),
    "huge and tiny": run(loss=lambda x, y: 10 ** (3 * x)),
    "zeros": run(loss=lambda x, y: max(x, 0.0)),
    "many checkpoints": run("pca", [(k / 30, k / 40, 1.0) for k in range(300)]),
    "no place": run("pca", [(0, 0, 0), (NAN, 0, NAN), (1, 1, 1)]),
    "no path": replace(run(), more={}),
    "paths": with_paths(run(), STRAIGHT, [(NAN, 0, NAN)], [(1e9, 0, 1e9), (0, 0, 0)]),
    "paths alone": with_paths(run(size=(0, 0), checkpoints=[]), STRAIGHT),
    "nothing known": Run(run().table, {}),
    "odd names": replace(
        run(splits=("$x_1$\n\x1b[31m", "模型🙂")),
        summary={"loss": "\x07$l$", "axes": [{"name": "$a$\n"}]},
        more={
            "path": Table.build(
                PATH, [(0, "Модель/" * 60 + "模型" * 90, 0.0, 0.0, 1.0, "模型🙂", 1.0)]
            )
        },
    ),
}


# Of tables that leave little of a surface in three dimensions.
SURFACE = ("no rows", "one column", "constant", "huge and tiny", "nan", "no place")


@pytest.mark.usefixtures("laid_out", "coarse")
@pytest.mark.filterwarnings("ignore:Glyph")  # measured here outside of render
@pytest.mark.parametrize(
    ("case", "surface"),
    [
        *sample(((case, case in SURFACE) for case in ODD), 5, 8),
        *(pytest.param(case, case not in SURFACE, marks=pytest.mark.stress) for case in ODD),
    ],
)
def test_odd_tables_are_drawn(case: str, surface: bool) -> None:
    figure = draw_plane(solid(ODD[case]) if surface else ODD[case], Drawing(log=surface))
    figure.draw_without_rendering()
    page, box = figure.bbox_inches, figure.get_tightbbox()
    assert box.x0 >= -0.01
    assert box.y0 >= -0.01
    assert box.x1 <= page.x1 + 0.01
    assert box.y1 <= page.y1 + 0.01
    assert not [line for text in texts(figure) for line in text if line < " " and line != "\n"]


def test_marks_on_the_edges_of_a_panel_are_whole() -> None:
    # The start lies on the left edge, one checkpoint outside, and the last row is not finite.
    path = [(-3.0, 0.0, 0.0), (20.0, 0.0, 0.0), (5.0, 2.0, 0.0)]
    panel = draw_plane(
        run("pca", path, lambda x, y: NAN if y == 11 else hollows(x, y), own=hollows)
    ).axes[0]
    crosses, line, *marks = (each for each in panel.lines if each.get_zorder() != 1.5)
    assert crosses.get_marker() == "x"
    assert not crosses.get_clip_on()
    assert line.get_clip_on()
    assert [mark.get_clip_on() for mark in marks] == [False, False]
    assert [mark.get_xdata().tolist() for mark in marks] == [[-3.0], [5.0]]
    (dots,) = (c for c in panel.collections if isinstance(c, PathCollection))
    assert not dots.get_clip_on()
    shown = np.ma.filled(np.ma.asarray(dots.get_offsets(), float), NAN)
    assert np.isfinite(shown).all(axis=1).tolist() == [True, False, True]
