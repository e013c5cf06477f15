"""The figure of ``losscli barriers``: a matrix of all pairs of checkpoints for each split."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path
from matplotlib.ticker import LogLocator, MaxNLocator
from matplotlib.transforms import Affine2D
from numpy.typing import NDArray

from losscli.plotting.html import Item, View, escape, layout_2d
from losscli.plotting.layout import finish_layout
from losscli.plotting.lines import repair_notes
from losscli.plotting.pairs import draw_pairs, pairs_views
from losscli.plotting.style import (
    INCH,
    INK,
    LARGEST,
    PALE,
    SMALLEST,
    STEPS,
    WIDTH,
    Numbers,
    columns,
    distinct_checkpoints,
    format_number,
    house_style,
    is_light,
    loss_name,
    name_split,
    narrow,
    new_figure,
    note_size,
    shorten,
    small_size,
    text_size,
    text_width,
    title_panel,
)
from losscli.plotting.surface import LOSS_COLOURS, WIDE, colour_stops
from losscli.registry import pair_position
from losscli.results.drawing import FULL, Drawing
from losscli.results.result import Run
from losscli.results.summaries import BarriersSummary
from losscli.table import Table

__all__ = ["barriers_views", "draw_barriers"]

Floats = NDArray[np.float64]

_NONE = "#270b36"  # darker than the lowest barrier
_UNKNOWN = "#d4d4d4"
_DIAGONAL = "#ebebeb"
_EDGE = "#dedede"

# The columns of the table that are drawn, and their names.
_QUANTITIES = {"barrier": "barrier", "disagreement": "disagreement", "cka": "CKA of the outputs"}

_NUMBERS = 12  # maximum number of checkpoints for numbers in the cells
_SIDE_BY_SIDE = 6  # up to this many checkpoints, or without numbers, panels are side by side
_NAME = 112.0  # points, maximum width of a name


@dataclass(frozen=True)
class _Square:
    """The symmetric matrix ``[N, N]`` of the barriers of one split; nan if unknown."""

    split: str
    heights: Floats


def draw_barriers(run: Run[BarriersSummary], drawing: Drawing = FULL) -> Figure:
    """Draws the barriers between all pairs of checkpoints as a symmetric matrix for each split.

    All splits have the same scale. Low barriers are dark, as low losses
    on a surface, and a barrier of 0 is the darkest on any scale. A barrier that is unknown,
    since a loss on its line is not finite, is hatched.

    Returns:
        The figure, laid out and ready to `render`.
    """
    if pair_position(run.table.columns):
        return draw_pairs(run, drawing)
    names = [str(name) for name in run.table.unique("a", "b")]
    quantities = [name for name in _QUANTITIES if name in run.table.columns]
    matrices = [_read(run.table, names, quantity) for quantity in quantities]
    squares, *further = matrices
    number = len(names)
    with house_style(drawing):
        two = len(squares) > 1 and not _SIDE_BY_SIDE < number <= _NUMBERS
        across = columns(drawing, 2 if two else 1)
        rows = math.ceil(len(squares) / across) or 1
        side = 3.5 if two else min(5.2, 2.4 + 0.45 * number)
        total = rows * len(quantities)
        figure = new_figure(drawing, total * (side + 0.3) + 0.9, WIDE if two else WIDTH, rows=total)
        if drawing.compact:
            height = drawing.inches[1] or figure.get_figheight()
            side = min(height / total - 0.3, (figure.get_figwidth() - 1.0) / across)
        cells = figure.add_gridspec(total, across)
        distinct, shared = distinct_checkpoints(run, names, drawing)
        labels = [shorten(figure, name, narrow(figure, _NAME)) for name in distinct]
        room = side * INCH / max(number, 1)
        for k, (quantity, own) in enumerate(zip(quantities, matrices, strict=True)):
            norm = _norm(own, drawing) if k == 0 else Normalize(0.0, _top(quantity, own))
            panels: list[Axes] = []
            for index, square in enumerate(own):
                row, column = divmod(index, across)
                panel = figure.add_subplot(cells[k * rows + row, column])
                _draw(panel, square.heights, norm, room)
                below = index + across >= len(own) and k == len(matrices) - 1
                _label_axes(panel, labels, room, below=below, left=not column)
                title_panel(figure, panel, name_split([run], square.split, drawing))
                panels.append(panel)
            if not panels:
                panels = [figure.add_subplot(cells[k * rows, 0])]
            label = _QUANTITIES[quantity]
            if k == 0:
                label = drawing.words(f"barrier{loss_name([run])}", "barrier")
            _add_colour_bar(figure, panels, norm, label, drawing, log=drawing.log and k == 0)
        notes = [*_notes(run, squares, shared), *repair_notes([run]), *_output_notes(quantities)]
        finish_layout(figure, drawing, notes, [_legend(squares, further, drawing)])
        for panel in figure.axes:
            _shrink_numbers(figure, panel, number)
    return figure


def _shrink_numbers(figure: Figure, panel: Axes, number: int) -> None:
    """Shrinks the numbers of a matrix to its cells, if the layout left less room than planned."""
    box = panel.get_position(original=True)
    side = min(box.width * figure.get_figwidth(), box.height * figure.get_figheight()) * INCH
    room = side / max(number, 1)
    size = max((float(text.get_fontsize()) for text in panel.texts), default=0.0)
    texts = [text.get_text() for text in panel.texts]
    widest = max((text_width(figure, text, size) for text in texts), default=0.0)
    if widest > 0.95 * room:
        for text in panel.texts:
            text.set_fontsize(size * 0.9 * room / widest)


def _top(quantity: str, squares: Sequence[_Square]) -> float:
    """Returns the upper end of the scale of disagreement or CKA."""
    shown = _shown(squares)
    return 1.0 if quantity == "cka" or not shown.size else float(shown.max())


def _output_notes(quantities: Sequence[str]) -> list[str]:
    """Describes disagreement and CKA."""
    notes = {
        "disagreement": "Disagreement: the share of examples with different predicted classes.",
        "cka": "CKA: linear centred kernel alignment of the outputs, 1 if they are the same up to "
        "rotation and scale.",
    }
    return [notes[name] for name in quantities if name in notes]


def _pairs(table: Table) -> list[tuple[object, object]]:
    return list(zip(table["a"], table["b"], strict=True))


def _read(table: Table, names: Sequence[str], values: str = "barrier") -> list[_Square]:
    index = {name: k for k, name in enumerate(names)}
    squares = []
    for split in table.unique("split"):
        rows = table.where("split", split)
        heights = np.full((len(names), len(names)), np.nan)
        np.fill_diagonal(heights, 0.0)
        for (a, b), height in zip(_pairs(rows), rows.floats(values), strict=True):
            i, j = index[str(a)], index[str(b)]
            heights[i, j] = heights[j, i] = height
        squares.append(_Square(str(split), heights))
    return squares


def _shown(squares: Sequence[_Square]) -> Floats:
    """Returns all barriers with a colour."""
    coloured = [square.heights[_coloured(square.heights)] for square in squares]
    return np.concatenate([*coloured, np.empty(0)])


def _coloured(heights: Floats) -> NDArray[np.bool_]:
    return np.isfinite(heights) & (heights > SMALLEST) & (heights < LARGEST)


def _unknown(heights: Floats) -> NDArray[np.bool_]:
    return ~(np.isfinite(heights) & (heights < LARGEST))


def _norm(squares: Sequence[_Square], drawing: Drawing) -> Normalize:
    log = drawing.log
    if drawing.ylim is not None:
        return (LogNorm if log else Normalize)(*drawing.ylim)
    shown = _shown(squares)
    high = float(shown.max()) if shown.size else 1.0
    if not log:
        return Normalize(0.0, high)
    low = float(shown.min()) if shown.size else 0.1
    return LogNorm(low if low < 0.9 * high else high / 10, high)


def _draw(axes: Axes, heights: Floats, norm: Normalize, room: float) -> None:
    """Draws the cells, each ``room`` points wide."""
    number = len(heights)
    colours = np.ones((number, number, 4))
    colours[..., :] = mpl.colors.to_rgba(_NONE)
    coloured, unknown = _coloured(heights), _unknown(heights)
    colours[coloured] = LOSS_COLOURS(np.asarray(norm(heights[coloured])))
    colours[unknown] = mpl.colors.to_rgba(_UNKNOWN)
    colours[np.arange(number), np.arange(number)] = mpl.colors.to_rgba(_DIAGONAL)
    axes.imshow(colours, interpolation="nearest", aspect="equal")
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_linewidth(0.6)
    if room > 4:
        edges = np.arange(1, number) - 0.5
        axes.hlines(edges, -0.5, number - 0.5, colors=_EDGE, linewidths=0.6)
        axes.vlines(edges, -0.5, number - 0.5, colors=_EDGE, linewidths=0.6)
    _hatch(axes, unknown)
    if number <= _NUMBERS:
        _write(axes, heights, colours, room)


def _write(axes: Axes, heights: Floats, colours: Floats, room: float) -> None:
    """Writes the barriers into their cells, in one font size."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    cells = np.argwhere(~_unknown(heights) & ~np.eye(len(heights), dtype=bool))
    digits = 3 if room > 40 else 2
    texts = [format_number(float(heights[i, j]), digits) for i, j in cells]
    widest = max((text_width(figure, text, note_size()) for text in texts), default=0.0)
    size = min(note_size(), note_size() * 0.9 * room / widest) if widest else note_size()
    light = is_light(colours[..., :3])
    for (i, j), text in zip(cells, texts, strict=True):
        colour = "black" if light[i, j] else "white"
        axes.text(j, i, text, ha="center", va="center_baseline", fontsize=size, color=colour)


