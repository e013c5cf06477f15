"""Sharpness of the loss at checkpoints: average, worst-case, SAM and critical sharpness."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import product
from typing import Any

import numpy as np

from losscli.checkpoint import CheckpointLike, name_checkpoints, order_path
from losscli.errors import UsageError
from losscli.evaluation.cost import Clock, Timings, timed
from losscli.evaluation.critical_step import MAX_SCANNED, Reason
from losscli.evaluation.device import float32_precision
from losscli.evaluation.hessian.curvature import Curvature
from losscli.evaluation.objective import Evaluation, recalibrated
from losscli.evaluation.ranks import Arrays, Ranks
from losscli.evaluation.records import record_key, restore
from losscli.evaluation.sharpness import (
    MAX_GRADIENTS,
    GradientSharpness,
    SharpnessTest,
    perturbation_line,
    rises,
    widened,
)
from losscli.evaluation.strategy_choice import choose_strategy
from losscli.evaluation.sweep import check as check_objective
from losscli.evaluation.sweep import sweep_each, sweep_plain
from losscli.evaluation.tasks import ALONE, Execution, Task
from losscli.registry import COMMANDS
from losscli.results.result import Result
from losscli.results.summaries import CostEstimate, Description, SharpnessPoint, SharpnessSummary
from losscli.settings import Progress, Settings, checked
from losscli.studies.base import Study
from losscli.studies.checkpoints import require_distinct
from losscli.studies.notes import general_notes, spectral_notes, storage_notes
from losscli.studies.problem import Problem, counted, prepare
from losscli.studies.verification import (
    differentiable_parameters,
    verify_fresh_model_near,
    verify_sweep,
)
from losscli.table import Cell, Table
from losscli.weight_space.curve import standard_error
from losscli.weight_space.slices import Line, Slice, check_point_count
from losscli.weight_space.vectors import Weights
from losscli.wording import list_first

__all__ = ["Sharpness", "sharpness"]

_RHO = 0.05
_SAMPLES = 20

# Points at which the sweep is compared with loaded points: enough to share a first layer, which the
# points of a few ρ do not.
_PROOF = [(0.25,), (0.5,), (0.75,), (1.0,)]

# The cost of a gradient, in forward passes.
_PASSES = 3

# The keys of a learning rate in the metadata of a checkpoint.
_LEARNING_RATES = ("learning_rate", "lr")

_GENERALISATION = (
    "sharpness does not correlate well with generalisation (Andriushchenko et al. 2023, "
    "arXiv 2302.07011)"
)


@dataclass(frozen=True)
class _Measured:
    """What was measured at one checkpoint on one split.

    Attributes:
        average: The rise of the mean loss for each draw and each ρ, ``[samples, R]``.
        worst: The largest rise found in the ball of each ρ, its standard error, and the gradients.
        gradient: SAM and critical sharpness.
    """

    average: Sequence[Sequence[float]]
    worst: Sequence[Sequence[float]]
    gradient: GradientSharpness

    def rows(self, rho: Sequence[float]) -> Iterator[list[Cell]]:
        """Yields the cells of each ρ after its checkpoint and split."""
        found = self.gradient
        critical: list[Cell] = [None, None]
        if not math.isnan(found.step):
            critical = [found.step, found.critical]
        for r, (radius, (average, average_error)) in enumerate(zip(rho, self.means, strict=True)):
            worst, worst_error, _ = self.worst[r]
            sam, sam_error = found.sam[r] if found.sam else (None, math.nan)
            yield [
                radius,
                *(average, _cell(average_error)),
                *(worst, _cell(worst_error)),
                *(sam, _cell(sam_error)),
                *critical,
            ]

    @property
    def means(self) -> list[tuple[float, float]]:
        """The mean over draws for each ρ, and its standard error."""
        with np.errstate(all="ignore"):
            return [(float(x.mean()), standard_error(x)) for x in np.array(self.average).T]

    @property
    def values(self) -> list[float]:
        """The rises of the loss of all measures, except those that are not defined."""
        sam = [value for value, _ in self.gradient.sam]
        return [*(mean for mean, _ in self.means), *(value for value, *_ in self.worst), *sam]

    def is_finite(self) -> bool:
        """Whether all rises of the loss are."""
        return all(map(math.isfinite, self.values))

    def is_rounded(self) -> bool:
        """Whether rounding may be all of a rise."""
        return any(abs(value) <= self.gradient.rounding for value in self.values)

    def summary(self, checkpoint: str) -> SharpnessPoint:
        """Returns the entries that the table has no columns for."""
        found = self.gradient
        return {
            "checkpoint": checkpoint,
            "loss": found.loss,
            "gradient_norm": found.gradient_norm,
            "loss_rounding": found.rounding,
            "critical_sharpness_error": found.critical_error,
            "critical_reason": found.reason or None,
            "gradients": [int(number) for *_, number in self.worst],
            "unverified": found.unverified or None,
            "loss_seed_stderr": None if math.isnan(found.seed_error) else found.seed_error,
        }


@checked(Settings)
def sharpness(
    names: CheckpointLike | Iterable[CheckpointLike],
    *,
    rho: tuple[float, ...] = (_RHO,),
    adaptive: bool = False,
    samples: int = _SAMPLES,
    direction_split: str | None = None,
    keep_order: bool = False,
    progress: Progress = None,
    **settings: Any,
) -> Result[SharpnessSummary]:
    """Measures how sharp the loss is at checkpoints.

    Average, worst-case and SAM sharpness are rises of the loss within a radius ρ, see
    `losscli.evaluation.sharpness` for the formulas. Critical sharpness is 2/η with the smallest
    step η along −∇L that was found to raise the loss; it does not depend on ρ.

    Args:
        names: The checkpoints, in the order of training where there are several.
        rho: The radii.
        adaptive: Whether perturbations are scaled by abs(θ) elementwise.
        samples: The number of random perturbations that average sharpness is the mean over.
        direction_split: The split with the gradient that critical steps are along; by default that
            of the loss itself. With another one, it is relative critical sharpness.
        keep_order: Take the checkpoints in the order of their names as they are given, and all
            files of a folder; by default they are ordered as `trajectory` does.
        progress: True shows a bar; a function is called with the number of points done so far.
        **settings: The attributes of `losscli.settings.Settings`: ``model``, ``data``, ….

    Returns:
        The result: its table has a row for each checkpoint, split and ρ.

    Raises:
        LosscliError: Something is missing, broken or does not fit.
    """
    plan = Sharpness.plan(
        name_checkpoints(names),
        Settings(**settings),
        rho=rho,
        adaptive=adaptive,
        samples=samples,
        direction_split=direction_split,
        keep_order=keep_order,
    )
    return plan.run_alone(progress)


@dataclass(frozen=True)
class Sharpness(Study):
    """Checkpoints that are ready to be measured.

    Attributes:
        rho: The radii, ascending.
        adaptive: Whether perturbations are scaled by abs(θ).
        samples: The number of random perturbations.
        direction_split: The split with the gradient that critical steps are along; None for that
            of the loss itself.
        learning_rates: The learning rates in the metadata of checkpoints, by their names.
    """

    command = "sharpness"

    rho: tuple[float, ...]
    adaptive: bool
    samples: int
    direction_split: str | None
    learning_rates: Mapping[str, float]

    @classmethod
    def plan(
        cls,
        names: Sequence[str],
        settings: Settings,
        *,
        rho: Sequence[float] = (_RHO,),
        adaptive: bool = False,
        samples: int = _SAMPLES,
        direction_split: str | None = None,
        keep_order: bool = False,
        ranks: Ranks | None = None,
    ) -> Sharpness:
        """Reads and matches everything, evaluates nothing. See `sharpness` for the arguments."""
        begun = time.perf_counter()
        names, notes = order_path(names, keep_order=keep_order)
        if not names:
            raise UsageError("sharpness needs a checkpoint", "Give one or more")
        require_distinct(names)
        _check_options(rho, samples, settings)
        check_point_count("--samples", samples, samples * len(rho) * len(names))
        problem = prepare(names, settings, notes, ranks, independent=True)
        splits = list(problem.objective.splits)
        if direction_split not in {None, *splits}:
            raise UsageError(
                f"--direction-split {direction_split} is not evaluated",
                f"Choose one of {', '.join(splits)}, or add it with --split",
            )
        moving = differentiable_parameters(problem, "sharpness")
        return cls(
            *(problem, moving, begun, tuple(sorted(rho)), adaptive, samples, direction_split),
            _learning_rates(problem),
        )

    @property
    def options(self) -> dict[str, Any]:
        """What is measured."""
        return {
            "rho": self.rho,
            "adaptive": self.adaptive,
            "samples": self.samples,
            "direction_split": self.direction_split,
        }

    @property
    def slices(self) -> tuple[int, int]:
        """A line for each checkpoint and random perturbation, with a point for each ρ."""
        return len(self.problem.names) * self.samples, len(self.rho)

    @property
    def evaluations(self) -> int:
        """How many points are evaluated for averages: the checkpoints and the lines."""
        return len(self.problem.names) + self.swept

    @property
    def steps(self) -> int:
        """The total of the progress: points, and gradients as the points that take as long."""
        return self.evaluations + len(self.problem.names) * (
            self._along + len(self.rho) * self._ascent
        )

    @property
    def _along(self) -> int:
        """The approximate cost of SAM and critical sharpness of a checkpoint, in points."""
        return len(self.rho) + MAX_SCANNED + 2 * _PASSES

    @property
    def _ascent(self) -> int:
        """The approximate cost of worst-case sharpness of a checkpoint for one ρ, in points."""
        return _PASSES * (MAX_GRADIENTS + 1)

    @property
    def _coordinates(self) -> list[tuple[float]]:
        return [(radius / self.rho[-1],) for radius in self.rho]

    @cached_property
    def _test(self) -> SharpnessTest:
        seed = self.problem.settings.seed
        return SharpnessTest(self.problem.objective, self.moving, self.adaptive, seed)

    def sample(self, number: int) -> tuple[Slice, Sequence[Sequence[float]]]:
        """Returns a line along a random perturbation, and ``number`` points of it."""
        return self._line(self.problem.origin, 0), self._coordinates[:number]

    def extra_description(self, description: Description) -> Description:  # noqa: ARG002
        """Returns the work in addition to random perturbations.

        Returns:
            The most gradients, and about the most points along them.
        """
        pairs = len(self.problem.names) * len(self.problem.objective.splits)
        return {
            "gradients_at_most": pairs * (1 + len(self.rho) * (MAX_GRADIENTS + 1)),
            "points_along_gradients": pairs * (len(self.rho) + MAX_SCANNED),
        }

    def extra_cost(self, timings: Timings, clock: Clock, seconds: float) -> CostEstimate:
        """Estimates what gradients and points along them take.

        Returns:
            ``seconds``, as if every ascent took as many steps as it may.
        """
        objective, origin = self.problem.objective, self.problem.origin
        batch = next(iter(objective.splits.values())).first(objective.batch_size)
        batch = batch.to(objective.device)

        def differentiate() -> None:
            with Curvature(objective, origin, self.moving, batch) as curvature:
                curvature.gradient()

        with objective.frozen_statistics():
            differentiate()  # a first time, for what is set up once
            took = timed(objective, differentiate, clock)
        examples = len(self.problem.names) * sum(map(len, objective.splits.values()))
        gradients = 1 + len(self.rho) * (MAX_GRADIENTS + 1)
        gradient, points = took / len(batch), len(self.rho) + MAX_SCANNED
        more = examples * (gradients * gradient + points * timings.plain)
        return {"seconds": seconds + more}

    def run(self, execution: Execution = ALONE) -> Result[SharpnessSummary]:
        """Evaluates random perturbations, then gradients and points along them."""
        objective, names = self.problem.objective, self.problem.names
        with float32_precision(tf32=self.problem.settings.tf32):
            swept = time.perf_counter()
            last = self.problem.place(self.problem.last.weights)
            check_objective(objective, self.problem.origin, last)
            # No table has a column for them.
            objective.metrics = {}
            verify_fresh_model_near(self.problem, last, self.moving)
            del last
            statistics = [self._statistics(t) for t, _ in enumerate(names)]
            point = lru_cache(maxsize=1)(partial(self._point, statistics))
            with objective.frozen_statistics():
                difference = self._verify(point)
                averages = self._average(point, execution)
                found = self._differentiate(point, averages, execution.after(self.evaluations))
            objective.load(self.problem.origin)
            seconds = self.seconds(swept)
        table = Table.build(
            [
                *("checkpoint", "split", "rho", "average", "average_stderr"),
                *("worst", "worst_stderr", "sam", "sam_stderr"),
                *("critical_step", "critical_sharpness"),
            ],
            (
                [names[t], split, *row]
                for (t, split), measured in found.items()
                for row in measured.rows(self.rho)
            ),
        )
        summary: SharpnessSummary = {
            **self.origin(),
            "tables": [],
            "rho": list(self.rho),
            "adaptive": self.adaptive,
            "samples": self.samples,
            "direction_split": self.direction_split,
            "learning_rates": dict(self.learning_rates),
            **counted(objective, {name: len(s) for name, s in objective.splits.items()}),
            "splits": {
                name: {
                    "points": [
                        measured.summary(names[t])
                        for (t, split), measured in found.items()
                        if split == name
                    ]
                }
                for name in objective.splits
            },
            "endpoint_difference": difference,
            "notes": [
                *general_notes(self),
                *spectral_notes(self),
                *storage_notes(self),
                *self._notes(found),
            ],
            "seconds": seconds,
        }
        return Result(table, summary, COMMANDS[self.command].draw)

    # --- Points ----------------------------------------------------------------------------------

    def _statistics(self, t: int) -> Weights:
        """Re-estimates BatchNorm's statistics at a checkpoint, if they are to be re-estimated."""
        objective = self.problem.objective
        if objective.recalibration is None:
            return {}
        found = recalibrated(objective, self.problem.placed(t))
        return {name: found[name] for layer in objective.statistics for name in layer.names}

    def _point(self, statistics: Sequence[Weights], t: int) -> Weights:
        """Returns all tensors of the model at a checkpoint."""
        placed = self.problem.placed(t)
        return widened(self.problem.objective, {**placed, **statistics[t]})

    def _line(self, weights: Weights, number: int) -> Line:
        """Makes the line along a random perturbation, on the device."""
        line = perturbation_line(
            weights,
            self.moving,
            radius=self.rho[-1],
            adaptive=self.adaptive,
            seed=self.problem.settings.seed,
            number=number,
        )
        return Line(self.on_device(line.a), self.on_device(line.b))

    def _verify(self, point: Callable[[int], Weights]) -> float:
        """Compares the sweep with each checkpoint, and with a point near it, loaded plainly."""
        objective = self.problem.objective
        difference = 0.0
        for t, _ in enumerate(self.problem.names):
            weights = point(t)
            line = self._line(weights, 0)
            objective.load(weights)
            choose_strategy(objective, line, _PROOF)
            anchors = [((0.0,), weights), ((1.0,), {**weights, **line.b})]
            difference = max(difference, verify_sweep(self.problem, line, anchors, _PROOF))
        return difference

    # --- Measures --------------------------------------------------------------------------------

    def _average(
        self, point: Callable[[int], Weights], execution: Execution
    ) -> dict[tuple[int, str], list[list[float]]]:
        """Evaluates random perturbations.

        Returns:
            For each checkpoint and split the rises of the mean loss, ``[samples, R]``.
        """
        objective, steps = self.problem.objective, range(len(self.problem.names))
        own: list[dict[str, Evaluation]] = []
        for t in steps:
            own += sweep_plain(objective, [point(t)], execution=execution.after(t))

        def line(t: int, number: int) -> Line:
            weights = point(t)
            # Tensors that moved on the previous line are at any of its points.
            objective.load(weights)
            return self._line(weights, number)

        pairs = list(product(steps, range(self.samples)))
        lines = sweep_each(
            objective,
            (partial(line, *pair) for pair in pairs),
            self._coordinates,
            moving=self.moving,
            execution=execution.after(len(steps)),
        )
        averages: dict[tuple[int, str], list[list[float]]] = {
            pair: [] for pair in product(steps, objective.splits)
        }
        for (t, _), evaluations in zip(pairs, lines, strict=True):
            for split, found in evaluations.items():
                averages[t, split].append([rise for rise, _ in rises(found, own[t][split])])
        return averages

    def _differentiate(
        self,
        point: Callable[[int], Weights],
        averages: Mapping[tuple[int, str], Sequence[Sequence[float]]],
        execution: Execution,
    ) -> dict[tuple[int, str], _Measured]:
        """Measures what needs gradients; each measure of a checkpoint and split is one task."""
        objective, test = self.problem.objective, self._test
        share = 1 / len(objective.splits)

        def along(t: int, split: str, own: Execution) -> Arrays:
            direction = self.direction_split or split
            return test.along_gradient(point(t), split, direction, self.rho, own)

        def worst(t: int, split: str, radius: float, own: Execution) -> Arrays:
            return test.worst_case(point(t), split, radius, own)

        def key(t: int, split: str, kind: str, radii: Sequence[float]) -> str:
            wanted = {split, self.direction_split if kind == "along" else split}
            examples = {n: s for n, s in objective.splits.items() if n in wanted}
            numbers = [split, list(self.moving), self.adaptive, test.seed, list(radii)]
            return record_key(objective, examples, kind, [point(t)], numbers)

        tasks: list[Task] = []
        for t, split in averages:
            own = execution.key(partial(key, t, split, "along", self.rho))
            tasks.append(Task(share * self._along, partial(along, t, split), own, ""))
            for radius in self.rho:
                own = execution.key(partial(key, t, split, "worst", [radius]))
                work = partial(worst, t, split, radius)
                tasks.append(Task(share * self._ascent, work, own, ""))
        arrays = execution.run(tasks)
        found: dict[tuple[int, str], _Measured] = {}
        for pair, average in averages.items():
            gradient, *ascents = (next(arrays) for _ in range(1 + len(self.rho)))
            restore(objective, int(gradient["batch size"]), gradient["idle"].tolist())
            found[pair] = _Measured(
                average,
                [ascent["worst"].tolist() for ascent in ascents],
                GradientSharpness.from_arrays(gradient),
            )
        return found

    # --- Notes -----------------------------------------------------------------------------------

    def _notes(self, found: Mapping[tuple[int, str], _Measured]) -> Iterator[str]:
        yield _GENERALISATION
        if not self.adaptive:
            size, radius = self.origin()["moving"]["values"], self.rho[0]
            yield (
                "average sharpness is that of perturbations of length about ρ√n = "
                f"{radius * math.sqrt(size):.3g} for ρ = {radius:g}, and the others of length ρ at "
                "most: they are not comparable at the same ρ"
            )
        if self.samples == 1:
            yield "one random perturbation has no standard error: give --samples 2 or more"
        if self.problem.objective.recalibration is not None:
            yield "around a checkpoint BatchNorm's statistics stay those re-estimated at it"
        if self.direction_split:
            yield (
                "critical steps of all splits are along the negative gradient of "
                f"{self.direction_split}: relative critical sharpness"
            )
        yield from dict.fromkeys(
            m.gradient.unverified for m in found.values() if m.gradient.unverified
        )
        precision = self.problem.objective.precision
        for split in self.problem.objective.splits:
            points = {t: measured for (t, of), measured in found.items() if of == split}
            for reason, text in _REASONS.items():
                yield from self._note(
                    split, [t for t, m in points.items() if m.gradient.reason == reason], text
                )
            yield from self._note(
                split,
                [t for t, m in points.items() if not m.gradient.sam],
                f"no SAM sharpness, because the gradient{' · |θ|' * self.adaptive} is 0",
            )
            yield from self._note(
                split,
                [t for t, m in points.items() if not m.is_finite()],
                "the loss is not finite at some perturbations",
            )
            yield from self._note(
                split,
                [t for t, m in points.items() if m.is_rounded()],
                f"some differences of losses are within the rounding of {precision}"
                + ("" if precision == "float64" else ": give --dtype float64, or a larger --rho"),
            )

    def _note(self, split: str, steps: Sequence[int], text: str) -> Iterator[str]:
        """Yields a note on some checkpoints, if there are any."""
        if steps:
            yield f"{split}, {list_first([self.problem.names[t] for t in steps])}: {text}"


