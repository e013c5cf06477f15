"""The figure of ``losscli around``: the loss along directions from checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from losscli.plotting.html import DASHES as PAGE_DASHES
from losscli.plotting.html import Item, View, curve, layout_2d, transparent
from losscli.plotting.layout import finish_layout
from losscli.plotting.lines import Series, draw_panel
from losscli.plotting.style import (
    DASHES,
    INK,
    Label,
    distinct_checkpoints,
    drawable,
    error_label,
    examples_notes,
    format_number,
    house_style,
    label_loss,
    linear_ticks,
    loss_name,
    name_split,
    new_figure,
    plain,
    run_colours,
    scale_x,
    scale_y,
    split_names,
    title_panel,
)
from losscli.results.drawing import FULL, Drawing
from losscli.results.result import Run
from losscli.results.summaries import AroundPoint, AroundSummary
from losscli.table import Table
from losscli.weight_space.basin import Profile

__all__ = ["around_views", "draw_around"]

Floats = NDArray[np.float64]

_DISTANCE = "distance from the checkpoint"
_OPPOSITE = " (negative: in the opposite direction)"
_HEIGHT = 3.4  # inches, of a panel
_MOST_NAMES = 16  # maximum number of checkpoints in the legend


@dataclass(frozen=True)
class _Curves:
    """The losses around one checkpoint on one split.

    Attributes:
        x: The positions of the P points: distances, negative in the opposite direction, ``[P]``.
        directions: The names of the K directions.
        losses: ``[K, P]``; nan where there is no row.
        errors: The standard errors, ``[K, P]``.
    """

    x: Floats
    directions: tuple[str, ...]
    losses: Floats
    errors: Floats

    @property
    def random(self) -> bool:
        """Whether the directions are random ones, which have numbers."""
        return all(name.isdecimal() for name in self.directions)

    @classmethod
    def read(cls, rows: Table, quantity: str = "loss") -> _Curves:
        """Reads the rows of one checkpoint and split: the losses or another quantity."""
        coefficients = np.array(rows.floats("coefficient"))
        x = np.copysign(np.array(rows.floats("distance")), coefficients)
        # At 0 and −0 all directions have the checkpoint itself.
        x = np.where(coefficients == 0, 0.0, x)
        known = np.isfinite(x) & drawable(x, log=False)
        # Rounding aside, equal coefficients are equal distances.
        places, at = np.unique(coefficients[known], return_inverse=True)
        names = tuple(str(name) for name in rows.unique("direction"))
        number = {name: k for k, name in enumerate(names)}
        row = np.array([number[str(name)] for name in rows["direction"]], int)[known]
        position = np.full(len(places), np.nan)
        position[at] = x[known]
        tables = []
        for column in (quantity, f"{quantity}_stderr"):
            values = np.full((len(names), len(places)), np.nan)
            if column in rows.columns:
                values[row, at] = np.array(rows.floats(column))[known]
            tables.append(values)
        return cls(position, names, *tables)


@dataclass(frozen=True)
class _Group:
    """One checkpoint of one run, with its colour."""

    run: Run[AroundSummary]
    checkpoint: str
    name: str
    colour: str

    def curves(self, split: str, quantity: str = "loss") -> _Curves | None:
        """Reads the losses, or another quantity, on a split; None without any."""
        rows = self.run.table.where("checkpoint", self.checkpoint).where("split", split)
        curves = _Curves.read(rows, quantity)
        return curves if curves.x.size else None

    def point(self, split: str) -> AroundPoint:
        """Returns the part of the summary on the checkpoint and a split."""
        points = self.run.summary.get("splits", {}).get(split, {}).get("points", ())
        own: AroundPoint = {}
        return next((p for p in points if p.get("checkpoint") == self.checkpoint), own)

    def eigenvalue(self, direction: str) -> float:
        """Returns the eigenvalue along a direction; nan if it is not known or none."""
        for found in self.run.summary.get("derivatives", {}).get(self.checkpoint, ()):
            if found.get("direction") == direction:
                value = found.get("eigenvalue")
                return math.nan if value is None else value
        return math.nan

    @property
    def size(self) -> float:
        """‖θ‖; nan if it is not known."""
        named = [c.get("name") for c in self.run.summary.get("checkpoints", ())]
        norms = dict(zip(named, self.run.summary.get("norms", ()), strict=False))
        return norms.get(self.checkpoint, np.nan)


def draw_around(runs: Sequence[Run[AroundSummary]], drawing: Drawing = FULL) -> Figure:
    """Draws the loss along directions from checkpoints over the distance, a panel per split.

    Each checkpoint has a colour. Random directions are thin lines, with the mean over them and the
    band between their 10 % and 90 % quantiles; other directions have line styles, with a band of
    one standard error. A diamond marks the radius of a basin.

    Returns:
        The figure, laid out and ready to `render`.
    """
    with house_style(drawing):
        splits = split_names(runs)
        groups, shared = _read(runs, drawing)
        number = max(len(splits), 1)
        figure = new_figure(drawing, 0.6 + _HEIGHT * number)
        panels = figure.subplots(number, 1, sharex=True, squeeze=False)[:, 0].tolist()
        notes = [*examples_notes(runs, splits), *shared] if groups else ["There are no points"]
        marks: dict[str, tuple[Artist, str]] = {}
        reach: list[Floats] = []
        for axes, split in zip(panels, splits, strict=False):
            curves = [(g, c) for g in groups if (c := g.curves(split))]
            notes += _draw(axes, curves, split, marks, drawing)
            reach += [c.x for _, c in curves]
            axes.set_ylabel(label_loss(figure, runs, drawing, log=drawing.log))
            title_panel(figure, axes, name_split(runs, split, drawing))
        _scale_distance(panels, np.concatenate([*reach, np.empty(0)]), groups, drawing)
        figure.align_ylabels(panels)
        shown = groups
        if len(groups) > _MOST_NAMES:
            shown = [groups[0], groups[-1]]
            order = "from dark to light in the order of the table"
            notes.append(f"{len(groups)} checkpoints, {order}; the first and the last are named.")
        # A single checkpoint needs no sample of its colour, which all entries have.
        style = "solid" if len(groups) > 1 else "none"
        named = [
            (Line2D([], [], color=g.colour, lw=2.2, ls=style), drawing.words(_label(g), g.name))
            for g in shown
            if len(groups) > 1 or not drawing.compact or g.run.checkpoint_labels
        ]
        finish_layout(figure, drawing, [*dict.fromkeys(notes)], [named, [*marks.values()]])
    return figure


def _read(runs: Sequence[Run[AroundSummary]], drawing: Drawing) -> tuple[list[_Group], list[str]]:
    """Returns the checkpoints of all runs, and notes on the names that they share."""
    found, notes = [], []
    for run in runs:
        checkpoints = [str(name) for name in run.table.unique("checkpoint")]
        names, pattern = distinct_checkpoints(run, checkpoints, drawing)
        label = Label(plain(run.label))
        if pattern:
            notes.append(f"Checkpoints {pattern}")
        for checkpoint, own in zip(checkpoints, names, strict=True):
            name = f"{label}, {own}" if label and len(checkpoints) > 1 else label or own
            found.append((run, checkpoint, name))
    colours = run_colours(len(found), drawing)
    return [_Group(*of, colour) for of, colour in zip(found, colours, strict=True)], notes


def _label(group: _Group) -> str:
    """Returns the name of a checkpoint with its norm; a label stays one."""
    norm = f", ‖θ‖ = {format_number(group.size)}" if np.isfinite(group.size) else ""
    return type(group.name)(group.name + norm)


def _draw(
    axes: Axes,
    groups: Sequence[tuple[_Group, _Curves]],
    split: str,
    marks: dict[str, tuple[Artist, str]],
    drawing: Drawing,
) -> list[str]:
    """Draws one split; returns notes, and adds to the entries of the legend."""
    log = drawing.log
    series = [s for k, (g, c) in enumerate(groups) for s in _series(k, g, c, split)]
    notes = draw_panel(axes, series, "loss", replace(drawing, ylim=None), log=log)
    # Single directions may be finite where their mean is not, and farther apart.
    shown = [s["loss"] + sign * s["loss_stderr"] for s in series for sign in (-1, 1)]
    values = [*(c.losses.ravel() for _, c in groups), *(x.ravel() for x in shown)]
    joined = np.concatenate([*values, np.empty(0)])
    scale_y(axes, joined[drawable(joined, log=log)], log=log, limits=drawing.ylim)
    colour = groups[0][0].colour if len({g.colour for g, _ in groups}) == 1 else INK
    for group, curves in groups:
        if curves.random:
            _draw_random(axes, curves, group.colour, log=log)
            marks.setdefault("mean", (Line2D([], [], color=colour, lw=2.2), "mean"))
            marks.setdefault(
                "thin", (Line2D([], [], color=colour, lw=0.7, alpha=0.45), "single directions")
            )
            if len(curves.directions) > 1:
                marks.setdefault(
                    "band", (Patch(color=colour, alpha=0.18, lw=0), "10–90 % of directions")
                )
        else:
            for k, name in enumerate(curves.directions):
                line = Line2D([], [], color=colour, linestyle=DASHES[k % len(DASHES)])
                value = group.eigenvalue(name) if len(groups) == 1 else math.nan
                label = f"along {plain(name)}"
                if math.isfinite(value) and not drawing.compact:
                    label += f" (λ = {format_number(value)})"
                marks.setdefault(f"along {name}", (line, label))
            if np.nanmax(curves.errors, initial=0.0) > 0:
                band = Patch(color=colour, alpha=0.18, lw=0)
                marks.setdefault("error", (band, error_label(drawing)))
        if not drawing.no_markers and _mark_radii(axes, group, split):
            diamond = Line2D([], [], ls="none", marker="D", mfc="white", mec=colour, mew=1.3, ms=6)
            marks.setdefault("radius", (diamond, drawing.words("radius of the basin", "radius")))
    return notes


def _series(number: int, group: _Group, curves: _Curves, split: str) -> Iterator[Series]:
    """Yields the mean of random directions, or each other direction."""
    ends = curves.x == 0
    name = f"{group.name}, {plain(split)}"
    style: dict[str, Any] = {"run": number, "split": split, "colour": group.colour, "ends": ends}
    if curves.random:
        mean = Profile.of(curves.losses).mean
        yield Series(
            name=f"the mean of {name}",
            dashes="solid",
            x=curves.x,
            values={"loss": mean},
            width=2.2,
            **style,
        )
        return
    for k, direction in enumerate(curves.directions):
        values: Mapping[str, Floats] = {
            "loss": curves.losses[k],
            "loss_stderr": curves.errors[k],
        }
        dashes = DASHES[k % len(DASHES)]
        yield Series(
            name=f"{name} along {plain(direction)}",
            dashes=dashes,
            x=curves.x,
            values=values,
            **style,
        )


def _draw_random(axes: Axes, curves: _Curves, colour: str, *, log: bool) -> None:
    """Draws each direction and the band."""
    shown = np.where(drawable(curves.losses, log=log), curves.losses, np.nan)
    # One artist for all lines, with gaps between them.
    gap = np.full((len(shown), 1), np.nan)
    x = np.hstack([np.broadcast_to(curves.x, shown.shape), gap])
    axes.plot(
        x.ravel(), np.hstack([shown, gap]).ravel(), color=colour, lw=0.7, alpha=0.45, zorder=2.2
    )
    if len(shown) > 1:
        profile = Profile.of(curves.losses)
        low = np.maximum(profile.low, axes.get_ylim()[0]) if log else profile.low
        axes.fill_between(
            curves.x,
            low,
            profile.high,
            where=np.isfinite(profile.high) & np.isfinite(low),
            color=colour,
            alpha=0.18,
            lw=0,
        )


def _mark_radii(axes: Axes, group: _Group, split: str) -> bool:
    """Marks each radius where the loss crosses the threshold; returns whether there is a mark."""
    point = group.point(split)
    places = [x for found in point.get("radii", {}).values() for x in found.get("positions", ())]
    threshold = point.get("threshold")
    if threshold is None or not places:
        return False
    style: dict[str, Any] = {"mfc": "white", "mec": group.colour, "mew": 1.3, "ms": 6, "zorder": 6}
    axes.plot(places, [threshold] * len(places), "D", **style)
    return True


def _scale_distance(
    panels: Sequence[Axes], x: Floats, groups: Sequence[_Group], drawing: Drawing
) -> None:
    """Scales the axis of distances; for a single ‖θ‖, another one is relative to it."""
    low, high = (float(x.min()), float(x.max())) if x.size else (0.0, 1.0)
    scale_x(panels[-1], low, high)
    panels[-1].set_xlabel(_DISTANCE + _OPPOSITE * (low < 0 and not drawing.compact))
    sizes = {group.size for group in groups}
    size = sizes.pop() if len(sizes) == 1 else np.nan
    if not (np.isfinite(size) and size > 0):
        return
    upper = panels[0].secondary_xaxis(
        "top", functions=(lambda v: np.asarray(v) / size, lambda v: np.asarray(v) * size)
    )
    linear_ticks(upper.xaxis)
    upper.set_xlabel("distance / ‖θ‖")


# --- As a page -----------------------------------------------------------------------------------


def around_views(runs: Sequence[Run[AroundSummary]], drawing: Drawing = FULL) -> list[View]:
    """Returns the views of an interactive page: the loss along directions from checkpoints."""
    splits = split_names(runs)
    groups, notes = _read(runs, drawing)
    quantities = {"loss": f"loss{loss_name(runs)}"}
    quantities |= {metric: metric for run in runs for metric in run.table.metrics}
    items = [
        item
        for step, group in enumerate(groups, start=1)
        for number, split in enumerate(splits)
        for quantity, label in quantities.items()
        if quantity in group.run.table.columns and (curves := group.curves(split, quantity))
        for item in _page_items(
            group,
            curves,
            label,
            tags={"quantity": quantity, "split": split},
            dash=PAGE_DASHES[number % len(PAGE_DASHES)],
            step=step,
        )
    ]
    negative = any(min(item.trace["x"], default=0.0) < 0 for item in items)
    view = View(
        "around",
        items,
        layout_2d(_DISTANCE + _OPPOSITE * negative),
        quantities,
        logarithmic=[*quantities],
        slider=[group.name for group in groups] if len(groups) > 1 else (),
        notes=notes if items else ["There are no points"],
    )
    return [view]


def _page_items(
    group: _Group, curves: _Curves, label: str, *, dash: str, **more: Any
) -> Iterator[Item]:
    """Yields a curve for each direction, and the mean over random ones with its band."""
    x = curves.x.tolist()
    split = plain(more["tags"]["split"])
    style = {"colour": group.colour, "labels": (_DISTANCE, label), **more}
    if curves.random and len(curves.directions) > 1:
        profile = Profile.of(curves.losses)
        for edge in (profile.low, profile.high):
            upper = edge is profile.high
            trace = {
                "type": "scatter",
                "mode": "lines",
                "x": x,
                "y": edge.tolist(),
                "line": {"width": 0, "color": group.colour},
                "fill": "tonexty" if upper else None,
                "fillcolor": transparent(group.colour, 0.18),
                "name": f"{_label(group)}, {split}: 10–90 % of the directions",
                "showlegend": upper,
            }
            yield Item(trace, counted=False, **more)
    for k, direction in enumerate(curves.directions):
        item = curve(
            x,
            curves.losses[k].tolist(),
            name=f"{_label(group)}, {split}, direction {direction}",
            errors=curves.errors[k].tolist(),
            dash=dash if curves.random else PAGE_DASHES[k % len(PAGE_DASHES)],
            width=0.7 if curves.random else 1.7,
            dots=not curves.random,
            **style,
        )
        if curves.random:
            # Error bars of many curves would hide them.
            trace = {key: value for key, value in item.trace.items() if key != "error_y"}
            item = replace(item, trace=trace | {"opacity": 0.6, "showlegend": False})
        yield item
    if curves.random:
        mean = Profile.of(curves.losses).mean.tolist()
        name = f"{_label(group)}, {split}: mean"
        yield curve(x, mean, name=name, dash=dash, width=2.4, dots=False, **style)
