"""The spectral density, the trace and the curvature of blocks at a point, as records of tasks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from losscli.evaluation.hessian.critical_points import CriticalPointTest
from losscli.evaluation.hessian.curvature import Curvature
from losscli.evaluation.hessian.spectral_density import Probe, basis_size, draw_probe
from losscli.evaluation.objective import Objective, recalibrated
from losscli.evaluation.ranks import Arrays
from losscli.evaluation.records import idle_layers
from losscli.evaluation.tasks import Execution
from losscli.weight_space.vectors import Weights

__all__ = ["BlockCurvature", "CurvatureProbes", "objective_state"]


@dataclass(frozen=True)
class BlockCurvature:
    """The gradient of a block, and the largest eigenvalue of its diagonal block of the matrix.

    Attributes:
        gradient_norm: The norm of the gradient with respect to the block.
        lambda_max: The largest eigenvalue.
        lambda_max_error: Its error, see `Eigenpair`.
        converged: Whether it may be taken for the largest.
        traces: vᵀHv of its diagonal block H for each probe v, ``[K]``: estimates of its trace.
    """

    gradient_norm: float
    lambda_max: float
    lambda_max_error: float
    converged: bool
    traces: NDArray[np.float64]

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Returns the arrays of a record."""
        numbers = [self.gradient_norm, self.lambda_max, self.lambda_max_error, self.converged]
        return {"numbers": np.array(numbers, np.float64), "traces": self.traces}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Self:
        """Reads the arrays of a record."""
        norm, value, error, converged = arrays["numbers"].tolist()
        return cls(norm, value, error, bool(converged), arrays["traces"])


@dataclass(frozen=True)
class CurvatureProbes:
    """Probes a matrix of second derivatives at points.

    Attributes:
        test: The objective, the parameters and the seed, as for verdicts.
        operator: The matrix.
        number: The number of probes.
        steps: The most Lanczos steps of each.
    """

    test: CriticalPointTest
    operator: type[Curvature]
    number: int
    steps: int

    @property
    def kept(self) -> tuple[int, int]:
        """How many of the Lanczos vectors of a probe are kept in memory, and of how many."""
        size = self.size(self.test.names)
        steps = min(self.steps, size)
        return basis_size(size, steps, self.test.objective.device), steps

    def size(self, names: Iterable[str]) -> int:
        """Returns the number of values in some parameters."""
        return sum(self.test.objective.tensors[name].numel() for name in names)

    def probe(
        self, point: Weights, split: str, number: int, size: float, execution: Execution
    ) -> Arrays:
        """Runs the probe of a number at one point on one split.

        Args:
            point: The point: all tensors of the model.
            split: The name of the split.
            number: The number of the probe. It is the same vector at all points.
            size: Its size in the unit of progress.
            execution: Its progress counts up to that.

        Returns:
            The record, for `Probe.from_arrays`.
        """
        test, done = self.test, 0.0
        objective = test.objective
        kept, steps = self.kept

        def attend(share: float) -> None:
            nonlocal done
            execution.poll()
            # The gradient that the first product needs counts as one more.
            done += share / (steps + 1)
            execution.report(size * min(done, 1.0))

        weights = recalibrated(objective, point)
        with (
            objective.frozen_statistics(),
            self.operator(
                test.differentiated(weights), weights, test.names, objective.splits[split], attend
            ) as curvature,
        ):
            v = draw_probe(curvature.size, test.seed, number).to(curvature.device)
            found = Probe.run(curvature.product, v, steps, kept)
        return {**found.to_arrays(), **objective_state(objective)}

    def block(
        self, point: Weights, split: str, index: int, names: Sequence[str], execution: Execution
    ) -> Arrays:
        """Computes the curvature of a block at one point on one split.

        Args:
            point: The point: all tensors of the model.
            split: The name of the split.
            index: The number of the block, which determines its probes.
            names: The parameters of the block.
            execution: Fails if another rank has failed; its progress is not counted.

        Returns:
            The record, for `BlockCurvature.from_arrays`.
        """
        test = self.test
        objective = test.objective
        every = objective.splits[split]
        weights = recalibrated(objective, point)
        with objective.frozen_statistics():
            with test.curvature(weights, every, execution, names) as curvature:
                norm = float(curvature.gradient().norm())
            with test.curvature(weights, every, execution, names, self.operator) as curvature:
                traces = []
                for number in range(self.number):
                    v = draw_probe(curvature.size, test.seed, number, index).to(curvature.device)
                    traces.append(float(v @ curvature.product(v)))
            largest = test.largest_eigenvalue(weights, names, every, self.operator, execution)
        found = BlockCurvature(
            *(norm, largest.value, largest.error, largest.converged), np.array(traces)
        )
        return {**found.to_arrays(), **objective_state(objective)}


def objective_state(objective: Objective) -> dict[str, NDArray[Any]]:
    """Returns the state of an objective that a resumed run continues in, as arrays of a record."""
    return {"counts": np.array([objective.batch_size]), "idle": idle_layers(objective)}
