"""The figure of ``losscli plane``: the loss on a plane through weight space, and checkpoints."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.patheffects import Normal, Stroke
from mpl_toolkits.mplot3d import Axes3D  # type: ignore[import-untyped]
from numpy.typing import NDArray

from losscli.plotting.animation import Animation, Track, animate, new_panels
from losscli.plotting.html import Item, View, contours_and_surface, path_items
from losscli.plotting.layout import finish_layout
from losscli.plotting.lines import Series
from losscli.plotting.style import (
    DASHES,
    IN_ORDER,
    INCH,
    INK,
    LARGEST,
    WIDTH,
    columns,
    extent,
    format_number,
    house_style,
    linear_ticks,
    loss_name,
    name_checkpoint,
    name_split,
    narrow,
    new_figure,
    number_checkpoints,
    plain,
    run_colours,
    scale_checkpoints,
    scale_distance,
    shorten_path,
    title_panel,
)
from losscli.plotting.surface import (
    HIDDEN,
    PALER,
    PATH,
    WIDE,
    Contours,
    Grid,
    Scale,
    add_colour_bar,
    add_surface_axes,
    blank_notes,
    draw_contours,
    draw_dots,
    draw_path,
    draw_surface,
    hidden_by,
    keep_inside,
    label_contours,
    limit_notes,
    path_entries,
    scale_losses,
)
from losscli.plotting.vtk import PathPoints, write_mesh
from losscli.registry import COMMANDS
from losscli.results.drawing import FULL, Drawing
from losscli.results.result import Run
from losscli.results.summaries import PlaneAxis, PlaneSummary
from losscli.table import Table

__all__ = [
    "animate_plane",
    "draw_plane",
    "mesh_plane",
    "plane_views",
    "read_columns",
    "read_grids",
]

Floats = NDArray[np.float64]

_FEW = 4  # up to this many checkpoints have a letter and a note each
_DISTANCES = 1.7  # inches: the height of the panel of distances from the plane
_COMPACT_LABELS = {
    "pca": ("component 1", "component 2"),
    "hessian": ("λₘₐₓ direction", "λₘᵢₙ direction"),
}
_LONGEST = 2.2  # up to this ratio of its sides a plane has equal scales on both axes


@dataclass(frozen=True)
class _Checkpoints:
    """Checkpoints in their order: those that span the plane, or a path that is projected onto it.

    Attributes:
        path: The name of the path; empty for those that span the plane.
        colour: The colour of the line that joins them; if empty, each has a letter instead.
        names: Their labels, or else their names.
        labelled: Whether they have labels.
        x: Their first coordinate.
        y: Their second coordinate.
        off: Their distances from the plane.
        losses: Their losses by split.
    """

    path: str
    colour: str
    names: Sequence[str]
    labelled: bool
    x: Floats
    y: Floats
    off: Floats
    losses: Mapping[str, Floats]

    @classmethod
    def read_all(cls, run: Run[PlaneSummary], drawing: Drawing) -> list[_Checkpoints]:
        """Reads the checkpoints that span the plane, then each path."""
        table = run.more.get("path", _NO_CHECKPOINTS)
        if "path" not in table.columns:
            spanning, paths = table, []
        else:
            spanning = table.where("path", "")
            paths = [(str(n), table.where("path", n)) for n in table.unique("path") if n]
        joined = run.summary.get("plane") == "pca" or len(spanning.unique("step")) > _FEW
        number = len(paths) + joined
        # The colour that contrasts with all colours of losses comes first.
        colours = [PATH, *(colour for colour in run_colours(number, drawing) if colour != PATH)][
            :number
        ]
        if not joined:
            colours = ["", *colours]
        tables = [("", spanning), *paths]
        return [cls._read(run, n, c, t) for (n, t), c in zip(tables, colours, strict=True)]

    @classmethod
    def _read(cls, run: Run[PlaneSummary], path: str, colour: str, table: Table) -> _Checkpoints:
        rows = [table.where("step", step) for step in table.unique("step")]
        rows.sort(key=lambda row: row.floats("step")[0])
        x, y, off = (np.array([r.floats(c)[0] for r in rows]) for c in ("x", "y", "off_plane"))
        losses = {
            str(split): np.array([
                [*r.where("split", split).floats("loss"), np.nan][0] for r in rows
            ])
            for split in table.unique("split")
        }
        names = [str(r["checkpoint"][0]) for r in rows]
        labelled = any(map(run.label_of, names))
        names = [name_checkpoint(run, name, FULL) for name in names]
        return cls(plain(path), colour, names, labelled, x, y, off, losses)

    def loss(self, split: str) -> Floats:
        """Returns the losses of the checkpoints on a split; nan if unknown."""
        return self.losses.get(split, np.full(len(self.names), np.nan))

    def outside(self, view: Sequence[tuple[float, float]]) -> int:
        """Counts the checkpoints outside the range of x and y."""
        (left, right), (low, high) = view
        inside = (left <= self.x) & (self.x <= right) & (low <= self.y) & (self.y <= high)
        return int((~inside).sum())


_NO_CHECKPOINTS = Table.build(("step", "checkpoint", "x", "y", "off_plane", "split", "loss"), ())


def draw_plane(run: Run[PlaneSummary], drawing: Drawing = FULL) -> Figure:
    """Draws the loss on a plane as contours, a panel for each split, and its checkpoints.

    Every checkpoint has the colour of its own loss, from the table ``path``: if it matches the
    plane, the plane shows the loss at the checkpoint correctly. If the summary has ``surface``, a
    3D surface stands beside each panel.

    Returns:
        The figure, laid out and ready to `render`.
    """
    with house_style(drawing):
        grids = read_grids(run.table)
        groups = _Checkpoints.read_all(run, drawing)
        paths = groups[1:]
        scale = _scale(grids, groups[0], drawing)
        kind, surface = run.summary.get("plane", ""), run.summary.get("surface", False)
        view = _ranges(grids)
        ratio, equal = _shape(view, kind)

        figure, cells = _new_figure(
            len(grids), ratio if equal else 1.0, drawing, surface=surface, distances=bool(paths)
        )
        labels, short = _labels(run, kind, drawing)
        panels: list[Axes] = []
        contours: list[Contours] = []
        hidden = False
        for number, grid in enumerate(grids):
            at = number * (1 + surface)
            row, column = divmod(at, cells.ncols)
            panel = figure.add_subplot(cells[row, column])
            drawn = draw_contours(panel, grid, scale)
            _frame(panel, view, drawing, equal=equal)
            for group in groups:
                _draw_marks(panel, group, grid.split, scale, drawing)
            title_panel(figure, panel, name_split([run], grid.split, drawing))
            _name_axes(panel, labels, vertical=not column)
            panels.append(panel)
            contours.append(drawn)
            if surface:
                cell = cells[divmod(at + 1, cells.ncols)]
                axes_3d = add_surface_axes(figure, cell, (*short, "loss"), -60)
                _frame(axes_3d, view, drawing, equal=False)
                draw_surface(axes_3d, scale, drawn, drawing)
                for group in groups:
                    hidden |= _draw_marks(axes_3d, group, grid.split, scale, drawing, surface=drawn)
                panels.append(axes_3d)
        if not panels:
            panels = [figure.add_subplot(cells[0, 0])]
        add_colour_bar(figure, panels, scale, [run], drawing)
        if paths:
            _draw_distances(figure.add_subplot(cells[cells.nrows - 1, :]), paths, drawing)

        notes = [] if grids else ["There are no points"]
        notes += _notes(
            figure, contours, groups, view, scale, drawing, ratio=ratio, equal=equal, hidden=hidden
        )
        finish_layout(figure, drawing, notes, _legend(figure, groups, drawing))
        x, y = (np.concatenate([getattr(group, c) for group in groups]) for c in "xy")
        clearance = 14 if groups[0].colour else 28
        for panel, drawn in zip(panels[:: 1 + surface], contours, strict=False):
            label_contours(panel, drawn, x, y, clearance=clearance)
    return figure


def _legend(
    figure: Figure, groups: Sequence[_Checkpoints], drawing: Drawing
) -> list[list[tuple[Artist, str]]]:
    """Returns the entries of each path, with its name if there are several."""
    joined = [group for group in groups if group.colour and group.names]
    entries = []
    for group in joined:
        label = drawing.words(f"path of the {len(group.names)} checkpoints", "path")
        if group.path and len(joined) > 1:
            label = shorten_path(figure, group.path, narrow(figure, 160))
        named = group.labelled or not drawing.compact
        start, end = (group.names[0], group.names[-1]) if named else ("", "")
        entries.append(path_entries(figure, group.colour, label, start, end, drawing))
    return entries


def _new_figure(
    panels: int, ratio: float, drawing: Drawing, *, surface: bool, distances: bool
) -> tuple[Figure, GridSpec]:
    """Creates a figure with a panel per split, ``ratio`` times as high as wide, and its cells."""
    across = columns(drawing, 2 if surface else min(2, panels))
    rows = math.ceil(panels * (1 + surface) / across) if panels else 1
    wide = across == 2
    lowest = 3.3 if surface else 2.2
    height = min(max((3.6 if wide else 5.1) * ratio, lowest), 5.1)
    heights = [height + 0.75] * rows + [_DISTANCES] * distances
    width = WIDE if wide else WIDTH
    shape = max(min(ratio, 1.4), 0.8 if surface else 0.5)
    figure = new_figure(drawing, sum(heights), width, rows=len(heights), ratio=shape)
    return figure, figure.add_gridspec(len(heights), max(across, 1), height_ratios=heights)


def _draw_distances(axes: Axes, paths: Sequence[_Checkpoints], drawing: Drawing) -> None:
    """Draws the distance of each path from the plane over its checkpoints."""
    numbers, label = _number(paths)
    scale_checkpoints(axes, np.unique(np.concatenate(numbers)), label)
    high = max(float(np.nanmax(path.off, initial=0.0)) for path in paths)
    scale_distance(axes, high, 4)
    axes.set_ylabel(drawing.words("distance from\nthe plane", "distance"))
    for path, number in zip(paths, numbers, strict=True):
        draw_path(axes, number, path.off, drawing=drawing, colour=path.colour, cased=False)


def _number(paths: Sequence[_Checkpoints]) -> tuple[list[Floats], str]:
    """Returns the numbers of each path's checkpoints, and the label of an axis of them."""
    numbered = [number_checkpoints(path.names) for path in paths]
    labels = {label for _, label in numbered}
    if len(labels) == 1:
        return [numbers for numbers, _ in numbered], labels.pop()
    return [np.arange(len(path.names), dtype=np.float64) for path in paths], IN_ORDER


