"""Select the state dict for a model, if necessary by the model's own loading code.

Load hooks convert state dicts of older versions of a module. Some models of transformers rename,
split or fuse tensors while they load, such as the experts of a mixture; the loader of transformers
does this.
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
from losscli.checkpoint.parts import join_parts, join_state_dicts
from losscli.checkpoint.rules import NameRules
from losscli.checkpoint.state import Checkpoint, CheckpointFile, tied_names
from losscli.errors import CheckpointError, MismatchError, ModelError
from losscli.weight_space.digest import digest
from losscli.weight_space.vectors import Weights, mismatches, number_kind, pieces

__all__ = ["dtype_argument", "is_pretrained", "select_for", "silent"]

# Maximum number of state dicts that are passed to the load hooks.
_MAX_TRIED = 8


def select_for(
    file: CheckpointFile,
    model: nn.Module,
    base: Checkpoint | None = None,
    hooks: LoadHooks | None = None,
    rules: NameRules | None = None,
) -> Checkpoint:
    """Selects the state dict that fits a model or that the model can load.

    A model can load what ``load_state_dict`` accepts and, for transformers, what
    ``from_pretrained`` accepts.

    Args:
        file: The checkpoint file.
        model: The model.
        base: The checkpoint that an adapter changes.
        hooks: The load hooks of the model before anything was loaded; by default those that it
            has now.
        rules: What the checkpoint may have too much, too little or under another name.

    Returns:
        The checkpoint with the model's names.

    Raises:
        CheckpointError: The model can load several state dicts of the file.
        MismatchError: No state dict fits, or aliases of a tied tensor have different values.
    """
    expected = _tensors(model.state_dict())
    hooks, rules = hooks or LoadHooks(model), rules or NameRules()
    if not file.adapter:
        file = rules.rename(join_parts(file, expected) if file.parts else file)
    try:
        found = file.select(expected, base, model=model)
    except MismatchError:
        if file.adapter:
            raise
        translated = _translate_with_hooks(file, hooks, expected)
        if translated is None:
            translated = _load_with_transformers(file, model, expected)
        if translated is None and (joined := join_state_dicts(file, expected)):
            return select_for(joined, model, hooks=hooks, rules=replace(rules, renames={}))
        if translated is None:
            translated = _load_leniently(file, hooks, expected, rules)
        if translated is None:
            raise
        found = translated
    else:
        # The base of an adapter was loaded before.
        if not (file.adapter or file.live) and (hooks.are_custom or found.extra):
            found = _apply_hooks(file, found, hooks, expected)
    if conflicting := _conflicting_aliases(found.weights, expected):
        raise MismatchError(
            f"{file.name} gives {' and '.join(conflicting)} different values, and they are one "
            "tensor in the model",
            "Give a --model that does not tie them (tie_word_embeddings=false in config.json), or "
            "save the checkpoint without one of them",
        )
    return found


def _apply_hooks(
    file: CheckpointFile, found: Checkpoint, hooks: LoadHooks, expected: Weights
) -> Checkpoint:
    """Applies the model's load hooks to a checkpoint that fits."""
    try:
        weights = hooks.load(StateDict(found.weights, found.versions, found.extra))
    except ModelError as error:
        raise MismatchError(f"{file.name} cannot be loaded into the model: {error.what}") from None
    if wrong := mismatches(weights, expected):
        raise MismatchError(f"{file.name} does not fit the model after its load hooks: {wrong[0]}")
    # The digest of an object must include what the hooks changed.
    known = file.digest and digest(weights)
    return replace(file.checkpoint(weights), digest=known)


def _translate_with_hooks(
    file: CheckpointFile, hooks: LoadHooks, expected: Weights
) -> Checkpoint | None:
    """Applies the load hooks to each state dict, and returns the one that then fits, if any."""
    others = {k: v for k, v in file.candidates.items() if not OPTIMISER.fullmatch(k)}
    # Optimiser state under an unknown key may have several tensors per weight.
    likeliest = sorted(others, key=lambda label: abs(len(others[label]) - len(expected)))
    found = {}
    for label in likeliest[:_MAX_TRIED]:
        weights = hooks.translate(file.fetch(others[label]))
        if weights is not None and not mismatches(weights, expected):
            found[label] = weights
    if len(found) > 1:
        raise file.ambiguous(list(found))
    return next((file.checkpoint(weights) for weights in found.values()), None)


