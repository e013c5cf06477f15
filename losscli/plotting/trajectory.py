"""The figure of ``losscli trajectory``: projection and residual of a path, and its loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from losscli.errors import UsageError
from losscli.plotting.animation import Animation, Track, animate, new_panels
from losscli.plotting.html import (
    Item,
    View,
    contours_and_surface,
    curve,
    ends,
    escape,
    layout_2d,
    path_items,
    ring,
    table_view,
)
from losscli.plotting.layout import finish_layout
from losscli.plotting.lines import Series, draw_panel, split_entries
from losscli.plotting.style import (
    DASHES,
    IN_ORDER,
    INK,
    LARGEST,
    Numbers,
    checkpoint_names,
    columns,
    house_style,
    label_loss,
    loss_name,
    name_checkpoint,
    name_split,
    new_figure,
    number_checkpoints,
    plain,
    run_colours,
    run_names,
    scale_checkpoints,
    scale_distance,
    scale_x,
    split_names,
    title_panel,
)
from losscli.plotting.surface import (
    HIDDEN,
    PATH,
    WIDE,
    Contours,
    Grid,
    add_colour_bar,
    add_surface_axes,
    blank_notes,
    draw_contours,
    draw_path,
    draw_surface,
    hidden_by,
    label_contours,
    limit_notes,
    path_entries,
    scale_losses,
)
from losscli.plotting.vtk import PathPoints, write_mesh
from losscli.registry import COMMANDS, MESH
from losscli.results.drawing import FULL, Drawing
from losscli.results.result import Run
from losscli.results.summaries import TrajectorySummary
from losscli.table import Table
from losscli.wording import format_count

__all__ = ["animate_trajectory", "draw_trajectory", "mesh_trajectory", "trajectory_views"]

Floats = NDArray[np.float64]

_PROJECTION = "projection p onto the straight line (start 0, end 1)"
_RESIDUAL = "residual r: distance from the line"
_SHORT = ("projection p", "residual r")
_TURNS = (
    "The direction of the residual changes from step to step: points at the same distance from the "
    "line can lie in different directions."
)
_WALK = "#9a9a9a"
_MOST_BACKWARD = 0.1  # above this backward fraction of a path its loss is drawn over the step


@dataclass(frozen=True)
class _Path:
    """The checkpoints of one run in their order, without non-finite coordinates."""

    steps: tuple[int, ...]
    projection: Floats
    residual: Floats
    left_out: int

    @classmethod
    def read(cls, table: Table) -> _Path:
        """Reads the projection and residual of each step, which all splits share."""
        columns = (table["step"], table.floats("projection"), table.floats("residual"))
        points = {int(step or 0): (p, r) for step, p, r in zip(*columns, strict=True)}
        order = sorted(step for step, point in points.items() if np.all(np.abs(point) < LARGEST))
        projection, residual = np.array([points[step] for step in order]).reshape(-1, 2).T
        return cls(tuple(order), projection, residual, len(points) - len(order))

    def losses(self, table: Table, split: str, column: str) -> Floats:
        """Returns a column of one split at the steps; nan where the split has no row."""
        rows = table.where("split", split)
        values = dict(zip(rows["step"], rows.floats(column), strict=True))
        return np.array([values.get(step, np.nan) for step in self.steps])


def draw_trajectory(runs: Sequence[Run[TrajectorySummary]], drawing: Drawing = FULL) -> Figure:
    """Draws the paths of one or several runs.

    One run with a table ``surface``: for each split a contour plot and a 3D surface of the loss
    over projection and residual, with the path on them. Otherwise the residuals of all runs over
    the projection, and their losses below. A table ``walk`` adds random walks.

    Returns:
        The figure, laid out and ready to `render`.
    """
    with house_style(drawing):
        paths, surfaces, notes = _read(runs)
        if surfaces:
            return _draw_surfaces(runs[0], paths[0], surfaces, notes, drawing)
        return _draw_paths(runs, paths, notes, drawing)


def _steps(number: int) -> str:
    return f"{format_count(number, 'step')} {'have' if number > 1 else 'has'}"


# --- Without a surface ---------------------------------------------------------------------------


def _draw_paths(
    runs: Sequence[Run[TrajectorySummary]],
    paths: Sequence[_Path],
    notes: Sequence[str],
    drawing: Drawing,
) -> Figure:
    figure = new_figure(drawing, 5.6)
    upper, lower = figure.subplots(2, 1, height_ratios=[1.25, 1])
    more, groups = _draw_both(figure, upper, lower, runs, paths, drawing)
    finish_layout(figure, drawing, [*notes, *more, _TURNS], groups)
    return figure


def _draw_both(
    figure: Figure,
    upper: Axes,
    lower: Axes,
    runs: Sequence[Run[TrajectorySummary]],
    paths: Sequence[_Path],
    drawing: Drawing,
    *,
    colours: Sequence[str] = (),
) -> tuple[list[str], list[list[tuple[Artist, str]]]]:
    """Draws residuals into one panel and losses into another; returns notes and legend entries."""
    # Beside a surface the path has a colour, and its ends are in the legend already.
    given = bool(colours)
    colours = list(colours or run_colours(len(runs), drawing))
    walks, limits = _draw_residual_axes(upper, runs, paths, drawing)
    for path, colour in zip(paths, colours, strict=True):
        # All paths start at p = 0 and end at p = 1 with residual 0, so the marks are neutral.
        ends = INK if len(runs) > 1 else ""
        draw_path(
            upper,
            path.projection,
            path.residual,
            drawing=drawing,
            colour=colour,
            ends=ends,
            cased=False,
        )

    by_step = any(_backward_fraction(path.projection) > _MOST_BACKWARD for path in paths)
    numbers, counter = _number_steps(runs, paths)
    positions = numbers if by_step else [path.projection for path in paths]
    series = _read_series(runs, paths, colours, positions, drawing)
    notes = [] if series else ["There are no points"]
    notes += draw_panel(lower, series, "loss", drawing, log=drawing.log)
    lower.set_ylabel(label_loss(figure, runs, drawing, log=drawing.log))
    if by_step:
        scale_checkpoints(lower, np.unique(np.concatenate(numbers)), counter)
    else:
        _scale_projection(lower, limits)
        lower.set_xlabel(drawing.words(_PROJECTION, _SHORT[0]))
    if by_step or given:
        upper.set_xlabel(drawing.words(_PROJECTION, _SHORT[0]))
    else:
        upper.tick_params(labelbottom=False)
    upper.set_ylabel(drawing.words(_RESIDUAL.replace(": ", ":\n"), _SHORT[1]))
    figure.align_ylabels([upper, lower])

    groups: list[list[tuple[Artist, str]]] = []
    colour = colours[0] if len(runs) == 1 else INK
    if len(runs) > 1:
        lines = [Line2D([], [], color=c) for c in colours]
        groups.append(list(zip(lines, run_names(runs, drawing), strict=True)))
    splits = list(dict.fromkeys(s.split for s in series))
    marks = split_entries(runs, splits, colour, series, drawing)
    others = list(walks)
    if not given:
        others += path_entries(figure, colour, "", *_end_names(runs, drawing), drawing)
    return notes, [*groups, marks, others]


def _draw_residual_axes(
    axes: Axes, runs: Sequence[Run[TrajectorySummary]], paths: Sequence[_Path], drawing: Drawing
) -> tuple[list[tuple[Artist, str]], tuple[float, float]]:
    """Draws the random walks, and scales the axes for them and the paths.

    Returns:
        The legend entry of the walks, and the range of the projections.
    """
    walks = [walk for run in runs if "walk" in run.more for walk in _walks(run.more["walk"])]
    for projection, residual in walks:
        axes.plot(projection, residual, color=_WALK, lw=0.8, alpha=0.8, zorder=1.8)
    limits = _range([
        *(path.projection for path in paths),
        *(projection for projection, _ in walks),
    ])
    _scale_projection(axes, limits)
    _scale_residual(
        axes, [*(path.residual for path in paths), *(residual for _, residual in walks)]
    )
    label = drawing.words("random walks with the same step lengths", "random walks")
    return [(Line2D([], [], color=_WALK, lw=0.8), label)] if walks else [], limits


def _read_series(
    runs: Sequence[Run[TrajectorySummary]],
    paths: Sequence[_Path],
    colours: Sequence[str],
    positions: Sequence[Floats],
    drawing: Drawing,
) -> list[Series]:
    """Returns the losses of each run and split over the positions of the run's checkpoints."""
    names = run_names(runs, drawing)
    splits = split_names(runs)
    return [
        Series(
            run=number,
            split=split,
            name=f"{names[number]}, {plain(split)}" if len(runs) > 1 else plain(split),
            colour=colours[number],
            dashes=DASHES[index % len(DASHES)],
            x=positions[number],
            ends=np.isin(np.arange(len(path.steps)), (0, len(path.steps) - 1)),
            values={c: path.losses(run.table, split, c) for c in ("loss", "loss_stderr")},
        )
        for number, (run, path) in enumerate(zip(runs, paths, strict=True))
        for index, split in enumerate(splits)
        if split in run.table["split"] and path.steps
    ]


