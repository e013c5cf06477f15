"""The figure of around: what it shows, what it says, what it survives."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from losscli.plotting.around import draw_around
from losscli.plotting.style import render
from losscli.results.drawing import Drawing
from losscli.results.result import Run, draw
from losscli.table import Table
from losscli.weight_space.basin import Profile, radius
from tests.cases import sample
from tests.plotting.test_interpolation import check_golden, legend, texts

NAN, INF = math.nan, math.inf
COLUMNS = ("checkpoint", "direction", "coefficient", "distance", "split", "loss", "loss_stderr")
SIZES = {"a.pt": 8.0, "b.pt": 10.0}
RANDOM = tuple(str(k + 1) for k in range(9))
EVEN = tuple(k / 10 for k in range(11))
BOTH = tuple(k / 20 for k in range(-10, 11))

Height = Callable[[str, str, float], float]


def bowl(checkpoint: str, direction: str, c: float) -> float:
    """Bowls of many widths; that of the second checkpoint is twice as steep."""
    steep = {"v1": 9.0, "v2": 4.0, "vn": -0.2, "gradient": 1.0}.get(direction)
    steep = 0.5 + (int(direction) * 7 % 11) / 4 if steep is None else steep
    return 0.3 + steep * c**2 * (2 if checkpoint == "b.pt" else 1) + 0.1 * c


def run(
    names: Sequence[str] = ("a.pt",),
    height: Height = bowl,
    *,
    directions: Sequence[str] = RANDOM,
    coefficients: Sequence[float] = EVEN,
    splits: Sequence[str] = ("train",),
    threshold: float | None = 0.6,
) -> Run[Any]:
    random = directions[0].isdecimal()
    lengths = {name: SIZES.get(name, 7.0) if random else 1.0 for name in names}
    rows = [
        (name, d, c, abs(c) * lengths[name], split, height(name, d, c), 0.02)
        for name in names
        for d in directions
        for c in coefficients
        for split in splits
    ]
    table = Table.build(COLUMNS, rows)

    def point(name: str) -> dict[str, Any]:
        losses = np.array([[height(name, d, c) for c in coefficients] for d in directions])
        positions = [c * lengths[name] for c in coefficients]
        curves = {"mean": losses} if random else dict(zip(directions, losses[:, None], strict=True))
        radii = {
            key: radius(positions, curve, threshold)._asdict() for key, curve in curves.items()
        }
        return {"checkpoint": name, "threshold": threshold, "radii": radii}

    points = [point(name) for name in names] if threshold is not None else []
    summary = {
        "loss": "cross_entropy",
        "checkpoints": [{"name": name} for name in names],
        "examples": dict.fromkeys(splits, 640),
        "norms": [SIZES.get(name, 7.0) for name in names],
        "splits": {split: {"points": points} for split in splits},
    }
    return Run(table, summary)


PICTURES: dict[str, Callable[[], Figure]] = {
    "around": lambda: draw_around([run(["a.pt", "b.pt"])], Drawing(title="Two bowls")),
    "around-along": lambda: draw_around([
        run(directions=("v1", "v2", "vn"), coefficients=BOTH, splits=("train", "test"))
    ]),
}


@pytest.mark.usefixtures("laid_out")
@pytest.mark.parametrize("name", sample(PICTURES, 0, 2))
def test_golden(name: str) -> None:
    check_golden(name, PICTURES[name]())


def test_the_legend_has_the_eigenvalues_of_a_single_checkpoint() -> None:
    found = [
        {"direction": "v1", "eigenvalue": 4.4159, "error": 1e-4, "converged": True},
        {"direction": "vn", "eigenvalue": None, "error": None, "converged": False},
    ]
    for names, along in (
        (["a.pt"], ["along v1 (λ = 4.42)", "along vn"]),
        # A line style stands for the same direction from all checkpoints.
        (["a.pt", "b.pt"], ["along v1", "along vn"]),
    ):
        drawn = run(names, directions=("v1", "vn"), coefficients=BOTH)
        drawn.summary["derivatives"] = dict.fromkeys(names, found)
        assert [text for text in legend(draw_around([drawn])) if "along" in text] == along
    drawn = run(directions=("gradient",), coefficients=BOTH)
    drawn.summary["derivatives"] = {"a.pt": [{"direction": "gradient", "gradient_norm": 0.2}]}
    assert "along gradient" in legend(draw_around([drawn]))


def lines(axes: Axes, width: float) -> list[Line2D]:
    return [
        line for line in axes.lines if line.get_linewidth() == width and line.get_ls() != "None"
    ]


def diamonds(axes: Axes) -> list[tuple[float, float]]:
    marks = [line for line in axes.lines if line.get_marker() == "D"]
    return [(x, y) for line in marks for x, y in zip(*line.get_data(), strict=True)]


@pytest.mark.stress
def test_picture_from_the_csv_is_the_same() -> None:
    drawn = run(["a.pt", "b.pt"], splits=("train", "test"))
    table = Table.from_csv(io.StringIO(drawn.table.to_csv(), newline=""), "x")
    again = draw([replace(drawn, table=table)])
    assert render(draw([drawn]), ".svg") == render(again, ".svg")


def test_each_direction_the_mean_and_the_band_are_those_of_the_table() -> None:
    figure = draw_around([run(["a.pt", "b.pt"])])
    (axes,) = figure.axes
    for name, mean, thin in zip(SIZES, lines(axes, 2.2), lines(axes, 0.7), strict=True):
        losses = np.array([[bowl(name, d, c) for c in EVEN] for d in RANDOM])
        distances = SIZES[name] * np.array(EVEN)
        np.testing.assert_allclose(mean.get_xdata(), distances)
        np.testing.assert_allclose(mean.get_ydata(), losses.mean(0))
        shown = np.asarray(thin.get_ydata()).reshape(len(RANDOM), len(EVEN) + 1)
        np.testing.assert_allclose(shown[:, :-1], losses)
        assert np.isnan(shown[:, -1]).all()
    bands = [b for b in axes.collections if b.get_paths() and len(b.get_paths()[0].vertices) > 5]
    for name, band in zip(SIZES, bands[-2:], strict=True):
        losses = np.array([[bowl(name, d, c) for c in EVEN] for d in RANDOM])
        profile = Profile.of(losses)
        ys = band.get_paths()[0].vertices[:, 1]
        assert (ys.min(), ys.max()) == pytest.approx((profile.low.min(), profile.high.max()))
    # All lines are within the panel, also those far above the mean.
    low, high = axes.get_ylim()
    assert low < 0.3
    assert high > max(bowl("b.pt", d, 1.0) for d in RANDOM)
    found = legend(figure)
    for entry in ("a, ‖θ‖ = 8", "b, ‖θ‖ = 10", "mean", "single directions"):
        assert entry in found
    assert "10–90 % of directions" in found
    assert "Checkpoints *.pt" in texts(figure)


def test_a_diamond_marks_each_radius_that_is_crossed() -> None:
    (axes,) = draw_around([run(["a.pt", "b.pt"])]).axes
    for (x, y), name in zip(diamonds(axes), SIZES, strict=True):
        losses = np.array([[bowl(name, d, c) for c in EVEN] for d in RANDOM])
        expected = radius([SIZES[name] * c for c in EVEN], losses, 0.6)
        assert (x, y) == (pytest.approx(expected.distance), 0.6)
    assert not diamonds(draw_around([run(threshold=99.0)]).axes[0])
    assert not diamonds(draw_around([run(threshold=0.1)]).axes[0])
    assert not diamonds(draw_around([replace(run(), summary={})]).axes[0])
    # On the side on which it is smaller, and on both if they are alike.
    along = run(directions=("v1", "vn"), coefficients=BOTH)
    assert [x > 0 for x, _ in diamonds(draw_around([along]).axes[0])] == [True]
    even = run(height=lambda n, d, c: 0.3 + 9 * c**2, directions=("v1",), coefficients=BOTH)
    assert [x > 0 for x, _ in diamonds(draw_around([even]).axes[0])] == [True, False]


def test_a_single_size_has_an_axis_of_its_own() -> None:
    figure = draw_around([run()])
    upper = figure.axes[0].child_axes[0]
    low, high = figure.axes[0].get_xlim()
    assert upper.get_xlabel() == "distance / ‖θ‖"
    figure.draw_without_rendering()
    upper.set_xlim(low / 8, high / 8)
    assert not draw_around([run(["a.pt", "b.pt"])]).axes[0].child_axes
    assert not draw_around([replace(run(), summary={})]).axes[0].child_axes


def test_directions_with_names_have_line_styles_and_errors() -> None:
    figure = draw_around([run(directions=("v1", "v2", "vn"), coefficients=BOTH)])
    found = legend(figure)
    styles = ["along v1", "along v2", "along vn"]
    assert sorted(found[1:]) == [
        *styles,
        "radius of the basin",
        "± one standard error of each point",
    ]
    assert "negative: in the opposite direction" in figure.axes[0].get_xlabel()
    curves = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 21]
    assert len({str(line._unscaled_dash_pattern) for line in curves}) == 3


def test_several_runs_are_overlaid_and_labels_name_them() -> None:
    one, other = run(["a.pt", "b.pt"]), run(["c.pt"], directions=("gradient",))
    found = legend(draw([replace(one, label="x"), replace(other, label="y")]))
    assert {"x, a, ‖θ‖ = 8", "x, b, ‖θ‖ = 10", "y, ‖θ‖ = 7"} < {*found}
    found = legend(draw([replace(one, checkpoint_labels=["wide", "narrow"])]))
    assert {"wide, ‖θ‖ = 8", "narrow, ‖θ‖ = 10"} < {*found}


def test_with_many_checkpoints_the_legend_names_the_first_and_the_last() -> None:
    figure = draw_around([run([f"{k}.pt" for k in range(17)], directions=("1", "2"))])
    assert {"0, ‖θ‖ = 7", "16, ‖θ‖ = 7"} < {*legend(figure)}
    assert "8, ‖θ‖ = 7" not in legend(figure)
    said = " ".join(texts(figure)).replace("\n", " ")
    assert "17 checkpoints, from dark to light in the order of the table" in said


def test_values_that_are_not_finite_are_left_out_with_a_note() -> None:
    def height(name: str, d: str, c: float) -> float:
        return {0.9: NAN, 1.0: INF}.get(c, bowl(name, d, c)) if d == "3" else bowl(name, d, c)

    figure = draw_around([run(height=height)])
    said = " ".join(texts(figure)).replace("\n", " ")
    assert "2 points of the mean of a.pt, train: loss not finite (×)" in said
    thin = lines(figure.axes[0], 0.7)[0]
    assert np.isnan(thin.get_ydata()).sum() == len(RANDOM) + 2


@pytest.mark.parametrize("directions", [RANDOM, ("v1",)])
def test_a_logarithmic_axis_omits_values_that_are_not_positive(directions: Sequence[str]) -> None:
    figure = draw_around(
        [run(height=lambda n, d, c: c - 0.2, directions=directions)], Drawing(log=True)
    )
    assert figure.axes[0].get_yscale() == "log"
    assert figure.axes[0].get_ylabel() == "loss (cross_entropy)\nlog scale"
    assert "not above 0" in " ".join(texts(figure)).replace("\n", " ")


ODD = {
    "no rows": run([]),
    "one direction": run(directions=("1",)),
    "one point": run(coefficients=(0.0,), threshold=None),
    "nothing known": run(height=lambda n, d, c: NAN),
    "all the same": run(height=lambda n, d, c: 0.7),
    "huge": run(height=lambda n, d, c: 1e30 * c),
    "tiny": run(height=lambda n, d, c: 1e-30 * (1 + c)),
    "too large": run(height=lambda n, d, c: 1e300 if c else 1.0),
    "inf": run(height=lambda n, d, c: INF if c else 1.0),
    "many splits": run(splits=tuple("abcde")),
    "many checkpoints": run([f"{k}.pt" for k in range(30)], directions=("1", "2")),
    "odd names": run(["$x_1$\n\x1b[31m", "Модель/" * 60 + "$a$"], splits=("$x$\x07",)),
    "no summary": replace(run(), summary={}),
}


@pytest.mark.usefixtures("laid_out")
@pytest.mark.filterwarnings("ignore:Glyph")  # measured here outside of render
@pytest.mark.parametrize("case", sample(ODD, 3, 8))
@pytest.mark.parametrize("log", [False, pytest.param(True, marks=pytest.mark.stress)])
def test_odd_tables_are_drawn(case: str, log: bool) -> None:
    figure = draw_around([ODD[case]], Drawing(log=log))
    figure.draw_without_rendering()
    page, box = figure.bbox_inches, figure.get_tightbbox()
    assert box.x0 >= -0.01
    assert box.y0 >= -0.01
    assert box.x1 <= page.x1 + 0.01
    assert box.y1 <= page.y1 + 0.01
    assert not [line for text in texts(figure) for line in text if line < " " and line != "\n"]


def test_damaged_rows_are_drawn_as_far_as_they_go() -> None:
    good = run()
    for column, value in [("distance", NAN), ("distance", INF), ("loss", None), ("direction", "x")]:
        at = COLUMNS.index(column)
        first, *rest = good.table.rows
        changed = Table(good.table.columns, ((*first[:at], value, *first[at + 1 :]), *rest))
        assert draw_around([replace(good, table=changed)]).axes
