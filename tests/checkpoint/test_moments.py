"""The state of Adam in checkpoints: where it is found, and how it is matched with a model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Size, Tensor, nn

from losscli.checkpoint import (
    AdamState,
    InMemoryCheckpoint,
    ModelParameters,
    find_adam_state,
    read_optimizers,
)
from losscli.checkpoint.adam import _assign
from losscli.errors import CheckpointError

Groups = Callable[[nn.Module], Any]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 4))


def train(
    model: nn.Module,
    groups: Groups = lambda model: model.parameters(),
    kind: Any = torch.optim.Adam,
    steps: int = 3,
    **options: Any,
) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = kind(groups(model), lr=0.01, **options)
    x = torch.rand(8, 3, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return optimizer


def match(
    content: Any, model: nn.Module, wanted: list[str] | None = None, name: str = "a.pt"
) -> AdamState:
    parameters = ModelParameters.of(dict(model.named_parameters(remove_duplicate=False)))
    given = InMemoryCheckpoint.from_object(name, content) if isinstance(content, Mapping) else None
    optimizers = read_optimizers(given if given is not None else str(content))
    return find_adam_state(name, optimizers, parameters, wanted or list(parameters.shapes))


def check_moments(
    found: AdamState, model: nn.Module, optimizer: torch.optim.Optimizer, key: str = "exp_avg_sq"
) -> None:
    """Compares moments with those in the optimiser itself, by the identity of parameters."""
    for name, parameter in model.named_parameters():
        if name in found.second_moments:
            assert torch.equal(found.second_moments[name], optimizer.state[parameter][key])
            assert found.steps[name] == int(optimizer.state[parameter]["step"])
    assert found.second_moments


def whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}


def by_decay(model: nn.Module) -> list[dict[str, Any]]:
    """The groups of transformers: matrices decay, biases and the parameters of norms do not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]


