"""Inspection of checkpoints, and export of the checkpoint at a point of a line."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from losscli.checkpoint import (
    Checkpoint,
    CheckpointFile,
    CheckpointLike,
    find_base,
    name_checkpoint,
    name_checkpoints,
    read,
)
from losscli.errors import CheckpointError, MismatchError, TableError, UsageError
from losscli.evaluation.spectral import normalise_stored
from losscli.registry import COMMANDS, command_of
from losscli.results import Result, read_summary
from losscli.settings import checked
from losscli.summaries import InspectionSummary
from losscli.table import Cell, Table
from losscli.weight_space.slices import Line
from losscli.weight_space.vectors import (
    Weights,
    can_move,
    cosine,
    distance,
    known_buffers,
    mismatches,
    norm,
    working_type,
)

__all__ = ["Lowest", "export", "inspect", "lowest"]

_MOST_KEYS = 30

# The num_batches_tracked of a layer for which A has none.
_NO_BATCHES = torch.tensor(0)


@checked()
def inspect(names: CheckpointLike | Iterable[CheckpointLike]) -> Result[InspectionSummary]:
    """Shows what one checkpoint holds, or how far apart two are, tensor by tensor.

    Of one that contains several state dicts, it shows these.

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
    differ = _other_versions(first, second)
    if not differ:
        return []
    more = f", as of {len(differ) - 1:,} more" if len(differ) > 1 else ""
    note = (
        f"{differ[0]}{more}. A model may convert the tensors of either as it loads them, and none "
        "is known here: to compare what they are then, load each into a model with "
        "load_state_dict, and save that model's state_dict()"
    )
    return [note]


def _other_versions(first: Checkpoint, second: Checkpoint) -> list[str]:
    """Lists modules of different versions, between which the meaning of tensors may differ."""
    return [
        f"{first.name} and {second.name} note different versions of {module or 'the model'}: "
        f"{dict(version)} and {dict(other)}"
        for module, version in first.versions.items()
        if (other := second.versions.get(module, version)) != version
        and not _counts_batches(first.weights, module, (version, other))
    ]


def _counts_batches(weights: Weights, module: str, versions: Iterable[Mapping[str, Any]]) -> bool:
    """Whether versions are those of a BatchNorm without and with num_batches_tracked."""
    start = f"{module}." if module else ""
    return f"{start}running_mean" in weights and all(
        dict(version) in ({"version": 1}, {"version": 2}) for version in versions
    )


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
            # Another model, or one that is quantised: what there is to see is still shown.
            checkpoints.append(file.select(None, under))
    return [
        replace(c, weights={n: _dequantised(t) for n, t in c.weights.items()}) for c in checkpoints
    ]


def _dequantised(tensor: Tensor) -> Tensor:
    return tensor.dequantize() if tensor.is_quantized else tensor


@dataclass(frozen=True)
class Lowest:
    """The lowest point of a table on one split.

    Attributes:
        alpha: Where it is.
        loss: The loss there.
        ties: How many points have that loss.
        summary: The summary next to the table; None if there is none.
    """

    alpha: float
    loss: float
    ties: int
    summary: Mapping[str, Any] | None


def lowest(csv: Path, split: str) -> Lowest:
    """Finds the lowest loss in a table of `interpolate`.

    Args:
        csv: The table.
        split: The split to look at.

    Returns:
        The point; of several as low the one of the lowest α. Losses that are not finite are
        passed over.

    Raises:
        TableError: The table or its summary cannot be read, or there is no finite loss.
        UsageError: The table is not one of `interpolate`, or has no such split.
    """
    table = Table.read(csv)
    if command_of(table.columns) is not COMMANDS["interpolate"]:
        raise UsageError(f"--csv {csv} is no table of interpolate", "Give the CSV of a line")
    if split not in table.unique("split"):
        known = ", ".join(map(str, table.unique("split"))) or "none"
        raise UsageError(f"{csv} has no split {split!r}", f"Its splits: {known}")
    rows = table.where("split", split)
    points = [
        (loss, alpha)
        for alpha, loss in zip(rows.floats("alpha"), rows.floats("loss"), strict=True)
        if math.isfinite(loss)
    ]
    if not points:
        raise TableError(f"{csv} has no finite loss on {split}", "Choose a point with --alpha")
    least = min(loss for loss, _ in points)
    if not all(math.isfinite(alpha) for loss, alpha in points if loss == least):
        raise TableError(
            f"{csv}: the lowest loss on {split}, {least:.6g}, stands in a row without an alpha",
            "Give the CSV as written by losscli, or choose a point with --alpha",
        )
    loss, alpha = min(points)
    return Lowest(alpha, loss, sum(other == loss for other, _ in points), _summary_beside(csv))


