"""Writing a checkpoint."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from losscli.checkpoint.names import Versions, loadable
from losscli.errors import OutputError, one_line
from losscli.files import create
from losscli.weight_space.vectors import Weights

__all__ = ["save"]

# The suffixes of files that ``torch.save`` writes; others are safetensors.
_BY_TORCH = (".pt", ".pth")

# The version of torch's normalisation layers, which are known by their tensors. Without it they
# load the same values.
_NORMALISATION = 2


def save(
    weights: Weights,
    metadata: Mapping[str, str],
    path: Path,
    versions: Versions | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint, whole or not at all.

    Safetensors stores tensors and metadata. ``torch.save`` stores a state dict; where there is
    metadata, under the key ``state_dict``.

    Args:
        weights: The tensors.
        metadata: What the file shall say of itself.
        path: The file, replaced if it exists. Its suffix says how it is written.
        versions: The versions of modules that the tensors are of.
        extra: The extra state of modules.

    Raises:
        OutputError: The file cannot be written, or would lose what the model needs to load it.
    """
    if not path.name:
        raise OutputError(f"{path} is a folder", "Name a file")
    state = loadable(weights, versions or {}, extra or {})
    if safe := path.suffix not in _BY_TORCH:
        _require_tensors_alone(weights, path, versions or {}, extra or {})
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a process of this number that was killed
        # An empty file first, which nobody else has prepared, and for the permissions that files
        # have here: safetensors sets its own.
        with create(temporary) as file:
            mode = os.fstat(file.fileno()).st_mode
        if safe:
            save_file(_apart(weights), temporary, dict(metadata))
        else:
            torch.save({"state_dict": state, **metadata} if metadata else state, temporary)
        temporary.chmod(mode)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from None
    except (SafetensorError, ValueError, RuntimeError, KeyError) as error:
        raise OutputError(f"{path} cannot be written: {one_line(error)}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _require_tensors_alone(
    weights: Weights, path: Path, versions: Versions, extra: Mapping[str, Any]
) -> None:
    """Refuses what safetensors does not store."""
    if wide := [name for name, tensor in weights.items() if tensor.dtype == torch.complex128]:
        raise OutputError(
            f"{path} cannot be written: safetensors has no complex128, the type of {wide[0]}",
            "Store the checkpoints in complex64",
        )
    lost = next(iter(extra), None)
    for module, noted in versions.items():
        version = noted.get("version")
        start = f"{module}." if module else ""
        inner = {n.removeprefix(start): t for n, t in weights.items() if n.startswith(start)}
        vectors = all(tensor.ndim == 1 for tensor in inner.values())
        known = "running_mean" in inner or (inner.keys() <= {"weight", "bias"} and vectors)
        if version not in {None, 1, *([_NORMALISATION] if known else [])}:
            lost = lost or f"version {version} of {module or 'the model'}"
    if lost:
        raise OutputError(
            f"{path} cannot be written: safetensors does not store {lost}, which the model may "
            "need to load the file",
            f"Write {path.with_suffix('.pt')}",
        )


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
