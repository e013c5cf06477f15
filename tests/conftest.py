"""What tests share: checkpoints on disk, and the command line with its streams caught."""

from __future__ import annotations

import compileall
import gc
import importlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from tests import libraries, warm

ROOT = Path(__file__).parent.parent

# What older versions cannot do: pyproject.toml allows them.
SAFETENSORS_HAS_COMPLEX = Version(version("safetensors")) >= Version("0.7")
TRANSFORMERS_5 = Version(version("transformers")) >= Version("5")

# As `make test` has it, also for the tests of one file: results depend on the number of threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No power is lost here, and to wait for the disk takes a while.
os.fsync = lambda _: None


def pytest_configure(config: pytest.Config) -> None:
    """Compiles losscli, which else each process that a test starts would do on its own."""
    if not hasattr(config, "workerinput"):
        compileall.compile_dir(ROOT / "losscli", quiet=2)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Prepares a process that runs tests; with ``-n`` the first process runs none."""
    config = session.config
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None):
        importlib.import_module("tests.preparation")


# While modules are imported and tests are collected, next to nothing becomes garbage.
gc.disable()


def pytest_collection_finish() -> None:
    """Leaves what is imported by now out of the searches for garbage and for a user's code.

    Garbage is also searched for less often, which takes a twentieth of all time.

    From now on no compiled module is kept: tests write a user's code, and write it again within the
    second that compiled modules go by.
    """
    from tests import preparation

    gc.freeze()
    gc.set_threshold(100_000)
    gc.enable()
    preparation.collected()
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starts with the file that takes longest, so that no process waits for another at the end.

    Next come the tests that import large libraries.
    """
    modules = {item.path: item.module for item in items if isinstance(item, pytest.Function)}
    heavy = {path for path, module in modules.items() if libraries.needed_by(module)}
    items.sort(key=lambda item: (item.path.name != "test_readme.py", item.path not in heavy))


@dataclass(frozen=True)
class Outcome:
    status: int
    stdout: str
    stderr: str


Losscli = Callable[..., Outcome]


@pytest.fixture
def losscli() -> Losscli:
    """Runs a command in this process."""
    return invoke


def invoke(*arguments: object) -> Outcome:
    """Runs a command in this process."""
    from losscli.cli import run
    from losscli.cli.console import Console

    console = Console(io.StringIO(), io.StringIO())
    status = run([str(a) for a in arguments], console)
    return Outcome(status, console.stdout.getvalue(), console.stderr.getvalue())  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def at_hand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder to begin PATH with for a losscli in a process of its own that begins at once."""
    with warm.serving(tmp_path_factory.mktemp("warm")) as folder:
        yield folder


@pytest.fixture
def laid_out() -> None:
    """For tests of where things are in a figure, where `unlaid` holds for the others of a file."""


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws surfaces with few facets; the layout leaves the facets out."""
    monkeypatch.setattr("losscli.plotting.surface._FACETS", 6)


@pytest.fixture
def unlaid(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the layout, most of the time of drawing a figure, and most of its pixels.

    Its artists are the same.
    """
    if "laid_out" not in request.fixturenames:
        request.getfixturevalue("coarse")
        from matplotlib.artist import Artist

        from losscli.plotting import style

        monkeypatch.setitem(style._STYLE, "savefig.dpi", 40)
        monkeypatch.setattr(
            "matplotlib.layout_engine.ConstrainedLayoutEngine.execute", lambda *_: None
        )
        monkeypatch.setattr("matplotlib.figure.Figure.draw_without_rendering", lambda *_: None)
        # New ticks have the settings of their axis; Matplotlib then copies those of the first tick,
        # which are the same, and makes ticks that an axis does not have in order to clip them.
        monkeypatch.setattr("matplotlib.axis.Axis._copy_tick_props", lambda *_: None)
        monkeypatch.setattr("matplotlib.axis.Axis.set_clip_path", Artist.set_clip_path)


@pytest.fixture
def unseen(unlaid: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws figures without rendering them, for tests of when a picture is written, and where."""

    def write(_: object, file: io.BytesIO, *, format: str, **__: object) -> None:  # noqa: A002
        file.write(format.encode())

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", write)


@pytest.fixture
def undrawn(unseen: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves lines out of figures too, for tests of the names of files."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(
        "losscli.plotting.interpolation.draw_interpolation", lambda *_, **__: Figure()
    )


@pytest.fixture
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces each kind of MLP only once per process, since torch takes a tenth of a second."""
    from losscli.models import MLP
    from losscli.weight_space import tracing

    export = tracing._export

    def export_once(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        network = model.model
        if type(network) is not MLP:
            return export(model, args, kwargs)
        model.eval()
        shapes = [(tuple(x.shape), x.dtype) for x in args]
        key = f"{network} {network.activation} {shapes} {kwargs}"
        if key not in _programs:
            _programs[key] = export(model, args, kwargs)
        return _programs[key]

    monkeypatch.setattr(tracing, "_export", export_once)


_programs: dict[str, Any] = {}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two small checkpoints, a.pt and b.pt, their data and a losscli.toml.

    The command line runs inside it.
    """
    fill(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fill(folder: Path) -> None:
    """Writes the files of the fixture `folder`."""
    import numpy as np
    import torch

    from losscli.models import MLP

    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        torch.save(
            {"state_dict": MLP("6-5-3").state_dict(), "losscli.model": "mlp:6-5-3"},
            folder / f"{name}.pt",
        )
    generator = torch.Generator().manual_seed(2)
    arrays = {
        "train_inputs": torch.rand(29, 6, generator=generator).numpy(),
        "train_targets": (torch.arange(29) % 3).numpy(),
        "test_inputs": torch.rand(11, 6, generator=generator).numpy(),
        "test_targets": (torch.arange(11) % 3).numpy(),
    }
    np.savez(folder / "data.npz", **arrays)  # type: ignore[arg-type]
    (folder / "losscli.toml").write_text('data = "npz:data.npz"\n')
