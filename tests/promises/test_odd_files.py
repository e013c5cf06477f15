"""Files that are no files, and tensors that are no plain ones: one line each, and no waiting."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from losscli import files as regular
from losscli.checkpoint import read
from losscli.errors import TableError
from losscli.table import Table
from tests.cases import in_turn
from tests.conftest import Losscli
from tests.forks import ended, fork

LINE = "alpha,split,loss,loss_stderr\r\n0.0,train,1.0,0.0\r\n1.0,train,0.5,0.0\r\n"
PIPE = "is a pipe, not a regular file. Write its output to a file and give that"
DEVICE = "is a device, not a regular file. Name a file"

Make = Callable[[str], str]

pytestmark = pytest.mark.skipif(os.name == "nt", reason="its pipes and devices have no such names")


@pytest.fixture(params=["pipe", "zeros"])
def odd(request: pytest.FixtureRequest, folder: Path) -> Make:
    """Puts a pipe that nobody writes to, or a link to a device that never ends, in a place.

    What is made says what losscli has to say of it.
    """

    def make(name: str) -> str:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        if request.param == "pipe":
            os.mkfifo(path)
            return f"{name} cannot be read: it {PIPE}"
        path.symlink_to("/dev/zero")
        return f"{name} cannot be read: it {DEVICE}"

    return make


def refused(losscli: Losscli, folder: Path, said: str, *arguments: object) -> None:
    before = sorted(folder.rglob("*"))
    done = losscli(*arguments)
    assert done.status in {1, 2}
    assert done.stdout == ""
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("name", ["f.pt", "f.safetensors", "f.bin", "f.safetensors.index.json"])
def test_a_checkpoint_is_a_regular_file(
    losscli: Losscli, folder: Path, odd: Make, name: str
) -> None:
    said = odd(name)
    refused(losscli, folder, said, "inspect", name)
    refused(losscli, folder, said, "interpolate", "a.pt", name, "-o", "out")


FOLDERS = [
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin",
    "some.bin.index.json",
    ".metadata",
]


@pytest.mark.parametrize("name", FOLDERS)
def test_the_files_of_a_folder_are_regular_files(
    losscli: Losscli, folder: Path, odd: Make, name: str
) -> None:
    refused(losscli, folder, odd(f"own/{name}"), "inspect", "own")


def test_files_next_to_weights_are_regular_files(losscli: Losscli, folder: Path, odd: Make) -> None:
    said = odd("own/config.json")
    torch.save({"w": torch.ones(2)}, "own/pytorch_model.bin")
    refused(losscli, folder, said, "inspect", "own")
    said = odd("lora/adapter_config.json")
    torch.save({"w": torch.ones(2)}, "lora/adapter_model.bin")
    refused(losscli, folder, said, "inspect", "lora")
    refused(losscli, folder, said, "inspect", "lora/adapter_model.bin")


def test_parts_of_a_checkpoint_are_regular_files(losscli: Losscli, folder: Path, odd: Make) -> None:
    said = odd("own/one.bin")
    index = {"weight_map": {"w": "one.bin"}}
    Path("own/pytorch_model.bin.index.json").write_text(json.dumps(index))
    refused(losscli, folder, said, "inspect", "own")


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt"])
def test_parts_of_a_tokenizer_are_regular_files(
    losscli: Losscli, folder: Path, odd: Make, name: str
) -> None:
    said = odd(f"own/{name}")
    Path("some.txt").write_text("some text")
    data = ("-d", "text:some.txt,tokenizer=own")
    refused(losscli, folder, said, "interpolate", "a.pt", "b.pt", *data, "-o", "out")


@pytest.mark.parametrize("option", ["-d", "-m"])
def test_a_toml_file_is_a_regular_file(
    losscli: Losscli, folder: Path, odd: Make, option: str
) -> None:
    refused(
        losscli, folder, odd("f.toml"), "interpolate", "a.pt", "b.pt", option, "f.toml", "-o", "out"
    )


def test_a_pipe_in_place_of_a_model_next_to_a_checkpoint_is_not_read(
    losscli: Losscli, folder: Path, odd: Make
) -> None:
    odd("losscli.toml")
    odd("config.json")
    torch.save({"w": torch.ones(2)}, "c.pt")
    refused(losscli, folder, "no model given", "interpolate", "c.pt", "c.pt", "-o", "out")


def test_tables_are_regular_files(losscli: Losscli, folder: Path, odd: Make) -> None:
    said = odd("f.csv")
    refused(losscli, folder, said, "interpolate", "a.pt", "b.pt", "--context", "f.csv", "-o", "out")
    to = ("-o", "out.safetensors")
    refused(
        losscli, folder, said, "export", "a.pt", "b.pt", "--csv", "f.csv", "--best", "train", *to
    )


def test_a_table_next_to_another_is_a_regular_file(
    losscli: Losscli, folder: Path, odd: Make
) -> None:
    (folder / "x.csv").write_text(LINE, newline="")
    for name in ("x.context.csv", "x.blocks.csv"):
        said = odd(name)
        refused(losscli, folder, said, "plot", "x.csv", "--terminal")
        (folder / name).unlink()
    odd("x.json")
    to = ("-o", "out.safetensors")
    said = "x.json is not the summary of x.csv"
    refused(
        losscli, folder, said, "export", "a.pt", "b.pt", "--csv", "x.csv", "--best", "train", *to
    )
    done = losscli("plot", "x.csv", "--terminal")
    assert done.status == 0
    assert "loss" in done.stdout


def test_results_that_are_not_regular_files_are_of_another_run(
    losscli: Losscli, folder: Path, odd: Make
) -> None:
    odd("out.json")
    said = "out.json contains the results of another run"
    refused(losscli, folder, said, "interpolate", "a.pt", "b.pt", "-o", "out", "--points", "3")
    (folder / "x.csv").write_text(LINE, newline="")
    odd("out.png")
    refused(losscli, folder, "out.png is another figure", "plot", "x.csv", "-o", "out")


@pytest.mark.parametrize(
    ("name", "planted"),
    in_turn(["x.png", "x.csv", "out.json", "half.safetensors"], "link", "file"),
)
def test_no_file_is_written_through_a_planted_link(
    name: str, planted: str, losscli: Losscli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names of temporary files can be guessed, and a folder may be open to others."""
    other = folder / "of somebody else"
    other.write_text("theirs")
    (folder / "x.csv").write_text(LINE, newline="")
    temporary = folder / f".{name}.{os.getpid()}.tmp"

    def plant() -> None:
        if planted == "link":
            temporary.symlink_to(other)
        else:
            os.link(other, temporary)

    commands: dict[str, tuple[object, ...]] = {
        "x.png": ("plot", "x.csv"),
        "half.safetensors": ("export", "a.pt", "b.pt", "--alpha", 0.5, "-o", name),
    }
    line = ("interpolate", "a.pt", "b.pt", "--points", 3, "-o", Path(name).stem, "--force",
            "--no-figure")  # fmt: skip
    plant()
    done = losscli(*commands.get(name, line))
    assert done.status == 0, done.stderr
    assert other.read_text() == "theirs"
    assert not os.path.lexists(temporary)
    # Planted in the moment before the file is made, it is in the way: one line.
    made = regular.create

    def late(path: Path) -> Any:
        if path.name == temporary.name and not os.path.lexists(temporary):
            plant()
        return made(path)

    for module in ("losscli.results.result", "losscli.checkpoint.saving"):
        monkeypatch.setattr(f"{module}.create", late)
    (folder / name).unlink()
    done = losscli(*commands.get(name, line))
    assert (done.status, done.stderr.count("losscli: ")) == (1, 1)
    assert "cannot be written: File exists" in done.stderr
    assert other.read_text() == "theirs"
    assert not (folder / name).exists()


