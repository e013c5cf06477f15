"""Sharpness, from files to tables, against closed forms, dense Hessians and the oracle."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import losscli
from losscli.errors import ModelError
from losscli.models import MLP
from losscli.registry import COMMANDS, command_of
from losscli.results.result import Result
from losscli.table import Table
from losscli.weight_space.directions import gaussian_direction
from tests import oracle
from tests.cases import CASES, Case, sample
from tests.conftest import Losscli
from tests.studies.sample import SAMPLE
from tests.studies.test_plane import options, save

CASE = {case.name: case for case in CASES}
LINEAR, TANH = CASE["mlp-linear-mse"], CASE["mlp-tanh-bce"]

State = dict[str, Tensor]


def trained(case: Case) -> list[str]:
    """The parameters, each tied one once."""
    names = [n for n, _ in case.build().named_parameters()]
    return ["head.weight" if (case.name, n) == ("attention-tied", "embedding.weight") else n
            for n in names]  # fmt: skip


def losses_at(case: Case, state: State, step: State) -> list[float]:
    there = {n: t.double() if t.is_floating_point() else t for n, t in state.items()}
    for name, u in step.items():
        there[name] = there[name] + u.double()
    if case.name == "attention-tied":
        there["embedding.weight"] = there["head.weight"]
    return oracle.losses(case.build, there, case.inputs, case.targets, case.per_example)


def gradient(case: Case, state: State) -> State:
    """∇L in float64, by one backward pass over all examples."""
    model = case.build().double().eval()
    model.load_state_dict(state)

    def wide(x: Any) -> Any:
        return x.double() if x.is_floating_point() else x

    if isinstance(case.inputs, dict):
        outputs = model(**{key: wide(x) for key, x in case.inputs.items()})
    else:
        outputs = model(wide(case.inputs))
    case.per_example(outputs, wide(case.targets)).mean().backward()
    tensors = dict(model.named_parameters(remove_duplicate=False))
    zero = torch.zeros(())
    return {n: zero if (g := tensors[n].grad) is None else g for n in trained(case)}


def scaled(step: State, factor: float) -> State:
    return {name: factor * t.double() for name, t in step.items()}


def length(step: State) -> float:
    return math.sqrt(math.fsum(float(t.double().square().sum()) for t in step.values()))


def rises(case: Case, state: State, step: State) -> list[float]:
    pairs = zip(losses_at(case, state, step), losses_at(case, state, {}), strict=True)
    return [there - here for there, here in pairs]


def rows(result: Result[Any], **cells: Any) -> list[dict[str, Any]]:
    found = result.table.records()
    return [row for row in found if all(row[key] == cell for key, cell in cells.items())]


# --- Against plain loops -------------------------------------------------------------------------


# No gradient reaches the weights of the others in eval mode, and check refuses them too.
UNREACHED = {"folding", "threaded", "differentiating"}
DIFFERENTIABLE = [case for case in SAMPLE if case.id not in UNREACHED]


@pytest.mark.parametrize("case", sample(DIFFERENTIABLE, 0))
def test_every_number_is_that_of_a_plain_float64_loop(case: Case, tmp_path: Path) -> None:
    (file,) = save(case, tmp_path, 1)
    more = {"rho": [0.1], "samples": 2, "dtype": "float64"}
    result = losscli.sharpness(file, **options(case, **more))
    state, slope = case.state(1), gradient(case, case.state(1))
    size = length(slope)
    for row in result.table.records():
        draws = [
            oracle.mean(rises(case, state, scaled(z, row["rho"])))
            for k in range(2)
            for z in [gaussian_direction(state, trained(case), 0, k)]
        ]
        assert row["average"] == pytest.approx(oracle.mean(draws), rel=1e-9, abs=1e-12)
        assert row["average_stderr"] == pytest.approx(abs(draws[0] - draws[1]) / 2, rel=1e-7)
        uphill = rises(case, state, scaled(slope, row["rho"] / size))
        assert row["sam"] == pytest.approx(oracle.mean(uphill), rel=1e-9, abs=1e-12)
        assert row["sam_stderr"] == pytest.approx(oracle.standard_error(uphill), rel=1e-7)
        assert row["worst"] >= row["sam"]
        step = row["critical_step"]
        assert row["critical_sharpness"] == 2 / step

        def rise(eta: float) -> float:
            return oracle.mean(rises(case, state, scaled(slope, -eta)))

        assert rise(step * (1 + 1e-5)) > 0 > rise(step * (1 - 1e-5))
    (point,) = result.summary["splits"]["all"]["points"]
    assert point["gradient_norm"] == pytest.approx(size, rel=1e-9)
    assert point["loss"] == pytest.approx(oracle.mean(losses_at(case, state, {})), rel=1e-9)
    assert result.summary["endpoint_difference"] <= 1e-12


def dense(case: Case, state: State) -> tuple[np.ndarray, np.ndarray]:
    """The gradient and the dense Hessian in float64, row by row by torch.autograd.grad."""
    model = case.build().double()
    model.load_state_dict(state)
    parameters = list(model.parameters())
    loss = case.per_example(model(case.inputs.double()), case.targets.double()).mean()

    def flat(value: Tensor) -> Tensor:
        parts = torch.autograd.grad(value, parameters, create_graph=True, materialize_grads=True)
        return torch.cat([part.reshape(-1) for part in parts])

    slope = flat(loss)
    return slope.detach().numpy(), torch.stack([flat(x) for x in slope]).detach().numpy()


def largest_in_ball(slope: np.ndarray, hessian: np.ndarray, radius: float) -> float:
    """The largest gᵀδ + ½ δᵀHδ with ‖δ‖ = ρ: (μ − H) δ = g with μ > λ_max (Moré & Sorensen)."""
    values, vectors = np.linalg.eigh(hessian)
    along = vectors.T @ slope
    low, high = values[-1] + 1e-13, values[-1] + np.linalg.norm(slope) / radius + 1
    for _ in range(200):
        middle = (low + high) / 2
        long = np.linalg.norm(along / (middle - values)) > radius
        low, high = (middle, high) if long else (low, middle)
    delta = along / (high - values)
    return float(along @ delta + values @ delta**2 / 2)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_closed_forms_of_a_quadratic_loss(dtype: str, tmp_path: Path) -> None:
    (file,) = save(LINEAR, tmp_path, 1)
    more = {"rho": [0.05, 0.5], "samples": 100, "dtype": dtype}
    result = losscli.sharpness(file, **options(LINEAR, **more))
    slope, hessian = dense(LINEAR, LINEAR.state(1))
    precision = {"float32": 1e-4, "float64": 1e-7}[dtype]
    curvature = slope @ hessian @ slope / (slope @ slope)
    for row in result.table.records():
        rho = row["rho"]
        assert row["critical_sharpness"] == pytest.approx(curvature, rel=precision / 10)
        expected = rho**2 * np.trace(hessian) / 2
        assert abs(row["average"] - expected) <= 3 * row["average_stderr"] < expected
        sam = rho * np.linalg.norm(slope) + rho**2 * curvature / 2
        assert row["sam"] == pytest.approx(sam, rel=precision)
        worst = largest_in_ball(slope, hessian, rho)
        assert sam < 0.999 * worst
        assert row["worst"] == pytest.approx(worst, rel=2e-3)
        assert row["worst"] <= worst * (1 + precision)
    (point,) = result.summary["splits"]["all"]["points"]
    assert point["critical_sharpness_error"] <= max(precision, 2e-6) * curvature


def rescaled(state: State, factor: float) -> State:
    """The same function: a ReLU layer times a factor, the next one divided by it."""
    first, second, *_ = [n.removesuffix(".weight") for n in state if n.endswith(".weight")]
    factors = {f"{first}.weight": factor, f"{first}.bias": factor, f"{second}.weight": 1 / factor}
    return {name: t.double() * factors.get(name, 1.0) for name, t in state.items()}


def test_only_adaptive_measures_are_invariant_to_rescaling() -> None:
    case = CASE["mlp-relu"]
    states = [rescaled(case.state(1), 1.0), rescaled(case.state(1), 3.0)]
    for adaptive in (True, False):
        more = {"rho": 0.1, "samples": 2, "dtype": "float64", "adaptive": adaptive}
        one, other = (
            losscli.sharpness(state, **options(case, **more)).table.records()[0] for state in states
        )
        for column in ("average", "worst", "sam"):
            same = one[column] == pytest.approx(other[column], rel=1e-9)
            assert same is adaptive, column
        assert one["critical_sharpness"] != pytest.approx(other["critical_sharpness"], rel=1e-2)


SAMPLES = Path(__file__).parents[2] / "sample_checkpoints"


@pytest.mark.parametrize(
    ("name", "critical", "sam"),
    [
        pytest.param("relu/final.pt", 0.607, 0.00131, marks=pytest.mark.stress),
        ("relu-adam/final.pt", 2.153, 0.00582),
        pytest.param("relu/path/step-00099.pt", 5.50, 0.04221, marks=pytest.mark.stress),
    ],
)
def test_sample_checkpoints_have_the_sharpness_that_was_computed_separately(
    name: str, critical: float, sam: float
) -> None:
    result = losscli.sharpness(SAMPLES / name, split="train", samples=1)
    (row,) = result.table.records()
    assert row["critical_sharpness"] == pytest.approx(critical, abs=5e-4 if critical < 5 else 5e-3)
    assert row["sam"] == pytest.approx(sam, abs=5e-6)


# --- The critical step ---------------------------------------------------------------------------


def test_a_crossing_that_float32_cannot_resolve_is_found_in_float64(tmp_path: Path) -> None:
    """Close to a minimum of a loss of 1 the differences are 1e-8 of it."""
    torch.manual_seed(0)
    inputs = torch.randn(64, 3)
    noise = torch.randn(64, 1)
    weights = torch.tensor([[1.0, -2.0, 0.5]])
    targets = inputs @ weights.T + noise
    best = torch.linalg.lstsq(inputs.double(), targets.double()).solution.T
    state = {"weight": (best + 1e-5).float()}
    slope, hessian = (
        2 / 64 * inputs.double().T @ (inputs.double() @ state["weight"].double().T - targets),
        2 / 64 * inputs.double().T @ inputs.double(),
    )
    expected = float(slope.T @ hessian @ slope / slope.square().sum())
    given = {"model": lambda: nn.Linear(3, 1, bias=False), "data": {"all": (inputs, targets)}}
    result = losscli.sharpness(state, **given, loss="mse", samples=1)
    (row,) = result.table.records()
    assert row["critical_sharpness"] == pytest.approx(expected, rel=1e-3)
    note = "some differences of losses are within the rounding of float32: give --dtype float64"
    small = losscli.sharpness(state, **given, loss="mse", samples=1, rho=1e-7)
    assert note in "; ".join(small.summary["notes"])
    assert note not in "; ".join(result.summary["notes"])


def test_relative_critical_sharpness(tmp_path: Path) -> None:
    (file,) = save(LINEAR, tmp_path, 1)
    inputs, targets = LINEAR.inputs, LINEAR.targets
    # The second split wants the opposite of what the first does.
    own = LINEAR.build()
    own.load_state_dict(LINEAR.state(1))
    away = (2 * own(inputs) - targets).detach()
    near = targets + 0.1
    data = {"one": (inputs, targets), "near": (inputs, near), "away": (inputs, away)}
    more = {"samples": 1, "dtype": "float64", "direction_split": "one"}
    result = losscli.sharpness(file, **options(LINEAR, **more) | {"data": data})
    plain = losscli.sharpness(file, **options(LINEAR, samples=1, dtype="float64"))
    critical = {row["split"]: row["critical_sharpness"] for row in result.table.records()}
    assert critical["one"] == plain.table.records()[0]["critical_sharpness"]
    slope, hessian = dense(LINEAR, LINEAR.state(1))
    other = Case("near", LINEAR.build, inputs, near, "mse")
    along, _ = dense(other, LINEAR.state(1))
    expected = (slope @ hessian @ slope) / (along @ slope)
    assert critical["near"] == pytest.approx(expected, rel=1e-7)
    (row,) = rows(result, split="away")
    assert (row["critical_step"], row["critical_sharpness"]) == (0, math.inf)
    notes = "; ".join(result.summary["notes"])
    assert "along the negative gradient of one: relative critical sharpness" in notes
    assert f"away, {file}: the loss rises at once along the other gradient" in notes
    assert "inf: the loss rises at once" in COMMANDS["sharpness"].as_text(result)


# --- What has no number --------------------------------------------------------------------------


def test_a_zero_gradient_has_no_sam_and_no_critical_sharpness() -> None:
    """θ = 0 is a saddle of a product: its gradient is 0 and its Hessian is not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 1, bias=False)).double()
    inputs = torch.randn(40, 3, dtype=torch.float64)
    targets = inputs.sum(1, keepdim=True)
    state = {name: torch.zeros_like(t) for name, t in model.state_dict().items()}
    given = {"model": model, "data": {"all": (inputs, targets)}, "loss": "mse"}
    result = losscli.sharpness(state, **given, dtype="float64", rho=1e-2)
    (row,) = result.table.records()
    assert [row[name] for name in ("sam", "sam_stderr", "critical_step", "critical_sharpness")] == [
        None
    ] * 4
    # The largest eigenvalue of the Hessian at 0 is the norm of Xᵀy · 2/N.
    largest = float(2 / 40 * (inputs.T @ targets).norm())
    assert row["worst"] == pytest.approx(1e-4 * largest / 2, rel=1e-2)
    notes = "; ".join(result.summary["notes"])
    assert "no critical step, because the gradient is 0" in notes
    assert "no SAM sharpness, because the gradient is 0" in notes
    assert "not known: zero gradient" in COMMANDS["sharpness"].as_text(result)
    assert "SAM" not in COMMANDS["sharpness"].as_text(result)
    # Weights of 0 do not move where perturbations are scaled by them.
    still = losscli.sharpness(state, **given, dtype="float64", adaptive=True)
    (row,) = still.table.records()
    assert (row["average"], row["worst"], row["sam"]) == (0, 0, None)
    assert "no SAM sharpness, because the gradient · |θ| is 0" in "; ".join(still.summary["notes"])


