"""Load programs that ``torch.export`` saved."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from losscli.errors import ModelError, one_line
from losscli.weight_space.tracing import silence

__all__ = ["load_exported"]


def load_exported(file: str | Path) -> nn.Module:
    """Loads a program that ``torch.export.save`` wrote (.pt2). This runs code in the file.

    Returns:
        The program as a module, with the tensor names of the exported model.

    Raises:
        ModelError: The file does not exist, or is not an exported program.
    """
    path = Path(file)
    if not path.is_file():
        raise ModelError(f"there is no file {path}", f"Relative paths start at {Path.cwd()}")
    try:
        with silence():
            program = torch.export.load(path)
            module = program.module()
    except Exception as error:
        raise ModelError(
            f"{path} is not a program that torch {torch.__version__} can load: {one_line(error)}",
            "Save it with torch.export.save(torch.export.export(model, …), FILE)",
        ) from error
    # torch replaces these methods by ones that raise; the mode does not change the program.
    for name in ("train", "eval"):
        vars(module).pop(name, None)
    _restore_aliases(module, program.state_dict)
    if (fixed := _fixed_batch_size(program)) is not None:
        check = partial(_check_batch_size, path, fixed)
        # Before the checks of the program, which name no file.
        module.register_forward_pre_hook(check, prepend=True, with_kwargs=True)
    return module


def _restore_aliases(module: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Registers tied parameters under all names; a program that torch 2.6 wrote has only one."""
    known = module.state_dict(keep_vars=True)
    tied = {stored[name].data_ptr(): known[name] for name in known if name in stored}
    for name in stored.keys() - known.keys():
        parameter = tied.get(stored[name].data_ptr())
        if isinstance(parameter, nn.Parameter):
            path, _, attribute = name.rpartition(".")
            owner = module
            for part in path.split(".") if path else ():
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(attribute, parameter)


def _fixed_batch_size(program: torch.export.ExportedProgram) -> int | None:
    """Returns the fixed batch size of a program; None if it is dynamic."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if (
            node.op == "placeholder"
            and node.name in program.graph_signature.user_inputs
            and isinstance(value, Tensor)
            and value.ndim
        ):
            return value.shape[0] if isinstance(value.shape[0], int) else None
    return None


def _check_batch_size(
    path: Path, fixed: int, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if tensors and len(tensors[0]) != fixed:
        raise ModelError(
            f"{path} was exported for batches of exactly {fixed} examples, not {len(tensors[0])}",
            "Export it with dynamic_shapes, its first dimension a torch.export.Dim",
        )
