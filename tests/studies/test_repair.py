"""``--repair``: points of a line corrected by REPAIR, against REPAIR by hand and forward hooks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as torch's own documentation calls it
from torch.utils.data import TensorDataset

import losscli as library
from losscli.checkpoint import name_checkpoint
from losscli.cli.interpolate import report
from losscli.errors import LosscliError
from losscli.evaluation.tasks import ALONE, Execution
from losscli.models import MLP
from losscli.settings import Settings
from losscli.studies.interpolation import Interpolation
from tests.cases import sample
from tests.conftest import Losscli
from tests.networks import NETWORKS, Network
from tests.promises.test_resume import resume_each

States = Sequence[dict[str, Tensor]]


class Images(nn.Module):
    """A BatchNorm after a convolution, one after a residual sum, and layers with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.later = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 4, 2)
        self.hidden = nn.Linear(4, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = F.relu(self.later(x + torch.tanh(self.second(x))))
        x = F.relu(self.up(x)).mean((2, 3))
        return self.last(torch.sigmoid(self.hidden(x)))


PREACTIVATIONS = {
    "mlp": ("layers.0", "layers.1"),
    "images": ("norm", "second", "later", "up", "hidden"),
}
BUILD: dict[str, Callable[[], nn.Module]] = {"mlp": lambda: MLP("6-8-7-3"), "images": Images}
SHAPES = {"mlp": (6,), "images": (1, 6, 6)}


def states_of(name: str, number: int = 2) -> list[dict[str, Tensor]]:
    found = []
    for seed in range(number):
        torch.manual_seed(seed)
        model = BUILD[name]().double()
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.mul_(1.5).add_(0.2 * torch.rand_like(tensor))
        found.append(model.state_dict())
    return found


def data_of(name: str) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    shape = SHAPES[name]
    return {
        split: (
            torch.randn(number, *shape, generator=generator, dtype=torch.float64),
            torch.randint(3, (number,), generator=generator),
        )
        for split, number in (("train", 41), ("test", 17))
    }


def statistics(name: str, state: Any, inputs: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The means and standard deviations of preactivations, by forward hooks of a plain model."""
    model = BUILD[name]().double().eval()
    model.load_state_dict(state)
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(layer: str) -> Callable[..., None]:
        def keep(module: nn.Module, given: Any, output: Tensor) -> None:
            rows = output.transpose(0, 1).flatten(1)
            found[layer] = rows.mean(1), rows.std(1, correction=0)

        return keep

    for layer in PREACTIVATIONS[name]:
        model.get_submodule(layer).register_forward_hook(hook(layer))
    with torch.no_grad():
        model(inputs)
    return found


def planned(name: str, states: States, **settings: Any) -> Interpolation:
    return Interpolation.plan(
        *library_names(states),
        Settings(**{"model": BUILD[name], "data": data_of(name), "dtype": "float64", **settings}),
        points=3,
        range_=(0.0, 1.0),
        repair=True,
    )


def library_names(states: States) -> tuple[Any, Any]:
    a, b = states
    return name_checkpoint(a, "A"), name_checkpoint(b, "B")


def corrected(plan: Interpolation, alphas: Sequence[float]) -> list[Any]:
    assert plan.repair is not None
    both = [plan.start, plan.end]
    return list(plan.repair.points((0, 1), both.__getitem__, plan.moving, alphas))


@pytest.mark.parametrize("name", ["mlp", "images"])
def test_statistics_are_between_those_of_the_ends_which_stay(name: str) -> None:
    states = states_of(name)
    inputs = data_of(name)["train"][0]
    a, b = (statistics(name, state, inputs) for state in states)
    plan = planned(name, states)
    for alpha, point in zip((0.25, 0.5), corrected(plan, (0.25, 0.5)), strict=True):
        found = statistics(name, point, inputs)
        assert list(found) == list(PREACTIVATIONS[name])
        for layer, moments in found.items():
            for value, start, end in zip(moments, a[layer], b[layer], strict=True):
                expected = (1 - alpha) * start + alpha * end
                torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    for point, state in zip(corrected(plan, (0.0, 1.0)), states, strict=True):
        for key, tensor in state.items():
            torch.testing.assert_close(point[key], tensor, rtol=1e-12, atol=1e-12)
    assert plan.repair is not None
    assert plan.repair.summary(ALONE) == {
        "split": "train",
        "examples": 41,
        "layers": len(PREACTIVATIONS[name]),
        "units": sum(len(mean) for mean, _ in a.values()),
        "skipped_at_most": 0,
    }


def by_hand(states: States, alpha: float, data: Any) -> dict[str, float]:
    """REPAIR of a network with two hidden layers; the loss of each split."""
    inputs = data["train"][0]

    def layer(state: Any, k: int, x: Tensor) -> Tensor:
        return x @ state[f"layers.{k}.weight"].T + state[f"layers.{k}.bias"]

    means, deviations = [], []
    for state in states:
        first = layer(state, 0, inputs)
        hidden = first, layer(state, 1, first.relu())
        means.append([z.mean(0) for z in hidden])
        deviations.append([z.std(0, correction=0) for z in hidden])
    point = {n: (1 - alpha) * states[0][n] + alpha * states[1][n] for n in states[0]}
    x = inputs
    maps = []
    for k in range(2):
        z = layer(point, k, x)
        scale = ((1 - alpha) * deviations[0][k] + alpha * deviations[1][k]) / z.std(0, correction=0)
        shift = (1 - alpha) * means[0][k] + alpha * means[1][k] - scale * z.mean(0)
        maps.append((scale, shift))
        x = (scale * z + shift).relu()
    losses = {}
    for split, (x, targets) in data.items():
        for k, (scale, shift) in enumerate(maps):
            x = (scale * layer(point, k, x) + shift).relu()  # noqa: PLW2901
        losses[split] = float(F.cross_entropy(layer(point, 2, x), targets))
    return losses


def test_losses_are_those_of_repair_by_hand() -> None:
    states, data = states_of("mlp", 3), data_of("mlp")
    given: dict[str, Any] = {"model": "mlp:6-8-7-3", "data": data, "dtype": "float64"}
    result = library.interpolate(*states[:2], points=3, range=(0, 1), repair=True, **given)
    for row in result.table.records():
        expected = by_hand(states[:2], row["alpha"], data)[row["split"]]
        assert row["loss"] == pytest.approx(expected, rel=1e-9)
    found = library.barriers(states, points=3, repair=True, **given)
    number = {c["name"]: t for t, c in enumerate(found.summary["checkpoints"])}
    assert len(found.more["curves"].rows) == 3 * 3 * 2
    for row in found.more["curves"].records():
        ends = [states[number[row[end]]] for end in ("a", "b")]
        expected = by_hand(ends, row["alpha"], data)[row["split"]]
        assert row["loss"] == pytest.approx(expected, rel=1e-9)
    assert found.summary["repair"] == result.summary["repair"]
    # The ends are those of the files.
    plain = library.barriers(states, points=3, **given)
    assert found.summary["splits"]["test"]["losses"] == plain.summary["splits"]["test"]["losses"]


def test_batches_streams_and_precision_change_only_digits() -> None:
    states, data = states_of("mlp"), data_of("mlp")
    given: dict[str, Any] = {"model": "mlp:6-8-7-3", "range": (0, 1), "points": 3, "repair": True}
    truth = library.interpolate(*states, data=data, dtype="float64", **given)
    streamed = {name: TensorDataset(*split) for name, split in data.items()}
    other = library.interpolate(*states, data=streamed, dtype="float64", batch_size=9, **given)
    assert other.table["loss"] == pytest.approx(truth.table["loss"], rel=1e-12)
    assert other.summary["repair"] == truth.summary["repair"]
    narrow = library.interpolate(*states, data=data, **given)
    assert narrow.table["loss"] == pytest.approx(truth.table["loss"], rel=1e-5)


def test_batchnorm_is_estimated_again_at_each_corrected_layer() -> None:
    states = states_of("images")
    plan = planned("images", states, buffers="recalibrate")
    (point,) = corrected(plan, [0.5])
    assert plan.repair is not None
    # As the evaluation sees it: with the statistics re-estimated there.
    measured = [plan.repair._repair.measure(w) for w in (plan.start, point, plan.end)]
    for start, own, end in zip(*measured, strict=True):
        torch.testing.assert_close(own.means, (start.means + end.means) / 2, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            own.deviations, (start.deviations + end.deviations) / 2, rtol=1e-9, atol=1e-9
        )


def test_a_unit_without_variance_is_skipped() -> None:
    states = states_of("mlp")
    for state in states:
        state["layers.0.weight"][3] = 0
    plan = planned("mlp", states, data={"only": data_of("mlp")["train"]})
    (point,) = corrected(plan, [0.5])
    mean = (states[0]["layers.0.bias"] + states[1]["layers.0.bias"]) / 2
    assert not point["layers.0.weight"][3].any()
    assert point["layers.0.bias"][3] == pytest.approx(float(mean[3]), rel=1e-12)
    result = plan.run_alone(None)
    assert result.summary["repair"]["skipped_at_most"] == 1
    note = "the data have no split train: statistics are those of only, the only one"
    assert note in result.summary["notes"]
    assert np.isfinite(result.table["loss"]).all()
    assert "at most 1 unit at a point had no variance and stayed unchanged\n" in report(result)


def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    plan = planned("mlp", states_of("mlp"))

    def run(journal: Any) -> str:
        return plan.run(Execution(journal=journal)).table.to_csv()

    truth, found = resume_each(tmp_path / "run", run, run, 3)
    assert len(found) == 3
    assert {*found.values()} == {truth}


@pytest.mark.usefixtures("unseen")
def test_the_command_line(losscli: Losscli, folder: Path) -> None:
    done = losscli(
        "interpolate", "a.pt", "b.pt", "--range", 0, 1, "--points", 3, "--repair", "-o", "x"
    )
    assert done.status == 0, done.stderr
    sentence = (
        "the points between two checkpoints are corrected by REPAIR on 29 examples of train, "
        "5 units in 1 layer: they are not on the line"
    )
    assert sentence in done.stdout.splitlines()
    summary = json.loads(Path("x.json").read_text())
    assert summary["repair"]["units"] == 5
    run = losscli("barriers", "a.pt", "b.pt", "--points", 3, "--repair", "-o", "y")
    assert run.status == 0, run.stderr
    assert sentence in run.stdout.splitlines()
    rows = Path("y.curves.csv").read_text().splitlines()
    middle = [row.split(",")[4:] for row in rows if row.split(",")[2] == "0.5"]
    table = [row.split(",")[2:] for row in Path("x.csv").read_text().splitlines()]
    assert middle == table[3:5]
    for name, html in (("x", "x.html"), ("y", "y.html")):
        assert losscli("plot", f"{name}.csv", "-o", html).status == 0
        assert "corrected by REPAIR on train" in Path(html).read_text()
    plan = losscli(
        "barriers", "a.pt", "b.pt", "--points", 5, "--repair", "--dry-run", "--json", "-o", "z"
    )
    assert json.loads(plan.stdout)["passes_for_repair"] == 2 + 3
    assert not list(Path().glob("z*"))
    # Another run without --repair is another one.
    both = [json.loads(Path(f"{name}.json").read_text())["identity"] for name in ("x", "y")]
    for (command, name), own in zip((("interpolate", "x"), ("barriers", "y")), both, strict=True):
        options = ["--range", 0, 1] if name == "x" else []
        arguments = [command, "a.pt", "b.pt", *options, "--points", 3, "--no-figure", "-o", "n"]
        assert losscli(*arguments, "--force").status == 0
        assert json.loads(Path("n.json").read_text())["identity"] != own


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "--repair corrects points between A and B, and --range -0.5 2 goes beyond"),
        (["--range", "0", "1.5"], "--range 0 1.5 goes beyond"),
        (["--derivatives"], "--derivatives is not available with --repair"),
        (["--refine", "0.1"], "--refine is not available with --repair"),
        (["--layerwise"], "--layerwise is not available with --repair"),
        (["--context", "whole.csv"], "--context is not available with --repair"),
        (["--range", "0", "1", "--sampling-error", "0.1"], "not available with --sampling-error"),
        (["--range", "0", "1", "--stochastic", "2"], "not available with --stochastic"),
        (
            ["--range", "0", "1", "--batch-loss", "--batch-size", "5"],
            "not available with --batch-loss",
        ),
        (["--range", "0", "1", "--limit", "1"], "--repair has no more than one example of train"),
    ],
)
def test_options_that_contradict_repair_are_refused(
    options: Sequence[str], says: str, losscli: Losscli, folder: Path
) -> None:
    Path("whole.csv").write_text("alpha,split,loss,loss_stderr\n0.0,train,1.0,0.1\n")
    before = sorted(Path().iterdir())
    done = losscli("interpolate", "a.pt", "b.pt", "--repair", *options)
    assert done.status != 0
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert sorted(Path().iterdir()) == before


def test_an_objective_is_refused() -> None:
    def objective(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    given: dict[str, Any] = {"model": "mlp:6-8-7-3", "data": data_of("mlp"), "repair": True}
    with pytest.raises(LosscliError, match="not available with --objective"):
        library.interpolate(*states_of("mlp"), range=(0, 1), objective=objective, **given)


class Widths(nn.Module):
    """Three widths; the layer in the middle is made by a function."""

    def __init__(self, middle: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 8), middle(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.middle(F.relu(self.first(x)))))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.own(F.relu(self.own(x)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.relu(self.one(x)))


class Left(nn.Module):
    """Weights to the left of the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return (self.own @ x.T).T


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


UNCORRECTED = {
    "no bias": (lambda: Widths(lambda: nn.Linear(8, 8, bias=False)), "middle has no bias"),
    "computed": (
        lambda: Widths(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))),
        "computes its weight or bias from other tensors",
    ),
    "twice": (
        lambda: Widths(Twice),
        "shares middle.own.weight with another layer, or runs more than",
    ),
    "tied": (lambda: Widths(Tied), "shares middle.one.weight with another layer"),
    "left": (lambda: Widths(Left), "multiplies by weights in a form that is not known"),
    "groups": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (6, 1, 1)),
            nn.ConvTranspose2d(6, 4, 1, groups=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4, 3),
        ),
        "is a transposed convolution with groups",
    ),
    "untraceable": (lambda: Widths(Branch), "the model cannot be traced"),
    "no units": (lambda: nn.Linear(6, 3), "none were found in the model"),
}


