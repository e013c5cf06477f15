"""``losscli interpolate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from losscli.cli.console import Console
from losscli.cli.options import Write, with_console, with_output, with_settings
from losscli.cli.run_study import run_study
from losscli.errors import UsageError
from losscli.registry import COMMANDS, command_of
from losscli.settings import Settings
from losscli.table import Table

if TYPE_CHECKING:
    from losscli.studies.base import Study

__all__ = ["interpolate"]


@with_console
@with_output
@with_settings
def interpolate(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="The checkpoint at α = 0: FILE, DIR, FILE#KEY or init:SEED.",
            show_default=False,
        ),
    ],
    b: Annotated[
        str, typer.Argument(metavar="B", help="The checkpoint at α = 1.", show_default=False)
    ],
    settings: Settings,
    write: Write,
    console: Console,
    points: Annotated[
        int,
        typer.Option(
            "--points",
            metavar="N",
            help="Evenly spaced values of α; 0 and 1 come besides where the range holds them.",
            rich_help_panel="The line",
        ),
    ] = 51,
    range_: Annotated[
        tuple[float, float],
        typer.Option(
            "--range",
            metavar="LO HI",
            help="The lowest and the highest α.",
            rich_help_panel="The line",
        ),
    ] = (-0.5, 2.0),
    refine: Annotated[
        float | None,
        typer.Option(
            "--refine",
            metavar="TOL",
            help="Add points where the curve bends and around every local minimum and maximum, "
            "until cubics through the points are accurate to TOL times the height of the curve. "
            "Straight lines between the points are less accurate.",
            rich_help_panel="The line",
            show_default=False,
        ),
    ] = None,
    derivatives: Annotated[
        bool,
        typer.Option(
            "--derivatives",
            help="Exact columns slope, dL/dα, and curvature, d²L/dα².",
            rich_help_panel="The line",
        ),
    ] = False,
    layerwise: Annotated[
        bool,
        typer.Option(
            "--layerwise",
            help="Besides, move each block of the network along the line alone, all others at A.",
            rich_help_panel="The line",
        ),
    ] = False,
    context: Annotated[
        Path | None,
        typer.Option(
            "--context",
            metavar="CSV",
            help="The table of the whole line: the picture shows where this part of it lies.",
            rich_help_panel="The line",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Loss along the line through two checkpoints, θ(α) = A + α (B − A).

    Writes a CSV, a picture and a JSON summary, and prints what was seen: the losses at both ends,
    the lowest point, the barrier, the largest rise, local minima of the curve.
    """

    def plan() -> Study:
        from losscli.studies.interpolation import Interpolation

        return Interpolation.plan(
            a,
            b,
            settings,
            points=points,
            range_=range_,
            derivatives=derivatives,
            refine=refine,
            context=whole,
            layerwise=layerwise,
            ranks=console.ranks,
        )

    whole = None
    if context is not None:
        if write.out not in {None, "-"} and Path(f"{write.out}.csv").resolve() == context.resolve():
            raise UsageError(f"--out {write.out} would overwrite --context", "Choose another --out")
        whole = Table.read(context)
        if command_of(whole) is not COMMANDS["interpolate"]:
            raise UsageError(
                f"--context {context} is no table of interpolate", "Give the CSV of the whole line"
            )
    run_study("interpolate", [a, b], plan, write, console)
