"""The files that a command reads, none of which its results may overwrite."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from losscli.checkpoint import find_base, read
from losscli.data import DATASETS
from losscli.results.result import refuse_overwriting
from losscli.settings import Settings
from losscli.spec import Spec
from losscli.studies.specs import SourcedSpec, find_specs

__all__ = ["protect_inputs"]


def protect_inputs(
    outputs: Iterable[Path], names: Sequence[str], settings: Settings | None
) -> None:
    """Checks that no file to write is a file of a checkpoint or of the data.

    Args:
        outputs: The files to write.
        names: The checkpoints.
        settings: The settings, for the data; None if the command reads no data.

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
        specs = find_specs(settings, None, read(base) if base else None)
        inputs += _data_files(specs.data)
    refuse_overwriting(existing, inputs)


def _data_files(data: SourcedSpec | None) -> list[Path]:
    """Lists the files of the data that may have the suffix of an output, and folders of them."""
    if data is None or not isinstance(data.value, str):
        return []
    name, _, argument = Spec.parse(data.value).target.partition(":")
    if name not in DATASETS or not argument:
        return []
    path = Path(data.folder or "", argument)
    if not path.is_dir():
        return [path]
    if name == "imagefolder":  # the images are in its subfolders
        return [folder for folder in path.iterdir() if folder.is_dir()]
    return [path] if name == "hf" else []
