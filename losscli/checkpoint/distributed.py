"""Read checkpoints of ``torch.distributed.checkpoint`` without a process group.

The classes in ``.metadata`` are never imported; stand-ins store their arguments. From the other
files, only tensors are read, each with ``weights_only``.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from losscli.checkpoint.names import state_dicts
from losscli.checkpoint.pickles import ForbiddenPickleError, load
from losscli.checkpoint.standins import PathText, StandIn, load_tensors
from losscli.checkpoint.state import CheckpointFile
from losscli.errors import CheckpointError, one_line
from losscli.files import open_regular, read_regular
from losscli.weight_space.vectors import Weights

__all__ = ["METADATA", "read_distributed"]

METADATA = ".metadata"


class _Tensor(StandIn):
    """TensorStorageMetadata."""


class _Key(StandIn):
    """MetadataIndex."""


class _Tuple(StandIn):
    """torch.Size."""

    def __new__(cls, items: Any = ()) -> Any:
        """Creates a tuple.

        Args:
            items: The items.

        Returns:
            The tuple.
        """
        return tuple(items)


_METADATA = "torch.distributed.checkpoint.metadata"

# None of these imports a name or opens a file; each only stores its arguments.
_ALLOWED: dict[tuple[str, str], Any] = {
    (_METADATA, "Metadata"): StandIn,
    (_METADATA, "TensorStorageMetadata"): _Tensor,
    (_METADATA, "BytesStorageMetadata"): StandIn,
    (_METADATA, "ChunkStorageMetadata"): StandIn,
    (_METADATA, "TensorProperties"): StandIn,
    (_METADATA, "_MEM_FORMAT_ENCODING"): StandIn,
    (_METADATA, "MetadataIndex"): _Key,
    (_METADATA, "StorageMeta"): StandIn,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): StandIn,
    ("torch.serialization", "_get_layout"): StandIn,
    ("torch", "Size"): _Tuple,
    ("collections", "OrderedDict"): dict,
    **{
        ("torch", name): value
        for name, value in vars(torch).items()
        if isinstance(value, torch.dtype)
    },
    **{
        (f"pathlib{module}", name): PathText
        for module in ("", "._local")  # since Python 3.13
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    },
}


@dataclass(frozen=True)
class _Chunk:
    """A block of a tensor: its offsets and sizes, and the file and byte range of its data."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int


def read_distributed(folder: Path, name: str) -> CheckpointFile:
    """Reads the metadata of a distributed checkpoint. The values of tensors are read later.

    Args:
        folder: The folder.
        name: The name that the user gave.

    Returns:
        The checkpoint file, with tensors on ``meta``; its ``fetch`` reads their values.

    Raises:
        CheckpointError: The metadata is broken or needs code to run.
    """
    where = f"{folder / METADATA}"
    try:
        metadata = load(read_regular(folder / METADATA), _ALLOWED)
        shapes, chunks, content = _parse_metadata(metadata, folder)
    except ForbiddenPickleError as error:
        raise CheckpointError(
            f"{where} is a pickle that wants to run code ({error.wanted}); none of it was run",
            "If you trust it, write it as one file with "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} FILE.pt",
        ) from None
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read: {error.strerror or error}") from None
    except CheckpointError:
        raise
    except Exception as error:  # noqa: BLE001 - a broken pickle raises anything
        raise CheckpointError(
            f"{where} is no metadata of a distributed checkpoint ({one_line(error)})",
            "Was its writing cut off?",
        ) from None
    labels = {id(tensor): label for label, tensor in shapes.items()}

    def fetch(weights: Weights) -> Weights:
        read: dict[int, Tensor] = {}
        for tensor in weights.values():
            if id(tensor) not in read:
                label = labels[id(tensor)]
                read[id(tensor)] = _read(label, tensor, chunks[label], name)
        return {label: read[id(tensor)] for label, tensor in weights.items()}

    files = {chunk.file for tensor_chunks in chunks.values() for chunk in tensor_chunks}
    return CheckpointFile(
        name,
        folder,
        dict(state_dicts(content)),
        {},
        (folder / METADATA, *sorted(files)),
        fetch=fetch,
    )


def _parse_metadata(
    metadata: Any, folder: Path
) -> tuple[dict[str, Tensor], dict[str, list[_Chunk]], dict[Any, Any]]:
    """Returns a meta tensor and the chunks for each name, and the nested state dicts."""
    stored = {
        (key["fqn"], None if key["offset"] is None else _checked_sizes(key["offset"])): info
        for key, info in metadata["storage_data"].items()
        if isinstance(key, _Key)
    }
    paths = metadata["planner_data"]
    shapes: dict[str, Tensor] = {}
    chunks: dict[str, list[_Chunk]] = {}
    content: dict[Any, Any] = {}
    for label, entry in metadata["state_dict_metadata"].items():
        if not isinstance(entry, _Tensor):
            continue
        dtype = entry["properties"].state[0]
        shape = _checked_sizes(entry["size"])
        if not isinstance(label, str) or not isinstance(dtype, torch.dtype):
            raise TypeError(label)
        blocks = [
            (_checked_sizes(c["offsets"]), _checked_sizes(c["sizes"])) for c in entry["chunks"]
        ]
        # A rank without any part of a tensor may have written an empty chunk.
        nonempty = [(offsets, sizes) for offsets, sizes in blocks if math.prod(sizes)]
        if why := _not_covered_once(nonempty, shape):
            raise CheckpointError(
                f"the chunks of tensor {label!r} in {folder} do not cover it exactly once: {why}",
                "Copy or save the checkpoint again",
            )
        chunks[label] = [
            _chunk(label, offsets, sizes, stored, folder) for offsets, sizes in nonempty
        ]
        shapes[label] = torch.empty(shape, dtype=dtype, device="meta")
        # The planner data maps each name to its nested keys; by default the name is the key.
        path = paths.get(label, (label,)) if isinstance(paths, dict) else (label,)
        *keys, last = path
        parent = content
        for key in keys:
            parent = parent.setdefault(key, {})
        parent[last] = shapes[label]
    return shapes, chunks, content


