"""Inert stand-ins for common objects that training code pickles with tensors."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch

from losscli.checkpoint.size_checks import Immutable, check_sizes

__all__ = ["PATHS", "StandIn", "has_stand_in", "load_tensors"]


class StandIn(metaclass=Immutable):
    """Replaces an object of any class. It only stores the arguments and the state.

    Attributes:
        arguments: The arguments of the constructor.
        state: The argument of ``__setstate__``.
    """

    arguments: tuple[Any, ...]
    state: Any = None

    def __new__(cls, *arguments: Any) -> Self:
        """Stores the arguments."""
        self = super().__new__(cls)
        self.arguments = arguments
        return self

    def __init__(self, *_arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __getitem__(self, name: str) -> Any:
        return self.state.get(name) if isinstance(self.state, dict) else None


def has_stand_in(value: Any) -> bool:
    """Whether a value contains stand-ins, and so differs from what was saved."""
    if isinstance(value, Mapping):
        return any(map(has_stand_in, value.values()))
    if isinstance(value, list | tuple | set):
        return any(map(has_stand_in, value))
    return isinstance(value, StandIn)


def load_tensors(file: Any, *, mmap: bool = False) -> Any:
    """Reads a file of torch with ``weights_only`` and with stand-ins for some other classes.

    Args:
        file: The path of an archive, or a file of any format of torch in memory.
        mmap: Whether to memory-map the tensors instead of reading them.

    Returns:
        The content, on the CPU.

    Raises:
        BrokenPickleError: The file is broken, or states larger tensors than it contains.
    """
    check_sizes(file)
    allowed = [(standin, name) for name, standin in _STAND_INS.items()]
    with warnings.catch_warnings(), torch.serialization.safe_globals(allowed):  # type: ignore[arg-type]
        # Warnings of torch about old formats.
        warnings.simplefilter("ignore")
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)


# The classes themselves are not safe with arbitrary state: numpy.dtype, for example, trusts the
# flags in a pickle. No stand-in imports, opens or calls its arguments.


class _DType(StandIn):
    """A NumPy dtype: its code, such as f8, and the byte order in its state."""


class _Scalar(StandIn):
    """A NumPy scalar, converted to a Python number if its dtype is a plain number."""

    def __new__(cls, *arguments: Any) -> Any:
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


class PathText(StandIn):
    """A path as a string, without access to the disk."""

    def __new__(cls, *parts: Any) -> Any:
        """Joins the parts."""
        return "/".join(map(str, parts)).replace("//", "/", 1)


PATHS = {
    (f"pathlib{module}", name): PathText
    for module in ("", "._local")  # since Python 3.13
    for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")
}
"""The classes of paths, by module and name."""


class _Defaults(StandIn):
    """A plain dictionary for a ``defaultdict``; the factory is never called."""

    def __new__(cls, *_factory: Any) -> Any:
        return {}


_STAND_INS: dict[str, type[StandIn]] = {
    # Namespaces, and arrays, whose values are not read.
    "argparse.Namespace": StandIn,
    "types.SimpleNamespace": StandIn,
    "numpy.ndarray": StandIn,
    "numpy.dtype": _DType,
    "collections.defaultdict": _Defaults,
    # Factories of defaultdict.
    **{f"builtins.{name}": StandIn for name in ("dict", "list", "int", "float", "bool", "str")},
    **{".".join(name): standin for name, standin in PATHS.items()},
    **{
        f"numpy.{core}.multiarray.{name}": standin
        for core in ("core", "_core")  # before NumPy 2, and since
        for name, standin in (("scalar", _Scalar), ("_reconstruct", StandIn))
    },
}
