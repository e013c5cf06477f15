"""Training paths: held against plain NumPy in float64, closed forms, and walks taken at length."""

from __future__ import annotations

import gc
import itertools
import math
import weakref
from collections import UserDict
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from losscli.errors import CheckpointError, UsageError
from losscli.weight_space import trajectory as paths
from losscli.weight_space.trajectory import Path, measure, principal_axes, random_walks, ribbon

STORAGE = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = {"w": (4, 6), "b": (5,), "s": (), "e": (0, 3)}
NAMES = list(SHAPES)


class Files:
    """Checkpoints that are opened one at a time; it counts those that are still held."""

    class _Opened(UserDict[str, Tensor]):
        __hash__ = object.__hash__

    def __init__(self, states: Sequence[dict[str, Tensor]]) -> None:
        self.states = states
        self.opened: list[int] = []
        self.most = 0
        self._held: weakref.WeakSet[Files._Opened] = weakref.WeakSet()

    def __call__(self, t: int) -> Files._Opened:
        checkpoint = Files._Opened(self.states[t])
        self.opened.append(t)
        self._held.add(checkpoint)
        self.most = max(self.most, len(self._held))
        return checkpoint


def bent(
    count: int = 7, dtype: torch.dtype = torch.float32, *, seed: int = 0
) -> list[dict[str, Tensor]]:
    """A random walk, its tensors of every kind, and one that no name asks for."""
    generator = torch.Generator().manual_seed(seed)
    state = {n: torch.randn(s, generator=generator) for n, s in SHAPES.items()}
    states = []
    for t in range(count):
        states.append({n: x.to(dtype) for n, x in state.items()})
        states[-1]["w"] = states[-1]["w"].mT.contiguous().mT
        states[-1]["count"] = torch.tensor(t)
        state = {n: x + 0.3 * torch.randn(x.shape, generator=generator) for n, x in state.items()}
    return states


