"""Losses with weights have torch's mean Σwl/Σw, and the errors of a ratio, in every study."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

import losscli
from losscli.data import DataSet, Split
from losscli.data import objects as objects_
from losscli.errors import ModelError
from losscli.evaluation.hessian.curvature import Curvature
from losscli.evaluation.journal import Journal
from losscli.evaluation.line_search import best_step
from losscli.evaluation.losses.built_in import cross_entropy
from losscli.evaluation.losses.metrics import accuracy
from losscli.evaluation.objective import Evaluation, Objective
from losscli.evaluation.records import decode, encode
from losscli.evaluation.strategies.base import Strategy
from losscli.evaluation.sweep import sweep
from losscli.evaluation.task_checks import check_task
from losscli.evaluation.tasks import Execution
from losscli.models import MLP
from losscli.settings import Settings
from losscli.studies.interpolation import Interpolation
from losscli.studies.line_curve import LineCurve
from losscli.weight_space.slices import Line

Numbers = NDArray[np.float64]

N, C = 60, 3
WEIGHT = [0.2, 1.0, 5.0]
ALPHAS = [0.0, 0.25, 0.5, 0.75, 1.0]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, C))


def classes(number: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(number, 4, generator=generator)
    y = torch.randint(C, (number,), generator=generator)
    y[3::10] = -100
    return x, y


def states() -> list[dict[str, Tensor]]:
    """What init:1 and init:2 are."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append({name: t.double() for name, t in net().state_dict().items()})
    return found


def scores(alpha: float, x: Tensor, build: Callable[[], nn.Module] = net) -> Tensor:
    """The outputs of the plainly loaded float64 model at a point of the line."""
    a, b = (torch.manual_seed(seed) and build().double().state_dict() for seed in (1, 2))
    model = build().double()
    model.load_state_dict({n: (1 - alpha) * a[n] + alpha * b[n] for n in a})
    with torch.no_grad():
        found: Tensor = model(x.double())
    return found


def ratio_error(values: Numbers, weights: Numbers) -> float:
    """The error of Σv/Σw by the formula of the textbook, an example at a time."""
    chosen = [(v, w) for v, w in zip(values.tolist(), weights.tolist(), strict=True) if w]
    mean = math.fsum(v for v, _ in chosen) / math.fsum(w for _, w in chosen)
    n, middle = len(chosen), math.fsum(w for _, w in chosen) / len(chosen)
    squares = math.fsum((v - mean * w) ** 2 for v, w in chosen)
    return math.sqrt(squares / (n - 1) / n) / middle


def parts(alpha: float, x: Tensor, y: Tensor, weight: Sequence[float] = WEIGHT) -> Numbers:
    """What each example adds to the numerator."""
    w = torch.tensor(weight, dtype=torch.float64)
    return F.cross_entropy(scores(alpha, x), y, weight=w, reduction="none").numpy()


def weights(y: Tensor, weight: Sequence[float] = WEIGHT) -> Numbers:
    return np.array([0 if label == -100 else weight[label] for label in y.tolist()])


def line(loss: Any, data: Any, **more: Any) -> losscli.Result:
    given = {"model": net, "dtype": "float64", "points": 5, "range": (0, 1), "loss": loss, **more}
    return losscli.interpolate("init:1", "init:2", data=data, **given)


W = torch.tensor(WEIGHT, dtype=torch.float64)
SAME = {
    "built in": "cross_entropy,weight=0.2-1-5",
    "module": "torch.nn:CrossEntropyLoss,weight=0.2-1-5",
    "module, not reduced": "torch.nn:CrossEntropyLoss,weight=0.2-1-5,reduction=none",
    "function": "torch.nn.functional:cross_entropy,weight=0.2-1-5",
    "function, not reduced": "torch.nn.functional:cross_entropy,weight=0.2-1-5,reduction=none",
    "object": nn.CrossEntropyLoss(weight=W),
    "partial": partial(F.cross_entropy, weight=W),
}


