"""Losses and metrics, each against its formula written out in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from losscli.errors import LossError
from losscli.evaluation.losses import built_in as losses
from losscli.evaluation.losses.built_in import (
    LOSSES,
    bce,
    causal_lm,
    cross_entropy,
    mse,
    nll,
    per_example_mean,
    token_cross_entropy,
)
from losscli.evaluation.losses.example_weights import weights_of
from losscli.evaluation.losses.metrics import METRICS, accuracy, of_mean, perplexity
from tests.cases import in_turn

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
    "shape", [(5, 3), (5, 2), (4, 3, 6), (4, 3, 2, 5), (2, 3, 2, 2, 2)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_cross_entropy_is_minus_the_log_of_the_softmax_at_the_target(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    scores, targets = outputs(*shape, dtype=dtype), classes(shape[1], shape[0], *shape[2:])
    found = cross_entropy(scores, targets)
    assert found.shape == (shape[0],)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, softmax_loss(scores, targets), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool], ids=str)
def test_classes_may_be_of_any_integer_type(dtype: torch.dtype) -> None:
    scores, targets = outputs(6, 2), classes(2, 6)
    assert torch.equal(cross_entropy(scores, targets.to(dtype)), cross_entropy(scores, targets))


def test_cross_entropy_of_huge_scores_does_not_overflow() -> None:
    scores = torch.tensor([[1e4, 0.0], [-1e4, 0.0]])
    assert cross_entropy(scores, torch.tensor([1, 1])).tolist() == [1e4, 0]


# From losses of order 1 down to 1e-40, in whichever order the classes are.
GAPS = [0.0, 1.0, 5.0, 15.0, 30.0, 36.0, 45.0, 90.0]


def exact_softplus(x: float) -> float:
    """log(1 + e^x) in decimals."""
    with localcontext() as context:
        context.prec = 80
        return float((1 + Decimal(x).exp()).ln())


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("many", [2, 4])
def test_a_cross_entropy_is_exact_however_small_it_is(
    gap: float, dtype: torch.dtype, many: int
) -> None:
    for right in range(many):
        scores = torch.full((1, many), 3.0, dtype=dtype)
        scores[0, right] += gap
        expected = exact_softplus(-float(scores[0, right] - 3) + math.log(many - 1))
        targets = torch.tensor([right])
        assert cross_entropy(scores, targets).item() == pytest.approx(expected, rel=1e-14)
        one = token_cross_entropy(scores[:, None], targets[:, None]).item()
        assert one == pytest.approx(expected, rel=1e-13 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_bce_is_exact_however_small_it_is(gap: float, label: int, dtype: torch.dtype) -> None:
    for sign in (1, -1):
        score = torch.tensor([sign * gap], dtype=dtype)
        expected = exact_softplus(sign * gap * (1 if label == 0 else -1))
        found = bce(score, torch.tensor([float(label)])).item()
        assert found == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    "targets",
    [
        torch.tensor([16777217, 3]),
        torch.tensor([1e4 + 1e-6, -1e-6], dtype=torch.float64),
        torch.tensor([1e4, 0.1]),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_targets_of_mse_are_not_rounded(targets: Tensor, dtype: torch.dtype) -> None:
    y = (targets.double() + torch.tensor([1.0, -0.125])).to(dtype)
    expected = [
        float((Fraction(a) - Fraction(b)) ** 2)
        for a, b in zip(y.tolist(), targets.tolist(), strict=True)
    ]
    assert mse(y, targets).tolist() == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("loss", ["cross_entropy", "bce", "token_cross_entropy", "causal_lm"])
@pytest.mark.parametrize("gap", GAPS)
def test_the_derivatives_of_a_small_loss_are_as_exact(loss: str, gap: float) -> None:
    shape = {"cross_entropy": (1, 2), "bce": (1,)}.get(loss, (1, 2, 2))
    label = {"cross_entropy": (1,), "bce": (1,)}.get(loss, (1, 2))
    targets = torch.ones(label, dtype=torch.int64)
    # The loss is log(1 + e^−x) in x = the gap between the scores.
    x = torch.tensor(gap, dtype=torch.float64, requires_grad=True)
    scores = torch.stack([x * 0, x]).expand(shape) if loss != "bce" else x.expand(shape)
    (first,) = torch.autograd.grad(LOSSES[loss](scores, targets).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first, x)
    p = math.exp(-gap) / (1 + math.exp(-gap))
    assert first.item() == pytest.approx(-p, rel=1e-13)
    assert second.item() == pytest.approx(p * (1 - p), rel=1e-13)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([math.inf, 0.0, 1.0], math.nan),
        ([0.0, math.inf, 1.0], math.inf),
        ([-math.inf, 0.0, 1.0], math.inf),
        ([0.0, -math.inf, -math.inf], 0.0),
        ([0.0, -math.inf, 0.0], math.log(2)),
        ([0.0, math.nan, 0.0], math.nan),
    ],
)
@pytest.mark.parametrize("loss", [cross_entropy, token_cross_entropy])
def test_scores_that_are_not_finite_have_the_loss_of_their_softmax(
    loss: Any, scores: list[float], expected: float
) -> None:
    y, targets = torch.tensor([scores], requires_grad=True), torch.tensor([0])
    given = (y, targets) if loss is cross_entropy else (y[:, None], targets[:, None])
    found = loss(*given)
    assert found.item() == pytest.approx(expected, nan_ok=True)
    if math.isfinite(expected):
        found.sum().backward()
        assert y.grad is not None
        assert y.grad.isfinite().all()


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
    assert loss(y, targets.double()).dtype == torch.float64
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
        (
            cross_entropy,
            (5,),
            torch.zeros(5, dtype=torch.int64),
            "Give --loss bce for labels 0 and 1",
        ),
        (cross_entropy, (5, 3), torch.zeros(5, 3, dtype=torch.int64), "cross_entropy needs"),
        (cross_entropy, (5, 3, 4), torch.zeros(5, 5, dtype=torch.int64), "cross_entropy needs"),
        (cross_entropy, (), torch.tensor(0), "cross_entropy needs"),
        (
            causal_lm,
            (5, 3),
            torch.zeros(5, 3, dtype=torch.int64),
            r"causal_lm needs outputs \[B, T, V\].*not float32 \[5, 3\] and int64 \[5, 3\]. Choose",
        ),
        (causal_lm, (5, 3, 4), torch.zeros(5, 4, dtype=torch.int64), "scores for every token"),
        (causal_lm, (5, 3, 4), torch.zeros(5, 3), "causal_lm needs"),
        (token_cross_entropy, (5, 3, 4), torch.zeros(5, 4, dtype=torch.int64), "token_cross_ent"),
        (perplexity, (5, 3), torch.zeros(5, 3, dtype=torch.int64), "causal_lm needs"),
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
def test_shapes_that_do_not_fit_are_reported_with_the_fix(
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


TOKENS = ("causal_lm", "token_cross_entropy")


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_needs_no_gradients_and_passes_them_where_they_are(name: str) -> None:
    y = outputs(4, 3, *([5] if name in TOKENS else [])).requires_grad_()
    of_tokens = dict.fromkeys(TOKENS, classes(5, 4, 3))
    targets = {"cross_entropy": classes(3, 4), **of_tokens}.get(name, torch.zeros(4, 3))
    with torch.inference_mode():
        assert not LOSSES[name](y, targets).requires_grad
    LOSSES[name](y, targets).sum().backward()
    assert y.grad is not None
    assert y.grad.abs().sum() > 0


def test_the_registries_hold_the_functions_of_their_names() -> None:
    assert {
        "cross_entropy": cross_entropy,
        "mse": mse,
        "bce": bce,
        "causal_lm": causal_lm,
        "token_cross_entropy": token_cross_entropy,
    } == LOSSES
    assert {"accuracy": accuracy, "perplexity": perplexity} == METRICS


def next_token_loss(scores: Tensor, targets: Tensor) -> list[float]:
    """By hand: for each sequence the mean over t of −log softmax(scores[t])[target[t + 1]]."""
    z, found = scores.double().numpy(), []
    for rows, tokens in zip(z, targets.tolist(), strict=True):
        lost = []
        for row, token in zip(rows[:-1], tokens[1:], strict=True):
            if token != -100:
                lost.append(math.log(sum(math.exp(x - row.max()) for x in row)) + row.max())
                lost[-1] -= row[token]
        found.append(math.fsum(lost) / len(lost) if lost else 0)
    return found


def padded(*shape: int, vocabulary: int) -> Tensor:
    """Tokens of which some do not count; the last sequence has a single one that does."""
    targets = classes(vocabulary, *shape)
    targets[0, -2:] = -100
    targets[1, ::2] = -100
    targets[-1, :] = -100
    targets[-1, 1] = 3
    return targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [1, 7 * 11, 1 << 22])
def test_causal_lm_is_the_mean_surprise_of_the_next_tokens_that_count(
    dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_CHUNK", chunk)
    scores, targets = outputs(4, 9, 11, dtype=dtype), padded(4, 9, vocabulary=11)
    found = causal_lm(scores, targets)
    # Half-precision scores are what they are; the loss of them is that of float32.
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rtol = 1e-13 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(found, next_token_loss(scores, targets), rtol=rtol)


def test_causal_lm_is_the_loss_that_hugging_face_trains_with() -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    scores, targets = outputs(3, 8, 13), padded(3, 8, vocabulary=13)
    for i in range(3):
        one = ForCausalLMLoss(scores[i : i + 1], targets[i : i + 1], vocab_size=13)
        torch.testing.assert_close(causal_lm(scores, targets)[i], one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [1, 7 * 11, 1 << 22])
def test_token_cross_entropy_is_the_mean_surprise_of_the_labels_that_count(
    dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_CHUNK", chunk)
    scores, targets = outputs(4, 9, 11, dtype=dtype), padded(4, 9, vocabulary=11)
    targets[0, 0], targets[1, 0] = -100, 3
    scores[0, 0] = math.nan
    found = token_cross_entropy(scores, targets)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for i in range(4):
        # PyTorch's own, which takes [T, C] and leaves out −100.
        one = torch.nn.functional.cross_entropy(scores[i].double(), targets[i])
        torch.testing.assert_close(found[i].double(), one, rtol=1e-5, atol=0)
        if dtype == torch.float64:
            torch.testing.assert_close(found[i], one, rtol=1e-13, atol=0)
    targets[2] = -100
    assert token_cross_entropy(scores, targets)[2] == 0
    assert weights_of(token_cross_entropy, scores, targets).tolist() == [1, 1, 0, 1]


def test_a_sequence_without_tokens_has_no_weight_and_spoils_no_other() -> None:
    scores, targets = outputs(3, 4, 5), classes(5, 3, 4)
    targets[1, 1:] = -100
    found = causal_lm(scores, targets)
    assert found.tolist() == pytest.approx(next_token_loss(scores, targets), rel=1e-6)
    assert weights_of(causal_lm, scores, targets).tolist() == [1, 0, 1]


def test_scores_where_no_token_counts_are_ignored() -> None:
    scores, targets = outputs(2, 4, 5), classes(5, 2, 4)
    targets[:, 2] = -100
    expected = causal_lm(scores, targets)
    scores[:, 1] = math.nan
    scores[:, 3] = math.inf
    assert torch.equal(causal_lm(scores, targets), expected)


def test_causal_lm_maps_over_weights() -> None:
    scores, targets = outputs(3, 4, 6, 5), padded(4, 6, vocabulary=5)
    mapped = torch.vmap(lambda s: causal_lm(s, targets))(scores)
    torch.testing.assert_close(mapped, torch.stack([causal_lm(s, targets) for s in scores]))


@pytest.mark.parametrize(
    ("loss", "dtype"), in_turn([causal_lm, token_cross_entropy], torch.bfloat16, torch.float32)
)
def test_the_loss_of_a_vocabulary_makes_no_second_copy_of_its_scores(
    loss: Any, dtype: torch.dtype
) -> None:
    scores, targets = torch.zeros(4, 128, 1 << 15, dtype=dtype), classes(1 << 15, 4, 128)
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            for one in filter(torch.is_tensor, made if isinstance(made, list) else [made]):
                view = one.untyped_storage().data_ptr() == scores.untyped_storage().data_ptr()
                largest = max(largest, 0 if view else one.nbytes)
            return made

    with Sizes():
        loss(scores, targets)
    assert 0 < largest <= 16 << 20 < scores.nbytes


@pytest.mark.parametrize("loss", [cross_entropy, mse, bce])
def test_float64_copies_no_more_than_a_few_examples_at_once(loss: Any) -> None:
    scores = torch.zeros(64, 8, 128, 64)
    targets = classes(8, 64, 128, 64) if loss is cross_entropy else scores
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            for one in filter(torch.is_tensor, made if isinstance(made, list) else [made]):
                view = one.untyped_storage().data_ptr() == scores.untyped_storage().data_ptr()
                largest = max(largest, 0 if view else one.nbytes)
            return made

    expected = loss(scores[:2], targets[:2])
    with Sizes():
        found = loss(scores, targets)
    assert torch.equal(found[:2], expected)
    # All outputs take 32 MiB in float64.
    assert 0 < largest <= 16 << 20 < 2 * scores.nbytes


def test_perplexity_is_the_exponential_of_a_mean_and_not_a_mean_of_exponentials() -> None:
    scores, targets = outputs(4, 6, 5), padded(4, 6, vocabulary=5)
    each = perplexity(scores, targets)
    assert torch.equal(each, causal_lm(scores, targets))
    expected = math.exp(math.fsum(next_token_loss(scores, targets)) / 4)
    assert math.isclose(of_mean(perplexity, float(each.double().mean())), expected, rel_tol=1e-6)
    assert of_mean(perplexity, 1e4) == math.inf
    assert math.isnan(of_mean(perplexity, math.nan))
    assert of_mean(accuracy, 0.25) == 0.25


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "function", sorted({nll, *LOSSES.values(), *METRICS.values()}, key=lambda f: f.__name__)
)
def test_half_precision_outputs_have_the_losses_of_float32(
    function: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype
) -> None:
    scores, targets = outputs(4, 6, 5, dtype=dtype), classes(5, 4, 6)
    if function in {accuracy, cross_entropy, nll}:
        targets = classes(6, 4, 5)
    elif function in {mse, bce}:
        targets = outputs(4, 6, 5, scale=0.3).sigmoid()
    assert torch.equal(function(scores, targets), function(scores.float(), targets))
