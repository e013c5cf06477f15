"""Replicas of a model that share its memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from losscli.evaluation.loading import named_tensors
from losscli.evaluation.recalibration import BatchNormLayer, batchnorm_layers
from losscli.evaluation.strategies import Network

__all__ = ["Replica", "is_stateless", "make_replicas"]


@dataclass(frozen=True)
class Replica:
    """A model with tensors that can be bound to values of their own."""

    model: nn.Module
    tensors: Mapping[str, Tensor]
    layers: Sequence[BatchNormLayer]


def make_replicas(network: Network, number: int) -> list[Replica]:
    """Makes replicas of a model that share its memory.

    Args:
        network: The model.
        number: How many.

    Returns:
        The replicas; the model itself is the first.
    """
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


def is_stateless(model: nn.Module) -> bool:
    """Whether a model is known to keep no state but its tensors.

    Args:
        model: The model.

    Returns:
        Whether its replicas may run concurrently, and a forward pass may be interrupted.
    """
    # A user's code may keep state: a closure that copying does not reach, a table filled by a hook.
    return all(
        type(module).__module__.startswith(("torch.nn.", "losscli.models"))
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in module.__dict__
        for module in model.modules()
    )
