"""Animations of paths: what each frame shows, how many there are, and the files."""

from __future__ import annotations

import functools
import io
import itertools
import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image, ImageSequence

from losscli.errors import UsageError
from losscli.plotting import animation
from losscli.plotting.animation import Animation
from losscli.plotting.plane import animate_plane
from losscli.plotting.trajectory import animate_trajectory
from losscli.registry import COMMANDS
from losscli.results.drawing import Drawing
from losscli.results.result import label_runs
from tests.cases import sample
from tests.plotting import test_plane, test_trajectory
from tests.plotting.test_interpolation import legend, note, texts

SPLITS = ("train", "test")


BEND = (0, 0.1, 0.4, 0.7, 1)


def winding() -> Any:
    """A path of few checkpoints, hence of few frames."""
    return test_plane.run("pca", test_plane.WINDING[::5], test_plane.bowl, box=(-15, 4, -5, 6))


def two_trajectories() -> list[Any]:
    return [
        test_trajectory.run(BEND, surface=False, walks=1, label="one"),
        test_trajectory.run((0, 0.5, 1), surface=False, label="two"),
    ]


# For each kind of figure: the animation, and the checkpoints of each path.
CASES: dict[str, tuple[Callable[[Drawing], Animation], tuple[int, ...]]] = {
    "pca": (lambda d: animate_plane(winding(), d), (5,)),
    "paths": (
        lambda d: animate_plane(
            test_plane.with_paths(
                test_plane.run(splits=SPLITS), test_plane.STRAIGHT[::2], test_plane.STRAIGHT[:3]
            ),
            d,
        ),
        (5, 3),
    ),
    "ribbon": (lambda d: animate_trajectory([test_trajectory.run(BEND, splits=SPLITS)], d), (5,)),
    "residuals": (lambda d: animate_trajectory(two_trajectories(), d), (5, 3)),
}


@functools.cache
def with_layout(case: str) -> Animation:
    """An animation with its layout, for tests that only draw its frames."""
    return CASES[case][0](Drawing(fps=8))


def decode(content: bytes) -> tuple[list[np.ndarray], list[int]]:
    """The frames of a GIF, and their durations in milliseconds."""
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.format == "GIF"
        assert picture.info["loop"] == 0
        found = [
            (np.asarray(f.convert("RGB")), f.info["duration"])
            for f in ImageSequence.Iterator(picture)
        ]
    frames, durations = zip(*found, strict=True)
    return list(frames), list(durations)


def window(animated: Animation, axes: Any) -> tuple[slice, slice]:
    """The rows and columns of a frame that show a panel."""
    box = axes.get_window_extent()
    height = round(animated.figure.bbox.height)
    return (
        slice(height - math.floor(box.y1), height - math.ceil(box.y0)),
        slice(math.ceil(box.x0), math.floor(box.x1)),
    )


