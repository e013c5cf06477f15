"""Models and losses that differentiate themselves, as physics-informed networks do."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import losscli
from losscli.errors import LossError, ModelError
from tests import oracle
from tests.cases import in_turn

X = torch.linspace(-1, 1, 24)[:, None]
TARGETS = torch.zeros(24, 1)


def second_derivative(u: Tensor, x: Tensor) -> Tensor:
    first = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
    return torch.autograd.grad(first.sum(), x, create_graph=True)[0]


def source(x: Tensor) -> Tensor:
    return math.pi**2 * torch.sin(math.pi * x)


class Solution(nn.Module):
    """Returns u(x) and x."""

    def __init__(self) -> None:
        super().__init__()
        self.u = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, x: Tensor) -> Any:
        x = x.requires_grad_(True)
        return self.u(x), x


class Residual(Solution):
    """Returns the residual of u'' + π² sin πx = 0."""

    def forward(self, x: Tensor) -> Tensor:
        u, x = super().forward(x)
        return second_derivative(u, x) + source(x)


class Detached(Solution):
    """Differentiates what it has detached."""

    def forward(self, x: Tensor) -> Tensor:
        u, x = super().forward(x)
        return second_derivative(u.detach(), x)


def squared_residual(outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    u, x = outputs
    return (second_derivative(u, x) + source(x)).square().mean(1)


def squared_residual_of_detached(outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    u, x = outputs
    return squared_residual((u.detach(), x), targets)


def state(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return Solution().state_dict()


def truth(weights: oracle.State) -> float:
    model = Solution().double()
    model.load_state_dict(weights)
    return float(squared_residual(model(X.double()), TARGETS).mean().detach())


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    paths = [str(tmp_path / f"{seed}.pt") for seed in range(2)]
    for seed, path in enumerate(paths):
        torch.save(state(seed), path)
    return paths


KINDS: dict[str, dict[str, Any]] = {
    "in forward": {"model": Residual},
    "in the loss": {"model": Solution, "loss": squared_residual},
}


@pytest.mark.parametrize(("kind", "size"), in_turn(KINDS, 5, 24))
def test_the_line(kind: str, size: int, files: list[str]) -> None:
    study = {**KINDS[kind], "data": {"t": (X, TARGETS)}, "batch_size": size}
    found = losscli.interpolate(*files, points=5, dtype="float64", **study)
    for alpha, loss in zip(found.table["alpha"], found.table["loss"], strict=True):
        weights = oracle.blend(state(0), state(1), float(alpha))  # type: ignore[arg-type]
        assert loss == pytest.approx(truth(weights), rel=1e-10)
    single = losscli.interpolate(*files, points=5, **study)
    assert single.table["loss"] == pytest.approx(found.table["loss"], rel=1e-4)
    assert not X.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_the_plane_and_the_hessian(kind: str, files: list[str]) -> None:
    study = {**KINDS[kind], "data": {"t": (X, TARGETS)}, "dtype": "float64"}
    plane = losscli.plane(files[:1], points=3, **study)
    (own,) = (r["loss"] for r in plane.table.records() if (r["x"], r["y"]) == (0, 0))
    assert own == pytest.approx(truth(state(0)), rel=1e-10)
    checked = losscli.check(files[:1], **study)
    names, shapes = zip(*((n, p.shape) for n, p in Solution().named_parameters()), strict=True)
    flat = torch.cat([state(0)[name].double().flatten() for name in names])

    def loss(values: Tensor) -> Tensor:
        parts = values.split([math.prod(shape) for shape in shapes])
        weights = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        x = X.double().requires_grad_(True)
        u, _ = torch.func.functional_call(Solution().double(), weights, x)
        return (second_derivative(u, x) + source(x)).square().mean()

    values = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat))
    (row,) = checked.table.records()
    assert row["lambda_min"] == pytest.approx(float(values[0]), rel=1e-8)
    assert row["lambda_max"] == pytest.approx(float(values[-1]), rel=1e-8)


@pytest.mark.parametrize(
    ("model", "loss", "error", "what"),
    [
        (Detached, "mse", ModelError, "the model fails on inputs of shape [24, 1]"),
        (Solution, squared_residual_of_detached, LossError, "the loss fails"),
    ],
)
def test_an_error_says_how_to_get_missing_gradients(
    model: Callable[[], nn.Module],
    loss: Any,
    error: type[Exception],
    what: str,
    files: list[str],
) -> None:
    with pytest.raises(error) as refused:
        losscli.interpolate(*files, points=3, model=model, loss=loss, data={"t": (X, TARGETS)})
    told = str(refused.value)
    assert told.startswith(f"{what}: RuntimeError: element 0 of tensors does not require grad")
    assert "use neither torch.no_grad() nor detach() on the way" in told


def test_outputs_of_inference_mode_are_evaluated_and_not_differentiated(files: list[str]) -> None:
    class Inference(Solution):
        def forward(self, x: Tensor) -> Tensor:
            with torch.inference_mode():
                return self.u(x)

    study: dict[str, Any] = {"model": Inference, "data": {"t": (X, TARGETS)}}
    found = losscli.interpolate(*files, points=3, loss=lambda o, t: (o - t)[:, 0] ** 2, **study)
    model = Solution()
    model.load_state_dict(state(0))
    expected = model.u(X).square().mean().item()
    assert found.table["loss"][found.table["alpha"].index(0)] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ModelError, match="derivatives"):
        losscli.interpolate(*files, points=3, derivatives=True, **study)
