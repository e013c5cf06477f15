"""Comparison of the outputs of two checkpoints: disagreement and linear CKA."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from losscli.data import Examples, Split, realise
from losscli.errors import LossError, ModelError
from losscli.evaluation.forward import scores_in
from losscli.evaluation.losses.built_in import PerExample
from losscli.evaluation.losses.example_weights import weights_of
from losscli.evaluation.losses.metrics import disagreement
from losscli.evaluation.losses.targets import has_label
from losscli.evaluation.memory import halving
from losscli.evaluation.objective import Objective, recalibrated
from losscli.evaluation.ranks import Arrays
from losscli.evaluation.records import record_key
from losscli.evaluation.sampling import Estimate
from losscli.evaluation.task_checks import classifies
from losscli.evaluation.tasks import Execution, Task
from losscli.weight_space.curve import relative
from losscli.weight_space.vectors import Weights

__all__ = ["Comparison", "LinearCKA", "Measures", "check_outputs", "compare"]

# The most outputs of an example: the covariance matrix of two checkpoints has 0.5 GB.
_MOST_OUTPUTS = 4096


@dataclass(frozen=True)
class Measures:
    """The quantities to compute from the outputs of two checkpoints.

    Attributes:
        accuracy: Defines the predictions to compare; None if disagreement is not measured.
        cka: Whether linear CKA is computed.
    """

    accuracy: PerExample | None
    cka: bool

    def __bool__(self) -> bool:
        return self.accuracy is not None or self.cka


@dataclass(frozen=True)
class Comparison:
    """The comparison of two checkpoints on one split; nan where unknown.

    Attributes:
        disagreement: The share of examples with different predictions.
        disagreement_stderr: Its standard error over examples.
        cka: The linear CKA of the outputs.
    """

    disagreement: float
    disagreement_stderr: float
    cka: float


class LinearCKA:
    """Accumulates the linear CKA of two representations of the same examples.

    For centred X and Y, ``[N, p]`` and ``[N, q]``, it is ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖) with Frobenius
    norms (Kornblith et al. 2019, arXiv 1905.00414). The matrices are accumulated in float64 around
    the mean, batch by batch (Chan, Golub & LeVeque 1983).
    """

    def __init__(self) -> None:
        self._number = 0
        self._features = 0
        self._mean = self._scatter = torch.empty(0)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Adds examples by their two representations, ``[B, p]`` and ``[B, q]``."""
        # MPS has no float64.
        x, y = (t.cpu() if t.device.type == "mps" else t for t in (x, y))
        both = torch.cat([x.double(), y.double()], 1)
        number, mean = len(both), both.mean(0)
        both -= mean
        scatter = both.T @ both
        if self._number:
            shift, total = mean - self._mean, self._number + number
            scatter += self._scatter + self._number * number / total * torch.outer(shift, shift)
            mean = self._mean + number / total * shift
        self._number += number
        self._features, self._mean, self._scatter = x.shape[1], mean, scatter

    @property
    def value(self) -> float:
        """The linear CKA; nan if a representation is constant or not finite."""
        p, scatter = self._features, self._scatter
        cross, own, other = scatter[:p, p:], scatter[:p, :p], scatter[p:, p:]
        # Norms are divided first, since their product may leave the range of float64.
        norm, own_norm, other_norm = (float(t.norm()) for t in (cross, own, other))
        if not own_norm or not other_norm:
            return math.nan
        return norm / own_norm * (norm / other_norm)


def check_outputs(objective: Objective, measures: Measures) -> None:
    """Checks on a first batch that the outputs of the loaded checkpoint can be compared.

    Raises:
        ModelError: The outputs are not a tensor with real numbers of each example, or too many.
        LossError: There are no classes.
    """
    option = "--disagreement" if measures.accuracy is not None else "--cka"
    if objective.seeds:
        raise ModelError(
            f"{option} compares the outputs of one forward pass, and those of --stochastic are "
            "random",
            f"Leave out {option} or --stochastic",
        )
    for batch in objective.first_batches().values():
        outputs = _outputs(objective, batch)
        targets = realise(batch.targets)
        rows = len(targets) if isinstance(targets, Tensor) else len(batch)
        if not isinstance(outputs, Tensor) or not outputs.ndim or len(outputs) != rows:
            got = (
                f"{list(outputs.shape)} for {rows} examples"
                if isinstance(outputs, Tensor)
                else "only losses"
                if objective.function is not None
                else f"a {type(outputs).__name__}"
            )
            raise ModelError(
                f"{option} compares outputs that are a tensor with a row for each example, and the "
                f"model gives {got}",
                f"Leave out {option}",
            )
        if measures.accuracy is not None:
            _check_classes(objective, measures, outputs, targets)
        numbers = math.prod(outputs.shape[1:])
        if measures.cka and (outputs.is_complex() or numbers > _MOST_OUTPUTS):
            got = "complex numbers" if outputs.is_complex() else f"{numbers:,}"
            raise ModelError(
                f"--cka compares at most {_MOST_OUTPUTS:,} real outputs of an example, and the "
                f"model gives {got}",
                "Leave out --cka",
            )


