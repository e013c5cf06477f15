"""Losses and metrics, each per example: outputs and targets in, one number an example out.

Where examples have weights (`weights_of`), the mean is the sum of the numbers over that of weights.
"""

from __future__ import annotations

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
    "VOID",
    "PerExample",
    "accuracy",
    "bce",
    "causal_lm",
    "counted",
    "cross_entropy",
    "function_of",
    "mse",
    "nll",
    "of_mean",
    "options_of",
    "per_example_mean",
    "perplexity",
    "token_cross_entropy",
    "weights_of",
]

PerExample = Callable[..., Tensor]

IGNORED = -100
"""The target that stands for none, such as that of padding; as PyTorch and Hugging Face have it."""

VOID = 255
"""The label of pixels without a class in many data sets. It is ignored where it is not a class."""

_Weights = Sequence[float] | Tensor | float

# Scores of a vocabulary that are taken into a wider type at once: 16 MiB of float32.
_CHUNK = 1 << 22


def cross_entropy(
    outputs: Tensor,
    targets: Tensor,
    *,
    weight: _Weights | None = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Computes the cross-entropy of softmax outputs, −log softmax(outputs)[target], in nats.

    With ``weight`` and ``label_smoothing`` it is that of `torch.nn.CrossEntropyLoss`.

    Args:
        outputs: Scores before softmax, ``[B, C, *]``.
        targets: Classes 0…C−1, ``[B, *]``; or the probabilities of the classes, ``[B, C, *]``.
            Targets of −100 are ignored, and those of 255 where C ≤ 255.
        weight: The weight of each class, ``[C]``; each term is multiplied by it.
        ignore_index: A further target that is ignored.
        label_smoothing: The share of a target that is spread over all classes.

    Returns:
        ``[B]``; the mean over any further dimensions, in which ignored targets are zeros. Divided
        by the mean of `weights_of`, its mean over examples is torch's, Σwl/Σw.

    Raises:
        LossError: The shapes do not fit.
    """
    if targets.is_floating_point() and outputs.ndim > 1 and outputs.shape == targets.shape:
        targets = targets.to(outputs.dtype)
    elif targets.is_floating_point() or not _one_score_a_class(outputs, targets):
        raise LossError(
            f"cross_entropy needs outputs [B, C] and integer targets [B], not {_form(outputs)} "
            f"and {_form(targets)}",
            "Choose another --loss, or a model with one output a class",
        )
    else:
        targets = _with_ignored(outputs, targets, ignore_index)
    own = _class_weights(weight, outputs.shape[1], outputs.dtype, outputs.device)
    return per_example_mean(
        F.cross_entropy(
            outputs, targets, weight=own, label_smoothing=label_smoothing, reduction="none"
        )
    )


def nll(
    outputs: Tensor,
    targets: Tensor,
    *,
    weight: _Weights | None = None,
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
    if targets.is_floating_point() or not _one_score_a_class(outputs, targets):
        raise LossError(
            f"NLLLoss needs outputs [B, C] and integer targets [B], not {_form(outputs)} and "
            f"{_form(targets)}",
            "Choose another --loss, or a model with one output a class",
        )
    own = _class_weights(weight, outputs.shape[1], outputs.dtype, outputs.device)
    targets = _with_ignored(outputs, targets, ignore_index)
    return per_example_mean(F.nll_loss(outputs, targets, weight=own, reduction="none"))


def _with_ignored(outputs: Tensor, targets: Tensor, ignore_index: int | None) -> Tensor:
    """Marks all targets that are ignored by −100, which torch ignores itself."""
    targets = targets.long()
    for label in (VOID if outputs.shape[1] <= VOID else None, ignore_index):
        if label is not None:
            targets = targets.masked_fill(targets == label, IGNORED)
    return targets


def _counts(targets: Tensor, classes: int | None, ignore_index: int | None) -> Tensor:
    """Tells which targets count: those that are not ignored."""
    if targets.dtype == torch.uint8:
        # As a byte −100 would be 156.
        targets = targets.long()
    counts = targets != IGNORED
    if classes is not None and classes <= VOID:
        counts &= targets != VOID
    if ignore_index is not None:
        counts &= targets != ignore_index
    return counts


def _class_weights(
    weight: _Weights | None, classes: int, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    if weight is None:
        return None
    weight = torch.as_tensor(weight, dtype=dtype, device=device)
    if weight.shape != (classes,):
        raise LossError(
            f"weight has {weight.numel()} numbers, and the model has outputs for {classes} classes",
            "Give one weight per class, such as weight=0.2-1-5 for three classes",
        )
    return weight


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


def bce(
    outputs: Tensor,
    targets: Tensor,
    *,
    weight: _Weights | None = None,
    pos_weight: _Weights | None = None,
) -> Tensor:
    """Computes the binary cross-entropy of sigmoid outputs, in nats.

    Args:
        outputs: Scores before the sigmoid, ``[B, *]``.
        targets: Probabilities 0…1, of the same shape; ``[B]`` fits outputs ``[B, 1]`` too.
        weight: Multiplies the loss: a number, or one number per entry of the last dimension.
        pos_weight: Multiplies the part of the loss of positive targets in the same way.

    Returns:
        ``[B]``, the mean over an example's outputs; as in torch it is not divided by the weights.

    Raises:
        LossError: The shapes do not fit.
    """
    targets = _like(outputs, targets, "bce")
    return per_example_mean(
        F.binary_cross_entropy_with_logits(
            outputs,
            targets,
            weight=_output_weights(weight, outputs, "weight"),
            pos_weight=_output_weights(pos_weight, outputs, "pos_weight"),
            reduction="none",
        )
    )


def _output_weights(weight: _Weights | None, outputs: Tensor, key: str) -> Tensor | None:
    if weight is None:
        return None
    weight = torch.as_tensor(weight, dtype=outputs.dtype, device=outputs.device)
    # Over examples [B] it would be broadcast too.
    if weight.numel() != 1 and (outputs.ndim < 2 or weight.shape != outputs.shape[-1:]):
        raise LossError(
            f"bce: {key} has {weight.numel()} numbers, and the model has outputs "
            f"{list(outputs.shape)}",
            "Give one number, or one per entry of the last dimension of the outputs",
        )
    return weight


def causal_lm(
    outputs: Tensor,
    targets: Tensor,
    *,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Computes the cross-entropy of each next token, in nats, over a sequence's tokens that count.

    As in Hugging Face the position t predicts the target t + 1: targets are the tokens themselves.
    Half-precision scores are taken into float32 a few tokens at a time.

    Args:
        outputs: Scores before softmax, ``[B, T, V]``.
        targets: Tokens 0…V−1, ``[B, T]``; −100 where none counts.
        ignore_index: A further target that does not count.
        label_smoothing: The share of a target that is spread over all tokens.

    Returns:
        ``[B]``: for each sequence the mean over its tokens that count; 0 where none does, and
        such a sequence has no weight (`weights_of`).

    Raises:
        LossError: The shapes do not fit.
    """
    _check_tokens(outputs, targets, "causal_lm")
    # The last position predicts nothing that is known.
    targets = F.pad(targets[:, 1:], (0, 1), value=IGNORED)
    return _over_tokens(outputs, targets, None, ignore_index, label_smoothing)


def token_cross_entropy(
    outputs: Tensor,
    targets: Tensor,
    *,
    weight: _Weights | None = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Computes the cross-entropy of each token itself, in nats, over a sequence's labels.

    As in Hugging Face's masked language models and classifiers of tokens, the position t is
    scored by the target t. Half-precision scores are taken into float32 a few tokens at a time.

    Args:
        outputs: Scores before softmax, ``[B, T, C]``.
        targets: Classes 0…C−1, ``[B, T]``; −100 where none counts.
        weight: The weight of each class, ``[C]``, in the mean over a sequence's labels.
        ignore_index: A further target that does not count.
        label_smoothing: The share of a target that is spread over all classes.

    Returns:
        ``[B]``: for each sequence the mean over its labels that count; 0 where none does, and
        such a sequence has no weight (`weights_of`).

    Raises:
        LossError: The shapes do not fit.
    """
    _check_tokens(outputs, targets, "token_cross_entropy")
    return _over_tokens(outputs, targets, weight, ignore_index, label_smoothing)


def _check_tokens(outputs: Tensor, targets: Tensor, loss: str) -> None:
    if targets.is_floating_point() or outputs.ndim != 3 or outputs.shape[:2] != targets.shape:
        raise LossError(
            f"{loss} needs outputs [B, T, V] and token ids [B, T], not {_form(outputs)} and "
            f"{_form(targets)}",
            "Choose another --loss, or a model with scores for every token",
        )


def _over_tokens(
    outputs: Tensor,
    targets: Tensor,
    weight: _Weights | None,
    ignore_index: int | None,
    smoothing: float,
) -> Tensor:
    """Computes the mean surprise at a sequence's targets that count, a few tokens at a time."""
    counts = _counts(targets, None, ignore_index)
    scores, tokens = outputs.flatten(0, 1), targets.masked_fill(~counts, 0).flatten()
    step = max(1, _CHUNK // max(1, outputs.shape[2]))
    wide = torch.promote_types(outputs.dtype, torch.float32)
    own = _class_weights(weight, outputs.shape[2], wide, outputs.device)
    losses = [
        _surprise(scores[i : i + step], tokens[i : i + step], wide, own, smoothing)
        for i in range(0, len(tokens), step)
    ]
    each = torch.cat(losses).view(targets.shape)
    # Not a product: scores that are infinite or not a number count for nothing there.
    total = each.masked_fill(~counts, 0).sum(1)
    share = counts if own is None else own[tokens].view(targets.shape) * counts
    weights = share.sum(1)
    # Where nothing counts there is no quotient, whose derivative would not be a number.
    return total.masked_fill(weights == 0, 0) / weights.masked_fill(weights == 0, 1)


def _surprise(
    scores: Tensor, tokens: Tensor, wide: torch.dtype, weight: Tensor | None, smoothing: float
) -> Tensor:
    """Computes −log softmax(scores)[token] for each of some tokens."""
    if weight is not None or smoothing:
        return F.cross_entropy(
            scores.to(wide), tokens, weight=weight, label_smoothing=smoothing, reduction="none"
        )
    right = scores.gather(1, tokens.unsqueeze(1)).squeeze(1)
    return scores.to(wide).logsumexp(1) - right.to(wide)


def perplexity(outputs: Tensor, targets: Tensor, *, ignore_index: int | None = None) -> Tensor:
    """Computes the perplexity, exp of the mean causal_lm loss over sequences.

    Args:
        outputs: Scores before softmax, ``[B, T, V]``.
        targets: Tokens 0…V−1, ``[B, T]``; −100 where none counts.
        ignore_index: A further target that does not count.

    Returns:
        ``[B]``, in nats: what the mean is taken of. `of_mean` makes the perplexity of that.
    """
    return causal_lm(outputs, targets, ignore_index=ignore_index)


def of_mean(metric: PerExample, mean: float) -> float:
    """Finishes a metric that is no mean itself, but a function of one.

    Args:
        metric: The metric.
        mean: Its mean over all examples.

    Returns:
        The metric's value: the mean itself, but for perplexity.
    """
    if function_of(metric) is not perplexity:
        return mean
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


def accuracy(outputs: Tensor, targets: Tensor, *, ignore_index: int | None = None) -> Tensor:
    """Tells which examples are classified right.

    Args:
        outputs: Scores, ``[B, C, *]``; the highest is the answer. With C = 1, or no C, a positive
            score answers 1.
        targets: Classes, ``[B, *]``. Those that `cross_entropy` ignores do not count.
        ignore_index: A further target that does not count.

    Returns:
        1 or 0 for each example, ``[B]``; over any further dimensions the share of right ones among
        those that count, 0 where none does; nan where a score that counts is not a number.

    Raises:
        LossError: The shapes do not fit.
    """
    if outputs.shape == targets.shape:
        scores, answers = outputs, outputs > 0
    elif not _one_score_a_class(outputs, targets):
        raise LossError(
            f"accuracy needs outputs [B, C] and targets [B], not {_form(outputs)} and "
            f"{_form(targets)}",
            "Choose another --metric, or none",
        )
    elif outputs.shape[1] == 1:
        scores = outputs.squeeze(1)
        answers = scores > 0
    else:
        # The highest of scores is not a number where one of them is not.
        scores, answers = outputs.max(1)
    right = (answers == targets).to(torch.float32).masked_fill(scores.isnan(), math.nan)
    ignored = ~_answered(outputs, targets, ignore_index)
    right = right.masked_fill(ignored, 0)
    if right.ndim < 2:
        return right
    shares = per_example_mean((~ignored).to(torch.float32))
    # Where all count, exactly the mean.
    return per_example_mean(right) / shares.masked_fill(shares == 0, 1)


def _answered(outputs: Tensor, targets: Tensor, ignore_index: int | None) -> Tensor:
    classes = None if outputs.shape == targets.shape else outputs.shape[1]
    return _counts(targets, classes, ignore_index)


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
        raise LossError(
            f"{loss} needs outputs and targets of one shape, not {_form(outputs)} and "
            f"{_form(targets)}",
            "Choose another --loss, or a model with one output a target",
        )
    return targets.to(outputs.dtype)


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def function_of(function: PerExample) -> PerExample:
    """Finds the loss or metric itself where it has options.

    Args:
        function: A loss or a metric; with options it is a `functools.partial`.

    Returns:
        The function without its options.
    """
    return function.func if isinstance(function, partial) else function


def options_of(function: PerExample) -> dict[str, Any]:
    """Finds the options of a loss or metric.

    Args:
        function: A loss or a metric; with options it is a `functools.partial`.

    Returns:
        Its keyword arguments.
    """
    return dict(function.keywords) if isinstance(function, partial) else {}


def counted(loss: PerExample, targets: Tensor, classes: int | None) -> Tensor:
    """Tells which targets a loss of classes or tokens does not ignore.

    Args:
        loss: The loss.
        targets: The targets, ``[B, *]``.
        classes: How many scores a target chooses from.

    Returns:
        Which targets count, ``[B, *]``.
    """
    function = function_of(loss)
    of = None if function in OF_TOKENS else classes
    counts = _counts(targets, of, options_of(loss).get("ignore_index"))
    if function is causal_lm:
        # Nothing predicts the first token.
        counts[:, :1] = False
    return counts


def weights_of(function: PerExample, outputs: Tensor, targets: Tensor) -> Tensor | None:
    """Weighs examples in the mean of a loss or metric.

    With values v and weights w per example, the mean is Σv/Σw.

    Args:
        function: The loss or metric.
        outputs: The outputs of a batch; only their shape matters.
        targets: Its targets.

    Returns:
        The weight of each example, ``[B]``, in float64 where the device has it; None where each
        has the weight 1. With `cross_entropy` it is the mean over the example's targets of the
        weights of their classes, 0 for ignored targets; with a loss of tokens and with metrics it
        is 1, or 0 for an example without any target that counts.
    """
    weigh = _WEIGHTS.get(function_of(function))
    return None if weigh is None else weigh(outputs, targets, **options_of(function))


def _weigh_classes(
    outputs: Tensor,
    targets: Tensor,
    *,
    weight: _Weights | None = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,  # noqa: ARG001 - torch divides by the same sum
) -> Tensor | None:
    # Of probabilities torch takes the plain mean.
    if targets.is_floating_point():
        return None
    counts = _counts(targets, outputs.shape[1], ignore_index)
    weights = _class_weights(weight, outputs.shape[1], _wide(targets), targets.device)
    if weights is None:
        return per_example_mean(counts.to(_wide(targets)))
    return per_example_mean(weights[targets.long().masked_fill(~counts, 0)] * counts)


def _weigh_tokens(
    outputs: Tensor,
    targets: Tensor,
    *,
    weight: _Weights | None = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,  # noqa: ARG001
) -> Tensor:
    counts = _counts(targets, None, ignore_index)
    weights = _class_weights(weight, outputs.shape[-1], _wide(targets), targets.device)
    if weights is not None:
        counts &= weights[targets.masked_fill(~counts, 0)] != 0
    return counts.flatten(1).any(1).to(_wide(targets))


def _weigh_next_tokens(outputs: Tensor, targets: Tensor, **options: Any) -> Tensor:
    return _weigh_tokens(outputs, targets[:, 1:], **options)


def _weigh_answers(outputs: Tensor, targets: Tensor, *, ignore_index: int | None = None) -> Tensor:
    counts = _answered(outputs, targets, ignore_index)
    return counts.reshape(len(counts), -1).any(1).to(_wide(targets))


def _wide(targets: Tensor) -> torch.dtype:
    # MPS has no float64.
    return torch.float32 if targets.device.type == "mps" else torch.float64


_WEIGHTS: dict[PerExample, Callable[..., Tensor | None]] = {
    cross_entropy: _weigh_classes,
    nll: _weigh_classes,
    token_cross_entropy: _weigh_tokens,
    causal_lm: _weigh_next_tokens,
    perplexity: _weigh_next_tokens,
    accuracy: _weigh_answers,
}

LOSSES: dict[str, PerExample] = {
    "cross_entropy": cross_entropy,
    "mse": mse,
    "bce": bce,
    "causal_lm": causal_lm,
    "token_cross_entropy": token_cross_entropy,
}
METRICS: dict[str, PerExample] = {"accuracy": accuracy, "perplexity": perplexity}

OF_TOKENS = frozenset({causal_lm, token_cross_entropy})
"""The losses with a target for each token."""

TAKES_HALF = frozenset({causal_lm, token_cross_entropy, perplexity, accuracy})
"""Those that take half-precision scores as they are; others get them in float32."""
