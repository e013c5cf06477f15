"""Shared parts of all figures: style, text and numbers, axes, colours, legends and notes."""

from __future__ import annotations

import io
import itertools
import math
import re
import unicodedata
import warnings
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import PurePath
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager
from matplotlib.ticker import (
    Formatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    SymmetricalLogLocator,
)
from numpy.typing import NDArray

from losscli.errors import UsageError
from losscli.plotting import style_sheet
from losscli.results.drawing import FULL, Drawing
from losscli.results.result import Run, tell_apart
from losscli.results.summaries import InspectionSummary, Summary
from losscli.wording import format_count, list_first

__all__ = [
    "DASHES",
    "INCH",
    "INK",
    "IN_ORDER",
    "LARGEST",
    "PALE",
    "PALETTE",
    "SMALLEST",
    "STEPS",
    "WIDTH",
    "Label",
    "Numbers",
    "checkpoint_names",
    "columns",
    "count_points",
    "distinct_checkpoints",
    "distinct_names",
    "drawable",
    "end_names",
    "error_label",
    "evenly_spaced",
    "examples_notes",
    "extent",
    "format_number",
    "house_style",
    "is_light",
    "label_loss",
    "linear_ticks",
    "loss_name",
    "make_displayable",
    "name_checkpoint",
    "name_checkpoint_ticks",
    "name_split",
    "narrow",
    "new_figure",
    "note_size",
    "number_checkpoints",
    "plain",
    "png_of",
    "render",
    "run_colours",
    "run_names",
    "scale_checkpoints",
    "scale_distance",
    "scale_logarithmic",
    "scale_symlog",
    "scale_x",
    "scale_y",
    "shorten",
    "shorten_path",
    "small_size",
    "split_names",
    "stacked_panels",
    "text_size",
    "text_width",
    "title_panel",
    "whole_numbers",
]


# --- The style -----------------------------------------------------------------------------------

INK = "#262626"
PALE = "#767676"
_FAINT = "#e7e7e7"

# The palette of Okabe and Ito, which is safe for colour-blind readers, without its yellow, which is
# hard to see on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = (
    "solid",
    (0, (5, 3)),
    (0, (1, 1.5)),
    (0, (6, 1.5, 1, 1.5)),
    (0, (9, 2)),
    (0, (3, 1.2, 1, 1.2, 1, 1.2)),
)

# Fallback fonts, if installed, for characters that DejaVu Sans (part of Matplotlib) lacks.
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
    "axes.edgecolor": PALE,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelpad": 6,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.dpi": 200,
    "grid.color": _FAINT,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    # Many journals reject Type 3 fonts, Matplotlib's default.
    "pdf.fonttype": 42,
    "savefig.dpi": 200,
    "svg.hashsalt": "losscli",
    "text.color": INK,
    # Names such as "$x_1$" are shown literally.
    "text.parse_math": False,
    "xtick.color": PALE,
    "xtick.labelcolor": INK,
    "ytick.color": PALE,
    "ytick.labelcolor": INK,
}

# Of figures with axes and a short legend only, which are printed small.
_COMPACT_STYLE: Mapping[Any, Any] = {
    "axes.labelpad": 3,
    "axes.titlepad": 4,
    "figure.constrained_layout.h_pad": 0.05,
    "figure.constrained_layout.w_pad": 0.04,
    "figure.dpi": 300,
    "savefig.dpi": 300,
}

# Settings that no style sheet may change: the size of the page, and literal names.
_FIXED: dict[Any, Any] = {
    key: _STYLE.get(key, mpl.rcParamsDefault[key])
    for key in ("figure.autolayout", "savefig.bbox", "svg.hashsalt", "text.parse_math")
}

WIDTH = 7.2  # inches
INCH = 72.0  # points
_CSS_PIXELS = 96.0  # per inch
_TWO_COLUMNS = 44.0  # from this width in sizes of text on, panels are side by side
_LOWER = 0.62  # the height of panels of 3.25 inches relative to those of 7.2
_LOWEST = 0.7  # the least height of panels in a figure of fixed height relative to a free one


