"""Animations: the path grows checkpoint by checkpoint on its panel, the losses beside it."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from numpy.typing import NDArray
from PIL import Image

from losscli.plotting.layout import finish_layout
from losscli.plotting.lines import Series, draw_panel, split_entries
from losscli.plotting.style import (
    INCH,
    WIDTH,
    columns,
    house_style,
    label_loss,
    new_figure,
    scale_checkpoints,
    shorten_path,
    small_size,
    text_size,
    text_width,
)
from losscli.plotting.surface import WIDE, Contours, draw_path, label_contours
from losscli.registry import load
from losscli.results.drawing import Drawing
from losscli.results.result import Run
from losscli.results.summaries import Summary

__all__ = ["Animation", "Track", "animate", "new_panels"]

Floats = NDArray[np.float64]
Frame = NDArray[np.uint8]

_MOST_FRAMES = 120
_LONGEST_SIDE = 960  # pixels
_HOLD = 2.0  # seconds for which the last frame is shown
_MARGIN = 5.0  # points: half a mark at the edge of a panel


@dataclass(frozen=True)
class Track:
    """A path that grows.

    Attributes:
        x: The first coordinate of its checkpoints, [n].
        y: Their second coordinate, [n].
        numbers: Their numbers on the axis of the losses, [n], which increase.
        labels: Their labels.
        style: The arguments of `draw_path`.
    """

    x: Floats
    y: Floats
    numbers: Floats
    labels: Sequence[str]
    style: Mapping[str, Any]


@dataclass(frozen=True)
class Animation:
    """A figure of paths at successive checkpoints.

    Attributes:
        figure: The figure without its paths, laid out.
        panel: The panel of the paths.
        beside: The panel of the losses.
        series: The losses, which are in ``beside``.
        curves: The artists of the losses.
        caption: Names the checkpoint.
        tracks: The paths.
        times: The number of the last checkpoint in each frame.
        drawing: How it is drawn.
    """

    figure: Figure
    panel: Axes
    beside: Axes
    series: Sequence[Series]
    curves: Sequence[Artist]
    caption: Text
    tracks: Sequence[Track]
    times: list[float]
    drawing: Drawing

    def frames(self, times: Sequence[float] | None = None) -> Iterator[Frame]:
        """Draws the frames of checkpoints, by default of all; what does not change is drawn once.

        Yields:
            The colours of each frame, [height, width, 3]; both sides are even.
        """
        canvas: Any = self.figure.canvas  # of the backend Agg, see `new_figure`
        with house_style(self.drawing):
            for artist in (*self.curves, self.caption):
                artist.set_animated(True)
            canvas.draw()
            background = canvas.copy_from_bbox(self.figure.bbox)
            for time in self.times if times is None else times:
                canvas.restore_region(background)
                self._draw(time)
                shown = np.asarray(canvas.buffer_rgba())
                height, width = (side - side % 2 for side in shown.shape[:2])
                yield shown[:height, :width, :3].copy()

    def _draw(self, time: float) -> None:
        """Draws the paths and the losses up to a checkpoint."""
        box = self.beside.get_window_extent()
        margin = _MARGIN * self.figure.dpi / INCH
        right = self.beside.transData.transform((time, 0.0))[0]
        if time == self.times[-1]:
            right += margin
        revealed = Bbox([[box.x0 - margin, box.y0 - margin], [right, box.y1 + margin]])
        for curve in self.curves:
            curve.set_clip_path(None)
            curve.set_clip_box(revealed)
            curve.set_clip_on(True)
        self.caption.set_text(self._caption(time))
        moving = self._heads(time)
        for track in self.tracks:
            shown = _count(track.numbers, time)
            moving += draw_path(
                self.panel, track.x, track.y, drawing=self.drawing, shown=shown, **track.style
            )
        for artist in sorted([*self.curves, self.caption, *moving], key=Artist.get_zorder):
            assert artist.axes is not None
            artist.axes.draw_artist(artist)
        for artist in moving:
            artist.remove()

    def _heads(self, time: float) -> list[Artist]:
        """Draws a dot at the last loss of each curve."""
        heads: list[Artist] = []
        for series in self.series:
            at = slice(max(_count(series.x, time) - 1, 0), _count(series.x, time))
            heads += self.beside.plot(
                series.x[at],
                series["loss"][at],
                "o",
                color=series.colour,
                ms=6,
                mec="white",
                mew=0.8,
            )
        return heads

    def _caption(self, time: float) -> str:
        """Returns which checkpoint is the last one, with its name if there is one path."""
        every = _times(self.tracks)
        text = f"checkpoint {_count(every, time)} of {every.size}"
        if len(self.tracks) == 1 and self.tracks[0].labels:
            label = self.tracks[0].labels[_count(every, time) - 1]
            width = self.beside.get_window_extent().width / self.figure.dpi * INCH
            left = width - text_width(self.figure, f"{text}: ", text_size())
            # Its width is that in the size of legends.
            text += f": {shorten_path(self.figure, label, left * small_size() / text_size())}"
        return text

    def render(self, suffix: str) -> bytes:
        """Renders the animation as ``.gif`` or ``.mp4``; equal animations give equal bytes."""
        return self._gif() if suffix == ".gif" else self._mp4()

    def _gif(self) -> bytes:
        # The last frame has all colours: shared, they let each frame store only what changes.
        (last,) = map(Image.fromarray, self.frames(self.times[-1:]))
        palette = last.quantize()
        first, *others = (
            Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)
            for frame in self.frames()
        )
        duration = round(100 / self.drawing.fps) * 10  # milliseconds; a GIF counts hundredths
        out = io.BytesIO()
        first.save(
            out,
            "GIF",
            save_all=True,
            append_images=others,
            duration=[*[duration] * len(others), duration + round(1000 * _HOLD)],
            loop=0,
        )
        return out.getvalue()

    def _mp4(self) -> bytes:
        write_frames = load("imageio_ffmpeg:write_frames")
        hold = round(_HOLD * self.drawing.fps)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "animation.mp4"
            writer = None
            for frame in self.frames([*self.times, *[self.times[-1]] * hold]):
                if writer is None:
                    height, width = frame.shape[:2]
                    writer = write_frames(
                        path,
                        (width, height),
                        fps=self.drawing.fps,
                        macro_block_size=2,
                        output_params=["-movflags", "+faststart", "-fflags", "+bitexact"],
                    )
                    writer.send(None)
                writer.send(frame.tobytes())
            assert writer is not None
            writer.close()
            return path.read_bytes()


def new_panels(drawing: Drawing) -> tuple[Figure, Axes, Axes]:
    """Creates a figure with a panel of paths, and one of losses beside or below it."""
    across = columns(drawing, 2)
    rows = 2 // across
    figure = new_figure(drawing, 4.2 * rows, WIDE if across == 2 else WIDTH)
    panel, beside = figure.subplots(rows, across, width_ratios=[1.25, 1][:across])
    return figure, panel, beside


def animate(
    panels: tuple[Figure, Axes, Axes],
    runs: Sequence[Run[Summary]],
    tracks: Sequence[Track],
    series: Sequence[Series],
    drawing: Drawing,
    *,
    counter: str,
    contours: Contours | None,
    notes: Sequence[str],
    entries: Sequence[Sequence[tuple[Artist, str]]],
    colour: str,
    lettered: tuple[Floats, Floats] | None = None,
) -> Animation:
    """Adds the losses, the notes and the legend to a figure, and lays it out.

    Args:
        panels: The figure and its `new_panels`; the first has all but the paths.
        runs: The runs.
        tracks: The paths; each has a checkpoint.
        series: The losses of each path and split over the numbers of its checkpoints.
        drawing: How they are drawn.
        counter: The label of the axis of these numbers.
        contours: The contours in the first panel; None if it has none.
        notes: Notes on the paths.
        entries: The entries of the paths in the legend.
        colour: The colour of the entries of the splits.
        lettered: The coordinates of checkpoints that have a letter each; None if
            there are none.

    Returns:
        The animation.
    """
    figure, panel, beside = panels
    every = _times(tracks)
    stride = -(-every.size // _MOST_FRAMES)
    # The last frame has all checkpoints.
    times = every[::-1][::stride][::-1].tolist()
    scale_checkpoints(beside, every, counter)
    before = {*beside.get_children()}
    more = draw_panel(beside, series, "loss", drawing, log=drawing.log)
    curves = [artist for artist in beside.get_children() if artist not in before]
    beside.set_ylabel(label_loss(figure, runs, drawing, log=drawing.log))
    caption = beside.set_title("checkpoint", loc="left")
    notes = [*notes, *more]
    if stride > 1:
        notes.append(f"Each frame adds {stride} checkpoints.")
    splits = list(dict.fromkeys(s.split for s in series))
    lines = split_entries(runs, splits, colour, series, drawing)
    finish_layout(figure, drawing, notes, [*entries, lines])
    figure.set_dpi(_LONGEST_SIDE / max(figure.get_size_inches()))
    if contours is not None:
        x, y = (
            np.concatenate([marked, *(getattr(track, c) for track in tracks)])
            for c, marked in zip("xy", lettered or ((), ()), strict=True)
        )
        label_contours(panel, contours, x, y, clearance=28 if lettered else 14)
    return Animation(figure, panel, beside, series, curves, caption, tracks, times, drawing)


def _times(tracks: Sequence[Track]) -> Floats:
    """Returns the numbers of all checkpoints in ascending order, each once."""
    return np.unique(np.concatenate([track.numbers for track in tracks]))


def _count(numbers: Floats, time: float) -> int:
    """Counts the checkpoints up to one with the number ``time``."""
    return int(np.searchsorted(numbers, time, "right"))
