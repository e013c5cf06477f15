"""Checks of targets: labels in range, finite numbers, one length."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from losscli.errors import DataError, LossError
from losscli.evaluation.losses import (
    IGNORED,
    VOID,
    PerExample,
    counted,
    cross_entropy,
    function_of,
    nll,
)

__all__ = ["check_lengths", "check_range", "first_not_finite", "is_of_classes", "target_error"]


def is_of_classes(loss: PerExample) -> bool:
    """Whether a loss takes labels of classes, or their probabilities."""
    return function_of(loss) in {cross_entropy, nll}


def check_range(loss: PerExample, labels: Tensor, classes: int | None, where: str) -> str:
    """Makes sure that labels are in the range of a model's classes.

    Args:
        loss: The loss.
        labels: The labels.
        classes: The number of classes; None if it is not known.
        where: What to call the data in errors.

    Returns:
        A note on labels that are ignored; empty if none is.

    Raises:
        LossError: A label is out of range.
    """
    counts = counted(loss, labels, classes)
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


def check_lengths(lengths: Collection[torch.Size]) -> None:
    """Makes sure that each target counts the same in a mean over all of them.

    Args:
        lengths: The shapes of the targets of an example.

    Raises:
        LossError: There are several.
    """
    if len(lengths) > 1:
        one, other = sorted(map(list, lengths))[:2]
        raise LossError(
            f"examples have targets of the shapes {one} and {other}, and the loss is a mean "
            "over all targets",
            f"Fill them up to one shape with {IGNORED}, or give --loss token_cross_entropy, a "
            "mean over the sequences",
        )


def first_not_finite(targets: Tensor) -> int | None:
    """Finds the first example with a target that is infinite or not a number.

    Args:
        targets: The targets.

    Returns:
        Its row; None if all targets are finite.
    """
    if not targets.is_floating_point():
        return None
    bad = ~targets.isfinite().flatten(1).all(1) if targets.ndim > 1 else ~targets.isfinite()
    return int(bad.nonzero()[0]) if bool(bad.any()) else None


def target_error(target: Tensor, where: str, position: int) -> DataError:
    """Makes the error of a target that is infinite or not a number.

    Args:
        target: The target.
        where: What to call the data.
        position: The place of its example in the data.

    Returns:
        The error.
    """
    value = float(target[~target.isfinite()].flatten()[0])
    return DataError(
        f"{where}: the target of example {position} (counted from 0) is {value}",
        "Leave the example out, or give a --loss of your own that does",
    )
