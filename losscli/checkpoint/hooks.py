"""Checkpoints with old names, which a model's own load hooks translate.

``load_state_dict`` calls the hooks that a module registered and its ``_load_from_state_dict``, with
the versions that ``state_dict`` noted. So a parametrised model takes ``weight_g`` and ``weight_v``
of the old ``weight_norm``, and BatchNorm takes a checkpoint without ``num_batches_tracked``.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from losscli.checkpoint.names import unmarked
from losscli.errors import one_line
from losscli.weight_space.vectors import Weights

__all__ = ["LoadHooks"]

# A state dict may lie under many prefixes: so many of the likeliest are tried.
_TRIED = 3

# The beginning of what torch says where a state dict does not fit after all hooks were called.
_REFUSED = "RuntimeError: Error(s) in loading state_dict"


class LoadHooks:
    """What a model makes of a state dict when it loads it.

    The model itself stays as it is: a copy of it without memory, on the device ``meta``, is
    assigned the tensors of the checkpoint.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._places: dict[str, str] = {unmarked(name): name for name, _ in model.named_modules()}
        # A copy with values, for hooks that compute with those of the model.
        self._initial: nn.Module | None = None

    def translate(self, weights: Weights) -> Weights | None:
        """Loads a state dict as the model does, ``load_state_dict(weights, strict=True)``.

        Args:
            weights: The state dict, perhaps under a prefix or with the marks of wrappers.

        Returns:
            The tensors under the model's names, mapped as before where the hooks only rename them;
            None where the model does not take it.
        """
        if not any(map(_has_hooks, self._model.modules())):
            return None
        extra = {k: v for k, v in self._model.state_dict().items() if not isinstance(v, Tensor)}
        for state in self.views(weights):
            state.update(extra)
            if (found := self._load(state)) is not None:
                return found
        return None

    def depend_on_versions(self, weights: Weights) -> bool:
        """Tells whether hooks of the user's code make other tensors by the versions of modules.

        Args:
            weights: A state dict, with the versions that it noted.

        Returns:
            Whether they do; a point between checkpoints has no versions.
        """
        if not any(map(_has_own_hooks, self._model.modules())):
            return False
        noted, without = self.translate(weights), self.translate(dict(weights))
        if noted is None or without is None:
            return False
        return any(not torch.equal(tensor, without[name]) for name, tensor in noted.items())

    def views(self, weights: Weights) -> Iterator[OrderedDict[str, Any]]:
        """Names tensors by the model's modules, under the prefixes that hold most of these.

        Args:
            weights: A state dict.

        Yields:
            What lies under a prefix, the likeliest first, with the versions of modules.
        """
        counts = {"": 0}
        modules = [name.rpartition(".")[0] for name in weights]
        for module in modules:
            parts = module.split(".") if module else []
            for depth in range(len(parts) + 1):
                prefix = ".".join(parts[:depth])
                known = unmarked(".".join(parts[depth:])) in self._places
                counts[prefix] = counts.get(prefix, 0) + known
        # A file may say anything there.
        versions = {
            module: version
            for module, version in getattr(weights, "_metadata", {}).items()
            if isinstance(module, str) and isinstance(version, Mapping)
        }
        likeliest = sorted(counts, key=lambda prefix: (-counts[prefix], len(prefix)))
        for prefix in likeliest[:_TRIED]:
            state: OrderedDict[str, Any] = OrderedDict()
            start = f"{prefix}." if prefix else ""
            for name, tensor in weights.items():
                if name.startswith(start):
                    module, _, leaf = name.removeprefix(start).rpartition(".")
                    state[f"{self._place(module)}.{leaf}".removeprefix(".")] = tensor
            # Copied, since load_state_dict writes on it.
            metadata = {
                self._place(module[len(start) :]): dict(version)
                for module, version in versions.items()
                if f"{module}.".startswith(start)
            }
            if metadata:
                state._metadata = metadata  # type: ignore[attr-defined]
            yield state

    def _place(self, module: str) -> str:
        own = unmarked(module)
        return self._places.get(own, own)

    def _load(self, state: OrderedDict[str, Any]) -> Weights | None:
        empty = _copied(self._model, lambda tensor: tensor.to("meta"))
        try:
            if empty is not None:
                empty.load_state_dict(state, strict=True, assign=True)
                found = _tensors(empty)
                if not any(tensor.is_meta for tensor in found.values()):
                    return found
        except Exception as error:  # noqa: BLE001 - hooks are the user's code
            if one_line(error).startswith(_REFUSED):
                return None
        # A hook needs values, or the model's own load_state_dict assigns nothing.
        if self._initial is None:
            self._initial = _copied(self._model, Tensor.clone)
        whole = self._initial and _copied(self._initial, Tensor.clone)
        try:
            if whole is None:
                return None
            whole.load_state_dict(state, strict=True)
        except Exception:  # noqa: BLE001 - hooks are the user's code
            return None
        return _tensors(whole)


def _has_hooks(module: nn.Module) -> bool:
    """Whether a module takes part in loading, beyond copying tensors of the same names."""
    return bool(module._load_state_dict_pre_hooks) or any(
        getattr(type(module), name) is not getattr(nn.Module, name)
        for name in ("_load_from_state_dict", "load_state_dict")
    )


def _has_own_hooks(module: nn.Module) -> bool:
    """Whether a module takes part in loading by code that is not torch's."""
    hooks = (getattr(hook, "hook", hook) for hook in module._load_state_dict_pre_hooks.values())
    methods = (getattr(type(module), name) for name in ("_load_from_state_dict", "load_state_dict"))
    return any(
        not str(getattr(code, "__module__", "")).startswith("torch.") for code in (*hooks, *methods)
    )


def _tensors(model: nn.Module) -> Weights:
    return {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}


def _copied(model: nn.Module, make: Callable[[Tensor], Tensor]) -> nn.Module | None:
    """Copies a model, but for its tensors, which are made of its own."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        # Among its attributes are weights that hooks compute, which cannot be copied.
        own = (module._parameters, module._buffers, vars(module))
        for tensor in (value for values in own for value in values.values()):
            if isinstance(tensor, Tensor) and id(tensor) not in memo:
                made = make(tensor.detach())
                if isinstance(tensor, nn.Parameter):
                    made = nn.Parameter(made, tensor.requires_grad)
                memo[id(tensor)] = made
    try:
        return copy.deepcopy(model, memo)
    except Exception:  # noqa: BLE001 - what cannot be copied translates nothing
        return None
