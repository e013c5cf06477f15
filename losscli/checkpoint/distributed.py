"""Read checkpoints of ``torch.distributed.checkpoint`` without a process group.

The classes in ``.metadata`` are never imported; stand-ins store their arguments. From the other
files, only tensors and the extra state of modules are read, each with ``weights_only``.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from losscli.checkpoint.names import EXTRA_STATE, StateDict, state_dicts
from losscli.checkpoint.pickles import ForbiddenPickleError, load
from losscli.checkpoint.standins import PATHS, StandIn, load_tensors
from losscli.checkpoint.state import CheckpointFile
from losscli.errors import CheckpointError, one_line
from losscli.files import open_regular, read_regular
from losscli.weight_space.vectors import Weights

__all__ = ["METADATA", "read_distributed"]

METADATA = ".metadata"


class _Tensor(StandIn):
    """TensorStorageMetadata."""


class _Bytes(StandIn):
    """BytesStorageMetadata, of a value that is not a tensor."""


class _Key(StandIn):
    """MetadataIndex."""


_METADATA = "torch.distributed.checkpoint.metadata"

# None of these imports a name or opens a file; each only stores its arguments.
_ALLOWED: dict[tuple[str, str], Any] = {
    (_METADATA, "Metadata"): StandIn,
    (_METADATA, "TensorStorageMetadata"): _Tensor,
    (_METADATA, "BytesStorageMetadata"): _Bytes,
    (_METADATA, "ChunkStorageMetadata"): StandIn,
    (_METADATA, "TensorProperties"): StandIn,
    (_METADATA, "_MEM_FORMAT_ENCODING"): StandIn,
    (_METADATA, "MetadataIndex"): _Key,
    (_METADATA, "StorageMeta"): StandIn,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): StandIn,
    ("torch.serialization", "_get_layout"): StandIn,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): dict,
    **{
        ("torch", name): value
        for name, value in vars(torch).items()
        if isinstance(value, torch.dtype)
    },
    **PATHS,
}


@dataclass(frozen=True)
class _Chunk:
    """A block of a tensor, or a value: the file and byte range of its data.

    Attributes:
        label: The name of the tensor or the value.
        offsets: The offsets in the tensor; None for a value.
        sizes: The sizes of the block.
        file: The file.
        start: The offset of the data in the file.
        length: The number of bytes.
    """

    label: str
    offsets: tuple[int, ...] | None
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int


def read_distributed(folder: Path, name: str) -> CheckpointFile:
    """Returns a distributed checkpoint with tensors on ``meta``; its ``fetch`` reads their values.

    Raises:
        CheckpointError: The metadata is broken or needs code to run.
    """
    where = f"{folder / METADATA}"
    try:
        metadata = load(read_regular(folder / METADATA), _ALLOWED)
        shapes, chunks, content = _parse_metadata(metadata, folder)
    except ForbiddenPickleError as error:
        raise CheckpointError(
            f"{where} is a pickle that would run code ({error.wanted}); nothing was run",
            "If you trust it, write it as one file with "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} FILE.pt",
        ) from None
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read: {error.strerror or error}") from None
    except CheckpointError:
        raise
    except Exception as error:  # noqa: BLE001 - a broken pickle raises anything
        raise CheckpointError(
            f"{where} is not the metadata of a distributed checkpoint ({one_line(error)})",
            "It may be incomplete: save or copy it again",
        ) from None
    labels = {id(tensor): label for label, tensor in shapes.items()}

    def fetch(weights: Weights) -> Weights:
        read: dict[int, Tensor] = {}

        def value(stored: Any) -> Any:
            if isinstance(stored, _Chunk):
                return _load(stored, name)
            if isinstance(stored, Tensor) and id(stored) not in read:
                read[id(stored)] = _read(
                    labels[id(stored)], stored, chunks[labels[id(stored)]], name
                )
            return read.get(id(stored), stored)

        tensors = {label: value(tensor) for label, tensor in weights.items()}
        extra = tree_map(value, weights.extra) if isinstance(weights, StateDict) else {}
        return StateDict(tensors, extra=extra)

    files = {chunk.file for parts in chunks.values() for chunk in parts}
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
        # The planner data maps each name to its nested keys; by default the name is the key.
        path = paths.get(label, (label,)) if isinstance(paths, dict) else (label,)
        if isinstance(entry, _Bytes) and any(map(_is_extra_state, path)):
            chunks[label] = [_chunk(label, None, (), stored, folder)]
            _insert_extra_state(content, path, chunks[label][0])
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
        if any(map(_is_extra_state, path)):
            _insert_extra_state(content, path, shapes[label])
        else:
            _insert(content, path, shapes[label])
    return shapes, chunks, content


def _insert(content: dict[Any, Any], path: Sequence[Any], value: Any) -> None:
    *keys, last = path
    for key in keys:
        content = content.setdefault(key, {})
    content[last] = value


def _is_extra_state(key: Any) -> bool:
    return isinstance(key, str) and key.rpartition(".")[2] == EXTRA_STATE


def _insert_extra_state(content: dict[Any, Any], path: Sequence[Any], value: Any) -> None:
    """Inserts a value of extra state, or a stand-in for a container with keys of unknown types.

    torch stores each value in nested dictionaries and lists on its own, and keys as strings.
    """
    first = next(i for i, key in enumerate(path) if _is_extra_state(key)) + 1
    unknown = (i for i, key in enumerate(path[first:], first) if not _is_string_key(key))
    end = next(unknown, None)
    _insert(content, path[:end], value if end is None else StandIn())


def _is_string_key(key: Any) -> bool:
    """Whether a stored key was a string, and neither an index nor another object such as 0."""
    return isinstance(key, str) and bool(re.match(r"(?!(True|False|None)$)[^\W\d]", key))


def _checked_sizes(numbers: Any) -> tuple[int, ...]:
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise ValueError("a size is not an integer")
    return tuple(numbers)


def _not_covered_once(
    blocks: list[tuple[tuple[int, ...], tuple[int, ...]]], shape: tuple[int, ...]
) -> str:
    """Returns why blocks are not a partition of a tensor; an empty string if they are one.

    Each block, which is not empty, is given by its offsets and its sizes. Blocks inside the tensor
    that do not overlap and have its volume cover it.
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
    offsets: tuple[int, ...] | None,
    sizes: tuple[int, ...],
    stored: Mapping[Any, Any],
    folder: Path,
) -> _Chunk:
    info = stored[label, offsets]
    file, (start, length) = info["relative_path"], _checked_sizes((info["offset"], info["length"]))
    if not isinstance(file, str) or Path(file).name != file or "\0" in file:
        raise CheckpointError(
            f"{folder / METADATA} says that {label!r} is in {file!r}, which is not in the folder",
            "Keep the parts of a distributed checkpoint beside their .metadata",
        )
    if info["transform_descriptors"]:
        raise CheckpointError(
            f"{folder / METADATA}: {label!r} was written through {info['transform_descriptors']}, "
            "which is not supported",
            "Save it without extensions",
        )
    return _Chunk(label, offsets, sizes, folder / file, start, length)


