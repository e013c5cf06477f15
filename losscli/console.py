"""The talk on stderr and the result on stdout: colour, progress, notes and errors."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from losscli.errors import OutputError, printable

__all__ = ["Console", "SilentConsole"]

_INTERVAL = 10.0


class Console:
    """The streams of one command.

    Args:
        stdout: Where results go; `sys.stdout` by default.
        stderr: Where the talk goes; `sys.stderr` by default.

    Attributes:
        quiet: Whether progress and notes are left out.
        traceback: Whether an error shows where in the code it came from.
        kept: Where what was finished lies if the command ends too early; None where nothing was.
    """

    def __init__(self, stdout: TextIO | None = None, stderr: TextIO | None = None) -> None:
        # Python's own streams are None where the caller closed them.
        self.stdout: TextIO | None = stdout if stdout is not None else sys.stdout
        self.stderr: TextIO | None = stderr if stderr is not None else sys.stderr
        self.quiet = False
        self.traceback = False
        self.kept: Path | None = None

    @property
    def animated(self) -> bool:
        """Whether stderr is a terminal that a progress bar can be drawn on."""
        return self.stderr is not None and self.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def result(self, text: str) -> None:
        """Writes to stdout, and makes sure that it arrived.

        Args:
            text: What to write.

        Raises:
            OutputError: Nobody reads it.
        """
        closed = OutputError("stdout was closed before the result was written to it")
        if self.stdout is None:
            raise closed
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
            # Python would complain once more when it flushes stdout on its way out.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stdout.fileno())
            if isinstance(error, BrokenPipeError):
                raise closed from None
            raise OutputError(f"stdout cannot be written to: {error.strerror}") from None

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
            yield from self._bar(total, unit, skipped)
        else:
            yield self._lines(total, unit, skipped)

    def _bar(
        self, total: int, unit: str, skipped: Callable[[], float]
    ) -> Iterator[Callable[[float], None]]:
        # rich takes a while to import, and only a terminal needs it.
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (
            TextColumn("{task.fields[count]}"),
            BarColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        console = RichConsole(file=self.stderr)
        begun = time.monotonic()
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=total, count=f"0/{total} {unit}", rate="")

            def tell(done: float) -> None:
                rate = (done - skipped()) / max(time.monotonic() - begun, 1e-9)
                left = f" {_duration((total - done) / rate)} left" if rate > 0 else ""
                bar.update(
                    task,
                    completed=done,
                    count=f"{int(done)}/{total} {unit}",
                    rate=f"{rate:.3g} {unit}/s{left}",
                )

            yield tell

    def _lines(
        self, total: int, unit: str, skipped: Callable[[], float]
    ) -> Callable[[float], None]:
        begun = last = time.monotonic()

        def tell(done: float) -> None:
            nonlocal last
            now = time.monotonic()
            new = done - skipped()
            if now - last >= _INTERVAL and new > 0:
                last = now
                left = (now - begun) / new * (total - done)
                self._line(f"{int(done)}/{total} {unit}, {_duration(left)} left")

        return tell


class SilentConsole(Console):
    """The streams of a process that leaves all talk to another one.

    Attributes:
        said: The last error that was to be told.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stdout = self.stderr = None
        self.said = ""

    def result(self, text: str) -> None:
        """Writes nothing.

        Args:
            text: What another process writes.
        """

    def error(self, text: str) -> None:
        """Keeps an error.

        Args:
            text: What another process may tell.
        """
        self.said = text


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
