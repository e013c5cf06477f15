"""The independent oracle: a plain float64 loop with ``load_state_dict``, one point at a time.

Nothing of losscli is used here, and nothing clever: anybody can check it by reading.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

State = Mapping[str, Tensor]


def blend(
    a: State, b: State, alpha: float, moving: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """θ(α) in float64; integer tensors, and those that do not move, are A's."""
    state = {}
    for name, tensor in a.items():
        if tensor.is_floating_point() and (moving is None or name in moving):
            state[name] = (1 - alpha) * tensor.double() + alpha * b[name].double()
        else:
            state[name] = tensor
    return state


def losses(
    build: Callable[[], nn.Module],
    state: State,
    inputs: Any,
    targets: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    dtype: torch.dtype = torch.float64,
    batch_size: int = 1,
) -> list[float]:
    """The loss of each example, by default one example at a time."""
    model = build().to(dtype)
    model.load_state_dict(state)
    model.eval()
    found = []
    with torch.no_grad():
        for i in range(0, len(targets), batch_size):
            batch = slice(i, i + batch_size)
            if isinstance(inputs, dict):
                outputs = model(**{key: _cast(x[batch], dtype) for key, x in inputs.items()})
            elif isinstance(inputs, tuple):
                outputs = model(*(_cast(x[batch], dtype) for x in inputs))
            else:
                outputs = model(_cast(inputs[batch], dtype))
            found += loss(outputs, _cast(targets[batch], dtype)).reshape(-1).tolist()
    return found


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    middle = mean(values)
    squares = math.fsum((v - middle) ** 2 for v in values)
    return math.sqrt(squares / (len(values) - 1) / len(values))


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x
