"""Memory budgets that decide whether data are kept in memory, and allocations that fail."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from losscli.errors import DataError, OutOfMemoryError

__all__ = [
    "allocations",
    "device_budget",
    "device_memory",
    "host_budget",
    "host_memory",
    "placing",
    "require_memory",
]

# Joining decoded batches temporarily doubles their memory, and the weights need memory too.
_SHARE = 0.25

_MEMINFO = Path("/proc/meminfo")

# Parts of the messages of allocations that fail with another error than torch.OutOfMemoryError:
# those of the libraries of a GPU, of pinned memory, of MPS, and of the host.
_FAILED_ALLOCATIONS = re.compile(
    r"CU[A-Z]+_STATUS_ALLOC_FAILED|CUFFT_ALLOC_FAILED|CUDA error: out of memory"
    r"|MPS backend out of memory|DefaultCPUAllocator: (can't allocate|not enough) memory"
)

# Fallback if the system does not report its memory.
_DEFAULT_MEMORY = 8 << 30

# Memory limit of a container in cgroup v2 and v1. The usage is in a file of the same folder.
_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
_USED = {"memory.max": "memory.current", "memory.limit_in_bytes": "memory.usage_in_bytes"}


def host_budget() -> int:
    """Returns the memory for data on the host in bytes: a quarter of `host_memory`."""
    return int(host_memory() * _SHARE)


def host_memory() -> int:
    """Returns the total memory of the machine or container in bytes, the same for every run."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        memory = _DEFAULT_MEMORY
    for path in _LIMITS:
        try:
            memory = min(memory, int(path.read_text(encoding="ascii")))
        except (OSError, ValueError):  # there is no such file, or it says "max"
            continue
    return memory


def free_memory() -> int:
    """Returns the bytes available without swapping and within the limit of the container."""
    free = host_memory()
    try:
        available = re.search(r"MemAvailable: *(\d+) kB", _MEMINFO.read_text(encoding="ascii"))
        free = min(free, int(available[1]) << 10) if available else free
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
    """Checks that ``nbytes``, the size of the content of a compressed file, are free.

    Raises:
        DataError: The content does not fit.
    """
    if nbytes > (free := free_memory()):
        raise DataError(
            f"{where} takes {nbytes:,} bytes of memory when unpacked, and {free:,} are free",
            "If that is expected, store fewer examples per file",
        )


def device_budget(device: torch.device) -> int | None:
    """Returns the memory for data on a device in bytes: a quarter of the free memory of a GPU.

    None for a device that uses the memory of the host.
    """
    if device.type != "cuda":
        return None
    return int(device_memory(device) * _SHARE)


def device_memory(device: torch.device) -> int:
    """Returns the memory of a GPU that tensors can be allocated in, in bytes.

    It is the free memory and the memory that PyTorch has reserved and does not use, so it does not
    depend on what was freed before.
    """
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@contextmanager
def allocations() -> Iterator[None]:
    """Makes every failed allocation, also in a library of the device, an OutOfMemoryError."""
    try:
        yield
    except RuntimeError as error:
        known = isinstance(error, torch.OutOfMemoryError)
        if known or not _FAILED_ALLOCATIONS.search(str(error)):
            raise
        raise torch.OutOfMemoryError(str(error)) from error


@contextmanager
def placing(what: str, device: torch.device, cure: str = "--dtype bfloat16") -> Iterator[None]:
    """Names what does not fit on a device if memory runs out.

    Args:
        what: What is placed on the device.
        device: The device.
        cure: What may help beside another device.

    Yields:
        Nothing.

    Raises:
        OutOfMemoryError: It does not fit.
    """
    try:
        with allocations():
            yield
    except (torch.OutOfMemoryError, MemoryError):
        cure = cure if device.type == "cpu" else f"--device cpu or {cure}"
        raise OutOfMemoryError(
            f"{what} do not fit into the memory of {device}", f"Try {cure}"
        ) from None