def test_losses_that_are_not_finite_do_not_affect_the_other_numbers(tmp_path: Path) -> None:
    names = save(TANH, tmp_path, 1, 2)
    broken = {n: torch.full_like(t, math.nan) for n, t in TANH.state(1).items()}
    torch.save(broken, tmp_path / "broken.pt")
    whole = losscli.sharpness(names, **options(TANH, samples=2))

    def overflowing(outputs: Tensor, targets: Tensor) -> Tensor:
        loss = nn.functional.binary_cross_entropy_with_logits(
            outputs[:, 0], targets.float(), reduction="none"
        )
        return torch.where(outputs[:, 0].abs() > 3, math.inf, loss)

    given = options(TANH, samples=2, rho=[0.05, 50.0]) | {"loss": overflowing}
    result = losscli.sharpness([*names, str(tmp_path / "broken.pt")], **given)
    for name in names:
        near, far = rows(result, checkpoint=name)
        (expected,) = rows(whole, checkpoint=name)
        for column in ("average", "worst", "sam"):
            assert near[column] == pytest.approx(expected[column], rel=1e-5)
            assert not math.isfinite(far[column])
    near, far = rows(result, checkpoint=str(tmp_path / "broken.pt"))
    assert math.isnan(near["average"])
    assert near["critical_step"] is None
    notes = "; ".join(result.summary["notes"])
    assert f"all, {names[0]} and 2 more: the loss is not finite at some perturbations" in notes
    again = Table.from_csv(iter(result.table.to_csv().splitlines(keepends=True)), "x")
    assert again.columns == result.table.columns


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)).detach() + 0.1 * self.a(x))


