"""The registry of commands: what it says of each is what the command does, and all it takes."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_type_hints

import pytest

import losscli as library
from losscli.registry import COLUMN_TYPES, COMMANDS, TableFormat, command_of, load
from losscli.results.result import Result, to_json
from losscli.results.summaries import from_json
from losscli.table import Table
from tests.moments import save_trained

PATH = ("a.pt", "b.pt", "init:7")
LINE = {"points": 3, "model": "mlp:6-5-3", "split": "test"}

# Keys of a summary that some runs do not write.
OPTIONAL = {
    "batches",
    "drawing",
    "strategy",
    "blocks",
    "repair",
    "mismatches",
    "distance",
    "state_dicts",
    "buffers",
}


def trained_by_adam() -> Result:
    save_trained("adam.pt")
    return library.check("adam.pt", optimizer="adam", split="test")


# Together the runs of a command write all of its further tables, and all kinds of numbers.
RUNS: dict[str, Callable[[], Sequence[Result]]] = {
    "interpolate": lambda: [
        library.interpolate("a.pt", "b.pt", layerwise=True, **LINE),
        library.interpolate("a.pt", "b.pt", derivatives=True, refine=0.5, **LINE),
        library.interpolate("a.pt", "b.pt", batch_loss=True, batch_size=9, limit=2, **LINE),
        library.interpolate("a.pt", "b.pt", sampling_error=0.5, range=(2.0, 3.0), **LINE),
        library.interpolate("a.pt", "b.pt", repair=True, range=(0.0, 1.0), **LINE),
        library.interpolate(
            "a.pt", "b.pt", context=library.interpolate("a.pt", "b.pt", **LINE).table, **LINE
        ),
    ],
    "trajectory": lambda: [library.trajectory(PATH, residuals=2, random_walk=True)],
    "plane": lambda: [
        library.plane(PATH, points=2),
        library.plane("a.pt", axes="hessian", path=PATH, points=2, limit=5, model="mlp:6-5-3"),
    ],
    "check": lambda: [
        library.check("a.pt", eigenvalues=2, learning_rate=0.1, momentum=0.9, only="layers.1.*"),
        trained_by_adam(),
        library.check("b.pt", density=True, blocks=True, probes=2, lanczos=3, split="test"),
    ],
    "sharpness": lambda: [
        library.sharpness(PATH[1:], rho=[0.1, 0.2], samples=2, split="test"),
        library.sharpness("a.pt", samples=1, direction_split="test"),
    ],
    "barriers": lambda: [
        library.barriers(PATH, points=3, disagreement=True, cka=True, repair=True)
    ],
    "around": lambda: [
        library.around(["a.pt", "b.pt"], directions=2, points=3, split="test"),
        library.around("a.pt", along="hessian", points=3, basin_loss=9.0, model="mlp:6-5-3"),
        library.around("a.pt", directions=1, points=3, sampling_error=0.5),
    ],
    "connect": lambda: [library.connect("a.pt", "b.pt", steps=2, points=3, limit=5, split="test")],
    "soup": lambda: [library.soup(PATH, greedy="test", model="mlp:6-5-3")],
    "inspect": lambda: [library.inspect("a.pt"), library.inspect(["a.pt", "b.pt"])],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_writes_the_tables_that_the_registry_says(name: str, folder: Path) -> None:
    command = COMMANDS[name]
    results = RUNS[name]()
    for result in results:
        assert command_of(result.table.columns) is command
        _check_table(result.table, command.table)
        for further, table in result.more.items():
            _check_table(table, command.further_tables[further])
            # A part of a line, and a plane, are tables of the commands that make them.
            assert further in {"context", "plane"} or command_of(table.columns) is None
        assert command.as_text(result).strip()
        # What is written is of the type that the registry says, to the last key.
        text = to_json(result.summary)
        summary = load(command.summary)
        assert to_json(from_json(json.loads(text), summary)) == text
        assert get_type_hints(summary).keys() - OPTIONAL <= result.summary.keys()
    assert {*command.further_tables} == {further for result in results for further in result.more}


def _check_table(table: Table, expected: TableFormat) -> None:
    """Checks that a table has the columns of a format and their types."""
    columns = {*expected.columns, *expected.optional}
    assert {*expected.columns} <= {*table.columns}
    assert {*expected.errors, expected.position, *expected.grid, *expected.shared} - {""} <= columns
    metrics = {*table.columns} - columns
    assert metrics == ({*table.metrics} if expected.metrics else set())
    for column in table.columns:
        expected_type = COLUMN_TYPES.get(column, "float")
        kinds = {"integer": int, "float": float}.get(expected_type, str)
        assert all(cell is None or isinstance(cell, kinds) for cell in table[column]), column
    # A row goes through CSV as it is.
    assert Table.from_csv(io.StringIO(table.to_csv(), newline=""), "").to_csv() == table.to_csv()


@pytest.mark.parametrize("name", COMMANDS)
def test_the_functions_of_a_command_are_there(name: str) -> None:
    command = COMMANDS[name]
    assert load(command.function) is getattr(library, name)
    targets = filter(
        None, (command.cli, command.report, command.drawing, command.views, command.summary)
    )
    assert all(callable(load(target)) for target in targets)


# A command that losscli does not have: its functions, and its entry in the registry.
_RIDGE = '''
from __future__ import annotations
from losscli.settings import checked
from losscli.cli.console import Console
from losscli.cli.options import with_console
from losscli.plotting.style import house_style
from losscli.results.result import Result, to_json
from losscli.registry import COMMANDS
from losscli.table import Table

Summary = dict[str, str]

@checked()
def ridge(path: str) -> Result[TypeOfPlotting]:
    table = Table.build(["height", "width"], [[1.0, 2.0], [3.0, 4.0]])
    return Result(table, {"command": "ridge"}, COMMANDS["ridge"].draw)

@with_console
def command(path: str, console: Console) -> None:
    """Follow a ridge."""
    result = ridge(path)
    open(f"{path}.csv", "w", newline="").write(result.table.to_csv())
    console.result(COMMANDS["ridge"].as_text(result))

def report(result):
    return f"a ridge of {len(result.table.rows)} points\\n"

def draw(run, drawing):
    from matplotlib.figure import Figure
    with house_style():
        figure = Figure()
        figure.add_subplot().plot(run.table["height"], run.table["width"])
    return figure
'''
_ENTRY = """
import sys
from losscli.registry import COMMANDS, Command, TableFormat

