"""The streams of a command: results on stdout; progress, notes and errors on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from losscli.errors import LosscliError, OutputError, UsageError, printable
from losscli.files import IrregularError, read_text
from losscli.progress import WorkCounter, is_animated, show_bar, show_lines

if TYPE_CHECKING:
    from losscli.evaluation.ranks import Ranks

__all__ = ["Console", "SilentConsole", "stdin"]

_CLOSED = "stdout was closed before the result was written to it"


class Console:
    """The streams of one command.

    Args:
        stdout: Where results go; `sys.stdout` by default.
        stderr: Where progress, notes and errors go; `sys.stderr` by default.

    Attributes:
        quiet: Whether progress and notes are suppressed.
        traceback: Whether an error shows its traceback.
        journal: The journal of a run that ended early; None if it kept nothing.
        written: Whether the results are written.
        ranks: The processes that share the command; None if there is only this one.
    """

    def __init__(self, stdout: TextIO | None = None, stderr: TextIO | None = None) -> None:
        # Python sets its streams to None if the caller closed them.
        self.stdout: TextIO | None = stdout if stdout is not None else sys.stdout
        self.stderr: TextIO | None = stderr if stderr is not None else sys.stderr
        self.quiet = False
        self.traceback = False
        self.journal: Path | None = None
        self.written = False
        self.ranks: Ranks | None = None

    @property
    def animated(self) -> bool:
        """Whether stderr is a terminal that a progress bar can be drawn on."""
        return is_animated(self.stderr)

    @property
    def can_ask(self) -> bool:
        """Whether questions can be asked: stdin and stderr are terminals."""
        streams = (sys.stdin, self.stderr)
        return all(stream is not None and stream.isatty() for stream in streams)

    def ask(self, question: str) -> str:
        """Asks a question on stderr.

        Args:
            question: The question.

        Returns:
            The line that is typed, without spaces around it.

        Raises:
            UsageError: There is no answer: stdin ends.
        """
        if self.stderr is not None:
            self.stderr.write(f"{question} ")
            self.stderr.flush()
        answer = os.fsdecode(sys.stdin.buffer.readline())
        if not answer:
            raise UsageError("no answer: stdin ended", "Give options instead of answers")
        return answer.strip()

    def result(self, text: str, *, drawn: bool = False) -> None:
        """Writes a result to stdout and flushes it.

        On a terminal, control characters are written as escapes, since names come from files. In a
        pipe or a file they are kept.

        Args:
            text: The result.
            drawn: Whether the control characters are those of losscli, such as colours.

        Raises:
            OutputError: stdout is closed or cannot be written to.
        """
        if self.stdout is None:
            raise OutputError(_CLOSED)
        if not drawn and self.stdout.isatty():
            text = "\n".join(map(printable, text.replace("\r\n", "\n").split("\n")))
        # Characters of names that the encoding lacks are written as escapes.
        encoded = text.encode(self.stdout.encoding or "utf-8", "backslashreplace")
        try:
            buffer = getattr(self.stdout, "buffer", None)
            if buffer is None:
                self.stdout.write(text)
            else:
                # An unbuffered stdout may write only a part, and Python's text layer would drop
                # the rest silently.
                unwritten = memoryview(encoded)
                while unwritten:
                    unwritten = unwritten[buffer.write(unwritten) :]
            self.stdout.flush()
        except OSError as error:
            raise self.output_error(error) from None

    def output_error(self, error: OSError | None = None) -> OutputError:
        """Explains why writing to stdout failed, and redirects it to the null device.

        Args:
            error: The error of a write; None if stdout was closed from the start.

        Returns:
            The error to raise.
        """
        if error is not None and self.stdout is not None:
            # Otherwise the flush of stdout at exit fails again.
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stdout.fileno())
        if error is None or isinstance(error, BrokenPipeError):
            return OutputError(_CLOSED)
        return OutputError(f"stdout cannot be written to: {error.strerror}")

    @contextmanager
    def guard_stdout(self) -> Iterator[None]:
        """Redirects prints of user code to stderr, so that stdout has only results."""
        with contextlib.redirect_stdout(self.stderr):
            yield

    def note(self, text: str) -> None:
        """Writes a note in one line, unless quiet."""
        if not self.quiet:
            self._line(f"note: {text}")

    def error(self, text: str) -> None:
        """Writes an error in one line: what is wrong, where, and how to fix it."""
        self._line(f"losscli: {text}")

    def _line(self, text: str) -> None:
        if self.stderr is None:
            return
        encoding = getattr(self.stderr, "encoding", None) or "utf-8"
        line = printable(text).encode(encoding, "backslashreplace").decode(encoding)
        # An unwritable stderr must not make the command fail.
        with contextlib.suppress(OSError):
            self.stderr.write(f"{line}\n")
            self.stderr.flush()

    @contextmanager
    def progress(
        self, total: int, unit: str, skipped: Callable[[], float] = lambda: 0.0
    ) -> Iterator[Callable[[float], None]]:
        """Shows progress: a bar on a terminal, else a line every ten seconds.

        Args:
            total: The amount of work.
            unit: The unit of work, in the plural.
            skipped: Returns the amount of work that took no time, since it was in a journal.

        Yields:
            A function to call with the amount of work done so far.
        """
        if self.quiet:
            yield lambda _: None
        elif self.animated:
            assert self.stderr is not None
            with show_bar(WorkCounter(total, unit, skipped), self.stderr) as update:
                yield update
        else:
            yield show_lines(WorkCounter(total, unit, skipped), self._line)


class SilentConsole(Console):
    """A console without streams, for ranks other than 0.

    Attributes:
        last_error: The last error; empty if there was none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stdout = self.stderr = None
        self.last_error = ""

    def result(self, text: str, *, drawn: bool = False) -> None:
        """Writes nothing."""

    def error(self, text: str) -> None:
        """Keeps the error as `last_error`."""
        self.last_error = text


def stdin() -> bytes:
    """Reads stdin to its end.

    Returns:
        The bytes.

    Raises:
        UsageError: stdin is closed or cannot be read.
        LosscliError: The content is not text, or is too long.
    """
    if sys.stdin is None:  # the caller closed it
        raise UsageError("stdin is closed, so - gives no names", "Give names, or a pipe to stdin")
    try:
        return read_text(sys.stdin.buffer)
    except IrregularError as error:
        raise LosscliError(f"stdin cannot be read: {error}") from None
    except OSError as error:
        raise UsageError(f"stdin cannot be read: {error.strerror}", "Give names") from None
