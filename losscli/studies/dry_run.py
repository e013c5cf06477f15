"""What a run will do and how long it will take, without running it."""

from __future__ import annotations

import math
import time

from losscli.data import Split
from losscli.evaluation.cost import Clock, Timings, measure
from losscli.evaluation.device import float32_precision
from losscli.evaluation.memory import points_at_once
from losscli.results.summaries import CostEstimate, Description
from losscli.studies.base import Study

__all__ = ["describe", "estimate", "evaluation_seconds"]

# Number of evaluations of first batches before a run, to verify strategies.
_VERIFICATIONS = 16


def describe(study: Study) -> Description:
    """Describes what a run will do.

    Args:
        study: What will be run.

    Returns:
        The numbers of points, examples and forward passes; the tensors that move; the points whose
        weights are in memory at once, and their bytes; the passes over the data, and over the
        training examples of BatchNorm's statistics; the bytes of data in memory, and the splits
        that are decoded in each pass instead.
    """
    objective = study.problem.objective
    examples = sum(split.rows for split in objective.splits.values())
    slices, points = study.slices
    chunk = min(points_at_once(objective, study.moving), points) if slices else 1
    passes = study.evaluations - slices * points + slices * math.ceil(points / chunk)
    training = objective.recalibration
    if training is not None:
        examples += training.examples
    streamed = [n for n, split in objective.splits.items() if not isinstance(split, Split)]
    added: Description = {}  # tells type checkers which entries studies add
    description: Description = {
        **study.origin(),
        **added,
        "points": study.evaluations,
        "batch_size": None if objective.batch_loss else objective.batch_size,
        "forward_passes": study.evaluations * examples * max(1, len(objective.seeds)),
        "points_at_once": chunk,
        "passes_over_data": passes,
        "passes_for_statistics": 0 if training is None else passes,
        "bytes_of_weights": chunk * sum(objective.tensors[n].nbytes for n in study.moving),
        "bytes_of_data": sum(split.nbytes for split in objective.splits.values()),
        "streamed": bool(streamed),
        "streamed_splits": streamed,
    }
    return {**description, **study.extra_description(description)}


def estimate(study: Study, clock: Clock = time.perf_counter) -> CostEstimate:
    """Estimates how long a run will take, from one batch; everything else is counted.

    Args:
        study: What will be run.
        clock: The clock.

    Returns:
        ``seconds``; of what ``kind`` they are: ``about``, ``at least`` or ``at most``; and the
        ``batch``, its ``examples`` and its ``seconds`` at one point.

    Raises:
        LosscliError: The model or the loss fails on the batch, or one example does not fit.
    """
    with float32_precision(tf32=study.problem.settings.tf32):
        timings = _measure(study, clock)
        seconds, sample = evaluation_seconds(study, timings), study.problem.settings.sampling_error
        return {
            "seconds": seconds,
            "kind": "about" if sample is None else "at most",
            "batch": {"examples": timings.examples, "seconds": timings.batch},
            **study.extra_cost(timings, clock, seconds),
        }


def _measure(study: Study, clock: Clock) -> Timings:
    """Measures how fast points are evaluated."""
    slices, points = study.slices
    objective, origin = study.problem.objective, study.problem.origin
    if not (slices and points):
        return measure(objective, origin, None, (), clock)
    fit = points_at_once(objective, study.moving)
    return measure(objective, origin, *study.sample(min(points, fit)), clock)


def evaluation_seconds(study: Study, timings: Timings) -> float:
    """Estimates the time of all evaluations of a run.

    Args:
        study: What will be run.
        timings: How fast points are evaluated.

    Returns:
        Seconds.
    """
    objective = study.problem.objective
    passes: int = describe(study)["passes_over_data"]
    splits = objective.splits.values()
    examples = sum(map(len, splits))
    training = 0 if objective.recalibration is None else len(objective.recalibration)
    plain = study.evaluations - study.swept
    firsts = sum(min(objective.batch_size, len(split)) for split in splits)
    streamed = sum(len(split) for split in splits if not isinstance(split, Split))
    return (
        examples * (plain * timings.plain + study.swept * timings.point)
        + study.swept * timings.making
        + study.evaluations * training * timings.statistics
        + passes * streamed * timings.decoding
        + _VERIFICATIONS * firsts * timings.plain
    )
