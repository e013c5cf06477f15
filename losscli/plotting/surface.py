"""Losses over two coordinates: contours, the same in three dimensions, and their colour bar."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import MaxNLocator
from mpl_toolkits.mplot3d import Axes3D  # type: ignore[import-untyped]
from mpl_toolkits.mplot3d.art3d import Poly3DCollection  # type: ignore[import-untyped]
from numpy.typing import NDArray

from losscli.plotting.style import (
    INCH,
    INK,
    PALE,
    PALETTE,
    SMALL,
    STEPS,
    Numbers,
    add_legend,
    drawable,
    extent,
    freeze,
    grow,
    shorten,
    text_width,
)

__all__ = [
    "PATH",
    "WIDE",
    "Contours",
    "Grid",
    "Scale",
    "add_colour_bar",
    "add_foot",
    "add_relief",
    "draw_contours",
    "draw_dots",
    "draw_path",
    "draw_relief",
    "finish_layout",
    "label_contours",
    "path_entries",
    "scale_losses",
    "short_name",
]

Floats = NDArray[np.float64]

WIDE = 9.6  # inches: two panels beside each other
PATH = PALETTE[1]  # stands out on all of the colours below

_RATIO = 30.0  # losses this far apart are shown on a logarithmic scale
_FILLS = 4  # bands of colour between two contour lines
_FACETS = 60  # a side, at least, however few points the surface has
_NOTE = SMALL - 0.5
_MANY_CROSSES = 400
_MANY_DOTS = 40
_BOX = np.array([1.0, 0.85, 0.62])
_LIGHT = np.array([-0.35, -0.45, 0.82])

# Viridis is even to the eye, also grey and colour-blind. A little white keeps its darkest end from
# swallowing lines and dots.
_COLOURS = ListedColormap(0.12 + 0.88 * mpl.colormaps["viridis"](np.linspace(0.05, 1, 256))[:, :3])


@dataclass(frozen=True)
class Grid:
    """The losses of one split on a grid.

    Attributes:
        split: The name of the split.
        x: The first coordinate, [nx, ny].
        y: The second, [nx, ny].
        loss: The loss, [nx, ny]; nan where there is none.
    """

    split: str
    x: Floats
    y: Floats
    loss: Floats


@dataclass(frozen=True)
class Scale:
    """From losses to 0…1, where colours, contours and heights are drawn.

    Attributes:
        log: Whether it goes by the logarithm.
        low: The loss at 0.
        high: The loss at 1.
        lines: The losses that have a contour line.
    """

    log: bool
    low: float
    high: float
    lines: tuple[float, ...]

    def __call__(self, losses: Any) -> Floats:
        """Places losses on 0…1, and what cannot be drawn on nan."""
        values = np.asarray(losses, dtype=np.float64)
        shown = np.where(drawable(values, log=self.log), values, np.nan)
        if not self.log:
            return (shown - self.low) / (self.high - self.low)
        low, high = math.log10(self.low), math.log10(self.high)
        return np.asarray((np.log10(shown) - low) / (high - low))

    def colours(self, losses: Floats) -> Floats:
        """The colours of losses: white where they cannot be drawn."""
        places = self(losses)
        colours = _COLOURS(np.nan_to_num(places))
        colours[np.isnan(places)] = 1.0
        return np.asarray(colours)

    def ticks(self, most: int) -> list[float]:
        """Some of the losses with a contour line, powers of ten before others."""
        chosen = [x for x in self.lines if self.log and math.log10(x).is_integer()]
        chosen = chosen if len(chosen) > 2 else list(self.lines)
        return chosen[:: math.ceil(len(chosen) / most) or 1]

    def labels(self, losses: Sequence[float]) -> list[str]:
        """Writes the losses at ticks or lines."""
        return [str(label) for label in Numbers(log=self.log).format_ticks(list(losses))]


def scale_losses(losses: Floats, *, log: bool) -> Scale:
    """Chooses the scale of losses: logarithmic where asked for, or where they are far apart.

    Args:
        losses: All losses that are to be shown, in any order.
        log: Makes it logarithmic.

    Returns:
        The scale.
    """
    shown = losses[drawable(losses, log=log)]
    if not shown.size:
        return Scale(log, 1.0, 10.0, ())
    log = log or bool(shown.min() > 0 and shown.max() > _RATIO * shown.min())
    # Of positive numbers, but too small to have a logarithm here.
    shown = shown[drawable(shown, log=log)]
    low, high = extent(shown)
    return Scale(log, low, high, tuple(x for x in _levels(low, high, log=log) if low <= x <= high))


def _levels(low: float, high: float, *, log: bool) -> list[float]:
    """Round numbers for contour lines: few enough to be told apart."""
    even = [float(x) for x in MaxNLocator(9, steps=STEPS).tick_values(low, high)]
    if not log:
        return even
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for digits in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3)):
        levels = [float(f"{d}e{k}") for k in range(first, last + 1) for d in digits]
        levels = [x for x in levels if low <= x <= high]
        if len(levels) <= 10:
            return levels if len(levels) > 2 else [x for x in even if x > 0]
    return [float(f"1e{k}") for k in range(first, last + 1, max(1, (last - first) // 8))]


# --- Contours ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contours:
    """What was drawn.

    Attributes:
        grid: The losses.
        lines: The lines, where there are any.
        names: What to write on them.
        blank: How many points were left blank, and why.
    """

    grid: Grid
    lines: QuadContourSet | None
    names: Sequence[str]
    blank: Sequence[tuple[int, str]]

    def pieces(self) -> Iterator[tuple[float, Floats]]:
        """The pieces of the lines, each with its place on the scale."""
        if self.lines is not None:
            for level, found in zip(self.lines.levels, self.lines.allsegs, strict=True):
                for piece in found:
                    if len(piece) > 1:
                        yield float(level), np.asarray(piece)


def draw_contours(axes: Axes, grid: Grid, scale: Scale) -> Contours:
    """Draws losses as bands of colour with lines between them.

    Args:
        axes: Where.
        grid: The losses, at least two each way.
        scale: Their scale.

    Returns:
        The lines, to be labelled once the panel has its size, and what is left blank.
    """
    axes.grid(visible=False)
    at = scale(grid.loss)
    missing = np.isnan(at)
    places = scale(scale.lines)
    inner = (places > 1e-9) & (places < 1 - 1e-9)
    drawn = None
    flat = min(at.shape) < 2
    if flat or missing.all():
        why = "too few points for a surface" if flat else "no finite loss"
        axes.text(0.5, 0.5, why, ha="center", color=PALE, transform=axes.transAxes)
    else:
        shown = np.ma.masked_invalid(at)
        bands = _bands(places[inner])
        axes.contourf(grid.x, grid.y, shown, bands, cmap=_COLOURS, norm=Normalize(0, 1))
        if inner.any():
            colours = _line_colours(places[inner])
            drawn = axes.contour(
                grid.x, grid.y, shown, places[inner], colors=colours, linewidths=0.8
            )
    if missing.sum() <= _MANY_CROSSES:
        axes.plot(grid.x[missing], grid.y[missing], "x", color="#9a9a9a", ms=3.5, mew=0.9, zorder=2)
    finite = drawable(grid.loss, log=False)
    blank = [(int((~finite).sum()), "not finite"), (int((missing & finite).sum()), "not above 0")]
    names = scale.labels(np.array(scale.lines)[inner].tolist())
    return Contours(grid, drawn, names, [(number, why) for number, why in blank if number])


def label_contours(axes: Axes, contours: Contours, *busy: Floats, apart: float = 14) -> None:
    """Writes on each contour line its loss, where there is room for it.

    Args:
        axes: Where; frozen, for the lines are cut open to the letters' size.
        contours: The lines.
        busy: The x and the y of what is not to be written on.
        apart: How far to stay away from it, in points.
    """
    if contours.lines is None:
        return
    size = np.array(axes.get_window_extent().size) / axes.figure.dpi * INCH
    to_points = axes.transData + axes.transAxes.inverted()
    taken = [point * size for point in to_points.transform(np.column_stack(busy)) if busy]
    chosen = []
    for level in contours.lines.levels:
        places: list[Floats] = []
        for piece in (found for at, found in contours.pieces() if at == level):
            points = to_points.transform(piece) * size
            length = np.concatenate([[0], np.hypot(*np.diff(points, axis=0).T).cumsum()])
            # The middle of every stretch of line as long as a label and its surroundings.
            middles = np.arange(30, length[-1] - 30, 12)
            places += [*np.column_stack([np.interp(middles, length, p) for p in points.T])]
        rooms = [_clearance(place, taken, size) for place in places]
        if rooms and max(rooms) > apart:
            taken.append(places[int(np.argmax(rooms))])
            chosen.append(to_points.inverted().transform(taken[-1] / size))
    if chosen:
        names = dict(zip(contours.lines.levels, contours.names, strict=True))
        axes.clabel(
            contours.lines, fmt=names, fontsize=SMALL - 0.5, inline_spacing=3, manual=chosen
        )


def _clearance(place: Floats, taken: Sequence[Floats], size: Floats) -> float:
    """How far a place is from all that is taken and from the edges, in points."""
    edges = np.concatenate([place, size - place])
    return float(min([edges.min(), *(np.hypot(*(place - other)) for other in taken), 60.0]))


def _bands(lines: Floats) -> Floats:
    """The edges of the bands of colour: the lines, and some between two."""
    edges = np.concatenate([[0.0], lines, [1.0]])
    bands: Floats = np.interp(
        np.arange((len(edges) - 1) * _FILLS + 1) / _FILLS, range(len(edges)), edges
    )
    # The lowest and the highest loss are to be inside, whatever rounding says.
    bands[0], bands[-1] = -1e-9, 1 + 1e-9
    return bands


def _line_colours(places: Floats) -> list[tuple[float, float, float, float]]:
    """Dark lines where the colour is light, light ones where it is dark."""
    light = _COLOURS(places)[:, :3] @ np.array([0.21, 0.72, 0.07]) > 0.42
    return [(0.1, 0.1, 0.1, 0.75) if yes else (1.0, 1.0, 1.0, 0.85) for yes in light]


def add_colour_bar(figure: Figure, panels: Sequence[Axes], scale: Scale, label: str) -> None:
    """Puts the colours' meaning to the right of some panels.

    Args:
        figure: Where.
        panels: The panels that have these colours.
        scale: The scale.
        label: What the colours stand for.
    """
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, 1), _COLOURS),
        ax=list(panels),
        ticks=scale(scale.lines),
        label=label,
        fraction=0.05,
        shrink=0.9,
        aspect=26,
        pad=0.02,
    )
    bar.ax.set_yticklabels(scale.labels(scale.lines))
    bar.ax.tick_params(which="both", length=0, labelsize=SMALL)
    bar.ax.minorticks_off()
    places = scale(scale.lines)
    bar.ax.hlines(places, 0, 1, colors=_line_colours(places), linewidths=0.8)
    bar.outline.set_visible(False)


# --- In three dimensions -------------------------------------------------------------------------


def add_relief(figure: Figure, place: Any, labels: tuple[str, str, str], azimuth: float) -> Axes3D:
    """Adds empty axes for a surface.

    Args:
        figure: Where.
        place: The cell of a grid.
        labels: What the three axes stand for.
        azimuth: From where to look, in degrees.

    Returns:
        The axes.
    """
    # In the order they are drawn: what lies on the surface must not vanish in it. In a parallel
    # view a shift towards the eye changes nothing but what hides what.
    axes = figure.add_subplot(place, projection="3d", computed_zorder=False, proj_type="ortho")
    assert isinstance(axes, Axes3D)
    axes.view_init(elev=30, azim=azimuth)
    axes.set_box_aspect(_BOX, zoom=0.98)
    for axis, label in zip((axes.xaxis, axes.yaxis, axes.zaxis), labels, strict=True):
        axis.set_pane_color((0.97, 0.97, 0.97, 1.0))
        axis.pane.set_edgecolor("#dddddd")
        axis.line.set_color(PALE)
        axis.set_label_text(label, fontsize=SMALL)
        axis.set_tick_params(labelsize=SMALL - 0.5, pad=0)
        axis.labelpad = 1
    return axes


def draw_relief(axes: Axes3D, scale: Scale, contours: Contours) -> None:
    """Draws losses as a surface in the colours of the contours, with their lines on it.

    Args:
        axes: Where; its x and y limits are set.
        scale: The scale.
        contours: The losses and their lines.
    """
    grid = contours.grid
    axes.set_zlim(0, 1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=STEPS))
        axis.set_major_formatter(Numbers())
    ticks = scale.ticks(6)
    axes.set_zticks(scale(ticks).tolist(), scale.labels(ticks))
    if min(grid.loss.shape) < 2:
        return
    x, y, z = (_finer(a) for a in (grid.x, grid.y, scale(grid.loss)))
    corners = [
        np.stack([a[:-1, :-1], a[1:, :-1], a[1:, 1:], a[:-1, 1:]], -1).reshape(-1, 4)
        for a in (x, y, z)
    ]
    facets = np.stack(corners, -1)
    facets = facets[np.isfinite(facets).all((1, 2))]
    if not facets.size:
        return
    # The lengths that the axes have in the picture.
    limits = np.array([axes.get_xlim(), axes.get_ylim(), axes.get_zlim()])
    size = (limits[:, 1] - limits[:, 0]) / _BOX
    seen = facets / size
    normals = np.cross(seen[:, 2] - seen[:, 0], seen[:, 3] - seen[:, 1])
    lengths = np.linalg.norm(normals, axis=1, keepdims=True)
    normals = np.divide(normals, lengths, out=np.zeros_like(normals), where=lengths > 0)
    # Sorted steps may run either way: a surface has its light on the upper side.
    bright = np.abs(normals @ _LIGHT) / np.linalg.norm(_LIGHT)
    colours = _COLOURS(facets[:, :, 2].mean(1))
    colours[:, :3] *= (0.74 + 0.26 * bright)[:, None]

    elevation, azimuth = math.radians(axes.elev), math.radians(axes.azim)
    eye = np.array([
        math.cos(elevation) * math.cos(azimuth),
        math.cos(elevation) * math.sin(azimuth),
        math.sin(elevation),
    ])
    nearer = 0.04 * eye * size
    pieces, inks = [], []
    for at, line in contours.pieces():
        # As short as the facets, among which they are sorted by their distance.
        length = np.concatenate([[0], np.hypot(*(np.diff(line, axis=0) / size[:2]).T).cumsum()])
        places = np.linspace(0, length[-1], math.ceil(length[-1] * _FACETS) + 1)
        points = [np.interp(places, length, line[:, k]) for k in (0, 1)]
        points = np.column_stack([*points, np.full(len(places), at)]) + nearer
        # There and back again: all have four corners, like the facets.
        pieces += [points[[k, k + 1, k + 1, k]] for k in range(len(places) - 1)]
        inks += _line_colours(np.array([at])) * (len(places) - 1)
    colours = [*colours, *inks]
    widths = [0.3] * len(facets) + [0.7] * len(pieces)
    surface = Poly3DCollection(
        np.array([*facets, *pieces]),
        facecolors=colours,
        edgecolors=colours,
        linewidths=widths,
        zorder=2,
    )
    # Its extent is known only when it is drawn, and within the axes' own anyway.
    surface.set_in_layout(False)
    axes.add_collection3d(surface)


def _finer(values: Floats) -> Floats:
    """More points between those there are, by straight interpolation: smaller facets look round."""
    for _ in range(2):
        old = np.arange(len(values))
        new = np.linspace(0, old[-1], old[-1] * max(1, _FACETS // old[-1]) + 1)
        values = np.array([np.interp(new, old, column) for column in values.T])
    return values


# --- Paths ---------------------------------------------------------------------------------------

_START: dict[str, Any] = {"marker": "o", "mfc": "white", "mew": 1.6, "ms": 7.5}
_END: dict[str, Any] = {"marker": "*", "mec": "white", "mew": 0.8, "ms": 14}


def draw_path(
    axes: Axes,
    *coordinates: Floats,
    colour: str = PATH,
    ends: str = "",
    faces: NDArray[np.float64] | None = None,
    cased: bool = True,
    clip: bool = False,
) -> None:
    """Draws a path with a dot at each checkpoint, and marks where it starts and ends.

    Args:
        axes: Where.
        coordinates: Two or three for each checkpoint, in their order.
        colour: The path's.
        ends: The colour of the marks, if another.
        faces: The colours of the dots, if others.
        cased: Sets it off from what it lies on by white.
        clip: Ends it at the edges. A path that runs along an axis itself is better not clipped.
    """
    number = len(coordinates[0])
    if not number:
        return
    casing = [Stroke(linewidth=3.6, foreground="white"), Normal()] if cased else None
    few = number <= _MANY_DOTS
    drawn = axes.plot(*coordinates, color=colour, lw=1.7, zorder=4, path_effects=casing)
    if faces is None:
        drawn += axes.plot(*coordinates, "o", color=colour, ms=4 if few else 2.2, zorder=4.1)
    else:
        draw_dots(axes, *coordinates, faces=faces, size=5.5 if few else 3)
    for at, mark in ((0, _START), (-1, _END)):
        place = [c[at : at + 1 or None] for c in coordinates]
        drawn += axes.plot(*place, ls="none", zorder=5, **_mark(mark, ends or colour))
    for line in drawn:
        line.set_clip_on(clip)
        line.set_in_layout(False)


def draw_dots(axes: Axes, *coordinates: Floats, faces: NDArray[np.float64], size: float) -> None:
    """Draws dots of different colours.

    Args:
        axes: Where.
        coordinates: Two or three for each dot.
        faces: Their colours.
        size: In points.
    """
    if not len(faces):
        return
    scatter: Any = axes.scatter
    # Edges of dots in dense rows would be all that is seen of them.
    edges = (0.9, 2.4) if size > 4 else (0.25, 0.25)
    whole = {"depthshade": False} if isinstance(axes, Axes3D) else {}
    dots = scatter(
        *coordinates,
        s=size**2,
        c=faces,
        edgecolors=INK,
        linewidths=edges[0],
        zorder=4.5,
        path_effects=[Stroke(linewidth=edges[1], foreground="white"), Normal()],
        **whole,
    )
    dots.set_in_layout(False)


def _mark(style: Mapping[str, Any], colour: str) -> dict[str, Any]:
    return {"mec": colour, "mfc": colour, **style}


def path_entries(
    figure: Figure, colour: str, what: str, start: str, end: str
) -> list[tuple[Artist, str]]:
    """What a legend says of a path.

    Args:
        figure: The figure.
        colour: The path's.
        what: What the path is.
        start: The name of its first checkpoint, or nothing.
        end: The name of its last one.

    Returns:
        Handles and labels.
    """
    line = Line2D([], [], color=colour, marker="o", ms=4, lw=1.7)
    entries: list[tuple[Artist, str]] = [(line, what)] if what else []
    for word, name, mark in (("start", start, _START), ("end", end, _END)):
        handle = Line2D([], [], ls="none", **_mark(mark, colour))
        entries.append((handle, f"{word}  {short_name(figure, name, 130)}".strip()))
    return entries


# --- The layout ----------------------------------------------------------------------------------


def finish_layout(figure: Figure) -> None:
    """Lays the figure out once and for all, surfaces as large as their places allow."""
    engine = figure.get_layout_engine()
    assert engine is not None
    solid = [axes for axes in figure.axes if isinstance(axes, Axes3D)]
    if solid and mpl.__version_info__[:2] < (3, 11):
        # Before Matplotlib 3.11 the labels of such axes have no place until they are drawn.
        figure.set_layout_engine("none")
        figure.draw_without_rendering()
        figure.set_layout_engine(engine)
    # A panel of fixed proportions shrinks after its margins were measured: measure them again.
    for _ in range(2 if any(axes.get_aspect() != "auto" for axes in figure.axes) else 0):
        engine.execute(figure)
    freeze(figure)
    page = figure.transSubfigure.inverted()
    places = [axes.get_position(original=True) for axes in solid]
    # Letters keep their size, so that it takes more than one step.
    for _ in range(3 if solid else 0):
        figure.draw_without_rendering()
        for axes, place in zip(solid, places, strict=True):
            drawn = axes.get_tightbbox().transformed(page)
            box = axes.get_position(original=True)
            factor = min(place.width / drawn.width, place.height / drawn.height)
            x = (place.x0 + place.x1) / 2 + (box.x0 - (drawn.x0 + drawn.x1) / 2) * factor
            y = (place.y0 + place.y1) / 2 + (box.y0 - (drawn.y0 + drawn.y1) / 2) * factor
            axes.set_position([x, y, box.width * factor, box.height * factor])


# --- Below the panels ----------------------------------------------------------------------------


def _wrap(figure: Figure, note: str, room: float) -> list[str]:
    """Breaks a sentence into lines that are no wider than there is room, in points."""
    letters = len(note)
    while letters > 20:
        lines = textwrap.wrap(note, letters)
        widest = max(text_width(figure, line, _NOTE) for line in lines)
        if widest <= room:
            break
        letters = min(letters - 1, int(letters * room / widest) + 1)
    return textwrap.wrap(note, letters)


def short_name(figure: Figure, name: str, width: float) -> str:
    """A checkpoint's name, without as many of its first folders as must go to be so wide."""
    parts = name.split("/")
    names = (f"…/{'/'.join(parts[k:])}" for k in range(1, len(parts)))
    fitting = (n for n in (name, *names) if text_width(figure, n) <= width)
    return next(fitting, None) or shorten(figure, name, width)


