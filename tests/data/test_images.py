"""Folders of images: the pixels and classes that torchvision's ImageFolder would give."""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy

from losscli.data import DataSet, load
from losscli.errors import DataError
from losscli.models import MLP
from tests.conftest import Losscli

GENERATOR = np.random.default_rng(0)


def pixels(width: int = 5, height: int = 4, channels: int = 3) -> NDArray[np.uint8]:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return GENERATOR.integers(0, 256, shape, np.uint8)


def write(path: Path, values: NDArray[np.uint8] | None = None, **options: Any) -> NDArray[np.uint8]:
    values = pixels() if values is None else values
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **options)
    return values


def examples(data: DataSet, split: str = "data") -> tuple[Tensor, list[int]]:
    found = data.splits[split]
    whole = found.first(len(found))
    assert isinstance(whole.inputs, Tensor)
    assert whole.inputs.dtype == torch.uint8
    return whole.inputs, whole.targets.tolist()


def stacked(images: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    return np.stack([image.transpose(2, 0, 1) for image in images])


def read(folder: Path, keys: str = "") -> DataSet:
    return load(f'"imagefolder:{folder}"{keys}', trusted=False)


# Where images lie


def test_classes_are_numbered_by_their_names_and_files_sorted(tmp_path: Path) -> None:
    names = ["b/2.png", "b/10.PNG", "B/x.bmp", "a/z.ppm", "a/a.tiff", "é/1.webp"]
    images = {name: write(tmp_path / name, lossless=True) for name in names}
    inputs, targets = examples(read(tmp_path))
    order = ["B/x.bmp", "a/a.tiff", "a/z.ppm", "b/10.PNG", "b/2.png", "é/1.webp"]
    assert np.array_equal(inputs, stacked([images[name] for name in order]))
    assert targets == [0, 1, 1, 2, 2, 3]


def test_the_depth_of_images_separates_splits_from_classes(tmp_path: Path) -> None:
    images = {
        (split, kind): write(tmp_path / split / kind / "1.png")
        for split in ("test", "train", "dev")
        for kind in ("cat", "dog")
    }
    data = read(tmp_path)
    assert list(data.splits) == ["train", "dev", "test"]
    assert data.task == "classification"
    for split in data.splits:
        inputs, targets = examples(data, split)
        assert np.array_equal(inputs, stacked([images[split, "cat"], images[split, "dog"]]))
        assert targets == [0, 1]
    alone, targets = examples(read(tmp_path / "dev"))
    assert np.array_equal(alone, stacked([images["dev", "cat"], images["dev", "dog"]]))


def test_classes_may_have_folders_inside(tmp_path: Path) -> None:
    """As in Tiny ImageNet, train/n01443537/images/*.JPEG."""
    images = {
        (split, kind): write(tmp_path / split / kind / "images" / "1.png")
        for split in ("train", "val")
        for kind in ("n01", "n02")
    }
    for kind in ("n01", "n02"):
        (tmp_path / "train" / kind / f"{kind}_boxes.txt").write_text("0 0 62 48")
    for folder, split in ((tmp_path, "train"), (tmp_path / "train", "data")):
        inputs, targets = examples(read(folder), split)
        assert np.array_equal(inputs, stacked([images["train", "n01"], images["train", "n02"]]))
        assert targets == [0, 1]


def test_hidden_files_and_files_that_are_not_images_are_ignored(tmp_path: Path) -> None:
    image = write(tmp_path / "a" / "1.png")
    for name in ("Thumbs.db", ".DS_Store", "._1.png", "labels.csv", "1.gif", "png"):
        (tmp_path / "a" / name).write_bytes(b"\0")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "classes.txt").touch()
    write(tmp_path / "a" / ".cache" / "1.png")
    (tmp_path / "a" / "folder.png").mkdir()
    inputs, targets = examples(read(tmp_path))
    assert np.array_equal(inputs, stacked([image]))
    assert targets == [0]