def _load_leniently(
    file: CheckpointFile, hooks: LoadHooks, expected: Weights, rules: NameRules
) -> Checkpoint | None:
    """Loads a state dict with the missing and unexpected tensors that the rules allow."""
    if not rules.are_lenient:
        return None
    try:
        found = file.select(
            expected, optional=rules.initial, ignore_unexpected=rules.ignore_unexpected
        )
    except MismatchError:
        # The names may be those of an older version, which hooks change.
        return _load_leniently_with_hooks(file, hooks, expected, rules)
    weights, missing = rules.complete(found.weights)
    found = replace(found, weights=weights, missing=missing)
    if missing and (loaded := _load_leniently_with_hooks(file, hooks, expected, rules)):
        found = min(found, loaded, key=lambda checkpoint: len(checkpoint.missing))
    if hooks.are_custom or found.extra:
        applied = _apply_hooks(file, found, hooks, expected)
        return replace(applied, missing=found.missing, unexpected=found.unexpected)
    return found


def _load_leniently_with_hooks(
    file: CheckpointFile, hooks: LoadHooks, expected: Weights, rules: NameRules
) -> Checkpoint | None:
    """Loads the only state dict with ``load_state_dict(strict=False)``, if the rules allow it."""
    try:
        stored = file.select(None)
    except CheckpointError:
        return None
    for weights, missing, unexpected in hooks.translate_leniently(stored.weights):
        allowed = rules.ignore_unexpected or not unexpected
        if allowed and rules.initial.keys() >= set(missing) and not mismatches(weights, expected):
            return replace(file.checkpoint(weights), missing=missing, unexpected=unexpected)
    return None


def _load_with_transformers(
    file: CheckpointFile, model: nn.Module, expected: Weights
) -> Checkpoint | None:
    """Loads the only state dict with ``from_pretrained``, if the model is of transformers."""
    if not is_pretrained(model):
        return None
    try:
        stored = file.select(None)
    except CheckpointError:
        return None
    library = sys.modules["transformers"]
    weights = _from_pretrained(library, model, _without_casts(stored.weights, expected))
    return None if mismatches(weights, expected) else replace(stored, weights=weights)


def is_pretrained(model: object) -> bool:
    """Returns whether a model is one of transformers."""
    # Then this part of transformers is there. Else it is not imported, which takes a second.
    models = sys.modules.get("transformers.modeling_utils")
    return models is not None and isinstance(model, models.PreTrainedModel)


def _conflicting_aliases(weights: Weights, expected: Weights) -> tuple[str, str] | None:
    """Returns two aliases of a tied tensor that have different values, if any."""
    for name, aliases in tied_names(expected).items():
        for alias in aliases:
            a, b = weights[name], weights[alias]
            if name < alias and a.data_ptr() != b.data_ptr() and not _equal_or_nan(a, b):
                return name, alias
    return None


def _equal_or_nan(a: Tensor, b: Tensor) -> bool:
    # NaN equals NaN here.
    return all(bool(((x == y) | (x.isnan() & y.isnan())).all()) for x, y in pieces(a, b))


def _without_casts(weights: Weights, expected: Weights) -> Weights:
    """Drops tensors that transformers would cast to another kind, so that it reports them."""
    known = {(name.rpartition(".")[2], number_kind(tensor)) for name, tensor in expected.items()}

    def fits(name: str, tensor: Tensor) -> bool:
        if name in expected:
            return number_kind(tensor) == number_kind(expected[name])
        return tensor.is_floating_point() or (name.rpartition(".")[2], number_kind(tensor)) in known

    return {name: tensor for name, tensor in weights.items() if fits(name, tensor)}


def dtype_argument(library: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Returns the keyword argument that gives a model its dtype in this version of transformers."""
    # A config that a newer version wrote has the attribute in an older one, too; a new one has not.
    return {"dtype" if hasattr(library.PretrainedConfig(), "dtype") else "torch_dtype": dtype}


def _from_pretrained(library: Any, model: nn.Module, weights: Weights) -> Weights:
    """Loads tensors with transformers; returns {} if any is missing, unexpected or mismatched."""
    types = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    dtype = next(iter(types), torch.float32)
    if len(types) > 1:
        # The promoted type represents each value exactly.
        dtype = functools.reduce(torch.promote_types, types, torch.bfloat16)
    with silent(library):
        try:
            loaded, loading_info = type(model).from_pretrained(  # type: ignore[attr-defined]
                None,
                config=copy.deepcopy(model.config),
                state_dict=dict(weights),
                output_loading_info=True,
                **dtype_argument(library, dtype),
            )
        except Exception:  # noqa: BLE001 - what it cannot load does not fit
            return {}
    if any(loading_info.values()):
        return {}
    return _tensors(loaded.state_dict())


def _tensors(state: dict[str, Any]) -> Weights:
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


@contextmanager
def silent(library: Any) -> Iterator[None]:
    """Silences the logging and the progress bars of transformers, then restores them."""
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
