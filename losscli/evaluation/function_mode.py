"""A base class for modes that see each call of a function of torch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.overrides import TorchFunctionMode

__all__ = ["FunctionMode"]


class FunctionMode(TorchFunctionMode):
    """Calls `intercept` instead of each function of torch."""

    @abstractmethod
    def intercept(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Returns the result of a call; ``function(*args, **kwargs)`` leaves it unchanged."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return self.intercept(func, args, kwargs or {})