@pytest.mark.usefixtures("laid_out")
@pytest.mark.parametrize("case", sample(CASES, 1, 2))
def test_each_frame_shows_one_more_checkpoint(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, sizes = CASES[case]
    shown: list[tuple[int, int]] = []
    draw_path = animation.draw_path

    def record(axes: Any, x: Any, y: Any, **options: Any) -> Any:
        artists = draw_path(axes, x, y, **options)
        shown.append((len(x), len(artists[0].get_xdata())))
        return artists

    monkeypatch.setattr(animation, "draw_path", record)
    animated = with_layout(case)
    frames = list(animated.frames())
    assert len(frames) == max(sizes)
    times = animated.times
    counts = [
        (n, len(t.numbers[t.numbers <= time]))
        for time in times
        for n, t in zip(sizes, animated.tracks, strict=True)
    ]
    assert shown == counts
    assert counts[-len(sizes) :] == [(n, n) for n in sizes]
    rows, columns = window(animated, animated.beside)
    ink = np.array([[255 * v for v in to_rgb(s.colour)] for s in animated.series])
    for time, frame in zip(times, frames, strict=True):
        # In the panel of the losses, curves end at the current checkpoint, and reach it.
        end = animated.beside.transData.transform((time, 0.0))[0] - columns.start
        panel = frame[rows, columns].astype(float)
        coloured = np.abs(panel[:, :, None] - ink).max(axis=3).min(axis=2) < 40
        (where,) = coloured.any(axis=0).nonzero()
        assert where.max() == pytest.approx(end, abs=7)
    # Nothing else changes: neither the axes nor the notes.
    still = np.ones(frames[0].shape[:2], dtype=bool)
    for axes, above in ((animated.panel, 12), (animated.beside, 40)):
        rows, columns = window(animated, axes)
        top, left = max(rows.start - above, 0), max(columns.start - 12, 0)
        still[top : rows.stop + 12, left : columns.stop + 12] = False
    assert still.mean() > 0.3
    for frame in frames:
        assert np.array_equal(frame[still], frames[0][still])


@pytest.mark.usefixtures("laid_out")
@pytest.mark.parametrize("case", sample(CASES, 3, 4))
def test_a_gif_has_the_frames_and_holds_the_last(case: str) -> None:
    make, sizes = CASES[case]
    animated = with_layout(case)
    content = animated.render(".gif")
    frames, durations = decode(content)
    assert len(frames) == max(sizes)
    assert durations == [120] * (len(frames) - 1) + [2120]
    assert max(frames[0].shape) in {959, 960}
    (last,) = animated.frames(animated.times[-1:])
    assert np.abs(frames[-1].astype(float) - last).mean() < 3
    if case == "residuals":
        assert content == make(Drawing(fps=8)).render(".gif")


@pytest.mark.usefixtures("laid_out")
def test_labels_of_contours_keep_away_from_checkpoints() -> None:
    animated = with_layout("paths")
    to_points = animated.panel.transData.transform
    texts_ = {text for text in animated.panel.texts if text.get_text().strip() not in {*"ABC"}}
    assert texts_
    for x, y, _ in (*test_plane.CORNERS, *test_plane.STRAIGHT[::2]):
        for text in texts_:
            apart = np.hypot(*(to_points(text.get_position()) - to_points((x, y))))
            assert apart * 72 / animated.figure.dpi > 20


def test_a_long_path_has_few_frames_and_its_last_checkpoint() -> None:
    checkpoints = [(t / 100, t / 200, 0.0) for t in range(500)]
    animated = animate_plane(test_plane.run("pca", checkpoints))
    assert len(animated.times) == 100
    assert animated.times[-1] == 499
    assert np.diff(animated.times).tolist() == [5] * 99
    assert "Each frame adds 5 checkpoints." in note(animated.figure)
    few = animate_plane(winding())
    assert "Each frame" not in note(few.figure)


def test_captions_name_the_checkpoint() -> None:
    animated = animate_plane(winding())
    captions = [animated.caption.get_text() for _ in animated.frames(animated.times[:2])]
    assert captions == ["checkpoint 1 of 5: runs/0.pt", "checkpoint 2 of 5: runs/1.pt"]
    labels = [f"net {k}" for k in range(5)]
    names = [{"name": f"runs/{k}.pt"} for k in range(5)]
    path = winding()
    named = replace(path, summary={**path.summary, "checkpoints": names})
    for drawing, caption in (
        (Drawing(label=labels), "checkpoint 2 of 5: net 1"),
        (Drawing(size="paper", label=labels), "checkpoint 2 of 5: net 1"),
        (Drawing(size="paper"), "checkpoint 2 of 5"),
    ):
        (run,) = label_runs([named], drawing.label)
        labelled = animate_plane(run, drawing)
        assert [labelled.caption.get_text() for _ in labelled.frames(labelled.times[1:2])] == [
            caption
        ]


def test_options_of_figures_hold_for_animations() -> None:
    for size, inches in (("slide", (10.0, 5.625)), ("40x40", (40.0, 40.0))):
        animated = animate_plane(winding(), Drawing(size=size))
        assert animated.figure.get_size_inches().tolist() == pytest.approx(inches)
        (frame,) = animated.frames(animated.times[-1:])
        assert max(frame.shape) == 960
        assert "runs/" not in " ".join(texts(animated.figure) + legend(animated.figure))
    limited = animate_plane(winding(), Drawing(ylim=(0.1, 1.0), log=True, title="Fall"))
    assert limited.beside.get_yscale() == "log"
    assert limited.beside.get_ylim() == pytest.approx((0.1, 1.0))
    assert "Fall" in texts(limited.figure)


@pytest.mark.parametrize(
    ("values", "log"),
    sample(itertools.product([math.nan, math.inf, 0.0, -1.0], [False, True]), 1, 8),
)
def test_odd_losses_are_animated(values: float, log: bool) -> None:
    odd = test_plane.run("pca", test_plane.WINDING[::5], lambda x, y: values if x > -5 else 1.0)
    assert len(list(animate_plane(odd, Drawing(log=log)).frames())) == 5


def test_runs_without_a_path_are_refused() -> None:
    with pytest.raises(UsageError, match=r"a .gif shows a path, and this plane has none") as found:
        animate_plane(test_plane.run())
    assert found.value.cure == "Give --pca or --path"
    with pytest.raises(UsageError, match="this trajectory has none"):
        animate_trajectory([test_trajectory.run(along=[math.nan] * 3, aside=lambda p: p)])
    for name, command in COMMANDS.items():
        if not command.animation:
            with pytest.raises(UsageError, match=f"a .gif shows a path, and {name} has none"):
                command.animate([None], Drawing(), ".gif")


def test_a_film_has_the_frames_and_holds_the_last() -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="needs losscli[video]")
    path_of_two = test_plane.run("pca", test_plane.WINDING[::20], test_plane.bowl, size=(3, 3))
    content, again = (animate_plane(path_of_two, Drawing(fps=2)).render(".mp4") for _ in range(2))
    assert content == again
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.mp4"
        path.write_bytes(content)
        frames, seconds = ffmpeg.count_frames_and_secs(path)
        meta = next(ffmpeg.read_frames(path))
    assert frames == 2 + 4
    assert seconds == pytest.approx(3.0)
    assert meta["codec"] == "h264"
    assert meta["size"][0] == 960
