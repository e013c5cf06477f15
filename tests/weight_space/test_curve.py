"""What is said of a curve: against brute force, and on curves whose answer is plain."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from losscli.weight_space.curve import describe, lowest, near_rounding, standard_error
from tests import oracle


def flat(values: list[float], n: int = 5) -> np.ndarray:
    """Losses of n examples that all have the same value at each point."""
    return np.repeat(np.array(values, dtype=np.float64)[:, None], n, axis=1)


def told(alphas: list[float], values: list[float]) -> dict:
    losses = flat(values)
    return describe(alphas, losses, losses[alphas.index(0.0)], losses[alphas.index(1.0)])


def test_standard_error_is_that_of_the_mean() -> None:
    values = np.random.default_rng(0).normal(size=50).astype(np.float32)
    assert standard_error(values) == pytest.approx(oracle.standard_error(values.tolist()), rel=1e-9)
    assert math.isnan(standard_error(values[:1]))


def test_a_falling_curve_is_monotonic_and_has_no_barrier_above_its_chord() -> None:
    found = told([0.0, 0.5, 1.0], [4.0, 1.0, 0.0])
    assert found["monotonic"] is True
    assert found["largest_rise"] == {
        "height": 0.0, "stderr": 0.0, "alpha_from": None, "alpha_to": None,
    }  # fmt: skip
    assert found["barrier"] == {"height": 0.0, "stderr": 0.0, "alpha": 0.0}
    assert found["minimum"]["alpha"] == 1.0
    assert found["minimum"]["below_b"] == 0.0
    assert found["local_minima"] == []


def test_the_barrier_is_above_the_chord_and_the_rise_is_not() -> None:
    found = told([0.0, 0.5, 1.0], [4.0, 3.0, 0.0])
    assert found["barrier"]["height"] == pytest.approx(1.0)
    assert found["barrier"]["alpha"] == 0.5
    assert found["monotonic"] is True


def test_rises_are_searched_only_between_the_ends() -> None:
    found = told([-1.0, 0.0, 0.5, 1.0, 2.0], [-9.0, 2.0, 1.5, 1.75, 99.0])
    assert found["largest_rise"]["height"] == 0.25
    assert (found["largest_rise"]["alpha_from"], found["largest_rise"]["alpha_to"]) == (0.5, 1.0)
    assert found["minimum"] == {
        "alpha": -1.0, "loss": -9.0, "ties": 1, "below_b": 10.75, "below_b_stderr": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("losses", "alpha", "ties"),
    [([3.0, 1.0, 0.0, 2.0], 1.0, 1), ([3.0, 0.0, 0.0, 0.0], 0.5, 3), ([0.0] * 4, 0.0, 4)],
)
def test_points_that_share_the_lowest_loss_are_counted(
    losses: list[float], alpha: float, ties: int
) -> None:
    found = told([0.0, 0.5, 1.0, 2.0], losses)["minimum"]
    assert (found["alpha"], found["loss"], found["ties"]) == (alpha, 0.0, ties)


def test_the_lowest_of_no_finite_losses_is_none() -> None:
    assert lowest([math.nan, math.inf]) == []
    assert lowest([math.nan, 2.0, 1.0, math.inf, 1.0]) == [2, 4]


def test_the_ends_count_where_the_range_leaves_them_out() -> None:
    a, middle, b = flat([1.0, 5.0, 2.0])
    found = describe([0.4], middle[None], a, b)
    assert found["barrier"]["height"] == pytest.approx(5 - 1.4)
    assert found["largest_rise"]["height"] == 4.0
    assert found["minimum"]["alpha"] == 0.4


def test_the_depth_of_a_local_minimum_is_the_climb_to_something_lower() -> None:
    alphas = [float(x) for x in range(9)]
    found = told(alphas, [5.0, 1.0, 4.0, 2.0, 3.0, 0.0, 9.0, 8.0, 10.0])
    assert [(m["alpha"], m["depth"]) for m in found["local_minima"]] == [
        (1.0, 3.0), (3.0, 1.0), (5.0, 5.0), (7.0, 1.0),
    ]  # fmt: skip


def test_a_flat_bottom_counts_once() -> None:
    found = told([0.0, 0.5, 1.0, 1.5, 2.0], [2.0, 1.0, 1.0, 1.0, 3.0])
    assert [(m["alpha"], m["depth"]) for m in found["local_minima"]] == [(0.5, 1.0)]


def test_a_shelf_is_not_a_minimum() -> None:
    assert told([0.0, 0.5, 1.0, 2.0], [3.0, 2.0, 2.0, 1.0])["local_minima"] == []


def test_points_that_are_not_finite_are_left_out_counted_and_end_the_curve() -> None:
    found = told([-1.0, 0.0, 0.5, 1.0, 2.0, 3.0], [math.nan, 3.0, math.inf, 1.0, 2.0, 0.5])
    assert found["not_finite"] == 2
    assert found["monotonic"] is None
    assert found["minimum"]["alpha"] == 3.0
    assert found["barrier"]["height"] == 0.0
    assert found["local_minima"] == []


def test_an_end_that_is_not_finite_leaves_the_barrier_undefined() -> None:
    found = told([0.0, 0.5, 1.0], [math.nan, 1.0, 2.0])
    assert found["barrier"] is None
    assert math.isnan(found["loss_a"])
    assert found["minimum"]["below_b"] == 1.0


def test_nothing_finite_at_all() -> None:
    found = told([0.0, 1.0], [math.nan, math.inf])
    assert found["minimum"] is None
    assert found["not_finite"] == 2


@settings(max_examples=200)
@given(st.integers(0, 10_000))
def test_barrier_rise_and_their_paired_errors_agree_with_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    alphas = [0.0, 0.25, 0.5, 0.75, 1.0]
    losses = rng.normal(size=(5, 7))
    found = describe(alphas, losses, losses[0], losses[-1])
    means = [oracle.mean(row.tolist()) for row in losses]
    excess = {
        i: means[i] - ((1 - x) * means[0] + x * means[-1])
        for i, x in enumerate(alphas)
        if 0 < x < 1
    }
    top = max(excess, key=lambda i: excess[i])
    assert found["barrier"]["height"] == pytest.approx(max(0.0, excess[top]))
    if excess[top] > 0:
        x = alphas[top]
        paired = losses[top] - (1 - x) * losses[0] - x * losses[-1]
        assert found["barrier"]["alpha"] == x
        assert found["barrier"]["stderr"] == pytest.approx(oracle.standard_error(paired.tolist()))
    rises = {(i, j): means[j] - means[i] for i in range(5) for j in range(i + 1, 5)}
    i, j = max(rises, key=lambda pair: rises[pair])
    assert found["largest_rise"]["height"] == pytest.approx(max(0.0, rises[i, j]))
    assert found["monotonic"] == (rises[i, j] <= 0)
    if rises[i, j] > 0:
        assert found["largest_rise"]["alpha_from"] == alphas[i]
        assert found["largest_rise"]["alpha_to"] == alphas[j]
        expected = oracle.standard_error((losses[j] - losses[i]).tolist())
        assert found["largest_rise"]["stderr"] == pytest.approx(expected)


def test_no_claim_is_made_about_a_range_that_was_not_evaluated() -> None:
    a, b, far = flat([2.0, 1.0, 3.0])
    found = describe([1.5], far[None], a, b)
    assert found["barrier"] is None
    assert found["largest_rise"] is None
    assert found["monotonic"] is None


def test_a_part_of_the_line_may_show_a_rise_but_not_that_there_is_none() -> None:
    a, b, middle = flat([2.0, 1.0, 1.5])
    assert describe([0.5], middle[None], a, b)["monotonic"] is None
    a, b, middle = flat([2.0, 1.0, 2.5])
    assert describe([0.5], middle[None], a, b)["monotonic"] is False


def test_maxima_are_the_minima_of_the_mirrored_curve() -> None:
    rng = np.random.default_rng(3)
    alphas = np.linspace(0, 1, 60).tolist()
    losses = rng.normal(size=(60, 6))
    up, down = (
        describe(alphas, sign * losses, sign * losses[0], sign * losses[-1]) for sign in (1, -1)
    )
    assert len(up["local_maxima"]) > 10
    for one, other in zip(up["local_maxima"], down["local_minima"], strict=True):
        assert one == {
            "alpha": other["alpha"],
            "loss": -other["loss"],
            "height": other["depth"],
            "height_stderr": other["depth_stderr"],
            "beyond_noise": other["beyond_noise"],
        }


def test_the_height_of_a_maximum_is_the_drop_to_something_higher() -> None:
    found = told([float(x) for x in range(7)], [0.0, 5.0, 1.0, 4.0, 3.0, 9.0, 2.0])
    assert [(m["alpha"], m["height"]) for m in found["local_maxima"]] == [
        (1.0, 4.0), (3.0, 1.0), (5.0, 7.0),
    ]  # fmt: skip


@settings(max_examples=200)
@given(st.lists(st.integers(0, 4), min_size=3, max_size=14))
def test_depths_are_the_prominences_of_scipy(values: list[int]) -> None:
    from scipy.signal import find_peaks, peak_prominences

    alphas = [float(x) for x in range(len(values))]
    losses = flat([float(v) for v in values], 2)
    found = describe(alphas, losses, losses[0], losses[-1])["local_minima"]
    mirrored = -np.array(values, dtype=np.float64)
    bottoms = find_peaks(mirrored, plateau_size=1)[1]["left_edges"]
    depths = peak_prominences(mirrored, bottoms)[0]
    assert [(m["alpha"], m["depth"]) for m in found] == list(zip(bottoms, depths, strict=True))


def test_an_extremum_is_beyond_noise_by_its_paired_error() -> None:
    base = np.arange(8.0) * 100
    spread = np.array([1.0, -1.0] * 4)
    steady = np.stack([base + 1, base, base + 1])
    found = describe([0.0, 0.5, 1.0], steady, steady[0], steady[2])["local_minima"]
    assert [m["beyond_noise"] for m in found] == [True]
    for size, beyond in ((1.0, True), (2.0, False)):
        noisy = np.stack([base + 1, base + size * spread, base + 1])
        (only,) = describe([0.0, 0.5, 1.0], noisy, noisy[0], noisy[2])["local_minima"]
        assert only["depth_stderr"] == pytest.approx(size * math.sqrt(8 / 7 / 8))
        assert only["beyond_noise"] is beyond


def test_a_single_example_tells_nothing_of_noise() -> None:
    losses = flat([2.0, 1.0, 2.0], 1)
    (only,) = describe([0.0, 0.5, 1.0], losses, losses[0], losses[2])["local_minima"]
    assert only["beyond_noise"] is False
    assert math.isnan(only["depth_stderr"])


def test_rounding_is_suspected_where_a_depth_is_small_for_the_type() -> None:
    alphas = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25]
    losses = [3.0, 1.0, 1.0 + 1e-6, 1.0 - 1e-9, 2.0, 1.0]
    assert near_rounding(alphas, losses, "float64") == []
    # The deeper minimum at 0.75 is sure; that at 0.25 and the maximum between them are not.
    assert near_rounding(alphas, losses, "float32") == [0.0, 0.25, 0.5, 0.75]
    assert near_rounding(alphas, [100 * x for x in losses], "float32") == [0.0, 0.25, 0.5, 0.75]
    assert near_rounding([0.0, 0.5, 1.0], [1.0, 0.95, 1.0], "float32") == []
    assert near_rounding([0.0, 0.5, 1.0], [1.0, 0.95, 1.0], "bfloat16") == [0.0, 0.5, 1.0]
    assert near_rounding([0.0, 0.5, 1.0], [1.0, math.nan, 1.0], "bfloat16") == []


def test_a_long_curve_of_many_extrema_is_described_in_linear_time() -> None:
    # Each minimum is lower than the last: a search from each for its rim would walk 10⁸ steps.
    values = np.repeat(-np.arange(10_000.0), 2) + np.tile([0.0, 0.7], 10_000)
    alphas = np.linspace(0, 1, len(values)).tolist()
    found = near_rounding(alphas, values.tolist(), "float64")
    assert found == []
    losses = values[:, None].astype(np.float32)
    told = describe(alphas, losses, losses[0], losses[-1])
    assert len(told["local_minima"]) == 9_999