def add_foot(
    figure: Figure,
    panel: Axes,
    notes: Sequence[str],
    groups: Sequence[Sequence[tuple[Artist, str]]],
) -> None:
    """Puts notes and a legend below several panels; the figure grows by them.

    To be called last before the figure is frozen: nothing may grow after it.

    Args:
        figure: Where.
        panel: Any of its panels.
        notes: Sentences.
        groups: The legend's handles and labels; every group begins a row.
    """
    add_legend(figure, groups)
    room = 0.96 * figure.get_figwidth() * INCH
    lines = [line for note in notes for line in _wrap(figure, note, room)]
    if not lines:
        return
    inches = 0.16 * len(lines) + 0.1
    grow(figure, inches)
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)
    share = inches / figure.get_figheight()
    engine.set(rect=(0, share, 1, 1 - share))
    # The legend lies below them, and its height is known when it is drawn.
    below: Any = figure.legends[0] if figure.legends else figure.transFigure
    text = panel.annotate(
        "\n".join(lines),
        xy=(0.02, 1 if figure.legends else 0),
        xycoords=("figure fraction", below),
        xytext=(0, 0.12 * INCH),
        textcoords="offset points",
        fontsize=_NOTE,
        color=PALE,
        linespacing=1.25,
        annotation_clip=False,
    )
    text.set_in_layout(False)
