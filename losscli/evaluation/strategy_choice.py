"""Chooses how points are evaluated: the fastest strategy with the numbers of the plain one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from losscli.errors import LossError, ModelError
from losscli.evaluation.forward import HALF, is_registered
from losscli.evaluation.memory import halving
from losscli.evaluation.objective import AGREEMENT, Objective, is_close
from losscli.evaluation.strategies import Loaded, NothingSharedError, Strategy, is_known
from losscli.weight_space.slices import Slice

__all__ = ["candidates", "choose_strategy", "find_strategy"]

# Examples on which a strategy is compared with the plain one.
_PROOF_EXAMPLES = 256

# How far the losses of a strategy may be from those of the plain one, as a share, where BatchNorm's
# statistics are estimated too: the rounding of every layer is passed on to the next.
_AGREE_ON_ESTIMATES = {torch.float64: 1e-8, torch.float32: 1e-3, **dict.fromkeys(HALF, 0.3)}

# Above this size a model has no second copy, and few enough points at once that none is missed.
_LARGE_BYTES = 64 << 20


def choose_strategy(
    objective: Objective, slice_: Slice, coordinates: Sequence[Sequence[float]]
) -> None:
    """Chooses how points are evaluated; out of memory, for fewer points, then for half the batch.

    Args:
        objective: What will be evaluated.
        slice_: The slice.
        coordinates: The points.
    """
    for few in (coordinates, [coordinates[0], coordinates[-1]]):
        try:
            find_strategy(objective, slice_, few)
        except (torch.OutOfMemoryError, MemoryError):
            continue
        return
    halving(objective, lambda: find_strategy(objective, slice_, coordinates[-1:]))


@torch.no_grad()
def find_strategy(
    objective: Objective,
    slice_: Slice,
    coordinates: Sequence[Sequence[float]],
    examples: int = _PROOF_EXAMPLES,
) -> None:
    """Chooses the fastest strategy that gives the numbers of the plain one.

    A few points are evaluated on a part of a batch by loading each plainly, then by every
    strategy from the fastest on until one agrees. The choice is made once, at the first points
    that share a first layer: so it does not depend on the order of slices.

    Args:
        objective: What will be evaluated.
        slice_: The slice.
        coordinates: As many points as will be evaluated at once.
        examples: Examples to prove a strategy on, at most.
    """
    if objective.strategy is not None:
        return
    objective.provisional = None
    moving = sum(objective.tensors[name].nbytes for name in slice_.ends[0])
    if moving > _LARGE_BYTES and not objective.folds:
        # The proof would cost a second copy. Whoever sweeps a line compares its ends anyway.
        objective.strategy = Strategy.BOUND
        return
    name, split = next(iter(objective.splits.items()))
    sample = {name: split.first(min(objective.batch_size, examples)).to(objective.device)}
    few = [tuple(coordinates[i * (len(coordinates) - 1) // 3]) for i in range(4)]
    few = list(dict.fromkeys(few))
    proofs = [(objective.frozen_statistics, AGREEMENT[objective.dtype])]
    if objective.recalibration is not None:
        proofs.append((objective.first_batch_only, _AGREE_ON_ESTIMATES[objective.dtype]))
    own = {n: objective.tensors[n].clone() for layer in objective.statistics for n in layer.names}
    truths = []
    for context, _ in proofs:
        with context():
            truths.append(objective.evaluate(Loaded(objective, slice_, few), sample)[name].losses)
    if own:
        objective.load(own)

    def agrees(proof: int) -> bool:
        context, tolerance = proofs[proof]
        try:
            with context():
                try:
                    found = objective.at(slice_, few, sample)[name].losses
                except NothingSharedError:
                    objective.provisional, objective.strategy = objective.strategy, None
                    objective.proving = False
                    found = objective.at(slice_, few, sample)[name].losses
        except (ModelError, LossError):
            return False
        finally:
            objective.proving = True
        return is_close(found, truths[proof], tolerance)

    objective.proving = True
    try:
        for strategy in candidates(objective):
            objective.strategy, objective.provisional = strategy, None
            if all(map(agrees, range(len(proofs)))):
                return
    except BaseException:
        # Out of memory, say: the strategy that was tried is not one that was proven.
        objective.strategy = objective.provisional = None
        raise
    finally:
        objective.proving = False
    objective.strategy, objective.provisional = Strategy.LOADED, None


def candidates(objective: Objective) -> list[Strategy]:
    """Lists the strategies that may be right for an objective, the fastest first.

    Args:
        objective: The objective.

    Returns:
        The strategies, all of them faster than loading each point plainly.
    """
    if objective.folds:
        return []
    strategies = [Strategy.SHARED, Strategy.BOUND]
    functions = [objective.loss, *objective.metrics.values()]
    known = is_known(objective.model) and all(map(is_registered, functions))
    if objective.device.type == "cpu" and known:
        strategies.insert(0, Strategy.THREADS)
    # Mapped over weights a convolution becomes one of many groups, which is slower than the
    # same convolutions in turn; and on a CPU nothing waits for a launch.
    # And of a module that has two names, functional_call does not put the tensors back.
    modules = list(objective.model.modules())
    twice = len(list(objective.model.named_modules(remove_duplicate=False))) > len(modules)
    if objective.device.type == "cuda" and not twice and not any(map(_convolves, modules)):
        strategies.insert(0, Strategy.STACKED)
    return strategies


def _convolves(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd)
