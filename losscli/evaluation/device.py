"""The device, and the floating-point types of the computation."""

from __future__ import annotations

import platform
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from losscli.errors import DeviceError, UsageError
from losscli.evaluation.function_mode import FunctionMode

__all__ = [
    "Narrowest",
    "choose_device",
    "describe_device",
    "float32_precision",
    "half_precision_note",
    "launches_kernels",
    "uses_tensor_cores",
    "widened",
    "without_cudnn",
]

_NAME = re.compile(r"(cpu|cuda|mps)(:\d+)?")

# Rows and columns of the matrices that are multiplied to compare types, and the repetitions.
_PRODUCT_SIZE = 256
_PRODUCTS = 5

# A type is slower if its products take this many times as long.
_SLOWER = 1.25


def choose_device(name: str, dtype: str, local: int | None = None) -> torch.device:
    """Chooses the device and checks that it is available.

    Args:
        name: ``auto``, ``cpu``, ``cuda``, ``cuda:I`` or ``mps``.
        dtype: The type of the forward pass, which not every device supports.
        local: The local rank of this process, None for a single process. ``cuda`` is the GPU of
            this number, modulo the number of GPUs that the process sees, which may be only one.

    Returns:
        The device. A GPU with a number becomes the current one, for code that asks for ``cuda``.

    Raises:
        UsageError: There is no such name.
        DeviceError: It is not available.
    """
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available() and dtype != "float64":
            name = "mps"
        else:
            name = "cpu"
    cure = f"Choose one of {', '.join(['auto', *_available()])}"
    if not _NAME.fullmatch(name):
        raise UsageError(f"the device {name!r} is not known", cure)
    try:
        device = torch.device(name)
        if local is not None and name == "cuda":
            device = torch.device("cuda", local % max(1, torch.cuda.device_count()))
        # Only an allocation shows whether a device works.
        torch.empty(1, dtype=getattr(torch, dtype), device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise DeviceError(
            f"the device {name!r} with {dtype} is not available: {reason}",
            cure,
        ) from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def _available() -> list[str]:
    """Lists the devices of this machine."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return ["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]


def describe_device(device: torch.device) -> str:
    """Returns the name of the GPU or processor, or at least the architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def launches_kernels(device: torch.device) -> bool:
    """Whether the host launches kernels of a device, which may wait for the host; not on a CPU."""
    return device.type != "cpu"


def uses_tensor_cores(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a GPU multiplies with tensor cores.

    Args:
        device: The device.
        dtype: The type of the factors.

    Returns:
        Whether it does for this type, within `float32_precision` as that allows.
    """
    if device.type != "cuda":
        return False
    half = dtype in {torch.float16, torch.bfloat16}
    return half or (dtype == torch.float32 and torch.backends.cudnn.allow_tf32)


def half_precision_note(device: torch.device, dtype: torch.dtype) -> str:
    """Notes that a half-precision type is slower than float32 on this processor.

    A processor without instructions for the type converts every number twice, and some processors
    have such instructions and multiply with them at half the rate. So products are measured, which
    takes about ten milliseconds.

    Returns:
        The note; empty if the type is not slower, or has as many bits as float32.
    """
    if device.type != "cpu" or dtype.itemsize >= torch.float32.itemsize:
        return ""
    half, single = (_product_seconds(t) for t in (dtype, torch.float32))
    if half < _SLOWER * single:
        return ""
    name = str(dtype).removeprefix("torch.")
    return (
        f"matrix products in {name} are slower than in float32 on this processor: "
        "--dtype float32 is probably faster"
    )


@torch.no_grad()
def _product_seconds(dtype: torch.dtype) -> float:
    """The shortest time of a few matrix products in a type."""
    a = torch.ones(_PRODUCT_SIZE, _PRODUCT_SIZE, dtype=dtype)
    seconds = []
    for _ in range(_PRODUCTS):
        start = time.perf_counter()
        torch.mm(a, a)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@contextmanager
def float32_precision(*, tf32: bool) -> Iterator[None]:
    """Sets the precision of float32 products, and restores the settings.

    User code may have lowered it: after ``torch.set_float32_matmul_precision("medium")`` a
    processor may multiply in bfloat16 as well, and PyTorch lets cuDNN use TF32 by default.

    Args:
        tf32: Whether a GPU may compute in TF32. A processor never does.

    Yields:
        Nothing.
    """
    settings = _float32_settings(tf32)
    before = [setting.read() for setting in settings]
    for setting in settings:
        setting.write(setting.value)
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            if value is not None:
                setting.write(value)


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Disables cuDNN; unlike `torch.backends.cudnn.flags` it leaves the precision as it is.

    Yields:
        Nothing.
    """
    enabled = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


@dataclass(frozen=True)
class _Float32Setting:
    """One of PyTorch's settings of the precision of float32 products."""

    getter: Callable[[], Any]
    setter: Callable[[Any], object]
    value: object

    def read(self) -> Any:
        """The value; None if PyTorch refuses to return it because both interfaces were mixed."""
        with _without_warnings():
            try:
                return self.getter()
            except RuntimeError:
                return None

    def write(self, value: object) -> None:
        with _without_warnings():
            self.setter(value)


@contextmanager
def _without_warnings() -> Iterator[None]:
    # PyTorch 2.9 to 2.12 warn once of the older interface, where it is read too.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _float32_settings(tf32: bool) -> Sequence[_Float32Setting]:
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn

    def attribute(owner: object, name: str, value: object) -> _Float32Setting:
        return _Float32Setting(partial(getattr, owner, name), partial(setattr, owner, name), value)

    # The older interface first: it also sets the values of the newer one, and PyTorch raises an
    # error where code reads the older one and both differ.
    settings = [
        _Float32Setting(
            torch.get_float32_matmul_precision,
            torch.set_float32_matmul_precision,
            "high" if tf32 else "highest",
        ),
        attribute(cudnn, "allow_tf32", tf32),
    ]
    if hasattr(cuda.matmul, "fp32_precision"):
        gpu = "tf32" if tf32 else "ieee"
        for backend, names, value in (
            (cuda, ("matmul",), gpu),
            (cudnn, ("conv", "rnn"), gpu),
            (mkldnn, ("matmul", "conv", "rnn"), "ieee"),
        ):
            settings += [
                attribute(getattr(backend, name), "fp32_precision", value) for name in names
            ]
    return settings


class Narrowest(FunctionMode):
    """Records the narrowest floating-point type of all results in the context.

    Args:
        dtype: The type to start from.

    Attributes:
        dtype: The narrowest type so far.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def intercept(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Records the type of a result."""
        result = function(*args, **kwargs)
        if isinstance(result, Tensor) and result.is_floating_point():
            self.dtype = max(self.dtype, result.dtype, key=lambda t: torch.finfo(t).eps)
        return result


@contextmanager
def widened() -> Iterator[None]:
    """Makes code that casts to a narrower type, or has tensors of one, compute in float64.

    Autocast does not change float64. Compiled and scripted code is not affected.

    Yields:
        Nothing.
    """
    # A nested mode would process all calls twice.
    if _IS_WIDENED.get():
        yield
        return
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    outside = _IS_WIDENED.set(True)
    try:
        with _Widened():
            yield
    finally:
        _IS_WIDENED.reset(outside)
        torch.set_default_dtype(default)


_IS_WIDENED = ContextVar("_IS_WIDENED", default=False)


class _Widened(FunctionMode):
    def intercept(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        # In-place functions and attribute access need the tensor itself.
        kept = getattr(function, "__name__", "").endswith("_")
        change = _kept if kept else _widened
        changed = {key: _mapped(change, value) for key, value in kwargs.items()}
        return _CASTS.get(function, function)(*(_mapped(change, x) for x in args), **changed)


_CASTS: Mapping[Callable[..., Any], Callable[..., Any]] = dict.fromkeys(
    (Tensor.float, Tensor.half, Tensor.bfloat16), Tensor.double
)


def _wide(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_floating_point:
        return torch.float64
    return torch.complex128 if dtype.is_complex else dtype


def _mapped(change: Callable[[object], object], value: object) -> object:
    # The common cases, because tree_map takes longer than most calls.
    if value is None or isinstance(value, Tensor | torch.dtype | int | float | str):
        return change(value)
    return tree_map(change, value)


def _kept(value: object) -> object:
    return _wide(value) if isinstance(value, torch.dtype) else value


def _widened(value: object) -> object:
    if isinstance(value, Tensor) and value.dtype != _wide(value.dtype):
        return value.to(_wide(value.dtype))
    return _kept(value)
