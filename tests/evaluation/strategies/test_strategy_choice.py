"""A strategy that is not the fastest one for the device is noted, once."""

from __future__ import annotations

import pytest
import torch

from losscli.evaluation import objective as objective_module
from losscli.evaluation import strategy_choice
from losscli.evaluation.objective import Objective
from losscli.evaluation.strategies.base import Strategy
from losscli.evaluation.strategy_choice import candidates, choose_strategy, record_choice
from losscli.evaluation.task_checks import check_task
from losscli.weight_space.slices import Line
from tests.cases import CASES
from tests.evaluation.test_objective import ALPHAS, line_of, objective_of

POINTS = [(alpha,) for alpha in ALPHAS]


def ready(name: str) -> tuple[Objective, Line]:
    case = next(case for case in CASES if case.name == name)
    objective = objective_of(case)
    a, line = line_of(case)
    check_task(objective, a)
    return objective, line


@pytest.mark.parametrize(
    ("name", "strategies", "note"),
    [
        # vmap runs the kernels of an LSTM one by one on a CPU.
        ("lstm", [Strategy.STACKED, Strategy.BOUND], "'bound' instead of the faster 'stacked'"),
        ("lstm", [Strategy.STACKED], "'loaded' instead of the faster 'stacked'"),
        ("mlp-relu", [Strategy.STACKED, Strategy.BOUND], None),
        # Models that fold weights have no other strategy.
        ("folding", None, None),
    ],
)
def test_a_slower_strategy_is_noted(
    name: str,
    strategies: list[Strategy] | None,
    note: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objective, line = ready(name)
    if strategies is not None:
        monkeypatch.setattr(strategy_choice, "candidates", lambda _: strategies)
    choose_strategy(objective, line, POINTS)
    notes = [n for n in objective.notes if "strategy" in n]
    assert len(notes) == (note is not None)
    assert all(note in n for n in notes if note is not None)


def test_only_the_first_choice_of_a_run_is_noted() -> None:
    objective, line = ready("mlp-relu")
    objective.strategy = candidates(objective)[0]
    record_choice(objective, line)
    first = objective.first_choice
    objective.strategy = Strategy.LOADED
    record_choice(objective, line)
    assert objective.first_choice == first
    assert not objective.notes


def test_weights_that_are_too_large_to_compare_are_not_noted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objective, line = ready("mlp-relu")
    monkeypatch.setattr(objective_module, "_LARGE", 0)
    choose_strategy(objective, line, POINTS)
    assert objective.first_choice == {"name": "bound", "difference": None}
    assert candidates(objective)[0] is not Strategy.BOUND
    assert not objective.notes


@pytest.mark.parametrize(
    ("name", "stacks"),
    [("mlp-relu", True), ("attention-tied", True), ("cnn", False), ("lstm", False)],
)
def test_convolutions_and_recurrent_layers_are_not_stacked(name: str, stacks: bool) -> None:
    objective = objective_of(next(case for case in CASES if case.name == name))
    objective.device = torch.device("cuda")
    assert (Strategy.STACKED in candidates(objective)) is stacks
