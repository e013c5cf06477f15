"""A model with its loss and metrics: from a batch of inputs and targets to numbers per example."""

from __future__ import annotations

import contextlib
import enum
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from losscli.data import Inputs, leaves, map_inputs
from losscli.errors import LosscliError, LossError, ModelError, one_line
from losscli.evaluation.device import widened
from losscli.evaluation.example_weights import weights_of
from losscli.evaluation.loading import LoadableModel
from losscli.evaluation.losses import LOSSES, PerExample, function_of, nll, per_example_mean
from losscli.evaluation.metrics import METRICS
from losscli.evaluation.torch_losses import TorchLoss
from losscli.models import suggest_fix

__all__ = ["HALF", "NO_GRAPH", "ScoredModel", "is_registered", "scores_in"]

HALF = torch.bfloat16, torch.float16

_KNOWN_FUNCTIONS = frozenset({nll, *LOSSES.values(), *METRICS.values()})

# What torch says of a tensor that cannot be differentiated.
NO_GRAPH = "does not require grad"


class ScoredModel(LoadableModel):
    """A model with its loss and metrics.

    Args:
        model: The model.
        loss: The per-example loss.
        metrics: The per-example metrics by name.
        device: Where to compute.
        dtype: The type of the forward pass.
        batch_loss: Whether the loss is one number per batch.

    Attributes:
        copies_inputs: Whether the model writes on its inputs, so that it is given copies.
        copies_outputs: Whether the loss writes on the outputs of the model.
        differentiates: Whether the model or the loss differentiates, as physics-informed networks
            do by their inputs.
        widens: Whether code that casts to a narrower type computes in float64 nevertheless.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: PerExample,
        metrics: Mapping[str, PerExample],
        *,
        device: torch.device,
        dtype: torch.dtype,
        batch_loss: bool,
    ) -> None:
        super().__init__(model, device, dtype)
        self.loss = loss
        self.metrics = dict(metrics)
        self.batch_loss = batch_loss
        self.copies_inputs = False
        self.copies_outputs = False
        self.differentiates = False
        self.widens = False
        self._forms: dict[tuple[str, ...], _Form] = {}

    @property
    def sum_type(self) -> torch.dtype:
        """The type in which losses and metrics are added up."""
        # float64 where the device has it: MPS does not, and counts of examples fit float32 there.
        return torch.float32 if self.device.type == "mps" else torch.float64

    def forward(self, model: Callable[..., Any], inputs: Inputs) -> Any:
        """Runs the model, or what stands in for it.

        Args:
            model: What to call.
            inputs: A prepared batch.

        Returns:
            What the model returns.

        Raises:
            ModelError: The model fails.
        """
        if self.copies_inputs:
            inputs = map_inputs(Tensor.clone, inputs)
        args, kwargs = self.arguments(inputs)
        try:
            with self.computing(), self._gradients():
                if isinstance(inputs, dict) and self._forms[tuple(inputs)] is _Form.EITHER:
                    outputs = self._try_forms(model, inputs)
                else:
                    outputs = model(*args, **kwargs)
        except (torch.OutOfMemoryError, MemoryError, LosscliError):
            raise
        except Exception as error:
            shapes = " and ".join(str(list(tensor.shape)) for tensor in leaves(inputs))
            raise ModelError(
                f"the model fails on inputs of shape {shapes}: {one_line(error)}",
                suggest_fix(self.model, inputs, leaves(inputs))
                or _cure_of_graph(error)
                or _cure_of_type(error, inputs)
                or "Do --model and --data belong together? (flatten=true flattens images)",
            ) from error
        # Hugging Face models wrap their scores.
        return getattr(outputs, "logits", outputs)

    def computing(self) -> AbstractContextManager[Any]:
        """Computes in the type of the forward pass.

        Returns:
            A context for all that computes with the model, such as a backward pass.
        """
        return widened() if self.widens else contextlib.nullcontext()

    def _gradients(self) -> AbstractContextManager[Any]:
        """Enables gradients, where the model or the loss differentiates."""
        return torch.enable_grad() if self.differentiates else contextlib.nullcontext()

    def arguments(self, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arranges inputs as the model's ``forward`` takes them.

        Args:
            inputs: A prepared batch.

        Returns:
            The arguments by position and by name. Inputs with names are passed by name where
            ``forward`` has parameters of these names, else as the mapping that they are; a single
            one whose name is not known, by position.
        """
        if isinstance(inputs, Tensor):
            return (inputs,), {}
        if isinstance(inputs, tuple):
            return inputs, {}
        names = tuple(inputs)
        if names not in self._forms:
            self._forms[names] = _form_of(self.model, names)
        form = self._forms[names]
        if form is _Form.KEYWORDS:
            return (), inputs
        return (inputs if form is _Form.MAPPING else inputs[names[0]],), {}

    def _try_forms(self, model: Callable[..., Any], inputs: dict[str, Tensor]) -> Any:
        """Runs the model on a single named input, and keeps the form in which it takes it."""
        (name,) = inputs
        form = _Form.VALUE
        try:
            outputs = model(inputs[name])
        except (torch.OutOfMemoryError, MemoryError, LosscliError):
            raise
        except Exception as error:  # noqa: BLE001 - the user's code may raise anything
            form = _Form.MAPPING
            try:
                outputs = model(inputs)
            except Exception:  # noqa: BLE001 - the first failure is reported
                raise error from None
        self._forms[name,] = form
        return outputs

    def per_example(self, function: PerExample, outputs: Any, targets: Tensor, what: str) -> Tensor:
        """Takes a loss or a metric of a batch.

        Args:
            function: The loss or metric.
            outputs: What the model returned; half-precision scores are made float32 for a function
                that does not take care of that itself.
            targets: The targets of the batch, ``[B, …]``.
            what: What to call the function in errors.

        Returns:
            One number per example, ``[B]``; of a loss that is one number per batch ``[1]``, the
            mean where it gives a number per example.

        Raises:
            LossError: It fails, or gives something else.
        """
        if is_registered(function) or isinstance(function, TorchLoss):
            outputs = scores_in(outputs)
            # What the user's code gives in another type reaches the user's functions as it is.
            targets = targets if targets.is_floating_point() else targets.long()
        if self.copies_outputs:
            outputs = tree_map_only(Tensor, Tensor.clone, outputs)
        half = isinstance(outputs, Tensor) and outputs.dtype in HALF
        if half and not is_registered(function):
            outputs = outputs.float()
        if is_registered(function) and not isinstance(outputs, Tensor):
            raise LossError(
                f"the {what} takes a tensor, and the model returns a {type(outputs).__name__}"
            )
        try:
            with self.computing(), self._gradients():
                values = function(outputs, targets)
        except (torch.OutOfMemoryError, MemoryError, LosscliError):
            raise
        except Exception as error:
            cure = _cure_of_graph(error)
            if isinstance(outputs, Mapping):
                keys = ", ".join(map(str, outputs))
                cure = f"It receives the mapping that the model returns, with the keys {keys}"
            raise LossError(f"the {what} fails: {one_line(error)}", cure) from error
        if not isinstance(values, Tensor) or not (
            values.ndim <= 1 and values.numel()
            if self.batch_loss
            else values.shape[:1] == targets.shape[:1]
        ):
            got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise LossError(
                f"the {what} gives {got} for a batch of {len(targets)} examples",
                "Return one number per batch, or one per example, of which the mean is taken"
                if self.batch_loss
                else "Return one number per example, as with reduction=none; or give --batch-loss, "
                "if the loss is one number per batch",
            )
        if values.is_complex():
            raise LossError(f"the {what} gives complex numbers", "Return real ones")
        if _is_crossed(values, outputs, targets):
            raise LossError(
                f"the {what} gives {list(values.shape)} for outputs {list(outputs.shape)} and "
                f"targets {list(targets.shape)}: it pairs outputs with targets of other examples",
                "Give outputs and targets of one shape, for example with outputs.squeeze(1)",
            )
        if not self.batch_loss:
            return per_example_mean(values)
        values = values.to(self.sum_type)
        weights = weights_of(function, outputs, targets)
        mean = values.mean() if weights is None else values.sum() / weights.sum()
        return mean.reshape(1)

    def own_values(self, outputs: Any, targets: Tensor, loss: Tensor) -> dict[str, Tensor]:
        """Adds the metrics that are not known to be per example to the losses of a batch.

        Args:
            outputs: What the model returned.
            targets: The targets of the batch.
            loss: The loss of each example.

        Returns:
            The values by name, ``[B]`` each, float64 on the CPU.
        """
        values = {"loss": loss}
        for name, metric in self.metrics.items():
            if not is_registered(metric):
                what = f"metric {name!r}"
                values[what] = self.per_example(metric, outputs, targets, what)
        return {what: own.cpu().double() for what, own in values.items()}

    def weight(self, outputs: Any, targets: Tensor) -> float:
        """Adds up the weights of the examples of a batch in the mean loss.

        Args:
            outputs: What the model returned.
            targets: The targets of the batch.

        Returns:
            The sum of the losses over it is the batch's mean loss.
        """
        weights = weights_of(self.loss, scores_in(outputs), targets)
        return float(len(targets) if weights is None else weights.sum())