def _number_steps(
    runs: Sequence[Run[TrajectorySummary]], paths: Sequence[_Path]
) -> tuple[list[Floats], str]:
    """Returns the numbers of each path's checkpoints, and the label of an axis of them."""
    numbers, labels = [], set()
    for run, path in zip(runs, paths, strict=True):
        cells = zip(run.table["step"], run.table["checkpoint"], strict=True)
        names = {int(step or 0): str(name) for step, name in cells}
        order = sorted(names)
        found, label = number_checkpoints([names[step] for step in order])
        numbers.append(found[np.isin(order, path.steps)])
        labels.add(label)
    if len(labels) == 1:
        return numbers, labels.pop()
    return [np.array(path.steps, dtype=np.float64) for path in paths], IN_ORDER


def _end_names(runs: Sequence[Run[TrajectorySummary]], drawing: Drawing) -> tuple[str, str]:
    """Returns the name of the first and of the last checkpoint; empty if runs differ in it."""
    names = [checkpoint_names(run, drawing) for run in runs]
    firsts, lasts = ({n[at] if n else "" for n in names} for at in (0, -1))
    return (
        firsts.pop() if len(firsts) == 1 else "",
        lasts.pop() if len(lasts) == 1 else "",
    )


def _walks(table: Table) -> Iterator[tuple[Floats, Floats]]:
    """Yields the projections and residuals of each random walk."""
    for walk in table.unique("walk"):
        path = _Path.read(table.where("walk", walk))
        yield path.projection, path.residual


