"""Chooses the fastest strategy that gives the numbers of loaded points."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from losscli.errors import LossError, ModelError
from losscli.evaluation.forward import is_registered
from losscli.evaluation.memory import halving
from losscli.evaluation.objective import AGREEMENT, Objective, relative_difference
from losscli.evaluation.strategies.base import NothingSharedError, Strategy
from losscli.evaluation.strategies.points import LoadedPoints
from losscli.evaluation.strategies.replicas import is_stateless
from losscli.results.summaries import StrategyChoice
from losscli.weight_space.slices import Slice

__all__ = ["candidates", "choose_strategy", "find_strategy", "record_choice"]

# Examples on which a strategy is compared with loading.
_PROOF_EXAMPLES = 64

# Largest relative difference of the losses where BatchNorm's statistics are estimated too: each
# layer amplifies the rounding of the one before.
_AGREEMENT_ON_ESTIMATES = {
    "float64": 1e-8,
    "float32": 1e-3,
    "tf32": 0.1,
    **dict.fromkeys(("float16", "bfloat16"), 0.3),
}


def choose_strategy(
    objective: Objective, slice_: Slice, coordinates: Sequence[Sequence[float]]
) -> None:
    """Chooses a strategy; if memory runs out, for fewer points, then with half the batch."""
    for few in (coordinates, [coordinates[0], coordinates[-1]]):
        try:
            find_strategy(objective, slice_, few)
        except (torch.OutOfMemoryError, MemoryError):
            continue
        break
    else:
        halving(objective, lambda: find_strategy(objective, slice_, coordinates[-1:]))
    record_choice(objective, slice_)


def record_choice(objective: Objective, slice_: Slice) -> None:
    """Records the strategy that was chosen for a slice, and notes if it is not the fastest.

    The first choice of a run is kept for its summary: a later one, at points where more can be
    tested, is not made again by a run that is resumed.

    Args:
        objective: The objective.
        slice_: The slice.
    """
    if objective.first_choice is not None:
        return
    strategy = objective.strategy_for(slice_.ends[0])
    compared = not objective.is_large(slice_.ends[0])
    difference = objective.difference if compared else None
    choice: StrategyChoice = {"name": strategy.name.lower(), "difference": difference}
    if compared and objective.graph is not None:
        choice["graph"] = objective.graph
    objective.first_choice = choice
    fastest = next(iter(candidates(objective)), strategy)
    if compared and strategy is not fastest:
        objective.add_note(
            f"points are evaluated by the strategy {strategy.name.lower()!r} instead of the faster "
            f"{fastest.name.lower()!r}, which fails with this model or gives other losses"
        )


@torch.no_grad()
def find_strategy(
    objective: Objective,
    slice_: Slice,
    coordinates: Sequence[Sequence[float]],
    examples: int = _PROOF_EXAMPLES,
) -> None:
    """Chooses the fastest strategy that gives the numbers of loaded points.

    A few points are evaluated on a part of a batch by loading each, then by every strategy from the
    fastest on until one agrees. The choice is final only at points that share a first layer, so
    that it does not depend on the order of slices; before that it is provisional. Slices of many
    weights are not compared (`Objective.is_large`), and leave the choice to others.

    Args:
        objective: The objective.
        slice_: The slice.
        coordinates: As many points as will be evaluated at once.
        examples: The most examples to compare on.
    """
    if objective.strategy is not None or objective.is_large(slice_.ends[0]):
        return
    objective.provisional = None
    name, split = next(iter(objective.splits.items()))
    sample = {name: split.first(min(objective.batch_size, examples)).to(objective.device)}
    # One more point than the ends of the slice, so that they share a first layer.
    last = len(slice_.ends)
    few = [tuple(coordinates[i * (len(coordinates) - 1) // last]) for i in range(last + 1)]
    few = list(dict.fromkeys(few))
    precision = objective.precision
    comparisons = [(objective.frozen_statistics, AGREEMENT[precision])]
    if objective.recalibration is not None:
        comparisons.append((objective.first_batch_only, _AGREEMENT_ON_ESTIMATES[precision]))
    own = {n: objective.tensors[n].clone() for layer in objective.statistics for n in layer.names}
    truths = []
    for context, _ in comparisons:
        with context():
            truths.append(
                objective.evaluate(LoadedPoints(objective, slice_, few), sample)[name].losses
            )
    if own:
        objective.load(own)

    def agrees(i: int) -> bool:
        context, tolerance = comparisons[i]
        try:
            with context():
                try:
                    losses = objective.at(slice_, few, sample)[name].losses
                except NothingSharedError:
                    objective.provisional, objective.strategy = objective.strategy, None
                    objective.proving = False
                    losses = objective.at(slice_, few, sample)[name].losses
        except (ModelError, LossError):
            return False
        finally:
            objective.proving = True
        difference = relative_difference(losses, truths[i])
        objective.difference = max(objective.difference or 0.0, difference)
        return difference <= tolerance

    objective.proving = True
    try:
        for strategy in candidates(objective):
            objective.strategy, objective.provisional = strategy, None
            objective.difference = objective.graph = None
            if all(map(agrees, range(len(comparisons)))):
                return
    except BaseException:
        # For example out of memory: the strategy being tried has not been compared.
        objective.strategy = objective.provisional = None
        raise
    finally:
        objective.proving = False
    objective.strategy, objective.provisional = Strategy.LOADED, None
    objective.difference, objective.graph = 0.0, None


def candidates(objective: Objective) -> list[Strategy]:
    """Returns the strategies that are faster than loading each point, the fastest first."""
    if objective.folds:
        return []
    if objective.seeds:
        # Shared results would be those of one seed.
        return [Strategy.BOUND]
    strategies = [Strategy.SHARED, Strategy.BOUND]
    functions = [objective.loss, *objective.metrics.values()]
    stateless = is_stateless(objective) and all(map(is_registered, functions))
    if objective.device.type == "cpu" and stateless:
        strategies.insert(0, Strategy.THREADS)
    # No stack of points for models with convolutions. A convolution with different weights for each
    # of P inputs exists only as a grouped one: vmap moves the points of [P, B, C, h, w] into the
    # channels, [B, P·C, h, w], calls one convolution of P groups and moves them back. So every
    # layer copies its activations, which takes about as long as a layer of few channels, and
    # grouped kernels are slower than P plain ones. A stack of our own would need the same copies.
    # A linear layer has none of this: it becomes a batched product. And vmap has no rules for
    # recurrent layers.
    # A CPU has no launches to save.
    modules = objective.model.modules()
    if objective.device.type == "cuda" and not any(map(_has_no_stack, modules)):
        strategies.insert(0, Strategy.STACKED)
    return strategies


def _has_no_stack(module: nn.Module) -> bool:
    return isinstance(module, (nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase))
