"""The model that a spec names, built and checked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils._pytree import tree_leaves

from losscli.checkpoint import CheckpointFile, LoadHooks
from losscli.data import RandomnessDetector, host_memory
from losscli.errors import LosscliError, ModelError, one_line
from losscli.evaluation.flops import Trace, addresses
from losscli.evaluation.objective import Objective
from losscli.models import FROM_FILES, MODELS, RUNS_CODE
from losscli.spec import Spec, call, look_up
from losscli.studies.specs import SourcedSpec

__all__ = ["build", "check_copy"]

_BUILD = "Give a function that builds it"


def build(found: SourcedSpec, shapes: CheckpointFile | None = None) -> nn.Module:
    """Builds a model.

    Args:
        found: The spec, a function that builds it, or a module, of which a copy is made.
        shapes: The checkpoint that says what shapes the tensors of lazy layers have, if any.

    Returns:
        The model.

    Raises:
        LosscliError: It cannot be built, or has tensors that no study can move.
    """
    where = f"model {found.text!r}"
    try:
        if isinstance(found.value, nn.Module):
            model = _copy(found.value)
        elif callable(found.value):
            model = found.value()
        else:
            spec = Spec.parse(found.value)
            function, arguments = look_up(
                spec,
                MODELS,
                "model",
                trusted=found.trusted,
                source=found.source,
                folder=found.folder,
                cure=found.cure,
                runs_code=RUNS_CODE,
            )
            if function in map(MODELS.get, FROM_FILES):
                arguments = tuple(str(Path(found.folder or "", path)) for path in arguments)
            elif not found.trusted:
                _require_memory(partial(call, function, arguments, spec.options, where), where)
            model = call(function, arguments, spec.options, where)
    except LosscliError:
        raise
    except Exception as error:
        raise ModelError(f"{where} cannot be built: {one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{where} gives a {type(model).__name__}", "Name a function that returns an nn.Module"
        )
    if shapes is not None:
        _materialise(model, shapes)
    _check_tensors(model, where)
    return model


def _copy(module: nn.Module) -> nn.Module:
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        # Its parameters would become plain tensors.
        raise ModelError("the model cannot be copied: it is TorchScript", _BUILD)
    # Buffers without values, those of lazy layers, are the only ones that cannot be copied.
    empty = {
        id(buffer): nn.parameter.UninitializedBuffer(  # type: ignore[call-arg]
            device=buffer.device, dtype=buffer.dtype
        )
        for buffer in module.buffers()
        if nn.parameter.is_lazy(buffer)
    }
    try:
        return copy.deepcopy(module, empty)
    except Exception as error:
        raise ModelError(f"the model cannot be copied: {one_line(error)}", _BUILD) from error


def _materialise(model: nn.Module, shapes: CheckpointFile) -> None:
    """Gives the tensors of lazy layers the shapes that they have in a checkpoint."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    lazy = {name: t for name, t in tensors.items() if nn.parameter.is_lazy(t)}
    if not lazy:
        return
    naming = LoadHooks(model)
    own = {name for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    for weights in shapes.model_candidates.values():
        for view in naming.views(weights):
            # A part of a state dict might fit by chance, so only the whole is used.
            if view.keys() == own and len(view) == len(weights):
                for name, tensor in lazy.items():
                    tensor.materialize(view[name].shape)
                _finish(model)
                return


def _finish(model: nn.Module) -> None:
    """Converts lazy layers to plain ones, as their first call does."""
    for module in model.modules():
        if isinstance(module, LazyModuleMixin) and module.cls_to_become is not None:
            # What a linear layer takes its number of inputs from.
            weight = module.weight
            like = weight[:0] if isinstance(weight, Tensor) else torch.empty(0)
            module._infer_parameters(module, (like,))


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
    filled = (b for b in original.buffers() if not nn.parameter.is_lazy(b))
    buffers = [(buffer, buffer.clone()) for buffer in filled]
    try:
        trace = Trace()
        with torch.no_grad(), RandomnessDetector(objective.device):
            objective.count_operations(trace)
    finally:
        with torch.no_grad():
            for buffer, own in buffers:
                if not torch.equal(buffer, own):
                    buffer.copy_(own)
    shared = theirs.keys() & (trace.read | addresses(objective.tensors.values()).keys())
    if shared:
        names = {id(tensor): name for name, tensor in original.state_dict(keep_vars=True).items()}
        tensors = sorted(names.get(id(theirs[place]), "") for place in shared)
        such = f", such as {tensors[-1]}" if tensors[-1] else ""
        raise ModelError(
            f"a copy of the model computes with tensors of the original{such}: it holds code that "
            "is bound to the original (a closure, a patched forward)",
            "Give a function that builds the model",
        )


def _require_memory(build: Callable[[], nn.Module], where: str) -> None:
    """Refuses a model named by a file that is larger than the memory, before it is built."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        size = sum(tensor.nbytes for tensor in build().state_dict().values())
    if size > host_memory():
        raise ModelError(
            f"{where} needs {size / 2**30:,.0f} GiB, more than the memory has",
            "Give the model that was trained with --model",
        )


def _check_tensors(model: nn.Module, where: str) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if nn.parameter.is_lazy(tensor) or tensor.is_meta:
            raise ModelError(
                f"{where}: {name} has no values yet",
                "Call the lazy layers once where the model is built, and build it on the CPU",
            )
