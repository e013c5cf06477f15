"""Permutations of hidden units that do not change a network's function, from its graph.

``torch.export`` traces the network into core ATen operators. Every axis of every tensor in the
graph has a label that says what may be permuted on it (`losscli.weight_space.axes`). Every operator
ties the axes that must be permuted together so that it commutes with the permutation: an addition
ties its operands, a matrix product ties the axes that it sums over. Inputs and outputs of the
network are pinned, and so are the operands of operators that are not known here.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.fx import Node

from losscli.weight_space.axes import Axis, concatenate, cut, multiply, pin, regroup, tie, units
from losscli.weight_space.tracing import TracedModel
from losscli.weight_space.vectors import Weights

__all__ = [
    "Group",
    "HiddenUnits",
    "Member",
    "UnitAxis",
    "hidden_units",
    "obstacles",
    "operator_name",
    "permute",
]


@dataclass(frozen=True)
class Member:
    """The positions of the units of a group on one axis of one tensor.

    Attributes:
        name: Name of the tensor.
        axis: Index of the axis.
        positions: Positions of each unit on the axis, ``[units, block]``. The block size is 1 for
            the weight of a linear layer, and height × width for flattened channels.
    """

    name: str
    axis: int
    positions: Tensor


@dataclass(frozen=True)
class Group:
    """Units that may be permuted, in all tensors that contain them at once.

    Attributes:
        size: The number of units.
        members: The positions of the units; a tied tensor is listed under all of its names.
    """

    size: int
    members: tuple[Member, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors that contain the units."""
        return tuple(dict.fromkeys(member.name for member in self.members))


@dataclass(frozen=True)
class HiddenUnits:
    """The hidden units of a traced model.

    Attributes:
        groups: The groups, in the order of the model's tensors. A permutation of a group in all its
            members at once does not change the output of the model, or its ``logits``.
        labels: The axes of the value of each node of the graph.
        leaves: The leaf that stands for the units of each group.
    """

    groups: tuple[Group, ...]
    labels: Mapping[Node, Any]
    leaves: Mapping[Axis, int]

    def on(self, node: Node) -> list[UnitAxis]:
        """Returns the places of units on each axis of a node's value, if that is one tensor."""
        axes = self.labels.get(node)
        return [
            UnitAxis(self.leaves[leaf], i, positions)
            for i, axis in enumerate(axes if isinstance(axes, list) else ())
            for leaf, positions in units(axis)
            if leaf in self.leaves
        ]


@dataclass(frozen=True)
class UnitAxis:
    """The positions of the units of a group on one axis of a tensor of the graph.

    Attributes:
        group: The number of the group.
        axis: Index of the axis.
        positions: Positions of each unit on the axis, ``[units, block]``.
    """

    group: int
    axis: int
    positions: Tensor


def hidden_units(traced: TracedModel) -> HiddenUnits:
    """Finds the hidden units of a model that may be permuted."""
    return _label(traced, Labels())


def obstacles(traced: TracedModel) -> tuple[str, ...]:
    """Lists the reasons why a model has no groups of units that may be permuted.

    Returns:
        Operators that may depend on the order of units, and constants that prevent permutations.
    """
    labels, free = Labels(), Labels(constants_free=True)
    _label(traced, labels)
    groups = _label(traced, free).groups
    return (*labels.order_sensitive, *(free.constants if groups else ()))


