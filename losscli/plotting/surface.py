"""Losses over two coordinates: contour plots, surface plots in 3D and their colour bar."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize, to_hex
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
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
    STEPS,
    Numbers,
    count_points,
    drawable,
    extent,
    format_number,
    is_light,
    label_loss,
    linear_ticks,
    narrow,
    note_size,
    plain,
    shorten_path,
    small_size,
    text_width,
)
from losscli.results.drawing import Drawing
from losscli.results.result import Run
from losscli.results.summaries import Summary

__all__ = [
    "HIDDEN",
    "LOSS_COLOURS",
    "PALER",
    "PATH",
    "WIDE",
    "Contours",
    "Grid",
    "Scale",
    "add_colour_bar",
    "add_surface_axes",
    "blank_notes",
    "colour_stops",
    "draw_contours",
    "draw_dots",
    "draw_path",
    "draw_surface",
    "hidden_by",
    "keep_inside",
    "label_contours",
    "limit_notes",
    "path_entries",
    "scale_losses",
]

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

WIDE = 9.6  # inches: two panels side by side
PATH = PALETTE[1]  # contrasts with every colour of the colour map below

PALER = 0.4  # the opacity of marks behind a surface
HIDDEN = "Pale marks and dotted lines are behind the surface."

_LOG_RATIO = 30.0  # above this ratio of highest to lowest loss the scale is logarithmic
_FILLS = 4  # bands of colour between two contour lines
_FACETS = 60  # minimum number of facets per side of a surface
_MOST_LAYOUTS = 6
_MANY_CROSSES = 400
_MANY_DOTS = 40
_BOX = np.array([1.0, 0.85, 0.62])
_LIGHT = np.array([-0.35, -0.45, 0.82])

# Viridis is perceptually uniform, also in greyscale and for colour-blind readers. A little white
# keeps lines and dots visible on its darkest end.
LOSS_COLOURS = ListedColormap(
    0.12 + 0.88 * mpl.colormaps["viridis"](np.linspace(0.05, 1, 256))[:, :3]
)
"""The colours of losses, and of barriers and other differences, in all figures: low is dark."""


def colour_stops() -> list[tuple[float, str]]:
    """Returns the colours from the lowest to the highest loss at places in [0, 1]."""
    places = np.linspace(0, 1, 33)
    return [(float(p), to_hex(c)) for p, c in zip(places, LOSS_COLOURS(places), strict=True)]


@dataclass(frozen=True)
class Grid:
    """The losses of one split on a grid.

    Attributes:
        split: The name of the split.
        x: The first coordinate, [nx, ny].
        y: The second coordinate, [nx, ny].
        loss: The loss, [nx, ny]; nan where it is unknown.
    """

    split: str
    x: Floats
    y: Floats
    loss: Floats


@dataclass(frozen=True)
class Scale:
    """Maps losses to [0, 1], the range of colours, contour levels and heights.

    Attributes:
        log: Whether the map is logarithmic.
        low: The loss that maps to 0.
        high: The loss that maps to 1.
        lines: The losses at the contour lines.
    """

    log: bool
    low: float
    high: float
    lines: tuple[float, ...]

    def __call__(self, losses: Any) -> Floats:
        """Maps losses to [0, 1], those beyond its ends to these; others become nan."""
        values = np.asarray(losses, dtype=np.float64)
        shown = np.where(drawable(values, log=self.log), values, np.nan)
        if not self.log:
            return np.clip((shown - self.low) / (self.high - self.low), 0.0, 1.0)
        low, high = math.log10(self.low), math.log10(self.high)
        return np.clip((np.log10(shown) - low) / (high - low), 0.0, 1.0)

    def is_beyond(self, losses: Floats) -> bool:
        """Whether any loss lies outside the range of colours."""
        return bool(np.any((losses < self.low) | (losses > self.high)))

    def colours(self, losses: Floats) -> Floats:
        """Returns the colours of losses; white where a loss cannot be drawn."""
        scaled = self(losses)
        colours = LOSS_COLOURS(np.nan_to_num(scaled))
        colours[np.isnan(scaled)] = 1.0
        return np.asarray(colours)

    def ticks(self, most: int) -> list[float]:
        """Selects losses with a contour line for ticks, preferably powers of ten."""
        chosen = [x for x in self.lines if self.log and math.log10(x).is_integer()]
        chosen = chosen if len(chosen) > 2 else list(self.lines)
        return chosen[:: math.ceil(len(chosen) / most) or 1]

    def labels(self, losses: Sequence[float]) -> list[str]:
        """Formats losses for ticks or contour lines."""
        return [str(label) for label in Numbers(log=self.log).format_ticks(list(losses))]


def scale_losses(losses: Floats, drawing: Drawing) -> Scale:
    """Chooses the scale: logarithmic on request or if the losses span a large ratio."""
    log = drawing.log
    losses = losses if drawing.ylim is None else np.array(drawing.ylim)
    shown = losses[drawable(losses, log=log)]
    if not shown.size:
        return Scale(log, 1.0, 10.0, ())
    log = log or bool(shown.min() > 0 and shown.max() > _LOG_RATIO * shown.min())
    # Positive losses may still be too small for a logarithmic axis.
    shown = shown[drawable(shown, log=log)]
    low, high = extent(shown)
    return Scale(log, low, high, tuple(x for x in _levels(low, high, log=log) if low <= x <= high))


def blank_notes(contours: Sequence[Contours]) -> list[str]:
    """Returns a note for each reason why points of any panel are left blank."""
    counts: dict[str, list[tuple[int, str]]] = {}
    for drawn in contours:
        for number, reason in drawn.blank:
            counts.setdefault(reason, []).append((number, plain(drawn.grid.split)))
    return [
        f"{count_points(of_splits)}: loss {reason}, left blank (×)"
        for reason, of_splits in counts.items()
    ]


def limit_notes(drawing: Drawing) -> list[str]:
    """Returns a note on losses beyond the limits of the scale, if it has limits."""
    if drawing.ylim is None:
        return []
    low, high = map(format_number, drawing.ylim)
    return [f"Losses below {low} or above {high} have the colour of that end of the scale."]


def _levels(low: float, high: float, *, log: bool) -> list[float]:
    """Returns round numbers for contour lines, at most about ten."""
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
    """The contours in one panel.

    Attributes:
        grid: The losses.
        lines: The contour lines; None if there are none.
        names: The labels of the lines.
        blank: For each reason, the number of points left blank, and the reason.
    """

    grid: Grid
    lines: QuadContourSet | None
    names: Sequence[str]
    blank: Sequence[tuple[int, str]]

    def segments(self) -> Iterator[tuple[float, Floats]]:
        """Yields the level in [0, 1] and the points of each connected piece of a line."""
        if self.lines is not None:
            for level, segments in zip(self.lines.levels, self.lines.allsegs, strict=True):
                for segment in segments:
                    if len(segment) > 1:
                        yield float(level), np.asarray(segment)


def draw_contours(axes: Axes, grid: Grid, scale: Scale) -> Contours:
    """Draws filled contours with lines between them, for `label_contours` after the layout."""
    axes.grid(visible=False)
    heights = scale(grid.loss)
    missing = np.isnan(heights)
    levels = scale(scale.lines)
    inner = (levels > 1e-9) & (levels < 1 - 1e-9)
    lines = None
    too_few = min(heights.shape) < 2
    if too_few or missing.all():
        reason = "too few points for a surface" if too_few else "no finite loss"
        axes.text(0.5, 0.5, reason, ha="center", color=PALE, transform=axes.transAxes)
    else:
        shown = np.ma.masked_invalid(heights)
        bands = _bands(levels[inner])
        axes.contourf(grid.x, grid.y, shown, bands, cmap=LOSS_COLOURS, norm=Normalize(0, 1))
        if inner.any():
            colours = _line_colours(levels[inner])
            lines = axes.contour(
                grid.x, grid.y, shown, levels[inner], colors=colours, linewidths=0.8
            )
    if missing.sum() <= _MANY_CROSSES:
        style: dict[str, Any] = {"color": "#9a9a9a", "ms": 3.5, "mew": 0.9, "zorder": 2}
        # Not clipped, since the outermost points lie on the edges of the panel.
        (crosses,) = axes.plot(grid.x[missing], grid.y[missing], "x", clip_on=False, **style)
        crosses.set_in_layout(False)
    finite = drawable(grid.loss, log=False)
    blank = [(int((~finite).sum()), "not finite"), (int((missing & finite).sum()), "not above 0")]
    names = scale.labels(np.array(scale.lines)[inner].tolist())
    return Contours(grid, lines, names, [(number, reason) for number, reason in blank if number])


def label_contours(
    axes: Axes, contours: Contours, *obstacles: Floats, clearance: float = 14
) -> None:
    """Labels each contour line with its loss if there is room; no two labels overlap.

    Args:
        axes: The panel, with its final layout: a line is interrupted at its label.
        contours: The contours.
        *obstacles: The x and the y coordinates of points that labels keep away from.
        clearance: The smallest distance from a label to obstacles and edges, in points.
    """
    if contours.lines is None:
        return
    figure = axes.figure
    assert isinstance(figure, Figure)
    size = np.array(axes.get_window_extent().size) / figure.dpi * INCH
    to_points = axes.transData + axes.transAxes.inverted()
    taken = [point * size for point in to_points.transform(np.column_stack(obstacles)) if obstacles]
    names = dict(zip(contours.lines.levels, contours.names, strict=True))
    placed: list[tuple[Floats, float]] = []
    for level in contours.lines.levels:
        width = text_width(figure, names[level], note_size())
        candidates: list[Floats] = []
        for segment in (points for other, points in contours.segments() if other == level):
            points = to_points.transform(segment) * size
            length = np.concatenate([[0], np.hypot(*np.diff(points, axis=0).T).cumsum()])
            # Centres of all stretches that are long enough for a label with margins.
            centres = np.arange(30, length[-1] - 30, 12)
            candidates += [
                point
                for point in np.column_stack([np.interp(centres, length, p) for p in points.T])
                if all(np.hypot(*(point - at)) > (width + other) / 2 for at, other in placed)
            ]
        distances = [_clearance(point, taken, size) for point in candidates]
        if distances and max(distances) > clearance:
            taken.append(candidates[int(np.argmax(distances))])
            placed.append((taken[-1], width))
    chosen = [to_points.inverted().transform(at / size) for at, _ in placed]
    if chosen:
        axes.clabel(
            contours.lines, fmt=names, fontsize=note_size(), inline_spacing=3, manual=chosen
        )


def _clearance(point: Floats, taken: Sequence[Floats], size: Floats) -> float:
    """Returns the distance to the nearest taken point or edge, in points; at most 60."""
    edges = np.concatenate([point, size - point])
    return float(min([edges.min(), *(np.hypot(*(point - other)) for other in taken), 60.0]))


def _bands(lines: Floats) -> Floats:
    """Returns the edges of the colour bands: the lines, and `_FILLS` bands between two lines."""
    edges = np.concatenate([[0.0], lines, [1.0]])
    bands: Floats = np.interp(
        np.arange((len(edges) - 1) * _FILLS + 1) / _FILLS, range(len(edges)), edges
    )
    # Rounding must not exclude the lowest and the highest loss.
    bands[0], bands[-1] = -1e-9, 1 + 1e-9
    return bands


def _line_colours(levels: Floats) -> list[tuple[float, float, float, float]]:
    """Returns dark lines for light fill colours and light lines for dark ones."""
    light = is_light(LOSS_COLOURS(levels)[:, :3])
    return [(0.1, 0.1, 0.1, 0.75) if dark else (1.0, 1.0, 1.0, 0.85) for dark in light]


def add_colour_bar(
    figure: Figure,
    panels: Sequence[Axes],
    scale: Scale,
    runs: Sequence[Run[Summary]],
    drawing: Drawing,
) -> None:
    """Adds a colour bar to the right of panels, with the name of the loss."""
    label = label_loss(figure, runs, drawing, log=scale.log).replace("\n", ", ")
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, 1), LOSS_COLOURS),
        ax=list(panels),
        ticks=scale(scale.lines),
        label=label,
        fraction=0.05,
        shrink=0.9,
        aspect=26,
        pad=0.02,
    )
    bar.ax.set_yticklabels(scale.labels(scale.lines))
    bar.ax.tick_params(which="both", length=0, labelsize=small_size())
    bar.ax.minorticks_off()
    levels = scale(scale.lines)
    bar.ax.hlines(levels, 0, 1, colors=_line_colours(levels), linewidths=0.8)
    bar.outline.set_visible(False)


# --- In three dimensions -------------------------------------------------------------------------


def add_surface_axes(
    figure: Figure, cell: Any, labels: tuple[str, str, str], azimuth: float
) -> Axes3D:
    """Adds empty 3D axes for a surface.

    Args:
        figure: The figure.
        cell: The cell of a gridspec.
        labels: The labels of the three axes.
        azimuth: The azimuth of the view, in degrees.

    Returns:
        The axes.
    """
    # Artists keep their zorder, so that the surface does not hide a path on it. In an orthographic
    # view a shift towards the viewer changes only which artist hides which.
    axes = figure.add_subplot(cell, projection="3d", computed_zorder=False, proj_type="ortho")
    assert isinstance(axes, Axes3D)
    axes.view_init(elev=30, azim=azimuth)
    axes.set_box_aspect(_BOX, zoom=0.98)
    for axis, label in zip((axes.xaxis, axes.yaxis, axes.zaxis), labels, strict=True):
        axis.set_pane_color((0.97, 0.97, 0.97, 1.0))
        axis.pane.set_edgecolor("#dddddd")
        axis.line.set_color(PALE)
        axis.set_label_text(label, fontsize=small_size())
        axis.set_tick_params(labelsize=note_size(), pad=0)
        axis.labelpad = 1
    return axes


def draw_surface(axes: Axes3D, scale: Scale, contours: Contours, drawing: Drawing) -> None:
    """Draws losses as a surface with contour lines; x and y limits have to be set."""
    grid = contours.grid
    axes.set_zlim(0, 1)
    for axis in (axes.xaxis, axes.yaxis):
        linear_ticks(axis, 2 if drawing.compact else 5)
    ticks = scale.ticks(3 if drawing.compact else 6)
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
    size = _data_lengths(axes)
    scaled = facets / size
    normals = np.cross(scaled[:, 2] - scaled[:, 0], scaled[:, 3] - scaled[:, 1])
    lengths = np.linalg.norm(normals, axis=1, keepdims=True)
    normals = np.divide(normals, lengths, out=np.zeros_like(normals), where=lengths > 0)
    # The sign of a normal depends on the order of the grid; the upper side is always lit.
    bright = np.abs(normals @ _LIGHT) / np.linalg.norm(_LIGHT)
    colours = LOSS_COLOURS(facets[:, :, 2].mean(1))
    colours[:, :3] *= (0.74 + 0.26 * bright)[:, None]

    towards_eye = 0.04 * _towards_eye(axes)
    strokes, stroke_colours = [], [colours]
    for level, line in contours.segments():
        # As short as the facets, since Matplotlib sorts both by depth.
        length = np.concatenate([[0], np.hypot(*(np.diff(line, axis=0) / size[:2]).T).cumsum()])
        positions = np.linspace(0, length[-1], math.ceil(length[-1] * _FACETS) + 1)
        along = (np.interp(positions, length, line[:, k]) for k in (0, 1))
        points = np.column_stack([*along, np.full(len(positions), level)]) + towards_eye
        # A stroke is a degenerate quadrilateral, so that it fits into the array of facets.
        strokes += [points[[k, k + 1, k + 1, k]] for k in range(len(positions) - 1)]
        stroke_colours += [np.repeat(_line_colours(np.array([level])), len(positions) - 1, 0)]
    colours = np.concatenate(stroke_colours)
    widths = [0.3] * len(facets) + [0.7] * len(strokes)
    surface = Poly3DCollection(
        np.array([*facets, *strokes]),
        facecolors=colours,
        edgecolors=colours,
        linewidths=widths,
        zorder=2,
    )
    # Its extent is known only when it is drawn, and lies within the axes.
    surface.set_in_layout(False)
    axes.add_collection3d(surface)


def hidden_by(axes: Axes3D, scale: Scale, contours: Contours, *coordinates: Floats) -> Mask:
    """Returns which points the surface hides: those from which it crosses the line to the eye.

    Args:
        axes: The 3D axes, with their limits set.
        scale: The scale.
        contours: The losses of the surface.
        *coordinates: The three coordinates of the points.
    """
    grid = contours.grid
    if min(grid.loss.shape) < 2 or not len(coordinates[0]):
        return np.zeros(len(coordinates[0]), dtype=np.bool_)
    from scipy.interpolate import RegularGridInterpolator

    surface = RegularGridInterpolator(
        (grid.x[:, 0], grid.y[0]), scale(grid.loss), bounds_error=False
    )
    steps = np.linspace(0, np.linalg.norm(_BOX), 4 * _FACETS)
    rays = np.column_stack(coordinates)[:, None] + steps[:, None] * _towards_eye(axes)
    above = rays[..., 2] - surface(rays[..., :2])
    return np.asarray((above > 0).any(1) & (above < 0).any(1))


def _data_lengths(axes: Axes3D) -> Floats:
    """Returns the data length of one unit of each axis in the picture."""
    limits = np.array([axes.get_xlim(), axes.get_ylim(), axes.get_zlim()])
    return np.asarray((limits[:, 1] - limits[:, 0]) / _BOX)


def _towards_eye(axes: Axes3D) -> Floats:
    """Returns the vector of one unit in the picture towards the viewer, in data lengths."""
    elevation, azimuth = math.radians(axes.elev), math.radians(axes.azim)
    eye = np.array([
        math.cos(elevation) * math.cos(azimuth),
        math.cos(elevation) * math.sin(azimuth),
        math.sin(elevation),
    ])
    return np.asarray(eye * _data_lengths(axes))


def _finer(values: Floats) -> Floats:
    """Refines a grid by linear interpolation, so that facets look smooth."""
    for _ in range(2):
        old = np.arange(len(values))
        new = np.linspace(0, old[-1], old[-1] * max(1, _FACETS // old[-1]) + 1)
        values = np.array([np.interp(new, old, column) for column in values.T])
    return values


# --- Paths ---------------------------------------------------------------------------------------

_START: dict[str, Any] = {"marker": "o", "mfc": "white", "mew": 1.6, "ms": 7.5}
_HEAD: dict[str, Any] = {"marker": "o", "mec": "white", "mew": 0.8, "ms": 9}
_END: dict[str, Any] = {"marker": "*", "mec": "white", "mew": 0.8, "ms": 14}


def draw_path(
    axes: Axes,
    *coordinates: Floats,
    drawing: Drawing,
    colour: str = PATH,
    ends: str = "",
    faces: NDArray[np.float64] | None = None,
    cased: bool = True,
    clip: bool = False,
    behind: Mask | None = None,
    shown: int | None = None,
) -> list[Artist]:
    """Draws a path with a dot at each checkpoint and marks at its start and end.

    Args:
        axes: The panel.
        *coordinates: Two or three coordinates of the checkpoints, in their order.
        drawing: Whether it has dots and marks.
        colour: The colour of the path.
        ends: The colour of the marks at the ends; that of the path if empty.
        faces: The colours of the dots; that of the path if None.
        cased: Whether the path has a white outline.
        clip: Whether the parts outside the panel are left out; marks on its edges are whole.
        behind: The checkpoints behind a surface; None for none. The path is dotted there.
        shown: How many checkpoints are shown, the last of them with a dot instead of the mark of
            the end; None for all.

    Returns:
        Its artists.
    """
    total = len(coordinates[0])
    few = total <= _MANY_DOTS
    coordinates = tuple(c[:shown] for c in coordinates)
    number = len(coordinates[0])
    if not number:
        return []
    casing = [Stroke(linewidth=3.6, foreground="white"), Normal()] if cased else None
    hidden = np.zeros(number, dtype=np.bool_) if behind is None else behind[:shown]
    visible = [np.where(hidden, np.nan, c) for c in coordinates]
    lines: list[Artist] = [
        *axes.plot(*visible, color=colour, lw=1.7, zorder=4, path_effects=casing)
    ]
    if hidden.any():
        lines += axes.plot(*coordinates, color=colour, lw=1.2, ls=(0, (1, 1.5)), zorder=3.9)
    marks: list[Artist] = []
    if clip:
        coordinates = keep_inside(axes, *coordinates)
    if faces is not None and not drawing.no_markers:
        size = 5.5 if few else 3
        marks += draw_dots(axes, *coordinates, faces=faces[:shown], size=size, behind=hidden)
    elif not drawing.no_markers:
        dots = [np.where(hidden, np.nan, c) for c in coordinates]
        marks += axes.plot(*dots, "o", color=colour, ms=4 if few else 2.2, zorder=4.1)
    end = _END if number == total else _HEAD
    for at, mark in () if drawing.no_markers else ((0, _START), (-1, end)):
        point = [c[at : at + 1 or None] for c in coordinates]
        alpha = PALER if hidden[at] else 1.0
        marks += axes.plot(*point, ls="none", zorder=5, alpha=alpha, **_mark(mark, ends or colour))
    for artist in (*lines, *marks):
        artist.set_clip_on(clip and artist in lines)
        artist.set_in_layout(False)
    return [*lines, *marks]


def keep_inside(axes: Axes, *coordinates: Floats) -> tuple[Floats, ...]:
    """Returns the coordinates of points, nan for points outside the ranges of x and y."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    x, y, *_ = coordinates
    inside = (left <= x) & (x <= right) & (low <= y) & (y <= high)
    return tuple(np.where(inside, c, np.nan) for c in coordinates)


