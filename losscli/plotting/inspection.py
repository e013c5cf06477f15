"""The figure of ``losscli inspect``: the size of each tensor, or its distance between two."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from losscli.errors import UsageError
from losscli.plotting.html import Item, View, escape, layout_2d
from losscli.plotting.layerwise import block_colours
from losscli.plotting.layout import finish_layout
from losscli.plotting.style import (
    INCH,
    INK,
    LARGEST,
    PALE,
    SMALLEST,
    STEPS,
    Numbers,
    checkpoint_names,
    format_number,
    house_style,
    new_figure,
    plain,
    shorten,
    small_size,
    text_width,
)
from losscli.results.drawing import FULL, Drawing
from losscli.results.result import Run
from losscli.results.summaries import InspectionSummary
from losscli.wording import format_count

__all__ = ["draw_inspection", "inspection_views"]

_MOST_BARS = 60
_NAME = 190.0  # points, maximum width of a name
_LOG_RATIO = 100.0  # above this ratio of highest to lowest value the axis is logarithmic


@dataclass(frozen=True)
class _Bar:
    """A tensor, or several with a common prefix in their names.

    Attributes:
        name: The name or the prefix.
        tensors: The number of tensors.
        values: The number of values.
        square: ‖θ‖² of the first checkpoint.
        moved: ‖B − A‖²; 0 for one checkpoint.
    """

    name: str
    tensors: int
    values: int
    square: float
    moved: float

    @property
    def mean(self) -> float:
        """The root mean square of the values; nan without values."""
        return math.sqrt(self.square / self.values) if self.values else math.nan

    @property
    def change(self) -> float:
        """The relative distance ‖B − A‖ / ‖A‖; inf if only A is zero."""
        if not self.square:
            return math.inf if self.moved else 0.0
        return math.sqrt(self.moved / self.square)

    @property
    def from_nothing(self) -> bool:
        """Whether A is zero but B is not, so that the relative distance is undefined."""
        return not self.square and 0 < self.moved < math.inf


def draw_inspection(run: Run[InspectionSummary], drawing: Drawing = FULL) -> Figure:
    """Draws a bar for each tensor: its root mean square, or ‖B − A‖ / ‖A‖ between two checkpoints.

    Tensors are in the order of the checkpoint; tensors of the same module have the same colour.
    More than 60 are grouped by the longest prefixes of their names that give at most 60 groups.

    Returns:
        The figure, laid out and ready to `render`.

    Raises:
        UsageError: The checkpoint has several state dicts.
    """
    _refuse_several(run)
    two = "distance" in run.table.columns
    tensors = _read(run, two=two)
    bars = _group(tensors)
    size: Callable[[_Bar], float] = (lambda bar: bar.change) if two else lambda bar: bar.mean
    values = np.array([size(bar) for bar in bars], dtype=np.float64)
    buffers = {plain(name) for name in run.summary.get("buffers", ())}
    whole = _join("", [tensor for tensor in tensors if tensor.name not in buffers])
    with house_style(drawing):
        row = 0.19 if len(bars) <= 30 else 0.16
        figure = new_figure(drawing, 1.0 + row * max(len(bars), 3))
        axes = figure.add_subplot()
        notes = _draw(axes, bars, values, whole=size(whole), small=row < 0.19)
        quantity = "‖B − A‖ / ‖A‖" if two else "root mean square of the values"
        each = "of each tensor" if len(bars) == len(tensors) else "of each part"
        scale = ", log scale" if axes.get_xscale() == "log" else ""
        axes.set_xlabel(drawing.words(f"{quantity} {each}{scale}", quantity))
        if not bars:
            notes.append("There are no floating-point tensors")
        if len(bars) < len(tensors):
            notes.append(f"{len(tensors)} tensors, grouped by the common prefixes of their names")
        notes += _left_out(run, len(tensors))
        together: list[tuple[Artist, str]] = []
        if bars and math.isfinite(size(whole)):
            line = Line2D([], [], color=INK, lw=1.2, ls=(0, (4, 2)))
            kind = "parameters" if buffers else "tensors"
            label = f"all {kind} together: {format_number(size(whole))}"
            together.append((line, label))
        names = _write_names(axes, checkpoint_names(run, drawing))
        finish_layout(figure, drawing, notes, [together])
        # Aligned with the left edge of the figure.
        panel = axes.get_position()
        names.set_x((0.02 - panel.x0) / panel.width)
    return figure


def _refuse_several(run: Run[InspectionSummary]) -> None:
    if "key" in run.table.columns:
        raise UsageError(
            "a checkpoint of several state dicts is not drawn", "Choose one with FILE#KEY"
        )


def _read(run: Run[InspectionSummary], *, two: bool) -> list[_Bar]:
    return [
        _Bar(
            plain(str(record["tensor"])),
            1,
            int(record["values"] or 0),
            _square(record["norm"]),
            _square(record["distance"]) if two else 0.0,
        )
        for record in run.table.records()
        if "float" in str(record["dtype"]) or "complex" in str(record["dtype"])
    ]


def _square(cell: object) -> float:
    value = float(cell) if isinstance(cell, int | float) else math.nan
    return value * value


def _join(name: str, parts: Sequence[_Bar]) -> _Bar:
    return _Bar(
        name,
        sum(part.tensors for part in parts),
        sum(part.values for part in parts),
        math.fsum(part.square for part in parts),
        math.fsum(part.moved for part in parts),
    )


def _group(tensors: Sequence[_Bar]) -> list[_Bar]:
    """Groups tensors by the longest prefixes of their names that give few enough bars."""
    if len(tensors) <= _MOST_BARS:
        return list(tensors)
    bars: list[_Bar] = []
    for depth in range(1, max(bar.name.count(".") for bar in tensors) + 2):
        groups: dict[str, list[_Bar]] = {}
        for bar in tensors:
            groups.setdefault(".".join(bar.name.split(".")[:depth]), []).append(bar)
        if bars and len(groups) > _MOST_BARS:
            break
        bars = [_join(name, parts) for name, parts in groups.items()]
    return bars


def _module(name: str) -> str:
    """Returns the module of a tensor: its name up to the first number, or without its last part."""
    words = name.split(".")
    for index, word in enumerate(words):
        if word.isdecimal():
            return ".".join(words[: index + 1])
    return ".".join(words[:-1]) or name


def _draw(
    axes: Axes, bars: Sequence[_Bar], values: np.ndarray, *, whole: float, small: bool
) -> list[str]:
    """Draws the bars from top to bottom; returns notes on bars without a length."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    font_size = 6.5 if small else 7.5
    parts = list(dict.fromkeys(_module(bar.name) for bar in bars))
    colours = dict(zip(parts, block_colours(len(parts)), strict=True))
    rows = range(len(bars))
    shown = np.isfinite(values) & (values > SMALLEST) & (values < LARGEST)
    low, high, log = _scale(axes, values[shown])
    for row, bar, value, ok in zip(rows, bars, values, shown, strict=True):
        # Beside the panel, where no line crosses the number.
        axes.text(
            1.012,
            row,
            format_number(float(value)) if ok else _placeholder(bar, value),
            transform=axes.get_yaxis_transform(),
            va="center_baseline",
            fontsize=font_size,
            color=INK if ok else PALE,
        )
        colour = colours[_module(bar.name)]
        if ok and log:
            # A dot, since the length of a bar on a logarithmic axis has no meaning.
            axes.plot([low, value], [row, row], color=colour, lw=0.8, alpha=0.5, zorder=2)
            axes.plot([value], [row], "o", color=colour, ms=4.5, zorder=3)
        elif ok:
            axes.barh(row, value, height=0.72, color=colour, zorder=2)
    if bars and low <= whole <= high:
        axes.axvline(whole, color=INK, lw=1.2, ls=(0, (4, 2)), zorder=2.5)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_yticks(
        rows, [shorten(figure, bar.name, _NAME, font_size) for bar in bars], fontsize=font_size
    )
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.grid(visible=False, axis="y")
    if any(bar.from_nothing for bar in bars):
        return ["from 0: all zero at A, so the relative distance is undefined"]
    return []


