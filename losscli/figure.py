"""Figures: tables in, a matplotlib Figure out, and its bytes; nothing is evaluated here."""

from __future__ import annotations

import io
import itertools
import math
import textwrap
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import (
    Formatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)
from matplotlib.transforms import ScaledTranslation
from numpy.typing import NDArray

from losscli.errors import UsageError
from losscli.table import Table

__all__ = ["Curve", "draw_interpolation", "render"]


@dataclass(frozen=True)
class Curve:
    """One run of ``losscli interpolate``, to be drawn.

    Attributes:
        table: Its rows: ``alpha``, ``split``, ``loss``, ``loss_stderr``, and metrics if any.
        summary: Its JSON, or ``{}`` where only the CSV is at hand.
        label: What to call it beside other runs; by default its two checkpoints.
    """

    table: Table
    summary: Mapping[str, Any]
    label: str = ""


# --- The look that all figures share -------------------------------------------------------------

_INK = "#262626"
_PALE = "#767676"
_FAINT = "#e7e7e7"
_SMALL = 9.0  # points: legends, names, notes

# Okabe & Ito's palette, which the colour-blind can tell apart, without its yellow: on white that
# one cannot be seen.
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES: tuple[Any, ...] = (
    "solid",
    (0, (5, 3)),
    (0, (1, 1.5)),
    (0, (6, 1.5, 1, 1.5)),
    (0, (9, 2)),
    (0, (3, 1.2, 1, 1.2, 1, 1.2)),
)

# Letters that DejaVu Sans, which comes with matplotlib, does not have are looked up in these,
# where they are installed.
_FURTHER_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "PingFang SC",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Yu Gothic",
    "Malgun Gothic",
    "Apple SD Gothic Neo",
    "WenQuanYi Micro Hei",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
)

_STYLE: Mapping[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": _PALE,
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.labelpad": 6,
    "axes.labelsize": 10,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.dpi": 200,
    "font.size": 10,
    "grid.color": _FAINT,
    "grid.linewidth": 0.7,
    "legend.fontsize": _SMALL,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    # Type 3 fonts, the default, are turned away by many journals.
    "pdf.fonttype": 42,
    "savefig.dpi": 200,
    "svg.hashsalt": "losscli",
    "text.color": _INK,
    # A checkpoint may be called "$x_1$"; that is a name, not mathematics.
    "text.parse_math": False,
    "xtick.color": _PALE,
    "xtick.labelcolor": _INK,
    "ytick.color": _PALE,
    "ytick.labelcolor": _INK,
}

_WIDTH = 7.2  # inches
_INCH = 72.0  # points


@contextmanager
def _style() -> Iterator[None]:
    """Matplotlib's own defaults and this module's style, whatever the user's matplotlibrc says."""
    with mpl.rc_context():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", mpl.MatplotlibDeprecationWarning)
            # rc_context does not give the backend back.
            mpl.rcParams.update({k: v for k, v in mpl.rcParamsDefault.items() if k != "backend"})
        installed = set(fontManager.get_font_names())
        further = [name for name in _FURTHER_FONTS if name in installed]
        mpl.rcParams.update({**_STYLE, "font.family": ["DejaVu Sans", *further]})
        with warnings.catch_warnings():
            # What no font has is drawn as a box; no reason to stop, or to talk.
            warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from")
            yield


def render(figure: Figure, suffix: str) -> bytes:
    """Writes a figure down.

    Args:
        figure: The figure, from this module.
        suffix: The format, as a file's name ends: ``.png``, ``.svg`` or ``.pdf``.

    Returns:
        What the file is to hold. Equal figures give equal bytes.

    Raises:
        UsageError: The suffix is another one.
    """
    undated: dict[str, dict[str, Any]] = {
        ".png": {},
        ".svg": {"Date": None},
        ".pdf": {"CreationDate": None},
    }
    kind = suffix.lower()
    if kind not in undated:
        raise UsageError(
            f"a figure cannot be written as {suffix!r}"
            if suffix
            else "a figure's name has no ending",
            f"End its name in {', '.join(list(undated)[:-1])} or {list(undated)[-1]}",
        )
    out = io.BytesIO()
    with _style():
        figure.savefig(out, format=kind[1:], metadata=undated[kind])
    return out.getvalue()


