"""The blocks of a model, such as its layers or stages, in the order of its tensors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

__all__ = ["blocks_of"]

_LISTS = (nn.ModuleList, nn.ModuleDict)
# Members of these have numeric names, so the name of the container is shown with them.
_CONTAINERS = (*_LISTS, nn.Sequential)


def blocks_of(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Finds the block of every tensor of a model.

    A block is the module named by the first component of a tensor's name. A module that contains
    all tensors is replaced by its children, and so is a module with an ``nn.ModuleList`` or
    ``nn.ModuleDict``; the members of these lists are blocks, such as ``h.0``, ``h.1``, … of GPT-2.
    The names of modules that contain all tensors are removed. A tied tensor belongs to the block
    of its first alias.

    Args:
        model: The model.
        tensors: Its parameters and buffers, not copies, by their names in the state dict.

    Returns:
        The block of each name, in the order of the names.
    """
    modules = dict(model.named_modules())
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    root = _root(modules, list(first.values()))
    # The names of members include the name of their container.
    hidden = root
    while hidden and isinstance(modules[hidden], _CONTAINERS):
        hidden = hidden.rpartition(".")[0]
    prefix = len(hidden) + 1 if hidden else 0
    block = {name: _block(modules, root, name)[prefix:] for name in first.values()}
    return {name: block[first[id(tensor)]] for name, tensor in tensors.items()}


def _root(modules: Mapping[str, nn.Module], names: list[str]) -> str:
    """Returns the innermost module with children that contains all tensors."""
    root = ""
    while True:
        children = {_child_path(root, name) for name in names}
        child = children.pop()
        if children or child not in modules or not any(modules[child].children()):
            return root
        root = child


def _block(modules: Mapping[str, nn.Module], root: str, name: str) -> str:
    """Returns the block of a tensor with the given full name."""
    path = root
    while not isinstance(modules[path], _CONTAINERS):
        path = _child_path(path, name)
        if path not in modules or not _contains_list(modules[path]):
            return path
    return _child_path(path, name)


def _contains_list(module: nn.Module) -> bool:
    # An nn.Sequential is one block, like a stage of a ResNet.
    if isinstance(module, nn.Sequential):
        return False
    return isinstance(module, _LISTS) or any(map(_contains_list, module.children()))


def _child_path(path: str, name: str) -> str:
    """Extends a path by one component towards a name below it."""
    start = len(path) + 1 if path else 0
    end = name.find(".", start)
    return name if end < 0 else name[:end]
