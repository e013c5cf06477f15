"""The figure of ``losscli trajectory``: how a path leaves the line, and the loss around it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from losscli.plotting.lines import Series, draw_panel
from losscli.plotting.style import (
    DASHES,
    INK,
    LARGEST,
    STEPS,
    WIDTH,
    Numbers,
    add_title,
    checkpoint_names,
    count_points,
    examples,
    house_style,
    loss_name,
    plain,
    run_colours,
    run_names,
    shorten,
)
from losscli.plotting.surface import (
    PATH,
    WIDE,
    Grid,
    add_colour_bar,
    add_foot,
    add_surface_axes,
    draw_contours,
    draw_path,
    draw_surface,
    finish_layout,
    label_contours,
    path_entries,
    scale_losses,
)
from losscli.results import Run
from losscli.summaries import TrajectorySummary
from losscli.table import Table

__all__ = ["draw_trajectory"]

Floats = NDArray[np.float64]

_ALONG = "projection p onto the straight line (start 0, end 1)"
_ASIDE = "residual r: distance from the line"
_TURNS = (
    "The residual axis turns: at each step it points along that step's own residual direction, so "
    "equal residuals at two steps are different directions."
)
_WALK = "#9a9a9a"
_BACK = 0.1  # a path that turns back by more has its loss drawn over its steps


@dataclass(frozen=True)
class _Path:
    """One run's checkpoints, in their order, without those that have no place on the line."""

    steps: tuple[int, ...]
    along: Floats
    aside: Floats
    left_out: int

    @classmethod
    def read(cls, table: Table) -> _Path:
        """Finds each step's place, which all splits share."""
        columns = (table["step"], table.floats("projection"), table.floats("residual"))
        places = {int(step or 0): (p, r) for step, p, r in zip(*columns, strict=True)}
        order = sorted(step for step, place in places.items() if np.all(np.abs(place) < LARGEST))
        along, aside = np.array([places[step] for step in order]).reshape(-1, 2).T
        return cls(tuple(order), along, aside, len(places) - len(order))

    def losses(self, table: Table, split: str, column: str) -> Floats:
        """A column of one split at the steps; nan where it has no row."""
        rows = table.where("split", split)
        found = dict(zip(rows["step"], rows.floats(column), strict=True))
        return np.array([found.get(step, np.nan) for step in self.steps])


def draw_trajectory(
    runs: Sequence[Run[TrajectorySummary]], *, title: str = "", log: bool = False
) -> Figure:
    """Draws the paths of one or several runs.

    One run with a table ``surface``: for each split the losses over projection and residual as
    contours and in three dimensions, with the path on them. Otherwise the residual of all runs
    over the projection, and below it their losses. A table ``walk`` adds random walks.

    Args:
        runs: The runs.
        title: Stands above the panels.
        log: Makes the axes of the loss logarithmic.

    Returns:
        The figure, laid out and ready to `render`.
    """
    with house_style():
        paths = [_Path.read(run.table) for run in runs]
        left_out = sum(path.left_out for path in paths)
        notes = [f"{_steps(left_out)} no place on the line: not drawn"] if left_out else []
        if len(runs) == 1 and "surface" in runs[0].more:
            splits = [str(split) for split in runs[0].table.unique("split")]
            ribbon, about = _read_ribbon(runs[0].more["surface"], splits)
            notes += about
            if ribbon:
                return _draw_ribbon(runs[0], paths[0], ribbon, notes, title=title, log=log)
        return _draw_paths(runs, paths, notes, title=title, log=log)


def _steps(number: int) -> str:
    return f"{number} step{'s' * (number > 1)} {'have' if number > 1 else 'has'}"


# --- The path alone ------------------------------------------------------------------------------


def _draw_paths(
    runs: Sequence[Run[TrajectorySummary]],
    paths: Sequence[_Path],
    notes: Sequence[str],
    *,
    title: str,
    log: bool,
) -> Figure:
    figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, height_ratios=[1.25, 1])
    about, groups = _draw_both(figure, upper, lower, runs, paths, log=log)
    if title:
        add_title(figure, title)
    add_foot(figure, upper, [*notes, *about, _TURNS], groups)
    finish_layout(figure)
    return figure


