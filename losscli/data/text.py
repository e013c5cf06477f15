"""Text files as consecutive sequences of tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from losscli.checkpoint.renaming import silent
from losscli.data.memory import host_memory
from losscli.data.split import DataSet, Split
from losscli.errors import DataError, SpecError, one_line
from losscli.files import IrregularError, open_regular, read_regular

__all__ = ["IGNORED", "load_text", "read_texts"]

IGNORED = -100
"""The target of a padding position, as in transformers."""

# Number of texts per call of the tokenizer.
_TEXTS_PER_CALL = 1000


def load_text(path: Path, /, *, tokenizer: str | Path = "bytes", context: int = 1024) -> DataSet:
    """Reads a text file as non-overlapping sequences of ``context`` tokens.

    Args:
        path: The file, in UTF-8, or any file with ``bytes``; or a folder of SPLIT.txt files.
        tokenizer: Folder of a Hugging Face tokenizer, used without special tokens; or ``bytes``
            for byte values as token ids.
        context: Number of tokens per sequence; the length of the text if it is shorter.

    Returns:
        Inputs ``[S, context]`` and targets with the same tokens, −100 at the padding of the last
        sequence. A last sequence of one token predicts nothing and is dropped.

    Raises:
        DataError: The text or the tokenizer cannot be read.
    """
    if path.is_dir():
        files = {file.stem: file for file in sorted(path.glob("*.txt")) if file.is_file()}
        if not files:
            raise DataError(
                f"{path} contains no text files", "Name a file, or a folder of SPLIT.txt"
            )
        # The training data come first, as in all formats.
        files = {split: files[split] for split in sorted(files, key=lambda split: split != "train")}
    elif path.is_file():
        files = {"data": path}
    elif path.exists():
        raise DataError(f"{path} is not a regular file", "Name a text file on a disk")
    else:
        raise DataError(f"there is no text file {path}", f"Relative paths start at {Path.cwd()}")
    read = read_texts(tokenizer, context)
    for file in files.values():
        # A token takes 8 bytes, and each byte is a token of the byte tokenizer.
        size, memory = file.stat().st_size, host_memory()
        if (need := size * (8 if tokenizer == "bytes" else 1)) > memory:
            raise DataError(
                f"{file} has {size:,} bytes, which take at least {need:,} in memory, and there are "
                f"{memory:,}",
                "Name a part of it, such as one of head -c 10000000",
            )
    return DataSet(
        {split: read([_content(file)], str(file)) for split, file in files.items()}, language=True
    )


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {one_line(error)}") from None


def read_texts(
    tokenizer: str | Path, context: int
) -> Callable[[Sequence[bytes | str], str], Split]:
    """Returns a function of consecutive texts and their name in errors that tokenizes them.

    Args:
        tokenizer: Folder of a tokenizer, or ``bytes``.
        context: Number of tokens per sequence.

    Raises:
        DataError: The tokenizer cannot be read.
        SpecError: ``context`` is not an integer above 1.
    """
    if type(context) is not int or context < 2:
        raise SpecError(
            f"context={context} is not a number of tokens to predict from", "Give 2 or more"
        )
    padding, encode = (0, _bytes) if tokenizer == "bytes" else _tokenizer(Path(tokenizer))

    def read(texts: Sequence[bytes | str], where: str) -> Split:
        blocks = (texts[i : i + _TEXTS_PER_CALL] for i in range(0, len(texts), _TEXTS_PER_CALL))
        try:
            ids = [np.array(row, np.int64) for block in blocks for row in encode(block)]
        except UnicodeDecodeError as error:
            raise DataError(
                f"{where} is not UTF-8 text: {one_line(error)}",
                "Convert it, or read it with tokenizer=bytes",
            ) from None
        count = sum(map(len, ids))
        if count < 2:
            raise DataError(
                f"{where} has {'one token' if count else 'no text'}",
                "Two tokens are needed to predict one",
            )
        return _sequences(torch.from_numpy(np.concatenate(ids)), context, padding)

    return read


def _sequences(ids: Tensor, context: int, padding: int) -> Split:
    context = min(context, len(ids))
    if len(ids) % context == 1:
        ids = ids[:-1]
    missing = -len(ids) % context
    inputs = F.pad(ids, (0, missing), value=padding).view(-1, context)
    targets = F.pad(ids, (0, missing), value=IGNORED).view(-1, context)
    return Split(inputs, targets)


def _bytes(texts: Sequence[bytes | str]) -> Iterable[npt.ArrayLike]:
    for text in texts:
        yield np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8)


def _require_regular(folder: Path) -> None:
    """Refuses FIFOs and devices, on which the library would block."""
    for path in folder.iterdir():
        try:
            open_regular(path).close()
        except IrregularError as error:
            raise DataError(f"{path} cannot be read: {error}") from None
        except OSError:
            continue  # a folder, or a file that the library reports as unreadable


def _require_printable(folder: Path) -> None:
    """Refuses keys with control characters, since the library prints unknown keys."""
    for name in ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"):
        try:
            content = json.loads(read_regular(folder / name))
        except (OSError, ValueError, RecursionError):
            continue  # the library reports it
        if name == "tokenizer.json":  # its vocabulary may have any keys
            content = content.get("added_tokens") if isinstance(content, dict) else None
        unprintable = next((key for key in _keys(content) if not key.isprintable()), None)
        if unprintable is not None:
            raise DataError(
                f"{folder / name} has the key {unprintable!r}",
                "Save the tokenizer with its save_pretrained(FOLDER)",
            )


def _keys(content: object) -> Iterator[str]:
    children: Iterable[object] = content if isinstance(content, list) else ()
    if isinstance(content, dict):
        yield from content
        children = content.values()
    for child in children:
        yield from _keys(child)


def _tokenizer(folder: Path) -> tuple[int, Callable[[Sequence[bytes | str]], list[list[int]]]]:
    """Loads a tokenizer without network or code; returns its padding id and encoder."""
    if not folder.is_dir():
        raise DataError(
            f"there is no folder {folder} of a tokenizer",
            "Save yours with its save_pretrained(FOLDER), or write tokenizer=bytes",
        )
    try:
        import transformers
    except ImportError as error:
        raise DataError(
            f"tokenizers are read by transformers, which is not installed ({one_line(error)})",
            "pip install 'losscli[hf]'",
        ) from None
    _require_regular(folder)
    _require_printable(folder)
    try:
        with silent(transformers):
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:
        raise DataError(
            f"{folder} contains no tokenizer that transformers can read: {one_line(error)}",
            "Save it with its save_pretrained(FOLDER)",
        ) from error
    _require_vocabulary(folder, tokenizer)

    def encode(texts: Sequence[bytes | str]) -> list[list[int]]:
        decoded = [text.decode() if isinstance(text, bytes) else text for text in texts]
        # With verbose, it would warn about texts longer than the context of the model.
        encoded = tokenizer(
            decoded, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    return tokenizer.pad_token_id or 0, encode


def _require_vocabulary(folder: Path, tokenizer: Any) -> None:
    """Refuses a tokenizer without vocabulary, constructed from a model configuration only."""
    # Some tokenizers, such as those of bytes, have no vocabulary file.
    vocabulary = tokenizer.vocab_files_names.values()
    names = (*vocabulary, "tekken.json")
    candidates = [*folder.glob("tokenizer.*"), *(folder / name for name in names)]
    if vocabulary and not any(file.is_file() for file in candidates):
        expected = ", ".join(dict.fromkeys(["tokenizer.json", *vocabulary]))
        raise DataError(
            f"{folder} contains no tokenizer: none of {expected} is there",
            "Save the model's there with its save_pretrained(FOLDER), or name its own folder",
        )
