"""First and second derivatives of a loss along a line: Taylor, forward or reverse mode."""

from __future__ import annotations

import contextlib
import enum
import math
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from losscli.data import Split
from losscli.errors import LosscliError, ModelError, one_line
from losscli.evaluation.decompositions import Decomposed
from losscli.evaluation.derivatives.taylor import TaylorTensor, apply, values
from losscli.evaluation.device import without_cudnn
from losscli.evaluation.objective import Objective
from losscli.evaluation.strategies.first_layer import FirstLayer, FirstLayerFound, FirstLayerWatcher
from losscli.evaluation.strategies.point_weights import combining_type, weights_at
from losscli.evaluation.strategies.replicas import forward_with, is_stateless
from losscli.weight_space.slices import Line
from losscli.weight_space.vectors import Weights, pieces

__all__ = ["LineDerivatives", "Method"]


class Method(enum.Enum):
    """Ways to differentiate, in order of preference: the mode, and whether kernels are fused."""

    TAYLOR = "Taylor", True
    FORWARD = "forward", True
    REVERSE = "reverse", True
    # PyTorch can differentiate recurrent layers twice only with unfused operators.
    FORWARD_UNFUSED = "forward", False
    REVERSE_UNFUSED = "reverse", False

    def __init__(self, mode: str, fused: bool) -> None:
        self.mode = mode
        self.fused = fused

    @property
    def reference(self) -> Method:
        """Reverse mode with the same kernels, to compare with."""
        return Method.REVERSE if self.fused else Method.REVERSE_UNFUSED

    @contextlib.contextmanager
    def kernels(self) -> Iterator[None]:
        """Runs only operators that can be differentiated twice in this mode."""
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(warnings.catch_warnings())
                # Warnings about PyTorch's own code: the first use of forward mode, and oneDNN
                # being disabled.
                warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
                warnings.filterwarnings("ignore", "TF32 acceleration", UserWarning)
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
                if not self.fused:
                    stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
                    stack.enter_context(without_cudnn())
                stack.enter_context(Decomposed())
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


_Replay = Callable[[Mapping[str, Tensor]], contextlib.AbstractContextManager[Any]]

# Bytes of outputs of first layers that are kept for further points.
_KEPT = 256 << 20


@dataclass(frozen=True)
class _Ray:
    """The line θ(α) = A + α d, spanned by A and d, so that d/dα of a first layer is a product.

    Attributes:
        origin: A.
        direction: d.
    """

    origin: Weights
    direction: Weights

    @property
    def ends(self) -> tuple[Weights, Weights]:
        """A and d."""
        return self.origin, self.direction

    @property
    def barycentric(self) -> bool:
        """Always False: the coefficients are 1 and α."""
        return False

    def combine(
        self, values: Sequence[Tensor], coordinates: Sequence[float], out: Tensor | None = None
    ) -> Tensor:
        """Returns values[0] + α values[1]."""
        (alpha,) = coordinates
        return torch.add(*values, alpha=alpha, out=out)


