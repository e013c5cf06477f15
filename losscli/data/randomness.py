"""The global random generators that user code draws from: seeding, saving and restoring."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

__all__ = ["RandomnessDetector", "State", "capture", "private_randomness", "restore", "seed_all"]

State = tuple[Any, Any, Tensor]
"""States of the generators of Python, NumPy and torch (CPU)."""


def capture() -> State:
    """Returns the states of the global CPU generators."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002


def restore(state: State) -> None:
    """Restores the states of the global CPU generators that `capture` returned."""
    random.setstate(state[0])
    np.random.set_state(state[1])  # noqa: NPY002
    torch.set_rng_state(state[2])


def seed_all(seed: int, device: torch.device | None = None) -> None:
    """Seeds the global generators.

    Args:
        seed: A number below 2^63.
        device: Device with another generator to seed; None for the CPU generators only.
    """
    random.seed(seed)
    np.random.seed(seed % (1 << 32))  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device is not None and device.type == "mps":
        torch.mps.manual_seed(seed)


@contextmanager
def private_randomness() -> Iterator[None]:
    """Restores the global CPU generators on exit."""
    before = capture()
    try:
        yield
    finally:
        restore(before)


class RandomnessDetector:
    """Context manager that detects which random generators advance, and restores them.

    It covers the global generators of Python, NumPy and torch, and the generator of a device, but
    not a separate ``torch.Generator``.

    Args:
        device: The device.

    Attributes:
        names: The generators that advanced; set on exit.
    """

    def __init__(self, device: torch.device) -> None:
        self.names: list[str] = []
        self._device = device

    def __enter__(self) -> Self:
        self._before = capture()
        self._device_before = _device_state(self._device)
        return self

    def __exit__(self, *_: object) -> None:
        after, device_after = capture(), _device_state(self._device)
        same = {
            "Python's random": self._before[0] == after[0],
            "numpy.random": _same_numpy_state(self._before[1], after[1]),
            "torch's generator": torch.equal(self._before[2], after[2]),
        }
        if self._device_before is not None and device_after is not None:
            name = f"torch's generator of {self._device}"
            same[name] = torch.equal(self._device_before, device_after)
            _restore_device(self._device, self._device_before)
        self.names = [name for name, equal in same.items() if not equal]
        if self.names:
            restore(self._before)


def _same_numpy_state(one: Any, other: Any) -> bool:
    # The name of the generator, its keys and three numbers.
    return one[0] == other[0] and np.array_equal(one[1], other[1]) and one[2:] == other[2:]


def _device_state(device: torch.device) -> Tensor | None:
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.mps.get_rng_state() if device.type == "mps" else None


def _restore_device(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.mps.set_rng_state(state)
