"""Compares gradients and Hessian-vector products with finite differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from losscli.data import Examples, Split
from losscli.errors import ModelError
from losscli.evaluation.finite_differences import (
    CURE,
    DETACHED,
    NEEDED,
    POINTS,
    Comparison,
    Differences,
    finer,
    rules,
    sample_size,
    unverified,
)
from losscli.evaluation.hessian.curvature import Curvature
from losscli.evaluation.objective import Objective
from losscli.evaluation.perturbation import displaced, random_step
from losscli.evaluation.precision import in_float64, narrowest_type
from losscli.weight_space.vectors import Weights, norm

__all__ = ["check_derivatives", "float64_copy"]

# Distance from the point at which derivatives are compared, as a share of its norm.
_OFFSET = 0.01


def float64_copy(objective: Objective) -> Objective | None:
    """Returns an objective in float64 with its loaded weights; None if there is none."""
    split = next(iter(objective.splits.values()))
    sample, _ = split.spread(sample_size(objective))
    return in_float64(objective, sample.to(objective.device), inside=True)


def check_derivatives(
    objective: Objective,
    weights: Weights,
    names: Sequence[str],
    sample: Split,
    directions: Mapping[str, Tensor],
    seed: int,
    *,
    twice: bool = True,
) -> str:
    """Compares gradients with differences of the loss, and products with those of the gradient.

    The comparison is made near the point, 1 % of the norm of the weights away in a random
    direction, because at special points, such as zero weights, a network has kinks. It is made
    along the given directions and along random ones, four in all. At least two are random: an
    eigenvector of a wrong Hessian may be orthogonal to the error.

    Args:
        objective: The model, the loss and the data, in float64 where possible.
        weights: The point: all tensors of the model; they are loaded in the end.
        names: The differentiated parameters.
        sample: A few examples.
        directions: Unit vectors ``[n]`` by name.
        seed: Of the random directions.
        twice: Whether products with the Hessian are compared too.

    Returns:
        A note on what could not be verified; empty if everything was.

    Raises:
        ModelError: Derivatives contradict differences along two directions or more.
    """
    objective.load(weights)
    first_rule, second_rule = rules(narrowest_type(objective, sample))
    with Curvature(objective, weights, names, sample) as curvature:
        point = {name: objective.tensors[name].detach().clone() for name in names}
        finite = {
            f"the eigenvector of {name}": v
            for name, v in directions.items()
            if bool(v.isfinite().all())
        }
        steps = _Steps(curvature, point, finite, seed)
        slopes, wrong_slopes = _compare_slopes(first_rule, steps)
        products: list[Comparison] = []
        wrong_products = []
        verified = first_rule.verifies(slopes)
        # If the rule never calls a product wrong, unverified slopes make the comparison useless.
        useful = verified or second_rule.wrong < math.inf
        left = [name for name in steps.names if name not in wrong_slopes]
        for name in left if twice and len(wrong_slopes) < NEEDED and useful else ():
            comparison, wrong = _compare_product(second_rule, steps, name)
            products.append(comparison)
            if wrong:
                wrong_products.append(wrong)
            if second_rule.decides(products, len(left) - len(products)):
                break
        if len(wrong_products) >= NEEDED:
            # Wrong products may come from a wrong gradient that longer steps did not show.
            rule = finer(first_rule)
            _, wrong_slopes = _compare_slopes(rule, steps)
    objective.load(weights)
    if len(wrong_slopes) >= NEEDED:
        raise ModelError(
            f"{DETACHED}: slope along {next(iter(wrong_slopes.values()))}",
            f"{CURE}, or leave out with --except the tensors that they affect",
        )
    if len(wrong_products) >= NEEDED:
        raise ModelError(
            f"the second derivative is wrong: curvature along {wrong_products[0]}",
            "Write operators with a custom backward in elementary operations",
        )
    if not verified:
        return unverified("gradient and Hessian" if twice else "gradient", "loss")
    return "" if not twice or second_rule.verifies(products) else unverified("Hessian", "gradient")


@dataclass(frozen=True)
class _Steps:
    """The steps along which derivatives are compared, made when they are needed to save memory.

    Attributes:
        curvature: The derivatives at the point.
        point: The differentiated parameters.
        directions: The unit vectors ``[n]`` that were given, by name.
        seed: Of the random directions.
    """

    curvature: Curvature
    point: Weights
    directions: Mapping[str, Tensor]
    seed: int

    @cached_property
    def length(self) -> float:
        """The norm of every step, which is that of the weights; 1 if it is 0."""
        return norm(self.point) or 1.0

    @cached_property
    def names(self) -> Sequence[str]:
        """The names of the steps: along the given directions, then along random ones."""
        number = max(NEEDED, POINTS - len(self.directions))
        return [*self.directions, *(f"random direction {k + 1}" for k in range(number))]

    def make(self, name: str) -> tuple[Weights, Weights]:
        """Makes a step, and the point at which it is compared."""
        generator = torch.Generator().manual_seed(self.seed + self.names.index(name))
        if name in self.directions:
            parts = self.curvature.named(self.directions[name])
            step = {n: part.to(self.point[n]) * self.length for n, part in parts.items()}
        else:
            step = random_step(self.point, generator)
        return step, displaced(self.point, random_step(self.point, generator), _OFFSET)

    def flat(self, step: Weights) -> Tensor:
        """Returns a step as ``[n]``."""
        flat = torch.cat([t.reshape(-1).double() for t in step.values()])
        return flat.to(self.curvature.device)


def _compare_slopes(
    rule: Differences, steps: _Steps
) -> tuple[Sequence[Comparison], dict[str, str]]:
    """Compares gradients with differences of the loss along as many directions as needed.

    Returns:
        The comparisons, and a description of each wrong slope by the name of its direction.
    """
    slopes: list[Comparison] = []
    wrong = {}
    for name in steps.names:
        comparison, description = _compare_slope(rule, steps, name)
        slopes.append(comparison)
        if description:
            wrong[name] = description
        if rule.decides(slopes, len(steps.names) - len(slopes)):
            break
    return slopes, wrong


def _compare_slope(rule: Differences, steps: _Steps, name: str) -> tuple[Comparison, str]:
    """Compares a slope with differences of the loss; describes a wrong one."""
    step, base = steps.make(name)
    objective, names, sample = _differentiated(steps)

    def loss(multiple: float) -> Tensor:
        return objective.plain(displaced(base, step, multiple), {"": sample})[""].losses[0]

    at = Curvature(objective, base, names, sample)
    gradient = at.gradient()
    slope = gradient @ steps.flat(step)
    comparison = rule.compare(slope.cpu(), abs(at.loss), loss)
    if comparison.limit is None:
        return comparison, ""
    computed, limit = (float(x) / steps.length for x in (slope, comparison.limit))
    return comparison, f"{name} is {computed:.3g}, but {limit:.3g} by differences of the loss"


def _compare_product(rule: Differences, steps: _Steps, name: str) -> tuple[Comparison, str]:
    """Compares a Hessian-vector product with differences of the gradient; describes a wrong one."""
    step, base = steps.make(name)
    objective, names, sample = _differentiated(steps)

    def gradient(multiple: float) -> Tensor:
        there = displaced(base, step, multiple)
        return Curvature(objective, there, names, sample).gradient().unsqueeze(0)

    at, flat = Curvature(objective, base, names, sample), steps.flat(step)
    product = at.product(flat)
    size = max(float(at.gradient().norm()), abs(at.loss) / steps.length)
    comparison = rule.compare(product, size, gradient)
    if comparison.limit is None:
        return comparison, ""
    computed, limit = (float(x @ flat) / steps.length**2 for x in (product, comparison.limit))
    return comparison, f"{name} is {computed:.3g}, but {limit:.3g} by differences of the gradient"


def _differentiated(steps: _Steps) -> tuple[Objective, Sequence[str], Examples]:
    curvature = steps.curvature
    return curvature.objective, curvature.names, curvature.split
