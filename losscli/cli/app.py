"""The typer application with all commands."""

from __future__ import annotations

from typing import Annotated

import typer

from losscli import __version__
from losscli.cli.align import align
from losscli.cli.catalogue import catalogue
from losscli.cli.files import export, inspect
from losscli.cli.init import init
from losscli.cli.plot import plot
from losscli.registry import COMMANDS, load

__all__ = ["app"]

app = typer.Typer(
    name="losscli",
    help="See the loss surface of a neural network, from checkpoint files.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(context: typer.Context, requested: bool) -> None:
    if requested:
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


for name, command in COMMANDS.items():
    if command.cli:
        app.command(name)(load(command.cli))
app.command("plot")(plot)
app.command("inspect")(inspect)
app.command("align")(align)
app.command("export")(export)
app.command("list")(catalogue)
app.command("init")(init)
