"""The built-in models against NumPy, and the sizes that they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from losscli.errors import SpecError
from losscli.models import CNN, MLP, MODELS

ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def arrays(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", ["12-3", "12-7-3", "12-7-5-3"])
def test_an_mlp_is_affine_maps_with_activations_between(activation: str, sizes: str) -> None:
    model = MLP(sizes, activation=activation).double()
    state = arrays(model)
    assert sorted(state) == sorted(
        f"layers.{i}.{part}" for i in range(sizes.count("-")) for part in ("weight", "bias")
    )
    x = images(5, 12)
    expected = x.numpy()
    for i in range(sizes.count("-")):
        if i:
            expected = ACTIVATIONS[activation](expected)
        expected = expected @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
    with torch.no_grad():
        np.testing.assert_allclose(model(x), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_a_maxout_unit_is_the_largest_of_its_affine_pieces(pieces: int) -> None:
    model = MLP("6-4-3", activation="maxout", pieces=pieces).double()
    state = arrays(model)
    assert state["layers.0.weight"].shape == (4 * pieces, 6)
    x = images(5, 6)
    hidden = np.empty((5, 4))
    for unit in range(4):
        rows = slice(unit * pieces, (unit + 1) * pieces)
        affine = x.numpy() @ state["layers.0.weight"][rows].T + state["layers.0.bias"][rows]
        hidden[:, unit] = affine.max(1)
    expected = hidden @ state["layers.1.weight"].T + state["layers.1.bias"]
    with torch.no_grad():
        np.testing.assert_allclose(model(x), expected, rtol=1e-12, atol=1e-14)


def test_an_mlp_flattens_images() -> None:
    model = MLP("12-5-2").double()
    x = images(7, 3, 2, 2)
    assert torch.equal(model(x), model(x.reshape(7, 12)))


def test_only_maxout_has_pieces() -> None:
    assert MLP("6-4-3", pieces=5).layers[0].out_features == 4
    assert MLP("6-4-3", activation="maxout").layers[0].out_features == 8


def convolve(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """A 3×3 convolution with a border of zeros, a sum over shifted images."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    height, width = x.shape[2:]
    found = sum(
        np.einsum("nchw,oc->nohw", padded[:, :, i : i + height, j : j + width], weight[:, :, i, j])
        for i in range(3)
        for j in range(3)
    )
    return found if bias is None else found + bias[:, None, None]


@pytest.mark.parametrize("batchnorm", [False, True])
def test_a_cnn_is_convolutions_with_pooling_between_and_a_mean_at_the_end(batchnorm: bool) -> None:
    model = CNN("4-6", channels=2, classes=3, batchnorm=batchnorm).double().eval()
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(images(*buffer.shape).abs() + (0.1 if "var" in name else 0))
    state = arrays(model)
    x = images(5, 2, 6, 8)
    expected = x.numpy()
    for i in range(2):
        if i:
            blocks = expected.reshape(5, 4, 3, 2, 4, 2)
            expected = blocks.max((3, 5))
        bias = state.get(f"convolutions.{i}.bias")
        assert (bias is None) == batchnorm
        expected = convolve(expected, state[f"convolutions.{i}.weight"], bias)
        if batchnorm:
            mean, variance, gain, shift = (
                state[f"norms.{i}.{part}"][:, None, None]
                for part in ("running_mean", "running_var", "weight", "bias")
            )
            expected = (expected - mean) / np.sqrt(variance + 1e-5) * gain + shift
        expected = np.maximum(expected, 0)
    expected = expected.mean((2, 3)) @ state["head.weight"].T + state["head.bias"]
    with torch.no_grad():
        np.testing.assert_allclose(model(x), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("shape", [(1, 3, 28, 28), (4, 3, 7, 5), (2, 3, 4, 4)], ids=str)
def test_a_cnn_takes_images_of_any_size_that_its_pooling_leaves(shape: tuple[int, ...]) -> None:
    model = MODELS["cnn"]("4-5-6", channels=3, classes=7)
    assert model(torch.zeros(shape)).shape == (shape[0], 7)
    assert len([n for n, _ in model.named_parameters() if n.startswith("convolutions")]) == 6


def test_sizes_may_be_numbers_too() -> None:
    assert [layer.out_features for layer in MLP([4, 5, 6]).layers] == [5, 6]
    assert [layer.out_channels for layer in CNN([8, 9]).convolutions] == [8, 9]


@pytest.mark.parametrize(
    "sizes",
    ["784", "a-b", "0-3", "", "-", "5-", "-5-3", "3--2", "1.5-2", [7.5, 3.0], [3], [], 5, True],
    ids=str,
)
def test_sizes_that_are_no_layers_are_refused_with_an_example(sizes: Any) -> None:
    with pytest.raises(SpecError, match=r"no list of sizes\. Write for example mlp:784") as caught:
        MLP(sizes)
    assert str(caught.value).startswith(f"mlp: {sizes!r} is")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("model", "arguments", "options", "message"),
    [
        (MLP, "6-3", {"activation": "gelu"}, "'gelu'. Known are relu, sigmoid, tanh, maxout"),
        (MLP, "6-3", {"activation": [1, 2]}, "unknown activation"),
        (MLP, "6-3", {"activation": "maxout", "pieces": 0}, "pieces=0 is no number of affine"),
        (MLP, "6-3", {"activation": "maxout", "pieces": 1.5}, "pieces=1.5 is no number"),
        (MLP, "6-3", {"pieces": "two"}, "pieces=two is no number"),
        (CNN, "", {}, "cnn: '' is no list of sizes. Write for example cnn:16-32,channels=3"),
        (CNN, "16-0", {}, "cnn: '16-0' is no list"),
        (CNN, 16, {}, "cnn: 16 is no list"),
        (CNN, "16", {"channels": 0}, r"cnn: \[0, 10\] is no list"),
        (CNN, "16", {"channels": 1.5}, "cnn"),
        (CNN, "16", {"channels": float("inf")}, "cnn"),
        (CNN, "16", {"classes": -2}, "cnn"),
        (CNN, "16", {"classes": "ten"}, "cnn"),
        (CNN, "16", {"batchnorm": "False"}, "batchnorm=False is neither true nor false. Write"),
    ],
)
def test_keys_that_make_no_model_are_refused(
    model: type[nn.Module], arguments: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        model(arguments, **options)
    assert "\n" not in str(caught.value)
    assert caught.value.cure