def test_a_wrong_gradient_is_an_error() -> None:
    torch.manual_seed(0)
    data = {"all": (torch.randn(40, 4), torch.arange(40) % 3)}
    model = Detached()
    with pytest.raises(ModelError, match="detach"):
        losscli.sharpness(model.state_dict(), model=model, data=data, samples=1)


# --- Choices -------------------------------------------------------------------------------------


def test_draws_do_not_depend_on_their_number_or_on_other_checkpoints(tmp_path: Path) -> None:
    one, two = save(TANH, tmp_path, 1, 2)
    alone = losscli.sharpness(two, **options(TANH, samples=1, rho=0.1))
    both = losscli.sharpness([one, two], **options(TANH, samples=1, rho=[0.1, 0.05]))
    (expected,) = alone.table.records()
    (found,) = rows(both, checkpoint=two, rho=0.1)
    for column in ("average", "worst", "sam", "critical_sharpness"):
        assert found[column] == pytest.approx(expected[column], rel=1e-5)
    assert found["average_stderr"] is None
    assert "one random perturbation has no standard error" in "; ".join(alone.summary["notes"])


def test_only_chosen_parameters_move_and_statistics_stay(tmp_path: Path) -> None:
    case = CASE["cnn-batchnorm"]
    (file,) = save(case, tmp_path, 1)
    name = trained(case)[0]
    more = {"only": name, "samples": 1, "dtype": "float64", "rho": 0.1}
    (row,) = losscli.sharpness(file, **options(case, **more)).table.records()
    slope = {name: gradient(case, case.state(1))[name]}
    expected = oracle.mean(rises(case, case.state(1), scaled(slope, 0.1 / length(slope))))
    assert row["sam"] == pytest.approx(expected, rel=1e-9)
    again = losscli.sharpness(file, **options(case, samples=1) | {"buffers": "recalibrate"})
    notes = "; ".join(again.summary["notes"])
    assert "around a checkpoint BatchNorm's statistics stay those re-estimated at it" in notes


