"""The vector space of weights: held against float64 NumPy, in every type that tensors come in."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from losscli.errors import UsageError
from losscli.weight_space.vectors import (
    cosine,
    distance,
    known_buffers,
    mismatches,
    norm,
    select_names,
)

PIECE = 1 << 20
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_complex:
        return torch.randn(*shape, dtype=dtype, generator=generator)
    return (torch.randn(*shape, generator=generator) * 3).abs().to(dtype)


def wide(tensor: Tensor) -> np.ndarray:
    """The values in the widest type, by another way than the module's."""
    if tensor.is_complex():
        return tensor.numpy().astype(np.complex128).ravel()
    if tensor.dtype == torch.bfloat16:
        # A bfloat16 is the upper half of a float32.
        bits = tensor.view(torch.int16).numpy().astype(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).astype(np.float64).ravel()
    return tensor.numpy().astype(np.float64).ravel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7,), (2 * 64 + 3,), (2, 3, 5)], ids=str)
def test_norm_distance_and_cosine_are_those_of_float64(
    dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("losscli.weight_space.vectors._PIECE", 64)
    a, b = (random(*shape, dtype=dtype, seed=s) for s in (1, 2))
    x, y = wide(a), wide(b)
    assert norm({"w": a}) == pytest.approx(np.linalg.norm(x), rel=1e-12)
    assert distance({"w": a}, {"w": b}) == pytest.approx(np.linalg.norm(y - x), rel=1e-12)
    expected = np.vdot(x, y).real / np.linalg.norm(x) / np.linalg.norm(y)
    assert cosine(a, b) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_half_precision_sums_do_not_saturate() -> None:
    ones = torch.ones(3 * PIECE + 1, dtype=torch.float16)
    assert norm({"w": ones * 4}) == 4 * math.sqrt(3 * PIECE + 1)
    assert distance({"w": ones}, {"w": -ones}) == 2 * math.sqrt(3 * PIECE + 1)
    assert cosine(ones, -ones) == pytest.approx(-1, rel=1e-14)


def test_the_ends_of_a_distance_may_differ_in_type() -> None:
    a, b = random(5, dtype=torch.bfloat16), random(5, dtype=torch.float32, seed=3)
    assert distance({"w": a}, {"w": b}) == pytest.approx(np.linalg.norm(wide(b) - wide(a)))
    # uint8 would wrap around.
    zero, one = torch.zeros(2, dtype=torch.uint8), torch.ones(2, dtype=torch.uint8)
    assert distance({"w": one}, {"w": zero}) == math.sqrt(2)


def test_the_norm_is_over_all_tensors_together_or_those_named() -> None:
    weights = {"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]]), "c": torch.tensor(12.0)}
    assert norm(weights) == 13
    assert norm(weights, ["a", "b"]) == 5
    assert norm(weights, []) == 0
    zeros = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    assert distance(zeros, weights) == 13
    assert distance(zeros, weights, ["b", "a"]) == 5
    assert distance(weights, weights) == 0


def test_a_transposed_tensor_meets_its_values_in_order() -> None:
    a = random(3, 4)
    assert distance({"w": a.t()}, {"w": a.t().contiguous()}) == 0
    assert cosine(a.t(), a.t().contiguous()) == pytest.approx(1, rel=1e-15)


def test_an_empty_tensor_has_the_norm_zero_and_no_angle() -> None:
    empty = torch.zeros(0, 3)
    assert norm({"w": empty}) == 0
    assert distance({"w": empty}, {"w": empty}) == 0
    assert math.isnan(cosine(empty, empty))


def test_a_zero_tensor_has_no_angle_to_another() -> None:
    assert math.isnan(cosine(torch.zeros(3), torch.ones(3)))
    assert math.isnan(cosine(torch.ones(3), torch.zeros(3)))
    assert cosine(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])) == 0


def test_infinities_and_nans_are_not_hidden() -> None:
    assert norm({"w": torch.tensor([1.0, math.inf])}) == math.inf
    assert math.isnan(norm({"w": torch.tensor([1.0, math.nan])}))
    assert math.isnan(distance({"w": torch.tensor([math.inf])}, {"w": torch.tensor([math.inf])}))