@pytest.mark.parametrize("loss", SAME.values(), ids=SAME)
def test_the_mean_is_that_of_torch_however_the_loss_is_given(loss: Any) -> None:
    x, y = classes()
    found = line(loss, {"all": (x, y)})
    for alpha, mean, error in zip(
        ALPHAS, *map(found.table.floats, ("loss", "loss_stderr")), strict=True
    ):
        expected = F.cross_entropy(scores(alpha, x), y, weight=W)
        assert mean == pytest.approx(float(expected), rel=1e-12)
        formula = ratio_error(parts(alpha, x, y), weights(y))
        assert error == pytest.approx(formula, rel=1e-7)
    assert "weighted by class" in " ".join(found.summary["notes"])


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.1},
        {"weight": WEIGHT, "label_smoothing": 0.1},
        {"weight": [0, 1, 5], "label_smoothing": 0.3},
        {"weight": WEIGHT, "ignore_index": 1},
        {"ignore_index": 2},
    ],
    ids=str,
)
def test_smoothing_and_ignored_targets_are_combined_as_in_torch(options: Any) -> None:
    x, y = classes()
    keys = {k: "-".join(map(str, v)) if k == "weight" else v for k, v in options.items()}
    spec = "cross_entropy," + ",".join(f"{key}={value}" for key, value in keys.items())
    torchs = {
        k: torch.tensor(v, dtype=torch.float64) if k == "weight" else v for k, v in options.items()
    }
    # Torch ignores one label.
    if "ignore_index" in options:
        y[y == -100] = options["ignore_index"]
    found = line(spec, {"all": (x, y)}).table.floats("loss")
    expected = [float(F.cross_entropy(scores(alpha, x), y, **torchs)) for alpha in ALPHAS]
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_error_is_near_that_of_the_jackknife() -> None:
    x, y = classes(900)
    v, w = parts(0.5, x, y), weights(y)
    left = [(v.sum() - v[i]) / (w.sum() - w[i]) for i in range(len(v)) if w[i]]
    n = len(left)
    jackknife = math.sqrt((n - 1) / n * np.square(np.array(left) - np.mean(left)).sum())
    found = line("cross_entropy,weight=0.2-1-5", {"all": (x, y)}, points=3)
    assert found.table.floats("loss_stderr")[1] == pytest.approx(jackknife, rel=0.01)


@pytest.mark.parametrize("study", ["interpolate", "barriers"])
def test_errors_of_paired_differences_are_those_of_ratios(study: str) -> None:
    x, y = classes()
    v, w = {alpha: parts(alpha, x, y) for alpha in ALPHAS}, weights(y)
    if study == "interpolate":
        told = line("cross_entropy,weight=0.2-1-5", {"all": (x, y)}).summary["splits"]["all"]
        minimum = told["minimum"]
        below = ratio_error(v[1.0] - v[minimum["alpha"]], w)
        assert minimum["below_b_stderr"] == pytest.approx(below, rel=1e-9)
        rise = told["largest_rise"]
        if rise["height"]:
            apart = v[rise["alpha_to"]] - v[rise["alpha_from"]]
            assert rise["stderr"] == pytest.approx(ratio_error(apart, w), rel=1e-9)
        barrier = told["barrier"]
    else:
        barrier = losscli.barriers(
            ["init:1", "init:2"],
            points=5,
            model=net,
            data={"all": (x, y)},
            loss="cross_entropy,weight=0.2-1-5",
            dtype="float64",
        ).summary["splits"]["all"]["largest"]
    top = barrier["alpha"]
    chord = (1 - top) * v[0.0] + top * v[1.0]
    assert barrier["height"] == pytest.approx((v[top] - chord).sum() / w.sum(), rel=1e-9)
    assert barrier["height"] > 0
    assert barrier["stderr"] == pytest.approx(ratio_error(v[top] - chord, w), rel=1e-9)


