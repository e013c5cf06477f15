"""The files that a command reads, none of which its results may overwrite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from losscli.checkpoint import find_base, read
from losscli.data import DATASETS
from losscli.files import read_object, walk
from losscli.results.result import refuse_overwriting
from losscli.settings import Settings
from losscli.spec import Spec
from losscli.studies.specs import SourcedSpec, find_specs

__all__ = ["protect_inputs"]

# Formats of data with nested folders, in which files can have any name.
_NESTED = ("imagefolder", "hf")


def protect_inputs(
    outputs: Iterable[Path], names: Sequence[str], settings: Settings | None
) -> None:
    """Checks that no file to write is one that the command reads, also through links.

    The files are those of the checkpoints and of what the specs name: data and their tokenizer, the
    configuration of a model, code, and the TOML files with the specs.

    Args:
        outputs: The files to write.
        names: The checkpoints.
        settings: The settings, with the specs; None if the command reads only checkpoints.

    Raises:
        UsageError: An output is one of them.
    """
    existing = [path for path in outputs if path.exists()]
    if not existing:
        return
    base = find_base(names)
    stored = dict.fromkeys(name for name in (*names, base) if name and name[:5] != "init:")
    inputs = [file for name in stored for file in read(name).files]
    if settings is not None:
        found = find_specs(settings, settings.model, read(base) if base else None)
        for spec in (found.model, found.data, found.loss, found.objective, *found.metrics):
            inputs += _files_of(spec)
    refuse_overwriting(existing, inputs)


def _files_of(found: SourcedSpec | None) -> Iterator[Path]:
    """Yields the file that contains a spec, and the files and folders that the spec names."""
    if found is None or not isinstance(found.value, str):
        return
    if found.source.endswith(".toml"):
        yield Path(found.source)
    folder = found.folder or Path()
    spec = Spec.parse(found.value)
    name, _, argument = spec.target.partition(":")
    if name.endswith(".py"):
        yield folder / name
    elif name == "transformers":
        yield folder / argument / "config.json"
    elif name in DATASETS and argument:
        yield from _files_of_data(name, folder / argument)
        tokenizer = folder / str(spec.options.get("tokenizer", ""))
        for file in tokenizer.glob("*.json") if "tokenizer" in spec.options else ():
            # The JSON of a result, which may be in the same folder, has an identity.
            if "identity" not in read_object(file):
                yield file
    elif name == "pt2":
        yield folder / argument


def _files_of_data(name: str, path: Path) -> Iterator[Path]:
    """Yields the file of a data set; of a folder, its links and the folders with only data."""
    if not path.is_dir():
        yield path
    elif name not in _NESTED:
        # No file of these formats has the suffix of a result, but a link may lead to one.
        yield from (file for file in (*path.glob("*"), *path.glob("*/*")) if file.is_symlink())
    else:
        yield from [path] if name == "hf" else []
        for parent, folders, files in walk(path):
            yield from (Path(parent, folder) for folder in folders)
            yield from (link for file in files if (link := Path(parent, file)).is_symlink())
