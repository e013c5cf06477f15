"""Looking into checkpoints, and making the checkpoint at a point of a line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from losscli.checkpoint import Checkpoint, read
from losscli.errors import MismatchError, UsageError
from losscli.geometry import Line
from losscli.results import Result
from losscli.table import Cell, Table
from losscli.weights import Weights, cosine, distance, mismatches, norm

__all__ = ["export", "inspect"]


def inspect(names: Sequence[str]) -> Result:
    """Shows what one checkpoint holds, or how far apart two are, tensor by tensor.

    Args:
        names: One checkpoint or two.

    Returns:
        For one checkpoint a table of its tensors' shapes, types and norms; for two of their
        distances, ‖B − A‖, and cosines. The summary says what does not match.

    Raises:
        UsageError: There are not one or two names.
        CheckpointError: A file cannot be read.
    """
    if len(names) not in {1, 2}:
        raise UsageError(f"inspect takes one checkpoint or two, not {len(names)}")
    checkpoints = [read(name).select(None) for name in names]
    first = checkpoints[0]
    summary: dict[str, Any] = {
        "command": "inspect",
        "checkpoints": [
            {
                "name": c.name,
                "path": str(c.path),
                "sha256": c.sha256(),
                "tensors": len(c.weights),
                "values": sum(t.numel() for t in c.weights.values()),
                "bytes": sum(t.nbytes for t in c.weights.values()),
                "norm": norm(_floating(c.weights)),
                "metadata": dict(c.metadata),
            }
            for c in checkpoints
        ],
    }
    columns = ["tensor", "shape", "dtype", "values", "norm"]
    described: dict[str, list[Cell]] = {
        name: [name, "×".join(map(str, t.shape)), str(t.dtype).removeprefix("torch."), t.numel(),
               norm({"": t})]
        for name, t in first.weights.items()
    }  # fmt: skip
    if len(checkpoints) == 1:
        return Result(Table.build(columns, described.values()), summary)
    other = checkpoints[1]
    shared = [
        name
        for name, t in first.weights.items()
        if name in other.weights and other.weights[name].shape == t.shape
    ]
    summary["mismatches"] = mismatches(other.weights, first.weights)
    moving = [n for n in shared if first.weights[n].is_floating_point()]
    summary["distance"] = distance(first.weights, other.weights, moving)
    rows = (
        [
            *described[name],
            norm({"": other.weights[name]}),
            distance({"": first.weights[name]}, {"": other.weights[name]}),
            cosine(first.weights[name], other.weights[name]),
        ]
        for name in shared
    )
    return Result(Table.build([*columns, "norm_b", "distance", "cosine"], rows), summary)


def export(a: str, b: str, alpha: float) -> Checkpoint:
    """Makes the checkpoint at a point of the line, θ(α) = A + α (B − A).

    Floating-point tensors move, in float32 or wider, and keep the type they are stored in;
    whole-number tensors are A's.

    Args:
        a: The checkpoint at α = 0.
        b: The checkpoint at α = 1.
        alpha: The point.

    Returns:
        The checkpoint, with A's metadata.

    Raises:
        CheckpointError: A file cannot be read.
        MismatchError: The two do not have the same tensors.
        UsageError: α is not finite.
    """
    if not abs(alpha) <= 1e30:
        raise UsageError(f"--alpha {alpha} is no point of the line", "Give a number")
    first = read(a).select(None)
    second = read(b).select(first.weights)
    if wrong := mismatches(second.weights, first.weights):
        raise MismatchError(f"{b} does not fit {a}: {'; '.join(wrong)}")
    weights = {name: _between(t, second.weights[name], alpha) for name, t in first.weights.items()}
    return Checkpoint(f"{a} + {alpha} ({b} − {a})", weights, first.metadata)


def _between(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    if not a.is_floating_point() or torch.equal(a, b):
        return a.clone()
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return Line({}, {}).combine([a.to(wide), b.to(wide)], (alpha,)).to(a.dtype)


def _floating(weights: Weights) -> Weights:
    return {name: t for name, t in weights.items() if t.is_floating_point()}
