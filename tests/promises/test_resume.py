"""A run that was broken off anywhere ends with the bytes of one that was not."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import Subset, TensorDataset

import losscli
from losscli.checkpoint import name_checkpoint
from losscli.cli.app import make_app
from losscli.data import DataSet, Examples, Split
from losscli.data.objects import to_data_set
from losscli.errors import UsageError
from losscli.evaluation.journal import Journal
from losscli.evaluation.objective import Evaluation, Objective
from losscli.evaluation.recalibration import Recalibration
from losscli.evaluation.sampling import Estimate, evaluate_until_precise
from losscli.evaluation.strategies.base import Strategy
from losscli.evaluation.strategy_choice import find_strategy
from losscli.evaluation.sweep import sweep, sweep_plain
from losscli.evaluation.task_checks import check_task
from losscli.evaluation.tasks import Execution
from losscli.models import MLP
from losscli.results.result import to_json
from losscli.settings import Settings
from losscli.studies.base import Study
from losscli.studies.check import Check
from losscli.studies.interpolation import Interpolation
from losscli.studies.plane import Plane
from losscli.studies.trajectory import Trajectory
from losscli.weight_space.digest import digest
from losscli.weight_space.slices import Line
from tests.cases import CASES, Case
from tests.conftest import invoke
from tests.moments import save_trained

ALPHAS = [(x,) for x in np.linspace(-0.5, 1.5, 11).tolist()]
TRIED = [case for case in CASES if str(case) in {"mlp-relu", "cnn-batchnorm", "attention-tied"}]


class _BrokenError(Exception):
    """What breaks a run off."""


class _Breaking:
    """A journal that breaks the run off at a record."""

    def __init__(self, journal: Journal, records: int) -> None:
        self._journal = journal
        self._left = records
        self.recall = journal.recall
        self.recalled = 0.0

    def record(self, key: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        if not self._left:
            raise _BrokenError
        self._left -= 1
        self._journal.record(key, arrays)


def build(
    case: Case,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 16,
    *,
    recalibrate: bool = False,
) -> Objective:
    split = Split(case.inputs, case.targets)
    return Objective(
        case.build(),
        case.per_example,
        {"accuracy": losscli.evaluation.losses.metrics.METRICS["accuracy"]}
        if case.loss == "cross_entropy"
        else {},
        DataSet({"all": split}),
        device=torch.device("cpu"),
        dtype=dtype,
        batch_size=batch_size,
        recalibration=Recalibration.plan("all", split, 0) if recalibrate else None,
    )


def line(case: Case) -> tuple[dict[str, torch.Tensor], Line]:
    a, b = case.state(1), case.state(2)
    moving = [name for name, tensor in a.items() if tensor.is_floating_point()]
    return a, Line({n: a[n] for n in moving}, {n: b[n] for n in moving})


def walk(
    case: Case, journal: Any, chunk: int | None = 3, *, recalibrate: bool = False
) -> list[Evaluation]:
    """What a study does: the ends plainly, then the points, on all examples."""
    objective, (a, there) = build(case, recalibrate=recalibrate), line(case)
    check_task(objective, a)
    (first,) = sweep_plain(objective, [a], execution=Execution(journal=journal))
    execution = Execution(journal=journal)
    found = sweep(objective, there, ALPHAS, chunk=chunk, execution=execution)
    again = sweep(objective, there, [(0.33,), (0.77,)], execution=execution)
    return [first["all"], found["all"], again["all"]]


def same(found: Sequence[Evaluation], truth: Sequence[Evaluation]) -> bool:
    return all(
        torch.equal(one.losses, other.losses)
        and one.losses.dtype == other.losses.dtype
        and one.metrics.keys() == other.metrics.keys()
        and all(torch.equal(one.metrics[name], other.metrics[name]) for name in one.metrics)
        for one, other in zip(found, truth, strict=True)
    )


def resume_each(
    stem: Path,
    run: Callable[[Any], Any],
    resumed: Callable[[Any], Any],
    most: int,
    *,
    first: int = 0,
    steady: bool = True,
) -> tuple[Any, dict[int, Any]]:
    """Stops a run at each of its records, or at so many of them, and resumes it.

    Where both runs are of one kind, no more is recorded than by a run that was not stopped.

    Returns:
        The result of the run that was not stopped, and those of the resumed runs by the number of
        records at the stop.
    """
    with Journal.open(stem, "i", {}) as journal:
        truth = run(journal)
        whole = len(journal)
        journal.finish()
    stops = range(first, whole)
    if whole - first > most:
        stops = sorted(random.Random(0).sample(stops, most))
    found: dict[int, Any] = {}
    for records in stops:
        with Journal.open(stem, "i", {}) as journal:
            with pytest.raises(_BrokenError):
                run(_Breaking(journal, records))
            assert len(journal) == records
        with Journal.open(stem, "i", {}) as journal:
            found[records] = resumed(journal)
            assert not steady or len(journal) == whole
            journal.finish()
    return truth, found


EVERY = pytest.param(999, marks=pytest.mark.stress)
"""All stops, not a few."""


@pytest.mark.parametrize("most", [3, EVERY])
@pytest.mark.parametrize("case", TRIED, ids=str)
def test_a_walk_that_was_stopped_ends_with_the_same_bits(
    case: Case, most: int, tmp_path: Path
) -> None:
    truth, found = resume_each(tmp_path / "run", partial(walk, case), partial(walk, case), most)
    assert same(truth, walk(case, None))
    assert len(found) == min(most, 1 + 4 + 1)
    assert all(same(one, truth) for one in found.values())


@pytest.mark.parametrize("most", [1, EVERY])
@pytest.mark.parametrize("statistics", ["moved", "left"])
def test_estimated_statistics_are_those_of_an_unbroken_run(
    statistics: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = next(case for case in TRIED if str(case) == "cnn-batchnorm")
    if statistics == "left":
        a, there = line(case)
        ends = ({n: t for n, t in end.items() if "running" not in n} for end in there.ends)
        part = Line(*ends)
        monkeypatch.setattr(f"{__name__}.line", lambda case: (a, part))
    run = partial(walk, case, recalibrate=True)
    truth, found = resume_each(tmp_path / "run", run, run, most)
    assert same(truth, run(None))
    assert len(found) == min(most, 1 + 4 + 1)
    assert all(same(one, truth) for one in found.values())
    assert not same(walk(case, None), truth)


def test_finished_points_are_not_evaluated_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen, told = Objective.at, [], []

    def at(self: Objective, slice_: Any, points: Sequence[Any], *rest: Any) -> Any:
        seen.extend(points)
        return real(self, slice_, points, *rest)

    case, stem = TRIED[0], tmp_path / "run"
    with Journal.open(stem, "i", {}) as journal, pytest.raises(_BrokenError):
        walk(case, _Breaking(journal, 3))
    monkeypatch.setattr(Objective, "at", at)
    monkeypatch.setattr(Objective, "plain", None)
    with Journal.open(stem, "i", {}) as journal:
        objective, (a, there) = build(case), line(case)
        execution = Execution(told.append, journal)
        sweep_plain(objective, [a], execution=execution)
        assert told == [1]
        # What a slice does not move is as last loaded.
        assert all(torch.equal(objective.tensors[name], tensor) for name, tensor in a.items())
        told.clear()
        sweep(objective, there, ALPHAS, chunk=3, execution=execution)
    assert seen == ALPHAS[6:]
    assert told[:2] == [3, 6]
    assert told[-1] == pytest.approx(11)


def _tight(monkeypatch: pytest.MonkeyPatch, points: int, batch: int) -> None:
    """Lets no more points and examples into the memory."""
    real = Objective.at

    def at(self: Objective, slice_: Any, coordinates: Sequence[Any], *rest: Any) -> Any:
        if len(coordinates) > points or self.batch_size > batch:
            raise torch.OutOfMemoryError("on purpose")
        return real(self, slice_, coordinates, *rest)

    monkeypatch.setattr(Objective, "at", at)


@pytest.mark.parametrize(
    ("points", "batch", "lasting", "most"),
    [
        (2, 16, True, 3),
        (1, 5, True, 1),
        (2, 16, False, 4),
        *(
            pytest.param(*sizes, lasting, 999, marks=pytest.mark.stress)
            for sizes in ((2, 16), (1, 5))
            for lasting in (True, False)
        ),
    ],
)
def test_chunks_and_batches_that_memory_halved_stay_halved(
    points: int,
    batch: int,
    lasting: bool,
    most: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = TRIED[0]

    def tight(journal: Any) -> list[Evaluation]:
        with monkeypatch.context() as patch:
            _tight(patch, points, batch)
            return walk(case, journal, chunk=None)

    resumed = tight if lasting else partial(walk, case, chunk=None)
    truth, found = resume_each(tmp_path / "run", tight, resumed, most, steady=lasting)
    assert len(found) >= min(most, 5)
    # Where memory was tight once and no chunk of a sweep had been finished, the next run has
    # nothing to go by, as if it had never been tight.
    for records, one in found.items():
        if lasting or records >= 2:
            assert same(one[:2], truth[:2])
        if lasting:
            assert same(one, truth)


def test_the_chosen_strategy_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, stem = TRIED[0], tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("losscli.evaluation.strategy_choice.candidates", lambda _: [])
        truth = walk(case, None)
        with Journal.open(stem, "i", {}) as journal, pytest.raises(_BrokenError):
            walk(case, _Breaking(journal, 2))
    ways = []
    real = Objective.at

    def at(self: Objective, *rest: Any) -> Any:
        ways.append(self.strategy)
        return real(self, *rest)

    with Journal.open(stem, "i", {}) as journal:
        monkeypatch.setattr(Objective, "at", at)
        assert same(walk(case, journal), truth)
    assert set(ways) == {Strategy.LOADED}


def test_another_point_slice_type_or_loaded_tensor_is_not_recalled(tmp_path: Path) -> None:
    case = next(case for case in TRIED if str(case) == "cnn-batchnorm")
    a, there = line(case)
    statistics = [name for name in a if "running" in name]
    part = Line(*({n: t for n, t in end.items() if n not in statistics} for end in there.ends))
    other = {n: t + 0.5 if n in statistics else t for n, t in a.items()}
    tries: list[tuple[Any, ...]] = [
        (a, part, torch.float32, ALPHAS[:2]),
        (other, part, torch.float32, ALPHAS[:2]),
        (a, Line(part.b, part.a), torch.float32, ALPHAS[:2]),
        (a, part, torch.float64, ALPHAS[:2]),
        (a, part, torch.float32, ALPHAS[1:3]),
        (a, part, torch.float32, [(ALPHAS[0][0] + 1e-16,), ALPHAS[1]]),
    ]
    with Journal.open(tmp_path / "run", "i", {}) as journal:
        for known, (loaded, slice_, dtype, points) in enumerate(tries):
            for _ in range(2):
                objective = build(case, dtype)
                objective.load(loaded)
                found = sweep(objective, slice_, points, execution=Execution(journal=journal))
                assert len(journal) == known + 1
            fresh = build(case, dtype)
            fresh.load(loaded)
            assert same([found["all"]], [sweep(fresh, slice_, points)["all"]])


@pytest.mark.parametrize("most", [3, EVERY])
def test_blocks_of_a_sample_are_distinguished(most: int, tmp_path: Path) -> None:
    case = Case("many", lambda: MLP("4-3"), torch.rand(1200, 4), torch.arange(1200) % 3)

    def run(journal: Any) -> list[float]:
        objective, (a, there) = build(case, batch_size=256), line(case)
        check_task(objective, a)

        def evaluate(splits: Any, _: object) -> dict[str, Estimate]:
            execution = Execution(journal=journal)
            found = sweep(objective, there, ALPHAS, chunk=4, splits=splits, execution=execution)
            return {name: Estimate.of_evaluation(e) for name, e in found.items()}

        found = evaluate_until_precise(objective.splits, 1e-6, 0, evaluate)["all"]
        assert found.examples == 1200
        return [*found.mean.tolist(), *found.squares.tolist()]

    truth, found = resume_each(tmp_path / "run", run, run, most)
    assert len(found) == min(most, 3 * 3)
    assert all(one == truth for one in found.values())


def _interpolate(**more: Any) -> Callable[[], Study]:
    own = {key: more.pop(key) for key in ("refine", "derivatives", "layerwise") if key in more}
    settings = Settings(**more)
    return lambda: Interpolation.plan("a.pt", "b.pt", settings, points=5, range_=(0, 1), **own)


def _trajectory(**more: Any) -> Callable[[], Study]:
    names, own = ["a.pt", "b.pt", "init:3"], {"reach": 1.25, "random_walk": False}
    settings = Settings(model="mlp:6-5-3", **more)
    return lambda: Trajectory.plan(names, settings, surface=True, residuals=2, **own)


def _plane(*names: str, **more: Any) -> Callable[[], Study]:
    settings = Settings(model="mlp:6-5-3")
    own: dict[str, Any] = {"pca": False, "range_": None, "surface": False, **more}
    return lambda: Plane.plan(names, settings, points=3, **own)


def _check(tolerance: float, *names: str, **more: Any) -> Callable[[], Study]:
    own: dict[str, Any] = {"eigenvalues": 1, "learning_rate": None}
    options = "density", "blocks", "probes", "lanczos", "optimizer"
    own |= {key: more.pop(key) for key in options if key in more}
    return lambda: Check.plan(names, Settings(**more), tolerance=tolerance, **own)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("most", [1, pytest.param(12, marks=pytest.mark.stress)])
@pytest.mark.parametrize(
    "plan",
    [
        _interpolate(layerwise=True),
        _interpolate(refine=0.05, derivatives=True, dtype="bfloat16"),
        _interpolate(sampling_error=1e-3, data="npz:many.npz"),
        _trajectory(),
        _plane("a.pt", "b.pt", "init:3"),
        _plane("a.pt", axes="hessian", path=["b.pt"]),
        _check(10, "a.pt", split="test", density=True, blocks=True, probes=2, lanczos=5),
        _check(10, "adam.pt", split="test", optimizer="adam"),
        *(
            pytest.param(study, marks=pytest.mark.stress)
            for study in (
                _trajectory(sampling_error=1e-3, data="npz:many.npz"),
                _plane("a.pt"),
                _check(10, "a.pt", split="test"),
                _check(1e-3, "adam.pt", split="test", optimizer="adam"),
                _check(1e-3, "b.pt", split="test"),
                _check(1e-3, "a.pt", split="test", density=True, blocks=True, probes=2, lanczos=5),
                _check(1e-3, "a.pt", "b.pt"),
                _check(10, "a.pt", "b.pt"),
            )
        ),
    ],
)
def test_a_study_that_was_stopped_gives_the_same_tables_and_summary(
    plan: Callable[[], Study], most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    np.savez(
        "many.npz",
        inputs=generator.random((1100, 6), dtype=np.float32),
        targets=generator.integers(0, 3, 1100),
    )
    monkeypatch.setattr("losscli.evaluation.memory.points_that_fit", lambda *_: 3)
    save_trained("adam.pt")

    def told(journal: Any) -> list[str]:
        result = plan().run(Execution(journal=journal))
        summary = {key: value for key, value in result.summary.items() if key != "seconds"}
        tables = (result.table, *result.more.values())
        return [to_json(summary), *(table.to_csv() for table in tables)]

    truth, found = resume_each(tmp_path / "run", told, told, most, first=1)
    assert found
    assert all(one == truth for one in found.values())


@pytest.mark.usefixtures("folder")
def test_derivatives_and_eigenvalues_are_recalled_and_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curvature = "hessian.critical_points.Curvature"
    for plan, *names in (
        (_interpolate(derivatives=True, dtype="float64"), "derivatives.line.LineDerivatives.sums"),
        (_plane("a.pt", axes="hessian"), curvature),
        (
            _check(10, "a.pt", split="test", density=True, blocks=True, probes=2, lanczos=3),
            curvature,
            "hessian.curvature_probes.Probe.run",
            "hessian.critical_points.CriticalPointTest.largest_eigenvalue",
        ),
    ):
        with Journal.open(tmp_path / "run", "i", {}) as journal, monkeypatch.context() as patch:
            truth = plan().run(Execution(journal=journal)).table.to_csv()
            for name in names:
                patch.setattr(f"losscli.evaluation.{name}", None)
            assert plan().run(Execution(journal=journal)).table.to_csv() == truth
            journal.finish()


def test_a_strategy_with_a_check_that_runs_out_of_memory_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objective, (a, there) = build(TRIED[0]), line(TRIED[0])
    check_task(objective, a)

    def at(*_: Any) -> Any:
        raise torch.OutOfMemoryError("on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "at", at)
        with pytest.raises(torch.OutOfMemoryError):
            find_strategy(objective, there, ALPHAS)
    assert objective.strategy is None
    find_strategy(objective, there, ALPHAS)
    assert objective.strategy is not None


@pytest.mark.parametrize("change", ["in place", "loaded", "type", "name"])
def test_a_digest_is_that_of_the_present_values(change: str) -> None:
    one = torch.arange(6.0)
    before = digest({"a": one})
    assert digest({"a": one.clone()}) == before
    if change == "in place":
        one[3] = 7
    elif change == "loaded":
        one.copy_(torch.ones(6))
    elif change == "type":
        one = one.view(torch.int32)
    assert digest({"b" if change == "name" else "a": one}) != before
    one.copy_(torch.arange(6.0).view(one.dtype))


def test_large_tensors_have_the_same_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"{i}": torch.full((1000,), float(i)) for i in range(5)}
    before = digest({name: tensor.clone() for name, tensor in tensors.items()})
    monkeypatch.setattr("losscli.weight_space.digest._PARALLEL_BYTES", 0)
    assert digest(tensors) == before


def test_the_digest_of_every_form_of_examples_shows_a_change() -> None:
    inputs, targets = torch.rand(40, 3), torch.arange(40) % 3
    other = inputs.clone()
    other[39, 2] += 1
    forms: list[Callable[[torch.Tensor], Examples]] = [
        lambda x: Split(x, targets),
        lambda x: Split({"x": x}, targets),
        lambda x: to_data_set(Subset(TensorDataset(x, targets), range(40)), "here", 0).splits[
            "data"
        ],
    ]
    found = set()
    for form in forms:
        assert form(inputs).digest == form(inputs.clone()).digest
        assert form(inputs).digest != form(other).digest
        halves = [form(inputs).take(slice(0, 20)).digest, form(inputs).take(slice(20, 40)).digest]
        found.update([form(inputs).digest, *halves])
    assert len(found) == 3 * len(forms)


class Kinked(nn.Module):
    """f(w) = w² − |w|, with a gradient of 0 in autograd at its kink."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.w * self.w - self.w.abs()).expand(len(x))


