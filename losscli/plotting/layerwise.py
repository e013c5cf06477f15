"""The figure of ``losscli interpolate --layerwise``: curves of single blocks and of all blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from losscli.plotting.layout import finish_layout
from losscli.plotting.line_axis import (
    draw_ends,
    flat_range_notes,
    lowest_label,
    mark_ends,
    mark_lowest,
    name_ends,
    read_series,
    scale_alpha,
)
from losscli.plotting.lines import Series, draw_panel, has_bands
from losscli.plotting.style import (
    INK,
    end_names,
    error_label,
    evenly_spaced,
    house_style,
    loss_name,
    name_split,
    narrow,
    new_figure,
    plain,
    shorten,
    small_size,
    split_names,
    text_size,
)
from losscli.results.drawing import FULL, Drawing
from losscli.results.result import Run
from losscli.results.summaries import LineSummary

__all__ = ["BLOCK_ALPHA", "block_colours", "draw_layerwise"]

BLOCK_ALPHA = "α:  θ(α) = A + α (B − A) for all blocks, or for one with the others at A"
_MOST_NAMES = 16  # maximum number of blocks in the legend
_NAME = 118.0  # points, maximum width of a name
_ROW = 0.192  # inches, height of a row of the legend
# With more blocks, neighbours have similar colours and differ in their line styles. With more than
# `_MOST_NAMES`, colours show only the order.
_FEW = 5
_MOST_BANDS = 8  # maximum number of blocks with bands of standard errors
_DASHES: tuple[Any, ...] = ("solid", (0, (4, 1.6)), (0, (1, 1.3)))


def block_colours(number: int) -> list[str]:
    """Returns a sequence of colours from dark to light, safe for colour-blind and grey print."""
    return [to_hex(c) for c in mpl.colormaps["plasma"](np.linspace(0.0, 0.84, number))]


def draw_layerwise(run: Run[LineSummary], drawing: Drawing = FULL) -> Figure:
    """Draws the loss over the line for the whole network and for each block on its own.

    There is a panel per split, with all blocks together in black and single blocks in colours in
    the order of the model.

    Returns:
        The figure, laid out and ready to `render`.
    """
    with house_style(drawing):
        splits = split_names([run])
        names = [str(name) for name in run.more["blocks"].unique("block")]
        colours = block_colours(len(names))
        least = 0.0 if drawing.compact else _ROW * (min(len(names), _MOST_NAMES) + 3)
        figure = new_figure(drawing, 0.6 + max(3.3, least) * max(len(splits), 1))
        panels = figure.subplots(max(len(splits), 1), 1, sharex=True, squeeze=False)[:, 0].tolist()

        curves = _read_blocks(run, names, colours, splits, drawing)
        whole = [
            replace(s, colour=INK, dashes="solid", width=2.4)
            for s in read_series([run], [""], splits, drawing)
        ]
        view = scale_alpha(panels[-1], [*curves, *whole])
        notes = [] if whole else ["There are no points"]
        lowest = []
        for axes, split in zip(panels, splits, strict=False):
            together = [s for s in whole if s.split == split]
            # Drawn last, so that it is on top.
            alone = [s for s in curves if s.split == split]
            notes += draw_panel(axes, alone + together, "loss", drawing, log=drawing.log)
            lowest += mark_lowest(axes, together, drawing)
            axes.set_ylabel(_label(figure, run, split, drawing))
        notes += flat_range_notes([*curves, *whole], view, log=drawing.log)
        if len(names) > _MOST_NAMES:
            order = "from dark to light in the order of the model"
            notes.append(f"{len(names)} blocks {order}; the legend names {_MOST_NAMES} of them.")
        panels[-1].set_xlabel(drawing.words(BLOCK_ALPHA, "α"))
        figure.align_ylabels(panels)
        blocks = _name_blocks(figure, names, curves)
        if not drawing.compact:
            _add_legend(figure, blocks)
        if len(names) > _MOST_BANDS:
            notes.append("Single blocks are drawn without standard errors.")
        draw_ends(panels, view)
        ends = mark_ends(panels[0], view, end_names([run], drawing))
        marks = _marks(whole, curves, lowest, len(splits), drawing)
        finish_layout(figure, drawing, notes, [blocks if drawing.compact else [], marks])
        name_ends(panels[0], ends)
    return figure


def _read_blocks(
    run: Run[LineSummary],
    names: Sequence[str],
    colours: Sequence[str],
    splits: Sequence[str],
    drawing: Drawing,
) -> list[Series]:
    series = []
    table = run.more["blocks"]
    many = len(names) > _MOST_NAMES
    for index, (name, colour) in enumerate(zip(names, colours, strict=True)):
        dashes = _DASHES[0 if many or len(names) <= _FEW else index % len(_DASHES)]
        block: Run[LineSummary] = Run(table.where("block", name), {})
        series += [
            replace(
                s,
                run=index,
                name=f"{plain(name)} alone, {plain(s.split)}",
                colour=colour,
                dashes=dashes,
                width=1.0 if many else 1.4,
                values=s.values
                if len(names) <= _MOST_BANDS
                else {c: v for c, v in s.values.items() if c != "loss_stderr"},
            )
            for s in read_series([block], [""], splits, drawing)
        ]
    return series


def _label(figure: Figure, run: Run[LineSummary], split: str, drawing: Drawing) -> str:
    scale = ", log scale" if drawing.log else ""
    lines = (
        drawing.words(f"loss{loss_name([run])}{scale}", "loss"),
        name_split([run], split, drawing),
    )
    return "\n".join(shorten(figure, line, narrow(figure, 200), text_size()) for line in lines)


def _name_blocks(
    figure: Figure, names: Sequence[str], curves: Sequence[Series]
) -> list[tuple[Artist, str]]:
    """Returns legend entries of up to `_MOST_NAMES` blocks, evenly spaced in their order."""
    entries: list[tuple[Artist, str]] = [
        (Line2D([], [], color=INK, linewidth=2.4), "all blocks together")
    ]
    lines = {s.run: s for s in curves}
    for index in evenly_spaced(len(names), _MOST_NAMES):
        if index in lines:
            s = lines[index]
            handle = Line2D([], [], color=s.colour, linestyle=s.dashes, linewidth=1.8)
            entries.append((handle, shorten(figure, plain(names[index]), _NAME)))
    return entries


def _add_legend(figure: Figure, entries: Sequence[tuple[Artist, str]]) -> None:
    """Adds a legend to the right of the panels."""
    figure.legend(
        [handle for handle, _ in entries],
        [name for _, name in entries],
        title="interpolated",
        title_fontsize=small_size(),
        alignment="left",
        loc="outside right upper",
        frameon=False,
        handlelength=2.2,
        handletextpad=0.7,
        labelspacing=0.45,
        borderpad=0,
        borderaxespad=0.8,
    )


def _marks(
    whole: Sequence[Series],
    curves: Sequence[Series],
    lowest: Sequence[tuple[Series, float, float]],
    splits: int,
    drawing: Drawing,
) -> list[tuple[Artist, str]]:
    marks: list[tuple[Artist, str]] = []
    if has_bands([*whole, *curves]):
        marks.append((
            Patch(color=INK, alpha=0.18, lw=0),
            error_label(drawing),
        ))
    if lowest:
        mark = Line2D([], [], ls="none", marker="D", mfc="white", mec=INK, mew=1.3, ms=6)
        marks.append((mark, lowest_label(lowest, 1, splits, drawing, ", all blocks together")))
    return marks
