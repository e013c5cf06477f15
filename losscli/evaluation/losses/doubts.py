"""Signs that a loss or a metric is the wrong one for a model and its data."""

from __future__ import annotations

import enum
from collections.abc import Sequence

from torch import Tensor

from losscli.evaluation.losses.built_in import (
    TOKEN_LOSSES,
    PerExample,
    bce,
    cross_entropy,
    function_of,
    mse,
    nll,
)
from losscli.evaluation.losses.class_targets import (
    are_labels,
    are_probabilities,
    class_dim,
    one_score_per_target,
    sums_to_one,
)
from losscli.evaluation.losses.metrics import accuracy
from losscli.evaluation.losses.targets import class_dim_of

__all__ = ["Doubt", "doubts_of"]


class Doubt(enum.Enum):
    """A reason why a loss or a metric may be the wrong one; the value is the note."""

    LABELS = (
        "the targets are all 0 or 1, and the default for float targets is mse: if they are "
        "labels, give --loss bce, which takes scores before the sigmoid"
    )
    CLASSES = (
        "the targets are one-hot, and the default for float targets is mse: if they are classes, "
        "give --loss cross_entropy, which takes scores before the softmax"
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
    SCORES = (
        "the outputs of the first batch are not logarithms of probabilities with the sum 1, and "
        "NLLLoss takes these: if they are scores, give --loss cross_entropy"
    )
    THRESHOLD = (
        "the outputs of the first batch all lie in 0…1, and accuracy takes a score above 0 for "
        "the label 1: if they are probabilities, give a --metric of probabilities or none"
    )
    COPY = (
        "the targets of the first batch are its inputs, and the default for integer targets scores "
        "each token at its own position: if the model predicts the next token, give --loss "
        "causal_lm"
    )


def doubts_of(
    functions: Sequence[PerExample], inputs: Sequence[Tensor], outputs: Tensor, targets: Tensor
) -> frozenset[Doubt]:
    """Returns signs that the loss, or a metric after it, does not fit a batch and its outputs."""
    loss, *metrics = map(function_of, functions)
    doubts = set()
    single = one_score_per_target(outputs, targets)
    if loss is mse and are_labels(targets) and bool(targets.any() and (targets == 0).any()):
        one_hot = targets.ndim > 1 and targets.shape[1] > 1 and sums_to_one(targets, 1)
        doubts.add(Doubt.CLASSES if one_hot else Doubt.LABELS)
    if loss is bce and are_probabilities(outputs):
        doubts.add(Doubt.SIGMOID)
    elif accuracy in metrics and single and are_probabilities(outputs):
        doubts.add(Doubt.THRESHOLD)
    if loss is nll and not outputs.isnan().any() and not sums_to_one(outputs.exp(), 1):
        doubts.add(Doubt.SCORES)
    if loss is cross_entropy and any(_are_copied(tokens, targets) for tokens in inputs):
        doubts.add(Doubt.COPY)
    if loss is cross_entropy or loss in TOKEN_LOSSES:
        dim = 1
        if outputs.ndim > 2:
            dim = class_dim_of(functions[0]) or class_dim(outputs, targets, "", None) or 1
        # One token is enough to see that millions of scores are no probabilities.
        first = outputs.flatten(0, -2)[:1] if loss in TOKEN_LOSSES else outputs
        sums = are_probabilities(first) and are_probabilities(outputs) and outputs.shape[dim] > 1
        if sums and sums_to_one(outputs, dim):
            doubts.add(Doubt.SOFTMAX)
    return frozenset(doubts)


def _are_copied(tokens: Tensor, targets: Tensor) -> bool:
    """Returns whether the targets that count are the tokens ``[B, T]`` of the inputs."""
    if tokens.is_floating_point() or targets.ndim != 2 or tokens.shape != targets.shape:
        return False
    counted = targets >= 0
    return bool(counted.any()) and bool((tokens == targets)[counted].all())
