"""What is evaluated, written into a journal under keys that say what it is, and known again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from losscli.data import Examples
from losscli.evaluation.journal import Journal
from losscli.evaluation.objective import Evaluation, Objective
from losscli.evaluation.strategies import Way
from losscli.mmap import let_go
from losscli.weight_space.digest import digest
from losscli.weight_space.slices import Slice
from losscli.weight_space.vectors import Weights

__all__ = ["Log", "pack", "unpack"]


class Log:
    """The part of one computation in a journal.

    Its key is made of all that the numbers come from and the journal's identity does not hold:
    the tensors, the points, the examples and the type of the forward pass. So it does not matter
    who computes, nor in which order.

    Args:
        journal: The journal.
        objective: What is evaluated.
        splits: The examples; all where it is None.
        kind: What is done.
        weights: The tensors that points are made of.
        numbers: What else settles it, made of JSON's types.
    """

    def __init__(
        self,
        journal: Journal,
        objective: Objective,
        splits: Mapping[str, Examples] | None,
        kind: str,
        weights: Sequence[Weights],
        numbers: object = None,
    ) -> None:
        self._journal = journal
        self._objective = objective
        self._splits = objective.splits if splits is None else splits
        training = objective.recalibration
        told = [
            *(kind, numbers, str(objective.dtype), list(objective.metrics)),
            training and [training.name, training.size, len(training), training.split.digest],
            *([name, len(split), split.digest] for name, split in self._splits.items()),
        ]
        ends = [digest(end) for end in (*weights, self._rest(weights[0]))]
        for end in weights:
            let_go(*end.values())
        self._key = hashlib.sha256(json.dumps([told, ends]).encode()).hexdigest()

    @classmethod
    def of_slice(
        cls,
        journal: Journal,
        objective: Objective,
        splits: Mapping[str, Examples] | None,
        slice_: Slice,
        coordinates: Sequence[Sequence[float]],
    ) -> Log:
        """Finds the part of points of a slice.

        Args:
            journal: The journal.
            objective: What is evaluated.
            splits: The examples; all where it is None.
            slice_: The slice.
            coordinates: The points.

        Returns:
            Their part.
        """
        # Beside its ends a slice has numbers that are made of them, such as the place of a corner.
        numbers = [value for value in vars(slice_).values() if not isinstance(value, Mapping)]
        kind = type(slice_).__name__
        points = [list(point) for point in coordinates]
        return cls(journal, objective, splits, kind, slice_.ends, [numbers, points])

    def recall(self, what: object) -> dict[str, NDArray[Any]] | None:
        """Recalls a record.

        Args:
            what: What tells it from the others of this part.

        Returns:
            Its arrays; None where there is no such record.
        """
        return self._journal.recall(f"{self._key} {what}")

    def record(self, what: object, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Records arrays.

        Args:
            what: What tells them from the others of this part.
            arrays: The arrays.
        """
        self._journal.record(f"{self._key} {what}", arrays)

    def recall_chunk(self, start: int) -> tuple[dict[str, Evaluation], int, int] | None:
        """Recalls a chunk of points, and puts the objective into the state it was in after it.

        With its losses a chunk has the state that evaluation was in: the points at a time, the
        batch and the way. The run that recalls it goes on in that state. So it takes the very
        chunks that the run which was broken off took, and would have taken, whatever halved them.

        Args:
            start: Its first point.

        Returns:
            What was found, its points, and how many were taken at a time; None where there is no
            such chunk.
        """
        found = self.recall(start)
        if found is None:
            return None
        return unpack(self._objective, self._splits, found)

    def record_chunk(
        self, start: int, found: Mapping[str, Evaluation], number: int, chunk: int
    ) -> None:
        """Records a chunk of points.

        Args:
            start: Its first point.
            found: What was found on each split.
            number: Its points.
            chunk: How many were taken at a time.
        """
        self.record(start, pack(self._objective, self._splits, found, number, chunk))

    def _rest(self, weights: Weights) -> Weights:
        """The tensors that stay as they are loaded, under whatever name a tensor goes."""
        tensors = self._objective.tensors
        objective = self._objective
        computed = [name for layer in objective.statistics for name in layer.names]
        computed += [name for layer in objective.spectral for name in layer.names]
        moving = {id(tensors[name]) for name in (*weights, *computed) if name in tensors}
        return {name: tensor for name, tensor in tensors.items() if id(tensor) not in moving}


def pack(
    objective: Objective,
    splits: Mapping[str, Examples],
    found: Mapping[str, Evaluation],
    number: int,
    chunk: int,
) -> dict[str, NDArray[Any]]:
    """Makes arrays of a chunk of points.

    Args:
        objective: What was evaluated, in the state that it was in.
        splits: The examples.
        found: What was found on each split.
        number: The points of the chunk.
        chunk: How many were taken at a time.

    Returns:
        What `unpack` takes.
    """
    way = objective.way
    state = [number, chunk, objective.batch_size, way.value if way else 0]
    idle = [i for i, layer in enumerate(objective.batchnorm) if layer in objective.idle]
    arrays = {"state": np.array(state), "idle": np.array(idle, np.int64)}
    for i, name in enumerate(splits):
        arrays[f"{i}"] = found[name].losses.numpy()
        weights, counts = found[name].weights, found[name].counts
        if weights is not None:
            arrays[f"{i} weights"] = weights.numpy()
        for k, metric in enumerate(objective.metrics):
            arrays[f"{i} {k}"] = found[name].metrics[metric].numpy()
            if metric in counts:
                arrays[f"{i} {k} count"] = np.array([counts[metric]])
    return arrays


def unpack(
    objective: Objective, splits: Mapping[str, Examples], arrays: Mapping[str, NDArray[Any]]
) -> tuple[dict[str, Evaluation], int, int]:
    """Takes a chunk of points, and puts the objective into the state that it was in.

    Args:
        objective: What was evaluated.
        splits: The examples.
        arrays: What `pack` made.

    Returns:
        What was found on each split, the points of the chunk, and how many were taken at a time.
    """
    number, chunk, objective.batch_size, way = arrays["state"].tolist()
    if way:
        # What was recorded before a way was chosen does not undo the choice.
        objective.way = Way(way)
    objective.idle = [objective.batchnorm[i] for i in arrays["idle"].tolist()]
    evaluations = {
        name: Evaluation(
            torch.from_numpy(arrays[f"{i}"]),
            {
                metric: torch.from_numpy(arrays[f"{i} {k}"])
                for k, metric in enumerate(objective.metrics)
            },
            torch.from_numpy(arrays[f"{i} weights"]) if f"{i} weights" in arrays else None,
            {
                metric: float(arrays[f"{i} {k} count"][0])
                for k, metric in enumerate(objective.metrics)
                if f"{i} {k} count" in arrays
            },
        )
        for i, name in enumerate(splits)
    }
    return evaluations, number, chunk
