"""The README's moving parts: its help texts, measurements, commands and pictures.

``python -m tests.readme`` writes the texts and the table of measurements again, ``--check`` says
whether they are in step, ``--gallery`` runs every command and keeps the pictures that are shown.
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
GALLERY = ROOT / "sample_checkpoints" / "gallery"

MEASURED = ROOT / "tests" / "benchmarks" / "results" / "cpu.json"

_SPEED = re.compile(r"(<!-- speed -->\n).*?(<!-- end -->\n)", re.DOTALL)
_ALL_POINTS = re.compile(r"^losscli (interpolate|plane|around|barriers)(?!.*--points)")
_STUDY = re.compile(r"^losscli (interpolate|trajectory|plane|around|barriers|check|sharpness)")
_WHOLE_PATH = re.compile(r"^(losscli (?:check|sharpness) )(\S+)/path")
_HELP = re.compile(r"(<!-- (losscli [a-z ]*--help) -->\n```text\n).*?(```\n)", re.DOTALL)


def in_step(text: str, *first: Path) -> str:
    """The README with every help text and every measurement as it is now."""
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


def commands(text: str) -> list[str]:
    """What stands behind a $ in the README's console blocks."""
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


def sample(commands: list[str]) -> list[str]:
    """Commands that show each command and option of losscli, and those that write what they read.

    Every line that is none of losscli itself is among them. They do less: studies take few
    examples, what does not say how many points it takes, takes a few, and of a path only its end is
    checked.
    """
    kept: list[str] = []
    shown: set[str] = set()
    read: set[str] = set()
    for command in reversed(commands):
        shows = set(re.findall(r"losscli \w+|(?<= )--?[a-z][\w-]*", command)) or {command}
        writes = set(re.findall(r" -o ([\w-]+)", command))
        if shows - shown or writes & read:
            shorter = _ALL_POINTS.sub(r"\g<0> --points 9", command)
            shorter = _WHOLE_PATH.sub(_with_end, shorter)
            kept.insert(0, _STUDY.sub(r"\g<0> --limit 99", shorter))
            shown |= shows
            read |= set(re.findall(r"([\w-]+)\.(?:csv|safetensors)", command))
    return kept


def _with_end(command: re.Match[str]) -> str:
    """The last checkpoint of a run in the place of its path."""
    (end,) = (ROOT / command[2]).glob("final.*")
    return f"{command[1]}{command[2]}/{end.name}"


def programs(text: str) -> dict[str, str]:
    """The README's Python files and scripts, by the name in their first line."""
    named = r"```(?:python|sh)\n(?:#!/bin/bash\n)?# (\w+\.\w+)\n(.*?)```"
    return dict(re.findall(named, text, re.DOTALL))


def pictures(text: str) -> list[str]:
    """The files of the pictures that the README shows."""
    return re.findall(r"!\[[^\]]*\]\(sample_checkpoints/gallery/(\w+\.(?:png|gif))\)", text)


def environment(*first: Path) -> dict[str, str]:
    """A plain terminal, with this interpreter's losscli first on the path, after what is given."""
    path = os.pathsep.join(map(str, [*first, Path(sys.executable).parent, os.environ["PATH"]]))
    plain = {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", "NO_COLOR": "1", "TERM": "dumb"}
    return {**os.environ, **plain, "PATH": path}


def prepare(folder: Path, text: str) -> None:
    """Makes a folder in which the README's commands run."""
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
    text = README.read_text(encoding="utf-8")
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
    text = README.read_text(encoding="utf-8")
    if arguments == ["--check"]:
        if in_step(text) != text:
            sys.exit("README.md is not in step with --help or the measurements: run make readme")
    else:
        README.write_text(in_step(text), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
