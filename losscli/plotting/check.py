"""The figure of ``losscli check``: gradients, eigenvalues, verdicts and the escape direction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from losscli.plotting.eigenvalue_axis import LINE, scale_eigenvalues
from losscli.plotting.html import View, table_view
from losscli.plotting.layout import finish_layout
from losscli.plotting.lines import Series, draw_panel
from losscli.plotting.spectra import Row, matrix_name, spectra_rows
from losscli.plotting.style import (
    DASHES,
    IN_ORDER,
    INCH,
    INK,
    LARGEST,
    PALE,
    PALETTE,
    SMALLEST,
    STEPS,
    WIDTH,
    Numbers,
    columns,
    distinct_checkpoints,
    drawable,
    error_label,
    format_number,
    house_style,
    label_loss,
    loss_name,
    name_checkpoint,
    name_checkpoint_ticks,
    name_split,
    narrow,
    new_figure,
    number_checkpoints,
    plain,
    scale_checkpoints,
    scale_x,
    scale_y,
    shorten,
    shorten_path,
    small_size,
    split_names,
    text_size,
    text_width,
    whole_numbers,
)
from losscli.plotting.surface import WIDE
from losscli.results.drawing import FULL, Drawing
from losscli.results.result import Run
from losscli.results.summaries import CheckSummary, Escape
from losscli.table import Cell, Table
from losscli.wording import format_count

__all__ = ["check_views", "draw_check"]

Floats = NDArray[np.float64]
Group = list[tuple[Artist, str]]

_COLOUR = PALETTE[0]
_SHADE = "#f1f1f1"
_UNDECIDED = "#e2e2e2"
_ON_LINE = 0.012  # of the height of a panel, by which a label is above or below its line
_GRADIENT, _LOW, _HIGH = "gradient norm", "λₘᵢₙ", "λₘₐₓ"
_ADAM, _RATIO = "λₘₐₓ of P⁻¹H", "minimal ratio"
_DECADES = 7  # of the logarithmic axis of a spectral density, far below are tails of Gaussians
_FEW = 40  # up to this many values have individual marks
_LOG_LOSS_RATIO = 1e3  # above this ratio of highest to lowest loss the axis is logarithmic
_LOG_HIGH_RATIO = 10.0  # the same for largest eigenvalue to its median over checkpoints
_VISIBLE_BAR = 3.5  # points, half the length of an error bar that exceeds its mark
_FAR = 1e3  # above this multiple of the largest eigenvalue 2 / learning rate is only in a note

# The marks of the verdicts differ in shape and colour.
_VERDICTS: dict[str, dict[str, Any]] = {
    "not critical": {"marker": "o", "mec": PALE, "mfc": "#c8c8c8"},
    "undecided": {"marker": "d", "mec": "#CC79A7", "mfc": "white"},
    "saddle": {"marker": "s", "mec": "#D55E00", "mfc": "#D55E00"},
    "minimum": {"marker": "v", "mec": "#009E73", "mfc": "#009E73"},
    "maximum": {"marker": "^", "mec": "#000000", "mfc": "#000000"},
}
# The columns that are drawn over the checkpoints.
_COLUMNS = {
    "loss": "loss",
    _GRADIENT: "gradient_norm",
    _LOW: "lambda_min",
    f"{_LOW} error": "lambda_min_error",
    _HIGH: "lambda_max",
    f"{_HIGH} error": "lambda_max_error",
}
_RATIO_COLUMNS = {_RATIO: "minimal_ratio", "undecided": "undecided", "loss": "loss"}
_ADAM_COLUMNS = {
    _ADAM: "preconditioned_lambda_max",
    f"{_ADAM} error": "preconditioned_lambda_max_error",
    "loss": "loss",
}
_START: dict[str, Any] = {"marker": "o", "mec": INK, "mfc": "white", "mew": 1.4, "ms": 7.5}
_LOWEST: dict[str, Any] = {"marker": "D", "mec": _COLOUR, "mfc": "white", "mew": 1.3, "ms": 6}


def draw_check(run: Run[CheckSummary], drawing: Drawing = FULL) -> Figure:
    """Draws the result of a check for critical points.

    Several checkpoints: loss, gradient norm, the extreme eigenvalues of the Hessian and, if they
    are known, the minimal ratio and λ_max of P⁻¹H over the step or epoch in their names, or else
    their order, with the verdicts. One checkpoint: its eigenvalues. A table ``escape`` adds the
    loss along the most negative curvature, a table ``spectrum`` further eigenvalues, ``density``
    the spectral density and ``curvature`` the blocks.

    Returns:
        The figure, laid out and ready to `render`.
    """
    with house_style(drawing):
        names = [str(name) for name in run.table.unique("checkpoint")]
        splits = split_names([run])
        escape = _Escape.read(run)
        draw = _draw_several if len(names) > 1 else _draw_one
        figure, notes, groups = draw(run, names, splits, escape, drawing)
        if escape:
            groups.append(escape.entries(figure, run, drawing))
        finish_layout(figure, drawing, notes, groups)
    return figure


def _split_entries(run: Run[CheckSummary], splits: Sequence[str], drawing: Drawing) -> Group:
    return [
        (
            Line2D([], [], color=_COLOUR, linestyle=DASHES[index % len(DASHES)]),
            name_split([run], split, drawing),
        )
        for index, split in enumerate(splits)
    ]


def _number(value: Any) -> float:
    """Returns a number of a summary; nan if it has none."""
    return float(value) if isinstance(value, int | float) else math.nan


# --- Several checkpoints -------------------------------------------------------------------------


def _draw_several(
    run: Run[CheckSummary],
    names: Sequence[str],
    splits: Sequence[str],
    escape: _Escape | None,
    drawing: Drawing,
) -> tuple[Figure, list[str], list[Group]]:
    strip_height = 0.2 + 0.17 * len(splits)
    strip_height *= 1.5 if drawing.compact else 1.0
    rows = list(spectra_rows(run, names, splits, drawing))
    numbers, label = number_checkpoints(names)
    number = dict(zip(names, numbers.tolist(), strict=True))
    series = _read(run.table, number, splits)
    ratios = _read(run.table, number, splits, _RATIO_COLUMNS)
    adam = _read(run.table, number, splits, _ADAM_COLUMNS)
    across = columns(drawing, 2)
    heights = [strip_height, 2.0, 1.75, *([1.75] if ratios or adam else [])]
    if across == 1:
        heights = [strip_height, 2.0, 1.75, *[1.75] * bool(ratios), 2.0, 1.75, *[1.75] * bool(adam)]
    last = len(heights)
    heights += [*([2.3] if escape else []), *(row.height for row in rows)]
    height = sum(heights) + 0.5 + 0.5 * (bool(escape) + len(rows))
    figure = new_figure(drawing, height, WIDE)
    grid = figure.add_gridspec(len(heights), across, height_ratios=heights)
    loss = figure.add_subplot(grid[1, 0])
    strip = figure.add_subplot(grid[0, 0], sharex=loss)
    left, right = _add_panels(loss, grid, last, ratios=bool(ratios), adam=bool(adam))
    gradient, (high, low) = left[1], right[:2]
    lowest = [left[-1], right[-1]] if across == 2 else [right[-1]]
    for panel in lowest:
        # Both, since panels that share an axis do not share its label.
        scale_checkpoints(panel, numbers, label)

    if label == IN_ORDER and len(names) <= len(PALETTE):
        distinct, pattern = distinct_checkpoints(run, names, drawing)
        name_checkpoint_ticks(lowest, numbers, distinct, figure.get_figwidth() * INCH / across)
        notes = [f"Checkpoints {pattern}"] if pattern else []
    else:
        shown = [name_checkpoint(run, names[at], drawing) for at in (0, -1)]
        ends = [shorten_path(figure, name, narrow(figure, 200)) for name in shown]
        notes = [f"The first of the {len(names)} checkpoints is {ends[0]}, the last is {ends[1]}."]
    notes += draw_panel(loss, series, "loss", drawing, log=drawing.log)
    loss.set_ylabel(label_loss(figure, [run], drawing, log=drawing.log, width=140))
    notes += _draw_gradients(gradient, series, _number(run.summary.get("tolerance")), drawing)
    notes += _draw_high(high, series, run.summary, drawing)
    notes += _draw_low(low, series, drawing)
    groups: list[Group] = []
    if ratios:
        more, entries = _draw_ratios(left[-1], ratios, drawing)
        notes += more
        groups.append(entries)
    if adam:
        notes += _draw_adam(right[-1], adam, run.summary, number, drawing)
    verdicts = _draw_verdicts(strip, run.table, number, splits)
    for panel in (*left, *right, strip):
        if panel not in lowest:
            panel.tick_params(labelbottom=False)
    figure.align_ylabels(left if across == 2 else [*left, *right])
    figure.align_ylabels(right)
    notes.append(_criteria_note(run, escape, bars=_bars_are_visible([high, low])))

    if escape:
        panel = figure.add_subplot(grid[last, :])
        notes += _draw_escape(panel, escape, run, splits, drawing)
        at = number.get(escape.checkpoint)
        if escape.split in splits and at is not None:
            own = run.table.where("split", escape.split).where("checkpoint", escape.checkpoint)
            # The start of the escape direction in the panel below.
            low.plot([at], own.floats("lambda_min")[:1], ls="none", zorder=5, **_START)
    more, further = _draw_rows(figure, grid, rows)
    groups = [_split_entries(run, splits, drawing), verdicts, *groups, *further]
    return figure, notes + more, groups


def _add_panels(
    loss: Axes, grid: GridSpec, last: int, *, ratios: bool, adam: bool
) -> tuple[list[Axes], list[Axes]]:
    """Adds the panels below and beside that of the loss, which is in the second row of the grid.

    Returns:
        The panels from the loss on, and those from λ_max on, in the first ``last`` rows.
    """
    if grid.ncols == 1:
        cells = [grid[row, 0] for row in range(2, last)]
        number = 1 + ratios
    else:
        cells = [grid[2 : last - ratios, 0], *([grid[3, 0]] if ratios else [])]
        number = len(cells)
        cells += [grid[0:2, 1], grid[2 : last - adam, 1], *([grid[3, 1]] if adam else [])]
    figure = loss.figure
    panels = [figure.add_subplot(cell, sharex=loss) for cell in cells]
    return [loss, *panels[:number]], panels[number:]


def _draw_rows(
    figure: Figure, grid: GridSpec, rows: Sequence[Row]
) -> tuple[list[str], list[Group]]:
    """Draws the rows of the spectrum and of blocks into the last rows of a grid."""
    notes, groups = [], []
    for k, row in enumerate(rows, start=grid.nrows - len(rows)):
        more, entries = row.draw(figure, grid[k, :])
        notes += more
        groups.append(entries)
    return notes, groups


def _read(
    table: Table,
    number: Mapping[str, float],
    splits: Sequence[str],
    columns: Mapping[str, str] = _COLUMNS,
) -> list[Series]:
    """Returns a series for each split over the numbers of the checkpoints.

    Its values are ``columns`` by their names; rows without the first of them are left out.
    """
    series = []
    first = next(iter(columns.values()))
    if first not in table.columns:
        return []
    at = table.columns.index(first)
    for index, split in enumerate(splits):
        rows = table.where("split", split)
        if columns is not _COLUMNS:
            rows = Table(rows.columns, tuple(row for row in rows.rows if row[at] is not None))
            if not rows.rows:
                continue
        x = np.array([number[str(name)] for name in rows["checkpoint"]])
        series.append(
            Series(
                run=0,
                split=split,
                name=plain(split),
                colour=_COLOUR,
                dashes=DASHES[index % len(DASHES)],
                x=x,
                ends=np.zeros(len(x), dtype=np.bool_),
                values={
                    name: np.array(rows.floats(column))
                    for name, column in columns.items()
                    if column in rows.columns
                },
            )
        )
    return series


def _criteria_note(run: Run[CheckSummary], escape: _Escape | None, *, bars: bool) -> str:
    """Returns a note on the criteria of the verdicts; ``bars`` tells whether bars are visible."""
    tolerance = _number(run.summary.get("tolerance"))
    critical = "critical means a small gradient norm"
    if 0 <= tolerance < LARGEST:
        critical = f"critical means a gradient norm of at most {format_number(tolerance)}"
    note = f"Verdicts: {critical}."
    if bars:
        note += (
            " Each bar around λ contains an eigenvalue of the Hessian, and its sign counts only if "
            "the bar does not contain zero."
        )
    if "saddle" in run.table["verdict"]:
        note += " At a saddle the loss decreases on both sides along the eigenvector of λₘᵢₙ."
    if escape and escape.verdict(run) != "saddle":
        note += " The curve is the loss along the eigenvector of λₘᵢₙ."
    return note


def _bars_are_visible(panels: Sequence[Axes]) -> bool:
    """Returns whether an error bar is longer than the mark of its value."""
    bars = [
        axes.transData.transform(bar)
        for axes in panels
        for collection in axes.collections
        if isinstance(collection, LineCollection)
        for bar in collection.get_segments()
    ]
    return any(np.ptp(bar, axis=0).max() > 2 * _VISIBLE_BAR for bar in bars)


def _draw_gradients(
    axes: Axes, series: Sequence[Series], tolerance: float, drawing: Drawing
) -> list[str]:
    notes = draw_panel(axes, series, _GRADIENT, drawing, log=True)
    axes.set_ylabel(drawing.words("gradient norm ‖∇L‖\nlog scale", "‖∇L‖"))
    values = np.concatenate([*(s[_GRADIENT] for s in series), np.empty(0)])
    values = values[drawable(values, log=True)]
    if not SMALLEST < tolerance < LARGEST:
        return notes
    scale_y(axes, np.append(values, tolerance), log=True)
    text = f"critical below {format_number(tolerance)}"
    _draw_reference(axes, tolerance, text, series, _GRADIENT, ground=_SHADE)
    axes.axhspan(axes.get_ylim()[0], tolerance, color=_SHADE, lw=0, zorder=0.5)
    return notes


def _draw_high(
    axes: Axes, series: Sequence[Series], summary: CheckSummary, drawing: Drawing
) -> list[str]:
    rate, momentum = _number(summary.get("learning_rate")), _number(summary.get("momentum"))
    momentum = momentum if 0 <= momentum < 1 else 0.0
    edge = (2 + 2 * momentum) / rate if SMALLEST < rate < LARGEST else math.nan
    how = (
        f"(2 + 2 · {format_number(momentum)}) / learning rate" if momentum else "2 / learning rate"
    )
    label = f"largest eigenvalue\n{_HIGH}"
    return _draw_largest(axes, series, _HIGH, label, edge, how, drawing)


def _draw_adam(
    axes: Axes,
    series: Sequence[Series],
    summary: CheckSummary,
    number: Mapping[str, float],
    drawing: Drawing,
) -> list[str]:
    """Draws λ_max of P⁻¹H with the threshold of Adam."""
    known = {
        number[name]: edge
        for state in summary.get("preconditioners", [])
        if (name := state.get("checkpoint", "")) in number
        and SMALLEST < (edge := _number(state.get("threshold"))) < LARGEST
    }
    edges = set(known.values())
    edge = edges.pop() if len(edges) == 1 else math.nan
    how = "(2 + 2β₁) / ((1 − β₁) learning rate)"
    notes = _draw_largest(axes, series, _ADAM, _ADAM, edge, how, drawing, [*edges])
    if edges:
        x = sorted(known)
        axes.plot(x, [known[at] for at in x], color=INK, lw=0.9, linestyle=(0, (5, 3)), zorder=1.9)
        notes.append(f"The dashed line is {how}: full-batch training is unstable above it.")
    notes.append("P is the preconditioner of Adam, from the second moments in each checkpoint.")
    return notes


def _draw_largest(
    axes: Axes,
    series: Sequence[Series],
    column: str,
    label: str,
    edge: float,
    how: str,
    drawing: Drawing,
    further: Sequence[float] = (),
) -> list[str]:
    """Draws a largest eigenvalue.

    Args:
        axes: The panel.
        series: The series.
        column: The eigenvalue.
        label: The label of the axis; a compact figure has its last line.
        edge: Above it, full-batch training is unstable; nan if unknown.
        how: The formula of ``edge``.
        drawing: How it is drawn.
        further: Further values that the axis has to show.

    Returns:
        Notes.
    """
    notes = draw_panel(axes, series, column, drawing, log=False)
    values = _bar_ends(series, column)
    text = f"{how} = {format_number(edge)}" if math.isfinite(edge) else ""
    if edge > _FAR * max(values, default=edge):
        notes.append(f"{text}, far above {column}: not drawn")
        edge = math.nan
    elif text:
        notes.append(f"{text}: full-batch training is unstable where {column} is above this.")
    shown = np.array([*values, edge, *further])
    shown = shown[np.isfinite(shown)]
    far = bool(values.size and shown.max() > _LOG_HIGH_RATIO * np.median(values))
    if far and shown.min() > SMALLEST:
        scale_y(axes, shown, log=True)
        how = "log scale"
    else:
        how = scale_eigenvalues(axes, "y", shown)
    _draw_bars(axes, series, column)
    short = label.rpartition("\n")[2]
    axes.set_ylabel(drawing.words(label + f", {how}" * bool(how), short))
    if math.isfinite(edge):
        text = drawing.words(text, text.replace("learning rate", "η"))
        _draw_reference(axes, edge, text, series, column, above=True, dashes=(0, (5, 3)))
    return notes


def _draw_ratios(axes: Axes, series: Sequence[Series], drawing: Drawing) -> tuple[list[str], Group]:
    """Draws the minimal ratio and, above it, the share of eigenvalues that are undecided."""
    notes = draw_panel(axes, series, _RATIO, drawing, log=False)
    entries: Group = []
    for s in series:
        top = s[_RATIO] + s["undecided"]
        if np.isfinite(top).any():
            axes.fill_between(s.x, s[_RATIO], top, color=_UNDECIDED, lw=0, zorder=0.5)
            text = drawing.words("λ within its error of 0", "λ ≈ 0")
            entries = [(Patch(color=_UNDECIDED, lw=0), text)]
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=STEPS))
    axes.yaxis.set_major_formatter(Numbers(percent=True))
    axes.set_ylabel(drawing.words("minimal ratio\nshare of λ > 0", "λ > 0"))
    return notes, entries


def _draw_low(axes: Axes, series: Sequence[Series], drawing: Drawing) -> list[str]:
    notes = draw_panel(axes, series, _LOW, drawing, log=False)
    how = scale_eigenvalues(axes, "y", _bar_ends(series, _LOW))
    _draw_bars(axes, series, _LOW)
    label = f"smallest eigenvalue\n{_LOW}" + f", {how}" * bool(how)
    axes.set_ylabel(drawing.words(label, _LOW))
    return notes


def _bar_ends(series: Sequence[Series], column: str) -> Floats:
    """Returns the drawable ends of the error bars of a column."""
    ends = [np.empty(0)]
    for s in series:
        error = s[f"{column} error"]
        error = np.where(drawable(error, log=False), error, 0.0)
        ends += [s[column] - error, s[column] + error]
    values = np.concatenate(ends)
    return values[drawable(values, log=False)]


def _draw_bars(axes: Axes, series: Sequence[Series], column: str) -> None:
    """Draws the error bounds of eigenvalues."""
    for s in series:
        error = s[f"{column} error"]
        ok = drawable(s[column], log=False) & drawable(error, log=False)
        few = ok.sum() <= _FEW
        axes.errorbar(
            s.x[ok],
            s[column][ok],
            error[ok],
            fmt="none",
            ecolor=s.colour,
            elinewidth=1.0 if few else 0.8,
            capsize=2.5 if few else 0,
            alpha=0.7 if few else 0.35,
            zorder=2.4,
        )


def _draw_reference(
    axes: Axes,
    y: float,
    text: str,
    series: Sequence[Series],
    column: str,
    *,
    above: bool = False,
    dashes: Any = "solid",
    ground: str = "white",
) -> None:
    """Draws a horizontal line with a label at the end where the curves leave more room."""
    to_unit = axes.transScale + axes.transLimits
    low, high = axes.get_ylim()
    forward = axes.yaxis.get_transform()
    bottom, at, top = (float(v) for v in forward.transform(np.array([low, y, high])))
    # Leave room for one line of text between the line and the edge.
    if above:
        top = max(top, bottom + (at - bottom) / 0.86)
    else:
        bottom = min(bottom, top - (top - at) / 0.84)
    axes.set_ylim(*(float(v) for v in forward.inverted().transform(np.array([bottom, top]))))
    axes.axhline(y, color=INK, lw=0.9, linestyle=dashes, zorder=1.9)
    clearances = []
    for left in (True, False):
        distances = [1.0]
        for s in series:
            ok = drawable(s[column], log=axes.get_yscale() == "log")
            points = to_unit.transform(np.column_stack([s.x[ok], s[column][ok]]))
            points = points[points[:, 0] < 0.4 if left else points[:, 0] > 0.6]
            level = to_unit.transform([[axes.get_xlim()[0], y]])[0, 1]
            gaps = points[:, 1] - level if above else level - points[:, 1]
            # A curve on the line, or on its other side, is clear of the text.
            distances += [*np.where(gaps < _ON_LINE, 1.0, gaps)]
        clearances.append(min(distances))
    left = clearances[0] >= clearances[1]
    axes.annotate(
        text,
        xy=(0.015 if left else 0.985, y),
        xycoords=axes.get_yaxis_transform(),
        xytext=(0, 3 if above else -3),
        textcoords="offset points",
        ha="left" if left else "right",
        va="bottom" if above else "top",
        fontsize=small_size(),
        path_effects=[Stroke(linewidth=2.5, foreground=ground), Normal()],
        zorder=6,
    )


def _draw_verdicts(
    axes: Axes, table: Table, number: Mapping[str, float], splits: Sequence[str]
) -> Group:
    """Draws a row of verdict marks for each split; returns the legend entries."""
    rows = {split: row for row, split in enumerate(splits)}
    points: dict[str, list[tuple[float, int]]] = {}
    cells = (table["checkpoint"], table["split"], table["verdict"])
    for name, split, verdict in zip(*cells, strict=True):
        if verdict:
            points.setdefault(str(verdict), []).append((number[str(name)], rows[str(split)]))
    size = min(max(250 / len(number), 2.4), 6.5)
    entries: Group = []
    for verdict in sorted(points, key=_rank):
        x, y = zip(*points[verdict], strict=True)
        mark = {**_mark(verdict), "mew": min(1.2, size / 4)}
        axes.plot(x, y, ls="none", ms=size, clip_on=False, **mark)
        entries.append((Line2D([], [], ls="none", ms=6.5, **_mark(verdict)), plain(verdict)))
    axes.set_ylim(len(splits) - 0.4, -0.6)
    figure = axes.figure
    assert isinstance(figure, Figure)
    labels = [shorten(figure, plain(split), narrow(figure, 80)) for split in splits]
    axes.set_yticks(range(len(splits)), labels, fontsize=small_size())
    axes.set_title("verdict", loc="left", pad=3)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return entries


def _rank(verdict: str) -> int:
    return [*_VERDICTS, verdict].index(verdict)


def _mark(verdict: str) -> dict[str, Any]:
    # Verdicts of other versions have a neutral mark.
    return _VERDICTS.get(verdict, {"marker": "*", "mec": INK, "mfc": INK})


# --- One checkpoint ------------------------------------------------------------------------------


def _draw_one(
    run: Run[CheckSummary],
    names: Sequence[str],
    splits: Sequence[str],
    escape: _Escape | None,
    drawing: Drawing,
) -> tuple[Figure, list[str], list[Group]]:
    spectrum = _read_spectrum(run, splits)
    further = list(spectra_rows(run, names, splits, drawing))
    below = [row.height for row in further]
    room = sum(below) + 0.5 * len(below)
    if spectrum:
        panels = 2 if escape else 1
        across = columns(drawing, panels)
        heights = [3.4] * (panels // across)
        height = sum(heights) + 0.5 + room
        figure = new_figure(drawing, height, WIDE if escape else WIDTH)
        grid = figure.add_gridspec(
            len(heights) + len(below),
            across,
            width_ratios=[1.35, 1][:across],
            height_ratios=[*heights, *below],
        )
        panel = figure.add_subplot(grid[len(heights) - 1, -1])
        notes = _draw_spectrum(panel, spectrum)
    else:
        low = 0.55 + 0.62 * max(len(splits), 1)
        heights = [*([3.0] if escape else []), low]
        figure = new_figure(drawing, sum(heights) + 0.6 + room)
        grid = figure.add_gridspec(len(heights) + len(below), 1, height_ratios=[*heights, *below])
        panel = figure.add_subplot(grid[len(heights) - 1, 0])
        notes = _draw_extremes(panel, run.table, splits)
    if not escape and names and (run.checkpoint_labels or not drawing.compact):
        split = splits[0] if len(splits) == 1 else ""
        panel.set_title(_title(figure, run, names[0], split, drawing, 380), loc="left")
    if escape:
        notes = [
            *_draw_escape(figure.add_subplot(grid[0, 0]), escape, run, splits, drawing),
            *notes,
        ]
    rows = [dict(zip(run.table.columns, row, strict=True)) for row in run.table.rows]
    facts = [_row_as_sentence(row, run.summary, eigenvalues=bool(spectrum)) for row in rows]
    criteria = _criteria_note(run, escape, bars=_bars_are_visible([panel]))
    notes = (
        [*facts, *_undecided_notes(run, splits), criteria, *notes]
        if facts
        else ["There are no points"]
    )

    lines = _split_entries(run, splits, drawing)
    for index, (line, _) in enumerate(lines if spectrum else []):
        line.set(marker="o", ms=4, mfc=_face(index), mew=0.9)
    verdicts = dict(zip(run.table["split"], run.table["verdict"], strict=True))
    lines = [
        (line, f"{name}: {plain(str(verdicts[split]))}" if verdicts[split] else name)
        for (line, name), split in zip(lines, splits, strict=True)
    ]
    more, groups = _draw_rows(figure, grid, further)
    return figure, notes + more, [lines, *groups]


def _title(
    figure: Figure,
    run: Run[CheckSummary],
    checkpoint: str,
    split: str,
    drawing: Drawing,
    width: float,
) -> str:
    """Returns a checkpoint and its verdict on a split, if there is one, in ``width`` points."""
    suffix = f", {plain(split)}" if split else ""
    if verdict := _verdict(run, checkpoint, split):
        suffix += f": {plain(verdict)}"
    norm = _number(_row(run, checkpoint, split).get("gradient_norm"))
    if verdict == "not critical" and math.isfinite(norm) and not drawing.compact:
        suffix += f" (‖∇L‖ = {format_number(norm)})"
    suffix = shorten(figure, suffix, narrow(figure, 0.75 * width), text_size())
    name = name_checkpoint(run, checkpoint, drawing) or "the checkpoint"
    room = narrow(figure, width) - text_width(figure, suffix, text_size())
    # Names are measured in the size of legends.
    return shorten_path(figure, name, room * small_size() / text_size()) + suffix


def _row(run: Run[CheckSummary], checkpoint: str, split: str) -> dict[str, Cell]:
    """Returns the row of a checkpoint and a split; empty if there is none."""
    rows = run.table.where("checkpoint", checkpoint).where("split", split).rows
    return dict(zip(run.table.columns, rows[0], strict=True)) if rows else {}


def _verdict(run: Run[CheckSummary], checkpoint: str, split: str) -> str:
    return str(_row(run, checkpoint, split).get("verdict") or "")


def _undecided_notes(run: Run[CheckSummary], splits: Sequence[str]) -> list[str]:
    """Returns the reasons of undecided verdicts."""
    about = run.summary.get("splits", {})
    points = ((s, point) for s in splits for point in about.get(s, {}).get("points", ()))
    return [
        f"Undecided on {plain(split)}: {plain(reason)}."
        for split, point in points
        if (reason := point.get("reason"))
    ]


def _row_as_sentence(row: Mapping[str, Cell], summary: CheckSummary, *, eigenvalues: bool) -> str:
    """Returns a row of the table as a sentence, with the extreme eigenvalues on request."""
    parts = [
        f"loss {_with_error(_number(row['loss']))}",
        f"gradient norm {_with_error(_number(row['gradient_norm']))}",
    ]
    for symbol, name in ((_LOW, "lambda_min"), (_HIGH, "lambda_max")) if eigenvalues else ():
        parts.append(
            f"{symbol} = {_with_error(_number(row[name]), _number(row.get(f'{name}_error')))}"
        )
    if math.isfinite(value := _number(row.get("preconditioned_lambda_max"))):
        error = _number(row.get("preconditioned_lambda_max_error"))
        states = {s.get("checkpoint"): s for s in summary.get("preconditioners", [])}
        edge = _number(states.get(str(row["checkpoint"]), {}).get("threshold"))
        of_adam = f" (threshold of Adam {format_number(edge)})" if math.isfinite(edge) else ""
        parts.append(f"{_ADAM} = {_with_error(value, error)}{of_adam}")
    # CSV files of older versions have only the first share.
    columns = {"positive": "minimal_ratio", "negative": "negative", "undecided": "undecided"}
    shares = [
        f"{format_number(100 * share)}% {sign}"
        for sign, column in columns.items()
        if math.isfinite(share := _number(row.get(column)))
    ]
    if shares:
        parts.append(f"eigenvalues {', '.join(shares)}")
    return f"{plain(str(row['split']))}: {', '.join(parts)}."


def _with_error(value: float, error: float = math.nan) -> str:
    """Formats a number and its error bound."""
    if not math.isfinite(value):
        return "not finite"
    bound = f" ± {format_number(error, 2)}" if math.isfinite(error) else ""
    return format_number(value) + bound


def _read_spectrum(
    run: Run[CheckSummary], splits: Sequence[str]
) -> dict[str, tuple[Floats, Floats]]:
    """Returns the eigenvalues of each split in descending order, and their errors."""
    table = run.more.get("spectrum")
    spectrum = {}
    for split in splits if table else ():
        assert table is not None
        rows = table.where("split", split)
        values, errors = np.array(rows.floats("eigenvalue")), np.array(rows.floats("error"))
        order = np.argsort(-values, kind="stable")
        if drawable(values, log=False).any():
            spectrum[split] = values[order], errors[order]
    return spectrum


def _face(index: int) -> str:
    """Returns the fill colour of a split's dots: filled for the first split, else open."""
    return "white" if index else _COLOUR


