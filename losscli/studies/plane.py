"""Planes: through checkpoints, along random directions or eigenvectors, or of a path."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, get_args

from losscli.checkpoint import CheckpointLike, expand_folders, name_checkpoints, order_path
from losscli.data import Examples
from losscli.errors import UsageError
from losscli.evaluation.cost import Clock, Timings
from losscli.evaluation.device import float32_precision
from losscli.evaluation.hessian.directions import DerivativeDirections
from losscli.evaluation.ranks import Arrays, Ranks
from losscli.evaluation.sampling import Estimate
from losscli.evaluation.strategy_choice import choose_strategy
from losscli.evaluation.sweep import check, sweep, sweep_plain
from losscli.evaluation.tasks import ALONE, Execution
from losscli.registry import COMMANDS
from losscli.results.result import Result
from losscli.results.summaries import (
    CostEstimate,
    Description,
    PlaneSplit,
    PlaneSummary,
    ProjectedPath,
)
from losscli.settings import Progress, Settings, checked
from losscli.studies.base import Study
from losscli.studies.notes import (
    batchnorm_notes,
    derivative_notes,
    general_notes,
    integer_notes_of_all,
    sampling_notes,
    seed_notes,
    spectral_notes,
    storage_notes,
    variance_notes,
)
from losscli.studies.plane_layout import Layout, curvature_radii, span_eigenvectors, span_plane
from losscli.studies.problem import Problem, counted, prepare, require_finite
from losscli.studies.verification import (
    check_differentiable,
    check_gradient_settings,
    verify_fresh_model,
    verify_sweep,
)
from losscli.table import Table
from losscli.weight_space.curve import lowest
from losscli.weight_space.slices import Slice, Span, Triangle, check_point_count, grid
from losscli.weight_space.vectors import Weights, dimension, norm
from losscli.wording import format_count

__all__ = ["Plane", "plane"]

PlaneAxes = Literal["hessian"]

# Variances of principal components, or eigenvalues, that differ relatively by less count as equal.
_EQUAL = 1e-3

# The largest x and y by default of random directions, which are as long as the weights.
_RANDOM_REACH = 1.0, 1.0


@checked(Settings)
def plane(
    names: CheckpointLike | Iterable[CheckpointLike],
    *,
    pca: bool = False,
    axes: PlaneAxes | None = None,
    path: CheckpointLike | Iterable[CheckpointLike] = (),
    points: int = 31,
    range: tuple[float, float] | None = None,  # noqa: A002 - the option's name
    surface: bool = False,
    keep_order: bool = False,
    progress: Progress = None,
    **settings: Any,
) -> Result[PlaneSummary]:
    """Evaluates the loss in a plane of weight space.

    Of one checkpoint: along two random directions, filter-normalised (Li et al. 2018, arXiv
    1712.09913), or with ``axes`` along the unit eigenvectors of the largest and the smallest
    eigenvalue of the Hessian of the first split. Of three: through all of them, on orthonormal axes
    (Garipov et al. 2018, arXiv 1802.10026). Of a path, with ``pca``: along its first two principal
    components.

    Args:
        names: The checkpoints.
        pca: Whether they are a path, three or more, whose plane is that of most variance.
        axes: ``hessian`` for eigenvectors instead of random directions.
        path: Checkpoints that are projected orthogonally onto the plane: each folder is a path, in
            the order of training, and all other checkpoints are one more.
        points: Values of each coordinate.
        range: The lowest and the highest value of both coordinates. By default the box that holds
            the checkpoints and a margin. Of one checkpoint without a path: −1 to 1 for random
            directions; for eigenvectors up to √(0.2 |L| / |λ|), where the curvature alone changes
            the loss L by a tenth of it, but between 0.001 ‖θ‖ and ‖θ‖.
        surface: Whether the figure also shows the surface in three dimensions.
        keep_order: With ``pca`` or ``path``, take the checkpoints in the order of their names as
            they are given, and all files of a folder; by default they are ordered as `trajectory`
            does.
        progress: True shows a bar; a function is called with the number of points done so far.
        **settings: The attributes of `losscli.settings.Settings`: ``model``, ``data``, ….

    Returns:
        The result: its table has a row for each point and split, ``more["path"]`` one for each
        checkpoint and split, with its true loss and its distance from the plane.

    Raises:
        LosscliError: Something is missing, broken or does not fit.
    """
    named = name_checkpoints(names)
    plan = Plane.plan(
        named,
        Settings(**settings),
        pca=pca,
        axes=axes,
        path=name_checkpoints(path, first=len(named)),
        points=points,
        range_=range,
        surface=surface,
        keep_order=keep_order,
    )
    return plan.run_alone(progress)


@dataclass(frozen=True)
class Plane(Study):
    """A plane that is ready to be evaluated.

    Attributes:
        kind: ``random``, ``hessian``, ``points`` or ``pca``.
        points: Values of each coordinate.
        range_: The lowest and the highest value of both coordinates, if they are given.
        surface: Whether the figure also shows the surface in three dimensions.
        paths: The name of each path that is projected, and the number of its checkpoints.
        layout: The plane with the checkpoints and the grid; None if its axes are eigenvectors,
            which a run computes.
    """

    command = "plane"

    kind: str
    points: int
    range_: tuple[float, float] | None
    surface: bool
    paths: tuple[tuple[str, int], ...]
    layout: Layout | None

    @classmethod
    def plan(
        cls,
        names: Sequence[str],
        settings: Settings,
        *,
        pca: bool,
        points: int,
        range_: tuple[float, float] | None,
        surface: bool,
        axes: PlaneAxes | None = None,
        path: Sequence[str] = (),
        keep_order: bool = False,
        ranks: Ranks | None = None,
    ) -> Plane:
        """Reads everything, spans the plane, evaluates nothing. See `plane` for the arguments."""
        begun = time.perf_counter()
        notes: list[str] = []
        if axes is not None and axes not in get_args(PlaneAxes):
            raise UsageError(f"--axes {axes} is not known", "Give --axes hessian")
        if keep_order and not (pca or path):
            raise UsageError("--keep-order has no effect without --pca or --path", "Leave it out")
        if axes and pca:
            raise UsageError(
                "--axes and --pca both choose the axes of the plane", "Give one of the two options"
            )
        if pca:
            names, notes = order_path(names, keep_order=keep_order)
        else:
            names = expand_folders(names)
        if axes and len(names) != 1:
            raise UsageError(
                f"--axes {axes} needs one checkpoint, and got {len(names)}",
                "Give the others with --path, which projects them onto the plane",
            )
        if len(names) < 3 if pca else len(names) not in {1, 3}:
            needs = "with --pca three checkpoints or more" if pca else "one checkpoint or three"
            raise UsageError(
                f"plane needs {needs}, and got {len(names)}",
                "Give the folder of a path"
                if pca
                else "For the plane of a path, give --pca; to project a path, give --path",
            )
        if points < 2:
            raise UsageError(f"--points must be at least 2, not {points}", "Give 31")
        check_point_count("--points", points, points**2)
        if range_ is not None:
            grid(points, *range_)
        if axes:
            check_gradient_settings(settings, "--axes")
        paths, more = _read_paths(path, keep_order=keep_order)
        projected = [name for files in paths.values() for name in files]
        problem = prepare(names, settings, [*notes, *more], ranks, projected=projected)
        if axes:
            kind, layout = "hessian", None
            moving = problem.parameters(problem.moving)
            _check_eigenvectors(problem, moving)
        else:
            kind = "pca" if pca else "random" if len(names) == 1 else "points"
            spanned = span_plane(problem, pca=pca)
            layout = Layout.of(problem, spanned, points, range_, _RANDOM_REACH)
            moving = tuple(spanned.slice_.ends[0])
        return cls(
            *(problem, moving, begun, kind, points, range_, surface),
            tuple((name, len(files)) for name, files in paths.items()),
            layout,
        )

    @property
    def options(self) -> dict[str, Any]:
        """The plane's kind, its grid and the paths."""
        options: dict[str, Any] = {"plane": self.kind, "paths": self.paths}
        if self.layout is None:
            return {**options, "points": self.points, "range": self.range_}
        return {**options, "xs": self.layout.xs, "ys": self.layout.ys}

    @property
    def has_path(self) -> bool:
        """Whether checkpoints are a path: those of the plane, or others that are projected."""
        return self.kind == "pca" or bool(self.paths)

    @property
    def slices(self) -> tuple[int, int]:
        """One plane."""
        return 1, self.points**2

    @property
    def evaluations(self) -> int:
        """How many points a run evaluates: the grid and the checkpoints."""
        return self.points**2 + len(self.problem.names)

    @cached_property
    def _derivatives(self) -> DerivativeDirections | None:
        """The eigenvectors, if the axes are along them."""
        if self.kind != "hessian":
            return None
        objective, seed = self.problem.objective, self.problem.settings.seed
        split = next(iter(objective.splits))
        return DerivativeDirections(objective, self.moving, split, "hessian", seed)

    def sample(self, number: int) -> tuple[Slice, Sequence[Sequence[float]]]:
        """Returns the plane, and some points of the grid."""
        if self.layout is None:
            # Points along any directions take as long.
            origin = self.on_device(self.problem.origin)
            return Span(origin, origin, origin), [(i / number, 0.5) for i in range(number)]
        return self._on_device(self.layout), self.layout.points[:number]

    def extra_description(self, description: Description) -> Description:  # noqa: ARG002
        """Returns the work of eigenvectors, if the axes are along them."""
        if self._derivatives is None:
            return {}
        return self._derivatives.extra_description(1)

    def extra_cost(self, timings: Timings, clock: Clock, seconds: float) -> CostEstimate:  # noqa: ARG002
        """Estimates what the run takes with eigenvectors, if the axes are along them."""
        if self._derivatives is None:
            return {}
        return self._derivatives.extra_cost(1, self.problem.origin, clock, seconds)

    def run(self, execution: Execution = ALONE) -> Result[PlaneSummary]:
        """Evaluates the checkpoints, each loaded plainly, and the grid by a sweep."""
        problem, settings = self.problem, self.problem.settings
        objective = problem.objective
        with float32_precision(tf32=settings.tf32):
            swept = time.perf_counter()
            last = problem.place(problem.last.weights)
            check(objective, problem.origin, last)
            layout, derived = self._find_layout(execution)
            here, points = self._on_device(layout), layout.points
            choose_strategy(objective, here, points)
            difference = self._verify(layout, here)
            # At a corner of the grid, to detect a model that keeps state of the first point.
            verify_fresh_model(problem, self._at(layout, points[0]))
            own = layout.places[: len(problem.spanning)]
            middle = [sum(at) / len(own) for at in list(zip(*own, strict=True))[:2]]
            stays = [
                *integer_notes_of_all(self),
                *spectral_notes(self),
                *batchnorm_notes(
                    self,
                    problem.places(range(len(problem.names))),
                    lambda: self._at(layout, (middle[0], middle[1])),
                    f"at ({middle[0]:.4g}, {middle[1]:.4g})",
                ),
            ]
            found = self.evaluate(partial(self._evaluate, here, points), execution)
            seconds = self.seconds(swept)
        table = self._table(points, found)
        path = self._path_table(layout, found)
        examples = {name: estimate.examples for name, estimate in found.items()}
        splits = {name: self._split_summary(points, e.mean.tolist()) for name, e in found.items()}
        summary: PlaneSummary = {
            **self.origin(),
            "tables": ["path"],
            "plane": self.kind,
            "axes": [*layout.spanned.axes],
            "surface": self.surface,
            "x_range": [layout.xs[0], layout.xs[-1]],
            "y_range": [layout.ys[0], layout.ys[-1]],
            **counted(objective, examples, self.problem.settings.seed),
            "off_plane": max(off for *_, off in own),
            "paths": self._projected(layout),
            "splits": splits,
            "endpoint_difference": difference,
            "notes": [
                *stays,
                *self._notes(layout, derived, splits),
                *sampling_notes(self, examples),
                *seed_notes(self, table),
            ],
            "seconds": seconds,
        }
        return Result(table, summary, COMMANDS[self.command].draw, {"path": path})

    def _find_layout(self, execution: Execution) -> tuple[Layout, list[Arrays]]:
        """Returns the plane, and the record of its eigenvectors if the axes are along them."""
        if self._derivatives is None:
            assert self.layout is not None
            return self.layout, []
        problem, found, split = self.problem, self._derivatives, self._derivatives.split
        origin = problem.origin
        derived = found.find_all([origin], problem.names[:1], execution)
        (arrays,) = derived
        last = len(found.labels) - 1
        described = found.describe(arrays)
        spanned = span_eigenvectors(
            problem,
            self.moving,
            [found.direction(arrays, k, origin) for k in (0, last)],
            [described[0], described[last]],
        )
        (own,) = sweep_plain(
            problem.objective,
            [origin],
            splits={split: problem.objective.splits[split]},
            execution=execution.quiet,
        )
        loss = float(Estimate.of_evaluation(own[split]).mean[0])
        reach = curvature_radii(spanned.axes, loss, norm(origin, self.moving))
        return Layout.of(problem, spanned, self.points, self.range_, reach), derived

    def _table(self, points: Sequence[tuple[float, float]], found: Mapping[str, Estimate]) -> Table:
        """Tabulates the grid; its points follow the checkpoints in an estimate."""
        own = len(self.problem.names)
        return self.loss_table(
            ["x", "y", "split"],
            (
                ([*point, name], estimate, own + i)
                for i, point in enumerate(points)
                for name, estimate in found.items()
            ),
        )

    def _path_table(self, layout: Layout, found: Mapping[str, Estimate]) -> Table:
        """Tabulates the checkpoints; those that span the plane have no path."""
        groups = [("", len(self.problem.spanning)), *self.paths]
        steps = [(path, step) for path, number in groups for step in range(number)]
        named = ["path"] if self.paths else []
        return Table.build(
            [*named, "step", "checkpoint", "x", "y", "off_plane", "split", "loss"],
            (
                [
                    *(path for _ in named),
                    *(step, checkpoint, *place, name, float(estimate.mean[t])),
                ]
                for t, ((path, step), checkpoint, place) in enumerate(
                    zip(steps, self.problem.names, layout.places, strict=True)
                )
                for name, estimate in found.items()
            ),
        )

    def _projected(self, layout: Layout) -> list[ProjectedPath]:
        """Describes each path that is projected."""
        found: list[ProjectedPath] = []
        done = len(self.problem.spanning)
        for name, number in self.paths:
            off = max(off for *_, off in layout.places[done : done + number])
            found.append({"name": name, "checkpoints": number, "off_plane": off})
            done += number
        return found

    def _on_device(self, layout: Layout) -> Triangle | Span:
        """Copies the plane to the device."""
        slice_ = layout.spanned.slice_
        a, b, c = (self.on_device(end) for end in slice_.ends)
        if isinstance(slice_, Triangle):
            return Triangle(a, b, c, slice_.corner_b, slice_.corner_c)
        return Span(a, b, c)

    def _at(self, layout: Layout, point: tuple[float, float]) -> Weights:
        """Returns all tensors at a point of the plane."""
        moved = layout.spanned.combine(point, self.problem.working_type)
        return {**self.problem.place(self.problem.last.weights), **moved}

    def _verify(self, layout: Layout, here: Triangle | Span) -> float:
        problem, points = self.problem, layout.points
        if isinstance(here, Triangle):
            corners = [(0.0, 0.0), (here.corner_b, 0.0), here.corner_c]
            anchors = [(corner, problem.placed(t)) for t, corner in enumerate(corners)]
        else:
            anchors = [((0.0, 0.0), problem.place(problem.last.weights))]
        # Several points of the grid, so that a first layer is shared as in the sweep.
        return verify_sweep(self.problem, here, anchors, points[:: max(1, len(points) // 4)])

    def _evaluate(
        self,
        here: Triangle | Span,
        points: Sequence[tuple[float, float]],
        splits: Mapping[str, Examples],
        execution: Execution,
    ) -> dict[str, Estimate]:
        """Evaluates all checkpoints, then the grid."""
        objective, steps = self.problem.objective, range(len(self.problem.names))
        placed, after = self.problem.places(steps), execution.after(len(steps))
        checkpoints = sweep_plain(objective, placed, splits=splits, execution=execution)
        # A checkpoint of a path may have other tensors that the plane does not move.
        objective.load(self.problem.place(self.problem.last.weights))
        found = sweep(objective, here, points, splits=splits, execution=after)
        # Only means are kept.
        return {
            name: Estimate.join([
                Estimate.of_evaluation(part[name]) for part in (*checkpoints, found)
            ])
            for name in splits
        }

    def _split_summary(
        self, points: Sequence[tuple[float, float]], losses: Sequence[float]
    ) -> PlaneSplit:
        """Summarises the losses of one split."""
        spanning = len(self.problem.spanning)
        plane_ = losses[len(self.problem.names) :]
        finite = [i for i, loss in enumerate(plane_) if math.isfinite(loss)]
        shared = lowest(plane_)
        return {
            "checkpoints": list(losses[:spanning]),
            "lowest": None
            if not shared
            else {
                "x": points[shared[0]][0],
                "y": points[shared[0]][1],
                "loss": plane_[shared[0]],
                "ties": len(shared),
            },
            "highest_loss": max((plane_[i] for i in finite), default=None),
            "not_finite": len(plane_) - len(finite),
        }

    def _notes(
        self, layout: Layout, derived: Sequence[Arrays], splits: Mapping[str, PlaneSplit]
    ) -> list[str]:
        notes = [*general_notes(self), *storage_notes(self)]
        if self.problem.chosen:
            notes.append(
                "random directions are zero in all but the chosen tensors"
                if self.kind == "random"
                else "axes and distances are those of the moving parameters"
            )
        if self._derivatives is not None:
            notes += derivative_notes(self, self._derivatives, derived)
            notes += self._eigenvector_notes(layout, self._derivatives.gaps(derived[0]))
        shares = layout.spanned.shares
        for k, what in (
            (0, "the axes may be turned within the plane"),
            (1, "the plane is arbitrary"),
        ):
            pair = shares[k : k + 2]
            if len(pair) == 2 and pair[0] - pair[1] < _EQUAL * pair[0]:
                fact = f"principal components {k + 1} and {k + 2} explain {pair[0]:.2%} each"
                notes.append(f"{fact}: {what}")
        if any(split["not_finite"] for split in splits.values()):
            corners = itertools.product(
                (layout.xs[0], layout.xs[-1]), (layout.ys[0], layout.ys[-1])
            )
            notes += variance_notes(self, (self._at(layout, corner) for corner in corners))
        for name, split in splits.items():
            if number := split["not_finite"]:
                notes.append(f"{name}: the loss of {format_count(number, 'point')} is not finite")
        return notes

    def _eigenvector_notes(self, layout: Layout, gaps: tuple[float, float]) -> list[str]:
        """Notes on axes that are not determined, and on the default range."""
        notes, axes = [], layout.spanned.axes
        for letter, end, axis, gap in zip("xy", ("largest", "smallest"), axes, gaps, strict=True):
            if not axis["converged"]:
                notes.append(
                    f"the search for the {end} eigenvalue has not converged: another direction may "
                    f"have a more extreme curvature than {letter}"
                )
            elif gap <= max(2 * axis["error"], _EQUAL * abs(axis["eigenvalue"])):
                notes.append(
                    f"the two {end} eigenvalues are equal within {gap:.1g}: {letter} is one of "
                    "many directions with this curvature"
                )
        if self.range_ is None and not self.paths:
            notes.append(
                "each axis reaches as far as its curvature alone changes the loss by a tenth, but "
                "not farther than ‖θ‖ and at least 0.001 ‖θ‖; --range sets both"
            )
        return notes


def _read_paths(
    given: Sequence[str], *, keep_order: bool
) -> tuple[dict[str, list[str]], list[str]]:
    """Lists the checkpoints of each path by its name, and notes on their order."""
    paths: dict[str, list[str]] = {}
    notes: list[str] = []
    # Each folder is a path; all other checkpoints form one path, named after the first.
    single = [name for name in given if expand_folders([name]) == [name]]
    for name in given:
        if name in single and single[0] in paths:
            continue
        if name in paths:
            raise UsageError(f"--path {name} is given twice", "Give each folder once")
        paths[name], more = order_path(single if name in single else [name], keep_order=keep_order)
        notes += more
    return paths, notes


def _check_eigenvectors(problem: Problem, moving: Sequence[str]) -> None:
    """Checks that the Hessian has two eigenvectors."""
    weights = problem.first.weights
    if not moving:
        raise UsageError("no parameter is left to differentiate", "Widen --only")
    if dimension(weights, moving) < 2:
        raise UsageError(
            "--axes hessian needs at least two parameters, and only one moves", "Widen --only"
        )
    check_differentiable(problem, moving, "--axes")
    require_finite(problem.names[0], weights, moving)
