"""The search for the critical step, on functions with known roots."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest

from losscli.evaluation.critical_step import MAX_SCANNED, find_crossing


class Rises:
    """A rise of the loss with rounding of either sign; counts its evaluations."""

    def __init__(self, rise: Callable[[float], float], noise: float = 0.0) -> None:
        self.rise, self.noise, self.calls = rise, noise, 0

    def __call__(self, distances: Sequence[float]) -> list[float]:
        self.calls += len(distances)
        return [self.rise(t) + self.noise * math.sin(1e9 * t) for t in distances]


@pytest.mark.parametrize("root", [1e-9, 3e-5, 0.1, 0.7, 15.0])
@pytest.mark.parametrize("power", [1, 2, 4])
def test_the_crossing_is_the_first_one_beyond_rounding(root: float, power: int) -> None:
    noise = 1e-9 * root
    rises = Rises(lambda t: t * ((t / root) ** power - 1), noise)
    found = find_crossing(rises, 1.0, 2 * noise)
    assert found.reason == ""
    assert abs(found.distance - root) <= found.error <= 1e-4 * root


def test_of_several_crossings_the_first_is_found() -> None:
    found = find_crossing(Rises(lambda t: -t * (0.1 - t) * (0.5 - t) * (3 - t)), 1.0, 1e-12)
    assert found.distance == pytest.approx(0.1, rel=1e-5)


def test_a_search_ends_soon_and_says_why_there_is_no_crossing() -> None:
    quadratic = Rises(lambda t: t**2 - t / 64)
    assert find_crossing(quadratic, 1.0, 1e-12).distance == pytest.approx(1 / 64)
    assert quadratic.calls <= MAX_SCANNED
    for rise, reason in [
        (lambda t: -t, "no crossing"),
        (lambda t: 1e-9 * (t**2 - t), "rounding"),
        (lambda t: math.nan if t > 0.1 else -t, "not finite"),
        (lambda t: math.inf if t > 0.1 else -t, "not finite"),
        (lambda t: math.nan if 0.2 < t < 0.21 else t**2 - 0.2 * t - 0.002, "not finite"),
        (lambda t: t + 1e-3, "rounding"),
        (lambda t: t**2 - 1e-9 * t, "rounding"),
    ]:
        assert find_crossing(Rises(rise), 1.0, 1e-6).reason == reason
