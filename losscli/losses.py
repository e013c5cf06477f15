"""Losses and metrics, each per example: outputs and targets in, one number an example out."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from losscli.errors import LossError

__all__ = [
    "IGNORED",
    "LOSSES",
    "METRICS",
    "TAKES_HALF",
    "PerExample",
    "accuracy",
    "bce",
    "causal_lm",
    "cross_entropy",
    "mse",
    "of_mean",
    "perplexity",
    "token_cross_entropy",
]

PerExample = Callable[..., Tensor]

IGNORED = -100
"""The target that stands for none, such as that of padding; as PyTorch and Hugging Face have it."""

# Scores of a vocabulary that are taken into a wider type at once: 16 MiB of float32.
_CHUNK = 1 << 22


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Computes the cross-entropy of softmax outputs, −log softmax(outputs)[target], in nats.

    Args:
        outputs: Scores before softmax, ``[B, C, *]``.
        targets: Classes 0…C−1, ``[B, *]``.

    Returns:
        ``[B]``; the mean over any further dimensions.

    Raises:
        LossError: The shapes do not fit.
    """
    if targets.is_floating_point() or not _one_score_a_class(outputs, targets):
        raise LossError(
            f"cross_entropy needs outputs [B, C] and integer targets [B], not {_form(outputs)} "
            f"and {_form(targets)}",
            _cure_of_classes(targets)
            or "Choose another --loss, or a model with one output a class",
        )
    return per_example_mean(F.cross_entropy(outputs, targets, reduction="none"))


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Computes the squared error, the mean of (output − target)² over an example's outputs.

    Args:
        outputs: ``[B, *]``.
        targets: Of the same shape; ``[B]`` fits outputs ``[B, 1]`` too.

    Returns:
        ``[B]``.

    Raises:
        LossError: The shapes do not fit.
    """
    return per_example_mean((outputs - _like(outputs, targets, "mse")).square())


def bce(outputs: Tensor, targets: Tensor) -> Tensor:
    """Computes the binary cross-entropy of sigmoid outputs, in nats.

    Args:
        outputs: Scores before the sigmoid, ``[B, *]``.
        targets: Probabilities 0…1, of the same shape; ``[B]`` fits outputs ``[B, 1]`` too.

    Returns:
        ``[B]``, the mean over an example's outputs.

    Raises:
        LossError: The shapes do not fit.
    """
    targets = _like(outputs, targets, "bce")
    return per_example_mean(F.binary_cross_entropy_with_logits(outputs, targets, reduction="none"))


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
    _check_tokens(outputs, targets, "causal_lm")
    # The last position predicts nothing that is known.
    return _over_tokens(outputs, F.pad(targets[:, 1:], (0, 1), value=IGNORED))


def token_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Computes the cross-entropy of each token itself, in nats, over a sequence's labels.

    As in Hugging Face's masked language models and classifiers of tokens, the position t is
    scored by the target t. Half-precision scores are taken into float32 a few tokens at a time.

    Args:
        outputs: Scores before softmax, ``[B, T, C]``.
        targets: Classes 0…C−1, ``[B, T]``; −100 where none counts.

    Returns:
        ``[B]``: for each sequence the mean over its labels that count; nan where none does.

    Raises:
        LossError: The shapes do not fit.
    """
    _check_tokens(outputs, targets, "token_cross_entropy")
    return _over_tokens(outputs, targets)


def _check_tokens(outputs: Tensor, targets: Tensor, loss: str) -> None:
    if targets.is_floating_point() or outputs.ndim != 3 or outputs.shape[:2] != targets.shape:
        raise LossError(
            f"{loss} needs outputs [B, T, V] and token ids [B, T], not {_form(outputs)} and "
            f"{_form(targets)}",
            _cure_of_classes(targets)
            or "Choose another --loss, or a model with scores for every token",
        )


def _over_tokens(outputs: Tensor, targets: Tensor) -> Tensor:
    """Computes the mean surprise at a sequence's targets that count, a few tokens at a time."""
    counts = targets != IGNORED
    scores, tokens = outputs.flatten(0, 1), targets.clamp(min=0).flatten()
    step = max(1, _CHUNK // max(1, outputs.shape[2]))
    losses = [
        _surprise(scores[i : i + step], tokens[i : i + step]) for i in range(0, len(tokens), step)
    ]
    each = torch.cat(losses).view(targets.shape)
    # Not a product: scores that are infinite or not a number count for nothing there.
    return each.masked_fill(~counts, 0).sum(1) / counts.sum(1)


def _surprise(scores: Tensor, tokens: Tensor) -> Tensor:
    """Computes −log softmax(scores)[token] for each of some tokens."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    right = scores.gather(1, tokens.unsqueeze(1)).squeeze(1)
    return scores.to(wide).logsumexp(1) - right.to(wide)


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


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Tells which examples are classified right.

    Args:
        outputs: Scores, ``[B, C, *]``; the highest is the answer. With C = 1, or no C, a positive
            score answers 1.
        targets: Classes, ``[B, *]``.

    Returns:
        1 or 0 for each example, ``[B]``; the share of right ones over any further dimensions.

    Raises:
        LossError: The shapes do not fit.
    """
    if outputs.shape == targets.shape:
        answers = outputs > 0
    elif not _one_score_a_class(outputs, targets):
        raise LossError(
            f"accuracy needs outputs [B, C] and targets [B], not {_form(outputs)} and "
            f"{_form(targets)}",
            "Choose another --metric, or none",
        )
    elif outputs.shape[1] == 1:
        answers = outputs.squeeze(1) > 0
    else:
        scores, answers = outputs.max(1)
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


def _one_score_a_class(outputs: Tensor, targets: Tensor) -> bool:
    return outputs.ndim > 1 and (len(outputs), *outputs.shape[2:]) == targets.shape


def _like(outputs: Tensor, targets: Tensor, loss: str) -> Tensor:
    if outputs.shape == (*targets.shape, 1):
        targets = targets.unsqueeze(-1)
    if outputs.shape != targets.shape:
        classes = _one_score_a_class(outputs, targets) and outputs.shape[1] > 1
        raise LossError(
            f"{loss} needs outputs and targets of one shape, not {_form(outputs)} and "
            f"{_form(targets)}",
            (classes and _cure_of_classes(targets))
            or "Choose another --loss, or a model with one output a target",
        )
    return targets.to(outputs.dtype)


def _cure_of_classes(targets: Tensor) -> str:
    """Explains classes that are stored as floating-point numbers; empty for other targets."""
    if not targets.is_floating_point() or not bool(((targets >= 0) & (targets % 1 == 0)).all()):
        return ""
    return (
        "The targets are whole numbers: if they are classes, convert them with .long(), or store "
        "integers in the file"
    )


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

TAKES_HALF = frozenset({causal_lm, token_cross_entropy, perplexity, accuracy})
"""Those that take half-precision scores as they are; others get them in float32."""
