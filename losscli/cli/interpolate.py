"""``losscli interpolate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from losscli.cli.carry import carry_out
from losscli.cli.options import Write, with_console, with_output, with_settings
from losscli.console import Console
from losscli.settings import Settings

if TYPE_CHECKING:
    from losscli.studies import Study

__all__ = ["interpolate"]


@with_console
@with_output
@with_settings
def interpolate(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="The checkpoint at α = 0: FILE, FILE#KEY or init:SEED.",
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
) -> None:
    """Loss along the line through two checkpoints, θ(α) = A + α (B − A).

    Writes a CSV, a picture and a JSON summary, and prints what was seen: the losses at both ends,
    the lowest point, the barrier, the largest rise, local minima of the curve.
    """

    def plan() -> Study:
        from losscli.studies import Interpolation

        return Interpolation.plan(a, b, settings, points=points, range_=range_)

    carry_out("interpolate", [a, b], plan, write, console)
