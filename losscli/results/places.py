"""Where on a line the loss is not finite, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from losscli.wording import list_first

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
    runs = []
    for finite, group in groupby(range(len(alphas)), key=lambda i: math.isfinite(losses[i])):
        places = list(group)
        low, high = f"{alphas[places[0]]:.4g}", f"{alphas[places[-1]]:.4g}"
        if finite:
            continue
        if len(places) == len(alphas):
            runs.append("at every α")
        elif places[-1] == len(alphas) - 1:
            runs.append(f"from α = {low}")
        elif places[0] == 0:
            runs.append(f"up to α = {high}")
        else:
            runs.append(f"at α = {low}" if len(places) == 1 else f"from α = {low} to {high}")
    return list_first(runs, _MOST)
