"""Directions in weight space that are derivatives of the loss: gradients and eigenvectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from losscli.errors import ModelError
from losscli.evaluation.cost import Clock, timed
from losscli.evaluation.finite_differences import sample_size
from losscli.evaluation.hessian.critical_points import CriticalPointTest
from losscli.evaluation.hessian.curvature import DENSE_LIMIT, PRODUCT_LIMIT, Curvature
from losscli.evaluation.hessian.curvature_check import check_derivatives
from losscli.evaluation.hessian.gradient_graphs import graph_budget
from losscli.evaluation.hessian.lanczos import MIN_PRODUCTS
from losscli.evaluation.hessian.product_cost import product_seconds
from losscli.evaluation.objective import Objective, recalibrated
from losscli.evaluation.ranks import Arrays
from losscli.evaluation.records import idle_layers, record_key, restore
from losscli.evaluation.tasks import Execution, Task
from losscli.results.summaries import CostEstimate, Derivative, Description
from losscli.weight_space.vectors import Weights, unflatten

__all__ = ["Along", "DerivativeDirections"]

Along = Literal["gradient", "hessian"]


@dataclass(frozen=True)
class DerivativeDirections:
    """The gradient, or eigenvectors of the Hessian, of the mean loss of a split.

    All directions have length one. BatchNorm's statistics are constants: the differentiated loss
    is a function of the parameters only.

    Attributes:
        objective: The model, the loss and the data.
        names: The parameters that are differentiated, each tied parameter under one name.
        split: The name of the split.
        along: The gradient ∇L; or the Hessian, with the eigenvectors v1, v2 and vn of the largest,
            second largest and smallest eigenvalue.
        seed: Of random vectors.
    """

    objective: Objective
    names: Sequence[str]
    split: str
    along: Along
    seed: int

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The names of the directions."""
        if self.along == "gradient":
            return ("gradient",)
        # A Hessian of one or two parameters has no more eigenvectors.
        return {1: ("v1",), 2: ("v1", "vn")}.get(self.size, ("v1", "v2", "vn"))

    @property
    def size(self) -> int:
        """n, the number of weights that are differentiated."""
        return sum(self.objective.tensors[name].numel() for name in self.names)

    @property
    def products(self) -> tuple[int, int]:
        """How many products with the Hessian one point takes, at least and at most."""
        if self.along == "gradient":
            return 0, 0
        return (self.size,) * 2 if self.size <= DENSE_LIMIT else (MIN_PRODUCTS, PRODUCT_LIMIT)

    def extra_description(self, points: int) -> Description:
        """Returns the number of products with the Hessian, and the memory for them.

        Returns:
            Their number at most, and the most bytes of gradients that are kept with their graphs,
            if there are any.
        """
        if self.along == "gradient":
            return {}
        return {
            "products_at_most": self.products[1] * points,
            "bytes_of_graphs_at_most": graph_budget(self.objective.device),
        }

    def extra_cost(
        self, points: int, weights: Weights, clock: Clock, seconds: float
    ) -> CostEstimate:
        """Estimates the cost of gradients, or of products with the Hessian.

        Args:
            points: How many points are differentiated.
            weights: One of them: all tensors of the model.
            clock: The clock.
            seconds: The seconds of the evaluation of losses.

        Returns:
            ``seconds`` in total; for products also the most seconds, and those of one product.
        """
        took = self._measure(weights, clock)
        each = took * points
        if self.along == "gradient":
            return {"seconds": seconds + each}
        fewest, most = self.products
        return {
            "seconds": seconds + fewest * each,
            "kind": "at least",
            "seconds_at_most": seconds + most * each,
            "product": {"seconds": took},
        }

    def _measure(self, weights: Weights, clock: Clock) -> float:
        """Measures the seconds of a gradient or a product, for all examples of the split."""
        objective, split = self.objective, self.objective.splits[self.split]
        if self.along == "hessian":
            return product_seconds(objective, weights, self.names, [split], clock)
        batch = split.first(objective.batch_size).to(objective.device)
        with objective.frozen_statistics():

            def derive() -> None:
                with Curvature(objective, weights, self.names, batch) as curvature:
                    curvature.gradient()

            derive()  # the first call sets everything up
            return timed(objective, derive, clock) * len(split) / len(batch)

    def find_all(
        self, points: Sequence[Weights], checkpoints: Sequence[str], execution: Execution
    ) -> list[Arrays]:
        """Finds the directions of points.

        Args:
            points: All tensors of the model at each point; the first is loaded in the end.
            checkpoints: The names of the points, for errors.
            execution: How tasks are executed. They do not count as progress.

        Returns:
            A record of each point, for the other methods.

        Raises:
            LosscliError: The model or the loss has no derivatives or wrong ones; a gradient is
                zero.
        """
        objective = self.objective
        examples = {self.split: objective.splits[self.split]}
        point = lru_cache(maxsize=1)(points.__getitem__)

        def key(t: int) -> str:
            numbers = [list(self.names), self.along, self.seed]
            return record_key(objective, examples, "directions", [point(t)], numbers)

        def find(t: int, own: Execution) -> Arrays:
            return self._find(point(t), f"of the loss of {self.split} at {checkpoints[t]}", own)

        tasks = (
            Task(0, partial(find, t), execution.key(partial(key, t)), "")
            for t, _ in enumerate(checkpoints)
        )
        found = list(execution.run(tasks))
        for arrays in found:
            restore(objective, int(arrays["batch size"]), arrays["idle"].tolist())
        objective.load(point(0))
        return found

    def direction(self, arrays: Arrays, k: int, weights: Weights) -> Weights:
        """Reads the direction with index k from a record, in the shapes of the parameters."""
        return unflatten(torch.from_numpy(arrays["vectors"][k]), weights, self.names)

    def describe(self, arrays: Arrays) -> list[Derivative]:
        """Describes the directions in a record."""
        found: list[Derivative] = []
        for label, numbers in zip(self.labels, arrays["numbers"].tolist(), strict=True):
            if self.along == "gradient":
                found.append({"direction": label, "gradient_norm": numbers[0]})
            else:
                value, error, converged = numbers
                found.append({
                    "direction": label,
                    "eigenvalue": value,
                    "error": error,
                    "converged": bool(converged),
                })
        return found

    @staticmethod
    def gaps(arrays: Arrays) -> tuple[float, float]:
        """Reads from a record of the Hessian how isolated λ_max and λ_min are.

        Returns:
            The distance of each to the next eigenvalue; nan if no other eigenvalue was computed.
        """
        largest, smallest = arrays["gaps"].tolist()
        return largest, smallest

    @staticmethod
    def unverified(arrays: Arrays) -> str:
        """Reads from a record the note on unverified derivatives; empty if all were verified."""
        return arrays["unverified"].tobytes().decode()

    @cached_property
    def _test(self) -> CriticalPointTest:
        return CriticalPointTest(
            self.objective, self.names, tolerance=math.inf, eigenvalues=2, seed=self.seed
        )

    def _find(self, point: Weights, of: str, execution: Execution) -> Arrays:
        objective, every = self.objective, self.objective.splits[self.split]
        weights = recalibrated(objective, point)
        wide = torch.float64 if objective.dtype == torch.float64 else torch.float32
        numbers: list[list[float]]
        with objective.frozen_statistics():
            objective.load(weights)
            eigenvectors: dict[str, Tensor] = {}
            gaps = [math.nan, math.nan]
            if self.along == "gradient":
                gradient = self._test.gradient(weights, every, execution)
                size = float(gradient.norm())
                if not size:
                    raise ModelError(
                        f"the gradient {of} is 0, so it has no direction",
                        "Give --along hessian, or random directions",
                    )
                # The test of derivatives needs the memory.
                vectors, numbers = [gradient.div_(size).to("cpu", wide)], [[size]]
                del gradient
            else:
                _, extremes, _ = self._test.differentiate(weights, every, execution.quiet)
                pairs = dict(zip(("v1", "v2"), extremes.largest, strict=False))
                pairs["vn"] = extremes.smallest[0]
                found = [pairs[label] for label in self.labels]
                vectors = [pair.vector for pair in found]
                numbers = [[pair.value, pair.error, pair.converged] for pair in found]
                gaps = [
                    abs(ends[0].value - ends[1].value) if len(ends) > 1 else math.nan
                    for ends in (extremes.largest, extremes.smallest)
                ]
                eigenvectors = {"λ max": vectors[0], "λ min": vectors[-1]}
            sample = every.spread(sample_size(objective))[0].to(objective.device)
            unverified = check_derivatives(
                self._test.float64 or objective,
                weights,
                self.names,
                sample,
                eigenvectors,
                self.seed,
                twice=self.along == "hessian",
            )
            objective.load(weights)
        return {
            "vectors": torch.stack(vectors).to("cpu", wide).numpy(),
            "numbers": np.array(numbers, np.float64),
            "gaps": np.array(gaps),
            "unverified": np.frombuffer(unverified.encode(), np.uint8),
            "batch size": np.array(objective.batch_size),
            "idle": idle_layers(objective),
        }
