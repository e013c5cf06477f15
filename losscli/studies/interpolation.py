"""The line through two checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from losscli.checkpoint import CheckpointLike, name_checkpoint
from losscli.data import Examples
from losscli.errors import UsageError
from losscli.evaluation.cost import Clock, Timings, timed
from losscli.evaluation.derivatives.sweep import MethodChoice, prepare_first_batch
from losscli.evaluation.device import float32_precision
from losscli.evaluation.memory import halving, points_at_once
from losscli.evaluation.objective import Evaluation
from losscli.evaluation.ranks import Ranks
from losscli.evaluation.sampling import Estimate
from losscli.evaluation.strategy_choice import choose_strategy
from losscli.evaluation.sweep import check, sweep, sweep_plain
from losscli.evaluation.tasks import ALONE, Execution
from losscli.registry import COMMANDS
from losscli.results.places import places_not_finite
from losscli.results.result import Result
from losscli.results.summaries import (
    BlockSummary,
    CostEstimate,
    Description,
    LineSplit,
    LineSummary,
    Refined,
)
from losscli.settings import Progress, Settings, checked
from losscli.studies.base import Study
from losscli.studies.layerwise import Block, BlockCurve, moving_blocks, points_of
from losscli.studies.line_curve import LineCurve, RefinedCurve
from losscli.studies.notes import (
    batchnorm_notes,
    general_notes,
    integer_notes,
    sampling_notes,
    seed_notes,
    spectral_notes,
    storage_notes,
    variance_notes,
)
from losscli.studies.problem import counted, prepare
from losscli.studies.refiner import Refiner
from losscli.studies.repair import RepairedLines
from losscli.studies.verification import check_differentiable, verify_fresh_model, verify_sweep
from losscli.table import Table
from losscli.weight_space.curve import describe
from losscli.weight_space.refinement import uniform_points
from losscli.weight_space.slices import Line, grid, point_between
from losscli.weight_space.vectors import Weights, can_move, dimension, distance
from losscli.wording import format_count, list_first

__all__ = ["Interpolation", "interpolate"]


@checked(Settings)
def interpolate(
    a: CheckpointLike,
    b: CheckpointLike,
    *,
    points: int = 51,
    range: tuple[float, float] = (-0.5, 2.0),  # noqa: A002 - the option's name
    derivatives: bool = False,
    refine: float | None = None,
    context: Table | None = None,
    layerwise: bool = False,
    repair: bool = False,
    progress: Progress = None,
    **settings: Any,
) -> Result[LineSummary]:
    """Evaluates the loss along the line through two checkpoints, θ(α) = A + α (B − A).

    After Goodfellow, Vinyals & Saxe 2015, arXiv 1412.6544.

    Args:
        a: The checkpoint at α = 0: a file, ``FILE#KEY``, ``init:SEED``, a state dict, or a module.
        b: The checkpoint at α = 1.
        points: Evenly spaced values of α; 0 and 1 are added if they lie in the range.
        range: The lowest and the highest α.
        derivatives: Whether the slope dL/dα and the curvature d²L/dα² are also computed.
        refine: If a number, points are added until cubics through the points are accurate to
            this share of the curve's height, and every local minimum and maximum is located.
        context: The table of the whole line, of which this is a part, drawn next to it.
        layerwise: Whether each block of the network is also moved on its own, the others at A.
        repair: Whether each point between A and B is corrected by REPAIR (Jordan et al. 2022, arXiv
            2211.08403), with ``range=(0, 1)``: each hidden unit's preactivation gets the mean and
            the standard deviation, over training examples, that lie between those of A and B.
        progress: True shows a bar; a function is called with the number of points done so far.
        **settings: The attributes of `losscli.settings.Settings`: ``model``, ``data``, ….

    Returns:
        The result: its table has a row for each point and split.

    Raises:
        LosscliError: Something is missing, broken or does not fit.
    """
    plan = Interpolation.plan(
        name_checkpoint(a, "A"),
        name_checkpoint(b, "B"),
        Settings(**settings),
        points=points,
        range_=range,
        derivatives=derivatives,
        refine=refine,
        context=context,
        layerwise=layerwise,
        repair=repair,
    )
    return plan.run_alone(progress)


@dataclass(frozen=True)
class Interpolation(Study):
    """A line that is ready to be evaluated.

    Attributes:
        start: All tensors at α = 0.
        end: All tensors at α = 1; those that do not move are those of ``start``.
        alphas: The points, in ascending order.
        range: The lowest and the highest α as given.
        derivatives: Whether slopes and curvatures are computed.
        refine: The error to refine to, as a share of the curve's height, if any.
        context: The table of the whole line, if it is to be drawn.
        blocks: The blocks that also move on their own.
        repair: Corrects the points between A and B; None if they stay on the line.
    """

    command = "interpolate"

    start: Weights
    end: Weights
    alphas: tuple[float, ...]
    range: tuple[float, float]
    derivatives: bool
    refine: float | None
    context: Table | None
    blocks: tuple[Block, ...]
    repair: RepairedLines | None

    @classmethod
    def plan(
        cls,
        a: str,
        b: str,
        settings: Settings,
        *,
        points: int,
        range_: tuple[float, float],
        derivatives: bool = False,
        refine: float | None = None,
        context: Table | None = None,
        layerwise: bool = False,
        repair: bool = False,
        ranks: Ranks | None = None,
    ) -> Interpolation:
        """Reads and matches everything, evaluates nothing. See `interpolate` for the arguments."""
        begun = time.perf_counter()
        if refine is not None and not 0 < refine < 1:
            raise UsageError(f"--refine must be between 0 and 1, not {refine}", "Give 0.001")
        if settings.sampling_error is not None and (derivatives or refine is not None):
            option = "--derivatives" if derivatives else "--refine"
            raise UsageError(
                f"{option} needs all examples",
                "Give it without --sampling-error",
            )
        if derivatives and settings.buffers == "recalibrate":
            raise UsageError(
                "--derivatives is not available with --buffers recalibrate",
                "Give one without the other",
            )
        if layerwise and (derivatives or refine is not None):
            option = "--derivatives" if derivatives else "--refine"
            raise UsageError(
                f"{option} is for one curve, but --layerwise has many",
                "Give it without --layerwise; --only chooses a block",
            )
        if layerwise and context is not None:
            raise UsageError(
                "--context and --layerwise have no figure together", "Leave one of them out"
            )
        if repair:
            for option, given in (
                ("--derivatives", derivatives),
                ("--refine", refine is not None),
                ("--layerwise", layerwise),
                ("--context", context is not None),
            ):
                if given:
                    raise UsageError(
                        f"{option} is not available with --repair, which leaves the line",
                        "Give one without the other",
                    )
            if not 0 <= range_[0] <= range_[1] <= 1:
                raise UsageError(
                    "--repair corrects points between A and B, and --range "
                    f"{range_[0]:g} {range_[1]:g} goes beyond",
                    "Give --range 0 1",
                )
        alphas = grid(points, *range_, include=(0.0, 1.0))
        problem = prepare((a, b), settings, ranks=ranks, training="--repair" if repair else "")
        start, end = problem.origin, problem.place(problem.last.weights)
        # Equal tensors need not move; with infinities, such as attention masks have, they cannot.
        moving = tuple(n for n in problem.moving if not torch.equal(start[n], end[n]))
        if derivatives:
            check_differentiable(problem, moving, "--derivatives")
        return cls(
            problem,
            moving,
            begun,
            start,
            end,
            tuple(alphas),
            range_,
            derivatives,
            refine,
            context,
            moving_blocks(problem.objective, moving) if layerwise else (),
            RepairedLines(problem) if repair else None,
        )

    @property
    def options(self) -> dict[str, Any]:
        """The initial values of α, and what is computed in addition."""
        return {
            "alphas": self.alphas,
            "range": self.range,
            "derivatives": self.derivatives,
            "refine": self.refine,
            "layerwise": bool(self.blocks),
            **({"repair": True} if self.repair else {}),
        }

    @property
    def slices(self) -> tuple[int, int]:
        """One line, without its ends; corrected points are evaluated plainly."""
        inner = len(self._inner)
        return (0, 0) if self.repair else (int(inner > 0), inner)

    @property
    def _inner(self) -> list[float]:
        return [alpha for alpha in self.alphas if alpha not in {0.0, 1.0}]

    @property
    def evaluations(self) -> int:
        """How many points a run evaluates: those of the range, and the two ends."""
        own = len({0.0, 1.0, *self.alphas})
        return own + len(self.blocks) * len(points_of(self.alphas))

    @property
    def steps(self) -> int:
        """The total of the progress, to which refinement adds."""
        return self.evaluations + (len(self.alphas) if self.derivatives else 0)

    def extra_description(self, description: Description) -> Description:
        """Returns the blocks that move on their own, and the passes that they and derivatives add.

        Returns:
            The blocks, if any, and all passes over the data: a derivative takes one for each point.
        """
        passes = description["passes_over_data"] + len(self.alphas) * self.derivatives
        if self.repair is not None:
            corrections = self.repair.passes(2, len(self._inner))
            return {"passes_over_data": passes, "passes_for_repair": corrections}
        if not self.blocks:
            return {"passes_over_data": passes}
        objective, points = self.problem.objective, len(points_of(self.alphas))
        chunks = (min(points_at_once(objective, b.moving), points) for b in self.blocks)
        # Each block has a sweep of its own; its points were counted as if each were loaded plainly.
        passes += sum(math.ceil(points / c) - points for c in chunks)
        return {"passes_over_data": passes, "blocks": [block.name for block in self.blocks]}

    @property
    def swept(self) -> int:
        """How many points are evaluated by sweeps, including those of blocks."""
        return super().swept + len(self.blocks) * len(points_of(self.alphas))

    def extra_cost(self, timings: Timings, clock: Clock, seconds: float) -> CostEstimate:
        """Returns the cost of derivatives and corrections, and that refining adds points.

        Returns:
            Entries of the estimate.
        """
        estimate: CostEstimate = {} if self.refine is None else {"kind": "at least"}
        objective = self.problem.objective
        if self.repair is not None:
            estimate["seconds"] = seconds + self.repair.seconds(timings, 2, len(self._inner))
        if self.derivatives and self.moving:
            line, _ = self.sample(1)
            assert isinstance(line, Line)
            split = next(iter(objective.splits.values()))
            objective.load(self.start)
            work = halving(objective, lambda: prepare_first_batch(objective, line, split))
            took = halving(objective, lambda: timed(objective, work, clock))
            examples = sum(map(len, objective.splits.values()))
            batch = min(objective.batch_size, len(split))
            estimate["seconds"] = seconds + len(self.alphas) * examples * took / batch
        return estimate

    def run(self, execution: Execution = ALONE) -> Result[LineSummary]:
        """Evaluates both ends, loaded plainly, and the other points by a verified sweep."""
        objective, settings = self.problem.objective, self.problem.settings
        with float32_precision(tf32=settings.tf32):
            swept = time.perf_counter()
            line = Line(self.on_device(self.start), self.on_device(self.end))
            check(objective, self.start, self.end)
            difference = 0.0
            if self.repair is None:
                choose_strategy(objective, line, [(alpha,) for alpha in self.alphas])
                anchors = [((0.0,), self.start), ((1.0,), self.end)]
                difference = verify_sweep(self.problem, line, anchors, [(0.5,)])
            verify_fresh_model(self.problem, self.end)
            stays = [
                *integer_notes(self, self.end, self.problem.last.weights),
                *spectral_notes(self),
            ]
            if self.repair is None:
                stays += batchnorm_notes(
                    self,
                    (self.start, self.end),
                    lambda: point_between(self.start, self.end, self.moving, 0.5),
                    "at α = 0.5",
                )
            for block in self.blocks:
                difference = max(difference, self._verify_block(block))
            split_curves = self.evaluate(partial(self._evaluate, line), execution)
            curves = {name: parts.whole for name, parts in split_curves.items()}
            beyond = execution.after(self.evaluations)
            method = MethodChoice(self.alphas) if self.derivatives else None
            refiner = Refiner(self.problem, self.start, line, method, beyond)
            refined, exhausted = (
                RefinedCurve(self.alphas, curves, refiner.slopes(self.alphas)),
                False,
            )
            if self.refine is not None:
                refined, exhausted = refiner.refine(refined, self.refine)
            sure, again = (refined.curves, 0) if self.repair else refiner.without_rounding(refined)
            seconds = self.seconds(swept)
        splits = {
            name: describe(
                refined.alphas, curve.losses[2:], curve.losses[0], curve.losses[1], curve.weights
            )
            for name, curve in sure.items()
        }
        for name in refined.slopes:
            splits[name]["slope_at_b"] = refined.derivatives(name, 1.0)
        examples = {name: curve.examples for name, curve in curves.items()}
        blocks = self._blocks(split_curves)
        more = {} if self.context is None else {"context": self.context}
        if self.blocks:
            more["blocks"] = self._block_table(split_curves)
        added: LineSummary = {"blocks": blocks} if self.blocks else {}
        if self.repair is not None:
            added["repair"] = self.repair.summary(execution)
        table = self._table(refined)
        summary: LineSummary = {
            **self.origin(),
            "range": list(self.range),
            **counted(objective, examples, self.problem.settings.seed),
            "distance": distance(self.start, self.end, self.counted),
            "stays": self._stays(),
            "refined": self._refined(refined, exhausted=exhausted),
            "tables": list(more),
            "splits": splits,
            **added,
            "endpoint_difference": difference,
            "notes": [
                *stays,
                *self._notes(splits, blocks, table),
                *sampling_notes(self, examples),
                *seed_notes(self, table),
                *self._refinement_notes(again, exhausted=exhausted),
                *self._context_notes(refined),
                *(self.repair.notes if self.repair else ()),
            ],
            "seconds": seconds,
        }
        return Result(table, summary, COMMANDS[self.command].draw, more)

    def _table(self, refined: RefinedCurve) -> Table:
        metrics = self.problem.objective.columns
        derived = ["slope", "curvature"] if refined.slopes else []
        sampled = self.sampled
        estimates = {name: curve.estimate for name, curve in refined.curves.items()}
        return Table.build(
            ["alpha", "split", "loss", "loss_stderr", *metrics, *derived, *sampled],
            (
                [
                    *(alpha, name, *estimate.row(i, metrics)),
                    *(float(values[i]) for values in refined.slopes.get(name, ())),
                    *(estimate.examples for _ in sampled),
                ]
                for i, alpha in enumerate(refined.alphas)
                for name, estimate in estimates.items()
            ),
        )

    def _stays(self) -> dict[str, list[str]]:
        """Lists the tensors that differ and do not move, by the end at which they stay."""
        # With it, `export` makes the point at any α from the two checkpoints.
        problem, settings = self.problem, self.problem.settings
        stays: dict[str, list[str]] = {"a": [], "b": []}
        if settings.buffers == "interpolate" and not (settings.only or settings.except_):
            return stays
        tensors, last = problem.objective.tensors, problem.last.weights
        # A tied tensor moves under one of its names.
        may_move = {id(tensors[name]) for name in problem.moving}
        may_move |= {
            id(tensors[name]) for layer in problem.objective.spectral for name in layer.names
        }
        at_b = frozenset(problem.buffers if settings.buffers == "b" else ())
        for name, tensor in problem.first.weights.items():
            floating = can_move(tensor) and id(tensors[name]) not in may_move
            if floating and not torch.equal(tensor, last[name]):
                stays["b" if name in at_b else "a"].append(name)
        return stays

    def _blocks(self, split_curves: Mapping[str, _SplitCurves]) -> dict[str, BlockSummary]:
        """Summarises the curves of each block."""
        counted = {block.name: self.problem.parameters(block.moving) for block in self.blocks}
        return {
            block.name: {
                "tensors": len(counted[block.name]),
                "values": dimension(self.start, counted[block.name]),
                "distance": distance(self.start, self.end, counted[block.name]),
                "splits": {
                    name: parts.blocks[block.name].describe(self.alphas)
                    for name, parts in split_curves.items()
                },
            }
            for block in self.blocks
        }

    def _block_table(self, split_curves: Mapping[str, _SplitCurves]) -> Table:
        estimates = {
            (block.name, name): parts.blocks[block.name].losses
            for block in self.blocks
            for name, parts in split_curves.items()
        }
        return self.loss_table(
            ["block", "alpha", "split"],
            (
                ([block.name, alpha, name], estimates[block.name, name], i)
                for block in self.blocks
                for i, alpha in enumerate(self.alphas)
                for name in split_curves
            ),
        )

    def _block_line(self, block: Block) -> tuple[Line, Weights]:
        """Returns the line on which only this block moves, and all tensors at its end."""
        end = {name: self.end[name] for name in block.moving}
        line = Line(self.on_device(self.start, block.moving), self.on_device(end, block.moving))
        return line, {**self.start, **end}

    def _verify_block(self, block: Block) -> float:
        line, end = self._block_line(block)
        # Three points, so that they share a first layer as in the sweep.
        return verify_sweep(self.problem, line, [((1.0,), end)], [(0.0,), (0.5,)])

    def _evaluate(
        self,
        line: Line,
        splits: Mapping[str, Examples],
        execution: Execution,
    ) -> dict[str, _SplitCurves]:
        """Evaluates the ends plainly and the points between and beyond them by a sweep."""
        objective = self.problem.objective
        both = [self.start, self.end]
        ends = sweep_plain(objective, both, splits=splits, execution=execution)
        inner = self._inner
        parts = list(ends)
        if self.repair is not None:
            corrected = self.repair.points((0, 1), both.__getitem__, self.moving, inner)
            parts += sweep_plain(objective, corrected, splits=splits, execution=execution.after(2))
        elif inner:
            points = [(alpha,) for alpha in inner]
            parts.append(
                sweep(objective, line, points, splits=splits, execution=execution.after(2))
            )
        # The ends come first, whether or not they are among the points, then the points.
        place = {0.0: 0, 1.0: 1} | {alpha: 2 + i for i, alpha in enumerate(inner)}
        order = [0, 1, *(place[alpha] for alpha in self.alphas)]
        blocks: dict[str, dict[str, BlockCurve]] = {name: {} for name in splits}
        done = 2 + len(inner)
        for block in self.blocks:
            found = self._sweep_block(block, splits, execution.after(done))
            done += len(points_of(self.alphas))
            for name in splits:
                at_a = ends[0][name]
                blocks[name][block.name] = BlockCurve.of(self.alphas, at_a, found[name])
        return {
            name: _SplitCurves(LineCurve.arrange([p[name] for p in parts], order), blocks[name])
            for name in splits
        }

    def _sweep_block(
        self, block: Block, splits: Mapping[str, Examples], execution: Execution
    ) -> dict[str, Evaluation]:
        """Evaluates a line on which one block moves."""
        line, _ = self._block_line(block)
        # Tensors that moved on the previous line are at any of its points.
        self.problem.objective.load(self.start)
        return sweep(
            self.problem.objective,
            line,
            [(alpha,) for alpha in points_of(self.alphas)],
            splits=splits,
            execution=execution,
        )

    def _refined(self, refined: RefinedCurve, *, exhausted: bool) -> Refined | None:
        if self.refine is None:
            return None
        return {
            "tolerance": self.refine,
            "points": len(refined.alphas),
            "uniform_points": uniform_points(refined.alphas),
            "exhausted": exhausted,
        }

    def _refinement_notes(self, again: int, *, exhausted: bool) -> list[str]:
        notes = []
        if again:
            notes.append(
                f"{format_count(again, 'point')} evaluated again in float64: rounding alone could "
                "create an extremum there"
            )
        if exhausted:
            notes.append("the curve is not accurate to --refine everywhere: more points are needed")
        return notes

    def _context_notes(self, refined: RefinedCurve) -> list[str]:
        """Notes on a context with other losses at the ends."""
        if self.context is None:
            return []
        for name, curve in refined.curves.items():
            rows = self.context.where("split", name)
            for alpha, loss in zip(rows.floats("alpha"), rows.floats("loss"), strict=True):
                if alpha in {0.0, 1.0}:
                    own = float(curve.losses[int(alpha)].mean(dtype=np.float64))
                    if not math.isclose(loss, own, rel_tol=1e-3) and math.isfinite(own):
                        there = f"the line of --context has the loss {loss:.4g} at α = {alpha:g}"
                        doubt = "is it of the same checkpoints, data and --limit?"
                        return [f"{there}, and this one {own:.4g}: {doubt}"]
        return []

    def kept_values(self, end: str) -> tuple[str, str]:
        """Describes values that stay at one end.

        Returns:
            The checkpoint of which they are, and the consequence.
        """
        kept, other = "AB" if end == "first" else "BA"
        return f"{kept}'s", f"the end {other} of the line is not the checkpoint {other}"

    def _notes(
        self,
        splits: Mapping[str, LineSplit],
        blocks: Mapping[str, BlockSummary],
        table: Table,
    ) -> list[str]:
        notes = []
        if not self.moving:
            notes.append("A and B are the same in every tensor that may move: nothing moves")
        elif not self.counted:
            notes.append("A and B differ only in buffers: ‖B − A‖, over the parameters, is 0")
        notes += general_notes(self)
        notes += storage_notes(self)
        if any(split["not_finite"] for split in splits.values()):
            notes += variance_notes(self, map(self._buffers_at, self.range))
        for name, split in splits.items():
            if split["not_finite"]:
                number = split["not_finite"]
                rows = table.where("split", name)
                where = places_not_finite(rows.floats("alpha"), rows.floats("loss"))
                notes.append(
                    f"{format_count(number, 'point')} of {name} "
                    f"{'have' if number > 1 else 'has'} a loss that is not finite: {where}"
                )
        for name in splits:
            wrong = [b for b, found in blocks.items() if found["splits"][name]["not_finite"]]
            if wrong:
                notes.append(
                    f"{name}: moved on its own, {list_first(wrong)} has losses that are not finite"
                )
        return notes

    def _buffers_at(self, alpha: float) -> Weights:
        """The buffers that move, at a point."""
        return {
            name: Line({}, {}).combine([self.start[name], self.end[name]], (alpha,))
            for name in self.moving
            if name in self.problem.buffers
        }


@dataclass(frozen=True)
class _SplitCurves:
    """One split on the line and on those of single blocks.

    Attributes:
        whole: The line.
        blocks: Those of the blocks, by name.
    """

    whole: LineCurve
    blocks: Mapping[str, BlockCurve]

    @property
    def examples(self) -> int:
        return self.whole.examples

    def extend(self, more: _SplitCurves) -> _SplitCurves:
        """Adds the examples of another block of the data."""
        blocks = {name: curve.extend(more.blocks[name]) for name, curve in self.blocks.items()}
        return _SplitCurves(self.whole.extend(more.whole), blocks)

    def is_known_to(self, tolerance: float) -> bool:
        """Whether every standard error is below a share of the height of all curves together."""
        curves = [self.whole.estimate, *(curve.losses for curve in self.blocks.values())]
        return Estimate.join(curves).is_known_to(tolerance)
