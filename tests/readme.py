"""What changes in the READMEs with the code: help texts, measurements, commands and pictures.

``python -m tests.readme`` writes the texts and the table of measurements again, ``--check`` says
whether they are up to date, ``--gallery`` runs all commands and keeps the pictures that are shown.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.draw import table

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
# In the order in which their commands run: a page may use the results of those before it.
PAGES = (README, ROOT / "sample_checkpoints" / "README.md", ROOT / "tests" / "README.md")
GALLERY = ROOT / "sample_checkpoints" / "gallery"

MEASURED = ROOT / "tests" / "benchmarks" / "results" / "cpu.json"

_SPEED = re.compile(r"(<!-- speed -->\n).*?(<!-- end -->\n)", re.DOTALL)
_ALL_POINTS = re.compile(r"^losscli (interpolate|plane|around|barriers|connect)(?!.*--points)")
_STUDY = re.compile(r"^losscli (interpolate|trajectory|plane|around|barriers|check|sharpness)")
_TRAINING = re.compile(r"^losscli connect")
_SURFACE = re.compile(r"^losscli trajectory(?!.*--no-surface)")
_LESS = {
    "points": "3",
    "refine": "0.1",
    "samples": "1",
    "probes": "1",
    "lanczos": "9",
}
_WHOLE_PATH = re.compile(r"^(losscli (?:check|sharpness) )(\S+)/path")
_CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_FOLDED = re.compile(r"(<details.*?</summary>).*?</details>", re.DOTALL)
_HELP = re.compile(r"(<!-- (losscli [a-z ]*--help) -->\n```text\n).*?(```\n)", re.DOTALL)


def in_step(text: str, *first: Path) -> str:
    """A page with every help text and every measurement as it is now."""
    text = _HELP.sub(lambda m: m[1] + help_text(m[2], *first).strip("\n") + "\n" + m[3], text)
    found = json.loads(MEASURED.read_text(encoding="utf-8"))
    return _SPEED.sub(lambda m: f"{m[1]}\n{table(found)}\n{m[2]}", text)


def help_text(command: str, *first: Path) -> str:
    done = subprocess.run(
        shlex.split(command),
        check=True,
        capture_output=True,
        text=True,
        env=environment(*first) | {"COLUMNS": "98"},
    )
    return "\n".join(line.rstrip() for line in done.stdout.splitlines())


def all_pages() -> str:
    """The text of all pages."""
    return "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def visible(text: str) -> str:
    """A page as it is first seen: of folded blocks only the summaries."""
    return _FOLDED.sub(r"\1", text)


def commands(text: str) -> list[str]:
    """The commands after a $ in console blocks; one that is repeated runs once."""
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return list(dict.fromkeys(line.removeprefix("$ ") for line in lines if line.startswith("$ ")))


def sample(commands: list[str]) -> list[str]:
    """The first line with each command of losscli, and the lines that write what these read.

    Every line that does not run losscli is among them. They do less: studies take few examples,
    points, samples and probes, a curve is trained for few steps and evaluated on one split, and of
    a path only its end is checked.
    """
    first: dict[str, str] = {}
    for line in commands:
        for shown in re.findall(r"losscli \w+", line) or [line]:
            first.setdefault(shown, line)
    kept = {*first.values()}
    read: set[str] = set()
    for command in reversed(commands):
        if command in kept or set(re.findall(r" -o ([\w-]+)", command)) & read:
            kept.add(command)
            read |= set(re.findall(r"([\w-]+)\.(?:csv|safetensors)", command))
    return [_smaller(command) for command in commands if command in kept]


def _smaller(command: str) -> str:
    command = _ALL_POINTS.sub(r"\g<0> --points 3", command)
    for option, value in _LESS.items():
        command = re.sub(rf"--{option} [\d.]+", f"--{option} {value}", command)
    command = _WHOLE_PATH.sub(_with_end, command)
    command = _TRAINING.sub(r"\g<0> --limit 99 --steps 9 --split test", command)
    command = _SURFACE.sub(r"\g<0> --residuals 3", command)
    return _STUDY.sub(r"\g<0> --limit 99", command)


def _with_end(command: re.Match[str]) -> str:
    """The last checkpoint of a run in the place of its path."""
    (end,) = (ROOT / command[2]).glob("final.*")
    return f"{command[1]}{command[2]}/{end.name}"


def programs(text: str) -> dict[str, str]:
    """The Python files and scripts in a text, by the name in their first line."""
    named = r"```(?:python|sh)\n(?:#!/bin/bash\n)?# (\w+\.\w+)\n(.*?)```"
    return dict(re.findall(named, text, re.DOTALL))


def pictures(text: str) -> list[str]:
    """The files of the gallery that a text shows."""
    shown = r"!\[[^\]]*\]\((?:sample_checkpoints/)?gallery/(\w+\.(?:png|gif))\)"
    return list(dict.fromkeys(re.findall(shown, text)))


def links(page: Path) -> list[tuple[Path, str]]:
    """The files and places in them that a page refers to, without those on the web."""
    found = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", _without_code(page))
    return [(page.parent / file if file else page, place) for file, place in found]


def places(page: Path) -> set[str]:
    """The places of a page that a link can name: its headings, as GitHub does it, and its ids."""
    text = _without_code(page)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings}
    return slugs | set(re.findall(r'<details id="([\w-]+)">', text))


def _without_code(page: Path) -> str:
    return _CODE.sub("", page.read_text(encoding="utf-8"))


def tests_named(text: str) -> list[tuple[str, str]]:
    """The files and functions of the tests that a text names; ``::`` continues a file."""
    found: list[tuple[str, str]] = []
    for file, function in re.findall(r"`(test_\w+\.py)?::(test_\w+)`", text):
        found.append((file or found[-1][0], function))
    return found


def environment(*first: Path) -> dict[str, str]:
    """A plain terminal, with this interpreter's losscli first on the path, after what is given."""
    path = os.pathsep.join(map(str, [*first, Path(sys.executable).parent, os.environ["PATH"]]))
    plain = {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", "NO_COLOR": "1", "TERM": "dumb"}
    return {**os.environ, **plain, "PATH": path}


def prepare(folder: Path, text: str) -> None:
    """Makes a folder in which the commands of a text run."""
    (folder / "sample_checkpoints").symlink_to(ROOT / "sample_checkpoints")
    for name, program in programs(text).items():
        (folder / name).write_text(program, encoding="utf-8")


def run(command: str, folder: Path, *first: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        check=False,
        capture_output=True,
        text=True,
        env=environment(*first),
    )


def redraw_gallery() -> None:
    text = all_pages()
    GALLERY.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, text)
        for command in commands(text):
            print(f"$ {command}", flush=True)
            done = run(command, folder)
            if done.returncode:
                sys.exit(done.stderr)
        for picture in pictures(text):
            shutil.copy(folder / picture, GALLERY)


def main(arguments: list[str]) -> None:
    if arguments == ["--gallery"]:
        redraw_gallery()
        return
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if arguments != ["--check"]:
            page.write_text(in_step(text), encoding="utf-8")
        elif in_step(text) != text:
            name = page.relative_to(ROOT)
            sys.exit(f"{name} does not match --help or the measurements: run make readme")


if __name__ == "__main__":
    main(sys.argv[1:])
