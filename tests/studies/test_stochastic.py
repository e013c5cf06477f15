"""Models that are random on purpose, against float64 loops that seed the generators themselves."""

from __future__ import annotations

import json
import math
import random
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.func import functional_call

import losscli
from losscli.errors import OutOfMemoryError
from losscli.evaluation.objective import Objective
from losscli.evaluation.tasks import Execution
from losscli.registry import COMMANDS
from losscli.results.result import Result
from losscli.settings import Settings
from losscli.studies.interpolation import Interpolation
from tests.conftest import Losscli
from tests.promises.test_ranks import assert_same, forked, forks
from tests.promises.test_resume import EVERY, resume_each

N, SEEDS = 24, 3
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(1))
Y = torch.arange(N) % 2
Draw = Callable[[Tensor], Tensor]


class Noisy(nn.Module):
    """Two layers with a random function between them."""

    def __init__(self, draw: Draw = lambda h: F.dropout(h, 0.3, training=True)) -> None:
        super().__init__()
        self.inner, self.outer, self.draw = nn.Linear(3, 4), nn.Linear(4, 2), draw

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.outer(self.draw(self.inner(x).tanh()))
        return out


def numpy_noise(h: Tensor) -> Tensor:
    return h + torch.from_numpy(np.random.normal(size=h.shape)).to(h)  # noqa: NPY002


DRAWS: dict[str, Draw] = {
    "dropout": lambda h: F.dropout(h, 0.3, training=True),
    "noise of torch": lambda h: h + 0.3 * torch.randn_like(h),
    "noise of NumPy": numpy_noise,
    "noise of Python": lambda h: h * random.gauss(1, 0.2),
}


def state(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return Noisy().state_dict()


def seeded(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def losses(draw: Draw, alpha: float, size: int, base: int = 0) -> list[float]:
    """The mean loss of each seed, by a plain loop over the batches."""
    model = Noisy(draw).double()
    a, b = state(0), state(1)
    model.load_state_dict({n: (1 - alpha) * a[n].double() + alpha * b[n].double() for n in a})
    found = []
    for k in range(SEEDS):
        each: list[float] = []
        for start in range(0, N, size):
            seeded(base + k)
            rows = slice(start, start + size)
            outputs = model(X[rows].double())
            each += F.cross_entropy(outputs, Y[rows], reduction="none").tolist()
        found.append(math.fsum(each) / N)
    return found


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{seed}.pt" for seed in range(3)]
    for seed, path in enumerate(paths):
        torch.save(state(seed), path)
    return paths


def options(draw: Draw = DRAWS["dropout"], **more: Any) -> dict[str, Any]:
    given = {"model": lambda: Noisy(draw), "data": {"t": (X, Y)}, "metric": "none"}
    return {**given, "stochastic": SEEDS, "dtype": "float64", "batch_size": 10, **more}


@pytest.mark.parametrize("name", DRAWS)
def test_the_loss_is_the_mean_over_seeds(name: str, files: list[Path]) -> None:
    before = torch.get_rng_state()
    result = losscli.interpolate(*files[:2], points=3, range=(0, 1), seed=7, **options(DRAWS[name]))
    assert torch.equal(torch.get_rng_state(), before)
    for row in result.table.records():
        found = losses(DRAWS[name], float(row["alpha"]), 10, base=7)  # type: ignore[arg-type]
        assert row["loss"] == pytest.approx(math.fsum(found) / SEEDS, rel=1e-10)
        error = statistics.stdev(found) / math.sqrt(SEEDS)
        assert row["loss_seed_stderr"] == pytest.approx(error, rel=1e-8)
    assert result.summary["stochastic"] == SEEDS
    largest = max(result.table.floats("loss_seed_stderr"))
    assert (
        f"t: standard errors over the 3 seeds are at most {largest:.2g}" in result.summary["notes"]
    )


def mean_loss(size: int, point: Tensor) -> Tensor:
    """The mean over seeds and examples as a function of the weights."""
    shapes = {name: tensor.shape for name, tensor in state(0).items()}
    parts = point.split([shape.numel() for shape in shapes.values()])
    named = {n: p.view(shapes[n]) for n, p in zip(shapes, parts, strict=True)}
    model, total = Noisy().double(), torch.zeros(())
    for k in range(SEEDS):
        for start in range(0, N, size):
            seeded(k)
            rows = slice(start, start + size)
            outputs = functional_call(model, named, (X[rows].double(),))
            total = total + F.cross_entropy(outputs, Y[rows], reduction="sum")
    return total / N / SEEDS


def test_derivatives_are_those_of_the_mean_over_seeds(files: list[Path]) -> None:
    def loss(point: Tensor) -> Tensor:
        return mean_loss(N, point)

    given = options(batch_size=N)
    a, b = (torch.cat([t.double().flatten() for t in state(s).values()]) for s in (0, 1))
    result = losscli.interpolate(*files[:2], points=2, range=(0, 0.5), derivatives=True, **given)
    for row in result.table.records():
        point = a + float(row["alpha"]) * (b - a)  # type: ignore[arg-type]
        slope = torch.autograd.functional.jacobian(loss, point) @ (b - a)
        curvature = (b - a) @ torch.autograd.functional.hessian(loss, point) @ (b - a)
        assert row["slope"] == pytest.approx(float(slope), rel=1e-8)
        assert row["curvature"] == pytest.approx(float(curvature), rel=1e-8)
    gradient = torch.autograd.functional.jacobian(loss, a)
    values = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, a))
    checked = losscli.check(files[0], **given)
    (row,) = checked.table.records()
    assert row["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-9)
    assert row["lambda_min"] == pytest.approx(float(values[0]), rel=1e-8)
    assert row["lambda_max"] == pytest.approx(float(values[-1]), rel=1e-8)
    assert "over the seeds" in COMMANDS["check"].as_text(checked)
    found = losses(DRAWS["dropout"], 0.0, N)
    error = statistics.stdev(found) / math.sqrt(SEEDS)
    assert checked.summary["splits"]["t"]["points"][0]["loss_seed_stderr"] == pytest.approx(error)
    sharp = losscli.sharpness(files[0], rho=0.1, samples=2, **given)
    rise = float(loss(a + 0.1 * gradient / gradient.norm()) - loss(a))
    assert sharp.table["sam"][0] == pytest.approx(rise, rel=1e-8)
    assert sharp.summary["splits"]["t"]["points"][0]["loss_seed_stderr"] == pytest.approx(error)


STUDIES: dict[str, Callable[..., Result[Any]]] = {
    "trajectory": lambda files, **more: losscli.trajectory(files, residuals=2, **more),
    "plane": lambda files, **more: losscli.plane(files, points=2, **more),
    "around": lambda files, **more: losscli.around(files, points=3, directions=1, **more),
    "barriers": lambda files, **more: losscli.barriers(files, points=3, **more),
}


def test_every_study_evaluates_every_point_with_the_same_seeds(files: list[Path]) -> None:
    expected = math.fsum(losses(DRAWS["dropout"], 0.0, 10)) / SEEDS
    for name, study in STUDIES.items():
        result = study(files, **options())
        tables = [result.table, *result.more.values()]
        every = [loss for table in tables if "loss" in table.columns for loss in table["loss"]]
        assert any(loss == pytest.approx(expected, rel=1e-10) for loss in every), name
        assert any("loss_seed_stderr" in table.columns for table in tables), name
        assert any("mean over 3 seeds" in note for note in result.summary["notes"]), name


def test_one_seed_has_no_spread_and_single_precision_is_close(files: list[Path]) -> None:
    one = losscli.interpolate(*files[:2], points=2, **options(stochastic=1))
    assert one.table.columns == ("alpha", "split", "loss", "loss_stderr")
    wide = losscli.interpolate(*files[:2], points=2, **options())
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 5e-2)):
        narrow = losscli.interpolate(*files[:2], points=2, **options(dtype=dtype))
        assert narrow.table.floats("loss") == pytest.approx(wide.table.floats("loss"), tolerance)