_REASONS: Mapping[Reason, str] = {
    "zero gradient": "no critical step, because the gradient is 0",
    "ascends": "the loss rises at once along the other gradient, so critical sharpness is inf",
    "not finite": "no critical step, because the loss is not finite before it rises",
    "no crossing": "no critical step: no step up to 16 ‖θ‖ raises the loss",
    "rounding": "no critical step: rounding hides where the loss rises",
}


def _check_options(rho: Sequence[float], samples: int, settings: Settings) -> None:
    if not rho:
        raise UsageError("sharpness needs a radius", f"Give --rho {_RHO:g}")
    for radius in rho:
        if not 0 < radius < math.inf:
            raise UsageError(f"--rho must be above 0 and finite, not {radius:g}", f"Give {_RHO:g}")
    radius, times = Counter(rho).most_common(1)[0]
    if times > 1:
        raise UsageError(f"--rho {radius:g} is given {times} times", "Give each radius once")
    if samples < 1:
        raise UsageError(f"--samples must be at least 1, not {samples}", f"Give {_SAMPLES}")
    if settings.sampling_error is not None:
        raise UsageError(
            "--sampling-error is not available for sharpness, which needs the gradient over all "
            "examples",
            "Evaluate fewer examples with --limit",
        )


def _learning_rates(problem: Problem) -> dict[str, float]:
    """Reads the learning rates in the metadata of the checkpoints."""
    found: dict[str, float] = {}
    for t, name in enumerate(problem.names):
        metadata = problem.open(t).metadata
        for text in (metadata[key] for key in _LEARNING_RATES if key in metadata):
            with suppress(ValueError):
                rate = float(text)
                if 0 < rate < math.inf:
                    found[name] = rate
    return found


def _cell(value: float) -> Cell:
    """Returns a number for a table; empty if it is not defined."""
    return None if math.isnan(value) else value
