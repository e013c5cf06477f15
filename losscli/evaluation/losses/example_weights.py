"""The weights of examples in the mean of a loss or a metric."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from losscli.evaluation.losses.built_in import (
    PerExample,
    causal_lm,
    cross_entropy,
    function_of,
    nll,
    options_of,
    per_example_mean,
    token_cross_entropy,
)
from losscli.evaluation.losses.class_targets import ClassWeights, class_dim, class_weights, counted
from losscli.evaluation.losses.metrics import accuracy, counted_in_accuracy, perplexity

__all__ = ["weights_of"]


def weights_of(function: PerExample, outputs: Tensor, targets: Tensor) -> Tensor | None:
    """Returns the weights of examples in the mean of a loss or metric.

    With values v and weights w per example, the mean is Σv/Σw.

    Args:
        function: The loss or metric.
        outputs: The outputs of a batch; only their shape matters.
        targets: Its targets.

    Returns:
        The weight of each example, ``[B]``, in float64 if the device has it; None if all are 1.
        With `cross_entropy` it is the mean over the example's targets of the weights of their
        classes, 0 for ignored targets. With a loss of tokens and with metrics it is 1, or 0 for an
        example with ignored targets only.
    """
    weights = _WEIGHTS.get(function_of(function))
    return None if weights is None else weights(outputs, targets, **options_of(function))


def _class_loss_weights(
    outputs: Tensor,
    targets: Tensor,
    *,
    dim: int | None = None,
    weight: ClassWeights | None = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,  # noqa: ARG001 - torch divides by the same sum
) -> Tensor | None:
    dim = class_dim(outputs[:1], targets[:1], "cross_entropy", dim)
    # For probabilities torch takes the unweighted mean.
    if targets.is_floating_point() or dim is None:
        return None
    classes = outputs.shape[dim]
    counts = counted(targets, classes, ignore_index)
    weights = class_weights(weight, classes, _sum_type(targets), targets.device)
    if weights is None:
        return per_example_mean(counts.to(_sum_type(targets)))
    return per_example_mean(weights[targets.long().masked_fill(~counts, 0)] * counts)


def _token_loss_weights(
    outputs: Tensor,
    targets: Tensor,
    *,
    weight: ClassWeights | None = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,  # noqa: ARG001
) -> Tensor:
    counts = counted(targets, None, ignore_index)
    weights = class_weights(weight, outputs.shape[-1], _sum_type(targets), targets.device)
    if weights is not None:
        counts &= weights[targets.long().masked_fill(~counts, 0)] != 0
    return counts.flatten(1).any(1).to(_sum_type(targets))


def _next_token_loss_weights(outputs: Tensor, targets: Tensor, **options: Any) -> Tensor:
    return _token_loss_weights(outputs, targets[:, 1:], **options)


def _accuracy_weights(
    outputs: Tensor,
    targets: Tensor,
    *,
    dim: int | None = None,
    ignore_index: int | None = None,
    soft: bool = False,
) -> Tensor | None:
    if soft and targets.is_floating_point():
        return None
    counts = counted_in_accuracy(outputs, targets, dim, ignore_index)
    return counts.reshape(len(counts), -1).any(1).to(_sum_type(targets))


def _sum_type(targets: Tensor) -> torch.dtype:
    # MPS has no float64.
    return torch.float32 if targets.device.type == "mps" else torch.float64


_WEIGHTS: dict[PerExample, Callable[..., Tensor | None]] = {
    cross_entropy: _class_loss_weights,
    nll: partial(_class_loss_weights, dim=1),
    token_cross_entropy: _token_loss_weights,
    causal_lm: _next_token_loss_weights,
    perplexity: _next_token_loss_weights,
    accuracy: _accuracy_weights,
}
