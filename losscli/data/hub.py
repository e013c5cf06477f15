"""Hugging Face data sets from a folder or the hub; the columns determine the task."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
import tempfile
import weakref
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from losscli.data.arrays import scaled
from losscli.data.batch import Pixels, to_tensor
from losscli.data.images import Images, fingerprint, open_image
from losscli.data.memory import require_memory
from losscli.data.nests import Nest
from losscli.data.split import DataSet, Split
from losscli.data.text import IGNORED, read_texts
from losscli.errors import DataError, SpecError, one_line, printable

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["load_hub"]

# Default columns; the first one that exists is used.
_INPUTS = ("input_ids", "image", "img", "pixel_values", "inputs", "input", "features", "x", "text")
_TARGETS = ("labels", "label", "targets", "target", "fine_label", "y")
# Further inputs of transformers' models with input_ids.
_EXTRA_INPUTS = ("attention_mask", "token_type_ids")

_PROBE_SECONDS = 10


def load_hub(
    source: Path | str,
    /,
    *,
    inputs: str | None = None,
    targets: str | None = None,
    config: str | None = None,
    size: int | None = None,
    grayscale: bool | None = None,
    tokenizer: str | Path | None = None,
    context: int | None = None,
    scale: bool | None = None,
) -> Any:
    """Reads a Hugging Face data set: a folder of save_to_disk or of data files, or from the hub.

    The columns determine the task: images and classes (``size`` and ``grayscale`` as in
    imagefolder); text for language modelling, with concatenated rows (``tokenizer`` and
    ``context`` as in text); ``input_ids`` of sequences, with ``labels`` of sequences or themselves
    as targets; or numbers.

    Args:
        source: The folder; a string is the name of a data set on the hub.
        inputs: Column of the inputs.
        targets: Column of the targets.
        config: Configuration of the data set, if it has several.
        size: Images: side of the square output images.
        grayscale: Images: whether they have one channel instead of three.
        tokenizer: Text: folder of a tokenizer, or ``bytes``.
        context: Text: number of tokens per sequence.
        scale: Numbers: whether uint8 inputs are divided by 255, as in npz.

    Returns:
        The splits: Datasets for images, otherwise tensors.

    Raises:
        DataError: The data set cannot be read, or its columns cannot be interpreted.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"Hugging Face data sets are read by datasets, which is not installed "
            f"({one_line(error)})",
            "pip install 'losscli[hf]'",
        ) from None
    cache = _Cache()
    with _quiet():
        tables = _tables(source, None if config is None else str(config), cache)
    where = f"hf:{source}"
    for split, table in tables.items():
        if not len(table):
            raise DataError(
                f"{where}, split {split!r} is empty", "Leave the split out, or give it rows"
            )
    columns = dict(next(iter(tables.values())).features)
    column = _select_column(columns, inputs, _INPUTS, "inputs", where)
    if column is None:
        raise DataError(
            f"{where} has the columns {', '.join(columns)}", "Choose one: inputs=COLUMN"
        )
    feature = columns[column]
    image = isinstance(feature, datasets.Image)
    text = getattr(feature, "dtype", "") in {"string", "large_string"} and not image
    _refuse_keys("images", where, column, applies=image, size=size, grayscale=grayscale)
    _refuse_keys("text", where, column, applies=text, tokenizer=tokenizer, context=context)
    tokens = column == "input_ids"
    _refuse_keys("numbers", where, column, applies=not (image or text or tokens), scale=scale)
    if text:
        if targets is not None:
            raise SpecError(
                f"{where}: {column!r} is text, which is its own target",
                "Leave out targets=; to classify text, save it as input_ids and label",
            )
        read = read_texts(tokenizer or "bytes", 1024 if context is None else context)
        joined = {
            split: read(_texts(table, column, where), f"{where}, split {split!r}")
            for split, table in tables.items()
        }
        return DataSet(joined, language=True)
    target = _select_column(columns, targets, _TARGETS, "targets", where)
    # inputs=input_ids selects the token ids only, for models without further inputs.
    extra = [] if inputs else [name for name in _EXTRA_INPUTS if name in columns]
    if tokens and (target is None or _is_list(columns[target])):
        sequences = {
            split: _language(table, target, extra, where) for split, table in tables.items()
        }
        return DataSet(sequences, language=True)
    if target is None:
        raise DataError(
            f"{where} has the columns {', '.join(columns)}", "Choose one: targets=COLUMN"
        )

    def examples(table: Any, name: str) -> Any:
        labels = _numbers(table, target, name)
        if image:
            options = {"size": size, "grayscale": bool(grayscale)}
            return _ImageColumn(table, column, name, labels, source, cache, **options)
        if tokens:
            return _tokens(table, extra, name), labels
        return _features(table, column, name), labels

    splits = {
        split: examples(table, f"{where}, split {split!r}") for split, table in tables.items()
    }
    if image:
        cache.unlink()
        return Pixels(splits)
    return splits if tokens else scaled(splits, where, scale)


