"""Read pickles safely: each global name is replaced by an object from a list of the caller."""

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

# These opcodes bypass the list: they get objects from hooks or from the extension registry.
_FORBIDDEN_OPCODES = {"EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"}
_PERSISTENT_OPCODES = {"PERSID", "BINPERSID"}


class ForbiddenPickleError(Exception):
    """A pickle requests an object that is not on the list. Nothing in it was run.

    Args:
        wanted: The requested object: ``module.name``, or the name of an opcode.

    Attributes:
        wanted: The requested object.
    """

    def __init__(self, wanted: str) -> None:
        self.wanted = wanted
        super().__init__(f"the pickle wants {wanted}")


class BrokenPickleError(Exception):
    """A pickle is invalid or incomplete, or an operation on a listed object failed."""


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
        try:
            return self._allowed[module, name]
        except KeyError:
            raise ForbiddenPickleError(f"{module}.{name}") from None

    def persistent_load(self, pid: Any, /) -> Any:
        assert self._persistent is not None  # the scan refuses these opcodes otherwise
        return self._persistent(pid)


def load(
    content: bytes,
    allowed: Mapping[tuple[str, str], object],
    *,
    encoding: str = "ASCII",
    persistent: Callable[[Any], object] | None = None,
) -> Any:
    """Reads a pickle without importing anything.

    Args:
        content: The bytes. Bytes after the first complete pickle are ignored.
        allowed: The object for each ``(module, name)`` in the pickle. Names of Python 2 are not
            translated. The pickle may call these objects with any arguments, and may set
            attributes on them and on the results. List only constants, and functions and classes
            that are written for this and safe with any arguments. Objects that the pickle creates
            with the opcode NEWOBJ need a class.
        encoding: The encoding of 8-bit strings of Python 2; ``bytes`` keeps them as bytes.
        persistent: Maps a persistent id to its object. If None, persistent ids are refused.

    Returns:
        The object.

    Raises:
        ForbiddenPickleError: The pickle names another object, or uses persistent ids, extension
            codes or out-of-band buffers.
        BrokenPickleError: The pickle is invalid or incomplete, or a listed object raised an error.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes in strings of protocol 0
            _scan(
                content,
                _FORBIDDEN_OPCODES if persistent else _FORBIDDEN_OPCODES | _PERSISTENT_OPCODES,
            )
            return _Unpickler(io.BytesIO(content), allowed, encoding, persistent).load()
    except (ForbiddenPickleError, BrokenPickleError):
        raise
    except Exception as error:  # noqa: BLE001 - a broken pickle makes its reader raise anything
        raise BrokenPickleError(one_line(error)) from None


def _scan(content: bytes, forbidden: AbstractSet[str]) -> None:
    """Checks all opcodes, their lengths and their memo indices before the pickle is read."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if opcode.name in forbidden:
            raise ForbiddenPickleError(f"the opcode {opcode.name}")
        # Memo indices are consecutive, and the reader allocates a slot for each up to the largest.
        memoises = opcode.name in {"PUT", "BINPUT", "LONG_BINPUT"}
        if memoises and isinstance(argument, int) and argument > count:
            raise ValueError(f"object {argument} is remembered after {count} opcodes")
