"""Read single files: safetensors, and all formats of ``torch.save``."""

from __future__ import annotations

import json
import mmap
import pickletools
import re
import shlex
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from losscli.checkpoint.names import metadata_of, natural_key
from losscli.checkpoint.size_checks import (
    ARCHIVE_MAGIC,
    LEGACY_MAGIC,
    AmbiguousError,
    RepeatedError,
    SizeError,
)
from losscli.checkpoint.standins import load_tensors
from losscli.errors import CheckpointError, one_line
from losscli.files import open_regular, read_regular, refuse_placeholder

__all__ = ["SUFFIXES", "read_file", "read_json"]

SUFFIXES = (".safetensors", ".pt", ".pth", ".th", ".bin", ".ckpt", ".tar")

# For a shell, in single quotes. Saves the largest state dict, or that of a pickled module.
_RESAVE = (
    "import sys, torch, safetensors.torch as s; "
    'state = lambda x: x.state_dict() if hasattr(x, "state_dict") else x; '
    'c = state(torch.load(sys.argv[1], "cpu", weights_only=False)); '
    "tensors = lambda x: {k: v.clone(memory_format=torch.contiguous_format) for k, v in "
    "x.items() if torch.is_tensor(v)} if isinstance(x, dict) else {}; "
    "s.save_file(max([tensors(state(x)) for x in [c, *c.values()]], key=len), sys.argv[2])"
)


# The same for files of pickle.dump, which torch.load does not read. Also converts arrays.
_CONVERT = (
    "import sys, pickle, torch; "
    'c = pickle.load(open(sys.argv[1], "rb")); '
    "t = lambda x: {k: t(v) for k, v in x.items()} if isinstance(x, dict) else "
    'torch.as_tensor(x) if hasattr(x, "__array__") else x; '
    'torch.save(t(c.state_dict() if hasattr(c, "state_dict") else c), sys.argv[2])'
)


def read_file(path: Path, name: str) -> tuple[Any, dict[str, str]]:
    """Returns the content and the metadata of a checkpoint file, without running code in it.

    The metadata are the strings, numbers and booleans at the top level.

    Raises:
        CheckpointError: The file is not a checkpoint, or needs code to run.
    """
    read = _read_safetensors if path.suffix == ".safetensors" else _read_torch
    return read(path, name)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file of a checkpoint.

    Raises:
        CheckpointError: The file cannot be read, or has no JSON object.
    """
    try:
        content = json.loads(read_regular(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not valid JSON: {one_line(error)}",
            "It may be incomplete: save or copy it again",
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} contains no JSON object", "It may belong to another program")
    return content


def _read_safetensors(path: Path, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        # Opened first, since safetensors reports a file without read permission as missing.
        with open_regular(path), safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            # The file has them sorted by element size and then lexicographically.
            keys = sorted(file.keys(), key=natural_key)
            return {key: file.get_tensor(key) for key in keys}, metadata
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error.strerror or error}") from None
    except (TypeError, OverflowError):  # the message is a stack trace of torch
        raise CheckpointError(
            f"{name} has a tensor of a shape that torch cannot make",
            "It may belong to another program",
        ) from None
    except (SafetensorError, RuntimeError, ValueError) as error:
        refuse_placeholder(path, name, CheckpointError)
        raise CheckpointError(
            f"{name} is not a valid safetensors file: {one_line(error)}",
            "It may be incomplete: save or copy it again",
        ) from None


def _read_torch(path: Path, name: str) -> tuple[Any, dict[str, str]]:
    try:
        with open_regular(path) as file:
            magic = file.read(4)
        if magic == ARCHIVE_MAGIC and _is_utf8(path):
            content = load_tensors(path, mmap=True)
        elif magic == ARCHIVE_MAGIC:
            with open_regular(path) as file:
                content = load_tensors(file)
        elif magic != b"GGUF":
            with _mapped(path) as file:
                content = load_tensors(file)
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # noqa: BLE001 - a broken file makes the unpickler raise anything
        refuse_placeholder(path, name, CheckpointError)
        raise _unreadable(name, path, error) from None
    if magic == b"GGUF":
        raise CheckpointError(
            f"{name} is a GGUF file for llama.cpp, which is usually quantised",
            "Give the checkpoint that it was made from",
        )
    return content, metadata_of(content)


@contextmanager
def _mapped(path: Path) -> Iterator[Any]:
    """Maps a file into memory, since reading allocates memory for any length in the file."""
    with (
        open_regular(path) as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        yield mapped


def _is_utf8(path: Path) -> bool:
    """Whether a path is valid UTF-8, which torch needs to map the file."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_truncated(path: Path) -> bool:
    """Whether a file ends inside a pickle, so that a name in it may be incomplete."""
    try:
        with _mapped(path) as file:
            if file[:4] == ARCHIVE_MAGIC:  # an archive has its directory at the end
                return False
            # In the old format, three small pickles (first the magic number) precede the content.
            pickles = 1
            for number in range(4):
                for _, value, _ in pickletools.genops(file):
                    if number == 0 and value == LEGACY_MAGIC:
                        pickles = 4
                if number + 1 == pickles:
                    break
    except (OSError, ValueError):
        return True
    return False