def test_blocks_that_move_on_their_own_have_the_errors_of_ratios() -> None:
    x, y = classes()
    found = line("cross_entropy,weight=0.2-1-5", {"all": (x, y)}, layerwise=True)
    a, b = states()
    model, w = net().double(), torch.tensor(WEIGHT, dtype=torch.float64)

    def lost(state: dict[str, Tensor]) -> Numbers:
        model.load_state_dict(state)
        with torch.no_grad():
            return F.cross_entropy(model(x.double()), y, weight=w, reduction="none").numpy()

    for name, block in found.summary["blocks"].items():
        moved = lost({n: b[n] if n.startswith(f"{name}.") else a[n] for n in a}) - lost(a)
        told = block["splits"]["all"]
        assert told["change"] == pytest.approx(moved.sum() / weights(y).sum(), rel=1e-9)
        assert told["change_stderr"] == pytest.approx(ratio_error(moved, weights(y)), rel=1e-9)


def test_slopes_and_curvatures_are_those_of_torchs_mean() -> None:
    x, y = classes()
    found = line("cross_entropy,weight=0.2-1-5", {"all": (x, y)}, derivatives=True, batch_size=7)
    a, b = states()
    model, w = net().double(), torch.tensor(WEIGHT, dtype=torch.float64)
    for alpha, slope, curvature in zip(
        ALPHAS, *map(found.table.floats, ("slope", "curvature")), strict=True
    ):
        at = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
        here = {n: (1 - at) * a[n] + at * b[n] for n in a}
        outputs = torch.func.functional_call(model, here, (x.double(),))
        loss = F.cross_entropy(outputs, y, weight=w)
        (once,) = torch.autograd.grad(loss, at, create_graph=True)
        (twice,) = torch.autograd.grad(once, at)
        assert slope == pytest.approx(float(once.detach()), rel=1e-9)
        assert curvature == pytest.approx(float(twice), rel=1e-9)


def objective_of(
    loss: Any, data: tuple[Tensor, Tensor], build: Callable[[], nn.Module] = net, **more: Any
) -> Objective:
    return Objective(
        build(),
        loss,
        {"accuracy": accuracy},
        DataSet({"all": Split(*data)}),
        device=torch.device("cpu"),
        dtype=torch.float64,
        **more,
    )


def test_gradient_and_hessian_are_those_of_torchs_mean() -> None:
    x, y = classes()
    (a, _), w = states(), torch.tensor(WEIGHT, dtype=torch.float64)
    model = net().double()
    names = list(a)
    flat = torch.cat([a[n].flatten() for n in names])

    def mean(theta: Tensor) -> Tensor:
        cut = torch.split(theta, [a[n].numel() for n in names])
        state = {n: part.view(a[n].shape) for n, part in zip(names, cut, strict=True)}
        outputs = torch.func.functional_call(model, state, (x.double(),))
        return F.cross_entropy(outputs, y, weight=w)

    objective = objective_of(partial(cross_entropy, weight=WEIGHT), (x, y), batch_size=7)
    with Curvature(objective, a, names, objective.splits["all"]) as found:
        assert found.loss == pytest.approx(float(mean(flat)), rel=1e-12)
        torch.testing.assert_close(found.gradient(), torch.func.grad(mean)(flat), rtol=1e-9, atol=0)
        hessian = torch.func.hessian(mean)(flat).numpy()
        np.testing.assert_allclose(found.dense().matrix, hessian, rtol=1e-7, atol=1e-12)


def test_check_reports_the_mean_of_torch() -> None:
    x, y = classes()
    found = losscli.check(
        ["init:1"],
        model=net,
        data={"all": (x, y)},
        loss="cross_entropy,weight=0.2-1-5",
        dtype="float64",
    )
    model = net().double()
    model.load_state_dict(states()[0])
    loss = F.cross_entropy(model(x.double()), y, weight=torch.tensor(WEIGHT).double())
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    assert found.table.floats("loss") == pytest.approx([float(loss.detach())], rel=1e-7)
    assert found.table.floats("gradient_norm") == pytest.approx([norm], rel=1e-7)


def image_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.Tanh(), nn.Conv2d(5, 4, 1))


