"""The loss around checkpoints: along random directions, the gradient, or Hessian eigenvectors."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import chain
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from losscli.checkpoint import CheckpointLike, expand_folders, name_checkpoints
from losscli.data import Examples
from losscli.errors import UsageError
from losscli.evaluation.cost import Clock, Timings
from losscli.evaluation.device import float32_precision
from losscli.evaluation.hessian.directions import Along, DerivativeDirections
from losscli.evaluation.ranks import Arrays, Ranks
from losscli.evaluation.sampling import Estimate
from losscli.evaluation.strategy_choice import choose_strategy
from losscli.evaluation.sweep import check, sweep_each, sweep_plain
from losscli.evaluation.tasks import ALONE, Execution
from losscli.registry import COMMANDS
from losscli.results.result import Result
from losscli.results.summaries import (
    AroundPoint,
    AroundSplit,
    AroundSummary,
    BasinRadius,
    CostEstimate,
    Derivative,
    Description,
)
from losscli.settings import Progress, Settings, checked
from losscli.studies.base import Study
from losscli.studies.checkpoints import require_distinct
from losscli.studies.notes import (
    derivative_notes,
    general_notes,
    integer_notes,
    sampling_notes,
    seed_notes,
    spectral_notes,
    storage_notes,
)
from losscli.studies.problem import counted, prepare
from losscli.studies.verification import (
    check_gradient_settings,
    differentiable_parameters,
    verify_fresh_model_near,
    verify_sweep,
)
from losscli.table import Table
from losscli.weight_space.basin import Profile, Radius, radius
from losscli.weight_space.curve import relative_rounding, unit_of_rounding
from losscli.weight_space.directions import (
    NO_DIRECTION,
    has_filters,
    normalisation_parameters,
    random_direction,
)
from losscli.weight_space.slices import Line, Slice, check_point_count, grid
from losscli.weight_space.vectors import Weights, norm
from losscli.wording import format_count, list_first

__all__ = ["Around", "around"]

_DIRECTIONS = 20
_BASIN = 2.0

# Filter-normalised directions are as long as the weights, and the others have length one. A random
# direction and its opposite are equally likely, so one side shows as much as the other.
_RANGES: Mapping[Along | None, tuple[float, float]] = {
    None: (0.0, 1.0),
    "gradient": (-0.5, 0.5),
    "hessian": (-0.5, 0.5),
}


@checked(Settings)
def around(
    names: CheckpointLike | Iterable[CheckpointLike],
    *,
    directions: int = _DIRECTIONS,
    along: Along | None = None,
    range: tuple[float, float] | None = None,  # noqa: A002 - the option's name
    points: int = 21,
    basin: float | None = None,
    basin_loss: float | None = None,
    progress: Progress = None,
    **settings: Any,
) -> Result[AroundSummary]:
    """Evaluates the loss around checkpoints, and the radius of each basin.

    By default along random directions, filter-normalised (Li et al. 2018, arXiv 1712.09913), with
    the same draws for every checkpoint. All of them are as long as the weights that move, so equal
    coefficients are equal distances: the mean over directions at a distance needs no interpolation.
    With ``along`` the directions have length one and belong to the first split: the gradient ∇L,
    or the eigenvectors v1, v2 and vn of the largest, second largest and smallest eigenvalue of the
    Hessian.

    The basin radius is the largest distance up to which the mean loss over random directions, or
    the loss along each other direction, stays below a threshold; it is interpolated by parabolas.
    Its error is that of the jackknife over directions.

    Args:
        names: The checkpoints, each once: files, ``FILE#KEY``, ``init:SEED``, or a folder of them.
        directions: The number of random directions.
        along: ``gradient`` or ``hessian`` instead of random directions.
        range: The lowest and the highest coefficient; by default 0 and 1 for random directions,
            and −0.5 and 0.5 for others.
        points: Evenly spaced coefficients; 0 is added.
        basin: The threshold as a multiple of the loss of the checkpoint, by default 2.
        basin_loss: The threshold as a loss.
        progress: True shows a bar; a function is called with the number of points done so far.
        **settings: The attributes of `losscli.settings.Settings`: ``model``, ``data``, ….

    Returns:
        The result: its table has a row for each checkpoint, direction, coefficient and split.

    Raises:
        LosscliError: Something is missing, broken or does not fit.
    """
    plan = Around.plan(
        name_checkpoints(names),
        Settings(**settings),
        directions=directions,
        along=along,
        range_=range,
        points=points,
        basin=basin,
        basin_loss=basin_loss,
    )
    return plan.run_alone(progress)


@dataclass(frozen=True)
class Around(Study):
    """Checkpoints with directions around them that are ready to be evaluated.

    Attributes:
        along: What the directions are; None for random ones.
        number: The number of random directions.
        coefficients: The points along each direction, ascending; 0 is one of them.
        norms: ‖θ‖ of each checkpoint, over the parameters that move.
        basin: The threshold of the basin as a multiple of the loss; None for ``basin_loss``.
        basin_loss: The threshold as a loss; None for ``basin``.
    """

    command = "around"

    along: Along | None
    number: int
    coefficients: tuple[float, ...]
    norms: tuple[float, ...]
    basin: float | None
    basin_loss: float | None

    @classmethod
    def plan(
        cls,
        names: Sequence[str],
        settings: Settings,
        *,
        directions: int = _DIRECTIONS,
        along: Along | None = None,
        range_: tuple[float, float] | None = None,
        points: int = 21,
        basin: float | None = None,
        basin_loss: float | None = None,
        ranks: Ranks | None = None,
    ) -> Around:
        """Reads and matches everything, evaluates nothing. See `around` for the arguments."""
        begun = time.perf_counter()
        names = expand_folders(names)
        if not names:
            raise UsageError("around needs a checkpoint", "Give one or more")
        require_distinct(names)
        _check_directions(directions, along, settings)
        _check_basin(basin, basin_loss)
        check_point_count("--points", points, (3 if along else 1) * points * len(names))
        if not along:
            check_point_count("--directions", directions, directions * points * len(names))
        coefficients = _coefficients(points, range_ or _RANGES[along])
        problem = prepare(names, settings, ranks=ranks, independent=True)
        if along:
            moving = differentiable_parameters(problem, "--along")
        else:
            still = normalisation_parameters(problem.objective.model).union(problem.buffers)
            first = problem.first.weights
            moving = tuple(n for n in problem.moving if n not in still and has_filters(first[n]))
        counted = problem.parameters(moving)
        norms = tuple(norm(problem.open(t).weights, counted) for t, _ in enumerate(names))
        if not along and not all(norms):
            reason, cure = NO_DIRECTION
            name = names[norms.index(0)]
            raise UsageError(f"{name} has no random direction: {reason}", cure)
        return cls(
            *(problem, moving, begun, along, directions, coefficients, norms),
            _BASIN if basin is None and basin_loss is None else basin,
            basin_loss,
        )

    @property
    def options(self) -> dict[str, Any]:
        """The directions, the points and the threshold."""
        return {
            "along": self.along,
            "directions": None if self.along else self.number,
            "coefficients": self.coefficients,
            "basin": self.basin,
            "basin_loss": self.basin_loss,
        }

    @cached_property
    def directions(self) -> tuple[str, ...]:
        """The names of the directions."""
        if self._derivatives is not None:
            return self._derivatives.labels
        return tuple(str(k + 1) for k in range(self.number))

    @property
    def slices(self) -> tuple[int, int]:
        """A line for each direction from each checkpoint, without the checkpoint itself."""
        return len(self.norms) * len(self.directions), len(self._apart)

    @property
    def evaluations(self) -> int:
        """How many points a run evaluates: each checkpoint once, and the lines from it."""
        return len(self.norms) + self.swept

    @property
    def lengths(self) -> tuple[float, ...]:
        """The length of the directions of each checkpoint."""
        return (1.0,) * len(self.norms) if self.along else self.norms

    @property
    def _apart(self) -> tuple[float, ...]:
        return tuple(c for c in self.coefficients if c)

    @cached_property
    def _derivatives(self) -> DerivativeDirections | None:
        """The directions of ``along``; None for random ones."""
        if self.along is None:
            return None
        objective, seed = self.problem.objective, self.problem.settings.seed
        split = next(iter(objective.splits))
        return DerivativeDirections(objective, self.moving, split, self.along, seed)

    def sample(self, number: int) -> tuple[Slice, Sequence[Sequence[float]]]:
        """Returns a line from the first checkpoint, and some points of it."""
        origin = self.problem.origin
        # Points along any direction take as long.
        return self._line(origin, origin), [(c,) for c in self._apart[:number]]

    def extra_description(self, description: Description) -> Description:  # noqa: ARG002
        """Returns the work of derivatives, if there are any."""
        if self._derivatives is None:
            return {}
        return self._derivatives.extra_description(len(self.norms))

    def extra_cost(self, timings: Timings, clock: Clock, seconds: float) -> CostEstimate:  # noqa: ARG002
        """Estimates what the run takes with derivatives, if there are any."""
        if self._derivatives is None:
            return {}
        return self._derivatives.extra_cost(len(self.norms), self.problem.origin, clock, seconds)

    def run(self, execution: Execution = ALONE) -> Result[AroundSummary]:
        """Evaluates each checkpoint once, loaded plainly, and each line from it by a sweep."""
        objective, settings = self.problem.objective, self.problem.settings
        with float32_precision(tf32=settings.tf32):
            swept = time.perf_counter()
            last = self.problem.place(self.problem.last.weights)
            check(objective, self.problem.origin, last)
            derived: list[Arrays] = []
            if self._derivatives is not None:
                places = self.problem.places(range(len(self.norms)))
                derived = self._derivatives.find_all(places, self.problem.names, execution)
            difference = self._verify(derived)
            verify_fresh_model_near(self.problem, last, self.moving)
            stays = [
                *integer_notes(self, last, self.problem.last.weights),
                *spectral_notes(self),
            ]
            del last
            found = self.evaluate(partial(self._evaluate, derived), execution)
            seconds = self.seconds(swept)
        examples = {name: estimate.examples for name, estimate in found.items()}
        splits: dict[str, AroundSplit] = {
            name: {"points": [self._point(t, estimate) for t, _ in enumerate(self.norms)]}
            for name, estimate in found.items()
        }
        derivatives = {
            name: self._derivatives.describe(of)
            for name, of in zip(self.problem.names, derived, strict=False)
            if self._derivatives is not None
        }
        table = self._table(found)
        summary: AroundSummary = {
            **self.origin(),
            "tables": [],
            "along": self.along,
            "derivatives": derivatives,
            "directions": list(self.directions),
            "coefficients": list(self.coefficients),
            "lengths": list(self.lengths),
            "norms": list(self.norms),
            "basin": self.basin,
            "basin_loss": self.basin_loss,
            "interpolation": "quadratic",
            **counted(objective, examples, self.problem.settings.seed),
            "splits": splits,
            "endpoint_difference": difference,
            "notes": [
                *stays,
                *self._notes(splits, derivatives, derived),
                *sampling_notes(self, examples),
                *seed_notes(self, table),
            ],
            "seconds": seconds,
        }
        return Result(table, summary, COMMANDS[self.command].draw)

    def _direction(self, t: int, k: int, placed: Weights, derived: Sequence[Arrays]) -> Weights:
        """Makes a direction of a checkpoint."""
        if self._derivatives is None:
            return random_direction(placed, self.moving, self.problem.settings.seed, k + 1)
        return self._derivatives.direction(derived[t], k, placed)

    def _line(self, placed: Weights, direction: Weights) -> Line:
        """Makes the line θ + c d, on the device."""
        wide = self.problem.working_type
        start = {
            name: placed[name].to(torch.promote_types(placed[name].dtype, wide))
            for name in self.moving
        }
        end = {name: x + direction[name].to(x) for name, x in start.items()}
        return Line(self.on_device(start), self.on_device(end))

    def _verify(self, derived: Sequence[Arrays]) -> float:
        """Compares the sweep with each checkpoint and with a point near it, loaded plainly."""
        objective, apart = self.problem.objective, [(c,) for c in self._apart]
        difference = 0.0
        for t, _ in enumerate(self.norms):
            placed = self.problem.placed(t)
            line = self._line(placed, self._direction(t, 0, placed, derived))
            objective.load(placed)
            choose_strategy(objective, line, apart)
            anchors = [((0.0,), placed), ((1.0,), {**placed, **line.b})]
            few = apart[:: max(1, len(apart) // 4)]
            difference = max(difference, verify_sweep(self.problem, line, anchors, few))
        objective.load(self.problem.origin)
        return difference

    def _evaluate(
        self, derived: Sequence[Arrays], splits: Mapping[str, Examples], execution: Execution
    ) -> dict[str, Estimate]:
        """Evaluates all checkpoints, then all lines; keeps only the mean losses of each point."""
        objective, steps = self.problem.objective, range(len(self.norms))
        places = self.problem.places(steps)
        own = sweep_plain(objective, places, splits=splits, execution=execution)
        opened = lru_cache(maxsize=1)(places.__getitem__)

        def line(t: int, k: int) -> Line:
            placed = opened(t)
            made = self._line(placed, self._direction(t, k, placed, derived))
            # Tensors that moved on the previous line are at its last point.
            objective.load(placed)
            return made

        lines = sweep_each(
            objective,
            (partial(line, t, k) for t in steps for k, _ in enumerate(self.directions)),
            [(c,) for c in self._apart],
            moving=self.moving,
            splits=splits,
            execution=execution.after(len(steps)),
        )
        parts: dict[str, list[Estimate]] = {name: [] for name in splits}
        for evaluations in chain(own, lines):
            for name, evaluation in evaluations.items():
                parts[name].append(Estimate.of_evaluation(evaluation))
        return {name: Estimate.join(of) for name, of in parts.items()}

    @cached_property
    def _places(self) -> NDArray[np.intp]:
        """The place of each point in an estimate, ``[checkpoints, directions, coefficients]``."""
        lines, points = self.slices
        at = np.arange(lines * points).reshape(len(self.norms), len(self.directions), points)
        zero = self.coefficients.index(0.0)
        # At 0 all directions of a checkpoint have the same point.
        own = np.broadcast_to(np.arange(len(self.norms))[:, None], at.shape[:2])
        return np.insert(at + len(self.norms), zero, own, axis=2)

    def _point(self, t: int, estimate: Estimate) -> AroundPoint:
        """Describes the loss around a checkpoint on one split."""
        own, losses = float(estimate.mean[t]), estimate.mean[self._places[t]]
        threshold: float | None = self.basin_loss
        if self.basin is not None:
            # A multiple of a loss that is not above 0 is not above the loss.
            threshold = self.basin * own if own > 0 else None
        size, length = self.norms[t], self.lengths[t]
        positions = [c * length for c in self.coefficients]
        curves = dict(zip(self.directions, losses[:, None], strict=True))
        if not self.along:
            curves = {"mean": losses}
        radii: dict[str, BasinRadius] = {}
        if threshold is not None and math.isfinite(threshold) and math.isfinite(own):
            for name, curve in curves.items():
                radii[name] = _radius_summary(radius(positions, curve, threshold), size)
        over = [x.tolist() for x in Profile.of(losses)] if not self.along else [[]] * 4
        return {
            "checkpoint": self.problem.names[t],
            "loss": own,
            "threshold": threshold,
            "distances": [abs(x) for x in positions],
            "relative_distances": [abs(x) / size if size else math.nan for x in positions],
            "mean": over[0],
            "deviation": over[1],
            "low": over[2],
            "high": over[3],
            "radii": radii,
            "not_finite": int(np.count_nonzero(~np.isfinite(losses))),
            "rounded": self._count_rounded(t, own, losses),
        }

    def _count_rounded(self, t: int, own: float, losses: NDArray[np.float64]) -> int:
        """Counts the points whose distance or loss may differ from the checkpoint's by rounding."""
        precision = self.problem.objective.precision
        distances = np.abs(np.array(self.coefficients)) * self.lengths[t]
        near = distances <= unit_of_rounding(precision) * self.norms[t]
        rounded = near | (np.abs(losses - own) <= relative_rounding(precision) * abs(own))
        return int(np.count_nonzero(rounded[:, distances > 0]))

    def _table(self, found: Mapping[str, Estimate]) -> Table:
        return self.loss_table(
            ["checkpoint", "direction", "coefficient", "distance", "split"],
            (
                (
                    [checkpoint, direction, c, abs(c * self.lengths[t]), name],
                    estimate,
                    int(self._places[t, k, p]),
                )
                for t, checkpoint in enumerate(self.problem.names)
                for k, direction in enumerate(self.directions)
                for p, c in enumerate(self.coefficients)
                for name, estimate in found.items()
            ),
        )

    def _notes(
        self,
        splits: Mapping[str, AroundSplit],
        derivatives: Mapping[str, Sequence[Derivative]],
        derived: Sequence[Arrays],
    ) -> list[str]:
        notes = [*general_notes(self), *storage_notes(self)]
        if not self.along and self.problem.chosen:
            notes.append("random directions are zero in all but the chosen tensors")
        if not self.along and len(self.directions) == 1:
            notes.append("one direction has no spread and no error: give --directions 2 or more")
        if self._derivatives is not None:
            notes += derivative_notes(self, self._derivatives, derived)
        for name, of in derivatives.items():
            if not all(math.isfinite(d.get("eigenvalue", d.get("gradient_norm", 0))) for d in of):
                what = "gradient" if self.along == "gradient" else "Hessian"
                notes.append(f"{name}: the {what} is not finite, so there is no direction")
            elif missed := [d["direction"] for d in of if not d.get("converged", True)]:
                notes.append(
                    f"{name}: the search for {' and '.join(missed)} has not converged: another "
                    "direction may have a larger curvature"
                )
        for name, split in splits.items():
            if number := sum(point["not_finite"] for point in split["points"]):
                notes.append(f"{name}: the loss of {format_count(number, 'point')} is not finite")
            for point in split["points"]:
                if number := point["rounded"]:
                    precision = self.problem.objective.precision
                    wider = "" if precision == "float64" else ", or --dtype float64"
                    rounding = f"by no more than the rounding of {precision}"
                    notes.append(
                        f"{name}: {format_count(number, 'point')} around {point['checkpoint']} "
                        f"differ from it {rounding}: give a larger --range{wider}"
                    )
            early = [
                p["checkpoint"]
                for p in split["points"]
                if any(found["bound"] == "at most" for found in p["radii"].values())
            ]
            if early:
                notes.append(
                    f"{name}: the loss around {list_first(early)} crosses the threshold before the "
                    "first point: for a basin radius, give a smaller --range or more --points"
                )
            lost = [
                p for p in split["points"] if p["threshold"] is None and math.isfinite(p["loss"])
            ]
            if lost:
                some = list_first([point["checkpoint"] for point in lost])
                loss = lost[0]["loss"]
                notes.append(
                    f"{name}: no basin radius of {some}: the loss {loss:.4g} is not above 0, so "
                    f"{self.basin:g} times the loss is not a threshold; give --basin-loss"
                )
        return notes