@contextmanager
def house_style(drawing: Drawing = FULL) -> Iterator[None]:
    """Applies Matplotlib's defaults, the style of losscli and the user's style sheet."""
    with mpl.rc_context():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", mpl.MatplotlibDeprecationWarning)
            # rc_context does not restore the backend.
            mpl.rcParams.update({k: v for k, v in mpl.rcParamsDefault.items() if k != "backend"})
        installed = set(fontManager.get_font_names())
        further = [name for name in _FURTHER_FONTS if name in installed]
        mpl.rcParams.update({**_STYLE, "font.family": ["DejaVu Sans", *further]})
        mpl.rcParams.update(_sizes(drawing))
        if drawing.compact:
            mpl.rcParams.update(_COMPACT_STYLE)
        mpl.rcParams.update(style_sheet.parse(drawing.style) | _FIXED)
        with warnings.catch_warnings():
            # A character that no font has is drawn as a box; a warning would be noise.
            warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from")
            yield


def _sizes(drawing: Drawing) -> dict[Any, Any]:
    """Returns the sizes of text and the widths of lines, which follow the size of ordinary text."""
    points = style_sheet.parse(drawing.style).get("font.size", drawing.points)
    small, note = (1.0, 1.0) if drawing.compact else (0.9, 0.85)
    scale = drawing.points / FULL.points
    return {
        "font.size": points,
        "axes.labelsize": points,
        "axes.titlesize": points,
        "figure.titlesize": 1.3 * points,
        "legend.fontsize": small * points,
        "legend.title_fontsize": note * points,
        **{key: _STYLE[key] * scale for key in _STYLE if key.endswith("linewidth")},
    }


def text_size() -> float:
    """Returns the size of labels and titles in points, inside `house_style`."""
    return float(mpl.rcParams["font.size"])


def small_size() -> float:
    """Returns the size of legends and names in points, inside `house_style`."""
    return _in_points("legend.fontsize")


def note_size() -> float:
    """Returns the size of notes and numbers in panels in points, inside `house_style`."""
    return _in_points("legend.title_fontsize")


def _in_points(key: Any) -> float:
    # A style sheet may say "small".
    return float(FontProperties(size=mpl.rcParams[key]).get_size_in_points())


def new_figure(
    drawing: Drawing, height: float, width: float = WIDTH, *, rows: int = 0, ratio: float = 1.0
) -> Figure:
    """Creates a figure with a canvas, whose panels are laid out when it is finished.

    Args:
        drawing: How it is drawn.
        height: The height of its panels in inches in a full figure.
        width: Its width in inches in a full figure.
        rows: If its panels have a fixed shape, how many are on top of each other; 0 if they have
            none.
        ratio: The height of such a panel relative to its width.

    Returns:
        The figure. One of fixed height has the least height of its panels until `freeze`.
    """
    if drawing.compact:
        fixed, most = drawing.inches
        width = fixed or width
        scale = drawing.points / 8
        height *= _LOWER * scale
        if rows and not most:
            # Beside such a panel there are labels and a bar of colours.
            height = rows * (ratio * (width - 1.2 * scale) + 0.5 * scale)
        height *= _LOWEST if most else 1.0
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def columns(drawing: Drawing, most: int) -> int:
    """Returns the number of panels side by side: ``most`` where the figure is wide, else one."""
    width = drawing.inches[0]
    wide = width is None or width * INCH / drawing.points >= _TWO_COLUMNS
    return most if wide else min(most, 1)


def narrow(figure: Figure, points: float) -> float:
    """Returns a width of text in points, reduced for a figure that is narrower than a full one."""
    return points * min(figure.get_figwidth() / WIDTH, 1.0)


