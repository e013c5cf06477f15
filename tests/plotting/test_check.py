"""The figure of a check: what it shows, what it says, what it survives.

The tables come from fixed formulas: training that comes to rest near a saddle.
"""

from __future__ import annotations

import functools
import io
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from losscli.errors import UsageError
from losscli.plotting.check import draw_check
from losscli.plotting.style import render
from losscli.results.drawing import Drawing
from losscli.results.result import Run, draw
from losscli.table import Cell, Table
from tests.cases import sample
from tests.plotting.test_interpolation import check_golden, legend, number, texts
from tests.plotting.test_trajectory import sentence

NAN, INF = math.nan, math.inf
COLUMNS = (
    *("checkpoint", "split", "loss", "gradient_norm", "lambda_min", "lambda_min_error"),
    *("lambda_max", "lambda_max_error", "minimal_ratio", "verdict"),
)

ADAM = "preconditioned_lambda_max", "preconditioned_lambda_max_error"


def judge(gradient: float, low: float, error: float) -> str:
    """The verdict by the contract, with the default tolerance."""
    if not gradient <= 1e-3:
        return "not critical"
    return "saddle" if low + error < 0 else "minimum" if low - error > 0 else "undecided"


def training(t: float, split: str) -> tuple[Cell, ...]:
    """Loss, gradient norm and eigenvalues at a share t of the training."""
    extra = 0.3 * t if split != "train" else 0.0
    gradient = 2.5 * math.exp(-8.5 * t) + 2e-4
    low = -1.6 * t * math.exp(-3 * t) - 0.02 + (0.24 * t**6 if split == "train" else 0)
    high = 6 + 36 * (1 - math.exp(-4 * t)) + 1.5 * math.sin(40 * t)
    error = 0.01 + 0.05 * t**4
    loss = 2.3 * math.exp(-5 * t) + 0.02 + extra
    return (loss, gradient, low, error, high, 0.2, None, judge(gradient, low, error))


def way_down(points: int = 41, reach: float = 4.0) -> Table:
    distances = [reach * (2 * k / (points - 1) - 1) for k in range(points)]
    rows = [(d, 0.34 - 0.06 * d**2 + 0.007 * d**3 + 0.005 * d**4, 0.012) for d in distances]
    return Table.build(("distance", "loss", "loss_stderr"), rows)


def spectrum(name: str, splits: Sequence[str], size: int = 30) -> Table:
    rows = [
        (name, split, (42.0 if split == "train" else 37.0) * math.exp(-0.4 * k) - 0.11, 0.002)
        for split in splits
        for k in range(size)
    ]
    return Table.build(("checkpoint", "split", "eigenvalue", "error"), rows)


def density(names: Sequence[str], splits: Sequence[str]) -> tuple[Table, dict[str, Any]]:
    """A bulk at zero and two eigenvalues apart from it, one further away in each checkpoint."""
    rows: list[tuple[Cell, ...]] = []
    about: dict[str, Any] = {split: {"points": []} for split in splits}
    for k, name in enumerate(names):
        for split in splits:
            outliers = [6.0 + 3 * k, 2.0]
            for x in np.linspace(-1, 7 + 3 * k, 400):
                bells = [math.exp(-(((x - c) / 0.1) ** 2) / 2) / 500 for c in outliers]
                rows.append((name, split, float(x), math.exp(-5 * abs(x)) + sum(bells)))
            found = {"sigma": 0.1, "outliers": outliers, "trace": 9.0, "trace_stderr": 1.0}
            about[split]["points"].append({"checkpoint": name, "density": found})
    return Table.build(("checkpoint", "split", "lambda", "density"), rows), about


def blocks(names: Sequence[str], splits: Sequence[str], number: int = 5) -> Table:
    columns = ("gradient_norm", "lambda_max", "lambda_max_error", "trace", "trace_stderr")
    rows = [
        (name, split, f"layers.{b}", 0.1 / (1 + b), 3.0 + b + k, 0.1, 2.0 * b - 3, 0.5)
        for k, name in enumerate(names)
        for split in splits
        for b in range(number)
    ]
    return Table.build(("checkpoint", "split", "block", *columns), rows)


def run(
    checkpoints: int = 21,
    splits: Sequence[str] = ("train", "test"),
    row: Callable[[float, str], tuple[Cell, ...]] = training,
    *,
    escape: bool = False,
    eigenvalues: int = 0,
    spectra: bool = False,
    **summary: Any,
) -> Run:
    """A run of so many checkpoints."""
    names = [f"runs/{k}.pt" for k in range(checkpoints)]
    shares = [1.0] if checkpoints == 1 else [k / (checkpoints - 1) for k in range(checkpoints)]
    rows = [(n, s, *row(t, s)) for n, t in zip(names, shares, strict=True) for s in splits]
    more = {}
    about: dict[str, Any] = {"tolerance": 1e-3, "loss": "cross_entropy", "learning_rate": None}
    if escape:
        more["escape"] = way_down()
        about["escape"] = {"checkpoint": names[-1], "split": splits[-1], "eigenvalue": -0.12}
    if eigenvalues:
        more["spectrum"] = spectrum(names[-1], splits, eigenvalues)
    if spectra:
        more["density"], about["splits"] = density(names, splits)
        more["curvature"] = blocks(names, splits)
        about |= {"operator": "ggn", "probes": 10, "lanczos": 90, "moving": {"values": 5000}}
    return Run(Table.build(COLUMNS, rows), {**about, **summary}, more=more)


