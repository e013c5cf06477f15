"""Converts the losses of torch.nn and torch.nn.functional to losses per example."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from losscli.errors import SpecError, one_line
from losscli.evaluation.losses.built_in import PerExample, cross_entropy, nll

__all__ = ["TorchLoss", "from_torch", "is_of_torch"]

# Losses with a mean that is weighted by the targets.
_OF_CLASSES: dict[Any, PerExample] = {
    nn.CrossEntropyLoss: cross_entropy,
    F.cross_entropy: cross_entropy,
    nn.NLLLoss: nll,
    F.nll_loss: nll,
}

# Losses of scores: the highest, or a positive one, is the prediction.
_OF_SCORES = frozenset({
    "BCEWithLogitsLoss", "MultiLabelSoftMarginLoss", "MultiMarginLoss", "SoftMarginLoss",
    "binary_cross_entropy_with_logits", "multi_margin_loss", "multilabel_soft_margin_loss",
    "soft_margin_loss",
})  # fmt: skip

# Arguments of torch's losses that are not options here: those passed at each call, and those that
# torch replaced by `reduction`.
_NOT_OPTIONS = frozenset({"input", "target", "size_average", "reduce"})


class TorchLoss:
    """A loss of torch without reduction.

    Args:
        function: A module of `torch.nn`, or a function of `torch.nn.functional`.
        options: The keyword arguments of the function.

    Attributes:
        of_scores: Whether it compares scores of classes with labels.
    """

    def __init__(self, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
        self._function = function
        self._options = options
        self.of_scores = _name(function) in _OF_SCORES

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Computes the values of all elements, as torch does with ``reduction="none"``."""
        device, dtype = outputs.device, outputs.dtype
        function = self._function
        if isinstance(function, nn.Module):
            function.to(device, dtype)
        if targets.is_floating_point():
            targets = targets.to(dtype)
        options = {
            key: value.to(device, dtype) if isinstance(value, Tensor) else value
            for key, value in self._options.items()
        }
        with warnings.catch_warnings():
            # Shapes that do not fit are an error later on.
            warnings.filterwarnings("ignore", "Using a target size", UserWarning)
            values: Tensor = function(outputs, targets, **options)
        return values


def is_of_torch(value: Any) -> bool:
    """Whether `from_torch` takes an object: a loss of torch, its class, or a partial of either."""
    if isinstance(value, partial):
        return not value.args and is_of_torch(value.func)
    kind = value if isinstance(value, type) else type(value)
    if kind.__module__ == nn.modules.loss.__name__:
        return issubclass(kind, nn.modules.loss._Loss)
    of_torch = getattr(value, "__module__", "") == F.__name__ and callable(value)
    return of_torch and "reduction" in inspect.signature(value).parameters


def from_torch(value: Any, options: Mapping[str, Any], where: str) -> tuple[PerExample, str]:
    """Converts a loss of torch to a loss per example.

    The mean over all elements is the mean over examples of each example's mean, so
    ``reduction="mean"`` and ``reduction="none"`` are the same loss here.

    Args:
        value: The loss, which `is_of_torch`.
        options: The keys of its spec. Lists of numbers, and weights, become tensors.
        where: Its name in errors.

    Returns:
        The loss per example, and its name with all its options.

    Raises:
        SpecError: Torch does not accept the options, or they request a sum over a batch.
    """
    if isinstance(value, partial):
        value, options = value.func, {**value.keywords, **options}
    options = {key: _as_tensor(key, option) for key, option in options.items()}
    not_a_mean = SpecError(
        f"{where} is reduced by other means than a mean over its elements",
        "Give reduction=none, or a function of your own that returns one number per example",
    )
    if _NOT_OPTIONS & options.keys():
        raise not_a_mean
    try:
        if isinstance(value, type):
            value, options = value(**options), {}
        elif not isinstance(value, nn.Module):
            inspect.signature(value).bind(None, None, **options)
    except Exception as error:
        known = [key for key in inspect.signature(value).parameters if key not in _NOT_OPTIONS]
        raise SpecError(f"{where}: {one_line(error)}", f"It takes {', '.join(known)}") from error
    if isinstance(value, nn.Module):
        value, kind = deepcopy(value), type(value)
        settings = {**vars(value), **value._buffers}
        own = [key for key in inspect.signature(kind).parameters if key in settings]
        described = {key: settings[key] for key in own}
    else:
        kind, described = value, dict(options)
    if described.pop("reduction", "mean") not in {"mean", "none"}:
        raise not_a_mean
    described = {key: option for key, option in described.items() if option is not None}
    written = ", ".join(f"{key}={_written(option)}" for key, option in described.items())
    text = f"{_name(value)}({written})"
    if kind in _OF_CLASSES:
        if _OF_CLASSES[kind] is cross_entropy:
            # The dimension in which torch reads the classes.
            described["dim"] = 1
        return partial(_OF_CLASSES[kind], **described), text
    if isinstance(value, nn.modules.loss._Loss):
        value.reduction = "none"
        return TorchLoss(value, {}), text
    return TorchLoss(value, {**options, "reduction": "none"}), text


def _as_tensor(key: str, option: Any) -> Any:
    weighs = key in {"weight", "pos_weight"} and isinstance(option, int | float)
    if weighs or isinstance(option, list):
        return torch.as_tensor(option, dtype=torch.float64)
    return option


def _written(option: Any) -> str:
    return str(option.tolist()) if isinstance(option, Tensor) else str(option)


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))