class Labels(dict[Node, Any]):
    """The labels of the tensors of a graph: one `Axis` for each axis.

    Args:
        constants_free: Whether the axes of constants may be permuted.

    Attributes:
        order_sensitive: Operators that may depend on the order of units.
        constants: Names of the constants.
    """

    def __init__(self, *, constants_free: bool = False) -> None:
        super().__init__()
        self.constants_free = constants_free
        self.order_sensitive: dict[str, None] = {}
        self.constants: dict[str, None] = {}

    def pin(self, node: Node, axes: Iterable[Axis]) -> None:
        """Pins axes because an operator may depend on the order along them."""
        for axis in axes:
            if any(units(axis)):
                self.order_sensitive[operator_name(node)] = None
            pin(axis)

    def constant(self, node: Node, name: str) -> Any:
        """Labels a constant tensor."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.numel() < 2:
            return _pinned_like(node)
        self.constants[name] = None
        return _fresh(_shape(node)) if self.constants_free else _pinned_like(node)


def _label(traced: TracedModel, labels: Labels) -> HiddenUnits:
    axes: dict[str, list[Axis]] = {}
    kinds = {spec.arg.name: spec for spec in traced.program.graph_signature.input_specs}
    for node in traced.program.graph.nodes:
        if node.op == "placeholder":
            spec = kinds[node.name]
            first = traced.names.get(traced.name_of(spec.target))
            if spec.kind in {InputKind.PARAMETER, InputKind.BUFFER} and first and node.users:
                if first not in axes:
                    axes[first] = _fresh(_shape(node))
                labels[node] = axes[first]
            elif spec.kind in {InputKind.CONSTANT_TENSOR, InputKind.BUFFER}:
                name = traced.name_of(spec.target or node.name)
                labels[node] = labels.constant(node, f"the constant {name}")
            else:
                labels[node] = _pinned_like(node)
        elif node.op == "call_function":
            labels[node] = _apply(node, labels)
        elif node.op == "output":
            for axis in _input_axes(node, labels):
                pin(axis)
    members = _members(axes, traced.names)
    groups = tuple(Group(leaf.size, tuple(listed)) for leaf, listed in members.items())
    return HiddenUnits(groups, labels, {leaf: i for i, leaf in enumerate(members)})


def permute(
    weights: Weights, groups: Sequence[Group], permutations: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Permutes the units of groups.

    Args:
        weights: The tensors.
        groups: The groups.
        permutations: For each group the index of the unit at each new position, ``[units]``.

    Returns:
        The tensors; those that contain permuted units are new.
    """
    permuted = dict(weights)
    for group, permutation in zip(groups, permutations, strict=True):
        if torch.equal(permutation, torch.arange(group.size)):
            continue
        for member in group.members:
            if member.name not in permuted:
                continue
            tensor = permuted[member.name]
            order = torch.arange(tensor.shape[member.axis])
            order[member.positions] = member.positions[permutation]
            permuted[member.name] = tensor.index_select(member.axis, order.to(tensor.device))
    return permuted


def _members(axes: Mapping[str, list[Axis]], names: Mapping[str, str]) -> dict[Axis, list[Member]]:
    """Lists the members of each group by the leaf that stands for its units."""
    members: dict[Axis, list[Member]] = {}
    for name, first in names.items():
        for i, axis in enumerate(axes.get(first, ())):
            for leaf, positions in units(axis):
                members.setdefault(leaf, []).append(Member(name, i, positions))
    return members


# The rules of the operators. A rule takes a node of the graph and the labels of all tensors before
# it, and returns the labels of its output: a list of axes, or a tuple of lists for several outputs.

Rule = Callable[[Node, Labels], Any]


def _apply(node: Node, labels: Labels) -> Any:
    if node.target is operator.getitem:
        outputs, index = node.args
        axes = labels.get(outputs)  # type: ignore[arg-type]
        # If the outputs have no labels, all inputs were pinned.
        return axes[index] if isinstance(axes, tuple) else _pinned_like(node)  # type: ignore[index]
    if not all(isinstance(labels.get(source), list) for source in node.all_input_nodes):
        return _unknown(node, labels)
    name = operator_name(node)
    if match := _SPATIAL.fullmatch(name):
        return _spatial(node, labels, int(match[1]))
    tags = getattr(node.target, "tags", ())
    random = torch.Tag.nondeterministic_seeded in tags
    single = isinstance(node.meta.get("val"), Tensor)
    pointwise = torch.Tag.pointwise in tags and single and not random
    return _RULES.get(name, _pointwise if pointwise else _unknown)(node, labels)


def operator_name(node: Node) -> str:
    """Returns the name of the operator of a node, without its overload."""
    return str(getattr(node.target, "overloadpacket", node.target)).removeprefix("aten.")


