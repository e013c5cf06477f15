"""The talk on stderr and the result on stdout: colour, progress, notes and errors."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from losscli.errors import LosscliError, OutputError, UsageError, printable
from losscli.files import IrregularError, read_text

if TYPE_CHECKING:
    from losscli.evaluation.ranks import Ranks

__all__ = ["Console", "SilentConsole", "stdin"]

_INTERVAL = 10.0

# From so many columns on a bar has the rate beside it.
_WIDE = 60

_CLOSED = "stdout was closed before the result was written to it"

# What shares of a point, added up, may be short of whole ones.
_ROUNDING = 1e-6


class Console:
    """The streams of one command.

    Args:
        stdout: Where results go; `sys.stdout` by default.
        stderr: Where the talk goes; `sys.stderr` by default.

    Attributes:
        quiet: Whether progress and notes are left out.
        traceback: Whether an error shows where in the code it came from.
        kept: Where what was finished lies if the command ends too early; None where nothing was.
        written: Whether the results stand.
        ranks: The processes that share the command; None if this one runs it alone.
    """

    def __init__(self, stdout: TextIO | None = None, stderr: TextIO | None = None) -> None:
        # Python's own streams are None where the caller closed them.
        self.stdout: TextIO | None = stdout if stdout is not None else sys.stdout
        self.stderr: TextIO | None = stderr if stderr is not None else sys.stderr
        self.quiet = False
        self.traceback = False
        self.kept: Path | None = None
        self.written = False
        self.ranks: Ranks | None = None

    @property
    def animated(self) -> bool:
        """Whether stderr is a terminal that a progress bar can be drawn on."""
        return self.stderr is not None and self.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def result(self, text: str, *, drawn: bool = False) -> None:
        """Writes to stdout, and makes sure that it arrived.

        On a terminal, control characters of names from files become escapes. In a pipe or a file
        they stay as they are.

        Args:
            text: What to write.
            drawn: Whether its control characters are losscli's own, such as colours.

        Raises:
            OutputError: Nobody reads it.
        """
        if self.stdout is None:
            raise OutputError(_CLOSED)
        if not drawn and self.stdout.isatty():
            text = "\n".join(map(printable, text.replace("\r\n", "\n").split("\n")))
        # A name may hold what the stream's encoding lacks: better an escape than no result.
        encoded = text.encode(self.stdout.encoding or "utf-8", "backslashreplace")
        try:
            buffer = getattr(self.stdout, "buffer", None)
            if buffer is None:
                self.stdout.write(text)
            else:
                # An unbuffered stdout may take a part and say how much; Python's own text layer
                # would drop the rest without a word.
                left = memoryview(encoded)
                while left:
                    left = left[buffer.write(left) :]
            self.stdout.flush()
        except OSError as error:
            raise self.lost(error) from None

    def lost(self, error: OSError | None = None) -> OutputError:
        """Tells why nothing arrives at stdout, and writes no more to it.

        Args:
            error: What writing to it raised; None where it was closed from the first.

        Returns:
            The error to raise.
        """
        if error is not None and self.stdout is not None:
            # Python would complain once more when it flushes stdout on its way out.
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stdout.fileno())
        if error is None or isinstance(error, BrokenPipeError):
            return OutputError(_CLOSED)
        return OutputError(f"stdout cannot be written to: {error.strerror}")

    @contextmanager
    def guard_stdout(self) -> Iterator[None]:
        """Sends to stderr what a user's own code prints, so that stdout holds results alone.

        Yields:
            Nothing.
        """
        with contextlib.redirect_stdout(self.stderr):
            yield

    def note(self, text: str) -> None:
        """Tells something beside the result, in one line.

        Args:
            text: The note.
        """
        if not self.quiet:
            self._line(f"note: {text}")

    def error(self, text: str) -> None:
        """Tells why the command ends, in one line.

        Args:
            text: What, where, the cure.
        """
        self._line(f"losscli: {text}")

    def _line(self, text: str) -> None:
        if self.stderr is None:
            return
        encoding = getattr(self.stderr, "encoding", None) or "utf-8"
        line = printable(text).encode(encoding, "backslashreplace").decode(encoding)
        # A talk that nobody can hear is no reason to fail.
        with contextlib.suppress(OSError):
            self.stderr.write(f"{line}\n")
            self.stderr.flush()

    @contextmanager
    def progress(
        self, total: int, unit: str, skipped: Callable[[], float] = lambda: 0.0
    ) -> Iterator[Callable[[float], None]]:
        """Shows how far a computation is: a bar on a terminal, else a line every ten seconds.

        Args:
            total: How much there is to do.
            unit: What is counted, in the plural.
            skipped: How much of what is done took no time, since it was known before.

        Yields:
            A function to call with how much is done.
        """
        if self.quiet:
            yield lambda _: None
        elif self.animated:
            yield from self._bar(_Count(total, unit, skipped))
        else:
            yield self._lines(_Count(total, unit, skipped))

    def _bar(self, count: _Count) -> Iterator[Callable[[float], None]]:
        # rich takes a while to import, and only a terminal needs it.
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        columns = (
            TextColumn("{task.fields[count]}"),
            BarColumn(None, table_column=Column(min_width=4, max_width=40)),
            TextColumn("{task.fields[rate]}"),
        )
        console = RichConsole(file=self.stderr)
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=count.total, count=count.told, rate="")

            def tell(done: float) -> None:
                count.add(done)
                # A narrow terminal has no room for more than how much is left.
                wide = console.width >= _WIDE
                rate = (f"{count.rate:.3g} {count.unit}/s" if wide else "", count.left)
                bar.update(
                    task, completed=count.done, count=count.told, rate=" ".join(filter(None, rate))
                )

            yield tell

    def _lines(self, count: _Count) -> Callable[[float], None]:
        last = time.monotonic()

        def tell(done: float) -> None:
            nonlocal last
            count.add(done)
            now = time.monotonic()
            if now - last >= _INTERVAL and count.rate:
                last = now
                self._line(", ".join(filter(None, (count.told, count.left))))

        return tell


class _Count:
    """How far a computation is, and when it will be done.

    What was known before takes no time, and what is done anew, after it was lost, is no progress.

    Args:
        total: How much there is to do; it may turn out to be more.
        unit: What is counted, in the plural.
        skipped: How much of what is done took no time.

    Attributes:
        done: How much is done, which never falls.
    """

    def __init__(self, total: int, unit: str, skipped: Callable[[], float]) -> None:
        self.total = total
        self.unit = unit
        self.done = 0.0
        self._skipped = skipped
        self._known = skipped()
        self._new = 0.0
        self._begun = time.monotonic()

    def add(self, done: float) -> None:
        """Takes note of how much is done by now."""
        known = self._skipped()
        self._new += max(0.0, done - self.done - (known - self._known))
        self._known = known
        self.done = max(self.done, done)

    @property
    def rate(self) -> float:
        """How much is done a second; 0 where nothing was, but for rounding."""
        spent = time.monotonic() - self._begun
        return self._new / max(spent, 1e-9) if self._new > _ROUNDING else 0.0

    @property
    def told(self) -> str:
        """How much is done, in words, and of how much where that is known."""
        of = f"/{self.total}" if self.done <= self.total + _ROUNDING else ""
        return f"{int(self.done + _ROUNDING)}{of} {self.unit}"

    @property
    def left(self) -> str:
        """The time that is left, in words; nothing where it is not known."""
        left = self.total - self.done
        if not self.rate or left < -_ROUNDING:
            return ""
        return f"{_duration(max(0.0, left) / self.rate)} left"


class SilentConsole(Console):
    """The streams of a process that leaves all talk to another one.

    Attributes:
        said: The last error that was to be told.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stdout = self.stderr = None
        self.said = ""

    def result(self, text: str, *, drawn: bool = False) -> None:
        """Writes nothing.

        Args:
            text: What another process writes.
            drawn: Whether its control characters are losscli's own.
        """

    def error(self, text: str) -> None:
        """Keeps an error.

        Args:
            text: What another process may tell.
        """
        self.said = text


def stdin() -> bytes:
    """Reads stdin to its end.

    Returns:
        What it held.

    Raises:
        UsageError: It is closed, or cannot be read.
        LosscliError: What comes out of it is no text, or does not end.
    """
    if sys.stdin is None:  # so Python has it where the caller closed it
        raise UsageError("stdin is closed, so - names nothing", "Give names, or a pipe to stdin")
    try:
        return read_text(sys.stdin.buffer)
    except IrregularError as error:
        raise LosscliError(f"stdin cannot be read: {error}") from None
    except OSError as error:
        raise UsageError(f"stdin cannot be read: {error.strerror}", "Give names") from None


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
