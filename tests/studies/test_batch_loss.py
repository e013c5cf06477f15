"""A loss that is one number per batch, against a plain float64 loop over the batches."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import losscli
from losscli.data import Batching, DataSet, Split, from_object
from losscli.data.split import Batches
from losscli.errors import DataError, LossError, OutOfMemoryError, UsageError
from losscli.evaluation.journal import Journal
from losscli.evaluation.objective import Objective
from losscli.evaluation.strategies.base import Strategy
from losscli.evaluation.sweep import sweep, sweep_plain
from losscli.evaluation.task_checks import check_task
from losscli.evaluation.tasks import Execution
from losscli.models import MLP
from losscli.settings import Settings
from losscli.studies.interpolation import Interpolation
from losscli.table import Table
from losscli.weight_space.slices import Line
from tests.cases import in_turn, sample
from tests.conftest import Losscli
from tests.promises.test_ranks import assert_same, forked, forks
from tests.promises.test_resume import EVERY, resume_each

N = 22
WIDTHS = "6-3-3"
X = torch.randn(N, 6, generator=torch.Generator().manual_seed(3))
Y = torch.arange(N) % 3


def contrast(outputs: Tensor, targets: Tensor) -> Tensor:
    """One number per example, over all pairs of the batch."""
    scores = outputs @ outputs.T
    return F.cross_entropy(scores, torch.arange(len(outputs)), reduction="none")


def contrast_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    return contrast(outputs, targets).mean()


class Rows(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(X, Y, strict=True))


class Growing:
    """Sequences that get longer: only those of one batch have one length."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return X[i].repeat(1 + i // 4), Y[i]


ROWS = [{"x": x, "label": y} for x, y in zip(X, Y, strict=True)]
GROUPS = [[0, 5, 6], [1, 2], [3, 4, 7, 8, 9]]


@dataclass(frozen=True)
class Source:
    """Data, and the positions of the examples in each batch that they are expected to give."""

    make: Callable[[], Any]
    batches: Sequence[Sequence[int]]
    size: int | None = None
    rows: Sequence[Tensor] = tuple(X)


def sequential(size: int, number: int = N) -> list[list[int]]:
    return [list(range(i, min(i + size, number))) for i in range(0, number, size)]


def shuffled() -> list[list[int]]:
    """What a loader with this seed asks for."""
    torch.manual_seed(0)
    return [list(b) for b in DataLoader(TensorDataset(X, Y), 5, shuffle=True).batch_sampler]  # type: ignore[union-attr]


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), **options)


SOURCES = {
    "tensors": Source(lambda: {"all": (X, Y)}, sequential(8), 8),
    "data set": Source(lambda: {"all": TensorDataset(X, Y)}, sequential(4), 4),
    "dicts": Source(lambda: {"all": DataLoader(ROWS, batch_size=8)}, sequential(8)),  # type: ignore[arg-type]
    "one batch": Source(lambda: {"all": loader(batch_size=50)}, [list(range(N))]),
    "loader": Source(lambda: {"all": loader(batch_size=5)}, sequential(5)),
    "drop_last": Source(lambda: {"all": loader(batch_size=5, drop_last=True)}, sequential(5, 20)),
    "shuffled": Source(lambda: {"all": loader(batch_size=5, shuffle=True)}, shuffled()),
    "groups": Source(lambda: {"all": loader(batch_sampler=GROUPS)}, GROUPS),
    "workers": Source(
        lambda: {"all": DataLoader(ROWS, batch_size=6, num_workers=2)},  # type: ignore[arg-type]
        sequential(6),
    ),
    "iterable": Source(lambda: {"all": DataLoader(Rows(), batch_size=6)}, sequential(6)),
    "iterable, drop_last": Source(
        lambda: {"all": DataLoader(Rows(), batch_size=6, drop_last=True)}, sequential(6, 18)
    ),
    "iterable, no loader": Source(lambda: {"all": Rows()}, sequential(4), 4),
}


