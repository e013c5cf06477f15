"""The data, the loss and the metrics of a problem, from their specs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from losscli.data import Batching, DataSet, Examples, from_object, load, realise
from losscli.errors import LosscliError, LossError, SpecError, UsageError, one_line
from losscli.evaluation.forward import is_registered
from losscli.evaluation.loading import named_tensors
from losscli.evaluation.losses.built_in import (
    LOSSES,
    PerExample,
    causal_lm,
    cross_entropy,
    function_of,
    options_of,
    token_cross_entropy,
)
from losscli.evaluation.losses.metrics import METRICS, accuracy, is_higher_better
from losscli.evaluation.losses.targets import class_dim_of
from losscli.evaluation.losses.torch_losses import from_torch, is_of_torch
from losscli.evaluation.objective_functions import MODEL, ObjectiveFunction, returned_losses
from losscli.evaluation.recalibration import Recalibration, batchnorm_layers
from losscli.models import (
    HEADLESS,
    NEEDS_DECODER,
    is_headless,
    label_loss,
    needs_decoder_inputs,
    score_kind,
)
from losscli.registry import RESERVED_COLUMNS
from losscli.settings import Settings
from losscli.spec import Spec, call, look_up
from losscli.studies.specs import SourcedSpec, Specs

__all__ = [
    "data_of",
    "like_loss",
    "loss_of",
    "metrics_of",
    "objective_of",
    "recalibration_of",
    "training_split",
]

_METRIC_OF_TASK = {"classification": "accuracy", "regression": "none", "language": "perplexity"}
_LOSS_OF_TASK = {
    "classification": "cross_entropy",
    "regression": "mse",
    "language": "causal_lm",
}
_TARGETS_OF_TASK = {
    "classification": "integer targets",
    "regression": "float targets",
    "language": "language data",
}


def data_of(
    settings: Settings, found: SourcedSpec | None, *, training: bool
) -> tuple[DataSet, str]:
    """Reads the data.

    Args:
        settings: The settings.
        found: The spec of the data.
        training: Whether training examples are needed, also if ``--split`` leaves them out.

    Returns:
        The data set and its name; all its splits if training examples are needed.

    Raises:
        UsageError: No data set is given.
    """
    if found is None:
        raise UsageError(
            "no data set given, by --data, by the checkpoint's metadata or by a "
            "losscli.toml next to it or here",
            "Give --data, for example --data mnist:FOLDER (losscli list data)",
        )
    chosen: dict[str, Any] = {
        "splits": () if training else settings.split,
        "limit": settings.limit,
        "seed": settings.seed,
        "batching": Batching(settings.batch_size) if settings.batch_loss else None,
        "whole": settings.objective is not None,
    }
    if isinstance(found.value, str):
        data = load(
            found.value,
            trusted=found.trusted,
            source=found.source,
            folder=found.folder,
            cure=found.cure,
            **chosen,
        )
    else:
        data = from_object(found.value, "data", **chosen)
    return data, found.text


def recalibration_of(
    model: nn.Module, whole: DataSet, data: DataSet, settings: Settings
) -> Recalibration | None:
    """Plans how BatchNorm's statistics are re-estimated, if they are.

    Args:
        model: The model.
        whole: All splits of the data.
        data: What the loss is evaluated on.
        settings: The settings.

    Returns:
        The plan: on the split ``train``, or the only one.

    Raises:
        UsageError: The model has no such statistics, or the data no training examples.
    """
    if settings.buffers != "recalibrate":
        return None
    if not batchnorm_layers(model, named_tensors(model)):
        raise UsageError(
            "--buffers recalibrate has nothing to re-estimate: the model has no BatchNorm layer "
            "that tracks statistics",
            "Leave it out",
        )
    name, split = training_split(whole, data, settings, "--buffers recalibrate")
    return Recalibration.plan(name, split, settings.seed)


def training_split(
    whole: DataSet, data: DataSet, settings: Settings, option: str
) -> tuple[str, Examples]:
    """Finds the training examples, on which statistics are estimated.

    Args:
        whole: All splits of the data.
        data: What the loss is evaluated on.
        settings: The settings.
        option: What needs them, for errors.

    Returns:
        The name of their split, ``train`` or the only one, and the examples.

    Raises:
        UsageError: There are none, or only one.
    """
    name = "train" if "train" in whole.splits else next(iter(whole.splits))
    if name != "train" and len(whole.splits) > 1:
        raise UsageError(
            f"{option} takes the split train, and the data's splits are {', '.join(whole.splits)}",
            "Give data with a split train, or with only one split",
        )
    split = data.splits.get(name)
    if split is None:
        split = whole.select((name,), None, settings.seed).splits[name]
    if split.rows < 2:
        raise UsageError(
            f"{option} has no more than one example of {name}, which has no variance",
            "Give more" if settings.limit is None else "Give more with --limit",
        )
    return name, split


def loss_of(
    found: SourcedSpec | None, data: DataSet, model: nn.Module
) -> tuple[PerExample, str, str]:
    """Finds the loss: the given one, or the default for the task of the data.

    Args:
        found: The spec of the loss; None for the default.
        data: The data.
        model: The model; for sequences of tokens the default depends on what it scores.

    Returns:
        The per-example loss, its name, and its source.
    """
    if found is None:
        _require_tensors(data)
        own = label_loss(model, floating=data.task == "regression")
        name = own or (_language_loss(data, model) if data.language else _LOSS_OF_TASK[data.task])
        source = f"default for {'the config of the model' if own else _TARGETS_OF_TASK[data.task]}"
        found = SourcedSpec(name, trusted=True, source=source)
    loss, text = _per_example(found, LOSSES, "loss")
    return loss, text, found.source


def objective_of(found: SourcedSpec) -> tuple[ObjectiveFunction, str, str]:
    """Finds an objective.

    Args:
        found: The spec of the objective.

    Returns:
        The function, its name, and its source.
    """
    if isinstance(found.value, str) and found.value == MODEL:
        return MODEL, found.text, found.source
    function, text = _per_example(found, {MODEL: returned_losses}, "objective")
    return function, text, found.source


def _require_tensors(data: DataSet) -> None:
    """Checks that the targets are tensors, for which there is a default loss."""
    for name, split in data.splits.items():
        targets = realise(split.first(1).targets)
        if not isinstance(targets, Tensor):
            raise LossError(
                f"the targets of the split {name!r} are a {type(targets).__name__}, which has no "
                "default loss",
                "Give --loss path/to/file.py:callable, a function (outputs, targets) with one "
                "number per example",
            )


def _language_loss(data: DataSet, model: nn.Module) -> str:
    """Chooses the loss for data with a label for each token, by which tokens the model scores."""
    scores = score_kind(model)
    if scores == "next":
        return "causal_lm"
    kind = type(model).__name__
    if any(needs_decoder_inputs(model, s.first(1).inputs) for s in data.splits.values()):
        raise LossError(f"{kind} predicts from decoder_input_ids, and has none", NEEDS_DECODER)
    if scores == "own":
        return "token_cross_entropy"
    if is_headless(model):
        raise LossError(f"{kind} has no scores for tokens", HEADLESS)
    raise LossError(
        f"the data have a label for each token, and it is not known which tokens {kind} scores",
        "Give --loss: causal_lm, token_cross_entropy, or path/to/file.py:callable",
    )


def metrics_of(
    specs: Specs, data: DataSet, loss: PerExample, model: nn.Module
) -> tuple[dict[str, PerExample], list[str], str]:
    """Finds the metrics: the given ones, or the default for the task of the data.

    Args:
        specs: The specs of the run; no metrics for the default.
        data: The data.
        loss: The loss.
        model: The model.

    Returns:
        The per-example metrics by the names of their columns, their names, and their source.

    Raises:
        UsageError: Two columns would have one name.
        LossError: The ``higher_is_better`` of a metric is not True or False.
    """
    found = specs.metrics
    if specs.objective is not None and not found:
        return {}, [], "default for --objective"
    # causal_lm implies tokens, whatever the form of the data.
    function = function_of(loss)
    default = _METRIC_OF_TASK["language" if function is causal_lm else data.task]
    source = f"default for {_TARGETS_OF_TASK[data.task]}"
    next_tokens = function is causal_lm or score_kind(model) == "next"
    if function is token_cross_entropy or (data.language and not next_tokens):
        default = "none"
    if found:
        source = found[0].source
    metrics: dict[str, PerExample] = {}
    texts = []
    for each in found or (SourcedSpec(default, trusted=True),):
        if each.value == "none":
            continue
        name = _column(each.value)
        if name in metrics or name in RESERVED_COLUMNS:
            raise UsageError(f"the name {name!r} is that of another column", "Rename the metric")
        metric, text = _per_example(each, METRICS, "metric")
        is_higher_better(metric)  # refuses a wrong attribute before the run
        metrics[name] = like_loss(loss, metric)
        texts.append(text)
    return metrics, texts, source


def like_loss(loss: PerExample, metric: PerExample) -> PerExample:
    """Makes a built-in metric ignore the targets that the loss ignores, and read the same dim."""
    if function_of(metric) not in METRICS.values():
        return metric
    shared = {"ignore_index": options_of(loss).get("ignore_index")}
    if function_of(metric) is accuracy:
        shared["dim"] = class_dim_of(loss)
        shared["soft"] = function_of(loss) is cross_entropy or None
    shared = {key: value for key, value in shared.items() if value is not None}
    return partial(metric, **{**shared, **options_of(metric)}) if shared else metric


def _column(metric: Any) -> str:
    """Names a metric's column: an entry's name, or the last name of a path to code."""
    if not isinstance(metric, str):
        return str(getattr(metric, "__name__", type(metric).__name__))
    target = Spec.parse(metric).target
    return target if target in METRICS else target.rpartition(":")[2].rpartition(".")[2]


def _per_example(
    found: SourcedSpec, registry: Mapping[str, PerExample], kind: str
) -> tuple[PerExample, str]:
    """Returns the function that a spec names, and its name for the summary."""
    where = f"{kind} {found.text!r}"
    if not isinstance(found.value, str):
        if is_of_torch(found.value):
            made, text = from_torch(found.value, {}, where)
            return _checked(made, where), text
        function: PerExample = found.value
        return function, found.text
    spec = Spec.parse(found.value)
    function, arguments = look_up(
        spec,
        registry,
        kind,
        trusted=found.trusted,
        source=found.source,
        folder=found.folder,
        cure=found.cure,
    )
    if arguments and not isinstance(function, type):
        raise SpecError(f"{where}: {kind} functions take no argument")
    if is_of_torch(function) and not arguments:
        function, _ = from_torch(function, spec.options, where)
    elif isinstance(function, type):
        try:
            function = call(function, arguments, spec.options, where)
        except LosscliError:
            raise
        except Exception as error:
            raise LossError(f"{where} cannot be built: {one_line(error)}") from error
    elif spec.options:
        function = partial(function, **spec.options)
    return _checked(function, where), found.text


def _checked(function: PerExample, where: str) -> PerExample:
    """Checks the options of a built-in function."""
    if not is_registered(function):
        return function
    parameters = inspect.signature(function_of(function)).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for key, value in options_of(function).items():
        if key not in known:
            raise SpecError(
                f"{where}: the key {key!r} is not known",
                f"It takes {', '.join(known) or 'no keys'}",
            )
        if key in {"weight", "pos_weight"} and not _are_weights(value):
            raise SpecError(
                f"{where}: {key} needs numbers from 0 up, not all of them 0",
                f"Write {key}=0.2-1-5 for three classes",
            )
        if key == "ignore_index" and type(value) is not int:
            raise SpecError(f"{where}: ignore_index needs a whole number", "Give one, such as 0")
        if key == "label_smoothing" and not (type(value) in {int, float} and 0 <= value <= 1):
            raise SpecError(f"{where}: label_smoothing needs a number from 0 to 1", "Give 0.1")
    return function


def _are_weights(value: Any) -> bool:
    if isinstance(value, bool | str):
        return False
    weights = torch.as_tensor(value, dtype=torch.float64)
    return bool(weights.isfinite().all() and (weights >= 0).all() and (weights > 0).any())
