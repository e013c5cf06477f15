"""Tables: through CSV and back to the same bits, and broken files told by their record."""

from __future__ import annotations

import csv
import io
import math
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from losscli.errors import TableError
from losscli.table import Cell, Table

FLOATS = st.one_of(
    st.none(),
    st.floats(),
    # Any bits at all: subnormals and the edges of the range are among them.
    st.integers(0, 2**64 - 1).map(lambda i: struct.unpack("<d", struct.pack("<Q", i))[0]),
    st.sampled_from([
        math.nan,
        math.inf,
        -math.inf,
        -0.0,
        5e-324,
        -5e-324,
        2.2250738585072011e-308,
    ]),
)
TEXTS = st.one_of(
    st.text(),
    st.text(alphabet=",;\"'\r\n\t \x00éα#", max_size=8),
    st.sampled_from(["nan", "1", "", " a ", '"', "\r", "a,b", "\ufeff"]),
    st.text(alphabet="'=+-@./", max_size=5),
)
INTEGERS = st.one_of(st.none(), st.integers())
ROWS = st.lists(st.tuples(FLOATS, TEXTS, FLOATS, INTEGERS), max_size=5)
COLUMNS = ("alpha", "split", "loss", "step")


def read(text: str, name: str = "t.csv") -> Table:
    return Table.from_csv(io.StringIO(text, newline=""), name)


def bits(cell: Cell) -> object:
    if isinstance(cell, float):
        # Every not-a-number is spelled nan, whatever its payload.
        return "nan" if math.isnan(cell) else struct.pack("<d", cell)
    return cell


@settings(deadline=None)
@given(ROWS)
@example([(-0.0, "a\r\nb,\"c'", math.nan, None), (5e-324, "", -math.inf, 10**30)])
def test_a_table_that_is_written_reads_back_to_the_same_bits(
    rows: list[tuple[Cell, ...]],
) -> None:
    table = Table.build(COLUMNS, rows)
    again = read(table.to_csv())
    assert again.columns == COLUMNS
    assert [list(map(bits, row)) for row in again.rows] == [list(map(bits, r)) for r in rows]
    assert again.to_csv() == table.to_csv()


@settings(deadline=None)
@given(ROWS)
def test_the_csv_goes_through_a_file_in_utf_8(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[Cell, ...]]
) -> None:
    table = Table.build(COLUMNS, rows)
    path = tmp_path_factory.getbasetemp() / "table.csv"
    path.write_bytes(table.to_csv().encode())
    with path.open(encoding="utf-8", newline="") as file:
        assert Table.from_csv(file, str(path)).to_csv() == table.to_csv()


@settings(deadline=None)
@given(st.lists(st.tuples(FLOATS), min_size=1, max_size=3))
def test_a_table_of_one_column_keeps_its_empty_cells(rows: list[tuple[Cell, ...]]) -> None:
    table = Table.build(["loss"], rows)
    assert len(read(table.to_csv()).rows) == len(rows)


def test_the_csv_is_that_of_rfc_4180() -> None:
    table = Table.build(
        ["alpha", "split", "loss", "examples"],
        [
            (0.1, "train", 1e-300, 3),
            (-0.0, 'a "b", c', math.nan, None),
            (1.0, "two\nlines", -math.inf, 0),
            (np.float64(0.1) * 3, "x", np.float64("inf"), 4),
        ],
    )
    assert table.to_csv() == (
        "alpha,split,loss,examples\r\n"
        "0.1,train,1e-300,3\r\n"
        '-0.0,"a ""b"", c",nan,\r\n'
        '1.0,"two\nlines",-inf,0\r\n'
        "0.30000000000000004,x,inf,4\r\n"
    )


# For each column, what is put before a name that a spreadsheet would take for a formula.
BEFORE = {"checkpoint": "./", "a": "./", "b": "./", "split": "'", "block": "'"}


