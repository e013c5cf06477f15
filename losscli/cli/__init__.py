"""The command line: parse, call, write. Errors become one line and an exit status here."""

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
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

from losscli.cli.console import Console, SilentConsole
from losscli.cli.sigbus import exit_on_lost_pages
from losscli.errors import LosscliError, UsageError
from losscli.studies.registry import COMMANDS

__all__ = ["main"]

_COMPLETION = frozenset({"--install-completion", "--show-completion"})

# Seconds after which a signal that was dropped is sent again.
_MOMENT = 0.01


class _Signalled(BaseException):
    """Ctrl-C, or SIGTERM as a batch system sends it before it ends a job."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and ends the process with its exit status.

    0: done; 1: could not; 2: usage; 130: Ctrl-C; 143: SIGTERM.

    Args:
        arguments: The command line without the program's name; that of the process by default.
    """
    console = Console()
    # Files alone are drawn. What a desktop's session has there may not be installed here.
    os.environ["MPLBACKEND"] = "agg"
    exit_on_lost_pages(console.error)
    status = run(sys.argv[1:] if arguments is None else list(arguments), console)
    if status > 128:
        # A thread that hangs in a model's code must not keep a process that was told to end.
        os._exit(status)
    sys.exit(status)


def run(arguments: Sequence[str], console: Console) -> int:
    """Runs a command.

    Args:
        arguments: The command line without the program's name.
        console: Its streams.

    Returns:
        The exit status.
    """
    # Not a KeyboardInterrupt: typer would swallow it.
    before = {n: signal.signal(n, _signalled) for n in (signal.SIGINT, signal.SIGTERM)}
    hook, sys.unraisablehook = sys.unraisablehook, partial(_unraisable, sys.unraisablehook)
    try:
        with warnings.catch_warnings():  # -q leaves them out
            return _attempt(partial(_dispatch, arguments), console)
    except _Signalled as sent:
        # While another end was told of, or when all was done.
        return 128 + sent.number
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _attempt(work: Callable[[Console], int], console: Console) -> int:
    """Does what a command asks for; returns its exit status, and tells of errors."""
    try:
        return work(console)
    except LosscliError as error:
        if console.traceback:
            raise
        console.error(_with_what_is_kept(str(error), console))
        return error.exit_code
    except _Signalled as sent:
        import multiprocessing

        # Workers that decode data would else be waited for until they are done with a batch.
        for child in multiprocessing.active_children():
            child.terminate()
        how = "interrupted" if sent.number == signal.SIGINT else "terminated"
        written = "the results are written" if console.written else "nothing was written"
        console.error(f"{how}; {_kept(console) or written}")
        return 128 + sent.number
    except SystemExit as error:
        if "_LOSSCLI_COMPLETE" in os.environ:  # a shell asked typer for completions
            return error.code if isinstance(error.code, int) else 0
        ended = f"code that this command runs ended with SystemExit({error.code})"
        console.error(_with_what_is_kept(ended, console))
        return 1
    except OSError as error:
        if console.traceback:
            raise
        failed = f"{error.filename or 'a stream'}: {error.strerror}"
        console.error(_with_what_is_kept(failed, console))
        return 1
    except Exception as error:
        if console.traceback:
            raise
        fault = (
            f"unexpected {type(error).__name__}: {error}. This is a fault of losscli: run again "
            "with --traceback and report what it shows"
        )
        console.error(_with_what_is_kept(fault, console))
        return 1


def _kept(console: Console) -> str:
    """Says where what was finished lies, if anything was."""
    if console.kept is None:
        return ""
    return f"what was finished is in {console.kept}: the same command goes on from there"


def _with_what_is_kept(text: str, console: Console) -> str:
    kept = _kept(console)
    return f"{text.rstrip('.')}. {kept[0].upper()}{kept[1:]}" if kept else text


def _signalled(number: int, _frame: FrameType | None) -> None:
    raise _Signalled(number)


