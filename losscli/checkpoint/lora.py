"""Plain LoRA: low-rank updates of the weights of another checkpoint.

Hu et al. 2021, arXiv 2106.09685: W becomes W + (α / r) B A. With rank stabilisation (Kalajdzievski
2023, arXiv 2312.03732) the factor is α / √r.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from losscli.errors import CheckpointError, MismatchError
from losscli.weight_space.vectors import Weights, working_type

__all__ = ["MERGE_FIRST", "SAVE_AGAIN", "UNTIE", "LoraAdapter", "base_name"]

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.(weight|bias))?")


@dataclass(frozen=True)
class LoraAdapter:
    """The configuration of a LoRA adapter.

    Attributes:
        where: The path of the config file.
        base: The name of the base model in the config, if any.
        rank: The default of r.
        alpha: The default of α.
        ranks: r by regular expressions for module names.
        alphas: α by regular expressions for module names.
        stabilised: Whether the factor is α / √r.
        transposed: Whether weights are stored as [in, out], as in GPT-2.
        trains_biases: Whether the biases of the changed layers were trained too.
    """

    where: Path
    base: str | None
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    stabilised: bool
    transposed: bool
    trains_biases: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: Path) -> LoraAdapter:
        """Returns the adapter that the content of a config file describes.

        Raises:
            CheckpointError: A value is invalid.
        """
        ranks, alphas = config.get("rank_pattern"), config.get("alpha_pattern")
        rank, alpha = config.get("r"), config.get("lora_alpha")
        ranks, alphas = ranks or {}, alphas or {}
        if not isinstance(ranks, dict) or not isinstance(alphas, dict):
            raise CheckpointError(f"{where}: its patterns are not JSON objects", SAVE_AGAIN)
        for key, value in (("r", rank), *ranks.items()):
            if type(value) is not int or value < 1:
                raise CheckpointError(
                    f"{where}: {key} is {value!r}, which is not a rank", SAVE_AGAIN
                )
        for key, value in (("lora_alpha", alpha), *alphas.items()):
            if type(value) not in {int, float} or not abs(value) < 1e30:
                raise CheckpointError(
                    f"{where}: {key} is {value!r}, which is not a factor", SAVE_AGAIN
                )
        for pattern in (*ranks, *alphas):
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError):
                raise CheckpointError(
                    f"{where}: {pattern!r} is not a regular expression", SAVE_AGAIN
                ) from None
        return cls(
            where,
            base_name(config),
            int(rank or 0),
            float(alpha or 0),
            ranks,
            alphas,
            bool(config.get("use_rslora")),
            bool(config.get("fan_in_fan_out")),
            config.get("bias") == "lora_only",
        )

    def merge(
        self,
        base: Weights,
        tensors: Weights,
        aliases: Mapping[str, list[str]],
        _model: nn.Module | None = None,
    ) -> dict[str, Tensor]:
        """Returns the tensors of a model with the adapter merged into them.

        Those that the adapter changes are new, in float32 or wider; the others are the base's.

        Args:
            base: The tensors of the model.
            tensors: The tensors of the adapter under peft's names.
            aliases: For each tied name of the model, the other names of its tensor.
            _model: The model, which LoRA does not need.

        Raises:
            MismatchError: The adapter changes a tensor that the base lacks or has in another shape.
            CheckpointError: The adapter has a tensor that is not plain LoRA.
        """
        factors, replaced = _sort_tensors(tensors, self.where)
        changed: dict[str, Tensor] = {}
        for name, tensor in replaced.items():
            if name not in base or base[name].shape != tensor.shape:
                raise self._mismatch(name, tensor.shape, base)
            changed[name] = tensor
        for module, pair in factors.items():
            name, bias = f"{module}.weight", f"{module}.bias"
            if self.trains_biases and bias in base and bias not in replaced:
                raise CheckpointError(
                    f"{self.where}: biases were trained, and the adapter has no {bias}: older "
                    "versions of peft do not save them",
                    f"{SAVE_AGAIN} of peft 0.21 or newer",
                )
            if name not in base and f"{module}.in_proj_weight" in base:
                # peft 0.21 applies the update of the output projection twice, in training too.
                raise CheckpointError(
                    f"{self.where}: LoRA of nn.MultiheadAttention, here {module}, is not supported",
                    MERGE_FIRST,
                )
            if "A" not in pair or "B" not in pair:
                raise CheckpointError(
                    f"{self.where}: {module} has only one of its two factors", SAVE_AGAIN
                )
            scale = self._scale(module, pair["A"])
            product = self._product(name, pair, base, tensors)
            before = changed.get(name, base[name])
            dtype = working_type(before, pair["A"], pair["B"])
            changed[name] = (before.double() + product * scale).to(dtype)
            if "bias" in pair:
                if bias not in base or base[bias].shape != pair["bias"].shape:
                    raise self._mismatch(bias, pair["bias"].shape, base)
                old = changed.get(bias, base[bias])
                dtype = working_type(old, pair["bias"])
                changed[bias] = (old.double() + pair["bias"].double() * scale).to(dtype)
        for name in list(changed):
            for alias in aliases.get(name, []):
                self._tie(name, alias, base, changed)
        return {**base, **changed}

    def _tie(self, name: str, alias: str, base: Weights, changed: dict[str, Tensor]) -> None:
        """Checks that an adapter changes all aliases of a tied tensor equally.

        If it changes only one, the trained model had two tensors. If peft kept them tied
        (ensure_weight_tying), the adapter has both names.
        """
        new, other = changed[name], changed.get(alias, base[alias])
        # The product for an embedding is transposed, so that the last bit may differ.
        rounding = 4 * torch.finfo(working_type(new, other)).eps
        difference = (new.double() - other.double()).abs().max()
        if new is other or difference <= rounding * new.double().abs().max():
            changed[alias] = new
            return
        how = "changes them in two ways" if alias in changed else f"changes only {name}"
        raise CheckpointError(
            f"{self.where}: {name} and {alias} are one tensor in the model, and the adapter {how}",
            UNTIE,
        )

    def _scale(self, module: str, a: Tensor) -> float:
        rank = self.ranks.get(_matching_pattern(self.ranks, module), self.rank)
        alpha = self.alphas.get(_matching_pattern(self.alphas, module), self.alpha)
        if a.shape[0] != rank:
            raise CheckpointError(
                f"{self.where} says that the rank of {module} is {rank}, and its tensors are of "
                f"rank {a.shape[0]}",
                "The config and the tensors may belong to different adapters",
            )
        return alpha / (math.sqrt(rank) if self.stabilised else rank)

    def _product(
        self,
        name: str,
        pair: Mapping[str, Tensor],
        base: Weights,
        tensors: Weights,
    ) -> Tensor:
        """Computes B A in float64, in the layout of the base weight."""
        a, b = pair["A"], pair["B"]
        if b.shape[1] != a.shape[0]:
            raise self._mismatch(name, torch.Size([b.shape[0], *a.shape[1:]]), base)
        product = torch.einsum("or,r...->o...", b.double().flatten(1), a.double())
        if name not in base:
            raise self._mismatch(name, product.shape, base)
        shape = base[name].shape
        if "embedding" in pair:
            product = product.T
        elif product.ndim == 2 and shape[:1] == shape[1:]:
            # peft stores one flag, that of the last module, even if modules differ.
            if _contradicts_layout(base, tensors, transposed=self.transposed):
                raise CheckpointError(
                    f"{self.where}: fan_in_fan_out is {str(self.transposed).lower()}, which does "
                    f"not hold for all its modules, and {name} is square: its layout is unknown",
                    MERGE_FIRST,
                )
            product = product.T if self.transposed else product
        elif product.ndim == 2 and product.T.shape == shape:
            product = product.T
        if product.shape != shape:
            raise self._mismatch(name, product.shape, base)
        return product

    def _mismatch(self, name: str, shape: torch.Size, base: Weights) -> MismatchError:
        same_shape = [n for n, t in base.items() if t.shape == shape]
        if name not in base and name.endswith("lm_head.weight") and len(same_shape) == 1:
            return MismatchError(
                f"the adapter {self.where.parent} changes {name}, and its base has only "
                f"{same_shape[0]}, to which the model ties it",
                UNTIE,
            )
        have = f"has it as {list(base[name].shape)}" if name in base else "has no such tensor"
        return MismatchError(
            f"the adapter {self.where.parent} changes {name} {list(shape)}, and its base {have}",
            "Name the checkpoint that it was trained on before it",
        )


MERGE_FIRST = "Merge it with peft (merge_and_unload) and save the whole model"
UNTIE = (
    "Save the base untied (tie_word_embeddings=false, both tensors in its file), merge the adapter "
    "into that with peft (merge_and_unload), and name these two"
)
SAVE_AGAIN = "Save the adapter again with save_pretrained"


def _matching_pattern(patterns: Mapping[str, Any], module: str) -> str:
    """Returns the first pattern that matches the end of a module name, as peft does."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", module)), "")


