"""What is asked of the model: the data, the loss and the metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from losscli.checkpoint import CheckpointFile
from losscli.datasets import Batching, DataSet, from_object, load
from losscli.errors import LossError, SpecError, UsageError
from losscli.losses import LOSSES, METRICS, PerExample, causal_lm, token_cross_entropy
from losscli.models import (
    HEADLESS,
    NEEDS_DECODER,
    is_headless,
    needs_decoder_inputs,
    scores_of,
)
from losscli.points import tensors_of
from losscli.problem.source import Found, find
from losscli.recalibration import Recalibration, layers_of
from losscli.settings import Settings
from losscli.spec import Spec, call, look_up

__all__ = ["data_of", "loss_of", "metrics_of", "recalibration_of"]

_METRIC_OF_TASK = {"classification": "accuracy", "regression": "none", "language": "perplexity"}
# Columns of some study's own.
_COLUMNS = frozenset({
    "alpha", "block", "split", "loss", "loss_stderr", "slope", "curvature", "examples", "step",
    "checkpoint", "projection", "residual", "distance", "turn_degrees", "x", "y", "off_plane",
    "a", "b",
})  # fmt: skip

_LOSS_OF_TASK = {
    "classification": "cross_entropy",
    "regression": "mse",
    "language": "causal_lm",
}


def data_of(settings: Settings, first: CheckpointFile | None) -> tuple[DataSet, str]:
    """Reads the data.

    Args:
        settings: The settings.
        first: The checkpoint that may name it, if any.

    Returns:
        The data set and what it is called. All its splits, where BatchNorm's statistics are
        estimated on one that no loss may be evaluated on.

    Raises:
        UsageError: Nobody names any.
    """
    found = find("data", settings.data, first)
    if found is None:
        raise UsageError(
            "no data set is named, neither by --data nor by the checkpoint's metadata nor by a "
            "losscli.toml beside it",
            "Give --data, for example --data mnist:FOLDER (losscli list data)",
        )
    chosen: dict[str, Any] = {
        # Training examples may be needed that no loss is evaluated on.
        "splits": () if settings.buffers == "recalibrate" else settings.split,
        "limit": settings.limit,
        "seed": settings.seed,
        "batching": Batching(settings.batch_size) if settings.batch_loss else None,
    }
    if isinstance(found.value, str):
        data = load(found.value, trusted=found.trusted, folder=found.folder, **chosen)
    else:
        data = from_object(found.value, "data", **chosen)
    return data, found.text


def recalibration_of(
    model: nn.Module, whole: DataSet, data: DataSet, settings: Settings
) -> Recalibration | None:
    """Plans how BatchNorm's statistics are estimated anew, if they are.

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
    if not layers_of(model, tensors_of(model)):
        raise UsageError(
            "--buffers recalibrate has nothing to re-estimate: the model has no BatchNorm layer "
            "that tracks statistics",
            "Leave it out",
        )
    name = "train" if "train" in whole.splits else next(iter(whole.splits))
    if name != "train" and len(whole.splits) > 1:
        raise UsageError(
            "--buffers recalibrate takes the split train, and the data's splits are "
            f"{', '.join(whole.splits)}",
            "Give data with a split train, or with no other split than that to take",
        )
    split = data.splits.get(name)
    if split is None:
        split = whole.select((name,), None, settings.seed).splits[name]
    if len(split) < 2:
        raise UsageError(
            f"--buffers recalibrate has no more than one example of {name}, which has no variance",
            "Give more" if settings.limit is None else "Give more with --limit",
        )
    return Recalibration.plan(name, split, settings.seed)


def loss_of(
    settings: Settings, first: CheckpointFile | None, data: DataSet, model: nn.Module
) -> tuple[PerExample, str]:
    """Finds the loss: the one that is named, or the one of the data's task.

    Args:
        settings: The settings.
        first: The checkpoint that may name it, if any.
        data: What it is evaluated on.
        model: The model, whose scores decide where the data are sequences of tokens.

    Returns:
        The per-example loss and what it is called.
    """
    found = find("loss", settings.loss, first)
    if found is None:
        name = _language_loss(data, model) if data.language else _LOSS_OF_TASK[data.task]
        found = Found(name, trusted=True)
    return _per_example(found, LOSSES, "loss"), found.text


def _language_loss(data: DataSet, model: nn.Module) -> str:
    """Chooses the loss of a label for each token, by what the model's scores are those of."""
    scores = scores_of(model)
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
        f"the data have a label for each token, and what {kind} scores is not known",
        "Give --loss: causal_lm, token_cross_entropy, or path/to/file.py:callable",
    )


def metrics_of(
    settings: Settings, data: DataSet, loss: PerExample, model: nn.Module
) -> tuple[dict[str, PerExample], list[str]]:
    """Finds the metrics: those that are named, or that of the data's task.

    Args:
        settings: The settings.
        data: What they are evaluated on.
        loss: The loss.
        model: The model.

    Returns:
        The per-example metrics by the names of their columns, and what they are called.

    Raises:
        UsageError: Two columns would have one name.
    """
    # Whoever asks for causal_lm means tokens, whatever the data's form.
    default = _METRIC_OF_TASK["language" if loss is causal_lm else data.task]
    next_tokens = loss is causal_lm or scores_of(model) == "next"
    if loss is token_cross_entropy or (data.language and not next_tokens):
        default = "none"
    metrics: dict[str, PerExample] = {}
    texts = []
    for value in settings.metric or (default,):
        if value == "none":
            continue
        found = Found.named(value, trusted=True)
        name = _column(found.value)
        if name in metrics or name in _COLUMNS:
            raise UsageError(f"the name {name!r} would head two columns", "Rename the metric")
        metrics[name] = _per_example(found, METRICS, "metric")
        texts.append(found.text)
    return metrics, texts


def _column(metric: Any) -> str:
    """Names a metric's column: an entry's name, or the last name of a path to code."""
    if not isinstance(metric, str):
        return str(getattr(metric, "__name__", type(metric).__name__))
    target = Spec.parse(metric).target
    return target if target in METRICS else target.rpartition(":")[2].rpartition(".")[2]


def _per_example(found: Found, registry: Mapping[str, PerExample], kind: str) -> PerExample:
    if not isinstance(found.value, str):
        function: PerExample = found.value
        return function
    spec = Spec.parse(found.value)
    function, arguments = look_up(spec, registry, kind, trusted=found.trusted)
    if isinstance(function, type):
        made: PerExample = call(function, arguments, spec.options, f"{kind} {found.value!r}")
        return made
    if arguments:
        raise SpecError(f"{kind} {found.value!r}: {kind} functions take no argument")
    if not spec.options:
        return function
    options = dict(spec.options)
    return lambda outputs, targets: function(outputs, targets, **options)