def vectors(*rows: Sequence[float], dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    return [{"w": torch.tensor(row, dtype=dtype)} for row in rows]


def matrix(states: Sequence[dict[str, Tensor]], names: Sequence[str] = NAMES) -> np.ndarray:
    return np.stack([
        np.concatenate([s[n].to(torch.float64).numpy().ravel() for n in names]) for s in states
    ])


def opener(states: Sequence[dict[str, Tensor]]) -> Callable[[int], dict[str, Tensor]]:
    return states.__getitem__


def angle(u: np.ndarray, v: np.ndarray) -> float:
    u, v = u / np.linalg.norm(u), v / np.linalg.norm(v)
    return math.degrees(2 * math.atan2(np.linalg.norm(u - v), np.linalg.norm(u + v)))


def by_definition(x: np.ndarray) -> Path:
    d = x[-1] - x[0]
    p = (x - x[0]) @ d / (d @ d)
    rests = x - x[0] - p[:, None] * d
    r = np.linalg.norm(rests, axis=1)
    r[[0, -1]] = 0
    turn = [None if r[t] * r[t - 1] == 0 else angle(rests[t], rests[t - 1]) for t in range(len(x))]
    return Path(
        tuple(p.tolist()),
        tuple(r.tolist()),
        tuple(np.linalg.norm(x - x[0], axis=1).tolist()),
        tuple(turn),
        tuple(np.linalg.norm(np.diff(x, axis=0), axis=1).tolist()),
        float(np.linalg.norm(d)),
    )


def assert_same(found: Path, expected: Path, *, rel: float = 1e-12) -> None:
    for field in ("projection", "residual", "distance", "steps", "length"):
        assert getattr(found, field) == pytest.approx(getattr(expected, field), rel=rel, abs=1e-13)
    assert [x is None for x in found.turn] == [x is None for x in expected.turn]
    bends = [(x, y) for x, y in zip(found.turn, expected.turn, strict=True) if y is not None]
    assert [x for x, _ in bends] == pytest.approx([y for _, y in bends], rel=1e-9)


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("names", [NAMES, ["b"], ["s", "w"]], ids=str)
def test_the_measures_of_a_path_follow_their_definitions(
    dtype: torch.dtype, names: list[str]
) -> None:
    for seed in range(5):
        states = bent(dtype=dtype, seed=seed)
        path = measure(opener(states), len(states), names)
        assert_same(path, by_definition(matrix(states, names)))
        assert len(path.projection) == len(path.residual) == len(path.turn) == len(states)
        assert len(path.steps) == len(states) - 1
        assert path.turn[:2] == (None, None)
        assert path.turn[-1] is None


def test_pieces_of_a_large_tensor_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("losscli.weight_space.vectors._PIECE", 64)
    generator = torch.Generator().manual_seed(0)
    states = [{"w": torch.randn(2 * 64 + 7, generator=generator)} for _ in range(4)]
    path = measure(opener(states), 4, ["w"])
    assert_same(path, by_definition(matrix(states, ["w"])))
    (u, _), _ = principal_axes(opener(states), 4, ["w"])
    assert float(u["w"].double().norm()) == pytest.approx(1, rel=1e-6)
    line = ribbon(opener(states), path, 1, ["w"], 3.0) or pytest.fail("straight")
    assert float((line.b["w"] - line.a["w"]).double().norm()) == pytest.approx(3, rel=1e-6)


def test_the_ends_of_a_path_and_what_equals_them_are_exact() -> None:
    for seed in range(10):
        a, b, c, d = bent(4, seed=seed)
        copies = [{n: t.clone() for n, t in s.items()} for s in (a, d)]
        path = measure(opener([a, copies[0], b, copies[1], c, d]), 6, NAMES)
        assert [path.projection[t] for t in (0, 1, 3, 5)] == [0.0, 0.0, 1.0, 1.0]
        assert [path.residual[t] for t in (0, 1, 3, 5)] == [0.0, 0.0, 0.0, 0.0]
        assert path.residual[2] > 0
        assert path.residual[4] > 0
        assert path.distance[0] == path.distance[1] == path.steps[0] == 0
        assert path.distance[-1] == path.length
        assert path.turn == (None,) * 6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("length", [1, 0.01])
def test_on_the_line_but_for_rounding_is_on_the_line(dtype: torch.dtype, length: float) -> None:
    for seed in range(20):
        a, b = bent(2, dtype, seed=seed)
        b = {n: torch.lerp(a[n], b[n], length) for n in NAMES}
        line = [
            {n: torch.lerp(a[n], b[n], x) for n in NAMES} for x in (0, 0.1, 0.5, 1 / 3, 0.999, 1)
        ]
        path = measure(opener(line), 6, NAMES)
        assert path.residual == (0,) * 6
        assert path.turn == (None,) * 6
        assert path.projection == pytest.approx((0, 0.1, 0.5, 1 / 3, 0.999, 1), abs=1e-6 / length)
        assert ribbon(opener(line), path, 2, NAMES, 1.0) is None


@pytest.mark.parametrize(
    ("dtype", "off"),
    [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2.0**-7)],
    ids=str,
)
def test_a_single_weight_off_the_line_is_off_the_line(dtype: torch.dtype, off: float) -> None:
    # However many others are on it: in bfloat16, what is off by a unit was trained there.
    points = torch.ones(3, 1000, dtype=dtype)
    points[1, :500], points[2, :500] = 1.5, 2
    points[1, 700] += off
    path = measure(opener([{"w": x} for x in points]), 3, ["w"])
    exact = float(points[1, 700].double() - 1)
    assert path.residual[1] == pytest.approx(exact, rel=1e-3)


def test_a_slight_bend_of_all_weights_is_not_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    a, d, bend = torch.randn(3, 1000, generator=generator)
    states = [{"w": a}, {"w": a + 0.5 * d + 1e-4 * bend * d}, {"w": a + d}]
    path = measure(opener(states), 3, ["w"])
    assert_same(path, by_definition(matrix(states, ["w"])), rel=1e-9)
    assert 1e-5 < path.residual[1] / path.length < 1e-3


