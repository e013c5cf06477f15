"""Lines through weight space: exact at their ends, mirrored to the last bit; and grids on them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from losscli.errors import UsageError
from losscli.geometry import Line, grid

LINE = Line({}, {})
DTYPES = [torch.float32, torch.float64]
# Any bits: infinities, not-a-numbers, subnormals and both zeros are among them.
BITS = st.lists(st.integers(-(2**31), 2**31 - 1), min_size=8, max_size=8)


def pair(dtype: torch.dtype, *, seed: int = 0, size: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-6, 6, size, dtype=dtype)
    a, b = torch.randn(2, size, dtype=dtype, generator=generator) * scale
    return a, b


def same_bits(a: Tensor, b: Tensor) -> bool:
    whole = torch.int32 if a.dtype == torch.float32 else torch.int64
    return a.dtype == b.dtype and torch.equal(a.view(whole), b.view(whole))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_ends_are_exact(dtype: torch.dtype) -> None:
    for seed in range(20):
        a, b = pair(dtype, seed=seed, size=1000)
        assert same_bits(LINE.combine([a, b], (0.0,)), a)
        assert same_bits(LINE.combine([a, b], (1.0,)), b)


@settings(deadline=None)
@given(BITS, BITS)
def test_both_ends_are_exact_whatever_they_hold(a: list[int], b: list[int]) -> None:
    x, y = (torch.tensor(v, dtype=torch.int32).view(torch.float32) for v in (a, b))
    assert same_bits(LINE.combine([x, y], (0.0,)), x)
    assert same_bits(LINE.combine([x, y], (1.0,)), y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(deadline=None)
@given(alpha=st.floats(0.5, 2), seed=st.integers(0, 99))
@example(alpha=0.5, seed=0)
@example(alpha=math.nextafter(0.5, 1), seed=0)
@example(alpha=0.9, seed=0)
@example(alpha=1.5, seed=0)
def test_the_line_from_b_to_a_is_the_mirror_of_that_from_a_to_b(
    dtype: torch.dtype, alpha: float, seed: int
) -> None:
    a, b = pair(dtype, seed=seed)
    # From a half to two, 1 − α is exact, so that both calls are about one and the same point.
    assert 1 - (1 - alpha) == alpha
    assert same_bits(LINE.combine([a, b], (alpha,)), LINE.combine([b, a], (1 - alpha,)))


@settings(deadline=None)
@given(alpha=st.floats(-10, 10), seed=st.integers(0, 99))
def test_the_line_is_that_of_the_formula_in_float64(alpha: float, seed: int) -> None:
    a, b = pair(torch.float64, seed=seed)
    x, y = a.numpy(), b.numpy()
    expected = (1 - alpha) * x + alpha * y
    scale = (abs(alpha) + abs(1 - alpha)) * np.maximum(np.abs(x), np.abs(y))
    found = LINE.combine([a, b], (alpha,)).numpy()
    assert np.all(np.abs(found - expected) <= 8 * np.finfo(np.float64).eps * scale)


@settings(deadline=None)
@given(alpha=st.floats(-10, 10), seed=st.integers(0, 99))
def test_float32_is_within_its_rounding_of_float64(alpha: float, seed: int) -> None:
    a, b = pair(torch.float32, seed=seed)
    x, y = a.double().numpy(), b.double().numpy()
    scale = (abs(alpha) + abs(1 - alpha)) * np.maximum(np.abs(x), np.abs(y))
    found = LINE.combine([a, b], (alpha,)).double().numpy()
    expected = (1 - alpha) * x + alpha * y
    assert np.all(np.abs(found - expected) <= 8 * np.finfo(np.float32).eps * scale)


@settings(deadline=None)
@given(alpha=st.floats(-1e3, 1e3), seed=st.integers(0, 99))
def test_what_both_ends_share_stays_as_it_is(alpha: float, seed: int) -> None:
    a, _ = pair(torch.float32, seed=seed)
    assert torch.equal(LINE.combine([a, a.clone()], (alpha,)), a)
    assert LINE.barycentric


def test_the_line_goes_on_beyond_its_ends() -> None:
    a, b = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 2.0])
    assert LINE.combine([a, b], (2.0,)).tolist() == [5, 6]
    assert LINE.combine([a, b], (-0.5,)).tolist() == [0, -4]


@pytest.mark.parametrize("alpha", [-0.5, 0.0, 0.3, 0.5, 0.8, 1.0, 2.0])
def test_the_point_is_written_where_it_is_wanted(alpha: float) -> None:
    a, b = pair(torch.float32)
    before = a.clone(), b.clone()
    out = torch.full_like(a, math.nan)
    assert LINE.combine([a, b], (alpha,), out) is out
    fresh = LINE.combine([a, b], (alpha,))
    assert same_bits(out, fresh)
    # The ends are never handed out, nor written on.
    assert fresh.data_ptr() not in {a.data_ptr(), b.data_ptr()}
    assert same_bits(a, before[0])
    assert same_bits(b, before[1])


def test_a_line_has_two_ends() -> None:
    a, b = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    assert Line(a, b).ends == (a, b)


def test_the_default_grid_has_round_numbers_and_both_ends_of_the_line() -> None:
    points = grid(51, -0.5, 2.0)
    assert points == [float(f"{-0.5 + i / 20:.2f}") for i in range(51)]
    assert 0.0 in points
    assert 1.0 in points
    assert 0.15 in points
    # As adding up or NumPy would have it.
    assert 0.15000000000000002 in np.linspace(-0.5, 2.0, 51).tolist()


@settings(deadline=None)
@given(
    st.integers(1, 200),
    st.decimals(-9, 9, places=3, allow_nan=False).map(float),
    st.decimals("0.001", 9, places=3, allow_nan=False).map(float),
)
def test_a_grid_rises_evenly_from_its_first_point_to_its_last(
    count: int, low: float, width: float
) -> None:
    high = low + width
    points = grid(count, low, high)
    assert len(points) == count
    assert points[0] == low
    assert count == 1 or points[-1] == high
    assert points == sorted(set(points))
    np.testing.assert_allclose(points, np.linspace(low, high, count), rtol=1e-13, atol=1e-13)


def test_the_points_to_include_come_besides_where_the_range_holds_them() -> None:
    ends = (0.0, 1.0)
    assert grid(2, -0.5, 2.0, include=ends) == [-0.5, 0.0, 1.0, 2.0]
    assert grid(4, -0.5, 1.0, include=ends) == [-0.5, 0.0, 0.5, 1.0]
    assert grid(3, 0.25, 0.75, include=ends) == [0.25, 0.5, 0.75]
    assert grid(3, 1.0, 2.0, include=ends) == [1.0, 1.5, 2.0]
    assert grid(1, -1.0, 2.0, include=ends) == [-1.0, 0.0, 1.0]
    assert grid(1, -1.0, 2.0) == [-1.0]


def test_the_points_are_floats_and_zero_has_no_sign() -> None:
    points = grid(3, -1, 1, include=(0, 1))
    assert points == [-1.0, 0.0, 1.0]
    assert {type(x) for x in points} == {float}
    assert math.copysign(1, grid(2, -0.0, 1.0)[0]) == 1


@pytest.mark.parametrize(
    ("count", "low", "high", "message"),
    [
        (0, 0.0, 1.0, "--points 0 leaves nothing to evaluate. Give 1 or more"),
        (-3, 0.0, 1.0, "--points -3 leaves nothing"),
        (5, 1.0, 1.0, r"--range 1\.0 1\.0 is empty. Give the lower end first"),
        (5, 2.0, -0.5, r"--range 2\.0 -0\.5 is reversed. Give the lower end first"),
        (5, math.nan, 1.0, "--range nan 1.0 is not finite. Give two numbers"),
        (5, 0.0, math.nan, "is not finite"),
        (5, 0.0, math.inf, "is not finite"),
        (5, -math.inf, 0.0, "is not finite"),
    ],
)
def test_a_grid_without_points_or_range_is_a_usage_error(
    count: int, low: float, high: float, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        grid(count, low, high)
    assert "\n" not in str(caught.value)
