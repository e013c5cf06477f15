"""How much a forward pass computes, counted and never timed: the same number in every run."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["operations"]


def operations(model: nn.Module, forward: Callable[[], object]) -> int:
    """Counts the floating-point operations of a forward pass: those of products, two each.

    Args:
        model: The model that is run. Its buffers and torch's random numbers are left as they were.
        forward: Runs it.

    Returns:
        The operations; 0 where none of its operators is known to the counter.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {tensor.device for tensor in model.parameters() if tensor.device.type == "cuda"}
    counter = _Counter()
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=sorted(devices, key=str)),
            _elementary(),
            counter,
        ):
            forward()
    finally:
        with torch.no_grad():
            for buffer, own in buffers:
                buffer.copy_(own)
    return counter.total


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up what PyTorch's own formulas say of the operators that are run.

    PyTorch's FlopCounterMode does the same for each module, and imports its compiler for that: two
    seconds of every run.

    Attributes:
        total: The floating-point operations.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # So PyTorch lets a mode say that its compiler need not be told to leave it alone: nothing
        # is compiled here.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return NotImplemented
        with self:
            found = func.decompose(*args, **kwargs)
        if found is not NotImplemented:
            return found
        found = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **kwargs, out_val=found))
        return found


@contextmanager
def _elementary() -> Iterator[None]:
    """Leaves out the fused kernels of layers, of which the counter does not know."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with ExitStack() as stack:
            # PyTorch warns of what it does itself when oneDNN is left out.
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            if "torch._dynamo" in sys.modules:
                # What was compiled is not compiled for a few examples too.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
