"""Save checkpoints during training, from any training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from losscli.errors import UsageError, one_line
from losscli.recorder.recorder import Recorder
from losscli.registry import load

if TYPE_CHECKING:
    from losscli.recorder.lightning import LightningCallback
    from losscli.recorder.transformers import TransformersCallback

__all__ = ["LightningCallback", "Recorder", "TransformersCallback"]

# Imported when they are used, since each needs its library.
_CALLBACKS = {
    "LightningCallback": "losscli.recorder.lightning:LightningCallback",
    "TransformersCallback": "losscli.recorder.transformers:TransformersCallback",
}


def __getattr__(name: str) -> Any:
    if name not in _CALLBACKS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return load(_CALLBACKS[name])
    except ImportError as error:
        library = name.removesuffix("Callback").lower()
        raise UsageError(
            f"{name} needs {library}, which cannot be imported ({one_line(error)})",
            f"pip install {library}",
        ) from None
