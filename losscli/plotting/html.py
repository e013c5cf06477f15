"""Interactive figures: self-contained pages that a browser shows without a network.

A page has one or more views. A view has items: traces of Plotly, with tags by which switches and a
slider choose them. The script in ``page.html`` draws them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.resources import files
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from losscli.plotting.style import (
    INK,
    PALE,
    number_checkpoints,
    plain,
    run_colours,
    run_names,
)
from losscli.plotting.surface import PATH, Grid, colour_stops, limit_notes
from losscli.registry import COLUMN_TYPES, command_of
from losscli.results.drawing import FULL, Drawing
from losscli.results.result import Run, to_json
from losscli.results.summaries import Summary
from losscli.table import Cell, Table

__all__ = [
    "DASHES",
    "Item",
    "Section",
    "View",
    "contours_and_surface",
    "curve",
    "ends",
    "escape",
    "layout_2d",
    "path_items",
    "render_page",
    "render_report",
    "table_view",
    "table_views",
    "transparent",
]

Floats = NDArray[np.float64]

DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
"""The line styles of `losscli.plotting.style.DASHES` in the words of Plotly."""

# Columns of names that distinguish curves.
_NAMED = frozenset({"a", "b", "block", "checkpoint", "direction", "path", "rho", "split"})

_HOVER_COLUMNS = ("checkpoint", "block", "verdict")
_WORDS = {"block": "{} alone", "rho": "ρ = {}"}

# Columns that order checkpoints.
_ORDERS = frozenset({"checkpoint", "step"})

_FEW_POINTS = 15  # up to this many points have a dot each
_GRID = "#e7e7e7"
# Numbers such as 10⁻⁴ instead of 100µ.
_POWERS = {"exponentformat": "power"}


@dataclass(frozen=True)
class Item:
    """A trace of Plotly, and when it is shown.

    Attributes:
        trace: The trace. Its coordinates are the numbers of the tables.
        tags: For each switch that can hide the trace, the value with which it is shown. The value
            of ``quantity`` is one of `View.quantities`.
        hover: The text on a point under the pointer: for each line a label, the key of its
            values in ``more`` or ``trace``, and the key of their standard errors or bounds.
        more: Further values of each point. ``error`` are drawn as error bars of a curve.
        names: The name of each point, ready for Plotly; empty for none.
        at: The position of the slider at which each point is shown; empty for all.
        step: The position of the slider at which the trace is shown; 0 for all. Position 0 of the
            slider shows all checkpoints.
        counted: Whether the notes count the points that are not drawn.
    """

    trace: Mapping[str, Any]
    tags: Mapping[str, str]
    hover: Sequence[tuple[str, str, str]] = ()
    more: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    names: Sequence[Any] = ()
    at: Sequence[int] = ()
    step: int = 0
    counted: bool = True


@dataclass(frozen=True)
class View:
    """Items that share their axes.

    Attributes:
        name: Its name.
        items: The items, from the lowest to the topmost.
        layout: The layout of Plotly.
        quantities: The names of the quantities, and their labels.
        scale: The axis or the colours that show the quantity.
        logarithmic: The quantities that can have a logarithmic scale.
        limited: The quantities of which the scale has the limits of the drawing.
        single: The switches that choose one value at a time.
        slider: The names of the checkpoints; empty for no slider.
        notes: Sentences below the figure.
        colours: The colours from the lowest to the highest value.
        from_zero: Whether the lowest colour is that of 0 on a linear scale.
        decades: How many powers of ten a logarithmic axis shows at first; 0 for all.
    """

    name: str
    items: Sequence[Item]
    layout: Mapping[str, Any]
    quantities: Mapping[str, str]
    scale: Literal["y", "z", "colour"] = "y"
    logarithmic: Sequence[str] = ("loss",)
    limited: Sequence[str] = ("loss",)
    single: Sequence[str] = ("quantity",)
    slider: Sequence[str] = ()
    notes: Sequence[str] = ()
    colours: Sequence[tuple[float, str]] = ()
    from_zero: bool = False
    decades: int = 0


def escape(text: str) -> str:
    """Returns text in one line, with the characters escaped that Plotly reads as markup."""
    return plain(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        title: Its title.
        views: Its views.
        origin: The origin of the numbers: names, and a line of text for each.
    """

    title: str
    views: Sequence[View]
    origin: Sequence[tuple[str, str]]


