"""Checkpoints at points of a line or path, and weighted averages of checkpoints."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self, overload

import torch
from torch import Tensor

from losscli.checkpoint import (
    Checkpoint,
    CheckpointLike,
    find_base,
    name_checkpoint,
    name_checkpoints,
    read,
)
from losscli.errors import MismatchError, TableError, UsageError
from losscli.evaluation.spectral import normalise_stored
from losscli.registry import COMMANDS, command_of
from losscli.results.result import read_summary
from losscli.settings import PathLike, Settings, checked
from losscli.studies.checkpoints import changed
from losscli.studies.opening import open_pair
from losscli.studies.plane_point import point_of_plane
from losscli.table import Table
from losscli.weight_space.averages import average
from losscli.weight_space.digest import digest
from losscli.weight_space.slices import Line, PathKind, path_coefficients
from losscli.weight_space.vectors import Weights, can_move, working_type

__all__ = [
    "BendOf",
    "Lowest",
    "average_checkpoints",
    "digest_of_end",
    "export",
    "lowest",
    "parse_weights",
]

# How far the sum of weights that are floats may be from 1.
_TOLERANCE = 1e-9

_WEIGHT = r"-?(?:\d+/\d+|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
_WEIGHTS = re.compile(rf"{_WEIGHT}(?:-{_WEIGHT})*")


@dataclass(frozen=True)
class Lowest:
    """The lowest point of a table on one split.

    Attributes:
        alpha: Where it is.
        loss: The loss there.
        ties: The number of points with that loss.
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
        The point; of several with this loss, the one of the lowest α. Losses that are not finite
        are ignored.

    Raises:
        TableError: The table or its summary cannot be read, or there is no finite loss.
        UsageError: The table is not one of `interpolate`, or has no such split.
    """
    table = Table.read(csv)
    if command_of(table.columns) is not COMMANDS["interpolate"]:
        raise UsageError(f"--csv {csv} is not a table of interpolate", "Give the CSV of a line")
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
            f"{csv}: the lowest loss on {split}, {least:.6g}, is in a row without an alpha",
            "Give the CSV as written by losscli, or choose a point with --alpha",
        )
    loss, alpha = min(points)
    return Lowest(alpha, loss, sum(other == loss for other, _ in points), _summary_beside(csv))


def _summary_beside(csv: Path) -> dict[str, Any] | None:
    """Reads the summary that was written with a table; None if there is no file."""
    path = csv.with_suffix(".json")
    summary = read_summary(path, COMMANDS["interpolate"])
    if not summary and path.exists():
        raise TableError(f"{path} is not the summary of {csv}", "Give both as written by one run")
    return summary or None


@overload
def export(
    a: CheckpointLike,
    b: CheckpointLike,
    alpha: float,
    *,
    summary: Mapping[str, Any] | None = None,
) -> Checkpoint: ...
@overload
def export(a: Iterable[CheckpointLike], *, weights: tuple[float, ...]) -> Checkpoint: ...
@overload
def export(a: Iterable[CheckpointLike], *, t: float, kind: PathKind = "bezier") -> Checkpoint: ...
@overload
def export(*, plane: PathLike, at: tuple[float, float], **settings: Any) -> Checkpoint: ...
@checked(Settings)
def export(
    a: CheckpointLike | Iterable[CheckpointLike] | None = None,
    b: CheckpointLike | None = None,
    alpha: float | None = None,
    *,
    weights: tuple[float, ...] | None = None,
    t: float | None = None,
    kind: PathKind = "bezier",
    summary: Mapping[str, Any] | None = None,
    plane: PathLike | None = None,
    at: tuple[float, float] | None = None,
    **settings: Any,
) -> Checkpoint:
    """Makes the checkpoint at a point of a line, a path or a plane, or an average.

    A point of a line is θ(α) = A + α (B − A).

    Floating-point tensors move, in float32 or wider, and have the wider of the types that the two
    store them in; integer tensors and the extra state of modules are A's. A
    ``num_batches_tracked`` that only one of them has is kept; if one has the old and the other the
    new names of weight_norm, those of A are written. Between the ends the singular vectors of
    spectral normalisation are computed from the weights.

    Args:
        a: The checkpoint at α = 0; with ``weights`` or ``t`` all checkpoints, the first of which is
            A.
        b: The checkpoint at α = 1.
        alpha: The point.
        weights: The weights of the checkpoints in an average Σ wθ, which sum to 1.
        t: The point of the path that `connect` made: from A over the bends, in order, to B.
        kind: The kind of the path.
        summary: The summary of an interpolation: tensors that stayed there by ``--buffers``,
            ``--only`` or ``--except`` stay here too.
        plane: The table of a plane, STEM.csv, with STEM.json next to it. The plane is spanned again
            from the checkpoints in it, with their choice of tensors, buffers and seed.
        at: x and y on the plane, which may be outside the range of the table.
        **settings: For a plane: the ``model`` and ``data`` of the run, unless metadata or
            ``losscli.toml`` name them.

    Returns:
        The checkpoint, with A's metadata.

    Raises:
        CheckpointError: A file cannot be read.
        MismatchError: The checkpoints do not have the same tensors, or are not those of the
            summary.
        UsageError: α is not finite, the point cannot be made from the two alone, or the weights
            are not one number per checkpoint with sum 1.
    """
    if plane is not None or at is not None:
        if (
            plane is None
            or at is None
            or any(value is not None for value in (a, b, alpha, weights, t, summary))
        ):
            raise UsageError(
                "a point of a plane needs plane and at, and no other checkpoints, alpha, weights, "
                "t or summary",
                "Give plane and at",
            )
        return point_of_plane(plane, at, **settings)
    if settings:
        raise UsageError(f"{next(iter(settings))} has no effect without plane", "Leave it out")
    if weights is not None:
        if not (b is None and alpha is None and summary is None):
            raise UsageError(
                "weights are those of an average, which has no b, alpha or summary",
                "Give a list of checkpoints and weights",
            )
        names = name_checkpoints(a)
        _check_weights(weights, len(names))
        return average_checkpoints(names, weights)
    if t is not None:
        if not (b is None and alpha is None and summary is None):
            raise UsageError(
                "t is that of a path, which has no b, alpha or summary",
                "Give a list of checkpoints and t",
            )
        names = name_checkpoints(a)
        if len(names) < 3:
            raise UsageError(
                f"a path needs A, a bend and B, and got {len(names)} checkpoints",
                "For a point of a line give alpha",
            )
        if not 0 <= t <= 1:
            raise UsageError(f"t = {t:g} is not on the path", "Give a number from 0 to 1")
        return _point_of_path(names, t, kind)
    if b is None or alpha is None:
        raise UsageError(
            "export needs two checkpoints with alpha, a list of them with weights or t, or "
            "plane with at"
        )
    return _point_of_line(name_checkpoint(a, "A"), name_checkpoint(b, "B"), alpha, summary)


@dataclass(frozen=True)
class BendOf:
    """The entry ``key`` in the metadata of a bend, which describes its path.

    Attributes:
        kind: The kind of the path.
        number: The number of the bend, from 1.
        bends: The number of bends of the path.
        ends: The digests of A and of B, see `digest_of_end`.
        moving: The tensors that move along the path.
    """

    key: ClassVar[str] = "losscli.path"

    kind: str
    number: int
    bends: int
    ends: Sequence[str]
    moving: Sequence[str]

    def to_json(self) -> str:
        """Returns the text for the metadata."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> Self | None:
        """Reads the metadata of a bend; None for another checkpoint, or another format."""
        try:
            return cls(**json.loads(checkpoint.metadata[cls.key]))
        except (KeyError, TypeError, ValueError):
            return None