@pytest.mark.parametrize("column", BEFORE)
@pytest.mark.parametrize("name", ["=1+1", "+a.pt", "-a.pt", "@SUM(A1)", "\t=1", "\r=1"])
def test_no_name_is_a_formula_to_a_spreadsheet(column: str, name: str) -> None:
    table = Table.build([column, "loss"], [(name, -1.5)])
    text = table.to_csv()
    (_, (cell, loss)) = csv.reader(io.StringIO(text, newline=""))
    assert (cell, loss) == (BEFORE[column] + name, "-1.5")
    assert read(text) == table
    # A name that begins so already is another one, and stays so.
    for other in (BEFORE[column] + name, 2 * BEFORE[column] + name, BEFORE[column], "a=1", "", "é"):
        table = Table.build([column, "loss"], [(other, -1.5)])
        assert read(table.to_csv()) == table
    assert read(table.to_csv()).rows[0][0] == "é"


def test_other_readers_agree() -> None:
    rows = [(0.1, 'a "b"\r\nc', math.pi, 3), (2.5, "d", 1 / 3, 4)]
    header, *records = csv.reader(io.StringIO(Table.build(COLUMNS, rows).to_csv(), newline=""))
    assert tuple(header) == COLUMNS
    assert [(float(a), b, float(c), int(d)) for a, b, c, d in records] == rows


@pytest.mark.parametrize("end", ["\r\n", "\n", "\r"])
def test_any_ends_of_lines_are_read(end: str) -> None:
    text = end.join(["alpha,split", "0.5,a", '1.5,"b\nc"', ""])
    expected = Table.build(["alpha", "split"], [(0.5, "a"), (1.5, "b\nc")])
    assert read(text) == expected
    assert read(text.removesuffix(end)) == expected


def test_the_name_of_a_column_settles_its_type() -> None:
    table = read("step,checkpoint,verdict,examples,loss,anything\n1,1,1,1,1,1\n,,,,,\n")
    assert table.rows == ((1, "1", "1", 1, 1.0, 1.0), (None, "", "", None, None, None))
    assert [type(cell) for cell in table.rows[0]] == [int, str, str, int, float, float]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "t.csv has no header"),
        ("\n1,2\n", "t.csv has no header"),
        ("a,b,a\n1,2,3\n", "t.csv has no header with distinct column names"),
        ("a,b\n1,2\n3\n", "t.csv, record 3: 1 cells for 2 columns"),
        ("a,b\n1,2,3\n", "t.csv, record 2: 3 cells for 2 columns"),
        ("a,b\n1,2\n\n3,4\n", "t.csv, record 3: 0 cells for 2 columns"),
        ('a,split\n1,"x\ny"\n1,2\n3,4,5\n', "t.csv, record 4: 3 cells"),
        ("a,loss\n1,two\n", "t.csv, record 2: 'two' under 'loss' is not a number"),
        ("step\n1\n1.5\n", "t.csv, record 3: '1.5' under 'step' is not an integer"),
        ('a\n"1\n', "t.csv is not a CSV file .*end of data"),
        ('a\n"1"2\n', "t.csv is not a CSV file .*expected after"),
        ("a\n" + "1" * 200_000 + "\n", "t.csv is not a CSV file .*field limit"),
    ],
    ids=range(12),
)
def test_a_broken_table_is_reported_with_name_and_record(text: str, message: str) -> None:
    with pytest.raises(TableError, match=message) as caught:
        read(text)
    assert str(caught.value).endswith(". Give a CSV as written by losscli")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


def test_a_binary_file_is_not_a_table(tmp_path: Path) -> None:
    path = tmp_path / "picture.csv"
    path.write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR")
    with (
        path.open(encoding="utf-8", newline="") as file,
        pytest.raises(TableError, match=r"picture\.csv is not a CSV file \('utf-8' codec"),
    ):
        Table.from_csv(file, str(path))


def test_columns_and_rows_are_picked() -> None:
    table = Table.build(
        ["alpha", "split", "loss"],
        [(0.0, "train", 3.0), (0.0, "test", None), (1.0, "train", 1.0), (1.0, "test", 2.0)],
    )
    assert table["split"] == ["train", "test", "train", "test"]
    assert table.unique("split") == ["train", "test"]
    assert table.where("split", "test").rows == ((0.0, "test", None), (1.0, "test", 2.0))
    assert table.where("split", "test").columns == table.columns
    assert table.where("split", "dev").rows == ()
    assert table.floats("alpha") == [0.0, 0.0, 1.0, 1.0]
    empty = table.floats("loss")[1]
    assert isinstance(empty, float)
    assert math.isnan(empty)
