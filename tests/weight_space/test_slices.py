"""Lines and planes through weight space: exact where the checkpoints are; and grids on them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from losscli.errors import CheckpointError, UsageError
from losscli.weight_space.slices import Line, Span, Triangle, grid

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
def test_both_ends_are_exact_for_all_bit_patterns(a: list[int], b: list[int]) -> None:
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
def test_tensors_that_both_ends_share_are_not_changed(alpha: float, seed: int) -> None:
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


TRIANGLE = Triangle({}, {}, {}, 3.0, (-1.25, 0.7))
SPAN = Span({}, {}, {})
CORNERS = [(0.0, 0.0), (TRIANGLE.corner_b, 0.0), TRIANGLE.corner_c]
COORDINATE = st.floats(-20, 20)


def three(dtype: torch.dtype, *, seed: int = 0, size: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-6, 6, size, dtype=dtype)
    return list(torch.randn(3, size, dtype=dtype, generator=generator) * scale)


def points(
    dtype: torch.dtype = torch.float32, *, seed: int = 0, count: int = 3
) -> list[dict[str, Tensor]]:
    """Points with tensors of every kind: scalar, empty, transposed."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "w": torch.randn(4, 5, generator=generator).to(dtype).t(),
            "b": torch.randn(3, generator=generator).to(dtype),
            "s": torch.randn((), generator=generator).to(dtype),
            "e": torch.zeros(0, 3, dtype=dtype),
        }
        for _ in range(count)
    ]


def flat(weights: dict[str, Tensor]) -> np.ndarray:
    return np.concatenate([t.to(torch.float64).numpy().ravel() for t in weights.values()])


def at(plane: Triangle | Span, x: float, y: float) -> np.ndarray:
    """A point of a plane, worked in float64."""
    names = plane.ends[0]
    return flat({n: plane.combine([e[n].double() for e in plane.ends], (x, y)) for n in names})


def shares(triangle: Triangle, x: float, y: float) -> tuple[float, float, float]:
    """The barycentric coordinates, by solving for them."""
    (c_x, c_y), b_x = triangle.corner_c, triangle.corner_b
    matrix = np.array([[0, b_x, c_x], [0, 0, c_y], [1, 1, 1]])
    a, b, c = np.linalg.solve(matrix, [x, y, 1]).tolist()
    return a, b, c


@settings(deadline=None)
@given(BITS, BITS, BITS)
def test_all_three_corners_are_exact_for_all_bit_patterns(
    a: list[int], b: list[int], c: list[int]
) -> None:
    values = [torch.tensor(v, dtype=torch.int32).view(torch.float32) for v in (a, b, c)]
    for corner, value in zip(CORNERS, values, strict=True):
        assert same_bits(TRIANGLE.combine(values, corner), value)


@settings(deadline=None)
@given(BITS)
def test_the_origin_of_a_span_is_exact_for_all_bit_patterns(bits: list[int]) -> None:
    origin = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    huge = torch.full_like(origin, math.inf)
    assert same_bits(SPAN.combine([origin, huge, huge], (0.0, 0.0)), origin)
    assert same_bits(SPAN.combine([origin, huge, huge], (-0.0, -0.0)), origin)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(deadline=None)
