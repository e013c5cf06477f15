"""Zooming into a line, from files to tables: slopes, refinement, bumps and noise."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import losscli
from losscli.errors import UsageError
from losscli.evaluation.derivatives import sweep
from tests import oracle
from tests.cases import CASES, sample
from tests.conftest import Losscli


class Scalar(nn.Module):
    """Returns its one weight for every example."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.w.expand(len(x), 1)


def wave(outputs: Tensor, targets: Tensor) -> Tensor:
    """A parabola modulated by a sine, moved up and down a little from example to example."""
    w = outputs.squeeze(1)
    return w.square() + 0.15 * torch.sin(12 * w) + 0 * targets + 1


def save(folder: Path, name: str, value: float) -> str:
    torch.save({"w": torch.tensor([value])}, folder / f"{name}.pt")
    return str(folder / f"{name}.pt")


def line(folder: Path) -> tuple[str, str]:
    return save(folder, "a", -1.0), save(folder, "b", 1.0)


GIVEN = {
    "model": Scalar,
    "data": {"all": (torch.zeros(8, 1), torch.zeros(8))},
    "loss": wave,
    "metric": ("none",),
}


@cache
def extrema(sign: int) -> list[float]:
    """Where the wave's minima (1) or maxima (−1) are, as α, by a fine grid in float64."""
    w = np.linspace(-2, 3, 200_001)
    y = sign * (w**2 + 0.15 * np.sin(12 * w))
    inner = (y[1:-1] < y[:-2]) & (y[1:-1] < y[2:])
    return ((w[1:-1][inner] + 1) / 2).tolist()


@pytest.mark.parametrize("derivatives", [False, True])
def test_every_extremum_is_found_from_a_coarse_grid(derivatives: bool, tmp_path: Path) -> None:
    a, b = line(tmp_path)
    result = losscli.interpolate(
        *(a, b),
        **GIVEN,
        points=21,
        refine=1e-2 if derivatives else 1e-3,
        derivatives=derivatives,
        dtype="float64",
    )
    split = result.summary["splits"]["all"]
    for which, sign in (("local_minima", 1), ("local_maxima", -1)):
        found = [e["alpha"] for e in split[which]]
        expected = extrema(sign)
        assert len(found) == len(expected)
        np.testing.assert_allclose(found, expected, atol=2.5e-3)
    alphas = result.table.floats("alpha")
    assert alphas == sorted(set(alphas))
    assert result.summary["refined"]["points"] == len(alphas)
    assert len(alphas) < result.summary["refined"]["uniform_points"] / 3
    w = 2 * np.array(alphas) - 1
    losses = w**2 + 0.15 * np.sin(12 * w) + 1
    np.testing.assert_allclose(result.table.floats("loss"), losses, rtol=1e-12)


