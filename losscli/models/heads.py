"""Properties of the heads of transformers models, derived from class names and configs.

This module does not import transformers: if it is not loaded, no model belongs to it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from losscli.checkpoint.renaming import is_pretrained

__all__ = [
    "HEADLESS",
    "NEEDS_DECODER",
    "ScoreKind",
    "is_headless",
    "label_loss",
    "needs_decoder_inputs",
    "score_kind",
    "suggest_fix",
]

ScoreKind = Literal["next", "own", "other"]
"""Whether outputs are scores of the next token, of the same position, or of something else."""

HEADLESS = (
    "Its config.json names no architecture with a head: name it there under architectures, or "
    "give a --model of your own that builds it"
)
"""How to fix a model that returns features instead of scores."""

NEEDS_DECODER = (
    "An encoder-decoder needs decoder_input_ids beside labels of their shape: give --data of your "
    "own (path/to/file.py:callable) whose batches are mappings with that key"
)
"""How to fix missing ``decoder_input_ids`` of an encoder-decoder."""

# The last three are named like causal models, but do not shift the labels.
_SAME_POSITION = re.compile(
    r".*For(MaskedLM|TokenClassification)|(XLM|Flaubert)WithLMHeadModel|XLNetLMHeadModel"
)
_NEXT_TOKEN = re.compile(r".*(ForCausalLM|LMHeadModel|WithLMHead)")
# Classes that choose a loss by config.problem_type and config.num_labels.
_LABEL_DEPENDENT = re.compile(r".*For(Sequence|Image|Video)Classification")
_CONDITIONAL = re.compile(r".*ForConditionalGeneration")


def score_kind(model: nn.Module) -> ScoreKind:
    """Returns which tokens the outputs of a language model score in its own loss.

    Returns:
        ``"next"`` for causal language models and for models that are not of transformers;
        ``"own"`` if labels are not shifted: masked language models, token classifiers and
        encoder-decoders; ``"other"`` for any other head.
    """
    if not is_pretrained(model):
        return "next"
    for name in (cls.__name__ for cls in type(model).__mro__):
        if _SAME_POSITION.fullmatch(name):
            return "own"
        if _NEXT_TOKEN.fullmatch(name):
            return "next"
        if _CONDITIONAL.fullmatch(name):
            return "own" if _is_encoder_decoder(model) else "next"
    return "other"


def label_loss(model: nn.Module, *, floating: bool) -> Literal["bce", "mse"] | None:
    """Returns the loss of a classifier of transformers if its labels are not class indices.

    The loss depends on ``problem_type`` in the config; if that is not set, on ``num_labels`` and
    on whether the labels are floating-point.

    Returns:
        ``"bce"`` for multi-label classification, ``"mse"`` for regression; None for class indices
        and for other models.
    """
    classes = type(model).__mro__ if is_pretrained(model) else ()
    if not any(_LABEL_DEPENDENT.fullmatch(cls.__name__) for cls in classes):
        return None
    config: Any = model.config
    problem = getattr(config, "problem_type", None)
    if problem is None:
        default = "multi_label_classification" if floating else "single_label_classification"
        problem = "regression" if config.num_labels == 1 else default
    losses: dict[str, Literal["bce", "mse"]] = {
        "multi_label_classification": "bce",
        "regression": "mse",
    }
    return losses.get(problem)


def is_headless(model: nn.Module) -> bool:
    """Whether a model is one of transformers that has no head and returns features."""
    if not is_pretrained(model):
        return False
    bare = sys.modules["transformers"].AutoModel._model_mapping.get(type(model.config), None)
    return type(model) in (bare if isinstance(bare, tuple) else (bare,))


def needs_decoder_inputs(model: nn.Module, inputs: object) -> bool:
    """Whether a model is an encoder-decoder and its inputs have no ``decoder_input_ids``."""
    generates = is_pretrained(model) and any(
        _CONDITIONAL.fullmatch(cls.__name__) for cls in type(model).__mro__
    )
    has_inputs = isinstance(inputs, Mapping) and "decoder_input_ids" in inputs
    return generates and _is_encoder_decoder(model) and not has_inputs


def suggest_fix(model: Any, inputs: object, tensors: Iterable[Tensor]) -> str:
    """Suggests a fix for a failed forward pass of a transformers model; "" if none is known."""
    if not isinstance(model, nn.Module) or not is_pretrained(model):
        return ""
    if needs_decoder_inputs(model, inputs):
        return NEEDS_DECODER
    limit = getattr(model.config, "max_position_embeddings", None)
    length = max(map(_length, tensors), default=0)
    if type(limit) is int and length > limit:
        key = getattr(model.config, "attribute_map", {}).get(
            "max_position_embeddings", "max_position_embeddings"
        )
        return (
            f"The model has {limit} positions ({key} in its config.json), and sequences are of "
            f"{length} tokens: give --data with context={limit} or less, or cut them"
        )
    return ""


def _length(tensor: Tensor) -> int:
    return 0 if tensor.is_floating_point() or tensor.ndim != 2 else tensor.shape[1]


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))
