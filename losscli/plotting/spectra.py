"""The rows of ``losscli check --density --blocks``: spectral density, and curvature of blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from losscli.plotting.eigenvalue_axis import LINE, scale_eigenvalues
from losscli.plotting.layerwise import block_colours
from losscli.plotting.style import (
    DASHES,
    INK,
    PALETTE,
    columns,
    drawable,
    evenly_spaced,
    extent,
    format_number,
    name_checkpoint,
    narrow,
    number_checkpoints,
    plain,
    scale_checkpoints,
    scale_x,
    scale_y,
    shorten,
    shorten_path,
    small_size,
    title_panel,
)
from losscli.results.drawing import Drawing
from losscli.results.result import Run
from losscli.results.summaries import CheckSummary, Density
from losscli.table import Table
from losscli.wording import format_count

__all__ = ["Row", "matrix_name", "spectra_rows"]

Floats = NDArray[np.float64]
Drawn = tuple[list[str], list[tuple[Artist, str]]]
"""Notes, and entries of the legend."""

_COLOUR = PALETTE[0]
_MATRICES = {"hessian": "Hessian", "ggn": "Gauss-Newton matrix"}

_MOST_CURVES = 6  # densities of more checkpoints cannot be distinguished
_MOST_NAMES = 16  # blocks in the legend
_MOST_LABELS = 40  # blocks with a name on the axis
_BLOCK = 0.19  # inches, height of a block
# A density is drawn down to this share of the height of a single eigenvalue.
_FLOOR = 0.03
# Without the JSON that height is unknown: the share of the largest value.
_FLOOR_ALONE = 1e-7

_OUTLIER: dict[str, Any] = {"marker": "v", "mec": "#D55E00", "mfc": "#D55E00", "ms": 5}

# The columns of the panels of blocks, and their labels.
_PANELS = (
    ("gradient_norm", "", "gradient norm ‖∇L‖"),
    ("lambda_max", "lambda_max_error", "largest eigenvalue λₘₐₓ"),
    ("trace", "trace_stderr", "trace"),
)


@dataclass(frozen=True)
class Row:
    """A row of panels.

    Attributes:
        height: Its height in inches.
        draw: Draws it into a cell of a grid.
    """

    height: float
    draw: Callable[[Figure, SubplotSpec], Drawn]


def spectra_rows(
    run: Run[CheckSummary], names: Sequence[str], splits: Sequence[str], drawing: Drawing
) -> Iterator[Row]:
    """Yields the rows of a run that has a spectral density or blocks.

    Yields:
        The rows, from top to bottom.
    """
    density, blocks = run.more.get("density"), run.more.get("curvature")
    if density is not None and density.rows:
        panels = len(splits) if len(names) > 1 else 1
        yield Row(
            2.4 * panels / columns(drawing, panels),
            lambda *cell: _draw_densities(run, density, names, splits, drawing, *cell),
        )
    if blocks is not None and blocks.rows:
        many = len(names) > 1
        height = 2.1 if many else 0.8 + _BLOCK * min(len(blocks.unique("block")), 2 * _MOST_LABELS)
        draw = _draw_block_curves if many else _draw_blocks
        height *= 1.5 if drawing.compact and not many else 1.0
        height *= len(_PANELS) / columns(drawing, len(_PANELS))
        yield Row(height, lambda *cell: draw(run, blocks, names, splits, drawing, *cell))


def matrix_name(run: Run[CheckSummary]) -> str:
    """Returns the name of the matrix of a density, of traces and of blocks."""
    return _MATRICES.get(run.summary.get("operator") or "", "Hessian")


# --- Spectral density ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Curve:
    """The density of one checkpoint on one split, with its part of the summary."""

    name: str
    split: str
    x: Floats
    y: Floats
    about: Density


def _read_densities(
    run: Run[CheckSummary], table: Table, names: Sequence[str], split: str
) -> list[_Curve]:
    points = run.summary.get("splits", {}).get(split, {}).get("points", [])
    about = {point.get("checkpoint"): point.get("density") for point in points}
    rows = table.where("split", split)
    curves = []
    for name in names:
        own = rows.where("checkpoint", name)
        x, y = (np.array(own.floats(column)) for column in ("lambda", "density"))
        ok = drawable(x, log=False) & drawable(y, log=False)
        if ok.any():
            curves.append(_Curve(name, split, x[ok], y[ok], about.get(name) or {}))
    return curves


def _draw_densities(
    run: Run[CheckSummary],
    table: Table,
    names: Sequence[str],
    splits: Sequence[str],
    drawing: Drawing,
    figure: Figure,
    cell: SubplotSpec,
) -> Drawn:
    """Draws the density of one checkpoint on all splits, or a panel of several for each split."""
    several = len(names) > 1
    shown = [names[i] for i in evenly_spaced(len(names), _MOST_CURVES)]
    panels = splits if several else splits[:1]
    across = columns(drawing, max(len(panels), 1))
    grid = cell.subgridspec(max(len(panels), 1) // across, across)
    notes: list[str] = []
    entries: list[tuple[Artist, str]] = []
    if len(shown) < len(names):
        notes.append(f"Densities of {len(shown)} of the {len(names)} checkpoints are drawn.")
    colours = block_colours(len(shown)) if several else [_COLOUR]
    marked = False
    widths: list[float] = []
    for i, split in enumerate(panels):
        axes = figure.add_subplot(grid[divmod(i, across)])
        own = [split] if several else splits
        curves = [c for s in own for c in _read_densities(run, table, shown, s)]
        _scale_densities(axes, curves, run.summary.get("moving", {}).get("values"))
        for curve in curves:
            colour = colours[shown.index(curve.name)]
            dashes = "solid" if several else DASHES[splits.index(curve.split) % len(DASHES)]
            floor = axes.get_ylim()[0]
            y = np.where(curve.y > floor, curve.y, floor / 2)
            axes.plot(curve.x, y, color=colour, linestyle=dashes, lw=1.2, zorder=2.5)
            outliers = np.array(curve.about.get("outliers", []), np.float64)
            heights = np.maximum(np.interp(outliers, curve.x, curve.y), floor)
            style = {**_OUTLIER, "mec": colour, "mfc": colour} if several else _OUTLIER
            axes.plot(outliers, heights * 1.5, ls="none", zorder=4, **style)
            marked = marked or bool(outliers.size)
            widths.append(curve.about.get("sigma", math.nan))
        axes.set_xlabel(f"eigenvalue λ of the {matrix_name(run)}")
        title_panel(figure, axes, plain(split) if several else "", 200)
        if not i % across:
            axes.set_ylabel(drawing.words("spectral density\nlog scale", "density"))
    notes += _density_notes(run, widths)
    if several:
        entries += [
            (Line2D([], [], color=colour), _density_label(figure, run, name, drawing))
            for name, colour in zip(shown, colours, strict=True)
        ]
    if marked:
        mark = {**_OUTLIER, "mec": INK, "mfc": INK} if several else _OUTLIER
        label = drawing.words("eigenvalue apart from the bulk", "outlier")
        entries.append((Line2D([], [], ls="none", **mark), label))
    return notes, entries


def _density_label(figure: Figure, run: Run[CheckSummary], name: str, drawing: Drawing) -> str:
    shown = shorten_path(figure, name_checkpoint(run, name, drawing), narrow(figure, 200))
    return drawing.words(f"density of {shown}", shown)


def _scale_densities(axes: Axes, curves: Sequence[_Curve], size: int | None) -> None:
    """Scales a panel, down to a share of the height that one eigenvalue of ``size`` has."""
    axes.axvline(0, color=LINE, lw=1.1, zorder=1.5)
    tops = [float(curve.y.max()) for curve in curves]
    floors = [_FLOOR_ALONE * top for top in tops]
    widths = [curve.about.get("sigma", math.nan) for curve in curves]
    if size and all(width > 0 for width in widths):
        floors = [_FLOOR / (size * width * math.sqrt(2 * math.pi)) for width in widths]
    values = np.array([*floors, *(2 * top for top in tops)])
    scale_y(axes, values[drawable(values, log=True)], log=True)
    x = np.concatenate([*(curve.x for curve in curves), np.empty(0)])
    if x.size:
        low, high = extent(x)
        scale_x(axes, low, high)


def _density_notes(run: Run[CheckSummary], widths: Sequence[float]) -> Iterator[str]:
    known = sorted(width for width in widths if math.isfinite(width))
    probes, steps = run.summary.get("probes"), run.summary.get("lanczos")
    if not (known and probes and steps):
        return
    low, high = format_number(known[0], 2), format_number(known[-1], 2)
    width = f"σ = {low}" if low == high else f"σ from {low} to {high}"
    yield (
        f"Spectral density by stochastic Lanczos quadrature: {format_count(probes, 'probe')}, "
        f"{format_count(steps, 'step')}, Gaussians of width {width}."
    )


# --- Blocks --------------------------------------------------------------------------------------


def _draw_blocks(
    run: Run[CheckSummary],
    table: Table,
    names: Sequence[str],  # noqa: ARG001 - there is one
    splits: Sequence[str],
    drawing: Drawing,
    figure: Figure,
    cell: SubplotSpec,
) -> Drawn:
    """Draws the blocks of one checkpoint from top to bottom, in a panel for each quantity."""
    blocks = [str(block) for block in table.unique("block")]
    rank = {block: i for i, block in enumerate(blocks)}
    across = columns(drawing, len(_PANELS))
    grid = cell.subgridspec(len(_PANELS) // across, across)
    first: Axes | None = None
    for i, (column, error, label) in enumerate(_PANELS):
        axes = figure.add_subplot(grid[divmod(i, across)], sharey=first)
        reach = [np.empty(0)]
        for index, split in enumerate(splits):
            rows = table.where("split", split)
            shift = 0.2 * (index - (len(splits) - 1) / 2)
            y = np.array([rank[str(block)] for block in rows["block"]]) + shift
            x = np.array(rows.floats(column))
            errors = _errors(rows, error)
            ok = drawable(x, log=False)
            face = "white" if index else _COLOUR
            axes.errorbar(
                x[ok], y[ok], xerr=errors[ok], fmt="o", color=_COLOUR, mfc=face, ms=4, elinewidth=1
            )
            reach += [x[ok] - errors[ok], x[ok] + errors[ok]]
        how = scale_eigenvalues(axes, "x", np.concatenate(reach))
        axes.set_xlabel(label + f"\n{how}" * bool(how))
        axes.grid(visible=False, axis="y")
        if first is None:
            first = axes
            shown = evenly_spaced(len(blocks), _MOST_LABELS)
            labels = [shorten(figure, plain(blocks[k]), narrow(figure, 90)) for k in shown]
            axes.set_yticks(shown, labels, fontsize=small_size())
            axes.set_ylim(len(blocks) - 0.5, -0.5)
        elif across > 1:
            axes.tick_params(axis="y", labelleft=False)
    return [f"Blocks: diagonal blocks of the {matrix_name(run)}, in the order of the model."], []


def _draw_block_curves(
    run: Run[CheckSummary],
    table: Table,
    names: Sequence[str],
    splits: Sequence[str],
    drawing: Drawing,
    figure: Figure,
    cell: SubplotSpec,
) -> Drawn:
    """Draws each block over the checkpoints on the first split, in a panel for each quantity."""
    table = table.where("split", splits[0])
    blocks = [str(block) for block in table.unique("block")]
    colours = block_colours(len(blocks))
    numbers, under = number_checkpoints(names)
    number = dict(zip(names, numbers.tolist(), strict=True))
    across = columns(drawing, len(_PANELS))
    grid = cell.subgridspec(len(_PANELS) // across, across)
    for i, (column, error, label) in enumerate(_PANELS):
        axes = figure.add_subplot(grid[divmod(i, across)])
        log = column == "gradient_norm"
        reach = [np.empty(0)]
        for block, colour in zip(blocks, colours, strict=True):
            rows = table.where("block", block)
            x = np.array([number[str(name)] for name in rows["checkpoint"]])
            y = np.array(rows.floats(column))
            ok = drawable(y, log=log)
            y = np.where(ok, y, np.nan)
            axes.plot(x, y, "-" if len(names) > _MOST_LABELS else "o-", color=colour, lw=1.2, ms=3)
            errors = _errors(rows, error)
            axes.vlines(x, y - errors, y + errors, color=colour, lw=1, alpha=0.6)
            reach += [(y - errors)[ok], (y + errors)[ok]]
        values = np.concatenate(reach)
        how = "log scale" if log else scale_eigenvalues(axes, "y", values)
        if log:
            scale_y(axes, values, log=True)
        axes.set_title(label + f", {how}" * bool(how), loc="left", fontsize=small_size())
        scale_checkpoints(axes, numbers, under)
        axes.set_xlabel(axes.get_xlabel(), fontsize=small_size())
    which = f"diagonal blocks of the {matrix_name(run)} on {plain(splits[0])}"
    notes = [f"Blocks: {which}, from dark to light in the order of the model."]
    if len(blocks) > _MOST_NAMES:
        notes.append(f"The legend names {_MOST_NAMES} of the {len(blocks)} blocks.")
    entries: list[tuple[Artist, str]] = [
        (Line2D([], [], color=colours[k]), shorten(figure, plain(blocks[k]), narrow(figure, 120)))
        for k in evenly_spaced(len(blocks), _MOST_NAMES)
    ]
    return notes, entries


def _errors(rows: Table, column: str) -> Floats:
    """Returns the errors in a column; 0 where they are unknown, or without a column."""
    errors = np.array(rows.floats(column)) if column else np.zeros(len(rows.rows))
    return np.where(drawable(errors, log=False), errors, 0.0)
