"""Checkpoints with old names: what ``load_state_dict(strict=True)`` takes is taken."""

from __future__ import annotations

import collections
import copy
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.parametrizations import weight_norm

import losscli as library
from losscli.checkpoint import LoadHooks, read, select_for
from losscli.errors import CheckpointError, MismatchError
from losscli.evaluation.losses.built_in import LOSSES
from losscli.models import MLP
from tests import oracle
from tests.cases import in_turn, sample
from tests.checkpoint.test_distributed import put
from tests.conftest import Losscli

INPUTS = torch.rand(23, 4, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(23) % 3


def network(norm: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    return nn.Sequential(norm(nn.Linear(4, 6)), nn.Tanh(), norm(nn.Linear(6, 3, bias=False)))


def quietly(norm: Callable[..., Any]) -> Callable[..., Any]:
    def normed(layer: nn.Linear) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return norm(layer)

    return normed


def batchnorm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


class Renamed(nn.Module):
    """Its layers had other names, which a hook knows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_load_state_dict_pre_hook(_rename)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def _rename(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    for key in list(state):
        if key.startswith(f"{prefix}fc"):
            state[key.replace("fc1", "first").replace("fc2", "second")] = state.pop(key)


class Overriding(Renamed):
    """It renames in a load_state_dict of its own, which knows nothing of ``assign``."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any:  # type: ignore[override]
        state = dict(state_dict)
        _rename(self, state, "")
        return super().load_state_dict(state, strict)


class Versioned(nn.Module):
    """Its version 2 has the scale that version 1 had squared."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 3), nn.Parameter(torch.rand(3) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any
    ) -> None:
        key = f"{prefix}squared"
        if key in state_dict and local_metadata.get("version", 0) == 1:
            state_dict[f"{prefix}scale"] = state_dict.pop(key).sqrt()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


class Adding(nn.Module):
    """A buffer that older checkpoints lack is the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("shift", torch.tensor([0.5, -0.25, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.shift

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        state_dict.setdefault(f"{prefix}shift", self.shift)
        super()._load_from_state_dict(state_dict, prefix, *rest)


@dataclass(frozen=True)
class Old:
    """A model of today, and a state dict of yesterday."""

    name: str
    build: Callable[[], nn.Module]
    state: Callable[[int], Mapping[str, Tensor]]

    def __str__(self) -> str:
        return self.name


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = build()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.3)
            assert tensor.isfinite().all(), name
    return model


def without(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if part not in name}


def renamed(state: Mapping[str, Tensor], **names: str) -> dict[str, Tensor]:
    found = {}
    for key, tensor in state.items():
        for name, old in names.items():
            key = key.replace(name, old)  # noqa: PLW2901
        found[key] = tensor
    return found


def squared(seed: int) -> Mapping[str, Tensor]:
    state = seeded(Versioned, seed).state_dict()
    state["squared"] = state.pop("scale").square()
    state._metadata[""]["version"] = 1  # type: ignore[attr-defined]
    return state


CASES = [
    Old(
        "weight-norm",
        lambda: network(weight_norm),
        lambda seed: seeded(lambda: network(quietly(old_weight_norm)), seed).state_dict(),
    ),
    Old(
        "weight-norm-half",
        lambda: network(weight_norm),
        lambda seed: {
            n: t.half()
            for n, t in seeded(lambda: network(quietly(old_weight_norm)), seed).state_dict().items()
        },
    ),
    Old("batchnorm", batchnorm, lambda seed: without(seeded(batchnorm, seed).state_dict(), "num_")),
    Old(
        "spectral-norm",
        lambda: network(quietly(old_spectral_norm)),
        lambda seed: seeded(lambda: network(quietly(old_spectral_norm)), seed).state_dict(),
    ),
    Old(
        "hook",
        Renamed,
        lambda seed: renamed(seeded(Renamed, seed).state_dict(), first="fc1", second="fc2"),
    ),
    Old(
        "nested-hook",
        lambda: nn.Sequential(Renamed(), nn.Linear(3, 3)),
        lambda seed: renamed(
            seeded(lambda: nn.Sequential(Renamed(), nn.Linear(3, 3)), seed).state_dict(),
            first="fc1",
        ),
    ),
    Old(
        "override",
        Overriding,
        lambda seed: renamed(seeded(Overriding, seed).state_dict(), first="fc1", second="fc2"),
    ),
    Old("version", Versioned, squared),
    Old("values", Adding, lambda seed: without(seeded(Adding, seed).state_dict(), "shift")),
]


def plainly(case: Old, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What torch alone makes of it."""
    torch.manual_seed(0)
    model = case.build()
    model.load_state_dict(state, strict=True)
    return {n: t.clone() for n, t in model.state_dict().items()}


def form(kind: str, state: Mapping[str, Tensor], file: Path) -> str:
    if kind == "legacy":
        torch.save(state, file, _use_new_zipfile_serialization=False)
    elif kind == "nested":
        torch.save({"epoch": 3, "net": {"ema": state}, "rng_state": torch.get_rng_state()}, file)
    elif kind == "wrapped":
        wrapped = collections.OrderedDict(
            (f"module._orig_mod.{name}", tensor) for name, tensor in state.items()
        )
        versions = getattr(state, "_metadata", {})
        wrapped._metadata = {  # type: ignore[attr-defined]
            "": {"version": 1},
            **{f"module._orig_mod.{name}".strip("."): v for name, v in versions.items()},
        }
        torch.save({"state_dict": wrapped, "best": torch.tensor(0.3)}, file)
    else:
        torch.save(state, file)
    return str(file)


def normalised(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gives spectral norms the singular vectors of their weights."""
    for name in [name for name in state if name.endswith("weight_u")]:
        layer = name.removesuffix("weight_u")
        left, _, right = torch.linalg.svd(state[f"{layer}weight_orig"])
        state |= {name: left[:, 0], f"{layer}weight_v": right[0]}
    return state


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize(
    ("case", "kind"), in_turn(CASES, "bare", "legacy", "nested", "wrapped"), ids=str
)
def test_the_numbers_are_those_of_load_state_dict(case: Old, kind: str, tmp_path: Path) -> None:
    states = [case.state(seed) for seed in (1, 2)]
    expected = [plainly(case, state) for state in states]
    names = [form(kind, state, tmp_path / f"{i}.pt") for i, state in enumerate(states)]
    before = [(tmp_path / f"{i}.pt").read_bytes() for i in range(2)]
    result = library.interpolate(
        *names,
        model=case.build,
        data={"all": (INPUTS, TARGETS)},
        points=3,
        range=(0, 1),
        metric=("none",),
        dtype="float64",
    )
    assert [(tmp_path / f"{i}.pt").read_bytes() for i in range(2)] == before
    for alpha, loss in zip([0, 0.5, 1], result.table.floats("loss"), strict=True):
        point = normalised(oracle.blend(*expected, alpha))
        found = oracle.losses(case.build, point, INPUTS, TARGETS, LOSSES["cross_entropy"])
        assert loss == pytest.approx(oracle.mean(found), rel=1e-9)


@pytest.mark.parametrize("case", [c for c in CASES if c.name != "spectral-norm"], ids=str)
def test_the_model_is_unchanged_and_nothing_is_copied_needlessly(case: Old, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = case.build()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    file = read(form("bare", case.state(1), tmp_path / "a.pt"))
    found = select_for(file, model)
    assert found.weights.keys() == before.keys()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    expected = plainly(case, case.state(1))
    for name, tensor in found.weights.items():
        assert torch.equal(tensor.to(expected[name].dtype), expected[name])
        assert not tensor.requires_grad
    if case.name not in {"override", "values"}:  # these need a copy of the model
        held = {t.data_ptr() for t in file.candidates[""].values()}
        new = {n for n, t in found.weights.items() if t.data_ptr() not in held}
        assert new <= {n for n in found.weights if "num_batches" in n or n == "scale"}


def test_a_hook_that_reads_the_model_reads_what_it_was_first(tmp_path: Path) -> None:
    model = Adding()
    hooks = LoadHooks(model)
    first, second = (without(seeded(Adding, seed).state_dict(), "shift") for seed in (1, 2))
    once = hooks.translate(first)
    assert once is not None
    model.load_state_dict({**first, "shift": torch.full((3,), 9.0)})
    again = hooks.translate(second)
    assert again is not None
    assert torch.equal(once["shift"], again["shift"])


REFUSED: list[tuple[str, Callable[[], nn.Module], Callable[[], Mapping[str, Tensor]]]] = [
    # It says that it is of a version with num_batches_tracked.
    ("version", batchnorm, lambda: _dropped(seeded(batchnorm, 1).state_dict(), "num_")),
    ("shape", lambda: network(weight_norm), lambda: _cut(CASES[0].state(1))),
    ("missing", lambda: network(weight_norm), lambda: without(CASES[0].state(1), "0.weight_g")),
    ("more", batchnorm, lambda: {**CASES[2].state(1), "more": torch.ones(1)}),
    ("no hooks", lambda: MLP("4-6-3"), lambda: CASES[2].state(1)),
    ("unknown version", Versioned, lambda: dict(squared(1))),
]


def _dropped(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    for name in [name for name in state if part in name]:
        del state[name]
    return state


def _cut(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t[:2] if n.endswith("weight_v") else t for n, t in state.items()}


@pytest.mark.parametrize(("name", "build", "state"), REFUSED, ids=[case[0] for case in REFUSED])
def test_state_dicts_that_load_state_dict_refuses_are_refused(
    name: str, build: Callable[[], nn.Module], state: Callable[[], Any], tmp_path: Path
) -> None:
    torch.save(state(), tmp_path / "a.pt")
    with pytest.raises(RuntimeError, match="Error"):
        build().load_state_dict(torch.load(tmp_path / "a.pt"), strict=True)
    with pytest.raises(MismatchError, match="does not fit the model") as caught:
        select_for(read(str(tmp_path / "a.pt")), build())
    assert "\n" not in str(caught.value), name


def test_two_old_state_dicts_that_fit_are_both_named(tmp_path: Path) -> None:
    content = {"model": CASES[0].state(1), "ema": CASES[0].state(2)}
    torch.save(content, tmp_path / "a.pt")
    name, model = str(tmp_path / "a.pt"), network(weight_norm)
    with pytest.raises(CheckpointError, match=r"several state dicts: 'model', 'ema'\. Choose one"):
        select_for(read(name), model)
    found = select_for(read(f"{name}#ema"), model).weights
    assert torch.equal(found["0.parametrizations.weight.original1"], content["ema"]["0.weight_v"])


def test_a_distributed_checkpoint_has_old_names_too(tmp_path: Path) -> None:
    state = without(CASES[2].state(1), "num_")
    found = select_for(read(put({"model": state}, tmp_path / "step")), batchnorm())
    expected = plainly(CASES[2], state)
    assert all(torch.equal(found.weights[n], t) for n, t in expected.items())


@pytest.mark.parametrize(
    "versions",
    [{3: "x"}, {"": 5, "0": "y"}, {"": {3: 4}}, "text", [1], None, {"1": {"version": []}}],
)
def test_versions_of_any_kind_break_nothing(versions: Any, tmp_path: Path) -> None:
    state = collections.OrderedDict(CASES[0].state(1))
    state._metadata = versions  # type: ignore[attr-defined]
    torch.save(state, tmp_path / "a.pt")
    found = select_for(read(str(tmp_path / "a.pt")), network(weight_norm)).weights
    assert torch.equal(found["0.parametrizations.weight.original1"], state["0.weight_v"])


def test_another_model_is_reported_at_once(tmp_path: Path) -> None:
    many = {f"h.{i}": {"exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)} for i in range(400)}
    torch.save({"net": MLP("4-6-3").state_dict(), "adam": many}, tmp_path / "a.pt")
    model, copies = batchnorm(), []
    model.__deepcopy__ = copies.append  # type: ignore[assignment]
    with pytest.raises(MismatchError, match=r"a\.pt#?\S* does not fit the model"):
        select_for(read(str(tmp_path / "a.pt")), model)
    assert 0 < len(copies) < 100


# --- without a model -----------------------------------------------------------------------------

BESIDE: dict[str, Any] = {
    "torch_rng_state": torch.get_rng_state(),
    "rng": {"cpu": torch.get_rng_state(), "cuda": torch.get_rng_state()[:16]},
    "loss": torch.tensor(0.3),
    "scores": {"best": torch.tensor(0.3), "step": torch.tensor(7)},
    "class_weights": torch.rand(3),
    "epoch": 4,
    "indices": torch.arange(5),
}


@pytest.mark.parametrize("beside", sample([*BESIDE, "all"], 1, 2))
def test_export_and_inspect_read_the_files_that_interpolate_reads(
    beside: str, losscli: Losscli, folder: Path
) -> None:
    more = BESIDE if beside == "all" else {beside: BESIDE[beside]}
    for seed, name in enumerate("cd"):
        torch.manual_seed(seed)
        model = MLP("6-5-3").state_dict()
        torch.save({"model": model, "optimizer": BESIDE, **more}, f"{name}.pt")
    arguments = ["c.pt", "d.pt", "-m", "mlp:6-5-3", "--points", 3, "-o", "-"]
    done = losscli("interpolate", *arguments)
    assert done.status == 0, done.stderr
    for alone in (["inspect", "c.pt"], ["inspect", "c.pt", "d.pt"]):
        done = losscli(*alone, "--json")
        assert done.status == 0, done.stderr
        assert '"tensor": "layers.0.weight"' in done.stdout
    done = losscli("export", "c.pt", "d.pt", "--alpha", 0.5, "-o", "e.safetensors")
    assert done.status == 0, done.stderr
    found = read("e.safetensors").select(None).weights
    c, d = (torch.load(f"{name}.pt")["model"] for name in "cd")
    expected = oracle.blend(c, d, 0.5)
    assert found.keys() == c.keys()
    assert all(torch.allclose(found[n].double(), expected[n], atol=1e-7) for n in c)


def test_every_tensor_of_a_bare_state_dict_counts(tmp_path: Path) -> None:
    for content in ({"step": torch.tensor(3)}, {"rng": torch.get_rng_state()}, dict(BESIDE["rng"])):
        torch.save(content, tmp_path / "a.pt")
        assert read(str(tmp_path / "a.pt")).select(None).weights.keys() == content.keys()


def test_export_says_that_no_model_is_known(losscli: Losscli, folder: Path) -> None:
    case = next(case for case in CASES if case.name == "hook")
    a, b = case.state(1), plainly(case, case.state(2))
    torch.save(a, "old.pt")
    torch.save(b, "new.pt")
    done = losscli("export", "old.pt", "new.pt", "--alpha", 0.5, "-o", "e.safetensors")
    assert done.status == 1
    assert done.stderr.startswith("losscli: new.pt does not fit old.pt: missing fc1.weight")
    assert "Without a model, names are not translated: load B into a model" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not Path("e.safetensors").exists()
    torch.save({"model": a, "ema": a}, "two.pt")
    done = losscli("export", "two.pt", "old.pt", "--alpha", 0.5, "-o", "e.safetensors")
    assert "No model is known here that would decide. Choose one, for example two" in done.stderr


# --- hooks that change values ---------------------------------------------------------------------


class Changed(nn.Module):
    """Two layers; the second is loaded by a hook."""

    def __init__(self, second: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), second or nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


class Tripling(nn.Linear):
    """Before version 2 its weights were a third of what they are."""

    _version = 2

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any
    ) -> None:
        if local_metadata.get("version", 1) < 2 and f"{prefix}weight" in state_dict:
            state_dict[f"{prefix}weight"] = 3 * state_dict[f"{prefix}weight"]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


class Frozen(nn.Module):
    """As FrozenBatchNorm2d of detectron2: only a file that notes an old version is changed."""

    _version = 3
    eps = 0.125

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.weight, self.bias = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return (self.layer(x) - self.running_mean) * scale + self.bias

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any
    ) -> None:
        version = local_metadata.get("version", None)
        if version is not None and version < 3:
            state_dict[f"{prefix}running_var"] = state_dict[f"{prefix}running_var"] - self.eps
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


class Writing(nn.Linear):
    """It writes on the tensors of the file."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_load_state_dict_post_hook(_add)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        state_dict[f"{prefix}weight"] *= 0.5
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Reading(Tripling):
    """It copies by itself, from the state dict into its own tensors."""

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any
    ) -> None:
        for name, parameter in self.named_parameters():
            with torch.no_grad():
                parameter.copy_(state_dict[prefix + name])
                if local_metadata.get("version", 1) < 2:
                    parameter.add_(1)


class Flat(nn.Linear):
    """Its files hold the weight flattened."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        weight = state_dict[f"{prefix}weight"]
        state_dict[f"{prefix}weight"] = weight.reshape(self.weight.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Bytes(nn.Linear):
    """Its files hold the weight in bytes."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if not (weight := state_dict[f"{prefix}weight"]).is_floating_point():
            state_dict[f"{prefix}weight"] = weight.float() / 64 - 2
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Halving(nn.Linear):
    """It halves its weight whenever it is loaded, and adds to its bias afterwards."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_load_state_dict_pre_hook(_halve)
        self.register_load_state_dict_post_hook(_add)


def _halve(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    state[f"{prefix}weight"] = state[f"{prefix}weight"] / 2


def _add(module: nn.Module, _: Any) -> None:
    with torch.no_grad():
        module.bias.add_(0.25)


class Scaling(nn.Linear):
    """It scales by its extra state, which its own code stores."""

    scale, seen = 1.0, 0

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)

    def get_extra_state(self) -> dict[str, Any]:
        return {"scale": self.scale, "seen": [torch.full((2,), self.seen)]}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.scale, self.seen = state["scale"], int(state["seen"][0][0])
        state["scale"] = 0.0  # a state of its own may be written on


HOOKED: dict[str, Callable[[], nn.Module]] = {
    "version": lambda: Changed(Tripling(5, 3)),
    "noted version": lambda: Changed(Frozen()),
    "copying": lambda: Changed(Reading(5, 3)),
    "writing": lambda: Changed(Writing(5, 3)),
    "shape": lambda: Changed(Flat(5, 3)),
    "type": lambda: Changed(Bytes(5, 3)),
    "always": lambda: Changed(Halving(5, 3)),
    "extra state": lambda: Changed(Scaling(5, 3)),
    "root": lambda: Tripling(4, 3),
}


def stored(kind: str, seed: int, version: int | None) -> dict[str, Any]:
    """The state dict of a file that notes a version, or none at all."""
    state: dict[str, Any] = seeded(HOOKED[kind], seed).state_dict()
    weight = "second.weight"
    if kind == "shape":
        state[weight] = state[weight].flatten()
    if kind == "type":
        state[weight] = (64 * (state[weight] + 2)).to(torch.uint8)
    if kind == "extra state":
        state["second._extra_state"]["scale"] = 0.5
    if version is None:
        return dict(state)
    for module in state._metadata.values():  # type: ignore[attr-defined]
        module["version"] = version
    return state


def loaded(kind: str, file: str, key: str | None = None) -> nn.Module:
    """What torch alone makes of a file."""
    torch.manual_seed(0)
    model = HOOKED[kind]()
    content = torch.load(file)
    model.load_state_dict(content[key] if key else content)
    return model.double().eval()


def opened_as(kind: str, name: str, expected: Mapping[str, Any]) -> None:
    """Whether a file is opened as the state of a model that torch loaded."""
    found = select_for(read(name), HOOKED[kind]())
    assert {*found.weights, *found.extra} == expected.keys()
    for key, value in expected.items():
        if isinstance(value, Tensor):
            assert torch.equal(found.weights[key].to(value.dtype), value), (name, key)
        else:
            assert found.extra[key]["scale"] == value["scale"] == 0.5


def loss_of(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(INPUTS.double()), TARGETS)


def written(
    kind: str, folder: Path, versions: Sequence[int | None], *, key: str | None = None
) -> list[str]:
    names = []
    for i, version in enumerate(versions):
        state = stored(kind, i + 1, version)
        torch.save({key: state, "epoch": 3} if key else state, folder / f"{i}.pt")
        names.append(str(folder / f"{i}.pt"))
    return names


STUDY: dict[str, Any] = {
    "data": {"all": (INPUTS, TARGETS)},
    "dtype": "float64",
    "metric": ("none",),
}


@pytest.mark.parametrize(
    ("kind", "versions"),
    [
        pytest.param(kind, order, marks=() if (i - j) % 3 == 0 else pytest.mark.stress)
        for i, kind in enumerate(HOOKED)
        for j, order in enumerate([(1, 3, None), (3, None, 1), (None, 1, 3)])
    ],
)
def test_a_file_is_changed_once_as_load_state_dict_changes_it(
    kind: str, versions: Sequence[int | None], tmp_path: Path
) -> None:
    names = written(kind, tmp_path, versions)
    models = [loaded(kind, name) for name in names]
    a, b = models[:2]
    between = oracle.blend(
        *(
            {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}
            for model in (a, b)
        ),
        0.5,
    )
    middle = copy.deepcopy(a)
    with torch.no_grad():
        for name, tensor in [*middle.named_parameters(), *middle.named_buffers()]:
            tensor.copy_(between[name])
    study = {**STUDY, "model": HOOKED[kind]}
    line = library.interpolate(*names[:2], points=3, range=(0, 1), **study)
    for found, model in zip(line.table.floats("loss"), (a, middle, b), strict=True):
        assert found == pytest.approx(loss_of(model).item(), rel=1e-12)
    path = library.trajectory(names, surface=False, **study)
    losses = [loss_of(model).item() for model in models]
    assert path.table.floats("loss") == pytest.approx(losses, rel=1e-12)
    # From Python as from files, and the objects stay as they are.
    objects = [torch.load(name) for name in names[:2]]
    before = copy.deepcopy(objects)
    again = library.interpolate(*objects, points=3, range=(0, 1), **study)
    assert again.table.floats("loss") == line.table.floats("loss")
    for state, own in zip(objects, before, strict=True):
        assert all(torch.equal(state[n], t) for n, t in own.items() if isinstance(t, Tensor))


@pytest.mark.parametrize(
    ("kind", "version"), sample(zip(HOOKED, [1] * 3 + [3] * 3 + [None] * 3, strict=True), 1)
)
def test_gradients_are_those_of_what_load_state_dict_makes(
    kind: str, version: int | None, tmp_path: Path
) -> None:
    (name,) = written(kind, tmp_path, [version])
    model = loaded(kind, name)
    gradient = torch.autograd.grad(loss_of(model), list(model.parameters()))
    norm = torch.cat([g.flatten() for g in gradient]).norm().item()
    (row,) = library.check(name, **STUDY, model=HOOKED[kind]).table.records()
    assert row["loss"] == pytest.approx(loss_of(model).item(), rel=1e-12)
    assert row["gradient_norm"] == pytest.approx(norm, rel=1e-9)


@pytest.mark.parametrize("kind", ["always", "copying", "writing", "shape"])
def test_hooks_find_every_tensor_where_some_move(kind: str, tmp_path: Path) -> None:
    names = written(kind, tmp_path, [1, 3])
    a, b = (loaded(kind, name) for name in names)
    study = {**STUDY, "model": HOOKED[kind], "points": 3, "range": (0, 1)}
    line = library.interpolate(*names, only="first.*", **study)
    a.first.load_state_dict(b.first.state_dict())  # type: ignore[operator,union-attr]
    assert line.table.floats("loss")[2] == pytest.approx(loss_of(a).item(), rel=1e-12)


@pytest.mark.parametrize("kind", ["always", "version", "extra state"])
def test_a_module_is_evaluated_as_it_is(kind: str, tmp_path: Path) -> None:
    models = [loaded(kind, name) for name in written(kind, tmp_path, [1, 1, 1])]
    losses = [loss_of(model).item() for model in models]
    # Given as the model, as the checkpoint, or as both.
    for given in (HOOKED[kind], models[0]):
        found = library.trajectory(models, surface=False, **STUDY, model=given)
        assert found.table.floats("loss") == pytest.approx(losses, rel=1e-12)


@pytest.mark.parametrize("kind", ["version", "noted version", "extra state"])
def test_versions_and_extra_state_are_found_at_any_key(kind: str, tmp_path: Path) -> None:
    (name,) = written(kind, tmp_path, [1], key="net")
    expected = loaded(kind, name, "net").state_dict()
    state = torch.load(name)["net"]
    wrapped = collections.OrderedDict((f"module.{key}", value) for key, value in state.items())
    wrapped._metadata = {  # type: ignore[attr-defined]
        "": {"version": 1},
        **{f"module.{m}".strip("."): v for m, v in state._metadata.items()},
    }
    inner = collections.OrderedDict((f"a.{key}", value) for key, value in wrapped.items())
    inner["b.weight"] = torch.ones(2)
    inner._metadata = {f"a.{m}".strip("."): v for m, v in wrapped._metadata.items()}  # type: ignore[attr-defined]
    forms = {"wrapped": wrapped, "two": {"net": state, "ema": stored(kind, 2, 1)}, "inner": inner}
    for form, content in forms.items():
        torch.save(content, tmp_path / f"{form}.pt")
    for named in (
        "0.pt",
        "0.pt#net",
        "wrapped.pt",
        "two.pt#net",
        "inner.pt#a",
        "inner.pt#a.module",
    ):
        opened_as(kind, str(tmp_path / named), expected)


@pytest.mark.parametrize(
    ("kind", "alpha", "version", "key"),
    in_turn(
        # Integer tensors are A's.
        [(kind, x) for kind in HOOKED for x in (0.0, 1.0) if (kind, x) != ("type", 1.0)],
        *itertools.product([1, 3, None], [None, "state_dict"]),
    ),
)
def test_an_exported_file_is_loaded_as_its_ends_are(
    kind: str, alpha: float, version: int | None, key: str | None, tmp_path: Path, losscli: Losscli
) -> None:
    names = written(kind, tmp_path, (version, version), key=key)
    out = str(tmp_path / "e.pt")
    done = losscli("export", *names, "--alpha", alpha, "-o", out)
    assert done.status == 0, done.stderr
    expected = loaded(kind, names[int(alpha)], key).state_dict()
    found = loaded(kind, out, key).state_dict()
    assert all(
        torch.equal(found[n], t) if isinstance(t, Tensor) else n.endswith("_extra_state")
        for n, t in expected.items()
    )
    opened_as(kind, out, expected)


def test_export_refuses_what_it_cannot_write_for_a_model_it_does_not_know(
    losscli: Losscli, tmp_path: Path
) -> None:
    names = written("version", tmp_path, (1, 3))
    done = losscli("export", *names, "--alpha", 0.5, "-o", tmp_path / "e.pt")
    assert (done.status, done.stdout) == (1, "")
    assert "have different versions of the model: {'version': 1} and {'version': 3}" in done.stderr
    for kind, what in (("version", "version 3 of the model"), ("extra state", "second._extra")):
        names = written(kind, tmp_path, (3, 3))
        done = losscli("export", *names, "--alpha", 0.5, "-o", tmp_path / "e.safetensors")
        assert (done.status, done.stdout) == (1, "")
        assert f"safetensors does not store {what}" in done.stderr
        assert f"Write {tmp_path}/e.pt" in done.stderr
        assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("e.*"))


def test_missing_and_unknown_extra_state_is_refused_as_torch_refuses_it(tmp_path: Path) -> None:
    state = stored("extra state", 1, 1)
    without_it = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    plain = seeded(Changed, 1).state_dict()
    cases: list[tuple[Callable[[], nn.Module], Any, str]] = [
        (HOOKED["extra state"], without_it, 'Missing key.* "second._extra_state"'),
        (Changed, {**plain, "second._extra_state": 3}, 'Unexpected key.* "second._extra_state"'),
        (HOOKED["extra state"], {**state, "second._extra_state": 3}, "not subscriptable"),
    ]
    for build, content, message in cases:
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises((RuntimeError, TypeError), match=message):
            build().load_state_dict(torch.load(tmp_path / "a.pt"))
        with pytest.raises(MismatchError, match=rf"a\.pt cannot be loaded .*{message}") as caught:
            select_for(read(str(tmp_path / "a.pt")), build())
        assert "\n" not in str(caught.value)
    # A stand-in is not what was written.
    torch.save({**state, "second._extra_state": {"scale": np.ones(2)}}, tmp_path / "a.pt")
    with pytest.raises(MismatchError, match=r"second\._extra_state holds an object that"):
        select_for(read(str(tmp_path / "a.pt")), HOOKED["extra state"]())


def test_extra_states_that_differ_are_refused_where_they_change_the_loss(tmp_path: Path) -> None:
    a, b, c = (stored("extra state", seed, 1) for seed in (1, 2, 3))
    b["second._extra_state"]["scale"] = 0.75
    c["second._extra_state"]["seen"] = [torch.tensor([7, 7])]
    names = [str(tmp_path / f"{name}.pt") for name in "abc"]
    for name, state in zip(names, (a, b, c), strict=True):
        torch.save(state, name)
    study = {**STUDY, "model": HOOKED["extra state"], "points": 3, "range": (0, 1)}
    with pytest.raises(
        MismatchError, match=r"second\._extra_state of .*b\.pt is not that of .*a\.pt"
    ):
        library.interpolate(names[0], names[1], **study)
    line = library.interpolate(names[0], names[2], **study)
    (note,) = (note for note in line.summary["notes"] if "_extra_state" in note)
    assert "the losses are the same with either" in note
    expected = [loss_of(loaded("extra state", names[i])).item() for i in (0, 2)]
    losses = line.table.floats("loss")
    assert [losses[0], losses[2]] == pytest.approx(expected, rel=1e-12)


@pytest.fixture
def hooked(tmp_path: Path) -> Callable[[str], list[str]]:
    """Makes two checkpoints of a kind, and returns their names and the model and data options."""
    torch.manual_seed(0)
    np.savez(tmp_path / "data.npz", inputs=INPUTS.numpy(), targets=TARGETS.numpy())

    def make(kind: str) -> list[str]:
        (tmp_path / "net.py").write_text(
            "from tests.checkpoint.test_hooks import HOOKED\n"
            f"def net(): return HOOKED[{kind!r}]()\n"
        )
        names = written(kind, tmp_path, (1, 1))
        return [*names, "-m", f"{tmp_path}/net.py:net", "-d", f"npz:{tmp_path}/data.npz"]

    return make


@pytest.mark.parametrize("kind", ["version", pytest.param("shape", marks=pytest.mark.stress)])
def test_an_aligned_file_is_loaded_as_it_was_aligned(
    kind: str, losscli: Losscli, tmp_path: Path, hooked: Callable[[str], list[str]]
) -> None:
    arguments = hooked(kind)
    names = arguments[:2]
    out = tmp_path / ("x.pt" if kind == "version" else "x.safetensors")
    done = losscli("align", *arguments, "-o", out)
    assert done.status == 0, done.stderr
    line = library.interpolate(out, names[1], points=2, range=(0, 1), model=HOOKED[kind], **STUDY)
    one, other = line.table.floats("loss")
    assert one == pytest.approx(other, rel=1e-5)


def test_what_safetensors_cannot_store_is_refused_before_the_work(
    losscli: Losscli,
    tmp_path: Path,
    hooked: Callable[[str], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def work(*_: Any, **__: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr("losscli.studies.alignment._groups", work)
    monkeypatch.setattr("losscli.cli.run_study._evaluate", work)
    arguments = hooked("version")
    before = sorted(tmp_path.iterdir())
    for command, file, cure in (
        (("align",), "x.safetensors", f"Write {tmp_path}/x.pt"),
        (("soup", "--greedy", "data"), "x.safetensors", f"Write {tmp_path}/x.pt"),
        (
            ("connect",),
            "x.bend-1.safetensors",
            "Run losscli.connect in Python, and save its checkpoints as .pt files",
        ),
    ):
        out = tmp_path / ("x" if command == ("connect",) else "x.safetensors")
        done = losscli(*command, *arguments, "-o", out)
        what = "safetensors does not store version 2 of second, which the model may need to load"
        assert (done.status, done.stdout) == (1, "")
        assert done.stderr == (
            f"losscli: {tmp_path / file} cannot be written: {what} the file. {cure}\n"
        )
        assert sorted(tmp_path.iterdir()) == before
