"""Figures: tables in, a matplotlib Figure out, and its bytes; nothing is evaluated here."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from losscli.errors import UsageError
from losscli.plotting.barriers import draw_barriers
from losscli.plotting.check import draw_check
from losscli.plotting.inspection import draw_inspection
from losscli.plotting.interpolation import draw_interpolation
from losscli.plotting.layerwise import draw_layerwise
from losscli.plotting.plane import draw_plane
from losscli.plotting.style import Run, render
from losscli.plotting.trajectory import draw_trajectory

__all__ = [
    "Run",
    "draw",
    "draw_barriers",
    "draw_check",
    "draw_inspection",
    "draw_interpolation",
    "draw_layerwise",
    "draw_plane",
    "draw_trajectory",
    "render",
]


# Runs that have no picture together: why, and what helps.
_ALONE = {
    "check": ("one check cannot be laid over another", "Give one CSV of a check"),
    "barriers": ("one matrix cannot be laid over another", "Give one CSV of barriers"),
    "inspect": (
        "one inspection cannot be laid over another",
        "Inspect two checkpoints together",
    ),
    "plane": ("one plane cannot be laid over another", "Give one CSV of a plane"),
}


def draw(runs: Sequence[Run], *, title: str = "", log: bool = False) -> Figure:
    """Draws runs of one command.

    Args:
        runs: One or more.
        title: Stands above the panels.
        log: Makes the axis of the loss logarithmic.

    Returns:
        The figure, laid out and ready to `render`.

    Raises:
        UsageError: The runs are of several commands, or are several that have no picture
            together, or one is an inspection of several state dicts.
    """
    if any("key" in run.table.columns for run in runs):
        raise UsageError(
            "a checkpoint of several state dicts is not drawn", "Choose one with FILE#KEY"
        )
    commands = {run.table.command for run in runs}
    if len(commands) > 1:
        raise UsageError(
            f"tables of {' and '.join(sorted(commands))} have no axes in common",
            "Lay tables of one command over each other",
        )
    (command,) = commands
    if command in _ALONE and len(runs) > 1:
        raise UsageError(*_ALONE[command])
    run = runs[0]
    match command:
        case "check":
            return draw_check(run, title=title, log=log)
        case "barriers":
            return draw_barriers(run, title=title, log=log)
        case "inspect":
            return draw_inspection(run, title=title)
        case "plane":
            surface = bool(run.summary.get("surface"))
            return draw_plane(run, title=title, log=log, surface=surface)
        case "trajectory":
            return draw_trajectory(runs, title=title, log=log)
    if len(runs) == 1 and "blocks" in run.more:
        return draw_layerwise(run, title=title, log=log)
    return draw_interpolation(runs, title=title, log=log)
