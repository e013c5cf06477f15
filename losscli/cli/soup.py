"""``losscli soup``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from losscli.cli.console import Console
from losscli.cli.imports import importing
from losscli.cli.options import Force, with_console
from losscli.results.result import check_writable

__all__ = ["soup"]


@with_console
def soup(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CKPT", help="Two or more, or a folder of them.", show_default=False
        ),
    ],
    console: Console,
    out: Annotated[
        Path,
        typer.Option(
            "-o",
            "--out",
            metavar="FILE.safetensors",
            help="The file to write; FILE.pt also stores module versions.",
            show_default=False,
        ),
    ],
    force: Force = False,
) -> None:
    """Write the average of checkpoints, with the metadata of the first."""
    check_writable(out, force=force)
    with importing("torch"):
        from losscli.studies.soup import soup as study

    study(checkpoints).save(out, force=True)
    console.written = True
    console.result(f"{out}\n")
