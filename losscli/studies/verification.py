"""Verifies how points are evaluated: the sweep against checkpoints that are loaded plainly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from losscli.checkpoint import (
    Checkpoint,
    Versions,
    check_storable,
    has_custom_loading,
    loadable,
)
from losscli.data import Examples
from losscli.errors import ModelError, UsageError
from losscli.evaluation.loading import named_tensors
from losscli.evaluation.precision import with_model
from losscli.evaluation.sweep import sweep, sweep_plain
from losscli.settings import Settings
from losscli.studies.problem import Problem
from losscli.weight_space.slices import Slice
from losscli.weight_space.vectors import Weights
from losscli.wording import list_first

__all__ = [
    "FRESH_BYTES",
    "check_differentiable",
    "check_gradient_settings",
    "differentiable_parameters",
    "made_checkpoint",
    "needed_versions",
    "require_storable",
    "verify_fresh_model",
    "verify_fresh_model_near",
    "verify_sweep",
]

FRESH_BYTES = 64 << 20
"""Up to this size a second model is built, to compare the first with."""

# The largest relative difference from the mean loss of a first batch of the plainly loaded
# checkpoint, by the precision of the forward pass. The relative error of a small cross-entropy is
# the absolute error of the scores, for which kernels of another layout gave 1e-6 in a small
# network. Factors in TF32 are rounded as in float16.
_TOLERANCE = {"float64": 1e-12, "float32": 1e-4, "tf32": 2e-3, "bfloat16": 2e-2, "float16": 2e-3}

# The same if BatchNorm's statistics are estimated at the point: rounding in every layer before
# changes them, in a deep network by some thousand units of rounding.
_TOLERANCE_OF_ESTIMATES = {
    "float64": 1e-9,
    "float32": 1e-3,
    "tf32": 0.1,
    "bfloat16": 0.5,
    "float16": 0.1,
}

# The same for two models at one point, which are evaluated by the same kernels. A sum in another
# order, as some kernels of a GPU add, may still be rounded to another number in TF32.
_TOLERANCE_OF_MODELS = dict.fromkeys(_TOLERANCE, 1e-5) | {"tf32": _TOLERANCE["tf32"]}

# Factor of the weights at a point near another one.
_NEAR = 1.01


def verify_sweep(
    problem: Problem,
    slice_: Slice,
    anchors: Sequence[tuple[Sequence[float], Weights]],
    more: Sequence[Any],
) -> float:
    """Compares the losses of a sweep with those of plainly loaded weights, on a first batch.

    Args:
        problem: What is evaluated.
        slice_: The slice.
        anchors: Points that are known: their coordinates, and all tensors there.
        more: Further points, so that there are enough to share a first layer.

    Returns:
        The largest relative difference of the mean losses.

    Raises:
        ModelError: It is beyond rounding.
    """
    objective, precision = problem.objective, problem.objective.precision
    # BatchNorm's statistics stay as they are loaded: only the strategy differs. Every rank verifies
    # by itself, since it may have a device of its own.
    with objective.frozen_statistics():
        worst = _difference(problem, slice_, anchors, more, _TOLERANCE[precision])
    if objective.recalibration is None:
        return worst
    with objective.first_batch_only():
        return max(
            worst, _difference(problem, slice_, anchors, more, _TOLERANCE_OF_ESTIMATES[precision])
        )


def _difference(
    problem: Problem,
    slice_: Slice,
    anchors: Sequence[tuple[Sequence[float], Weights]],
    more: Sequence[Any],
    tolerance: float,
) -> float:
    objective = problem.objective
    batches = objective.first_batches()
    plain = sweep_plain(objective, [weights for _, weights in anchors], splits=batches)
    coordinates = [*(point for point, _ in anchors), *more]
    found = sweep(objective, slice_, coordinates, splits=batches)
    # A loss of 0 may be that of two networks that both fit the batch.
    objective.constant |= bool(slice_.ends[0]) and all(
        len(plain) > 1
        and bool(end[name].losses.isfinite().all())
        and bool(end[name].losses.any())
        and torch.equal(end[name].losses, plain[0][name].losses)
        for end in plain
        for name in batches
    )
    worst = 0.0
    for name in batches:
        for p, end in enumerate(plain):
            there = end[name].losses[0].double().mean()
            here = found[name].losses[p].double().mean()
            if not torch.equal(there.isfinite(), here.isfinite()):
                return math.inf
            if there.isfinite():
                worst = max(worst, float((here - there).abs() / there.abs().clamp(min=1e-12)))
    # A negated comparison, since a difference may be NaN.
    if not worst <= tolerance:
        raise ModelError(
            "the sweep does not reproduce the checkpoints: at an end its loss has a relative "
            f"difference of {worst:.1e} from that of the loaded checkpoint",
            "The model may keep state from one forward pass to the next",
        )
    return worst


def verify_fresh_model(problem: Problem, weights: Weights) -> None:
    """Checks that a newly built model has the same loss at a point.

    Args:
        problem: What is evaluated.
        weights: All tensors of a point other than the one at which the model was built.

    Raises:
        ModelError: It has another loss.
    """
    objective = problem.objective
    size = sum(tensor.nbytes for tensor in objective.tensors.values())
    if size > FRESH_BYTES:
        return
    with torch.random.fork_rng(devices=[]):
        model = problem.fresh()
    rebuilt = with_model(objective, model, objective.dtype)
    batches: Mapping[str, Examples] = objective.first_batches()
    estimated = objective.recalibration is not None
    tolerances = _TOLERANCE_OF_ESTIMATES if estimated else _TOLERANCE_OF_MODELS
    share = tolerances[objective.precision]
    with objective.first_batch_only(), rebuilt.first_batch_only():
        here, there = (o.plain(weights, batches) for o in (objective, rebuilt))
    for name in batches:
        used, new = (e[name].losses[0].double().mean() for e in (here, there))
        if not torch.allclose(used, new, rtol=share, atol=1e-9, equal_nan=True):
            raise ModelError(
                f"the loss at a point is {used:.6g} after the model was at another point, and "
                f"{new:.6g} in a newly built model",
                "It keeps state computed from earlier weights; clear it in eval()",
            )


def verify_fresh_model_near(problem: Problem, weights: Weights, moving: Iterable[str]) -> None:
    """Checks that a newly built model has the same loss near a point.

    A model that keeps what it computed from the point itself has another loss there.

    Args:
        problem: What is evaluated.
        weights: All tensors of the point.
        moving: The tensors that move.

    Raises:
        ModelError: It has another loss.
    """
    verify_fresh_model(problem, {**weights, **{n: weights[n] * _NEAR for n in moving}})


def check_gradient_settings(settings: Settings, option: str) -> None:
    """Refuses to evaluate only some examples, which give no gradient over all of them.

    Args:
        settings: The settings.
        option: What needs the gradient.

    Raises:
        UsageError: Only some examples are evaluated.
    """
    if settings.sampling_error is not None:
        raise UsageError(
            f"--sampling-error is not available with {option}, which needs the gradient over all "
            "examples",
            "Give random directions, or fewer examples with --limit",
        )


def differentiable_parameters(problem: Problem, option: str) -> tuple[str, ...]:
    """Returns the parameters that move; statistics of BatchNorm are not differentiated.

    Args:
        problem: What is evaluated.
        option: What needs derivatives.

    Raises:
        UsageError: There are none, or `check_differentiable` refuses one.
    """
    moving = problem.parameters(problem.moving)
    if not moving:
        raise UsageError("no parameter is left to differentiate", "Widen --only")
    check_differentiable(problem, moving, option)
    return moving


def check_differentiable(problem: Problem, moving: Iterable[str], option: str) -> None:
    """Refuses to differentiate what autograd would differentiate wrongly.

    Args:
        problem: What is evaluated.
        moving: The tensors that move.
        option: What needs derivatives.

    Raises:
        UsageError: A tensor that moves is complex; or it is spectrally normalised: its singular
            vectors are functions of it, and constants to autograd.
    """
    names = set(moving)
    if some := [n for n in moving if problem.objective.tensors[n].is_complex()]:
        raise UsageError(
            f"{option} differentiates real parameters, and {some[0]} is complex",
            f"Leave it out with --except {some[0]!r}",
        )
    found = [n for layer in problem.objective.spectral for n in layer.sources if n in names]
    if found:
        raise UsageError(
            f"{option} cannot differentiate {list_first(found)} twice: autograd takes the singular "
            "vectors of a spectral norm for constants",
            f"Leave such weights out with --except {found[0]!r}",
        )


@torch.no_grad()
def needed_versions(problem: Problem, weights: Weights) -> Versions:
    """Returns what a file of weights must note of the versions of modules.

    Args:
        problem: The model and the first checkpoint.
        weights: All tensors of the file.

    Returns:
        The versions, if the model would load other tensors without them; else none.
    """
    with torch.random.fork_rng(devices=[]):
        model = problem.fresh().cpu()
    if not has_custom_loading(model):
        return {}
    own, extra = named_tensors(model), problem.first.extra
    model.load_state_dict(loadable(weights, {}, extra), strict=False)
    if all(torch.equal(own[name], tensor.to(own[name])) for name, tensor in weights.items()):
        return {}
    return problem.objective.versions


def made_checkpoint(problem: Problem, name: str, weights: Weights) -> Checkpoint:
    """Makes a checkpoint of a point that was computed.

    Args:
        problem: The model and the first checkpoint, whose metadata and extra state it has.
        name: What to call it.
        weights: All tensors of the point. Of a tied tensor the last name counts, under which it
            moves.

    Returns:
        The checkpoint, in the memory of the CPU: one tensor for all names of a tied tensor.
    """
    own = problem.objective.tensors
    last = {id(tensor): key for key, tensor in own.items()}
    found = {key: weights[key].cpu() for key in last.values()}
    whole = {key: found[last[id(own[key])]] for key in weights}
    return Checkpoint(
        name,
        whole,
        problem.first.metadata,
        versions=needed_versions(problem, whole),
        extra=problem.first.extra,
    )


def require_storable(problem: Problem, path: Path, cure: str = "") -> None:
    """Checks before a run that a file can store the checkpoint that the run makes.

    Args:
        problem: The model and the checkpoints.
        path: The file.
        cure: How to fix it, if the file cannot have another format.

    Raises:
        OutputError: Its format cannot.
    """
    versions = needed_versions(problem, problem.first.weights)
    for t in range(len(problem.names)):
        check_storable(path, problem.open(t).weights, versions, problem.first.extra, cure)