def test_the_unpacked_size_is_compared_with_the_free_memory(
    losscli: Losscli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousandth of its size, a file may be unpacked to more than there is."""
    import gzip
    import struct

    import numpy as np

    size = 30_000
    np.savez_compressed("bomb.npz", inputs=np.zeros((size, 6), np.float32),
                        targets=np.zeros(size, np.int64))  # fmt: skip
    (folder / "mnist").mkdir()
    for name, shape in (("images-idx3", (size, 2, 3)), ("labels-idx1", (size,))):
        head = struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape)
        content = gzip.compress(head + bytes(math.prod(shape)))
        (folder / "mnist" / f"train-{name}-ubyte.gz").write_bytes(content)
    assert Path("bomb.npz").stat().st_size < 10_000
    run = ("interpolate", "a.pt", "b.pt", "--points", 3, "--no-figure", "-o", "out", "-q", "-d")
    for data, needed in (("npz:bomb.npz", 960_256), ("mnist:mnist", 2 * 180_000)):
        monkeypatch.setattr("losscli.data.memory.free_memory", lambda n=needed: n - 1)
        done = losscli(*run, data)
        assert (done.status, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        where = "bomb.npz" if "bomb" in data else "mnist/train-images-idx3-ubyte.gz"
        told = re.search(rf"{where} takes ([\d,]+) bytes of memory when", done.stderr)
        assert told, done.stderr
        assert abs(int(told[1].replace(",", "")) - needed) < 1000
        assert not list(folder.glob("out.*"))
        monkeypatch.setattr("losscli.data.memory.free_memory", lambda n=needed: n + 1000)
        done = losscli(*run, data, "--force")
        assert done.status == 0, done.stderr
        for path in folder.glob("out.*"):
            path.unlink()


POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
STAND_INS = {
    POINTER: ("a pointer of Git LFS, not the file itself", "git lfs pull --include {name}"),
    "<!DOCTYPE html>\n<html><head>": (
        "an HTML page, not the file itself",
        "Download the file itself",
    ),
    "\n <HTML><body>404": ("an HTML page, not the file itself", "Download the file itself"),
}


@pytest.mark.parametrize("content", STAND_INS)
@pytest.mark.parametrize("name", ["f.pt", "f.bin", "f.safetensors", "data.npz", "d.safetensors",
                                  "mnist/t10k-images-idx3-ubyte"])  # fmt: skip
def test_a_placeholder_of_a_download_is_named(
    content: str, name: str, losscli: Losscli, folder: Path
) -> None:
    (folder / "mnist").mkdir()
    (folder / "mnist" / "t10k-labels-idx1-ubyte").write_bytes(bytes(9))
    (folder / name).write_text(content)
    scheme = name.partition("/")[0] if "/" in name else {"data.npz": "npz:data.npz"}.get(
        name, f"safetensors:{name}")  # fmt: skip
    spec = "mnist:mnist" if scheme == "mnist" else scheme
    run = ("interpolate", name if name[0] == "f" else "a.pt", "b.pt", "-o", "out")
    what, cure = STAND_INS[content]
    refused(losscli, folder, f"{name} is {what}", *run, "-d", spec if name[0] != "f" else
            "npz:data.npz")  # fmt: skip
    done = losscli(*run, "-d", spec if name[0] != "f" else "npz:data.npz")
    assert cure.format(name=Path(name).name) in done.stderr


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_plain_pickle_has_a_cure_that_works(losscli: Losscli, folder: Path) -> None:
    """What pickle.dump wrote, torch.load does not read, with or without weights_only."""
    import pickle

    state = torch.load("a.pt", weights_only=True)["state_dict"]
    kinds = [(arrays, protocol) for arrays in (True, False) for protocol in (2, 4, 5)]
    cures = []
    for number, (arrays, protocol) in enumerate(kinds):
        content = {"epoch": 3, "net": {n: t.numpy() if arrays else t for n, t in state.items()}}
        name = f"f{number}.pkl"
        (folder / name).write_bytes(pickle.dumps(content, protocol))
        refused(losscli, folder, "nothing was run. If you trust it", "inspect", name)
        told = losscli("inspect", name).stderr
        command = re.search(r"save its state dict again: (python .*)", told)
        assert command
        python, *cure = shlex.split(command[1])
        assert (python, cure[0]) == ("python", "-c")
        cures.append(cure)
    # In a fork, since the import of torch takes longest.
    pid = fork()
    if not pid:
        with contextlib.suppress(BaseException):
            for option, program, *words in cures:
                sys.argv = [option, *words]
                exec(program, {"__name__": "__main__"})
            os._exit(0)
        os._exit(99)
    assert ended(pid) == 0
    for number in range(len(kinds)):
        loaded = read(f"f{number}-weights.pt#net").select(None).weights
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[n], state[n]) for n in state)


def test_plot_does_not_wait_for_a_writer(losscli: Losscli, folder: Path) -> None:
    os.mkfifo("f.csv")
    said = "f.csv cannot be read: it is a pipe with no writer."
    refused(losscli, folder, said, "plot", "f.csv", "--terminal")


def test_plot_reads_a_pipe_that_it_is_given(
    losscli: Losscli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "x.csv").write_text(LINE, newline="")
    expected = losscli("plot", "x.csv", "--terminal")
    assert expected.status == 0
    really = os.set_blocking
    writing = -1

    def write(number: int, blocking: bool) -> None:
        """What a pipe is to hold comes once its reader begins to wait."""
        really(number, blocking)
        os.write(writing, LINE.encode())
        os.close(writing)

    monkeypatch.setattr("os.set_blocking", write)
    # As a shell names its <(…).
    reading, writing = os.pipe()
    done = losscli("plot", f"/dev/fd/{reading}", "--terminal")
    os.close(reading)
    assert (done.status, done.stdout) == (0, expected.stdout)
    # A pipe with a name, and somebody at its other end.
    os.mkfifo("f.csv")
    writing = os.open("f.csv", os.O_RDWR)
    done = losscli("plot", "f.csv", "--terminal")
    assert (done.status, done.stdout) == (0, expected.stdout)
    # What is there before is read too.
    reading, writing = os.pipe()
    os.write(writing, LINE.encode())
    os.close(writing)
    monkeypatch.setattr("os.set_blocking", really)
    done = losscli("plot", f"/dev/fd/{reading}", "--terminal")
    os.close(reading)
    assert (done.status, done.stdout) == (0, expected.stdout)


@pytest.mark.parametrize("name", ["/dev/zero", "zero.csv", "-"])
def test_plot_does_not_read_endless_zeros(
    losscli: Losscli, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (folder / "zero.csv").symlink_to("/dev/zero")
    with Path("/dev/zero").open("rb") as zeros:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=zeros))
        refused(losscli, folder, "it contains NUL bytes", "plot", name, "--terminal")


class Endless(io.RawIOBase):
    """Gives one block again and again, and counts."""

    def __init__(self, block: bytes, pipe: int) -> None:
        self.block, self.given, self.pipe = block, 0, pipe

    def fileno(self) -> int:
        return self.pipe

    def read(self, size: int = -1, /) -> Any:
        assert size > 0
        self.given += 1
        return self.block * max(1, size // len(self.block))


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (b"a", "its first line is longer than 1 MiB"),
        (b"alpha\n1\n", "it is not a regular file and gives more than 4 MiB"),
    ],
)
def test_a_table_that_never_ends_is_let_go(
    losscli: Losscli, folder: Path, monkeypatch: pytest.MonkeyPatch, block: bytes, said: str
) -> None:
    monkeypatch.setattr(regular, "_MOST", 4 << 20)
    reading, writing = os.pipe()
    endless = Endless(block, reading)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=endless))
    try:
        refused(losscli, folder, f"stdin cannot be read: {said}", "plot", "-", "--terminal")
    finally:
        os.close(reading)
        os.close(writing)
    assert endless.given < 100


def test_a_file_of_zeros_is_not_read_to_its_end(folder: Path) -> None:
    with Path("x.csv").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(TableError, match=r"^x\.csv cannot be read: it contains NUL bytes"):
        Table.read(Path("x.csv"))


# torch 2.6 and the safetensors of its time have no such type.
FLOAT4 = pytest.mark.skipif(
    not hasattr(torch, "float4_e2m1fn_x2"), reason="torch has no float4 here"
)


def sparse() -> torch.Tensor:
    return torch.eye(3).to_sparse()


def compressed() -> torch.Tensor:
    return torch.eye(3).to_sparse_csr()


def without_numbers() -> torch.Tensor:
    return torch.empty(3, 3, device="meta")


def nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def packed() -> torch.Tensor:
    return torch.ones(3, 3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)


ODD = [
    (sparse, "is sparse (sparse_coo). Save it dense, as tensor.to_dense()"),
    (compressed, "is sparse (sparse_csr). Save it dense, as tensor.to_dense()"),
    (without_numbers, "is on the device meta, which holds no values. Save it from a device"),
    (nested, "is nested, of rows of different lengths. Save each row as a tensor of its own"),
    pytest.param(
        packed,
        "is float4_e2m1fn_x2, which torch cannot compute with. Dequantise it first",
        marks=FLOAT4,
    ),
]


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize(("make", "said"), ODD)
def test_tensors_that_are_no_plain_ones_are_named(
    losscli: Losscli, folder: Path, make: Callable[[], torch.Tensor], said: str
) -> None:
    state = torch.load("a.pt", weights_only=True)["state_dict"]
    torch.save({**state, "layers.0.weight": make()}, "odd.pt")
    said = f"tensor 'layers.0.weight' of odd.pt {said}"
    refused(losscli, folder, said, "inspect", "odd.pt")
    refused(losscli, folder, said, "inspect", "a.pt", "odd.pt")
    to = ("-m", "mlp:6-5-3", "-o", "out")
    refused(losscli, folder, said, "interpolate", "a.pt", "odd.pt", *to)
    refused(losscli, folder, said, "interpolate", "odd.pt", "a.pt", *to)
    # Of several state dicts another may be chosen.
    torch.save({"model": state, "other": {"layers.0.weight": make()}}, "both.pt")
    said = said.replace("odd.pt", "both.pt#other")
    refused(losscli, folder, said, "inspect", "both.pt")
    refused(losscli, folder, "or name another state dict of the file, both.pt#KEY", "inspect",
            "both.pt")  # fmt: skip
    assert losscli("inspect", "both.pt#model").status == 0
    torch.save({"model": state, "optimizer": {"state": {0: {"x": make()}}}}, "training.pt")
    done = losscli("interpolate", "a.pt", "training.pt", "--points", "3", "--no-figure", *to)
    if make is packed:
        assert "training.pt is quantised" in done.stderr
    else:
        assert done.status == 0


def test_pending_operations_of_a_view_are_applied(losscli: Losscli, folder: Path) -> None:
    numbers = torch.tensor([[1 + 2j, 3 - 4j]])
    torch.save({"w": numbers.conj(), "x": numbers.clone().conj().imag}, "views.pt")
    torch.save({"w": numbers.conj().resolve_conj(), "x": -numbers.imag}, "made.pt")
    done = losscli("inspect", "views.pt", "made.pt", "--json")
    assert done.status == 0
    assert [row["distance"] for row in json.loads(done.stdout)["rows"]] == [0.0, 0.0]
    assert json.loads(done.stdout)["rows"][0]["norm"] == pytest.approx(30**0.5, rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "shape", "content", "said"),
    [
        pytest.param(
            *("F4", [4, 4], bytes(8)),
            "tensor 'w' of x.safetensors is float4_e2m1fn_x2, which torch cannot",
            marks=FLOAT4,
        ),
        ("F32", [0, 1 << 63], b"", "x.safetensors has a tensor of a shape that torch cannot make"),
    ],
)
def test_safetensors_that_torch_cannot_hold(
    losscli: Losscli, folder: Path, kind: str, shape: list[int], content: bytes, said: str
) -> None:
    head = {"w": {"dtype": kind, "shape": shape, "data_offsets": [0, len(content)]}}
    text = json.dumps(head).encode()
    Path("x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content)
    refused(losscli, folder, said, "inspect", "x.safetensors")
    to = ("-m", "mlp:6-5-3", "-o", "out")
    refused(losscli, folder, said, "interpolate", "a.pt", "x.safetensors", *to)


def test_a_tensor_that_repeats_its_values_is_named(losscli: Losscli, folder: Path) -> None:
    torch.save({"w": torch.ones(1).expand(10**4, 10**3)}, "wide.pt")
    said = (
        "wide.pt has a tensor of the shape [10000, 1000] that repeats the 4 bytes it holds. "
        "Save it as tensor.contiguous()"
    )
    refused(losscli, folder, said, "inspect", "wide.pt")
