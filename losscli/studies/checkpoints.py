"""Checkpoints by their names, with the tensors of one model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from losscli.checkpoint import (
    Checkpoint,
    InMemoryCheckpoint,
    LoadHooks,
    NameRules,
    read,
    read_optimizers,
    select_for,
)
from losscli.errors import ChangedError, CheckpointError, MismatchError, UsageError
from losscli.models import RUNS_CODE
from losscli.results.summaries import CheckpointEntry
from losscli.settings import Settings
from losscli.studies.model import build
from losscli.studies.specs import SourcedSpec
from losscli.wording import list_first

__all__ = ["Checkpoints", "changed", "is_same", "require_distinct"]

# Maximum number of checkpoints in an error whose mismatches are listed, and of tensors in a note.
_MAX_REASONS = 5
_MAX_TENSORS = 3

# The bytes of tensors that stay mapped, so that files of small models are read once.
_KEPT_BYTES = 64 << 20


class Checkpoints:
    """Opens checkpoints by their names, for one model."""

    def __init__(
        self,
        model: nn.Module,
        found: SourcedSpec,
        base: str | None,
        settings: Settings,
        names: Sequence[str] = (),
    ) -> None:
        self._model = model
        self._hooks = LoadHooks(model)
        self._found = found
        self._rules = NameRules.of(
            {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)},
            ignore_unexpected=settings.ignore_unexpected,
            allow_missing=settings.allow_missing,
            rename=settings.rename,
        )
        self._base = base  # of adapters
        self._objects = {str(name): name for name in names if isinstance(name, InMemoryCheckpoint)}
        # The checkpoints, most without their tensors, and the stamps of their files.
        self._opened: dict[str, tuple[Checkpoint, object]] = {}
        self._spare_bytes = _KEPT_BYTES
        # The tensors that any of the checkpoints lacks. They have the model's initial values in all
        # of them: a line from trained to initial values would be meaningless.
        self._missing: set[str] = set()

    def open(self, name: str) -> Checkpoint:
        """Opens a checkpoint, with the model's names."""
        return self._with_initial(self._open(name))

    def _with_initial(self, checkpoint: Checkpoint) -> Checkpoint:
        initial = {name: self._rules.initial[name] for name in self._missing}
        return (
            replace(checkpoint, weights={**checkpoint.weights, **initial})
            if initial
            else checkpoint
        )

    def _open(self, name: str) -> Checkpoint:
        if kept := self._kept(name):
            return kept
        with torch.random.fork_rng(devices=[]):
            if name.startswith("init:"):
                return _initialisation(name, self._found)
            file, base = read(self._objects.get(name, name)), None
            if file.adapter and self._base:
                base = select_for(
                    read(self._base), self._model, hooks=self._hooks, rules=self._rules
                )
            checkpoint = select_for(file, self._model, base, self._hooks, self._rules)
        if checkpoint.path is not None:
            stamp = checkpoint.stamp()
            if name not in self._opened:
                size = sum(tensor.nbytes for tensor in checkpoint.weights.values())
                stays = size <= self._spare_bytes
                self._spare_bytes -= size if stays else 0
                kept = checkpoint if stays else replace(checkpoint, weights={})
                self._opened[name] = kept, stamp
            elif self._opened[name][1] != stamp:
                raise changed(name)
        return checkpoint

    def _kept(self, name: str) -> Checkpoint | None:
        """Returns a checkpoint that was opened before, with its tensors, if its files are there."""
        checkpoint, stamp = self._opened.get(name, (None, None))
        if checkpoint is None or not checkpoint.weights:
            return None
        try:
            now = checkpoint.stamp()
        except CheckpointError:
            return None
        if now != stamp:
            raise changed(name)
        return checkpoint

    def optimizers(self, name: str) -> Mapping[str, Any]:
        """Reads the state dicts of optimisers in a checkpoint; none for an initialisation."""
        return {} if name.startswith("init:") else read_optimizers(self._objects.get(name, name))

    def unchanged(self) -> None:
        """Checks that the files of all opened checkpoints are unchanged, or deleted.

        The memory-mapped content of a deleted file does not change.

        Raises:
            ChangedError: A file was changed.
        """
        for name, (checkpoint, stamp) in self._opened.items():
            try:
                now = checkpoint.stamp()
            except CheckpointError:
                continue
            if now != stamp:
                raise changed(name)

    def survey(self, names: Sequence[str]) -> tuple[list[CheckpointEntry], Checkpoint, list[str]]:
        """Opens the checkpoints one by one, and reports all mismatches in one error.

        Args:
            names: The checkpoints.

        Returns:
            The entries of the summary, the first checkpoint, and notes on missing and ignored
            tensors.

        Raises:
            MismatchError: They do not have the model's tensors.
            UsageError: A rename changes no name.
        """
        entries: dict[str, CheckpointEntry] = {}
        first: Checkpoint | None = None
        wrong: list[str] = []
        cures: list[str] = []
        options: list[str] = []
        notes: dict[str, list[str]] = {}
        for name in dict.fromkeys(names):
            try:
                checkpoint = self._open(name)
            except MismatchError as error:
                wrong.append(error.what)
                cures.append(error.cure)
                options.append(error.option)
                continue
            path = str(checkpoint.path) if checkpoint.path else None
            entries[name] = {"name": name, "path": path, "sha256": checkpoint.sha256()}
            first = first or checkpoint
            self._missing.update(checkpoint.missing)
            for note in _notes(checkpoint):
                notes.setdefault(note, []).append(name)
            del checkpoint  # before the next one is opened
        self._rules.check_used(names)
        if wrong:
            wrong = list(dict.fromkeys(wrong))
            more = f" | and {len(wrong) - _MAX_REASONS} more" if len(wrong) > _MAX_REASONS else ""
            source = self._found.source
            where = f" ({source})" if source not in {"", "--model"} else ""
            raise MismatchError(
                " | ".join(wrong[:_MAX_REASONS]) + more,
                (cures[0] if all(cures) else "")
                or f"The model is {self._found.text}{where}; choose with -m"
                + (f", or give {options[0]}" if options[0] else ""),
            )
        assert first is not None
        texts = [note.format(list_first(names, 2)) for note, names in notes.items()]
        return [entries[name] for name in names], self._with_initial(first), texts


