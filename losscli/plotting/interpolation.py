"""The figure of ``losscli interpolate``: losses and metrics over the line from A to B."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import ConnectionPatch, Patch
from matplotlib.ticker import MaxNLocator

from losscli.plotting.html import View, table_view
from losscli.plotting.layerwise import BLOCK_ALPHA, block_colours, draw_layerwise
from losscli.plotting.layout import finish_layout
from losscli.plotting.line_axis import (
    LINE,
    alpha_range,
    draw_ends,
    flat_range_notes,
    lowest_label,
    mark_ends,
    mark_lowest,
    name_ends,
    read_series,
    scale_alpha,
)
from losscli.plotting.lines import (
    Series,
    draw_panel,
    has_bands,
    repair_notes,
    split_entries,
)
from losscli.plotting.style import (
    INK,
    STEPS,
    drawable,
    end_names,
    examples_notes,
    house_style,
    label_loss,
    loss_name,
    narrow,
    plain,
    run_colours,
    run_names,
    shorten,
    split_names,
    stacked_panels,
    text_size,
)
from losscli.results.drawing import FULL, Drawing
from losscli.results.result import Run
from losscli.results.summaries import LineSummary
from losscli.table import Table

__all__ = ["draw_interpolation", "interpolation_views"]

_ALPHA = "α:  θ(α) = A + α (B − A)"
_PAIRED = (
    "Differences between points are more precise than the bands suggest (the text has their paired "
    "standard errors)."
)
_MOST_MARKS = 12  # maximum number of marked local minima and maxima
_DERIVATIVES = {"slope": "dL/dα", "curvature": "d²L/dα²"}
_OVERVIEW_HEIGHT = 1.5  # inches, of the panel of the whole line above a part of it


def draw_interpolation(runs: Sequence[Run[LineSummary]], drawing: Drawing = FULL) -> Figure:
    """Draws losses and metrics over the line from A to B.

    Colours distinguish runs, line styles distinguish splits, and a band shows one standard error.
    Values that cannot be drawn leave a gap, a mark at the edge and a note with their number.
    Slopes, curvatures and metrics have a panel each. One run with a table ``blocks`` is drawn by
    `draw_layerwise`, one with a table ``context`` with an overview of the whole line.

    Returns:
        The figure, laid out and ready to `render`.
    """
    if len(runs) == 1 and "blocks" in runs[0].more:
        return draw_layerwise(runs[0], drawing)
    log = drawing.log
    with house_style(drawing):
        splits = split_names(runs)
        metrics = list(dict.fromkeys(m for r in runs for m in r.table.metrics))
        names = run_names(runs, drawing)
        series = read_series(runs, names, splits, drawing)
        whole = _read_whole(runs, splits, drawing)
        derivatives = {
            name: label
            for name, label in _DERIVATIVES.items()
            if any(name in run.table.columns for run in runs)
        }
        extra = len(derivatives) + len(metrics)
        figure, panels = stacked_panels(drawing, extra, above=_OVERVIEW_HEIGHT if whole else 0.0)
        overview = panels.pop(0) if whole else None
        view = scale_alpha(panels[-1], series)

        notes = [*repair_notes(runs), *examples_notes(runs, splits)]
        notes = notes if series else ["There are no points"]
        notes += draw_panel(panels[0], series, "loss", drawing, log=log)
        label = label_loss(figure, runs, drawing, log=False)
        units = "batches" if all("batches" in run.summary for run in runs) else "examples"
        axis = f"\nmean over {units}, log scale" if log else f"\nmean over {units}"
        panels[0].set_ylabel(label + drawing.words(axis, ""))
        lowest = mark_lowest(panels[0], series, drawing)
        extrema, more = _mark_extrema(panels[0], runs, series, lowest, drawing)
        notes += more
        notes += flat_range_notes(series, view, log=log)
        for axes, (derivative, label) in zip(panels[1:], derivatives.items(), strict=False):
            notes += draw_panel(axes, series, derivative, drawing, log=False)
            axes.axhline(0, color=LINE, lw=0.9, zorder=1.5)
            axes.set_ylabel(drawing.words(f"{derivative}\n{label}", label))
        for axes, metric in zip(panels[1 + len(derivatives) :], metrics, strict=True):
            wide = _is_wide(series, metric)
            notes += draw_panel(axes, series, metric, drawing, log=wide)
            label = shorten(figure, plain(metric), narrow(figure, 88), text_size())
            axes.set_ylabel(f"{label}\nlog scale" if wide and not drawing.compact else label)
        panels[-1].set_xlabel(_ALPHA)
        others = [extrema]
        if overview:
            more = _draw_whole(overview, whole, panels[0].get_xlim(), drawing)
            notes += [f"The whole line: {note}" for note in more]
            shade = Patch(color=LINE, alpha=0.3, lw=0)
            others.append([(shade, drawing.words("range of the panel below", "range below"))])
        if has_bands(series):
            notes.append(_PAIRED)
        figure.align_ylabels([overview, *panels] if overview else panels)

        draw_ends(panels, view)
        named = panels[0]
        if overview:
            named, view = overview, alpha_range(whole)
            draw_ends([named], view)
        # Above the tick labels of the overview.
        above = 24 if overview else 5
        ends = mark_ends(named, view, end_names(runs, drawing), above=above * text_size() / 10)
        entries = _entries(runs, names, splits, series, lowest, drawing)
        finish_layout(figure, drawing, notes, [*entries, *others])
        name_ends(named, ends)
        if overview:
            _connect(overview, panels[0])
    return figure


def interpolation_views(runs: Sequence[Run[LineSummary]], drawing: Drawing = FULL) -> list[View]:
    """Returns the views of an interactive page: losses and metrics over the line."""
    quantities = {"loss": f"loss{loss_name(runs)}"}
    quantities |= {name: f"{name} {label}" for name, label in _DERIVATIVES.items()}
    quantities |= {metric: metric for run in runs for metric in run.table.metrics}
    ends = {
        alpha: f"{letter}  {name}".strip()
        for alpha, letter, name in zip((0.0, 1.0), "AB", end_names(runs), strict=True)
    }

    def view(name: str, tables: Sequence[tuple[str, Table]], **options: Any) -> View:
        options = {"x_label": _ALPHA, "short": "α", "marks": ends, "drawing": drawing, **options}
        positive = [q for q in quantities if q not in _DERIVATIVES]
        return table_view(name, tables, "alpha", quantities, logarithmic=positive, **options)

    views = [
        view(
            "line",
            list(zip(run_names(runs), (run.table for run in runs), strict=True)),
            notes=repair_notes(runs),
        ),
    ]
    more = runs[0].more if len(runs) == 1 else {}
    if "context" in more:
        views.append(view("whole line", [("", more["context"])]))
    if "blocks" in more:
        blocks = {"x_label": BLOCK_ALPHA, "colours": block_colours}
        views.append(view("single blocks", [("", more["blocks"])], **blocks))
    return views


def _is_wide(series: Sequence[Series], column: str) -> bool:
    """Returns whether a positive column spans more than three powers of ten."""
    values = np.concatenate([s[column] for s in series])
    values = values[drawable(values, log=False)]
    return bool(values.size and values.min() > 0 and values.max() > 1e3 * values.min())


def _mark_extrema(
    axes: Axes,
    runs: Sequence[Run[LineSummary]],
    series: Sequence[Series],
    lowest: Sequence[tuple[Series, float, float]],
    drawing: Drawing,
) -> tuple[list[tuple[Artist, str]], list[str]]:
    """Marks the significant local minima and maxima in the summaries, unless they have a mark.

    Returns:
        The entries of the legend, and notes.
    """
    if drawing.no_markers:
        return [], []
    marked_already = {(id(s), alpha) for s, alpha, _ in lowest}
    extrema: list[tuple[float, str, Series, float, float]] = []
    for s in series:
        split = runs[s.run].summary.get("splits", {}).get(s.split, {})
        reported = [("minima", extremum) for extremum in split.get("local_minima", ())]
        reported += [("maxima", extremum) for extremum in split.get("local_maxima", ())]
        for kind, extremum in reported:
            at = np.flatnonzero(
                (s.x == extremum.get("alpha")) & drawable(s["loss"], log=drawing.log)
            )
            if extremum.get("beyond_noise") and at.size:
                alpha, loss = float(s.x[at[0]]), float(s["loss"][at[0]])
                size = (
                    extremum.get("depth", 0.0) if kind == "minima" else extremum.get("height", 0.0)
                )
                extrema.append((size, kind, s, alpha, loss))
    extrema.sort(key=lambda extremum: -extremum[0])
    number = len(extrema)
    extrema = [e for e in extrema[:_MOST_MARKS] if (id(e[2]), e[3]) not in marked_already]
    note = "Local minima and maxima are marked if significant (> 2 s.e.)"
    if number > _MOST_MARKS:
        note += f", the {_MOST_MARKS} most prominent of {number}"
    entries: list[tuple[Artist, str]] = []
    for kind, marker in (("minima", "v"), ("maxima", "^")):
        style: dict[str, Any] = {"marker": marker, "mfc": "white", "mew": 1.2}
        style["ms"] = 0.5 * drawing.points
        marked = [extremum for extremum in extrema if extremum[1] == kind]
        for _, _, s, alpha, loss in marked:
            axes.plot([alpha], [loss], ls="none", mec=s.colour, zorder=5.5, **style)
        if marked:
            colour = marked[0][2].colour if len(runs) == 1 else INK
            handle = Line2D([], [], ls="none", mec=colour, **style)
            singular = {"minima": "minimum", "maxima": "maximum"}[kind]
            entries.append((handle, f"local {singular}"))
    return entries, [f"{note}."] if extrema else []


def _read_whole(
    runs: Sequence[Run[LineSummary]], splits: Sequence[str], drawing: Drawing
) -> list[Series]:
    """Reads the table ``context``: the curves of the whole line of which a run is a part."""
    if len(runs) != 1 or "context" not in runs[0].more:
        return []
    return read_series([Run(runs[0].more["context"], {})], [""], splits, drawing)


def _draw_whole(
    axes: Axes, whole: Sequence[Series], part: tuple[float, float], drawing: Drawing
) -> list[str]:
    """Draws the whole line and shades the part that the panels below show; returns notes."""
    notes = draw_panel(axes, whole, "loss", replace(drawing, ylim=None), log=drawing.log)
    scale_alpha(axes, whole)
    low, high = axes.get_xlim()
    # The part may exceed the whole line.
    axes.set_xlim(min(low, part[0]), max(high, part[1]))
    axes.axvspan(*part, color=LINE, alpha=0.3, lw=0, zorder=1.2)
    if not drawing.log:
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=STEPS))
    axes.set_ylabel(drawing.words("loss on the\nwhole line", "loss"))
    # Above, where the lines of `_connect` do not cross the labels.
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.spines.top.set_visible(True)
    axes.spines.bottom.set_visible(False)
    return notes


def _connect(overview: Axes, panel: Axes) -> None:
    """Draws lines from both ends of the shaded part to the upper corners of the panel below."""
    figure = overview.figure
    for alpha, corner in zip(panel.get_xlim(), (0, 1), strict=True):
        figure.add_artist(
            ConnectionPatch(
                (alpha, 0),
                (corner, 1),
                overview.get_xaxis_transform(),
                panel.transAxes,
                color=LINE,
                lw=0.8,
                zorder=-1,
            )
        )


def _entries(
    runs: Sequence[Run[LineSummary]],
    names: Sequence[str],
    splits: Sequence[str],
    series: Sequence[Series],
    lowest: Sequence[tuple[Series, float, float]],
    drawing: Drawing,
) -> list[list[tuple[Artist, str]]]:
    """Returns the entries of the legend: runs by colour, splits by line style, and marks."""
    several = len(runs) > 1
    colours = run_colours(len(runs), drawing)
    colour = colours[0] if len(runs) == 1 else INK
    prefix = f"{plain(runs[0].label)}: " if len(runs) == 1 and runs[0].label else ""
    marks = split_entries(runs, splits, colour, series, drawing, prefix)
    if lowest:
        mark = Line2D([], [], ls="none", marker="D", mfc="white", mec=colour, mew=1.3, ms=6)
        marks.append((mark, lowest_label(lowest, len(runs), len(splits), drawing)))
    named = zip(colours, names, strict=True) if several else ()
    return [[(Line2D([], [], color=colour), name) for colour, name in named], marks]
