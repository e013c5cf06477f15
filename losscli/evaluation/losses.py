"""Losses and metrics, each per example: outputs and targets in, one number an example out.

Losses are computed in float64, those over a vocabulary in float32, and by formulas without
cancellation: a loss is as exact as the outputs that it is computed from, however small it is; only
a cross-entropy with probabilities as targets is exact as a share of the scores.

Where examples have weights (`weights_of`), the mean is the sum of the numbers over that of weights.
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
    "VOID",
    "Doubt",
    "PerExample",
    "accuracy",
    "bce",
    "causal_lm",
    "check_shares",
    "class_dim_of",
    "classes_of",
    "counted",
    "cross_entropy",
    "doubts_of",
    "function_of",
    "has_label",
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

# How far the sum of probabilities may be from one by rounding, also in half precision.
_NEAR_ONE = 0.02

# Outputs that are taken into a wider type at once: 16 MiB of float64.
_CHUNK = 1 << 21

# e^-40 is below the rounding of float64 as a share of 40: beyond, log(1 + e^x) is x.
_LINEAR = 40


def cross_entropy(
    outputs: Tensor,
    targets: Tensor,
    *,
    dim: int | None = None,
    weight: _Weights | None = None,
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
        ``[B]``, in nats; the mean over any further dimensions, in which ignored targets are zeros.
        Divided by the mean of `weights_of`, its mean over examples is torch's, Σwl/Σw.

    Raises:
        LossError: The shapes do not fit, or both dimensions fit and ``dim`` is None.
    """
    if targets.is_floating_point() and outputs.ndim > 1 and outputs.shape == targets.shape:
        own = _dim_of_shares(targets, dim)
        return _in_float64(
            partial(_soft_surprise, weight=weight, smoothing=label_smoothing),
            outputs.movedim(own, 1),
            targets.movedim(own, 1),
        )
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
            _cure_of_classes(targets)
            or "Choose another --loss, or a model with one output a class",
        )
    targets = _with_ignored(targets, outputs.shape[dim], ignore_index)
    if dim == -1:
        return per_example_mean(_each_token(outputs, targets, weight, label_smoothing))
    return _in_float64(
        partial(_surprise, weight=weight, smoothing=label_smoothing), outputs, targets
    )


def _dim_of_shares(targets: Tensor, dim: int | None) -> int:
    """Finds the dimension of the classes in targets that are probabilities."""
    if dim is not None or targets.ndim < 3:
        return dim or 1
    # That in which they add up to one; both, or none, is read as torch does.
    ones = [_add_up(targets, each) for each in (1, -1)]
    return -1 if ones == [False, True] else 1


def _add_up(shares: Tensor, dim: int) -> bool:
    """Tells whether the sums of shares are one, up to the rounding of half precision."""
    sums = shares.sum(dim, dtype=torch.float32)
    return bool(((sums - 1).abs() < _NEAR_ONE).all())


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
    if targets.is_floating_point() or _class_dim(outputs, targets, "NLLLoss", 1) is None:
        raise LossError(
            f"NLLLoss needs outputs [B, C] and integer targets [B], not {_form(outputs)} and "
            f"{_form(targets)}",
            "Choose another --loss, or a model with one output a class",
        )
    targets = _with_ignored(targets, outputs.shape[1], ignore_index)
    return _in_float64(partial(_named_score, weight=weight), outputs, targets)


