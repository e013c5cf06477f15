"""Find the tensors of a model in a state dict, below prefixes and names that wrappers add."""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from torch import Tensor

from losscli.weight_space.vectors import Weights, mismatches

__all__ = [
    "EXTRA_STATE",
    "OPTIMISER",
    "Part",
    "StateDict",
    "Versions",
    "file_names",
    "find_parts",
    "loadable",
    "metadata_of",
    "module_state_under",
    "natural_key",
    "sort_naturally",
    "state_dicts",
    "stem",
    "strip_wrappers",
    "tensors_under",
]

OPTIMISER = re.compile(r"(.*\.)?state\.\d+|optim(i[sz]ers?)?(_states?(_dict)?)?(\..*)?", re.DOTALL)
"""Keys of optimiser state: ``state.N`` of torch's optimisers, or names such as ``optimizer``."""

# Name components that wrappers of a model or of a part add: DataParallel and DDP, torch.compile,
# FSDP, activation checkpointing.
_WRAPPERS = frozenset({
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
})


EXTRA_STATE = "_extra_state"
"""The key of the extra state of a module, below the name of the module."""

Versions = Mapping[str, Mapping[str, Any]]
"""The ``_metadata`` of a state dict: for each module name, its version and other values."""


class StateDict(OrderedDict[str, Tensor]):
    """Tensors by name, with the other content of ``torch.nn.Module.state_dict``.

    Attributes:
        versions: The versions of the modules.
        extra: The extra state of modules that is not a tensor, by key.
    """

    def __init__(
        self,
        tensors: Weights,
        versions: Versions | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(tensors)
        self.versions = versions or {}
        self.extra = extra or {}


@dataclass(frozen=True)
class Part:
    """A state dict, or its tensors under a prefix.

    Attributes:
        prefix: The prefix; empty for the whole state dict, even if all its names share a prefix.
        weights: The tensors under the model's names. If the part holds the model, a `StateDict`
            with the versions and the extra state of its modules.
        holds: Whether it has all tensors of the model, except those that may be missing.
        fits: Whether it has exactly the tensors of the model.
    """

    prefix: str
    weights: Weights
    holds: bool
    fits: bool


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Returns a sort key that compares the numbers in names by value: 2 before 10."""
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part)) if i % 2 else (1, part) for i, part in enumerate(parts)]


# Two integers separated by a dot, and no third: 0.15, but not 1.2.3.
_DECIMAL = re.compile(r"(?<![0-9])(?<![0-9]\.)([0-9]+\.[0-9]+)(?!\.?[0-9])")

# A number with an exponent that stands alone: step-1e3, but neither fold1e3 nor a part of a hash.
_EXPONENT = re.compile(r"(?i)(?<![0-9a-z.])([0-9]+(?:\.[0-9]+)?e[-+]?[0-9]{1,3})(?![0-9a-z])")

# The suffixes of a file name, and #KEY.
_ENDING = re.compile(r"(\.[A-Za-z]\w*)+(#.*)?$", re.DOTALL)


# What separates folders, files and keys, and what a file name is made without.
_SEPARATORS = re.compile(r"[/\\#]")
_UNSAFE = re.compile(r"[^\w.+-]+")


def stem(name: str) -> str:
    """Removes ``#KEY`` and the suffixes of a file name that begin with a letter."""
    return _ENDING.sub("", name)


def file_names(names: Sequence[str]) -> list[str]:
    """Returns a different file name, without a suffix, for each of several checkpoints.

    It is the last part of the name, with as many folders before it as make all different; with a
    number if folders do not.
    """
    stems = [
        [_UNSAFE.sub("-", stem(part)).strip("-.") for part in _SEPARATORS.split(name)]
        for name in names
    ]
    for depth in range(1, 1 + max(map(len, stems))):
        found = ["-".join(filter(None, own[-depth:])) for own in stems]
        if len(set(found)) == len(found) and all(found):
            return found
    return [f"{name or 'checkpoint'}-{i}" for i, name in enumerate(found, start=1)]


def sort_naturally(names: Sequence[str]) -> list[str]:
    """Sorts file names by the values of numbers: 2 before 10, 0.15 before 0.2, 2e3 before 1e4.

    A name comes before longer names that begin with it: ``last.ckpt`` before ``last-v1.ckpt``,
    which Lightning writes if ``last.ckpt`` exists.

    Returns:
        The sorted names.
    """
    split = {name: stem(name) for name in names}
    # Numbers with exponents are at odd places.
    parts = {name: _EXPONENT.split(found) for name, found in split.items()}
    fractions = [
        number.partition(".")[2]
        for found in parts.values()
        for part in found[::2]
        for number in _DECIMAL.findall(part)
    ]
    # 1.9, 1.10, 1.11 are versions, not decimals: a decimal would not end in 0 next to shorter ones.
    counted = len({len(fraction) for fraction in fractions}) > 1 and any(
        len(fraction) > 1 and fraction.endswith("0") for fraction in fractions
    )

    def key(name: str) -> tuple[list[tuple[int, Decimal | int | str]], list[tuple[int, int | str]]]:
        found: list[tuple[int, Decimal | int | str]] = []
        for i, plain in enumerate(parts[name]):
            inner = [plain] if counted or i % 2 else _DECIMAL.split(plain)
            for j, part in enumerate(inner):
                value = (i + j) % 2
                found += (
                    [(0, Decimal(part))]
                    if value
                    else [k for k in natural_key(part) if k != (1, "")]
                )
        return found, natural_key(name.removeprefix(split[name]))

    return sorted(names, key=key)


def state_dicts(content: Any, label: str = "", depth: int = 0) -> Iterator[tuple[str, StateDict]]:
    """Yields the state dicts in the content of a file, outermost first, with their dotted keys.

    Each mapping with tensors is one. ``label`` is the dotted key of ``content``, and ``depth`` the
    number of keys in it.
    """
    if not isinstance(content, Mapping) or depth > 4:
        return
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    extra = {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and key.rpartition(".")[2] == EXTRA_STATE and key not in tensors
    }
    if tensors:
        versions = getattr(content, "_metadata", None)
        # A file may have any object there.
        module_versions = {
            module: version
            for module, version in (versions.items() if isinstance(versions, Mapping) else ())
            if isinstance(module, str) and isinstance(version, Mapping)
        }
        yield (
            label,
            StateDict({k: _resolved(v) for k, v in tensors.items()}, module_versions, extra),
        )
    for key, value in content.items():
        if isinstance(value, Mapping) and key not in extra:
            yield from state_dicts(value, f"{label}.{key}" if label else str(key), depth + 1)


def metadata_of(content: Any) -> dict[str, str]:
    """Returns the strings, numbers and booleans at the top level of a file, as strings."""
    plain = content.items() if isinstance(content, Mapping) else ()
    return {
        str(key): str(value) for key, value in plain if isinstance(value, str | int | float | bool)
    }


def _resolved(tensor: Tensor) -> Tensor:
    """Detaches a tensor and resolves lazy conjugation and negation."""
    detached = tensor.detach() if tensor.requires_grad else tensor
    return (
        detached.resolve_conj().resolve_neg()
        if detached.is_conj() or detached.is_neg()
        else detached
    )


def tensors_under(weights: Weights, prefix: str) -> Weights:
    """Selects the tensors under a prefix; their names in the result do not have it."""
    start = f"{prefix}."
    tensors = {n.removeprefix(start): t for n, t in weights.items() if n.startswith(start)}
    return StateDict(tensors, *module_state_under(weights, prefix))


def module_state_under(
    weights: Weights, prefix: str, rename: Callable[[str], str] = str
) -> tuple[Versions, Mapping[str, Any]]:
    """Selects the versions and the extra state of the modules under a prefix.

    Args:
        weights: The state dict.
        prefix: The prefix, without the trailing dot; empty for the whole state dict.
        rename: Maps a module name without the prefix to the name in the model.

    Returns:
        The versions and the extra state, by names in the model; both empty if there are none.
    """
    if not isinstance(weights, StateDict):
        return {}, {}
    start = f"{prefix}." if prefix else ""
    versions = {
        rename(module[len(start) :]): version
        for module, version in weights.versions.items()
        if f"{module}.".startswith(start)
    }
    extra = {
        f"{rename(key[len(start) :].removesuffix(EXTRA_STATE).rstrip('.'))}.{EXTRA_STATE}".lstrip(
            "."
        ): state
        for key, state in weights.extra.items()
        if key.startswith(start)
    }
    return versions, extra


def loadable(
    weights: Weights, versions: Versions, extra: Mapping[str, Any]
) -> OrderedDict[str, Any]:
    """Returns a state dict for ``load_state_dict``, with copies of the versions and extra state."""
    state: OrderedDict[str, Any] = OrderedDict({**weights, **copy.deepcopy(dict(extra))})
    if versions:
        state._metadata = copy.deepcopy(dict(versions))  # type: ignore[attr-defined]
    return state


def find_parts(
    weights: Weights,
    expected: Weights,
    aliases: Mapping[str, list[str]],
    optional: Collection[str] = (),
) -> Iterator[Part]:
    """Yields the parts of a state dict that may hold a model.

    If no part holds the model, they are the whole and all parts that share names with it. The
    search compares unchanged names first, and then names without the components that wrappers add.
    Prefixes are tried if the whole does not fit.

    Args:
        weights: The state dict.
        expected: The state dict of the model.
        aliases: The aliases of tied tensors; a file may omit all aliases of a tensor but one.
        optional: The names of tensors of the model that may be missing.
    """
    model_names = {name: name for name in expected}
    whole = _match_group("", weights, weights, str, model_names, expected, aliases, optional)
    if whole and whole.fits:  # the common case
        yield whole
        return
    groups: dict[str, dict[str, Tensor]] = {"": dict(weights)}
    for name, tensor in weights.items():
        for dot in re.finditer(r"\.", name):
            groups.setdefault(name[: dot.start()], {})[name[dot.end() :]] = tensor
    partial: list[Part] = []
    for normalise in (str, strip_wrappers):
        model_names = {normalise(name): name for name in expected}
        holders: dict[tuple[int, ...], Part] = {}
        for prefix, group in groups.items():
            part = _match_group(
                prefix, group, weights, normalise, model_names, expected, aliases, optional
            )
            if part is None:
                continue
            # A prefix that all names share, such as that of DDP, does not separate a part.
            ends = [*_dots(prefix), len(prefix)]
            outer = next(prefix[:end] for end in ends if len(groups[prefix[:end]]) == len(group))
            part = replace(part, prefix=outer)
            if not part.holds:
                partial.append(part)
                continue
            # A shorter prefix may select the same tensors, through wrappers, and others.
            tensors = tuple(id(part.weights.get(name)) for name in expected)
            if tensors not in holders or (part.fits and not holders[tensors].fits):
                holders[tensors] = part
        if holders:
            found = list(holders.values())
            yield from [p for p in found if p.fits and not p.prefix][:1] or found
            return
    yield from partial


def strip_wrappers(name: str) -> str:
    """Removes the components that wrappers add to the name of a tensor or a module."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _match_group(
    prefix: str,
    group: Weights,
    whole: Weights,
    normalise: Callable[[str], str],
    model_names: Mapping[str, str],
    expected: Weights,
    aliases: Mapping[str, list[str]],
    optional: Collection[str],
) -> Part | None:
    """Renames the tensors under a prefix to the model's names; None if they share no name."""
    normalised = {normalise(name): tensor for name, tensor in group.items()}
    # Different names that become equal are never merged.
    distinct = len(normalised) == len(group) and len(model_names) == len(expected)
    common = len(normalised.keys() & model_names.keys()) if distinct else 0
    if not common:
        return None if prefix else Part(prefix, group, holds=False, fits=False)
    renamed = {model_names.get(name, name): tensor for name, tensor in normalised.items()}
    if common < len(expected) - len(aliases) - len(optional):
        return Part(prefix, renamed, holds=False, fits=False)
    filled = _fill_tied(renamed, aliases)
    shared = {name: tensor for name, tensor in filled.items() if name in expected}
    absent = {name for name in optional if name not in shared}
    holds = not mismatches(shared, {n: t for n, t in expected.items() if n not in absent})
    if holds:
        # Of modules with equal names without wrappers, the innermost has the tensors.
        modules = sorted({name[:dot] for name in expected for dot in _dots(name)}, key=len)
        originals = {normalise(module): module for module in modules}
        module_state = module_state_under(
            whole, prefix, lambda module: originals.get(normalise(module), normalise(module))
        )
        filled = StateDict(filled, *module_state)
    return Part(prefix, filled, holds=holds, fits=holds and len(shared) == len(filled))


def _dots(name: str) -> list[int]:
    """The end positions in a tensor name of the modules around it, outermost first."""
    return [0, *(dot.start() for dot in re.finditer(r"\.", name))]


def _fill_tied(weights: Weights, aliases: Mapping[str, list[str]]) -> Weights:
    """Adds tied names that a file omits, with the tensor of an alias."""
    missing = {
        name: weights[twin]
        for name, twins in aliases.items()
        if name not in weights
        for twin in twins
        if twin in weights
    }
    return {**weights, **missing} if missing else weights