def _draw_spectrum(axes: Axes, spectrum: dict[str, tuple[Floats, Floats]]) -> list[str]:
    """Draws eigenvalues over their rank."""
    notes, reach = [], [np.empty(0)]
    most = max(len(values) for values, _ in spectrum.values())
    few = most <= _FEW
    for index, (split, (all_values, all_errors)) in enumerate(spectrum.items()):
        ok = drawable(all_values, log=False)
        if missing := int((~ok).sum()):
            notes.append(f"{format_count(missing, 'eigenvalue')} of {plain(split)} not finite")
        values, errors = all_values[ok], all_errors[ok]
        # Shifted if there is room, since the eigenvalues of two splits are often close.
        shift = 0.16 * (index - (len(spectrum) - 1) / 2) if few else 0.0
        rank = np.arange(1, len(values) + 1) + shift
        style = DASHES[index % len(DASHES)]
        size = 4.5 if few else 2.5
        axes.plot(rank, values, color=_COLOUR, lw=0.8, linestyle=style, alpha=0.6, zorder=2.4)
        axes.plot(rank, values, "o", mec=_COLOUR, mfc=_face(index), ms=size, mew=0.9, zorder=3)
        known = drawable(errors, log=False)
        bars: dict[str, Any] = {"fmt": "none", "ecolor": _COLOUR, "elinewidth": 1.0, "zorder": 2.5}
        axes.errorbar(rank[known], values[known], errors[known], capsize=2.5 * few, **bars)
        reach += [values, (values - errors)[known], (values + errors)[known]]
    values = np.concatenate(reach)
    how = scale_eigenvalues(axes, "y", values[drawable(values, log=False)])
    axes.set_ylabel("eigenvalue λ of the Hessian" + f"\n{how}" * bool(how))
    axes.set_xlim(1 - 0.03 * most - 0.3, most + 0.03 * most + 0.3)
    axes.xaxis.set_major_locator(whole_numbers())
    axes.xaxis.set_major_formatter(Numbers())
    axes.set_xlabel("rank of the computed eigenvalue")
    return notes


