"""TF32 on a GPU, simulated on a processor: factors of products are rounded to 11 bits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import losscli
from losscli.evaluation.derivatives import method as derivative_method
from losscli.evaluation.hessian.curvature import Curvature
from losscli.evaluation.objective import AGREEMENT, Objective, relative_difference
from losscli.evaluation.strategies.base import Strategy
from losscli.evaluation.strategies.first_layer import FirstLayer
from losscli.evaluation.strategy_choice import find_strategy
from losscli.evaluation.task_checks import check_task
from losscli.studies import refiner, verification
from losscli.weight_space.curve import relative_rounding
from tests.cases import CASES, Case
from tests.conftest import Losscli
from tests.evaluation.test_objective import ALPHAS, line_of, objective_of

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.convolution}
_BITS = 13  # float32 has 24 significant bits, TF32 has 11


def _rounded(value: object) -> object:
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return value
    bits = value.contiguous().view(torch.int32)
    return ((bits + (1 << _BITS - 1)) >> _BITS << _BITS).view(torch.float32)


class Tf32(TorchDispatchMode):
    """Rounds the factors of products in float32, as the tensor cores of a GPU do in TF32."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func.overloadpacket in _PRODUCTS:
            args = tree_map(_rounded, args)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def _tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets this device round as a GPU in TF32, and without threads, which have modes of their own.

    The property says so only on a GPU, of which there may be none.
    """
    monkeypatch.setattr(
        Objective,
        "factor_type",
        property(lambda o: torch.float16 if o.tf32 and o.dtype == torch.float32 else o.dtype),
    )
    monkeypatch.setattr(
        "losscli.evaluation.strategy_choice.candidates",
        lambda _: [Strategy.SHARED, Strategy.BOUND],
    )


@pytest.mark.parametrize(
    ("device", "dtype", "tf32", "precision"),
    [
        ("cuda", torch.float32, True, "tf32"),
        ("cuda", torch.float32, False, "float32"),
        ("cuda", torch.float64, True, "float64"),
        ("cuda", torch.bfloat16, True, "bfloat16"),
        ("cpu", torch.float32, True, "float32"),
        ("mps", torch.float32, True, "float32"),
    ],
)
def test_a_gpu_rounds_factors_to_tf32_in_float32_only(
    device: str, dtype: torch.dtype, tf32: bool, precision: str
) -> None:
    objective = objective_of(CASES[0], dtype=dtype)
    objective.device, objective.tf32 = torch.device(device), tf32
    assert objective.precision == precision
    assert torch.finfo(objective.factor_type).eps == (
        2.0**-10 if precision == "tf32" else torch.finfo(dtype).eps
    )


@pytest.mark.parametrize(
    "table",
    [
        AGREEMENT,
        derivative_method._MODE_TOLERANCE,
        verification._TOLERANCE,
        verification._TOLERANCE_OF_ESTIMATES,
        verification._TOLERANCE_OF_MODELS,
        refiner._NOISE,
    ],
)
def test_every_tolerance_has_a_value_for_every_precision(table: Mapping[str, float]) -> None:
    precisions = ["float64", "float32", "tf32", "float16", "bfloat16"]
    assert table.keys() == set(precisions)
    assert relative_rounding("tf32") == relative_rounding("float16")
    assert table["float64"] <= table["float32"] <= table["tf32"]


def _chosen(case: Case, *, tf32: bool) -> tuple[Strategy | None, float | None]:
    objective = objective_of(case, dtype=torch.float32, batch_size=1000)
    objective.tf32 = tf32
    a, line = line_of(case)
    with Tf32():
        check_task(objective, a)
        find_strategy(objective, line, [(x,) for x in ALPHAS])
    return objective.strategy or objective.provisional, objective.difference


# The first layer is a product of inputs that are the same at all points.
_SHARING = ["mlp-relu", "mlp-linear-mse", "cnn", "cnn-batchnorm", "attention-tied", "patched"]


@pytest.mark.usefixtures("_tf32")
@pytest.mark.parametrize("name", _SHARING)
def test_a_shared_first_layer_agrees_within_the_tolerance_for_tf32(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    strategy, difference = _chosen(case, tf32=True)
    assert strategy is Strategy.SHARED
    assert difference is not None
    assert AGREEMENT["float32"] < difference < AGREEMENT["tf32"] / 2
    # The tolerance for float32 would refuse it.
    assert _chosen(case, tf32=False)[0] is Strategy.BOUND


@pytest.mark.usefixtures("_tf32")
@pytest.mark.parametrize("tf32", [False, True])
def test_a_wrong_strategy_is_refused_in_tf32_too(
    tf32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = FirstLayer.output
    monkeypatch.setattr(FirstLayer, "output", lambda self, point: 1.1 * output(self, point))
    assert _chosen(CASES[0], tf32=tf32)[0] is Strategy.BOUND


@pytest.mark.usefixtures("_tf32")
@pytest.mark.parametrize(("tf32", "examples"), [(True, 37), (False, 0)])
def test_kept_graphs_agree_within_the_tolerance_for_tf32(
    tf32: bool, examples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[0]
    objective = objective_of(case, dtype=torch.float32, batch_size=8)
    objective.tf32 = tf32
    state = case.state(1)
    check_task(objective, state)
    names = [name for name, _ in objective.model.named_parameters()]
    multiply = Curvature._multiply_kept
    # As other kernels of a GPU round.
    monkeypatch.setattr(Curvature, "_multiply_kept", lambda *args: multiply(*args) * (1 + 2.0**-11))
    with Curvature(objective, state, names, objective.splits["all"]) as curvature:
        for seed in (1, 2):
            generator = torch.Generator().manual_seed(seed)
            v = torch.randn(curvature.size, dtype=torch.float64, generator=generator)
            curvature.product(v)
        assert curvature.graphs.examples == examples
        assert curvature._rounding >= (2.0**-10 if tf32 else 2.0**-23)


@pytest.mark.usefixtures("_tf32", "folder")
def test_the_summary_and_a_dry_run_name_the_strategy_and_its_difference() -> None:
    with Tf32():
        exact = losscli.interpolate("a.pt", "b.pt", device="cpu", points=9)
        result = losscli.interpolate("a.pt", "b.pt", device="cpu", points=9, tf32=True)
    # In float32 the first layer is not shared here, since its factors are rounded all the same.
    assert exact.summary["strategy"] == {"name": "bound", "difference": 0.0}
    slower = (
        "points are evaluated by the strategy 'bound' instead of the faster 'shared', which fails "
        "with this model or gives other losses"
    )
    assert slower in exact.summary["notes"]
    assert slower not in result.summary["notes"]
    strategy = result.summary["strategy"]
    assert strategy["name"] == "shared"
    assert AGREEMENT["float32"] < strategy["difference"] < AGREEMENT["tf32"]
    # A point beside the ends: the losses of both agree as far as TF32 goes.
    losses = [torch.tensor(r.table.floats("loss")) for r in (exact, result)]
    assert 0 < relative_difference(losses[1], losses[0]) < AGREEMENT["tf32"]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"name": "shared", "difference": 1.25e-4}, "shared, losses within 0.0001 (relative) of "),
        (
            {"name": "bound", "difference": None},
            "bound, not compared with the plainly loaded model",
        ),
    ],
)
def test_a_dry_run_says_how_points_are_evaluated(
    choice: dict[str, Any], words: str, losscli: Losscli, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = losscli("interpolate", "a.pt", "b.pt", "--points", 3, "--dry-run", "--json")
    strategy = json.loads(done.stdout)["strategy"]
    assert strategy["name"] in {strategy.name.lower() for strategy in Strategy}
    assert 0 <= strategy["difference"] < AGREEMENT["float32"]
    monkeypatch.setattr(
        "losscli.evaluation.cost.record_choice",
        lambda objective, _: setattr(objective, "first_choice", choice),
    )
    done = losscli("interpolate", "a.pt", "b.pt", "--points", 3, "--dry-run")
    assert f"\nstrategy     {words}" in done.stdout
