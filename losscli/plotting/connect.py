"""The figure of ``losscli connect``: the loss on the curve and on the line, and their plane."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.lines import Line2D
from matplotlib.patheffects import Normal, Stroke

from losscli.errors import UsageError
from losscli.plotting.html import Item, View, contours_and_surface, path_items, table_view
from losscli.plotting.layout import finish_layout
from losscli.plotting.line_axis import read_curve, scale_alpha
from losscli.plotting.lines import Series, draw_panel, split_entries
from losscli.plotting.plane import read_columns, read_grids
from losscli.plotting.style import (
    DASHES,
    INCH,
    INK,
    PALE,
    WIDTH,
    Label,
    columns,
    examples_notes,
    extent,
    format_number,
    house_style,
    label_loss,
    loss_name,
    name_split,
    narrow,
    new_figure,
    plain,
    run_colours,
    run_names,
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
from losscli.plotting.vtk import PathPoints, write_mesh
from losscli.registry import COMMANDS, MESH
from losscli.results.drawing import FULL, Drawing
from losscli.results.result import Run
from losscli.results.summaries import ConnectPlane, ConnectSummary

__all__ = ["connect_views", "draw_connect", "mesh_connect"]

_COLOURS = {"curve": PATH, "line": PALE}
# Sizes in inches of a full figure.
_LOSS, _METRIC = 2.6, 1.35  # heights of panels
_WIDE, _NARROW = 5.6, 3.4  # widths of all planes in a row
_LABELS = 0.75  # height of the title and the labels of a plane
_HIGHEST, _LEAST_PLANE = 4.0, 2.2  # heights of a plane
_LINE_POINTS = 20  # on the straight line, which labels avoid
_PALER, _THIN = 0.55, 1.0  # the opacity and the width in points of straight lines of several runs
_MOST_BESIDE = 0.6  # of the width of a page, for the planes beside the curves


def draw_connect(runs: Sequence[Run[ConnectSummary]], drawing: Drawing = FULL) -> Figure:
    """Draws losses and metrics on the curve and the line over t.

    The figure of a single run has its plane with the curve and the line on it. Several runs have a
    colour each, and their lines are paler and thinner than their curves.

    Returns:
        The figure, laid out and ready to `render`.
    """
    with house_style(drawing):
        splits = split_names(runs)
        names = run_names(runs, drawing)
        series = _series(runs, names, splits, drawing)
        metrics = list(dict.fromkeys(metric for run in runs for metric in run.table.metrics))
        # Without the summary, the position of the curve on the plane is unknown.
        plane = runs[0].summary.get("plane") if len(runs) == 1 else None
        grids = read_grids(runs[0].more["plane"]) if plane and "plane" in runs[0].more else []
        figure, cells, places = _new_figure(len(metrics), grids, drawing)
        panels = [figure.add_subplot(cells[0])]
        panels += [figure.add_subplot(cell, sharex=panels[0]) for cell in cells[1:]]
        for panel in panels[:-1]:
            panel.tick_params(labelbottom=False)
        scale_alpha(panels[-1], series)
        notes = examples_notes(runs, splits) if series else ["There are no points"]
        for panel, column in zip(panels, ("loss", *metrics), strict=True):
            notes += draw_panel(
                panel, series, column, drawing, log=drawing.log and column == "loss"
            )
            label = shorten(figure, plain(column), narrow(figure, 88), text_size())
            panel.set_ylabel(label)
        label = label_loss(figure, runs, drawing, log=drawing.log).replace("\n", ", ")
        units = "batches" if all("batches" in run.summary for run in runs) else "examples"
        panels[0].set_ylabel(label + drawing.words(f"\nmean over {units}", ""))
        a, b = _ends(runs, figure)
        panels[-1].set_xlabel(
            drawing.words(f"t: from {a} (0) to {b} (1), on the path and on the line", "t")
        )
        drawn = _draw_planes(runs[0], figure, places, grids, drawing)
        for run, name in zip(runs, names, strict=True):
            notes += _notes(run, f"{name}, " * (len(runs) > 1))
        if grids:
            notes += ["The plane goes through A, the trained bend C and B.", *limit_notes(drawing)]
        elif len(runs) > 1 and any("plane" in run.more for run in runs):
            notes.append("The planes are not drawn: each run has its own.")
        prefix = f"{plain(runs[0].label)}: " if len(runs) == 1 and runs[0].label else ""
        entries = [
            *_entries(runs, names, drawing),
            split_entries(runs, splits, INK, series, drawing, prefix),
        ]
        finish_layout(figure, drawing, notes, entries)
        if plane:
            start, bend, end = np.array(plane["corners"])
            line = np.linspace(start, end, _LINE_POINTS)
            marked = np.concatenate([plane["curve"], line, [bend]])
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


def _ends(runs: Sequence[Run[ConnectSummary]], figure: Figure) -> list[str]:
    """Returns the labels of A and B of a single run, or these letters."""
    given = runs[0].checkpoint_labels if len(runs) == 1 else ()
    labels = [Label(plain(label)) for label in given or "AB"]
    return [shorten(figure, label, narrow(figure, 80), text_size()) for label in labels]


def _pale(colour: str) -> str:
    """Mixes a colour with white."""
    red, green, blue = (1 - _PALER + _PALER * part for part in to_rgb(colour))
    return to_hex((red, green, blue))


def _colours(number: int, drawing: Drawing) -> list[dict[str, str]]:
    """Returns the colours of the curve and the line of each run."""
    if number == 1:
        return [_COLOURS]
    return [{"curve": colour, "line": _pale(colour)} for colour in run_colours(number, drawing)]


def _series(
    runs: Sequence[Run[ConnectSummary]],
    names: Sequence[str],
    splits: Sequence[str],
    drawing: Drawing,
) -> list[Series]:
    """Returns a series for each path, run and split, the lines first, so that curves are on top."""
    several = len(runs) > 1
    series: list[Series] = []
    for path in ("line", "curve"):
        width = _THIN if several and path == "line" else None
        for number, colours in enumerate(_colours(len(runs), drawing)):
            of_path = runs[number].table.where("path", path)
            for index, split in enumerate(splits):
                table, style = of_path.where("split", split), DASHES[index % len(DASHES)]
                name = f"{names[number]}, " * several + f"{path}, {plain(split)}"
                found = read_curve(
                    runs[number], table, "t", split, name, (colours[path], style), number
                )
                series += [replace(one, width=width) for one in found]
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
        a, b = _ends([run], figure)
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


def _entries(
    runs: Sequence[Run[ConnectSummary]], names: Sequence[str], drawing: Drawing
) -> list[list[tuple[Artist, str]]]:
    """Returns the legend entries of the runs, and those of the path and the line."""
    colours = _colours(len(runs), drawing)
    words = {"curve": "trained path", "line": "straight line"}
    if len(runs) == 1:
        return [[(Line2D([], [], color=colours[0][path]), label) for path, label in words.items()]]
    looks: dict[str, dict[str, Any]] = {
        "curve": {"color": INK},
        "line": {"color": PALE, "linewidth": _THIN},
    }
    return [
        [
            (Line2D([], [], color=of_run["curve"]), name)
            for of_run, name in zip(colours, names, strict=True)
        ],
        [(Line2D([], [], **looks[path]), label) for path, label in words.items()],
    ]


def _notes(run: Run[ConnectSummary], prefix: str) -> list[str]:
    """Returns notes on what was found."""
    notes = []
    for name, split in run.summary.get("splits", {}).items():
        highest, line = split.get("highest"), split.get("line", {}).get("barrier")
        if highest is not None and line is not None:
            notes.append(
                f"{prefix}{plain(name)}: the loss on the path stays at or below "
                f"{format_number(highest['loss'], 3)}; the barrier on the line is "
                f"{format_number(line['height'], 3)}."
            )
    return notes


def connect_views(runs: Sequence[Run[ConnectSummary]], drawing: Drawing = FULL) -> list[View]:
    """Returns the views of an interactive page: the curves, and the plane of a single run."""
    tables = list(zip(run_names(runs), (run.table for run in runs), strict=True))
    quantities = {"loss": f"loss{loss_name(runs)}"}
    quantities |= {metric: metric for run in runs for metric in run.table.metrics}
    colours = [
        of_run[path]
        for run, of_run in zip(runs, _colours(len(runs), drawing), strict=True)
        for path in map(str, run.table.unique("path"))
    ]
    views = [
        table_view(
            "path",
            tables,
            "t",
            quantities,
            x_label="t: from A (0) to B (1), on the path and on the line",
            short="t",
            colours=lambda _: colours,
            logarithmic=[*quantities],
        )
    ]
    plane = runs[0].summary.get("plane") if len(runs) == 1 else None
    if plane and "plane" in runs[0].more:
        views += _plane_views(runs[0], plane, quantities)
    return views


def _plane_views(
    run: Run[ConnectSummary], plane: ConnectPlane, quantities: dict[str, str]
) -> list[View]:
    """Returns the views of the plane with the curve and the line, each with its own losses."""
    short = ("along C − A", "orthogonal to C − A")
    a, _, b = np.array(plane["corners"])
    items: dict[str, list[Item]] = {"surface": [], "contours": []}
    for path in ("line", "curve"):
        table = run.table.where("path", path)
        ts = sorted(set(table.floats("t")))
        places = a + np.array(ts)[:, None] * (b - a) if path == "line" else np.array(plane["curve"])
        found = path_items(
            (places[:, 0].tolist(), places[:, 1].tolist()),
            {
                str(split): [loss for _, loss in sorted(zip(*rows, strict=True))]
                for split in table.unique("split")
                if (rows := [table.where("split", split).floats(c) for c in ("t", "loss")])
            },
            [f"{path}, t = {format_number(t)}" for t in ts],
            labels=short,
            at=list(range(1, len(ts) + 1)),
            colour=_COLOURS[path],
            name={"curve": "trained path", "line": "straight line"}[path],
        )
        for view, shown in items.items():
            shown.extend(found[view])
    columns = ("loss", "loss_stderr", *run.more["plane"].metrics)
    return contours_and_surface(
        {c: read_grids(run.more["plane"], c) for c in columns},
        items,
        quantities,
        labels=(f"distance {short[0]}", f"distance {short[1]}"),
        short=short,
        equal=True,
        notes=["The plane goes through A, the trained bend C and B."],
    )


def mesh_connect(runs: Sequence[Run[ConnectSummary]], drawing: Drawing = FULL) -> dict[str, str]:
    """Writes the plane through A, the bend and B, and the trained path at its own losses.

    Returns:
        The content of x.vtp and of x.path.vtp, by the end of the name.

    Raises:
        UsageError: There are several runs, or the run has no plane.
    """
    if len(runs) > 1:
        raise UsageError("a .vtp file has the surface of one run of connect", "Give one CSV")
    (run,) = runs
    plane = run.summary.get("plane")
    if not plane or "plane" not in run.more:
        COMMANDS["connect"].check_format(MESH, has_surface=False)
    assert plane
    columns = read_columns(run.more["plane"])
    curve = run.table.where("path", "curve")
    rows = {grid.split: curve.where("split", grid.split) for grid in columns["loss"]}
    values = {
        column: {split: np.array(own.floats(column)) for split, own in rows.items()}
        for column in columns
    }
    x, y = np.array(plane["curve"]).T
    path = PathPoints(x, y, values, {"t": np.array(sorted({*curve.floats("t")}))})
    return write_mesh(columns, [path], drawing)
