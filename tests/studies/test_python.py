"""The library from Python: what its functions take, what they refuse, and its names."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import inspect
import math
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import losscli
from losscli.checkpoint import Checkpoint
from losscli.errors import (
    CheckpointError,
    LosscliError,
    MismatchError,
    ModelError,
    UsageError,
)
from losscli.evaluation.losses.built_in import LOSSES
from losscli.models import MLP
from tests import oracle
from tests.cases import in_turn, sample
from tests.cli.test_console import Terminal

SIZES = "6-5-3"
INPUTS = torch.rand(23, 6, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(23) % 3
DATA = {"train": (INPUTS, TARGETS), "test": (INPUTS[:9] / 2, TARGETS[:9])}

# The number of checkpoints of a function, where it is not three; a check of each takes long.
NUMBER = {"inspect": 2, "check": 2}

LINES = ["interpolate", "align", "export"]
PATHS = ["trajectory", "plane", "around", "check", "sharpness", "barriers", "inspect"]
SETTINGS = [field.name for field in dataclasses.fields(losscli.Settings)]
OPTIONS: dict[str, dict[str, Any]] = {
    "interpolate": {"points": 3},
    "trajectory": {"residuals": 2},
    "plane": {"points": 3},
    "sharpness": {"samples": 2},
    "barriers": {"points": 3},
    "around": {"points": 3, "directions": 2},
    "export": {"alpha": 0.5},
    # Few parameters have a small Hessian.
    "check": {"only": "layers.1.bias"},
}


def module(seed: int) -> MLP:
    torch.manual_seed(seed)
    return MLP(SIZES)


def state(seed: int) -> dict[str, Tensor]:
    return module(seed).state_dict()


def call(function: str, checkpoints: list[Any], **more: Any) -> Any:
    """Calls a public function with the number of checkpoints that it takes."""
    options = dict(OPTIONS.get(function, {}))
    if function not in {"inspect", "export"}:
        options |= {"model": f"mlp:{SIZES}", "data": DATA, "split": "train"}
    options |= more
    if function in LINES:
        return getattr(losscli, function)(*checkpoints[:2], **options)
    return getattr(losscli, function)(checkpoints[: NUMBER.get(function, 3)], **options)


def numbers(result: Any) -> Any:
    """All that a result says but the names of checkpoints, and where they lie."""
    if isinstance(result, Checkpoint):
        return {name: tensor.tolist() for name, tensor in result.weights.items()}
    if not hasattr(result, "table"):
        return numbers(result.checkpoint), result.summary["distance"]
    named = {"checkpoint", "a", "b"}
    return [
        [{key: value for key, value in row.items() if key not in named} for row in table.records()]
        for table in (result.table, *getattr(result, "more", {}).values())
    ]


def in_file(seed: int, folder: Path) -> str:
    torch.save(state(seed), folder / f"{seed}.pt")
    return str(folder / f"{seed}.pt")


KINDS: dict[str, Callable[[int, Path], Any]] = {
    "path": lambda seed, folder: Path(in_file(seed, folder)),
    "bytes": lambda seed, folder: in_file(seed, folder).encode(),
    "state dict": lambda seed, _: state(seed),
    "parameters": lambda seed, _: dict(module(seed).named_parameters()),
    "module": lambda seed, _: module(seed),
    "wrapped module": lambda seed, _: nn.DataParallel(module(seed)),
    "checkpoint": lambda seed, _: {
        "epoch": seed,
        "net": state(seed),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
        "rng": torch.get_rng_state(),
    },
    "object": lambda seed, _: Checkpoint("x", state(seed), {}),
}


def kept(value: Any) -> Any:
    """What somebody else sees of an object."""
    if isinstance(value, nn.Module):
        tensors = {**dict(value.named_parameters()), **dict(value.named_buffers())}
        return value.training, kept(tensors)
    if isinstance(value, Checkpoint):
        return kept(value.weights)
    if isinstance(value, Mapping):
        return {key: kept(inner) for key, inner in value.items()}
    if isinstance(value, Tensor):
        return value.tolist(), value._version, value.requires_grad, value.data_ptr()
    return value


@pytest.fixture(scope="module")
def of_files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """What a function finds of three checkpoints in files."""
    files = [in_file(seed, tmp_path_factory.mktemp("files")) for seed in (1, 2, 3)]

    @functools.cache
    def found(function: str) -> Any:
        return numbers(call(function, files))

    return found


@pytest.mark.filterwarnings("ignore:.*names are not those|.*DataParallel")
@pytest.mark.parametrize(
    ("function", "kind"),
    [
        pytest.param(
            *(function, kind),
            # All functions read their checkpoints in one of two places.
            marks=()
            if function == ("interpolate", "trajectory")[number % 2]
            or (kind == "module" and function not in {"align", "check", "sharpness"})
            else pytest.mark.stress,
        )
        for function in [*LINES, *PATHS]
        for number, kind in enumerate(KINDS)
    ],
)
def test_every_function_takes_every_kind_of_checkpoint(
    function: str, kind: str, tmp_path: Path, of_files: Callable[[str], Any]
) -> None:
    objects = [KINDS[kind](seed, tmp_path) for seed in (1, 2, 3)]
    before = [kept(value) for value in objects]
    found = numbers(call(function, objects))
    expected = of_files(function)
    if kind == "wrapped module" and function in {"inspect", "export"}:
        # Without a model the names are those of the checkpoint.
        assert str(found).replace("module.", "") == str(expected)
    else:
        assert found == expected
    assert [kept(value) for value in objects] == before


def test_the_losses_of_state_dicts_are_those_of_a_plain_loop() -> None:
    a, b = state(1), state(2)
    result = losscli.interpolate(
        a, b, model=lambda: MLP(SIZES), data=DATA, split="train", points=3, range=(0, 1),
        dtype=torch.float64,
    )  # fmt: skip
    for alpha, loss in zip([0, 0.5, 1], result.table.floats("loss"), strict=True):
        found = oracle.losses(
            lambda: MLP(SIZES), oracle.blend(a, b, alpha), INPUTS, TARGETS, LOSSES["cross_entropy"]
        )
        assert loss == pytest.approx(oracle.mean(found), rel=1e-12)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_a_state_dict_may_have_old_names() -> None:
    def network(norm: Callable[..., Any], seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(norm(nn.Linear(6, 4)), nn.Tanh(), nn.Linear(4, 3))

    old = [network(nn.utils.weight_norm, seed) for seed in (1, 2)]
    states = [model.state_dict() for model in old]
    before = copy.deepcopy([vars(one) for one in states])
    result = losscli.interpolate(
        *states,
        model=lambda: network(weight_norm, 0), data=DATA, split="train", points=2, range=(0, 1),
        dtype="float64",
    )  # fmt: skip
    assert [vars(one) for one in states] == before  # the versions of modules
    for model, loss in zip(old, result.table.floats("loss"), strict=True):
        outputs = model.double()(INPUTS.double()).detach()
        assert loss == pytest.approx(float(nn.functional.cross_entropy(outputs, TARGETS)))


@pytest.mark.parametrize("kind", sample(["state dict", "module", "checkpoint"], 1))
def test_objects_are_named_by_their_places(kind: str, tmp_path: Path) -> None:
    objects = [KINDS[kind](seed, tmp_path) for seed in (1, 2, 3)]
    places = [f"checkpoint {i}" for i in range(3)]
    assert call("trajectory", objects).table.unique("checkpoint") == places
    if kind == "module":  # the names are found in one place
        assert call("check", objects).table.unique("checkpoint") == places[:2]
    entries = call("barriers", objects).summary["checkpoints"]
    assert [entry["name"] for entry in entries] == places
    assert {entry["path"] for entry in entries} == {None}
    assert [c["name"] for c in call("interpolate", objects).summary["checkpoints"]] == ["A", "B"]
    mixed = call("trajectory", [in_file(1, tmp_path), objects[1], "init:3"])
    assert mixed.table.unique("checkpoint") == [str(tmp_path / "1.pt"), "checkpoint 1", "init:3"]
    # A file of such a name is another one.
    torch.save(state(9), tmp_path / "A")
    assert call("interpolate", objects).table.rows == call("interpolate", objects).table.rows


def test_the_content_of_an_object_is_part_of_the_identity() -> None:
    def identity(*objects: Any) -> str:
        return str(call("interpolate", list(objects)).summary["identity"])

    first = identity(state(1), state(2))
    assert identity(state(1), state(2)) == first
    assert identity(module(1), {"net": state(2)}.pop("net")) == first
    other = state(2)
    other["layers.1.bias"][-1] += 1e-6
    assert identity(state(1), other) != first
    assert identity(state(2), state(1)) != first


def test_a_module_is_the_model_if_no_other_is_given() -> None:
    a, b = module(1), module(2)
    a.train()
    options: dict[str, Any] = {"data": DATA, "points": 3, "split": "train"}
    result = losscli.interpolate(a, b, **options)
    assert result.summary["model"] == "MLP"
    assert a.training
    named = losscli.interpolate(a, b, model=f"mlp:{SIZES}", **options)
    assert numbers(result) == numbers(named)
    with pytest.raises(UsageError, match="no model given"):
        losscli.interpolate(a.state_dict(), b, **options)


def test_a_result_keeps_no_state_dict_alive() -> None:
    states = [state(seed) for seed in (1, 2, 3)]
    tensors = [weakref.ref(tensor) for one in states for tensor in one.values()]
    results = [call(function, states) for function in ("trajectory", "interpolate")]
    results.append(call("check", states[:1]))
    del states
    gc.collect()
    assert [ref for ref in tensors if ref() is not None] == []
    assert all(result.table.rows for result in results)


@pytest.mark.parametrize("how", ["safetensors", "mmap"])
def test_changes_to_a_mapped_state_dict_are_not_lost(how: str, tmp_path: Path) -> None:
    def load(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        tensors = {"weight": torch.randn(600, 600), "bias": torch.randn(600)}
        if how == "mmap":
            torch.save(tensors, tmp_path / f"{seed}.pt")
            found = torch.load(tmp_path / f"{seed}.pt", mmap=True)
        else:
            save_file(tensors, tmp_path / f"{seed}.safetensors")
            found = load_file(tmp_path / f"{seed}.safetensors")
        for tensor in found.values():
            tensor.add_(1)
        return dict(found)

    states = [load(seed) for seed in (1, 2)]
    before = [{n: t.clone() for n, t in one.items()} for one in states]
    torch.manual_seed(0)
    x = torch.rand(5, 600)
    losscli.interpolate(
        *states, model=lambda: nn.Linear(600, 600), data={"all": (x, x)}, loss="mse", points=3,
        batch_size=5,
    )  # fmt: skip
    losscli.inspect(states)
    for one, other in zip(states, before, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_state_dicts_that_share_their_memory_are_one() -> None:
    model = module(1)
    taken = []
    for _ in range(3):
        taken.append(model.state_dict())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
    for function in PATHS:
        with pytest.raises(UsageError, match=r"checkpoint 0 and checkpoint 1 are the same tensors"):
            call(function, taken)
    copies = [copy.deepcopy(taken[0]), state(2), state(3)]
    assert call("trajectory", copies).table.rows


def test_a_summary_of_state_dicts_identifies_them() -> None:
    a, b = state(1), state(2)
    line: dict[str, Any] = {"only": "layers.0.*", "range": (0, 1), "points": 3}
    result = call("interpolate", [a, b], **line)
    point = losscli.export(a, b, 0.5, summary=result.summary)
    assert torch.equal(point.weights["layers.1.bias"], a["layers.1.bias"])
    with pytest.raises(MismatchError, match="B is not the B of the table"):
        losscli.export(a, state(3), 0.5, summary=result.summary)
    # And the point is a checkpoint.
    found = call("interpolate", [a, point], **line).table.floats("loss")
    assert found[-1] == pytest.approx(result.table.floats("loss")[1], rel=1e-6)


@pytest.mark.parametrize(
    "value",
    [
        {"w": torch.ones(3).to_sparse()},
        {"w": torch.ones(3, device="meta")},
        {"a": 1},
        {},
        nn.LazyLinear(3),
        nn.ReLU(),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_objects_that_hold_no_weights_are_refused(value: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        losscli.inspect(value)
    assert "\n" not in str(caught.value)


def test_several_state_dicts_in_an_object_are_named_by_their_keys() -> None:
    both = {"model": state(1), "averages": {"ema": state(2)}}
    with pytest.raises(
        CheckpointError, match=r"A contains several state dicts.*Give one, as \['mo"
    ):
        call("interpolate", [both, state(3)])
    found = call("interpolate", [both["averages"]["ema"], state(3)])
    assert numbers(found) == numbers(call("interpolate", [state(2), state(3)]))
    told = losscli.inspect(both)
    assert [row["key"] for row in told.table.records()] == ["model", "averages.ema"]
    assert told.summary["checkpoints"][0]["path"] is None


# --- one or several ------------------------------------------------------------------------------


def test_one_checkpoint_needs_no_list(tmp_path: Path) -> None:
    name = in_file(1, tmp_path)
    options: dict[str, Any] = {"model": f"mlp:{SIZES}", "data": DATA, "split": "train"}
    few = {**options, "only": "layers.1.bias"}
    checked = numbers(losscli.check([name], **few))
    inspected = numbers(losscli.inspect([name]))
    plane = numbers(losscli.plane([name], points=2, **options))
    assert numbers(losscli.check(state(1), **few)) == checked
    for one in (name, Path(name), state(1), module(1), {"net": state(1)}):
        assert numbers(losscli.inspect(one)) == inspected
        assert numbers(losscli.plane(one, points=2, **options)) == plane


def test_a_folder_is_a_path(tmp_path: Path) -> None:
    for seed in (1, 2, 10):
        torch.save(state(seed), tmp_path / f"step-{seed}.pt")
    torch.save(state(10), tmp_path / "last.pt")
    options: dict[str, Any] = {"model": f"mlp:{SIZES}", "data": DATA, "surface": False}
    names = [str(tmp_path / f"step-{seed}.pt") for seed in (1, 2, 10)]
    for given in (str(tmp_path), tmp_path, [tmp_path]):
        result = losscli.trajectory(given, **options)
        assert result.table.unique("checkpoint") == names
        assert any("last.pt is left out" in note for note in result.summary["notes"])
    result = losscli.trajectory(sorted(names), **options)
    assert result.table.unique("checkpoint") == names
    result = losscli.trajectory(sorted(names), keep_order=True, **options)
    assert result.table.unique("checkpoint") == sorted(names)
    # A generator is read once.
    result = losscli.trajectory((Path(name) for name in names), **options)
    assert result.table.unique("checkpoint") == names


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(1) == targets).double()


@pytest.mark.parametrize(
    ("option", "one"),
    sample(
        [
            ("split", "test"),
            ("only", "layers.0.*"),
            ("metric", "none"),
            ("except_", "layers.0.bias"),
            ("metric", accuracy),
            ("metric", "accuracy"),
        ],
        0,
    ),
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_repeatable_option_takes_one_value_or_several(option: str, one: Any) -> None:
    def generated() -> Iterator[Any]:
        yield one

    forms = [one, [one], (one,), {one: 0}.keys(), generated(), np.array([one], dtype=object)]
    results = [call("interpolate", [state(1), state(2)], **{option: form}) for form in forms]
    assert all(numbers(result) == numbers(results[0]) for result in results)
    assert len({result.summary["identity"] for result in results}) == 1
    plain = call("interpolate", [state(1), state(2)])
    assert one in {"accuracy", accuracy} or numbers(plain) != numbers(results[0])
    nothing = call("interpolate", [state(1), state(2)], **{option: None, "split": "train"})
    assert option == "split" or numbers(nothing) == numbers(plain)


@pytest.mark.parametrize("kind", sample([np.int64, np.uint8, np.int32, torch.tensor], 1, 2))
def test_whole_numbers_of_other_libraries_are_whole_numbers(kind: Callable[[int], Any]) -> None:
    plain = call("interpolate", [state(1), state(2)], points=5, seed=3, limit=7, batch_size=4)
    found = call(
        "interpolate", [state(1), state(2)], points=kind(5), seed=kind(3), limit=kind(7),
        batch_size=kind(4),
    )  # fmt: skip
    assert found.table.rows == plain.table.rows
    assert found.summary["identity"] == plain.summary["identity"]


@pytest.mark.parametrize(
    "kind", sample([np.float64, np.float32, torch.tensor, np.array, int, np.int8], 0)
)
def test_numbers_of_other_libraries_are_numbers(kind: Callable[[float], Any]) -> None:
    plain = call("interpolate", [state(1), state(2)], range=(-1.0, 2.0))
    for form in (list, tuple, iter):
        found = call("interpolate", [state(1), state(2)], range=form([kind(-1), kind(2)]))
        assert found.table.rows == plain.table.rows
        assert found.summary["identity"] == plain.summary["identity"]
    point = losscli.export(state(1), state(2), kind(2))
    assert numbers(point) == numbers(losscli.export(state(1), state(2), 2.0))


def test_a_boolean_of_numpy_is_accepted() -> None:
    found = call("interpolate", [state(1), state(2)], derivatives=np.True_, points=2)
    assert "slope" in found.table.columns


def test_types_and_devices_may_be_those_of_torch() -> None:
    plain = call("interpolate", [state(1), state(2)], dtype="float64", device="cpu")
    found = call(
        "interpolate", [state(1), state(2)], dtype=torch.float64, device=torch.device("cpu")
    )
    assert found.table.rows == plain.table.rows
    assert found.summary["identity"] == plain.summary["identity"]


# --- misuse --------------------------------------------------------------------------------------

VALUES: list[Any] = [
    None, "x", "", 3, -1, 0, 3.5, math.nan, math.inf, 10**30, 1e300, True, b"x", [], [1], (1, 2),
    (2, 1), [math.nan, 1], (1, 2, 3), {}, {"a": 1}, object(), lambda: 0, torch.ones(3),
    torch.tensor(2), np.array([1.0, 2.0]), np.array(2), MLP, state(1), complex(1, 2), range(3),
    ["accuracy", "none"], float, ..., [None], [[]], {"train": 3}, {1, 2},
]  # fmt: skip


def parameters(function: str, kind: Any) -> list[str]:
    signature = inspect.signature(getattr(losscli, function))
    own = [p.name for p in signature.parameters.values() if p.kind is kind]
    return [name for name in own if name not in SETTINGS]


@pytest.mark.parametrize("function", [*LINES, *PATHS])
@pytest.mark.parametrize("share", [6, pytest.param(1, marks=pytest.mark.stress)])
def test_every_misuse_of_an_argument_is_refused_in_one_line(function: str, share: int) -> None:
    """Each option gets a share of the values, another than the option before it."""
    states = [state(seed) for seed in (1, 2, 3)]
    checkpoints = dict(zip("ab", states[:2], strict=True)) if function in LINES else {}
    fewest = {"around": 1, "check": 1, "sharpness": 1, "inspect": 2}
    names = {"names": states[: fewest.get(function, 3)]}
    plain: dict[str, Any] = {**(checkpoints or names), **OPTIONS.get(function, {})}
    options = parameters(function, inspect.Parameter.KEYWORD_ONLY)
    if function not in {"inspect", "export"}:
        plain |= {"model": f"mlp:{SIZES}", "data": {"train": DATA["train"]}}
    if function == "interpolate":
        options += SETTINGS
    refused = 0
    arguments = parameters(function, inspect.Parameter.POSITIONAL_OR_KEYWORD) + options
    for number, option in enumerate(arguments):
        for value in VALUES[number % share :: share]:
            if option == "progress" and callable(value):
                continue  # what it raises is its own
            if option == "derivatives" and value is True:
                continue  # it takes long
            try:
                getattr(losscli, function)(**{**plain, option: value})
            except LosscliError as error:
                refused += 1
                text = str(error)
                assert "\n" not in text
                assert text
                assert len(text) < 500, (option, text)
    assert refused > 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": "51"}, "points must be a whole number, not '51'"),
        ({"points": 51.0}, "points must be a whole number, not 51.0"),
        ({"points": True}, "points must be a whole number, not True"),
        ({"range": 1.0}, "range must be two numbers, not 1.0"),
        ({"range": (0, 1, 2)}, "range must be two numbers.*, not 3 numbers"),
        ({"range": (0, "1")}, "range must be a number, not '1'"),
        ({"refine": "fine"}, "refine must be a number, not 'fine'"),
        ({"derivatives": "yes"}, "derivatives must be True or False, not 'yes'"),
        ({"progress": 3}, "progress must be True, False or a function, not 3"),
        ({"progress": [print]}, "progress must be True, False or a function, not a list"),
        ({"context": "line.csv"}, "context must be a Table, not 'line.csv'"),
        ({"seed": 0.5}, "seed must be a whole number, not 0.5"),
        ({"seed": torch.ones(2)}, "seed must be a whole number, not a Tensor"),
        ({"split": 3}, "split must be a string, not 3"),
        ({"only": [b"x"]}, "only must be a string, not b'x'"),
        ({"metric": [3]}, "metric must be a string or a function, not 3"),
        ({"metric": {"accuracy": 1}}, "metric must be a string or a list of them, not a dict"),
        ({"model": 3}, "model must be a string or a function, not 3. Give a spec of the model"),
        ({"model": {"w": 1}}, "model must be a string or a function, not a dict"),
        ({"loss": nn.Linear}, "the loss fails"),
        ({"dtype": "float8"}, "--dtype float8 is not known"),
        ({"device": 0}, "device must be a string, not 0"),
        ({"pionts": 3}, r"interpolate\(\) has no argument 'pionts'. Did you mean 'points'\?"),
        ({"modle": 3}, r"interpolate\(\) has no argument 'modle'. Did you mean 'model'\?"),
        ({"zzz": 3}, r"no argument 'zzz'. It takes a, b, points and \d+ more: see help"),
        ({"a": state(1)}, r"interpolate\(\): multiple values for argument 'a'"),
    ],
)
def test_a_misuse_says_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LosscliError, match=message) as caught:
        losscli.interpolate(state(1), state(2), **{"model": f"mlp:{SIZES}", "data": DATA} | options)
    assert caught.value.exit_code == 2 or "fails" in message


@pytest.mark.parametrize("function", [*LINES, *PATHS])
def test_values_that_are_not_checkpoints_are_refused(function: str) -> None:
    for wrong in (3, None, 2.5, object(), torch.ones(2), print):
        with pytest.raises(
            UsageError, match=r"is .* which is not a checkpoint|is neither a checkpoint"
        ):
            call(function, [wrong, state(2), state(3)])
        if function in PATHS:
            with pytest.raises(UsageError, match=r"not a checkpoint|neither a checkpoint"):
                getattr(losscli, function)(wrong)
    with pytest.raises(UsageError, match="the name of a checkpoint is empty"):
        call(function, ["", state(2), state(3)])
    with pytest.raises(UsageError):
        getattr(losscli, function)(*([] if function in LINES else [[]]))
    with pytest.raises(UsageError, match=rf"{function}\(\) has no argument 'namse'"):
        call(function, [state(1), state(2), state(3)], namse=3)
    with pytest.raises(UsageError, match=rf"{function}\(\): too many positional arguments"):
        getattr(losscli, function)(*[state(1)] * 9)


def test_settings_refuse_what_the_functions_refuse() -> None:
    assert losscli.Settings(metric="none", split=["a"], seed=np.int64(2)) == losscli.Settings(
        metric=("none",), split=("a",), seed=2
    )
    assert losscli.Settings(model=Path("a.toml")).model == "a.toml"
    with pytest.raises(UsageError, match=r"Settings\(\) has no argument 'sede'. Did you mean 'see"):
        losscli.Settings(sede=3)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="limit must be a whole number, not 'all'"):
        losscli.Settings(limit="all")  # type: ignore[arg-type]


# --- progress ------------------------------------------------------------------------------------

EVALUATING = ["interpolate", *(name for name in PATHS if name != "inspect")]


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(name, marks=pytest.mark.stress) if name == "sharpness" else name
        for name in EVALUATING
    ],
)
def test_progress_counts_up_to_the_end_of_every_study(
    function: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    states = [state(seed) for seed in (1, 2, 3)]
    done: list[float] = []
    result = call(function, states, progress=done.append)
    assert done == sorted(done)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("losscli.progress._INTERVAL", 0.0)
    assert numbers(call(function, states, progress=True)) == numbers(result)
    shown = re.findall(r"(?m)^(\d+)/(\d+) (?:points|checkpoints)", capsys.readouterr().err)
    assert shown[-1][0] == shown[-1][1] == str(round(done[-1]))


def test_eigenvectors_of_a_plane_are_not_progress() -> None:
    done: list[float] = []
    call("plane", [state(1)], axes="hessian", points=3, progress=done.append)
    # The estimate of the remaining time starts after the eigenvectors.
    assert (done[0], done[-1]) == (0, 3 * 3 + 1)


def test_progress_of_check_counts_examples_and_advances_during_each_search() -> None:
    done: list[float] = []
    call("check", [state(1)], only=None, split=["train", "test"], progress=done.append)
    shares = np.array([len(targets) for _, targets in DATA.values()]) / (len(INPUTS) + 9)
    assert done[0] == 0
    assert done[-1] == pytest.approx(1)
    assert any(at == pytest.approx(shares[0]) for at in done)
    assert len({at for at in done if at < 0.9 * shares[0]}) > 3


def test_without_progress_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    states = [state(seed) for seed in (1, 2)]
    assert numbers(call("interpolate", states, progress=False)) == numbers(
        call("interpolate", states)
    )
    assert capsys.readouterr().err == ""


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    call("interpolate", [state(1), state(2)], progress=True)
    assert isinstance(sys.stderr, Terminal)
    assert re.search(r"\d/5 points ━", "".join(sys.stderr.frames))


# --- lazy layers ---------------------------------------------------------------------------------


def lazy() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.LazyConv1d(4, 3), nn.LazyBatchNorm1d(), nn.ReLU(),
        nn.Flatten(), nn.LazyLinear(3),
    )  # fmt: skip


def called(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = lazy()
    model(INPUTS)
    return model


@pytest.mark.parametrize(
    ("form", "kind"), in_turn(["function", "module", "spec"], "state dict", "wrapped", "file")
)
def test_lazy_layers_have_the_shapes_of_the_checkpoint(
    form: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    states: list[Any] = [
        {n: t.clone() for n, t in called(seed).state_dict().items()} for seed in (1, 2)
    ]
    given = states
    if kind == "wrapped":
        given = [{"net": {f"module.{n}": t for n, t in one.items()}} for one in states]
    elif kind == "file":
        for i, one in enumerate(states):
            torch.save(one, f"{i}.pt")
        given = ["0.pt", "1.pt"]
    own = lazy()
    model = {"function": lazy, "module": own, "spec": "tests.studies.test_python:lazy"}[form]
    result = losscli.interpolate(
        *given, model=model, data=DATA, split="train", points=3, range=(0, 1), dtype="float64"
    )
    for alpha, loss in zip([0, 0.5, 1], result.table.floats("loss"), strict=True):
        point = oracle.blend(*states, alpha)
        found = oracle.losses(lambda: called(0), point, INPUTS, TARGETS, LOSSES["cross_entropy"])
        assert loss == pytest.approx(oracle.mean(found), rel=1e-9)
    assert all(map(nn.parameter.is_lazy, own.parameters()))


def test_lazy_layers_without_shapes_are_refused_with_the_cure() -> None:
    for checkpoints in (("init:0", "init:1"), ("init:0", called(1)), (state(1), state(2))):
        with pytest.raises(ModelError, match=r"1.weight has no values yet. Call the lazy layers"):
            losscli.interpolate(*checkpoints, model=lazy, data=DATA)
    with pytest.raises(CheckpointError, match=r"A: 1.weight has no values yet. Call the module"):
        losscli.interpolate(lazy(), called(1), data=DATA)
    meta = nn.Linear(6, 3, device="meta")
    with pytest.raises(ModelError, match=r"weight has no values yet"):
        losscli.interpolate(state(1), state(2), model=meta, data=DATA)


# --- names ---------------------------------------------------------------------------------------


def test_names_are_listed_and_loaded_on_demand() -> None:
    script = (
        "import sys, losscli; names = dir(losscli); heavy = {'torch', 'numpy', 'matplotlib'}; "
        "assert names == sorted(losscli.__all__), names; "
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys(); "
        "losscli.Settings, losscli.LosscliError; assert not heavy & sys.modules.keys(); print('ok')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)  # noqa: PLW1510
    assert done.stdout == "ok\n", done.stderr
    assert all(callable(getattr(losscli, n)) for n in dir(losscli) if n != "__version__")
    starred: dict[str, Any] = {}
    exec("from losscli import *", starred)
    assert starred["interpolate"] is losscli.interpolate


def test_help_shows_the_arguments_of_each_function() -> None:
    for name in [*LINES, *PATHS]:
        function = getattr(losscli, name)
        assert function.__name__ == name
        assert "Args:" in (function.__doc__ or "")
        parameters = inspect.signature(function).parameters
        assert "arguments" not in parameters
        taken = [] if name == "inspect" else SETTINGS
        assert [option for option in parameters if option in SETTINGS] == taken
        assert "settings" not in parameters


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_module_of_torchscript_is_refused_and_a_function_that_builds_it_is_not() -> None:
    state = {name: tensor.clone() for name, tensor in nn.Linear(6, 3).state_dict().items()}
    other = {name: tensor + 1 for name, tensor in state.items()}
    data = {"all": (torch.rand(7, 6), torch.arange(7) % 3)}

    def build() -> nn.Module:
        return torch.jit.script(nn.Linear(6, 3))  # type: ignore[no-any-return]

    for model in (build(), nn.Sequential(build())):
        with pytest.raises(ModelError, match=r"TorchScript\. Give a function that builds it"):
            losscli.interpolate(state, other, model=model, data=data)
    found = losscli.interpolate(state, other, model=build, data=data, points=2)
    assert found.summary["distance"] == pytest.approx(math.sqrt(21))
