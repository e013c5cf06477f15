"""Verdicts on checkpoints, from files to tables, against closed forms and a dense Hessian."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import losscli
from losscli.cli.check import report
from losscli.errors import ModelError, UsageError
from losscli.evaluation import precision
from losscli.models import CNN, MLP
from tests import oracle, stopped
from tests.cases import in_turn, sample
from tests.conftest import ROOT, Losscli


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.flatten(1) - targets.flatten(1)).square().sum(1)


def negated(outputs: Tensor, targets: Tensor) -> Tensor:
    return -squared(outputs, targets)


def linear(width: int = 3) -> nn.Module:
    return nn.Linear(width, 1, bias=False)


def regression(width: int = 3, examples: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and the solution of least squares, in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(examples, width, generator=generator, dtype=torch.float64)
    y = torch.randn(examples, 1, generator=generator, dtype=torch.float64)
    return x, y, torch.linalg.lstsq(x, y).solution.T


def save(folder: Path, name: str, **state: Tensor) -> str:
    torch.save(state, folder / f"{name}.pt")
    return str(folder / f"{name}.pt")


def row_of(result: losscli.Result, i: int = 0) -> dict[str, object]:
    return result.table.records()[i]


def test_least_squares_has_the_minimum_and_the_hessian_of_the_closed_form(tmp_path: Path) -> None:
    x, y, solution = regression()
    file = save(tmp_path, "a", weight=solution)
    given = {"model": linear, "data": {"all": (x, y)}, "loss": squared, "dtype": "float64"}
    result = losscli.check([file], **given)
    row = row_of(result)
    values = np.linalg.eigvalsh((2 * x.T @ x / len(x)).numpy())
    assert row["verdict"] == "minimum"
    assert row["gradient_norm"] < 1e-12
    assert row["lambda_min"] == pytest.approx(values[0], rel=1e-10)
    assert row["lambda_max"] == pytest.approx(values[-1], rel=1e-10)
    assert row["minimal_ratio"] == 1
    assert result.summary["escape"] is None
    assert result.more["spectrum"].floats("eigenvalue") == pytest.approx(values, rel=1e-10)


def test_the_minimum_of_the_negative_loss_is_a_maximum_with_an_escape(tmp_path: Path) -> None:
    x, y, solution = regression()
    file = save(tmp_path, "a", weight=solution)
    given = {"model": linear, "data": {"all": (x, y)}, "loss": negated, "dtype": "float64"}
    result = losscli.check([file], **given)
    assert row_of(result)["verdict"] == "maximum"
    assert row_of(result)["minimal_ratio"] == 0
    assert row_of(result)["negative"] == 1
    assert "escape" in result.more


def test_near_the_solution_the_point_is_not_critical_and_a_step_down_is_reported(
    tmp_path: Path,
) -> None:
    x, y, solution = regression()
    file = save(tmp_path, "a", weight=solution + 1)
    given = {"model": linear, "data": {"all": (x, y)}, "loss": squared, "dtype": "float64"}
    result = losscli.check([file], **given)
    row = row_of(result)
    gradient = (2 * (x @ (solution + 1).T - y).T @ x / len(x)).squeeze(0)
    assert row["verdict"] == "not critical"
    assert row["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-12)
    (point,) = result.summary["splits"]["all"]["points"]
    step = point["descent"]["distance"]
    there = solution + 1 - step * gradient / gradient.norm()
    losses = squared(x @ there.T, y)
    assert step > 0
    assert point["descent"]["loss"] == pytest.approx(float(losses.mean()), rel=1e-10)
    here = squared(x @ (solution + 1).T, y)
    difference = oracle.standard_error((here - losses).tolist())
    assert point["descent"]["gain"] == pytest.approx(float((here - losses).mean()), rel=1e-9)
    assert point["descent"]["gain_stderr"] == pytest.approx(difference, rel=1e-9)
    assert "not significantly" not in report(result)


@pytest.mark.parametrize("tolerance", [1e-12, 10.0])
def test_the_tolerance_decides_what_counts_as_critical(tolerance: float, tmp_path: Path) -> None:
    x, y, solution = regression()
    file = save(tmp_path, "a", weight=solution + 1e-3)
    given = {"model": linear, "data": {"all": (x, y)}, "loss": squared, "dtype": "float64"}
    result = losscli.check([file], tolerance=tolerance, **given)
    # The loss is still to fall by 1e-6, of which float64 leaves no doubt.
    assert row_of(result)["verdict"] == ("undecided" if tolerance > 1 else "not critical")
    # The loss of an example changes by far more than the mean.
    text = report(result)
    assert ("(not significantly)\n" in text) == ("lowers the loss" in text) == (tolerance < 1)


def test_a_flat_valley_is_undecided(tmp_path: Path) -> None:
    x, y, solution = regression()
    # Two weights for one feature: along their difference nothing changes.
    twice = torch.cat([x, x[:, :1]], 1)
    file = save(tmp_path, "a", weight=torch.cat([solution, torch.zeros(1, 1)], 1))
    given = {"model": lambda: linear(4), "data": {"all": (twice, y)}, "loss": squared}
    result = losscli.check([file], **given, dtype="float64")
    row = row_of(result)
    assert row["verdict"] == "undecided"
    assert abs(row["lambda_min"]) <= row["lambda_min_error"]
    assert row["minimal_ratio"] == row["positive"] == 0.75
    assert (row["negative"], row["undecided"]) == (0, 0.25)
    (point,) = result.summary["splits"]["all"]["points"]
    assert point["reason"] == "λ min may be zero: it is within its error of zero"


class Product(nn.Module):
    """A two-layer linear network of one unit a layer: f(x) = b a x."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.b * self.a * x


