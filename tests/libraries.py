"""Large libraries that few tests need: each is imported by the first test that uses it.

``conftest.py`` runs these tests one after another, so that usually only one process imports them.
"""

from __future__ import annotations

import gc
import importlib
import sys
from typing import Any

__all__ = ["INSTALLED", "Library", "needed_by"]

# Modules that do not belong to a user's code.
INSTALLED: set[str] = set()


class Library:
    """A module that is imported when one of its attributes is used for the first time."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._module: Any = None

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_"):  # pytest asks each global of a module for some of these
            raise AttributeError(attribute)
        if self._module is None:
            before = {*sys.modules}
            self._module = importlib.import_module(self._name)
            INSTALLED.update(sys.modules.keys() - before)
            gc.freeze()
        return getattr(self._module, attribute)


def needed_by(module: Any) -> bool:
    """Returns whether a module of tests uses such a library."""
    return any(isinstance(value, Library) for value in vars(module).values())
