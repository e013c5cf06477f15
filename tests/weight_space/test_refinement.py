"""From a coarse grid to a known curve: on curves whose every extremum is known."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest

from losscli.weight_space.refinement import POSITION, Curve, Proposal, propose, uniform_points
from tests.cases import in_turn

LOW, HIGH = -0.5, 2.0

Function = Callable[[float], float]


def refine(
    f: Function,
    tolerance: float = 1e-3,
    *,
    points: int = 21,
    slope: Function | None = None,
    limit: int = 2000,
    noise: float = 1e-7,
    shuffle: bool = False,
) -> tuple[np.ndarray, Proposal]:
    """Refines until nothing is proposed; returns the points and the last proposal."""
    x = np.linspace(LOW, HIGH, points).tolist()
    order = random.Random(5)
    for _ in range(100):
        if shuffle:
            order.shuffle(x)
        curve = Curve([f(t) for t in x], None if slope is None else [slope(t) for t in x])
        found = propose(x, {"all": curve}, tolerance, limit=limit, noise=noise)
        if not found.alphas:
            return np.sort(x), found
        assert list(found.alphas) == sorted(set(found.alphas) - set(x))
        x += found.alphas
    raise AssertionError("it never ends")


def minima(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return 1 + np.flatnonzero((y[1:-1] < y[2:]) & (y[1:-1] <= y[:-2]))


def interpolate(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The cubic through the two points on either side of each place."""
    start = np.clip(np.searchsorted(x, at) - 2, 0, len(x) - 4)
    total = np.zeros(len(at))
    for j in range(4):
        share = np.ones(len(at))
        for k in range(4):
            if k != j:
                share *= (at - x[start + k]) / (x[start + j] - x[start + k])
        total += share * y[start + j]
    return total


FINE = np.linspace(LOW, HIGH, 200_001)


