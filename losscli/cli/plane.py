"""``losscli plane``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from losscli.cli.console import Console
from losscli.cli.options import KeepOrder, Write, with_console, with_output, with_settings
from losscli.cli.run_study import expand_names, run_study
from losscli.settings import Settings

if TYPE_CHECKING:
    from losscli.studies.base import Study

__all__ = ["plane"]

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
