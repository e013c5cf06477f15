"""LoRA adapters written by peft, held against its own merging in float64."""

from __future__ import annotations

import contextlib
import json
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from losscli.checkpoint import Checkpoint, find_base, list_checkpoints, read, select_for
from losscli.checkpoint.peft_adapters import TYPES
from losscli.errors import CheckpointError, MismatchError
from losscli.models import MLP
from tests import oracle
from tests.cases import in_turn
from tests.checkpoint.test_files import refusal, same, state, write
from tests.checkpoint.test_folders import tiny
from tests.conftest import Losscli
from tests.libraries import Library

peft: Any = Library("peft")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"peft\..*|torch\..*|transformers\..*")
        yield


class Mixed(nn.Module):
    """Layers of every kind that LoRA changes."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 4)
        self.conv = nn.Conv2d(2, 4, 3)
        self.point = nn.Conv2d(4, 4, 1)
        self.line = nn.Conv1d(4, 5, 3)
        self.square = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(3)


def mixed(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Mixed()


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MLP("4-3-2")


def adapt(model: nn.Module, folder: Path, *, seed: int = 1, **config: Any) -> dict[str, Tensor]:
    """Trains an adapter, so to speak, saves it, and returns what peft makes of both."""
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(folder)
    merged = wrapped.merge_and_unload()
    return {name: t.detach().clone() for name, t in merged.state_dict().items()}


def opened(base: dict[str, Tensor], adapter: Path, expected: dict[str, Tensor]) -> Checkpoint:
    return read(str(adapter)).select(expected, Checkpoint("base", base, {"losscli.model": "x"}))


EVERY = ["words", "conv", "point", "line", "square", "head"]
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (mlp, {"r": 2, "target_modules": ["layers.0", "layers.1"]}),
    "alpha": (mlp, {"r": 2, "lora_alpha": 5, "target_modules": ["layers.0"]}),
    "rslora": (mlp, {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["layers.1"]}),
    "every kind": (mixed, {"r": 2, "target_modules": EVERY}),
    "patterns": (
        mixed,
        {
            "r": 2,
            "target_modules": EVERY,
            "rank_pattern": {"head": 3, "^conv": 1},
            "alpha_pattern": {"point|line": 7, "square": 0.5},
        },
    ),
    "trained biases": (mixed, {"r": 2, "target_modules": ["conv", "head"], "bias": "all"}),
    "biases of its own": (mixed, {"r": 2, "target_modules": ["conv", "head"], "bias": "lora_only"}),
    "biases of LoRA": (mixed, {"r": 2, "target_modules": ["conv", "square"], "lora_bias": True}),
    "whole modules": (
        mixed, {"r": 2, "target_modules": ["conv"], "modules_to_save": ["head", "norm"]},
    ),
    "whole modules and biases": (
        mixed, {"r": 2, "target_modules": ["conv"], "modules_to_save": ["norm"], "bias": "all"},
    ),
    "gaussian": (mlp, {"r": 2, "target_modules": ["layers.0"], "init_lora_weights": "gaussian"}),
    "gpt2": (
        lambda: tiny(0),
        {"r": 2, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    ),
    "gpt2's embedding": (
        lambda: tiny(0, tie_word_embeddings=False),
        {"r": 2, "target_modules": ["wte", "c_attn"], "fan_in_fan_out": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("case", "suffix"), in_turn(CASES, ".safetensors", ".bin"))
def test_an_adapter_changes_its_base_as_peft_does(case: str, suffix: str, tmp_path: Path) -> None:
    build, config = CASES[case]
    base = {n: t.clone() for n, t in build().double().state_dict().items()}
    merged = adapt(build().double(), tmp_path, **config)
    if suffix == ".bin":
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        torch.save(tensors, tmp_path / "adapter_model.bin")
        (tmp_path / "adapter_model.safetensors").unlink()
    found = opened(base, tmp_path, build().state_dict()).weights
    assert found.keys() == merged.keys() == base.keys()
    touched = {name for name in base if not torch.equal(base[name], merged[name])}
    assert touched
    for name, tensor in found.items():
        assert tensor.dtype == torch.float64
        assert torch.allclose(tensor, merged[name], rtol=1e-13, atol=1e-15), name
        # What the adapter does not change is the base's own tensor, not a copy.
        assert (tensor is base[name]) == (name not in touched), name


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_half_precision_is_merged_in_float32(stored: torch.dtype, tmp_path: Path) -> None:
    base = {n: t.to(stored) for n, t in mlp().state_dict().items()}
    adapt(mlp(), tmp_path, r=2, target_modules=["layers.0"])
    wide = mlp()
    wide.load_state_dict(base)
    exact = peft.PeftModel.from_pretrained(wide.double(), tmp_path).merge_and_unload().state_dict()
    found = opened(base, tmp_path, mlp().state_dict()).weights
    assert found["layers.0.weight"].dtype == torch.float32
    assert torch.allclose(found["layers.0.weight"].double(), exact["layers.0.weight"], rtol=1e-6)
    assert found["layers.1.weight"] is base["layers.1.weight"]


def test_a_square_weight_whose_layout_is_not_known_is_refused(tmp_path: Path) -> None:
    model = tiny(0)
    base = {n: t.clone() for n, t in model.state_dict().items()}
    adapt(model, tmp_path, r=2, target_modules=["c_proj", "c_attn"], fan_in_fan_out=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["fan_in_fan_out"] = False
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"attn\.c_proj\.weight is square: its layout is"):
        opened(base, tmp_path, tiny(0).state_dict())


def test_trained_biases_that_peft_did_not_save_are_missed(tmp_path: Path) -> None:
    base = {n: t.clone() for n, t in mixed().state_dict().items()}
    adapt(mixed(), tmp_path, r=2, target_modules=["conv", "head"], bias="lora_only")
    file = tmp_path / "adapter_model.safetensors"
    kept = {n: t for n, t in load_file(file).items() if not n.endswith("conv.base_layer.bias")}
    assert len(kept) == len(load_file(file)) - 1
    save_file(kept, file)
    with pytest.raises(CheckpointError, match=r"biases were trained, .* has no conv\.bias"):
        opened(base, tmp_path, mixed().state_dict())


# Merged by peft


class Words(nn.Module):
    """A network of words with layers for every type of adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 4)
        self.wide = nn.Linear(4, 6)
        self.square = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, words: Tensor) -> Any:
        hidden = self.wide(self.words(words)).relu()
        return self.head(self.norm(self.square(hidden)))