def _hatch(axes: Axes, cells: NDArray[np.bool_]) -> None:
    """Hatches cells, by one patch."""
    square = Path.unit_rectangle()
    squares = [
        square.transformed(Affine2D().translate(column - 0.5, row - 0.5))
        for row, column in np.argwhere(cells)
    ]
    if squares:
        path = Path.make_compound_path(*squares)
        axes.add_patch(PathPatch(path, fill=False, hatch="////", ec=PALE, lw=0))


def _label_axes(axes: Axes, labels: Sequence[str], room: float, *, below: bool, left: bool) -> None:
    """Labels rows and columns with their names, or columns with numbers if the names do not fit."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    size = small_size() if room >= 12 else small_size() - 2
    columns, rows = list(labels), list(labels)
    if any(text_width(figure, label, size) > 0.9 * room for label in labels):
        ends = [re.fullmatch(r"(.*?)([0-9]+)", label) for label in labels]
        columns = [end[2] for end in ends if end]
        if len(columns) < len(labels) or len({end[1] for end in ends if end}) > 1:
            columns = [str(number) for number in range(1, len(labels) + 1)]
            rows = [f"{label}  {number}" for number, label in zip(columns, labels, strict=True)]
    widest = max((text_width(figure, label, size) for label in columns), default=0.0)
    for axis, names, length, shown in (
        (axes.xaxis, columns, widest + 3, below),
        (axes.yaxis, rows, 1.25 * size, left),
    ):
        stride = math.ceil(length / room) if room else 1
        ticks = range(0, len(names), stride)
        axis.set_ticks(ticks, names[::stride] if shown else [], fontsize=size)
        axis.set_tick_params(length=0 if stride == 1 else 2, labelcolor=INK)


def _add_colour_bar(
    figure: Figure,
    panels: Sequence[Axes],
    norm: Normalize,
    label: str,
    drawing: Drawing,
    *,
    log: bool,
) -> None:
    label += ", log scale" * (log and not drawing.compact)
    bar = figure.colorbar(
        ScalarMappable(norm, LOSS_COLOURS),
        ax=list(panels),
        label=shorten(figure, label, narrow(figure, 220), text_size()),
        fraction=0.05,
        shrink=0.9,
        aspect=26,
        pad=0.02,
    )
    wide = log and float(norm.vmax or 1) > 5 * float(norm.vmin or 1)
    subs = (
        (1.0,) if wide and float(norm.vmax or 1) > 300 * float(norm.vmin or 1) else (1.0, 2.0, 5.0)
    )
    bar.ax.yaxis.set_major_locator(
        LogLocator(subs=subs) if wide else MaxNLocator("auto", steps=STEPS)
    )
    bar.ax.yaxis.set_major_formatter(Numbers(log=log))
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=small_size())
    bar.outline.set_visible(False)


def _legend(
    squares: Sequence[_Square], further: Sequence[Sequence[_Square]], drawing: Drawing
) -> list[tuple[Artist, str]]:
    """Returns the legend entries of cells without a colour."""
    entries: list[tuple[Artist, str]] = []
    for square in squares:
        pairs = ~np.eye(len(square.heights), dtype=bool)
        if (pairs & ~_coloured(square.heights) & ~_unknown(square.heights)).any():
            darkest = Patch(fc=_NONE, lw=0)
            text = "0: never above the straight line between the two losses"
            entries.append((darkest, drawing.words(text, "0")))
            break
    if any(_unknown(square.heights).any() for square in squares):
        grey = Patch(fc=_UNKNOWN, ec=PALE, hatch="////", lw=0)
        text = drawing.words("unknown: a loss on the line is not finite", "not finite")
        entries.append((grey, text))
    elif any(_unknown(square.heights).any() for own in further for square in own):
        grey = Patch(fc=_UNKNOWN, ec=PALE, hatch="////", lw=0)
        entries.append((grey, "not known"))
    return entries


def _notes(run: Run[BarriersSummary], squares: Sequence[_Square], shared: str) -> list[str]:
    if not squares:
        return ["There are no pairs"]
    alphas = run.summary.get("alphas", ())
    points = f", at {len(alphas)} points from α = 0 to 1" if alphas else ""
    above = "above the straight line between the losses of both checkpoints"
    notes = [f"Barrier: the largest height of the loss {above}{points}."]
    if shared:
        notes.append(f"Checkpoints {shared}")
    return notes


def barriers_views(run: Run[BarriersSummary], drawing: Drawing = FULL) -> list[View]:
    """Returns the views of an interactive page: the matrix of all pairs of checkpoints."""
    if pair_position(run.table.columns):
        return pairs_views(run, drawing)
    names = [str(name) for name in run.table.unique("a", "b")]
    labels, shared = distinct_checkpoints(run, names, drawing)
    quantities = {
        "barrier": f"barrier{loss_name([run])}",
        "distance": "distance ‖B − A‖",
    }
    pairs = [[f"{escape(a)} and {escape(b)}" for a in labels] for b in labels]
    at = list(range(len(names)))
    columns = {"barrier": "barrier_stderr", "distance": ""}
    for name, errors in (("disagreement", "disagreement_stderr"), ("cka", "")):
        if name in run.table.columns:
            columns[name], quantities[name] = errors, _QUANTITIES[name]
    items = []
    for quantity, errors in columns.items():
        more = _read(run.table, names, errors) if errors else []
        alphas = _read(run.table, names, "alpha")
        for k, square in enumerate(_read(run.table, names, quantity)):
            values = square.heights.copy()
            np.fill_diagonal(values, np.nan)
            hover = [(quantities[quantity], "z", "error" if more else "")]
            further: dict[str, list[list[float]]] = {}
            if more:
                further = {"error": more[k].heights.tolist()}
            if quantity == "barrier":
                further["alpha"] = alphas[k].heights.tolist()
                hover.append(("α of the barrier", "alpha", ""))
            trace = {
                "type": "heatmap",
                "x": at,
                "y": at,
                "z": values.tolist(),
                "coloraxis": "coloraxis",
                "hoverongaps": False,
                "xgap": 1,
                "ygap": 1,
            }
            tags = {"quantity": quantity, "split": square.split}
            items.append(Item(trace, tags, hover, further, pairs, counted=False))
    layout = layout_2d("")
    ticks = {"tickvals": at, "ticktext": [escape(label) for label in labels]}
    layout["xaxis"] |= ticks
    layout["yaxis"] |= {**ticks, "autorange": "reversed", "scaleanchor": "x"}
    view = View(
        "barriers",
        items,
        layout,
        quantities,
        scale="colour",
        logarithmic=[*quantities],
        limited=("barrier",),
        single=("quantity", "split"),
        colours=colour_stops(),
        from_zero=True,
        notes=[*([f"Checkpoints {shared}"] if shared else ()), *repair_notes([run])],
    )
    return [view]
