"""Checks the size of figures and renders them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from losscli.errors import UsageError
from losscli.registry import ANIMATIONS, MESH, PATH_MESH, Panels, load
from losscli.results.drawing import FULL, Drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["check_animated", "check_curve_count", "check_panel_count", "has_panels", "render_files"]

# Laying out more panels takes minutes; more curves are indistinguishable.
_MOST_PANELS = 24
_MOST_CURVES = 200


def check_panel_count(panels: Panels, splits: int, metrics: int, cure: str) -> None:
    """Checks that a figure has no more panels and curves than it can show.

    Args:
        panels: What the figure has a panel for.
        splits: The number of splits.
        metrics: The number of metrics.
        cure: How to fix it if there are too many.

    Raises:
        UsageError: There are too many.
    """
    number = {"metrics": metrics, "splits": splits, "tensors": 1}[panels]
    if number > _MOST_PANELS:
        raise UsageError(f"a figure can have at most {_MOST_PANELS} {panels}, not {number}", cure)
    check_curve_count(splits, cure)


def has_panels(path: Path) -> bool:
    """Returns whether a figure has panels side by side: neither a page nor a surface has."""
    return path.suffix.lower() not in {".html", MESH}


def check_animated(figures: Sequence[Path]) -> None:
    """Checks that ``--fps`` has an animation.

    Args:
        figures: The files.

    Raises:
        UsageError: None of them is an animation.
    """
    if not any(path.suffix.lower() in ANIMATIONS for path in figures):
        raise UsageError(
            f"--fps has no effect without a {' or '.join(ANIMATIONS)}",
            "Leave it out, or give --figure x.gif",
        )


def check_curve_count(curves: int, cure: str) -> None:
    """Checks that a figure has no more curves than it can show.

    Args:
        curves: The number of curves: one for each split of each run.
        cure: How to fix it if there are too many.

    Raises:
        UsageError: There are too many.
    """
    if curves > _MOST_CURVES:
        raise UsageError(f"a figure can show at most {_MOST_CURVES} curves, not {curves}", cure)


def render_files(
    figure: Callable[[], Figure],
    html: Callable[[], str],
    animation: Callable[[str], bytes],
    mesh: Callable[[], Mapping[str, str]],
    paths: Sequence[Path],
    drawing: Drawing = FULL,
) -> dict[Path, bytes]:
    """Renders a figure in the format of each file.

    Args:
        figure: Draws the figure; called for each file, since rendering modifies it.
        html: Renders the figure as an interactive page.
        animation: Animates the path in a format, by its suffix.
        mesh: Writes the surface and the path on it, by the ends of their names.
        paths: The files.
        drawing: How the figure is drawn.

    Returns:
        The content of each file.
    """
    contents = {}
    for path in paths:
        suffix = path.suffix.lower()
        if suffix == ".html":
            contents[path] = html().encode()
        elif suffix in ANIMATIONS:
            contents[path] = animation(suffix)
        elif suffix == MESH:
            is_path = path.name.lower().endswith(PATH_MESH)
            contents[path] = mesh()[PATH_MESH if is_path else MESH].encode()
        else:
            contents[path] = load("losscli.plotting.style:render")(figure(), path.suffix, drawing)
    return contents
