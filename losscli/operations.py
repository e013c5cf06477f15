"""How much a forward pass computes, counted and never timed: the same number in every run."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

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
    counter = FlopCounterMode(display=False)
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
    return int(counter.get_total_flops())


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
