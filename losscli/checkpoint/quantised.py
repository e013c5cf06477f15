"""Detect quantised weights by their names and types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from losscli.weight_space.vectors import Weights

__all__ = ["find_quantisation"]

_METHODS = {
    ".qweight": "qweight: GPTQ or AWQ",
    ".qzeros": "qzeros: GPTQ or AWQ",
    ".absmax": "absmax: bitsandbytes",
    ".SCB": "SCB: bitsandbytes",
    ".weight_packed": "weight_packed: compressed-tensors",
    ".quant_state": "quant_state: bitsandbytes",
    "._packed_params": "packed parameters of torch",
}


def find_quantisation(weights: Weights) -> str | None:
    """Returns the evidence of quantised weights, such as a name and its method, if any."""
    for name, tensor in weights.items():
        for suffix, method in _METHODS.items():
            if f".{name}".endswith(suffix) or f"{suffix}." in f".{name}":
                return method
        kind = str(tensor.dtype).removeprefix("torch.")
        if tensor.is_quantized or "float8" in kind or "float4" in kind:
            return f"{name} is {kind}"
    return None


def find_packed_parameters(content: Any, depth: int = 0) -> str | None:
    """Returns the evidence of packed parameters of torch's quantised layers, if any."""
    if not isinstance(content, Mapping) or depth > 4:
        return None
    for key, value in content.items():
        if isinstance(key, str) and key.rpartition(".")[2] == "_packed_params":
            return _METHODS["._packed_params"]
        if found := find_packed_parameters(value, depth + 1):
            return found
    return None
