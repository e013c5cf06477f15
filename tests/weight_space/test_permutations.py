"""Groups of hidden units: no permutation of them changes the function, and none is lost."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from losscli.errors import ModelError
from losscli.weight_space.axes import Axis, concatenate, cut, multiply, pin, regroup, tie, units
from losscli.weight_space.permutations import Group, Member, hidden_units, obstacles, permute
from losscli.weight_space.tracing import trace
from tests import foreign
from tests.cases import sample
from tests.networks import NETWORKS, Network, Random


def change(network: Network, groups: tuple[Group, ...], seed: int = 1) -> float:
    """How much a random permutation changes the outputs, as a share of the largest."""
    model = network.model()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    permutations = [torch.randperm(group.size, generator=generator) for group in groups]
    with torch.no_grad():
        before = model(network.x)
        model.load_state_dict(permute(state, groups, permutations))
        return float((model(network.x) - before).abs().max() / before.abs().max())


@pytest.mark.parametrize("network", sample(NETWORKS, 1), ids=str)
def test_all_groups_are_found_and_no_permutation_changes_the_function(
    network: Network,
) -> None:
    assert sorted(group.size for group in network.groups) == network.sizes
    for seed in range(3):
        assert change(network, network.groups, seed) < 1e-10
    state = network.model().state_dict()
    for group in network.groups:
        for member in group.members:
            assert member.positions.shape[0] == group.size
            size = state[member.name].shape[member.axis]
            assert member.positions.unique().numel() == member.positions.numel() <= size
            assert int(member.positions.max()) < size


# Each is another program of views, cuts, products and sums.
@pytest.mark.parametrize("seed", sample([2, 9], 0, 2))
def test_no_permutation_changes_the_function_of_a_random_program(seed: int) -> None:
    network = Network(str(seed), lambda: Random(seed), torch.randn(3, 12), [])
    assert network.groups
    assert change(network, network.groups) < 1e-10


@pytest.mark.parametrize("name", sample(["mlp", "cnn", "dense", "gpt"], 1, 2))
def test_a_permutation_that_leaves_out_a_tensor_changes_the_function(name: str) -> None:
    (network,) = (n for n in NETWORKS if n.name == name)
    seen = 0
    for group in network.groups:
        tensors = {m.name for m in group.members}
        # Of two tied names load_state_dict heeds the last.
        for left_out in (t for t in tensors if t.endswith("weight") and t != "tokens.weight"):
            members = tuple(m for m in group.members if m.name != left_out)
            assert change(network, (dataclasses.replace(group, members=members),)) > 1e-3
            seen += 1
    assert seen > 3


def test_members_tell_where_units_lie() -> None:
    (network,) = (n for n in NETWORKS if n.name == "dense")
    first = next(g for g in network.groups if g.size == 4)
    blocks = {(m.name, m.axis): m.positions for m in first.members}
    # Four channels in front of five others; flattened, each of them has 4 × 4 pixels.
    assert blocks["first.weight", 0].tolist() == [[0], [1], [2], [3]]
    assert blocks["second.weight", 1].tolist() == [[0], [1], [2], [3]]
    assert blocks["norm.running_var", 0].tolist() == [[0], [1], [2], [3]]
    assert blocks["hidden.weight", 1].tolist() == [
        list(range(16 * c, 16 * c + 16)) for c in range(4)
    ]
    second = next(g for g in network.groups if g.size == 5)
    positions = next(m.positions for m in second.members if m.name == "hidden.weight")
    assert positions[2].tolist() == list(range(16 * 6, 16 * 7))


def test_tied_tensors_are_permuted_under_all_of_their_names() -> None:
    (network,) = (n for n in NETWORKS if n.name == "tied")
    state = {name: tensor.clone() for name, tensor in network.model().state_dict().items()}
    permuted = permute(state, network.groups, [torch.tensor([1, 2, 3, 4, 0])])
    for one, two in (("first.weight", "twin.weight"), ("middle.weight", "again.weight")):
        assert not torch.equal(permuted[one], state[one])
        assert torch.equal(permuted[one], permuted[two])
    assert torch.equal(permuted["first.weight"], state["first.weight"][[1, 2, 3, 4, 0]])


def test_permuting_keeps_types_and_what_no_group_reaches() -> None:
    half = torch.arange(6.0).to(torch.bfloat16)
    group = Group(3, (Member("a", 0, torch.tensor([[0, 1], [2, 3], [4, 5]])),))
    weights = {"a": half, "b": torch.ones(2)}
    permuted = permute(weights, [group], [torch.tensor([2, 0, 1])])
    assert permuted["a"].dtype == torch.bfloat16
    assert permuted["a"].tolist() == [4, 5, 0, 1, 2, 3]
    assert permuted["b"] is weights["b"]
    assert half.tolist() == [0, 1, 2, 3, 4, 5]


class Hiding(nn.Module):
    """Shapes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[x[:, 0] > 0]


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (foreign.Branching(), torch.randn(2, 5)),
        (Hiding(), torch.randn(2, 5)),
    ],
)
def test_models_that_cannot_be_traced_are_refused_without_messages_of_torch(
    model: nn.Module, inputs: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ModelError, match="the model cannot be traced") as caught:
        trace(model.eval(), (inputs,))
    assert "\n" not in str(caught.value)
    assert "for all inputs" in caught.value.cure
    assert capsys.readouterr() == ("", "")


