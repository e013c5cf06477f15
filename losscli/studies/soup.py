"""The average of checkpoints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from losscli.checkpoint import Checkpoint, CheckpointLike, expand_folders, name_checkpoints
from losscli.errors import UsageError
from losscli.settings import checked
from losscli.studies.export import average_checkpoints

__all__ = ["soup"]


@checked()
def soup(names: CheckpointLike | Iterable[CheckpointLike]) -> Checkpoint:
    """Averages checkpoints, each with the same weight (Wortsman et al. 2022, arXiv 2203.05482).

    Sums are in float64 and rounded once, a group of tensors at a time. Whole-number tensors, the
    extra state of modules and the metadata are those of the first checkpoint.

    Args:
        names: Two or more checkpoints, each once: files, ``FILE#KEY``, or a folder of them.

    Returns:
        The average.

    Raises:
        CheckpointError: A file cannot be read.
        MismatchError: The checkpoints do not have the same tensors.
        UsageError: There are not two different names.
    """
    return average_checkpoints(_expand(name_checkpoints(names)))


def _expand(names: Sequence[str]) -> list[str]:
    """Lists the checkpoints, with those in folders."""
    names = expand_folders(names)
    if len(names) < 2:
        raise UsageError(
            f"soup needs two checkpoints or more, and got {len(names)}",
            "Give a folder of them, or their names",
        )
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise UsageError(
            f"{name} is named {times} times",
            "Name each checkpoint once; losscli export --weights gives them different weights",
        )
    return names