def test_zero_is_a_saddle_of_a_two_layer_linear_network_with_known_curvatures(
    tmp_path: Path,
) -> None:
    x = torch.linspace(-1, 2, 30, dtype=torch.float64).unsqueeze(1)
    y = 3 * x
    file = save(tmp_path, "a", a=torch.zeros(1), b=torch.zeros(1))
    given = {"model": Product, "data": {"all": (x, y)}, "loss": squared, "dtype": "float64"}
    result = losscli.check([file], **given)
    row = row_of(result)
    # L = E(y − b a x)², so that ∂²L/∂a∂b = −2 E(x y) at zero, and the others vanish.
    curvature = 2 * float((x * y).mean())
    assert row["verdict"] == "saddle"
    assert row["lambda_min"] == pytest.approx(-curvature, rel=1e-12)
    assert row["lambda_max"] == pytest.approx(curvature, rel=1e-12)
    escape = result.more["escape"]
    distances = escape.floats("distance")
    assert distances == sorted(distances)
    assert distances == pytest.approx([-d for d in reversed(distances)])
    # Along (1, 1)/√2 the network is f(x) = t²/2 · x.
    for distance, loss in zip(distances, escape.floats("loss"), strict=True):
        expected = float((y - distance**2 / 2 * x).square().mean())
        assert loss == pytest.approx(expected, rel=1e-5, abs=1e-9)
    lowest = result.summary["escape"]
    assert lowest["loss"] < 0.1 * row["loss"]
    assert lowest["gain"] == pytest.approx(row["loss"] - lowest["loss"], rel=1e-12)


def dense_hessian(model: nn.Module, x: Tensor, y: Tensor) -> np.ndarray:
    return dense_hessian_of(nn.functional.cross_entropy, model, x, y)


