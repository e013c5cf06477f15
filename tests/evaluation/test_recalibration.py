"""BatchNorm's statistics at every point, against a hand loop in float64 and PyTorch's own."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import losscli
from losscli.data import DataSet, Split
from losscli.evaluation import recalibration
from losscli.evaluation.losses.built_in import LOSSES
from losscli.evaluation.memory import points_that_fit
from losscli.evaluation.objective import Objective, recalibrated
from losscli.evaluation.recalibration import Recalibration, batchnorm_layers
from losscli.evaluation.strategies.base import Strategy
from losscli.evaluation.strategies.points import BoundPoints, LoadedPoint
from losscli.evaluation.strategy_choice import find_strategy
from losscli.evaluation.sweep import check, sweep, sweep_plain
from losscli.models import CNN
from losscli.settings import Settings
from losscli.studies.problem import prepare
from losscli.weight_space.slices import Line
from tests import oracle
from tests.cases import CASES, Case, in_turn, sample
from tests.conftest import Losscli

ALPHAS = [-0.5, 0.0, 0.15, 1.0, 2.0]


class Residual(nn.Module):
    """A small ResNet: a block with BatchNorm of several kinds, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.conv1 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(6, momentum=None)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(6, affine=False)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.norm2(self.conv2(self.drop(F.relu(self.norm1(self.conv1(x)))))))
        return self.head(self.drop(x.mean((2, 3))))


class Reusing(nn.Module):
    """One BatchNorm layer, run twice, once by its forward itself; and one under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.second = nn.Linear(6, 6)
        self.tied = nn.BatchNorm1d(6)
        self.other = self.tied
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.first(x)))
        x = torch.tanh(self.norm.forward(self.second(x)))
        return self.head(self.other(x))


class Scaled(nn.Module):
    """BatchNorm on its inputs, with no weights before or in it, and a buffer of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4, affine=False)
        self.hidden = nn.Linear(4, 6)
        self.inner = nn.SyncBatchNorm(6)
        self.head = nn.Linear(6, 3)
        self.register_buffer("scale", torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.scale * torch.relu(self.inner(self.hidden(self.norm(x)))))


class Folded(Residual):
    """Does something of its own when it is put into eval mode."""

    def train(self, mode: bool = True) -> Folded:
        super().train(mode)
        self.ready = not mode
        return self


N = 37


def images(case: str, build: Callable[[], nn.Module]) -> Case:
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(N, 2, 5, 5, generator=generator) - 0.5
    return Case(case, build, x, torch.arange(N) % 3)


def rows(case: str, build: Callable[[], nn.Module]) -> Case:
    generator = torch.Generator().manual_seed(3)
    return Case(case, build, torch.randn(N, 4, generator=generator), torch.arange(N) % 3)


OWN = [
    *(case for case in CASES if batchnorm_layers(m := case.build(), m.state_dict(keep_vars=True))),
    images("residual", Residual),
    images("folded", Folded),
    rows("reusing", Reusing),
    rows("scaled", Scaled),
]
PLAIN = {case.name: case for case in OWN}


def estimates(case: Case, state: dict[str, Tensor], batches: list[Tensor]) -> dict[str, Tensor]:
    """The oracle: the means of hand-made statistics of each layer's inputs, in float64."""
    model = case.build().double()
    model.load_state_dict(state)
    model.eval()
    seen: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def by_hand(module: Any, x: Tensor) -> Tensor:
        columns = x.transpose(0, 1).flatten(1)
        mean = columns.mean(1)
        squares = (columns - mean[:, None]).square().sum(1)
        seen.setdefault(module, []).append((mean, squares / (columns.shape[1] - 1)))
        shape = [1, -1, *[1] * (x.ndim - 2)]
        variance = squares / columns.shape[1]
        y = (x - mean.view(shape)) / (variance + module.eps).sqrt().view(shape)
        if module.weight is None:
            return y
        return y * module.weight.view(shape) + module.bias.view(shape)

    found = dict(state)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.forward = lambda x, module=module: by_hand(module, x)  # type: ignore[method-assign]
    with torch.no_grad():
        for index in batches:
            model(oracle._cast(case.inputs[index], torch.float64))
    for prefix, module in model.named_modules(remove_duplicate=False):
        if module in seen:
            for k, name in enumerate(("running_mean", "running_var")):
                parts = [statistics[k] for statistics in seen[module]]
                found[f"{prefix}.{name}"] = torch.stack(parts).mean(0)
    return found