def _with_ignored(targets: Tensor, classes: int, ignore_index: int | None) -> Tensor:
    """Marks all targets that are ignored by −100, which torch ignores itself."""
    counts = _counts(targets, classes, ignore_index)
    return targets.long().masked_fill(~counts, IGNORED)


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
        targets: Of the same shape; ``[B, *]`` fits outputs ``[B, *, 1]`` and ``[B, 1, *]`` too.

    Returns:
        ``[B]``.

    Raises:
        LossError: The shapes do not fit.
    """
    return _in_float64(_squared_error, outputs, _like(outputs, targets, "mse"))


def bce(
    outputs: Tensor,
    targets: Tensor,
    *,
    weight: _Weights | None = None,
    pos_weight: _Weights | None = None,
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
    targets = _like(outputs, targets, "bce")
    return _in_float64(
        partial(_binary_surprise, weight=weight, pos_weight=pos_weight), outputs, targets
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
    _check_tokens(outputs, targets, "causal_lm", most=3)
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
        outputs: Scores before softmax, ``[B, T, C]``; or ``[B, *, C]`` for further dimensions.
        targets: Classes 0…C−1, ``[B, T]`` or ``[B, *]``; −100 where none counts.
        weight: The weight of each class, ``[C]``, in the mean over a sequence's labels.
        ignore_index: A further target that does not count.
        label_smoothing: The share of a target that is spread over all classes.

    Returns:
        ``[B]``: for each sequence the mean over its labels that count; 0 where none does, and
        such a sequence has no weight (`weights_of`).

    Raises:
        LossError: The shapes do not fit.
    """
    _check_tokens(outputs, targets, "token_cross_entropy", most=outputs.ndim)
    return _over_tokens(outputs, targets, weight, ignore_index, label_smoothing)


def _check_tokens(outputs: Tensor, targets: Tensor, loss: str, *, most: int) -> None:
    fits = 3 <= outputs.ndim <= most and outputs.shape[:-1] == targets.shape
    if targets.is_floating_point() or not fits:
        raise LossError(
            f"{loss} needs outputs [B, T, V] and token ids [B, T], not {_form(outputs)} and "
            f"{_form(targets)}",
            _cure_of_classes(targets)
            or "Choose another --loss, or a model with scores for every token",
        )


def _over_tokens(
    outputs: Tensor,
    targets: Tensor,
    weight: _Weights | None,
    ignore_index: int | None,
    smoothing: float,
) -> Tensor:
    """Computes the mean surprise at a sequence's targets that count."""
    counts = _counts(targets, None, ignore_index)
    tokens = targets.long().masked_fill(~counts, IGNORED)
    each = _each_token(outputs, tokens, weight, smoothing)
    own = _class_weights(weight, outputs.shape[-1], each.dtype, each.device)
    share = counts if own is None else own[tokens.masked_fill(~counts, 0)] * counts
    weights = share.flatten(1).sum(1)
    # Where nothing counts there is no quotient, whose derivative would not be a number.
    total = each.flatten(1).sum(1).masked_fill(weights == 0, 0)
    return total / weights.masked_fill(weights == 0, 1)


def _each_token(
    outputs: Tensor, tokens: Tensor, weight: _Weights | None, smoothing: float
) -> Tensor:
    """Computes the surprise at each token, ``[B, *]``, a few tokens at a time; 0 where ignored."""
    scores, flat = outputs.flatten(0, -2), tokens.flatten()
    step = max(1, _CHUNK // max(1, outputs.shape[-1]))
    # Not in float64, which takes three times as long over the words of a vocabulary.
    wide = torch.promote_types(outputs.dtype, torch.float32)
    losses = [
        _surprise(scores[i : i + step].to(wide), flat[i : i + step], weight, smoothing)
        for i in range(0, len(flat), step)
    ]
    return torch.cat(losses).view(tokens.shape)


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


def _surprise(scores: Tensor, classes: Tensor, weight: _Weights | None, smoothing: float) -> Tensor:
    """Computes −w log softmax(scores)[class], the classes in dimension 1; 0 where ignored."""
    own = _class_weights(weight, scores.shape[1], scores.dtype, scores.device)
    if smoothing:
        # That of a class which is nearly sure is then not small.
        return F.cross_entropy(
            scores, classes, weight=own, label_smoothing=smoothing, reduction="none"
        )
    ignored = classes == IGNORED
    classes = classes.masked_fill(ignored, 0)
    # As log(1 + Σ exp(z_j − z_t)) over the other classes j: log softmax itself rounds to 0 where
    # one class is nearly sure. The lowest number and not −∞, which would make gradients nan.
    index = classes.long().unsqueeze(1)
    right = scores.gather(1, index).squeeze(1)
    others = scores.scatter(1, index, torch.finfo(scores.dtype).min).logsumexp(1)
    found = F.softplus(others - right, threshold=_LINEAR)
    # The softmax of a score that is infinite is not a number.
    found = found.masked_fill(right == math.inf, math.nan)
    # Not a product: scores that are infinite or not a number count for nothing there.
    return (found if own is None else own[classes] * found).masked_fill(ignored, 0)


def _soft_surprise(
    scores: Tensor, shares: Tensor, weight: _Weights | None, smoothing: float
) -> Tensor:
    """Computes −Σ w p log softmax(scores) for probabilities p of the classes in dimension 1."""
    own = _class_weights(weight, scores.shape[1], scores.dtype, scores.device)
    return F.cross_entropy(
        scores, shares.to(scores.dtype), weight=own, label_smoothing=smoothing, reduction="none"
    )


def _named_score(scores: Tensor, classes: Tensor, weight: _Weights | None) -> Tensor:
    own = _class_weights(weight, scores.shape[1], scores.dtype, scores.device)
    return F.nll_loss(scores, classes, weight=own, reduction="none")


def _squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets.to(outputs.dtype)).square()