# --- Words and numbers ---------------------------------------------------------------------------

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _plain(text: str) -> str:
    """One line without control characters, lone surrogates and marks that reorder the text."""
    letters = (
        " " if letter.isspace() else "" if unicodedata.category(letter)[0] == "C" else letter
        for letter in text
    )
    return " ".join("".join(letters).split())


def _width(figure: Figure, text: str, size: float = _SMALL) -> float:
    """The width of a line of text in points."""
    artist = Text(0, 0, text, fontsize=size)
    artist.set_figure(figure)
    return artist.get_window_extent().width / figure.dpi * _INCH


def _shorten(figure: Figure, text: str, width: float, size: float = _SMALL) -> str:
    """The end of a text, as much as fits: names differ in their ends, not in their folders."""
    if _width(figure, text, size) <= width:
        return text
    fits, too_long = 0, len(text)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if _width(figure, "…" + text[-middle:], size) <= width:
            fits = middle
        else:
            too_long = middle
    return "…" + text[len(text) - fits :]


def _scientific(value: float, digits: int) -> str:
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    power = "10" + str(int(exponent)).translate(_SUPERSCRIPTS)
    mantissa = _trim(mantissa)
    if mantissa in {"1", "−1"}:
        return mantissa[:-1] + power
    return f"{mantissa}×{power}"


def _trim(text: str) -> str:
    """Without the zeros that end a fraction, and with the sign that is as wide as a digit."""
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")