def training_of_adam(
    rates: Sequence[float] = (1e-3,) * 9, splits: Sequence[str] = ("train", "test")
) -> Run:
    """A run of Adam whose spectra are known, and which has taken no step at first."""
    plain = run(len(rates), splits)
    rows: list[tuple[Cell, ...]] = []
    for k, row in enumerate(plain.table.rows):
        t = k // len(splits) / (len(rates) - 1)
        found = (38_000 * (1 - math.exp(-5 * t)), 150.0) if t else (None, None)
        ratio = 0.3 + 0.1 * t
        rows.append((*row[:8], ratio, 0.35, 0.65 - ratio, *found, row[-1]))
    columns = (*COLUMNS[:-1], "negative", "undecided", *ADAM, "verdict")
    states = [
        {"checkpoint": f"runs/{k}.pt", "threshold": 38 / rate} if k else {"checkpoint": "runs/0.pt"}
        for k, rate in enumerate(rates)
    ]
    summary: dict[str, Any] = {**plain.summary, "optimizer": "adam", "preconditioners": states}
    return Run(Table.build(columns, rows), summary)


PICTURES = {
    "check": lambda: draw_check(run(escape=True, learning_rate=0.05), Drawing(title="To a saddle")),
    "check-adam": lambda: draw_check(training_of_adam()),
    "check-one": lambda: draw_check(run(1, escape=True, eigenvalues=30)),
    "check-spectra-many": lambda: draw_check(run(9, spectra=True)),
    "check-spectra": lambda: draw_check(run(1, spectra=True)),
}


@functools.cache
def figure_of(checkpoints: int = 21, *arguments: Any, **options: Any) -> Figure:
    """The figure of a run, without its layout, for tests that only look at it."""
    return draw_check(run(checkpoints, *arguments, **options))


@functools.cache
def picture(name: str) -> Figure:
    """A picture with its layout."""
    return PICTURES[name]()


def lines(axes: Axes) -> list[Line2D]:
    """The curves of the splits."""
    found = [line for line in axes.get_lines() if line.get_color() == "#0072B2"]
    return [line for line in found if line.get_linestyle() != "None"]


def levels(axes: Axes) -> dict[float, str]:
    """The level lines and how they are drawn."""
    found = [line for line in axes.get_lines() if [*np.asarray(line.get_xdata())] == [0, 1]]
    return {float(np.asarray(line.get_ydata())[0]): str(line.get_linestyle()) for line in found}


def marks(axes: Axes) -> dict[str, int]:
    """How many marks of each shape."""
    shapes = [str(line.get_marker()) for line in axes.get_lines()]
    return {
        shape: sum(
            len(np.asarray(a.get_xdata())) for a in axes.get_lines() if a.get_marker() == shape
        )
        for shape in shapes
        if shape != "None"
    }


def panel(figure: Figure, label: str) -> Axes:
    """The panel whose vertical axis is called so."""
    (found,) = [axes for axes in figure.axes if axes.get_ylabel().startswith(label)]
    return found


def strip(figure: Figure) -> Axes:
    (found,) = [axes for axes in figure.axes if axes.get_title("left") == "verdict"]
    return found


def bars(axes: Axes) -> list[tuple[float, float, float]]:
    """Where error bars are, and from where to where they go."""
    found = [c for c in axes.collections if isinstance(c, LineCollection)]
    segments = [s for c in found for s in c.get_segments() if len(s) == 2]
    return [(s[0][0], s[0][1], s[1][1]) for s in segments if s[0][0] == s[1][0]]


@pytest.mark.usefixtures("laid_out")
@pytest.mark.parametrize("name", sample(PICTURES, 0, 5))
def test_golden(name: str) -> None:
    check_golden(name, picture(name))


@pytest.mark.parametrize("checkpoints", [1, pytest.param(3, marks=pytest.mark.stress)])
def test_picture_from_the_csv_is_the_same(checkpoints: int) -> None:
    def read(table: Table) -> Table:
        return Table.from_csv(io.StringIO(table.to_csv(), newline=""), "x")

    drawn = run(checkpoints, escape=True, eigenvalues=7, spectra=checkpoints == 1)
    again = replace(
        drawn, table=read(drawn.table), more={k: read(t) for k, t in drawn.more.items()}
    )
    figure = draw_check(drawn)
    assert render(figure, ".svg") == render(draw_check(again), ".svg")


def test_several_checkpoints_have_their_quantities_over_their_order() -> None:
    figure = figure_of(21)
    assert len(figure.axes) == 5
    for label, column in (
        ("loss (cross_entropy)", 0),
        ("gradient norm", 1),
        ("smallest eigenvalue\nλ", 2),
        ("largest eigenvalue\nλ", 4),
    ):
        axes = panel(figure, label)
        train, test = lines(axes)
        np.testing.assert_array_equal(train.get_xdata(), range(21))
        expected = [training(k / 20, "test")[column] for k in range(21)]
        np.testing.assert_array_equal(test.get_ydata(), expected)
        assert (train.get_linestyle(), test.get_linestyle()) == ("-", "--")
    below = [a.get_xlabel() for a in figure.axes if a.get_xlabel()]
    assert below == ["checkpoint, in the order given"] * 2
    assert len({axes.get_xlim() for axes in figure.axes}) == 1
    assert "The first of the 21 checkpoints is runs/0.pt, the last is runs/20.pt." in sentence(
        figure
    )
    assert set(legend(figure)) == {"train", "test", "not critical", "saddle", "minimum"}


