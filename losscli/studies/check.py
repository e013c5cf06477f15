"""Whether checkpoints are critical points, and minima or saddles, by their eigenvalues."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import starmap
from typing import Any, get_args

from losscli.checkpoint import CheckpointLike, name_checkpoints, order_path
from losscli.errors import UsageError
from losscli.evaluation.cost import Clock, Timings
from losscli.evaluation.device import float32_precision
from losscli.evaluation.hessian.critical_points import (
    CONTRADICTION_STEPS,
    EXPECTED_PRODUCTS,
    CriticalPointTest,
    PointAnalysis,
    batch_size_of,
    verdict_of,
)
from losscli.evaluation.hessian.curvature import DENSE_LIMIT, PRODUCT_LIMIT
from losscli.evaluation.hessian.gauss_newton import check_outputs
from losscli.evaluation.hessian.gradient_graphs import graph_budget
from losscli.evaluation.hessian.lanczos import MIN_PRODUCTS
from losscli.evaluation.hessian.preconditioned import PreconditionedEigenvalue
from losscli.evaluation.hessian.product_cost import product_seconds
from losscli.evaluation.hessian.verdict import Verdict
from losscli.evaluation.line_search import MAX_CURVE_POINTS, STEP_LENGTHS, LineSearch
from losscli.evaluation.objective import recalibrated
from losscli.evaluation.ranks import Arrays, Ranks
from losscli.evaluation.records import record_key, restore
from losscli.evaluation.sampling import Estimate
from losscli.evaluation.sweep import check as check_objective
from losscli.evaluation.sweep import sweep_plain
from losscli.evaluation.tasks import ALONE, Execution, Task
from losscli.registry import COMMANDS
from losscli.results.result import Result
from losscli.results.summaries import CheckSummary, CostEstimate, Description, Escape, Step
from losscli.settings import Progress, Settings, checked
from losscli.studies.base import Study
from losscli.studies.check_notes import check_notes, functions_called
from losscli.studies.checkpoints import require_distinct
from losscli.studies.layerwise import blocks_among
from losscli.studies.notes import general_notes, spectral_notes
from losscli.studies.preconditioner import AdamPreconditioner
from losscli.studies.problem import counted, prepare
from losscli.studies.spectra import ADAM, Part, ProbedPoint, Spectra, SpectraOptions
from losscli.studies.verification import differentiable_parameters, verify_fresh_model_near
from losscli.table import Cell, Table
from losscli.weight_space.vectors import Weights

__all__ = ["Check", "check"]

# Largest number of eigenvectors of a small network that fit into memory.
_MAX_EIGENVALUES = 10_000

_PRECONDITIONED = ("preconditioned_lambda_max", "preconditioned_lambda_max_error")


@checked(Settings)
def check(
    names: CheckpointLike | Iterable[CheckpointLike],
    *,
    tolerance: float = 1e-3,
    eigenvalues: int = 1,
    learning_rate: float | None = None,
    keep_order: bool = False,
    momentum: float | None = None,
    density: bool = False,
    probes: int | None = None,
    lanczos: int | None = None,
    operator: str | None = None,
    blocks: bool = False,
    optimizer: str | None = None,
    progress: Progress = None,
    **settings: Any,
) -> Result[CheckSummary]:
    """Checks whether checkpoints are critical points, and of which kind.

    Args:
        names: The checkpoints, in the order of training where there are several.
        tolerance: The largest gradient norm of a critical point.
        eigenvalues: How many eigenvalues of either end of the Hessian's spectrum are found.
        learning_rate: The learning rate η of training. The largest eigenvalue is compared with
            2/η, above which full-batch gradient descent is unstable.
        momentum: The momentum β of training, with which that is (2 + 2β)/η; heavy ball, without
            dampening or Nesterov's correction.
        keep_order: Take the checkpoints in the order of their names as they are given, and all
            files of a folder; by default they are ordered as `trajectory` does.
        density: Whether the spectral density is estimated by stochastic Lanczos quadrature.
        probes: The number of random vectors of the density and the trace; 10 by default.
        lanczos: The number of Lanczos steps with each of them; 90 by default.
        operator: The matrix of density, trace and blocks: ``hessian``, the default, or ``ggn``, the
            generalised Gauss-Newton matrix.
        blocks: Whether gradient norm, largest eigenvalue and trace of each block are computed.
        optimizer: ``adam`` for the largest eigenvalue of the Hessian preconditioned by the second
            moments of Adam or AdamW in each checkpoint. ``learning_rate`` is then that of Adam, by
            default as in the checkpoint.
        progress: True shows a bar; a function is called with the number of checkpoints done so far.
        **settings: The attributes of `losscli.settings.Settings`: ``model``, ``data``, ….

    Returns:
        The result: its table has a row for each checkpoint and split, ``more["spectrum"]`` one for
        each eigenvalue where there are more than two, and ``more["escape"]`` the loss along the
        most negative curvature of the last checkpoint, if it has any. ``more["density"]`` has the
        spectral density and ``more["curvature"]`` a row for each block, where they are asked for.

    Raises:
        LosscliError: Something is missing, broken or does not fit.
    """
    plan = Check.plan(
        name_checkpoints(names),
        Settings(**settings),
        tolerance=tolerance,
        eigenvalues=eigenvalues,
        learning_rate=learning_rate,
        keep_order=keep_order,
        momentum=momentum,
        density=density,
        probes=probes,
        lanczos=lanczos,
        operator=operator,
        blocks=blocks,
        optimizer=optimizer,
    )
    return plan.run_alone(progress)


@dataclass(frozen=True)
class Check(Study):
    """Checkpoints that are ready to be checked.

    Attributes:
        tolerance: The largest gradient norm of a critical point.
        eigenvalues: The number of largest, and of smallest, eigenvalues to find.
        learning_rate: The learning rate of training; None if it is not known.
        momentum: The momentum of training; None for 0.
        spectra: What is computed in addition to the verdicts.
        adam: The preconditioner of Adam at each checkpoint, if it was asked for.
    """

    command = "check"

    tolerance: float
    eigenvalues: int
    learning_rate: float | None
    momentum: float | None
    spectra: SpectraOptions
    adam: AdamPreconditioner | None

    @classmethod
    def plan(
        cls,
        names: Sequence[str],
        settings: Settings,
        *,
        tolerance: float,
        eigenvalues: int,
        learning_rate: float | None,
        keep_order: bool = False,
        momentum: float | None = None,
        density: bool = False,
        probes: int | None = None,
        lanczos: int | None = None,
        operator: str | None = None,
        blocks: bool = False,
        optimizer: str | None = None,
        ranks: Ranks | None = None,
    ) -> Check:
        """Reads and matches everything, evaluates nothing. See `check` for the arguments."""
        begun = time.perf_counter()
        names, notes = order_path(names, keep_order=keep_order)
        if not names:
            raise UsageError("check needs a checkpoint", "Give one or more")
        require_distinct(names)
        if not 0 <= tolerance < math.inf:
            raise UsageError(f"--tolerance must be 0 or above, not {tolerance}", "Give 1e-3")
        if eigenvalues < 1:
            raise UsageError(f"--eigenvalues must be at least 1, not {eigenvalues}", "Give 1")
        if eigenvalues > _MAX_EIGENVALUES:
            raise UsageError(
                f"--eigenvalues {eigenvalues} needs as many vectors of the network's size",
                f"Give {_MAX_EIGENVALUES} or fewer",
            )
        if learning_rate is not None and not 1e-12 <= learning_rate <= 1e12:
            raise UsageError(f"--learning-rate {learning_rate} is not a learning rate", "Give 0.1")
        if optimizer not in {None, "adam"}:
            raise UsageError(
                f"--optimizer {optimizer} is not known", "Give adam, also for AdamW and AMSGrad"
            )
        if optimizer and momentum is not None:
            raise UsageError(
                "--momentum has no effect with --optimizer adam: β₁ is read from each checkpoint",
                "Give one without the other",
            )
        if momentum is not None and learning_rate is None:
            raise UsageError(
                "--momentum has no effect without --learning-rate", "Add --learning-rate"
            )
        if momentum is not None and not 0 <= momentum < 1:
            raise UsageError(f"--momentum {momentum} is not in [0, 1)", "Give 0.9")
        spectra = SpectraOptions.plan(
            density=density, blocks=blocks, probes=probes, lanczos=lanczos, operator=operator
        )
        if settings.sampling_error is not None:
            raise UsageError(
                "--sampling-error is not available with check, which needs the gradient over all "
                "examples",
                "Evaluate fewer with --limit",
            )
        problem = prepare(names, settings, notes, ranks, independent=True)
        moving = differentiable_parameters(problem, "check")
        adam = AdamPreconditioner.plan(problem, moving, learning_rate) if optimizer else None
        return cls(
            *(problem, moving, begun, tolerance, eigenvalues, learning_rate, momentum, spectra),
            adam,
        )

    @property
    def options(self) -> dict[str, Any]:
        """The thresholds, and what is computed."""
        return {
            "tolerance": self.tolerance,
            "eigenvalues": self.eigenvalues,
            "learning_rate": self.learning_rate,
            "momentum": self.momentum,
            "density": self.spectra.density,
            "blocks": self.spectra.blocks,
            "optimizer": self.adam.identity if self.adam else None,
            **self.spectra.provenance,
        }

    @property
    def threshold(self) -> float | None:
        """The largest λ_max at which full-batch gradient descent is stable: (2 + 2β)/η."""
        # Cohen et al. 2021 (arXiv 2103.00065), of heavy ball without dampening.
        if self.learning_rate is None or self.adam:
            return None
        return (2 + 2 * (self.momentum or 0.0)) / self.learning_rate

    def extra_description(self, description: Description) -> Description:
        """Returns the work in addition to evaluating the checkpoints.

        Returns:
            The most Hessian-vector products, each of which costs a few passes over the data; the
            most bytes of gradients that are kept with their graphs for them; the most points along
            directions, each of which costs one pass; the bytes of a Lanczos basis and the blocks,
            if they are needed.
        """
        size = description["moving"]["values"]
        splits = len(self.problem.objective.splits)
        spectra = self._spectra
        most = size if size <= DENSE_LIMIT else PRODUCT_LIMIT
        most += sum(spectra.products(part)[1] for part in spectra.parts)
        most += PRODUCT_LIMIT + 1 if self.adam else 0
        added: Description = {
            "products_at_most": most * splits * len(self.problem.names),
            "bytes_of_graphs_at_most": graph_budget(self.problem.objective.device),
            "steps_at_most": self._steps * splits,
        }
        if self.spectra.density:
            added["bytes_of_basis"] = 8 * size * spectra.estimator.kept[0]
        if spectra.blocks:
            added["blocks"] = [block.name for block in spectra.blocks]
        return added

    @property
    def _steps(self) -> int:
        """Points along directions at which a split is evaluated, at most."""
        # Steps of each checkpoint along −∇L, along v to both sides, or next to an extremum.
        # The last one has both sides of v in addition, and the curve of the escape.
        sides = 2 * len(STEP_LENGTHS)
        most = max(sides, CONTRADICTION_STEPS)
        return most * len(self.problem.names) + sides + MAX_CURVE_POINTS

    def extra_cost(self, timings: Timings, clock: Clock, seconds: float) -> CostEstimate:
        """Estimates the time of gradients and Hessian-vector products; their number is not known.

        Returns:
            ``seconds`` for the fewest products, ``seconds_at_most`` for the most, and what a
            ``product`` takes on all examples of the splits.
        """
        objective, origin = self.problem.objective, self.problem.origin
        splits = objective.splits.values()
        with objective.frozen_statistics():
            differentiated = self._test.differentiated(origin)
            product = product_seconds(differentiated, origin, self.moving, splits, clock)
        examples = sum(map(len, splits))
        number, size = len(self.problem.names), sum(origin[name].numel() for name in self.moving)
        # A gradient takes at most the time of a product.
        fewest, most = (size, size) if size <= DENSE_LIMIT else (MIN_PRODUCTS, PRODUCT_LIMIT)
        measured = 1 + 2 * self.eigenvalues
        for part in self._spectra.parts:
            least, greatest = self._spectra.products(part)
            fewest, most = fewest + least, most + greatest
        if self.adam:
            fewest, most = fewest + MIN_PRODUCTS, most + PRODUCT_LIMIT + 1
        return {
            "seconds": seconds + number * fewest * product,
            "kind": "at least",
            "seconds_at_most": seconds
            + number * (most + measured) * product
            + self._steps * examples * timings.plain,
            "product": {"seconds": product},
        }

    @property
    def slices(self) -> tuple[int, int]:
        """None: the line of an escape is not known before the run."""
        return 0, 0

    @property
    def evaluations(self) -> int:
        """The checkpoints."""
        return len(self.problem.names)

    @property
    def unit(self) -> str:
        """What progress counts."""
        return "checkpoints"

    def run(self, execution: Execution = ALONE) -> Result[CheckSummary]:
        """Computes gradients and eigenvalues, and decides what each checkpoint is."""
        objective = self.problem.objective
        names, splits = self.problem.names, list(objective.splits)
        with float32_precision(tf32=self.problem.settings.tf32):
            swept = time.perf_counter()
            last = self.problem.place(self.problem.last.weights)
            check_objective(objective, self.problem.origin, last)
            # No table has a column for them.
            objective.metrics = {}
            # Near the point, where steps and differences are evaluated.
            verify_fresh_model_near(self.problem, last, self.moving)
            objective.load(self.problem.origin)
            del last
            functions = functions_called(objective)
            if self.spectra.operator == "ggn":
                check_outputs(objective)
            records, probed, preconditioned = self._analyse_all(execution)
            analyses, directions = {}, {}
            for t, _ in enumerate(names):
                for split in splits:
                    record = PointAnalysis.from_arrays(records[t, split])
                    analyses[t, split], directions[t, split] = record
            # The direction out of a saddle is shown before that of a point which is not critical.
            escape: Escape | None = None
            curve: Table | None = None
            escapes = [t for t, _ in enumerate(names) if directions[t, splits[0]] is not None]
            if escapes:
                t = max(escapes, key=lambda t: (analyses[t, splits[0]].verdict == "saddle", t))
                direction = directions[t, splits[0]]
                assert direction is not None
                escape, curve = self._escape(
                    t, splits[0], analyses[t, splits[0]], direction, execution.quiet
                )
            seconds = self.seconds(swept)
        more = {}
        points = [(names[t], split, one) for (t, split), one in analyses.items()]
        if any(len(one.spectrum) > 2 for one in analyses.values()):
            more["spectrum"] = Table.build(
                ["checkpoint", "split", "eigenvalue", "error"],
                ([name, split, *pair] for name, split, one in points for pair in one.spectrum),
            )
        if curve is not None:
            more["escape"] = curve
        more |= self._spectra_tables(probed)
        table = Table.build(
            [
                *("checkpoint", "split", "loss", "gradient_norm"),
                *("lambda_min", "lambda_min_error", "lambda_max", "lambda_max_error"),
                *("minimal_ratio", "positive", "negative", "undecided", "trace", "trace_stderr"),
                *(_PRECONDITIONED if self.adam else ()),
                "verdict",
            ],
            (
                [
                    *(name, split, *_cells(one, self._trace(one, probed[name, split]))),
                    *(
                        _preconditioned_cells(preconditioned.get((name, split)))
                        if self.adam
                        else ()
                    ),
                    one.verdict,
                ]
                for name, split, one in points
            ),
        )
        used = self.spectra.provenance
        summary: CheckSummary = {
            **self.origin(),
            "tables": list(more),
            "tolerance": self.tolerance,
            "learning_rate": self.learning_rate,
            "momentum": self.momentum,
            "threshold": self.threshold,
            "optimizer": "adam" if self.adam else None,
            "preconditioners": list(self.adam.states) if self.adam else [],
            "operator": used["operator"],
            "probes": used["probes"],
            # A probe of n parameters takes no more than n steps.
            "lanczos": self._spectra.estimator.kept[1] if self.spectra.density else None,
            **counted(objective, {name: len(s) for name, s in objective.splits.items()}),
            "splits": {
                name: {
                    "points": [
                        {
                            "checkpoint": checkpoint,
                            "split": split,
                            **one.summary(),
                            "density": probed[checkpoint, split].summary()
                            if self.spectra.density
                            else None,
                            "preconditioned_lambda_max_converged": found.converged
                            if (found := preconditioned.get((checkpoint, split)))
                            else None,
                        }
                        for checkpoint, split, one in points
                        if split == name
                    ]
                }
                for name in objective.splits
            },
            "escape": escape,
            "notes": [
                *general_notes(self),
                *spectral_notes(self),
                *check_notes(self, functions, list(analyses.values())),
                *self._spectra.notes([*probed.values()]),
                *(self.adam.notes(preconditioned) if self.adam else ()),
            ],
            "seconds": seconds,
        }
        return Result(table, summary, COMMANDS[self.command].draw, more)

    @cached_property
    def _test(self) -> CriticalPointTest:
        return CriticalPointTest(
            self.problem.objective,
            self.moving,
            self.tolerance,
            self.eigenvalues,
            self.problem.settings.seed,
        )

    @cached_property
    def _spectra(self) -> Spectra:
        blocks = blocks_among(self.problem.objective, self.moving)
        return Spectra.of(self.spectra, blocks, self._test)

    def _analyse_all(
        self, execution: Execution
    ) -> tuple[
        dict[tuple[int, str], Arrays],
        dict[tuple[str, str], ProbedPoint],
        dict[tuple[str, str], PreconditionedEigenvalue],
    ]:
        """Analyses all checkpoints on all splits.

        One rank searches for the eigenvalues of a checkpoint on a split, since each product needs
        the one before. Probes and blocks are tasks of their own; all ranks evaluate the escape.

        Returns:
            The record of each `PointAnalysis`; what probes and blocks show, and the preconditioned
            eigenvalues, by the name of the checkpoint and split.
        """
        objective, spectra, adam = self.problem.objective, self._spectra, self.adam
        names, splits = self.problem.names, objective.splits
        parts: list[Part | None] = [None, *([ADAM] if adam else []), *spectra.parts]
        lengths = [
            EXPECTED_PRODUCTS if part in {None, ADAM} else spectra.length(part) for part in parts
        ]
        # The last checkpoint comes first: of saddles, the escape from the last one is shown.
        pieces = [
            (t, split, part, float(length * len(splits[split])))
            for t in range(len(names))[::-1]
            for split in splits
            for part, length in zip(parts, lengths, strict=True)
            if part != ADAM or (adam and adam.exists(t))
        ]
        if execution.size > 1:
            # The longest first, so that no rank ends with one of these while the others wait.
            pieces.sort(key=lambda piece: -piece[3])
        # Progress counts checkpoints.
        unit = sum(length for *_, length in pieces) / len(names)
        pieces = [(t, split, part, length / unit) for t, split, part, length in pieces]
        placed = lru_cache(maxsize=1)(self.problem.placed)
        records: dict[tuple[int, str], Arrays] = {}
        probed: dict[tuple[int, str], dict[Part, Arrays]] = {}
        preconditioned: dict[tuple[str, str], PreconditionedEigenvalue] = {}

        def key(t: int, split: str, part: Part | None) -> str:
            numbers = [list(self.moving), self._test.seed]
            own: list[Any]
            if part is None:
                kind, own = "check", [self.eigenvalues, self.tolerance]
            elif part == ADAM:
                kind, own = "adam", [adam.digests[t] if adam else ""]
            else:
                kind, own = "spectra", spectra.numbers(part)
            examples = {split: splits[split]}
            return record_key(objective, examples, kind, [placed(t)], [*numbers, *own])

        def evaluate(t: int, split: str, part: Part | None, size: float, own: Execution) -> Arrays:
            if adam and part == ADAM:
                return adam.evaluate(t, self._test, placed(t), split, own)
            if part is not None:
                return spectra.evaluate(part, placed(t), split, size, own)
            kept = self._verdicts_to_escape(t, split, records)
            records[t, split] = self._test.analyse(placed(t), split, kept, own.scaled(size))
            return records[t, split]

        def task(t: int, split: str, part: Part | None, size: float) -> Task:
            own = execution.key(partial(key, t, split, part))
            return Task(size, partial(evaluate, t, split, part, size), own, "")

        tasks = starmap(task, pieces)
        # The clock of the remaining time starts here.
        execution.report(0.0)
        for (t, split, part, _), arrays in zip(pieces, execution.run(tasks), strict=True):
            restore(objective, batch_size_of(arrays), arrays["idle"].tolist())
            if part is None:
                records[t, split] = arrays
            elif part == ADAM:
                found = PreconditionedEigenvalue.from_arrays(arrays)
                preconditioned[names[t], split] = found
            else:
                probed.setdefault((t, split), {})[part] = arrays
        points = {
            (name, split): spectra.point(probed.get((t, split), {}))
            for t, name in enumerate(names)
            for split in splits
        }
        return records, points, preconditioned

    def _trace(self, analysis: PointAnalysis, point: ProbedPoint) -> Sequence[Cell]:
        """Returns the trace of the chosen matrix and its standard error; None if unknown."""
        if analysis.shares and self.spectra.operator == "hessian":
            trace = analysis.shares[-1]
            # That of a whole Hessian is exact, if it is finite.
            return trace, 0.0 if math.isfinite(trace) else trace
        return point.trace if self._spectra.parts else (None, None)

    def _spectra_tables(self, probed: Mapping[tuple[str, str], ProbedPoint]) -> dict[str, Table]:
        """Makes the tables of the spectral density and of blocks that were asked for."""
        tables = {}
        if self.spectra.density:
            tables["density"] = Table.build(
                ["checkpoint", "split", "lambda", "density"],
                ([*point, *row] for point, one in probed.items() for row in one.density_rows()),
            )
        if self.spectra.blocks:
            tables["curvature"] = Table.build(
                [
                    *("checkpoint", "split", "block", "gradient_norm"),
                    *("lambda_max", "lambda_max_error", "trace", "trace_stderr"),
                ],
                ([*point, *row] for point, one in probed.items() for row in one.block_rows()),
            )
        return tables

    def _verdicts_to_escape(
        self, t: int, split: str, records: Mapping[tuple[int, str], Arrays]
    ) -> Collection[str]:
        """Returns the verdicts with which the direction out of a checkpoint is kept."""
        if split != next(iter(self.problem.objective.splits)):
            return ()
        if t == len(self.problem.names) - 1:
            return get_args(Verdict)
        later = (verdict_of(arrays) for (_, of), arrays in records.items() if of == split)
        # The direction has as many values as the network has weights.
        return () if "saddle" in later else ("saddle",)

    def _escape(
        self, t: int, split: str, analysis: PointAnalysis, direction: Weights, execution: Execution
    ) -> tuple[Escape, Table]:
        """Evaluates the most negative curvature both ways, as far as the loss falls and beyond."""
        objective = self.problem.objective
        splits = {split: objective.splits[split]}
        weights = recalibrated(objective, self.problem.placed(t))
        with objective.frozen_statistics():
            (plain,) = sweep_plain(objective, [weights], splits=splits, execution=execution)
            here = plain[split]
            search = LineSearch(objective, weights, self.moving, splits, here, execution)
            steps = [side["distance"] for side in analysis.evidence.sides or () if side]
            distances, found, lowest = search.curve(direction, steps)
        along, own = Estimate.of_evaluation(found), Estimate.of_evaluation(here)
        rows: list[list[Cell]] = [[x, *along.row(i, {})] for i, x in enumerate(distances)]
        rows.insert(len(rows) // 2, [0.0, *own.row(0, {})])
        no_step: Step = {"distance": 0.0, "loss": analysis.loss, "gain": 0.0, "gain_stderr": 0.0}
        escape: Escape = {
            "checkpoint": self.problem.names[t],
            "split": split,
            "eigenvalue": analysis.smallest.value,
            "slope": analysis.evidence.slope,
            **(lowest or no_step),
        }
        return escape, Table.build(["distance", "loss", "loss_stderr"], rows)


def _cells(analysis: PointAnalysis, trace: Sequence[Cell]) -> list[Cell]:
    """Returns the cells of a row between its split and its verdict."""
    positive, negative, undecided, _ = analysis.shares or (None, None, None, None)
    return [
        *(analysis.loss, analysis.gradient_norm),
        *(analysis.smallest.value, analysis.smallest.error),
        *(analysis.largest.value, analysis.largest.error),
        *(positive, positive, negative, undecided, *trace),
    ]


def _preconditioned_cells(found: PreconditionedEigenvalue | None) -> list[Cell]:
    return [found.value, found.error] if found else [None, None]
