"""``losscli list``: the built-in models, data sets, losses and metrics."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import typer

from losscli.cli.console import Console
from losscli.cli.imports import importing
from losscli.cli.options import with_console

__all__ = ["catalogue"]


@with_console
def catalogue(
    kind: Annotated[
        Literal["models", "data", "losses", "metrics"],
        typer.Argument(help="What to list.", show_default=False),
    ],
    console: Console,
) -> None:
    """List the built-in models, data sets, losses or metrics, with their keys."""
    with importing("torch"):
        from losscli.data import DATASETS
        from losscli.evaluation.losses.built_in import LOSSES
        from losscli.evaluation.losses.metrics import METRICS
        from losscli.models import MODELS

    registries: dict[str, Mapping[str, Callable[..., Any]]] = {
        "models": MODELS,
        "data": DATASETS,
        "losses": LOSSES,
        "metrics": METRICS,
    }
    lines = []
    for name, function in registries[kind].items():
        keys = [
            f",{p.name}={'' if p.default is None else str(p.default).lower()}"
            for p in inspect.signature(function).parameters.values()
            if p.kind is p.KEYWORD_ONLY
        ]
        argument = {"models": ":SIZES", "data": ":PATH"}.get(kind, "")
        argument = {"transformers": ":FOLDER", "pt2": ":FILE"}.get(name, argument)
        about = (inspect.getdoc(function) or "").partition("\n")[0].replace("``", "`")
        lines.append(f"{name}{argument}{''.join(keys)}\n    {about}\n")
    if kind == "data":
        lines.append("keys of all data sets: mean=, std= (per channel), flatten=true, limit=N\n")
    lines.append("or your own code: package.module:callable, path/to/file.py:callable\n")
    console.result("".join(lines))
