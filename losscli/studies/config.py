"""``losscli.toml``: the model, the data and the loss of the checkpoints below it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from losscli.data import DATASETS, is_on_hub
from losscli.errors import SpecError, UntrustedCodeError
from losscli.evaluation.losses.built_in import LOSSES
from losscli.evaluation.losses.metrics import METRICS
from losscli.evaluation.objective_functions import MODEL, returned_losses
from losscli.models import MODELS, RUNS_CODE
from losscli.spec import Spec, look_up, quote, read_toml

__all__ = [
    "FILE_NAME",
    "NO_CONFIG",
    "Config",
    "config_content",
    "config_line",
    "needs_trust",
    "read_config",
    "texts_of",
]

FILE_NAME = "losscli.toml"

_REGISTRIES: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    "model": MODELS,
    "data": DATASETS,
    "loss": LOSSES,
    "objective": {MODEL: returned_losses},
    "metric": METRICS,
}


class Config(NamedTuple):
    """A ``losscli.toml`` that is not written yet.

    Attributes:
        file: Its path.
        specs: A spec for each of its keys; of ``metric`` also a list of specs.
    """

    file: Path
    specs: Mapping[str, str | list[str]]


NO_CONFIG = Config(Path(), {})


def read_config(file: Path) -> dict[str, str | list[str]]:
    """Reads a ``losscli.toml``.

    Args:
        file: The file.

    Returns:
        A spec for each of its keys; of ``metric`` also a list of specs.

    Raises:
        SpecError: The file cannot be read, or has other content.
    """
    content = read_toml(file)
    for key, value in content.items():
        several = isinstance(value, list) and key == "metric" and bool(value)
        texts = value if several else [value]
        if key not in _REGISTRIES or not all(isinstance(text, str) for text in texts):
            *some, last = (f'{known} = "…"' for known in _REGISTRIES)
            raise SpecError(
                f"{file}: {key!r} is not recognised",
                f"It may have the lines {', '.join(some)} and {last}",
            )
    _require_one_loss(content, str(file))
    return content


def _require_one_loss(specs: Mapping[str, Any], where: str) -> None:
    if {"loss", "objective"} <= specs.keys():
        raise SpecError(
            f"{where} names a loss and an objective, which computes the loss itself",
            "Name one of them",
        )


def texts_of(value: str | list[str]) -> list[str]:
    """Returns the specs of a key, one or several."""
    return [value] if isinstance(value, str) else value


def config_line(kind: str, spec: str | list[str]) -> str:
    """Formats a line of a ``losscli.toml``.

    Args:
        kind: The key.
        spec: The spec; of ``metric`` also a list of specs.

    Returns:
        The line, without its end.
    """
    value = quote(spec) if isinstance(spec, str) else f"[{', '.join(map(quote, spec))}]"
    return f"{kind} = {value}"


def config_content(specs: Mapping[str, str | list[str]]) -> bytes:
    """Formats the content of a ``losscli.toml``.

    Args:
        specs: A spec for each key; of ``metric`` also a list of specs.

    Returns:
        The content, which `read_config` reads.

    Raises:
        SpecError: There are a loss and an objective, or the name of a file is not UTF-8.
    """
    _require_one_loss(specs, FILE_NAME)
    try:
        return "".join(f"{config_line(*item)}\n" for item in specs.items()).encode()
    except UnicodeEncodeError:
        raise SpecError(
            f"a losscli.toml is UTF-8, and a name in {', '.join(map(str, specs.values()))} is not",
            "Rename the file",
        ) from None


def needs_trust(kind: str, spec: Spec, folder: Path | None) -> bool:
    """Returns whether a spec in a file is refused unless the file is trusted.

    Args:
        kind: ``model``, ``data``, ``loss``, ``objective`` or ``metric``.
        spec: The spec.
        folder: The folder of relative paths; None for the current folder.

    Returns:
        Whether it names code or a data set on the hub.

    Raises:
        SpecError: No entry of the registry has this name.
    """
    try:
        look_up(spec, _REGISTRIES[kind], kind, trusted=False, folder=folder, runs_code=RUNS_CODE)
    except UntrustedCodeError:
        return True
    return kind == "data" and is_on_hub(spec, folder)