def _draw_extremes(axes: Axes, table: Table, splits: Sequence[str]) -> list[str]:
    """Draws a row for each split from its smallest to its largest eigenvalue."""
    series = _read(table, {str(name): 0.0 for name in table.unique("checkpoint")}, splits)
    reach = np.concatenate([_bar_ends(series, _LOW), _bar_ends(series, _HIGH)])
    how = scale_eigenvalues(axes, "x", reach)
    missing = 0
    for row, s in enumerate(series):
        ends = [s[column][:1] for column in (_LOW, _HIGH)]
        axes.plot(
            np.concatenate(ends), [row, row], color=_COLOUR, linestyle=s.dashes, alpha=0.6, lw=1.2
        )
        for column, value in zip((_LOW, _HIGH), ends, strict=True):
            if not drawable(value, log=False).all():
                missing += 1
                continue
            error = s[f"{column} error"][:1]
            known = bool(drawable(error, log=False).all())
            axes.errorbar(
                value,
                [row],
                xerr=error if known else None,
                fmt="o",
                color=_COLOUR,
                ms=5.5,
                capsize=3,
                elinewidth=1.2,
            )
            lower = column == _LOW
            axes.annotate(
                f"{column} = {_with_error(float(value[0]), float(error[0]))}",
                xy=(float(value[0]), row),
                # One label above and one below, so that they never overlap.
                xytext=(-4 if lower else 4, -6 if lower else 6),
                textcoords="offset points",
                ha="left" if lower else "right",
                va="top" if lower else "bottom",
                fontsize=small_size(),
                bbox={"fc": "white", "ec": "none", "pad": 0.8},
            )
    axes.set_ylim(max(len(series), 1) - 0.35, -0.65)
    figure = axes.figure
    assert isinstance(figure, Figure)
    labels = [shorten(figure, s.name, narrow(figure, 90), text_size()) for s in series]
    axes.set_yticks(range(len(series)), labels)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("eigenvalues λ of the Hessian" + f" ({how})" * bool(how))
    if not missing:
        return []
    return [f"{format_count(missing, 'eigenvalue')} not finite: left blank"]


