"""Permutes the hidden units of a network to match another's without changing its function."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor

from losscli.checkpoint import (
    Checkpoint,
    CheckpointLike,
    check_storable,
    expand_folders,
    is_checkpoint,
    name_checkpoint,
    name_checkpoints,
)
from losscli.data import map_nest
from losscli.errors import (
    CheckpointError,
    DeviceError,
    ModelError,
    NondeterministicModelError,
    UsageError,
)
from losscli.evaluation.activations import Traces, correlate
from losscli.evaluation.device import Narrowest
from losscli.evaluation.memory import halving
from losscli.evaluation.objective import DETERMINISTIC
from losscli.results.summaries import AlignmentSummary, MatchedActivations
from losscli.settings import DType, Settings, checked
from losscli.studies.checkpoints import require_distinct
from losscli.studies.problem import Problem, prepare
from losscli.studies.verification import needed_versions
from losscli.weight_space.matching import inner_product, match, match_units
from losscli.weight_space.permutations import Group, hidden_units, obstacles, permute
from losscli.weight_space.tracing import trace
from losscli.weight_space.vectors import Weights, distance

__all__ = ["Alignment", "By", "align", "align_each"]

By = Literal["weights", "activations"]
"""What hidden units are matched by."""

# The largest difference from B's outputs, relative to the largest of them, that rounding explains:
# sums are in another order. By the narrowest type of the forward pass.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

# Number of examples that a model is traced with.
_TRACED = 2


@dataclass(frozen=True)
class Alignment:
    """A network permuted to match another.

    Attributes:
        checkpoint: B with its hidden units permuted onto A's, with B's types and metadata.
        summary: The findings and their origin, in the types of JSON; floats may be non-finite.
    """

    checkpoint: Checkpoint
    summary: AlignmentSummary

    def __repr__(self) -> str:
        return f"<Alignment, {self.checkpoint!r}>"


@overload
def align(
    a: CheckpointLike, b: CheckpointLike, *, by: By = "weights", **settings: Any
) -> Alignment: ...
@overload
def align(
    a: CheckpointLike, b: Iterable[CheckpointLike], *, by: By = "weights", **settings: Any
) -> list[Alignment]: ...
@checked(Settings)
def align(
    a: CheckpointLike,
    b: CheckpointLike | Iterable[CheckpointLike],
    *,
    by: By = "weights",
    **settings: Any,
) -> Alignment | list[Alignment]:
    """Permutes B's hidden units to match A's without changing its function.

    The outputs of the permuted network are compared with B's on the first batch of each split, in
    float64 if the model runs in it.

    Args:
        a: The reference checkpoint.
        b: The checkpoint to permute, or a list of checkpoints and folders of them, each of which
            is permuted to match A.
        by: ``weights`` for weight matching (Ainsworth et al. 2022, arXiv 2209.04836), or
            ``activations`` for the correlations of the units over the training examples (Li et al.
            2015, arXiv 1511.07543).
        **settings: The attributes of `losscli.settings.Settings`: ``model``, ``data``, ….

    Returns:
        The permuted checkpoint and the findings; a list of these for a list.

    Raises:
        CheckpointError: A weight or an activation is infinite or not a number.
        ModelError: The model cannot be traced or run, has no hidden units that may be permuted, or
            would be another function.
        LosscliError: Something else is missing, broken or does not fit.
    """
    if by not in get_args(By):
        raise UsageError(f"--by {by} is not known", f"Give {' or '.join(get_args(By))}")
    for option in ("batch_loss", "objective"):
        if settings.get(option):
            name = f"--{option.replace('_', '-')}"
            raise UsageError(f"align evaluates no loss, and {name} has no effect", "Leave it out")
    first, chosen = name_checkpoint(a, "A"), Settings(**settings)
    if is_checkpoint(b):
        (found,) = align_each([first, name_checkpoint(b, "B")], chosen, by)
        return found
    return align_each([first, *expand_folders(name_checkpoints(b, first=1))], chosen, by)


def align_each(
    names: Sequence[str], settings: Settings, by: By, files: Sequence[Path] = ()
) -> list[Alignment]:
    """Permutes each checkpoint but the first onto the first.

    Args:
        names: The checkpoints.
        settings: The settings.
        by: See `align`.
        files: The files that will be written, one for each checkpoint but the first.

    Returns:
        The permuted checkpoints and the findings.

    Raises:
        OutputError: A file is of a format that cannot store its checkpoint.
        LosscliError: As for `align`.
    """
    if len(names) < 2:
        raise UsageError("align has no checkpoint to permute", "Give one or more after A")
    require_distinct(names[1:])
    return list(_align_each(names, settings, by, files))


def _align_each(
    names: Sequence[str], settings: Settings, by: By, files: Sequence[Path]
) -> Iterator[Alignment]:
    begun = time.perf_counter()
    problem, runs = _prepare(names, settings, by)
    objective, first = problem.objective, problem.first.weights
    names = problem.parameters(problem.moving)
    if some := [name for name in names if first[name].is_complex()]:
        raise ModelError(
            f"align permutes only real weights, and {some[0]} is complex",
            "Compare the checkpoints as they are, with losscli interpolate",
        )
    for t, file in enumerate(files, start=1):
        opened = problem.open(t)
        versions = needed_versions(problem, opened.weights)
        check_storable(file, opened.weights, versions, opened.extra)
    groups = _groups(problem)
    reached = {name for group in groups for name in group.names}
    _require_finite(problem.names[0], first, reached)
    model = None if problem.training is None else problem.model_to_trace().to(objective.device)
    traces = None if model is None else Traces(objective, model)
    for t, (before, dtype) in enumerate(runs, start=1):
        name, other = problem.names[t], problem.open(t)
        _require_finite(name, other.weights, reached)
        matched: AlignmentSummary
        if traces is None:
            matching = match(first, other.weights, groups, names, seed=problem.settings.seed)
            permutations, matched = list(matching.permutations), {"sweeps": matching.sweeps}
        else:
            permutations, found = _match_activations(problem, traces, name, other.weights)
            matched = {"activations": found}
        aligned = permute(other.weights, groups, permutations)
        difference = _difference(before, list(_outputs(problem, aligned, nullcontext())))
        # A negated comparison, since a difference may be NaN.
        if not difference <= _TOLERANCE[dtype]:
            raise ModelError(
                f"permuted, {name} would be another function: its outputs differ by "
                f"{difference:.1e} of the largest",
                "Does its forward use weights in a way that its graph does not show?",
            )
        moved = [int((p != torch.arange(len(p))).sum()) for p in permutations]
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
            "by": by,
            "checkpoints": [source["checkpoints"][0], source["checkpoints"][t]],
            "groups": [
                {"units": group.size, "moved": n, "tensors": list(group.names)}
                for group, n in zip(groups, moved, strict=True)
            ],
            "units": sum(group.size for group in groups),
            "moved": sum(moved),
            **matched,
            "values": sum(first[key].numel() for key in names),
            "tensors": len(names),
            "distance": {
                "before": distance(first, other.weights, names),
                "after": distance(first, aligned, names),
            },
            "inner_product": {
                "before": inner_product(first, other.weights, names),
                "after": inner_product(first, aligned, names),
            },
            "check": {
                "dtype": str(dtype).removeprefix("torch."),
                "examples": sum(map(len, objective.first_batches().values())),
                "largest_difference": difference,
            },
            "notes": problem.training.notes if problem.training else [],
            "seconds": {"total": time.perf_counter() - begun},
        }
        checkpoint = Checkpoint(
            f"{name} aligned with {problem.names[0]}",
            aligned,
            other.metadata,
            versions=needed_versions(problem, aligned),
            extra=other.extra,
        )
        yield Alignment(checkpoint, summary)
        begun = time.perf_counter()


def _match_activations(
    problem: Problem, traces: Traces, name: str, weights: Weights
) -> tuple[list[Tensor], MatchedActivations]:
    """Matches the units of a checkpoint by activations on the training examples."""
    objective, training = problem.objective, problem.training
    assert training is not None
    first = problem.first.weights
    try:
        found = halving(
            objective, lambda: correlate(objective, traces, first, weights, training.examples)
        )
    except CheckpointError as error:
        raise CheckpointError(f"{problem.names[0]} or {name}: {error}", error.cure) from None
    permutations = [match_units(each.values, each.dead_a, each.dead_b) for each in found]
    alive = sum(int((~each.dead_a).sum()) for each in found)
    before, after = (
        math.fsum(float(each.values[range(len(p)), p].sum()) for each, p in pairs)
        for pairs in (
            [(each, torch.arange(len(each.values))) for each in found],
            list(zip(found, permutations, strict=True)),
        )
    )
    return permutations, {
        "split": training.name,
        "examples": training.examples.rows,
        "without_variance": {
            "a": sum(int(each.dead_a.sum()) for each in found),
            "b": sum(int(each.dead_b.sum()) for each in found),
        },
        "correlation": {"before": before / max(1, alive), "after": after / max(1, alive)},
    }


def _require_finite(name: str, weights: Weights, reached: Iterable[str]) -> None:
    for tensor in reached:
        if not weights[tensor].isfinite().all():
            raise CheckpointError(
                f"{name}: {tensor} has weights that are infinite or not a number",
                "Take a checkpoint from before it diverged",
            )


_Run = tuple[list[Tensor], torch.dtype]
"""The outputs of a checkpoint, and the narrowest type that they went through."""


def _prepare(names: Sequence[str], settings: Settings, by: By) -> tuple[Problem, list[_Run]]:
    """Prepares the problem and runs each B, in float64 if possible, else in float32."""
    training = "--by activations" if by == "activations" else ""

    def run(dtype: DType) -> tuple[Problem, list[_Run]]:
        chosen = replace(settings, dtype=dtype, metric=("none",))
        problem = prepare(names, chosen, training=training)
        return problem, [_run(problem, t) for t in range(1, len(names))]

    try:
        return run("float64")
    except NondeterministicModelError:
        raise
    except (ModelError, DeviceError):
        # Some devices have no float64, and some code creates float32 tensors.
        return run("float32")


def _run(problem: Problem, t: int) -> _Run:
    """Runs a checkpoint twice."""
    narrowest = Narrowest(problem.objective.dtype)
    weights = problem.open(t).weights
    one, two = (list(_outputs(problem, weights, narrowest)) for _ in range(2))
    if not one:
        raise ModelError(
            "the model returns no tensors that could be compared",
            "Give a --model that returns its scores",
        )
    if not _difference(one, two) <= _TOLERANCE[narrowest.dtype]:
        raise NondeterministicModelError(
            f"{problem.names[t]}: the model gives different results for the same weights and data, "
            "even in eval mode",
            DETERMINISTIC,
        )
    return one, narrowest.dtype


@torch.no_grad()
def _outputs(
    problem: Problem, weights: Weights, watch: AbstractContextManager[object]
) -> Iterator[Tensor]:
    """Yields the outputs for the first batch of each split; forward passes run within ``watch``."""
    objective = problem.objective
    # As a plain load_state_dict does, since the file may be loaded without losscli.
    with objective.as_stored():
        objective.load(weights)
    for split in objective.first_batches().values():
        inputs = objective.data.prepare(split.inputs, objective.dtype)
        # A model may modify its inputs.
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
    """Returns the largest difference, relative to the largest value of the same tensor."""
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
    """Finds the groups of units, on few examples."""
    objective = problem.objective
    split = next(iter(objective.first_batches().values()))
    inputs = objective.data.prepare(split.take(slice(0, _TRACED)).inputs, torch.float32)
    args, kwargs = objective.arguments(map_nest(lambda t: t.detach().cpu().clone(), inputs))
    traced = trace(problem.model_to_trace(), args, kwargs)
    groups = hidden_units(traced).groups
    if not groups:
        what = f"the model {problem.provenance['model']} has no hidden units that could be permuted"
        if met := obstacles(traced):
            raise ModelError(
                f"{what}: {', '.join(met)} may depend on the order of their inputs",
                "Alignment needs a hidden layer whose units no such operator uses",
            )
        raise ModelError(what, "Alignment needs a hidden layer")
    return groups
