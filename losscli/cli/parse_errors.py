"""Replaces the errors of the command-line parser by those of losscli."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, Union, get_args, get_origin

import typer

from losscli.cli.app import NAMES
from losscli.errors import UsageError
from losscli.settings import describe

__all__ = ["usage_error"]


def usage_error(error: Any, arguments: Sequence[str]) -> UsageError:
    """Returns the error to report instead of an exception of the parser.

    The parser's own message about a value depends on the version of typer, and may be Pydantic's.

    Args:
        error: The exception, a ``ClickException``.
        arguments: The arguments without the program name.

    Returns:
        The error. If a value is wrong, it says what the option takes and what was given.
    """
    what = error.format_message()
    parameter, context = (getattr(error, key, None) for key in ("param", "ctx"))
    unknown, repeatable = hasattr(error, "possibilities"), False
    name = None if unknown else getattr(error, "option_name", None)
    # A missing parameter is reported by a subclass.
    if type(error) is typer.BadParameter and parameter and context:
        name = parameter.opts[-1]
        signature = inspect.signature(context.command.callback, eval_str=True)
        kind, number = _kind_of(signature.parameters[parameter.name].annotation)
        given = list(_values(parameter, arguments))
        wrong = next((value for value in given if not _fits(value, kind)), " ".join(given))
        what = f"{name} must be {_describe_kind(kind, number)}, not {describe(wrong)}"
        repeatable = parameter.multiple
        if number == 1 and not repeatable:
            name = None
    command = [word for word in arguments[:1] if word in NAMES]
    help_ = f"See {' '.join(['losscli', *command, '--help'])}"
    return UsageError(what, _comma_hint(name, arguments, repeatable=repeatable) or help_)


def _kind_of(hint: Any) -> tuple[Any, int]:
    """Returns the type of a value, such as int or a Literal, and how many of them there are."""
    origin, inner = get_origin(hint), get_args(hint)
    if hasattr(hint, "__metadata__"):
        return _kind_of(inner[0])
    if origin in {Union, types.UnionType}:
        return _kind_of(next(other for other in inner if other is not type(None)))
    if origin is list:
        return _kind_of(inner[0])
    return (inner[0], len(inner)) if origin is tuple else (hint, 1)


def _describe_kind(kind: Any, number: int) -> str:
    if choices := _choices(kind):
        return " or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]]))
    noun = "whole number" if kind is int else "number"
    return f"a {noun}" if number == 1 else f"two {noun}s"


def _choices(kind: Any) -> tuple[str, ...]:
    return get_args(kind) if get_origin(kind) is Literal else ()


def _fits(value: str, kind: Any) -> bool:
    """Whether a value is a choice or a number of a kind."""
    if choices := _choices(kind):
        return value in choices
    try:
        kind(value)
    except ValueError:
        return False
    return True


def _values(parameter: Any, arguments: Sequence[str]) -> Iterator[str]:
    """Yields the values of an option on the command line; for an argument, all words."""
    for i, word in enumerate(arguments):
        option, equals, value = word.partition("=")
        if parameter.param_type_name == "argument":
            if i and not word.startswith("-"):
                yield word
        elif option in parameter.opts:
            first = [value] if equals else []
            yield from (*first, *arguments[i + 1 : i + 1 + parameter.nargs - len(first)])


def _comma_hint(option: str | None, arguments: Sequence[str], *, repeatable: bool) -> str:
    """Returns a hint if the numbers of an option are separated by commas, else an empty string."""
    for name, value in pairwise(arguments):
        numbers = value.split(",")
        if name == option and len(numbers) > 1 and all(_fits(x, float) for x in numbers):
            if repeatable:
                return f"Repeat the option: {' '.join(f'{option} {x}' for x in numbers)}"
            return f"Separate the numbers by spaces: {option} {' '.join(numbers)}"
    return ""
