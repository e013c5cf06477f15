"""Trains the bends of a path between two points (Garipov et al. 2018, arXiv 1802.10026).

Every step draws t ~ U(0, 1) and a minibatch, and moves each bend C_k along −w_k(t) ∇L(φ(t)) by
Adam, where φ(t) = Σ w_k C_k. That minimises E over t of L(φ(t)).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from losscli.data import Examples
from losscli.errors import LossError, OutOfMemoryError
from losscli.evaluation.cost import Clock, timed
from losscli.evaluation.hessian.curvature import Curvature
from losscli.evaluation.memory import minute_of_work
from losscli.evaluation.objective import Objective
from losscli.evaluation.ranks import Arrays
from losscli.evaluation.recalibration import recording
from losscli.evaluation.records import record_key
from losscli.evaluation.tasks import Execution, Task
from losscli.weight_space.slices import Line, Path, PathKind, path_coefficients
from losscli.weight_space.vectors import Weights, unflatten, working_type

__all__ = ["FORWARD_PASSES", "PathTraining", "TrainedBends"]

FORWARD_PASSES = 3
"""A step costs about as much as this number of forward passes of its minibatch."""

# A loss with a gradient of 0 in this many steps, such as an error rate, cannot be trained.
_TRIED = 10

# The most records of the state, which is three times as large as the bends.
_MOST_RECORDS = 50


@dataclass(frozen=True)
class TrainedBends:
    """The bends after training.

    Attributes:
        bends: The tensors of each bend that move, in the types of A and B.
        losses: The loss of the minibatch of each step, ``[S]``.
    """

    bends: Sequence[Weights]
    losses: NDArray[np.float64]


@dataclass(frozen=True)
class PathTraining:
    """A path that is to be trained.

    Attributes:
        objective: The model, the loss and the data.
        a: All tensors of A.
        b: All tensors of B; those that do not move are A's.
        names: The parameters that are trained.
        buffers: The buffers that move along; a bend has them on the straight line.
        kind: The kind of the path.
        bends: The number of bends.
        examples: The training examples with the name of their split.
        steps: The number of steps.
        learning_rate: The learning rate of Adam.
        minibatch: The number of examples in a minibatch.
        seed: Of t and of the order of the examples.
    """

    objective: Objective
    a: Weights
    b: Weights
    names: Sequence[str]
    buffers: Sequence[str]
    kind: PathKind
    bends: int
    examples: tuple[str, Examples]
    steps: int
    learning_rate: float
    minibatch: int
    seed: int

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type of the bends while they are trained: float32 or wider."""
        wide = torch.float64 if self.objective.dtype == torch.float64 else torch.float32
        ends = (end[name] for end in (self.a, self.b) for name in self.names)
        return torch.promote_types(wide, working_type(*ends))

    @property
    def _steps_per_record(self) -> int:
        rows = self.examples[1].rows * self.minibatch // len(self.examples[1])
        work = FORWARD_PASSES * self.objective.operations * max(1, rows)
        return max(1, math.ceil(self.steps / _MOST_RECORDS), minute_of_work(self.objective) // work)

    def draws(self) -> Iterator[tuple[float, Tensor]]:
        """Draws the random numbers of the steps, the same for the same seed.

        Yields:
            t, and the indices of the examples. Each pass takes the examples in a new order, without
            those that are left over at its end.
        """
        generator = torch.Generator().manual_seed(self.seed)
        split, size = self.examples[1], self.minibatch
        while True:
            order = split.order(generator)
            for start in range(0, len(order) - size + 1, size):
                t = float(torch.rand((), generator=generator, dtype=torch.float64))
                yield t, order[start : start + size]

    def run(self, execution: Execution) -> TrainedBends:
        """Trains, and records the state from time to time: bends, optimiser and step.

        Args:
            execution: How it is executed: on one rank, for which the others wait. Progress counts
                steps.

        Returns:
            The trained bends.

        Raises:
            LossError: A loss is not finite.
            OutOfMemoryError: A minibatch does not fit.
        """
        objective, size = self.objective, self._steps_per_record
        starts = list(range(0, self.steps, size))
        with objective.frozen_statistics():
            objective.load(self.a)
            key = execution.key(self._key)
            recorded = [i for i in starts if execution.recall(key, i) is not None]
            first = execution.decide(max(recorded, default=0))
            state: Arrays = {}
            for start in starts[starts.index(first) :]:
                stop = min(start + size, self.steps)
                task = Task(stop - start, partial(self._train, start, stop, state), key, start)
                (state,) = execution.after(start).run([task])
            objective.batch_size = int(state["batch size"])
        bends = torch.from_numpy(state["bends"])
        return TrainedBends([self._named(k, bend) for k, bend in enumerate(bends)], state["losses"])

    def _key(self) -> str:
        name, split = self.examples
        moving = [*self.names, *self.buffers]
        ends = [{n: end[n] for n in moving} for end in (self.a, self.b)]
        numbers = [self.kind, self.bends, self.steps, self.learning_rate, self.minibatch, self.seed]
        return record_key(self.objective, {name: split}, "path training", ends, numbers)

    def _train(self, start: int, stop: int, state: Arrays, execution: Execution) -> Arrays:
        """Trains from step to step in a state, which is empty at the start; returns the new one."""
        objective = self.objective
        ends = [self._flat(end) for end in (self.a, self.b)]
        bends = self._first_bends(ends) if not state else torch.from_numpy(state["bends"].copy())
        bends = bends.to(objective.device)
        optimiser = torch.optim.Adam([bends], lr=self.learning_rate)
        losses = [] if not state else state["losses"].tolist()
        if state:
            own = {n: torch.from_numpy(state[n].copy()) for n in ("exp_avg", "exp_avg_sq")}
            moments = {name: tensor.to(objective.device) for name, tensor in own.items()}
            optimiser.state[bends] = {"step": torch.tensor(float(start)), **moments}
            objective.batch_size = int(state["batch size"])
        for step, (t, index) in enumerate(itertools.islice(self.draws(), start, stop), start):
            point = self._combine(ends, bends, t)
            loss, gradient = self._differentiate(point, t, index, execution)
            if not (math.isfinite(loss) and bool(gradient.isfinite().all())):
                raise LossError(
                    f"the loss of step {step + 1:,} of the training of the path, or its gradient, "
                    "is not finite",
                    f"Lower --learning-rate, which is {self.learning_rate:g}",
                )
            self._move(optimiser, bends, gradient, t)
            tried = step + 1
            if tried == min(_TRIED, self.steps) and not optimiser.state[bends]["exp_avg"].any():
                raise LossError(
                    f"the gradient of the loss is 0 in the first {tried} steps of the training of "
                    "the path",
                    "Give a --loss that can be differentiated",
                )
            losses.append(loss)
            execution.report(step + 1 - start)
        moments = optimiser.state[bends]
        arrays = {"bends": bends, **{n: moments[n] for n in ("exp_avg", "exp_avg_sq")}}
        return {
            **{name: tensor.detach().cpu().numpy() for name, tensor in arrays.items()},
            "losses": np.array(losses, np.float64),
            "batch size": np.array(objective.batch_size),
        }

    def _combine(self, ends: Sequence[Tensor], bends: Tensor, t: float) -> Tensor:
        """Returns the point at t, ``[n]``."""
        return Path(self.kind, ()).combine([ends[0], *bends, ends[1]], (t,))

    def _move(
        self, optimiser: torch.optim.Optimizer, bends: Tensor, gradient: Tensor, t: float
    ) -> None:
        """Moves the bends ``[K, n]`` by the gradient ``[n]`` at t."""
        coefficients = path_coefficients(self.kind, len(bends) + 2, t)[1:-1]
        gradient = gradient.to(bends)
        bends.grad = torch.stack([w * gradient for w in coefficients])
        optimiser.step()

    @property
    def nbytes(self) -> int:
        """The bytes of the vectors of a step.

        These are both ends, a point, its gradient in float64 and in the type of the bends, and for
        each bend itself, its gradient and both moments of Adam.
        """
        values = sum(self.a[name].numel() for name in self.names)
        each = (4 + 4 * self.bends) * self.dtype.itemsize + torch.float64.itemsize
        return values * each

    def seconds_per_bend(self, clock: Clock) -> float:
        """Times what a step takes for one bend in addition to the forward and backward pass."""
        ends = [self._flat(end) for end in (self.a, self.b)]
        bends = replace(self, bends=1)._first_bends(ends)
        optimiser = torch.optim.Adam([bends], lr=self.learning_rate)

        def step() -> None:
            self._move(optimiser, bends, self._combine(ends, bends, 0.5), 0.5)

        step()  # a warm-up, which allocates the moments
        return timed(self.objective, step, clock)

    def _differentiate(
        self, point: Tensor, t: float, index: Tensor, execution: Execution
    ) -> tuple[float, Tensor]:
        """Computes the mean loss of a minibatch at a point ``[n]``, and the gradient."""
        objective = self.objective
        minibatch = self.examples[1].take(index)
        weights = {**unflatten(point, self.a, self.names), **self._buffers_at(t)}
        layers = objective.batchnorm
        batch_size = objective.batch_size
        if layers:
            # A part of a minibatch has other statistics.
            objective.batch_size = max(batch_size, len(minibatch))
        with (
            recording(layers) if layers else nullcontext(),
            Curvature(
                objective, weights, self.names, minibatch, lambda _: execution.poll()
            ) as curvature,
        ):
            found = curvature.loss, curvature.gradient()
        if not layers:
            return found
        if objective.batch_size < len(minibatch):
            raise OutOfMemoryError(
                f"a minibatch of {len(minibatch)} examples does not fit into the memory of "
                f"{objective.device}, and BatchNorm needs all of it at once",
                "Give a smaller --minibatch",
            )
        objective.batch_size = batch_size
        return found

    def _buffers_at(self, t: float) -> dict[str, Tensor]:
        """Returns the buffers that move along, on the line."""
        line = Line({}, {})
        types = {name: working_type(self.a[name], self.b[name]) for name in self.buffers}
        return {
            name: line.combine([end[name].to(wide) for end in (self.a, self.b)], (t,))
            for name, wide in types.items()
        }

    def _first_bends(self, ends: Sequence[Tensor]) -> Tensor:
        """Returns the bends before training, evenly spaced on the line, ``[K, n]``."""
        line = Line({}, {})
        places = [(k + 1) / (self.bends + 1) for k in range(self.bends)]
        return torch.stack([line.combine(ends, (place,)) for place in places])

    def _flat(self, weights: Weights) -> Tensor:
        """Returns the trained parameters of a point as a vector ``[n]`` on the device."""
        parts: list[Any] = [weights[name].reshape(-1).to(self.dtype) for name in self.names]
        return torch.cat(parts).to(self.objective.device)

    def _named(self, k: int, bend: Tensor) -> dict[str, Tensor]:
        """Returns the tensors of a bend, with the buffers on the line."""
        buffers = self._buffers_at((k + 1) / (self.bends + 1))
        found = {**unflatten(bend, self.a, self.names), **buffers}
        return {
            name: tensor.to(torch.promote_types(self.a[name].dtype, self.b[name].dtype))
            for name, tensor in found.items()
        }