def test_slopes_and_curvatures_are_those_of_the_closed_form(tmp_path: Path) -> None:
    a, b = line(tmp_path)
    result = losscli.interpolate(a, b, **GIVEN, points=7, derivatives=True, dtype="float64")
    w = 2 * np.array(result.table.floats("alpha")) - 1
    slope, curvature = 2 * (2 * w + 1.8 * np.cos(12 * w)), 4 * (2 - 21.6 * np.sin(12 * w))
    np.testing.assert_allclose(result.table.floats("slope"), slope, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(result.table.floats("curvature"), curvature, rtol=1e-10, atol=1e-10)
    at_b = result.summary["splits"]["all"]["slope_at_b"]
    assert at_b["slope"] == pytest.approx(2 * (2 + 1.8 * np.cos(12)), rel=1e-10)
    assert result.table.columns == ("alpha", "split", "loss", "loss_stderr", "slope", "curvature")


def test_the_method_is_chosen_once_on_the_given_points_for_all_refined_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chosen = []

    def choose(along: object, alphas: list[float], split: object) -> object:
        chosen.append(list(alphas))
        return choose_method(along, alphas, split)

    choose_method: Callable[..., object] = sweep.choose_method
    monkeypatch.setattr(sweep, "choose_method", choose)
    given = {**GIVEN, "derivatives": True, "dtype": "float64"}
    result = losscli.interpolate(*line(tmp_path), **given, points=5, refine=0.05)
    alphas = result.table.floats("alpha")
    assert len(alphas) > 12
    assert chosen == [[-0.5, 0.0, 0.125, 0.75, 1.0, 1.375, 2.0]]
    w = 2 * np.array(alphas) - 1
    slope = 2 * (2 * w + 1.8 * np.cos(12 * w))
    np.testing.assert_allclose(result.table.floats("slope"), slope, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "name", sample(["mlp-sigmoid", "cnn-batchnorm", "lstm", "attention-tied"], 1, 4)
)
def test_slopes_are_those_of_finite_differences_of_a_plain_loop(name: str, tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == name)
    files = []
    for seed in (1, 2):
        files.append(str(tmp_path / f"{seed}.pt"))
        torch.save(case.state(seed), files[-1])
    result = losscli.interpolate(
        *files,
        model=case.build,
        data={"all": (copy.deepcopy(case.inputs), case.targets)},
        loss=case.loss,
        metric=("none",),
        dtype="float64",
        points=2,
        range=(0.2, 0.8),
        derivatives=True,
    )
    a, b = case.state(1), case.state(2)

    def loss(alpha: float) -> float:
        state = oracle.blend(a, b, alpha)
        state |= {n: t for n, t in a.items() if torch.equal(t, b[n])}
        return oracle.mean(
            oracle.losses(
                case.build,
                state,
                copy.deepcopy(case.inputs),
                case.targets,
                case.per_example,
                batch_size=len(case.targets),
            )
        )

    h = 1e-6
    for alpha, slope in zip(
        result.table.floats("alpha"), result.table.floats("slope"), strict=True
    ):
        one, two = ((loss(alpha + k * h) - loss(alpha - k * h)) / (2 * k * h) for k in (1, 2))
        assert slope == pytest.approx((4 * one - two) / 3, rel=1e-6, abs=1e-9)


def test_rounding_does_not_make_an_extremum(tmp_path: Path) -> None:
    # In float32 a large constant drowns the slope: the curve is a flight of steps.
    a, b = save(tmp_path, "a", 1.0), save(tmp_path, "b", 1.0 + 1e-4)

    def shifted(outputs: Tensor, targets: Tensor) -> Tensor:
        w = outputs.squeeze(1)
        # The order of the sums lets rounding fall either way.
        return ((w + 300.1) * 1.7 - 510.17) * 1.3 + targets * 0 + 100

    data = {"all": (torch.zeros(8, 1), torch.zeros(8))}
    given = {"model": Scalar, "data": data, "loss": shifted, "metric": ("none",)}
    result = losscli.interpolate(a, b, **given, points=101, range=(0, 1))
    losses = np.array(result.table.floats("loss"))
    rough = np.sign(np.diff(losses))
    assert {-1.0, 1.0} <= set(rough) or 0.0 in set(rough)
    split = result.summary["splits"]["all"]
    assert split["local_minima"] == split["local_maxima"] == []


def test_the_ends_stay_exact_where_points_are_evaluated_again(tmp_path: Path) -> None:
    a, b = line(tmp_path)
    one = losscli.interpolate(a, b, **GIVEN, points=21)
    two = losscli.interpolate(a, b, **GIVEN, points=21, refine=1e-2)
    for alpha in (0.0, 1.0):
        rows = [r.table.where("alpha", alpha)["loss"] for r in (one, two)]
        assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"refine": 0.0}, "--refine must be between 0 and 1, not 0.0"),
        ({"refine": 1.5}, "--refine must be between 0 and 1, not 1.5"),
        ({"refine": 0.1, "sampling_error": 0.1}, "--refine needs all examples"),
        ({"derivatives": True, "sampling_error": 0.1}, "--derivatives needs all examples"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, float], text: str, tmp_path: Path) -> None:
    a, b = line(tmp_path)
    with pytest.raises(UsageError, match=text):
        losscli.interpolate(a, b, **GIVEN, **options)  # type: ignore[arg-type]


