"""Weight matching: the hidden units of one network put in the order that fits another's best.

Ainsworth, Hayase & Srinivasa 2022 (arXiv 2209.04836), algorithm 1: the permutations of all groups
are to maximise Σ ⟨A_w, P B_w⟩ over all weights. With those of all other groups held, that of one is
a linear assignment problem, and so they are improved in turn until none can be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from losscli.weight_space.permutations import Group, permute
from losscli.weight_space.vectors import Weights, norm, pieces

__all__ = ["Matching", "inner_product", "match"]

# A gain below this share of ‖A‖ ‖B‖ is rounding.
_ROUNDING = 1e-13

# Values of a weight that are in float64 at once.
_PIECE = 1 << 22


@dataclass(frozen=True)
class Matching:
    """What was found.

    Attributes:
        permutations: For each group which of B's units comes to each place, ``[units]``.
        products: Σ ⟨A_w, P B_w⟩ over the weights that any group reaches: as they were, and after
            each improvement.
        sweeps: How often all groups were gone through; in the last one none improved.
    """

    permutations: tuple[Tensor, ...]
    products: tuple[float, ...]
    sweeps: int


def inner_product(a: Weights, b: Weights, names: Sequence[str]) -> float:
    """Computes ⟨A, B⟩ in float64.

    Args:
        a: The one point.
        b: The other.
        names: The tensors that count.

    Returns:
        The sum over all their values.
    """
    return math.fsum(float(x.dot(y)) for name in names for x, y in pieces(a[name], b[name]))


def match(
    a: Weights, b: Weights, groups: Sequence[Group], names: Sequence[str], *, seed: int = 0
) -> Matching:
    """Permutes B's units onto A's.

    Coordinate descent from B as it is, over the groups in a new random order each time, until no
    group improves. Where a group lies on two axes of one tensor, as in a recurrent layer, its
    problem is not linear: the linear one around where it stands is solved, and its solution taken
    where the sum really is larger. The end is a local optimum, not the best of all.

    Args:
        a: A's tensors.
        b: B's.
        groups: The groups.
        names: The tensors that count, each tied one under one name.
        seed: Of the order.

    Returns:
        The matching.
    """
    generator = torch.Generator().manual_seed(seed)
    current: Mapping[str, Tensor] = b
    found = [torch.arange(group.size) for group in groups]
    reached = [[n for n in group.names if n in set(names)] for group in groups]
    reach = list(dict.fromkeys(n for own in reached for n in own))
    products = [inner_product(a, b, reach)]
    sweeps, improved = 0, True
    while improved:
        sweeps, improved = sweeps + 1, False
        for g in torch.randperm(len(groups), generator=generator).tolist():
            group, own = groups[g], reached[g]
            likeness = _likeness(a, current, group, own)
            _, columns = linear_sum_assignment(likeness.numpy(), maximize=True)
            step = torch.from_numpy(columns)
            moved = permute({n: current[n] for n in group.names if n in current}, [group], [step])
            gain = inner_product(a, moved, own) - inner_product(a, current, own)
            if gain > _ROUNDING * norm(a, own) * norm(current, own):
                current = {**current, **moved}
                found[g] = found[g][step]
                products.append(products[-1] + gain)
                improved = True
    return Matching(tuple(found), tuple(products), sweeps)


def _likeness(a: Weights, b: Weights, group: Group, names: Sequence[str]) -> Tensor:
    """The inner product of each unit of A with each of B, over all that belongs to it.

    Returns:
        ``[units, units]`` in float64, A's along the rows.
    """
    total = torch.zeros(group.size, group.size, dtype=torch.float64)
    for member in group.members:
        if member.name not in names:
            continue
        x, y = (
            w[member.name].movedim(member.axis, 0)[member.positions].reshape(group.size, -1)
            for w in (a, b)
        )
        width = max(1, _PIECE // group.size)
        for start in range(0, x.shape[1], width):
            some = slice(start, start + width)
            total += x[:, some].to(torch.float64) @ y[:, some].to(torch.float64).T
    return total
