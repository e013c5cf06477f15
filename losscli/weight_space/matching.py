"""Matching: permuting the hidden units of one network to match another network.

By weights, algorithm 1 of Ainsworth, Hayase & Srinivasa 2022 (arXiv 2209.04836) maximises
Σ ⟨A_w, P B_w⟩ over all weights. The permutation of one group, with all others fixed, is the
solution of a linear assignment problem. The groups are optimised in turn until none improves.

By activations, the sum of the correlations of matched units is maximised (Li et al. 2015, arXiv
1511.07543; Tatro et al. 2020, arXiv 2009.02439). A permutation of other groups does not change the
activations of a group, so each group is one linear assignment problem.
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

__all__ = ["Matching", "inner_product", "match", "match_units"]

# A gain below this share of ‖A‖ ‖B‖ is a rounding error.
_ROUNDING = 1e-13

# Number of values that are converted to float64 at once.
_PIECE = 1 << 22


@dataclass(frozen=True)
class Matching:
    """The result of weight matching.

    Attributes:
        permutations: For each group the index of B's unit at each new position, ``[units]``.
        products: Σ ⟨A_w, P B_w⟩ over the tensors of all groups: the initial value, and the value
            after each improvement.
        sweeps: Number of passes over all groups; the last pass has no improvement.
    """

    permutations: tuple[Tensor, ...]
    products: tuple[float, ...]
    sweeps: int


def inner_product(a: Weights, b: Weights, names: Sequence[str]) -> float:
    """Computes ⟨A, B⟩ over the named tensors in float64."""
    return math.fsum(float(x.dot(y)) for name in names for x, y in pieces(a[name], b[name]))


def match(
    a: Weights, b: Weights, groups: Sequence[Group], names: Sequence[str], *, seed: int = 0
) -> Matching:
    """Permutes the units of B to match those of A.

    Coordinate ascent that starts at B and visits the groups in a new random order on every pass,
    until no group improves. If a group is on two axes of one tensor, as in a recurrent layer, its
    problem is not linear: the problem linearised at the current permutation is solved, and its
    solution is accepted if the sum increases. The result is a local optimum.

    Args:
        a: The tensors of A.
        b: The tensors of B.
        groups: The groups.
        names: Names of the tensors to use, with one name per tied tensor.
        seed: Random seed of the order of the groups.

    Returns:
        The matching.
    """
    generator = torch.Generator().manual_seed(seed)
    current: Mapping[str, Tensor] = b
    permutations = [torch.arange(group.size) for group in groups]
    group_names = [[n for n in group.names if n in set(names)] for group in groups]
    all_names = list(dict.fromkeys(n for members in group_names for n in members))
    products = [inner_product(a, b, all_names)]
    sweeps, improved = 0, True
    while improved:
        sweeps, improved = sweeps + 1, False
        for g in torch.randperm(len(groups), generator=generator).tolist():
            group, members = groups[g], group_names[g]
            similarity = _similarity(a, current, group, members)
            _, columns = linear_sum_assignment(similarity.numpy(), maximize=True)
            step = torch.from_numpy(columns)
            moved = permute({n: current[n] for n in group.names if n in current}, [group], [step])
            gain = inner_product(a, moved, members) - inner_product(a, current, members)
            if gain > _ROUNDING * norm(a, members) * norm(current, members):
                current = {**current, **moved}
                permutations[g] = permutations[g][step]
                products.append(products[-1] + gain)
                improved = True
    return Matching(tuple(permutations), tuple(products), sweeps)


def match_units(correlations: Tensor, dead_a: Tensor, dead_b: Tensor) -> Tensor:
    """Matches the units of one group by their correlations.

    Units with no variance have no correlation. They are matched in their order, with each other
    and, where one network has more of them, with the units that are left.

    Args:
        correlations: The correlation of each unit of A with each unit of B, ``[units, units]``.
        dead_a: Which units of A have no variance, ``[units]``.
        dead_b: Which units of B have no variance, ``[units]``.

    Returns:
        The index of B's unit at each new position, ``[units]``.
    """
    alive_a, alive_b = (torch.nonzero(~dead).squeeze(1) for dead in (dead_a, dead_b))
    rows, columns = linear_sum_assignment(correlations[alive_a][:, alive_b].numpy(), maximize=True)
    permutation = torch.full((len(dead_a),), -1)
    permutation[alive_a[rows]] = alive_b[columns]
    left = torch.ones(len(dead_b), dtype=torch.bool)
    left[alive_b[columns]] = False
    permutation[permutation < 0] = torch.nonzero(left).squeeze(1)
    return permutation


def _similarity(a: Weights, b: Weights, group: Group, names: Sequence[str]) -> Tensor:
    """Returns ⟨unit of A, unit of B⟩ for all pairs, ``[units, units]``, in float64."""
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
            part = slice(start, start + width)
            total += x[:, part].to(torch.float64) @ y[:, part].to(torch.float64).T
    return total