def test_significant_bumps_are_distinguished_from_noise(tmp_path: Path) -> None:
    a, b = line(tmp_path)
    generator = torch.Generator().manual_seed(0)
    targets = 20 * torch.randn(50, generator=generator)

    def noisy(outputs: Tensor, targets: Tensor) -> Tensor:
        w = outputs.squeeze(1)
        return w.square() + targets * torch.sin(3 * w) + 0.15 * torch.sin(12 * w)

    data = {"all": (torch.zeros(50, 1), targets - targets.mean())}
    given = {"model": Scalar, "data": data, "loss": noisy, "metric": ("none",)}
    result = losscli.interpolate(a, b, **given, points=101)
    minima = result.summary["splits"]["all"]["local_minima"]
    assert minima
    for entry in minima:
        assert entry["beyond_noise"] == (entry["depth"] > 2 * entry["depth_stderr"])
    assert not all(entry["beyond_noise"] for entry in minima)


@pytest.mark.usefixtures("unlaid")
def test_a_zoom_shows_where_it_lies_in_the_whole(losscli: Losscli, folder: Path) -> None:
    line = ["interpolate", "a.pt", "b.pt", "--split", "test", "--metric", "none"]
    assert losscli(*line, "--points", 9, "-o", "whole", "--no-figure").status == 0
    zoom = [*line, "--range", 0.1, 0.3, "--points", 5]
    done = losscli(*zoom, "--context", "whole.csv", "-o", "zoom")
    assert done.status == 0, done.stderr
    assert Path("zoom.context.csv").read_bytes() == Path("whole.csv").read_bytes()
    assert json.loads(Path("zoom.json").read_text())["tables"] == ["context"]
    assert losscli("plot", "zoom.csv", "-o", "again").status == 0
    assert Path("again.png").read_bytes() == Path("zoom.png").read_bytes()
    assert losscli(*zoom, "-o", "alone").status == 0
    assert Path("alone.png").read_bytes() != Path("zoom.png").read_bytes()


@pytest.mark.parametrize(
    ("context", "text"),
    [("absent.csv", "absent.csv cannot be read"), ("other.csv", "is not a table of")],
)
def test_a_context_must_be_a_line(context: str, text: str, losscli: Losscli, folder: Path) -> None:
    Path("other.csv").write_text("a,b\r\n1,2\r\n")
    done = losscli("interpolate", "a.pt", "b.pt", "--context", context)
    assert done.status in {1, 2}
    assert text in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_command_prints_what_refinement_and_slopes_found(
    losscli: Losscli, folder: Path
) -> None:
    done = losscli(
        "interpolate", "a.pt", "b.pt", "-o", "out", "--no-figure", "--points", 5,
        "--refine", 0.1, "--derivatives", "--split", "test",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    assert "refined to 0.1 of the height" in done.stdout
    assert "stationary" in done.stdout
    header = Path("out.csv").read_text().splitlines()[0]
    assert header == "alpha,split,loss,loss_stderr,accuracy,slope,curvature"


def test_a_context_of_another_run_is_reported(losscli: Losscli, folder: Path) -> None:
    losscli("interpolate", "b.pt", "a.pt", "-o", "other", "--points", 5, "--no-figure")
    zoom = ["interpolate", "a.pt", "b.pt", "--range", "0.1", "0.3", "--points", "3"]
    done = losscli(*zoom, "--context", "other.csv", "-o", "zoom", "--no-figure")
    assert "is it of the same checkpoints, data and --limit?" in done.stderr
    done = losscli(*zoom, "--context", "other.csv", "-o", "other", "--force")
    assert done.status == 2
    assert "other.csv is an input of this command, which would overwrite it." in done.stderr
