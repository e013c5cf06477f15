"""What a journal holds of evaluations: keys that say what was evaluated, and arrays."""

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
from losscli.evaluation.strategies import Strategy
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
    """The points of a chunk, and the state that their evaluation was left in.

    Attributes:
        number: How many points there are.
        points_at_once: How many were to be evaluated at once.
        batch_size: The examples in a batch.
        strategy: How points were evaluated; 0 if that was not chosen yet.
        idle: The BatchNorm layers that took no batch, by their places.
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
    """Makes the key of the records of one computation.

    It is made of all that the numbers come from and the journal's identity does not hold: the
    tensors, the points, the examples and the type of the forward pass. So it does not matter who
    computes, nor in which order.

    Args:
        objective: What is evaluated.
        splits: The examples.
        kind: What is done.
        weights: The tensors that points are made of.
        numbers: What else the numbers depend on, made of JSON's types.

    Returns:
        A digest in hexadecimal.
    """
    training = objective.recalibration
    told = [
        *(kind, numbers, str(objective.dtype), list(objective.metrics)),
        training and [training.name, training.size, len(training), training.split.digest],
        *([name, len(split), split.digest] for name, split in splits.items()),
    ]
    ends = [digest(end) for end in (*weights, _rest(objective, weights[0]))]
    return hashlib.sha256(json.dumps([told, ends]).encode()).hexdigest()


def slice_key(
    objective: Objective,
    splits: Mapping[str, Examples],
    slice_: Slice,
    coordinates: Sequence[Sequence[float]],
) -> str:
    """Makes the key of the records of points of a slice.

    Args:
        objective: What is evaluated.
        splits: The examples.
        slice_: The slice.
        coordinates: The points.

    Returns:
        A digest in hexadecimal.
    """
    # Beside its ends a slice has numbers that are made of them, such as the place of a corner.
    numbers = [value for value in vars(slice_).values() if not isinstance(value, Mapping)]
    points = [list(point) for point in coordinates]
    return record_key(objective, splits, type(slice_).__name__, slice_.ends, [numbers, points])


def _rest(objective: Objective, weights: Weights) -> Weights:
    """The tensors that stay as they are loaded, under whatever name a tensor goes."""
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
    """Makes arrays of a chunk of points.

    Args:
        objective: What was evaluated, in the state that it was left in.
        splits: The examples.
        evaluations: For each split its evaluation.
        number: The points of the chunk.
        points_at_once: How many were to be evaluated at once.

    Returns:
        What `decode` and `state_of` take.
    """
    strategy = objective.strategy
    state = [number, points_at_once, objective.batch_size, strategy.value if strategy else 0]
    arrays: dict[str, NDArray[Any]] = {"state": np.array(state), "idle": idle_layers(objective)}
    for i, name in enumerate(splits):
        found = evaluations[name]
        arrays[f"{i}"] = found.losses.numpy()
        if found.weights is not None:
            arrays[f"{i} weights"] = found.weights.numpy()
        for k, metric in enumerate(objective.metrics):
            arrays[f"{i} {k}"] = found.metrics[metric].numpy()
            if metric in found.counts:
                arrays[f"{i} {k} count"] = np.array([found.counts[metric]])
    return arrays


def decode(arrays: Arrays, splits: Iterable[str], metrics: Iterable[str]) -> dict[str, Evaluation]:
    """Reads the evaluations of a chunk of points.

    Args:
        arrays: What `encode` made.
        splits: The names of the splits, in their order.
        metrics: The names of the metrics, in their order.

    Returns:
        For each split its evaluation.
    """
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
    """Reads the state of a chunk of points.

    Args:
        arrays: What `encode` made.

    Returns:
        The state.
    """
    number, points_at_once, batch_size, strategy = arrays["state"].tolist()
    return State(number, points_at_once, batch_size, strategy, arrays["idle"].tolist())


def idle_layers(objective: Objective) -> NDArray[np.int64]:
    """Lists the BatchNorm layers that took no batch.

    Args:
        objective: What was evaluated.

    Returns:
        Their places among the layers.
    """
    layers = enumerate(objective.batchnorm)
    return np.array([i for i, layer in layers if layer in objective.idle], np.int64)


def restore(objective: Objective, batch_size: int, idle: Iterable[int], strategy: int = 0) -> None:
    """Puts an objective into the state that it was in when something was recorded.

    A run that recalls a record goes on in this state. So it takes the very chunks that the run
    which was broken off took, and would have taken, whatever halved them.

    Args:
        objective: The objective.
        batch_size: The examples in a batch.
        idle: The BatchNorm layers that took no batch, by their places.
        strategy: How points were evaluated; 0 leaves a choice as it is.
    """
    objective.batch_size = batch_size
    objective.idle = [objective.batchnorm[i] for i in idle]
    if strategy:
        objective.strategy = Strategy(strategy)
