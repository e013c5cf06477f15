"""losscli shows the loss surface of a neural network from checkpoint files.

import losscli

result = losscli.interpolate("a.pt", "b.pt", model="mlp:784-10", data="mnist:folder")
result.table, result.summary, result.figure()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from losscli.registry import COMMANDS
from losscli.registry import load as _load

if TYPE_CHECKING:  # "as" exports a name to type checkers, which cannot evaluate __all__ below
    from losscli.errors import LosscliError as LosscliError
    from losscli.recorder.recorder import Recorder as Recorder
    from losscli.results.result import Result as Result
    from losscli.results.runs import load as load
    from losscli.results.runs import plot as plot
    from losscli.settings import Settings as Settings
    from losscli.studies.alignment import align as align
    from losscli.studies.around import around as around
    from losscli.studies.barriers import barriers as barriers
    from losscli.studies.check import check as check
    from losscli.studies.connect import connect as connect
    from losscli.studies.export import export as export
    from losscli.studies.inspection import inspect as inspect
    from losscli.studies.interpolation import interpolate as interpolate
    from losscli.studies.plane import plane as plane
    from losscli.studies.sharpness import sharpness as sharpness
    from losscli.studies.soup import soup as soup
    from losscli.studies.trajectory import trajectory as trajectory
    from losscli.table import Table as Table

__version__ = "0.1.0"

_TARGETS = {
    "LosscliError": "losscli.errors:LosscliError",
    "Recorder": "losscli.recorder:Recorder",
    "Result": "losscli.results.result:Result",
    "Settings": "losscli.settings:Settings",
    "Table": "losscli.table:Table",
    "align": "losscli.studies.alignment:align",
    "export": "losscli.studies.export:export",
    "load": "losscli.results.runs:load",
    "plot": "losscli.results.runs:plot",
    **{name: command.function for name, command in COMMANDS.items()},
}

_NAMES = ("__version__", *_TARGETS)

if not TYPE_CHECKING:
    __all__ = list(_NAMES)


def __dir__() -> list[str]:
    return sorted(_NAMES)


def __getattr__(name: str) -> Any:
    # Lazy imports (PEP 562), so that `losscli --help` does not import torch.
    if name in _TARGETS:
        return _load(_TARGETS[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
