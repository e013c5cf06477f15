"""The rounding of a mean loss, measured against float64 or at nearby points."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from losscli.data import Split
from losscli.evaluation.finite_differences import noise_of
from losscli.evaluation.objective import Evaluation, Objective
from losscli.evaluation.perturbation import nearby
from losscli.weight_space.vectors import Weights

__all__ = ["ROUNDING_EXAMPLES", "loss_rounding"]

ROUNDING_EXAMPLES = 256
"""Examples on which rounding is measured."""

# The least rounding of a loss in units of ε, the same as for the extrema of curves.
_ROUNDINGS = 16


def loss_rounding(
    objective: Objective,
    float64: Objective | None,
    weights: Weights,
    names: Sequence[str],
    here: Evaluation,
    sample: tuple[Split, Tensor],
    seed: int,
) -> float:
    """Measures the largest change of the mean loss that may be rounding.

    Where activations cancel, it is much larger than the rounding of the losses themselves.

    Args:
        objective: The objective.
        float64: The same in float64, or the objective itself; None if there is none.
        weights: The point: all tensors of the model; they stay loaded.
        names: The parameters that move.
        here: A split at the point.
        sample: Some examples of the split on the device, and their positions in it.
        seed: Of the points nearby, which are used where there is no wider type.

    Returns:
        The rounding, at least 16 ε times the mean of abs(loss).
    """
    examples, rows = sample
    own = here.losses[0].double()
    least = _ROUNDINGS * torch.finfo(objective.dtype).eps * float(own.abs().mean())
    if float64 is None or float64 is objective:
        near = nearby(weights, names, objective.factor_type, seed)
        losses = [objective.plain(at, {"": examples})[""].losses[0].double() for at in near]
        objective.load(weights)
        return max(least, noise_of(losses))
    exact = float64.plain(weights, {"": examples})[""].losses[0]
    return max(least, float((own[rows] - exact).square().mean().sqrt()))