def test_learning_rates_are_those_of_the_metadata(tmp_path: Path) -> None:
    for number, entry in enumerate([{"learning_rate": 0.1}, {"lr": "0.2"}, {"lr": "warmup"}, {}]):
        torch.save({"state_dict": TANH.state(number), **entry}, tmp_path / f"{number}.pt")
    files = [str(tmp_path / f"{number}.pt") for number in range(4)]
    result = losscli.sharpness(files, **options(TANH, samples=1))
    assert result.summary["learning_rates"] == {files[0]: 0.1, files[1]: 0.2}


# --- The command line ----------------------------------------------------------------------------


def test_files_text_and_json(folder: Path, losscli: Losscli) -> None:
    run = ["sharpness", "a.pt", "b.pt", "--samples", 3, "--rho", 0.1, "--rho", 0.05, "-o", "out"]
    done = losscli(*run, "--no-figure")
    assert done.status == 0
    table = Table.read(folder / "out.csv")
    assert command_of(table.columns) is COMMANDS["sharpness"]
    assert table.columns == (
        *("checkpoint", "split", "rho", "average", "average_stderr", "worst", "worst_stderr"),
        *("sam", "sam_stderr", "critical_step", "critical_sharpness"),
    )
    assert [row[:3] for row in table.rows[:3]] == [
        ("a.pt", "train", 0.05), ("a.pt", "train", 0.1), ("a.pt", "test", 0.05),
    ]  # fmt: skip
    for word in (
        "radius ρ        0.05, 0.1\n",
        "worst-case    at least ",
        " at ρ = 0.1, 3 draws",
        ": the smallest step found that raises the loss is ",
    ):
        assert word in done.stdout
    assert "sharpness does not correlate well with generalisation (And" in done.stderr
    assert "arXiv 2302.07011" in done.stderr
    assert "they are not comparable at the same ρ" in done.stderr
    small = ["sharpness", "a.pt", "--samples", 1, "--split", "test", "-o"]
    one = losscli(*small, "small", "--json", "--no-figure")
    assert one.stdout.count("\n") == 1
    assert json.loads(one.stdout)["rho"] == [0.05]
    out = losscli(*small, "-", "-q")
    assert out.stdout.encode() == (folder / "small.csv").read_bytes()


