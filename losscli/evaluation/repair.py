"""REPAIR: gives preactivations on a line the interpolated statistics of its ends.

After Jordan et al. 2022, arXiv 2211.08403. At α each hidden unit's preactivation gets, over
training examples, the mean (1 − α) μ_A + α μ_B and the standard deviation (1 − α) σ_A + α σ_B, by
an affine map that is folded into the weight and the bias of its layer. Layer by layer from the
input: the statistics of a layer are measured after the layers before it were corrected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from losscli.data import Examples, map_nest
from losscli.errors import CheckpointError, ModelError
from losscli.evaluation.activations import Traces, UnitMoments, tensors_at
from losscli.evaluation.memory import halving
from losscli.evaluation.objective import Objective, recalibrated
from losscli.weight_space.permutations import HiddenUnits
from losscli.weight_space.preactivations import Layer, find_layers, scaled
from losscli.weight_space.tracing import TracedModel
from losscli.weight_space.vectors import Weights

__all__ = ["Preactivations", "Repair"]


@dataclass(frozen=True)
class Preactivations:
    """The statistics of the preactivations of a layer over training examples.

    Attributes:
        means: The means, ``[units]``.
        deviations: The standard deviations, ``[units]``.
        constant: Which of them are 0 but for rounding, ``[units]``.
    """

    means: Tensor
    deviations: Tensor
    constant: Tensor


class _LastLayerReached(Exception):  # noqa: N818 - no error
    """Ends a forward pass after the last layer that is measured."""


class Repair:
    """Measures and corrects the preactivations of a model.

    Args:
        objective: The objective; its weights are overwritten.
        traces: The graphs of the model, in ``dtype`` on the objective's device.
        dtype: The type of the forward passes.
        examples: The training examples.

    Attributes:
        layers: The layers with hidden units, from the input on.

    Raises:
        ModelError: The model has no hidden units, or a layer of them that cannot be corrected.
    """

    def __init__(
        self, objective: Objective, traces: Traces, dtype: torch.dtype, examples: Examples
    ) -> None:
        self._objective = objective
        self._traces = traces
        self._dtype = dtype
        self._examples = examples
        first = objective.data.prepare(
            examples.first(objective.batch_size).to(objective.device).inputs, dtype
        )
        self._found: dict[int, Sequence[Layer]] = {}
        self.layers = self._layers(*traces.of(first))
        if not self.layers:
            raise ModelError(
                "--repair corrects the preactivations of hidden units, but none were found in the "
                "model",
                "Leave --repair out",
            )

    @property
    def units(self) -> int:
        """The number of units in all layers."""
        return sum(layer.units for layer in self.layers)

    def measure(self, weights: Weights) -> list[Preactivations]:
        """Measures all layers at a point, in one pass over the examples.

        Returns:
            The statistics of each layer.

        Raises:
            CheckpointError: A preactivation is infinite or not a number.
        """
        return self._measure(weights, range(len(self.layers)))

    def correct(
        self,
        weights: Weights,
        alpha: float,
        a: Sequence[Preactivations],
        b: Sequence[Preactivations],
    ) -> tuple[Weights, int]:
        """Corrects a point, a layer at a time.

        Args:
            weights: All tensors of the point.
            alpha: Where it is on the line.
            a: The statistics at α = 0.
            b: The statistics at α = 1.

        Returns:
            All tensors of the corrected point, and the number of units without variance at it,
            which are skipped.

        Raises:
            CheckpointError: A preactivation is infinite or not a number.
        """
        skipped = 0
        for k, (layer, start, end) in enumerate(zip(self.layers, a, b, strict=True)):
            (own,) = self._measure(weights, range(k, k + 1))
            mean = (1 - alpha) * start.means + alpha * end.means
            deviation = (1 - alpha) * start.deviations + alpha * end.deviations
            scale = torch.where(own.constant, 1.0, deviation / own.deviations)
            shift = torch.where(own.constant, 0.0, mean - scale * own.means)
            weights = {**weights, **scaled(layer, weights, scale, shift, self._dtype)}
            skipped += int(own.constant.sum())
        return weights, skipped

    def _measure(self, weights: Weights, chosen: range) -> list[Preactivations]:
        """Measures some layers."""
        return halving(self._objective, lambda: self._measure_once(weights, chosen))

    @torch.no_grad()
    def _measure_once(self, weights: Weights, chosen: range) -> list[Preactivations]:
        objective = self._objective
        # BatchNorm has the statistics of the corrected point.
        tensors = tensors_at(objective, recalibrated(objective, weights), self._dtype)
        moments = [UnitMoments(objective.sum_type) for _ in chosen]
        for batch in objective.batches(self._examples):
            inputs = objective.data.prepare(batch.inputs, self._dtype)
            traced, hidden = self._traces.of(inputs)
            layers = self._layers(traced, hidden)
            if [layer.weights for layer in layers] != [layer.weights for layer in self.layers]:
                raise ModelError(
                    f"traced with {len(batch)} examples, the model has other hidden units than "
                    "with more",
                    "Leave --repair out",
                )
            args, kwargs = objective.arguments(map_nest(Tensor.clone, inputs))
            values = _run(traced, [layers[k] for k in chosen], tensors, args, kwargs)
            for own, value in zip(moments, values, strict=True):
                own.add(value)
        if not all(own.is_finite() for own in moments):
            raise CheckpointError(
                "--repair: a hidden unit has values that are infinite or not a number",
                "Leave --repair out",
            )
        return [
            Preactivations(own.means.cpu().double(), deviations.cpu().double(), constant.cpu())
            for own, (deviations, constant) in ((own, own.deviations()) for own in moments)
        ]

    def _layers(self, traced: TracedModel, hidden: HiddenUnits) -> Sequence[Layer]:
        """Finds the layers of a graph, once."""
        # Graphs are kept, so that no other graph gets the same id.
        if id(traced) not in self._found:
            self._found[id(traced)] = find_layers(traced, hidden)
        return self._found[id(traced)]


def _run(
    traced: TracedModel,
    layers: Sequence[Layer],
    weights: Weights,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> list[Tensor]:
    """Runs a graph up to the last of some layers, and returns their preactivations."""
    found: list[Tensor] = []

    def keep(node: Node, value: Any) -> Any:
        if node is layers[len(found)].node:
            found.append(layers[len(found)].values(value))
            if len(found) == len(layers):
                raise _LastLayerReached
        return value

    with suppress(_LastLayerReached):
        traced.run(weights, args, kwargs, keep)
    return found
