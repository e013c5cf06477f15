"""Figures against golden pictures, and what every figure must keep.

The golden pictures in ``golden/`` are drawn from the tables beside them. They are compared by
their pixels and with a tolerance, never by their bytes, and only under the minor version of
matplotlib that drew them: another one measures letters differently, which moves everything a
little. After a change of the look on purpose, draw them anew, and look at them before they are
committed::

    make golden
"""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import ConnectionPatch
from matplotlib.text import Text
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from losscli.errors import UsageError
from losscli.plotting.interpolation import draw_interpolation
from losscli.plotting.style import render, run_colours
from losscli.results.drawing import Drawing
from losscli.results.result import Run
from losscli.table import Table
from tests.cases import sample

GOLDEN = Path(__file__).parent / "golden"
NAN, INF = math.nan, math.inf


def stored(name: str, label: str = "") -> Run:
    """A run whose CSV and JSON are kept in the folder of golden pictures."""
    with (GOLDEN / f"{name}.csv").open(newline="", encoding="utf-8") as lines:
        table = Table.from_csv(lines, name)
    summary = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    return Run(table, summary, label)


def three() -> list[Run]:
    return [stored(f"three-{name}", name) for name in ("relu", "tanh", "sgd")]


def wavy(alpha: float, split: str) -> float:
    """A valley with ripples that only a closer look shows."""
    floor = 0.02 if split == "train" else 0.15
    ripple = 0.06 * math.sin(70 * alpha) * math.exp(-(((alpha - 0.3) / 0.12) ** 2))
    return floor + 2 * (alpha - 1) ** 2 * (1 + 0.2 * alpha) + ripple


def waves(alphas: Sequence[float], noise: float = 0.01) -> Table:
    rows = [(a, s, wavy(a, s), noise) for a in alphas for s in ("train", "test")]
    return Table.build(("alpha", "split", "loss", "loss_stderr"), rows)


def turns(table: Table, *, beyond: bool | None = True) -> dict[str, Any]:
    """What a summary says of local minima and maxima, all of them beyond noise or not."""
    splits: dict[str, Any] = {}
    for split in table.unique("split"):
        rows = table.where("split", split)
        found: dict[str, list[dict[str, Any]]] = {"local_minima": [], "local_maxima": []}
        points = list(zip(rows.floats("alpha"), rows.floats("loss"), strict=True))
        for (_, before), (alpha, loss), (_, after) in zip(
            points, points[1:], points[2:], strict=False
        ):
            about = {"alpha": alpha, "loss": loss, "beyond_noise": beyond}
            if loss < min(before, after):
                found["local_minima"].append({**about, "depth": before - loss})
            if loss > max(before, after):
                found["local_maxima"].append({**about, "height": loss - before})
        splits[str(split)] = found
    return splits


def zoom(low: float = 0.1, high: float = 0.5, *, beyond: bool | None = True) -> Run:
    """A part of a line, with the whole line beside it."""
    table = waves([low + (high - low) * k / 80 for k in range(81)])
    names = [{"name": "relu/init.pt"}, {"name": "relu/final.pt"}]
    summary = {"loss": "mse", "checkpoints": names, "splits": turns(table, beyond=beyond)}
    return Run(table, summary, more={"context": waves([k / 20 - 0.5 for k in range(51)])})


PICTURES: dict[str, Callable[[], Figure]] = {
    "zoom": lambda: draw_interpolation([zoom()]),
    "smooth": lambda: draw_interpolation([stored("smooth")]),
    "gaps": lambda: draw_interpolation(
        [stored("gaps")], Drawing(title="Where it breaks", log=True)
    ),
    "three": lambda: draw_interpolation(three(), Drawing(title="Three runs")),
}


def curve(
    points: list[tuple[float, float]] | None = None,
    stderr: float | None = 0.1,
    names: tuple[str, str] | None = None,
    **columns: list[float],
) -> Run:
    """A run of one split with these points of (alpha, loss)."""
    points = [(0.0, 2.0), (0.5, 1.0), (1.0, 0.5)] if points is None else points
    rows = [
        [alpha, "train", loss, stderr, *(values[k] for values in columns.values())]
        for k, (alpha, loss) in enumerate(points)
    ]
    table = Table.build(("alpha", "split", "loss", "loss_stderr", *columns), rows)
    summary: dict[str, Any] = {"loss": "mse", "checkpoints": [{"name": n} for n in names or ()]}
    return Run(table, summary)