@cache
def modulated(height: float, waves: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A modulated parabola on the fine grid, the places of its minima, and their depths."""
    truth = FINE**2 + height * np.sin(waves * FINE)
    places = minima(FINE, truth)
    before, after = (np.maximum.accumulate(side) for side in (truth, truth[::-1]))
    depths = np.minimum(before[places], after[::-1][places]) - truth[places]
    return truth, places, depths


@pytest.mark.parametrize(
    ("height", "waves", "tolerance"),
    in_turn([(0.3, 20), (0.3, 40), (0.3, 60), (1.0, 33), (0.1, 50), (0.3, 100)], 1e-2, 1e-4, 1e-3),
)
def test_every_minimum_of_a_modulated_parabola_is_found_from_a_grid_that_skips_most(
    height: float, waves: float, tolerance: float
) -> None:
    def f(t: float) -> float:
        return t * t + height * math.sin(waves * t)

    x, last = refine(f, tolerance)
    assert not last.exhausted
    y = np.array([f(t) for t in x])
    truth, places, depths = modulated(height, waves)
    total = float(np.ptp(truth))
    coarse = np.linspace(LOW, HIGH, 21)
    seen = minima(coarse, np.array([f(t) for t in coarse]))
    # At 20 waves the grid is fine enough to show them; from 40 on it skips some.
    assert len(seen) < len(places) or waves < 40
    bottoms = minima(x, y)
    for place, depth in zip(places, depths, strict=True):
        edge = truth[-1] if place > places[-1] - 1 else math.inf
        # Its bottom and its rim are known to the tolerance, each.
        if min(depth, edge - truth[place]) <= 2 * tolerance * total:
            continue
        nearest = bottoms[np.abs(x[bottoms] - FINE[place]).argmin()]
        assert abs(x[nearest] - FINE[place]) <= 1e-3 * (HIGH - LOW)
        assert abs(y[nearest] - truth[place]) <= tolerance * total


@pytest.mark.parametrize(("waves", "tolerance"), in_turn([7, 20, 47], 1e-2, 1e-3, 1e-4))
def test_the_cubic_through_the_points_is_the_curve_to_the_tolerance(
    waves: float, tolerance: float
) -> None:
    def f(t: float) -> float:
        return t * t + math.sin(waves * t)

    x, _ = refine(f, tolerance)
    fine = np.linspace(LOW, HIGH, 20_001)
    truth = fine**2 + np.sin(waves * fine)
    off = np.abs(interpolate(x, np.array([f(t) for t in x]), fine) - truth)
    assert off.max() <= tolerance * np.ptp(truth)


def test_slopes_reveal_a_bump_between_two_points_of_the_grid() -> None:
    grid = np.linspace(LOW, HIGH, 21)
    middle, width = float(grid[8:10].mean()), 0.03

    def f(t: float) -> float:
        return t - math.exp(-(((t - middle) / width) ** 2))

    def slope(t: float) -> float:
        return 1 + 2 * (t - middle) / width**2 * math.exp(-(((t - middle) / width) ** 2))

    # Its tails are too low for the losses at the points, not for their slopes.
    assert abs(f(float(grid[8])) - grid[8]) < 0.014
    # Where the losses alone look straight at 1e-2, they tell of nothing.
    without, _ = refine(f, 1e-2)
    assert len(without) == 21
    x, _ = refine(f, 1e-2, slope=slope)
    y = np.array([f(t) for t in x])
    bottom = minima(x, y)
    fine = np.linspace(middle - 0.1, middle + 0.1, 400_001)
    truth = fine - np.exp(-(((fine - middle) / width) ** 2))
    assert abs(x[bottom] - fine[truth.argmin()]).min() <= 1e-3 * (HIGH - LOW)


def test_slopes_save_points() -> None:
    def f(t: float) -> float:
        return math.sin(5 * t)

    alone, _ = refine(f, 1e-5)
    helped, _ = refine(f, 1e-5, slope=lambda t: 5 * math.cos(5 * t))
    assert len(helped) < 0.8 * len(alone)


def test_slopes_that_are_known_at_some_points_only_are_used_there() -> None:
    x = np.linspace(0.1, 1, 9).tolist()
    curve = Curve([t**3 for t in x], [3 * t * t if t < 0.5 else math.nan for t in x])
    assert propose(x, {"all": curve}, 1e-6) == Proposal((), exhausted=False)


@pytest.mark.parametrize("where", [0.3137, -0.4999, 1.97])
def test_a_step_is_refined_down_to_the_shortest_interval(where: float) -> None:
    x, last = refine(lambda t: float(t > where))
    assert not last.exhausted
    after = int(np.searchsorted(x, where))
    assert x[after] - x[after - 1] <= 2.0**-19 * (HIGH - LOW)
    assert np.diff(x).min() >= 2.0**-22 * (HIGH - LOW)
    assert len(x) < 160


@pytest.mark.parametrize("beyond", [math.nan, math.inf, -math.inf])
def test_an_edge_to_what_is_not_finite_takes_a_bounded_number_of_points(beyond: float) -> None:
    x, _ = refine(lambda t: t * t + 1 if 0.1 < t < 1.234 else beyond)
    for edge in (0.1, 1.234):
        after = int(np.searchsorted(x, edge, side="right"))
        assert x[after] - x[after - 1] <= POSITION * (HIGH - LOW)
    assert len(x) < 21 + 40
    # Where both ends of an interval are not finite, nothing is looked for.
    assert not ((x > 1.4) & ~np.isclose((x - LOW) / 0.125 % 1, 0)).any()


@pytest.mark.parametrize(
    "f",
    [
        lambda _: 2.5,
        lambda _: 0.0,
        lambda _: math.nan,
        lambda _: math.inf,
        lambda t: 3 * t - 1,
        lambda t: 5 + 1e-9 * math.sin(1e7 * t),
        lambda t: float(np.float32(7 + 1e-7 * math.sin(1e7 * t))),
    ],
    ids=["constant", "zero", "nan", "inf", "straight", "noise", "float32"],
)
def test_where_there_is_nothing_to_see_nothing_is_proposed(f: Function) -> None:
    x, last = refine(f)
    assert len(x) == 21
    assert not last.exhausted


def test_rounding_is_distinguished_from_the_curve_by_the_parameter() -> None:
    def f(t: float) -> float:
        return 5 + 1e-5 * math.sin(1e4 * t)

    assert len(refine(f, noise=1e-5)[0]) == 21
    assert len(refine(f, noise=1e-7)[0]) > 100


@pytest.mark.parametrize(
    ("f", "most"),
    [
        (lambda t: math.exp(-2 * t), 21),
        (lambda t: t**3, 21),
        (lambda t: 1 / (1 + math.exp(8 * t - 6)), 60),
        (lambda t: max(0.0, t - 0.4123), 60),
    ],
    ids=["exponential", "cubic", "sigmoid", "kink"],
)
def test_a_monotone_curve_takes_few_points(f: Function, most: int) -> None:
    assert len(refine(f)[0]) <= most


@pytest.mark.parametrize(
    ("f", "where"),
    [
        (lambda t: abs(t - 0.333), 0.333),
        (lambda t: (t - 0.333) ** 2, 0.333),
        (lambda t: (t - 0.333) ** 2 + (t - 0.333) ** 3 / 3, 0.333),
        (lambda t: (t - 0.375 - 0.0625) ** 2, 0.4375),
        (lambda t: math.sqrt(abs(t - 1.9)), 1.9),
        (lambda t: -math.exp(-30 * abs(t + 0.49)), -0.49),
    ],
    ids=["kink", "parabola", "skewed", "between-equals", "cusp", "spike"],
)
def test_minima_of_every_form_are_refined(f: Function, where: float) -> None:
    x, _ = refine(f, 1e-2)
    y = np.array([f(t) for t in x])
    assert abs(x[y.argmin()] - where) <= POSITION * (HIGH - LOW)
    x, _ = refine(lambda t: -f(t), 1e-2)
    assert abs(x[(-np.array([f(t) for t in x])).argmax()] - where) <= POSITION * (HIGH - LOW)


def test_a_minimum_in_the_last_interval_is_found() -> None:
    x, _ = refine(lambda t: (t - 1.96) ** 2, 1e-3)
    assert np.abs(x - 1.96).min() <= POSITION * (HIGH - LOW)
    x, _ = refine(lambda t: (t + 0.46) ** 2, 1e-3)
    assert np.abs(x + 0.46).min() <= POSITION * (HIGH - LOW)


def test_the_rims_of_a_flat_bottom_are_refined_and_its_inside_is_not() -> None:
    x, _ = refine(lambda t: max(0.0, abs(t - 0.5) - 0.3))
    for rim in (0.2, 0.8):
        assert np.abs(x - rim).min() <= POSITION * (HIGH - LOW)
    assert ((x > 0.3) & (x < 0.7)).sum() < 12


@pytest.mark.parametrize("points", [2, 3, 4, 5])
def test_a_grid_of_two_points_is_enough(points: int) -> None:
    x, _ = refine(lambda t: (t - 0.7) ** 2 * (1 + t), points=points)
    assert np.abs(x - 0.7).min() <= POSITION * (HIGH - LOW)


@pytest.mark.parametrize("points", [0, 1])
def test_fewer_points_hold_no_interval(points: int) -> None:
    assert propose([0.0] * points, {"all": Curve([1.0] * points)}, 1e-3).alphas == ()


def test_the_points_do_not_depend_on_the_order_of_evaluation() -> None:
    def f(t: float) -> float:
        return t * t + 0.3 * math.sin(40 * t)

    once, again, shuffled = (refine(f, shuffle=shuffle)[0] for shuffle in (False, False, True))
    assert once.tolist() == again.tolist() == shuffled.tolist()


def test_the_limit_is_kept_and_reported() -> None:
    def rough(t: float) -> float:
        return math.sin(1e5 * t * t)

    x, last = refine(rough, limit=300)
    assert len(x) == 300
    assert last == Proposal((), exhausted=True)
    # What is left goes to the widest gaps.
    assert np.diff(x).max() <= 0.125 / 4


def test_each_of_several_curves_gets_what_it_needs() -> None:
    x = np.linspace(LOW, HIGH, 21).tolist()
    train, test = Curve([abs(t - 0.2) for t in x]), Curve([abs(t - 1.4) for t in x])
    one, other, both = (
        set(propose(x, curves, 1e-3).alphas)
        for curves in ({"train": train}, {"test": test}, {"train": train, "test": test})
    )
    assert one
    assert other
    assert both == one | other


def uniform(points: Sequence[float]) -> int:
    return uniform_points(list(points))


def test_an_even_grid_as_fine_is_counted() -> None:
    assert uniform([]) == 0
    assert uniform([1.0]) == 1
    assert uniform(np.linspace(0, 1, 51).tolist()) == 51
    assert uniform([0.0, 0.25, 0.5, 1.0]) == 5
    # A single narrow interval, where two searches met, does not count beyond a position.
    assert uniform([0.0, 0.5, 0.500001, 1.0]) == 1025
    assert uniform([0.0, 0.5, 0.50001, 0.50002, 1.0]) == 100_001


def test_refinement_needs_fewer_points_than_an_even_grid_of_the_same_error() -> None:
    x, _ = refine(lambda t: abs(t - 0.333))
    assert 10 * len(x) < uniform_points(x.tolist())
