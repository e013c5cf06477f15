"""CIFAR: the same images from both versions, as any Python wrote them, and no code run."""

from __future__ import annotations

import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from losscli.data import DataSet, Split, load
from losscli.models import MLP
from tests.conftest import Losscli

N = 7
GENERATOR = np.random.default_rng(0)
IMAGES = {
    name: GENERATOR.integers(0, 256, (N, 3, 32, 32), np.uint8)
    for name in ("1", "2", "3", "4", "5", "test")
}
FINE = {name: GENERATOR.integers(0, 100, N) for name in IMAGES}
COARSE = {name: GENERATOR.integers(0, 20, N) for name in IMAGES}
CLASSES = {name: GENERATOR.integers(0, 10, N) for name in IMAGES}
BATCHES = {f"data_batch_{name}" if name != "test" else "test_batch": name for name in IMAGES}


# The versions as they lie on a disk


def write_binary10(folder: Path) -> None:
    for file, name in BATCHES.items():
        pixels = IMAGES[name].reshape(N, -1)
        records = np.concatenate([CLASSES[name][:, None].astype(np.uint8), pixels], 1)
        (folder / f"{file}.bin").write_bytes(records.tobytes())


def write_binary100(folder: Path) -> None:
    for split, name in (("train", "1"), ("test", "test")):
        with (folder / f"{split}.bin").open("wb") as file:
            for i in range(N):
                file.write(bytes([COARSE[name][i], FINE[name][i]]) + IMAGES[name][i].tobytes())


def write_python10(folder: Path, dump: Callable[[Any], bytes]) -> None:
    for file, name in BATCHES.items():
        batch = {
            "batch_label": f"training batch {name}",
            "labels": CLASSES[name].tolist(),
            "data": IMAGES[name].reshape(N, -1),
            "filenames": [f"leptodactylus_pentadactylus_s_{i:06}.png" for i in range(N)],
        }
        (folder / file).write_bytes(dump(batch))


def write_python100(folder: Path, dump: Callable[[Any], bytes]) -> None:
    for split, name in (("train", "1"), ("test", "test")):
        batch = {
            "data": IMAGES[name].reshape(N, -1),
            "fine_labels": FINE[name].tolist(),
            "coarse_labels": COARSE[name].tolist(),
        }
        (folder / split).write_bytes(dump(batch))


def python2(value: Any) -> bytes:
    """Pickles as cPickle of Python 2 did in protocol 2, with NumPy 1's names."""
    return b"\x80\x02" + _python2(value) + b"."


def _python2(value: Any) -> bytes:
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, str | bytes):
        text = value.encode() if isinstance(value, str) else value
        if len(text) < 256:
            return b"U" + bytes([len(text)]) + text
        return b"T" + struct.pack("<i", len(text)) + text
    if isinstance(value, list):
        return b"](" + b"".join(map(_python2, value)) + b"e"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_python2, value)) + b"t"
    if isinstance(value, dict):
        pairs = b"".join(_python2(k) + _python2(v) for k, v in value.items())
        return b"}(" + pairs + b"u"
    assert isinstance(value, np.ndarray)
    code = value.dtype.str[1:]
    dtype = b"cnumpy\ndtype\n" + _python2((code, 0, 1)) + b"R"
    order = "|" if value.dtype.itemsize == 1 else "<"
    dtype += _python2((3, order, None, None, None, -1, -1, 0)) + b"b"
    begun = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + _python2((0,))
    state = _python2(1) + _python2(value.shape) + dtype + _python2(False)
    return begun + b"U\x01btR(" + state + _python2(value.tobytes()) + b"tb"


def python3(protocol: int) -> Callable[[Any], bytes]:
    return lambda batch: pickle.dumps(batch, protocol)


DUMPS: dict[str, Callable[[Any], bytes]] = {
    "python 2": python2,
    **{f"protocol {protocol}": python3(protocol) for protocol in range(6)},
    "bytes for keys": lambda batch: pickle.dumps({k.encode(): v for k, v in batch.items()}),
    "labels in an array": lambda batch: pickle.dumps(
        {k: np.array(v, "<i4") if "labels" in k else v for k, v in batch.items()}, 4
    ),
    "columns first": lambda batch: pickle.dumps(
        {k: np.asfortranarray(v) if k == "data" else v for k, v in batch.items()}, 2
    ),
    "labels of the other byte order": lambda batch: pickle.dumps(
        {k: np.array(v, ">i8") if "labels" in k else v for k, v in batch.items()}, 5
    ),
}


def inputs(data: DataSet, split: str) -> Tensor:
    examples = data.splits[split]
    assert isinstance(examples, Split)
    assert isinstance(examples.inputs, Tensor)
    return examples.inputs


def targets(data: DataSet, split: str) -> list[int]:
    examples = data.splits[split]
    assert isinstance(examples, Split)
    assert examples.targets.dtype == torch.int64
    return examples.targets.tolist()