def _fresh(shape: Sequence[int]) -> list[Axis]:
    return [Axis(int(size)) for size in shape]


def _pinned(shape: Sequence[int]) -> list[Axis]:
    return [Axis(int(size), pinned=True) for size in shape]


def _pinned_like(node: Node) -> Any:
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return _pinned(value.shape)
    if isinstance(value, list | tuple):
        return tuple(_pinned(v.shape) if isinstance(v, Tensor) else None for v in value)
    return None


def _input_axes(node: Node, labels: Labels) -> Iterator[Axis]:
    for source in node.all_input_nodes:
        outputs = labels.get(source)
        for axes in outputs if isinstance(outputs, tuple) else (outputs,):
            yield from axes or ()


def _unknown(node: Node, labels: Labels) -> Any:
    if not node.all_input_nodes:
        return labels.constant(node, operator_name(node))
    labels.pin(node, _input_axes(node, labels))
    return _pinned_like(node)


def _assertion(node: Node, labels: Labels) -> Any:
    """An assertion has no output."""


def _shape(node: Node) -> list[int]:
    return [int(size) for size in node.meta["val"].shape]


def _argument(node: Node, name: str) -> Any:
    """Returns an argument by its name in the operator's schema; None if there is none."""
    for i, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name == name:
            given = node.args[i] if i < len(node.args) else node.kwargs.get(name)
            return argument.default_value if given is None else given
    return None


def _axes(labels: Labels, node: Any) -> list[Axis]:
    axes: list[Axis] = labels[node]
    return axes


def _broadcast(shape: Sequence[int], operands: Sequence[list[Axis]]) -> list[Axis]:
    """Ties the axes that broadcasting aligns; a repeated axis may be permuted freely."""
    result = []
    for i in range(-len(shape), 0):
        size = shape[i]
        aligned = [o[i] for o in operands if len(o) >= -i and o[i].size == size]
        for other in aligned[1:]:
            tie(aligned[0], other)
        result.append(aligned[0] if aligned else Axis(size))
    return result


def _pointwise(node: Node, labels: Labels) -> Any:
    return _broadcast(_shape(node), [_axes(labels, source) for source in node.all_input_nodes])


def _constant(node: Node, labels: Labels) -> Any:  # noqa: ARG001 - every rule takes both
    return _fresh(_shape(node))


def _view(node: Node, labels: Labels) -> Any:
    """Ignores axes of size 1, and matches the others in the smallest groups of equal size."""
    old = [axis for axis in _axes(labels, node.args[0]) if axis.size != 1]
    shape = _shape(node)
    new = [size for size in shape if size != 1]
    if 0 in shape or math.prod(a.size for a in old) != math.prod(new):
        return _unknown(node, labels)  # an empty tensor, or a view with another dtype
    result: list[Axis] = []
    while old:
        axes, sizes = [old.pop(0)], [new.pop(0)]
        before, after = axes[0].size, sizes[0]
        while before != after:
            if before < after:
                axes.append(old.pop(0))
                before *= axes[-1].size
            else:
                sizes.append(new.pop(0))
                after *= sizes[-1]
        result += axes if len(axes) == len(sizes) == 1 else regroup(axes, sizes)
    return [Axis(1, pinned=True) if size == 1 else result.pop(0) for size in shape]


def _permute(node: Node, labels: Labels) -> Any:
    axes = _axes(labels, node.args[0])
    return [axes[i] for i in _argument(node, "dims")]


def _transpose(node: Node, labels: Labels) -> Any:
    axes = list(_axes(labels, node.args[0]))
    i, j = _argument(node, "dim0"), _argument(node, "dim1")
    if len(axes) > 1:
        axes[i], axes[j] = axes[j], axes[i]
    return axes


def _expand(node: Node, labels: Labels) -> Any:
    return _broadcast(_shape(node), [_axes(labels, node.args[0])])


