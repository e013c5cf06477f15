"""``losscli plot``: pictures from CSV files, without torch."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from losscli.cli.console import Console, stdin
from losscli.cli.options import with_console
from losscli.errors import TableError, UsageError, one_line
from losscli.files import read_regular
from losscli.results import Output, need_few, picture_of, stem_of
from losscli.table import Table

__all__ = ["plot"]


@dataclass(frozen=True)
class _Run:
    table: Table
    summary: dict[str, Any]
    label: str = ""
    more: dict[str, Table] = field(default_factory=dict)
    checkpoint_labels: Sequence[str] = ()


_TABLES = {
    "interpolate": ("context", "blocks"),
    "trajectory": ("surface", "walk"),
    "plane": ("path",),
    "check": ("escape", "spectrum"),
}
_FURTHER = {
    "blocks": ("block", "alpha", "split", "loss", "loss_stderr"),
    "context": ("alpha", "split", "loss"),
    "escape": ("distance", "loss", "loss_stderr"),
    "spectrum": ("checkpoint", "split", "eigenvalue", "error"),
    "surface": ("step", "projection", "residual", "split", "loss"),
    "walk": ("walk", "step", "projection", "residual"),
    "path": ("step", "checkpoint", "x", "y", "off_plane", "split", "loss"),
}

_ERRORS = frozenset({
    "loss_stderr", "barrier_stderr", "lambda_min_error", "lambda_max_error", "trace_stderr",
})  # fmt: skip
_PLACES = {"blocks": "alpha", "context": "alpha"}

# The columns that span a grid; of barriers, each pair of names.
_AXES = {"plane": ("x", "y"), "surface": ("step", "residual"), "barriers": ("a", "b")}

# Points of a grid for each row: a table may lack some, but not most of them.
_SPARSEST = 4

_FEWER = "Choose fewer by --split and --metric when a table is made, or give fewer tables"

# Columns and lines of a terminal that are drawn on; the environment may say anything.
_WIDEST = 1000

# No line reaches farther, since no weight on it would be a float32.
_FARTHEST = 1e30


@with_console
def plot(
    csvs: Annotated[
        list[str],
        typer.Argument(
            metavar="CSV", help="Tables that losscli wrote; - for stdin.", show_default=False
        ),
    ],
    console: Console,
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label",
            help="Repeatable: a name for each CSV, or for each checkpoint of barriers.",
            show_default=False,
        ),
    ] = None,
    title: Annotated[
        str, typer.Option("--title", help="A title over the picture.", show_default=False)
    ] = "",
    log: Annotated[bool, typer.Option("--log", help="Give the loss a logarithmic axis.")] = False,
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
            help="Repeatable. A picture (.png, .svg, .pdf) instead of STEM.png.",
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
    runs = _labelled([_read(name) for name in csvs], label or ())
    lines = [run for run in runs if "split" in run.table.columns]
    need_few("interpolate", sum(len(run.table.unique("split")) for run in lines), 0, _FEWER)
    if terminal:
        if {run.table.command for run in runs} != {"interpolate"}:
            raise UsageError(
                "a terminal shows the lines of interpolate alone", "Leave --terminal out"
            )
        _draw_in_terminal(runs, console, log=log)
        return
    alone = csvs[0] if len(csvs) == 1 and csvs[0] != "-" else None
    stem = stem_of(out) if out is not None else Path((alone or "").removesuffix(".csv") or "plot")
    output = Output.plan(stem, tuple(figure or picture_of(out)), force=force)
    from losscli.plotting.drawing import Run, draw, render

    _need_few(csvs, runs)
    drawable = [
        Run(run.table, run.summary, run.label, run.more, run.checkpoint_labels) for run in runs
    ]
    try:
        files = output.draw(lambda: draw(drawable, title=title, log=log))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        told = [str(_beside(c)) for c, run in zip(csvs, runs, strict=True) if run.summary]
        # What fails without summaries too is not theirs, but a fault of losscli.
        render(draw([replace(run, summary={}) for run in drawable], title=title, log=log), ".png")
        raise TableError(
            f"{' or '.join(told)} does not hold what losscli writes: {one_line(error)}",
            "Move it away, or make it again with its CSV",
        ) from error
    console.written = True
    console.result("".join(f"{path}\n" for path in files))


def _beside(csv: str) -> Path:
    """The summary of a table."""
    return Path(csv).with_suffix(".json")


def _labelled(runs: Sequence[_Run], labels: Sequence[str]) -> list[_Run]:
    """Gives each CSV its label, or each checkpoint where one matrix of barriers is drawn."""
    matrix = len(runs) == 1 and runs[0].table.command == "barriers"
    number = len(runs[0].table.unique("a", "b")) if matrix else len(runs)
    if labels and len(labels) != number:
        things = "checkpoints" if matrix else "CSV files"
        raise UsageError(
            f"{len(labels)} labels for {number} {things}", "Give --label once for each, in order"
        )
    if matrix:
        return [replace(runs[0], checkpoint_labels=labels)]
    return [
        replace(run, label=label) for run, label in zip(runs, labels or [""] * number, strict=True)
    ]


def _read(name: str) -> _Run:
    if name == "-":
        text = stdin().decode("utf-8-sig", "replace")
        table = Table.from_csv(io.StringIO(text, newline=""), "stdin")
        return _Run(_checked(table, "stdin"), {})
    path = Path(name)
    table = _checked(Table.read(path, pipe=True), name)
    summary = _summary(path, table.command)
    return _Run(table, summary, more=_more(path, table, summary))


def _checked(table: Table, name: str) -> Table:
    if "block" in table.columns:
        raise TableError(
            f"{name} has the blocks of a line alone",
            "Name the CSV of the line, with which they are drawn",
        )
    if not table.command:
        raise TableError(
            f"{name} is no table that can be drawn: its columns are {', '.join(table.columns)}",
            "Name the CSV of losscli interpolate, trajectory, plane, check or barriers",
        )
    if not table.rows:
        raise TableError(f"{name} has no rows")
    _need_sense(table, name, _ERRORS, "alpha" if table.command == "interpolate" else "")
    _need_grid(table, name, table.command)
    return table


def _need_sense(table: Table, name: str, errors: Collection[str], place: str) -> None:
    """Makes sure that no cell is what no axis can show.

    Args:
        table: The table.
        name: What to call it.
        errors: The columns that are not negative, as far as it has them.
        place: The column that every row has its place by; empty for none.
    """
    for column in (c for c in table.columns if c in errors or c == place):
        for number, value in enumerate(table.floats(column), start=2):
            if column == place and not abs(value) <= _FARTHEST:
                raise TableError(
                    f"{name}, record {number}: {column} is {value}, no point of a line",
                    f"Give numbers from {-_FARTHEST:g} to {_FARTHEST:g}",
                )
            if column in errors and value < 0:
                raise TableError(
                    f"{name}, record {number}: {column} is {value}, and no error is negative",
                    "Give the CSV as losscli wrote it",
                )


def _need_grid(table: Table, name: str, kind: str) -> None:
    """Makes sure that rows fill most of the grid that is drawn of them: it takes memory as a whole.

    Args:
        table: The table.
        name: What to call it.
        kind: The command that it is of, or the name of a further table.
    """
    if kind not in _AXES:
        return
    values = [set(table[column]) - {None} for column in _AXES[kind]]
    if kind == "barriers":
        points = math.comb(len(set().union(*values)), 2)
    else:
        points = math.prod(map(len, values))
    if points > _SPARSEST * len(table.rows):
        raise TableError(
            f"{name} has {len(table.rows):,} rows for the {points:,} points that its columns "
            f"{' and '.join(_AXES[kind])} make, and is no grid",
            "Give a CSV as losscli wrote it",
        )


def _summary(path: Path, command: str) -> dict[str, Any]:
    """Reads the summary beside a CSV; without one, the picture has no names to show."""
    try:
        summary = json.loads(read_regular(_beside(str(path))).decode())
    except (OSError, ValueError, RecursionError):
        return {}
    match summary:
        case {
            "command": str(made_by),
            "checkpoints": [*checkpoints],
            "splits": dict(splits),
            "examples": dict(),
        } if made_by == command:
            listed = isinstance(summary.get("tables", []), list)
            named = all(isinstance(c, dict) and isinstance(c.get("name"), str) for c in checkpoints)
            if listed and named and all(isinstance(split, dict) for split in splits.values()):
                return dict(summary)
    return {}


def _more(path: Path, own: Table, summary: dict[str, Any]) -> dict[str, Table]:
    """Reads the further tables of a run; without a summary, all that lie beside its CSV."""
    known = _TABLES.get(own.command, ())
    more = {}
    for name in known:
        beside = path.with_suffix(f".{name}.csv")
        if name in summary.get("tables", known) and beside.exists():
            table = Table.read(beside)
            missing = [column for column in _FURTHER[name] if column not in table.columns]
            if missing:
                raise TableError(
                    f"{beside} is not the {name} of {path}: it has no column {missing[0]!r}",
                    f"Give {path} without it, or make both again",
                )
            _need_sense(table, str(beside), {"error", *_ERRORS}, _PLACES.get(name, ""))
            _need_grid(table, str(beside), name)
            _need_kinship(path, name, table, own)
            more[name] = table
    return more


def _need_kinship(path: Path, name: str, table: Table, own: Table) -> None:
    """Makes sure that a further table is of the same run, as far as their rows can tell."""
    shared = {
        "blocks": ("alpha", "split"),
        "surface": ("step", "projection"),
        "spectrum": ("checkpoint", "split"),
    }.get(name, ())
    if not shared:
        return
    there = set(zip(*(own[column] for column in shared), strict=True))
    others = [row for row in zip(*(table[column] for column in shared), strict=True)
              if row not in there]  # fmt: skip
    if others:
        told = ", ".join(f"{c} {v}" for c, v in zip(shared, others[0], strict=True))
        beside = path.with_suffix(f".{name}.csv")
        raise TableError(
            f"{beside} is of another run than {path}, which has no {told}",
            "Give both as one run wrote them",
        )


def _need_few(names: Sequence[str], runs: Sequence[_Run]) -> None:
    """Makes sure that there are no more panels than a picture can show."""
    for name, run in zip(names, runs, strict=True):
        if run.table.command == "inspect":
            continue
        splits = len(run.table.unique("split"))
        command = "" if "blocks" in run.more else run.table.command
        try:
            need_few(command, splits, len(run.table.metrics), _FEWER)
        except UsageError as error:
            raise UsageError(f"{name}: {error.what}", error.cure) from None


def _draw_in_terminal(runs: list[_Run], console: Console, *, log: bool) -> None:
    from losscli.plotting.terminal import draw

    width, height = shutil.get_terminal_size((80, 24))
    encoding = getattr(console.stdout, "encoding", None) or "ascii"
    colour = (
        console.stdout is not None
        and console.stdout.isatty()
        and "NO_COLOR" not in os.environ
        and os.environ.get("TERM") != "dumb"
    )
    curves = [(run.label or _name(run), run.table) for run in runs]
    drawn = draw(
        curves,
        width=min(width, _WIDEST),
        height=min(max(height - 2, 8), _WIDEST),
        colour=colour,
        log=log,
        ascii=not encoding.lower().startswith("utf"),
    )
    console.result(drawn if drawn.endswith("\n") else f"{drawn}\n", drawn=True)


def _name(run: _Run) -> str:
    checkpoints = [c["name"] for c in run.summary.get("checkpoints", [])]
    return " → ".join(checkpoints)