# --- The escape ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Escape:
    """The loss along the direction of the most negative curvature.

    Attributes:
        checkpoint: The checkpoint at distance 0; empty if unknown.
        split: The split of the losses; empty if unknown.
        eigenvalue: The curvature; nan if unknown.
        distance: The distances, in ascending order.
        loss: The losses.
        stderr: Their standard errors.
        reported_distance: The distance of the lowest loss in the summary; nan if unknown.
        gain_stderr: The standard error of the gain at that distance.
    """

    checkpoint: str
    split: str
    eigenvalue: float
    distance: Floats
    loss: Floats
    stderr: Floats
    reported_distance: float
    gain_stderr: float

    @classmethod
    def read(cls, run: Run[CheckSummary]) -> _Escape | None:
        """Reads the table ``escape`` of a run; None if there is nothing to draw."""
        table = run.more.get("escape")
        if table is None:
            return None
        distance = np.array(table.floats("distance"))
        order = np.argsort(distance, kind="stable")
        order = order[drawable(distance[order], log=False)]
        if not order.size:
            return None
        about: Escape = run.summary.get("escape") or {}
        loss, stderr = (np.array(table.floats(c))[order] for c in ("loss", "loss_stderr"))
        return cls(
            about.get("checkpoint", ""),
            about.get("split", ""),
            _number(about.get("eigenvalue")),
            distance[order],
            loss,
            stderr,
            _number(about.get("distance")),
            _number(about.get("gain_stderr")),
        )

    @property
    def start(self) -> float:
        """The loss of the checkpoint itself; nan if distance 0 is not in the table."""
        return float(next(iter(self.loss[self.distance == 0]), math.nan))

    @property
    def lowest(self) -> int:
        """The index of the lowest point; -1 if no point is below the checkpoint."""
        shown = np.where(drawable(self.loss, log=False), self.loss, np.inf)
        at = int(np.argmin(shown))
        return at if shown[at] < self.start else -1

    def verdict(self, run: Run[CheckSummary]) -> str:
        """Returns the verdict on the checkpoint; empty if unknown."""
        return _verdict(run, self.checkpoint, self.split)

    def entries(self, figure: Figure, run: Run[CheckSummary], drawing: Drawing) -> Group:
        """Returns the legend entries."""
        entries: Group = []
        if math.isfinite(self.start):
            name = shorten_path(
                figure, name_checkpoint(run, self.checkpoint, drawing), narrow(figure, 200)
            )
            label = drawing.words(f"the checkpoint  {name}".strip(), "checkpoint")
            entries.append((Line2D([], [], ls="none", **_START), label))
        if self.lowest >= 0:
            at, loss = float(self.distance[self.lowest]), float(self.loss[self.lowest])
            label = f"lowest: {format_number(loss)} at distance {format_number(at)}"
            gain_error = self.gain_stderr if at == self.reported_distance else math.nan
            label += f", {_with_error(self.start - loss, gain_error)} below the checkpoint"
            entries.append((Line2D([], [], ls="none", **_LOWEST), drawing.words(label, "lowest")))
        if (drawable(self.stderr, log=False) & (self.stderr > 0)).any():
            entries.append((
                Patch(color=_COLOUR, alpha=0.18, lw=0),
                error_label(drawing),
            ))
        return entries


