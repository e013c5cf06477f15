"""The base class of all studies: the problem, the moving tensors and the origin of the numbers."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from losscli.data import Examples, placing
from losscli.evaluation.cost import Clock, Timings
from losscli.evaluation.sampling import Estimate, Sampled, evaluate_until_precise
from losscli.evaluation.tasks import ALONE, Execution
from losscli.progress import report_to
from losscli.results.result import Result
from losscli.results.summaries import CostEstimate, Description, Origin, Seconds
from losscli.settings import Progress
from losscli.studies.fingerprint import Fingerprint, fingerprint_of, identity_of
from losscli.studies.problem import Problem
from losscli.table import Cell, Table
from losscli.weight_space.slices import Line, Slice
from losscli.weight_space.vectors import Weights, dimension, to_device

__all__ = ["Study"]


@dataclass(frozen=True)
class Study(ABC):
    """A study that is ready to run: everything is loaded and checked, nothing is evaluated.

    The class method ``plan`` of each study takes the names of the checkpoints, the settings, the
    arguments of its public function, and ``ranks``: the processes that share the run, if there are
    several. It raises `LosscliError` if something is missing, broken or does not fit.

    Attributes:
        problem: The checkpoints, the model and the data.
        moving: The names of the tensors that move.
        begun: When planning began, by `time.perf_counter`.
    """

    command: ClassVar[str]

    problem: Problem
    moving: tuple[str, ...]
    begun: float

    @property
    def counted(self) -> tuple[str, ...]:
        """The parameters that move: every norm, distance, projection and angle is over these."""
        return self.problem.parameters(self.moving)

    @property
    def unit(self) -> str:
        """What a run evaluates, in the plural."""
        return "points"

    @property
    @abstractmethod
    def options(self) -> dict[str, Any]:
        """The options of the command itself, for the identity of the run."""

    @property
    def has_path(self) -> bool:
        """Whether there is a path to animate, if the command has an animation."""
        return True

    @property
    def has_surface(self) -> bool:
        """Whether there is a surface, if the command may have one."""
        return True

    @property
    def inputs(self) -> Sequence[str]:
        """The names of the checkpoints that it reads."""
        return self.problem.names

    @property
    def checkpoint_suffixes(self) -> Sequence[str]:
        """The ends of the names, after STEM, of the files of checkpoints that a run makes."""
        return ()

    @property
    def identity(self) -> str:
        """A digest of everything that the command line determines: equal for two equal runs."""
        return identity_of(self.command, self.problem, self.options)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """What the numbers of a run depend on; for that, a first batch is evaluated."""
        return fingerprint_of(self.command, self.problem, self.options)

    @property
    @abstractmethod
    def slices(self) -> tuple[int, int]:
        """The number of slices that are swept, and of points in each."""

    @property
    @abstractmethod
    def evaluations(self) -> int:
        """How many points a run evaluates."""

    @property
    def steps(self) -> int:
        """The total of the progress, as far as it is known."""
        return self.evaluations

    @abstractmethod
    def run(self, execution: Execution = ALONE) -> Result[Any]:
        """Evaluates.

        Args:
            execution: How its tasks are executed. A journal is opened with this study's
                `fingerprint`.

        Returns:
            The result.

        Raises:
            LosscliError: The model or the loss fails on the data, gives different numbers for one
                point, or does not fit into memory.
        """

    def evaluate(
        self,
        evaluate: Callable[[Mapping[str, Examples], Execution], Mapping[str, Sampled]],
        execution: Execution,
    ) -> dict[str, Sampled]:
        """Evaluates whole splits, or as many of their examples as ``--sampling-error`` needs.

        Args:
            evaluate: Evaluates the given splits.
            execution: How that is executed.

        Returns:
            The result on each split.
        """
        splits, settings = self.problem.objective.splits, self.problem.settings
        tolerance, seed = settings.sampling_error, settings.seed
        return evaluate_until_precise(splits, tolerance, seed, evaluate, execution)

    @property
    def sampled(self) -> list[str]:
        """The column with the number of examples, if there is ``--sampling-error``."""
        return [] if self.problem.settings.sampling_error is None else ["examples"]

    def loss_table(
        self, columns: Sequence[str], rows: Iterable[tuple[Sequence[Cell], Estimate, int]]
    ) -> Table:
        """Makes a table of losses, with their standard errors and metrics.

        Args:
            columns: The columns that identify a loss.
            rows: For each loss the cells of these columns, the losses, and its index among them.

        Returns:
            The table.
        """
        metrics, sampled = self.problem.objective.columns, self.sampled
        return Table.build(
            [*columns, "loss", "loss_stderr", *metrics, *sampled],
            (
                [*cells, *losses.row(i, metrics), *(losses.examples for _ in sampled)]
                for cells, losses, i in rows
            ),
        )

    def run_alone(self, progress: Progress) -> Result[Any]:
        """Evaluates in this process, without a journal.

        Args:
            progress: Whether to show the progress, or what to call with it.

        Returns:
            The result.
        """
        with report_to(progress, self.steps, self.unit) as report:
            return self.run(Execution(report))

    def sample(self, number: int) -> tuple[Slice, Sequence[Sequence[float]]]:
        """Returns a slice like those that are swept, and ``number`` points of it."""
        first, last = self.problem.origin, self.problem.place(self.problem.last.weights)
        line = Line(self.on_device(first), self.on_device(last))
        return line, [((i + 0.5) / number,) for i in range(number)]

    @property
    def swept(self) -> int:
        """How many points are evaluated by sweeps."""
        slices, points = self.slices
        return slices * points

    def extra_description(self, description: Description) -> Description:  # noqa: ARG002
        """Returns entries of the description that replace or extend those of every study."""
        return {}

    def extra_cost(self, timings: Timings, clock: Clock, seconds: float) -> CostEstimate:  # noqa: ARG002
        """Returns entries of the cost estimate that replace or extend those of every study.

        Args:
            timings: How fast points are evaluated.
            clock: The clock.
            seconds: What the evaluation of all points takes.

        Returns:
            Entries of the estimate.
        """
        return {}

    def origin(self) -> Origin:
        """Returns the origin of the numbers.

        Returns:
            The first part of the summary.

        Raises:
            ChangedError: The file of a checkpoint was changed. It is memory-mapped, so the numbers
                may be those of a mixture of both.
        """
        self.problem.unchanged()
        counted, left_out = self.counted, self.problem.objective.left_out
        provenance = self.problem.provenance
        choice = self.problem.objective.first_choice
        strategy: Origin = {} if choice is None else {"strategy": choice}
        return {
            "command": self.command,
            "identity": self.identity,
            "drawing": {},
            **provenance,
            "metrics": [metric for metric in provenance["metrics"] if metric not in left_out],
            "moving": {
                "tensors": len(counted),
                "values": dimension(self.problem.first.weights, counted),
            },
            "moving_buffers": len(self.moving) - len(counted),
            **strategy,
        }

    def seconds(self, swept: float) -> Seconds:
        """Returns the seconds since evaluation began, at ``swept``, and since planning began."""
        now = time.perf_counter()
        return {"sweep": now - swept, "total": now - self.begun}

    def kept_values(self, end: str) -> tuple[str, str]:
        """Describes values that stay at the ``first`` or ``last`` checkpoint's, and the effect."""
        return f"the {end} checkpoint's", "the losses of the others are not those of their files"

    def weights(self, t: int) -> Weights:
        """Reads all tensors of the checkpoint with the number ``t`` in the order of the names."""
        return self.problem.open(t).weights

    def on_device(self, weights: Weights, names: Iterable[str] | None = None) -> Weights:
        """Copies tensors of a checkpoint to the device, by default those that move."""
        device = self.problem.objective.device
        with placing("the weights of a checkpoint", device):
            moved = self.moving if names is None else names
            return {name: to_device(weights[name], device) for name in moved}
