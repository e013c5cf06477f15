"""How much a chunk of points may cost: counted, the same in every run, and without a trace."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from losscli.data import DataSet, Split
from losscli.data.objects import to_data_set
from losscli.evaluation.flops import _without_fused_kernels, operations
from losscli.evaluation.journal import Journal
from losscli.evaluation.losses import built_in as losses
from losscli.evaluation.memory import points_at_once, points_that_fit
from losscli.evaluation.objective import Objective
from losscli.evaluation.recalibration import Recalibration
from losscli.evaluation.sweep import sweep
from losscli.evaluation.task_checks import check_task
from losscli.models import CNN, MLP
from losscli.weight_space.slices import Line
from tests.cases import CASES, Case, sample
from tests.conftest import ROOT


def objective_of(
    model: nn.Module, examples: int = 8, shape: tuple[int, ...] = (12,), **more: Any
) -> Objective:
    split = Split(torch.zeros(examples, *shape), torch.zeros(examples, dtype=torch.long))
    data = DataSet({"all": split})
    cpu = torch.device("cpu")
    return Objective(model, losses.LOSSES["cross_entropy"], {}, data, device=cpu, **more)


def names(objective: Objective) -> list[str]:
    return [name for name, _ in objective.model.named_parameters()]


class _Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize(
    ("model", "shape", "truth"),
    [
        (nn.Linear(8, 4), (3, 8), 2 * 3 * 8 * 4),
        (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 6, 6), 2 * 2 * 36 * 3 * 9 * 8),
        # For each of 10 steps four gates of 16, each of 8 inputs and of 16 units.
        (nn.LSTM(8, 16, batch_first=True), (2, 10, 8), 2 * 2 * 10 * 4 * 16 * (8 + 16)),
        (_Attention(), (2, 4, 10, 8), 2 * 2 * 2 * 4 * 10 * 10 * 8),
    ],
)
def test_products_are_counted_also_where_kernels_are_fused(
    model: nn.Module, shape: tuple[int, ...], truth: int
) -> None:
    inputs = torch.rand(shape)
    assert operations(model.eval(), lambda: model(inputs)) == truth


def test_counting_does_not_import_the_compiler() -> None:
    """It would take as long again as importing torch does."""
    code = (
        "import sys, torch; from losscli.evaluation.flops import operations\n"
        "layer = torch.nn.Linear(3, 2)\n"
        "found = operations(layer, lambda: layer(torch.ones(1, 3)))\n"
        "assert found == 12 and 'torch._dynamo' not in sys.modules"
    )
    # In a process that has not imported it for something else.
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("case", sample(CASES, 0, 2), ids=str)
def test_the_count_is_that_of_pytorch(case: Case) -> None:
    # A model may write on its inputs.
    data = DataSet({"all": Split(copy.deepcopy(case.inputs), case.targets)})
    objective = Objective(case.build(), case.per_example, {}, data, device=torch.device("cpu"))
    inputs = data.prepare(data.splits["all"].inputs, objective.dtype)

    def forward() -> object:
        return objective.forward(objective.model, inputs)

    with torch.no_grad(), _without_fused_kernels(), FlopCounterMode(display=False) as counter:
        forward()
    assert operations(objective.model, forward) == counter.get_total_flops() > 0


class _Noting(nn.Module):
    """Draws, counts its calls in a buffer, and raises where it is told to."""

    def __init__(self, *, fails: bool) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        self.calls += torch.rand(()) + 1
        if self.fails:
            raise RuntimeError("no")
        return x @ x.T


@pytest.mark.parametrize("fails", [False, True])
def test_counting_leaves_no_trace(fails: bool) -> None:
    model = _Noting(fails=fails)
    state, fast = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    if fails:
        with pytest.raises(RuntimeError):
            operations(model, lambda: model(torch.ones(2, 3)))
    else:
        assert operations(model, lambda: model(torch.ones(2, 3))) == 2 * 2 * 2 * 3
    assert model.calls == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert torch.backends.mkldnn.enabled == torch.backends.mkldnn.is_available()


@pytest.mark.parametrize("case", sample(CASES, 1, 2), ids=str)
def test_every_model_has_a_number_the_same_each_time(case: Case) -> None:
    def count() -> tuple[int, int]:
        data = DataSet({"all": Split(case.inputs, case.targets)})
        cpu = torch.device("cpu")
        objective = Objective(case.build(), case.per_example, {}, data, device=cpu)
        check_task(objective, case.state(1))
        return objective.operations, sum(p.numel() for p in objective.model.parameters())

    (first, weights), (second, _) = count(), count()
    assert first == second >= 2 * weights


def test_an_example_counts_as_one_of_a_batch_does() -> None:
    """A product for each weight of an MLP; of a CNN each place of an image has them."""
    mlp = objective_of(MLP("12-9-5"))
    assert mlp.operations == 2 * sum(p.numel() for p in mlp.model.parameters())
    cnn = objective_of(CNN("4-6", channels=2, classes=3), shape=(2, 6, 6))
    assert cnn.operations > 2 * sum(p.numel() for p in cnn.model.parameters())


def test_a_model_that_no_counter_looks_into_counts_by_its_weights() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(12, 5))

        def forward(self, x: Tensor) -> Tensor:
            if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
                raise RuntimeError("no mode here")
            return x @ self.weight

    objective = objective_of(Odd())
    check_task(objective, {"weight": torch.ones(12, 5)})
    assert objective.operations == 2 * 60


def test_a_model_of_one_size_of_batch_is_counted_on_that() -> None:
    class Fixed(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.view(8, 12))

    objective = objective_of(Fixed("12-9-5"), batch_size=8)
    assert objective.operations == 2 * sum(p.numel() for p in objective.model.parameters())


def test_a_chunk_holds_no_more_than_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = objective_of(MLP("12-9-5"), examples=100)
    point = 100 * objective.operations
    for work, points in ((100 * point, 100), (40 * point + 1, 40), (17 * point - 1, 16), (0, 16)):
        monkeypatch.setattr("losscli.evaluation.memory._WORK", {"cpu": work})
        assert points_at_once(objective, names(objective)) == points
    # A part of the data costs as much less.
    monkeypatch.setattr("losscli.evaluation.memory._WORK", {"cpu": 20 * point})
    part = {"part": objective.splits["all"].take(slice(0, 50))}
    assert points_at_once(objective, names(objective), part) == 40
    # And what does not fit does not fit.
    monkeypatch.setattr(
        "losscli.evaluation.memory._CPU_STACK",
        3 * (sum(t.nbytes for t in objective.tensors.values()) + 100 * 4),
    )
    assert points_at_once(objective, names(objective)) == 3


def test_the_examples_of_statistics_are_work_too(monkeypatch: pytest.MonkeyPatch) -> None:
    split = Split(torch.zeros(8, 2, 6, 6), torch.zeros(8, dtype=torch.long))
    told = Recalibration.plan("all", split, 0)
    model = CNN("4-6", channels=2, classes=3, batchnorm=True)
    objective = objective_of(model, shape=(2, 6, 6), recalibration=told)
    monkeypatch.setattr("losscli.evaluation.memory._WORK", {"cpu": 40 * 16 * objective.operations})
    assert points_at_once(objective, names(objective)) == 40


def test_what_is_decoded_goes_by_as_seldom_as_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, targets = torch.zeros(50, 12), torch.zeros(50, dtype=torch.long)
    stream = to_data_set(Subset(TensorDataset(inputs, targets), range(50)), "here", seed=0).splits[
        "data"
    ]
    objective = objective_of(MLP("12-9-5"))
    monkeypatch.setattr("losscli.evaluation.memory._WORK", {"cpu": 0})
    monkeypatch.setattr("losscli.evaluation.memory._DECODING", {"cpu": 70 * objective.operations})
    assert points_at_once(objective, names(objective), {"all": stream}) == 70
    assert points_at_once(objective, names(objective)) == 16


@pytest.mark.parametrize("points", [40, 16])
def test_a_sweep_takes_such_chunks_and_finds_the_same(
    monkeypatch: pytest.MonkeyPatch, points: int
) -> None:
    case = CASES[0]
    a, b = case.state(1), case.state(2)
    data = DataSet({"all": Split(case.inputs, case.targets)})
    objective = Objective(case.build(), case.per_example, {}, data, device=torch.device("cpu"))
    check_task(objective, a)
    where = [(i / 40,) for i in range(45)]
    whole = sweep(objective, Line(a, b), where)["all"].losses
    taken: list[int] = []
    at = objective.at

    def counting(slice_: Line, coordinates: Any, *more: Any) -> Any:
        taken.append(len(coordinates))
        return at(slice_, coordinates, *more)

    monkeypatch.setattr(objective, "at", counting)
    work = points * len(case.targets) * objective.operations
    monkeypatch.setattr("losscli.evaluation.memory._WORK", {"cpu": work})
    cut = sweep(objective, Line(a, b), where)["all"].losses
    assert torch.allclose(whole, cut, rtol=1e-6, atol=0)
    assert taken == [min(points, 45 - start) for start in range(0, 45, points)]


def test_the_line_of_the_benchmark_is_one_chunk() -> None:
    objective = objective_of(MLP("784-512-512-10"), examples=10_000, shape=(784,))
    assert (
        51
        <= points_at_once(objective, names(objective))
        <= points_that_fit(objective, names(objective))
    )


def test_the_journal_of_a_small_model_grows(
    folder: Path, losscli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep of many points of a small network is recorded sixteen at a time, where it is long."""
    monkeypatch.setattr("losscli.evaluation.memory._WORK", {"cpu": 0})
    recorded: list[int] = []
    own = Journal.record

    def recording(self: Journal, key: str, arrays: Any) -> None:
        recorded.append(int(arrays["state"][0]))
        own(self, key, arrays)

    monkeypatch.setattr(Journal, "record", recording)
    line = ("interpolate", "a.pt", "b.pt", "--points", 50, "--range", 0, 1, "--no-figure")
    planned = losscli(*line, "--dry-run")
    assert "points       50, 16 at once" in planned.stdout
    assert losscli(*line).status == 0
    assert recorded == [1, 1, 16, 16, 16]