def is_cifar10(data: DataSet, train: str = "12345") -> None:
    assert list(data.splits) == ["train", "test"]
    assert data.task == "classification"
    assert inputs(data, "train").dtype == torch.uint8
    assert np.array_equal(inputs(data, "train"), np.concatenate([IMAGES[i] for i in train]))
    assert targets(data, "train") == [c for i in train for c in CLASSES[i].tolist()]
    assert np.array_equal(inputs(data, "test"), IMAGES["test"])
    assert targets(data, "test") == CLASSES["test"].tolist()


def is_cifar100(data: DataSet, classes: dict[str, Any]) -> None:
    assert list(data.splits) == ["train", "test"]
    for split, name in (("train", "1"), ("test", "test")):
        assert np.array_equal(inputs(data, split), IMAGES[name])
        assert targets(data, split) == classes[name].tolist()


# Reading


@pytest.mark.filterwarnings("ignore:numpy.core.multiarray is deprecated")
def test_numpy_itself_reads_the_batches_of_python_2() -> None:
    batch = pickle.loads(python2({"data": IMAGES["1"], "labels": [1, 2]}), encoding="bytes")
    assert np.array_equal(batch[b"data"], IMAGES["1"])
    assert batch[b"labels"] == [1, 2]


@pytest.mark.parametrize("place", [".", "cifar-10-batches-bin"])
def test_the_binary_version(place: str, tmp_path: Path) -> None:
    (tmp_path / place).mkdir(exist_ok=True)
    write_binary10(tmp_path / place)
    is_cifar10(load(f"cifar10:{tmp_path}", trusted=False))


@pytest.mark.parametrize("dump", DUMPS.values(), ids=DUMPS.keys())
def test_the_python_version_gives_the_same(dump: Callable[[Any], bytes], tmp_path: Path) -> None:
    write_python10(tmp_path, dump)
    is_cifar10(load(f"cifar10:{tmp_path}", trusted=False))


@pytest.mark.parametrize("dump", [None, python2, python3(5)])
@pytest.mark.parametrize(
    ("keys", "classes"), [("", FINE), (",labels=fine", FINE), (",labels=coarse", COARSE)]
)
def test_cifar100_in_both_versions_with_both_labels(
    dump: Callable[[Any], bytes] | None, keys: str, classes: dict[str, Any], tmp_path: Path
) -> None:
    inside = tmp_path / ("cifar-100-python" if dump else "cifar-100-binary")
    inside.mkdir()
    if dump:
        write_python100(inside, dump)
    else:
        write_binary100(inside)
    is_cifar100(load(f"cifar100:{tmp_path}{keys}", trusted=False), classes)


def test_a_part_of_the_batches_will_do(tmp_path: Path) -> None:
    write_binary10(tmp_path)
    for i in (1, 3, 5):
        (tmp_path / f"data_batch_{i}.bin").unlink()
    is_cifar10(load(f"cifar10:{tmp_path}", trusted=False), train="24")
    for path in tmp_path.glob("data_*"):
        path.unlink()
    data = load(f"cifar10:{tmp_path}", trusted=False)
    assert list(data.splits) == ["test"]
    assert targets(data, "test") == CLASSES["test"].tolist()


def test_of_two_versions_the_fuller_is_read(tmp_path: Path) -> None:
    for place in ("cifar-10-batches-bin", "cifar-10-batches-py"):
        (tmp_path / place).mkdir()
    write_python10(tmp_path / "cifar-10-batches-py", python2)
    write_binary10(tmp_path / "cifar-10-batches-bin")
    (tmp_path / "cifar-10-batches-bin" / "data_batch_4.bin").unlink()
    is_cifar10(load(f"cifar10:{tmp_path}", trusted=False))