def _repeat(node: Node, labels: Labels) -> Any:
    axes = _axes(labels, node.args[0])
    times = _argument(node, "repeats")
    axes = [Axis(1, pinned=True)] * (len(times) - len(axes)) + axes
    return [
        axis if n == 1 else multiply([Axis(n), axis]) for n, axis in zip(times, axes, strict=True)
    ]


def _slice(node: Node, labels: Labels) -> Any:
    axes = list(_axes(labels, node.args[0]))
    dim = _argument(node, "dim")
    size = axes[dim].size
    start, stop, step = slice(
        _argument(node, "start"), _argument(node, "end"), _argument(node, "step")
    ).indices(size)
    stop = max(start, stop)
    if step == 1:
        axes[dim] = cut(axes[dim], [start, stop - start, size - stop])[1]
    else:
        labels.pin(node, [axes[dim]])
        axes[dim] = Axis(_shape(node)[dim], pinned=True)
    return axes


def _select(node: Node, labels: Labels) -> Any:
    axes = list(_axes(labels, node.args[0]))
    labels.pin(node, [axes.pop(_argument(node, "dim"))])
    return axes


def _split(node: Node, labels: Labels) -> Any:
    axes = _axes(labels, node.args[0])
    dim = _argument(node, "dim")
    pieces = cut(axes[dim], [int(v.shape[dim]) for v in node.meta["val"]])
    outputs = []
    for piece in pieces:
        output = list(axes)
        output[dim] = piece
        outputs.append(output)
    return tuple(outputs)


def _index(node: Node, labels: Labels) -> Any:
    """Integer tensor indexing along adjacent axes."""
    axes = _axes(labels, node.args[0])
    indices = _argument(node, "indices")
    picked = [i for i, index in enumerate(indices) if index is not None]
    if picked != list(range(picked[0], picked[-1] + 1)) or any(
        not isinstance(indices[i], Node) or indices[i].meta["val"].dtype == torch.bool
        for i in picked
    ):
        return _unknown(node, labels)
    indexed = axes[picked[0] : picked[-1] + 1]
    labels.pin(node, [*indexed, *(a for i in picked for a in labels[indices[i]])])
    before, after = axes[: picked[0]], axes[picked[-1] + 1 :]
    shape = _shape(node)
    return [*before, *_pinned(shape[len(before) : len(shape) - len(after)]), *after]


def _cat(node: Node, labels: Labels) -> Any:
    operands = [_axes(labels, source) for source in node.args[0]]  # type: ignore[union-attr]
    shape = _shape(node)
    # torch.cat accepts an empty vector among tensors of any shape.
    operands = [o for o in operands if len(o) == len(shape)]
    dim = _argument(node, "dim") % len(shape)
    result = []
    for i in range(len(shape)):
        if i == dim:
            result.append(concatenate([o[i] for o in operands]))
        else:
            for other in operands[1:]:
                tie(operands[0][i], other[i])
            result.append(operands[0][i])
    return result


