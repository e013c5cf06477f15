"""From names to numbers: checkpoints, model, data and device brought together and checked."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from typing import get_args

import torch
from torch import nn

from losscli._version import __version__
from losscli.checkpoint import InMemoryCheckpoint, find_base, read
from losscli.errors import MismatchError, UsageError
from losscli.evaluation.device import choose_device, describe_device
from losscli.evaluation.objective import Objective
from losscli.evaluation.ranks import Ranks
from losscli.evaluation.task_checks import check_task
from losscli.settings import Buffers, DType, Settings
from losscli.studies.problem.checkpoints import Checkpoints, is_same
from losscli.studies.problem.model import build, check_copy
from losscli.studies.problem.problem import Problem, counted, floating_buffers, moving_names
from losscli.studies.problem.source import find_specs
from losscli.studies.problem.task import data_of, loss_of, metrics_of, recalibration_of
from losscli.summaries import CheckpointEntry, Provenance

__all__ = ["prepare"]


def prepare(
    names: Sequence[str],
    settings: Settings,
    notes: Sequence[str] = (),
    ranks: Ranks | None = None,
) -> Problem:
    """Reads the checkpoints, builds the model, loads the data and makes sure that all fit.

    Args:
        names: The checkpoints: files, ``init:SEED``, or objects.
        settings: The settings.
        notes: How the checkpoints were put in order, where they were.
        ranks: The processes that share the run, if there are several.

    Returns:
        The problem, ready to be evaluated.

    Raises:
        LosscliError: Something is missing, broken or does not fit; the text says what and where.
    """
    _check(settings)
    local = None if ranks is None else ranks.local
    device = choose_device(settings.device, settings.dtype, local)
    base = find_base(names)
    file = read(base) if base else None
    with torch.random.fork_rng(devices=[]):
        given = settings.model
        if given is None and isinstance(base, InMemoryCheckpoint):
            given = base.module
        specs = find_specs(settings, given, file)
        found = specs.model
        if found is None:
            raise UsageError(
                "no model is named, neither by --model nor by the checkpoint's metadata nor by a "
                "losscli.toml beside it",
                "Give --model, for example --model mlp:784-512-10 (losscli list models)",
            )
        torch.manual_seed(settings.seed)
        model = build(found, file)
        _require_precision(model, settings.dtype)
        checkpoints = Checkpoints(model, found, base, names)
        # Plain names, so that checkpoints given as objects are not kept in memory.
        names = [str(name) for name in names]
        entries, first = checkpoints.survey(names)
        whole, data_name = data_of(settings, specs.data)
        data = whole.select(settings.split, None, settings.seed)
        loss, loss_name, loss_source = loss_of(specs.loss, data, model)
        metrics, metric_names, metric_source = metrics_of(settings, data, loss, model)
        recalibration = recalibration_of(model, whole, data, settings)
    objective = Objective(
        model,
        loss,
        metrics,
        data,
        device=device,
        dtype=getattr(torch, settings.dtype),
        batch_size=settings.batch_size,
        recalibration=recalibration,
        batch_loss=settings.batch_loss,
        # Default metrics may be left out if they fail.
        optional=() if settings.metric else metrics,
    )
    objective.extra = first.extra
    notes = [*notes, *_compare_extra_states(objective, checkpoints, names)]
    if isinstance(found.value, nn.Module):
        check_copy(found.value, objective)
    buffers = floating_buffers(objective)
    named: Provenance = {
        "model": found.text,
        "data": data_name,
        "loss": loss_name,
        "metrics": metric_names,
        "sources": {"loss": loss_source, "metrics": metric_source},
    }
    return Problem(
        objective,
        tuple(names),
        first,
        moving_names(objective, buffers, settings),
        lambda: build(found, file),
        buffers,
        _provenance(settings, objective, named, entries, 1 if ranks is None else ranks.size),
        settings,
        checkpoints.open,
        checkpoints.unchanged,
        tuple(notes),
    )


def _compare_extra_states(
    objective: Objective, checkpoints: Checkpoints, names: Sequence[str]
) -> list[str]:
    """Compares the extra state of checkpoints, between which no point lies: the first one's stays.

    Args:
        objective: What is evaluated, with the extra state of the first checkpoint.
        checkpoints: Opens them.
        names: The checkpoints.

    Returns:
        A note where another has other extra state, and the same losses with either.

    Raises:
        MismatchError: It has other losses.
    """
    kept, notes = objective.extra, list[str]()
    for name in dict.fromkeys(names) if kept else ():
        checkpoint = checkpoints.open(name)
        keys = [key for key, state in kept.items() if not is_same(state, checkpoint.extra.get(key))]
        if not keys:
            continue
        check_task(objective, checkpoint.weights)
        batches, losses = objective.first_batches(), []
        for objective.extra in (checkpoint.extra, kept):
            evaluations = objective.plain(checkpoint.weights, batches)
            losses.append([evaluations[split].losses for split in batches])
        if not all(map(torch.equal, *losses)):
            raise MismatchError(
                f"{keys[0]} of {name} is not that of {names[0]}, and no point lies between two "
                "extra states",
                "Give checkpoints with the same extra state",
            )
        notes.append(
            f"{keys[0]} of {name} is not that of {names[0]}, which stays; on first batches the "
            "losses are the same with either"
        )
    return notes[:1]


def _provenance(
    settings: Settings,
    objective: Objective,
    specs: Provenance,
    entries: list[CheckpointEntry],
    processes: int,
) -> Provenance:
    """Collects the origin of a problem."""
    recalibration = objective.recalibration
    return {
        "version": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(objective.device),
        "device_name": describe_device(objective.device),
        "processes": processes,
        "dtype": settings.dtype,
        "tf32": settings.tf32,
        **specs,
        "seed": settings.seed,
        "limit": settings.limit,
        "batch_loss": settings.batch_loss,
        "sampling_error": settings.sampling_error,
        "buffers": settings.buffers,
        "recalibration": None
        if recalibration is None
        else {
            "split": recalibration.name,
            "examples": len(recalibration),
            "batch_size": recalibration.size,
            "layers": len(objective.batchnorm),
        },
        "only": list(settings.only),
        "except": list(settings.except_),
        "checkpoints": entries,
        **counted(objective, {name: len(s) for name, s in objective.data.splits.items()}),
    }


def _require_precision(model: nn.Module, dtype: str) -> None:
    """Refuses half precision where there are complex numbers: torch has few operators for it."""
    named = [*model.named_parameters(), *model.named_buffers()]
    names = [name for name, tensor in named if tensor.is_complex()]
    if names and dtype in {"bfloat16", "float16"}:
        raise UsageError(
            f"--dtype {dtype} has no complex numbers, and {names[0]} is complex",
            "Give --dtype float32 or float64",
        )


def _check(settings: Settings) -> None:
    if settings.batch_loss:
        for option, given in (
            ("--sampling-error", settings.sampling_error is not None),
            ("--buffers recalibrate", settings.buffers == "recalibrate"),
        ):
            if given:
                raise UsageError(
                    f"{option} is not available with --batch-loss", "Give one without the other"
                )
    for option, value, known in (
        ("--dtype", settings.dtype, get_args(DType)),
        ("--buffers", settings.buffers, get_args(Buffers)),
    ):
        if value not in known:
            raise UsageError(f"{option} {value} is not known", f"Choose one of {', '.join(known)}")
    if not 0 <= settings.seed < 1 << 63:
        raise UsageError(f"--seed {settings.seed} is no seed", "Give a number from 0 to 2^63 − 1")
    if settings.batch_size is not None and not 1 <= settings.batch_size < 1 << 31:
        raise UsageError(
            f"--batch-size {settings.batch_size} is no number of examples for a forward pass",
            "Give a number from 1 to 2^31 − 1",
        )
    if settings.sampling_error is not None and not 0 < settings.sampling_error < math.inf:
        raise UsageError(
            f"--sampling-error {settings.sampling_error} is no share of a height", "Give 0.01"
        )
    if settings.limit is not None and settings.limit < 1:
        raise UsageError(f"--limit {settings.limit} leaves no examples", "Give 1 or more")
    if settings.limit is not None and settings.limit >= 1 << 63:
        raise UsageError(
            f"--limit {settings.limit} is more than any data set has",
            "Give a number from 1 to 2^63 − 1",
        )
