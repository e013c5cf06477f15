"""Runs from their files, which are checked, and figures of them; torch is not imported."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from losscli.errors import TableError, UsageError
from losscli.registry import (
    COMMANDS,
    Command,
    TableFormat,
    command_of,
    further_table_of,
    pair_position,
)
from losscli.registry import load as load_function
from losscli.results.drawing import Drawing
from losscli.results.figures import check_curve_count, check_panel_count
from losscli.results.result import (
    Result,
    Run,
    check_plotly,
    draw,
    label_runs,
    make_drawing,
    read_summary,
    stem_of,
)
from losscli.settings import PathLike, as_list, checked, describe
from losscli.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "check_curves",
    "check_main",
    "check_panels",
    "choose_drawing",
    "load",
    "plot",
    "read_run",
    "report",
]

# Maximum number of grid points per row: a table may lack some points, but not most of them.
_SPARSEST = 4

_FEWER = "Choose fewer with --split and --metric when you make the table, or give fewer tables"

# Maximum number of checkpoints that a report names.
_LISTED = 4

# Maximum |α|: beyond, weights on the line exceed the range of float32.
_LARGEST_ALPHA = 1e30


@checked()
def load(stem: PathLike) -> Result[Any]:
    """Loads a result from the files that ``Result.save`` or the command line wrote.

    Args:
        stem: STEM of STEM.csv and STEM.json, or the path of one of them.

    Returns:
        The result, with all further tables.

    Raises:
        UsageError: The name is that of a folder.
        TableError: A file is missing, or is not one that losscli wrote.
    """
    base = stem_of(str(stem))
    path = base.with_name(f"{base.name}.csv")
    run = read_run(path, undrawn=True)
    if not run.summary:
        raise TableError(
            f"{path} has no summary next to it: {base.name}.json is missing, broken or of another "
            "table",
            f"Draw it without one, by losscli.plot({str(path)!r}), or make both again",
        )
    return Result(run.table, run.summary, run.command.draw, run.more)


Drawable = PathLike | Result[Any]


@checked(Drawing)
def plot(runs: Drawable | Iterable[Drawable], **drawing: Any) -> Figure:
    """Draws one run or several of one command, as ``losscli plot`` does.

    Args:
        runs: CSV files that losscli wrote, or results: one or several.
        **drawing: The attributes of `losscli.results.drawing.Drawing`: ``log``, ``label``, ….

    Returns:
        A matplotlib figure.

    Raises:
        UsageError: There are no runs, or they have no figure together.
        TableError: A file is missing, or is not one that losscli wrote.
    """
    single = isinstance(runs, str | os.PathLike | Result)
    values = [runs] if single else as_list(runs)
    if not values:
        raise UsageError(f"plot() needs a CSV or a result, not {describe(runs)}")
    names = [
        f"run {k}" if isinstance(value, Result) else str(value) for k, value in enumerate(values)
    ]
    read = list(map(_as_run, values, names))
    options = choose_drawing(names, read, drawing)
    drawn = label_runs(read, options.label)
    check_curves(drawn)
    check_panels(names, drawn)
    return draw(drawn, options)


def _as_run(value: Any, name: str) -> Run[Any]:
    if isinstance(value, Result):
        check_main(value.table, name)
        return value.run
    if isinstance(value, str | os.PathLike):
        return read_run(Path(value))
    raise UsageError(f"{describe(value)} is neither a CSV nor a result", "Give one of the two")


def report(names: Sequence[str], runs: Sequence[Run[Any]], drawing: Drawing) -> str:
    """Returns runs of any commands as one interactive page, with the origin of their numbers.

    Runs of one command share a section if they can be drawn together. The page is HTML that needs
    no other file and no network.

    Raises:
        UsageError: A run has no figure, or Plotly is not installed.
    """
    check_plotly()
    together: dict[str, list[tuple[str, Run[Any]]]] = {}
    for name, run in zip(names, runs, strict=True):
        key = f"{run.command.name} {name}" if run.command.not_overlaid else run.command.name
        together.setdefault(key, []).append((name, run))
    section = load_function("losscli.plotting.html:Section")
    sections = []
    for members in together.values():
        command = members[0][1].command
        shown = ", ".join(run.label or name for name, run in members)
        views = command.page_views([run for _, run in members], drawing)
        origin = [(run.label or name, _origin(run)) for name, run in members]
        sections.append(section(f"{command.name}: {shown}", views, origin))
    page: str = load_function("losscli.plotting.html:render_report")(sections, drawing)
    return page


def _origin(run: Run[Any]) -> str:
    """Says in one line what the numbers of a run come from, as far as its summary says it."""
    summary = run.summary
    if not summary:
        return "There is no summary next to the table: the origin of its numbers is unknown."
    settings = {
        "losscli": summary.get("version"),
        "torch": summary.get("torch"),
        "device": summary.get("device_name") or summary.get("device"),
        "dtype": summary.get("dtype"),
        "model": summary.get("model"),
        "data": summary.get("data"),
        "loss": summary.get("loss"),
        "seed": summary.get("seed"),
    }
    parts = [f"{name} {value}" for name, value in settings.items() if value is not None]
    unit = "batches" if "batches" in summary else "examples"
    counts = summary.get(unit, {})
    parts += [f"{number:,} {unit} of {split}" for split, number in counts.items()]
    checkpoints = []
    for entry in summary.get("checkpoints", ()):
        digest = entry.get("sha256")
        content = f" (SHA-256 {digest[:12]}…)" if digest else ""
        checkpoints.append(f"{entry.get('name', '')}{content}")
    if len(checkpoints) > _LISTED:
        left_out = len(checkpoints) - _LISTED
        checkpoints = [*checkpoints[: _LISTED - 1], f"{left_out} more", checkpoints[-1]]
    parts.append(f"checkpoints {', '.join(checkpoints)}")
    return "; ".join(parts)


def read_run(path: Path, *, undrawn: bool = False) -> Run[Any]:
    """Returns a run from its files, after checking that it can be drawn.

    Args:
        path: STEM.csv, which may be a pipe. STEM.json and further tables are read if they exist.
        undrawn: Whether to read the further tables that no figure shows, too.

    Raises:
        TableError: A file cannot be read, or is not one that losscli wrote.
    """
    table = Table.read(path, pipe=True)
    command = check_main(table, str(path))
    summary = read_summary(path.with_suffix(".json"), command)
    more = _read_further(path, command, table, summary, undrawn=undrawn)
    return Run(table, summary, more=more, source=str(path))


def choose_drawing(
    names: Sequence[str], runs: Sequence[Run[Any]], options: Mapping[str, Any]
) -> Drawing:
    """Returns how runs are drawn: by the given options, else as all of them were drawn before.

    Args:
        names: The name of each run in errors.
        runs: The runs. The labels of checkpoints are those of a single run.
        options: The options that were given.

    Raises:
        UsageError: An option is invalid.
        TableError: A summary holds an invalid option.
    """
    stored: list[dict[str, Any]] = []
    for name, run in zip(names, runs, strict=True):
        own = run.summary.get("drawing", {})
        try:
            if style := Drawing(**own).style:
                load_function("losscli.plotting.style_sheet:parse")(style)
        except UsageError as error:
            where = Path(name).with_suffix(".json")
            raise TableError(f"{where}, drawing: {error.what}", error.cure) from None
        stored.append(own if len(runs) == 1 else {**own, "label": ()})
    common = {
        key: value
        for key, value in stored[0].items()
        if all(other.get(key) == value for other in stored)
    }
    return make_drawing({**common, **options})


def check_main(table: Table, name: str) -> Command:
    """Returns the command of a main table that can be drawn; ``name`` is its name in errors.

    Raises:
        TableError: It is not a table that can be drawn.
    """
    further = further_table_of(table.columns)
    if further and further.refused_alone:
        reason, cure = further.refused_alone
        raise TableError(f"{name} {reason}", cure)
    command = command_of(table.columns)
    if command is None:
        *others, last = (c.name for c in COMMANDS.values() if c.cli)
        raise TableError(
            f"{name} is not a table that losscli can draw: "
            f"its columns are {', '.join(table.columns)}",
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
                    f"{name}, record {number}: {column} is {value}, not a point on a line",
                    f"Give numbers from {-_LARGEST_ALPHA:g} to {_LARGEST_ALPHA:g}",
                )
            if column in expected.errors and value < 0:
                raise TableError(
                    f"{name}, record {number}: {column} is {value}, but errors cannot be negative",
                    "Give the CSV as written by losscli",
                )


def _check_grid(table: Table, name: str, expected: TableFormat) -> None:
    """Checks that the rows fill enough of the grid, which is allocated as a whole."""
    if not expected.grid or (expected.pairs and pair_position(table.columns)):
        return
    values = [set(table[column]) - {None} for column in expected.grid]
    points = (
        math.comb(len(set().union(*values)), 2) if expected.pairs else math.prod(map(len, values))
    )
    if points > _SPARSEST * len(table.rows):
        raise TableError(
            f"{name} has {len(table.rows):,} rows for the {points:,} points that its columns "
            f"{' and '.join(expected.grid)} make, so they are not a grid",
            "Give a CSV as written by losscli",
        )


def _read_further(
    path: Path, command: Command, main: Table, summary: dict[str, Any], *, undrawn: bool
) -> dict[str, Table]:
    """Reads the further tables in the summary of a run; without a summary, all next to its CSV."""
    more = {}
    for name, expected in command.further_tables.items():
        table_path = path.with_suffix(f".{name}.csv")
        if (
            (expected.drawn or undrawn)
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
            "Give both as written by one run",
        )


def check_curves(runs: Sequence[Run[Any]]) -> None:
    """Checks that a figure of runs has no more curves than it can show.

    Raises:
        UsageError: There are too many.
    """
    check_curve_count(sum(map(_split_count, runs)), _FEWER)


def check_panels(names: Sequence[str], runs: Sequence[Run[Any]]) -> None:
    """Checks that the figure of each named run has no more panels than it can show.

    Raises:
        UsageError: There are too many.
    """
    for name, run in zip(names, runs, strict=True):
        panels = run.command.panels_with(run.more)
        try:
            check_panel_count(panels, _split_count(run), len(run.table.metrics), _FEWER)
        except UsageError as error:
            raise UsageError(f"{name}: {error.what}", error.cure) from None


def _split_count(run: Run[Any]) -> int:
    return len(run.table.unique("split")) if "split" in run.table.columns else 0