def _check_directions(directions: int, along: str | None, settings: Settings) -> None:
    if along is not None and along not in get_args(Along):
        raise UsageError(
            f"--along {along} is not known", f"Choose one of {', '.join(get_args(Along))}"
        )
    if directions < 1:
        raise UsageError(f"--directions must be at least 1, not {directions}", "Give 20")
    if not along:
        return
    if directions != _DIRECTIONS:
        raise UsageError(
            "--directions is the number of random directions, and --along replaces these",
            "Give one of the two options",
        )
    check_gradient_settings(settings, "--along")


def _check_basin(basin: float | None, basin_loss: float | None) -> None:
    if basin is not None and basin_loss is not None:
        raise UsageError("--basin and --basin-loss are both thresholds", "Give one of them")
    if basin is not None and not 1 < basin < math.inf:
        raise UsageError(f"--basin must be above 1, not {basin:g}", f"Give {_BASIN:g}")
    if basin_loss is not None and not math.isfinite(basin_loss):
        raise UsageError(f"--basin-loss {basin_loss} is not finite", "Give a loss")


def _coefficients(points: int, range_: tuple[float, float]) -> tuple[float, ...]:
    if points < 2:
        raise UsageError(f"--points must be at least 2, not {points}", "Give 21")
    low, high = range_
    coefficients = grid(points, low, high, include=[0.0])
    if 0.0 not in coefficients:
        raise UsageError(
            f"--range {low:g} {high:g} does not include 0, where the checkpoint is",
            "Give a range from 0 or below to 0 or above",
        )
    return tuple(coefficients)


def _radius_summary(found: Radius, size: float) -> BasinRadius:
    return {
        "distance": found.distance,
        "relative": found.distance / size if size else None,
        "stderr": None if math.isnan(found.error) else found.error,
        "bound": found.bound,
        "positions": list(found.positions),
    }
