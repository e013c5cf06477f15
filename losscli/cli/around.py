"""``losscli around``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from losscli.cli.console import Console
from losscli.cli.options import Write, with_console, with_output, with_settings
from losscli.cli.run_study import expand_names, run_study
from losscli.settings import Settings

if TYPE_CHECKING:
    from losscli.studies.base import Study

__all__ = ["around"]

_DIRECTIONS = "The directions"
_BASIN = "The basin"


@with_console
@with_output
@with_settings
def around(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CKPT",
            help="One or more; a folder of them, in natural order; - for names on stdin, one a "
            "line.",
            show_default=False,
        ),
    ],
    settings: Settings,
    write: Write,
    console: Console,
    directions: Annotated[
        int,
        typer.Option(
            "--directions",
            metavar="N",
            help="The number of random filter-normalised directions, the same draws for every "
            "checkpoint.",
            rich_help_panel=_DIRECTIONS,
        ),
    ] = 20,
    along: Annotated[
        Literal["gradient", "hessian"] | None,
        typer.Option(
            "--along",
            help="Instead of random directions: the gradient, or the Hessian's eigenvectors of the "
            "largest (v1), the second largest (v2) and the smallest eigenvalue (vn), of the first "
            "split. They have length one.",
            rich_help_panel=_DIRECTIONS,
            show_default=False,
        ),
    ] = None,
    range_: Annotated[
        tuple[float, float] | None,
        typer.Option(
            "--range",
            metavar="LO HI",
            help="The lowest and the highest coefficient c of θ + c d. Default: 0 1 for random "
            "directions, which are as long as the weights that move; -0.5 0.5 for others.",
            rich_help_panel=_DIRECTIONS,
            show_default=False,
        ),
    ] = None,
    points: Annotated[
        int,
        typer.Option(
            "--points",
            metavar="N",
            help="Number of evenly spaced coefficients; 0 is added.",
            rich_help_panel=_DIRECTIONS,
        ),
    ] = 21,
    basin: Annotated[
        float | None,
        typer.Option(
            "--basin",
            metavar="X",
            help="The basin radius is the largest distance up to which the mean loss stays below X "
            "times the loss of the checkpoint. Default: 2.",
            rich_help_panel=_BASIN,
            show_default=False,
        ),
    ] = None,
    basin_loss: Annotated[
        float | None,
        typer.Option(
            "--basin-loss",
            metavar="X",
            help="The same with the loss X as the threshold.",
            rich_help_panel=_BASIN,
            show_default=False,
        ),
    ] = None,
) -> None:
    """Loss around checkpoints along many directions, and the radius of the basin.

    Draws the loss along each direction, its mean and its 10–90 % band over the distance from the
    checkpoint. All random directions of a checkpoint have the same length, so the mean is over
    points at equal distances. The basin radius, with its error over directions, is interpolated by
    parabolas between the points.
    """

    def plan() -> Study:
        from losscli.studies.around import Around

        return Around.plan(
            names,
            settings,
            directions=directions,
            along=along,
            range_=range_,
            points=points,
            basin=basin,
            basin_loss=basin_loss,
            ranks=console.ranks,
        )

    names = expand_names(checkpoints, console.ranks)
    run_study("around", checkpoints, plan, write, console)
