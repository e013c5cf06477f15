"""The preconditioner of Adam at each checkpoint of a check."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from losscli.checkpoint import AdamState, ModelParameters, find_adam_state
from losscli.errors import CheckpointError
from losscli.evaluation.hessian.critical_points import CriticalPointTest
from losscli.evaluation.hessian.preconditioned import (
    PreconditionedEigenvalue,
    adam_preconditioner,
    adam_threshold,
    largest_preconditioned,
)
from losscli.evaluation.ranks import Arrays
from losscli.evaluation.tasks import Execution
from losscli.results.summaries import Preconditioner
from losscli.studies.checkpoints import changed
from losscli.studies.problem import Problem
from losscli.weight_space.digest import digest
from losscli.weight_space.vectors import Weights
from losscli.wording import list_first

__all__ = ["AdamPreconditioner"]


@dataclass(frozen=True)
class AdamPreconditioner:
    """Adam's state at each checkpoint, without the moments, which are read when they are needed.

    Attributes:
        problem: The checkpoints and the model.
        moving: The parameters that are differentiated.
        learning_rate: η, if the user gave one.
        states: What the summary has of each checkpoint.
        digests: What identifies P at each checkpoint; empty before its first step.
    """

    problem: Problem
    moving: Sequence[str]
    learning_rate: float | None
    states: Sequence[Preconditioner]
    digests: Sequence[str]

    @classmethod
    def plan(cls, problem: Problem, moving: Sequence[str], learning_rate: float | None) -> Self:
        """Reads the state of the optimiser in each checkpoint.

        Args:
            problem: The checkpoints and the model.
            moving: The parameters that are differentiated.
            learning_rate: η; None for that in each state.

        Returns:
            The plan.

        Raises:
            CheckpointError: A state cannot be used, or no checkpoint has taken a step.
        """
        states, digests = [], []
        for name in problem.names:
            state = None if name.startswith("init:") else _open(problem, moving, name)
            states.append(_describe(name, state, learning_rate))
            digests.append(_digest(state) if state and state.steps else "")
        if not any(digests):
            raise CheckpointError(
                f"the optimiser of {problem.names[-1]} has taken no step, so P is not defined",
                "Give a later checkpoint",
            )
        return cls(problem, moving, learning_rate, states, digests)

    @property
    def identity(self) -> Sequence[Any]:
        """What the numbers depend on, in JSON types."""
        rates = (state.get("learning_rate") for state in self.states)
        return list(zip(self.digests, rates, strict=True))

    def exists(self, t: int) -> bool:
        """Returns whether the checkpoint with a number has taken a step."""
        return bool(self.digests[t])

    def diagonal(self, t: int) -> Weights:
        """Computes the diagonal of P at the checkpoint with a number, by parameter.

        Args:
            t: The number of a checkpoint that `exists`.

        Returns:
            The diagonal, float64.

        Raises:
            ChangedError: The moments are not those that were planned with.
            CheckpointError: P has zeros.
        """
        name = self.problem.names[t]
        state = _open(self.problem, self.moving, name)
        if _digest(state) != self.digests[t]:
            raise changed(name)
        return adam_preconditioner(state)

    def evaluate(
        self, t: int, test: CriticalPointTest, placed: Weights, split: str, execution: Execution
    ) -> Arrays:
        """Evaluates the task of a checkpoint on a split, see `largest_preconditioned`."""
        return largest_preconditioned(test, placed, split, self.diagonal(t), execution)

    def notes(self, found: Mapping[tuple[str, str], PreconditionedEigenvalue]) -> Iterator[str]:
        """Yields notes on what was compared.

        Args:
            found: The eigenvalue at each checkpoint on each split.
        """
        edges = {edge for state in self.states if (edge := state.get("threshold"))}
        value = f" = {edges.pop():.6g}" if len(edges) == 1 else ""
        yield (
            "λ max of P⁻¹H, which is that of P^-½ H P^-½, is compared with (2 + 2 β₁)/((1 − β₁) η)"
            f"{value}, the threshold of full-batch training with Adam (Cohen et al. 2022); "
            "training with minibatches has none"
        )
        if any(state.get("matched_by") == "shapes" for state in self.states):
            yield (
                "moments are matched with parameters by order and shape, since the state of the "
                "optimiser has no names of parameters"
            )
        if decays := {state.get("weight_decay", 0.0) for state in self.states} - {0.0}:
            yield f"the weight decay of {max(decays):g} is not part of the loss, and so not of H"
        without = [
            s["checkpoint"] for s, key in zip(self.states, self.digests, strict=True) if not key
        ]
        if without:
            some = list_first(without)
            yield f"the optimiser of {some} has taken no step: P is not defined there"
        if missed := sum(not one.converged for one in found.values()):
            yield (
                f"the search for λ max of P⁻¹H has not converged at {missed} of "
                f"{len(found)} points: a larger eigenvalue may exist there"
            )


def _open(problem: Problem, moving: Sequence[str], name: str) -> AdamState:
    parameters = ModelParameters.of(problem.objective.tensors)
    state = find_adam_state(name, problem.optimizers(name), parameters, moving)
    if state.epsilon == 0 and any(bool((v == 0).any()) for v in state.second_moments.values()):
        raise CheckpointError(
            f"{name}: P has zeros, since eps is 0 and some second moments are",
            "Leave out these parameters with --except",
        )
    return state


def _digest(state: AdamState) -> str:
    """Identifies what P is computed from."""
    numbers = [sorted(state.steps.items()), state.betas, state.epsilon]
    content = json.dumps([digest(state.second_moments), numbers])
    return hashlib.sha256(content.encode()).hexdigest()


def _describe(name: str, state: AdamState | None, learning_rate: float | None) -> Preconditioner:
    if state is None or not state.steps:
        return {"checkpoint": name, "step": 0}
    rate = state.learning_rate if learning_rate is None else learning_rate
    if rate is None:
        raise CheckpointError(
            f"{name} has groups of parameters with different learning rates",
            "Choose the parameters of one group with --only or --except",
        )
    beta1, beta2 = state.betas
    return {
        "checkpoint": name,
        "step": max(state.steps.values()),
        "learning_rate": rate,
        "beta1": beta1,
        "beta2": beta2,
        "epsilon": state.epsilon,
        "amsgrad": state.amsgrad,
        "weight_decay": state.weight_decay,
        "matched_by": state.matched_by,
        "threshold": adam_threshold(rate, beta1) if rate else None,
    }
