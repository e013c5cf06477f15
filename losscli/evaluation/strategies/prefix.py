"""The results of a forward pass before its first use of a moving tensor, kept for all points.

Until then nothing depends on the point: every call of a function of torch has the same arguments
and the same result. So the calls of one pass are recorded, and in the passes at other points each
returns its recorded result. The model's own code runs at every point. A call with other arguments
than those that were recorded ends the pass with `PrefixChanged`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from losscli.errors import ModelError
from losscli.evaluation.function_mode import FunctionMode

__all__ = ["Prefix", "PrefixChanged", "PrefixRecorder"]

_Key = tuple[Any, ...]
"""Identifies an argument: a result by its number, a model's tensor by its name."""

# Values that are equal if they have the same type and compare equal.
_PLAIN = (
    bool, int, float, str, type(None), type(Ellipsis), torch.dtype, torch.device,
    torch.memory_format, torch.layout,
)  # fmt: skip


class PrefixChanged(BaseException):
    """Ends a forward pass that does not begin with the recorded calls.

    Not an `Exception`, so that no error handler in the model catches it.
    """


class _UnknownError(Exception):
    """An argument that cannot be compared."""


@dataclass(frozen=True)
class _Call:
    function: Callable[..., Any]
    arguments: _Key
    result: Any


@dataclass(frozen=True)
class Prefix:
    """The calls before the first use of a moving tensor.

    Attributes:
        calls: The calls with their results. A result that the pass had released by then is an
            empty tensor of its shape.
        keys: The key of each result by its id.
        versions: The results that the rest of the pass may use, with their versions.
    """

    calls: tuple[_Call, ...]
    keys: Mapping[int, _Key]
    versions: tuple[tuple[Tensor, int], ...]

    def replay(self, tensors: Mapping[str, Tensor]) -> FunctionMode:
        """Returns the results of recorded calls instead of making them, in a context."""
        return _Replay(self, {id(tensor): name for name, tensor in tensors.items()})

    def check_unmodified(self) -> None:
        """Checks after a pass that it has not modified results that other passes use.

        Raises:
            ModelError: It has.
        """
        if any(tensor._version != version for tensor, version in self.versions):
            raise ModelError(
                "the model modifies in place a result from before its first moving tensor"
            )


