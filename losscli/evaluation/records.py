"""Journal records of evaluations: their keys, and their conversion to and from arrays."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from losscli.data import Examples
from losscli.evaluation.objective import Evaluation, Objective
from losscli.evaluation.ranks import Arrays
from losscli.evaluation.strategies.base import Strategy
from losscli.weight_space.digest import digest
from losscli.weight_space.slices import Slice
from losscli.weight_space.vectors import Weights

__all__ = [
    "State",
    "decode",
    "encode",
    "idle_layers",
    "record_key",
    "restore",
    "slice_key",
    "state_of",
]


class State(NamedTuple):
    """The state of an objective after the evaluation of a chunk of points.

    Attributes:
        number: The number of points in the chunk.
        points_at_once: The number of points planned for a chunk.
        batch_size: The number of examples in a batch.
        strategy: The value of the strategy; 0 if none was chosen yet.
        idle: The indices of the BatchNorm layers that did not run.
    """

    number: int
    points_at_once: int
    batch_size: int
    strategy: int
    idle: Sequence[int]


def record_key(
    objective: Objective,
    splits: Mapping[str, Examples],
    kind: str,
    weights: Sequence[Weights],
    numbers: object = None,
) -> str:
    """Computes the key of the records of one computation.

    It is a digest of everything that determines the numbers and is not in the journal's identity:
    the tensors, the points, the examples and the type of the forward pass. So it does not depend on
    the study or on the order of computations.

    Args:
        objective: The objective.
        splits: The examples.
        kind: The kind of computation.
        weights: The tensors that the points are computed from.
        numbers: Other inputs of the computation; JSON types.

    Returns:
        A digest in hexadecimal.
    """
    training = objective.recalibration
    inputs = [
        *(kind, numbers, str(objective.dtype), list(objective.columns)),
        training and [training.name, training.size, len(training), training.split.digest],
        *([name, len(split), split.digest] for name, split in splits.items()),
    ]
    ends = [digest(end) for end in (*weights, _fixed_tensors(objective, weights[0]))]
    return hashlib.sha256(json.dumps([inputs, ends]).encode()).hexdigest()


def slice_key(
    objective: Objective,
    splits: Mapping[str, Examples],
    slice_: Slice,
    coordinates: Sequence[Sequence[float]],
) -> str:
    """Computes the key of the records of points of a slice, a digest in hexadecimal."""
    # A slice also has numbers that follow from its ends, such as the position of a corner.
    fields = vars(slice_).items()
    numbers = [x for name, x in fields if name != "ends" and not isinstance(x, Mapping)]
    points = [list(point) for point in coordinates]
    return record_key(objective, splits, type(slice_).__name__, slice_.ends, [numbers, points])


def _fixed_tensors(objective: Objective, weights: Weights) -> Weights:
    """The tensors that keep the values last loaded; a tied tensor moves under any of its names."""
    tensors = objective.tensors
    computed = [name for layer in objective.statistics for name in layer.names]
    computed += [name for layer in objective.spectral for name in layer.names]
    moving = {id(tensors[name]) for name in (*weights, *computed) if name in tensors}
    return {name: tensor for name, tensor in tensors.items() if id(tensor) not in moving}


def encode(
    objective: Objective,
    splits: Mapping[str, Examples],
    evaluations: Mapping[str, Evaluation],
    number: int,
    points_at_once: int,
) -> Arrays:
    """Converts the evaluations of a chunk of points to arrays, for `decode` and `state_of`."""
    strategy = objective.strategy
    state = [number, points_at_once, objective.batch_size, strategy.value if strategy else 0]
    arrays: dict[str, NDArray[Any]] = {"state": np.array(state), "idle": idle_layers(objective)}
    for i, name in enumerate(splits):
        evaluation = evaluations[name]
        arrays[f"{i}"] = evaluation.losses.numpy()
        if evaluation.weights is not None:
            arrays[f"{i} weights"] = evaluation.weights.numpy()
        for k, metric in enumerate(objective.columns):
            arrays[f"{i} {k}"] = evaluation.metrics[metric].numpy()
            if metric in evaluation.counts:
                arrays[f"{i} {k} count"] = np.array([evaluation.counts[metric]])
    return arrays


def decode(arrays: Arrays, splits: Iterable[str], metrics: Iterable[str]) -> dict[str, Evaluation]:
    """Converts the result of `encode` to the evaluation of each split, by names in order."""
    names = {metric: f"{k}" for k, metric in enumerate(metrics)}
    return {
        name: Evaluation(
            torch.from_numpy(arrays[f"{i}"]),
            {metric: torch.from_numpy(arrays[f"{i} {k}"]) for metric, k in names.items()},
            torch.from_numpy(arrays[f"{i} weights"]) if f"{i} weights" in arrays else None,
            {
                metric: float(arrays[f"{i} {k} count"][0])
                for metric, k in names.items()
                if f"{i} {k} count" in arrays
            },
        )
        for i, name in enumerate(splits)
    }


def state_of(arrays: Arrays) -> State:
    """Reads the state after a chunk of points from the result of `encode`."""
    number, points_at_once, batch_size, strategy = arrays["state"].tolist()
    return State(number, points_at_once, batch_size, strategy, arrays["idle"].tolist())


def idle_layers(objective: Objective) -> NDArray[np.int64]:
    """Returns the indices of the BatchNorm layers that did not run in the last evaluation."""
    layers = enumerate(objective.batchnorm)
    return np.array([i for i, layer in layers if layer in objective.idle], np.int64)


def restore(objective: Objective, batch_size: int, idle: Iterable[int], strategy: int = 0) -> None:
    """Restores the state of an objective when a record was made; strategy 0 keeps the present one.

    A resumed run continues in this state. So it evaluates the same chunks as the interrupted run
    would have, also if memory had run out there.
    """
    objective.batch_size = batch_size
    objective.idle = [objective.batchnorm[i] for i in idle]
    if strategy:
        objective.strategy = Strategy(strategy)
