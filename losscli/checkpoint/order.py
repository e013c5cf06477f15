"""Order the checkpoints of a path by training progress."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from functools import reduce
from itertools import compress, groupby
from operator import and_
from pathlib import Path

from torch import Tensor

from losscli.checkpoint.folders import list_checkpoints
from losscli.checkpoint.given import InMemoryCheckpoint
from losscli.checkpoint.names import sort_naturally, stem
from losscli.checkpoint.reading import read
from losscli.checkpoint.state import CheckpointFile
from losscli.weight_space.vectors import Weights, identical
from losscli.wording import list_first

__all__ = ["expand_folders", "order_path"]

# Prefixes and words of file names that state the position in training. Another known word may
# follow directly: bestmodel.pt, but not bestiary.pt.
_WORD_END = r"(?![a-z])|(?=acc|checkpoint|ckpt|epoch|loss|model|net|params|step|val|weights)"
_PREFIXES = (
    (re.compile(r"(?i:init)"), "first"),
    (re.compile(rf"(?i:final|last|latest)(?:{_WORD_END})"), "last"),
    (re.compile(rf"(?i:model_best|best)(?:{_WORD_END})"), "best"),
)
_WORDS = {"init": "first", "initial": "first", "final": "last", "last": "last", "latest": "last",
          "best": "best"}  # fmt: skip

# What a name may number its place in training by: a whole number, or one with an exponent. With a
# decimal it is the name of a metric, such as train_loss_epoch=0.52.
_KEYS = {
    key: re.compile(
        rf"(?i)(?<![a-z]){key}s?[-_= ]?"
        r"([0-9]+(?:\.[0-9]+)?e\+?[0-9]{1,3}(?![0-9])|[0-9]+(?!\.?[0-9]|e[-+]?[0-9]))"
    )
    for key in ("epoch", "step")
}

# What Lightning puts behind a name that is there already.
_VERSION = re.compile(r"-v[0-9]+$")

# Maximum number of names in a note.
_MAX_LISTED = 3


def expand_folders(names: Sequence[str]) -> list[str]:
    """Returns the names with each folder replaced by its checkpoints, in natural order.

    Raises:
        CheckpointError: A folder has no checkpoints.
    """
    return [found for name in names for found in _expand(name) or [name]]


def order_path(names: Sequence[str], *, keep_order: bool = False) -> tuple[list[str], list[str]]:
    """Lists the checkpoints of a path in the order of training.

    Names in lexicographic order where natural order differs (1, 10, 2: a shell pattern) are put
    into natural order. Where all numbered names tell an epoch or a step that no two share, that
    orders them (``val_loss=0.5-epoch=3``). In a folder ``init*`` comes first, ``final*`` and
    ``last*`` come last. If the folder has numbered files, ``best*`` and ``model_best*`` are left
    out, and a name of theirs without the number (``model.pt`` beside ``model_10.pt``) comes last
    too. What comes last is left out if it equals a numbered file.

    Args:
        names: Names of checkpoints and of folders of checkpoints.
        keep_order: Whether to keep the order of the names, and all files of a folder in natural
            order.

    Returns:
        The checkpoints, and a note on each change.

    Raises:
        CheckpointError: A folder has no checkpoints, or a final checkpoint cannot be read.
    """
    if keep_order:
        return expand_folders(names), []
    notes: list[str] = []
    objects = any(isinstance(name, InMemoryCheckpoint) for name in names)
    given, order = (list(names), "") if objects else _in_order(names)
    if given != list(names):
        notes.append(
            f"the checkpoints were named in the order of their characters (1, 10, 2), as a shell "
            f"lists them, and are taken in {order}: {list_first(given, _MAX_LISTED)}. --keep-order "
            "keeps the order of the names"
        )
    found: list[str] = []
    for name in given:
        files = _expand(name)
        if files:
            files, more = _in_training_order(files)
            notes += more
        found += files or [name]
    return found, notes


def _expand(name: str) -> list[str]:
    return [] if isinstance(name, InMemoryCheckpoint) else list_checkpoints(name)


def _in_order(names: Sequence[str]) -> tuple[list[str], str]:
    """Sorts names that a shell pattern gave, all of them or neighbours that differ in numbers.

    Returns:
        The names, and what they are in the order of.
    """
    groups = [list(group) for _, group in groupby(names, key=_masked)]
    if len(groups) > 1 and list(names) == sorted(names):
        return sort_naturally(names), "natural order"
    found, keys = [], ""
    for similar in groups:
        listed = similar in (sorted(similar), sorted(similar, key=_letters_and_digits))
        ordered, by = _by_keys(sort_naturally(similar)) if listed else (similar, "")
        found += ordered
        keys = keys or by
    return found, f"the order of {keys}" if keys else "natural order"


def _by_keys(names: list[str]) -> tuple[list[str], str]:
    """Sorts names in natural order by the epoch and the step that they contain.

    Returns:
        The names, and what they are sorted by. They stay as they are, sorted by nothing, if that is
        their order already, if not all contain it, or if several contain the same and are therefore
        not of one training.
    """
    files = [_file_name(name) for name in names]
    matches_by_key = {
        key: [pattern.search(file) for file in files] for key, pattern in _KEYS.items()
    }
    values = {
        key: [Decimal(match[1]) for match in matches if match]
        for key, matches in matches_by_key.items()
        if all(matches)
    }
    positions = list(zip(*values.values(), strict=True))
    unlike = {_VERSION.sub("", stem(file)) for file in files}
    if len(set(positions)) < len(unlike):
        return names, ""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    ordered = [names[i] for i in order]
    return (ordered, " and ".join(values)) if ordered != names else (names, "")


def _masked(name: str) -> str:
    """A name without the values of its numbers."""
    return re.sub(r"[0-9]+", "0", name)


def _letters_and_digits(name: str) -> str:
    """Removes case and punctuation, which many locales ignore at first."""
    return re.sub(r"[\W_]+", "", name).casefold()


def _in_training_order(files: Sequence[str]) -> tuple[list[str], list[str]]:
    """Moves files of a folder to the start or the end, or leaves them out, by their names."""
    positions = dict(
        zip(files, _training_positions([_file_name(name) for name in files]), strict=True)
    )
    first, final, best, steps = (
        [name for name in files if positions[name] == position]
        for position in ("first", "last", "best", "")
    )
    notes: list[str] = []
    last: list[str] = []
    unnumbered = list(compress(steps, _lack_number(list(map(_file_name, steps)))))
    steps = [name for name in steps if name not in unnumbered]
    numbered = [name for name in steps if re.search(r"[0-9]", _file_name(name))]
    numbered, keys = _by_keys(numbered)
    if keys:
        notes.append(
            f"{list_first(numbered, _MAX_LISTED)} are taken in the order of {keys}, and not in "
            "natural order, which --keep-order keeps"
        )
    if not numbered:
        last, steps = final, [name for name in files if positions[name] in {"best", ""}]
    else:
        for name in [*unnumbered, *final]:
            if duplicate := _find_duplicate(name, [*last, *reversed(numbered)]):
                notes.append(f"{name} is left out: it has the same weights as {duplicate}")
            else:
                last.append(name)
        if best:
            notes.append(
                f"{_join_with_verb(best)} left out: the best checkpoint of a training is a copy of "
                "one of its steps. Name it to take it, or give --keep-order"
            )
    ordered = [*first, *steps, *last]
    if ordered != [name for name in files if name in set(ordered)]:
        ends = ((first, "first"), (last, "last"))
        notes.append(
            " and ".join(f"{_join_with_verb(some)} taken {place}" for some, place in ends if some)
        )
    moved, by_key = set(numbered), iter(numbered)
    return [next(by_key) if name in moved else name for name in ordered], notes


def _file_name(name: str) -> str:
    """Returns the name of the file or folder, without its parents and ``#KEY``."""
    path = Path(name)
    return path.name if "#" not in name or path.exists() else Path(name.rpartition("#")[0]).name


