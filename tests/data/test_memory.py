"""Memory: what is free on a GPU, and allocations that fail."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from losscli.data import DataSet, Split, allocations, device_budget, device_memory, placing
from losscli.errors import OutOfMemoryError
from losscli.evaluation.flops import Trace, operations
from losscli.evaluation.losses.built_in import LOSSES, cross_entropy
from losscli.evaluation.memory import halving, points_that_fit
from losscli.evaluation.objective import Objective
from losscli.evaluation.output_collector import OutputCollector
from losscli.evaluation.recalibration import Recalibration
from losscli.evaluation.strategies.base import Strategy
from losscli.evaluation.strategies.points import LoadedPoint, StackedPoints
from losscli.evaluation.sweep import sweep
from losscli.models import CNN, MLP
from tests.cases import CASES
from tests.conftest import Losscli
from tests.evaluation.test_objective import line_of, objective_of

GPU = torch.device("cuda")

# As PyTorch 2.6 to 2.13 write them.
FAILED = [
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    "MPS backend out of memory (MPS allocated: 6.77 GB, other allocations: 2.33 GB)",
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory",
]
OTHER = [
    "CUDA error: an illegal memory access was encountered",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`",
    "mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)",
]


@pytest.mark.parametrize("message", FAILED)
def test_allocations_that_fail_in_a_library_are_out_of_memory(message: str) -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught, allocations():
        raise RuntimeError(message)
    assert str(caught.value) == message


@pytest.mark.parametrize("message", OTHER)
def test_other_errors_stay_what_they_are(message: str) -> None:
    own = RuntimeError(message)
    with pytest.raises(RuntimeError) as caught, allocations():
        raise own
    assert caught.value is own
    assert not isinstance(own, torch.OutOfMemoryError)


def test_an_allocation_on_the_host_that_fails_is_out_of_memory() -> None:
    with pytest.raises(torch.OutOfMemoryError), allocations():
        torch.empty(1 << 52)


@pytest.mark.parametrize(("reserved", "allocated"), [(0, 0), (40 << 20, 40 << 20), (60 << 20, 0)])
def test_budgets_count_what_is_reserved_and_not_used(
    monkeypatch: pytest.MonkeyPatch, reserved: int, allocated: int
) -> None:
    # What is allocated stays so; what was freed is free either way.
    total = 100 << 20
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (total - reserved, total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: allocated)
    free = total - allocated
    assert device_memory(GPU) == free
    assert device_budget(GPU) == free // 4
    objective = objective_of(CASES[0])
    names = list(objective.tensors)
    losses = 8 * len(objective.splits["all"])
    size = sum(tensor.nbytes for tensor in objective.tensors.values()) + losses
    activations = 2 * objective.batch_size * objective.activations
    objective.device = GPU
    assert points_that_fit(objective, names) == free // 4 // size
    objective.strategy = Strategy.STACKED
    assert points_that_fit(objective, names) == free // 4 // (size + activations)
    # In turn, points take no weights of their own, and the graphs of a batch are counted.
    monkeypatch.setattr(Split, "is_on", lambda *_: True)
    objective.strategy = Strategy.BOUND
    graphs = objective.graph_bytes(objective.splits.values())
    assert graphs > 0
    assert points_that_fit(objective, names) == (free // 4 - graphs) // losses
    first = {"all": objective.splits["all"].first(3)}
    assert points_that_fit(objective, names, first) == (free // 4 - graphs) // (3 * 8)
    monkeypatch.setattr(Objective, "why_no_graphs", lambda *_: "for a reason")
    assert points_that_fit(objective, names) == free // 4 // losses


@pytest.mark.parametrize(
    ("model", "shape", "values"),
    [
        # The input and the output of the first and of the second layer.
        (MLP("12-9-5"), (12,), 12 + 9),
        (MLP("3-9-9-2"), (3,), 9 + 9),
        # The pooling of the first layer, with its indices in int64.
        (CNN("4-6", channels=2, classes=3), (2, 6, 6), 4 * 36 + 4 * 9 + 2 * 4 * 9),
    ],
    ids=["wide-first", "wide-second", "cnn"],
)
def test_activations_are_what_one_operator_reads_and_writes(
    model: nn.Module, shape: tuple[int, ...], values: int
) -> None:
    objective = _objective_on(model, shape)
    assert objective.activations == values * 4


@pytest.mark.parametrize("case", ["mlp-relu", "mlp-maxout", "normalising", "functional"])
def test_points_at_once_take_no_more_memory_than_is_planned(case: str) -> None:
    own = next(c for c in CASES if c.name == case)
    objective = objective_of(own, batch_size=9)
    a, line = line_of(own)
    objective.load(a)
    points = [(x / 7,) for x in range(8)]
    stack = sum(t.nbytes for t in line.a.values()) * len(points)
    planned = 2 * objective.batch_size * objective.activations * len(points)
    batch = objective.first_batches()["all"]
    trace = Trace()
    with torch.no_grad(), StackedPoints(objective, line, points) as stacked:
        losses = torch.empty(len(points), len(batch), dtype=torch.float64)
        collector = OutputCollector(objective, batch.targets, losses, {})
        inputs = objective.prepare(batch)
        operations(objective.model, lambda: list(stacked.evaluate(inputs, collector)), trace)
    assert 0 < trace.largest <= planned + stack


def _objective_on(model: nn.Module, shape: tuple[int, ...], **options: Any) -> Objective:
    split = Split(torch.rand(8, *shape), torch.zeros(8, dtype=torch.long))
    return Objective(
        model, cross_entropy, {}, DataSet({"all": split}), device=torch.device("cpu"), **options
    )


@pytest.mark.parametrize("fits", [True, False])
def test_training_examples_that_do_not_fit_stay_on_the_host(
    fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Split(torch.rand(20, 2, 6, 6), torch.zeros(20, dtype=torch.long))
    budget = training.nbytes - (not fits)
    monkeypatch.setattr("losscli.evaluation.objective.device_budget", lambda _: budget)
    moved: list[int] = []
    to = Split.to

    def moving(self: Split, device: torch.device) -> Split:
        moved.append(len(self))
        return to(self, device)

    monkeypatch.setattr(Split, "to", moving)
    plan = Recalibration.plan("train", training, 0)
    model = CNN("4-6", channels=2, classes=3, batchnorm=True)
    objective = _objective_on(model, (2, 6, 6), recalibration=plan)
    assert moved == [8, *[len(training)] * fits]
    # Its batches are moved one by one.
    objective.recalibrate(LoadedPoint(objective))
    assert objective.batchnorm
    assert not objective.idle


def _fails(*_: object, **__: object) -> None:
    raise RuntimeError(FAILED[3])


@pytest.mark.parametrize(
    ("target", "what", "cure"),
    [
        ("losscli.evaluation.loading._cast", "the weights of the model", "--dtype bfloat16"),
        ("losscli.data.split.Split.to", "the examples of train", "--limit"),
    ],
)
def test_data_that_do_not_fit_are_reported_in_one_line(
    target: str,
    what: str,
    cure: str,
    losscli: Losscli,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = sorted(folder.iterdir())
    monkeypatch.setattr(target, _fails)
    done = losscli("interpolate", "a.pt", "b.pt", "-o", "out")
    assert (done.status, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr == f"losscli: {what} do not fit into the memory of cpu. Try {cure}\n"
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(("device", "cure"), [("cpu", "--dtype"), ("cuda:1", "--device cpu or ")])
@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("")])
def test_the_cure_is_one_for_the_device(device: str, cure: str, error: Exception) -> None:
    with (
        pytest.raises(OutOfMemoryError, match=f"the data do not fit .* of {device}.* Try {cure}"),
        placing("the data", torch.device(device)),
    ):
        raise error


class _Small(nn.Linear):
    """A layer that a GPU's library has no memory for, if the batch is large."""

    def __init__(self) -> None:
        super().__init__(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 4:
            raise RuntimeError(FAILED[0])
        return super().forward(x)


def test_a_library_without_memory_halves_the_batch() -> None:
    data = DataSet({"all": Split(torch.rand(40, 4), torch.arange(40) % 3)})
    model = _Small()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss = LOSSES["cross_entropy"]
    objective = Objective(model, loss, {}, data, device=torch.device("cpu"), batch_size=32)
    found = halving(objective, lambda: objective.plain(state))["all"].losses[0]
    assert objective.batch_size == 4
    split = data.splits["all"]
    assert isinstance(split, Split)
    expected = loss(nn.functional.linear(split.inputs, *state.values()), split.targets)
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=1e-6)