def _check_classes(
    objective: Objective, measures: Measures, outputs: Tensor, targets: object
) -> None:
    """Checks that outputs are scores of classes."""
    try:
        if not classifies(objective.loss):
            raise LossError("the loss is not one of classification")  # noqa: TRY301
        if not isinstance(targets, Tensor):
            raise LossError("the targets are not a tensor")  # noqa: TRY301
        if not has_label(outputs, targets):
            raise LossError("the targets are not the labels 0 and 1")  # noqa: TRY301
        _disagreement(measures, outputs, outputs, targets)
    except LossError as error:
        raise LossError(
            f"--disagreement compares predicted classes, and there are none: {error.what}",
            "Leave out --disagreement",
        ) from None


def compare(
    objective: Objective,
    checkpoints: Sequence[Weights],
    pairs: Sequence[tuple[int, int]],
    measures: Measures,
    splits: Mapping[str, Examples],
    execution: Execution,
) -> list[dict[str, Comparison]]:
    """Compares the outputs of pairs of checkpoints.

    Returns:
        For each pair and split the comparison.
    """

    def key(i: int, j: int) -> str:
        ends = [checkpoints[i], checkpoints[j]]
        what = [measures.accuracy is not None, measures.cka]
        return record_key(objective, splits, "outputs", ends, what)

    def evaluate(i: int, j: int, own: Execution) -> Arrays:
        ends = [recalibrated(objective, checkpoints[t]) for t in (i, j)]
        with objective.frozen_statistics(), torch.no_grad():
            values = [
                halving(objective, partial(_compare_split, objective, ends, measures, split))
                for split in splits.values()
            ]
        own.report(2)
        return {"values": np.array(values)}

    tasks: Iterator[Task] = (
        Task(2, partial(evaluate, i, j), execution.key(partial(key, i, j)), 0) for i, j in pairs
    )
    return [
        {
            name: Comparison(*values)
            for name, values in zip(splits, arrays["values"].tolist(), strict=True)
        }
        for arrays in execution.run(tasks)
    ]


def _compare_split(
    objective: Objective, ends: Sequence[Weights], measures: Measures, split: Examples
) -> tuple[float, float, float]:
    """Compares two checkpoints on a split, batch by batch."""
    cka, shares, weights = LinearCKA(), list[Tensor](), list[Tensor]()
    for batch in objective.batches(split):
        outputs = []
        for end in ends:
            objective.load(end)
            outputs.append(_outputs(objective, batch))
        one, other = outputs
        if measures.accuracy is not None:
            share, weight = _disagreement(measures, one, other, realise(batch.targets))
            shares.append(share.cpu())
            weights.append(weight.cpu())
        if measures.cka:
            cka.add(one.reshape(len(one), -1), other.reshape(len(other), -1))
    different = error = math.nan
    if shares:
        counts: NDArray[np.float64] = torch.cat(weights).double().numpy()
        values = torch.cat(shares).double().numpy() * relative(counts)
        estimate = Estimate.of(values[None], {}, counts)
        different, error = float(estimate.mean[0]), float(estimate.stderr[0])
    return different, error, cka.value if measures.cka else math.nan


def _outputs(objective: Objective, batch: Split) -> Any:
    with torch.no_grad():
        return scores_in(objective.forward(objective.model, objective.prepare(batch)))


def _disagreement(
    measures: Measures, one: Tensor, other: Tensor, targets: Any
) -> tuple[Tensor, Tensor]:
    """Returns the share of different predictions of each example, and its weight."""
    assert measures.accuracy is not None
    targets = targets if targets.is_floating_point() else targets.long()
    weights = weights_of(measures.accuracy, one, targets)
    shares = disagreement(measures.accuracy, one, other, targets)
    return shares, torch.ones(len(shares)) if weights is None else weights
