"""Exact derivatives of the mean loss along a line, by automatic differentiation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from losscli.data import Examples
from losscli.evaluation.derivatives.line import LineDerivatives, Method
from losscli.evaluation.derivatives.method import choose_method
from losscli.evaluation.memory import halving
from losscli.evaluation.objective import Objective
from losscli.evaluation.ranks import Arrays
from losscli.evaluation.records import record_key
from losscli.evaluation.tasks import ALONE, Execution, Task
from losscli.weight_space.slices import Line

__all__ = ["MethodChoice", "Slopes", "prepare_first_batch", "slopes"]


@dataclass(frozen=True)
class Slopes:
    """The derivatives of the mean loss of a split at P points of a line.

    Attributes:
        slope: dL/dα, ``[P]``, float64, on the CPU.
        curvature: d²L/dα², ``[P]``, float64, on the CPU.
    """

    slope: Tensor
    curvature: Tensor


class MethodChoice:
    """The method for a line, chosen at the first point that is evaluated and not recalled.

    Args:
        alphas: Points of the line, between which the method is tested.
    """

    def __init__(self, alphas: Sequence[float]) -> None:
        self._alphas = alphas
        self._chosen: tuple[Method, str] | None = None

    def __call__(self, derivatives: LineDerivatives, split: Examples) -> tuple[Method, str]:
        """Returns the method and a note, see `choose_method`."""
        if self._chosen is None:
            self._chosen = choose_method(derivatives, self._alphas, split)
        return self._chosen


def slopes(
    objective: Objective,
    line: Line,
    alphas: Sequence[float],
    splits: Mapping[str, Examples] | None = None,
    execution: Execution = ALONE,
    choice: MethodChoice | None = None,
) -> dict[str, Slopes]:
    """Computes the first and second derivative of the mean loss along a line, exactly.

    With θ(α) = A + α d, dL/dα = ⟨∇L, d⟩ and d²L/dα² = dᵀ H d. Taylor polynomials of
    degree two give both together with the loss, and where they fail forward mode, nested in itself
    (Pearlmutter 1994, Neural Computation 6(1), along one direction). If an operator has no
    forward-mode formula, reverse mode differentiates twice.

    In a network with kinks (ReLU, max pooling) the slope jumps at each kink. The second derivative
    does not contain these jumps: it is the curvature between the kinks, and its integral is not
    the change of the slope.

    Args:
        objective: The model, loss and data, checked. Tensors that the line does not move keep the
            values last loaded; all tensors are unchanged afterwards.
        line: The line, its ends on the objective's device, each tied tensor under one name.
            Buffers that it moves, such as BatchNorm's statistics, are differentiated like
            parameters.
        alphas: The P points.
        splits: The examples; all by default.
        execution: How points are executed. Progress counts points.
        choice: The method, which further points of the line share; chosen on these points by
            default.

    Returns:
        For each split its derivatives at the P points.

    Raises:
        ModelError: The model or the loss has no such derivatives, or none that can be trusted.
    """
    splits = objective.splits if splits is None else splits
    if not line.a or not alphas:
        zeros = torch.zeros(2, len(alphas), dtype=torch.float64)
        return {name: Slopes(*zeros.clone().unbind()) for name in splits}
    objective.batch_size = min(execution.gather(objective.batch_size))
    derivatives = LineDerivatives(objective, line)
    total = sum(map(len, splits.values()))

    choose = choice or MethodChoice(alphas)

    def differentiate(alpha: float, report: Callable[[float], None]) -> Arrays:
        method, note = choose(derivatives, next(iter(splits.values())))
        weights, done = derivatives.at(alpha), 0
        arrays: dict[str, NDArray[Any]] = {}
        for k, split in enumerate(splits.values()):
            means, weight = torch.zeros(2, dtype=torch.float64), 0.0
            for batch in objective.batches(split):
                shared = (k, done, len(batch)), alpha
                sums = derivatives.sums(method, weights, batch, shared)
                means += torch.tensor(sums, dtype=torch.float64) / len(split)
                weight += derivatives.weight
                done += len(batch)
                report(done / total)
            if weight != len(split):
                means *= len(split) / weight if weight else math.nan
            arrays[f"{k}"] = means.numpy()
        if note:
            # Part of the record, so that other ranks and a resumed run note it too.
            arrays["unverified"] = np.frombuffer(note.encode(), np.uint8)
        return arrays

    def evaluate(alpha: float, own: Execution) -> Arrays:
        if execution.size == 1:
            # The caller halves the batch and starts over, so that all points have one batch size.
            return differentiate(alpha, own.report)
        return halving(objective, lambda: differentiate(alpha, own.report))

    key = execution.key(
        lambda: record_key(objective, splits, "slopes", line.ends, objective.batch_size)
    )
    tasks = (Task(1, partial(evaluate, alpha), key, alpha) for alpha in alphas)
    points = list(execution.run(tasks))
    for point in points:
        if "unverified" in point:
            objective.add_note(point["unverified"].tobytes().decode())
    tables = {
        name: torch.stack([torch.from_numpy(point[f"{k}"]) for point in points], 1)
        for k, name in enumerate(splits)
    }
    return {name: Slopes(*table.unbind()) for name, table in tables.items()}


def prepare_first_batch(objective: Objective, line: Line, split: Examples) -> Callable[[], object]:
    """Returns a function that differentiates the first batch at one point, to be timed.

    Raises:
        ModelError: There are no derivatives that can be trusted.
    """
    derivatives = LineDerivatives(objective, line)
    method, _ = choose_method(derivatives, [0.25, 0.5, 0.75], split)
    weights = derivatives.at(0.5)
    batch = split.first(objective.batch_size).to(objective.device)
    return lambda: derivatives.sums(method, weights, batch, ((), 0.5))
