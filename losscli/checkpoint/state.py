"""A checkpoint, and a file in which one is still to be chosen."""

from __future__ import annotations

import functools
import hashlib
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from losscli.checkpoint.names import OPTIMISER, Part, StateDict, Versions, parts, under
from losscli.checkpoint.quantised import quantised
from losscli.errors import CheckpointError, MismatchError
from losscli.files import open_regular
from losscli.weight_space.vectors import Weights, mismatches

if TYPE_CHECKING:
    from losscli.checkpoint.adapters import Adapter

__all__ = ["Checkpoint", "CheckpointFile", "tied"]

_MOST_KEYS = 12

# So many names that do not fit are listed.
_TOLD = 3


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one model.

    Attributes:
        name: How the user named it.
        weights: Its tensors under the model's names, memory-mapped where the format allows it.
        metadata: What the file says of itself, ``losscli.model`` and the like.
        path: The file or the folder it came from; None for an initialisation or an object.
        files: The files that make it up.
        digest: That of the tensors of an object that Python code gave.
        versions: The versions of modules that the tensors are of.
        extra: The extra state of modules that is not a tensor, by its keys.
    """

    name: str
    weights: Weights
    metadata: Mapping[str, str]
    path: Path | None = None
    files: tuple[Path, ...] = ()
    digest: str | None = None
    versions: Versions = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def sha256(self) -> str | None:
        """Digests the files that make it up.

        Returns:
            In hexadecimal the SHA-256 of the bytes of a single file, and of several that of a
            list of their names and digests, as ``sha256sum`` writes it; of an object that of its
            tensors; None for an initialisation.

        Raises:
            CheckpointError: A file can no longer be read.
        """
        files = self.files or ((self.path,) if self.path else ())
        if not files:
            return self.digest
        try:
            digests = [_digest(file) for file in files]
        except OSError as error:
            raise CheckpointError(f"{self.name}: {error.strerror}") from None
        if len(files) == 1:
            return digests[0]
        lines = sorted(f"{d}  {f.name}\n" for d, f in zip(digests, files, strict=True))
        return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()

    def stamp(self) -> tuple[tuple[int, int, int], ...]:
        """Tells one state of the files from another.

        Returns:
            Of each its place on the disk, its size, and when it was last changed.

        Raises:
            CheckpointError: A file is no longer there.
        """
        try:
            states = [file.stat() for file in self.files]
        except OSError as error:
            raise CheckpointError(f"{self.name}: {error.strerror}") from None
        return tuple((s.st_ino, s.st_size, s.st_mtime_ns) for s in states)


def _digest(file: Path) -> str:
    with open_regular(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _as_they_are(weights: Weights) -> Weights:
    return weights


@dataclass(frozen=True)
class CheckpointFile:
    """A file or folder as it was read, in which one state dict is still to be chosen.

    Attributes:
        name: How the user named it.
        path: Where it lies; None for an object that Python code gives.
        candidates: Every mapping of names to tensors in it, by the dotted keys that lead to it;
            ``""`` is the file itself.
        metadata: The plain values beside them.
        files: The files that make it up.
        quantised: How the weights are quantised, where a file beside them says so.
        adapter: How its tensors change those of another checkpoint; None where they are a
            model's own.
        fetch: Reads the tensors that were chosen, where ``candidates`` only has their shapes.
        digest: That of the tensors of an object.
        live: Whether they are those of a module, which was loaded already.
    """

    name: str
    path: Path | None
    candidates: Mapping[str, Weights]
    metadata: Mapping[str, str]
    files: tuple[Path, ...]
    quantised: str | None = None
    adapter: Adapter | None = None
    fetch: Callable[[Weights], Weights] = _as_they_are
    digest: str | None = None
    live: bool = False

    @property
    def folder(self) -> Path:
        """The folder of a file; a checkpoint that is a folder itself; the current one."""
        if self.path is None:
            return Path.cwd()
        path = self.path.resolve()
        return path if path.is_dir() else path.parent

    @property
    def where(self) -> str:
        """The file or folder, or the name of an object."""
        return self.name if self.path is None else str(self.path)

    @property
    def choice(self) -> Mapping[str, Weights]:
        """The state dicts to choose from without a model.

        Optimiser state, the state of random generators, and single numbers beside a state dict
        count only if there is nothing else.
        """
        others = {k: v for k, v in self.candidates.items() if not OPTIMISER.fullmatch(k)}
        dicts = {k: v for k, v in others.items() if any(map(_is_weight, v.values()))}
        # Tensors that lie about beside a state dict, such as the weights of classes.
        sizes = {k: sum(t.numel() for t in v.values() if _is_weight(t)) for k, v in dicts.items()}
        flat = "." not in "".join(dicts.get("", ()))
        if flat and sizes.get("", 0) < max(sizes.values(), default=0):
            dicts.pop("", None)
        return dicts or others or self.candidates

    def at(self, key: str) -> CheckpointFile:
        """Keeps what lies under a key.

        Args:
            key: The dotted keys that lead to a state dict, or on into it to the names that begin
                with them; empty for all of it.

        Returns:
            The file with fewer candidates.

        Raises:
            CheckpointError: There is nothing under the key.
        """
        if not key:
            return self
        found = self.candidates
        inside = {k: v for k, v in found.items() if k == key or k.startswith(f"{key}.")}
        if key in inside:
            inside = {key: inside[key]}
        if not inside:
            deeper = (
                under(weights, key.removeprefix(f"{label}."))
                for label, weights in found.items()
                if not label or key.startswith(f"{label}.")
            )
            if weights := next(filter(None, deeper), None):
                inside = {key: weights}
        if not inside:
            known = ", ".join(self._keys(key)) or "none"
            raise CheckpointError(
                f"{self.where} has no state dict under {key!r}", f"Its keys: {known}"
            )
        return replace(self, candidates=inside)

    def require_dense(self, label: str, weights: Weights) -> None:
        """Makes sure that tensors hold numbers that can be computed with.

        Args:
            label: The keys that lead to them.
            weights: Tensors of the file.

        Raises:
            CheckpointError: One is sparse, nested, of a type without arithmetic, or on ``meta``,
                where there are only shapes.
        """
        for name, tensor in weights.items():
            shapes_alone = tensor.is_meta and self.fetch is _as_they_are
            if found := _odd(tensor, shapes_alone=shapes_alone):
                what, cure = found
                where = f"{self.name}#{label}" if label else self.name
                if len(self.candidates) > 1:
                    cure += f", or name another state dict of the file, {self.where}#KEY"
                raise CheckpointError(f"tensor {name!r} of {where} is {what}", cure)

    def _keys(self, like: str) -> list[str]:
        """Lists keys that lead somewhere: of state dicts, and one step on into them."""
        labels = [k for k in self.candidates if k and not OPTIMISER.fullmatch(k)]
        steps = dict.fromkeys(
            f"{label}.{name.partition('.')[0]}".removeprefix(".")
            for label, weights in self.candidates.items()
            if not OPTIMISER.fullmatch(label)
            for name in weights
            if "." in name
        )
        # First what may have been meant.
        inner = sorted(
            (k for k in steps if k not in labels), key=lambda k: not f".{k}".endswith(f".{like}")
        )
        keys = [*labels, *inner]
        return keys if len(keys) <= _MOST_KEYS else [*keys[:_MOST_KEYS], "…"]

    def select(
        self,
        expected: Weights | None,
        base: Checkpoint | None = None,
        whose: str = "the model",
    ) -> Checkpoint:
        """Chooses the state dict that fits a model, its names made the model's.

        Args:
            expected: The model's own state dict; None where no model is known. Then the file's
                only state dict is taken, optimiser state aside.
            base: What an adapter changes, its names those of the model; None for the bare
                tensors of an adapter.

            whose: What the expected tensors belong to, for the errors.

        Returns:
            The checkpoint.

        Raises:
            CheckpointError: Two state dicts fit, or, without a model, there are several; or the
                weights are quantised, so that nothing lies between them.
            MismatchError: None fits; the text names every tensor that does not match the best.
        """
        if self.adapter and base:
            return self._onto(base, expected)
        if expected is None:
            candidates = self.choice
            if not candidates:
                self.refuse_quantised()
            if len(candidates) > 1:
                raise self.ambiguous(list(candidates), "No model is known here that would decide. ")
            (weights,) = candidates.values()
            return self.checkpoint(self.fetch(weights))
        self.refuse_quantised()
        return self.checkpoint(self.fetch(self._choose(expected, whose)))

    def _choose(self, expected: Weights, whose: str) -> Weights:
        # Modules may keep state beside their tensors, of which nothing can be interpolated.
        expected = {name: t for name, t in expected.items() if isinstance(t, Tensor)}
        aliases = tied(expected)
        found = [
            (label, part)
            for label, candidate in self.candidates.items()
            for part in parts(candidate, expected, aliases)
        ]
        holders = [
            (f"{label}.{part.prefix}".strip(".") if part.prefix else label, part)
            for label, part in found
            if part.holds
        ]
        if len(holders) > 1:
            raise self.ambiguous([label for label, _ in holders])
        if holders and holders[0][1].fits:
            return holders[0][1].weights
        others = [label for label in self.candidates if not OPTIMISER.fullmatch(label)]

        def likeness(found: tuple[str, Part]) -> tuple[bool, bool, int, int]:
            label, part = found
            common = len(part.weights.keys() & expected.keys())
            size = len(part.weights)
            return label in others, part.holds, common, -size if common else size

        label, part = max(found, key=likeness)
        empty = [not t.numel() and name in expected for name, t in part.weights.items()]
        if empty and all(empty) and any(t.numel() for t in expected.values()):
            raise MismatchError(
                f"the tensors of {self.name} are empty, as in one rank's part of a checkpoint of "
                "DeepSpeed ZeRO-3",
                (self.path and put_together(self.path))
                or "Name the checkpoint that has the weights",
            )
        wrong = mismatches(part.weights, expected)
        inner = f"{label}.{part.prefix}".strip(".") if part.prefix else label
        name = f"{self.where}#{inner}" if inner and (len(others) > 1 or part.prefix) else self.name
        more = f" and {len(wrong) - _TOLD:,} more" if len(wrong) > _TOLD else ""
        raise MismatchError(f"{name} does not fit {whose}: {'; '.join(_of_each_kind(wrong))}{more}")

    def _onto(self, base: Checkpoint, expected: Weights | None) -> Checkpoint:
        assert self.adapter is not None
        self.refuse_quantised()
        (tensors,) = self.candidates.values()
        twins = tied({n: t for n, t in (expected or {}).items() if isinstance(t, Tensor)})
        weights = self.adapter.merge(base.weights, tensors, twins)
        files = self.files + base.files
        return replace(base, name=self.name, weights=weights, path=self.path, files=files)

    def refuse_quantised(self) -> None:
        """Makes sure that points lie between the weights of a file and others.

        Raises:
            CheckpointError: They are quantised.
        """
        found = self.quantised or next(filter(None, map(quantised, self.candidates.values())), None)
        if found:
            raise CheckpointError(
                f"{self.name} is quantised ({found}), and between quantised weights there is no "
                "line",
                "Give the checkpoint that it was made from, or dequantise it first",
            )

    def checkpoint(self, weights: Weights) -> Checkpoint:
        """Makes a checkpoint.

        Args:
            weights: Its tensors, which this file holds.

        Returns:
            The checkpoint.
        """
        noted = (weights.versions, weights.extra) if isinstance(weights, StateDict) else ({}, {})
        return Checkpoint(
            self.name, weights, self.metadata, self.path, self.files, self.digest, *noted
        )

    def ambiguous(self, labels: list[str], why: str = "") -> CheckpointError:
        """Makes the error that several state dicts could be meant.

        Args:
            labels: The keys that lead to them.
            why: A sentence on why none is chosen.

        Returns:
            The error.
        """
        names = ", ".join(repr(label) if label else "its top level" for label in labels)
        example = next(label for label in labels if label)
        if self.path is None:
            keys = "".join(f"[{key!r}]" for key in example.split("."))
            return CheckpointError(
                f"{self.name} holds several state dicts: {names}", f"{why}Give one, as {keys} of it"
            )
        return CheckpointError(
            f"{self.name} holds several state dicts: {names}",
            f"{why}Choose one, for example {shlex.quote(str(self.path))}#{shlex.quote(example)}",
        )


def _is_weight(tensor: Tensor) -> bool:
    """Whether a tensor may be one of a model's weights: an array of numbers that are not whole."""
    numbers = tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized
    return numbers and tensor.ndim > 0


