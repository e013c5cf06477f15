"""Weights that are quantised, told by their names and types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from losscli.weight_space.vectors import Weights

__all__ = ["quantised"]

_NAMES = {
    ".qweight": "qweight: GPTQ or AWQ",
    ".qzeros": "qzeros: GPTQ or AWQ",
    ".absmax": "absmax: bitsandbytes",
    ".SCB": "SCB: bitsandbytes",
    ".weight_packed": "weight_packed: compressed-tensors",
    "._packed_params": "packed parameters of torch",
}


def quantised(weights: Weights) -> str | None:
    """Tells whether weights are quantised.

    Args:
        weights: The tensors of a file.

    Returns:
        What shows it; None where nothing does.
    """
    for name, tensor in weights.items():
        for end, what in _NAMES.items():
            if f".{name}".endswith(end) or f"{end}." in f".{name}":
                return what
        if ".quant_state." in f".{name}":
            return "quant_state: bitsandbytes"
        if tensor.is_quantized:
            return f"{name} is {str(tensor.dtype).removeprefix('torch.')}"
        if "float8" in str(tensor.dtype) or "float4" in str(tensor.dtype):
            return f"{name} is {str(tensor.dtype).removeprefix('torch.')}"
    return None


def packed(content: Any, depth: int = 0) -> str | None:
    """Tells whether a file holds packed parameters of torch's own quantised layers.

    Args:
        content: What the file holds.
        depth: How many keys lead to it.

    Returns:
        What shows it; None where nothing does.
    """
    if not isinstance(content, Mapping) or depth > 4:
        return None
    for key, value in content.items():
        if isinstance(key, str) and key.rpartition(".")[2] == "_packed_params":
            return _NAMES["._packed_params"]
        if found := packed(value, depth + 1):
            return found
    return None
