"""Damaged and hostile files of every format, and a judge of how they are read."""

from __future__ import annotations

import codecs
import ctypes
import functools
import gzip
import io
import itertools
import json
import os
import pickle
import random
import re
import resource
import signal
import struct
import sys
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from losscli.errors import (
    CheckpointError,
    DataError,
    LosscliError,
    MismatchError,
    ModelError,
    SpecError,
    TableError,
    UntrustedCodeError,
    UsageError,
    printable,
)
from losscli.models import MLP
from losscli.results.drawing import Drawing
from tests.forks import fork

CASES = 1000
SAMPLE = 84
"""Each kind of damage six times."""
SECONDS = 5.0
"""Of computing for one case, a hundred times and more of what any takes; of waiting, ten times."""
ROOM = 128 << 20
"""Bytes that a process may take beyond what it has; all these files are of a few kilobytes."""

# Of glibc: the parameter of mallopt for the number of arenas.
_ARENA_MAX = -8

Rng = random.Random
Mutation = Callable[[bytes, Rng], bytes]

HUGE = (1 << 31, (1 << 31) - 1, 1 << 32, 1 << 40, (1 << 62) + 3, (1 << 63) - 1, (1 << 64) - 1)


# Damage that knows nothing of the format


def _place(content: bytes, rng: Rng) -> int:
    # Headers stand at the beginning or, in archives, at the end: half of all damage is there.
    where = rng.random()
    size = max(len(content), 1)
    if where < 0.3:
        return rng.randrange(min(size, 256))
    if where < 0.5:
        return size - 1 - rng.randrange(min(size, 256))
    return rng.randrange(size)


def flip(content: bytes, rng: Rng) -> bytes:
    damaged = bytearray(content or b"\0")
    for _ in range(rng.choice([1, 1, 2, 8])):
        damaged[_place(damaged, rng)] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def overwrite(content: bytes, rng: Rng) -> bytes:
    at, run = _place(content, rng), rng.choice([1, 2, 4, 8, 40])
    filler = rng.choice([b"\0", b"\xff", b"\x7f", b"\x80", b"9", rng.randbytes(1)])
    return content[:at] + filler * run + content[at + run :]


def truncate(content: bytes, rng: Rng) -> bytes:
    return content[: _place(content, rng)]


def insert(content: bytes, rng: Rng) -> bytes:
    at = _place(content, rng)
    return content[:at] + rng.randbytes(rng.choice([1, 3, 8, 64])) + content[at:]


def duplicate(content: bytes, rng: Rng) -> bytes:
    first, last = sorted((_place(content, rng), _place(content, rng)))
    piece = content[first : min(last, first + 4096)]
    return content[:last] + piece * rng.choice([1, 2, 20]) + content[last:]


def swap(content: bytes, rng: Rng) -> bytes:
    """Two words change places, such as two lengths."""
    size = rng.choice([2, 4, 8])
    a, b = sorted((_place(content, rng), _place(content, rng)))
    if b < a + size or b + size > len(content):
        return content[::-1]
    return (
        content[:a] + content[b : b + size] + content[a + size : b] + content[a : a + size]
        + content[b + size :]
    )  # fmt: skip


def enlarge(content: bytes, rng: Rng) -> bytes:
    """A number becomes huge, whichever way it is written."""
    huge = rng.choice(HUGE)
    digits = list(re.finditer(rb"\d+", content[:65536]))
    if digits and rng.random() < 0.4:
        found = rng.choice(digits)
        number = rng.choice([str(huge), "-1", "0", "1e999", "9" * 5000, f"-{huge}", "NaN"])
        return content[: found.start()] + number.encode() + content[found.end() :]
    at, order, size = _place(content, rng), rng.choice("<>"), rng.choice("HIQ")
    mask = (1 << 8 * struct.calcsize(size)) - 1
    word = struct.pack(order + size, huge & mask)
    return content[:at] + word + content[at + len(word) :]


ANY: tuple[Mutation, ...] = (flip, overwrite, truncate, insert, duplicate, swap, enlarge)


# Damage that knows it


def _odd_value(rng: Rng) -> Any:
    return rng.choice([
        None, True, -1, 0, 1, 2.5, rng.choice(HUGE), "", "x", "\x1b[2J", [], [[]], {}, {"a": 1},
        [1 << 40], [1 << 40, 1 << 40], [-1], [0, 1 << 62], [3, 3.5], "../../x", "/etc/passwd",
        "\udcff", "F64", "BF16", "F8_E4M3", "F4", "U64", "BOOL", "C64", "I8", [1] * 70, 1e308,
    ])  # fmt: skip


