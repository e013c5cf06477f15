"""The barriers between pairs of checkpoints, and how far their outputs differ."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, islice, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from losscli.checkpoint import CheckpointLike, expand_folders, name_checkpoints
from losscli.data import Examples
from losscli.errors import UsageError
from losscli.evaluation.cost import Clock, Timings
from losscli.evaluation.device import float32_precision
from losscli.evaluation.losses.built_in import function_of
from losscli.evaluation.losses.metrics import METRICS, accuracy, is_higher_better, of_mean
from losscli.evaluation.objective import Evaluation
from losscli.evaluation.output_comparison import Comparison, Measures, check_outputs, compare
from losscli.evaluation.ranks import Ranks
from losscli.evaluation.sampling import Estimate, sample_order
from losscli.evaluation.strategy_choice import choose_strategy
from losscli.evaluation.sweep import check, join_points, sweep_each, sweep_plain
from losscli.evaluation.tasks import ALONE, Execution
from losscli.registry import COMMANDS
from losscli.results.result import Result
from losscli.results.summaries import (
    BarriersSplit,
    BarriersSummary,
    CostEstimate,
    Description,
    MeanOverPairs,
    PairBarrier,
    PairsAtPosition,
)
from losscli.settings import PathLike, Progress, Settings, checked
from losscli.studies.base import Study
from losscli.studies.checkpoints import require_distinct
from losscli.studies.notes import (
    batchnorm_notes,
    general_notes,
    integer_notes,
    sampling_notes,
    seed_notes,
    spectral_notes,
    storage_notes,
)
from losscli.studies.pairs import Pairs, read_pairs
from losscli.studies.problem import counted, prepare, unequal_names
from losscli.studies.repair import RepairedLines
from losscli.studies.task import like_loss
from losscli.studies.verification import verify_fresh_model, verify_sweep
from losscli.table import Cell, Table
from losscli.weight_space.curve import standard_error
from losscli.weight_space.slices import Line, check_point_count, grid, point_between
from losscli.weight_space.vectors import Weights, distance
from losscli.wording import format_count

__all__ = ["Barriers", "barriers"]

# Lines on which the statistics of BatchNorm are compared with those of the data.
_HINTS = 3


@checked(Settings)
def barriers(
    names: CheckpointLike | Iterable[CheckpointLike] = (),
    *,
    pairs: PathLike | None = None,
    x: str | None = None,
    points: int = 11,
    disagreement: bool = False,
    cka: bool = False,
    repair: bool = False,
    progress: Progress = None,
    **settings: Any,
) -> Result[BarriersSummary]:
    """Finds the barrier of the loss on the straight line between each two checkpoints.

    The barrier is the largest height above the chord, for 0 ≤ α ≤ 1, and never below 0 (Entezari
    et al. 2022, arXiv 2110.06296).

    Args:
        names: Two or more checkpoints, each once: files, ``FILE#KEY``, ``init:SEED``, or a folder
            of them.
        pairs: Instead of them a CSV file with the columns ``a`` and ``b``, the checkpoints of each
            pair, relative to the folder of the file. The barriers of the loss and of each metric
            are then given over the column ``x``, with means over the pairs that share a value.
        x: The name of a column of ``pairs`` with a number for each pair, for example the step at
            which two runs were spawned (Frankle et al. 2020, arXiv 1912.05671).
        points: Evenly spaced values of α on each line, both ends among them.
        disagreement: Whether to compute the share of examples on which two checkpoints predict
            different classes (Fort et al. 2019, arXiv 1912.02757).
        cka: Whether to compute the linear CKA of the outputs of two checkpoints (Kornblith et al.
            2019, arXiv 1905.00414).
        repair: Whether each point between two checkpoints is corrected by REPAIR (Jordan et al.
            2022, arXiv 2211.08403), see `interpolate`.
        progress: True shows a bar; a function is called with the number of points done so far.
        **settings: The attributes of `losscli.settings.Settings`: ``model``, ``data``, ….

    Returns:
        The result: its table has a row for each pair and split, ``more["curves"]`` one for each
        point of each line.

    Raises:
        LosscliError: Something is missing, broken or does not fit.
    """
    plan = Barriers.plan(
        name_checkpoints(names),
        Settings(**settings),
        points=points,
        pairs_file=None if pairs is None else os.fspath(pairs),
        x=x,
        disagreement=disagreement,
        cka=cka,
        repair=repair,
    )
    return plan.run_alone(progress)


@dataclass(frozen=True)
class Barriers(Study):
    """Pairs of checkpoints whose lines are ready to be evaluated.

    Attributes:
        states: The tensors of each checkpoint; memory-mapped ones are in memory only while they
            are used.
        alphas: The points of each line, in ascending order from 0 to 1.
        pairs: The places of the two checkpoints of each pair, in the order of the rows.
        listed: The pairs of ``--pairs``; None for all pairs.
        measures: How outputs are compared.
        repair: Corrects the points between two checkpoints; None if they stay on the line.
    """

    command = "barriers"

    states: tuple[Weights, ...]
    alphas: tuple[float, ...]
    pairs: tuple[tuple[int, int], ...]
    listed: Pairs | None
    measures: Measures
    repair: RepairedLines | None

    @classmethod
    def plan(
        cls,
        names: Sequence[str],
        settings: Settings,
        *,
        points: int,
        pairs_file: str | None = None,
        x: str | None = None,
        disagreement: bool = False,
        cka: bool = False,
        repair: bool = False,
        ranks: Ranks | None = None,
    ) -> Barriers:
        """Reads and matches everything, evaluates nothing. See `barriers` for the arguments."""
        begun = time.perf_counter()
        listed = _list_pairs(names, pairs_file, x)
        names = expand_folders(names) if listed is None else listed.checkpoints
        if len(names) < 2:
            raise UsageError(
                f"barriers needs two checkpoints or more, and got {len(names)}",
                "Give a folder of them, or their names",
            )
        require_distinct(names)
        if points < 3:
            raise UsageError(
                f"--points {points} leaves no point between two checkpoints", "Give 3 or more"
            )
        place = {name: t for t, name in enumerate(names)}
        pairs = (
            list(combinations(range(len(names)), 2))
            if listed is None
            else [(place[a], place[b]) for a, b in listed.names]
        )
        check_point_count("--points", points, points * len(pairs))
        problem = prepare(names, settings, ranks=ranks, training="--repair" if repair else "")
        states = [problem.open(t).weights for t, _ in enumerate(names)]
        moving = unequal_names(problem.moving, states)
        metrics = problem.objective.metrics
        if listed is not None and listed.column in {
            column for name in metrics for column in _barrier_columns([name])
        }:
            raise UsageError(
                f"--x {listed.column} is the name of another column", "Rename the column"
            )
        measured = like_loss(problem.objective.loss, accuracy) if disagreement else None
        return cls(
            problem,
            moving,
            begun,
            tuple(states),
            tuple(grid(points, 0, 1)),
            tuple(pairs),
            listed,
            Measures(measured, cka),
            RepairedLines(problem) if repair else None,
        )

    @property
    def options(self) -> dict[str, Any]:
        """The values of α, the pairs of a file, and how outputs are compared."""
        options: dict[str, Any] = {"alphas": self.alphas}
        if self.listed is not None:
            options["pairs"] = [self.listed.column, self.pairs, self.listed.positions]
        if self.repair:
            options["repair"] = True
        if self.measures:
            options["measures"] = [self.measures.accuracy is not None, self.measures.cka]
        return options

    @property
    def slices(self) -> tuple[int, int]:
        """A line for each pair, without its ends; corrected points are evaluated plainly."""
        return (0, 0) if self.repair else (len(self.pairs), len(self._inner))

    @property
    def evaluations(self) -> int:
        """How many points a run evaluates: each checkpoint once, and the lines between them.

        Outputs are compared at both ends of each line.
        """
        points = len(self._inner) + 2 * bool(self.measures)
        return len(self.states) + len(self.pairs) * points

    @property
    def _inner(self) -> tuple[float, ...]:
        return self.alphas[1:-1]

    def extra_description(self, description: Description) -> Description:
        """Returns the number of pairs; one pass over the data gives both outputs of a pair."""
        pairs = len(self.pairs)
        passes = description["passes_over_data"] - pairs * bool(self.measures)
        own: Description = {"pairs": pairs, "passes_over_data": passes}
        if self.repair is not None:
            own["passes_for_repair"] = self.repair.passes(*self._corrected)
        return own

    def extra_cost(self, timings: Timings, clock: Clock, seconds: float) -> CostEstimate:  # noqa: ARG002
        """Returns the cost of corrections.

        Returns:
            Entries of the estimate.
        """
        if self.repair is None:
            return {}
        return {"seconds": seconds + self.repair.seconds(timings, *self._corrected)}

    @property
    def _corrected(self) -> tuple[int, int]:
        """How many checkpoints and points ``--repair`` measures."""
        return len(self.states), len(self.pairs) * len(self._inner)

    def weights(self, t: int) -> Weights:
        """Returns the tensors of a checkpoint, which are already open."""
        return self.states[t]

    def run(self, execution: Execution = ALONE) -> Result[BarriersSummary]:
        """Evaluates each checkpoint once, loaded plainly, and each line between two by a sweep."""
        objective, settings = self.problem.objective, self.problem.settings
        placed = [self.problem.place(weights) for weights in self.states]
        distances: dict[tuple[int, int], float] = {}
        with float32_precision(tf32=settings.tf32):
            swept = time.perf_counter()
            check(objective, placed[0], placed[-1])
            if self.measures:
                check_outputs(objective, self.measures)
            difference, stays = self._verify(placed)
            found = self.evaluate(partial(self._evaluate, placed, distances), execution)
            examples = {name: measured.examples for name, measured in found.items()}
            compared = self._compare(placed, examples, execution)
            seconds = self.seconds(swept)
        heights = {name: self._heights(measured) for name, measured in found.items()}
        lengths = [self._length(placed, distances, i, j) for i, j in self.pairs]
        splits = {
            name: self._split_summary(heights[name], measured, lengths)
            for name, measured in found.items()
        }
        table = self._table(found, heights, lengths, compared)
        for name, split in splits.items():
            split.update(self._further_summary(table.where("split", name)))
        more = {"curves": self._curves(found)}
        added: BarriersSummary = {}
        if self.repair is not None:
            added["repair"] = self.repair.summary(execution)
        summary: BarriersSummary = {
            **self.origin(),
            "alphas": list(self.alphas),
            "tables": list(more),
            **counted(objective, examples, self.problem.settings.seed),
            "pairs": None if self.listed is None else self.listed.column,
            "distances": self._matrix(lengths) if self.listed is None else [],
            "splits": splits,
            **added,
            "endpoint_difference": difference,
            "notes": [
                *stays,
                *self._notes(placed, splits, lengths),
                *(_cka_notes(compared) if self.measures.cka else ()),
                *sampling_notes(self, examples),
                *seed_notes(self, more["curves"]),
                *(self.repair.notes if self.repair else ()),
            ],
            "seconds": seconds,
        }
        return Result(table, summary, COMMANDS[self.command].draw, more)

    def _compare(
        self, placed: Sequence[Weights], examples: Mapping[str, int], execution: Execution
    ) -> list[dict[str, Comparison]]:
        """Compares the outputs of all pairs on the examples that the losses are of."""
        if not self.measures:
            return []
        objective, settings = self.problem.objective, self.problem.settings
        splits = dict(objective.splits)
        if settings.sampling_error is not None:
            order = sample_order(splits, settings.seed)
            splits = {n: split.take(order[n][: examples[n]]) for n, split in splits.items()}
        before = self.evaluations - 2 * len(self.pairs)
        return compare(
            objective, placed, self.pairs, self.measures, splits, execution.after(before)
        )

    def _line(self, start: Weights, a: Weights, b: Weights) -> Line:
        """Returns the line from A to B; ``start`` holds the tensors of A on the device."""
        names = self._moving_names(a, b)
        return Line({name: start[name] for name in names}, self.on_device(b, names))

    def _moving_names(self, a: Weights, b: Weights) -> list[str]:
        """Returns the tensors that move from A to B."""
        # Equal tensors need not move; with infinities, such as attention masks have, they cannot.
        return [name for name in self.moving if not torch.equal(a[name], b[name])]

    def _length(
        self,
        placed: Sequence[Weights],
        distances: Mapping[tuple[int, int], float],
        i: int,
        j: int,
    ) -> float:
        """Returns the distance of a pair, computed here if another rank evaluated its line."""
        if (i, j) in distances:
            return distances[i, j]
        return self._distance(placed[i], placed[j])

    def _distance(self, a: Weights, b: Weights) -> float:
        """Returns the distance of two checkpoints over the parameters that move."""
        return distance(a, b, self.problem.parameters(self._moving_names(a, b)))

    def _verify(self, placed: Sequence[Weights]) -> tuple[float, list[str]]:
        """Verifies the sweep at every checkpoint, on the line to the next one in the order."""
        difference = 0.0 if self.repair else self._verify_sweeps(placed)
        verify_fresh_model(self.problem, placed[-1])
        pairs = zip(placed, self.states, strict=True)
        notes = (integer_notes(self, point, weights) for point, weights in pairs)
        hints = (
            batchnorm_notes(
                self,
                (a, b),
                partial(point_between, a, b, self.moving, 0.5),
                f"halfway between {one} and {other}",
            )
            for (one, a), (other, b) in islice(
                pairwise(zip(self.problem.names, placed, strict=True)),
                0 if self.repair else _HINTS,
            )
        )
        found = [*next(filter(None, notes), []), *spectral_notes(self)]
        return difference, [*found, *next(filter(None, hints), [])]

    def _verify_sweeps(self, placed: Sequence[Weights]) -> float:
        """Chooses the strategy; returns the largest difference from loaded checkpoints."""
        # All lines are swept with one strategy, chosen on a line along which something moves.
        objective, inner = self.problem.objective, [(alpha,) for alpha in self._inner]
        start = self.on_device(placed[0])
        lines = (self._line(start, placed[0], other) for other in placed[1:])
        lead = next((line for line in lines if line.a), Line({}, {}))
        choose_strategy(objective, lead, inner)
        difference = 0.0
        for a, b in pairwise(placed):
            line = self._line(self.on_device(a), a, b)
            difference = max(
                difference, verify_sweep(self.problem, line, [((0.0,), a), ((1.0,), b)], [(0.5,)])
            )
        return difference

    def _evaluate(
        self,
        placed: Sequence[Weights],
        distances: dict[tuple[int, int], float],
        splits: Mapping[str, Examples],
        execution: Execution,
    ) -> dict[str, _SplitBarriers]:
        """Evaluates all checkpoints, then all lines; only means over examples are kept."""
        objective, points = self.problem.objective, [(alpha,) for alpha in self._inner]
        own = sweep_plain(objective, placed, splits=splits, execution=execution)
        lines: dict[str, list[Estimate]] = {name: [] for name in splits}
        excess: dict[str, list[Estimate]] = {name: [] for name in splits}
        row: dict[int, Weights] = {}

        def line(i: int, j: int) -> Line:
            if i not in row:
                row.clear()
                row[i] = dict(self.on_device(placed[i]))
            between = self._line(row[i], placed[i], placed[j])
            if (i, j) not in distances:
                distances[i, j] = self._distance(placed[i], placed[j])
            # Tensors that moved on the previous line are at any of its points.
            objective.load(placed[i])
            return between

        beyond = execution.after(len(placed))
        found = (
            sweep_each(
                objective,
                (partial(line, i, j) for i, j in self.pairs),
                points,
                moving=self.moving,
                splits=splits,
                execution=beyond,
            )
            if self.repair is None
            else self._evaluate_corrected(self.repair, placed, splits, beyond)
        )
        for (i, j), measured in zip(self.pairs, found, strict=True):
            for name, evaluation in measured.items():
                lines[name].append(Estimate.of_evaluation(evaluation))
                excess[name].append(
                    _above_chord(self._inner, evaluation, own[i][name], own[j][name])
                )
        return {
            name: _SplitBarriers(
                Estimate.join([Estimate.of_evaluation(at[name]) for at in own]),
                Estimate.join(lines[name]),
                Estimate.join(excess[name]),
            )
            for name in splits
        }

    def _evaluate_corrected(
        self,
        repair: RepairedLines,
        placed: Sequence[Weights],
        splits: Mapping[str, Examples],
        execution: Execution,
    ) -> Iterator[dict[str, Evaluation]]:
        """Evaluates the corrected points of each line, each loaded plainly."""
        for p, (i, j) in enumerate(self.pairs):
            points = repair.points(
                (i, j), placed.__getitem__, self._moving_names(placed[i], placed[j]), self._inner
            )
            found = sweep_plain(
                self.problem.objective,
                points,
                splits=splits,
                execution=execution.after(p * len(self._inner)),
            )
            yield join_points(found)

    def _heights(self, measured: _SplitBarriers) -> list[_Height]:
        """Finds the barrier of each pair on one split."""
        own, means, errors = (
            x.tolist() for x in (measured.own.mean, measured.lines.mean, measured.errors)
        )
        heights = []
        for number, (i, j) in enumerate(self.pairs):
            stretch = slice(number * len(self._inner), (number + 1) * len(self._inner))
            excess = [
                loss - ((1 - alpha) * own[i] + alpha * own[j])
                for alpha, loss in zip(self._inner, means[stretch], strict=True)
            ]
            # One loss that is not finite leaves the barrier of the line unknown.
            if not all(map(math.isfinite, excess)):
                heights.append(_Height(math.nan, math.nan, math.nan))
                continue
            top = max(range(len(excess)), key=excess.__getitem__)
            heights.append(
                _Height(excess[top], errors[stretch][top], self._inner[top])
                if excess[top] > 0
                else _Height(0.0, 0.0, None)
            )
        return heights

    def _split_summary(
        self, heights: Sequence[_Height], measured: _SplitBarriers, lengths: Sequence[float]
    ) -> BarriersSplit:
        """Summarises the barriers on one split."""
        pairs = list(self.pairs)
        known = [p for p, height in enumerate(heights) if not math.isnan(height.height)]

        def pair_barrier(p: int | None) -> PairBarrier | None:
            if p is None:
                return None
            a, b = (self.problem.names[t] for t in pairs[p])
            at = heights[p]
            return {
                "a": a,
                "b": b,
                "distance": lengths[p],
                "height": at.height,
                "stderr": at.stderr,
                "alpha": at.alpha,
            }

        return {
            "losses": measured.own.mean.tolist(),
            "barriers": (
                self._matrix([at.height for at in heights]) if self.listed is None else []
            ),
            "largest": pair_barrier(max(known, key=lambda p: heights[p].height, default=None)),
            "smallest": pair_barrier(min(known, key=lambda p: heights[p].height, default=None)),
            "without": sum(at.height == 0 for at in heights),
            "not_finite": len(heights) - len(known),
        }

    def _further_summary(self, rows: Table) -> BarriersSplit:
        """Summarises the further columns of a split, and the means over pairs of a file."""
        if self.listed is None:
            split: BarriersSplit = {}
            if self.measures.accuracy is not None:
                split["disagreement"] = self._matrix(rows.floats("disagreement"))
            if self.measures.cka:
                split["cka"] = self._matrix(rows.floats("cka"), 1.0)
            return split
        columns = ["barrier", *_barrier_columns(self.problem.objective.metrics)]
        columns += [name for name in ("disagreement", "cka") if name in rows.columns]
        positions = np.array(self.listed.positions, dtype=np.float64)
        return {
            "means": [
                PairsAtPosition(
                    x=float(x),
                    pairs=int((positions == x).sum()),
                    values={
                        column: _mean_over_pairs(np.array(rows.floats(column))[positions == x])
                        for column in columns
                    },
                )
                for x in np.unique(positions)
            ]
        }

    def _matrix(self, values: Sequence[float], diagonal: float = 0.0) -> list[list[float]]:
        """Returns the values of the pairs as a symmetric matrix."""
        size = len(self.states)
        square = [[diagonal] * size for _ in range(size)]
        for (i, j), value in zip(self.pairs, values, strict=True):
            square[i][j] = square[j][i] = value
        return square

    def _table(
        self,
        found: Mapping[str, _SplitBarriers],
        heights: Mapping[str, Sequence[_Height]],
        lengths: Sequence[float],
        compared: Sequence[Mapping[str, Comparison]],
    ) -> Table:
        names, listed, sampled = self.problem.names, self.listed, self.sampled
        own = {split: measured.own.mean.tolist() for split, measured in found.items()}
        shown = [
            *(("disagreement", "disagreement_stderr") if self.measures.accuracy else ()),
            *(("cka",) if self.measures.cka else ()),
        ]

        def further(p: int, split: str) -> list[Cell]:
            values = [getattr(compared[p][split], column) for column in shown]
            few = found[split].examples < 2
            return [
                None if few and column.endswith("_stderr") else value
                for column, value in zip(shown, values, strict=True)
            ]

        return Table.build(
            [
                *("a", "b", *([] if listed is None else [listed.column])),
                *("split", "distance", "barrier", "barrier_stderr", "alpha", "loss_a", "loss_b"),
                *([] if listed is None else _barrier_columns(self.problem.objective.metrics)),
                *shown,
                *sampled,
            ],
            (
                [
                    *(names[i], names[j], *(() if listed is None else (listed.positions[p],))),
                    *(split, lengths[p]),
                    heights[split][p].height,
                    heights[split][p].stderr if measured.examples > 1 else None,
                    *(heights[split][p].alpha, own[split][i], own[split][j]),
                    *([] if listed is None else self._metric_barriers(measured, p)),
                    *further(p, split),
                    *(measured.examples for _ in sampled),
                ]
                for p, (i, j) in enumerate(self.pairs)
                for split, measured in found.items()
            ),
        )

    def _metric_barriers(self, measured: _SplitBarriers, p: int) -> list[float]:
        """Finds the barrier of each metric: a depth below the chord where more is better."""
        i, j = self.pairs[p]
        inner = np.array(self._inner)
        stretch = slice(p * len(inner), (p + 1) * len(inner))
        barriers = []
        for name, metric in self.problem.objective.metrics.items():
            own, line = (
                np.array([of_mean(metric, float(x)) for x in means])
                for means in (
                    measured.own.metrics[name][[i, j]],
                    measured.lines.metrics[name][stretch],
                )
            )
            sign = -1 if is_higher_better(metric) else 1
            with np.errstate(all="ignore"):
                excess = sign * (line - ((1 - inner) * own[0] + inner * own[1]))
            known = np.isfinite(excess).all()
            barriers.append(max(0.0, float(excess.max())) if known else math.nan)
        return barriers

    def _curves(self, found: Mapping[str, _SplitBarriers]) -> Table:
        names, last = self.problem.names, len(self.alphas) - 1

        def at(measured: _SplitBarriers, p: int, i: int, j: int, k: int) -> tuple[Estimate, int]:
            if k in {0, last}:
                return measured.own, j if k else i
            return measured.lines, p * len(self._inner) + k - 1

        return self.loss_table(
            ["a", "b", "alpha", "split"],
            (
                ([names[i], names[j], alpha, split], *at(measured, p, i, j, k))
                for p, (i, j) in enumerate(self.pairs)
                for k, alpha in enumerate(self.alphas)
                for split, measured in found.items()
            ),
        )

    def _notes(
        self,
        placed: Sequence[Weights],
        splits: Mapping[str, BarriersSplit],
        lengths: Sequence[float],
    ) -> list[str]:
        notes = [*general_notes(self), *storage_notes(self)]
        if self.problem.chosen:
            notes.append("distances are those of the moving parameters")
        zero = [pair for pair, length in zip(self.pairs, lengths, strict=True) if length == 0]
        same = [(i, j) for i, j in zero if not self._moving_names(placed[i], placed[j])]
        for number, which in (
            (len(same), "are the same in every tensor that may move"),
            (len(zero) - len(same), "differ only in buffers: their distance is 0"),
        ):
            if number:
                notes.append(f"the two checkpoints of {format_count(number, 'pair')} {which}")
        for name, metric in self.problem.objective.metrics.items() if self.listed else ():
            function = function_of(metric)
            known = getattr(function, "higher_is_better", None) is not None
            if function not in METRICS.values() and not known:
                notes.append(
                    f"higher values of {name} count as better: its barrier is its largest fall "
                    "below the straight line. If lower values are better, set "
                    f"{name}.higher_is_better = False in your code"
                )
        for name, split in splits.items():
            if number := split["not_finite"]:
                notes.append(
                    f"{name}: the barrier of {format_count(number, 'pair')} is not known, since a "
                    "loss on the line is not finite"
                )
        return notes


def _list_pairs(names: Sequence[str], file: str | None, x: str | None) -> Pairs | None:
    """Reads the pairs of ``--pairs``; None for all pairs."""
    if file is None:
        if x is not None:
            raise UsageError("--x has no effect without --pairs", "Give --pairs FILE")
        return None
    if names:
        raise UsageError(
            f"--pairs {file} names the checkpoints, and {format_count(len(names), 'checkpoint')} "
            f"{'is' if len(names) == 1 else 'are'} given too",
            "Give one without the other",
        )
    if x is None:
        raise UsageError(
            "--pairs needs the name of its column with a number for each pair",
            "Give --x COLUMN",
        )
    return read_pairs(file, x)


def _barrier_columns(metrics: Iterable[str]) -> list[str]:
    """Names the columns of the barriers of metrics."""
    return [f"{metric}_barrier" for metric in metrics]


def _mean_over_pairs(values: NDArray[np.float64]) -> MeanOverPairs:
    """Averages over pairs; the standard error is None for a single one."""
    error = standard_error(values) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "stderr": error}


def _cka_notes(compared: Sequence[Mapping[str, Comparison]]) -> list[str]:
    """Returns a note on outputs that are the same for every example, or not finite."""
    if not any(math.isnan(c.cka) for splits in compared for c in splits.values()):
        return []
    return ["CKA is not known where the outputs are not finite or the same for every example"]


@dataclass(frozen=True)
class _Height:
    """A barrier: its height, the standard error of that, and where it is; None if there is none."""

    height: float
    stderr: float
    alpha: float | None


@dataclass(frozen=True)
class _SplitBarriers:
    """One split.

    Attributes:
        own: The losses of the N checkpoints, ``[N]``.
        lines: The losses at the K points between the ends of each pair, ``[pairs · K]``.
        excess: The heights above the chord there, example by example.
    """

    own: Estimate
    lines: Estimate
    excess: Estimate

    @property
    def examples(self) -> int:
        return self.own.examples

    @property
    def errors(self) -> NDArray[np.float64]:
        """The standard errors of the heights, both losses being of the same examples."""
        return self.excess.stderr

    def extend(self, more: _SplitBarriers) -> _SplitBarriers:
        """Adds the examples of another block of the data."""
        return _SplitBarriers(
            self.own.extend(more.own),
            self.lines.extend(more.lines),
            self.excess.extend(more.excess),
        )

    def is_known_to(self, tolerance: float) -> bool:
        """Whether every standard error is below a share of the height of all curves together."""
        return Estimate.join([self.own, self.lines]).is_known_to(tolerance)


def _above_chord(
    alphas: Sequence[float], found: Evaluation, a: Evaluation, b: Evaluation
) -> Estimate:
    """Estimates the heights above the chord, paired over examples."""
    start, end = (e.losses[0].numpy().astype(np.float64) for e in (a, b))
    weights = None if found.weights is None else found.weights.numpy()
    rows = []
    # A row at a time, so that there is never a float64 copy of all losses.
    with np.errstate(all="ignore"):
        for alpha, row in zip(alphas, found.losses.numpy(), strict=True):
            chord = (1 - alpha) * start + alpha * end
            rows.append(Estimate.of((row - chord)[None], {}, weights))
    return Estimate.join(rows)
