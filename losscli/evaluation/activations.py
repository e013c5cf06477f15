"""The correlations of the hidden units of two networks over examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from losscli.data import Examples, Nest, map_nest
from losscli.errors import CheckpointError, ModelError
from losscli.evaluation.objective import Objective
from losscli.weight_space.activations import Activation, find_activations
from losscli.weight_space.permutations import HiddenUnits, hidden_units
from losscli.weight_space.tracing import TracedModel, trace
from losscli.weight_space.vectors import Weights

__all__ = ["Correlations", "Traces", "UnitMoments", "correlate", "tensors_at"]

# A standard deviation of a unit below this number of units of rounding of its largest value is 0.
_ROUNDING = 16


@dataclass(frozen=True)
class Correlations:
    """The correlations of the units of one group of A with those of B.

    Attributes:
        values: Means over the tensors with the units, ``[units, units]``; rows are units of A.
        dead_a: Which units of A have no variance in any tensor, ``[units]``.
        dead_b: The same for B.
    """

    values: Tensor
    dead_a: Tensor
    dead_b: Tensor


class Traces:
    """The graphs of a model, one for each shape of its inputs.

    Args:
        objective: The objective, which says how inputs are passed to the model.
        model: The model, in eval mode and in the type that it is run in. Tracing may modify it.
    """

    def __init__(self, objective: Objective, model: nn.Module) -> None:
        self._objective = objective
        self._model = model
        self._traces: dict[tuple[str, ...], tuple[TracedModel, HiddenUnits]] = {}

    def of(self, inputs: Nest) -> tuple[TracedModel, HiddenUnits]:
        """Returns the graph for inputs of the shapes of a prepared batch, and its hidden units.

        Args:
            inputs: The inputs of the batch.

        Returns:
            Both.

        Raises:
            ModelError: The model cannot be traced.
        """
        args, kwargs = self._objective.arguments(map_nest(Tensor.clone, inputs))
        key = tuple(
            f"{leaf.dtype} {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)
            for leaf in tree_leaves((args, kwargs))
        )
        if key not in self._traces:
            with torch.random.fork_rng(devices=[]):
                traced = trace(self._model, args, kwargs)
            self._traces[key] = traced, hidden_units(traced)
        return self._traces[key]


@torch.no_grad()
def correlate(
    objective: Objective, traces: Traces, a: Weights, b: Weights, examples: Examples
) -> list[Correlations]:
    """Correlates the activations of the hidden units of two networks.

    The activations are those that the next layer takes, after the nonlinearity. If several layers
    take them, as from the stream of a residual network, correlations are means over these. Forward
    passes are in float32. The correlation of x and y is Σ (x − x̄)(y − ȳ) over the square root of
    Σ (x − x̄)² Σ (y − ȳ)², in float64, over all examples and all pixels or tokens of each.

    Args:
        objective: The objective; its weights are overwritten.
        traces: The graphs of the model, in float32 on the objective's device.
        a: All tensors of A.
        b: All tensors of B.
        examples: The examples.

    Returns:
        The correlations for each group, in the order of the groups.

    Raises:
        CheckpointError: An activation is infinite or not a number.
        ModelError: The model has other hidden units for another number of examples.
    """
    points = [tensors_at(objective, weights, torch.float32) for weights in (a, b)]
    moments: list[_Moments] = []
    sizes: list[int] = []
    for batch in objective.batches(examples):
        inputs = objective.data.prepare(batch.inputs, torch.float32)
        traced, hidden = traces.of(inputs)
        activations = find_activations(traced, hidden)
        groups = [activation.place.group for activation in activations]
        if not moments:
            sizes = [group.size for group in hidden.groups]
            moments = [_Moments(group, objective.sum_type) for group in groups]
        if groups != [own.group for own in moments]:
            raise ModelError(
                f"traced with {len(batch)} examples, the model has other hidden units than with "
                "more",
                "Give --by weights",
            )
        x, y = (
            _run(traced, activations, weights, *objective.arguments(map_nest(Tensor.clone, inputs)))
            for weights in points
        )
        for own, one, other in zip(moments, x, y, strict=True):
            own.add(one, other)
    if not all(own.is_finite() for own in moments):
        raise CheckpointError(
            "a hidden unit has values that are infinite or not a number", "Give --by weights"
        )
    return [
        _joined([own.correlations() for own in moments if own.group == group], size)
        for group, size in enumerate(sizes)
    ]


def tensors_at(objective: Objective, weights: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
    """Loads weights, and returns copies of all tensors of the model in another type."""
    with objective.as_stored():
        objective.load(weights)
    return {
        name: tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
        for name, tensor in objective.tensors.items()
    }


def _run(
    traced: TracedModel,
    activations: Sequence[Activation],
    weights: Weights,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> list[Tensor]:
    """Runs a graph and returns the activations."""
    found: dict[int, Tensor] = {}

    def keep(node: Node, value: Any) -> Any:
        for i, activation in enumerate(activations):
            if activation.node is node:
                found[i] = activation.values(value)
        return value

    traced.run(weights, args, kwargs, keep)
    return [found[i] for i, _ in enumerate(activations)]


class UnitMoments:
    """The means and variances of units over samples.

    The first sample of each unit is subtracted from all, so that a unit with one value has exactly
    no variance, and sums of squares lose few digits.

    Args:
        dtype: The type of the sums.

    Attributes:
        number: The number of samples.
        sums: The sums of the differences from the first sample, ``[units]``.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self.number = 0

    def add(self, values: Tensor) -> Tensor:
        """Adds samples.

        Args:
            values: The samples, ``[units, samples]``.

        Returns:
            Their differences from the first sample of each unit, in the type of the sums.
        """
        wide = values.to(self._dtype)
        if not self.number:
            self._first = wide[:, :1].clone()
            self._peaks = torch.zeros_like(wide[:, 0])
            self.sums = torch.zeros_like(wide[:, 0])
            self._squares = torch.zeros_like(wide[:, 0])
            self._eps = torch.finfo(values.dtype).eps
        self.number += values.shape[1]
        self._peaks = torch.maximum(self._peaks, wide.abs().amax(1))
        shifted = wide - self._first
        self.sums += shifted.sum(1)
        self._squares += shifted.square().sum(1)
        return shifted

    def is_finite(self) -> bool:
        """Whether all values so far were finite."""
        return bool(self._squares.isfinite().all())

    @property
    def means(self) -> Tensor:
        """The means, ``[units]``."""
        return self._first[:, 0] + self.sums / self.number

    def deviations(self) -> tuple[Tensor, Tensor]:
        """Returns the standard deviations, ``[units]``, and which are 0 but for rounding."""
        variances = (self._squares - self.sums.square() / self.number).clamp(min=0) / self.number
        none = variances <= (_ROUNDING * self._eps * self._peaks).square()
        return variances.sqrt(), none