def words() -> nn.Module:
    torch.manual_seed(0)
    return Words()


TWO = {"target_modules": ["wide", "square"]}
PEFT: dict[str, Callable[[], Any]] = {
    "DoRA": lambda: peft.LoraConfig(**TWO, r=2, use_dora=True),
    "DoRA of an embedding": lambda: peft.LoraConfig(
        target_modules=["words", "wide"], use_dora=True
    ),
    "DoRA and a whole module": lambda: peft.LoraConfig(
        **TWO, use_dora=True, modules_to_save=["head"]
    ),
    "LoRA of parameters": lambda: peft.LoraConfig(
        target_modules=[], target_parameters=["wide.weight"]
    ),
    "trained tokens": lambda: peft.LoraConfig(**TWO, trainable_token_indices={"words": [1, 2]}),
    "ADALORA": lambda: peft.AdaLoraConfig(**TWO, total_step=10),
    "FOURIERFT": lambda: peft.FourierFTConfig(**TWO, n_frequency=4),
    "HRA": lambda: peft.HRAConfig(**TWO, r=2),
    "IA3": lambda: peft.IA3Config(**TWO, feedforward_modules=["square"]),
    "IA3 and a whole module": lambda: peft.IA3Config(
        **TWO, feedforward_modules=[], modules_to_save=["norm"]
    ),
    "LN_TUNING": lambda: peft.LNTuningConfig(target_modules=["norm"]),
    "LOHA": lambda: peft.LoHaConfig(**TWO, r=2),
    "LOKR": lambda: peft.LoKrConfig(**TWO, r=2),
    "MISS": lambda: peft.MissConfig(**TWO, r=2),
    "OFT": lambda: peft.OFTConfig(**TWO, oft_block_size=2),
    "RANDLORA": lambda: peft.RandLoraConfig(**TWO, r=2),
    "ROAD": lambda: peft.RoadConfig(target_modules=["square"], group_size=2),
    "VERA": lambda: peft.VeraConfig(target_modules=["square"], r=2),
}
DRAWN = "VERA without its projections"


