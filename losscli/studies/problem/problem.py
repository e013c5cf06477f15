"""What a study evaluates: a model, its loss on data, and checkpoints, all of which fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import overload

from torch import nn

from losscli.checkpoint import Checkpoint
from losscli.errors import CheckpointError, ModelError, UsageError
from losscli.evaluation.objective import Objective
from losscli.settings import Settings
from losscli.summaries import Counts, Provenance
from losscli.weight_space.vectors import Weights, can_move, equal, select_names

__all__ = ["Problem", "counted", "differing_tensors", "floating_buffers", "moving_names"]


@dataclass(frozen=True)
class Problem:
    """A model, its loss on a data set, and checkpoints.

    Attributes:
        objective: What is evaluated.
        names: The checkpoints in their order, as named by the user.
        first: The first of them, its names those of the model.
        moving: The tensors that may move, each tied tensor under one name.
        fresh: Builds the model again, or copies the module that was given.
        buffers: Those of the model's floating-point buffers that any choice of tensors names.
        provenance: Where all of it came from, for the summary.
        settings: The settings that it was made from.
        read: Reads a checkpoint by its name.
        unchanged: Checks that the files of the checkpoints have not changed since they were read.
        notes: How the checkpoints were put in order, where they were.
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
    unchanged: Callable[[], None]
    notes: tuple[str, ...] = ()

    def open(self, t: int) -> Checkpoint:
        """Opens a checkpoint; only the first is held.

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
        """The tensors that may not move by the choice of tensors alone."""
        free = replace(self.settings, only=(), except_=())
        moving = set(self.moving)
        return tuple(n for n in moving_names(self.objective, self.buffers, free) if n not in moving)

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
        """The last checkpoint, opened."""
        return self.open(len(self.names) - 1)

    @cached_property
    def origin(self) -> Weights:
        """All tensors of the first checkpoint, but the buffers that stay at the last one's."""
        # Cached, since every point that is placed needs it.
        if self.settings.buffers != "b" or not self.buffers:
            return self.first.weights
        last = self.last.weights
        return {**self.first.weights, **{name: last[name] for name in self.buffers}}

    def place(self, weights: Weights) -> Weights:
        """Places a checkpoint: what may not move is the origin's.

        Args:
            weights: All tensors of a checkpoint.

        Returns:
            All tensors of the point that stands for it.
        """
        return {**self.origin, **{name: weights[name] for name in self.moving}}

    def places(self, steps: Sequence[int]) -> Sequence[Weights]:
        """Places checkpoints lazily; none is kept in memory.

        Args:
            steps: Their places among the names.

        Returns:
            All tensors of the points that stand for them.
        """
        return _Places(self, steps)


class _Places(Sequence[Weights]):
    """Points that stand for checkpoints, each opened on access."""

    def __init__(self, problem: Problem, steps: Sequence[int]) -> None:
        self._problem = problem
        self._steps = steps

    def __len__(self) -> int:
        return len(self._steps)

    @overload
    def __getitem__(self, at: int) -> Weights: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Weights]: ...
    def __getitem__(self, at: int | slice) -> Weights | Sequence[Weights]:
        if isinstance(at, slice):
            return _Places(self._problem, self._steps[at])
        return self._problem.place(self._problem.open(self._steps[at]).weights)


def counted(objective: Objective, numbers: Mapping[str, int]) -> Counts:
    """Counts what a loss is the mean of.

    Args:
        objective: What is evaluated.
        numbers: How many numbers the mean of each split has.

    Returns:
        The ``examples`` of each split; and the ``batches``, where the loss is one number per batch.
    """
    if not objective.batch_loss:
        return {"examples": dict(numbers)}
    rows = {name: objective.splits[name].rows for name in numbers}
    return {"examples": rows, "batches": dict(numbers)}


def floating_buffers(objective: Objective) -> tuple[str, ...]:
    """Lists the buffers that ``--buffers`` is about.

    Args:
        objective: Whose model.

    Returns:
        The names of its floating-point buffers, but for the singular vectors of spectral
        normalisation: they are functions of the parameters.
    """
    computed = {id(objective.tensors[n]) for layer in objective.spectral for n in layer.names}
    return tuple(
        name
        for name, tensor in objective.tensors.items()
        if not isinstance(tensor, nn.Parameter) and can_move(tensor) and id(tensor) not in computed
    )


def moving_names(
    objective: Objective, buffers: Sequence[str], settings: Settings
) -> tuple[str, ...]:
    """Chooses the tensors that may move.

    Args:
        objective: Whose model.
        buffers: Its floating-point buffers.
        settings: Say which of them move with the parameters, and which tensors are left out.

    Returns:
        Their names, of each tied tensor the one that counts.

    Raises:
        ModelError: The model has no parameters.
        UsageError: None is left.
    """
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


def differing_tensors(problem: Problem) -> tuple[str, ...]:
    """Finds the tensors that are not the same in all checkpoints, one checkpoint at a time.

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
    for t in range(1, len(problem.names)):
        weights = problem.open(t).weights
        still = {name for name in still if equal(first[name], weights[name])}
        _require_finite(problem.names[t], weights, set(problem.moving) - still)
        del weights  # before the next one is opened
    moving = tuple(name for name in problem.moving if name not in still)
    _require_finite(problem.names[0], first, moving)
    return moving


def _require_finite(name: str, weights: Weights, moving: Iterable[str]) -> None:
    for tensor in moving:
        if not weights[tensor].isfinite().all():
            raise CheckpointError(
                f"{name}: {tensor} has weights that are infinite or not a number, and lies nowhere "
                "in weight space",
                "Leave this checkpoint out",
            )
