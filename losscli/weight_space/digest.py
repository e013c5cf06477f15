"""Digests of tensors, to recognise evaluated points by their content."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["digest"]

# Above this size in bytes, tensors are digested in parallel.
_PARALLEL_BYTES = 32 << 20

# For each digested tensor its address, its version counter and its digest, since repeated sweeps of
# a slice digest the same tensors.
_CACHE: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Returns the hexadecimal SHA-256 of the names, dtypes, shapes and values of tensors.

    It depends neither on the order of the tensors nor on their device.
    """
    digests = {name: _cached(tensor) for name, tensor in tensors.items()}
    new = [name for name, cached in digests.items() if cached is None]
    if len(new) > 1 and sum(tensors[name].nbytes for name in new) >= _PARALLEL_BYTES:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            digests.update(zip(new, pool.map(_digest, (tensors[n] for n in new)), strict=True))
    else:
        digests.update((name, _digest(tensors[name])) for name in new)
    for name in new:
        tensor = tensors[name]
        _CACHE[tensor] = _state(tensor), digests[name]
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()


def _cached(tensor: Tensor) -> str | None:
    if tensor not in _CACHE:
        return None
    state, cached = _CACHE[tensor]
    return str(cached) if state == _state(tensor) else None


def _state(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor._version


def _digest(tensor: Tensor) -> str:
    tensor = tensor.detach().cpu().contiguous()
    flat = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    content = hashlib.sha256(json.dumps([str(tensor.dtype), list(tensor.shape)]).encode())
    content.update(flat.reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()