def digest_of_end(weights: Weights, moving: Iterable[str]) -> str:
    """Computes a digest of an end of a path.

    Args:
        weights: All tensors of the end; their names may have the prefix of a wrapper.
        moving: The tensors of the model that move along the path.

    Returns:
        The digest of those that move.
    """
    found = {}
    for name in moving:
        fit = _names_of(name, weights)
        if len(fit) == 1:
            found[name] = weights[fit[0]]
    return digest(found)


def _names_of(name: str, weights: Weights) -> list[str]:
    """Finds the names of a model's tensor in a file, which may have the prefix of a wrapper."""
    return [n for n in weights if n == name] or [n for n in weights if n.endswith(f".{name}")]


def _point_of_path(names: Sequence[str], t: float, kind: PathKind) -> Checkpoint:
    """Makes the point of a path; what does not move along it is that of the bend."""
    bends = [(name, read(name).select(None)) for name in names[1:-1]]
    described = [(name, bend, BendOf.read(bend)) for name, bend in bends]
    for k, (name, _, found) in enumerate(described, start=1):
        if found is None:
            continue
        if (found.number, found.bends) != (k, len(bends)):
            raise MismatchError(
                f"{name} is bend {found.number} of {found.bends} of its path, and is given as bend "
                f"{k} of {len(bends)}",
                "Give all bends of one path in their order",
            )
        if found.kind != kind:
            raise MismatchError(
                f"{name} is a bend of another kind of path", f"Give --kind {found.kind}"
            )
        for end, expected in zip((names[0], names[-1]), found.ends, strict=True):
            if digest_of_end(read(end).select(None).weights, found.moving) != expected:
                raise MismatchError(
                    f"{end} is not an end of the path of {name}",
                    "Give A, or the aligned B if B was aligned, as in the JSON of the path",
                )
    point = average_checkpoints(names, path_coefficients(kind, len(names), t))
    _, bend, found = described[0]
    if found is None:
        return point
    moving = set(found.moving)
    still = {n: tensor for n, tensor in bend.weights.items() if n not in moving}
    fixed = {
        n: next((x for own, x in still.items() if n == own or n.endswith(f".{own}")), tensor)
        for n, tensor in point.weights.items()
    }
    return replace(point, weights=fixed)


