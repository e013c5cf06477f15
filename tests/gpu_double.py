"""A double of a GPU: tensors that lie on the CPU and answer that they are on ``cuda:0``.

Like CUDA it refuses operators whose arguments are on different devices, and NumPy arrays of its
tensors. It counts where the host would wait for the device: values that are read, masks that select
by their values, and copies from and to the CPU. It has no random generator, streams or memory of
its own, and no kernel: the numbers are those of the CPU.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, Self
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["GPU", "gpu_double"]

GPU = torch.device("cuda", 0)

_aten = torch.ops.aten

# Operators that take tensors of several devices, and those that read values.
_MIXED = {_aten.copy_, _aten._to_copy, _aten.index, _aten.index_put_, _aten._index_put_impl_}
_READING = {
    _aten._local_scalar_dense, _aten.equal, _aten.nonzero, _aten.masked_select, _aten._unique2,
}  # fmt: skip


class Double(Tensor):
    """A tensor of the double. To PyTorch's own code it is on the CPU, which has no CUDA."""

    own: Tensor

    @staticmethod
    def __new__(cls, own: Tensor) -> Self:
        double: Self = Tensor._make_wrapper_subclass(
            cls, own.size(), strides=own.stride(), storage_offset=own.storage_offset(),
            dtype=own.dtype, layout=own.layout, device="cpu",
        )  # fmt: skip
        double.own = own.detach()
        return double

    @property
    def device(self) -> torch.device:
        return GPU

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Double) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.own = value.own

    def data_ptr(self) -> int:
        return self.own.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.own.untyped_storage()

    def cpu(self, *_: Any) -> Tensor:
        _count()
        down: Tensor = _Down.apply(self)  # type: ignore[no-untyped-call]
        return down

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def record_stream(self, stream: Any) -> None: ...

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        doubles: dict[int, Double] = {}
        others: list[Tensor] = []

        def own(value: Tensor) -> Tensor:
            if not isinstance(value, Double):
                others.append(value)
                return value
            doubles[id(value.own)] = value
            return value.own

        own_args, own_kwargs = _map_tensors(own, args), _map_tensors(own, kwargs or {})
        packet = func.overloadpacket
        if packet in _READING or (packet in _MIXED and others) or _selects(packet, args):
            _count()
        # PyTorch's own code makes zeros where it is told that the tensors are: on the CPU.
        if packet not in _MIXED and any(t.ndim and bool(t.any()) for t in others):
            raise RuntimeError(f"expected all tensors to be on the same device: {func}")
        result = func(*own_args, **own_kwargs)

        def wrapped(value: Tensor) -> Tensor:
            if value.device.type != "cpu":
                return value
            return doubles[id(value)] if id(value) in doubles else Double(value)

        # A copy to the CPU writes to a tensor that is given.
        stays = packet is _aten.copy_ and not doubles.keys() & {id(result)}
        return result if stays else _map_tensors(wrapped, result)


def _map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Applies a function to the tensors among the arguments or the results of an operator.

    Faster than PyTorch's own function, which knows more containers.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)([_map_tensors(function, part) for part in value])
    if isinstance(value, dict):
        return {key: _map_tensors(function, part) for key, part in value.items()}
    return value


def _selects(packet: Any, args: tuple[Any, ...]) -> bool:
    indices = args[1] if packet in {_aten.index, _aten.index_put_} else []
    return any(isinstance(t, Tensor) and t.dtype == torch.bool for t in indices)


_waits: Counter[str] = Counter()


def _count() -> None:
    """Counts a wait by the line of losscli that causes it."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and f"{os.sep}losscli{os.sep}" not in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is not None:
        _waits[f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"] += 1


class _Down(torch.autograd.Function):
    """Copies a tensor to the CPU, and its gradient back."""

    @staticmethod
    def forward(_: Any, double: Double) -> Tensor:  # type: ignore[override]
        return double.own.clone()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return Double(gradient)


def _is_gpu(value: Any) -> bool:
    return isinstance(value, str | torch.device) and torch.device(value).type == "cuda"


class _Redirect(TorchFunctionMode):
    """Answers what depends on the device, and makes tensors of the double."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not kwargs and func is not Tensor.to:
            return func(*args)
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        if not _is_gpu(kwargs.get("device")):
            return func(*args, **kwargs)
        if func in {torch.tensor, torch.as_tensor} and not isinstance(args[0], Double):
            _count()
        result = func(*args, **{**kwargs, "device": "cpu"})
        return result if isinstance(result, Double) else Double(result)

    @staticmethod
    def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = ("device", "dtype", "non_blocking", "copy")
        if args and isinstance(args[0], torch.dtype):
            names = names[1:]
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        device, dtype = given.pop("device", None), given.pop("dtype", None) or tensor.dtype
        blocks = not given.pop("non_blocking", False)
        if device is None or _is_gpu(device) is isinstance(tensor, Double):
            return Tensor.to(tensor, dtype, **given)
        if isinstance(tensor, Double):
            return tensor.cpu().to(dtype) if torch.device(device).type == "cpu" else (
                Tensor.to(tensor.own, device, dtype)
            )  # fmt: skip
        if not _is_gpu(device):
            return Tensor.to(tensor, device, dtype, **given)
        if blocks:
            _count()
        return Double(tensor.detach().to(dtype).clone())


class _Event:
    def synchronize(self) -> None: ...


class _Stream:
    def __init__(self, *_: Any) -> None: ...
    def record_event(self) -> _Event:
        return _Event()

    def wait_event(self, event: _Event) -> None: ...


@contextmanager
def gpu_double() -> Iterator[Counter[str]]:
    """Makes ``cuda`` the double.

    Yields:
        How often each line of losscli waits for the device, counted in the context.
    """
    state = torch.zeros(16, dtype=torch.uint8)
    answers: dict[str, Any] = {
        "is_available": True, "device_count": 1, "current_device": 0, "set_device": None,
        "get_device_name": "a double", "mem_get_info": (8 << 30, 8 << 30), "memory_reserved": 0,
        "memory_allocated": 0, "synchronize": None, "empty_cache": None, "get_rng_state": state,
        "set_rng_state": None, "manual_seed": None, "current_stream": _Stream(),
        "stream": nullcontext(), "device": nullcontext(),
    }  # fmt: skip
    _waits.clear()
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, mock.Mock(return_value=answer)))
        stack.enter_context(mock.patch.object(torch.cuda, "Stream", _Stream))
        fork = mock.Mock(return_value=nullcontext())
        stack.enter_context(mock.patch("torch.random.fork_rng", fork))
        # Otherwise a parameter would take over the double without what it has of its own.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        stack.enter_context(_Redirect())
        yield _waits
