"""Plans, runs, reports and writes a study, for every command."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from losscli.cli import report
from losscli.cli.console import Console, stdin
from losscli.cli.imports import import_plotting, importing
from losscli.cli.options import Write
from losscli.errors import ChangedError, UsageError
from losscli.registry import COMMANDS, Command, load
from losscli.results.figures import check_panel_count, has_panels, notes_on_pages
from losscli.results.result import (
    Output,
    check_labels,
    check_writable,
    refuse_overwriting,
    to_json,
)
from losscli.results.summaries import Description

if TYPE_CHECKING:
    from losscli.evaluation.journal import Journal
    from losscli.evaluation.ranks import Ranks
    from losscli.studies.base import Study

__all__ = ["expand_names", "run_study"]

# Conditions in the fingerprint of a study that may differ between machines.
_MACHINE_CONDITIONS = frozenset({
    "Python", "the device", "the number of threads", "the losses of a first batch",
})  # fmt: skip


def run_study(
    name: str,
    names: Sequence[str],
    plan: Callable[[], Study],
    write: Write,
    console: Console,
    *,
    checkpoint: Path | None = None,
    inputs: Sequence[Path] = (),
) -> None:
    """Runs a study and writes its result.

    Args:
        name: The command.
        names: The checkpoints, for the default stem.
        plan: Plans the study.
        write: The output options.
        console: The streams.
        checkpoint: The file of the checkpoint that the result has; its name without the suffix is
            the stem.
        inputs: The files that it reads in addition to checkpoints and data.
    """
    ranks, command = console.ranks, COMMANDS[name]
    if ranks is not None and not ranks.is_leader:
        _run_follower(ranks, plan, write, console)
        return
    if checkpoint is not None:
        write = replace(write, out=str(checkpoint.with_suffix("")))
    # The default stem of a long path has only its first and last checkpoint.
    output = write.plan(name, names if len(names) <= 3 else [names[0], names[-1]])
    with importing("torch"):
        load(command.function)
    with console.guard_stdout():
        study = plan()
    _note_on_speed(study, console)
    check_labels(write.drawing.label, len(study.problem.names))
    if output is not None:
        _check_figures(output.figures, command, study)
        for note in notes_on_pages(output.figures, write.drawing):
            console.note(note)
    if write.dry_run:
        from losscli.studies import dry_run

        with console.guard_stdout():
            estimate = dry_run.estimate(study)
        for note in study.problem.notes:
            console.note(note)
        # Described last, since the estimate determines the batch size that fits.
        description: Description = {**dry_run.describe(study), "estimate": estimate}
        text = f"{to_json(description, indent=None)}\n" if write.json else report.plan(description)
        console.result(text)
        return
    if ranks is not None:
        with console.guard_stdout():
            ranks.check_same(_shared_conditions(study))
    if output is None:
        console.result(_evaluate(study, console, ranks, None).table.to_csv())
        return
    made = _check_files(study, write, output, checkpoint, inputs)
    from losscli.evaluation.journal import Journal

    with console.guard_stdout():
        fingerprint = study.fingerprint
    output.make_folder()
    with (
        Journal.open(output.stem, fingerprint.identity, fingerprint.conditions) as journal,
        _reporting_journal(journal, console),
    ):
        for note in _journal_notes(journal):
            console.note(note)
        result = _evaluate(study, console, ranks, journal)
        result = result.with_drawing(write.drawing)
        if output.figures:
            import_plotting()
        if checkpoint is not None:
            result.checkpoint.save(checkpoint, force=True)
        for path, point in zip(made, result.checkpoints.values(), strict=True):
            point.save(path, force=True)
        files = [*filter(None, [checkpoint]), *made, *output.save(result, write.drawing)]
        console.written = True
        journal.finish()
    if write.json:
        console.result(f"{to_json(result.summary, indent=None)}\n")
    else:
        console.result(command.as_text(result))
    console.note(f"wrote {', '.join(map(str, files))}")


def _check_files(
    study: Study,
    write: Write,
    output: Output,
    checkpoint: Path | None,
    inputs: Sequence[Path],
) -> list[Path]:
    """Checks that all files can be written; returns those of the checkpoints named after STEM."""
    from losscli.studies.inputs import protect_inputs
    from losscli.studies.verification import require_storable

    tables = COMMANDS[study.command].further_tables
    made = [Path(f"{output.stem}{suffix}") for suffix in study.checkpoint_suffixes]
    journal = Path(f"{output.stem}.journal")
    written = [*output.paths(tables), *made, *filter(None, [checkpoint]), journal]
    refuse_overwriting(written, [*inputs, *filter(None, [write.style])])
    protect_inputs(written, study.inputs, study.problem.settings)
    output.guard(study.identity, tables)
    for path in made if checkpoint is None else [checkpoint]:
        # An earlier run of the same command may have written it, and may have been killed then.
        again = output.is_of(study.identity) or journal.exists()
        check_writable(path, force=write.force or again)
    if checkpoint is not None:
        require_storable(study.problem, checkpoint)
    elif made:
        cure = f"Run losscli.{study.command} in Python, and save its checkpoints as .pt files"
        require_storable(study.problem, made[0], cure)
    return made


def _check_figures(figures: Sequence[Path], command: Command, study: Study) -> None:
    """Checks that a study has figures of these formats, and no more panels than they can show."""
    for path in figures:
        suffix = path.suffix.lower()
        command.check_format(suffix, has_path=study.has_path, has_surface=study.has_surface)
    if any(map(has_panels, figures)):
        objective = study.problem.objective
        check_panel_count(
            command.panels_with(["blocks"] if study.options.get("layerwise") else []),
            len(objective.splits),
            len(objective.metrics),
            "Choose fewer by --split and --metric, or give --no-figure",
        )


def _note_on_speed(study: Study, console: Console) -> None:
    """Prints a note on slow half precision. It is measured, so it is not part of the result."""
    from losscli.evaluation.device import half_precision_note

    objective = study.problem.objective
    if note := half_precision_note(objective.device, objective.dtype):
        console.note(note)


def _run_follower(ranks: Ranks, plan: Callable[[], Study], write: Write, console: Console) -> None:
    """Runs the share of a rank other than 0, which writes nothing."""
    from losscli.evaluation.tasks import Execution

    with console.guard_stdout():
        study = plan()
        if write.dry_run:
            return
        ranks.check_same(_shared_conditions(study))
        try:
            study.run(Execution(ranks=ranks))
        except ChangedError as error:
            ranks.fail(str(error), changed=True)
            raise


def _shared_conditions(study: Study) -> dict[str, str]:
    """Returns the conditions that must be equal on all ranks."""
    conditions = study.fingerprint.conditions
    return {
        name: json.dumps(value)
        for name, value in conditions.items()
        if name not in _MACHINE_CONDITIONS
    }


def _evaluate(study: Study, console: Console, ranks: Ranks | None, journal: Journal | None) -> Any:
    """Runs a study and shows its progress and notes."""
    from losscli.evaluation.tasks import Execution

    with (
        console.guard_stdout(),
        console.progress(
            study.steps, study.unit, lambda: 0.0 if journal is None else journal.recalled
        ) as update,
    ):
        result = study.run(Execution(update, journal, ranks))
    for note in result.summary["notes"]:
        console.note(note)
    return result


@contextmanager
def _reporting_journal(journal: Journal, console: Console) -> Iterator[None]:
    """Sets the journal of the console if the run ends early, for the error message."""
    try:
        yield
    except ChangedError:
        # The journal may have results of the changed files.
        journal.finish()
        raise
    except BaseException:
        console.journal = journal.path if len(journal) else None
        raise


def _journal_notes(journal: Journal) -> Iterator[str]:
    """Yields notes on the state of a journal when a run starts."""
    if journal.restart_reason is not None:
        yield f"starting over instead of resuming {journal.path}: {journal.restart_reason}"
    elif len(journal):
        changes = "; ".join(journal.changes)
        caveat = f", though {changes}: the last digits may differ" if changes else ""
        yield f"resuming from {journal.path}{caveat}"
    if journal.truncated:
        yield f"{journal.path}: an incomplete record is ignored"
    if not journal.locked:
        yield (
            f"the file system of {journal.path} has no locks: make sure that no other run writes "
            "the same results"
        )


def expand_names(arguments: Sequence[str], ranks: Ranks | None) -> list[str]:
    """Expands ``-`` in arguments to the names on stdin.

    Args:
        arguments: Names; ``-`` for names on stdin, one per line.
        ranks: The processes that share the run; only rank 0 reads stdin.

    Returns:
        The names in their order.

    Raises:
        UsageError: ``-`` is given twice, or a name is empty.
    """
    if list(arguments).count("-") > 1:
        raise UsageError("stdin can be read only once", "Give - once")
    names: list[str] = []
    for argument in arguments:
        if argument == "-":
            content = stdin() if ranks is None or ranks.is_leader else b""
            text = content.decode("utf-8-sig", "surrogateescape")
            text = text if ranks is None else ranks.decide(text)
            # Not splitlines(), which also splits at other characters that a name may contain.
            lines = text.replace("\r\n", "\n").split("\n")
            names += [line for line in lines if line.strip()]
        else:
            if not argument:
                raise UsageError("the name of a checkpoint is empty", "Is a shell variable unset?")
            names.append(argument)
    return names
