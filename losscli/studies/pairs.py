"""Pairs of checkpoints from a CSV file."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from losscli.errors import UsageError
from losscli.files import open_regular, read_text
from losscli.registry import COLUMN_TYPES, COMMANDS

__all__ = ["Pairs", "read_pairs"]


@dataclass(frozen=True)
class Pairs:
    """Pairs of checkpoints at positions.

    Attributes:
        column: The name of the column of the positions.
        names: The names of the two checkpoints of each pair.
        positions: The position of each pair.
    """

    column: str
    names: Sequence[tuple[str, str]]
    positions: Sequence[float]

    @property
    def checkpoints(self) -> list[str]:
        """The checkpoints, each once, in the order of the pairs."""
        return list(dict.fromkeys(name for pair in self.names for name in pair))


def read_pairs(path: str, column: str) -> Pairs:
    """Reads pairs of checkpoints from a CSV file with the columns ``a`` and ``b``.

    Args:
        path: The file. Names of checkpoints in it are relative to its folder.
        column: The name of the column with a number for each pair.

    Returns:
        The pairs.

    Raises:
        UsageError: The file cannot be read, or has no such columns, no pairs, a pair of one
            checkpoint, the same pair twice, or a position that is not a number.
    """
    own = COMMANDS["barriers"].table
    if column in {*own.columns, *own.optional} or COLUMN_TYPES.get(column) in {"path", "text"}:
        raise UsageError(f"--x {column} is the name of another column", "Rename the column")
    records = _read(path)
    header = records[0] if records else []
    for name in ("a", "b", column):
        if header.count(name) != 1:
            has = f"has {', '.join(header[:6])}" if header else "is empty"
            raise UsageError(
                f"--pairs {path} needs one column {name!r}, and {has}",
                "Its columns are a and b, the checkpoints of each pair, and that of --x",
            )
    if len(records) == 1:
        raise UsageError(f"--pairs {path} has no pairs", "Give a row for each pair")
    places = [header.index(name) for name in ("a", "b", column)]
    integers = COLUMN_TYPES.get(column) == "integer"
    folder, seen = Path(path).parent, dict[frozenset[str], int]()
    names, positions = [], []
    for number, record in enumerate(records[1:], start=2):
        where = f"--pairs {path}, record {number}"
        if len(record) != len(header):
            raise UsageError(f"{where}: {len(record)} cells for {len(header)} columns")
        a, b, text = (record[place] for place in places)
        if not a or not b:
            raise UsageError(f"{where} lacks a checkpoint", "Give two checkpoints for each pair")
        if a == b:
            raise UsageError(f"{where} is a pair of {a} with itself", "Give two checkpoints")
        if (first := seen.setdefault(frozenset((a, b)), number)) != number:
            raise UsageError(f"{where} is the pair of record {first} again", "Give it once")
        try:
            position = float(text)
            if not (position.is_integer() if integers else math.isfinite(position)):
                raise ValueError  # noqa: TRY301
        except ValueError:
            what = "a whole number" if integers else "a finite number"
            raise UsageError(
                f"{where}: {text!r} under {column!r} is not {what}", "Give one for each pair"
            ) from None
        names.append((_resolve(a, folder), _resolve(b, folder)))
        positions.append(int(position) if integers else position)
    return Pairs(column, names, positions)


def _read(path: str) -> list[list[str]]:
    try:
        with open_regular(Path(path)) as file:
            content = read_text(file)
        text = content.decode("utf-8-sig")
        return [r for r in csv.reader(io.StringIO(text, newline=""), strict=True) if r]
    except (OSError, ValueError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not a CSV file ({error})"
        raise UsageError(f"--pairs {path} cannot be read: {reason}") from None


def _resolve(name: str, folder: Path) -> str:
    return name if name.startswith("init:") else str(folder / name)
