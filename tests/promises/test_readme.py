"""The README tells the truth: its commands run, its pictures are there, its help is that of now."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from losscli.cli.app import app
from tests import readme, warm

TEXT = readme.README.read_text(encoding="utf-8")
COMMANDS = readme.commands(TEXT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    readme.prepare(folder, TEXT)
    return folder


@pytest.fixture(scope="module")
def at_hand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A losscli that need not import everything for each command."""
    with warm.serving(tmp_path_factory.mktemp("warm")) as folder:
        yield folder


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs(command: str, folder: Path, at_hand: Path) -> None:
    done = readme.run(command, folder, at_hand)
    assert done.returncode == 0, done.stderr


def test_every_picture_is_drawn_by_a_command_and_is_there(folder: Path) -> None:
    names = readme.pictures(TEXT)
    assert len(names) >= 5
    for name in names:
        assert (folder / f"{name}.png").exists()
        assert (readme.GALLERY / f"{name}.png").exists()


def test_the_help_texts_and_measurements_are_in_step() -> None:
    assert readme.in_step(TEXT) == TEXT


def test_every_command_of_losscli_is_shown_and_run() -> None:
    names = {command.name for command in app.registered_commands}
    assert names == set(re.findall(r"<!-- losscli (\w+) --help -->", TEXT))
    assert names == {m for command in COMMANDS for m in re.findall(r"losscli (\w+)", command)}