def dense_hessian_of(
    function: Callable[[Tensor, Tensor], Tensor], model: nn.Module, x: Tensor, y: Tensor
) -> np.ndarray:
    names = [n for n, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def loss(theta: Tensor) -> Tensor:
        parts = torch.split(theta, [s.numel() for s in shapes])
        state = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        outputs = torch.func.functional_call(model, state, (x,))
        return function(outputs, y).mean()

    # All rows at once are faster where they fit into the caches.
    return torch.autograd.functional.hessian(loss, flat, vectorize=len(x) < 100).numpy()


@cache
def searched(widths: str) -> tuple[Tensor, Tensor, dict[str, Tensor], np.ndarray]:
    """Data, weights, and the eigenvalues of their dense Hessian, of which only a few are asked."""
    torch.manual_seed(0)
    model = MLP(widths, activation="tanh")
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(33, int(widths[:2]), generator=generator, dtype=torch.float64)
    y = torch.randint(5, (33,), generator=generator)
    values = np.linalg.eigvalsh(dense_hessian(copy.deepcopy(model).double(), x, y))
    return x, y, model.state_dict(), values


@pytest.mark.parametrize(
    ("widths", "limit", "batch_size"),
    [
        ("12-14-5", 200, 17),
        *(pytest.param("30-32-5", 1000, n, marks=pytest.mark.stress) for n in (17, 1000)),
    ],
)
def test_eigenvalues_by_search_are_those_of_the_dense_hessian(
    widths: str, limit: int, batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("losscli.evaluation.hessian.critical_points.DENSE_LIMIT", limit)
    x, y, state, values = searched(widths)
    file = save(tmp_path, "a", **state)
    assert len(values) > limit
    result = losscli.check(
        [file],
        model=f"mlp:{widths},activation=tanh",
        data={"all": (x, y)},
        dtype="float64",
        batch_size=batch_size,
        eigenvalues=3,
    )
    shares = ("minimal_ratio", "positive", "negative", "undecided", "trace", "trace_stderr")
    assert all(row_of(result)[column] is None for column in shares)
    found = result.more["spectrum"]
    expected = [*values[:3], *values[-3:]]
    for value, error, true in zip(
        found.floats("eigenvalue"), found.floats("error"), expected, strict=True
    ):
        assert abs(value - true) <= error + 1e-12
        assert error < 1e-3 * abs(true) + 1e-9
    (point,) = result.summary["splits"]["all"]["points"]
    assert point["lambda_min_converged"]
    assert not point["exact"]


def test_only_chosen_tensors_are_checked(tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = save(tmp_path, "a", **MLP("6-4-3", activation="tanh").state_dict())
    x, y = torch.rand(20, 6), torch.arange(20) % 3
    given = {"model": "mlp:6-4-3,activation=tanh", "data": {"all": (x, y)}, "dtype": "float64"}
    whole = losscli.check([file], **given)
    block = losscli.check([file], only=("layers.1.*",), **given)
    assert block.summary["moving"]["values"] == 15
    assert len(block.more["spectrum"].rows) == 15
    assert row_of(block)["gradient_norm"] < row_of(whole)["gradient_norm"]
    # Cauchy's interlacing: a block's eigenvalues lie between those of the whole.
    assert row_of(whole)["lambda_min"] <= row_of(block)["lambda_min"] + 1e-12
    assert row_of(block)["lambda_max"] <= row_of(whole)["lambda_max"] + 1e-12


def test_batchnorm_and_kinks_are_noted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = save(tmp_path, "a", **CNN("2-2", batchnorm=True, classes=3).state_dict())
    data = {"all": (torch.rand(8, 1, 4, 4), torch.arange(8) % 3)}
    result = losscli.check([file], model="cnn:2-2,batchnorm=true,classes=3", data=data)
    notes = " ".join(result.summary["notes"])
    assert "BatchNorm is in eval mode" in notes
    assert "max_pool2d, relu have kinks" in notes


class Clamping(nn.Module):
    """Has a kink in a function that works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).clamp_(0, 1)


def test_kinks_of_functions_in_place_are_noted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = save(tmp_path, "a", **Clamping().state_dict())
    data = {"all": (torch.rand(8, 2), torch.arange(8) % 3)}
    notes = losscli.check([file], model=Clamping, data=data).summary["notes"]
    assert any(note.startswith("clamp has kinks") for note in notes)


class Attention(nn.Module):
    """Attends over four tokens of three numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Linear(3, 9)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v).mean(1)


def test_the_kernel_of_attention_is_noted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = save(tmp_path, "a", **Attention().state_dict())
    data = {"all": (torch.rand(8, 4, 3), torch.arange(8) % 3)}
    result = losscli.check([file], model=Attention, data=data)
    assert any("math kernel" in note for note in result.summary["notes"])


def test_several_checkpoints_have_rows_in_their_order_and_the_escape_of_the_saddle(
    tmp_path: Path,
) -> None:
    x = torch.linspace(-1, 2, 30, dtype=torch.float64).unsqueeze(1)
    files = [
        save(tmp_path, "saddle", a=torch.zeros(1), b=torch.zeros(1)),
        save(tmp_path, "slope", a=torch.full((1,), 0.2), b=torch.full((1,), -0.1)),
    ]
    result = losscli.check(
        files, model=Product, data={"one": (x, 3 * x), "two": (x[:9], x[:9])}, loss=squared
    )
    assert result.table["checkpoint"] == [files[0], files[0], files[1], files[1]]
    assert result.table["split"] == ["one", "two", "one", "two"]
    assert result.table["verdict"][0] == "saddle"
    assert result.table["verdict"][2] == "not critical"
    assert result.summary["escape"]["checkpoint"] == files[0]


def test_a_loss_that_is_not_finite_leaves_the_verdict_undecided(tmp_path: Path) -> None:
    x, y, solution = regression()
    file = save(tmp_path, "a", weight=solution * math.inf)
    given = {"model": linear, "data": {"all": (x, y)}, "loss": squared}
    row = row_of(losscli.check([file], **given))
    assert row["verdict"] == "undecided"
    assert math.isnan(row["loss"])


def test_a_trace_that_is_not_finite_has_no_error_of_zero(tmp_path: Path) -> None:
    x = torch.ones(4, 1, dtype=torch.float64)
    file = save(tmp_path, "a", a=torch.full((1,), math.nan), b=torch.ones(1))
    row = row_of(losscli.check([file], model=Product, data={"all": (x, x)}, loss=squared))
    assert math.isnan(row["trace"])
    assert math.isnan(row["trace_stderr"])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("tolerance", -1.0),
        ("tolerance", math.nan),
        ("eigenvalues", 0),
        ("learning_rate", 0.0),
        ("sampling_error", 0.1),
        ("momentum", 0.9),
    ],
)
def test_invalid_options_are_refused(option: str, value: float, tmp_path: Path) -> None:
    x, y, solution = regression()
    file = save(tmp_path, "a", weight=solution)
    given = {"model": linear, "data": {"all": (x, y)}, "loss": squared}
    with pytest.raises(UsageError, match=f"--{option.replace('_', '-')}"):
        losscli.check([file], **given, **{option: value})  # type: ignore[arg-type]


@pytest.mark.usefixtures("unlaid")
def test_the_saddle_of_the_samples_is_recognised_and_its_figure_is_drawn_again(
    losscli: Losscli, folder: Path
) -> None:
    saddle = ROOT / "sample_checkpoints" / "saddle" / "saddle.pt"
    few = ("--split", "train", "--limit", 300, "--tolerance", 0.1)
    done = losscli("check", saddle, *few, "-o", "out")
    assert done.status == 0, done.stderr
    assert "300 examples: saddle" in done.stdout
    names = {p.name for p in folder.glob("out*")}
    assert names == {"out.csv", "out.spectrum.csv", "out.escape.csv", "out.json", "out.png"}
    header = Path("out.csv").read_text().splitlines()[0]
    assert header == (
        "checkpoint,split,loss,gradient_norm,lambda_min,lambda_min_error,lambda_max,"
        "lambda_max_error,minimal_ratio,positive,negative,undecided,trace,trace_stderr,verdict"
    )
    assert Path("out.escape.csv").read_text().splitlines()[0] == "distance,loss,loss_stderr"
    assert json.loads(Path("out.json").read_text())["escape"]["gain"] > 0.3
    done = losscli("plot", "out.csv", "-o", "again")
    assert done.status == 0, done.stderr
    assert Path("again.png").read_bytes() == Path("out.png").read_bytes()


# Verdicts near critical points, by closed forms of two weights.


