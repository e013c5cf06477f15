"""The settings of all studies: model, data, loss, device and tensors that move."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_type_hints

from losscli.arguments import convert, describe, require_known
from losscli.errors import UsageError

__all__ = ["Buffers", "DType", "Settings"]

DType = Literal["float32", "float64", "bfloat16", "float16"]
Buffers = Literal["interpolate", "a", "b", "recalibrate"]


@dataclass(frozen=True)
class Settings:
    """The settings of every study.

    Specs are strings as on the command line, and may name code. From Python, a model may be an
    ``nn.Module`` (which is copied and never changed), data a mapping from split names to
    ``(inputs, targets)``, a DataLoader or a Dataset, and a loss or metric a function from outputs
    and targets to one number per example.

    Attributes:
        model: The architecture; None takes it from the checkpoints' metadata or ``losscli.toml``.
        data: The data set; None as for ``model``.
        loss: The per-example loss; None as for ``model``, else by the task of the data.
        metric: The metrics; ``("none",)`` for none, empty for those of the task of the data.
        split: The splits; empty for all.
        limit: The number of examples of each split, or of batches with ``batch_loss``, drawn once
            with the seed; None for all.
        batch_size: Examples per forward pass; None chooses it for the device. With ``batch_loss``,
            examples per batch of data that are not a DataLoader.
        batch_loss: Whether the loss is one number per batch. The batches of a DataLoader are kept,
            their order is drawn once, and each batch has the same weight.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
        dtype: The dtype of the forward pass; sums are always float64.
        tf32: Whether a GPU may round float32 products to TF32.
        sampling_error: If a number, examples are evaluated in a random order in growing blocks,
            until the standard error of the loss at every point is below this fraction of the
            height of the curve; None evaluates all.
        buffers: Whether floating-point buffers move with the parameters, stay at A or B, or move
            except for BatchNorm statistics, which are re-estimated at every point.
        only: Patterns of the tensors that move; empty for all.
        except_: Patterns of the tensors that stay at A.
        ignore_unexpected: Whether tensors of a checkpoint that the model does not have are ignored.
        allow_missing: Patterns of tensors of the model that a checkpoint may lack; they keep the
            model's initial values.
        rename: Renames of the tensors of the checkpoints, ``OLD=NEW``: each replaces the first
            run of components OLD in a name, such as ``fc=head`` in ``fc.weight``.
        seed: The seed of all random choices.
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
    ignore_unexpected: bool = False
    allow_missing: tuple[str, ...] = ()
    rename: tuple[str, ...] = ()
    seed: int = 0

    def __new__(cls, *_: Any, **options: Any) -> Self:
        """Rejects unknown keywords."""
        require_known(cls.__name__, options, [field.name for field in fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Converts values of other types, or rejects them."""
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
                        f"{name} must be a string or a function, not {describe(value)}",
                        f"Give the name of a {name} as on the command line, or code",
                    )


_HINTS = get_type_hints(Settings)
