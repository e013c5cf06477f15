"""``losscli interpolate``."""

from __future__ import annotations

from typing import Annotated

import typer

from losscli import report
from losscli.cli.options import Write, with_console, with_output, with_settings
from losscli.console import Console
from losscli.results import to_json
from losscli.settings import Settings

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
    output = write.plan("interpolate", [a, b])
    from losscli.studies import Interpolation

    with console.guard_stdout():
        plan = Interpolation.plan(a, b, settings, points=points, range_=range_)
    if write.dry_run:
        description = plan.describe()
        console.result(f"{to_json(description)}\n" if write.json else report.plan(description))
        return
    if output is not None:
        output.guard(plan.identity)
    with console.guard_stdout(), console.progress(plan.evaluations, "points") as tell:
        result = plan.run(tell)
    for note in result.summary["notes"]:
        console.note(note)
    if output is None:
        console.result(result.table.to_csv())
        return
    files = output.write(result, log=write.log)
    if write.json:
        console.result(f"{to_json(result.summary, indent=None)}\n")
    else:
        console.result(report.interpolation(result.summary))
    console.note(f"wrote {', '.join(map(str, files))}")