def _backward_fraction(projection: Floats) -> float:
    """Returns the total backward movement as a fraction of the forward movement, at most 1."""
    steps = np.diff(projection)
    forward, backward = float(steps[steps > 0].sum()), float(-steps[steps < 0].sum())
    return min(forward, backward) / (forward or 1.0)


def _range(values: Sequence[Floats]) -> tuple[float, float]:
    joined = np.concatenate([*values, np.empty(0)])
    return (float(joined.min()), float(joined.max())) if joined.size else (0.0, 1.0)


def _scale_projection(axes: Axes, limits: tuple[float, float]) -> None:
    low, high = limits
    scale_x(axes, low, high)


def _scale_residual(axes: Axes, values: Sequence[Floats]) -> None:
    """Scales the residual axis, which starts at 0 since residuals are distances."""
    scale_distance(axes, _range(values)[1])


# --- With a surface ------------------------------------------------------------------------------


def _read(runs: Sequence[Run[TrajectorySummary]]) -> tuple[list[_Path], list[Grid], list[str]]:
    """Reads the path of each run, the surface of a single one for each split, and notes."""
    paths = [_Path.read(run.table) for run in runs]
    left_out = sum(path.left_out for path in paths)
    notes = [f"{_steps(left_out)} no finite coordinates: not drawn"] if left_out else []
    surfaces: list[Grid] = []
    if len(runs) == 1 and "surface" in runs[0].more:
        splits = split_names(runs)
        surfaces, more = _read_surfaces(runs[0].more["surface"], splits)
        notes += more
    return paths, surfaces, notes


def _read_surfaces(
    table: Table, splits: Sequence[str], values: str = "loss"
) -> tuple[list[Grid], list[str]]:
    """Reads a column of the table ``surface`` as grids over projection and residual.

    Returns:
        A grid for each split, or none if there are too few points for a surface; and notes.
    """
    steps = {
        int(step or 0): p for step, p in zip(table["step"], table.floats("projection"), strict=True)
    }
    order = [step for step in sorted(steps) if abs(steps[step]) < LARGEST]
    residuals = sorted({r for r in table.floats("residual") if 0 <= r < LARGEST})
    projections = [steps[step] for step in order]
    notes = []
    if projections != sorted(projections):
        notes.append(
            "The path goes back and forth along the line: the surface is drawn over the steps in "
            "the order of their projection, not of training."
        )
    step_at: dict[float, int] = {}
    for step in order:
        step_at.setdefault(steps[step], step)
    if len(step_at) < len(order):
        number = len(order) - len(step_at)
        notes.append(f"{_steps(number)} the projection of an earlier step: not in the surface")
    if len(step_at) < 2 or len(residuals) < 2:
        return [], ["There are too few different points for a surface"]
    x, y = np.meshgrid(sorted(step_at), residuals, indexing="ij")
    row = {step_at[p]: i for i, p in enumerate(sorted(step_at))}
    column = {r: j for j, r in enumerate(residuals)}
    losses = {split: np.full(x.shape, np.nan) for split in splits}
    cells = (table["step"], table.floats("residual"), table["split"], table.floats(values))
    for at, residual, split, loss in zip(*cells, strict=True):
        if split in losses and at in row and residual in column:
            losses[str(split)][row[int(at)], column[float(residual)]] = loss
    return [Grid(split, x, y, loss) for split, loss in losses.items()], notes