def test_a_residual_is_good_where_it_is_small() -> None:
    # By Pythagoras nothing would be left of it: 1e-10 squared is lost beside 1.
    path = measure(opener(vectors([0, 0, 0], [0.25, 3e-10, 4e-10], [1, 0, 0])), 3, ["w"])
    assert path.residual[1] == pytest.approx(5e-10, rel=1e-12)
    assert path.projection[1] == pytest.approx(0.25, rel=1e-15)


@pytest.mark.parametrize("degrees", [1e-3, 1.0, 45.0, 90.0, 90.000001, 135.0, 179.0, 179.999])
@pytest.mark.parametrize("size", [1.0, 1e-3])
@pytest.mark.parametrize("ratio", [1.0, 30.0, 1 / 30])
def test_turns_are_those_that_were_made(degrees: float, size: float, ratio: float) -> None:
    # Around a line that is longer than it is far off, in axes that are not the tensors' own.
    turn, radii = math.radians(degrees), (size, size * ratio)
    rows = np.array([
        [0, 0, 0, 0],
        [0.3, radii[0], 0, 0],
        [0.4, radii[1] * math.cos(turn), radii[1] * math.sin(turn), 0],
        [1, 0, 0, 0],
    ])
    rotation, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))
    path = measure(opener(vectors(*(rows @ rotation + 1).tolist())), 4, ["w"])
    # What rounding makes of the triangle's side, squared, at the most where four numbers are added:
    # 9 units of the step's square, and of the part along the line, whose two ends are known to 8
    # units of their distances from the start.
    step = math.hypot(0.1, *radii)
    square = 2.0**-53 * (9 * step**2 + 2 * 0.1 * 8 * (0.3 + 0.4 + 2 * max(radii)))
    # A radian is 2 r s sin φ of that square, and near 0 and 180 degrees it is off by r s φ².
    unit = square / (radii[0] * radii[1])
    tolerance = math.degrees(min(unit / (2 * math.sin(turn)), math.sqrt(unit)))
    assert tolerance < 0.02
    assert path.turn[2] == pytest.approx(degrees, abs=tolerance)


def test_residuals_that_are_parallel_or_opposite_turn_by_nothing_or_half_a_circle() -> None:
    rows = [[0, 0, 0], [0.2, 1, 2], [0.5, 2, 4], [0.6, -1, -2], [0.8, -1, -2], [1, 0, 0]]
    path = measure(opener(vectors(*rows)), 6, ["w"])
    assert path.turn[2:5] == pytest.approx((0, 180, 0), abs=3e-6)


def test_a_path_is_the_same_scaled_moved_and_with_its_weights_in_another_order() -> None:
    states = bent()
    path = measure(opener(states), len(states), NAMES)
    shuffled = measure(opener(states), len(states), NAMES[::-1])
    assert_same(shuffled, path)
    doubled = [{n: s[n] * 2 for n in NAMES} for s in states]
    twice = measure(opener(doubled), len(states), NAMES)
    assert twice.projection == path.projection
    assert twice.turn == path.turn
    assert twice.residual == tuple(2 * r for r in path.residual)
    # Backwards, p becomes 1 − p, and the residuals are the same.
    back = measure(opener(states[::-1]), len(states), NAMES)
    assert back.projection[::-1] == pytest.approx([1 - p for p in path.projection], abs=1e-14)
    assert back.residual[::-1] == pytest.approx(path.residual)


def test_no_more_than_three_checkpoints_are_held_at_a_time() -> None:
    states = bent(9)
    states[4] = states[0]
    gc.disable()
    try:
        files = Files(states)
        path = measure(files, 9, NAMES)
        assert files.most == 3
        assert sorted(files.opened) == sorted([*range(9)] * 2)
        for t in range(9):
            files = Files(states)
            ribbon(files, path, t, NAMES, 1.0)
            assert files.most == 3
            assert len(files.opened) <= 4
        files = Files(states)
        principal_axes(files, 9, NAMES)
        assert files.most == 1
    finally:
        gc.enable()


