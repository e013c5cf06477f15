"""The scores of a language model, computed a few tokens at a time while the loss takes them.

The scores of 1,024 tokens over a vocabulary of 50,000 take 200 MB, and a loss reads them once. If
the last linear layer returns a `DeferredProduct` instead, only the rows in use are in memory. Every
other operation on it computes it as a whole, so it works with any model.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from losscli.errors import ModelError
from losscli.evaluation.function_mode import METADATA, FunctionMode

__all__ = ["DeferredHead", "DeferredProduct", "head_weight"]

# Products of fewer values are computed at once: 16 MiB of float32.
_SMALL = 1 << 22


def head_weight(model: nn.Module) -> Tensor | None:
    """Returns the weight of a model's last linear layer, which may compute its scores."""
    weights = [m._parameters.get("weight") for m in model.modules() if isinstance(m, nn.Linear)]
    return weights[-1] if weights else None


class DeferredProduct(Tensor):
    """The output x·Wᵀ + b of a linear layer, computed when it is used.

    Slices of its rows are computed separately; any other use computes all of it, once.

    Args:
        inputs: x, ``[*, n, in]``.
        weight: W, ``[out, in]``.
        bias: b, ``[out]``, or None.
    """

    _operands: tuple[Tensor, Tensor, Tensor | None]
    _versions: list[int]
    _whole: Tensor | None

    @staticmethod
    def __new__(cls, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Self:
        """Makes the product without computing it."""
        product: Self = Tensor._make_wrapper_subclass(
            cls, (*inputs.shape[:-1], len(weight)), dtype=inputs.dtype, device=inputs.device
        )
        product._operands = inputs, weight, bias
        product._versions = product._current_versions()
        product._whole = None
        return product

    def whole(self) -> Tensor:
        """Computes the product.

        Returns:
            The product, ``[*, n, out]``; the same tensor at every call.

        Raises:
            ModelError: An operand was modified in place.
        """
        if self._whole is None:
            self._whole = F.linear(*self._unmodified())
        return self._whole

    def _unmodified(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns the operands, unless one was modified in place."""
        if self._versions != self._current_versions():
            raise ModelError(
                "the model modifies the input or the weight of its last linear layer in place, "
                "after the layer has used it",
                "Let it modify a copy",
            )
        return self._operands

    def _current_versions(self) -> list[int]:
        return [tensor._version for tensor in self._operands if tensor is not None]

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Returns metadata, computes rows, or calls the function with the whole product."""
        del types
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        match args:
            case DeferredProduct(_whole=None) as product, *rest:
                inputs, weight, bias = product._unmodified()
                if func == Tensor.flatten and rest == [0, -2]:
                    return cls(inputs.flatten(0, -2), weight, bias)
                if func == Tensor.__getitem__ and type(rest[0]) is slice:
                    return F.linear(inputs[rest[0]], weight, bias)
                if func == torch.equal and product._is_of_layer_of(rest[0]):
                    return torch.equal(inputs, rest[0]._unmodified()[0])
        args, kwargs = tree_map_only(DeferredProduct, DeferredProduct.whole, (args, kwargs or {}))
        return func(*args, **kwargs)

    # Of code that bypasses `__torch_function__`.
    __torch_dispatch__: Any = __torch_function__

    def _is_of_layer_of(self, other: Any) -> bool:
        """Whether another deferred product has the same weight and bias."""
        return isinstance(other, DeferredProduct) and all(
            x is y for x, y in zip(self._operands[1:], other._operands[1:], strict=True)
        )


class DeferredHead(FunctionMode):
    """Defers large products of a linear layer with which a forward pass ends.

    Args:
        weight: The weight of the layer.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._weight = weight
        self._deferred: list[weakref.ref[DeferredProduct]] = []

    def intercept(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Defers a large product of the layer; any other call may modify its operands."""
        if function not in METADATA:
            for reference in self._deferred:
                if (deferred := reference()) is not None:
                    deferred.whole()
            self._deferred.clear()
        if function is not F.linear or kwargs or not self._can_defer(*args):
            return function(*args, **kwargs)
        inputs, weight, *bias = args
        product = DeferredProduct(inputs, weight, bias[0] if bias else None)
        self._deferred.append(weakref.ref(product))
        return product

    def _can_defer(self, inputs: Any, weight: Any, bias: Tensor | None = None) -> bool:
        return (
            weight is self._weight
            and type(inputs) is Tensor
            and inputs.ndim > 1
            and inputs.dtype == weight.dtype
            and (bias is None or bias.dtype == weight.dtype)
            and math.prod(inputs.shape[:-1]) * len(weight) >= _SMALL
            and not torch.is_grad_enabled()
            # Within autocast the product has another type.
            and not torch.is_autocast_enabled(inputs.device.type)
        )
