"""A model with its loss and metrics: computes numbers per example from a batch."""

from __future__ import annotations

import contextlib
import enum
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from losscli.data import (
    TARGETS,
    Nest,
    RandomnessDetector,
    allocations,
    leaves,
    length,
    map_nest,
    model_inputs,
    realise,
    seed_all,
    separated,
)
from losscli.errors import LosscliError, LossError, ModelError, one_line
from losscli.evaluation.device import widened
from losscli.evaluation.loading import LoadableModel
from losscli.evaluation.losses.built_in import (
    LOSSES,
    TOKEN_LOSSES,
    PerExample,
    function_of,
    nll,
    on_device,
    per_example_mean,
)
from losscli.evaluation.losses.class_targets import describe
from losscli.evaluation.losses.example_weights import weights_of
from losscli.evaluation.losses.metrics import METRICS, perplexity
from losscli.evaluation.losses.torch_losses import TorchLoss
from losscli.evaluation.objective_functions import (
    MODEL,
    OWN_LOSS,
    ObjectiveFunction,
    ObjectiveOutputs,
    own_loss,
    returned_losses,
    scores_of,
)
from losscli.evaluation.strategies.deferred_head import DeferredHead, head_weight
from losscli.models import suggest_fix

__all__ = [
    "HALF",
    "NO_GRAPH",
    "Samples",
    "ScoredModel",
    "is_registered",
    "mean_over_seeds",
    "scores_in",
]

_T = TypeVar("_T")

HALF = torch.bfloat16, torch.float16

_KNOWN_FUNCTIONS = frozenset({nll, *LOSSES.values(), *METRICS.values()})

# Most tensors in an error: ragged inputs may have hundreds.
_MOST_SHAPES = 4

# Part of torch's message for a tensor that cannot be differentiated.
NO_GRAPH = "does not require grad"

# A random loss must not draw the numbers of the forward pass with the same seed.
_LOSS_STREAM = 1 << 40


class Samples(NamedTuple):
    """The outputs of a random model for several seeds."""

    outputs: tuple[Any, ...]


