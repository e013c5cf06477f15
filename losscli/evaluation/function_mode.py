"""A base class for modes that intercept each call of a function of torch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["METADATA", "FunctionMode"]

METADATA = frozenset({
    Tensor.dim,
    Tensor.element_size,
    Tensor.is_complex,
    Tensor.is_contiguous,
    Tensor.is_floating_point,
    Tensor.is_inference,
    Tensor.numel,
    Tensor.size,
    Tensor.stride,
    *(
        getattr(Tensor, name).__get__
        for name in (
            *("_version", "device", "dtype", "is_cuda", "layout", "nbytes", "ndim"),
            *("requires_grad", "shape"),
        )
    ),
})
"""Attributes of a tensor that do not depend on its values."""


class FunctionMode(TorchFunctionMode):
    """Calls `intercept` instead of each function of torch."""

    @abstractmethod
    def intercept(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Returns the result of a call; ``function(*args, **kwargs)`` leaves it unchanged."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return self.intercept(func, args, kwargs or {})
