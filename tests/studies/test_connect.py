"""A trained path between two checkpoints: connect, and export --t."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import TensorDataset

import losscli as library
from losscli.checkpoint import name_checkpoint
from losscli.cli.connect import report
from losscli.errors import LossError, OutOfMemoryError, UsageError
from losscli.evaluation import path_training
from losscli.evaluation.objective import Objective
from losscli.evaluation.tasks import ALONE, Execution
from losscli.models import CNN, MLP
from losscli.settings import Settings
from losscli.studies.connect import Connect
from losscli.table import Table
from losscli.weight_space.slices import Line, path_coefficients
from losscli.weight_space.slices import Path as Curve
from tests.cases import sample
from tests.conftest import ROOT, Losscli
from tests.promises.test_resume import EVERY, resume_each
from tests.studies.test_inspection import batchnorm, state

pytestmark = pytest.mark.usefixtures("traced_once")

SAMPLES = ROOT / "sample_checkpoints"
FEW = ["--steps", "4", "--points", "5", "--minibatch", "8"]
SMALL: dict[str, Any] = {"steps": 4, "points": 5, "minibatch": 8}


@pytest.fixture
def few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluates few points of the plane of a path."""
    monkeypatch.setattr("losscli.studies.connect._PLANE_POINTS", 5)


# --- paths ---------------------------------------------------------------------------------------


def points(number: int, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"w": torch.randn(3, 2, generator=generator, dtype=torch.float64).to(dtype)}
        for _ in range(number)
    ]


