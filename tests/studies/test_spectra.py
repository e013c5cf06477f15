"""Spectral density, traces and blocks of a check, against dense matrices in float64."""

from __future__ import annotations

import copy
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import losscli
from losscli.errors import UsageError
from losscli.models import MLP
from losscli.registry import COMMANDS
from tests.conftest import Losscli
from tests.studies.test_check import dense_hessian, save

MODEL = "mlp:8-12-12-4,activation=tanh"
BLOCKS = ["layers.0", "layers.1", "layers.2"]
SIZES = [8 * 12 + 12, 12 * 12 + 12, 12 * 4 + 4]


@cache
def network() -> tuple[Tensor, Tensor, nn.Module, NDArray[np.float64]]:
    """Data, a network that is half trained, and its dense Hessian."""
    torch.manual_seed(0)
    model = MLP("8-12-12-4", activation="tanh").double()
    x = torch.rand(40, 8, dtype=torch.float64)
    y = x[:, :4].argmax(1)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(40):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    return x, y, model, dense_hessian(copy.deepcopy(model), x, y)


@cache
def checked(operator: str) -> tuple[Any, NDArray[np.float64]]:
    """A check with everything, as of a network with many weights, and the dense matrix."""
    x, y, model, hessian = network()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("losscli.evaluation.hessian.critical_points.DENSE_LIMIT", 0)
        result = losscli.check(
            {name: tensor.clone() for name, tensor in model.state_dict().items()},
            model=MODEL,
            data={"all": (x, y)},
            dtype="float64",
            density=True,
            blocks=True,
            probes=5,
            lanczos=25,
            operator=operator,
        )
    return result, hessian if operator == "hessian" else dense_gauss_newton(model, x)


