"""Describes how the conditions of two runs differ."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from losscli.errors import printable

__all__ = ["differences"]

_CONTENT = re.compile(r"[0-9a-f]{64}")

# Longer values are not shown.
_LONGEST = 60


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns a clause for each difference of conditions: ``--limit was 100 and is 200``."""
    clauses = []
    for name in dict.fromkeys([*before, *now]):
        was, is_ = (json.dumps(side.get(name), sort_keys=True) for side in (before, now))
        if was == is_ and (name in before) == (name in now):
            continue
        one, other = (_value(side.get(name)) for side in (before, now))
        label = printable(name)
        if name not in now:
            clauses.append(f"{label} is no longer given")
        elif name not in before:
            clauses.append(f"{label} was not given")
        elif max(len(one), len(other)) > _LONGEST or all(map(_CONTENT.fullmatch, (one, other))):
            clauses.append(f"{label} changed")
        else:
            clauses.append(f"{label} was {one} and is {other}")
    return clauses


def _value(value: Any) -> str:
    if value is None:
        return "not given"
    if isinstance(value, str):
        return printable(value)
    return printable(json.dumps(value, ensure_ascii=False, sort_keys=True))
