"""The figure of ``losscli sharpness``: rises of the loss over ρ or over checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from losscli.plotting.html import View, table_view
from losscli.plotting.layout import finish_layout
from losscli.plotting.style import (
    DASHES,
    IN_ORDER,
    INCH,
    INK,
    LARGEST,
    PALE,
    PALETTE,
    SMALLEST,
    distinct_checkpoints,
    drawable,
    format_number,
    house_style,
    loss_name,
    name_checkpoint_ticks,
    name_split,
    narrow,
    new_figure,
    number_checkpoints,
    plain,
    run_colours,
    scale_checkpoints,
    scale_logarithmic,
    scale_y,
    shorten_path,
    title_panel,
)
from losscli.results.drawing import FULL, Drawing
from losscli.results.result import Run
from losscli.results.summaries import SharpnessSummary
from losscli.table import Table
from losscli.wording import format_count

__all__ = ["draw_sharpness", "sharpness_views"]

Floats = NDArray[np.float64]
Group = list[tuple[Artist, str]]

_HEIGHTS = (2.5, 1.9, 1.9)  # inches, of the panels

# The marks and names of the measures.
_MARKS = {"worst": "^", "sam": "o", "average": "s"}
_MARK = "D"  # of critical sharpness
_CRITICAL = {
    "critical_sharpness": "critical sharpness λ_c = 2/η_c",
    "critical_step": "critical step η_c",
}
_NAMES = {"worst": "worst-case, at least", "sam": "SAM", "average": "average"}


@dataclass(frozen=True)
class _Curve:
    """Some rows of the table over the horizontal axis.

    Attributes:
        rows: The rows.
        x: The position of each row.
        colour: The colour.
        dashes: The line style of the split.
        split: The name of the split.
    """

    rows: Table
    x: Floats
    colour: str
    dashes: Any
    split: str

    def values(self, column: str) -> Floats:
        """Returns a column; nan where it is empty."""
        return np.array(self.rows.floats(column))


def draw_sharpness(run: Run[SharpnessSummary], drawing: Drawing = FULL) -> Figure:
    """Draws sharpness over ρ, or over checkpoints where there are many or ρ is one.

    Worst-case and SAM sharpness share a panel; average sharpness, which is of longer perturbations
    at the same ρ, has its own. Critical sharpness of several checkpoints is drawn over these, with
    2/η where their learning rates η are known.

    Returns:
        The figure, laid out and ready to `render`.
    """
    with house_style(drawing):
        known = drawable(np.array(run.table.floats("rho")), log=True)
        table = Table(run.table.columns, tuple(compress(run.table.rows, known)))
        names = [str(name) for name in table.unique("checkpoint")]
        splits = [str(split) for split in table.unique("split")]
        radii = sorted(set(table.floats("rho")))
        over_rho = len(names) == 1 or (len(radii) > 1 and len(names) <= len(PALETTE))
        figure, axes = _new_figure(run, 3 if len(names) > 1 else 2, drawing, over_rho=over_rho)
        numbers, label = number_checkpoints(names)
        number = dict(zip(names, numbers.tolist(), strict=True))
        distinct, pattern = distinct_checkpoints(run, names, drawing)

        curves = list(_curves(table, number, splits, radii, drawing, over_rho=over_rho))
        notes = [f"Checkpoints {pattern}"] if pattern else []
        notes += [
            *_draw(axes[0], curves, ["worst", "sam"], drawing),
            *_draw(axes[1], curves, ["average"], drawing),
        ]
        if over_rho:
            _scale_radii(axes[1], np.array(radii))
        if len(names) > 1:
            of_first = table.where("rho", radii[0])
            critical = list(_curves(of_first, number, splits, radii[:1], drawing, over_rho=False))
            notes += _draw_critical(axes[2], critical, number, run.summary, drawing)
            scale_checkpoints(axes[2], numbers, label)
            if label == IN_ORDER and len(names) <= len(PALETTE):
                name_checkpoint_ticks(axes[2:], numbers, distinct, figure.get_figwidth() * INCH)
            else:
                first, last = (
                    shorten_path(figure, distinct[at], narrow(figure, 200)) for at in (0, -1)
                )
                notes.append(
                    f"The first of the {len(names)} checkpoints is {first}, the last is {last}."
                )
        else:
            notes += _critical_notes(table, splits)
        figure.align_ylabels(axes)

        of_rho = [f"ρ = {format_number(radius)}" for radius in radii]
        notes += _explanations(run.summary) if names else ["There are no points"]
        legend = _legend(run, distinct if over_rho else of_rho, splits, curves, drawing)
        finish_layout(figure, drawing, notes, legend)
    return figure


def _new_figure(
    run: Run[SharpnessSummary], number: int, drawing: Drawing, *, over_rho: bool
) -> tuple[Figure, list[Axes]]:
    """Creates the panels; those with the same horizontal axis share it."""
    heights = _HEIGHTS[:number]
    figure = new_figure(drawing, 0.6 + sum(heights))
    grid = figure.add_gridspec(number, 1, height_ratios=heights)
    axes = [figure.add_subplot(grid[0])]
    for row in range(1, number):
        shared = axes[0] if row == 1 or not over_rho else None
        axes.append(figure.add_subplot(grid[row], sharex=shared))
    for panel in axes[: 1 if over_rho else 2]:
        panel.tick_params(labelbottom=False)
    for panel, text in zip(axes, _titles(run, drawing), strict=False):
        title_panel(figure, panel, text, 400)
    for panel in axes[:2]:
        panel.set_ylabel(drawing.words("rise of the loss\nlog scale", "rise of loss"))
    return figure, axes


def _titles(run: Run[SharpnessSummary], drawing: Drawing) -> list[str]:
    """Returns the titles of the panels."""
    if drawing.compact:
        return ["worst-case and SAM", "average", "critical sharpness"]
    kind = ", adaptive" if run.summary.get("adaptive") else ""
    direction = run.summary.get("direction_split")
    along = f" along the gradient of {plain(direction)}" if direction else ""
    return [
        f"Worst-case and SAM sharpness{kind}{loss_name([run])}",
        f"Average sharpness{kind}{loss_name([run])}",
        f"Critical sharpness{along}",
    ]


def _curves(
    table: Table,
    number: Mapping[str, float],
    splits: Sequence[str],
    radii: Sequence[float],
    drawing: Drawing,
    *,
    over_rho: bool,
) -> Iterator[_Curve]:
    """Yields a curve for each checkpoint and split, or for each ρ and split."""
    column = "checkpoint" if over_rho else "rho"
    groups: Sequence[str | float] = [*number] if over_rho else radii
    for group, colour in zip(groups, run_colours(len(groups), drawing), strict=True):
        for k, split in enumerate(splits):
            rows = table.where(column, group).where("split", split)
            places = [number[str(name)] for name in rows["checkpoint"]]
            x = np.array(rows.floats("rho") if over_rho else places)
            yield _Curve(rows, x, colour, DASHES[k % len(DASHES)], plain(split))


def _draw(
    axes: Axes, curves: Sequence[_Curve], columns: Sequence[str], drawing: Drawing
) -> list[str]:
    """Draws columns on a logarithmic axis; negative values are hollow marks at their size."""
    pairs = [(curve, column) for curve in curves for column in columns]
    sizes = [_drawable(np.abs(curve.values(column))) for curve, column in pairs]
    errors = [_drawable(curve.values(f"{column}_stderr")) for curve, column in pairs]
    reach = [x + e for x, e in zip(sizes, errors, strict=True)]
    values = np.concatenate([*sizes, *reach, np.empty(0)])
    scale_y(axes, values[np.isfinite(values)], log=True, limits=drawing.ylim)
    bottom, missing = axes.get_ylim()[0], 0
    for (curve, column), size, error in zip(pairs, sizes, errors, strict=True):
        style: dict[str, Any] = {"color": curve.colour, "zorder": 2.5}
        width = 0.7 if column == "sam" else 1.4
        axes.plot(curve.x, size, linestyle=curve.dashes, lw=width, alpha=0.7, **style)
        bars = np.isfinite(size + error)
        x, low, high = curve.x[bars], (size - error)[bars], (size + error)[bars]
        axes.vlines(x, np.maximum(low, bottom), high, alpha=0.5, lw=1.2, **style)
        for negative, face in ((False, curve.colour), (True, "white")):
            at = np.isfinite(size) & ((curve.values(column) < 0) == negative)
            mark: dict[str, Any] = {"mec": curve.colour, "mfc": face, "ls": "none", "zorder": 3}
            axes.plot(curve.x[at], size[at], _MARKS[column], ms=4.5, **mark)
        missing += _mark_at_edge(axes, curve.x[~np.isfinite(size)], "x", curve.colour)
    if not missing:
        return []
    what = " and ".join(_NAMES[column].partition(",")[0] for column in columns)
    number = format_count(missing, "value")
    return [f"{number} of {what} sharpness not drawn (×): not finite, not defined or 0."]


def _drawable(values: Floats) -> Floats:
    """Returns values with nan for those that a logarithmic axis cannot show."""
    return np.where(drawable(values, log=True), values, np.nan)


def _mark_at_edge(axes: Axes, x: Floats, marker: str, colour: str) -> int:
    """Marks positions at the upper edge; returns their number."""
    where = axes.get_xaxis_transform()
    axes.plot(x, np.full(len(x), 0.96), marker, transform=where, ms=4, color=colour, zorder=2.5)
    return len(x)


def _draw_critical(
    axes: Axes,
    curves: Sequence[_Curve],
    number: Mapping[str, float],
    summary: SharpnessSummary,
    drawing: Drawing,
) -> list[str]:
    """Draws critical sharpness over the checkpoints, and 2/η."""
    column = "critical_sharpness"
    rates = summary.get("learning_rates", {})
    rates = {name: rates[name] for name in number if SMALLEST < rates.get(name, 0.0) < LARGEST}
    x = np.array([number[name] for name in rates])
    edge = np.array([2 / rate for rate in rates.values()])
    values = np.concatenate([*(curve.values(column) for curve in curves), edge])
    scale_y(axes, values[drawable(values, log=True)], log=True)
    notes = []
    for curve in curves:
        value = curve.values(column)
        shown = _drawable(value)
        style: dict[str, Any] = {"color": INK, "zorder": 2.5}
        axes.plot(curve.x, shown, linestyle=curve.dashes, lw=1.3, **style)
        ok = np.isfinite(shown)
        axes.plot(curve.x[ok], shown[ok], _MARK, ms=4, **style)
        at_once = np.isposinf(value)
        for mask, mark, text in (
            (at_once, "^", "is inf: the loss rises at once (▲ at the upper edge)"),
            (~ok & ~at_once, "x", "is not known (×)"),
        ):
            if total := _mark_at_edge(axes, curve.x[mask], mark, INK):
                where = format_count(total, "checkpoint")
                notes.append(f"Critical sharpness of {where} on {curve.split} {text}.")
    if x.size:
        axes.plot(x, edge, color=PALE, linestyle=(0, (5, 3)), lw=1.2, zorder=2)
        notes.append(
            "The grey line is 2 / learning rate: above it, a step of gradient descent raises the "
            "loss."
        )
    axes.set_ylabel(drawing.words("2 / critical step\nlog scale", "2 / η_c"))
    return notes


def _critical_notes(table: Table, splits: Sequence[str]) -> list[str]:
    """Describes the critical sharpness of a single checkpoint."""
    notes = []
    for split in splits:
        rows = table.where("split", split)
        value = rows.floats("critical_sharpness")[0]
        step = rows.floats("critical_step")[0]
        if np.isfinite(value):
            text = f"{format_number(value)}, step {format_number(step)}"
        else:
            text = "not known" if np.isnan(value) else "inf"
        notes.append(f"Critical sharpness on {plain(split)}: {text}.")
    return notes


def _explanations(summary: SharpnessSummary) -> list[str]:
    """Returns notes on the measures and their errors."""
    what = "δ/|θ|" if summary.get("adaptive") else "δ"
    lengths = (
        f"‖{what}‖ is about ρ√n for average sharpness and at most ρ for the others: they are not "
        "comparable."
    )
    bars = (
        "Bars: ± one standard error, over random perturbations for the average and over examples "
        "for the others."
    )
    return [lengths, bars]


def _scale_radii(axes: Axes, radii: Floats) -> None:
    """Scales and labels the axis of ρ."""
    axes.set_xscale("log")
    low, high = np.log10(radii[0]), np.log10(radii[-1])
    room = 0.04 * (high - low) or 0.3
    axes.set_xlim(10 ** (low - room), 10 ** (high + room))
    if len(radii) == 1:
        axes.set_xticks(radii, [format_number(float(radii[0]))], minor=False)
        axes.set_xticks([], minor=True)
    else:
        scale_logarithmic(axes.xaxis, high - low)
    axes.set_xlabel("radius ρ, log scale" if len(radii) > 1 else "radius ρ")


def _legend(
    run: Run[SharpnessSummary],
    names: Sequence[str],
    splits: Sequence[str],
    curves: Sequence[_Curve],
    drawing: Drawing,
) -> list[Group]:
    """Returns the entries of the legend: colours by their names, splits and marks."""
    colours = run_colours(len(names), drawing)
    only = colours[0] if len(colours) == 1 else INK
    mark: dict[str, Any] = {"ls": "none", "ms": 5}
    measures: Group = [
        (Line2D([], [], marker=_MARKS[column], mec=only, mfc=only, **mark), name)
        for column, name in _NAMES.items()
    ]
    if any((curve.values(column) < 0).any() for curve in curves for column in _NAMES):
        hollow = Line2D([], [], marker="o", mec=only, mfc="white", **mark)
        text = drawing.words("hollow: negative, the loss decreases", "falls")
        measures.append((hollow, text))
    lines = [Line2D([], [], color=only, linestyle=dashes) for dashes in DASHES]
    return [
        [
            (Line2D([], [], color=colour, lw=2.2), name)
            for colour, name in zip(colours, names, strict=True)
        ],
        [
            (lines[k % len(lines)], name_split([run], split, drawing))
            for k, split in enumerate(splits)
        ],
        measures,
    ]


# --- As a page -----------------------------------------------------------------------------------


def sharpness_views(run: Run[SharpnessSummary], drawing: Drawing = FULL) -> list[View]:
    """Returns the views of an interactive page: sharpness over ρ and over checkpoints."""
    names = [str(name) for name in run.table.unique("checkpoint")]
    labels = {name: plain(run.label_of(name) or name) for name in names}
    if len(set(labels.values())) < len(names):
        # Equal labels would join the curves of different checkpoints.
        labels = dict(zip(names, names, strict=True))
    rows = [
        record | {"checkpoint": labels[str(record["checkpoint"])]} for record in run.table.records()
    ]
    table = Table.build(run.table.columns, [list(row.values()) for row in rows])
    # The step does not depend on ρ.
    columns = ["checkpoint", "split", *_CRITICAL]
    of_first = table.where("rho", table.unique("rho")[0]) if rows else table
    critical = Table.build(columns, zip(*(of_first[column] for column in columns), strict=True))
    measures = {column: f"sharpness: {name}" for column, name in _NAMES.items()}
    notes = _explanations(run.summary)

    def view(name: str, x: str, x_label: str = "") -> View:
        return table_view(
            name, [("", table)], x, measures, x_label=x_label, notes=notes, drawing=drawing,
            logarithmic=[*measures], limited=[*measures],
        )  # fmt: skip

    return [
        view("over ρ", "rho", "radius ρ"),
        view("over checkpoints", "checkpoint"),
        table_view(
            "critical sharpness",
            [("", critical)],
            "checkpoint",
            _CRITICAL,
            drawing=drawing,
            logarithmic=[*_CRITICAL],
        ),
    ]
