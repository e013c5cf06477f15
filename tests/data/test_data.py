"""Data sets from files and from code: the right numbers, and nothing half understood."""

from __future__ import annotations

import gzip
import os
import pickle
import random
import sys
import zipfile
from collections import UserDict, namedtuple
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
)

from losscli.data import DATASETS, DataSet, Split, from_object, leaves, load, map_nest
from losscli.data.batch import RaggedError
from losscli.errors import DataError, SpecError, UntrustedCodeError, UsageError
from tests.conftest import SAFETENSORS_HAS_COMPLEX

N = 13


def numbers(n: int = N, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.rand(n, *(shape or (4,)), generator=generator)


X, Y = numbers(), torch.arange(N) % 3
PAIRS = {
    "train_inputs": numbers(7, 2, 3),
    "train_targets": torch.arange(7),
    "dev_set_inputs": numbers(3, 2, 3),
    "dev_set_targets": torch.arange(3),
}


def only(data: DataSet) -> Split:
    (split,) = data.splits.values()
    return split


def tensor(inputs: Any) -> Tensor:
    assert isinstance(inputs, Tensor)
    return inputs


def refusal(make: Callable[[], Any], error: type[Exception] = DataError) -> str:
    with pytest.raises(error) as caught:
        make()
    assert type(caught.value) in {error, RaggedError}
    assert "\n" not in str(caught.value)
    return str(caught.value)


def savez(path: Path, **arrays: Any) -> Path:
    np.savez(path, **{key: np.asarray(array) for key, array in arrays.items()})
    return path


# Files


def test_the_registry_names_the_kinds_of_files() -> None:
    entries = "safetensors npz mnist cifar10 cifar100 imagefolder text hf"
    assert list(DATASETS) == entries.split()


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_a_file_of_arrays_is_read_split_by_split(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "data, with a comma"
    if kind == "npz":
        with path.open("wb") as file:
            np.savez(file, **{key: t.numpy() for key, t in PAIRS.items()})
    else:
        save_file(PAIRS, path)
    data = load(f'"{kind}:{path}"', trusted=False)
    assert list(data.splits) == ["train", "dev_set"]
    assert data.task == "classification"
    for name, split in data.splits.items():
        assert torch.equal(tensor(split.inputs), PAIRS[f"{name}_inputs"])
        assert torch.equal(split.targets, PAIRS[f"{name}_targets"])
        assert len(split) == len(PAIRS[f"{name}_targets"])


def test_a_file_with_one_pair_is_the_split_data(tmp_path: Path) -> None:
    savez(tmp_path / "a.npz", targets=Y, inputs=X)
    data = load(f"npz:{tmp_path}/a.npz", trusted=False)
    assert list(data.splits) == ["data"]
    assert torch.equal(tensor(data.splits["data"].inputs), X)


def test_the_training_split_is_first_in_any_order_of_the_file(tmp_path: Path) -> None:
    arrays = {
        f"{split}_{part}": values
        for split in ("a", "test", "train", "x")
        for part, values in (("inputs", X), ("targets", Y))
    }
    save_file({key: value.clone() for key, value in arrays.items()}, tmp_path / "a.safetensors")
    data = load(f"safetensors:{tmp_path}/a.safetensors", trusted=False)
    assert next(iter(data.splits)) == "train"
    assert set(data.splits) == {"a", "test", "train", "x"}


@pytest.mark.parametrize(
    ("targets", "task", "dtype"),
    [
        (Y.numpy().astype(np.uint8), "classification", torch.int64),
        (Y.numpy().astype(np.int16), "classification", torch.int64),
        (Y.numpy().astype(np.uint32), "classification", torch.int64),
        (Y.numpy() > 0, "classification", torch.int64),
        (Y.numpy().astype(">i4"), "classification", torch.int64),
        (Y.numpy().astype(np.float16), "regression", torch.float16),
        (Y.numpy().astype(np.float64), "regression", torch.float64),
        (Y.numpy().astype(">f4"), "regression", torch.float32),
    ],
    ids=lambda value: str(getattr(value, "dtype", value)),
)
def test_whole_number_targets_are_classes_and_others_are_to_be_regressed(
    targets: np.ndarray, task: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    savez(tmp_path / "a.npz", inputs=X, targets=targets)
    data = load(f"npz:{tmp_path}/a.npz", trusted=False)
    assert data.task == task
    assert only(data).targets.dtype == dtype
    assert only(data).targets.tolist() == targets.tolist()


def test_relative_names_are_relative_to_the_folder_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    savez(tmp_path / "there" / "a.npz", inputs=X, targets=Y)
    monkeypatch.chdir(tmp_path)
    assert len(only(load("npz:there/a.npz", trusted=False))) == N
    assert len(only(load("npz:a.npz", trusted=False, folder=tmp_path / "there"))) == N
    absolute = f"npz:{tmp_path}/there/a.npz"
    assert len(only(load(absolute, trusted=False, folder=Path("/nowhere")))) == N
    message = refusal(lambda: load("npz:a.npz", trusted=False))
    assert message == f"there is no data file a.npz. Relative paths start at {tmp_path}"


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"train_inputs": X}, "the split 'train' has only inputs. Add train_targets"),
        ({"targets": Y}, "the split 'data' has only targets. Add inputs"),
        ({"inputs": X, "targets": Y, "weights": X}, "the array 'weights' is not recognised. Name"),
        ({"train_x": X, "train_y": Y}, "the array 'train_x' is not recognised. Name the arrays"),
        ({"inputs": X, "targets": Y[:5]}, "split 'data': 13 inputs for 5 targets. Give one target"),
        ({"inputs": torch.tensor(1.0), "targets": Y}, "a scalar is not a batch of examples"),
        ({"inputs": X[:0], "targets": Y[:0]}, "split 'data' is empty"),
        ({}, "is empty. Give it arrays inputs and targets"),
        (
            {"a_inputs": X, "a_targets": Y, "b_inputs": X + 1, "b_targets": Y / 2},
            "some splits have whole-number targets and some do not. Give all of them",
        ),
        ({"inputs": X * 1j, "targets": Y}, "'inputs' is a .*, not a dense tensor of real numbers"),
    ],
    ids=range(10),
)
def test_arrays_without_splits_are_reported(
    kind: str, arrays: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "a"
    if kind == "npz":
        with path.open("wb") as file:
            np.savez(file, **{key: t.numpy() for key, t in arrays.items()})
    else:
        if any(t.is_complex() for t in arrays.values()) and not SAFETENSORS_HAS_COMPLEX:
            pytest.skip("this version of safetensors has no complex numbers")
        save_file({key: t.clone() for key, t in arrays.items()}, path)
    with pytest.raises(DataError, match=message.replace("(", r"\(")) as caught:
        load(f"{kind}:{path}", trusted=False)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_a_file_that_was_cut_off_or_is_another_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    with path.open("wb") as file:
        np.savez_compressed(file, inputs=X.numpy(), targets=Y.numpy())
    if kind == "safetensors":
        save_file({"inputs": X, "targets": Y}, path)
    content = path.read_bytes()
    assert len(only(load(f"{kind}:{path}", trusted=False))) == N
    broken = [content[:cut] for cut in range(0, len(content) - 1, len(content) // 20)]
    broken += [b"hello", bytes(200), random.Random(0).randbytes(500), b"\x89PNG\r\n\x1a\n" * 9]
    broken += [b"\x93NUMPY" + bytes(100), b"PK\x03\x04" + bytes(100)]
    what = {"npz": "not a NumPy archive of numbers", "safetensors": "not a valid safetensors file"}[
        kind
    ]
    cure = {
        "npz": "Write it with numpy.savez",
        "safetensors": "It may be incomplete: save or copy it again",
    }[kind]
    for other in broken:
        path.write_bytes(other)
        message = refusal(lambda: load(f"{kind}:{path}", trusted=False))
        assert message.startswith(f"{path} is {what}: ")
        assert cure in message
        assert "allow_pickle" not in message


def test_a_damaged_archive_is_refused_for_any_error_of_its_reader(tmp_path: Path) -> None:
    path = savez(tmp_path / "a.npz", inputs=X, targets=Y)
    content = path.read_bytes()
    generator = random.Random(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        damaged[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            load(f"npz:{path}", trusted=False)
        except DataError as error:
            refused += str(path) in str(error)
    # A zip archive has a checksum over each array: hardly any damage passes.
    assert refused > 100


def test_different_counts_are_reported_before_an_archive_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data.npz"
    np.savez_compressed(path, inputs=np.zeros(50_000, np.uint8), targets=np.arange(6))
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("it is unpacked"))
    message = refusal(lambda: load(f"npz:{path}", trusted=False))
    assert message == (
        f"{path}, split 'data': 50000 inputs for 6 targets. Give one target per example"
    )


def test_a_class_beyond_64_bits_is_reported_unchanged(tmp_path: Path) -> None:
    savez(tmp_path / "data.npz", inputs=X, targets=np.full(len(X), 2**63, np.uint64))
    message = refusal(lambda: load(f"npz:{tmp_path / 'data.npz'}", trusted=False))
    assert message.endswith(
        "the target 9223372036854775808 is above 2^63 - 1. Number classes from 0"
    )


@pytest.mark.parametrize("kind", ["npz", "safetensors", "text"])
def test_a_pipe_does_not_block(kind: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        message = refusal(partial(load, f"{kind}:{path}", trusted=False))
        assert message.startswith(f"{path} is not a regular file. Name a")


@pytest.mark.parametrize("kind", ["mnist", "cifar10", "cifar100"])
def test_pipes_in_a_folder_do_not_block(kind: str, tmp_path: Path) -> None:
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "data_batch_1", "train.bin"):
        os.mkfifo(tmp_path / name)
    message = refusal(lambda: load(f"{kind}:{tmp_path}", trusted=False))
    assert message.startswith(f"{tmp_path} contains no")


def test_a_single_array_is_not_an_archive(tmp_path: Path) -> None:
    with (tmp_path / "a.npz").open("wb") as file:
        np.save(file, X.numpy())
    message = refusal(lambda: load(f"npz:{tmp_path}/a.npz", trusted=False))
    assert "is not a NumPy archive of numbers: ValueError: not a complete zip archive" in message


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.marker}'",)


def test_an_array_with_a_pickle_in_it_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "it ran"
    objects = np.array([Evil(marker)] * 3, dtype=object)
    for inputs, targets in ((objects, np.arange(3)), (np.zeros(3), objects)):
        path = savez(tmp_path / "a.npz", inputs=inputs, targets=targets)
        message = refusal(partial(load, f"npz:{path}", trusted=False))
        assert message.endswith("Write it with numpy.savez, with arrays of numbers only")
    # The archive itself replaced by a pickle.
    with (tmp_path / "b.npz").open("wb") as file:
        np.save(file, objects, allow_pickle=True)
    (tmp_path / "c.npz").write_bytes(pickle.dumps(Evil(marker)))
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.write(tmp_path / "c.npz", "inputs.npy")
    for name, reason in (
        ("b", "not a complete zip archive"),
        ("c", "not a complete zip archive"),
        ("d", "is a bytes, not"),
    ):
        assert reason in refusal(partial(load, f"npz:{tmp_path}/{name}.npz", trusted=False))
    assert not marker.exists()
    np.load(tmp_path / "a.npz", allow_pickle=True)["targets"]
    assert marker.exists()


@pytest.mark.parametrize("array", [["a", "b"], [1 + 2j, 3], [np.datetime64("2024-01-01")] * 2])
def test_arrays_of_anything_but_numbers_are_refused(array: list[Any], tmp_path: Path) -> None:
    path = savez(tmp_path / "a.npz", inputs=array, targets=[0, 1])
    message = refusal(lambda: load(f"npz:{path}", trusted=False))
    assert message.startswith(f"{path}: 'inputs' is a ndarray, not a dense tensor of real numbers.")


# IDX files


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


IMAGES = np.random.default_rng(0).integers(0, 256, (6, 5, 4))
LABELS = np.array([3, 1, 4, 1, 5, 9])


def mnist(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("style", ["-", "."])
@pytest.mark.parametrize("prefixes", [("train", "t10k"), ("train",), ("t10k",)])
def test_a_folder_of_idx_files_is_read(
    prefixes: tuple[str, ...], style: str, suffix: str, tmp_path: Path
) -> None:
    files = {}
    for i, prefix in enumerate(prefixes):
        files[f"{prefix}-images{style}idx3-ubyte{suffix}"] = idx(IMAGES[i:])
        files[f"{prefix}-labels{style}idx1-ubyte{suffix}"] = idx(LABELS[i:])
    data = load(f"mnist:{mnist(tmp_path / 'm', files)}", trusted=False)
    names = {"train": "train", "t10k": "test"}
    assert list(data.splits) == [names[prefix] for prefix in prefixes]
    assert data.task == "classification"
    for i, split in enumerate(data.splits.values()):
        images = tensor(split.inputs)
        assert images.dtype == torch.uint8
        assert images.shape == (6 - i, 1, 5, 4)
        assert np.array_equal(images[:, 0], IMAGES[i:])
        assert split.targets.tolist() == LABELS[i:].tolist()


def test_a_file_that_is_unpacked_already_is_read_under_its_packed_name(tmp_path: Path) -> None:
    folder = mnist(tmp_path / "m", {})
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(idx(IMAGES))
    (folder / "t10k-labels-idx1-ubyte").write_bytes(gzip.compress(idx(LABELS)))
    assert len(only(load(f"mnist:{folder}", trusted=False))) == 6


GOOD = {"t10k-images-idx3-ubyte": idx(IMAGES), "t10k-labels-idx1-ubyte": idx(LABELS)}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "contains no IDX files such as t10k-images-idx3-ubyte.gz. Name the folder of the IDX"),
        ({"images": idx(IMAGES)}, "contains no IDX files"),
        (
            {"train-images-idx3-ubyte": idx(IMAGES)},
            "the split 'train' has only images. Add train-labels-idx1-ubyte, or its .gz",
        ),
        (
            {**GOOD, "train-labels-idx1-ubyte.gz": idx(LABELS)},
            "the split 'train' has only labels. Add train-images-idx3-ubyte",
        ),
        (
            {**GOOD, "t10k-images-idx3-ubyte": idx(LABELS)},
            "t10k-images-idx3-ubyte is not an IDX file of bytes in 3 dimensions. It may be",
        ),
        (
            {**GOOD, "t10k-labels-idx1-ubyte": idx(IMAGES)},
            "is not an IDX file of bytes in 1 dimensions",
        ),
        ({**GOOD, "t10k-labels-idx1-ubyte": b"hello world"}, "is not an IDX file"),
        ({**GOOD, "t10k-labels-idx1-ubyte": b""}, "is not an IDX file"),
        ({**GOOD, "t10k-labels-idx1-ubyte": b"\0\0\x08"}, "is not an IDX file"),
        ({**GOOD, "t10k-labels-idx1-ubyte": b"\0\0\x0d\1" + bytes(8)}, "is not an IDX file"),
        ({**GOOD, "t10k-labels-idx1-ubyte": b"\0\0\x08\1"}, "0 values for the shape"),
        ({**GOOD, "t10k-labels-idx1-ubyte": b"\0\0\x08\1\0\0"}, "0 values for the shape"),
        (
            {**GOOD, "t10k-labels-idx1-ubyte": idx(LABELS)[:-1]},
            "5 values for the shape [6]. The download",
        ),
        ({**GOOD, "t10k-labels-idx1-ubyte": idx(LABELS) + b"\0"}, "7 values for the shape [6]"),
        (
            {**GOOD, "t10k-images-idx3-ubyte": idx(IMAGES)[:-60]},
            "60 values for the shape [6, 5, 4]",
        ),
        ({**GOOD, "t10k-labels-idx1-ubyte": idx(LABELS[:4])}, "6 inputs for 4 targets"),
        (
            {"t10k-images-idx3-ubyte": idx(IMAGES[:0]), "t10k-labels-idx1-ubyte": idx(LABELS[:0])},
            "split 'test' is empty",
        ),
    ],
    ids=range(17),
)
def test_idx_files_that_do_not_belong_together_are_reported(
    files: dict[str, bytes], message: str, tmp_path: Path
) -> None:
    folder = mnist(tmp_path / "m", files)
    found = refusal(lambda: load(f"mnist:{folder}", trusted=False))
    assert message in found
    assert str(folder) in found


def test_a_packed_file_that_was_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    folder = mnist(tmp_path / "m", {name: GOOD[name] for name in GOOD if "images" in name})
    packed = gzip.compress(idx(LABELS))
    damaged = packed[:-6] + bytes([packed[-6] ^ 1]) + packed[-5:]
    for content in [*(packed[:cut] for cut in range(2, len(packed))), damaged]:
        (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(content)
        message = refusal(lambda: load(f"mnist:{folder}", trusted=False))
        assert "t10k-labels-idx1-ubyte.gz cannot be read: " in message
        assert message.endswith("The download may be incomplete: download it again")


def test_a_path_that_is_not_a_folder_is_reported(tmp_path: Path) -> None:
    message = refusal(lambda: load(f"mnist:{tmp_path}/absent", trusted=False))
    assert message == f"there is no folder {tmp_path}/absent. Name the folder of the IDX files"


# The keys of a spec


@pytest.fixture
def file(tmp_path: Path) -> str:
    """A file of 40 images with three channels, as a spec."""
    images = np.random.default_rng(1).integers(0, 256, (40, 3, 2, 2), dtype=np.uint8)
    return f"npz:{savez(tmp_path / 'a.npz', inputs=images, targets=np.arange(40))}"


def prepared(spec: str, dtype: torch.dtype = torch.float64) -> np.ndarray:
    data = load(spec, trusted=False)
    split = only(data)
    before = tensor(split.inputs).clone()
    found = tensor(data.prepare(split.inputs, dtype))
    assert torch.equal(tensor(split.inputs), before)
    assert found.dtype == dtype
    return found.double().numpy()


def stored(spec: str) -> np.ndarray:
    return tensor(only(load(spec, trusted=False)).inputs).numpy()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_images_stay_bytes_and_are_scaled_to_one_as_they_are_used(
    file: str, dtype: torch.dtype
) -> None:
    assert stored(file).dtype == np.uint8
    expected = torch.from_numpy(stored(file) / 255).to(dtype).double().numpy()
    assert np.array_equal(prepared(file, dtype), expected)


@pytest.mark.parametrize(
    ("keys", "mean", "std"),
    [
        ("mean=0.5", [0.5] * 3, [1] * 3),
        ("mean=-0.5", [-0.5] * 3, [1] * 3),
        ("std=0.25", [0] * 3, [0.25] * 3),
        (
            "mean=0.4914-0.4822-0.4465,std=0.247-0.2435-2",
            [0.4914, 0.4822, 0.4465],
            [0.247, 0.2435, 2],
        ),
        ("mean=0,std=1-2-4", [0] * 3, [1, 2, 4]),
    ],
)
def test_mean_and_std_apply_to_each_channel_after_scaling(
    file: str, keys: str, mean: list[float], std: list[float]
) -> None:
    expected = np.stack(
        [(stored(file)[:, c] / 255 - mean[c]) / std[c] for c in range(3)],
        axis=1,
    )
    np.testing.assert_allclose(prepared(f"{file},{keys}"), expected, rtol=1e-14, atol=1e-15)
    flat = prepared(f"{file},{keys},flatten=true")
    np.testing.assert_allclose(flat, expected.reshape(40, 12), rtol=1e-14, atol=1e-15)


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.mark.parametrize(
    ("keys", "mean", "std"),
    [
        ("mean=imagenet", IMAGENET["mean"], IMAGENET["std"]),
        ("std=imagenet", None, IMAGENET["std"]),
        ("mean=imagenet,std=imagenet", IMAGENET["mean"], IMAGENET["std"]),
        ("mean=imagenet,std=0.5", IMAGENET["mean"], (0.5,)),
        ("std=imagenet,mean=0.5", (0.5,), IMAGENET["std"]),
    ],
)
def test_the_statistics_of_imagenet_go_by_its_name(
    file: str, keys: str, mean: tuple[float, ...] | None, std: tuple[float, ...]
) -> None:
    data = load(f"{file},{keys}", trusted=False)
    assert (data.mean, data.std) == (mean, std)


def test_the_statistics_of_imagenet_are_for_three_channels(tmp_path: Path) -> None:
    path = savez(tmp_path / "a.npz", inputs=np.zeros((5, 1, 2, 2), np.uint8), targets=np.arange(5))
    message = refusal(lambda: load(f"npz:{path},mean=imagenet", trusted=False))
    assert "3 values of mean or std for 1 channels" in message


def test_columns_of_a_table_are_its_channels(tmp_path: Path) -> None:
    path = savez(tmp_path / "a.npz", inputs=X, targets=Y)
    found = prepared(f"npz:{path},mean=1-2-3-4,std=5")
    np.testing.assert_allclose(found, (X.double().numpy() - [1, 2, 3, 4]) / 5, rtol=1e-14)
    path = savez(tmp_path / "b.npz", inputs=X[:, 0], targets=Y)
    found = prepared(f"npz:{path},mean=1,std=5")
    np.testing.assert_allclose(found, (X[:, 0].double().numpy() - 1) / 5, rtol=1e-14)


def test_flatten_false_differs_from_flatten_true(file: str) -> None:
    assert prepared(f"{file},flatten=true").shape == (40, 12)
    assert prepared(f"{file},flatten=false").shape == prepared(file).shape == (40, 3, 2, 2)


def test_whole_numbers_and_masks_are_neither_scaled_nor_normalised() -> None:
    tokens, mask = torch.arange(6).reshape(2, 3), torch.tensor([[True], [False]])
    pixels = torch.tensor([[[255]], [[0]]], dtype=torch.uint8)
    split = Split((tokens, mask, pixels), Y[:2])
    data = DataSet({"s": split}, scale=True, mean=(0.5,), flatten=True)
    found = leaves(data.prepare(only(data).inputs, torch.float32))
    assert found[0] is tokens
    assert found[1] is mask
    assert found[2].tolist() == [[0.5], [-0.5]]


def test_a_limit_draws_with_the_seed_and_keeps_the_order(file: str) -> None:
    def drawn(spec: str, seed: int) -> list[int]:
        data = load(spec, trusted=False, seed=seed)
        images = tensor(only(data).inputs)
        targets = only(data).targets.tolist()
        assert np.array_equal(images, stored(file)[targets])
        return targets

    some = drawn(f"{file},limit=9", 0)
    assert len(set(some)) == 9
    assert some == sorted(some)
    assert some != list(range(9))
    assert some == drawn(f"{file},limit=9", 0)
    assert some != drawn(f"{file},limit=9", 1)
    for limit in (40, 41, 1000):
        assert drawn(f"{file},limit={limit}", 0) == list(range(40))
    # An option draws as the key does.
    again = load(file, trusted=False).select([], 9, 0)
    assert only(again).targets.tolist() == some


def test_splits_are_selected_by_name_each_with_its_own_limit() -> None:
    data = from_object({"a": (X, Y), "b": (X[:5], Y[:5]), "c": (X, Y)}, "data")
    assert list(data.select([], None, 0).splits) == ["a", "b", "c"]
    assert list(data.select(["c", "a", "c"], None, 0).splits) == ["c", "a"]
    assert {k: len(s) for k, s in data.select([], 7, 0).splits.items()} == {"a": 7, "b": 5, "c": 7}
    message = refusal(lambda: data.select(["train"], None, 0), UsageError)
    assert message == "the data has no split 'train'. It has a, b, c"
    for limit in (0, -1):
        message = refusal(partial(data.select, [], limit, 0), UsageError)
        assert message == f"a limit of {limit} leaves no examples. Give 1 or more"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("mean=x", "mean=x is not a number per channel. Write mean=0.5-0.4-0.5"),
        ("mean=true", "mean=True is not a number per channel"),
        ("std=0", "std=0 is not above 0. Write std=0.5"),
        ("std=0.5-0-1", "std=[0.5, 0.0, 1.0] is not above 0"),
        ("std=-1", "std=-1 is not above 0"),
        ("std=inf", "std=inf is not above 0"),
        ("std=nan", "std=nan is not above 0"),
        ("mean=nan", "mean=nan is not finite. Write mean=0.5"),
        ("flatten=False", "flatten=False must be true or false. Write flatten=true"),
        ("flatten=1", "flatten=1 must be true or false"),
        ("limit=0", "limit=0 is not a number of examples. Give 1 or more"),
        ("limit=-3", "limit=-3 is not a number of examples"),
        ("limit=1.5", "limit=1.5 is not a number of examples"),
        ("limit=true", "limit=True is not a number of examples"),
        ("limit=all", "limit=all is not a number of examples"),
        ("colour=3", "keyword argument 'colour'. It takes scale, mean, std, flatten, limit"),
    ],
)
def test_a_wrong_key_is_a_usage_error(file: str, keys: str, message: str) -> None:
    found = refusal(lambda: load(f"{file},{keys}", trusted=False), SpecError)
    assert message in found
    assert found.startswith(f"data '{file},{keys}': ")


