"""Writing a checkpoint."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, complex128

from losscli.errors import OutputError, one_line
from losscli.files import create
from losscli.weight_space.vectors import Weights

__all__ = ["save"]


def save(weights: Weights, metadata: Mapping[str, str], path: Path) -> None:
    """Writes a checkpoint as safetensors, whole or not at all.

    Args:
        weights: The tensors.
        metadata: What the file shall say of itself.
        path: The file, replaced if it exists.

    Raises:
        OutputError: The file cannot be written.
    """
    if not path.name:
        raise OutputError(f"{path} is a folder", "Name a file")
    if wide := [name for name, tensor in weights.items() if tensor.dtype == complex128]:
        raise OutputError(
            f"{path} cannot be written: safetensors has no complex128, the type of {wide[0]}",
            "Store the checkpoints in complex64",
        )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a process of this number that was killed
        # An empty file first, which nobody else has prepared, and for the permissions that files
        # have here: safetensors sets its own.
        with create(temporary) as file:
            mode = os.fstat(file.fileno()).st_mode
        save_file(_apart(weights), temporary, dict(metadata))
        temporary.chmod(mode)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from None
    except (SafetensorError, ValueError, RuntimeError, KeyError) as error:
        raise OutputError(f"{path} cannot be written: {one_line(error)}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _apart(weights: Weights) -> dict[str, Tensor]:
    """Gives every tensor memory of its own, in order, as safetensors needs it."""
    seen: set[int] = set()
    own = {}
    for name, tensor in weights.items():
        own[name] = (
            tensor.contiguous().clone() if tensor.data_ptr() in seen else tensor.contiguous()
        )
        seen.add(tensor.data_ptr())
    return own
