"""Rules for checkpoints with unexpected, missing or differently named tensors."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from losscli.checkpoint.names import StateDict, module_state_under
from losscli.checkpoint.state import CheckpointFile
from losscli.errors import CheckpointError, UsageError
from losscli.weight_space.vectors import Weights, select_names
from losscli.wording import list_first

__all__ = ["NameRules"]


@dataclass(frozen=True)
class NameRules:
    """Which differences between the tensors of a checkpoint and of the model are allowed.

    Attributes:
        ignore_unexpected: Whether tensors that the model does not have are ignored.
        initial: The model's initial values of the tensors that may be missing.
        renames: The old and the new components of each rename.
        used: The renames that changed a name so far, as ``OLD=NEW``.
    """

    ignore_unexpected: bool = False
    initial: Weights = field(default_factory=dict)
    renames: Mapping[str, tuple[list[str], list[str]]] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    @classmethod
    def of(
        cls,
        model: Weights,
        *,
        ignore_unexpected: bool,
        allow_missing: Sequence[str],
        rename: Sequence[str],
    ) -> NameRules:
        """Returns the rules that the options give.

        Args:
            model: The state dict of the model with its initial values.
            ignore_unexpected: Whether unexpected tensors are ignored.
            allow_missing: Patterns of the tensors that may be missing.
            rename: The renames, ``OLD=NEW``.

        Raises:
            UsageError: A pattern matches no tensor of the model, or a rename has another form.
        """
        names = select_names(model, allow_missing, ()) if allow_missing else []
        renames = {text: _parse(text) for text in rename}
        counts = Counter(tuple(old) for old, _ in renames.values())
        for old, number in counts.items():
            if number > 1:
                raise UsageError(f"--rename {'.'.join(old)}=… is given twice", "Give one of them")
        initial = {name: model[name].clone() for name in names}
        return cls(ignore_unexpected, initial, renames)

    @property
    def are_lenient(self) -> bool:
        """Whether a checkpoint may have other tensors than the model."""
        return self.ignore_unexpected or bool(self.initial)

    def rename(self, file: CheckpointFile) -> CheckpointFile:
        """Returns a file with renamed tensors.

        Raises:
            CheckpointError: Two tensors would have the same name.
        """
        if not self.renames:
            return file
        candidates = {k: self._rename_all(w, file.name) for k, w in file.candidates.items()}
        return replace(file, candidates=candidates)

    def _rename_all(self, weights: Weights, where: str) -> Weights:
        renamed = {name: self._new_name(name) for name in weights}
        for name, number in Counter(renamed.values()).items():
            if number > 1:
                old = [each for each, new in renamed.items() if new == name]
                raise CheckpointError(
                    f"--rename gives {' and '.join(old[:2])} of {where} the same name, {name}",
                    "Give them different names",
                )
        tensors = {renamed[name]: tensor for name, tensor in weights.items()}
        return StateDict(tensors, *module_state_under(weights, "", self._new_name))

    def _new_name(self, name: str) -> str:
        # Renamed components are not renamed again, so that two renames can swap names.
        parts: list[str | None] = list(name.split("."))
        inserted: dict[int, list[str]] = {}
        for text, (old, new) in self.renames.items():
            starts = range(len(parts) - len(old) + 1)
            start = next((i for i in starts if parts[i : i + len(old)] == old), None)
            if start is not None:
                self.used.add(text)
                inserted[start] = [*new, *inserted.get(start, [])]
                parts[start : start + len(old)] = [None] * len(old)
        found = ([*inserted.get(i, []), *([part] if part else [])] for i, part in enumerate(parts))
        return ".".join(part for components in found for part in components)

    def check_used(self, names: Sequence[str]) -> None:
        """Checks that each rename changed a name in at least one of the named checkpoints.

        Raises:
            UsageError: A rename changed none.
        """
        for text in self.renames:
            if text not in self.used:
                raise UsageError(
                    f"--rename {text}: no tensor of {list_first(names)} has "
                    f"{text.partition('=')[0]!r} in its name",
                    f"losscli inspect {shlex.quote(names[0])} lists the names",
                )

    def complete(self, weights: Weights) -> tuple[Weights, tuple[str, ...]]:
        """Adds the initial values of missing tensors; returns also the names of these."""
        missing = {name: t for name, t in self.initial.items() if name not in weights}
        tensors: dict[str, Tensor] = {**weights, **missing}
        return StateDict(tensors, *module_state_under(weights, "")), tuple(missing)


def _parse(text: str) -> tuple[list[str], list[str]]:
    old, equals, new = text.partition("=")
    if not equals or old == new:
        raise UsageError(
            f"--rename {text} does not have the form OLD=NEW", "Give, for example, fc=head"
        )
    return [part for part in old.split(".") if part], [part for part in new.split(".") if part]
