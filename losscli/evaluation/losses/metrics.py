"""Metrics, each per example."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from losscli.errors import LossError, UsageError
from losscli.evaluation.losses.built_in import (
    PerExample,
    causal_lm,
    function_of,
    options_of,
    per_example_mean,
)
from losscli.evaluation.losses.class_targets import class_dim, counted, describe, probability_dim
from losscli.settings import convert

__all__ = [
    "METRICS",
    "accuracy",
    "counted_in_accuracy",
    "disagreement",
    "is_higher_better",
    "of_mean",
    "perplexity",
]


def accuracy(
    outputs: Tensor,
    targets: Tensor,
    *,
    dim: int | None = None,
    ignore_index: int | None = None,
    soft: bool = False,
) -> Tensor:
    """Computes whether each example is classified correctly.

    Args:
        outputs: Scores, ``[B, C, *]`` or ``[B, *, C]``; the prediction is the class with the
            highest score. With C = 1, or no C, a positive score predicts 1.
        targets: Classes, ``[B, *]``, or their probabilities, of which the highest is the class.
            Those that `cross_entropy` ignores are ignored.
        dim: The dimension of the classes, 1 or −1; None takes that of the loss, or else the one
            that fits the targets.
        ignore_index: A further target that is ignored.
        soft: Whether targets of the shape of the outputs are probabilities of classes.

    Returns:
        1 or 0 for each example, ``[B]``. Over further dimensions the share of correct predictions
        among targets that are not ignored, 0 if all are. nan if a score of such a target is nan.

    Raises:
        LossError: The shapes do not fit, or both dimensions fit and ``dim`` is None.
    """
    probabilities = _are_probabilities(outputs, targets, soft=soft)
    scores, predictions = _predict(outputs, targets, dim, probabilities=probabilities)
    labels = targets.argmax(probability_dim(targets, dim)) if probabilities else targets
    correct = (predictions == labels).to(torch.float32).masked_fill(scores.isnan(), math.nan)
    if probabilities:
        return per_example_mean(correct)
    return _mean_of_counted(correct, outputs, targets, dim, ignore_index)


def disagreement(function: PerExample, outputs: Tensor, other: Tensor, targets: Tensor) -> Tensor:
    """Computes the share of targets of each example for which two models predict other classes.

    Fort et al. 2019, arXiv 1912.02757.

    Args:
        function: `accuracy` with its options: it reads the predictions in the same way.
        outputs: The scores of one model.
        other: Those of the other, of the same shape.
        targets: The targets; only their shape matters, and which of them are ignored.

    Returns:
        ``[B]``. 0 if all targets of an example are ignored; nan if a score of a target that counts
        is nan.

    Raises:
        LossError: The outputs are not scores of classes.
    """
    options = options_of(function)
    dim, ignore_index = options.get("dim"), options.get("ignore_index")
    probabilities = _are_probabilities(outputs, targets, soft=options.get("soft", False))
    (scores, one), (other_scores, two) = (
        _predict(x, targets, dim, probabilities=probabilities) for x in (outputs, other)
    )
    unknown = scores.isnan() | other_scores.isnan()
    different = (one != two).to(torch.float32).masked_fill(unknown, math.nan)
    if probabilities:
        return per_example_mean(different)
    return _mean_of_counted(different, outputs, targets, dim, ignore_index)


def _are_probabilities(outputs: Tensor, targets: Tensor, *, soft: bool) -> bool:
    """Whether targets are probabilities of classes."""
    return soft and targets.is_floating_point() and outputs.shape == targets.shape


def _predict(
    outputs: Tensor, targets: Tensor, dim: int | None, *, probabilities: bool
) -> tuple[Tensor, Tensor]:
    """Returns the highest score for each target, nan if any is nan, and the predicted class."""
    if probabilities:
        highest, predictions = outputs.max(probability_dim(targets, dim))
        return highest, predictions
    if outputs.shape == targets.shape:
        return outputs, outputs > 0
    if (dim := class_dim(outputs, targets, "accuracy", dim)) is None:
        raise LossError(
            f"accuracy needs outputs [B, C] and targets [B], not {describe(outputs)} and "
            f"{describe(targets)}",
            "Choose another --metric, or none",
        )
    if outputs.shape[dim] == 1:
        scores = outputs.squeeze(dim)
        return scores, scores > 0
    # The maximum is nan if any score is.
    highest, predictions = outputs.max(dim)
    return highest, predictions


def _mean_of_counted(
    values: Tensor, outputs: Tensor, targets: Tensor, dim: int | None, ignore_index: int | None
) -> Tensor:
    """Averages over the targets of each example that are not ignored; 0 if all are."""
    ignored = ~counted_in_accuracy(outputs, targets, dim, ignore_index)
    values = values.masked_fill(ignored, 0)
    if values.ndim < 2:
        return values
    shares = per_example_mean((~ignored).to(torch.float32))
    # Exactly the mean if none is ignored.
    return per_example_mean(values) / shares.masked_fill(shares == 0, 1)


def counted_in_accuracy(
    outputs: Tensor, targets: Tensor, dim: int | None, ignore_index: int | None
) -> Tensor:
    """Returns a mask of the targets that count in an accuracy."""
    if outputs.shape[1:] == targets.shape[1:]:
        return counted(targets, None, ignore_index)
    dim = class_dim(outputs[:1], targets[:1], "accuracy", dim)
    return counted(targets, None if dim is None else outputs.shape[dim], ignore_index)


def perplexity(outputs: Tensor, targets: Tensor, *, ignore_index: int | None = None) -> Tensor:
    """Computes the perplexity, exp of the mean causal_lm loss over sequences.

    Args:
        outputs: Scores before softmax, ``[B, T, V]``.
        targets: Tokens 0…V−1, ``[B, T]``; −100 is ignored.
        ignore_index: A further target that is ignored.

    Returns:
        ``[B]``: the loss in nats. `of_mean` makes the perplexity from its mean.
    """
    return causal_lm(outputs, targets, ignore_index=ignore_index)


def of_mean(metric: PerExample, mean: float) -> float:
    """Computes a metric from its mean over examples: the mean itself, except for perplexity."""
    if function_of(metric) is not perplexity:
        return mean
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


def is_higher_better(metric: PerExample) -> bool:
    """Returns whether more of a metric is better.

    Args:
        metric: The metric.

    Returns:
        False for perplexity, and for code with the attribute ``higher_is_better = False``, as
        torchmetrics has it; else True.

    Raises:
        LossError: The attribute is not True, False or None.
    """
    function = function_of(metric)
    # torchmetrics has None where it is not known.
    if (value := getattr(function, "higher_is_better", None)) is None:
        return function is not perplexity
    name = getattr(function, "__name__", type(function).__name__)
    try:
        return bool(convert(f"{name}.higher_is_better", value, bool))
    except UsageError as error:
        raise LossError(error.what, "Set it to False if lower values are better") from None


def loss_seed_stderr(outputs: Tensor, targets: Tensor) -> Tensor:
    """Stands for the standard error of the mean loss over seeds, which is not a mean of examples.

    With the mean loss L_s of each of S seeds it is std(L_s)/√S. Given the examples, that is how far
    the mean over the seeds may be from the expectation over all random numbers.
    """
    raise NotImplementedError


SEED_ERROR = loss_seed_stderr.__name__
"""The name of that standard error in tables."""

METRICS: dict[str, PerExample] = {"accuracy": accuracy, "perplexity": perplexity}
