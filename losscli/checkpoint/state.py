"""Checkpoints, and checkpoint files from which a state dict is selected."""

from __future__ import annotations

import functools
import hashlib
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from losscli.checkpoint.advice import fitting_options
from losscli.checkpoint.names import (
    OPTIMISER,
    Part,
    StateDict,
    Versions,
    find_parts,
    module_state_under,
    tensors_under,
)
from losscli.checkpoint.quantised import find_quantisation
from losscli.checkpoint.saving import save
from losscli.errors import CheckpointError, MismatchError
from losscli.files import open_regular
from losscli.results.result import check_writable
from losscli.settings import PathLike, checked
from losscli.weight_space.vectors import Weights, mismatches

if TYPE_CHECKING:
    from losscli.checkpoint.adapters import Adapter

__all__ = ["Checkpoint", "CheckpointFile", "tied_names"]

_MAX_KEYS = 12

# Number of mismatched tensors that an error lists.
_MAX_LISTED = 3


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one model.

    Attributes:
        name: The name that the user gave.
        weights: The tensors under the model's names, memory-mapped if the format allows it.
        metadata: The metadata of the file, such as ``losscli.model``.
        path: The file or folder; None for an initialisation or an object.
        files: All files of the checkpoint.
        digest: The digest of the tensors, if the checkpoint was passed as a Python object.
        versions: The versions of the modules that saved the tensors.
        extra: The extra state of modules that is not a tensor, by key.
        parts: The files of each part, by ``MODULE=FILE``, if several files make up the model.
        missing: The tensors that it lacks, which have the model's initial values.
        unexpected: The tensors in the file that the model does not have, and that are ignored.
    """

    name: str
    weights: Weights
    metadata: Mapping[str, str]
    path: Path | None = None
    files: tuple[Path, ...] = ()
    digest: str | None = None
    versions: Versions = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    def __repr__(self) -> str:
        values = sum(tensor.numel() for tensor in self.weights.values())
        return f"<Checkpoint {self.name!r}: {values:,} values in {len(self.weights):,} tensors>"

    @checked()
    def save(self, path: PathLike, *, force: bool = False) -> None:
        """Writes the checkpoint to a file, with its metadata.

        Args:
            path: The file, .safetensors or .pt.
            force: Whether the file may be overwritten.

        Raises:
            UsageError: The path is a folder or has an unknown suffix.
            OutputError: The file exists or cannot be written, or its format cannot store what the
                model needs to load it.
        """
        file = Path(path)
        check_writable(file, force=force)
        save(self.weights, self.metadata, file, self.versions, self.extra)

    def sha256(self) -> str | None:
        """Computes the SHA-256 of the checkpoint.

        Returns:
            The hexadecimal digest: of the content, for a single file; of the names and digests in
            the format of ``sha256sum``, for several files or parts; of the tensors, for an object.
            None for an initialisation.

        Raises:
            CheckpointError: A file cannot be read any more.
        """
        files = self.files or ((self.path,) if self.path else ())
        if not files:
            return self.digest
        try:
            if self.parts:
                # With the modules, since two parts may be exchanged.
                parts = {label: _digest_of_all(each) for label, each in self.parts.items()}
                return _digest_of_list(parts)
            return _digest_of_all(files)
        except OSError as error:
            raise CheckpointError(f"{self.name}: {error.strerror}") from None

    def stamp(self) -> tuple[tuple[int, int, int], ...]:
        """Returns the inode, the size and the modification time in nanoseconds of each file.

        Raises:
            CheckpointError: A file does not exist any more.
        """
        try:
            states = [file.stat() for file in self.files]
        except OSError as error:
            raise CheckpointError(f"{self.name}: {error.strerror}") from None
        return tuple((s.st_ino, s.st_size, s.st_mtime_ns) for s in states)


def _digest(file: Path) -> str:
    with open_regular(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest_of_all(files: Sequence[Path]) -> str:
    if len(files) == 1:
        return _digest(files[0])
    return _digest_of_list({file.name: _digest(file) for file in files})


def _digest_of_list(digests: Mapping[str, str]) -> str:
    lines = sorted(f"{digest}  {name}\n" for name, digest in digests.items())
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _unchanged(weights: Weights) -> Weights:
    return weights


@dataclass(frozen=True)
class CheckpointFile:
    """The content of a checkpoint file or folder, which may have several state dicts.

    Attributes:
        name: The name that the user gave.
        path: The file or folder; None for a Python object.
        candidates: All state dicts in it by their dotted keys; ``""`` is the top level.
        metadata: The strings, numbers and booleans next to the state dicts.
        files: All files of the checkpoint.
        quantised: The quantisation method, if the checkpoint declares one.
        adapter: The adapter to apply to another checkpoint; None for a full model.
        fetch: Reads the selected tensors, if ``candidates`` has only their shapes.
        digest: The digest of the tensors of a Python object.
        live: Whether the tensors come from a module, which has loaded them already.
        parts: The checkpoint of each module, if several files make up the model.
    """

    name: str
    path: Path | None
    candidates: Mapping[str, Weights]
    metadata: Mapping[str, str]
    files: tuple[Path, ...]
    quantised: str | None = None
    adapter: Adapter | None = None
    fetch: Callable[[Weights], Weights] = _unchanged
    digest: str | None = None
    live: bool = False
    parts: Mapping[str, CheckpointFile] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The checkpoint folder, or the folder of the file; for an object, the current folder."""
        if self.path is None:
            return Path.cwd()
        path = self.path.resolve()
        return path if path.is_dir() else path.parent

    @property
    def where(self) -> str:
        """The path of the file or folder, or the name of the object."""
        return self.name if self.path is None else str(self.path)

    @property
    def model_candidates(self) -> Mapping[str, Weights]:
        """The state dicts that may hold a model.

        Optimiser state, states of random generators and scalars next to a state dict are left
        out, unless the file has nothing else.
        """
        others = {k: v for k, v in self.candidates.items() if not OPTIMISER.fullmatch(k)}
        dicts = {k: v for k, v in others.items() if any(map(_is_weight, v.values()))}
        # Single tensors next to a state dict, such as class weights, are not a model.
        sizes = {k: sum(t.numel() for t in v.values() if _is_weight(t)) for k, v in dicts.items()}
        flat = "." not in "".join(dicts.get("", ()))
        if flat and sizes.get("", 0) < max(sizes.values(), default=0):
            dicts.pop("", None)
        return dicts or others or self.candidates

    def at(self, key: str) -> CheckpointFile:
        """Returns the file with only the state dicts under a key.

        Args:
            key: The dotted key of a state dict, or a prefix of names inside one; empty for all.

        Raises:
            CheckpointError: No state dict matches the key.
        """
        if not key:
            return self
        candidates = self.candidates
        matching = {k: v for k, v in candidates.items() if k == key or k.startswith(f"{key}.")}
        if key in matching:
            matching = {key: matching[key]}
        if not matching:
            nested = (
                tensors_under(weights, key.removeprefix(f"{label}."))
                for label, weights in candidates.items()
                if not label or key.startswith(f"{label}.")
            )
            if weights := next(filter(None, nested), None):
                matching = {key: weights}
        if not matching:
            known = ", ".join(self._keys(key)) or "none"
            raise CheckpointError(
                f"{self.where} has no state dict under {key!r}", f"Its keys: {known}"
            )
        return replace(self, candidates=matching)

    def require_dense(self, label: str, weights: Weights) -> None:
        """Checks that the tensors of a state dict are dense and support arithmetic.

        Raises:
            CheckpointError: A tensor is sparse, nested, on ``meta`` (without values), or of a type
                without arithmetic.
        """
        for name, tensor in weights.items():
            shapes_only = tensor.is_meta and self.fetch is _unchanged
            if problem := _unsupported(tensor, shapes_only=shapes_only):
                description, fix = problem
                where = f"{self.name}#{label}" if label else self.name
                if len(self.candidates) > 1:
                    fix += f", or name another state dict of the file, {self.where}#KEY"
                raise CheckpointError(f"tensor {name!r} of {where} is {description}", fix)

    def _keys(self, wanted: str) -> list[str]:
        """Lists the keys of the state dicts and the first-level prefixes inside them."""
        labels = [k for k in self.candidates if k and not OPTIMISER.fullmatch(k)]
        steps = dict.fromkeys(
            f"{label}.{name.partition('.')[0]}".removeprefix(".")
            for label, weights in self.candidates.items()
            if not OPTIMISER.fullmatch(label)
            for name in weights
            if "." in name
        )
        # Keys that end like the wanted one come first.
        nested = sorted(
            (k for k in steps if k not in labels), key=lambda k: not f".{k}".endswith(f".{wanted}")
        )
        keys = [*labels, *nested]
        return keys if len(keys) <= _MAX_KEYS else [*keys[:_MAX_KEYS], "…"]

    def select(
        self,
        expected: Weights | None,
        base: Checkpoint | None = None,
        owner: str = "the model",
        model: nn.Module | None = None,
        optional: Collection[str] = (),
        *,
        ignore_unexpected: bool = False,
    ) -> Checkpoint:
        """Selects the state dict that fits a model and renames its tensors to the model's names.

        Args:
            expected: The state dict of the model. If None, the only state dict of the file is
                selected (optimiser state is ignored).
            base: The checkpoint that an adapter changes, with the model's names. If None, the
                tensors of the adapter itself are returned.
            owner: The owner of the expected tensors, for the errors.
            model: The model, into which some adapters are merged.
            optional: The names of expected tensors that may be missing.
            ignore_unexpected: Whether other tensors are ignored.

        Returns:
            The checkpoint.

        Raises:
            CheckpointError: Several state dicts fit, or the weights are quantised.
            MismatchError: No state dict fits; the message lists the mismatches of the most similar.
        """
        if self.adapter and base:
            return self._merge_adapter(base, expected, model)
        if expected is None:
            candidates = self.model_candidates
            if not candidates:
                self.refuse_quantised()
            if len(candidates) > 1:
                raise self.ambiguous(list(candidates), "No model is known here that would decide. ")
            (weights,) = candidates.values()
            return self.checkpoint(self.fetch(weights))
        self.refuse_quantised()
        # Extra state of modules need not be a tensor.
        expected = {name: t for name, t in expected.items() if isinstance(t, Tensor)}
        found = self._choose(expected, owner, optional, ignore_unexpected)
        unexpected = tuple(name for name in found if name not in expected)
        if unexpected:
            known = {name: t for name, t in found.items() if name in expected}
            found = StateDict(known, *module_state_under(found, ""))
        return replace(self.checkpoint(self.fetch(found)), unexpected=unexpected)

    def _choose(
        self, expected: Weights, owner: str, optional: Collection[str], ignore_unexpected: bool
    ) -> Weights:
        aliases = tied_names(expected)
        labelled = [
            (label, part)
            for label, candidate in self.candidates.items()
            for part in find_parts(candidate, expected, aliases, optional)
        ]
        matches = [
            (f"{label}.{part.prefix}".strip(".") if part.prefix else label, part)
            for label, part in labelled
            if part.holds
        ]
        if optional:
            # Of the parts that lack allowed tensors, those with the most of the model's.
            counts = [len(part.weights.keys() & expected.keys()) for _, part in matches]
            matches = [m for m, n in zip(matches, counts, strict=True) if n == max(counts)]
        if len(matches) > 1:
            raise self.ambiguous([label for label, _ in matches])
        if matches and (matches[0][1].fits or ignore_unexpected):
            return matches[0][1].weights
        others = [label for label in self.candidates if not OPTIMISER.fullmatch(label)]

        def similarity(labelled: tuple[str, Part]) -> tuple[bool, bool, int, int]:
            label, part = labelled
            common = len(part.weights.keys() & expected.keys())
            size = len(part.weights)
            return label in others, part.holds, common, -size if common else size

        label, part = max(labelled, key=similarity)
        empty = [not t.numel() and name in expected for name, t in part.weights.items()]
        if empty and all(empty) and any(t.numel() for t in expected.values()):
            raise MismatchError(
                f"the tensors of {self.name} are empty, as in one rank's part of a checkpoint of "
                "DeepSpeed ZeRO-3",
                (self.path and consolidation_hint(self.path))
                or "Name the checkpoint that has the weights",
            )
        wrong = mismatches(part.weights, expected)
        key = f"{label}.{part.prefix}".strip(".") if part.prefix else label
        name = f"{self.where}#{key}" if key and (len(others) > 1 or part.prefix) else self.name
        rest = f" and {len(wrong) - _MAX_LISTED:,} more" if len(wrong) > _MAX_LISTED else ""
        raise MismatchError(
            f"{name} does not fit {owner}: {'; '.join(_select_mismatches(wrong))}{rest}",
            option=fitting_options(part.weights, expected) or self._combination(expected),
        )

    def _combination(self, expected: Weights) -> str:
        """Names a file for each module of the model; empty if this file holds no module."""
        modules: dict[str, dict[str, Tensor]] = {}
        for name, tensor in expected.items():
            module, _, rest = name.partition(".")
            modules.setdefault(module, {})[rest] = tensor
        unused = list(self.parts.values()) or [self]
        found: dict[str, str] = {}
        for module, own in modules.items():
            aliases = tied_names(own)
            for file in unused:
                # A part of a state dict may fit by chance, such as one layer: not a module.
                if any(
                    part.fits and len(part.weights) == len(weights)
                    for weights in file.candidates.values()
                    for part in find_parts(weights, own, aliases)
                ):
                    found[module] = file.name
                    unused.remove(file)
                    break
        if not found:
            return ""
        return "+".join(f"{module}={found.get(module, 'FILE')}" for module in modules)

    def _merge_adapter(
        self, base: Checkpoint, expected: Weights | None, model: nn.Module | None
    ) -> Checkpoint:
        assert self.adapter is not None
        self.refuse_quantised()
        (tensors,) = self.candidates.values()
        aliases = tied_names({n: t for n, t in (expected or {}).items() if isinstance(t, Tensor)})
        weights = self.adapter.merge(base.weights, tensors, aliases, model)
        files = self.files + base.files
        return replace(base, name=self.name, weights=weights, path=self.path, files=files)

    def refuse_quantised(self) -> None:
        """Raises a CheckpointError if the weights are quantised: these cannot be interpolated."""
        found = self.quantised or next(
            filter(None, map(find_quantisation, self.candidates.values())), None
        )
        if found:
            raise CheckpointError(
                f"{self.name} is quantised ({found}), and quantised weights cannot be interpolated",
                "Give the checkpoint that it was made from, or dequantise it first",
            )

    def checkpoint(self, weights: Weights) -> Checkpoint:
        """Creates a checkpoint from tensors of this file."""
        parts = {
            f"{module}={Path(part.name).name}": part.files for module, part in self.parts.items()
        }
        return Checkpoint(
            self.name,
            weights,
            self.metadata,
            self.path,
            self.files,
            self.digest,
            *module_state_under(weights, ""),
            parts,
        )

    def ambiguous(self, labels: list[str], why: str = "") -> CheckpointError:
        """Returns the error for several state dicts; ``why`` says why none of them is selected."""
        names = ", ".join(repr(label) if label else "its top level" for label in labels)
        example = next(label for label in labels if label)
        if self.path is None:
            keys = "".join(f"[{key!r}]" for key in example.split("."))
            return CheckpointError(
                f"{self.name} contains several state dicts: {names}",
                f"{why}Give one, as {keys} of it",
            )
        return CheckpointError(
            f"{self.name} contains several state dicts: {names}",
            f"{why}Choose one, for example {shlex.quote(str(self.path))}#{shlex.quote(example)}",
        )


