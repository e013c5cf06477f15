"""Inert stand-ins for a few things that training code pickles beside tensors, and no more."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch

from losscli.checkpoint.size_checks import Fixed, check_sizes

__all__ = ["Path", "Record", "has_record", "load_tensors"]


class Record(metaclass=Fixed):
    """Stands in for an object of any class: keeps what it is built of, and does nothing.

    Attributes:
        arguments: What it was constructed with.
        state: What was set as its state.
    """

    arguments: tuple[Any, ...]
    state: Any = None

    def __new__(cls, *arguments: Any) -> Self:
        """Keeps the arguments, whatever they are.

        Args:
            *arguments: Those of the constructor.

        Returns:
            The record.
        """
        self = super().__new__(cls)
        self.arguments = arguments
        return self

    def __init__(self, *_arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __getitem__(self, name: str) -> Any:
        return self.state.get(name) if isinstance(self.state, dict) else None


def has_record(value: Any) -> bool:
    """Tells whether something that was read is not what was written.

    Args:
        value: What was read.

    Returns:
        Whether it is a record, or a collection that holds one.
    """
    if isinstance(value, Mapping):
        return any(map(has_record, value.values()))
    if isinstance(value, list | tuple | set):
        return any(map(has_record, value))
    return isinstance(value, Record)


def load_tensors(file: Any, *, mmap: bool = False) -> Any:
    """Reads a file of torch with ``weights_only``, and what research code likes to put beside.

    Args:
        file: The path of an archive, or any such file in memory.
        mmap: Whether the tensors are mapped to memory rather than read.

    Returns:
        What it holds, on the CPU.

    Raises:
        BrokenPickleError: It claims to hold more than its size allows, or is broken.
    """
    check_sizes(file)
    allowed = [(standin, name) for name, standin in _HARMLESS.items()]
    with warnings.catch_warnings(), torch.serialization.safe_globals(allowed):  # type: ignore[arg-type]
        # What torch has to say of old formats is of no use to the reader of a curve.
        warnings.simplefilter("ignore")
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)


# Stand-ins, since the things themselves are not all harmless when fed with any state at all
# (numpy.dtype, for one, believes what a pickle says of its flags). None of these imports, opens,
# or calls what it is given.


class _DType(Record):
    """A NumPy type: its code, such as f8, and the byte order in its state."""


class _Scalar(Record):
    """A NumPy number; of a type that its code alone tells, its value."""

    def __new__(cls, *arguments: Any) -> Any:
        """Reads the number.

        Args:
            *arguments: The type and the bytes.

        Returns:
            The number, or a record of what is none.
        """
        record = super().__new__(cls, *arguments)
        dtype, value = arguments if len(arguments) == 2 else (None, None)
        if not isinstance(dtype, _DType) or not isinstance(value, bytes) or not dtype.arguments:
            return record
        code, state = dtype.arguments[0], dtype.state
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else "|"
        plain = isinstance(code, str) and re.fullmatch(r"f[248]|[iu][1248]|b1", code)
        if not plain or order not in {"<", ">", "|", "="}:
            return record
        return np.frombuffer(value, f"{order}{code}", 1)[0].item()


class Path(Record):
    """A path, as text: nobody looks at the disk."""

    def __new__(cls, *parts: Any) -> Any:
        """Joins the parts.

        Args:
            *parts: The parts of the path.

        Returns:
            The text.
        """
        return "/".join(map(str, parts)).replace("//", "/", 1)


class _Defaults(Record):
    """A dictionary with a factory, which is never called: a plain one."""

    def __new__(cls, *_factory: Any) -> Any:
        """Begins an empty dictionary.

        Args:
            *_factory: What would make a missing value.

        Returns:
            The dictionary.
        """
        return {}


_HARMLESS: dict[str, type[Record]] = {
    # Objects of attributes, and arrays, which are of no use here: what they hold stays unread.
    "argparse.Namespace": Record,
    "types.SimpleNamespace": Record,
    "numpy.ndarray": Record,
    "numpy.dtype": _DType,
    "collections.defaultdict": _Defaults,
    # The factories of defaults.
    **{f"builtins.{name}": Record for name in ("dict", "list", "int", "float", "bool", "str")},
    **{
        f"pathlib{module}.{name}": Path
        for module in ("", "._local")  # where Python 3.13 keeps them
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")
    },
    **{
        f"numpy.{core}.multiarray.{name}": standin
        for core in ("core", "_core")  # before NumPy 2, and since
        for name, standin in (("scalar", _Scalar), ("_reconstruct", Record))
    },
}
