"""Save checkpoints."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from losscli.checkpoint.names import Versions, loadable
from losscli.errors import OutputError, one_line
from losscli.files import create
from losscli.weight_space.vectors import Weights

__all__ = ["check_storable", "lost_by_safetensors", "save"]

# Suffixes of files written with ``torch.save``; all others are written as safetensors.
_TORCH_SUFFIXES = (".pt", ".pth")

# The version of torch's normalisation layers, which load the same values without it.
_NORMALISATION_VERSION = 2


def save(
    weights: Weights,
    metadata: Mapping[str, str],
    path: Path,
    versions: Versions | None = None,
    extra: Mapping[str, Any] | None = None,
    optimizer: Mapping[str, Any] | None = None,
) -> None:
    """Saves a checkpoint atomically.

    A safetensors file has the tensors and the metadata. ``torch.save`` writes the state dict; if
    there is metadata, under the key ``state_dict`` next to the metadata and to ``optimizer``.

    Args:
        weights: The tensors.
        metadata: The metadata.
        path: The file, which is replaced if it exists. Its suffix determines the format.
        versions: The versions of the modules that saved the tensors.
        extra: The extra state of modules.
        optimizer: The state dict of the optimiser, for a file that ``torch.save`` writes.

    Raises:
        OutputError: The file cannot be written, or the format cannot store what the model needs
            to load it.
    """
    check_storable(path, weights, versions or {}, extra or {})
    state = loadable(weights, versions or {}, extra or {})
    safe = path.suffix not in _TORCH_SUFFIXES
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a killed process with the same ID
        # Create the file exclusively, and keep its permissions, since safetensors sets others.
        with create(temporary) as file:
            mode = os.fstat(file.fileno()).st_mode
        if safe:
            save_file(_without_shared_memory(weights), temporary, dict(metadata))
            _sort_metadata(temporary)
        else:
            further = {**metadata, **({"optimizer": optimizer} if optimizer else {})}
            torch.save({"state_dict": state, **further} if further else state, temporary)
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # or a loss of power may leave the name without the content
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from None
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise OutputError(f"{path} cannot be written: {one_line(error)}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def check_storable(
    path: Path,
    weights: Weights,
    versions: Versions,
    extra: Mapping[str, Any],
    cure: str = "",
) -> None:
    """Checks that the format of a file can store a checkpoint.

    Args:
        path: The file.
        weights: The tensors, or others of the same types.
        versions: The versions of the modules that saved the tensors.
        extra: The extra state of modules.
        cure: How to fix it, if the file cannot have another format.

    Raises:
        OutputError: It cannot.
    """
    if path.suffix in _TORCH_SUFFIXES:
        return
    if what := lost_by_safetensors(weights, versions, extra):
        raise OutputError(
            f"{path} cannot be written: {what}", cure or f"Write {path.with_suffix('.pt')}"
        )


def lost_by_safetensors(
    weights: Weights, versions: Versions, extra: Mapping[str, Any]
) -> str | None:
    """Returns a clause on what a safetensors file cannot store of a checkpoint; None if nothing.

    It is extra state or a version of a module, or a type of the tensors.
    """
    for dtype in dict.fromkeys(tensor.dtype for tensor in weights.values()):
        try:
            safetensors.torch.save({"": torch.empty(0, dtype=dtype)})
        except KeyError:  # of the table of types
            return f"safetensors {safetensors.__version__} does not store {dtype}"
    lost = next(iter(extra), None)
    for module, values in versions.items():
        version = values.get("version")
        start = f"{module}." if module else ""
        tensors = {n.removeprefix(start): t for n, t in weights.items() if n.startswith(start)}
        vectors = all(tensor.ndim == 1 for tensor in tensors.values())
        is_normalisation = "running_mean" in tensors or (
            tensors.keys() <= {"weight", "bias"} and vectors
        )
        if version not in {None, 1, *([_NORMALISATION_VERSION] if is_normalisation else [])}:
            lost = lost or f"version {version} of {module or 'the model'}"
    if lost is None:
        return None
    return f"safetensors does not store {lost}, which the model may need to load the file"


def _sort_metadata(path: Path) -> None:
    """Sorts the metadata in the header of a safetensors file, which are in an arbitrary order."""
    with path.open("r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        if "__metadata__" not in header:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        # Escapes may be written in another way; spaces may follow the header.
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def _without_shared_memory(weights: Weights) -> dict[str, Tensor]:
    """Makes tensors contiguous, and copies those that share memory, as safetensors requires."""
    seen: set[int] = set()
    copies = {}
    for name, tensor in weights.items():
        copies[name] = (
            tensor.contiguous().clone() if tensor.data_ptr() in seen else tensor.contiguous()
        )
        seen.add(tensor.data_ptr())
    return copies
