"""``losscli inspect`` and ``losscli export``."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from losscli.cli.console import Console
from losscli.cli.imports import import_plotting, importing
from losscli.cli.options import Force, Json, argument, option, with_console, with_some_settings
from losscli.cli.report import align_columns
from losscli.errors import UsageError, printable
from losscli.registry import COMMANDS
from losscli.results.result import (
    Output,
    Result,
    check_writable,
    read_summary,
    refuse_overwriting,
    to_json,
)
from losscli.results.summaries import InspectionSummary
from losscli.settings import Settings
from losscli.wording import format_count, list_first

__all__ = ["export", "inspect", "report"]


@with_console
def inspect(
    checkpoints: Annotated[list[str], argument("FILE, DIR or FILE#KEY.")],
    console: Console,
    figure: Annotated[
        list[Path] | None,
        option(
            "Output",
            "Repeatable. A figure (.png, .svg, .pdf, .html) with a bar for each tensor.",
            "--figure",
            metavar="PATH",
        ),
    ] = None,
    force: Annotated[bool, option("Output", "Overwrite an existing figure.", "--force")] = False,
    json_: Json = False,
) -> None:
    """Show tensors, shapes, types, norms and metadata of a checkpoint.

    With two checkpoints: the distance and cosine of each tensor, and mismatches.
    """
    output = Output.plan(figure[0], figure, force=force) if figure else None
    for path in figure or ():
        COMMANDS["inspect"].check_format(path.suffix.lower())
    with importing("torch"):
        from losscli.studies.inspection import inspect as study

    result = study(checkpoints)
    files = []
    if output:
        paths = [Path(c["path"]) for c in result.summary["checkpoints"] if c["path"]]
        refuse_overwriting(output.figures, [path for path in paths if path.is_file()])
        import_plotting()
        files = output.write_pictures(output.render([result.run], result.draw))
    console.written = bool(files)
    if json_:
        summary = {**result.summary, "rows": result.table.records()}
        console.result(f"{to_json(summary, indent=None)}\n")
    else:
        console.result(COMMANDS["inspect"].as_text(result))
    for note in result.summary.get("notes", ()):
        console.note(note)
    if files:
        console.note(f"wrote {', '.join(map(str, files))}")


@with_console
@with_some_settings("model", "data", "trust")
def export(
    settings: Settings,
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
    checkpoints: Annotated[
        list[str] | None,
        argument(
            "A at α = 0 and B at α = 1; with --weights two or more; with --t A, the bends in "
            "order, and B; with --plane none."
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option("--alpha", metavar="X", help="The point of the line.", show_default=False),
    ] = None,
    best: Annotated[
        str | None,
        typer.Option(
            "--best",
            metavar="SPLIT",
            help="The point of the lowest loss on this split of --csv.",
            show_default=False,
        ),
    ] = None,
    csv: Annotated[
        Path | None,
        typer.Option(
            "--csv",
            metavar="CSV",
            help="A table of interpolate. Tensors that did not move there (--buffers, --only, "
            "--except) do not move.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="W-W…",
            help="Weights of an average: one per checkpoint, with sum 1, such as "
            "0.5-0.3-0.2 or 1/3-1/3-1/3.",
            show_default=False,
        ),
    ] = None,
    t: Annotated[
        float | None,
        typer.Option(
            "--t",
            metavar="X",
            help="The point of a path that connect trained, from 0 at A to 1 at B.",
            show_default=False,
        ),
    ] = None,
    kind: Annotated[
        Literal["bezier", "chain"],
        typer.Option("--kind", help="The kind of the path, with --t."),
    ] = "bezier",
    plane: Annotated[
        Path | None,
        typer.Option(
            "--plane",
            metavar="CSV",
            help="A table of plane; the JSON next to it names the checkpoints and the tensors that "
            "move. Give the --model and --data of the run again, unless metadata or losscli.toml "
            "name them.",
            show_default=False,
        ),
    ] = None,
    at: Annotated[
        tuple[float, float] | None,
        typer.Option(
            "--at",
            metavar="X Y",
            help="The point of --plane; it may be outside the table.",
            show_default=False,
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Write the checkpoint at a point of a line, path or plane, or a weighted average.

    A point of the line is θ(X) = A + X (B − A). The metadata are those of the first checkpoint.
    """
    options = {
        "--alpha": alpha, "--best": best, "--weights": weights, "--t": t, "--plane": plane
    }  # fmt: skip
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} contradict each other", "Give one of them")
    if not given:
        raise UsageError("no point is given", f"Give one of {', '.join(options)}")
    if (best is None) != (csv is None):
        one, missing = ("--best", "--csv") if csv is None else ("--csv", "--best")
        raise UsageError(f"{one} is given without {missing}", "Give --best SPLIT --csv STEM.csv")
    if (plane is None) != (at is None):
        one, missing = ("--plane", "--at") if at is None else ("--at", "--plane")
        raise UsageError(f"{one} is given without {missing}", "Give --plane STEM.csv --at X Y")
    checkpoints = checkpoints or []
    if plane is not None and checkpoints:
        raise UsageError(
            f"--plane reads its checkpoints from its JSON, so {checkpoints[0]} has no effect",
            "Leave it out",
        )
    changed = asdict(settings).items() - asdict(Settings()).items()
    if plane is None and changed:
        raise UsageError(f"--{min(changed)[0]} has no effect without --plane", "Leave it out")
    if kind != "bezier" and t is None:
        raise UsageError("--kind has no effect without --t", "Leave it out")
    if weights is None and t is None and plane is None and len(checkpoints) != 2:
        raise UsageError(
            f"{given[0]} needs two checkpoints, A and B, and got {len(checkpoints)}",
            "For an average of several give --weights",
        )
    check_writable(out, force=force)
    with importing("torch"):
        from losscli.studies.export import export as study
        from losscli.studies.export import lowest, parse_weights
        from losscli.studies.inputs import protect_inputs

    names = checkpoints or _checkpoints_of(plane)
    protect_inputs([out], names, None if plane is None else settings)
    refuse_overwriting([out], filter(None, [csv, plane]))
    summary = None
    if plane is not None and at is not None:
        with console.guard_stdout():
            checkpoint = study(plane=plane, at=at, **asdict(settings))
    elif weights is not None:
        checkpoint = study(checkpoints, weights=parse_weights(weights, len(checkpoints)))
    elif t is not None:
        checkpoint = study(checkpoints, t=t, kind=kind)
        _note_on_statistics(checkpoint.weights, console)
    else:
        if best is not None and csv is not None:
            point = lowest(csv, best)
            alpha, summary = point.alpha, point.summary
        assert alpha is not None
        a, b = checkpoints
        checkpoint = study(a, b, alpha, summary=summary)
    checkpoint.save(out, force=True)
    console.written = True
    console.result(f"{out}\n")
    if best is not None:
        shared = "" if point.ties == 1 else f", shared by {point.ties} points"
        low = f"{point.loss:.6g}{shared}"
        console.note(f"α = {alpha} has the lowest loss on {best} in {csv}: {low}")
        if summary is None:
            console.note(
                f"{csv} has no summary next to it: A and B are not compared with it, and every "
                "floating-point tensor moves"
            )


