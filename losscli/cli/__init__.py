"""The entry point of the command line, which turns errors into one line and an exit status."""

from __future__ import annotations

import _thread
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from losscli.cli.console import Console, SilentConsole
from losscli.cli.imports import importing
from losscli.cli.sigbus import exit_on_lost_pages
from losscli.errors import LosscliError, UsageError
from losscli.registry import COMMANDS

__all__ = ["main"]

_COMPLETION = frozenset({"--install-completion", "--show-completion"})

# Seconds before a lost signal is sent again.
_RESEND_DELAY = 0.01


class _Signalled(BaseException):
    """SIGINT (Ctrl-C), or SIGTERM as batch systems send it before they end a job.

    Attributes:
        reporting: Whether one is being reported. Another one, such as a second Ctrl-C, is ignored
            meanwhile, and the message is complete.
    """

    reporting = False

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and ends the process with its exit status.

    0: success; 1: failure; 2: usage error; 130: Ctrl-C; 143: SIGTERM.

    Args:
        arguments: The arguments without the program name; ``sys.argv[1:]`` by default.
    """
    console = Console()
    # Figures are only written to files; an interactive backend may not be installed.
    os.environ["MPLBACKEND"] = "agg"
    exit_on_lost_pages(console.error)
    status = run(sys.argv[1:] if arguments is None else list(arguments), console)
    if status > 128:
        # A thread that hangs in a model's code must not keep the process alive after a signal.
        os._exit(status)
    sys.exit(status)


def run(arguments: Sequence[str], console: Console) -> int:
    """Runs a command.

    Args:
        arguments: The arguments without the program name.
        console: The streams.

    Returns:
        The exit status.
    """
    hook, matplotlib = sys.unraisablehook, logging.getLogger("matplotlib")
    level = matplotlib.level
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    over = False

    # typer would swallow a KeyboardInterrupt.
    def interrupt(number: int, _frame: FrameType | None) -> None:
        if not (over or _Signalled.reporting):
            raise _Signalled(number)

    try:
        for number in before:
            signal.signal(number, interrupt)
        sys.unraisablehook = partial(_unraisable, hook)
        with warnings.catch_warnings():  # -q changes the filters, and Matplotlib's log level
            return _run_and_report(partial(_dispatch, arguments), console)
    except _Signalled as signalled:
        # It came while an error was reported, or after the command had finished.
        over = True
        return 128 + signalled.number
    finally:
        # First, and without a call, in which Python would handle a signal.
        over = True
        sys.unraisablehook = hook
        matplotlib.setLevel(level)
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_and_report(work: Callable[[Console], int], console: Console) -> int:
    """Runs a command, reports its error and returns its exit status."""
    try:
        return work(console)
    except _Signalled as signalled:
        # First, and without a call, in which Python would handle a second signal.
        _Signalled.reporting = True
        import multiprocessing

        # Otherwise the process waits until its data workers have finished a batch.
        for child in multiprocessing.active_children():
            child.terminate()
        how = "interrupted" if signalled.number == signal.SIGINT else "terminated"
        written = "the results are written" if console.written else "nothing was written"
        console.error(f"{how}; {_resume_hint(console) or written}")
        _Signalled.reporting = False
        return 128 + signalled.number
    except SystemExit as error:
        if "_LOSSCLI_COMPLETE" in os.environ:  # a shell asks for completions
            return error.code if isinstance(error.code, int) else 0
        message = f"code that this command runs ended with SystemExit({error.code})"
        console.error(_with_resume_hint(message, console))
        return 1
    except Exception as error:
        if console.traceback:
            raise
        console.error(_with_resume_hint(_message(error), console))
        return error.exit_code if isinstance(error, LosscliError) else 1


def _message(error: Exception) -> str:
    if isinstance(error, LosscliError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or 'a stream'}: {error.strerror}"
    return (
        f"unexpected {type(error).__name__}: {error}. This is a bug in losscli: run again with "
        "--traceback and report what it shows"
    )


def _resume_hint(console: Console) -> str:
    """Returns how to resume a run; empty if it has no journal."""
    if console.journal is None:
        return ""
    return f"finished work is in {console.journal}: the same command resumes from there"


def _with_resume_hint(text: str, console: Console) -> str:
    hint = _resume_hint(console)
    return f"{text.rstrip('.')}. {hint[0].upper()}{hint[1:]}" if hint else text


def _unraisable(default_hook: Callable[[Any], Any], unraisable: Any) -> None:
    """Sends a signal again if Python dropped it in a finaliser or a fork hook."""
    if isinstance(unraisable.exc_value, _Signalled):
        # From a thread and later, since an exception raised here would be dropped again.
        _thread.start_new_thread(_send_again, (unraisable.exc_value.number,))
    else:
        default_hook(unraisable)


def _send_again(number: int) -> None:
    time.sleep(_RESEND_DELAY)
    os.kill(os.getpid(), number)


def _dispatch(arguments: Sequence[str], console: Console) -> int:
    try:
        Path.cwd()  # torch aborts without a current folder
    except FileNotFoundError:
        raise UsageError(
            "the current folder no longer exists", "Change to a folder that exists"
        ) from None
    if "RANK" in os.environ:
        from losscli.evaluation.rendezvous import is_distributed

        if is_distributed():
            return _run_as_rank(arguments, console)
    return _parse(arguments, console)


def _run_as_rank(arguments: Sequence[str], console: Console) -> int:
    """Runs a command as one of several processes; only rank 0 writes to the streams."""
    is_leader = os.environ["RANK"] == "0"
    # Only rank 0 runs the other commands.
    distributed = {name for name, command in COMMANDS.items() if command.distributed}
    if not set(arguments[:1]) <= distributed or not {"-h", "--help"}.isdisjoint(arguments):
        return _parse(arguments, console) if is_leader else 0
    from losscli.evaluation.rendezvous import join_ranks

    # Otherwise torch logs C++ stack traces when a connection ends, which is reported below.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    silent = SilentConsole()
    with join_ranks(console.note) as ranks:
        rank_console = console if is_leader else silent
        rank_console.ranks = ranks
        status = _run_and_report(partial(_parse, arguments), rank_console)
        # After a signal there is no failure to report: all ranks receive it.
        if 0 < status <= 128:
            ranks.fail(silent.last_error)
        ranks.leave(status)
    return status


def _parse(arguments: Sequence[str], console: Console) -> int:
    # click before 8.2 would print the help and succeed. A shell asks for completions without any.
    if not arguments and "_LOSSCLI_COMPLETE" not in os.environ:
        raise UsageError("no command given", "See losscli --help")
    # Imported within `run`, which handles Ctrl-C: typer takes a tenth of a second to import.
    with importing("typer"):
        import typer

        from losscli.cli.app import make_app
        from losscli.cli.parse_errors import usage_error

        app = make_app(*arguments[:1])

    # Recent versions of typer bundle click, so the exception has no stable import path.
    click_exception: type[Any] = typer.BadParameter.__mro__[2]
    notes = _Notes(console)
    logging.getLogger("losscli").addHandler(notes)
    # typer writes the help itself, and ends the process after --install-completion.
    helps = not {"-h", "--help"}.isdisjoint(arguments)
    completes = not _COMPLETION.isdisjoint(arguments[:1])
    try:
        status = app(args=list(arguments), prog_name="losscli", standalone_mode=False, obj=console)
        if helps and sys.stdout is None:
            raise console.output_error()
    except SystemExit as error:
        # rich raises it if the reader of a pipe, such as head, stops early: nothing is lost.
        if (helps or completes) and isinstance(error.__context__, BrokenPipeError):
            return 0
        if not completes:
            raise
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except OSError as error:
        if not (helps or completes) or error.filename:
            raise
        output_error = console.output_error(error)
        if isinstance(error, BrokenPipeError):
            return 0
        raise output_error from None
    except click_exception as error:
        raise usage_error(error, arguments) from None
    finally:
        logging.getLogger("losscli").removeHandler(notes)
    return status if isinstance(status, int) else 0


class _Notes(logging.Handler):
    """Shows warnings that losscli logs while a command runs as notes."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.note(record.getMessage())
