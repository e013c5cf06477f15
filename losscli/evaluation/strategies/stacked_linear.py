"""A perceptron at P points at once: its linear layers are batched products.

Everything between linear layers works on each value alone, so the model's own forward pass can run
on activations with one more dimension, ``[P, B, out]``, if its linear layers take the weights of
all points. That saves what `torch.func.vmap` costs per call, and a copy of every layer's outputs:
vmap adds the bias after the product, and here `torch.baddbmm` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from losscli.evaluation import gpu_thresholds
from losscli.evaluation.function_mode import FunctionMode
from losscli.models import MLP

__all__ = ["StackedLinear", "examples_at_once", "is_perceptron"]

_ELEMENTWISE = frozenset({
    *(nn.CELU, nn.Dropout, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish),
    *(nn.Hardtanh, nn.Identity, nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU),
    *(nn.Sigmoid, nn.SiLU, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink),
})

# The fewest examples at once: products of fewer rows are slow.
_ROWS = 128


def is_perceptron(model: nn.Module) -> bool:
    """Whether a model is a chain of linear layers and of functions of single values.

    Args:
        model: The model.

    Returns:
        Whether it is a built-in perceptron, or an `nn.Sequential` of such layers, which may begin
        with an `nn.Flatten`.
    """
    if type(model) is MLP:
        return model.activation != "maxout"
    if type(model) is not nn.Sequential or not len(model):
        return False
    layers = list(_layers(model))
    kinds = {type(layer) for layer in layers[type(layers[0]) is nn.Flatten :]}
    return nn.Linear in kinds and kinds <= {nn.Linear, *_ELEMENTWISE}


def _layers(model: nn.Sequential) -> Iterator[nn.Module]:
    for layer in model:
        if type(layer) is nn.Sequential:
            yield from _layers(layer)
        else:
            yield layer


def examples_at_once(model: nn.Module, points: int) -> int:
    """Returns how many examples pass through a perceptron together.

    Args:
        model: The model.
        points: P.

    Returns:
        So many that the outputs of the widest layer at all points take at most
        `gpu_thresholds.STACKED_BYTES`, and at least 128.
    """
    widest = max(
        layer.out_features * layer.weight.element_size()
        for layer in model.modules()
        if isinstance(layer, nn.Linear)
    )
    return max(_ROWS, gpu_thresholds.STACKED_BYTES // (points * widest))


class StackedLinear(FunctionMode):
    """Computes the linear layers of a perceptron at P points.

    Args:
        stacks: The stacked weights, ``[P, *shape]``, by the id of the model's tensor.
        points: P.
        first: The id of the weight of the layer with outputs that are given; None for none.
        outputs: These outputs, ``[P, B, out]``.
    """

    def __init__(
        self,
        stacks: Mapping[int, Tensor],
        points: int,
        first: int | None = None,
        outputs: Tensor | None = None,
    ) -> None:
        super().__init__()
        self._stacks = stacks
        self._points = points
        self._first = first
        self._outputs = outputs
        self._is_stacked = False

    def intercept(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Computes a linear layer; other calls are made."""
        if function is not F.linear:
            return function(*args, **kwargs)
        inputs, weight, bias = args
        if self._outputs is not None and id(weight) == self._first:
            outputs, self._outputs, self._is_stacked = self._outputs, None, True
            return outputs
        if not self._is_stacked and not {id(weight), id(bias)} & self._stacks.keys():
            return function(*args, **kwargs)
        return self._product(inputs, weight, bias)

    def _product(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Computes x·Wᵀ + b at all points, ``[P, *, out]``."""
        points = self._points
        if self._is_stacked:
            rows = inputs.flatten(1, -2)
        else:
            rows = inputs.flatten(0, -2).expand(points, -1, -1)
            inputs = inputs.expand(points, *inputs.shape)
            self._is_stacked = True
        weights = self._stacks.get(id(weight), weight).mT.expand(points, -1, -1)
        if bias is None:
            outputs = torch.bmm(rows, weights)
        else:
            biases = self._stacks.get(id(bias), bias.expand(points, -1))
            outputs = torch.baddbmm(biases.unsqueeze(1), rows, weights)
        return outputs.reshape(*inputs.shape[:-1], len(weight))
