"""``losscli align``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from losscli.cli.console import Console
from losscli.cli.imports import importing
from losscli.cli.options import Force, Json, argument, with_console, with_some_settings
from losscli.cli.report import format_count, format_number
from losscli.errors import printable
from losscli.results.result import check_writable, to_json
from losscli.results.summaries import AlignmentSummary
from losscli.settings import Settings

__all__ = ["align", "report"]


@with_console
@with_some_settings(
    "model",
    "data",
    "trust",
    "batch_size",
    "device",
    "seed",
    "ignore_unexpected",
    "allow_missing",
    "rename",
)
def align(
    a: Annotated[
        str, argument("The reference checkpoint: FILE, DIR, FILE#KEY or init:SEED.", metavar="A")
    ],
    b: Annotated[str, argument("The checkpoint to permute.", metavar="B")],
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
    """Permute B's hidden units to match A's without changing its function.

    The order of hidden units is arbitrary. Weight matching finds the order in which B is closest to
    A, so that `losscli interpolate` shows the barrier that remains. The
    outputs of the permuted network are compared with B's on the data before anything is written.
    """
    check_writable(out, force=force)
    with importing("torch"):
        from losscli.studies.alignment import align as study

    with console.guard_stdout():
        alignment = study(a, b, **asdict(settings))
    found = alignment.checkpoint
    found.save(out, force=True)
    console.written = True
    if json_:
        console.result(f"{to_json({**alignment.summary, 'file': str(out)}, indent=None)}\n")
    else:
        console.result(report(alignment.summary))
    console.note(f"wrote {out}")


def report(summary: AlignmentSummary) -> str:
    """Returns lines of text that describe the result of an alignment."""
    a, b = (printable(c["name"]) for c in summary["checkpoints"])
    before, after = (summary["distance"][when] for when in ("before", "after"))
    products = [format_number(summary["inner_product"][when]) for when in ("before", "after")]
    check = summary["check"]
    groups = format_count(len(summary["groups"]), "group")
    tensors = format_count(summary["tensors"], "tensor")
    over = f"{format_count(summary['values'], 'value')} in {tensors}"
    examples = format_count(check["examples"], "example")
    difference = f"{check['largest_difference']:.1g} of the largest"
    rows = [
        ("A", a),
        ("B", b),
        ("hidden units", f"{summary['units']:,} in {groups}; {summary['moved']:,} change places"),
        ("‖B − A‖", f"{before:.4g}, permuted {after:.4g}, over {over}"),
        ("⟨A, B⟩", f"{products[0]}, permuted {products[1]}"),
        ("function", f"B's: the same outputs on {examples}, to {difference}, in {check['dtype']}"),
    ]
    return "".join(f"{label:<14}{text}\n" for label, text in rows)