@pytest.mark.parametrize(
    ("changed", "value", "reason"),
    [
        ("problem.__version__", "0.0.9", f"losscli was 0.0.9 and is {losscli.__version__}"),
        ("fingerprint._own_code", lambda: "0" * 64, "the code of losscli changed"),
    ],
)
def test_a_verdict_of_an_older_version_is_not_resumed(
    changed: str, value: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def verdict() -> tuple[str, str | None]:
        plan = Check.plan(
            [name_checkpoint({"w": torch.zeros(())}, "kink")],
            Settings(
                model=Kinked,
                data={"all": (torch.ones(4, 1), torch.zeros(4))},
                loss=lambda outputs, _: outputs,
                metric=("none",),
                dtype="float64",
            ),
            tolerance=1e-3,
            eigenvalues=1,
            learning_rate=None,
        )
        with Journal.open(tmp_path / "run", *plan.fingerprint) as journal:
            result = plan.run(Execution(journal=journal))
            (row,) = result.table.records()
            return str(row["verdict"]), journal.restart_reason

    contradiction = "losscli.evaluation.hessian.critical_points.CriticalPointTest.contradiction"
    with monkeypatch.context() as older:
        older.setattr(f"losscli.studies.{changed}", value)
        with older.context() as unchecked:
            unchecked.setattr(contradiction, lambda *_, **__: "")
            assert verdict() == ("minimum", None)
        # The version that wrote the journal resumes from it.
        assert verdict() == ("minimum", None)
    assert verdict() == ("undecided", reason)
    assert verdict() == ("undecided", None)


@pytest.mark.parametrize(
    "command",
    [
        "interpolate a.pt b.pt --layerwise",
        "trajectory a.pt b.pt init:7 --random-walk",
        "plane a.pt",
        "plane a.pt b.pt init:7",
        "plane --pca a.pt b.pt init:7",
        "plane a.pt --axes hessian",
        "plane a.pt --path b.pt",
        "around a.pt",
        "around a.pt --along gradient",
        "barriers a.pt b.pt --disagreement --cka",
        "check a.pt --density --blocks",
        "sharpness a.pt",
        "connect a.pt b.pt",
        "soup a.pt b.pt --greedy test",
    ],
)
def test_conditions_of_a_journal_are_named_as_options_only_if_they_are(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []

    def stop(*fingerprint: Any) -> None:
        found.extend(fingerprint[-1])
        raise UsageError("stopped")

    monkeypatch.setattr(Journal, "open", stop)
    name, *given = command.split()
    done = invoke(name, *given, "-m", "mlp:6-5-3", "-o", "x.pt")
    assert done.stderr.splitlines()[-1:] == ["losscli: stopped"], done
    parser = typer.main.get_command(make_app("")).commands[name]  # type: ignore[attr-defined]
    options = {option for parameter in parser.params for option in parameter.opts}
    assert {each for each in found if each.startswith("--")} <= options
    assert "the checkpoint a.pt" in found