def pixels(png: bytes) -> NDArray[np.float64]:
    """A picture at a quarter of its size, where the edges of letters no longer count."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    return np.asarray(picture.reduce(4), dtype=np.float64)


def difference(a: bytes, b: bytes) -> float:
    """The root mean square of the differences of two pictures, on the scale of 0…255."""
    one, other = pixels(a), pixels(b)
    return math.sqrt(np.mean((one - other) ** 2)) if one.shape == other.shape else INF


TOLERANCE = 3.0


def keep(png: bytes, path: Path) -> None:
    """Writes a golden picture: in 128 colours, to be small, and with the version that drew it."""
    version = PngInfo()
    version.add_text("Software", mpl.__version__)
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.quantize(128, dither=Image.Dither.NONE).save(path, pnginfo=version, optimize=True)


def texts(figure: Figure) -> list[str]:
    found = [artist.get_text() for artist in figure.findobj(Text) if isinstance(artist, Text)]
    return [text for text in found if text]


def note(figure: Figure) -> str:
    """The sentences below the panels, above the legend, without the last one on error bands."""
    found = "\n".join(box.get_title().get_text() for box in figure.legends[-1:])
    return found.partition("Differences between points")[0].rstrip("\n")


def runs(axes: Axes) -> list[Line2D]:
    """The lines of the runs, without the lines at A and B, dots and crosses."""
    return [
        line
        for line in axes.get_lines()
        if line.get_linestyle() != "None" and to_hex(line.get_color()) != "#9a9a9a"
    ]


def xs(line: Line2D) -> list[float]:
    return [float(x) for x in np.asarray(line.get_xdata(), dtype=np.float64)]


def ends(axes: Axes) -> list[float]:
    """Where there are lines at A and B."""
    lines = axes.get_lines()
    return [xs(line)[0] for line in lines if to_hex(line.get_color()) == "#9a9a9a"]


def marked(axes: Axes, marker: str) -> list[float]:
    lines = [line for line in axes.get_lines() if line.get_marker() == marker]
    return sorted({x for line in lines for x in xs(line)})


def legend(figure: Figure) -> list[str]:
    return [t.get_text() for t in figure.legends[0].get_texts() if t.get_text()]


def check_golden(name: str, figure: Figure) -> None:
    png = render(figure, ".png")
    golden = GOLDEN / f"{name}.png"
    if os.environ.get("LOSSCLI_REGENERATE_GOLDEN"):
        keep(png, golden)
    with Image.open(golden) as picture:
        version = picture.info["Software"]
    if mpl.__version__.split(".")[:2] != version.split(".")[:2]:
        pytest.skip(f"drawn by matplotlib {version}, not {mpl.__version__}")
    assert difference(png, golden.read_bytes()) < TOLERANCE


@pytest.mark.usefixtures("laid_out")
@pytest.mark.parametrize("name", sample(PICTURES, 2, 4))
def test_golden(name: str) -> None:
    check_golden(name, PICTURES[name]())


@pytest.mark.usefixtures("laid_out")
def test_golden_comparison_notices_another_curve() -> None:
    smooth = stored("smooth")
    at = smooth.table.columns.index("loss")
    higher = [y * 1.1 if k < 20 else y for k, y in enumerate(smooth.table.floats("loss"))]
    rows = [
        (*row[:at], y, *row[at + 1 :]) for row, y in zip(smooth.table.rows, higher, strict=True)
    ]
    changed = Run(Table.build(smooth.table.columns, rows), smooth.summary)
    png = render(draw_interpolation([changed]), ".png")
    assert difference(png, (GOLDEN / "smooth.png").read_bytes()) > TOLERANCE


@pytest.mark.usefixtures("laid_out")
def test_bytes_are_the_same_again() -> None:
    # A figure that was rendered before, and one drawn anew.
    used, fresh = draw_interpolation([curve()]), draw_interpolation([curve()])
    first = {suffix: render(used, suffix) for suffix in (".png", ".svg", ".pdf")}
    assert render(used, ".png") == first[".png"]
    for suffix in (".pdf", ".svg", ".png"):
        assert render(fresh, suffix) == first[suffix]
    assert first[".png"].startswith(b"\x89PNG")
    assert first[".svg"].startswith(b"<?xml")
    assert b"<dc:date>" not in first[".svg"]
    assert first[".pdf"].startswith(b"%PDF")
    assert b"CreationDate" not in first[".pdf"]


def test_suffixes() -> None:
    figure = draw_interpolation([curve()])
    assert render(figure, ".SVG").startswith(b"<?xml")
    for suffix in (".jpg", "", "png"):
        with pytest.raises(UsageError, match=r"\.png, \.svg or \.pdf"):
            render(figure, suffix)


PROBE = """
import sys
from hashlib import sha256
from losscli.plotting.interpolation import draw_interpolation
from losscli.plotting.style import render
from losscli.results.result import Run
from losscli.table import Table
with open(sys.argv[1], newline="") as lines:
    table = Table.from_csv(lines, "")