def test_everything_that_does_not_match_is_listed() -> None:
    expected = {
        "gone": torch.zeros(2, 3),
        "scalar": torch.tensor(0.0),
        "shape": torch.zeros(4),
        "float": torch.zeros(2),
        "whole": torch.zeros(2, dtype=torch.int64),
        "complex": torch.zeros(2, dtype=torch.int64),
        "fits": torch.zeros(2),
        "half": torch.zeros(2),
    }
    found = {
        "shape": torch.zeros(4, 1),
        "float": torch.zeros(2, dtype=torch.int32),
        "whole": torch.zeros(2, dtype=torch.bfloat16),
        "complex": torch.zeros(2, dtype=torch.complex64),
        "fits": torch.zeros(2),
        "half": torch.zeros(2, dtype=torch.float16),
        "more": torch.zeros(1),
    }
    assert mismatches(found, expected) == [
        "missing gone [2, 3]",
        "missing scalar []",
        "shape is [4, 1], not [4] as needed",
        "float is int32, not float32 as needed",
        "whole is bfloat16, not int64 as needed",
        "complex is complex64, not int64 as needed",
        "unexpected more [1]",
    ]
    assert mismatches(expected, expected) == []


NAMES = ["conv.weight", "conv.bias", "norm.weight", "norm.bias", "head[0].weight", "Conv.weight"]


@pytest.mark.parametrize(
    ("only", "but", "chosen"),
    [
        ([], [], NAMES),
        (["*.weight"], [], ["conv.weight", "norm.weight", "head[0].weight", "Conv.weight"]),
        (["conv.*"], [], ["conv.weight", "conv.bias"]),
        (["norm.*", "conv.bias"], [], ["conv.bias", "norm.weight", "norm.bias"]),
        ([], ["*bias", "head*"], ["conv.weight", "norm.weight", "Conv.weight"]),
        (["*.weight"], ["[nh]*"], ["conv.weight", "Conv.weight"]),
        (["c?nv.weight"], [], ["conv.weight"]),
        (["conv.weight"], [], ["conv.weight"]),
        (["*"], ["conv.*"], NAMES[2:]),
    ],
)
def test_patterns_choose_names_in_their_order(
    only: list[str], but: list[str], chosen: list[str]
) -> None:
    assert select_names(NAMES, only, but) == chosen
    assert select_names(iter(NAMES), iter(only), iter(but)) == chosen


@pytest.mark.parametrize(
    ("only", "but", "message"),
    [
        (
            ["convs.*"],
            [],
            r"the pattern 'convs\.\*' matches none of the 6 tensors\. Examples:",
        ),
        (
            ["conv.*", "x"],
            [],
            "the pattern 'x' matches none.*Examples: conv.weight, conv.bias, norm",
        ),
        ([], ["weight"], "the pattern 'weight' matches none"),
        (["conv.*"], ["conv.*"], "--only and --except leave no tensor to move. Widen"),
        ([], ["*"], "leave no tensor to move"),
    ],
)
def test_a_pattern_that_fits_nothing_is_a_usage_error(
    only: list[str], but: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        select_names(NAMES, only, but)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_the_buffers_of_torch_are_known_by_their_names() -> None:
    def pruned() -> nn.Module:
        layer = nn.Linear(3, 3)
        prune.l1_unstructured(layer, "weight", 0.5)
        return layer

    model = nn.ModuleDict({
        "norm": nn.BatchNorm2d(3),
        "old": torch.nn.utils.spectral_norm(nn.Conv2d(3, 3, 2)),
        "new": torch.nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)),
        "pruned": pruned(),
        "named": nn.ParameterDict({
            "weight_u": torch.ones(2),
            "mask": torch.ones(2),
            "_u": torch.ones(2),
        }),
    })
    floating = [n for n, t in model.state_dict().items() if t.is_floating_point()]
    parameters = {n for n, _ in model.named_parameters()}
    assert known_buffers(floating) == [n for n in floating if n not in parameters]
