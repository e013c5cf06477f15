"""Models and losses of which autograd sees only a part, and ones with kinks and jumps that it sees.

Every kind of stop that leaves some gradient: no parameter is without one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tests.cases import Case

PerExample = Callable[[Tensor, Tensor], Tensor]


class Net(nn.Module):
    """Two layers; ``middle`` is what happens to the hidden units."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.body(x)))


def _partly(h: Tensor) -> Tensor:
    h = h.tanh()
    return torch.cat([h[:, :6], h[:, 6:].detach()], 1)


def _under_no_grad(h: Tensor) -> Tensor:
    with torch.no_grad():
        gate = torch.sigmoid(h)
    return h * gate


def _straight_through(h: Tensor) -> Tensor:
    h = h.tanh()
    return h + ((h * 4).round() / 4 - h).detach()


class _Clipped(torch.autograd.Function):
    """A rounding with a gradient of its own."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return (x * 4).round() / 4

    @staticmethod
    def setup_context(ctx: object, inputs: object, output: object) -> None:
        pass

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient

    @staticmethod
    def jvp(ctx: object, tangent: Tensor) -> Tensor:  # type: ignore[override]
        return tangent.clone()


def _rounded(h: Tensor) -> Tensor:
    rounded: Tensor = _Clipped.apply(h.tanh())
    return rounded


def _statistics(h: Tensor) -> Tensor:
    return (h - h.mean(1, keepdim=True).detach()) / (h.std(1, keepdim=True).detach() + 0.1)


def _tiny(h: Tensor) -> Tensor:
    h = h.tanh()
    return h + 0.1 * h.square().detach()


STOPPED: dict[str, Callable[[Tensor], Tensor]] = {
    "partly detached": _partly,
    "a gate under no_grad": _under_no_grad,
    "straight-through rounding": _straight_through,
    "rounding with a gradient of its own": _rounded,
    "detached statistics": _statistics,
    "a tenth": _tiny,
}


def _quantised(h: Tensor) -> Tensor:
    return h.tanh() + (h * 4).round() / 4


def _routed(h: Tensor) -> Tensor:
    return h.tanh() * (1 + F.one_hot(h.argmax(1), h.shape[1]))


def _in_float32(h: Tensor) -> Tensor:
    return h.float().tanh().to(h.dtype)


def _rectified_in_float32(h: Tensor) -> Tensor:
    return h.float().relu().to(h.dtype)


HONEST: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "absolute": torch.abs,
    "maxima": lambda h: h.view(len(h), 4, 2).amax(2).repeat(1, 2),
    "largest three": lambda h: torch.where(h >= h.topk(3).values[:, -1:], h, 0.0),
    "hard": F.hardtanh,
    "rounded beside": _quantised,
    "routed": _routed,
    "computed in float32": _in_float32,
    "kinks in float32": _rectified_in_float32,
    "sharp": lambda h: torch.sin(300 * h),
    "steep": lambda h: torch.sigmoid(1e4 * h),
    "hidden by an offset": lambda h: (h + 1e6) - 1e6,
}


class _Lying(torch.autograd.Function):
    """Its backward is right, and that of its backward is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (1 - x.detach().tanh().square())


def lying(h: Tensor) -> Tensor:
    """Has a wrong second derivative."""
    found: Tensor = _Lying.apply(h)
    return found


def cast(middle: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Computes in another type inside."""
    return lambda h: middle(h.to(dtype)).to(h.dtype)


TYPES = [
    (torch.float32, torch.bfloat16),
    (torch.float64, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32),
    (torch.float64, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]
"""Types of the forward pass, and of what is computed inside."""


SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sines": lambda h: torch.sin(30 * torch.sin(30 * h)),
    "offset": lambda h: F.layer_norm(h + 1000, (8,)),
}


WRONG = {**STOPPED, "lying": lying}


def focal(outputs: Tensor, targets: Tensor) -> Tensor:
    """Focal loss with a weight that is a constant for autograd."""
    loss = F.cross_entropy(outputs, targets, reduction="none")
    return (1 - (-loss).exp()).square().detach() * loss


def whole_focal(outputs: Tensor, targets: Tensor) -> Tensor:
    loss = F.cross_entropy(outputs, targets, reduction="none")
    return (1 - (-loss).exp()).square() * loss


def margin(outputs: Tensor, targets: Tensor) -> Tensor:
    """Straight pieces."""
    return (0.1 + outputs - outputs.gather(1, targets[:, None])).relu().sum(1)


def errors(outputs: Tensor, targets: Tensor) -> Tensor:
    """Piecewise constant, without a gradient anywhere."""
    return (outputs.argmax(1) != targets).to(outputs.dtype) + 0 * outputs.sum(1)


LOSSES: dict[str, PerExample] = {"focal": whole_focal, "margin": margin, "errors": errors}


def case(middle: Callable[[Tensor], Tensor], name: str = "net") -> Case:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(50, 6, generator=generator)
    return Case(name, lambda: Net(middle), x, x[:, :3].argmax(1))
