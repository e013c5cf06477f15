"""A model as a graph of core ATen operators, made by ``torch.export``, and how it is run."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram, default_decompositions, export
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_unflatten

from losscli.errors import ModelError
from losscli.weight_space.vectors import Weights

__all__ = ["TracedModel", "silence", "trace"]

# The name of the model in the module that is traced.
_PREFIX = "model."


@dataclass(frozen=True)
class TracedModel:
    """The graph of a model for inputs of fixed shapes.

    Attributes:
        program: The graph, in core ATen operators. Its tensors are named as in `name_of`.
        names: The first alias of each name of a floating-point tensor in the state dict.
    """

    program: ExportedProgram
    names: Mapping[str, str]

    def name_of(self, target: str | None) -> str:
        """Returns the name in the model of a tensor of the program."""
        return (target or "").removeprefix(_PREFIX)

    @cached_property
    def data_dependent(self) -> frozenset[Node]:
        """The nodes with values that depend on the inputs of the model."""
        inputs = {
            spec.arg.name
            for spec in self.program.graph_signature.input_specs
            if spec.kind is InputKind.USER_INPUT
        }
        found: set[Node] = set()
        for node in self.program.graph.nodes:
            if node.name in inputs or not found.isdisjoint(node.all_input_nodes):
                found.add(node)
        return frozenset(found)

    @cached_property
    def _last_uses(self) -> dict[Node, list[Node]]:
        """For each node the values that are not needed after it."""
        order = {node: i for i, node in enumerate(self.program.graph.nodes)}
        uses: dict[Node, list[Node]] = {}
        for node in order:
            last = max((*node.users, node), key=order.__getitem__)
            uses.setdefault(last, []).append(node)
        return uses

    @torch.no_grad()
    def run(
        self,
        weights: Weights,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        visit: Callable[[Node, Any], Any] | None = None,
    ) -> Any:
        """Returns what the model returns, or its ``logits``.

        Args:
            weights: The tensors of the model by the names of its state dict, in the type and on the
                device that it was traced with.
            args: Positional inputs of the shapes that it was traced with.
            kwargs: Keyword inputs in the order that it was traced with.
            visit: Called with each operator and its value; returns the value to continue with.
        """
        signature = self.program.graph_signature
        specs = {spec.arg.name: spec for spec in signature.input_specs}
        inputs = iter(tree_leaves((tuple(args), dict(kwargs))))
        env: dict[Node, Any] = {}
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                spec = specs[node.name]
                env[node] = (
                    next(inputs)
                    if spec.kind is InputKind.USER_INPUT
                    else self._stored(spec.target, weights)
                )
            elif node.op == "call_function":
                given, named = map_arg((node.args, node.kwargs), env.__getitem__)
                # A tensor may have other strides than that of the trace.
                is_view = node.target is torch.ops.aten.view.default
                value = (torch.reshape if is_view else node.target)(*given, **named)
                env[node] = value if visit is None else visit(node, value)
            elif node.op == "output":
                values = map_arg(node.args[0], env.__getitem__)
                break
            else:
                env[node] = getattr(self.program.graph_module, node.target)
            for unused in self._last_uses.get(node, ()):
                del env[unused]
        returned = [
            value
            for value, spec in zip(values, signature.output_specs, strict=True)
            if spec.kind is OutputKind.USER_OUTPUT
        ]
        return tree_unflatten(returned, self.program.call_spec.out_spec)

    def _stored(self, target: str | None, weights: Weights) -> Any:
        """Returns a parameter, a buffer or a constant."""
        name = self.name_of(target)
        # Buffers that are not saved are constants of the program.
        return weights[name] if name in weights else self.program.constants[target or ""]


def trace(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> TracedModel:
    """Returns the graph of a model for inputs of the shapes of a small batch.

    The model is in eval mode, and tracing may modify it.

    Raises:
        ModelError: The model cannot be traced.
    """
    program = _export(_Scores(model), tuple(args), dict(kwargs or {}))
    for node in program.graph.nodes:
        _check_shapes(node)
    return TracedModel(program, _names(model))


class _Scores(nn.Module):
    """A model that returns its scores only, for Hugging Face models with structured outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self.model(*args, **kwargs)
        return getattr(outputs, "logits", outputs)


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    # Fused attention kernels would hide their operators from the trace.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), silence():
            program = export(model.eval(), args, kwargs, strict=False)
            table = _decompositions(tuple(torch.ops))
            lowered: ExportedProgram = program.run_decompositions(dict(table))
            return lowered
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        raise ModelError(
            f"the model cannot be traced by torch.export: {what}",
            "Its forward must run the same operations for all inputs (torch.where instead of if), "
            "or give a --model with the same tensors that does",
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


# It takes a fifth of the time of tracing a small model. Libraries that are imported later may bring
# operators of their own.
@lru_cache(maxsize=1)
def _decompositions(_namespaces: tuple[str, ...]) -> Mapping[Any, Callable[..., Any]]:
    """Returns the decompositions of operators into core ATen operators."""
    table = default_decompositions()
    # Attention is not decomposed: its parts may not match the strides of its output.
    attention = torch.ops.aten.scaled_dot_product_attention.default
    table.pop(attention, None)  # type: ignore[no-untyped-call]
    return table.materialize()


@contextmanager
def silence() -> Iterator[None]:
    """Suppresses warnings and messages of torch.export, which logs the errors that it raises."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _check_shapes(node: Node) -> None:
    value = node.meta.get("val")
    for tensor in value if isinstance(value, list | tuple) else [value]:
        if isinstance(tensor, Tensor) and not all(isinstance(size, int) for size in tensor.shape):
            raise ModelError(
                f"the model cannot be traced: a shape in it depends on values ({node.name})",
                "Its forward must give tensors of the same shapes for all inputs",
            )


def _names(model: nn.Module) -> dict[str, str]:
    """Maps each name of a floating-point tensor in the state dict to its first alias."""
    saved = model.state_dict().keys()
    first: dict[int, str] = {}
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {
        name: first.setdefault(id(tensor), name)
        for name, tensor in named
        if name in saved and tensor.is_floating_point()
    }
