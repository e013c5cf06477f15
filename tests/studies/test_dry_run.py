"""How long a run will take: what is counted exactly, on a clock that the test turns."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from losscli.cli.report import plan as plan_text
from losscli.evaluation.cost import Timings, measure, timed
from losscli.evaluation.hessian.curvature import PRODUCT_LIMIT, ROWS_PER_PASS
from losscli.evaluation.hessian.lanczos import MIN_PRODUCTS
from losscli.evaluation.objective import Objective
from losscli.evaluation.path_training import PathTraining
from losscli.evaluation.tasks import Execution
from losscli.settings import Settings
from losscli.studies import dry_run
from losscli.studies.around import Around
from losscli.studies.barriers import Barriers
from losscli.studies.base import Study
from losscli.studies.check import Check
from losscli.studies.connect import Connect
from losscli.studies.interpolation import Interpolation
from losscli.studies.plane import Plane
from losscli.studies.sharpness import Sharpness
from losscli.studies.trajectory import Trajectory
from losscli.weight_space.slices import Slice
from tests.cases import sample
from tests.conftest import Losscli

CPU = {"device": "cpu", "model": "mlp:6-5-3"}
NAMES = ["a.pt", "b.pt", "init:5"]

PLANS: dict[str, Callable[..., Study]] = {
    "interpolate": lambda **s: Interpolation.plan(
        "a.pt", "b.pt", Settings(**s), points=11, range_=(0.0, 1.0)
    ),
    "layerwise": lambda **s: Interpolation.plan(
        "a.pt", "b.pt", Settings(**s), points=11, range_=(0.0, 1.0), layerwise=True
    ),
    "trajectory": lambda **s: Trajectory.plan(
        NAMES, Settings(**s), surface=True, residuals=4, reach=1.0, random_walk=False
    ),
    "path": lambda **s: Trajectory.plan(
        NAMES, Settings(**s), surface=False, residuals=4, reach=1.0, random_walk=False
    ),
    "plane": lambda **s: Plane.plan(
        NAMES[:1], Settings(**s), pca=False, points=5, range_=None, surface=False
    ),
    "eigenvectors": lambda **s: Plane.plan(
        NAMES[:1],
        Settings(**s),
        pca=False,
        points=5,
        range_=None,
        surface=False,
        axes="hessian",
        path=NAMES[1:],
    ),
    "barriers": lambda **s: Barriers.plan(NAMES, Settings(**s), points=5),
    "around": lambda **s: Around.plan(NAMES, Settings(**s), directions=2, points=5),
    "sharpness": lambda **s: Sharpness.plan(NAMES, Settings(**s), rho=[0.1, 0.2], samples=1),
}

# How many points are loaded plainly, and how many are swept.
POINTS = {
    "interpolate": (2, 9),
    "layerwise": (2, 9 + 2 * 10),
    "trajectory": (3, 3 * 4),
    "path": (3, 0),
    "plane": (1, 25),
    "eigenvectors": (3, 25),
    "barriers": (3, 3 * 3),
    "around": (3, 3 * 2 * 4),
    "sharpness": (3, 3 * 1 * 2),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.stress if n == "path" else ()) for n in PLANS]
)
def test_the_evaluations_of_a_run_are_counted(name: str, folder: Path) -> None:
    study = PLANS[name](**CPU)
    plain, swept = POINTS[name]
    examples = 29 + 11
    assert study.evaluations == plain + swept
    # In units that no other part has: before it begins a run evaluates first batches, here all.
    timings = Timings(29, 0.5, 1e9, 1.0, 1e3, 1e6, 1e12)
    assert (
        dry_run.evaluation_seconds(study, timings)
        == examples * (plain + 16 + swept * 1e3) + swept * 1e6
    )
    done: list[float] = []
    study.run(Execution(done.append))
    assert done[-1] == pytest.approx(study.steps)
    # Twice the examples take twice as long, whatever the batch.
    half = PLANS[name](**CPU, split=("train",))
    assert dry_run.evaluation_seconds(half, Timings(8, 0.1, 0, 0, 1.0, 0, 0)) == 29 * swept


class _Turned:
    """A clock that stands but where something is evaluated."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, load: float, each: float) -> None:
        self.now = 0.0
        self.batches: list[tuple[int, int]] = []
        at, plain = Objective.at, Objective.plain

        def slowly_at(
            own: Objective, slice_: Slice, points: Any, splits: Any = None, progress: Any = None
        ) -> Any:
            for split in splits.values():
                self.batches.append((len(points), len(split)))
                self.now += each * len(points) * len(split)
            self.now += load * len(points)
            return at(own, slice_, points, splits, progress)

        def slowly(own: Objective, weights: Any, splits: Any = None, progress: Any = None) -> Any:
            for split in splits.values():
                self.batches.append((1, len(split)))
                self.now += 2 * each * len(split)
            return plain(own, weights, splits, progress)

        monkeypatch.setattr(Objective, "at", slowly_at)
        monkeypatch.setattr(Objective, "plain", slowly)

    def __call__(self) -> float:
        return self.now


