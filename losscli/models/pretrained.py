"""Models of the library transformers, built from the config.json of a folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from losscli.errors import ModelError, one_line
from losscli.files import read_regular

__all__ = ["has_config", "pretrained"]

# How the names of architectures end, and the Auto classes that know them.
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

# How the numbers of what a model is built of are called, and how many of each it may have. Lists of
# them are counts for each stage, or else say which layers are of some kind.
_PARTS = re.compile(r"(?:.*_)?(?:layers?|experts|(?P<stages>blocks|depths?))")
_MOST_PARTS = 2000


def has_config(folder: Path) -> bool:
    """Tells whether a folder says how its model is built.

    Args:
        folder: The folder.

    Returns:
        Whether a config.json of transformers is in it.
    """
    try:
        content = json.loads(read_regular(folder / "config.json"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and isinstance(content.get("model_type"), str)


def pretrained(folder: str | Path) -> nn.Module:
    """Builds the model of a Hugging Face folder from its config.json, never from the network.

    Its weights are those of an initialisation. No code of the folder is run: transformers itself
    must know the model.

    Args:
        folder: The folder.

    Returns:
        The model with the head that config.json names first under ``architectures``, or without
        a head where it names none. Attention is computed by PyTorch's own
        ``scaled_dot_product_attention`` where the model can, and nothing is cached.

    Raises:
        ModelError: transformers is not installed, or does not know the model; or there is no
            config.json that it understands.
    """
    path = Path(folder)
    named = _read(path)
    _require_few_parts(path / "config.json", named)
    try:
        import transformers
    except ImportError as error:
        raise ModelError(
            f"{path} is a model of transformers, which is not installed ({one_line(error)})",
            "pip install 'losscli[hf]'",
        ) from None
    kind, architectures = named["model_type"], named.get("architectures") or []
    if kind not in transformers.CONFIG_MAPPING:
        if "auto_map" in named:
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
        with _alone(transformers):
            config = transformers.AutoConfig.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
            return _build(transformers, config, next(iter(architectures), ""))
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{path / 'config.json'} makes no model: {one_line(error)}") from error


def _read(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not path.is_dir():
        raise ModelError(
            f"there is no folder {path}, and nothing is fetched from a hub",
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
            f"{file} has no model_type, and is none of transformers",
            "Name the folder that save_pretrained made",
        )
    names = content.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(
            f"{file}: its architectures are {names!r}, and no list of names",
            'Write the class of the model, for example ["GPT2LMHeadModel"]',
        )
    return content


def _require_few_parts(file: Path, config: Mapping[str, Any]) -> None:
    """Refuses a number of layers that no model has: to build them would take hours."""
    for key, value in config.items():
        if isinstance(value, dict) and key != "label2id":  # whose keys are words of anything
            _require_few_parts(file, value)
        named = _PARTS.fullmatch(key)
        if named is None:
            continue
        values = value if isinstance(value, list) else [value]
        numbers = [v for v in values if type(v) is int]
        many = sum(numbers) if named["stages"] else max(numbers, default=0)
        if max(many, len(values)) > _MOST_PARTS:
            told = f"{key} of {len(values):,} values" if len(values) > 9 else f"{key}={value}"
            raise ModelError(
                f"{file} asks for {told}, more than the {_MOST_PARTS:,} of any model",
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
    # A config.json may name kernels that would be fetched and run. Without a name it is PyTorch's
    # own attention, or the model's where it cannot use that.
    config._attn_implementation = None
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"
    # Its initialisation is that of float32, whatever type a checkpoint beside it was stored in.
    dtype = {"dtype" if hasattr(config, "dtype") else "torch_dtype": torch.float32}
    model: nn.Module = getattr(transformers, known[0]).from_config(
        config, trust_remote_code=False, **dtype
    )
    return model


@contextmanager
def _alone(transformers: Any) -> Iterator[None]:
    """Keeps Hugging Face's own client from the network, whatever a config.json asks for.

    What transformers has to say of a config it also keeps for itself: a library never prints.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, transformers.logging.get_verbosity()
    constants.HF_HUB_OFFLINE = True
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before[0]
        transformers.logging.set_verbosity(before[1])
