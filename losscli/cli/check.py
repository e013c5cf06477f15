"""``losscli check``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from losscli.cli.console import Console
from losscli.cli.options import KeepOrder, Write, argument, option, with_study_options
from losscli.cli.report import (
    align_columns,
    format_examples,
    format_loss,
    format_number,
    format_with_error,
    is_finite,
    mark_insignificant,
    task_lines,
)
from losscli.cli.run_study import expand_names, run_study
from losscli.errors import printable
from losscli.results.result import Result
from losscli.results.summaries import CheckedPoint, CheckSummary, Density, Preconditioner, Step
from losscli.settings import Settings
from losscli.wording import format_count

if TYPE_CHECKING:
    from losscli.studies.base import Study

__all__ = ["check", "report"]

_PANEL = "What is computed"
_SPECTRUM = "Spectrum and blocks"

# The most outliers in the text.
_LISTED = 5


@with_study_options
def check(
    checkpoints: Annotated[
        list[str],
        argument("One or more, in the order of training; a folder of them; - for names on stdin."),
    ],
    settings: Settings,
    write: Write,
    console: Console,
    tolerance: Annotated[
        float,
        option(
            _PANEL, "The largest gradient norm of a critical point.", "--tolerance", metavar="X"
        ),
    ] = 1e-3,
    eigenvalues: Annotated[
        int,
        option(
            _PANEL,
            "Number of largest and of smallest eigenvalues to compute.",
            "--eigenvalues",
            metavar="K",
        ),
    ] = 1,
    learning_rate: Annotated[
        float | None,
        option(
            _PANEL,
            "Compare λ max with 2 / X, the limit of stable full-batch training (with "
            "--optimizer adam: that of Adam, by default as in the checkpoint).",
            "--learning-rate",
            metavar="X",
        ),
    ] = None,
    momentum: Annotated[
        float | None,
        option(
            _PANEL,
            "The momentum of training, with --learning-rate η: the limit is (2 + 2X) / η.",
            "--momentum",
            metavar="X",
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        option(
            _PANEL,
            "Also compute λ max of P⁻¹H, the Hessian preconditioned by Adam, from the moments "
            "in each checkpoint, and compare it with (2 + 2β₁) / ((1 − β₁) η).",
            "--optimizer",
            metavar="adam",
        ),
    ] = None,
    keep_order: KeepOrder = False,
    density: Annotated[
        bool,
        option(
            _SPECTRUM,
            "Also estimate the density of all eigenvalues and the trace (STEM.density.csv), "
            "by stochastic Lanczos quadrature.",
            "--density",
        ),
    ] = False,
    probes: Annotated[
        int | None,
        option(
            _SPECTRUM,
            "Random vectors for the density and the traces (default: 10).",
            "--probes",
            metavar="K",
        ),
    ] = None,
    lanczos: Annotated[
        int | None,
        option(
            _SPECTRUM,
            "Lanczos steps for each random vector, each one product with the matrix (default: 90).",
            "--lanczos",
            metavar="M",
        ),
    ] = None,
    operator: Annotated[
        str | None,
        option(
            _SPECTRUM,
            "The matrix of density, trace and blocks: the Hessian, or the generalised "
            "Gauss-Newton matrix (default: hessian).",
            "--operator",
            metavar="hessian|ggn",
        ),
    ] = None,
    blocks: Annotated[
        bool,
        option(
            _SPECTRUM,
            "Also compute gradient norm, largest eigenvalue and trace of each block of the "
            "network (STEM.curvature.csv).",
            "--blocks",
        ),
    ] = False,
) -> None:
    """Check whether checkpoints are critical points, and minima or saddles.

    Computes the gradient norm over all examples, the largest and the smallest eigenvalue of the
    Hessian with their errors, and a verdict that these numbers and the loss support. If the
    curvature is negative, also evaluates the loss in both directions along it (STEM.escape.csv).
    On request, computes the density of all eigenvalues and the curvature of each block.
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
            density=density,
            probes=probes,
            lanczos=lanczos,
            operator=operator,
            blocks=blocks,
            optimizer=optimizer,
            ranks=console.ranks,
        )

    names = expand_names(checkpoints, console.ranks)
    run_study("check", checkpoints, plan, write, console)