class _Cache:
    """A private cache folder of the library for reading one folder.

    The default cache of the library does not distinguish folders by path or content. It could
    return rows of another folder, or rows from before a change.

    Attributes:
        state: A fingerprint of the files that were read.
    """

    def __init__(self) -> None:
        self.state = ""
        self._folder: str | None = None

    def folder(self) -> str:
        """Creates the folder, which is removed with this object or at the end of the process."""
        import datasets

        # In the default cache folder of the library, since /tmp may be in memory.
        root = Path(datasets.config.HF_DATASETS_CACHE)
        root.mkdir(parents=True, exist_ok=True)
        self._folder = tempfile.mkdtemp(prefix="losscli-", dir=root)
        weakref.finalize(self, _remove, self._folder, os.getpid())
        return self._folder

    def unlink(self) -> None:
        """Removes the files if they are memory-mapped, so that nothing remains after a kill.

        They are kept if they are needed later: on systems other than Linux, workers map them again,
        and unpacked images are opened by name.
        """
        if self._folder is not None and sys.platform == "linux":
            if not Path(self._folder, "downloads").exists():
                _remove(self._folder, os.getpid())


def _remove(folder: str, process: int) -> None:
    # A forked worker has a copy of the object and must not remove the folder.
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


def _refuse_keys(kind: str, where: str, column: str, *, applies: bool, **keys: Any) -> None:
    """Refuses keys of a spec for one kind of data if the column has another kind."""
    for key, value in keys.items():
        if value is not None and not applies:
            raise SpecError(
                f"{where}: {key}= is for {kind}, and {column!r} has none", "Leave it out"
            )


def _select_column(
    columns: Mapping[str, Any],
    named: str | None,
    defaults: tuple[str, ...],
    key: str,
    where: str,
) -> str | None:
    if named is None:
        return next((name for name in defaults if name in columns), None)
    if str(named) not in columns:
        raise DataError(
            f"{where} has no column {str(named)!r}", f"{key}= is one of {', '.join(columns)}"
        )
    return str(named)


def _tables(source: Path | str, config: str | None, cache: _Cache) -> dict[str, Any]:
    """Opens all splits of a data set, the training data first."""
    import datasets

    on_disk = isinstance(source, Path) and any(
        (source / name).is_file() for name in ("dataset_dict.json", "state.json")
    )
    if isinstance(source, Path) and not source.is_dir():
        raise DataError(f"{source} is not a folder", "Name the folder that it lies in")
    if on_disk and config is not None:
        raise SpecError(f"{source} has one configuration", "Leave out config=")
    try:
        if isinstance(source, str):
            loaded = _fetch(source, config)
        elif on_disk:
            _require_inside_saved(source)
            with _offline():
                loaded = datasets.load_from_disk(str(source))
        else:
            _require_inside_card(source)
            # An absolute path, since names such as text or json would select a reader.
            folder = str(source.resolve())
            with _offline():
                place = cache.folder()
                loaded = datasets.load_dataset(
                    folder, config, cache_dir=place, trust_remote_code=False
                )
                builder = datasets.load_dataset_builder(folder, config, cache_dir=place)
            files = builder.config.data_files.values()
            cache.state = fingerprint(str(name) for names in files for name in names)
    except DataError:
        raise
    except Exception as error:
        if on_disk and isinstance(error, IndexError) and _has_no_rows(source):
            raise DataError(
                f"{source} is empty", "Leave empty splits out, or give them rows"
            ) from error
        cure = "Does datasets.load_dataset read it in Python?"
        if "pick one among" in str(error):
            cure = "Write config=NAME"
        raise DataError(f"{source} cannot be read: {one_line(error)}", cure) from error
    if not isinstance(loaded, Mapping):
        loaded = {str(loaded.split or "data"): loaded}
    order = sorted(loaded, key=lambda split: split != "train")
    return {printable(str(split)): loaded[split] for split in order}