def render(figure: Figure, suffix: str, drawing: Drawing = FULL) -> bytes:
    """Renders a figure to bytes.

    Returns:
        The content of the file. Equal figures give equal bytes.

    Raises:
        UsageError: The suffix is not one of these.
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
    with house_style(drawing):
        figure.savefig(out, format=kind[1:], metadata=undated[kind])
    return out.getvalue()


def png_of(figure: Figure, drawing: Drawing) -> tuple[bytes, dict[str, float]]:
    """Renders a figure for a notebook as a PNG file, with its width and height in CSS pixels."""
    width, height = figure.get_size_inches() * _CSS_PIXELS
    return render(figure, ".png", drawing), {"width": float(width), "height": float(height)}


def make_displayable(figure: Figure, drawing: Drawing) -> None:
    """Lets notebooks show a figure that pyplot does not manage."""
    # The method by which IPython asks any object for a PNG.
    vars(figure)["_repr_png_"] = partial(png_of, figure, drawing)


# --- Text and numbers ----------------------------------------------------------------------------

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def plain(text: str) -> str:
    """Returns text in one line without control characters, lone surrogates and bidi marks."""
    letters = (
        " " if letter.isspace() else "" if unicodedata.category(letter)[0] == "C" else letter
        for letter in text
    )
    return " ".join("".join(letters).split())


class Label(str):
    """A name that the user gave with ``--label``: it is shortened at its end, a path is not."""

    __slots__ = ()


def text_width(figure: Figure, text: str, size: float | None = None) -> float:
    """Returns the width of a line of text in points, by default in the size of legends."""
    font = FontProperties(size=small_size() if size is None else size)
    width, _, _ = _renderer(figure.dpi).get_text_width_height_descent(text, font, ismath=False)
    return float(width) / figure.dpi * INCH


@cache
def _renderer(dpi: float) -> Any:
    """Returns a renderer that measures text; that of a figure is replaced when its size changes."""
    renderer: Any = RendererAgg
    return renderer(1, 1, dpi)


def shorten(figure: Figure, text: str, width: float, size: float | None = None) -> str:
    """Shortens a text.

    Args:
        figure: The figure.
        text: The text.
        width: The width in points.
        size: The size of the text in points; by default that of legends.

    Returns:
        The text, if it fits. A `Label` and several words keep their beginning; the name or path of
        a checkpoint and a pair A → B keep their end, in which checkpoints differ.
    """
    if text_width(figure, text, size) <= width:
        return text
    words = isinstance(text, Label) or (" " in text and "/" not in text and "→" not in text)
    fits, too_long = 0, len(text)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if text_width(figure, _cut(text, middle, words=words), size) <= width:
            fits = middle
        else:
            too_long = middle
    return _cut(text, fits, words=words)


def _cut(text: str, letters: int, *, words: bool) -> str:
    """Keeps so many letters of a text, with an ellipsis for the others."""
    return text[:letters].rstrip() + "…" if words else "…" + text[len(text) - letters :]


def shorten_path(figure: Figure, name: str, width: float) -> str:
    """Shortens a checkpoint's name to a width in points, by its leading folders first."""
    if text_width(figure, name) <= width:
        return name
    parts = [name] if isinstance(name, Label) else name.split("/")
    names = [f"…/{'/'.join(parts[k:])}" for k in range(1, len(parts))]
    first = bisect_left(names, True, key=lambda n: text_width(figure, n) <= width)
    return names[first] if first < len(names) else shorten(figure, name, width)


def _scientific(value: float, digits: int) -> str:
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    power = "10" + str(int(exponent)).translate(_SUPERSCRIPTS)
    mantissa = _trim(mantissa)
    if mantissa in {"1", "−1"}:
        return mantissa[:-1] + power
    return f"{mantissa}×{power}"


def _trim(text: str) -> str:
    """Removes trailing zeros of a fraction and writes a true minus sign."""
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")


def format_number(value: float, digits: int = 3) -> str:
    """Formats a number for a sentence, to ``digits`` significant digits."""
    if not math.isfinite(value):
        return "not finite"
    if value and not 1e-3 <= abs(value) < 1e5:
        return _scientific(value, digits)
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    return _trim(f"{value:.{decimals}f}")


