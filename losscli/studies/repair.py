"""``--repair``: points of a line, corrected by REPAIR, which are then evaluated plainly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from losscli.errors import ModelError, UsageError
from losscli.evaluation.activations import Traces
from losscli.evaluation.cost import Timings
from losscli.evaluation.repair import Preactivations, Repair
from losscli.evaluation.tasks import Execution
from losscli.results.summaries import RepairSummary
from losscli.studies.problem import Points, Problem
from losscli.weight_space.slices import point_between
from losscli.weight_space.vectors import Weights

__all__ = ["RepairedLines"]


class RepairedLines:
    """Corrects points of the lines between the checkpoints of a problem.

    Args:
        problem: The checkpoints, with training examples.

    Raises:
        UsageError: Another option excludes it.
        ModelError: The model cannot be traced, or a layer cannot be corrected.
    """

    def __init__(self, problem: Problem) -> None:
        objective, settings, training = problem.objective, problem.settings, problem.training
        assert training is not None  # the problem was prepared with them
        for option, given in (
            ("--objective", objective.function is not None),
            ("--batch-loss", objective.batch_loss),
            ("--stochastic", settings.stochastic is not None),
            ("--sampling-error", settings.sampling_error is not None),
        ):
            if given:
                raise UsageError(
                    f"--repair is not available with {option}",
                    "Give one without the other",
                )
        if some := [name for name, tensor in objective.tensors.items() if tensor.is_complex()]:
            raise ModelError(
                f"--repair corrects real weights, and {some[0]} is complex", "Leave --repair out"
            )
        dtype = problem.working_type
        model = problem.model_to_trace().to(dtype).to(objective.device)
        self._training = training
        self._repair = Repair(objective, Traces(objective, model), dtype, training.examples)
        self._ends: dict[int, list[Preactivations]] = {}
        self._skipped = 0

    def passes(self, checkpoints: int, points: int) -> int:
        """Counts the passes over training examples: one per checkpoint, and per layer and point."""
        return checkpoints + points * len(self._repair.layers)

    def seconds(self, timings: Timings, checkpoints: int, points: int) -> float:
        """Estimates the time of these passes, each as long as a pass for losses."""
        passes = self.passes(checkpoints, points)
        return passes * len(self._training.examples) * timings.plain

    def points(
        self,
        ends: tuple[int, int],
        weights: Callable[[int], Weights],
        moving: Iterable[str],
        alphas: Sequence[float],
    ) -> Sequence[Weights]:
        """Corrects points lazily; none is kept in memory.

        Args:
            ends: The numbers of the two checkpoints of the line.
            weights: Returns all tensors of the checkpoint with a number.
            moving: The tensors that move.
            alphas: The points.

        Returns:
            All tensors of the corrected points.
        """
        moving = tuple(moving)

        def correct(alpha: float) -> Weights:
            a, b = (weights(t) for t in ends)
            statistics = [self._measure(t, at) for t, at in zip(ends, (a, b), strict=True)]
            point = point_between(a, b, moving, alpha)
            corrected, skipped = self._repair.correct(point, alpha, *statistics)
            self._skipped = max(self._skipped, skipped)
            return corrected

        return Points(correct, alphas)

    def _measure(self, t: int, weights: Weights) -> list[Preactivations]:
        if t not in self._ends:
            self._ends[t] = self._repair.measure(weights)
        return self._ends[t]

    def summary(self, execution: Execution) -> RepairSummary:
        """Describes what was corrected, over all ranks."""
        return {
            "split": self._training.name,
            "examples": self._training.examples.rows,
            "layers": len(self._repair.layers),
            "units": self._repair.units,
            "skipped_at_most": max(execution.gather(self._skipped)),
        }

    @property
    def notes(self) -> list[str]:
        """A note on training examples of another split."""
        return self._training.notes