class Polynomial(nn.Module):
    """The loss itself, as a function of w and u."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.w, self.u = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.w, self.u) + 0 * x


def first(outputs: Tensor, _: Tensor) -> Tensor:
    return outputs[:, 0]


def check_polynomial(
    folder: Path,
    function: Callable[[Tensor, Tensor], Tensor],
    w: float,
    u: float,
    dtype: str = "float64",
) -> tuple[str, dict[str, Any], losscli.Result]:
    file = save(folder, "a", w=torch.tensor(w).double(), u=torch.tensor(u).double())
    data = {"all": (torch.ones(4, 1), torch.zeros(4))}
    given = {"model": lambda: Polynomial(function), "data": data, "loss": first, "dtype": dtype}
    result = losscli.check([file], **given, metric=("none",))
    (point,) = result.summary["splits"]["all"]["points"]
    return str(row_of(result)["verdict"]), point, result


def falls(result: losscli.Result) -> tuple[bool, bool]:
    """Whether the escape falls to the negative and to the positive side."""
    table = result.more["escape"]
    distances, losses = np.array(table.floats("distance")), np.array(table.floats("loss"))
    start = losses[distances == 0][0]
    return bool((losses[distances < 0] < start).any()), bool((losses[distances > 0] < start).any())


@pytest.mark.parametrize(
    "function",
    [
        lambda w, u: 9e-4 * w + w**3 + u * u,
        # Far away, behind a hill, there is something lower.
        lambda w, u: 9e-4 * w + w**3 - w**4 / 10 + (u - 3) ** 2,
    ],
)
def test_a_slope_along_negative_curvature_is_not_a_saddle(
    function: Callable[[Tensor, Tensor], Tensor], tmp_path: Path
) -> None:
    u = 3.0 if function(torch.tensor(0.0), torch.tensor(3.0)) == 0 else 0.0
    verdict, point, result = check_polynomial(tmp_path, function, -1e-3, u)
    assert verdict == "undecided"
    slope = 9e-4 + 3e-6
    assert point["reason"].startswith("along the eigenvector v of λ min the loss falls on one side")
    assert f"⟨∇L, v⟩ = {slope:.3g}" in point["reason"]
    assert abs(point["slope_along_lambda_min"]) == pytest.approx(slope, rel=1e-3)
    assert point["sides"]["negative"]["falls"]
    assert result.summary["escape"]["slope"] == point["slope_along_lambda_min"]


@pytest.mark.parametrize(("u", "dtype"), in_turn([0.0, 1e-6, 1e-4], "float32", "float64"))
def test_a_saddle_is_recognised_next_to_its_critical_point(
    u: float, dtype: str, tmp_path: Path
) -> None:
    function = lambda w, u: 1 + w * w - u * u + u**4  # noqa: E731
    verdict, point, result = check_polynomial(tmp_path, function, 0.0, u, dtype)
    assert verdict == "saddle"
    assert point["reason"] is None
    assert falls(result) == (True, True)


def test_a_descent_close_to_a_saddle_is_in_the_table(tmp_path: Path) -> None:
    # To one side the loss falls by 2.5e-7 at 5e-4, to the other far away.
    def function(w: Tensor, u: Tensor) -> Tensor:
        return w * w - u * u + torch.where(u < 0, 2e6 * u**4, u**4 / 100) + 1e-3

    verdict, point, result = check_polynomial(tmp_path, lambda w, u: function(w - 1, u), 1.0, 0.0)
    assert verdict == "saddle"
    assert falls(result) == (True, True)
    assert abs(point["sides"]["positive"]["distance"]) > 100 * abs(
        point["sides"]["negative"]["distance"]
    )


@pytest.mark.parametrize(
    ("sign", "dtype", "expected"),
    in_turn([1, -1], ("float32", "minimum"), ("float64", "undecided")),
)
def test_a_minimum_is_critical_to_the_accuracy_of_the_loss(
    sign: int, dtype: str, expected: str, tmp_path: Path
) -> None:
    # ½ gᵀH⁻¹g is exactly what is left of the parabola: 1.6e-7.
    function = lambda w, u: 1 + sign * (w * w + 5 * u * u)  # noqa: E731
    verdict, point, _ = check_polynomial(tmp_path, function, 4e-4, 0.0, dtype)
    kind = "minimum" if sign > 0 else "maximum"
    assert verdict == (kind if expected == "minimum" else "undecided")
    assert point["predicted"]["change"] == pytest.approx(1.6e-7, rel=1e-6)
    assert point["predicted"]["exact"]
    way = "lower" if sign > 0 else "raise"
    assert (point["reason"] is None) == (verdict == kind)
    if verdict != kind:
        assert point["reason"].startswith(f"a Newton step would {way} the loss by 1.6e-07, and")


NEAR_KINKS: list[tuple[Callable[[Tensor, Tensor], Tensor], str]] = [
    (lambda w, u: w * w + u * u - u.abs(), "undecided"),
    (lambda w, u: w * w + u * u - u.relu(), "undecided"),
    (lambda w, u: w * w + u * u - (-u).relu(), "undecided"),
    # The kink is oblique, or its slope is small compared with the loss.
    (lambda w, u: w * w + u * u - (w - 2 * u).abs() / 10, "undecided"),
    (lambda w, u: 5 + w * w + u * u - u.relu() / 10, "undecided"),
    (lambda w, u: u.abs() - w * w - u * u, "undecided"),
    # The loss rises at the kink, or is smooth.
    (lambda w, u: w * w + u * u + u.abs(), "minimum"),
    (lambda w, u: w * w + u * u + u.relu(), "minimum"),
    (lambda w, u: -w * w - u * u - u.abs(), "maximum"),
    (lambda w, u: w * w + u * u, "minimum"),
    (lambda w, u: 5 + w * w + u * u - u**4, "minimum"),
    # The hill before the fall is lower than rounding.
    (lambda w, u: 1 + w * w + 1e-5 * u * u + u**3, "minimum"),
]


@pytest.mark.parametrize(
    ("function", "expected", "dtype"),
    sample([(*case, dtype) for case in NEAR_KINKS for dtype in ("float32", "float64")], 1),
)
def test_a_minimum_is_not_claimed_where_the_loss_falls_at_a_kink(
    function: Callable[[Tensor, Tensor], Tensor], expected: str, dtype: str, tmp_path: Path
) -> None:
    verdict, point, _ = check_polynomial(tmp_path, function, 0.0, 0.0, dtype)
    assert verdict == expected
    if expected != "undecided":
        assert point["reason"] is None
        return
    assert point["reason"].startswith(("the loss falls by", "the loss rises by"))
    assert point["reason"].endswith(": the point lies on a kink")


class Bowl(nn.Module):
    """f(w) = 1 + w² − |w₇| / 100, with too many weights for a whole Hessian."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1100))

    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.w.square().sum() - self.w[7].abs() / 100).expand(len(x), 1)


