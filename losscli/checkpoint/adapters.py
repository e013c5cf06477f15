"""Adapters of peft: changes to the weights of another checkpoint.

Plain LoRA needs no model: `losscli.checkpoint.lora` merges it tensor by tensor. The other types are
merged into the model by peft.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from losscli.checkpoint.lora import MERGE_FIRST, SAVE_AGAIN, LoraAdapter, base_name
from losscli.checkpoint.peft_adapters import TYPES, PeftAdapter
from losscli.errors import CheckpointError

__all__ = ["CONFIG", "Adapter", "parse_config"]

CONFIG = "adapter_config.json"

Adapter = LoraAdapter | PeftAdapter

# Keys of configs of the type LORA for variants of LoRA that peft merges.
_VARIANTS = {
    "use_dora": "DoRA",
    "target_parameters": "LoRA of parameters",
    "trainable_token_indices": "LoRA with trained tokens",
}
# Those that are not a change of the given base, or that peft does not merge.
_UNSUPPORTED = {
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "layer_replication": "layer replication",
    "megatron_config": "Megatron",  # peft imports any module that this config names
}
_MAX_TERMS = 100

# Initialisations that do not change the base model; others move some of its weights to the adapter.
_NEUTRAL_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


def parse_config(config: Mapping[str, Any], where: Path) -> Adapter:
    """Returns the adapter that the content of a config file describes.

    Raises:
        CheckpointError: The type of the adapter is not supported, or a value is invalid.
    """
    kind = config.get("peft_type")
    if kind in TYPES:
        # A power series, which peft sums term by term; its default has five.
        terms = config.get("num_cayley_neumann_terms", 5)
        if type(terms) is not int or terms > _MAX_TERMS:
            raise CheckpointError(
                f"{where}: num_cayley_neumann_terms is {terms!r}, which is not a number of terms",
                SAVE_AGAIN,
            )
        return PeftAdapter(where, base_name(config), str(kind), config)
    if kind != "LORA":
        raise CheckpointError(
            f"{where} describes an adapter of type {kind!r}, which is not supported", MERGE_FIRST
        )
    other = next((name for key, name in _UNSUPPORTED.items() if config.get(key)), None)
    initial = config.get("init_lora_weights")
    if other is None and initial not in _NEUTRAL_INITIALISATIONS:
        other = f"init_lora_weights={initial!r}, which changes the base as well"
    if other:
        raise CheckpointError(f"{where}: {other} is not supported", MERGE_FIRST)
    variant = next((name for key, name in _VARIANTS.items() if config.get(key)), None)
    if variant:
        return PeftAdapter(where, base_name(config), variant, config)
    return LoraAdapter.from_config(config, where)
