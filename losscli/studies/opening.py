"""Opens checkpoints under the names of one of them, without a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from losscli.checkpoint import Checkpoint, CheckpointFile
from losscli.errors import MismatchError
from losscli.weight_space.vectors import Weights, mismatches

__all__ = ["differing_versions", "open_pair"]

# The num_batches_tracked of a layer for which A has none.
_NO_BATCHES = torch.tensor(0)


def open_pair(
    file: CheckpointFile, first: Checkpoint, base: Checkpoint | None
) -> tuple[Checkpoint, Checkpoint]:
    """Opens B under the names of A; num_batches_tracked of only one of them is kept in both."""
    refused: MismatchError | None = None
    for names in _alternative_names(first.weights):
        expected = {name: first.weights.get(own, _NO_BATCHES) for name, own in names.items()}
        try:
            second = _select_matching(file, expected, base, first.name)
            break
        except MismatchError as error:
            refused = refused or error
    else:
        assert refused is not None
        cure = (
            "Without a model, names are not translated: load B into a model with load_state_dict, "
            "and save that model's state_dict()"
        )
        raise MismatchError(refused.what, refused.cure or cure)
    weights = {names[name]: t for name, t in second.weights.items()}
    second = replace(second, weights={**first.weights, **weights})
    only_second = {name: t for name, t in weights.items() if name not in first.weights}
    first = replace(first, weights={**first.weights, **only_second})
    if differ := differing_versions(first, second):
        raise MismatchError(
            differ[0],
            "Without a model, they are not converted: load each into a model with "
            "load_state_dict, and save that model's state_dict()",
        )
    return first, second


def _select_matching(
    file: CheckpointFile, expected: Weights, base: Checkpoint | None, first_name: str
) -> Checkpoint:
    """Opens a checkpoint that must have the expected tensors; an adapter adds those of its base."""
    found = file.select(expected, base, first_name)
    if wrong := mismatches(found.weights, expected):
        raise MismatchError(f"{found.name} does not fit {first_name}: {'; '.join(wrong)}")
    return found


def _alternative_names(weights: Weights) -> Iterator[dict[str, str]]:
    """Yields the names that a file may have for the tensors of a state dict, as PyTorch accepts.

    Yields:
        From those names to the state dict's own: the same names; those without, and those with
        ``num_batches_tracked``; those of the other ``weight_norm``.
    """
    own = {name: name for name in weights}
    yield own
    counts = {
        f"{name.removesuffix('running_mean')}num_batches_tracked"
        for name in own
        if name.rpartition(".")[2] == "running_mean"
    }
    if counts:
        yield {name: name for name in own if name not in counts}
        yield own | {name: name for name in sorted(counts)}
    normed = {_other_weight_norm(name): name for name in own}
    if normed.keys() != own.keys() and len(normed) == len(own):
        yield normed


def _other_weight_norm(name: str) -> str:
    """The name that the other ``weight_norm`` gives a tensor: weight_g is original0."""
    if new := re.fullmatch(r"(.*\.)?parametrizations\.(\w+)\.original([01])", name):
        return f"{new[1] or ''}{new[2]}_{'gv'[int(new[3])]}"
    if old := re.fullmatch(r"(.*\.)?(\w+)_([gv])", name):
        return f"{old[1] or ''}parametrizations.{old[2]}.original{'gv'.index(old[3])}"
    return name


def differing_versions(first: Checkpoint, second: Checkpoint) -> list[str]:
    """Lists modules of different versions, between which the meaning of tensors may differ."""
    return [
        f"{first.name} and {second.name} have different versions of {module or 'the model'}: "
        f"{dict(version)} and {dict(other)}"
        for module, version in first.versions.items()
        if (other := second.versions.get(module, version)) != version
        and not _counts_batches(first.weights, module, (version, other))
    ]


def _counts_batches(weights: Weights, module: str, versions: Iterable[Mapping[str, Any]]) -> bool:
    """Whether versions are those of a BatchNorm without and with num_batches_tracked."""
    start = f"{module}." if module else ""
    return f"{start}running_mean" in weights and all(
        dict(version) in ({"version": 1}, {"version": 2}) for version in versions
    )
