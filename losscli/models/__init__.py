"""Models by name: losscli's own, those of transformers, and saved programs."""

from __future__ import annotations

from losscli.models.built_in import CNN, MLP
from losscli.models.pretrained import has_config
from losscli.models.registry import FROM_FILES, MODELS, RUNS_CODE

__all__ = ["CNN", "FROM_FILES", "MLP", "MODELS", "RUNS_CODE", "has_config"]
