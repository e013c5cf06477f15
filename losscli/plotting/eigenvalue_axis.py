"""Axes of eigenvalues, which have both signs and several sizes."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from losscli.plotting.style import (
    SMALLEST,
    extent,
    format_number,
    linear_ticks,
    scale_symlog,
)

__all__ = ["LINE", "scale_eigenvalues"]

LINE = "#9a9a9a"
"""Colour of reference lines, such as zero."""

# Above this ratio of positive to negative range, or the reverse, an axis is symlog.
_UNEVEN_RATIO = 20.0


def scale_eigenvalues(axes: Axes, which: Literal["x", "y"], values: NDArray[np.float64]) -> str:
    """Scales an axis of eigenvalues so that it includes zero, and draws a line at zero.

    The axis is linear around zero and logarithmic beyond (symlog) if the eigenvalues of one sign
    are far smaller than those of the other, or most are far smaller than the largest.

    Returns:
        The scale in words for the label of the axis; empty if it is linear.
    """
    (axes.axhline if which == "y" else axes.axvline)(0, color=LINE, lw=1.1, zorder=1.5)
    axis = axes.yaxis if which == "y" else axes.xaxis
    set_limits = axes.set_ylim if which == "y" else axes.set_xlim
    low, high = extent(np.append(values, 0.0)) if values.size else (-1.0, 1.0)
    linear = _linear_part(values)
    if not linear:
        room = 0.06 * (high - low)
        set_limits(low - room, high + room)
        linear_ticks(axis)
        return ""
    scale_symlog(axes, which, low, high, linear=linear)
    return f"log beyond ±{format_number(linear)}"


def _linear_part(values: NDArray[np.float64]) -> float:
    """Returns the linear range around zero of a symlog axis; 0 for a linear axis."""
    largest = float(np.abs(values).max(initial=0.0))
    # Values more than four powers of ten below the largest are treated as zero.
    least = max(1e-4 * largest, SMALLEST)
    sizes = np.abs(values[np.abs(values) > least])
    if not sizes.size:
        return 0.0
    sides = (float(-values.min()), float(values.max()))
    smaller = min(side for side in sides if side > least)
    typical = float(np.quantile(sizes, 0.25))
    if largest <= _UNEVEN_RATIO * smaller and largest <= 100 * typical:
        return 0.0
    return float(10.0 ** math.floor(math.log10(max(min(smaller, typical), least))))