class _Held:
    """Memory that is freed with the frame of a function that failed."""

    def __init__(self, held: list[weakref.ref[_Held]]) -> None:
        held.append(weakref.ref(self))


def _through_halving(objective: Objective, work: Callable[[], object]) -> None:
    halving(objective, work)


def _through_sweep(objective: Objective, work: Callable[[], object]) -> None:
    objective.at = lambda *_: work()  # type: ignore[assignment, method-assign, return-value]
    _, line = line_of(CASES[0])
    sweep(objective, line, [(0.3,)])


@pytest.mark.parametrize("through", [_through_halving, _through_sweep])
def test_failed_work_is_freed_before_the_batch_is_halved(
    through: Callable[[Objective, Callable[[], object]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[_Held]] = []
    alive: list[bool] = []

    def halve(objective: Objective) -> None:
        alive.extend(ref() is not None for ref in held)
        raise OutOfMemoryError("enough")

    def work() -> object:
        mine = _Held(held)
        raise torch.OutOfMemoryError(str(mine))

    for module in ("memory", "sweep"):
        monkeypatch.setattr(f"losscli.evaluation.{module}.halve_batch", halve)
    with pytest.raises(OutOfMemoryError, match="enough"):
        through(objective_of(CASES[0]), work)
    assert alive == [False]
