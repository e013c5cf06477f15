"""MPS, which has no float64, in the place of a processor that refuses it in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from losscli.data import Split
from losscli.evaluation import line_search
from losscli.evaluation.line_search import LineSearch
from losscli.evaluation.loading import LoadableModel
from losscli.evaluation.objective import Evaluation
from losscli.evaluation.tasks import ALONE
from losscli.studies.base import Study
from losscli.weight_space.slices import Line
from losscli.weight_space.vectors import to_device
from tests.cases import CASES
from tests.evaluation.test_objective import objective_of

MPS = torch.device("mps")
WIDE = {torch.float64, torch.complex128}

_to = Tensor.to


def _refusing_to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Tensor.to with a device that has no float64; tensors stay on the processor."""
    given = (*args, *kwargs.values())
    moves = any(isinstance(x, torch.device) and x.type == "mps" for x in given)
    if moves and self.dtype in WIDE:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't")
    rest = [x for x in given if isinstance(x, torch.dtype)]
    return _to(self, *rest) if moves else _to(self, *args, **kwargs)


@pytest.fixture(autouse=True)
def _mps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "to", _refusing_to)
    with pytest.raises(TypeError, match="MPS"):
        torch.zeros(1, dtype=torch.float64).to(MPS)


def _random(dtype: torch.dtype) -> Tensor:
    return torch.randn(7, dtype=dtype) if dtype.is_floating_point else torch.ones(7).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "moved"),
    [
        (torch.float64, torch.float32),
        (torch.complex128, torch.complex64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.int64, torch.int64),
        (torch.uint8, torch.uint8),
        (torch.bool, torch.bool),
    ],
)
def test_float64_is_rounded_once_before_it_is_moved(dtype: torch.dtype, moved: torch.dtype) -> None:
    tensor = _random(dtype)
    found = to_device(tensor, MPS)
    assert found.dtype == moved
    assert torch.equal(found, tensor.type(moved))
    assert to_device(tensor, torch.device("cpu")).dtype == dtype


def test_examples_in_float64_are_moved() -> None:
    split = Split((_random(torch.float64), _random(torch.int64)), _random(torch.float64))
    moved = split.to(MPS)
    assert moved.inputs[0].dtype == moved.targets.dtype == torch.float32
    assert moved.inputs[1].dtype == torch.int64


class _Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(_random(torch.complex128))
        self.linear = nn.Linear(2, 2).double()


@pytest.mark.parametrize("build", [_Complex, lambda: nn.Linear(3, 2).double()])
def test_a_model_in_float64_is_moved(build: Any) -> None:
    loaded = LoadableModel(build(), MPS, torch.float32)
    assert {tensor.dtype for tensor in loaded.tensors.values()}.isdisjoint(WIDE)


def test_a_study_moves_checkpoints_in_float64() -> None:
    objective = objective_of(CASES[0])
    objective.device = MPS
    study: Any = SimpleNamespace(problem=SimpleNamespace(objective=objective), moving=("a", "b"))
    weights = {"a": _random(torch.float64), "b": _random(torch.bfloat16)}
    found = Study.on_device(study, weights)
    assert [tensor.dtype for tensor in found.values()] == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("computed", [torch.float64, torch.float32])
def test_a_line_search_moves_weights_and_directions_in_float64(
    stored: torch.dtype, computed: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[Line] = []

    def sweep(_: object, line: Line, *__: object, **___: object) -> Mapping[str, Evaluation]:
        lines.append(line)
        return {"all": Evaluation(torch.zeros(1, 1), {})}

    monkeypatch.setattr(line_search, "sweep", sweep)
    objective = objective_of(CASES[0], dtype=torch.float32)
    state = CASES[0].state(1)
    weights = {name: tensor.type(stored) for name, tensor in state.items()}
    names = list(state)
    direction = {name: torch.randn(state[name].shape).type(computed) for name in names}
    here = Evaluation(torch.zeros(1, 1), {})
    objective.device = MPS
    LineSearch(objective, weights, names, objective.splits, here, ALONE).evaluate(direction, [0.5])
    for name in names:
        start, end = (ends[name] for ends in lines[0].ends)
        assert not {start.dtype, end.dtype} & WIDE
        expected = weights[name].double() + direction[name].double()
        torch.testing.assert_close(end.double(), expected, rtol=1e-6, atol=1e-6)