def _draw_both(
    figure: Figure,
    upper: Axes,
    lower: Axes,
    runs: Sequence[Run[TrajectorySummary]],
    paths: Sequence[_Path],
    *,
    log: bool,
    colours: Sequence[str] = (),
) -> tuple[list[str], list[list[tuple[Artist, str]]]]:
    """Draws residuals into one panel and losses into another, below it or beside it.

    Args:
        figure: Where.
        upper: The panel of the residuals.
        lower: The panel of the losses.
        runs: The runs.
        paths: Their paths.
        log: Makes the axis of the loss logarithmic.
        colours: The runs'; those of the house by default, with the ends in the legend.

    Returns:
        Notes, and what the legend holds.
    """
    given = bool(colours)
    colours = list(colours or run_colours(len(runs)))
    names = run_names(runs)
    walks = [walk for run in runs if "walk" in run.more for walk in _walks(run.more["walk"])]
    for along, aside in walks:
        upper.plot(along, aside, color=_WALK, lw=0.8, alpha=0.8, zorder=1.8)
    for path, colour in zip(paths, colours, strict=True):
        # All start and end at the same two places.
        ends = INK if len(runs) > 1 else ""
        draw_path(upper, path.along, path.aside, colour=colour, ends=ends, cased=False)
    view = _view([*(path.along for path in paths), *(along for along, _ in walks)])
    _scale_along(upper, view)
    _scale_aside(upper, [*(path.aside for path in paths), *(aside for _, aside in walks)])

    by_step = any(_turned_back(path.along) > _BACK for path in paths)
    splits = [str(s) for s in dict.fromkeys(s for r in runs for s in r.table.unique("split"))]
    series = [
        Series(
            run=number,
            split=split,
            name=f"{names[number]}, {plain(split)}" if len(runs) > 1 else plain(split),
            colour=colours[number],
            dashes=DASHES[place % len(DASHES)],
            x=np.array(path.steps, dtype=np.float64) if by_step else path.along,
            ends=np.isin(np.arange(len(path.steps)), (0, len(path.steps) - 1)),
            values={c: path.losses(run.table, split, c) for c in ("loss", "loss_stderr")},
        )
        for number, (run, path) in enumerate(zip(runs, paths, strict=True))
        for place, split in enumerate(splits)
        if split in run.table["split"] and path.steps
    ]
    notes = [] if series else ["There are no points"]
    notes += draw_panel(lower, series, "loss", log=log)
    label = shorten(figure, f"loss{loss_name(runs)}", 190, 10)
    lower.set_ylabel(f"{label}\nlog scale" if log else label)
    _scale_along(lower, _view([s.x for s in series]) if by_step else view)
    lower.set_xlabel("step (the checkpoints in their order)" if by_step else _ALONG)
    if by_step or given:
        upper.set_xlabel(_ALONG)
    else:
        upper.tick_params(labelbottom=False)
    upper.set_ylabel(_ASIDE.replace(": ", ":\n"))
    figure.align_ylabels([upper, lower])

    groups: list[list[tuple[Artist, str]]] = []
    colour = colours[0] if len(runs) == 1 else INK
    if len(runs) > 1:
        lines = [Line2D([], [], color=c) for c in colours]
        groups.append(list(zip(lines, names, strict=True)))
    marks: list[tuple[Artist, str]] = []
    for place, split in enumerate(splits):
        line = Line2D([], [], color=colour, linestyle=DASHES[place % len(DASHES)])
        marks.append((line, plain(split) + examples(runs, split)))
    if any(np.nanmax(s["loss_stderr"], initial=0.0) > 0 for s in series):
        marks.append((Patch(color=colour, alpha=0.18, lw=0), "± one standard error"))
    others: list[tuple[Artist, str]] = []
    if walks:
        line = Line2D([], [], color=_WALK, lw=0.8)
        others.append((line, "random walks with the same step lengths"))
    if not given:
        others += path_entries(figure, colour, "", *(_end_names(runs)))
    return notes, [*groups, marks, others]


def _end_names(runs: Sequence[Run[TrajectorySummary]]) -> tuple[str, str]:
    """The first and the last checkpoint's name, where all runs share it."""
    names = [checkpoint_names(run) for run in runs]
    firsts, lasts = ({n[at] if n else "" for n in names} for at in (0, -1))
    return (
        firsts.pop() if len(firsts) == 1 else "",
        lasts.pop() if len(lasts) == 1 else "",
    )


def _walks(table: Table) -> Iterator[tuple[Floats, Floats]]:
    """The projections and residuals of each random walk."""
    for walk in table.unique("walk"):
        path = _Path.read(table.where("walk", walk))
        yield path.along, path.aside


def _turned_back(along: Floats) -> float:
    """How far a path goes back along the line, as a share of what it goes along it at all."""
    steps = np.diff(along)
    ahead, back = float(steps[steps > 0].sum()), float(-steps[steps < 0].sum())
    return min(ahead, back) / (ahead or 1.0)


def _view(values: Sequence[Floats]) -> tuple[float, float]:
    found = np.concatenate([*values, np.empty(0)])
    return (float(found.min()), float(found.max())) if found.size else (0.0, 1.0)


def _scale_along(axes: Axes, view: tuple[float, float]) -> None:
    low, high = view
    room = 0.02 * (high - low) or 0.05 * max(1.0, abs(low))
    axes.set_xlim(low - room, high + room)
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=STEPS))
    axes.xaxis.set_major_formatter(Numbers())


def _scale_aside(axes: Axes, values: Sequence[Floats]) -> None:
    """A residual is a distance: its axis begins at nothing."""
    high = _view(values)[1]
    axes.set_ylim(0, 1.06 * high if high > 0 else 1.0)
    axes.yaxis.set_major_locator(MaxNLocator("auto", steps=STEPS))
    axes.yaxis.set_major_formatter(Numbers())


