"""Tables with one row per evaluated point, and their CSV format (RFC 4180)."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from losscli.errors import TableError, UsageError
from losscli.files import open_regular, read_pipe, read_text
from losscli.registry import COLUMN_TYPES, RESERVED_COLUMNS
from losscli.wording import format_count

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["Cell", "Table"]

Cell = float | int | str | None

# Spreadsheets evaluate a cell that starts with one of these as a formula.
_FORMULA = "=+-@\t\r"
# The prefix of such cells: a path stays valid after ./, other text gets an apostrophe.
_PREFIXES = {"path": "./", "text": "'"}

_CURE = "Give a CSV as written by losscli"


@dataclass(frozen=True)
class Table:
    """Named columns and rows of cells.

    The name of a column determines its type, see `losscli.registry.COLUMN_TYPES`. ``None`` is an
    empty cell; among text, an empty cell reads back as ``""``.

    Attributes:
        columns: The names of the columns, each once.
        rows: The cells, ``len(columns)`` in each row.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __repr__(self) -> str:
        return f"<Table of {format_count(len(self.rows), 'row')}: {', '.join(self.columns)}>"

    @classmethod
    def build(cls, columns: Iterable[str], rows: Iterable[Sequence[Cell]]) -> Table:
        """Builds a table from any iterables."""
        return cls(tuple(columns), tuple(tuple(row) for row in rows))

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics, in a table with metrics."""
        return [column for column in self.columns if column not in RESERVED_COLUMNS]

    __iter__ = None  # __getitem__ would make it one

    def __getitem__(self, column: str) -> list[Cell]:
        index = self._index(column)
        return [row[index] for row in self.rows]

    def records(self) -> list[dict[str, Cell]]:
        """Returns each row as a mapping from column to cell."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def to_pandas(self) -> DataFrame:
        """Converts the table to pandas.

        Returns:
            A DataFrame with the same columns and rows. An empty cell among numbers is NaN; integers
            with empty cells are of the type ``Int64``.

        Raises:
            UsageError: pandas is not installed.
        """
        try:
            from pandas import DataFrame, Series
        except ImportError:
            raise UsageError(
                "to_pandas() needs pandas, which is not installed", "pip install pandas"
            ) from None
        columns = {}
        for column in self.columns:
            cells, kind = self[column], COLUMN_TYPES.get(column)
            dtype = "Int64" if None in cells else "int64"
            types = {"integer": dtype, None: "float64"}
            columns[column] = Series(cells, dtype=types.get(kind, "str"))
        return DataFrame(columns)

    def floats(self, column: str) -> list[float]:
        """Returns a column as floats.

        Args:
            column: The name of a column of numbers.

        Returns:
            The cells; nan for an empty cell.

        Raises:
            UsageError: There is no such column, or it has text.
        """
        cells = self[column]
        if COLUMN_TYPES.get(column) in {"path", "text"}:
            raise UsageError(f"the column {column!r} has no numbers", f"Use table[{column!r}]")
        return [float("nan") if cell is None else float(cell) for cell in cells]

    def where(self, column: str, value: Cell) -> Table:
        """Selects rows.

        Args:
            column: The name of a column.
            value: The cell to select.

        Returns:
            The table of the rows with ``value`` in ``column``.
        """
        index = self._index(column)
        return Table(self.columns, tuple(row for row in self.rows if row[index] == value))

    def _index(self, column: str) -> int:
        if column not in self.columns:
            raise UsageError(
                f"the table has no column {column!r}", f"It has {', '.join(self.columns)}"
            )
        return self.columns.index(column)

    def unique(self, *columns: str) -> list[Cell]:
        """Lists the distinct cells of columns.

        Args:
            *columns: The names of the columns.

        Returns:
            The distinct cells, in the order of their first row and column.
        """
        rows = zip(*(self[column] for column in columns), strict=True)
        return list(dict.fromkeys(itertools.chain.from_iterable(rows)))

    def to_csv(self) -> str:
        r"""Writes the table as CSV.

        Returns:
            RFC 4180: a header and one record per row, with line ends ``\r\n``. Floats are the
            shortest decimals that round-trip; non-finite numbers are ``nan``, ``inf`` and
            ``-inf``; ``None`` is empty. Text that a spreadsheet would evaluate as a formula has
            the prefix ``./`` if it is a path, else an apostrophe; `from_csv` removes it.
        """
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(self.columns)
        prefixes = [_PREFIXES.get(COLUMN_TYPES.get(column, ""), "") for column in self.columns]
        writer.writerows(list(map(_write, row, prefixes)) for row in self.rows)
        return text.getvalue()

    @classmethod
    def read(cls, path: Path, *, pipe: bool = False) -> Table:
        """Reads a CSV file.

        Args:
            path: The file.
            pipe: Whether the file may be a pipe, such as ``/dev/fd/63`` of a shell's ``<(…)``.

        Returns:
            The table.

        Raises:
            TableError: The file cannot be read, or is not a CSV of losscli.
        """
        try:
            if pipe:
                content = read_pipe(path)
            else:
                with open_regular(path) as file:
                    content = read_text(file)
            # Spreadsheets write a byte order mark.
            lines = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", newline="")
            return cls.from_csv(lines, str(path))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "a name with a zero byte"
            raise TableError(f"{path} cannot be read: {reason}") from None

    @classmethod
    def from_csv(cls, lines: TextIO, name: str) -> Table:
        """Reads the output of `to_csv`.

        Args:
            lines: The file, opened with ``newline=""``.
            name: The name of the file in errors.

        Returns:
            The table, equal to the written one.

        Raises:
            TableError: The file is not a CSV of losscli.
        """
        try:
            records = list(csv.reader(lines, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise TableError(f"{name} is not a CSV file ({error})", _CURE) from None
        if not records or not records[0] or len(set(records[0])) != len(records[0]):
            raise TableError(f"{name} has no header with distinct column names", _CURE)
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


def _write(cell: Cell, prefix: str) -> str:
    if cell is None:
        return ""
    if prefix and isinstance(cell, str) and _is_formula(cell, prefix):
        return prefix + cell
    # float() first, since the repr of a NumPy scalar is np.float64(…).
    return repr(float(cell)) if isinstance(cell, float) else str(cell)


def _is_formula(text: str, prefix: str) -> bool:
    """Returns whether text starts like a formula after any number of prefixes."""
    while text.startswith(prefix):
        text = text[len(prefix) :]
    return text[:1] != "" and text[0] in _FORMULA


def _read(column: str, text: str) -> Cell:
    column_type = COLUMN_TYPES.get(column)
    if prefix := _PREFIXES.get(column_type or ""):
        if text.startswith(prefix) and _is_formula(text, prefix):
            return text[len(prefix) :]
        return text
    if not text:
        return None
    kind = int if column_type == "integer" else float
    try:
        number = kind(text)
        float(number)
    except OverflowError:
        raise ValueError(f"the number under {column!r} is outside the range of a float") from None
    except ValueError:
        noun = "an integer" if kind is int else "a number"
        raise ValueError(f"{text!r} under {column!r} is not {noun}") from None
    return number
