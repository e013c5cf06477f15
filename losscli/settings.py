"""The settings of all studies, and the checks of the arguments of public functions."""

from __future__ import annotations

import difflib
import functools
import inspect
import operator
import os
import reprlib
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import (
    Any,
    Literal,
    ParamSpec,
    Self,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from losscli.errors import UsageError

__all__ = [
    "Buffers",
    "DType",
    "PathLike",
    "Progress",
    "Settings",
    "as_list",
    "checked",
    "convert",
    "describe",
    "require_known",
]

DType = Literal["float32", "float64", "bfloat16", "float16"]
Buffers = Literal["interpolate", "a", "b", "recalibrate"]
PathLike = str | os.PathLike[str]
Progress = bool | Callable[[float], None] | None

P = ParamSpec("P")
T = TypeVar("T")

# Maximum number of names in an error.
_LISTED = 3


@dataclass(frozen=True)
class Settings:
    """The settings of every study.

    Specs are strings as on the command line, and may name code. From Python, a model may be an
    ``nn.Module`` (which is copied and never changed), data a mapping from split names to
    ``(inputs, targets)``, a DataLoader or a Dataset, and a loss or metric a function from outputs
    and targets to one number per example.

    Attributes:
        model: The architecture; None takes it from the checkpoints' metadata or ``losscli.toml``.
        data: The data set; None as for ``model``.
        loss: The per-example loss; None as for ``model``, else by the task of the data.
        objective: A function from the model and a batch to one number per example, instead of a
            loss; ``model`` for the loss that the model itself returns for a batch, which
            implies ``batch_loss``. None as for ``model``, else for a loss.
        metric: The metrics; ``("none",)`` for none; empty as for ``model``, else for those of the
            task of the data, or none with an objective.
        split: The splits; empty for all.
        limit: The number of examples of each split, or of batches with ``batch_loss``, drawn once
            with the seed; None for all.
        batch_size: Examples per forward pass; None chooses it for the device. With ``batch_loss``,
            examples per batch of data that are not a DataLoader.
        batch_loss: Whether the loss is one number per batch. The batches of a DataLoader are kept,
            their order is drawn once, and each batch has the same weight.
        stochastic: The number of seeds of a model that is random on purpose: every loss is the mean
            over them, with the same seeds for every batch and point. None for no randomness.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
        dtype: The dtype of the forward pass; sums are always float64.
        tf32: Whether a GPU may round float32 products to TF32.
        sampling_error: If a number, examples are evaluated in a random order in growing blocks,
            until the standard error of the loss at every point is below this fraction of the
            height of the curve; None evaluates all.
        buffers: Whether floating-point buffers move with the parameters, stay at A or B, or move
            except for BatchNorm statistics, which are re-estimated at every point.
        only: Patterns of the tensors that move; empty for all.
        except_: Patterns of the tensors that stay at A.
        ignore_unexpected: Whether tensors of a checkpoint that the model does not have are ignored.
        allow_missing: Patterns of tensors of the model that a checkpoint may lack; they keep the
            model's initial values.
        rename: Renames of the tensors of the checkpoints, ``OLD=NEW``: each replaces the first
            run of components OLD in a name, such as ``fc=head`` in ``fc.weight``.
        seed: The seed of all random choices.
        trust: Whether a ``losscli.toml`` may name code, which is then run.
    """

    model: Any = None
    data: Any = None
    loss: Any = None
    objective: Any = None
    metric: tuple[Any, ...] = ()
    split: tuple[str, ...] = ()
    limit: int | None = None
    batch_size: int | None = None
    batch_loss: bool = False
    stochastic: int | None = None
    device: str = "auto"
    dtype: DType = "float32"
    tf32: bool = False
    sampling_error: float | None = None
    buffers: Buffers = "interpolate"
    only: tuple[str, ...] = ()
    except_: tuple[str, ...] = ()
    ignore_unexpected: bool = False
    allow_missing: tuple[str, ...] = ()
    rename: tuple[str, ...] = ()
    seed: int = 0
    trust: bool = False

    def __new__(cls, *_: Any, **options: Any) -> Self:
        """Rejects unknown keywords."""
        require_known(cls.__name__, options, [field.name for field in fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Converts values of other types, or rejects them."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in {"device", "dtype"} and type(value).__module__ == "torch":
                value = str(value).removeprefix("torch.")
            if field.name in {"model", "data", "loss", "objective"} and isinstance(
                value, os.PathLike
            ):
                value = os.fspath(value)
            object.__setattr__(self, field.name, convert(field.name, value, _HINTS[field.name]))
        for name, values in {
            "model": (self.model,),
            "loss": (self.loss,),
            "objective": (self.objective,),
            "metric": self.metric,
        }.items():
            for value in values:
                if value is not None and not isinstance(value, str) and not callable(value):
                    raise UsageError(
                        f"{name} must be a string or a function, not {describe(value)}",
                        f"Give a spec of the {name} as on the command line, or a function",
                    )
        if isinstance(self.objective, str) and self.objective == "model":
            # The loss that a model returns is one number per batch.
            object.__setattr__(self, "batch_loss", True)


def checked(more: type[Any] | None = None) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Makes a function raise `UsageError` for invalid arguments.

    Args:
        more: The dataclass with the fields that ``**settings`` accepts; None if it has none.

    Returns:
        A decorator that converts the arguments to their annotations, for example NumPy numbers,
        or rejects them.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)
        # Without the return type, which may be imported for type checkers only.
        parameter_hints = {k: v for k, v in function.__annotations__.items() if k != "return"}
        hints = get_type_hints(
            types.SimpleNamespace(__annotations__=parameter_hints), function.__globals__
        )
        # A class is called by its own name.
        name = function.__qualname__.removesuffix(".__init__").rpartition("<locals>.")[2]
        parameters = [
            p.name
            for p in signature.parameters.values()
            if p.kind is not p.VAR_KEYWORD and p.name != "self"
        ]
        known = parameters + [field.name for field in fields(more or _NoFields)]

        @functools.wraps(function)
        def call(*arguments: P.args, **options: P.kwargs) -> T:
            require_known(name, options, known)
            try:
                bound = signature.bind(*arguments, **options)
            except TypeError as error:
                raise UsageError(f"{name}(): {error}", f"See help(losscli.{name})") from None
            for option, value in bound.arguments.items():
                if option in parameters:
                    bound.arguments[option] = convert(option, value, hints.get(option, Any))
            return function(*bound.args, **bound.kwargs)

        defaults = (more or _NoFields)()
        # help() shows the fields instead of ``**settings``, and notebooks complete them.
        vars(call)["__signature__"] = signature.replace(
            parameters=[
                *(p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD),
                *(
                    inspect.Parameter(
                        f.name,
                        inspect.Parameter.KEYWORD_ONLY,
                        default=getattr(defaults, f.name),
                        annotation=f.type,
                    )
                    for f in fields(defaults)
                ),
            ]
        )
        return call

    return decorate


@dataclass(frozen=True)
class _NoFields:
    """No fields."""


def require_known(name: str, options: Iterable[str], known: Sequence[str]) -> None:
    """Checks the keywords of a call.

    Args:
        name: The name of the function.
        options: The keywords.
        known: The keywords that the function accepts.

    Raises:
        UsageError: A keyword is unknown; the error suggests a similar one.
    """
    for option in options:
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            raise UsageError(
                f"{name}() has no argument {option!r}",
                f"Did you mean {close[0]!r}?"
                if close
                else f"It takes {', '.join(known[:_LISTED])} and {len(known) - _LISTED} more: see "
                f"help(losscli.{name})",
            )


def describe(value: object) -> str:
    """Describes a value in an error.

    Args:
        value: The value.

    Returns:
        The shortened repr of a string or number; the type of any other value.
    """
    if value is None or isinstance(value, str | bytes | int | float):
        return reprlib.repr(value)
    kind = type(value).__name__
    return f"{'an' if kind[:1].lower() in 'aeiou' else 'a'} {kind}"


def as_list(value: Any) -> list[Any] | None:
    """Converts an iterable to a list.

    Args:
        value: A value, such as a list, a generator or an array.

    Returns:
        The items; None for a string and for an object that is not iterable.
    """
    if isinstance(value, str | bytes):
        return None
    try:
        # An array without dimensions has __iter__, which raises.
        items = iter(value)
    except TypeError:
        return None
    return list(items)


def convert(option: str, value: Any, hint: Any) -> Any:
    """Converts a value to the type of an annotation.

    Args:
        option: The name of the argument.
        value: The value.
        hint: The annotation: a union, a tuple or a type.

    Returns:
        The converted value.

    Raises:
        UsageError: The value cannot be converted.
    """
    converter, what = _CONVERTERS.get(hint, (None, ""))
    if converter is not None:
        try:
            return converter(value)
        except (TypeError, ValueError, OverflowError):
            raise _refusal(option, what, value) from None
    origin, inner = get_origin(hint), get_args(hint)
    if origin in {Union, types.UnionType}:
        if value is None and type(None) in inner:
            return None
        others = tuple(other for other in inner if other is not type(None))
        hint = functools.reduce(operator.or_, others)
        if len(others) > 1 and hint not in _CONVERTERS:
            return value
        return convert(option, value, hint)
    if origin is tuple and inner[1:] == (...,):
        return _several(option, value, inner[0])
    if origin is tuple:
        return _pair(option, value)
    if origin is Literal:
        return convert(option, value, str)
    kind = origin or hint
    if hint is not Any and isinstance(kind, type) and not isinstance(value, kind):
        name = "function" if kind.__name__ == "Callable" else kind.__name__
        raise _refusal(option, f"a {name}", value)
    return value


def _several(option: str, value: Any, hint: Any) -> tuple[Any, ...]:
    """Converts one value or several to a tuple."""
    if value is None:
        return ()
    # A callable that is not a string, such as a module or a class, is one value.
    values = None if callable(value) else as_list(value)
    if isinstance(value, Mapping):
        raise _refusal(option, "a string or a list of them", value)
    return tuple(convert(option, item, hint) for item in ([value] if values is None else values))


def _pair(option: str, value: Any) -> tuple[float, float]:
    what = "two numbers"
    values = None if isinstance(value, Mapping) else as_list(value)
    if values is None:
        raise _refusal(option, what, value)
    if len(values) != 2:
        raise UsageError(f"{option} must be {what}, not {len(values)} numbers")
    low, high = (convert(option, item, float) for item in values)
    return low, high


def _refusal(option: str, what: str, value: object) -> UsageError:
    return UsageError(f"{option} must be {what}, not {describe(value)}")


def _whole(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def _number(value: Any) -> float:
    # An array with one number is not a number, and neither is a string.
    if isinstance(value, bool | str | bytes) or getattr(value, "ndim", None):
        raise TypeError
    return float(value)


def _boolean(value: Any) -> bool:
    # The name of NumPy's bool type depends on the version.
    if not isinstance(value, bool) and type(value).__name__ not in {"bool", "bool_"}:
        raise TypeError
    return bool(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return str(value)


def _progress(value: Any) -> Any:
    return value if value is None or callable(value) else _boolean(value)


_CONVERTERS: Mapping[Any, tuple[Callable[[Any], Any], str]] = {
    bool: (_boolean, "True or False"),
    int: (_whole, "a whole number"),
    float: (_number, "a number"),
    str: (_text, "a string"),
    PathLike: (os.fsdecode, "a path"),
    Progress: (_progress, "True, False or a function"),
}

_HINTS = get_type_hints(Settings)
