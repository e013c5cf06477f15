"""Points of weight space near another one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from losscli.weight_space.vectors import Weights, norm

__all__ = ["displaced", "nearby", "random_step"]

# Length of the steps over which rounding is measured, as a share of the norm of the weights: so
# long that most numbers are rounded differently, and so short that the fourth difference of a
# smooth function is below its rounding.
_SPREAD = 1e-3

_SPREAD_IN_FLOAT64 = 1e-7


def nearby(
    weights: Weights, names: Sequence[str], dtype: torch.dtype, seed: int
) -> Iterator[Weights]:
    """Generates points near another one, to measure rounding with `noise_of`.

    Args:
        weights: The point: all tensors of the model.
        names: The parameters that move.
        dtype: The type that the factors of products are rounded to.
        seed: Of the random direction.

    Yields:
        Five evenly spaced points; the third is the point itself.
    """
    point = {name: weights[name].to(torch.promote_types(dtype, torch.float32)) for name in names}
    direction = random_step(point, torch.Generator().manual_seed(seed))
    wide = dtype == torch.float64
    step = _SPREAD_IN_FLOAT64 if wide else max(_SPREAD, 4 * torch.finfo(dtype).eps)
    for share in (-1, -0.5, 0, 0.5, 1):
        yield {**weights, **displaced(point, direction, share * step)}


def random_step(point: Weights, generator: torch.Generator) -> dict[str, Tensor]:
    """Draws a step with the norm of the weights, shared among tensors by their norms."""
    length = norm(point) or 1.0
    typical = length / math.sqrt(sum(t.numel() for t in point.values()))
    steps = {
        name: torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)
        * (norm({name: t}) / math.sqrt(t.numel() or 1) or typical)
        for name, t in point.items()
    }
    scale = length / (norm(steps) or 1.0)
    for step in steps.values():
        step.mul_(scale)
    return steps


def displaced(point: Weights, direction: Weights, step: float) -> Weights:
    """Returns the tensors that move, moved by a multiple of a direction."""
    return {name: point[name] + step * t for name, t in direction.items()}