def test_objectives_and_losses_of_batches_may_be_random(files: list[Path]) -> None:
    def collocation(model: Callable[[Tensor], Tensor], batch: Any) -> Tensor:
        x = torch.rand_like(batch[0], requires_grad=True)
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return slope.square().sum(1)

    model = nn.Sequential()
    model.add_module("inner", nn.Linear(3, 4))
    model.add_module("draw", nn.Tanh())
    model.add_module("outer", nn.Linear(4, 2))
    given = options(model=lambda: model, objective=collocation)
    result = losscli.interpolate(*files[:2], points=2, range=(0, 1), derivatives=True, **given)
    model = model.double()
    model.load_state_dict(state(0))
    found = []
    for k in range(SEEDS):
        each: list[float] = []
        for start in range(0, N, 10):
            seeded(k)
            each += collocation(model, (X[start : start + 10].double(),)).tolist()
        found.append(math.fsum(each) / N)
    (row,) = (r for r in result.table.records() if r["alpha"] == 0)
    assert row["loss"] == pytest.approx(math.fsum(found) / SEEDS, rel=1e-10)
    assert row["loss_seed_stderr"] == pytest.approx(statistics.stdev(found) / math.sqrt(SEEDS))
    batches = losscli.interpolate(*files[:2], points=2, **options(batch_loss=True))
    (row,) = (r for r in batches.table.records() if r["alpha"] == 0)
    model = Noisy().double()
    model.load_state_dict(state(0))
    means = []
    for k in range(SEEDS):
        each = []
        for start in range(0, N, 10):
            seeded(k)
            rows = slice(start, start + 10)
            each.append(float(F.cross_entropy(model(X[rows].double()), Y[rows]).detach()))
        means.append(math.fsum(each) / len(each))
    assert row["loss"] == pytest.approx(math.fsum(means) / SEEDS, rel=1e-10)
    assert row["loss_seed_stderr"] == pytest.approx(statistics.stdev(means) / math.sqrt(SEEDS))


