"""A perceptron at all points at once has the losses of points that are loaded one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from losscli.data import DataSet, Split
from losscli.evaluation import gpu_thresholds
from losscli.evaluation.losses.built_in import cross_entropy
from losscli.evaluation.objective import Objective
from losscli.evaluation.recalibration import Recalibration
from losscli.evaluation.strategies import points, stacked_linear
from losscli.evaluation.strategies.base import Strategy
from losscli.evaluation.strategies.stacked_linear import examples_at_once, is_perceptron
from losscli.evaluation.sweep import check
from losscli.models import CNN, MLP
from losscli.weight_space.slices import Line

# More points than ends, so that the first layer is shared.
POINTS = (-0.5, 0.0, 0.3, 0.5, 1.0)


def tied() -> nn.Module:
    one, other = nn.Linear(6, 6), nn.Linear(6, 6)
    other.weight = one.weight
    return nn.Sequential(one, nn.Tanh(), other, nn.ReLU(), nn.Linear(6, 3))


PERCEPTRONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[str, ...]]] = {
    "relu": (lambda: MLP("6-5-4-3"), (6,), ()),
    "tanh": (lambda: MLP("6-5-3", activation="tanh"), (2, 3), ()),
    "one layer": (lambda: MLP("6-3"), (6,), ()),
    "sequence": (
        lambda: nn.Sequential(
            *(nn.Flatten(), nn.Linear(6, 5, bias=False), nn.GELU(), nn.Dropout()),
            nn.Sequential(nn.Linear(5, 4), nn.SiLU(), nn.Linear(4, 3)),
        ),
        (2, 3),
        (),
    ),
    "in place": (
        lambda: nn.Sequential(nn.Tanh(), nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)),
        (6,),
        (),
    ),
    "positions": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)),
        (4, 6),
        (),
    ),
    "tied": (tied, (6,), ()),
    # Some layers, weights or biases stay.
    "last layer": (lambda: MLP("6-5-4-3"), (6,), ("layers.2",)),
    "middle layer": (lambda: MLP("6-5-4-3"), (6,), ("layers.1",)),
    "weights": (lambda: MLP("6-5-3"), (6,), ("layers.0.weight", "layers.1.weight")),
    "biases": (lambda: MLP("6-5-3"), (6,), ("layers.0.bias", "layers.1.bias")),
}


def states_of(build: Callable[[], nn.Module]) -> list[dict[str, Tensor]]:
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append({n: t.double() for n, t in build().state_dict().items()})
    return states


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", PERCEPTRONS)
def test_a_gpu_stacks_perceptrons(name: str) -> None:
    build, shape, moving = PERCEPTRONS[name]
    states = states_of(build)
    names = {n for n in states[0] if not moving or n.startswith(moving)}
    x = torch.rand(13, *shape, dtype=torch.float64)
    y = torch.randint(3, (13, *shape[:1]) if name == "positions" else (13,))
    device = torch.device("cuda")
    objective = Objective(
        build(), cross_entropy if name != "positions" else _last, {},
        DataSet({"all": Split(x, y)}), device=device, dtype=torch.float64,
    )  # fmt: skip
    check(objective, states[0])
    objective.strategy = Strategy.STACKED
    line = Line(*({n: s[n].to(device) for n in names} for s in states))
    found = objective.at(line, [(alpha,) for alpha in POINTS])["all"].losses
    torch.testing.assert_close(found, by_hand(build, states, names, x, y), rtol=1e-9, atol=1e-12)


def by_hand(
    build: Callable[[], nn.Module], states: Sequence[dict[str, Tensor]], names: set[str], x: Tensor,
    y: Tensor,
) -> Tensor:  # fmt: skip
    model = build().double().eval()
    losses = []
    for alpha in POINTS:
        a, b = states
        point = {n: (1 - alpha) * t + alpha * b[n] if n in names else t for n, t in a.items()}
        model.load_state_dict(point)
        with torch.no_grad():
            scores = model(x.clone())
        scores = scores.movedim(-1, 1)
        losses.append(F.cross_entropy(scores, y, reduction="none").flatten(1).mean(1)
                      if y.ndim > 1 else F.cross_entropy(scores, y, reduction="none"))  # fmt: skip
    return torch.stack(losses)


@pytest.mark.parametrize("together", [1 << 20, 4])
@pytest.mark.parametrize("name", PERCEPTRONS)
def test_stacked_perceptrons_have_the_losses_of_a_loop_by_hand(
    name: str, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, shape, moving = PERCEPTRONS[name]
    # Otherwise the model is mapped, and nothing here is tested.
    monkeypatch.setattr(points, "vmap", None)
    monkeypatch.setattr(points, "examples_at_once", lambda *_: together)
    states = states_of(build)
    names = {n for n in states[0] if not moving or n.startswith(moving)}
    x = torch.rand(13, *shape, dtype=torch.float64)
    y = torch.randint(3, (13, *shape[:1]) if name == "positions" else (13,))
    loss = cross_entropy if name != "positions" else _last
    data = DataSet({"all": Split(x, y)})
    device = torch.device("cpu")
    objective = Objective(build(), loss, {}, data, device=device, dtype=torch.float64, batch_size=9)
    check(objective, states[0])
    objective.strategy = Strategy.STACKED
    line = Line(*({n: s[n] for n in names} for s in states))
    found = objective.at(line, [(alpha,) for alpha in POINTS])["all"].losses
    expected = by_hand(build, states, names, x, y)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def _last(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs, targets, dim=-1)


class Wide(nn.Linear):
    """A layer of the user's."""


