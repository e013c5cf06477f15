"""Store the model and the data of a record, so that losscli needs no options to evaluate it."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from losscli.checkpoint.renaming import is_pretrained
from losscli.data import DATASETS
from losscli.errors import OutputError, SpecError
from losscli.models import FROM_FILES
from losscli.results.result import replace_all
from losscli.spec import Spec, Value, expand_toml, untrusted
from losscli.studies.config import FILE_NAME, config_content, config_line, needs_trust, read_config

__all__ = ["split_specs", "write_config", "write_defaults"]


def split_specs(
    model: str | None, data: str | None, folder: Path
) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the specs that metadata may have, and those that need trust for ``losscli.toml``.

    Args:
        model: The spec of the model, with paths relative to the current folder.
        data: The spec of the data.
        folder: The folder of the record, to which paths in the result are relative.

    Raises:
        SpecError: A spec cannot be parsed, or names an unknown entry or a missing file of code.
        UntrustedCodeError: A TOML file names code.
    """
    metadata, code = {}, {}
    for kind, text in (("model", model), ("data", data)):
        if text is None:
            continue
        expanded, trusted, base = expand_toml(text, trusted=True)
        spec = Spec.parse(expanded)
        runs_code = needs_trust(kind, spec, base)
        if runs_code and not trusted:
            raise untrusted(f"{text} names code or a data set on the hub", kind, spec, "")
        moved = str(_move(spec, kind, Path(base or ""), folder))
        if runs_code:
            code[kind] = moved
        else:
            metadata[f"losscli.{kind}"] = moved
    return metadata, code


def _move(spec: Spec, kind: str, base: Path, folder: Path) -> Spec:
    """Makes the paths in a spec relative to another folder."""

    def move(path: str) -> str:
        return os.path.relpath((base / path).absolute(), folder.resolve())

    name, colon, argument = spec.target.partition(":")
    options: dict[str, Value] = dict(spec.options)
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise SpecError(
                f"{kind} {spec}: there is no file {name}", f"Relative paths start at {Path.cwd()}"
            )
        return Spec(f"{move(name)}{colon}{argument}", options)
    if kind == "model":
        is_path = name in FROM_FILES
    else:
        # A name without a local folder may be a data set on the hub.
        is_path = name in DATASETS and (name != "hf" or (base / argument).exists())
        if is_path and options.get("tokenizer", "bytes") != "bytes":
            options["tokenizer"] = move(str(options["tokenizer"]))
    return Spec(f"{name}:{move(argument)}", options) if is_path and argument else spec


def write_defaults(folder: Path, specs: Mapping[str, str]) -> None:
    """Writes specs that need trust, by kind, to the ``losscli.toml`` of a folder.

    Raises:
        OutputError: The file exists and has others, or cannot be written.
        SpecError: The file exists and cannot be read.
    """
    file = folder / FILE_NAME
    if not specs:
        return
    if file.exists():
        content = read_config(file)
        for kind, text in specs.items():
            if content.get(kind) != text:
                raise OutputError(
                    f"{file} exists, without the line {config_line(kind, text)}",
                    "Add this line, or choose another folder",
                )
        return
    replace_all({file: config_content(specs)})


def write_config(folder: Path, model: nn.Module) -> None:
    """Writes the config.json of a model of transformers, from which losscli builds the model.

    Raises:
        OutputError: The file cannot be written.
    """
    if is_pretrained(model):
        config: Any = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        replace_all({folder / "config.json": config.to_json_string().encode()})