def _checked_sizes(numbers: Any) -> tuple[int, ...]:
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise ValueError("a size is no whole number")
    return tuple(numbers)


def _not_covered_once(
    blocks: list[tuple[tuple[int, ...], tuple[int, ...]]], shape: tuple[int, ...]
) -> str:
    """Returns why blocks are not a partition of a tensor; an empty string if they are one.

    Blocks inside the tensor that do not overlap and have its volume cover it.

    Args:
        blocks: The offsets and sizes of each block, which is not empty.
        shape: The shape of the tensor.
    """
    for offsets, sizes in blocks:
        if not len(offsets) == len(sizes) == len(shape):
            return f"one has {len(sizes)} dimensions and the tensor {len(shape)}"
        if any(o + s > n for o, s, n in zip(offsets, sizes, shape, strict=True)):
            return f"{list(sizes)} at {list(offsets)} reaches beyond {list(shape)}"
    # Sorted along the dimension with the most cuts, few earlier blocks can overlap with a block.
    cuts = [len(set(starts)) for starts in zip(*(offsets for offsets, _ in blocks), strict=True)]
    first = cuts.index(max(cuts)) if cuts else 0
    open_blocks: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for block in sorted(blocks, key=lambda block: block[0][first : first + 1]):
        if shape:
            start = block[0][first]
            open_blocks = [(o, s) for o, s in open_blocks if o[first] + s[first] > start]
        for other in open_blocks:
            if all(map(_overlap, block[0], block[1], other[0], other[1])):
                return (
                    f"{list(other[1])} at {list(other[0])} and {list(block[1])} at "
                    f"{list(block[0])} overlap"
                )
        open_blocks.append(block)
    covered = sum(math.prod(sizes) for _, sizes in blocks)
    if covered != math.prod(shape):
        return f"{covered:,} of its {math.prod(shape):,} numbers are in one"
    return ""


def _overlap(start: int, size: int, other_start: int, other_size: int) -> bool:
    return start < other_start + other_size and other_start < start + size


def _chunk(
    label: str,
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
    stored: Mapping[Any, Any],
    folder: Path,
) -> _Chunk:
    info = stored[label, offsets]
    file, (start, length) = info["relative_path"], _checked_sizes((info["offset"], info["length"]))
    if not isinstance(file, str) or Path(file).name != file or "\0" in file:
        raise CheckpointError(
            f"{folder / METADATA} says that {label!r} is in {file!r}, which is no file of the "
            "folder",
            "The parts of a distributed checkpoint lie beside their .metadata",
        )
    if info["transform_descriptors"]:
        raise CheckpointError(
            f"{folder / METADATA}: {label!r} was written through {info['transform_descriptors']}, "
            "which is not read",
            "Save it without extensions",
        )
    return _Chunk(offsets, sizes, folder / file, start, length)


def _read(label: str, shape: Tensor, chunks: list[_Chunk], name: str) -> Tensor:
    """Reads a tensor from its chunks, each of which is a torch file inside a part."""
    try:
        result = torch.empty(shape.shape, dtype=shape.dtype)
    except RuntimeError:
        raise CheckpointError(
            f"{name}: {label!r} of shape {list(shape.shape)} does not fit in memory",
            "Was the checkpoint copied whole?",
        ) from None
    for chunk in chunks:
        try:
            with open_regular(chunk.file) as file:
                file.seek(chunk.start)
                content = load_tensors(io.BytesIO(file.read(chunk.length)))
            if not isinstance(content, Tensor):
                raise TypeError("it holds no tensor")  # noqa: TRY301
            content = content.detach()
            if tuple(content.shape) != chunk.sizes or content.dtype != result.dtype:
                raise ValueError(f"it holds {list(content.shape)} {content.dtype}")  # noqa: TRY301
            region = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
            result[region] = content
        except OSError as error:
            raise CheckpointError(
                f"{name}: {chunk.file} cannot be read: {error.strerror or error}",
                "Was the checkpoint copied whole?",
            ) from None
        except Exception as error:  # noqa: BLE001 - a broken part makes torch raise anything
            raise CheckpointError(
                f"{name}: {label!r} cannot be read from {chunk.file} ({type(error).__name__})",
                "Was its writing cut off?",
            ) from None
    return result