def dense_gauss_newton(model: nn.Module, x: Tensor) -> NDArray[np.float64]:
    """Jᵀ (∂²L/∂z²) J, by the closed form diag(p) − ppᵀ of cross entropy."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def outputs(theta: Tensor) -> Tensor:
        parts = theta.split([shape.numel() for shape in shapes.values()])
        state = {n: p.view(shapes[n]) for n, p in zip(shapes, parts, strict=True)}
        return torch.func.functional_call(model, state, (x,))

    p = outputs(flat).softmax(1)
    inner = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / len(x)
    jacobian = torch.autograd.functional.jacobian(outputs, flat, vectorize=True)
    return torch.einsum("nci,ncd,ndj->ij", jacobian, inner, jacobian).numpy()


@pytest.mark.parametrize("operator", ["hessian", "ggn"])
def test_the_density_is_that_of_the_dense_matrix(operator: str) -> None:
    result, matrix = checked(operator)
    values = np.linalg.eigvalsh(matrix)
    (point,) = result.summary["splits"]["all"]["points"]
    density = point["density"]
    table = result.more["density"]
    assert table.columns == ("checkpoint", "split", "lambda", "density")
    grid, found = (np.array(table.floats(column)) for column in ("lambda", "density"))
    assert np.trapezoid(found, grid) == pytest.approx(1, abs=1e-5)
    # The same probes: n times the mean is their trace.
    mean = np.trapezoid(found * grid, grid)
    assert mean * len(matrix) == pytest.approx(density["trace"], abs=1e-3)
    assert grid[0] < values[0] < values[-1] < grid[-1]
    assert (values[-1] - values[0]) / 300 == pytest.approx(density["sigma"], rel=0.01)
    bells = np.exp(-(((grid[:, None] - values) / density["sigma"]) ** 2) / 2).mean(1)
    exact = bells / (density["sigma"] * math.sqrt(2 * math.pi))
    assert np.trapezoid(abs(found - exact), grid) < 0.05
    assert len(density["outliers"]) >= 3
    for outlier in density["outliers"]:
        assert np.abs(values - outlier).min() < density["sigma"]
    assert density["outliers"][0] == pytest.approx(values[-1], abs=density["sigma"])
    assert (result.summary["operator"], result.summary["probes"]) == (operator, 5)
    assert result.summary["lanczos"] == 25


@pytest.mark.parametrize("operator", ["hessian", "ggn"])
def test_traces_are_within_their_errors(operator: str) -> None:
    result, matrix = checked(operator)
    (row,) = result.table.records()
    (point,) = result.summary["splits"]["all"]["points"]
    assert (row["trace"], row["trace_stderr"]) == (
        point["density"]["trace"],
        point["density"]["trace_stderr"],
    )
    assert row["trace_stderr"] < 0.3 * row["trace"]
    assert abs(row["trace"] - np.trace(matrix)) < 3 * row["trace_stderr"]
    ends = np.cumsum([0, *SIZES])
    for i, block in enumerate(result.more["curvature"].records()):
        own = matrix[ends[i] : ends[i + 1], ends[i] : ends[i + 1]]
        assert abs(block["trace"] - np.trace(own)) < 3 * block["trace_stderr"]


@pytest.mark.parametrize("operator", ["hessian", "ggn"])
def test_blocks_have_the_eigenvalues_and_gradients_of_the_dense_blocks(operator: str) -> None:
    result, matrix = checked(operator)
    (row,) = result.table.records()
    blocks = result.more["curvature"].records()
    assert [block["block"] for block in blocks] == BLOCKS
    ends = np.cumsum([0, *SIZES])
    for i, block in enumerate(blocks):
        own = matrix[ends[i] : ends[i + 1], ends[i] : ends[i + 1]]
        true = float(np.linalg.eigvalsh(own)[-1])
        assert abs(block["lambda_max"] - true) <= block["lambda_max_error"] + 1e-12
        assert block["lambda_max_error"] < 1e-3 * true
    norms = [block["gradient_norm"] for block in blocks]
    assert math.hypot(*norms) == pytest.approx(row["gradient_norm"], rel=1e-12)


def test_verdict_and_extreme_eigenvalues_are_those_of_the_hessian_for_every_operator() -> None:
    (one,), (other,) = (checked(operator)[0].table.records() for operator in ("hessian", "ggn"))
    for row in (one, other):
        del row["trace"], row["trace_stderr"]
    assert one == other
    notes = checked("ggn")[0].summary["notes"]
    assert any("are those of the Gauss-Newton matrix" in note for note in notes)


def test_a_layer_of_a_relu_network_has_the_same_block_in_both_matrices(tmp_path: Path) -> None:
    # The outputs are piecewise linear in the weights of one layer, so both blocks are the same.
    torch.manual_seed(0)
    file = save(tmp_path, "a", **MLP("4-3-3-3").state_dict())
    data = {"all": (torch.rand(12, 4), torch.arange(12) % 3)}
    given: dict[str, Any] = {
        "model": "mlp:4-3-3-3",
        "data": data,
        "dtype": "float64",
        "batch_size": 8,
    }
    one, other = (
        losscli.check(file, **given, blocks=True, probes=2, operator=operator).more["curvature"]
        for operator in ("hessian", "ggn")
    )
    assert one["block"] == other["block"]
    assert len(one["block"]) > 2
    for column in ("gradient_norm", "lambda_max", "trace", "trace_stderr"):
        assert one.floats(column) == pytest.approx(other.floats(column), rel=1e-8)


def small(number: int = 1, splits: str | None = "all", **more: Any) -> Any:
    """A check of some checkpoints of a small network, on one split or on both."""
    torch.manual_seed(0)
    data = {
        "all": (torch.rand(20, 6), torch.arange(20) % 3),
        "b": (torch.rand(9, 6), torch.ones(9).long()),
    }
    states = [MLP("6-4-3", activation="tanh").state_dict() for _ in range(number)]
    given = {"model": "mlp:6-4-3,activation=tanh", "data": data, "split": splits}
    return losscli.check(states, **given, **more)


def test_the_trace_of_the_hessian_of_a_small_network_is_exact() -> None:
    result = small(2, None, density=True, blocks=True, probes=5, lanczos=3)
    assert result.table.floats("trace_stderr") == [0.0] * 4
    exact = np.array(result.table.floats("trace"))
    points = [p for s in ("all", "b") for p in result.summary["splits"][s]["points"]]
    for point in points:
        (row,) = [
            row
            for row in result.table.records()
            if (row["checkpoint"], row["split"]) == (point["checkpoint"], point["split"])
        ]
        density = point["density"]
        assert abs(density["trace"] - row["trace"]) < 4 * density["trace_stderr"]
    blocks = result.more["curvature"]
    assert blocks["block"] == ["layers.0", "layers.1"] * 4
    together = np.array(blocks.floats("trace")).reshape(4, 2).sum(1)
    errors = np.hypot(*np.array(blocks.floats("trace_stderr")).reshape(4, 2).T)
    assert np.all(np.abs(together - exact) < 4 * errors)
    # By checkpoints, then splits, as in the main table.
    keys = list(zip(result.table["checkpoint"], result.table["split"], strict=True))
    for table in (blocks, result.more["density"]):
        assert list(dict.fromkeys(zip(table["checkpoint"], table["split"], strict=True))) == keys


def test_blocks_without_a_density_give_the_trace_as_their_sum() -> None:
    result = small(blocks=True, operator="ggn", probes=4)
    assert list(result.more) == ["spectrum", "escape", "curvature"]
    assert result.table.floats("trace") == pytest.approx(
        [sum(result.more["curvature"].floats("trace"))], rel=1e-9
    )
    assert all(0 < error < math.inf for error in result.table.floats("trace_stderr"))
    assert (result.summary["probes"], result.summary["lanczos"]) == (4, None)
    assert result.summary["splits"]["all"]["points"][0]["density"] is None


def test_one_probe_has_no_error() -> None:
    result = small(density=True, blocks=True, probes=1, lanczos=4, operator="ggn")
    assert set(result.table["trace_stderr"]) == {None}
    assert set(result.more["curvature"]["trace_stderr"]) == {None}
    assert any("one probe gives no standard error" in note for note in result.summary["notes"])


def test_a_basis_that_does_not_fit_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("losscli.evaluation.hessian.spectral_density.host_budget", lambda: 0)
    result = small(density=True, probes=2, lanczos=20)
    assert any("2 of 20 Lanczos vectors fit into memory" in n for n in result.summary["notes"])
    table = result.more["density"]
    grid, found = (np.array(table.floats(column)) for column in ("lambda", "density"))
    trace = result.summary["splits"]["all"]["points"][0]["density"]["trace"]
    assert np.trapezoid(found, grid) == pytest.approx(1, abs=1e-5)
    assert np.trapezoid(found * grid, grid) * 43 == pytest.approx(trace, abs=1e-3)


def test_a_loss_that_is_not_finite_has_no_density() -> None:
    states = MLP("6-4-3").state_dict()
    states["layers.0.weight"] = torch.full((4, 6), math.inf)
    data = {"all": (torch.rand(20, 6), torch.arange(20) % 3)}
    result = losscli.check(states, model="mlp:6-4-3", data=data, density=True, blocks=True)
    assert result.more["density"].rows == ()
    (row,) = result.table.records()
    assert math.isnan(row["trace"])
    (point,) = result.summary["splits"]["all"]["points"]
    assert point["density"]["outliers"] == []
    text = COMMANDS["check"].as_text(result)
    assert "outliers      unknown: the spectrum is not finite\n" in text
    # No probe takes more steps than there are parameters.
    assert result.summary["lanczos"] == 6 * 4 + 4 + 4 * 3 + 3
    assert "43 Lanczos steps each" in text
    assert any("not finite at 1 of 1 points" in note for note in result.summary["notes"])


BAD = [
    ({"probes": 3}, "--probes has no effect without --density or --blocks"),
    ({"operator": "ggn"}, "--operator has no effect without --density or --blocks"),
    ({"lanczos": 30}, "--lanczos has no effect without --density"),
    ({"lanczos": 30, "blocks": True}, "--lanczos has no effect without --density"),
    ({"density": True, "probes": 0}, "--probes must be between 1 and 10,000, not 0"),
    ({"density": True, "lanczos": 1}, "--lanczos must be between 2 and 10,000, not 1"),
    ({"density": True, "lanczos": 10**9}, "--lanczos must be between 2 and 10,000"),
    ({"density": True, "operator": "fisher"}, "--operator fisher is not known"),
    ({"density": True, "sampling_error": 0.1}, "--sampling-error is not available"),
]


@pytest.mark.parametrize(("options", "said"), BAD, ids=[said for _, said in BAD])
def test_invalid_options_are_refused(
    options: dict[str, Any], said: str, losscli: Losscli, folder: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        small(**options)
    flags = [f"--{name.replace('_', '-')}" for name in options]
    words = [
        word
        for flag, value in zip(flags, options.values(), strict=True)
        for word in ([flag] if value is True else [flag, value])
    ]
    before = set(folder.iterdir())
    done = losscli("check", "a.pt", *words)
    assert done.status == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert set(folder.iterdir()) == before


def test_outputs_that_are_not_one_tensor_have_no_gauss_newton_matrix(
    losscli: Losscli, folder: Path
) -> None:
    (folder / "pair.py").write_text(
        "import torch\n"
        "from losscli.models import MLP\n"
        "class Pair(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layers = MLP('6-5-3').layers\n"
        "    def forward(self, x):\n"
        "        z = self.layers[1](self.layers[0](x))\n"
        "        return z, z\n"
        "def loss(outputs, targets):\n"
        "    return torch.nn.functional.cross_entropy(outputs[0], targets, reduction='none')\n"
    )
    model = ("-m", "pair.py:Pair", "--loss", "pair.py:loss", "--metric", "none")
    before = {p.name for p in folder.iterdir()}
    done = losscli("check", "a.pt", *model, "--density", "--operator", "ggn", "-q")
    assert done.status == 2
    assert (
        "--operator ggn needs one tensor of outputs, and the model returns a tuple" in done.stderr
    )
    assert len(done.stderr.splitlines()) == 1
    assert {p.name for p in folder.iterdir()} - before <= {"__pycache__"}


@pytest.mark.usefixtures("unlaid")
def test_files_text_and_the_figure_of_a_run_that_is_drawn_again(
    losscli: Losscli, folder: Path
) -> None:
    given = ("check", "a.pt", "--split", "test", "-o", "out")
    options = ("--density", "--blocks", "--probes", 2, "--lanczos", 9)
    done = losscli(*given, *options, "--operator", "ggn")
    assert done.status == 0, done.stderr
    assert "spectrum        of the Gauss-Newton matrix, by 2 probes, 9 Lanczos steps each" in (
        done.stdout
    )
    assert "  trace " in done.stdout
    assert "  layers.0 " in done.stdout
    names = {p.name for p in folder.glob("out*")}
    assert {"out.density.csv", "out.curvature.csv", "out.png"} <= names
    told = json.loads((folder / "out.json").read_text())
    assert told["tables"][-2:] == ["density", "curvature"]
    drawn = (folder / "out.png").read_bytes()
    again = losscli("plot", "out.csv", "-o", "again")
    assert again.status == 0, again.stderr
    assert (folder / "again.png").read_bytes() == drawn
    # A run without them leaves none behind.
    done = losscli(*given, "--limit", 3, "--force", "--no-figure", "-q")
    assert done.status == 0, done.stderr
    assert not {"out.density.csv", "out.curvature.csv"} & {p.name for p in folder.glob("out*")}


def test_a_dry_run_counts_products_memory_and_blocks(losscli: Losscli, folder: Path) -> None:
    plain, more = (
        json.loads(losscli("check", "a.pt", "b.pt", *words, "--dry-run", "--json").stdout)
        for words in ((), ("--density", "--blocks", "--probes", 3, "--lanczos", 20))
    )
    # Two checkpoints on two splits: 20 steps of each probe; and of each block at most all rows, a
    # product with each probe, and one that measures λ max.
    added = 4 * (3 * 20 + (35 + 3 + 1) + (18 + 3 + 1))
    assert more["products_at_most"] - plain["products_at_most"] == added
    assert more["bytes_of_basis"] == 8 * 53 * 20
    assert more["blocks"] == ["layers.0", "layers.1"]
    assert more["estimate"]["seconds"] > plain["estimate"]["seconds"]
    said = losscli("check", "a.pt", "--density", "--dry-run").stdout
    assert "basis        0.0 MiB of Lanczos vectors" in said