class Numbers(Formatter):
    """Formats tick labels in full and in one form: no offset, common factor or mathtext.

    Args:
        log: Whether the axis is logarithmic.
        percent: Whether the numbers are fractions, to show as percentages.
    """

    def __init__(self, *, log: bool = False, percent: bool = False) -> None:
        self._log = log
        self._scale, self._unit = (100, "%") if percent else (1, "")
        self._scientific = False
        self._digits = 0
        self._trims = False

    def set_locs(self, locs: Any) -> None:
        """Chooses the common form of all tick labels."""
        super().set_locs(locs)
        values = [float(x) * self._scale for x in locs]
        sizes = [abs(x) for x in values if x] or [1.0]
        low, high = min(sizes), max(sizes)
        # Trailing zeros align evenly spaced labels, but only clutter powers of ten.
        self._trims = self._log and high > 5 * low
        self._scientific = not 1e-4 < high < 1e6 or (self._log and not 1e-3 <= low <= high < 1e5)
        # The rounding error of a label is at most a thousandth of the distance to the next one.
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
        """Formats one tick label."""
        del pos
        if x == 0:
            return "0" + self._unit
        if self._scientific:
            return _scientific(x * self._scale, self._digits + 1) + self._unit
        text = f"{x * self._scale:.{self._digits}f}"
        return (_trim(text) if self._trims else text.replace("-", "−")) + self._unit


# --- Axes ----------------------------------------------------------------------------------------

STEPS = [1, 2, 2.5, 5, 10]  # between ticks, up to powers of ten
# Outside these bounds Matplotlib's axis computations overflow or underflow.
LARGEST, SMALLEST = 1e200, 1e-200
_MOST_NUMBERS = 6  # in a list
_MOST_TICKS = 7  # about, on an axis that is linear around zero and logarithmic beyond
_FEW_CHECKPOINTS = 5  # up to this many, an axis of checkpoints is linear
_CROWDED = 0.2  # with half of the checkpoints in this part of a linear axis it is logarithmic


def stacked_panels(
    drawing: Drawing, extra: int, *, above: float = 0.0
) -> tuple[Figure, list[Axes]]:
    """Creates a figure of one tall panel with ``extra`` lower panels below that share its x axis.

    Args:
        drawing: How it is drawn.
        extra: The number of lower panels.
        above: The height in inches of a further panel at the top with its own x axis; 0 for none.

    Returns:
        The figure and its panels, from top to bottom.
    """
    figure = new_figure(drawing, 3.7 + 1.35 * extra + above)
    heights = [*([above] if above else []), 3.0, *[1.35] * extra]
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    top = [figure.add_subplot(grid[0])] if above else []
    panels = [figure.add_subplot(grid[len(top)])]
    for row in range(len(top) + 1, len(heights)):
        panels.append(figure.add_subplot(grid[row], sharex=panels[0]))
    for panel in panels[:-1]:
        panel.tick_params(labelbottom=False)
    return figure, top + panels


def linear_ticks(axis: Axis, number: int | Literal["auto"] = "auto") -> None:
    """Sets round ticks on a linear axis, at most about ``number`` of them."""
    axis.set_major_locator(MaxNLocator(number, steps=STEPS))
    axis.set_major_formatter(Numbers())


def scale_x(axes: Axes, low: float, high: float, number: int | Literal["auto"] = "auto") -> None:
    """Sets a linear x axis, with some room beside its lowest and highest value."""
    room = 0.02 * (high - low) or 0.05 * max(1.0, abs(low))
    axes.set_xlim(low - room, high + room)
    linear_ticks(axes.xaxis, number)


def scale_distance(axes: Axes, high: float, number: int | Literal["auto"] = "auto") -> None:
    """Sets a y axis of distances up to ``high``, which begins at 0."""
    axes.set_ylim(0, 1.06 * high if high > 0 else 1.0)
    linear_ticks(axes.yaxis, number)


def title_panel(figure: Figure, axes: Axes, text: str, width: float = 250.0) -> None:
    """Writes a title above a panel, shortened to a width in points in a full figure."""
    axes.set_title(shorten(figure, text, narrow(figure, width), text_size()), loc="left")


