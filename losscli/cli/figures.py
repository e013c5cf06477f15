"""Figures that a command writes: how many panels they may have, and their bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from losscli.errors import UsageError
from losscli.studies.registry import Panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["check_curve_count", "check_panel_count", "render_files"]

# Laying out more panels takes minutes, and more curves cannot be told from each other.
_MOST_PANELS = 24
_MOST_CURVES = 200


def check_panel_count(panels: Panels, splits: int, metrics: int, cure: str) -> None:
    """Checks that a figure has no more panels and curves than it can show.

    Args:
        panels: What it has a panel for.
        splits: The number of splits.
        metrics: The number of metrics.
        cure: What to do if there are too many.

    Raises:
        UsageError: There are too many.
    """
    number = {"metrics": metrics, "splits": splits, "tensors": 1}[panels]
    if number > _MOST_PANELS:
        raise UsageError(
            f"a picture has panels for {_MOST_PANELS} {panels}, and not {number}", cure
        )
    check_curve_count(splits, cure)


def check_curve_count(curves: int, cure: str) -> None:
    """Checks that a figure has no more curves than it can show.

    Args:
        curves: One for each split, those of all runs together.
        cure: What to do if there are too many.

    Raises:
        UsageError: There are too many.
    """
    if curves > _MOST_CURVES:
        raise UsageError(f"a picture has room for {_MOST_CURVES} curves, and not {curves}", cure)


def render_files(figure: Callable[[], Figure], paths: Sequence[Path]) -> dict[Path, bytes]:
    """Renders a figure in the format of each file.

    Args:
        figure: Draws it; called for each file, since rendering changes a figure.
        paths: The files.

    Returns:
        What each file is to hold.
    """
    if not paths:
        return {}
    from losscli.plotting.style import render

    return {path: render(figure(), path.suffix) for path in paths}
