"""Folders that are one checkpoint, as transformers writes them, and folders of checkpoints."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from losscli.checkpoint import list_checkpoints, read, select_for
from losscli.errors import CheckpointError, MismatchError
from losscli.models import MLP
from tests.checkpoint.test_files import refusal, same, state
from tests.conftest import Losscli
from tests.libraries import Library

transformers: Any = Library("transformers")


def tiny(seed: int, **more: Any) -> nn.Module:
    """GPT-2 with one block: its head is tied to the embedding, its layers are stored [in, out]."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        n_layer=1,
        n_head=2,
        n_embd=8,
        vocab_size=11,
        n_positions=7,
        bos_token_id=0,
        eos_token_id=0,
        **more,
    )
    model = transformers.GPT2LMHeadModel(config)
    assert isinstance(model, nn.Module)
    return model


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """transformers shows a bar for every shard."""
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def one(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    assert (folder / "model.safetensors").is_file()


def sharded(model: Any, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="2KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def one_bin(model: Any, folder: Path) -> None:
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def sharded_bin(model: Any, folder: Path) -> None:
    model.config.save_pretrained(folder)
    names = list(model.state_dict())
    places = {name: f"pytorch_model-0000{i % 3 + 1}-of-00003.bin" for i, name in enumerate(names)}
    for shard in set(places.values()):
        content = {n: model.state_dict()[n] for n in names if places[n] == shard}
        torch.save(content, folder / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def without_config(model: Any, folder: Path) -> None:
    sharded(model, folder)
    (folder / "config.json").unlink()


def variant(model: Any, folder: Path) -> None:
    model.save_pretrained(folder, variant="fp16")
    assert (folder / "model.fp16.safetensors").is_file()


def sharded_variant(model: Any, folder: Path) -> None:
    model.save_pretrained(folder, variant="fp16", max_shard_size="2KB")
    assert (folder / "model.safetensors.index.fp16.json").is_file()


FORMS: dict[str, Callable[[Any, Path], None]] = {
    f.__name__: f
    for f in (one, sharded, one_bin, sharded_bin, without_config, variant, sharded_variant)
}


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_of_transformers_is_read(form: str, tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    folder.mkdir()
    FORMS[form](tiny(0), folder)
    checkpoint = read(str(folder)).select(tiny(1).state_dict())
    # Names and bits are those of the model that was saved, its tied head among them.
    assert same(checkpoint.weights, whole(tiny(0)))
    fresh = tiny(2)
    fresh.load_state_dict(dict(checkpoint.weights))
    assert checkpoint.path == folder
    assert checkpoint.name == str(folder)
    assert read(str(folder)).folder == folder
    index = next(iter(folder.glob("*.index*.json")), None)
    if index:
        by_index = read(str(index)).select(tiny(1).state_dict())
        assert same(by_index.weights, whole(tiny(0)))
        assert by_index.path == index
        assert read(str(index)).folder == folder


def test_the_digest_is_over_all_files_that_make_it_up(tmp_path: Path) -> None:
    sharded(tiny(0), tmp_path)
    (tmp_path / "README.md").write_text("not a part of it")
    checkpoint = read(str(tmp_path)).select(None)
    parts = sorted([*tmp_path.glob("*.safetensors*"), tmp_path / "config.json"])
    assert set(checkpoint.files) == set(parts)
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in parts]
    assert checkpoint.sha256() == hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
    stamps, digests = {checkpoint.stamp()}, {checkpoint.sha256()}
    for part in parts:
        content = part.read_bytes()
        part.write_bytes(content + b" ")
        stamps.add(checkpoint.stamp())
        digests.add(checkpoint.sha256())
        part.write_bytes(content)
    assert len(stamps) == len(digests) == len(parts) + 1
    parts[0].unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        checkpoint.stamp()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux shows its maps")
@pytest.mark.parametrize("form", ["sharded", "sharded_bin"])
def test_shards_are_memory_mapped(form: str, tmp_path: Path) -> None:
    FORMS[form](tiny(0), tmp_path)
    weights = read(str(tmp_path)).select(None).weights
    ranges = [
        line.split()[0].split("-")
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        if str(tmp_path) in line
    ]
    for tensor in weights.values():
        assert any(int(low, 16) <= tensor.data_ptr() < int(high, 16) for low, high in ranges)


def damage(folder: Path, kind: str) -> None:
    shards = sorted(folder.glob("*-00002-of-*"))
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name, shard = next(iter(content["weight_map"].items()))
    if kind == "missing":
        shards[0].unlink()
    elif kind == "corrupt":
        shards[0].write_bytes(shards[0].read_bytes()[:100])
    elif kind == "outside":
        content["weight_map"][name] = f"../{folder.name}/{shard}"
    elif kind == "absolute":
        content["weight_map"][name] = str(folder / shard)
    elif kind == "number":
        content["weight_map"][name] = 3
    elif kind == "absent name":
        content["weight_map"]["transformer.h.9.weight"] = shard
    elif kind == "no map":
        del content["weight_map"]
    elif kind == "a list":
        content = [1]
    if kind not in {"missing", "corrupt"}:
        index.write_text(json.dumps(content))
    if kind == "cut":
        index.write_text(index.read_text()[:50])


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("missing", "which is not there. The copy may be incomplete: copy the checkpoint again"),
        ("corrupt", "is not a valid safetensors file"),
        ("outside", "which is not in its folder. Shards lie beside their index"),
        ("absolute", "which is not in its folder"),
        ("number", "is in 3, which is not in its folder"),
        (
            "absent name",
            "has no tensor 'transformer.h.9.weight', which model.safetensors.ind",
        ),
        ("no map", "has no weight_map. It may belong to another program"),
        ("a list", "contains no JSON object"),
        ("cut", "is not valid JSON"),
    ],
)
def test_a_broken_index_or_shard_is_reported_in_one_line(
    kind: str, told: str, losscli: Losscli, tmp_path: Path
) -> None:
    folder = tmp_path / "gpt2"
    sharded(tiny(0), folder)
    damage(folder, kind)
    assert told in refusal(folder)
    assert told in refusal(folder / "model.safetensors.index.json")
    before = sorted(tmp_path.rglob("*"))
    done = losscli("interpolate", folder, "init:0", "-m", "mlp:2-2", "-o", tmp_path / "x")
    assert (done.status, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert told in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_errors_name_what_a_folder_lacks_to_be_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "has a config.json and none of model.safetensors.index.json, " in refusal(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "no adapter_model.safetensors or adapter_model.bin" in refusal(tmp_path)
    (tmp_path / "__0_0.distcp").touch()
    assert "parts of a distributed checkpoint and no .metadata" in refusal(tmp_path)
    save_file(state(), tmp_path / "model.safetensors")
    assert same(read(str(tmp_path)).select(state(1)).weights, state())
    save_file(state(), tmp_path / "adapter_model.safetensors")
    message = refusal(tmp_path)
    assert "holds more than one checkpoint: model.safetensors, adapter_model.safeten" in message
    assert message.endswith(f"Give one, for example {tmp_path}/model.safetensors")
    (tmp_path / "config.json").write_text("[")
    (tmp_path / "adapter_model.safetensors").unlink()
    assert "config.json is not valid JSON" in refusal(tmp_path)


def test_a_losscli_toml_may_lie_in_the_folder(losscli: Losscli, tmp_path: Path) -> None:
    save_file(
        {"inputs": torch.rand(9, 4), "targets": torch.arange(9) % 2}, tmp_path / "x.safetensors"
    )
    for seed in (0, 1):
        folder = tmp_path / f"model-{seed}"
        folder.mkdir()
        save_file(state(seed), folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
    (tmp_path / "model-0" / "losscli.toml").write_text(
        'model = "mlp:4-3-2"\ndata = "safetensors:../x.safetensors"\n'
    )
    names = tmp_path / "model-0", tmp_path / "model-1"
    done = losscli(
        "interpolate", *names, "-q", "--json", "--points", 3, "--no-figure", "-o", tmp_path / "out"
    )
    assert done.status == 0, done.stderr
    told = json.loads(done.stdout)["checkpoints"]
    assert [c["path"] for c in told] == list(map(str, names))
    assert told[0]["sha256"] != told[1]["sha256"]


def test_a_key_names_a_prefix_in_a_folder(tmp_path: Path) -> None:
    one(tiny(0), tmp_path)
    inner = read(f"{tmp_path}#transformer").select(tiny(1).transformer.state_dict())  # type: ignore[union-attr, operator]
    assert same(inner.weights, whole(tiny(0).transformer))  # type: ignore[arg-type]
    assert "has no state dict under 'body'" in refusal(f"{tmp_path}#body")


def test_a_head_that_is_not_the_models_is_a_mismatch(tmp_path: Path) -> None:
    one(tiny(0), tmp_path)
    expected = tiny(0).state_dict()
    expected["score.weight"] = torch.zeros(2, 8)
    with pytest.raises(MismatchError, match=r"missing score\.weight \[2, 8\]"):
        read(str(tmp_path)).select(expected)


# Names that transformers changes as it loads


def mixture() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=8, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=11, num_local_experts=2, max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    assert isinstance(model, nn.Module)
    return model


def test_experts_that_are_fused_on_loading_are_read_as_transformers_does(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = mixture().to(torch.bfloat16)
    one(model, tmp_path)
    if any(name.endswith("experts.gate_up_proj") for name in model.state_dict()):
        with pytest.raises(MismatchError, match=r"missing model.*experts\.gate_up_proj"):
            read(str(tmp_path)).select(model.state_dict())
    checkpoint = select_for(read(str(tmp_path)), mixture())
    assert same(checkpoint.weights, whole(model))
    assert checkpoint.path == tmp_path
    assert len(checkpoint.files) == 2
    assert capfd.readouterr() == ("", "")


def test_names_of_the_first_gpt2_are_read_as_transformers_does(tmp_path: Path) -> None:
    weights = {
        name.removeprefix("transformer."): t
        for name, t in whole(tiny(0)).items()
        if name != "lm_head.weight"
    }
    weights["ln_f.bias"] = weights["ln_f.bias"].double() + 1e-9
    mask = {"h.0.attn.bias": torch.ones(1, 1, 7, 7)}
    save_file({**weights, **mask}, tmp_path / "model.safetensors")
    found = select_for(read(str(tmp_path)), tiny(1)).weights
    # Of several types the widest, in which each keeps its value.
    expected = {n: t.double() for n, t in whole(tiny(0)).items()}
    expected["transformer.ln_f.bias"] = weights["ln_f.bias"]
    assert same(found, expected)
    for wrong in ({"more": torch.ones(1)}, {"wte.weight": torch.ones(3, 8)}):
        save_file({**weights, **wrong}, tmp_path / "model.safetensors")
        with pytest.raises(MismatchError, match="does not fit the model"):
            select_for(read(str(tmp_path)), tiny(1))
    save_file({n: t for n, t in weights.items() if n != "wpe.weight"}, tmp_path / "x.safetensors")
    with pytest.raises(MismatchError, match=r"missing transformer\.wpe\.weight"):
        select_for(read(str(tmp_path / "x.safetensors")), tiny(1))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.complex64])
def test_tensors_of_another_kind_are_not_cast(dtype: torch.dtype, tmp_path: Path) -> None:
    name = "transformer.wpe.weight"
    weights = {n: t for n, t in whole(tiny(0)).items() if n != "lm_head.weight"}
    file = tmp_path / "x.pt"
    told = str(dtype).removeprefix("torch.")
    torch.save({**weights, name: weights[name].to(dtype)}, file)
    with pytest.raises(MismatchError, match=rf"model: {name} is {told}, not float32 as needed$"):
        select_for(read(str(file)), tiny(1))
    # Where all names are others too.
    old = {n.removeprefix("transformer."): t for n, t in weights.items()}
    masks = {"h.0.attn.bias": torch.ones(1, 1, 7, 7, dtype=torch.bool)}
    torch.save({**old, **masks}, file)
    assert same(select_for(read(str(file)), tiny(1)).weights, whole(tiny(0)))
    torch.save({**old, **masks, "wpe.weight": old["wpe.weight"].to(dtype)}, file)
    with pytest.raises(MismatchError, match=r"missing .*; unexpected wte\.weight"):
        select_for(read(str(file)), tiny(1))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_tied_tensor_with_two_values_is_reported(
    suffix: str, tmp_path: Path, losscli: Losscli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny(0).save_pretrained("a")
    weights = whole(tiny(0))
    weights["lm_head.weight"][3, 2] = torch.nan
    weights["transformer.wte.weight"][3, 2] = torch.nan
    save = save_file if suffix == "safetensors" else torch.save
    save(weights, f"x.{suffix}")
    found = select_for(read(f"x.{suffix}"), tiny(1)).weights
    for name, tensor in weights.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True)
    # A type that is wider holds the same values.
    save({**weights, "lm_head.weight": weights["lm_head.weight"].double()}, f"x.{suffix}")
    assert select_for(read(f"x.{suffix}"), tiny(1)).weights.keys() == weights.keys()
    weights["lm_head.weight"][4, 1] += 1
    save(weights, f"x.{suffix}")
    Path("t.txt").write_bytes(bytes(range(10)))
    for names in (("a", f"x.{suffix}"), (f"x.{suffix}", "a", "-m", "transformers:a")):
        done = losscli("interpolate", *names, "-d", "text:t.txt,context=5", "-o", "y")
        assert (done.status, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert (
            f"x.{suffix} gives lm_head.weight and transformer.wte.weight different values, and "
            "they are one tensor in the model. Give a --model that does not tie them"
        ) in done.stderr
    assert not list(tmp_path.glob("y*"))
    # Under names of years ago transformers itself would load both; 4.50 refuses it.
    old = {n.removeprefix("transformer."): t for n, t in weights.items()}
    save(old, f"x.{suffix}")
    refused = r"gives lm_head\.weight and transformer\.wte|does not fit the model"
    with pytest.raises(MismatchError, match=refused):
        select_for(read(f"x.{suffix}"), tiny(1))


# Folders of checkpoints


def test_a_folder_of_the_trainer_is_a_path_in_natural_order(
    losscli: Losscli, tmp_path: Path
) -> None:
    run = tmp_path / "out"
    for step in (900, 1000, 100):
        folder = run / f"checkpoint-{step}"
        torch.manual_seed(step)
        folder.mkdir(parents=True)
        save_file(MLP("6-5-3").state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text('{"model_type": "mine"}')
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
            torch.save({"state": {0: torch.ones(2)}}, folder / name)
        (folder / "trainer_state.json").write_text("{}")
    (run / "runs" / "Jan01").mkdir(parents=True)
    (run / "runs" / "Jan01" / "events.out").touch()
    (run / "logs").mkdir()
    (run / "all_results.json").touch()
    torch.save({}, run / "training_args.bin")
    torch.save(MLP("6-5-3").state_dict(), run / "zz-last.pt")
    names = [*(f"{run}/checkpoint-{step}" for step in (100, 900, 1000)), f"{run}/zz-last.pt"]
    assert list_checkpoints(str(run)) == names
    assert list_checkpoints(names[0]) == []
    data = {"inputs": torch.rand(9, 6), "targets": torch.arange(9) % 3}
    save_file(data, tmp_path / "data.safetensors")
    done = losscli(
        "trajectory", run, "-m", "mlp:6-5-3", "-d", f"safetensors:{tmp_path}/data.safetensors",
        "--no-surface", "-o", "-",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    rows = [line.split(",") for line in done.stdout.splitlines()[1:]]
    assert [row[1] for row in rows] == names


def test_a_folder_without_checkpoints_is_refused(losscli: Losscli, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    torch.save({}, tmp_path / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"contains no checkpoints\. Their names end in"):
        list_checkpoints(str(tmp_path))
    done = losscli("trajectory", tmp_path, "-m", "mlp:2-2", "-o", "-")
    assert (done.status, done.stderr.count("\n")) == (1, 1)
    torch.save({}, tmp_path / "runs/a.pt")
    with pytest.raises(
        CheckpointError, match=r"no checkpoints\. Name a folder in it, such as .*runs$"
    ):
        list_checkpoints(str(tmp_path))


# Weights that are quantised


def named(*names: str, dtype: torch.dtype = torch.int32) -> dict[str, Tensor]:
    return {f"model.layers.0.{name}": torch.ones(2, 2, dtype=dtype) for name in names}


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        (named("qweight", "qzeros", "scales"), "GPTQ or AWQ"),
        (named("weight", "weight.absmax", dtype=torch.uint8), "bitsandbytes"),
        (
            named("weight", "weight.quant_state.bitsandbytes__nf4", dtype=torch.uint8),
            "bitsandbytes",
        ),
        (named("weight", "SCB", dtype=torch.int8), "bitsandbytes"),
        (named("weight_packed", "weight_scale"), "compressed-tensors"),
        (named("weight", "weight_scale_inv", dtype=torch.float8_e4m3fn), "float8_e4m3fn"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_quantised_weights_are_refused_and_inspect_shows_them(
    tensors: dict[str, Tensor], told: str, losscli: Losscli, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=f"is quantised .*{told}.*Give the checkpoint that"):
        read(str(path)).select(state())
    done = losscli("interpolate", path, path, "-m", "mlp:4-3-2", "-o", "-")
    assert (done.status, done.stderr.count("\n")) == (1, 1)
    assert "is quantised" in done.stderr
    for names in ((path,), (path, path)):
        shown = losscli("inspect", *names)
        assert shown.status == 0, shown.stderr
        assert next(iter(tensors)) in shown.stdout
    done = losscli("export", path, path, "--alpha", 0.5, "-o", tmp_path / "x.safetensors")
    assert (done.status, "is quantised" in done.stderr) == (1, True)
    assert not (tmp_path / "x.safetensors").exists()


def test_a_checkpoint_with_a_quantised_config_is_refused(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "model.safetensors")
    for config in (
        {"quantization_config": {"quant_method": "fp8"}},
        {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"is quantised \(config\.json: fp8\)"):
            read(str(tmp_path)).select(state())
    assert read(str(tmp_path)).select(None).weights
    (tmp_path / "config.json").write_text('{"quantization_config": null}')
    assert read(str(tmp_path)).select(state()).weights


def test_tensors_that_torch_quantised_are_refused(losscli: Losscli, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensor = torch.quantize_per_tensor(torch.ones(3, 4), 0.1, 0, torch.qint8)
        torch.save({"layers.0.weight": tensor}, path)
        model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 2)))
        torch.save(model.state_dict(), tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match=r"\(layers\.0\.weight is qint8\)"):
        read(str(path)).select(state())
    with pytest.raises(CheckpointError, match="packed parameters of torch"):
        read(str(tmp_path / "b.pt")).select(state())
    shown = losscli("inspect", path)
    assert (shown.status, "layers.0.weight" in shown.stdout) == (0, True), shown.stderr


@pytest.mark.parametrize("name", ["a.gguf", "a.bin"])
def test_a_file_of_llama_cpp_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"GGUF\x03\0\0\0" + bytes(100))
    message = refusal(tmp_path / name)
    assert "is a GGUF file" in message
    assert message.endswith("Give the checkpoint that it was made from")


# Damage


def test_no_damage_to_an_index_raises_anything_else(tmp_path: Path) -> None:
    sharded(tiny(0), tmp_path)
    expected = tiny(1).state_dict()
    generator = random.Random(0)
    for file in (tmp_path / "model.safetensors.index.json", tmp_path / "config.json"):
        content = file.read_bytes()
        for turn in range(100):
            damaged = bytearray(content)
            for _ in range(generator.choice([1, 10, 50])):
                damaged[generator.randrange(len(damaged))] = generator.randrange(256)
            file.write_bytes(damaged)
            with contextlib.suppress(CheckpointError, MismatchError):
                read(str(tmp_path)).select(None if turn % 9 else expected)
        file.write_bytes(content)
