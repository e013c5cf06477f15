"""Planes: through three checkpoints, along random directions, or the one a path lies closest to."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from losscli.checkpoint import CheckpointLike, expand_folders, name_checkpoints, order_path
from losscli.data import Examples
from losscli.errors import CheckpointError, UsageError
from losscli.evaluation.device import float32_precision
from losscli.evaluation.ranks import Ranks
from losscli.evaluation.sampling import Estimate, evaluate_until_precise
from losscli.evaluation.strategy_choice import choose_strategy
from losscli.evaluation.sweep import check, sweep, sweep_plain
from losscli.evaluation.tasks import ALONE, Execution
from losscli.registry import COMMANDS
from losscli.results import Result
from losscli.settings import Progress, Settings, checked
from losscli.studies.base import Study, count
from losscli.studies.notes import (
    batchnorm_notes,
    general_notes,
    integer_notes,
    sampling_notes,
    spectral_notes,
    storage_notes,
    variance_notes,
)
from losscli.studies.problem import Problem, counted, differing_tensors, prepare
from losscli.studies.verification import verify_fresh_model, verify_sweep
from losscli.summaries import PlaneAxis, PlaneSplit, PlaneSummary
from losscli.table import Table
from losscli.weight_space.curve import lowest
from losscli.weight_space.directions import normalisation_parameters, random_directions
from losscli.weight_space.slices import Slice, Span, Triangle, check_point_count, grid
from losscli.weight_space.trajectory import principal_axes
from losscli.weight_space.vectors import Weights

__all__ = ["Plane", "plane"]

# What is left free around the checkpoints, as a share of the box they lie in.
_MARGIN = 0.25

# Farther out, products with weights leave the range of float32.
_FAR = 1e29

# The least height of that box as a share of its width, so that a picture is no thread.
_THINNEST = 0.2

# Principal components with variances that differ by less than this share count as equal.
_EQUAL = 1e-3


@checked(Settings)
def plane(
    names: CheckpointLike | Iterable[CheckpointLike],
    *,
    pca: bool = False,
    points: int = 31,
    range: tuple[float, float] | None = None,  # noqa: A002 - the option's name
    surface: bool = False,
    keep_order: bool = False,
    progress: Progress = None,
    **settings: Any,
) -> Result[PlaneSummary]:
    """Evaluates the loss in a plane of weight space.

    Of one checkpoint: along two random directions, filter-normalised (Li et al. 2018, arXiv
    1712.09913). Of three: through all of them, on orthonormal axes (Garipov et al. 2018, arXiv
    1802.10026). Of a path, with ``pca``: along its first two principal components.

    Args:
        names: The checkpoints.
        pca: Whether they are a path, three or more, whose plane is that of most variance.
        points: Values of each coordinate.
        range: The lowest and the highest value of both coordinates; by default the box that holds
            the checkpoints and a margin, or −1 to 1 for random directions.
        surface: Whether the picture shows the surface in three dimensions too.
        keep_order: With ``pca``, take the checkpoints in the order of their names as they are
            given, and all files of a folder; by default they are ordered as `trajectory` does.
        progress: True shows a bar; a function is called with the number of points done so far.
        **settings: The attributes of `losscli.settings.Settings`: ``model``, ``data``, ….

    Returns:
        The result: its table has a row for each point and split, ``more["path"]`` one for each
        checkpoint and split, with its true loss and its distance from the plane.

    Raises:
        LosscliError: Something is missing, broken or does not fit.
    """
    plan = Plane.plan(
        name_checkpoints(names),
        Settings(**settings),
        pca=pca,
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
        slice_: The plane, its tensors where the checkpoints are.
        kind: ``random``, ``points`` or ``pca``.
        axes: What the axes are, and the share of the variance that each explains.
        places: Of each checkpoint its x, its y and its distance from the plane.
        xs: The values of x, in ascending order.
        ys: The values of y, in ascending order.
        surface: Whether the picture shows the surface in three dimensions.
        shares: The share of the variance that each principal component explains, falling.
    """

    command = "plane"

    slice_: Triangle | Span
    kind: str
    axes: tuple[PlaneAxis, PlaneAxis]
    places: tuple[tuple[float, float, float], ...]
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    surface: bool
    shares: tuple[float, ...]

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
        keep_order: bool = False,
        ranks: Ranks | None = None,
    ) -> Plane:
        """Reads and matches everything, lays the plane, and evaluates nothing.

        Args:
            names: The checkpoints.
            settings: The settings.
            pca: Whether they are a path.
            points: Values of each coordinate.
            range_: The lowest and the highest value of both coordinates.
            surface: Whether the picture will show the surface.
            keep_order: Whether the names of a path stay in the order in which they are given.
            ranks: The processes that share the run, if there are several.

        Returns:
            The plan.

        Raises:
            LosscliError: Something is missing, broken or does not fit.
        """
        begun = time.perf_counter()
        notes: list[str] = []
        if keep_order and not pca:
            raise UsageError("--keep-order is about the order of a path", "Give it with --pca")
        if pca:
            names, notes = order_path(names, keep_order=keep_order)
        else:
            names = expand_folders(names)
        if len(names) < 3 if pca else len(names) not in {1, 3}:
            needs = "with --pca three checkpoints or more" if pca else "one checkpoint or three"
            raise UsageError(
                f"plane needs {needs}, and got {len(names)}",
                "Give a path's folder" if pca else "For the plane of a path, give --pca",
            )
        if points < 2:
            raise UsageError(f"--points {points} is no plane", "Give 2 or more")
        check_point_count("--points", points, points**2)
        if range_ is not None:
            grid(points, *range_)
        problem = prepare(names, settings, notes, ranks)
        slice_: Triangle | Span
        shares: tuple[float, ...] = ()
        if len(names) == 1:
            slice_, kind = _random(problem), "random"
            axes = _axis("random direction 1"), _axis("random direction 2")
        elif pca:
            slice_, shares = _principal(problem)
            kind = "pca"
            axes = (
                _axis("principal component 1", shares[0]),
                _axis("principal component 2", shares[1]),
            )
        else:
            moving = differing_tensors(problem)
            counted = _counted(problem, moving)
            a, b, c = (_select(problem.open(t).weights, moving) for t in (0, 1, 2))
            slice_, kind = Triangle.through(a, b, c, counted), "points"
            axes = _axis("along B − A"), _axis("at right angles to B − A")
        counted = problem.parameters(slice_.ends[0])
        places = tuple(
            slice_.project(problem.open(t).weights, counted) for t, _ in enumerate(names)
        )
        xs, ys = _grids(kind, places, points, range_)
        return cls(
            *(problem, tuple(slice_.ends[0]), begun, slice_, kind, axes, places, xs, ys, surface),
            shares,
        )

    @property
    def options(self) -> dict[str, Any]:
        """The plane's kind and its grid."""
        return {"plane": self.kind, "xs": self.xs, "ys": self.ys}

    @property
    def slices(self) -> tuple[int, int]:
        """One plane."""
        return 1, len(self.xs) * len(self.ys)

    @property
    def evaluations(self) -> int:
        """How many points a run evaluates: the grid and the checkpoints."""
        return len(self.xs) * len(self.ys) + len(self.problem.names)

    def sample(self, number: int) -> tuple[Slice, Sequence[Sequence[float]]]:
        """Takes a part of the grid.

        Args:
            number: How many points are taken at once.

        Returns:
            The plane, and so many points of it.
        """
        points = [(x, y) for y in self.ys for x in self.xs]
        return self._plane_on_device(), points[:number]

    def run(self, execution: Execution = ALONE) -> Result[PlaneSummary]:
        """Evaluates the checkpoints, each loaded plainly, and the grid by a sweep.

        Args:
            execution: How its tasks are executed. Progress counts points.

        Returns:
            The result.

        Raises:
            LosscliError: The model or the loss fails on the data, gives two answers for one
                point, or does not fit into the memory.
        """
        objective, settings = self.problem.objective, self.problem.settings
        points = [(x, y) for y in self.ys for x in self.xs]
        with float32_precision(tf32=settings.tf32):
            swept = time.perf_counter()
            here = self._plane_on_device()
            check(objective, self.problem.origin, self.problem.place(self.problem.last.weights))
            choose_strategy(objective, here, points)
            difference = self._verify(here, points)
            last = self.problem.place(self.problem.last.weights)
            # At a corner of the grid: a model that remembers the first point it saw is found out.
            verify_fresh_model(self.problem, self._at(points[0]))
            middle = [sum(at) / len(self.places) for at in list(zip(*self.places, strict=True))[:2]]
            stays = [
                *integer_notes(self, last, self.problem.last.weights),
                *spectral_notes(self),
                *batchnorm_notes(
                    self,
                    self.problem.places(range(len(self.problem.names))),
                    lambda: self._at((middle[0], middle[1])),
                ),
            ]
            found = evaluate_until_precise(
                objective.splits,
                settings.sampling_error,
                settings.seed,
                partial(self._evaluate, here, points),
                execution,
            )
            seconds = self.seconds(swept)
        metrics = objective.metrics
        sampled = ["examples"] if settings.sampling_error is not None else []
        own = len(self.problem.names)
        table = Table.build(
            ["x", "y", "split", "loss", "loss_stderr", *metrics, *sampled],
            (
                [
                    *point,
                    name,
                    *estimate.row(own + i, metrics),
                    *(estimate.examples for _ in sampled),
                ]
                for i, point in enumerate(points)
                for name, estimate in found.items()
            ),
        )
        path = Table.build(
            ["step", "checkpoint", "x", "y", "off_plane", "split", "loss"],
            (
                [t, checkpoint, *place, name, float(estimate.mean[t])]
                for t, (checkpoint, place) in enumerate(
                    zip(self.problem.names, self.places, strict=True)
                )
                for name, estimate in found.items()
            ),
        )
        examples = {name: estimate.examples for name, estimate in found.items()}
        splits = {name: self._split_summary(points, e.mean.tolist()) for name, e in found.items()}
        summary: PlaneSummary = {
            **self.origin(),
            "tables": ["path"],
            "plane": self.kind,
            "axes": [*self.axes],
            "surface": self.surface,
            "x_range": [self.xs[0], self.xs[-1]],
            "y_range": [self.ys[0], self.ys[-1]],
            **counted(objective, examples),
            "off_plane": max(off for *_, off in self.places),
            "splits": splits,
            "endpoint_difference": difference,
            "notes": [*stays, *self._notes(splits), *sampling_notes(self, examples)],
            "seconds": seconds,
        }
        return Result(table, summary, COMMANDS[self.command].draw, {"path": path})

    def _plane_on_device(self) -> Triangle | Span:
        """The plane on the device."""
        a, b, c = (self.on_device(end) for end in self.slice_.ends)
        if isinstance(self.slice_, Triangle):
            return Triangle(a, b, c, self.slice_.corner_b, self.slice_.corner_c)
        return Span(a, b, c)

    def _at(self, point: tuple[float, float]) -> Weights:
        """All tensors at a point of the plane."""
        wide = torch.float64 if self.problem.settings.dtype == "float64" else torch.float32
        moved = {
            name: self.slice_.combine(
                [
                    end[name].to(torch.promote_types(end[name].dtype, wide))
                    for end in self.slice_.ends
                ],
                point,
            )
            for name in self.moving
        }
        return {**self.problem.place(self.problem.last.weights), **moved}

    def _verify(self, here: Triangle | Span, points: Sequence[tuple[float, float]]) -> float:
        problem = self.problem
        if isinstance(here, Triangle):
            corners = [(0.0, 0.0), (here.corner_b, 0.0), here.corner_c]
            anchors = [
                (corner, problem.place(problem.open(t).weights)) for t, corner in enumerate(corners)
            ]
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
        own = len(self.problem.names)
        plane_ = losses[own:]
        finite = [i for i, loss in enumerate(plane_) if math.isfinite(loss)]
        shared = lowest(plane_)
        return {
            "checkpoints": list(losses[:own]),
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

    def _notes(self, splits: Mapping[str, PlaneSplit]) -> list[str]:
        notes = [*general_notes(self), *storage_notes(self)]
        if self.problem.chosen:
            notes.append(
                "random directions are zero in all but the chosen tensors"
                if self.kind == "random"
                else "axes and distances are those of the moving parameters"
            )
        for k, what in (
            (0, "the axes may be turned within the plane"),
            (1, "the plane is arbitrary"),
        ):
            pair = self.shares[k : k + 2]
            if len(pair) == 2 and pair[0] - pair[1] < _EQUAL * pair[0]:
                fact = f"principal components {k + 1} and {k + 2} explain {pair[0]:.2%} each"
                notes.append(f"{fact}: {what}")
        if any(split["not_finite"] for split in splits.values()):
            corners = itertools.product((self.xs[0], self.xs[-1]), (self.ys[0], self.ys[-1]))
            notes += variance_notes(self, map(self._at, corners))
        for name, split in splits.items():
            if number := split["not_finite"]:
                notes.append(f"{name}: the loss of {count(number, 'point')} is not finite")
        return notes


def _axis(name: str, explained: float | None = None) -> PlaneAxis:
    return {"name": name, "explained_variance": explained}


def _select(weights: Weights, names: Sequence[str]) -> Weights:
    return {name: weights[name] for name in names}


def _random(problem: Problem) -> Span:
    """The plane along two random directions."""
    still = normalisation_parameters(problem.objective.model).union(problem.buffers)
    weights = problem.first.weights
    u, v = random_directions(weights, problem.moving, still, problem.settings.seed)
    names = [name for name in problem.moving if u[name].any() or v[name].any()]
    return Span(*(_select(end, names) for end in (weights, u, v)))


def _principal(problem: Problem) -> tuple[Span, tuple[float, ...]]:
    """The plane of the first two principal components, and what all of them explain."""
    moving = differing_tensors(problem)
    counted = _counted(problem, moving)
    along = [name for name in moving if name not in counted]
    opener, number = (lambda t: problem.open(t).weights), len(problem.names)
    dtype = torch.float64 if problem.settings.dtype == "float64" else torch.float32
    axes, shares = principal_axes(opener, number, counted, along, dtype)
    return Span(_select(problem.last.weights, moving), *axes), shares


def _counted(problem: Problem, moving: Sequence[str]) -> tuple[str, ...]:
    """The parameters that move, which axes and distances are made of."""
    counted = problem.parameters(moving)
    if moving and not counted:
        raise UsageError(
            "the checkpoints differ only in buffers: no plane of parameters is determined by them",
            "Compare two of them with losscli interpolate",
        )
    return counted


def _grids(
    kind: str,
    places: Sequence[tuple[float, float, float]],
    points: int,
    range_: tuple[float, float] | None,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the values of x and y: as given, or the box of the checkpoints with a margin."""
    if range_ is None and kind == "random":
        range_ = -1.0, 1.0
    if range_ is not None:
        values = tuple(grid(points, *range_))
        return values, values
    if max(abs(value) for place in places for value in place) > _FAR:
        raise CheckpointError(
            "the checkpoints lie too far apart for a plane that float32 can hold",
            "Look at the weights with losscli inspect",
        )
    boxes = [(min(values), max(values)) for values in list(zip(*places, strict=True))[:2]]
    widest = max(high - low for low, high in boxes)
    grids = []
    for low, high in boxes:
        room = max(high - low, _THINNEST * widest)
        middle, half = (low + high) / 2, (0.5 + _MARGIN) * room
        grids.append(tuple(grid(points, _short(middle - half), _short(middle + half))))
    return grids[0], grids[1]


def _short(value: float) -> float:
    """Rounds a default value to a few significant digits."""
    return float(f"{value:.4g}")
