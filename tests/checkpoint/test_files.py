"""Checkpoint files of every kind: read right, or refused in one line and without running code."""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import os
import pickle
import random
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from losscli.checkpoint import SUFFIXES, Checkpoint, read, save, tied_names
from losscli.errors import CheckpointError, MismatchError, OutputError, UsageError
from losscli.models import CNN, MLP
from losscli.weight_space.vectors import Weights
from tests.conftest import SAFETENSORS_HAS_COMPLEX
from tests.foreign import Attention


def state(seed: int = 0, sizes: str = "4-3-2") -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return dict(MLP(sizes).state_dict())


def write(content: Any, path: Path, *, legacy: bool = False) -> str:
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return str(path)


def prefixed(prefix: str, weights: Weights) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


def same(found: Weights, expected: Weights) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        for name, tensor in expected.items()
    )


def refusal(name: str | Path) -> str:
    """The message that a file is refused with; it has one line."""
    with pytest.raises(CheckpointError) as caught:
        read(str(name))
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is read


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("suffix", [*SUFFIXES, ".weights", ""])
def test_a_checkpoint_of_any_suffix_is_read(suffix: str, legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    name = write(state(), path, legacy=legacy)
    checkpoint = read(name).select(state(1))
    assert same(checkpoint.weights, state())
    assert checkpoint.name == name
    assert checkpoint.path == path
    assert checkpoint.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert same(read(name).select(None).weights, state())


def test_the_suffixes_are_those_that_users_have() -> None:
    assert set(SUFFIXES) == {".safetensors", ".pt", ".pth", ".th", ".bin", ".ckpt", ".tar"}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_every_type_of_tensor_keeps_its_bits(suffix: str, legacy: bool, tmp_path: Path) -> None:
    tensors = {
        "float16": torch.tensor([65504.0, -0.0], dtype=torch.float16),
        "bfloat16": torch.tensor([3e38, torch.inf], dtype=torch.bfloat16),
        "float64": torch.tensor(0.1, dtype=torch.float64),
        "int64": torch.tensor([[2**62]]),
        "bool": torch.tensor([True, False]),
        "uint8": torch.arange(256, dtype=torch.uint8),
        "complex64": torch.tensor([1j], dtype=torch.complex64),
        "empty": torch.zeros(0, 3),
    }
    if suffix == ".safetensors" and not SAFETENSORS_HAS_COMPLEX:
        del tensors["complex64"]
    name = write(tensors, tmp_path / f"t{suffix}", legacy=legacy)
    assert same(read(name).select(None).weights, tensors)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux shows its maps")
@pytest.mark.parametrize("name", ["a.pt", "a.ckpt", "a.safetensors"])
def test_a_file_is_memory_mapped_and_not_copied(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    write({"w": torch.arange(100_000.0)}, path)

    def maps() -> list[tuple[int, int]]:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        ranges = [line.split()[0].split("-") for line in lines if line.endswith(str(path))]
        return [(int(low, 16), int(high, 16)) for low, high in ranges]

    assert not maps()
    weights = read(str(path)).select(None).weights
    assert any(low <= weights["w"].data_ptr() < high for low, high in maps())
    assert torch.equal(weights["w"], torch.arange(100_000.0))


def test_a_mapped_file_is_never_written_on(tmp_path: Path) -> None:
    for name in ("a.pt", "a.safetensors"):
        write(state(), tmp_path / name)
        before = (tmp_path / name).read_bytes()
        read(str(tmp_path / name)).select(None).weights["layers.0.weight"].zero_()
        assert (tmp_path / name).read_bytes() == before


def test_parameters_come_without_their_gradients(tmp_path: Path) -> None:
    model = MLP("4-3-2")
    name = write(dict(model.named_parameters()), tmp_path / "a.pt")
    found = read(name).select(None).weights
    assert all(not t.requires_grad and type(t) is Tensor for t in found.values())


def test_metadata_is_what_the_file_says_of_itself(tmp_path: Path) -> None:
    content = {
        "state_dict": state(),
        "losscli.model": "mlp:4-3-2",
        "epoch": 3,
        "loss": 0.25,
        "best": True,
        "history": [1, 2],
        "args": {"lr": 0.1},
        7: "seven",
        "none": None,
    }
    told = {"losscli.model": "mlp:4-3-2", "epoch": "3", "loss": "0.25", "best": "True"}
    for legacy in (False, True):
        file = read(write(content, tmp_path / "a.pt", legacy=legacy))
        assert file.metadata == {**told, "7": "seven"}
        assert file.select(state(1)).metadata == file.metadata
    save_file(state(), tmp_path / "a.safetensors", {"losscli.model": "mlp:4-3-2", "é\n": "\n"})
    assert read(str(tmp_path / "a.safetensors")).metadata == {
        "losscli.model": "mlp:4-3-2",
        "é\n": "\n",
    }
    save_file(state(), tmp_path / "bare.safetensors")
    assert read(str(tmp_path / "bare.safetensors")).metadata == {}


# Where the state dict lies


@pytest.mark.parametrize(
    "keys",
    [
        ("state_dict",),
        ("model_state_dict",),
        ("model",),
        ("net",),
        ("ema",),
        ("anything at all",),
        ("optimal",),
        ("runs", "best", "weights"),
        (3, "x.y"),
    ],
    ids=str,
)
@pytest.mark.parametrize("model_known", [True, False])
def test_a_state_dict_is_found_under_any_key(
    keys: tuple[Any, ...], model_known: bool, tmp_path: Path
) -> None:
    content: Any = state()
    for key in reversed(keys):
        content = {key: content, "epoch": 3}
    optimiser = torch.optim.Adam(MLP("4-3-2").parameters())
    optimiser.zero_grad()
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    content |= {"opt": optimiser.state_dict(), "optimizer_states": [optimiser.state_dict()]}
    content["optim_state_dict"] = {"state": {"layers.0.weight": {"exp_avg": torch.ones(3)}}}
    name = write(content, tmp_path / "a.pt")
    assert same(read(name).select(state(1) if model_known else None).weights, state())


def test_two_that_fit_are_both_named_and_the_key_chooses(tmp_path: Path) -> None:
    path = tmp_path / "a run.pt"
    write({"model": state(1), "ema": {"shadow": state(2)}, "head": state(3, "5-5")}, path)
    for expected, named in (
        (state(), "'model', 'ema.shadow'."),
        (None, "'model', 'ema.shadow', 'head'."),
    ):
        with pytest.raises(CheckpointError, match="contains several state dicts") as caught:
            read(str(path)).select(expected)
        assert named in str(caught.value)
        assert shlex.split(str(caught.value))[-1] == f"{path}#model"
    for key, seed in (("model", 1), ("ema.shadow", 2), ("ema", 2)):
        for expected in (state(), None):
            checkpoint = read(f"{path}#{key}").select(expected)
            assert same(checkpoint.weights, state(seed))
            assert checkpoint.name == f"{path}#{key}"
            assert checkpoint.path == path
    message = refusal(f"{path}#best")
    assert "has no state dict under 'best'. Its keys: model, ema.shadow, head" in message


def test_a_key_that_still_leaves_two_is_answered_with_the_file_and_a_whole_key(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.pt"
    write({"runs": {"x": state(1), "y": state(2)}, "other": state(3)}, path)
    with pytest.raises(CheckpointError) as caught:
        read(f"{path}#runs").select(state())
    assert str(caught.value).endswith(f"'runs.x', 'runs.y'. Choose one, for example {path}#runs.x")
    assert same(read(f"{path}#runs.x").select(state()).weights, state(1))


def test_only_the_state_dict_that_fits_is_chosen(tmp_path: Path) -> None:
    content = {"teacher": state(1, "4-9-2"), "student": state(2), "stats": {"mean": torch.ones(4)}}
    name = write(content, tmp_path / "a.pt")
    assert same(read(name).select(state()).weights, state(2))


def test_tensors_at_the_top_level_count_as_well(tmp_path: Path) -> None:
    name = write({**state(1), "ema": state(2)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"its top level, 'ema'\. Choose one.*#ema"):
        read(name).select(state())
    assert same(read(f"{name}#ema").select(state()).weights, state(2))


def test_a_file_with_a_hash_in_its_name_comes_first(tmp_path: Path) -> None:
    write({"x": state(1)}, tmp_path / "a.pt")
    write({"x": state(2), "y": state(3)}, tmp_path / "a.pt#x")
    assert same(read(f"{tmp_path}/a.pt#x#y").select(None).weights, state(3))
    with pytest.raises(CheckpointError, match="several"):
        read(f"{tmp_path}/a.pt#x").select(state())
    (tmp_path / "a.pt#x").unlink()
    assert same(read(f"{tmp_path}/a.pt#x").select(None).weights, state(1))


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "model.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "model.module.",
        "model._orig_mod.",
        "module.module.model.",
    ],
)
def test_the_prefixes_of_wrappers_are_taken_off(prefix: str, tmp_path: Path) -> None:
    for content in (prefixed(prefix, state()), {"state_dict": prefixed(prefix, state())}):
        name = write(content, tmp_path / "a.pt")
        assert same(read(name).select(state(1)).weights, state())
    # Without a model, names stay as they are.
    assert same(read(name).select(None).weights, prefixed(prefix, state()))


@pytest.mark.parametrize("own", ["module.", "model.", "_orig_mod.", "model._orig_mod."])
def test_only_prefixes_that_the_model_lacks_are_removed(own: str, tmp_path: Path) -> None:
    expected = prefixed(own, state(1))
    for wrapper in ("", "module.", "model.", "module.model."):
        name = write(prefixed(wrapper + own, state()), tmp_path / "a.pt")
        assert same(read(name).select(expected).weights, prefixed(own, state()))


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
@pytest.mark.parametrize("own", ["", "model."])
def test_the_mark_of_a_compiled_part_is_taken_out_of_names(
    prefix: str, own: str, tmp_path: Path
) -> None:
    marked = {k.replace("layers.", "layers._orig_mod."): v for k, v in state().items()}
    name = write(prefixed(prefix + own, marked), tmp_path / "a.pt")
    assert same(read(name).select(prefixed(own, state(1))).weights, prefixed(own, state()))


def test_names_that_would_become_equal_are_not_merged(tmp_path: Path) -> None:
    content = {"w": torch.zeros(2), "_orig_mod.w": torch.ones(2)}
    name = write(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"its top level, '_orig_mod'\. Choose one"):
        read(name).select({"w": torch.zeros(2)})
    assert same(read(f"{name}#_orig_mod").select(None).weights, {"w": torch.ones(2)})


def test_names_beside_the_models_own_are_an_error(tmp_path: Path) -> None:
    content = {**state(), "step": torch.tensor(3)}
    with pytest.raises(MismatchError, match="unexpected step"):
        read(write(content, tmp_path / "a.pt")).select(state())


def test_real_wrappers_are_seen_through(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MLP("4-3-2")
    wrapped = {
        "parallel": nn.DataParallel(model),
        "compiled": torch.compile(model, backend="eager"),
        "both": nn.DataParallel(torch.compile(model, backend="eager")),  # type: ignore[arg-type]
    }
    for name, module in wrapped.items():
        path = write({"net": module.state_dict()}, tmp_path / f"{name}.pt")
        assert same(read(path).select(state(1)).weights, state(0))


def test_a_tied_weight_that_a_file_leaves_out_is_that_of_its_twin(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Attention()
    expected = {name: t.clone() for name, t in model.state_dict().items()}
    path = tmp_path / "a.safetensors"
    save_model(model, str(path))
    with safe_open(path, "pt") as file:
        left_out = expected.keys() - set(file.keys())
    assert len(left_out) == 1
    torch.manual_seed(1)
    checkpoint = read(str(path)).select(Attention().state_dict())
    assert same(checkpoint.weights, expected)
    # A model without the tie needs both.
    with pytest.raises(MismatchError, match=f"missing {left_out.pop()}"):
        read(str(path)).select(expected)


def test_tied_names_are_found_by_their_memory() -> None:
    names = tied_names(Attention().state_dict())
    assert names == {"embedding.weight": ["head.weight"], "head.weight": ["embedding.weight"]}
    w = torch.arange(6.0)
    views = {"a": w, "b": w[:3], "c": w.view(2, 3), "d": w.view(3, 2), "e": w, "f": w.clone()}
    assert tied_names(views) == {"a": ["e"], "e": ["a"]}
    assert tied_names({"a": torch.zeros(0), "b": torch.zeros(0)}) == {}


def test_state_that_is_not_a_tensor_is_ignored(tmp_path: Path) -> None:
    class Keeping(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"seen": 3}

        def set_extra_state(self, state: object) -> None: ...

    model = Keeping(2, 2)
    name = write(model.state_dict(), tmp_path / "a.pt")
    checkpoint = read(name).select(Keeping(2, 2).state_dict())
    assert same(checkpoint.weights, {"weight": model.weight, "bias": model.bias})


def test_one_message_lists_all_mismatches(tmp_path: Path) -> None:
    expected = {**CNN("4", batchnorm=True).state_dict(), "extra": torch.zeros(2, 2)}
    found = dict(expected)
    del found["head.bias"], found["extra"]
    found["head.weight"] = torch.zeros(10, 5)
    found["norms.0.bias"] = torch.zeros(4, dtype=torch.int64)
    found["norms.0.num_batches_tracked"] = torch.tensor(0.0)
    found["more"] = torch.zeros(3)
    with pytest.raises(MismatchError) as caught:
        read(write({"state_dict": found}, tmp_path / "a.pt")).select(expected)
    assert str(caught.value) == (
        f"{tmp_path}/a.pt does not fit the model: missing head.bias [10]; "
        "norms.0.bias is int64, not float32 as needed; unexpected more [3] and 3 more"
    )
    found = {**expected, "more": torch.zeros(3)}
    with pytest.raises(MismatchError, match=r"model: unexpected more \[3\]$"):
        read(write(found, tmp_path / "b.pt")).select(expected)
    many = {f"extra.{i}": torch.zeros(2) for i in range(20)}
    with pytest.raises(MismatchError, match=r"; unexpected extra\.2 \[2\] and 17 more$"):
        read(write({**expected, **many}, tmp_path / "c.pt")).select(expected)


def test_a_mismatch_is_reported_for_the_likeliest_state_dict(tmp_path: Path) -> None:
    content = {
        "stats": {"mean": torch.ones(1)},
        "teacher": state(1, "9-9-9-9"),
        "student": prefixed("module.", state(2, "4-5-2")),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}},
    }
    with pytest.raises(MismatchError) as caught:
        read(write(content, tmp_path / "a.pt")).select(state(1))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/a.pt#student does not fit the model: layers.0.weight is")
    assert "module." not in message
    # Where no name is the model's, the file's largest is the likeliest.
    with pytest.raises(MismatchError, match=r"unexpected layers\.0\.bias \[9\] and 4"):
        read(write(content, tmp_path / "b.pt")).select({"w": torch.zeros(1)})


def test_a_half_precision_checkpoint_fits_a_float32_model(tmp_path: Path) -> None:
    half = {name: t.half() for name, t in state().items()}
    assert same(read(write(half, tmp_path / "a.pt")).select(state(1)).weights, half)


def test_an_optimiser_alone_is_not_a_model(tmp_path: Path) -> None:
    content = {"state": {0: {"exp_avg": torch.ones(3)}, 1: {"exp_avg": torch.ones(2)}}}
    with pytest.raises(CheckpointError, match=r"several state dicts: 'optimizer\.state\.0', 'opt"):
        read(write({"optimizer": content}, tmp_path / "a.pt")).select(None)


@pytest.mark.parametrize(
    "content",
    [{}, {"epoch": 3}, [1, 2], torch.ones(3), [torch.ones(3)], {0: torch.ones(3)}, "text", None],
    ids=repr,
)
def test_a_file_without_named_tensors_is_not_a_checkpoint(content: Any, tmp_path: Path) -> None:
    message = refusal(write(content, tmp_path / "a.pt"))
    assert message.endswith("contains no named tensors. Save the model's state_dict() in it")


def test_a_dictionary_that_holds_itself_ends(tmp_path: Path) -> None:
    content: dict[str, Any] = {"w": torch.ones(2)}
    content["self"] = content
    assert "" in read(write(content, tmp_path / "a.pt")).candidates


def test_an_initialisation_has_no_digest_and_a_lost_file_is_reported(tmp_path: Path) -> None:
    assert Checkpoint("init:0", {}, {}).sha256() is None
    with pytest.raises(CheckpointError, match=r"gone\.pt: No such file"):
        Checkpoint("gone.pt", {}, {}, tmp_path / "gone.pt").sha256()


# What cannot be read


def test_a_missing_file_is_reported_with_the_folder_that_was_searched(tmp_path: Path) -> None:
    for name in ("absent.pt", "absent.safetensors", "absent.pt#ema", "a\0b.pt", "a\0b#c"):
        message = refusal(tmp_path / name)
        assert message.startswith(f"there is no checkpoint {tmp_path}/{name}")
        assert message.endswith(f"Relative paths start at {Path.cwd()}")
    assert "File name too long" in refusal("x" * 5000)
    assert "File name too long" in refusal("x" * 5000 + "#y")


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    said = f"{tmp_path} is a folder, not a checkpoint file. Name a file in it"
    assert refusal(tmp_path) == said
    for name in ("step9.pt", "step89.pt", "log.txt", ".step100.pt"):
        (tmp_path / name).touch()
    assert refusal(tmp_path) == f"{said}, such as {tmp_path}/step89.pt"
    assert "is a folder" in refusal(f"{tmp_path}#ema")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_without_read_permission_is_reported(suffix: str) -> None:
    # Not in tmp_path, whose folders are closed to others: only the file may be what is forbidden.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        path = Path(folder) / f"a{suffix}"
        write(state(), path)
        path.chmod(0)
        root = os.geteuid() == 0
        if root:  # to whom nothing is forbidden
            os.seteuid(65534)
        try:
            assert path.exists()
            assert "ermission denied" in refusal(path)
        finally:
            if root:
                os.seteuid(0)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".tar"])