def drawn() -> Any:
    config = PEFT["VERA"]()
    config.save_projection = False
    return config


PEFT[DRAWN] = drawn


def train(model: nn.Module, config: Any, folder: Path) -> None:
    """Saves an adapter with random changes, as training makes them."""
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(folder)


def merged_into(model: nn.Module, base: dict[str, Tensor], adapter: Path) -> Checkpoint:
    return select_for(read(str(adapter)), model, Checkpoint("base", base, {}))


@pytest.mark.parametrize("case", PEFT)
def test_the_merged_model_computes_what_the_trained_one_does(case: str, tmp_path: Path) -> None:
    """The oracle is peft's own model in float64, which applies the adapter without merging it."""
    train(words(), PEFT[case](), tmp_path)
    model = words()
    base = {name: t.double() for name, t in model.state_dict().items()}
    found = merged_into(model, base, tmp_path).weights
    assert found.keys() == base.keys()
    assert same(dict(model.state_dict()), dict(words().state_dict()))
    touched = {name for name, tensor in found.items() if tensor is not base[name]}
    assert touched
    assert all(not torch.equal(found[name], base[name]) for name in touched)
    plain = words().double()
    plain.load_state_dict(found)
    trained = peft.PeftModel.from_pretrained(
        words().double(), tmp_path, autocast_adapter_dtype=False
    )
    inputs = torch.arange(7)
    with torch.no_grad():
        expected = trained.double().eval()(inputs)
        assert not torch.allclose(expected, words().double()(inputs), rtol=1e-3)
        torch.testing.assert_close(plain(inputs), expected, rtol=1e-13, atol=1e-14)


def test_every_type_that_peft_merges_is_tested() -> None:
    tested = {config().peft_type.value for config in PEFT.values()}
    assert tested == {"LORA", *TYPES}


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float64])
def test_weights_merged_by_peft_are_float32_or_wider(stored: torch.dtype, tmp_path: Path) -> None:
    train(words(), PEFT["LOHA"](), tmp_path)
    base = {name: t.to(stored) for name, t in words().state_dict().items()}
    found = merged_into(words(), base, tmp_path).weights
    wide = torch.promote_types(stored, torch.float32)
    assert found["wide.weight"].dtype == found["square.weight"].dtype == wide
    assert found["wide.bias"] is base["wide.bias"]


BRIEFLY = ("--points", 3, "--no-figure", "--dtype", "float64", "-q")


@pytest.fixture
def dora(pair: dict[str, Tensor], tmp_path: Path) -> dict[str, Tensor]:
    """A DoRA adapter of base.pt in the folder dora; what both make together."""
    return adapt(mlp(), tmp_path / "dora", r=2, target_modules=["layers.0"], use_dora=True)


def test_the_line_goes_to_what_peft_merges(dora: dict[str, Tensor], losscli: Losscli) -> None:
    done = losscli("interpolate", "base.pt", "dora", "--json", *BRIEFLY)
    assert done.status == 0, done.stderr
    found = json.loads(done.stdout)["splits"]["data"]
    losses = [loss(mlp().state_dict()), loss(dora)]
    assert [found["loss_a"], found["loss_b"]] == pytest.approx(losses, rel=1e-6)
    assert "base_model.model.layers.0.lora_magnitude_vector" in losscli("inspect", "dora").stdout


