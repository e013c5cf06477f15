"""Curves in the terminal."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len

from losscli.plotting.terminal import draw
from losscli.table import Table

NAN, INF = math.nan, math.inf
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def table(points: list[tuple[float, float]], split: str = "train") -> Table:
    rows = [(alpha, split, loss, 0.1) for alpha, loss in points]
    return Table.build(("alpha", "split", "loss", "loss_stderr"), rows)


def falling(splits: tuple[str, ...] = ("train", "test"), above: float = 0.0) -> Table:
    """A loss that falls from A and rises again behind B."""
    rows = [
        (k / 10, split, (k / 10 - 1) ** 2 + above + 0.5 * place, 0.1)
        for k in range(-5, 21)
        for place, split in enumerate(splits)
    ]
    return Table.build(("alpha", "split", "loss", "loss_stderr"), rows)


def test_picture() -> None:
    points = [(k / 2, (k / 2 - 1) ** 2) for k in range(-1, 5)]
    picture = draw([("run", table(points))], width=40, height=11, colour=False)
    assert picture.splitlines() == [
        "loss        A            B",
        "   2┤⠑⢄     ┊            ┊",
        "    │  ⠑⢄   ┊            ┊",
        "    │   ⠈⠢⡀ ┊            ┊",
        "   1┤     ⠈⠢⡀            ┊             ⢀",
        "    │       ⠈⠑⠤⡀         ┊          ⢀⠤⠊⠁",
        "    │       ┊  ⠈⠑⠢⣀      ┊       ⣀⠔⠊⠁",
        "   0┤       ┊      ⠉⠑⠒⠢⠤⢄⣀⣀⠤⠤⠔⠒⠊⠉",
        "    └───────┬────────────┬─────────────┬",
        "   α        0            1             2",
        "⠤⠤⠤⠤⠤⠤ run: train",
    ]


def test_picture_in_ascii() -> None:
    points = [(k / 2, (k / 2 - 1) ** 2) for k in range(-1, 5)]
    picture = draw([("run", table(points))], width=40, height=11, colour=False, ascii=True)
    assert picture.splitlines() == [
        " loss        A            B",
        "     |**     :            :",
        "    2+  **   :            :",
        "     |    ** :            :",
        "    1+      ***           :           **",
        "     |       : ***        :       ****",
        "     |       :    *****   :   ****",
        "    0+       :         *******",
        "     +-------+------------+------------+",
        "alpha        0            1            2",
        "****** run: train",
    ]


@pytest.mark.parametrize("runs", [1, 3, 40])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("width", [1, 12, 17, 30, 80, 200])
def test_no_line_is_too_wide(width: int, plain: bool, runs: int) -> None:
    label = "a/very/long/folder/模型/checkpoint.pt"
    curves = [(f"{label}{k}" * (k % 2), falling(above=k)) for k in range(runs)]
    picture = draw(curves, width=width, height=20, colour=True, ascii=plain)
    assert max(cell_len(ESCAPE.sub("", line)) for line in picture.splitlines()) <= max(width, 12)
    assert "A" in picture.splitlines()[0]
    assert "B" in picture.splitlines()[0]
    if plain:
        assert picture.isascii()


@pytest.mark.parametrize("height", [1, 9, 20, 50])
def test_height(height: int) -> None:
    lines = draw([("", falling())], width=60, height=height, colour=False).splitlines()
    assert len(lines) == max(height, 7)


def test_colour_changes_nothing_else() -> None:
    curves = [("one", falling()), ("two", falling(above=1.0))]
    plain = draw(curves, width=60, height=20, colour=False)
    coloured = draw(curves, width=60, height=20, colour=True)
    assert "\x1b" not in plain
    assert ESCAPE.sub("", coloured) == plain
    assert len(set(ESCAPE.findall(coloured))) == 4  # two runs, faint, and the end of each


def test_ends_stand_over_zero_and_one() -> None:
    lines = draw([("", falling())], width=70, height=20, colour=False).splitlines()
    head, axis, numbers = lines[0], lines[-3], lines[-2]
    for letter, number in (("A", "0"), ("B", "1")):
        at = head.index(letter)
        assert numbers[at] == number
        assert axis[at] == "┬"
        assert sum(line[at] == "┊" for line in lines[1:-3] if len(line) > at) > 5


def test_ends_out_of_view() -> None:
    zoom = [("", table([(0.02, 2.0), (0.06, 1.0)]))]
    lines = draw(zoom, width=60, height=12, colour=False).splitlines()
    assert lines[0] == "loss"
    assert "┊" not in "".join(lines)
    assert lines[-2].split() == ["α", "0.02", "0.03", "0.04", "0.05", "0.06"]


def test_a_loss_lies_at_its_number() -> None:
    points = [(k / 8, 10 ** (2 - k / 4)) for k in range(9)]
    for log, labels in ((False, {100, 80, 60, 40, 20}), (True, {100, 10, 1})):
        curves = [("", table(points))]
        lines = draw(curves, width=60, height=23, colour=False, log=log).splitlines()
        rows = {float(line[:4]): k for k, line in enumerate(lines) if "┤" in line}
        assert set(rows) == labels
        assert _dot(lines[rows[100]][5])
        # The 100 · 10^(−2 α) of the curve is 10 in the middle, in the linear picture 20 at 0.35.
        at, loss = (5 + 54 // 2, 10) if log else (5 + round(0.35 * 54), 20)
        hit = [k for k, line in enumerate(lines[:-3]) if len(line) > at and _dot(line[at])]
        assert hit
        assert all(abs(row - rows[loss]) <= 1 for row in hit)


def _dot(character: str) -> bool:
    return "\u2800" < character <= "\u28ff"


def test_gaps() -> None:
    points = [(0.0, 2.0), (0.2, 2.0), (0.4, NAN), (0.6, -1.0), (0.8, 1.0), (1.0, 1.0), (1.2, INF)]
    lines = draw([("", table(points))], width=60, height=14, colour=False, log=True).splitlines()
    drawn = {c for line in lines[1:-6] for c, character in enumerate(line) if _dot(character)}
    left, right = 5, 59
    assert {left, right} <= drawn
    assert not drawn & set(range(left + (right - left) // 4, left + 3 * (right - left) // 4))
    assert lines[-2:] == [
        "train: 2 points not drawn: the loss is not finite",
        "train: 1 point not drawn: the loss is not above 0",
    ]
    assert "logarithmic axis" in lines


def test_splits_differ_in_their_dots() -> None:
    curves = [
        (
            "",
            Table.build(
                falling().columns,
                [
                    *table([(0.0, 1.0), (1.0, 1.0)]).rows,
                    *table([(0.0, 3.0), (1.0, 3.0)], "test").rows,
                ],
            ),
        )
    ]
    lines = draw(curves, width=60, height=14, colour=False).splitlines()
    solid, dotted = lines[10][5:], lines[1][5:]
    assert len(set(solid)) == 1
    assert dotted.count(dotted[0]) < len(dotted) / 2
    assert lines[-1] == "⠤⠤⠤⠤⠤⠤ train   ⠄⠠ ⠄⠠  test"


def test_runs_have_marks() -> None:
    curves = [("one", falling()), ("two", falling(above=2.0)), ("", falling(above=4.0))]
    lines = draw(curves, width=60, height=20, colour=False).splitlines()
    assert lines[-1].startswith("1 one   2 two   3 run 3   ")
    panel = "".join(line[5:] for line in lines[1:-3])
    assert panel.count("1") == panel.count("2") == panel.count("3") == 3
    lines = draw(curves, width=60, height=20, colour=False, ascii=True).splitlines()
    assert lines[-1].startswith("* one   + two   o run 3   ")
    assert {"*", "+", "o"} <= set("".join(line[6:] for line in lines[1:-3]))


@pytest.mark.parametrize("plain", [False, True])
def test_labels_keep_their_beginning_and_pairs_their_end(plain: bool) -> None:
    label, pair = "WideResNet28-10" * 9, "runs/with/a/long/name/init.pt → runs/again/final.pt"
    curves = [(label, falling()), (pair, falling())]
    picture = draw(curves, width=30, height=20, colour=False, ascii=plain)
    dots, arrow = ("...", "->") if plain else ("…", "→")
    shown = [line.split(" ", 1)[1] for line in picture.splitlines() if dots in line]
    assert len(shown) == 2
    assert shown[0].startswith("WideResNet28-10Wide")
    assert shown[0].endswith(dots)
    assert shown[1].startswith(dots)
    assert shown[1].endswith(f"{arrow} runs/again/final.pt")
    assert all(cell_len(line) <= 30 for line in picture.splitlines())


def test_names_cannot_steer_the_terminal() -> None:
    name = "\x1b[31mred\n\x07\u202eevil\ud800"
    picture = draw([(name, falling((name,))), ("b", falling())], width=60, height=20, colour=False)
    assert "[31mred evil" in picture
    assert not {"\x1b", "\x07", "\u202e", "\ud800"} & set(picture)
    assert draw(
        [("モデル", falling()), ("", falling())], width=60, height=9, colour=False, ascii=True
    )


@pytest.mark.parametrize(
    "points",
    [
        [],
        [(NAN, 1.0)],
        [(0.0, NAN), (1.0, INF)],
        [(0.3, 1.5)],
        [(0.0, 0.0)],
        [(0.0, 0.7), (1.0, 0.7)],
        [(0.0, 1e308), (0.5, -1e308), (1.0, 1e199)],
        [(0.0, 5e-324), (0.5, 1e-250), (1.0, 1e-199)],
        [(0.0, -1.0), (1.0, -2.0)],
        [(1e6, 1.0), (1e6 + 1, 2.0)],
        [(0.0, 1.0)] * 3,
    ],
)
def test_odd_tables_are_drawn(points: list[tuple[float, float]]) -> None:
    for log in (False, True):
        for width in (1, 40):
            picture = draw([("", table(points))], width=width, height=9, colour=True, log=log)
            assert any(map(_dot, picture)) or "no point" in picture.replace("\n", " ")


def test_nothing_to_draw() -> None:
    assert draw([], width=80, height=20, colour=False) == "There is no point to draw"


def test_rounding_errors_do_not_fill_the_axis() -> None:
    points = [(0.0, 0.7), (0.5, 0.7 + 1e-12), (1.0, 0.7)]
    lines = draw([("", table(points))], width=40, height=12, colour=False).splitlines()
    assert sum(any(map(_dot, line)) for line in lines[1:-3]) == 1


def test_a_terminal_picture_imports_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys, losscli.plotting.terminal; print(*{'torch', 'matplotlib'} & set(sys.modules))"
    )
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=os.environ, check=True, capture_output=True
    )
    assert done.stdout.split() == []
