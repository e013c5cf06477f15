"""What each process that runs tests prepares: it saves time, or makes all machines the same."""

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

# What hypothesis says of an example that takes long would depend on what else the machine does.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


# The commands that there are, and their options, are the same in every run of a process.
app.make_app = functools.cache(app.make_app)
typer.main.get_command = functools.cache(typer.main.get_command)

# The code of the tests and of their environment does not change while they run, so that a run need
# not compute the digests of several hundred files.
_INSTALLED = (
    *spec._library_folders(),
    *(
        f"{folder}{os.sep}"
        for folder in (Path(__file__).resolve().parent, Path(sys.prefix).resolve())
    ),
)
spec._library_folders = lambda: _INSTALLED

# For devices that are not there, torch.manual_seed keeps the stack of each call, deep as it is.
if not torch.cuda.is_available():
    for _device in (torch.cuda, torch.xpu, torch.mtia):
        _device._is_in_bad_fork = lambda: True

# Figures of all tests measure the same texts, each with a renderer of its own.
_measure = backend_agg.RendererAgg.get_text_width_height_descent
_measured: dict[tuple[Any, ...], Any] = {}


def _measure_once(self: Any, s: str, prop: Any, ismath: Any) -> Any:
    key = s, prop, ismath, self.dpi, backend_agg.get_hinting_flag()
    if key not in _measured:
        _measured[key] = _measure(self, s, prop, ismath)
    return _measured[key]


backend_agg.RendererAgg.get_text_width_height_descent = _measure_once


def collected() -> None:
    """Leaves what is imported by now out of the search for a user's code."""
    libraries.INSTALLED.update(sys.modules)
    spec._modules = lambda: sys.modules.keys() - libraries.INSTALLED
