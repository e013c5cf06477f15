"""Averages of points in weight space, compared with plain float64 loops."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from losscli.weight_space import averages

Point = dict[str, Tensor]

SHARES = [None, (0.2, 0.5, 0.3), (-0.5, 0.0, 1.5)]


def points(dtype: torch.dtype, number: int = 3) -> list[Point]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.complex128 if dtype.is_complex else torch.float64

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=wide).to(dtype)

    return [
        {"w": some(7, 5).T, "c": some(3, 2, 4, 4).to(memory_format=torch.channels_last),
         "none": some(0, 3), "n": torch.tensor([k, 2]), "one": some(1).squeeze()}
        for k in range(number)
    ]  # fmt: skip


def opened(states: list[Point]) -> list[Callable[[], Point]]:
    return [lambda state=state: state for state in states]  # type: ignore[misc]


def by_hand(states: list[Point], name: str, shares: tuple[float, ...] | None) -> list[complex]:
    columns = zip(*(s[name].to(torch.complex128).flatten().tolist() for s in states), strict=True)
    given = shares or [1 / len(states)] * len(states)
    return [sum(w * x for w, x in zip(given, column, strict=True)) for column in columns]


@pytest.mark.parametrize("group", [3, 1 << 24])
@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
)
def test_an_average_is_the_sum_in_float64_rounded_once(
    dtype: torch.dtype,
    shares: tuple[float, ...] | None,
    group: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(averages, "_GROUP", group)
    states = points(dtype)
    found = averages.average(opened(states), shares)
    assert list(found) == list(states[0])
    assert found["n"].tolist() == [0, 2]
    for name in ("w", "c", "none", "one"):
        assert (found[name].dtype, found[name].shape) == (dtype, states[0][name].shape)
        expected = torch.tensor(by_hand(states, name, shares), dtype=torch.complex128)
        error = (found[name].to(torch.complex128).flatten() - expected).abs()
        # Half a unit in the last place, and the rounding of sums in float64.
        assert (error <= 0.501 * torch.finfo(dtype).eps * expected.abs() + 1e-15).all()


@pytest.mark.parametrize("shares", [None, (0.1, 0.2, 0.7), (1 / 3, 1 / 3, 1 / 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex128])
def test_the_average_of_equal_points_is_each_of_them_to_the_bit(
    dtype: torch.dtype, shares: tuple[float, ...] | None
) -> None:
    (state,) = points(dtype, 1)
    state["odd"] = torch.tensor([-0.0, math.inf, -math.inf, 1e-45, 3e38])
    found = averages.average(opened([state] * 3), shares)
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor), name
    assert found["odd"].signbit().tolist() == state["odd"].signbit().tolist()


def test_a_point_without_weight_is_not_used() -> None:
    states = [{"w": torch.tensor([math.inf, 1.0])}, {"w": torch.tensor([2.0, 3.0])}]
    assert torch.equal(averages.average(opened(states), (0, 1))["w"], states[1]["w"])


@pytest.mark.parametrize(
    ("types", "wider"),
    [
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.float16, torch.float32, torch.bfloat16), torch.float32),
        ((torch.float32, torch.float64), torch.float64),
    ],
)
def test_the_type_is_the_widest(types: tuple[torch.dtype, ...], wider: torch.dtype) -> None:
    states = [{"w": torch.full((2,), 1.0 + k, dtype=t)} for k, t in enumerate(types)]
    found = averages.average(opened(states))["w"]
    assert found.dtype == wider
    assert found.tolist() == [1 + (len(types) - 1) / 2] * 2


def test_one_tensor_under_two_names_remains_one() -> None:
    def tied() -> Point:
        tensor = torch.randn(2, 2)
        return {"a": tensor, "b": tensor, "c": tensor.T}

    found = averages.average(opened([tied(), tied()]))
    assert found["a"] is found["b"] is not found["c"]
    apart = {name: tensor.clone() for name, tensor in tied().items()}
    found = averages.average(opened([tied(), apart]))
    assert found["a"] is not found["b"]
