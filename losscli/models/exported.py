"""Programs that torch.export saved, as models."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from losscli.errors import ModelError, one_line

__all__ = ["exported"]


def exported(file: str | Path) -> nn.Module:
    """Loads a program that torch.export saved (.pt2); it runs what is in the file.

    Args:
        file: The file.

    Returns:
        The program as a module, its tensors under the names of the model that was exported.

    Raises:
        ModelError: There is no such file, or it is no such program.
    """
    path = Path(file)
    if not path.is_file():
        raise ModelError(f"there is no file {path}", f"Relative names start at {Path.cwd()}")
    try:
        with warnings.catch_warnings(), _unlogged():
            # Of what torch replaces within itself.
            warnings.simplefilter("ignore")
            program = torch.export.load(path)
            module = program.module()
    except Exception as error:
        raise ModelError(
            f"{path} is no program that torch {torch.__version__} can load: {one_line(error)}",
            "Save it with torch.export.save(torch.export.export(model, …), FILE)",
        ) from error
    # In their place stand refusals; the program is as it was exported, whatever the mode.
    for name in ("train", "eval"):
        vars(module).pop(name, None)
    if (fixed := _batch(program)) is not None:
        module.register_forward_pre_hook(partial(_require_batch, path, fixed), with_kwargs=True)
    return module


@contextmanager
def _unlogged() -> Iterator[None]:
    """Keeps torch from logging the traceback of an error that it then raises."""
    before = logging.root.manager.disable
    logging.disable()
    try:
        yield
    finally:
        logging.disable(before)


def _batch(program: torch.export.ExportedProgram) -> int | None:
    """The only number of examples that a program takes; None where it takes any."""
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


def _require_batch(
    path: Path, fixed: int, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if tensors and len(tensors[0]) != fixed:
        raise ModelError(
            f"{path} was exported for batches of {fixed} examples alone, and here is one of "
            f"{len(tensors[0])}",
            "Export it with dynamic_shapes, its first dimension a torch.export.Dim",
        )
