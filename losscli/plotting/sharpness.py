"""The figure of ``losscli sharpness``: rises of the loss over ρ or over checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from losscli.plotting.style import (
    DASHES,
    INK,
    PALE,
    PALETTE,
    WIDTH,
    add_foot,
    add_title,
    drawable,
    examples,
    format_number,
    freeze,
    house_style,
    loss_name,
    number_checkpoints,
    plain,
    round_positions,
    run_colours,
    scale_checkpoints,
    scale_logarithmic,
    scale_y,
    shorten,
    shorten_path,
)
from losscli.results import Run
from losscli.summaries import SharpnessSummary
from losscli.table import Table

__all__ = ["draw_sharpness"]

Floats = NDArray[np.float64]
Group = list[tuple[Artist, str]]

_HEIGHTS = (2.5, 1.9, 1.9)  # inches, of the panels

# The marks and names of the measures.
_MARKS = {"worst": "^", "sam": "o", "average": "s"}
_MARK = "D"  # of critical sharpness
_NAMES = {"worst": "worst-case, at least", "sam": "SAM", "average": "average"}


@dataclass(frozen=True)
class _Curve:
    """Some rows of the table over the horizontal axis.

    Attributes:
        rows: The rows.
        x: The position of each row.
        colour: The colour.
        dashes: The line style, which is that of the split.
        name: The name in notes.
    """

    rows: Table
    x: Floats
    colour: str
    dashes: Any
    name: str

    def values(self, column: str) -> Floats:
        """Returns a column; nan where it is empty."""
        return np.array(self.rows.floats(column))


def draw_sharpness(run: Run[SharpnessSummary], *, title: str = "", log: bool = False) -> Figure:
    """Draws sharpness over ρ, or over checkpoints where there are many or ρ is one.

    Worst-case and SAM sharpness share a panel; average sharpness, which is of longer perturbations
    at the same ρ, has its own. Critical sharpness of several checkpoints is drawn over these, with
    2/η where their learning rates η are known.

    Args:
        run: The run.
        title: The title of the figure.
        log: Has no effect: all axes of sharpness are logarithmic.

    Returns:
        The figure, laid out and ready to `render`.
    """
    del log
    with house_style():
        names = [str(name) for name in run.table.unique("checkpoint")]
        splits = [str(split) for split in run.table.unique("split")]
        radii = sorted(set(run.table.floats("rho")))
        over_rho = len(names) == 1 or (len(radii) > 1 and len(names) <= len(PALETTE))
        panels = 2 + (len(names) > 1)
        figure = Figure(figsize=(WIDTH, 0.6 + sum(_HEIGHTS[:panels])), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(panels, 1, height_ratios=_HEIGHTS[:panels])
        axes = [figure.add_subplot(grid[0])]
        for row in range(1, panels):
            shared = axes[0] if row == 1 or not over_rho else None
            axes.append(figure.add_subplot(grid[row], sharex=shared))
        numbers, label = number_checkpoints(names)
        number = dict(zip(names, numbers.tolist(), strict=True))

        curves = list(_curves(run.table, number, splits, radii, over_rho=over_rho))
        notes = [*_draw(axes[0], curves, ["worst", "sam"]), *_draw(axes[1], curves, ["average"])]
        if over_rho:
            _scale_radii(axes[1], np.array(radii))
        if len(names) > 1:
            of_first = run.table.where("rho", radii[0])
            critical = list(_curves(of_first, number, splits, radii[:1], over_rho=False))
            notes += _draw_critical(axes[2], critical, number, run.summary)
            scale_checkpoints(axes[2], numbers, label)
        else:
            notes += _critical_notes(run.table, splits)
        for panel in axes[: 1 if over_rho else 2]:
            panel.tick_params(labelbottom=False)
        titles = _titles(run)
        for panel, text in zip(axes, titles, strict=False):
            panel.set_title(shorten(figure, text, 400, 10), loc="left", fontsize=10)
        for panel in axes[:2]:
            panel.set_ylabel("rise of the loss\nlog scale")
        figure.align_ylabels(axes)

        labels = run.checkpoint_labels or names
        shown = [shorten_path(figure, plain(name), 200) for name in labels]
        if over_rho:
            colours = dict(zip(shown, run_colours(len(names)), strict=True))
        else:
            texts = [f"ρ = {format_number(radius)}" for radius in radii]
            colours = dict(zip(texts, run_colours(len(radii)), strict=True))
            ends = f"The first of the {len(names)} checkpoints is {shown[0]}, the last {shown[-1]}."
            notes.insert(0, ends)
        notes += _explanations(run.summary)
        if title:
            add_title(figure, title)
        add_foot(figure, notes, _legend(run, colours, splits, curves))
        freeze(figure)
        round_positions(figure)
    return figure


def _titles(run: Run[SharpnessSummary]) -> list[str]:
    """Returns the titles of the panels."""
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
    *,
    over_rho: bool,
) -> Iterator[_Curve]:
    """Yields a curve for each checkpoint and split, or for each ρ and split."""
    column = "checkpoint" if over_rho else "rho"
    groups: Sequence[str | float] = [*number] if over_rho else radii
    for group, colour in zip(groups, run_colours(len(groups)), strict=True):
        for k, split in enumerate(splits):
            rows = table.where(column, group).where("split", split)
            places = [number[str(name)] for name in rows["checkpoint"]]
            x = np.array(rows.floats("rho") if over_rho else places)
            name = plain(group) if isinstance(group, str) else f"ρ = {format_number(group)}"
            yield _Curve(rows, x, colour, DASHES[k % len(DASHES)], f"{name} on {plain(split)}")


def _draw(axes: Axes, curves: Sequence[_Curve], columns: Sequence[str]) -> list[str]:
    """Draws columns on a logarithmic axis; negative values are hollow marks at their size."""
    pairs = [(curve, column) for curve in curves for column in columns]
    reach = [np.empty(0)]
    for curve, column in pairs:
        size = np.abs(curve.values(column))
        reach += [size, size + curve.values(f"{column}_stderr")]
    values = np.concatenate(reach)
    scale_y(axes, values[drawable(values, log=True)], log=True)
    bottom, missing = axes.get_ylim()[0], 0
    for curve, column in pairs:
        value = curve.values(column)
        size, error = np.abs(value), curve.values(f"{column}_stderr")
        ok = drawable(size, log=True)
        missing += int((~ok).sum())
        style: dict[str, Any] = {"color": curve.colour, "zorder": 2.5}
        shown = np.where(ok, size, np.nan)
        width = 0.7 if column == "sam" else 1.4
        axes.plot(curve.x, shown, linestyle=curve.dashes, lw=width, alpha=0.7, **style)
        known = ok & np.isfinite(error)
        low = np.maximum(size - error, bottom)
        axes.vlines(curve.x[known], low[known], (size + error)[known], alpha=0.5, lw=1.2, **style)
        for sign, face in ((1, curve.colour), (-1, "white")):
            at = ok & (np.sign(value) == sign)
            mark: dict[str, Any] = {
                "marker": _MARKS[column],
                "ms": 4.5,
                "mec": curve.colour,
                "mfc": face,
            }
            axes.plot(curve.x[at], size[at], ls="none", zorder=3, **mark)
        axes.plot(
            *(curve.x[~ok], np.full(int((~ok).sum()), 0.96), "x"),
            transform=axes.get_xaxis_transform(),
            ms=4,
            mew=1.1,
            **style,
        )
    if not missing:
        return []
    what = " and ".join(_NAMES[column].partition(",")[0] for column in columns)
    verb = "value is" if missing == 1 else "values are"
    return [f"{missing} {verb} of {what} sharpness not finite, not defined or 0: not drawn (×)."]


def _draw_critical(
    axes: Axes,
    curves: Sequence[_Curve],
    number: Mapping[str, float],
    summary: SharpnessSummary,
) -> list[str]:
    """Draws critical sharpness over the checkpoints, and 2/η."""
    column = "critical_sharpness"
    rates = summary.get("learning_rates", {})
    x = np.array([number[name] for name in number if name in rates])
    edge = np.array([2 / rates[name] for name in number if name in rates])
    values = np.concatenate([*(curve.values(column) for curve in curves), edge])
    scale_y(axes, values[drawable(values, log=True)], log=True)
    notes = []
    for curve in curves:
        value = curve.values(column)
        ok = drawable(value, log=True)
        shown = np.where(ok, value, np.nan)
        style: dict[str, Any] = {"color": INK, "zorder": 2.5}
        axes.plot(curve.x, shown, linestyle=curve.dashes, lw=1.3, **style)
        axes.plot(curve.x[ok], value[ok], _MARK, ms=4, **style)
        split = curve.name.partition(" on ")[2]
        for mask, mark, text in (
            (np.isposinf(value), "^", "is inf: the loss rises at once (▲ at the upper edge)"),
            (np.isnan(value), "x", "is not known (×)"),
        ):
            total = int(mask.sum())
            axes.plot(
                *(curve.x[mask], np.full(total, 0.96), mark),
                transform=axes.get_xaxis_transform(),
                ms=4,
                **style,
            )
            if total:
                where = f"{total} checkpoint{'s' * (total > 1)}"
                notes.append(f"Critical sharpness of {where} on {split} {text}.")
    if x.size:
        axes.plot(x, edge, color=PALE, linestyle=(0, (5, 3)), lw=1.2, zorder=2)
        notes.append(
            "The grey line is 2 / learning rate: above it, a step of gradient descent raises the "
            "loss."
        )
    axes.set_ylabel("2 / critical step\nlog scale")
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
    """Returns what a reader of the figure has to know."""
    what = "δ/|θ|" if summary.get("adaptive") else "δ"
    lengths = (
        f"{what} has a length of about ρ√n for average sharpness and of at most ρ for the others: "
        "not comparable at the same ρ."
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
    colours: Mapping[str, str],
    splits: Sequence[str],
    curves: Sequence[_Curve],
) -> list[Group]:
    """Returns the entries of the legend: colours, splits and marks."""
    only = next(iter(colours.values())) if len(colours) == 1 else INK
    mark: dict[str, Any] = {"ls": "none", "ms": 5}
    measures: Group = [
        (Line2D([], [], marker=_MARKS[column], mec=only, mfc=only, **mark), name)
        for column, name in _NAMES.items()
    ]
    if any((curve.values(column) < 0).any() for curve in curves for column in _NAMES):
        hollow = Line2D([], [], marker="o", mec=only, mfc="white", **mark)
        measures.append((hollow, "hollow: the loss falls by so much"))
    return [
        [(Line2D([], [], color=colour, lw=2.2), name) for name, colour in colours.items()],
        [
            (
                Line2D([], [], color=only, linestyle=DASHES[k % len(DASHES)]),
                plain(split) + examples([run], split),
            )
            for k, split in enumerate(splits)
        ],
        measures,
    ]
