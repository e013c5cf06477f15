"""Pickles read as data: what they name comes from a list of the reader's, and nothing else runs."""

from __future__ import annotations

import io
import pickle
import pickletools
import warnings
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from losscli.errors import one_line

__all__ = ["BrokenPickleError", "ForbiddenPickleError", "load"]

# These get their objects past the list: from the reader's hooks, from a registry of the process.
_TRICKS = {"EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"}
_PERSISTENT = {"PERSID", "BINPERSID"}


class ForbiddenPickleError(Exception):
    """A pickle wants something that is not on the reader's list; nothing of it was run.

    Args:
        wanted: What it wants, ``module.name`` or the pickle's own word for it.

    Attributes:
        wanted: The same.
    """

    def __init__(self, wanted: str) -> None:
        self.wanted = wanted
        super().__init__(f"the pickle wants {wanted}")


class BrokenPickleError(Exception):
    """Bytes are no whole pickle, or what it asks of the listed objects fails."""


class _Unpickler(pickle.Unpickler):  # noqa: S301 - it imports nothing, see find_class
    def __init__(
        self,
        file: io.BytesIO,
        allowed: Mapping[tuple[str, str], object],
        encoding: str,
        persistent: Callable[[Any], object] | None,
    ) -> None:
        super().__init__(file, encoding=encoding)
        self._allowed = allowed
        self._persistent = persistent

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) not in self._allowed:
            raise ForbiddenPickleError(f"{module}.{name}")
        return self._allowed[module, name]

    def persistent_load(self, pid: Any, /) -> Any:
        assert self._persistent is not None  # the scan has seen none
        return self._persistent(pid)


def load(
    content: bytes,
    allowed: Mapping[tuple[str, str], object],
    *,
    encoding: str = "ASCII",
    persistent: Callable[[Any], object] | None = None,
) -> Any:
    """Reads a pickle without importing anything that it names.

    Args:
        content: The bytes; what follows the first whole pickle is left alone.
        allowed: What stands for each ``(module, name)`` in the pickle, to the letter: names of
            Python 2 are not translated. The pickle calls these with arguments of its own and
            sets the attributes of what they return, and their own: list only functions and
            classes made for it that are harmless with any arguments, and constants. What the
            pickle makes without a ``__reduce__`` (opcode NEWOBJ) needs a class.
        encoding: Of the 8-bit strings of Python 2; ``bytes`` leaves them as they are.
        persistent: Gives the object of a persistent id; without it these are refused.

    Returns:
        The object.

    Raises:
        ForbiddenPickleError: It names something else, or uses persistent ids, extension codes or
            buffers from outside.
        BrokenPickleError: It is cut off, no pickle at all, or the listed objects refuse what it
            asks of them.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in the text of protocol 0
            _scan(content, _TRICKS if persistent else _TRICKS | _PERSISTENT)
            return _Unpickler(io.BytesIO(content), allowed, encoding, persistent).load()
    except (ForbiddenPickleError, BrokenPickleError):
        raise
    except Exception as error:  # noqa: BLE001 - a broken pickle makes its reader raise anything
        raise BrokenPickleError(one_line(error)) from None


def _scan(content: bytes, tricks: AbstractSet[str]) -> None:
    """Goes over the opcodes once, so that no length or index in them is believed unseen."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if opcode.name in tricks:
            raise ForbiddenPickleError(f"the opcode {opcode.name}")
        # Picklers number what they remember; the reader allocates a slot for every number below.
        remembers = opcode.name in {"PUT", "BINPUT", "LONG_BINPUT"}
        if remembers and isinstance(argument, int) and argument > count:
            raise ValueError(f"object {argument} is remembered after {count} opcodes")