def _binary_surprise(
    scores: Tensor, targets: Tensor, weight: _Weights | None, pos_weight: _Weights | None
) -> Tensor:
    """Computes −t log σ(z) − (1 − t) log σ(−z), where −log σ(z) = log(1 + e^−z)."""
    targets = targets.to(scores.dtype)
    one, zero = (F.softplus(z, threshold=_LINEAR) for z in (-scores, scores))
    if (own := _output_weights(pos_weight, scores, "pos_weight")) is not None:
        one = own * one
    found = targets * one + (1 - targets) * zero
    own = _output_weights(weight, scores, "weight")
    return found if own is None else own * found


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


def accuracy(
    outputs: Tensor,
    targets: Tensor,
    *,
    dim: int | None = None,
    ignore_index: int | None = None,
    soft: bool = False,
) -> Tensor:
    """Tells which examples are classified right.

    Args:
        outputs: Scores, ``[B, C, *]`` or ``[B, *, C]``; the highest is the answer. With C = 1, or
            no C, a positive score answers 1.
        targets: Classes, ``[B, *]``, or their probabilities, of which the highest is right. Those
            that `cross_entropy` ignores do not count.
        dim: The dimension of the classes, 1 or −1; None takes that of the loss, or else the one
            that fits the targets.
        ignore_index: A further target that does not count.
        soft: Whether targets of the shape of the outputs are probabilities of classes.

    Returns:
        1 or 0 for each example, ``[B]``; over any further dimensions the share of right ones among
        those that count, 0 where none does; nan where a score that counts is not a number.

    Raises:
        LossError: The shapes do not fit, or both dimensions fit and ``dim`` is None.
    """
    if soft and targets.is_floating_point() and outputs.shape == targets.shape:
        own = _dim_of_shares(targets, dim)
        scores, answers = outputs.max(own)
        right = (answers == targets.argmax(own)).to(torch.float32)
        return per_example_mean(right.masked_fill(scores.isnan(), math.nan))
    if outputs.shape == targets.shape:
        scores, answers = outputs, outputs > 0
    elif (dim := _class_dim(outputs, targets, "accuracy", dim)) is None:
        raise LossError(
            f"accuracy needs outputs [B, C] and targets [B], not {_form(outputs)} and "
            f"{_form(targets)}",
            "Choose another --metric, or none",
        )
    elif outputs.shape[dim] == 1:
        scores = outputs.squeeze(dim)
        answers = scores > 0
    else:
        # The highest of scores is not a number where one of them is not.
        scores, answers = outputs.max(dim)
    right = (answers == targets).to(torch.float32).masked_fill(scores.isnan(), math.nan)
    ignored = ~_answered(outputs, targets, dim, ignore_index)
    right = right.masked_fill(ignored, 0)
    if right.ndim < 2:
        return right
    shares = per_example_mean((~ignored).to(torch.float32))
    # Where all count, exactly the mean.
    return per_example_mean(right) / shares.masked_fill(shares == 0, 1)