@pytest.mark.usefixtures("dora")
def test_adapters_that_peft_merges_are_refused_without_a_model(
    losscli: Losscli, tmp_path: Path
) -> None:
    for command in (
        ("export", "base.pt", "dora", "--alpha", 1, "-o", "x.safetensors"),
        ("inspect", "base.pt", "dora"),
    ):
        done = losscli(*command)
        assert (done.status, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert (
            "dora is an adapter of the type DoRA, which is merged into a model, and this command "
            "has none. Merge it with peft (merge_and_unload)"
        ) in done.stderr
    assert not list(tmp_path.glob("x*"))


@pytest.mark.usefixtures("dora")
def test_without_peft_the_extra_is_named(
    losscli: Losscli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    done = losscli("interpolate", "base.pt", "dora", "-o", "x")
    assert (done.status, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "which is merged by peft, and that is not installed" in done.stderr
    assert done.stderr.rstrip().endswith("pip install 'losscli[hf]'")
    assert not list(tmp_path.glob("x*"))
    assert (
        losscli("interpolate", "base.pt", "adapter", "-o", "y", *BRIEFLY).status == 0
    )  # plain LoRA


def test_adapters_that_peft_cannot_merge_are_reported_in_one_line(tmp_path: Path) -> None:
    train(words(), PEFT["DoRA"](), tmp_path)
    base = {name: t.clone() for name, t in words().state_dict().items()}
    file = tmp_path / "adapter_model.safetensors"
    own = load_file(file)
    a = "base_model.model.wide.lora_A.weight"
    for tensors, told in (
        (
            {**own, "base_model.model.x.lora_A.weight": torch.ones(2, 4)},
            "the model has no place for base_mo",
        ),
        ({name: t for name, t in own.items() if name != a}, f"the adapter lacks {a}"),
        ({**own, a: torch.ones(2, 9)}, "size mismatch for base_model.model.wide.lora_A"),
    ):
        save_file(tensors, file)
        with pytest.raises(CheckpointError, match=r"peft [\d.]+ cannot merge this ad") as caught:
            merged_into(words(), base, tmp_path)
        assert told in str(caught.value)
        assert "\n" not in str(caught.value)
    save_file(own, file)
    # No size in the config takes memory.
    change(tmp_path, r=1 << 40)
    with pytest.raises(CheckpointError, match="size mismatch for"):
        merged_into(words(), base, tmp_path)
    change(tmp_path, r=2, target_modules=["elsewhere"])
    with pytest.raises(CheckpointError, match="elsewhere"):
        merged_into(words(), base, tmp_path)


def test_a_layer_that_peft_merges_wrongly_is_refused(tmp_path: Path) -> None:
    """In peft 0.21, OFT of a convolution computes something else once it is merged."""

    def conv() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 4, 3))

    train(conv(), peft.OFTConfig(target_modules=["0"], oft_block_size=2), tmp_path)
    with pytest.raises(CheckpointError, match=r"0 computes something else when it is merged"):
        merged_into(conv(), dict(conv().state_dict()), tmp_path)


def test_a_series_of_endless_terms_is_refused(tmp_path: Path) -> None:
    train(words(), PEFT["OFT"](), tmp_path)
    change(tmp_path, num_cayley_neumann_terms=1 << 40)
    assert "num_cayley_neumann_terms is 1099511627776, which is not a number" in refusal(tmp_path)


def test_peft_does_not_change_a_tied_tensor(tmp_path: Path) -> None:
    class Tied(Words):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.words.weight

    train(Tied(), PEFT["DoRA of an embedding"](), tmp_path)
    base = {name: t.clone() for name, t in Tied().state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"\.weight and .*\.weight are one tensor in the mode"
    ):
        merged_into(Tied(), base, tmp_path)


def test_no_damage_to_a_config_of_peft_raises_anything_else(tmp_path: Path) -> None:
    train(words(), PEFT["LOKR"](), tmp_path)
    assert damage(tmp_path, words) > 10


# On the command line


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """base.pt, its adapter and data in the current folder; what both make together."""
    monkeypatch.chdir(tmp_path)
    write({"model": mlp().state_dict(), "losscli.model": "mlp:4-3-2"}, tmp_path / "base.pt")
    merged = adapt(mlp(), tmp_path / "adapter", r=2, target_modules=["layers.0"])
    torch.manual_seed(0)
    data = {"inputs": torch.rand(9, 4), "targets": torch.arange(9) % 2}
    save_file(data, tmp_path / "data.safetensors")
    (tmp_path / "losscli.toml").write_text('data = "safetensors:data.safetensors"\n')
    return merged


def loss(weights: Any) -> float:
    data = load_file("data.safetensors")
    return oracle.mean(
        oracle.losses(
            lambda: MLP("4-3-2"),
            weights,
            data["inputs"],
            data["targets"],
            lambda o, t: nn.functional.cross_entropy(o, t, reduction="none"),
        )
    )


@pytest.mark.parametrize("turned", [False, True])
def test_the_line_goes_from_the_base_to_base_and_adapter(
    turned: bool, pair: dict[str, Tensor], losscli: Losscli
) -> None:
    names = ["adapter", "base.pt"] if turned else ["base.pt", "adapter"]
    done = losscli("interpolate", *names, "--json", "-o", "x", *BRIEFLY)
    assert done.status == 0, done.stderr
    summary = json.loads(done.stdout)
    losses = [loss(mlp().state_dict()), loss(pair)]
    found = summary["splits"]["data"]
    ends = losses[::-1] if turned else losses
    assert [found["loss_a"], found["loss_b"]] == pytest.approx(ends, rel=1e-6)
    assert summary["moving"] == {"tensors": 1, "values": 12}
    told = {c["name"]: c for c in summary["checkpoints"]}
    assert told["adapter"]["path"] == "adapter"
    assert told["adapter"]["sha256"] != told["base.pt"]["sha256"]


def test_inspect_and_export_merge_too(pair: dict[str, Tensor], losscli: Losscli) -> None:
    alone = losscli("inspect", "adapter")
    assert "base_model.model.layers.0.lora_A.weight" in alone.stdout
    both = json.loads(losscli("inspect", "base.pt", "adapter", "--json").stdout)
    base = mlp().state_dict()
    moved = (pair["layers.0.weight"].double() - base["layers.0.weight"].double()).norm()
    assert both["distance"] == pytest.approx(float(moved), rel=1e-6)
    assert both["mismatches"] == []
    done = losscli("export", "base.pt", "adapter", "--alpha", 0.25, "-o", "p.safetensors")
    assert done.status == 0, done.stderr
    point = read("p.safetensors").select(None)
    assert point.metadata["losscli.model"] == "mlp:4-3-2"
    expected = oracle.blend(base, pair, 0.25)
    for name, tensor in point.weights.items():
        assert torch.allclose(tensor.double(), expected[name], rtol=1e-5, atol=1e-8)


def folder_of_base(tmp_path: Path) -> Path:
    folder = tmp_path / "the base"
    folder.mkdir()
    save_file(mlp().state_dict(), folder / "model.safetensors", {"losscli.model": "mlp:4-3-2"})
    return folder


def name_base(adapter: Path, base: str | None) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def test_adapters_without_a_base_use_the_one_that_they_name(
    pair: dict[str, Tensor], losscli: Losscli, tmp_path: Path
) -> None:
    base = folder_of_base(tmp_path)
    other = adapt(mlp(), tmp_path / "other", seed=2, r=2, target_modules=["layers.1"])
    for adapter in ("adapter", "other"):
        name_base(tmp_path / adapter, str(base))
    done = losscli("interpolate", "adapter", "other", "--json", "-o", "x", *BRIEFLY)
    assert done.status == 0, done.stderr
    found = json.loads(done.stdout)["splits"]["data"]
    assert [found["loss_a"], found["loss_b"]] == pytest.approx([loss(pair), loss(other)], rel=1e-6)
    # A change of the base is a change of the adapter's checkpoint.
    digest = json.loads(done.stdout)["checkpoints"][0]["sha256"]
    save_file(mlp(5).state_dict(), base / "model.safetensors", {"losscli.model": "mlp:4-3-2"})
    again = losscli("interpolate", "adapter", "other", "--json", "-o", "y", *BRIEFLY)
    assert json.loads(again.stdout)["checkpoints"][0]["sha256"] != digest
    name_base(tmp_path / "other", "elsewhere")
    done = losscli("interpolate", "adapter", "other", "-o", "z")
    assert (done.status, done.stderr.count("\n")) == (1, 1)
    assert "and other on 'elsewhere'. Name the checkpoint that both change first" in done.stderr
    # A checkpoint of the command comes before what the config says.
    assert find_base(["init:0", "adapter", "base.pt"]) == "base.pt"
    assert find_base(["init:0"]) is None


@pytest.mark.parametrize("base", [None, "meta-llama/Llama-3.1-8B", "\0"])
def test_a_base_that_is_not_here_is_an_error_and_never_fetched(
    base: str | None, pair: dict[str, Tensor], losscli: Losscli, tmp_path: Path
) -> None:
    name_base(tmp_path / "adapter", base)
    for names in (("adapter", "init:0"), ("adapter", "adapter")):
        done = losscli("interpolate", *names, "-m", "mlp:4-3-2", "-o", "x")
        assert (done.status, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert "Name the checkpoint that it changes first" in done.stderr
    assert not list(tmp_path.glob("x*"))


def test_a_path_of_adapters(pair: dict[str, Tensor], losscli: Losscli, tmp_path: Path) -> None:
    for step in (20, 100, 3):
        adapt(
            mlp(), tmp_path / f"out/checkpoint-{step}", seed=step, r=2, target_modules=["layers.0"]
        )
        torch.save({}, tmp_path / f"out/checkpoint-{step}" / "optimizer.pt")
    names = [f"out/checkpoint-{step}" for step in (3, 20, 100)]
    assert list_checkpoints("out") == names
    done = losscli("trajectory", "base.pt", "out", "-o", "-", "--no-surface")
    assert done.status == 0, done.stderr
    assert [r.split(",")[1] for r in done.stdout.splitlines()[1:]] == ["base.pt", *names]


def test_an_adapter_that_changes_while_it_is_read_is_refused(
    pair: dict[str, Tensor], tmp_path: Path
) -> None:
    from losscli.settings import Settings
    from losscli.studies.problem import prepare

    for changed in (tmp_path / "adapter" / "adapter_config.json", tmp_path / "base.pt"):
        problem = prepare(["base.pt", "adapter"], Settings())
        assert torch.allclose(
            problem.open(1).weights["layers.0.weight"], pair["layers.0.weight"], rtol=1e-5
        )
        changed.write_bytes(changed.read_bytes())
        with pytest.raises(CheckpointError, match="adapter was changed while losscli read it"):
            problem.open(1)


# What is refused


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the base"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora', which changes the base"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "init_lora_weights='pissa', which"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_other_kinds_of_lora_are_refused(config: dict[str, Any], told: str, tmp_path: Path) -> None:
    adapt(mlp(), tmp_path, **{"r": 2, "target_modules": ["layers.0"]} | config)
    assert told in refusal(tmp_path)


def test_a_config_cannot_name_a_module_to_import(tmp_path: Path) -> None:
    adapt(mlp(), tmp_path, r=2, target_modules=["layers.0"], use_dora=True)
    change(tmp_path, megatron_config={"x": 1}, megatron_core="antigravity")
    assert "Megatron is not supported. Merge it with peft" in refusal(tmp_path)


def test_lora_of_multi_head_attention_is_refused(tmp_path: Path) -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)

    adapt(Attending(), tmp_path, r=2, target_modules=["attention"])
    expected = dict(Attending().state_dict())
    with pytest.raises(CheckpointError, match=r"here attention, is not supported\. Merge it"):
        opened(expected, tmp_path, expected)


def test_other_kinds_of_adapters_are_refused(losscli: Losscli, tmp_path: Path) -> None:
    write(state(), tmp_path / "base.pt")
    for config in (
        peft.BOFTConfig(target_modules=["layers.0"], boft_block_size=1),
        peft.ShiraConfig(target_modules=["layers.0"], r=1),
        peft.C3AConfig(target_modules=["layers.0"], block_size=1),
    ):
        folder = tmp_path / type(config).__name__
        peft.get_peft_model(mlp(), config).save_pretrained(folder)
        done = losscli("interpolate", tmp_path / "base.pt", folder, "-m", "mlp:4-3-2", "-o", "-")
        assert (done.status, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert "describes an adapter of type" in done.stderr
        assert "Merge it with peft (merge_and_unload) and save the whole model" in done.stderr


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"r": 0}, "r is 0, which is not a rank"),
        ({"r": "2"}, "r is '2', which is not a rank"),
        ({"rank_pattern": {"layers.0": True}}, "layers.0 is True, which is not a rank"),
        ({"rank_pattern": [1]}, "its patterns are not JSON objects"),
        ({"lora_alpha": None}, "lora_alpha is None, which is not a factor"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, which is not a factor"),
        ({"alpha_pattern": {"(": 1}}, "'(' is not a regular expression"),
        ({"peft_type": None}, "an adapter of type None"),
        ({"peft_type": ["LORA"]}, "an adapter of type ['LORA']"),
    ],
    ids=str,
)
def test_an_invalid_config_is_reported(values: dict[str, Any], told: str, tmp_path: Path) -> None:
    adapt(mlp(), tmp_path, r=2, target_modules=["layers.0"])
    change(tmp_path, **values)
    assert told in refusal(tmp_path)


