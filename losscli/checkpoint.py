"""From file to checkpoint and back: the only room that unwraps, strips prefixes, reads pickles."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shlex
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from losscli.errors import CheckpointError, MismatchError, OutputError, one_line
from losscli.weights import Weights, mismatches

__all__ = ["Checkpoint", "CheckpointFile", "in_folder", "read", "save", "tied"]

SUFFIXES = (".safetensors", ".pt", ".pth", ".th", ".bin", ".ckpt", ".tar")

# Wrappers that put a prefix before every name: DataParallel and DDP, torch.compile, Lightning.
_PREFIXES = ("module.", "_orig_mod.", "model.")

# State dicts of torch's optimisers number their parameters; others go by the key's name.
_OPTIMISER = re.compile(r"(.*\.)?state\.\d+|optim(i[sz]ers?)?(_states?(_dict)?)?(\..*)?", re.DOTALL)

# For a shell, in single quotes: takes the largest state dict, or that of a whole module.
_RESAVE = (
    "import sys, torch, safetensors.torch as s; "
    'state = lambda x: x.state_dict() if hasattr(x, "state_dict") else x; '
    'c = state(torch.load(sys.argv[1], "cpu", weights_only=False)); '
    "tensors = lambda x: {k: v.clone(memory_format=torch.contiguous_format) for k, v in "
    "x.items() if torch.is_tensor(v)} if isinstance(x, dict) else {}; "
    "s.save_file(max([tensors(state(x)) for x in [c, *c.values()]], key=len), sys.argv[2])"
)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one model.

    Attributes:
        name: How the user named it.
        weights: Its tensors under the model's names, memory-mapped where the format allows it.
        metadata: What the file says of itself, ``losscli.model`` and the like.
        path: The file it came from; None for an initialisation.
    """

    name: str
    weights: Weights
    metadata: Mapping[str, str]
    path: Path | None = None

    def sha256(self) -> str | None:
        """Digests the file.

        Returns:
            The SHA-256 of its bytes in hexadecimal; None for an initialisation.

        Raises:
            CheckpointError: The file can no longer be read.
        """
        if self.path is None:
            return None
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{self.name}: {error.strerror}") from None


@dataclass(frozen=True)
class CheckpointFile:
    """A file as it was read, in which one state dict is still to be chosen.

    Attributes:
        name: How the user named it.
        path: Where it lies.
        candidates: Every mapping of names to tensors in it, by the dotted keys that lead to it;
            ``""`` is the file itself.
        metadata: The plain values beside them.
    """

    name: str
    path: Path
    candidates: Mapping[str, Weights]
    metadata: Mapping[str, str]

    def select(self, expected: Weights | None) -> Checkpoint:
        """Chooses the state dict that fits a model, its names made the model's.

        Args:
            expected: The model's own state dict; None where no model is known. Then the file's
                only state dict is taken, optimiser state aside.

        Returns:
            The checkpoint.

        Raises:
            CheckpointError: Two state dicts fit, or, without a model, there are several.
            MismatchError: None fits; the text names every tensor that does not match the best.
        """
        others = {k: v for k, v in self.candidates.items() if not _OPTIMISER.fullmatch(k)}
        if expected is None:
            candidates = others or self.candidates
            if len(candidates) > 1:
                raise self._ambiguous(list(candidates))
            (weights,) = candidates.values()
            return self._checkpoint(weights)
        # Modules may keep state beside their tensors, of which nothing can be interpolated.
        expected = {name: t for name, t in expected.items() if isinstance(t, Tensor)}
        aliases = tied(expected)
        fits: dict[str, Weights] = {}
        best: tuple[tuple[bool, int, int], str, list[str]] | None = None
        for label, candidate in self.candidates.items():
            for renamed in _renamings(candidate):
                filled = _fill(renamed, aliases)
                wrong = mismatches(filled, expected)
                if not wrong:
                    fits[label] = filled
                    break
                common = len(filled.keys() & expected.keys())
                likeness = label in others, common, -len(wrong) if common else len(filled)
                if best is None or likeness > best[0]:
                    best = likeness, label, wrong
        if len(fits) > 1:
            raise self._ambiguous(list(fits))
        if not fits and best:
            _, label, wrong = best
            name = f"{self.path}#{label}" if label and len(others) > 1 else self.name
            raise MismatchError(f"{name} does not fit the model: {'; '.join(wrong)}")
        (weights,) = fits.values()
        return self._checkpoint(weights)

    def _checkpoint(self, weights: Weights) -> Checkpoint:
        return Checkpoint(self.name, weights, self.metadata, self.path)

    def _ambiguous(self, labels: list[str]) -> CheckpointError:
        names = ", ".join(repr(label) if label else "its top level" for label in labels)
        example = next(label for label in labels if label)
        return CheckpointError(
            f"{self.name} holds several state dicts: {names}",
            f"Choose one, for example {shlex.quote(str(self.path))}#{shlex.quote(example)}",
        )