@contextmanager
def _offline() -> Iterator[None]:
    """Disables network access of the libraries while they read a folder."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _require_inside_saved(folder: Path) -> None:
    """Refuses a folder of save_to_disk with references to files outside of it."""
    splits = _json(folder / "dataset_dict.json").get("splits")
    names = [str(name) for name in splits] if isinstance(splits, list) else []
    for name in names:
        _require_inside(name, folder, folder / "dataset_dict.json")
    for place in (folder, *(folder / name for name in names)):
        files = _json(place / "state.json").get("_data_files")
        for entry in files if isinstance(files, list) else ():
            if isinstance(entry, dict):
                name = str(entry.get("filename"))
                _require_inside(name, place, place / "state.json")
                if (place / name).exists() and not (place / name).is_file():
                    raise DataError(
                        f"{place / name} is not a regular file", "Save it with save_to_disk"
                    )


def _json(file: Path) -> dict[str, Any]:
    """Reads a JSON object; returns an empty one for other content, which the library reports."""
    if not file.is_file():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def _require_inside_card(folder: Path) -> None:
    """Refuses a folder with a data set card that refers to files outside of the folder."""
    import yaml  # type: ignore[import-untyped]
    from huggingface_hub import DatasetCard

    card, settings = folder / "README.md", folder / ".huggingface.yaml"
    contents = {}
    if card.is_file():
        contents[card] = DatasetCard.load(card).data.to_dict()
    if settings.is_file():
        contents[settings] = yaml.safe_load(settings.read_text(encoding="utf-8"))
    elif settings.exists():
        raise DataError(f"{settings} is not a regular file", "Remove it")
    for file, content in contents.items():
        configs = content.get("configs") if isinstance(content, dict) else None
        for entry in configs if isinstance(configs, list) else ():
            for key in ("data_files", "data_dir"):
                names = tree_leaves(entry.get(key) if isinstance(entry, dict) else None)
                for name in names:
                    if isinstance(name, str):
                        _require_inside(name, folder, file)


def _require_inside(name: str, folder: Path, file: Path) -> None:
    """Refuses a file name or pattern that refers to a file outside of a folder."""
    cure = f"Correct {file.name}, or name the folder that holds the data"
    if "://" in name or "::" in name:
        raise DataError(f"{file} names a place on the network, {printable(name)!r}", cure)
    # A pattern such as **/.. refers to the parent if ** matches nothing.
    if ".." in re.split(r"[/\\]", name) or not _lies_in(folder / name, folder):
        raise DataError(f"{file} points outside the folder, to {printable(name)!r}", cure)


def _lies_in(path: Path, *folders: Path) -> bool:
    """Returns whether a path is in a folder, without resolving links, which are trusted."""
    place = os.path.abspath(path)  # noqa: PTH100 - resolves no links
    return any(
        Path(place).is_relative_to(name)
        for folder in folders
        for name in (os.path.abspath(folder), folder.resolve())  # noqa: PTH100
    )


def _has_no_rows(source: Path | str) -> bool:
    """Returns whether a split was saved without rows, which the library cannot read."""
    states = [*Path(source).glob("state.json"), *Path(source).glob("*/state.json")]
    return not all(any(state.parent.glob("*.arrow")) for state in states)


def _fetch(name: str, config: str | None) -> Any:
    """Loads a data set from the hub, or from the cache if the hub does not respond."""
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise DataError(f"there is no folder {name}", f"Relative paths start at {Path.cwd()}")
    offline = datasets.config.HF_HUB_OFFLINE
    try:
        # A single short request, since the library itself retries for half a minute.
        HfApi(endpoint=datasets.config.HF_ENDPOINT).dataset_info(name, timeout=_PROBE_SECONDS)
    except HfHubHTTPError:
        pass  # the hub responds; the library gives a better error message
    except Exception:  # noqa: BLE001 - depends on the HTTP library
        datasets.config.HF_HUB_OFFLINE = True
    try:
        return datasets.load_dataset(name, config, trust_remote_code=False)
    except ConnectionError as error:
        raise DataError(
            f"{name} is neither a local folder nor in the cache of data sets, and the hub cannot "
            f"be reached: {one_line(error)}",
            "Name a folder, or try again when there is a connection",
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses log messages and progress bars of the library."""
    import datasets
    from datasets.utils import are_progress_bars_disabled, logging

    verbosity, silent = logging.get_verbosity(), are_progress_bars_disabled()
    logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if not silent:
            datasets.enable_progress_bars()