def report(result: Result[CheckSummary]) -> str:
    """Returns lines of text that describe the result of a check for critical points."""
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
    if summary["optimizer"]:
        lines.append(
            "stable          full-batch training with Adam, where λ max of P⁻¹H is below "
            "(2 + 2 β₁) / ((1 − β₁) η)"
        )
    preconditioners = {state["checkpoint"]: state for state in summary["preconditioners"]}
    if summary["operator"] is not None:
        lines.append(_probes_line(summary))
    points = {
        (point["checkpoint"], point["split"]): point
        for split in summary["splits"].values()
        for point in split["points"]
    }
    for row in rows:
        point = points[row["checkpoint"], row["split"]]
        heading = f"{printable(row['checkpoint'])}, {printable(row['split'])}"
        lines += ["", f"{heading}, {format_examples(summary, row['split'])}: {row['verdict']}"]
        findings = [
            *([("because", point["reason"])] if point["reason"] else []),
            ("loss", format_loss(row["loss"], point["loss_seed_stderr"])),
            ("‖∇L‖", format_number(row["gradient_norm"])),
            ("λ min", _eigenvalue(row, "lambda_min", converged=point["lambda_min_converged"])),
            ("λ max", _eigenvalue(row, "lambda_max", converged=point["lambda_max_converged"])),
        ]
        if is_finite(row.get("preconditioned_lambda_max")):
            state = preconditioners[row["checkpoint"]]
            findings.append(("λ max of P⁻¹H", _preconditioned(row, point, state)))
        if is_finite(row["positive"]):
            shares = (f"{row[kind]:.2%} {kind}" for kind in ("positive", "negative", "undecided"))
            findings.append(("signs of λ", f"{', '.join(shares)} of {moving['values']:,}"))
        if row["trace"] is not None:
            # The trace of a whole Hessian is exact, with an error of 0.
            trace = format_with_error(row["trace"], row["trace_stderr"] or None)
            findings.append(("trace", trace))
        if density := point["density"]:
            findings.append(("outliers", _outliers(density)))
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
        if "curvature" in result.more:
            rows_of = result.more["curvature"].where("checkpoint", row["checkpoint"])
            lines += _block_lines(rows_of.where("split", row["split"]).records())
    if escape := summary["escape"]:
        lines += [
            "",
            f"along the most negative curvature of {printable(escape['checkpoint'])}, "
            f"{printable(escape['split'])}: "
            + (_gain(escape) if escape["gain"] > 0 else "no lower point was found"),
        ]
    return "\n".join(lines) + "\n"


def _probes_line(summary: CheckSummary) -> str:
    matrix = {"hessian": "the Hessian", "ggn": "the Gauss-Newton matrix"}[summary["operator"] or ""]
    steps = "" if summary["lanczos"] is None else f", {summary['lanczos']} Lanczos steps each"
    return f"spectrum        of {matrix}, by {format_count(summary['probes'] or 0, 'probe')}{steps}"


def _outliers(density: Density) -> str:
    """Describes the eigenvalues outside the bulk."""
    found = density["outliers"]
    if not is_finite(density["sigma"]):
        return "unknown: the spectrum is not finite"
    if not found:
        return "none: all eigenvalues are in the bulk"
    values = [format_number(value) for value in found[:_LISTED]]
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return f"{', '.join(values)}{more}, outside the bulk (each ± σ = {density['sigma']:.2g})"


def _block_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a table of the blocks."""
    cells = [
        ["block", "‖∇L‖", "λ max", "trace"],
        *(
            [
                printable(row["block"]),
                format_number(row["gradient_norm"]),
                format_with_error(row["lambda_max"], row["lambda_max_error"] or None),
                format_with_error(row["trace"], row["trace_stderr"] or None),
            ]
            for row in rows
        ),
    ]
    return [f"  {line}" for line in align_columns(cells, left={0})]


def _eigenvalue(row: Mapping[str, Any], which: str, *, converged: bool) -> str:
    caveat = "" if converged else ", not converged"
    return f"{format_with_error(row[which], row[f'{which}_error'])}{caveat}"


def _preconditioned(row: Mapping[str, Any], point: CheckedPoint, state: Preconditioner) -> str:
    """Describes λ max of P⁻¹H and the threshold."""
    which, converged = "preconditioned_lambda_max", point["preconditioned_lambda_max_converged"]
    value = _eigenvalue(row, which, converged=bool(converged))
    if not (threshold := state["threshold"]):
        return f"{value}, without a threshold: the learning rate is 0"
    rate, beta = state["learning_rate"], state["beta1"]
    how = f"(2 + 2 · {beta:g}) / ((1 − {beta:g}) · {rate:g})"
    share = row[which] / threshold
    return f"{value}, {share:.3g} of the threshold {threshold:.6g} = {how}"


def _gain(step: Step) -> str:
    gain = format_with_error(step["gain"], step["gain_stderr"])
    gain += mark_insignificant(step["gain"], step["gain_stderr"])
    length = format_number(abs(step["distance"]), 3)
    return f"a step of length {length} lowers the loss by {gain}"