@given(x=COORDINATE, y=COORDINATE, seed=st.integers(0, 99))
def test_a_triangle_is_within_rounding_of_its_formula(
    dtype: torch.dtype, x: float, y: float, seed: int
) -> None:
    values = three(dtype, seed=seed)
    coefficients = shares(TRIANGLE, x, y)
    terms = [k * v.double().numpy() for k, v in zip(coefficients, values, strict=True)]
    scale = sum(map(abs, coefficients)) * np.max([v.double().abs().numpy() for v in values], axis=0)
    found = TRIANGLE.combine(values, (x, y)).double().numpy()
    assert np.all(np.abs(found - sum(terms)) <= 8 * torch.finfo(dtype).eps * scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(deadline=None)
@given(x=COORDINATE, y=COORDINATE, seed=st.integers(0, 99))
def test_a_span_is_within_rounding_of_its_formula(
    dtype: torch.dtype, x: float, y: float, seed: int
) -> None:
    values = three(dtype, seed=seed)
    terms = [k * v.double().numpy() for k, v in zip((1, x, y), values, strict=True)]
    found = SPAN.combine(values, (x, y)).double().numpy()
    error = np.abs(found - sum(terms))
    assert np.all(error <= 3 * torch.finfo(dtype).eps * sum(map(np.abs, terms)))


@settings(deadline=None)
@given(st.floats(-3, 3), st.integers(0, 99))
def test_the_edges_of_a_triangle_are_the_lines_through_its_corners(alpha: float, seed: int) -> None:
    a, b, c = three(torch.float32, seed=seed)
    # Powers of two, so that coordinates on the edges are exact.
    triangle = Triangle({}, {}, {}, 4.0, (0.0, 2.0))
    assert same_bits(triangle.combine([a, b, c], (4 * alpha, 0.0)), LINE.combine([a, b], (alpha,)))
    assert same_bits(triangle.combine([a, b, c], (0.0, 2 * alpha)), LINE.combine([a, c], (alpha,)))


def test_tensors_that_all_corners_share_are_not_changed() -> None:
    (a, *_) = three(torch.float32)
    for x, y in itertools.product([-7.3, 0.0, 0.4, 1.0, 19.0], repeat=2):
        assert torch.equal(TRIANGLE.combine([a, a.clone(), a.clone()], (x, y)), a)
    assert TRIANGLE.barycentric
    assert not SPAN.barycentric


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_a_point_of_a_triangle_is_the_same_from_whichever_corner(order: Sequence[int]) -> None:
    ends = points()
    triangle = Triangle.through(*ends)
    other = Triangle.through(*(ends[i] for i in order))
    for x, y in [(0.3, 0.2), (-2.0, 5.0), (4.0, -1.0), (2.0, 2.0)]:
        point = at(triangle, x, y)
        u, v, off = other.project(_as_weights(point, ends[0]))
        assert off < 1e-13 * np.linalg.norm(point)
        np.testing.assert_allclose(at(other, u, v), point, rtol=0, atol=1e-13)
        # Its axes are orthonormal: distances are those of weight space.
        corner = [(0, 0), (other.corner_b, 0), other.corner_c][list(order).index(0)]
        assert math.dist((u, v), corner) == pytest.approx(math.hypot(x, y), rel=1e-13)


def _as_weights(vector: np.ndarray, like: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = torch.from_numpy(vector).split([t.numel() for t in like.values()])
    return {n: p.reshape(t.shape) for p, (n, t) in zip(parts, like.items(), strict=True)}


@pytest.mark.parametrize("short", ["AB", "AC", "BC"])
def test_nothing_cancels_in_a_triangle_with_a_short_edge(short: str) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, c, nudge = torch.randn(4, 64, dtype=torch.float64, generator=generator) + 1
    nudge *= 1e-3
    ends = {"AB": [a, a + nudge, c], "AC": [a, b, a + nudge], "BC": [a, b, b + nudge]}[short]
    single = [end.float() for end in ends]
    triangle = Triangle.through(*({"w": end} for end in single))
    size = float(a.norm())
    for x, y in itertools.product([-2.0, -0.5, 0.3, 2.0], repeat=2):
        place = x * size, y * size
        coefficients = shares(triangle, *place)
        assert max(map(abs, coefficients)) > 100
        wide = [end.double().numpy() for end in single]
        expected = sum(k * v for k, v in zip(coefficients, wide, strict=True))
        found = triangle.combine(single, place).double().numpy()
        # A few roundings of numbers of the size of the weights, and not hundreds of them.
        error = np.linalg.norm(found - expected)
        assert error <= 2 * np.finfo(np.float32).eps * math.hypot(size, *place)


def test_a_triangle_is_linear_in_its_values() -> None:
    values, others = three(torch.float64, seed=1), three(torch.float64, seed=2)
    mixed = [2 * v - 3 * w for v, w in zip(values, others, strict=True)]
    for plane, x, y in itertools.product((TRIANGLE, SPAN), (-2.0, 0.3), (0.7, 5.0)):
        found = plane.combine(mixed, (x, y))
        first, second = plane.combine(values, (x, y)), plane.combine(others, (x, y))
        scale = torch.stack([*values, *others]).abs().amax(dim=0) * 200
        assert torch.all((found - (2 * first - 3 * second)).abs() <= 1e-15 * scale)


def test_turning_the_axes_of_a_span_turns_its_coordinates() -> None:
    origin, u, v = three(torch.float64)
    cos, sin = math.cos(0.7), math.sin(0.7)
    turned = [origin, cos * u + sin * v, cos * v - sin * u]
    for x, y in [(1.0, 0.0), (0.3, -2.0), (-5.0, 4.0)]:
        point = SPAN.combine([origin, u, v], (x, y))
        same = SPAN.combine(turned, (cos * x + sin * y, cos * y - sin * x))
        torch.testing.assert_close(same, point, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("plane", [TRIANGLE, SPAN], ids=["triangle", "span"])
@pytest.mark.parametrize("x", [0.0, 0.4, 3.0, -1.25])
@pytest.mark.parametrize("y", [0.0, 0.7, -2.0])
def test_a_point_of_a_plane_is_written_where_it_is_wanted(
    plane: Triangle | Span, x: float, y: float
) -> None:
    values = three(torch.float32)
    before = [v.clone() for v in values]
    out = torch.full_like(values[0], math.nan)
    assert plane.combine(values, (x, y), out) is out
    fresh = plane.combine(values, (x, y))
    assert same_bits(out, fresh)
    assert fresh.data_ptr() not in {v.data_ptr() for v in values}
    assert all(map(same_bits, values, before))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
def test_the_plane_through_three_points_has_orthonormal_axes(dtype: torch.dtype) -> None:
    ends = points(dtype)
    triangle = Triangle.through(*ends)
    assert triangle.ends == tuple(ends)
    a, b, c = map(flat, ends)
    # By QR: the axes are those of Gram–Schmidt, and the corners are its coefficients.
    _, r = np.linalg.qr(np.stack([b - a, c - a], axis=1))
    assert triangle.corner_b == pytest.approx(abs(r[0, 0]), rel=1e-13)
    assert triangle.corner_c[0] == pytest.approx(r[0, 1] * np.sign(r[0, 0]), rel=1e-13)
    assert triangle.corner_c[1] == pytest.approx(abs(r[1, 1]), rel=1e-13)
    origin = at(triangle, 0, 0)
    first, second = at(triangle, 1, 0) - origin, at(triangle, 0, 1) - origin
    axes = np.stack([first, second])
    np.testing.assert_allclose(axes @ axes.T, np.eye(2), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
@pytest.mark.parametrize("kind", ["triangle", "span"])
def test_projection_is_the_least_squares_of_numpy(dtype: torch.dtype, kind: str) -> None:
    *ends, point = points(dtype, count=4)
    plane = Triangle.through(*ends) if kind == "triangle" else Span(*ends)
    o, u, v = map(flat, ends)
    if kind == "triangle":
        axes, _ = np.linalg.qr(np.stack([u - o, v - o], axis=1))
        axes *= np.sign([axes[:, 0] @ (u - o), axes[:, 1] @ (v - o)])
    else:
        axes = np.stack([u, v], axis=1)
    step = flat(point) - o
    expected, *_ = np.linalg.lstsq(axes, step, rcond=None)
    x, y, off = plane.project({**point, "more": torch.ones(3)})
    np.testing.assert_allclose([x, y], expected, rtol=1e-12, atol=1e-13)
    assert off == pytest.approx(np.linalg.norm(step - axes @ expected), rel=1e-12)


def test_a_corner_is_projected_onto_itself_exactly() -> None:
    for seed in range(20):
        ends = points(seed=seed)
        triangle = Triangle.through(*ends)
        corners = (0.0, 0.0), (triangle.corner_b, 0.0), triangle.corner_c
        for end, corner in zip(ends, corners, strict=True):
            assert triangle.project({n: t.clone() for n, t in end.items()}) == (*corner, 0.0)
        assert Span(*ends).project(ends[0]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("kind", ["triangle", "span"])
def test_points_of_a_plane_are_projected_onto_themselves(kind: str) -> None:
    ends = points(torch.float64)
    plane = Triangle.through(*ends) if kind == "triangle" else Span(*ends)
    for x, y in [(0.2, 0.1), (-3.0, 8.0), (5.0, 0.0), (0.0, -1.0)]:
        u, v, off = plane.project(_as_weights(at(plane, x, y), ends[0]))
        assert (u, v) == pytest.approx((x, y), rel=1e-13, abs=1e-13)
        assert off <= 1e-13


def test_the_distance_from_a_plane_is_good_where_it_is_small() -> None:
    a, b, c = (torch.zeros(5, dtype=torch.float64) for _ in range(3))
    b[0], c[1] = 1.0, 1.0
    point = torch.tensor([0.5, 0.25, 3e-13, 4e-13, 0.0], dtype=torch.float64)
    # The root of a difference of squares would know nothing under 1e-8.
    for plane in (Triangle.through({"": a}, {"": b}, {"": c}), Span({"": a}, {"": b}, {"": c})):
        x, y, off = plane.project({"": point})
        assert (x, y) == (0.5, 0.25)
        assert off == pytest.approx(5e-13, rel=1e-12)


def test_a_direction_of_zero_or_twice_the_same_takes_no_part_in_a_projection() -> None:
    origin, u, step = ({"w": torch.tensor(v)} for v in ([1.0, 1], [2.0, 0], [4.0, 2]))
    nothing = {"w": torch.zeros(2)}
    assert Span(origin, u, nothing).project(step) == (1.5, 0.0, 1.0)
    assert Span(origin, nothing, u).project(step) == (0.0, 1.5, 1.0)
    assert Span(origin, nothing, nothing).project(step) == (0, 0, math.sqrt(10))
    assert Span(origin, u, u).project(step) == pytest.approx((0.75, 0.75, 1.0))


def test_axes_of_very_different_lengths_are_projected_separately() -> None:
    origin, u, v = points(torch.float64)
    long = {n: t * 1e12 for n, t in v.items()}
    target = _as_weights(flat(origin) + 3 * flat(u) + 2 * flat(v), origin)
    x, y, off = Span(origin, u, long).project(target)
    assert (x, y) == pytest.approx((3, 2e-12), rel=1e-12)
    assert off < 1e-12


def test_two_equal_points_or_three_on_a_line_are_a_usage_error() -> None:
    a, b, c = points()
    for ends, message in [
        ((a, a, c), "A and B have the same parameters"),
        ((a, b, a), "A and C have the same parameters"),
        ((a, b, b), "B and C have the same parameters"),
        ((a, b, _between(a, b, 0.3)), "A, B and C are on one line"),
        ((a, _between(a, b, 0.3), b), "A, B and C are on one line"),
        ((a, b, _between(a, b, -2.0)), "A, B and C are on one line"),
    ]:
        with pytest.raises(UsageError, match=rf"{message}[,:] .* plane.*\. Give ") as caught:
            Triangle.through(*ends)
        assert "\n" not in str(caught.value)


def _between(a: dict[str, Tensor], b: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    return {n: (1 - alpha) * a[n].double() + alpha * b[n].double() for n in a}


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_collinearity_does_not_depend_on_the_order_of_points(
    order: Sequence[int],
) -> None:
    flat_ones = [torch.tensor(v, dtype=torch.float64) for v in ([0.0, 0], [1.0, 0], [0.4, 1e-7])]
    with pytest.raises(UsageError, match="on one line"):
        Triangle.through(*({"w": flat_ones[i]} for i in order))
    # One short edge makes no line, if it is across the others.
    needle = [torch.tensor(v, dtype=torch.float64) for v in ([0.0, 0], [1.0, 0], [1.0, 1e-7])]
    ends = [{"w": needle[i]} for i in order]
    triangle = Triangle.through(*ends)
    x, y, off = triangle.project({"w": torch.tensor([0.5, 0.25], dtype=torch.float64)})
    assert off < 1e-8
    assert at(triangle, x, y) == pytest.approx([0.5, 0.25], abs=1e-8)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", range(3))
def test_a_corner_that_is_not_finite_is_named(bad: float, which: int) -> None:
    ends = points()
    ends[which]["b"][1] = bad
    with pytest.raises(CheckpointError, match=rf"^{'ABC'[which]} has weights that are infinite"):
        Triangle.through(*ends)


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


def test_points_to_include_are_added_if_they_lie_in_the_range() -> None:
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
