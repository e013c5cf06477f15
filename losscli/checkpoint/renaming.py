"""Checkpoints with names other than the model's, which the model's own code translates.

Load hooks translate names of an older version of a module. Some models of transformers rename,
split or fuse tensors as they are loaded: the experts of a mixture, or names of years ago. Its own
loader knows how.
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

from losscli.checkpoint.hooks import LoadHooks
from losscli.checkpoint.names import OPTIMISER, StateDict
from losscli.checkpoint.state import Checkpoint, CheckpointFile, tied
from losscli.errors import CheckpointError, MismatchError, ModelError
from losscli.files import release_pages
from losscli.weight_space.digest import digest
from losscli.weight_space.vectors import Weights, kind, mismatches, pieces

__all__ = ["select_for"]

# So many state dicts of a file are translated.
_TRIED = 8


def select_for(
    file: CheckpointFile,
    model: nn.Module,
    base: Checkpoint | None = None,
    hooks: LoadHooks | None = None,
) -> Checkpoint:
    """Chooses the state dict that fits a model, or that it takes by ``load_state_dict``.

    For a model of transformers: or that its loader takes.

    Args:
        file: What was read.
        model: The model.
        base: What an adapter changes.
        hooks: The model's, from before anything was loaded; those that it has now by default.

    Returns:
        The checkpoint, its names those of the model.

    Raises:
        CheckpointError: The model takes several state dicts of the file.
        MismatchError: Nothing in the file fits, or it gives a tied tensor two values.
    """
    expected = _tensors(model.state_dict())
    hooks = hooks or LoadHooks(model)
    try:
        found = file.select(expected, base)
    except MismatchError:
        if file.adapter:
            raise
        translated = _translated(file, hooks, expected)
        if translated is None:
            translated = _transformed(file, model, expected)
        if translated is None:
            raise
        found = translated
    else:
        # An adapter changes a base that was loaded already.
        if not (file.adapter or file.live) and (hooks.are_own or found.extra):
            found = _loaded(file, found, hooks, expected)
    if differ := _torn(found.weights, expected):
        raise MismatchError(
            f"{file.name} gives {' and '.join(differ)} different values, and they are one tensor "
            "in the model",
            "Give a --model that does not tie them (tie_word_embeddings=false in config.json), or "
            "save the checkpoint without one of them",
        )
    return found


def _loaded(
    file: CheckpointFile, found: Checkpoint, hooks: LoadHooks, expected: Weights
) -> Checkpoint:
    """Lets the model's load hooks change tensors that have the model's names."""
    try:
        weights = hooks.load(StateDict(found.weights, found.versions, found.extra))
    except ModelError as error:
        raise MismatchError(f"{file.name} cannot be loaded into the model: {error.what}") from None
    if wrong := mismatches(weights, expected):
        raise MismatchError(f"{file.name} does not fit the model after its load hooks: {wrong[0]}")
    # Of an object its values are known, but not by which versions they were changed.
    known = file.digest and digest(weights)
    return replace(file.checkpoint(weights), digest=known)


def _translated(file: CheckpointFile, hooks: LoadHooks, expected: Weights) -> Checkpoint | None:
    """Lets the model's load hooks translate each state dict; at most one may then fit."""
    others = {k: v for k, v in file.candidates.items() if not OPTIMISER.fullmatch(k)}
    # An optimiser of another name may keep one for each tensor of the model.
    likeliest = sorted(others, key=lambda label: abs(len(others[label]) - len(expected)))
    found = {}
    for label in likeliest[:_TRIED]:
        weights = hooks.translate(file.fetch(others[label]))
        if weights is not None and not mismatches(weights, expected):
            found[label] = weights
    if len(found) > 1:
        raise file.ambiguous(list(found))
    return next((file.checkpoint(weights) for weights in found.values()), None)


def _transformed(file: CheckpointFile, model: nn.Module, expected: Weights) -> Checkpoint | None:
    """Lets transformers load a state dict into a model of its own."""
    library = sys.modules.get("transformers")
    if library is None or not isinstance(model, library.PreTrainedModel):
        return None
    try:
        stored = file.select(None)
    except CheckpointError:
        return None
    weights = _load(library, model, _of_kinds(stored.weights, expected))
    return None if mismatches(weights, expected) else replace(stored, weights=weights)


def _torn(weights: Weights, expected: Weights) -> tuple[str, str] | None:
    """Finds two names of one tensor of a model for which a file has different values."""
    for name, twins in tied(expected).items():
        for twin in twins:
            a, b = weights[name], weights[twin]
            if name < twin and a.data_ptr() != b.data_ptr() and not _alike(a, b):
                return name, twin
    return None


def _alike(a: Tensor, b: Tensor) -> bool:
    # A value that is not a number is equal to none, and here to its like.
    same = all(bool(((x == y) | (x.isnan() & y.isnan())).all()) for x, y in pieces(a, b))
    release_pages(a, b)
    return same


def _of_kinds(weights: Weights, expected: Weights) -> Weights:
    """Leaves out what the loader of transformers would cast: then it is missing there."""
    known = {(name.rpartition(".")[2], kind(tensor)) for name, tensor in expected.items()}

    def fits(name: str, tensor: Tensor) -> bool:
        if name in expected:
            return kind(tensor) == kind(expected[name])
        return tensor.is_floating_point() or (name.rpartition(".")[2], kind(tensor)) in known

    return {name: tensor for name, tensor in weights.items() if fits(name, tensor)}


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