def _is_list(feature: Any) -> bool:
    """Returns whether a feature is a list; the class names differ between library versions."""
    return not hasattr(feature, "dtype") or hasattr(feature, "feature")


def _chunks(table: Any, column: str) -> list[Any]:
    """Reads a column as Arrow arrays, with unchanged types."""
    return list(table.select_columns([column]).with_format("arrow")[:][column].chunks)


def _texts(table: Any, column: str, where: str) -> list[str]:
    texts = [text for chunk in _chunks(table, column) for text in chunk.to_pylist()]
    if None in texts:
        raise DataError(f"{where}: {column!r} has rows without text", "Filter them out")
    return texts


def _unwrap(array: Any) -> Any:
    """Returns the list array inside an extension array, such as one of fixed shape."""
    import pyarrow as pa  # type: ignore[import-untyped]

    return array.storage if isinstance(array.type, pa.BaseExtensionType) else array


def _numbers(table: Any, column: str, where: str) -> Tensor:
    """Reads a column of numbers, or of nested lists of equal shape, as a tensor ``[N, *]``."""
    import pyarrow as pa
    import pyarrow.compute as pc  # type: ignore[import-untyped]

    parts = []
    for chunk in _chunks(table, column):
        array, shape = _unwrap(chunk), [len(chunk)]
        while not array.null_count and pa.types.is_nested(array.type):
            if pa.types.is_struct(array.type):
                break
            lengths = pc.unique(pc.list_value_length(array)).to_pylist()
            if len(lengths) != 1:
                raise DataError(
                    f"{where}: the rows of {column!r} differ in their length",
                    "Pad them to one length",
                )
            shape.append(lengths[0])
            array = _unwrap(pc.list_flatten(array))
        if array.null_count:
            raise DataError(f"{where}: {column!r} has rows without a value", "Filter them out")
        kind, types = array.type, pa.types
        if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
            raise DataError(
                f"{where}: {column!r} contains values of the type "
                f"{printable(str(kind).partition('<')[0])}, not numbers",
                f"Number them with table.class_encode_column({column!r}), or name another column"
                if types.is_string(kind) or types.is_large_string(kind)
                else "Make them numbers, or name another column",
            )
        parts.append(array.to_numpy(zero_copy_only=False).reshape(shape))
    if len({part.shape[1:] for part in parts}) > 1:
        raise DataError(
            f"{where}: the rows of {column!r} differ in their length", "Pad them to one length"
        )
    return to_tensor(np.concatenate(parts), where, column)


def _features(table: Any, column: str, where: str) -> Tensor:
    numbers = _numbers(table, column, where)
    # Scalar features get a feature dimension; scalar integers are indices.
    scalar = numbers.ndim == 1 and numbers.is_floating_point()
    return numbers.unsqueeze(1) if scalar else numbers


def _lists(table: Any, column: str, where: str) -> tuple[Tensor, Tensor]:
    """Reads a column of lists of integers; returns the lengths ``[N]`` and all values."""
    import pyarrow as pa
    import pyarrow.compute as pc

    lengths, values = [], []
    for chunk in _chunks(table, column):
        array = _unwrap(chunk)
        inner = getattr(array.type, "value_type", None)
        if inner is None or not pa.types.is_integer(inner):
            raise DataError(f"{where}: {column!r} contains no lists of integers", "Give token ids")
        flat = pc.list_flatten(array)
        if array.null_count or flat.null_count:
            raise DataError(f"{where}: {column!r} has rows without a value", "Filter them out")
        lengths.append(pc.list_value_length(array).to_numpy(zero_copy_only=False))
        values.append(flat.to_numpy(zero_copy_only=False))
    return (
        torch.from_numpy(np.concatenate(lengths).astype(np.int64)),
        torch.from_numpy(np.concatenate(values).astype(np.int64)),
    )


