"""Specs of the model, data, loss and metrics: from an option, a checkpoint or a losscli.toml."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
        """Creates a spec; the name of a TOML file is replaced by the spec in the file."""
        if not isinstance(value, str):
            return cls(value, trusted, folder, source)
        text, may_name_code, place = expand_toml(value, trusted=trusted, folder=folder)
        if text == value:
            return cls(text, may_name_code, place, source, cure)
        return cls(text, may_name_code, place, value)

    @property
    def text(self) -> str:
        """The spec, or the name of the object, for messages and the summary."""
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
    objective: SourcedSpec | None
    metrics: tuple[SourcedSpec, ...]


def find_specs(
    settings: Settings, model: Any, first: CheckpointFile | None, planned: Config = NO_CONFIG
) -> Specs:
    """Finds the specs of a run.

    Each is given by an option, else by the checkpoint's metadata, else by the nearest losscli.toml:
    in the folder of the checkpoint or above it, else in the current folder or above it.

    Args:
        settings: The options.
        model: The model that the options or the checkpoint give as an object or a spec, if any.
        first: The checkpoint that is searched next, if any.
        planned: A losscli.toml that is taken to exist with this content, and is trusted.

    Returns:
        The specs.
    """

    def find(kind: str, given: Any, instead: str = "") -> SourcedSpec | None:
        return next(iter(find_all(kind, () if given is None else (given,), instead)), None)

    def find_all(kind: str, given: Sequence[Any], instead: str = "") -> list[SourcedSpec]:
        if given:
            option = f"--{kind}"
            return [SourcedSpec.named(v, trusted=True, source=option) for v in given]
        for source in _sources(first, planned, trust=settings.trust):
            if kind in source.specs:
                return [source.named(text) for text in texts_of(source.specs[kind])]
            if instead in source.specs:
                break
        return []

    # A loss and an objective exclude each other.
    loss, objective = settings.loss, settings.objective
    return Specs(
        find("model", model),
        find("data", settings.data),
        None if objective is not None else find("loss", loss, "objective"),
        None if loss is not None else find("objective", objective, "loss"),
        tuple(find_all("metric", settings.metric)),
    )


class _Source(NamedTuple):
    """A source of specs, and what makes a `SourcedSpec` of one."""

    specs: Mapping[str, str | list[str]]
    named: Callable[[str], SourcedSpec]


def _sources(first: CheckpointFile | None, planned: Config, *, trust: bool) -> Iterator[_Source]:
    """Yields the sources of specs other than options, in their order of precedence."""
    here = Path.cwd()
    places, own = [here], None
    if first is not None:
        places = [first.folder, here]
        # Not resolved: in a hub's cache the files of a folder are links to places elsewhere.
        path = first.path
        own = first.folder if path is None else path if path.is_dir() else path.parent
        prefix = "losscli."
        metadata = first.metadata.items()
        specs: Mapping[str, str | list[str]] = {
            key.removeprefix(prefix): text for key, text in metadata if key.startswith(prefix)
        }
        named = partial(
            SourcedSpec.named, trusted=False, folder=first.folder, source="checkpoint metadata"
        )
        yield _Source(specs, named)
    for place in dict.fromkeys(p for folder in places for p in (folder, *folder.parents)):
        file = place / FILE_NAME
        if file == planned.file:
            yield _Source(planned.specs, _named_by(file, ""))
        elif file.is_file():
            specs = read_config(file)
            yield _Source(specs, _named_by(file, cure_for_distrust(file, trust=trust)))
        # Beside the checkpoint a config.json of transformers names a model too.
        if own is not None and place == places[0] and has_config(own):
            specs = {"model": str(Spec(f"transformers:{own}"))}
            yield _Source(specs, partial(SourcedSpec.named, trusted=False, source="config.json"))


def _named_by(file: Path, cure: str) -> Callable[[str], SourcedSpec]:
    """Returns what makes a `SourcedSpec` of a spec in a losscli.toml."""
    return partial(
        SourcedSpec.named, trusted=not cure, folder=file.parent, source=str(file), cure=cure
    )