def _is_plain_pickle(path: Path) -> bool:
    """Whether a file is a pickle that torch.save did not write."""
    try:
        with _mapped(path) as file:
            if file[:1] != b"\x80":
                return False
            values = [value for _, value, _ in pickletools.genops(file)]
    except (OSError, ValueError):
        return False
    return LEGACY_MAGIC not in values


def _is_exported(path: Path) -> bool:
    """Whether a file was written by ``torch.export.save`` of any version."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return False
    ends = {name.rpartition("/")[2] for name in names}
    return "archive_format" in ends or "serialized_exported_program.json" in ends


def _unreadable(name: str, path: Path, error: Exception) -> CheckpointError:
    if _is_exported(path):
        return CheckpointError(
            f"{name} is a torch.export program, which is a model and not a checkpoint",
            f"Use it as the model, -m {shlex.quote(f'pt2:{path}')}, with checkpoints of its "
            "weights",
        )
    if isinstance(error, RepeatedError):
        return CheckpointError(f"{name} has {error}", "Save it as tensor.contiguous()")
    if isinstance(error, AmbiguousError):
        return CheckpointError(
            f"{name} is an ambiguous archive: {error}",
            "Save it again with torch.save",
        )
    if isinstance(error, SizeError):
        return CheckpointError(
            f"{name} declares more data than it contains: {error}",
            "It may be incomplete: save or copy it again",
        )
    text = str(error)
    # The error of the unpickler contains the refused name in one of these forms.
    wanted = re.search(r"GLOBAL ([\w.]+)|[Cc]lass ([\w.]+)|function ([\w.]+)", text)
    problem = ""
    if "weights_only" not in text.lower().replace(" ", "_") or "invalid load" in text:
        wanted = None
    if wanted and not _is_truncated(path):
        problem = f"is a pickle that would run code ({next(filter(None, wanted.groups()))})"
    elif "TorchScript" in text:
        problem = "is a TorchScript program, which is code"
    elif "operand 149" in text:
        # 149 is the opcode FRAME, which pickles of protocol 4 or higher have.
        problem = "is a pickle of a protocol that torch reads only together with code"
    is_plain = _is_plain_pickle(path)
    if problem or is_plain:
        problem = problem or "is a pickle that torch.save did not write"
        suffix, script = ("pt", _CONVERT) if is_plain else ("safetensors", _RESAVE)
        target = path.with_name(f"{path.stem}-weights.{suffix}")
        return CheckpointError(
            f"{name} {problem}; nothing was run",
            "If you trust it, save its state dict again: "
            f"python -c '{script}' {shlex.quote(str(path))} {shlex.quote(str(target))}",
        )
    return CheckpointError(
        f"{name} is not a checkpoint that torch can read ({type(error).__name__})",
        f"Known suffixes are {', '.join(SUFFIXES)}; it may be incomplete: save or copy it again",
    )
