"""Products from gradients that are kept with their graphs: the same as from gradients made anew."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from losscli.data import DataSet, Split
from losscli.evaluation.hessian.curvature import Curvature
from losscli.evaluation.hessian.gradient_graphs import graph_budget, graph_bytes
from losscli.evaluation.objective import Objective
from losscli.evaluation.task_checks import check_task
from losscli.models import MLP
from tests.cases import CASES, Case, sample
from tests.evaluation.hessian.test_curvature import (
    CPU,
    SEEN,
    curvature_of,
    hessian_of,
    parameters_of,
    random,
    relative,
    times,
)
from tests.evaluation.test_objective import objective_of


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """With several threads, operations within a batch sum in another order than without graphs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def kept(case: Case, *, budget: int | None = None, batch_size: int = 8) -> Curvature:
    """A curvature that has made two products, after which it keeps graphs."""
    objective = objective_of(case, batch_size=batch_size)
    state = case.state(1)
    check_task(objective, state)
    names = parameters_of(objective.model)
    curvature = Curvature(objective, state, names, objective.splits["all"], budget=budget)
    curvature.product(random(curvature.size, seed=1))
    assert curvature.graphs.examples == 0
    curvature.product(random(curvature.size, seed=2))
    return curvature


@pytest.mark.parametrize("case", sample(SEEN, 0), ids=str)
def test_a_product_from_kept_graphs_is_that_of_the_dense_hessian(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    curvature = kept(case)
    assert curvature.graphs.examples == 37

    def refuse(*_: object) -> None:
        raise AssertionError("a forward pass")

    monkeypatch.setattr(curvature.objective, "forward", refuse)
    vectors = random(2, curvature.size)
    found = curvature.product(vectors)
    for row, v in zip(found, vectors, strict=True):
        assert relative(row, times(case, v)) < 1e-10
    monkeypatch.undo()
    # To the bit, so that it does not matter how many graphs fit.
    assert torch.equal(curvature_of(case, batch_size=8).product(vectors), found)
    assert all(p.grad is None for p in curvature.objective.model.parameters())


@pytest.mark.parametrize(("graphs", "examples"), [(0.9, 0), (2.5, 16), (4, 32), (5, 37)])
def test_graphs_are_kept_as_far_as_they_fit(graphs: float, examples: int) -> None:
    case = CASES[0]
    whole = kept(case)
    batch = whole._graph_bytes()
    assert batch > 0
    curvature = kept(case, budget=int(graphs * batch))
    assert curvature.graphs.examples == examples
    vectors = random(3, curvature.size)
    assert torch.equal(curvature.product(vectors), whole.product(vectors))
    assert curvature.products == 5


def test_the_budget_is_a_quarter_of_the_memory_and_at_most_a_gibibyte(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("losscli.data.memory.host_memory", lambda: 1 << 31)
    assert graph_budget(CPU) == 1 << 29
    monkeypatch.setattr("losscli.data.memory.host_memory", lambda: 1 << 40)
    assert graph_budget(CPU) == 1 << 30


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_the_memory_of_a_graph_is_what_stays_allocated(activation: str) -> None:
    model = MLP("64-32-32-10", activation=activation)
    parameters, inputs = list(model.parameters()), torch.rand(512, 64)
    gradients = []

    def differentiate() -> dict[int, Tensor]:
        losses = model(inputs).square().mean(1)
        parts = torch.autograd.grad(losses.sum(), parameters, create_graph=True)
        gradients.append(parts)
        return dict(enumerate(parts))

    found = graph_bytes(differentiate, [*parameters, inputs])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        differentiate()
    allocated = sum(event.self_cpu_memory_usage for event in profiler.events())
    assert 0.7 * allocated < found < 1.2 * allocated


@pytest.mark.parametrize("in_place", [True, False])
def test_graphs_of_other_weights_are_not_used(in_place: bool) -> None:
    case = CASES[0]
    curvature = kept(case)
    v = random(curvature.size)
    there = curvature.product(v)
    other = case.state(2)
    if in_place:
        curvature.objective.load(other)
    else:
        for name, tensor in curvature.objective.tensors.items():
            tensor.data = other[name].to(tensor)
    found = curvature.product(v)
    expected = Curvature(
        curvature.objective, other, curvature.names, curvature.objective.splits["all"]
    ).product(v)
    assert torch.equal(found, expected)
    assert relative(found, there) > 0.1


class Overwriting(nn.Module):
    """Keeps what it computes in a tensor of its own, which the next batch overwrites."""

    def __init__(self, *, hidden: bool) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.second = nn.Linear(4, 3)
        self.kept = torch.zeros(8, 3, dtype=torch.float64)
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        factor = self.kept[: len(x)]
        with torch.no_grad():
            (factor.data if self.hidden else factor).copy_(x[:, :3].cos())
        return self.first(x).sin() * factor * self.second(x)


@pytest.mark.parametrize("hidden", [False, True])
def test_graphs_that_later_passes_change_are_not_used(hidden: bool) -> None:
    inputs, targets = random(37, 4, seed=3), torch.arange(37) % 3
    case = Case("overwriting", lambda: Overwriting(hidden=hidden), inputs, targets)
    state = case.state(1)
    data = DataSet({"all": Split(inputs, targets)})
    objective = Objective(
        case.build(), case.per_example, {}, data, device=CPU, dtype=torch.float64, batch_size=8
    )
    curvature = Curvature(objective, state, list(state), objective.splits["all"])
    v = random(curvature.size)
    expected = curvature.product(v)
    reference = Curvature(objective, state, list(state), data.splits["all"], budget=0)
    for _ in range(3):
        assert torch.equal(curvature.product(v), expected)
        assert curvature.graphs.examples == 0
        assert torch.equal(reference.product(v), expected)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_out_of_memory_graphs_are_freed_before_the_batch_is_halved(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    case = CASES[0]
    objective = objective_of(case, batch_size=8)
    names = parameters_of(objective.model)
    curvature = Curvature(objective, case.state(1), names, objective.splits["all"])
    v = random(curvature.size)
    curvature.product(v)
    forward, full = objective.forward, 0

    def cramped(model: nn.Module, inputs: Tensor) -> object:
        nonlocal full
        if len(curvature.graphs.batches) == 3:
            full += 1
            raise error("on purpose")
        return forward(model, inputs)

    monkeypatch.setattr(objective, "forward", cramped)
    for _ in range(3):
        assert relative(curvature.product(v), times(case, v)) < 1e-10
    assert (full, objective.batch_size, curvature.graphs.examples) == (1, 8, 0)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_graphs_that_fail_are_freed_and_the_product_is_computed_again(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    case = CASES[0]
    curvature = kept(case)
    differentiate = torch.autograd.grad

    def failing(*args: object, **kwargs: object) -> object:
        if curvature.graphs.batches:
            raise error("on purpose")
        return differentiate(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.autograd, "grad", failing)
    v = random(curvature.size)
    assert relative(curvature.product(v), hessian_of(case) @ v) < 1e-10
    assert curvature.graphs.examples == 0


def test_threads_differentiate_graphs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[0]
    vectors = random(2, curvature_of(case).size)
    expected = curvature_of(case).product(vectors)
    differentiate, called = torch.autograd.grad, set()

    def recording(*args: object, **kwargs: object) -> object:
        called.add(threading.get_ident())
        # Until the others have begun, so that each takes one.
        barrier.wait(10)
        return differentiate(*args, **kwargs)  # type: ignore[arg-type]

    torch.set_num_threads(3)
    curvature = kept(case, batch_size=13)
    assert len(curvature.graphs.batches) == 3
    barrier = threading.Barrier(3)
    monkeypatch.setattr(torch.autograd, "grad", recording)
    found = curvature.product(vectors)
    assert torch.get_num_threads() == 3
    assert len(called) == 3
    assert threading.get_ident() not in called
    assert relative(found, expected) < 1e-12


def test_graphs_are_freed_in_the_end() -> None:
    with kept(CASES[0]) as curvature:
        assert curvature.graphs.examples == 37
    assert not curvature.graphs.batches


def test_progress_counts_products_from_graphs() -> None:
    told: list[float] = []
    curvature = curvature_of(CASES[0], batch_size=8, progress=told.append)
    curvature.gradient()
    for number in range(1, 5):
        curvature.product(random(2, curvature.size))
        assert sum(told) == pytest.approx(1 + 2 * number)
