"""Folders of torch.distributed.checkpoint, written by torch itself."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
)
from torch.distributed.fsdp import fully_shard

from losscli.checkpoint import list_checkpoints, read, select_for
from losscli.checkpoint.distributed import _not_covered_once as not_covered_once
from losscli.errors import CheckpointError, MismatchError
from losscli.models import MLP
from tests.checkpoint.test_files import Calling, prefixed, refusal, same, state, touch
from tests.conftest import Losscli
from tests.forks import ended, fork


def put(content: Any, folder: Path) -> str:
    """Saves as one process does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(content, checkpoint_id=str(folder))
    return str(folder)


def trained(seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = MLP("4-3-2")
    optimiser = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimiser.step()
    return {
        "model": model.state_dict(),
        "optim": optimiser.state_dict(),
        "epoch": 3,
        "history": [1.0, torch.ones(2)],
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(put(trained(), tmp_path_factory.mktemp("dcp") / "step-10"))


def test_a_distributed_checkpoint_is_read_without_a_process_group(saved: Path) -> None:
    expected = {n: t.clone() for n, t in trained()["model"].items()}
    file = read(str(saved))
    assert {"model", "optim.state.0"} <= file.candidates.keys()
    # Before one is chosen there are only names, shapes and types.
    assert all(t.is_meta for weights in file.candidates.values() for t in weights.values())
    for name in (str(saved), f"{saved}#model"):
        for model in (state(1), None):
            checkpoint = read(name).select(model)
            assert same(checkpoint.weights, expected)
            assert checkpoint.path == saved
    assert {f.name for f in checkpoint.files} == {".metadata", "__0_0.distcp"}
    step = read(f"{saved}#optim.state.0").select(None).weights
    assert torch.equal(step["exp_avg"], trained()["optim"]["state"][0]["exp_avg"])
    assert list_checkpoints(str(saved)) == []
    assert not torch.distributed.is_initialized()


def test_only_what_is_chosen_is_read_from_the_disk(saved: Path, monkeypatch: Any) -> None:
    file = read(str(saved))
    opened: list[Any] = []
    monkeypatch.setattr(
        "losscli.checkpoint.distributed.load_tensors",
        lambda file: opened.append(file) or torch.load(file, weights_only=True),
    )
    file.select(state(1))
    assert len(opened) == 4


@pytest.mark.parametrize(
    "weights",
    [
        state(),
        prefixed("module.", state()),
        {n.replace("layers.", "layers._orig_mod."): t for n, t in state().items()},
        {**prefixed("net.", state()), "n_averaged": torch.tensor(3)},
    ],
    ids=["plain", "module", "compiled inside", "beside others"],
)
def test_names_are_made_the_models(weights: Mapping[str, Tensor], tmp_path: Path) -> None:
    for content in (dict(weights), {"app": {"model": dict(weights)}}):
        name = put(content, tmp_path / str(len(content)))
        assert same(read(name).select(state(1)).weights, state())


def test_every_type_of_tensor_keeps_its_bits(tmp_path: Path) -> None:
    tensors = {
        "bfloat16": torch.tensor([3e38, torch.inf], dtype=torch.bfloat16),
        "float64": torch.tensor(0.1, dtype=torch.float64),
        "int64": torch.tensor([[2**62]]),
        "bool": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
        "parameter": nn.Parameter(torch.ones(2)),
    }
    found = read(put(tensors, tmp_path / "a")).select(None).weights
    assert same(found, {n: t.detach() for n, t in tensors.items()})
    assert type(found["parameter"]) is Tensor


def test_tied_tensors_are_read_once_and_given_to_both(tmp_path: Path) -> None:
    w = torch.arange(6.0).reshape(2, 3)
    name = put({"a.weight": w}, tmp_path / "a")
    found = read(name).select({"a.weight": w, "b.weight": w}).weights
    assert found["a.weight"] is found["b.weight"]
    assert torch.equal(found["b.weight"], w)


def save_sharded(rank: int, folder: Path) -> None:
    """Saves one rank's part of a model that FSDP shards over two, and ends the process."""
    try:
        warnings.simplefilter("ignore")
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
        )
        torch.manual_seed(0)
        model = fully_shard(MLP("4-3-2"), mesh=dist.init_device_mesh("cpu", (2,)))
        assert type(model.layers[0].weight).__name__ == "DTensor"
        dcp.save({"model": model.state_dict()}, checkpoint_id=folder / "saved")
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - the process ends here, whatever it raised
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def test_shards_of_fsdp_from_two_processes_are_joined(tmp_path: Path) -> None:
    processes = []
    for rank in range(2):
        processes.append(fork())
        if not processes[-1]:
            save_sharded(rank, tmp_path)
    assert [ended(process) for process in processes] == [0, 0]
    # Of three rows one rank has two and the other one.
    assert len(list((tmp_path / "saved").glob("*.distcp"))) == 2
    assert same(read(f"{tmp_path}/saved").select(state(1)).weights, state(0))


def test_a_folder_of_steps_is_a_path(losscli: Losscli, tmp_path: Path) -> None:
    names = [put(trained(step), tmp_path / f"step-{step}") for step in (2, 10, 9)]
    assert list_checkpoints(str(tmp_path)) == [names[0], names[2], names[1]]
    torch.save(
        {"inputs": torch.rand(9, 4), "targets": torch.arange(9) % 2}, tmp_path / "optimizer.pt"
    )
    done = losscli("inspect", names[0], names[1], "--json")
    found = json.loads(done.stdout)
    a, b = trained(2)["model"], trained(10)["model"]
    squares = sum(float(((b[n].double() - a[n].double()) ** 2).sum()) for n in a)
    assert found["distance"] == pytest.approx(squares**0.5, rel=1e-12)
    assert found["checkpoints"][0]["path"] == names[0]
    out = tmp_path / "half.safetensors"
    assert losscli("export", names[0], names[1], "--alpha", 0.5, "-o", out).status == 0
    half = read(str(out)).select(None).weights
    assert torch.allclose(half["layers.0.bias"], (a["layers.0.bias"] + b["layers.0.bias"]) / 2)


# What cannot be read


def metadata(folder: Path) -> Metadata:
    with (folder / ".metadata").open("rb") as file:
        found: Metadata = pickle.load(file)
    return found


def rewrite(folder: Path, change: Callable[[Metadata], object]) -> None:
    content = metadata(folder)
    change(content)
    (folder / ".metadata").write_bytes(pickle.dumps(content))


def move(where: str) -> Callable[[Metadata], object]:
    def change(content: Metadata) -> None:
        for info in content.storage_data.values():
            info.relative_path = where

    return change


def blocks(*chunks: tuple[list[int], list[int]]) -> Callable[[Metadata], object]:
    """Cuts layers.0.weight, of shape [3, 4], into blocks: the offsets and sizes of each."""

    def change(content: Metadata) -> None:
        (whole,) = [v for k, v in content.storage_data.items() if k.fqn == "layers.0.weight"]
        found = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in chunks]
        content.state_dict_metadata["layers.0.weight"].chunks = found  # type: ignore[union-attr]
        for chunk in found:
            key = MetadataIndex("layers.0.weight", chunk.offsets)
            content.storage_data[key] = whole

    return change


