"""The Hessian preconditioned by Adam, against dense matrices in float64 and closed forms."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import losscli
from losscli.checkpoint import AdamState
from losscli.evaluation.hessian.preconditioned import adam_preconditioner, adam_threshold
from losscli.models import MLP
from losscli.studies import preconditioner
from tests.conftest import ROOT, Losscli
from tests.moments import save_trained, train
from tests.studies.test_check import dense_hessian, dense_hessian_of

COLUMNS = "preconditioned_lambda_max", "preconditioned_lambda_max_error"


def test_the_preconditioner_of_constant_moments_is_that_of_the_formula() -> None:
    state = AdamState(
        *({"a": torch.full((2, 3), 4e-4), "b": torch.tensor([0.0, 1.0])}, {"a": 10, "b": 1}),
        *(1e-3, (0.9, 0.99), 1e-2, False, 0.0, "names"),
    )
    found = adam_preconditioner(state)
    by_hand = (1 - 0.9**10) * (math.sqrt(4e-4 / (1 - 0.99**10)) + 1e-2)
    assert found["a"].flatten().tolist() == pytest.approx([by_hand] * 6, rel=1e-6)
    # After one step v is 0.01 g², so that √(v / 0.01) = 10.
    assert found["b"].tolist() == pytest.approx([0.1 * 1e-2, 0.1 * (10 + 1e-2)], rel=1e-6)
    assert adam_threshold(1e-3, 0.9) == pytest.approx(38_000)
    assert adam_threshold(0.1, 0.0) == pytest.approx(20)


def test_a_step_of_adam_is_that_of_the_preconditioner() -> None:
    # θ₊ = θ − η P⁻¹ m, with the first moment m: P is what torch divides by, whatever the options.
    for kind, options in (
        (torch.optim.Adam, {}),
        (torch.optim.AdamW, {"weight_decay": 0.0, "betas": (0.7, 0.95), "eps": 1e-3}),
        (torch.optim.Adam, {"amsgrad": True}),
    ):
        torch.manual_seed(0)
        model = MLP("4-3-2").double()
        optimizer = kind(model.named_parameters(), lr=0.01, **options)
        x, y = torch.rand(9, 4).double(), torch.arange(9) % 2
        train(model, x, y, 4, optimizer)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        train(model, x, 1 - y, 1, optimizer)
        amsgrad = bool(options.get("amsgrad"))
        key = "max_exp_avg_sq" if amsgrad else "exp_avg_sq"
        moments = {name: optimizer.state[p] for name, p in model.named_parameters()}
        group = optimizer.param_groups[0]
        diagonal = adam_preconditioner(
            AdamState(
                *({n: m[key] for n, m in moments.items()}, dict.fromkeys(moments, 5)),
                *(0.01, group["betas"], group["eps"], amsgrad, 0.0, "names"),
            )
        )
        for name, parameter in model.named_parameters():
            expected = before[name] - 0.01 * moments[name]["exp_avg"] / diagonal[name]
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-9, atol=1e-12)


def trained(
    widths: str, kind: Any, x: Tensor, y: Tensor, **options: Any
) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = MLP(widths, activation="tanh")
    optimizer = kind(model.parameters(), lr=0.01, **options)
    train(model, x, y, 40, optimizer)
    return model, optimizer


def dense_eigenvalue(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, names: list[str]
) -> float:
    """λ_max of P^-½ H P^-½ from the optimiser itself, for some parameters."""
    roots, chosen = [], []
    (group,) = optimizer.param_groups
    (beta1, beta2), key = group["betas"], "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"
    for name, parameter in model.named_parameters():
        moments = optimizer.state[parameter]
        t = int(moments["step"])
        root = (moments[key].double() / (1 - beta2**t)).sqrt() + group["eps"]
        roots.append(((1 - beta1**t) * root).flatten() ** -0.5)
        chosen.append(torch.full_like(roots[-1], name in names))
    scale, keep = torch.cat(roots).numpy(), torch.cat(chosen).bool().numpy()
    matrix = scale[:, None] * dense_hessian(model.double(), x.double(), y) * scale
    return float(np.linalg.eigvalsh(matrix[np.ix_(keep, keep)])[-1])


@pytest.mark.parametrize(
    ("dense", "kind", "options", "only"),
    [
        (1000, torch.optim.AdamW, {"amsgrad": True, "eps": 1e-4, "betas": (0.8, 0.95)}, ()),
        pytest.param(0, torch.optim.Adam, {}, (), marks=pytest.mark.stress),
        (0, torch.optim.Adam, {"weight_decay": 1e-2}, ("layers.1.*",)),
    ],
)
def test_the_eigenvalue_is_that_of_the_dense_matrix(
    dense: int,
    kind: Any,
    options: dict[str, Any],
    only: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Larger models are computed in float32.
    monkeypatch.setattr("losscli.evaluation.hessian.critical_points.DENSE_LIMIT", dense)
    x = torch.rand(60, 8, generator=torch.Generator().manual_seed(3))
    y = x[:, :4].argmax(1)
    model, optimizer = trained("8-6-4", kind, x, y, **options)
    state = optimizer.state_dict()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = losscli.check(
        {"model": weights, "optimizer": state},
        model="mlp:8-6-4,activation=tanh",
        data={"first": (x[:45], y[:45]), "all": (x, y)},
        optimizer="adam",
        only=only,
    )
    names = [name for name in weights if not only or name.startswith("layers.1.")]
    for row, size in zip(result.table.records(), (45, 60), strict=True):
        truth = dense_eigenvalue(model, optimizer, x[:size], y[:size], names)
        value, error = (row[column] for column in COLUMNS)
        assert abs(value - truth) <= error
        assert error < (1e-9 if dense else 2e-3) * truth
    (preconditioner,) = result.summary["preconditioners"]
    betas = options.get("betas", (0.9, 0.999))
    assert preconditioner == {
        "checkpoint": "checkpoint 0",
        "step": 40,
        "learning_rate": 0.01,
        "beta1": betas[0],
        "beta2": betas[1],
        "epsilon": options.get("eps", 1e-8),
        "amsgrad": "amsgrad" in options,
        "matched_by": "shapes",
        "weight_decay": options.get("weight_decay", 0.01 if kind is torch.optim.AdamW else 0.0),
        "threshold": pytest.approx((2 + 2 * betas[0]) / ((1 - betas[0]) * 0.01)),
    }
    notes = " ".join(result.summary["notes"])
    assert "matched with parameters by order and shape" in notes
    assert ("weight decay of 0.01 is not part of the loss" in notes) == (
        preconditioner["weight_decay"] > 0
    )


@pytest.mark.usefixtures("folder")
def test_a_path_has_thresholds_and_an_empty_cell_before_the_first_step(losscli: Losscli) -> None:
    Path("run").mkdir()
    for steps, rate in ((0, 0.1), (2, 0.1), (5, 0.05)):
        save_trained(f"run/step-{steps}.pt", steps, lr=rate)
    given = ("--optimizer", "adam", "--split", "train", "--limit", "9", "--no-figure")
    done = losscli("check", "run", "init:3", *given, "-o", "out")
    assert done.status == 0, done.stderr
    rows = [line.split(",") for line in Path("out.csv").read_text().splitlines()]
    places = [rows[0].index(column) for column in COLUMNS]
    assert rows[0][-1] == "verdict"
    empty = {row[0]: not any(row[at] for at in places) for row in rows[1:]}
    assert empty == {
        "init:3": True, "run/step-0.pt": True, "run/step-2.pt": False, "run/step-5.pt": False
    }  # fmt: skip
    summary = json.loads(Path("out.json").read_text())
    assert (summary["optimizer"], summary["threshold"]) == ("adam", None)
    found = {p["checkpoint"]: p.get("threshold") for p in summary["preconditioners"]}
    assert found["run/step-2.pt"] == pytest.approx(380)
    assert found["run/step-5.pt"] == pytest.approx(760)
    assert found["run/step-0.pt"] is found["init:3"] is None
    assert "of the threshold 380 = (2 + 2 · 0.9) / ((1 − 0.9) · 0.1)" in done.stdout
    assert "full-batch training with Adam" in done.stdout
    assert "the threshold of full-batch training with Adam" in done.stderr
    assert "run/step-0.pt and 1 more has taken no step: P is not defined there" in done.stderr
    # The learning rate of the user is taken for that of training.
    given += ("--learning-rate", "0.2", "-o", "other")
    assert losscli("check", "run/step-5.pt", *given).status == 0
    summary = json.loads(Path("other.json").read_text())
    assert summary["preconditioners"][0]["threshold"] == pytest.approx(190)
    assert any("η) = 190, the threshold of full-batch" in note for note in summary["notes"])


@pytest.mark.usefixtures("folder")
def test_a_learning_rate_that_has_decayed_to_zero_has_no_threshold(losscli: Losscli) -> None:
    save_trained("end.pt", lr=0.0)
    given = ("--optimizer", "adam", "--split", "train", "--no-figure", "-o", "out")
    done = losscli("check", "end.pt", *given)
    assert done.status == 0, done.stderr
    assert "without a threshold: the learning rate is 0" in done.stdout


def without_moments() -> None:
    torch.manual_seed(0)
    torch.save({"state_dict": MLP("6-5-3").state_dict(), "losscli.model": "mlp:6-5-3"}, "x.pt")


def ambiguous() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3))
    # The first two biases have the same shape.
    parameters = list(model.parameters())
    groups = parameters[::2], parameters[1:2], parameters[3::2]
    optimizer = torch.optim.Adam([{"params": group} for group in groups])
    train(model, torch.rand(20, 6), torch.arange(20) % 3, 1, optimizer)
    names = (f"layers.{i}.{kind}" for i in range(3) for kind in ("weight", "bias"))
    state = dict(zip(names, model.state_dict().values(), strict=True))
    content = {"state_dict": state, "optimizer": optimizer.state_dict()}
    torch.save({**content, "losscli.model": "mlp:6-5-5-3"}, "x.pt")


def altered(change: Callable[[dict[str, Any]], None], **options: Any) -> Callable[[], None]:
    def write() -> None:
        save_trained("x.pt", **options)
        content = torch.load("x.pt", weights_only=True)
        change(content["optimizer"])
        torch.save(content, "x.pt")

    return write


def quantise(state: dict[str, Any]) -> None:
    for moments in state["state"].values():
        moments["exp_avg_sq"] = moments["exp_avg_sq"].to(torch.uint8)


def kill_a_moment(state: dict[str, Any]) -> None:
    # Training with eps = 0 would make weights that are not finite.
    for group in state["param_groups"]:
        group["eps"] = 0.0
    state["state"][0]["exp_avg_sq"][0, 0] = 0


def raise_a_rate(state: dict[str, Any]) -> None:
    group = state["param_groups"][0]
    first = {**group, "params": [0], "param_names": group["param_names"][:1], "lr": 1.0}
    group["params"], group["param_names"] = group["params"][1:], group["param_names"][1:]
    state["param_groups"].insert(0, first)


BAD: dict[str, tuple[Callable[[], None], list[str], int, str]] = {
    "no moments": (without_moments, [], 1, "x.pt has no state of an optimiser"),
    "no step": (lambda: save_trained("x.pt", 0), [], 1, "of x.pt has taken no step"),
    "ambiguous": (ambiguous, [], 1, "do not match those of the model in only one way"),
    "8-bit": (altered(quantise), [], 1, "quantised moments (8-bit)"),
    "eps": (altered(kill_a_moment), [], 1, "P has zeros, since eps is 0"),
    "rates": (altered(raise_a_rate), [], 1, "groups of parameters with different learning rates"),
    "momentum": (
        lambda: save_trained("x.pt"),
        ["--momentum", "0.9"],
        2,
        "--momentum has no effect with --optimizer adam",
    ),
    "another": (
        lambda: save_trained("x.pt"),
        ["--optimizer", "sgd"],
        2,
        "--optimizer sgd is not known",
    ),
}


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("case", BAD)
def test_an_unusable_state_of_an_optimiser_is_refused_in_one_line(
    case: str, losscli: Losscli, folder: Path
) -> None:
    write, options, status, text = BAD[case]
    write()
    done = losscli("check", "x.pt", "--optimizer", "adam", *options, "-o", "out")
    assert done.status == status
    assert text in done.stderr
    assert done.stderr.strip().count("\n") == 0
    assert not [*folder.glob("out*")]


@pytest.mark.usefixtures("folder")
def test_moments_that_change_during_a_run_are_an_error(
    losscli: Losscli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(**options: Any) -> None:
        save_trained("x.pt", **options)
        content = torch.load("x.pt", weights_only=True)
        torch.save(content["state_dict"], "saved/pytorch_model.bin")
        torch.save(content["optimizer"], "saved/optimizer.pt")

    Path("saved").mkdir()
    write()
    given = ("check", "saved", "-m", "mlp:6-5-3", "--optimizer", "adam", "--split", "train")
    assert losscli(*given, "--no-figure", "-o", "out").status == 0
    plan = preconditioner.AdamPreconditioner.plan

    def plan_and_change(*planned: Any) -> Any:
        found = plan(*planned)
        write(eps=1e-3)
        return found

    monkeypatch.setattr(preconditioner.AdamPreconditioner, "plan", plan_and_change)
    done = losscli(*given, "-o", "other")
    assert done.status == 1
    assert "saved was changed while losscli read it" in done.stderr
    assert not [*Path().glob("other*")]


@pytest.mark.usefixtures("folder")
def test_the_products_are_counted_before_a_run(losscli: Losscli) -> None:
    save_trained("x.pt")
    given = ("check", "x.pt", "--split", "train", "--dry-run", "--json")
    plain, adam = (
        json.loads(losscli(*given, *more).stdout) for more in ([], ["--optimizer", "adam"])
    )
    assert adam["products_at_most"] == plain["products_at_most"] + 1001
    assert adam["identity"] != plain["identity"]


CHEBYSHEV = ROOT / "sample_checkpoints" / "chebyshev"


@pytest.mark.parametrize("is_whole", [False, pytest.param(True, marks=pytest.mark.stress)])
def test_gradient_descent_stays_at_two_over_its_learning_rate(
    is_whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_whole:
        monkeypatch.setattr("losscli.evaluation.hessian.critical_points.DENSE_LIMIT", 0)
    files = [CHEBYSHEV / "gd-0.05" / "path" / f"step-{t:05}.safetensors" for t in (200, 4000)]
    result = losscli.check([str(file) for file in files], learning_rate=0.05)
    edge = result.summary["threshold"]
    assert edge == pytest.approx(40)
    early, late = result.table.floats("lambda_max")
    assert early < 0.4 * edge
    assert late == pytest.approx(edge, rel=0.02)
    if is_whole:
        # The minimal ratio is known, since the whole spectrum is.
        assert all(0 < ratio < 1 for ratio in result.table.floats("minimal_ratio"))


@pytest.mark.parametrize(
    "steps", [(200, 4000), pytest.param((1400,), marks=pytest.mark.stress)], ids=str
)
def test_adam_stays_at_its_threshold_and_has_the_dense_eigenvalues(
    steps: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("losscli.evaluation.hessian.critical_points.DENSE_LIMIT", 0)
    files = [CHEBYSHEV / "adam" / "path" / f"step-{t:05}.pt" for t in steps]
    result = losscli.check([str(file) for file in files], optimizer="adam")
    values = result.table.floats(COLUMNS[0])
    edges = [state["threshold"] for state in result.summary["preconditioners"]]
    assert edges == pytest.approx([38_000] * len(steps))
    for step, value in zip(steps, values, strict=True):
        low, high = (0, 0.1) if step == 200 else (0.9, 1.05)
        assert low < value / edges[0] < high
    # As a plain loop has them, in float64.
    x = torch.linspace(-1, 1, 20).view(-1, 1)
    y = 4 * x**3 - 3 * x
    for file, value, error in zip(files, values, result.table.floats(COLUMNS[1]), strict=True):
        content = torch.load(file, weights_only=True)
        model = MLP("1-20-20-1", activation="tanh").double()
        model.load_state_dict(content["state_dict"])
        matrix = dense_hessian_of(
            lambda outputs, targets: (outputs - targets).square(), model, x.double(), y.double()
        )
        moments = content["optimizer"]["state"]
        t = int(moments[0]["step"])
        v = torch.cat([moments[i]["exp_avg_sq"].double().flatten() for i in range(len(moments))])
        p = (1 - 0.9**t) * ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        scale = p.numpy() ** -0.5
        truth = np.linalg.eigvalsh(scale[:, None] * matrix * scale)[-1]
        assert abs(value - truth) <= error < 1e-3 * truth
