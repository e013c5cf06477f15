"""``losscli plane``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from losscli.cli.console import Console
from losscli.cli.options import KeepOrder, Write, with_console, with_output, with_settings
from losscli.cli.report import (
    format_examples,
    format_moving,
    format_number,
    format_ties,
    task_lines,
)
from losscli.cli.run_study import expand_names, run_study
from losscli.errors import printable
from losscli.results import Result
from losscli.settings import Settings
from losscli.summaries import PlaneSummary

if TYPE_CHECKING:
    from losscli.studies.base import Study

__all__ = ["plane", "report"]

_PANEL = "The plane"


@with_console
@with_output
@with_settings
def plane(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CKPT",
            help="One checkpoint: random directions. Three: the plane through them. With --pca a "
            "path: its checkpoints, a folder of them, or - for names on stdin.",
            show_default=False,
        ),
    ],
    settings: Settings,
    write: Write,
    console: Console,
    pca: Annotated[
        bool,
        typer.Option(
            "--pca",
            help="The plane of a path's first two principal components.",
            rich_help_panel=_PANEL,
        ),
    ] = False,
    points: Annotated[
        int,
        typer.Option(
            "--points", metavar="N", help="Values of each coordinate.", rich_help_panel=_PANEL
        ),
    ] = 31,
    range_: Annotated[
        tuple[float, float] | None,
        typer.Option(
            "--range",
            metavar="LO HI",
            help="The lowest and the highest value of both coordinates. By default a box around "
            "the checkpoints, or -1 1 for random directions.",
            rich_help_panel=_PANEL,
            show_default=False,
        ),
    ] = None,
    surface: Annotated[
        bool,
        typer.Option(
            "--surface", help="Draw the surface in 3-D beside the contours.", rich_help_panel=_PANEL
        ),
    ] = False,
    keep_order: KeepOrder = False,
) -> None:
    """Loss in a plane of weight space, with each checkpoint's true loss and distance from it.

    The plane through three checkpoints, along two random filter-normalised directions from one, or
    of the principal components of a path.
    """

    def plan() -> Study:
        from losscli.studies.plane import Plane

        return Plane.plan(
            names,
            settings,
            pca=pca,
            points=points,
            range_=range_,
            surface=surface,
            keep_order=keep_order,
            ranks=console.ranks,
        )

    names = expand_names(checkpoints, console.ranks)
    run_study("plane", checkpoints, plan, write, console)


def report(result: Result[PlaneSummary]) -> str:
    """Describes the result of a plane.

    Args:
        result: The result of a plane.

    Returns:
        Lines of text.
    """
    summary = result.summary
    names = [printable(c["name"]) for c in summary["checkpoints"]]
    letters = "ABC" if summary["plane"] == "points" else ""
    if letters or len(names) == 1:
        rows = [(letters[t : t + 1] or "at (0, 0)", name) for t, name in enumerate(names)]
    else:
        rows = [("first", names[0]), ("last, at (0, 0)", names[-1])]
    ranges = {"x": summary["x_range"], "y": summary["y_range"]}
    for axis, letter in zip(summary["axes"], ranges, strict=True):
        low, high = ranges[letter]
        explained = axis["explained_variance"]
        share = "" if explained is None else f", {explained:.1%} of the variance"
        rows.append((letter, f"{axis['name']}{share}, from {low:g} to {high:g}"))
    rows.append(("moving", format_moving(summary)))
    if summary["plane"] == "pca":
        size = max(abs(x) for values in ranges.values() for x in values)
        off = summary["off_plane"]
        # The axes are float32, so smaller distances are rounding errors.
        rows.append(("off the plane", f"up to {off:.4g}" if off > 1e-6 * size else "none"))
    lines = [*task_lines(summary, 16), *(f"{label:<16}{text}" for label, text in rows)]
    for name, split in summary["splits"].items():
        lines += ["", f"{printable(name)}, {format_examples(summary, name)}"]
        losses = split["checkpoints"]
        if len(losses) <= len("ABC"):
            findings = [
                (f"loss at {letters[t : t + 1] or '(0, 0)'}", format_number(loss))
                for t, loss in enumerate(losses)
            ]
        else:
            findings = [
                ("loss, first", format_number(losses[0])),
                ("loss, last", format_number(losses[-1])),
            ]
        lowest = split["lowest"]
        if lowest is None:
            findings.append(("lowest seen", "none: no point of the plane has a finite loss"))
        else:
            where = f"({lowest['x']:.4g}, {lowest['y']:.4g})"
            least = f"{format_number(lowest['loss'])} at {where} of the plane"
            findings.append(("lowest seen", least + format_ties(lowest["ties"])))
            findings.append(("highest seen", format_number(split["highest_loss"])))
        lines += [f"  {label:<16}{text}" for label, text in findings]
    return "\n".join(lines) + "\n"
