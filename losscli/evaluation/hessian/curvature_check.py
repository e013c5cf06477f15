"""Compares gradients and Hessian-vector products with finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from losscli.data import Split
from losscli.errors import ModelError
from losscli.evaluation.finite_differences import (
    CURE,
    DETACHED,
    NEEDED,
    POINTS,
    Comparison,
    Differences,
    are_verified,
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

_Step = tuple[str, Weights, Weights, Tensor]


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
        length = norm(point) or 1.0
        directions = {name: v for name, v in directions.items() if bool(v.isfinite().all())}
        number = max(POINTS, len(directions) + NEEDED)
        steps = partial(_steps, curvature, point, directions, number, seed)

        def gradient(at: Weights) -> Tensor:
            return Curvature(objective, at, names, sample).gradient().unsqueeze(0)

        slopes, wrong_slopes = _compare_slopes(first_rule, curvature, length, steps(), number)
        products: list[Comparison] = []
        wrong_products = []
        verified = are_verified(slopes)
        # If the rule never calls a product wrong, unverified slopes make the comparison useless.
        useful = verified or second_rule.wrong < math.inf
        compares = twice and len(wrong_slopes) < NEEDED and useful
        for name, step, base, flat in steps() if compares else ():
            if name in wrong_slopes:
                continue
            at = Curvature(objective, base, names, sample)
            product, gradients = at.product(flat), at.gradient()
            size = max(float(gradients.norm()), abs(at.loss) / length)
            comparison = second_rule.compare(product, size, _along(gradient, base, step))
            products.append(comparison)
            if comparison.limit is not None:
                computed, limit = (float(x @ flat) / length**2 for x in (product, comparison.limit))
                wrong_products.append(
                    f"{name} is {computed:.3g}, but {limit:.3g} by differences of the gradient"
                )
            if second_rule.decides(products, number - len(wrong_slopes) - len(products)):
                break
        if len(wrong_products) >= NEEDED:
            # Wrong products may come from a wrong gradient that longer steps did not show.
            rule = finer(first_rule)
            _, wrong_slopes = _compare_slopes(rule, curvature, length, steps(), number)
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
    return "" if not twice or are_verified(products) else unverified("Hessian", "gradient")


def _compare_slopes(
    rule: Differences,
    curvature: Curvature,
    length: float,
    steps: Iterable[_Step],
    number: int,
) -> tuple[Sequence[Comparison], dict[str, str]]:
    """Compares gradients with differences of the loss along as many directions as needed.

    Returns:
        The comparisons, and a description of each wrong slope by the name of its direction.
    """
    objective, sample = curvature.objective, curvature.split

    def losses(at: Weights) -> Tensor:
        return objective.plain(at, {"": sample})[""].losses[0]

    slopes: list[Comparison] = []
    wrong = {}
    for name, step, base, flat in steps:
        at = Curvature(objective, base, curvature.names, sample)
        slope, size = at.gradient() @ flat, abs(at.loss)
        comparison = rule.compare(slope.cpu(), size, _along(losses, base, step))
        slopes.append(comparison)
        if comparison.limit is not None:
            computed, limit = (float(x) / length for x in (slope, comparison.limit))
            wrong[name] = f"{name} is {computed:.3g}, but {limit:.3g} by differences of the loss"
        if rule.decides(slopes, number - len(slopes)):
            break
    return slopes, wrong


def _along(
    function: Callable[[Weights], Tensor], base: Weights, step: Weights
) -> Callable[[float], Tensor]:
    return lambda multiple: function(displaced(base, step, multiple))


def _steps(
    curvature: Curvature,
    point: Weights,
    directions: Mapping[str, Tensor],
    number: int,
    seed: int,
) -> Iterator[_Step]:
    """Makes the steps that are compared, the same in every call, and one at a time to save memory.

    The first are along the given directions, the others along random ones.

    Yields:
        The name of the direction, a step with the norm of the weights, the point at which it is
        compared, and the step as ``[n]``.
    """
    generator = torch.Generator().manual_seed(seed)
    length = norm(point) or 1.0

    def named() -> Iterator[tuple[str, Weights]]:
        for name, v in directions.items():
            parts = curvature.named(v)
            step = {n: part.to(point[n]) * length for n, part in parts.items()}
            yield f"the eigenvector of {name}", step
        for k in range(number - len(directions)):
            yield f"random direction {k + 1}", random_step(point, generator)

    for name, step in named():
        base = displaced(point, random_step(point, generator), _OFFSET)
        flat = torch.cat([t.reshape(-1).double() for t in step.values()])
        yield name, step, base, flat.to(curvature.device)