def draw_dots(
    axes: Axes, *coordinates: Floats, faces: NDArray[np.float64], size: float, behind: Mask
) -> list[Artist]:
    """Draws dots of different colours.

    Args:
        axes: The panel.
        *coordinates: Two or three coordinates of the dots.
        faces: The colours of the dots.
        size: The diameter in points.
        behind: The dots behind a surface, which are pale.

    Returns:
        The dots.
    """
    scatter: Any = axes.scatter
    # In dense rows, wide edges would hide the dots.
    edges = (0.9, 2.4) if size > 4 else (0.25, 0.25)
    options: dict[str, Any] = {"s": size**2, "edgecolors": INK, "linewidths": edges[0]}
    if isinstance(axes, Axes3D):
        options["depthshade"] = False
    casing = [Stroke(linewidth=edges[1], foreground="white"), Normal()]
    drawn: list[Artist] = []
    for dots, style in (
        (~behind, {"path_effects": casing, "zorder": 4.5}),
        (behind, {"alpha": PALER, "zorder": 4.4}),
    ):
        if dots.any():
            points = scatter(*(c[dots] for c in coordinates), c=faces[dots], **options, **style)
            points.set_in_layout(False)
            drawn.append(points)
    return drawn


def _mark(style: Mapping[str, Any], colour: str) -> dict[str, Any]:
    return {"mec": colour, "mfc": colour, **style}


def path_entries(
    figure: Figure, colour: str, label: str, start: str, end: str, drawing: Drawing
) -> list[tuple[Artist, str]]:
    """Returns the legend entries of a path and its ends; none for the path without a label."""
    dot = "" if drawing.no_markers else "o"
    line = Line2D([], [], color=colour, marker=dot, ms=4, lw=1.7)
    entries: list[tuple[Artist, str]] = [(line, label)] if label else []
    ends = (("start", start, _START), ("end", end, _END))
    for word, name, mark in () if drawing.no_markers else ends:
        handle = Line2D([], [], ls="none", **_mark(mark, colour))
        entries.append((
            handle,
            f"{word}  {shorten_path(figure, name, narrow(figure, 130))}".strip(),
        ))
    return entries