def render_page(views: Sequence[View], drawing: Drawing) -> str:
    """Renders a page.

    Args:
        views: The views; the first one is shown at first.
        drawing: The title, the limits, and whether the scale is logarithmic at first.

    Returns:
        HTML with all data and scripts in it. Equal views give equal text.
    """
    return _fill({"title": plain(drawing.title), **_page(views, drawing)}, 1)


def render_report(sections: Sequence[Section], drawing: Drawing) -> str:
    """Renders a page with several sections, one below another.

    Args:
        sections: The sections.
        drawing: The title, the limits, and whether the scales are logarithmic at first.

    Returns:
        HTML with all data and scripts in it. Equal sections give equal text.
    """
    pages = [
        {
            "title": plain(section.title),
            **_page(section.views, drawing),
            "origin": [list(map(plain, entry)) for entry in section.origin],
        }
        for section in sections
    ]
    return _fill({"title": plain(drawing.title), "sections": pages}, len(sections))


def _page(views: Sequence[View], drawing: Drawing) -> dict[str, Any]:
    shown = [_as_json(view, drawing) for view in views]
    return {"log": drawing.log, "ylim": drawing.ylim, "views": shown}


def _fill(page: Mapping[str, Any], sections: int) -> str:
    """Fills the template with the data of a page and the elements of so many sections."""
    from plotly.offline import get_plotlyjs

    # In JSON these characters occur in strings only.
    data = to_json(page, indent=None).replace("<", "\\u003c").replace("&", "\\u0026")
    template = files("losscli.plotting").joinpath("page.html").read_text("utf-8")
    before, section, middle = re.split(r"\{section\}\n|\{end\}\n", template)
    # The names of the elements of later sections end in their numbers.
    parts = (section.replace("{k}", f"-{k}" if k else "") for k in range(sections))
    start, rest = middle.split("{page}")
    between, after = rest.split("{plotly}")
    return f"{before}{''.join(parts)}{start}{data}{between}{get_plotlyjs()}{after}"


def _as_json(view: View, drawing: Drawing) -> dict[str, Any]:
    notes = list(view.notes)
    if view.scale != "y" and len({item.tags.get("split") for item in view.items}) > 1:
        notes.append("All splits have the same colours.")
    if view.scale != "y":
        notes += limit_notes(drawing)
    text = {
        "name": plain(view.name),
        "notes": list(map(plain, notes)),
        "slider": list(map(plain, view.slider)),
        "quantities": {plain(name): escape(label) for name, label in view.quantities.items()},
        "logarithmic": list(map(plain, view.logarithmic)),
        "limited": list(map(plain, view.limited)),
    }
    items = [
        asdict(item) | {"tags": {tag: plain(value) for tag, value in item.tags.items()}}
        for item in view.items
    ]
    return asdict(view) | text | {"items": items}


# --- Curves --------------------------------------------------------------------------------------


def layout_2d(x: str, y: str = "", **more: Any) -> dict[str, Any]:
    """Returns the layout of a view by the labels of its axes; ``y`` is that of the quantity."""
    style = {"gridcolor": _GRID, "linecolor": PALE, "showline": True, "zeroline": False}
    style |= {"automargin": True, **_POWERS}
    return {
        **_common(),
        "xaxis": {**style, "title": {"text": escape(x)}},
        "yaxis": {**style, "title": {"text": escape(y)}},
        **more,
    }


def _common() -> dict[str, Any]:
    return {
        "font": {"family": '"DejaVu Sans", Verdana, sans-serif', "size": 13, "color": INK},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "hovermode": "closest",
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.05, "x": 0.0},
        "margin": {"l": 80, "r": 20, "t": 60, "b": 60},
        "showlegend": True,
    }