def _draw_escape(
    axes: Axes,
    escape: _Escape,
    run: Run[CheckSummary],
    splits: Sequence[str],
    drawing: Drawing,
) -> list[str]:
    """Draws the loss along the most negative curvature, in both directions."""
    index = splits.index(escape.split) if escape.split in splits else 0
    series = Series(
        run=0,
        split=escape.split,
        name="the curve",
        colour=_COLOUR,
        dashes=DASHES[index % len(DASHES)],
        x=escape.distance,
        ends=np.zeros(len(escape.distance), dtype=np.bool_),
        values={"loss": escape.loss, "loss_stderr": escape.stderr},
    )
    shown = escape.loss[drawable(escape.loss, log=False)]
    log = drawing.log or bool(shown.size and 0 < _LOG_LOSS_RATIO * shown.min() < shown.max())
    notes = draw_panel(axes, [series], "loss", drawing, log=log)
    axes.axvline(0, color=LINE, lw=0.9, zorder=1.5)
    for distance, loss, mark in (
        (0.0, escape.start, _START),
        (escape.distance[escape.lowest], escape.loss[escape.lowest], _LOWEST),
    ):
        if mark is _LOWEST and escape.lowest < 0:
            continue
        if drawable(np.array([loss]), log=log).all():
            axes.plot([distance], [loss], ls="none", zorder=6, **mark)
    low, high = float(escape.distance[0]), float(escape.distance[-1])
    scale_x(axes, low, high)

    figure = axes.figure
    assert isinstance(figure, Figure)
    axes.set_ylabel(label_loss(figure, [run], drawing, log=log))
    which = "smallest" if escape.eigenvalue >= 0 else "most negative"
    label = f"distance along the {which} curvature"
    if math.isfinite(escape.eigenvalue) and not drawing.compact:
        label += f" (λ = {format_number(escape.eigenvalue)})"
    axes.set_xlabel(label)
    axes.set_title(_title(figure, run, escape.checkpoint, escape.split, drawing, 330), loc="left")
    if escape.lowest < 0 and math.isfinite(escape.start):
        notes.append("Along this direction the loss never falls below that of the checkpoint.")
    return notes