def _answered(
    outputs: Tensor, targets: Tensor, dim: int | None, ignore_index: int | None
) -> Tensor:
    """Tells which targets count in an accuracy."""
    if outputs.shape[1:] == targets.shape[1:]:
        return _counts(targets, None, ignore_index)
    dim = _class_dim(outputs[:1], targets[:1], "accuracy", dim)
    return _counts(targets, None if dim is None else outputs.shape[dim], ignore_index)


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


def options_of(function: PerExample) -> dict[str, Any]:
    """Finds the options of a loss or metric.

    Args:
        function: A loss or a metric; with options it is a `functools.partial`.

    Returns:
        Its keyword arguments.
    """
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
    if function is nll:
        return outputs.shape[1] if outputs.ndim > 1 else None
    if function is cross_entropy and not _one_score_a_target(outputs, targets):
        dim = _class_dim(outputs, targets, "cross_entropy", options_of(loss).get("dim"))
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
    dim: int | None = options_of(loss).get("dim")
    return dim


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
    dim: int | None = None,
    weight: _Weights | None = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,  # noqa: ARG001 - torch divides by the same sum
) -> Tensor | None:
    dim = _class_dim(outputs[:1], targets[:1], "cross_entropy", dim)
    # Of probabilities torch takes the plain mean.
    if targets.is_floating_point() or dim is None:
        return None
    classes = outputs.shape[dim]
    counts = _counts(targets, classes, ignore_index)
    weights = _class_weights(weight, classes, _wide(targets), targets.device)
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
        counts &= weights[targets.long().masked_fill(~counts, 0)] != 0
    return counts.flatten(1).any(1).to(_wide(targets))


def _weigh_next_tokens(outputs: Tensor, targets: Tensor, **options: Any) -> Tensor:
    return _weigh_tokens(outputs, targets[:, 1:], **options)


def _weigh_answers(
    outputs: Tensor,
    targets: Tensor,
    *,
    dim: int | None = None,
    ignore_index: int | None = None,
    soft: bool = False,
) -> Tensor | None:
    if soft and targets.is_floating_point():
        return None
    counts = _answered(outputs, targets, dim, ignore_index)
    return counts.reshape(len(counts), -1).any(1).to(_wide(targets))


def _wide(targets: Tensor) -> torch.dtype:
    # MPS has no float64.
    return torch.float32 if targets.device.type == "mps" else torch.float64


def check_shares(loss: PerExample, targets: Tensor, where: str) -> None:
    """Makes sure that targets that stand for probabilities lie in 0…1.

    Args:
        loss: The loss.
        targets: The targets.
        where: What to call them in errors.

    Raises:
        LossError: One is outside.
    """
    function = function_of(loss)
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


def has_label(outputs: Tensor, targets: Tensor) -> bool:
    """Tells whether targets are classes that scores can choose.

    Args:
        outputs: The scores of a batch.
        targets: Its targets.

    Returns:
        Whether they are; with one score for each target they are the labels 0 and 1.
    """
    return not _one_score_a_target(outputs, targets) or _are_labels(targets)


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
        if _are_shares(outputs) and outputs.shape[dim] > 1 and _add_up(outputs, dim):
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
        classes = outputs.ndim == targets.ndim + 1 and outputs.shape[1] > 1
        raise LossError(
            f"{loss} needs outputs and targets of one shape, not {_form(outputs)} and "
            f"{_form(targets)}",
            (classes and _cure_of_classes(targets))
            or "Choose another --loss, or a model with one output a target",
        )
    return targets


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


_WEIGHTS: dict[PerExample, Callable[..., Tensor | None]] = {
    cross_entropy: _weigh_classes,
    nll: partial(_weigh_classes, dim=1),
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
"""The losses with a target for each token, the scores of which are the last dimension."""

TAKES_HALF = frozenset({nll, *LOSSES.values(), *METRICS.values()})
"""Those that take half-precision outputs as they are; others get them in float32."""
