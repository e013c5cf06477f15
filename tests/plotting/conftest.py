"""Figures have their layout only in the tests that ask for it with ``laid_out``."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _artists_alone(unlaid: None) -> None:
    pass