def evenly_spaced(number: int, most: int) -> list[int]:
    """Returns up to ``most`` evenly spaced indices below ``number``, both ends among them."""
    indices = np.linspace(0, number - 1, min(number, most)).round()
    return [int(index) for index in indices]


def extent(values: NDArray[np.float64]) -> tuple[float, float]:
    """Returns the range of values; for constant values, an interval around them."""
    low, high = float(values.min()), float(values.max())
    size = max(abs(low), abs(high))
    # A relative variation below 1e-6 counts as constant, so that rounding errors are not magnified.
    if high - low > max(1e-6 * size, SMALLEST):
        return low, high
    room = 0.05 * size if size > SMALLEST else 0.5
    return low - room, high + room


def scale_y(
    axes: Axes,
    values: NDArray[np.float64],
    *,
    log: bool,
    fraction: bool = False,
    least: float = 0.0,
    limits: tuple[float, float] | None = None,
) -> None:
    """Sets scale, limits and ticks of a y axis so that it shows all values.

    If all values are on the same side of given limits, the panel says so.

    Args:
        axes: The panel.
        values: Finite values, positive if ``log``; may be empty.
        log: Whether the axis is logarithmic.
        fraction: Whether the values are fractions, to show as percentages.
        least: The smallest range of an axis of fractions, at most 1.
        limits: The limits of the axis; None to show all values. On a logarithmic axis, a limit that
            is not positive is ignored.
    """
    if not values.size and limits is None:
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_locator(NullLocator())
        return
    if log and limits is not None and limits[0] <= 0:
        low, high = extent(values) if values.size else (0.1, 1.0)
        limits = (low, limits[1]) if limits[1] > low else None
    # Most quantities are never negative, so an axis of zeros has no negative numbers.
    low, high = limits or (extent(values) if values.any() else (0.0, 1.0))
    margin = 0.06 if limits is None else 0.0
    if values.size and (values.max() < low or values.min() > high):
        side = "lower" if values.max() < low else "higher"
        text = f"no value between {format_number(low)} and {format_number(high)}: all are {side}"
        look: dict[str, Any] = {"color": PALE, "fontsize": small_size()}
        look["bbox"] = {"fc": "white", "ec": "none", "pad": 2}
        axes.text(0.5, 0.5, text, ha="center", transform=axes.transAxes, zorder=4, **look)
    if not log:
        if fraction:
            low, high = max(low, 0.0), min(high, 1.0)
            span = 1.0 if high - low > 0.5 else max(high - low, least)
            low = min(max((low + high - span) / 2, 0.0), 1.0 - span)
            high = low + span
        room = margin * (high - low)
        axes.set_ylim(low - room, high + room)
        axes.yaxis.set_major_locator(MaxNLocator("auto", steps=STEPS))
        axes.yaxis.set_major_formatter(Numbers(percent=fraction))
        return
    axes.set_yscale("log")
    low, high = math.log10(low), math.log10(high)
    room = margin * (high - low)
    axes.set_ylim(10 ** (low - room), 10 ** (high + room))
    scale_logarithmic(axes.yaxis, high - low)


def scale_logarithmic(axis: Axis, decades: float) -> None:
    """Sets the ticks of a logarithmic axis that shows so many powers of ten."""
    # A short range has too few powers of ten for ticks: use evenly spaced ones.
    if decades > 0.7:
        subs = (1.0, 2.0, 5.0) if decades < 1.5 else (1.0, 3.0) if decades < 2.5 else (1.0,)
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_minor_locator(LogLocator(subs="auto"))
    else:
        axis.set_major_locator(MaxNLocator("auto", steps=STEPS))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(Numbers(log=True))
    axis.set_minor_formatter(NullFormatter())