def _sort_tensors(tensors: Weights, where: Path) -> tuple[dict[str, dict[str, Tensor]], Weights]:
    """Splits the tensors of an adapter into LoRA factors by module, and full tensors by name."""
    factors: dict[str, dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    trained: dict[str, Tensor] = {}
    for full, tensor in tensors.items():
        # peft wraps the layers that it changes and adds base_layer to their names.
        name = full.removeprefix(_PREFIX).replace(".base_layer.", ".")
        if match := _FACTOR.fullmatch(name):
            module, embedding, letter, kind = match.groups()
            pair = factors.setdefault(module, {})
            if kind == "bias" and letter == "B":
                pair["bias"] = tensor
            elif tensor.ndim < 2 or kind == "bias":
                raise CheckpointError(
                    f"{where.parent}: {full} {list(tensor.shape)} is not a factor", SAVE_AGAIN
                )
            else:
                pair[letter] = tensor
                if embedding:
                    pair["embedding"] = tensor
        elif ".original_module." in name:
            continue  # the original that modules_to_save replaces
        elif ".modules_to_save." in name:
            trained[name.replace(".modules_to_save.", ".")] = tensor
        elif "lora_" in name or "token_adapter" in name:
            raise CheckpointError(
                f"{where.parent}: {full} is not a tensor of plain LoRA", MERGE_FIRST
            )
        else:
            replaced[name] = tensor
    return factors, {**replaced, **trained}


def _contradicts_layout(base: Weights, tensors: Weights, *, transposed: bool) -> bool:
    """Whether the shape of any non-square weight contradicts ``fan_in_fan_out``."""
    factors, _ = _sort_tensors(tensors, Path())
    for module, pair in factors.items():
        weight = base.get(f"{module}.weight")
        if weight is None or weight.ndim != 2 or "embedding" in pair or len(pair) < 2:
            continue
        shape = pair["B"].shape[0], pair["A"].shape[1]
        if shape[0] != shape[1] and (tuple(weight.shape) == shape) == transposed:
            return True
    return False


def base_name(config: Mapping[str, Any]) -> str | None:
    """Returns the name of the base model in a config, if there is one."""
    base = config.get("base_model_name_or_path")
    return base if isinstance(base, str) and base else None
