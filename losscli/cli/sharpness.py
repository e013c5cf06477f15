"""``losscli sharpness``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from losscli.cli.console import Console
from losscli.cli.options import KeepOrder, Write, argument, option, with_study_options
from losscli.cli.report import (
    format_examples,
    format_loss,
    format_moving,
    format_number,
    format_with_error,
    is_finite,
    task_lines,
)
from losscli.cli.run_study import expand_names, run_study
from losscli.errors import UsageError, printable
from losscli.results.result import Result
from losscli.results.summaries import SharpnessPoint, SharpnessSummary
from losscli.settings import Settings
from losscli.wording import format_count

if TYPE_CHECKING:
    from losscli.studies.base import Study

__all__ = ["report", "sharpness"]

_PANEL = "What is measured"


@with_study_options
def sharpness(
    checkpoints: Annotated[
        list[str],
        argument("One or more, in the order of training; a folder of them; - for names on stdin."),
    ],
    settings: Settings,
    write: Write,
    console: Console,
    rho: Annotated[
        list[float] | None,
        option(
            _PANEL,
            "Repeatable. The radius of the perturbations. Default: 0.05.",
            "--rho",
            metavar="X",
        ),
    ] = None,
    adaptive: Annotated[
        bool,
        option(
            _PANEL,
            "Scale perturbations by |θ| elementwise: adaptive average and worst-case "
            "sharpness, and ASAM. Critical sharpness stays the same.",
            "--adaptive",
        ),
    ] = False,
    samples: Annotated[
        int,
        option(
            _PANEL,
            "The number of random perturbations of average sharpness, the same draws for "
            "every checkpoint.",
            "--samples",
            metavar="N",
        ),
    ] = 20,
    direction_split: Annotated[
        list[str] | None,
        option(
            _PANEL,
            "Take critical steps along the gradient of this split for all splits: relative "
            "critical sharpness.",
            "--direction-split",
            metavar="NAME",
        ),
    ] = None,
    keep_order: KeepOrder = False,
) -> None:
    """Measure how sharp the loss is at each checkpoint.

    Measures how much the loss rises within a radius ρ: average sharpness over random perturbations,
    worst-case sharpness by gradient ascent in the ball (a lower bound), and SAM sharpness along the
    gradient. Critical sharpness is 2/η with the smallest step η along the negative gradient that
    was found to raise the loss. Worst-case sharpness takes about 20 gradients for each ρ, the
    others one gradient and forward passes.
    """

    def plan() -> Study:
        from losscli.studies.sharpness import Sharpness

        return Sharpness.plan(
            names,
            settings,
            rho=rho or [0.05],
            adaptive=adaptive,
            samples=samples,
            direction_split=direction_split[0] if direction_split else None,
            keep_order=keep_order,
            ranks=console.ranks,
        )

    if direction_split and len(direction_split) > 1:
        raise UsageError(
            f"--direction-split is given {len(direction_split)} times",
            "Give one split: all critical steps are along its gradient",
        )
    names = expand_names(checkpoints, console.ranks)
    run_study("sharpness", checkpoints, plan, write, console)


def report(result: Result[SharpnessSummary]) -> str:
    """Returns lines of text that describe the sharpness of checkpoints."""
    summary = result.summary
    rows: list[dict[str, Any]] = result.table.records()
    scaled = ", scaled by |θ| elementwise" if summary["adaptive"] else ""
    lines = [
        *task_lines(summary, 16, metrics=False),
        f"{'radius ρ':<16}{', '.join(f'{radius:g}' for radius in summary['rho'])}{scaled}",
        f"{'θ':<16}{format_moving(summary)}",
    ]
    for name, split in summary["splits"].items():
        lines += ["", f"{printable(name)}, {format_examples(summary, name)}"]
        for point in split["points"]:
            checkpoint = point["checkpoint"]
            lines.append(f"  {printable(checkpoint)}")
            own = [r for r in rows if (r["checkpoint"], r["split"]) == (checkpoint, name)]
            lines += [f"    {label:<14}{text}" for label, text in _findings(point, own, summary)]
    return "\n".join(lines) + "\n"


def _findings(
    point: SharpnessPoint, rows: Sequence[Mapping[str, Any]], summary: SharpnessSummary
) -> Iterator[tuple[str, str]]:
    """Describes one checkpoint on one split."""
    yield "loss", format_loss(point["loss"], point["loss_seed_stderr"])
    yield "‖∇L‖", format_number(point["gradient_norm"])
    draws = format_count(summary["samples"], "draw")
    for row in rows:
        at = f" at ρ = {row['rho']:g}" if len(rows) > 1 else ""
        yield "average", f"{_rise(row, 'average')}{at}, {draws}"
        yield "worst-case", f"at least {_rise(row, 'worst')}{at}"
        if row["sam"] is not None:
            yield "SAM", f"{_rise(row, 'sam')}{at}"
    (row, *_) = rows
    if (critical := row["critical_sharpness"]) is None:
        yield "critical", f"not known: {point['critical_reason']}"
    elif not is_finite(critical):
        yield "critical", "inf: the loss rises at once"
    else:
        value = format_with_error(critical, point["critical_sharpness_error"])
        step = format_number(row["critical_step"])
        yield "critical", f"{value}: the smallest step found that raises the loss is {step}"


def _rise(row: Mapping[str, Any], column: str) -> str:
    """Returns a rise of the loss with its standard error."""
    return format_with_error(row[column], row[f"{column}_stderr"])