def _read_all_surfaces(
    run: Run[TrajectorySummary],
) -> tuple[dict[str, list[Grid]], list[str]]:
    """Reads the loss and its standard error of the table ``surface``; and notes."""
    table = run.more["surface"]
    splits = split_names([run])
    columns = [c for c in ("loss", "loss_stderr") if c in table.columns]
    found = {column: _read_surfaces(table, splits, column) for column in columns}
    return {column: grids for column, (grids, _) in found.items()}, found["loss"][1]


def _draw_surfaces(
    run: Run[TrajectorySummary],
    path: _Path,
    surfaces: Sequence[Grid],
    notes: Sequence[str],
    drawing: Drawing,
) -> Figure:
    walks = "walk" in run.more
    across = columns(drawing, 2)
    heights = [
        *[3.4] * (len(surfaces) * 2 // across),
        *[2.6] * (walks * 2 // across),
    ]
    figure = new_figure(drawing, sum(heights), WIDE)
    grid = figure.add_gridspec(
        len(heights), across, width_ratios=[1.1, 1][:across], height_ratios=heights
    )
    cells = [grid[divmod(k, across)] for k in range(len(heights) * across)]
    path_losses = [path.losses(run.table, surface.split, "loss") for surface in surfaces]
    scale = scale_losses(
        np.concatenate([*path_losses, *(s.loss.ravel() for s in surfaces)]), drawing
    )
    panels: list[Axes] = []
    lines = []
    hidden = False
    for k, (surface, losses) in enumerate(zip(surfaces, path_losses, strict=True)):
        panel = figure.add_subplot(cells[2 * k])
        contours = draw_contours(panel, surface, scale)
        draw_path(panel, path.projection, path.residual, drawing=drawing)
        _frame_contours(panel, path, surface)
        panel.set_ylabel(drawing.words(_RESIDUAL, _SHORT[1]))
        title_panel(figure, panel, name_split([run], surface.split, drawing))
        axes_3d = add_surface_axes(figure, cells[2 * k + 1], (*_SHORT, "loss"), -52)
        axes_3d.set_xlim(panel.get_xlim())
        axes_3d.set_ylim(panel.get_ylim())
        draw_surface(axes_3d, scale, contours, drawing)
        # Slightly above the surface, so that the surface does not hide the path.
        points = path.projection, path.residual, scale(losses) + 0.008
        behind = hidden_by(axes_3d, scale, contours, *points)
        hidden |= bool(behind.any())
        draw_path(axes_3d, *points, drawing=drawing, behind=behind)
        panels += [panel, axes_3d]
        lines.append(contours)
    panels[-2].set_xlabel(drawing.words(_PROJECTION, _SHORT[0]))
    add_colour_bar(figure, panels, scale, [run], drawing)
    notes = [*notes, *blank_notes(lines), *[HIDDEN] * hidden, *limit_notes(drawing)]
    names = _end_names([run], drawing)
    what = drawing.words(f"path of the {len(path.steps)} checkpoints", "path")
    groups = [path_entries(figure, PATH, what, *names, drawing)]
    if walks:
        upper, lower = (figure.add_subplot(cell) for cell in cells[-2:])
        more, entries = _draw_both(figure, upper, lower, [run], [path], drawing, colours=[PATH])
        notes += more
        groups += entries
    finish_layout(figure, drawing, [*notes, _TURNS], groups)
    for panel, contours in zip(panels[::2], lines, strict=True):
        label_contours(panel, contours, path.projection, path.residual)
    return figure


def _frame_contours(panel: Axes, path: _Path, surface: Grid) -> None:
    """Limits a panel to its contours and its path."""
    panel.set_xlim(*_range([surface.x.ravel(), path.projection]))
    panel.set_ylim(0, max(float(surface.y.max()), 1.06 * _range([path.residual])[1]))
    panel.xaxis.set_major_formatter(Numbers())
    panel.yaxis.set_major_formatter(Numbers())


# --- As an animation -----------------------------------------------------------------------------


def animate_trajectory(
    runs: Sequence[Run[TrajectorySummary]], drawing: Drawing = FULL
) -> Animation:
    """Animates the paths of one or several runs.

    One run with a table ``surface`` has its path on the contours of the first split; otherwise the
    residuals are over the projection. The losses of all splits are beside it.

    Returns:
        The animation.

    Raises:
        UsageError: No checkpoint has finite coordinates.
    """
    with house_style(drawing):
        paths, surfaces, notes = _read(runs)
        if not any(path.steps for path in paths):
            COMMANDS["trajectory"].check_format(".gif", has_path=False)
        figure, panel, beside = new_panels(drawing)
        contours = None
        if surfaces:
            contours = _draw_first_split(figure, panel, runs[0], paths[0], surfaces[0], drawing)
            notes += limit_notes(drawing)
        colours = [PATH] if contours else run_colours(len(runs), drawing)
        what = drawing.words(f"path of the {len(paths[0].steps)} checkpoints", "path")
        names = _end_names(runs, drawing)
        entries = [path_entries(figure, colours[0], what, *names, drawing)]
        if len(runs) > 1:
            lines = [Line2D([], [], color=colour) for colour in colours]
            entries = [list(zip(lines, run_names(runs, drawing), strict=True))]
        if contours is None:
            entries.append(_draw_residual_axes(panel, runs, paths, drawing)[0])
        panel.set_xlabel(drawing.words(_PROJECTION, _SHORT[0]))
        panel.set_ylabel(drawing.words(_RESIDUAL, _SHORT[1]))
        numbers, counter = _number_steps(runs, paths)
        style = {"cased": contours is not None, "ends": INK if len(runs) > 1 else ""}
        tracks = [
            Track(
                path.projection,
                path.residual,
                number,
                _step_labels(run, path, drawing),
                {**style, "colour": colour},
            )
            for run, path, number, colour in zip(runs, paths, numbers, colours, strict=True)
            if path.steps
        ]
        return animate(
            (figure, panel, beside),
            runs,
            tracks,
            _read_series(runs, paths, colours, numbers, drawing),
            drawing,
            counter=counter,
            contours=contours,
            notes=[*notes, _TURNS],
            entries=entries,
            colour=colours[0] if len(runs) == 1 else INK,
        )


def _draw_first_split(
    figure: Figure,
    panel: Axes,
    run: Run[TrajectorySummary],
    path: _Path,
    surface: Grid,
    drawing: Drawing,
) -> Contours:
    """Draws the contours of the first split with its name and the bar of colours."""
    scale = scale_losses(surface.loss.ravel(), drawing)
    contours = draw_contours(panel, surface, scale)
    _frame_contours(panel, path, surface)
    title_panel(figure, panel, name_split([run], surface.split, drawing))
    add_colour_bar(figure, [panel], scale, [run], drawing)
    return contours


def _step_labels(run: Run[TrajectorySummary], path: _Path, drawing: Drawing) -> list[str]:
    """Returns the name of each step's checkpoint; none in a compact figure without labels."""
    if drawing.compact and not run.checkpoint_labels:
        return []
    return [name_checkpoint(run, name, drawing) for name in _step_names(run, path)]


# --- As a page -----------------------------------------------------------------------------------


def trajectory_views(runs: Sequence[Run[TrajectorySummary]], drawing: Drawing = FULL) -> list[View]:
    """Returns the views of an interactive page: the paths, and the surface of a single run."""
    paths = [_Path.read(run.table) for run in runs]
    loss = f"loss{loss_name(runs)}"
    quantities = {"loss": loss, **{m: m for run in runs for m in run.table.metrics}}
    tables = list(zip(run_names(runs), (run.table for run in runs), strict=True))
    losses = table_view(
        "loss", tables, "step", quantities, drawing=drawing, logarithmic=[*quantities]
    )
    views = [*_surface_views(runs, paths[0], loss, losses.slider)]
    views += [_residual_view(runs, paths, losses.slider, drawing), losses]
    return views


def _surface_views(
    runs: Sequence[Run[TrajectorySummary]], path: _Path, loss: str, slider: Sequence[str]
) -> list[View]:
    """Returns the views of the table ``surface`` of a single run."""
    run = runs[0]
    if len(runs) > 1 or "surface" not in run.more:
        return []
    grids, notes = _read_all_surfaces(run)
    if not grids["loss"]:
        return []
    splits = [grid.split for grid in grids["loss"]]
    labels = _PROJECTION, _RESIDUAL
    short = "projection p", "residual r"
    items = path_items(
        (path.projection.tolist(), path.residual.tolist()),
        {split: path.losses(run.table, split, "loss").tolist() for split in splits},
        _step_names(run, path),
        labels=short,
        at=_slider_positions(run, path),
        errors={split: path.losses(run.table, split, "loss_stderr").tolist() for split in splits},
    )
    return contours_and_surface(
        grids,
        items,
        {"loss": loss},
        labels=labels,
        short=short,
        slider=slider,
        notes=[*notes, _TURNS],
    )


def _residual_view(
    runs: Sequence[Run[TrajectorySummary]],
    paths: Sequence[_Path],
    slider: Sequence[str],
    drawing: Drawing,
) -> View:
    """Returns the view of the residuals over the projection."""
    labels = "projection p", "residual r"
    names = run_names(runs)
    items: list[Item] = []
    for run in runs:
        for projection, residual in _walks(run.more["walk"]) if "walk" in run.more else ():
            walk = curve(
                projection.tolist(),
                residual.tolist(),
                name="random walk with the same step lengths",
                colour=_WALK,
                tags={"quantity": "residual"},
                labels=labels,
                width=0.8,
                dots=False,
            )
            # One entry in the legend, which shows and hides all.
            shared = {"legendgroup": "walks", "showlegend": not items}
            items.append(replace(walk, trace={**walk.trace, **shared}))
    colours = run_colours(len(runs), drawing) if len(runs) > 1 else [PATH]
    for run, path, name, colour in zip(runs, paths, names, colours, strict=True):
        item = curve(
            path.projection.tolist(),
            path.residual.tolist(),
            name=name,
            colour=colour,
            tags={"quantity": "residual"} | ({"run": name} if len(runs) > 1 else {}),
            labels=labels,
            dots=True,
            names=[escape(name) for name in _step_names(run, path)],
        )
        items += [item, *ends(item, _step_names(run, path))]
        items.append(ring(item, _slider_positions(run, path)))
    return View(
        "projection and residual",
        items,
        layout_2d(_PROJECTION),
        {"residual": _RESIDUAL},
        logarithmic=(),
        slider=slider,
        notes=(_TURNS,),
    )


def _step_names(run: Run[TrajectorySummary], path: _Path) -> list[str]:
    """Returns the checkpoint of each step."""
    names = dict(zip(run.table["step"], run.table["checkpoint"], strict=True))
    return [str(names[step]) for step in path.steps]


def _slider_positions(run: Run[TrajectorySummary], path: _Path) -> list[int]:
    """Returns the position of each step on the slider over all steps of the run."""
    order = sorted({int(step or 0) for step in run.table["step"]})
    return [order.index(step) + 1 for step in path.steps]


# --- As a mesh -----------------------------------------------------------------------------------


def mesh_trajectory(
    runs: Sequence[Run[TrajectorySummary]], drawing: Drawing = FULL
) -> dict[str, str]:
    """Writes the surface of a run, and its path at the checkpoints' own losses.

    Returns:
        The content of x.vtp and of x.path.vtp, by the end of the name.

    Raises:
        UsageError: There are several runs, or the run has no surface.
    """
    if len(runs) > 1:
        raise UsageError("a .vtp file has the surface of one trajectory", "Give one CSV")
    (run,) = runs
    grids = _read_all_surfaces(run)[0] if "surface" in run.more else {}
    if not grids.get("loss"):
        COMMANDS["trajectory"].check_format(MESH, has_surface=False)
    path = _Path.read(run.table)
    columns = [c for c in ("loss", "loss_stderr", *run.table.metrics) if c in run.table.columns]
    values = {
        column: {grid.split: path.losses(run.table, grid.split, column) for grid in grids["loss"]}
        for column in columns
    }
    steps = {"step": np.array(path.steps)}
    points = PathPoints(path.projection, path.residual, values, steps)
    return write_mesh(grids, [points], drawing)
