"""Checkpoints with old names, which a model's own load hooks translate.

``load_state_dict`` calls the hooks that a module registered and its ``_load_from_state_dict``, with
the versions that ``state_dict`` noted. So a parametrised model takes ``weight_g`` and ``weight_v``
of the old ``weight_norm``, and BatchNorm takes a checkpoint without ``num_batches_tracked``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from losscli.checkpoint.names import (
    StateDict,
    loadable,
    module_state_under,
    state_dicts,
    strip_wrappers,
)
from losscli.checkpoint.standins import has_stand_in
from losscli.errors import ModelError, one_line
from losscli.weight_space.vectors import Weights, equal

__all__ = ["LoadHooks", "has_custom_loading"]

# A state dict may lie under many prefixes: so many of the likeliest are tried.
_MAX_TRIED = 3

# The beginning of what torch says where a state dict does not fit after all hooks were called.
_LOAD_ERROR = "RuntimeError: Error(s) in loading state_dict"


class LoadHooks:
    """What a model makes of a state dict when it loads it.

    The model itself stays as it is: a copy of it without memory, on the device ``meta``, is
    assigned the tensors of the checkpoint.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._module_names: dict[str, str] = {
            strip_wrappers(name): name for name, _ in model.named_modules()
        }
        # A copy with values, for hooks that compute with those of the model.
        self._initial: nn.Module | None = None

    @property
    def are_custom(self) -> bool:
        """Whether code that is not torch's takes part in loading."""
        return has_custom_loading(self._model)

    def translate(self, weights: Weights) -> StateDict | None:
        """Loads a state dict as the model does, ``load_state_dict(weights, strict=True)``.

        Args:
            weights: The state dict, perhaps under a prefix or with the marks of wrappers.

        Returns:
            What the model's own ``state_dict`` is then, its tensors mapped as before where the
            hooks only rename them; None where the model does not take it.
        """
        if not any(map(_has_hooks, self._model.modules())):
            return None
        for state in self.views(weights):
            try:
                return self.load(state)
            except ModelError:
                continue
        return None

    def views(self, weights: Weights) -> Iterator[StateDict]:
        """Names tensors by the model's modules, under the prefixes that hold most of these.

        Args:
            weights: A state dict.

        Yields:
            What lies under a prefix, the likeliest first.
        """
        counts = {"": 0}
        modules = [name.rpartition(".")[0] for name in weights]
        for module in modules:
            parts = module.split(".") if module else []
            for depth in range(len(parts) + 1):
                prefix = ".".join(parts[:depth])
                known = strip_wrappers(".".join(parts[depth:])) in self._module_names
                counts[prefix] = counts.get(prefix, 0) + known
        likeliest = sorted(counts, key=lambda prefix: (-counts[prefix], len(prefix)))
        for prefix in likeliest[:_MAX_TRIED]:
            start = f"{prefix}." if prefix else ""
            tensors = {}
            for name, tensor in weights.items():
                if name.startswith(start):
                    module, _, leaf = name.removeprefix(start).rpartition(".")
                    tensors[f"{self._module_name(module)}.{leaf}".removeprefix(".")] = tensor
            yield StateDict(tensors, *module_state_under(weights, prefix, self._module_name))

    def _module_name(self, module: str) -> str:
        stripped = strip_wrappers(module)
        return self._module_names.get(stripped, stripped)

    def load(self, state: StateDict) -> StateDict:
        """Loads a state dict with the model's names, exactly as ``load_state_dict`` does.

        Args:
            state: The state dict.

        Returns:
            What the model's own ``state_dict`` is then, its versions those of the model's code.

        Raises:
            ModelError: The model does not take it, or cannot be copied; or its extra state has
                objects that are not read.
        """
        for key, value in state.extra.items():
            if has_stand_in(value):
                raise ModelError(f"{key} holds an object that weights_only does not read")
        # Code of the user's own may write on the tensors that it is given.
        tensors = {n: t.clone() for n, t in state.items()} if self.are_custom else state
        meta_model = _copy_model(self._model, lambda tensor: tensor.to("meta"))
        try:
            if meta_model is not None:
                meta_model.load_state_dict(
                    loadable(tensors, state.versions, state.extra), strict=True, assign=True
                )
                loaded = _state_of(meta_model)
                if not any(tensor.is_meta for tensor in loaded.values()):
                    return _restore_originals(loaded, tensors, state)
        except Exception as error:  # noqa: BLE001 - hooks are the user's code
            if (text := one_line(error)).startswith(_LOAD_ERROR):
                raise ModelError(text) from None
        # A hook needs values, or the model's own load_state_dict assigns nothing.
        if self._initial is None:
            self._initial = _copy_model(self._model, Tensor.clone)
        full_model = self._initial and _copy_model(self._initial, Tensor.clone)
        if full_model is None:
            raise ModelError("the model cannot be copied with copy.deepcopy")
        try:
            tensors = {n: t.clone() for n, t in state.items()}
            full_model.load_state_dict(loadable(tensors, state.versions, state.extra), strict=True)
            return _state_of(full_model)
        except Exception as error:  # noqa: BLE001 - hooks are the user's code
            raise ModelError(one_line(error)) from None