def _is_weight(tensor: Tensor) -> bool:
    """Whether a tensor may be a weight: floating-point, complex or quantised, and not a scalar."""
    numbers = tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized
    return numbers and tensor.ndim > 0


def _unsupported(tensor: Tensor, *, shapes_only: bool) -> tuple[str, str] | None:
    if tensor.is_nested:
        return "nested, of rows of different lengths", "Save each row as a tensor of its own"
    if tensor.layout != torch.strided:
        kind = str(tensor.layout).removeprefix("torch.")
        return f"sparse ({kind})", "Save it dense, as tensor.to_dense()"
    if shapes_only:
        return (
            "on the device meta, which holds no values",
            "Save it from a device that holds its values",
        )
    if not tensor.is_quantized and not _supports_arithmetic(tensor.dtype):
        kind = str(tensor.dtype).removeprefix("torch.")
        return f"{kind}, which torch cannot compute with", "Dequantise it first, and save that"
    return None


@functools.cache
def _supports_arithmetic(dtype: torch.dtype) -> bool:
    """Whether torch computes with a type. For some types it only stores the bits."""
    try:
        torch.empty(1, dtype=dtype).to(torch.complex128)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _select_mismatches(wrong: Sequence[str]) -> list[str]:
    """Selects the mismatches to list, with each kind (missing, unexpected, other) represented."""
    counts = Counter[str]()
    order = []
    for index, phrase in enumerate(wrong):
        kind = phrase.partition(" ")[0]
        kind = kind if kind in {"missing", "unexpected"} else "other"
        order.append((counts[kind], index))
        counts[kind] += 1
    return [wrong[index] for index in sorted(index for _, index in sorted(order)[:_MAX_LISTED])]


def consolidation_hint(path: Path) -> str:
    """Explains how to consolidate a DeepSpeed checkpoint; returns "" for other checkpoints."""
    folder = path if path.is_dir() else path.parent
    for location in (folder, folder.parent):
        script = location / "zero_to_fp32.py"
        if script.is_file():
            return (
                f"Put its parts together: python {shlex.quote(str(script))} "
                f"{shlex.quote(str(location))} FOLDER, and name the file that it writes"
            )
    if any(folder.glob("*zero_pp_rank_*.pt")):
        return "Put its parts together with DeepSpeed's zero_to_fp32.py, and name what it writes"
    return ""


def tied_names(weights: Weights) -> dict[str, list[str]]:
    """Returns for each tied name of a model's state dict the other names of its tensor."""
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
