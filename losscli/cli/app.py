"""The commands put together."""

from __future__ import annotations

from typing import Annotated

import typer

from losscli._version import __version__
from losscli.cli.align import align
from losscli.cli.barriers import barriers
from losscli.cli.catalogue import catalogue
from losscli.cli.check import check
from losscli.cli.files import export, inspect
from losscli.cli.interpolate import interpolate
from losscli.cli.plane import plane
from losscli.cli.plot import plot
from losscli.cli.trajectory import trajectory

__all__ = ["app"]

app = typer.Typer(
    name="losscli",
    help="See the loss surface of a neural network, from checkpoint files.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(context: typer.Context, asked: bool) -> None:
    if asked:
        context.obj.result(f"losscli {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """See the loss surface of a neural network, from checkpoint files."""


app.command("interpolate")(interpolate)
app.command("trajectory")(trajectory)
app.command("plane")(plane)
app.command("check")(check)
app.command("barriers")(barriers)
app.command("plot")(plot)
app.command("inspect")(inspect)
app.command("align")(align)
app.command("export")(export)
app.command("list")(catalogue)