def test_a_few_checkpoints_without_steps_are_named_on_the_axis() -> None:
    drawn = run(3, ("train",))
    rows = [
        (f"runs/{name}/final.pt", *row[1:])
        for name, row in zip(("relu", "tanh", "adam"), drawn.table.rows, strict=True)
    ]
    figure = draw_check(Run(Table.build(drawn.table.columns, rows), drawn.summary))
    below = [axes for axes in figure.axes if axes.get_xlabel()]
    assert [axes.get_xlabel() for axes in below] == ["checkpoint"] * 2
    for axes in below:
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["relu", "tanh", "adam"]
    assert "Checkpoints runs/*/final.pt" in sentence(figure)


def test_steps_in_names_are_on_the_axis() -> None:
    drawn = run(3, ("train",))
    for steps, scale, label in (((0, 500, 1000), "linear", "step"),):
        rows = [
            (f"runs/step-{step:04}.pt", *row[1:])
            for step, row in zip(steps, drawn.table.rows, strict=True)
        ]
        figure = draw_check(replace(drawn, table=Table.build(COLUMNS, rows)))
        axes = panel(figure, "gradient norm")
        np.testing.assert_array_equal(lines(axes)[0].get_xdata(), steps)
        assert (axes.get_xscale(), axes.get_xlabel()) == (scale, label)
        places = [x for line in strip(figure).get_lines() for x in np.asarray(line.get_xdata())]
        assert sorted(places) == [*steps]


def test_steps_are_the_checkpoints_in_the_order_of_their_first_row() -> None:
    drawn = run(3, ("train", "test"))
    rows = [drawn.table.rows[k] for k in (4, 0, 1, 2, 3)]  # the last one's test row is missing
    figure = draw_check(replace(drawn, table=Table.build(COLUMNS, rows)))
    train, test = lines(panel(figure, "loss"))
    np.testing.assert_array_equal(train.get_xdata(), [0, 1, 2])
    np.testing.assert_array_equal(test.get_xdata(), [1, 2])
    assert "not finite" not in sentence(figure)


def test_a_known_tolerance_is_a_line_and_a_shade() -> None:
    figure = figure_of(21)
    axes = panel(figure, "gradient norm")
    assert axes.get_yscale() == "log"
    assert levels(axes) == {1e-3: "-"}
    assert "critical below 0.001" in texts(figure)
    assert axes.get_ylim()[0] < 5e-4
    assert "critical means a gradient norm of at most 0.001" in sentence(figure)
    high_above = figure_of(21, tolerance=50.0)
    assert panel(high_above, "gradient norm").get_ylim()[1] > 50
    for unknown in (0.0, INF):
        other = figure_of(21, tolerance=unknown)
        assert levels(panel(other, "gradient norm")) == {}
        assert not [text for text in texts(other) if text.startswith("critical below")]


def test_two_over_the_learning_rate_is_drawn_only_where_it_is_given() -> None:
    figure = figure_of(21, learning_rate=0.05)
    axes = panel(figure, "largest")
    assert levels(axes) == {0.0: "-", 40.0: "--"}
    assert "2 / learning rate = 40" in texts(figure)
    assert axes.get_ylim()[1] > 44
    for other in (figure_of(21), figure_of(21, learning_rate=NAN)):
        assert levels(panel(other, "largest")) == {0.0: "-"}
        assert "learning rate" not in " ".join(texts(other))
    wide = panel(figure_of(21, learning_rate=1e-3), "largest")
    assert wide.get_yscale() == "log"
    assert wide.get_ylabel().endswith("log scale")
    assert levels(wide) == {2000.0: "--"}
    assert "full-batch training is unstable where λₘₐₓ is above" in sentence(figure)
    moved = figure_of(21, learning_rate=0.05, momentum=0.9)
    assert {round(level, 9) for level in levels(panel(moved, "largest"))} == {0.0, 76.0}
    assert "(2 + 2 · 0.9) / learning rate = 76" in texts(moved)
    still = figure_of(21, learning_rate=0.05, momentum=0.0)
    assert "2 / learning rate = 40" in texts(still)
    far = figure_of(21, learning_rate=1e-6)
    assert panel(far, "largest").get_ylim()[1] < 60
    assert "2 / learning rate = 2×10⁶, far above" in sentence(far)