def test_a_dry_run_counts_gradients(folder: Path, losscli: Losscli) -> None:
    run = ["sharpness", "a.pt", "b.pt", "--samples", 3, "--rho", 0.1, "--rho", 0.05, "--dry-run"]
    plan = json.loads(losscli(*run, "--json").stdout)
    assert (plan["points"], plan["estimate"]["kind"]) == (2 + 2 * 3 * 2, "about")
    assert plan["gradients_at_most"] == 4 * (1 + 2 * 21)
    assert "gradients    at most 172, and about " in losscli(*run).stdout
    assert not [*folder.glob("sharpness*")]


ERRORS = [
    ("a.pt a.pt", 2, "a.pt is given 2 times. Give each checkpoint once"),
    ("missing.pt", 1, "there is no checkpoint missing.pt"),
    ("a.pt other.pt", 1, "other.pt does not fit the model"),
    ("a.pt --rho 0", 2, "--rho must be above 0 and finite, not 0. Give 0.05"),
    ("a.pt --rho 0.1 --rho -1", 2, "--rho must be above 0 and finite, not -1"),
    ("a.pt --rho nan", 2, "--rho must be above 0 and finite, not nan"),
    ("a.pt --rho inf", 2, "--rho must be above 0 and finite, not inf"),
    ("a.pt --rho 0.1 --rho 0.10", 2, "--rho 0.1 is given 2 times. Give each radius once"),
    ("a.pt --samples 0", 2, "--samples must be at least 1, not 0. Give 20"),
    ("a.pt --samples 99999999", 2, "--samples 99999999 gives more than 10000000 points"),
    ("a.pt --sampling-error 0.1", 2, "--sampling-error is not available for sharpness"),
    ("a.pt --direction-split x", 2, "--direction-split x is not evaluated. Choose one of train,"),
    ("a.pt --split test --direction-split train", 2, "or add it with --split"),
    (
        *("a.pt --direction-split train --direction-split test", 2),
        "--direction-split is given 2 times. Give one split",
    ),
    ("a.pt --only *.x", 2, "the pattern '*.x' matches none"),
]


@pytest.mark.parametrize(("command", "status", "words"), ERRORS, ids=lambda x: str(x)[:40])
def test_errors_are_one_line_and_write_nothing(
    command: str, status: int, words: str, folder: Path, losscli: Losscli
) -> None:
    torch.save(MLP("3-2").state_dict(), "other.pt")
    before = sorted(folder.iterdir())
    done = losscli("sharpness", *command.split())
    assert (done.status, done.stdout) == (status, "")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(folder.iterdir()) == before
