"""The figure of a trajectory: what it shows, what it says, what it survives.

The tables come from fixed formulas: a path that bends off the line and comes back, in a valley.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d import Axes3D

from losscli.plotting.style import render
from losscli.plotting.trajectory import draw_trajectory
from losscli.results.drawing import Drawing
from losscli.results.result import Run
from losscli.table import Table
from tests.cases import sample
from tests.plotting.test_interpolation import check_golden, legend, note, texts

NAN, INF = math.nan, math.inf
COLUMNS = (
    *("step", "checkpoint", "projection", "residual", "distance", "turn_degrees"),
    *("split", "loss", "loss_stderr"),
)
SURFACE = ("step", "projection", "residual", "split", "loss", "loss_stderr")
WALK = ("walk", "step", "projection", "residual", "distance", "turn_degrees")
TURNS = "The direction of the residual changes"


def valley(p: float, b: float, split: str) -> float:
    """High at the start, low at the end and at the bottom of a bent valley."""
    floor = 0.3 if split == "test" else 0.004
    return floor + 2.3 * math.exp(-5 * p * p) + 0.015 * (b - 14 * p * (1 - p)) ** 2


def run(
    along: Sequence[float] = tuple((t / 20) ** 1.5 for t in range(21)),
    aside: Callable[[float], float] = lambda p: abs(16 * p * (1 - p)),
    loss: Callable[[float, float, str], float] = valley,
    splits: Sequence[str] = ("train",),
    *,
    surface: bool = True,
    walks: int = 0,
    label: str = "",
) -> Run:
    """A run with these projections."""
    places = [(t, p, aside(p)) for t, p in enumerate(along)]
    rows = [
        (t, f"runs/{t}.pt", p, r, math.hypot(13 * p, r), None, s, loss(p, r, s), 0.01)
        for t, p, r in places
        for s in splits
    ]
    reach = 1.25 * max((r for _, _, r in places), default=0.0)
    sheet = [
        (t, p, reach * k / 10, s, loss(p, reach * k / 10, s), 0.01)
        for t, p, _ in places
        for k in range(11)
        for s in splits
    ]
    steps = [
        (w, t, p, (2.5 + 0.1 * w) * math.sqrt(max(4 * p * (1 - p), 0.0)), 13 * p, None)
        for w in range(walks)
        for t, p, _ in places
    ]
    more = {"surface": Table.build(SURFACE, sheet)} if surface else {}
    if walks:
        more["walk"] = Table.build(WALK, steps)
    names = [{"name": f"runs/{t}.pt"} for t, _, _ in places]
    summary: dict[str, Any] = {"loss": "cross_entropy", "checkpoints": names}
    return Run(Table.build(COLUMNS, rows), summary, label, more)


def overlay() -> Figure:
    one = run(surface=False, walks=3, label="momentum", splits=("train", "test"))
    other = run(surface=False, label="Adam", aside=lambda p: 20 * p * (1 - p))
    return draw_trajectory([one, other], Drawing(title="Two optimisers", log=True))


PICTURES = {
    "ribbon": lambda: draw_trajectory([run()]),
    "paths": overlay,
}


def sentence(figure: Figure) -> str:
    return note(figure).replace("\n", " ")


def contour_panels(figure: Figure) -> list[Axes]:
    return [
        axes
        for axes in figure.axes
        if any(isinstance(c, QuadContourSet) and c.filled for c in axes.collections)
    ]


def reliefs(figure: Figure) -> list[Axes3D]:
    return [axes for axes in figure.axes if isinstance(axes, Axes3D)]


@pytest.mark.usefixtures("laid_out")
@pytest.mark.parametrize("name", sample(PICTURES, 0, 2))
def test_golden(name: str) -> None:
    check_golden(name, PICTURES[name]())


@pytest.mark.stress
def test_picture_from_the_csv_is_the_same() -> None:
    def read(table: Table) -> Table:
        return Table.from_csv(io.StringIO(table.to_csv(), newline=""), "x")

    drawn = run(walks=2)
    again = replace(
        drawn, table=read(drawn.table), more={k: read(t) for k, t in drawn.more.items()}
    )
    figure = draw_trajectory([drawn])
    assert render(figure, ".svg") == render(draw_trajectory([again]), ".svg")


def test_a_row_of_contours_and_relief_for_each_split() -> None:
    figure = draw_trajectory([run(splits=("train", "test", "other"))])
    assert [axes.get_title("left") for axes in contour_panels(figure)] == ["train", "test", "other"]
    assert len(reliefs(figure)) == 3
    # Three pairs and one colour bar.
    assert len(figure.axes) == 7
    assert figure.axes[-1].get_ylabel() == "loss (cross_entropy), log scale"
    for panel in contour_panels(figure):
        assert panel.get_ylabel() == "residual r: distance from the line"
    assert (
        contour_panels(figure)[-1].get_xlabel()
        == "projection p onto the straight line (start 0, end 1)"
    )
    for axes in reliefs(figure):
        assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_zlabel()) == (
            "projection p",
            "residual r",
            "loss",
        )
    assert legend(figure) == ["path of the 21 checkpoints", "start  runs/0.pt", "end  runs/20.pt"]


def test_the_residual_axis_starts_at_0_and_a_note_mentions_its_direction() -> None:
    for drawn in (run(walks=2), run(surface=False)):
        figure = draw_trajectory([drawn])
        panels = [a for a in figure.axes if a.get_ylabel().startswith("residual")]
        assert panels
        assert {panel.get_ylim()[0] for panel in panels} == {0}
        assert all(axes.get_ylim()[0] == 0 for axes in reliefs(figure))
        assert TURNS in note(figure)
        assert "distance from the line can lie in different directions" in sentence(figure)


def test_the_path_in_three_dimensions_has_its_own_losses() -> None:
    drawn = run()
    rows = [(*row[:7], 0.1 if row[0] == 4 else row[7], row[8]) for row in drawn.table.rows]
    figure = draw_trajectory([replace(drawn, table=Table.build(COLUMNS, rows))])
    (axes,) = reliefs(figure)
    path = max(axes.get_lines(), key=lambda line: len(line.get_data_3d()[0]))  # type: ignore[attr-defined]
    heights = np.asarray(path.get_data_3d()[2])  # type: ignore[attr-defined]
    names = [float(t.get_text()) for t in axes.get_zticklabels()]
    ticks = dict(zip(names, axes.get_zticks(), strict=True))
    (first, low), (second, high) = (ticks.popitem() for _ in range(2))
    share = math.log(0.1 / first) / math.log(second / first)
    assert heights[4] == pytest.approx(low + (high - low) * share, abs=0.01)
    assert heights[3] - heights[4] > 0.3


def test_losses_that_are_not_finite_are_blank() -> None:
    def loss(p: float, b: float, split: str) -> float:
        return NAN if p > 0.7 and b > 3 else INF if b > 4.9 else valley(p, b, split)

    figure = draw_trajectory([run(loss=loss)])
    (panel,) = contour_panels(figure)
    crosses = [line for line in panel.get_lines() if line.get_marker() == "x"]
    (cross,) = crosses
    missing = len(cross.get_xdata())  # type: ignore[arg-type]
    assert f"{missing} points of train: loss not finite, left blank (×)" in note(figure)
    (filled,) = [c for c in panel.collections if isinstance(c, QuadContourSet) and c.filled]
    corners = np.concatenate([path.vertices for path in filled.get_paths() if len(path.vertices)])
    assert not ((corners[:, 0] > 0.8) & (corners[:, 1] > 3.5)).any()
    assert ((corners[:, 0] < 0.6) & (corners[:, 1] > 3.5)).any()
    everything = draw_trajectory([run(loss=lambda p, b, s: NAN)])
    assert "no finite loss" in texts(everything)


def test_zero_has_no_logarithm() -> None:
    figure = draw_trajectory([run(loss=lambda p, b, s: max(b - 1, 0.0))], Drawing(log=True))
    assert ": loss not above 0, left blank (×)" in note(figure)
    assert "log scale" in figure.axes[-1].get_ylabel()


def test_levels_are_powers_for_a_wide_range() -> None:
    wide = draw_trajectory([run(loss=lambda p, b, s: 10 ** (3 * p))])
    even = draw_trajectory([run(loss=lambda p, b, s: 1 + p)])
    asked = draw_trajectory([run(loss=lambda p, b, s: 1 + p)], Drawing(log=True))
    negative = draw_trajectory([run(loss=lambda p, b, s: 100 * p - 1)])
    scales = ["log scale" in f.axes[-1].get_ylabel() for f in (wide, even, asked, negative)]
    assert scales == [True, False, True, False]
    ticks = [t.get_text() for t in wide.axes[-1].get_yticklabels()]
    assert {"1", "10", "100", "1000"} <= set(ticks)
    assert len(ticks) <= 12


def test_a_path_that_turns_back_does_not_fold_the_surface() -> None:
    along = [0.0, 0.3, 0.2, 0.5, 0.5, 1.1, 1.0]
    figure = draw_trajectory([run(along)])
    (panel,) = contour_panels(figure)
    said = sentence(figure)
    assert "surface is drawn over the steps in the order of their projection" in said
    assert "1 step has the projection of an earlier step: not in the surface" in said
    path = max(panel.get_lines(), key=lambda line: len(line.get_xdata()))  # type: ignore[arg-type]
    np.testing.assert_array_equal(path.get_xdata(), along)
    assert panel.get_xlim() == (0.0, 1.1)
    assert "order of their projection" not in note(draw_trajectory([run()]))


def test_losses_of_a_path_that_turns_back_far_are_drawn_over_the_steps() -> None:
    straight = draw_trajectory([run(surface=False)])
    back = draw_trajectory([run([0.0, 0.9, 0.2, 0.8, 1.0], surface=False)])
    assert "projection" in straight.axes[1].get_xlabel()
    assert straight.axes[0].get_xlim() == straight.axes[1].get_xlim()
    assert back.axes[1].get_xlabel() == "checkpoint, in the order given"
    assert "projection" in back.axes[0].get_xlabel()


def test_steps_in_names_are_on_the_axis_if_all_runs_have_them() -> None:
    def back(steps: Sequence[int]) -> Run:
        drawn = run([0.0, 0.9, 0.2, 0.8, 1.0], surface=False)
        rows = [(k, f"runs/step-{steps[k]}.pt", *row) for k, _, *row in drawn.table.rows]
        return replace(drawn, table=Table.build(COLUMNS, rows))

    one, other = back([0, 5, 10, 15, 20]), back([3, 6, 9, 12, 30])
    (_, axes) = draw_trajectory([one, other]).axes
    curves = [line for line in axes.get_lines() if line.get_linestyle() == "-"]
    assert [[*np.asarray(line.get_xdata())] for line in curves] == [
        [0, 5, 10, 15, 20],
        [3, 6, 9, 12, 30],
    ]
    assert axes.get_xlabel() == "step"
    unnumbered = run([0.0, 0.9, 0.2, 0.8, 1.0], surface=False)
    (_, axes) = draw_trajectory([one, unnumbered]).axes
    curves = [line for line in axes.get_lines() if line.get_linestyle() == "-"]
    assert [[*np.asarray(line.get_xdata())] for line in curves] == [[0, 1, 2, 3, 4]] * 2
    assert axes.get_xlabel() == "checkpoint, in the order given"


def test_walks_are_grey_with_one_entry() -> None:
    figure = draw_trajectory([run(surface=False, walks=4, splits=("train", "test"))])
    grey = [line for line in figure.axes[0].get_lines() if line.get_color() == "#9a9a9a"]
    assert len(grey) == 4
    assert legend(figure).count("random walks with the same step lengths") == 1
    below = draw_trajectory([run(walks=4)])
    assert len(contour_panels(below)) == 1
    assert "random walks with the same step lengths" in legend(below)


def test_several_runs_have_their_own_colours_and_no_surface() -> None:
    runs = [run(label=name, splits=("train", "test")) for name in ("one", "two", "three")]
    figure = draw_trajectory(runs)
    assert not contour_panels(figure)
    assert not reliefs(figure)
    colours = {line.get_color() for line in figure.axes[0].get_lines() if len(line.get_xdata()) > 1}  # type: ignore[arg-type]
    assert len(colours) == 3
    styles = {line.get_linestyle() for line in figure.axes[1].get_lines()} - {"None"}
    assert len(styles) == 2
    assert {"one", "two", "three", "train", "test"} <= set(legend(figure))


def test_runs_are_called_by_their_first_and_last_checkpoint() -> None:
    figure = draw_trajectory([run(surface=False), run([0.0, 0.5, 1.0], surface=False)])
    assert {"runs/0.pt → runs/20.pt", "runs/0.pt → runs/2.pt"} <= set(legend(figure))


def test_steps_without_a_place_are_counted() -> None:
    figure = draw_trajectory([run([0.0, NAN, 0.5, INF, 1.0], aside=lambda p: 0.5)])
    assert "2 steps have no finite coordinates: not drawn" in note(figure)


ODD = {
    "no rows": run(()),
    "one step": run([0.0]),
    "no projection": run([NAN, NAN], aside=lambda p: 0.0),
    "no residual": run([0.0, 0.5, 1.0], aside=lambda p: 0.0),
    "constant": run(loss=lambda p, b, s: 0.7),
    "huge": run(loss=lambda p, b, s: 1e30 * (1 + p)),
    "tiny": run(loss=lambda p, b, s: 1e-30 * (1 + p)),
    "huge and tiny": run(loss=lambda p, b, s: 10 ** (60 * p - 30)),
    "too large": run(loss=lambda p, b, s: 1e300 if p > 0.5 else 1.0),
    "nan": run(loss=lambda p, b, s: NAN),
    "many steps": run([t / 299 for t in range(300)]),
    "no summary": replace(run(), summary={}),
    "odd names": replace(
        run(splits=("$x_1$\n\x1b[31m", "模型🙂")),
        summary={"checkpoints": [{"name": "Модель/" * 60 + "$a$"}], "loss": "\x07$l$"},
    ),
}


# Of numbers that a logarithm makes something else of.
LOG = ("no rows", "constant", "huge and tiny", "too large", "nan")


@pytest.mark.usefixtures("laid_out", "coarse")
@pytest.mark.filterwarnings("ignore:Glyph")  # measured here outside of render
@pytest.mark.parametrize(
    ("case", "log"),
    [
        *sample(((case, case in LOG) for case in ODD), 1, 8),
        *(pytest.param(case, case not in LOG, marks=pytest.mark.stress) for case in ODD),
    ],
)
def test_odd_tables_are_drawn(case: str, log: bool) -> None:
    figure = draw_trajectory([ODD[case]], Drawing(log=log))
    figure.draw_without_rendering()
    page, box = figure.bbox_inches, figure.get_tightbbox()
    assert box.x0 >= -0.01
    assert box.y0 >= -0.01
    assert box.x1 <= page.x1 + 0.01
    assert box.y1 <= page.y1 + 0.01
    assert TURNS in note(figure)
    assert not [line for text in texts(figure) for line in text if line < " " and line != "\n"]


def test_no_run_gives_an_empty_figure() -> None:
    assert "There are no points" in note(draw_trajectory([]))


def test_single_points_keep_their_error_bars() -> None:
    figure = draw_trajectory([run([0.0], surface=False)])
    assert any(isinstance(c, LineCollection) for c in figure.axes[1].collections)