def test_values_for_another_number_of_channels_are_reported(file: str) -> None:
    message = refusal(lambda: load(f"{file},mean=0.1-0.2", trusted=False))
    assert "2 values of mean or std for 3 channels. Give one value, or one per channel" in message
    # What is not scaled has no channels.
    data = {"s": ({"image": numbers(5, 3, 2, 2), "tokens": torch.zeros(5, 7).long()}, Y[:5])}
    assert list(from_object(data, "d").splits) == ["s"]


def test_a_spec_without_a_file_or_with_an_unknown_name_says_what_to_write() -> None:
    for spec in ("npz", "npz:"):
        message = refusal(partial(load, spec, trusted=False), SpecError)
        assert message == f"data {spec!r} names no file. Write npz:PATH"
    message = refusal(lambda: load("mnits:x", trusted=False), SpecError)
    assert message.startswith("unknown data 'mnits'. Did you mean 'mnist'?")


# Code


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a file of code and names it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(code: str) -> str:
        (tmp_path / "datasets_user.py").write_text(
            "import torch\nfrom torch.utils.data import DataLoader, TensorDataset\n"
            "from losscli.data import DataSet, Split\n"
            f"X = torch.arange(24.).reshape(12, 2)\nY = torch.arange(12)\n{code}\n"
        )
        return f"{tmp_path}/datasets_user.py"

    return write


