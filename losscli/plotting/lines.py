"""Lines over a horizontal axis, with what all of them have: bands, dots, gaps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from losscli.plotting.style import count_points, drawable, plain, scale_y

__all__ = ["Series", "draw_panel"]

_CROSSES = 6  # so many lie below each other, further ones on top of them
_FEW_POINTS = 15  # so few are shown one by one
_MANY_LINES = 9  # the ends of so many have smaller dots


@dataclass(frozen=True)
class Series:
    """One split of one run.

    Attributes:
        run: The number of the run.
        split: The name of the split.
        name: What to call it in a note.
        colour: The run's.
        dashes: The split's.
        x: Where its points are.
        ends: Which of them are the ends of a path, to be marked.
        values: The columns of the table that are drawn over x, by their names.
        width: Of the line, in points; None for that of the house.
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

    def __getitem__(self, column: str) -> NDArray[np.float64]:
        return self.values.get(column, np.full(len(self.x), np.nan))


def draw_panel(axes: Axes, series: Sequence[Series], column: str, *, log: bool) -> list[str]:
    """Draws a column of all series over x.

    Args:
        axes: Where.
        series: The series; those without the column are passed over.
        column: Its name.
        log: Makes the y axis logarithmic.

    Returns:
        Notes on what is not drawn.
    """
    series = [s for s in series if column in s.values]
    shown = [drawable(s[column], log=log) for s in series]
    errors = [
        np.where(ok, s[f"{column}_stderr"], np.nan) for s, ok in zip(series, shown, strict=True)
    ]
    reach = [s[column][ok] for s, ok in zip(series, shown, strict=True)]
    reach += [s[column] + e for s, e in zip(series, errors, strict=True)]
    if not log:
        reach += [s[column] - e for s, e in zip(series, errors, strict=True)]
    values = np.concatenate([*reach, np.empty(0)])
    values = values[drawable(values, log=log)]
    fraction = "accuracy" in column.lower() and bool(np.all((values >= 0) & (values <= 1)))
    scale_y(axes, values, log=log, fraction=fraction)

    few = len(series) < _MANY_LINES
    for s, ok, error in zip(series, shown, errors, strict=True):
        y = np.where(ok, s[column], np.nan)
        axes.plot(s.x, y, color=s.colour, linestyle=s.dashes, linewidth=s.width, zorder=2.5)
        # A band that goes down to zero leaves a logarithmic axis at its lower edge.
        lower = np.maximum(y - error, axes.get_ylim()[0]) if log else y - error
        axes.fill_between(
            s.x, lower, y + error, where=np.isfinite(error), color=s.colour, alpha=0.18, lw=0
        )
        # Neither a line nor a band shows a point without neighbours.
        beside = np.pad(ok, 1)
        alone = ok & ~beside[:-2] & ~beside[2:]
        dots = ok if len(ok) <= _FEW_POINTS else alone
        axes.plot(s.x[dots], y[dots], "o", color=s.colour, markersize=3, zorder=2.6)
        bars = alone & np.isfinite(error)
        axes.vlines(s.x[bars], lower[bars], (y + error)[bars], color=s.colour, alpha=0.4)
        end = ok & s.ends
        axes.plot(
            s.x[end],
            y[end],
            "o",
            color=s.colour,
            markersize=5.5 if few else 3.5,
            mec="white" if few else s.colour,
            mew=0.8,
            zorder=5,
        )
    return _mark_gaps(axes, series, column, log=log)


def _mark_gaps(axes: Axes, series: Sequence[Series], column: str, *, log: bool) -> list[str]:
    """Marks by a cross at the upper edge what is not finite, at the lower what has no logarithm."""
    notes = []
    what = "" if column == "loss" else f"{plain(column)}: "
    for upper in (True, False):
        counts = []
        taken: Counter[float] = Counter()
        reason = "not finite" if upper else "not above 0"
        for s in series:
            finite = drawable(s[column], log=False)
            missing = ~finite if upper else finite & ~drawable(s[column], log=log)
            # Curves that have no value at the same place have their crosses below each other.
            depth = np.array([0.03 + 0.03 * (taken[x] % _CROSSES) for x in s.x[missing]])
            taken.update(s.x[missing].tolist())
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
            if column != "loss":
                # Where the loss is not finite, a note says so already.
                missing &= drawable(s["loss"], log=False)
            if number := int(missing.sum()):
                counts.append((number, s.name))
        if counts:
            notes.append(f"{what}{count_points(counts)} {reason}: not drawn (×)")
    return notes
