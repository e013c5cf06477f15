"""Digests of tensors: what was evaluated is known again by its content."""

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

# From so many bytes on several tensors are digested at a time.
_MANY = 32 << 20

# Of tensors that were digested: where their memory was and how often it was written on, and the
# digest. Sweeps of one slice come again and again.
_KNOWN: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Digests named tensors.

    Args:
        tensors: Tensors by name, on any device.

    Returns:
        In hexadecimal a SHA-256 of their names, types, shapes and values, whatever their order.
    """
    found = {name: _known(tensor) for name, tensor in tensors.items()}
    new = [name for name, known in found.items() if known is None]
    if len(new) > 1 and sum(tensors[name].nbytes for name in new) >= _MANY:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found.update(zip(new, pool.map(_digest, (tensors[n] for n in new)), strict=True))
    else:
        found.update((name, _digest(tensors[name])) for name in new)
    for name in new:
        tensor = tensors[name]
        _KNOWN[tensor] = _state(tensor), found[name]
    return hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()


def _known(tensor: Tensor) -> str | None:
    if tensor not in _KNOWN:
        return None
    state, found = _KNOWN[tensor]
    return str(found) if state == _state(tensor) else None


def _state(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor._version


def _digest(tensor: Tensor) -> str:
    tensor = tensor.detach().cpu().contiguous()
    flat = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    told = hashlib.sha256(json.dumps([str(tensor.dtype), list(tensor.shape)]).encode())
    told.update(flat.reshape(-1).view(torch.uint8).numpy().data)
    return told.hexdigest()