def test_a_fall_at_the_kink_of_one_weight_of_many_is_found(tmp_path: Path) -> None:
    file = save(tmp_path, "a", w=torch.zeros(1100))
    data = {"all": (torch.ones(4, 1), torch.zeros(4))}
    result = losscli.check([file], model=Bowl, data=data, loss=first, metric=("none",))
    (point,) = result.summary["splits"]["all"]["points"]
    assert row_of(result)["verdict"] == "undecided"
    assert "along a difference of gradients nearby" in point["reason"]


def test_a_minimum_rounded_for_its_file_is_a_minimum_in_float64(tmp_path: Path) -> None:
    x, y, solution = regression(40, 200)
    file = save(tmp_path, "a", weight=solution.float())
    given = {"model": lambda: linear(40), "data": {"all": (x, y)}, "loss": squared}
    result = losscli.check([file], **given, dtype="float64")
    assert row_of(result)["verdict"] == "minimum"
    (point,) = result.summary["splits"]["all"]["points"]
    left = float((x @ (solution.float().double() - solution).T).square().mean())
    assert point["predicted"]["change"] == pytest.approx(left, rel=1e-3)


def smoothed(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets, label_smoothing=0.1, reduction="none")


@cache
def trained(seed: int) -> tuple[Tensor, Tensor, dict[str, Tensor], np.ndarray]:
    """Data, weights at rest next to a critical point, and the dense Hessian there."""
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (50,), generator=generator)
    torch.manual_seed(seed)
    model = MLP("3-5-3", activation="tanh").double()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=1, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = smoothed(model(x), y).mean()
        loss.backward()
        return loss

    for _ in range(1000):
        optimizer.step(closure)
        closure()
        if sum(float(p.grad.square().sum()) for p in model.parameters()) < 9e-4**2:
            break
    state = model.float().state_dict()
    return x, y, state, dense_hessian_of(smoothed, copy.deepcopy(model).double(), x, y)


@pytest.mark.parametrize(
    ("seed", "dtype"), sample(product((0, 1, 2), ("float32", "float64")), 0, 6)
)
def test_trained_networks_have_no_verdict_that_their_losses_do_not_show(
    seed: int, dtype: str, tmp_path: Path
) -> None:
    x, y, state, hessian = trained(seed)
    file = save(tmp_path, "a", **state)
    result = losscli.check(
        [file], model="mlp:3-5-3,activation=tanh", data={"all": (x, y)}, loss=smoothed, dtype=dtype
    )
    (point,) = result.summary["splits"]["all"]["points"]
    row = row_of(result)
    assert row["lambda_min"] == pytest.approx(float(np.linalg.eigvalsh(hessian)[0]), abs=1e-12)
    assert row["trace"] == pytest.approx(float(np.trace(hessian)), rel=1e-9)
    assert row["verdict"] != "saddle" or falls(result) == (True, True)
    assert row["verdict"] != "minimum" or point["predicted"]["change"] < 1e-5
    assert (point["reason"] is not None) == (row["verdict"] == "undecided")


def test_a_reason_is_in_the_text_and_in_the_summary(losscli: Losscli, folder: Path) -> None:
    Path("mine.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n        self.w = nn.Parameter(torch.zeros(2))\n"
        "    def forward(self, x):\n        w, u = self.w\n"
        "        return 9e-4 * w + w**3 + u * u + 0 * x\n"
        "def loss(outputs, targets):\n    return outputs[:, 0]\n"
        "def data():\n    return {'all': (torch.ones(4, 1), torch.zeros(4))}\n"
    )
    torch.save({"w": torch.tensor([-1e-3, 0.0])}, "a.pt")
    given = ("-m", "mine.py:Net", "-d", "mine.py:data", "--loss", "mine.py:loss")
    given += ("--metric", "none", "--dtype", "float64", "--no-figure")
    done = losscli("check", "a.pt", *given, "-o", "out")
    assert done.status == 0, done.stderr
    (point,) = json.loads(Path("out.json").read_text())["splits"]["all"]["points"]
    assert f"because       {point['reason']}" in done.stdout
    assert "1 side" not in done.stdout


# Derivatives that are not those of the loss.


