"""The words of the report of ``interpolate``, on curves that are known in closed form."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import losscli
from losscli.cli.interpolate import report
from losscli.results.result import Result

Curve = Callable[[Tensor], Tensor]


class Mean(nn.Module):
    """Returns the mean of its two weights, which is α, for every example."""

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.zeros(1))
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return ((self.v + self.w) / 2).expand(len(x), 1)


def hill(w: Tensor) -> Tensor:
    """4 w (1 − w): 0.36 at 0.1, 1 at 0.5."""
    return 4 * w * (1 - w)


def line(
    folder: Path,
    curve: Curve,
    low: float,
    high: float,
    *,
    noise: float = 0.0,
    points: int = 11,
    layerwise: bool = False,
) -> Result[Any]:
    """Runs ``interpolate`` where the loss of an example is curve(α) ± noise α."""
    for name, value in (("a", 0.0), ("b", 1.0)):
        torch.save(dict.fromkeys("vw", torch.tensor([value])), folder / f"{name}.pt")

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        w = outputs.squeeze(1)
        return curve(w) + noise * w * targets

    return losscli.interpolate(
        str(folder / "a.pt"),
        str(folder / "b.pt"),
        model=Mean,
        data={"all": (torch.zeros(8, 1), torch.tensor([1.0, -1.0] * 4))},
        loss=loss,
        metric=("none",),
        range=(low, high),
        points=points,
        layerwise=layerwise,
        dtype="float64",
    )


def said(result: Result[Any], label: str) -> str:
    found = re.search(rf"^  {label} +(.*)$", report(result), re.MULTILINE)
    assert found, report(result)
    return found[1]


PART = "the range covers only part of the line"
WHOLE = "none: never above the straight line between the losses at A and B"


@pytest.mark.parametrize(
    ("curve", "low", "high", "barrier", "rise"),
    [
        (lambda w: -hill(w), -0.5, 2, WHOLE, "1 from α = 0.5 to 1"),
        (lambda w: -w, 0, 1, WHOLE, "none: the loss never increases from A to B at the sampled"),
        (lambda w: -w + w**2, 0.9, 1.2, f"none for α from 0.9 to 1 ({PART})", f" 1 ({PART})"),
        (lambda w: -w, 0.5, 2, f"none for α from 0.5 to 1 ({PART})", "none for α from 0.5 to 1 ("),
        (lambda w: -w, -1, 0.5, f"none for α from 0 to 0.5 ({PART})", "none for α from 0 to 0.5 ("),
        (hill, 0, 0.1, "0.36 at α = 0.1, where the range ends", f"0.36 from α = 0 to 0.1 ({PART})"),
        (hill, 0.9, 1.9, "0.36 at α = 0.9, where the range ends", "0.36 from α = 0 to 0.9 (the"),
        (hill, 0, 0.8, f"0.9984 at α = 0.48 ({PART})", f"0.9984 from α = 0 to 0.48 ({PART})"),
        (hill, 0, 1, "1 at α = 0.5", "1 from α = 0 to 0.5"),
    ],
)  # fmt: skip
def test_a_part_of_the_line_gives_no_statements_about_the_rest(
    curve: Curve, low: float, high: float, barrier: str, rise: str, tmp_path: Path
) -> None:
    result = line(tmp_path, curve, low, high)
    assert said(result, "barrier").replace(" ± 0", "") == barrier
    assert rise in said(result, "largest rise").replace(" ± 0", "")


@pytest.mark.parametrize(("low", "high", "cell"), [(0, 1, "none"), (0.5, 1, "none in the range")])
def test_a_block_on_a_part_of_the_line_gives_no_statements_about_the_rest(
    low: float, high: float, cell: str, tmp_path: Path
) -> None:
    text = report(line(tmp_path, lambda w: -w, low, high, layerwise=True))
    (row,) = re.findall(r"^    w .*$", text, re.MULTILINE)
    assert row.endswith(f"  {cell}")


def ramp(w: Tensor) -> Tensor:
    """A minimum at 1 that is deep, and one at 0.5 that is shallow."""
    return torch.where(w < 0.75, 1 + 0.1 * (w - 0.5).abs(), 10 * (w - 1).abs())


@pytest.mark.parametrize(
    ("noise", "pattern"),
    [
        (0.0, r"2, significant \(> 2 s\.e\.\): α = 1, [^(]*; α = 0\.5, [^(]*"),
        (
            0.5,
            r"2, of which 1 significant \(> 2 s\.e\.\): α = 1, [^(]*\(not significant\)",
        ),
        (100.0, r"2, not significant: α = 1, depth [^;(]*; α = 0\.5, depth [^;(]*"),
    ],
)
def test_a_value_that_is_not_significant_is_marked(
    noise: float, pattern: str, tmp_path: Path
) -> None:
    result = line(tmp_path, ramp, 0, 2, noise=noise, points=21)
    minima = result.summary["splits"]["all"]["local_minima"]
    assert [m["alpha"] for m in minima] == [0.5, 1]
    assert re.fullmatch(pattern, said(result, "local minima")), said(result, "local minima")


@pytest.mark.parametrize(
    ("noise", "text"),
    [
        (0.0, "-0.1 at α = 1.5, lower than B by 0.1 ± 0"),
        (0.2, "-0.1 at α = 1.5, lower than B by 0.1 ± 0.038"),
        (0.3, "-0.1 at α = 1.5, lower than B by 0.1 ± 0.057 (not significantly)"),
    ],
)
def test_a_point_that_may_not_be_lower_than_b_says_so(
    noise: float, text: str, tmp_path: Path
) -> None:
    # The difference of an example is -0.1 ± noise / 2: s.e. = noise / 2 / sqrt(7).
    result = line(tmp_path, lambda w: 0.4 * (w - 1) * (w - 2), 0, 2, noise=noise, points=21)
    assert said(result, "lowest seen") == text


@pytest.mark.parametrize(
    ("curve", "low", "high", "text"),
    [
        (lambda w: w, 0.5, 2, "0.5 at α = 0.5; lower than B by 0.5 ± 0; A, outside the range, is"),
        (lambda w: -w, -1, 0.5, "-0.5 at α = 0.5; B, outside the range, is"),
        (hill, 0.2, 0.6, "0.64 at α = 0.2; A and B, outside the range, are"),
    ],
)
def test_an_end_outside_the_range_that_is_lower_is_named(
    curve: Curve, low: float, high: float, text: str, tmp_path: Path
) -> None:
    text = text.replace(";", ", where the range ends;", 1)
    assert said(line(tmp_path, curve, low, high), "lowest seen") == f"{text} lower"


@pytest.mark.parametrize(
    ("lost", "places"),
    [
        ([8, 9, 10], "from α = 0.6"),
        ([10], "from α = 1"),
        ([0], "up to α = -1"),
        ([0, 1, 9, 10], "up to α = -0.8, from α = 0.8"),
        ([3], "at α = -0.4"),
        ([2, 3, 4], "from α = -0.6 to -0.2"),
        ([0, 2, 4, 5, 8, 10], "up to α = -1, at α = -0.6, from α = -0.2 to 0 and 2 more"),
    ],
)
def test_the_report_and_a_note_name_points_with_a_loss_that_is_not_finite(
    lost: list[int], places: str, tmp_path: Path
) -> None:
    alphas = torch.tensor([(i - 5) / 5 for i in lost])

    def broken(w: Tensor) -> Tensor:
        at = (w[:, None] - alphas).abs().min(1).values < 1e-3
        return torch.where(at, math.inf, w)

    result = line(tmp_path, broken, -1, 1)
    number = f"{len(lost)} point{'s' if len(lost) > 1 else ''}"
    assert said(result, "lowest seen").endswith(f"; not finite at {number}, {places}")
    have = "have" if len(lost) > 1 else "has"
    note = f"{number} of all {have} a loss that is not finite: {places}"
    assert note in result.summary["notes"]


def test_a_line_without_a_finite_loss_says_so(tmp_path: Path) -> None:
    result = line(tmp_path, lambda w: w + math.inf, 0, 1)
    assert said(result, "lowest seen") == "none: no point has a finite loss"
    assert "11 points of all have a loss that is not finite: at every α" in result.summary["notes"]
