"""Options with which a checkpoint fits a model that has other tensors."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

import torch

from losscli.weight_space.vectors import Weights, mismatches

__all__ = ["fitting_options"]

# Maximum number of renames or patterns.
_MOST = 3


def fitting_options(found: Weights, expected: Weights) -> str:
    """Returns the command-line options with which the tensors ``found`` fit a model.

    ``found`` has the model's names as far as it has its tensors. The result is empty if a shape
    differs, or if the tensors have little in common with the model.
    """
    missing = {name: t.shape for name, t in expected.items() if name not in found}
    unexpected = {name: t.shape for name, t in found.items() if name not in expected}
    shared = {name: tensor for name, tensor in found.items() if name in expected}
    if mismatches(shared, {name: expected[name] for name in shared}):
        return ""
    if renames := _renames(unexpected, missing):
        return " ".join(f"--rename {shlex.quote(rename)}" for rename in renames)
    if not shared or (missing and len(unexpected) > len(shared)):
        return ""
    modules = {name.partition(".")[0] for name in shared}

    def pattern(name: str) -> str:
        module, dot, _ = name.partition(".")
        return f"{module}.*" if dot and module not in modules else name

    patterns = [shlex.quote(each) for each in dict.fromkeys(map(pattern, missing))]
    if len(patterns) > _MOST:
        patterns = [*patterns[:_MOST], "…"]
    options = ["--ignore-unexpected"] if unexpected else []
    return " ".join([*options, *(f"--allow-missing {each}" for each in patterns)])


def _renames(unexpected: Mapping[str, torch.Size], missing: Mapping[str, torch.Size]) -> list[str]:
    """Finds the renames that turn all unexpected tensors into the missing ones; empty if none."""
    if list(unexpected.values()) != list(missing.values()):
        return []
    found: dict[str, None] = {}
    for old, new in zip(unexpected, missing, strict=True):
        a, b = old.split("."), new.split(".")
        while len(a) > 1 and len(b) > 1 and a[-1] == b[-1]:
            a, b = a[:-1], b[:-1]
        found[f"{'.'.join(a)}={'.'.join(b)}"] = None
    return list(found) if len(found) <= _MOST else []
