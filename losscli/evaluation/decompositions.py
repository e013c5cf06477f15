"""Decompositions of operators into elementary ones that can be differentiated twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from losscli.evaluation.function_mode import FunctionMode

__all__ = ["Decomposed"]


class Decomposed(FunctionMode):
    """Replaces operators with missing or wrong derivatives in PyTorch by decompositions.

    These are: BatchNorm with respect to its running statistics; layer norm, differentiated twice in
    forward mode; weight norm, differentiated twice in reverse mode; and an embedding with respect
    to its padding row, which is part of θ although PyTorch masks its gradient.
    """

    def intercept(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Calls the decomposition of a function, if it has one."""
        call: Callable[..., Any] = _DECOMPOSITIONS.get(function, function)
        return call(*args, **kwargs)


def _layer_norm(
    input: Tensor,  # noqa: A002 - the names are PyTorch's
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    dimensions = tuple(range(-len(normalized_shape), 0))
    return _normalise(input, dimensions, None, None, weight, bias, eps)


def _batch_norm(
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,  # noqa: ARG001 - running statistics are not updated
    eps: float = 1e-5,
) -> Tensor:
    own = training or running_mean is None or running_var is None
    mean, variance, weight, bias = (
        None if t is None else t.view(-1, *[1] * (input.ndim - 2))
        for t in (None if own else running_mean, None if own else running_var, weight, bias)
    )
    return _normalise(input, (0, *range(2, input.ndim)), mean, variance, weight, bias, eps)


def _instance_norm(
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,  # noqa: ARG001
    eps: float = 1e-5,
) -> Tensor:
    own = use_input_stats
    mean, variance, weight, bias = (
        None if t is None else t.view(-1, *[1] * (input.ndim - 2))
        for t in (None if own else running_mean, None if own else running_var, weight, bias)
    )
    return _normalise(input, tuple(range(2, input.ndim)), mean, variance, weight, bias, eps)


def _normalise(
    x: Tensor,
    dimensions: tuple[int, ...],
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """(x − mean) / √(variance + ε) · weight + bias; None takes the statistics of x."""
    wide = x.float() if x.dtype in {torch.float16, torch.bfloat16} else x
    centred = wide - (wide.mean(dimensions, keepdim=True) if mean is None else mean)
    if variance is None:
        variance = centred.square().mean(dimensions, keepdim=True)
    y = centred * torch.rsqrt(variance + eps)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    others = [d for d in range(v.ndim) if dim == -1 or d != dim % v.ndim]
    return v * (g / v.square().sum(others, keepdim=dim != -1).sqrt())


def _embedding(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    padding_idx: int | None = None,  # noqa: ARG001 - it only masks a gradient
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,  # noqa: ARG001 - likewise
    sparse: bool = False,
) -> Tensor:
    return F.embedding(input, weight, None, max_norm, norm_type, False, sparse)


_DECOMPOSITIONS: Mapping[Callable[..., Any], Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.embedding: _embedding,
    torch._weight_norm: _weight_norm,
}
