"""Tasks are recalled or evaluated, recorded once, and found alike by one process and by several."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed import HashStore

from losscli.data import DataSet, Split
from losscli.evaluation.derivatives import sweep as derivatives
from losscli.evaluation.derivatives.line import LineDerivatives, Method
from losscli.evaluation.derivatives.sweep import slopes
from losscli.evaluation.journal import Journal
from losscli.evaluation.objective import Objective
from losscli.evaluation.ranks import Arrays, Ranks
from losscli.evaluation.records import decode, encode, restore, state_of
from losscli.evaluation.strategies.base import Strategy
from losscli.evaluation.sweep import sweep_plain
from losscli.evaluation.task_checks import check_task
from losscli.evaluation.tasks import ALONE, Execution, Task
from losscli.weight_space.slices import Line
from tests.cases import CASES

SIZES = [1.0, 0.5, 3.0, 0.25]


def squares(done: list[int], inside: list[Execution]) -> list[Task]:
    """Tasks that note when they are evaluated, and how what is within them would be executed."""

    def evaluate(i: int, own: Execution) -> Arrays:
        done.append(i)
        inside.append(own)
        own.report(SIZES[i] / 2)
        own.report(SIZES[i] + 1e-9)
        return {"square": np.array([i * i])}

    return [Task(size, partial(evaluate, i), "key", i) for i, size in enumerate(SIZES)]


def values(found: Sequence[Arrays]) -> list[int]:
    return [int(arrays["square"][0]) for arrays in found]


def test_tasks_are_evaluated_and_recorded_once_and_reported_in_order(tmp_path: Path) -> None:
    done: list[int] = []
    inside: list[Execution] = []
    told: list[float] = []
    with Journal.open(tmp_path / "run", "i", {}) as journal:
        execution = Execution(told.append, journal)
        assert values(list(execution.run(squares(done, inside)[:2]))) == [0, 1]
        assert (done, journal.recalled) == ([0, 1], 0)
        # What is evaluated within a task may be recorded too.
        assert {own.journal for own in inside} == {journal}
        told.clear()
        assert values(list(execution.after(10).run(squares(done, inside)))) == [0, 1, 4, 9]
        assert done == [0, 1, 2, 3]
        assert told == [11, 11.5, 13, 14.5, 14.5, 14.625, 14.75, 14.75]
        assert journal.recalled == 1.5
        # What does not count as progress is not left out of its rate either.
        assert values(list(execution.quiet.run(squares(done, inside)))) == [0, 1, 4, 9]
        assert (len(done), len(journal), journal.recalled) == (4, 4, 1.5)
    assert values(list(ALONE.run(squares(done, inside)))) == [0, 1, 4, 9]
    assert len(done) == 8


def test_one_process_takes_a_task_when_the_one_before_was_taken() -> None:
    done: list[int] = []
    made: list[int] = []

    def tasks() -> Any:
        for i, task in enumerate(squares(done, [])):
            made.append(i)
            yield task

    found = ALONE.run(tasks())
    for i in range(4):
        next(found)
        assert made == done == list(range(i + 1))


def test_several_ranks_have_the_results_of_one_and_rank_0_records_them(tmp_path: Path) -> None:
    done: list[int] = []
    inside: list[Execution] = []
    found: dict[int, list[int]] = {}
    told: list[float] = []
    store = HashStore()
    with Journal.open(tmp_path / "run", "i", {}) as journal:
        journal.record("key 2", {"square": np.array([-1])})

        def work(rank: int) -> None:
            ranks = Ranks(store, rank, 3)
            leads = rank == 0
            execution = Execution(told.append if leads else None, journal if leads else None, ranks)
            assert execution.decide(rank) == 0
            assert execution.gather(rank) == [0, 1, 2]
            found[rank] = values(list(execution.run(squares(done, inside))))
            ranks.leave(0)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert found == {rank: [0, 1, -1, 9] for rank in range(3)}
        assert sorted(done) == [0, 1, 3]
        assert [int(journal.recall(f"key {i}")["square"][0]) for i in range(4)] == found[0]  # type: ignore[index]
        assert (len(journal), journal.recalled) == (4, 3)
    # A rank does its task by itself, and hears meanwhile of the others.
    assert {(own.size, own.journal) for own in inside} == {(1, None)}
    assert all(own.poll != ALONE.poll for own in inside)
    assert told == sorted(told)
    assert told[-1] == sum(SIZES)


class _Pair:
    """Two ranks, of which the other one is slow: this one takes all tasks."""

    size = 2

    def gather(self, value: Any) -> list[Any]:
        return [value, value]

    def decide(self, value: Any) -> Any:
        return value

    def poll(self) -> None:
        pass

    def distribute(
        self,
        sizes: Sequence[float],
        work: Callable[[int, Callable[[float], None]], Arrays],
        known: Mapping[int, Arrays],
        on_result: Callable[[int, Arrays], None],
        **_: Any,
    ) -> list[Arrays]:
        have = dict(known)
        for i in sorted(set(range(len(sizes))) - set(known), reverse=True):
            have[i] = work(i, lambda _: None)
            on_result(i, have[i])
        return [have[i] for i in range(len(sizes))]


def objective_and_line(batch_size: int) -> tuple[Objective, Line]:
    case = CASES[0]
    split = Split(case.inputs.double(), case.targets)
    objective = Objective(
        *(case.build(), case.per_example, {}, DataSet({"all": split})),
        device=torch.device("cpu"),
        dtype=torch.float64,
        batch_size=batch_size,
    )
    a, b = ({n: t.double() for n, t in case.state(seed).items()} for seed in (1, 2))
    check_task(objective, a)
    return objective, Line(a, b)


@pytest.mark.parametrize("fits", [16, 5])
def test_derivatives_of_ranks_are_those_of_one_process(
    fits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    alphas = [0.1 * i for i in range(4)]
    real, calls = LineDerivatives.sums, [0]

    def sums(
        course: LineDerivatives, way: Any, weights: Any, batch: Split, *rest: Any
    ) -> tuple[float, float]:
        calls[0] += 1
        if len(batch) > fits and calls[0] > alone:
            raise torch.OutOfMemoryError("on purpose")
        return real(course, way, weights, batch, *rest)

    monkeypatch.setattr(LineDerivatives, "sums", sums)
    alone = 10**9
    truth = slopes(*objective_and_line(16), alphas)["all"]
    alone = calls[0]
    objective, line = objective_and_line(16)
    pair: Any = _Pair()
    found = slopes(objective, line, alphas, execution=Execution(ranks=pair))["all"]
    for one, other in ((found.slope, truth.slope), (found.curvature, truth.curvature)):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
        assert torch.equal(one, other) or fits != 16
    # The way to differentiate is proved once, however many points a rank takes.
    assert calls[0] == 2 * alone or fits != 16
    assert objective.batch_size == (16 if fits == 16 else 4)


def test_reading_a_record_changes_no_objective() -> None:
    objective, line = objective_and_line(16)
    found = objective.plain(line.a)
    objective.strategy = Strategy.SHARED
    arrays = encode(objective, objective.splits, found, 1, 5)
    objective.strategy, objective.batch_size = Strategy.LOADED, 8
    state = state_of(arrays)
    assert torch.equal(decode(arrays, ["all"], [])["all"].losses, found["all"].losses)
    assert state == (1, 5, 16, Strategy.SHARED.value, [])
    assert (objective.strategy, objective.batch_size) == (Strategy.LOADED, 8)
    # A record from before a choice leaves it as it is.
    restore(objective, 4, [])
    assert (objective.strategy, objective.batch_size) == (Strategy.LOADED, 4)
    restore(objective, state.batch_size, state.idle, state.strategy)
    assert (objective.strategy, objective.batch_size) == (Strategy.SHARED, 16)


def test_the_last_checkpoint_stays_loaded_whoever_evaluated_it(tmp_path: Path) -> None:
    (objective, line), pair = objective_and_line(16), _Pair()
    with Journal.open(tmp_path / "run", "i", {}) as journal:
        for ranks in (None, None, pair):
            execution = Execution(journal=journal, ranks=ranks)  # type: ignore[arg-type]
            (_, there) = sweep_plain(objective, [line.a, line.b], execution=execution)
            assert torch.equal(there["all"].losses, objective.plain(line.b)["all"].losses)
            objective.load(line.a)
            sweep_plain(objective, [line.a, line.b], execution=execution)
            assert all(torch.equal(objective.tensors[n], t) for n, t in line.b.items())
        assert len(journal) == 2


def test_unverified_derivatives_are_noted_by_every_rank_and_on_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(derivatives, "choose_method", lambda *_: (Method.FORWARD, "a doubt"))
    pair: Any = _Pair()
    for ranks in (None, pair):
        with Journal.open(tmp_path / "run", "i", {}) as journal, monkeypatch.context() as patch:
            for _ in range(2):
                objective, line = objective_and_line(16)
                execution = Execution(journal=journal, ranks=ranks)
                slopes(objective, line, [0.2, 0.7], execution=execution)
                assert objective.notes == ["a doubt"]
                patch.setattr(LineDerivatives, "sums", None)
            assert len(journal) == 2
            journal.finish()
