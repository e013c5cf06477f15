"""The targets of a loss, and their checks: labels in range, probabilities, finite numbers."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from losscli.data import Nest
from losscli.errors import DataError, LossError
from losscli.evaluation.losses.built_in import (
    TOKEN_LOSSES,
    PerExample,
    bce,
    causal_lm,
    cross_entropy,
    function_of,
    nll,
    options_of,
)
from losscli.evaluation.losses.class_targets import (
    IGNORED,
    VOID,
    are_labels,
    class_dim,
    counted,
    one_score_per_target,
)

__all__ = [
    "check_lengths",
    "check_probabilities",
    "check_range",
    "class_dim_of",
    "classes_of",
    "first_not_finite",
    "has_label",
    "is_of_classes",
    "target_error",
]


def is_of_classes(loss: PerExample) -> bool:
    """Whether a loss takes labels of classes, or their probabilities."""
    return function_of(loss) in {cross_entropy, nll}


def classes_of(loss: PerExample, outputs: Tensor, targets: Tensor) -> int | None:
    """Returns the number of classes that a loss reads in a model's outputs.

    Returns:
        The number of classes; None if the loss has none or the shapes do not fit.

    Raises:
        LossError: Two dimensions fit and the loss does not specify one.
    """
    function = function_of(loss)
    if function is nll:
        return outputs.shape[1] if outputs.ndim > 1 else None
    if function is cross_entropy and not one_score_per_target(outputs, targets):
        dim = class_dim(outputs, targets, "cross_entropy", options_of(loss).get("dim"))
        return None if dim is None else outputs.shape[dim]
    if function in TOKEN_LOSSES and outputs.ndim > 2 and outputs.shape[:-1] == targets.shape:
        return outputs.shape[-1]
    return None


def class_dim_of(loss: PerExample) -> int | None:
    """Returns the dimension of classes that a loss fixes, 1 or −1; None if the shapes decide."""
    function = function_of(loss)
    if function is not cross_entropy:
        return -1 if function in TOKEN_LOSSES else None
    dim: int | None = options_of(loss).get("dim")
    return dim


def has_label(outputs: Tensor, targets: Tensor) -> bool:
    """Whether targets may be classes: with one score per target, the labels 0 and 1."""
    return not one_score_per_target(outputs, targets) or are_labels(targets)


def check_range(loss: PerExample, labels: Tensor, classes: int | None, where: str) -> str:
    """Checks that labels are in the range of a model's classes.

    Args:
        loss: The loss.
        labels: The labels.
        classes: The number of classes; None if it is not known.
        where: The name of the data in errors.

    Returns:
        A note on ignored labels; empty if none is.

    Raises:
        LossError: A label is out of range.
    """
    counts = _counted_by(loss, labels, classes)
    void = classes is not None and classes <= VOID and is_of_classes(loss)
    note = ""
    if void and bool((labels == VOID).any()):
        note = f"targets of {VOID} are ignored: the model has {classes} classes"
    labels = labels[counts]
    if not labels.numel():
        return note
    low, high = int(labels.min()), int(labels.max())
    if classes is not None and (low < 0 or high >= classes):
        raise LossError(
            f"{where} has the label {low if low < 0 else high}, and the model's {classes} "
            f"outputs stand for the labels 0 to {classes - 1}",
            "Choose a model or data with as many classes",
        )
    return note


def check_probabilities(loss: PerExample, targets: Nest, where: str) -> None:
    """Checks that targets that are probabilities lie in 0…1.

    Raises:
        LossError: One is outside.
    """
    function = function_of(loss)
    if not isinstance(targets, Tensor):
        return
    if function is not bce and not (function is cross_entropy and targets.is_floating_point()):
        return
    finite = targets[targets.isfinite()]
    if not finite.numel():
        return
    low, high = float(finite.min()), float(finite.max())
    if low < 0 or high > 1:
        raise LossError(
            f"{where} has the target {low if low < 0 else high:g}, and "
            f"{function.__name__} takes probabilities from 0 to 1",
            "Leave out examples without a label, or mask them in a --loss of your own",
        )


def check_lengths(lengths: Collection[torch.Size]) -> None:
    """Checks that all examples have equally many targets, and so the same weight in a mean.

    Raises:
        LossError: There is more than one.
    """
    if len(lengths) > 1:
        one, other = sorted(map(list, lengths))[:2]
        raise LossError(
            f"examples have targets of the shapes {one} and {other}, and the loss is a mean "
            "over all targets",
            f"Fill them up to one shape with {IGNORED}, or give --loss token_cross_entropy, a "
            "mean over the sequences",
        )


def _counted_by(loss: PerExample, targets: Tensor, classes: int | None) -> Tensor:
    """Returns a mask, ``[B, *]``, of the targets that a loss of classes or tokens reads."""
    function = function_of(loss)
    of = None if function in TOKEN_LOSSES else classes
    counts = counted(targets, of, options_of(loss).get("ignore_index"))
    if function is causal_lm:
        # The first token is not predicted.
        counts[:, :1] = False
    return counts


def first_not_finite(targets: Nest) -> int | None:
    """Returns the row of the first target that is not finite; None without one, or for a nest."""
    if not isinstance(targets, Tensor) or not targets.is_floating_point():
        return None
    bad = ~targets.isfinite().flatten(1).all(1) if targets.ndim > 1 else ~targets.isfinite()
    return int(bad.nonzero()[0]) if bool(bad.any()) else None


def target_error(target: Tensor, where: str, position: int) -> DataError:
    """Makes the error for a target that is not finite, at the position of its example in data."""
    value = float(target[~target.isfinite()].flatten()[0])
    return DataError(
        f"{where}: the target of example {position} (counted from 0) is {value}",
        "Leave the example out, or give your own --loss that skips it",
    )
