"""Read a checkpoint by its name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from losscli.checkpoint.adam import find_optimizers
from losscli.checkpoint.adapters import CONFIG
from losscli.checkpoint.files import read_file
from losscli.checkpoint.folders import (
    is_index,
    optimizer_beside,
    read_adapter,
    read_folder,
    read_index,
)
from losscli.checkpoint.given import InMemoryCheckpoint
from losscli.checkpoint.names import state_dicts
from losscli.checkpoint.parts import combine, split_parts
from losscli.checkpoint.quantised import find_packed_parameters
from losscli.checkpoint.state import CheckpointFile, consolidation_hint
from losscli.errors import CheckpointError

__all__ = ["find_base", "read", "read_optimizers"]


def read(name: str) -> CheckpointFile:
    """Returns the content of a checkpoint, without running code in it.

    Args:
        name: ``FILE``, ``FILE#KEY``, a folder that is one checkpoint, several of them as the
            modules of one model (``netG=G.pth+netD=D.pth``), or an object. Files are
            memory-mapped if their format allows it.

    Raises:
        CheckpointError: The file does not exist, is not a checkpoint, needs code to run, or does
            not have the key.
    """
    if isinstance(name, InMemoryCheckpoint):
        file = name.file
    elif parts := split_parts(name):
        file = combine(name, {module: _read_part(part, name) for module, part in parts.items()})
    else:
        path, key = _split_key(name)
        try:
            file = _read(path, name)
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read: {error.strerror or error}") from None
        file = file.at(key)
    if not file.candidates and not file.quantised:
        raise CheckpointError(
            f"{name} contains no named tensors",
            (file.path and consolidation_hint(file.path)) or "Save the model's state_dict() in it",
        )
    for label, weights in file.model_candidates.items():
        file.require_dense(label, weights)
    return file


def read_optimizers(name: str) -> dict[str, Any]:
    """Returns the state dicts of `find_optimizers` in a checkpoint, or beside one of transformers.

    Raises:
        CheckpointError: The file cannot be read, or the name is that of several files.
    """
    if isinstance(name, InMemoryCheckpoint):
        return dict(name.optimizers)
    if split_parts(name):
        raise CheckpointError(
            f"{name} is several files, and the state of an optimiser is read from one",
            "Save the model in one file",
        )
    path, _ = _split_key(name)
    found = {} if path.is_dir() else dict(find_optimizers(read_file(path, name)[0]))
    if not found and (beside := optimizer_beside(path)):
        found = dict(find_optimizers(read_file(beside, str(beside))[0]))
    return found


def find_base(names: Sequence[str]) -> str | None:
    """Returns the base checkpoint for the adapters among several checkpoints.

    It is the first checkpoint that is not an initialisation or an adapter. If there is none, it is
    the base folder that the adapters name; None if all are initialisations.

    Raises:
        CheckpointError: The adapters name different bases, or not an existing folder.
    """
    files = [name for name in names if not name.startswith("init:")]
    for name in files:
        if not _is_adapter(name):
            return name
    if not files:
        return None
    bases = {name: adapter.base for name in files if (adapter := read(name).adapter)}
    first, base = next(iter(bases.items()))
    if base is None or not _is_folder(base):
        where = f"was trained on {base!r}, which is not a local folder"
        raise CheckpointError(
            f"{first} is an adapter that {where if base else 'does not name its base'}",
            "Name the checkpoint that it changes first",
        )
    for name, other in bases.items():
        if other != base:
            raise CheckpointError(
                f"{first} was trained on {base!r} and {name} on {other!r}",
                "Name the checkpoint that both change first",
            )
    return base


def _read_part(part: str, name: str) -> CheckpointFile:
    try:
        return read(part)
    except CheckpointError as error:
        raise CheckpointError(f"{error.what}, in {name}", error.cure) from None


def _is_folder(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):
        return False


def _is_adapter(name: str) -> bool:
    if isinstance(name, InMemoryCheckpoint):
        return False
    path = Path(name)
    folder = path if path.is_dir() else path.parent
    try:
        return (folder / CONFIG).exists() and read(name).adapter is not None
    except OSError:
        return False


def _read(path: Path, name: str) -> CheckpointFile:
    if path.is_dir():
        return read_folder(path, name)
    if is_index(path):
        return read_index(path, name, path)
    if path.name.startswith("adapter_model.") and (path.parent / CONFIG).exists():
        return read_adapter(path, name, path)
    content, metadata = read_file(path, name)
    candidates = dict(state_dicts(content))
    return CheckpointFile(
        name, path, candidates, metadata, (path,), quantised=find_packed_parameters(content)
    )


def _split_key(name: str) -> tuple[Path, str]:
    """Splits ``FILE#KEY``, unless a file with the whole name exists."""
    path, key = Path(name), ""
    try:
        if not path.exists() and "#" in name:
            file, _, key = name.rpartition("#")
            path = Path(file)
        if not path.exists():
            raise CheckpointError(
                f"there is no checkpoint {name}", f"Relative paths start at {Path.cwd()}"
            )
        if path.is_file() and path.stat().st_size == 0:
            raise CheckpointError(f"{path} is empty", "It may be incomplete: save or copy it again")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{name} cannot be read: {reason}") from None
    return path, key
