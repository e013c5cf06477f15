"""Losses, each per example: outputs and targets in, one number per example out.

Losses are computed in float64, those over a vocabulary in float32, and by formulas without
cancellation: a loss is as exact as the outputs that it is computed from, however small it is. Only
a cross-entropy with probabilities as targets is exact relative to the scores alone.

If examples have weights (`weights_of`), the mean is the sum of the losses over that of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from losscli.errors import LossError
from losscli.evaluation.losses.class_targets import (
    IGNORED,
    ClassWeights,
    advise_integers,
    are_labels,
    class_dim,
    class_weights,
    counted,
    describe,
    mark_ignored,
    one_score_per_target,
    probability_dim,
)

__all__ = [
    "LOSSES",
    "TOKEN_LOSSES",
    "PerExample",
    "bce",
    "causal_lm",
    "cross_entropy",
    "function_of",
    "mse",
    "nll",
    "on_device",
    "options_of",
    "per_example_mean",
    "token_cross_entropy",
]

PerExample = Callable[..., Tensor]

# Outputs that are converted to a wider type at once: 16 MiB of float64.
_CHUNK = 1 << 21

# The fewest rows of a deferred product that are computed at once.
_ROWS = 128

# For x > 40, log(1 + e^x) is x to the precision of float64.
_SOFTPLUS_THRESHOLD = 40


def cross_entropy(
    outputs: Tensor,
    targets: Tensor,
    *,
    dim: int | None = None,
    weight: ClassWeights | None = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Computes the cross-entropy, −log softmax(scores)[target], of scores before the softmax.

    With ``weight`` and ``label_smoothing`` it is that of `torch.nn.CrossEntropyLoss`.

    Args:
        outputs: Scores before the softmax, ``[B, C, *]`` or ``[B, *, C]``.
        targets: Classes 0…C−1, ``[B, *]``; or the probabilities of the classes, of the shape of
            the outputs. Targets of −100 are ignored, and those of 255 where C ≤ 255.
        dim: The dimension of the classes, 1 or −1; None takes the one that fits the targets.
        weight: The weight of each class, ``[C]``; each term is multiplied by it.
        ignore_index: A further target that is ignored.
        label_smoothing: The share of a target that is spread over all classes.

    Returns:
        ``[B]``, in nats: the mean over any further dimensions, ignored targets counting as zeros.
        Its mean over examples divided by that of `weights_of` is torch's, Σwl/Σw.

    Raises:
        LossError: The shapes do not fit, or both dimensions fit and ``dim`` is None.
    """
    if targets.is_floating_point() and outputs.ndim > 1 and outputs.shape == targets.shape:
        own = probability_dim(targets, dim)
        return _in_float64(
            partial(_soft_cross_entropy, weight=weight, smoothing=label_smoothing),
            outputs.movedim(own, 1),
            targets.movedim(own, 1),
        )
    if not targets.is_floating_point() and one_score_per_target(outputs, targets):
        labels = "bce for labels 0 and 1, or --loss " if are_labels(targets) else ""
        raise LossError(
            f"cross_entropy needs a score for each class, and outputs {describe(outputs)} have one "
            f"for each of the targets {describe(targets)}",
            f"Give --loss {labels}mse for targets that are quantities",
        )
    dim = class_dim(outputs, targets, "cross_entropy", dim)
    if targets.is_floating_point() or dim is None:
        raise LossError(
            f"cross_entropy needs outputs [B, C] and integer targets [B], not {describe(outputs)} "
            f"and {describe(targets)}",
            advise_integers(targets)
            or "Choose another --loss, or a model with one output per class",
        )
    targets = mark_ignored(targets, outputs.shape[dim], ignore_index)
    if dim == -1:
        return per_example_mean(_token_losses(outputs, targets, weight, label_smoothing))
    return _in_float64(
        partial(_negative_log_softmax, weight=weight, smoothing=label_smoothing), outputs, targets
    )