def curve(
    x: Sequence[float],
    y: Sequence[float],
    *,
    name: str,
    colour: str,
    tags: Mapping[str, str],
    labels: tuple[str, str],
    errors: Sequence[float] = (),
    dash: str = "solid",
    width: float = 1.7,
    dots: bool | None = None,
    **more: Any,
) -> Item:
    """Returns a curve with error bars.

    Args:
        x: The positions.
        y: The values.
        name: The name in the legend.
        colour: The colour.
        tags: See `Item`.
        labels: The labels of the positions and the values.
        errors: The standard errors or bounds of the values; empty for none.
        dash: The line style.
        width: The line width in pixels.
        dots: Whether each point has a dot; by default if there are few.
        **more: Further attributes of the item.

    Returns:
        The item.
    """
    few = len(x) <= _FEW_POINTS if dots is None else dots
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines+markers" if few else "lines",
        "x": list(x),
        "y": list(y),
        "name": escape(name),
        "showlegend": bool(name),
        "line": {"color": colour, "dash": dash, "width": width},
    }
    values = dict(more.pop("more", {}))
    if errors and np.isfinite(errors).any():
        values["error"] = list(errors)
        trace["error_y"] = {"color": transparent(colour, 0.3), "thickness": 2.5, "width": 0}
    x_label, y_label = map(escape, labels)
    hover = [(x_label, "x", ""), (y_label, "y", "error" if "error" in values else "")]
    hover += more.pop("hover", ())
    return Item(trace, tags, hover, values, **more)


