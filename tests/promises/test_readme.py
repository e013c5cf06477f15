"""The README tells the truth: its commands run, its pictures are there, its help is that of now."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

from losscli.cli.app import NAMES
from tests import readme

TEXT = readme.README.read_text(encoding="utf-8")
COMMANDS = readme.commands(TEXT)
SAMPLE = readme.sample(COMMANDS)
PROJECT = tomllib.loads((readme.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DEV = PROJECT["optional-dependencies"]["dev"]


@pytest.mark.parametrize(
    "commands",
    [
        pytest.param(SAMPLE, id="sample"),
        pytest.param(COMMANDS, id="all", marks=pytest.mark.stress),
    ],
)
def test_the_commands_run_and_draw_the_pictures(
    commands: list[str], tmp_path: Path, at_hand: Path
) -> None:
    """In one test: some commands read what others wrote."""
    readme.prepare(tmp_path, TEXT)
    for command in commands:
        done = readme.run(command, tmp_path, at_hand)
        assert done.returncode == 0, (command, done.stderr)
    names = [
        name
        for name in readme.pictures(TEXT)
        if commands is COMMANDS
        or f" -o {name.removesuffix('.png')}\n" in "\n".join([*commands, ""])
    ]
    assert len(names) >= 5
    for name in names:
        assert (tmp_path / name).exists()


def test_every_picture_is_there() -> None:
    for name in readme.pictures(TEXT):
        assert 0 < (readme.GALLERY / name).stat().st_size < 500_000


@pytest.mark.skipif(
    not {f"{name}=={version(name)}" for name in ("typer", "rich")} <= set(DEV),
    reason="other versions of typer and rich write other help texts",
)
def test_the_help_texts_and_measurements_are_in_step(at_hand: Path) -> None:
    assert readme.in_step(TEXT, at_hand) == TEXT


def test_every_command_of_losscli_is_shown_and_run() -> None:
    names = {*NAMES}
    assert names == set(re.findall(r"<!-- losscli (\w+) --help -->", TEXT))
    for commands in (COMMANDS, SAMPLE):
        assert names == {m for command in commands for m in re.findall(r"losscli (\w+)", command)}
