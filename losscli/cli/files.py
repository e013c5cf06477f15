"""``losscli inspect`` and ``losscli export``: looking into checkpoints, and taking a point home."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from losscli import report
from losscli.cli.options import with_console
from losscli.console import Console
from losscli.errors import OutputError, UsageError
from losscli.results import to_json

__all__ = ["export", "inspect"]


@with_console
def inspect(
    checkpoints: Annotated[
        list[str],
        typer.Argument(metavar="CKPT", help="FILE or FILE#KEY.", show_default=False),
    ],
    console: Console,
    json_: Annotated[
        bool,
        typer.Option(
            "--json", help="Print one JSON object instead of text.", rich_help_panel="Output"
        ),
    ] = False,
) -> None:
    """Tensors, shapes, types, norms and metadata of a checkpoint.

    With two: the distance and cosine of each tensor, and what does not match.
    """
    from losscli.studies.inspection import inspect as study

    result = study(checkpoints)
    if json_:
        summary = {**result.summary, "rows": result.table.records()}
        console.result(f"{to_json(summary, indent=None)}\n")
    else:
        console.result(report.inspection(result.summary, result.table.columns, result.table.rows))


@with_console
def export(
    a: Annotated[
        str, typer.Argument(metavar="A", help="The checkpoint at α = 0.", show_default=False)
    ],
    b: Annotated[
        str, typer.Argument(metavar="B", help="The checkpoint at α = 1.", show_default=False)
    ],
    console: Console,
    alpha: Annotated[
        float,
        typer.Option("--alpha", metavar="X", help="The point of the line.", show_default=False),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "-o",
            "--out",
            metavar="FILE.safetensors",
            help="The file to write.",
            show_default=False,
        ),
    ],
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite the file.", rich_help_panel="Output")
    ] = False,
) -> None:
    """Write the checkpoint at a point of the line, θ(X) = A + X (B − A), with A's metadata."""
    if out.suffix != ".safetensors":
        raise UsageError(f"{out} is no name of a safetensors file", f"Write {out.stem}.safetensors")
    if not out.parent.is_dir():
        raise OutputError(f"there is no folder {out.parent}", f"mkdir -p {out.parent}")
    if out.exists() and not force:
        raise OutputError(f"{out} exists", "Choose another --out, or overwrite it with --force")
    from losscli.checkpoint import save
    from losscli.studies.inspection import export as study

    checkpoint = study(a, b, alpha)
    save(checkpoint.weights, checkpoint.metadata, out)
    console.result(f"{out}\n")
