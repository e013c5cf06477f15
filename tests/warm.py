"""A losscli that has imported everything before it is called, for what calls it many times.

``python warm.py SOCKET`` waits there. Scripts by the names of losscli and python stand in for the
commands: they hand over their arguments, folder, environment and three streams, and a fork does the
work, as a process that had only just begun would. ``python`` takes the name of a file.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["serving"]

_SCRIPT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({place!r})
    told = json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(told).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(told)
    status = server.recv(1)
sys.exit(status[0] if status else 70)
"""


@contextmanager
def serving(folder: Path) -> Iterator[Path]:
    """Has a losscli at hand.

    Args:
        folder: An empty folder, with a short name.

    Yields:
        The folder to begin PATH with.
    """
    place = folder / "socket"
    for name in ("losscli", "python"):
        script = folder / name
        script.write_text(_SCRIPT.format(python=sys.executable, place=str(place)), encoding="utf-8")
        script.chmod(0o755)
    with subprocess.Popen(
        [sys.executable, str(Path(__file__)), str(place)], stdout=subprocess.PIPE
    ) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"here\n"
        try:
            yield folder
        finally:
            server.terminate()


def _serve(place: str) -> None:
    # What any command may need, but nothing that begins a thread.
    from matplotlib.artist import Artist
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    from losscli.cli.app import make_app
    from losscli.plotting import style, surface
    from losscli.registry import COMMANDS, load
    from losscli.studies import alignment  # noqa: F401

    importlib.import_module("torch._dynamo")  # by optimisers and align
    make_app()
    for command in COMMANDS.values():
        load(command.function)
        load(command.drawing)

    # Pictures have no layout and fewer pixels and facets: most of the time of drawing.
    style._STYLE["savefig.dpi"] = 40
    surface._FACETS = 6
    ConstrainedLayoutEngine.execute = Figure.draw_without_rendering = lambda *_: None  # type: ignore[method-assign]
    # Ticks are as in conftest.py.
    Axis._copy_tick_props = lambda *_: None  # type: ignore[attr-defined]
    Axis.set_clip_path = Artist.set_clip_path  # type: ignore[method-assign]

    with tempfile.TemporaryDirectory() as folder:
        _begin(Path(folder))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(place)
        server.listen()
        print("here", flush=True)
        while True:
            caller, _ = server.accept()
            if not os.fork():
                server.close()
                _answer(caller)
            caller.close()


def _begin(folder: Path) -> None:
    """Runs commands, since torch and Matplotlib import much of themselves late, and load fonts."""
    import numpy as np

    from losscli.cli import run
    from losscli.cli.console import Console

    np.savez(folder / "data.npz", inputs=np.eye(6, dtype=np.float32), targets=np.arange(6) % 3)
    options = f"-m mlp:6-5-3 -d npz:{folder}/data.npz -o {folder}"
    for command in (
        f"interpolate init:0 init:1 --points 3 {options}/line",
        f"plane init:0 init:1 init:2 --points 3 {options}/plane",
        f"check init:0 --tolerance 1 {options}/point",
    ):
        stderr = io.StringIO()
        assert run(command.split(), Console(io.StringIO(), stderr)) == 0, stderr.getvalue()


def _answer(caller: socket.socket) -> None:
    """Does what a caller asks for, in a process of its own, and ends it."""
    from losscli.cli import main

    status = 70
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        size, streams, *_ = socket.recv_fds(caller, 8, 3)
        with caller.makefile("rb") as file:
            words, folder, environment = json.loads(file.read(int.from_bytes(size, "big")))
        for own, stream in enumerate(streams):
            os.dup2(stream, own)
            os.close(stream)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        try:
            script, *arguments = words
            if Path(script).name == "python":
                sys.argv = arguments
                sys.path[0] = str(Path(arguments[0]).parent)
                runpy.run_path(arguments[0], run_name="__main__")
            else:
                main(arguments)
            status = 0
        except SystemExit as ended:
            status = int(ended.code or 0)
        sys.stdout.flush()
    finally:
        caller.send(bytes([status]))
        os._exit(status)


if __name__ == "__main__":
    _serve(sys.argv[1])