CODE = """

import torch
from torch import nn
from torch.nn import functional as F

from losscli.models import MLP

OWN = torch.Generator().manual_seed(0)


class Noisy(MLP):
    def __init__(self):
        super().__init__("6-5-3")

    def forward(self, x):
        return super().forward(F.dropout(x, 0.2, training=True))


class Hidden(MLP):
    def __init__(self):
        super().__init__("6-5-3")

    def forward(self, x):
        torch.rand(1)
        return super().forward(x + torch.rand(x.shape, generator=OWN))


def loss(outputs, targets):
    return F.cross_entropy(outputs + torch.randn_like(outputs), targets, reduction="none")
"""


@pytest.fixture
def mine(folder: Path) -> Path:
    (folder / "mine.py").write_text(CODE)
    return folder


LINE = "interpolate a.pt b.pt --points 3 -q --no-figure"
BAD = {
    "no number": (f"{LINE} --stochastic 0", "--stochastic must be between 1 and 10,000, not 0"),
    "too many": (
        f"{LINE} --stochastic 10001",
        "--stochastic must be between 1 and 10,000, not 10001",
    ),
    "sampled": (f"{LINE} --stochastic 2 --sampling-error 0.1", "--sampling-error is not available"),
    "not random": (
        f"{LINE} --stochastic 2",
        "--stochastic 2 has no effect: the forward pass draws",
    ),
    "own generator": (
        f"{LINE} -m mine.py:Hidden --stochastic 2",
        "different results for the same weights.*Draw random numbers from the global generators",
    ),
    "without it": (f"{LINE} -m mine.py:Noisy", "draws random numbers.*give --stochastic N"),
    "gauss-newton": (
        "check a.pt -m mine.py:Noisy --loss mine.py:loss --stochastic 2 --density --operator ggn",
        "--operator ggn with --stochastic needs a loss of losscli",
    ),
}


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("name", BAD)
def test_invalid_options_are_refused_in_one_line(name: str, mine: Path, losscli: Losscli) -> None:
    command, message = BAD[name]
    before = sorted(mine.iterdir())
    done = losscli(*command.split(), "-o", "x")
    assert done.status in {1, 2}
    assert done.stderr.count("\n") == 1
    assert re.search(message, done.stderr), done.stderr
    assert sorted(p for p in mine.iterdir() if p.name not in {"__pycache__", "x.journal"}) == before


@pytest.mark.usefixtures("unseen")
@forks
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(
            f"{LINE.replace('3', '5')} --split test --stochastic 3 -m mine.py:Noisy "
            "--loss mine.py:loss",
            id="line",
        ),
        pytest.param(
            "check a.pt b.pt -q --no-figure -m mine.py:Noisy --stochastic 2 --split test",
            id="check",
            marks=pytest.mark.stress,
        ),
    ],
)
def test_two_processes_give_the_results_of_one(command: str, mine: Path, losscli: Losscli) -> None:
    torch.set_num_threads(1)
    done = losscli(*command.split(), "-o", "one")
    assert done.status == 0, done
    assert ("over the seeds" in done.stdout) == ("check" in command)
    plan = json.loads(losscli(*command.split(), "--dry-run", "--json").stdout)
    passes = plan["points"] * sum(plan["examples"].values())
    assert plan["forward_passes"] == passes * plan["stochastic"]
    assert losscli("plot", "one.csv", "-o", "x.png").status == 0
    (first,), (other,) = forked([f"{command} -o two"], 2)
    assert (first.status, other.status) == (0, 0), first
    for path in mine.glob("one*.csv"):
        assert_same(path.name, path.name.replace("one", "two"))


@pytest.mark.parametrize("most", [2, EVERY])
def test_an_interrupted_run_ends_with_the_same_numbers(
    most: int, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("losscli.evaluation.journal.journal.sync", lambda _: None)
    monkeypatch.setattr("losscli.evaluation.journal.journal.sync_folder", lambda _: None)
    # So that there is more than one chunk.
    monkeypatch.setattr("losscli.evaluation.memory._WORK", {"cpu": 1})
    monkeypatch.setattr("losscli.evaluation.memory._LEAST", 4)

    def study(journal: Any) -> str:
        settings = Settings(**options())
        ends = (str(files[0]), str(files[1]))
        plan = Interpolation.plan(*ends, settings, points=9, range_=(0.0, 1.0))
        return plan.run(Execution(journal=journal)).table.to_csv()

    whole, found = resume_each(tmp_path / "run", study, study, most)
    assert len(found) >= min(most, 3)
    assert {*found.values()} == {whole}


def test_a_batch_is_not_halved_when_memory_runs_out(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def at(self: Objective, *rest: Any) -> Any:
        raise torch.OutOfMemoryError("on purpose")

    monkeypatch.setattr(Objective, "at", at)
    with pytest.raises(OutOfMemoryError, match="with --stochastic batches are never halved"):
        losscli.interpolate(*files[:2], points=3, **options())
