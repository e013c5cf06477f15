"""Curves over a horizontal axis with error bands, dots and marks for missing values."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from losscli.plotting.style import (
    DASHES,
    count_points,
    drawable,
    error_label,
    name_split,
    plain,
    scale_y,
)
from losscli.results.drawing import Drawing
from losscli.results.result import Run
from losscli.results.summaries import BarriersSummary, LineSummary, Summary

__all__ = ["Series", "draw_panel", "has_bands", "repair_notes", "split_entries"]

_CROSSES = 6  # number of rows of crosses; further ones overlap
_FEW_POINTS = 15  # up to this many points have a dot each
_MANY_LINES = 9  # from this many curves on, dots at the ends are smaller
_WIDER, _WIDEST = 2.4, 8.0  # points, by which dots of an earlier colour are wider, and at most
_LEAST_RANGE = 0.02  # of an axis of fractions


@dataclass(frozen=True)
class Series:
    """One split of one run.

    Attributes:
        run: The index of the run.
        split: The name of the split.
        name: The name in notes.
        colour: The colour of the run.
        dashes: The line style of the split.
        x: The positions of the points.
        ends: A mask of the points that are ends of a path, which are marked.
        values: The columns to draw over x, by their names.
        width: The line width in points; None for the default.
        examples: The number of examples of each value; nan if unknown.
    """

    run: int
    split: str
    name: str
    colour: str
    dashes: Any
    x: NDArray[np.float64]
    ends: NDArray[np.bool_]
    values: Mapping[str, NDArray[np.float64]]
    width: float | None = None
    examples: float = math.nan

    def __getitem__(self, column: str) -> NDArray[np.float64]:
        return self.values.get(column, np.full(len(self.x), np.nan))


def repair_notes(runs: Sequence[Run[LineSummary]] | Sequence[Run[BarriersSummary]]) -> list[str]:
    """Returns a note for each split that the preactivations for ``--repair`` were measured on."""
    found = [run.summary["repair"]["split"] for run in runs if "repair" in run.summary]
    runs_named = "" if len(found) == len(runs) else " of some runs"
    return [
        f"Points between two checkpoints{runs_named} are corrected by REPAIR on {plain(split)}: "
        "they are not on the line."
        for split in dict.fromkeys(found)
    ]


def draw_panel(
    axes: Axes, series: Sequence[Series], column: str, drawing: Drawing, *, log: bool
) -> list[str]:
    """Draws a column of all series that have it over x; limits are those of ``loss``.

    Returns:
        Notes on values that are not drawn.
    """
    series = [s for s in series if column in s.values]
    shown = [drawable(s[column], log=log) for s in series]
    errors = [
        np.where(ok, s[f"{column}_stderr"], np.nan) for s, ok in zip(series, shown, strict=True)
    ]
    extremes = [s[column][ok] for s, ok in zip(series, shown, strict=True)]
    extremes += [s[column] + e for s, e in zip(series, errors, strict=True)]
    if not log:
        extremes += [s[column] - e for s, e in zip(series, errors, strict=True)]
    values = np.concatenate([*extremes, np.empty(0)])
    values = values[drawable(values, log=log)]
    fraction = "accuracy" in column.lower() and bool(np.all((values >= 0) & (values <= 1)))
    least = max([_LEAST_RANGE, *(_noise(s, column) for s in series)]) if fraction else 0.0
    limits = drawing.ylim if column == "loss" else None
    scale_y(axes, values, log=log, fraction=fraction, least=least, limits=limits)

    few = len(series) < _MANY_LINES
    size = drawing.points / 10
    colours = list(dict.fromkeys(s.colour for s in reversed(series)))
    wider = min(_WIDER, _WIDEST / max(len(colours) - 1, 1)) if few else 0.0
    for s, ok, error in zip(series, shown, errors, strict=True):
        y = np.where(ok, s[column], np.nan)
        width = s.width and s.width * size
        axes.plot(s.x, y, color=s.colour, linestyle=s.dashes, linewidth=width, zorder=2.5)
        # On a logarithmic axis a band down to zero ends at the lower edge.
        lower = np.maximum(y - error, axes.get_ylim()[0]) if log else y - error
        axes.fill_between(
            s.x, lower, y + error, where=np.isfinite(error), color=s.colour, alpha=0.18, lw=0
        )
        # A point without neighbours is visible neither as a line nor as a band.
        padded = np.pad(ok, 1)
        isolated = ok & ~padded[:-2] & ~padded[2:]
        dots = ok if len(ok) <= _FEW_POINTS and not drawing.no_markers else isolated
        axes.plot(s.x[dots], y[dots], "o", color=s.colour, markersize=3 * size, zorder=2.6)
        bars = isolated & np.isfinite(error)
        axes.vlines(s.x[bars], lower[bars], (y + error)[bars], color=s.colour, alpha=0.4)
        if drawing.no_markers:
            continue
        end = ok & s.ends
        axes.plot(
            s.x[end],
            y[end],
            "o",
            color=s.colour,
            # Earlier curves have wider marks, which the ends of later curves do not hide.
            markersize=size * ((5.5 if few else 3.5) + wider * colours.index(s.colour)),
            mec="white" if few else s.colour,
            mew=0.8,
            zorder=5,
        )
    return _mark_gaps(axes, series, column, log=log)


def split_entries(
    runs: Sequence[Run[Summary]],
    splits: Sequence[str],
    colour: str,
    series: Sequence[Series],
    drawing: Drawing,
    prefix: str = "",
) -> list[tuple[Artist, str]]:
    """Returns the legend entries of the line style of each split, and of the error bands."""
    entries: list[tuple[Artist, str]] = []
    for index, split in enumerate(splits):
        line = Line2D([], [], color=colour, linestyle=DASHES[index % len(DASHES)])
        entries.append((line, prefix + name_split(runs, split, drawing)))
    if has_bands(series):
        entries.append((Patch(color=colour, alpha=0.18, lw=0), error_label(drawing)))
    return entries


def has_bands(series: Sequence[Series]) -> bool:
    """Returns whether a loss has an error band."""
    return any(np.nanmax(s["loss_stderr"], initial=0.0) > 0 for s in series)


def _noise(series: Series, column: str) -> float:
    """Returns ten standard errors of a fraction, or ten examples, at most 0.5.

    An axis that shows less would draw chance as a cliff. The errors are binomial: √(p(1 − p)/n).
    """
    # A table that was edited may hold anything.
    p, n = np.clip(series[column], 0, 1), series.examples
    spread = np.sqrt(np.nanmax(p * (1 - p), initial=0.0) / n)
    return float(np.nan_to_num(min(10 * max(spread, 1 / n), 0.5)))


def _mark_gaps(axes: Axes, series: Sequence[Series], column: str, *, log: bool) -> list[str]:
    """Marks values that are not finite at the upper edge, and values without a logarithm below.

    Where the loss has such a mark, other columns have none: a cross at the upper edge of a panel
    of the accuracy looks like 100 %.

    Returns:
        Notes with the number of marked points.
    """
    notes = []
    for upper in (True, False):
        counts = []
        crosses: Counter[float] = Counter()
        reason = "not finite" if upper else "not above 0"
        for s in series:
            finite = drawable(s[column], log=False)
            missing = ~finite if upper else finite & ~drawable(s[column], log=log)
            if column != "loss":
                missing &= drawable(s["loss"], log=False)
            # Crosses of several curves at the same x form a column.
            depth = np.array([0.03 + 0.03 * (crosses[x] % _CROSSES) for x in s.x[missing]])
            crosses.update(s.x[missing].tolist())
            axes.plot(
                s.x[missing],
                1 - depth if upper else depth,
                "x",
                transform=axes.get_xaxis_transform(),
                color=s.colour,
                markersize=4,
                mew=1.1,
                zorder=4,
            )
            if upper and np.isfinite(s[column][missing]).any():
                reason = "not finite or too large"
            if number := int(missing.sum()):
                counts.append((number, s.name))
        if counts:
            notes.append(f"{count_points(counts)}: {plain(column)} {reason} (×)")
    return notes