def _padded(table: Any, columns: list[tuple[str, int]], where: str) -> list[Tensor]:
    """Reads columns of lists, right-padded with the given values to the longest row."""
    rows = {column: _lists(table, column, where) for column, _ in columns}
    lengths, _ = next(iter(rows.values()))
    for column, (other, _) in rows.items():
        if not torch.equal(other, lengths):
            raise DataError(
                f"{where}: the rows of {column!r} are not as long as those of {columns[0][0]!r}",
                "Give one value per token",
            )
    filled = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    return [
        torch.full(filled.shape, padding).masked_scatter(filled, rows[column][1])
        for column, padding in columns
    ]


def _tokens(table: Any, extra: list[str], where: str) -> Nest:
    """Reads sequences of token ids, as a mapping if there are further inputs."""
    names = ["input_ids", *extra]
    padded = _padded(table, [(name, 0) for name in names], where)
    return dict(zip(names, padded, strict=True)) if extra else padded[0]


def _language(table: Any, target: str | None, extra: list[str], where: str) -> Split:
    """Reads sequences of token ids with labels, or with themselves as targets."""
    inputs = _tokens(table, extra, where)
    _, targets = _padded(table, [("input_ids", 0), (target or "input_ids", IGNORED)], where)
    if target is None and "attention_mask" in table.column_names:
        _, mask = _padded(table, [("input_ids", 0), ("attention_mask", 0)], where)
        targets = targets.masked_fill(mask == 0, IGNORED)
    return Split(inputs, targets)


class _ImageColumn(Images):
    """The images of a column, rotated by their EXIF orientation as in the library."""

    def __init__(
        self,
        table: Any,
        column: str,
        where: str,
        targets: Tensor,
        source: Path | str,
        cache: _Cache,
        **options: Any,
    ) -> None:
        import datasets
        from huggingface_hub.constants import HF_HUB_CACHE

        # Raw Arrow values, since the library would open any image format and any path.
        self._rows = table.select_columns([column]).with_format("arrow")
        self._column = column
        self._where = where
        self._cache = cache
        self._mode_of_column = table.features[column].mode
        settings = datasets.config
        folders = (settings.HF_DATASETS_CACHE, settings.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE)
        caches = [Path(place) for place in folders]
        self._folders = caches if isinstance(source, str) else [source, *caches]
        super().__init__(targets, **options)

    def open(self, index: int) -> Image:
        from PIL.ExifTags import Base
        from PIL.ImageOps import exif_transpose

        cell = self._rows[index][self._column][0].as_py() or {}
        content, path = cell.get("bytes"), cell.get("path")
        if content is not None:
            image = open_image(io.BytesIO(content))
        elif path is not None:
            image = open_image(self._file(path, index))
        else:
            raise ValueError("the row has none")
        image.load()
        if image.getexif().get(Base.Orientation) is not None:
            image = exif_transpose(image)
        mode = self._mode_of_column
        return image.convert(mode) if mode and mode != image.mode else image

    def _file(self, path: str, index: int) -> str | io.BytesIO:
        """Returns the image that a row refers to: a file, or zip://NAME::FILE for an archive."""
        inner, _, outer = path.rpartition("::")
        member = re.fullmatch(r"zip://([^:]+)", inner)
        if "://" in outer or (inner and not member) or not _lies_in(Path(outer), *self._folders):
            raise DataError(
                f"{self.name(index)} points outside the folder, to {printable(path)!r}",
                "Save the data set with its images in it, by save_to_disk",
            )
        if member:
            with zipfile.ZipFile(outer) as archive:
                require_memory(archive.getinfo(member[1]).file_size, self.name(index))
                return io.BytesIO(archive.read(member[1]))
        return outer

    def name(self, index: int) -> str:
        return f"{self._where}, row {index}, {self._column!r}"

    def state(self, positions: list[int]) -> str:  # noqa: ARG002 - one fingerprint for the whole table
        return self._cache.state or str(self._rows._fingerprint)
