"""Names of tensors: where in a state dict a model's own lie, under which prefixes and marks."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from losscli.weight_space.vectors import Weights, mismatches

__all__ = [
    "OPTIMISER",
    "Part",
    "metadata_of",
    "natural",
    "parts",
    "state_dicts",
    "under",
    "unmarked",
]

OPTIMISER = re.compile(r"(.*\.)?state\.\d+|optim(i[sz]ers?)?(_states?(_dict)?)?(\..*)?", re.DOTALL)
"""State dicts of torch's optimisers number their parameters; others go by the key's name."""

# What wrappers put into names, at their beginning or around a part of a model: DataParallel and
# DDP, torch.compile, FSDP, activation checkpointing.
_MARKS = frozenset({
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
})


@dataclass(frozen=True)
class Part:
    """A state dict, or those of its names that lie under a prefix.

    Attributes:
        prefix: The prefix; empty where it is the whole, under a prefix of all its names or none.
        weights: The tensors under the names that the model would have for them.
        holds: Whether all of the model's tensors are among them.
        fits: Whether they are the model's tensors and no more.
    """

    prefix: str
    weights: Weights
    holds: bool
    fits: bool


def natural(name: str) -> list[tuple[int, int | str]]:
    """Orders names with numbers in them by their values, 2 before 10.

    Args:
        name: A name.

    Returns:
        The key to sort by.
    """
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part)) if i % 2 else (1, part) for i, part in enumerate(parts)]


def state_dicts(
    content: Any, label: str = "", depth: int = 0
) -> Iterator[tuple[str, OrderedDict[str, Tensor]]]:
    """Finds the mappings in a file that hold tensors under names.

    Args:
        content: What the file holds.
        label: The dotted keys that lead to it.
        depth: How many they are.

    Yields:
        The dotted keys of each and its tensors, outermost first; with the versions of modules
        that `torch.nn.Module.state_dict` notes, where the file has them.
    """
    if not isinstance(content, Mapping) or depth > 4:
        return
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if tensors:
        found = OrderedDict((k, _plain(v)) for k, v in tensors.items())
        if isinstance(versions := getattr(content, "_metadata", None), Mapping):
            found._metadata = versions  # type: ignore[attr-defined]
        yield label, found
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from state_dicts(value, f"{label}.{key}" if label else str(key), depth + 1)


def metadata_of(content: Any) -> dict[str, str]:
    """Reads the plain values beside tensors.

    Args:
        content: What a file holds.

    Returns:
        The values by their keys.
    """
    plain = content.items() if isinstance(content, Mapping) else ()
    return {
        str(key): str(value) for key, value in plain if isinstance(value, str | int | float | bool)
    }


def _plain(tensor: Tensor) -> Tensor:
    """A tensor without its history, and without a sign or a conjugate that is still to be made."""
    own = tensor.detach() if tensor.requires_grad else tensor
    return own.resolve_conj().resolve_neg() if own.is_conj() or own.is_neg() else own


def under(weights: Weights, prefix: str) -> Weights:
    """Picks the tensors whose names begin with a prefix.

    Args:
        weights: The tensors.
        prefix: The prefix, without the dot behind it.

    Returns:
        Those tensors, the prefix taken off.
    """
    start = f"{prefix}."
    return {n.removeprefix(start): t for n, t in weights.items() if n.startswith(start)}


def parts(weights: Weights, expected: Weights, aliases: Mapping[str, list[str]]) -> Iterator[Part]:
    """Finds where in a state dict a model's tensors may lie.

    Names are taken as they are; where nothing of that holds the model, without the marks that
    wrappers leave in them. Parts under a prefix are looked at where the whole is not the model.

    Args:
        weights: The state dict.
        expected: The model's own.
        aliases: The model's tied names, of which a file may leave out all but one.

    Yields:
        The parts that hold the model; where there is none, those with names in common, and the
        whole.
    """
    own = {name: name for name in expected}
    whole = _part("", weights, str, own, expected, aliases)
    if whole and whole.fits:  # as it mostly does
        yield whole
        return
    groups: dict[str, dict[str, Tensor]] = {"": dict(weights)}
    for name, tensor in weights.items():
        for dot in re.finditer(r"\.", name):
            groups.setdefault(name[: dot.start()], {})[name[dot.end() :]] = tensor
    unlike: list[Part] = []
    for naming in (str, unmarked):
        own = {naming(name): name for name in expected}
        holders: dict[tuple[int, ...], Part] = {}
        for prefix, group in groups.items():
            part = _part(prefix, group, naming, own, expected, aliases)
            if part is None:
                continue
            # A prefix of all names, such as that of DDP, makes no part of its own.
            ends = [0, *(dot.start() for dot in re.finditer(r"\.", prefix)), len(prefix)]
            outer = next(prefix[:end] for end in ends if len(groups[prefix[:end]]) == len(group))
            part = replace(part, prefix=outer)
            if not part.holds:
                unlike.append(part)
                continue
            # Seen from further out, through marks, the same tensors may have others beside them.
            tensors = tuple(id(part.weights[name]) for name in expected)
            if tensors not in holders or (part.fits and not holders[tensors].fits):
                holders[tensors] = part
        if holders:
            found = list(holders.values())
            yield from [p for p in found if p.fits and not p.prefix][:1] or found
            return
    yield from unlike


def unmarked(name: str) -> str:
    """Takes the marks that wrappers leave out of a name.

    Args:
        name: The name of a tensor or of a module.

    Returns:
        The name without them.
    """
    return ".".join(part for part in name.split(".") if part not in _MARKS)


def _part(
    prefix: str,
    group: Weights,
    naming: Callable[[str], str],
    own: Mapping[str, str],
    expected: Weights,
    aliases: Mapping[str, list[str]],
) -> Part | None:
    """Names the tensors under a prefix as the model does; None where none is the model's."""
    view = {naming(name): tensor for name, tensor in group.items()}
    # Names that would fall together are never merged.
    apart = len(view) == len(group) and len(own) == len(expected)
    common = len(view.keys() & own.keys()) if apart else 0
    if not common:
        return None if prefix else Part(prefix, group, holds=False, fits=False)
    renamed = {own.get(name, name): tensor for name, tensor in view.items()}
    if common < len(expected) - len(aliases):
        return Part(prefix, renamed, holds=False, fits=False)
    filled = _fill(renamed, aliases)
    inner = {name: tensor for name, tensor in filled.items() if name in expected}
    holds = not mismatches(inner, expected)
    return Part(prefix, filled, holds=holds, fits=holds and len(inner) == len(filled))


def _fill(weights: Weights, aliases: Mapping[str, list[str]]) -> Weights:
    """Gives tied names that a file leaves out the tensor of their twin."""
    missing = {
        name: weights[twin]
        for name, twins in aliases.items()
        if name not in weights
        for twin in twins
        if twin in weights
    }
    return {**weights, **missing} if missing else weights
