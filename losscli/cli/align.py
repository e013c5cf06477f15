"""``losscli align``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from losscli.cli import report
from losscli.cli.console import Console
from losscli.cli.files import check_writable
from losscli.cli.options import Force, Json, with_console, with_some_settings
from losscli.results import to_json
from losscli.settings import Settings

__all__ = ["align"]


@with_console
@with_some_settings("model", "data", "batch_size", "device", "seed")
def align(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="The checkpoint whose order is taken: FILE, DIR, FILE#KEY or init:SEED.",
            show_default=False,
        ),
    ],
    b: Annotated[
        str, typer.Argument(metavar="B", help="The one that is permuted.", show_default=False)
    ],
    settings: Settings,
    console: Console,
    out: Annotated[
        Path,
        typer.Option(
            "-o",
            "--out",
            metavar="FILE.safetensors",
            help="The file to write: B permuted.",
            show_default=False,
        ),
    ],
    force: Force = False,
    json_: Json = False,
) -> None:
    """Put B's hidden units into the order of A's, its function as it is.

    The order of hidden units is a matter of chance. Weight matching finds the one in which B lies
    closest to A, so that `losscli interpolate` can show the hill between them without it. The
    function of the permuted network is held against B's on the data before anything is written.
    """
    check_writable(out, force=force)
    from losscli.checkpoint import save
    from losscli.studies.alignment import align as study

    with console.guard_stdout():
        alignment = study(a, b, **asdict(settings))
    found = alignment.checkpoint
    save(found.weights, found.metadata, out, found.versions, found.extra)
    console.written = True
    if json_:
        console.result(f"{to_json({**alignment.summary, 'file': str(out)}, indent=None)}\n")
    else:
        console.result(report.alignment(alignment.summary))
    console.note(f"wrote {out}")