def test_a_base_that_is_not_the_adapters_is_a_mismatch(tmp_path: Path) -> None:
    adapt(mlp(), tmp_path, r=2, target_modules=["layers.0"])
    for base, told in (
        (state(0, "4-5-2"), r"changes layers\.0\.weight \[3, 4\], and its base has it as \[5, 4\]"),
        ({"w": torch.ones(2)}, r"changes layers\.0\.weight \[3, 4\], and its base has no such"),
    ):
        with pytest.raises(MismatchError, match=told):
            opened(base, tmp_path, base)
    change(tmp_path, r=3)
    with pytest.raises(CheckpointError, match=r"rank of layers\.0 is 3, and its tensors .* rank 2"):
        opened(state(), tmp_path, state())


def test_tensors_that_no_rule_explains_are_refused(tmp_path: Path) -> None:
    adapt(mlp(), tmp_path, r=2, target_modules=["layers.0"])
    file = tmp_path / "adapter_model.safetensors"
    own = load_file(file)
    a = "base_model.model.layers.0.lora_A.weight"
    for more, told in (
        (
            {"base_model.model.layers.0.lora_magnitude_vector": torch.ones(3)},
            "not a tensor of plain LoRA",
        ),
        ({a: torch.ones(2)}, r"lora_A\.weight \[2\] is not a factor"),
        ({a: torch.ones(5, 4)}, r"says that the rank of layers\.0 is 2, and .* of rank 5"),
        ({a: torch.ones(2, 9)}, r"changes layers\.0\.weight \[3, 9\], and its base has it as"),
        (
            {"base_model.model.x.lora_B.weight": torch.ones(2, 2)},
            "x has only one of its two factors",
        ),
        ({"base_model.model.x.weight": torch.ones(2, 2)}, r"changes x\.weight \[2, 2\]"),
    ):
        save_file({**own, **more}, file)
        with pytest.raises((CheckpointError, MismatchError), match=told) as caught:
            opened(state(), tmp_path, state())
        assert "\n" not in str(caught.value)
    file.write_bytes(b"x" * 100)
    assert "not a valid safetensors file" in refusal(tmp_path)