def transparent(colour: str, opacity: float) -> str:
    """Returns a colour with an opacity in the words of Plotly."""
    red, green, blue = (int(colour[k : k + 2], 16) for k in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def table_view(
    name: str,
    tables: Sequence[tuple[str, Table]],
    x: str,
    quantities: Mapping[str, str],
    *,
    x_label: str = "",
    short: str = "",
    drawing: Drawing = FULL,
    colours: Callable[[int], list[str]] | None = None,
    marks: Mapping[float, str] | None = None,
    notes: Sequence[str] = (),
    **view: Any,
) -> View:
    """Returns a view of curves: one for each quantity and combination of names in a table.

    Splits have line styles, and other names have colours. Several checkpoints have a slider.

    Args:
        name: The name of the view.
        tables: The table of each run, and the name of the run.
        x: The column of the positions, which gives the order of the points; ``checkpoint`` for the
            numbers of the checkpoints, ``step`` for the steps of paths, ``block`` for the blocks in
            their order, and empty for the ranks of the first quantity.
        quantities: The columns of the quantities, and their labels.
        x_label: The label of the positions; by default their column, or as `number_checkpoints`.
        short: The same in a word.
        drawing: How it is drawn.
        colours: Returns a number of colours; by default those of the drawing.
        marks: Positions with a vertical line, and the text above it.
        notes: Sentences below the figure.
        **view: Further attributes of the view.

    Returns:
        The view.
    """
    names = [name for name, _ in tables]
    if len(set(names)) < len(names):
        names = [f"{name} ({k})" for k, name in enumerate(names, start=1)]
    groups = []
    for run, (_, table) in zip(names, tables, strict=True):
        by = [c for c in table.columns if c in _NAMED - _positions(x)]
        shared = {"run": run} if len(tables) > 1 else {}
        groups += [(shared | tags, rows) for tags, rows in _group(table, by)]
    splits = list(dict.fromkeys(tags.get("split", "") for tags, _ in groups))
    others = list(dict.fromkeys(_without_split(tags) for tags, _ in groups))
    chosen = colours or partial(run_colours, drawing=drawing)
    colour = dict(zip(others, chosen(len(others)), strict=True))
    slider = _Slider.of([table for _, table in tables], x)
    axis = x_label or slider.label or x.replace("_", " ") or "rank of the value"
    items = []
    for tags, rows in groups:
        at = slider.positions(rows, x, next(iter(quantities)))
        order = np.argsort(at, kind="stable")
        order = order[np.isfinite(at[order])]
        words = [_WORDS.get(tag, "{}").format(value) for tag, value in tags.items()]
        shown = [c for c in _HOVER_COLUMNS if c in rows.columns and c not in tags]
        for column, label in quantities.items():
            if column not in rows.columns:
                continue
            errors = next((e for e in _error_columns(column) if e in rows.columns), "")
            item = curve(
                at[order].tolist(),
                np.array(rows.floats(column))[order].tolist(),
                errors=np.array(rows.floats(errors))[order].tolist() if errors else (),
                name=", ".join(words),
                colour=colour[_without_split(tags)],
                dash=DASHES[splits.index(tags.get("split", "")) % len(DASHES)],
                tags={"quantity": column} | {k: v for k, v in tags.items() if k != "checkpoint"},
                labels=(short or axis, label),
                step=slider.step(tags.get("checkpoint")),
                more={c: [escape(str(rows[c][k])) for k in order] for c in shown},
                hover=[(c, c, "") for c in shown],
            )
            items.append(item)
            if x in _ORDERS and slider.names:
                items.append(ring(item, [slider.step(rows[x][k]) for k in order]))
    lines = [
        {"type": "line", "x0": at, "x1": at, "y0": 0, "y1": 1, "yref": "paper",
         "line": {"color": "#9a9a9a", "width": 1}}
        for at in marks or {}
    ]  # fmt: skip
    texts = [
        {"x": at, "y": 1, "yref": "paper", "yanchor": "bottom", "showarrow": False,
         "text": escape(text)}
        for at, text in (marks or {}).items()
    ]  # fmt: skip
    layout = layout_2d(axis, shapes=lines, annotations=texts)
    if x == "block":
        blocks = [escape(str(block)) for block in tables[0][1].unique(x)]
        layout["xaxis"] |= {"tickvals": list(range(len(blocks))), "ticktext": blocks}
    return View(
        name,
        items,
        layout,
        {c: label for c, label in quantities.items() if any(c in t.columns for _, t in tables)},
        slider=slider.names,
        notes=notes if items else ("There are no points",),
        **view,
    )


def ring(item: Item, steps: Sequence[int]) -> Item:
    """Returns a ring around the point that the slider chooses, by the position of each point."""
    trace = {key: item.trace[key] for key in ("type", "x", "y", "z", "name") if key in item.trace}
    mark = {"color": PATH, "size": 14, "symbol": "circle-open", "line": {"width": 2}}
    trace |= {"mode": "markers", "marker": mark, "showlegend": False}
    return replace(item, trace=trace, at=steps, counted=False)


def ends(item: Item, names: Sequence[str], colour: str = PATH) -> list[Item]:
    """Returns an item for the start and one for the end of a path; none without points."""
    marks = []
    for word, at, symbol in (("start", 0, "circle"), ("end", -1, "diamond")) if names else ():
        mark = {"color": "white" if at == 0 else colour, "size": 7, "symbol": symbol}
        trace: dict[str, Any] = {
            "type": item.trace["type"],
            **{key: [item.trace[key][at]] for key in "xyz" if key in item.trace},
            "mode": "markers",
            "marker": mark | {"line": {"color": colour, "width": 2}},
            "name": escape(f"{word}  {names[at]}"),
        }
        marks.append(Item(trace, item.tags, counted=False))
    return marks


def _group(table: Table, by: Sequence[str]) -> Iterator[tuple[dict[str, str], Table]]:
    """Yields the names in some columns, and their rows."""
    if not by:
        yield {}, table
        return
    for names in dict.fromkeys(zip(*(table[c] for c in by), strict=True)):
        rows = table
        for column, value in zip(by, names, strict=True):
            rows = rows.where(column, value)
        yield dict(zip(by, map(str, names), strict=True)), rows


@dataclass(frozen=True)
class _Slider:
    """The positions of a slider over checkpoints or the steps of a path.

    Attributes:
        keys: The checkpoints or steps in their order.
        names: Their names; empty if there are too few for a slider.
        numbers: Their positions on an axis.
        label: The label of these positions; empty if the axis is another one.
    """

    keys: Sequence[Cell]
    names: Sequence[str]
    numbers: Floats
    label: str

    @classmethod
    def of(cls, tables: Sequence[Table], x: str) -> _Slider:
        """Reads the checkpoints of tables, or the steps if these are on the axis."""
        column = "step" if x == "step" else "checkpoint"
        keys = dict.fromkeys(key for t in tables if column in t.columns for key in t[column])
        if x == "step":
            cells = [dict(zip(t["step"], t["checkpoint"], strict=True)) for t in tables]
            steps = sorted(int(key) for key in keys if key is not None)
            # The paths of several runs have different checkpoints at a step.
            names = [str(cells[0][k]) if len(cells) == 1 else f"step {k}" for k in steps]
            numbers, label = np.array(steps, dtype=np.float64), "step of the path"
            return cls(steps, names if len(steps) > 1 else (), numbers, label)
        names = [str(key) for key in keys]
        numbers, label = number_checkpoints(names) if names else (np.empty(0), "")
        label = label if x == "checkpoint" else ""
        return cls(list(keys), names if len(names) > 1 else (), numbers, label)

    def step(self, key: Cell) -> int:
        """Returns the position on the slider; 0 for no key."""
        return 0 if key is None else self.keys.index(key) + 1

    def positions(self, rows: Table, x: str, quantity: str) -> Floats:
        """Returns the positions of rows on the axis; for an empty ``x`` the ranks of a quantity."""
        if x in _ORDERS:
            return np.array([self.numbers[self.step(key) - 1] for key in rows[x]])
        if x == "block":
            return np.array([rows.unique(x).index(name) for name in rows[x]], dtype=np.float64)
        if x:
            return np.array(rows.floats(x))
        ranks = np.argsort(np.argsort(-np.array(rows.floats(quantity)), kind="stable"))
        return ranks.astype(np.float64) + 1.0


def _positions(x: str) -> frozenset[str]:
    """Returns the columns that do not distinguish curves over ``x``."""
    return _ORDERS if x in _ORDERS else frozenset({x})


def _without_split(tags: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(value for tag, value in tags.items() if tag != "split")


def _error_columns(column: str) -> tuple[str, ...]:
    """Returns the names that the column of a quantity's errors or bounds can have."""
    return (f"{column}_stderr", f"{column}_error", *(["error"] if column == "eigenvalue" else []))


# --- Surfaces ------------------------------------------------------------------------------------


def contours_and_surface(
    grids: Mapping[str, Sequence[Grid]],
    paths: Mapping[str, Sequence[Item]],
    quantities: Mapping[str, str],
    *,
    labels: tuple[str, str],
    short: tuple[str, str],
    equal: bool = False,
    **view: Any,
) -> list[View]:
    """Returns a view of values on a grid as a surface, and one as contours.

    Args:
        grids: The values of each split, for each quantity and the columns of their errors.
        paths: For ``surface`` and ``contours``, the items on them.
        quantities: The quantities, and their labels.
        labels: The labels of the coordinates.
        short: The same in few words.
        equal: Whether both coordinates have the same scale.
        **view: Further attributes of the views.

    Returns:
        The views.
    """
    surfaces, contours = [], []
    for quantity, of_splits in grids.items():
        if quantity not in quantities:
            continue
        errors = {g.split: g for e in _error_columns(quantity) for g in grids.get(e, ())}
        for grid in of_splits:
            values = {
                "x": grid.x[:, 0].tolist(),
                "y": grid.y[0].tolist() if grid.y.size else [],
                "z": grid.loss.T.tolist(),
            }
            error = errors.get(grid.split)
            more = {} if error is None else {"error": error.loss.T.tolist()}
            hover = [
                (escape(short[0]), "x", ""),
                (escape(short[1]), "y", ""),
                (escape(quantities[quantity]), "z", "error" if more else ""),
            ]
            trace = {**values, "coloraxis": "coloraxis", "name": escape(grid.split)}
            trace["showlegend"] = False
            lines = {
                "contours": {"coloring": "heatmap"},
                "ncontours": 12,
                "line": {"width": 0.8, "color": "white"},
            }
            tags = {"quantity": quantity, "split": grid.split}
            surfaces.append(Item({"type": "surface", **trace}, tags, hover, more))
            contours.append(Item({"type": "contour", **trace, **lines}, tags, hover, more))
    axis = {"gridcolor": _GRID, "backgroundcolor": "#f7f7f7", "showbackground": True}
    scene = {
        "xaxis": {**axis, "title": {"text": escape(short[0])}},
        "yaxis": {**axis, "title": {"text": escape(short[1])}},
        "zaxis": {**axis, **_POWERS},
        "aspectmode": "manual",
        "aspectratio": {"x": 1.6, "y": 1.36, "z": 1.0},
        # As in the picture: 30° above, 52° to the left.
        "camera": {
            "eye": {"x": 1.07, "y": -1.36, "z": 1.0},
            "projection": {"type": "orthographic"},
        },
    }
    shared = {
        "quantities": quantities,
        "logarithmic": [*quantities],
        "single": ("quantity", "split"),
        "colours": colour_stops(),
        **view,
    }
    flat = layout_2d(*labels)
    if equal:
        flat["yaxis"] |= {"scaleanchor": "x"}
    above = surfaces + list(paths.get("surface", ()))
    beside = contours + list(paths.get("contours", ()))
    return [
        View("surface", above, {**_common(), "scene": scene}, scale="z", **shared),
        View("contours", beside, flat, scale="colour", **shared),
    ]


def path_items(
    coordinates: tuple[Sequence[float], Sequence[float]],
    losses: Mapping[str, Sequence[float]],
    names: Sequence[str],
    *,
    labels: tuple[str, str],
    at: Sequence[int],
    colour: str = PATH,
    name: str = "",
    errors: Mapping[str, Sequence[float]] | None = None,
    more: Mapping[str, tuple[str, Sequence[float]]] | None = None,
) -> dict[str, list[Item]]:
    """Returns checkpoints on a surface, each at the height and in the colour of its own loss.

    Args:
        coordinates: Their two coordinates.
        losses: Their losses on each split.
        names: Their names.
        labels: The labels of the coordinates.
        at: Their positions on the slider.
        colour: The colour of the line that joins them; if empty, each has a letter instead.
        name: The name of the line; by default the number of checkpoints.
        errors: The standard errors of the losses; None if they are unknown.
        more: The labels and values of further columns to show.

    Returns:
        The items for ``surface`` and ``contours``.
    """
    found: dict[str, list[Item]] = {"surface": [], "contours": []}
    further = {key: list(values) for key, (_, values) in (more or {}).items()}
    hover = [(escape(label), key, "") for label, key in zip(labels, "xy", strict=True)]
    after = [(escape(label), key, "") for key, (label, _) in (more or {}).items()]
    for split, loss in losses.items():
        values = {**further, "loss": list(loss)}
        if errors:
            values["error"] = list(errors[split])
        shown = [*hover, ("own loss", "loss", "error" if errors else ""), *after]
        for view, items in found.items():
            solid = view == "surface"
            data: dict[str, Any] = {
                "type": "scatter3d" if solid else "scatter",
                **dict(zip("xy", map(list, coordinates), strict=True)),
                **({"z": list(loss)} if solid else {}),
            }
            tags = {"quantity": "loss", "split": split}
            if colour:
                line = {"color": colour, "width": 6 if solid else 2}
                label = escape(name) or f"path of the {len(names)} checkpoints"
                trace = {**data, "mode": "lines", "name": label, "line": line}
                items.append(Item(trace, tags, counted=False))
            dot = {
                "line": {"color": INK, "width": 1},
                "color": list(loss),
                "coloraxis": "coloraxis",
                "size": 4 if solid else 7,
            }
            trace = {**data, "mode": "markers", "marker": dot, "showlegend": False}
            if not colour:
                letters = {"mode": "markers+text", "text": list("ABCD"[: len(names)])}
                trace |= {**letters, "textposition": "top right"}
            dots = Item(trace, tags, shown, values, list(map(escape, names)), counted=solid)
            items.extend([dots, *(ends(dots, names, colour) if colour else ()), ring(dots, at)])
    return found


# --- Any table -----------------------------------------------------------------------------------


def table_views(runs: Sequence[Run[Summary]], drawing: Drawing = FULL) -> list[View]:
    """Returns the tables of a command as curves: the views of a command without its own.

    Each table is a view over its positions, its checkpoints or else its first column of floats,
    with each further column of floats as a quantity.
    """
    command = command_of(runs[0].table.columns)
    assert command is not None
    views = []
    for name, expected in {"": command.table, **command.further_tables}.items():
        tables = [
            (label, run.more[name] if name else run.table)
            for label, run in zip(run_names(runs), runs, strict=True)
            if not name or name in run.more
        ]
        if not tables or not expected.drawn:
            continue
        floats = [
            column
            for column in tables[0][1].columns
            if column not in {*COLUMN_TYPES, *expected.errors, *_NAMED}
        ]
        first = floats[0] if len(floats) > 1 else ""
        x = expected.position or ("checkpoint" if "checkpoint" in expected.columns else first)
        quantities = {c: c.replace("_", " ") for c in floats if c != x}
        views.append(
            table_view(
                name or command.name,
                tables,
                x,
                quantities,
                drawing=drawing,
                logarithmic=[*quantities],
                limited=("loss", "score"),
            )
        )
    return views