class _Moments:
    """Sums over examples of the activations x of A and y of B in one tensor of a group."""

    def __init__(self, group: int, dtype: torch.dtype) -> None:
        self.group = group
        self._x, self._y = UnitMoments(dtype), UnitMoments(dtype)
        self._products: Tensor | None = None

    def add(self, x: Tensor, y: Tensor) -> None:
        """Adds samples, ``[units, samples]``."""
        products = self._x.add(x) @ self._y.add(y).T
        self._products = products if self._products is None else self._products + products

    def is_finite(self) -> bool:
        """Whether all values so far were finite."""
        return self._x.is_finite() and self._y.is_finite()

    def correlations(self) -> Correlations:
        """Returns the correlations; 0 for a unit with no variance."""
        assert self._products is not None  # there is an example
        n = self._x.number
        (deviations_x, dead_x), (deviations_y, dead_y) = (
            own.deviations() for own in (self._x, self._y)
        )
        covariances = (self._products - torch.outer(self._x.sums, self._y.sums) / n) / n
        values = covariances / torch.outer(
            deviations_x.masked_fill(dead_x, torch.inf), deviations_y.masked_fill(dead_y, torch.inf)
        )
        return Correlations(values.cpu().double(), dead_x.cpu(), dead_y.cpu())


def _joined(found: Sequence[Correlations], size: int) -> Correlations:
    """Averages the correlations of one group over the tensors that have its units."""
    if not found:
        # Units inside of products of weights: no value of theirs depends on the data.
        dead = torch.ones(size, dtype=torch.bool)
        return Correlations(torch.zeros(size, size, dtype=torch.float64), dead, dead)
    return Correlations(
        torch.stack([each.values for each in found]).mean(0),
        torch.stack([each.dead_a for each in found]).all(0),
        torch.stack([each.dead_b for each in found]).all(0),
    )
