"""A problem: a model, its loss on data, and checkpoints, made from names and checked."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, get_args, overload

import torch
from torch import nn

from losscli import __version__
from losscli.checkpoint import Checkpoint, InMemoryCheckpoint, find_base, read
from losscli.data import Examples
from losscli.errors import CheckpointError, MismatchError, ModelError, UsageError
from losscli.evaluation.device import choose_device, describe_device
from losscli.evaluation.loading import named_tensors
from losscli.evaluation.objective import Objective
from losscli.evaluation.objective_functions import returned_losses
from losscli.evaluation.ranks import Ranks
from losscli.evaluation.recalibration import batchnorm_layers
from losscli.evaluation.sampling import sample_order
from losscli.evaluation.task_checks import check_task
from losscli.results.summaries import CheckpointEntry, Counts, Provenance
from losscli.settings import Buffers, DType, Settings
from losscli.studies.checkpoints import Checkpoints, is_same
from losscli.studies.config import NO_CONFIG, Config
from losscli.studies.model import build, check_copy
from losscli.studies.specs import find_specs
from losscli.studies.task import (
    data_of,
    loss_of,
    metrics_of,
    objective_of,
    recalibration_of,
    training_split,
)
from losscli.weight_space.vectors import Weights, can_move, select_names

__all__ = [
    "Points",
    "Problem",
    "TrainingExamples",
    "counted",
    "differing_tensors",
    "prepare",
    "require_finite",
    "unequal_names",
]


_MAX_SEEDS = 10_000


class TrainingExamples(NamedTuple):
    """The training examples.

    Attributes:
        name: The name of their split.
        examples: The examples; on the device if losses are evaluated on them too.
    """

    name: str
    examples: Examples

    @property
    def notes(self) -> list[str]:
        """A note if the split has another name."""
        if self.name == "train":
            return []
        return [f"the data have no split train: statistics are those of {self.name}, the only one"]


@dataclass(frozen=True)
class Problem:
    """A model, its loss on a data set, and checkpoints.

    Attributes:
        objective: What is evaluated.
        names: The checkpoints in their order, as named by the user.
        first: The first of them, its names those of the model.
        moving: The tensors that may move, each tied tensor under one name.
        fresh: Builds the model again, or copies the module that was given.
        buffers: The floating-point buffers of the model that can move.
        provenance: The origin of all of it, for the summary.
        settings: The settings.
        read: Reads a checkpoint by its name.
        optimizers: Reads the state dicts of optimisers in a checkpoint by its name.
        unchanged: Checks that the files of the checkpoints have not changed since they were read.
        notes: Notes on the order of the checkpoints.
        projected: The number of names at the end that are only projected onto what the others
            span; none of them is the ``last``.
        independent: Whether each checkpoint is evaluated on its own, with its own values of the
            tensors that do not move.
        training: The training examples, if an option of the command needs them.
    """

    objective: Objective
    names: tuple[str, ...]
    first: Checkpoint
    moving: tuple[str, ...]
    fresh: Callable[[], nn.Module]
    buffers: tuple[str, ...]
    provenance: Provenance
    settings: Settings
    read: Callable[[str], Checkpoint]
    optimizers: Callable[[str], Mapping[str, Any]]
    unchanged: Callable[[], None]
    notes: tuple[str, ...] = ()
    projected: int = 0
    independent: bool = False
    training: TrainingExamples | None = None

    @property
    def spanning(self) -> tuple[str, ...]:
        """The checkpoints that span what is evaluated, without those that are only projected."""
        return self.names[: len(self.names) - self.projected]

    def open(self, t: int) -> Checkpoint:
        """Opens a checkpoint; of large ones, only the first is kept in memory.

        Args:
            t: Its place among the names.

        Returns:
            The checkpoint.

        Raises:
            CheckpointError: It can no longer be read.
            MismatchError: It is no longer what it was.
        """
        if t == 0:
            return self.first
        return self.read(self.names[t])

    @property
    def kept(self) -> tuple[str, ...]:
        """The tensors that stay only because of ``--only`` or ``--except``."""
        free = replace(self.settings, only=(), except_=())
        moving = set(self.moving)
        return tuple(
            n for n in _moving_names(self.objective, self.buffers, free) if n not in moving
        )

    @property
    def chosen(self) -> bool:
        """Whether the user chose which tensors move."""
        return bool(self.settings.only or self.settings.except_)

    def parameters(self, names: Iterable[str]) -> tuple[str, ...]:
        """Selects the parameters among tensors that move.

        Norms, distances, projections and angles are over these; buffers move along.

        Args:
            names: The tensors.

        Returns:
            Those that are no buffers, in their order.
        """
        buffers = set(self.buffers)
        return tuple(name for name in names if name not in buffers)

    @property
    def last(self) -> Checkpoint:
        """The last checkpoint of `spanning`, opened."""
        return self.open(len(self.spanning) - 1)

    @cached_property
    def origin(self) -> Weights:
        """All tensors of the first checkpoint, but the buffers that stay at the last one's."""
        # Cached, since every point that is placed needs it.
        if self.settings.buffers != "b" or not self.buffers:
            return self.first.weights
        last = self.last.weights
        return {**self.first.weights, **{name: last[name] for name in self.buffers}}

    @property
    def working_type(self) -> torch.dtype:
        """The type that points are computed in, unless tensors are stored in a wider one."""
        return torch.float64 if self.settings.dtype == "float64" else torch.float32

    def model_to_trace(self) -> nn.Module:
        """Builds a model in float32 on the CPU, in eval mode, which tracing may modify."""
        with torch.random.fork_rng(devices=[]):
            return self.fresh().cpu().float().eval()

    def place(self, weights: Weights) -> Weights:
        """Places a checkpoint: what may not move is the origin's, unless it is independent.

        Args:
            weights: All tensors of a checkpoint.

        Returns:
            All tensors of its point.
        """
        if self.independent:
            shared = self.buffers if self.settings.buffers in {"a", "b"} else ()
            return {**weights, **{name: self.origin[name] for name in shared}}
        return {**self.origin, **{name: weights[name] for name in self.moving}}

    def placed(self, t: int) -> Weights:
        """Reads and places the checkpoint with the number ``t`` in the order of the names."""
        return self.place(self.open(t).weights)

    def places(self, steps: Sequence[int]) -> Sequence[Weights]:
        """Places checkpoints lazily; none is kept in memory.

        Args:
            steps: Their places among the names.

        Returns:
            All tensors of the points that stand for them.
        """
        return Points(self.placed, steps)