def _notes(checkpoint: Checkpoint) -> Iterator[str]:
    """Yields notes on missing and ignored tensors; ``{}`` stands for the names of checkpoints."""
    if some := checkpoint.missing:
        tensors = list_first(some, _MAX_TENSORS)
        yield f"missing in {{}}: {tensors}; the model's initial values stay, at every point"
    if some := checkpoint.unexpected:
        tensors = list_first(some, _MAX_TENSORS)
        yield f"ignored in {{}}, since the model does not have them: {tensors}"


def require_distinct(names: Sequence[str], cure: str = "") -> None:
    """Checks that each checkpoint is given once.

    Args:
        names: The checkpoints, at least one.
        cure: An addition to how to fix it.

    Raises:
        UsageError: A checkpoint is given several times.
    """
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise UsageError(f"{name} is given {times} times", f"Give each checkpoint once{cure}")


def changed(name: str) -> ChangedError:
    """Creates the error for a checkpoint that was changed during a run."""
    return ChangedError(
        f"{name} was changed while losscli read it", "Run again when no program writes to it"
    )


def _initialisation(name: str, found: SourcedSpec) -> Checkpoint:
    try:
        seed = int(name.removeprefix("init:"))
    except ValueError:
        raise UsageError(f"{name} has no seed", f"Write init:0, or ./{name} for a file") from None
    if not 0 <= seed < 1 << 63:
        raise UsageError(f"{name} has no seed", "Give a number from 0 to 2^63 − 1")
    torch.manual_seed(seed)
    if isinstance(found.value, nn.Module):
        raise UsageError(
            f"{name}: a module that is already built has no initialisation to draw",
            "Give model= as a spec or a function that builds it",
        )
    if isinstance(found.value, str) and found.value.partition(":")[0] in RUNS_CODE:
        raise UsageError(
            f"{name}: a saved program has no initialisation to draw", "Give a checkpoint file"
        )
    state = build(found).state_dict()
    tensors = {key: tensor for key, tensor in state.items() if isinstance(tensor, Tensor)}
    extra = {key: value for key, value in state.items() if key not in tensors}
    return Checkpoint(name, tensors, {}, extra=extra)


def is_same(one: Any, other: Any) -> bool:
    """Compares the extra state of modules.

    Args:
        one: Any object.
        other: Another.

    Returns:
        Whether they are known to be equal.
    """
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    try:
        return type(one) is type(other) and bool(one == other)
    except Exception:  # noqa: BLE001 - classes of the user compare in any way
        return False
