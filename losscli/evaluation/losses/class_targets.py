"""How losses and metrics of classes read outputs and targets: classes, weights, ignored targets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from losscli.errors import LossError

__all__ = [
    "IGNORED",
    "VOID",
    "ClassWeights",
    "advise_integers",
    "are_labels",
    "are_probabilities",
    "class_dim",
    "class_weights",
    "counted",
    "describe",
    "mark_ignored",
    "one_score_per_target",
    "probability_dim",
    "sums_to_one",
]

IGNORED = -100
"""The target of positions without one, such as padding; the same as in PyTorch and Hugging Face."""

VOID = 255
"""The label of pixels without a class in many data sets. It is ignored if it is not a class."""

ClassWeights = Sequence[float] | Tensor | float

# Largest distance of a sum of probabilities from one by rounding, also in half precision.
_NEAR_ONE = 0.02


def class_dim(outputs: Tensor, targets: Tensor, name: str, dim: int | None) -> int | None:
    """Finds the dimension of the classes in outputs.

    Args:
        outputs: ``[B, C, *]`` or ``[B, *, C]``.
        targets: ``[B, *]``.
        name: The loss or metric, for errors.
        dim: The dimension if it was given.

    Returns:
        1 or −1; None if the shapes do not fit.

    Raises:
        LossError: Both dimensions fit and ``dim`` is None, or ``dim`` is neither.
    """
    if dim not in {None, 1, -1}:
        raise LossError(f"{name}: dim={dim} is not a dimension of classes", "Give dim=1 or dim=-1")
    first = outputs.ndim > 1 and (len(outputs), *outputs.shape[2:]) == targets.shape
    if outputs.ndim <= 2:
        return 1 if first else None
    last = outputs.shape[:-1] == targets.shape
    if dim is not None:
        return dim if (first if dim == 1 else last) else None
    # With a single class both dimensions give the same loss.
    if first and last and outputs.shape[1] > 1:
        option = "--loss" if name == "cross_entropy" else "--metric"
        tokens = "token_cross_entropy" if name == "cross_entropy" else f"{name},dim=-1"
        rest = ", ".join(["T"] if targets.ndim == 2 else [f"T{i}" for i in range(1, targets.ndim)])
        raise LossError(
            f"{name} finds the classes of outputs {describe(outputs)} and targets "
            f"{describe(targets)} in dimension 1 as well as in the last dimension",
            f"Give {option} {name},dim=1 for outputs [N, C, {rest}], or {option} {tokens} for "
            f"outputs [N, {rest}, C]",
        )
    return 1 if first else -1 if last else None


def probability_dim(targets: Tensor, dim: int | None) -> int:
    """Finds the dimension of the classes, 1 or −1, in targets that are probabilities."""
    if dim is not None or targets.ndim < 3:
        return dim or 1
    # The one in which they sum to one; if both or none do, the same as torch.
    ones = [sums_to_one(targets, each) for each in (1, -1)]
    return -1 if ones == [False, True] else 1


def sums_to_one(probabilities: Tensor, dim: int) -> bool:
    """Whether all sums over a dimension are one, up to the rounding of half precision."""
    sums = probabilities.sum(dim, dtype=torch.float32)
    return bool(((sums - 1).abs() < _NEAR_ONE).all())


def counted(targets: Tensor, classes: int | None, ignore_index: int | None) -> Tensor:
    """Returns a mask of the targets that are not ignored.

    Args:
        targets: Integer targets of any shape.
        classes: The number of classes; None if 255 is never ignored.
        ignore_index: A further target to ignore.
    """
    if targets.dtype == torch.uint8:
        # −100 as a byte would be 156.
        targets = targets.long()
    counts = targets != IGNORED
    if classes is not None and classes <= VOID:
        counts &= targets != VOID
    if ignore_index is not None:
        counts &= targets != ignore_index
    return counts


def mark_ignored(targets: Tensor, classes: int, ignore_index: int | None) -> Tensor:
    """Replaces all ignored targets by −100, which torch ignores itself."""
    counts = counted(targets, classes, ignore_index)
    return targets.long().masked_fill(~counts, IGNORED)


def class_weights(
    weight: ClassWeights | None, classes: int, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """Returns the weights of the classes, ``[C]``, if any; checks their number."""
    if weight is None:
        return None
    weight = torch.as_tensor(weight, dtype=dtype, device=device)
    if weight.shape != (classes,):
        raise LossError(
            f"weight has {weight.numel()} numbers, and the model has outputs for {classes} classes",
            "Give one weight per class, such as weight=0.2-1-5 for three classes",
        )
    return weight


def are_labels(targets: Tensor) -> bool:
    """Whether all targets are 0 or 1."""
    return bool(((targets == 0) | (targets == 1)).all())


def are_probabilities(outputs: Tensor) -> bool:
    """Whether all outputs lie in 0…1 and not all are 0, as with zero weights."""
    inside = outputs.is_floating_point() and ((outputs >= 0) & (outputs <= 1)).all()
    return bool(inside and outputs.any())


def one_score_per_target(outputs: Tensor, targets: Tensor) -> bool:
    """Whether outputs have the shape of the targets, up to a dimension of length 1."""
    return outputs.shape in {targets.shape, (*targets.shape, 1)} or (
        outputs.shape == (*targets.shape[:1], 1, *targets.shape[1:])
    )


def advise_integers(targets: Tensor) -> str:
    """Advises on classes stored as floating-point numbers; empty for other targets."""
    if not targets.is_floating_point() or not bool(((targets >= 0) & (targets % 1 == 0)).all()):
        return ""
    return (
        "The targets are whole numbers: if they are classes, convert them with .long(), or store "
        "integers in the file"
    )


def describe(tensor: Tensor) -> str:
    """Names the type and the shape of a tensor."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