def test_a_stopped_gradient_is_an_error_of_one_line(losscli: Losscli, folder: Path) -> None:
    case = stopped.case(stopped.STOPPED["straight-through rounding"])
    torch.save(case.state(1), "a.pt")
    Path("mine.py").write_text(
        "from tests import stopped\n"
        "case = stopped.case(stopped.STOPPED['straight-through rounding'])\n"
        "def data():\n    return {'all': (case.inputs, case.targets)}\n"
    )
    done = losscli("check", "a.pt", "-m", "mine.py:case.build", "-d", "mine.py:data", "-o", "out")
    assert done.status == 1
    assert "detached from autograd: slope along" in done.stderr
    assert done.stderr.strip().count("\n") == 0
    assert not [*folder.glob("out*.csv"), *folder.glob("out*.json")]


# Errors of eigenvalues.


@pytest.fixture
def searching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches for eigenvalues as of a network with many weights."""
    monkeypatch.setattr("losscli.evaluation.hessian.critical_points.DENSE_LIMIT", 0)


class Offset(nn.Module):
    """LayerNorm of features with an offset."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(20, 12), nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.body(x) + 1000)))


class Shifted(nn.Module):
    """Logits with an offset, which changes no loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(20, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x))) + 1e5


@cache
def offset_or_shifted(
    model: type[nn.Module],
) -> tuple[Tensor, Tensor, dict[str, Tensor], np.ndarray]:
    """Data, weights, and the dense float64 Hessian; read only."""
    torch.manual_seed(0)
    plain = model()
    state = copy.deepcopy(plain.state_dict())
    x = torch.randn(60, 20, generator=torch.Generator().manual_seed(1))
    y = torch.arange(60) % 5
    return x, y, state, dense_hessian(plain.double(), x.double(), y)


@pytest.mark.usefixtures("searching")
@pytest.mark.parametrize("model", [Offset, pytest.param(Shifted, marks=pytest.mark.stress)])
def test_errors_in_float32_cover_the_eigenvalues_of_the_dense_float64_hessian(
    model: type[nn.Module], tmp_path: Path
) -> None:
    x, y, state, hessian = offset_or_shifted(model)
    file = save(tmp_path, "a", **state)
    result = losscli.check([file], model=model, data={"all": (x, y)}, eigenvalues=2)
    values = np.linalg.eigvalsh(hessian)
    found = result.more["spectrum"]
    expected = [*values[:2], *values[-2:]]
    for value, error, true in zip(
        found.floats("eigenvalue"), found.floats("error"), expected, strict=True
    ):
        assert abs(value - true) <= error
    (point,) = result.summary["splits"]["all"]["points"]
    assert point["rounding_measured_on"] == 60


@pytest.mark.parametrize("only", [(), ("head.*",)])
def test_without_a_copy_errors_cover_the_dense_float64_hessian_and_a_note_says_so(
    only: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of more weights than that, and of fewer: the whole spectrum.
    monkeypatch.setattr("losscli.evaluation.hessian.critical_points.DENSE_LIMIT", 100)
    monkeypatch.setattr(
        "losscli.evaluation.hessian.curvature_check.in_float64", lambda *_, **__: None
    )
    x, y, state, hessian = offset_or_shifted(Offset)
    file = save(tmp_path, "a", **state)
    result = losscli.check([file], model=Offset, data={"all": (x, y)}, only=only)
    # The block of the parameters that move.
    moving = [n.startswith("head") or not only for n, t in state.items() for _ in range(t.numel())]
    values = np.linalg.eigvalsh(hessian[np.ix_(moving, moving)])
    row = row_of(result)
    for end, true in (("lambda_min", values[0]), ("lambda_max", values[-1])):
        assert abs(row[end] - true) <= row[f"{end}_error"]  # type: ignore[operator]
    assert any("no float64 copy" in note for note in result.summary["notes"])


@pytest.mark.parametrize("limited", [False, True])
def test_derivatives_that_cannot_be_verified_are_noted(
    limited: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limited:
        # A copy does not fit into memory.
        monkeypatch.setattr(precision, "host_budget", lambda: 1)
    x, y = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3
    torch.manual_seed(0)
    files = [save(tmp_path, name, **MLP("6-4-3").state_dict()) for name in "ab"]
    study: dict[str, Any] = {"model": "mlp:6-4-3", "data": {"all": (x, y)}, "dtype": "bfloat16"}
    study["only"] = "layers.1.*"
    checked = losscli.check(files[:1], **study)
    line = losscli.interpolate(*files, points=3, derivatives=True, **study)
    for result in (checked, line):
        noted = [note for note in result.summary["notes"] if "not verified" in note]
        assert len(noted) == limited
    (point,) = checked.summary["splits"]["all"]["points"]
    assert bool(point["unverified"]) == limited


@pytest.mark.parametrize(
    "dtype", [pytest.param("float32", marks=pytest.mark.stress), "float64", "bfloat16"]
)
def test_signs_are_those_of_the_float64_hessian_in_every_dtype(dtype: str, tmp_path: Path) -> None:
    # A softmax head is convex, and constant along a shift of all logits: 1 of 4 directions.
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(200, 19, generator=generator), torch.arange(200) % 4
    file = save(tmp_path, "a", **nn.Linear(19, 4).state_dict())
    given = {"model": lambda: nn.Linear(19, 4), "data": {"all": (x, y)}, "dtype": dtype}
    row = row_of(losscli.check([file], **given))
    assert (row["positive"], row["negative"], row["undecided"]) == (0.75, 0, 0.25)
    assert row["minimal_ratio"] == row["positive"]
    assert row["trace_stderr"] == 0


# The limit of stable training.


def write_small() -> None:
    torch.save(MLP("6-4-3").state_dict(), "a.pt")
    inputs = np.random.default_rng(0).random((20, 6))
    np.savez("data.npz", all_inputs=inputs, all_targets=np.arange(20) % 3)


@pytest.mark.parametrize(
    ("momentum", "limit"),
    [(None, 40.0), pytest.param(0.0, 40.0, marks=pytest.mark.stress), (0.9, 76.0)],
)
def test_momentum_raises_the_limit_of_the_largest_eigenvalue(
    momentum: float | None, limit: float, losscli: Losscli, folder: Path
) -> None:
    write_small()
    given = ["-m", "mlp:6-4-3", "-d", "npz:data.npz", "--learning-rate", "0.05", "-o", "out"]
    given += ["--no-figure"]
    given += [] if momentum is None else ["--momentum", str(momentum)]
    done = losscli("check", "a.pt", *given)
    assert done.status == 0, done.stderr
    summary = json.loads(Path("out.json").read_text())
    assert summary["threshold"] == pytest.approx(limit)
    assert summary["momentum"] == momentum
    how = "(2 + 2 · 0.9) / 0.05" if momentum else "2 / 0.05"
    assert f"full-batch training, where λ max is below {limit:g} = {how}" in done.stdout


@pytest.mark.parametrize("given", [["0.9"], ["1", "0.1"], ["-0.1", "0.1"], ["nan", "0.1"]])
def test_an_invalid_momentum_is_refused(given: list[str], losscli: Losscli, folder: Path) -> None:
    momentum, *rate = given
    write_small()
    options = [*(["--learning-rate", *rate] if rate else []), f"--momentum={momentum}"]
    done = losscli("check", "a.pt", "-m", "mlp:6-4-3", "-d", "npz:data.npz", *options, "-o", "out")
    assert done.status == 2
    assert "--momentum" in done.stderr
    assert ("--learning-rate" if not rate else "[0, 1)") in done.stderr
    assert done.stderr.strip().count("\n") == 0
    assert not [*folder.glob("out*")]


def test_the_steps_of_escapes_are_counted_before_a_run(losscli: Losscli, folder: Path) -> None:
    write_small()
    given = ("-m", "mlp:6-4-3", "-d", "npz:data.npz", "--dry-run")
    done = losscli("check", "a.pt", *given, "--json")
    assert done.status == 0, done.stderr
    # Of 25 lengths those to both sides and along the gradient, and the loss that is drawn.
    # A maximum is checked at 6 lengths to both sides along five directions in addition.
    assert json.loads(done.stdout)["steps_at_most"] == 2 * 25 + 5 * 2 * 6 + 2 * 20 + 4
    assert "down −∇L, along v, near extrema: at most 154" in losscli("check", "a.pt", *given).stdout


def normed() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(2, 1, bias=False))


def test_weight_norm_is_flat_along_the_length_that_it_removes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = normed().state_dict()
    file = save(tmp_path, "a", **state)
    x = torch.randn(50, 2, dtype=torch.float64)
    given = {"model": normed, "data": {"all": (x, x @ torch.tensor([[3.0], [1.0]]).double())}}
    only = ("*original1",)
    result = losscli.check([file], **given, loss=squared, dtype="float64", only=only)
    eigenvalues = [row_of(result)["lambda_min"], row_of(result)["lambda_max"]]
    g, v = (state[f"parametrizations.weight.original{k}"].double() for k in (0, 1))

    def loss(v: Tensor) -> Tensor:
        weight = g * v / v.norm()
        return squared(x @ weight.T, given["data"]["all"][1]).mean()  # type: ignore[index]

    expected = np.linalg.eigvalsh(
        torch.autograd.functional.hessian(lambda u: loss(u.view(1, 2)), v.view(-1)).numpy()
    )
    np.testing.assert_allclose(eigenvalues, expected, rtol=1e-9, atol=1e-9)
    assert row_of(result)["verdict"] != "minimum"


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 3, padding_idx=0)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.words(tokens).sum(1)


def test_the_row_of_padding_is_part_of_the_gradient(tmp_path: Path) -> None:
    state = {"words.weight": torch.randn(5, 3, generator=torch.Generator().manual_seed(0))}
    file = save(tmp_path, "a", **state)
    tokens = torch.randint(5, (20, 4), generator=torch.Generator().manual_seed(1))
    targets = torch.arange(20) % 3
    data = {"all": (tokens, targets)}
    result = losscli.check([file], model=Padded, data=data, dtype="float64")
    weight = state["words.weight"].double().requires_grad_()
    loss = nn.functional.cross_entropy(weight[tokens].sum(1), targets)
    (gradient,) = torch.autograd.grad(loss, weight)
    assert row_of(result)["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-10)


class Lying(torch.autograd.Function):
    """A square whose second derivative is wrong."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def, override]
        x, y = ctx.saved_tensors
        return g * y, g * x.detach()