def test_code_gives_splits_and_takes_its_argument_and_keys(module: Callable[[str], str]) -> None:
    spec = module("def f(name='all', *, start=0): return {name: (X[start:], Y[start:])}")
    for text, name, count in ((":f", "all", 12), (":f:half", "half", 12), (":f,start=4", "all", 8)):
        data = load(spec + text, trusted=True)
        assert {key: len(split) for key, split in data.splits.items()} == {name: count}
    data = load(f"{spec}:f,mean=1-2,limit=3", trusted=True)
    assert data.mean == (1, 2)
    assert len(only(data)) == 3
    message = refusal(lambda: load(f"{spec}:f,begin=4", trusted=True), SpecError)
    assert "It takes name, start, mean, std, flatten, limit" in message
    assert "code is run only" in refusal(
        lambda: load(f"{spec}:f", trusted=False), UntrustedCodeError
    )


def test_normalisation_given_by_code_applies_unless_the_spec_has_its_own(
    module: Callable[[str], str],
) -> None:
    spec = module("def f(): return DataSet({'s': Split(X, Y)}, mean=(1., 2.), flatten=True)")
    data = load(f"{spec}:f", trusted=True)
    assert (data.mean, data.std, data.flatten) == ((1, 2), None, True)
    data = load(f"{spec}:f,mean=3,std=4,flatten=false", trusted=True)
    assert (data.mean, data.std, data.flatten) == ((3,), (4,), False)


