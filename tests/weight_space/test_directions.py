"""Random directions: held against a plain loop over the filters, in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from losscli.errors import UsageError
from losscli.weight_space import directions
from losscli.weight_space.directions import (
    gaussian_direction,
    has_filters,
    random_direction,
    random_directions,
)
from losscli.weight_space.vectors import norm

STORAGE = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = {
    "conv": (5, 3, 2, 2),
    "linear": (4, 7),
    "pairs": (50, 2),
    "column": (6, 1),
    "one": (1, 1),
    "row": (1, 9),
    "bias": (4,),
    "scalar": (),
    "norm": (3, 3),
    "empty": (0, 3),
    "narrow": (3, 0),
}
NAMES = list(SHAPES)
STILL = {"norm"}


def weights(dtype: torch.dtype = torch.float32, *, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * 3).to(dtype)
        for name, shape in SHAPES.items()
    }


def wide(tensor: Tensor) -> np.ndarray:
    return tensor.to(torch.float64).numpy()


def filters(tensor: Tensor) -> list[np.ndarray]:
    """The filters of a tensor as vectors, by the definition."""
    array = wide(tensor)
    rows = [array[i].ravel() for i in range(array.shape[0])]
    return [np.concatenate(rows)] if rows and rows[0].size == 1 else rows


def moving(point: Mapping[str, Tensor]) -> list[str]:
    return [n for n in point if SHAPES[n] and len(SHAPES[n]) > 1 and n not in STILL]


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_each_filter_of_both_directions_is_as_long_as_that_of_the_weights(
    dtype: torch.dtype,
) -> None:
    point = weights(dtype)
    first, second = random_directions(point, NAMES, STILL, 0)
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for name in moving(point):
        for u, v, w in zip(*map(filters, (first[name], second[name], point[name])), strict=True):
            length = np.linalg.norm(w)
            assert np.linalg.norm(u) == pytest.approx(length, rel=4 * eps)
            assert np.linalg.norm(v) == pytest.approx(length if w.size > 1 else 0, rel=4 * eps)
            assert abs(u @ v) <= 4 * eps * length**2


def test_the_directions_are_those_of_a_plain_loop_over_the_filters() -> None:
    point = weights()
    first, second = random_directions(point, NAMES, STILL, 7)
    for name in moving(point):
        generator = directions._generator(name, 7)
        draws = [torch.randn(SHAPES[name], generator=generator) for _ in range(2)]
        found = zip(*map(filters, (first[name], second[name])), strict=True)
        given = zip(*map(filters, (*draws, point[name])), strict=True)
        for (u, v), (x, y, w) in zip(found, given, strict=True):
            length = np.linalg.norm(w)
            np.testing.assert_allclose(u, x / np.linalg.norm(x) * length, rtol=1e-6)
            if w.size > 1:
                # By QR, and not by Gram–Schmidt; it leaves the sign open.
                q, r = np.linalg.qr(np.stack([x, y], axis=1))
                expected = q[:, 1] * math.copysign(1, r[1, 1]) * length
                np.testing.assert_allclose(v, expected, rtol=1e-6, atol=1e-6 * length)


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_directions_are_zero_for_tensors_that_do_not_move_and_have_the_working_type(
    dtype: torch.dtype,
) -> None:
    point = weights(dtype)
    for direction in random_directions(point, NAMES, STILL, 0):
        assert list(direction) == NAMES
        for name, tensor in direction.items():
            assert tensor.shape == SHAPES[name]
            assert tensor.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert not any(bool(direction[name].any()) for name in ("bias", "scalar", "norm"))


def test_a_filter_of_one_weight_stands_with_its_whole_tensor_for_one() -> None:
    point = weights()
    first, second = random_directions(point, NAMES, STILL, 0)
    assert first["one"].abs().tolist() == point["one"].abs().tolist()
    assert second["one"].tolist() == [[0]]
    # Whatever the numbers drawn.
    for seed in range(500):
        _, second = random_directions(point, ["one", "row"], (), seed)
        assert second["one"].tolist() == [[0]]
    sizes = first["column"].abs() / point["column"].abs()
    assert sizes.max() > 1.01 * sizes.min()


def test_half_precision_has_the_directions_of_what_it_holds() -> None:
    half = weights(torch.bfloat16)
    same = {name: tensor.float() for name, tensor in half.items()}
    for a, b in zip(
        random_directions(half, NAMES, STILL, 0),
        random_directions(same, NAMES, STILL, 0),
        strict=True,
    ):
        assert all(torch.equal(a[name], b[name]) for name in NAMES)


def test_the_layout_of_a_tensor_plays_no_part() -> None:
    point = weights()
    turned = {
        name: t.transpose(0, 1).contiguous().transpose(0, 1) if t.ndim > 1 else t
        for name, t in point.items()
    }
    assert not turned["linear"].is_contiguous()
    for a, b in zip(
        random_directions(point, NAMES, STILL, 0),
        random_directions(turned, NAMES, STILL, 0),
        strict=True,
    ):
        assert all(torch.equal(a[name], b[name]) for name in NAMES)


def test_scaling_a_filter_scales_its_directions_and_no_other() -> None:
    point = weights()
    scaled = {name: tensor.clone() for name, tensor in point.items()}
    scaled["conv"][2] *= 8
    scaled["linear"][1] = 0
    for a, b in zip(
        random_directions(point, NAMES, STILL, 0),
        random_directions(scaled, NAMES, STILL, 0),
        strict=True,
    ):
        expected = {name: tensor.clone() for name, tensor in a.items()}
        expected["conv"][2] *= 8
        expected["linear"][1] = 0
        assert all(torch.equal(b[name], expected[name]) for name in NAMES)
        assert b["conv"][2].any()


def test_each_tensor_has_random_numbers_of_its_own() -> None:
    point = weights()
    whole = random_directions(point, NAMES, STILL, 0)
    part = random_directions(point, ["linear", "conv"], (), 0)
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a["conv"], b["conv"])
        assert torch.equal(a["linear"], b["linear"])
    twins = {name: torch.ones(4, 5) for name in ("x", "y")}
    first, _ = random_directions(twins, ["x", "y"], (), 0)
    assert not torch.allclose(first["x"], first["y"])


def test_a_seed_gives_the_same_directions_and_another_seed_others() -> None:
    point = weights()
    one, again, other = (random_directions(point, NAMES, STILL, seed) for seed in (0, 0, 1))
    for k in range(2):
        assert all(torch.equal(one[k][name], again[k][name]) for name in NAMES)
        assert all(not torch.equal(one[k][name], other[k][name]) for name in ("conv", "linear"))
    # Of many weights nearly none of the one is in the other.
    assert abs(wide(one[0]["pairs"]).ravel() @ wide(other[0]["pairs"]).ravel()) < 0.5 * float(
        point["pairs"].double().square().sum()
    )


def test_directions_are_uniform_over_the_sphere() -> None:
    # Each coordinate of a uniform unit vector of K has the mean 0 and the variance 1 / K.
    point = {"w": torch.ones(40_000, 4) / 2}
    for direction in random_directions(point, ["w"], (), 3):
        sample = wide(direction["w"])
        np.testing.assert_allclose(sample.mean(axis=0), 0, atol=5 * 0.5 / 200)
        np.testing.assert_allclose(sample.T @ sample / len(sample), np.eye(4) / 4, atol=0.01)


def test_nearly_parallel_draws_still_give_orthogonal_directions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = torch.randn(8, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    draws = iter([first, first * 3 + 1e-13 * first.flip(1)])
    monkeypatch.setattr(torch, "randn", lambda *_, **__: next(draws))
    point = {"w": first.roll(1)}
    u, v = (wide(d["w"]) for d in random_directions(point, ["w"], (), 0))
    lengths = np.linalg.norm(wide(point["w"]), axis=1)
    np.testing.assert_allclose(np.linalg.norm(v, axis=1), lengths, rtol=1e-14)
    assert np.all(np.abs((u * v).sum(axis=1)) <= 1e-14 * lengths**2)


@pytest.mark.parametrize("piece", [1, 5, 14, 10_000])
def test_the_size_of_a_piece_plays_no_part(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    point = weights()
    whole = random_directions(point, NAMES, STILL, 0)
    monkeypatch.setattr(directions, "_PIECE", piece)
    for a, b in zip(whole, random_directions(point, NAMES, STILL, 0), strict=True):
        for name in NAMES:
            np.testing.assert_allclose(wide(a[name]), wide(b[name]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "point",
    [
        {"bias": torch.ones(4)},
        {"w": torch.zeros(4, 5)},
        {"w": torch.ones(1, 1), "b": torch.ones(3)},
        {"still": torch.ones(4, 5)},
    ],
    ids=["biases", "zeros", "one weight", "still"],
)
def test_directions_that_span_no_plane_are_a_usage_error(point: dict[str, Tensor]) -> None:
    with pytest.raises(
        UsageError, match=r"the tensors that move do not span a plane.*Let a weight"
    ) as caught:
        random_directions(point, list(point), {"still"}, 0)
    assert "\n" not in str(caught.value)


# --- One of many ---------------------------------------------------------------------------------


def filtered(point: Mapping[str, Tensor]) -> list[str]:
    return [name for name, tensor in point.items() if has_filters(tensor)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_each_filter_of_a_direction_is_a_draw_as_long_as_that_of_the_weights(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = weights(dtype)
    names = filtered(point)
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for piece in (directions._PIECE, 5):
        monkeypatch.setattr(directions, "_PIECE", piece)
        for number in (1, 2):
            found = random_direction(point, names, 7, number)
            assert list(found) == names
            for name in names:
                generator = directions._generator(f"{name} {number}", 7)
                draw = torch.randn(SHAPES[name], generator=generator)
                of = zip(*map(filters, (found[name], draw, point[name])), strict=True)
                for u, x, w in of:
                    expected = x / np.linalg.norm(x) * np.linalg.norm(w)
                    np.testing.assert_allclose(u, expected, rtol=8 * eps, atol=0)
            # So all directions are as long as the weights.
            assert norm(found) == pytest.approx(norm(point, names), rel=4 * eps)


def test_other_weights_have_the_same_draws_scaled_to_their_filters() -> None:
    one, other = weights(), weights(seed=1)
    names = filtered(one)
    numbers = [random_direction(one, names, 3, number) for number in (1, 2)]
    there = random_direction(other, names, 3, 1)
    for name in names:
        for u, v in zip(filters(numbers[0][name]), filters(there[name]), strict=True):
            np.testing.assert_allclose(
                u / np.linalg.norm(u), v / np.linalg.norm(v), rtol=1e-5, atol=1e-7
            )
    # Another number, another seed and another tensor have other draws.
    assert not torch.equal(numbers[0]["conv"], numbers[1]["conv"])
    assert not torch.equal(numbers[0]["conv"], random_direction(one, names, 4, 1)["conv"])
    alone = random_direction(one, ["conv"], 3, 1)
    assert torch.equal(alone["conv"], numbers[0]["conv"])


def test_zero_filters_stay_zero_and_complex_ones_have_both_parts() -> None:
    point = {"zero": torch.zeros(3, 4), "complex": torch.randn(2, 3, dtype=torch.complex64)}
    found = random_direction(point, point, 0, 1)
    assert not found["zero"].any()
    assert found["complex"].dtype == torch.complex64
    torch.testing.assert_close(found["complex"].norm(dim=1), point["complex"].norm(dim=1))
    assert found["complex"].real.any()
    assert found["complex"].imag.any()


def test_gaussian_directions_are_standard_normal_with_the_same_draws_for_other_weights() -> None:
    point = {"large": torch.zeros(300, 300), "double": torch.ones(7, dtype=torch.float64)}
    first, second = (gaussian_direction(point, point, 3, number) for number in (1, 2))
    values = wide(first["large"]).ravel()
    assert abs(values.mean()) < 4 / math.sqrt(values.size)
    assert values.var() == pytest.approx(1, abs=4 * math.sqrt(2 / values.size))
    correlation = np.corrcoef(values, wide(second["large"]).ravel())[0, 1]
    assert abs(correlation) < 4 / math.sqrt(values.size)
    other = gaussian_direction({name: t + 1 for name, t in point.items()}, ["large"], 3, 1)
    assert torch.equal(other["large"], first["large"])
    assert not torch.equal(gaussian_direction(point, point, 4, 1)["large"], first["large"])
    assert first["double"].dtype == torch.float64
    half = gaussian_direction({"half": torch.ones(3, dtype=torch.bfloat16)}, ["half"], 0, 1)
    assert half["half"].dtype == torch.float32
