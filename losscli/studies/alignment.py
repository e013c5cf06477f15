"""One network put into the order of another: its hidden units permuted, its function as it is."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from losscli.checkpoint import (
    Checkpoint,
    CheckpointLike,
    name_checkpoint,
)
from losscli.data import Nest, map_nest
from losscli.errors import (
    CheckpointError,
    DeviceError,
    ModelError,
    NondeterministicModelError,
    UsageError,
)
from losscli.evaluation.device import Narrowest
from losscli.evaluation.objective import DETERMINISTIC
from losscli.results.summaries import AlignmentSummary
from losscli.settings import Settings, checked
from losscli.studies.problem import Problem, prepare
from losscli.studies.verification import needed_versions
from losscli.weight_space.matching import inner_product, match
from losscli.weight_space.permutations import Group, obstacles, permutation_groups, permute
from losscli.weight_space.vectors import Weights, distance

__all__ = ["Alignment", "align"]

# How far the outputs may lie from B's, as a share of the largest of them: rounding, since sums are
# made in another order, in the narrowest type of the forward pass.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

# Examples that a model is traced with.
_TRACED = 2


@dataclass(frozen=True)
class Alignment:
    """A network in the order of another.

    Attributes:
        checkpoint: B with its hidden units permuted onto A's, with B's types and metadata.
        summary: What was found and where it came from, made of JSON's types and floats.
    """

    checkpoint: Checkpoint
    summary: AlignmentSummary

    def __repr__(self) -> str:
        return f"<Alignment, {self.checkpoint!r}>"


@checked(Settings)
def align(a: CheckpointLike, b: CheckpointLike, **settings: Any) -> Alignment:
    """Permutes B's hidden units onto A's by weight matching.

    Its function is compared with that of B on the first batch of each split, in float64 where the
    model can be run in it.

    Args:
        a: The reference checkpoint.
        b: The checkpoint that is permuted.
        **settings: The attributes of `losscli.settings.Settings`: ``model``, ``data``, ….

    Returns:
        The permuted checkpoint and what was found.

    Raises:
        CheckpointError: A weight is infinite or not a number.
        ModelError: The model cannot be traced or run, has no hidden units that may be permuted, or
            would be another function.
        LosscliError: Something else is missing, broken or does not fit.
    """
    begun = time.perf_counter()
    for option in ("batch_loss", "objective"):
        if settings.get(option):
            name = f"--{option.replace('_', '-')}"
            raise UsageError(f"align evaluates no loss, and {name} has no effect", "Leave it out")
    a, b = name_checkpoint(a, "A"), name_checkpoint(b, "B")
    problem, before, dtype = _prepare(a, b, Settings(**settings))
    first, last = problem.first.weights, problem.last
    names = problem.parameters(problem.moving)
    if some := [name for name in names if first[name].is_complex()]:
        raise ModelError(
            f"{some[0]} is complex, and align permutes real weights",
            "Compare the checkpoints as they are, with losscli interpolate",
        )
    groups = _groups(problem)
    reached = {name for group in groups for name in group.names}
    for name, weights in ((a, first), (b, last.weights)):
        for tensor in reached:
            if not weights[tensor].isfinite().all():
                raise CheckpointError(
                    f"{name}: {tensor} has weights that are infinite or not a number",
                    "Take a checkpoint from before it diverged",
                )
    matching = match(first, last.weights, groups, names, seed=problem.settings.seed)
    aligned = permute(last.weights, groups, matching.permutations)
    difference = _difference(before, list(_outputs(problem, aligned, nullcontext())))
    # A negated comparison, since a difference may be no number.
    if not difference <= _TOLERANCE[dtype]:
        raise ModelError(
            f"permuted, {b} would be another function: its outputs differ by {difference:.1e} of "
            "the largest",
            "Does its forward use weights in a way that its graph does not show?",
        )
    moved = [int((p != torch.arange(len(p))).sum()) for p in matching.permutations]
    source = problem.provenance
    summary: AlignmentSummary = {
        "command": "align",
        "version": source["version"],
        "torch": source["torch"],
        "python": source["python"],
        "device": source["device"],
        "device_name": source["device_name"],
        "model": source["model"],
        "data": source["data"],
        "seed": source["seed"],
        "checkpoints": source["checkpoints"],
        "groups": [
            {"units": group.size, "moved": n, "tensors": list(group.names)}
            for group, n in zip(groups, moved, strict=True)
        ],
        "units": sum(group.size for group in groups),
        "moved": sum(moved),
        "sweeps": matching.sweeps,
        "values": sum(first[name].numel() for name in names),
        "tensors": len(names),
        "distance": {
            "before": distance(first, last.weights, names),
            "after": distance(first, aligned, names),
        },
        "inner_product": {
            "before": inner_product(first, last.weights, names),
            "after": inner_product(first, aligned, names),
        },
        "check": {
            "dtype": str(dtype).removeprefix("torch."),
            "examples": sum(map(len, problem.objective.first_batches().values())),
            "largest_difference": difference,
        },
        "seconds": {"total": time.perf_counter() - begun},
    }
    checkpoint = Checkpoint(
        f"{b} aligned with {a}",
        aligned,
        last.metadata,
        versions=needed_versions(problem, aligned),
        extra=last.extra,
    )
    return Alignment(checkpoint, summary)


def _prepare(a: str, b: str, settings: Settings) -> tuple[Problem, list[Tensor], torch.dtype]:
    """Brings all together and runs B: in float64, else, if it must be, in float32.

    Returns:
        The problem, B's outputs, and the narrowest type that they went through.
    """
    try:
        problem = prepare([a, b], replace(settings, dtype="float64", metric=("none",)))
        return problem, *_run(problem, b)
    except NondeterministicModelError:
        raise
    except (ModelError, DeviceError):
        # Some devices have no float64, and some code makes float32 tensors by name.
        problem = prepare([a, b], replace(settings, dtype="float32", metric=("none",)))
        return problem, *_run(problem, b)


def _run(problem: Problem, name: str) -> tuple[list[Tensor], torch.dtype]:
    """Runs B twice."""
    narrowest = Narrowest(problem.objective.dtype)
    one, two = (list(_outputs(problem, problem.last.weights, narrowest)) for _ in range(2))
    if not one:
        raise ModelError(
            "the model returns no tensors that could be compared",
            "Give a --model that returns its scores",
        )
    if not _difference(one, two) <= _TOLERANCE[narrowest.dtype]:
        raise NondeterministicModelError(
            f"{name}: the model gives two answers for the same weights and data, even in eval mode",
            DETERMINISTIC,
        )
    return one, narrowest.dtype


@torch.no_grad()
def _outputs(
    problem: Problem, weights: Weights, watch: AbstractContextManager[object]
) -> Iterator[Tensor]:
    """What the model gives for the first batch of each split, its forward pass watched."""
    objective = problem.objective
    # What is written must be right wherever it is loaded.
    with objective.as_stored():
        objective.load(weights)
    for split in objective.first_batches().values():
        inputs = objective.data.prepare(split.inputs, objective.dtype)
        # A model may write on its inputs.
        inputs = map_nest(Tensor.clone, inputs)
        with watch:
            outputs = objective.forward(objective.model, inputs)
        yield from _tensors(outputs)


def _tensors(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs.detach().clone()
    elif isinstance(outputs, Mapping):
        yield from _tensors(list(outputs.values()))
    elif isinstance(outputs, list | tuple):
        for one in outputs:
            yield from _tensors(one)


def _difference(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference, as a share of the largest value of the same tensor."""
    worst = 0.0
    for x, y in zip(one, other, strict=True):
        finite = x.isfinite()
        if x.shape != y.shape or not torch.equal(finite, y.isfinite()):
            return math.inf
        if not torch.allclose(x[~finite], y[~finite], equal_nan=True):
            return math.inf
        here, there = x[finite].double(), y[finite].double()
        if not torch.equal(here, there):
            largest = torch.cat([here, there]).abs().max()
            worst = max(worst, float((here - there).abs().max() / largest))
    return worst


def _groups(problem: Problem) -> tuple[Group, ...]:
    objective = problem.objective
    split = next(iter(objective.first_batches().values()))
    inputs = _on_cpu(objective.data.prepare(split.take(slice(0, _TRACED)).inputs, torch.float32))
    # Tracing may leave its marks on a model, so it gets one of its own.
    with torch.random.fork_rng(devices=[]):
        model = problem.fresh()
    args, kwargs = objective.arguments(inputs)
    groups = permutation_groups(model.cpu().float().eval(), args, kwargs)
    if not groups:
        what = f"the model {problem.provenance['model']} has no hidden units that could be permuted"
        if met := obstacles(model, args, kwargs):
            raise ModelError(
                f"{what}: {', '.join(met)} may depend on the order of their inputs",
                "Alignment needs a hidden layer that is followed only by operators known not to",
            )
        raise ModelError(what, "Alignment needs a hidden layer")
    return groups


def _on_cpu(inputs: Nest) -> Nest:
    return map_nest(lambda t: t.detach().cpu().clone(), inputs)
