"""Points whose weights are small against the terms that they are combined of.

Whichever way they are evaluated, the error in float32 is of the size that a plain float32 loop has,
which makes the weights of each point in float64 and rounds them once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from losscli.data import DataSet, Split
from losscli.evaluation.derivatives.sweep import slopes
from losscli.evaluation.losses.built_in import cross_entropy
from losscli.evaluation.objective import Objective
from losscli.evaluation.strategies import first_layer
from losscli.evaluation.strategies.base import Strategy
from losscli.evaluation.strategies.first_layer import FirstLayer
from losscli.evaluation.strategy_choice import find_strategy
from losscli.evaluation.task_checks import check_task
from losscli.weight_space.slices import Line, Slice, Span, Triangle
from tests.cases import sample

State = dict[str, Tensor]

EXAMPLES = 60


@dataclass(frozen=True)
class Cancelling:
    """A slice whose points nearly cancel somewhere.

    Attributes:
        name: What cancels.
        build: Makes the model.
        inputs: Its inputs.
        slice_: Makes the slice from two or three random states of the model.
        points: The points.
        shares: The coefficients of the slice's ends at a point, in Python's floats.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Tensor
    slice_: Callable[[State, State, State], Slice]
    points: Sequence[tuple[float, ...]]
    shares: Callable[[Any, Sequence[float]], Sequence[float]]

    def __str__(self) -> str:
        return self.name


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def of_line(_: Any, point: Sequence[float]) -> Sequence[float]:
    return 1 - point[0], point[0]


def of_span(_: Any, point: Sequence[float]) -> Sequence[float]:
    return 1.0, *point


def of_triangle(plane: Triangle, point: Sequence[float]) -> Sequence[float]:
    gamma = point[1] / plane.corner_c[1]
    beta = (point[0] - gamma * plane.corner_c[0]) / plane.corner_b
    return 1 - beta - gamma, beta, gamma


def opposite(names: Sequence[str], near: float, rows: slice = slice(None)) -> Any:
    """A line on which some tensors, or some of their rows, nearly vanish at α = 0.75."""

    def make(a: State, b: State, _: State) -> Line:
        b = {name: tensor.clone() for name, tensor in b.items()}
        for name in names:
            own = a[name][rows]
            b[name][rows] = -own / 3 * (1 + near * normal(*own.shape, seed=7))
        return Line(a, b)

    return make


def near(size: float) -> Any:
    """A line between two states that are close to each other."""

    def make(a: State, b: State, _: State) -> Line:
        return Line(a, {name: tensor + size * b[name] for name, tensor in a.items()})

    return make


def span(a: State, b: State, c: State) -> Span:
    """A plane on which the first layer vanishes at (1, 1)."""
    first = {name: -0.5 * tensor + 1e-4 * b[name] for name, tensor in a.items()}
    second = {name: -0.5 * tensor + 1e-4 * c[name] for name, tensor in a.items()}
    return Span(a, first, second)


def triangle(a: State, b: State, c: State) -> Triangle:
    """A plane through two close corners and a far one."""
    return Triangle.through(a, {name: t + 1e-3 * b[name] for name, t in a.items()}, c)


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 4))


def convolving() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 16, 4), nn.Tanh()
    )


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 16, 4), nn.Tanh()
    )


def channel(a: State) -> Line:
    """A line on which the weights of the first channel of each group vanish at α = 0.5."""
    b = {name: tensor.clone() for name, tensor in a.items()}
    b["0.weight"][:, 0] *= -1
    return Line(a, b)


def embedding() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(9, 5), nn.LayerNorm(5), nn.Flatten(), nn.Linear(15, 4), nn.Tanh()
    )


LINE = [(i / 20,) for i in range(21)]
WIDE = [(float(i),) for i in range(-10, 11)]
GRID = [(x / 4, y / 4) for x in range(7) for y in range(7)]
FIRST = ["0.weight", "0.bias"]
TOKENS = torch.randint(9, (EXAMPLES, 3), generator=torch.Generator().manual_seed(1))
WIDE_GRID = [(x * 0.01, y * 2.0) for x in range(-3, 4) for y in range(-2, 3)]