def _unraisable(otherwise: Callable[[Any], Any], dropped: Any) -> None:
    """Sends a signal again that fell into a finaliser or the hook of a fork, and so was dropped."""
    if isinstance(dropped.exc_value, _Signalled):
        # By a thread, in a moment: here it would be dropped again.
        _thread.start_new_thread(_send_again, (dropped.exc_value.number,))
    else:
        otherwise(dropped)


def _send_again(number: int) -> None:
    time.sleep(_MOMENT)
    os.kill(os.getpid(), number)


def _dispatch(arguments: Sequence[str], console: Console) -> int:
    try:
        Path.cwd()  # without one torch ends the process
    except FileNotFoundError:
        raise UsageError("the current folder is gone", "Change to one that is there") from None
    if "RANK" in os.environ:
        from losscli.evaluation.ranks import is_one_of_many

        if is_one_of_many():
            return _among_ranks(arguments, console)
    return _parse(arguments, console)


def _among_ranks(arguments: Sequence[str], console: Console) -> int:
    """Runs a command together with other processes, of which rank 0 alone talks."""
    leads = os.environ["RANK"] == "0"
    # All other commands take no longer by rank 0 alone.
    distributed = {name for name, command in COMMANDS.items() if command.distributed}
    if not set(arguments[:1]) <= distributed or not {"-h", "--help"}.isdisjoint(arguments):
        return _parse(arguments, console) if leads else 0
    from losscli.evaluation.ranks import joined

    # torch would log the frames of its C++ where a connection ends; what follows tells of it.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    silent = SilentConsole()
    with joined(console.note) as ranks:
        own = console if leads else silent
        own.ranks = ranks
        status = _attempt(partial(_parse, arguments), own)
        # What ends by a signal was told to, and the others were too.
        if 0 < status <= 128:
            ranks.fail(silent.said)
        ranks.leave(status)
    return status


def _without_commas(arguments: Sequence[str]) -> str:
    """Returns a cure where the numbers of an option have commas between them; else nothing."""
    for option, value in pairwise(arguments):
        numbers = value.split(",")
        if option.startswith("-") and len(numbers) > 1 and all(map(_is_number, numbers)):
            return f"Separate the numbers by spaces: {option} {' '.join(numbers)}"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _parse(arguments: Sequence[str], console: Console) -> int:
    # typer takes a tenth of a second to import: within `run`, so that Ctrl-C is heard meanwhile.
    import typer

    from losscli.cli.app import app

    # Typer bundles click since its version 0.2x, so its exceptions have no stable home.
    click_exception: type[Any] = typer.BadParameter.__mro__[2]
    notes = _Notes(console)
    logging.getLogger("losscli").addHandler(notes)
    # So help is asked for, which typer writes; and completion, after which it ends the process.
    helps = not arguments or not {"-h", "--help"}.isdisjoint(arguments)
    completes = not _COMPLETION.isdisjoint(arguments[:1])
    try:
        status = app(args=list(arguments), prog_name="losscli", standalone_mode=False, obj=console)
        if helps and sys.stdout is None:
            raise console.lost()
    except SystemExit as error:
        # So rich ends a text that is read no further, as by head: nothing is lost.
        if (helps or completes) and isinstance(error.__context__, BrokenPipeError):
            return 0
        if not completes:
            raise
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except OSError as error:
        if not (helps or completes) or error.filename:
            raise
        lost = console.lost(error)
        if isinstance(error, BrokenPipeError):
            return 0
        raise lost from None
    except click_exception as error:
        command = getattr(getattr(error, "ctx", None), "command_path", "losscli")
        raise UsageError(
            error.format_message() or "no command is given",
            _without_commas(arguments) or f"See {command} --help",
        ) from None
    finally:
        logging.getLogger("losscli").removeHandler(notes)
    return status if isinstance(status, int) else 0


class _Notes(logging.Handler):
    """Shows as a note what is logged while a command runs."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.note(record.getMessage())