def first_apart(model: Any, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first matrix in a group with other options: the only one of its shape."""
    first, *others = model.parameters()
    return [{"params": [first], **options}, {"params": others}]


PLACES: dict[str, Callable[[Any, Any], Any]] = {
    "optimizer": lambda state, moments: {"state_dict": state, "optimizer": moments},
    "optimizer_state_dict": lambda state, moments: {
        "model": state,
        "optimizer_state_dict": moments,
        "epoch": 3,
    },
    "nested": lambda state, moments: {"train": {"model": state, "optim": moments}},
    "lightning": lambda state, moments: {"state_dict": state, "optimizer_states": [moments]},
}


@pytest.mark.parametrize("place", PLACES)
def test_the_state_is_found_where_users_store_it(place: str, tmp_path: Path) -> None:
    model = network()
    optimizer = train(model)
    torch.save(PLACES[place](model.state_dict(), optimizer.state_dict()), tmp_path / "a.pt")
    found = match(tmp_path / "a.pt", model)
    check_moments(found, model, optimizer)
    assert (found.learning_rate, found.betas, found.epsilon) == (0.01, (0.9, 0.999), 1e-8)
    assert (found.amsgrad, found.weight_decay, found.matched_by) == (False, 0.0, "shapes")


@pytest.mark.parametrize("file", ["optimizer.pt", "optimizer.bin"])
def test_the_state_is_found_beside_the_weights_of_transformers(file: str, tmp_path: Path) -> None:
    model = network()
    optimizer = train(model, by_decay, torch.optim.AdamW)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert read_optimizers(str(tmp_path)) == {}
    torch.save(optimizer.state_dict(), tmp_path / file)
    for name in (tmp_path, tmp_path / "pytorch_model.bin"):
        found = match(name, model)
        check_moments(found, model, optimizer)
        assert found.weight_decay == 0.1


NAMED: dict[str, Callable[[str], str]] = {
    "plain": str,
    "of DataParallel": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "in a LightningModule": lambda name: f"net.body.{name}",
}


@pytest.mark.parametrize("form", NAMED)
def test_names_decide_in_any_order(form: str) -> None:
    model = network()
    # Two matrices of 4 x 4 in one group would be ambiguous without names.
    reverse = list(model.named_parameters())[::-1]
    optimizer = train(model, lambda _: [(NAMED[form](n), p) for n, p in reverse])
    found = match(whole(model, optimizer), model)
    check_moments(found, model, optimizer)
    assert found.matched_by == "names"


def test_two_parts_with_the_same_names_are_refused() -> None:
    both = nn.ModuleDict({"one": network(), "two": network()})
    optimizer = torch.optim.Adam(both.named_parameters())
    x = torch.rand(8, 3)
    (both["one"](x) - both["two"](2 * x)).square().mean().backward()
    optimizer.step()
    state = optimizer.state_dict()
    part = both["two"]
    with pytest.raises(CheckpointError, match=r"several parts with these names: one\., two\."):
        match({"state_dict": part.state_dict(), "optimizer": state}, part)
    # Names without a prefix are those of the model itself.
    names = state["param_groups"][0]["param_names"]
    state["param_groups"][0]["param_names"] = [name.removeprefix("two.") for name in names]
    check_moments(
        match({"state_dict": part.state_dict(), "optimizer": state}, part), part, optimizer
    )


def test_full_states_of_torch_distributed_have_names_for_numbers() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = network()
    optimizer = train(model, by_decay)
    state = get_optimizer_state_dict(model, optimizer)
    found = match({"model": model.state_dict(), "optimizer": state}, model)
    check_moments(found, model, optimizer)
    assert found.matched_by == "names"


@pytest.mark.parametrize(
    "groups",
    [
        lambda model: model.parameters(),
        by_decay,
        lambda model: first_apart(model, {}),
    ],
)
def test_a_unique_grouping_by_shapes_is_taken(groups: Groups) -> None:
    model = network()
    optimizer = train(model, groups)
    found = match(whole(model, optimizer), model)
    check_moments(found, model, optimizer)
    assert found.matched_by == "shapes"


def test_amsgrad_takes_the_largest_second_moments() -> None:
    model = network()
    optimizer = train(model, kind=torch.optim.AdamW, amsgrad=True, betas=(0.8, 0.9), eps=1e-3)
    found = match(whole(model, optimizer), model)
    check_moments(found, model, optimizer, "max_exp_avg_sq")
    assert (found.amsgrad, found.betas, found.epsilon) == (True, (0.8, 0.9), 1e-3)


def test_only_the_parameters_that_are_needed_must_have_moments() -> None:
    model = network()
    for parameter in model[0].parameters():
        parameter.requires_grad_(requires_grad=False)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    for groups in (
        lambda model: model.parameters(),
        lambda model: [(n, p) for n, p in model.named_parameters() if p.requires_grad],
    ):
        content = whole(model, train(model, groups))
        assert match(content, model, trained).second_moments.keys() == {*trained}
        with pytest.raises(CheckpointError, match=r"no moments of 0\.weight and 1 more"):
            match(content, model)


def test_a_tied_parameter_is_found_under_each_of_its_names() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    for groups in (lambda model: model.parameters(), lambda model: model.named_parameters()):
        optimizer = train(model, groups)
        found = match(whole(model, optimizer), model)
        assert found.second_moments.keys() == {"1.weight", "0.bias", "1.bias"}
        moment = optimizer.state[model[0].weight]["exp_avg_sq"]
        assert torch.equal(found.second_moments["1.weight"], moment)


def test_there_are_no_moments_before_the_first_step() -> None:
    model = network()
    found = match(whole(model, train(model, steps=0)), model)
    assert (found.second_moments, found.steps, found.learning_rate) == ({}, {}, 0.01)


def test_different_learning_rates_give_no_learning_rate() -> None:
    model = network()
    optimizer = train(model, lambda model: first_apart(model, {"lr": 0.1}))
    found = match(whole(model, optimizer), model)
    assert found.learning_rate is None


def converted(
    model: nn.Module, convert: Callable[[Tensor], Tensor], key: str = "exp_avg_sq"
) -> dict[str, Any]:
    state = train(model).state_dict()
    for moments in state["state"].values():
        moments[key] = convert(moments.pop("exp_avg_sq"))
    return state


def two_of_one_shape(model: nn.Module) -> list[dict[str, Any]]:
    names = dict(model.named_parameters())
    biases = [names.pop(name) for name in ("1.bias", "3.bias")]
    return [{"params": names.values()}, {"params": biases}]


def edited(
    model: nn.Module, groups: Groups = lambda model: model.parameters(), **options: Any
) -> Any:
    state = train(model, groups).state_dict()
    for group in state["param_groups"]:
        group.update(options)
    return state


REFUSED: dict[str, tuple[str, Callable[[nn.Module], Any]]] = {
    "nothing": ("a.pt has no state of an optimiser", lambda model: {}),
    "bitsandbytes": ("quantised moments", lambda m: converted(m, Tensor.byte, "state2")),
    "integers": ("quantised moments", lambda m: converted(m, Tensor.byte)),
    "two ways": (
        "do not match those of the model",
        lambda model: train(model, two_of_one_shape).state_dict(),
    ),
    "another model": (
        "do not match those of the model",
        lambda _: train(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))).state_dict(),
    ),
    "maximize": ("not that of torch.optim.Adam", lambda model: edited(model, maximize=True)),
    "betas": (
        "betas, eps or amsgrad",
        lambda model: train(model, lambda m: first_apart(m, {"betas": (0.5, 0.9)})).state_dict(),
    ),
    "a beta of 1": ("as an option or", lambda model: edited(model, betas=(1.0, 0.9))),
    "three betas": ("another form", lambda model: edited(model, betas=(0.9, 0.9, 0.9))),
    "lr": ("as an option or as the step of Adam", lambda model: edited(model, lr="high")),
    "no list": ("another form", lambda model: edited(model, params=3)),
    "no maximum": ("no second moments of 0.weight", lambda m: edited(m, amsgrad=True)),
    "sparse": ("second moments of 0.weight, or sparse", lambda m: converted(m, Tensor.to_sparse)),
    **{
        str(value): (
            "second moments of 0.weight that are negative or not finite",
            lambda model, value=value: converted(
                model, lambda moment: moment.index_fill(0, torch.tensor([0]), value)
            ),
        )
        for value in (math.nan, math.inf, -1.0)
    },
    "without values": (
        "no second moments of 0.weight",
        lambda model: converted(model, lambda moment: moment.to("meta")),
    ),
    **{
        kind: (
            "not that of torch.optim.Adam or AdamW",
            lambda model, kind=kind: train(model, kind=getattr(torch.optim, kind)).state_dict(),
        )
        for kind in ("SGD", "RMSprop", "NAdam", "RAdam", "Adamax", "Adagrad")
    },
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_unusable_moments_are_refused_in_one_line(case: str) -> None:
    text, make = REFUSED[case]
    model = network()
    content = {"state_dict": model.state_dict(), "optimizer": make(model)}
    with pytest.raises(CheckpointError, match=text) as caught:
        match(content, model)
    assert "\n" not in str(caught.value)
    assert caught.value.cure


def test_names_of_another_shape_are_refused() -> None:
    model = network()
    state = train(model, lambda model: model.named_parameters()).state_dict()
    names = state["param_groups"][0]["param_names"]
    names[0], names[1] = names[1], names[0]
    with pytest.raises(CheckpointError, match=r"0\.weight of shape \[4\], and .* has \[4, 3\]"):
        match({"state_dict": model.state_dict(), "optimizer": state}, model)


def test_the_optimiser_of_the_model_is_chosen_among_several() -> None:
    model, other = network(), nn.Linear(3, 2)
    optimizer = train(model)
    states = [train(other).state_dict(), optimizer.state_dict()]
    content = {"state_dict": model.state_dict(), "optimizer_states": states}
    check_moments(match(content, model), model, optimizer)
    content["optimizer_states"] = [states[1], states[1]]
    with pytest.raises(
        CheckpointError, match=r"several optimiser states .*: 'optimizer_states\.0'"
    ):
        match(content, model)


def test_several_files_have_no_state(tmp_path: Path) -> None:
    for name in "ab":
        torch.save({"weight": torch.ones(2)}, tmp_path / f"{name}.pt")
    with pytest.raises(CheckpointError, match="read from one"):
        read_optimizers(f"x={tmp_path}/a.pt+y={tmp_path}/b.pt")


def test_assignments_are_those_of_an_exhaustive_search() -> None:
    generator = torch.Generator().manual_seed(0)
    unique = 0
    for _ in range(300):
        shapes = [Size([int(torch.randint(3, (), generator=generator))]) for _ in range(5)]
        owners = torch.randint(-1, 2, (5,), generator=generator).tolist()
        groups: list[list[Size | None]] = [
            [shape for shape, owner in zip(shapes, owners, strict=True) if owner == g]
            for g in range(2)
        ]
        found = []
        for choice in itertools.product((-1, 0, 1), repeat=5):
            places = [[i for i, g in enumerate(choice) if g == k] for k in range(2)]
            if [[shapes[i] for i in place] for place in places] == groups:
                found.append({i: (g, k) for g, p in enumerate(places) for k, i in enumerate(p)})
        expected = found[0] if len(found) == 1 else None
        unique += expected is not None
        assert _assign(groups, shapes) == expected
    assert 30 < unique < 270
