"""``losscli check``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from losscli.cli.console import Console
from losscli.cli.options import KeepOrder, Write, with_console, with_output, with_settings
from losscli.cli.report import format_count, format_number, is_finite, task_lines
from losscli.cli.run_study import expand_names, run_study
from losscli.errors import printable
from losscli.results import Result
from losscli.settings import Settings
from losscli.summaries import CheckSummary, Step

if TYPE_CHECKING:
    from losscli.studies.base import Study

__all__ = ["check", "report"]

_PANEL = "What is found"


@with_console
@with_output
@with_settings
def check(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CKPT",
            help="One or more, in the order of training; a folder of them; - for names on stdin.",
            show_default=False,
        ),
    ],
    settings: Settings,
    write: Write,
    console: Console,
    tolerance: Annotated[
        float,
        typer.Option(
            "--tolerance",
            metavar="X",
            help="The largest gradient norm of a critical point.",
            rich_help_panel=_PANEL,
        ),
    ] = 1e-3,
    eigenvalues: Annotated[
        int,
        typer.Option(
            "--eigenvalues",
            metavar="K",
            help="How many of the largest and of the smallest eigenvalues.",
            rich_help_panel=_PANEL,
        ),
    ] = 1,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate",
            metavar="X",
            help="Compare λ max with 2 / X, the limit of stable full-batch training.",
            rich_help_panel=_PANEL,
            show_default=False,
        ),
    ] = None,
    momentum: Annotated[
        float | None,
        typer.Option(
            "--momentum",
            metavar="X",
            help="That of training, with --learning-rate η: the limit is (2 + 2X) / η.",
            rich_help_panel=_PANEL,
            show_default=False,
        ),
    ] = None,
    keep_order: KeepOrder = False,
) -> None:
    """Is it a critical point at all, and a minimum or a saddle?

    The gradient norm over all examples, the largest and the smallest eigenvalue of the Hessian,
    each with its error, and a verdict that claims no more than these and the loss allow. Where the
    curvature is negative, the loss along that direction, both ways (STEM.escape.csv).
    """

    def plan() -> Study:
        from losscli.studies.check import Check

        return Check.plan(
            names,
            settings,
            tolerance=tolerance,
            eigenvalues=eigenvalues,
            learning_rate=learning_rate,
            keep_order=keep_order,
            momentum=momentum,
            ranks=console.ranks,
        )

    names = expand_names(checkpoints, console.ranks)
    run_study("check", checkpoints, plan, write, console)


def report(result: Result[CheckSummary]) -> str:
    """Describes the result of a check for critical points.

    Args:
        result: The result of a check.

    Returns:
        Lines of text.
    """
    summary = result.summary
    rows: list[dict[str, Any]] = result.table.records()
    moving, tolerance = summary["moving"], summary["tolerance"]
    lines = [
        *task_lines(summary, 16, metrics=False),
        f"critical        where ‖∇L‖ is at most {tolerance:g}",
        (
            f"θ               {moving['values']:,} values in "
            f"{format_count(moving['tensors'], 'tensor')}"
        ),
    ]
    if (threshold := summary["threshold"]) is not None:
        rate, momentum = summary["learning_rate"], summary["momentum"]
        how = f"(2 + 2 · {momentum:g}) / {rate:g}" if momentum else f"2 / {rate:g}"
        lines.append(
            f"stable          full-batch training, where λ max is below {threshold:.4g} = {how}"
        )
    points = {
        (point["checkpoint"], point["split"]): point
        for split in summary["splits"].values()
        for point in split["points"]
    }
    for row in rows:
        point = points[row["checkpoint"], row["split"]]
        examples = summary["examples"][row["split"]]
        heading = f"{printable(row['checkpoint'])}, {printable(row['split'])}"
        lines += ["", f"{heading}, {format_count(examples, 'example')}: {row['verdict']}"]
        findings = [
            *([("because", point["reason"])] if point["reason"] else []),
            ("loss", format_number(row["loss"])),
            ("‖∇L‖", format_number(row["gradient_norm"])),
            ("λ min", _eigenvalue(row, "lambda_min", converged=point["lambda_min_converged"])),
            ("λ max", _eigenvalue(row, "lambda_max", converged=point["lambda_max_converged"])),
        ]
        if is_finite(row["positive"]):
            shares = (f"{row[kind]:.2%} {kind}" for kind in ("positive", "negative", "undecided"))
            findings.append(("signs of λ", f"{', '.join(shares)} of {moving['values']:,}"))
            findings.append(("trace", format_number(row["trace"])))
        if (predicted := point["predicted"]) and not point["reason"]:
            bound = "by" if predicted["exact"] else "by at most"
            verb = "falls" if row["verdict"] == "minimum" else "rises"
            change = format_number(predicted["change"], 2)
            findings.append((
                "predicted",
                f"the loss {verb} {bound} {change} to the {row['verdict']}",
            ))
        if descent := point["descent"]:
            findings.append(("along −∇L", _gain(descent)))
        if row["verdict"] == "saddle" and (sides := point["sides"]):
            steps = (sides["negative"], sides["positive"])
            gains = (format_number(step["gain"], 2) for step in steps if step)
            findings.append(("along ∓v", f"the loss falls to both sides, by {' and '.join(gains)}"))
        lines += [f"  {label:<14}{text}" for label, text in findings]
    if escape := summary["escape"]:
        lines += [
            "",
            f"along the most negative curvature of {printable(escape['checkpoint'])}, "
            f"{printable(escape['split'])}: "
            + (_gain(escape) if escape["gain"] > 0 else "no lower point was seen"),
        ]
    return "\n".join(lines) + "\n"


def _eigenvalue(row: Mapping[str, Any], which: str, *, converged: bool) -> str:
    error = (
        f" ± {format_number(row[f'{which}_error'], 2)}" if is_finite(row[f"{which}_error"]) else ""
    )
    caveat = "" if converged else ", not converged"
    return f"{format_number(row[which])}{error}{caveat}"


def _gain(step: Step) -> str:
    error = f" ± {format_number(step['gain_stderr'], 2)}" if is_finite(step["gain_stderr"]) else ""
    gain = f"{format_number(step['gain'])}{error}"
    return f"a step of {format_number(abs(step['distance']), 3)} lowers the loss by {gain}"
