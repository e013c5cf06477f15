"""Checkpoints with old names: what ``load_state_dict(strict=True)`` takes is taken."""

from __future__ import annotations

import collections
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.parametrizations import weight_norm

import losscli as library
from losscli.checkpoint import LoadHooks, read, select_for
from losscli.errors import CheckpointError, MismatchError
from losscli.evaluation.losses import LOSSES
from losscli.models import MLP
from tests import oracle
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
        for name, tensor in model.state_dict().items():
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
@pytest.mark.parametrize("kind", ["bare", "legacy", "nested", "wrapped"])
@pytest.mark.parametrize("case", CASES, ids=str)
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
def test_the_model_is_left_alone_and_nothing_is_copied_without_need(
    case: Old, tmp_path: Path
) -> None:
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
def test_what_load_state_dict_refuses_is_refused(
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


def test_a_model_that_is_another_is_told_at_once(tmp_path: Path) -> None:
    many = {f"h.{i}": {"exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)} for i in range(2000)}
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


@pytest.mark.parametrize("beside", [*BESIDE, "all"])
def test_what_interpolate_reads_export_and_inspect_read(
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


def test_of_a_state_dict_alone_every_tensor_counts(tmp_path: Path) -> None:
    for content in ({"step": torch.tensor(3)}, {"rng": torch.get_rng_state()}, dict(BESIDE["rng"])):
        torch.save(content, tmp_path / "a.pt")
        assert read(str(tmp_path / "a.pt")).select(None).weights.keys() == content.keys()


def test_where_no_model_is_known_export_says_so(losscli: Losscli, folder: Path) -> None:
    a, b = (case for case in (CASES[0].state(1), plainly(CASES[0], CASES[0].state(2))))
    torch.save(a, "old.pt")
    torch.save(b, "new.pt")
    done = losscli("export", "old.pt", "new.pt", "--alpha", 0.5, "-o", "e.safetensors")
    assert done.status == 1
    assert done.stderr.startswith("losscli: new.pt does not fit old.pt: missing 0.weight_g")
    assert "No model is known here that would translate names: load B into a model" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not Path("e.safetensors").exists()
    torch.save({"model": a, "ema": a}, "two.pt")
    done = losscli("export", "two.pt", "old.pt", "--alpha", 0.5, "-o", "e.safetensors")
    assert "No model is known here that would decide. Choose one, for example two" in done.stderr


class Tripling(nn.Linear):
    """Before version 2 its weights were a third of what they are."""

    _version = 2

    def __init__(self) -> None:
        super().__init__(4, 3)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any
    ) -> None:
        if local_metadata.get("version", 1) < 2 and f"{prefix}weight" in state_dict:
            state_dict[f"{prefix}weight"] = 3 * state_dict[f"{prefix}weight"]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def test_hooks_that_change_tensors_by_the_version_of_a_file_are_refused(tmp_path: Path) -> None:
    study: dict[str, Any] = {"model": Tripling, "data": {"all": (INPUTS, TARGETS)}, "points": 2}
    for seed in (1, 2):
        torch.save(seeded(Tripling, seed).state_dict(), tmp_path / f"{seed}.pt")
    with pytest.raises(CheckpointError, match="by the version that the file notes"):
        library.interpolate(tmp_path / "1.pt", tmp_path / "2.pt", **study)
    # Without a version the hooks do what they do when anybody loads the file.
    for seed in (1, 2):
        torch.save(dict(seeded(Tripling, seed).state_dict()), tmp_path / f"{seed}.pt")
    found = library.interpolate(tmp_path / "1.pt", tmp_path / "2.pt", **study)
    model = Tripling()
    model.load_state_dict(torch.load(tmp_path / "1.pt"))
    expected = torch.nn.functional.cross_entropy(model(INPUTS), TARGETS).item()
    assert found.table["loss"][found.table["alpha"].index(0)] == pytest.approx(expected, rel=1e-5)
