"""Find and read checkpoints in folders."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from losscli.checkpoint.adapters import CONFIG, parse_config
from losscli.checkpoint.distributed import METADATA, read_distributed
from losscli.checkpoint.files import SUFFIXES, read_file, read_json
from losscli.checkpoint.names import natural_key, sort_naturally, state_dicts
from losscli.checkpoint.state import CheckpointFile, consolidation_hint
from losscli.errors import CheckpointError, one_line

__all__ = [
    "is_index",
    "list_checkpoints",
    "optimizer_beside",
    "read_adapter",
    "read_folder",
    "read_index",
]

# In the order in which transformers looks for them; other libraries use the same suffixes.
_WEIGHTS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_INDEX = re.compile(r".*\.(safetensors|bin|pt|pth)\.index(\.[\w-]+)?\.json")

# Files that the trainer of transformers writes next to the weights.
_TRAINING_STATE = re.compile(
    r"(optimizer|scheduler|scaler|training_args|rng_state(_\d+)?)\.(pt|pth|bin)"
)


def list_checkpoints(name: str) -> list[str]:
    """Returns the checkpoints in a folder in natural order (step-9 before step-10).

    Args:
        name: ``DIR``, or ``DIR#KEY`` for a key of every file. The list is empty if the name is not
            that of a folder, or if the folder itself is one checkpoint.

    Raises:
        CheckpointError: The folder has no checkpoints or cannot be read.
    """
    folder, key = Path(name), ""
    try:
        if "#" in name and not folder.exists():
            folder, key = Path(name.rpartition("#")[0]), f"#{name.rpartition('#')[2]}"
        # init:SEED is never a folder, even if one of that name exists.
        if name.startswith("init:") or not folder.is_dir() or _checkpoint_files(folder):
            return []
        found = _checkpoints_in(folder)
        within = [] if found else _folders_with_checkpoints(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name} cannot be read: {one_line(error)}") from None
    if not found:
        raise CheckpointError(
            f"the folder {name} contains no checkpoints",
            f"Name a folder in it, such as {within[0]}"
            if within
            else f"Their names end in {', '.join(SUFFIXES)}",
        )
    return [f"{folder / name}{key}" for name in found]


def _checkpoints_in(folder: Path) -> list[str]:
    """Lists the names of the checkpoints in a folder, in natural order."""
    return sort_naturally([
        path.name
        for path in folder.iterdir()
        if not path.name.startswith(".")
        and (
            _is_checkpoint(path)
            if path.is_dir()
            else path.suffix in SUFFIXES
            and path.is_file()
            and not _TRAINING_STATE.fullmatch(path.name)
        )
    ])


def _folders_with_checkpoints(folder: Path) -> list[Path]:
    """Lists the folders in a folder that contain checkpoints."""
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    return [
        path for path in folders if os.access(path, os.R_OK | os.X_OK) and _checkpoints_in(path)
    ]


def _is_checkpoint(folder: Path) -> bool:
    try:
        return bool(_checkpoint_files(folder))
    except OSError:  # no permission
        return False


def _checkpoint_files(folder: Path) -> list[Path]:
    """Lists the main files of the checkpoints that a folder itself is."""
    # Irregular files, such as pipes, count too: reading them raises the error.
    found = [folder / name for name in _WEIGHTS if (folder / name).exists()][:1]
    if (folder / CONFIG).exists():
        found += [folder / name for name in _ADAPTERS if (folder / name).exists()][:1]
    found += [file for file in (folder / METADATA,) if file.exists()]
    if found:
        return found
    names = [path for path in folder.iterdir() if not path.name.startswith(".")]
    indices = [path for path in names if is_index(path)]
    if len(indices) == 1:
        return indices
    single = [path for path in names if path.suffix == ".safetensors" and not path.is_dir()]
    return single if len(single) == 1 and (folder / "config.json").exists() else []


def read_folder(folder: Path, name: str) -> CheckpointFile:
    """Returns the checkpoint that a folder is; ``name`` is what the user gave.

    Raises:
        CheckpointError: The folder is not a checkpoint, is more than one, or is broken.
    """
    found = _checkpoint_files(folder)
    if len(found) > 1:
        raise CheckpointError(
            f"{folder} holds more than one checkpoint: {', '.join(f.name for f in found)}",
            f"Give one, for example {found[0]}",
        )
    if not found:
        raise _no_checkpoint_error(folder)
    (file,) = found
    if file.name == METADATA:
        return read_distributed(folder, name)
    if file.name in _ADAPTERS:
        return read_adapter(file, name, folder)
    if is_index(file):
        return read_index(file, name, folder)
    content, metadata = read_file(file, str(file))
    return _file_with_config(folder, name, content, metadata, [file])


def optimizer_beside(path: Path) -> Path | None:
    """Returns the optimiser state that transformers or accelerate wrote beside weights, if any."""
    if path.is_dir():
        folder = path
    elif path.name in _WEIGHTS:
        folder = path.parent
    else:
        return None
    files = (folder / name for name in _OPTIMIZERS)
    return next((file for file in files if file.exists()), None)


def _no_checkpoint_error(folder: Path) -> CheckpointError:
    names = {path.name for path in folder.iterdir()}
    if any(name.endswith(".distcp") for name in names):
        return CheckpointError(
            f"{folder} has parts of a distributed checkpoint and no {METADATA}, which is written "
            "last",
            "It may be incomplete: save or copy it again",
        )
    if CONFIG in names:
        return CheckpointError(
            f"{folder} has the {CONFIG} of an adapter and no {' or '.join(_ADAPTERS)}",
            "It may be incomplete: save or copy it again",
        )
    if "config.json" in names:
        return CheckpointError(
            f"{folder} has a config.json and none of {', '.join(_WEIGHTS)}",
            "Save the model with save_pretrained, or name a file in it",
        )
    found = _checkpoints_in(folder)
    example = f", such as {folder / found[-1]}" if found else ""
    return CheckpointError(
        f"{folder} is a folder, not a checkpoint file",
        consolidation_hint(folder) or f"Name a file in it{example}",
    )


def is_index(path: Path) -> bool:
    """Whether the name of a file is that of the index of a sharded checkpoint."""
    return bool(_INDEX.fullmatch(path.name))


def read_index(index: Path, name: str, path: Path) -> CheckpointFile:
    """Returns a sharded checkpoint.

    Args:
        index: The file that maps tensors to shards.
        name: The name that the user gave.
        path: The path of the checkpoint: the folder or the index.

    Raises:
        CheckpointError: A shard is missing or broken, or lacks a tensor that the index assigns
            to it.
    """
    folder = index.parent
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map", "It may belong to another program")
    shards: dict[str, list[str]] = {}
    for tensor, shard in weight_map.items():
        is_name = isinstance(shard, str) and Path(shard).name == shard and "\0" not in shard
        if not is_name or shard in {"", ".."}:
            raise CheckpointError(
                f"{index} says that {tensor!r} is in {shard!r}, which is not in its folder",
                "Shards lie beside their index",
            )
        shards.setdefault(shard, []).append(tensor)
    weights: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for shard, tensors in shards.items():
        file = folder / shard
        if not file.exists():
            raise CheckpointError(
                f"{index} names {shard!r}, which is not there",
                "The copy may be incomplete: copy the checkpoint again",
            )
        content, shard_metadata = read_file(file, str(file))
        metadata |= shard_metadata
        content = content if isinstance(content, Mapping) else {}
        missing = [t for t in tensors if not isinstance(content.get(t), Tensor)]
        if missing:
            raise CheckpointError(
                f"{file} has no tensor {missing[0]!r}, which {index.name} says is in it",
                "The shards and the index may belong to different checkpoints",
            )
        weights |= {tensor: content[tensor] for tensor in tensors}
    # Sorted, so that the result does not depend on the order of shards.
    ordered = dict(sorted(weights.items(), key=lambda item: natural_key(item[0])))
    files = [index, *(folder / shard for shard in sorted(shards))]
    return _file_with_config(path, name, ordered, metadata, files)


def read_adapter(file: Path, name: str, path: Path) -> CheckpointFile:
    """Returns an adapter, with its tensors under peft's names.

    Args:
        file: The file with its tensors.
        name: The name that the user gave.
        path: The path of the checkpoint: the folder or the file.

    Raises:
        CheckpointError: The adapter is broken or of a type that is not supported.
    """
    config = file.parent / CONFIG
    adapter = parse_config(read_json(config), config)
    content, _ = read_file(file, str(file))
    tensors = dict(state_dicts(content)).get("")
    if not tensors:
        raise CheckpointError(
            f"{file} contains no named tensors", "Save the adapter with save_pretrained"
        )
    return CheckpointFile(name, path, {"": tensors}, {}, (config, file), adapter=adapter)


def _file_with_config(
    path: Path, name: str, content: Any, metadata: Mapping[str, str], files: list[Path]
) -> CheckpointFile:
    """Creates a checkpoint file from weights and the config.json next to them, if any."""
    config = files[0].parent / "config.json"
    method = None
    if config.exists():
        method = _quantisation_method(read_json(config))
        files = [config, *files]
    return CheckpointFile(
        name, path, dict(state_dicts(content)), dict(metadata), tuple(files), quantised=method
    )


def _quantisation_method(config: dict[str, Any]) -> str | None:
    text_config = config.get("text_config")
    for part in (config, text_config if isinstance(text_config, dict) else {}):
        found = part.get("quantization_config")
        if isinstance(found, dict) and found:
            return f"config.json: {found.get('quant_method', 'quantization_config')}"
    return None
