"""Wrong values of options, and what a run leaves behind in the process."""

from __future__ import annotations

import inspect
import logging
import re
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import typer.main

from losscli.cli import app
from tests.conftest import Losscli

WRONG = {
    "interpolate a.pt b.pt --dtype half": (
        "--dtype must be float32, float64, bfloat16 or float16, not 'half'"
    ),
    "interpolate a.pt b.pt --buffers=c": (
        "--buffers must be interpolate, a, b or recalibrate, not 'c'"
    ),
    "export a.pt b.pt --t 0 -o x.pt --kind arc": "--kind must be bezier or chain, not 'arc'",
    "plane a.pt --axes x": "--axes must be hessian, not 'x'",
    "list models-and-data": "kind must be models, data, losses or metrics, not 'models-and-data'",
    "interpolate a.pt b.pt --points 1e3": "--points must be a whole number, not '1e3'",
    "interpolate a.pt b.pt --range 0 x": "--range must be two numbers, not 'x'",
    "plane a.pt --points 3,4": "--points must be a whole number, not '3,4'",
    "sharpness a.pt --rho 0.1 --rho x": "--rho must be a number, not 'x'",
    "interpolate a.pt b.pt --points": "Option '--points' requires an argument",
    "barriers a.pt b.pt --disagreement=1": "Option '--disagreement' does not take a value",
}


@pytest.mark.parametrize("command", WRONG)
def test_a_wrong_value_is_reported_in_one_line(
    command: str, folder: Path, losscli: Losscli
) -> None:
    before = set(folder.iterdir())
    done = losscli(*command.split())
    cure = f"See losscli {command.split(maxsplit=1)[0]} --help"
    assert (done.status, done.stdout) == (2, "")
    assert done.stderr == f"losscli: {WRONG[command]}. {cure}\n"
    assert set(folder.iterdir()) == before


@pytest.mark.parametrize("command", app.NAMES)
def test_help_fills_the_lines_of_a_narrow_terminal(
    command: str,
    losscli: Losscli,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    losscli(command, "--help")
    text = capsys.readouterr().out.partition("╭")[0]
    lines = [line.strip() for line in text.splitlines()]
    assert "losscli" in text
    for line, following in pairwise(lines):
        if line and following:
            assert len(f"{line} {following.split()[0]}") > 58


@pytest.mark.parametrize(
    ("command", "cure"),
    [
        ("interpolate a.pt b.pt --range 0,1", "Separate the numbers by spaces: --range 0 1"),
        ("sharpness a.pt --rho 0.1,2", "Repeat the option: --rho 0.1 --rho 2"),
        ("interpolate a.pt b.pt --points 3,4", "See losscli interpolate --help"),
        ("interpolate a.pt b.pt --rho 3,4", "See losscli interpolate --help"),
    ],
)
def test_numbers_with_commas_are_followed_by_what_the_option_takes(
    command: str, cure: str, folder: Path, losscli: Losscli
) -> None:
    before = set(folder.iterdir())
    done = losscli(*command.split())
    assert (done.status, done.stdout) == (2, "")
    assert done.stderr.endswith(f". {cure}\n")
    assert done.stderr.count("\n") == 1
    assert set(folder.iterdir()) == before


def test_every_option_says_in_its_own_words_what_it_takes(losscli: Losscli) -> None:
    commands = typer.main.get_command(app.make_app("")).commands  # type: ignore[attr-defined]
    tried = set()
    for name, command in commands.items():
        needed = ["a.pt" for p in command.params if p.required and not p.opts[0].startswith("-")]
        hints = inspect.signature(command.callback, eval_str=True).parameters
        for parameter in command.params:
            option, hint = parameter.opts[-1], str(hints[parameter.name].annotation)
            takes = next((t for t in ("Literal[", "int", "float") if t in hint), None)
            if takes is None or not option.startswith("-") or (option, hint) in tried:
                continue
            tried.add((option, hint))
            done = losscli(name, *needed, option, *["foo"] * parameter.nargs)
            what = {
                "int": "a whole number",
                "float": "(a number|two numbers)",
                "Literal[": r"[\w, ]+",
            }
            words = (
                rf"losscli: {option} must be {what[takes]}, not 'foo'. See losscli {name} --help\n"
            )
            assert re.fullmatch(words, done.stderr), done.stderr
            assert (done.status, done.stdout) == (2, "")
    assert len(tried) > 30


def test_quiet_leaves_the_process_as_it_was(folder: Path, losscli: Losscli) -> None:
    logger, filters = logging.getLogger("matplotlib"), list(warnings.filters)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        for command in ("inspect a.pt -q", "inspect absent.pt -q"):
            losscli(*command.split())
            assert logger.level == logging.INFO
            assert warnings.filters == filters
    finally:
        logger.setLevel(level)


@pytest.mark.parametrize("out", ["relu", "relu/", "./relu"])
def test_a_stem_that_is_a_folder_is_refused_with_two_remedies(
    out: str, folder: Path, losscli: Losscli
) -> None:
    (folder / "relu").mkdir()
    done = losscli("interpolate", "a.pt", "b.pt", "-o", out)
    stem = out.rstrip("/")
    assert (done.status, done.stderr) == (
        2,
        (
            f"losscli: --out {out!r} is a folder, not a stem of file names. Give {stem}/NAME to "
            f"write into it, or another stem, such as {stem}-1\n"
        ),
    )
    few = ("--points", 3, "--no-figure")
    assert losscli("interpolate", "a.pt", "b.pt", "-o", f"{stem}/NAME", *few).status == 0
    assert losscli("interpolate", "a.pt", "b.pt", "-o", f"{stem}-1", *few).status == 0