def _checkpoints_of(plane: Path | None) -> list[str]:
    """Lists the checkpoints in the summary of a plane."""
    summary = {} if plane is None else read_summary(plane.with_suffix(".json"), COMMANDS["plane"])
    return [entry["name"] for entry in summary.get("checkpoints", ())]


def _note_on_statistics(names: Iterable[str], console: Console) -> None:
    """Prints a note on BatchNorm's statistics at a point of a path."""
    if any(name.rpartition(".")[2] == "running_mean" for name in names):
        console.note(
            "BatchNorm's statistics are not those that connect re-estimates at this point: "
            "evaluate the file with --buffers recalibrate"
        )


def report(result: Result[InspectionSummary]) -> str:
    """Returns lines of text that describe one checkpoint, or the distance of two."""
    summary, columns, rows = result.summary, result.table.columns, result.table.rows
    lines = []
    several = len(summary.get("state_dicts", ()))
    for checkpoint in summary["checkpoints"]:
        lines.append(
            f"{printable(checkpoint['name'])}: {format_count(checkpoint['values'], 'value')} in "
            f"{format_count(checkpoint['tensors'], 'tensor')}, "
            f"{checkpoint['bytes'] / 2**20:,.1f} MiB, "
            + (f"in {several:,} state dicts" if several else f"‖θ‖ = {checkpoint['norm']:.6g}")
        )
        lines += [
            f"  {printable(f'{key} = {value}')}" for key, value in checkpoint["metadata"].items()
        ]
    if "distance" in summary:
        lines.append(f"‖B − A‖ = {summary['distance']:.6g}")
    if buffers := summary.get("buffers"):
        lines.append(printable(f"norms and distances are without buffers: {list_first(buffers)}"))
    lines.append("")
    if several:
        cells = [[_cell(cell) for cell in (key or "(top level)", *rest)] for key, *rest in rows]
        lines += align_columns([columns, *cells], left=range(1))
        path = printable(shlex.quote(str(summary["checkpoints"][0]["path"])))
        example = printable(shlex.quote(next(str(key) for key, *_ in rows if key)))
        lines += ["", f"to inspect one of them, add its key: losscli inspect {path}#{example}"]
        return "\n".join(lines) + "\n"
    lines += align_columns(
        [columns, *([_cell(cell) for cell in row] for row in rows)], left=range(3)
    )
    for mismatch in summary.get("mismatches", []):
        lines.append(f"does not match: {printable(mismatch)}")
    return "\n".join(lines) + "\n"


def _cell(cell: Any) -> str:
    if isinstance(cell, float):
        return f"{cell:.6g}"
    return f"{cell:,}" if isinstance(cell, int) else printable(str(cell))