def test_a_curve_from_the_command_line_has_the_plain_loss_at_its_end(
    losscli: Losscli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    write_python10(Path("data"), python2)
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(MLP("3072-4-10"))
        torch.save(models[-1].state_dict(), f"{seed}.pt")
    outcome = losscli(
        *("interpolate", "0.pt", "1.pt", "-m", "mlp:3072-4-10", "--points", 3, "--range", 0, 1),
        *("-d", "cifar10:data,mean=0.5-0.4-0.3,std=0.2", "--no-figure", "-o", "-"),
        *("--dtype", "float64"),
    )
    assert outcome.status == 0, outcome.stderr
    header, *rows = (line.split(",") for line in outcome.stdout.splitlines())
    found = {
        (float(row[0]), row[1]): float(row[header.index("loss")]) for row in rows if len(row) > 1
    }
    mean = torch.tensor([0.5, 0.4, 0.3], dtype=torch.float64).view(3, 1, 1)
    x = (torch.from_numpy(IMAGES["test"]).double() / 255 - mean) / 0.2
    for alpha in (0, 1):
        with torch.no_grad():
            outputs = models[alpha].double()(x)
        loss = cross_entropy(outputs, torch.from_numpy(CLASSES["test"])).item()
        assert found[alpha, "test"] == pytest.approx(loss, rel=1e-12)


# Refusals


class Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def break_binary(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_binary10(folder)
        path = folder / "data_batch_3.bin"
        path.write_bytes(change(path.read_bytes()))

    return write


def break_python(**change: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        batch = {"data": IMAGES["1"].reshape(N, -1), "labels": CLASSES["1"].tolist(), **change}
        (folder / "test_batch").write_bytes(
            pickle.dumps({k: v for k, v in batch.items() if v is not None}, 2)
        )

    return write


def write_short_array(folder: Path) -> None:
    whole = python2({"data": IMAGES["1"].reshape(N, -1), "labels": [1] * N})
    shape = _python2((N, 3072))
    assert whole.count(shape) == 1
    (folder / "test_batch").write_bytes(whole.replace(shape, _python2((1 << 30, 3072))))


def write_archive(folder: Path) -> None:
    write_binary10(folder)
    with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as archive:
        for path in folder.glob("*.bin"):
            archive.add(path, path.name)
            path.unlink()


def hostile(call: Call) -> Callable[[Path], None]:
    return break_python(meta=call)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "os.system": (hostile(Call(os.system, "touch canary")), "posix.system"),
    "eval": (hostile(Call(eval, "open('canary', 'w')")), "__builtin__.eval"),
    "numpy.load": (hostile(Call(np.load, "x")), "numpy.load"),
    "objects": (break_python(data=np.array([Call(os.system, "touch canary")])), "posix.system"),
    "cut off": (
        break_binary(lambda b: b[:-1]),
        "data_batch_3.bin: 21510 bytes are not a multiple",
    ),
    "empty": (break_binary(lambda _: b""), "data_batch_3.bin is empty"),
    "labels": (break_binary(lambda b: b"\x0b" + b[1:]), "for 10 classes"),
    "pickle cut off": (
        lambda folder: (
            (folder / "data_batch_1").write_bytes(python2({"data": IMAGES["1"]})[:-99]) and None
        ),
        "data_batch_1 is not a complete pickle",
    ),
    "no pickle": (lambda f: (f / "data_batch_1").write_bytes(b"hello"), "not a complete pickle"),
    "shape": (break_python(data=IMAGES["1"]), "not uint8 [N, 3072]"),
    "type": (break_python(data=np.zeros((N, 3072), np.int64)), "data are int64"),
    "floats": (break_python(data=np.zeros((N, 3072))), "an array is of the type 'f8'"),
    "no data": (break_python(data=None), "it has no 'data'"),
    "no labels": (break_python(labels=None), "it has no 'labels'"),
    "few labels": (break_python(labels=[1]), "labels are int64 [1] for 7 images"),
    "text labels": (break_python(labels=["cat"] * N), "not a list of integers"),
    "large labels": (break_python(labels=[1 << 70] * N), "not a batch of CIFAR"),
    "a terabyte": (write_short_array, "bytes for an array uint8 [1073741824, 3072]"),
    "negative": (break_python(labels=[-1] * N), "labels from -1 to -1"),
    "archive": (write_archive, "tar -xzf cifar-10-binary.tar.gz"),
    "nothing": (lambda _: None, "contains none of data_batch_1.bin"),
    "a list": (
        lambda f: (f / "test_batch").write_bytes(pickle.dumps([1, 2])),
        "it has no 'data'",
    ),
}


@pytest.mark.parametrize(("write", "expected"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_and_hostile_files_are_reported_in_one_line(
    write: Callable[[Path], object], expected: str, losscli: Losscli, folder: Path
) -> None:
    (folder / "cifar").mkdir()
    write(folder / "cifar")
    before = set(folder.iterdir())
    outcome = losscli("interpolate", "a.pt", "b.pt", "-d", "cifar10:cifar")
    assert outcome.status == 1
    assert expected in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert set(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("spec", "status", "expected"),
    [
        ("cifar10:nowhere", 1, "there is no folder nowhere"),
        ("cifar10:data.npz", 1, "data.npz is not a folder of CIFAR's files"),
        ("cifar100:.,labels=superfine", 2, "labels=fine or labels=coarse"),
        ("cifar10:.,labels=fine", 2, "unexpected keyword argument 'labels'"),
        ("cifar100", 2, "names no file"),
    ],
)
def test_specs_that_name_no_data_are_refused(
    spec: str, status: int, expected: str, losscli: Losscli, folder: Path
) -> None:
    before = set(folder.iterdir())
    outcome = losscli("interpolate", "a.pt", "b.pt", "-d", spec)
    assert outcome.status == status
    assert expected in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert set(folder.iterdir()) == before
