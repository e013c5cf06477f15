"""Arguments of public functions: taken as they are meant, or refused in one line."""

from __future__ import annotations

import difflib
import functools
import inspect
import operator
import reprlib
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from losscli.errors import UsageError

__all__ = ["checked", "convert", "listed", "require_known", "shown"]

P = ParamSpec("P")
T = TypeVar("T")

# So many names are listed in an error.
_LISTED = 3


def checked(more: type[Any] | None = None) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Makes a function raise `UsageError` where it is called in a way that makes no sense.

    Args:
        more: The dataclass with the fields that ``**settings`` takes, if it does.

    Returns:
        A decorator. By their annotations the function's own arguments are converted, for example
        NumPy numbers, or refused.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)
        # Now, since that evaluates text, which no call of a function that reads files should do.
        hints = get_type_hints(function)
        name = function.__name__
        own = [p.name for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        known = own + [field.name for field in fields(more or _Nothing)]

        @functools.wraps(function)
        def call(*arguments: P.args, **options: P.kwargs) -> T:
            require_known(name, options, known)
            try:
                bound = signature.bind(*arguments, **options)
            except TypeError as error:
                raise UsageError(f"{name}(): {error}", f"See help(losscli.{name})") from None
            for option, value in bound.arguments.items():
                if option in own:
                    bound.arguments[option] = convert(option, value, hints.get(option, Any))
            return function(*bound.args, **bound.kwargs)

        return call

    return decorate


@dataclass(frozen=True)
class _Nothing:
    """No fields."""


def require_known(name: str, options: Iterable[str], known: Sequence[str]) -> None:
    """Makes sure that a function takes the keywords that it is given.

    Args:
        name: The function.
        options: The keywords.
        known: Those that it takes.

    Raises:
        UsageError: One is not known; the error names the one that may be meant.
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


def shown(value: object) -> str:
    """Names a value in an error.

    Args:
        value: The value.

    Returns:
        A text or a number as Python writes it, cut if it is long; of all else the type.
    """
    if value is None or isinstance(value, str | bytes | int | float):
        return reprlib.repr(value)
    kind = type(value).__name__
    return f"{'an' if kind[:1].lower() in 'aeiou' else 'a'} {kind}"


def listed(value: Any) -> list[Any] | None:
    """Lists several values.

    Args:
        value: An iterable of them, such as a list, a generator or an array.

    Returns:
        The values; None for a string and for an object that is not iterable.
    """
    if isinstance(value, str | bytes):
        return None
    try:
        # An array without an axis has a method for that, which raises.
        each = iter(value)
    except TypeError:
        return None
    return list(each)


def convert(option: str, value: Any, hint: Any) -> Any:
    """Takes a value for what an annotation says.

    Args:
        option: The name of the argument.
        value: What it was given.
        hint: The annotation: a union, a tuple or a type.

    Returns:
        The value in the type of the annotation.

    Raises:
        UsageError: It cannot be taken for that.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin in {Union, types.UnionType}:
        if value is None and type(None) in inner:
            return None
        (hint, *_) = others = [one for one in inner if one is not type(None)]
        return value if len(others) > 1 else convert(option, value, hint)
    if origin is tuple and inner[1:] == (...,):
        return _several(option, value, inner[0])
    if origin is tuple:
        return _pair(option, value)
    if origin is Literal:
        hint = str
    take, what = _TAKEN.get(hint, (None, ""))
    if take is not None:
        try:
            return take(value)
        except (TypeError, ValueError, OverflowError):
            raise _refusal(option, what, value) from None
    kind = origin or hint
    if hint is not Any and isinstance(kind, type) and not isinstance(value, kind):
        name = "function" if kind.__name__ == "Callable" else kind.__name__
        raise _refusal(option, f"a {name}", value)
    return value


def _several(option: str, value: Any, hint: Any) -> tuple[Any, ...]:
    """One value or several."""
    if value is None:
        return ()
    # A callable that is not a string, such as a module or a class, is one value.
    values = None if callable(value) else listed(value)
    if isinstance(value, Mapping):
        raise _refusal(option, "a string or a list of them", value)
    return tuple(convert(option, one, hint) for one in ([value] if values is None else values))


def _pair(option: str, value: Any) -> tuple[float, float]:
    what = "two numbers, the lowest and the highest value"
    values = None if isinstance(value, Mapping) else listed(value)
    if values is None:
        raise _refusal(option, what, value)
    if len(values) != 2:
        raise UsageError(f"{option} must be {what}, not {len(values)} numbers")
    low, high = (convert(option, one, float) for one in values)
    return low, high


def _refusal(option: str, what: str, value: object) -> UsageError:
    return UsageError(f"{option} must be {what}, not {shown(value)}")


def _whole(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def _number(value: Any) -> float:
    # An array with one number is not a number, and neither is a string.
    if isinstance(value, bool | str | bytes) or getattr(value, "ndim", None):
        raise TypeError
    return float(value)


def _truth(value: Any) -> bool:
    # NumPy has its own type, with a name that depends on the version.
    if not isinstance(value, bool) and type(value).__name__ not in {"bool", "bool_"}:
        raise TypeError
    return bool(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return str(value)


_TAKEN: Mapping[Any, tuple[Callable[[Any], Any], str]] = {
    bool: (_truth, "True or False"),
    int: (_whole, "a whole number"),
    float: (_number, "a number"),
    str: (_text, "a string"),
}
