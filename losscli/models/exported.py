"""Programs that torch.export saved, as models."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

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
        with warnings.catch_warnings():
            # Of what torch replaces within itself.
            warnings.simplefilter("ignore")
            module = torch.export.load(path).module()
    except Exception as error:
        raise ModelError(
            f"{path} is no program that torch {torch.__version__} can load: {one_line(error)}",
            "Save it with torch.export.save(torch.export.export(model, …), FILE)",
        ) from error
    # In their place stand refusals; the program is as it was exported, whatever the mode.
    for name in ("train", "eval"):
        vars(module).pop(name, None)
    return module
