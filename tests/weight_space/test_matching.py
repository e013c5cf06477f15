"""Weight matching: it never falls, it ends, it finds what is there, and it meets brute force."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from losscli.models import MLP
from losscli.weight_space.matching import Matching, inner_product, match, match_units
from losscli.weight_space.permutations import Group, Member, hidden_units, permute
from losscli.weight_space.tracing import trace
from losscli.weight_space.vectors import Weights, distance, norm
from tests.cases import sample
from tests.networks import NETWORKS, Network

CHOSEN = ("mlp", "maxout", "cnn", "resnet", "dense", "tied", "gpt", "gru")
GROUPED = [network for network in NETWORKS if network.name in CHOSEN]


def parameters(network: Network) -> list[str]:
    return [name for name, _ in network.model().named_parameters()]


def shuffled(network: Network, state: Weights, seed: int) -> tuple[Weights, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    order = [torch.randperm(group.size, generator=generator) for group in network.groups]
    return permute(state, network.groups, order), order


@functools.cache
def groups_of(sizes: str) -> tuple[Group, ...]:
    return hidden_units(trace(MLP(sizes).eval(), (torch.randn(2, 4),))).groups


def check(matching: Matching, a: Weights, b: Weights, groups: tuple[Group, ...], names: list[str]):
    """What holds of every matching."""
    for group, permutation in zip(groups, matching.permutations, strict=True):
        assert permutation.sort().values.tolist() == list(range(group.size))
    products = np.array(matching.products)
    assert (np.diff(products) > 0).all()
    reached = [n for n in names if any(n in group.names for group in groups)]
    aligned = permute(b, groups, matching.permutations)
    assert products[0] == pytest.approx(inner_product(a, b, reached), rel=1e-12, abs=1e-12)
    assert products[-1] == pytest.approx(inner_product(a, aligned, reached), rel=1e-12, abs=1e-12)
    # ‖B − A‖² = ‖A‖² + ‖B‖² − 2 ⟨A, B⟩, and a permutation keeps the norm.
    assert norm(aligned, names) == pytest.approx(norm(b, names), rel=1e-12)
    assert distance(a, aligned, names) <= distance(a, b, names) * (1 + 1e-12)


@pytest.mark.parametrize("network", sample(GROUPED, 2, 4), ids=str)
def test_every_step_reduces_the_distance_of_two_networks_until_none_can(network: Network) -> None:
    a, b = (network.model(seed).state_dict() for seed in (1, 2))
    names = parameters(network)
    matching = match(a, b, network.groups, names)
    check(matching, a, b, network.groups, names)
    assert len(matching.products) > 1
    # Where it ended it stays.
    aligned = permute(b, network.groups, matching.permutations)
    again = match(a, aligned, network.groups, names, seed=7)
    assert len(again.products) == 1
    assert again.sweeps == 1


@pytest.mark.parametrize("network", sample(GROUPED, 1, 4), ids=str)
def test_a_network_that_was_shuffled_is_found_again(network: Network) -> None:
    a = network.model(3).state_dict()
    b, order = shuffled(network, a, 4)
    names = parameters(network)
    assert distance(a, b, names) > 1
    matching = match(a, b, network.groups, names)
    check(matching, a, b, network.groups, names)
    aligned = permute(b, network.groups, matching.permutations)
    assert all(torch.equal(aligned[name], a[name]) for name in a)
    for one, other in zip(order, matching.permutations, strict=True):
        assert torch.equal(one[other], torch.arange(len(one)))


@pytest.mark.parametrize("seed", range(5))
def test_the_matching_of_one_hidden_layer_is_that_of_brute_force(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"layers.0.weight": (6, 4), "layers.0.bias": (6,), "layers.1.weight": (3, 6)}
    a, b = (
        {name: torch.randn(*size, generator=generator) for name, size in sizes.items()}
        for _ in range(2)
    )
    groups = groups_of("4-6-3")
    matching = match(a, b, groups, list(sizes))

    def product(p: tuple[int, ...]) -> float:
        order = list(p)
        w, bias, v = (b[name].double().numpy() for name in sizes)
        x, y, z = (a[name].double().numpy() for name in sizes)
        return float((x * w[order]).sum() + (y * bias[order]).sum() + (z * v[:, order]).sum())

    best = max(itertools.permutations(range(6)), key=product)
    assert matching.permutations[0].tolist() == list(best)
    assert matching.products[-1] == pytest.approx(product(best), rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_it_ends_where_no_change_of_one_layer_helps(seed: int) -> None:
    groups, model = groups_of("4-5-4-3"), MLP("4-5-4-3")
    a, b = (
        {name: torch.randn(t.shape, generator=torch.Generator().manual_seed(10 * seed + s))
         for name, t in model.state_dict().items()}
        for s in (1, 2)
    )  # fmt: skip
    names = list(a)
    matching = match(a, b, groups, names, seed=seed)
    found = [p.tolist() for p in matching.permutations]
    largest = inner_product(a, permute(b, groups, matching.permutations), names)
    for g, group in enumerate(groups):
        for p in itertools.permutations(range(group.size)):
            tried = [torch.tensor(p if i == g else f) for i, f in enumerate(found)]
            other = inner_product(a, permute(b, groups, tried), names)
            assert other <= largest * (1 + 1e-12)


def test_the_order_depends_only_on_the_seed() -> None:
    (network,) = (n for n in NETWORKS if n.name == "gpt")
    a, b = (network.model(seed).state_dict() for seed in (1, 2))
    names = parameters(network)
    one, two = (match(a, b, network.groups, names, seed=5) for _ in range(2))
    assert one.products == two.products
    assert len({match(a, b, network.groups, names, seed=s).products for s in range(3)}) > 1


def test_only_the_tensors_that_count_are_matched_and_all_are_permuted() -> None:
    column = torch.arange(3).unsqueeze(1)
    group = Group(3, (Member("w", 0, column), Member("mean", 0, column)))
    a = {"w": torch.tensor([3.0, 2.0, 1.0]), "mean": torch.tensor([9.0, 5.0, 7.0])}
    b = {"w": torch.tensor([1.0, 2.0, 3.0]), "mean": torch.tensor([1.0, 2.0, 3.0])}
    matching = match(a, b, [group], ["w"])
    aligned = permute(b, [group], matching.permutations)
    assert aligned["w"].tolist() == [3, 2, 1]
    assert aligned["mean"].tolist() == [3, 2, 1]


def test_half_precision_is_summed_in_float64() -> None:
    column = torch.arange(2).unsqueeze(1)
    group = Group(2, (Member("w", 0, column),))
    # In bfloat16 the sums of both orders are the same.
    a = {"w": torch.tensor([[256.0, 1.0], [256.0, 2.0]], dtype=torch.bfloat16)}
    b = {"w": torch.tensor([[1.0, 2.0], [1.0, 1.0]], dtype=torch.bfloat16)}
    matching = match(a, b, [group], ["w"])
    assert matching.products == (516.0, 517.0)
    assert permute(b, [group], matching.permutations)["w"].dtype == torch.bfloat16


@pytest.mark.parametrize(("dead_a", "dead_b"), [((), ()), ((1,), (4,)), ((0, 3), (2,)), ((), (5,))])
def test_correlated_units_meet_brute_force_and_those_without_variance_are_left(
    dead_a: tuple[int, ...], dead_b: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(5)
    correlations = torch.rand(6, 6, generator=generator, dtype=torch.float64) * 2 - 1
    masks = [torch.tensor([i in dead for i in range(6)]) for dead in (dead_a, dead_b)]
    correlations[masks[0]] = 0
    correlations[:, masks[1]] = 0
    permutation = match_units(correlations, *masks).tolist()
    assert sorted(permutation) == list(range(6))
    # Of the fewer units with variance, all are matched with units with variance.
    alive = [(i, j) for i, j in enumerate(permutation) if i not in dead_a and j not in dead_b]
    assert len(alive) == 6 - max(len(dead_a), len(dead_b))

    def total(p: tuple[int, ...]) -> float:
        pairs = [(i, j) for i, j in enumerate(p) if i not in dead_a and j not in dead_b]
        if len(pairs) < len(alive):
            return -np.inf
        return float(sum(correlations[i, j] for i, j in pairs))

    best = max(map(total, itertools.permutations(range(6))))
    assert total(tuple(permutation)) == pytest.approx(best, rel=1e-12)