# Each has as many numbers in its blocks as the tensor has, where the name does not say otherwise.
NOT_ONCE: dict[str, tuple[Callable[[Metadata], object], str]] = {
    "too few": (blocks(([0, 0], [1, 4])), "4 of its 12 numbers are in one"),
    "none": (blocks(), "0 of its 12 numbers are in one"),
    "too many": (blocks(([0, 0], [3, 4]), ([2, 3], [1, 1])), "overlap"),
    "twice": (blocks(([0, 0], [3, 4]), ([0, 0], [3, 4])), "[3, 4] at [0, 0] and [3, 4] at [0, 0]"),
    "two sizes at one place": (blocks(([0, 0], [2, 4]), ([0, 0], [1, 4])), "overlap"),
    "overlap of rows": (blocks(([0, 0], [2, 4]), ([1, 0], [1, 4])), "[2, 4] at [0, 0] and [1, 4]"),
    "overlap of columns": (blocks(([0, 0], [3, 2]), ([0, 1], [3, 2])), "overlap"),
    "corners": (blocks(([0, 0], [2, 3]), ([1, 2], [2, 2]), ([0, 3], [1, 1]), ([2, 0], [1, 1])),
                "[2, 3] at [0, 0] and [2, 2] at [1, 2] overlap"),
    "out of range": (blocks(([1, 0], [3, 4])), "[3, 4] at [1, 0] reaches beyond [3, 4]"),
    "another rank": (blocks(([0], [12])), "one has 1 dimensions and the tensor 2"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOT_ONCE)
def test_chunks_that_do_not_cover_a_tensor_exactly_once_are_refused(
    kind: str, losscli: Losscli, tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    put(state(), folder)
    change, told = NOT_ONCE[kind]
    rewrite(folder, change)
    done = losscli("interpolate", folder, "init:0", "-m", "mlp:4-3-2", "-o", tmp_path / "x")
    assert (done.status, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert f"the chunks of tensor 'layers.0.weight' in {folder} do not cover it" in done.stderr
    assert told in done.stderr
    assert not list(tmp_path.glob("x*"))


def test_chunks_are_a_partition_exactly_where_a_count_of_every_number_says_so() -> None:
    """Random blocks of a small tensor, against an array that counts how often each is covered."""
    generator = random.Random(0)
    verdicts = set()
    for _ in range(3000):
        shape = tuple(generator.choice([[], [5], [2, 3], [2, 2, 2]]))
        found = []
        for _ in range(generator.choice([1, 1, 2, 2, 3, 4])):
            offsets = tuple(generator.randrange(n) for n in shape)
            sizes = tuple(generator.randrange(1, n - o + 1) for n, o in zip(shape, offsets))  # noqa: B905
            found.append((offsets, sizes))
        if generator.random() < 0.5 and shape:  # a cut in two, which mostly is a partition
            cut = generator.randrange(1, shape[0])
            rest = shape[1:]
            found = [((cut, *[0] * len(rest)), (shape[0] - cut, *rest)), ((0,) * len(shape),
                     (cut, *rest)), *found[: generator.choice([0, 0, 1])]]  # fmt: skip
        count = torch.zeros(shape)
        for offsets, sizes in found:
            count[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] += 1
        once = bool((count == 1).all())
        assert (not_covered_once(found, shape) == "") == once, (shape, found)
        verdicts.add((len(shape), once))
    assert verdicts == {(n, once) for n in range(4) for once in (True, False)}


def huge(content: Metadata) -> None:
    """A tensor of one chunk with more bytes than any machine has."""
    told = content.state_dict_metadata["layers.0.weight"]
    told.size = torch.Size([1 << 50, 4])  # type: ignore[union-attr]
    blocks(([0, 0], [1 << 50, 4]))(content)


def compress(content: Metadata) -> None:
    for info in content.storage_data.values():
        info.transform_descriptors = ["zstd"]


def forget(content: Metadata) -> None:
    content.storage_data.clear()


BROKEN: dict[str, tuple[Callable[[Metadata], object], str]] = {
    "outside": (move("../a/__0_0.distcp"), "which is not in the folder. Keep the parts of a dist"),
    "absolute": (move("/etc/passwd"), "which is not in the folder"),
    "missing": (move("__9_0.distcp"), "cannot be read: No such file or directory. The copy may"),
    "compressed": (compress, "was written through ['zstd'], which is not supported"),
    "nowhere": (forget, "is not the metadata of a distributed checkpoint (KeyError"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_invalid_metadata_is_reported_in_one_line(
    kind: str, losscli: Losscli, tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    put(state(), folder)
    change, told = BROKEN[kind]
    rewrite(folder, change)
    done = losscli("interpolate", folder, "init:0", "-m", "mlp:4-3-2", "-o", tmp_path / "x")
    assert (done.status, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert told in done.stderr
    assert not list(tmp_path.glob("x*"))


def test_a_tensor_larger_than_memory_is_refused(losscli: Losscli, tmp_path: Path) -> None:
    put(state(), tmp_path / "a")
    rewrite(tmp_path / "a", huge)
    done = losscli("inspect", tmp_path / "a")
    assert (done.status, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "'layers.0.weight' of shape [1125899906842624, 4] does not fit in mem" in done.stderr


def test_a_truncated_part_or_one_without_tensors_is_reported(tmp_path: Path) -> None:
    folder = Path(put(state(), tmp_path / "a"))
    part = folder / "__0_0.distcp"
    content = part.read_bytes()
    for damaged in (content[:100], content[:-100], bytes(len(content)), b"x" + content):
        part.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"cannot be read from .*distcp \(.*incomplete"):
            read(str(folder)).select(state(1))
    with pytest.raises(MismatchError, match="does not fit the model"):
        read(str(folder)).select({"w": torch.ones(2)})
    (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:50])
    assert "is not the metadata of a distributed checkpoint" in refusal(folder)
    (folder / ".metadata").unlink()
    assert (
        "no .metadata, which is written last. It may be incomplete: save or copy it again"
        in refusal(folder)
    )


def test_metadata_with_code_are_refused_and_do_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "it ran"
    folder = Path(put(state(), tmp_path / "a"))
    for wanted, evil in {
        "posix.system": Calling(os.system, f"touch '{marker}'"),
        "eval": Calling(eval, f"open({str(marker)!r}, 'w')"),
        "tests.checkpoint.test_files.touch": Calling(touch, str(marker)),
        "torch.nn.modules.linear.Linear": nn.Linear(2, 2),
    }.items():
        for protocol in (2, 4):
            content = metadata(folder)
            content.planner_data = evil
            (folder / ".metadata").write_bytes(pickle.dumps(content, protocol))
            message = refusal(folder)
            assert re.search(rf"would run code \(.*{wanted}\); nothing was run", message)
            assert message.endswith(f"dcp_to_torch {folder} FILE.pt")
            assert not marker.exists()
            content.planner_data = None
            (folder / ".metadata").write_bytes(pickle.dumps(content))


def test_a_part_with_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "it ran"
    folder = Path(put({"w": torch.ones(2)}, tmp_path / "a"))
    evil = io.BytesIO()
    torch.save(Calling(os.system, f"touch '{marker}'"), evil)
    (folder / "__0_0.distcp").write_bytes(evil.getvalue())

    def change(content: Metadata) -> None:
        for info in content.storage_data.values():
            info.offset, info.length = 0, len(evil.getvalue())

    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=r"cannot be read from .* \(UnpicklingError\)"):
        read(str(folder)).select(None)
    assert not marker.exists()


def test_values_that_are_not_tensors_are_never_unpickled(tmp_path: Path) -> None:
    marker = tmp_path / "it ran"
    content = {"model": state(), "evil": Calling(os.system, f"touch '{marker}'")}
    name = put(content, tmp_path / "a")
    marker.unlink(missing_ok=True)
    assert same(read(name).select(state(1)).weights, state())
    assert same(read(name).select(None).weights, state())
    assert not marker.exists()


class Scaling(nn.Linear):
    """A layer with extra state."""

    scale: Any = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)

    def get_extra_state(self) -> dict[str, Any]:
        return {"scale": self.scale, "inner": {"kind": "loss", "counts": torch.arange(2)}}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        assert state["inner"]["kind"] == "loss"
        assert torch.equal(state["inner"]["counts"], torch.arange(2))
        self.scale = state["scale"]


@pytest.mark.parametrize("prefix", ["", "model", "app.module"])
def test_extra_state_is_read_too(prefix: str, losscli: Losscli, tmp_path: Path) -> None:
    """The oracle is torch, which loads the same state dict from one file."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), Scaling(3, 2))
    model[1].scale = 0.25
    content: dict[str, Any] = model.state_dict()
    assert "1._extra_state" in content
    for key in reversed(prefix.split(".") if prefix else []):
        content = {key: content}
    file = read(put(content, tmp_path / "a"))
    found = select_for(file, nn.Sequential(nn.Linear(4, 3), Scaling(3, 2)))
    assert same(found.weights, {k: v for k, v in model.state_dict().items() if "extra" not in k})
    assert found.extra["1._extra_state"]["scale"] == 0.25
    assert read(f"{tmp_path / 'a'}{prefix and f'#{prefix}'}").select(None).extra
    out = tmp_path / "half.pt"
    done = losscli("export", tmp_path / "a", tmp_path / "a", "--alpha", 0.5, "-o", out)
    assert done.status == 0, done.stderr
    loaded = nn.Sequential(nn.Linear(4, 3), Scaling(3, 2))
    loaded.load_state_dict(torch.load(out))
    torch.testing.assert_close(loaded(torch.ones(1, 4)), model(torch.ones(1, 4)))


@pytest.mark.parametrize("scale", [[torch.ones(1)], {0: 1.0}], ids=["list", "numbers as keys"])
def test_extra_state_with_numbers_as_keys_is_refused(scale: Any, tmp_path: Path) -> None:
    """torch stores the key 0 of a dictionary as the string 0."""
    model = nn.Sequential(Scaling(3, 2))
    model[0].scale = scale
    file = read(put(model.state_dict(), tmp_path / "a"))
    with pytest.raises(MismatchError, match=r"0\._extra_state holds an object that weights_only"):
        select_for(file, nn.Sequential(Scaling(3, 2)))


def test_extra_state_with_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "it ran"
    model = nn.Sequential(Scaling(3, 2))
    model[0].scale = Calling(os.system, f"touch '{marker}'")
    file = read(put(model.state_dict(), tmp_path / "a"))
    marker.unlink(missing_ok=True)
    told = r"'0\._extra_state\.scale' cannot be read from .* \(UnpicklingError\)"
    with pytest.raises(CheckpointError, match=told):
        select_for(file, nn.Sequential(Scaling(3, 2)))
    assert not marker.exists()


def test_no_damage_raises_anything_else_or_runs_anything(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("something was imported or run")

    content = (saved / ".metadata").read_bytes()
    names = [b"torch.distributed.checkpoint.metadata", b"StorageMeta", b"PosixPath", b"Size"]
    evil = [b"os\nsystem", b"builtins", b"subprocess", b"eval"]
    (tmp_path / "__0_0.distcp").write_bytes((saved / "__0_0.distcp").read_bytes())
    generator = random.Random(0)
    monkeypatch.setattr(os, "system", never)
    monkeypatch.setattr("builtins.eval", never)
    refused = 0
    modules = set(sys.modules)
    for turn in range(200):
        damaged = bytearray(content)
        if turn % 4 == 0:
            at = damaged.find(generator.choice(names))
            new = generator.choice(evil)
            damaged[at : at + len(new)] = new
        else:
            for _ in range(generator.choice([1, 3, 20])):
                damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        if turn % 10 == 1:
            damaged = damaged[: generator.randrange(len(damaged))]
        (tmp_path / ".metadata").write_bytes(damaged)
        with contextlib.suppress(CheckpointError, MismatchError):
            read(str(tmp_path)).select(state(1))
            continue
        refused += 1
    assert refused > 100
    new = {name for name in set(sys.modules) - modules if not name.startswith("encodings.")}
    assert not new