def parse_weights(text: str, number: int) -> tuple[float, ...]:
    """Parses the weights of checkpoints, such as ``0.5-0.3-0.2`` or ``1/3-1/3-1/3``.

    Args:
        text: The weights.
        number: The number of checkpoints.

    Returns:
        The weights, whose sum is 1.

    Raises:
        UsageError: The text is not as many numbers as there are checkpoints, with sum 1.
    """
    example = "-".join([f"1/{number}"] * number)
    if not _WEIGHTS.fullmatch(text):
        raise UsageError(
            f"--weights {text} is not a list of numbers",
            f"Join one per checkpoint by -, such as {example}",
        )
    try:
        exact = [Fraction(word) for word in re.findall(rf"({_WEIGHT})(?:-|$)", text)]
    except ZeroDivisionError:
        raise UsageError(f"--weights {text} divides by zero", f"Such as {example}") from None
    weights = tuple(map(float, exact))
    _check_weights(weights, number)
    return weights


def _check_weights(weights: Sequence[float], number: int) -> None:
    """Checks that there is a weight for each checkpoint, and that their sum is 1."""
    if number < 2:
        raise UsageError(f"an average needs two checkpoints or more, and got {number}")
    if len(weights) != number:
        raise UsageError(
            f"{len(weights)} weights for {number} checkpoints", "Give one weight per checkpoint"
        )
    if not abs(math.fsum(weights) - 1) <= _TOLERANCE:
        raise UsageError(
            f"the sum of the weights is {math.fsum(weights):.10g}, and must be 1",
            "A weight may be a fraction, such as 1/3",
        )


