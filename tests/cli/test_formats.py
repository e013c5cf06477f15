"""Animations and surfaces on the command line: the files, and what is refused beforehand."""

from __future__ import annotations

from pathlib import Path

import pytest

import losscli as library
from tests.conftest import Losscli

PLANE = ("plane", "a.pt", "b.pt", "init:5", "--points", 3)
PCA = ("plane", "--pca", "a.pt", "init:5", "b.pt", "--points", 3)
PROJECTED = ("plane", "a.pt", "--points", 3, "--path", "init:5", "--path", "b.pt")
TRAJECTORY = ("trajectory", "a.pt", "init:5", "b.pt", "--residuals", 3)
LINE = ("interpolate", "a.pt", "b.pt", "--points", 3)


@pytest.mark.usefixtures("unlaid")
@pytest.mark.parametrize(
    "run", [PCA, *(pytest.param(run, marks=pytest.mark.stress) for run in (TRAJECTORY, PROJECTED))]
)
def test_animations_and_surfaces_are_drawn_again(
    run: tuple[object, ...], losscli: Losscli, folder: Path
) -> None:
    figures = ("--figure", "x.gif", "--figure", "x.vtp")
    done = losscli(*run, "--limit", 4, "--fps", 2, "-o", "x", *figures)
    assert done.status == 0, done.stderr
    assert "x.gif, x.vtp, x.path.vtp" in done.stderr
    again = losscli("plot", "x.csv", "--figure", "y.gif", "--figure", "y.vtp")
    assert again.stdout == "y.gif\ny.vtp\ny.path.vtp\n"
    for suffix in ("gif", "vtp", "path.vtp"):
        assert Path(f"x.{suffix}").read_bytes() == Path(f"y.{suffix}").read_bytes()
    assert losscli("plot", "x.csv", "--figure", "x.path.vtp").stdout == "x.path.vtp\n"
    if run != PCA:
        library.load("x").save("z", figure=("z.gif", "z.vtp"))
        assert Path("z.gif").read_bytes() == Path("x.gif").read_bytes()
        assert Path("z.path.vtp").read_bytes() == Path("x.path.vtp").read_bytes()
    still = losscli("plot", "x.csv", "--fps", 1, "-o", "still.png")
    assert (still.status, Path("still.png").exists()) == (2, False)
    assert "--fps has no effect without a .gif or .mp4" in still.stderr
    slower = losscli("plot", "x.csv", "--fps", 1, "-o", "slower.gif")
    assert slower.status == 0
    assert Path("slower.gif").read_bytes() != Path("x.gif").read_bytes()


@pytest.mark.usefixtures("unlaid")
def test_the_path_of_another_surface_is_kept(losscli: Losscli, folder: Path) -> None:
    Path("x.path.vtp").write_text("of another run")
    done = losscli(*PLANE, "-o", "x", "--figure", "x.vtp")
    assert done.status == 1
    assert "x.path.vtp contains the results of another run" in done.stderr
    assert not Path("x.vtp").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*LINE, "--figure", "x.gif"), "a .gif shows a path, and interpolate has none. Choose one"),
        ((*LINE, "--figure", "x.mp4"), "a .mp4 shows a path, and interpolate has none. Choose one"),
        ((*LINE, "--figure", "x.vtp"), "a .vtp holds a surface, and interpolate has none"),
        ((*PLANE, "--figure", "x.gif"), "a .gif shows a path, and this plane has none. Give --pca"),
        (
            (*TRAJECTORY, "--no-surface", "--figure", "x.vtp"),
            "a .vtp holds a surface, and this trajectory has none. Give a path that leaves",
        ),
        ((*PCA, "--figure", "x.mp4"), "a .mp4 needs imageio-ffmpeg, which is not installed. pip"),
        (
            (*PCA, "--figure", "x.webp"),
            "x.webp does not have the suffix of a figure. Choose one of .png,",
        ),
        ((*PCA, "--fps", 0, "--figure", "x.gif"), "--fps 0 is not between 0.1 and 50"),
        ((*PCA, "--fps", "nan", "--figure", "x.gif"), "--fps nan is not between 0.1 and 50"),
        ((*PCA, "--fps", 3, "--figure", "x.png"), "--fps has no effect without a .gif or .mp4"),
        ((*PCA, "--fps", 3), "--fps has no effect without a .gif or .mp4"),
        ((*PCA, "--fps", 3, "--out", "-"), "--fps has no effect without a .gif or .mp4"),
        (("inspect", "a.pt", "--figure", "x.gif"), "a .gif shows a path, and inspect has none"),
    ],
)
def test_a_format_that_a_run_does_not_have_is_refused_before_anything_is_evaluated(
    arguments: tuple[object, ...],
    message: str,
    losscli: Losscli,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("losscli.cli.run_study._evaluate")
    monkeypatch.setattr("losscli.registry.find_spec", lambda _: None)
    before = sorted(Path().iterdir())
    done = losscli(*arguments, *(() if arguments[0] == "inspect" else ("-o", "x")))
    assert (done.status, done.stdout) == (2, "")
    assert done.stderr.startswith(f"losscli: {message}")
    assert done.stderr.count("\n") == 1
    assert sorted(Path().iterdir()) == before


@pytest.mark.usefixtures("unseen")
def test_plot_refuses_a_format_that_a_table_does_not_have(losscli: Losscli, folder: Path) -> None:
    losscli(*PLANE, "-o", "plane", "--no-figure")
    losscli(*LINE, "-o", "line", "--no-figure")
    for table, figure, message in (
        ("plane.csv", "x.gif", "this plane has none. Give --pca or --path"),
        ("line.csv", "x.gif", "interpolate has none. Choose one of .png, .svg, .pdf, .html"),
        ("line.csv", "x.vtp", "a .vtp holds a surface, and interpolate has none"),
    ):
        done = losscli("plot", table, "--figure", figure)
        assert (done.status, done.stderr.count("\n")) == (2, 1)
        assert message in done.stderr
        assert not Path(figure).exists()
