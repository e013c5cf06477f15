"""The cases that every study is tried on; all others are tried on `interpolate` alone.

What a model computes with, every study evaluates by the same objective.
"""

from __future__ import annotations

import pytest

from tests.cases import CASES

__all__ = ["SAMPLE"]

_TRIED = {
    "mlp-tanh-bce", "cnn-batchnorm", "lstm", "attention-tied", "two-inputs", "dividing", "hooked",
    "functorch",
}  # fmt: skip

SAMPLE = [
    pytest.param(case, id=case.name, marks=() if case.name in _TRIED else pytest.mark.stress)
    for case in CASES
]
