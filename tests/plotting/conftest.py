"""Figures without a layout, which takes most of the time of drawing one."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine


@pytest.fixture
def laid_out() -> None:
    """For tests of where things are, and of pictures as a whole."""


@pytest.fixture(autouse=True)
def _artists_alone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the layout out where a test does not ask for it; the artists are the same."""
    if "laid_out" not in request.fixturenames:
        monkeypatch.setattr(ConstrainedLayoutEngine, "execute", lambda *_: None)
        monkeypatch.setattr(Figure, "draw_without_rendering", lambda *_: None)
