"""Spectral normalisation: recomputes the singular vectors of a weight whenever it changes.

A spectrally normalised layer stores the first singular vectors u and v of its weight W as buffers
and divides W by σ = uᵀWv (Miyato et al. 2018, arXiv 1802.05957). They are functions of the weight:
interpolated vectors are not the singular vectors of the interpolated weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from losscli.weight_space.vectors import Weights

__all__ = ["SpectralLayer", "normalise", "normalise_stored", "spectral_layers"]


@dataclass(frozen=True)
class SpectralLayer:
    """A spectrally normalised weight of a model.

    Attributes:
        u: The name of the left singular vector.
        v: The name of the right one.
        sources: The names of the tensors that the weight is computed from.
        matrix: Returns the weight in the model, reshaped to the matrix that is normalised.
    """

    u: str
    v: str
    sources: tuple[str, ...]
    matrix: Callable[[], Tensor]

    @property
    def names(self) -> tuple[str, str]:
        """The names of both vectors."""
        return self.u, self.v


def spectral_layers(model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[SpectralLayer, ...]:
    """Finds the spectrally normalised weights of a model.

    Returns:
        The weights, by ``torch.nn.utils.spectral_norm`` and by
        ``torch.nn.utils.parametrizations.spectral_norm``, in the model's order.
    """
    names = {id(tensor): name for name, tensor in tensors.items()}
    layers = []

    def add(u: Tensor, v: Tensor, sources: Sequence[Tensor], matrix: Callable[[], Tensor]) -> None:
        if id(u) in names and id(v) in names:
            source_names = tuple(names[id(t)] for t in sources if id(t) in names)
            layers.append(SpectralLayer(names[id(u)], names[id(v)], source_names, matrix))

    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                weight, u, v = (getattr(module, f"{hook.name}_{k}") for k in ("orig", "u", "v"))
                add(u, v, [weight], _Hooked(hook, weight))
        if not isinstance(module, parametrize.ParametrizationList):
            continue
        for place, part in enumerate(module):
            if isinstance(part, _SpectralNorm) and hasattr(part, "_u"):
                own = {id(part._u), id(part._v)}
                sources = [*module.parameters(), *module.buffers()]
                sources = [tensor for tensor in sources if id(tensor) not in own]
                add(part._u, part._v, sources, _Parametrized(module, place))
    return tuple(layers)


@dataclass(frozen=True)
class _Hooked:
    """Returns the weight matrix of ``torch.nn.utils.spectral_norm``."""

    hook: SpectralNorm
    weight: Tensor

    def __call__(self) -> Tensor:
        return self.hook.reshape_weight_to_matrix(self.weight)


@dataclass(frozen=True)
class _Parametrized:
    """Returns the input of a spectral norm among the parametrizations of a tensor."""

    parametrizations: Any
    place: int

    def __call__(self) -> Tensor:
        parts = self.parametrizations
        originals = (
            [parts.original]
            if parts.is_tensor
            else [getattr(parts, f"original{k}") for k in range(parts.ntensors)]
        )
        for k in range(self.place):
            originals = [parts[k](*originals)]
        matrix: Tensor = parts[self.place]._reshape_weight_to_matrix(*originals)
        return matrix


@torch.no_grad()
def normalise(layers: Sequence[SpectralLayer], tensors: Mapping[str, Tensor]) -> None:
    """Recomputes the singular vectors in a model from its present weights."""
    for layer in layers:
        for name, vector in zip(layer.names, _singular_vectors(layer.matrix()), strict=True):
            tensors[name].copy_(vector)


def normalise_stored(weights: Weights) -> dict[str, Tensor]:
    """Computes the singular vectors of the spectrally normalised weights in a state dict.

    Without a model the layers are recognised by the names that PyTorch gives their tensors, and the
    first dimension of the matrix by the lengths of the vectors.

    Returns:
        The vectors by name, in the types of the state dict.
    """
    computed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name.endswith("_orig"):
            stem = name.removesuffix("orig")
        elif name.endswith(".original") and ".parametrizations." in f".{name}":
            stem = f"{name.removesuffix('original')}0._"
        else:
            continue
        names = f"{stem}u", f"{stem}v"
        if not all(n in weights for n in names) or weight.ndim < 2:
            continue
        u, v = (weights[n] for n in names)
        matrices = [
            weight.movedim(dim, 0).flatten(1)
            for dim, size in enumerate(weight.shape)
            if size == len(u) and weight.numel() == len(u) * len(v)
        ]
        if matrices:
            # Of several dimensions of this length, the one with the largest uᵀWv.
            matrix = max(
                matrices, key=lambda m: abs(complex(u.to(m.dtype).conj() @ m @ v.to(m.dtype)))
            )
            vectors = _singular_vectors(matrix)
            computed |= {n: x.to(weights[n].dtype) for n, x in zip(names, vectors, strict=True)}
    return computed


def _singular_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The first singular vectors of a matrix, in float64; nan if it is not finite."""
    # MPS has no float64.
    device = "cpu" if matrix.device.type == "mps" else matrix.device
    wide = matrix.to(device, torch.promote_types(matrix.dtype, torch.float64))
    rows, columns = wide.shape
    if not wide.isfinite().all():
        return wide.new_full((rows,), torch.nan), wide.new_full((columns,), torch.nan)
    # Not by power iteration, which depends on its start if σ₁ ≈ σ₂. The largest eigenvalue σ² of
    # the smaller Gram matrix is exact to rounding, and so is σ.
    tall = rows > columns
    gram = wide.mH @ wide if tall else wide @ wide.mH
    first = torch.linalg.eigh(gram).eigenvectors[:, -1]
    other = F.normalize(
        (wide if tall else wide.mH) @ first, dim=0, eps=torch.finfo(wide.dtype).tiny
    )
    return (other, first) if tall else (first, other)