class Misled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return Lying.apply(self.a, self.b) * x  # type: ignore[no-any-return]


def test_a_hessian_that_is_not_symmetric_is_refused(tmp_path: Path) -> None:
    file = save(tmp_path, "a", a=torch.ones(1), b=torch.ones(1))
    x = torch.linspace(1, 2, 9).unsqueeze(1)
    with pytest.raises(ModelError, match="second derivatives of the model are wrong"):
        losscli.check([file], model=Misled, data={"all": (x, 3 * x)}, loss=squared)


def test_a_checkpoint_named_twice_is_refused(tmp_path: Path) -> None:
    x, y, solution = regression()
    file = save(tmp_path, "a", weight=solution)
    given = {"model": linear, "data": {"all": (x, y)}, "loss": squared}
    with pytest.raises(UsageError, match="given 2 times"):
        losscli.check([file, file], **given)


class Caching(nn.Module):
    """Keeps what it computed from its weights at its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 3)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = self.body.weight * 2
        return self.body(x) + x @ self.kept.T


def test_a_model_that_caches_results_of_its_weights_is_refused() -> None:
    torch.manual_seed(0)
    data = {"all": (torch.randn(20, 6), torch.arange(20) % 3)}
    with pytest.raises(ModelError, match="It keeps state computed from earlier weights"):
        losscli.check(Caching().state_dict(), model=Caching, data=data)


class StoppedForOne(nn.Module):
    """Detaches the features of the examples of one kind, which the last input tells."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x[:, :4]).tanh()
        return self.head(torch.where(x[:, 4:] == 1, h.detach(), h))


