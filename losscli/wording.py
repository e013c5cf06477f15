"""Numbers of things and lists of names in messages."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["format_count", "list_first"]


def format_count(number: int, noun: str) -> str:
    """Formats a number of things, for example ``1 point``, ``3,000 points`` or ``2 batches``."""
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def list_first(names: Sequence[str], most: int = 1) -> str:
    """Lists the first names and how many there are in addition, for example ``a, b and 3 more``."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"