def test_links_are_followed_and_do_not_lead_round_in_circles(tmp_path: Path) -> None:
    image = write(tmp_path / "store" / "1.png")
    other = write(tmp_path / "store" / "more" / "2.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "loop").symlink_to(tmp_path / "store")
    (tmp_path / "data" / "b").mkdir()
    (tmp_path / "data" / "b" / "link.png").symlink_to(tmp_path / "store" / "1.png")
    inputs, targets = examples(read(tmp_path / "data"))
    assert np.array_equal(inputs, stacked([image, other, image]))
    assert targets == [0, 0, 1]


@pytest.mark.skipif(sys.platform != "linux", reason="names are text there")
def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    odd = os.fsdecode(b"\xff")
    images = [write(tmp_path / split / odd / f"{odd}.png") for split in ("train", odd)]
    data = read(tmp_path)
    assert list(data.splits) == ["train", "\\udcff"]
    for split, image in zip(data.splits, images, strict=True):
        assert np.array_equal(examples(data, split)[0], stacked([image]))


def test_a_class_without_images_keeps_its_number_in_a_split(tmp_path: Path) -> None:
    for split, kind in (("train", "a"), ("train", "b"), ("train", "c"), ("test", "c")):
        write(tmp_path / split / kind / "1.png")
    for kind in ("a", "b"):
        (tmp_path / "test" / kind).mkdir()
    data = read(tmp_path)
    assert examples(data, "train")[1] == [0, 1, 2]
    assert examples(data, "test")[1] == [2]


# What images become


def palette(path: Path) -> Image.Image:
    image = Image.fromarray(pixels()).quantize(7)
    image.save(path, transparency=bytes([0, 128, 255, 3, 4, 5, 6]))
    return image.convert("RGB")


def turned(path: Path) -> Image.Image:
    image = Image.fromarray(pixels(6, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° for display
    image.save(path, exif=exif)
    return image


def saved(mode: str) -> Callable[[Path], Image.Image]:
    def make(path: Path) -> Image.Image:
        image = Image.fromarray(pixels()).convert(mode)
        image.save(path)
        return image.convert("RGB")

    return make


MODES: dict[str, Callable[[Path], Image.Image]] = {
    "grey": saved("L"),
    "one bit": saved("1"),
    "alpha": saved("RGBA"),
    "grey with alpha": saved("LA"),
    "palette with transparency": palette,
    "EXIF": turned,
}


@pytest.mark.parametrize("make", MODES.values(), ids=MODES.keys())
def test_images_are_made_rgb_as_pillow_does_and_not_turned(
    make: Callable[[Path], Image.Image], tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    expected = np.asarray(make(tmp_path / "a" / "1.png"))
    inputs, _ = examples(read(tmp_path))
    assert inputs.is_contiguous()
    assert np.array_equal(inputs, stacked([expected]))


def test_cmyk(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels()).convert("CMYK").save(tmp_path / "a" / "1.jpg")
    with Image.open(tmp_path / "a" / "1.jpg") as image:
        assert image.mode == "CMYK"
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(examples(read(tmp_path))[0], stacked([expected]))


def test_grayscale_gives_one_channel(tmp_path: Path) -> None:
    grey, colour = write(tmp_path / "a" / "1.png", pixels(5, 4, 1)), write(tmp_path / "a" / "2.png")
    inputs, _ = examples(read(tmp_path, ",grayscale=true"))
    assert inputs.shape == (2, 1, 4, 5)
    assert np.array_equal(inputs[0, 0], grey)
    luma = colour @ np.array([0.299, 0.587, 0.114])  # ITU-R 601-2
    assert np.abs(inputs[1, 0].numpy() - luma).max() <= 0.51


def triangle(length: int, new: int) -> NDArray[np.float64]:
    """The matrix of an antialiased bilinear resize: a triangle as wide as the scale."""
    scale = length / new
    width = max(scale, 1)
    centres = (np.arange(new) + 0.5) * scale
    distance = np.abs(np.arange(length) + 0.5 - centres[:, None]) / width
    weights = np.clip(1 - distance, 0, None)
    matrix: NDArray[np.float64] = weights / weights.sum(1, keepdims=True)
    return matrix


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [(9, 9, 4), (40, 21, 8), (21, 40, 8), (7, 5, 12), (30, 7, 7), (7, 31, 7), (13, 8, 8)],
)
def test_size_resizes_the_shorter_side_and_cuts_out_the_centre(
    width: int, height: int, size: int, tmp_path: Path
) -> None:
    image = write(tmp_path / "a" / "1.png", pixels(width, height))
    inputs, _ = examples(read(tmp_path, f",size={size}"))
    assert inputs.shape == (1, 3, size, size)
    # torchvision: the longer side is int(size · long / short), the offset int(round(rest / 2)).
    shorter = min(width, height)
    new = (math.floor(size * width / shorter), math.floor(size * height / shorter))
    left, top = (int(round((side - size) / 2.0)) for side in new)  # noqa: RUF046
    whole = Image.fromarray(image).resize(new, Image.Resampling.BILINEAR)
    cut = np.asarray(whole)[top : top + size, left : left + size]
    assert np.array_equal(inputs, stacked([cut]))
    # By hand; Pillow rounds to whole levels after each of the two directions.
    rows, columns = triangle(height, new[1]), triangle(width, new[0])
    by_hand = np.einsum("yh,hwc,xw->yxc", rows, image, columns)
    by_hand = by_hand[top : top + size, left : left + size]
    assert np.abs(cut - by_hand).max() <= 1.01
    if shorter == size:
        assert np.array_equal(cut, image[top : top + size, left : left + size])


def test_images_are_decoded_again_and_can_be_sent_to_workers(tmp_path: Path) -> None:
    from losscli.data.images import load_image_folder

    first, second = write(tmp_path / "a" / "1.png"), write(tmp_path / "b" / "2.png")
    dataset = pickle.loads(pickle.dumps(load_image_folder(tmp_path)["data"]))
    assert len(dataset) == 2
    changed = write(tmp_path / "b" / "2.png")
    assert not np.array_equal(second, changed)
    for index, image in ((0, first), (1, changed)):
        found, target = dataset[index]
        assert np.array_equal(found, image.transpose(2, 0, 1))
        assert target == index


def test_a_curve_from_the_command_line_has_the_plain_loss_at_its_end(
    losscli: Losscli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images = [write(tmp_path / "data" / f"{i % 3}" / f"{i}.png") for i in range(9)]
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(MLP("60-4-3"))
        torch.save(models[-1].state_dict(), f"{seed}.pt")
    outcome = losscli(
        *("interpolate", "0.pt", "1.pt", "-m", "mlp:60-4-3", "--points", 3, "--range", 0, 1),
        *("-d", "imagefolder:data,mean=0.5", "--no-figure", "-o", "-", "--dtype", "float64"),
    )
    assert outcome.status == 0, outcome.stderr
    header, first, *_ = (line.split(",") for line in outcome.stdout.splitlines())
    x = torch.from_numpy(stacked([images[i] for i in (0, 3, 6, 1, 4, 7, 2, 5, 8)])).double()
    with torch.no_grad():
        outputs = models[0].double()(x / 255 - 0.5)
    loss = cross_entropy(outputs, torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])).item()
    assert float(first[header.index("loss")]) == pytest.approx(loss, rel=1e-12)


# Refusals


def bomb(path: Path, width: int = 20_000, height: int = 20_000) -> None:
    """A PNG of 20,000 × 20,000 pixels in a few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    content = (
        chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def cut_off(path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels(64, 64)).save(buffer, "png")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue()[:-200])


def mixed(folder: Path) -> None:
    write(folder / "train" / "a" / "1.png")
    write(folder / "extra" / "1.png")


def other_classes(folder: Path) -> None:
    for split, kind in (("train", "a"), ("train", "b"), ("test", "a"), ("test", "c")):
        write(folder / split / kind / "1.png")


def deep(kind: type[np.generic]) -> Callable[[Path], object]:
    def save(folder: Path) -> None:
        (folder / "a").mkdir()
        values = np.array([[0, 255], [256, 65535]], kind)
        Image.fromarray(values).save(folder / "a" / "1.tif")

    return save


def two_shapes(folder: Path) -> None:
    write(folder / "a" / "1.png")
    write(folder / "b" / "2.png", pixels(4, 5))


def empty_class(folder: Path) -> None:
    write(folder / "a" / "1.png")
    (folder / "b").mkdir()


def empty_split(folder: Path) -> None:
    write(folder / "train" / "a" / "1.png")
    write(folder / "train" / "b" / "1.png")
    (folder / "test" / "a").mkdir(parents=True)
    (folder / "test" / "b").mkdir()


def dead_link(folder: Path) -> None:
    (folder / "a").mkdir()
    (folder / "a" / "1.png").symlink_to("nowhere.png")


BROKEN: dict[str, tuple[Callable[[Path], object], str, int, str]] = {
    "cut off": (lambda f: cut_off(f / "a" / "1.png"), "", 1, "images/a/1.png is not an image"),
    "16 bits": (deep(np.uint16), "", 1, "1.tif has pixels of more than 8 bits (mode I;16), and"),
    "32 bits": (deep(np.int32), "", 1, "pixels of more than 8 bits (mode I), and"),
    "floating": (deep(np.float32), ",grayscale=true", 1, "more than 8 bits (mode F), and"),
    "text": (
        lambda f: [(f / "a").mkdir(), (f / "a" / "1.jpg").write_text("hello")],
        "",
        1,
        "images/a/1.jpg is not an image",
    ),
    "dead link": (dead_link, "", 1, "images/a/1.png is not an image"),
    "bomb": (lambda f: bomb(f / "a" / "1.png"), "", 1, "1.png exceeds Pillow's limit of pixels"),
    "near bomb": (
        lambda f: bomb(f / "a" / "1.png", 10_000),
        "",
        1,
        "1.png exceeds Pillow's limit of pixels",
    ),
    "resized bomb": (
        lambda f: write(f / "a" / "1.png", pixels(4000, 1)),
        ",size=224",
        1,
        "resized it has 896000 × 224 pixels",
    ),
    "two shapes": (
        two_shapes,
        "",
        1,
        "images/b/2.png has 4 × 5 pixels, images/a/1.png has 5 × 4. Give size=N",
    ),
    "no images": (lambda f: (f / "a").mkdir(), "", 1, "images contains no folders of images"),
    "no folders": (lambda f: write(f / "1.png"), "", 1, "images contains no folders of images"),
    "empty class": (empty_class, "", 1, "the class folders b in images hold no images"),
    "empty split": (empty_split, "", 1, "'test'"),
    "splits and classes": (mixed, "", 1, "images lie in extra itself and in folders of train"),
    "other classes": (other_classes, "", 1, "has no folder c, which other splits have"),
    "size=0": (
        lambda f: write(f / "a" / "1.png"),
        ",size=0",
        2,
        "size=0 is not a number of pixels",
    ),
    "size=x": (lambda f: write(f / "a" / "1.png"), ",size=true", 2, "size=True is not a number"),
    "grayscale": (lambda f: write(f / "a" / "1.png"), ",grayscale=1", 2, "must be true or false"),
    "crop": (lambda f: write(f / "a" / "1.png"), ",crop=3", 2, "It takes size, grayscale, mean"),
    "nothing": (lambda f: f.rmdir(), "", 1, "there is no folder images"),
}


@pytest.mark.parametrize(("make", "keys", "status", "expected"), BROKEN.values(), ids=BROKEN.keys())
def test_refusals(
    make: Callable[[Path], object],
    keys: str,
    status: int,
    expected: str,
    losscli: Losscli,
    folder: Path,
) -> None:
    (folder / "images").mkdir()
    make(folder / "images")
    before = set(folder.iterdir())
    outcome = losscli("interpolate", "a.pt", "b.pt", "-d", f"imagefolder:images{keys}")
    assert outcome.status == status
    assert expected in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert set(folder.iterdir()) == before


def program(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts a Ghostscript first that leaves a canary."""
    canary = folder / "canary"
    (folder / "bin").mkdir()
    for name in ("gs", "gswin64c", "gswin32c"):
        (folder / "bin" / name).write_text(f"#!/bin/sh\ntouch '{canary}'\n")
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    return canary


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def test_an_image_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "1.png").write_bytes(EPS)
    canary = program(tmp_path, monkeypatch)
    with pytest.raises(
        DataError, match=r"1\.png is not an image .*: not in one of the formats BMP"
    ):
        read(tmp_path / "images")
    assert not canary.exists()
    # Pillow left to itself does start one.
    with pytest.raises(OSError, match=r"."), Image.open(tmp_path / "images/a/1.png") as image:
        image.load()
    assert canary.exists()


def test_a_gif_under_another_name_is_read(tmp_path: Path) -> None:
    write(tmp_path / "a" / "1.gif", pixels(channels=1))
    (tmp_path / "a" / "1.gif").rename(tmp_path / "a" / "1.jpg")
    with Image.open(tmp_path / "a" / "1.jpg") as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(examples(read(tmp_path))[0], stacked([expected]))


def test_pipes_and_devices_are_not_images(tmp_path: Path) -> None:
    write(tmp_path / "a" / "1.png")
    (tmp_path / "b").mkdir()
    os.mkfifo(tmp_path / "b" / "1.png")
    with pytest.raises(DataError, match=r"b/1\.png is not an image .*: not a regular file"):
        read(tmp_path)
    (tmp_path / "b" / "1.png").unlink()
    (tmp_path / "b" / "1.png").symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"b/1\.png is not an image .*: not a regular file"):
        read(tmp_path)


def test_without_pillow_the_extra_is_named(
    losscli: Losscli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder / "images" / "a" / "1.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    outcome = losscli("interpolate", "a.pt", "b.pt", "-d", "imagefolder:images")
    assert outcome.status == 1
    assert "pip install 'losscli[data]'" in outcome.stderr
    assert outcome.stderr.count("\n") == 1
