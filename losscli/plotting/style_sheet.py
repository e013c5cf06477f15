"""Matplotlib style sheets."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

from losscli.errors import UsageError, printable
from losscli.files import read_regular

__all__ = ["parse", "read"]

# A comment begins at a # outside of double quotes.
_COMMENT = re.compile(r'^((?:[^"#]|"[^"]*")*)#.*$')


def read(path: str | os.PathLike[str]) -> dict[str, str]:
    """Reads a style sheet.

    Args:
        path: The file, with a line ``setting: value`` for each setting.

    Returns:
        The text of each setting.

    Raises:
        UsageError: The file cannot be read, or a setting is unknown, has another type, or cannot
            be followed.
    """
    name = printable(str(path))
    try:
        text = read_regular(Path(path)).decode()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(
            f"the style sheet {name} cannot be read: {reason}", "Give a file of Matplotlib settings"
        ) from None
    settings: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        content = _COMMENT.sub(r"\1", line).strip()
        if not content:
            continue
        setting, colon, value = (part.strip() for part in content.partition(":"))
        if not colon:
            raise UsageError(
                f"{name}, line {number}: {printable(content)!r} has no colon",
                "Write each setting as name: value",
            )
        value = value[1:-1] if re.fullmatch(r'"[^"]*"', value) else value
        try:
            parse({setting: value})
        except UsageError as error:
            raise UsageError(f"{name}, line {number}: {error.what}", error.cure) from None
        settings[setting] = value
    return settings


def parse(settings: Mapping[str, str]) -> dict[str, Any]:
    """Returns the values of settings in the types of Matplotlib.

    Raises:
        UsageError: A setting is unknown, has another type, or cannot be followed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mpl.MatplotlibDeprecationWarning)
        values: dict[Any, Any] = mpl.RcParams()
        for setting, text in settings.items():
            try:
                values[setting] = text
            except KeyError:
                raise UsageError(
                    f"{printable(setting)!r} is not a setting of Matplotlib {mpl.__version__}",
                    "Correct or remove it",
                ) from None
            except ValueError as error:
                reason = printable(str(error).splitlines()[0])
                raise UsageError(
                    f"{setting}: {reason}", "Give a value of the type that Matplotlib expects"
                ) from None
    if values.get("text.usetex"):
        raise UsageError(
            "text.usetex needs names in TeX, and names of checkpoints are not TeX",
            "Remove it",
        )
    return {str(setting): value for setting, value in values.items() if setting != "backend"}