class LineDerivatives:
    """Derivatives of an objective's loss along a line, batch by batch.

    Args:
        objective: The objective.
        line: The line.

    Attributes:
        weight: The sum of the example weights of the last batch. The batch's sums divided by it
            are the derivatives of its mean loss.
    """

    def __init__(self, objective: Objective, line: Line) -> None:
        self.objective = objective
        self.line = line
        self.weight = 0.0
        self._layers: dict[Hashable, FirstLayer | None] = {}
        self._kept = 0
        self._direction = {}
        for name, a in line.a.items():
            own = objective.tensors[name]
            working = combining_type(own)
            self._direction[name] = (line.b[name].to(working) - a.to(working)).to(own.dtype)

    def at(self, alpha: float) -> dict[str, Tensor]:
        """Computes the weights at a point of the line."""
        return weights_at(self.line, self.objective.tensors, (alpha,))

    def sums(
        self,
        method: Method,
        weights: Weights,
        batch: Split,
        shared: tuple[Hashable, float] | None = None,
    ) -> tuple[float, float]:
        """Returns the first and second derivative of the sum of the losses of a batch.

        Args:
            method: How to differentiate.
            weights: The point.
            batch: The batch, on the device.
            shared: Identifies the batch, and the point's α, so that the outputs of a first layer
                are kept for the batch at further points; None keeps nothing.
        """
        layer = None
        if shared is not None and method is Method.TAYLOR and not self.objective.seeds:
            layer = self._first_layer(*shared, batch)
        replay = partial(self._replay, layer, shared[1]) if layer and shared else None
        slope, curvature = self._differentiate(method, weights, batch, twice=True, replay=replay)
        return slope, curvature

    def slope(self, method: Method, weights: Weights, batch: Split) -> float:
        """Returns the first derivative of the sum of the losses of a batch."""
        return self._differentiate(method, weights, batch, twice=False)[0]

    def _differentiate(
        self,
        method: Method,
        weights: Weights,
        batch: Split,
        *,
        twice: bool,
        replay: _Replay | None = None,
    ) -> tuple[float, ...]:
        differentiate = self._reverse if method.mode == "reverse" else self._forward
        if method is Method.TAYLOR and twice:
            differentiate = partial(self._taylor, replay=replay)
        try:
            with method.kernels(), self.objective.computing():
                return differentiate(weights, batch, twice)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            reason = error.__cause__ or error if isinstance(error, LosscliError) else error
            what = reason.what if isinstance(reason, LosscliError) else one_line(reason)
            raise ModelError(what) from error

    def _losses(self, batch: Split, weights: Weights | None = None) -> Tensor:
        """Computes the losses of a batch, with ``weights`` in place of the model's tensors."""
        objective = self.objective
        outputs = forward_with(objective, weights or {}, objective.prepare(batch))
        self.weight = objective.weight(outputs, batch.targets)
        return objective.per_example(objective.loss, outputs, batch.targets, "loss")

    @torch.no_grad()
    def _forward(self, weights: Weights, batch: Split, twice: bool) -> tuple[float, ...]:
        def losses(weights: dict[str, Tensor]) -> Tensor:
            return self._losses(batch, weights)

        def slopes(weights: dict[str, Tensor]) -> Tensor:
            slope: Tensor = jvp(losses, (weights,), (self._direction,))[1]
            return slope

        # Nested jvp: levels of torch.autograd.forward_ad do not nest.
        point = dict(weights)
        derivatives = jvp(slopes, (point,), (self._direction,)) if twice else (slopes(point),)
        return tuple(float(values.cpu().double().sum()) for values in derivatives)

    @torch.no_grad()
    def _first_layer(self, key: Hashable, alpha: float, batch: Split) -> FirstLayer | None:
        """Returns the first layer's outputs on a batch, if they serve a point.

        They are computed once, and kept as long as they fit.
        """
        objective = self.objective
        if key not in self._layers:
            if self._kept >= _KEPT:
                return None
            tensors = {name: objective.tensors[name] for name in self.line.a}
            ray = _Ray(self.line.a, self._direction)
            stops = is_stateless(objective)
            watcher = FirstLayerWatcher(tensors, objective.tensors, ray, stops=stops, measures=True)
            inputs = objective.prepare(batch)
            with contextlib.suppress(FirstLayerFound), Method.TAYLOR.kernels(), watcher:
                objective.forward(objective.model, inputs)
            layer = watcher.layer
            self._layers[key] = layer
            self._kept += 0 if layer is None else sum(t.nbytes for t in layer.products)
        layer = self._layers[key]
        return None if layer is None or layer.nearly_cancels([(alpha,)])[0] else layer

    @staticmethod
    def _replay(
        layer: FirstLayer, alpha: float, tensors: Mapping[str, Tensor]
    ) -> contextlib.AbstractContextManager[Any]:
        output = TaylorTensor(layer.output((alpha,)), layer.products[1])
        return layer.replay(output, tensors)

    @torch.no_grad()
    def _taylor(
        self, weights: Weights, batch: Split, twice: bool, *, replay: _Replay | None
    ) -> tuple[float, ...]:
        assert twice
        objective = self.objective
        point: dict[str, Tensor] = {
            name: TaylorTensor(w, self._direction[name]) for name, w in weights.items()
        }

        def loss(outputs: Any) -> Tensor:
            return objective.per_example(objective.loss, outputs, batch.targets, "loss")

        inputs = objective.prepare(batch)
        with replay(point) if replay else contextlib.nullcontext():
            outputs = forward_with(objective, point, inputs)
        self.weight = objective.weight(values(outputs), batch.targets)
        losses = apply(loss, outputs).coefficients
        return tuple(float(x.cpu().double().sum()) for x in (losses.first, losses.second))

    def _reverse(self, weights: Weights, batch: Split, twice: bool) -> tuple[float, ...]:
        with self._bound(weights) as leaves, torch.enable_grad():
            total = self._losses(batch).sum()
            gradient = _gradient(total, leaves, create_graph=twice)
            if not twice:
                return (self._along(gradient),)
            slope = sum((g * self._direction[n]).sum() for n, g in gradient.items())
            second = (
                _gradient(slope, leaves, create_graph=False) if isinstance(slope, Tensor) else {}
            )
            return self._along(gradient), self._along(second)

    def _along(self, gradient: Weights) -> float:
        # MPS has no float64.
        device = "cpu" if self.objective.device.type == "mps" else self.objective.device
        return math.fsum(
            float(x.dot(y))
            for name, g in gradient.items()
            for x, y in pieces(g.detach().to(device), self._direction[name].to(device))
        )

    @contextlib.contextmanager
    def _bound(self, weights: Weights) -> Iterator[dict[str, Tensor]]:
        """Binds the model's own tensors to other values, which closures then see too."""
        leaves = {name: self.objective.tensors[name] for name in weights}
        own = [(leaf, leaf.data, leaf.requires_grad) for leaf in leaves.values()]
        try:
            for name, leaf in leaves.items():
                leaf.data = weights[name]
                leaf.requires_grad_()
            yield leaves
        finally:
            for leaf, data, requires_grad in own:
                leaf.data = data
                leaf.requires_grad_(requires_grad)


def _gradient(
    value: Tensor, leaves: Mapping[str, Tensor], *, create_graph: bool
) -> dict[str, Tensor]:
    """Returns the gradient of a number with respect to the leaves that it depends on."""
    if not value.requires_grad:
        return {}
    _check_differentiable(value)
    gradients = torch.autograd.grad(
        value, list(leaves.values()), create_graph=create_graph, allow_unused=True
    )
    return {name: g for name, g in zip(leaves, gradients, strict=True) if g is not None}


def _check_differentiable(value: Tensor) -> None:
    """Refuses nodes that `once_differentiable` left in the graph.

    They raise only if the gradient passes through them, and that of the leaves may bypass them.
    """
    visited, nodes = set(), [value.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in visited:
            continue
        if node.name().endswith("autograd::Error"):
            raise ModelError("a custom backward of the model cannot be differentiated")
        visited.add(node)
        nodes += [child for child, _ in node.next_functions]
