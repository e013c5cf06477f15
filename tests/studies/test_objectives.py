"""Objectives: functions of the model and a batch, against plain float64 loops."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, Dataset

import losscli
from losscli.data import from_object
from losscli.errors import DataError, LosscliError, UsageError
from losscli.evaluation.objective import Objective
from losscli.evaluation.strategies.base import Strategy
from losscli.evaluation.sweep import sweep
from losscli.evaluation.task_checks import check_task
from losscli.settings import Settings
from losscli.studies.interpolation import Interpolation
from losscli.weight_space.slices import Line
from tests.cases import sample
from tests.conftest import Losscli
from tests.promises.test_ranks import assert_same, forked, forks

N = 18
GENERATOR = torch.Generator().manual_seed(5)
X, Z = torch.rand(N, 2, generator=GENERATOR), torch.randn(N, 2, generator=GENERATOR)
TOKENS = torch.randint(7, (N, 6), generator=GENERATOR)


class Net(nn.Module):
    """Two layers; the objectives use it whole or in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(2, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.outer(self.inner(x).tanh())
        return out


class Output(NamedTuple):
    loss: Tensor
    logits: Tensor


class Language(nn.Module):
    """Returns its own loss: ``(logits, loss)`` as nanoGPT, or an object as transformers."""

    def __init__(self, *, names: bool = False) -> None:
        super().__init__()
        self.embed, self.head, self.names = nn.Embedding(7, 3), nn.Linear(3, 7), names

    def forward(self, idx: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        logits = self.head(self.embed(idx).cumsum(1).tanh())
        if labels is None:
            return (logits, None)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return Output(loss, logits) if self.names else (logits, loss)


class ByPosition(Language):
    """Takes the targets under a name that tells nothing."""

    def forward(self, idx: Tensor, goal: Tensor) -> Any:  # type: ignore[override]
        return super().forward(idx, None, goal)


def physics(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Δu = sin x₁, with a second derivative by the inputs."""
    x.requires_grad_(True)
    u = model(x)[:, 0]
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    second = [
        torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)
    ]
    return (second[0] + second[1] - x[:, 0].sin()).square()


def preference(model: Callable[[Tensor], Tensor], batch: Mapping[str, Tensor]) -> Tensor:
    """Two passes of the model for each example."""
    difference = model(batch["chosen"])[:, 0] - model(batch["rejected"])[:, 0]
    return -F.logsigmoid(difference)


def parts(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Uses parts of the model, and its weights, instead of its forward pass."""
    x, y = batch
    hidden = model.inner(x).relu().square()
    return (model.outer(hidden) - y).square().mean(1) + 0.1 * model.inner.weight.square().sum()


def contrast(model: Callable[[Tensor], Tensor], batch: Any) -> Tensor:
    """One number per batch, over all pairs."""
    _, x, z = batch
    scores = model(x) @ model(z).T
    return F.cross_entropy(scores, torch.arange(len(x)))


def own(model: Any, batch: Any) -> Tensor:
    """What ``model`` stands for."""
    if isinstance(model, ByPosition):
        outputs = model(*batch)
    elif isinstance(batch, Mapping):
        outputs = model(**batch)
    else:
        outputs = model(batch[0], labels=batch[1])
    loss: Tensor = outputs.loss if isinstance(outputs, Output) else outputs[1]
    return loss


def rows(*keys: str) -> list[dict[str, Tensor]]:
    return [dict(zip(keys, pair, strict=True)) for pair in zip(TOKENS, TOKENS.flip(1), strict=True)]


@dataclass(frozen=True)
class Case:
    """An objective, its data, and the batches that these are expected to give."""

    objective: Any
    data: Callable[[], Any]
    batch: Callable[[slice], Any]
    size: int = N
    make: Callable[[], nn.Module] = Net
    per_batch: bool = False

    @property
    def loads(self) -> bool:
        """Whether the data are a DataLoader."""
        return isinstance(self.data()["all"], DataLoader)

    @property
    def options(self) -> dict[str, Any]:
        return {
            "model": self.make,
            "data": self.data(),
            "objective": "model" if self.objective is own else self.objective,
            "batch_loss": self.per_batch,
            "batch_size": self.size
            if self.per_batch and not self.loads and self.size < N
            else None,
            "dtype": "float64",
        }

    def state(self, seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return {n: t * 1.5 for n, t in self.make().state_dict().items()}

    def vector(self, seed: int) -> Tensor:
        return torch.cat([t.double().flatten() for t in self.state(seed).values()])

    def batches(self) -> list[Any]:
        def wide(nest: Any) -> Any:
            if isinstance(nest, Tensor):
                return nest.double() if nest.is_floating_point() else nest
            if isinstance(nest, Mapping):
                return {key: wide(value) for key, value in nest.items()}
            return type(nest)(map(wide, nest))

        return [wide(self.batch(slice(i, i + self.size))) for i in range(0, N, self.size)]

    def loss(self, point: Tensor) -> Tensor:
        """The mean loss in float64, with weights in the places of the parameters."""
        shapes = {name: tensor.shape for name, tensor in self.state(0).items()}
        values = point.split([shape.numel() for shape in shapes.values()])
        named = {f"model.{n}": v.view(shapes[n]) for n, v in zip(shapes, values, strict=True)}
        module = Applied(self.make().double(), self.objective)
        losses = [functional_call(module, named, (batch,)) for batch in self.batches()]
        return torch.stack(losses).mean() if self.per_batch else torch.cat(losses).mean()

    def value(self, point: Tensor) -> float:
        return float(self.loss(point).detach())

    def losses(self, weights: Mapping[str, Tensor]) -> list[float]:
        """The losses by a plain loop: load_state_dict, then batch by batch."""
        model = self.make().double().eval()
        model.load_state_dict(weights)
        found = [self.objective(model, batch).detach() for batch in self.batches()]
        return torch.stack(found).tolist() if self.per_batch else torch.cat(found).tolist()


class Applied(nn.Module):
    def __init__(self, model: nn.Module, objective: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Any) -> Tensor:
        return self.objective(self.model, batch)


class Triples(Dataset[tuple[int, Tensor, Tensor]]):
    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> tuple[int, Tensor, Tensor]:
        return i, X[i], Z[i]


CASES = {
    "inputs alone": Case(physics, lambda: {"all": X}, lambda i: X[i].clone()),
    "inputs alone, loader": Case(
        lambda model, batch: physics(model, batch[0]),
        lambda: {"all": DataLoader(torch.utils.data.TensorDataset(X), 5)},
        lambda i: [X[i].clone()],
    ),
    "mapping without targets": Case(
        preference,
        lambda: {"all": {"chosen": X, "rejected": Z}},
        lambda i: {"chosen": X[i], "rejected": Z[i]},
    ),
    "three of a batch": Case(
        contrast,
        lambda: {"all": DataLoader(Triples(), batch_size=7)},
        lambda i: [torch.arange(N)[i], X[i], Z[i]],
        size=7,
        per_batch=True,
    ),
    "parts of the model": Case(parts, lambda: {"all": (X, Z)}, lambda i: (X[i], Z[i])),
    "parts of other lengths": Case(
        lambda model, batch: sum(physics(model, x).mean() for x in batch.values()),
        lambda: {"all": {"inside": X, "edge": Z[:5]}},
        lambda i: {"inside": X.clone(), "edge": Z[:5].clone()},
        per_batch=True,
    ),
    "model, (logits, loss)": Case(
        own,
        lambda: {"all": (TOKENS, TOKENS.flip(1))},
        lambda i: (TOKENS[i], TOKENS.flip(1)[i]),
        size=6,
        make=Language,
        per_batch=True,
    ),
    "model, by position": Case(
        own,
        lambda: {"all": DataLoader(torch.utils.data.TensorDataset(TOKENS, TOKENS.flip(1)), 9)},
        lambda i: (TOKENS[i], TOKENS.flip(1)[i]),
        size=9,
        make=ByPosition,
        per_batch=True,
    ),
    "model, output.loss": Case(
        own,
        lambda: {"all": DataLoader(rows("idx", "labels"), batch_size=4)},  # type: ignore[arg-type]
        lambda i: {"idx": TOKENS[i], "labels": TOKENS.flip(1)[i]},
        size=4,
        make=lambda: Language(names=True),
        per_batch=True,
    ),
}


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = CASES[request.param]
    return found


@pytest.fixture
def files(case: Case, tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{seed}.pt" for seed in range(3)]
    for seed, path in enumerate(paths):
        torch.save(case.state(seed), path)
    return paths


@pytest.mark.parametrize("case", sample(CASES, 0), indirect=True)
def test_losses_and_derivatives_on_a_line(
    case: Case, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if case.loads:
        # Then the batches are decoded in each pass.
        monkeypatch.setattr("losscli.data.objects.host_budget", lambda: 0)
    result = losscli.interpolate(
        *files[:2], points=3, range=(0, 1), derivatives=True, **case.options
    )
    a, b = case.vector(0), case.vector(1)
    assert result.table.columns == ("alpha", "split", "loss", "loss_stderr", "slope", "curvature")
    for row in result.table.records():
        point = a + float(row["alpha"]) * (b - a)  # type: ignore[arg-type]
        hessian = torch.autograd.functional.hessian(case.loss, point)
        slope = torch.autograd.functional.jacobian(case.loss, point) @ (b - a)
        assert row["loss"] == pytest.approx(case.value(point), rel=1e-10)
        assert row["slope"] == pytest.approx(float(slope), rel=1e-7, abs=1e-9)
        assert row["curvature"] == pytest.approx(float((b - a) @ hessian @ (b - a)), rel=1e-7)
    each = torch.tensor(case.losses(case.state(0)), dtype=torch.float64)
    (at_a,) = (r for r in result.table.records() if r["alpha"] == 0)
    assert at_a["loss"] == pytest.approx(float(each.mean()), rel=1e-10)
    if len(each) == 1:
        assert at_a["loss_stderr"] is None
    else:
        error = float(each.std()) / len(each) ** 0.5
        assert at_a["loss_stderr"] == pytest.approx(error, rel=1e-9)
    assert not X.requires_grad


@pytest.mark.parametrize("case", sample(CASES, 7, 9), indirect=True)
def test_the_hessian_and_sharpness(case: Case, files: list[Path]) -> None:
    point = case.vector(0)
    gradient = torch.autograd.functional.jacobian(case.loss, point)
    values = torch.linalg.eigvalsh(torch.autograd.functional.hessian(case.loss, point))
    (checked,) = losscli.check(files[0], **case.options).table.records()
    assert checked["loss"] == pytest.approx(case.value(point), rel=1e-10)
    assert checked["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-8)
    assert checked["lambda_min"] == pytest.approx(float(values[0]), rel=1e-7, abs=1e-9)
    assert checked["lambda_max"] == pytest.approx(float(values[-1]), rel=1e-7)
    (sharp,) = losscli.sharpness(files[0], rho=0.1, samples=2, **case.options).table.records()
    rise = case.value(point + 0.1 * gradient / gradient.norm()) - case.value(point)
    assert sharp["sam"] == pytest.approx(rise, rel=1e-6)


STUDIES: dict[str, Callable[..., losscli.Result[Any]]] = {
    "trajectory": losscli.trajectory,
    "plane": lambda files, **options: losscli.plane(files, points=2, **options),
    "around": lambda files, **options: losscli.around(files, points=3, directions=1, **options),
    "barriers": lambda files, **options: losscli.barriers(files, points=3, **options),
}


@pytest.mark.parametrize("case", sample(CASES, 2), indirect=True)
def test_every_study_has_the_losses_of_the_checkpoints(case: Case, files: list[Path]) -> None:
    expected = {case.value(case.vector(seed)) for seed in range(3)}
    for name, study in STUDIES.items():
        result = study(files, **case.options)
        table = result.more.get("path" if name == "plane" else "curves", result.table)
        for loss in expected:
            assert any(x == pytest.approx(loss, rel=1e-10) for x in table.floats("loss")), name
        assert result.summary["metrics"] == []


PER_EXAMPLE = [name for name, case in CASES.items() if not case.per_batch]


@pytest.mark.parametrize("name", PER_EXAMPLE)
def test_every_strategy_gives_the_same_numbers(name: str) -> None:
    case = CASES[name]
    data = from_object(case.data(), "here", whole=True)
    a, b = ({n: t.double() for n, t in case.state(seed).items()} for seed in (0, 1))
    alphas = [-0.3, 0.1, 0.4, 0.7, 1.2]
    between = [{n: (1 - alpha) * a[n] + alpha * b[n] for n in a} for alpha in alphas]
    expected = [case.losses(weights) for weights in between]
    # What shares a first layer is not right for all objectives, and so is compared before it is
    # relied on: None chooses.
    ways = [None, Strategy.LOADED, Strategy.BOUND]
    ways += [Strategy.SHARED, Strategy.STACKED] if name in SHARED else []
    for way in ways:
        objective = Objective(
            *(case.make(), lambda outputs, _: outputs, {}, data),
            device=torch.device("cpu"),
            dtype=torch.float64,
            function=case.objective,
        )
        check_task(objective, a)
        objective.strategy = way
        found = sweep(objective, Line(a, b), [(alpha,) for alpha in alphas])["all"].losses
        for row, truth in zip(found, expected, strict=True):
            assert row.tolist() == pytest.approx(truth, rel=1e-9), way
        if way is None:
            assert objective.strategy is (Strategy.SHARED if name in SHARED else Strategy.BOUND)


# Without a derivative by the inputs, the first layer is shared in the first of its calls.
SHARED = {"mapping without targets", "parts of the model"}


def test_metrics_are_those_of_the_outputs(tmp_path: Path) -> None:
    def near(outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - targets).abs() < 1).double().mean(1)

    case = CASES["parts of the model"]
    for seed in (0, 1):
        torch.save(case.state(seed), tmp_path / f"{seed}.pt")
    for data in ({"all": (X, Z)}, {"all": {"x": X, "y": Z}}):
        options = {**case.options, "data": data}
        if isinstance(data["all"], dict):
            options["objective"] = lambda model, batch: parts(model, (batch["x"], batch["y"]))
        result = losscli.interpolate(
            tmp_path / "0.pt", tmp_path / "1.pt", points=3, metric=near, **options
        )
        model = Net().double()
        model.load_state_dict(case.state(0))
        truth = float(near(model(X.double()), Z.double()).mean())
        (row,) = (r for r in result.table.records() if r["alpha"] == 0)
        assert row["near"] == pytest.approx(truth)
        assert row["loss"] == pytest.approx(math.fsum(case.losses(case.state(0))) / N)


@pytest.mark.parametrize("number", [None, 3], ids=["", "random"])
def test_built_in_metrics_take_the_outputs_too(number: int | None, tmp_path: Path) -> None:
    labels = torch.arange(N) % 2
    labels[3] = -100

    def objective(model: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        noise = 0 if number is None else 0.01 * torch.randn_like(x)
        return F.cross_entropy(model(x + noise), y, reduction="none")

    case = CASES["parts of the model"]
    for seed in (0, 1):
        torch.save(case.state(seed), tmp_path / f"{seed}.pt")
    options = {**case.options, "data": {"all": (X, labels)}, "objective": objective}
    for size in (None, 5):
        result = losscli.interpolate(
            *(tmp_path / "0.pt", tmp_path / "1.pt"),
            **{**options, "metric": "accuracy", "stochastic": number, "batch_size": size},
            points=2,
        )
        model = Net().double()
        model.load_state_dict(case.state(0))
        right = model(X.double()).argmax(1) == labels
        (row,) = (r for r in result.table.records() if r["alpha"] == 0)
        assert row["accuracy"] == pytest.approx(float(right[labels >= 0].double().mean()))


CODE = """
import torch
from torch import nn

from losscli.models import MLP

X = torch.rand(18, 2, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(2, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.outer(self.inner(x).tanh())


def data():
    return {"train": X}


def pairs():
    return {"train": (X, X)}


def residual(model, x):
    x.requires_grad_(True)
    return torch.autograd.grad(model(x).sum(), x, create_graph=True)[0].square().sum(1)


def collocation(model, x):
    return residual(model, torch.rand_like(x))


def matrix(model, x):
    return residual(model, x)[:3]


def number(model, x):
    return float(residual(model, x).mean())


def mean(model, x):
    return residual(model, x).mean()


def shared(model, x):
    return residual(model, x) / residual(model, x).sum()


def not_a_number(model, x):
    return (residual(model, x) - 1e9).sqrt()


def broken(model, batch):
    x, y = batch["x"]
    return x


def cut(model, x):
    return residual(model, x).detach()


def parted(model, batch):
    return residual(model, batch[0])


def again(model, batch):
    return residual(model, batch[1])


def imaginary(model, x):
    return residual(model, x) * 1j
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(CODE)
    for seed, name in enumerate("abc"):
        torch.manual_seed(seed)
        torch.save(Net().state_dict(), f"{name}.pt")
    return tmp_path


OPTIONS = "-m mine.py:Net -d mine.py:data -q --no-figure"
LINE = f"interpolate a.pt b.pt --points 3 {OPTIONS}"
BAD = {
    "wrong shape": (f"{LINE} --objective mine.py:matrix", r"the objective gives shape \[3\] for"),
    "no tensor": (f"{LINE} --objective mine.py:number", "the objective gives float"),
    "one number": (
        f"{LINE} --objective mine.py:mean",
        r"\[\] for .*, not one number per example.*--batch-loss",
    ),
    "other examples": (f"{LINE} --objective mine.py:shared", "depends on the other.*--batch-loss"),
    "nan": (f"{LINE} --objective mine.py:not_a_number", "the objective gives nan on the first"),
    "fails": (f"{LINE} --objective mine.py:broken", r"the objective fails: .*batch.*\(Tensor\)"),
    "complex": (f"{LINE} --objective mine.py:imaginary", "the objective gives complex numbers"),
    "random": (f"{LINE} --objective mine.py:collocation", "draws random numbers.*--stochastic N"),
    "unknown": (f"{LINE} --objective residue", "unknown objective 'residue'"),
    "missing": (f"{LINE} --objective mine.py:residue", "the module has no 'residue'"),
    "with a loss": (f"{LINE} --objective mine.py:residual --loss mse", "--loss has no effect"),
    "no own loss": (
        f"{LINE} --objective model --batch-size 6",
        "the model returns a Tensor without a loss.*output.loss",
    ),
    "no parameter for targets": (
        f"{LINE} -d mine.py:pairs --objective model --batch-size 6",
        "the model fails .*positional arguments.* --objective model needs output.loss",
    ),
    "no batches": (f"{LINE} --objective model", "no batches of its own.*--batch-size"),
    "no targets": (f"{LINE} --objective mine.py:residual --metric accuracy", "inputs, targets"),
    "normalised": (
        f"{LINE} -d mine.py:data,mean=0.5 --objective mine.py:residual",
        "mean= is for the inputs, and an objective takes whole batches",
    ),
    "without a gradient": (f"check a.pt {OPTIONS} --objective mine.py:cut", "no gradient reaches"),
    "gauss-newton": (
        f"check a.pt {OPTIONS} --objective mine.py:residual --density --operator ggn",
        "--operator ggn needs a loss of outputs.*hessian",
    ),
}


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("name", BAD)
def test_bad_objectives_are_refused_in_one_line(name: str, mine: Path, losscli: Losscli) -> None:
    command, message = BAD[name]
    before = sorted(mine.iterdir())
    done = losscli(*command.split(), "-o", "x")
    assert done.status in {1, 2}
    assert done.stderr.count("\n") == 1
    assert re.search(message, done.stderr), done.stderr
    # A journal is what the message names.
    after = [path for path in mine.iterdir() if path.name not in {"__pycache__", "x.journal"}]
    assert sorted(after) == before


def test_a_loader_of_parts_of_other_lengths_needs_losses_of_batches(mine: Path) -> None:
    def collate(rows: list[Tensor]) -> dict[str, Tensor]:
        return {"inside": torch.stack(rows), "edge": Z[:2]}

    options = {
        "model": "mine.py:Net",
        "data": {"all": DataLoader(X, 6, collate_fn=collate)},  # type: ignore[arg-type]
        "objective": CASES["parts of other lengths"].objective,
    }
    with pytest.raises(DataError, match=r"18 examples is collated to 1.*give --batch-loss"):
        losscli.check("a.pt", **options)
    found = losscli.interpolate("a.pt", "b.pt", points=3, batch_loss=True, **options)
    assert found.summary["batches"] == {"all": 3}


def test_align_evaluates_no_objective(mine: Path) -> None:
    with pytest.raises(UsageError, match="align evaluates no loss, and --objective"):
        losscli.align("a.pt", "b.pt", objective="model")
    with pytest.raises(LosscliError, match="objective must be a string or a function"):
        losscli.check("a.pt", objective=3)


@pytest.mark.usefixtures("unseen")
@forks
@pytest.mark.parametrize(
    "commands",
    [
        [f"interpolate a.pt b.pt --points 4 --derivatives {OPTIONS}"],
        pytest.param([f"check a.pt b.pt {OPTIONS}"], marks=pytest.mark.stress),
    ],
    ids=["line", "check"],
)
def test_two_processes_give_the_results_of_one(
    commands: list[str], mine: Path, losscli: Losscli
) -> None:
    torch.set_num_threads(1)
    commands = [f"{command} --objective mine.py:residual" for command in commands]
    for i, command in enumerate(commands):
        assert losscli(*command.split(), "-o", f"one{i}").status == 0
        assert losscli(*command.split(), "--dry-run").status == 0
    assert losscli("plot", "one0.csv", "-o", "x.png").status == 0
    first, other = forked([f"{c} -o two{i}" for i, c in enumerate(commands)], 2)
    assert [outcome.status for outcome in (*first, *other)] == [0] * 2 * len(commands), first
    for path in mine.glob("one*.csv"):
        assert_same(path.name, path.name.replace("one", "two"))


def test_the_code_is_part_of_the_identity(mine: Path) -> None:
    def plan(objective: str) -> Interpolation:
        settings = Settings(model="mine.py:Net", data="mine.py:pairs", objective=objective)
        return Interpolation.plan("a.pt", "b.pt", settings, points=3, range_=(0.0, 1.0))

    one, other = (plan(f"mine.py:{name}") for name in ("parted", "again"))
    assert one.identity != other.identity
    conditions = one.fingerprint.conditions
    assert conditions["--objective"] == "mine.py:parted"
    assert any(str(mine / "mine.py") in key for key in conditions)
