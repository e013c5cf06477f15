"""Build models of transformers from the config.json of a folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from losscli.checkpoint.renaming import dtype_argument, silent
from losscli.errors import ModelError, one_line
from losscli.files import read_object, read_regular

__all__ = ["build_pretrained", "has_config"]

# Suffixes of architecture names, and the Auto classes for them.
_HEADS = (
    (("ForCausalLM", "LMHeadModel"), ("AutoModelForCausalLM",)),
    (
        ("ForConditionalGeneration",),
        (
            "AutoModelForSeq2SeqLM",
            "AutoModelForSpeechSeq2Seq",
            "AutoModelForImageTextToText",
        ),
    ),
    (("ForMaskedLM",), ("AutoModelForMaskedLM",)),
    (("ForSequenceClassification",), ("AutoModelForSequenceClassification",)),
    (("ForTokenClassification",), ("AutoModelForTokenClassification",)),
    (("ForQuestionAnswering",), ("AutoModelForQuestionAnswering",)),
    (("ForMultipleChoice",), ("AutoModelForMultipleChoice",)),
    (("ForImageClassification",), ("AutoModelForImageClassification",)),
    (("ForSemanticSegmentation",), ("AutoModelForSemanticSegmentation",)),
    (("ForVideoClassification",), ("AutoModelForVideoClassification",)),
    (
        ("ForAudioClassification", "ForAudioFrameClassification"),
        ("AutoModelForAudioClassification", "AutoModelForAudioFrameClassification"),
    ),
    (("ForPreTraining",), ("AutoModelForPreTraining",)),
)

# Config keys with numbers of layers, experts or blocks, and the maximum of each. A list has either
# one count per stage or the indices of layers of some kind.
_PART_KEYS = re.compile(r"(?:.*_)?(?:layers?|experts|(?P<stages>blocks|depths?))")
_MAX_PARTS = 2000


def has_config(folder: Path) -> bool:
    """Whether a folder has a config.json of transformers: one with a ``model_type``."""
    return isinstance(read_object(folder / "config.json").get("model_type"), str)


def build_pretrained(folder: str | Path) -> nn.Module:
    """Builds the model of a Hugging Face folder from its config.json, without network access.

    The weights are freshly initialised. Code in the folder is never run, so that transformers
    itself must support the model.

    Args:
        folder: The folder.

    Returns:
        The model, with the first head in ``architectures`` of config.json, or without a head if
        there is none. It uses PyTorch's ``scaled_dot_product_attention`` if it supports that, and
        no cache.

    Raises:
        ModelError: transformers is not installed or does not support the model, or config.json is
            missing or invalid.
    """
    path = Path(folder)
    content = _read_config(path)
    _check_part_counts(path / "config.json", content)
    try:
        import transformers
    except ImportError as error:
        raise ModelError(
            f"{path} is a model of transformers, which is not installed ({one_line(error)})",
            "pip install 'losscli[hf]'",
        ) from None
    kind, architectures = content["model_type"], content.get("architectures") or []
    if kind not in transformers.CONFIG_MAPPING:
        if "auto_map" in content:
            raise ModelError(
                f"{path / 'config.json'} names code to run: its model_type {kind!r} is not one of "
                "transformers, and a file may not name code",
                "If you trust it, give --model path/to/file.py:callable with a function of your "
                "own that builds it",
            )
        raise ModelError(
            f"transformers {transformers.__version__} does not know the model_type {kind!r} of "
            f"{path / 'config.json'}",
            "Try a newer one: pip install --upgrade transformers",
        )
    try:
        with _offline(), silent(transformers):
            config = transformers.AutoConfig.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
            return _build(transformers, config, next(iter(architectures), ""))
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{path / 'config.json'} does not define a model: {one_line(error)}"
        ) from error


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not path.is_dir():
        raise ModelError(
            f"there is no folder {path}; models are not downloaded from a hub",
            "Download it first, for example: hf download NAME --local-dir FOLDER",
        )
    try:
        content = json.loads(read_regular(file))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{file} cannot be read: {one_line(error)}", "Name the folder that save_pretrained made"
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise ModelError(
            f"{file} has no model_type, so it is not a config of transformers",
            "Name the folder that save_pretrained made",
        )
    names = content.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(
            f"{file}: its architectures are {names!r}, which is not a list of names",
            'Write the class of the model, for example ["GPT2LMHeadModel"]',
        )
    return content


def _check_part_counts(file: Path, config: Mapping[str, Any]) -> None:
    """Refuses an unrealistic number of layers, which would take hours to build."""
    for key, value in config.items():
        if isinstance(value, dict) and key != "label2id":  # its keys are arbitrary labels
            _check_part_counts(file, value)
        match = _PART_KEYS.fullmatch(key)
        if match is None:
            continue
        values = value if isinstance(value, list) else [value]
        numbers = [v for v in values if type(v) is int]
        count = sum(numbers) if match["stages"] else max(numbers, default=0)
        if max(count, len(values)) > _MAX_PARTS:
            text = f"{key} of {len(values):,} values" if len(values) > 9 else f"{key}={value}"
            raise ModelError(
                f"{file} asks for {text}, more than the {_MAX_PARTS:,} of any model",
                "Correct it, or give a --model of your own that builds it",
            )


def _build(transformers: Any, config: Any, architecture: str) -> nn.Module:
    for attribute in ("use_cache", "use_pretrained_backbone"):
        if getattr(config, attribute, None):
            setattr(config, attribute, False)
    autos = next((a for ends, a in _HEADS if architecture.endswith(ends)), ("AutoModel",))
    known = [auto for auto in autos if type(config) in getattr(transformers, auto)._model_mapping]
    if not known:
        raise ModelError(
            f"transformers has no {architecture} for the model_type {config.model_type!r}",
            "Correct architectures in config.json, or give a --model of your own that builds it",
        )
    # A config.json may name kernels, which transformers would download and run. None selects
    # PyTorch's attention, or that of the model if it does not support PyTorch's.
    config._attn_implementation = None
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"
    # Initialise in float32, whatever dtype the config has.
    model: nn.Module = getattr(transformers, known[0]).from_config(
        config, trust_remote_code=False, **dtype_argument(transformers, torch.float32)
    )
    return model


@contextmanager
def _offline() -> Iterator[None]:
    """Prevents network access by the Hugging Face client."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