def _pad(node: Node, labels: Labels) -> Any:
    axes = list(_axes(labels, node.args[0]))
    pads = _argument(node, "pad")
    for k in range(len(pads) // 2):
        before, after = pads[2 * k], pads[2 * k + 1]
        if min(before, after) < 0:
            return _unknown(node, labels)
        if before or after:
            # The padding is one constant, so it may be permuted freely.
            axes[-1 - k] = concatenate([Axis(before), axes[-1 - k], Axis(after)])
    return axes


def _reduce(node: Node, labels: Labels) -> Any:
    """Sums, means, maxima: the order along reduced axes does not matter."""
    axes = _axes(labels, node.args[0])
    dims = _argument(node, "dim")
    return _without(axes, dims, keep=len(_shape(node)) == len(axes))


def _moments(node: Node, labels: Labels) -> Any:
    axes = _axes(labels, node.args[0])
    keep = node.meta["val"][0].ndim == len(axes)
    reduced = _without(axes, _argument(node, "dim"), keep=keep)
    return reduced, reduced


def _without(axes: list[Axis], dims: Any, *, keep: bool) -> list[Axis]:
    if not axes:
        return []
    dims = [dims] if isinstance(dims, int) else dims
    # Without dims, all axes are reduced.
    removed = {i % len(axes) for i in dims} if dims else set(range(len(axes)))
    return [
        Axis(1, pinned=True) if i in removed else axis
        for i, axis in enumerate(axes)
        if keep or i not in removed
    ]


def _ordered(node: Node, labels: Labels) -> Any:
    """Operators that depend on the order along some axes only."""
    axes = _axes(labels, node.args[0])
    dims = _argument(node, "dims" if node.target is torch.ops.aten.flip.default else "dim")
    if not axes or dims is None:
        return _unknown(node, labels)
    result = list(axes)
    for dim in [dims] if isinstance(dims, int) else dims:
        labels.pin(node, [axes[dim]])
        result[dim] = Axis(-1)
    return _with_output_sizes(node, result)


def _with_output_sizes(node: Node, axes: list[Axis]) -> Any:
    """Replaces axes of unknown size by those of the outputs, or drops them if they are reduced."""
    value = node.meta["val"]

    def fit(output: Tensor) -> list[Axis]:
        kept = axes if output.ndim == len(axes) else [a for a in axes if a.size >= 0]
        return [
            Axis(int(size), pinned=True) if axis.size < 0 else axis
            for axis, size in zip(kept, output.shape, strict=True)
        ]

    return fit(value) if isinstance(value, Tensor) else tuple(fit(v) for v in value)


def _same(node: Node, labels: Labels) -> Any:
    return _axes(labels, node.args[0])


def _matrices(node: Node, labels: Labels) -> Any:
    """A product of matrices, of a matrix and a vector, or of batches of matrices."""
    return _product(_axes(labels, node.args[0]), _axes(labels, node.args[1]))


def _add_matrices(node: Node, labels: Labels) -> Any:
    product = _product(_axes(labels, node.args[1]), _axes(labels, node.args[2]))
    return _broadcast(_shape(node), [product, _axes(labels, node.args[0])])


def _product(a: list[Axis], b: list[Axis]) -> list[Axis]:
    batch = len(a) - 2 if len(a) == len(b) > 2 else 0
    for x, y in zip(a[:batch], b[:batch], strict=True):
        tie(x, y)
    tie(a[-1], b[batch])
    return a[:-1] + b[batch + 1 :]


def _convolution(node: Node, labels: Labels) -> Any:
    x, weight = (_axes(labels, source) for source in node.args[:2])
    bias, transposed, groups = node.args[2], node.args[6], node.args[8]
    assert isinstance(groups, int)
    labels.pin(node, x[2:])
    for axis in weight[2:]:
        pin(axis)
    # The weight is [groups × out, in, …], or [groups × in, out, …] if transposed.
    group = Axis(groups)
    channels_per_group = Axis(weight[0].size // groups)
    tie(weight[0], multiply([group, channels_per_group]))
    inner, outer = (
        (channels_per_group, weight[1]) if transposed else (weight[1], channels_per_group)
    )
    tie(x[1], multiply([group, inner]))
    channels = multiply([group, outer])
    if bias is not None:
        tie(channels, _axes(labels, bias)[0])
    return [x[0], channels, *_pinned(_shape(node)[2:])]


def _embedding(node: Node, labels: Labels) -> Any:
    weight, indices = (_axes(labels, source) for source in node.args[:2])
    pin(weight[0])
    return [*indices, weight[1]]


def _batch_norm(node: Node, labels: Labels) -> Any:
    x = _axes(labels, node.args[0])
    # The number of weights and running statistics depends on the overload.
    for source in node.args[1:]:
        if isinstance(source, Node):
            tie(x[1], _axes(labels, source)[0])
    size = [x[1].size]
    outputs = node.meta["val"][1:]
    return x, *([x[1]] if list(v.shape) == size else _pinned(v.shape) for v in outputs)


def _layer_norm(node: Node, labels: Labels) -> Any:
    x = _axes(labels, node.args[0])
    count = len(node.args[1])  # type: ignore[arg-type]
    for source in node.args[2:4]:
        if isinstance(source, Node):
            for axis, other in zip(x[-count:], _axes(labels, source), strict=True):
                tie(axis, other)
    statistics = [*x[:-count], *_pinned([1] * count)]
    return x, statistics, statistics


def _group_norm(node: Node, labels: Labels) -> Any:
    x = _axes(labels, node.args[0])
    groups = node.args[6]
    assert isinstance(groups, int)
    group = Axis(groups)
    tie(x[1], multiply([group, Axis(x[1].size // groups)]))
    for source in node.args[1:3]:
        if isinstance(source, Node):
            tie(x[1], _axes(labels, source)[0])
    return x, [x[0], group], [x[0], group]


def _weight_norm(node: Node, labels: Labels) -> Any:
    v, g = (_axes(labels, source) for source in node.args[:2])
    return _broadcast([axis.size for axis in v], [v, g]), g


def _attention(node: Node, labels: Labels) -> Any:
    """softmax(q kᵀ + mask) v; several heads of q may share one head of k and v."""
    query, key, value = (list(_axes(labels, source)) for source in node.args[:3])
    pin(query[-2])  # the mask may be a causal one
    pin(key[-2])
    heads = query[-3] if len(query) > 3 else None
    if heads is not None and heads.size != key[-3].size:
        tie(heads, multiply([key[-3], Axis(heads.size // key[-3].size)]))
        tie(key[-3], value[-3])
        key[-3] = value[-3] = heads
    scores = _product(query, [*key[:-2], key[-1], key[-2]])
    for mask in [*node.args[3:], *node.kwargs.values()]:
        if isinstance(mask, Node):
            _broadcast([axis.size for axis in scores], [scores, _axes(labels, mask)])
    return _product(scores, value)


def _spatial(node: Node, labels: Labels, count: int) -> Any:
    """Pooling, resizing and padding over the last axes, separately for each channel."""
    x = _axes(labels, node.args[0])
    labels.pin(node, x[-count:])

    def axes_of(output: Tensor) -> list[Axis]:
        return [*x[:-count], *_pinned([int(size) for size in output.shape[-count:]])]

    value = node.meta["val"]
    return axes_of(value) if isinstance(value, Tensor) else tuple(map(axes_of, value))


_SPATIAL = re.compile(
    r"(?:_?(?:adaptive_)?(?:avg|max)_pool|_?upsample_[a-z_]+|(?:reflection|replication)_pad)"
    r"([123])d(?:_with_indices|_aa)?"
)


def _rules() -> dict[str, Rule]:
    by_rule: dict[Rule, str] = {
        _same: "alias clone contiguous detach lift_fresh_copy _to_copy _softmax _log_softmax",
        _pointwise: "hardswish hardsigmoid nan_to_num fill",
        _assertion: "_assert_async _assert_scalar _assert_tensor_metadata",
        _constant: "full full_like zeros zeros_like ones ones_like scalar_tensor",
        _view: "view _unsafe_view reshape squeeze unsqueeze",
        _permute: "permute",
        _transpose: "transpose",
        _expand: "expand",
        _repeat: "repeat",
        _slice: "slice",
        _select: "select",
        _split: "split split_with_sizes",
        _index: "index _unsafe_index",
        _cat: "cat",
        _pad: "constant_pad_nd",
        _reduce: "sum mean amax amin prod any all logsumexp var linalg_vector_norm norm",
        _moments: "var_mean",
        _ordered: "max min argmax argmin cumsum cumprod flip sort topk",
        _matrices: "mm bmm mv dot",
        _add_matrices: "addmm baddbmm",
        _convolution: "convolution",
        _embedding: "embedding",
        _batch_norm: "_native_batch_norm_legit_no_training _native_batch_norm_legit",
        _layer_norm: "native_layer_norm",
        _group_norm: "native_group_norm",
        _weight_norm: "_weight_norm_interface",
        _attention: "scaled_dot_product_attention",
    }
    return {name: rule for rule, names in by_rule.items() for name in names.split()}


_RULES = _rules()