def _summary_beside(csv: Path) -> dict[str, Any] | None:
    """Reads the summary that was written with a table; None if there is no file."""
    path = csv.with_suffix(".json")
    summary = read_summary(path, COMMANDS["interpolate"])
    if not summary and path.exists():
        raise TableError(f"{path} is no summary of {csv}", "Give both as one run wrote them")
    return summary or None


@checked()
def export(
    a: CheckpointLike,
    b: CheckpointLike,
    alpha: float,
    *,
    summary: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Makes the checkpoint at a point of the line, θ(α) = A + α (B − A).

    Floating-point tensors move, in float32 or wider, and have the wider of the types that the two
    store them in; whole-number tensors and the extra state of modules are A's. What one alone has
    of BatchNorm's ``num_batches_tracked`` is kept; of the old and the new names of weight_norm
    those of A are. Between the ends the singular vectors of spectral normalisation are computed
    from the weights.

    Args:
        a: The checkpoint at α = 0.
        b: The checkpoint at α = 1.
        alpha: The point.
        summary: That of an interpolation, if the point shall be one of its: then what stayed
            there by ``--buffers``, ``--only`` or ``--except`` stays here.

    Returns:
        The checkpoint, with A's metadata.

    Raises:
        CheckpointError: A file cannot be read.
        MismatchError: The two do not have the same tensors, or are not those of the summary.
        UsageError: α is not finite, or the point cannot be made from the two alone.
    """
    if not abs(alpha) <= 1e30:
        raise UsageError(f"--alpha {alpha} is no point of the line", "Give a number")
    if not (summary is None or _is_line_summary(summary)):
        raise UsageError("summary is not that of interpolate", "Give result.summary")
    a, b = name_checkpoint(a, "A"), name_checkpoint(b, "B")
    files, name = [read(a), read(b)], find_base([a, b])
    base = read(name).select(None) if name and any(f.adapter for f in files) else None
    files[0].refuse_quantised()
    first = files[0].select(None, base)
    first, second = _open_pair(files[1], first, base)
    if summary is not None:
        _require_same_checkpoints((first, second), summary, alpha)
    ends = _fixed_alphas(first.weights, summary)
    weights = {
        name: _interpolate(t, second.weights[name], ends.get(name, alpha))
        for name, t in first.weights.items()
    }
    if alpha not in {0.0, 1.0}:
        weights |= normalise_stored(weights)
    name = f"{a} + {alpha} ({b} − {a})"
    return Checkpoint(name, weights, first.metadata, versions=first.versions, extra=first.extra)


def _is_line_summary(summary: Any) -> bool:
    """Whether a summary is one of `interpolate`."""
    match summary:
        case {
            "command": "interpolate",
            "buffers": str(),
            "checkpoints": [{"name": str()}, {"name": str()}],
        }:
            return True
    return False


def _open_pair(
    file: CheckpointFile, first: Checkpoint, base: Checkpoint | None
) -> tuple[Checkpoint, Checkpoint]:
    """Opens B under the names of A; num_batches_tracked of only one of them is kept in both."""
    refused: MismatchError | None = None
    for names in _alternative_names(first.weights):
        expected = {name: first.weights.get(own, _NO_BATCHES) for name, own in names.items()}
        try:
            second = _select_matching(file, expected, base, first.name)
            break
        except MismatchError as error:
            refused = refused or error
    else:
        assert refused is not None
        cure = (
            "No model is known here that would translate names: load B into a model with "
            "load_state_dict, and save that model's state_dict()"
        )
        raise MismatchError(refused.what, refused.cure or cure)
    weights = {names[name]: t for name, t in second.weights.items()}
    second = replace(second, weights={**first.weights, **weights})
    alone = {name: t for name, t in weights.items() if name not in first.weights}
    first = replace(first, weights={**first.weights, **alone})
    if differ := _other_versions(first, second):
        raise MismatchError(
            differ[0],
            "No model is known here that would convert them: load each into a model with "
            "load_state_dict, and save that model's state_dict()",
        )
    return first, second


def _select_matching(
    file: CheckpointFile, expected: Weights, base: Checkpoint | None, whose: str
) -> Checkpoint:
    """Opens a checkpoint that must have the expected tensors; an adapter adds those of its base."""
    found = file.select(expected, base, whose)
    if wrong := mismatches(found.weights, expected):
        raise MismatchError(f"{found.name} does not fit {whose}: {'; '.join(wrong)}")
    return found


def _alternative_names(weights: Weights) -> Iterator[dict[str, str]]:
    """Lists the names by which a file may have the tensors of a state dict, as PyTorch takes them.

    Yields:
        Those names and the state dict's own: the same; without the numbers of batches that
        BatchNorm counts, and with them; those of the other ``weight_norm``.
    """
    own = {name: name for name in weights}
    yield own
    counts = {
        f"{name.removesuffix('running_mean')}num_batches_tracked"
        for name in own
        if name.rpartition(".")[2] == "running_mean"
    }
    if counts:
        yield {name: name for name in own if name not in counts}
        yield own | {name: name for name in sorted(counts)}
    normed = {_other_weight_norm(name): name for name in own}
    if normed.keys() != own.keys() and len(normed) == len(own):
        yield normed


def _other_weight_norm(name: str) -> str:
    """The name that the other ``weight_norm`` gives a tensor: weight_g is original0."""
    if new := re.fullmatch(r"(.*\.)?parametrizations\.(\w+)\.original([01])", name):
        return f"{new[1] or ''}{new[2]}_{'gv'[int(new[3])]}"
    if old := re.fullmatch(r"(.*\.)?(\w+)_([gv])", name):
        return f"{old[1] or ''}parametrizations.{old[2]}.original{'gv'.index(old[3])}"
    return name


def _require_same_checkpoints(
    checkpoints: Sequence[Checkpoint], summary: Mapping[str, Any], alpha: float
) -> None:
    """Checks that checkpoints are those of a summary, by their digests."""
    made_of = summary["checkpoints"]
    found = [checkpoint.sha256() for checkpoint in checkpoints]
    for letter, checkpoint, digest, expected in zip("AB", checkpoints, found, made_of, strict=True):
        # A file may hold several state dicts: then both must name the same.
        keys = {name.partition("#")[2] for name in (checkpoint.name, expected["name"])} - {""}
        if digest != expected.get("sha256") or len(keys) > 1:
            swapped = found == [other.get("sha256") for other in reversed(made_of)]
            raise MismatchError(
                f"{checkpoint.name} is not the {letter} of the table, which is {expected['name']}",
                "Swap A and B" if swapped else f"Give that, or --alpha {alpha} for these two",
            )


def _fixed_alphas(weights: Weights, summary: Mapping[str, Any] | None) -> dict[str, float]:
    """Returns the α at which tensors stay that do not move on the line of a summary."""
    if summary is None:
        return {}
    cure = "Give --alpha, which moves every floating-point tensor"
    if summary["buffers"] == "recalibrate":
        raise UsageError("the table has --buffers recalibrate, which needs model and data", cure)
    match summary.get("stays"):
        case {"a": [*at_a], "b": [*at_b]}:
            stays = {
                str(name): alpha for alpha, names in ((0.0, at_a), (1.0, at_b)) for name in names
            }
        case _:
            raise UsageError("the summary of the table does not tell what stays where it is", cure)
    # The model's names may lack the prefix that a wrapper put before those of the file.
    ends = {}
    for name, alpha in stays.items():
        fit = [n for n in weights if n == name] or [n for n in weights if n.endswith(f".{name}")]
        if len(fit) != 1:
            raise MismatchError(f"{name} stays where it is in the table, and is not in A", cure)
        ends[fit[0]] = alpha
    return ends


def _interpolate(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    if not can_move(a):
        return a.clone()
    dtype = torch.promote_types(a.dtype, b.dtype)
    # Of infinities there is no difference, and 0 and −0 are equal and not the same.
    if alpha in {0.0, 1.0} or torch.equal(a, b):
        return (b if alpha > 0.5 else a).to(dtype, copy=True)
    wide = working_type(a, b)
    return Line({}, {}).combine([a.to(wide), b.to(wide)], (alpha,)).to(dtype)


def _parameters(weights: Weights) -> Weights:
    """Returns the floating-point tensors except for known buffers."""
    buffers = set(known_buffers(weights))
    return {n: t for n, t in weights.items() if can_move(t) and n not in buffers}