def state(seed: int, widths: str = WIDTHS) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return MLP(widths).state_dict()


def truth(source: Source, alpha: float, loss: Callable[..., Tensor] = contrast) -> list[float]:
    """The loss of each batch in float64."""
    a, b = state(0), state(1)
    model = MLP(WIDTHS).double()
    model.load_state_dict({n: (1 - alpha) * a[n].double() + alpha * b[n].double() for n in a})
    model.eval()
    with torch.no_grad():
        return [
            float(loss(model(X[list(rows)].double()), Y[list(rows)]).double().mean())
            for rows in source.batches
        ]


def run(
    source: Source, folder: Path, ends: Sequence[dict[str, Tensor]] = (), **options: Any
) -> losscli.Result:
    for seed, own in enumerate(ends or map(state, (0, 1))):
        torch.save(own, folder / f"{seed}.pt")
    return losscli.interpolate(
        folder / "0.pt",
        folder / "1.pt",
        **{
            "model": f"mlp:{WIDTHS}",
            "data": source.make(),
            "batch_loss": True,
            "batch_size": source.size,
            "loss": contrast,
            "metric": ("none",),
            "points": 4,
            "range": (0.0, 1.5),
            "dtype": "float64",
            **options,
        },
    )


# One number per example or per batch, in memory or streamed.
@pytest.mark.parametrize(
    ("name", "loss", "budget"),
    in_turn(SOURCES, (contrast, None), (contrast_mean, 0), (contrast, 0), (contrast_mean, None)),
)
def test_the_loss_is_the_mean_over_the_batches_of_the_data(
    name: str,
    loss: Callable[..., Tensor],
    budget: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if budget is not None:
        monkeypatch.setattr("losscli.data.objects.host_budget", lambda: budget)
    source = SOURCES[name]
    result = run(source, tmp_path, loss=loss, metric=("accuracy",))
    table = result.table
    for alpha, mean, error, accuracy in zip(
        *(table[column] for column in ("alpha", "loss", "loss_stderr", "accuracy")), strict=True
    ):
        expected = truth(source, alpha)
        assert mean == pytest.approx(math.fsum(expected) / len(expected), rel=1e-12)
        if len(expected) == 1:
            assert error is None
        else:
            spread = statistics.stdev(expected) / math.sqrt(len(expected))
            assert error == pytest.approx(spread, rel=1e-9)
        right = truth(source, alpha, losscli.evaluation.losses.metrics.accuracy)
        assert accuracy == pytest.approx(math.fsum(right) / len(right), rel=1e-12)
    assert result.summary["batches"] == {"all": len(source.batches)}
    assert result.summary["examples"] == {"all": sum(map(len, source.batches))}
    assert result.summary["batch_loss"] is True
    sizes = {len(batch) for batch in source.batches}
    noted = [note for note in result.summary["notes"] if "each batch counts the same" in note]
    assert len(noted) == (len(sizes) > 1)
    assert all(f"{min(sizes)} to {max(sizes)} examples" in note for note in noted)


@pytest.mark.parametrize("way", Strategy)
def test_every_strategy_gives_the_same_numbers(way: Strategy) -> None:
    data = DataSet({"all": Batches.of(Split(X, Y), 5)})
    objective = Objective(
        MLP(WIDTHS),
        contrast,
        {},
        data,
        device=torch.device("cpu"),
        dtype=torch.float64,
        batch_loss=True,
    )
    a, b = ({n: t.double() for n, t in state(seed).items()} for seed in (0, 1))
    check_task(objective, a)
    objective.strategy = way
    alphas = [-0.3, 0.1, 0.4, 0.7, 1.2]
    found = sweep(objective, Line(a, b), [(alpha,) for alpha in alphas])["all"].losses
    source = SOURCES["loader"]
    for alpha, row in zip(alphas, found, strict=True):
        assert row.tolist() == pytest.approx(truth(source, alpha), rel=1e-11)
    (plain,) = sweep_plain(objective, [b])
    assert plain["all"].losses[0].tolist() == pytest.approx(truth(source, 1.0), rel=1e-11)


def test_batches_that_differ_in_the_shape_of_their_examples_are_not_joined(tmp_path: Path) -> None:
    class Folding(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.view(len(x), -1, 6).mean(1))

    data = {"all": DataLoader(Growing(), batch_size=4)}  # type: ignore[arg-type]
    result = run(
        Source(lambda: data, []), tmp_path, model=lambda: Folding(WIDTHS), loss=contrast_mean
    )
    expected = truth(Source(lambda: data, sequential(4, 12)), 0.0)
    assert result.table["loss"][0] == pytest.approx(math.fsum(expected) / 3, rel=1e-12)


@pytest.mark.parametrize(
    "budget",
    [pytest.param(None, id="in memory", marks=pytest.mark.stress), pytest.param(0, id="streamed")],
)
def test_derivatives_are_those_of_the_mean_over_batches(
    budget: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if budget is not None:
        monkeypatch.setattr("losscli.data.objects.host_budget", lambda: budget)
    source = SOURCES["groups" if budget is None else "dicts"]
    table = run(source, tmp_path, loss=contrast_mean, derivatives=True, points=2).table
    line = Dense(source)
    for alpha, slope, curvature in zip(
        *(table.floats(column) for column in ("alpha", "slope", "curvature")), strict=True
    ):
        point = line.a + alpha * line.d
        assert slope == pytest.approx(float(line.gradient(point) @ line.d), rel=1e-8)
        assert curvature == pytest.approx(float(line.d @ line.hessian(point) @ line.d), rel=1e-8)
    options: dict[str, Any] = {
        "model": f"mlp:{WIDTHS}",
        "loss": contrast_mean,
        "metric": "none",
        "batch_loss": True,
    }
    gradient, hessian = line.gradient(line.a), line.hessian(line.a)
    values, vectors = torch.linalg.eigh(hessian)
    checked = losscli.check(tmp_path / "0.pt", data=source.make(), blocks=True, **options)
    (row,) = checked.table.rows
    found = dict(zip(checked.table.columns, row, strict=True))
    assert found["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-6)
    assert found["lambda_min"] == pytest.approx(float(values[0]), rel=1e-5)
    assert found["lambda_max"] == pytest.approx(float(values[-1]), rel=1e-5)
    assert found["trace"] == pytest.approx(float(hessian.trace()), rel=1e-5)
    assert checked.summary["batches"] == {"all": len(source.batches)}
    for block, own in (("layers.0", slice(0, 21)), ("layers.1", slice(21, None))):
        largest = float(torch.linalg.eigvalsh(hessian[own, own])[-1])
        row = found_in(checked.more["curvature"], "block", block)
        assert row["lambda_max"] == pytest.approx(largest, rel=1e-5)
    around = losscli.around(
        tmp_path / "0.pt",
        **{"data": source.make(), "along": "hessian", "points": 3, "range": (-0.1, 0.1), **options},
    ).table
    for direction, distance, loss in zip(
        *(around[column] for column in ("direction", "distance", "loss")), strict=True
    ):
        vector = vectors[:, {"v1": -1, "v2": -2, "vn": 0}[direction]]
        both = [float(line.loss(line.a + sign * distance * vector)) for sign in (-1, 1)]
        assert any(loss == pytest.approx(value, rel=1e-5) for value in both)
    sharp = losscli.sharpness(tmp_path / "0.pt", data=source.make(), rho=0.2, samples=2, **options)
    (row,) = sharp.table.rows
    found = dict(zip(sharp.table.columns, row, strict=True))
    here = line.loss(line.a)
    up = line.loss(line.a + 0.2 * gradient / gradient.norm())
    assert found["sam"] == pytest.approx(float(up - here), rel=1e-4)
    step = line.a - found["critical_step"] * gradient
    assert float(line.loss(step)) == pytest.approx(float(here), rel=1e-4)


@pytest.mark.parametrize("budget", [None, 0], ids=["in memory", "streamed"])
def test_batches_are_drawn_until_the_error_over_them_is_small(
    budget: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if budget is not None:
        monkeypatch.setattr("losscli.data.objects.host_budget", lambda: budget)
    rows = torch.randn(299, 6, generator=torch.Generator().manual_seed(0))
    data = [(x, 0) for x in rows]
    source = Source(lambda: {"all": DataLoader(data, batch_size=2)}, [])  # type: ignore[arg-type]
    a, b = ends = [state(seed, "6-5-3") for seed in (0, 1)]
    options = {"model": "mlp:6-5-3", "sampling_error": 0.15, "seed": 3, "points": 2}
    result = run(source, tmp_path, ends, loss=contrast_mean, **options)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(3)).tolist()
    for size in (64, 128, 150):
        table = {}
        for alpha in (0.0, 1.0, 1.5):
            model = MLP("6-5-3").double()
            blend = {n: (1 - alpha) * a[n].double() + alpha * b[n].double() for n in a}
            model.load_state_dict(blend)
            with torch.no_grad():
                batches = (rows[2 * i : 2 * i + 2].double() for i in order[:size])
                losses = [float(contrast_mean(model(x), x)) for x in batches]
            error = statistics.stdev(losses) / math.sqrt(size)
            table[alpha] = math.fsum(losses) / size, error
        height = max(m for m, _ in table.values()) - min(m for m, _ in table.values())
        if all(error < 0.15 * height for _, error in table.values()):
            break
    assert size == 128
    for row in result.table.records():
        mean, error = table[float(row["alpha"])]  # type: ignore[arg-type]
        assert row["loss"] == pytest.approx(mean, rel=1e-10)
        assert row["loss_stderr"] == pytest.approx(error, rel=1e-8)
        assert row["examples"] == size
    assert result.summary["batches"] == {"all": size}
    assert result.summary["examples"] == {"all": 2 * size - (149 in order[:size])}
    assert "all: 128 of 150 batches were evaluated" in result.summary["notes"]


def test_statistics_are_those_of_the_batches_of_the_data(tmp_path: Path) -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

    ends = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        ends.append({
            n: t + 0.1 if t.is_floating_point() else t for n, t in make().state_dict().items()
        })
    source = SOURCES["groups"]
    result = run(source, tmp_path, loss=contrast_mean, buffers="recalibrate", model=make, ends=ends)
    assert result.summary["recalibration"]["examples"] == 10
    for alpha, loss in zip(result.table.floats("alpha"), result.table["loss"], strict=True):
        model = make().double()
        a, b = ends
        model.load_state_dict({n: (1 - alpha) * a[n].double() + alpha * b[n].double() for n in a})
        model[1].reset_running_stats()
        model[1].momentum = None
        batches = [(X[list(rows)].double(), Y[list(rows)]) for rows in source.batches]
        with torch.no_grad():
            for x, _ in batches:
                model.train()(x)
            losses = [float(contrast_mean(model.eval()(x), y)) for x, y in batches]
        assert loss == pytest.approx(math.fsum(losses) / len(losses), rel=1e-10)


def found_in(table: Table, column: str, value: str) -> dict[str, Any]:
    (row,) = (row for row in table.rows if row[table.columns.index(column)] == value)
    return dict(zip(table.columns, row, strict=True))


class Dense:
    """The mean loss over the batches of a source as a function of a vector, in float64."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.a, b = (torch.cat([t.double().flatten() for t in state(s).values()]) for s in (0, 1))
        self.d = b - self.a

    def loss(self, point: Tensor) -> Tensor:
        shapes = {name: tensor.shape for name, tensor in state(0).items()}
        parts = point.split([shape.numel() for shape in shapes.values()])
        weights = {n: p.view(shapes[n]) for n, p in zip(shapes, parts, strict=True)}
        model = MLP(WIDTHS).double()
        losses = [
            contrast_mean(functional_call(model, weights, (X[list(rows)].double(),)), Y)
            for rows in self.source.batches
        ]
        return torch.stack(losses).mean()

    def gradient(self, point: Tensor) -> Tensor:
        return torch.autograd.functional.jacobian(self.loss, point)

    def hessian(self, point: Tensor) -> Tensor:
        return torch.autograd.functional.hessian(self.loss, point)


def test_a_limit_counts_batches(tmp_path: Path) -> None:
    for name in ("loader", "dicts", "tensors", "iterable"):
        source = SOURCES[name]
        result = run(source, tmp_path, limit=2)
        assert result.summary["batches"] == {"all": 2}
        own = truth(source, 0.0)
        pairs = {round((x + y) / 2, 9) for x in own for y in own if x != y}
        assert round(result.table["loss"][0], 9) in pairs


def test_the_order_of_a_loader_is_drawn_once_by_the_seed(tmp_path: Path) -> None:
    source = SOURCES["shuffled"]
    one, two, other = (run(source, tmp_path, seed=seed) for seed in (0, 0, 1))
    assert one.table == two.table
    assert one.table != other.table


def test_a_loss_per_batch_is_part_of_the_identity(folder: Path) -> None:
    arguments = {"points": 3, "batch_size": 29, "split": ("train",)}
    one = losscli.interpolate("a.pt", "b.pt", **arguments)
    two = losscli.interpolate("a.pt", "b.pt", batch_loss=True, **arguments)
    three = losscli.interpolate("a.pt", "b.pt", batch_loss=True, **{**arguments, "batch_size": 7})
    assert len({r.summary["identity"] for r in (one, two, three)}) == 3
    # Of one whole batch the mean is the same number.
    assert one.table.floats("loss") == pytest.approx(two.table.floats("loss"), rel=1e-6)
    assert two.table["loss_stderr"] == [None] * len(two.table["loss"])
    assert one.table["accuracy"] == pytest.approx(two.table["accuracy"], rel=1e-6)


def test_a_default_metric_that_does_not_apply_is_left_out_with_a_note(folder: Path) -> None:
    class Two(MLP):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(x), x

    def loss(outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        return outputs[0].square().mean()

    arguments: dict[str, Any] = {"model": lambda: Two("6-5-3"), "loss": loss, "batch_size": 5}
    result = losscli.interpolate("a.pt", "b.pt", batch_loss=True, points=3, **arguments)
    assert result.table.columns == ("alpha", "split", "loss", "loss_stderr")
    assert result.summary["metrics"] == []
    assert any("accuracy is left out" in note for note in result.summary["notes"])
    with pytest.raises(LossError, match="metric 'accuracy'"):
        losscli.interpolate("a.pt", "b.pt", batch_loss=True, metric=("accuracy",), **arguments)


CODE = """
import torch
from torch.nn import functional as F

def loss(o, t):
    s = o @ o.T
    return F.cross_entropy(s, torch.arange(len(s)))

def loader():
    x = torch.rand(23, 6, generator=torch.Generator().manual_seed(0))
    rows = [(x[i], i % 3) for i in range(23)]
    return {"val": torch.utils.data.DataLoader(rows, batch_size=5, shuffle=True)}
"""


@pytest.fixture
def mine(folder: Path) -> Path:
    for seed, name in enumerate("abcd"):
        torch.manual_seed(seed)
        torch.save(MLP(WIDTHS).state_dict(), f"{name}.pt")
    (folder / "mine.py").write_text(CODE)
    return folder


OPTIONS = f"-m mlp:{WIDTHS} -d mine.py:loader --loss mine.py:loss --batch-loss -q --no-figure"
COMMANDS = [
    f"interpolate a.pt b.pt --points 9 --refine 0.05 {OPTIONS}",
    f"interpolate a.pt b.pt --points 5 --layerwise {OPTIONS}",
    f"trajectory a.pt b.pt c.pt d.pt --residuals 3 {OPTIONS}",
    f"plane a.pt b.pt c.pt --points 4 {OPTIONS}",
    f"barriers a.pt b.pt c.pt --points 4 {OPTIONS}",
    f"around a.pt --points 4 --along hessian {OPTIONS}",
    f"around a.pt b.pt --points 4 --directions 2 {OPTIONS}",
    f"check a.pt --blocks --probes 2 {OPTIONS}",
    f"interpolate a.pt b.pt --points 4 --derivatives {OPTIONS}",
    f"sharpness a.pt --samples 3 {OPTIONS}",
]


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("command", sample(COMMANDS, 0, 2))
def test_every_study_reports_batches(command: str, mine: Path, losscli: Losscli) -> None:
    done = losscli(*command.split(), "-o", "x")
    assert done.status == 0, done
    assert "23 examples in 5 batches" in done.stdout
    assert json.loads(Path("x.json").read_text())["batches"] == {"val": 5}
    dry = losscli(*command.split(), "--dry-run")
    assert "val 5 batches" in dry.stdout
    drawn = losscli("plot", "x.csv", "-o", "x.png")
    assert drawn.status == 0, drawn


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("command", sample(COMMANDS, 1, 2))
def test_one_batch_has_no_standard_error(command: str, mine: Path, losscli: Losscli) -> None:
    done = losscli(*command.split(), "--limit", 1, "-o", "x")
    assert done.status == 0, done
    for path in mine.glob("x*.csv"):
        table = Table.read(path)
        assert table.rows
        for column in table.columns:
            # These are over perturbations and probes.
            if column.endswith("_stderr") and column not in {"average_stderr", "trace_stderr"}:
                assert set(table[column]) == {None}, path
    drawn = losscli("plot", "x.csv", "-o", "x.png")
    assert drawn.status == 0, drawn


@pytest.mark.usefixtures("unseen")
@forks
@pytest.mark.parametrize(
    "commands",
    [
        # Points and derivatives.
        [f"interpolate a.pt b.pt --points 4 --derivatives {OPTIONS}"],
        pytest.param(COMMANDS, marks=pytest.mark.stress),
    ],
    ids=["sample", "all"],
)
def test_two_processes_give_the_results_of_one(
    commands: list[str], mine: Path, losscli: Losscli
) -> None:
    torch.set_num_threads(1)
    for i, command in enumerate(commands):
        assert losscli(*command.split(), "-o", f"one{i}").status == 0
    lines = [f"{command} -o two{i}" for i, command in enumerate(commands)]
    first, other = forked(lines, 2)
    assert [outcome.status for outcome in (*first, *other)] == [0] * 2 * len(lines), first
    for path in mine.glob("one*.csv"):
        if "blocks" not in path.name:
            assert_same(path.name, path.name.replace("one", "two"))


@pytest.mark.parametrize("most", [2, EVERY])
def test_an_interrupted_run_ends_with_the_same_numbers(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("losscli.evaluation.journal.journal.sync", lambda _: None)
    monkeypatch.setattr("losscli.evaluation.journal.journal.sync_folder", lambda _: None)
    # So that there is more than one chunk.
    monkeypatch.setattr("losscli.evaluation.memory._WORK", {"cpu": 1})
    monkeypatch.setattr("losscli.evaluation.memory._LEAST", 4)
    for seed in (0, 1):
        torch.save(state(seed), tmp_path / f"{seed}.pt")

    def study(journal: Any) -> str:
        settings = Settings(
            model=f"mlp:{WIDTHS}",
            data={"all": loader(batch_size=5)},
            loss=contrast,
            metric=("none",),
            batch_loss=True,
        )
        ends = (str(tmp_path / "0.pt"), str(tmp_path / "1.pt"))
        plan = Interpolation.plan(*ends, settings, points=11, range_=(0.0, 1.0))
        return plan.run(Execution(journal=journal)).table.to_csv()

    whole, found = resume_each(tmp_path / "run", study, study, most)
    assert len(found) >= min(most, 4)
    assert {*found.values()} == {whole}
    with Journal.open(tmp_path / "kept", "i", {}) as journal:
        study(journal)
        known = len(journal)
        study(journal)
        assert len(journal) == known


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("interpolate a.pt b.pt --batch-size 5", "--batch-size 5 has no effect"),
        ("interpolate a.pt b.pt -d npz:data.npz", "split 'train' has no batches.*--batch-size"),
    ],
)
def test_unusable_sizes_of_batches_are_refused_in_one_line(
    command: str, message: str, mine: Path, losscli: Losscli
) -> None:
    before = sorted(mine.iterdir())
    name, *arguments = command.split()
    done = losscli(name, *OPTIONS.split(), *arguments, "-o", "x")
    assert done.status in {1, 2}
    assert done.stderr.count("\n") == 1
    assert re.search(message, done.stderr), done.stderr
    assert sorted(p for p in mine.iterdir() if p.name != "__pycache__") == before


def test_align_evaluates_no_loss(folder: Path) -> None:
    with pytest.raises(UsageError, match="align evaluates no loss"):
        losscli.align("a.pt", "b.pt", batch_loss=True)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda o, t: o, r"gives shape \[5, 3\] for a batch of 5 examples.*one number per batch"),
        (lambda o, t: float(o.mean()), "gives float"),
        (lambda o, t: o[:0, 0], r"gives shape \[0\]"),
    ],
)
def test_an_invalid_loss_of_a_batch_is_refused(
    loss: Callable[..., Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(LossError, match=message):
        run(SOURCES["loader"], tmp_path, loss=loss)


def test_a_batch_is_not_halved_when_memory_runs_out(tmp_path: Path) -> None:
    calls = []

    def greedy(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(len(outputs))
        if len(calls) > 2:
            raise torch.OutOfMemoryError("on purpose")
        return contrast_mean(outputs, targets)

    with pytest.raises(OutOfMemoryError, match="batches are never halved"):
        run(SOURCES["loader"], tmp_path, loss=greedy)
    assert set(calls) == {5}


def test_a_batch_is_not_differentiated_in_parts_when_memory_runs_out(tmp_path: Path) -> None:
    def greedy(outputs: Tensor, targets: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("on purpose")
        return contrast_mean(outputs, targets)

    torch.save(state(0), tmp_path / "0.pt")
    message = r"second derivatives of one batch do not fit.*batches are never halved.*--only"
    with pytest.raises(OutOfMemoryError, match=message):
        losscli.check(
            tmp_path / "0.pt",
            model=f"mlp:{WIDTHS}",
            data=SOURCES["loader"].make(),
            loss=greedy,
            batch_loss=True,
            dtype="float64",
        )


def test_a_loader_that_drops_examples_is_refused_without_batch_loss() -> None:
    data = {"all": loader(batch_size=5, drop_last=True)}
    with pytest.raises(DataError, match="drops the last batch"):
        from_object(data, "data")
    assert len(from_object(data, "data", batching=Batching(None)).splits["all"]) == 4


def test_batches_of_different_sizes_have_different_digests() -> None:
    split = Split(X, Y)
    five, two = Batches.of(split, 5), Batches.of(split, 2)
    assert len({split.digest, five.digest, two.digest}) == 3
    assert five.take(torch.tensor([3, 0])).sizes == (5, 5)
    assert torch.equal(five.take(torch.tensor([4, 1])).targets, torch.cat([Y[20:], Y[5:10]]))
    assert torch.equal(five.take(slice(3, 9)).targets, Y[15:])
    assert [batch.rows for batch in five.batches(1)] == [5, 5, 5, 5, 2]
