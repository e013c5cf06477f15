"""``losscli plot``: figures from CSV files, without torch."""

from __future__ import annotations

import io
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from losscli.cli.console import Console, stdin
from losscli.cli.figures import check_curve_count, check_panel_count, render_files
from losscli.cli.options import with_console, with_drawing
from losscli.drawing import Drawing
from losscli.errors import TableError, UsageError
from losscli.registry import COMMANDS, Command, TableFormat, command_of, further_table_of
from losscli.results import (
    Output,
    Run,
    draw,
    label_runs,
    picture_of,
    read_summary,
    render_html,
    stem_of,
)
from losscli.summaries import DrawingSummary
from losscli.table import Table

__all__ = ["plot"]


# Maximum number of grid points per row: a table may lack some points, but not most of them.
_SPARSEST = 4

_FEWER = "Choose fewer by --split and --metric when a table is made, or give fewer tables"

# Maximum number of columns and lines in a terminal, since COLUMNS and LINES may be any number.
_WIDEST = 1000

# Maximum |α|: beyond, weights on the line exceed the range of float32.
_LARGEST_ALPHA = 1e30


@with_console
@with_drawing
def plot(
    csvs: Annotated[
        list[str],
        typer.Argument(
            metavar="CSV", help="Tables that losscli wrote; - for stdin.", show_default=False
        ),
    ],
    console: Console,
    drawing: Mapping[str, Any],
    title: Annotated[
        str, typer.Option("--title", help="A title over the picture.", show_default=False)
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
            help="Repeatable. A picture (.png, .svg, .pdf, .html) instead of STEM.png.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite another picture.")] = False,
    terminal: Annotated[
        bool, typer.Option("--terminal", help="Draw in the terminal; write no file.")
    ] = False,
) -> None:
    """Draw the picture of a CSV again, or lay several over each other."""
    if csvs.count("-") > 1:
        raise UsageError("stdin can be read only once", "Give - once")
    if out == "-":
        raise UsageError(
            "a picture does not go to stdout, as --out - asks",
            "Give --out STEM, or see it here with --terminal",
        )
    runs = [_read(name) for name in csvs]
    options = Drawing(**{**_stored(csvs, runs), **drawing, "title": title})
    runs = label_runs(runs, options.label)
    check_curve_count(sum(map(_split_count, runs)), _FEWER)
    if terminal:
        if any(command_of(run.table.columns) is not COMMANDS["interpolate"] for run in runs):
            raise UsageError(
                "a terminal shows the lines of interpolate alone", "Leave --terminal out"
            )
        _draw_in_terminal(runs, console, log=options.log)
        return
    single = csvs[0] if len(csvs) == 1 and csvs[0] != "-" else None
    stem = stem_of(out) if out is not None else Path((single or "").removesuffix(".csv") or "plot")
    output = Output.plan(stem, tuple(figure or picture_of(out)), force=force)
    _check_panel_counts(csvs, runs)
    pictures = render_files(
        partial(draw, runs, options), partial(render_html, runs, options), output.figures, options
    )
    files = output.write_pictures(pictures)
    console.written = True
    console.result("".join(f"{path}\n" for path in files))


def _split_count(run: Run[Any]) -> int:
    return len(run.table.unique("split")) if "split" in run.table.columns else 0


def _stored(names: Sequence[str], runs: Sequence[Run[Any]]) -> DrawingSummary:
    """Returns the options of the figure that the summaries of all runs have in common.

    The labels of checkpoints are those of a single run.
    """
    stored: list[dict[str, Any]] = []
    for name, run in zip(names, runs, strict=True):
        options = run.summary.get("drawing", {})
        try:
            if style := Drawing(**options).style:
                from losscli.plotting.style_sheet import parse

                parse(style)
        except UsageError as error:
            where = Path(name).with_suffix(".json")
            raise TableError(f"{where}, drawing: {error.what}", error.cure) from None
        stored.append(options if len(runs) == 1 else {**options, "label": ()})
    common: Any = {
        key: value
        for key, value in stored[0].items()
        if all(options.get(key) == value for options in stored)
    }
    shared: DrawingSummary = common
    return shared


def _read(name: str) -> Run[Any]:
    if name == "-":
        text = stdin().decode("utf-8-sig", "replace")
        table = Table.from_csv(io.StringIO(text, newline=""), "stdin")
        _check_main(table, "stdin")
        return Run(table, {})
    path = Path(name)
    table = Table.read(path, pipe=True)
    command = _check_main(table, name)
    summary = read_summary(path.with_suffix(".json"), command)
    return Run(table, summary, more=_read_further(path, command, table, summary))


