"""The scheduler: recalls, evaluates and records the tasks of a study, on one or several ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from losscli.evaluation.ranks import Arrays

if TYPE_CHECKING:
    from losscli.evaluation.journal import Journal
    from losscli.evaluation.ranks import Ranks

__all__ = ["ALONE", "Execution", "Task"]

_T = TypeVar("_T")


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Task:
    """A computation with arrays as its result.

    Attributes:
        size: Its size in the unit of progress.
        evaluate: Computes the arrays. Its argument is the execution for tasks within this one, with
            progress from 0 to ``size``.
        key: The key of a group of records, see `Execution.key`; None if nothing is recorded.
        part: Identifies the record of this task in the group.
        known: The arrays if the caller has recalled them already.
    """

    size: float
    evaluate: Callable[[Execution], Arrays]
    key: str | None
    part: object
    known: Arrays | None = None


@dataclass(frozen=True)
class Execution:
    """How tasks are executed: their progress, their journal and their ranks.

    Attributes:
        progress: Called with the amount done so far.
        journal: Records finished tasks, which are then recalled instead of evaluated. Of several
            ranks, only rank 0 has one.
        ranks: The processes that share the tasks; None for a single process.
        poll: To be called in long computations that report no progress; raises if another rank has
            failed.
    """

    progress: Callable[[float], None] | None = None
    journal: Journal | None = None
    ranks: Ranks | None = None
    poll: Callable[[], None] = _nothing

    @property
    def size(self) -> int:
        """The number of processes."""
        return 1 if self.ranks is None else self.ranks.size

    @property
    def quiet(self) -> Execution:
        """The same execution without progress."""
        return replace(self, progress=None)

    def after(self, done: float, most: float = math.inf) -> Execution:
        """Returns the execution for tasks that follow: progress starts at ``done``."""
        report = self.progress
        if report is None:
            return self
        return replace(self, progress=lambda x: report(done + min(x, most)))

    def scaled(self, size: float) -> Execution:
        """Returns the execution for a task that reports its progress as a share of its size."""
        report = self.progress
        if report is None:
            return self
        return replace(self, progress=lambda share: report(size * share))

    def report(self, done: float) -> None:
        """Reports the amount done so far."""
        if self.progress is not None:
            self.progress(done)

    def decide(self, value: _T) -> _T:
        """Lets rank 0 decide about a value of JSON types, so that all ranks do the same."""
        return value if self.ranks is None else self.ranks.decide(value)

    def gather(self, value: _T) -> list[_T]:
        """Gathers a value of JSON types from each rank, in rank order."""
        return [value] if self.ranks is None else self.ranks.gather(value)

    def key(self, make: Callable[[], str]) -> str | None:
        """Computes a key for records, a digest of all weights; None if nothing is recorded."""
        return None if self.journal is None else make()

    def recall(self, key: str | None, part: object) -> Arrays | None:
        """Returns the arrays of a record in the group of a key; None if there is no such record."""
        if self.journal is None or key is None:
            return None
        return self.journal.recall(f"{key} {part}")

    def run(self, tasks: Iterable[Task]) -> Iterator[Arrays]:
        """Recalls or evaluates tasks, and records those that were evaluated.

        A single process evaluates lazily, one task after the other. Several ranks take tasks
        whenever they are free, and yield when all are done.

        Yields:
            The arrays of each task, in the order of the tasks, the same on all ranks.
        """
        if self.ranks is not None:
            yield from self._distribute(self.ranks, list(tasks))
            return
        done = 0.0
        for task in tasks:
            arrays = self._recall(task)
            if arrays is None:
                arrays = task.evaluate(self.after(done, task.size))
                self._record(task, arrays)
            done += task.size
            self.report(done)
            yield arrays

    def _distribute(self, ranks: Ranks, tasks: Sequence[Task]) -> list[Arrays]:
        recalled = ((i, self._recall(task)) for i, task in enumerate(tasks))
        return ranks.distribute(
            [task.size for task in tasks],
            # Tasks within a task run on one rank; rank 0 records the results.
            lambda i, report: tasks[i].evaluate(Execution(report, poll=ranks.poll)),
            known={i: arrays for i, arrays in recalled if arrays is not None},
            on_result=lambda i, arrays: self._record(tasks[i], arrays),
            progress=self.progress,
        )

    def _recall(self, task: Task) -> Arrays | None:
        known = self.recall(task.key, task.part) if task.known is None else task.known
        if known is not None and self.journal is not None and self.progress is not None:
            # Recalling takes no time, which the estimate of the remaining time has to know.
            self.journal.recalled += task.size
        return known

    def _record(self, task: Task, arrays: Arrays) -> None:
        if self.journal is not None and task.key is not None:
            self.journal.record(f"{task.key} {task.part}", arrays)


ALONE = Execution()
"""A single process without progress and journal."""