def has_custom_loading(model: nn.Module) -> bool:
    """Tells whether code that is not torch's takes part in loading a model.

    Args:
        model: The model.

    Returns:
        Whether it has load hooks, loads by methods of its own, or has extra state.
    """
    return any(map(_has_custom_hooks, model.modules()))


# The methods by which a module takes part in loading.
_METHODS = ("_load_from_state_dict", "load_state_dict", "set_extra_state")


def _has_hooks(module: nn.Module) -> bool:
    """Whether a module takes part in loading, beyond copying tensors of the same names."""
    return bool(_hooks(module)) or any(
        getattr(type(module), name) is not getattr(nn.Module, name) for name in _METHODS
    )


def _has_custom_hooks(module: nn.Module) -> bool:
    """Whether a module takes part in loading by code that is not torch's."""
    methods = (getattr(type(module), name) for name in _METHODS)
    return any(
        not str(getattr(code, "__module__", "")).startswith("torch.")
        for code in (*_hooks(module), *methods)
    )


def _hooks(module: nn.Module) -> list[Any]:
    """The functions that are called before and after a module is loaded."""
    before = (getattr(h, "hook", h) for h in module._load_state_dict_pre_hooks.values())
    return [*before, *module._load_state_dict_post_hooks.values()]


def _restore_originals(found: StateDict, copies: Weights, originals: Weights) -> StateDict:
    """Puts the tensors of a file, which may be mapped, where their copies are unchanged."""
    names = {tensor.data_ptr(): name for name, tensor in copies.items()}
    for name, tensor in found.items():
        original = originals.get(names.get(tensor.data_ptr(), ""))
        if original is not None and original.dtype == tensor.dtype and equal(original, tensor):
            found[name] = original
    return found


def _state_of(model: nn.Module) -> StateDict:
    return dict(state_dicts(model.state_dict())).get("", StateDict({}))


def _copy_model(model: nn.Module, convert: Callable[[Tensor], Tensor]) -> nn.Module | None:
    """Copies a model, but for its tensors, which are made of its own."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        # Among its attributes are weights that hooks compute, which cannot be copied.
        attributes = (module._parameters, module._buffers, vars(module))
        for tensor in (value for values in attributes for value in values.values()):
            if isinstance(tensor, Tensor) and id(tensor) not in memo:
                converted = convert(tensor.detach())
                if isinstance(tensor, nn.Parameter):
                    converted = nn.Parameter(converted, tensor.requires_grad)
                memo[id(tensor)] = converted
    try:
        return copy.deepcopy(model, memo)
    except Exception:  # noqa: BLE001 - what cannot be copied translates nothing
        return None
