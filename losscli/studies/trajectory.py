"""The path of training, relative to the straight line between its ends."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from losscli.checkpoint import CheckpointLike, name_checkpoints, order_path
from losscli.data import Examples
from losscli.errors import UsageError
from losscli.evaluation.device import float32_precision
from losscli.evaluation.ranks import Ranks
from losscli.evaluation.sampling import Estimate
from losscli.evaluation.strategy_choice import choose_strategy
from losscli.evaluation.sweep import check, sweep_each, sweep_plain
from losscli.evaluation.tasks import ALONE, Execution
from losscli.registry import COMMANDS
from losscli.results.result import Result
from losscli.results.summaries import PathLengths, RandomWalks, TrajectorySplit, TrajectorySummary
from losscli.settings import Progress, Settings, checked
from losscli.studies.base import Study
from losscli.studies.notes import (
    batchnorm_notes,
    general_notes,
    integer_notes_of_all,
    sampling_notes,
    seed_notes,
    spectral_notes,
    storage_notes,
    variance_notes,
)
from losscli.studies.problem import counted, differing_tensors, prepare
from losscli.studies.verification import verify_fresh_model, verify_sweep
from losscli.table import Cell, Table
from losscli.weight_space.curve import lowest
from losscli.weight_space.slices import Line, check_point_count, grid, point_between
from losscli.weight_space.trajectory import Path, measure, random_walks, ribbon
from losscli.weight_space.vectors import dimension
from losscli.wording import format_count

__all__ = ["Trajectory", "trajectory"]

_WALKS = 10

# Checkpoints per rank and round; the losses of all examples are kept for that long.
_SHARES = 4

# Maximum offset from the path, as a multiple of the largest residual.
_FARTHEST = 1e6


@checked(Settings)
def trajectory(
    names: CheckpointLike | Iterable[CheckpointLike],
    *,
    surface: bool = True,
    residuals: int = 21,
    reach: float = 1.25,
    random_walk: bool = False,
    keep_order: bool = False,
    progress: Progress = None,
    **settings: Any,
) -> Result[TrajectorySummary]:
    """Measures a training path against the straight line between its ends, and its losses.

    After Goodfellow, Vinyals & Saxe 2015, arXiv 1412.6544: the projection p_t onto the line, the
    residual r_t off it, and the ribbon L(θ_0 + p_t d + b v_t) along each step's own residual
    direction v_t, which turns as t goes on.

    Args:
        names: Three or more checkpoints in the order of training, or a folder of them.
        surface: Whether the ribbon is evaluated.
        residuals: Values of b at each step.
        reach: The largest b, as a multiple of the largest residual.
        random_walk: Whether random walks with the same step lengths are drawn too.
        keep_order: Take the checkpoints in the order of their names as they are given, and all
            files of a folder. By default names that a shell sorted are put into natural order,
            ``final*`` and ``last*`` come last, and ``best*`` is left out.
        progress: True shows a bar; a function is called with the number of points done so far.
        **settings: The attributes of `losscli.settings.Settings`: ``model``, ``data``, ….

    Returns:
        The result: its table has a row for each step and split, ``more["surface"]`` one for each
        point of the ribbon, ``more["walk"]`` one for each step of a random walk.

    Raises:
        LosscliError: Something is missing, broken or does not fit.
    """
    plan = Trajectory.plan(
        name_checkpoints(names),
        Settings(**settings),
        surface=surface,
        residuals=residuals,
        reach=reach,
        random_walk=random_walk,
        keep_order=keep_order,
    )
    return plan.run_alone(progress)


@dataclass(frozen=True)
class Trajectory(Study):
    """A training path that was measured and is ready to be evaluated.

    Attributes:
        path: Its projections, residuals and turns.
        offsets: The values of b at each step, ascending from 0; empty without a surface.
        random_walk: Whether random walks are drawn.
    """

    command = "trajectory"

    path: Path
    offsets: tuple[float, ...]
    random_walk: bool

    @classmethod
    def plan(
        cls,
        names: Sequence[str],
        settings: Settings,
        *,
        surface: bool,
        residuals: int,
        reach: float,
        random_walk: bool,
        keep_order: bool = False,
        ranks: Ranks | None = None,
    ) -> Trajectory:
        """Reads everything, measures the path. See `trajectory` for the arguments."""
        begun = time.perf_counter()
        names, notes = order_path(names, keep_order=keep_order)
        if len(names) < 3:
            raise UsageError(
                f"trajectory needs three checkpoints or more, and got {len(names)}",
                "Give a folder of them, or their names in the order of training",
            )
        if surface and residuals < 2:
            raise UsageError(f"--residuals {residuals} is not a surface", "Give 2 or more")
        if surface:
            check_point_count("--residuals", residuals, residuals * len(names))
        if surface and not 0 < reach <= _FARTHEST:
            raise UsageError(f"--reach {reach} is not a multiple of a length", "Give 1.25")
        problem = prepare(names, settings, notes, ranks)
        moving = differing_tensors(problem)
        counted = problem.parameters(moving)
        if moving and not counted:
            raise UsageError(
                "the checkpoints differ only in buffers: there is no path of parameters",
                "Compare two of them with losscli interpolate",
            )
        path = measure(lambda t: problem.open(t).weights, len(names), counted)
        largest = max(path.residual)
        offsets = grid(residuals, 0, reach * largest) if surface and largest else []
        return cls(problem, moving, begun, path, tuple(offsets), random_walk)

    @property
    def options(self) -> dict[str, Any]:
        """The values of b, and whether there are walks."""
        return {"offsets": self.offsets, "random_walk": self.random_walk}

    @property
    def has_surface(self) -> bool:
        """Whether there is a ribbon."""
        return bool(self.offsets)

    @property
    def slices(self) -> tuple[int, int]:
        """A line across the path at each step."""
        return (len(self.problem.names) if self.offsets else 0), len(self.offsets)

    @property
    def evaluations(self) -> int:
        """How many points a run evaluates: the checkpoints and the ribbon."""
        return len(self.problem.names) * (1 + len(self.offsets))

    def run(self, execution: Execution = ALONE) -> Result[TrajectorySummary]:
        """Evaluates the checkpoints, each loaded plainly, and the ribbon, each step by a sweep."""
        objective, settings = self.problem.objective, self.problem.settings
        with float32_precision(tf32=settings.tf32):
            swept = time.perf_counter()
            check(objective, self.problem.origin, self.problem.place(self.problem.last.weights))
            difference, stays = self._verify()
            found = self.evaluate(self._evaluate, execution)
            seconds = self.seconds(swept)
        examples = {name: estimate.examples for name, estimate in found.items()}
        splits = {name: self._split_summary(estimate) for name, estimate in found.items()}
        walks = self._walks()
        more = self._more(found, walks)
        table = self._table(found)
        summary: TrajectorySummary = {
            **self.origin(),
            "tables": list(more),
            **counted(objective, examples, self.problem.settings.seed),
            "path": self._path(),
            "random_walks": _walk_summary(walks),
            "splits": splits,
            "endpoint_difference": difference,
            "notes": [
                *stays,
                *self._notes(splits),
                *sampling_notes(self, examples),
                *seed_notes(self, table),
            ],
            "seconds": seconds,
        }
        return Result(table, summary, COMMANDS[self.command].draw, more)

    def _verify(self) -> tuple[float | None, list[str]]:
        """Verifies the sweep at both ends; frees the checkpoints that it reads."""
        weights = self.problem.last.weights
        first, last = self.problem.origin, self.problem.place(weights)
        difference = None
        if self.offsets:
            line = Line(self.on_device(first), self.on_device(last))
            steps = len(self.offsets)
            choose_strategy(self.problem.objective, line, [(i / steps,) for i in range(steps)])
            difference = verify_sweep(
                self.problem, line, [((0.0,), first), ((1.0,), last)], [(0.5,)]
            )
        verify_fresh_model(self.problem, last)
        notes = [*integer_notes_of_all(self), *spectral_notes(self)]
        if self.offsets:
            notes += batchnorm_notes(
                self,
                (first, last),
                lambda: point_between(first, last, self.moving, 0.5),
                "halfway between the first and the last checkpoint",
            )
        return difference, notes

    def _evaluate(
        self, splits: Mapping[str, Examples], execution: Execution
    ) -> dict[str, Estimate]:
        """Evaluates all checkpoints, then the ribbon; only means are kept."""
        checkpoints, across = [], []
        steps, number, done = range(len(self.problem.names)), len(self.offsets), 0
        # Ranks share checkpoints, so that each round needs several of them.
        at_once = 1 if execution.size == 1 else _SHARES * execution.size
        for begin in range(0, len(steps), at_once):
            some = steps[begin : begin + at_once]
            checkpoints += self._steps(some, splits, execution.after(done))
            done += len(some)
            across += self._across(some, splits, execution.after(done))
            done += len(some) * number
        return {
            name: Estimate.join([part[name] for part in (*checkpoints, *across)]) for name in splits
        }

    def _steps(
        self, steps: Sequence[int], splits: Mapping[str, Examples], execution: Execution
    ) -> list[dict[str, Estimate]]:
        """Evaluates checkpoints, loaded plainly."""
        objective, weights = self.problem.objective, self.problem.places(steps)
        found = sweep_plain(objective, weights, splits=splits, execution=execution)
        return [{name: Estimate.of_evaluation(e) for name, e in one.items()} for one in found]

    def _across(
        self, steps: Sequence[int], splits: Mapping[str, Examples], execution: Execution
    ) -> list[dict[str, Estimate]]:
        """Evaluates the lines across the path at checkpoints, if there is a ribbon."""
        found = sweep_each(
            self.problem.objective,
            (partial(self._ribbon, t) for t in steps if self.offsets),
            [(b / self.offsets[-1],) for b in self.offsets],
            moving=self.moving,
            splits=splits,
            execution=execution,
        )
        return [{name: Estimate.of_evaluation(e) for name, e in one.items()} for one in found]

    def _ribbon(self, t: int) -> Line:
        """The line across the path at a checkpoint."""
        dtype = self.problem.working_type
        line = ribbon(self.weights, self.path, t, self.moving, self.offsets[-1], dtype)
        assert line is not None  # a path without residuals has no offsets
        return Line(self.on_device(line.a), self.on_device(line.b))

    def _table(self, found: Mapping[str, Estimate]) -> Table:
        path = self.path
        measures = zip(path.projection, path.residual, path.distance, path.turn, strict=True)
        return self.loss_table(
            [
                *("step", "checkpoint", "projection", "residual", "distance", "turn_degrees"),
                "split",
            ],
            (
                ([t, name, *measured, split], estimate, t)
                for t, (name, measured) in enumerate(zip(self.problem.names, measures, strict=True))
                for split, estimate in found.items()
            ),
        )

    def _walks(self) -> list[Path]:
        if not self.random_walk:
            return []
        size = dimension(self.problem.first.weights, self.counted)
        return random_walks(self.path.steps, size, _WALKS, self.problem.settings.seed)

    def _more(self, found: Mapping[str, Estimate], walks: Sequence[Path]) -> dict[str, Table]:
        more = {}
        steps, offsets, path = len(self.problem.names), self.offsets, self.path
        if offsets:
            rows = (
                [t, path.projection[t], b, split, *estimate.row(steps + t * len(offsets) + i, {})]
                for t in range(steps)
                for i, b in enumerate(offsets)
                for split, estimate in found.items()
            )
            more["surface"] = Table.build(
                ["step", "projection", "residual", "split", "loss", "loss_stderr"], rows
            )
        if walks:
            more["walk"] = _walk_table(walks)
        return more

    def _path(self) -> PathLengths:
        path = self.path
        farthest = max(range(len(path.residual)), key=path.residual.__getitem__)
        back = [
            t for t in range(1, len(path.projection)) if path.projection[t] < path.projection[t - 1]
        ]
        return {
            "length": path.length,
            "walked": math.fsum(path.steps),
            "farthest": {
                "step": farthest,
                "checkpoint": self.problem.names[farthest],
                "residual": path.residual[farthest],
                "projection": path.projection[farthest],
            },
            "steps_back": back,
        }

    def _split_summary(self, estimate: Estimate) -> TrajectorySplit:
        """Summarises the losses of one split."""
        steps = len(self.problem.names)
        losses, ribbon_ = estimate.mean[:steps].tolist(), estimate.mean[steps:].tolist()
        finite = [t for t in range(steps) if math.isfinite(losses[t])]
        shared = lowest(losses)
        summary: TrajectorySplit = {
            "loss_first": losses[0],
            "loss_last": losses[-1],
            "lowest": None
            if not shared
            else {
                "step": shared[0],
                "checkpoint": self.problem.names[shared[0]],
                "loss": losses[shared[0]],
                "ties": len(shared),
            },
            "rises": sum(later > earlier for earlier, later in pairwise(losses)),
            "not_finite": steps - len(finite),
        }
        if ribbon_:
            points = [i for i, loss in enumerate(ribbon_) if math.isfinite(loss)]
            if best := lowest(ribbon_):
                t, i = divmod(best[0], len(self.offsets))
                summary["surface_lowest"] = {
                    "step": t,
                    "projection": self.path.projection[t],
                    "residual": self.offsets[i],
                    "loss": ribbon_[best[0]],
                    "ties": len(best),
                }
            summary["surface_not_finite"] = len(ribbon_) - len(points)
        return summary

    def _notes(self, splits: Mapping[str, TrajectorySplit]) -> list[str]:
        notes = [*general_notes(self), *storage_notes(self)]
        if self.problem.chosen:
            notes.append("projections, residuals and distances are those of the moving parameters")
        if not max(self.path.residual):
            notes.append(
                "the path is the straight line: it has no residual direction, and no surface"
            )
        if any(split.get("surface_not_finite") for split in splits.values()):
            notes += variance_notes(
                self, (self._ribbon(t).b for t, _ in enumerate(self.problem.names))
            )
        for name, split in splits.items():
            for noun, where, number in (
                ("checkpoint", "", split["not_finite"]),
                ("point", " of the surface", split.get("surface_not_finite", 0)),
            ):
                if number:
                    points = f"{format_count(number, noun)}{where}"
                    notes.append(f"{name}: the loss of {points} is not finite")
        return notes


def _walk_summary(walks: Sequence[Path]) -> RandomWalks | None:
    """Returns the mean distance of the ends of random walks, and their mean largest residual."""
    if not walks:
        return None
    return {
        "number": len(walks),
        "length": math.fsum(walk.length for walk in walks) / len(walks),
        "largest_residual": math.fsum(max(walk.residual) for walk in walks) / len(walks),
    }


def _walk_table(walks: Sequence[Path]) -> Table:
    rows: list[list[Cell]] = []
    for number, walk in enumerate(walks):
        places = zip(walk.projection, walk.residual, walk.distance, walk.turn, strict=True)
        rows += ([number, t, *place] for t, place in enumerate(places))
    columns = ["walk", "step", "projection", "residual", "distance", "turn_degrees"]
    return Table.build(columns, rows)
