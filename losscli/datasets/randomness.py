"""The generators that the user's code draws from, kept apart from everybody else's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["State", "capture", "private_randomness", "restore", "seed_all"]

State = tuple[Any, Any, Tensor]
"""Of the generators of Python, NumPy and torch (on the CPU)."""


def capture() -> State:
    """Reads the generators.

    Returns:
        Their states.
    """
    return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002


def restore(state: State) -> None:
    """Sets the generators.

    Args:
        state: To what.
    """
    random.setstate(state[0])
    np.random.set_state(state[1])  # noqa: NPY002
    torch.set_rng_state(state[2])


def seed_all(seed: int) -> None:
    """Seeds the generators; not those of other devices, which no data comes from.

    Args:
        seed: A number below 2^63.
    """
    random.seed(seed)
    np.random.seed(seed % (1 << 32))  # noqa: NPY002
    torch.default_generator.manual_seed(seed)


@contextmanager
def private_randomness() -> Iterator[None]:
    """Leaves the generators as they were.

    Yields:
        Nothing.
    """
    before = capture()
    try:
        yield
    finally:
        restore(before)