CASES = [
    Cancelling("all", dense, normal(EXAMPLES, 6, scale=1e4), opposite(FIRST, 1e-3), LINE, of_line),
    Cancelling("unit", dense, normal(EXAMPLES, 6, scale=1e5),
               opposite(FIRST, 1e-5, slice(3, 5)), LINE, of_line),
    Cancelling("norm", normalised, normal(EXAMPLES, 6), opposite(FIRST, 1e-5), LINE, of_line),
    Cancelling("inputs", dense,
               normal(EXAMPLES, 6) * torch.tensor([1e6, 1e6, 1.0, 1.0, 1.0, 1.0]),
               lambda a, b, c: columns(a, b), LINE, of_line),
    Cancelling("bias", dense, normal(EXAMPLES, 6), opposite(["0.bias"], 1e-6), LINE, of_line),
    Cancelling("later", dense, normal(EXAMPLES, 6), opposite(["2.weight", "2.bias"], 1e-4), LINE,
               of_line),
    Cancelling("convolution", convolving, normal(EXAMPLES, 2, 6, 6, scale=1e4),
               opposite(FIRST, 1e-3), LINE, of_line),
    Cancelling("channel", convolving,
               normal(EXAMPLES, 2, 6, 6) * torch.tensor([1e6, 1.0])[:, None, None],
               lambda a, b, c: channel(a), LINE, of_line),
    Cancelling("group", grouped,
               normal(EXAMPLES, 4, 6, 6) * torch.tensor([1.0, 1.0, 1e6, 1.0])[:, None, None],
               lambda a, b, c: channel(a), LINE, of_line),
    Cancelling("embedding", embedding, TOKENS, opposite(["0.weight"], 1e-5), LINE, of_line),
    Cancelling("far", dense, normal(EXAMPLES, 6), near(1e-3), WIDE, of_line),
    Cancelling("span", dense, normal(EXAMPLES, 6, scale=1e4), span, GRID, of_span),
    Cancelling("triangle", dense, normal(EXAMPLES, 6), triangle, WIDE_GRID, of_triangle),
]  # fmt: skip


def columns(a: State, b: State) -> Line:
    """A line on which the weights of two large inputs vanish."""
    weight = b["0.weight"].clone()
    weight[:, :2] = -a["0.weight"][:, :2] / 3 * (1 + 1e-6 * normal(16, 2, seed=7))
    return Line(a, {**b, "0.weight": weight})


def plain(case: Cancelling, slice_: Slice, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """A loop over points: weights combined in float64, then rounded, and loaded."""
    model, rows = case.build().to(dtype), []
    inputs = case.inputs.to(dtype) if case.inputs.is_floating_point() else case.inputs
    for point in case.points:
        shares = case.shares(slice_, point)
        state = {
            name: sum(
                share * end[name].double() for share, end in zip(shares, slice_.ends, strict=True)
            )
            for name in slice_.ends[0]
        }
        model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()})
        with torch.no_grad():
            rows.append(F.cross_entropy(model(inputs).double(), targets, reduction="none"))
    return torch.stack(rows)


def made(case: Cancelling) -> tuple[Slice, Tensor, Objective]:
    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        states.append(case.build().state_dict())
    targets = torch.randint(4, (EXAMPLES,), generator=torch.Generator().manual_seed(2))
    data = DataSet({"all": Split(case.inputs, targets)})
    objective = Objective(case.build(), cross_entropy, {}, data, device=torch.device("cpu"))
    check_task(objective, states[0])
    return case.slice_(*states), targets, objective


def error(found: Tensor, truth: Tensor) -> float:
    """The largest root mean square over the examples of a point."""
    return float((found.double() - truth).square().mean(1).sqrt().max())