figure = draw_interpolation([Run(table, {})])
for suffix in (".png", ".svg"):
    print(sha256(render(figure, suffix)).hexdigest())
import matplotlib
print(matplotlib.rcParams["axes.facecolor"])
print("matplotlib.pyplot" in sys.modules)
"""


@pytest.mark.usefixtures("laid_out")
def test_a_figure_uses_neither_pyplot_nor_the_users_matplotlibrc(tmp_path: Path) -> None:
    settings = "axes.facecolor: red\nfont.size: 30\nsvg.fonttype: none\nsavefig.bbox: tight\n"
    settings += "text.parse_math: True\naxes.formatter.use_mathtext: True\nbackend: svg\n"
    (tmp_path / "matplotlibrc").write_text(settings)
    done = subprocess.run(
        [sys.executable, "-c", PROBE, GOLDEN / "smooth.csv"],
        env={**os.environ, "MATPLOTLIBRC": str(tmp_path / "matplotlibrc")},
        cwd=Path(__file__).parent.parent.parent,
        check=True,
        capture_output=True,
        text=True,
    )
    figure = draw_interpolation([Run(stored("smooth").table, {})])
    digests = [sha256(render(figure, suffix)).hexdigest() for suffix in (".png", ".svg")]
    assert done.stdout.split() == [*digests, "red", "False"]


def test_settings_of_the_caller_are_unchanged() -> None:
    before = dict(mpl.rcParams)
    render(draw_interpolation([curve()]), ".svg")
    assert dict(mpl.rcParams) == before


def test_losses_that_are_not_finite_are_gaps() -> None:
    points = [(0.0, 2.0), (0.25, NAN), (0.5, 1.0), (0.75, INF), (1.0, 0.5), (1.5, -INF)]
    figure = draw_interpolation([curve(points)])
    (line,) = runs(figure.axes[0])
    np.testing.assert_array_equal(line.get_ydata(), [2.0, NAN, 1.0, NAN, 0.5, NAN])
    low, high = figure.axes[0].get_ylim()
    assert 0 < low < 0.5
    assert 2 < high < 3
    assert marked(figure.axes[0], "x") == [0.25, 0.75, 1.5]
    assert note(figure) == "3 points of train: loss not finite (×)"
    one = draw_interpolation([curve([(0.0, 2.0), (0.5, NAN), (1.0, 0.5)])])
    assert note(one) == "1 point of train: loss not finite (×)"


def test_metrics_have_no_cross_where_the_loss_is_not_finite() -> None:
    points = [(0.0, 2.0), (0.25, NAN), (0.5, 1.0), (0.75, math.inf), (1.0, 0.5)]
    figure = draw_interpolation([curve(points, accuracy=[0.5, NAN, NAN, NAN, 0.9])])
    loss, accuracy = figure.axes
    assert marked(loss, "x") == [0.25, 0.75]
    assert marked(accuracy, "x") == [0.5]
    assert note(figure).splitlines() == [
        "2 points of train: loss not finite (×)",
        "1 point of train: accuracy not finite (×)",
    ]


def test_points_between_gaps_are_drawn_as_dots() -> None:
    points = [(k / 50, NAN if k % 2 else 1.0 + k) for k in range(51)]
    axes = draw_interpolation([curve(points)]).axes[0]
    assert marked(axes, "o") == [k / 50 for k in range(0, 51, 2)]
    bars = [c for c in axes.collections if isinstance(c, LineCollection)]
    assert sum(len(bar.get_segments()) for bar in bars) == 26


def test_nothing_is_clipped() -> None:
    points = [(-0.5, 5000.0), (0.0, 2.0), (0.5, 1.0), (1.0, 0.5), (2.0, -7000.0)]
    figure = draw_interpolation([curve(points)])
    low, high = figure.axes[0].get_ylim()
    assert low < -7000.1
    assert high > 5000.1
    assert note(figure) == "Between A and B the loss ranges from 0.5 to 2."
    assert note(draw_interpolation([curve()])) == ""


def test_the_lowest_loss_has_more_digits_on_a_flatter_curve() -> None:
    for low, high, said in ((2.3031, 2.351, "2.303"), (0.1234, 2.3, "0.123")):
        drawn = curve([(0.0, high), (0.5, low), (1.0, high)], stderr=None)
        assert f"lowest: {said} at α = 0.5" in legend(draw_interpolation([drawn]))


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (2.303, 2.308, "The loss varies by only 0.22%, from 2.303 to 2.308."),
        (-2.0001, -2.0, "The loss varies by only 0.005%, from −2.0001 to −2."),
        (1.0, 1.011, ""),
        (1.0, 1.0 + 1e-9, ""),
        (3.0, 3.0, ""),
    ],
)
def test_a_nearly_flat_curve_has_a_note(low: float, high: float, said: str) -> None:
    figure = draw_interpolation([curve([(0.0, high), (0.5, low), (1.0, high)], stderr=None)])
    assert note(figure) == said


def test_band_is_one_standard_error() -> None:
    figure = draw_interpolation([curve(stderr=0.25)])
    axes = figure.axes[0]
    (band,) = [c for c in axes.collections if isinstance(c, PolyCollection)]
    corners = {tuple(corner) for corner in np.asarray(band.get_paths()[0].vertices).tolist()}
    assert {(0.0, 2.25), (0.0, 1.75), (0.5, 1.25), (0.5, 0.75), (1.0, 0.75), (1.0, 0.25)} == corners
    assert axes.get_ylim()[0] < 0.25
    assert axes.get_ylim()[1] > 2.25
    label, paired = (
        "± one standard error of each point",
        "Differences between points are more precise",
    )
    assert label in legend(figure)
    assert paired in " ".join(texts(figure))
    small = draw_interpolation([curve(stderr=0.25)], Drawing(size="paper"))
    assert "± s.e." in legend(small)
    assert paired not in " ".join(texts(small))
    without = draw_interpolation([curve(stderr=None)])
    assert label not in legend(without)
    assert paired not in " ".join(texts(without))


def test_log_axis() -> None:
    points = [(0.0, 200.0), (0.25, 0.0), (0.5, -1.0), (0.75, NAN), (1.0, 0.5), (2.0, 3.0)]
    figure = draw_interpolation([curve(points, stderr=1.0)], Drawing(log=True))
    axes = figure.axes[0]
    assert axes.get_yscale() == "log"
    assert "log scale" in axes.get_ylabel()
    (line,) = runs(axes)
    np.testing.assert_array_equal(line.get_ydata(), [200.0, NAN, NAN, NAN, 0.5, 3.0])
    assert 0.1 < axes.get_ylim()[0] < 0.5
    assert axes.get_ylim()[1] > 201
    assert note(figure).splitlines() == [
        "1 point of train: loss not finite (×)",
        "2 points of train: loss not above 0 (×)",
    ]
    # The lowest loss of all is among those that are not drawn.
    assert marked(axes, "D") == []
    labels = [t.get_text() for t in axes.get_yticklabels()]
    assert {"1", "10", "100"} <= set(labels)
    assert not any("$" in label for label in labels)


def test_tick_labels_give_the_values_of_their_ticks() -> None:
    for points in (
        [(0.0, 2.3), (1.0, 2.3171)],
        [(0.0, 2.0e7), (1.0, -3.0e6)],
        [(0.0, 1e-12), (1.0, 3e-2)],
        [(0.9999, 1.0), (1.0001, 1.01)],
    ):
        for log in (False, points[1][1] > 0):
            axes = draw_interpolation([curve(points, stderr=0.0)], Drawing(log=log)).axes[0]
            for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
                locs = [x for x in axis.get_majorticklocs() if limits[0] <= x <= limits[1]]
                labels = axis.get_major_formatter().format_ticks(locs)
                assert len(locs) >= 2
                assert [number(label) for label in labels] == pytest.approx(
                    locs, rel=1e-9, abs=1e-30
                )


def number(label: str) -> float:
    """Reads a tick label."""
    mantissa, power, exponent = label.replace("−", "-").partition("10")
    if power and exponent and exponent[0] in "⁻⁰¹²³⁴⁵⁶⁷⁸⁹":
        digits = exponent.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))
        return float(f"{mantissa.rstrip('×') or 1}e{digits}".replace("-e", "-1e"))
    return float(label.replace("−", "-"))


@pytest.mark.usefixtures("laid_out")
def test_names_are_drawn_without_mathematics_and_control_characters() -> None:
    maths = r"$x_1$/\frac{1}{2}^%#&<b>"
    control = "line\nbreak\ttab\r\x1b[31m\x00\x07"
    evil = "evil\u202egnp.\u2066\ud800"
    letters = "Модель/λ/שלום/模型🙂"
    table = Table.build(
        ("alpha", "split", "loss", "loss_stderr", "$m_1$"),
        [(0.0, maths, 2.0, 0.1, NAN), (1.0, maths, 1.0, 0.1, 5.0), (1.0, control, NAN, 0.1, 5.0)],
    )
    summary = {"loss": maths, "checkpoints": [{"name": control}, {"name": evil}]}
    one = draw_interpolation([Run(table, summary)], Drawing(title=maths))
    other = draw_interpolation(
        [Run(table, {}, letters), Run(table, {}, evil)], Drawing(title=control)
    )
    for suffix in (".svg", ".pdf"):
        render(other, suffix)
    found = texts(one) + texts(other)
    assert {maths, "A  line break tab [31m", "B  evilgnp.", "$m_1$", letters, "evilgnp."} <= set(
        found
    )
    assert not [
        text for text in found for c in text if unicodedata.category(c)[0] == "C" and c != "\n"
    ]
    for artist in one.findobj(Text):
        assert not artist.get_parse_math()


def test_ends_are_marked_and_named() -> None:
    points = [
        (-0.5, 3.0),
        (0.0, 2.0),
        (0.5, 1.0),
        (1.0, 0.5),
        (1.5, 0.4),
        *[(2 + k, 1.0) for k in range(30)],
    ]
    named = curve(points, names=("init.pt", "final.pt"))
    figure = draw_interpolation([named])
    axes = figure.axes[0]
    assert ends(axes) == [0.0, 1.0]
    assert marked(axes, "o") == [0.0, 1.0]
    assert {"A  init.pt", "B  final.pt"} <= set(texts(figure))
    assert marked(axes, "D") == [1.5]
    assert "lowest: 0.4 at α = 1.5" in legend(figure)


def test_a_range_without_the_ends_is_not_stretched() -> None:
    zoom = curve([(0.02, 2.0), (0.04, 1.9), (0.06, 1.8)], names=("init.pt", "final.pt"))
    figure = draw_interpolation([zoom])
    low, high = figure.axes[0].get_xlim()
    assert 0.01 < low < 0.02
    assert 0.06 < high < 0.07
    assert ends(figure.axes[0]) == []
    assert {"← A  init.pt", "B  final.pt →"} <= set(texts(figure))


@pytest.mark.usefixtures("laid_out")
@pytest.mark.parametrize("span", [(0.0, 1.0), (-0.5, 2.0), (-20.0, 200.0), (2.0, 3.0), (0.9, 1.1)])
def test_long_names_fit(span: tuple[float, float]) -> None:
    folder = "runs/2024-05-01/a-folder-with-a-long-name/checkpoints/"
    points = [(span[0] + k * (span[1] - span[0]) / 4, 1.0 + k) for k in range(5)]
    figure = draw_interpolation([curve(points, names=(folder + "0.pt", folder + "last.pt"))])
    axes = figure.axes[0]
    a, b = (text for text in axes.texts if "/" in text.get_text())
    assert a.get_text().endswith(("/0.pt", "/0.pt →"))
    assert "…" in a.get_text()
    one, other, panel = (artist.get_window_extent() for artist in (a, b, axes))
    assert panel.x0 - 1 <= one.x0 < one.x1 < other.x0 < other.x1 <= panel.x1 + 1
    assert one.y0 > panel.y1


@pytest.mark.usefixtures("laid_out")
@pytest.mark.parametrize("number", [1, 12])
def test_everything_lies_in_the_picture_and_beside_the_curves(number: int) -> None:
    gaps = [(0.0, 200.0), (0.25, 0.0), (0.5, NAN), (1.0, 0.5)]
    folder = "runs/a-folder-with-a-long-name/checkpoints/"
    labelled = [replace(curve(gaps), label=f"{folder}{k}.pt") for k in range(number)]
    figure = draw_interpolation(labelled, Drawing(log=True))
    page, box = figure.bbox_inches, figure.get_tightbbox()
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= page.x1
    assert box.y1 <= page.y1
    panel = figure.axes[-1].get_tightbbox()
    assert panel is not None
    assert figure.legends[0].get_window_extent().y1 <= panel.y0
    assert "not finite" in note(figure)


def test_each_run_has_a_colour_and_each_split_a_line_style() -> None:
    figure = draw_interpolation(three())
    lines = runs(figure.axes[0])
    assert len(lines) == 6
    colours = [to_hex(line.get_color()) for line in lines]
    styles = [line.get_linestyle() for line in lines]
    assert colours[0::2] == colours[1::2]
    assert len(set(colours)) == 3
    assert styles == ["-", "--"] * 3
    assert legend(figure)[:5] == ["relu", "train (n = 1438)", "tanh", "test (n = 359)", "sgd"]
    assert {"A", "B"} <= set(texts(figure))
    # Ranges differ: the axis shows the widest.
    assert figure.axes[0].get_xlim()[0] < -0.5


def test_many_runs_keep_their_own_colours() -> None:
    figure = draw_interpolation([curve()] * 12)
    assert len({to_hex(line.get_color()) for line in runs(figure.axes[0])}) == 12
    assert legend(figure).count("run 12") == 1


def test_runs_without_a_label_are_called_by_their_checkpoints() -> None:
    figure = draw_interpolation([curve(names=("a.pt", "b.pt")), curve(names=("a.pt", "c.pt"))])
    assert {"a.pt → b.pt", "a.pt → c.pt"} <= set(legend(figure))


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (("one.csv", "two.csv", "c.csv"), ["(one.csv)", "(two.csv)"]),
        (("one.csv", "one.csv", "c.csv"), ["(run 1)", "(run 2)"]),
        (("", "two.csv", ""), ["(run 1)", "(two.csv)"]),
    ],
)
def test_runs_of_the_same_checkpoints_are_told_apart(
    sources: Sequence[str], names: list[str]
) -> None:
    ends = [("a.pt", "b.pt"), ("a.pt", "b.pt"), ("a.pt", "c.pt")]
    drawn = [replace(curve(names=e), source=s) for e, s in zip(ends, sources, strict=True)]
    found = [text for text in legend(draw_interpolation(drawn)) if text.startswith("a.pt")]
    assert found == [*(f"a.pt → b.pt {name}" for name in names), "a.pt → c.pt"]


def test_metrics_have_panels_of_their_own() -> None:
    run = curve(
        accuracy=[0.1, 0.5, 1.0],
        perplexity=[20.0, 3e6, INF],
        slope=[1.0, -2.0, 1.0],
        curvature=[1.0, 1.0, 1.0],
        examples=[5, 5, 5],
    )
    figure = draw_interpolation([run, curve()])
    loss, slope, _, accuracy, perplexity = figure.axes
    assert [axes.get_ylabel() for axes in figure.axes[1:]] == [
        "slope\ndL/dα",
        "curvature\nd²L/dα²",
        "accuracy",
        "perplexity\nlog scale",
    ]
    np.testing.assert_array_equal(runs(slope)[0].get_ydata(), [1.0, -2.0, 1.0])
    low, high = slope.get_ylim()
    assert low < -2 < 1 < high
    assert loss.get_xlim() == accuracy.get_xlim() == perplexity.get_xlim()
    assert {"0%", "50%", "100%"} <= {t.get_text() for t in accuracy.get_yticklabels()}
    assert perplexity.get_yscale() == "log"
    assert len(runs(accuracy)) == 1
    # The run without these columns does not count as missing.
    assert note(figure) == "1 point of run 1, train: perplexity not finite (×)"


@pytest.mark.parametrize(
    ("right", "examples", "least"),
    [
        # Ten times √(p(1 − p)/n).
        ((145, 142), 1438, 10 * math.sqrt(0.1008 * 0.8992 / 1438)),
        ((9900, 9897), 10_000, 0.02),
        ((90, 87), 100, 10 * math.sqrt(0.87 * 0.13 / 100)),
        ((3, 0), 4, 1.0),
        ((9900, 9700), None, 0.02),
    ],
)
def test_a_difference_of_a_few_examples_is_not_magnified(
    right: tuple[int, int], examples: int | None, least: float
) -> None:
    number = examples or 10_000
    run = curve([(0.0, 1.0), (1.0, 2.0)], accuracy=[k / number for k in right])
    summary = {"examples": {"train": examples}} if examples else {}
    _, axes = draw_interpolation([replace(run, summary=summary)]).axes
    low, high = axes.get_ylim()
    # 6 % of room on both sides.
    assert (high - low) / 1.12 == pytest.approx(least, rel=1e-3)
    assert low < right[1] / number < right[0] / number < high


def test_ends_of_later_runs_leave_those_of_earlier_ones_visible() -> None:
    for number in (1, 2, 3, 7):
        (axes,) = draw_interpolation([curve()] * number).axes
        colours = run_colours(number)
        sizes = {
            to_hex(line.get_color()): line.get_markersize()
            for line in axes.get_lines()
            if line.get_marker() == "o" and xs(line) == [0.0, 1.0]
        }
        assert [*sizes] == [to_hex(colour) for colour in colours]
        # Wider by more than the white edge.
        steps = -np.diff([sizes[to_hex(colour)] for colour in colours])
        assert (steps > 0.8).all()
        assert max(sizes.values()) < 14


def test_sampled_runs_do_not_claim_a_number_of_examples() -> None:
    sampled = curve(examples=[5, 7, 9])
    summary = {"examples": {"train": 9}}
    assert "train" in legend(draw_interpolation([Run(sampled.table, summary)]))
    assert "train (n = 9)" in legend(draw_interpolation([Run(curve().table, summary)]))


def test_numbers_of_examples_that_differ_are_in_a_note() -> None:
    def runs_of(*numbers: int | None) -> list[Run]:
        return [Run(curve().table, {"examples": {"train": n}} if n else {}) for n in numbers]

    figure = draw_interpolation(runs_of(8000, 2000, None, 2000))
    assert "Numbers of examples of train differ: 8000, 2000, 2000." in note(figure)
    many = draw_interpolation(runs_of(*range(1, 10)))
    assert "train differ: 1, 2, 3, 4, 5, 6 and 3 more." in note(many)
    assert "differ" not in note(draw_interpolation(runs_of(2000, 2000, None)))
    batches = Run(curve().table, {"batches": {"train": 12}})
    mixed = draw_interpolation([*runs_of(12), batches])
    assert "Numbers of examples of train differ: 12, 12 batches." in note(mixed)


def test_local_minima_and_maxima_are_marked_where_they_are_beyond_noise() -> None:
    figure = draw_interpolation([replace(zoom(), more={})])
    (axes,) = figure.axes
    about = turns(zoom().table)["train"]
    assert marked(axes, "v") == [turn["alpha"] for turn in about["local_minima"]]
    assert marked(axes, "^") == [turn["alpha"] for turn in about["local_maxima"]]
    assert len(marked(axes, "v")) == 2
    places = {
        (x, y)
        for line in axes.get_lines()
        if line.get_marker() == "v"
        for x, y in zip(xs(line), np.asarray(line.get_ydata()), strict=True)
    }
    assert places == {
        (turn["alpha"], turn["loss"])
        for split in turns(zoom().table).values()
        for turn in split["local_minima"]
    }
    assert {"local minimum", "local maximum"} <= set(legend(figure))
    assert note(figure) == ("Local minima and maxima are marked if significant (> 2 s.e.).")


def test_turns_within_noise_are_not_marked() -> None:
    table = zoom().table
    noisy, unknown, older = (turns(table, beyond=beyond) for beyond in (False, None, None))
    for split in older.values():
        for turn in split["local_minima"]:
            del turn["beyond_noise"]
        del split["local_maxima"]
    summaries: list[dict[str, Any]] = [{}, *({"splits": s} for s in ({}, noisy, unknown, older))]
    pictures = {
        render(draw_interpolation([Run(table, {"loss": "mse", **summary})]), ".png")
        for summary in summaries
    }
    assert len(pictures) == 1


def test_the_lowest_point_has_one_mark() -> None:
    run = curve([(k / 10, abs(k - 5) + 1.0) for k in range(11)])
    low = {"alpha": 0.5, "loss": 1.0, "depth": 5.0, "beyond_noise": True}
    summary = {"splits": {"train": {"local_minima": [low]}}}
    (axes,) = draw_interpolation([replace(run, summary=summary)]).axes
    assert marked(axes, "D") == [0.5]
    assert marked(axes, "v") == []


def test_only_the_most_prominent_are_marked() -> None:
    points = [(k / 80, (k % 2) * (1 + k) - k * 1e-3) for k in range(81)]
    minima = [
        {"alpha": x, "loss": y, "depth": 1.0 + 80 * x, "beyond_noise": True}
        for x, y in points[2:-2:2]
    ]
    run = replace(curve(points), summary={"splits": {"train": {"local_minima": minima}}})
    figure = draw_interpolation([run])
    assert marked(figure.axes[0], "v") == [k / 80 for k in range(56, 80, 2)]
    assert "(> 2 s.e.), the 12 most prominent of 39." in note(figure)


@pytest.mark.usefixtures("laid_out")
def test_a_part_is_shown_on_the_whole_line() -> None:
    figure = draw_interpolation([zoom()])
    whole, part = figure.axes
    assert whole.get_position().y0 > part.get_position().y1
    assert whole.get_xlim() == pytest.approx((-0.55, 2.05))
    assert [to_hex(line.get_color()) for line in runs(whole)] == [to_hex("#0072B2")] * 2
    assert [line.get_linestyle() for line in runs(whole)] == ["-", "--"]
    (shade,) = whole.patches
    box = shade.get_extents().transformed(whole.transData.inverted())
    assert (box.x0, box.x1) == pytest.approx(part.get_xlim())
    links = [a for a in figure.get_children() if isinstance(a, ConnectionPatch)]
    feet = [a.get_path().vertices[-1] for a in links]
    labels = [label.get_window_extent() for label in whole.get_xticklabels()]
    labels += [label.get_window_extent() for label in part.get_yticklabels()]
    assert not any(
        a.get_path().transformed(a.get_transform()).intersects_bbox(label, filled=False)
        for a in links
        for label in labels
    )
    corners = part.get_position()
    assert len(feet) == 2
    assert {"A  relu/init.pt", "B  relu/final.pt", "range of the panel below"} <= set(texts(figure))
    assert "loss on the\nwhole line" in texts(figure)
    np.testing.assert_allclose(feet, [(corners.x0, corners.y1), (corners.x1, corners.y1)])
    # The ends are where they are in view, and named once.
    assert ends(whole) == [0.0, 1.0]
    assert ends(part) == []


def test_a_part_reads_back_from_its_csv_as_the_same_picture() -> None:
    def read(table: Table) -> Table:
        return Table.from_csv(io.StringIO(table.to_csv(), newline=""), "x")

    drawn = zoom()
    again = replace(drawn, table=read(drawn.table), more={"context": read(drawn.more["context"])})
    one, other = draw_interpolation([drawn]), draw_interpolation([again])
    assert render(one, ".svg") == render(other, ".svg")


def test_the_whole_line_is_drawn_for_one_run_with_points() -> None:
    assert len(draw_interpolation([zoom(), zoom()]).axes) == 1
    nowhere = replace(zoom(), more={"context": waves([NAN, NAN])})
    assert len(draw_interpolation([nowhere]).axes) == 1
    assert len(draw_interpolation([replace(zoom(), more={})]).axes) == 1


def test_a_note_counts_the_gaps_of_the_whole_line() -> None:
    table = zoom().more["context"]
    rows = [(*row[:2], NAN if row[0] > 1.9 else row[2], row[3]) for row in table.rows]
    run = replace(zoom(), more={"context": Table.build(table.columns, rows)})
    said = " ".join(texts(draw_interpolation([run], Drawing(log=True)))).replace("\n", " ")
    assert "The whole line: 2 points of train and 2 points of test: loss not finite (×)" in said


ODD = {
    "nothing at all": [],
    "no rows": [Run(Table.build(("alpha", "split", "loss", "loss_stderr"), ()), {})],
    "all nan": [curve([(0.0, NAN), (1.0, NAN)], accuracy=[NAN, NAN])],
    "no alpha": [curve([(NAN, 1.0)])],
    "a point": [curve([(0.3, 1.5)])],
    "a point at zero": [curve([(0.0, 0.0)], stderr=None)],
    "level": [curve([(0.0, 0.7), (1.0, 0.7)], stderr=0.0, accuracy=[1.0, 1.0])],
    "rounding errors": [curve([(0.0, 0.7), (0.5, 0.7 + 1e-12), (1.0, 0.7)], stderr=0.0)],
    "huge": [curve([(0.0, 1e308), (0.5, -1e308), (1.0, 1e199)], stderr=1e308)],
    "log, huge and tiny": [curve([(0.0, 1e199), (0.5, 1e-199), (1.0, 5e-324)], stderr=1e199)],
    "log, level": [curve([(0.0, 0.7), (1.0, 0.7)], stderr=0.0)],
    "log, nothing above zero": [curve([(0.0, 0.0), (1.0, -1.0)])],
    "stderr inf": [curve([(0.0, 1.0), (1.0, 2.0)], stderr=INF)],
    "far off": [curve([(1e6, 1.0), (1e6 + 1, 2.0)])],
}


@pytest.mark.usefixtures("laid_out")
@pytest.mark.parametrize("case", sample(ODD, 1, 4))
def test_odd_tables_are_drawn(case: str) -> None:
    figure = draw_interpolation(ODD[case], Drawing(log=case.startswith("log")))
    figure.draw_without_rendering()
    for axes in figure.axes:
        for low, high in (axes.get_xlim(), axes.get_ylim()):
            assert math.isfinite(low)
            assert math.isfinite(high)
            assert low < high
    assert "loss" in figure.axes[0].get_ylabel()


def test_rounding_errors_do_not_fill_the_axis() -> None:
    low, high = draw_interpolation(ODD["rounding errors"]).axes[0].get_ylim()
    assert high - low > 0.05


def test_rows_out_of_order_are_drawn_in_the_order_of_alpha() -> None:
    figure = draw_interpolation([curve([(1.0, 0.5), (0.0, 2.0), (0.5, 1.0)])])
    assert xs(runs(figure.axes[0])[0]) == [0.0, 0.5, 1.0]
