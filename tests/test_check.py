"""Verdicts on checkpoints, from files to tables, against closed forms and a dense Hessian."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import losscli
from losscli.errors import ModelError, UsageError
from losscli.models import CNN, MLP
from tests import oracle
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


def test_the_same_point_upside_down_is_a_maximum_and_its_way_down_is_shown(tmp_path: Path) -> None:
    x, y, solution = regression()
    file = save(tmp_path, "a", weight=solution)
    given = {"model": linear, "data": {"all": (x, y)}, "loss": negated, "dtype": "float64"}
    result = losscli.check([file], **given)
    assert row_of(result)["verdict"] == "maximum"
    assert row_of(result)["minimal_ratio"] == 0
    assert "escape" in result.more


def test_beside_the_solution_the_point_is_not_critical_and_a_step_down_is_told(
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


@pytest.mark.parametrize("tolerance", [1e-12, 10.0])
def test_the_tolerance_decides_what_counts_as_critical(tolerance: float, tmp_path: Path) -> None:
    x, y, solution = regression()
    file = save(tmp_path, "a", weight=solution + 1e-3)
    given = {"model": linear, "data": {"all": (x, y)}, "loss": squared, "dtype": "float64"}
    result = losscli.check([file], tolerance=tolerance, **given)
    assert row_of(result)["verdict"] == ("minimum" if tolerance > 1 else "not critical")


def test_a_flat_valley_is_undecided(tmp_path: Path) -> None:
    x, y, solution = regression()
    # Two weights for one feature: along their difference nothing changes.
    twice = torch.cat([x, x[:, :1]], 1)
    file = save(tmp_path, "a", weight=torch.cat([solution, torch.zeros(1, 1)], 1))
    given = {"model": lambda: linear(4), "data": {"all": (twice, y)}, "loss": squared}
    row = row_of(losscli.check([file], **given, dtype="float64"))
    assert row["verdict"] == "undecided"
    assert abs(row["lambda_min"]) <= row["lambda_min_error"]
    assert row["minimal_ratio"] == 0.75


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
    names = [n for n, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def loss(theta: Tensor) -> Tensor:
        parts = torch.split(theta, [s.numel() for s in shapes])
        state = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        outputs = torch.func.functional_call(model, state, (x,))
        return nn.functional.cross_entropy(outputs, y)

    return torch.autograd.functional.hessian(loss, flat).numpy()


@pytest.mark.parametrize("batch_size", [7, 1000])
def test_eigenvalues_by_search_are_those_of_the_dense_hessian(
    batch_size: int, tmp_path: Path
) -> None:
    def build() -> nn.Module:
        return MLP("30-32-5", activation="tanh")

    torch.manual_seed(0)
    state = build().state_dict()
    file = save(tmp_path, "a", **state)
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(33, 30, generator=generator, dtype=torch.float64)
    y = torch.randint(5, (33,), generator=generator)
    model = build().double()
    model.load_state_dict(state)
    values = np.linalg.eigvalsh(dense_hessian(model, x, y))
    assert len(values) > 1000
    result = losscli.check(
        [file],
        model=build,
        data={"all": (x, y)},
        dtype="float64",
        batch_size=batch_size,
        eigenvalues=3,
    )
    assert row_of(result)["minimal_ratio"] is None
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


def test_only_a_block_is_looked_at_where_asked(tmp_path: Path) -> None:
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


def test_batchnorm_and_kinks_are_told_of(tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = save(tmp_path, "a", **CNN("3-4", batchnorm=True, classes=3).state_dict())
    data = {"all": (torch.rand(8, 1, 4, 4), torch.arange(8) % 3)}
    result = losscli.check([file], model="cnn:3-4,batchnorm=true,classes=3", data=data)
    notes = " ".join(result.summary["notes"])
    assert "BatchNorm is in eval mode" in notes
    assert "max_pool2d, relu have kinks" in notes


class Attention(nn.Module):
    """Attends over four tokens of three numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Linear(3, 9)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v).mean(1)


def test_the_kernel_of_attention_is_told_of(tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = save(tmp_path, "a", **Attention().state_dict())
    data = {"all": (torch.rand(8, 4, 3), torch.arange(8) % 3)}
    result = losscli.check([file], model=Attention, data=data)
    assert any("math kernel" in note for note in result.summary["notes"])


def test_several_checkpoints_have_rows_in_their_order_and_the_saddles_way_out(
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


def test_a_loss_that_is_not_finite_decides_nothing(tmp_path: Path) -> None:
    x, y, solution = regression()
    file = save(tmp_path, "a", weight=solution * math.inf)
    given = {"model": linear, "data": {"all": (x, y)}, "loss": squared}
    row = row_of(losscli.check([file], **given))
    assert row["verdict"] == "undecided"
    assert math.isnan(row["loss"])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("tolerance", -1.0),
        ("tolerance", math.nan),
        ("eigenvalues", 0),
        ("learning_rate", 0.0),
        ("sampling_error", 0.1),
    ],
)
def test_options_that_make_no_sense_are_refused(option: str, value: float, tmp_path: Path) -> None:
    x, y, solution = regression()
    file = save(tmp_path, "a", weight=solution)
    given = {"model": linear, "data": {"all": (x, y)}, "loss": squared}
    with pytest.raises(UsageError, match=f"--{option.replace('_', '-')}"):
        losscli.check([file], **given, **{option: value})  # type: ignore[arg-type]


def test_the_samples_saddle_is_one_and_the_picture_is_drawn_again(
    losscli: Losscli, folder: Path
) -> None:
    saddle = ROOT / "sample_checkpoints" / "saddle" / "saddle.pt"
    done = losscli("check", saddle, "--split", "train", "-o", "out")
    assert done.status == 0, done.stderr
    assert "1,438 examples: saddle" in done.stdout
    names = {p.name for p in folder.glob("out*")}
    assert names == {"out.csv", "out.spectrum.csv", "out.escape.csv", "out.json", "out.png"}
    header = Path("out.csv").read_text().splitlines()[0]
    assert header == (
        "checkpoint,split,loss,gradient_norm,lambda_min,lambda_min_error,lambda_max,"
        "lambda_max_error,minimal_ratio,verdict"
    )
    assert Path("out.escape.csv").read_text().splitlines()[0] == "distance,loss,loss_stderr"
    assert json.loads(Path("out.json").read_text())["escape"]["gain"] > 0.3
    done = losscli("plot", "out.csv", "-o", "again")
    assert done.status == 0, done.stderr
    assert Path("again.png").read_bytes() == Path("out.png").read_bytes()


def normed() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(2, 1, bias=False))


def test_weight_norm_is_flat_along_the_length_that_it_takes_out(tmp_path: Path) -> None:
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
    with pytest.raises(UsageError, match="named twice"):
        losscli.check([file, file], **given)
