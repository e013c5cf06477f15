"""A path between two checkpoints on which the loss stays low, found by training its bends."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, get_args

from losscli.checkpoint import Checkpoint, CheckpointLike, name_checkpoint
from losscli.errors import UsageError
from losscli.evaluation.cost import Clock, Timings
from losscli.evaluation.device import float32_precision
from losscli.evaluation.objective import Evaluation, recalibrated
from losscli.evaluation.path_training import FORWARD_PASSES, PathTraining, TrainedBends
from losscli.evaluation.ranks import Ranks
from losscli.evaluation.sampling import Estimate
from losscli.evaluation.strategy_choice import choose_strategy
from losscli.evaluation.sweep import check, sweep, sweep_plain
from losscli.evaluation.tasks import ALONE, Execution
from losscli.progress import report_to
from losscli.registry import COMMANDS
from losscli.results.result import Result
from losscli.results.summaries import (
    ConnectPlane,
    ConnectSplit,
    ConnectSummary,
    CostEstimate,
    Description,
)
from losscli.settings import Progress, Settings, checked
from losscli.studies import alignment
from losscli.studies.base import Study
from losscli.studies.export import BendOf, digest_of_end
from losscli.studies.line_curve import LineCurve
from losscli.studies.notes import general_notes, integer_notes, seed_notes, storage_notes
from losscli.studies.plane_layout import with_margin
from losscli.studies.problem import counted, prepare, require_finite
from losscli.studies.verification import (
    differentiable_parameters,
    made_checkpoint,
    verify_fresh_model,
    verify_sweep,
)
from losscli.table import Table
from losscli.weight_space.curve import describe
from losscli.weight_space.slices import (
    Line,
    Path,
    PathKind,
    Slice,
    Triangle,
    grid,
    path_coefficients,
)
from losscli.weight_space.vectors import Weights, distance

__all__ = ["Connect", "ConnectResult", "connect"]

# Values of each coordinate of the plane, as `losscli plane` has them.
_PLANE_POINTS = 31

_MOST_BENDS = 100

# The losses of all steps are kept in memory.
_MOST_STEPS = 100_000_000

# A larger step leaves the range of float32.
_LARGEST_RATE = 1e30

# The settings that matter for an alignment, which evaluates no loss.
_FOR_ALIGNMENT = (
    *("model", "data", "device", "only", "except_", "seed", "trust", "limit"),
    *("ignore_unexpected", "allow_missing", "rename"),
)

# The training loss is the mean over this share of the steps, at the end.
_LAST = 0.1


@dataclass(frozen=True, repr=False)
class ConnectResult(Result[ConnectSummary]):
    """The result of `connect`.

    Attributes:
        bends: The trained bends in their order.
        aligned: B with its units permuted onto A's, if it was aligned.
    """

    bends: tuple[Checkpoint, ...] = field(kw_only=True)
    aligned: Checkpoint | None = field(kw_only=True)

    @property
    def checkpoints(self) -> Mapping[str, Checkpoint]:
        """The bends, and B if it was aligned, by the end of the name of their file, after STEM."""
        made = [*self.bends, *filter(None, [self.aligned])]
        suffixes = _suffixes(len(self.bends), aligned=self.aligned is not None)
        return dict(zip(suffixes, made, strict=True))


def _suffixes(bends: int, *, aligned: bool) -> list[str]:
    own = [f".bend-{k}.safetensors" for k in range(1, bends + 1)]
    return [*own, ".aligned.safetensors"] if aligned else own


@checked(Settings)
def connect(
    a: CheckpointLike,
    b: CheckpointLike,
    *,
    kind: PathKind = "bezier",
    bends: int = 1,
    steps: int = 1000,
    learning_rate: float = 0.01,
    minibatch: int = 256,
    points: int = 51,
    plane: bool = True,
    align: bool = False,
    progress: Progress = None,
    **settings: Any,
) -> ConnectResult:
    """Trains a path between two checkpoints (Garipov et al. 2018, arXiv 1802.10026).

    φ(t) goes from A to B with bends C, with one bend φ(t) = (1−t)² A + 2t(1−t) C + t² B. The
    bends start on the line and are trained by Adam on minibatches of the split ``train``, or of the
    only split, to minimise the mean of L(φ(t)) over t. The model is in eval mode, but BatchNorm has
    the statistics of each minibatch, and those of every evaluated point are re-estimated.

    Args:
        a: The checkpoint at t = 0.
        b: The checkpoint at t = 1.
        kind: ``bezier`` for a Bézier curve, ``chain`` for straight lines through the bends.
        bends: The number of bends.
        steps: The number of training steps.
        learning_rate: The learning rate of Adam.
        minibatch: Examples in a minibatch; all if there are fewer.
        points: Evenly spaced values of t on the curve and on the line.
        plane: Whether the plane through A, C and B is evaluated, if there is one bend.
        align: Whether B's units are first permuted to match A's, as `align` does.
        progress: True shows a bar; a function is called with the number of points done so far.
        **settings: The attributes of `losscli.settings.Settings`: ``model``, ``data``, ….

    Returns:
        The result: its table has a row for each path, ``curve`` and ``line``, point and split.

    Raises:
        LosscliError: Something is missing, broken or does not fit.
    """
    plan = Connect.plan(
        name_checkpoint(a, "A"),
        name_checkpoint(b, "B"),
        Settings(**settings),
        kind=kind,
        bends=bends,
        steps=steps,
        learning_rate=learning_rate,
        minibatch=minibatch,
        points=points,
        plane=plane,
        align=align,
    )
    with report_to(progress, plan.steps, plan.unit) as report:
        return plan.run(Execution(report))


@dataclass(frozen=True)
class Connect(Study):
    """A path that is ready to be trained and evaluated.

    Attributes:
        start: All tensors at t = 0.
        end: All tensors at t = 1; those that do not move are those of ``start``.
        kind: The kind of the path.
        bends: The number of bends.
        training_steps: The number of training steps.
        learning_rate: The learning rate of Adam.
        minibatch: The number of examples in a minibatch.
        ts: The points, in ascending order.
        plane: Whether the plane is evaluated.
        aligned: B with its units permuted onto A's, if it was aligned.
    """

    command = "connect"

    start: Weights
    end: Weights
    kind: PathKind
    bends: int
    training_steps: int
    learning_rate: float
    minibatch: int
    ts: tuple[float, ...]
    plane: bool
    aligned: Checkpoint | None
    given: tuple[str, str]

    @classmethod
    def plan(
        cls,
        a: str,
        b: str,
        settings: Settings,
        *,
        kind: PathKind,
        bends: int,
        steps: int,
        learning_rate: float,
        minibatch: int,
        points: int,
        plane: bool,
        align: bool = False,
        ranks: Ranks | None = None,
    ) -> Connect:
        """Reads and matches everything, evaluates nothing. See `connect` for the arguments."""
        begun = time.perf_counter()
        if kind not in get_args(PathKind):
            raise UsageError(f"--kind {kind} is not known", "Give bezier or chain")
        for option, value, most in (("bends", bends, _MOST_BENDS), ("steps", steps, _MOST_STEPS)):
            if value > most:
                raise UsageError(f"--{option} {value} is above {most:,}", "Give fewer")
        for option, value in (("bends", bends), ("steps", steps), ("minibatch", minibatch)):
            if value < 1:
                raise UsageError(f"--{option} {value} trains nothing", "Give 1 or more")
        if not 0 < learning_rate < _LARGEST_RATE:
            raise UsageError(
                f"--learning-rate {learning_rate:g} is not above 0 and below {_LARGEST_RATE:g}",
                "Give 0.01",
            )
        if settings.sampling_error is not None:
            raise UsageError(
                "--sampling-error is not available with connect", "Evaluate fewer with --limit"
            )
        ts = tuple(grid(points, 0.0, 1.0, include=(0.0, 1.0)))
        aligned, given = None, (a, b)
        if align:
            own = {name: getattr(settings, name) for name in _FOR_ALIGNMENT}
            aligned = alignment.align(a, b, **own).checkpoint
            b = name_checkpoint(aligned, aligned.name)
        problem = prepare((a, b), settings, ranks=ranks, training="connect", recalibrates=True)
        start, end = problem.origin, problem.place(problem.last.weights)
        names = differentiable_parameters(problem, "connect")
        for name, weights in ((a, start), (b, end)):
            require_finite(name, weights, problem.moving)
        if not distance(start, end, names):
            raise UsageError(
                "A and B have the same parameters: there is nothing to connect",
                "Give two different checkpoints",
            )
        assert problem.training is not None
        training = len(problem.training.examples)
        if problem.objective.batchnorm and min(minibatch, training) < 2:
            raise UsageError(
                "BatchNorm has no variance in a minibatch of one example",
                "Give a larger --minibatch",
            )
        return cls(
            *(problem, problem.moving, begun, start, end, kind, bends, steps, learning_rate),
            1 if problem.objective.batch_loss else min(minibatch, training),
            ts,
            plane and bends == 1,
            aligned,
            given,
        )

    @property
    def has_surface(self) -> bool:
        """Whether the plane is evaluated."""
        return self.plane

    @property
    def inputs(self) -> Sequence[str]:
        """A and B as they are in their files, also if B was aligned."""
        return self.given

    @property
    def options(self) -> dict[str, Any]:
        """The path, its training and the points."""
        return {
            "kind": self.kind,
            "bends": self.bends,
            "steps": self.training_steps,
            "learning_rate": self.learning_rate,
            "minibatch": self.minibatch,
            "ts": self.ts,
            "plane": self.plane,
            "align": self.aligned is not None,
        }

    @property
    def checkpoint_suffixes(self) -> Sequence[str]:
        """The ends of the names of the files of the bends, and of B if it was aligned."""
        return _suffixes(self.bends, aligned=self.aligned is not None)

    @property
    def slices(self) -> tuple[int, int]:
        """The curve and the line."""
        return 2, len(self.ts) - 2

    @property
    def swept(self) -> int:
        """How many points are evaluated by sweeps, including those of the plane."""
        return super().swept + self.plane * _PLANE_POINTS**2

    @property
    def evaluations(self) -> int:
        """How many points a run evaluates: both ends, the curve, the line and the plane."""
        return 2 + self.swept

    @property
    def steps(self) -> int:
        """The points, and the training in units of the cost of one."""
        return self.evaluations + math.ceil(self.training_steps * self._points_per_step)

    @property
    def _points_per_step(self) -> float:
        """The cost of a step relative to that of a point."""
        examples = sum(map(len, self.problem.objective.splits.values()))
        return FORWARD_PASSES * self.minibatch / max(1, examples)

    def extra_description(self, description: Description) -> Description:  # noqa: ARG002
        """Returns the number of training steps, and the bytes of the vectors that they take."""
        return {"training_steps": self.training_steps, "bytes_of_training": self._training.nbytes}

    def extra_cost(self, timings: Timings, clock: Clock, seconds: float) -> CostEstimate:
        """Returns the time with the training: of forward passes, and of each bend's vectors."""
        step = FORWARD_PASSES * self.minibatch * timings.plain
        step += self.bends * self._training.seconds_per_bend(clock)
        return {"seconds": seconds + self.training_steps * step}

    def sample(self, number: int) -> tuple[Slice, Sequence[Sequence[float]]]:
        """Returns a path with bends at A, which takes as long as the curve, and its points."""
        line, points = super().sample(number)
        first, last = line.ends
        return Path(self.kind, (first, *[first] * self.bends, last)), points

    @cached_property
    def _training(self) -> PathTraining:
        problem = self.problem
        assert problem.training is not None
        counted_ = self.counted
        return PathTraining(
            problem.objective,
            self.start,
            self.end,
            names=counted_,
            buffers=[name for name in self.moving if name not in set(counted_)],
            kind=self.kind,
            bends=self.bends,
            examples=(problem.training.name, problem.training.examples),
            steps=self.training_steps,
            learning_rate=self.learning_rate,
            minibatch=self.minibatch,
            seed=problem.settings.seed,
        )

    def run(self, execution: Execution = ALONE) -> ConnectResult:
        """Trains the bends, then evaluates both ends, the curve, the line and the plane."""
        problem, objective = self.problem, self.problem.objective
        with float32_precision(tf32=problem.settings.tf32):
            swept = time.perf_counter()
            check(objective, self.start, self.end)
            share, report = self._points_per_step, execution.report
            trained = self._training.run(
                replace(execution, progress=lambda step: report(step * share))
            )
            done = self.steps - self.evaluations
            curve = Path(
                self.kind,
                tuple(map(self.on_device, (self.start, *trained.bends, self.end))),
            )
            inner = [(t,) for t in self.ts if t not in {0.0, 1.0}]
            difference = self._verify(curve, inner)
            ends = sweep_plain(objective, [self.start, self.end], execution=execution.after(done))
            found: dict[str, Mapping[str, LineCurve]] = {}
            done += 2
            for path, slice_ in (("curve", curve), ("line", self._line)):
                # A split may have been streamed; the fixed tensors are those of the start.
                objective.load(self.start)
                points = (
                    [sweep(objective, slice_, inner, execution=execution.after(done))]
                    if inner
                    else []
                )
                done += len(inner)
                found[path] = self._arrange([*ends, *points])
            plane, plane_table, plane_notes = self._evaluate_plane(
                trained.bends, execution.after(done)
            )
            bends = tuple(self._checkpoint(k, bend) for k, bend in enumerate(trained.bends, 1))
            seconds = self.seconds(swept)
        examples = {name: curve.examples for name, curve in found["curve"].items()}
        table = self._table(found)
        last = self.weights(1)
        summary: ConnectSummary = {
            **self.origin(),
            **self._described(curve, trained),
            "plane": plane,
            "checkpoint_files": [*self.checkpoint_suffixes],
            "tables": ["plane"] if plane_table else [],
            **counted(objective, examples),
            "splits": {name: self._split(name, found) for name in examples},
            "endpoint_difference": difference,
            "notes": [
                *integer_notes(self, self.end, last),
                *self._notes(),
                *plane_notes,
                *general_notes(self),
                *storage_notes(self),
                *seed_notes(self, table),
            ],
            "seconds": seconds,
        }
        more = {"plane": plane_table} if plane_table else {}
        return ConnectResult(
            table, summary, COMMANDS[self.command].draw, more, bends=bends, aligned=self.aligned
        )

    @property
    def _line(self) -> Line:
        return Line(self.on_device(self.start), self.on_device(self.end))

    def _verify(self, curve: Path, inner: Sequence[tuple[float]]) -> float:
        """Chooses how points are evaluated, and compares the paths with loaded ends."""
        problem, objective = self.problem, self.problem.objective
        choose_strategy(objective, curve, [(t,) for t in self.ts])
        anchors = [((0.0,), self.start), ((1.0,), self.end)]
        differences = [
            verify_sweep(problem, slice_, anchors, inner[:: max(1, len(inner) // 3)] or [(0.5,)])
            for slice_ in (curve, self._line)
        ]
        verify_fresh_model(problem, self.end)
        return max(differences)

    def _arrange(self, parts: Sequence[Mapping[str, Evaluation]]) -> dict[str, LineCurve]:
        """Puts the ends and the points between them in order."""
        number = len(self.ts) - 2
        order = [0, 1, 0, *range(2, 2 + number), 1]
        return {
            name: LineCurve.arrange([part[name] for part in parts], order)
            for name in self.problem.objective.splits
        }

    def _table(self, found: Mapping[str, Mapping[str, LineCurve]]) -> Table:
        estimates = {
            path: {name: curve.estimate for name, curve in curves.items()}
            for path, curves in found.items()
        }
        return self.loss_table(
            ["path", "t", "split"],
            (
                ([path, t, name], estimate, i)
                for path, own in estimates.items()
                for i, t in enumerate(self.ts)
                for name, estimate in own.items()
            ),
        )

    def _split(self, name: str, found: Mapping[str, Mapping[str, LineCurve]]) -> ConnectSplit:
        """Summarises one split on both paths."""
        described = {}
        for path, curves in found.items():
            curve = curves[name]
            described[path] = describe(
                self.ts, curve.losses[2:], curve.losses[0], curve.losses[1], curve.weights
            )
        means = [(loss, t) for loss, t in zip(found["curve"][name].means, self.ts, strict=True)]
        finite = all(math.isfinite(loss) for loss, _ in means)
        loss, t = max(means) if finite else (math.nan, math.nan)
        return {
            "curve": described["curve"],
            "line": described["line"],
            "highest": {"t": t, "loss": loss} if finite else None,
        }

    def _described(self, curve: Path, trained: TrainedBends) -> ConnectSummary:
        """Describes the path and its training."""
        assert self.problem.training is not None
        name, split = self.problem.training
        chord = distance(self.start, self.end, self.counted)
        last = trained.losses[-max(1, int(_LAST * len(trained.losses))) :]
        return {
            "path": {
                "kind": self.kind,
                "bends": self.bends,
                "length": curve.length(self.counted),
                "chord": chord,
            },
            "training": {
                "split": name,
                "examples": split.rows,
                "steps": self.training_steps,
                "learning_rate": self.learning_rate,
                "minibatch": self.minibatch,
                "loss": float(last.mean()),
            },
        }

    def _evaluate_plane(
        self, bends: Sequence[Weights], execution: Execution
    ) -> tuple[ConnectPlane | None, Table | None, list[str]]:
        """Evaluates the plane through A, C and B.

        Returns:
            Where the corners, the curve and the grid lie, the losses, and a note if there is none.
        """
        if not self.plane:
            return None, None, []
        objective = self.problem.objective
        a, b = ({name: end[name] for name in self.moving} for end in (self.start, self.end))
        try:
            plane = Triangle.through(a, bends[0], b, self.counted)
        except UsageError as error:
            return None, None, [f"no plane: {str(error).partition(': ')[0]}"]
        corners = [(0.0, 0.0), (plane.corner_b, 0.0), plane.corner_c]
        xs, ys = list(zip(*corners, strict=True))
        widest = max(max(values) - min(values) for values in (xs, ys))
        grids = [
            [float(f"{x:.4g}") for x in with_margin(min(values), max(values), widest)]
            for values in (xs, ys)
        ]
        x_grid, y_grid = (grid(_PLANE_POINTS, *ends) for ends in grids)
        points = [(x, y) for y in y_grid for x in x_grid]
        first, bend, last = map(self.on_device, plane.ends)
        here = Triangle(first, bend, last, plane.corner_b, plane.corner_c)
        objective.load(self.start)
        found = sweep(objective, here, points, execution=execution)
        estimates = {name: Estimate.of_evaluation(part) for name, part in found.items()}
        table = self.loss_table(
            ["x", "y", "split"],
            (
                ([*point, name], estimate, i)
                for i, point in enumerate(points)
                for name, estimate in estimates.items()
            ),
        )
        coefficients = [path_coefficients(self.kind, 3, t) for t in self.ts]
        along = [
            [sum(w * x for w, x in zip(own, values, strict=True)) for values in (xs, ys)]
            for own in coefficients
        ]
        described: ConnectPlane = {
            "corners": [list(corner) for corner in corners],
            "curve": along,
            "x_range": grids[0],
            "y_range": grids[1],
        }
        return described, table, []

    def _checkpoint(self, k: int, bend: Weights) -> Checkpoint:
        """Makes the checkpoint of a bend, with BatchNorm's statistics estimated there."""
        problem = self.problem
        weights = recalibrated(problem.objective, {**self.start, **bend})
        stored = {name: tensor.to(self.start[name].dtype) for name, tensor in weights.items()}
        names = " and ".join(problem.names)
        made = made_checkpoint(problem, f"bend {k} between {names}", {**stored, **bend})
        described = BendOf(
            self.kind,
            k,
            self.bends,
            [digest_of_end(problem.open(t).weights, self.moving) for t in (0, 1)],
            sorted(self.moving),
        )
        return replace(made, metadata={**made.metadata, BendOf.key: described.to_json()})

    def _notes(self) -> list[str]:
        """Notes on the training examples and the minibatches."""
        problem = self.problem
        assert problem.training is not None
        name, split = problem.training
        notes = []
        if name != "train":
            notes.append(f"the path is trained on {name}, the only split")
        if problem.objective.batch_loss:
            notes.append("with --batch-loss each batch of the data is a minibatch")
        elif self.minibatch == len(split):
            notes.append(f"all {self.minibatch:,} examples of {name} are one minibatch")
        return notes