def _odd(tensor: Tensor, *, shapes_alone: bool) -> tuple[str, str] | None:
    if tensor.is_nested:
        return "nested, of rows of different lengths", "Save each row as a tensor of its own"
    if tensor.layout != torch.strided:
        kind = str(tensor.layout).removeprefix("torch.")
        return f"sparse ({kind})", "Save it dense, as tensor.to_dense()"
    if shapes_alone:
        return "on the device meta, which holds no numbers", "Save it from where its numbers are"
    if not tensor.is_quantized and not _counts(tensor.dtype):
        kind = str(tensor.dtype).removeprefix("torch.")
        return f"{kind}, with which torch does not compute", "Dequantise it first, and save that"
    return None


@functools.cache
def _counts(dtype: torch.dtype) -> bool:
    """Whether torch makes other numbers of those of a type; of some it only keeps the bits."""
    try:
        torch.empty(1, dtype=dtype).to(torch.complex128)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _of_each_kind(wrong: Sequence[str]) -> list[str]:
    """Chooses the mismatches that are listed: names that are missing and unexpected, and shapes."""
    number = Counter[str]()
    order = []
    for place, phrase in enumerate(wrong):
        kind = phrase.partition(" ")[0]
        kind = kind if kind in {"missing", "unexpected"} else "other"
        order.append((number[kind], place))
        number[kind] += 1
    return [wrong[place] for place in sorted(place for _, place in sorted(order)[:_TOLD])]


def put_together(path: Path) -> str:
    """Returns how the parts of a DeepSpeed checkpoint become one file.

    Args:
        path: A file or a folder of it.

    Returns:
        The cure; an empty text where it is none.
    """
    folder = path if path.is_dir() else path.parent
    for place in (folder, folder.parent):
        script = place / "zero_to_fp32.py"
        if script.is_file():
            return (
                f"Put its parts together: python {shlex.quote(str(script))} "
                f"{shlex.quote(str(place))} FOLDER, and name the file that it writes"
            )
    if any(folder.glob("*zero_pp_rank_*.pt")):
        return "Put its parts together with DeepSpeed's zero_to_fp32.py, and name what it writes"
    return ""


def tied(weights: Weights) -> dict[str, list[str]]:
    """Finds the names that stand for one and the same tensor.

    Args:
        weights: A model's state dict, whose tied parameters share their memory.

    Returns:
        For each tied name, the other names of its tensor.
    """
    groups: dict[object, list[str]] = {}
    for name, tensor in weights.items():
        if tensor.numel():
            groups.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), []).append(name)
    return {
        name: [other for other in names if other != name]
        for names in groups.values()
        if len(names) > 1
        for name in names
    }
