"""Checks the size of figures and the options of animations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from losscli.errors import UsageError
from losscli.registry import ANIMATIONS, MESH, Panels
from losscli.results.drawing import Drawing

__all__ = [
    "check_animated",
    "check_curve_count",
    "check_panel_count",
    "has_panels",
    "notes_on_pages",
]

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
    """Checks that one of the figures is an animation, as ``--fps`` needs.

    Raises:
        UsageError: None of them is one.
    """
    if not any(path.suffix.lower() in ANIMATIONS for path in figures):
        raise UsageError(
            f"--fps has no effect without a {' or '.join(ANIMATIONS)}",
            "Leave it out, or give --figure x.gif",
        )


def notes_on_pages(figures: Sequence[Path], drawing: Drawing) -> list[str]:
    """Returns notes on the options of a drawing that have no effect on an interactive page."""
    pages = [path for path in figures if path.suffix.lower() == ".html"]
    if not pages:
        return []
    notes = []
    without = ["--size"] * drawing.compact + ["--no-markers"] * drawing.no_markers
    if without:
        verb = "has" if len(without) == 1 else "have"
        notes.append(f"{' and '.join(without)} {verb} no effect on the interactive page {pages[0]}")
    if set(drawing.style) - {"axes.prop_cycle"}:
        notes.append(f"only axes.prop_cycle of --style has an effect on the page {pages[0]}")
    return notes


def check_curve_count(curves: int, cure: str) -> None:
    """Checks that a figure has no more curves, one for each split of each run, than it can show.

    Raises:
        UsageError: There are too many.
    """
    if curves > _MOST_CURVES:
        raise UsageError(f"a figure can show at most {_MOST_CURVES} curves, not {curves}", cure)