def nll(
    outputs: Tensor,
    targets: Tensor,
    *,
    weight: ClassWeights | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    """Computes −outputs[target], the loss of `torch.nn.NLLLoss`.

    Args:
        outputs: Logarithms of probabilities, ``[B, C, *]``.
        targets: As those of `cross_entropy`.
        weight: The same.
        ignore_index: The same.

    Returns:
        ``[B]``, as `cross_entropy`.

    Raises:
        LossError: The shapes do not fit.
    """
    if targets.is_floating_point() or class_dim(outputs, targets, "NLLLoss", 1) is None:
        raise LossError(
            f"NLLLoss needs outputs [B, C] and integer targets [B], not {describe(outputs)} and "
            f"{describe(targets)}",
            "Choose another --loss, or a model with one output per class",
        )
    targets = mark_ignored(targets, outputs.shape[1], ignore_index)
    return _in_float64(partial(_negative_score, weight=weight), outputs, targets)


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
    return _in_float64(_squared_error, outputs, _targets_like(outputs, targets, "mse"))


def bce(
    outputs: Tensor,
    targets: Tensor,
    *,
    weight: ClassWeights | None = None,
    pos_weight: ClassWeights | None = None,
) -> Tensor:
    """Computes the binary cross-entropy of scores before the sigmoid (logits), in nats.

    Args:
        outputs: Scores before the sigmoid, ``[B, *]``.
        targets: Probabilities 0…1, of the same shape; ``[B, *]`` fits outputs ``[B, *, 1]`` and
            ``[B, 1, *]`` too.
        weight: Multiplies the loss: a number, or one number per entry of the last dimension.
        pos_weight: Multiplies the part of the loss of positive targets in the same way.

    Returns:
        ``[B]``, the mean over an example's outputs; as in torch it is not divided by the weights.

    Raises:
        LossError: The shapes do not fit.
    """
    targets = _targets_like(outputs, targets, "bce")
    return _in_float64(
        partial(_binary_cross_entropy, weight=weight, pos_weight=pos_weight), outputs, targets
    )


def causal_lm(
    outputs: Tensor,
    targets: Tensor,
    *,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Computes the mean cross-entropy of the next tokens of each sequence, in nats.

    As in Hugging Face the position t predicts the target t + 1: targets are the tokens themselves.
    Half-precision scores are converted to float32 a few tokens at a time.

    Args:
        outputs: Scores before softmax, ``[B, T, V]``.
        targets: Tokens 0…V−1, ``[B, T]``; −100 is ignored.
        ignore_index: A further target that is ignored.
        label_smoothing: The share of a target that is spread over all tokens.

    Returns:
        ``[B]``: for each sequence the mean over its tokens that are not ignored; 0 if all are, and
        then the sequence has no weight (`weights_of`).

    Raises:
        LossError: The shapes do not fit.
    """
    _check_tokens(outputs, targets, "causal_lm", most=3)
    # The last position has no next token.
    targets = F.pad(targets[:, 1:], (0, 1), value=IGNORED)
    return _mean_over_tokens(outputs, targets, None, ignore_index, label_smoothing)


def token_cross_entropy(
    outputs: Tensor,
    targets: Tensor,
    *,
    weight: ClassWeights | None = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Computes the mean cross-entropy of the labels of each sequence, in nats.

    As in Hugging Face's masked language models and token classifiers, the position t predicts the
    target t. Half-precision scores are converted to float32 a few tokens at a time.

    Args:
        outputs: Scores before softmax, ``[B, T, C]``; or ``[B, *, C]`` for further dimensions.
        targets: Classes 0…C−1, ``[B, T]`` or ``[B, *]``; −100 is ignored.
        weight: The weight of each class, ``[C]``, in the mean over a sequence's labels.
        ignore_index: A further target that is ignored.
        label_smoothing: The share of a target that is spread over all classes.

    Returns:
        ``[B]``: for each sequence the mean over its labels that are not ignored; 0 if all are, and
        then the sequence has no weight (`weights_of`).

    Raises:
        LossError: The shapes do not fit.
    """
    _check_tokens(outputs, targets, "token_cross_entropy", most=outputs.ndim)
    return _mean_over_tokens(outputs, targets, weight, ignore_index, label_smoothing)


def _check_tokens(outputs: Tensor, targets: Tensor, loss: str, *, most: int) -> None:
    fits = 3 <= outputs.ndim <= most and outputs.shape[:-1] == targets.shape
    if targets.is_floating_point() or not fits:
        raise LossError(
            f"{loss} needs outputs [B, T, V] and token ids [B, T], not {describe(outputs)} and "
            f"{describe(targets)}",
            advise_integers(targets)
            or "Choose another --loss, or a model with scores for every token",
        )


def _mean_over_tokens(
    outputs: Tensor,
    targets: Tensor,
    weight: ClassWeights | None,
    ignore_index: int | None,
    smoothing: float,
) -> Tensor:
    """Computes the mean cross-entropy of each sequence over the targets that are not ignored."""
    counts = counted(targets, None, ignore_index)
    tokens = targets.long().masked_fill(~counts, IGNORED)
    each = _token_losses(outputs, tokens, weight, smoothing)
    own = class_weights(weight, outputs.shape[-1], each.dtype, each.device)
    share = counts if own is None else own[tokens.masked_fill(~counts, 0)] * counts
    weights = share.flatten(1).sum(1)
    # Not 0/0 for a sequence without targets, which would have a derivative of nan.
    total = each.flatten(1).sum(1).masked_fill(weights == 0, 0)
    return total / weights.masked_fill(weights == 0, 1)


def _token_losses(
    outputs: Tensor, tokens: Tensor, weight: ClassWeights | None, smoothing: float
) -> Tensor:
    """Computes the cross-entropy of each token, ``[B, *]``, in pieces; 0 for ignored ones."""
    scores, flat = outputs.flatten(0, -2), tokens.flatten()
    step = max(1, _CHUNK // max(1, outputs.shape[-1]))
    # A deferred product is computed in blocks, with more rows: products with few are slow.
    block = step * math.ceil(_ROWS / step)
    # Not in float64, which takes three times as long over a vocabulary.
    wide = torch.promote_types(outputs.dtype, torch.float32)
    losses = [
        _negative_log_softmax(some.to(wide), own, weight, smoothing)
        for i in range(0, len(flat), block)
        for some, own in zip(
            torch.split(scores[i : i + block], step),
            torch.split(flat[i : i + block], step),
            strict=True,
        )
    ]
    return torch.cat(losses).view(tokens.shape)


def _in_float64(
    loss: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, targets: Tensor
) -> Tensor:
    """Computes the mean loss of each example in float64, a few examples at a time."""
    # MPS has no float64.
    narrow = outputs.device.type == "mps"
    wide = torch.promote_types(outputs.dtype, torch.float32 if narrow else torch.float64)
    step = max(1, _CHUNK // max(1, math.prod(outputs.shape[1:])))
    if len(outputs) <= step:
        return per_example_mean(loss(outputs.to(wide), targets))
    parts = [
        per_example_mean(loss(some.to(wide), own))
        for some, own in zip(torch.split(outputs, step), torch.split(targets, step), strict=True)
    ]
    return torch.cat(parts)


def _negative_log_softmax(
    scores: Tensor, classes: Tensor, weight: ClassWeights | None, smoothing: float
) -> Tensor:
    """Computes −w log softmax(scores)[class], the classes in dimension 1; 0 where ignored."""
    own = class_weights(weight, scores.shape[1], scores.dtype, scores.device)
    if smoothing:
        # With smoothing no loss is small, so cancellation does not matter.
        return F.cross_entropy(
            scores, classes, weight=own, label_smoothing=smoothing, reduction="none"
        )
    ignored = classes == IGNORED
    classes = classes.masked_fill(ignored, 0)
    # As log(1 + Σ exp(z_j − z_t)) over the other classes j: log softmax itself rounds to 0 if the
    # target has a probability near 1. The lowest number and not −∞, which makes gradients nan.
    index = classes.long().unsqueeze(1)
    right = scores.gather(1, index).squeeze(1)
    others = scores.scatter(1, index, torch.finfo(scores.dtype).min).logsumexp(1)
    losses = F.softplus(others - right, threshold=_SOFTPLUS_THRESHOLD)
    # The softmax of an infinite score is nan.
    losses = losses.masked_fill(right == math.inf, math.nan)
    # Not multiplied by 0: the scores of ignored targets may be infinite or nan.
    return (losses if own is None else own[classes] * losses).masked_fill(ignored, 0)


def _soft_cross_entropy(
    scores: Tensor, shares: Tensor, weight: ClassWeights | None, smoothing: float
) -> Tensor:
    """Computes −Σ w p log softmax(scores) for probabilities p of the classes in dimension 1."""
    own = class_weights(weight, scores.shape[1], scores.dtype, scores.device)
    return F.cross_entropy(
        scores, shares.to(scores.dtype), weight=own, label_smoothing=smoothing, reduction="none"
    )


def _negative_score(scores: Tensor, classes: Tensor, weight: ClassWeights | None) -> Tensor:
    own = class_weights(weight, scores.shape[1], scores.dtype, scores.device)
    return F.nll_loss(scores, classes, weight=own, reduction="none")


def _squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets.to(outputs.dtype)).square()


def _binary_cross_entropy(
    scores: Tensor, targets: Tensor, weight: ClassWeights | None, pos_weight: ClassWeights | None
) -> Tensor:
    """Computes −t log σ(z) − (1 − t) log σ(−z), where −log σ(z) = log(1 + e^−z)."""
    targets = targets.to(scores.dtype)
    one, zero = (F.softplus(z, threshold=_SOFTPLUS_THRESHOLD) for z in (-scores, scores))
    if (own := _output_weights(pos_weight, scores, "pos_weight")) is not None:
        one = own * one
    losses = targets * one + (1 - targets) * zero
    own = _output_weights(weight, scores, "weight")
    return losses if own is None else own * losses


def _output_weights(weight: ClassWeights | None, outputs: Tensor, key: str) -> Tensor | None:
    if weight is None:
        return None
    weight = torch.as_tensor(weight, dtype=outputs.dtype, device=outputs.device)
    # Weights of another length may also broadcast over the examples.
    if weight.numel() != 1 and (outputs.ndim < 2 or weight.shape != outputs.shape[-1:]):
        raise LossError(
            f"bce: {key} has {weight.numel()} numbers, and the model has outputs "
            f"{list(outputs.shape)}",
            "Give one number, or one per entry of the last dimension of the outputs",
        )
    return weight


def _targets_like(outputs: Tensor, targets: Tensor, loss: str) -> Tensor:
    if one_score_per_target(outputs, targets):
        targets = targets.reshape(outputs.shape)
    if outputs.shape != targets.shape:
        classes = outputs.ndim == targets.ndim + 1 and outputs.shape[1] > 1
        raise LossError(
            f"{loss} needs outputs and targets of one shape, not {describe(outputs)} and "
            f"{describe(targets)}",
            (classes and advise_integers(targets))
            or "Choose another --loss, or a model with one output per target",
        )
    return targets


def per_example_mean(values: Tensor) -> Tensor:
    """Averages ``[B, *]`` over all dimensions but the first."""
    return values.flatten(1).mean(1) if values.ndim > 1 else values


def on_device(function: PerExample, device: torch.device) -> PerExample:
    """Moves the weights in the options of a loss to a device, once instead of for every batch.

    Args:
        function: A loss or a metric.
        device: The device.

    Returns:
        The same function, with the weights as tensors in float64, on MPS in float32.
    """
    wide = torch.float32 if device.type == "mps" else torch.float64
    own = {
        key: torch.as_tensor(value, dtype=wide, device=device)
        for key, value in options_of(function).items()
        if key in _WEIGHTS and value is not None
    }
    return partial(function, **own) if own and function_of(function) in _WEIGHTED else function


def function_of(function: PerExample) -> PerExample:
    """Returns a loss or metric without its options, which a `functools.partial` holds."""
    return function.func if isinstance(function, partial) else function


def options_of(function: PerExample) -> dict[str, Any]:
    """Returns the options of a loss or metric, which a `functools.partial` holds."""
    return dict(function.keywords) if isinstance(function, partial) else {}


LOSSES: dict[str, PerExample] = {
    "cross_entropy": cross_entropy,
    "mse": mse,
    "bce": bce,
    "causal_lm": causal_lm,
    "token_cross_entropy": token_cross_entropy,
}

TOKEN_LOSSES = frozenset({causal_lm, token_cross_entropy})
"""The losses of tokens: a target for each, and scores in the last dimension."""

_WEIGHTS = frozenset({"weight", "pos_weight"})

_WEIGHTED = frozenset({cross_entropy, nll, bce, token_cross_entropy})