# --- The ribbon ----------------------------------------------------------------------------------


def _read_ribbon(table: Table, splits: Sequence[str]) -> tuple[list[Grid], list[str]]:
    """Lays a table's rows out as a grid, its columns from left to right in the picture.

    Returns:
        A grid for each split, none where they span no surface, and notes.
    """
    steps = {
        int(step or 0): p for step, p in zip(table["step"], table.floats("projection"), strict=True)
    }
    order = [step for step in sorted(steps) if abs(steps[step]) < LARGEST]
    residuals = sorted({r for r in table.floats("residual") if 0 <= r < LARGEST})
    along = [steps[step] for step in order]
    notes = []
    if along != sorted(along):
        notes.append(
            "The path goes back and forth along the line: the surface is drawn over the steps in "
            "the order of their projection, not of training."
        )
    kept: dict[float, int] = {}
    for step in order:
        kept.setdefault(steps[step], step)
    if len(kept) < len(order):
        number = len(order) - len(kept)
        notes.append(f"{_steps(number)} the projection of an earlier one: not in the surface")
    if len(kept) < 2 or len(residuals) < 2:
        return [], ["There are too few different points for a surface"]
    x, y = np.meshgrid(sorted(kept), residuals, indexing="ij")
    row = {kept[p]: i for i, p in enumerate(sorted(kept))}
    column = {r: j for j, r in enumerate(residuals)}
    losses = {split: np.full(x.shape, np.nan) for split in splits}
    cells = (table["step"], table.floats("residual"), table["split"], table.floats("loss"))
    for at, residual, split, loss in zip(*cells, strict=True):
        if split in losses and at in row and residual in column:
            losses[str(split)][row[int(at)], column[float(residual)]] = loss
    return [Grid(split, x, y, loss) for split, loss in losses.items()], notes


def _draw_ribbon(
    run: Run[TrajectorySummary],
    path: _Path,
    ribbon: Sequence[Grid],
    notes: Sequence[str],
    *,
    title: str,
    log: bool,
) -> Figure:
    walks = "walk" in run.more
    figure = Figure(figsize=(WIDE, 3.4 * len(ribbon) + 2.6 * walks), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        len(ribbon) + walks,
        2,
        width_ratios=[1.1, 1],
        height_ratios=[3.4] * len(ribbon) + [2.6] * walks,
    )
    own = [path.losses(run.table, surface.split, "loss") for surface in ribbon]
    scale = scale_losses(np.concatenate([*own, *(s.loss.ravel() for s in ribbon)]), log=log)
    label = shorten(figure, f"loss{loss_name([run])}", 190, 10)
    label += ", log scale" if scale.log else ""
    high = max(float(ribbon[0].y.max()), 1.06 * _view([path.aside])[1])
    ends = _view([ribbon[0].x.ravel(), path.along])
    blank: dict[str, list[tuple[int, str]]] = {}
    panels: list[Axes] = []
    lines = []
    for place, (surface, losses) in enumerate(zip(ribbon, own, strict=True)):
        panel = figure.add_subplot(grid[place, 0])
        contours = draw_contours(panel, surface, scale)
        for number, why in contours.blank:
            blank.setdefault(why, []).append((number, plain(surface.split)))
        draw_path(panel, path.along, path.aside)
        panel.set_xlim(*ends)
        panel.set_ylim(0, high)
        panel.xaxis.set_major_formatter(Numbers())
        panel.yaxis.set_major_formatter(Numbers())
        panel.set_ylabel(_ASIDE)
        name = plain(surface.split) + examples([run], surface.split)
        panel.set_title(shorten(figure, name, 250, 10), loc="left", fontsize=10)
        relief = add_surface_axes(
            figure, grid[place, 1], ("projection p", "residual r", "loss"), -52
        )
        relief.set_xlim(*ends)
        relief.set_ylim(0, high)
        draw_surface(relief, scale, contours)
        # A hair above the surface, so that nobody wonders which is which.
        draw_path(relief, path.along, path.aside, scale(losses) + 0.008)
        panels += [panel, relief]
        lines.append(contours)
    panels[-2].set_xlabel(_ALONG)
    add_colour_bar(figure, panels, scale, label)
    notes = [
        *notes,
        *(f"{count_points(counts)} {why}: left blank (×)" for why, counts in blank.items()),
    ]
    names = _end_names([run])
    groups = [path_entries(figure, PATH, f"path of the {len(path.steps)} checkpoints", *names)]
    if walks:
        upper, lower = (figure.add_subplot(grid[len(ribbon), k]) for k in (0, 1))
        about, more = _draw_both(figure, upper, lower, [run], [path], log=log, colours=[PATH])
        notes += about
        groups += more
    if title:
        add_title(figure, title)
    add_foot(figure, panels[0], [*notes, _TURNS], groups)
    finish_layout(figure)
    for panel, contours in zip(panels[::2], lines, strict=True):
        label_contours(panel, contours, path.along, path.aside)
    return figure
