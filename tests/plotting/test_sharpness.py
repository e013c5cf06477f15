"""The figure of sharpness: what it shows, what it says, what it survives."""

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

from losscli.errors import UsageError
from losscli.plotting.sharpness import draw_sharpness
from losscli.plotting.style import render
from losscli.results.drawing import Drawing
from losscli.results.result import Run, draw
from losscli.table import Cell, Table
from tests.cases import sample
from tests.plotting.test_interpolation import check_golden, legend
from tests.plotting.test_trajectory import sentence

COLUMNS = (
    *("checkpoint", "split", "rho", "average", "average_stderr", "worst", "worst_stderr"),
    *("sam", "sam_stderr", "critical_step", "critical_sharpness"),
)
RADII = (0.01, 0.1, 1.0)


def measures(k: int, radius: float, split: str) -> list[Cell]:
    """Rises of a quadratic loss at the k-th checkpoint, where it is sharper the later."""
    slope, bend = 2.0**-k, 1.0 + k + (split != "train")
    worst = slope * radius + bend * radius**2 / 2
    critical = bend * 0.9
    return [bend * radius**2 * 50, radius**2, worst, worst / 9, 0.9 * worst, worst / 8,
            2 / critical, critical]  # fmt: skip


def run(
    names: Sequence[str] = ("a.pt", "b.pt"),
    radii: Sequence[float] = RADII,
    splits: Sequence[str] = ("train", "test"),
    cells: Callable[..., list[Cell]] = measures,
    **summary: Any,
) -> Run[Any]:
    rows = [
        [name, split, radius, *cells(k, radius, split)]
        for k, name in enumerate(names)
        for split in splits
        for radius in radii
    ]
    about = {"loss": "mse", "examples": dict.fromkeys(splits, 640), "learning_rates": {}}
    return Run(Table.build(COLUMNS, rows), about | summary)


PATH = [f"run/step-{k}.pt" for k in range(0, 100, 10)]
PICTURES: dict[str, Callable[[], Figure]] = {
    "sharpness": lambda: draw_sharpness(run(), Drawing(title="Two checkpoints")),
    "sharpness-path": lambda: draw_sharpness(
        run(PATH, (0.1,), learning_rates=dict.fromkeys(PATH[3:], 0.2))
    ),
}


@pytest.mark.usefixtures("laid_out")
@pytest.mark.parametrize("name", sample(PICTURES, 0, 2))
def test_golden(name: str) -> None:
    check_golden(name, PICTURES[name]())


def marks(axes: Axes, marker: str) -> list[Line2D]:
    found = [line for line in axes.lines if line.get_marker() == marker]
    return [line for line in found if len(line.get_xdata())]


def points(axes: Axes, marker: str) -> set[tuple[float, float]]:
    return {
        (float(x), float(y))
        for line in marks(axes, marker)
        for x, y in zip(*line.get_data(), strict=True)
    }


@pytest.mark.stress
def test_picture_from_the_csv_is_the_same() -> None:
    drawn = run(["a.pt"])
    again = replace(drawn, table=Table.from_csv(io.StringIO(drawn.table.to_csv(), newline=""), "x"))
    assert render(draw([drawn]), ".svg") == render(draw([again]), ".svg")


def test_every_value_is_a_mark_over_rho_or_over_checkpoints() -> None:
    columns = {"^": "worst", "o": "sam", "s": "average"}
    for drawn, over_rho in [
        (run(), True),
        (run(["a.pt"]), True),
        (run(["a.pt"], (0.1,)), True),
        (run(radii=(0.1,)), False),
        (run(PATH), False),
    ]:
        figure = draw_sharpness(drawn)
        names = list(drawn.table.unique("checkpoint"))
        assert len(figure.axes) == (3 if len(names) > 1 else 2)
        number = {name: 10 * k if names == PATH else k for k, name in enumerate(names)}
        for marker, column in columns.items():
            axes = figure.axes[marker == "s"]
            assert axes.get_yscale() == "log"
            expected = {
                (row["rho"] if over_rho else number[row["checkpoint"]], row[column])
                for row in drawn.table.records()
            }
            assert points(axes, marker) == expected
        assert figure.axes[1].get_xscale() == ("log" if over_rho else "linear")
        if len(names) > 1:
            critical = {
                (number[row["checkpoint"]], row["critical_sharpness"])
                for row in drawn.table.records()
            }
            assert points(figure.axes[2], "D") == critical
        else:
            assert "Critical sharpness on train: 0.9, step 2.22." in sentence(figure)
        assert "at most ρ for the others: they are not comparable" in sentence(figure)


