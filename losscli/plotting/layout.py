"""The layout of a figure: title, panels, notes and legend, from top to bottom."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator
from mpl_toolkits.mplot3d import Axes3D  # type: ignore[import-untyped]

from losscli.plotting.style import (
    INCH,
    PALE,
    narrow,
    note_size,
    plain,
    shorten,
    small_size,
    text_size,
    text_width,
)
from losscli.results.drawing import Drawing

__all__ = ["finish_layout"]

_MOST_LAYOUTS = 6
_HANDLE = 2.5  # length of a line in the legend in sizes of text
_SHORT_HANDLE = 1.8  # the same in a compact figure


def finish_layout(
    figure: Figure,
    drawing: Drawing,
    notes: Sequence[str],
    groups: Sequence[Sequence[tuple[Artist, str]]],
) -> None:
    """Adds title, notes and legend, and computes the final layout.

    The figure grows by their heights; one of fixed height gets it, unless it needs more. 3D axes
    become as large as their cells allow.

    Args:
        figure: The figure.
        drawing: How it is drawn: a compact figure has no notes.
        notes: Sentences.
        groups: Handles and labels of the legend; every group starts a row.
    """
    _add_title(figure, drawing)
    _add_foot(figure, drawing, notes, groups)
    figure.set_figheight(max(figure.get_figheight(), drawing.inches[1] or 0.0))
    engine = figure.get_layout_engine()
    assert engine is not None
    axes_3d = [axes for axes in figure.axes if isinstance(axes, Axes3D)]
    # Before Matplotlib 3.11 the labels of 3D axes have no position until they are drawn.
    drawn_first = bool(axes_3d) and mpl.__version_info__[:2] < (3, 11)
    if drawn_first:
        figure.set_layout_engine("none")
        figure.draw_without_rendering()
        figure.set_layout_engine(engine)
    # A panel with a fixed aspect ratio shrinks after its margins were measured: measure again.
    fixed = any(axes.get_aspect() != "auto" for axes in figure.axes)
    most = (_MOST_LAYOUTS if drawing.compact else 3) if fixed else 1
    before = np.empty(0)
    for _ in range(most):
        engine.execute(figure)
        places = np.array([axes.get_position().bounds for axes in figure.axes])
        if before.size and np.allclose(places, before, atol=1e-3):
            break
        before = places
    # Equal figures are rendered to equal bytes only without a layout engine.
    figure.set_layout_engine(None)
    if axes_3d:
        _enlarge(figure, axes_3d, drawn_first=drawn_first)
    else:
        _round_positions(figure)


def _add_title(figure: Figure, drawing: Drawing) -> None:
    """Adds the title above the panels, if there is one; the figure grows by its height."""
    points = 1.3 * text_size()
    letters = int(66 * narrow(figure, 13.0) / points)
    lines = textwrap.wrap(plain(drawing.title), letters)
    if lines:
        figure.suptitle("\n".join(lines), x=0.02, ha="left")
        _grow(figure, 0.24 / 13 * points * len(lines))


def _add_foot(
    figure: Figure,
    drawing: Drawing,
    notes: Sequence[str],
    groups: Sequence[Sequence[tuple[Artist, str]]],
) -> None:
    """Adds notes and, in as few rows as possible, a legend below the panels.

    The notes are the title of the legend, so that the layout leaves room for both.
    """
    scale = small_size() / 9
    handle = _SHORT_HANDLE if drawing.compact else _HANDLE
    line, gap = (6.5 + 9 * handle) * scale, 14.0 * scale
    available = 0.96 * figure.get_figwidth() * INCH
    shown = () if drawing.compact else notes
    notes = [part for note in shown for part in _wrap(figure, note, available)]
    blank = (0.0, Line2D([], [], ls="none"), "")
    entries: list[list[tuple[float, Artist, str]]] = []
    for group in groups:
        labels = [shorten(figure, label, available - line) for _, label in group]
        handles = [artist for artist, _ in group]
        widths = [text_width(figure, label) + line for label in labels]
        entries.append(list(zip(widths, handles, labels, strict=True)))
    best: list[list[tuple[float, Artist, str]]] = []
    for columns in range(1, max(map(len, entries), default=0) + 1):
        rows = []
        for entry in entries:
            cells = entry + [blank] * (-len(entry) % columns)
            rows += [cells[k : k + columns] for k in range(0, len(cells), columns)]
        total = sum(max(width for width, _, _ in column) for column in zip(*rows, strict=True))
        fits = total + gap * (columns - 1) <= available
        if not best or (fits and len(rows) < len(best)):
            best = rows
    if not best and not notes:
        return
    # Matplotlib fills a legend column by column.
    cells = [cell for column in zip(*best, strict=True) for cell in column]
    legend = figure.legend(
        [artist for _, artist, _ in cells],
        [label for _, _, label in cells],
        title="\n".join(notes),
        loc="outside lower left",
        alignment="left",
        ncols=len(best[0]) if best else 1,
        frameon=False,
        handlelength=handle,
        handletextpad=0.7,
        columnspacing=gap / small_size(),
        borderpad=0,
        borderaxespad=0.4 if drawing.compact else 1.0,
    )
    legend.get_title().set(color=PALE, linespacing=1.25)
    _grow(figure, legend.get_window_extent().height / figure.dpi)


def _wrap(figure: Figure, note: str, room: float) -> list[str]:
    """Breaks a sentence into lines of at most ``room`` points."""
    letters = len(note)
    while letters > 20:
        lines = textwrap.wrap(note, letters)
        widest = max(text_width(figure, line, note_size()) for line in lines)
        if widest <= room:
            break
        letters = min(letters - 1, int(letters * room / widest) + 1)
    return textwrap.wrap(note, letters)


def _grow(figure: Figure, inches: float) -> None:
    """Increases the height of a figure."""
    figure.set_figheight(figure.get_figheight() + inches)


def _enlarge(figure: Figure, axes_3d: Sequence[Axes3D], *, drawn_first: bool) -> None:
    """Enlarges 3D axes to their cells."""
    page = figure.transSubfigure.inverted()
    cells = [axes.get_position(original=True) for axes in axes_3d]
    for axes in figure.axes:
        if axes.get_aspect() != "auto":
            axes.apply_aspect()
    # Text keeps its size, so one step does not reach the final scale.
    for _ in range(3):
        if drawn_first:
            figure.draw_without_rendering()
        for axes, cell in zip(axes_3d, cells, strict=True):
            _thin_ticks(axes)
            drawn = axes.get_tightbbox().transformed(page)
            box = axes.get_position(original=True)
            factor = min(cell.width / drawn.width, cell.height / drawn.height)
            x = (cell.x0 + cell.x1) / 2 + (box.x0 - (drawn.x0 + drawn.x1) / 2) * factor
            y = (cell.y0 + cell.y1) / 2 + (box.y0 - (drawn.y0 + drawn.y1) / 2) * factor
            axes.set_position([x, y, box.width * factor, box.height * factor])


def _thin_ticks(axes: Axes3D) -> None:
    """Removes ticks of the y axis with labels that overlap those of the other axes."""
    # Their labels have a position since they were drawn; `get_ticklabels` would reset it.
    others = [
        tick.label1.get_window_extent()
        for axis in (axes.xaxis, axes.zaxis)
        for tick in axis.get_major_ticks()
    ]
    gap = 3 * axes.figure.dpi / INCH
    kept = [
        tick.get_loc()
        for tick in axes.yaxis.get_major_ticks()
        if not any(tick.label1.get_window_extent().padded(gap, 0).overlaps(o) for o in others)
    ]
    axes.yaxis.set_major_locator(FixedLocator(kept))


def _round_positions(figure: Figure) -> None:
    """Rounds the positions of panels, which contain rounding errors of the layout solver.

    The identifiers in an SVG are hashes of all digits of these positions.
    """
    for axes in figure.axes:
        left, bottom, width, height = (round(x, 9) for x in axes.get_position().bounds)
        axes.set_position((left, bottom, width, height))