class ScoredModel(LoadableModel):
    """A model with its loss and metrics.

    Args:
        model: The model.
        loss: The per-example loss.
        metrics: The per-example metrics by name.
        device: Where to compute.
        dtype: The type of the forward pass.
        batch_loss: Whether the loss is one number per batch.
        function: An objective, which replaces the loss of outputs and targets.
        seeds: The seeds of a random model: outputs are then `Samples`, and losses means over them.

    Attributes:
        draws: Whether a forward pass or a loss has drawn random numbers.
        copies_inputs: Whether the model modifies its inputs in place, so that it needs copies.
        copies_outputs: Whether the loss modifies the model's outputs in place.
        differentiates: Whether the model or the loss differentiates, as physics-informed networks
            do with respect to their inputs.
        widens: Whether code that casts to a narrower type is made to compute in float64.
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
        function: ObjectiveFunction | None = None,
        seeds: Sequence[int] = (),
    ) -> None:
        super().__init__(model, device, dtype)
        self.function = function
        self.seeds = tuple(seeds)
        self.draws = False
        self.loss = on_device(loss, device) if function is None else returned_losses
        self.metrics = dict(metrics)
        self.batch_loss = batch_loss
        self.copies_inputs = False
        self.copies_outputs = False
        self.differentiates = False
        self.widens = False
        self._conventions: dict[tuple[str, ...], _Convention] = {}
        self._head = head_weight(self.model)

    @property
    def sum_type(self) -> torch.dtype:
        """The type in which losses and metrics are summed."""
        # MPS has no float64.
        return torch.float32 if self.device.type == "mps" else torch.float64

    def forward(self, model: Callable[..., Any], inputs: Nest) -> Any:
        """Runs the model, or a function in its place.

        Args:
            model: The model, or the function.
            inputs: The prepared inputs of a batch, or the prepared batch for an objective.

        Returns:
            The outputs of the model, or those of the objective; with seeds, `Samples` of them.

        Raises:
            ModelError: The model or the objective fails.
        """
        if not self.seeds:
            return self._pass(model, inputs)
        return Samples(tuple(self._for_each_seed(lambda _: self._pass(model, inputs))))

    def _for_each_seed(self, function: Callable[[int], _T], stream: int = 0) -> list[_T]:
        """Calls a function with the index of each seed, and restores the generators."""
        results = []
        with RandomnessDetector(self.device):
            for k, seed in enumerate(self.seeds):
                seed_all(seed ^ stream, self.device)
                if self.draws:
                    results.append(function(k))
                    continue
                with RandomnessDetector(self.device) as detector:
                    results.append(function(k))
                self.draws = bool(detector.names)
        return results

    def _pass(self, model: Callable[..., Any], inputs: Nest) -> Any:
        if self.copies_inputs:
            inputs = map_nest(Tensor.clone, inputs)
        if self.function is None:
            outputs = self._call(model, inputs)
            # Hugging Face models return their scores in an object.
            return getattr(outputs, "logits", outputs)
        if self.function == MODEL:
            outputs = self._call(model, *separated(inputs))
            return ObjectiveOutputs(own_loss(outputs), scores_of(outputs) if self.metrics else ())
        losses = self._apply(self.function, model, inputs)
        outputs = self._call(model, model_inputs(inputs)) if self.metrics else ()
        return ObjectiveOutputs(losses, getattr(outputs, "logits", outputs))

    def _apply(self, function: Callable[..., Any], model: Callable[..., Any], batch: Any) -> Any:
        """Computes an objective."""
        try:
            with self.computing(), torch.enable_grad():
                return function(model, batch)
        except (torch.OutOfMemoryError, MemoryError, LosscliError):
            raise
        except Exception as error:
            what = batch if isinstance(batch, list | tuple) else type(batch).__name__
            kinds = what if isinstance(what, str) else ", ".join(type(x).__name__ for x in what)
            raise ModelError(
                f"the objective fails: {one_line(error)}",
                _advise_on_graph(error)
                or f"It receives the model and the batch of the data ({kinds})",
            ) from error

    def _call(self, model: Callable[..., Any], inputs: Nest, targets: Nest | None = None) -> Any:
        """Runs the model on inputs, and on targets if it takes them."""
        args, kwargs = self.arguments(inputs)
        if targets is not None:
            name = _target_name(self.model) or ("labels" if kwargs else None)
            args, kwargs = (
                ((*args, targets), kwargs) if name is None else (args, {**kwargs, name: targets})
            )
        try:
            with self.computing(), self._gradients():
                if (
                    isinstance(inputs, dict)
                    and targets is None
                    and self._conventions[tuple(inputs)] is _Convention.EITHER
                ):
                    return self._try_conventions(model, inputs)
                return model(*args, **kwargs)
        except (torch.OutOfMemoryError, MemoryError, LosscliError):
            raise
        except Exception as error:
            shapes = " and ".join(
                str(list(tensor.shape)) for tensor in leaves(inputs)[:_MOST_SHAPES]
            )
            usual = "Do --model and --data belong together? (flatten=true flattens images)"
            raise ModelError(
                f"the model fails on inputs of shape {shapes}: {one_line(error)}",
                suggest_fix(self.model, inputs, leaves(inputs))
                or _advise_on_graph(error)
                or _advise_on_type(error, inputs)
                or (usual if targets is None else OWN_LOSS),
            ) from error

    def deferring(self) -> AbstractContextManager[Any]:
        """Defers the scores of tokens until the loss takes them.

        Returns:
            A context for a forward pass. Its outputs must be used before the weights change.
        """
        if self._head is None:
            return contextlib.nullcontext()
        functions = {function_of(self.loss), *map(function_of, self.metrics.values())}
        # An accuracy would compute the scores once more.
        if not functions <= {*TOKEN_LOSSES, perplexity}:
            return contextlib.nullcontext()
        return DeferredHead(self._head)

    def computing(self) -> AbstractContextManager[None]:
        """Ensures that everything computes in the type of the forward pass.

        Returns:
            A context for all computations with the model, such as a backward pass. Allocations
            that fail in it raise ``torch.OutOfMemoryError``.
        """
        return _widened_allocations() if self.widens else allocations()

    def _gradients(self) -> AbstractContextManager[Any]:
        """Enables gradients if the model or the loss differentiates."""
        return torch.enable_grad() if self.differentiates else contextlib.nullcontext()

    def arguments(self, inputs: Nest) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arranges inputs as the model's ``forward`` takes them.

        Args:
            inputs: A prepared batch.

        Returns:
            The positional and the keyword arguments. Named inputs are passed as keywords if
            ``forward`` has parameters of these names, else as one mapping; a single input of an
            unknown name is passed by position.
        """
        if isinstance(inputs, Tensor):
            return (inputs,), {}
        if isinstance(inputs, tuple):
            return inputs, {}
        names = tuple(inputs)
        if names not in self._conventions:
            self._conventions[names] = _convention_of(self.model, names)
        convention = self._conventions[names]
        if convention is _Convention.KEYWORDS:
            return (), inputs
        return (inputs if convention is _Convention.MAPPING else inputs[names[0]],), {}

    def _try_conventions(self, model: Callable[..., Any], inputs: dict[str, Tensor]) -> Any:
        """Runs the model on a single named input and stores the convention that works."""
        (name,) = inputs
        convention = _Convention.VALUE
        try:
            with allocations():
                outputs = model(inputs[name])
        except (torch.OutOfMemoryError, MemoryError, LosscliError):
            raise
        except Exception as error:  # noqa: BLE001 - the user's code may raise anything
            convention = _Convention.MAPPING
            try:
                outputs = model(inputs)
            except Exception:  # noqa: BLE001 - the first failure is reported
                raise error from None
        self._conventions[name,] = convention
        return outputs

    def per_example(self, function: PerExample, outputs: Any, targets: Nest, what: str) -> Tensor:
        """Computes a loss or a metric of a batch.

        Args:
            function: The loss or metric.
            outputs: The outputs of the model; half-precision scores are converted to float32 for a
                function that does not do so itself.
            targets: The targets of the batch, ``[B, …]``, or a nest of them.
            what: The name of the function in errors.

        Returns:
            One number per example, ``[B]``. With ``batch_loss`` one number, ``[1]``: the mean if
            the function returns one per example. With seeds the mean over them.

        Raises:
            LossError: The function fails, or returns something else.
        """
        return mean_over_seeds(self.per_seed(function, outputs, targets, what))

    def per_seed(self, function: PerExample, outputs: Any, targets: Nest, what: str) -> Tensor:
        """Computes `per_example` for each of S seeds, ``[S, B]``; without seeds ``[1, B]``."""
        if not isinstance(outputs, Samples):
            return self._values(function, outputs, targets, what).unsqueeze(0)
        own = outputs.outputs

        def values(k: int) -> Tensor:
            return self._values(function, own[k], targets, what)

        if is_registered(function) or function is returned_losses:
            return torch.stack([values(k) for k, _ in enumerate(own)])
        return torch.stack(self._for_each_seed(values, _LOSS_STREAM))

    def _values(self, function: PerExample, outputs: Any, targets: Nest, what: str) -> Tensor:
        examples, targets = length(targets), realise(targets)
        if isinstance(outputs, ObjectiveOutputs):
            is_loss = function is self.loss
            outputs = outputs.losses if is_loss else outputs.outputs
            what = "objective" if is_loss else what
        if is_registered(function) or isinstance(function, TorchLoss):
            if not isinstance(targets, Tensor):
                raise LossError(
                    f"the {what} takes a tensor of targets, and the data give a "
                    f"{type(targets).__name__}",
                    "Give a --loss of your own, path/to/file.py:callable, that takes it"
                    if what == "loss"
                    else "Give --metric none, or a metric of your own that takes it",
                )
            outputs = scores_in(outputs)
            # A user's function gets the targets in the type of the data.
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
            cure = _advise_on_graph(error) or _received(outputs, targets)
            raise LossError(f"the {what} fails: {one_line(error)}", cure) from error
        if not isinstance(values, Tensor) or not (
            values.ndim <= 1 and values.numel()
            if self.batch_loss
            else values.shape[:1] == (examples,)
        ):
            is_tensor = isinstance(values, Tensor)
            got = f"shape {list(values.shape)}" if is_tensor else type(values).__name__
            unit = "batch" if self.batch_loss else "example"
            raise LossError(
                f"the {what} gives {got} for a batch of {examples} examples, not one number per "
                f"{unit}",
                _advise_on_values(is_loss=function is self.loss, batch_loss=self.batch_loss),
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

    def own_values(self, outputs: Any, targets: Nest, loss: Tensor) -> dict[str, Tensor]:
        """Returns losses, and metrics that may not be per example, ``[B]``, float64 on the CPU."""
        values = {"loss": loss}
        for name, metric in self.metrics.items():
            if not is_registered(metric):
                what = f"metric {name!r}"
                values[what] = self.per_example(metric, outputs, targets, what)
        return {what: own.cpu().double() for what, own in values.items()}

    def weight(self, outputs: Any, targets: Nest) -> float:
        """Returns the sum of the weights of the examples of a batch in the mean loss.

        Returns:
            The sum. The sum of the losses divided by it is the mean loss of the batch. With
            ``batch_loss`` it is 1, as for every batch.
        """
        if self.batch_loss:
            return 1.0
        weights = weights_of(self.loss, scores_in(outputs), realise(targets))
        return float(length(targets) if weights is None else weights.sum())


@contextlib.contextmanager
def _widened_allocations() -> Iterator[None]:
    with allocations(), widened():
        yield


def mean_over_seeds(values: Tensor, dim: int = 0) -> Tensor:
    """Averages over a dimension, which has one entry without seeds."""
    return values.select(dim, 0) if values.shape[dim] == 1 else values.mean(dim)


class _Convention(enum.Enum):
    """How a model takes named inputs."""

    KEYWORDS = enum.auto()
    """As keyword arguments."""
    MAPPING = enum.auto()
    """As one mapping."""
    VALUE = enum.auto()
    """A single one, by position."""
    EITHER = enum.auto()
    """A single one by position or, if that fails, as a mapping."""


def _convention_of(model: nn.Module, names: tuple[str, ...]) -> _Convention:
    """Determines from the signature of ``forward`` how it takes named inputs."""
    single = len(names) == 1
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # compiled code has no signature
        return _Convention.EITHER if single else _Convention.KEYWORDS
    explicit = [p.name for p in signature.parameters.values() if p.kind not in _VARIABLE]
    by_name = _binds(signature, **dict.fromkeys(names))
    if not _binds(signature, None):
        return _Convention.KEYWORDS
    if not single:
        return _Convention.KEYWORDS if by_name else _Convention.MAPPING
    if explicit[:1] == [names[0]]:
        return _Convention.VALUE
    # A model that takes any keyword may still expect a single input by position.
    return _Convention.KEYWORDS if by_name and names[0] in explicit else _Convention.EITHER


def _target_name(model: nn.Module) -> str | None:
    """Returns the parameter of ``forward`` that takes targets; None if none has a usual name."""
    try:
        parameters = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return None
    return next((name for name in TARGETS if name in parameters), None)


_VARIABLE = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD


def _binds(signature: inspect.Signature, /, *args: Any, **kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _advise_on_graph(error: Exception) -> str:
    """Advises on differentiating inputs without gradients; empty for other errors."""
    if NO_GRAPH not in str(error):
        return ""
    return (
        "What is differentiated inside needs gradients: call x.requires_grad_(True) on it first, "
        "and use neither torch.no_grad() nor detach() on the way; torch.enable_grad() enables them"
    )


def _received(outputs: Any, targets: Nest) -> str:
    """Describes what a loss or a metric that fails was called with."""
    if isinstance(outputs, Mapping):
        keys = ", ".join(map(str, outputs))
        return f"It receives the mapping that the model returns, with the keys {keys}"
    if isinstance(outputs, Tensor) and isinstance(targets, Tensor):
        return f"It receives outputs {describe(outputs)} and targets {describe(targets)}"
    return ""


def _advise_on_values(*, is_loss: bool, batch_loss: bool) -> str:
    """Advises on what a loss may return; empty for a metric of single examples."""
    if batch_loss:
        return "Return one number per batch, or one per example, of which the mean is taken"
    if not is_loss:
        return ""
    return (
        "Return one number per example, as with reduction=none; or give --batch-loss, if the loss "
        "is one number per batch"
    )


def is_registered(function: PerExample) -> bool:
    """Whether a loss or metric is one of losscli's own; these take half-precision outputs."""
    return function_of(function) in _KNOWN_FUNCTIONS


def scores_in(outputs: Any) -> Any:
    """The scores in a model's outputs, those of the first seed: ``logits`` if it is a mapping."""
    if isinstance(outputs, Samples):
        outputs = outputs.outputs[0]
    if isinstance(outputs, ObjectiveOutputs):
        outputs = outputs.outputs
    return outputs.get("logits", outputs) if isinstance(outputs, Mapping) else outputs


def _is_crossed(values: Tensor, outputs: Any, targets: Any) -> bool:
    """Whether broadcasting paired the outputs of examples with the targets of others."""
    if values.ndim < 2 or not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return False
    if values.shape in {outputs.shape, targets.shape}:
        return False
    try:
        together = np.broadcast_shapes(outputs.shape, targets.shape)
    except ValueError:
        return False
    return values.shape == together


def _advise_on_type(error: Exception, inputs: Nest) -> str:
    """Advises on integer inputs of a type that a model does not take; empty for other errors."""
    # Messages of torch: "must have the same dtype", "Input type (unsigned char) and bias type".
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
