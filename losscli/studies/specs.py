"""Specs of the model, data and loss: from the command line, a checkpoint or a losscli.toml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from losscli.checkpoint import CheckpointFile
from losscli.errors import SpecError
from losscli.models import has_config
from losscli.settings import Settings
from losscli.spec import Spec, expand_toml, read_toml

__all__ = ["SourcedSpec", "Specs", "find", "find_specs"]


@dataclass(frozen=True)
class SourcedSpec:
    """A spec, who named it, what its relative paths are relative to, and where it came from."""

    value: Any
    trusted: bool
    folder: Path | None = None
    source: str = ""

    @classmethod
    def named(
        cls, value: Any, *, trusted: bool, folder: Path | None = None, source: str = ""
    ) -> SourcedSpec:
        """Takes what was named: where that is a TOML file, what the file says."""
        if not isinstance(value, str):
            return cls(value, trusted, folder, source)
        text, may_name_code, place = expand_toml(value, trusted=trusted, folder=folder)
        return cls(text, may_name_code, place, source if text == value else value)

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


def find_specs(settings: Settings, model: Any, first: CheckpointFile | None) -> Specs:
    """Finds the specs of a run.

    Args:
        settings: The options.
        model: The model that the options or the checkpoint give as an object or a spec, if any.
        first: The checkpoint that is searched next, if any.

    Returns:
        The specs.
    """
    given = {"model": model, "data": settings.data, "loss": settings.loss}
    return Specs(**{kind: find(kind, value, first) for kind, value in given.items()})


def find(kind: str, given: Any, first: CheckpointFile | None) -> SourcedSpec | None:
    """Finds a spec: the option, then the checkpoint's metadata, then the nearest losscli.toml.

    Args:
        kind: ``model``, ``data`` or ``loss``.
        given: What the option says; None where it is not given.
        first: The checkpoint that is searched next, if any.

    Returns:
        The spec; None if there is none.
    """
    if given is not None:
        return SourcedSpec.named(given, trusted=True, source=f"--{kind}")
    if first is None:
        return None
    folder = first.folder
    # Not resolved: in a hub's cache the files of a folder are links to places elsewhere.
    path = first.path
    own = folder if path is None else path if path.is_dir() else path.parent
    if f"losscli.{kind}" in first.metadata:
        own_spec = first.metadata[f"losscli.{kind}"]
        return SourcedSpec.named(
            own_spec, trusted=False, folder=folder, source="checkpoint metadata"
        )
    for place in (folder, *folder.parents):
        file = place / "losscli.toml"
        if file.is_file():
            value = _read_toml(file).get(kind)
            if value is not None:
                return SourcedSpec.named(value, trusted=False, folder=place, source=str(file))
        # Beside the checkpoint a config.json of transformers names a model too.
        if kind == "model" and place == folder and has_config(own):
            return SourcedSpec(str(Spec(f"transformers:{own}")), trusted=False)
    return None


def _read_toml(file: Path) -> dict[str, str]:
    content = read_toml(file)
    for key, value in content.items():
        if key not in {"model", "data", "loss"} or not isinstance(value, str):
            raise SpecError(
                f"{file}: {key!r} is not recognised",
                'It may have the lines model = "…", data = "…" and loss = "…"',
            )
    return content
