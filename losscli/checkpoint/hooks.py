"""Load checkpoints of older versions of a model through the model's load hooks.

``load_state_dict`` calls the registered hooks and ``_load_from_state_dict`` of each module with the
stored versions. For example, a parametrised model loads ``weight_g`` and ``weight_v`` of the old
``weight_norm``, and BatchNorm loads a checkpoint without ``num_batches_tracked``.
"""

from __future__ import annotations

import contextlib
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
from losscli.weight_space.vectors import Weights, identical

__all__ = ["LoadHooks", "copy_model", "has_custom_loading"]

# Maximum number of prefixes that are tried, the most likely first.
_MAX_TRIED = 3

# The beginning of the error of torch for a state dict that does not fit after all hooks ran.
_LOAD_ERROR = "RuntimeError: Error(s) in loading state_dict"


class LoadHooks:
    """Runs the load hooks of a model on state dicts without changing the model.

    The tensors are assigned to a copy of the model on the device ``meta``, which needs no memory.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._module_names: dict[str, str] = {
            strip_wrappers(name): name for name, _ in model.named_modules()
        }
        # A copy with values, for hooks that use the values of the model.
        self._initial: nn.Module | None = None

    @property
    def are_custom(self) -> bool:
        """Whether the model runs loading code that is not part of torch."""
        return has_custom_loading(self._model)

    def translate(self, weights: Weights) -> StateDict | None:
        """Returns the ``state_dict`` of the model after ``load_state_dict(weights, strict=True)``.

        ``weights`` may have a prefix or names of wrappers. Tensors that the hooks only rename stay
        memory-mapped. The result is None if the model does not accept the state dict.
        """
        if not any(map(_has_hooks, self._model.modules())):
            return None
        for state in self.views(weights):
            try:
                return self.load(state)
            except ModelError:
                continue
        return None

    def translate_leniently(
        self, weights: Weights
    ) -> Iterator[tuple[StateDict, tuple[str, ...], tuple[str, ...]]]:
        """Yields the ``state_dict`` of the model after a load with ``strict=False`` by prefix.

        Missing tensors have the initial values of the model; their names follow, and then the names
        that the model does not have. ``weights`` may have a prefix or names of wrappers.
        """
        if any(map(_has_hooks, self._model.modules())):
            for state in self.views(weights):
                with contextlib.suppress(ModelError):
                    yield self._load_into_copy(state, strict=False)

    def views(self, weights: Weights) -> Iterator[StateDict]:
        """Yields the tensors under each prefix with many modules of the model, the likeliest first.

        They have the model's names.
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
        """Returns the ``state_dict`` of the model after it loaded a state dict with its names.

        Raises:
            ModelError: The model does not accept the state dict or cannot be copied, or the extra
                state has objects that ``weights_only`` does not read.
        """
        for key, value in state.extra.items():
            if has_stand_in(value):
                raise ModelError(f"{key} holds an object that weights_only does not read")
        # User code may modify the tensors.
        tensors = {n: t.clone() for n, t in state.items()} if self.are_custom else state
        meta_model = copy_model(self._model, lambda tensor: tensor.to("meta"))
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
        # A hook needs values, or the model overrides load_state_dict and assigns nothing.
        return self._load_into_copy(state, strict=True)[0]

    def _load_into_copy(
        self, state: StateDict, *, strict: bool
    ) -> tuple[StateDict, tuple[str, ...], tuple[str, ...]]:
        """Loads into a copy of the initial model; returns also the missing and unexpected names."""
        if self._initial is None:
            self._initial = copy_model(self._model, Tensor.clone)
        full_model = self._initial and copy_model(self._initial, Tensor.clone)
        if full_model is None:
            raise ModelError("the model cannot be copied with copy.deepcopy")
        tensors = {n: t.clone() for n, t in state.items()}
        try:
            loaded = full_model.load_state_dict(
                loadable(tensors, state.versions, state.extra), strict=strict
            )
            return _state_of(full_model), tuple(loaded[0]), tuple(loaded[1])
        except Exception as error:  # noqa: BLE001 - hooks are the user's code
            raise ModelError(one_line(error)) from None


def has_custom_loading(model: nn.Module) -> bool:
    """Whether a model runs loading code that is not part of torch.

    This is a load hook, a loading method or extra state of one of its modules.

    Returns:
        Whether it does.
    """
    return any(
        not str(getattr(code, "__module__", "")).startswith("torch.")
        for module in model.modules()
        for code in (*_hooks(module), *(getattr(type(module), name) for name in _METHODS))
    )


# The methods that a module overrides to customise loading.
_METHODS = ("_load_from_state_dict", "load_state_dict", "set_extra_state")


def _has_hooks(module: nn.Module) -> bool:
    """Whether a module does more than copy tensors of the same names while it loads."""
    return bool(_hooks(module)) or any(
        getattr(type(module), name) is not getattr(nn.Module, name) for name in _METHODS
    )


def _hooks(module: nn.Module) -> list[Any]:
    """The hooks that run before and after a module loads."""
    before = (getattr(h, "hook", h) for h in module._load_state_dict_pre_hooks.values())
    return [*before, *module._load_state_dict_post_hooks.values()]


def _restore_originals(found: StateDict, copies: Weights, originals: Weights) -> StateDict:
    """Replaces unchanged copies by the original tensors, which may be memory-mapped."""
    names = {tensor.data_ptr(): name for name, tensor in copies.items()}
    for name, tensor in found.items():
        original = originals.get(names.get(tensor.data_ptr(), ""))
        if original is not None and identical(original, tensor):
            found[name] = original
    return found


def _state_of(model: nn.Module) -> StateDict:
    return dict(state_dicts(model.state_dict())).get("", StateDict({}))


def copy_model(model: nn.Module, convert: Callable[[Tensor], Tensor]) -> nn.Module | None:
    """Copies a model, each detached tensor converted; returns None if it cannot be copied."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        # Attributes include weights that hooks compute, which deepcopy does not accept.
        attributes = (module._parameters, module._buffers, vars(module))
        for tensor in (value for values in attributes for value in values.values()):
            if isinstance(tensor, Tensor) and id(tensor) not in memo:
                converted = convert(tensor.detach())
                if isinstance(tensor, nn.Parameter):
                    converted = nn.Parameter(converted, tensor.requires_grad)
                memo[id(tensor)] = converted
    try:
        return copy.deepcopy(model, memo)
    except Exception:  # noqa: BLE001 - without a copy, nothing is translated
        return None
