"""Copies of an objective in other floating-point types."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from losscli.data import Split, device_budget, host_budget
from losscli.errors import LossError, ModelError
from losscli.evaluation.device import Narrowest
from losscli.evaluation.independence import Evaluate, Values
from losscli.evaluation.objective import AGREEMENT, Objective, is_close

__all__ = ["in_float64", "narrowest_type", "wider_copies", "with_model"]

# Bytes of weights that are changed at once.
_LOADED_BYTES = 64 << 20


def with_model(objective: Objective, model: nn.Module, dtype: torch.dtype) -> Objective:
    """Makes another objective with the same loss and data, and without metrics.

    Args:
        objective: The objective.
        model: The new objective's model, which it owns.
        dtype: The type of its forward pass.

    Returns:
        The objective; the data are not copied.
    """
    other = Objective(
        model,
        objective.loss,
        {},
        replace(objective.data, splits=objective.splits),
        device=objective.device,
        dtype=dtype,
        batch_size=objective.batch_size,
        recalibration=objective.recalibration,
        batch_loss=objective.batch_loss,
        function=objective.function,
        seeds=objective.seeds,
        tf32=objective.tf32,
    )
    other.extra = objective.extra
    other.copies_inputs = objective.copies_inputs
    other.copies_outputs = objective.copies_outputs
    other.differentiates = objective.differentiates
    return other


@torch.no_grad()
def in_float64(objective: Objective, sample: Split, *, inside: bool = False) -> Objective | None:
    """Returns the same objective in float64.

    Args:
        objective: The objective.
        sample: A few examples, on the device.
        inside: Whether code that casts to a narrower type must compute in float64 too.

    Returns:
        The objective itself if it computes in float64; else a copy with the loaded weights. None if
        the device has no float64, if the copy would be too large, or if the copy fails or still
        uses tensors of the original, for example through a closure.
    """
    if objective.dtype == torch.float64 and not (
        inside and narrowest_type(objective, sample) != objective.dtype
    ):
        return objective
    numbers = sum(tensor.numel() for tensor in objective.tensors.values())
    budget = device_budget(objective.device) or host_budget()
    # The copy, and the weights of two points.
    if objective.device.type == "mps" or numbers * 2 * torch.float64.itemsize > budget:
        return None
    buffers = {
        name: tensor.clone()
        for name, tensor in objective.tensors.items()
        if not isinstance(tensor, nn.Parameter)
    }
    with objective.frozen_statistics():
        try:
            twin = with_model(objective, copy.deepcopy(objective.model), torch.float64)
        except Exception:  # noqa: BLE001 - user code may refuse a copy or float64 in any way
            return None
        try:
            twin.widens = inside and not _is_wide(twin, sample)
            # The copy has the weights exactly, so that no other copy is needed.
            before = twin.plain(twin.tensors, {"": sample})[""].losses
            here = before
            if objective.seeds:
                here = objective.plain(objective.tensors, {"": sample})[""].losses
            _load_others(objective)
            after = twin.plain(twin.tensors, {"": sample})[""].losses
        except Exception:  # noqa: BLE001 - the same
            return None
        finally:
            objective.load({**twin.tensors, **buffers})
    # Random numbers of another type may be other numbers, and the copy another function.
    if not is_close(here, before, 100 * AGREEMENT[objective.precision]):
        return None
    return twin if is_close(after, before, AGREEMENT["float64"]) else None


def _load_others(objective: Objective) -> None:
    """Loads other weights, a few at a time to save memory."""
    others: dict[str, Tensor] = {}
    size = 0
    for name, tensor in objective.tensors.items():
        if tensor.is_floating_point():
            others[name] = tensor * 1.5 + 0.5
            size += tensor.nbytes
        if size > _LOADED_BYTES:
            objective.load(others)
            others, size = {}, 0
    objective.load(others)


def _is_wide(objective: Objective, sample: Split) -> bool:
    """Whether the model and the loss take float64, and compute in nothing narrower."""
    try:
        return narrowest_type(objective, sample) == torch.float64
    except (ModelError, LossError):
        return False


def wider_copies(objective: Objective) -> Iterator[tuple[Evaluate, Narrowest]]:
    """Makes copies of an objective in wider types.

    Args:
        objective: The objective.

    Yields:
        A function that evaluates a batch, and the context that records its narrowest type. Each
        copy is dropped before the next one is made.
    """
    numbers = sum(tensor.numel() for tensor in objective.tensors.values())
    budget = device_budget(objective.device) or host_budget()
    for dtype in (torch.float32, torch.float64):
        if torch.finfo(dtype).eps >= torch.finfo(objective.dtype).eps:
            continue
        if numbers * dtype.itemsize > budget:
            return
        try:
            twin = with_model(objective, copy.deepcopy(objective.model), dtype)
        except Exception:  # noqa: BLE001 - the user's objects, or a device without float64
            return
        twin.metrics, twin.copies_inputs = objective.metrics, objective.copies_inputs
        narrowest = Narrowest(dtype)

        def evaluate(
            batch: Split, twin: Objective = twin, narrowest: Narrowest = narrowest
        ) -> Values:
            with narrowest:
                return twin.values(batch)

        yield evaluate, narrowest


@torch.no_grad()
def narrowest_type(objective: Objective, sample: Split) -> torch.dtype:
    """Returns the narrowest floating-point type in which the model and the loss compute.

    Args:
        objective: The objective.
        sample: A few examples, on the device.

    Returns:
        The type. It is narrower than that of the forward pass if code casts, or if a GPU rounds
        the factors of products.
    """
    narrowest, batch = Narrowest(objective.factor_type), sample.first(objective.batch_size)
    with narrowest:
        objective.values(batch)
    return narrowest.dtype