# --- As a page -----------------------------------------------------------------------------------


def check_views(run: Run[CheckSummary], drawing: Drawing = FULL) -> list[View]:
    """Renders the numbers of each checkpoint, its eigenvalues and the escape as a page."""
    loss = f"loss{loss_name([run])}"
    quantities = {
        "loss": loss,
        "gradient_norm": "gradient norm ‖∇L‖",
        "lambda_max": f"largest eigenvalue {_HIGH}",
        "lambda_min": f"smallest eigenvalue {_LOW}",
        "minimal_ratio": "share of positive eigenvalues",
        "negative": "share of negative eigenvalues",
        "undecided": "share of undecided eigenvalues",
        "trace": f"trace of the {matrix_name(run)}",
        "preconditioned_lambda_max": f"largest eigenvalue {_ADAM}",
    }
    positive = ("loss", "gradient_norm", "lambda_max", "trace", "preconditioned_lambda_max")
    views = [
        table_view(
            "checkpoints", [("", run.table)], "checkpoint", quantities, logarithmic=positive,
            notes=[_criteria_note(run, None, bars=True)], drawing=drawing,
        )
    ]  # fmt: skip
    if "spectrum" in run.more:
        values = {"eigenvalue": "eigenvalue λ of the Hessian"}
        views.append(
            table_view(
                "eigenvalues", [("", run.more["spectrum"])], "", values, logarithmic=[*values],
                x_label="rank of the computed eigenvalue", drawing=drawing,
            )
        )  # fmt: skip
    if "density" in run.more:
        density = {"density": "spectral density"}
        label = f"eigenvalue λ of the {matrix_name(run)}"
        views.append(
            table_view(
                "spectral density", [("", run.more["density"])], "lambda", density, x_label=label,
                logarithmic=[*density], decades=_DECADES, drawing=drawing,
            )
        )  # fmt: skip
    if "curvature" in run.more:
        names = ("lambda_max", "trace", "gradient_norm")
        of_blocks = {name: quantities[name] for name in names}
        blocks = [("", run.more["curvature"])]
        views.append(
            table_view("blocks", blocks, "block", of_blocks, logarithmic=names, drawing=drawing)
        )
    if "escape" in run.more:
        escape = [("", run.more["escape"])]
        label = "distance along the most negative curvature"
        views.append(
            table_view("escape", escape, "distance", {"loss": loss}, x_label=label, drawing=drawing)
        )
    return views
