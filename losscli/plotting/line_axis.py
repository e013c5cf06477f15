"""Shared parts of figures over α: reading curves, the α axis, the names of A and B."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import ScaledTranslation
from numpy.typing import NDArray

from losscli.plotting.lines import Series
from losscli.plotting.style import (
    DASHES,
    INCH,
    drawable,
    format_number,
    plain,
    run_colours,
    scale_x,
    shorten,
    small_size,
    text_width,
)
from losscli.results.drawing import Drawing
from losscli.results.result import Run
from losscli.results.summaries import LineSummary
from losscli.table import Table

__all__ = [
    "LINE",
    "alpha_range",
    "draw_ends",
    "flat_range_notes",
    "lowest_label",
    "mark_ends",
    "mark_lowest",
    "name_ends",
    "read_curve",
    "read_series",
    "scale_alpha",
]

LINE = "#9a9a9a"
_CONSTANT, _FLAT = 1e-6, 0.01  # variation of the loss relative to the largest
_FEW_LINES = 4  # up to this many curves have a mark at their lowest point


def read_series(
    runs: Sequence[Run[LineSummary]],
    names: Sequence[str],
    splits: Sequence[str],
    drawing: Drawing,
) -> list[Series]:
    """Returns a curve per run and split, with its points in the order of α."""
    series: list[Series] = []
    for number, (run, colour) in enumerate(zip(runs, run_colours(len(runs), drawing), strict=True)):
        for index, split in enumerate(splits):
            table = run.table.where("split", split)
            name = f"{names[number]}, {plain(split)}" if len(runs) > 1 else plain(split)
            style = colour, DASHES[index % len(DASHES)]
            series += read_curve(run, table, "alpha", split, name, style, number)
    return series


def read_curve(
    run: Run[Any],
    table: Table,
    position: str,
    split: str,
    name: str,
    style: tuple[str, Any],
    number: int = 0,
) -> list[Series]:
    """Reads a curve, with its points in order.

    Args:
        run: The run.
        table: The rows of the curve.
        position: The column of the position.
        split: The split.
        name: The name in notes.
        style: The colour and the line style.
        number: The number of the run.

    Returns:
        The curve; none if no position is finite.
    """
    at = np.array(table.floats(position))
    order = np.argsort(at, kind="stable")
    order = order[np.isfinite(at[order])]
    if not order.size:
        return []
    columns = [c for c in table.columns if c not in {position, "block", "path", "split"}]
    values = {column: np.array(table.floats(column))[order] for column in columns}
    colour, dashes = style
    examples = run.summary.get("examples", {}).get(split, math.nan)
    ends = np.isin(at[order], (0.0, 1.0))
    return [Series(number, split, name, colour, dashes, at[order], ends, values, examples=examples)]


def scale_alpha(axes: Axes, series: Sequence[Series]) -> tuple[float, float]:
    """Sets the x axis to the range of the points; returns the lowest and the highest α."""
    low, high = alpha_range(series)
    # A narrow range needs long tick labels, so fewer of them.
    close = high - low < 1e-3 * max(abs(low), abs(high))
    scale_x(axes, low, high, 4 if close else "auto")
    return low, high


def alpha_range(series: Sequence[Series]) -> tuple[float, float]:
    """Returns the lowest and the highest α; 0 and 1 without curves."""
    alpha = np.concatenate([s.x for s in series]) if series else np.array([0.0, 1.0])
    return float(alpha.min()), float(alpha.max())


def mark_lowest(
    axes: Axes, series: Sequence[Series], drawing: Drawing
) -> list[tuple[Series, float, float]]:
    """Marks the lowest point of each curve if it is unique and there are few curves.

    Returns:
        The curve, the α and the loss of each mark.
    """
    lowest = []
    for s in series if len(series) <= _FEW_LINES and not drawing.no_markers else ():
        loss = np.where(drawable(s["loss"], log=False), s["loss"], np.nan)
        finite = loss[np.isfinite(loss)]
        if np.count_nonzero(finite == finite.min(initial=np.inf)) != 1:
            continue
        at = int(np.nanargmin(loss))
        if not drawable(loss, log=drawing.log)[at]:
            continue
        size = 0.6 * drawing.points
        axes.plot(
            s.x[at], loss[at], "D", mfc="white", mec=s.colour, mew=1.3, markersize=size, zorder=6
        )
        lowest.append((s, float(s.x[at]), float(loss[at])))
    return lowest


def flat_range_notes(
    series: Sequence[Series], view: tuple[float, float], *, log: bool
) -> list[str]:
    """Returns a note with the range of the loss if the axis conceals how small it is.

    Either all losses vary by less than ``_FLAT`` of the largest, although they fill the axis, or
    the losses between A and B look flat in comparison with those outside.
    """
    alpha = np.concatenate([np.empty(0), *(s.x for s in series)])
    loss = np.concatenate([np.empty(0), *(s["loss"] for s in series)])
    alpha, loss = alpha[drawable(loss, log=False)], loss[drawable(loss, log=False)]
    variation = _variation(loss)
    # Below the lower limit the axis shows a constant.
    if _CONSTANT < variation < _FLAT:
        digits = _digits(variation)
        low, high = (format_number(float(end), digits) for end in (loss.min(), loss.max()))
        share = format_number(100 * variation, 2)
        return [f"The loss varies by only {share}%, from {low} to {high}."]
    if log or not series or view[0] > 0 or view[1] < 1:
        return []
    between = loss[(alpha >= 0) & (alpha <= 1)]
    if not between.size or np.ptp(between) >= 0.03 * np.ptp(loss):
        return []
    low, high = format_number(float(between.min())), format_number(float(between.max()))
    return [f"Between A and B the loss ranges from {low} to {high}."]


def _variation(loss: NDArray[np.float64]) -> float:
    """Returns the range of losses relative to the largest."""
    largest = float(np.abs(loss).max(initial=0.0))
    return float(np.ptp(loss)) / largest if largest else 0.0


def _digits(variation: float) -> int:
    """Returns how many digits a loss needs to show where it lies in a range."""
    return max(3, 2 + math.ceil(-math.log10(max(variation, _CONSTANT))))


def lowest_label(
    lowest: Sequence[tuple[Series, float, float]],
    runs: int,
    splits: int,
    drawing: Drawing,
    suffix: str = "",
) -> str:
    """Returns the label of the marks of lowest points, with their splits if there are two."""
    if drawing.compact:
        return "lowest"
    if runs > 1 or splits > 2:
        return f"lowest point{suffix}"
    parts = []
    for s, alpha, loss in lowest:
        digits = _digits(_variation(s["loss"][drawable(s["loss"], log=False)]))
        at = f"{format_number(loss, digits)} at α = {format_number(alpha)}"
        parts.append(f"{plain(s.split)} " * (splits > 1) + at)
    return f"lowest{suffix}: {', '.join(parts)}"


@dataclass(frozen=True)
class _End:
    """The label of A or B above a panel.

    Attributes:
        position: The position of its line as a fraction of the width of the panel.
        text: The artist.
        before: The letter, with an arrow if the end is left of the panel.
        name: The name of the checkpoint, which may be shortened.
        after: An arrow if the end is right of the panel.
    """

    position: float
    text: Text
    before: str
    name: str
    after: str


def draw_ends(panels: Sequence[Axes], view: tuple[float, float]) -> None:
    """Draws vertical lines at A and B if they are in the panels."""
    for alpha in (0.0, 1.0):
        if view[0] <= alpha <= view[1]:
            for panel in panels:
                panel.axvline(alpha, color=LINE, lw=0.9, zorder=1.5)


def mark_ends(
    axes: Axes, view: tuple[float, float], names: tuple[str, str], *, above: float = 5
) -> list[_End]:
    """Adds the letters A and B above a panel, which reserves room for their names.

    Args:
        axes: The panel.
        view: The lowest and the highest α.
        names: The names of A and B; may be empty.
        above: Their distance from the panel, in points.

    Returns:
        The labels of A and B, for `name_ends` once the width of the panel is final.
    """
    figure = axes.figure
    low, high = axes.get_xlim()
    shifted = axes.transAxes + ScaledTranslation(0, above / INCH, figure.dpi_scale_trans)
    ends = []
    for alpha, letter, name in zip((0.0, 1.0), "AB", names, strict=True):
        before, after = "← " * (alpha < view[0]), " →" * (alpha > view[1])
        position = min(max((alpha - low) / (high - low), 0.0), 1.0)
        text = axes.text(position, 1, letter, fontsize=small_size(), transform=shifted)
        before += f"{letter}  " if name else letter
        ends.append(_End(position, text, before, name, after))
    return ends


def name_ends(axes: Axes, ends: Sequence[_End]) -> None:
    """Writes the names of A and B above their lines, moved and shortened so that both fit."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    room = axes.get_window_extent().width / figure.dpi * INCH
    gap = 14.0
    full = [text_width(figure, end.before + end.name + end.after) for end in ends]
    for end, other in zip(ends, reversed(full), strict=True):
        fits = max((room - gap) / 2, room - gap - other)
        frame = text_width(figure, end.before + end.after)
        end.text.set_text(end.before + shorten(figure, end.name, fits - frame) + end.after)
    a, b = (text_width(figure, end.text.get_text()) for end in ends)
    left = min(max(ends[0].position * room - a / 2, 0), room - a)
    right = min(max(ends[1].position * room - b / 2, 0), room - b)
    if (overlap := left + a + gap - right) > 0:
        left = max(0, left - overlap / 2)
        right = min(left + a + gap, room - b)
        left = min(left, right - gap - a)
    ends[0].text.set_x(left / room)
    ends[1].text.set_x(right / room)
