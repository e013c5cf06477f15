"""What lies before the first moving tensor is computed once per batch, and changes no number."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from losscli.data import DataSet, Split
from losscli.evaluation.losses.built_in import cross_entropy
from losscli.evaluation.objective import Objective
from losscli.evaluation.strategies.base import Strategy
from losscli.evaluation.sweep import sweep
from losscli.models import CNN, MLP
from losscli.weight_space.slices import Line
from tests.cases import in_turn

# In `twice`.
TIED = {"2.weight": "0.weight", "2.bias": "0.bias"}

ALPHAS = [0.0, 0.25, 0.5, 0.75, 1.25]
EXAMPLES, BATCH = 12, 4


class Layers(nn.Module):
    """Three layers of a user's own; `between` is what it does after the second one."""

    def __init__(self, between: Callable[[Layers, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("cache", torch.zeros(EXAMPLES, 6))
        self.passes = 0
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        x = x.flatten(1)
        early = torch.relu(self.first(x))
        return self.third(self.between(self, early, self.second(early)))


def plain(self: Layers, early: Tensor, late: Tensor) -> Tensor:
    return torch.tanh(late)


def shortcut(self: Layers, early: Tensor, late: Tensor) -> Tensor:
    return F.relu(late, inplace=True) + early


def overwriting(self: Layers, early: Tensor, late: Tensor) -> Tensor:
    return early.add_(self.norm(late))


def overwriting_later(self: Layers, early: Tensor, late: Tensor) -> Tensor:
    found = self.norm(late)
    return early.mul_(2) + found


def in_parts(self: Layers, early: Tensor, late: Tensor) -> Tensor:
    one, two = late.chunk(2, 1)
    return self.norm(torch.cat([two, one], dim=1)[:, list(range(6))])


def by_shape(self: Layers, early: Tensor, late: Tensor) -> Tensor:
    low, place = late.min(1, keepdim=True)
    return self.norm(late - low + place.shape[1] / late.size(1))


def counting(self: Layers, early: Tensor, late: Tensor) -> Tensor:
    # The same numbers by other calls, as code that keeps a cache makes them.
    return self.norm(late * 2.0 if self.passes % 2 else late + late)


def scaling(self: Layers, early: Tensor, late: Tensor) -> Tensor:
    factor = 2.0 if self.passes % 2 else 4.0
    scaled = late * factor
    return self.norm(late) + scaled / factor


def caching(self: Layers, early: Tensor, late: Tensor) -> Tensor:
    self.cache[: len(late)] = late
    return self.norm(late) + self.cache[: len(late)]


USERS = [
    plain, shortcut, overwriting, overwriting_later, in_parts, by_shape, counting, scaling, caching,
]  # fmt: skip
BLOCKS = ["first", "second", "norm", "third"]


def two_states(build: Callable[[], nn.Module]) -> list[dict[str, Tensor]]:
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = build()
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                nn.init.uniform_(buffer, 0.5, 1.5)
        states.append(copy.deepcopy(model.state_dict()))
    return states


def swept(
    build: Callable[[], nn.Module],
    states: Sequence[Mapping[str, Tensor]],
    names: Sequence[str],
    inputs: Tensor,
    targets: Tensor,
) -> Tensor:
    objective = Objective(
        build(),
        cross_entropy,
        {},
        DataSet({"all": Split(inputs, targets)}),
        device=torch.device("cpu"),
        batch_size=BATCH,
    )
    coordinates = [(alpha,) for alpha in ALPHAS]
    floats = [n for n, t in states[0].items() if t.is_floating_point() and n not in TIED]
    # As a study of blocks does: the strategy is chosen on the line of the whole.
    for moved in (floats, names):
        objective.load(dict(states[0]))
        line = Line(*({name: state[name] for name in moved} for state in states))
        losses = sweep(objective, line, coordinates)["all"].losses
    assert objective.strategy in {Strategy.THREADS, Strategy.SHARED}
    return losses


def in_a_plain_loop(
    build: Callable[[], nn.Module],
    states: Sequence[Mapping[str, Tensor]],
    names: Sequence[str],
    inputs: Tensor,
    targets: Tensor,
) -> Tensor:
    """The losses in float64, each point loaded by load_state_dict."""
    losses = []
    model = build().double().eval()
    for alpha in ALPHAS:
        point = dict(states[0])
        # Of a tied tensor both names, as load_state_dict uses the last.
        for name in [*names, *(n for n in point if TIED.get(n) in names)]:
            a, b = (state[name].double() for state in states)
            point[name] = a + alpha * (b - a)
        model.load_state_dict(point, strict=False)
        with torch.no_grad():
            outputs = model(inputs.double())
        losses.append(F.cross_entropy(outputs, targets, reduction="none"))
    return torch.stack(losses)


def examples(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.rand(EXAMPLES, *shape, generator=generator)
    return inputs, torch.randint(3, (EXAMPLES,), generator=generator)


def moving(state: Mapping[str, Tensor], block: str) -> list[str]:
    return [n for n, t in state.items() if n.startswith(block) and t.is_floating_point()]


class ByRows(Layers):
    """Calls the second layer with one example at a time, which has one dimension."""

    def __init__(self) -> None:
        super().__init__(plain)

    def forward(self, x: Tensor) -> Tensor:
        early = torch.relu(self.first(x.flatten(1)))
        return self.third(torch.stack([self.second(row) for row in early]))


@pytest.mark.parametrize("block", ["second", "third"])
def test_a_first_layer_of_single_examples_is_that_of_a_plain_loop(block: str) -> None:
    states = two_states(ByRows)
    given = ByRows, states, moving(states[0], block), *examples(6)
    torch.testing.assert_close(swept(*given).double(), in_a_plain_loop(*given), rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("between", "block"), in_turn(USERS, *BLOCKS), ids=lambda v: getattr(v, "__name__", v)
)
def test_a_users_code_has_the_losses_of_a_plain_loop(
    between: Callable[[Layers, Tensor, Tensor], Tensor], block: str
) -> None:
    def build() -> Layers:
        return Layers(between)

    states = two_states(build)
    names = moving(states[0], block)
    work = (build, states, names, *examples(2, 3))
    torch.testing.assert_close(swept(*work).double(), in_a_plain_loop(*work), rtol=1e-5, atol=1e-6)


def twice() -> nn.Module:
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.ReLU(), layer)


BUILT_IN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Sequence[str]]] = {
    "mlp": (lambda: MLP("6-5-4-3"), (6,), ["layers.0", "layers.1", "layers.2"]),
    "cnn": (
        lambda: CNN("3-4", batchnorm=True),
        (1, 6, 6),
        ["convolutions.0", "norms.0", "convolutions.1", "norms.1", "head"],
    ),
    "tied": (twice, (6,), ["0"]),
}


@pytest.mark.parametrize(
    ("name", "block", "threads"),
    in_turn([(name, block) for name, case in BUILT_IN.items() for block in case[2]], 1, 2),
)
def test_every_block_of_a_model_of_torch_gives_the_losses_of_a_plain_loop(
    name: str, block: str, threads: int
) -> None:
    build, shape, _ = BUILT_IN[name]
    states = two_states(build)
    work = (build, states, moving(states[0], block), *examples(*shape))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        losses = swept(*work)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(losses.double(), in_a_plain_loop(*work), rtol=1e-5, atol=1e-6)


class Counter(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self.calls += func is F.linear
        return func(*args, **(kwargs or {}))


def test_layers_before_the_first_moving_tensor_run_once_per_batch() -> None:
    def build() -> Layers:
        return Layers(plain)

    states = two_states(build)
    inputs, targets = examples(6)
    calls = []
    for block in ("first", "third"):
        with Counter() as counter:
            swept(build, states, moving(states[0], block), inputs, targets)
        calls.append(counter.calls)
    # Three batches at four further points: each saves the first two of the three layers.
    saved = (EXAMPLES // BATCH) * (len(ALPHAS) - 1)
    assert calls[0] - calls[1] >= saved
