"""The Hessian preconditioned by Adam."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from losscli.checkpoint import AdamState
from losscli.evaluation.hessian.critical_points import CriticalPointTest
from losscli.evaluation.hessian.curvature import Curvature
from losscli.evaluation.hessian.curvature_probes import objective_state
from losscli.evaluation.objective import recalibrated
from losscli.evaluation.ranks import Arrays
from losscli.evaluation.tasks import Execution
from losscli.weight_space.vectors import Weights

__all__ = [
    "PreconditionedEigenvalue",
    "PreconditionedHessian",
    "adam_preconditioner",
    "adam_threshold",
    "largest_preconditioned",
]


@dataclass(frozen=True)
class PreconditionedEigenvalue:
    """λ_max(P^-½ H P^-½) at a point.

    Attributes:
        value: The largest eigenvalue.
        error: Its error, see `Eigenpair`.
        converged: Whether it may be taken for the largest.
    """

    value: float
    error: float
    converged: bool

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Self:
        """Reads the arrays of a record of `largest_preconditioned`."""
        value, error, converged = arrays["numbers"].tolist()
        return cls(value, error, bool(converged))


class PreconditionedHessian(Curvature):
    """The Hessian H of the mean loss, preconditioned by a diagonal P: P^-½ H P^-½.

    It is symmetric and has the eigenvalues of P⁻¹H.

    Args:
        preconditioner: The diagonal of P by parameter, positive, each in its shape.
        arguments: As for `Curvature`.
        options: As for `Curvature`.
    """

    def __init__(self, preconditioner: Weights, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._root = self._flat([preconditioner[name] for name in self.names]).rsqrt()

    def _products(self, vectors: Tensor) -> Tensor:
        """Multiplies P^-½ H P^-½ with the rows of a matrix, ``[K, n]``."""
        return super()._products(vectors.to(self._root) * self._root) * self._root


def adam_preconditioner(state: AdamState) -> Weights:
    """Computes the diagonal of P of Adam (Cohen et al. 2022, arXiv 2207.14484).

    P = (1 − β₁ᵗ) (√(v / (1 − β₂ᵗ)) + ε), so that a step is −η P⁻¹ m, with the first moment m.

    Args:
        state: The state after t > 0 steps.

    Returns:
        The diagonal by parameter, float64.
    """
    beta1, beta2 = state.betas
    return {
        name: (1 - beta1**t) * ((moment.to(torch.float64) / (1 - beta2**t)).sqrt() + state.epsilon)
        for (name, moment), t in zip(
            state.second_moments.items(), state.steps.values(), strict=True
        )
    }


def adam_threshold(learning_rate: float, beta1: float) -> float:
    """Returns the largest λ_max(P^-½ H P^-½) at which full-batch training with Adam is stable.

    It is (2 + 2β₁) / ((1 − β₁) η), the threshold of gradient descent with an exponential moving
    average of gradients instead of the gradient (Cohen et al. 2022, arXiv 2207.14484).

    Args:
        learning_rate: η.
        beta1: β₁.
    """
    return (2 + 2 * beta1) / ((1 - beta1) * learning_rate)


def largest_preconditioned(
    test: CriticalPointTest,
    point: Weights,
    split: str,
    preconditioner: Weights,
    execution: Execution,
) -> Arrays:
    """Computes a `PreconditionedEigenvalue` at one point on one split, as a record."""
    objective = test.objective
    operator = partial(PreconditionedHessian, preconditioner)
    weights = recalibrated(objective, point)
    with objective.frozen_statistics():
        found = test.largest_eigenvalue(
            weights, test.names, objective.splits[split], operator, execution
        )
    numbers = np.array([found.value, found.error, found.converged], np.float64)
    return {"numbers": numbers, **objective_state(objective)}