def images(void: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(9, 2, 4, 5, generator=generator)
    y = torch.randint(4, (9, 4, 5), generator=generator)
    y[:, 0] = void
    y[2, 2:] = void
    y[5] = void
    return x, y


@pytest.mark.parametrize("void", [-100, 255, 1])
def test_pixels_without_a_label_are_ignored(void: int) -> None:
    x, y = images(void)
    loss = f"cross_entropy,ignore_index={void}" if void == 1 else "cross_entropy"
    found = line(loss, {"all": (x, y)}, model=image_net)
    kept = [i for i in range(9) if i != 5]
    without = line(loss, {"all": (x[kept], y[kept])}, model=image_net)
    for k, alpha in enumerate(ALPHAS):
        z = scores(alpha, x, image_net)
        expected = float(F.cross_entropy(z, y, ignore_index=void))
        assert found.table.floats("loss")[k] == pytest.approx(expected, rel=1e-12)
        right = (z.argmax(1) == y).double()
        counts = y != void
        share = [float(right[i][counts[i]].mean()) for i in kept]
        assert found.table.floats("accuracy")[k] == pytest.approx(np.mean(share), rel=1e-6)
    # An image without a label might as well not be there.
    for column in ("loss", "loss_stderr", "accuracy"):
        expected_ = without.table.floats(column)
        assert found.table.floats(column) == pytest.approx(expected_, rel=1e-12)
    notes = " ".join(found.summary["notes"])
    assert "1 of 9 examples have no target that counts" in notes
    assert ("targets of 255 are ignored: the model has 4 classes" in notes) == (void == 255)


def test_255_is_a_label_where_it_is_a_class() -> None:
    def wide() -> nn.Module:
        return nn.Linear(4, 256)

    x, y = classes()
    y = torch.where(y == 2, 255, y).clamp(min=0)
    found = line("cross_entropy", {"all": (x, y)}, model=wide)
    expected = float(F.cross_entropy(scores(0, x, wide), y))
    assert found.table.floats("loss")[0] == pytest.approx(expected, rel=1e-12)
    assert not any("255" in note for note in found.summary["notes"])


def test_bytes_are_labels_and_only_255_is_void() -> None:
    def wide() -> nn.Module:
        return nn.Linear(4, 200)

    x, y = classes()
    # As a byte −100 is 156.
    y = torch.where(y == 2, 156, y).clamp(min=0)
    y[7] = 255
    given = objective_of(cross_entropy, (x, y.to(torch.uint8)), wide)
    state = wide().double().state_dict()
    (found,) = given.plain(state).values()
    model = wide().double()
    model.load_state_dict(state)
    expected = F.cross_entropy(model(x.double()), y, ignore_index=255)
    assert float(found.losses.mean()) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert found.weights is not None
    assert int((found.weights == 0).sum()) == 1


def test_a_split_without_a_target_that_counts_is_refused() -> None:
    x, y = classes()
    for loss, targets in (
        ("cross_entropy", torch.full_like(y, -100)),
        ("cross_entropy,weight=0-1-1", torch.zeros_like(y)),
    ):
        with pytest.raises(losscli.LosscliError, match="'all' has no target that counts") as caught:
            line(loss, {"all": (x, targets)})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("loss", "option"),
    [
        ("cross_entropy,weight=1-1-1", "derivatives"),
        ("cross_entropy,ignore_index=9", "layerwise"),
        pytest.param("cross_entropy,weight=1-1-1", "layerwise", marks=pytest.mark.stress),
        pytest.param("cross_entropy,ignore_index=9", "derivatives", marks=pytest.mark.stress),
    ],
)
def test_weights_of_one_do_not_change_the_results(loss: str, option: str) -> None:
    x, y = classes()
    data, more = {"all": (x, y.clamp(min=0))}, {"dtype": "float32", option: True}
    plain, weighted = (line(given, data, **more) for given in ("cross_entropy", loss))
    assert plain.table.to_csv() == weighted.table.to_csv()
    assert plain.summary["splits"] == weighted.summary["splits"]
    assert plain.summary.get("blocks") == weighted.summary.get("blocks")


WAYS = [Strategy.LOADED, Strategy.BOUND, Strategy.SHARED, Strategy.THREADS, Strategy.STACKED]


