"""losscli shows what the loss surface of a neural network looks like, from checkpoint files.

import losscli

result = losscli.interpolate("a.pt", "b.pt", model="mlp:784-10", data="mnist:folder")
result.table, result.summary, result.figure()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from losscli._version import __version__

if TYPE_CHECKING:
    from losscli.errors import LosscliError
    from losscli.results import Result
    from losscli.settings import Settings
    from losscli.studies.alignment import align
    from losscli.studies.barriers import barriers
    from losscli.studies.check import check
    from losscli.studies.inspection import export, inspect
    from losscli.studies.interpolation import interpolate
    from losscli.studies.plane import plane
    from losscli.studies.trajectory import trajectory
    from losscli.table import Table

__all__ = [
    "LosscliError",
    "Result",
    "Settings",
    "Table",
    "__version__",
    "align",
    "barriers",
    "check",
    "export",
    "inspect",
    "interpolate",
    "plane",
    "trajectory",
]

_HOME = {
    "LosscliError": "errors",
    "Result": "results",
    "Settings": "settings",
    "Table": "table",
    "align": "studies.alignment",
    "barriers": "studies.barriers",
    "check": "studies.check",
    "export": "studies.inspection",
    "inspect": "studies.inspection",
    "interpolate": "studies.interpolation",
    "plane": "studies.plane",
    "trajectory": "studies.trajectory",
}


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    # Names are handed on when they are asked for (PEP 562), so that `losscli --help` does not
    # wait for torch.
    if name in _HOME:
        return getattr(importlib.import_module(f"losscli.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