def test_no_group_contains_what_a_thread_computes(capsys: pytest.CaptureFixture[str]) -> None:
    # torch 2.6 records its result as a constant; newer versions refuse to trace it.
    refusals, groups = [], ()
    try:
        groups = hidden_units(trace(foreign.Threaded().eval(), (torch.randn(2, 4),))).groups
    except ModelError as error:
        refusals.append(str(error))
    assert groups == ()
    for refusal in refusals:
        assert re.fullmatch(r"the model cannot be traced.*for all inputs.*", refusal)
    assert capsys.readouterr() == ("", "")


def test_inputs_may_come_by_name() -> None:
    model = foreign.TwoInputs().eval()
    inputs = {"words": torch.randint(9, (2, 4)), "sizes": torch.randn(2, 3)}
    (group,) = hidden_units(trace(model, (), inputs)).groups
    assert group.names == ("words.weight", "sizes.weight", "head.weight")


class Wrapping(nn.Module):
    """Wraps its scores, as Hugging Face models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.layers(x), hidden=self.layers[0](x))


def test_of_wrapped_scores_the_logits_count() -> None:
    (group,) = hidden_units(trace(Wrapping().eval(), (torch.randn(2, 4),))).groups
    assert group.names == ("layers.0.weight", "layers.0.bias", "layers.2.weight")


def leaves(axis: Axis) -> list[list[list[int]]]:
    found = [positions for _, positions in units(axis)]
    # The order within a block is any, the same for every unit.
    return [positions[:, positions[0].argsort()].tolist() for positions in found]


def test_axes_are_products_and_sums() -> None:
    channels, pixels = Axis(2), Axis(3, pinned=True)
    assert leaves(multiply([channels, pixels])) == [[[0, 1, 2], [3, 4, 5]]]
    assert leaves(multiply([pixels, channels])) == [[[0, 2, 4], [1, 3, 5]]]
    assert leaves(concatenate([pixels, channels])) == [[[3], [4]]]
    # A flattened concatenation is a concatenation of flattened ones.
    flat = multiply([concatenate([channels, Axis(3)]), Axis(2, pinned=True)])
    assert leaves(flat) == [[[0, 1], [2, 3]], [[4, 5], [6, 7], [8, 9]]]
    whole = Axis(10)
    tie(whole, flat)
    assert leaves(whole) == leaves(flat)


def test_tied_and_cut_units_keep_the_permutations_that_both_allow() -> None:
    whole = Axis(12)
    first, second = cut(whole, [4, 8])
    tie(multiply([Axis(2), Axis(4)]), second)
    assert [len(p) for p in leaves(whole)] == [4, 2, 4]
    pin(first)
    assert [len(p) for p in leaves(whole)] == [2, 4]
    # The common refinement of 2 × 6 and 4 × 3 is 2 × 2 × 3.
    one, other = multiply([Axis(2), Axis(6)]), multiply([Axis(4), Axis(3)])
    tie(one, other)
    assert [len(p) for p in leaves(one)] == [len(p) for p in leaves(other)] == [2, 2, 3]
    # 4 × 6 and 6 × 4 have none.
    one = multiply([Axis(4), Axis(6)])
    assert [axis.size for axis in regroup([one], [6, 4])] == [6, 4]
    assert leaves(one) == []
    # Four gates of three units one behind the other are a product whose order stays.
    gates, part = multiply([Axis(4), Axis(3)]), Axis(3)
    tie(gates, concatenate([part, Axis(3), Axis(3), Axis(3)]))
    assert leaves(part) == [[[0], [1], [2]]]
    assert len(leaves(gates)) == 4


@pytest.mark.parametrize("seed", range(20))
def test_regrouping_and_back_keeps_every_unit_at_its_place(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = [int(2 ** torch.randint(3, (), generator=generator)) for _ in range(4)]
    axes = [Axis(size) for size in sizes]
    flat = multiply(axes)
    total = flat.size
    outer = 2 ** int(torch.randint(total.bit_length(), (), generator=generator))
    one, two = regroup([flat], [outer, total // outer])
    again = multiply([one, two])
    assert (one.size, two.size) == (outer, total // outer)
    assert leaves(again) == leaves(flat)
    # Every leaf's positions are all of the axis, each once.
    for positions in leaves(again):
        assert sorted(p for unit in positions for p in unit) == list(range(total))


class Held(nn.Module):
    """A hidden layer and what its units pass through."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.between = nn.Linear(6, 16), nn.Linear(16, 3), between
        self.steps = torch.linspace(-1, 1, 16)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.one(x))
        scores: Tensor = self.two(
            hidden * self.steps if self.between is None else self.between(hidden)
        )
        return scores


@pytest.mark.parametrize(
    ("between", "found"),
    sample(
        [
            (None, ("the constant steps",)),
            (lambda h: h * torch.arange(16.0), ("arange",)),
            (lambda h: h.cumsum(1), ("cumsum",)),
            (lambda h: torch.fft.fft(h).real, ("_fft_r2c",)),
            (lambda h: h[:, torch.arange(15, -1, -1)], ("index",)),
        ],
        0,
        2,
    ),
)
def test_the_reason_why_units_cannot_be_permuted_is_named(
    between: Callable[[Tensor], Tensor], found: tuple[str, ...]
) -> None:
    traced = trace(Held(between), (torch.randn(2, 6),))
    assert hidden_units(traced).groups == ()
    assert obstacles(traced) == found


def test_without_a_hidden_layer_nothing_holds_it() -> None:
    # A constant and an operator that no unit would meet.
    class Flat(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward((x * torch.arange(6.0)).cumsum(1))

    assert obstacles(trace(Flat(6, 3), (torch.randn(2, 6),))) == ()
