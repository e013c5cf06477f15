"""Imports with less work."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from losscli.cli.imports import importing

# A module that makes more objects than the collector lets pass in the three generations.
MAKES_OBJECTS = "objects = [[] for _ in range(120_000)]\n"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = "losscli_test_of_imports"
    (tmp_path / f"{name}.py").write_text(MAKES_OBJECTS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def collections() -> list[int]:
    return [generation["collections"] for generation in gc.get_stats()]


def test_nothing_is_collected_during_an_import_and_its_objects_are_exempt_later(
    module: str,
) -> None:
    before, frozen = collections(), gc.get_freeze_count()
    with importing(module):
        __import__(module)
        assert collections() == before
    assert gc.isenabled()
    assert gc.get_freeze_count() > frozen + 120_000


def test_a_package_that_is_imported_already_changes_nothing(module: str) -> None:
    __import__(module)
    frozen = gc.get_freeze_count()
    with importing(module):
        assert gc.isenabled()
    assert gc.get_freeze_count() <= frozen


def test_a_failed_import_leaves_the_collector_on_and_exempts_nothing(module: str) -> None:
    frozen = gc.get_freeze_count()
    with pytest.raises(ImportError), importing(module):
        __import__(f"{module}.without")
    assert gc.isenabled()
    assert gc.get_freeze_count() <= frozen


def test_a_user_who_disabled_the_collector_finds_it_disabled(module: str) -> None:
    gc.disable()
    try:
        with importing(module):
            __import__(module)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_matplotlib_has_its_docstrings_of_properties_after_the_import() -> None:
    code = """
from losscli.cli.imports import import_plotting
import_plotting()
from matplotlib.lines import Line2D
assert "antialiased" not in Line2D.set.__doc__
from matplotlib.artist import kwdoc
assert "antialiased" in kwdoc(Line2D)
class Further(Line2D):
    pass
assert "antialiased" in Further.set.__doc__
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
