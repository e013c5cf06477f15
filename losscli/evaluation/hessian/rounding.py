"""The effect of rounding on the eigenvalues of a Hessian."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from losscli.data import Split
from losscli.evaluation.finite_differences import noise_of
from losscli.evaluation.hessian.curvature import Curvature
from losscli.evaluation.hessian.eigenvalues import Extremes
from losscli.evaluation.objective import Objective
from losscli.evaluation.perturbation import nearby
from losscli.weight_space.vectors import Weights

__all__ = ["add_rounding", "hessian_rounding"]

# Standard deviations that bound the rounding.
_DEVIATIONS = 3

# Random vectors with which the rounding of a whole Hessian is measured.
_PROBES = 8


def add_rounding(
    extremes: Extremes,
    objective: Objective,
    precise: Objective | None,
    weights: Weights,
    names: Sequence[str],
    sample: Split,
    *,
    whole: bool,
    seed: int,
    operator: Callable[..., Curvature] = Curvature,
) -> Extremes:
    """Adds the rounding of Hessian-vector products to the errors of eigenvalues.

    With H the exact Hessian and H' that of the forward type, ‖Hv - λv‖ <= ‖H'v - λv‖ + ‖(H' - H)v‖.
    If activations cancel, the second term is far above √n ε. It is measured against float64 if
    possible, else estimated from the fourth difference of H'v near the point. The estimate misses
    rounding that is the same at all these points.

    Measured on a sample of the examples, it is doubled: random rounding is smaller on all examples,
    systematic rounding is the same.

    Args:
        extremes: The eigenvalues from products of the forward type.
        objective: Computes in the forward type.
        precise: The same objective in float64; None if there is none.
        weights: The point: all tensors of the model; they are loaded in the end.
        names: The differentiated parameters.
        sample: Some examples.
        whole: Whether these are all examples.
        seed: Of the direction of the nearby points.
        operator: The matrix H.

    Returns:
        The eigenvalues with larger errors.
    """
    pairs = [*extremes.smallest, *extremes.largest]

    def products(objective: Objective, point: Weights) -> Tensor:
        with operator(objective, point, names, sample) as curvature:
            return curvature.product(torch.stack([pair.vector for pair in pairs]))

    if precise is None:
        points = nearby(weights, names, objective.factor_type, seed)
        rounding = _noise_bound([products(objective, point) for point in points])
    else:
        rounding = (products(objective, weights) - products(precise, weights)).norm(dim=1)
    objective.load(weights)
    rounding *= 1 if whole else 2
    return extremes.widened(*rounding.tolist())


def hessian_rounding(
    objective: Objective,
    weights: Weights,
    names: Sequence[str],
    sample: Split,
    *,
    whole: bool,
    seed: int,
) -> float:
    """Estimates a bound of the rounding errors of the eigenvalues of a whole Hessian.

    No eigenvalue moves by more than ‖E‖₂ <= ‖E‖_F with E = H' - H (Weyl). For standard normal v,
    E‖Ev‖² = ‖E‖_F², so a few products estimate it. Their rounding is measured as in `add_rounding`
    without float64.

    Class probabilities p are rounded by up to ε whatever p(1 - p) is, and saturated ones by the
    same amount at all nearby points. So with ∂z/∂θ the Jacobian of the logits, H is known to
    ε ‖∂z/∂θ‖_F², averaged over examples, at best.

    Args:
        objective: Computed the Hessian.
        weights: The point: all tensors of the model; they are loaded in the end.
        names: The differentiated parameters.
        sample: Some examples.
        whole: Whether these are all examples.
        seed: Of the vectors and of the direction of the nearby points.

    Returns:
        The bound.
    """
    generator = torch.Generator().manual_seed(seed)
    products: list[Tensor] = []
    saturated = 0.0
    for point in nearby(weights, names, objective.factor_type, seed):
        with Curvature(objective, point, names, sample) as curvature:
            if not products:
                shape = _PROBES, curvature.size
                vectors = torch.randn(shape, generator=generator, dtype=torch.float64)
                if sample.has_classes:
                    unit = torch.finfo(objective.dtype).eps
                    saturated = unit * curvature.squared_jacobian(generator)
            products.append(curvature.product(vectors))
    objective.load(weights)
    rounding = float(_noise_bound(products).square().mean().sqrt())
    return saturated + (rounding if whole else 2 * rounding)


def _noise_bound(products: Sequence[Tensor]) -> Tensor:
    """Estimates a bound of the rounding of K products, ``[K]``, from those at `nearby` points."""
    noise = [noise_of([v[None] for v in row]) for row in zip(*products, strict=True)]
    return _DEVIATIONS * torch.tensor(noise)