def test_the_legend_names_colours_splits_and_marks() -> None:
    figure, path = draw_sharpness(run()), draw_sharpness(run(PATH))
    assert legend(figure) == ["a", "train (n = 640)", "worst-case, at least",
                     "b", "test (n = 640)", "SAM", "average"]  # fmt: skip
    assert "Checkpoints *.pt" in sentence(figure)
    labelled = replace(run(), checkpoint_labels=["one", "two"])
    assert {"one", "two"} < {*legend(draw_sharpness(labelled))}
    single = replace(run(radii=(0.1,)), checkpoint_labels=["one", "two"])
    axis = draw_sharpness(single).axes[2].xaxis
    assert [label.get_text() for label in axis.get_ticklabels()] == ["one", "two"]
    assert "first of the 10 checkpoints is step-0, the last is step-90" in sentence(path)
    assert {"ρ = 0.01", "ρ = 0.1", "ρ = 1"} < {*legend(path)}


def test_negative_values_are_hollow_marks_at_their_size() -> None:
    def falling(k: int, radius: float, split: str) -> list[Cell]:
        average, *others = measures(k, radius, split)
        return [-1.0 if radius == 0.1 else average, *others]

    figure = draw_sharpness(run(cells=falling))
    hollow = [m for m in marks(figure.axes[1], "s") if m.get_markerfacecolor() == "white"]
    assert {(x, y) for m in hollow for x, y in zip(*m.get_data(), strict=True)} == {(0.1, 1.0)}
    assert len(hollow) == 4
    assert len(points(figure.axes[1], "s")) > 1
    assert "hollow: negative, the loss decreases" in legend(figure)
    assert "hollow: negative, the loss decreases" not in legend(draw_sharpness(run()))


def test_values_that_are_not_drawn_are_counted() -> None:
    def broken(k: int, radius: float, split: str) -> list[Cell]:
        cells = measures(k, radius, split)
        if k == 0:
            cells[0], cells[4:6], cells[-2:] = math.nan, [None, None], [None, None]
        if split == "test":
            cells[-2:] = [0.0, math.inf]
        return cells

    said = sentence(draw_sharpness(run(cells=broken)))
    assert "6 values of average sharpness not drawn (×): not finite, not defined or 0." in said
    assert "6 values of worst-case and SAM sharpness not drawn (×): " in said
    assert "Critical sharpness of 1 checkpoint on train is not known (×)." in said
    assert "Critical sharpness of 2 checkpoints on test is inf" in said
    single = sentence(draw_sharpness(run(["a.pt"], cells=broken)))
    assert "Critical sharpness on train: not known." in single
    assert "Critical sharpness on test: inf." in single


def test_a_learning_rate_is_drawn_where_it_is_known() -> None:
    figure = draw_sharpness(run(PATH, learning_rates={PATH[2]: 0.5, PATH[4]: 0.1}))
    edges = [line for line in figure.axes[2].lines if list(line.get_ydata()) == [4.0, 20.0]]
    assert [list(line.get_xdata()) for line in edges] == [[20, 40]]
    assert "The grey line is 2 / learning rate" in sentence(figure)
    assert "learning rate" not in sentence(draw_sharpness(run(PATH)))


def test_titles_name_the_measures() -> None:
    figure = draw_sharpness(run(adaptive=True, direction_split="train"))
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [
        "Worst-case and SAM sharpness, adaptive (mse)",
        "Average sharpness, adaptive (mse)",
        "Critical sharpness along the gradient of train",
    ]
    assert "δ/|θ|" in sentence(figure)


@pytest.mark.parametrize("radii", [(), (0.0,), (-1.0, math.nan, math.inf), (1e-300, 1e300)])
def test_tables_of_any_radii_are_drawn(radii: Sequence[float]) -> None:
    figure = draw_sharpness(run(radii=radii, cells=lambda *_: [1.0] * 8))
    assert "There are no points" in sentence(figure)
    assert render(figure, ".png")


def test_tables_of_any_numbers_are_drawn() -> None:
    values: list[Cell] = [0.0, -1e-320, 1e308, -1e308, math.nan, math.inf, None]
    names = [f"{value}.pt" for value in values]
    drawn = run(names, cells=lambda k, *_: [values[k]] * 8, learning_rates={names[2]: 1e-300})
    assert render(draw_sharpness(drawn), ".png")
    single = run(names[2:3], cells=lambda *_: [1e308] * 8)
    assert render(draw_sharpness(replace(single, summary={})), ".png")


def test_two_tables_are_not_laid_over_each_other() -> None:
    with pytest.raises(UsageError, match="tables of sharpness cannot be overlaid"):
        draw([run(), run()])
    assert np.isfinite(draw([run()]).get_figheight())
