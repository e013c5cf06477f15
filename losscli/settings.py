"""What all studies share: how a model, data and a device are named. One name, one meaning."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_type_hints

from losscli.arguments import convert, require_known, shown
from losscli.errors import UsageError

__all__ = ["Buffers", "DType", "Settings"]

DType = Literal["float32", "float64", "bfloat16", "float16"]
Buffers = Literal["interpolate", "a", "b", "recalibrate"]


@dataclass(frozen=True)
class Settings:
    """The settings that every study takes.

    Specs are strings as on the command line, and since the caller names them they may name code.
    From Python, a model may be an ``nn.Module`` (copied, never changed), data any mapping from
    split names to ``(inputs, targets)``, a DataLoader or a Dataset, and a loss or metric any
    function from outputs and targets to one number an example.

    Attributes:
        model: The architecture; by the checkpoints' metadata or ``losscli.toml`` where None.
        data: The data set; likewise.
        loss: The per-example loss; likewise, then by the data's task.
        metric: The metrics; ``("none",)`` for none, by the data's task where empty.
        split: Which splits; all where empty.
        limit: Examples of each split, or with ``batch_loss`` batches, drawn once with the seed; all
            where None.
        batch_size: Examples a forward pass; by the device where None. With ``batch_loss`` the
            examples per batch of data that are not a DataLoader.
        batch_loss: Whether the loss is one number per batch. A DataLoader's batches are kept, their
            order is drawn once, and each batch counts the same.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        dtype: Of the forward pass; sums are always float64.
        tf32: Whether a GPU may round float32 products to TF32.
        sampling_error: Where a number, examples are looked at in a random order, in growing blocks,
            until at every point the standard error of the loss is below this share of the
            curve's height; all of them where None.
        buffers: Whether floating-point buffers move with the parameters or stay at one end's, or
            move but for BatchNorm's statistics, which are estimated anew at every point.
        only: Patterns of the tensors that move; all where empty.
        except_: Patterns of tensors that stay at A.
        seed: Of every random choice.
    """

    model: Any = None
    data: Any = None
    loss: Any = None
    metric: tuple[Any, ...] = ()
    split: tuple[str, ...] = ()
    limit: int | None = None
    batch_size: int | None = None
    batch_loss: bool = False
    device: str = "auto"
    dtype: DType = "float32"
    tf32: bool = False
    sampling_error: float | None = None
    buffers: Buffers = "interpolate"
    only: tuple[str, ...] = ()
    except_: tuple[str, ...] = ()
    seed: int = 0

    def __new__(cls, *_: Any, **options: Any) -> Self:
        """Refuses a keyword that is not known."""
        require_known(cls.__name__, options, [field.name for field in fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Takes values of other types for what they mean, or refuses them."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in {"device", "dtype"} and type(value).__module__ == "torch":
                value = str(value).removeprefix("torch.")
            if field.name in {"model", "data", "loss"} and isinstance(value, os.PathLike):
                value = os.fspath(value)
            object.__setattr__(self, field.name, convert(field.name, value, _HINTS[field.name]))
        for name, values in {
            "model": (self.model,),
            "loss": (self.loss,),
            "metric": self.metric,
        }.items():
            for value in values:
                if value is not None and not isinstance(value, str) and not callable(value):
                    raise UsageError(
                        f"{name} must be a string or a function, not {shown(value)}",
                        f"Give the name of a {name} as on the command line, or code",
                    )


_HINTS = get_type_hints(Settings)
