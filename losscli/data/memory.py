"""How much data may be in memory: what fits is decoded once, what does not is streamed."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from losscli.errors import DataError

__all__ = ["device_budget", "host_budget", "host_memory", "require_memory"]

# Joining what was decoded takes twice its bytes for a moment, and the weights need room too.
_SHARE = 0.25

_MEMINFO = Path("/proc/meminfo")

# Where a machine does not tell.
_MEMORY = 8 << 30

# What a container may use, by the second and by the first version of control groups; beside each
# is what it uses.
_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
_USED = {"memory.max": "memory.current", "memory.limit_in_bytes": "memory.usage_in_bytes"}


def host_budget() -> int:
    """Finds how many bytes of data may be in the host's memory.

    Returns:
        A quarter of the memory that the machine, or the container, has: the same for every run.
    """
    return int(host_memory() * _SHARE)


def host_memory() -> int:
    """Finds how many bytes of memory the host has.

    Returns:
        Those of the machine, or the container: the same for every run.
    """
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        memory = _MEMORY
    for path in _LIMITS:
        try:
            memory = min(memory, int(path.read_text(encoding="ascii")))
        except (OSError, ValueError):  # there is no such file, or it says "max"
            continue
    return memory


def free_memory() -> int:
    """Finds how many bytes of memory are free now.

    Returns:
        Those that the machine can give without swapping, and that the container may use.
    """
    free = host_memory()
    try:
        told = re.search(r"MemAvailable: *(\d+) kB", _MEMINFO.read_text(encoding="ascii"))
        free = min(free, int(told[1]) << 10) if told else free
    except (OSError, ValueError):
        pass
    for limit in _LIMITS:
        try:
            used = int(limit.with_name(_USED[limit.name]).read_text(encoding="ascii"))
            free = min(free, int(limit.read_text(encoding="ascii")) - used)
        except (OSError, ValueError):
            continue
    return max(0, free)


def require_memory(nbytes: int, where: str) -> None:
    """Makes sure that there is memory for what a file is unpacked to.

    Args:
        nbytes: The bytes that it takes.
        where: The file, for the error.

    Raises:
        DataError: There is less.
    """
    if nbytes > (free := free_memory()):
        raise DataError(
            f"{where} takes {nbytes:,} bytes of memory once it is unpacked, and {free:,} are free",
            "Is it what you expect? Then store fewer examples in a file",
        )


def device_budget(device: torch.device) -> int | None:
    """Finds how many bytes of data may be in a device's own memory.

    Args:
        device: The device.

    Returns:
        A quarter of what is free on a GPU; None where data in memory is there already.
    """
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * _SHARE)
