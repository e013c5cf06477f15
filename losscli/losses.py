"""Losses and metrics, each per example: outputs and targets in, one number an example out.

Losses are computed in float64, those over a vocabulary in float32, and by formulas without
cancellation: a loss is as exact as the outputs that it is computed from, however small it is.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from losscli.errors import LossError

__all__ = [
    "IGNORED",
    "LOSSES",
    "METRICS",
    "OF_TOKENS",
    "TAKES_HALF",
    "Doubt",
    "PerExample",
    "accuracy",
    "bce",
    "causal_lm",
    "class_dim_of",
    "classes_of",
    "cross_entropy",
    "doubts_of",
    "function_of",
    "mse",
    "of_mean",
    "perplexity",
    "token_cross_entropy",
]

PerExample = Callable[..., Tensor]

IGNORED = -100
"""The target that stands for none, such as that of padding; as PyTorch and Hugging Face have it."""

# How far the sum of probabilities may be from one by rounding, also in half precision.
_NEAR_ONE = 0.02

# Outputs that are taken into a wider type at once: 16 MiB of float64.
_CHUNK = 1 << 21

# e^-40 is below the rounding of float64 as a share of 40: beyond, log(1 + e^x) is x.
_LINEAR = 40


def cross_entropy(outputs: Tensor, targets: Tensor, *, dim: int | None = None) -> Tensor:
    """Computes the cross-entropy, −log softmax(scores)[target], of scores before the softmax.

    Args:
        outputs: Scores before the softmax, ``[B, C, *]`` or ``[B, *, C]``.
        targets: Classes 0…C−1, ``[B, *]``.
        dim: The dimension of the classes, 1 or −1; None takes the one that fits the targets.

    Returns:
        ``[B]``, in nats; the mean over any further dimensions. For outputs ``[B, *, C]`` it is
        `token_cross_entropy`.

    Raises:
        LossError: The shapes do not fit, or both dimensions fit and ``dim`` is None.
    """
    if not targets.is_floating_point() and _one_score_a_target(outputs, targets):
        labels = "bce for labels 0 and 1, or --loss " if _are_labels(targets) else ""
        raise LossError(
            f"cross_entropy needs a score for each class, and outputs {_form(outputs)} have one "
            f"for each of the targets {_form(targets)}",
            f"Give --loss {labels}mse for targets that are quantities",
        )
    dim = _class_dim(outputs, targets, "cross_entropy", dim)
    if targets.is_floating_point() or dim is None:
        raise LossError(
            f"cross_entropy needs outputs [B, C] and integer targets [B], not {_form(outputs)} "
            f"and {_form(targets)}",
            "Choose another --loss, or a model with one output a class",
        )
    if dim == -1:
        return token_cross_entropy(outputs, targets)
    return _in_float64(_surprise, outputs, targets)


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Computes the squared error, the mean of (output − target)² over an example's outputs.

    Args:
        outputs: ``[B, *]``.
        targets: Of the same shape; ``[B, *]`` fits outputs ``[B, *, 1]`` and ``[B, 1, *]`` too.

    Returns:
        ``[B]``.

    Raises:
        LossError: The shapes do not fit.
    """
    return _in_float64(_squared_error, outputs, _like(outputs, targets, "mse"))


def bce(outputs: Tensor, targets: Tensor) -> Tensor:
    """Computes the binary cross-entropy of scores before the sigmoid (logits), in nats.

    Args:
        outputs: Scores before the sigmoid, ``[B, *]``.
        targets: Probabilities 0…1, of the same shape; ``[B, *]`` fits outputs ``[B, *, 1]`` and
            ``[B, 1, *]`` too.

    Returns:
        ``[B]``, the mean over an example's outputs.

    Raises:
        LossError: The shapes do not fit.
    """
    return _in_float64(_binary_surprise, outputs, _like(outputs, targets, "bce"))


def causal_lm(outputs: Tensor, targets: Tensor) -> Tensor:
    """Computes the cross-entropy of each next token, in nats, over a sequence's tokens that count.

    As in Hugging Face the position t predicts the target t + 1: targets are the tokens themselves.
    Half-precision scores are taken into float32 a few tokens at a time.

    Args:
        outputs: Scores before softmax, ``[B, T, V]``.
        targets: Tokens 0…V−1, ``[B, T]``; −100 where none counts.

    Returns:
        ``[B]``: for each sequence the mean over its tokens that count; nan where none does.

    Raises:
        LossError: The shapes do not fit.
    """
    _check_tokens(outputs, targets, "causal_lm", most=3)
    # The last position predicts nothing that is known.
    return _over_tokens(outputs, F.pad(targets[:, 1:], (0, 1), value=IGNORED))


