"""``losscli barriers``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from losscli.cli.console import Console
from losscli.cli.options import Write, with_console, with_output, with_settings
from losscli.cli.run_study import expand_names, run_study
from losscli.settings import Settings

if TYPE_CHECKING:
    from losscli.studies.base import Study

__all__ = ["barriers"]


@with_console
@with_output
@with_settings
def barriers(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CKPT",
            help="Two or more; a folder of them, in natural order; - for names on stdin, one a "
            "line.",
            show_default=False,
        ),
    ],
    settings: Settings,
    write: Write,
    console: Console,
    points: Annotated[
        int,
        typer.Option(
            "--points",
            metavar="N",
            help="Evenly spaced values of α on each line, from 0 to 1.",
            rich_help_panel="The lines",
        ),
    ] = 11,
) -> None:
    """The barriers between all pairs of checkpoints, as a matrix.

    On the line between each two the largest height above the chord, for 0 ≤ α ≤ 1. Each checkpoint
    is read and evaluated once; the losses on all the lines are in STEM.curves.csv.
    """

    def plan() -> Study:
        from losscli.studies.barriers import Barriers

        return Barriers.plan(names, settings, points=points, ranks=console.ranks)

    names = expand_names(checkpoints, console.ranks)
    run_study("barriers", checkpoints, plan, write, console)