def test_an_empty_file_asks_whether_its_writing_was_cut_off(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    path.touch()
    assert refusal(path) == f"{path} is empty. It may be incomplete: save or copy it again"


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_a_file_that_was_cut_off_anywhere_is_refused(form: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.safetensors" if form == "safetensors" else "a.pt")
    write(state(), path, legacy=form == "legacy")
    content = path.read_bytes()
    assert read(str(path)).candidates
    cuts = [*range(1, 25), *range(25, len(content), len(content) // 40), len(content) - 1]
    for cut in cuts:
        path.write_bytes(content[:cut])
        message = refusal(path)
        assert str(path) in message
        assert message.endswith("save or copy it again")


BROKEN = {
    "random": random.Random(0).randbytes(3000),
    "zip-like": b"PK\x03\x04" + random.Random(1).randbytes(3000),
    "pickle-like": b"\x80\x02" + random.Random(2).randbytes(3000),
    "text": b"These are not the weights you are looking for.\n" * 9,
    "json": b'{"weights": [1, 2, 3]}',
    "png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(50),
    "html": b"<!DOCTYPE html><html>404</html>",
    "zeros": bytes(1000),
    "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "huge header": b"\xff" * 8 + b"{}",
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_of_another_kind_is_refused(kind: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(BROKEN[kind])
    message = refusal(path)
    if kind in {"html", "lfs"}:
        what = {"html": "an HTML page", "lfs": "a pointer of Git LFS"}[kind]
        assert message.startswith(f"{path} is {what}, not the file itself. ")
        return
    what = (
        "not a valid safetensors file"
        if suffix == ".safetensors"
        else "not a checkpoint that torch"
    )
    assert message.startswith(f"{path} is {what}")
    assert message.endswith("save or copy it again")


def test_damaged_files_raise_only_checkpoint_errors(tmp_path: Path) -> None:
    generator = random.Random(0)
    for name, legacy in (("a.pt", False), ("b.pt", True), ("c.safetensors", False)):
        path = tmp_path / name
        write({"w": torch.ones(3)}, path, legacy=legacy)
        content = path.read_bytes()
        for _ in range(60):
            damaged = bytearray(content)
            for _ in range(generator.choice([1, 10])):
                damaged[generator.randrange(len(damaged))] = generator.randrange(256)
            path.write_bytes(damaged)
            # Damage within the numbers themselves cannot be seen.
            with contextlib.suppress(CheckpointError):
                read(str(path))


def test_an_archive_of_files_is_not_a_checkpoint(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(write(state(), tmp_path / "a.pt"), "a.pt")
    assert "not a checkpoint that torch can read" in refusal(tmp_path / "a.tar")


# What would run code


def touch(path: str) -> str:
    Path(path).touch()
    return path


class Calling:
    """Calls a function as it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class Plain(dict[str, Any]):
    """A dictionary of a class of its own."""


class Ordered(collections.OrderedDict[str, Any]):
    """An ordered dictionary that does something as its state is set."""

    def __setstate__(self, state: Any) -> None:
        touch(state["marker"])

    def __reduce__(self) -> Any:
        return Ordered, (), {"marker": self["marker"]}


def wants(marker: Path) -> dict[str, Any]:
    shell = f"touch {shlex.quote(str(marker))}"
    return {
        "posix.system": Calling(os.system, shell),
        "exec": Calling(exec, f"open({str(marker)!r}, 'w')"),
        "eval": Calling(eval, f"open({str(marker)!r}, 'w')"),
        "Popen": Calling(subprocess.Popen, ["touch", str(marker)]),
        "tests.checkpoint.test_files.touch": Calling(touch, str(marker)),
        "tests.checkpoint.test_files.Ordered": Ordered(marker=str(marker)),
        "tests.checkpoint.test_files.Plain": Plain(w=torch.ones(2)),
        "collections.deque": collections.deque([1]),
        "torch.nn.modules.linear.Linear": nn.Linear(2, 2),
        "numpy.random._pickle": np.random.default_rng(0),
        "functools.partial": functools.partial(print, 1),
    }


PLACES: dict[str, Callable[[Any], Any]] = {
    "top": lambda evil: evil,
    "in the state dict": lambda evil: {**state(), "evil": evil},
    "beside it": lambda evil: {"state_dict": state(), "args": evil},
    "deep": lambda evil: {"a": {"b": {"c": {"d": evil, "w": torch.ones(2)}}}},
    "in a list": lambda evil: {"w": torch.ones(2), "x": [1, (2, [evil])]},
    "as a key": lambda evil: {"w": torch.ones(2), ("x", evil): 3},
}


@pytest.mark.parametrize("form", ["a.pt", "legacy.pt", "a.tar", "a.ckpt", "raw.bin"])
@pytest.mark.parametrize("place", PLACES)
def test_a_pickle_with_code_is_refused_and_does_not_run(
    place: str, form: str, tmp_path: Path
) -> None:
    marker = tmp_path / "it ran"
    for wanted, evil in wants(marker).items():
        if place == "as a key" and getattr(evil, "__hash__", None) is None:
            continue
        path = tmp_path / form
        content = PLACES[place](evil)
        if form == "raw.bin":
            path.write_bytes(pickle.dumps(content, protocol=2))
        else:
            write(content, path, legacy=form == "legacy.pt")
        message = refusal(path)
        assert not marker.exists()
        start = re.match(rf"{path} is a pickle that would run code \(([\w.]+)\); nothing", message)
        assert start
        # A bare pickle of tensors wants torch's own loader, which runs code, before all else.
        first = "torch.storage._load_from_bytes" if form == "raw.bin" else wanted
        assert wanted in start[1] or start[1] == first
        assert "nothing was run. If you trust it, save its state dict again: py" in message


def test_pickles_with_code_do_run_if_they_are_trusted(tmp_path: Path) -> None:
    for name in ("posix.system", "exec", "tests.checkpoint.test_files.Ordered"):
        marker = tmp_path / name
        path = tmp_path / "a.pt"
        write({"x": wants(marker)[name]}, path)
        assert "nothing was run" in refusal(path)
        assert not marker.exists()
        with contextlib.suppress(AttributeError), warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            torch.load(path, weights_only=False)
        assert marker.exists()


def test_a_program_and_a_newer_pickle_are_refused_with_the_same_cure(tmp_path: Path) -> None:
    script(tmp_path / "script.pt")
    message = refusal(tmp_path / "script.pt")
    assert "is a TorchScript program, which is code; nothing was run. If you trust" in message
    marker = tmp_path / "it ran"
    for protocol in (4, 5):
        evil = {"w": [1.0] * 9, "x": Calling(os.system, f"touch '{marker}'")}
        (tmp_path / "a.bin").write_bytes(pickle.dumps(evil, protocol=protocol))
        message = refusal(tmp_path / "a.bin")
        assert "is a pickle of a protocol that torch reads only together with code" in message
        torch.save({"w": torch.ones(2)}, tmp_path / "b.pt", pickle_protocol=protocol)
        assert "only together with code; nothing was run" in refusal(tmp_path / "b.pt")
    assert not marker.exists()


def script(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)


def resave(message: str) -> list[str]:
    """The command that a message advises, as a shell takes it apart."""
    command = message.partition("save its state dict again: ")[2]
    python, option, *rest = shlex.split(command)
    assert (python, option, len(rest)) == ("python", "-c", 3)
    return rest


def test_the_advised_command_does_what_it_says_in_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / 'it\'s a "folder" of $HOME; #1'
    folder.mkdir()
    path = folder / "-a run.pt"
    shared = torch.arange(6.0).reshape(2, 3)
    content = {
        "args": collections.deque([0.1]),
        "net": {"w": shared, "tied": shared, "across": shared.t()},
        "losscli.model": "mlp:4-3-2",
    }
    write(content, path)
    command = refusal(path).partition("save its state dict again: ")[2]
    # A python that says what a shell hands over to it.
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    python.chmod(0o755)
    environment = {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        command, shell=True, env=environment, cwd=tmp_path, capture_output=True, check=True
    )
    option, code, source, target = done.stdout.decode().split("\0")[:-1]
    assert (option, done.stderr) == ("-c", b"")
    monkeypatch.setattr(sys, "argv", ["-c", source, target])
    exec(code, {})
    (written,) = folder.glob("*.safetensors")
    assert target == str(written)
    assert same(read(target).select(content["net"]).weights, content["net"])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)


def trusted() -> dict[str, tuple[Any, Mapping[str, Tensor]]]:
    torch.manual_seed(0)
    net = Net()
    weights = net.state_dict()
    optimiser = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"params": [0]}]}
    return {
        "a module": (net, weights),
        "a module under a key": ({"model": net, "epoch": 3}, weights),
        "a flat state dict": ({**weights, "args": collections.deque()}, weights),
        "an optimiser first": (
            {"optimizer": optimiser, "ema": weights, "args": collections.deque()},
            weights,
        ),
        "a class of dictionaries": (Plain(weights), weights),
    }


@pytest.mark.parametrize("kind", [*trusted(), "a newer protocol", "a program"])
def test_the_advised_command_finds_the_state_dict(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pt"
    if kind == "a program":
        script(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected: Mapping[str, Tensor] = torch.jit.load(path).state_dict()
    elif kind == "a newer protocol":
        expected = state()
        torch.save({"state_dict": expected}, path, pickle_protocol=4)
    else:
        content, expected = trusted()[kind]
        write(content, path)
    code, source, target = resave(refusal(path))
    monkeypatch.setattr(sys, "argv", ["-c", source, target])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, {})
    assert same(read(target).select(None).weights, expected)


# What is written


def test_a_saved_file_is_read_back_with_its_metadata(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(state(), {"losscli.model": "mlp:4-3-2"}, path)
    file = read(str(path))
    assert same(file.select(None).weights, state())
    assert file.metadata == {"losscli.model": "mlp:4-3-2"}
    save(state(1), {}, path)
    assert same(read(str(path)).select(None).weights, state(1))
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_memory_mapped_weights_can_be_saved_over_their_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(state(), {}, path)
    save(read(str(path)).select(None).weights, {"again": "yes"}, path)
    assert same(read(str(path)).select(None).weights, state())


def test_tied_and_transposed_tensors_are_saved_in_full(tmp_path: Path) -> None:
    w = torch.arange(6.0).reshape(2, 3)
    weights = {"a": w, "b": w, "c": w.t(), "d": torch.zeros(0), "e": torch.zeros(0), "f": w[1:]}
    path = tmp_path / "a.safetensors"
    save({k: v for k, v in weights.items() if k != "f"}, {}, path)
    assert same(
        read(str(path)).select(None).weights, {k: v for k, v in weights.items() if k != "f"}
    )


def test_a_saved_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    save(state(), {}, tmp_path / "a.safetensors")
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_failed_save_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.safetensors").mkdir()
    before = sorted(tmp_path.rglob("*"))
    unknown = {"w": torch.zeros(2, dtype=torch.complex128)}
    for weights, name, message in (
        (state(), "absent/a.safetensors", "cannot be written: No such file or directory"),
        (state(), "file/a.safetensors", "cannot be written: Not a directory"),
        (state(), "folder.safetensors", "cannot be written: Is a directory"),
        (state(), "x" * 300, "cannot be written: File name too long"),
        (unknown, "a.safetensors", r"written: safetensors \S+ does not store torch\.complex128"),
        (unknown, "file", "file cannot be written"),
        ({"w": torch.ones(2).to_sparse()}, "file", "file cannot be written"),
    ):
        with pytest.raises(OutputError, match=message) as caught:
            save(weights, {}, tmp_path / name)
        assert "\n" not in str(caught.value)
        assert sorted(tmp_path.rglob("*")) == before
        assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(UsageError, match=r"'/' is a folder\. Give folder/name"):
        Checkpoint("c", state(), {}).save("/")


def test_an_interrupted_save_leaves_only_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    save(state(), {}, path)

    def interrupted(_tensors: Any, file: Path, _metadata: Any) -> None:
        file.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr("losscli.checkpoint.saving.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(state(1), {}, path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    assert same(read(str(path)).select(None).weights, state())


def test_keys_that_would_work_are_named(tmp_path: Path) -> None:
    names = {f"{part}.{k}.w": torch.ones(1) for part in ("acc", "model", "ema") for k in range(2)}
    name = write({"state_dict": names, "optimizer": {"w": torch.ones(1)}}, tmp_path / "a.ckpt")
    message = refusal(f"{name}#ema")
    keys = "state_dict, state_dict.ema, state_dict.acc, state_dict.model"
    assert message == f"{name} has no state dict under 'ema'. Its keys: {keys}"
    for key in keys.split(", ")[1:]:
        assert len(read(f"{name}#{key}").select(None).weights) == 2
    many = write({f"p{k}.w": torch.ones(1) for k in range(40)}, tmp_path / "b.pt")
    assert refusal(f"{many}#ema").endswith(f"Its keys: {', '.join(f'p{k}' for k in range(12))}, …")
    assert len(read(f"{many}#p0").select(None).weights) == 1


def test_an_exported_program_is_named_as_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a b.pt2"
    program = torch.export.export(torch.nn.Linear(2, 1), (torch.ones(3, 2),))
    torch.export.save(program, path)
    assert refusal(str(path)) == (
        f"{path} is a torch.export program, which is a model and not a checkpoint. "
        f"Use it as the model, -m 'pt2:{path}', with checkpoints of its weights"
    )