@pytest.mark.parametrize("task", [measure, principal_axes])
def test_checkpoints_that_do_not_make_a_path_are_a_usage_error(task: Callable[..., object]) -> None:
    states = bent(4)
    for count in range(3):
        with pytest.raises(
            UsageError, match=f"{count} checkpoints has no checkpoint between.*Give thr"
        ):
            task(opener(states), count, NAMES)


def test_a_path_that_ends_where_it_began_has_no_line() -> None:
    a, b, _ = bent(3)
    with pytest.raises(
        UsageError,
        match="the first and the last checkpoint have the same parameters: there is no straight",
    ) as caught:
        measure(opener([a, b, a]), 3, NAMES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("task", [measure, principal_axes])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("t", range(4))
def test_a_checkpoint_that_is_not_finite_is_named(
    task: Callable[..., object], bad: float, t: int
) -> None:
    states = bent(4)
    states[t]["b"][2] = bad
    with pytest.raises(CheckpointError, match=f"^checkpoint {t} of the path, counted from 0"):
        task(opener(states), 4, NAMES)
    task(opener(states), 4, ["w"])


@pytest.mark.parametrize("least", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_a_ribbon_runs_from_the_foot_past_the_checkpoint(
    dtype: torch.dtype, least: torch.dtype
) -> None:
    states = bent(dtype=dtype)
    path = measure(opener(states), len(states), NAMES)
    x = matrix(states)
    working = torch.promote_types(dtype, least)
    eps = torch.finfo(working).eps
    # Rounded to float32, the ends are the oracle's but for that; in float64 the oracle rounds too.
    slack = eps if working == torch.float32 else 8 * eps
    for t in range(1, len(states) - 1):
        for share in (0.5, 1.0, 1.25, 1e6):
            reach = share * path.residual[t]
            line = ribbon(opener(states), path, t, NAMES, reach, least) or pytest.fail("straight")
            assert all(e[n].dtype == working for e in line.ends for n in NAMES)
            assert all(e[n].shape == states[t][n].shape for e in line.ends for n in NAMES)
            assert list(line.a) == list(line.b) == NAMES
            foot = x[0] + path.projection[t] * (x[-1] - x[0])
            np.testing.assert_allclose(matrix([line.a])[0], foot, rtol=eps, atol=slack)
            end = foot + share * (x[t] - foot)
            np.testing.assert_allclose(matrix([line.b])[0], end, rtol=eps, atol=share * slack)


def test_a_ribbon_that_ends_at_the_checkpoint_ends_there_to_the_last_bit() -> None:
    states = bent()
    path = measure(opener(states), len(states), NAMES)
    for t in range(1, len(states) - 1):
        reach = path.residual[t]
        line = ribbon(opener(states), path, t, NAMES, reach) or pytest.fail("straight")
        assert all(torch.equal(line.b[n], states[t][n]) for n in NAMES)


def test_the_foot_is_rounded_once() -> None:
    states = bent()
    path = measure(opener(states), len(states), NAMES)
    x = matrix(states)
    for t in (1, 3, 5):
        line = ribbon(opener(states), path, t, NAMES, 1.0) or pytest.fail("straight")
        foot = x[0] + path.projection[t] * (x[-1] - x[0])
        np.testing.assert_array_equal(matrix([line.a])[0], foot.astype(np.float32))


def test_where_a_step_has_no_residual_the_nearest_one_stands_in() -> None:
    a, b, c, d = bent(4, torch.float64)
    middle = {n: (a[n] + d[n]) / 2 for n in NAMES}
    #          0  1  2  3  4       5  6
    states = [a, a, b, a, middle, c, d]
    path = measure(opener(states), 7, NAMES)
    assert [t for t in range(7) if path.residual[t] > 0] == [2, 5]
    x = matrix(states)

    def step_at(states: list[dict[str, Tensor]], path: Path, t: int) -> np.ndarray:
        line = ribbon(opener(states), path, t, NAMES, 2.0) or pytest.fail("straight")
        assert all(torch.equal(line.a[n], states[t][n]) for n in NAMES)
        return matrix([line.b])[0] - matrix([line.a])[0]

    for t, source in [(0, 2), (1, 2), (3, 2), (4, 5), (6, 5)]:
        rest = x[source] - x[0] - path.projection[source] * (x[-1] - x[0])
        expected = 2 * rest / np.linalg.norm(rest)
        np.testing.assert_allclose(step_at(states, path, t), expected, atol=1e-13)
    # Of two that are as near, the earlier.
    tie = [a, b, middle, c, d]
    path, x = measure(opener(tie), 5, NAMES), matrix(tie)
    rest = x[1] - x[0] - path.projection[1] * (x[-1] - x[0])
    expected = 2 * rest / np.linalg.norm(rest)
    np.testing.assert_allclose(step_at(tie, path, 2), expected, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_stand_in_of_half_precision_is_made_in_float32(dtype: torch.dtype) -> None:
    states = bent(4, dtype)
    path = measure(opener(states), 4, NAMES)
    line = ribbon(opener(states), path, 0, NAMES, 0.5) or pytest.fail("straight")
    assert all(e[n].dtype == torch.float32 for e in line.ends for n in NAMES)
    assert np.linalg.norm(matrix([line.b]) - matrix([line.a])) == pytest.approx(0.5, rel=1e-6)


# -- random walks -----------------------------------------------------------------------------


def simulate(steps: Sequence[float], dimension: int, seed: int) -> Path | None:
    """A walk taken in R^D; None where it comes back."""
    draws = np.random.default_rng(seed).standard_normal((len(steps), dimension))
    draws *= np.asarray(steps)[:, None] / np.linalg.norm(draws, axis=1, keepdims=True)
    places = np.vstack([np.zeros((1, dimension)), np.cumsum(draws, axis=0)])
    return by_definition(places) if np.linalg.norm(places[-1]) > 1e-9 else None


STEPS = [1.0, 0.5, 2.0, 1.5, 0.25, 1.0]


@pytest.mark.parametrize(
    "dimension", [1, 2, 6, *(pytest.param(n, marks=pytest.mark.stress) for n in (3, 5, 7, 40))]
)
def test_random_walks_are_those_taken_in_all_dimensions(dimension: int) -> None:
    number = 1500
    drawn = random_walks(STEPS, dimension, number, 0)
    taken = [w for s in range(number) if (w := simulate(STEPS, dimension, s)) is not None]

    def sample(walks: Sequence[Path]) -> np.ndarray:
        turns = [[w.turn[t] or 0.0 for t in (2, 3, 4, 5)] for w in walks]
        places = [
            [*w.projection[1:-1], *w.residual[1:-1], *w.distance[1:], w.length**2] for w in walks
        ]
        if dimension == 1:
            # On a line residuals are rounding, and so are the turns between them.
            return np.array(places)[:, [0, 1, 2, 3, 4, *range(10, 17)]]
        return np.hstack([np.array(places), np.array(turns)])

    def spread(values: np.ndarray) -> np.ndarray:
        # Ranks do not mind the few walks that nearly come back, where p is huge.
        both = np.concatenate([values, others])
        return both.argsort(axis=0).argsort(axis=0)[: len(values)] / len(both)

    values, others = sample(drawn), sample(taken)
    # The mean rank of two samples of one distribution differs by chance, of 1 / √(12 n) each.
    # (Mann & Whitney 1947.) What is the same in all walks, such as the first step, is left out.
    moving = np.ptp(others, axis=0) > 1e-9
    values, others = values[:, moving], others[:, moving]
    assert moving.sum() >= 5
    if dimension == 1:
        # Few values there are, and many ties: means and variances do.
        for moment in (1, 2):
            a, b = values**moment, others**moment
            error = np.sqrt(a.var(axis=0) / len(a) + b.var(axis=0) / len(b))
            assert np.all(np.abs(a.mean(axis=0) - b.mean(axis=0)) <= 4.5 * error)
        return
    first = spread(values)
    error = math.sqrt(1 / 12 * (1 / len(values) + 1 / len(others)))
    assert np.all(np.abs(first.mean(axis=0) - 0.5) <= 4.5 * error)
    # Nor do the spreads differ.
    assert np.all(np.abs(((first - 0.5) ** 2).mean(axis=0) - 1 / 12) <= 4.5 * error)


def test_the_projection_of_a_walk_is_on_average_its_share_of_the_squares() -> None:
    # By symmetry E⟨x_t, d⟩ = Σ_{i≤t} s_i², and in many dimensions ‖d‖² is nearly its mean.
    dimension = 1_000_000
    squares = np.square(STEPS)
    shares = np.concatenate([[0], np.cumsum(squares) / squares.sum()])
    for walk in random_walks(STEPS, dimension, 20, 1):
        assert walk.projection == pytest.approx(shares, abs=6 / math.sqrt(dimension))
        expected = np.sqrt(squares.sum() * shares * (1 - shares))
        assert walk.residual == pytest.approx(expected, abs=6 * 2 / math.sqrt(dimension))
        assert walk.length == pytest.approx(math.sqrt(squares.sum()), rel=6 / math.sqrt(dimension))


def test_inner_products_of_walks_have_the_moments_of_a_wishart_matrix() -> None:
    n, number = 4, 5_000
    generator = np.random.default_rng(0)
    for dimension in (1, 2, 4, 9):
        grams = np.array([
            (v := paths._bartlett(n, dimension, generator)) @ v.T for _ in range(number)
        ])
        # E W = D I; Var W_ij = D (1 + [i = j]).
        variance = dimension * (1 + np.eye(n))
        error = 5 * np.sqrt(variance / number)
        assert np.all(np.abs(grams.mean(axis=0) - dimension * np.eye(n)) <= error)
        np.testing.assert_allclose(grams.var(axis=0), variance, rtol=0.25)


def test_a_walk_is_consistent_with_itself() -> None:
    for dimension in (2, 4, 1000):
        for walk in random_walks(STEPS, dimension, 5, 2):
            assert walk.steps == tuple(STEPS)
            assert walk.projection[0] == walk.residual[0] == walk.distance[0] == 0
            assert walk.projection[-1] == 1
            assert walk.residual[-1] == 0
            assert walk.distance[-1] == pytest.approx(walk.length, rel=1e-15)
            assert walk.distance[1] == pytest.approx(STEPS[0], rel=1e-14)
            places = np.array(walk.projection) * walk.length
            np.testing.assert_allclose(np.hypot(places, walk.residual), walk.distance, rtol=1e-12)
            assert [x is None for x in walk.turn] == [True, True, *[False] * 4, True]


def test_a_walk_on_a_line_has_no_residual() -> None:
    for walk in random_walks([0.1] * 6, 1, 50, 0):
        assert walk.residual == (0,) * 7
        assert walk.turn == (None,) * 7
        # It may come back to its beginning, but never ends there.
        assert walk.length >= 0.19


def test_a_seed_gives_the_same_walks_and_more_of_them_begin_with_the_same() -> None:
    three, five = (random_walks(STEPS, 50, number, 4) for number in (3, 5))
    assert five[:3] == three
    assert len(five) == 5
    assert len({walk.length for walk in five}) == 5
    assert random_walks(STEPS, 50, 3, 5) != three
    assert random_walks(STEPS, 50, 0, 4) == []


def test_a_step_of_no_length_stays_where_it_is() -> None:
    (walk,) = random_walks([1.0, 0.0, 1.0], 10, 1, 0)
    assert walk.projection[1] == walk.projection[2]
    assert walk.turn[2] == 0


@pytest.mark.parametrize(
    ("steps", "dimension", "message"),
    [
        ([1.0], 5, "a path of 2 checkpoints has no checkpoint between its ends"),
        ([0.0, 0.0], 5, "a random walk of length 0 in 5 dimensions does not move"),
        ([1.0, 1.0], 0, "a random walk of length 2 in 0 dimensions does not move"),
        ([1.0, math.nan], 5, "does not move"),
        ([1.0, math.inf], 5, "does not move"),
    ],
)
def test_a_walk_that_goes_nowhere_is_a_usage_error(
    steps: list[float], dimension: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        random_walks(steps, dimension, 1, 0)


# -- principal axes ---------------------------------------------------------------------------


def components(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Principal components by a singular value decomposition, signed as they are promised to be."""
    _, values, axes = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    seen = (x - x[-1]) @ axes[:2].T
    signs = np.sign([seen[0, 0], seen[np.abs(seen[:, 1]).argmax(), 1]])
    return axes[:2] * signs[:, None], values[:2] ** 2 / np.sum(values**2)


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("names", [NAMES, ["w"], ["s", "b"]], ids=str)
def test_principal_axes_are_those_of_numpy(dtype: torch.dtype, names: list[str]) -> None:
    states = bent(9, dtype)
    axes, shares = principal_axes(opener(states), 9, names)
    expected, ratios = components(matrix(states, names))
    working = torch.promote_types(dtype, torch.float32)
    found = matrix(axes, names)
    eps = float(torch.finfo(working).eps)
    np.testing.assert_allclose(found, expected, atol=max(4 * eps, 1e-13))
    np.testing.assert_allclose(found @ found.T, np.eye(2), atol=4 * eps)
    assert shares[:2] == pytest.approx(ratios, rel=1e-12)
    assert len(shares) == 9
    assert list(shares) == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1)
    for axis in axes:
        assert list(axis) == names
        assert all(axis[n].shape == SHAPES[n] and axis[n].dtype == working for n in names)


def test_axes_in_float64_are_exact_for_weights_of_every_type() -> None:
    for dtype in STORAGE:
        states = bent(9, dtype)
        axes, _ = principal_axes(opener(states), 9, NAMES, (), torch.float64)
        expected, _ = components(matrix(states, NAMES))
        np.testing.assert_allclose(matrix(axes, NAMES), expected, atol=1e-13)
        assert all(tensor.dtype == torch.float64 for axis in axes for tensor in axis.values())


def test_what_does_not_count_follows_the_combination_of_what_does() -> None:
    states = bent(9, torch.float64)
    axes, shares = principal_axes(opener(states), 9, ["w"], ["s", "b"])
    alone, ratios = principal_axes(opener(states), 9, ["w"])
    assert shares == ratios
    rows = matrix(states, ["w"]) - matrix(states, ["w"])[-1]
    along = matrix(states, ["s", "b"]) - matrix(states, ["s", "b"])[-1]
    left, singular, right = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    for k in range(2):
        assert torch.equal(axes[k]["w"], alone[k]["w"])
        sign = np.sign(right[k] @ matrix([axes[k]], ["w"])[0])
        mixed = sign * (left[:, k] / singular[k]) @ along
        np.testing.assert_allclose(matrix([axes[k]], ["s", "b"])[0], mixed, atol=1e-12)


@pytest.mark.parametrize("width", [1, 3, 5, 24, 29, 1000])
def test_the_size_of_a_block_plays_no_part(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    states = bent(9, torch.float64)
    whole, shares = principal_axes(opener(states), 9, NAMES)
    monkeypatch.setattr(paths, "_BLOCK_BYTES", 8 * 9 * width)
    files = Files(states)
    parts, ratios = principal_axes(files, 9, NAMES)
    np.testing.assert_allclose(matrix(parts), matrix(whole), atol=1e-13)
    assert ratios == pytest.approx(shares, rel=1e-12, abs=1e-14)
    # 30 weights in blocks that reach across tensors; twice, and once for their shapes.
    assert len(files.opened) == 2 * 9 * math.ceil(30 / width) + 1


def test_a_far_origin_takes_nothing_from_the_axes() -> None:
    # Whole numbers, so that the checkpoints themselves are exact wherever they are.
    x = np.random.default_rng(0).integers(-8, 8, (6, 30)) * 2.0**-10
    near, far = (principal_axes(opener(vectors(*(x + c).tolist())), 6, ["w"]) for c in (0, 2.0**30))
    np.testing.assert_allclose(matrix(near[0], ["w"]), matrix(far[0], ["w"]), atol=1e-13)
    assert near[1] == pytest.approx(far[1], rel=1e-13)


def test_a_second_axis_of_little_variance_is_as_long_and_as_orthogonal() -> None:
    generator = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(generator.standard_normal((20, 20)))
    x = np.zeros((5, 20))
    x[:, 0], x[:, 1] = [-2, -1, 0, 1, 2], np.array([1, -1, 0, -1, 1]) * 1e-5
    axes, shares = principal_axes(opener(vectors(*(x @ rotation).tolist())), 5, ["w"])
    found = matrix(axes, ["w"])
    np.testing.assert_allclose(found @ found.T, np.eye(2), atol=1e-9)
    np.testing.assert_allclose(np.abs(found @ rotation[:2].T), np.eye(2), atol=1e-6)
    assert shares[:2] == pytest.approx((1, 4e-11), rel=1e-3)


def test_the_axes_point_the_same_way_every_time() -> None:
    # The path begins at the positive side of its end, and bulges to the positive side.
    rows = [[3, 0], [2, 1], [1, 1], [0, 0]]
    for flip in ([1, 1], [-1, 1], [1, -1], [-1, -1]):
        states = vectors(*(np.array(rows) * flip).tolist())
        (u, v), _ = principal_axes(opener(states), 4, ["w"])
        seen = (matrix(states, ["w"]) - states[-1]["w"].numpy()) @ matrix([u, v], ["w"]).T
        assert seen[0, 0] > 0
        assert seen[np.abs(seen[:, 1]).argmax(), 1] > 0
    # The beginning tells, though another step is farther off on the other side.
    for sign in (1, -1):
        states = vectors([sign * 0.5, 0.1], [-sign * 3, 1], [-sign, -0.5], [0, 0])
        (u, _), _ = principal_axes(opener(states), 4, ["w"])
        assert float(u["w"] @ states[0]["w"]) > 0
    # Where it ends as it began, along the first axis too the farthest step tells.
    for sign in (1, -1):
        states = vectors([0, 0], [sign * 3, 1], [sign * 2, -1], [0, 0])
        (u, _), _ = principal_axes(opener(states), 4, ["w"])
        assert float(u["w"] @ states[1]["w"]) > 0


def test_checkpoints_without_a_plane_are_a_usage_error() -> None:
    a, b = bent(2)
    told = "all checkpoints have the same parameters: they have no principal axes"
    with pytest.raises(UsageError, match=told):
        principal_axes(opener([a, a, a, a]), 4, NAMES)
    for dtype, length in itertools.product((torch.float64, torch.float32), (1, 0.01)):
        near, far = ({n: s[n].to(dtype) for n in NAMES} for s in (a, b))
        line = [
            {n: torch.lerp(near[n], far[n], x * length) for n in NAMES} for x in (0, 0.1, 0.7, 1)
        ]
        with pytest.raises(UsageError, match=r"on one line: they have no second.*Give") as caught:
            principal_axes(opener(line), 4, NAMES)
        assert "\n" not in str(caught.value)
    # Equal checkpoints among others are no trouble.
    c = bent(3)[2]
    axes, _ = principal_axes(opener([a, a, b, c, c]), 5, NAMES)
    assert np.isfinite(matrix(axes)).all()
