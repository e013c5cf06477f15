"""Classifies a point of weight space by its gradient and its extreme eigenvalues."""

from __future__ import annotations

import math
from typing import Literal

from losscli.evaluation.hessian.eigenvalues import Eigenpair

__all__ = ["Verdict", "verdict"]

Verdict = Literal["not critical", "saddle", "maximum", "minimum", "undecided"]


def verdict(
    gradient_norm: float, tolerance: float, smallest: Eigenpair, largest: Eigenpair
) -> Verdict:
    """Classifies a point of weight space by its gradient and its eigenvalues alone.

    `losscli.evaluation.hessian.critical_points` requires more: that the loss falls to both sides
    of a saddle, that a minimum is critical to the accuracy of the loss, and that the loss does not
    fall next to it.

    - ``not critical``: ‖∇L‖ > tolerance. The eigenvalues then say nothing about an extremum.
    - ``saddle``: critical, and λ_min + error < 0: a direction of negative curvature exists, because
      vᵀHv = λ_min is negative beyond its error, whether the search converged or not. This is the
      strict saddle of Lee et al. (2016, arXiv 1602.04915): it does not claim that some λ > 0, so
      it includes maxima that could not be proved.
    - ``maximum``: critical, and λ_max + error < 0 with λ_max converged.
    - ``minimum``: critical, and λ_min − error > 0 with λ_min converged. That no smaller eigenvalue
      exists is certain if the whole Hessian was decomposed. After a search it holds if the search,
      from a random start, has found every extreme direction: the residual shows only that some
      eigenvalue is near.
    - ``undecided``: everything else, and any nan.

    Args:
        gradient_norm: ‖∇L‖.
        tolerance: The largest gradient norm of a critical point.
        smallest: λ_min.
        largest: λ_max.

    Returns:
        The verdict.
    """
    figures = gradient_norm, tolerance, smallest.value, smallest.error, largest.value, largest.error
    if any(map(math.isnan, figures)):
        return "undecided"
    if gradient_norm > tolerance:
        return "not critical"
    if largest.converged and largest.value + largest.error < 0:
        return "maximum"
    if smallest.value + smallest.error < 0:
        return "saddle"
    if smallest.converged and smallest.value - smallest.error > 0:
        return "minimum"
    return "undecided"
