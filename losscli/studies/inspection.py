"""The tensors of one checkpoint, or the differences of two."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from losscli.checkpoint import (
    Checkpoint,
    CheckpointFile,
    CheckpointLike,
    name_checkpoints,
    read,
)
from losscli.errors import CheckpointError, MismatchError, UsageError
from losscli.registry import COMMANDS
from losscli.results.result import Result
from losscli.results.summaries import InspectionSummary
from losscli.settings import checked
from losscli.studies.opening import differing_versions
from losscli.table import Cell, Table
from losscli.weight_space.vectors import (
    Weights,
    can_move,
    cosine,
    distance,
    known_buffers,
    mismatches,
    norm,
)

__all__ = ["inspect"]

_MOST_KEYS = 30


@checked()
def inspect(names: CheckpointLike | Iterable[CheckpointLike]) -> Result[InspectionSummary]:
    """Shows what one checkpoint holds, or how far two differ, tensor by tensor.

    For a file with several state dicts, it lists these.

    Args:
        names: One checkpoint or two: names of files, state dicts, or modules.

    Returns:
        For one checkpoint a table of its tensors' shapes, types and norms; for two of their
        distances, ‖B − A‖, and cosines. The summary says what does not match. For one of several
        state dicts a table of their sizes and norms, by the keys that choose them.

    Raises:
        UsageError: There are not one or two names.
        CheckpointError: A file cannot be read.
    """
    names = name_checkpoints(names)
    if len(names) not in {1, 2}:
        raise UsageError(f"inspect takes one checkpoint or two, not {len(names)}")
    files = [read(name) for name in names]
    if len(files) == 1 and len(files[0].model_candidates) > 1:
        return _inspect_state_dicts(files[0])
    first, *others = checkpoints = _open(files)
    summary: InspectionSummary = {
        "command": "inspect",
        "checkpoints": [
            {
                "name": c.name,
                "path": None if c.path is None else str(c.path),
                "sha256": c.sha256(),
                "tensors": len(c.weights),
                "values": sum(t.numel() for t in c.weights.values()),
                "bytes": sum(t.nbytes for t in c.weights.values()),
                "norm": norm(_parameters(c.weights)),
                "metadata": dict(c.metadata),
            }
            for c in checkpoints
        ],
    }
    summary["buffers"] = known_buffers(first.weights)
    summary["notes"] = []
    columns = ["tensor", "shape", "dtype", "values", "norm"]
    described: dict[str, list[Cell]] = {
        name: [name, "×".join(map(str, t.shape)), str(t.dtype).removeprefix("torch."), t.numel(),
               norm({"": t})]
        for name, t in first.weights.items()
    }  # fmt: skip
    if not others:
        return Result(Table.build(columns, described.values()), summary, COMMANDS["inspect"].draw)
    (other,) = others
    shared = [
        name
        for name, t in first.weights.items()
        if name in other.weights and other.weights[name].shape == t.shape
    ]
    summary["mismatches"] = mismatches(other.weights, first.weights)
    summary["notes"] = _version_notes(first, other)
    parameters = _parameters({name: first.weights[name] for name in shared})
    summary["distance"] = distance(first.weights, other.weights, parameters)
    rows = (
        [
            *described[name],
            norm({"": other.weights[name]}),
            distance({"": first.weights[name]}, {"": other.weights[name]}),
            cosine(first.weights[name], other.weights[name]),
        ]
        for name in shared
    )
    return Result(
        Table.build([*columns, "norm_b", "distance", "cosine"], rows),
        summary,
        COMMANDS["inspect"].draw,
    )


def _version_notes(first: Checkpoint, second: Checkpoint) -> list[str]:
    """Notes on module versions by which a model would convert the tensors of one of two."""
    differ = differing_versions(first, second)
    if not differ:
        return []
    more = f", as of {len(differ) - 1:,} more" if len(differ) > 1 else ""
    note = (
        f"{differ[0]}{more}. A model may convert the tensors of either as it loads them; to "
        "compare the converted tensors, load each into a model with load_state_dict, and save "
        "that model's state_dict()"
    )
    return [note]


def _inspect_state_dicts(file: CheckpointFile) -> Result[InspectionSummary]:
    """Lists the state dicts of a file that holds several."""
    for label, weights in file.candidates.items():
        file.require_dense(label, weights)
    parts = _group_by_prefix(file.candidates)
    counted = {
        key: (len(tensors), sum(t.numel() for t in tensors), sum(t.nbytes for t in tensors))
        for key, tensors in (
            (key, [t for weights in found for t in weights.values()])
            for key, found in parts.items()
        )
    }
    rows: list[list[Cell]] = [
        [key, *counted[key], math.hypot(*(_norm_of(file, weights) for weights in found))]
        for key, found in parts.items()
    ]
    tensors, values, size = (sum(column) for column in zip(*counted.values(), strict=True))
    summary: InspectionSummary = {
        "command": "inspect",
        "checkpoints": [
            {
                "name": file.name,
                "path": None if file.path is None else str(file.path),
                "sha256": file.checkpoint({}).sha256(),
                "tensors": tensors,
                "values": values,
                "bytes": size,
                "metadata": dict(file.metadata),
            }
        ],
        "state_dicts": list(file.candidates),
        "notes": [],
    }
    return Result(
        Table.build(["key", "tensors", "values", "bytes", "norm"], rows),
        summary,
        COMMANDS["inspect"].draw,
    )


def _group_by_prefix(candidates: Mapping[str, Weights]) -> dict[str, list[Weights]]:
    """Groups state dicts by prefixes of their keys if there are too many."""
    # An optimiser may hold one for each tensor of the model.
    found: dict[str, list[Weights]] = {}
    for depth in range(1, max(key.count(".") for key in candidates) + 2):
        groups: dict[str, list[Weights]] = {}
        for key, weights in candidates.items():
            groups.setdefault(".".join(key.split(".")[:depth]), []).append(weights)
        if len(found) > 1 and len(groups) > _MOST_KEYS:
            break
        found = groups
    return found


def _norm_of(file: CheckpointFile, weights: Weights) -> float:
    """Returns the norm of a state dict; one tensor is read at a time."""
    return math.hypot(
        *(
            norm({name: _dequantised(t) for name, t in file.fetch({name: tensor}).items()})
            for name, tensor in _parameters(weights).items()
        )
    )


def _open(files: Sequence[CheckpointFile]) -> list[Checkpoint]:
    """Opens one or two; the second under the names of the first, where it has the same tensors."""
    base = next((file for file in files if not file.adapter), None)
    under = base.select(None) if base and len(files) > 1 and any(f.adapter for f in files) else None
    checkpoints = [files[0].select(None, under)]
    for file in files[1:]:
        try:
            checkpoints.append(file.select(checkpoints[0].weights, under))
        except (CheckpointError, MismatchError):
            # Another or a quantised model, which is shown under its own names.
            checkpoints.append(file.select(None, under))
    return [
        replace(c, weights={n: _dequantised(t) for n, t in c.weights.items()}) for c in checkpoints
    ]


def _dequantised(tensor: Tensor) -> Tensor:
    return tensor.dequantize() if tensor.is_quantized else tensor


def _parameters(weights: Weights) -> Weights:
    """Returns the floating-point tensors except for known buffers."""
    buffers = set(known_buffers(weights))
    return {n: t for n, t in weights.items() if can_move(t) and n not in buffers}
