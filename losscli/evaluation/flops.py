"""Counts the operations and the memory of a forward pass, and records the memory that it reads."""

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

from losscli.evaluation.device import without_cudnn

__all__ = ["Trace", "addresses", "operations"]


@dataclass
class Trace:
    """The operations and reads of a forward pass, also of one that failed midway.

    Attributes:
        operations: The floating-point operations, two per multiply-add; 0 if the
            counter knows none of the operators.
        largest: The most bytes that one operator reads and writes, without parameters.
        read: The addresses of the memory that operators read.
        parameters: The shapes of the parameters among these, by address.
    """

    operations: int = 0
    largest: int = 0
    read: set[int] = field(default_factory=set)
    parameters: dict[int, torch.Size] = field(default_factory=dict)


def addresses(tensors: Iterable[object]) -> dict[int, Tensor]:
    """Returns the tensors that have memory, by its address; other objects are skipped."""
    by_address = {}
    for tensor in tensors:
        if isinstance(tensor, Tensor) and not nn.parameter.is_lazy(tensor):
            # Raises within functorch's transforms and on the meta device.
            with contextlib.suppress(RuntimeError, NotImplementedError):
                by_address[tensor.untyped_storage().data_ptr()] = tensor
    by_address.pop(0, None)
    return by_address


def operations(model: nn.Module, forward: Callable[[], object], trace: Trace | None = None) -> int:
    """Counts the floating-point operations of a forward pass.

    Args:
        model: The model. Its buffers and torch's random state are restored.
        forward: Runs the forward pass.
        trace: Receives the operations and reads, also if the pass fails.

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
            _without_fused_kernels(),
            counter,
        ):
            forward()
    finally:
        with torch.no_grad():
            for buffer, own in buffers:
                buffer.copy_(own)
    return trace.operations


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums PyTorch's own formulas over the operators of a pass.

    `torch.utils.flop_counter.FlopCounterMode` does the same for each module, but imports PyTorch's
    compiler, which takes two seconds.
    """

    supports_higher_order_operators = True

    def __init__(self, trace: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._trace = trace

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled here, so PyTorch need not import its compiler to disable it.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        read = addresses(tree_leaves((args, kwargs)))
        self._trace.read |= read.keys()
        for address, tensor in read.items():
            if isinstance(tensor, nn.Parameter):
                self._trace.parameters[address] = tensor.shape
        if not isinstance(func, torch._ops.OpOverload):
            return NotImplemented
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        used = addresses(tree_leaves((args, kwargs, result))).items()
        own = [t for address, t in used if address not in self._trace.parameters]
        size = sum(tensor.untyped_storage().nbytes() for tensor in own)
        self._trace.largest = max(self._trace.largest, size)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self._trace.operations += int(formula(*args, **kwargs, out_val=result))
        return result


@contextmanager
def _without_fused_kernels() -> Iterator[None]:
    """Disables fused kernels of layers, which the counter does not know."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with ExitStack() as stack:
            # Disabling oneDNN makes PyTorch warn about its own code.
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            stack.enter_context(without_cudnn())
            if "torch._dynamo" in sys.modules:
                # Do not compile the model again for a few examples.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
