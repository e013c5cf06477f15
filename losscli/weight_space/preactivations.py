"""The preactivations of hidden units: the layers of a graph that make them, and their weights."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.fx import Node

from losscli.errors import ModelError
from losscli.weight_space.permutations import HiddenUnits, operator_name
from losscli.weight_space.tracing import TracedModel
from losscli.weight_space.vectors import Weights

__all__ = ["Layer", "find_layers", "scaled"]

# Products with weights, and the arguments that are the bias, the inputs and the weight.
_PRODUCTS: dict[str, tuple[int | None, int, int]] = {
    "addmm": (0, 1, 2),
    "mm": (None, 0, 1),
    "convolution": (2, 0, 1),
}

# Products that may have weights in a form that no layer of torch.nn has.
_OTHER_PRODUCTS = {"bmm", "baddbmm", "mv", "dot"}

_NORM = "_native_batch_norm_legit_no_training"

_REORDER = {"permute", "transpose", "t"}


@dataclass(frozen=True)
class Layer:
    """A layer with preactivations of hidden units as its output: W x + b for each unit.

    Attributes:
        node: The node with the preactivations as its value.
        axis: Their axis of the units.
        units: The number of units.
        weights: All names of the weight, which is that of BatchNorm if the layer is one.
        weight_axis: The axis of the units there.
        biases: All names of the bias, ``[units]``.
    """

    node: Node
    axis: int
    units: int
    weights: tuple[str, ...]
    weight_axis: int
    biases: tuple[str, ...]

    def values(self, tensor: Tensor) -> Tensor:
        """Arranges the value of the node by unit, ``[units, samples]``."""
        return tensor.movedim(self.axis, 0).flatten(1)


def scaled(
    layer: Layer, weights: Weights, scale: Tensor, shift: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Applies an affine map to the preactivations of each unit: z becomes ``scale`` z + ``shift``.

    Args:
        layer: The layer.
        weights: All tensors of the model.
        scale: The factors, ``[units]``, float64, on the CPU.
        shift: The shifts, ``[units]``, in the same way.
        dtype: The narrowest type of the results.

    Returns:
        The weight and the bias of the layer, under all of their names.
    """
    changed: dict[str, Tensor] = {}
    for names, axis, moved in ((layer.weights, layer.weight_axis, 0), (layer.biases, 0, shift)):
        old = weights[names[-1]]
        factors = scale.view([-1 if i == axis else 1 for i in range(old.ndim)])
        new = (old.to(scale) * factors + moved).to(old.device)
        changed |= dict.fromkeys(names, new.to(torch.promote_types(old.dtype, dtype)))
    return changed


def find_layers(traced: TracedModel, hidden: HiddenUnits) -> tuple[Layer, ...]:
    """Returns the layers with hidden units, in the order in which they run.

    They are linear layers, convolutions and BatchNorm. A layer followed by nothing but BatchNorm is
    left out, because the preactivations are then those of BatchNorm.

    Raises:
        ModelError: A layer has no weight and bias of its own.
    """
    weights = _Weights(traced)
    return tuple(layer for node in traced.program.graph.nodes for layer in weights.of(node, hidden))


class _Weights:
    """Finds the weights of the layers of a graph."""

    def __init__(self, traced: TracedModel) -> None:
        self._traced = traced
        self._stored: dict[Node, str] = {}
        kinds = {spec.arg.name: spec for spec in traced.program.graph_signature.input_specs}
        for node in traced.program.graph.nodes:
            spec = kinds.get(node.name) if node.op == "placeholder" else None
            if spec is not None and spec.kind in {InputKind.PARAMETER, InputKind.BUFFER}:
                name = traced.name_of(spec.target)
                if name in traced.names:
                    self._stored[node] = traced.names[name]

    def of(self, node: Node, hidden: HiddenUnits) -> Iterator[Layer]:
        """Yields the layer of a node, if it has hidden units."""
        if node.op != "call_function" or node not in self._traced.data_dependent:
            return
        name = operator_name(node)
        if name == _NORM:
            (output,) = (u for u in node.users if u.target is operator.getitem and u.args[1] == 0)
            if _has_units(output, 1, hidden):
                yield self._layer(output, 1, node.args[1], 0, node.args[2])
        elif name in _PRODUCTS or name in _OTHER_PRODUCTS:
            depends = self._traced.data_dependent
            # A product of two tensors that depend on the data is no layer.
            weighed = [n for n in node.all_input_nodes if n not in depends]
            if not weighed or _only_before_norm(node) or not hidden.on(node):
                return
            bias, inputs, weight = _PRODUCTS.get(name, (None, 0, 0))
            if node.args[inputs] not in depends or node.args[weight] in depends:
                raise _refusal(node, "multiplies by weights in a form that is not known")
            axis = 1 if name == "convolution" else node.meta["val"].ndim - 1
            if not _has_units(node, axis, hidden):
                return
            source, reordered = _source(node.args[weight])
            if name == "convolution":
                weight_axis = int(bool(node.args[6]))  # transposed
                if weight_axis and node.args[8] != 1:
                    raise _refusal(node, "is a transposed convolution with groups")
            else:
                weight_axis = 0 if reordered else 1
            given = None if bias is None else node.args[bias]
            yield self._layer(node, axis, source, weight_axis, given)

    def _layer(
        self, node: Node, axis: int, weight: object, weight_axis: int, bias: object
    ) -> Layer:
        if bias is None:
            raise _refusal(node, "has no bias")
        units = int(node.meta["val"].shape[axis])
        names = self._names(node, weight), self._names(node, bias)
        return Layer(node, axis, units, names[0], weight_axis, names[1])

    def _names(self, node: Node, tensor: object) -> tuple[str, ...]:
        """Returns all names of a weight that only one layer uses, and only once."""
        first = self._stored.get(tensor) if isinstance(tensor, Node) else None
        if first is None:
            raise _refusal(node, "computes its weight or bias from other tensors")
        uses = sum(len(_uses(n)) for n, name in self._stored.items() if name == first)
        if uses > 1:
            raise _refusal(node, f"shares {first} with another layer, or runs more than once")
        return tuple(name for name, own in self._traced.names.items() if own == first)


def _has_units(node: Node, axis: int, hidden: HiddenUnits) -> bool:
    return any(place.axis == axis for place in hidden.on(node))


def _only_before_norm(node: Node) -> bool:
    return bool(node.users) and all(
        operator_name(user) == _NORM and user.args[0] is node for user in node.users
    )


def _source(weight: object) -> tuple[object, bool]:
    """Returns the tensor that a weight is, and whether it is transposed."""
    if isinstance(weight, Node) and operator_name(weight) in _REORDER:
        return weight.args[0], True
    return weight, False


def _uses(node: Node) -> Sequence[Node]:
    """Lists the uses of a tensor, each of its transposed copies for itself."""
    found: list[Node] = []
    for user in node.users:
        found += user.users if operator_name(user) in _REORDER else [user]
    return found


def _refusal(node: Node, why: str) -> ModelError:
    stack = node.meta.get("nn_module_stack") or {}
    path = [str(entry[0]) for entry in stack.values()][-1:] or [node.name]
    layer = path[0].removeprefix("L['self'].").removeprefix("model.")
    return ModelError(
        f"--repair corrects a layer by its weight and bias, and the layer {layer} {why}",
        "Leave --repair out",
    )
