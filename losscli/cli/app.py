"""The typer application with all commands."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated

import typer

from losscli import __version__
from losscli.registry import COMMANDS, load

__all__ = ["NAMES", "make_app"]

_FUNCTIONS: Mapping[str, str] = {
    **{name: command.cli for name, command in COMMANDS.items() if command.cli},
    "plot": "losscli.cli.plot:plot",
    "inspect": "losscli.cli.files:inspect",
    "align": "losscli.cli.align:align",
    "export": "losscli.cli.files:export",
    "list": "losscli.cli.catalogue:catalogue",
    "init": "losscli.cli.init:init",
}

NAMES = tuple(_FUNCTIONS)
"""The names of all commands."""


def make_app(name: str = "") -> typer.Typer:
    """Makes the application.

    Args:
        name: The only command that is needed, since importing all of them takes longer.

    Returns:
        The application with this command; with all if none has this name.
    """
    app = typer.Typer(
        name="losscli",
        help="Show the loss surface of a neural network from checkpoint files.",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for command in [name] if name in _FUNCTIONS else NAMES:
        function = load(_FUNCTIONS[command])
        app.command(command, help=_paragraphs(function))(function)
    return app


def _paragraphs(function: Callable[..., object]) -> str:
    """Returns the docstring of a command with one line per paragraph.

    typer keeps the line breaks of all paragraphs but the first, so that a narrow terminal would
    show long and short lines in turns.
    """
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    return "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)


def _version(context: typer.Context, requested: bool) -> None:
    if requested:
        context.obj.result(f"losscli {__version__}\n")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Show the loss surface of a neural network from checkpoint files."""