def _join_with_verb(names: Sequence[str]) -> str:
    return f"{list_first(names, _MAX_LISTED)} {'is' if len(names) == 1 else 'are'}"


def _training_positions(files: Sequence[str]) -> list[str]:
    """Returns "first", "last", "best" or "" for each file name."""
    positions = []
    for file, has_number in zip(files, _have_numbers(files), strict=True):
        position = next((position for start, position in _PREFIXES if start.match(file)), "")
        # Words elsewhere in a name count if it has no distinctive number: resnet18-last.pt.
        if not position and not has_number:
            words = re.split(r"[\W_]+", file.lower())
            position = next((_WORDS[word] for word in words if word in _WORDS), "")
        positions.append(position)
    return positions


def _lack_number(files: Sequence[str]) -> list[bool]:
    """Whether each name is that of numbered files without the number: often the latest."""
    stems = [stem(file.lower()) for file in files]
    unnumbered = []
    for own, has_number in zip(stems, _have_numbers(files), strict=True):
        longer = [other.removeprefix(own) for other in stems if other.startswith(own)]
        # Of a model.pt: model10.pt, model_10.pt and model-epoch-10.pt, but not models_10.pt.
        numbered = [rest for rest in longer if re.match(r"(?![a-z]).*[0-9]", rest)]
        # Lightning writes a name-v1.ckpt after a name.ckpt.
        is_version = any(_VERSION.fullmatch(rest) for rest in numbered)
        unnumbered.append(bool(numbered) and not is_version and not has_number)
    return unnumbered


def _have_numbers(files: Sequence[str]) -> list[bool]:
    """Finds the names with a number of their own, which not all names share."""
    # A value may stand twice in a name, as in seed1_epoch1.pt; and names that differ in numbers
    # alone may have the same ones, as fold1_2.pt and fold2_1.pt.
    numbers = [Counter(re.findall(r"[0-9]+", file)) for file in files]
    common = reduce(and_, numbers) if numbers else Counter[str]()
    similar = Counter(map(_masked, files))
    return [
        bool(own - common) or similar[_masked(file)] > 1
        for file, own in zip(files, numbers, strict=True)
    ]


def _find_duplicate(name: str, others: Sequence[str]) -> str | None:
    """Returns the first of the other checkpoints that has the same weights, if any."""
    file = read(name)
    return next((other for other in others if _has_same_weights(file, read(other))), None)


def _has_same_weights(file: CheckpointFile, other: CheckpointFile) -> bool:
    """Whether another file has an equal state dict for each state dict of a file."""
    return all(
        any(
            weights.keys() == others.keys()
            and all(
                identical(_fetch_tensor(file, weights, n), _fetch_tensor(other, others, n))
                for n in weights
            )
            for others in other.model_candidates.values()
        )
        for weights in file.model_candidates.values()
    )


def _fetch_tensor(file: CheckpointFile, weights: Weights, name: str) -> Tensor:
    # Reads one tensor of a distributed checkpoint at a time.
    return file.fetch({name: weights[name]})[name]