COMMANDS["ridge"] = Command(
    name="ridge",
    function="ridge:ridge",
    cli="ridge:command",
    report="ridge:report",
    drawing="ridge:draw",
    summary="ridge:Summary",
    table=TableFormat(("height", "width"), grid=("height", "width")),
    not_overlaid=("ridges cannot be overlaid", "Give one"),
)
# The process that runs this code has imported losscli and its command line already.
for name in [*sys.modules]:
    if name == "losscli" or f"{name}.".startswith("losscli.cli."):
        del sys.modules[name]

import losscli
from losscli.cli import run
from losscli.cli.console import Console

assert "ridge" in dir(losscli) and losscli.ridge("x").figure().axes
assert run(["ridge", "x"], Console()) == 0
assert run(["plot", "x.csv"], Console()) == 0
assert run(["plot", "x.csv", "x.csv"], Console()) == 2
assert run(["--help"], Console()) == 0
"""


def test_a_new_command_takes_its_modules_and_one_entry(tmp_path: Path, at_hand: Path) -> None:
    (tmp_path / "ridge.py").write_text(_RIDGE)
    (tmp_path / "entry.py").write_text(_ENTRY)
    done = subprocess.run(
        [at_hand / "python", "entry.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "a ridge of 2 points" in done.stdout
    assert "Follow a ridge." in done.stdout
    assert "ridges cannot be overlaid" in done.stderr
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
