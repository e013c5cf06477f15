"""The model that a spec names, built and checked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from losscli.datasets import host_memory
from losscli.errors import LosscliError, ModelError, one_line
from losscli.models import FROM_FILES, MODELS, RUNS_CODE
from losscli.objective import Objective
from losscli.operations import addresses
from losscli.problem.source import Found
from losscli.spec import Spec, call, look_up

__all__ = ["build", "check_copy"]


def build(found: Found) -> nn.Module:
    """Builds a model.

    Args:
        found: The spec, a function that builds it, or a module, of which a copy is made.

    Returns:
        The model.

    Raises:
        LosscliError: It cannot be built, or has tensors that no study can move.
    """
    if isinstance(found.value, nn.Module):
        try:
            return copy.deepcopy(found.value)
        except Exception as error:
            raise ModelError(
                f"the model cannot be copied: {one_line(error)}",
                "Give a function that builds it",
            ) from error
    where = f"model {found.text!r}"
    try:
        if callable(found.value):
            model = found.value()
        else:
            spec = Spec.parse(found.value)
            function, arguments = look_up(
                spec, MODELS, "model", trusted=found.trusted, runs_code=RUNS_CODE
            )
            if function in map(MODELS.get, FROM_FILES):
                arguments = tuple(str(Path(found.folder or "", path)) for path in arguments)
            elif not found.trusted:
                _need_memory(partial(call, function, arguments, spec.options, where), where)
            model = call(function, arguments, spec.options, where)
    except LosscliError:
        raise
    except Exception as error:
        raise ModelError(f"{where} cannot be built: {one_line(error)}") from error
    if isinstance(model, nn.Module):
        _check_tensors(model, where)
    else:
        raise ModelError(
            f"{where} gives a {type(model).__name__}", "Name a function that returns an nn.Module"
        )
    return model


def check_copy(original: nn.Module, objective: Objective) -> None:
    """Makes sure that a copy of a module does not read the original's tensors.

    Copying does not reach into functions: a lambda or a patched ``forward`` that the module holds
    still computes with the weights of the original.

    Args:
        original: The module. Its buffers are left as they were.
        objective: Of the copy.

    Raises:
        ModelError: The copy reads the original's tensors, or shares memory with it.
    """
    theirs = addresses(leaf for module in original.modules() for leaf in tree_leaves(vars(module)))
    buffers = [(buffer, buffer.clone()) for buffer in original.buffers()]
    try:
        read = objective.trace().read
    finally:
        with torch.no_grad():
            for buffer, own in buffers:
                if not torch.equal(buffer, own):
                    buffer.copy_(own)
    shared = theirs.keys() & (read | addresses(objective.tensors.values()).keys())
    if shared:
        names = {id(tensor): name for name, tensor in original.state_dict(keep_vars=True).items()}
        tensors = sorted(names.get(id(theirs[place]), "") for place in shared)
        such = f", such as {tensors[-1]}" if tensors[-1] else ""
        raise ModelError(
            f"a copy of the model computes with tensors of the original{such}: it holds code that "
            "is bound to the original (a closure, a patched forward)",
            "Give a function that builds the model",
        )


def _need_memory(build: Callable[[], nn.Module], where: str) -> None:
    """Refuses a model that a file names and that no memory here holds, before any is taken."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        size = sum(tensor.nbytes for tensor in build().state_dict().values())
    if size > host_memory():
        raise ModelError(
            f"{where} is of {size / 2**30:,.0f} GiB, more than there is memory",
            "Give the one that was trained with --model",
        )


def _check_tensors(model: nn.Module, where: str) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if nn.parameter.is_lazy(tensor) or tensor.is_meta:
            raise ModelError(
                f"{where}: {name} has no values yet",
                "Give a function that runs lazy layers once, and builds on the CPU",
            )
        if tensor.is_complex():
            raise ModelError(
                f"{where}: {name} is complex, which no line of losscli moves yet",
                "Store it as two real tensors (torch.view_as_real)",
            )
