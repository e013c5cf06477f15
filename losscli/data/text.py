"""Text as sequences of tokens, cut one after the other."""

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

from losscli.data.memory import host_memory
from losscli.data.split import DataSet, Split
from losscli.errors import DataError, SpecError, one_line
from losscli.files import IrregularError, open_regular, read_regular

__all__ = ["IGNORED", "load_text", "read_texts"]

IGNORED = -100
"""The target of a position that is no part of the text, as transformers writes it."""

_TEXTS_AT_ONCE = 1000


def load_text(path: Path, /, *, tokenizer: str | Path = "bytes", context: int = 1024) -> DataSet:
    """Reads a text file as sequences of context tokens, none overlapping.

    Args:
        path: The file, in UTF-8, or with bytes for tokens of any kind; or a folder of SPLIT.txt.
        tokenizer: A Hugging Face tokenizer's folder, which adds no special tokens; or ``bytes``,
            for the ids 0…255.
        context: Tokens in a sequence; all of them where there are fewer.

    Returns:
        Inputs ``[S, context]``; the targets are the same tokens, and −100 at the padding of the
        last sequence. One token that is left over predicts nothing and is left out.

    Raises:
        DataError: The text or the tokenizer cannot be read.
    """
    if path.is_dir():
        files = {file.stem: file for file in sorted(path.glob("*.txt")) if file.is_file()}
        if not files:
            raise DataError(f"{path} holds no text files", "Name a file, or a folder of SPLIT.txt")
        # As everywhere, the training data come first.
        files = {split: files[split] for split in sorted(files, key=lambda split: split != "train")}
    elif path.is_file():
        files = {"data": path}
    elif path.exists():
        raise DataError(f"{path} is no regular file", "Name a text file on a disk")
    else:
        raise DataError(f"there is no text file {path}", f"Relative names start at {Path.cwd()}")
    read = read_texts(tokenizer, context)
    for file in files.values():
        # A token takes 8 bytes, and of bytes each is one.
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
    """Prepares to make sequences of texts.

    Args:
        tokenizer: A tokenizer's folder, or ``bytes``.
        context: Tokens in a sequence.

    Returns:
        What makes sequences of texts that follow each other, given them and their name.

    Raises:
        DataError: The tokenizer cannot be read.
        SpecError: The context is no number of tokens.
    """
    if type(context) is not int or context < 2:
        raise SpecError(
            f"context={context} is no number of tokens to predict from", "Give 2 or more"
        )
    padding, encode = (0, _bytes) if tokenizer == "bytes" else _tokenizer(Path(tokenizer))

    def read(texts: Sequence[bytes | str], where: str) -> Split:
        blocks = (texts[i : i + _TEXTS_AT_ONCE] for i in range(0, len(texts), _TEXTS_AT_ONCE))
        try:
            ids = [np.array(row, np.int64) for block in blocks for row in encode(block)]
        except UnicodeDecodeError as error:
            raise DataError(
                f"{where} is no text in UTF-8: {one_line(error)}",
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
    """Refuses pipes and devices among the files: from these the library would read without end."""
    for path in folder.iterdir():
        try:
            open_regular(path).close()
        except IrregularError as error:
            raise DataError(f"{path} cannot be read: {error}") from None
        except OSError:
            continue  # a folder; and of what cannot be opened the library has a word


def _require_printable(folder: Path) -> None:
    """Refuses keys that would steer a terminal: the library prints those that it does not know."""
    for name in ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"):
        try:
            content = json.loads(read_regular(folder / name))
        except (OSError, ValueError, RecursionError):
            continue  # the library has a word on it
        if name == "tokenizer.json":  # its vocabulary may have any keys
            content = content.get("added_tokens") if isinstance(content, dict) else None
        odd = next((key for key in _keys(content) if not key.isprintable()), None)
        if odd is not None:
            raise DataError(
                f"{folder / name} has the key {odd!r}",
                "Save the tokenizer with its save_pretrained(FOLDER)",
            )


def _keys(content: object) -> Iterator[str]:
    inner: Iterable[object] = content if isinstance(content, list) else ()
    if isinstance(content, dict):
        yield from content
        inner = content.values()
    for part in inner:
        yield from _keys(part)


def _tokenizer(folder: Path) -> tuple[int, Callable[[Sequence[bytes | str]], list[list[int]]]]:
    """Loads a tokenizer without network or code; gives its padding and what encodes texts."""
    if not folder.is_dir():
        raise DataError(
            f"there is no folder {folder} of a tokenizer",
            "Save yours with its save_pretrained(FOLDER), or write tokenizer=bytes",
        )
    try:
        from transformers import AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise DataError(
            f"tokenizers are read by transformers, which is not installed ({one_line(error)})",
            "pip install 'losscli[hf]'",
        ) from None
    _require_regular(folder)
    _require_printable(folder)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the library would write to stderr
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise DataError(
            f"{folder} holds no tokenizer that transformers reads: {one_line(error)}",
            "Save it with its save_pretrained(FOLDER)",
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    _require_vocabulary(folder, tokenizer)

    def encode(texts: Sequence[bytes | str]) -> list[list[int]]:
        decoded = [text.decode() if isinstance(text, bytes) else text for text in texts]
        # Not verbose: it would warn of texts longer than the model's context, which are cut here.
        encoded = tokenizer(
            decoded, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    return tokenizer.pad_token_id or 0, encode


def _require_vocabulary(folder: Path, tokenizer: Any) -> None:
    """Refuses a tokenizer that was made of a model's configuration alone, and knows no words."""
    # Some have none to read, such as that of bytes.
    own = tokenizer.vocab_files_names.values()
    there = [*folder.glob("tokenizer.*"), *(folder / name for name in (*own, "tekken.json"))]
    if own and not any(file.is_file() for file in there):
        names = ", ".join(dict.fromkeys(["tokenizer.json", *own]))
        raise DataError(
            f"{folder} holds no tokenizer: none of {names} is there",
            "Save the model's there with its save_pretrained(FOLDER), or name its own folder",
        )
