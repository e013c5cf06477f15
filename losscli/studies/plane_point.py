"""The checkpoint at a point of a plane that was evaluated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from losscli.checkpoint import Checkpoint
from losscli.errors import MismatchError, TableError, UsageError
from losscli.evaluation.objective import recalibrated
from losscli.evaluation.spectral import normalise_stored
from losscli.registry import COMMANDS, command_of
from losscli.results.result import read_summary
from losscli.settings import PathLike, Settings, checked
from losscli.studies.plane_layout import span_plane
from losscli.studies.problem import prepare
from losscli.studies.verification import made_checkpoint
from losscli.table import Table

__all__ = ["point_of_plane"]

# The settings of a run that its plane depends on, by their names in a summary.
_KEPT = (
    *("only", "except", "buffers", "seed", "dtype"),
    *("ignore_unexpected", "allow_missing", "rename"),
)


@checked(Settings)
def point_of_plane(csv: PathLike, at: tuple[float, float], **settings: Any) -> Checkpoint:
    """Makes the checkpoint at a point of a plane.

    The plane is spanned again from the checkpoints in the summary of the run, with its choice of
    tensors, its buffers and its seed.

    Args:
        csv: The table of the plane, with its summary next to it.
        at: x and y, which may be outside the range of the table.
        **settings: The model and the data of the run, unless metadata or ``losscli.toml`` name
            them. No code is taken from the summary.

    Returns:
        The checkpoint, with the metadata of the first. Its tensors have the widest of the types
        that the checkpoints store them in.

    Raises:
        TableError: There is no summary, or it is of another command.
        MismatchError: A checkpoint or the model is not that of the run.
        UsageError: The axes are eigenvectors, which are not stored, or x or y is not finite.
        LosscliError: Something else is missing, broken or does not fit.
    """
    path = Path(csv)
    if not all(abs(value) <= 1e30 for value in at):
        raise UsageError(f"--at {at[0]} {at[1]} is not a point of the plane", "Give two numbers")
    if command_of(Table.read(path).columns) is not COMMANDS["plane"]:
        raise UsageError(f"--plane {path} is not a table of plane", "Give the CSV of a plane")
    summary = read_summary(path.with_suffix(".json"), COMMANDS["plane"])
    if not summary:
        raise TableError(
            f"{path} has no summary {path.with_suffix('.json')} next to it",
            "Give both as written by one run",
        )
    if summary["plane"] == "hessian":
        raise UsageError(
            f"the axes of {path} are eigenvectors, which are not stored",
            "Choose a plane of other axes",
        )
    projected = sum(each["checkpoints"] for each in summary.get("paths", []))
    entries = summary["checkpoints"][: len(summary["checkpoints"]) - projected]
    kept: dict[str, Any] = {
        name + "_" * (name == "except"): summary[name] for name in _KEPT if name in summary
    }
    chosen = Settings(**{**settings, **kept})
    problem = prepare([entry["name"] for entry in entries], replace(chosen, metric=("none",)))
    for entry, now in zip(entries, problem.provenance["checkpoints"], strict=True):
        if entry.get("sha256") != now["sha256"]:
            raise MismatchError(
                f"{entry['name']} has changed since {path} was written",
                "Evaluate the plane again",
            )
    if problem.provenance["model"] != summary["model"]:
        raise MismatchError(
            f"{path} is of the model {summary['model']}, not of {problem.provenance['model']}",
            f"Give --model {summary['model']}",
        )
    combined = span_plane(problem, pca=summary["plane"] == "pca").combine(at, problem.working_type)
    first = problem.first.weights
    stored = {name: first[name].dtype for name in combined}
    for t in range(1, len(problem.names)):
        weights = problem.open(t).weights
        stored = {n: torch.promote_types(x, weights[n].dtype) for n, x in stored.items()}
    moved = {name: combined[name].to(dtype) for name, dtype in stored.items()}
    point = {**problem.place(problem.last.weights), **moved}
    if not all(torch.equal(tensor, first[name]) for name, tensor in moved.items()):
        point |= normalise_stored(point)
    point = dict(recalibrated(problem.objective, point))
    problem.unchanged()
    return made_checkpoint(problem, f"{path} at {at[0]}, {at[1]}", point)
