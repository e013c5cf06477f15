"""Notes on a result: tensors that stay, BatchNorm's statistics, doubtful losses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from losscli.data import Split
from losscli.evaluation.hessian.directions import DerivativeDirections
from losscli.evaluation.losses.doubts import Doubt
from losscli.evaluation.losses.metrics import SEED_ERROR
from losscli.evaluation.objective import Objective
from losscli.evaluation.ranks import Arrays
from losscli.studies.base import Study
from losscli.table import Table
from losscli.weight_space.vectors import Weights, can_move
from losscli.wording import format_count, list_first

__all__ = [
    "batchnorm_notes",
    "derivative_notes",
    "general_notes",
    "integer_notes",
    "integer_notes_of_all",
    "sampling_notes",
    "seed_notes",
    "spectral_notes",
    "storage_notes",
    "variance_notes",
]

# BatchNorm's statistics matter where they change the loss by more than this share of it.
_MATTERS = 0.05

# Fewest and most examples of a batch for statistics, and the number of checkpoints compared.
_FEW, _MANY = 32, 256
_ENDS = 2

# Spectral norms matter where they change the loss by more than this share of it.
_SPECTRAL = 1e-4


def general_notes(study: Study) -> list[str]:
    """Notes on the order of the checkpoints, the loss, the data, and tensors that stay.

    Args:
        study: The study.

    Returns:
        The notes, with those of the objective.
    """
    problem, settings = study.problem, study.problem.settings
    notes = [*problem.notes, *_task_notes(study), *problem.objective.notes]
    notes += [*_recalibration_notes(study), *problem.objective.data.notes]
    for name, split in problem.objective.splits.items():
        notes += [f"{name}: {remark}" for remark in split.remarks]
    if problem.objective.constant:
        notes.append(
            "on a first batch different checkpoints have the same losses to the last bit: does "
            "the forward pass use the tensors that move?"
        )
    unused = [name for name in problem.objective.unused if name in study.moving]
    if unused:
        notes.append(
            f"no influence on the outputs of a first batch: {list_first(unused)}; does forward use "
            "a value that was computed from it earlier?"
        )
    if settings.stochastic is not None:
        notes.append(
            f"every loss is the mean over {format_count(settings.stochastic, 'seed')}; it was not "
            "checked that the loss of an example depends only on that example"
        )
    for name in sorted(problem.objective.unchecked):
        notes.append(
            f"{name}: the model accepts only the whole first batch, so it could not be checked "
            "that the loss of an example depends only on that example"
        )
    end = {"a": "first", "b": "last"}.get(settings.buffers)
    if end and problem.buffers and len(problem.names) > 1:
        whose, but = study.kept_values(end)
        notes.append(f"floating-point buffers stay at {whose}: {but}")
    if masks := _masks(study):
        whose, _ = study.kept_values("first")
        notes.append(
            f"buffers of 0 and 1 such as masks differ, and between the checkpoints they are "
            f"fractions: {list_first(masks)}; --buffers a keeps {whose}"
        )
    if _keeps_different_tensors(study):
        whose, but = study.kept_values("first")
        notes.append(f"some tensors stay at {whose}: {but}")
    return [*notes, *_frozen_notes(study)]


def derivative_notes(
    study: Study, directions: DerivativeDirections, derived: Iterable[Arrays]
) -> list[str]:
    """Notes on directions that are derivatives of the loss.

    Args:
        study: The study.
        directions: The directions.
        derived: Their record at each point.

    Returns:
        The notes: of which split the derivatives are, and what could not be verified.
    """
    notes = []
    if len(study.problem.objective.splits) > 1:
        used = (
            f"gradient of {directions.split} is the direction"
            if directions.along == "gradient"
            else f"eigenvectors of {directions.split} are the directions"
        )
        notes.append(f"the {used} for all splits")
    if study.problem.objective.recalibration is not None:
        notes.append(
            "derivatives take BatchNorm's statistics as constants; for the losses they are "
            "re-estimated at every point"
        )
    return [*notes, *dict.fromkeys(filter(None, map(directions.unverified, derived)))]


def sampling_notes(study: Study, examples: Mapping[str, int]) -> list[str]:
    """Notes on how many examples were evaluated.

    Args:
        study: The study.
        examples: Their number on each split.

    Returns:
        The notes, with ``--sampling-error``.
    """
    if study.problem.settings.sampling_error is None:
        return []
    whole = study.problem.objective.splits
    unit = "batches" if study.problem.settings.batch_loss else "examples"
    return [
        f"{name}: {number} of {len(whole[name])} {unit} were evaluated"
        for name, number in examples.items()
    ]


def seed_notes(study: Study, table: Table) -> list[str]:
    """Notes on the standard errors of losses over seeds.

    Args:
        study: The study.
        table: The losses and their standard errors over seeds, by split.

    Returns:
        The notes, with ``--stochastic``.
    """
    number = study.problem.settings.stochastic
    notes = []
    for split in study.problem.objective.splits if SEED_ERROR in table.columns else ():
        rows = zip(table["split"], table.floats(SEED_ERROR), strict=True)
        errors = [error for name, error in rows if name == split]
        largest = max(filter(math.isfinite, errors), default=math.nan)
        notes.append(f"{split}: standard errors over the {number} seeds are at most {largest:.2g}")
    return notes


def integer_notes(study: Study, end: Weights, last: Weights) -> list[str]:
    """Notes on integer tensors, which stay at the first checkpoint's.

    Args:
        study: The study.
        end: All tensors of the point that stands for the last checkpoint.
        last: The last checkpoint.

    Returns:
        The notes, where the last checkpoint's own would make a difference.
    """
    objective = study.problem.objective
    other = {
        name: last[name]
        for name, tensor in end.items()
        if not can_move(tensor) and not torch.equal(tensor, last[name])
    }
    if not other:
        return []
    batches = objective.first_batches()
    with objective.first_batch_only():
        kept, own = (objective.plain(w, batches) for w in (end, {**end, **other}))
    objective.load(study.problem.origin)
    if all(torch.equal(kept[n].losses, own[n].losses) for n in batches):
        return []
    whose, but = study.kept_values("first")
    return [f"integer tensors such as {next(iter(other))} stay at {whose} and matter: {but}"]


def integer_notes_of_all(study: Study) -> list[str]:
    """Returns the `integer_notes` of the first checkpoint that has any."""
    first = {
        name: x.clone()
        for name, x in study.weights(0).items()
        # A counter without an effect on the loss, which differs at each checkpoint.
        if not can_move(x) and not name.endswith("num_batches_tracked")
    }
    for t in range(1, len(study.problem.names)) if first else ():
        weights = study.weights(t)
        if not all(torch.equal(weights[name], x) for name, x in first.items()):
            notes = integer_notes(study, study.problem.place(weights), weights)
            if notes:
                return notes
        del weights
    return []


def spectral_notes(study: Study) -> list[str]:
    """Notes on spectral norms, which are computed from the weights at every point.

    Args:
        study: The study.

    Returns:
        The notes: with the largest difference that this makes to the loss of a checkpoint on
        a first batch, where there is one.
    """
    objective = study.problem.objective
    if not objective.spectral:
        return []
    batches = objective.first_batches()
    names = [name for layer in objective.spectral for name in layer.names]
    differences = []
    for t, checkpoint in enumerate(study.problem.names):
        weights = study.weights(t)
        point = {**study.problem.place(weights), **{name: weights[name] for name in names}}
        with objective.as_stored():
            own = objective.plain(point, batches)
        there = objective.plain(point, batches)
        for split in batches:
            one, other = (float(e[split].losses.double().mean()) for e in (own, there))
            differences.append((_gap(one, other), checkpoint, split, one, other))
        del weights, point  # before the next one is opened
    objective.load(study.problem.origin)
    whose = f"of {format_count(len(objective.spectral), 'spectral norm')} such as {names[0]}"
    note = f"the singular vectors {whose} are computed from the weights at every point"
    gap, checkpoint, split, one, other = max(differences, key=lambda found: found[0])
    if gap > _SPECTRAL * abs(other):
        note += (
            f": on a first batch of {split} {checkpoint} has the loss {one:.4g} with those of "
            f"its file, and {other:.4g} with these"
        )
    return [note]


def batchnorm_notes(
    study: Study, ends: Iterable[Weights], between: Callable[[], Weights], where: str
) -> list[str]:
    """Notes on BatchNorm's statistics that move along with the parameters.

    The loss of a first batch is compared with its loss under the statistics of this batch:
    between the checkpoints, and at trained checkpoints, where the difference is due to chance.

    Args:
        study: The study.
        ends: All tensors of checkpoints.
        between: Makes all tensors of a point between them.
        where: Where this point is, for example ``at α = 0.5``.

    Returns:
        The notes, where the statistics change the loss between the checkpoints, and less at
        the checkpoints.
    """
    objective = study.problem.objective
    layers = objective.batchnorm
    if study.problem.settings.buffers != "interpolate" or not any(
        name in study.moving for layer in layers for name in layer.names
    ):
        return []
    name, split = next(iter(objective.splits.items()))
    size = min(max(objective.batch_size, _FEW), _MANY, len(split))
    trained = (w for w in ends if not all(layer.is_fresh(w) for layer in layers))
    some = list(itertools.islice(trained, _ENDS))
    if size < 2 or not some:
        return []
    batch = split.first(size).to(objective.device)
    try:
        own = [_with_statistics(objective, weights, batch) for weights in some]
        moved, there = _with_statistics(objective, between(), batch)
    except (torch.OutOfMemoryError, MemoryError):
        return []
    finally:
        objective.load(study.problem.origin)
    chance = sum(_gap(*losses) for losses in own) / len(own)
    if math.isfinite(there) and _gap(moved, there) > max(2 * chance, _MATTERS * abs(there)):
        note = (
            "between the checkpoints BatchNorm's statistics are not those of the data: the "
            f"loss of a first batch of {name} {where} is {moved:.4g}, and {there:.4g} with the "
            "statistics of that batch; --buffers recalibrate re-estimates them"
        )
        return [note]
    return []


def variance_notes(study: Study, extremes: Iterable[Weights]) -> list[str]:
    """Notes on variances below 0 beyond the checkpoints, where losses are then not finite.

    Args:
        study: The study, some of whose losses are not finite.
        extremes: Buffers that move, and maybe other tensors, at the points farthest out. Values
            are linear in the point, so that they are lowest at one of these.

    Returns:
        The notes, where a buffer that is below 0 at no checkpoint is so at one of these points.
    """
    if study.problem.settings.buffers != "interpolate":
        return []
    names = [name for name in study.moving if name in study.problem.buffers]
    for t in range(len(study.problem.names) if names else 0):
        weights = study.weights(t)
        names = [name for name in names if not _is_below_0(weights[name])]
        del weights  # before the next one is opened
    for point in extremes if names else ():
        if below := next((name for name in names if _is_below_0(point[name])), None):
            whose, _ = study.kept_values("last")
            batchnorm = study.problem.objective.batchnorm
            cure = ", and --buffers recalibrate re-estimates BatchNorm's" if batchnorm else ""
            note = (
                f"beyond the checkpoints {below} becomes negative, impossible for a variance: "
                f"--buffers b keeps {whose} statistics at every point{cure}"
            )
            return [note]
    return []


def storage_notes(study: Study) -> list[str]:
    """Notes on the types that tensors are stored in."""
    stored = set[str]()
    for t, _ in enumerate(study.problem.names):
        weights = study.weights(t)
        stored |= {str(weights[n].dtype) for n in study.moving}
        del weights  # before the next one is opened
    half = sorted(d.removeprefix("torch.") for d in stored & {"torch.bfloat16", "torch.float16"})
    return [f"tensors stored in {' and '.join(half)} move in float32"] if half else []


def _masks(study: Study) -> list[str]:
    """Lists the buffers that move and have only values 0 and 1 in all checkpoints."""
    counted = set(study.counted)
    names = [name for name in study.moving if name not in counted]
    for t in range(len(study.problem.names) if names else 0):
        weights = study.weights(t)
        names = [name for name in names if bool(((x := weights[name]) == x.bool()).all())]
        del weights  # before the next one is opened
        if not names:
            break
    return names


def _is_below_0(buffer: Tensor) -> bool:
    """Returns whether a value is below 0; complex values are not."""
    return not buffer.is_complex() and bool((buffer < 0).any())


def _task_notes(study: Study) -> list[str]:
    """Notes on a loss that may be the wrong one for the data or the model."""
    default = study.problem.provenance["sources"]["loss"].startswith("default")
    found = study.problem.objective.doubts
    return [
        d.value for d in Doubt if d in found and (default or d not in {Doubt.LABELS, Doubt.COPY})
    ]


def _keeps_different_tensors(study: Study) -> bool:
    """Returns whether a tensor that stays by choice differs between checkpoints."""
    if study.problem.independent:
        return False
    kept, first = study.problem.kept, study.problem.first.weights
    for t in range(1, len(study.problem.names) if kept else 0):
        weights = study.problem.open(t).weights
        if not all(torch.equal(first[name], weights[name]) for name in kept):
            return True
        del weights  # before the next one is opened
    return False


def _frozen_notes(study: Study) -> list[str]:
    """A note on frozen parameters where directions are not differences of checkpoints."""
    problem = study.problem
    if not problem.independent and len(problem.names) > 1 and study.command != "connect":
        return []
    parameters = dict(problem.objective.model.named_parameters())
    frozen = [name for name in study.counted if name in parameters]
    frozen = [name for name in frozen if not parameters[name].requires_grad]
    # All are frozen in a model that is only evaluated.
    if not frozen or len(frozen) == len(study.counted):
        return []
    what = f"frozen parameters (requires_grad=False) count as all others: {list_first(frozen)}"
    return [f"{what}; leave them out with --except"]


def _recalibration_notes(study: Study) -> list[str]:
    """Notes on statistics that are re-estimated."""
    objective = study.problem.objective
    training = objective.recalibration
    if training is None:
        return []
    source = f"from {training.examples:,} examples of {training.name}"
    but = "the checkpoints' losses are not those of their files"
    notes = [f"BatchNorm's statistics are re-estimated at every point, {source}: {but}"]
    if objective.idle:
        names = [layer.mean.rpartition(".")[0] for layer in objective.idle]
        whose, _ = study.kept_values("first")
        notes.append(
            f"{format_count(len(names), 'BatchNorm layer')} such as {names[0]} did not run: their "
            f"statistics stay at {whose}"
        )
    return notes


def _with_statistics(objective: Objective, weights: Weights, batch: Split) -> tuple[float, float]:
    """Returns the mean loss of a batch, with the statistics of the point and of the batch."""
    batches = {"": batch}
    moved = objective.plain(weights, batches)[""].losses
    with objective.estimating_on(batch):
        own = objective.plain(weights, batches)[""].losses
    return float(moved.double().mean()), float(own.double().mean())


def _gap(one: float, other: float) -> float:
    """Returns the distance of two losses; infinite if one is not finite."""
    return abs(one - other) if math.isfinite(one - other) else math.inf
