"""The mean over directions, its spread, and the radius of a basin, against closed forms."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from losscli.weight_space.basin import Profile, Radius, radius

NAN, INF = math.nan, math.inf
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
    at, error, least = radius([0, 1, 2], LOSSES[:1], 1.5)
    assert (at, math.isnan(error), least) == (0.5, True, False)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_loss_that_is_not_finite_leaves_nothing_known_at_its_point(bad: float) -> None:
    losses = LOSSES.copy()
    losses[2, 1] = bad
    found = Profile.of(losses)
    assert not np.isfinite([found.mean[1], found.deviation[1]]).any()
    assert found.mean[[0, 2]].tolist() == Profile.of(LOSSES).mean[[0, 2]].tolist()


X = [-2.0, -1.0, 0.0, 1.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("losses", "threshold", "expected"),
    [
        # Linear on either side: the smaller of 1.5 and 3.
        ([5, 3, 1, 2, 3, 5], 4.0, (1.5, False)),
        ([3, 2, 1, 3, 5, 9], 4.0, (1.5, False)),
        # At a point itself, and right at the centre.
        ([5, 3, 1, 2, 3, 5], 3.0, (1.0, False)),
        ([5, 3, 1, 2, 3, 5], 1.0, (0.0, False)),
        ([5, 3, 1, 2, 3, 5], 0.5, (0.0, False)),
        # Never crossed: as far as the nearer side reaches.
        ([5, 3, 1, 2, 3, 5], 9.0, (2.0, True)),
        ([0, 0, 1, 2, 3, 5], 4.5, (2.0, True)),
        # Crossed and back again: the first crossing counts.
        ([1, 1, 1, 3, 1, 1], 2.0, (0.5, False)),
        # Nothing is known beyond a mean that is not finite.
        ([1, 1, 1, 1, NAN, 1], 2.0, (1.0, True)),
        ([1, 1, 1, 1, INF, 1], 2.0, (1.0, True)),
        ([NAN, 1, 1, 3, 3, 3], 2.0, (0.5, False)),
        ([1, NAN, 1, 1, 3, 3], 2.0, (0.0, True)),
        ([1, 1, NAN, 1, 3, 3], 2.0, (0.0, False)),
    ],
)
def test_the_radius_is_where_the_mean_crosses_the_threshold(
    losses: list[float], threshold: float, expected: tuple[float, bool]
) -> None:
    for of in ([losses], [losses, losses]):
        found = radius(X, np.array(of, float), threshold)
        assert (found.distance, found.at_least) == expected
    # The other way round it is the same.
    mirrored = radius([-x for x in X[::-1]], np.array([losses[::-1]], float), threshold)
    assert (mirrored.distance, mirrored.at_least) == expected


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


def test_the_error_is_not_known_if_one_direction_decides_whether_it_crosses() -> None:
    losses = np.array([[1.0, 1.1], [1.0, 1.2], [1.0, 9.0]])
    found = radius([0, 1], losses, 3.0)
    assert found == Radius(
        pytest.approx(2 / (11.3 / 3 - 1)), pytest.approx(NAN, nan_ok=True), False
    )
