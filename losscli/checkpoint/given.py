"""Checkpoints that are passed as Python objects: state dicts and modules."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

from torch import nn

from losscli.checkpoint.adam import find_optimizers
from losscli.checkpoint.names import loadable, metadata_of, state_dicts
from losscli.checkpoint.quantised import find_packed_parameters
from losscli.checkpoint.state import Checkpoint, CheckpointFile
from losscli.errors import CheckpointError, UsageError
from losscli.settings import as_list, describe
from losscli.weight_space.digest import digest

__all__ = [
    "CheckpointLike",
    "InMemoryCheckpoint",
    "name_checkpoint",
    "name_checkpoints",
    "require_values",
]

CheckpointLike = str | os.PathLike[str] | Mapping[str, Any] | nn.Module | Checkpoint
"""A checkpoint in Python code: a name, a path, a state dict, a module or a `Checkpoint`."""

_SINGLE_TYPES = (str, bytes, os.PathLike, Mapping, nn.Module, Checkpoint)

_FIX = "Give the name of a file, a state dict or an nn.Module"


class InMemoryCheckpoint(str):
    """The name of a checkpoint that is a Python object, with its content.

    Attributes:
        file: The content, in the form of a file that was read.
        module: The module; None for other objects.
        optimizers: The state dicts of optimisers in it, by their keys.
    """

    __slots__ = ("file", "module", "optimizers")
    file: CheckpointFile
    module: nn.Module | None
    optimizers: Mapping[str, Any]

    @classmethod
    def from_object(cls, label: str, value: Mapping[Any, Any] | nn.Module | Checkpoint) -> Self:
        """Returns an object under a name; its tensors are shared.

        Raises:
            CheckpointError: A tensor has no values, or does not support arithmetic.
        """
        content: Any = value
        metadata: Mapping[str, str] = {}
        if isinstance(value, nn.Module):
            require_values(value, label)
            content = value.state_dict()
        elif isinstance(value, Checkpoint):
            metadata = value.metadata
            content = loadable(value.weights, value.versions, value.extra)
        else:
            metadata = metadata_of(value)
            # Each may be a module of one model.
            modules = {key: part for key, part in value.items() if isinstance(part, nn.Module)}
            for key, part in modules.items():
                require_values(part, f"{label}[{key!r}]")
            if modules:
                content = {**value, **{key: part.state_dict() for key, part in modules.items()}}
        candidates = dict(state_dicts(content))
        file = CheckpointFile(
            label, None, candidates, metadata, (), quantised=find_packed_parameters(content)
        )
        tensors = {}
        for key, weights in file.model_candidates.items():
            file.require_dense(key, weights)
            for name, tensor in weights.items():
                candidates[key][name] = stored = tensor.cpu()
                tensors[f"{key}.{name}"] = stored.dequantize() if stored.is_quantized else stored
        given = cls(label)
        given.module = value if isinstance(value, nn.Module) else None
        given.optimizers = dict(find_optimizers(content))
        given.file = replace(file, digest=digest(tensors), live=given.module is not None)
        return given


def require_values(module: nn.Module, label: str) -> None:
    """Checks that lazy layers have their tensors.

    Raises:
        CheckpointError: A parameter or buffer has no values yet.
    """
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise CheckpointError(
                f"{label}: {name} has no values yet", "Call the module once on an example"
            )


def is_checkpoint(value: object) -> bool:
    """Whether a value is one checkpoint, and not several."""
    return isinstance(value, _SINGLE_TYPES)


def name_checkpoint(value: object, label: str) -> str:
    """Returns the name of a checkpoint; for an object, an `InMemoryCheckpoint` named ``label``.

    Raises:
        UsageError: The value is not a checkpoint, or the name is empty.
        CheckpointError: A tensor of an object has no values, or does not support arithmetic.
    """
    if isinstance(value, InMemoryCheckpoint):
        return value
    if isinstance(value, Mapping | nn.Module | Checkpoint):
        return InMemoryCheckpoint.from_object(label, value)
    if not isinstance(value, _SINGLE_TYPES):
        raise UsageError(f"{label} is {describe(value)}, which is not a checkpoint", _FIX)
    name = os.fsdecode(value)  # type: ignore[arg-type]
    if not name:
        raise UsageError("the name of a checkpoint is empty", "Is a shell variable unset?")
    return name


def name_checkpoints(values: object, *, first: int = 0) -> list[str]:
    """Returns the names of one or several checkpoints.

    Args:
        values: A value that `name_checkpoint` accepts, or an iterable of such values. Objects are
            named by their index.
        first: The index of the first.

    Raises:
        UsageError: A value is not a checkpoint, or two objects share their tensors.
        CheckpointError: A tensor of an object has no values, or does not support arithmetic.
    """
    each = [values] if is_checkpoint(values) else as_list(values)
    if each is None:
        raise UsageError(
            f"{describe(values)} is neither a checkpoint nor a list of checkpoints", _FIX
        )
    names = [name_checkpoint(value, f"checkpoint {i}") for i, value in enumerate(each, first)]
    owners: dict[object, str] = {}
    for name in names:
        if isinstance(name, InMemoryCheckpoint):
            tensors = [
                t for weights in name.file.model_candidates.values() for t in weights.values()
            ]
            pointers = tuple(t.data_ptr() for t in tensors if t.numel())
            owner = owners.setdefault(pointers, name)
            if pointers and owner is not name:
                raise UsageError(
                    f"{owner} and {name} are the same tensors",
                    "state_dict() does not copy: keep copy.deepcopy(model.state_dict())",
                )
    return names
