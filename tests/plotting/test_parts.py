"""The figures of parts of a network: blocks that move alone, and tensors one by one."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from losscli.errors import UsageError
from losscli.plotting.inspection import draw_inspection
from losscli.plotting.layerwise import block_colours, draw_layerwise
from losscli.plotting.style import render
from losscli.results.drawing import Drawing
from losscli.results.result import Run, draw
from losscli.table import Cell, Table
from tests.cases import sample
from tests.plotting.test_interpolation import check_golden, ends, legend, marked, note, runs, texts

NAN, INF = math.nan, math.inf
INK = "#262626"


def layered(
    names: Sequence[str], splits: Sequence[str] = ("train",), spoilt: Sequence[str] = ()
) -> Run:
    """A line with a hill, and blocks that bend away from it."""
    alphas = [k / 20 - 0.5 for k in range(41)]

    def whole(alpha: float, split: str) -> float:
        floor = 0.1 if split == "train" else 0.3
        hill = 0.25 * math.exp(-(((alpha - 0.45) / 0.2) ** 2))
        return floor + 2.2 * (1 - alpha) ** 2 * math.exp(-0.6 * alpha) + hill

    def alone(name: str, k: int, alpha: float, split: str) -> float:
        if name in spoilt and alpha > 1:
            return NAN
        slope = math.sin(1.3 * k) * 0.6 - 0.35
        return whole(0, split) + slope * alpha + (0.35 + 0.3 * math.cos(2.1 * k)) * alpha**2

    columns = ("alpha", "split", "loss", "loss_stderr")
    rows = [(a, s, whole(a, s), 0.03) for a in alphas for s in splits]
    blocks = [
        (name, a, s, alone(name, k, a, s), 0.02)
        for k, name in enumerate(names)
        for a in alphas
        for s in splits
    ]
    summary = {
        "loss": "causal_lm",
        "checkpoints": [{"name": "gpt2"}, {"name": "runs/tuned/checkpoint-3000"}],
        "examples": dict.fromkeys(splits, 512),
        "splits": {},
    }
    more = {"blocks": Table.build(("block", *columns), blocks)}
    return Run(Table.build(columns, rows), summary, more=more)


def layers(number: int) -> list[str]:
    return ["wte", "wpe", *(f"h.{k}" for k in range(number - 3)), "ln_f"]


def moved(
    tensors: Sequence[tuple[str, int, float, float]],
    wrong: int = 0,
    whole_numbers: int = 0,
) -> Run:
    """What inspect tells of two checkpoints: names, sizes, norms and distances."""
    columns = ("tensor", "shape", "dtype", "values", "norm", "norm_b", "distance", "cosine")
    rows: list[Sequence[Cell]] = [
        (name, "", "float32", values, norm, norm, distance, 0.5)
        for name, values, norm, distance in tensors
    ]
    rows += [(f"count{k}", "", "int64", 1, 2.0, 7.0, 5.0, 1.0) for k in range(whole_numbers)]
    names = [{"name": "runs/init.safetensors"}, {"name": "runs/final.safetensors"}]
    summary = {"checkpoints": names, "mismatches": ["missing head.bias [10]"] * wrong}
    return Run(Table.build(columns, rows), summary)


def held(tensors: Sequence[tuple[str, int, float]]) -> Run:
    """What inspect tells of one checkpoint."""
    columns = ("tensor", "shape", "dtype", "values", "norm")
    rows = [(name, "", "bfloat16", values, norm) for name, values, norm in tensors]
    return Run(Table.build(columns, rows), {"checkpoints": [{"name": "a.pt"}]})


def transformer(layers: int) -> list[tuple[str, int, float, float]]:
    """The tensors of a deep network, farther and farther from where they were."""
    found = [("embed.weight", 800, 20.0, 0.9)]
    for k in range(layers):
        for part, values in (
            ("attn.qkv", 192),
            ("attn.out", 64),
            ("mlp.up", 256),
            ("mlp.down", 256),
        ):
            for word in ("weight", "bias"):
                size = math.sqrt(values) * (1.0 if word == "weight" else 0.1)
                found.append((f"h.{k}.{part}.{word}", values, size, size * 0.04 * 1.25**k))
        found.append((f"h.{k}.norm.weight", 8, 3.0, 0.01 * 1.3**k))
    return [*found, ("head.bias", 10, 0.0, 0.4), ("head.weight", 80, 3.0, 2.0)]


PICTURES: dict[str, Callable[[], Figure]] = {
    "layerwise": lambda: draw_layerwise(layered(layers(8), ("train", "test"))),
    "layerwise-many": lambda: draw_layerwise(
        layered(layers(41)), Drawing(title="Forty-one blocks")
    ),
    "moved": lambda: draw_inspection(moved(transformer(2), wrong=1, whole_numbers=2)),
    "moved-far": lambda: draw_inspection(moved(transformer(12))),
    "held": lambda: draw_inspection(held([(n, v, x) for n, v, x, _ in transformer(2)])),
}


@pytest.mark.usefixtures("laid_out")
@pytest.mark.parametrize("name", sample(PICTURES, 0, 4))
def test_golden(name: str) -> None:
    check_golden(name, PICTURES[name]())


# --- Blocks --------------------------------------------------------------------------------------


def names_in_legend(figure: Figure) -> list[str]:
    """The legend beside the panels."""
    return [t.get_text() for t in figure.legends[0].get_texts()]


@pytest.mark.usefixtures("laid_out")
def test_a_panel_shows_the_whole_and_every_block_of_a_split() -> None:
    run = layered(["one", "two", "three"], ("train", "test"))
    figure = draw_layerwise(run)
    assert len(figure.axes) == 2
    for axes, split in zip(figure.axes, ("train", "test"), strict=True):
        *blocks, whole = runs(axes)
        table = run.more["blocks"].where("split", split)
        for name, line in zip(("one", "two", "three"), blocks, strict=True):
            rows = table.where("block", name)
            np.testing.assert_array_equal(line.get_xdata(), rows.floats("alpha"))
            np.testing.assert_array_equal(line.get_ydata(), rows.floats("loss"))
        rows = run.table.where("split", split)
        np.testing.assert_array_equal(whole.get_ydata(), rows.floats("loss"))
        assert to_hex(whole.get_color()) == INK
        assert whole.get_linewidth() > max(line.get_linewidth() for line in blocks)
        assert ends(axes) == [0.0, 1.0]
        assert split in axes.get_ylabel()
        assert len(marked(axes, "D")) == 1
    assert names_in_legend(figure) == ["all blocks together", "one", "two", "three"]
    assert {"A  gpt2", "B  runs/tuned/checkpoint-3000"} <= set(texts(figure))
    # A legend that covered a curve would be in a panel.
    assert all(axes.get_legend() is None for axes in figure.axes)
    right = max(axes.get_window_extent().x1 for axes in figure.axes)
    assert figure.legends[0].get_window_extent().x0 > right


def test_the_dots_of_the_whole_do_not_hide_those_of_blocks() -> None:
    (axes,) = draw_layerwise(layered(["one", "two", "three"])).axes
    sizes = [
        line.get_markersize()
        for line in axes.get_lines()
        if line.get_marker() == "o" and [*np.asarray(line.get_xdata())] == [0.0, 1.0]
    ]
    assert len(sizes) == 4
    assert (np.diff(sizes) < -0.8).all()


def lightness(colour: str) -> float:
    red, green, blue = (int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5))
    return 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2


def test_blocks_have_colours_in_their_order_and_neighbours_other_dashes() -> None:
    for number in (2, 7, 16, 60):
        light = [lightness(colour) for colour in block_colours(number)]
        assert light == sorted(light)
        assert len(set(light)) == number
        # On white the last can be seen too.
        assert light[-1] < 0.6
    few = runs(draw_layerwise(layered(layers(5))).axes[0])[:-1]
    assert {line.get_linestyle() for line in few} == {"-"}
    some = runs(draw_layerwise(layered(layers(16))).axes[0])[:-1]
    styles = [str(line._dash_pattern) for line in some]  # type: ignore[attr-defined]
    assert all(len(set(styles[k : k + 3])) == 3 for k in range(14))


@pytest.mark.usefixtures("laid_out")
def test_with_very_many_blocks_the_legend_names_some() -> None:
    few = draw_layerwise(layered(layers(16)))
    assert len(names_in_legend(few)) == 17
    assert note(few) == "Single blocks are drawn without standard errors."
    figure = draw_layerwise(layered(layers(60)))
    named = names_in_legend(figure)
    assert (len(named), named[1], named[-1]) == (17, "wte", "ln_f")
    assert (
        note(figure)
        .splitlines()[0]
        .startswith("60 blocks from dark to light in the order of the model; the legend names 16")
    )
    assert len(runs(figure.axes[0])) == 61
    # The legend is no higher than the figure.
    box = figure.legends[0].get_window_extent()
    assert box.y0 >= 0
    assert box.y1 <= figure.bbox.height


def test_gaps_of_many_blocks_are_counted_together() -> None:
    one = draw_layerwise(layered(["a", "b"], spoilt=["a"]))
    assert note(one) == "10 points of a alone, train: loss not finite (×)"
    many = draw_layerwise(layered(layers(9), spoilt=layers(9)[:6]))
    assert note(many).startswith("60 points of 6 curves: loss not finite (×)\nSingle")


def test_curves_without_a_value_at_one_place_have_a_cross_each() -> None:
    run = layered(["a", "b", "c"], spoilt=["a", "c"])
    axes = draw_layerwise(replace(run, table=run.more["blocks"].where("block", "a"))).axes[0]
    crosses = [line for line in axes.lines if line.get_marker() == "x" and len(line.get_xdata())]  # type: ignore[arg-type]
    first, _, last = block_colours(3)
    assert [to_hex(line.get_color()) for line in crosses] == [first, last, INK]
    heights = [set(np.asarray(line.get_ydata())) for line in crosses]
    assert [len(here) for here in heights] == [1, 1, 1]
    assert len(set.union(*heights)) == 3


def test_with_many_blocks_only_the_whole_has_a_band() -> None:
    def bands(number: int) -> list[str]:
        (axes,) = draw_layerwise(layered(layers(number))).axes
        return [to_hex(c.get_facecolor()[0]) for c in axes.collections if c.get_paths()]  # type: ignore[index]

    assert bands(8) == [*block_colours(8), INK]
    assert bands(9) == [INK]


def test_the_legend_says_that_the_lowest_point_is_of_all_blocks() -> None:
    for splits, told in ((("train",), "lowest, all blocks together: 0"), (("a", "b", "c"), "")):
        marks = [
            t.get_text() for t in draw_layerwise(layered(["x"], splits)).legends[1].get_texts()
        ]
        assert marks[0] == "± one standard error of each point"
        assert marks[1].startswith(told or "lowest point, all blocks together")


@pytest.mark.stress
@pytest.mark.usefixtures("laid_out")
def test_layerwise_reads_back_from_its_csv_as_the_same_picture() -> None:
    def read(table: Table) -> Table:
        return Table.from_csv(io.StringIO(table.to_csv(), newline=""), "x")

    run = layered(["a", "b"])
    again = replace(run, table=read(run.table), more={"blocks": read(run.more["blocks"])})
    assert render(draw([run]), ".svg") == render(draw([again]), ".svg")


def test_blocks_are_drawn_for_one_run_and_not_for_several() -> None:
    run = layered(["a", "b"])
    assert "all blocks together" in names_in_legend(draw([run]))
    assert len(runs(draw([run, run]).axes[0])) == 2


def test_odd_names_of_blocks_are_not_drawn_as_mathematics() -> None:
    figure = draw_layerwise(layered([r"$x_1$", "a\nb\x1b[31m", "long." * 40, "模型"]))
    named = names_in_legend(figure)
    assert named[1:3] == [r"$x_1$", "a b[31m"]
    assert named[3].startswith("…")
    assert len(named[3]) < 40


@pytest.mark.usefixtures("laid_out")
@pytest.mark.parametrize("log", [False, True])
def test_odd_blocks_are_drawn(log: bool) -> None:
    columns = ("alpha", "split", "loss", "loss_stderr")
    whole = Table.build(columns, [(0.0, "a", 1.0, NAN), (1.0, "a", NAN, NAN)])
    for rows in ([], [("x", 0.0, "a", NAN, NAN)], [("x", NAN, "a", 1.0, 0.1)],
                 [("x", 0.3, "a", -1e308, INF), ("y", 0.4, "b", 0.0, 0.0)]):  # fmt: skip
        more = {"blocks": Table.build(("block", *columns), rows)}
        table = whole if rows else Table.build(columns, [])
        figure = draw_layerwise(Run(table, {}, more=more), Drawing(log=log))
        for axes in figure.axes:
            assert all(map(math.isfinite, (*axes.get_xlim(), *axes.get_ylim())))


# --- Tensors -------------------------------------------------------------------------------------


def bars(figure: Figure) -> list[float]:
    containers = [c for c in figure.axes[0].containers if isinstance(c, BarContainer)]
    return [float(c.patches[0].get_width()) for c in containers]


def dots(axes: Axes) -> list[float]:
    lines = [line for line in axes.get_lines() if line.get_marker() == "o"]
    return [float(np.asarray(line.get_xdata())[0]) for line in lines]


def words(figure: Figure) -> list[str]:
    """The names beside the bars."""
    return [t.get_text() for t in figure.axes[0].get_yticklabels()]


def overall(figure: Figure) -> float:
    (line,) = [
        line
        for line in figure.axes[0].get_lines()
        if isinstance(line, Line2D) and to_hex(line.get_color()) == INK
    ]
    return float(np.asarray(line.get_xdata())[0])


def test_bars_are_the_shares_that_tensors_moved() -> None:
    figure = draw_inspection(moved([("a.weight", 12, 4.0, 1.0), ("a.bias", 3, 2.0, 3.0)]))
    assert bars(figure) == [0.25, 1.5]
    assert words(figure) == ["a.weight", "a.bias"]
    # √(1² + 3²) / √(4² + 2²)
    assert overall(figure) == pytest.approx(math.sqrt(10 / 20))
    assert legend(figure) == ["all tensors together: 0.707"]
    assert {"0.25", "1.5", "‖B − A‖ / ‖A‖ of each tensor"} <= set(texts(figure))
    assert "A  runs/init.safetensors      B  runs/final.safetensors" in texts(figure)
    # The first is on top, and bars begin at zero.
    low, high = figure.axes[0].get_ylim()
    assert low > high
    assert figure.axes[0].get_xlim()[0] == 0


def test_bars_of_one_checkpoint_are_root_mean_squares() -> None:
    figure = draw_inspection(held([("a.weight", 4, 6.0), ("a.bias", 9, 12.0)]))
    assert bars(figure) == [3.0, 4.0]
    assert overall(figure) == pytest.approx(math.sqrt((36 + 144) / 13))
    assert "root mean square of the values of each tensor" in texts(figure)
    assert "a.pt" in texts(figure)


def test_a_part_of_the_model_has_one_colour() -> None:
    names = ["h.0.a.weight", "h.0.b.bias", "h.1.a.weight", "ln.weight", "ln.bias", "alone"]
    figure = draw_inspection(moved([(name, 4, 1.0, 1.0) for name in names]))
    containers = [c for c in figure.axes[0].containers if isinstance(c, BarContainer)]
    colours = [to_hex(c.patches[0].get_facecolor()) for c in containers]
    assert colours[0] == colours[1]
    assert colours[3] == colours[4]
    assert colours[::1] == sorted(colours, key=lightness)
    assert len(set(colours)) == 4


def test_tensors_without_a_relative_distance_have_words() -> None:
    figure = draw_inspection(
        moved(
            [
                ("same", 4, 2.0, 0.0),
                ("zero", 4, 0.0, 0.5),
                ("bad", 4, 2.0, NAN),
                ("ok", 4, 2.0, 1.0),
            ],
            wrong=2,
            whole_numbers=1,
        )
    )
    assert bars(figure) == [0.5]
    assert {"0", "from 0", "not finite", "0.5"} <= set(texts(figure))
    assert note(figure).splitlines() == [
        "from 0: all zero at A, so the relative distance is undefined",
        "Not drawn: 1 integer tensor",
        "Not drawn: 2 tensors that do not match",
    ]
    # With one that is not finite there is no mark of all together.
    assert legend(figure) == []
    assert "count0" not in words(figure)


def test_a_wide_range_has_dots_on_a_logarithmic_axis() -> None:
    near = draw_inspection(moved([("a", 4, 1.0, 0.01), ("b", 4, 1.0, 0.9)]))
    assert near.axes[0].get_xscale() == "linear"
    far = draw_inspection(moved([("a", 4, 1.0, 0.001), ("b", 4, 1.0, 0.9), ("c", 4, 1.0, 0.0)]))
    assert far.axes[0].get_xscale() == "log"
    assert dots(far.axes[0]) == [0.001, 0.9]
    # The length of a bar would say nothing there.
    assert bars(far) == []
    assert "‖B − A‖ / ‖A‖ of each tensor, log scale" in texts(far)


def test_hundreds_of_tensors_are_grouped_by_their_prefixes() -> None:
    tensors = transformer(12)
    figure = draw_inspection(moved(tensors))
    assert len(words(figure)) <= 60
    assert words(figure)[:4] == ["embed.weight", "h.0.attn", "h.0.mlp", "h.0.norm"]
    parts = [(n, d) for name, _, n, d in tensors if name.startswith("h.3.mlp.")]
    share = math.sqrt(sum(d * d for _, d in parts) / sum(n * n for n, _ in parts))
    assert dots(figure.axes[0])[words(figure).index("h.3.mlp")] == pytest.approx(share)
    assert f"{len(tensors)} tensors, grouped by the common prefixes of their names" in note(figure)
    assert "of each part" in " ".join(texts(figure))
    whole = math.sqrt(sum(d * d for *_, d in tensors) / sum(n * n for _, _, n, _ in tensors))
    assert overall(figure) == pytest.approx(whole)
    # Sixty tensors are drawn each on its own; where no beginnings help, all are.
    assert len(words(draw_inspection(moved(tensors[:60])))) == 60
    flat = [(f"t{k}", 4, 1.0, 0.5) for k in range(80)]
    assert len(words(draw_inspection(moved(flat)))) == 80


def test_one_inspection_cannot_be_laid_over_another() -> None:
    run = moved([("a", 4, 1.0, 0.5)])
    assert render(draw([run]), ".png") == render(draw_inspection(run), ".png")
    titled = draw([run], Drawing(title="How far it went"))
    assert {"How far it went", "A  runs/init.safetensors      B  runs/final.safetensors"} <= set(
        texts(titled)
    )
    with pytest.raises(UsageError, match="inspections cannot be overlaid"):
        draw([run, run])


@pytest.mark.usefixtures("laid_out")
@pytest.mark.parametrize(
    "tensors",
    [
        [],
        [("empty", 0, 0.0, 0.0)],
        [("huge", 4, 1e300, 1e308)],
        [("tiny", 4, 5e-324, 5e-324), ("b", 4, 1.0, 1.0)],
        [("inf", 4, INF, INF)],
        [(r"$x_1$", 4, 1.0, 1.0), ("a\nb\x1b[31m\ud800", 4, 1.0, 1.0), ("…" * 300, 4, 1.0, 1.0)],
    ],
    ids=str,
)
def test_odd_tensors_are_drawn(tensors: list[Any]) -> None:
    for run in (moved(tensors), held([tensor[:3] for tensor in tensors])):
        figure = draw_inspection(run)
        for low, high in (figure.axes[0].get_xlim(), figure.axes[0].get_ylim()):
            assert math.isfinite(low)
            assert math.isfinite(high)
            assert low != high


def test_one_checkpoint_is_not_described_as_two() -> None:
    figure = draw_inspection(
        held([("huge", 4, math.inf), ("none", 0, 0.0), ("zero", 4, 0.0), ("ok", 4, 2.0)])
    )
    assert bars(figure) == [1.0]
    said = texts(figure)
    assert {"not finite", "empty", "0", "1"} <= set(said)
    assert not any("from 0" in text or " A" in text for text in said)


def test_only_tensors_that_were_all_zero_have_from_zero() -> None:
    figure = draw_inspection(
        moved([("to", 4, 2.0, math.inf), ("bad", 4, 0.0, NAN), ("none", 0, 0.0, 0.0),
               ("ok", 4, 2.0, 1.0)])
    )  # fmt: skip
    said = texts(figure)
    assert (said.count("not finite"), said.count("empty")) == (2, 1)
    assert not any("from 0" in text for text in said)