@pytest.mark.parametrize(
    "model",
    [
        MLP("6-5-3", activation="maxout"),
        CNN("2-3", channels=1, classes=3),
        nn.Sequential(),
        nn.Sequential(nn.ReLU()),
        nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)),
        nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)),
        nn.Sequential(nn.Linear(6, 5), nn.Softmax(1), nn.Linear(5, 3)),
        nn.Sequential(nn.Linear(6, 5), nn.PReLU(5), nn.Linear(5, 3)),
        nn.Sequential(nn.Linear(6, 5), nn.Flatten(), nn.Linear(5, 3)),
        nn.Sequential(Wide(6, 5), nn.Linear(5, 3)),
        nn.Linear(6, 3),
    ],
    ids=str,
)
def test_models_with_other_layers_are_mapped(model: nn.Module) -> None:
    assert not is_perceptron(model)


@pytest.mark.parametrize(
    ("stacked", "number", "examples"), [(1 << 20, 4, 13107), (1 << 20, 40, 1310), (1 << 10, 4, 128)]
)
def test_the_widest_layer_limits_the_examples_that_pass_together(
    stacked: int, number: int, examples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_thresholds, "STACKED_BYTES", stacked)
    assert examples_at_once(MLP("6-5-3"), number) == examples
    assert stacked_linear._ROWS == 128


def test_stacked_points_with_statistics_have_all_their_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Estimating statistics leaves out the first layer's weight, which is used where it cancels."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))

    split = Split(torch.rand(17, 6, dtype=torch.float64), torch.arange(17) % 3)
    a, b = states_of(build)
    # At 0.5 the weights of the first layer nearly cancel.
    b["0.weight"], b["0.bias"] = -a["0.weight"] + 1e-3 * b["0.weight"], -a["0.bias"]
    names = [n for n in a if n.endswith(("weight", "bias"))]
    empty = torch.Tensor.new_empty
    # Not by chance what is right.
    monkeypatch.setattr(Tensor, "new_empty", lambda *args: empty(*args).fill_(torch.nan))
    found = []
    for strategy in (Strategy.BOUND, Strategy.STACKED):
        objective = Objective(
            build(), cross_entropy, {}, DataSet({"all": split}), device=torch.device("cpu"),
            dtype=torch.float64, recalibration=Recalibration.plan("all", split, 0),
        )  # fmt: skip
        check(objective, a)
        objective.strategy = strategy
        line = Line(*({n: end[n] for n in names} for end in (a, b)))
        found.append(objective.at(line, [(x,) for x in POINTS])["all"].losses)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