class _Form(enum.Enum):
    """How a model takes inputs with names."""

    KEYWORDS = enum.auto()
    """By name."""
    MAPPING = enum.auto()
    """All in one mapping."""
    VALUE = enum.auto()
    """A single one, by position."""
    EITHER = enum.auto()
    """A single one by position, or where that fails in a mapping."""


def _form_of(model: nn.Module, names: tuple[str, ...]) -> _Form:
    """Finds out from the signature of ``forward`` how it takes inputs with names."""
    single = len(names) == 1
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # of compiled code
        return _Form.EITHER if single else _Form.KEYWORDS
    explicit = [p.name for p in signature.parameters.values() if p.kind not in _VARIABLE]
    by_name = _binds(signature, **dict.fromkeys(names))
    if not _binds(signature, None):
        return _Form.KEYWORDS
    if not single:
        return _Form.KEYWORDS if by_name else _Form.MAPPING
    if explicit[:1] == [names[0]]:
        return _Form.VALUE
    # A model that takes any name may want a single input by its position.
    return _Form.KEYWORDS if by_name and names[0] in explicit else _Form.EITHER


_VARIABLE = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD


def _binds(signature: inspect.Signature, /, *args: Any, **kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _cure_of_graph(error: Exception) -> str:
    """Explains that what is differentiated has no gradients; empty for other errors."""
    if NO_GRAPH not in str(error):
        return ""
    return (
        "What is differentiated inside needs gradients: call x.requires_grad_(True) on it first, "
        "and use neither torch.no_grad() nor detach() on the way; torch.enable_grad() enables them"
    )


def is_registered(function: PerExample) -> bool:
    """Whether a loss or metric is one of losscli's own; these take half-precision outputs."""
    return function_of(function) in _KNOWN_FUNCTIONS


def scores_in(outputs: Any) -> Any:
    """The scores among a model's outputs: what stands under ``logits`` in a mapping."""
    return outputs.get("logits", outputs) if isinstance(outputs, Mapping) else outputs


def _is_crossed(values: Tensor, outputs: Any, targets: Tensor) -> bool:
    """Tells whether broadcasting paired the outputs of examples with the targets of others."""
    if values.ndim < 2 or not isinstance(outputs, Tensor):
        return False
    if values.shape in {outputs.shape, targets.shape}:
        return False
    try:
        together = np.broadcast_shapes(outputs.shape, targets.shape)
    except ValueError:
        return False
    return values.shape == together


def _cure_of_type(error: Exception, inputs: Inputs) -> str:
    """Explains a type that a model does not take, where whole numbers reach it unchanged."""
    # The words of torch: "must have the same dtype", "Input type (unsigned char) and bias type".
    if "type" not in str(error):
        return ""
    for tensor in leaves(inputs):
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            scale = " / 255, or for npz, safetensors and hf scale=true" if kind == "uint8" else ""
            return (
                f"Inputs of the type {kind} reach the model unchanged: convert them in its forward "
                f"or in the code of --data, for example x.float(){scale}"
            )
    return ""
