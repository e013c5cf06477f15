"""The figure of barriers: what it shows, what it says, what it survives."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from numpy.typing import NDArray

from losscli.errors import UsageError
from losscli.plotting.barriers import draw_barriers
from losscli.plotting.style import render
from losscli.plotting.surface import Scale
from losscli.results.drawing import Drawing
from losscli.results.result import Run, draw
from losscli.table import Table
from tests.cases import sample
from tests.plotting.test_interpolation import check_golden, legend, texts

NAN, INF = math.nan, math.inf
COLUMNS = (
    *("a", "b", "split", "distance", "barrier", "barrier_stderr", "alpha"),
    *("loss_a", "loss_b"),
)


def hill(i: int, j: int, split: str) -> float:
    """Three families, with hills between them and hardly any within."""
    if i % 3 == j % 3:
        return 0.0 if (i + j) % 4 else 0.02 * (i + j)
    return (0.6 + 0.31 * ((7 * i + 3 * j) % 5)) * (1.2 if split == "test" else 1.0)


def run(
    names: Sequence[str],
    height: Callable[[int, int, str], float] = hill,
    splits: Sequence[str] = ("train",),
) -> Run:
    rows = [
        (names[i], names[j], s, 3.0 + i + j, height(i, j, s), 0.01, 0.5, 0.1, 0.2)
        for i, j in itertools.combinations(range(len(names)), 2)
        for s in splits
    ]
    summary = {
        "loss": "cross_entropy",
        "checkpoints": [{"name": name} for name in names],
        "examples": dict.fromkeys(splits, 640),
        "alphas": [k / 10 for k in range(11)],
    }
    return Run(Table.build(COLUMNS, rows), summary)


def seeds(number: int) -> list[str]:
    return [f"runs/seed-{k}/final.pt" for k in range(number)]


def broken(i: int, j: int, split: str) -> float:
    return NAN if 2 in {i, j} or (split == "test" and {i, j} == {0, 4}) else hill(i, j, split)


PICTURES: dict[str, Callable[[], Figure]] = {
    "barriers": lambda: draw_barriers(run(seeds(5), broken, ("train", "test"))),
    "barriers-many": lambda: draw_barriers(run(seeds(40)), Drawing(title="Forty seeds", log=True)),
}


@pytest.mark.usefixtures("laid_out")
@pytest.mark.parametrize("name", sample(PICTURES, 0, 2))
def test_golden(name: str) -> None:
    check_golden(name, PICTURES[name]())


def panels(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.get_images()]


def colours(axes: Axes) -> NDArray[np.float64]:
    (image,) = axes.get_images()
    return np.asarray(image.get_array())[..., :3]


def cells(axes: Axes) -> dict[tuple[int, int], str]:
    found = {}
    for text in axes.texts:
        x, y = text.get_position()
        if float(x).is_integer() and float(y).is_integer():
            found[int(y), int(x)] = text.get_text()
    return found


def ticks(axes: Axes, way: str) -> list[str]:
    labels = axes.get_xticklabels() if way == "x" else axes.get_yticklabels()
    return [label.get_text() for label in labels]


def sentence(figure: Figure) -> str:
    return " ".join(line for text in texts(figure) for line in text.split("\n"))


def test_picture_from_the_csv_is_the_same() -> None:
    drawn = run(seeds(3), broken)
    table = Table.from_csv(io.StringIO(drawn.table.to_csv(), newline=""), "x")
    again = draw_barriers(replace(drawn, table=table))
    assert render(draw_barriers(drawn), ".svg") == render(again, ".svg")


def test_cells_are_symmetric_and_of_one_scale() -> None:
    # What is alike on both splits has one colour on both.
    figure = draw_barriers(run(seeds(5), lambda i, j, s: 0.1 * (i + j), ("train", "test")))
    one, other = map(colours, panels(figure))
    np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(one, one.transpose(1, 0, 2))
    taller = draw_barriers(
        run(seeds(5), lambda i, j, s: 0.1 * (i + j) * (2 if s == "test" else 1), ("train", "test"))
    )
    one, other = map(colours, panels(taller))
    assert (one[1:, 0] != other[1:, 0]).any(axis=-1).all()
    # 0.1 · 4 on the one, 0.2 · 2 on the other.
    np.testing.assert_array_equal(one[1, 3], other[0, 2])


@pytest.mark.parametrize(("number", "size"), sample([(4, "paper"), (6, "8x3"), (12, "paper")], 2))
def test_numbers_stay_in_their_cells(number: int, size: str) -> None:
    figure = draw_barriers(
        run(seeds(number), lambda i, j, s: 1.234e-5 * (i + j), ("train", "test")),
        Drawing(size=size),
    )
    figure.canvas.draw()
    for panel in panels(figure):
        room = panel.get_window_extent().width / number
        assert panel.texts
        for text in panel.texts:
            assert text.get_window_extent().width <= room


def test_low_barriers_are_dark_as_low_losses_on_a_surface() -> None:
    figure = draw_barriers(run(seeds(8), lambda i, j, s: 0.05 * (i + 8 * j)))
    found = colours(panels(figure)[0]) @ np.array([0.21, 0.72, 0.07])
    pairs = sorted(itertools.combinations(range(8), 2), key=lambda p: p[0] + 8 * p[1])
    light = [found[pair] for pair in pairs]
    assert light == sorted(light)
    assert light[-1] - light[0] > 0.5
    bar = next(axes for axes in figure.axes if axes.get_label() == "<colorbar>")
    scale = Scale(log=False, low=0.0, high=0.05 * (6 + 8 * 7), lines=())
    for (i, j), height in {(6, 7): scale.high, (0, 1): 0.05 * 8}.items():
        on_a_surface = scale.colours(np.array([height]))[0, :3]
        np.testing.assert_allclose(colours(panels(figure)[0])[i, j], on_a_surface, atol=1e-6)
    assert bar.get_ylim() == (0.0, scale.high)


def test_zero_is_darker_than_any_barrier_with_a_note() -> None:
    def height(i: int, j: int, split: str) -> float:
        return {1: 0.0, 2: 1e-9}.get(i + j, 1.0)

    for log in (False, True):
        figure = draw_barriers(run(seeds(4), height), Drawing(log=log))
        (panel,) = panels(figure)
        found = colours(panel)
        assert found[0, 1].tolist() == found[1, 0].tolist()
        # Even if the barrier is very low.
        assert found[0, 1].sum() < 0.6 * found[0, 2].sum()
        assert np.diagonal(found).max() < 1
        assert cells(panel)[0, 1] == "0"
        assert "0: never above the straight line between the two losses" in legend(figure)
    assert not legend(draw_barriers(run(seeds(4), lambda i, j, s: 1.0)))


def test_unknown_barriers_are_hatched() -> None:
    figure = draw_barriers(run(seeds(5), broken, ("train", "test")))
    assert "unknown: a loss on the line is not finite" in legend(figure)
    for panel, number in zip(panels(figure), (8, 10), strict=True):
        (hatched,) = [p for p in panel.patches if isinstance(p, PathPatch)]
        assert hatched.get_hatch()
        corners = hatched.get_path().vertices.reshape(-1, 5, 2)
        area = np.ptp(corners[..., 0], axis=1) * np.ptp(corners[..., 1], axis=1)
        assert area.sum() == number
        assert len(cells(panel)) == 5 * 4 - number
        assert (2, 0) not in cells(panel)
    assert not list(panels(draw_barriers(run(seeds(5))))[0].patches)


def test_a_small_matrix_has_numbers_in_its_cells() -> None:
    few = draw_barriers(run(seeds(12), lambda i, j, s: 0.1234 * (i + j)))
    assert len(cells(panels(few)[0])) == 12 * 11
    assert cells(panels(few)[0])[0, 1] == "0.12"
    many = draw_barriers(run(seeds(13)))
    assert not cells(panels(many)[0])
    wide = draw_barriers(run(seeds(3), lambda i, j, s: 0.1234 * (i + j)))
    assert cells(panels(wide)[0])[0, 1] == "0.123"


def contrast(one: Sequence[float], other: Sequence[float]) -> float:
    """The contrast ratio of two colours by WCAG 2."""

    def luminance(colour: Sequence[float]) -> float:
        red, green, blue = (
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_numbers_are_legible_on_every_colour() -> None:
    number = 12
    (panel,) = panels(draw_barriers(run(seeds(number), lambda i, j, s: i + j / number)))
    background = colours(panel)
    assert len(panel.texts) == number * (number - 1)
    for text in panel.texts:
        x, y = (int(v) for v in text.get_position())
        assert contrast(to_rgb(text.get_color()), background[y, x].tolist()) > 4.5


@pytest.mark.usefixtures("laid_out")
@pytest.mark.parametrize("number", [3, pytest.param(12, marks=pytest.mark.stress)])
def test_numbers_stay_inside_their_cells(number: int) -> None:
    figure = draw_barriers(run(seeds(number), lambda i, j, s: 0.00123 * (i + j), ("train", "test")))
    figure.draw_without_rendering()
    for panel in panels(figure):
        side = panel.get_window_extent().width / number
        widths = [t.get_window_extent().width for t in panel.texts if t.get_text()[:1] == "0"]
        assert widths
        assert max(widths) < side
        assert min(t.get_fontsize() for t in panel.texts) > 5.5  # type: ignore[operator]


@pytest.mark.parametrize(
    ("names", "labels", "shared"),
    [
        (seeds(3), ["seed-0", "seed-1", "seed-2"], "Checkpoints runs/*/final.pt"),
        (["p/step-9.pt", "p/step-10.pt"], ["step-9", "step-10"], "Checkpoints p/*.pt"),
        (["a.pt", "b.safetensors"], ["a.pt", "b.safetensors"], ""),
        (["a/x.pt", "a/b/x.pt"], ["x", "b/x"], "Checkpoints a/*.pt"),
        (["init:0", "runs/a.pt"], ["init:0", "runs/a.pt"], ""),
        (["r/x", "r/x.pt"], ["x", "x.pt"], "Checkpoints r/*"),
        (["../a/f", "../b/f"], ["a", "b"], "Checkpoints ../*/f"),
    ],
)
def test_labels_are_the_parts_of_names_that_differ(
    names: list[str], labels: list[str], shared: str
) -> None:
    figure = draw_barriers(run(names, lambda i, j, s: 0.5))
    (panel,) = panels(figure)
    assert ticks(panel, "x") == ticks(panel, "y") == labels
    assert ("Checkpoints" in sentence(figure)) == bool(shared)
    assert shared in sentence(figure)


def test_long_names_that_end_alike_are_numbered() -> None:
    names = [f"{letter}{'-long' * 40}" for letter in "xyz"]
    (panel,) = panels(draw_barriers(run(names)))
    assert ticks(panel, "x") == ["1", "2", "3"]
    assert [label[-2:] for label in ticks(panel, "y")] == [" 1", " 2", " 3"]


@pytest.mark.parametrize("number", sample([2, 5, 12, 40], 1, 3))
def test_columns_are_numbered_where_names_do_not_fit(number: int) -> None:
    for name in ("seed-{}", "large-model-seed-{}", "seed-{}-large-model"):
        (panel,) = panels(draw_barriers(run([name.format(k) for k in range(number)])))
        assert all(label.get_rotation() == 0 for label in panel.get_xticklabels())
        columns, rows = ticks(panel, "x"), ticks(panel, "y")
        assert len(rows) == number
        if columns != rows:
            numbers = [int(column) for column in columns]
            # Those in the names where they end in them, else 1, 2, …
            start = int(name.endswith("model"))
            assert numbers == [*range(start, number + start)][:: numbers[1] - numbers[0]]
            assert all(row.endswith(f"  {k}") for k, row in enumerate(rows, start=1)) == start


@pytest.mark.usefixtures("laid_out")
def test_long_lists_are_thinned() -> None:
    figure = draw_barriers(run(seeds(100)))
    figure.draw_without_rendering()
    (panel,) = panels(figure)
    found = ticks(panel, "y")
    assert 10 < len(found) < 60
    assert found[0] == "seed-0"
    assert ticks(panel, "x")[:1] == ["0"]
    boxes = [label.get_window_extent() for label in panel.get_yticklabels()]
    assert all(up.y0 >= down.y1 for up, down in itertools.pairwise(boxes))
    boxes = [label.get_window_extent() for label in panel.get_xticklabels()]
    assert all(left.x1 <= right.x0 for left, right in itertools.pairwise(boxes))


def test_the_label_names_a_logarithmic_scale() -> None:
    drawn = run(seeds(4), lambda i, j, s: 10.0 ** -(i + j))
    even, log = (draw_barriers(drawn, Drawing(log=log)).axes[-1] for log in (False, True))
    assert even.get_ylabel() == "barrier (cross_entropy)"
    assert log.get_ylabel() == "barrier (cross_entropy), log scale"
    assert even.get_ylim()[0] == 0
    assert log.get_yscale() == "log"


def test_two_matrices_cannot_be_laid_over_each_other() -> None:
    with pytest.raises(UsageError, match="cannot be overlaid"):
        draw([run(seeds(3))] * 2)
    assert panels(draw([run(seeds(3))]))


def test_the_number_of_points_is_reported() -> None:
    figure = draw_barriers(run(seeds(3)))
    assert "at 11 points from α = 0 to 1" in sentence(figure)
    assert "points from" not in sentence(draw_barriers(replace(run(seeds(3)), summary={})))


ODD = {
    "no rows": run([]),
    "two": run(["a", "b"]),
    "nothing known": run(seeds(3), lambda i, j, s: NAN),
    "no hills": run(seeds(3), lambda i, j, s: 0.0),
    "all the same": run(seeds(3), lambda i, j, s: 0.7),
    "huge": run(seeds(3), lambda i, j, s: 1e30 * (i + j)),
    "tiny": run(seeds(3), lambda i, j, s: 1e-30 * (i + j)),
    "huge and tiny": run(seeds(3), lambda i, j, s: 10.0 ** (40 * (i + j) - 60)),
    "too large": run(seeds(3), lambda i, j, s: 1e300 if i else 1.0),
    "inf": run(seeds(3), lambda i, j, s: INF if i else 1.0),
    "many splits": run(seeds(3), splits=tuple("abcde")),
    "many": run(seeds(70), broken),
    "odd names": run(["$x_1$\n\x1b[31m", "Модель/" * 60 + "$a$", "模型🙂"], splits=("$x$\x07",)),
    "no summary": replace(run(seeds(3)), summary={}),
}


# Of numbers that a logarithm makes something else of.
LOG = ("nothing known", "no hills", "all the same", "huge and tiny", "too large")


@pytest.mark.usefixtures("laid_out")
@pytest.mark.filterwarnings("ignore:Glyph")  # measured here outside of render
@pytest.mark.parametrize(
    ("case", "log"),
    [
        *sample(((case, case in LOG) for case in ODD), 4, 8),
        *(pytest.param(case, False, marks=pytest.mark.stress) for case in LOG),
    ],
)
def test_odd_tables_are_drawn(case: str, log: bool) -> None:
    figure = draw_barriers(ODD[case], Drawing(log=log))
    figure.draw_without_rendering()
    page, box = figure.bbox_inches, figure.get_tightbbox()
    assert box.x0 >= -0.01
    assert box.y0 >= -0.01
    assert box.x1 <= page.x1 + 0.01
    assert box.y1 <= page.y1 + 0.01
    assert not [line for text in texts(figure) for line in text if line < " " and line != "\n"]