def odd_json(text: bytes, rng: Rng) -> bytes:
    """Somewhere in a JSON text stands something else, is missing, or stands twice."""
    try:
        content = json.loads(text)
    except ValueError:
        return flip(text, rng)
    node: Any = content
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            break
        key = rng.choice(keys)
        if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.75:
            node = node[key]
            continue
        what = rng.random()
        if what < 0.6:
            node[key] = _odd_value(rng)
        elif what < 0.75:
            del node[key]
        elif isinstance(node, dict):
            node[rng.choice(["", "../x", "\x1b]0;t\x07", "a" * 3000, "\u202e"])] = node[key]
        else:
            node += node * 3
        break
    return json.dumps(content, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def _deep(rng: Rng) -> bytes:
    depth = rng.choice([500, 100_000])
    return rng.choice([b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth])


def json_text(content: bytes, rng: Rng) -> bytes:
    return _deep(rng) if rng.random() < 0.03 else odd_json(content, rng)


def safetensors_header(content: bytes, rng: Rng) -> bytes:
    (size,) = struct.unpack("<Q", content[:8])
    header = odd_json(content[8 : 8 + size], rng)
    if rng.random() < 0.03:
        header = _deep(rng)
    claimed = rng.choice([len(header)] * 8 + [len(header) + 1, 0, *HUGE[:2]])
    return struct.pack("<Q", claimed) + header + content[8 + size :]


CANARY = "canary"

# Each would leave a file if anything ran it.
_CALLS = (
    b"cposix\nsystem\n(X%s\x00\x00\x00touch CANARYtR",
    b"cbuiltins\nopen\n(X%s\x00\x00\x00CANARYX\x01\x00\x00\x00wtR",
    b"c__builtin__\nexec\n(X%s\x00\x00\x00open('CANARY','w')tR",
    b"csubprocess\nPopen\n((lX%s\x00\x00\x00touchaX\x06\x00\x00\x00CANARYatR",
    b"cbuiltins\neval\n(X%s\x00\x00\x00open('CANARY','w')tR",
    b"(X%s\x00\x00\x00touch CANARYios\nsystem\n",
    b"cpathlib\nPath\n(X%s\x00\x00\x00CANARYtR",
    b"cimportlib\nimport_module\n(X%s\x00\x00\x00antigravitytR",
    b"cnumpy.core.multiarray\n_reconstruct\n(X%s\x00\x00\x00CANARYtR",
    b"ctorch.serialization\nload\n(X%s\x00\x00\x00CANARYtR",
    b"ctorch._utils\n_rebuild_tensor_v2\n(X%s\x00\x00\x00CANARYtR",
    b"ctorch.storage\n_load_from_bytes\n(X%s\x00\x00\x00CANARYtR",
)


def _call(rng: Rng) -> bytes:
    code = rng.choice(_CALLS)
    head, _, tail = code.partition(b"%s\x00\x00\x00")
    end = re.match(rb"touch CANARY|open\('CANARY','w'\)|CANARY|touch|antigravity", tail)
    assert end
    return head + bytes([len(end[0])]) + b"\0\0\0" + tail


def spliced_pickle(content: bytes, rng: Rng) -> bytes:
    """A call is spliced in where an opcode begins, or a number in it becomes huge."""
    import pickletools

    try:
        places = [(at, op.name, arg) for op, arg, at in pickletools.genops(content)]
    except ValueError:
        return flip(content, rng)
    ends = [at for at, _, _ in places[1:]] + [len(content)]
    if rng.random() < 0.5:
        numbers = [
            i for i, (_, name, arg) in enumerate(places)
            if type(arg) is int and name in {"BININT", "BININT1", "BININT2", "LONG1"}
        ]  # fmt: skip
        if numbers:
            i = rng.choice(numbers)
            value = rng.choice([*HUGE, -1, 0, 1, 1 << 20, 1 << 27, 1 << 29])
            word = value.to_bytes(9, "little", signed=True)
            return content[: places[i][0]] + b"\x8a\x09" + word + content[ends[i] :]
    at = rng.choice(places)[0]
    rest = rng.choice([content[at:], b"0" + content[at:], b"."])
    return content[:at] + _call(rng) + rest


def zip_entry(content: bytes, rng: Rng, inner: Mutation) -> bytes:
    """One entry of an archive is damaged, and the archive written anew around it."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = {info.filename: archive.read(info) for info in archive.infolist()}
    except (zipfile.BadZipFile, OSError, RuntimeError):
        return flip(content, rng)
    target = rng.choice(list(entries))
    what = rng.random()
    if what < 0.7:
        mutate = inner if target.endswith((".pkl", ".npy")) and rng.random() < 0.8 else None
        entries[target] = (mutate or rng.choice(ANY))(entries[target], rng)
    elif what < 0.8:
        del entries[target]
    elif what < 0.9:
        entries[rng.choice(["../../escaped", "/escaped", "\x1b[2J", "a" * 900])] = b"x"
    else:
        return _zip_bomb(content, target)
    return _archive(entries, squeeze=rng.random() < 0.2)


def _archive(entries: dict[str, bytes], *, squeeze: bool) -> bytes:
    out = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if squeeze else zipfile.ZIP_STORED
    with zipfile.ZipFile(out, "w", method, compresslevel=1) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return out.getvalue()


class _Bomb:
    """Compresses a head and as many zeros as there is room for; the zeros once for all bombs."""

    def __init__(self, head: bytes) -> None:
        self._head = head

    def compress(self, content: bytes) -> bytes:
        return b""

    def flush(self) -> bytes:
        head = zlib.compressobj(1, zlib.DEFLATED, -15)
        begun = head.compress(self._head) + head.flush(zlib.Z_FULL_FLUSH)
        return begun + self.zeros()

    @staticmethod
    @functools.cache
    def zeros() -> bytes:
        whole = zlib.compressobj(1, zlib.DEFLATED, -15)
        return whole.compress(bytes(ROOM)) + whole.flush()


@functools.cache
def _zip_bomb(content: bytes, target: str) -> bytes:
    """An archive of a few kilobytes of which one entry is larger than the room that there is."""
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as good,
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
    ):
        for name in good.namelist():
            with archive.open(name, "w") as entry:
                if name == target:
                    entry._compressor = _Bomb(good.read(name))  # type: ignore[attr-defined]
                    entry.write(good.read(name) + bytes(ROOM))
                else:
                    entry.write(good.read(name))
    return out.getvalue()


@functools.cache
def _gzip_bomb(head: bytes) -> bytes:
    content = head + bytes(ROOM)
    end = struct.pack("<II", zlib.crc32(content), len(content))
    return gzip.compress(b"")[:10] + _Bomb(head).flush() + end


def respelled(content: bytes, rng: Rng) -> bytes:
    """Parts of an archive get names that readers may tell apart or not, and a damaged pickle."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except (zipfile.BadZipFile, OSError, RuntimeError):
        return flip(content, rng)
    parts = []
    for name, data in entries:
        damaged = spliced_pickle(data, rng) if name.endswith("data.pkl") else data
        folder, _, inner = name.partition("/")
        others = [
            name.upper(), f"{folder}/{inner.capitalize()}", f"{folder.upper()}/{inner}",
            f"{folder}/{inner}\0", f"./{name}", f"{folder}//{inner}", f"other/{inner}",
            f"{folder}\\{inner}", f"{folder}/{inner} ", inner, f"{folder}/x/constants.pkl",
            f"{folder}/constants.pkl", f"{folder}/Constants.pkl",
        ]  # fmt: skip
        what = rng.random()
        if what < 0.5:
            parts += [(name if rng.random() < 0.5 else rng.choice(others[:3]), damaged)]
        elif what < 0.75:
            parts += [(name, data), (rng.choice([name, *others]), damaged)]
        else:
            parts += [(rng.choice(others), damaged), (name, data)]
    if rng.random() < 0.2:
        rng.shuffle(parts)
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w") as archive:
        warnings.simplefilter("ignore")  # of names that stand twice
        for name, data in parts:
            # zipfile ends a name that is given at a zero byte.
            info = zipfile.ZipInfo("x")
            info.filename = name
            archive.writestr(info, data)
    return out.getvalue()


def torch_zip(content: bytes, rng: Rng) -> bytes:
    return zip_entry(content, rng, spliced_pickle)


def npy(content: bytes, rng: Rng) -> bytes:
    """The header of a NumPy array claims another shape or type."""
    header = content[10 : 10 + content[8]]
    claim = rng.choice([
        b"(1099511627776, 1099511627776)", b"(1099511627776,)", b"(4000000000,)", b"(-1,)",
        b"()", b"(0,)", b"('x',)", b"(1, 2, 3, 4)", b"__import__('os')", b"(67108864,)",
    ])  # fmt: skip
    if rng.random() < 0.6:
        header = re.sub(rb"\([\d, ]*\)", claim, header)
    else:
        kind = rng.choice(["|O", "<V1000000000", "<U99", "<f2", ">c16", "<M8[ns]", "|S0", "[]"])
        header = re.sub(rb"'[<>|]\w\d'", repr(kind).encode(), header)
    return content[:8] + struct.pack("<H", len(header)) + header + content[10 + content[8] :]


def npz_entry(content: bytes, rng: Rng) -> bytes:
    return zip_entry(content, rng, npy)


def zipped(mutations: tuple[Mutation, ...]) -> Mutation:
    """What is inside a gzip file is damaged, or is a thousand times its size."""

    def mutate(content: bytes, rng: Rng) -> bytes:
        try:
            plain = gzip.decompress(content)
        except (OSError, EOFError):
            return flip(content, rng)
        if rng.random() < 0.1:
            return _gzip_bomb(plain[:16])
        return gzip.compress(rng.choice(mutations)(plain, rng))

    return mutate


def idx_header(content: bytes, rng: Rng) -> bytes:
    words = [rng.choice([0, 1, 28, 1 << 31, (1 << 32) - 1]) for _ in range(3)]
    return content[:4] + struct.pack(">III", *words) + content[16:]


_CELLS = [
    "", "nan", "inf", "-inf", "1e999", "-0.0", "5e-324", "1e308", "-1e308", "0x10", "1_000", " 1",
    "9" * 400, "9" * 5000, "٣", "\x1b[2J", "\u202e", '"', "\0", "train", "½", "true", "1e-300",
]  # fmt: skip


def csv_cells(content: bytes, rng: Rng) -> bytes:
    rows = [line.split(",") for line in content.decode("utf-8", "replace").split("\r\n")]
    for _ in range(rng.choice([1, 1, 5, 40])):
        row = rng.choice(rows)
        column = rng.randrange(len(row))
        row[column] = rng.choice(_CELLS)
    if rng.random() < 0.2:
        rows = rows[:1] + rng.sample(rows[1:], rng.randrange(len(rows)))
    if rng.random() < 0.1:
        for row in rows:
            row.reverse()
    return "\r\n".join(map(",".join, rows)).encode("utf-8", "replace")


_SCRAPS = [
    ",", "=", ":", '"', "'", "#", "\n", "\x1b[2J", "\0", "\\", "\ud800", "-", "..", "/", "[", "{",
    "limit=1", "mean=", "a" * 999, "9" * 5000, "os:system", "builtins:exec", "x.py:f", "pt2:x",
    "\u202e", "true", "1e999", "nan", "mlp:", "mlp:0-0", "1-2-3", ".toml", "transformers:/",
    "antigravity:x", "this:d",
]  # fmt: skip


def scraps(content: bytes, rng: Rng) -> bytes:
    text = content.decode("utf-8", "surrogatepass")
    for _ in range(rng.choice([1, 2, 4])):
        at = rng.randrange(len(text) + 1)
        cut = at + rng.choice([0, 0, 1, 5])
        text = text[:at] + rng.choice(_SCRAPS) + text[cut:]
    return text.encode("utf-8", "surrogatepass")


# The formats


@dataclass(frozen=True)
class Format:
    """A format: what good files are, what reads them, and how it may say no."""

    write: Callable[[Path], list[str]]
    """Makes good files in a folder; gives the names of those that are damaged."""
    read: Callable[[Path, int], object]
    errors: tuple[type[LosscliError], ...]
    damage: tuple[Mutation, ...] = ()


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {**MLP("6-5-3").state_dict(), "steps": torch.tensor(7)}


def _inspect(name: str) -> Callable[[Path, int], object]:
    def read(folder: Path, number: int) -> object:
        from losscli.checkpoint import list_checkpoints, read
        from losscli.cli import files
        from losscli.results.result import to_json
        from losscli.studies.inspection import inspect

        path = str(folder / name) if name else str(folder)
        list_checkpoints(path)
        try:
            result = inspect([path])
            files.report(result)
            to_json(result.summary)
        finally:
            read(path).select(MODEL).sha256()
        return result

    return read


MODEL = state()
_OF_CHECKPOINTS = (CheckpointError, MismatchError)


def _safetensors(folder: Path) -> list[str]:
    save_file(state(), folder / "a.safetensors", {"losscli.model": "mlp:6-5-3", "note": "x"})
    return ["a.safetensors"]


def _torch(content: Callable[[], Any], name: str = "a.pt", *, legacy: bool = False) -> Any:
    def write(folder: Path) -> list[str]:
        torch.save(content(), folder / name, _use_new_zipfile_serialization=not legacy)
        return [name]

    return write


def _lightning() -> dict[str, Any]:
    """What Lightning keeps in a checkpoint, as it is on disk."""
    import argparse
    from collections import OrderedDict, defaultdict

    weights = OrderedDict((f"model.{name}", t) for name, t in state().items())
    return {
        "epoch": 3,
        "global_step": 40,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": weights,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 3}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'val'}": {"best": torch.tensor(0.5), "p": "/x"}},
        "optimizer_states": [{"state": {0: {"m": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}],
        "lr_schedulers": [{"_step_count": 3, "factors": defaultdict(list, a=[1])}],
        "hparams_name": "kwargs",
        "hyper_parameters": argparse.Namespace(lr=np.float64(0.1), out=Path("runs"), n=np.int64(3)),
    }


def _program(folder: Path) -> list[str]:
    exported = torch.export.export(MLP("6-5-3"), (torch.ones(2, 6),))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(exported, folder / "a.pt2")
    (folder / "a.pt2").rename(folder / "a.pt")
    return ["a.pt"]


def _read_program(folder: Path, number: int) -> object:
    """A program is no checkpoint: only the command line may name one, for a model."""
    try:
        return _inspect("a.pt")(folder, number)
    except CheckpointError as error:
        if "is a torch.export program, which is a model and not a checkpoint" in str(error):
            return None
        raise


def _sharded(folder: Path) -> list[str]:
    weights = state()
    shards = {"model-1.safetensors": 3, "model-2.safetensors": 9}
    places, names = {}, iter(weights)
    for file, count in shards.items():
        part = {name: weights[name] for name in itertools.islice(names, count)}
        save_file(part, folder / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 99}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"text_config": {"model_type": "x"}}')
    return ["model.safetensors.index.json", *shards, "config.json"]


def _sharded_damage(content: bytes, rng: Rng) -> bytes:
    return (json_text if content[:1] == b"{" else safetensors_header)(content, rng)


def _distributed(folder: Path) -> list[str]:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": state(), "step": 3}, checkpoint_id=folder)
    return [".metadata", next(p.name for p in folder.glob("*.distcp"))]


def _distributed_damage(content: bytes, rng: Rng) -> bytes:
    if content[:2] == b"\x80\x04":
        return spliced_pickle(content, rng)
    # A part is several small archives one after the other: the pickle in one of them.
    starts = [m.start() for m in re.finditer(rb"\x80\x02ctorch", content)]
    start = rng.choice(starts) if starts else 0
    end = content.find(b"PK", start)
    hurt = spliced_pickle(content[start:end], rng)
    keep = (hurt + content[start:end])[: end - start] if rng.random() < 0.7 else hurt
    return content[:start] + keep + content[end:]


def _adapter(folder: Path) -> list[str]:
    base, lora = folder / "base", folder / "lora"
    base.mkdir(exist_ok=True)
    lora.mkdir(exist_ok=True)
    save_file(state(), base / "model.safetensors")
    config = {
        "peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "lora_alpha": 4,
        "rank_pattern": {"layers.0": 2}, "alpha_pattern": {}, "init_lora_weights": True,
        "fan_in_fan_out": False, "use_rslora": False, "target_modules": ["layers.0"],
    }  # fmt: skip
    (lora / "adapter_config.json").write_text(json.dumps(config))
    modules = [n.removesuffix(".weight") for n, t in state().items() if t.ndim == 2]
    factors = {}
    for module in modules:
        rows, columns = state()[f"{module}.weight"].shape
        factors[f"base_model.model.{module}.lora_A.weight"] = torch.ones(2, columns)
        factors[f"base_model.model.{module}.lora_B.weight"] = torch.ones(rows, 2)
    save_file(factors, lora / "adapter_model.safetensors")
    return ["lora/adapter_config.json", "lora/adapter_model.safetensors"]


def _read_adapter(folder: Path, number: int) -> object:
    from losscli.checkpoint import find_base, read

    base, lora = str(folder / "base"), str(folder / "lora")
    find_base([lora])
    return read(lora).select(MODEL, read(base).select(None))


def _config(folder: Path) -> list[str]:
    config = {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 1, "n_head": 2,
        "n_embd": 8, "n_positions": 16, "vocab_size": 11, "bos_token_id": 0, "eos_token_id": 0,
        "activation_function": "gelu_new", "initializer_range": 0.02, "layer_norm_epsilon": 1e-5,
        "torch_dtype": "float32", "task_specific_params": {"x": {"y": [1]}}, "use_cache": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return ["config.json"]


def _read_config(folder: Path, number: int) -> object:
    from losscli.models.pretrained import build_pretrained, has_config

    has_config(folder)
    return build_pretrained(folder)


def _tables(folder: Path) -> list[str]:
    import losscli

    torch.manual_seed(0)
    data = {"train": (torch.rand(9, 6), torch.arange(9) % 3), "test": (torch.rand(5, 6),
            torch.arange(5) % 3)}  # fmt: skip
    found = losscli.interpolate("init:0", "init:1", model="mlp:6-5-3", data=data, points=7)
    (folder / "run.csv").write_text(found.table.to_csv(), newline="")
    from losscli.results.result import to_json

    (folder / "run.json").write_text(to_json(found.summary))
    return ["run.csv", "run.csv", "run.json"]


def _tables_damage(content: bytes, rng: Rng) -> bytes:
    return (json_text if content[:1] == b"{" else csv_cells)(content, rng)


def _read_table(folder: Path, number: int) -> object:
    from losscli.plotting.terminal import draw as in_terminal
    from losscli.registry import command_of
    from losscli.results.result import draw
    from losscli.results.runs import read_run
    from losscli.studies.export import lowest

    path = folder / "run.csv"
    run = read_run(path)
    names = " → ".join(str(c["name"]) for c in run.summary.get("checkpoints", []))
    log = number % 2 == 0
    if (command := command_of(run.table.columns)) and command.name == "interpolate":
        text = in_terminal([(names, run.table)], width=60, height=12, colour=False, log=log)
        assert "\x1b" not in text
    if number % 25 == 0:
        draw([run], Drawing(log=log))
    split = run.table["split"][0] if run.table.rows else ""
    return lowest(path, str(split))


_SPECS = [
    "mlp:6-5-3,activation=relu", "cnn:4-6,channels=2,classes=3,batchnorm=true", "cross_entropy",
    "npz:data.npz,mean=0.5,std=0.25,flatten=true", 'text:"a,b.txt",context=16,tokenizer=bytes',
    "mnist:folder,mean=0.1-0.2,std=1-2,limit=5", "mlp:2-2,bias=1-2-3",
]  # fmt: skip


def _specs(folder: Path) -> list[str]:
    for number, spec in enumerate(_SPECS):
        (folder / str(number)).write_text(spec)
    return [str(number) for number in range(len(_SPECS))]


def _read_spec(folder: Path, number: int) -> object:
    from losscli.data import DATASETS
    from losscli.evaluation.losses.built_in import LOSSES
    from losscli.evaluation.losses.metrics import METRICS
    from losscli.models import MODELS
    from losscli.spec import Spec, expand_toml, look_up

    for file in folder.iterdir():
        # As they come from a file's metadata: they may not name code.
        told = file.read_bytes().decode("utf-8", "surrogateescape")
        text, trusted, _ = expand_toml(told, trusted=False)
        assert not trusted
        spec = Spec.parse(text)
        assert str(Spec.parse(str(spec))) == str(spec)
        for kind, registry in (("model", MODELS), ("data", DATASETS), ("loss", LOSSES),
                               ("metric", METRICS)):  # fmt: skip
            try:
                look_up(spec, registry, kind, trusted=False, runs_code=("pt2",))
            except SpecError:
                continue
    return None


def _toml(folder: Path) -> list[str]:
    (folder / "data.toml").write_text(
        'name = "npz:data.npz"\nmean = 0.5\nstd = 1.0\nflatten = true\nlimit = 3\n'
    )
    (folder / "losscli.toml").write_text(
        'model = "mlp:6-5-3"\ndata = "data.toml"\nloss = "cross_entropy"\n'
    )
    np.savez(folder / "data.npz", inputs=np.ones((4, 6), np.float32), targets=np.arange(4) % 3)
    torch.save(state(), folder / "a.pt")
    return ["data.toml", "losscli.toml"]


def _read_toml(folder: Path, number: int) -> object:
    from losscli.checkpoint import read
    from losscli.data import load
    from losscli.settings import Settings
    from losscli.studies.model import build
    from losscli.studies.specs import find_specs

    specs = find_specs(Settings(), None, read(str(folder / "a.pt")))
    for kind, found in (("model", specs.model), ("data", specs.data), ("loss", specs.loss)):
        if found is None or not isinstance(found.value, str):
            continue
        assert not found.trusted
        if kind == "model":
            build(found)
        elif kind == "data":
            load(found.value, trusted=False, folder=found.folder)
    return None


def _idx(squeeze: bool) -> Callable[[Path], list[str]]:
    def write(folder: Path) -> list[str]:
        suffix = ".gz" if squeeze else ""
        names = [f"train-images-idx3-ubyte{suffix}", f"train-labels-idx1-ubyte{suffix}"]
        images = struct.pack(">4B3I", 0, 0, 8, 3, 5, 4, 4) + bytes(range(80))
        labels = struct.pack(">4BI", 0, 0, 8, 1, 5) + bytes([0, 1, 2, 0, 1])
        for name, content in zip(names, (images, labels), strict=True):
            (folder / name).write_bytes(gzip.compress(content) if squeeze else content)
        return names

    return write


def _data(spec: str) -> Callable[[Path, int], object]:
    def read(folder: Path, number: int) -> object:
        from losscli.data import load

        return load(spec.format(folder=folder), trusted=False)

    return read


def _cifar_binary(folder: Path) -> list[str]:
    (folder / "data_batch_1.bin").write_bytes(b"".join(bytes([i]) + bytes(3072) for i in range(3)))
    return ["data_batch_1.bin"]


def _cifar_python(folder: Path) -> list[str]:
    batch = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 2], b"batch_label": b"x"}
    (folder / "data_batch_1").write_bytes(pickle.dumps(batch, protocol=2))
    return ["data_batch_1"]


