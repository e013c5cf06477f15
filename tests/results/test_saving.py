"""Results in files: what Python saves is what the command line writes, and loads again."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import losscli as library
from losscli.errors import LosscliError, OutputError, TableError
from losscli.plotting.style import render
from losscli.registry import COMMANDS, further_table_names
from losscli.results.result import Result, to_json
from tests.cases import sample
from tests.conftest import Losscli

RUNS: dict[str, tuple[str, Callable[[], Result[Any]]]] = {
    "interpolate": (
        "interpolate a.pt b.pt --points 3 --layerwise --log --figure OUT.svg --figure OUT.html",
        lambda: library.interpolate("a.pt", "b.pt", points=3, layerwise=True),
    ),
    "context": (
        "interpolate a.pt b.pt --points 3 --range 0 1 --context whole.csv",
        lambda: library.interpolate(
            "a.pt", "b.pt", points=3, range=(0, 1), context=library.load("whole").table
        ),
    ),
    "trajectory": (
        "trajectory a.pt b.pt init:7 --residuals 2 --random-walk --split test --no-figure",
        lambda: library.trajectory(
            ["a.pt", "b.pt", "init:7"], residuals=2, random_walk=True, split="test"
        ),
    ),
    "plane": (
        "plane a.pt b.pt init:7 --points 3 --split test --figure OUT.pdf",
        lambda: library.plane(["a.pt", "b.pt", "init:7"], points=3, split="test"),
    ),
    "around": (
        "around a.pt b.pt --directions 2 --points 3 --limit 5 --split test",
        lambda: library.around(["a.pt", "b.pt"], directions=2, points=3, limit=5, split="test"),
    ),
    "check": (
        (
            "check a.pt --eigenvalues 1 --density --blocks --probes 1 --lanczos 2 --split test "
            "--no-figure"
        ),
        lambda: library.check(
            "a.pt",
            eigenvalues=1,
            density=True,
            blocks=True,
            probes=1,
            lanczos=2,
            split="test",
        ),
    ),
    "sharpness": (
        "sharpness a.pt b.pt --samples 2 --limit 5 --rho 0.1 --split test --no-figure",
        lambda: library.sharpness(["a.pt", "b.pt"], samples=2, limit=5, rho=[0.1], split="test"),
    ),
    "barriers": (
        "barriers a.pt b.pt init:7 --points 3 --no-figure",
        lambda: library.barriers(["a.pt", "b.pt", "init:7"], points=3),
    ),
    "connect": (
        "connect a.pt b.pt --steps 2 --points 3 --limit 5 --no-figure",
        lambda: library.connect("a.pt", "b.pt", steps=2, points=3, limit=5),
    ),
}


TABLES: dict[str, set[str]] = {
    "interpolate": {"blocks"},
    "context": {"context"},
    "trajectory": {"surface", "walk"},
    "plane": {"path"},
    "around": set(),
    "check": {"escape", "spectrum", "density", "curvature"},
    "sharpness": set(),
    "barriers": {"curves"},
    "connect": {"plane"},
}


def of_command_line(line: str) -> dict[str, Any]:
    """The arguments of `Result.save` for a command."""
    options = {name: True for name in ("log", "no_figure") if f"--{name.replace('_', '-')}" in line}
    return {
        "figure": [f.replace("OUT", "py") for f in re.findall(r"--figure (\S+)", line)]
    } | options


def files(stem: str) -> dict[str, Any]:
    """The contents of the files with a stem, without times."""
    found: dict[str, Any] = {
        p.name.removeprefix(stem): p.read_bytes() for p in Path().glob(f"{stem}.*")
    }
    summary = json.loads(found[".json"])
    del summary["seconds"]
    return {**found, ".json": summary}


@pytest.mark.usefixtures("unlaid")
@pytest.mark.parametrize("name", sample(RUNS, 0, 2))
def test_python_saves_what_the_command_line_writes_and_loads_it(
    name: str, folder: Path, losscli: Losscli, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, function = RUNS[name]
    if name == "context":
        library.interpolate("a.pt", "b.pt", points=3).save("whole", no_figure=True)
    if name == "connect":
        monkeypatch.setattr("losscli.studies.connect._PLANE_POINTS", 3)
    outcome = losscli(*line.replace("OUT", "cli").split(), "-o", "cli")
    assert outcome.status == 0, outcome.stderr
    options = of_command_line(line)
    result = function()
    saved = result.save("py", **options)
    assert {p.name for p in saved} == {p.name for p in folder.glob("py.*")}
    written = files("py")
    assert written == files("cli")
    # Its figures are drawn again in one case; that of a CSV is a promise of its own.
    again = options if name == "interpolate" else {"no_figure": True}
    loaded = library.load("py")
    assert {*loaded.save("py", **again)} <= {*saved}
    assert files("py") == written
    assert loaded.table.columns == result.table.columns
    assert {*loaded.more} == {*result.more} == TABLES[name]


def test_every_study_is_saved_by_some_run() -> None:
    # A soup is saved with its checkpoint, see test_soup.py.
    apart = {"inspect", "soup"}
    assert {line.split()[0] for line, _ in RUNS.values()} | apart == {*COMMANDS}
    assert set().union(*TABLES.values()) == further_table_names()


@pytest.mark.usefixtures("unlaid")
def test_an_inspection_is_saved_and_loaded_too(folder: Path, losscli: Losscli) -> None:
    result = library.inspect(["a.pt", "b.pt"])
    result.save("py")
    assert losscli("inspect", "a.pt", "b.pt", "--figure", "cli.png").status == 0
    assert Path("py.png").read_bytes() == Path("cli.png").read_bytes()
    loaded = library.load("py.csv")
    assert (loaded.table, to_json(loaded.summary)) == (result.table, to_json(result.summary))
    with pytest.raises(OutputError, match=r"py\.csv contains the results of another run"):
        result.save("py")  # its summary has no identity that would be the same
    assert result.save("py", force=True)


@functools.cache
def interpolated() -> Result[Any]:
    """The result is the same in the folder of each test."""
    return library.interpolate("a.pt", "b.pt", points=3, range=(0, 1))


@pytest.fixture
def line(folder: Path) -> Result[Any]:
    return interpolated()


REFUSED: dict[str, tuple[Callable[[Result[Any]], object], str]] = {
    "a folder": (lambda line: line.save("sub/"), "'sub/' is a folder, not a stem of file names"),
    "no path": (lambda line: line.save(3), "stem must be a path, not 3"),
    "no figure": (lambda line: line.save("x", figure=3), "figure must be a path, not 3"),
    "no suffix": (
        lambda line: line.save("x", figure="y.jpg"),
        "y.jpg does not have the suffix of a figure",
    ),
    "both": (lambda line: line.save("x", figure="x.png", no_figure=True), "contradict each other"),
    "a typo": (
        lambda line: line.save("x", forec=True),
        r"Result\.save\(\) has no argument 'forec'\. Did you mean 'force'",
    ),
    "a value": (lambda line: line.figure(log="yes"), "log must be True or False, not 'yes'"),
    "of a page": (lambda line: line.html(lgo=True), r"html\(\) has no argument 'lgo'"),
    "no file": (lambda _: library.load("nowhere"), r"nowhere\.csv cannot be read: No such file"),
    "no stem": (lambda _: library.load(None), "stem must be a path, not None"),
    "no run": (lambda _: library.plot([]), r"plot\(\) needs a CSV or a result, not a list"),
    "a number": (lambda _: library.plot(3), r"plot\(\) needs a CSV or a result, not 3"),
    "one of two": (lambda line: library.plot([line, 3]), "3 is neither a CSV nor a result"),
    "labels": (
        lambda line: library.plot(line, label=["a", "b", "c"]),
        "3 labels for 2 checkpoints",
    ),
    "kinds": (
        lambda line: library.plot([line, library.inspect("a.pt")]),
        "tables of inspect and interpolate have no axes in common",
    ),
    "a table": (
        lambda line: library.plot(line.table),
        r"plot\(\) needs a CSV or a result, not a Ta",
    ),
    "a column": (lambda line: line.table["los"], "the table has no column 'los'"),
    "text": (lambda line: line.table.floats("split"), "the column 'split' has no numbers"),
    "rows": (lambda line: line.table.where("Split", "train"), "the table has no column 'Split'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_misuse_is_refused_in_one_line(name: str, line: Result[Any], folder: Path) -> None:
    before = {*folder.iterdir()}
    call, message = REFUSED[name]
    with pytest.raises(LosscliError, match=message) as caught:
        call(line)
    assert "\n" not in str(caught.value)
    assert {*folder.iterdir()} == before


def test_results_of_another_run_are_not_overwritten(line: Result[Any]) -> None:
    line.save("x", no_figure=True)
    line.save("x", no_figure=True)  # the same run
    written = files("x")
    other = library.interpolate("b.pt", "a.pt", points=3, range=(0, 1))
    with pytest.raises(OutputError, match=r"x\.csv contains the results of another run"):
        other.save("x")
    assert files("x") == written
    other.save("x", force=True, no_figure=True)
    assert files("x") != written


@pytest.mark.usefixtures("unlaid")
def test_a_table_without_its_summary_is_drawn_and_not_loaded(line: Result[Any]) -> None:
    line.save("x", no_figure=True)
    file = Path("x.json")
    for content in ("{", '{"command": "check"}', None):
        file.unlink() if content is None else file.write_text(content)
        with pytest.raises(TableError, match=r"x\.csv has no summary .*: x\.json is missing"):
            library.load("x")
        assert library.plot("x.csv").axes


@pytest.mark.usefixtures("unlaid")
def test_plot_draws_what_the_command_line_draws(line: Result[Any], losscli: Losscli) -> None:
    line.save("x", no_figure=True)
    options = {"label": ["one", "two"], "title": "both", "log": True}
    command = "plot x.csv x.csv --label one --label two --title both --log -o two"
    assert losscli(*command.split()).status == 0
    for runs in (["x.csv", Path("x.csv")], iter([line, line])):
        figure = library.plot(runs, **options)
        assert figure.get_suptitle() == "both" or "both" in {t.get_text() for t in figure.texts}
        assert render(figure, ".png") == Path("two.png").read_bytes()
    assert render(library.plot(line), ".png") == render(line.figure(), ".png")


@pytest.mark.usefixtures("unlaid")
def test_drawing_options_are_those_of_the_command_line_and_stored(
    folder: Path, losscli: Losscli
) -> None:
    Path("sheet").write_text("lines.linewidth: 4\n")
    line = (
        "interpolate a.pt b.pt --points 3 --size paper --log --label one --label two "
        "--ylim 0.5 3 --no-markers --style sheet -o cli"
    )
    assert losscli(*line.split()).status == 0
    result = library.interpolate("a.pt", "b.pt", points=3)
    result.save(
        "py", size="paper", log=True, label=["one", "two"], ylim=(0.5, 3), no_markers=True,
        style="sheet",
    )  # fmt: skip
    assert files("py") == files("cli")
    # Without options they are drawn as before.
    picture = Path("cli.png").read_bytes()
    loaded = library.load("cli")
    loaded.save("again")
    assert Path("again.png").read_bytes() == picture
    shown, size = loaded._repr_png_()
    assert (shown, size["width"]) == (picture, 3.25 * 96)
    assert library.plot("cli.csv")._repr_png_()[0] == picture
    assert loaded.figure(size="slide").get_figwidth() == 10