def test_a_shuffling_loader_gives_the_same_order_for_the_same_seed(
    module: Callable[[str], str],
) -> None:
    spec = module("def f(): return DataLoader(TensorDataset(X, Y), batch_size=5, shuffle=True)")

    def order(seed: int) -> list[int]:
        split = only(load(f"{spec}:f", trusted=True, seed=seed))
        assert torch.equal(tensor(split.inputs)[:, 0], 2.0 * split.targets)
        return split.targets.tolist()

    assert sorted(order(0)) == list(range(12))
    assert order(0) == order(0) != list(range(12))
    assert order(0) != order(1)


def test_an_error_in_code_names_its_spec(module: Callable[[str], str]) -> None:
    spec = module(
        "def f(): raise RuntimeError('no disk\\nno data')\n"
        "def g():\n    def rows():\n        yield X, Y\n        1 / 0\n"
        "    class Rows(torch.utils.data.IterableDataset):\n"
        "        def __iter__(self): return rows()\n"
        "    return DataLoader(Rows(), batch_size=None)"
    )
    message = refusal(lambda: load(f"{spec}:f", trusted=True))
    assert message == f"data '{spec}:f' failed: RuntimeError: no disk no data"
    message = refusal(lambda: load(f"{spec}:g", trusted=True))
    assert message.endswith(
        "split 'data' failed after 12 examples: ZeroDivisionError: division by zero"
    )


