"""Copies of the state of models and optimisers in training, under the names of the plain model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from losscli.checkpoint import StateDict, state_dicts

__all__ = ["copy_optimizer_state", "copy_state", "is_sharded", "unwrap"]

# The component that torch.compile adds to names, also to those of a part of a model.
_COMPILED = "_orig_mod"


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the module inside DataParallel, DistributedDataParallel and torch.compile."""
    parallel = nn.DataParallel, nn.parallel.DistributedDataParallel
    while True:
        if isinstance(model, parallel):
            model = model.module
        elif isinstance(inner := model._modules.get(_COMPILED), nn.Module):
            model = inner
        else:
            return model


def is_sharded(model: nn.Module) -> bool:
    """Returns whether each rank has only a part of a model (FSDP or tensor parallelism).

    Its state dict has to be gathered from all ranks.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    return any(isinstance(part, FullyShardedDataParallel) for part in model.modules()) or any(
        isinstance(parameter, DTensor) for parameter in model.parameters()
    )


def copy_state(model: nn.Module) -> StateDict:
    """Returns a copy of the state dict of a model on the CPU.

    It has the versions and the extra state of modules. The model is without DataParallel,
    DistributedDataParallel and torch.compile around it. If it is sharded, all ranks must call this
    function at the same time, and ranks other than rank 0 receive no tensors.
    """
    if sharded := is_sharded(model):
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        state = _gather(get_model_state_dict, model)
    else:
        state = model.state_dict()
    found = dict(state_dicts(state)).get("", StateDict({}))
    content = dict(found), dict(found.extra)
    tensors, extra = content if sharded else _copy_all(content)
    return StateDict(*(_with_plain_names(part) for part in (tensors, found.versions, extra)))


def copy_optimizer_state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Returns a copy of the state dict of an optimiser of a model on the CPU.

    Each group of parameters has their names as ``param_names``. If the model is sharded, only
    rank 0 is sure to receive the state.
    """
    if is_sharded(model):
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        return _number_parameters(_gather(get_optimizer_state_dict, model, optimizer))
    names = {id(parameter): _plain_name(name) for name, parameter in model.named_parameters()}
    state = optimizer.state_dict()
    for stored, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
        stored["param_names"] = [names.get(id(parameter), "") for parameter in group["params"]]
    copied: dict[str, Any] = _copy_all(state)
    return copied


def _gather(function: Callable[..., Any], model: nn.Module, *others: Any) -> Any:
    """Gathers a state dict on the CPU of rank 0, or of all ranks if the model is on the CPU."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    # FSDP1 fails to offload to the CPU what is there already.
    offload = any(parameter.device.type != "cpu" for parameter in model.parameters())
    options = StateDictOptions(full_state_dict=True, cpu_offload=offload)
    state = function(model, *others, options=options)
    return state if offload else _copy_all(state)


def _number_parameters(state: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces names of parameters by numbers, as in the state dict of an optimiser."""
    groups = state.get("param_groups", [])
    numbers = {name: k for k, name in enumerate(name for g in groups for name in g["params"])}
    return {
        "state": {numbers[name]: values for name, values in state.get("state", {}).items()},
        "param_groups": [
            {
                **group,
                "params": [numbers[name] for name in group["params"]],
                "param_names": group["params"],
            }
            for group in groups
        ],
    }


def _with_plain_names(values: Mapping[str, Any]) -> dict[str, Any]:
    return {_plain_name(name): value for name, value in values.items()}


def _plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def _copy(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _copy_all(value: Any) -> Any:
    return tree_map(_copy, value)