def _point_of_line(a: str, b: str, alpha: float, summary: Mapping[str, Any] | None) -> Checkpoint:
    if not abs(alpha) <= 1e30:
        raise UsageError(f"--alpha {alpha} is not a point on the line", "Give a number")
    if not (summary is None or _is_line_summary(summary)):
        raise UsageError("summary is not that of interpolate", "Give result.summary")
    files, name = [read(a), read(b)], find_base([a, b])
    base = read(name).select(None) if name and any(f.adapter for f in files) else None
    files[0].refuse_quantised()
    first = files[0].select(None, base)
    first, second = open_pair(files[1], first, base)
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


def _require_same_checkpoints(
    checkpoints: Sequence[Checkpoint], summary: Mapping[str, Any], alpha: float
) -> None:
    """Checks that checkpoints are those of a summary, by their digests."""
    made_of = summary["checkpoints"]
    found = [checkpoint.sha256() for checkpoint in checkpoints]
    for letter, checkpoint, own, expected in zip("AB", checkpoints, found, made_of, strict=True):
        # A file may hold several state dicts: then both must name the same.
        keys = {name.partition("#")[2] for name in (checkpoint.name, expected["name"])} - {""}
        if own != expected.get("sha256") or len(keys) > 1:
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
            raise UsageError("the summary of the table does not say which tensors stay", cure)
    ends = {}
    for name, alpha in stays.items():
        fit = _names_of(name, weights)
        if len(fit) != 1:
            raise MismatchError(f"{name} stays on the line of the table, and is not in A", cure)
        ends[fit[0]] = alpha
    return ends


def _interpolate(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    if not can_move(a):
        return a.clone()
    dtype = torch.promote_types(a.dtype, b.dtype)
    # Infinities have no difference, and 0 and −0 are equal but have different bits.
    if alpha in {0.0, 1.0} or torch.equal(a, b):
        return (b if alpha > 0.5 else a).to(dtype, copy=True)
    wide = working_type(a, b)
    return Line({}, {}).combine([a.to(wide), b.to(wide)], (alpha,)).to(dtype)


def average_checkpoints(
    names: Sequence[str], coefficients: Sequence[float] | None = None
) -> Checkpoint:
    """Averages checkpoints tensor by tensor, without a model.

    Args:
        names: Two or more.
        coefficients: One per checkpoint, which sum to 1; by default all are equal.

    Returns:
        The average, see `losscli.weight_space.averages.average`; metadata, versions and the extra
        state of modules are those of the first checkpoint. The singular vectors of spectral
        normalisation are computed from the weights.

    Raises:
        CheckpointError: A file cannot be read.
        ChangedError: A file was changed while it was read.
        MismatchError: The checkpoints do not have the same tensors.
    """
    base_name = find_base(names)
    files = [read(name) for name in names]
    base = read(base_name).select(None) if base_name and any(f.adapter for f in files) else None
    files[0].refuse_quantised()
    first = files[0].select(None, base)
    stamps = []
    for file in files:
        first, other = open_pair(file, first, base)
        stamps.append(other.stamp())
    del files, file, other

    def reopen(name: str, stamp: object) -> Weights:
        checkpoint = open_pair(read(name), first, base)[1]
        if checkpoint.stamp() != stamp:
            raise changed(name)
        return checkpoint.weights

    points = [partial(reopen, *pair) for pair in zip(names, stamps, strict=True)]
    weights = average(points, coefficients)
    vectors = normalise_stored(weights)
    # An average that is one of the checkpoints has its vectors.
    used = [k for k, _ in enumerate(names) if coefficients is None or coefficients[k]]
    if vectors and not _is_same_as(points[used[0]](), weights):
        weights |= vectors
    name = f"average of {names[0]} and {len(names) - 1} more"
    return Checkpoint(name, weights, first.metadata, versions=first.versions, extra=first.extra)


def _is_same_as(point: Weights, weights: Weights) -> bool:
    """Whether the tensors that an average moves are those of a point."""
    return all(torch.equal(point[n], tensor) for n, tensor in weights.items() if can_move(tensor))