class Rows(IterableDataset[Any]):
    """Whole batches, or single examples, as they come."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


class Examples(Dataset[Any]):
    def __init__(self, row: Callable[[int], Any], count: int = N) -> None:
        self.row, self.count = row, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Any:
        return self.row(i)


class Endless(Dataset[Any]):
    def __getitem__(self, i: int) -> Any:
        return X[0], 0


def batches(*rows: Any) -> DataLoader[Any]:
    return DataLoader(Rows(list(rows)), batch_size=None)


Named = namedtuple("Named", ["image", "label"])  # noqa: PYI024

SAME = {
    "a pair": {"data": (X, Y)},
    "a list of two": {"data": [X, Y]},
    "NumPy arrays": {"data": (X.numpy(), Y.numpy())},
    "a mapping of batches": {"data": {"image": X, "labels": Y}},
    "a loader": DataLoader(TensorDataset(X, Y), batch_size=5),
    "a loader under a name": {"data": DataLoader(TensorDataset(X, Y), batch_size=N)},
    "a loader of dictionaries": DataLoader(Examples(lambda i: {"x": X[i], "y": Y[i]}), 4),
    "a loader of named tuples": DataLoader(Examples(lambda i: Named(X[i], Y[i])), 4),
    "a loader with workers' ways": DataLoader(Examples(lambda i: (X[i], int(Y[i]))), 4),
    "a data set": TensorDataset(X, Y),
    "a data set of NumPy rows": Examples(lambda i: (X[i].numpy(), Y[i].numpy())),
    "an endless stream that ends": Rows([(X[i], Y[i]) for i in range(N)]),
    "batches as they come": batches((X[:5], Y[:5]), (X[5:], Y[5:])),
    "a mapping of another class": UserDict(data=(X, Y)),
}


@pytest.mark.parametrize("form", SAME)
def test_every_form_gives_the_same_examples_down_to_a_ragged_last_batch(form: str) -> None:
    data = from_object(SAME[form], "here")
    assert list(data.splits) == ["data"]
    split = data.splits["data"]
    assert isinstance(split, Split)
    (inputs,) = leaves(split.inputs)
    assert torch.equal(inputs, X)
    assert torch.equal(split.targets, Y)


@pytest.mark.parametrize("number", [1, 2, 3, N])
def test_a_list_of_examples_names_the_loader_that_joins_them(number: int) -> None:
    rows = range(number)
    forms: list[Any] = [
        [(X[i], int(Y[i])) for i in rows],
        tuple([X[i], Y[i]] for i in rows),
        [{"x": X[i], "y": Y[i]} for i in rows],
    ]
    for examples in forms:
        for given, where in ((examples, "here"), ({"s": examples}, "here, split 's'")):
            said = refusal(partial(from_object, given, "here"))
            kind = type(examples).__name__
            # A tuple of two is a split: inputs and targets.
            if where != "here" and kind == "tuple" and number == 2:
                assert "is a plain" not in said
                continue
            assert said.startswith(
                f"{where} is a plain {kind}. Give torch.utils.data.DataLoader(it"
            )
        split = only(from_object({"s": DataLoader(list(examples), batch_size=64)}, "here"))
        (inputs,) = leaves(split.inputs)
        assert torch.equal(inputs, X[:number])


@pytest.mark.parametrize("key", ["targets", "target", "labels", "label", "y"])
def test_the_targets_are_known_by_their_key(key: str) -> None:
    split = only(from_object({"s": {key: Y, "anything": X}}, "here"))
    assert isinstance(split.inputs, dict)
    assert list(split.inputs) == ["anything"]
    assert torch.equal(split.inputs["anything"], X)
    assert torch.equal(split.targets, Y)


def test_several_named_inputs_go_to_the_model_by_name() -> None:
    ids = torch.arange(N * 2).reshape(N, 2)
    forms = {
        "in one mapping": {"s": {"ids": ids, "y": Y, "x": X}},
        "in a pair": {"s": ({"ids": ids, "x": X}, Y)},
        "in batches": {
            "s": DataLoader(Examples(lambda i: {"ids": ids[i], "x": X[i], "y": Y[i]}), 4)
        },
        # The second batch has its keys in another order.
        "mixed up": {
            "s": batches(
                {"ids": ids[:5], "x": X[:5], "y": Y[:5]}, {"y": Y[5:], "x": X[5:], "ids": ids[5:]}
            )
        },
    }
    for form, given in forms.items():
        split = only(from_object(given, "here"))
        assert isinstance(split.inputs, dict), form
        assert list(split.inputs) == ["ids", "x"], form
        assert torch.equal(split.inputs["ids"], ids), form
        assert torch.equal(split.inputs["x"], X), form
        assert torch.equal(split.targets, Y), form


IDS = torch.arange(N * 4).reshape(N, 4) % 7

LANGUAGE = {
    "tensors": {"s": {"input_ids": IDS, "labels": IDS}},
    "a mask besides": {"s": {"input_ids": IDS, "attention_mask": IDS > 0, "labels": IDS}},
    "a loader": DataLoader(Examples(lambda i: {"input_ids": IDS[i], "labels": IDS[i]}), 4),
    "an iterable": Rows([{"input_ids": IDS[i], "labels": IDS[i]} for i in range(N)]),
}


@pytest.mark.parametrize("form", LANGUAGE)
def test_a_label_for_each_token_is_language(form: str) -> None:
    data = from_object(LANGUAGE[form], "here")
    assert data.task == "language"
    split = only(data)
    assert torch.equal(split.targets, IDS)
    assert torch.equal(leaves(split.inputs)[0], IDS)
    if form == "a mask besides":
        assert isinstance(split.inputs, dict)
        assert torch.equal(split.inputs["attention_mask"], IDS > 0)


@pytest.mark.parametrize(
    "content",
    [
        {"input_ids": IDS, "labels": Y},
        {"input_ids": IDS, "labels": IDS[:, 1:]},
        {"input_ids": IDS, "targets": IDS},
        {"tokens": IDS, "labels": IDS},
        {"input_ids": Y, "labels": Y},
        (IDS, IDS),
    ],
    ids=range(6),
)
def test_other_labels_are_classes(content: Any) -> None:
    assert from_object({"s": content}, "here").task == "classification"


def test_splits_of_language_and_of_classes_do_not_mix() -> None:
    ids = {"input_ids": IDS}
    given = {"a": {**ids, "labels": IDS}, "b": {**ids, "labels": Y}}
    message = refusal(lambda: from_object(given, "here"))
    assert "some splits have a label for each of their input_ids and some do not" in message


def test_several_inputs_in_a_tuple_go_to_the_model_by_position() -> None:
    ids = torch.arange(N)
    loader = DataLoader(Examples(lambda i: ((X[i], int(ids[i])), Y[i])), 4)
    for given in (((X, ids), Y), ([X, ids.numpy()], Y), loader):
        split = only(from_object({"s": given}, "here"))
        assert isinstance(split.inputs, tuple)
        assert torch.equal(split.inputs[0], X)
        assert torch.equal(split.inputs[1], ids)


def test_examples_are_taken_and_moved_in_every_structure() -> None:
    index = torch.tensor([3, 1])
    for inputs in (X, (X, Y), {"a": X, "b": Y}):
        split = Split(inputs, Y)
        some = split.take(index)
        assert len(some) == 2
        assert [t.tolist() for t in leaves(some.inputs)] == [
            t[[3, 1]].tolist() for t in leaves(inputs)
        ]
        assert type(split.to(torch.device("cpu")).inputs) is type(inputs)
        doubled = map_nest(lambda t: t * 2, inputs)
        assert all(
            torch.equal(d, 2 * t) for d, t in zip(leaves(doubled), leaves(inputs), strict=True)
        )


def test_arrays_that_torch_rejects_are_converted() -> None:
    forms = [
        X.numpy()[::-1],
        np.asfortranarray(X.numpy()),
        X.numpy().astype(">f4"),
        np.broadcast_to(X.numpy()[:1], (N, 4)),
        np.frombuffer(X.numpy().tobytes(), np.float32).reshape(N, 4),
    ]
    for array in forms:
        split = only(from_object({"s": (array, Y)}, "here"))
        assert tensor(split.inputs).numpy().tolist() == array.tolist()


def test_tensors_come_without_their_gradients() -> None:
    split = only(from_object({"s": (X.clone().requires_grad_(), Y)}, "here"))
    assert not tensor(split.inputs).requires_grad


BAD = {
    "nothing": (None, "is a NoneType, not a mapping from split names"),
    "a list": ([(X, Y)], "is a plain list. Give"),
    "a list of a tensor": ([X], "is a list, not a mapping"),
    "an empty mapping": ({}, "is empty, not a mapping"),
    "a bare pair": ((X, Y), 'Give {"train": (inputs, targets)}, for example'),
    "a function": (lambda: {"s": (X, Y)}, "is a function, not a mapping"),
    "a tensor": (
        {"s": X},
        "split 's': cannot interpret a Tensor as a batch; expected (inputs, targets). Give (inputs",
    ),
    "three": (
        {"s": (X, X, Y)},
        "3-element batch; expected (inputs, targets). Group several inputs as ((x1, x2), y)",
    ),
    "one": ({"s": (X,)}, "cannot interpret a 1-element batch; expected (inputs, targets). Give ("),
    "three in a batch": (
        TensorDataset(X, X, Y),
        "cannot interpret a 3-element batch; expected (inputs, targets). Group several inputs as",
    ),
    "four in examples": (Examples(lambda i: (X[i], X[i], X[i], Y[i])), "a 4-element batch; expect"),
    "text in a batch": (Examples(lambda i: (X[i], "cat")), "'targets' is a tuple, not a dense"),
    "text": ({"s": "a.npz"}, "cannot interpret a str as a batch; expected (inputs, targets)"),
    "lists of numbers": ({"s": (X.tolist(), Y.tolist())}, "'inputs' is a list, not a dense tensor"),
    "text among inputs": (
        {"s": {"y": Y, "x": X, "name": ["a"] * N}},
        "'name' is a list, not a dense tensor of real numbers. Give tensors or NumPy arrays",
    ),
    "no targets": ({"s": {"x": X, "z": Y}}, "a batch with the keys x, z has no key for its target"),
    "two targets": (
        {"s": {"x": X, "y": Y, "label": Y}},
        "the keys x, y, label has more than one key for its targets. Call them one of targets,",
    ),
    "targets alone": ({"s": {"y": Y}}, "a batch has targets and no inputs. Give (inputs, targets)"),
    "no inputs": ({"s": ((), Y)}, "a batch has targets and no inputs"),
    "complex": ({"s": (X * 1j, Y)}, "'inputs' is a Tensor, not a dense tensor of real numbers"),
    "sparse": ({"s": (X.to_sparse(), Y)}, "'inputs' is a Tensor, not a dense tensor"),
    "long doubles": ({"s": (X.numpy().astype(np.longdouble), Y)}, "'inputs' is a ndarray, not a"),
    "objects": ({"s": (np.array([{}] * N), Y)}, "'inputs' is a ndarray, not a dense tensor"),
    "a number": ({"s": (X, torch.tensor(3))}, "a scalar is not a batch of examples. Give"),
    "a number in an array": ({"s": (X, np.array(3))}, "a scalar is not a batch of examples"),
    "other counts": ({"s": (X, Y[:5])}, "split 's': 13 inputs for 5 targets. Give one target per"),
    "other counts of two": ({"s": ((X, X[:4]), Y)}, "13 and 4 inputs for 13 targets"),
    "no examples": ({"s": (X[:0], Y[:0])}, "split 's' is empty"),
    "an empty loader": (DataLoader(TensorDataset(X[:0], Y[:0])), "split 'data' is empty"),
    "an empty stream": (Rows([]), "split 'data' is empty"),
    "no length": (Endless(), "the Dataset has no length. Give it __len__, or an IterableDataset"),
    "ragged examples": (
        Examples(lambda i: (X[i, : 1 + i % 2], Y[i])),
        "split 'data' failed on the batch from example 0 on: RuntimeError: stack expects each",
    ),
    "ragged batches": (
        batches((X[:5], Y[:5]), (X[5:, :2], Y[5:])),
        "the batches cannot be combined: RuntimeError: Sizes of tensors must match",
    ),
    "single examples": (batches((X[0], Y[0]), (X[1], Y[1])), "a scalar is not a batch of ex"),
    "batches of other keys": (
        batches({"a": X[:5], "b": X[:5], "y": Y[:5]}, {"a": X[5:], "c": X[5:], "y": Y[5:]}),
        "the batches differ in their structure or types. Give every batch the same inputs",
    ),
    "batches of other numbers": (
        batches((X[:5], Y[:5]), ((X[5:], X[5:]), Y[5:])),
        "the batches differ in their structure or types",
    ),
    "batches of other types": (
        batches((X[:5], Y[:5]), ((X[5:] * 255).byte(), Y[5:])),
        "the batches differ in their structure or types",
    ),
    "targets of other types": (
        batches((X[:5], Y[:5]), (X[5:], Y[5:] / 2)),
        "the batches differ in their structure or types",
    ),
    "splits of other tasks": (
        {"a": (X, Y), "b": (X, Y / 2)},
        "some splits have whole-number targets and some do not",
    ),
    "a loader that drops": (
        DataLoader(TensorDataset(X, Y), batch_size=5, drop_last=True),
        "the DataLoader drops the last batch where it is not full. Build it with drop_last=False",
    ),
    "a sampler that drops": (
        DataLoader(
            TensorDataset(X, Y),
            batch_sampler=BatchSampler(SequentialSampler(X), 5, drop_last=True),  # type: ignore[arg-type]
        ),
        "the DataLoader drops the last batch",
    ),
}


@pytest.mark.parametrize("form", BAD)
def test_data_of_an_unknown_structure_are_refused(form: str) -> None:
    given, message = BAD[form]
    found = refusal(lambda: from_object(given, "here"))
    assert message in found
    assert found.startswith("here")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("order", ["sorted", "alternating", "shuffled", "one is rare"])
def test_spread_examples_are_of_every_class(order: str, dtype: torch.dtype) -> None:
    classes = 2 if dtype == torch.bool else 10
    y = torch.arange(400) % classes
    if order == "sorted":
        y = y.sort().values
    elif order == "shuffled":
        y = y[torch.randperm(400, generator=torch.Generator().manual_seed(1))]
    elif order == "one is rare":
        y = y.clamp(max=classes - 2)
        y[[17, 300]] = classes - 1
    few, rows = Split(torch.arange(400.0), y.to(dtype)).spread(20)
    assert len(set(rows.tolist())) == len(few) == 20
    assert torch.equal(few.inputs, rows.float())
    assert torch.equal(few.targets, y.to(dtype)[rows])
    counts = few.targets.long().bincount(minlength=classes)
    rarest = 2 if order == "one is rare" else 20 // classes
    assert int(counts.min()) == min(rarest, 20 // classes)


@pytest.mark.parametrize("targets", [torch.zeros(1000), torch.zeros(1000, 2).long()])
@pytest.mark.parametrize("period", [2, 5, 10, 16])
def test_spread_examples_are_of_every_kind_where_targets_show_none(
    period: int, targets: Tensor
) -> None:
    _, rows = Split(torch.zeros(1000), targets).spread(64)
    assert set((rows % period).tolist()) == set(range(period))
    assert len(set((rows // 100).tolist())) == 10


def test_numbers_per_channel_are_copied_to_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[float, ...]] = []
    original = torch.tensor

    def counted(values: tuple[float, ...], **more: Any) -> Tensor:
        made.append(values)
        return original(values, **more)

    monkeypatch.setattr(torch, "tensor", counted)
    mean, std = (0.1234, 0.5), (2.0, 4.5)
    data = DataSet({}, mean=mean, std=std)
    inputs = torch.rand(3, 2, 4, 4)
    for _ in range(5):
        for dtype in (torch.float32, torch.float64):
            x = data.prepare(inputs, dtype)
            channels = [original(v, dtype=dtype).view(2, 1, 1) for v in (mean, std)]
            assert torch.equal(x, (inputs.to(dtype) - channels[0]) / channels[1])
    assert made == [mean, std] * 2
