"""Images in folders of their classes, decoded one at a time when they are needed."""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from losscli.data.batch import Pixels
from losscli.errors import DataError, SpecError, one_line, printable

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Images", "load_image_folder", "open_image"]

# Those that torchvision's ImageFolder takes for images.
_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# Pillow's names for what those hold, and GIF, which often bears a name of theirs. No other is
# tried, whatever a file begins with: for some (EPS) Pillow starts a program.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

# Pillow's modes for pixels of more than 8 bits, which it would cut off at 255.
_DEEP = ("I", "F")


def open_image(file: str | IO[bytes]) -> Image:
    """Opens an image by Pillow in one of the usual formats, none of which starts a program.

    Args:
        file: Its name, or its bytes.

    Returns:
        The image, not yet decoded.

    Raises:
        ValueError: It is no regular file, or in none of those formats.
    """
    from PIL import Image, UnidentifiedImageError

    # To open a pipe would wait for a writer.
    if isinstance(file, str) and not stat.S_ISREG(os.stat(file).st_mode):  # noqa: PTH116
        raise ValueError("no regular file")
    try:
        return Image.open(file, formats=_FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"in none of the formats {', '.join(_FORMATS)}") from None


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Images and their targets, ``(uint8 [C, H, W], target)``.

    Args:
        targets: The targets, ``[N]``.
        size: The side of the square that each image is made: the shorter side is resized to it
            (bilinear, antialiased), then the centre is cut out, as torchvision's ``Resize`` and
            ``CenterCrop`` do. None leaves the images as they are, all of one shape.
        grayscale: Whether C is 1 and not 3.

    Raises:
        DataError: Pillow is not installed, or the first image cannot be read.
        SpecError: The size is no number of pixels, or grayscale neither true nor false.
    """

    def __init__(self, targets: Tensor, *, size: int | None, grayscale: bool) -> None:
        if size is not None and (type(size) is not int or size < 1):
            raise SpecError(f"size={size} is no number of pixels", "Write size=224")
        if not isinstance(grayscale, bool):
            raise SpecError(f"grayscale={grayscale} is neither true nor false", "Write true")
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
        """Opens an image.

        Args:
            index: Its position.

        Returns:
            The image, decoded or not.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """Names an image in errors.

        Args:
            index: Its position.

        Returns:
            Its name.
        """

    @abstractmethod
    def state(self, positions: list[int]) -> str:
        """Tells one state of what images are decoded from, from another.

        Args:
            positions: Of the images.

        Returns:
            A text that is another one after a change.
        """

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pixels = self._decode(index)
        if pixels.shape != self._shape:
            (_, here, wide), (_, first, first_wide) = pixels.shape, self._shape
            raise DataError(
                f"{self.name(index)} has {wide} × {here} pixels, {self.name(0)} has "
                f"{first_wide} × {first}",
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
            # No turning by EXIF: torchvision's loader does not turn either.
            image = opened.convert(self._mode)
            if self._size is not None:
                image = _square(image, self._size)
            pixels = torch.from_numpy(np.array(image, np.uint8))
        return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def _square(image: Image, size: int) -> Image:
    from PIL.Image import MAX_IMAGE_PIXELS, DecompressionBombError, Resampling

    width, height = image.size
    shorter = min(width, height)
    # Sizes and offsets are rounded as torchvision rounds them.
    width, height = int(size * width / shorter), int(size * height / shorter)
    if MAX_IMAGE_PIXELS is not None and width * height > MAX_IMAGE_PIXELS:
        raise DecompressionBombError(f"resized it has {width} × {height} pixels")
    if (width, height) != image.size:
        image = image.resize((width, height), Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Makes what Pillow warns of or raises an error of one line."""
    from PIL.Image import DecompressionBombError, DecompressionBombWarning

    try:
        with warnings.catch_warnings():
            # Of odd metadata, of palettes with transparency: it reads those images all the same.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", DecompressionBombWarning)
            yield
    except DataError:
        raise
    except (DecompressionBombError, DecompressionBombWarning) as error:
        raise DataError(
            f"{name} has more pixels than Pillow deems safe: {error}",
            "Make it smaller, or leave it out",
        ) from None
    except Exception as error:  # noqa: BLE001 - a broken image makes its decoder raise anything
        raise DataError(
            f"{name} is no whole image that Pillow reads: {one_line(error)}",
            "Write it again, or leave it out",
        ) from None


class _Folder(Images):
    def __init__(self, files: list[str], targets: list[int], **options: Any) -> None:
        self._files = files
        super().__init__(torch.tensor(targets), **options)

    def open(self, index: int) -> Image:
        return open_image(self._files[index])

    def name(self, index: int) -> str:
        return self._files[index]

    def state(self, positions: list[int]) -> str:
        told = hashlib.sha256()
        for file in (self._files[position] for position in positions):
            try:
                found = os.stat(file)  # noqa: PTH116 - there may be a million of them
            except OSError as error:
                raise DataError(f"{file} cannot be read: {error.strerror}") from None
            told.update(
                f"{file}\0{found.st_size} {found.st_mtime_ns}\0".encode("utf-8", "surrogateescape")
            )
        return told.hexdigest()


def load_image_folder(path: Path, /, *, size: int | None = None, grayscale: bool = False) -> Pixels:
    """Reads DIR/SPLIT/CLASS/* or DIR/CLASS/*, images in folders named after their classes.

    Classes are numbered in the order of their names and images are made RGB, as torchvision's
    ImageFolder does; nothing is turned by EXIF. Files without a suffix of images and names that
    begin with a dot are passed over.

    Args:
        path: The folder.
        size: The side of the square that each image is made, by resizing and cutting out its
            centre; without it all images must have one shape.
        grayscale: Whether images have one channel and not three.

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
    for split, there in names.items():
        if missing := [name for name in classes if name not in set(there)]:
            raise DataError(
                f"{splits[split]} has no folder {', '.join(missing)}, which other splits have",
                "Make it, empty if need be: a class has the same number in all splits",
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
    """Tells the folders of splits from those of classes, by how deep the images lie."""
    folders = _folders(path)
    near: list[Path] = []
    far: list[Path] = []
    for folder in folders:
        if first := next(_walk(folder), None):
            (near if Path(first[0]) == folder else far).append(folder)
    if near and far:
        raise DataError(
            f"{path}: images lie in {near[0].name} itself and in folders of {far[0].name}, so that "
            "neither are classes nor splits",
            "Arrange them as DIR/CLASS/* or as DIR/SPLIT/CLASS/*",
        )
    if not near and not far:
        raise DataError(
            f"{path} holds no folders of images",
            f"Name a folder DIR/CLASS/* or DIR/SPLIT/CLASS/*; images end in {', '.join(_SUFFIXES)}",
        )
    # Some data sets have CLASS/images/*: splits with one class each would make no sense.
    inner = [[inside.name for inside in _folders(folder)] for folder in far]
    alike = len(far) > 1 and all(len(names) == 1 and names == inner[0] for names in inner)
    nested = alike and {"train", "test"}.isdisjoint(folder.name for folder in far)
    if near or nested:
        return {"data": path}
    return {folder.name: folder for folder in sorted(folders, key=lambda f: f.name != "train")}


def _folders(path: Path) -> list[Path]:
    # By the names as torchvision sorts them, which is not how all systems sort paths.
    found = (entry for entry in path.iterdir() if entry.is_dir() and entry.name[0] != ".")
    return sorted(found, key=lambda folder: folder.name)


def _is_image(name: str) -> bool:
    return name[0] != "." and name.lower().endswith(_SUFFIXES)


def _images(folder: Path) -> list[str]:
    """Lists the images in a folder and below it, in the order of torchvision's ImageFolder."""
    return [os.path.join(*parts) for parts in sorted(_walk(folder))]  # noqa: PTH118 - of millions


def _walk(folder: Path) -> Iterator[tuple[str, str]]:
    for place, inside, names in os.walk(folder, onerror=_fail, followlinks=True):
        here = Path(place).resolve()
        inside[:] = [
            name
            for name in inside
            # A link to a folder that it lies in leads round in circles.
            if name[0] != "." and not here.is_relative_to(Path(place, name).resolve())
        ]
        yield from ((place, name) for name in names if _is_image(name))


def _fail(error: OSError) -> None:
    raise error