def _number(value: float, digits: int = 3) -> str:
    """A number in a sentence, to so many significant digits."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return _scientific(value, digits)
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    return _trim(f"{value:.{decimals}f}")


class _Numbers(Formatter):
    """Tick labels in full, all of one form: no offset, no common factor in a corner, no mathtext.

    Args:
        log: The axis is logarithmic.
        percent: The numbers are shares of one.
    """

    def __init__(self, *, log: bool = False, percent: bool = False) -> None:
        self._log = log
        self._scale, self._unit = (100, "%") if percent else (1, "")
        self._scientific = False
        self._digits = 0
        self._trims = False

    def set_locs(self, locs: Any) -> None:
        super().set_locs(locs)
        values = [float(x) * self._scale for x in locs]
        sizes = [abs(x) for x in values if x] or [1.0]
        low, high = min(sizes), max(sizes)
        # Powers of ten are read one by one, even steps in a column.
        self._trims = self._log and high > 5 * low
        self._scientific = not 1e-4 < high < 1e6 or (self._log and not 1e-3 <= low <= high < 1e5)
        # A label may be off by a thousandth of the distance to the next one.
        steps = [abs(b - a) for a, b in itertools.pairwise(values) if b != a] or [high]
        slack = 1e-3 * (min(low, *steps) if self._log else min(steps))
        form = "e" if self._scientific else "f"
        fits = (
            digits
            for digits in range(15)
            if all(abs(float(f"{x:.{digits}{form}}") - x) <= slack for x in values)
        )
        self._digits = next(fits, 15)

    def __call__(self, x: float, pos: int | None = None) -> str:
        del pos
        if x == 0:
            return "0" + self._unit
        if self._scientific:
            return _scientific(x * self._scale, self._digits + 1) + self._unit
        text = f"{x * self._scale:.{self._digits}f}"
        return (_trim(text) if self._trims else text.replace("-", "−")) + self._unit


# --- Axes ----------------------------------------------------------------------------------------

_STEPS = [1, 2, 2.5, 5, 10]  # between ticks, up to powers of ten
# Beyond these what matplotlib computes for an axis overflows or vanishes.
_LARGEST, _SMALLEST = 1e200, 1e-200


def _panels(extra: int) -> tuple[Figure, list[Axes]]:
    """A figure of one tall panel with ``extra`` lower ones below it that share its x axis."""
    figure = Figure(figsize=(_WIDTH, 3.7 + 1.35 * extra), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(
        1 + extra, sharex=True, squeeze=False, height_ratios=[3.0] + [1.35] * extra
    )[:, 0]
    return figure, list(panels)


def _extent(values: NDArray[np.float64]) -> tuple[float, float]:
    """The lowest and the highest of some values; around a level line, a tenth of its height."""
    low, high = float(values.min()), float(values.max())
    size = max(abs(low), abs(high))
    # What varies by less than a millionth is level: rounding errors are no landscape.
    if high - low > max(1e-6 * size, _SMALLEST):
        return low, high
    room = 0.05 * size if size > _SMALLEST else 0.5
    return low - room, high + room


def _scale_y(axes: Axes, values: NDArray[np.float64], *, log: bool, fraction: bool = False) -> None:
    """Sets scale, limits and ticks of a y axis that is to show all the values.

    Args:
        axes: Where.
        values: All finite, and positive where ``log``; may be none.
        log: Logarithmic.
        fraction: The values are shares of one, to be written as percentages.
    """
    if not values.size:
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_locator(NullLocator())
        return
    low, high = _extent(values)
    if not log:
        if fraction:
            low, high = (0.0, 1.0) if high - low > 0.5 else (max(low, 0.0), min(high, 1.0))
        room = 0.06 * (high - low)
        axes.set_ylim(low - room, high + room)
        axes.yaxis.set_major_locator(MaxNLocator("auto", steps=_STEPS))
        axes.yaxis.set_major_formatter(_Numbers(percent=fraction))
        return
    axes.set_yscale("log")
    low, high = math.log10(low), math.log10(high)
    room = 0.06 * (high - low)
    axes.set_ylim(10 ** (low - room), 10 ** (high + room))
    # Over a short range ticks at whole powers would be too few: even steps serve it better.
    if high - low > 0.7:
        decades = high - low
        subs = (1.0, 2.0, 5.0) if decades < 1.5 else (1.0, 3.0) if decades < 3.5 else (1.0,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_minor_locator(LogLocator(subs="auto"))
    else:
        axes.yaxis.set_major_locator(MaxNLocator("auto", steps=_STEPS))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(_Numbers(log=True))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _colours(number: int) -> list[str]:
    """One colour a run."""
    if number <= len(_PALETTE):
        return list(_PALETTE[:number])
    # So many runs are told apart by their order, from dark to light.
    return [to_hex(c) for c in mpl.colormaps["viridis"](np.linspace(0.0, 0.8, number))]


def _legend(figure: Figure, groups: Sequence[Sequence[tuple[Artist, str]]]) -> None:
    """Lays the legend below the panels, in as few rows as may be; the figure grows by them.

    Args:
        figure: Where.
        groups: Handles and labels; every group begins a row.
    """
    line, gap = 29.0, 14.0
    available = figure.get_figwidth() * _INCH - 24
    blank = (0.0, Line2D([], [], ls="none"), "")
    entries: list[list[tuple[float, Artist, str]]] = []
    for group in groups:
        labels = [_shorten(figure, label, available - line) for _, label in group]
        handles = [handle for handle, _ in group]
        widths = [_width(figure, label) + line for label in labels]
        entries.append(list(zip(widths, handles, labels, strict=True)))
    best: list[list[tuple[float, Artist, str]]] = []
    for columns in range(1, max(map(len, entries), default=0) + 1):
        rows = []
        for entry in entries:
            cells = entry + [blank] * (-len(entry) % columns)
            rows += [cells[k : k + columns] for k in range(0, len(cells), columns)]
        wide = sum(max(width for width, _, _ in column) for column in zip(*rows, strict=True))
        fits = wide + gap * (columns - 1) <= available
        if not best or (fits and len(rows) < len(best)):
            best = rows
    if not best:
        return
    # Matplotlib fills a legend column by column.
    cells = [cell for column in zip(*best, strict=True) for cell in column]
    figure.legend(
        [handle for _, handle, _ in cells],
        [label for _, _, label in cells],
        loc="outside lower center",
        ncols=len(best[0]),
        frameon=False,
        handlelength=2.5,
        handletextpad=0.7,
        columnspacing=gap / _SMALL,
        borderpad=0,
        borderaxespad=0.3,
    )
    _grow(figure, 0.19 * len(best))


def _grow(figure: Figure, inches: float) -> None:
    figure.set_figheight(figure.get_figheight() + inches)


def _notes(axes: Axes, notes: Sequence[str]) -> None:
    """Writes sentences below the label of the x axis; the figure grows by their lines."""
    lines = [line for note in notes for line in textwrap.wrap(note, 100)]
    if not lines:
        return
    axes.annotate(
        "\n".join(lines),
        xy=(0, 0),
        xycoords=("axes fraction", axes.xaxis.label),
        xytext=(0, -6),
        textcoords="offset points",
        va="top",
        fontsize=_SMALL - 0.5,
        color=_PALE,
        linespacing=1.25,
        annotation_clip=False,
    )
    figure = axes.figure
    assert isinstance(figure, Figure)
    _grow(figure, 0.16 * len(lines) + 0.05)


def _freeze(figure: Figure) -> None:
    """Lays the figure out once and for all, so that every rendering of it is the same."""
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)
    figure.set_layout_engine("none")


# --- Interpolation -------------------------------------------------------------------------------

_KNOWN = frozenset({"alpha", "split", "loss", "loss_stderr", "slope", "curvature", "examples"})
_FEW_POINTS = 15  # so few are shown one by one
_FEW_LINES = 4  # the lowest points of so few are marked
_MANY_LINES = 9  # the ends of so many have smaller dots


@dataclass(frozen=True)
class _Series:
    """One split of one run, in the order of α."""

    run: int
    split: str
    name: str
    colour: str
    dashes: Any
    alpha: NDArray[np.float64]
    values: Mapping[str, NDArray[np.float64]]

    def __getitem__(self, column: str) -> NDArray[np.float64]:
        return self.values.get(column, np.full(len(self.alpha), np.nan))


def draw_interpolation(curves: Sequence[Curve], *, title: str = "", log: bool = False) -> Figure:
    """Draws losses, and metrics where there are any, over the line from A to B.

    One colour a run, one line style a split, a band of one standard error to either side. What
    cannot be drawn is left out of the lines, marked at the edge and counted in a note.

    Args:
        curves: The runs.
        title: Stands above the panels.
        log: Makes the axis of the loss logarithmic.

    Returns:
        The figure, laid out and ready to `render`.
    """
    with _style():
        splits = [str(s) for s in dict.fromkeys(s for c in curves for s in c.table.unique("split"))]
        metrics = list(dict.fromkeys(m for c in curves for m in c.table.columns if m not in _KNOWN))
        figure, panels = _panels(len(metrics))
        runs = _run_names(curves)
        series = _read(curves, runs, splits)
        view = _scale_alpha(panels[-1], series)

        notes = [] if series else ["There are no points"]
        notes += _draw_panel(panels[0], series, "loss", log=log)
        label = _shorten(figure, f"loss{_loss_name(curves)}", 190, 10)
        axis = "mean over examples, log scale" if log else "mean over examples"
        panels[0].set_ylabel(f"{label}\n{axis}")
        lowest = _mark_lowest(panels[0], series, log=log)
        notes += _swamped(series, view, log=log)
        for axes, metric in zip(panels[1:], metrics, strict=True):
            wide = _is_wide(series, metric)
            notes += _draw_panel(axes, series, metric, log=wide)
            label = _shorten(figure, _plain(metric), 88, 10)
            axes.set_ylabel(f"{label}\nlog scale" if wide else label)
        panels[-1].set_xlabel("α:  θ(α) = A + α (B − A)")
        figure.align_ylabels(panels)

        _legend(figure, _entries(curves, runs, splits, series, lowest))
        _notes(panels[-1], notes)
        if title:
            _title(figure, title)
        ends = _mark_ends(panels, view, _end_names(curves))
        _freeze(figure)
        _name_ends(panels[0], ends)
    return figure


def _run_names(curves: Sequence[Curve]) -> list[str]:
    names = []
    for number, curve in enumerate(curves, start=1):
        ends = " → ".join(_names(curve))
        names.append(_plain(curve.label) or ends or f"run {number}")
    return names


def _names(curve: Curve) -> list[str]:
    """The names of the two checkpoints, where they are known."""
    checkpoints = curve.summary.get("checkpoints", ())
    return [_plain(str(checkpoint.get("name", ""))) for checkpoint in checkpoints]


def _end_names(curves: Sequence[Curve]) -> tuple[str, str]:
    """The names of A and B where all runs share them, else none."""
    pairs = {tuple(_names(curve)) for curve in curves}
    names = pairs.pop() if len(pairs) == 1 else ()
    return names if len(names) == 2 else ("", "")


def _loss_name(curves: Sequence[Curve]) -> str:
    names = {_plain(str(curve.summary["loss"])) for curve in curves if "loss" in curve.summary}
    return f" ({names.pop()})" if len(names) == 1 else ""


def _read(curves: Sequence[Curve], runs: Sequence[str], splits: Sequence[str]) -> list[_Series]:
    series = []
    colours = _colours(len(curves))
    for run, curve in enumerate(curves):
        for place, split in enumerate(splits):
            table = curve.table.where("split", split)
            alpha = np.array(table.floats("alpha"))
            order = np.argsort(alpha, kind="stable")
            order = order[np.isfinite(alpha[order])]
            if not order.size:
                continue
            columns = [c for c in table.columns if c not in {"alpha", "split"}]
            series.append(
                _Series(
                    run=run,
                    split=split,
                    name=f"{runs[run]}, {_plain(split)}" if len(curves) > 1 else _plain(split),
                    colour=colours[run],
                    dashes=_DASHES[place % len(_DASHES)],
                    alpha=alpha[order],
                    values={c: np.array(table.floats(c))[order] for c in columns},
                )
            )
    return series


def _scale_alpha(axes: Axes, series: Sequence[_Series]) -> tuple[float, float]:
    """Sets the x axis to the points that there are; returns the first and the last α."""
    alpha = np.concatenate([s.alpha for s in series]) if series else np.array([0.0, 1.0])
    low, high = float(alpha.min()), float(alpha.max())
    room = 0.02 * (high - low) or 0.05 * max(1.0, abs(low))
    axes.set_xlim(low - room, high + room)
    # Close to each other the points have long numbers, which need room.
    close = high - low < 1e-3 * max(abs(low), abs(high))
    axes.xaxis.set_major_locator(MaxNLocator(4 if close else "auto", steps=_STEPS))
    axes.xaxis.set_major_formatter(_Numbers())
    return low, high


def _drawable(values: NDArray[np.float64], *, log: bool) -> NDArray[np.bool_]:
    drawable = np.isfinite(values) & (np.abs(values) < _LARGEST)
    return drawable & (values > _SMALLEST) if log else drawable


def _is_wide(series: Sequence[_Series], column: str) -> bool:
    """Whether a column goes over so many powers of ten that only a logarithmic axis shows it."""
    values = np.concatenate([s[column] for s in series])
    values = values[_drawable(values, log=False)]
    return bool(values.size and values.min() > 0 and values.max() > 1e3 * values.min())


def _draw_panel(axes: Axes, series: Sequence[_Series], column: str, *, log: bool) -> list[str]:
    """Draws a column of all series over α.

    Args:
        axes: Where.
        series: The series; those without the column are passed over.
        column: Its name.
        log: Makes the y axis logarithmic.

    Returns:
        Notes on what is not drawn.
    """
    series = [s for s in series if column in s.values]
    shown = [_drawable(s[column], log=log) for s in series]
    errors = [
        np.where(ok, s[f"{column}_stderr"], np.nan) for s, ok in zip(series, shown, strict=True)
    ]
    reach = [s[column][ok] for s, ok in zip(series, shown, strict=True)]
    reach += [s[column] + e for s, e in zip(series, errors, strict=True)]
    if not log:
        reach += [s[column] - e for s, e in zip(series, errors, strict=True)]
    values = np.concatenate([*reach, np.empty(0)])
    values = values[_drawable(values, log=log)]
    fraction = "accuracy" in column.lower() and bool(np.all((values >= 0) & (values <= 1)))
    _scale_y(axes, values, log=log, fraction=fraction)

    few = len(series) < _MANY_LINES
    for s, ok, error in zip(series, shown, errors, strict=True):
        y = np.where(ok, s[column], np.nan)
        axes.plot(s.alpha, y, color=s.colour, linestyle=s.dashes, zorder=2.5)
        # A band that goes down to zero leaves a logarithmic axis at its lower edge.
        lower = np.maximum(y - error, axes.get_ylim()[0]) if log else y - error
        axes.fill_between(
            s.alpha, lower, y + error, where=np.isfinite(error), color=s.colour, alpha=0.18, lw=0
        )
        # Neither a line nor a band shows a point without neighbours.
        beside = np.pad(ok, 1)
        alone = ok & ~beside[:-2] & ~beside[2:]
        dots = ok if len(ok) <= _FEW_POINTS else alone
        axes.plot(s.alpha[dots], y[dots], "o", color=s.colour, markersize=3, zorder=2.6)
        bars = alone & np.isfinite(error)
        axes.vlines(s.alpha[bars], lower[bars], (y + error)[bars], color=s.colour, alpha=0.4)
        end = ok & ((s.alpha == 0) | (s.alpha == 1))
        axes.plot(
            s.alpha[end],
            y[end],
            "o",
            color=s.colour,
            markersize=5.5 if few else 3.5,
            mec="white" if few else s.colour,
            mew=0.8,
            zorder=5,
        )
    return _mark_gaps(axes, series, column, log=log)


def _mark_gaps(axes: Axes, series: Sequence[_Series], column: str, *, log: bool) -> list[str]:
    """Marks by a cross at the upper edge what is not finite, at the lower what has no logarithm."""
    notes = []
    what = "" if column == "loss" else f"{_plain(column)}: "
    for upper in (True, False):
        counts = []
        reason = "not finite" if upper else "not above 0"
        for s in series:
            finite = _drawable(s[column], log=False)
            missing = ~finite if upper else finite & ~_drawable(s[column], log=log)
            axes.plot(
                s.alpha[missing],
                np.full(missing.sum(), 0.97 if upper else 0.03),
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
                missing &= _drawable(s["loss"], log=False)
            if number := int(missing.sum()):
                counts.append((number, s.name))
        if counts:
            notes.append(f"{what}{_count(counts)} {reason}: not drawn (×)")
    return notes


def _count(counts: Sequence[tuple[int, str]]) -> str:
    """For example: 3 points of train and 1 point of test are."""
    parts = [f"{number} point{'s' * (number > 1)} of {name}" for number, name in counts]
    text = " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)
    return f"{text} {'is' if [n for n, _ in counts] == [1] else 'are'}"


def _mark_lowest(
    axes: Axes, series: Sequence[_Series], *, log: bool
) -> list[tuple[_Series, float, float]]:
    """Marks the lowest point of each curve, unless these are many, one is level or not drawn."""
    lowest = []
    for s in series if len(series) <= _FEW_LINES else ():
        loss = np.where(_drawable(s["loss"], log=False), s["loss"], np.nan)
        finite = loss[np.isfinite(loss)]
        if not finite.size or finite.min() == finite.max():
            continue
        at = int(np.nanargmin(loss))
        if not _drawable(loss, log=log)[at]:
            continue
        axes.plot(
            s.alpha[at], loss[at], "D", mfc="white", mec=s.colour, mew=1.3, markersize=6, zorder=6
        )
        lowest.append((s, float(s.alpha[at]), float(loss[at])))
    return lowest


def _swamped(series: Sequence[_Series], view: tuple[float, float], *, log: bool) -> list[str]:
    """A note with the losses between A and B, where those outside press them flat."""
    if log or not series or view[0] > 0 or view[1] < 1:
        return []
    alpha = np.concatenate([s.alpha for s in series])
    loss = np.concatenate([s["loss"] for s in series])
    alpha, loss = alpha[_drawable(loss, log=False)], loss[_drawable(loss, log=False)]
    between = loss[(alpha >= 0) & (alpha <= 1)]
    if not between.size or np.ptp(between) >= 0.03 * np.ptp(loss):
        return []
    low, high = _number(float(between.min())), _number(float(between.max()))
    return [f"Between A and B the loss lies within {low} … {high}"]


def _entries(
    curves: Sequence[Curve],
    runs: Sequence[str],
    splits: Sequence[str],
    series: Sequence[_Series],
    lowest: Sequence[tuple[_Series, float, float]],
) -> list[list[tuple[Artist, str]]]:
    """What the legend holds: runs by their colour, splits by their dashes, and the other marks."""
    several = len(curves) > 1
    colours = _colours(len(curves))
    colour = colours[0] if len(curves) == 1 else _INK
    prefix = f"{_plain(curves[0].label)}: " if len(curves) == 1 and curves[0].label else ""
    marks: list[tuple[Artist, str]] = []
    for place, split in enumerate(splits):
        line = Line2D([], [], color=colour, linestyle=_DASHES[place % len(_DASHES)])
        marks.append((line, prefix + _plain(split) + _examples(curves, split)))
    if any(np.nanmax(s["loss_stderr"], initial=0.0) > 0 for s in series):
        marks.append((Patch(color=colour, alpha=0.18, lw=0), "± one standard error"))
    if lowest:
        mark = Line2D([], [], ls="none", marker="D", mfc="white", mec=colour, mew=1.3, ms=6)
        marks.append((mark, _lowest_label(lowest, len(curves), len(splits))))
    names = zip(colours, runs, strict=True) if several else ()
    return [[(Line2D([], [], color=colour), run) for colour, run in names], marks]


def _examples(curves: Sequence[Curve], split: str) -> str:
    """The number of examples of a split, where it is one number."""
    numbers = {curve.summary.get("examples", {}).get(split) for curve in curves}
    if len(numbers) != 1 or any("examples" in curve.table.columns for curve in curves):
        return ""
    number = numbers.pop()
    return f" (n = {number})" if number else ""


def _lowest_label(lowest: Sequence[tuple[_Series, float, float]], curves: int, splits: int) -> str:
    if curves > 1 or splits > 2:
        return "lowest point"
    parts = [
        f"{_plain(s.split)} " * (splits > 1) + f"{_number(loss)} at α = {_number(alpha)}"
        for s, alpha, loss in lowest
    ]
    return f"lowest: {', '.join(parts)}"


def _title(figure: Figure, title: str) -> None:
    lines = textwrap.wrap(_plain(title), 66)
    figure.suptitle("\n".join(lines), x=0.02, ha="left", fontsize=13)
    _grow(figure, 0.24 * len(lines))


@dataclass(frozen=True)
class _End:
    """A or B: where its line meets the upper edge, as a share of the width, and what to call it."""

    place: float
    text: Text
    before: str
    name: str
    after: str


def _mark_ends(
    panels: Sequence[Axes], view: tuple[float, float], names: tuple[str, str]
) -> list[_End]:
    """Draws a line at A and at B where they are in view, and leaves room above for their names.

    Args:
        panels: All panels; the names go above the first.
        view: The first and the last α.
        names: What A and B are called; may be empty.

    Returns:
        A and B, to be named once the width of the panel is known.
    """
    axes, figure = panels[0], panels[0].figure
    low, high = axes.get_xlim()
    above = axes.transAxes + ScaledTranslation(0, 5 / _INCH, figure.dpi_scale_trans)
    ends = []
    for alpha, letter, name in zip((0.0, 1.0), "AB", names, strict=True):
        before, after = "← " * (alpha < view[0]), " →" * (alpha > view[1])
        place = min(max((alpha - low) / (high - low), 0.0), 1.0)
        if not before and not after:
            for panel in panels:
                panel.axvline(alpha, color="#9a9a9a", lw=0.9, zorder=1.5)
        text = axes.text(place, 1, letter, fontsize=_SMALL, transform=above)
        before += f"{letter}  " if name else letter
        ends.append(_End(place, text, before, name, after))
    return ends


def _name_ends(axes: Axes, ends: Sequence[_End]) -> None:
    """Names A and B above their lines, side by side: moved and shortened as far as they must be."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    room = axes.get_window_extent().width / figure.dpi * _INCH
    gap = 14.0
    full = [_width(figure, end.before + end.name + end.after) for end in ends]
    for end, other in zip(ends, reversed(full), strict=True):
        fits = max((room - gap) / 2, room - gap - other)
        frame = _width(figure, end.before + end.after)
        end.text.set_text(end.before + _shorten(figure, end.name, fits - frame) + end.after)
    a, b = (_width(figure, end.text.get_text()) for end in ends)
    left = min(max(ends[0].place * room - a / 2, 0), room - a)
    right = min(max(ends[1].place * room - b / 2, 0), room - b)
    if (overlap := left + a + gap - right) > 0:
        left = max(0, left - overlap / 2)
        right = min(left + a + gap, room - b)
        left = min(left, right - gap - a)
    ends[0].text.set_x(left / room)
    ends[1].text.set_x(right / room)
