"""Points that take all batches one after the other give the bits of points that are stacked.

Points are evaluated in this order on a GPU; a patch makes the CPU do so here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from losscli.data import DataSet, Split
from losscli.evaluation import gpu_thresholds
from losscli.evaluation.losses import metrics
from losscli.evaluation.losses.built_in import LOSSES
from losscli.evaluation.objective import Evaluation, Objective
from losscli.evaluation.recalibration import Recalibration
from losscli.evaluation.strategies.base import Strategy
from losscli.evaluation.strategies.point_weights import PointWeights, SinglePointWeights
from losscli.evaluation.sweep import check
from losscli.weight_space.slices import Line, Slice, Span, Triangle
from tests.cases import CASES, Case, sample

POINTS = [(-0.5,), (0.0,), (0.15,), (0.5,), (1.0,), (1.3,)]
PLANE = [(0.0, 0.0), (0.3, 0.4), (1.0, -0.2)]
BY_NAME = {case.name: case for case in CASES}

# These can only be loaded at every point.
LOADED = {"folding"}


def in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("losscli.evaluation.objective.launches_kernels", lambda _: True)


def objective_of(
    case: Case, *, dtype: torch.dtype = torch.float64, recalibrates: bool = False
) -> Objective:
    split = Split(case.inputs, case.targets)
    return Objective(
        case.build(),
        LOSSES[case.loss],
        {"accuracy": metrics.accuracy} if case.loss == "cross-entropy" else {},
        DataSet({"all": split}),
        device=torch.device("cpu"),
        dtype=dtype,
        batch_size=7,
        recalibration=Recalibration.plan("all", split, 0) if recalibrates else None,
    )


def ends_of(case: Case, number: int) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    states = [case.state(seed) for seed in range(1, number + 1)]
    names = [name for name, tensor in states[0].items() if tensor.is_floating_point()]
    if case.name == "attention-tied":
        names.remove("embedding.weight")
    return states[0], [{name: state[name] for name in names} for state in states]


def evaluate(
    objective: Objective,
    first: dict[str, Tensor],
    slice_: Slice,
    points: Sequence[Sequence[float]],
) -> Evaluation:
    check(objective, first)
    objective.strategy = Strategy.BOUND
    before = {name: tensor.data_ptr() for name, tensor in objective.tensors.items()}
    fixed = {n: t.clone() for n, t in objective.tensors.items() if n not in slice_.ends[0]}
    found = objective.at(slice_, points)["all"]
    assert {name: t.data_ptr() for name, t in objective.tensors.items()} == before
    assert all(torch.equal(objective.tensors[name], value) for name, value in fixed.items())
    return found


def assert_same(
    monkeypatch: pytest.MonkeyPatch, case: Case, slice_: Slice, points: Any, **options: Any
) -> None:
    first, _ = ends_of(case, 1)
    stacked = evaluate(objective_of(case, **options), first, slice_, points)
    in_turn(monkeypatch)
    monkeypatch.setattr(PointWeights, "fill", None)  # no weights are stacked
    found = evaluate(objective_of(case, **options), first, slice_, points)
    assert torch.equal(found.losses, stacked.losses)
    assert found.metrics.keys() == stacked.metrics.keys()
    assert all(torch.equal(found.metrics[name], stacked.metrics[name]) for name in found.metrics)
    assert found.counts == stacked.counts


@pytest.mark.parametrize(
    "case", sample([case for case in CASES if case.name not in LOADED], 1, 2), ids=str
)
def test_every_case_has_the_same_bits(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ends = ends_of(case, 2)
    assert_same(monkeypatch, case, Line(*ends), POINTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["mlp-relu", "cnn-batchnorm"])
def test_narrow_types_have_the_same_bits(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ends = ends_of(BY_NAME[name], 2)
    assert_same(monkeypatch, BY_NAME[name], Line(*ends), POINTS, dtype=dtype)


@pytest.mark.parametrize("kind", [Triangle.through, Span])
def test_planes_have_the_same_bits(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME["mlp-relu"]
    _, ends = ends_of(case, 3)
    assert_same(monkeypatch, case, kind(*ends), PLANE, dtype=torch.float32)


def test_statistics_are_estimated_at_each_point(monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME["cnn-batchnorm"]
    _, ends = ends_of(case, 2)
    ends = [{n: t for n, t in end.items() if "running" not in n} for end in ends]
    assert_same(monkeypatch, case, Line(*ends), POINTS, recalibrates=True)


def test_singular_vectors_are_computed_at_each_point(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> nn.Module:
        return nn.Sequential(spectral_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3))

    case = Case("spectral", build, torch.rand(19, 4), torch.arange(19) % 3)
    _, ends = ends_of(case, 2)
    assert_same(monkeypatch, case, Line(*ends), POINTS)


def test_weights_that_cudnn_keeps_in_one_buffer_stay_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME["lstm"]
    _, ends = ends_of(case, 2)
    expected = evaluate(objective_of(case), case.state(1), Line(*ends), POINTS)
    monkeypatch.setattr("losscli.evaluation.strategies.points._is_in_cudnn", lambda _: True)
    addresses: set[int] = set()
    forward = nn.LSTM.forward

    def watched(self: nn.LSTM, *args: Any) -> Any:
        addresses.add(self.weight_hh_l0.data_ptr())
        return forward(self, *args)

    monkeypatch.setattr(nn.LSTM, "forward", watched)
    in_turn(monkeypatch)
    objective = objective_of(case)
    own = objective.model.lstm.weight_hh_l0.data_ptr()
    found = evaluate(objective, case.state(1), Line(*ends), POINTS)
    assert addresses == {own}
    assert torch.equal(found.losses, expected.losses)


@pytest.mark.parametrize("small", [0, 200, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_keep_their_memory_and_have_the_bits_of_stacked_weights(
    small: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_thresholds, "SMALL_TENSOR", small)
    case = BY_NAME["cnn-batchnorm"]
    objective = objective_of(case, dtype=dtype)
    _, ends = ends_of(case, 2)
    line, points = Line(*ends), [(0.3,), (1.0,), (0.7,)]
    tensors = {name: objective.tensors[name].data for name in ends[0]}
    stacked = PointWeights(objective, line, points, tensors)
    single = SinglePointWeights(objective, line, tensors)
    addresses = {name: tensor.data_ptr() for name, tensor in single.tensors.items()}
    assert addresses.keys() == tensors.keys()
    for name in tensors:
        stacked.fill(name, range(len(points)))
    for p, point in enumerate(points):
        single.move_to(point)
        for name, tensor in single.tensors.items():
            assert torch.equal(tensor, stacked.rows[name][p])
            assert tensor.stride() == stacked.rows[name][p].stride()
    assert addresses == {name: tensor.data_ptr() for name, tensor in single.tensors.items()}


def test_small_tensors_are_combined_in_one_call_a_point(monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME["mlp-relu"]
    _, ends = ends_of(case, 2)
    calls, combine = [], Line.combine

    def counting(self: Line, *args: Any) -> Tensor:
        calls.append(args)
        return combine(self, *args)

    in_turn(monkeypatch)
    objective = objective_of(case)
    check(objective, case.state(1))
    objective.strategy = Strategy.BOUND
    monkeypatch.setattr(Line, "combine", counting)
    objective.at(Line(*ends), POINTS)
    assert len(calls) == len(POINTS)


def test_points_take_batches_together_where_they_share_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = BY_NAME["mlp-relu"]
    objective = objective_of(case)
    check(objective, case.state(1))
    names = list(objective.tensors)
    objective.strategy = Strategy.BOUND
    assert not objective.takes_points_in_turn(names)  # this is a CPU
    in_turn(monkeypatch)
    assert objective.takes_points_in_turn(names)
    for strategy in (Strategy.STACKED, Strategy.THREADS, Strategy.LOADED):
        objective.strategy = strategy
        assert not objective.takes_points_in_turn(names)
    # The first layer is shared; and so is what comes before the last layer.
    objective.strategy = Strategy.SHARED
    assert not objective.takes_points_in_turn(names)
    assert not objective.takes_points_in_turn(names[-2:])
    # Examples that would have to be copied to the device for every point.
    objective.strategy = Strategy.BOUND
    monkeypatch.setattr(Split, "is_on", lambda *_: False)
    assert not objective.takes_points_in_turn(names)


class Scaled(nn.Module):
    """Multiplies its inputs by a weight, which is not affine in any layer that is known."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x * self.scale)


def test_points_that_can_share_nothing_take_batches_in_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_turn(monkeypatch)
    case = Case("scaled", Scaled, torch.rand(9, 4), torch.arange(9) % 3)
    objective = objective_of(case)
    check(objective, case.state(1))
    objective.strategy = Strategy.SHARED
    assert objective.takes_points_in_turn(["scale", "head.weight", "head.bias"])
    assert not objective.takes_points_in_turn(["head.bias"])