@pytest.mark.parametrize("number", [3, 4, 5])
def test_a_bezier_curve_is_that_of_de_casteljau(number: int) -> None:
    ends = points(number)
    for t in (0.0, 0.1, 0.5, 0.75, 1.0):
        expected = [end["w"] for end in ends]
        while len(expected) > 1:
            expected = [(1 - t) * x + t * y for x, y in pairwise(expected)]
        found = Curve("bezier", tuple(ends)).combine([end["w"] for end in ends], (t,))
        assert torch.allclose(found, expected[0], rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("number", [3, 4])
def test_a_chain_is_the_lines_over_its_bends(number: int) -> None:
    ends = points(number, torch.float32)
    values, chain = [end["w"] for end in ends], Curve("chain", tuple(ends))
    for k in range(number - 1):
        line = Line(ends[k], ends[k + 1])
        for along in (0.0, 0.25, 0.5, 0.75):
            t = (k + along) / (number - 1)
            expected = line.combine(values[k : k + 2], (t * (number - 1) - k,))
            assert torch.equal(chain.combine(values, (t,)), expected)


@pytest.mark.parametrize("kind", ["bezier", "chain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_path_is_exact_at_its_ends(kind: Any, dtype: torch.dtype) -> None:
    values = [end["w"] for end in points(4, dtype)]
    for t, end in ((0.0, values[0]), (1.0, values[-1])):
        out = torch.empty_like(end)
        assert torch.equal(Curve(kind, ()).combine(values, (t,), out), end)
        assert out.data_ptr() != end.data_ptr()


def test_the_length_is_the_sum_of_short_lines() -> None:
    for kind in ("bezier", "chain"):
        curve = Curve(kind, tuple(points(4)))  # type: ignore[arg-type]
        values = [end["w"] for end in curve.ends]
        at = [curve.combine(values, (t,)) for t in np.linspace(0, 1, 3001).tolist()]
        expected = sum(float((y - x).norm()) for x, y in pairwise(at))
        assert curve.length(["w"]) == pytest.approx(expected, rel=1e-6)


# --- training ------------------------------------------------------------------------------------


def train_by_hand(
    plan: Connect, model: nn.Module, kind: str, bends: int, steps: int, rate: float
) -> tuple[Tensor, list[float]]:
    """Trains with functional_call in float64 and Adam as its paper has it."""
    training, objective = plan._training, plan.problem.objective
    names = list(plan.counted)
    flat = [
        torch.cat([end[name].double().reshape(-1) for name in names])
        for end in (plan.start, plan.end)
    ]
    chord = flat[1] - flat[0]
    found = torch.stack([flat[0] + (k + 1) / (bends + 1) * chord for k in range(bends)])
    first, second = torch.zeros_like(found), torch.zeros_like(found)
    split, losses = training.examples[1], []
    for step, (t, index) in enumerate(training.draws(), 1):
        own = found.clone().requires_grad_()
        shares = torch.tensor(path_coefficients(kind, bends + 2, t), dtype=torch.float64)  # type: ignore[arg-type]
        point = shares @ torch.stack([flat[0], *own, flat[1]])
        parts = torch.split(point, [plan.start[name].numel() for name in names])
        weights = {n: p.view(plan.start[n].shape) for n, p in zip(names, parts, strict=True)}
        batch = split.take(index)
        inputs = objective.data.prepare(batch.inputs, torch.float64)
        outputs = functional_call(model, weights, (inputs,))
        loss = nn.functional.cross_entropy(outputs, batch.targets)
        (gradient,) = torch.autograd.grad(loss, own)
        losses.append(float(loss.detach()))
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        change = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        found = found - rate * change
        if step == steps:
            return found, losses
    raise AssertionError


@pytest.mark.parametrize(
    ("kind", "bends"), sample([("bezier", 2), ("bezier", 1), ("chain", 2)], 0, 2)
)
def test_the_training_is_that_of_a_loop_by_hand(folder: Path, kind: Any, bends: int) -> None:
    options: dict[str, Any] = {"kind": kind, "bends": bends, "steps": 12, "minibatch": 8}
    settings = Settings(model="mlp:6-5-3", dtype="float64")
    plan = Connect.plan(
        "a.pt", "b.pt", settings, **options, learning_rate=0.03, points=3, plane=False
    )
    expected, losses = train_by_hand(plan, MLP("6-5-3").double(), kind, bends, 12, 0.03)
    result = library.connect(
        "a.pt", "b.pt", **options, learning_rate=0.03, points=3, model="mlp:6-5-3", dtype="float64"
    )
    for bend, truth in zip(result.bends, expected, strict=True):
        found = torch.cat([bend.weights[n].double().reshape(-1) for n in plan.counted])
        # The files are in float32.
        assert torch.equal(found, truth.float().double()) or (found - truth).norm() < 1e-7
    trained = plan._training.run(ALONE)
    assert np.allclose(trained.losses, losses, rtol=1e-9, atol=0)


def test_a_minibatch_in_parts_is_the_same(folder: Path) -> None:
    whole = library.connect("a.pt", "b.pt", **SMALL, dtype="float64", plane=False)
    parts = library.connect("a.pt", "b.pt", **SMALL, dtype="float64", plane=False, batch_size=3)
    for name, tensor in whole.bends[0].weights.items():
        assert torch.allclose(tensor, parts.bends[0].weights[name], rtol=1e-6, atol=1e-7)


def runs_out_of_memory(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets memory run out for larger batches in passes with gradients."""
    real = Objective.forward

    def forward(self: Objective, model: Any, inputs: Any) -> Any:
        if torch.is_grad_enabled() and len(inputs) > most:
            raise torch.OutOfMemoryError
        return real(self, model, inputs)

    monkeypatch.setattr(Objective, "forward", forward)


def in_float64(name: str) -> dict[str, Tensor]:
    return {n: tensor.double() for n, tensor in state(name).items()}


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param("cross_entropy", marks=pytest.mark.stress),
        "cross_entropy,weight=0.2-1-5",
    ],
)
def test_a_minibatch_that_does_not_fit_is_divided_and_stays_the_same(
    loss: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = in_float64("a.pt"), in_float64("b.pt")
    options = {**SMALL, "model": "mlp:6-5-3", "dtype": "float64", "loss": loss, "plane": False}
    (whole,) = library.connect(*ends, **options).bends
    runs_out_of_memory(3, monkeypatch)
    (parts,) = library.connect(*ends, **options).bends
    for name, tensor in whole.weights.items():
        torch.testing.assert_close(parts.weights[name], tensor, rtol=1e-9, atol=1e-12)
        assert not torch.equal(tensor, (ends[0][name] + ends[1][name]) / 2)


def test_a_minibatch_is_not_divided_where_batchnorm_needs_all_of_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    ends = []
    for seed in range(2):
        torch.manual_seed(seed)
        ends.append({
            n: t + torch.rand_like(t) if t.is_floating_point() else t.clone()
            for n, t in model.state_dict().items()
        })
    runs_out_of_memory(4, monkeypatch)
    with pytest.raises(OutOfMemoryError, match=r"minibatch of 8 examples .*--minibatch"):
        library.connect(*ends, **SMALL, model=model)
    with pytest.raises(UsageError, match="--buffers a keeps BatchNorm's statistics"):
        library.connect(*ends, **SMALL, model=model, buffers="a")


def test_without_a_training_split_it_is_refused(folder: Path, losscli: Losscli) -> None:
    (folder / "own.py").write_text(
        "import torch\n"
        "def apart():\n"
        "    split = torch.rand(9, 6), torch.zeros(9).long()\n"
        "    return {'one': split, 'two': split}\n"
    )
    done = losscli("connect", "a.pt", "b.pt", *FEW, "--data", "own.py:apart", "-o", "out")
    assert (done.status, len(done.stderr.splitlines())) == (2, 1)
    assert "connect takes the split train, and the data's splits are one, two" in done.stderr
    assert not list(folder.glob("out*"))


def test_losses_are_those_of_loaded_checkpoints(folder: Path) -> None:
    result = library.connect("a.pt", "b.pt", **{**SMALL, "points": 3}, plane=False)
    save_file(dict(result.bends[0].weights), "c.safetensors")
    table = result.table.where("path", "curve").where("split", "test")
    for t, loss in zip(table.floats("t"), table.floats("loss"), strict=True):
        point = library.export(["a.pt", "c.safetensors", "b.pt"], t=t)
        save_file(dict(point.weights), "p.safetensors")
        line = library.interpolate(
            "p.safetensors", "b.pt", points=2, range=(0, 1), model="mlp:6-5-3"
        )
        assert loss == pytest.approx(line.table.where("split", "test").floats("loss")[0], rel=1e-5)
    line = library.interpolate("a.pt", "b.pt", points=3, range=(0, 1)).table
    straight = result.table.where("path", "line")
    assert straight.floats("loss") == pytest.approx(line.floats("loss"), rel=1e-6)


@pytest.mark.usefixtures("few_points")
def test_the_plane_of_connect_is_that_of_the_command_plane(folder: Path) -> None:
    result = library.connect("a.pt", "b.pt", **SMALL, split="test")
    save_file(dict(result.bends[0].weights), "c.safetensors")
    names = ["a.pt", "c.safetensors", "b.pt"]
    plane = library.plane(names, points=5, model="mlp:6-5-3", split="test").table
    found = result.more["plane"]
    for column in ("x", "y", "loss"):
        assert found.floats(column) == pytest.approx(plane.floats(column), rel=2e-5, abs=1e-4)
    corners = result.summary["plane"]["corners"]
    middle = result.summary["plane"]["curve"][2]
    shares = np.array(path_coefficients("bezier", 3, 0.5))
    assert middle == pytest.approx((shares @ np.array(corners)).tolist())


def test_batchnorm_has_the_statistics_of_each_minibatch_then_those_of_the_point() -> None:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(40, 1, 8, 8, generator=generator)
    data = {"train": TensorDataset(images, torch.arange(40) % 3)}
    ends: list[Any] = [batchnorm(seed) for seed in (1, 2)]
    model = "cnn:3,channels=1,classes=3,batchnorm=true"
    settings: dict[str, Any] = {"model": model, "data": data, "dtype": "float64"}
    options: dict[str, Any] = {**SMALL, "learning_rate": 0.01, "plane": False, "kind": "bezier"}
    plan = Connect.plan(
        *(name_checkpoint(end, x) for end, x in zip(ends, "AB", strict=True)),
        Settings(**settings), **options, bends=1,
    )  # fmt: skip
    network = CNN("3", channels=1, classes=3, batchnorm=True).double().train()
    _, losses = train_by_hand(plan, network, "bezier", 1, 4, 0.01)
    assert np.allclose(plan._training.run(ALONE).losses, losses, rtol=1e-9, atol=0)
    result = library.connect(*ends, **options, **settings)
    assert result.summary["buffers"] == "recalibrate"
    # Those in the file of the bend are those of the bend.
    bend = {"model": model, "data": data, "split": "train", "points": 2, "range": (0.0, 1.0)}
    lines = [
        library.interpolate(result.bends[0], ends[1], buffers=buffers, **bend).table["loss"][0]
        for buffers in ("interpolate", "recalibrate")
    ]
    assert lines[0] == pytest.approx(lines[1], rel=1e-4)
    with pytest.raises(UsageError, match="do not fit the path"):
        library.connect(*ends, **options, **settings, buffers="a")


@pytest.mark.parametrize("most", [4, EVERY])
def test_a_kill_at_any_record_resumes_to_the_same_bytes(
    most: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(path_training, "minute_of_work", lambda _: 1)
    monkeypatch.setattr(path_training, "_MOST_RECORDS", 3)

    def run(journal: Any) -> list[Any]:
        plan = Connect.plan(
            "a.pt", "b.pt", Settings(model="mlp:6-5-3"), kind="bezier", bends=2, steps=7,
            learning_rate=0.01, minibatch=8, points=3, plane=False,
        )  # fmt: skip
        result = plan.run(Execution(journal=journal))
        return [result.table.to_csv(), *(dict(bend.weights) for bend in result.bends)]

    truth, found = resume_each(folder / "j", run, run, most)
    assert len(found) >= min(most, 3 + 3)
    for csv, *bends in found.values():
        assert csv == truth[0]
        for bend, expected in zip(bends, truth[1:], strict=True):
            assert all(torch.equal(bend[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["a.pt", "a.pt"], "the same parameters"),
        (["a.pt", "b.pt", "--bends", "101"], "--bends 101 is above 100"),
        (["a.pt", "b.pt", "--steps", "0"], "--steps 0 trains nothing"),
        (["a.pt", "b.pt", "--bends", "0"], "--bends 0 trains nothing"),
        (["a.pt", "b.pt", "--minibatch", "0"], "--minibatch 0 trains nothing"),
        (["a.pt", "b.pt", "--learning-rate", "0"], "is not above 0"),
        (["a.pt", "b.pt", "--learning-rate", "1e38"], "and below 1e+30"),
        (["a.pt", "b.pt", "--learning-rate", "nan"], "is not above 0"),
        (
            ["a.pt", "b.pt", "--sampling-error", "0.1"],
            "--sampling-error is not available with connect",
        ),
        (["a.pt", "b.pt", "--points", "0"], "--points 0"),
    ],
)
def test_what_connect_cannot_do_is_refused_in_one_line(
    options: list[str], says: str, folder: Path, losscli: Losscli
) -> None:
    before = {path.name for path in folder.iterdir()}
    done = losscli("connect", *options, "-o", "out", "--no-figure")
    assert (done.status, done.stdout) != (0, "")
    lines = [line for line in done.stderr.splitlines() if not line.startswith("note:")]
    assert len(lines) == 1, done.stderr
    assert says in lines[0]
    assert {path.name for path in folder.iterdir()} - before <= {"out.journal"}


@pytest.mark.parametrize("options", ["--bends 2", "--no-plane"])
def test_a_surface_of_a_path_without_a_plane_is_refused(
    options: str, folder: Path, losscli: Losscli
) -> None:
    done = losscli("connect", "a.pt", "b.pt", *options.split(), "--figure", "x.vtp")
    what = "a .vtp holds a surface, and this connect has none. Give one bend, without --no-plane"
    assert (done.status, done.stdout, done.stderr) == (2, "", f"losscli: {what}\n")
    assert not list(folder.glob("*.vtp"))


def test_a_training_that_diverges_names_the_learning_rate(folder: Path) -> None:
    def falling(outputs: Tensor, _: Tensor) -> Tensor:
        return -outputs.square().sum(1)

    with pytest.raises(LossError, match=r"step \d.*is not finite. Lower --learning-rate"):
        library.connect("a.pt", "b.pt", **SMALL, learning_rate=1e20, loss=falling, metric="none")


def test_training_on_a_loss_without_a_gradient_is_refused(
    folder: Path, losscli: Losscli, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Also if the first steps are those of several records.
    monkeypatch.setattr(path_training, "minute_of_work", lambda _: 1)
    (folder / "own.py").write_text(
        "def errors(outputs, targets):\n    return (outputs.argmax(1) != targets).float()\n"
    )
    done = losscli("connect", "a.pt", "b.pt", *FEW, "--loss", "own.py:errors", "-o", "out")
    assert done.status == 1
    assert "the gradient of the loss is 0 in the first 4 steps" in done.stderr
    assert {path.name for path in folder.glob("out*")} <= {"out.journal"}


@pytest.mark.usefixtures("few_points", "unseen")
def test_the_files_are_written_and_not_over_others(folder: Path, losscli: Losscli) -> None:
    command = ["connect", "a.pt", "b.pt", *FEW, "--split", "test", "-o", "out"]
    done = losscli(*command)
    assert done.status == 0, done.stderr
    assert {p.name for p in folder.glob("out*")} == {
        *("out.csv", "out.json", "out.png", "out.plane.csv", "out.bend-1.safetensors"),
    }
    bend = (folder / "out.bend-1.safetensors").read_bytes()
    assert "a path on which the loss stays" in done.stdout
    assert losscli(*command).status == 0
    assert (folder / "out.bend-1.safetensors").read_bytes() == bend
    for suffix in ("csv", "json", "png", "plane.csv"):
        (folder / f"out.{suffix}").unlink()
    refused = losscli(*command)
    assert refused.status == 1
    assert "out.bend-1.safetensors" in refused.stderr
    assert json.loads(losscli(*command, "--dry-run", "--json").stdout)["training_steps"] == 4


def test_the_report_says_how_far_the_path_is_above_the_higher_end(folder: Path) -> None:
    result = library.connect("a.pt", "b.pt", **SMALL, plane=False, split="train")
    split = result.summary["splits"]["train"]
    training = result.summary["training"]
    trained = f"trained  4 steps on train ({training['examples']} examples), mean loss of the last "
    assert f"{trained}tenth {training['loss']:.4g}\n" in report(result)
    ends = [split["curve"]["loss_a"], split["curve"]["loss_b"]]
    for t, loss, said in (
        (0.5, max(ends) + 0.125, ", 0.125 above the higher end"),
        (0.5, max(ends), ""),
        (float(ends[1] > ends[0]), max(ends), ""),
    ):
        split["highest"] = {"t": t, "loss": loss}
        text = f"a path on which the loss stays at or below {loss:.4g} at 5 points{said}\n"
        assert text in report(result)


@pytest.mark.parametrize(
    ("steps", "most"), [(200, 0.02), pytest.param(1000, 1e-3, marks=pytest.mark.stress)]
)
def test_two_solutions_are_connected(steps: int, most: float) -> None:
    ends = [SAMPLES / "relu" / "final.pt", SAMPLES / "relu-seed1" / "final.pt"]
    result = library.connect(*ends, steps=steps, plane=False, split="train")
    split = result.summary["splits"]["train"]
    assert split["line"]["barrier"]["height"] == pytest.approx(0.7715, abs=1e-3)
    assert split["curve"]["barrier"]["height"] < most


def test_no_path_is_found_where_its_barrier_is_not_lower(folder: Path, losscli: Losscli) -> None:
    far = ["--learning-rate", "1e4", "--no-plane", "--no-figure"]
    done = losscli("connect", "a.pt", "b.pt", *FEW, *far, "-o", "far")
    assert done.status == 0, done.stderr
    assert "a path on which" not in done.stdout
    ends = losscli("connect", "a.pt", "b.pt", *FEW[:2], *far, "--points", "2", "-o", "ends")
    assert "not known: no point between A and B" in ends.stdout


def test_bends_of_an_older_run_are_removed(folder: Path, losscli: Losscli) -> None:
    command = ["connect", "a.pt", "b.pt", *FEW, "--no-plane", "--no-figure", "-o", "out"]
    assert losscli(*command, "--bends", "2", "--align").status == 0
    assert losscli(*command, "--force").status == 0
    assert {p.name for p in folder.glob("out.*.safetensors")} == {"out.bend-1.safetensors"}


def test_the_file_of_a_bend_is_the_same_in_every_run(folder: Path) -> None:
    contents = set()
    for k in range(2):
        result = library.connect("a.pt", "b.pt", **SMALL, plane=False, split="test")
        result.bends[0].save(f"{k}.safetensors")
        contents.add((folder / f"{k}.safetensors").read_bytes())
    assert len(contents) == 1


@pytest.mark.parametrize(
    ("options", "given", "says"),
    [
        pytest.param(
            *(["--bends", "2"], ["a.pt", "p.bend-1", "b.pt"], "is bend 1 of 2"),
            marks=pytest.mark.stress,
        ),
        (["--bends", "2"], ["a.pt", "p.bend-2", "p.bend-1", "b.pt"], "is bend 2 of 2"),
        (["--kind", "chain"], ["a.pt", "p.bend-1", "b.pt"], "Give --kind chain"),
        ([], ["b.pt", "p.bend-1", "a.pt"], "is not an end of the path"),
        (["--align"], ["a.pt", "p.bend-1", "b.pt"], "or the aligned B"),
    ],
)
def test_bends_of_another_path_are_refused(
    options: list[str], given: list[str], says: str, folder: Path, losscli: Losscli
) -> None:
    command = ["connect", "a.pt", "b.pt", *FEW, *options, "--no-plane", "--no-figure", "-o", "p"]
    assert losscli(*command).status == 0
    names = [name if name.endswith(".pt") else f"{name}.safetensors" for name in given]
    done = losscli("export", *names, "--t", "0.5", "-o", "x.safetensors")
    assert done.status == 1, done.stdout
    assert says in done.stderr
    assert not Path("x.safetensors").exists()


def test_tensors_that_do_not_move_stay_in_an_exported_point(folder: Path, losscli: Losscli) -> None:
    command = ["connect", "a.pt", "b.pt", *FEW, "--only", "layers.0.*", "-o", "p"]
    assert losscli(*command, "--no-plane", "--no-figure").status == 0
    names = ["a.pt", "p.bend-1.safetensors", "b.pt"]
    assert losscli("export", *names, "--t", "0.5", "-o", "x.safetensors").status == 0
    found, first = load_file("x.safetensors"), state("a.pt")
    assert all(torch.equal(found[n], first[n]) for n in first if not n.startswith("layers.0."))
    assert not torch.equal(found["layers.0.weight"], first["layers.0.weight"])


def test_b_is_aligned_first(folder: Path, losscli: Losscli) -> None:
    command = ["connect", "a.pt", "b.pt", "--align", *FEW, "-o", "out", "--no-plane"]
    done = losscli(*command, "--no-figure")
    assert done.status == 0, done.stderr
    assert losscli("align", "a.pt", "b.pt", "-o", "b.safetensors").status == 0
    found, expected = (load_file(f"{name}.safetensors") for name in ("out.aligned", "b"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not all(torch.equal(found[name], state("b.pt")[name]) for name in found)
    path = ["a.pt", "out.bend-1.safetensors", "out.aligned.safetensors"]
    assert losscli("export", *path, "--t", "0.5", "-o", "p.safetensors").status == 0
    wrapped = {f"module.{name}": tensor for name, tensor in state("a.pt").items()}
    torch.save(wrapped, "ddp.pt")
    assert losscli("export", "ddp.pt", *path[1:], "--t", "0.5", "-o", "q.safetensors").status == 0
    line = library.interpolate("a.pt", "b.safetensors", points=5, range=(0, 1)).table
    straight = Table.read(Path("out.csv")).where("path", "line")
    assert straight.floats("loss") == pytest.approx(line.floats("loss"), rel=1e-6)
    assert losscli(*command, "--no-figure").status == 0


# --- export --t ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bezier", "chain"])
def test_export_makes_the_point_of_a_path(kind: str, folder: Path, losscli: Losscli) -> None:
    torch.manual_seed(5)
    torch.save({"state_dict": MLP("6-5-3").state_dict()}, "c.pt")
    names, t = ["a.pt", "c.pt", "b.pt"], 0.3
    done = losscli("export", *names, "--t", t, "--kind", kind, "-o", "p.safetensors")
    assert done.status == 0, done.stderr
    shares = [(1 - t) ** 2, 2 * t * (1 - t), t**2] if kind == "bezier" else [1 - 2 * t, 2 * t, 0]
    states = [state(name) for name in names]
    for name, tensor in load_file("p.safetensors").items():
        expected = sum(w * s[name].double() for w, s in zip(shares, states, strict=True))
        assert torch.allclose(tensor.double(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["a.pt", "b.pt", "--t", "0.5"], "a path needs A, a bend and B"),
        (["a.pt", "b.pt", "a.pt", "--t", "1.5"], "is not on the path"),
        (["a.pt", "b.pt", "--alpha", "0.5", "--kind", "chain"], "--kind has no effect"),
        (["a.pt", "b.pt", "--alpha", "0.5", "--t", "0.5"], "contradict each other"),
    ],
)
def test_a_point_that_is_not_on_a_path_is_refused_in_one_line(
    arguments: list[str], says: str, folder: Path, losscli: Losscli
) -> None:
    done = losscli("export", *arguments, "-o", "p.safetensors")
    assert (done.status, done.stdout) == (2, "")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert not Path("p.safetensors").exists()
