"""The READMEs are correct: commands run, pictures, links and named tests exist, help is current."""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import typer.main

from losscli.cli.app import NAMES, make_app
from tests import readme

TEXT = readme.all_pages()
COMMANDS = readme.commands(TEXT)
SAMPLE = readme.sample(COMMANDS)
PYPROJECT = tomllib.loads((readme.ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
DEV = PROJECT["optional-dependencies"]["dev"]


def without_numbers(text: str) -> str:
    """The words of a text, since the last digits of numbers depend on the machine."""
    return re.sub(r"[\d.e-]*\d", "0", text)


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
        if command == COMMANDS[0] and commands is COMMANDS:
            assert without_numbers(done.stdout) in without_numbers(TEXT)
    names = [
        name
        for name in readme.pictures(TEXT)
        if commands is COMMANDS
        or f" -o {name.removesuffix('.png')}\n" in "\n".join([*commands, ""])
    ]
    assert len(names) >= 5
    for name in names:
        assert (tmp_path / name).exists()


def test_every_command_has_the_arguments_and_options_that_are_shown() -> None:
    lines = [line for line in COMMANDS if line.startswith("losscli ")]
    assert len(lines) > 50
    commands = typer.main.get_command(make_app()).commands  # type: ignore[attr-defined]
    for line in lines:
        words = itertools.takewhile(lambda word: word not in {"|", ">>"}, shlex.split(line))
        _, name, *arguments = words
        commands[name].make_context(name, arguments).close()


def test_every_picture_is_there() -> None:
    shown = readme.pictures(TEXT)
    assert len(shown) > 20
    for name in shown:
        assert 0 < (readme.GALLERY / name).stat().st_size < 500_000


def test_the_main_page_has_at_most_350_lines() -> None:
    text = readme.README.read_text(encoding="utf-8")
    assert text.count("<details") == text.count("</details>") > 20
    assert len(readme.visible(text).splitlines()) <= 350


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: f"{page.relative_to(readme.ROOT)}")
def test_every_link_has_a_target(page: Path) -> None:
    links = readme.links(page)
    assert links
    for file, place in links:
        assert file.exists(), file
        if place:
            assert place in readme.places(file), (file, place)


def test_the_package_page_has_no_links_to_files_of_the_repository() -> None:
    hook = PYPROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    (fragment,) = hook["fragments"]
    text = (readme.ROOT / fragment["path"]).read_text(encoding="utf-8")
    page, _, rest = text.partition(fragment["end-before"])
    assert "--help -->" not in page
    assert "--help -->" in rest
    for substitution in hook["substitutions"]:
        page, count = re.subn(substitution["pattern"], substitution["replacement"], page)
        assert count
    assert page.count("<details") == page.count("</details>") > 20
    assert "![" not in page
    targets = re.findall(r"\]\(([^)\s]*)\)", page)
    assert targets
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []


def test_every_promise_names_tests_that_exist() -> None:
    named = readme.tests_named(TEXT)
    assert len(named) > 60
    there = {
        (path.name, name)
        for path in (readme.ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert set(named) <= there, set(named) - there


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_make_help_has_a_line_for_each_target() -> None:
    targets = re.search(r"^\.PHONY: (.*)$", (readme.ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets
    done = readme.run("make -s help", readme.ROOT)
    assert sorted(line.split()[0] for line in done.stdout.splitlines()) == sorted(
        targets[1].split()
    )


@pytest.mark.stress  # `make check` compares them too
@pytest.mark.skipif(
    not {f"{name}=={version(name)}" for name in ("typer", "rich")} <= set(DEV),
    reason="other versions of typer and rich write other help texts",
)
def test_the_help_texts_and_measurements_are_up_to_date(at_hand: Path) -> None:
    assert readme.in_step(TEXT, at_hand) == TEXT


def test_every_command_of_losscli_is_shown_and_run() -> None:
    names = {*NAMES}
    assert names == set(re.findall(r"<!-- losscli (\w+) --help -->", TEXT))
    for commands in (COMMANDS, SAMPLE):
        assert names == {m for command in commands for m in re.findall(r"losscli (\w+)", command)}
