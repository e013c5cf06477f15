"""``losscli soup``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from losscli.cli.console import Console
from losscli.cli.imports import importing
from losscli.cli.options import Write, argument, option, with_study_options
from losscli.cli.report import (
    align_columns,
    format_examples,
    format_number,
    format_with_error,
    mark_insignificant,
    task_lines,
)
from losscli.cli.run_study import run_study
from losscli.errors import UsageError, printable
from losscli.results.result import Result, check_writable
from losscli.results.summaries import SoupSummary
from losscli.settings import Settings
from losscli.wording import format_count

if TYPE_CHECKING:
    from losscli.studies.base import Study

__all__ = ["report", "soup"]


@with_study_options
def soup(
    checkpoints: Annotated[list[str], argument("Two or more, or a folder of them.")],
    settings: Settings,
    write: Write,
    console: Console,
    greedy: Annotated[
        str | None,
        option(
            "The search",
            "Add the checkpoints in the order of their scores on this split, and keep each one "
            "that does not lower the score of the average. The score is the first --metric "
            "(its negative, if its higher_is_better is False), else -loss.",
            "--greedy",
            metavar="SPLIT",
        ),
    ] = None,
) -> None:
    """Write the average of checkpoints, with the metadata of the first.

    Needs `-o X.safetensors`, or X.pt. Without --greedy it writes only this file, and needs a
    model and data only for options that use them, such as --buffers recalibrate. With --greedy it
    also writes X.csv with the steps of the search, X.json and a figure.
    """
    if write.out is None or write.to_stdout:
        raise UsageError("soup needs a file to write", "Give -o X.safetensors")
    out = Path(write.out)
    check_writable(out, force=True)
    if greedy is not None:

        def plan() -> Study:
            from losscli.studies.soup import Soup

            return Soup.plan(checkpoints, settings, greedy=greedy)

        run_study("soup", checkpoints, plan, write, console, checkpoint=out)
        return
    options = {
        "--figure": write.figure,
        "--no-figure": write.no_figure,
        "--json": write.json,
        "--dry-run": write.dry_run,
        **{f"--{name}": True for name in write.drawing.stored},
    }
    if given := [name for name, value in options.items() if value]:
        raise UsageError(f"{given[0]} has no effect without --greedy", "Leave it out")
    check_writable(out, force=write.force)
    with importing("torch"):
        from losscli.checkpoint import expand_folders
        from losscli.studies.inputs import protect_inputs
        from losscli.studies.soup import needs_model
        from losscli.studies.soup import soup as study

    protect_inputs([out], expand_folders(checkpoints), settings if needs_model(settings) else None)
    with console.guard_stdout():
        checkpoint = study(checkpoints, **asdict(settings))
    checkpoint.save(out, force=True)
    console.written = True
    console.result(f"{out}\n")
    statistics = any(name.rpartition(".")[2] == "running_mean" for name in checkpoint.weights)
    if statistics and settings.buffers == "interpolate":
        console.note(
            "BatchNorm's statistics are averages; --buffers recalibrate re-estimates them, with "
            "a model and data"
        )


def report(result: Result[SoupSummary]) -> str:
    """Returns lines of text that describe the result of a greedy search."""
    summary = result.summary
    ((name, split),) = summary["splits"].items()
    lines = [
        *task_lines(summary, 9, metrics=split["score"].endswith(tuple(summary["metrics"]))),
        printable(f"score    {split['score']} on {name}, {format_examples(summary, name)}"),
        "",
    ]
    cells = [["step", "checkpoint", "kept", "score of the average", "± of the change"]]
    for row in result.table.records():
        error = row["score_stderr"]
        cells.append([
            str(row["step"]),
            printable(str(row["checkpoint"])),
            "yes" if row["kept"] else "no",
            format_number(float(str(row["score"]))),
            format_number(error, 2) if isinstance(error, float) else "",
        ])
    lines += align_columns(cells, left={1, 2})
    kept = f"{len(split['kept'])} of {format_count(len(split['checkpoints']), 'checkpoint')} kept"
    change = format_with_error(split["gain"], split["gain_stderr"])
    score = format_number(split["soup"])
    above = f"{change} above the best checkpoint"
    if len(split["kept"]) > 1:
        above += mark_insignificant(split["gain"], split["gain_stderr"])
    lines += ["", f"{kept}; score {score}, {above}"]
    return "\n".join(lines) + "\n"
