"""Where on a line the loss is not finite, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["places_not_finite"]

_MOST = 3


def places_not_finite(alphas: Sequence[float], losses: Sequence[float]) -> str:
    """Describes at which points of a line the loss is not finite, for example ``from α = 1.2``.

    Args:
        alphas: The P points, ascending.
        losses: The mean losses, ``[P]``, at least one of them not finite.

    Returns:
        The runs of neighbouring points; ``at every α`` if none is finite. A run that reaches the
        first or the last point has no bound there.
    """
    last = len(alphas) - 1
    lost = [not math.isfinite(loss) for loss in losses]
    starts = [i for i, own in enumerate(lost) if own and (i == 0 or not lost[i - 1])]
    ends = [i for i, own in enumerate(lost) if own and (i == last or not lost[i + 1])]
    runs = []
    for start, end in zip(starts, ends, strict=True):
        low, high = f"{alphas[start]:.4g}", f"{alphas[end]:.4g}"
        if (start, end) == (0, last):
            runs.append("at every α")
        elif end == last:
            runs.append(f"from α = {low}")
        elif start == 0:
            runs.append(f"up to α = {high}")
        else:
            runs.append(f"at α = {low}" if start == end else f"from α = {low} to {high}")
    more = f" and {len(runs) - _MOST} more" if len(runs) > _MOST else ""
    return ", ".join(runs[:_MOST]) + more
