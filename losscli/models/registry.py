"""The registry of models by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from losscli.models.built_in import CNN, MLP
from losscli.models.exported import load_exported
from losscli.models.pretrained import build_pretrained

__all__ = ["FROM_FILES", "MODELS", "RUNS_CODE"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "cnn": CNN,
    "transformers": build_pretrained,
    "pt2": load_exported,
}

FROM_FILES = frozenset({"transformers", "pt2"})
"""Entries whose argument is a path."""

RUNS_CODE = frozenset({"pt2"})
"""Entries that run code in a file; only the command line may name them."""