def read_grids(table: Table, values: str = "loss") -> list[Grid]:
    """Returns a grid of a column for each split; the rows may be in any order."""
    axes = [sorted({v for v in table.floats(c) if abs(v) < LARGEST}) for c in ("x", "y")]
    index = [{value: k for k, value in enumerate(values)} for values in axes]
    x, y = np.meshgrid(*axes, indexing="ij")
    grids = []
    for split in table.unique("split") if x.size else ():
        loss = np.full(x.shape, np.nan)
        rows = table.where("split", split)
        for a, b, value in zip(*map(rows.floats, ("x", "y", values)), strict=True):
            if a in index[0] and b in index[1]:
                loss[index[0][a], index[1][b]] = value
        grids.append(Grid(str(split), x, y, loss))
    return grids


def read_columns(table: Table) -> dict[str, list[Grid]]:
    """Returns the grids of the loss, its standard error and each metric, for each split."""
    columns = [c for c in ("loss", "loss_stderr", *table.metrics) if c in table.columns]
    return {column: read_grids(table, column) for column in columns}


def _ranges(grids: Sequence[Grid]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Returns the x and y ranges of the evaluated points."""
    if not grids:
        return (0.0, 1.0), (0.0, 1.0)
    return extent(grids[0].x), extent(grids[0].y)


def _shape(view: Sequence[tuple[float, float]], kind: str) -> tuple[float, bool]:
    """Returns the height of a plane relative to its width, and whether its scales are equal."""
    ratio = (view[1][1] - view[1][0]) / (view[0][1] - view[0][0])
    return ratio, kind == "points" or 1 / _LONGEST <= ratio <= _LONGEST


def _scale(grids: Sequence[Grid], spanning: _Checkpoints, drawing: Drawing) -> Scale:
    """Scales the losses on the plane and those of the checkpoints that span it."""
    # Not those of projected paths, which may be far from the plane and very different.
    own = [spanning.loss(grid.split) for grid in grids]
    losses = [*own, *(grid.loss.ravel() for grid in grids), np.empty(0)]
    return scale_losses(np.concatenate(losses), drawing)


def _frame(
    axes: Axes, view: Sequence[tuple[float, float]], drawing: Drawing, *, equal: bool
) -> None:
    axes.set_xlim(*view[0])
    axes.set_ylim(*view[1])
    for axis in (axes.xaxis, axes.yaxis):
        linear_ticks(axis, 4 if drawing.compact else 6)
    if equal:
        axes.set_aspect("equal")


def _labels(
    run: Run[PlaneSummary], kind: str, drawing: Drawing
) -> tuple[tuple[str, str], tuple[str, str]]:
    """Returns the long and the short labels of both axes, which are equal in a compact figure."""
    if drawing.compact and kind in _COMPACT_LABELS:
        return _COMPACT_LABELS[kind], _COMPACT_LABELS[kind]
    labels, short = _full_labels(run, kind)
    return (short if drawing.compact else labels), short


def _full_labels(run: Run[PlaneSummary], kind: str) -> tuple[tuple[str, str], tuple[str, str]]:
    unknown: list[PlaneAxis] = [{}, {}]
    first, second = [*run.summary.get("axes", ()), *unknown][:2]
    if kind == "random":
        what = "random direction {}, filter-normalised"
        return (f"x: {what.format('δ')}", f"y: {what.format('η')}"), ("δ", "η")
    if kind == "points":
        short = ("along B − A", "orthogonal to B − A")
        return (f"distance {short[0]}", f"distance {short[1]}"), short
    if kind == "pca":
        short = ("first component", "second component")
        return (
            f"first principal component{_variance(first)}",
            f"second principal component{_variance(second)}",
        ), short
    if kind == "hessian":
        short = ("eigenvector of λₘₐₓ", "eigenvector of λₘᵢₙ")
        pairs = zip("xy", short, (first, second), strict=True)
        long = [f"{letter}: along the {name}{_eigenvalue(axis)}" for letter, name, axis in pairs]
        return (long[0], long[1]), short
    names = (plain(first.get("name", "")) or "x", plain(second.get("name", "")) or "y")
    return names, names


def _variance(axis: PlaneAxis) -> str:
    share = axis.get("explained_variance")
    return f" ({format_number(100 * share)} % of the variance)" if share is not None else ""


def _eigenvalue(axis: PlaneAxis) -> str:
    value, error = axis.get("eigenvalue"), axis.get("error")
    if value is None or error is None:
        return ""
    caveat = "" if axis.get("converged", True) else ", not converged"
    return f" = {format_number(value)} ± {format_number(error, 2)}{caveat}"


def _draw_marks(
    axes: Axes,
    marks: _Checkpoints,
    split: str,
    scale: Scale,
    drawing: Drawing,
    *,
    surface: Contours | None = None,
) -> bool:
    """Draws the checkpoints inside the panel; returns whether the surface hides any of them."""
    loss = marks.loss(split)
    coordinates: tuple[Floats, ...] = (marks.x, marks.y)
    behind = np.zeros(len(marks.names), dtype=np.bool_)
    if isinstance(axes, Axes3D):
        coordinates = keep_inside(axes, *coordinates, scale(loss) + 0.008)
        assert surface is not None
        behind = hidden_by(axes, scale, surface, *coordinates)
    if marks.colour:
        draw_path(
            axes,
            *coordinates,
            drawing=drawing,
            colour=marks.colour,
            faces=scale.colours(loss),
            clip=True,
            behind=behind,
        )
        return bool(behind.any())
    draw_dots(axes, *coordinates, faces=scale.colours(loss), size=8, behind=behind)
    write: Any = axes.text
    # Letters refer to the notes, which a compact figure does not have.
    letters = marks.names if drawing.compact and marks.labelled else "ABCD"
    for letter, point, pale in zip(letters, np.column_stack(coordinates), behind, strict=False):
        if not np.isfinite(point).all():
            continue
        write(
            *point,
            f"  {letter}",
            va="bottom",
            weight="bold",
            color=INK,
            alpha=PALER if pale else 1.0,
            zorder=6,
            clip_on=True,
            path_effects=[Stroke(linewidth=2.5, foreground="white"), Normal()],
        )
    return bool(behind.any())


def _notes(
    figure: Figure,
    contours: Sequence[Contours],
    groups: Sequence[_Checkpoints],
    view: Sequence[tuple[float, float]],
    scale: Scale,
    drawing: Drawing,
    *,
    ratio: float,
    equal: bool,
    hidden: bool = False,
) -> list[str]:
    """Returns the notes on the contours, the checkpoints and the scales of the axes."""
    paths = groups[1:]
    notes = blank_notes(contours) + _checkpoint_notes(figure, groups[0], view)
    notes += _path_notes(paths, view)
    path_losses = [p.loss(c.grid.split) for p in paths for c in contours]
    if drawing.ylim is None and any(map(scale.is_beyond, path_losses)):
        notes.append(
            "Dots with losses beyond an end of the colour bar have the colour of that end."
        )
    if hidden:
        notes.append(HIDDEN)
    notes += limit_notes(drawing)
    if contours and not equal:
        factor = format_number(max(ratio, 1 / ratio), 2)
        stretched, other = ("y", "x") if ratio < 1 else ("x", "y")
        stretch = f"{stretched} is stretched {factor} times relative to {other}"
        notes.append(f"The scales of the axes differ: {stretch}.")
    return notes


def _name_axes(panel: Axes, labels: tuple[str, str], *, vertical: bool = True) -> None:
    """Labels the axes of a panel, long labels in two lines."""
    panel.set_xlabel(labels[0].replace(" of λ", "\nof λ"))
    if vertical:
        panel.set_ylabel(re.sub(r" (?=\(|of λ)", "\n", labels[1]))


def _checkpoint_notes(
    figure: Figure,
    marks: _Checkpoints,
    view: Sequence[tuple[float, float]],
) -> list[str]:
    """Returns notes on the losses of checkpoints and their distances from the plane.

    With a path, only its first and last checkpoint have a note each.
    """
    joined = bool(marks.colour)
    number = len(marks.names)
    if not number:
        return []
    off = _visible_distances(marks, view)
    ends = [("Start", 0), ("End", number - 1)][:number]
    notes = []
    for label, k in ends if joined else zip("ABCD", range(number), strict=False):
        losses = [f"{_loss(loss[k])} ({plain(split)})" for split, loss in marks.losses.items()]
        if len(losses) == 1:
            losses = [_loss(loss[k]) for loss in marks.losses.values()]
        distance = (
            f"{format_number(float(off[k]))} away from the plane" if off[k] else "on the plane"
        )
        name = shorten_path(figure, marks.names[k], figure.get_figwidth() * INCH - 320)
        notes.append(f"{label}  {name}: loss {', '.join(losses)}; {distance}")
    notes.append(
        f"{'Each' if number > 1 else 'The'} dot has the colour of its checkpoint's own loss."
    )
    if joined or np.nanmax(off, initial=0.0) > 0:
        notes.append(_distance_note("checkpoints", off))
    if outside := marks.outside(view):
        subject = "checkpoint is" if outside == 1 else "checkpoints are"
        notes.append(f"{outside} {subject} outside the plotted range.")
    return notes


def _path_notes(paths: Sequence[_Checkpoints], view: Sequence[tuple[float, float]]) -> list[str]:
    """Returns notes on the distances of paths from the plane."""
    notes = []
    for path in paths:
        name = "path" if len(paths) == 1 else f"path {path.path}"
        off = _visible_distances(path, view)
        notes.append(_distance_note(f"checkpoints of the {name}", off))
        if outside := path.outside(view):
            number = f"{outside} of {len(path.names)} checkpoints of the {name}"
            notes.append(f"{number} {'is' if outside == 1 else 'are'} outside the plotted range.")
    return notes


def _visible_distances(marks: _Checkpoints, view: Sequence[tuple[float, float]]) -> Floats:
    """Returns the distances from the plane, with those that are rounding errors as 0."""
    size = max(abs(v) for v in (*view[0], *view[1], *marks.x, *marks.y))
    return np.where(marks.off <= 1e-5 * size, 0.0, marks.off)


def _distance_note(what: str, off: Floats) -> str:
    largest = float(np.nanmax(off, initial=0.0))
    if largest == 0:
        return f"All {what} lie on the plane."
    return (
        f"The {what} are up to {format_number(largest)} away from the plane, where the contours "
        "do not show their loss."
    )


def _loss(value: float) -> str:
    return format_number(float(value)) if math.isfinite(value) else "not finite"


def animate_plane(run: Run[PlaneSummary], drawing: Drawing = FULL) -> Animation:
    """Animates the paths on the contours of the first split, the losses of all splits beside it.

    Returns:
        The animation.

    Raises:
        UsageError: The run has no path.
    """
    with house_style(drawing):
        grids = read_grids(run.table)
        groups = _Checkpoints.read_all(run, drawing)
        paths = [group for group in groups if group.colour and group.names]
        if not grids or not paths:
            COMMANDS["plane"].check_format(".gif", has_path=False)
        grid, kind, view = grids[0], run.summary.get("plane", ""), _ranges(grids)
        scale = _scale([grid], groups[0], drawing)
        figure, panel, beside = new_panels(drawing)
        drawn = draw_contours(panel, grid, scale)
        ratio, equal = _shape(view, kind)
        _frame(panel, view, drawing, equal=equal)
        if not groups[0].colour:
            _draw_marks(panel, groups[0], grid.split, scale, drawing)
        labels, _ = _labels(run, kind, drawing)
        _name_axes(panel, labels)
        title_panel(figure, panel, name_split([run], grid.split, drawing))
        add_colour_bar(figure, [panel], scale, [run], drawing)
        numbers, counter = _number(paths)
        tracks = [
            Track(
                path.x,
                path.y,
                number,
                path.names if path.labelled or not drawing.compact else [],
                {
                    "colour": path.colour,
                    "faces": scale.colours(path.loss(grid.split)),
                    "clip": True,
                },
            )
            for path, number in zip(paths, numbers, strict=True)
        ]
        splits = list(dict.fromkeys(split for path in paths for split in path.losses))
        series = [
            Series(
                run=at,
                split=split,
                name=f"{path.path}, {plain(split)}" if path.path else plain(split),
                colour=path.colour,
                dashes=DASHES[splits.index(split) % len(DASHES)],
                x=number,
                ends=np.isin(np.arange(number.size), (0, number.size - 1)),
                values={"loss": loss},
            )
            for at, (path, number) in enumerate(zip(paths, numbers, strict=True))
            for split, loss in path.losses.items()
        ]
        return animate(
            (figure, panel, beside),
            [run],
            tracks,
            series,
            drawing,
            counter=counter,
            contours=drawn,
            notes=_notes(figure, [drawn], groups, view, scale, drawing, ratio=ratio, equal=equal),
            entries=_legend(figure, groups, drawing),
            colour=paths[0].colour if len(paths) == 1 else INK,
            lettered=None if groups[0].colour else (groups[0].x, groups[0].y),
        )


def plane_views(run: Run[PlaneSummary], drawing: Drawing = FULL) -> list[View]:
    """Returns the views of an interactive page: the loss on a plane, with its checkpoints."""
    groups = _Checkpoints.read_all(run, drawing)
    kind = run.summary.get("plane", "")
    grids = read_columns(run.table)
    labels, short = _labels(run, kind, drawing)
    items: dict[str, list[Item]] = {"surface": [], "contours": []}
    names: list[str] = []
    for group in groups:
        found = path_items(
            (group.x.tolist(), group.y.tolist()),
            {split: loss.tolist() for split, loss in group.losses.items()},
            group.names,
            labels=short,
            at=[len(names) + k for k, _ in enumerate(group.names, start=1)],
            colour=group.colour,
            name=group.path if len(groups) > 2 else "",
            more={"off_plane": ("distance from the plane", group.off.tolist())},
        )
        names += group.names
        for view, shown in items.items():
            shown.extend(found[view])
    return contours_and_surface(
        grids,
        items,
        {"loss": f"loss{loss_name([run])}", **{metric: metric for metric in run.table.metrics}},
        labels=labels,
        short=short,
        equal=_shape(_ranges(grids["loss"]), kind)[1],
        slider=names if len(names) > 1 else (),
        notes=["Each dot has the colour of its checkpoint's own loss."] if names else [],
    )


def mesh_plane(run: Run[PlaneSummary], drawing: Drawing = FULL) -> dict[str, str]:
    """Writes the plane as x.vtp and its checkpoints as x.path.vtp, by the ends of their names."""
    paths = [
        PathPoints(
            group.x,
            group.y,
            {"loss": group.losses},
            {
                "path": np.full(len(group.names), number),
                "step": np.arange(len(group.names)),
                "off_plane": group.off,
            },
            joined=bool(group.colour),
        )
        for number, group in enumerate(_Checkpoints.read_all(run, drawing))
    ]
    return write_mesh(read_columns(run.table), paths, drawing)