def _placeholder(bar: _Bar, value: float) -> str:
    """Returns the text for a bar that is not drawn."""
    if not bar.values:
        return "empty"
    if bar.from_nothing:
        return "from 0"
    if not math.isfinite(value):
        return "not finite"
    return format_number(value) if value > LARGEST else "0"


def _scale(axes: Axes, values: np.ndarray) -> tuple[float, float, bool]:
    """Scales the x axis to positive values; returns its limits and whether it is logarithmic."""
    high = float(values.max()) if values.size else 1.0
    low = float(values.min()) if values.size else 1.0
    log = high > _LOG_RATIO * low
    if log:
        axes.set_xscale("log")
        decades = math.log10(high / low)
        low, high = low / 10 ** (0.04 * decades), high * 10 ** (0.04 * decades)
        axes.xaxis.set_major_locator(LogLocator(numticks=8))
        axes.xaxis.set_minor_locator(LogLocator(subs="auto", numticks=8))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        low, high = 0.0, 1.03 * high
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=STEPS))
    axes.set_xlim(low, high)
    axes.xaxis.set_major_formatter(Numbers(log=log))
    return low, high, log


def _left_out(run: Run[InspectionSummary], drawn: int) -> list[str]:
    notes = []
    if others := len(run.table.rows) - drawn:
        notes.append(f"Not drawn: {format_count(others, 'integer tensor')}")
    if wrong := len(run.summary.get("mismatches", ())):
        s, do = ("s", "do") if wrong > 1 else ("", "does")
        notes.append(f"Not drawn: {wrong} tensor{s} that {do} not match")
    return notes


