"""``losscli check``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from losscli.cli.console import Console
from losscli.cli.options import KeepOrder, Write, with_console, with_output, with_settings
from losscli.cli.run_study import expand_names, run_study
from losscli.settings import Settings

if TYPE_CHECKING:
    from losscli.studies.base import Study

__all__ = ["check"]

_PANEL = "What is found"


@with_console
@with_output
@with_settings
def check(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CKPT",
            help="One or more, in the order of training; a folder of them; - for names on stdin.",
            show_default=False,
        ),
    ],
    settings: Settings,
    write: Write,
    console: Console,
    tolerance: Annotated[
        float,
        typer.Option(
            "--tolerance",
            metavar="X",
            help="The largest gradient norm of a critical point.",
            rich_help_panel=_PANEL,
        ),
    ] = 1e-3,
    eigenvalues: Annotated[
        int,
        typer.Option(
            "--eigenvalues",
            metavar="K",
            help="How many of the largest and of the smallest eigenvalues.",
            rich_help_panel=_PANEL,
        ),
    ] = 1,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate",
            metavar="X",
            help="Compare λ max with 2 / X, the limit of stable full-batch training.",
            rich_help_panel=_PANEL,
            show_default=False,
        ),
    ] = None,
    momentum: Annotated[
        float | None,
        typer.Option(
            "--momentum",
            metavar="X",
            help="That of training, with --learning-rate η: the limit is (2 + 2X) / η.",
            rich_help_panel=_PANEL,
            show_default=False,
        ),
    ] = None,
    keep_order: KeepOrder = False,
) -> None:
    """Is it a critical point at all, and a minimum or a saddle?

    The gradient norm over all examples, the largest and the smallest eigenvalue of the Hessian,
    each with its error, and a verdict that claims no more than these and the loss allow. Where the
    curvature is negative, the loss along that direction, both ways (STEM.escape.csv).
    """

    def plan() -> Study:
        from losscli.studies.check import Check

        return Check.plan(
            names,
            settings,
            tolerance=tolerance,
            eigenvalues=eigenvalues,
            learning_rate=learning_rate,
            keep_order=keep_order,
            momentum=momentum,
            ranks=console.ranks,
        )

    names = expand_names(checkpoints, console.ranks)
    run_study("check", checkpoints, plan, write, console)
