"""Models by name: built-in models, models of transformers, and exported programs."""

from __future__ import annotations

from losscli.models.built_in import CNN, MLP
from losscli.models.heads import (
    HEADLESS,
    NEEDS_DECODER,
    is_headless,
    label_loss,
    needs_decoder_inputs,
    score_kind,
    suggest_fix,
)
from losscli.models.pretrained import has_config
from losscli.models.registry import FROM_FILES, MODELS, RUNS_CODE

__all__ = [
    "CNN",
    "FROM_FILES",
    "HEADLESS",
    "MLP",
    "MODELS",
    "NEEDS_DECODER",
    "RUNS_CODE",
    "has_config",
    "is_headless",
    "label_loss",
    "needs_decoder_inputs",
    "score_kind",
    "suggest_fix",
]
