"""Products with the Gauss-Newton matrix, against one made of a dense Jacobian in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.func import functional_call

from losscli.data import DataSet, Split
from losscli.data.split import Batches
from losscli.evaluation.hessian.curvature import Curvature
from losscli.evaluation.hessian.gauss_newton import GaussNewton
from losscli.evaluation.losses.built_in import LOSSES
from losscli.evaluation.objective import Objective
from losscli.evaluation.task_checks import check_task
from losscli.models import MLP
from tests.cases import Case, sample
from tests.evaluation.hessian.test_curvature import SEEN, parameters_of, random, relative
from tests.evaluation.test_objective import objective_of

SMALL = [case for case in SEEN if sum(p.numel() for p in case.build().parameters()) <= 330]


def gauss_newton_of(case: Case, dtype: torch.dtype = torch.float64) -> GaussNewton:
    objective, state = objective_of(case, dtype=dtype, batch_size=8), case.state(1)
    check_task(objective, state)
    names = parameters_of(objective.model)
    return GaussNewton(objective, state, names, objective.splits["all"])


def dense(
    model: nn.Module, inputs: object, loss: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Jᵀ (∂²L/∂z²) J and z, in float64, with L the mean loss as a function of all outputs."""
    model = model.double().eval()
    parameters = dict(model.named_parameters())
    sizes = [p.numel() for p in parameters.values()]
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})

    def outputs(flat: Tensor) -> Tensor:
        parts = zip(parameters.items(), flat.split(sizes), strict=True)
        named = {name: part.view(p.shape) for (name, p), part in parts}
        z = functional_call(model, named, copy.deepcopy(args), copy.deepcopy(kwargs))
        return getattr(z, "logits", z)

    point = torch.cat([p.detach().reshape(-1) for p in parameters.values()])
    z = outputs(point).detach()
    jacobian = torch.autograd.functional.jacobian(outputs, point).reshape(z.numel(), -1)
    inner = torch.autograd.functional.hessian(loss, z).reshape(z.numel(), z.numel())
    return jacobian.T @ inner @ jacobian, z


def wide(x: object) -> object:
    if isinstance(x, dict):
        return {name: wide(value) for name, value in x.items()}
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


@pytest.mark.parametrize("case", sample(SMALL, 0), ids=str)
def test_a_product_is_that_of_the_dense_matrix(case: Case) -> None:
    model = case.build().double()
    state = case.state(1)
    model.load_state_dict({n: t.double() if t.is_floating_point() else t for n, t in state.items()})
    targets = wide(case.targets)
    matrix, _ = dense(model, wide(case.inputs), lambda z: case.per_example(z, targets).mean())
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        product = gauss_newton_of(case, dtype)
        v = random(product.size)
        assert relative(product.product(v), matrix @ v) < tolerance


def test_weights_of_examples_count() -> None:
    torch.manual_seed(0)
    model, inputs = MLP("4-6-3", activation="tanh"), random(30, 4)
    targets = torch.arange(30) % 3
    targets[::7] = -100
    weight = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z, targets, weight)

    matrix, _ = dense(model, inputs, loss)
    data = DataSet({"all": Split(inputs, targets)})
    options = {"weight": tuple(weight.tolist()), "ignore_index": -100}
    objective = Objective(
        MLP("4-6-3", activation="tanh"),
        partial(LOSSES["cross_entropy"], **options),
        {},
        data,
        device=torch.device("cpu"),
        dtype=torch.float64,
        batch_size=7,
    )
    product = GaussNewton(objective, state, list(state), objective.splits["all"])
    v = random(product.size)
    assert relative(product.product(v), matrix @ v) < 1e-12


def test_of_a_loss_of_whole_batches_it_is_the_mean_over_batches() -> None:
    def contrast(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))

    torch.manual_seed(0)
    model, inputs = MLP("4-6-3", activation="tanh").double(), random(30, 4)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = DataSet({"all": Batches.of(Split(inputs, torch.zeros(30)), 10)})
    objective = Objective(
        *(MLP("4-6-3", activation="tanh"), contrast, {}, data),
        device=torch.device("cpu"),
        dtype=torch.float64,
        batch_loss=True,
    )
    with GaussNewton(objective, state, list(state), objective.splits["all"]) as product:
        v = random(product.size)
        parts = [dense(model, part, lambda z: contrast(z, z))[0] @ v for part in inputs.split(10)]
        # The third product takes the gradients that the second one kept.
        for _ in range(3):
            assert relative(product.product(v), sum(parts) / 3) < 1e-12


def test_of_a_random_model_it_is_the_mean_over_seeds() -> None:
    class Noisy(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.dropout(x, 0.3, training=True))

    class Seeded(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.model, self.seed = Noisy("4-6-3", activation="tanh").double(), seed
            self.model.load_state_dict(state)

        def forward(self, x: Tensor) -> Tensor:
            torch.manual_seed(self.seed)
            out: Tensor = self.model(x)
            return out

    torch.manual_seed(0)
    inputs, targets = random(9, 4), torch.arange(9) % 3
    state = MLP("4-6-3", activation="tanh").double().state_dict()
    objective = Objective(
        *(Noisy("4-6-3", activation="tanh"), LOSSES["cross_entropy"], {}),
        DataSet({"all": Split(inputs, targets)}),
        device=torch.device("cpu"),
        dtype=torch.float64,
        seeds=(4, 5),
    )
    with GaussNewton(objective, state, list(state), objective.splits["all"]) as product:
        v = random(product.size)
        parts = [
            dense(Seeded(seed), inputs, lambda z: F.cross_entropy(z, targets))[0] @ v
            for seed in (4, 5)
        ]
        assert relative(product.product(v), sum(parts) / 2) < 1e-12


def test_of_a_linear_model_it_is_the_hessian() -> None:
    case = next(case for case in SEEN if case.name == "mlp-linear-mse")
    objective, state = objective_of(case, dtype=torch.float64), case.state(1)
    names, split = parameters_of(objective.model), objective.splits["all"]
    v = random(10)
    found = GaussNewton(objective, state, names, split).product(v)
    assert relative(found, Curvature(objective, state, names, split).product(v)) < 1e-12


def test_a_loss_that_is_linear_in_the_outputs_has_none() -> None:
    case = next(case for case in SEEN if case.name == "mlp-relu")
    objective, state = objective_of(case, dtype=torch.float64), case.state(1)
    objective.loss = lambda outputs, _: outputs.sum(1)
    names, split = parameters_of(objective.model), objective.splits["all"]
    product = GaussNewton(objective, state, names, split).product
    assert not product(random(sum(state[n].numel() for n in names))).any()
