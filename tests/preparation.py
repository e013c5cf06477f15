"""Prepares a process that runs tests, to save time and to give the same result on all machines."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Any

import torch
import typer.main
from hypothesis import HealthCheck, settings
from matplotlib.backends import backend_agg

from losscli import spec
from losscli.cli import app
from tests import libraries

__all__ = ["collected"]

# Whether an example takes too long for Hypothesis would depend on the load of the machine.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


# Commands and their options do not change within a process.
app.make_app = functools.cache(app.make_app)
typer.main.get_command = functools.cache(typer.main.get_command)

# The code of the tests and of their environment does not change while they run, so its several
# hundred files need no digests.
_INSTALLED = (
    *spec._library_folders(),
    *(
        f"{folder}{os.sep}"
        for folder in (Path(__file__).resolve().parent, Path(sys.prefix).resolve())
    ),
)
spec._library_folders = lambda: _INSTALLED

# For devices that are not available, torch.manual_seed stores the stack trace of each call.
if not torch.cuda.is_available():
    for _device in (torch.cuda, torch.xpu, torch.mtia):
        _device._is_in_bad_fork = lambda: True

# Figures of different tests measure the same texts, each with its own renderer.
_measure = backend_agg.RendererAgg.get_text_width_height_descent
_measured: dict[tuple[Any, ...], Any] = {}


def _measure_once(self: Any, s: str, prop: Any, ismath: Any) -> Any:
    key = s, prop, ismath, self.dpi, backend_agg.get_hinting_flag()
    if key not in _measured:
        _measured[key] = _measure(self, s, prop, ismath)
    return _measured[key]


backend_agg.RendererAgg.get_text_width_height_descent = _measure_once


def collected() -> None:
    """Excludes the modules that are imported so far from the search for a user's code."""
    libraries.INSTALLED.update(sys.modules)
    spec._modules = lambda: sys.modules.keys() - libraries.INSTALLED
