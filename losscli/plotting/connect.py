"""The figure of ``losscli connect``: the loss on the curve and on the line, and their plane."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.lines import Line2D
from matplotlib.patheffects import Normal, Stroke

from losscli.plotting.layout import finish_layout
from losscli.plotting.line_axis import read_curve, scale_alpha
from losscli.plotting.lines import Series, draw_panel, split_entries
from losscli.plotting.plane import read_grids
from losscli.plotting.style import (
    DASHES,
    INCH,
    INK,
    PALE,
    WIDTH,
    Label,
    columns,
    extent,
    format_number,
    house_style,
    label_loss,
    name_split,
    narrow,
    new_figure,
    plain,
    shorten,
    split_names,
    text_size,
    title_panel,
)
from losscli.plotting.surface import (
    PATH,
    Contours,
    Grid,
    add_colour_bar,
    draw_contours,
    draw_dots,
    label_contours,
    limit_notes,
    scale_losses,
)
from losscli.results.drawing import FULL, Drawing
from losscli.results.result import Run
from losscli.results.summaries import ConnectSummary

__all__ = ["draw_connect"]

_COLOURS = {"curve": PATH, "line": PALE}
# Sizes in inches of a full figure.
_LOSS, _METRIC = 2.6, 1.35  # heights of panels
_WIDE, _NARROW = 5.6, 3.4  # widths of all planes in a row
_LABELS = 0.75  # height of the title and the labels of a plane
_HIGHEST, _LEAST_PLANE = 4.0, 2.2  # heights of a plane
_LINE_POINTS = 20  # of the straight line, that labels keep away from
_MOST_BESIDE = 0.6  # of the width of a page, for the planes beside the curves


def draw_connect(run: Run[ConnectSummary], drawing: Drawing = FULL) -> Figure:
    """Draws losses and metrics on the curve and the line over t, and the plane with the curve."""
    with house_style(drawing):
        splits = split_names([run])
        series = _series(run, splits)
        metrics = list(run.table.metrics)
        # Without the summary, the position of the curve on the plane is unknown.
        plane = run.summary.get("plane")
        grids = read_grids(run.more["plane"]) if plane and "plane" in run.more else []
        figure, cells, places = _new_figure(len(metrics), grids, drawing)
        panels = [figure.add_subplot(cells[0])]
        panels += [figure.add_subplot(cell, sharex=panels[0]) for cell in cells[1:]]
        for panel in panels[:-1]:
            panel.tick_params(labelbottom=False)
        scale_alpha(panels[-1], series)
        notes = [] if series else ["There are no points"]
        for panel, column in zip(panels, ("loss", *metrics), strict=True):
            notes += draw_panel(
                panel, series, column, drawing, log=drawing.log and column == "loss"
            )
            label = shorten(figure, plain(column), narrow(figure, 88), text_size())
            panel.set_ylabel(label)
        label = label_loss(figure, [run], drawing, log=drawing.log).replace("\n", ", ")
        panels[0].set_ylabel(label if drawing.compact else f"{label}\nmean over examples")
        a, b = _ends(run, figure)
        panels[-1].set_xlabel(
            drawing.words(f"t: from {a} (0) to {b} (1), on the path and on the line", "t")
        )
        drawn = _draw_planes(run, figure, places, grids, drawing)
        notes += _notes(run, drawing, with_plane=bool(grids))
        splits_shown = split_entries([run], splits, INK, series, drawing)
        finish_layout(figure, drawing, notes, [_entries(), splits_shown])
        if plane:
            a, c, b = np.array(plane["corners"])
            line = np.linspace(a, b, _LINE_POINTS)
            marked = np.concatenate([plane["curve"], line, [c]])
            for panel, contours in drawn:
                label_contours(panel, contours, *marked.T, clearance=18)
    return figure


def _new_figure(
    metrics: int, grids: Sequence[Grid], drawing: Drawing
) -> tuple[Figure, list[SubplotSpec], list[SubplotSpec]]:
    """Creates a figure of curves with planes below them, or beside them on a slide.

    Returns:
        The figure, the cells of the loss and of each metric, and those of the planes.
    """
    curves = [_LOSS, *[_METRIC] * metrics]
    ratio = _ratio(grids[0]) if grids else 1.0
    if grids and drawing.compact and columns(drawing, 2) == 2:
        figure = new_figure(drawing, max(sum(curves), _LEAST_PLANE * len(grids)))
        across, share = _beside(drawing, ratio, len(grids))
        parts = figure.add_gridspec(1, 2, width_ratios=[1 - share, share])
        left = parts[0].subgridspec(len(curves), 1, height_ratios=curves)
        right = parts[1].subgridspec(math.ceil(len(grids) / across), across)
        return (
            figure,
            [left[row] for row in range(len(curves))],
            [right[divmod(k, across)] for k in range(len(grids))],
        )
    across = columns(drawing, min(2, max(len(grids), 1)))
    rows = math.ceil(len(grids) / across)
    plane = 0.0
    if grids:
        width = _NARROW if drawing.compact else _WIDE / across
        plane = _LABELS + min(width * ratio, _HIGHEST)
    heights = [*curves, *[plane] * rows]
    figure = new_figure(drawing, sum(heights) + 0.3 * bool(rows))
    grid = figure.add_gridspec(len(heights), across, height_ratios=heights)
    places = [grid[len(curves) + k // across, k % across] for k in range(len(grids))]
    return figure, [grid[row, :] for row in range(len(curves))], places


def _ratio(grid: Grid) -> float:
    """Returns the height of a plane relative to its width."""
    (left, right), (low, high) = extent(grid.x), extent(grid.y)
    return (high - low) / (right - left)


def _beside(drawing: Drawing, ratio: float, planes: int) -> tuple[int, float]:
    """Lays out planes of a fixed shape beside the curves on a page of fixed size.

    Args:
        drawing: How the figure is drawn.
        ratio: The height of a plane relative to its width.
        planes: Their number.

    Returns:
        The number of planes side by side with which they are largest, and the share of the width
        of the page that they need.
    """
    width, height = (side or WIDTH for side in drawing.inches)
    labels = 4.5 * drawing.points / INCH
    sides = {
        across: min(
            ((height - labels) / math.ceil(planes / across) - labels) / ratio,
            (_MOST_BESIDE * width - labels) / across - labels,
        )
        for across in range(1, planes + 1)
    }
    across = max(sides, key=lambda number: sides[number])
    share = (across * (sides[across] + labels) + labels) / width
    return across, min(max(share, 1 - _MOST_BESIDE), _MOST_BESIDE)


def _ends(run: Run[ConnectSummary], figure: Figure) -> list[str]:
    """Returns the labels of A and B, or these letters."""
    labels = [Label(plain(label)) for label in run.checkpoint_labels or "AB"]
    return [shorten(figure, label, narrow(figure, 80), text_size()) for label in labels]


def _series(run: Run[ConnectSummary], splits: list[str]) -> list[Series]:
    """Returns a series for each path and split, the line first, so that the curve is on top."""
    series: list[Series] = []
    for path in ("line", "curve"):
        for index, split in enumerate(splits):
            table = run.table.where("path", path).where("split", split)
            name, dashes = f"{path}, {plain(split)}", DASHES[index % len(DASHES)]
            series += read_curve(run, table, "t", split, name, (_COLOURS[path], dashes))
    return series


def _draw_planes(
    run: Run[ConnectSummary],
    figure: Figure,
    cells: Sequence[SubplotSpec],
    grids: Sequence[Grid],
    drawing: Drawing,
) -> list[tuple[Axes, Contours]]:
    """Draws the plane of each split with the curve and the line on it."""
    plane = run.summary.get("plane")
    if not grids or plane is None:
        return []
    losses = np.concatenate([grid.loss.ravel() for grid in grids])
    scale = scale_losses(losses, drawing)
    curve, corners = np.array(plane["curve"]), np.array(plane["corners"])
    drawn = []
    for cell, grid in zip(cells, grids, strict=True):
        panel = figure.add_subplot(cell)
        drawn.append((panel, draw_contours(panel, grid, scale)))
        panel.set_aspect("equal")
        outline = [Stroke(linewidth=3.2, foreground="white"), Normal()]
        panel.plot(*corners[[0, 2]].T, color=PALE, lw=1.4, path_effects=outline, zorder=4)
        panel.plot(*curve.T, color=_COLOURS["curve"], lw=1.8, path_effects=outline, zorder=4)
        draw_dots(
            panel,
            *corners.T,
            faces=np.tile([1.0, 1.0, 1.0, 1.0], (3, 1)),
            size=7,
            behind=np.zeros(3, dtype=np.bool_),
        )
        a, b = _ends(run, figure)
        for letter, (x, y) in zip((a, "C", b), corners, strict=True):
            panel.text(
                *(x, y, f"  {letter}"),
                va="bottom",
                weight="bold",
                color=INK,
                zorder=6,
                path_effects=[Stroke(linewidth=2.5, foreground="white"), Normal()],
            )
        title_panel(figure, panel, name_split([run], grid.split, drawing))
        if cell.rowspan == cells[-1].rowspan:
            panel.set_xlabel(drawing.words("distance along C − A", "along C − A"))
        if cell.colspan == cells[0].colspan:
            panel.set_ylabel(drawing.words("distance orthogonal to C − A", "orthogonal"))
    add_colour_bar(figure, [panel for panel, _ in drawn], scale, [run], drawing)
    return drawn


def _entries() -> list[tuple[Artist, str]]:
    names = {"curve": "trained path", "line": "straight line"}
    return [(Line2D([], [], color=_COLOURS[path]), label) for path, label in names.items()]


def _notes(run: Run[ConnectSummary], drawing: Drawing, *, with_plane: bool) -> list[str]:
    """Returns notes on what was found."""
    notes = []
    for name, split in run.summary.get("splits", {}).items():
        highest, line = split.get("highest"), split.get("line", {}).get("barrier")
        if highest is not None and line is not None:
            notes.append(
                f"{plain(name)}: the loss on the path stays at or below "
                f"{format_number(highest['loss'], 3)}; the barrier on the line is "
                f"{format_number(line['height'], 3)}."
            )
    if with_plane:
        notes += ["The plane goes through A, the trained bend C and B.", *limit_notes(drawing)]
    return notes
