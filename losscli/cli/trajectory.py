"""``losscli trajectory``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from losscli.cli.console import Console
from losscli.cli.options import KeepOrder, Write, argument, option, with_study_options
from losscli.cli.report import (
    format_examples,
    format_moving,
    format_number,
    format_ties,
    task_lines,
)
from losscli.cli.run_study import expand_names, run_study
from losscli.errors import printable
from losscli.results.result import Result
from losscli.results.summaries import Farthest, LowestOnPath, TrajectorySummary
from losscli.settings import Settings
from losscli.wording import format_count

if TYPE_CHECKING:
    from losscli.studies.base import Study

__all__ = ["report", "trajectory"]

_PANEL = "The path"


@with_study_options
def trajectory(
    checkpoints: Annotated[
        list[str],
        argument(
            "Three or more in the order of training; a folder of them, in natural order; - "
            "for names on stdin, one per line."
        ),
    ],
    settings: Settings,
    write: Write,
    console: Console,
    residuals: Annotated[
        int,
        option(
            _PANEL,
            "Number of values of the residual at each step of the surface.",
            "--residuals",
            metavar="N",
        ),
    ] = 21,
    reach: Annotated[
        float,
        option(
            _PANEL,
            "How far the surface reaches, as a multiple of the largest residual.",
            "--reach",
            metavar="X",
        ),
    ] = 1.25,
    no_surface: Annotated[bool, option(_PANEL, "Leave out the surface.", "--no-surface")] = False,
    random_walk: Annotated[
        bool,
        option(
            _PANEL,
            "Also draw random walks with the same step lengths, to compare training with chance.",
            "--random-walk",
        ),
    ] = False,
    keep_order: KeepOrder = False,
) -> None:
    """Evaluate a training path relative to the straight line between its ends.

    For each checkpoint, writes the projection onto the line, the residual (the distance from the
    line) and the loss; STEM.surface.csv has the loss along each step's own residual direction.
    """

    def plan() -> Study:
        from losscli.studies.trajectory import Trajectory

        return Trajectory.plan(
            names,
            settings,
            surface=not no_surface,
            residuals=residuals,
            reach=reach,
            random_walk=random_walk,
            keep_order=keep_order,
            ranks=console.ranks,
        )

    names = expand_names(checkpoints, console.ranks)
    run_study("trajectory", checkpoints, plan, write, console)


def report(result: Result[TrajectorySummary]) -> str:
    """Returns lines of text that describe the result of a trajectory."""
    summary = result.summary
    names = [printable(c["name"]) for c in summary["checkpoints"]]
    path = summary["path"]
    length, walked, farthest = path["length"], path["walked"], path["farthest"]
    last = len(names) - 1
    back = path["steps_back"]
    off = farthest["residual"]
    line = f"‖d‖ = {length:.4g} over {format_moving(summary)}"
    walk = f"{format_count(last, 'step')}, {walked:.4g} long: {walked / length:.3g} times the line"
    far = f"r = {off:.4g}, {off / length:.2g} ‖d‖, at {_checkpoint(farthest, len(names))}"
    rows = [
        ("first", names[0]),
        ("last", names[-1]),
        ("straight line", line),
        ("path", walk),
        ("farthest off", f"{far}, where p = {farthest['projection']:.3g}"),
        (
            "projection",
            f"falls at {len(back)} of {format_count(last, 'step')}"
            if back
            else "rises at every step",
        ),
    ]
    if walks := summary["random_walks"]:
        ends, strays = walks["length"], walks["largest_residual"]
        rows.append((
            "random walks",
            f"end {ends:.4g} from the start and stray {strays:.4g} ({strays / ends:.2g} of that)",
        ))
    lines = [*task_lines(summary, 16), *(f"{label:<16}{text}" for label, text in rows)]
    for name, split in summary["splits"].items():
        lines += ["", f"{printable(name)}, {format_examples(summary, name)}"]
        findings = [
            ("loss, first", format_number(split["loss_first"])),
            ("loss, last", format_number(split["loss_last"])),
        ]
        lowest = split["lowest"]
        if lowest is None:
            findings.append(("lowest seen", "none: no checkpoint has a finite loss"))
        else:
            low = f"{format_number(lowest['loss'])} at {_checkpoint(lowest, len(names))}"
            findings.append(("lowest seen", low + format_ties(lowest["ties"])))
        rises = split["rises"]
        findings.append((
            "loss rises",
            f"at {rises} of {format_count(last, 'step')}" if rises else "at no step",
        ))
        point = split.get("surface_lowest")
        if point:
            where = f"p = {point['projection']:.3g}, residual {point['residual']:.3g}"
            low = f"lowest {format_number(point['loss'])} at {where}{format_ties(point['ties'])}"
            findings.append(("on the surface", low))
        lines += [f"  {label:<16}{text}" for label, text in findings]
    return "\n".join(lines) + "\n"


def _checkpoint(at: Farthest | LowestOnPath, number: int) -> str:
    """Returns the number of a checkpoint, from 1, and its name."""
    return f"checkpoint {at['step'] + 1} of {number} ({printable(at['checkpoint'])})"