@pytest.mark.parametrize(("case", "way"), sample(itertools.product(CASES, Strategy), 0, 4), ids=str)
def test_no_strategy_has_a_larger_error_than_a_plain_float32_loop(
    case: Cancelling, way: Strategy
) -> None:
    slice_, targets, objective = made(case)
    truth = plain(case, slice_, targets, torch.float64)
    own = error(plain(case, slice_, targets, torch.float32), truth)
    objective.strategy = way
    found = objective.at(slice_, case.points)["all"].losses
    # Losses are stored in float32.
    assert error(found, truth) <= 4 * own + 2.0**-24 * float(truth.max())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_chosen_strategy_has_no_larger_error_than_a_plain_float32_loop(
    case: Cancelling,
) -> None:
    slice_, targets, objective = made(case)
    truth = plain(case, slice_, targets, torch.float64)
    own = error(plain(case, slice_, targets, torch.float32), truth)
    find_strategy(objective, slice_, case.points)
    found = objective.at(slice_, case.points)["all"].losses
    assert error(found, truth) <= 4 * own + 2.0**-24 * float(truth.max())
    assert objective.strategy is not Strategy.LOADED


@pytest.mark.parametrize("numbers", [1, 40, 1 << 20])
def test_points_that_do_not_cancel_go_on_sharing(
    monkeypatch: pytest.MonkeyPatch, numbers: int
) -> None:
    # However many points are looked at together.
    monkeypatch.setattr(first_layer, "_NUMBERS", numbers)
    shared: list[float] = []
    output = FirstLayer.output

    def watching(self: FirstLayer, point: Sequence[float]) -> Tensor:
        shared.append(point[0])
        return output(self, point)

    slice_, _, objective = made(CASES[0])
    objective.strategy = Strategy.SHARED
    monkeypatch.setattr(FirstLayer, "output", watching)
    objective.at(slice_, LINE)
    # The terms 1 − 2α/3 are more than 8 times as large as |1 − 4α/3| for 0.7 < α < 0.79.
    expected = [x for (x,) in LINE if not 0.69 < x < 0.79]
    assert shared == expected


def test_points_that_share_nothing_neither_verify_nor_choose_a_strategy() -> None:
    sharing_nothing = [(0.74 + i / 1000,) for i in range(11)]
    slice_, _, objective = made(CASES[0])
    find_strategy(objective, slice_, sharing_nothing)
    assert objective.strategy is None
    found = objective.at(slice_, sharing_nothing)["all"].losses
    find_strategy(objective, slice_, LINE)
    assert objective.strategy not in {None, Strategy.BOUND, Strategy.LOADED}
    # In whatever order slices are evaluated, the numbers are the same.
    assert torch.equal(objective.at(slice_, sharing_nothing)["all"].losses, found)


def test_slopes_at_such_points_are_as_exact() -> None:
    case = next(c for c in CASES if c.name == "norm")
    slice_, targets, objective = made(case)
    assert isinstance(slice_, Line)
    a, b = ({n: t.double() for n, t in end.items()} for end in slice_.ends)

    def truth(alpha: float, dtype: torch.dtype) -> float:
        x = torch.tensor(alpha, dtype=torch.float64)
        model = case.build().to(dtype)

        def loss(x: Tensor) -> Tensor:
            state = {n: (a[n] + x * (b[n] - a[n])).to(dtype) for n in a}
            outputs = torch.func.functional_call(model, state, case.inputs.to(dtype))
            return F.cross_entropy(outputs.double(), targets)

        return float(torch.autograd.functional.jacobian(loss, x))

    alphas = [0.7, 0.75, 0.8]
    found = slopes(objective, slice_, alphas)["all"].slope.tolist()
    exact = [truth(x, torch.float64) for x in alphas]
    own = max(abs(truth(x, torch.float32) - y) for x, y in zip(alphas, exact, strict=True))
    assert max(abs(x - y) for x, y in zip(found, exact, strict=True)) <= 4 * own
