"""Image folders with one subfolder per class; images are decoded on demand."""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from losscli.data.batch import Pixels
from losscli.errors import DataError, SpecError, one_line, printable
from losscli.files import walk

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Images", "fingerprint", "load_image_folder", "open_image"]

# Image suffixes of torchvision's ImageFolder.
_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# Pillow's names of these formats, and GIF, which often has one of these suffixes. No other format
# is tried, because for some (EPS) Pillow starts a program.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

# Pillow's modes with more than 8 bits per channel, which it would clip at 255.
_DEEP = ("I", "F")


def open_image(file: str | IO[bytes]) -> Image:
    """Returns an image, not decoded, in a format for which Pillow does not start a program.

    Raises:
        ValueError: The file is not a regular file, or its format is not supported.
    """
    from PIL import Image, UnidentifiedImageError

    # Opening a FIFO would block.
    if isinstance(file, str) and not stat.S_ISREG(os.stat(file).st_mode):  # noqa: PTH116
        raise ValueError("not a regular file")
    try:
        return Image.open(file, formats=_FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"not in one of the formats {', '.join(_FORMATS)}") from None


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Images and their targets, ``(uint8 [C, H, W], target)``.

    Args:
        targets: The targets, ``[N]``.
        size: Side of the square output images. The shorter side is resized to it (bilinear,
            antialiased) and the centre is cropped, as by ``Resize`` and ``CenterCrop`` of
            torchvision. None keeps the images, which must then have the same shape.
        grayscale: Whether C is 1 instead of 3.

    Raises:
        DataError: Pillow is not installed, or the first image cannot be read.
        SpecError: ``size`` is not a positive integer, or ``grayscale`` is not a bool.
    """

    def __init__(self, targets: Tensor, *, size: int | None, grayscale: bool) -> None:
        if size is not None and (type(size) is not int or size < 1):
            raise SpecError(f"size={size} is not a number of pixels", "Write size=224")
        if not isinstance(grayscale, bool):
            raise SpecError(f"grayscale={grayscale} must be true or false", "Write true")
        try:
            import PIL.Image  # noqa: F401
        except ImportError as error:
            raise DataError(
                f"images are read by Pillow, which is not installed ({one_line(error)})",
                "pip install 'losscli[data]'",
            ) from None
        self.targets = targets
        self._size = size
        self._mode = "L" if grayscale else "RGB"
        self._shape = self._decode(0).shape if len(targets) else torch.Size()

    @abstractmethod
    def open(self, index: int) -> Image:
        """Opens an image, which may be decoded already."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Returns the name of an image in error messages."""

    @abstractmethod
    def state(self, positions: list[int]) -> str:
        """Returns a fingerprint that changes if the files of images change."""

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pixels = self._decode(index)
        if pixels.shape != self._shape:
            (_, height, width), (_, first_height, first_width) = pixels.shape, self._shape
            raise DataError(
                f"{self.name(index)} has {width} × {height} pixels, {self.name(0)} has "
                f"{first_width} × {first_height}",
                "Give size=N to make all images squares of N × N",
            )
        return pixels, self.targets[index]

    def _decode(self, index: int) -> Tensor:
        with _readable(self.name(index)), self.open(index) as opened:
            if opened.mode.partition(";")[0] in _DEEP:
                raise DataError(
                    f"{self.name(index)} has pixels of more than 8 bits (mode {opened.mode}), and "
                    "how they become 0…255 is not known",
                    "Scale them as for the training and save them with 8 bits",
                )
            # EXIF orientation is ignored, as in torchvision's loader.
            image = opened.convert(self._mode)
            if self._size is not None:
                image = _square(image, self._size)
            pixels = torch.from_numpy(np.array(image, np.uint8))
        return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def _square(image: Image, size: int) -> Image:
    from PIL.Image import MAX_IMAGE_PIXELS, DecompressionBombError, Resampling

    width, height = image.size
    shorter = min(width, height)
    # Sizes and offsets are rounded as in torchvision.
    width, height = int(size * width / shorter), int(size * height / shorter)
    if MAX_IMAGE_PIXELS is not None and width * height > MAX_IMAGE_PIXELS:
        raise DecompressionBombError(f"resized it has {width} × {height} pixels")
    if (width, height) != image.size:
        image = image.resize((width, height), Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Converts warnings and errors of Pillow to a `DataError`."""
    from PIL.Image import DecompressionBombError, DecompressionBombWarning

    try:
        with warnings.catch_warnings():
            # Pillow reads images with unusual metadata or palettes in spite of its warnings.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", DecompressionBombWarning)
            yield
    except DataError:
        raise
    except (DecompressionBombError, DecompressionBombWarning) as error:
        raise DataError(
            f"{name} exceeds Pillow's limit of pixels: {error}",
            "Make it smaller, or leave it out",
        ) from None
    except Exception as error:  # noqa: BLE001 - decoders raise any exception for a broken image
        raise DataError(
            f"{name} is not an image that Pillow can read: {one_line(error)}",
            "Write it again, or leave it out",
        ) from None


def fingerprint(files: Iterable[str]) -> str:
    """Returns a digest of the names, sizes and modification times of files.

    Raises:
        DataError: A file does not exist any more.
    """
    digest = hashlib.sha256()
    for file in files:
        try:
            status = os.stat(file)  # noqa: PTH116 - there may be a million of them
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}") from None
        state = f"{file}\0{status.st_size} {status.st_mtime_ns}\0"
        digest.update(state.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


class _Folder(Images):
    def __init__(self, files: list[str], targets: list[int], **options: Any) -> None:
        self._files = files
        super().__init__(torch.tensor(targets), **options)

    def open(self, index: int) -> Image:
        return open_image(self._files[index])

    def name(self, index: int) -> str:
        return self._files[index]

    def state(self, positions: list[int]) -> str:
        return fingerprint(self._files[position] for position in positions)


def load_image_folder(path: Path, /, *, size: int | None = None, grayscale: bool = False) -> Pixels:
    """Reads images in folders named by their classes, DIR/SPLIT/CLASS/* or DIR/CLASS/*.

    Classes are numbered in the order of their names and images are converted to RGB, as in
    torchvision's ImageFolder; EXIF orientation is ignored. Files without an image suffix and names
    that start with a dot are skipped.

    Args:
        path: The folder.
        size: Side of the square output images, resized and center-cropped; None requires images of
            the same shape.
        grayscale: Whether images have one channel instead of three.

    Returns:
        The images of each split as uint8.

    Raises:
        DataError: There are no images, or the splits have different classes.
    """
    if not path.is_dir():
        raise DataError(f"there is no folder {path}", "Name the folder that holds the classes")
    options = {"size": size, "grayscale": grayscale}
    splits = _splits(path)
    names = {split: [folder.name for folder in _folders(place)] for split, place in splits.items()}
    classes = sorted(set().union(*names.values()))
    for split, present in names.items():
        if missing := [name for name in classes if name not in set(present)]:
            raise DataError(
                f"{splits[split]} has no folder {', '.join(missing)}, which other splits have",
                "Create it, even if empty: a class has the same number in all splits",
            )
    found = {split: [_images(place / name) for name in classes] for split, place in splits.items()}
    for name, *files in zip(classes, *found.values(), strict=True):
        if not any(files):
            raise DataError(
                f"the class folders {name} in {path} hold no images",
                f"Remove them, or put in files that end in {', '.join(_SUFFIXES)}",
            )
    return Pixels({
        printable(split): _Folder(
            [file for files in groups for file in files],
            [number for number, files in enumerate(groups) for _ in files],
            **options,
        )
        for split, groups in found.items()
    })


def _splits(path: Path) -> dict[str, Path]:
    """Distinguishes folders of splits from folders of classes by the depth of the images."""
    folders = _folders(path)
    direct: list[Path] = []
    nested: list[Path] = []
    for folder in folders:
        if first := next(_walk(folder), None):
            (direct if Path(first[0]) == folder else nested).append(folder)
    if direct and nested:
        raise DataError(
            f"{path}: images lie in {direct[0].name} itself and in folders of {nested[0].name}, "
            "so these folders are neither classes nor splits",
            "Arrange them as DIR/CLASS/* or as DIR/SPLIT/CLASS/*",
        )
    if not direct and not nested:
        raise DataError(
            f"{path} contains no folders of images",
            f"Name a folder DIR/CLASS/* or DIR/SPLIT/CLASS/*; images end in {', '.join(_SUFFIXES)}",
        )
    # Some data sets have the layout CLASS/images/*, which is not one split per class.
    inner = [[child.name for child in _folders(folder)] for folder in nested]
    same_name = len(nested) > 1 and all(len(names) == 1 and names == inner[0] for names in inner)
    are_classes = same_name and {"train", "test"}.isdisjoint(folder.name for folder in nested)
    if direct or are_classes:
        return {"data": path}
    return {folder.name: folder for folder in sorted(folders, key=lambda f: f.name != "train")}


def _folders(path: Path) -> list[Path]:
    # Sorted by name as in torchvision; some systems sort paths differently.
    folders = (entry for entry in path.iterdir() if entry.is_dir() and entry.name[0] != ".")
    return sorted(folders, key=lambda folder: folder.name)


def _is_image(name: str) -> bool:
    return name[0] != "." and name.lower().endswith(_SUFFIXES)


def _images(folder: Path) -> list[str]:
    """Lists the images in a folder and below it, in the order of torchvision's ImageFolder."""
    return [os.path.join(*parts) for parts in sorted(_walk(folder))]  # noqa: PTH118 - of millions


def _walk(folder: Path) -> Iterator[tuple[str, str]]:
    for parent, _, files in walk(folder, onerror=_fail):
        yield from ((parent, name) for name in files if _is_image(name))


def _fail(error: OSError) -> None:
    raise error