@pytest.mark.parametrize("name", sample(UNCORRECTED, 0, 2))
def test_a_model_that_cannot_be_corrected_is_refused(name: str) -> None:
    build, says = UNCORRECTED[name]
    states = [build().state_dict() for _ in range(2)]
    with pytest.raises(LosscliError) as caught:
        library.barriers(states, repair=True, model=build, data=data_of("mlp"), dtype="float64")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_preactivation_that_is_not_finite_is_refused() -> None:
    states, data = states_of("mlp"), data_of("mlp")
    states[1]["layers.0.weight"] *= 1e200
    states[1]["layers.1.weight"] *= 1e200
    with pytest.raises(LosscliError, match="a hidden unit has values that are infinite") as caught:
        library.interpolate(
            *states, model="mlp:6-8-7-3", data=data, dtype="float64", range=(0, 1), repair=True
        )
    assert "\n" not in str(caught.value)


REFUSED = {
    "no-hidden": "none were found in the model",
    "views": "spread has no bias",
    "tied": "first shares first.weight",
    "shared": "q has no bias",
    "attention": "in a form that is not known",
    "unet": "d computes its weight or bias",
    "gru": "in a form that is not known",
}


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(n, id=n.name, marks=() if n.name == "gpt" else pytest.mark.stress)
        for n in NETWORKS
    ],
)
def test_every_network_is_corrected_or_refused(network: Network) -> None:
    states = [network.model(seed).state_dict() for seed in (1, 2)]
    given: dict[str, Any] = {
        "model": network.build,
        "data": {"all": (network.inputs, torch.arange(len(network.inputs)) % 3)},
        "dtype": "float64",
        "loss": "cross_entropy",
    }

    def plan() -> Interpolation:
        return Interpolation.plan(
            *library_names(states), Settings(**given), points=3, range_=(0.0, 1.0), repair=True
        )

    if network.name in REFUSED:
        with pytest.raises(LosscliError) as caught:
            plan()
        assert REFUSED[network.name] in str(caught.value)
        return
    own = plan()
    assert own.repair is not None
    (point,) = corrected(own, [0.25])
    measured = [own.repair._repair.measure(weights) for weights in (own.start, point, own.end)]
    for start, middle, end in zip(*measured, strict=True):
        for name in ("means", "deviations"):
            a, found, b = (getattr(at, name) for at in (start, middle, end))
            torch.testing.assert_close(found, 0.75 * a + 0.25 * b, rtol=1e-9, atol=1e-9)