@pytest.mark.parametrize("way", WAYS)
def test_every_strategy_gives_the_same_weights(way: Strategy) -> None:
    def mlp() -> nn.Module:
        return MLP("4-6-3")

    x, y = classes()
    objective = objective_of(partial(cross_entropy, weight=WEIGHT), (x, y), mlp, batch_size=16)
    torch.manual_seed(1)
    a, b = (mlp().double().state_dict() for _ in range(2))
    check_task(objective, a)
    objective.strategy = way
    found = sweep(objective, Line(a, b), [(alpha,) for alpha in ALPHAS])["all"]
    for k, alpha in enumerate(ALPHAS):
        model = mlp().double()
        model.load_state_dict({n: (1 - alpha) * a[n] + alpha * b[n] for n in a})
        w = torch.tensor(WEIGHT, dtype=torch.float64)
        expected = float(F.cross_entropy(model(x.double()), y, weight=w).detach())
        assert float(found.losses[k].mean()) == pytest.approx(expected, rel=1e-12)
    assert found.weights is not None
    np.testing.assert_array_equal(found.weights, weights(y))


BLOCKS = {
    "weights throughout": [weights(classes()[1])],
    "a block without any": [np.zeros(7), weights(classes()[1])],
    "ones first": [np.ones(9), weights(classes()[1]), np.zeros(3)],
    "nothing twice": [np.zeros(2), np.zeros(3), np.array([0.5, 2, 1])],
}


@pytest.mark.parametrize("given", BLOCKS.values(), ids=BLOCKS)
def test_a_sample_that_grows_is_that_of_all_its_examples(given: list[Numbers]) -> None:
    generator = np.random.default_rng(1)
    w = np.concatenate(given)
    v = generator.random((4, len(w))) * w
    metric = generator.random(len(w))
    cuts = np.cumsum([0, *map(len, given)])
    if len(given) == 1:
        cuts = np.array([0, 20, 25, len(w)])

    def part(i: int, j: int) -> LineCurve:
        own = w[i:j]
        with np.errstate(all="ignore"):
            losses = v[:, i:j] / own.mean()
            mean = np.full(4, (metric[i:j] * (own > 0)).sum() / (own > 0).sum())
        counts = {"accuracy": float((own > 0).sum())}
        return LineCurve(losses, {"accuracy": mean}, None if (own == 1).all() else own, counts)

    blocks = [part(i, j) for i, j in itertools.pairwise(cuts)]
    curve = blocks[0]
    estimate = blocks[0].estimate
    for block in blocks[1:]:
        assert curve.estimate.is_known_to(1e9) == bool(curve.weights is None or curve.weights.any())
        curve, estimate = curve.extend(block), estimate.extend(block.estimate)
    for found in (curve.estimate, estimate):
        assert found.examples == len(w)
        np.testing.assert_allclose(found.mean, v[2:].sum(1) / w.sum(), rtol=1e-12)
        expected = [ratio_error(row, w) for row in v[2:]]
        np.testing.assert_allclose(found.stderr, expected, rtol=1e-10)
        share = (metric * (w > 0)).sum() / (w > 0).sum()
        np.testing.assert_allclose(found.metrics["accuracy"], share, rtol=1e-12)


def test_a_sample_of_all_examples_has_the_numbers_of_all() -> None:
    x, y = classes(700)
    whole = line("cross_entropy,weight=0.2-1-5", {"all": (x, y)}, layerwise=True)
    grown = line(
        "cross_entropy,weight=0.2-1-5", {"all": (x, y)}, sampling_error=1e-9, layerwise=True
    )
    assert set(grown.table.floats("examples")) == {700}
    for column in ("loss", "loss_stderr", "accuracy"):
        expected = whole.table.floats(column)
        assert grown.table.floats(column) == pytest.approx(expected, rel=1e-9)
    for column in ("loss", "loss_stderr"):
        expected = whole.more["blocks"].floats(column)
        assert grown.more["blocks"].floats(column) == pytest.approx(expected, rel=1e-9)
    told, same = (r.summary["splits"]["all"]["barrier"]["stderr"] for r in (grown, whole))
    assert told == pytest.approx(same, rel=1e-9)


