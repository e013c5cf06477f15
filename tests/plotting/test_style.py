"""Numbers of checkpoints in their names, and colours of text."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure

from losscli.plotting.style import (
    Label,
    is_light,
    number_checkpoints,
    scale_checkpoints,
    shorten,
    shorten_path,
    text_width,
)

ORDER = "checkpoint, in the order given"


@pytest.mark.parametrize(
    ("names", "numbers", "label"),
    [
        (["r/step-00000.pt", "r/step-00500.pt"], [0, 500], "step"),
        (["run7/epoch_9.pt", "run7/epoch_10.pt"], [9, 10], "epoch"),
        (["epoch=1-step=400.ckpt", "epoch=2-step=800.ckpt"], [400, 800], "step"),
        (["epoch=1-step=400.ckpt", "epoch=2-step=400.ckpt"], [1, 2], "epoch"),
        (["out/checkpoint-500", "out/checkpoint-1000"], [500, 1000], "checkpoint"),
        (["Steps5", "Steps7"], [5, 7], "step"),
        # No counter, no order, other names, or no whole number.
        (["seed-1.pt", "seed-5.pt"], [0, 1], ORDER),
        (["0.pt", "5.pt"], [0, 1], ORDER),
        (["step-5.pt", "step-1.pt"], [0, 1], ORDER),
        (["step-5.pt", "step-5.pt#ema"], [0, 1], ORDER),
        (["init.pt", "step-5.pt", "final.pt"], [0, 1, 2], ORDER),
        (["step-1.5.pt", "step-2.5.pt"], [0, 1], ORDER),
        (["epoch1-loss3.pt", "epoch2-loss5.pt"], [1, 2], "epoch"),
        ([f"step-{9 * 10**k}.pt" for k in (1, 300)], [0, 1], ORDER),
        (["step-5.pt"], [0], ORDER),
        ([], [], ORDER),
    ],
)
def test_numbers_are_those_that_count_checkpoints(
    names: list[str], numbers: list[int], label: str
) -> None:
    found, said = number_checkpoints(names)
    assert (found.tolist(), said) == (numbers, label)


@pytest.mark.parametrize(
    ("numbers", "scale"),
    [
        (range(30), "linear"),
        ([0, 1, 2, 5, 2000], "linear"),
        ([k**3 for k in range(30)], "symlog"),
        ([10**k for k in range(1, 8)], "symlog"),
        ([7], "linear"),
        ([], "linear"),
    ],
)
def test_crowded_numbers_have_a_logarithmic_axis(numbers: list[int], scale: str) -> None:
    axes = Figure().add_subplot()
    scale_checkpoints(axes, np.array(numbers, dtype=np.float64), "step")
    assert axes.get_xscale() == scale
    assert axes.get_xlabel() == ("step, log scale" if scale == "symlog" else "step")
    low, high = axes.get_xlim()
    assert low < min(numbers, default=0) <= max(numbers, default=1) < high + 1
    assert 2 <= len([x for x in axes.get_xticks() if low <= x <= high]) <= 9 or len(numbers) < 2


def test_the_better_of_black_and_white_has_a_contrast_of_4_5() -> None:
    colours = np.array([*itertools.product(np.linspace(0, 1, 12), repeat=3)])
    for colour, light in zip(colours, is_light(colours), strict=True):
        red, green, blue = (
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour.tolist()
        )
        luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        black, white = (luminance + 0.05) / 0.05, 1.05 / (luminance + 0.05)
        assert (black if light else white) == max(black, white) > 4.5


@pytest.mark.parametrize(
    ("text", "start", "end"),
    [
        ("a model trained with weight decay and momentum", "a model", "…"),
        ("runs/a-long-name-of-a-folder/of-seed-1/step-00100.pt", "…", "00100.pt"),
        ("a-long-name-without-folders-step-00100", "…", "-00100"),
        ("runs with spaces/a/long/name/init.pt → final.pt", "…", "final.pt"),
        (Label("a-long-label-without-spaces-of-seed-1"), "a-long-label", "…"),
        (Label("ResNet/GELU/weight decay/of seed 1"), "ResNet/GELU", "…"),
    ],
)
def test_labels_keep_their_beginning_and_names_their_end(text: str, start: str, end: str) -> None:
    figure = Figure()
    shown = shorten(figure, text, 120.0)
    assert shown.startswith(start)
    assert shown.endswith(end)
    assert len(shown) < len(text)
    assert text_width(figure, shown) <= 120.0
    assert shorten(figure, text, 1000.0) == text


@pytest.mark.parametrize("width", [20.0, 60.0, 120.0, 200.0, 400.0])
@pytest.mark.parametrize("name", ["runs/i/a-long-name/of/seed-1/step-00100.pt", "a/b", "a-name.pt"])
def test_a_path_loses_as_few_leading_folders_as_possible(name: str, width: float) -> None:
    figure = Figure()
    parts = name.split("/")
    names = [name, *(f"…/{'/'.join(parts[k:])}" for k in range(1, len(parts)))]
    fitting = [each for each in names if text_width(figure, each) <= width]
    expected = fitting[0] if fitting else shorten(figure, name, width)
    assert shorten_path(figure, name, width) == expected
