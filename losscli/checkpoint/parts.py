"""Several files or state dicts as one model: each holds the tensors of one module."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from losscli.checkpoint.names import OPTIMISER, StateDict, strip_wrappers, tensors_under
from losscli.checkpoint.state import CheckpointFile
from losscli.errors import CheckpointError, MismatchError, UsageError
from losscli.weight_space.vectors import Weights

__all__ = ["combine", "join_parts", "join_state_dicts", "split_parts"]

# The + before MODULE=, since the name of a file may contain one, too.
_PLUS = re.compile(r"\+(?=[\w.]+=)")
_PART = re.compile(r"([\w.]+)=(.+)", re.DOTALL)


def split_parts(name: str) -> dict[str, str]:
    """Returns the checkpoint of each module in ``MODULE=FILE+MODULE=FILE``.

    It is empty for another name, and if a file with the whole name exists.

    Raises:
        UsageError: A module is given twice.
    """
    found = [_PART.fullmatch(piece) for piece in _PLUS.split(name)]
    matches = [match for match in found if match]
    if len(matches) < len(found) or _exists(name):
        return {}
    # The name of a missing file may look like a single part: epoch=3.ckpt.
    if len(matches) == 1 and not _exists(matches[0][2]):
        return {}
    parts: dict[str, str] = {}
    for module, file in (match.groups() for match in matches):
        if module in parts:
            raise UsageError(f"{name} names the module {module} twice", "Name one file per module")
        parts[module] = file
    return parts


def _exists(name: str) -> bool:
    try:
        return any(Path(path).exists() for path in (name, name.rpartition("#")[0]) if path)
    except (OSError, ValueError):
        return False


def combine(name: str, parts: Mapping[str, CheckpointFile]) -> CheckpointFile:
    """Returns the checkpoint that consists of those of its modules.

    Where each part has one state dict, it has one as well.

    Raises:
        CheckpointError: A part is an adapter.
    """
    for part in parts.values():
        if part.adapter:
            raise CheckpointError(
                f"{part.name} is an adapter and cannot be part of {name}",
                "Merge it into its base first",
            )
    candidates = {
        f"{module}.{label}".rstrip("."): weights
        for module, part in parts.items()
        for label, weights in part.model_candidates.items()
    }
    if len(candidates) == len(parts):
        candidates = {"": _join(dict(zip(parts, candidates.values(), strict=True)))}

    def fetch(weights: Weights) -> Weights:
        return _join({m: part.fetch(tensors_under(weights, m)) for m, part in parts.items()})

    first = next(iter(parts.values()))
    return CheckpointFile(
        name,
        first.path,
        candidates,
        first.metadata,
        tuple(dict.fromkeys(file for part in parts.values() for file in part.files)),
        quantised=next(filter(None, (part.quantised for part in parts.values())), None),
        fetch=fetch,
        parts=parts,
    )


def join_parts(file: CheckpointFile, expected: Weights) -> CheckpointFile:
    """Returns a file with the tensors of each of its parts joined to one state dict.

    Raises:
        MismatchError: A part has several state dicts, and none fits.
        CheckpointError: Several state dicts of a part fit.
    """
    selected = {}
    for module, part in file.parts.items():
        start = f"{module}."
        own = {n.removeprefix(start): t for n, t in expected.items() if n.startswith(start)}
        try:
            found = part.select(own, owner=f"{module} of the model")
        except MismatchError:
            if len(part.model_candidates) > 1:
                raise
            # Renames, load hooks or other rules may change the names of the whole.
            found = part.select(None)
        selected[module] = StateDict(found.weights, found.versions, found.extra)
    return replace(file, candidates={"": _join(selected)}, fetch=lambda weights: weights)


def join_state_dicts(file: CheckpointFile, expected: Weights) -> CheckpointFile | None:
    """Joins the state dicts of a file that lie under the names of the model's modules.

    An example is ``{"netG": {...}, "netD": {...}}``.

    Returns:
        The file with the joined state dicts, by the key above them; None if there are none.
    """
    modules = {
        strip_wrappers(name[: dot.start()]) for name in expected for dot in re.finditer(r"\.", name)
    }
    labels = [label for label in file.candidates if label and not OPTIMISER.fullmatch(label)]
    joined = {}
    for above in dict.fromkeys(prefix for label in labels for prefix in _prefixes(label)):
        start = f"{above}." if above else ""
        children = {
            label.removeprefix(start): file.candidates[label]
            for label in labels
            if label.startswith(start) and strip_wrappers(label.removeprefix(start)) in modules
        }
        if len(children) > 1:
            own = file.candidates.get(above, {})
            joined[above] = _join({"": {n: t for n, t in own.items() if n in expected}, **children})
    return replace(file, candidates=joined) if joined else None


def _prefixes(label: str) -> Iterator[str]:
    parts = label.split(".")
    return (".".join(parts[:depth]) for depth in range(len(parts)))


def _join(state_dicts: Mapping[str, Weights]) -> StateDict:
    """Joins state dicts, each with the name of its module before its names."""
    tensors, versions, extra = {}, {}, dict[str, Any]()
    for module, weights in state_dicts.items():
        start = f"{module}." if module else ""
        tensors.update({f"{start}{name}": tensor for name, tensor in weights.items()})
        if isinstance(weights, StateDict):
            versions.update({f"{start}{m}".rstrip("."): v for m, v in weights.versions.items()})
            extra.update({f"{start}{key}": value for key, value in weights.extra.items()})
    return StateDict(tensors, versions, extra)