def in_folder(name: str) -> list[str]:
    """Lists the checkpoints in a folder.

    Args:
        name: A name as a user gives it.

    Returns:
        Its files with the suffixes of checkpoints in natural order, step-9 before step-10; none
        where the name is not that of a folder.

    Raises:
        CheckpointError: It is a folder without such files, or cannot be read.
    """
    folder = Path(name)
    try:
        # init:SEED is no folder, whatever there is.
        if name.startswith("init:") or not folder.is_dir():
            return []
        files = [
            path
            for path in folder.iterdir()
            if path.suffix in SUFFIXES and not path.name.startswith(".") and path.is_file()
        ]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name} cannot be read: {one_line(error)}") from None
    if not files:
        raise CheckpointError(
            f"the folder {name} holds no checkpoints", f"Their names end in {', '.join(SUFFIXES)}"
        )
    return [str(path) for path in sorted(files, key=lambda path: _natural(path.name))]


def _natural(name: str) -> list[tuple[int, int | str]]:
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part)) if i % 2 else (1, part) for i, part in enumerate(parts)]


def read(name: str) -> CheckpointFile:
    """Reads a checkpoint file without running anything that it holds.

    Args:
        name: ``FILE`` or ``FILE#KEY``.

    Returns:
        The file, memory-mapped where its format allows it.

    Raises:
        CheckpointError: There is no such file, it is no checkpoint, it wants code to be run, or
            it has no such key.
    """
    path, key = _locate(name)
    if path.suffix == ".safetensors":
        content, metadata = _read_safetensors(path, name)
    else:
        content, metadata = _read_torch(path, name)
    candidates = dict(_state_dicts(content))
    if key:
        inside = {k: v for k, v in candidates.items() if k == key or k.startswith(f"{key}.")}
        if not inside:
            known = ", ".join(k for k in candidates if k and not _OPTIMISER.fullmatch(k)) or "none"
            raise CheckpointError(f"{path} has no state dict under {key!r}", f"Its keys: {known}")
        candidates = {key: inside[key]} if key in inside else inside
    if not candidates:
        raise CheckpointError(
            f"{name} holds no tensors under names", "Save the model's state_dict() in it"
        )
    return CheckpointFile(name, path, candidates, metadata)


def save(weights: Weights, metadata: Mapping[str, str], path: Path) -> None:
    """Writes a checkpoint as safetensors, whole or not at all.

    Args:
        weights: The tensors.
        metadata: What the file shall say of itself.
        path: The file, replaced if it exists.

    Raises:
        OutputError: The file cannot be written.
    """
    if not path.name:
        raise OutputError(f"{path} is a folder", "Name a file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # An empty file first, for the permissions that files have here: safetensors sets its own.
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(_apart(weights), temporary, dict(metadata))
        temporary.chmod(mode)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from None
    except (SafetensorError, ValueError, RuntimeError, KeyError) as error:
        raise OutputError(f"{path} cannot be written: {one_line(error)}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def tied(weights: Weights) -> dict[str, list[str]]:
    """Finds the names that stand for one and the same tensor.

    Args:
        weights: A model's state dict, whose tied parameters share their memory.

    Returns:
        For each tied name, the other names of its tensor.
    """
    groups: dict[tuple[int, torch.Size, tuple[int, ...]], list[str]] = {}
    for name, tensor in weights.items():
        if tensor.numel():
            groups.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), []).append(name)
    return {
        name: [other for other in names if other != name]
        for names in groups.values()
        if len(names) > 1
        for name in names
    }


def _apart(weights: Weights) -> dict[str, Tensor]:
    """Gives every tensor memory of its own, in order, as safetensors needs it."""
    seen: set[int] = set()
    own = {}
    for name, tensor in weights.items():
        own[name] = (
            tensor.contiguous().clone() if tensor.data_ptr() in seen else tensor.contiguous()
        )
        seen.add(tensor.data_ptr())
    return own


