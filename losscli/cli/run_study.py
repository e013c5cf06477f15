"""Carrying out a study: plan, run, tell and write, the same for every command."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from losscli.cli import report
from losscli.cli.console import Console, stdin
from losscli.cli.options import Write
from losscli.errors import ChangedError, UsageError
from losscli.evaluation.ranks import Ranks, current, decided
from losscli.results import Result, need_few, to_json

if TYPE_CHECKING:
    from losscli.evaluation.journal import Journal
    from losscli.studies.base import Study

__all__ = ["carry_out", "names_of"]

_TOLD: Mapping[str, Callable[[Result], str]] = {
    "interpolate": lambda result: report.interpolation(result.summary),
    "trajectory": lambda result: report.trajectory(result.summary),
    "plane": lambda result: report.plane(result.summary),
    "barriers": lambda result: report.barriers(result.summary),
    "check": lambda result: report.check(result.summary, result.table.records()),
}

# Conditions in the fingerprint of a study that are of the machine.
_OWN = frozenset({
    "Python", "the device", "the number of threads", "what the model makes of a first batch",
})  # fmt: skip


def carry_out(
    command: str, names: Sequence[str], plan: Callable[[], Study], write: Write, console: Console
) -> None:
    """Carries out a study.

    Args:
        command: The command.
        names: The checkpoints, for the default stem.
        plan: Plans the study.
        write: Where its result goes.
        console: The streams.
    """
    ranks = current()
    if ranks is not None and not ranks.leads:
        _help(ranks, plan, write, console)
        return
    # A long path is named after its ends.
    output = write.plan(command, names if len(names) <= 3 else [names[0], names[-1]])
    with console.guard_stdout():
        study = plan()
    if output is not None and output.figures:
        objective = study.problem.objective
        need_few(
            "" if study.options.get("layerwise") else command,
            len(objective.splits),
            len(objective.metrics),
            "Choose fewer by --split and --metric, or give --no-figure",
        )
    if write.dry_run:
        from losscli.studies import dry_run

        with console.guard_stdout():
            estimate = dry_run.estimate(study)
        for note in study.problem.notes:
            console.note(note)
        # The batch that fits is known by now.
        description = {**dry_run.describe(study), "estimate": estimate}
        told = f"{to_json(description, indent=None)}\n" if write.json else report.plan(description)
        console.result(told)
        return
    if ranks is not None:
        with console.guard_stdout():
            ranks.agree(_alike(study))
    if output is None:
        console.result(_evaluate(study, console, None).table.to_csv())
        return
    output.guard(study.identity, study.tables)
    from losscli.evaluation.journal import Journal

    with console.guard_stdout():
        fingerprint = study.fingerprint
    output.make_folder()
    with (
        Journal.open(output.stem, fingerprint.identity, fingerprint.conditions) as journal,
        _keeping(journal, console),
    ):
        for note in _notes(journal):
            console.note(note)
        result = _evaluate(study, console, journal)
        files = output.write(result, log=write.log)
        console.written = True
        journal.finish()
    if write.json:
        console.result(f"{to_json(result.summary, indent=None)}\n")
    else:
        console.result(_TOLD[command](result))
    console.note(f"wrote {', '.join(map(str, files))}")


def _help(ranks: Ranks, plan: Callable[[], Study], write: Write, console: Console) -> None:
    """Does a rank's share of a study that rank 0 carries out."""
    with console.guard_stdout():
        study = plan()
        if write.dry_run:
            return
        ranks.agree(_alike(study))
        try:
            study.run()
        except ChangedError as error:
            ranks.fail(str(error), changed=True)
            raise


def _alike(study: Study) -> dict[str, str]:
    """What has to be the same for all ranks, whatever machines they are on."""
    conditions = study.fingerprint.conditions
    return {name: json.dumps(value) for name, value in conditions.items() if name not in _OWN}


def _evaluate(study: Study, console: Console, journal: Journal | None) -> Result:
    """Runs a study, and tells its notes."""
    with (
        console.guard_stdout(),
        console.progress(
            study.steps, study.unit, lambda: 0.0 if journal is None else journal.skipped
        ) as tell,
    ):
        result = study.run(tell, journal)
    for note in result.summary["notes"]:
        console.note(note)
    return result


@contextmanager
def _keeping(journal: Journal, console: Console) -> Iterator[None]:
    """Remembers, where a run ends too early, that what it has finished is kept."""
    try:
        yield
    except ChangedError:
        # What was finished may be of what the files were for a moment.
        journal.finish()
        raise
    except BaseException:
        console.kept = journal.path if len(journal) else None
        raise


def _notes(journal: Journal) -> Iterator[str]:
    """Tells what a run finds in its journal."""
    if journal.anew is not None:
        yield f"begins anew, and not where {journal.path} ends: {journal.anew}"
    elif len(journal):
        changes = "; ".join(journal.changes)
        but = f", though {changes}: the last digits may be others" if changes else ""
        yield f"goes on where {journal.path} ends{but}"
    if journal.cut:
        yield f"{journal.path}: a record that was not written to its end is left out"
    if not journal.locked:
        yield (
            f"the file system of {journal.path} has no locks: see that no other run writes the "
            "same results"
        )


def names_of(arguments: Sequence[str]) -> list[str]:
    """Lists the names that arguments stand for.

    Args:
        arguments: Names; ``-`` for names on stdin, one per line.

    Returns:
        The names in their order.

    Raises:
        UsageError: stdin is named twice, or a name is empty.
    """
    if list(arguments).count("-") > 1:
        raise UsageError("stdin can be read only once", "Give - once")
    names: list[str] = []
    for argument in arguments:
        if argument == "-":
            ranks = current()
            own = b"" if ranks is not None and not ranks.leads else stdin()
            text = decided(own.decode("utf-8-sig", "surrogateescape"))
            # Only at the ends of lines: a name may hold what Python else takes for one.
            lines = text.replace("\r\n", "\n").split("\n")
            names += [line for line in lines if line.strip()]
        else:
            if not argument:
                raise UsageError("the name of a checkpoint is empty", "Is a shell variable unset?")
            names.append(argument)
    return names
