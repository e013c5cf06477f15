"""The figure of ``losscli barriers --pairs``: barriers over a number of each pair."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from losscli.plotting.html import View, curve, escape, layout_2d
from losscli.plotting.layout import finish_layout
from losscli.plotting.lines import repair_notes
from losscli.plotting.style import (
    count_points,
    drawable,
    house_style,
    linear_ticks,
    loss_name,
    name_split,
    narrow,
    plain,
    run_colours,
    scale_y,
    shorten,
    split_names,
    stacked_panels,
    text_size,
    whole_numbers,
)
from losscli.registry import pair_position
from losscli.results.drawing import FULL, Drawing
from losscli.results.result import Run
from losscli.results.summaries import BarriersSummary
from losscli.table import Table
from losscli.weight_space.curve import standard_error

__all__ = ["draw_pairs", "pairs_views"]

Floats = NDArray[np.float64]


def _quantities(run: Run[BarriersSummary]) -> dict[str, str]:
    """Lists the columns that are drawn over the position, and their names."""
    columns = run.table.columns
    start, end = columns.index("loss_b") + 1, len(columns)
    known = {"disagreement": "disagreement", "cka": "CKA of the outputs"}
    metrics = {
        name: f"barrier of {plain(name.removesuffix('_barrier'))}"
        for name in columns[start:end]
        if name.endswith("_barrier")
    }
    return {
        "barrier": f"barrier{loss_name([run])}",
        **metrics,
        **{name: text for name, text in known.items() if name in columns},
    }


def draw_pairs(run: Run[BarriersSummary], drawing: Drawing = FULL) -> Figure:
    """Draws each quantity over the position: a point for each pair, and the mean over pairs."""
    column, quantities = pair_position(run.table.columns), _quantities(run)
    splits = split_names([run])
    with house_style(drawing):
        figure, panels = stacked_panels(drawing, len(quantities) - 1)
        missing: list[tuple[int, str]] = []
        for panel, (quantity, label) in zip(panels, quantities.items(), strict=True):
            log = drawing.log and quantity == "barrier"
            missing += _draw_quantity(panel, run, quantity, splits, drawing, log=log)
            text = shorten(figure, label, narrow(figure, 150), text_size())
            panel.set_ylabel(f"{text}\nlog scale" if log and not drawing.compact else text)
        panels[-1].set_xlabel(shorten(figure, plain(column), narrow(figure, 250), text_size()))
        _set_ticks(panels[-1], np.array(run.table.floats(column)))
        marks = [
            (
                Line2D([], [], color=colour, marker="o", ms=5, lw=1.4),
                shorten(figure, name_split([run], split, drawing), narrow(figure, 250)),
            )
            for split, colour in zip(splits, run_colours(len(splits), drawing), strict=True)
        ]
        first = run.table.where("split", splits[0]) if splits else run.table
        notes = ["Bars: one standard error over examples."]
        if len(set(first.floats(column))) < len(first.rows):
            bars = "Bars: one standard error over pairs, of a single pair over examples."
            notes = [f"Pale points: pairs. Line: mean over pairs. {bars}"]
        notes += repair_notes([run])
        if missing:
            notes.append(f"{count_points(missing)} not drawn.")
        finish_layout(figure, drawing, notes, [marks])
    return figure


def _set_ticks(axes: Axes, x: Floats) -> None:
    """Sets the ticks of the positions, at whole numbers if all positions are whole."""
    linear_ticks(axes.xaxis)
    places = x[drawable(x, log=False)]
    if np.all(places == places.round()):
        axes.xaxis.set_major_locator(whole_numbers())


def _draw_quantity(
    axes: Axes,
    run: Run[BarriersSummary],
    quantity: str,
    splits: list[str],
    drawing: Drawing,
    *,
    log: bool,
) -> list[tuple[int, str]]:
    """Draws a column on a panel; returns the number of points of each split that are not drawn."""
    column = pair_position(run.table.columns)
    missing, reach = [], list[Floats]()
    for split, colour in zip(splits, run_colours(len(splits), drawing), strict=True):
        rows = run.table.where("split", split)
        x, y = np.array(rows.floats(column)), np.array(rows.floats(quantity))
        shown = drawable(y, log=log) & drawable(x, log=False)
        axes.plot(x[shown], y[shown], "o", ms=4, color=colour, alpha=0.35, mew=0)
        places, means, errors = _means(x, y, _errors(rows, quantity))
        at = drawable(means, log=log)
        axes.plot(places[at], means[at], "-o", ms=4.5, lw=1.4, color=colour, zorder=3)
        low, high = (means - errors)[at], (means + errors)[at]
        axes.vlines(places[at], low, high, color=colour, lw=1.4, zorder=3)
        reach += [y[shown], *(ends[drawable(ends, log=log)] for ends in (low, high))]
        if number := int((~shown).sum()):
            missing.append((number, plain(split)))
    limits = drawing.ylim if quantity == "barrier" else None
    scale_y(axes, np.concatenate([*reach, np.empty(0)]), log=log, limits=limits)
    return missing


def _errors(rows: Table, quantity: str) -> Floats:
    """Returns the standard error of each pair over examples; nan where there is none."""
    column = f"{quantity}_stderr"
    return (
        np.array(rows.floats(column)) if column in rows.columns else np.full(len(rows.rows), np.nan)
    )


def _means(x: Floats, y: Floats, errors: Floats) -> tuple[Floats, Floats, Floats]:
    """Returns the distinct positions, the means over pairs, and their errors.

    The error is that over pairs; of a single pair that over examples, or 0 if there is none.
    """
    places = np.unique(x[drawable(x, log=False)])
    groups = [(y[x == place], errors[x == place]) for place in places]
    found = [own[0] if len(own) == 1 else standard_error(group) for group, own in groups]
    return places, np.array([group.mean() for group, _ in groups]), np.nan_to_num(found)


def pairs_views(run: Run[BarriersSummary], drawing: Drawing = FULL) -> list[View]:
    """Returns the view of an interactive page: each quantity over the position."""
    column, quantities = pair_position(run.table.columns), _quantities(run)
    splits = split_names([run])
    items = []
    for split, colour in zip(splits, run_colours(len(splits), drawing), strict=True):
        rows = run.table.where("split", split)
        pairs = zip(rows["a"], rows["b"], strict=True)
        names = [f"{escape(str(a))} and {escape(str(b))}" for a, b in pairs]
        x = np.array(rows.floats(column))
        for quantity, label in quantities.items():
            tags, labels = {"quantity": quantity, "split": split}, (column, label)
            y, errors = rows.floats(quantity), f"{quantity}_stderr"
            places, means, of_means = _means(x, np.array(y), _errors(rows, quantity))
            mean = curve(
                *(places.tolist(), means.tolist()),
                name=f"{split}, mean over pairs",
                colour=colour,
                tags=tags,
                labels=labels,
                errors=of_means.tolist(),
                counted=False,
            )
            points = curve(
                *(x.tolist(), y),
                name=split,
                colour=colour,
                tags=tags,
                labels=labels,
                errors=rows.floats(errors) if errors in rows.columns else (),
                dots=True,
                names=names,
            )
            items += [
                mean,
                replace(points, trace={**points.trace, "mode": "markers", "opacity": 0.5}),
            ]
    layout = layout_2d(column)
    notes = repair_notes([run])
    return [
        View(
            "barriers",
            items,
            layout,
            quantities,
            logarithmic=[*quantities],
            limited=("barrier",),
            notes=notes,
        )
    ]
