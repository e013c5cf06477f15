"""Imports large packages in less time than the statement alone."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from losscli.registry import load

__all__ = ["import_plotting", "importing"]


@contextmanager
def importing(package: str) -> Iterator[None]:
    """Imports without garbage collection.

    The objects that modules make live as long as the process, but the collector visits them again
    and again while they are made, and once more when the process ends: for torch a quarter of the
    time. Objects that exist at the end of the context are exempt from collection.

    Args:
        package: What is imported. If it is imported already, nothing changes.
    """
    if package in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def import_plotting() -> None:
    """Imports Matplotlib without garbage collection and the lists of properties in its docstrings.

    Matplotlib inspects each class for the docstring of its ``set``, a quarter of the time.
    """
    if "matplotlib.artist" in sys.modules:
        return
    with importing("matplotlib.artist"):
        from matplotlib import artist as artists

        kwdoc, artists.kwdoc = artists.kwdoc, _no_properties
        try:
            load("losscli.plotting.style:render")
        finally:
            artists.kwdoc = kwdoc


def _no_properties(artist: object) -> str:
    del artist
    return ""