def scale_symlog(
    axes: Axes, which: Literal["x", "y"], low: float, high: float, *, linear: float
) -> None:
    """Sets an axis for low…high that is linear up to ``linear`` around zero, logarithmic beyond."""
    axis = axes.yaxis if which == "y" else axes.xaxis
    set_scale = axes.set_yscale if which == "y" else axes.set_xscale
    set_limits = axes.set_ylim if which == "y" else axes.set_xlim
    set_scale("symlog", linthresh=linear, linscale=0.6)
    forward = axis.get_transform()
    bottom, top = (float(v) for v in forward.transform(np.array([low, high])))
    room = 0.07 * (top - bottom)
    edges = forward.inverted().transform(np.array([bottom - room, top + room]))
    set_limits(*(float(v) for v in edges))
    ticks = SymmetricalLogLocator(base=10, linthresh=linear)
    ticks.set_params(numticks=_MOST_TICKS)
    axis.set_major_locator(ticks)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(Numbers(log=True))


IN_ORDER = "checkpoint, in the order given"
# A counter in the name of a checkpoint: step-500, epoch=3, checkpoint_1000.
_COUNTER = re.compile(r"(?i)(step|iteration|iter|epoch|checkpoint|ckpt)s?[\W_]*$")


def number_checkpoints(names: Sequence[str]) -> tuple[NDArray[np.float64], str]:
    """Returns the numbers of checkpoints: the step or epoch in their names, else their order.

    Args:
        names: The names, in their order. Their numbers are used if the names differ in nothing
            else and the numbers increase.

    Returns:
        The number of each checkpoint, and the label of an axis of them.
    """
    parts = [re.split(r"([0-9]+)", name) for name in names]
    if len(names) > 1 and len({tuple(part[::2]) for part in parts}) == 1:
        words = parts[0]
        # The last one first: epoch=3-step=1200.
        for at in range(len(words) - 2, 0, -2):
            counter = _COUNTER.search(words[at - 1])
            decimal = words[at + 1] == "." and at + 2 < len(words)
            numbers = np.array([float(part[at]) for part in parts])
            if counter and not decimal and np.all(np.diff(numbers) > 0) and numbers[-1] < LARGEST:
                return numbers, counter[1].lower()
    return np.arange(len(names), dtype=np.float64), IN_ORDER


def whole_numbers() -> MaxNLocator:
    """Returns a locator of ticks at whole numbers."""
    return MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)


def scale_checkpoints(axes: Axes, numbers: NDArray[np.float64], label: str) -> None:
    """Scales and labels the x axis of `number_checkpoints`.

    The axis is logarithmic if most numbers are small, as those of checkpoints saved at growing
    intervals.
    """
    low, high = (float(numbers[0]), float(numbers[-1])) if numbers.size else (0.0, 1.0)
    if numbers.size > _FEW_CHECKPOINTS and np.median(numbers) - low < _CROWDED * (high - low):
        scale_symlog(axes, "x", low, high, linear=float(numbers[numbers > 0][0]))
        axes.set_xlabel(f"{label}, log scale")
        return
    room = 0.03 * (high - low) or 0.5
    axes.set_xlim(low - room, high + room)
    axes.xaxis.set_major_locator(whole_numbers())
    axes.xaxis.set_major_formatter(Numbers())
    axes.set_xlabel(label)


def name_checkpoint_ticks(
    panels: Sequence[Axes], numbers: NDArray[np.float64], names: Sequence[str], width: float
) -> None:
    """Labels the ticks of `scale_checkpoints` by the names of a few checkpoints.

    Args:
        panels: The panels, side by side.
        numbers: The position of each checkpoint.
        names: What each is called.
        width: The width of a panel, in points.
    """
    figure = panels[0].figure
    assert isinstance(figure, Figure)
    room = min(0.8 * width / len(names), narrow(figure, 120))
    shown = [shorten(figure, name, room, text_size()) for name in names]
    for panel in panels:
        panel.set_xticks(numbers, shown)
        panel.set_xlabel("checkpoint")


