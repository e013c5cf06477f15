"""Checkpoints whose names are not those of the model that transformers makes of them.

Some models of transformers rename, split or fuse tensors as they are loaded: the experts of a
mixture, or names of years ago. Its own loader knows how.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from losscli.checkpoint.state import Checkpoint, CheckpointFile
from losscli.errors import CheckpointError, MismatchError
from losscli.weights import Weights, mismatches

__all__ = ["select_for"]


def select_for(
    file: CheckpointFile, model: nn.Module, base: Checkpoint | None = None
) -> Checkpoint:
    """Chooses the state dict that fits a model; for a model of transformers, as its loader does.

    Args:
        file: What was read.
        model: The model.
        base: What an adapter changes.

    Returns:
        The checkpoint, its names those of the model.

    Raises:
        MismatchError: Nothing in the file fits.
    """
    expected = model.state_dict()
    try:
        return file.select(expected, base)
    except MismatchError:
        library = sys.modules.get("transformers")
        if library is None or file.adapter or not isinstance(model, library.PreTrainedModel):
            raise
        try:
            stored = file.select(None)
        except CheckpointError:
            stored = None
        weights = _load(library, model, stored.weights) if stored else {}
        if stored is None or mismatches(weights, _tensors(expected)):
            raise
    return replace(stored, weights=weights)


def _load(library: Any, model: nn.Module, weights: Weights) -> Weights:
    """Loads tensors as transformers does; nothing where any is missing or left over."""
    types = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    with _silent(library):
        try:
            loaded, told = type(model).from_pretrained(  # type: ignore[attr-defined]
                None,
                config=copy.deepcopy(model.config),
                state_dict=dict(weights),
                # One type for all: the widest, in which each keeps its value.
                dtype=functools.reduce(torch.promote_types, types, torch.bfloat16)
                if len(types) > 1
                else next(iter(types), torch.float32),
                output_loading_info=True,
            )
        except Exception:  # noqa: BLE001 - what it cannot load does not fit
            return {}
    if any(told.values()):
        return {}
    return _tensors(loaded.state_dict())


def _tensors(state: dict[str, Any]) -> Weights:
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


@contextmanager
def _silent(library: Any) -> Iterator[None]:
    """Keeps transformers from telling what it loads, and leaves its settings as they were."""
    logging = library.utils.logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
