"""``losscli connect``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from losscli.cli.console import Console
from losscli.cli.options import Write, argument, option, with_study_options
from losscli.cli.report import (
    format_examples,
    format_height,
    format_moving,
    format_number,
    task_lines,
)
from losscli.cli.run_study import run_study
from losscli.errors import printable
from losscli.results.result import Result
from losscli.results.summaries import ConnectSplit, ConnectSummary, Height
from losscli.settings import Settings
from losscli.wording import format_count

if TYPE_CHECKING:
    from losscli.studies.base import Study

__all__ = ["connect", "report"]

_PATH = "The path"


@with_study_options
def connect(
    a: Annotated[str, argument("The checkpoint at t = 0.", metavar="A")],
    b: Annotated[str, argument("The checkpoint at t = 1.", metavar="B")],
    settings: Settings,
    write: Write,
    console: Console,
    kind: Annotated[
        Literal["bezier", "chain"],
        option(_PATH, "A Bézier curve, or a chain of straight lines through the bends.", "--kind"),
    ] = "bezier",
    bends: Annotated[
        int, option(_PATH, "Number of bends, which are trained.", "--bends", metavar="N")
    ] = 1,
    steps: Annotated[
        int,
        option(
            _PATH,
            "Training steps. A small network needs about 1,000; if the loss on the curve is still "
            "falling, give more.",
            "--steps",
            metavar="N",
        ),
    ] = 1000,
    learning_rate: Annotated[
        float, option(_PATH, "Learning rate of Adam.", "--learning-rate", metavar="RATE")
    ] = 0.01,
    minibatch: Annotated[
        int,
        option(
            _PATH,
            "Training examples per step, evaluated in parts if they do not fit into memory.",
            "--minibatch",
            metavar="N",
        ),
    ] = 256,
    points: Annotated[
        int,
        option(
            _PATH, "Number of values of t on the curve and on the line.", "--points", metavar="N"
        ),
    ] = 51,
    align: Annotated[
        bool,
        option(
            _PATH,
            "First permute B's units onto A's, as losscli align does; writes STEM.aligned"
            ".safetensors, which is then B.",
            "--align",
        ),
    ] = False,
    no_plane: Annotated[
        bool,
        option(_PATH, "Leave out the plane through A, the bend and B.", "--no-plane"),
    ] = False,
) -> None:
    """Train a path between two checkpoints on which the loss stays low.

    The path is a Bézier curve from A to B with a bend C, which is trained on the split train, or on
    the only split. Writes the loss on the curve and on the line, the plane through A, C and B, and
    the bend, STEM.bend-1.safetensors. BatchNorm's statistics are re-estimated at every point.
    """

    def plan() -> Study:
        from losscli.studies.connect import Connect

        return Connect.plan(
            a,
            b,
            settings,
            kind=kind,
            bends=bends,
            steps=steps,
            learning_rate=learning_rate,
            minibatch=minibatch,
            points=points,
            plane=not no_plane,
            align=align,
            ranks=console.ranks,
        )

    run_study("connect", [a, b], plan, write, console)


def report(result: Result[ConnectSummary]) -> str:
    """Returns lines of text that describe the result of connect."""
    summary = result.summary
    names = [printable(c["name"]) for c in summary["checkpoints"]]
    path, training = summary["path"], summary["training"]
    what = "Bézier curve" if path["kind"] == "bezier" else "chain of lines"
    longer = path["length"] / path["chord"]
    examples = format_count(training["examples"], "example")
    trained = (
        f"{format_count(training['steps'], 'step')} on {printable(training['split'])} "
        f"({examples}), mean loss of the last tenth {format_number(training['loss'])}"
    )
    lines = [
        *task_lines(summary, 9),
        *(f"{letter}        {name}" for letter, name in zip("AB", names, strict=True)),
        f"path     {what} with {format_count(path['bends'], 'bend')}, {longer:.3g} × ‖B − A‖ long",
        f"trained  {trained}",
        f"moving   {format_moving(summary)}",
    ]
    for name, split in summary["splits"].items():
        lines += ["", f"{printable(name)}, {format_examples(summary, name)}"]
        findings = [
            ("loss at A", format_number(split["curve"]["loss_a"])),
            ("loss at B", format_number(split["curve"]["loss_b"])),
            ("barrier, line", _barrier(split["line"]["barrier"], "α")),
            ("barrier, path", _barrier(split["curve"]["barrier"], "t")),
        ]
        findings.append(("found", _found(split, len(result.table.unique("t")))))
        lines += [f"  {label:<15}{text}" for label, text in findings]
    return "\n".join(lines) + "\n"


def _found(split: ConnectSplit, points: int) -> str:
    """Describes the highest loss on the path, if the path is better than the line."""
    highest, line, curve = split["highest"], split["line"]["barrier"], split["curve"]["barrier"]
    if highest is None:
        return "not known: a loss on the path is not finite"
    if line is None or curve is None:
        return "not known: no point between A and B was evaluated"
    if curve["height"] and curve["height"] >= line["height"]:
        return "no path with a lower barrier than the line"
    text = f"a path on which the loss stays at or below {format_number(highest['loss'])}"
    text += f" at {points:,} points"
    higher = max(split["curve"]["loss_a"], split["curve"]["loss_b"])
    if highest["t"] not in {0.0, 1.0} and highest["loss"] > higher:
        text += f", {format_number(highest['loss'] - higher, 3)} above the higher end"
    return text


def _barrier(barrier: Height | None, letter: str) -> str:
    if barrier is None:
        return "not known"
    if not barrier["height"]:
        return "none seen"
    return f"{format_height(barrier)} at {letter} = {barrier['alpha']:.4g}"
