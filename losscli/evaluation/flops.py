"""What a forward pass computes and reads, counted and never timed: the same in every run."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

__all__ = ["Trace", "addresses", "operations"]


@dataclass
class Trace:
    """What a forward pass computes and reads, as far as it ran.

    Attributes:
        operations: The floating-point operations of products, two each; 0 where none of the
            operators is known to the counter.
        read: The addresses of the memory that operators read.
        parameters: The shapes of the parameters among that, by their addresses.
    """

    operations: int = 0
    read: set[int] = field(default_factory=set)
    parameters: dict[int, torch.Size] = field(default_factory=dict)


def addresses(tensors: Iterable[object]) -> dict[int, Tensor]:
    """Finds where the memory of tensors begins.

    Args:
        tensors: The tensors; what is none is left out.

    Returns:
        The tensors by the addresses of their memory, as far as they have any.
    """
    found = {}
    for tensor in tensors:
        if isinstance(tensor, Tensor) and not nn.parameter.is_lazy(tensor):
            # Within functorch's transforms, and on no device, there is no memory.
            with contextlib.suppress(RuntimeError, NotImplementedError):
                found[tensor.untyped_storage().data_ptr()] = tensor
    found.pop(0, None)
    return found


def operations(model: nn.Module, forward: Callable[[], object], trace: Trace | None = None) -> int:
    """Counts the floating-point operations of a forward pass.

    Args:
        model: The model that is run. Its buffers and torch's random numbers are left as they were.
        forward: Runs it.
        trace: Where to write what it computes and reads, also if it fails.

    Returns:
        The operations.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {tensor.device for tensor in model.parameters() if tensor.device.type == "cuda"}
    trace = trace or Trace()
    counter = _Counter(trace)
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
    return trace.operations


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up what PyTorch's own formulas say of the operators that are run.

    PyTorch's FlopCounterMode does the same for each module, and imports its compiler for that: two
    seconds of every run.

    Args:
        trace: Where they are added up.
    """

    supports_higher_order_operators = True

    def __init__(self, trace: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._trace = trace

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # So PyTorch lets a mode say that its compiler need not be told to leave it alone: nothing
        # is compiled here.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        read = addresses(tree_leaves((args, kwargs)))
        self._trace.read |= read.keys()
        for place, tensor in read.items():
            if isinstance(tensor, nn.Parameter):
                self._trace.parameters[place] = tensor.shape
        if not isinstance(func, torch._ops.OpOverload):
            return NotImplemented
        with self:
            found = func.decompose(*args, **kwargs)
        if found is not NotImplemented:
            return found
        found = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self._trace.operations += int(formula(*args, **kwargs, out_val=found))
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
