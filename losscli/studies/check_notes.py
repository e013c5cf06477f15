"""Notes of ``check``: what the Hessian is a Hessian of, and what was not decided."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from losscli.evaluation.function_mode import FunctionMode
from losscli.evaluation.hessian.critical_points import PointAnalysis
from losscli.evaluation.objective import Objective
from losscli.studies.base import Study
from losscli.wording import format_count

__all__ = ["check_notes", "functions_called"]

# Functions of torch with kinks, where they have no second derivative.
_KINKED = frozenset({
    "abs", "amax", "amin", "clamp", "clip", "hardsigmoid", "hardswish", "hardtanh", "l1_loss",
    "leaky_relu", "max", "max_pool1d", "max_pool2d", "max_pool3d", "maximum", "min", "minimum",
    "prelu", "relu", "relu6", "rrelu", "threshold",
})  # fmt: skip


def check_notes(
    study: Study, functions: Collection[str], analyses: Sequence[PointAnalysis]
) -> Iterator[str]:
    """Notes on the Hessian and on points where nothing is decided.

    Args:
        study: The study.
        functions: The functions of torch that the model and the loss call.
        analyses: Each checkpoint on each split.

    Yields:
        The notes.
    """
    model = study.problem.objective.model
    if study.problem.chosen:
        tensors = format_count(len(study.moving), "tensor")
        yield f"gradient, Hessian and verdict are those of {tensors} only"
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        yield "BatchNorm is in eval mode: its statistics are constants, not functions of θ"
    if "scaled_dot_product_attention" in functions:
        yield "attention uses its math kernel, since fused kernels have no second derivatives"
    if kinks := sorted(_KINKED.intersection(functions)):
        have = "have" if len(kinks) > 1 else "has"
        yield (
            f"{', '.join(kinks)} {have} kinks: the Hessian is that of the smooth piece around "
            "each checkpoint, and does not describe the kinks near it"
        )
    yield from dict.fromkeys(one.evidence.unverified for one in analyses if one.evidence.unverified)
    if any(one.evidence.scattered for one in analyses):
        yield (
            "the model has no float64 copy: the errors of eigenvalues include rounding only as far "
            "as products at nearby points show it"
        )
    finite = [one for one in analyses if math.isfinite(one.smallest.value)]
    if lost := len(analyses) - len(finite):
        yield (
            f"loss or derivatives are not finite at {lost} of {len(analyses)} points: "
            "there is no verdict there"
        )
    missed = sum(not (one.smallest.converged and one.largest.converged) for one in finite)
    if missed:
        yield (
            f"the search for eigenvalues has not converged at {missed} of "
            f"{len(analyses)} points: no minimum or maximum is claimed there"
        )


def functions_called(objective: Objective) -> set[str]:
    """Lists the functions of torch that the model and the loss call.

    Args:
        objective: The model, the loss and the data, of which a first batch is evaluated.

    Returns:
        Their names.
    """
    batch = next(iter(objective.first_batches().values()))
    inputs = objective.prepare(batch)
    with torch.no_grad(), _FunctionRecorder() as recorder:
        outputs = objective.forward(objective.model, inputs)
        objective.per_example(objective.loss, outputs, batch.targets, "loss")
    names: set[str] = recorder.names
    return names


class _FunctionRecorder(FunctionMode):
    """Records the names of the functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def intercept(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        # Names of functions that work in place end in an underscore.
        self.names.add(getattr(function, "__name__", "").strip("_"))
        return function(*args, **kwargs)
