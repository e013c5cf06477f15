"""The mean over directions, its spread, and the radius of a basin, against closed forms."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from losscli.weight_space.basin import Profile, radius

NAN, INF = math.nan, math.inf
GOLDEN = (1 + math.sqrt(5)) / 2
LOSSES = np.array([[1.0, 2.0, 5.0], [1.0, 3.0, 4.0], [1.0, 7.0, 9.0], [1.0, 2.5, 6.0]])


def test_the_mean_and_the_spread_are_those_of_the_statistics_module() -> None:
    found = Profile.of(LOSSES)
    for p, column in enumerate(LOSSES.T.tolist()):
        assert found.mean[p] == pytest.approx(statistics.mean(column))
        assert found.deviation[p] == pytest.approx(statistics.stdev(column))
        # Between sorted values linearly, the first and the last at 0 and 1.
        *tenths, last = statistics.quantiles(column, n=10, method="inclusive")
        assert (found.low[p], found.high[p]) == pytest.approx((tenths[0], last))


def test_one_direction_has_no_spread_and_no_error() -> None:
    found = Profile.of(LOSSES[:1])
    assert found.mean.tolist() == LOSSES[0].tolist()
    assert np.isnan([found.deviation, found.low, found.high]).all()
    distance, error, _, bound = radius([0, 1, 2], LOSSES[:1], 3.0)
    assert (1 < distance < 2, math.isnan(error), bound) == (True, True, "")


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_loss_that_is_not_finite_gives_no_statistics_at_its_point(bad: float) -> None:
    losses = LOSSES.copy()
    losses[2, 1] = bad
    found = Profile.of(losses)
    assert not np.isfinite([found.mean[1], found.deviation[1]]).any()
    assert found.mean[[0, 2]].tolist() == Profile.of(LOSSES).mean[[0, 2]].tolist()


X = [-2.0, -1.0, 0.0, 1.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("losses", "threshold", "expected"),
    [
        # Lines on either side: the smaller of 1.5 and 3.
        ([5, 3, 1, 2, 3, 5], 4.0, (1.5, (-1.5,), "")),
        ([5, 3, 1, 4, 7, 9], 6.0, (5 / 3, (5 / 3,), "")),
        ([5, 3, 1, 3, 5, 9], 4.5, (1.75, (1.75, -1.75), "")),
        # At a point itself, and not even at the centre.
        ([7, 3, 1, 2, 3, 5], 7.0, (2.0, (-2.0,), "")),
        ([5, 3, 1, 2, 3, 5], 1.0, (0.0, (), "")),
        ([5, 3, 1, 2, 3, 5], 0.5, (0.0, (), "")),
        # Never crossed: as far as the nearer side reaches.
        ([5, 3, 1, 2, 3, 5], 9.0, (2.0, (), "at least")),
        ([0, 0, 1, 2, 3, 5], 4.5, (2.0, (), "at least")),
        # Before the first point: as far as that, or as the other side is known to be.
        ([5, 3, 1, 1, 1, 1], 2.0, (1.0, (), "at most")),
        ([9, 9, 1, 1, 1, 1], 2.0, (1.0, (), "at most")),
        # Crossed and back again: the first crossing counts.
        ([1, 1, 1, 1, 3, 1], 2.0, (GOLDEN, (GOLDEN,), "")),
        # Nothing is known beyond a mean that is not finite.
        ([1, 1, 1, 1, NAN, 1], 2.0, (1.0, (), "at least")),
        ([1, 1, 1, 1, INF, 1], 2.0, (1.0, (), "at least")),
        ([1, NAN, 1, 1, 3, 3], 2.0, (0.0, (), "at least")),
        ([1, 1, NAN, 1, 3, 3], 2.0, (0.0, (), "")),
    ],
)
def test_the_radius_is_where_the_mean_crosses_the_threshold(
    losses: list[float], threshold: float, expected: tuple[float, tuple[float, ...], str]
) -> None:
    for of in ([losses], [losses, losses]):
        distance, _, positions, bound = radius(X, np.array(of, float), threshold)
        assert (distance, bound) == (pytest.approx(expected[0]), expected[2])
        assert positions == pytest.approx(expected[1])
    # The other way round it is the same.
    mirrored = radius([-x for x in X[::-1]], np.array([losses[::-1]], float), threshold)
    assert (mirrored.distance, mirrored.bound) == (pytest.approx(expected[0]), expected[2])
    assert sorted(mirrored.positions) == pytest.approx(sorted(-x for x in expected[1]))


def test_an_unknown_side_is_at_most_as_wide_as_the_known_one() -> None:
    # To the right the loss crosses at 1.5; to the left it does so before 3.
    positions, losses = [-3.0, 0.0, 1.0, 2.0], np.array([[9.0, 0.0, 2.0, 4.0]])
    assert radius(positions, losses, 3.0)[::3] == (1.5, "at most")
    assert radius(positions, losses, 5.0)[::3] == (3.0, "at most")


@pytest.mark.parametrize("slope", [-0.4, 0.0, 0.7])
@pytest.mark.parametrize("bend", [0.5, 2.0, -0.02])
def test_a_parabola_is_met_exactly(slope: float, bend: float) -> None:
    positions = np.array([0, 0.3, 0.7, 1.2, 2.0, 2.4, 3.1])
    mean = 1 + slope * positions + bend * positions**2
    losses = np.stack([mean + positions, mean - positions])
    for threshold in np.linspace(1.01, mean.max() - 1e-9, 7) if mean.max() > 1.01 else ():
        found = radius(positions.tolist(), losses, float(threshold))
        above = np.flatnonzero(mean >= threshold)[0]
        roots = np.roots([bend, slope, 1 - threshold]) if bend else []
        exact = min(r.real for r in roots if abs(r.imag) < 1e-12 and r.real > 0)
        if above == 1:
            assert found[::3] == (0.3, "at most")
        else:
            assert found.distance == pytest.approx(exact, rel=1e-12)


def test_the_error_is_that_of_leaving_directions_out_one_at_a_time() -> None:
    # Directions with slopes s_k cross 1 + 1 at 1 / mean(s), at any set of them.
    slopes = [0.7, 1.1, 0.9, 1.6, 0.8]
    positions = np.linspace(0, 3, 7)
    losses = 1 + np.outer(slopes, positions)
    found = radius(positions.tolist(), losses, 2.0)
    assert found.distance == pytest.approx(1 / statistics.mean(slopes))
    without = [1 / statistics.mean(slopes[:k] + slopes[k + 1 :]) for k in range(5)]
    middle = statistics.mean(without)
    expected = math.sqrt(4 / 5 * math.fsum((r - middle) ** 2 for r in without))
    assert found.error == pytest.approx(expected)


@pytest.mark.parametrize("losses", [[[0, 1, 1], [0, 1, 9]], [[0, 1, 3], [0, 3, 9], [0, 1, 3]]])
def test_the_error_is_not_known_if_one_direction_decides_whether_it_crosses(
    losses: list[list[float]],
) -> None:
    found = radius([0, 1, 2], np.array(losses, float), 2.0)
    assert (math.isnan(found.error), found.bound) == (True, "")
    assert 1 < found.distance < 2