def token_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Computes the cross-entropy of each token itself, in nats, over a sequence's labels.

    As in Hugging Face's masked language models and classifiers of tokens, the position t is
    scored by the target t. Half-precision scores are taken into float32 a few tokens at a time.

    Args:
        outputs: Scores before softmax, ``[B, T, C]``; or ``[B, *, C]`` for further dimensions.
        targets: Classes 0…C−1, ``[B, T]`` or ``[B, *]``; −100 where none counts.

    Returns:
        ``[B]``: for each sequence the mean over its labels that count; nan where none does.

    Raises:
        LossError: The shapes do not fit.
    """
    _check_tokens(outputs, targets, "token_cross_entropy", most=outputs.ndim)
    return _over_tokens(outputs, targets)


def _check_tokens(outputs: Tensor, targets: Tensor, loss: str, *, most: int) -> None:
    fits = 3 <= outputs.ndim <= most and outputs.shape[:-1] == targets.shape
    if targets.is_floating_point() or not fits:
        raise LossError(
            f"{loss} needs outputs [B, T, V] and token ids [B, T], not {_form(outputs)} and "
            f"{_form(targets)}",
            "Choose another --loss, or a model with scores for every token",
        )


def _over_tokens(outputs: Tensor, targets: Tensor) -> Tensor:
    """Computes the mean surprise at a sequence's targets that count, a few tokens at a time."""
    counts = targets != IGNORED
    scores, tokens = outputs.flatten(0, -2), targets.masked_fill(~counts, 0).flatten()
    step = max(1, _CHUNK // max(1, outputs.shape[-1]))
    # Not in float64, which takes three times as long over the words of a vocabulary.
    wide = torch.promote_types(outputs.dtype, torch.float32)
    losses = [
        _surprise(scores[i : i + step].to(wide), tokens[i : i + step])
        for i in range(0, len(tokens), step)
    ]
    each = torch.cat(losses).view(targets.shape)
    # Not a product: scores that are infinite or not a number count for nothing there.
    return each.masked_fill(~counts, 0).flatten(1).sum(1) / counts.flatten(1).sum(1)


def _in_float64(
    loss: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, targets: Tensor
) -> Tensor:
    """Computes the mean loss of each example in float64, a few examples at a time."""
    # MPS has no float64.
    narrow = outputs.device.type == "mps"
    wide = torch.promote_types(outputs.dtype, torch.float32 if narrow else torch.float64)
    step = max(1, _CHUNK // max(1, outputs[0].numel()))
    parts = [
        per_example_mean(loss(some.to(wide), own))
        for some, own in zip(torch.split(outputs, step), torch.split(targets, step), strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _surprise(scores: Tensor, classes: Tensor) -> Tensor:
    """Computes −log softmax(scores)[class], the classes in dimension 1."""
    # As log(1 + Σ exp(z_j − z_t)) over the other classes j: log softmax itself rounds to 0 where
    # one class is nearly sure. The lowest number and not −∞, which would make gradients nan.
    index = classes.long().unsqueeze(1)
    right = scores.gather(1, index).squeeze(1)
    others = scores.scatter(1, index, torch.finfo(scores.dtype).min).logsumexp(1)
    found = F.softplus(others - right, threshold=_LINEAR)
    # The softmax of a score that is infinite is not a number.
    return found.masked_fill(right == math.inf, math.nan)


def _squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets.to(outputs.dtype)).square()


def _binary_surprise(scores: Tensor, targets: Tensor) -> Tensor:
    """Computes −t log σ(z) − (1 − t) log σ(−z), where −log σ(z) = log(1 + e^−z)."""
    targets = targets.to(scores.dtype)
    one, zero = (F.softplus(z, threshold=_LINEAR) for z in (-scores, scores))
    return targets * one + (1 - targets) * zero


def perplexity(outputs: Tensor, targets: Tensor) -> Tensor:
    """Computes the perplexity, exp of the mean causal_lm loss over sequences.

    Args:
        outputs: Scores before softmax, ``[B, T, V]``.
        targets: Tokens 0…V−1, ``[B, T]``; −100 where none counts.

    Returns:
        ``[B]``, in nats: what the mean is taken of. `of_mean` makes the perplexity of that.
    """
    return causal_lm(outputs, targets)


def of_mean(metric: PerExample, mean: float) -> float:
    """Finishes a metric that is no mean itself, but a function of one.

    Args:
        metric: The metric.
        mean: Its mean over all examples.

    Returns:
        The metric's value: the mean itself, but for perplexity.
    """
    if metric is not perplexity:
        return mean
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


def accuracy(outputs: Tensor, targets: Tensor, *, dim: int | None = None) -> Tensor:
    """Tells which examples are classified right.

    Args:
        outputs: Scores, ``[B, C, *]`` or ``[B, *, C]``; the highest is the answer. With C = 1, or
            no C, a positive score answers 1.
        targets: Classes, ``[B, *]``.
        dim: The dimension of the classes, 1 or −1; None takes that of the loss, or else the one
            that fits the targets.

    Returns:
        1 or 0 for each example, ``[B]``; the share of right ones over any further dimensions.

    Raises:
        LossError: The shapes do not fit, or both dimensions fit and ``dim`` is None.
    """
    if outputs.shape == targets.shape:
        answers = outputs > 0
    elif (dim := _class_dim(outputs, targets, "accuracy", dim)) is None:
        raise LossError(
            f"accuracy needs outputs [B, C] and targets [B], not {_form(outputs)} and "
            f"{_form(targets)}",
            "Choose another --metric, or none",
        )
    elif outputs.shape[dim] == 1:
        answers = outputs.squeeze(dim) > 0
    else:
        scores, answers = outputs.max(dim)
        # Scores that are not numbers answer nothing; argmax would answer some class.
        answers = answers.masked_fill(scores.isnan(), -1)
    return per_example_mean((answers == targets).to(torch.float32))


def per_example_mean(values: Tensor) -> Tensor:
    """Reduces to one number an example.

    Args:
        values: ``[B, *]``.

    Returns:
        ``[B]``: the mean over all dimensions but the first.
    """
    return values.flatten(1).mean(1) if values.ndim > 1 else values


def _class_dim(outputs: Tensor, targets: Tensor, name: str, dim: int | None) -> int | None:
    """Finds the dimension of the classes, 1 or −1; None where the shapes do not fit."""
    if dim not in {None, 1, -1}:
        raise LossError(f"{name}: dim={dim} is not a dimension of classes", "Give dim=1 or dim=-1")
    first = outputs.ndim > 1 and (len(outputs), *outputs.shape[2:]) == targets.shape
    if outputs.ndim <= 2:
        return 1 if first else None
    last = outputs.shape[:-1] == targets.shape
    if dim is not None:
        return dim if (first if dim == 1 else last) else None
    # With a single class both readings are the same.
    if first and last and outputs.shape[1] > 1:
        option = "--loss" if name == "cross_entropy" else "--metric"
        tokens = "token_cross_entropy" if name == "cross_entropy" else f"{name},dim=-1"
        rest = ", ".join(["T"] if targets.ndim == 2 else [f"T{i}" for i in range(1, targets.ndim)])
        raise LossError(
            f"{name} finds the classes of outputs {_form(outputs)} and targets {_form(targets)} in "
            "dimension 1 as well as in the last dimension",
            f"Give {option} {name},dim=1 for outputs [N, C, {rest}], or {option} {tokens} for "
            f"outputs [N, {rest}, C]",
        )
    return 1 if first else -1 if last else None


def function_of(function: PerExample) -> PerExample:
    """Finds the loss or metric itself where it has options.

    Args:
        function: A loss or a metric; with options it is a `functools.partial`.

    Returns:
        The function without its options.
    """
    return function.func if isinstance(function, partial) else function


def _options_of(function: PerExample) -> dict[str, Any]:
    return dict(function.keywords) if isinstance(function, partial) else {}


def classes_of(loss: PerExample, outputs: Tensor, targets: Tensor) -> int | None:
    """Counts the classes that a loss reads in a model's outputs.

    Args:
        loss: The loss.
        outputs: The outputs of a batch.
        targets: Its targets.

    Returns:
        How many scores a target chooses from; None where the loss reads no classes, or the shapes
        do not fit.

    Raises:
        LossError: Two dimensions fit, and the loss does not say which is meant.
    """
    function = function_of(loss)
    if function is cross_entropy and not _one_score_a_target(outputs, targets):
        dim = _class_dim(outputs, targets, "cross_entropy", _options_of(loss).get("dim"))
        return None if dim is None else outputs.shape[dim]
    if function in OF_TOKENS and outputs.ndim > 2 and outputs.shape[:-1] == targets.shape:
        return outputs.shape[-1]
    return None


def class_dim_of(loss: PerExample) -> int | None:
    """Tells which dimension of the outputs a loss takes for the classes, whatever the shapes.

    Args:
        loss: The loss.

    Returns:
        1 or −1; None where the shapes decide, or the loss has no classes.
    """
    function = function_of(loss)
    if function is not cross_entropy:
        return -1 if function in OF_TOKENS else None
    dim: int | None = _options_of(loss).get("dim")
    return dim


class Doubt(enum.Enum):
    """A reason to think that a loss or a metric is the wrong one, as a note says it."""

    LABELS = (
        "the targets are all 0 or 1, and the default for float targets is mse: if they are "
        "labels, give --loss bce, which takes scores before the sigmoid"
    )
    SIGMOID = (
        "the outputs of the first batch all lie in 0…1, and bce takes scores before the sigmoid: "
        "if they are probabilities, take the sigmoid out of the model or give a --loss of "
        "probabilities"
    )
    SOFTMAX = (
        "the outputs of the first batch are probabilities with the sum 1, and the loss takes "
        "scores before the softmax: take the softmax out of the model or give a --loss of "
        "probabilities"
    )
    THRESHOLD = (
        "the outputs of the first batch all lie in 0…1, and accuracy takes a score above 0 for "
        "the label 1: if they are probabilities, give a --metric of probabilities or none"
    )


def doubts_of(
    functions: Sequence[PerExample], outputs: Tensor, targets: Tensor
) -> frozenset[Doubt]:
    """Finds signs that a loss or a metric is not meant for these outputs and targets.

    Args:
        functions: The loss, then the metrics, all of which take the outputs and targets.
        outputs: The outputs of a batch.
        targets: Its targets.

    Returns:
        The doubts.
    """
    loss, *metrics = map(function_of, functions)
    found = set()
    single = _one_score_a_target(outputs, targets)
    if loss is mse and _are_labels(targets) and bool(targets.any() and (targets == 0).any()):
        found.add(Doubt.LABELS)
    if loss is bce and _are_shares(outputs):
        found.add(Doubt.SIGMOID)
    elif accuracy in metrics and single and _are_shares(outputs):
        found.add(Doubt.THRESHOLD)
    if loss is cross_entropy or loss in OF_TOKENS:
        dim = 1
        if outputs.ndim > 2:
            dim = class_dim_of(functions[0]) or _class_dim(outputs, targets, "", None) or 1
        if _are_shares(outputs) and outputs.shape[dim] > 1:
            # Half precision has three digits.
            sums = outputs.sum(dim, dtype=torch.float32)
            if bool(((sums - 1).abs() < _NEAR_ONE).all()):
                found.add(Doubt.SOFTMAX)
    return frozenset(found)


def _are_labels(targets: Tensor) -> bool:
    return bool(((targets == 0) | (targets == 1)).all())


def _are_shares(outputs: Tensor) -> bool:
    """Tells whether all lie in 0…1; where they are all 0, as those of zero weights, it says no."""
    inside = outputs.is_floating_point() and ((outputs >= 0) & (outputs <= 1)).all()
    return bool(inside and outputs.any())


def _one_score_a_target(outputs: Tensor, targets: Tensor) -> bool:
    return outputs.shape in {targets.shape, (*targets.shape, 1)} or (
        outputs.shape == (*targets.shape[:1], 1, *targets.shape[1:])
    )


def _like(outputs: Tensor, targets: Tensor, loss: str) -> Tensor:
    if _one_score_a_target(outputs, targets):
        targets = targets.reshape(outputs.shape)
    if outputs.shape != targets.shape:
        raise LossError(
            f"{loss} needs outputs and targets of one shape, not {_form(outputs)} and "
            f"{_form(targets)}",
            "Choose another --loss, or a model with one output a target",
        )
    return targets


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


LOSSES: dict[str, PerExample] = {
    "cross_entropy": cross_entropy,
    "mse": mse,
    "bce": bce,
    "causal_lm": causal_lm,
    "token_cross_entropy": token_cross_entropy,
}
METRICS: dict[str, PerExample] = {"accuracy": accuracy, "perplexity": perplexity}

OF_TOKENS = frozenset({causal_lm, token_cross_entropy})
"""The losses with a target for each token, the scores of which are the last dimension."""

TAKES_HALF = frozenset({*LOSSES.values(), *METRICS.values()})
"""Those that take half-precision outputs as they are; others get them in float32."""