def test_a_tied_tensor_that_is_changed_in_two_ways_is_refused(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False)
            self.b = nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

    adapt(Tied(), tmp_path, r=2, target_modules=["a", "b"])
    expected = dict(Tied().state_dict())
    with pytest.raises(CheckpointError, match=r"a\.weight and b\.weight are one tensor in"):
        opened(expected, tmp_path, expected)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["wte", "c_attn"]},
        {"target_modules": ["c_attn"], "modules_to_save": ["wte"]},
        {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]},
    ],
    ids=["wte", "wte saved", "lm_head saved"],
)
def test_changing_only_one_name_of_a_tied_tensor_is_refused(
    config: dict[str, Any], tmp_path: Path, losscli: Losscli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny(0).save_pretrained("base")
    adapt(tiny(0), Path("adapter"), r=2, fan_in_fan_out=True, **config)
    Path("t.txt").write_bytes(bytes(range(10)))
    done = losscli("interpolate", "base", "adapter", "-d", "text:t.txt,context=5", "-o", "x")
    assert (done.status, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert not list(tmp_path.glob("x*"))
    changed, other = "transformer.wte.weight", "lm_head.weight"
    if "lm_head" in config.get("modules_to_save", ()):
        changed, other = other, changed
        # Without a model what is known is that the base's file lacks what the adapter changes.
        for command in (
            ("inspect", "base", "adapter"),
            ("export", "base", "adapter", "--alpha", 1, "-o", "x.safetensors"),
        ):
            done_too = losscli(*command)
            assert (done_too.status, done_too.stdout, done_too.stderr.count("\n")) == (1, "", 1)
            assert (
                "the adapter adapter changes lm_head.weight, and its base has "
                "only transformer.wte.weight, to which the model ties it. Save the base untied"
            ) in done_too.stderr
        assert not list(tmp_path.glob("x*"))
    assert (
        f"{changed} and {other} are one tensor in the model, and the adapter changes only "
        f"{changed}. Save the base untied (tie_word_embeddings=false, both tensors in its file)"
    ) in done.stderr


@pytest.mark.parametrize("kept", ["target_modules", "modules_to_save"])
@pytest.mark.parametrize("stored", [torch.float64, torch.float32])
def test_tensors_that_peft_keeps_tied_are_one_change(
    kept: str, stored: torch.dtype, tmp_path: Path
) -> None:
    import transformers

    def tied_llama() -> Any:
        torch.manual_seed(0)
        shape = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        config = transformers.LlamaConfig(**shape, num_attention_heads=2, tie_word_embeddings=True)
        return transformers.LlamaForCausalLM(config).to(stored).eval()

    config = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "ensure_weight_tying": True}
    config[kept] = [*config.get(kept, []), "embed_tokens"]  # type: ignore[misc]
    adapt(tied_llama(), tmp_path, r=3, lora_alpha=5, **config)
    base = {n: t.clone() for n, t in tied_llama().state_dict().items()}
    found = opened(base, tmp_path, tied_llama().state_dict()).weights
    assert found["lm_head.weight"] is found["model.embed_tokens.weight"]
    # As it was trained: not merged, which in peft 0.21 adds a tied change twice.
    trained = peft.PeftModel.from_pretrained(tied_llama(), tmp_path).eval()
    plain = tied_llama()
    plain.load_state_dict(found)
    words = torch.arange(10).view(2, 5)
    with torch.no_grad():
        torch.testing.assert_close(plain(words).logits, trained(words).logits)


def damage(folder: Path, build: Callable[[], nn.Module], times: int = 60) -> int:
    """Damages the config at random places, and returns how often it was refused."""
    file = folder / "adapter_config.json"
    content = file.read_bytes()
    generator = random.Random(0)
    base = {name: t.clone() for name, t in build().state_dict().items()}
    refused = 0
    for _ in range(times):
        damaged = bytearray(content)
        for _ in range(generator.choice([1, 5, 30])):
            damaged[generator.randrange(len(damaged))] = generator.randrange(32, 127)
        file.write_bytes(damaged)
        with contextlib.suppress(CheckpointError, MismatchError):
            assert merged_into(build(), base, folder).weights.keys() == base.keys()
            continue
        refused += 1
    assert same(base, dict(build().state_dict()))
    return refused


def test_no_damage_to_a_config_raises_anything_else(tmp_path: Path) -> None:
    adapt(mlp(), tmp_path, r=2, target_modules=["layers.0"], rank_pattern={"layers.0": 2})
    assert damage(tmp_path, mlp, 200) > 50
