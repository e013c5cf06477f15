"""The order of checkpoints on a path: that of training, not that of a shell or a folder."""

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

from losscli.checkpoint.folders import in_folder
from losscli.checkpoint.given import Given
from losscli.checkpoint.names import naturally, stem
from losscli.checkpoint.reading import read
from losscli.checkpoint.state import CheckpointFile
from losscli.weight_space.vectors import Weights, equal

__all__ = ["all_in", "path_of"]

# What the beginning of a name, or a word in it, says about the place in training. A word may run
# into another of these: bestmodel.pt, but not bestiary.pt.
_MORE = r"(?![a-z])|(?=acc|checkpoint|ckpt|epoch|loss|model|net|params|step|val|weights)"
_STARTS = (
    (re.compile(r"(?i:init)"), "first"),
    (re.compile(rf"(?i:final|last|latest)(?:{_MORE})"), "last"),
    (re.compile(rf"(?i:model_best|best)(?:{_MORE})"), "best"),
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
_AGAIN = re.compile(r"-v[0-9]+$")

# So many names are listed in a note.
_LISTED = 3


def all_in(names: Sequence[str]) -> list[str]:
    """Lists a set of checkpoints.

    Args:
        names: Names of checkpoints and of folders of checkpoints.

    Returns:
        The checkpoints, those of each folder in natural order.

    Raises:
        CheckpointError: A folder holds no checkpoints.
    """
    return [found for name in names for found in _files(name) or [name]]


def path_of(names: Sequence[str], *, keep_order: bool = False) -> tuple[list[str], list[str]]:
    """Lists the checkpoints of a path in the order of training.

    Names in lexicographic order where natural order differs (1, 10, 2: a shell pattern) are put
    into natural order. Where all numbered names tell an epoch or a step that no two share, that
    orders them (``val_loss=0.5-epoch=3``). In a folder ``init*`` comes first, ``final*`` and
    ``last*`` come last. If the folder has numbered files, ``best*`` and ``model_best*`` are left
    out, and a name of theirs without the number (``model.pt`` beside ``model_10.pt``) comes last
    too. What comes last is left out if it equals a numbered file.

    Args:
        names: Names of checkpoints and of folders of checkpoints.
        keep_order: Keep names as they are given, and all files of a folder in natural order.

    Returns:
        The checkpoints, and a note on each change.

    Raises:
        CheckpointError: A folder holds no checkpoints, or a final checkpoint cannot be read.
    """
    if keep_order:
        return all_in(names), []
    notes: list[str] = []
    objects = any(isinstance(name, Given) for name in names)
    given, order = (list(names), "") if objects else _in_order(names)
    if given != list(names):
        notes.append(
            f"the checkpoints were named in the order of their characters (1, 10, 2), as a shell "
            f"lists them, and are taken in {order}: {_listed(given)}. --keep-order keeps the "
            "order of the names"
        )
    found: list[str] = []
    for name in given:
        files = _files(name)
        if files:
            files, more = _in_training_order(files)
            notes += more
        found += files or [name]
    return found, notes


def _files(name: str) -> list[str]:
    return [] if isinstance(name, Given) else in_folder(name)


def _in_order(names: Sequence[str]) -> tuple[list[str], str]:
    """Sorts names that a shell pattern gave, all of them or neighbours that differ in numbers.

    Returns:
        The names, and what they are in the order of.
    """
    groups = [list(group) for _, group in groupby(names, key=_masked)]
    if len(groups) > 1 and list(names) == sorted(names):
        return naturally(names), "natural order"
    found, keys = [], ""
    for alike in groups:
        listed = alike in (sorted(alike), sorted(alike, key=_letters))
        ordered, by = _by_keys(naturally(alike)) if listed else (alike, "")
        found += ordered
        keys = keys or by
    return found, f"the order of {keys}" if keys else "natural order"


def _by_keys(names: list[str]) -> tuple[list[str], str]:
    """Sorts names by the epoch and the step that they tell.

    Args:
        names: The names, in natural order.

    Returns:
        The names, and what they are sorted by; none where that is their order already, where not
        all tell it, or where several tell the same and so are not of one training.
    """
    files = [_file(name) for name in names]
    told = {key: [pattern.search(file) for file in files] for key, pattern in _KEYS.items()}
    values = {
        key: [Decimal(match[1]) for match in matches if match]
        for key, matches in told.items()
        if all(matches)
    }
    places = list(zip(*values.values(), strict=True))
    unlike = {_AGAIN.sub("", stem(file)) for file in files}
    if len(set(places)) < len(unlike):
        return names, ""
    order = sorted(range(len(places)), key=lambda i: places[i])
    ordered = [names[i] for i in order]
    return (ordered, " and ".join(values)) if ordered != names else (names, "")


def _masked(name: str) -> str:
    """A name without the values of its numbers."""
    return re.sub(r"[0-9]+", "0", name)


def _letters(name: str) -> str:
    """What many locales compare first: letters and digits, without case and punctuation."""
    return re.sub(r"[\W_]+", "", name).casefold()


def _in_training_order(files: Sequence[str]) -> tuple[list[str], list[str]]:
    """Sorts the files of a folder, which are in natural order, by what their names say."""
    places = dict(zip(files, _places([_file(name) for name in files]), strict=True))
    first, final, best, steps = (
        [name for name in files if places[name] == place] for place in ("first", "last", "best", "")
    )
    notes: list[str] = []
    last: list[str] = []
    bare = list(compress(steps, _bare(list(map(_file, steps)))))
    steps = [name for name in steps if name not in bare]
    numbered = [name for name in steps if re.search(r"[0-9]", _file(name))]
    numbered, keys = _by_keys(numbered)
    if keys:
        notes.append(
            f"{_listed(numbered)} are taken in the order of {keys}, and not in natural order, "
            "which --keep-order keeps"
        )
    if not numbered:
        last, steps = final, [name for name in files if places[name] in {"best", ""}]
    else:
        for name in [*bare, *final]:
            if twin := _twin(name, [*last, *reversed(numbered)]):
                notes.append(f"{name} is left out: its weights are those of {twin}")
            else:
                last.append(name)
        if best:
            notes.append(
                f"{_some(best)} left out: the best checkpoint of a training is a copy of one of "
                "its steps. Name it to take it, or give --keep-order"
            )
    ordered = [*first, *steps, *last]
    if ordered != [name for name in files if name in set(ordered)]:
        ends = ((first, "first"), (last, "last"))
        notes.append(" and ".join(f"{_some(some)} taken {place}" for some, place in ends if some))
    moved, by_key = set(numbered), iter(numbered)
    return [next(by_key) if name in moved else name for name in ordered], notes


def _file(name: str) -> str:
    """The name of the file or folder itself, without ``#KEY``."""
    path = Path(name)
    return path.name if "#" not in name or path.exists() else Path(name.rpartition("#")[0]).name


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{', '.join(names[:_LISTED])}{more}"


def _some(names: Sequence[str]) -> str:
    return f"{_listed(names)} {'is' if len(names) == 1 else 'are'}"


def _places(files: Sequence[str]) -> list[str]:
    """Reads from file names which are the first, the last and the best of a training."""
    places = []
    for file, has_number in zip(files, _have_numbers(files), strict=True):
        place = next((place for start, place in _STARTS if start.match(file)), "")
        # Elsewhere in a name a word counts if no number of its own says more: resnet18-last.pt.
        if not place and not has_number:
            words = re.split(r"[\W_]+", file.lower())
            place = next((_WORDS[word] for word in words if word in _WORDS), "")
        places.append(place)
    return places


def _bare(files: Sequence[str]) -> list[bool]:
    """Finds the names of numbered files without the number, as the latest is often named."""
    stems = [stem(file.lower()) for file in files]
    bare = []
    for own, has_number in zip(stems, _have_numbers(files), strict=True):
        longer = [other.removeprefix(own) for other in stems if other.startswith(own)]
        # Of a model.pt: model10.pt, model_10.pt and model-epoch-10.pt, but not models_10.pt.
        numbered = [rest for rest in longer if re.match(r"(?![a-z]).*[0-9]", rest)]
        # Lightning writes a name-v1.ckpt after a name.ckpt.
        again = any(_AGAIN.fullmatch(rest) for rest in numbered)
        bare.append(bool(numbered) and not again and not has_number)
    return bare


def _have_numbers(files: Sequence[str]) -> list[bool]:
    """Finds the names with a number of their own, which not all names share."""
    # A value may stand twice in a name, as in seed1_epoch1.pt; and names that differ in numbers
    # alone may have the same ones, as fold1_2.pt and fold2_1.pt.
    numbers = [Counter(re.findall(r"[0-9]+", file)) for file in files]
    common = reduce(and_, numbers) if numbers else Counter[str]()
    alike = Counter(map(_masked, files))
    return [
        bool(own - common) or alike[_masked(file)] > 1
        for file, own in zip(files, numbers, strict=True)
    ]


def _twin(name: str, others: Sequence[str]) -> str | None:
    """Finds a checkpoint with the same weights."""
    file = read(name)
    return next((other for other in others if _is_equal(file, read(other))), None)


def _is_equal(file: CheckpointFile, other: CheckpointFile) -> bool:
    """Whether each state dict of a file is one of another file too."""
    return all(
        any(
            weights.keys() == held.keys()
            and all(_is_same(_one(file, weights, n), _one(other, held, n)) for n in weights)
            for held in other.choice.values()
        )
        for weights in file.choice.values()
    )


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and equal(a, b)


def _one(file: CheckpointFile, weights: Weights, name: str) -> Tensor:
    # Of a distributed checkpoint one tensor is read at a time.
    return file.fetch({name: weights[name]})[name]
