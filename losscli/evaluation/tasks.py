"""The scheduler: recalls, evaluates and records the tasks of a study, alone or among ranks."""

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
    """A piece of work that gives arrays.

    Attributes:
        size: How large it is, in the unit of progress.
        evaluate: Does the work. Its argument is the execution of what the task evaluates in turn;
            the progress of that is counted from 0 up to ``size``.
        key: Of the records that it belongs to, see `Execution.key`; None if nothing is recorded.
        part: Which of these records is its own.
        known: Its arrays, if the caller has recalled them already.
    """

    size: float
    evaluate: Callable[[Execution], Arrays]
    key: str | None
    part: object
    known: Arrays | None = None


@dataclass(frozen=True)
class Execution:
    """How tasks are executed: who is told of progress, what is recorded, who shares the work.

    Attributes:
        progress: Called with how much is done so far.
        journal: Where finished tasks are recorded, and recalled from instead of evaluated. Of
            several ranks, rank 0 alone has one.
        ranks: The processes that share the tasks; None if this process works alone.
        attend: To be called within long computations that tell no progress: it fails if another
            rank has failed.
    """

    progress: Callable[[float], None] | None = None
    journal: Journal | None = None
    ranks: Ranks | None = None
    attend: Callable[[], None] = _nothing

    @property
    def size(self) -> int:
        """The number of processes."""
        return 1 if self.ranks is None else self.ranks.size

    @property
    def quiet(self) -> Execution:
        """The same, for tasks that do not count as progress."""
        return replace(self, progress=None)

    def after(self, done: float, most: float = math.inf) -> Execution:
        """Shifts progress.

        Args:
            done: How much was done before.
            most: How much is done from here on, at most.

        Returns:
            The same, for tasks that come after ``done``.
        """
        tell = self.progress
        return self if tell is None else replace(self, progress=lambda x: tell(done + min(x, most)))

    def tell(self, done: float) -> None:
        """Tells progress.

        Args:
            done: How much is done so far.
        """
        if self.progress is not None:
            self.progress(done)

    def decide(self, value: _T) -> _T:
        """Leaves a decision to rank 0, so that all ranks do the same.

        Args:
            value: What this process would decide, of JSON's types.

        Returns:
            The decision.
        """
        return value if self.ranks is None else self.ranks.decide(value)

    def gather(self, value: _T) -> list[_T]:
        """Gathers a value from each rank.

        Args:
            value: That of this process, of JSON's types.

        Returns:
            The values in the order of the ranks.
        """
        return [value] if self.ranks is None else self.ranks.gather(value)

    def key(self, make: Callable[[], str]) -> str | None:
        """Makes a key for records.

        Args:
            make: Makes it; that takes a digest of all weights.

        Returns:
            The key; None where nothing is recorded.
        """
        return None if self.journal is None else make()

    def recall(self, key: str | None, part: object) -> Arrays | None:
        """Recalls a record.

        Args:
            key: Of the records that it belongs to.
            part: Which of them.

        Returns:
            Its arrays; None if there is no such record.
        """
        if self.journal is None or key is None:
            return None
        return self.journal.recall(f"{key} {part}")

    def run(self, tasks: Iterable[Task]) -> Iterator[Arrays]:
        """Recalls or evaluates tasks, and records those that were evaluated.

        A single process takes one task after the other, each when the one before has been yielded.
        Several ranks take the tasks as they come free, and yield when all tasks are done.

        Args:
            tasks: The tasks, the same on all ranks.

        Yields:
            The arrays of each task, in the order of the tasks, the same on all ranks.
        """
        if self.ranks is not None:
            yield from self._deal(self.ranks, list(tasks))
            return
        done = 0.0
        for task in tasks:
            arrays = self._recall(task)
            if arrays is None:
                arrays = task.evaluate(self.after(done, task.size))
                self._record(task, arrays)
            done += task.size
            self.tell(done)
            yield arrays

    def _deal(self, ranks: Ranks, tasks: Sequence[Task]) -> list[Arrays]:
        recalled = ((i, self._recall(task)) for i, task in enumerate(tasks))
        return ranks.deal(
            [task.size for task in tasks],
            # A rank does its tasks by itself, and rank 0 records them.
            lambda i, tell: tasks[i].evaluate(Execution(tell, attend=ranks.attend)),
            known={i: arrays for i, arrays in recalled if arrays is not None},
            found=lambda i, arrays: self._record(tasks[i], arrays),
            progress=self.progress,
        )

    def _recall(self, task: Task) -> Arrays | None:
        known = self.recall(task.key, task.part) if task.known is None else task.known
        if known is not None and self.journal is not None and self.progress is not None:
            # It took no time, which whoever estimates the time that is left has to know.
            self.journal.skipped += task.size
        return known

    def _record(self, task: Task, arrays: Arrays) -> None:
        if self.journal is not None and task.key is not None:
            self.journal.record(f"{task.key} {task.part}", arrays)


ALONE = Execution()
"""A single process that records nothing and tells nobody."""