def _read(label: str, shape: Tensor, chunks: list[_Chunk], name: str) -> Tensor:
    """Reads a tensor from its chunks."""
    try:
        result = torch.empty(shape.shape, dtype=shape.dtype)
    except RuntimeError:
        raise CheckpointError(
            f"{name}: {label!r} of shape {list(shape.shape)} does not fit in memory",
            "The copy may be incomplete: copy the checkpoint again",
        ) from None
    for chunk in chunks:
        content = _load(chunk, name)
        kind = (tuple(content.shape), content.dtype) if isinstance(content, Tensor) else None
        if kind != (chunk.sizes, result.dtype):
            raise CheckpointError(
                f"{name}: {label!r} is not at its place in {chunk.file}",
                "The copy may be incomplete: copy the checkpoint again",
            )
        assert chunk.offsets is not None
        region = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
        result[region] = content.detach()
    return result


def _load(chunk: _Chunk, name: str) -> Any:
    """Reads a block or a value, each of which is a torch file inside a part."""
    try:
        with open_regular(chunk.file) as file:
            file.seek(chunk.start)
            return load_tensors(io.BytesIO(file.read(chunk.length)))
    except OSError as error:
        raise CheckpointError(
            f"{name}: {chunk.file} cannot be read: {error.strerror or error}",
            "The copy may be incomplete: copy the checkpoint again",
        ) from None
    except Exception as error:  # noqa: BLE001 - a broken part makes torch raise anything
        raise CheckpointError(
            f"{name}: {chunk.label!r} cannot be read from {chunk.file} ({type(error).__name__})",
            "It may be incomplete: save or copy it again",
        ) from None