class Points(Sequence[Weights]):
    """Points that are made on access; none is kept in memory.

    Args:
        make: Makes all tensors of a point from its key.
        keys: The keys of the points, such as the numbers of checkpoints.
    """

    def __init__(self, make: Callable[[Any], Weights], keys: Sequence[Any]) -> None:
        self._make = make
        self._keys = keys

    def __len__(self) -> int:
        return len(self._keys)

    @overload
    def __getitem__(self, at: int) -> Weights: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Weights]: ...
    def __getitem__(self, at: int | slice) -> Weights | Sequence[Weights]:
        if isinstance(at, slice):
            return Points(self._make, self._keys[at])
        return self._make(self._keys[at])


def prepare(
    names: Sequence[str],
    settings: Settings,
    notes: Sequence[str] = (),
    ranks: Ranks | None = None,
    *,
    projected: Sequence[str] = (),
    planned: Config = NO_CONFIG,
    independent: bool = False,
    training: str = "",
    recalibrates: bool = False,
) -> Problem:
    """Reads the checkpoints, builds the model, loads the data and checks that all fit.

    Args:
        names: The checkpoints: files, ``init:SEED``, or objects.
        settings: The settings.
        notes: Notes on the order of the checkpoints.
        ranks: The processes that share the run, if there are several.
        projected: Further checkpoints, which are only projected onto what the others span.
        planned: A losscli.toml that is taken to exist.
        independent: Whether each checkpoint is evaluated on its own, see `Problem`.
        training: The option of the command that needs training examples; empty if none does.
        recalibrates: Whether BatchNorm's statistics are re-estimated where the model has some.

    Returns:
        The problem, ready to be evaluated.

    Raises:
        LosscliError: Something is missing, broken or does not fit; the text says what and where.
    """
    _check(settings)
    names = [*names, *projected]
    local = None if ranks is None else ranks.local
    device = choose_device(settings.device, settings.dtype, local)
    base = find_base(names)
    file = read(base) if base else None
    with torch.random.fork_rng(devices=[]):
        given = settings.model
        if given is None and isinstance(base, InMemoryCheckpoint):
            given = base.module
        specs = find_specs(settings, given, file, planned)
        found = specs.model
        if found is None:
            raise UsageError(
                "no model given, by --model, by the checkpoint's metadata or by a "
                "losscli.toml next to it or here",
                "Give --model, for example --model mlp:784-512-10 (losscli list models)",
            )
        if found.source == str(planned.file):  # which is not written yet
            found = replace(found, source="--model")
        if specs.objective is not None:
            # It may imply --batch-loss.
            settings = replace(settings, objective=specs.objective.value)
            _check(settings)
        torch.manual_seed(settings.seed)
        model = build(found, file)
        if recalibrates and batchnorm_layers(model, named_tensors(model)):
            if settings.buffers in {"a", "b"}:
                raise UsageError(
                    f"--buffers {settings.buffers} keeps BatchNorm's statistics, which do not fit "
                    "the path",
                    "Leave it out: they are re-estimated at every point",
                )
            settings = replace(settings, buffers="recalibrate")
        _require_precision(model, settings.dtype)
        checkpoints = Checkpoints(model, found, base, settings, names)
        # Plain names, so that checkpoints given as objects are not kept in memory.
        names = [str(name) for name in names]
        entries, first, found_notes = checkpoints.survey(names)
        needs_training = bool(training) or settings.buffers == "recalibrate"
        whole, data_name = data_of(settings, specs.data, training=needs_training)
        data = whole.select(settings.split, None, settings.seed)
        function = None
        if specs.objective is None:
            loss, loss_name, loss_source = loss_of(specs.loss, data, model)
        else:
            loss = returned_losses
            function, loss_name, loss_source = objective_of(specs.objective)
        metrics, metric_names, metric_source = metrics_of(specs, data, loss, model)
        recalibration = recalibration_of(model, whole, data, settings)
        train = training_split(whole, data, settings, training) if training else None
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
        function=function,
        seeds=[(settings.seed + k) % (1 << 63) for k in range(settings.stochastic or 0)],
        # Default metrics may be left out if they fail.
        optional=() if specs.metrics else metrics,
        tf32=settings.tf32,
    )
    objective.extra = first.extra
    notes = [*notes, *found_notes, *_compare_extra_states(objective, checkpoints, names)]
    if isinstance(found.value, nn.Module):
        check_copy(found.value, objective)
    buffers = _floating_buffers(objective)
    named: Provenance = {
        "model": found.text,
        "data": data_name,
        "loss": loss_name,
        "objective": None if function is None else loss_name,
        "metrics": metric_names,
        "sources": {"loss": loss_source, "metrics": metric_source},
    }
    return Problem(
        objective,
        tuple(names),
        first,
        _moving_names(objective, buffers, settings),
        lambda: build(found, file),
        buffers,
        _provenance(settings, objective, named, entries, 1 if ranks is None else ranks.size),
        settings,
        checkpoints.open,
        checkpoints.optimizers,
        checkpoints.unchanged,
        tuple(notes),
        len(projected),
        independent,
        train and TrainingExamples(train[0], objective.splits.get(*train)),
    )


