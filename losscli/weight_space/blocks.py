"""The blocks of a model: the parts that a reader of its code would name, in their order."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

__all__ = ["blocks_of"]

_LISTS = (nn.ModuleList, nn.ModuleDict)
# A number says little without the name of what it counts in.
_CONTAINERS = (*_LISTS, nn.Sequential)


def blocks_of(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Finds the block of every tensor of a model.

    A block is what the first component of a tensor's name stands for. A module that holds all
    tensors is looked into, and so is one that keeps an ``nn.ModuleList`` or ``nn.ModuleDict``, the
    members of which are blocks: ``h.0``, ``h.1``, … of a GPT-2. The names of modules that hold all
    the others are left out. A tied tensor belongs to the block that has it first.

    Args:
        model: The model.
        tensors: Its parameters and buffers themselves, by the names of its state dict.

    Returns:
        The block of each name, in the order of the names.
    """
    modules = dict(model.named_modules())
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    root = _root(modules, list(first.values()))
    # A container's own name is part of those of its members.
    shown = root
    while shown and isinstance(modules[shown], _CONTAINERS):
        shown = shown.rpartition(".")[0]
    left_out = len(shown) + 1 if shown else 0
    block = {name: _block(modules, root, name)[left_out:] for name in first.values()}
    return {name: block[first[id(tensor)]] for name, tensor in tensors.items()}


def _root(modules: Mapping[str, nn.Module], names: list[str]) -> str:
    """Finds the innermost module with parts that holds all tensors."""
    root = ""
    while True:
        inside = {_step(root, name) for name in names}
        only = inside.pop()
        if inside or only not in modules or not any(modules[only].children()):
            return root
        root = only


def _block(modules: Mapping[str, nn.Module], root: str, name: str) -> str:
    """Finds the block of a tensor, by its full name."""
    here = root
    while not isinstance(modules[here], _CONTAINERS):
        here = _step(here, name)
        if here not in modules or not _keeps_list(modules[here]):
            return here
    return _step(here, name)


def _keeps_list(module: nn.Module) -> bool:
    # An nn.Sequential is one block, as a stage of a ResNet is, whatever is in it.
    if isinstance(module, nn.Sequential):
        return False
    return isinstance(module, _LISTS) or any(map(_keeps_list, module.children()))


def _step(path: str, name: str) -> str:
    """Goes one component from a path towards a name below it."""
    start = len(path) + 1 if path else 0
    end = name.find(".", start)
    return name if end < 0 else name[:end]
