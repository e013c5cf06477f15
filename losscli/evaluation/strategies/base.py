"""The strategies for evaluating points of a slice, and the model that they require."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from losscli.data import Nest
from losscli.errors import ModelError
from losscli.evaluation.objective_functions import ObjectiveFunction
from losscli.evaluation.recalibration import BatchNormLayer
from losscli.evaluation.spectral import SpectralLayer
from losscli.weight_space.vectors import Weights

__all__ = ["Network", "NothingSharedError", "OutputRecorder", "Strategy"]


class Strategy(enum.Enum):
    """How points are evaluated, from the fastest to the safest."""

    STACKED = enum.auto()
    """All at once, with `torch.func.vmap` over their stacked weights; the first layer is shared."""
    THREADS = enum.auto()
    """Bound to replicas of the model in threads; the first layer is shared."""
    SHARED = enum.auto()
    """Bound to the model one after the other; the first layer is shared."""
    BOUND = enum.auto()
    """Bound to the model one after the other."""
    LOADED = enum.auto()
    """Loaded with ``load_state_dict``."""


class NothingSharedError(ModelError):
    """A strategy cannot be tested: the first layer's products nearly cancel at all points."""


class OutputRecorder(Protocol):
    """Records the outputs of the model for one batch."""

    def one(self, p: int, outputs: Any) -> None:
        """Records the outputs at the point with index p."""

    def all(self, outputs: Any) -> None:
        """Records the outputs at all points, each tensor with a first dimension P."""


class Network(Protocol):
    """The part of an objective that strategies use: a model with weights that can be set."""

    model: nn.Module
    tensors: Mapping[str, Tensor]
    dtype: torch.dtype
    function: ObjectiveFunction | None
    spectral: Sequence[SpectralLayer]

    @property
    def statistics(self) -> Sequence[BatchNormLayer]:
        """The BatchNorm layers with statistics that are re-estimated at every point."""

    def load(self, weights: Weights) -> None:
        """Loads tensors as ``load_state_dict`` does."""

    def forward(self, model: Callable[..., Any], inputs: Nest) -> Any:
        """Runs the model, or a function in its place, on a prepared batch."""

    def deferring(self) -> AbstractContextManager[Any]:
        """Defers the scores of tokens until the loss takes them.

        Returns:
            A context for a forward pass. Its outputs must be used before the weights change.
        """
