"""Curves in the terminal, drawn with braille dots or ASCII characters."""

from __future__ import annotations

import itertools
import math
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len

from losscli.table import Table

__all__ = ["draw"]

# The palette of the figures in the 256 colours of a terminal, legible on black and on white.
_COLOURS = (32, 166, 36, 175, 178, 74, 245)
# A dash pattern for each split: the period in dots, and how many of them are drawn.
_PATTERNS = ((1, 1), (3, 1), (8, 5), (6, 2))
_MARKS = "123456789abcdefghijklmnopqrstuvwxyz"
_GLYPHS = "*+ox#%&="
# The bit of each dot in a braille character, by row and column.
_BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
# Outside these bounds the height of the picture would overflow or underflow.
_LARGEST, _SMALLEST = 1e200, 1e-200
_LEAST_WIDTH = 12
_LEAST_ROWS = 3


def draw(
    curves: Sequence[tuple[str, Table]],
    *,
    width: int,
    height: int,
    colour: bool,
    log: bool = False,
    ascii: bool = False,  # noqa: A002
) -> str:
    """Draws losses over the line from A to B for a terminal.

    Several runs are distinguished by a mark on their curves and in the legend, and by colour if
    there is colour. Splits are distinguished by dash patterns.

    Args:
        curves: The label of each run and its table with ``alpha``, ``split`` and ``loss``.
        width: The number of columns to use, at least 12.
        height: The number of lines to use; exceeded if notes and legend leave too few for a curve.
        colour: Whether to colour runs by ANSI escape sequences.
        log: Whether the axis of the loss is logarithmic.
        ascii: Whether to use only ASCII characters.

    Returns:
        The lines, without a trailing newline.
    """
    width = max(width, _LEAST_WIDTH)
    pen = _Pen(colour=colour, ascii=ascii, several=len(curves) > 1)
    labels = [pen.plain(label) or f"run {n}" for n, (label, _) in enumerate(curves, start=1)]
    splits = list(dict.fromkeys(str(s) for _, table in curves for s in table.unique("split")))
    lines = _read([table for _, table in curves], splits, log=log)
    names = [pen.plain(split) for split in splits]
    notes = _notes(lines, labels, names, log=log)
    if len(curves) == 1 and curves[0][0]:
        names = [f"{labels[0]}: {name}" for name in names]
    footer = pen.legend(labels, names, width)
    footer += [part for note in notes for part in textwrap.wrap(note, width)]
    points = [point for line in lines for point in line.points if point]
    if not points:
        return "\n".join([*footer, *textwrap.wrap("There is no point to draw", width)])

    x_range = _extent([x for x, _ in points], 0.05)
    y_range = _extent([y for _, y in points], 0.05)
    if not log and not any(y for _, y in points):
        # A loss is rarely negative, so an axis of zeros has no negative numbers.
        y_range = (0.0, 1.0)
    rows = max(height - 3 - len(footer), _LEAST_ROWS)
    y_ticks = _log_ticks(*y_range, rows // 2) if log else _ticks(*y_range, rows // 3)
    gutter = max(len(pen.alpha), len("loss"), *(len(label) for _, label in y_ticks))
    if width - gutter - 1 < _LEAST_WIDTH - 2:
        gutter = 0
    view = _View(x_range, y_range, log, width - gutter - 1, rows, pen.fine)
    canvas = _Canvas(pen.fine)
    # In reverse order, so that the first run and split are on top.
    for line in reversed(lines):
        for drawable, part in itertools.groupby(line.points, key=lambda point: point is not None):
            if drawable:
                canvas.trace([view.dot(*point) for point in part if point], line)
    return "\n".join([*_panel(view, canvas, pen, len(curves), y_ticks, gutter), *footer])


@dataclass(frozen=True)
class _Line:
    """One split of one run: its points in the order of α; None for a point that cannot be drawn."""

    run: int
    split: int
    points: Sequence[tuple[float, float] | None] = ()
    infinite: int = 0
    negative: int = 0


def _read(tables: Sequence[Table], splits: Sequence[str], *, log: bool) -> list[_Line]:
    lines = []
    for run, table in enumerate(tables):
        for index, split in enumerate(splits):
            part = table.where("split", split)
            rows = zip(part.floats("alpha"), part.floats("loss"), strict=True)
            pairs = sorted((row for row in rows if math.isfinite(row[0])), key=lambda row: row[0])
            if not pairs:
                continue
            finite = [abs(loss) < _LARGEST for _, loss in pairs]
            shown = [
                ok and (loss > _SMALLEST or not log)
                for ok, (_, loss) in zip(finite, pairs, strict=True)
            ]
            lines.append(
                _Line(
                    run=run,
                    split=index,
                    points=[pair if ok else None for ok, pair in zip(shown, pairs, strict=True)],
                    infinite=finite.count(False),
                    negative=shown.count(False) - finite.count(False),
                )
            )
    return lines


def _notes(
    lines: Sequence[_Line], labels: Sequence[str], splits: Sequence[str], *, log: bool
) -> list[str]:
    notes = ["logarithmic axis"] if log else []
    for line in lines:
        name = splits[line.split]
        if len(labels) > 1:
            name = f"{labels[line.run]}, {name}"
        for number, reason in ((line.infinite, "not finite"), (line.negative, "not above 0")):
            if number:
                points = "1 point" if number == 1 else f"{number} points"
                notes.append(f"{name}: {points} not drawn: the loss is {reason}")
    return notes


# --- Numbers -------------------------------------------------------------------------------------


def _extent(values: Sequence[float], margin: float) -> tuple[float, float]:
    """Returns the range of values; for constant values, an interval around them."""
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    # A relative variation below 1e-6 counts as constant, so that rounding errors are not magnified.
    if high - low > max(1e-6 * size, _SMALLEST):
        return low, high
    room = margin * size if size > _SMALLEST else 0.5
    return low - room, high + room


def _ticks(low: float, high: float, number: int) -> list[tuple[float, str]]:
    """Returns about ``number`` round numbers in a range, and their labels."""
    raw = (high - low) / max(number, 2)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.7)
    values = [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
    decimals = max(0, -math.floor(math.log10(step * 1.001)))
    plain = 1e-4 < max(abs(low), abs(high)) < 1e6
    return [(x, f"{x:.{decimals}f}" if plain and x else f"{x:.4g}") for x in values]


def _log_ticks(low: float, high: float, number: int) -> list[tuple[float, str]]:
    """Returns powers of ten as ticks of a logarithmic axis; round numbers if it is too short."""
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    if last - first < 1:
        return _ticks(low, high, number)
    stride = math.ceil((last - first + 1) / max(number, 2))
    return [(10.0**k, f"{10.0**k:.4g}") for k in range(first, last + 1, stride)]


# --- Drawing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _View:
    """Maps numbers to a grid of cells, each of ``fine`` dots horizontally and vertically."""

    x: tuple[float, float]
    y: tuple[float, float]
    log: bool
    columns: int
    rows: int
    fine: tuple[int, int]

    def dot(self, x: float, y: float) -> tuple[int, int]:
        """Returns the column and the row of the dot of a point, from the upper left."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        low, high, at = (math.log(v) if self.log else v for v in (*self.y, y))
        down = 1 - (at - low) / (high - low)
        return (
            _nearest(across * (self.columns * self.fine[0] - 1)),
            _nearest(down * (self.rows * self.fine[1] - 1)),
        )

    def column(self, x: float) -> int:
        """Returns the column of cells that contains an α."""
        return self.dot(x, self.y[0])[0] // self.fine[0]

    def row(self, y: float) -> int:
        """Returns the row of cells that contains a loss."""
        return self.dot(self.x[0], y)[1] // self.fine[1]


def _nearest(x: float) -> int:
    # Halves, also with a small rounding error, round down: a constant line stays in one row.
    return math.floor(x + 0.5 - 1e-6)


@dataclass(frozen=True)
class _Canvas:
    """The cells with dots, and the line that was drawn last in each."""

    fine: tuple[int, int]
    dots: dict[tuple[int, int], int] = field(default_factory=dict)
    owners: dict[tuple[int, int], _Line] = field(default_factory=dict)

    def trace(self, dots: Sequence[tuple[int, int]], line: _Line) -> None:
        """Draws a line through dots in the dash pattern of its split."""
        period, on = _PATTERNS[line.split % len(_PATTERNS)]
        across, down = self.fine
        for number, (x, y) in enumerate(_between(dots)):
            if number % period < on:
                cell = (y // down, x // across)
                self.dots[cell] = self.dots.get(cell, 0) | _BRAILLE[y % down][x % across]
                self.owners[cell] = line


def _between(dots: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yields the dots of the straight lines that connect dots, each once."""
    yield dots[0]
    for (x, y), (to_x, to_y) in itertools.pairwise(dots):
        steps = max(abs(to_x - x), abs(to_y - y))
        for k in range(1, steps + 1):
            yield round(x + (to_x - x) * k / steps), round(y + (to_y - y) * k / steps)


@dataclass(frozen=True)
class _Pen:
    """How text is drawn: with or without colour, in braille or in ASCII.

    Attributes:
        colour: Whether to use ANSI escape sequences.
        ascii: Whether to use only ASCII characters.
        several: Whether there are several runs.
    """

    colour: bool
    ascii: bool
    several: bool

    @property
    def fine(self) -> tuple[int, int]:
        """The number of dots of a cell, horizontally and vertically."""
        return (1, 1) if self.ascii else (2, 4)

    @property
    def alpha(self) -> str:
        """The name of the x axis."""
        return "alpha" if self.ascii else "α"

    @property
    def frame(self) -> tuple[str, ...]:
        """The characters of the y axis, its ticks, the corner, the x axis, its ticks, A and B."""
        return tuple("|++-+:" if self.ascii else "│┤└─┬┊")

    def plain(self, text: str) -> str:
        """Returns text in one line without control characters and bidi marks."""
        letters = (
            " " if letter.isspace() else "" if unicodedata.category(letter)[0] == "C" else letter
            for letter in text
        )
        line = " ".join("".join(letters).split())
        return line.replace("→", "->").encode("ascii", "replace").decode() if self.ascii else line

    def paint(self, text: str, run: int | None) -> str:
        """Returns text in the colour of a run; faint if the run is None."""
        if not self.colour or not text.strip():
            return text
        code = "2" if run is None else f"38;5;{_COLOURS[run % len(_COLOURS)]}"
        return f"\x1b[{code}m{text}\x1b[0m"

    def mark(self, run: int) -> str:
        """Returns the character that represents a run."""
        return _GLYPHS[run % len(_GLYPHS)] if self.ascii else _MARKS[run % len(_MARKS)]

    def letter(self, canvas: _Canvas, cell: tuple[int, int]) -> str:
        """Returns the character of a cell with dots."""
        if not self.ascii:
            return chr(0x2800 + canvas.dots[cell])
        line = canvas.owners[cell]
        return _GLYPHS[(line.run if self.several else line.split) % len(_GLYPHS)]

    def legend(self, labels: Sequence[str], splits: Sequence[str], width: int) -> list[str]:
        """Returns the lines of the legend: runs by mark and colour, splits by a sample."""
        entries: list[tuple[str, int | None, str]] = []
        if self.several:
            entries += [(self.mark(run), run, label) for run, label in enumerate(labels)]
        across, down = self.fine
        for index, split in enumerate(splits):
            canvas = _Canvas(self.fine)
            canvas.trace([(0, down // 2), (6 * across - 1, down // 2)], _Line(0, index))
            cells = [(0, column) for column in range(6)]
            sample = "".join(self.letter(canvas, c) if c in canvas.dots else " " for c in cells)
            if self.ascii and self.several:
                sample = sample.replace(_GLYPHS[0], "-")
            entries.append((sample, None if self.several else 0, split))
        lines: list[str] = []
        room = 0
        for mark, run, label in entries:
            text = _shorten(label, width - len(mark) - 1, "..." if self.ascii else "…")
            painted = f"{self.paint(mark, run)} {text}"
            length = len(mark) + 1 + cell_len(text)
            if room >= length + 3:
                lines[-1] += f"   {painted}"
                room -= length + 3
            else:
                lines.append(painted)
                room = width - length
        return lines


def _shorten(text: str, width: int, dots: str) -> str:
    """Shortens a text to a width in columns: at its end, but a pair A → B at its beginning."""
    if cell_len(text) <= width:
        return text
    pair = "→" in text or "->" in text
    room, kept = width - cell_len(dots), 0
    for letter in reversed(text) if pair else text:
        room -= cell_len(letter)
        if room < 0:
            break
        kept += 1
    return dots + text[len(text) - kept :] if pair else text[:kept] + dots


def _place_marks(canvas: _Canvas, runs: int, columns: int) -> dict[tuple[int, int], int]:
    """Chooses up to three cells on the curve of each run for its mark, side by side."""
    marks = {}
    for run in range(runs):
        cells = sorted(cell for cell, line in canvas.owners.items() if line.run == run)
        for third in range(3):
            at = (third + (run + 0.5) / runs) * columns / 3
            near = [cell for cell in cells if abs(cell[1] + 0.5 - at) <= 1.5]
            if near:
                marks[min(near, key=lambda cell: abs(cell[1] + 0.5 - at))] = run
    return marks


def _panel(
    view: _View,
    canvas: _Canvas,
    pen: _Pen,
    runs: int,
    y_ticks: Sequence[tuple[float, str]],
    gutter: int,
) -> list[str]:
    """Returns the lines of the panel, from top to bottom."""
    side, tick, corner, bottom, down, end = pen.frame
    marks = _place_marks(canvas, runs, view.columns) if pen.several and not pen.ascii else {}
    in_view = [alpha for alpha in (0.0, 1.0) if view.x[0] <= alpha <= view.x[1]]
    ends = {view.column(alpha): "AB"[int(alpha)] for alpha in in_view}

    def cell(at: tuple[int, int]) -> tuple[int | None, str]:
        if at in marks:
            return marks[at], pen.mark(marks[at])
        if at in canvas.dots:
            return canvas.owners[at].run, pen.letter(canvas, at)
        return None, end if at[1] in ends else " "

    def margin(text: str) -> str:
        return text.rjust(gutter) if gutter else ""

    columns = range(view.columns)
    lines = [margin("loss") + " " + "".join(ends.get(c, " ") for c in columns)]
    labels = {view.row(y): label for y, label in y_ticks}
    for row in range(view.rows):
        edge = tick if row in labels else side
        cells = [cell((row, c)) for c in columns]
        while cells and cells[-1][1] == " ":
            cells.pop()
        parts = itertools.groupby(cells, key=lambda pair: pair[0])
        painted = [pen.paint("".join(text for _, text in part), run) for run, part in parts]
        lines.append(margin(labels.get(row, "")) + edge + "".join(painted))
    # The labels of A and B have priority over other tick labels.
    ticks = [(alpha, f"{alpha:g}") for alpha in in_view]
    ticks += _ticks(*view.x, view.columns // 12)
    axis, numbers = [bottom] * view.columns, [" "] * view.columns
    for alpha, label in ticks:
        at = view.column(alpha)
        start = min(max(at - (len(label) - 1) // 2, 0), view.columns - len(label))
        if start >= 0 and not "".join(numbers[max(start - 2, 0) : start + len(label) + 2]).strip():
            numbers[start : start + len(label)] = label
            axis[at] = down
    lines.append(margin("") + corner + "".join(axis))
    lines.append(margin(pen.alpha) + " " + "".join(numbers))
    return [line.rstrip() for line in lines]
