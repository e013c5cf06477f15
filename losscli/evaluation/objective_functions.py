"""Objectives of user code: functions of the model and a batch that return the losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from losscli.errors import LossError

__all__ = [
    "MODEL",
    "OWN_LOSS",
    "ObjectiveFunction",
    "ObjectiveOutputs",
    "own_loss",
    "returned_losses",
    "scores_of",
]

MODEL: Literal["model"] = "model"
"""The objective that is the loss returned by the model."""

OWN_LOSS = (
    "--objective model needs output.loss or (logits, loss), and data that name the targets as "
    "forward does; else give --objective path/to/file.py:callable"
)
"""Advice on what a model has to return to be its own objective."""

ObjectiveFunction = Callable[[nn.Module, Any], Tensor] | Literal["model"]
"""Computes the losses of a batch from the model and the batch, or `MODEL`."""


class ObjectiveOutputs(NamedTuple):
    """What an objective returns for a batch.

    Attributes:
        losses: The losses that the function returned.
        outputs: The outputs of the model, for metrics; empty if there are none.
    """

    losses: Any
    outputs: Any


def returned_losses(outputs: Any, targets: Any) -> Any:  # noqa: ARG001 - a loss takes both
    """Returns the losses themselves: the loss function of an objective."""
    return outputs


def own_loss(outputs: Any) -> Tensor:
    """Finds the loss in what a model returns.

    Args:
        outputs: An object or a mapping with ``loss``, or ``(logits, loss)``.

    Returns:
        The loss, one number.

    Raises:
        LossError: There is no such number.
    """
    loss = getattr(outputs, "loss", None)
    if loss is None and isinstance(outputs, Mapping):
        loss = outputs.get("loss")
    if loss is None and isinstance(outputs, tuple) and len(outputs) == 2:
        loss = outputs[1]
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = "None" if outputs is None else f"a {type(outputs).__name__}"
        raise LossError(
            f"the model returns {what} without a loss that is one number",
            OWN_LOSS,
        )
    return loss


def scores_of(outputs: Any) -> Any:
    """Returns the outputs for metrics of a model that returns its own loss."""
    is_pair = type(outputs) is tuple and len(outputs) == 2
    return outputs[0] if is_pair else getattr(outputs, "logits", outputs)