def test_time_is_estimated_from_one_batch_and_a_few_points(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = PLANS["interpolate"](**CPU)
    clock = _Turned(monkeypatch, load=3.0, each=2.0)
    found = dry_run.estimate(study, clock)
    assert found == {
        "seconds": pytest.approx(40 * (2 * 4 + 9 * 2 + 16 * 4) + 9 * 3),
        "kind": "about",
        "batch": {"examples": 29, "seconds": 2 * 2 * 29},
    }
    # A slow batch is seen once, and of the points at once a single example.
    together = [n for points, n in clock.batches if points > 4]
    assert set(together) == {1}


def test_a_fast_batch_is_timed_as_a_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = PLANS["interpolate"](**CPU)
    clock = _Turned(monkeypatch, load=1e-6, each=1e-6)
    seconds = dry_run.estimate(study, clock)["seconds"]
    assert seconds == pytest.approx(1e-6 * (40 * (2 * 2 + 9 + 16 * 2) + 9))
    assert (min(9, max(8, 2 * torch.get_num_threads())), 29) in clock.batches


def test_refinement_and_derivatives_are_added_to_the_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(**more: Any) -> Interpolation:
        return Interpolation.plan(
            "a.pt", "b.pt", Settings(**CPU), points=11, range_=(0.0, 1.0), **more
        )

    refined = plan(refine=0.01)
    clock = _Turned(monkeypatch, load=0.0, each=1.0)
    once = dry_run.estimate(refined, clock)
    assert once["kind"] == "at least"
    monkeypatch.setattr("losscli.studies.interpolation.timed", lambda *_: 29 * 7.0)
    both = dry_run.estimate(plan(derivatives=True), clock)
    assert both["kind"] == "about"
    assert both["seconds"] == pytest.approx(once["seconds"] + 11 * 40 * 7)


@pytest.mark.parametrize("bends", [1, 3])
def test_each_bend_of_a_path_takes_memory_and_time(
    bends: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Connect.plan(
        *("a.pt", "b.pt", Settings(**CPU)),
        kind="bezier",
        bends=bends,
        steps=4,
        learning_rate=0.01,
        minibatch=8,
        points=5,
        plane=False,
    )
    clock = _Turned(monkeypatch, load=0.0, each=1.0)
    swept: list[int] = []
    at = Objective.at

    def noted(own: Objective, slice_: Slice, *rest: Any) -> Any:
        swept.append(len(slice_.ends))
        return at(own, slice_, *rest)

    monkeypatch.setattr(Objective, "at", noted)
    seconds = []
    for each in (0.0, 7.0):
        monkeypatch.setattr("losscli.evaluation.path_training.timed", lambda *_, s=each: s)
        seconds.append(dry_run.estimate(plan, clock)["seconds"])
    assert seconds[1] - seconds[0] == pytest.approx(4 * 7 * bends)
    assert set(swept) == {bends + 2}
    described = dry_run.describe(plan)
    # Compared with the tensors of a step.
    found: list[int] = []
    combine, move = PathTraining._combine, PathTraining._move

    def combined(own: PathTraining, ends: Any, *rest: Any) -> Any:
        point = combine(own, ends, *rest)
        found.append(point.nbytes + sum(end.nbytes for end in ends))
        return point

    def moved(own: PathTraining, optimiser: Any, path: Any, gradient: Any, t: float) -> None:
        move(own, optimiser, path, gradient, t)
        state = optimiser.state[path]
        vectors = (
            gradient,
            gradient.to(path),
            path,
            path.grad,
            state["exp_avg"],
            state["exp_avg_sq"],
        )
        found[-1] += sum(tensor.nbytes for tensor in vectors)

    monkeypatch.setattr(PathTraining, "_combine", combined)
    monkeypatch.setattr(PathTraining, "_move", moved)
    plan._training.run(Execution())
    assert set(found) == {described["bytes_of_training"]}
    text = plan_text({**described, "estimate": dry_run.estimate(plan, clock)})
    assert "training     4 steps, 0.0 MiB of bends, gradients and moments\n" in text


def test_a_sample_is_at_most_the_whole(folder: Path) -> None:
    assert dry_run.estimate(PLANS["plane"](**CPU, sampling_error=0.1))["kind"] == "at most"


def test_a_check_takes_few_products_or_many(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(number: int) -> Check:
        return Check.plan(
            NAMES[:number], Settings(**CPU), tolerance=1e-3, eigenvalues=1, learning_rate=None
        )

    monkeypatch.setattr("losscli.evaluation.hessian.product_cost.timed", lambda *_: 29.0)
    clock = _Turned(monkeypatch, load=0.0, each=0.0)
    for number in (1, 2):
        found = dry_run.estimate(plan(number), clock)
        assert found["kind"] == "at least"
        # So small a Hessian is made as a whole, of 53 products, many of which share a pass.
        each = 40 / ROWS_PER_PASS
        assert found["product"] == {"seconds": each}
        assert found["seconds"] == pytest.approx(each * number * 53)
        assert found["seconds_at_most"] == pytest.approx(each * number * (53 + 3))
    for module in ("studies.check", "evaluation.hessian.product_cost"):
        monkeypatch.setattr(f"losscli.{module}.DENSE_LIMIT", 10)
    found = dry_run.estimate(plan(2), clock)
    assert found["seconds"] == pytest.approx(40 * 2 * MIN_PRODUCTS)
    assert found["seconds_at_most"] == pytest.approx(40 * 2 * (PRODUCT_LIMIT + 3))


@pytest.mark.parametrize(("budget", "seconds"), [(0, 29.0), (1 << 20, 2.9)])
def test_products_are_cheaper_where_graphs_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch, budget: int, seconds: float
) -> None:
    plan = Check.plan(NAMES[:1], Settings(**CPU), tolerance=1e-3, eigenvalues=1, learning_rate=None)
    # The first without graphs, the second with them.
    times = iter([29.0, 2.9])
    monkeypatch.setattr("losscli.evaluation.hessian.product_cost.timed", lambda *_: next(times))
    for module in ("losscli.studies.check", "losscli.evaluation.hessian.curvature"):
        monkeypatch.setattr(f"{module}.graph_budget", lambda _: budget)
    found = dry_run.estimate(plan, _Turned(monkeypatch, load=0.0, each=0.0))
    assert found["product"]["seconds"] == pytest.approx(seconds / 29 * 40 / ROWS_PER_PASS)
    assert dry_run.describe(plan)["bytes_of_graphs_at_most"] == budget


def test_statistics_cost_their_examples_at_every_point(folder: Path) -> None:
    study = Interpolation.plan(
        "init:1",
        "init:2",
        Settings(
            device="cpu",
            model="cnn:4,channels=1,classes=3,batchnorm=true",
            data=_images(folder),
            buffers="recalibrate",
        ),
        points=11,
        range_=(0.0, 1.0),
    )
    training = study.problem.objective.recalibration
    assert training is not None
    assert dry_run.evaluation_seconds(study, Timings(20, 0, 0, 0, 0, 0, 1.0)) == 11 * len(training)
    assert math.isfinite(dry_run.estimate(study)["seconds"])


def _images(folder: Path) -> str:
    import numpy as np

    images, labels = torch.rand(20, 1, 6, 6).numpy(), (torch.arange(20) % 3).numpy()
    np.savez(folder / "images.npz", train_inputs=images, train_targets=labels)
    return f"npz:{folder / 'images.npz'}"


def test_decoding_is_counted_in_each_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "own.py").write_text(
        "import torch\n"
        "from torch.utils.data import Subset, TensorDataset\n"
        "def data():\n"
        "    whole = TensorDataset(torch.rand(40, 6), torch.arange(40) % 3)\n"
        "    return {'all': Subset(whole, range(40))}\n"
    )
    monkeypatch.setattr("losscli.data.objects.host_budget", lambda: 100)
    study = PLANS["interpolate"](**CPU, data="own.py:data")
    # The two ends, and all between them together.
    assert dry_run.evaluation_seconds(study, Timings(40, 0, 1.0, 0, 0, 0, 0)) == 3 * 40
    clock = iter(range(1000))
    timings = measure(study.problem.objective, study.problem.origin, None, (), lambda: next(clock))
    assert timings.decoding == 1 / 40
    held = PLANS["interpolate"](**CPU)
    assert dry_run.evaluation_seconds(held, Timings(29, 0, 1.0, 0, 0, 0, 0)) == 0
    assert measure(held.problem.objective, held.problem.origin, None, (), lambda: 0).decoding == 0


def test_the_shortest_of_a_few_timings_counts() -> None:
    objective = type("Here", (), {"device": torch.device("cpu")})()
    times = iter([0.0, 0.2, 1.0, 1.05, 2.0, 2.15])
    assert timed(objective, lambda: None, lambda: next(times)) == pytest.approx(0.05)
    slow = iter([0.0, 5.0])
    assert timed(objective, lambda: None, lambda: next(slow)) == 5


@pytest.mark.parametrize(
    "command",
    sample(
        [
            "interpolate a.pt b.pt",
            "interpolate a.pt b.pt --derivatives",
            "trajectory a.pt b.pt init:5",
            "plane a.pt --axes hessian --path b.pt",
            "plane a.pt",
            "barriers a.pt b.pt init:5",
            "around a.pt --along hessian",
            "around a.pt b.pt",
            "around a.pt --along gradient",
            "sharpness a.pt b.pt",
            "check a.pt",
        ],
        0,
        2,
    ),
)
def test_a_dry_run_reports_the_time_and_writes_nothing(
    command: str, losscli: Losscli, folder: Path
) -> None:
    before = sorted(folder.iterdir())
    done = losscli(*command.split(), "--dry-run", "--json")
    assert done.status == 0, done.stderr
    assert not done.stderr
    plan = json.loads(done.stdout)
    found = plan["estimate"]
    assert found["seconds"] > 0
    assert found["batch"]["examples"] == 29
    kind = "about" if "seconds_at_most" in found else found["kind"]
    assert f"time         {kind} " in plan_text(plan)
    assert sorted(folder.iterdir()) == before


def test_a_dry_run_prints_the_time(losscli: Losscli, folder: Path) -> None:
    assert "time         about " in losscli("interpolate", "a.pt", "b.pt", "--dry-run").stdout


def test_a_dry_run_does_not_touch_a_journal(losscli: Losscli, folder: Path) -> None:
    journal = folder / "x.journal"
    journal.write_bytes(b"losscli journal 1\nwhatever is in it")
    assert losscli("interpolate", "a.pt", "b.pt", "-o", "x", "--dry-run").status == 0
    assert journal.read_bytes() == b"losscli journal 1\nwhatever is in it"


def test_a_model_that_fails_on_the_batch_fails_the_dry_run(losscli: Losscli, folder: Path) -> None:
    (folder / "own.py").write_text("def loss(outputs, targets):\n    raise ValueError('no')\n")
    line = ("interpolate", "a.pt", "b.pt", "--loss", "own.py:loss")
    real, dry = losscli(*line), losscli(*line, "--dry-run")
    assert real.status == dry.status == 1
    received = "It receives outputs float32 [29, 3] and targets int64 [29]"
    assert real.stderr == dry.stderr == f"losscli: the loss fails: ValueError: no. {received}\n"


def test_a_batch_that_does_not_fit_is_halved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = PLANS["interpolate"](**CPU, batch_size=16)
    forward = Objective.forward

    def little(own: Objective, model: Any, inputs: Any) -> Any:
        if len(inputs) > 8:
            raise torch.OutOfMemoryError
        return forward(own, model, inputs)

    monkeypatch.setattr(Objective, "forward", little)
    assert dry_run.estimate(study)["batch"]["examples"] == 8


def test_time_is_written_in_words(folder: Path) -> None:
    plan = dry_run.describe(PLANS["path"](**CPU))
    batch = {"examples": 1024, "seconds": 0.041}
    for seconds, words in (
        (0.00041, "0.41 ms"),
        (0.041, "41 ms"),
        (0.56, "0.56 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (130, "2 min 10 s"),
        (3599.7, "1 h"),
        (11100, "3 h 5 min"),
        (86399, "24 h"),
        (200000, "2 d 8 h"),
    ):
        estimate = {"seconds": seconds, "kind": "at least", "batch": batch}
        line = plan_text({**plan, "estimate": estimate}).splitlines()[-1]
        assert line == f"time         at least {words} on cpu (one batch of 1,024 took 41 ms)"