class PrefixRecorder:
    """Records calls until the first use of a moving tensor.

    Args:
        tensors: The model's tensors by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._names = {id(tensor): name for name, tensor in tensors.items()}
        self._calls: list[_Call] = []
        # Weak, since an intermediate result that the model releases is not needed again.
        self._results: list[weakref.ref[Tensor]] = []
        self._kinds: list[tuple[torch.Size, torch.dtype, torch.device]] = []
        self._keys: dict[int, _Key] = {}
        self._external: dict[int, Tensor] = {}
        self._has_layer = False
        self._kept: list[Tensor | None] | None = None
        self._versions: list[tuple[Tensor, int]] = []

    def record(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Makes a call, records it and returns its result."""
        if self._kept is not None:
            return function(*args, **kwargs)
        try:
            key = _key((args, kwargs), self._key_of)
        except _UnknownError:
            self._end()
            return function(*args, **kwargs)
        if _modifies(function, kwargs) and not (args and self._is_result(args[0])):
            # Memory that outlives the pass, which the call has to change again.
            self._end()
            return function(*args, **kwargs)
        result = function(*args, **kwargs)
        try:
            self._calls.append(_Call(function, key, self._keep(result)))
        except _UnknownError:
            self._end()
        return result

    def finish(self) -> Prefix | None:
        """Ends the recording; returns None if no layer of the model lies in the prefix."""
        if self._kept is None:
            self._end()
        if not self._has_layer or self._kept is None:
            return None
        results = [
            torch.empty((), dtype=dtype, device=device).expand(shape) if tensor is None else tensor
            for tensor, (shape, dtype, device) in zip(self._kept, self._kinds, strict=True)
        ]
        calls = tuple(
            _Call(call.function, call.arguments, _restored(call.result, results))
            for call in self._calls
        )
        keys: dict[int, _Key] = {
            id(tensor): ("object", id(tensor)) for tensor in self._external.values()
        }
        keys |= {id(tensor): ("result", i) for i, tensor in enumerate(results)}
        return Prefix(calls, keys, tuple(self._versions))

    def _end(self) -> None:
        """Keeps the results that the rest of the pass may use: those that the model still has."""
        self._kept = [reference() for reference in self._results]
        used = (tensor for tensor in (*self._kept, *self._external.values()) if tensor is not None)
        self._versions = [(tensor, tensor._version) for tensor in used]

    def _is_result(self, value: Any) -> bool:
        key = self._keys.get(id(value))
        return key is not None and self._results[key[1]]() is value

    def _key_of(self, tensor: Tensor) -> _Key:
        if self._is_result(tensor):
            return self._keys[id(tensor)]
        if id(tensor) in self._names:
            self._has_layer = True
            return "tensor", self._names[id(tensor)]
        self._external[id(tensor)] = tensor
        return "object", id(tensor)

    def _keep(self, result: Any) -> Any:
        """Registers the tensors of a result; returns it with their numbers in their place."""
        if isinstance(result, Tensor):
            if id(result) in self._external:
                return result
            if id(result) in self._names:
                raise _UnknownError
            if not self._is_result(result):
                self._keys[id(result)] = ("result", len(self._results))
                self._results.append(weakref.ref(result))
                self._kinds.append((result.shape, result.dtype, result.device))
            return _Number(self._keys[id(result)][1])
        if type(result) is tuple:
            return tuple(map(self._keep, result))
        if isinstance(result, (*_PLAIN, torch.Size)):
            return result
        raise _UnknownError


@dataclass(frozen=True)
class _Number:
    """Stands for a result."""

    number: int


def _restored(value: Any, results: list[Tensor]) -> Any:
    if isinstance(value, _Number):
        return results[value.number]
    if type(value) is tuple:
        return tuple(_restored(item, results) for item in value)
    return value


def _modifies(function: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call may modify its first argument, by the naming of torch."""
    name = getattr(function, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    operator = name.startswith("__i") or name in {"__setitem__", "__set__", "__delete__"}
    return in_place or operator or "out" in kwargs or bool(kwargs.get("inplace"))


def _key(value: Any, key_of: Callable[[Tensor], _Key]) -> _Key:
    """Returns a key that equal arguments share."""
    if isinstance(value, Tensor):
        return key_of(value)
    if isinstance(value, tuple | list):
        return (type(value), *(_key(item, key_of) for item in value))
    if isinstance(value, Mapping):
        return (type(value), *((name, _key(item, key_of)) for name, item in value.items()))
    if isinstance(value, slice):
        return (slice, *(_key(x, key_of) for x in (value.start, value.stop, value.step)))
    if isinstance(value, _PLAIN):
        return type(value), value
    raise _UnknownError


class _Replay(FunctionMode):
    def __init__(self, prefix: Prefix, names: Mapping[int, str]) -> None:
        super().__init__()
        self._prefix = prefix
        self._names = names
        self._done = 0

    def intercept(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        if self._done == len(self._prefix.calls):
            return function(*args, **kwargs)
        call = self._prefix.calls[self._done]
        try:
            same = (
                function == call.function and _key((args, kwargs), self._key_of) == call.arguments
            )
        except _UnknownError:
            same = False
        if not same:
            raise PrefixChanged
        self._done += 1
        return call.result

    def _key_of(self, tensor: Tensor) -> _Key:
        if id(tensor) in self._prefix.keys:
            return self._prefix.keys[id(tensor)]
        if id(tensor) in self._names:
            return "tensor", self._names[id(tensor)]
        raise _UnknownError
