"""``losscli trajectory``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from losscli.cli.console import Console
from losscli.cli.options import KeepOrder, Write, with_console, with_output, with_settings
from losscli.cli.run_study import expand_names, run_study
from losscli.settings import Settings

if TYPE_CHECKING:
    from losscli.studies.base import Study

__all__ = ["trajectory"]

_PANEL = "The path"


@with_console
@with_output
@with_settings
def trajectory(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CKPT",
            help="Three or more in the order of training; a folder of them, in natural order; - "
            "for names on stdin, one a line.",
            show_default=False,
        ),
    ],
    settings: Settings,
    write: Write,
    console: Console,
    residuals: Annotated[
        int,
        typer.Option(
            "--residuals",
            metavar="N",
            help="Values of the residual at each step of the surface.",
            rich_help_panel=_PANEL,
        ),
    ] = 21,
    reach: Annotated[
        float,
        typer.Option(
            "--reach",
            metavar="X",
            help="How far the surface reaches, as a multiple of the largest residual.",
            rich_help_panel=_PANEL,
        ),
    ] = 1.25,
    no_surface: Annotated[
        bool,
        typer.Option("--no-surface", help="Only the path, no surface.", rich_help_panel=_PANEL),
    ] = False,
    random_walk: Annotated[
        bool,
        typer.Option(
            "--random-walk",
            help="Random walks with the same step lengths, to see how unlike chance training is.",
            rich_help_panel=_PANEL,
        ),
    ] = False,
    keep_order: KeepOrder = False,
) -> None:
    """The path of training, seen from the straight line between its ends.

    At each checkpoint the projection onto the line, the residual (the distance from the line) and
    the loss; and as a surface the loss along each step's own residual direction, in
    STEM.surface.csv.
    """

    def plan() -> Study:
        from losscli.studies.trajectory import Trajectory

        return Trajectory.plan(
            names,
            settings,
            surface=not no_surface,
            residuals=residuals,
            reach=reach,
            random_walk=random_walk,
            keep_order=keep_order,
            ranks=console.ranks,
        )

    names = expand_names(checkpoints, console.ranks)
    run_study("trajectory", checkpoints, plan, write, console)
