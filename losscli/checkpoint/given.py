"""Checkpoints that Python code gives as objects: state dicts and modules."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

from torch import Tensor, nn

from losscli.arguments import as_list, describe
from losscli.checkpoint.names import loadable, metadata_of, state_dicts
from losscli.checkpoint.quantised import packed
from losscli.checkpoint.state import Checkpoint, CheckpointFile
from losscli.errors import CheckpointError, UsageError
from losscli.files import is_mapped
from losscli.weight_space.digest import digest

__all__ = ["CheckpointLike", "Given", "named", "named_all"]

CheckpointLike = str | os.PathLike[str] | Mapping[str, Any] | nn.Module | Checkpoint
"""What Python code may give for a checkpoint: a name, a state dict, or a module."""

_ONE = (str, bytes, os.PathLike, Mapping, nn.Module, Checkpoint)

_CURE = "Give the name of a file, a state dict or an nn.Module"


class Given(str):
    """The name of a checkpoint that is an object, with its content.

    Attributes:
        file: The content, as if a file held it.
        module: The module, if it is one.
    """

    __slots__ = ("file", "module")
    file: CheckpointFile
    module: nn.Module | None

    @classmethod
    def of(cls, label: str, value: Mapping[Any, Any] | nn.Module | Checkpoint) -> Self:
        """Names an object. Its tensors are shared with it, or copied where that is not safe.

        Args:
            label: The name.
            value: The object.

        Returns:
            The name.

        Raises:
            CheckpointError: A tensor has no values, or none that can be computed with.
        """
        content: Any = value
        metadata: Mapping[str, str] = {}
        if isinstance(value, nn.Module):
            _require_values(value, label)
            content = value.state_dict()
        elif isinstance(value, Checkpoint):
            metadata = value.metadata
            content = loadable(value.weights, value.versions, value.extra)
        else:
            metadata = metadata_of(value)
        candidates = dict(state_dicts(content))
        file = CheckpointFile(label, None, candidates, metadata, (), quantised=packed(content))
        whole = {}
        for key, weights in file.choice.items():
            file.require_dense(key, weights)
            for name, tensor in weights.items():
                candidates[key][name] = own = _own(tensor)
                whole[f"{key}.{name}"] = own.dequantize() if own.is_quantized else own
        given = cls(label)
        given.module = value if isinstance(value, nn.Module) else None
        given.file = replace(file, digest=digest(whole), live=given.module is not None)
        return given


def _require_values(module: nn.Module, label: str) -> None:
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise CheckpointError(
                f"{label}: {name} has no values yet", "Call the module once on an example"
            )


def _own(tensor: Tensor) -> Tensor:
    # Pages that are mapped from a file are given back once they were looked at, and what somebody
    # wrote on them would be lost.
    return tensor.clone() if is_mapped(tensor) else tensor.cpu()


def named(value: object, label: str) -> str:
    """Names a checkpoint.

    Args:
        value: Its name, a path, a state dict, a module, or a `Checkpoint`.
        label: The name of an object.

    Returns:
        The name; that of an object is a `Given`.

    Raises:
        UsageError: The value is nothing of this, or an empty name.
        CheckpointError: A tensor of a module has no values yet.
    """
    if isinstance(value, Given):
        return value
    if isinstance(value, Mapping | nn.Module | Checkpoint):
        return Given.of(label, value)
    if not isinstance(value, _ONE):
        raise UsageError(f"{label} is {describe(value)}, which is no checkpoint", _CURE)
    name = os.fsdecode(value)  # type: ignore[arg-type]
    if not name:
        raise UsageError("the name of a checkpoint is empty", "Is a shell variable unset?")
    return name


def named_all(values: object) -> list[str]:
    """Names one checkpoint, or each of several.

    Args:
        values: What `named` takes, or an iterable of it. Objects are named by their places,
            counted from 0.

    Returns:
        The names.

    Raises:
        UsageError: A value is no checkpoint, or two objects share their tensors.
        CheckpointError: A tensor of a module has no values yet.
    """
    each = [values] if isinstance(values, _ONE) else as_list(values)
    if each is None:
        raise UsageError(f"{describe(values)} is no checkpoint and no list of them", _CURE)
    names = [named(value, f"checkpoint {i}") for i, value in enumerate(each)]
    places: dict[object, str] = {}
    for name in names:
        if isinstance(name, Given):
            tensors = [t for weights in name.file.choice.values() for t in weights.values()]
            place = tuple(t.data_ptr() for t in tensors if t.numel())
            first = places.setdefault(place, name)
            if place and first is not name:
                raise UsageError(
                    f"{first} and {name} are the same tensors",
                    "state_dict() does not copy: keep copy.deepcopy(model.state_dict())",
                )
    return names