def _write_names(axes: Axes, names: Sequence[str]) -> Text:
    """Writes the names of the checkpoints above the panel."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    letters = "AB" if len(names) == 2 else ("",)
    room = figure.get_figwidth() * INCH * 0.92 / max(len(names), 1)
    texts = []
    for letter, name in zip(letters, names, strict=False):
        before = f"{letter}  " if letter else ""
        width = room - text_width(figure, before) - 18
        texts.append(before + shorten(figure, name, width))
    return axes.set_title("      ".join(texts), loc="left", fontsize=small_size(), pad=8)


def inspection_views(run: Run[InspectionSummary], drawing: Drawing = FULL) -> list[View]:
    """Returns the views of an interactive page: the numbers of each tensor.

    Raises:
        UsageError: The checkpoint has several state dicts.
    """
    _refuse_several(run)
    names = [str(name) for name in run.table["tensor"]]
    modules = list(dict.fromkeys(map(_module, names)))
    colours = dict(zip(modules, block_colours(len(modules)), strict=True))
    labels = {
        "distance": "distance ‖B − A‖",
        "cosine": "cosine of A and B",
        "norm": "norm of A" if "norm_b" in run.table.columns else "norm",
        "norm_b": "norm of B",
        "values": "number of values",
    }
    quantities = {column: label for column, label in labels.items() if column in run.table.columns}
    about = {"shape": list(run.table["shape"]), "dtype": list(run.table["dtype"])}
    items = []
    for column, label in quantities.items():
        trace = {
            "type": "bar",
            "x": [escape(name) for name in names],
            "y": run.table.floats(column),
            "marker": {"color": [colours[_module(name)] for name in names]},
            "showlegend": False,
        }
        hover = [("tensor", "x", ""), (label, "y", ""), *((name, name, "") for name in about)]
        further = {name: [escape(str(cell)) for cell in cells] for name, cells in about.items()}
        items.append(Item(trace, {"quantity": column}, hover, further, counted=False))
    layout = layout_2d("")
    layout["xaxis"] |= {"type": "category"}
    positive = [column for column in quantities if column != "cosine"]
    checkpoints = " and ".join(checkpoint_names(run, drawing))
    view = View("tensors", items, layout, quantities, logarithmic=positive, notes=[checkpoints])
    return [view]
