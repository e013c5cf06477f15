"""``losscli plot``: figures from CSV files, without torch."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from losscli.cli.console import Console, stdin
from losscli.cli.imports import import_plotting
from losscli.cli.options import argument, with_console, with_drawing
from losscli.errors import UsageError
from losscli.registry import COMMANDS, command_of
from losscli.results.figures import check_animated, has_panels, notes_on_pages
from losscli.results.result import (
    Output,
    Run,
    draw,
    label_runs,
    picture_of,
    refuse_overwriting,
    render_html,
    stem_of,
    tell_apart,
)
from losscli.results.runs import (
    check_curves,
    check_main,
    check_panels,
    choose_drawing,
    read_run,
    report,
)
from losscli.table import Table

__all__ = ["plot"]


# Maximum number of columns and lines in a terminal, since COLUMNS and LINES may be any number.
_WIDEST = 1000


@with_console
@with_drawing
def plot(
    csvs: Annotated[list[str], argument("Tables that losscli wrote; - for stdin.", metavar="CSV")],
    console: Console,
    drawing: Mapping[str, Any],
    style: Path | None,
    title: Annotated[
        str, typer.Option("--title", help="A title above the figure.", show_default=False)
    ] = "",
    out: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--out",
            metavar="STEM",
            help="Write STEM.png. By default the stem of a single CSV, or plot.",
            show_default=False,
        ),
    ] = None,
    figure: Annotated[
        list[Path] | None,
        typer.Option(
            "--figure",
            metavar="PATH",
            help="Repeatable. A figure instead of STEM.png: .png, .svg, .pdf, .html; a .gif or "
            ".mp4 of a path; a .vtp of a surface.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing figure.")] = False,
    terminal: Annotated[
        bool, typer.Option("--terminal", help="Draw in the terminal; write no file.")
    ] = False,
) -> None:
    """Draw the figure of a CSV again, or overlay several."""
    if csvs.count("-") > 1:
        raise UsageError("stdin can be read only once", "Give - once")
    if out == "-":
        raise UsageError(
            "a figure cannot be written to stdout",
            "Give --out STEM, or draw it in the terminal with --terminal",
        )
    runs = [_read(name) for name in csvs]
    options = choose_drawing(csvs, runs, {**drawing, "title": title})
    runs = label_runs(runs, options.label)
    check_curves(runs)
    if "fps" in drawing:
        check_animated(() if terminal else figure or picture_of(out))
    if terminal:
        if any(command_of(run.table.columns) is not COMMANDS["interpolate"] for run in runs):
            raise UsageError("--terminal draws only tables of interpolate", "Leave it out")
        _draw_in_terminal(runs, console, log=options.log)
        return
    single = csvs[0] if len(csvs) == 1 and csvs[0] != "-" else None
    stem = stem_of(out) if out is not None else Path((single or "").removesuffix(".csv") or "plot")
    output = Output.plan(stem, tuple(figure or picture_of(out)), force=force)
    refuse_overwriting(output.figures, [*map(Path, csvs), *filter(None, [style])])
    if any(map(has_panels, output.figures)):
        check_panels(csvs, runs)
    for note in notes_on_pages(output.figures, options):
        console.note(note)
    import_plotting()
    page = partial(report, csvs) if runs[1:] else render_html
    files = output.write_pictures(output.render(runs, draw, options, page))
    console.written = True
    console.result("".join(f"{path}\n" for path in files))


def _read(name: str) -> Run[Any]:
    if name != "-":
        return read_run(Path(name))
    text = stdin().decode("utf-8-sig", "replace")
    table = Table.from_csv(io.StringIO(text, newline=""), "stdin")
    check_main(table, "stdin")
    return Run(table, {})


def _draw_in_terminal(runs: list[Run[Any]], console: Console, *, log: bool) -> None:
    from losscli.plotting.terminal import draw

    width, height = shutil.get_terminal_size((80, 24))
    encoding = getattr(console.stdout, "encoding", None) or "ascii"
    colour = (
        console.stdout is not None
        and console.stdout.isatty()
        and "NO_COLOR" not in os.environ
        and os.environ.get("TERM") != "dumb"
    )
    names = tell_apart(runs, [_run_name(run) for run in runs])
    curves = [(run.label or name, run.table) for run, name in zip(runs, names, strict=True)]
    drawn = draw(
        curves,
        width=min(width, _WIDEST),
        height=min(max(height - 2, 8), _WIDEST),
        colour=colour,
        log=log,
        ascii=not encoding.lower().startswith("utf"),
    )
    console.result(drawn if drawn.endswith("\n") else f"{drawn}\n", drawn=True)


def _run_name(run: Run[Any]) -> str:
    checkpoints = [c["name"] for c in run.summary.get("checkpoints", [])]
    return " → ".join(checkpoints)