def test_minimal_ratio_and_preconditioned_eigenvalue_have_panels_where_they_are_known() -> None:
    figure = draw_check(training_of_adam())
    assert len(figure.axes) == 7
    assert len({axes.get_xlim() for axes in figure.axes}) == 1
    ratio = panel(figure, "minimal ratio")
    train, _ = lines(ratio)
    np.testing.assert_allclose(train.get_ydata(), [0.3 + 0.1 * k / 8 for k in range(9)])
    assert ratio.get_ylim()[0] < 0
    assert ratio.get_ylim()[1] > 1
    filled = [
        c
        for c in ratio.collections
        if isinstance(c, PolyCollection) and to_hex(c.get_facecolor()[0]) == "#e2e2e2"
    ]
    heights = np.asarray(filled[0].get_paths()[0].vertices)[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((0.3, 0.65))
    assert "λ within its error of 0" in legend(figure)
    adam = panel(figure, "λₘₐₓ of P⁻¹H")
    np.testing.assert_array_equal(lines(adam)[0].get_xdata(), range(1, 9))
    assert levels(adam) == {0.0: "-", 38_000.0: "--"}
    assert "(2 + 2β₁) / ((1 − β₁) learning rate) = 38000" in texts(figure)
    bottom = [ratio, adam]
    assert [axes for axes in figure.axes if axes.get_xlabel()] == bottom
    # Rates that differ have a curve.
    rates = [1e-3 * (1 - k / 10) for k in range(9)]
    adam = panel(draw_check(training_of_adam(rates)), "λₘₐₓ of P⁻¹H")
    (edges,) = [line for line in adam.get_lines() if line.get_linestyle() == "--"][-1:]
    np.testing.assert_allclose(edges.get_ydata(), [38 / rate for rate in rates[1:]])
    assert adam.get_ylim()[1] > 38 / rates[-1]
    # Without them the figure is as before.
    assert len(figure_of(9).axes) == 5
    one = training_of_adam((1e-3, 1e-3))
    alone = replace(one, table=one.table.where("checkpoint", "runs/1.pt"))
    said = "λₘₐₓ of P⁻¹H = 37744 ± 150 (threshold of Adam 38000)"
    assert said in sentence(draw_check(alone))


def test_both_signs_are_legible() -> None:
    even = panel(figure_of(21), "smallest")
    assert even.get_yscale() == "linear"
    assert 0.0 in levels(even)
    wide = panel(
        draw_check(
            run(
                21, row=lambda t, s: (1.0, 1.0, -(10 ** (1 - 5 * t)), 0.0, 9.0, 0.0, None, "saddle")
            )
        ),
        "smallest",
    )
    assert wide.get_yscale() == "symlog"
    assert wide.get_ylabel().endswith("log beyond ±0.01")
    labels = [t.get_text() for t in wide.get_yticklabels()]
    ticks = [float(tick) for tick in wide.get_yticks()]
    assert {"0", "−10", "−1"} <= set(labels)
    assert [number(label) for label in labels] == pytest.approx(ticks)
    # Both sides of zero, however far apart in size, have at least a twelfth of the axis.
    lopsided = run(
        1, ("train",), lambda t, s: (1.0, 1e-4, -0.03, 0.001, 250.0, 0.1, None, "saddle")
    )
    figure = draw_check(lopsided)
    (axes,) = figure.axes
    forward = axes.xaxis.get_transform().transform
    left, zero, low, right = forward(np.array([axes.get_xlim()[0], 0, -0.03, axes.get_xlim()[1]]))
    assert (zero - low) / (right - left) > 1 / 12
    assert left < low
    assert "log beyond ±0.01" in axes.get_xlabel()


def test_bars_go_as_far_as_the_errors() -> None:
    figure = figure_of(5, ("train",))
    found = bars(panel(figure, "smallest"))
    rows = [training(k / 4, "train") for k in range(5)]
    expected = [(k, low - error, low + error) for k, (_, _, low, error, *_) in enumerate(rows)]
    np.testing.assert_allclose(found, np.array(expected, dtype=np.float64))
    axes = panel(figure, "smallest")
    assert axes.get_ylim()[0] < min(low for _, low, _ in found)
    assert axes.get_ylim()[1] > max(high for _, _, high in found)


def test_a_value_without_a_bar_is_in_the_panel() -> None:
    figure = draw_check(ODD["huge"])
    for label, value in (("smallest", -1e150), ("largest", 1e150)):
        low, high = panel(figure, label).get_ylim()
        assert low < value < high


def test_ranks_and_steps_are_whole_numbers() -> None:
    one = panel(draw_check(ODD["one, one eigenvalue"]), "eigenvalue")
    two = panel(draw_check(ODD["two"]), "smallest")
    for axes, expected in ((one, ["1"]), (two, ["0", "1"])):
        low, high = axes.get_xlim()
        ticks = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
        assert [t.get_text() for x, t in ticks if low <= x <= high] == expected


def test_verdicts_are_those_of_the_table() -> None:
    verdicts = ["not critical", "undecided", "saddle", "minimum", "maximum", "undecided", "", "new"]

    def row(t: float, split: str) -> tuple[Cell, ...]:
        return (*training(t, split)[:7], verdicts[round(7 * t)])

    figure = draw_check(run(8, ("train", "test"), row))
    assert marks(strip(figure)) == {"o": 2, "d": 4, "s": 2, "v": 2, "^": 2, "*": 2}
    assert set(legend(figure)) == {"train", "test", *verdicts} - {""}
    assert [t.get_text() for t in strip(figure).get_yticklabels()] == ["train", "test"]
    (saddle,) = [line for line in strip(figure).get_lines() if line.get_marker() == "s"]
    np.testing.assert_array_equal(saddle.get_xdata(), [2, 2])
    np.testing.assert_array_equal(saddle.get_ydata(), [0, 1])


def test_values_that_are_not_finite_are_blank_and_counted() -> None:
    def row(t: float, split: str) -> tuple[Cell, ...]:
        if 0.3 < t < 0.55:
            return (NAN, NAN, None, None, None, None, None, "undecided")
        if t > 0.9:
            return (0.1, 0.01, NAN, NAN, 3.0, INF, None, "undecided")
        return training(t, split)

    figure = draw_check(run(11, ("train",), row))
    said = sentence(figure)
    assert "2 points of train: loss not finite (×)" in said
    assert "1 point of train: λₘᵢₙ not finite (×)" in said
    assert "λₘₐₓ" not in said.split("Verdicts")[0]
    (line,) = lines(panel(figure, "loss"))
    assert np.isnan(np.asarray(line.get_ydata(), dtype=np.float64)).sum() == 2
    assert len(bars(panel(figure, "largest"))) == 8
    assert "nan" not in " ".join(texts(figure)).replace("finite", "")


def test_a_gradient_norm_of_zero_has_no_logarithm() -> None:
    figure = draw_check(run(3, ("train",), lambda t, s: (1.0, 0.0, 1.0, 0, 2.0, 0, 1.0, "minimum")))
    assert "3 points of train: gradient norm not above 0 (×)" in sentence(figure)


@pytest.mark.parametrize("checkpoints", [1, 12])
def test_escape_shows_the_checkpoint_and_its_gain(checkpoints: int) -> None:
    drawn = run(checkpoints, escape=True)
    figure = draw_check(drawn)
    (axes,) = [a for a in figure.axes if a.get_xlabel().startswith("distance")]
    assert axes.get_xlabel() == "distance along the most negative curvature (λ = −0.12)"
    assert axes.get_title("left") == f"runs/{checkpoints - 1}.pt, test: saddle"
    rings = [line for line in axes.get_lines() if line.get_marker() == "o"]
    (start,) = [ring for ring in rings if len(np.asarray(ring.get_xdata()))]
    (lowest,) = [line for line in axes.get_lines() if line.get_marker() == "D"]
    assert (start.get_xdata(), start.get_ydata()) == ([0.0], [0.34])
    table = way_down()
    losses = table.floats("loss")
    at = losses.index(min(losses))
    assert (lowest.get_xdata(), lowest.get_ydata()) == (
        [table.floats("distance")[at]],
        [losses[at]],
    )
    assert f"the checkpoint  runs/{checkpoints - 1}.pt" in legend(figure)
    assert "lowest: 0.016 at distance −3, 0.324 below the checkpoint" in legend(figure)
    assert "± one standard error of each point" in legend(figure)
    # The losses are those of the second split.
    (curve,) = lines(axes)
    assert curve.get_linestyle() == "--"
    if checkpoints > 1:
        (ring,) = [
            a
            for a in panel(figure, "smallest").get_lines()
            if a.get_color() != "#0072B2" and a.get_marker() == "o"
        ]
        assert [*np.asarray(ring.get_xdata())] == [11]


@pytest.mark.parametrize(
    ("verdict", "eigenvalues", "escape"),
    sample(
        itertools.product(
            ["not critical", "saddle", "minimum", "undecided", ""], [0, 30], [True, False]
        ),
        0,
    ),
)
def test_verdict_is_in_the_title_and_only_a_saddle_has_its_sentence(
    verdict: str, eigenvalues: int, escape: bool
) -> None:
    drawn = run(
        1,
        ("train",),
        lambda t, s: (0.34, 0.185, -0.12, 0.01, 4.0, 0.1, None, verdict),
        escape=escape,
        eigenvalues=eigenvalues,
    )
    figure = draw_check(drawn)
    said = {"not critical": ": not critical (‖∇L‖ = 0.185)", "": ""}.get(verdict, f": {verdict}")
    assert figure.axes[0 if not escape else -1].get_title("left") == f"runs/0.pt, train{said}"
    assert legend(figure)[0] == f"train: {verdict}".removesuffix(": ")
    assert ("At a saddle the loss decreases" in sentence(figure)) == (verdict == "saddle")
    curve = "The curve is the loss along the eigenvector of λₘᵢₙ."
    assert (curve in sentence(figure)) == (escape and verdict != "saddle")


@pytest.mark.parametrize("checkpoints", [1, 9])
@pytest.mark.parametrize(("error", "visible"), [(0.0, False), (1e-4, False), (0.5, True)])
def test_note_on_error_bars_appears_if_they_are_visible(
    checkpoints: int, error: float, visible: bool
) -> None:
    def row(t: float, split: str) -> tuple[Cell, ...]:
        return (0.3, 1e-4, -1.0 - t, error, 4.0 - t, error, None, "saddle")

    said = sentence(draw_check(run(checkpoints, ("train",), row)))
    assert ("Each bar around λ contains an eigenvalue" in said) == visible


def test_the_gain_has_the_error_of_the_summary_where_it_is_of_that_point() -> None:
    drawn = run(1, escape=True)
    about = {"distance": -3.0, "gain_stderr": 0.0125}
    for distance, said in ((-3.0, "0.324 ± 0.013"), (2.0, "0.324"), (None, "0.324")):
        escape = {**about, "distance": distance}
        figure = draw_check(replace(drawn, summary={**drawn.summary, "escape": escape}))
        assert f"lowest: 0.016 at distance −3, {said} below the checkpoint" in legend(figure)


def test_a_narrow_title_keeps_the_name_and_the_verdict() -> None:
    drawn = run(
        2,
        ("train",),
        lambda t, s: (0.34, 0.185, -0.12, 0.01, 4.0, 0.1, None, "not critical"),
        escape=True,
    )
    named = replace(drawn, checkpoint_labels=["init", "final"])
    title = draw_check(named, Drawing(size="paper")).axes[-1].get_title("left")
    assert title == "final, train: not critical"


def test_an_escape_without_a_gain_has_a_note() -> None:
    drawn = run(1, escape=True)
    up = Table.build(
        ("distance", "loss", "loss_stderr"), [(d, 1.0 + d * d, 0.0) for d in (-1.0, 0.0, 1.0)]
    )
    summary = {**drawn.summary, "escape": {"eigenvalue": 0.5}}
    figure = draw_check(replace(drawn, more={"escape": up}, summary=summary))
    assert "Along this direction the loss never falls below that of the checkpoint." in sentence(
        figure
    )
    assert "gain" not in " ".join(legend(figure))
    assert "± one standard error of each point" not in legend(figure)
    assert figure.axes[-1].get_xlabel() == "distance along the smallest curvature (λ = 0.5)"
    nowhere = replace(drawn, more={"escape": up}, summary={**drawn.summary, "escape": None})
    assert draw_check(nowhere).axes[-1].get_xlabel().endswith("curvature")


def test_losses_have_a_logarithmic_axis_where_asked_for_or_far_apart() -> None:
    drawn = run(5, escape=True)
    assert [a.get_yscale() for a in draw_check(drawn).axes if "loss" in a.get_ylabel()] == [
        "linear"
    ] * 2
    logs = [
        a for a in draw_check(drawn, Drawing(log=True)).axes if a.get_ylabel().startswith("loss")
    ]
    assert [a.get_yscale() for a in logs] == ["log"] * 2
    assert all(a.get_ylabel().endswith("log scale") for a in logs)
    steep = Table.build(
        ("distance", "loss", "loss_stderr"), [(d, 10.0 ** (d + 1), 0.0) for d in (-1.0, 0.0, 4.0)]
    )
    figure = draw_check(replace(drawn, more={"escape": steep}))
    assert figure.axes[-1].get_yscale() == "log"


def test_one_checkpoint_has_a_row_per_split_and_a_note() -> None:
    figure = figure_of(1)
    (axes,) = figure.axes
    assert axes.get_title("left") == "runs/0.pt"
    assert [t.get_text() for t in axes.get_yticklabels()] == ["train", "test"]
    assert {"λₘₐₓ = 42.5 ± 0.2", "λₘᵢₙ = −0.0997 ± 0.06"} <= set(texts(figure))
    assert "train: loss 0.0355, gradient norm 7.09×10⁻⁴." in sentence(figure)
    assert set(legend(figure)) == {"train: minimum", "test: saddle"}
    zeros = [line for line in axes.get_lines() if [*np.asarray(line.get_xdata())] == [0, 0]]
    assert len(zeros) == 1


def test_shares_of_signs_are_reported_where_they_are_known() -> None:
    told = run(1, ("train",), lambda t, s: (*training(t, s)[:6], 0.875, "saddle"))
    # A table of an older version has the first share alone.
    assert "eigenvalues 87.5% positive." in sentence(draw_check(told))
    assert "positive" not in sentence(figure_of(1))
    columns, (row,) = told.table.columns, told.table.rows
    new = ("positive", "negative", "undecided", "trace", "trace_stderr")
    table = Table.build((*columns, *new), [(*row, 0.875, 0.1, 0.025, 3.0, 0.0)])
    figure = draw_check(replace(told, table=table))
    assert "eigenvalues 87.5% positive, 10% negative, 2.5% undecided." in sentence(figure)


def test_the_reason_for_no_decision_is_reported() -> None:
    told = run(1, ("train",), lambda t, s: (*training(t, s)[:7], "undecided"))
    points = {
        "train": {"points": [{"reason": "λ min may be zero: it is within its error of zero"}]}
    }
    figure = draw_check(replace(told, summary={**told.summary, "splits": points}))
    assert "Undecided on train: λ min may be zero: it is within its error" in sentence(figure)
    assert "Undecided" not in sentence(draw_check(told))


def test_spectrum_is_drawn_over_the_rank() -> None:
    figure = figure_of(1, ("train",), eigenvalues=30)
    axes = panel(figure, "eigenvalue λ of the Hessian")
    assert axes.get_yscale() == "symlog"
    assert axes.get_xlabel() == "rank of the computed eigenvalue"
    (dots,) = [line for line in axes.get_lines() if line.get_marker() == "o"]
    values = np.asarray(dots.get_ydata(), dtype=np.float64)
    assert len(values) == 30
    assert (np.diff(values) < 0).all()
    assert len(bars(axes)) == 30
    assert 0.0 in levels(axes)
    assert "λₘₐₓ = 42.5 ± 0.2" in sentence(figure)
    assert len(figure_of(1, escape=True, eigenvalues=5).axes) == 2


def test_eigenvalues_near_zero_keep_a_linear_axis() -> None:
    values = (
        [0.24 - 0.001 * k for k in range(90)]
        + [1e-12] * 500
        + [-0.1 - 0.001 * k for k in range(90)]
    )
    table = Table.build(
        ("checkpoint", "split", "eigenvalue", "error"), [("a", "train", v, 1e-6) for v in values]
    )
    figure = draw_check(replace(run(1, ("train",)), more={"spectrum": table}))
    assert panel(figure, "eigenvalue").get_yscale() == "linear"


NOTHING: tuple[Cell, ...] = (NAN, NAN, NAN, NAN, NAN, NAN, None, "undecided")
ODD = {
    "no rows": run(0),
    "two": run(2, ("train",)),
    "many": run(200, ("train", "test", "val", "other"), escape=True, learning_rate=1e-3),
    "nan": run(5, row=lambda t, s: NOTHING),
    "one, nan": run(1, row=lambda t, s: NOTHING, escape=True),
    "one, many eigenvalues": run(1, eigenvalues=400, escape=True),
    "one, one eigenvalue": run(1, ("train",), eigenvalues=1),
    "all zero": run(4, row=lambda t, s: (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, "undecided")),
    "one, all zero": run(1, row=lambda t, s: (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, "undecided")),
    "huge": run(6, row=lambda t, s: (1e300, 1e250, -1e150, 1e300, 1e150, INF, 1.0, "saddle")),
    "tiny": run(6, row=lambda t, s: (1e-30, 1e-99, -1e-99 * t, 1e-300, 1e-80, 0.0, 1.0, "saddle")),
    "negative": run(6, row=lambda t, s: (1.0, 1e-4, -9 - t, 0.1, -1 - t, 0.1, 0.0, "maximum")),
    "no summary": replace(run(6, escape=True), summary={}),
    "one, no summary": replace(run(1, escape=True, eigenvalues=3), summary={}),
    "empty tables": replace(
        run(1),
        more={
            "escape": Table.build(("distance", "loss", "loss_stderr"), ()),
            "spectrum": Table.build(("checkpoint", "split", "eigenvalue", "error"), ()),
        },
    ),
}
FOLDER = "Модель/" * 40
for count in (1, 7):
    ODD[f"odd names, {count}"] = replace(
        run(count, ("$x_1$\n\x1b[31m" + "long" * 30, "模型🙂"), escape=True, eigenvalues=count),
        summary={
            "loss": "\x07$l$" * 40,
            "tolerance": 1e-3,
            "escape": {"checkpoint": FOLDER + "$a$\n.pt", "split": "模型🙂", "eigenvalue": -1e-9},
        },
    )


# Of numbers that a logarithm makes something else of.
LOG = ("nan", "one, nan", "all zero", "huge", "tiny", "no rows")


@pytest.mark.usefixtures("laid_out")
@pytest.mark.filterwarnings("ignore:Glyph")  # measured here outside of render
@pytest.mark.parametrize(
    ("case", "log"),
    [
        *sample(((case, case in LOG) for case in ODD), 3, 8),
        *(pytest.param(case, case not in LOG, marks=pytest.mark.stress) for case in ODD),
    ],
)
def test_odd_tables_are_drawn(case: str, log: bool) -> None:
    figure = draw_check(ODD[case], Drawing(log=log, title="A title"))
    figure.draw_without_rendering()
    page, box = figure.bbox_inches, figure.get_tightbbox()
    assert box.x0 >= -0.01
    assert box.y0 >= -0.01
    assert box.x1 <= page.x1 + 0.01
    assert box.y1 <= page.y1 + 0.01
    for axes in figure.axes:
        for limits in (axes.get_xlim(), axes.get_ylim()):
            assert np.isfinite(limits).all()
            assert limits[0] != limits[1]
    assert not [c for text in texts(figure) for c in text.replace("\n", "") if c < " "]
    assert figure.legends or case == "no rows"


def test_a_table_without_rows_does_not_crash() -> None:
    assert "There are no points" in sentence(figure_of(0))


@pytest.mark.usefixtures("laid_out")
def test_panels_do_not_overlap() -> None:
    many = draw_check(ODD["many"], Drawing(title="A title"))
    for figure in (many, picture("check"), picture("check-one")):
        figure.draw_without_rendering()
        boxes = [axes.get_tightbbox() for axes in figure.axes]
        boxes += [legend.get_window_extent() for legend in figure.legends]
        for k, one in enumerate(boxes):
            for other in boxes[:k]:
                assert one is not None
                assert other is not None
                width = min(one.x1, other.x1) - max(one.x0, other.x0)
                height = min(one.y1, other.y1) - max(one.y0, other.y0)
                assert width <= 1 or height <= 1


def test_draw_draws_one_check_and_refuses_two() -> None:
    one = run(1)
    assert render(draw([one], Drawing(log=True)), ".png") == render(
        draw_check(one, Drawing(log=True)), ".png"
    )
    with pytest.raises(UsageError, match="checks cannot be overlaid"):
        draw([one, one])


def below(figure: Figure, label: str) -> list[Axes]:
    """The panels with a horizontal axis that is called so."""
    return [axes for axes in figure.axes if axes.get_xlabel().startswith(label)]


def test_the_density_of_one_checkpoint_is_drawn_on_all_splits_with_its_outliers() -> None:
    drawn = run(1, spectra=True)
    figure = draw_check(drawn)
    (axes,) = below(figure, "eigenvalue λ of the Gauss-Newton matrix")
    assert axes.get_yscale() == "log"
    curves = lines(axes)
    assert len(curves) == 2
    for curve, split in zip(curves, ("train", "test"), strict=True):
        rows = drawn.more["density"].where("split", split)
        y, expected = np.asarray(curve.get_ydata()), np.array(rows.floats("density"))
        np.testing.assert_array_equal(curve.get_xdata(), rows.floats("lambda"))
        seen = expected > axes.get_ylim()[0]
        np.testing.assert_array_equal(y[seen], expected[seen])
        assert np.all(y[~seen] < axes.get_ylim()[0])
    # A single eigenvalue of 5,000 is seen.
    assert axes.get_ylim()[0] < 0.1 / (5000 * 0.1 * math.sqrt(2 * math.pi))
    found = [line for line in axes.get_lines() if line.get_marker() == "v"]
    assert [sorted(np.asarray(line.get_xdata())) for line in found] == [[2, 6]] * 2
    assert "eigenvalue apart from the bulk" in legend(figure)
    assert "10 probes, 90 steps, Gaussians of width σ = 0.1" in sentence(figure)


def test_densities_of_several_checkpoints_have_a_panel_per_split() -> None:
    figure = figure_of(9, spectra=True)
    panels = below(figure, "eigenvalue λ of")
    assert [axes.get_title("left") for axes in panels] == ["train", "test"]
    for axes in panels:
        curves = [a for a in axes.get_lines() if len(np.asarray(a.get_xdata())) == 400]
        assert len({curve.get_color() for curve in curves}) == len(curves) == 6
    assert "Densities of 6 of the 9 checkpoints are drawn." in sentence(figure)
    assert "density of runs/0.pt" in legend(figure)
    assert "density of runs/8.pt" in legend(figure)


def test_a_density_without_the_json_is_drawn_without_marks() -> None:
    figure = draw_check(replace(run(1, spectra=True), summary={}))
    (axes,) = below(figure, "eigenvalue λ of the Hessian")
    assert len(lines(axes)) == 2
    assert not any(line.get_marker() == "v" and len(line.get_xdata()) for line in axes.get_lines())


def test_blocks_of_one_checkpoint_stand_in_their_order_with_their_errors() -> None:
    figure = figure_of(1, spectra=True)
    (first,) = below(figure, "gradient norm")
    names = [label.get_text() for label in first.get_yticklabels()]
    assert names == [f"layers.{b}" for b in range(5)]
    assert first.yaxis_inverted()
    (axes,) = below(figure, "trace")
    dots = [np.asarray(line.get_xdata()) for line in axes.get_lines() if line.get_marker() == "o"]
    np.testing.assert_array_equal(dots, [[2.0 * b - 3 for b in range(5)]] * 2)
    ends = [
        (float(s[0][0]), float(s[1][0]))
        for c in axes.collections
        if isinstance(c, LineCollection)
        for s in c.get_segments()
    ]
    np.testing.assert_allclose(ends, [(2.0 * b - 3.5, 2.0 * b - 2.5) for b in range(5)] * 2)


def test_blocks_of_several_checkpoints_are_lines_from_dark_to_light() -> None:
    figure = figure_of(9, spectra=True)
    (axes,) = [a for a in figure.axes if a.get_title("left").startswith("largest eigenvalue")]
    curves = [a for a in axes.get_lines() if len(np.asarray(a.get_xdata())) == 9]
    for b, curve in enumerate(curves):
        np.testing.assert_array_equal(curve.get_ydata(), [3.0 + b + k for k in range(9)])
    assert len({curve.get_color() for curve in curves}) == len(curves) == 5
    assert {f"layers.{b}" for b in range(5)} <= set(legend(figure))


def test_with_many_blocks_the_legend_names_some() -> None:
    drawn = run(3, ("train",), spectra=True)
    names = [str(name) for name in drawn.table.unique("checkpoint")]
    figure = draw_check(replace(drawn, more={"curvature": blocks(names, ["train"], 60)}))
    assert sum(label.startswith("layers.") for label in legend(figure)) == 16
    assert "The legend names 16 of the 60 blocks." in sentence(figure)
    one = draw_check(
        replace(run(1, ("train",)), more={"curvature": blocks(["runs/0.pt"], ["train"], 60)})
    )
    (axes,) = below(one, "gradient norm")
    assert len(axes.get_yticks()) == 40


@pytest.mark.parametrize("size", ["full", "paper"])
@pytest.mark.parametrize("eigenvalues", [0, 30])
def test_a_legend_has_only_marks_that_the_picture_has(eigenvalues: int, size: str) -> None:
    figure = draw_check(run(1, escape=True, eigenvalues=eigenvalues), Drawing(size=size))
    drawn = {line.get_marker() for axes in figure.axes for line in axes.get_lines()}
    handles = figure.legends[0].legend_handles
    shown = {handle.get_marker() for handle in handles if isinstance(handle, Line2D)}
    assert len(shown) > 1
    assert shown - drawn <= {"None", "", None}
