"""The average of checkpoints, of all or of those that a greedy search keeps."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from losscli.checkpoint import Checkpoint, CheckpointLike, expand_folders, name_checkpoints
from losscli.errors import LossError, OutputError, UsageError
from losscli.evaluation.device import float32_precision
from losscli.evaluation.losses.built_in import function_of
from losscli.evaluation.losses.metrics import is_higher_better, perplexity
from losscli.evaluation.objective import Evaluation, recalibrated
from losscli.evaluation.spectral import normalise_stored
from losscli.evaluation.sweep import check, sweep_plain
from losscli.evaluation.tasks import ALONE, Execution
from losscli.progress import report_to
from losscli.registry import COMMANDS
from losscli.results.result import Result, check_writable, stem_of
from losscli.results.summaries import SoupSplit, SoupSummary
from losscli.settings import PathLike, Progress, Settings, checked
from losscli.studies.base import Study
from losscli.studies.checkpoints import require_distinct
from losscli.studies.export import average_checkpoints
from losscli.studies.notes import general_notes, integer_notes, storage_notes
from losscli.studies.problem import Problem, counted, prepare, unequal_names
from losscli.studies.verification import made_checkpoint, verify_fresh_model
from losscli.table import Table
from losscli.weight_space.averages import average
from losscli.weight_space.curve import standard_error
from losscli.weight_space.vectors import Weights

__all__ = ["Soup", "SoupResult", "needs_model", "soup"]


@dataclass(frozen=True, repr=False)
class SoupResult(Result[SoupSummary]):
    """The result of a greedy search.

    Attributes:
        checkpoint: The average of the checkpoints that were kept.
    """

    checkpoint: Checkpoint = field(kw_only=True)

    def save(
        self, stem: PathLike, *, suffix: str = ".safetensors", force: bool = False, **options: Any
    ) -> list[Path]:
        """Writes the checkpoint, STEM.safetensors, and what every result writes.

        Args:
            stem: STEM.
            suffix: ``.pt`` for a file that ``torch.save`` writes.
            force: Whether files may be overwritten.
            **options: Those of `Result.save`.

        Returns:
            The files.
        """
        path = stem_of(str(stem))
        file = path.with_name(path.name + suffix)
        check_writable(file, force=force)
        try:
            self.checkpoint.save(file, force=force)
            return [file, *super().save(stem, force=force, **options)]
        except (OutputError, UsageError):
            if not force:
                file.unlink(missing_ok=True)
            raise


@overload
def soup(
    names: CheckpointLike | Iterable[CheckpointLike], *, greedy: None = None, **settings: Any
) -> Checkpoint: ...
@overload
def soup(
    names: CheckpointLike | Iterable[CheckpointLike],
    *,
    greedy: str,
    progress: Progress = None,
    **settings: Any,
) -> SoupResult: ...
@checked(Settings)
def soup(
    names: CheckpointLike | Iterable[CheckpointLike],
    *,
    greedy: str | None = None,
    progress: Progress = None,
    **settings: Any,
) -> Checkpoint | SoupResult:
    """Averages checkpoints (Wortsman et al. 2022, arXiv 2203.05482).

    Sums are in float64 and converted once, a group of numbers at a time. Integer tensors, the
    extra state of modules and the metadata are those of the first checkpoint.

    Args:
        names: Two or more checkpoints, each once: files, ``FILE#KEY``, or a folder of them.
        greedy: A split. The checkpoints are added to the average in the order of their scores on
            it, and kept if the score of the average does not fall. The score is the first
            ``metric``, of which more is better unless its ``higher_is_better`` is False, else
            −loss; of a perplexity it is −log.
        progress: True shows a bar; a function is called with the number of points done so far.
        **settings: The attributes of `losscli.settings.Settings`: ``model``, ``data``, …. Without
            ``greedy`` and any of them, no model is needed.

    Returns:
        The average; with ``greedy`` a result with the average as its ``checkpoint``: its table has
        a row for each step of the search.

    Raises:
        LosscliError: Something is missing, broken or does not fit.
    """
    named, chosen = name_checkpoints(names), Settings(**settings)
    if greedy is not None:
        plan = Soup.plan(named, chosen, greedy=greedy)
        with report_to(progress, plan.steps, plan.unit) as report:
            return plan.run(Execution(report))
    if not needs_model(chosen):
        return average_checkpoints(_expand(named))
    problem = prepare(_expand(named), chosen)
    with float32_precision(tf32=chosen.tf32):
        return _checkpoint(problem, range(len(problem.names)))


def needs_model(settings: Settings) -> bool:
    """Returns whether a plain average needs a model and data, for an option about them."""
    # The environment may name a device, which needs no model.
    return replace(settings, device="auto") != Settings()


@dataclass(frozen=True)
class Soup(Study):
    """A greedy search that is ready to run.

    Attributes:
        split: The split with the scores.
        metric: The metric that is the score; empty for −loss.
    """

    command = "soup"

    split: str
    metric: str

    @classmethod
    def plan(cls, names: Sequence[str], settings: Settings, *, greedy: str) -> Soup:
        """Reads and matches everything, evaluates nothing. See `soup` for the arguments."""
        begun = time.perf_counter()
        for option, value in (
            ("split", settings.split),
            ("sampling-error", settings.sampling_error),
        ):
            if value:
                raise UsageError(
                    f"--greedy evaluates all examples of its split: --{option} has no effect",
                    "Leave it out",
                )
        names = _expand(names)
        problem = prepare(names, replace(settings, split=(greedy,)))
        objective, metric = problem.objective, ""
        if any(value != "none" for value in settings.metric):
            if objective.function is not None:
                raise UsageError(
                    "--greedy scores an --objective by its losses, not by a --metric",
                    "Leave --metric out",
                )
            metric = next(iter(objective.metrics))
            # Paired standard errors need the score of every example, which losses have.
            objective.loss = objective.metrics[metric]
        objective.metrics = {}
        states = (problem.open(t).weights for t, _ in enumerate(names))
        moving = unequal_names(problem.moving, states)
        return cls(problem, moving, begun, greedy, metric)

    @property
    def options(self) -> dict[str, Any]:
        """The split and the score."""
        return {"greedy": self.split, "metric": self.metric}

    @property
    def score(self) -> str:
        """The name of the score, with the sign that makes higher values better."""
        if not self.metric:
            return "−loss"
        metric = self.problem.objective.loss
        if is_higher_better(metric):
            return self.metric
        return f"−log {self.metric}" if function_of(metric) is perplexity else f"−{self.metric}"

    @property
    def slices(self) -> tuple[int, int]:
        """None: every average is loaded."""
        return 0, 0

    @property
    def evaluations(self) -> int:
        """How many points a run evaluates: each checkpoint, and an average for all but the best."""
        return 2 * len(self.problem.names) - 1

    def run(self, execution: Execution = ALONE) -> SoupResult:
        """Evaluates the checkpoints, then an average for each of them."""
        problem, objective = self.problem, self.problem.objective
        number = len(problem.names)
        placed = problem.places(range(number))
        with float32_precision(tf32=problem.settings.tf32):
            swept = time.perf_counter()
            check(objective, placed[0], placed[-1])
            verify_fresh_model(problem, placed[-1])
            evaluations = sweep_plain(objective, placed, execution=execution)
            own = [self._scores(found[self.split]) for found in evaluations]
            means = [float(scores.mean()) for scores in own]
            order = sorted(range(number), key=lambda t: (not math.isfinite(means[t]), -means[t], t))
            if not math.isfinite(means[order[0]]):
                raise LossError(
                    f"no checkpoint has a finite score on {self.split}",
                    "Look at them with losscli interpolate",
                )
            kept, best = [order[0]], own[order[0]]
            rows: list[list[Any]] = [[0, problem.names[order[0]], 1, means[order[0]], None]]
            weights_of = evaluations[0][self.split].weights
            shares = None if weights_of is None else weights_of.numpy()
            for step, t in enumerate(order[1:], start=1):
                candidate = _average(problem, [*kept, t])
                (found,) = sweep_plain(
                    objective, [candidate], execution=execution.after(number + step - 1)
                )
                scores = self._scores(found[self.split])
                # The comparison is false for a score that is not a number.
                keep = bool(scores.mean() >= best.mean())
                error = standard_error(scores - best, shares)
                rows.append([
                    *(step, problem.names[t], int(keep), float(scores.mean())),
                    error if math.isfinite(error) else None,
                ])
                if keep:
                    kept, best = [*kept, t], scores
            checkpoint = _checkpoint(problem, kept)
            seconds = self.seconds(swept)
        last = self.weights(number - 1)
        split: SoupSplit = {
            "score": self.score,
            "checkpoints": means,
            "kept": [problem.names[t] for t in kept],
            "soup": float(best.mean()),
            "gain": float((best - own[order[0]]).mean()),
            "gain_stderr": standard_error(best - own[order[0]], shares) if len(kept) > 1 else 0.0,
        }
        examples = {self.split: objective.splits[self.split].rows}
        summary: SoupSummary = {
            **self.origin(),
            "tables": [],
            **counted(objective, examples),
            "splits": {self.split: split},
            "notes": [
                *integer_notes(self, problem.place(last), last),
                *_batchnorm_notes(problem),
                *general_notes(self),
                *storage_notes(self),
            ],
            "seconds": seconds,
        }
        columns = COMMANDS[self.command].table.columns
        return SoupResult(
            Table.build(columns, rows),
            summary,
            COMMANDS[self.command].draw,
            checkpoint=checkpoint,
        )

    def _scores(self, evaluation: Evaluation) -> NDArray[np.float64]:
        """Returns the score of each example, ``[N]``; with weights, times w over the mean of w."""
        values: NDArray[np.float64] = evaluation.losses[0].double().numpy()
        higher = bool(self.metric) and is_higher_better(self.problem.objective.loss)
        return values if higher else -values


def _expand(names: Sequence[str]) -> list[str]:
    """Lists the checkpoints, with those in folders."""
    names = expand_folders(names)
    if len(names) < 2:
        raise UsageError(
            f"soup needs two checkpoints or more, and got {len(names)}",
            "Give a folder of them, or their names",
        )
    require_distinct(names, "; losscli export --weights gives them different weights")
    return names


def _average(problem: Problem, kept: Iterable[int]) -> Weights:
    """Averages checkpoints under the names of the model; what may not move is the origin's."""
    points = [partial(problem.placed, t) for t in kept]
    weights = average(points)
    return weights if len(points) == 1 else {**weights, **normalise_stored(weights)}


def _checkpoint(problem: Problem, kept: Sequence[int]) -> Checkpoint:
    """Makes the checkpoint of an average, with BatchNorm's statistics by ``--buffers``."""
    weights = recalibrated(problem.objective, _average(problem, kept))
    problem.unchanged()
    return made_checkpoint(problem, f"average of {len(kept)} checkpoints", weights)


def _batchnorm_notes(problem: Problem) -> list[str]:
    """Returns a note on averaged statistics of BatchNorm."""
    if not problem.objective.batchnorm or problem.settings.buffers != "interpolate":
        return []
    return ["BatchNorm's statistics are averages; --buffers recalibrate re-estimates them"]