@pytest.mark.parametrize(
    ("command", "is_sorted", "classes"),
    [
        ("check", True, 4),
        ("interpolate", False, 10),
        *(
            pytest.param(*case, marks=pytest.mark.stress)
            for case in (
                ("check", False, 4),
                ("check", True, 10),
                ("check", False, 10),
                ("interpolate", True, 4),
                ("interpolate", False, 4),
                ("interpolate", True, 10),
            )
        ),
    ],
)
def test_a_gradient_that_is_stopped_for_one_kind_of_examples_is_refused(
    command: str, is_sorted: bool, classes: int
) -> None:
    x = torch.randn(1600, 5, generator=torch.Generator().manual_seed(0))
    kind = torch.arange(1600) % classes
    x[:, 4] = kind.sort().values if is_sorted else kind
    data = {"all": (x, x[:, :3].argmax(1))}
    torch.manual_seed(0)
    ends = [StoppedForOne().state_dict() for _ in range(2)]
    given = {"model": StoppedForOne(), "data": data}
    line = {"points": 2, "range": (0, 1), "derivatives": True}
    runs = {
        "check": lambda: losscli.check(ends[:1], **given),
        "interpolate": lambda: losscli.interpolate(*ends, **given, **line),
    }
    with pytest.raises(ModelError, match="detached from autograd"):
        runs[command]()


class Head(nn.Module):
    """A convex softmax head."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.linear, self.offset = nn.Linear(4, 3), offset

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.offset


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.stress)])
@pytest.mark.parametrize(
    ("offset", "scale"),
    sample([(1e3, 1.0), (1e8, 1.0), (1e5, 1.0), (0.0, 1.0), (0.0, 1e4), (0.0, 1e-4)], 1, 3),
)
def test_a_convex_head_has_no_negative_eigenvalue(offset: float, scale: float, dtype: str) -> None:
    generator = torch.Generator().manual_seed(5)
    x = scale * torch.randn(60, 4, generator=generator)
    y = torch.randint(0, 3, (60,), generator=generator)
    torch.manual_seed(1)
    head = Head(offset)
    given = {"model": head, "data": {"all": (x, y)}, "dtype": dtype}
    table = losscli.check([head.state_dict()], **given).table
    assert table["negative"] == [0.0]
    # The sum of all logits, for each weight of a class, changes no loss: 5 of 15 are zero.
    expected = 10 / 15 if scale <= 1 else 0.0
    assert table["positive"] == [pytest.approx(expected)]


class Stepped(nn.Module):
    """Rounds its features to many levels, with a gradient as if it did not."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.body, self.head, self.levels = nn.Linear(4, 6), nn.Linear(6, 3), levels

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x).tanh()
        return self.head(h + ((h * self.levels).round() / self.levels - h).detach())


@pytest.mark.parametrize(
    "levels", [*(pytest.param(2**k, marks=pytest.mark.stress) for k in (6, 12, 14)), 2**16]
)
def test_a_rounding_to_many_levels_is_reported_as_detached(levels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 4, generator=generator)
    y = torch.randint(0, 3, (16,), generator=generator)
    torch.manual_seed(0)
    state = Stepped(levels).state_dict()
    with pytest.raises(ModelError, match="detached from autograd"):
        losscli.check([state], model=Stepped(levels), data={"all": (x, y)})


class OffsetOfTheExample(nn.Module):
    """Activations that cancel where the last input, which is added to them, is large."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(9, 12), nn.LayerNorm(12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x[:, :9]).tanh() + x[:, 9:]).tanh())


@pytest.mark.usefixtures("searching")
def test_errors_cover_rounding_that_only_the_last_examples_show() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(600, 10, generator=generator)
    x[:, 9] = 3000.0 * (torch.arange(600) >= 300)
    y = torch.randint(0, 4, (600,), generator=generator)
    torch.manual_seed(1)
    model = OffsetOfTheExample()
    found = losscli.check([model.state_dict()], model=model, data={"all": (x, y)}).table
    values = np.linalg.eigvalsh(dense_hessian(copy.deepcopy(model).double(), x.double(), y))
    for end, true in (("lambda_min", values[0]), ("lambda_max", values[-1])):
        (value,), (error,) = found.floats(end), found.floats(f"{end}_error")
        assert abs(value - true) <= error