def is_light(colours: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Returns whether black contrasts more than white with each colour, by WCAG 2.

    The contrast of the better one is at least 4.5.

    Args:
        colours: The colours in sRGB, [..., 3].
    """
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    luminance = linear @ np.array([0.2126, 0.7152, 0.0722])
    # Equal contrasts: 1.05 / (luminance + 0.05) = (luminance + 0.05) / 0.05.
    return np.asarray(luminance + 0.05 > math.sqrt(1.05 * 0.05))


def run_colours(number: int, drawing: Drawing = FULL) -> list[str]:
    """Returns one colour per run, from the style sheet if it has colours."""
    cycle = style_sheet.parse(drawing.style).get("axes.prop_cycle")
    own = [to_hex(entry["color"]) for entry in cycle if "color" in entry] if cycle else []
    palette = own or PALETTE
    if number <= len(palette):
        return list(palette[:number])
    # The palette is too short: a sequence from dark to light shows the order.
    return [to_hex(c) for c in mpl.colormaps["viridis"](np.linspace(0.0, 0.8, number))]


def split_names(runs: Sequence[Run[Any]]) -> list[str]:
    """Returns the splits of runs in the order of their tables."""
    return [str(split) for split in dict.fromkeys(s for r in runs for s in r.table.unique("split"))]


def run_names(runs: Sequence[Run[Summary]], drawing: Drawing = FULL) -> list[str]:
    """Returns the name of each run: its label, or its first and last checkpoint.

    Runs of the same checkpoints are distinguished by their files, or else by their numbers.
    """
    checkpoints = [checkpoint_names(run, drawing) for run in runs]
    ends = [" → ".join([*names[:1], *names[1:][-1:]]) for names in checkpoints]
    return [
        Label(plain(run.label)) or plain(name) or f"run {number}"
        for number, (run, name) in enumerate(zip(runs, tell_apart(runs, ends), strict=True), 1)
    ]


def checkpoint_names(
    run: Run[Summary] | Run[InspectionSummary], drawing: Drawing = FULL
) -> list[str]:
    """Returns the labels of the checkpoints, or else their names, as far as known.

    Empty in a compact figure without labels.
    """
    if drawing.compact and not run.checkpoint_labels:
        return []
    if run.checkpoint_labels:
        return [Label(plain(label)) for label in run.checkpoint_labels]
    return [plain(entry.get("name", "")) for entry in run.summary.get("checkpoints", ())]


def name_checkpoint(run: Run[Summary], name: str, drawing: Drawing) -> str:
    """Returns the label of a checkpoint, or else its name; in a compact figure that of its file."""
    if label := run.label_of(name):
        return Label(plain(label))
    return plain(_stem(name) if drawing.compact else name)


def _stem(name: str) -> str:
    """Returns the name of a file without its folders and its suffix, with its key."""
    path, mark, key = name.partition("#")
    return f"{PurePath(path).stem}{mark}{key}"


def distinct_names(names: Sequence[str]) -> tuple[list[str], str]:
    """Returns the distinct part of each name, and the pattern of all names with ``*`` for it.

    The pattern is empty, and the names are whole, if their distinct parts are not different.
    """
    whole = [plain(name) for name in names]
    parts = [name.split("/") for name in whole]
    most = min(map(len, parts), default=1) - 1
    before = _common(parts, most)
    after = _common([part[::-1] for part in parts], most - before)
    distinct = ["/".join(part[before : len(part) - after]) for part in parts]
    suffix = "." + distinct[0].rpartition(".")[2] if distinct and "." in distinct[0] else ""
    if not all(name.endswith(suffix) and len(name) > len(suffix) for name in distinct):
        suffix = ""
    distinct = [name.removesuffix(suffix) for name in distinct]
    if len(whole) < 2 or len(set(distinct)) < len(distinct):
        return whole, ""
    pattern = [*parts[0][:before], f"*{suffix}", *parts[0][len(parts[0]) - after :]]
    return distinct, "/".join(pattern) if len(pattern) > 1 or suffix else ""


def distinct_checkpoints(
    run: Run[Any], names: Sequence[str], drawing: Drawing
) -> tuple[list[str], str]:
    """Returns labels, or else distinct parts of names and their pattern (see `distinct_names`)."""
    if run.checkpoint_labels:
        return [name_checkpoint(run, name, FULL) for name in names], ""
    stems = [plain(_stem(name)) for name in names]
    if drawing.compact and len(set(stems)) == len(stems):
        return stems, ""
    return distinct_names(names)


def _common(parts: Sequence[Sequence[str]], most: int) -> int:
    """Returns the number of leading parts that all names share, at most ``most``."""
    length = 0
    while length < most and len({part[length] for part in parts}) == 1:
        length += 1
    return length


def end_names(runs: Sequence[Run[Summary]], drawing: Drawing = FULL) -> tuple[str, str]:
    """Returns the names of A and B if all runs share them, else empty names."""
    pairs = {tuple(checkpoint_names(run, drawing)) for run in runs}
    names = pairs.pop() if len(pairs) == 1 else ()
    return names if len(names) == 2 else ("", "")


def loss_name(runs: Sequence[Run[Summary]]) -> str:
    """Returns the name of the loss in parentheses if all runs share it, else an empty string."""
    names = {plain(run.summary["loss"]) for run in runs if "loss" in run.summary}
    return f" ({names.pop()})" if len(names) == 1 else ""


def label_loss(
    figure: Figure,
    runs: Sequence[Run[Summary]],
    drawing: Drawing,
    *,
    log: bool,
    width: float = 190.0,
) -> str:
    """Returns the label of an axis of the loss, with its scale in a full figure."""
    name = f"loss{loss_name(runs)}"
    if drawing.compact:
        return "loss"
    label = shorten(figure, name, narrow(figure, width), text_size())
    return f"{label}\nlog scale" if log else label


def drawable(values: NDArray[np.float64], *, log: bool) -> NDArray[np.bool_]:
    """Returns a mask of the values that an axis can show."""
    shown = np.isfinite(values) & (np.abs(values) < LARGEST)
    return shown & (values > SMALLEST) if log else shown


def count_points(counts: Sequence[tuple[int, str]]) -> str:
    """Returns the beginning of a note, such as ``3 points of train and 1 point of test``."""
    if len(counts) > 4:
        return f"{sum(number for number, _ in counts):,} points of {len(counts)} curves"
    parts = [f"{format_count(number, 'point')} of {name}" for number, name in counts]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)


def name_split(runs: Sequence[Run[Summary]], split: str, drawing: Drawing) -> str:
    """Returns the name of a split, with its number of examples in a full figure."""
    return plain(split) + ("" if drawing.compact else _examples(runs, split))


def _examples(runs: Sequence[Run[Summary]], split: str) -> str:
    """Returns ``(n = …)``: the examples of a split, or its batches; empty if runs differ."""
    numbers = {_number_of_examples(run, split) for run in runs}
    number = numbers.pop() if len(numbers) == 1 else ""
    return f" (n = {number})" if number else ""


def _number_of_examples(run: Run[Summary], split: str) -> str:
    """Returns the number of examples of a split, or of its batches; empty if unknown or varying."""
    if "examples" in run.table.columns:
        return ""
    if "batches" in run.summary:
        number, unit = run.summary["batches"].get(split), " batches"
    else:
        number, unit = run.summary.get("examples", {}).get(split), ""
    return f"{number}{unit}" if number else ""


def error_label(drawing: Drawing) -> str:
    """Returns the label of the error bands of curves."""
    return drawing.words("± one standard error of each point", "± s.e.")


def examples_notes(runs: Sequence[Run[Summary]], splits: Sequence[str]) -> list[str]:
    """Returns a note for each split with numbers of examples that differ between runs."""
    notes = []
    for split in splits:
        numbers = [number for run in runs if (number := _number_of_examples(run, split))]
        if len(set(numbers)) > 1:
            shown = numbers if len(numbers) <= _MOST_NUMBERS else list(dict.fromkeys(numbers))
            listed = list_first(shown, _MOST_NUMBERS)
            notes.append(f"Numbers of examples of {plain(split)} differ: {listed}.")
    return notes
