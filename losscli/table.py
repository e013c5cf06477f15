"""Tables: one row per evaluated point, and CSV (RFC 4180) in and out."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from losscli.errors import TableError
from losscli.files import open_regular, read_pipe, read_text

__all__ = ["Cell", "Table"]

Cell = float | int | str | None

_TEXT = frozenset({
    "a", "b", "block", "split", "checkpoint", "verdict", "key", "tensor", "shape", "dtype",
})  # fmt: skip
# A spreadsheet takes a cell that begins so for a formula, and computes it.
_FORMULA = "=+-@\t\r"
# What is put before such a cell: a name of a file stays one, and other text shows an apostrophe.
_BEFORE = {
    **dict.fromkeys(("a", "b", "checkpoint"), "./"),
    **dict.fromkeys(("split", "block", "tensor", "key"), "'"),
}

_INTEGER = frozenset({"step", "walk", "examples", "tensors", "values", "bytes"})

# What a line has besides its metrics.
_NO_METRICS = frozenset({"alpha", "split", "loss", "loss_stderr", "slope", "curvature", "examples"})

_CURE = "Give a CSV as losscli wrote it"


@dataclass(frozen=True)
class Table:
    """Named columns and rows of cells.

    The name of a column determines its type: ``a``, ``b``, ``split``, ``checkpoint``, ``block`` and
    ``verdict`` are text, ``step``, ``walk`` and ``examples`` whole numbers, all others floats.
    ``None`` is an empty cell; among text, an empty cell reads back as ``""``.

    Attributes:
        columns: The names of the columns, each once.
        rows: The cells, ``len(columns)`` in each row.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @classmethod
    def build(cls, columns: Iterable[str], rows: Iterable[Sequence[Cell]]) -> Table:
        """Builds a table from any iterables.

        Args:
            columns: The names of the columns.
            rows: The rows.

        Returns:
            The table.
        """
        return cls(tuple(columns), tuple(tuple(row) for row in rows))

    @property
    def metrics(self) -> list[str]:
        """The metrics, where the table is one of interpolate."""
        return [column for column in self.columns if column not in _NO_METRICS]

    def __getitem__(self, column: str) -> list[Cell]:
        index = self.columns.index(column)
        return [row[index] for row in self.rows]

    def records(self) -> list[dict[str, Cell]]:
        """Reads the rows by their columns.

        Returns:
            For each row its cells by the names of their columns.
        """
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def floats(self, column: str) -> list[float]:
        """Reads a column of numbers.

        Args:
            column: Its name.

        Returns:
            Its cells as floats; an empty cell is nan.
        """
        return [float("nan") if cell is None else float(cell) for cell in self[column]]

    def where(self, column: str, value: Cell) -> Table:
        """Picks rows.

        Args:
            column: The column to look at.
            value: What it must hold.

        Returns:
            The table of the rows whose cell in ``column`` equals ``value``.
        """
        index = self.columns.index(column)
        return Table(self.columns, tuple(row for row in self.rows if row[index] == value))

    def unique(self, *columns: str) -> list[Cell]:
        """Lists what one or more columns hold.

        Args:
            columns: Their names.

        Returns:
            The different cells, in the order of their first row and column.
        """
        rows = zip(*(self[column] for column in columns), strict=True)
        return list(dict.fromkeys(itertools.chain.from_iterable(rows)))

    def to_csv(self) -> str:
        r"""Writes the table as CSV.

        Returns:
            RFC 4180: a header, one record a row, lines ended by ``\r\n``. Floats are the shortest
            decimals that read back to the same bits; not-a-number and infinity are ``nan``,
            ``inf`` and ``-inf``; ``None`` is empty. A name that a spreadsheet would take for a
            formula has ``./`` before it, or an apostrophe where it is no file's; `from_csv` takes
            that away.
        """
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(self.columns)
        before = [_BEFORE.get(column, "") for column in self.columns]
        writer.writerows(list(map(_write, row, before)) for row in self.rows)
        return text.getvalue()

    @classmethod
    def read(cls, path: Path, *, pipe: bool = False) -> Table:
        """Reads a CSV file.

        Args:
            path: Where it lies.
            pipe: Whether it may be a pipe, as one that the command line names.

        Returns:
            The table.

        Raises:
            TableError: It cannot be read, or is not such a CSV.
        """
        try:
            if pipe:
                content = read_pipe(path)
            else:
                with open_regular(path) as file:
                    content = read_text(file)
            # Spreadsheets put a mark before the first column.
            lines = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", newline="")
            return cls.from_csv(lines, str(path))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "a name with a zero byte"
            raise TableError(f"{path} cannot be read: {reason}") from None

    @classmethod
    def from_csv(cls, lines: TextIO, name: str) -> Table:
        """Reads what `to_csv` wrote.

        Args:
            lines: The file, opened with ``newline=""``.
            name: What to call it in errors.

        Returns:
            The table, equal to the one written.

        Raises:
            TableError: The file is not such a CSV.
        """
        try:
            records = list(csv.reader(lines, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise TableError(f"{name} is not a CSV file ({error})", _CURE) from None
        if not records or not records[0] or len(set(records[0])) != len(records[0]):
            raise TableError(f"{name} has no header of different column names", _CURE)
        columns = tuple(records[0])
        rows = []
        for number, record in enumerate(records[1:], start=2):
            if len(record) != len(columns):
                raise TableError(
                    f"{name}, record {number}: {len(record)} cells for {len(columns)} columns",
                    _CURE,
                )
            try:
                rows.append(tuple(map(_read, columns, record)))
            except ValueError as error:
                raise TableError(f"{name}, record {number}: {error}", _CURE) from None
        return cls(columns, tuple(rows))


def _write(cell: Cell, before: str) -> str:
    if cell is None:
        return ""
    if before and isinstance(cell, str) and _is_formula(cell, before):
        return before + cell
    # float() first: NumPy's own scalars write themselves as np.float64(…).
    return repr(float(cell)) if isinstance(cell, float) else str(cell)


def _is_formula(text: str, before: str) -> bool:
    """Whether text begins as a formula does, behind any number of what is put before one."""
    while text.startswith(before):
        text = text[len(before) :]
    return text[:1] != "" and text[0] in _FORMULA


def _read(column: str, text: str) -> Cell:
    if column in _TEXT:
        before = _BEFORE.get(column, "")
        if before and text.startswith(before) and _is_formula(text, before):
            return text[len(before) :]
        return text
    if not text:
        return None
    kind = int if column in _INTEGER else float
    try:
        number = kind(text)
        float(number)
    except OverflowError:
        raise ValueError(f"the number under {column!r} is beyond a float's range") from None
    except ValueError:
        what = "whole number" if kind is int else "number"
        raise ValueError(f"{text!r} under {column!r} is no {what}") from None
    return number
