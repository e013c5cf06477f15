"""A choice that an option does not have, and what a run leaves behind in the process."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest

from tests.conftest import Losscli

CHOICES = {
    "interpolate a.pt b.pt --dtype half": ("'--dtype'", "'half'", "'bfloat16'"),
    "interpolate a.pt b.pt --buffers c": ("'--buffers'", "'c'", "'recalibrate'"),
    "connect a.pt b.pt --kind arc": ("'--kind'", "'arc'", "'bezier'"),
    "export a.pt b.pt --t 0 -o x.pt --kind arc": ("'--kind'", "'arc'", "'chain'"),
    "align a.pt b.pt -o x.pt --by names": ("'--by'", "'names'", "'activations'"),
    "around a.pt --along x": ("'--along'", "'x'", "'gradient'"),
    "plane a.pt --axes x": ("'--axes'", "'x'", "'hessian'"),
    "list models-and-data": ("'models-and-data'", "'losses'"),
}


@pytest.mark.parametrize("command", CHOICES)
def test_an_unknown_choice_is_reported_in_one_line(
    command: str, folder: Path, losscli: Losscli
) -> None:
    before = set(folder.iterdir())
    done = losscli(*command.split())
    assert (done.status, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert all(word in done.stderr for word in CHOICES[command]), done.stderr
    assert "alue error" not in done.stderr
    assert done.stderr.endswith(f"See losscli {command.split(maxsplit=1)[0]} --help\n")
    assert set(folder.iterdir()) == before


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