def dealt(n: int, seed: int = 0) -> list[Tensor]:
    """The batches: the fewest of a size, of at most `BATCH`, in the order of a seed."""
    number = math.ceil(n / recalibration.BATCH)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return list(order[: n // number * number].split(n // number))


def objective_of(
    case: Case, *, dtype: torch.dtype = torch.float64, batch_size: int | None = 16
) -> Objective:
    split = Split(case.inputs, case.targets)
    return Objective(
        case.build(),
        LOSSES[case.loss],
        {},
        DataSet({"all": split}),
        device=torch.device("cpu"),
        dtype=dtype,
        batch_size=batch_size,
        recalibration=Recalibration.plan("all", split, 0),
    )


def line_of(case: Case, seeds: tuple[int, int] = (1, 2)) -> tuple[dict[str, Tensor], Line]:
    a, b = (case.state(seed) for seed in seeds)
    names = [
        n
        for n in a
        if a[n].is_floating_point() and "running" not in n and not torch.equal(a[n], b[n])
    ]
    names = [n for n in names if not n.startswith("tied.")]
    return a, Line({n: a[n] for n in names}, {n: b[n] for n in names})


def curve(
    case: Case,
    alphas: list[float],
    *,
    way: Strategy | None = None,
    chunk: int | None = None,
    seeds: tuple[int, int] = (1, 2),
    **more: Any,
) -> Tensor:
    objective = objective_of(case, **more)
    a, line = line_of(case, seeds)
    check(objective, a)
    objective.strategy = way
    return sweep(objective, line, [(x,) for x in alphas], chunk=chunk)["all"].losses


@cache
def loaded(case: Case) -> Tensor:
    return curve(case, ALPHAS, way=Strategy.LOADED)


@cache
def whole(case: Case) -> Tensor:
    return curve(case, ALPHAS)


@pytest.fixture(autouse=True)
def _several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four batches of nine examples, and one example left over."""
    monkeypatch.setattr(recalibration, "BATCH", 10)


def truth(case: Case, alpha: float, states: tuple[dict[str, Tensor], ...]) -> list[float]:
    state = oracle.blend(*states, alpha)
    state = estimates(case, state, dealt(N))
    # With the statistics held, no example depends on the others.
    return oracle.losses(
        case.build, state, case.inputs, case.targets, case.per_example, batch_size=N
    )


@pytest.mark.parametrize("case", sample(OWN, 0, 2), ids=str)
def test_every_point_has_the_statistics_of_a_loop_by_hand(case: Case) -> None:
    states = case.state(1), case.state(2)
    for alpha, *rows in zip(ALPHAS, whole(case), loaded(case), strict=True):
        expected = truth(case, alpha, states)
        for row in rows:
            np.testing.assert_allclose(row, expected, rtol=1e-9, atol=1e-11)


BOTH = [(case, way) for case in OWN for way in Strategy]


@pytest.mark.parametrize(("case", "way"), sample(BOTH, 0), ids=str)
def test_every_way_gives_the_same_numbers(case: Case, way: Strategy) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = curve(case, ALPHAS, way=way)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(found, loaded(case), rtol=1e-9, atol=1e-11)


# `make test` takes every third case with one of the two.
@pytest.mark.parametrize(
    ("case", "chunk", "batch_size"), sample(in_turn(OWN, (1, 7), (2, 1000)), 0, 6), ids=str
)
def test_any_chunk_and_batch_give_the_same_numbers(case: Case, chunk: int, batch_size: int) -> None:
    parts = curve(case, ALPHAS, chunk=chunk, batch_size=batch_size)
    torch.testing.assert_close(parts, whole(case), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", sample(OWN, 0, 2), ids=str)
def test_swapping_the_ends_mirrors_the_curve(case: Case) -> None:
    back = curve(case, [1 - x for x in reversed(ALPHAS)], seeds=(2, 1))
    torch.testing.assert_close(back.flip(0), whole(case), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", sample(OWN, 1, 2), ids=str)
def test_a_checkpoint_loaded_plainly_gets_its_statistics_too(case: Case) -> None:
    objective = objective_of(case)
    state = case.state(1)
    (found,) = sweep_plain(objective, [state])
    expected = truth(case, 0.0, (state, state))
    np.testing.assert_allclose(found["all"].losses[0], expected, rtol=1e-10, atol=1e-12)


def test_the_fast_ways_are_chosen_with_new_statistics_as_without() -> None:
    for name, way in (("residual", Strategy.SHARED), ("cnn-batchnorm", Strategy.THREADS)):
        objective = objective_of(PLAIN[name], dtype=torch.float32)
        a, line = line_of(PLAIN[name])
        check(objective, a)
        find_strategy(objective, line, [(x,) for x in ALPHAS])
        assert (objective.strategy or objective.provisional) is way


def test_a_way_with_other_statistics_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = objective_of(PLAIN["residual"])
    a, line = line_of(PLAIN["residual"])
    check(objective, a)
    monkeypatch.setattr(BoundPoints, "use_statistics", lambda self: [])
    find_strategy(objective, line, [(x,) for x in ALPHAS])
    assert (objective.strategy or objective.provisional) is Strategy.LOADED


def test_the_statistics_are_those_of_update_bn_where_the_batches_agree() -> None:
    case = PLAIN["cnn-batchnorm"]
    objective, state = objective_of(case), case.state(1)
    model = case.build().double()
    model.load_state_dict(state)
    loader = [case.inputs[index].double() for index in dealt(N)]
    torch.optim.swa_utils.update_bn(loader, model)
    found = recalibrated(objective, state)
    assert objective.idle == []
    for name, expected in model.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(found[name].double(), expected, rtol=1e-10, atol=1e-12)
        elif "num_batches" not in name:
            assert torch.equal(found[name], state[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_mean_over_batches_is_exact(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recalibration, "BATCH", 2)
    case = PLAIN["residual"]
    found = curve(case, [0.0, 0.5], dtype=dtype)
    states = case.state(1), case.state(2)
    for alpha, row in zip([0.0, 0.5], found, strict=True):
        expected = oracle.mean(truth(case, alpha, states))
        assert float(row.mean()) == pytest.approx(expected, rel=2e-2)


def test_nothing_but_the_statistics_is_touched() -> None:
    objective = objective_of(PLAIN["residual"])
    a, line = line_of(PLAIN["residual"])
    check(objective, a)
    sweep(objective, line, [(x,) for x in ALPHAS])
    model = objective.model
    before = {n: t.clone() for n, t in model.state_dict().items() if "num_batches" in n}
    assert before
    assert all(int(t) == 0 for t in before.values())
    assert not any(module.training for module in model.modules())
    assert [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)] == [
        0.1,
        None,
        0.1,
    ]
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_statistics_that_are_not_finite_do_not_outlast_their_point() -> None:
    case = PLAIN["residual"]
    objective = objective_of(case)
    a, line = line_of(case)
    check(objective, a)
    for way in (Strategy.THREADS, Strategy.BOUND, Strategy.LOADED):
        objective.strategy = way
        # At the second point the variances overflow.
        far = [(0.5,), (1e307,), (0.25,), (0.5,)]
        found = sweep(objective, line, far)["all"].losses.mean(1)
        assert found.isfinite().all()
        assert float(found[0]) == float(found[3])
    poisoned = {n: torch.full_like(t, math.nan) if "running" in n else t for n, t in a.items()}
    (plain,) = sweep_plain(objective, [poisoned])
    (clean,) = sweep_plain(objective, [a])
    assert torch.equal(plain["all"].losses, clean["all"].losses)


def test_batches_are_of_one_size_and_few_examples_are_left_over() -> None:
    for n in (2, 9, 10, 11, 37, 100, 101):
        split = Split(torch.arange(n), torch.arange(n))
        plan = Recalibration.plan("train", split, 7)
        sizes = {len(batch) for batch in plan.batches()}
        seen = torch.cat([batch.targets for batch in plan.batches()])
        assert len(sizes) == 1
        assert max(sizes) <= 10
        assert len(set(seen.tolist())) == len(seen) == len(plan) > n - math.ceil(n / 10)
        assert len(next(plan.first_batch().batches())) == len(plan.first_batch())
    assert not torch.equal(plan.order, Recalibration.plan("train", split, 8).order)


def test_statistics_count_as_memory_of_a_point(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = objective_of(PLAIN["residual"])
    _, line = line_of(PLAIN["residual"])
    weights = sum(t.numel() for t in line.a.values()) * 8
    statistics = 3 * 2 * 6 * (8 + 8)
    point = weights + statistics + N * 8
    monkeypatch.setattr("losscli.evaluation.memory._CPU_STACK", 10 * point)
    assert points_that_fit(objective, line.a) == 10
    monkeypatch.setattr("losscli.evaluation.memory._CPU_STACK", 10 * point - 1)
    assert points_that_fit(objective, line.a) == 9


def test_out_of_memory_in_the_statistics_there_are_fewer_points_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = PLAIN["residual"]
    expected = curve(case, ALPHAS)
    objective = objective_of(case)
    a, line = line_of(case)
    check(objective, a)
    objective.strategy = Strategy.SHARED
    sizes, whole = [], BoundPoints.record_statistics

    def scarce(self: BoundPoints, inputs: Any) -> Any:
        sizes.append(len(self))
        if len(self) > 2:
            raise torch.OutOfMemoryError
        return whole(self, inputs)

    monkeypatch.setattr(BoundPoints, "record_statistics", scarce)
    found = sweep(objective, line, [(x,) for x in ALPHAS])["all"].losses
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert sizes == [5, *[2] * 8, *[1] * 4]

    def none(self: BoundPoints, inputs: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(BoundPoints, "record_statistics", none)
    with pytest.raises(losscli.LosscliError, match="a batch of 9 training examples"):
        sweep(objective, line, [(x,) for x in ALPHAS])
    assert objective.batch_size == 16


def test_a_layer_that_is_never_run_keeps_its_statistics_and_is_reported(tmp_path: Path) -> None:
    class Aside(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.aside = nn.BatchNorm2d(6)

    case = images("aside", Aside)
    result = study("interpolate", case, tmp_path, points=2, range=(0.0, 1.0))
    assert any("1 BatchNorm layer such as aside did not run" in n for n in notes(result))


def notes(result: losscli.Result) -> list[str]:
    found: list[str] = result.summary["notes"]
    return found


def study(name: str, case: Case, folder: Path, *, seeds: int = 2, **more: Any) -> losscli.Result:
    files = []
    for seed in range(1, seeds + 1):
        files.append(str(folder / f"{seed}.pt"))
        torch.save(case.state(seed), files[-1])
    given = {
        "model": case.build,
        "data": {"train": (case.inputs, case.targets)},
        "metric": ("none",),
        "dtype": "float64",
        "buffers": "recalibrate",
        **more,
    }
    function = getattr(losscli, name)
    return function(*files, **given) if name == "interpolate" else function(files, **given)


@pytest.mark.parametrize("case", sample(OWN, 1, 4), ids=str)
def test_a_line_has_them_at_its_ends_too(case: Case, tmp_path: Path) -> None:
    result = study("interpolate", case, tmp_path, points=6)
    states = case.state(1), case.state(2)
    rows_ = zip(result.table.floats("alpha"), result.table.floats("loss"), strict=True)
    for alpha, loss in rows_:
        expected = oracle.mean(truth(case, alpha, states))
        assert loss == pytest.approx(expected, rel=1e-9)
    ends = result.summary["splits"]["train"]
    assert ends["loss_b"] == pytest.approx(oracle.mean(truth(case, 1.0, states)), rel=1e-10)
    assert result.summary["endpoint_difference"] <= 1e-9
    assert result.summary["recalibration"] == {
        "split": "train",
        "examples": 36,
        "batch_size": 9,
        "layers": len(batchnorm_layers(m := case.build(), m.state_dict(keep_vars=True))),
    }
    assert notes(result)[0] == (
        "BatchNorm's statistics are re-estimated at every point, from 36 examples of train: the "
        "checkpoints' losses are not those of their files"
    )


def test_in_float32_and_refined_the_line_is_the_same(tmp_path: Path) -> None:
    case = PLAIN["residual"]
    result = study(
        "interpolate", case, tmp_path, points=5, range=(0, 1), dtype="float32", refine=0.05
    )
    states = case.state(1), case.state(2)
    for alpha, loss in zip(result.table.floats("alpha"), result.table.floats("loss"), strict=True):
        assert loss == pytest.approx(oracle.mean(truth(case, alpha, states)), rel=1e-5)


def test_planes_and_their_path_have_re_estimated_statistics(tmp_path: Path) -> None:
    case = PLAIN["residual"]
    result = study("plane", case, tmp_path, seeds=3, points=3)
    states = [case.state(seed) for seed in (1, 2, 3)]
    names = list(line_of(case)[1].a)
    vectors = [torch.cat([state[n].double().flatten() for n in names]).numpy() for state in states]
    first = vectors[1] - vectors[0]
    first /= np.linalg.norm(first)
    second = vectors[2] - vectors[0]
    second -= (second @ first) * first
    second /= np.linalg.norm(second)
    columns = (result.table.floats(name) for name in ("x", "y", "loss"))
    for x, y, loss in zip(*columns, strict=True):
        state = dict(states[0])
        flat = torch.from_numpy(vectors[0] + x * first + y * second)
        for n, part in zip(names, flat.split([states[0][n].numel() for n in names]), strict=True):
            state[n] = part.view(states[0][n].shape)
        assert loss == pytest.approx(oracle.mean(truth(case, 0.0, (state, state))), rel=1e-8)
    for state, loss in zip(states, result.more["path"].floats("loss"), strict=True):
        assert loss == pytest.approx(oracle.mean(truth(case, 0.0, (state, state))), rel=1e-10)


def test_paths_and_ribbons_have_re_estimated_statistics(tmp_path: Path) -> None:
    case = PLAIN["residual"]
    result = study("trajectory", case, tmp_path, seeds=3, residuals=3)
    states = [case.state(seed) for seed in (1, 2, 3)]
    names = list(line_of(case)[1].a)
    points = [torch.cat([s[n].double().flatten() for n in names]) for s in states]
    for state, loss in zip(states, result.table.floats("loss"), strict=True):
        assert loss == pytest.approx(oracle.mean(truth(case, 0.0, (state, state))), rel=1e-10)
    d = points[2] - points[0]
    p = float((points[1] - points[0]) @ d / (d @ d))
    v = points[1] - points[0] - p * d
    v /= v.norm()
    surface = result.more["surface"]
    columns = (surface.floats(name) for name in ("step", "residual", "loss"))
    for step, b, loss in zip(*columns, strict=True):
        t = int(step)
        base = points[0] + (0, p, 1)[t] * d + b * v
        state = dict(states[0])
        for n, part in zip(names, base.split([states[0][n].numel() for n in names]), strict=True):
            state[n] = part.view(states[0][n].shape)
        assert loss == pytest.approx(oracle.mean(truth(case, 0.0, (state, state))), rel=1e-8)


def test_a_check_estimates_them_once_and_holds_them(tmp_path: Path) -> None:
    case = rows("small", lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh()))
    result = study("check", case, tmp_path, seeds=2)
    names = [n for n in case.state(1) if n.endswith(("weight", "bias"))]
    for seed, row in zip((1, 2), result.table.records(), strict=True):
        state = estimates(case, {**case.state(seed)}, dealt(N))
        fixed = {n: t.double() for n, t in state.items()}
        model = case.build().double().eval()

        def loss(flat: Tensor, model: nn.Module = model, fixed: Any = fixed) -> Tensor:
            parts = zip(names, flat.split([fixed[n].numel() for n in names]), strict=True)
            moved = {n: part.view(fixed[n].shape) for n, part in parts}
            outputs = torch.func.functional_call(model, {**fixed, **moved}, case.inputs.double())
            return F.cross_entropy(outputs, case.targets)

        flat = torch.cat([fixed[n].flatten() for n in names])
        gradient = torch.func.grad(loss)(flat)
        values = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat))
        assert row["loss"] == pytest.approx(float(loss(flat)), rel=1e-10)
        assert row["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-8)
        assert row["lambda_min"] == pytest.approx(float(values[0]), rel=1e-8)
        assert row["lambda_max"] == pytest.approx(float(values[-1]), rel=1e-8)
        # The step down is one of the same function: statistics are held along it.
        point = result.summary["splits"]["train"]["points"][seed - 1]
        step = flat - point["descent"]["distance"] * gradient / gradient.norm()
        assert point["descent"]["loss"] == pytest.approx(float(loss(step)), rel=1e-8)
    assert any("re-estimated at every point" in note for note in notes(result))


def test_they_are_those_of_train_where_other_splits_are_looked_at(tmp_path: Path) -> None:
    case = PLAIN["residual"]
    data = {
        "test": (case.inputs[:5], case.targets[:5]),
        "train": (case.inputs, case.targets),
    }
    more = {"data": data, "split": ("test",)}
    result = study("interpolate", case, tmp_path, points=2, range=(0, 1), **more)
    states = case.state(1), case.state(2)
    assert list(result.summary["splits"]) == ["test"]
    for alpha, loss in zip((0.0, 1.0), result.table.floats("loss"), strict=True):
        expected = oracle.mean(truth(case, alpha, states)[:5])
        assert loss == pytest.approx(expected, rel=1e-9)


def test_the_limit_and_the_seed_are_those_of_every_split(tmp_path: Path) -> None:
    case = PLAIN["residual"]
    a, b = (str(tmp_path / f"{seed}.pt") for seed in (1, 2))
    for seed, file in ((1, a), (2, b)):
        torch.save(case.state(seed), file)
    data = {"train": (case.inputs, case.targets), "test": (case.inputs, case.targets)}
    settings = Settings(
        model=case.build, data=data, limit=12, buffers="recalibrate", split=("test",), seed=5
    )
    problem = prepare((a, b), settings)
    training = problem.objective.recalibration
    assert training is not None
    drawn = torch.randperm(N, generator=torch.Generator().manual_seed(5))[:12].sort().values
    seen = torch.cat([batch.targets for batch in training.batches()])
    assert sorted(seen.tolist()) == sorted(case.targets[drawn].tolist())
    assert len(training) == 12


def test_the_plan_counts_the_passes_over_train(folder: Path, losscli: Losscli) -> None:
    save_digits(folder)
    done = losscli("interpolate", "c.pt", "d.pt", *TOLD, "--points", 6, "--dry-run", "--json")
    plan = json.loads(done.stdout)
    assert done.status == 0
    assert plan["passes_over_data"] == plan["passes_for_statistics"] == 3
    assert plan["forward_passes"] == 6 * (29 + 11 + 27)
    text = losscli("interpolate", "c.pt", "d.pt", *TOLD, "--points", 6, "--dry-run").stdout
    assert "3 over the data, 3 over train for statistics" in text


TOLD = (
    *("--model", "cnn:4,channels=1,classes=3,batchnorm=true", "--data", "npz:e.npz"),
    *("--buffers", "recalibrate"),
)


def save_digits(folder: Path, splits: tuple[str, ...] = ("train", "test")) -> None:
    for seed, name in enumerate(("c", "d")):
        torch.manual_seed(seed)
        model = CNN("4", channels=1, classes=3, batchnorm=True)
        torch.save(model.state_dict(), folder / f"{name}.pt")
    generator = torch.Generator().manual_seed(0)
    sizes = {"train": 29, "test": 11, "valid": 7, "single": 1}
    arrays = {}
    for split in splits:
        inputs = torch.rand(sizes[split], 1, 4, 4, generator=generator)
        arrays[f"{split}_inputs"] = inputs.numpy()
        arrays[f"{split}_targets"] = (torch.arange(sizes[split]) % 3).numpy()
    np.savez(folder / "e.npz", **arrays)  # type: ignore[arg-type]


def refused(folder: Path, losscli: Losscli, *arguments: object) -> str:
    before = set(folder.iterdir())
    done = losscli(*arguments, "-o", "x")
    assert done.status == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert set(folder.iterdir()) == before
    return done.stderr


def test_statistics_that_cannot_be_re_estimated_are_refused(folder: Path, losscli: Losscli) -> None:
    told = refused(folder, losscli, "interpolate", "a.pt", "b.pt", "--buffers", "recalibrate")
    assert "the model has no BatchNorm layer that tracks statistics. Leave it out" in told
    save_digits(folder, ("valid", "test"))
    told = refused(folder, losscli, "interpolate", "c.pt", "d.pt", *TOLD)
    assert "takes the split train, and the data's splits are valid, test" in told
    save_digits(folder)
    told = refused(folder, losscli, "interpolate", "c.pt", "d.pt", *TOLD, "--derivatives")
    assert "--derivatives is not available with --buffers recalibrate" in told
    told = refused(folder, losscli, "plane", "c.pt", *TOLD, "--limit", 1)
    assert "no more than one example of train, which has no variance. Give more with --" in told
    save_digits(folder, ("single",))
    told = refused(folder, losscli, "plane", "c.pt", *TOLD)
    assert told.endswith("example of single, which has no variance. Give more\n")


def test_a_batch_that_does_not_fit_is_reported(
    folder: Path, losscli: Losscli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(self: LoadedPoint, inputs: Any) -> Any:
        raise MemoryError

    save_digits(folder)
    before = set(folder.iterdir())
    monkeypatch.setattr(LoadedPoint, "record_statistics", none)
    done = losscli("check", "c.pt", *TOLD, "-o", "x")
    assert (done.status, done.stdout) == (1, "")
    told = "a batch of 9 training examples, which --buffers recalibrate takes at a time, does not"
    assert told in done.stderr
    assert "Try --device cpu or --dtype bfloat16" in done.stderr
    assert done.stderr.count("\n") == 1
    assert set(folder.iterdir()) == before


def test_the_only_split_stands_in_for_train(folder: Path, losscli: Losscli) -> None:
    save_digits(folder, ("valid",))
    done = losscli("barriers", "c.pt", "d.pt", *TOLD, "-o", "x", "--no-figure", "--json")
    assert done.status == 0
    assert json.loads(done.stdout)["recalibration"]["split"] == "valid"


HINT = "between the checkpoints BatchNorm's statistics are not those of the data"


def with_statistics(case: Case, *seeds: int) -> list[dict[str, Tensor]]:
    """Networks with large scores, and the statistics that the data have there."""
    found = []
    for seed in seeds:
        large = {n: 20 * t if n == "head.weight" else t for n, t in case.state(seed).items()}
        estimated = estimates(case, large, dealt(N))
        found.append({n: t.to(large[n].dtype) for n, t in estimated.items()})
    return found


def hints(name: str, states: list[dict[str, Tensor]], folder: Path, **more: Any) -> list[str]:
    case, files = PLAIN["residual"], []
    for t, state in enumerate(states):
        files.append(str(folder / f"{t}.pt"))
        torch.save(state, files[-1])
    function = getattr(losscli, name)
    given = {"model": case.build, "data": {"train": (case.inputs, case.targets)}, **more}
    result = function(*files, **given) if name == "interpolate" else function(files, **given)
    return [note for note in notes(result) if note.startswith(HINT)]


STUDIES = [
    ("interpolate", 2, {"points": 2, "range": (0, 1)}),
    ("barriers", 2, {"points": 3}),
    ("plane", 3, {"points": 2, "pca": True}),
    ("trajectory", 3, {"residuals": 2}),
    ("plane", 3, {"points": 2}),
]


WHERE = {
    "interpolate": r"at α = 0\.5",
    "barriers": r"halfway between \S+/0\.pt and \S+/1\.pt",
    "trajectory": "halfway between the first and the last checkpoint",
    "plane": r"at \(\S+, \S+\)",
}


@pytest.mark.parametrize(("name", "number", "more"), sample(STUDIES, 0))
def test_where_statistics_matter_the_cure_is_named_once(
    name: str, number: int, more: dict[str, Any], tmp_path: Path
) -> None:
    states = with_statistics(PLAIN["residual"], *range(1, number + 1))
    (hint,) = hints(name, states, tmp_path, **more)
    assert re.search(rf": the loss of a first batch of train {WHERE[name]} is [0-9]", hint), hint
    assert hint.endswith("; --buffers recalibrate re-estimates them")
    for buffers in ("a", "recalibrate"):
        assert not hints(name, states, tmp_path, **more, buffers=buffers)
    assert not hints(name, states, tmp_path, **more, except_=("*running*",))


@pytest.mark.parametrize(("name", "number", "more"), sample(STUDIES, 1))
def test_neighbouring_points_get_no_hint(
    name: str, number: int, more: dict[str, Any], tmp_path: Path
) -> None:
    case = PLAIN["residual"]
    (state,) = with_statistics(case, 1)
    near = [state]
    for seed in range(2, number + 1):
        there = {
            n: torch.lerp(t, case.state(seed)[n], 0.01) if t.ndim else t for n, t in state.items()
        }
        near.append({n: t.to(state[n].dtype) for n, t in estimates(case, there, dealt(N)).items()})
    assert not hints(name, near, tmp_path, **more)


def test_from_the_start_of_training_there_is_a_hint_too(tmp_path: Path) -> None:
    case = PLAIN["residual"]
    torch.manual_seed(0)
    start = {n: t.clone() for n, t in case.build().state_dict().items()}
    (end,) = with_statistics(case, 2)
    for states in ([start, end], [end, start]):
        assert hints("interpolate", states, tmp_path, points=2, range=(0, 1))


def test_the_loss_of_the_hint_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    case = PLAIN["residual"]
    states = with_statistics(case, 1, 2)
    (hint,) = hints("interpolate", states, tmp_path, points=2, range=(0, 1), dtype="float64")
    middle = oracle.blend(*states, 0.5)
    expected = [
        oracle.mean(oracle.losses(case.build, state, case.inputs, case.targets, case.per_example))
        for state in (middle, estimates(case, middle, [torch.arange(N)]))
    ]
    assert f" at α = 0.5 is {expected[0]:.4g}, and {expected[1]:.4g} with" in hint


def test_a_network_without_batchnorm_gets_no_hint(folder: Path, losscli: Losscli) -> None:
    done = losscli("interpolate", "a.pt", "b.pt", "--points", 3, "-o", "x", "--no-figure")
    assert done.status == 0
    assert "BatchNorm" not in done.stderr