def _compare_extra_states(
    objective: Objective, checkpoints: Checkpoints, names: Sequence[str]
) -> list[str]:
    """Refuses extra states between which losses differ; notes that only the first one's is used."""
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
        "stochastic": settings.stochastic,
        "sampling_error": settings.sampling_error,
        "buffers": settings.buffers,
        "recalibration": None
        if recalibration is None
        else {
            "split": recalibration.name,
            "examples": recalibration.examples,
            "batch_size": recalibration.size,
            "layers": len(objective.batchnorm),
        },
        "only": list(settings.only),
        "except": list(settings.except_),
        "ignore_unexpected": settings.ignore_unexpected,
        "allow_missing": list(settings.allow_missing),
        "rename": list(settings.rename),
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
    if settings.objective is not None and settings.loss is not None:
        raise UsageError(
            "--objective computes the loss itself, and --loss has no effect", "Give one of them"
        )
    if settings.stochastic is not None:
        if not 1 <= settings.stochastic <= _MAX_SEEDS:
            raise UsageError(
                f"--stochastic must be between 1 and {_MAX_SEEDS:,}, not {settings.stochastic}",
                "Give 8",
            )
        if settings.sampling_error is not None:
            raise UsageError(
                "--sampling-error is not available with --stochastic", "Give one without the other"
            )
    for option, value, known in (
        ("--dtype", settings.dtype, get_args(DType)),
        ("--buffers", settings.buffers, get_args(Buffers)),
    ):
        if value not in known:
            raise UsageError(f"{option} {value} is not known", f"Choose one of {', '.join(known)}")
    if not 0 <= settings.seed < 1 << 63:
        raise UsageError(
            f"--seed {settings.seed} is not a seed", "Give a number from 0 to 2^63 − 1"
        )
    if settings.batch_size is not None and not 1 <= settings.batch_size < 1 << 31:
        raise UsageError(
            f"--batch-size {settings.batch_size} is not a number of examples for a forward pass",
            "Give a number from 1 to 2^31 − 1",
        )
    if settings.sampling_error is not None and not 0 < settings.sampling_error < math.inf:
        raise UsageError(
            f"--sampling-error must be above 0, not {settings.sampling_error}", "Give 0.01"
        )
    if settings.limit is not None and settings.limit < 1:
        raise UsageError(f"--limit {settings.limit} leaves no examples", "Give 1 or more")
    if settings.limit is not None and settings.limit >= 1 << 63:
        raise UsageError(
            f"--limit {settings.limit} is more than any data set has",
            "Give a number from 1 to 2^63 − 1",
        )


