"""``losscli align``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from losscli.cli.console import Console
from losscli.cli.imports import importing
from losscli.cli.options import Force, Json, argument, option, with_console, with_some_settings
from losscli.cli.report import align_columns, format_number
from losscli.errors import OutputError, UsageError, printable
from losscli.results.result import check_writable, to_json
from losscli.results.summaries import AlignmentSummary, MatchedActivations
from losscli.settings import Settings
from losscli.wording import format_count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from losscli.studies.alignment import Alignment

__all__ = ["align", "report", "report_each"]


@with_console
@with_some_settings(
    "model",
    "data",
    "limit",
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
    b: Annotated[
        list[str],
        argument("The checkpoint to permute; several, or a folder of them, each onto A.", "B"),
    ],
    settings: Settings,
    console: Console,
    out: Annotated[
        Path,
        typer.Option(
            "-o",
            "--out",
            metavar="FILE|FOLDER",
            help="The file to write, FILE.safetensors, with B permuted; for several, a folder.",
            show_default=False,
        ),
    ],
    by: Annotated[
        Literal["weights", "activations"],
        option(
            "How it is evaluated",
            "Match units by their weights, or by the correlations of their activations over the "
            "training examples (--limit takes fewer).",
            "--by",
        ),
    ] = "weights",
    force: Force = False,
    json_: Json = False,
) -> None:
    """Permute B's hidden units to match A's without changing its function.

    The order of hidden units is arbitrary. Matching finds the order in which B's weights or
    activations are most similar to A's, so that `losscli interpolate` shows the barrier that
    remains. The outputs of the permuted network are compared with B's on the data before anything
    is written.
    """
    # Only the names of the files are read before the slow import.
    several = len(b) > 1 or Path(b[0]).is_dir()
    if not several:
        check_writable(out, force=force)
    with importing("torch"):
        from losscli.checkpoint import expand_folders, file_names
        from losscli.studies.alignment import align_each
        from losscli.studies.inputs import protect_inputs

    names = expand_folders(b) if several else b
    # A folder may be one checkpoint.
    several = names != b or len(names) > 1
    files = [out]
    if several:
        if out.suffix in {".safetensors", ".pt", ".pth"} or out.is_file():
            raise UsageError(
                f"--out {out} is one file for {len(names)} checkpoints", "Give the name of a folder"
            )
        files = [out / f"{name}.safetensors" for name in file_names(names)]
        _check_folder(out, files, force=force)
    else:
        check_writable(out, force=force)
    protect_inputs(files, [a, *names], settings)
    with console.guard_stdout():
        alignments = align_each([a, *names], settings, by, files)
    _write(alignments, files)
    console.written = True
    entries = [
        {**found.summary, "file": str(file)} for found, file in zip(alignments, files, strict=True)
    ]
    if json_:
        found: Any = {"command": "align", "aligned": entries} if several else entries[0]
        console.result(f"{to_json(found, indent=None)}\n")
    elif several:
        console.result(report_each([found.summary for found in alignments], files))
    else:
        console.result(report(alignments[0].summary))
    for text in alignments[0].summary["notes"]:
        console.note(text)
    console.note(f"wrote {out}" + (f" ({format_count(len(files), 'file')})" if several else ""))


def _check_folder(out: Path, files: Sequence[Path], *, force: bool) -> None:
    """Checks that files can be written to a folder, which may not exist yet."""
    if out.is_dir():
        for file in files:
            check_writable(file, force=force)
    else:
        # A file of the folder's name can be created where the folder can.
        check_writable(out.with_name(f"{out.name}.safetensors"), force=True)


def _write(alignments: Sequence[Alignment], files: Sequence[Path]) -> None:
    """Writes all checkpoints; after an error, removes the new ones."""
    folder = files[0].parent
    new, has_folder = [file for file in files if not file.exists()], folder.exists()
    folder.mkdir(exist_ok=True)
    try:
        for found, file in zip(alignments, files, strict=True):
            found.checkpoint.save(file, force=True)
    except OutputError:
        for file in new:
            file.unlink(missing_ok=True)
        if not has_folder:
            folder.rmdir()
        raise


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
    difference = f"{check['largest_difference']:.1g} of the largest, in {check['dtype']}"
    rows = [
        ("A", a),
        ("B", b),
        ("hidden units", f"{summary['units']:,} in {groups}; {summary['moved']:,} of them moved"),
        ("‖B − A‖", f"{before:.4g}, permuted {after:.4g}, over {over}"),
        ("⟨A, B⟩", f"{products[0]}, permuted {products[1]}"),
        ("function", f"that of B: outputs on {examples} differ by {difference}"),
    ]
    if found := summary.get("activations"):
        rows.insert(3, ("correlation", _correlation(found)))
    return "".join(f"{label:<14}{text}\n" for label, text in rows)


def _correlation(found: MatchedActivations) -> str:
    """Describes the matching by activations."""
    before, after = (found["correlation"][when] for when in ("before", "after"))
    constant = found["without_variance"]
    examples = f"{format_count(found['examples'], 'example')} of {printable(found['split'])}"
    text = f"{format_number(before)}, permuted {format_number(after)}, over {examples}"
    if any(constant.values()):
        text += f"; without variance: {constant['a']} of A, {constant['b']} of B"
    return text


def report_each(summaries: Sequence[AlignmentSummary], files: Sequence[Path]) -> str:
    """Returns a table that describes the alignment of several checkpoints."""
    first = summaries[0]
    units = f"{first['units']:,} in {format_count(len(first['groups']), 'group')}"
    by_activations = "activations" in first
    cells = [
        ["checkpoint", "moved", "‖B − A‖", "permuted"]
        + (["correlation", "permuted"] if by_activations else [])
        + ["outputs differ", "file"]
    ]
    for summary, file in zip(summaries, files, strict=True):
        row = [printable(summary["checkpoints"][1]["name"]), f"{summary['moved']:,}"]
        row += [f"{summary['distance'][when]:.4g}" for when in ("before", "after")]
        if by_activations:
            correlation = summary["activations"]["correlation"]
            row += [format_number(correlation[when]) for when in ("before", "after")]
        cells.append([*row, f"{summary['check']['largest_difference']:.1g}", printable(str(file))])
    lines = [
        f"A             {printable(first['checkpoints'][0]['name'])}",
        f"hidden units  {units}",
        "",
        *align_columns(cells, left={0, len(cells[0]) - 1}),
    ]
    return "\n".join(lines) + "\n"