def test_a_stream_is_weighted_like_data_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = classes()
    in_memory = line("cross_entropy,weight=0.2-1-5", {"all": (x, y)}, derivatives=True, points=2)
    monkeypatch.setattr(objects_, "host_budget", lambda: 0)

    class Rows(Dataset[Any]):
        def __len__(self) -> int:
            return len(y)

        def __getitem__(self, i: int) -> Any:
            return x[i], int(y[i])

    found = line(
        "cross_entropy,weight=0.2-1-5", {"all": Rows()}, derivatives=True, points=2, batch_size=7
    )
    assert "decoded again" in " ".join(found.summary["notes"])
    for column in ("loss", "loss_stderr", "accuracy", "slope", "curvature"):
        expected = in_memory.table.floats(column)
        assert found.table.floats(column) == pytest.approx(expected, rel=1e-12)


def test_an_evaluation_read_from_a_record_has_its_weights() -> None:
    x, y = classes()
    objective = objective_of(partial(cross_entropy, weight=WEIGHT), (x, y))
    check_task(objective, states()[0])
    found = objective.plain(states()[0])
    arrays = encode(objective, objective.splits, found, 1, 1)
    back = decode(arrays, objective.splits, objective.metrics)
    assert torch.equal(back["all"].losses, found["all"].losses)
    assert back["all"].weights is not None
    assert torch.equal(back["all"].weights, found["all"].weights)
    assert back["all"].counts == found["all"].counts == {"accuracy": 54}


def test_a_resumed_run_has_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("losscli.evaluation.journal.journal.sync", lambda _: None)
    monkeypatch.setattr("losscli.evaluation.journal.journal.sync_folder", lambda _: None)

    def plan(loss: Any) -> Interpolation:
        settings = Settings(model=net, data={"all": classes()}, loss=loss, dtype="float64")
        return Interpolation.plan("init:1", "init:2", settings, points=5, range_=(0, 1))

    first = plan(nn.CrossEntropyLoss(weight=W))
    with Journal.open(
        tmp_path / "x", first.fingerprint.identity, first.fingerprint.conditions
    ) as journal:
        truth = first.run(Execution(journal=journal))
    again = plan(nn.CrossEntropyLoss(weight=W))
    with Journal.open(
        tmp_path / "x", again.fingerprint.identity, again.fingerprint.conditions
    ) as journal:
        found = again.run(Execution(lambda _: None, journal))
        assert journal.recalled > 0
    assert found.table.to_csv() == truth.table.to_csv()
    # Weights of an object are no text, and settle the numbers.
    other = plan(nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 5.5])))
    assert other.identity != again.identity == first.identity
    assert truth.summary["loss"].startswith("CrossEntropyLoss(weight=[0.2, 1.0, 5.0]")


def test_the_gain_of_a_step_has_the_error_of_a_ratio() -> None:
    w = weights(classes()[1])
    generator = np.random.default_rng(2)
    here, there = generator.random((2, len(w))) * w
    own, found = (
        Evaluation(torch.from_numpy(v / w.mean())[None], {}, torch.from_numpy(w))
        for v in (here + w, there)
    )
    step = best_step([0.5], found, own)
    assert step is not None
    assert step["gain"] == pytest.approx((here + w - there).sum() / w.sum(), rel=1e-12)
    assert step["gain_stderr"] == pytest.approx(ratio_error(here + w - there, w), rel=1e-9)


def test_examples_that_are_ignored_hide_no_weight_without_a_gradient() -> None:
    class Detached(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.detach(), self.bias)

    x, y = classes()
    y[:50] = -100
    objective = objective_of(cross_entropy, (x, y), lambda: Detached(4, C))
    state = {name: tensor.clone() for name, tensor in objective.tensors.items()}
    with (
        Curvature(objective, state, list(state), objective.splits["all"]) as found,
        pytest.raises(ModelError, match="no gradient reaches them"),
    ):
        found.gradient()