def _check_main(table: Table, name: str) -> Command:
    """Checks that a main table can be drawn; returns its command."""
    further = further_table_of(table.columns)
    if further and further.refused_alone:
        reason, cure = further.refused_alone
        raise TableError(f"{name} {reason}", cure)
    command = command_of(table.columns)
    if command is None:
        *others, last = (c.name for c in COMMANDS.values() if c.cli)
        raise TableError(
            f"{name} is no table that can be drawn: its columns are {', '.join(table.columns)}",
            f"Name the CSV of losscli {', '.join(others)} or {last}",
        )
    if not table.rows:
        raise TableError(f"{name} has no rows")
    _check_cells(table, name, command.table)
    _check_grid(table, name, command.table)
    return command


def _check_cells(table: Table, name: str, expected: TableFormat) -> None:
    """Checks that positions and errors are in the range of an axis."""
    for column in table.columns:
        if column not in {expected.position, *expected.errors}:
            continue
        for number, value in enumerate(table.floats(column), start=2):
            if column == expected.position and not abs(value) <= _LARGEST_ALPHA:
                raise TableError(
                    f"{name}, record {number}: {column} is {value}, no point of a line",
                    f"Give numbers from {-_LARGEST_ALPHA:g} to {_LARGEST_ALPHA:g}",
                )
            if column in expected.errors and value < 0:
                raise TableError(
                    f"{name}, record {number}: {column} is {value}, and no error is negative",
                    "Give the CSV as losscli wrote it",
                )


def _check_grid(table: Table, name: str, expected: TableFormat) -> None:
    """Checks that the rows fill enough of the grid, which is allocated as a whole."""
    if not expected.grid:
        return
    values = [set(table[column]) - {None} for column in expected.grid]
    points = (
        math.comb(len(set().union(*values)), 2) if expected.pairs else math.prod(map(len, values))
    )
    if points > _SPARSEST * len(table.rows):
        raise TableError(
            f"{name} has {len(table.rows):,} rows for the {points:,} points that its columns "
            f"{' and '.join(expected.grid)} make, so they are not a grid",
            "Give a CSV as losscli wrote it",
        )


def _read_further(
    path: Path, command: Command, main: Table, summary: dict[str, Any]
) -> dict[str, Table]:
    """Reads the further tables in the summary of a run; without a summary, all beside its CSV."""
    more = {}
    for name, expected in command.further_tables.items():
        table_path = path.with_suffix(f".{name}.csv")
        if (
            expected.drawn
            and name in summary.get("tables", command.further_tables)
            and table_path.exists()
        ):
            table = Table.read(table_path)
            missing = [column for column in expected.columns if column not in table.columns]
            if missing:
                raise TableError(
                    f"{table_path} is not the {name} of {path}: it has no column {missing[0]!r}",
                    f"Give {path} without it, or make both again",
                )
            _check_cells(table, str(table_path), expected)
            _check_grid(table, str(table_path), expected)
            _check_same_run(path, main, table_path, table, expected.shared)
            more[name] = table
    return more


def _check_same_run(
    path: Path, main: Table, table_path: Path, table: Table, shared: Sequence[str]
) -> None:
    """Checks that the main table has the shared columns of each row of a further table."""
    known, rows = (zip(*(t[column] for column in shared), strict=True) for t in (main, table))
    keys = set(known)
    unknown = next((row for row in rows if row not in keys), None)
    if unknown:
        key = ", ".join(f"{c} {v}" for c, v in zip(shared, unknown, strict=True))
        raise TableError(
            f"{table_path} is of another run than {path}, which has no {key}",
            "Give both as one run wrote them",
        )


def _check_panel_counts(names: Sequence[str], runs: Sequence[Run[Any]]) -> None:
    """Checks that the figure of each run has no more panels than it can show."""
    for name, run in zip(names, runs, strict=True):
        command = command_of(run.table.columns)
        assert command is not None  # see `_check_main`
        panels = command.panels_with(run.more)
        try:
            check_panel_count(panels, _split_count(run), len(run.table.metrics), _FEWER)
        except UsageError as error:
            raise UsageError(f"{name}: {error.what}", error.cure) from None


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
    curves = [(run.label or _run_name(run), run.table) for run in runs]
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