def counted(objective: Objective, numbers: Mapping[str, int], seed: int = 0) -> Counts:
    """Counts the examples, and the batches, that a loss is the mean over.

    Args:
        objective: What is evaluated.
        numbers: The number of terms of the mean of each split.
        seed: The seed of the order in which they were drawn, if not all are used.

    Returns:
        The ``examples`` of each split; and the ``batches``, where the loss is one number per batch.
    """
    if not objective.batch_loss:
        return {"examples": dict(numbers)}
    rows = {name: objective.splits[name].rows for name in numbers}
    if any(number < len(objective.splits[name]) for name, number in numbers.items()):
        order = sample_order(objective.splits, seed)
        rows = {
            n: objective.splits[n].take(order[n][:number]).rows for n, number in numbers.items()
        }
    return {"examples": rows, "batches": dict(numbers)}


def _floating_buffers(objective: Objective) -> tuple[str, ...]:
    """Lists the floating-point buffers, without singular vectors, which depend on parameters."""
    computed = {id(objective.tensors[n]) for layer in objective.spectral for n in layer.names}
    return tuple(
        name
        for name, tensor in objective.tensors.items()
        if not isinstance(tensor, nn.Parameter) and can_move(tensor) and id(tensor) not in computed
    )


def _moving_names(
    objective: Objective, buffers: Sequence[str], settings: Settings
) -> tuple[str, ...]:
    """Lists the tensors that may move, a tied tensor under its last name."""
    names = [
        name
        for name, tensor in objective.tensors.items()
        if isinstance(tensor, nn.Parameter) and can_move(tensor)
    ]
    if settings.buffers in {"interpolate", "recalibrate"}:
        estimated = {id(objective.tensors[n]) for x in objective.statistics for n in x.names}
        names += [name for name in buffers if id(objective.tensors[name]) not in estimated]
    # load_state_dict uses the last name of a tied tensor.
    last = {id(objective.tensors[name]): name for name in names}
    if not names:
        raise ModelError("the model has no parameters to move")
    # A pattern of --only may match any of its names; --except of one name keeps the tensor.
    chosen = select_names(names, settings.only, settings.except_)
    stays = set(names) - set(select_names(names, (), settings.except_))
    chosen_ids, kept_ids = (
        {id(objective.tensors[name]) for name in some} for some in (chosen, stays)
    )
    ids = {name: id(objective.tensors[name]) for name in names}
    moving = tuple(n for n, i in ids.items() if last[i] == n and i in chosen_ids - kept_ids)
    if not moving:
        raise UsageError("--only and --except leave no tensor to move", "Widen the patterns")
    return moving


def unequal_names(names: Iterable[str], points: Iterable[Weights]) -> tuple[str, ...]:
    """Selects the names of tensors that differ between points.

    Args:
        names: The tensors.
        points: All tensors of each point.

    Returns:
        The names, in their order.
    """
    first, *others = points
    return tuple(n for n in names if not all(torch.equal(first[n], other[n]) for other in others))


def differing_tensors(problem: Problem) -> tuple[str, ...]:
    """Finds the tensors that differ between the spanning checkpoints, opening one at a time.

    Args:
        problem: The checkpoints.

    Returns:
        Their names.

    Raises:
        CheckpointError: One of them is not finite in some checkpoint.
    """
    # Tensors that never move may hold infinities, such as attention masks.
    first = problem.first.weights
    still = set(problem.moving)
    for t in range(1, len(problem.spanning)):
        weights = problem.open(t).weights
        still = {name for name in still if torch.equal(first[name], weights[name])}
        require_finite(problem.names[t], weights, set(problem.moving) - still)
        del weights  # before the next one is opened
    moving = tuple(name for name in problem.moving if name not in still)
    require_finite(problem.names[0], first, moving)
    return moving


def require_finite(name: str, weights: Weights, moving: Iterable[str]) -> None:
    """Checks that tensors of a checkpoint have no infinities.

    Args:
        name: The name of the checkpoint.
        weights: Its tensors.
        moving: The names of the tensors.

    Raises:
        CheckpointError: One is not finite.
    """
    for tensor in moving:
        if not weights[tensor].isfinite().all():
            raise CheckpointError(
                f"{name}: {tensor} has weights that are infinite or not a number",
                "Leave this checkpoint out",
            )
