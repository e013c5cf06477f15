"""Losses and metrics, each against its formula written out in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from losscli.errors import LossError
from losscli.losses import LOSSES, METRICS, accuracy, bce, cross_entropy, mse, per_example_mean

Array = np.ndarray


def outputs(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 3) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def classes(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(7))


def over_the_rest(values: Array) -> Array:
    return values.reshape(len(values), -1).mean(1)


def softmax_loss(scores: Tensor, targets: Tensor) -> Array:
    z = scores.double().numpy()
    found = np.empty(targets.shape)
    for index in itertools.product(*map(range, targets.shape)):
        example, *place = index
        row = z[(example, slice(None), *place)]
        right = row[targets[index]]
        found[index] = np.log(np.sum(np.exp(row - row.max()))) + row.max() - right
    return over_the_rest(found)


@pytest.mark.parametrize(
    "shape", [(5, 3), (5, 1), (4, 3, 6), (4, 3, 2, 5), (2, 3, 2, 2, 2)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_cross_entropy_is_minus_the_log_of_the_softmax_at_the_target(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    scores, targets = outputs(*shape, dtype=dtype), classes(shape[1], shape[0], *shape[2:])
    found = cross_entropy(scores, targets)
    assert found.shape == (shape[0],)
    assert found.dtype == dtype
    rtol = 1e-5 if dtype == torch.float32 else 1e-13
    np.testing.assert_allclose(found, softmax_loss(scores, targets), rtol=rtol, atol=rtol)


def test_cross_entropy_of_huge_scores_does_not_overflow() -> None:
    scores = torch.tensor([[1e4, 0.0], [-1e4, 0.0]])
    assert cross_entropy(scores, torch.tensor([1, 1])).tolist() == [1e4, 0]


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 3), (4, 2, 3, 2)], ids=str)
def test_mse_is_the_mean_of_the_squares(shape: tuple[int, ...]) -> None:
    y, targets = outputs(*shape), outputs(*shape, scale=1)
    expected = over_the_rest((y.double().numpy() - targets.double().numpy()) ** 2)
    found = mse(y, targets)
    assert found.shape == (shape[0],)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 3), (4, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("scale", [1, 50])
def test_bce_is_that_of_the_sigmoid(shape: tuple[int, ...], scale: float) -> None:
    z, targets = outputs(*shape, scale=scale), torch.sigmoid(outputs(*shape, scale=2))
    x, t = z.double().numpy(), targets.double().numpy()
    # −t log σ(x) − (1 − t) log(1 − σ(x)), where −log σ(x) = log(1 + e^−x)
    expected = over_the_rest(t * np.logaddexp(0, -x) + (1 - t) * np.logaddexp(0, x))
    found = bce(z, targets)
    assert found.shape == (shape[0],)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("loss", [mse, bce])
def test_one_output_an_example_fits_targets_without_that_dimension(
    loss: Callable[[Tensor, Tensor], Tensor],
) -> None:
    y, targets = outputs(6, 1), torch.tensor([0, 1, 1, 0, 1, 0])
    # Broadcast, these would be 36 pairs.
    expected = [float(loss(y[i : i + 1, 0], targets[i : i + 1])) for i in range(6)]
    assert loss(y, targets).tolist() == expected
    assert loss(y, targets.double()).dtype == torch.float32
    pixels = outputs(2, 3, 4, 1)
    assert loss(pixels, classes(2, 2, 3, 4)).shape == (2,)


@pytest.mark.parametrize("shape", [(9, 4), (4, 3, 6), (4, 3, 2, 5)], ids=str)
def test_accuracy_is_the_share_of_highest_scores_at_the_target(shape: tuple[int, ...]) -> None:
    scores, targets = outputs(*shape), classes(shape[1], shape[0], *shape[2:])
    expected = over_the_rest(scores.numpy().argmax(1) == targets.numpy())
    assert 0 < expected.mean() < 1
    found = accuracy(scores, targets)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize("one", [True, False])
def test_a_single_score_answers_by_its_sign(dtype: torch.dtype, one: bool) -> None:
    scores = torch.tensor([2.0, -1.0, 0.5, -0.5, 0.0])
    targets = torch.tensor([1, 0, 0, 1, 0], dtype=dtype)
    found = accuracy(scores.unsqueeze(1) if one else scores, targets)
    assert found.tolist() == [1, 1, 0, 0, 1]


def test_a_single_score_a_pixel_answers_by_its_sign_too() -> None:
    scores = outputs(3, 1, 4, 5)
    targets = (scores[:, 0] > 0).long()
    assert accuracy(scores, targets).tolist() == [1, 1, 1]
    assert accuracy(scores, 1 - targets).tolist() == [0, 0, 0]


def test_several_labels_an_example_are_answered_one_by_one() -> None:
    scores = torch.tensor([[1.0, -1.0, 1.0, -1.0], [1.0, 1.0, 1.0, 1.0]])
    targets = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0]])
    assert accuracy(scores, targets).tolist() == [0.75, 0]


@pytest.mark.parametrize(
    ("loss", "y", "targets", "message"),
    [
        (cross_entropy, (5, 3), torch.zeros(4, dtype=torch.int64), r"\[5, 3\] and int64 \[4\]"),
        (cross_entropy, (5, 3), torch.zeros(5), r"integer targets \[B\], not float32 \[5, 3\] and"),
        (cross_entropy, (5,), torch.zeros(5, dtype=torch.int64), r"\[5\]. Choose another --loss"),
        (cross_entropy, (5, 3), torch.zeros(5, 3, dtype=torch.int64), "cross_entropy needs"),
        (cross_entropy, (5, 3, 4), torch.zeros(5, 5, dtype=torch.int64), "cross_entropy needs"),
        (cross_entropy, (), torch.tensor(0), "cross_entropy needs"),
        (mse, (5, 3), torch.zeros(5), r"mse needs outputs and targets of one shape, not float32"),
        (mse, (5,), torch.zeros(5, 1), r"not float32 \[5\] and float32 \[5, 1\]. Choose another"),
        (bce, (5, 2), torch.zeros(5, dtype=torch.int64), r"bce needs.*\[5, 2\] and int64 \[5\]"),
        (bce, (4, 1), torch.zeros(5), "bce needs"),
        (
            accuracy,
            (5, 3),
            torch.zeros(4, dtype=torch.int64),
            r"accuracy needs.*\[5, 3\] and",
        ),
        (accuracy, (3, 3), torch.zeros(3, 2), r"Choose another --metric, or none"),
        (accuracy, (5,), torch.zeros(5, 1), "accuracy needs"),
        (accuracy, (5, 1), torch.zeros(5, 3), "accuracy needs"),
    ],
)
def test_shapes_that_do_not_fit_are_told_with_the_cure(
    loss: Callable[[Tensor, Tensor], Tensor], y: tuple[int, ...], targets: Tensor, message: str
) -> None:
    with pytest.raises(LossError, match=message) as caught:
        loss(torch.zeros(y), targets)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


def test_the_mean_is_over_all_but_the_examples() -> None:
    values = torch.arange(24.0).reshape(2, 3, 4)
    assert per_example_mean(values).tolist() == [5.5, 17.5]
    assert per_example_mean(values[0, 0]).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_needs_no_gradients_and_passes_them_where_they_are(name: str) -> None:
    y = outputs(4, 3).requires_grad_()
    targets = classes(3, 4) if name == "cross_entropy" else torch.zeros(4, 3)
    with torch.inference_mode():
        assert not LOSSES[name](y, targets).requires_grad
    LOSSES[name](y, targets).sum().backward()
    assert y.grad is not None
    assert y.grad.abs().sum() > 0


def test_the_registries_hold_the_functions_of_their_names() -> None:
    assert {"cross_entropy": cross_entropy, "mse": mse, "bce": bce} == LOSSES
    assert {"accuracy": accuracy} == METRICS
