"""The progress of a run: a bar on a terminal or in a notebook, else a line every ten seconds."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

from losscli.settings import Progress

__all__ = ["WorkCounter", "is_animated", "report_to", "show_bar", "show_lines"]

Update = Callable[[float], None]

# Seconds between two progress lines in a log file, and between two updates in a notebook.
_INTERVAL = 10.0
_NOTEBOOK_INTERVAL = 0.2

# Minimum number of columns of a terminal for the rate beside the progress bar.
_WIDE = 60

# The rounding error of a sum of fractions of points.
_ROUNDING = 1e-6


def is_animated(stream: TextIO | None) -> bool:
    """Returns whether a stream is a terminal that a progress bar can be drawn on."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


@contextmanager
def report_to(progress: Progress, total: int, unit: str) -> Iterator[Update | None]:
    """Reports the progress of a function of the Python API.

    Args:
        progress: True to show it on stderr, or in a notebook below the cell; or a function.
        total: The amount of work.
        unit: The unit of work, in the plural.

    Yields:
        A function to call with the amount of work done so far; None if no progress is wanted.
    """
    if progress is not True:
        yield progress or None
    elif _in_notebook():
        with _show_in_notebook(WorkCounter(total, unit)) as update:
            yield update
    elif is_animated(sys.stderr):
        with show_bar(WorkCounter(total, unit), sys.stderr) as update:
            yield update
    else:
        yield show_lines(WorkCounter(total, unit), _print_line)


def _print_line(text: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def _in_notebook() -> bool:
    if "IPython" not in sys.modules:
        return False
    from rich.console import Console

    return Console().is_jupyter


@contextmanager
def show_bar(count: WorkCounter, stream: TextIO) -> Iterator[Update]:
    """Shows a bar on a terminal, which is removed at the end.

    Args:
        count: The work.
        stream: The terminal.

    Yields:
        A function to call with the amount of work done so far.
    """
    # rich takes a while to import, and only a terminal needs it.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    columns = (
        TextColumn("{task.fields[count]}"),
        BarColumn(None, table_column=Column(min_width=4, max_width=40)),
        TextColumn("{task.fields[rate]}"),
    )
    console = Console(file=stream)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=count.total, count=count.text, rate="")

        def update(done: float) -> None:
            count.add(done)
            # A narrow terminal has room only for the remaining time.
            rate = count.speed if console.width >= _WIDE else count.remaining
            bar.update(task, completed=count.done, count=count.text, rate=rate)

        yield update


def show_lines(count: WorkCounter, write: Callable[[str], None]) -> Update:
    """Writes a line every ten seconds.

    Args:
        count: The work.
        write: Writes a line.

    Returns:
        A function to call with the amount of work done so far.
    """
    last = time.monotonic()

    def update(done: float) -> None:
        nonlocal last
        count.add(done)
        now = time.monotonic()
        if now - last >= _INTERVAL and count.rate:
            last = now
            write(", ".join(filter(None, (count.text, count.remaining))))

    return update


@contextmanager
def _show_in_notebook(count: WorkCounter) -> Iterator[Update]:
    """Shows a bar below the cell of a notebook, which is removed at the end."""
    # Not rich or tqdm, which need ipywidgets for it.
    from IPython.display import display

    output = display(_NotebookBar(count.text, 0, count.total), display_id=True)
    last = time.monotonic()

    def update(done: float) -> None:
        nonlocal last
        count.add(done)
        now = time.monotonic()
        if now - last >= _NOTEBOOK_INTERVAL:
            last = now
            text = " ".join(filter(None, (count.text, count.speed)))
            output.update(_NotebookBar(text, count.done, count.total))

    try:
        yield update
    finally:
        output.update(_NotebookBar())


@dataclass(frozen=True)
class _NotebookBar:
    """A bar with a text; nothing if the text is empty."""

    text: str = ""
    done: float = 0.0
    total: int = 0

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        if not self.text:
            return ""
        # More work than expected ends the bar, as on a terminal.
        bar = f'<progress value="{self.done:g}" max="{max(self.total, self.done):g}"></progress>'
        return f"{bar} {self.text}"


class WorkCounter:
    """Counts the work done and estimates the remaining time.

    Work from a journal takes no time and does not count for the rate, and neither does the time
    before any work is done, such as that of eigenvectors. Work that is repeated after a failure is
    not progress.

    Args:
        total: The amount of work; there may turn out to be more.
        unit: The unit of work, in the plural.
        skipped: Returns the amount of work that took no time.

    Attributes:
        done: The amount of work done, which never decreases.
    """

    def __init__(self, total: int, unit: str, skipped: Callable[[], float] = lambda: 0.0) -> None:
        self.total = total
        self.unit = unit
        self.done = 0.0
        self._skipped = skipped
        self._last_skipped = skipped()
        self._computed = 0.0
        self._start = time.monotonic()

    def add(self, done: float) -> None:
        """Updates the amount of work done so far."""
        skipped = self._skipped()
        self._computed += max(0.0, done - self.done - (skipped - self._last_skipped))
        self._last_skipped = skipped
        self.done = max(self.done, done)
        if not self.done:
            self._start = time.monotonic()

    @property
    def rate(self) -> float:
        """The amount of work per second; 0 before any is done."""
        elapsed = time.monotonic() - self._start
        return self._computed / max(elapsed, 1e-9) if self._computed > _ROUNDING else 0.0

    @property
    def speed(self) -> str:
        """The rate and the remaining time in words."""
        return f"{self.rate:.3g} {self.unit}/s {self.remaining}".rstrip()

    @property
    def text(self) -> str:
        """The amount of work done, with the total unless it is exceeded."""
        total = f"/{self.total}" if self.done <= self.total + _ROUNDING else ""
        return f"{int(self.done + _ROUNDING)}{total} {self.unit}"

    @property
    def remaining(self) -> str:
        """The remaining time in words; empty if unknown."""
        work = self.total - self.done
        if not self.rate or work < -_ROUNDING:
            return ""
        return f"{_duration(max(0.0, work) / self.rate)} left"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