def _npz(folder: Path) -> list[str]:
    arrays = {
        "train_inputs": np.random.default_rng(0).random((9, 6), np.float32),
        "train_targets": np.arange(9) % 3,
        "test_inputs": np.ones((4, 6), np.float32),
        "test_targets": np.arange(4),
    }
    np.savez(folder / "data.npz", **arrays)  # type: ignore[arg-type]
    return ["data.npz"]


def _arrays(folder: Path) -> list[str]:
    arrays = {"inputs": torch.rand(9, 6), "targets": torch.arange(9) % 3}
    save_file(arrays, folder / "data.safetensors")
    return ["data.safetensors"]


def _tokenizer(folder: Path) -> list[str]:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)
    (folder / "data.txt").write_text("a b a a b c")
    return ["tokenizer.json", "tokenizer_config.json"]


_DATA = (DataError, SpecError, UntrustedCodeError)

FORMATS: dict[str, Format] = {
    "safetensors": Format(
        _safetensors, _inspect("a.safetensors"), _OF_CHECKPOINTS, (safetensors_header,)
    ),
    "torch": Format(
        _torch(lambda: {"state_dict": state(), "losscli.model": "mlp:6-5-3"}),
        _inspect("a.pt"),
        _OF_CHECKPOINTS,
        (torch_zip, respelled),
    ),
    "torch-legacy": Format(
        _torch(lambda: {"state_dict": state(), "epoch": 3}, legacy=True),
        _inspect("a.pt"),
        _OF_CHECKPOINTS,
        (spliced_pickle,),
    ),
    "lightning": Format(
        _torch(_lightning, "a.ckpt"), _inspect("a.ckpt#state_dict"), _OF_CHECKPOINTS, (torch_zip,)
    ),
    "program": Format(_program, _read_program, _OF_CHECKPOINTS, (torch_zip,)),
    "sharded": Format(_sharded, _inspect(""), _OF_CHECKPOINTS, (_sharded_damage,)),
    "distributed": Format(_distributed, _inspect(""), _OF_CHECKPOINTS, (_distributed_damage,)),
    "adapter": Format(_adapter, _read_adapter, _OF_CHECKPOINTS, (_sharded_damage,)),
    "config": Format(_config, _read_config, (ModelError,), (json_text,)),
    "table": Format(_tables, _read_table, (TableError, UsageError), (_tables_damage,)),
    "spec": Format(_specs, _read_spec, (SpecError, UntrustedCodeError), (scraps,)),
    "toml": Format(_toml, _read_toml, (*_DATA, ModelError, UsageError), (scraps,)),
    "idx": Format(_idx(False), _data("mnist:{folder}"), _DATA, (idx_header,)),
    "idx-gzip": Format(_idx(True), _data("mnist:{folder}"), _DATA, (zipped((*ANY, idx_header)),)),
    "cifar-binary": Format(_cifar_binary, _data("cifar10:{folder}"), _DATA, (overwrite,)),
    "cifar-python": Format(_cifar_python, _data("cifar10:{folder}"), _DATA, (spliced_pickle,)),
    "npz": Format(_npz, _data("npz:{folder}/data.npz"), _DATA, (npz_entry,)),
    "arrays": Format(
        _arrays, _data("safetensors:{folder}/data.safetensors"), _DATA, (safetensors_header,)
    ),
    "tokenizer": Format(
        _tokenizer, _data("text:{folder}/data.txt,tokenizer={folder}"), _DATA, (json_text,)
    ),
}