def _locate(name: str) -> tuple[Path, str]:
    """Splits FILE#KEY; a file whose own name has a # in it comes first."""
    path, key = Path(name), ""
    try:
        if not path.exists() and "#" in name:
            file, _, key = name.rpartition("#")
            path = Path(file)
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder, not a checkpoint file", "Name a file in it")
        if not path.exists():
            raise CheckpointError(
                f"there is no checkpoint {name}", f"Relative names start at {Path.cwd()}"
            )
        if path.stat().st_size == 0:
            raise CheckpointError(f"{path} is empty", "Was its writing cut off?")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{name} cannot be read: {reason}") from None
    return path, key


def _read_safetensors(path: Path, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        # safetensors takes a file that may not be read for a missing one.
        with path.open("rb"), safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error.strerror or error}") from None
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{name} is no whole safetensors file: {one_line(error)}",
            "Was its writing cut off?",
        ) from None


def _read_torch(path: Path, name: str) -> tuple[Any, dict[str, str]]:
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        with warnings.catch_warnings():
            # What torch has to say of old formats is of no use to the reader of a curve.
            warnings.simplefilter("ignore")
            content = torch.load(
                path if _is_utf8(path) else io.BytesIO(path.read_bytes()),
                map_location="cpu",
                weights_only=True,
                mmap=is_zip and _is_utf8(path),
            )
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # noqa: BLE001 - a broken file makes the unpickler raise anything
        raise _unreadable(name, path, error) from None
    plain = content.items() if isinstance(content, Mapping) else ()
    metadata = {
        str(key): str(value) for key, value in plain if isinstance(value, str | int | float | bool)
    }
    return content, metadata


def _is_utf8(path: Path) -> bool:
    """Whether torch, which maps files by their names in UTF-8, can map this one."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _unreadable(name: str, path: Path, error: Exception) -> CheckpointError:
    text = str(error)
    # The unpickler's refusal names what the pickle wanted to import, in one of these forms.
    wanted = re.search(r"GLOBAL ([\w.]+)|[Cc]lass ([\w.]+)|function ([\w.]+)", text)
    thing = ""
    if "weights_only" in text.lower().replace(" ", "_") and wanted and "invalid load" not in text:
        thing = f"is a pickle that wants to run code ({next(filter(None, wanted.groups()))})"
    elif "TorchScript" in text:
        thing = "is a TorchScript program, which is code"
    elif "operand 149" in text:
        # Where the opcode FRAME stands, the pickle is of protocol 4 or above.
        thing = "is a pickle of a protocol that torch reads only together with code"
    if thing:
        target = path.with_name(f"{path.stem}-weights.safetensors")
        return CheckpointError(
            f"{name} {thing}; none of it was run",
            "If you trust it, save its state dict again: "
            f"python -c '{_RESAVE}' {shlex.quote(str(path))} {shlex.quote(str(target))}",
        )
    return CheckpointError(
        f"{name} is no checkpoint that torch can read ({type(error).__name__})",
        f"Known suffixes are {', '.join(SUFFIXES)}; was its writing cut off?",
    )


def _state_dicts(content: Any, label: str = "", depth: int = 0) -> Iterator[tuple[str, Weights]]:
    """Yields every mapping in a file that holds tensors under names, outermost first."""
    if not isinstance(content, Mapping) or depth > 4:
        return
    # Plain tensors only: sub-classes such as quantised ones are told apart further on.
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if tensors:
        yield label, {k: v.detach() for k, v in tensors.items()}
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _state_dicts(value, f"{label}.{key}" if label else str(key), depth + 1)


def _renamings(weights: Weights) -> Iterator[Weights]:
    """Yields a state dict as it is, then with the prefixes of wrappers taken off one by one."""
    bare = dict(weights)
    while True:
        yield bare
        # torch.compile of a part of a model leaves its mark inside the names.
        inner = {name.replace("_orig_mod.", ""): tensor for name, tensor in bare.items()}
        if inner.keys() != bare.keys() and len(inner) == len(bare):
            yield inner
        prefix = next((p for p in _PREFIXES if all(n.startswith(p) for n in bare)), None)
        if prefix is None:
            return
        bare = {name.removeprefix(prefix): tensor for name, tensor in bare.items()}


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
