"""Replicas of a model that share its memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from losscli.data import Nest
from losscli.evaluation.loading import named_tensors
from losscli.evaluation.recalibration import BatchNormLayer, batchnorm_layers
from losscli.evaluation.strategies.base import Network

__all__ = ["Replica", "forward_with", "is_stateless", "make_replicas"]


@dataclass(frozen=True)
class Replica:
    """A model with tensors that can be bound to separate values."""

    model: nn.Module
    tensors: Mapping[str, Tensor]
    layers: Sequence[BatchNormLayer]


def make_replicas(network: Network, number: int) -> list[Replica]:
    """Makes replicas of a model that share its memory; the model itself is the first."""
    replicas = [Replica(network.model, network.tensors, network.statistics)]
    for _ in range(number - 1):
        shared: dict[int, Any] = {
            id(p): nn.Parameter(p.detach(), p.requires_grad) for p in network.model.parameters()
        }
        twin = copy.deepcopy(network.model, shared)
        tensors = named_tensors(twin)
        layers = batchnorm_layers(twin, tensors) if network.statistics else ()
        replicas.append(Replica(twin, tensors, layers))
    return replicas


class _Forward(nn.Module):
    """The forward pass of a network as a module, so that its tensors can be replaced."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.model = network.model
        self._network = network

    def forward(self, inputs: Nest) -> Any:
        return self._network.forward(self.model, inputs)


def forward_with(network: Network, tensors: Mapping[str, Tensor], inputs: Nest) -> Any:
    """Runs a network with other tensors by name, see `torch.func.functional_call`."""
    forward = _Forward(network)
    given = {id(network.tensors[name]): tensor for name, tensor in tensors.items()}
    # One name for each module, also if it has several: functional_call would not restore it.
    named = {
        f"{prefix}.{key}": given[id(own)]
        for prefix, module in forward.named_modules()
        for key, own in (module._parameters | module._buffers).items()
        if id(own) in given
    }
    return functional_call(forward, named, (inputs,), tie_weights=False)


def is_stateless(network: Network) -> bool:
    """Whether a forward pass is known to keep no state but the tensors of the model."""
    # User code may keep state: in a closure that is not copied, or in a table filled by a hook.
    return network.function is None and all(
        type(module).__module__.startswith(("torch.nn.", "losscli.models"))
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in module.__dict__
        for module in network.model.modules()
    )
