"""Commands in a process of their own that is a fork of this one: nothing is imported again."""

from __future__ import annotations

import gc
import io
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends import backend_agg  # noqa: F401 - else each child imports it

from losscli.cli import run
from losscli.cli.console import Console

__all__ = ["PATIENCE", "child", "close_inherited", "ended", "fork"]

# Seconds after which what still waits would wait forever.
PATIENCE = 600


def fork() -> int:
    """Forks this process; returns the number of the child, and 0 in the child.

    A child has one thread: OpenMP's others do not survive a fork. It never frees the garbage that
    it inherits: a process group would wait for threads that the child does not have, and a mapped
    tensor closes a file that the child may have closed already, at which PyTorch aborts.
    """
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        gc.freeze()
        torch.set_num_threads(1)
    return pid


def child(command: list[str], log: Path, before: Callable[[], Any] = lambda: None) -> int:
    """Starts a command with its log in a file; returns the number of its process."""
    if pid := fork():
        return pid
    status = 99
    try:
        stderr = io.StringIO()
        before()
        status = run(command, Console(io.StringIO(), stderr))
        # A second Ctrl-C, for example of another worker that starts, must not cut the log.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # The log of a command for which the disk was too small must fit.
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        log.write_text(stderr.getvalue())
    finally:
        os._exit(status)


def close_inherited() -> None:
    """Closes in a child what the process that runs the tests has open."""
    os.closerange(3, 4096)


def ended(pid: int) -> int:
    """Waits for a process; returns its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
