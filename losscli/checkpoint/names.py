"""Names of tensors: where in a state dict a model's own lie, under which prefixes and marks."""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from torch import Tensor

from losscli.weight_space.vectors import Weights, mismatches

__all__ = [
    "OPTIMISER",
    "Part",
    "StateDict",
    "Versions",
    "beneath",
    "loadable",
    "metadata_of",
    "natural",
    "naturally",
    "parts",
    "state_dicts",
    "stem",
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


_EXTRA = "_extra_state"

Versions = Mapping[str, Mapping[str, Any]]
"""What ``state_dict`` notes about modules, by their names: ``_metadata``."""


class StateDict(OrderedDict[str, Tensor]):
    """Tensors by their names, with what ``torch.nn.Module.state_dict`` stores beside them.

    Attributes:
        versions: What was noted about modules.
        extra: The extra state of modules that is not a tensor, by its keys.
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
    """A state dict, or those of its names that lie under a prefix.

    Attributes:
        prefix: The prefix; empty where it is the whole, under a prefix of all its names or none.
        weights: The tensors under the names that the model would have for them; where the part
            holds the model, with the versions of its modules and their extra state.
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


# Two whole numbers with a point between them, and no third.
_DECIMAL = re.compile(r"(?<![0-9])(?<![0-9]\.)([0-9]+\.[0-9]+)(?!\.?[0-9])")

# A number with an exponent, which stands alone: step-1e3, but neither fold1e3 nor a part of a hash.
_EXPONENT = re.compile(r"(?i)(?<![0-9a-z.])([0-9]+(?:\.[0-9]+)?e[-+]?[0-9]{1,3})(?![0-9a-z])")

# What ends a file's name, with #KEY.
_ENDING = re.compile(r"(\.[A-Za-z]\w*)+(#.*)?$", re.DOTALL)


def stem(name: str) -> str:
    """Takes the suffixes of a file's name off, which begin with a letter, and #KEY.

    Args:
        name: The name.

    Returns:
        What is before them.
    """
    return _ENDING.sub("", name)


def naturally(names: Sequence[str]) -> list[str]:
    """Sorts the names of files with numbers in them by their values.

    2 comes before 10, 0.15 before 0.2 and 2e3 before 1e4.

    A name comes before those that continue it: ``last.ckpt`` before ``last-v1.ckpt``, which
    Lightning writes where ``last.ckpt`` is there already.

    Args:
        names: The names.

    Returns:
        The names in order.
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
    # 1.9, 1.10, 1.11: the parts are counted, as no decimal ends in 0 where others are shorter.
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
                    [(0, Decimal(part))] if value else [k for k in natural(part) if k != (1, "")]
                )
        return found, natural(name.removeprefix(split[name]))

    return sorted(names, key=key)


def state_dicts(content: Any, label: str = "", depth: int = 0) -> Iterator[tuple[str, StateDict]]:
    """Finds the mappings in a file that hold tensors under names.

    Args:
        content: What the file holds.
        label: The dotted keys that lead to it.
        depth: How many they are.

    Yields:
        The dotted keys of each and its tensors, outermost first, with the versions of modules and
        their extra state.
    """
    if not isinstance(content, Mapping) or depth > 4:
        return
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    extra = {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and key.rpartition(".")[2] == _EXTRA and key not in tensors
    }
    if tensors:
        versions = getattr(content, "_metadata", None)
        # A file may say anything there.
        noted = {
            module: version
            for module, version in (versions.items() if isinstance(versions, Mapping) else ())
            if isinstance(module, str) and isinstance(version, Mapping)
        }
        yield label, StateDict({k: _plain(v) for k, v in tensors.items()}, noted, extra)
    for key, value in content.items():
        if isinstance(value, Mapping) and key not in extra:
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
    tensors = {n.removeprefix(start): t for n, t in weights.items() if n.startswith(start)}
    return StateDict(tensors, *beneath(weights, prefix))


def beneath(
    weights: Weights, prefix: str, place: Callable[[str], str] = str
) -> tuple[Versions, Mapping[str, Any]]:
    """Picks the versions and the extra state of the modules under a prefix.

    Args:
        weights: A state dict.
        prefix: The prefix, without the dot behind it; empty for all of it.
        place: Makes the model's name of a module of that without the prefix.

    Returns:
        The versions and the extra state by the model's names.
    """
    if not isinstance(weights, StateDict):
        return {}, {}
    start = f"{prefix}." if prefix else ""
    versions = {
        place(module[len(start) :]): version
        for module, version in weights.versions.items()
        if f"{module}.".startswith(start)
    }
    extra = {
        f"{place(key[len(start) :].removesuffix(_EXTRA).rstrip('.'))}.{_EXTRA}".lstrip("."): state
        for key, state in weights.extra.items()
        if key.startswith(start)
    }
    return versions, extra


def loadable(
    weights: Weights, versions: Versions, extra: Mapping[str, Any]
) -> OrderedDict[str, Any]:
    """Puts together what ``load_state_dict`` takes.

    Args:
        weights: The tensors.
        versions: The versions of modules.
        extra: The extra state of modules.

    Returns:
        The state dict. Versions and extra state are copies, since the model may write on them.
    """
    state: OrderedDict[str, Any] = OrderedDict({**weights, **copy.deepcopy(dict(extra))})
    if versions:
        state._metadata = copy.deepcopy(dict(versions))  # type: ignore[attr-defined]
    return state


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
    whole = _part("", weights, weights, str, own, expected, aliases)
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
            part = _part(prefix, group, weights, naming, own, expected, aliases)
            if part is None:
                continue
            # A prefix of all names, such as that of DDP, makes no part of its own.
            ends = [*_dots(prefix), len(prefix)]
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
    whole: Weights,
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
    if holds:
        # Of the modules that are one without the marks, the innermost, which has the tensors.
        modules = sorted({name[:dot] for name in expected for dot in _dots(name)}, key=len)
        places = {naming(module): module for module in modules}
        noted = beneath(whole, prefix, lambda module: places.get(naming(module), naming(module)))
        filled = StateDict(filled, *noted)
    return Part(prefix, filled, holds=holds, fits=holds and len(inner) == len(filled))


def _dots(name: str) -> list[int]:
    """Where the names of the modules end that hold a tensor, the outermost first."""
    return [0, *(dot.start() for dot in re.finditer(r"\.", name))]


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
