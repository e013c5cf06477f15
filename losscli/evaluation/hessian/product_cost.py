"""Measures on one batch how long Hessian-vector products will take."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from losscli.data import Examples
from losscli.evaluation.cost import Clock, timed
from losscli.evaluation.hessian.curvature import DENSE_LIMIT, ROWS_PER_PASS, Curvature
from losscli.evaluation.objective import Objective
from losscli.weight_space.vectors import Weights

__all__ = ["product_seconds"]


def product_seconds(
    objective: Objective,
    weights: Weights,
    names: Sequence[str],
    splits: Collection[Examples],
    clock: Clock,
) -> float:
    """Times a product, from gradients that are kept with their graphs as far as these fit.

    Args:
        objective: The objective that is differentiated.
        weights: A point: all tensors of the model.
        names: The differentiated parameters.
        splits: The splits, each with products of its own.
        clock: The clock.

    Returns:
        Seconds, for all examples of the splits. For a Hessian that is computed as a whole, those
        of a row.
    """
    batch = next(iter(splits)).first(objective.batch_size).to(objective.device)
    given = objective, weights, names, batch
    with objective.frozen_statistics():
        with Curvature(*given, budget=0) as curvature:
            number = ROWS_PER_PASS if curvature.size <= DENSE_LIMIT else 1
            vectors = curvature.gradient().expand(number, -1)
            curvature.product(vectors)  # the first call sets everything up
            fresh = timed(objective, lambda: curvature.product(vectors), clock)
        with Curvature(*given) as curvature:
            for _ in range(2):
                curvature.product(vectors)
            fit = curvature.graphs.most_batches * len(batch)
            kept = timed(objective, lambda: curvature.product(vectors), clock)
    examples = sum(map(len, splits))
    with_graph = sum(min(len(split), fit) for split in splits)
    return (with_graph * kept + (examples - with_graph) * fresh) / len(batch) / number
