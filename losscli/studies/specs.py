"""Specs of the model, data, loss and metrics: from an option, a checkpoint or a losscli.toml."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from losscli.checkpoint import CheckpointFile
from losscli.models import has_config
from losscli.settings import Settings
from losscli.spec import Spec, expand_toml
from losscli.studies.config import FILE_NAME, NO_CONFIG, Config, read_config, texts_of
from losscli.studies.trust import cure_for_distrust

__all__ = ["SourcedSpec", "Specs", "find_specs"]


@dataclass(frozen=True)
class SourcedSpec:
    """A spec and where it comes from.

    Attributes:
        value: The spec, or an object.
        trusted: Whether it may name code.
        folder: The folder of relative paths; None for the current folder.
        source: The option or the file that names it.
        cure: If it is not trusted, how to make it trusted; empty if only an option may name code.
    """

    value: Any
    trusted: bool
    folder: Path | None = None
    source: str = ""
    cure: str = ""

    @classmethod
    def named(
        cls,
        value: Any,
        *,
        trusted: bool,
        folder: Path | None = None,
        source: str = "",
        cure: str = "",
    ) -> SourcedSpec:
        """Takes what was named: where that is a TOML file, what the file says."""
        if not isinstance(value, str):
            return cls(value, trusted, folder, source)
        text, may_name_code, place = expand_toml(value, trusted=trusted, folder=folder)
        if text == value:
            return cls(text, may_name_code, place, source, cure)
        return cls(text, may_name_code, place, value)

    @property
    def text(self) -> str:
        """What it is, for people: the spec, or the name of the object."""
        if isinstance(self.value, str):
            return self.value
        if isinstance(self.value, nn.Module):
            return type(self.value).__qualname__
        return str(getattr(self.value, "__qualname__", type(self.value).__qualname__))


class Specs(NamedTuple):
    """What to evaluate: each a spec, or None if neither the user nor a file gives one."""

    model: SourcedSpec | None
    data: SourcedSpec | None
    loss: SourcedSpec | None
    metrics: tuple[SourcedSpec, ...]


def find_specs(
    settings: Settings, model: Any, first: CheckpointFile | None, planned: Config = NO_CONFIG
) -> Specs:
    """Finds the specs of a run.

    Args:
        settings: The options.
        model: The model that the options or the checkpoint give as an object or a spec, if any.
        first: The checkpoint that is searched next, if any.
        planned: A losscli.toml that is taken to exist with this content, and is trusted.

    Returns:
        The specs.
    """

    def find_all(kind: str, given: Sequence[Any]) -> Iterator[SourcedSpec]:
        return _find_all(kind, given, first, settings.trust, planned)

    def find_one(kind: str, given: Any) -> SourcedSpec | None:
        return next(find_all(kind, () if given is None else (given,)), None)

    return Specs(
        find_one("model", model),
        find_one("data", settings.data),
        find_one("loss", settings.loss),
        tuple(find_all("metric", settings.metric)),
    )


def _find_all(
    kind: str,
    given: Sequence[Any],
    first: CheckpointFile | None,
    trust: bool,
    planned: Config,
) -> Iterator[SourcedSpec]:
    """Finds specs of one kind: options, else the checkpoint's metadata, else a losscli.toml.

    That is the nearest one: in the folder of the checkpoint or above it, else in the current folder
    or above it.

    Yields:
        The specs.
    """
    for value in given:
        yield SourcedSpec.named(value, trusted=True, source=f"--{kind}")
    if given:
        return
    own, places = None, [Path.cwd()]
    if first is not None:
        # Not resolved: in a hub's cache the files of a folder are links to places elsewhere.
        own = first.path
        own = first.folder if own is None else own if own.is_dir() else own.parent
        if f"losscli.{kind}" in first.metadata:
            yield SourcedSpec.named(
                first.metadata[f"losscli.{kind}"],
                trusted=False,
                folder=first.folder,
                source="checkpoint metadata",
            )
            return
        places = [first.folder, Path.cwd()]
    for place in dict.fromkeys(p for folder in places for p in (folder, *folder.parents)):
        file = place / FILE_NAME
        is_planned = file == planned.file
        specs = planned.specs if is_planned else read_config(file) if file.is_file() else {}
        if kind in specs:
            cure = "" if is_planned else cure_for_distrust(file, trust=trust)
            for value in texts_of(specs[kind]):
                yield SourcedSpec.named(
                    value, trusted=not cure, folder=place, source=str(file), cure=cure
                )
            return
        # Beside the checkpoint a config.json of transformers names a model too.
        if kind == "model" and own and place == places[0] and has_config(own):
            yield SourcedSpec(str(Spec(f"transformers:{own}")), trusted=False)
            return
