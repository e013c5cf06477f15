"""A model with weights that can be loaded as ``load_state_dict`` does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from losscli.checkpoint import Versions, has_custom_loading, loadable
from losscli.data import placing
from losscli.evaluation.spectral import SpectralLayer, normalise, spectral_layers
from losscli.weight_space.vectors import Weights, can_move

__all__ = ["LoadableModel", "named_tensors"]

# Modules with `train` and `eval` that change no weights; in transformers they may swap kernels.
_PLAIN_MODES = ("torch.nn.modules.module", "transformers.modeling_utils")


class LoadableModel:
    """A model in eval mode, on a device and in a floating-point type.

    Args:
        model: The model, which this object owns: its weights are overwritten.
        device: Where to compute.
        dtype: The type of the forward pass.

    Attributes:
        tensors: The model's parameters and buffers by the names of its state dict.
        spectral: Its spectrally normalised weights; their singular vectors are recomputed from the
            loaded weights.
        versions: The versions of the model's modules, and of the weights of every point.
        extra: The extra state of modules that is not a tensor, the same at every point.
    """

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        with placing("the weights of the model", device):
            self.model = _cast(model, device, dtype).eval()
        self.device = device
        self.dtype = dtype
        self.tensors: Mapping[str, Tensor] = named_tensors(self.model)
        self.versions: Versions = getattr(self.model.state_dict(), "_metadata", {})
        self.extra: Mapping[str, Any] = {}
        self.spectral: Sequence[SpectralLayer] = spectral_layers(self.model, self.tensors)
        self._has_custom_loading = has_custom_loading(self.model)
        self._normalises = True

    @contextmanager
    def as_stored(self) -> Iterator[None]:
        """Loads the singular vectors of spectral normalisation without recomputing them."""
        self._normalises = False
        try:
            yield
        finally:
            self._normalises = True

    @torch.no_grad()
    def load(self, weights: Weights) -> None:
        """Loads tensors and recomputes spectral normalisation; other tensors stay as they are."""
        if self.folds:
            self.model.train()
        point = self._whole(weights) if self._has_custom_loading else {}
        # User code may modify the tensors that it receives.
        given = {name: tensor.clone() for name, tensor in point.items()} or weights
        state = loadable(given, self.versions, self.extra)
        self.model.load_state_dict(state, strict=False)
        # Custom loading already converted the checkpoints when they were read, and must not convert
        # a point again.
        for name, tensor in point.items():
            self.tensors[name].copy_(tensor)
        if self._normalises:
            normalise(self.spectral, self.tensors)
        if self.folds:
            self.model.eval()

    def _whole(self, weights: Weights) -> Weights:
        """Returns all tensors of the model, with the given ones in place of its own."""
        given = {id(own): weights[n] for n, own in self.tensors.items() if n in weights}
        own = {name: given.get(id(tensor), tensor) for name, tensor in self.tensors.items()}
        return {name: tensor.detach().clone() for name, tensor in own.items()}

    @property
    def folds(self) -> bool:
        """Whether the model may fold weights into others in eval mode."""
        return any(
            type(module).train.__module__ not in _PLAIN_MODES for module in self.model.modules()
        )


def _cast(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Casts a model and moves it to a device; complex tensors stay complex."""
    # In this order, as MPS has no float64.
    if not any(tensor.is_complex() for tensor in (*model.parameters(), *model.buffers())):
        return model.to(dtype).to(device)

    # nn.Module.to would drop the imaginary parts.
    for tensor in (*model.parameters(), *model.buffers()):
        if can_move(tensor):
            tensor.data = tensor.data.to(dtype.to_complex() if tensor.is_complex() else dtype)
    return model.to(device)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns a model's parameters and buffers themselves, by the names of its state dict."""
    return {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor)
    }
