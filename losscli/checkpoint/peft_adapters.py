"""Adapters that peft merges into a model: DoRA, IA³, LoHa and others."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from losscli.checkpoint.hooks import copy_model
from losscli.checkpoint.lora import MERGE_FIRST, UNTIE
from losscli.errors import CheckpointError, one_line
from losscli.weight_space.vectors import Weights, working_type

__all__ = ["TYPES", "PeftAdapter"]

# The types that peft merges exactly in float64. Others, such as prompts, have no merged weights;
# BOFT compiles code on a GPU, C3A computes in float32, and SHiRA cannot be built on meta.
TYPES = (
    "ADALORA",
    "FOURIERFT",
    "HRA",
    "IA3",
    "LN_TUNING",
    "LOHA",
    "LOKR",
    "MISS",
    "OFT",
    "RANDLORA",
    "ROAD",
    "VERA",
)


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter that peft merges.

    Attributes:
        where: The path of the config file.
        base: The name of the base model in the config, if any.
        kind: The type of the adapter.
        config: The content of the config file.
    """

    where: Path
    base: str | None
    kind: str
    config: Mapping[str, Any]

    def merge(
        self,
        base: Weights,
        tensors: Weights,
        aliases: Mapping[str, list[str]],
        model: nn.Module | None,
    ) -> dict[str, Tensor]:
        """Returns the tensors of a model with the adapter merged, by ``merge_and_unload``.

        peft merges in float64. The arguments are those of `LoraAdapter.merge`. The model is not
        changed; it is None if it is not known.

        Raises:
            CheckpointError: The model is not known, peft is not installed or cannot merge the
                adapter, or the adapter changes a tied tensor.
        """
        if model is None:
            raise CheckpointError(
                f"{self.where.parent} is an adapter of the type {self.kind}, which is merged into "
                "a model, and this command has none",
                MERGE_FIRST,
            )
        try:
            import peft
        except ImportError as error:
            raise CheckpointError(
                f"{self.where.parent} is an adapter of the type {self.kind}, which is merged by "
                f"peft, and that is not installed ({one_line(error)})",
                "pip install 'losscli[hf]'",
            ) from None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                merged = self._merge(peft, base, tensors, model)
        except Exception as error:  # noqa: BLE001 - peft raises anything
            raise CheckpointError(
                f"{self.where.parent}: peft {peft.__version__} cannot merge this adapter of the "
                f"type {self.kind} ({one_line(error)})",
                "Name the checkpoint that it was trained on before it, and its model with -m",
            ) from None
        dtype = working_type(*(t for t in tensors.values() if t.is_floating_point()))
        changed = {
            name: merged[name].to(working_type(tensor, torch.empty(0, dtype=dtype)))
            for name, tensor in base.items()
            if not torch.equal(merged[name], tensor.to(merged[name].dtype))
        }
        for name in changed:
            if name in aliases:
                raise CheckpointError(
                    f"{self.where}: {name} and {aliases[name][0]} are one tensor in the model, and "
                    f"the adapter changes {name}",
                    UNTIE,
                )
        return {**base, **changed}

    def _merge(
        self, peft: Any, base: Weights, tensors: Weights, model: nn.Module
    ) -> dict[str, Tensor]:
        # On the device meta first: sizes in the config that differ from the file take no memory.
        with torch.device("meta"):
            self._wrap(peft, model, lambda tensor: tensor.to("meta"), tensors)
        wrapped = self._wrap(peft, model, _widen, tensors, base)
        own = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        if missing := sorted(own.keys() - tensors.keys()):
            raise ValueError(f"the adapter lacks {missing[0]}")
        layers = dict(wrapped.eval().base_model.model.named_modules())
        examples = {
            name: example
            for name, layer in model.named_modules()
            if name in layers and type(layers[name]) is not type(layer)
            if (example := _example_for(layer)) is not None
        }
        with torch.no_grad():
            outputs = {name: layers[name](example) for name, example in examples.items()}
            merged = wrapped.merge_and_unload(safe_merge=True)
            for name, example in examples.items():
                _check_output(name, merged.get_submodule(name)(example), outputs[name])
        tensors = merged.state_dict()
        return {name: tensors[name].detach() for name in base}

    def _wrap(
        self,
        peft: Any,
        model: nn.Module,
        convert: Callable[[Tensor], Tensor],
        tensors: Weights,
        base: Weights | None = None,
    ) -> Any:
        """Wraps a copy of a model, with the weights of the base if given, in the adapter."""
        copy = copy_model(model, convert)
        if copy is None:
            raise ValueError("the model cannot be copied with copy.deepcopy")
        with torch.no_grad():
            for name, tensor in copy.state_dict().items():
                if base and isinstance(tensor, Tensor):
                    tensor.copy_(base[name])
        config = peft.get_peft_config({**self.config, "inference_mode": True})
        options = {"low_cpu_mem_usage": True}  # takes the tensors as they are
        wrapped = peft.PeftModel(copy, config, autocast_adapter_dtype=False, **options)
        converted = {name: convert(tensor) for name, tensor in tensors.items()}
        unknown = peft.set_peft_model_state_dict(wrapped, converted, **options).unexpected_keys
        if unknown:
            raise ValueError(f"the model has no place for {unknown[0]}")
        return wrapped


def _example_for(layer: nn.Module) -> Tensor | None:
    """Creates an input for a layer; None for layers of other kinds."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(layer, nn.Embedding):
        return torch.arange(layer.num_embeddings)
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        # Several overlapping positions of the kernel.
        sizes = [d * k + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        shape = [layer.in_channels, *sizes]
    elif isinstance(layer, nn.LayerNorm):
        shape = [*layer.normalized_shape]
    elif isinstance(layer, nn.Linear):
        shape = [layer.in_features]
    elif type(layer).__name__ == "Conv1D":  # a linear layer of GPT-2 in transformers
        weight = layer.weight
        assert isinstance(weight, Tensor)
        shape = [weight.shape[0]]
    else:
        return None
    return torch.randn(2, *shape, dtype=torch.float64, generator=generator)


def _check_output(name: str, merged: Tensor, adapted: Tensor) -> None:
    """Checks that a layer computes with its merged weights what it did with the adapter."""
    if not torch.allclose(merged, adapted, rtol=0, atol=1e-9 * float(adapted.abs().max())):
        raise ValueError(f"{name} computes something else when it is merged")


def _widen(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor.clone()