# The judge


class Hang(BaseException):
    """A case took longer than any may."""


# What files do as they are read, and what they may not.
_FORBIDDEN = re.compile(
    r"exec|import|os\.(system|exec|fork|forkpty|posix_spawn|spawn|startfile|remove|rename|"
    r"mkdir|rmdir|link|symlink|truncate|chmod|chown|putenv|kill)|subprocess\.Popen|shutil\..*|"
    r"socket\..*|ctypes\.dlopen|pickle\.find_class|webbrowser\.open|urllib\.Request|tempfile\..*|"
    r"pty\.spawn|code\.__new__"
)


class Watch:
    """Notes what this process does that reading a file has no need of."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.on = False
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            flags = args[2] if isinstance(args[2], int) else 0
            written = isinstance(args[1], str) and set(args[1]) & set("wax+")
            if written or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.seen.append(f"open {args[0]!r} {args[1]!r}")
        elif _FORBIDDEN.fullmatch(event):
            self.seen.append(f"{event} {str(args)[:200]}")

    @contextmanager
    def __call__(self) -> Iterator[list[str]]:
        self.seen = []
        self.on = True
        try:
            yield self.seen
        finally:
            self.on = False


def _ran_out(error: BaseException | None) -> bool:
    """Whether memory was asked for that is not to be had: a claim was believed."""
    while error is not None:
        text = str(error)
        if isinstance(error, MemoryError) or "alloc" in text or "not enough memory" in text:
            return True
        error = error.__cause__ or error.__context__
    return False


def _files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def _cases(
    name: str, form: Format, targets: list[str], good: dict[str, bytes], cases: int
) -> Iterator[tuple[str, str, bytes]]:
    """Yields the file to damage, how that is done, and what it is then.

    All kinds of damage in turn, half of which know the format, to all files in turn.
    """
    kinds = [*itertools.islice(itertools.cycle(form.damage), len(ANY)), *ANY]
    for number in range(cases):
        rng = Rng(f"{name} {number}")
        rounds, kind = divmod(number, len(kinds))
        mutate = kinds[kind]
        target = targets[(rounds + kind) % len(targets)]
        damaged = mutate(good[target], rng)
        if rng.random() < 0.1:
            damaged = rng.choice(ANY)(damaged, rng)
        yield target, mutate.__name__, damaged


def judge(name: str, folder: Path, watch: Watch, cases: int) -> dict[str, Any]:
    """Has damaged files of a format read, and tells of whatever should not be."""
    form = FORMATS[name]
    inside = folder / "files"
    inside.mkdir()
    targets = form.write(inside)
    good = {target: (inside / target).read_bytes() for target in set(targets)}
    os.chdir(folder)
    made = list(_cases(name, form, targets, good, cases))
    # Of names in archives, of pickles, and what json takes bytes for.
    wide = (f"utf_{size}{order}" for size in (16, 32) for order in ("", "_be", "_le"))
    for codec in ("cp437", "unicode_escape", "utf_8_sig", *wide):
        codecs.lookup(codec)
    form.read(inside, 0)  # what else it imports late is imported now
    before = _files(folder)
    used = resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))

    def hang(*_: object) -> None:
        raise Hang

    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, hang)
    counts = {"read": 0, "refused": 0}
    faults: list[str] = []
    for number, (target, how, damaged) in enumerate(made):
        (inside / target).write_bytes(damaged)
        where = f"{name} {number} ({target}, {how})"
        out = io.StringIO()
        fault = ""
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, 10 * SECONDS)  # other processes may have the cores
        try:
            with (
                warnings.catch_warnings(record=True) as warned,
                redirect_stdout(out),
                redirect_stderr(out),
                watch() as seen,
            ):
                warnings.simplefilter("always")
                form.read(inside, number)
            counts["read"] += 1
        except form.errors as error:
            counts["refused"] += 1
            # How large a model a config.json asks for only transformers knows, when it builds it.
            if _ran_out(error) and name != "config":
                chain = "".join(traceback.format_exception(error, limit=-3))
                fault = f"believed a claim: {error!r} after {error.__context__!r}\n{chain}"
            elif "\n" in printable(str(error)):
                fault = f"more than a line: {error!r}"
        except BaseException as error:  # noqa: BLE001
            fault = "".join(traceback.format_exception(error, limit=-6))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if warned:
            fault += f" warned: {warned[0].message}"
        if seen:
            fault += f" did: {seen[:5]}"
        if out.getvalue():
            fault += f" printed: {out.getvalue()[:200]!r}"
        if fault:
            faults.append(f"{where}: {fault}")
        (inside / target).write_bytes(good[target])
    new = _files(folder) - before
    if new:
        faults.append(f"{name}: left {sorted(new)}")
    return {**counts, "faults": faults}


def judge_in_fork(name: str, place: Path, cases: int) -> dict[str, Any]:
    """Does what ``judge`` does in a fork of this process, with limited memory.

    Args:
        name: The format.
        place: An empty folder.
        cases: How many damaged files.
    """
    _Bomb.zeros()
    if name in {"config", "tokenizer"}:
        import transformers  # noqa: F401 - once for both
    told = place / "verdict"
    child = fork()
    if not child:
        # Whatever C code prints is heard as well.
        heard = os.open(place / "printed", os.O_WRONLY | os.O_CREAT)
        os.dup2(heard, 1)
        os.dup2(heard, 2)
        # glibc reserves 64 MB of addresses for every thread of a library, which the limit counts.
        ctypes.CDLL(None).mallopt(_ARENA_MAX, 1)
        folder = place / "batch"
        folder.mkdir()
        try:
            verdict = judge(name, folder, Watch(), cases)
        except BaseException:  # noqa: BLE001
            verdict = {"faults": [traceback.format_exc()]}
        told.write_text(json.dumps(verdict))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    verdict = json.loads(told.read_text()) if told.exists() else {"faults": []}
    if status:
        verdict["faults"].append(f"{name}: the process ended with {status}")
    printed = (place / "printed").read_text(errors="replace")
    # What tokenizers prints of keys that it does not know is nothing that steers a terminal.
    known = all(
        line.startswith("Ignored unknown kwarg option") and line.isprintable()
        for line in printed.splitlines()
    )
    if printed and not (known and name == "tokenizer"):
        verdict["faults"].append(f"{name}: printed {printed[:2000]!r}")
    return verdict
