"""The activations of hidden units: where the graph of a model has them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.fx import Node

from losscli.weight_space.permutations import HiddenUnits, UnitAxis, operator_name
from losscli.weight_space.tracing import TracedModel

__all__ = ["Activation", "find_activations"]

# The operators that sum over units, and for each the argument and its axis that is summed over. An
# operator on vectors or matrices has the axis -2 of its second operand, or else its only one.
_SUMS = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot"), ((0, -1), (1, -2))),
    **dict.fromkeys(("addmm", "baddbmm"), ((1, -1), (2, -2))),
    "convolution": ((0, 1),),
    "scaled_dot_product_attention": ((0, -1), (1, -1)),
}


@dataclass(frozen=True)
class Activation:
    """The activations of the units of a group in one tensor of the graph.

    Attributes:
        node: The node with the tensor as its value.
        place: The units on an axis of it.
        averaged: The other axes with units that may be permuted. Means over these do not depend on
            the order of the units there.
        mixed: Whether the positions of a unit on its own axis are those of units of another group.
    """

    node: Node
    place: UnitAxis
    averaged: tuple[int, ...]
    mixed: bool

    def values(self, tensor: Tensor) -> Tensor:
        """Arranges the value of the node by unit.

        Returns:
            ``[units, samples]``. The samples are the examples, times all positions, such as pixels
            or tokens, at which a unit has a value.
        """
        if self.averaged:
            tensor = tensor.mean(self.averaged, keepdim=True)
        rows = tensor.movedim(self.place.axis, 0)[self.place.positions.to(tensor.device)]
        rows = rows.flatten(2) if rows.ndim > 2 else rows.unsqueeze(2)
        return rows.mean(1) if self.mixed else rows.flatten(1)


def find_activations(traced: TracedModel, hidden: HiddenUnits) -> tuple[Activation, ...]:
    """Finds what the next layers take from each hidden unit: its values after the nonlinearity.

    Returns:
        For each group of units the tensors that a product with weights sums over; if there are
        none, the last tensor with the units. Each tensor once.
    """
    summed: dict[tuple[Node, int], None] = {}
    last: dict[int, Activation] = {}
    for node in traced.program.graph.nodes:
        summed |= dict.fromkeys(_summed(node, traced))
        if node in traced.data_dependent:
            last |= {found.place.group: found for found in _activations(node, hidden)}
    activations = [
        found
        for operand, axis in summed
        for found in _activations(operand, hidden)
        if found.place.axis == axis
    ]
    groups = {found.place.group for found in activations}
    return (*activations, *(found for group, found in last.items() if group not in groups))


def _summed(node: Node, traced: TracedModel) -> Iterator[tuple[Node, int]]:
    """Yields the operands of a product that depend on the data, and the axis summed over."""
    for argument, axis in _SUMS.get(operator_name(node), ()):
        operand = node.args[argument]
        if isinstance(operand, Node) and operand in traced.data_dependent:
            number = operand.meta["val"].ndim
            yield operand, max(axis + number, 0) if axis < 0 else axis


def _activations(node: Node, hidden: HiddenUnits) -> Iterator[Activation]:
    places = hidden.on(node)
    for place in places:
        averaged = {other.axis for other in places} - {place.axis}
        own = set(place.positions.flatten().tolist())
        mixed = any(
            not own.isdisjoint(other.positions.flatten().tolist())
            for other in places
            if other.axis == place.axis and other is not place
        )
        yield Activation(node, place, tuple(sorted(averaged)), mixed)
