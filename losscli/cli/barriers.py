"""``losscli barriers``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from losscli.cli.console import Console
from losscli.cli.options import Write, argument, option, with_study_options
from losscli.cli.report import (
    align_columns,
    format_examples,
    format_height,
    format_moving,
    format_number,
    format_with_error,
    is_finite,
    repair_lines,
    task_lines,
)
from losscli.cli.run_study import expand_names, run_study
from losscli.errors import printable
from losscli.results.result import Result
from losscli.results.summaries import BarriersSplit, BarriersSummary, PairBarrier
from losscli.settings import Settings
from losscli.table import Table
from losscli.wording import format_count

if TYPE_CHECKING:
    from losscli.studies.base import Study

__all__ = ["barriers", "report"]

# Maximum number of checkpoints in a printed matrix, which fits into most terminals.
_MATRIX = 10


@with_study_options
def barriers(
    checkpoints: Annotated[
        list[str] | None,
        argument(
            "Two or more; a folder of them, in natural order; - for names on stdin, one per line. "
            "Not allowed with --pairs.",
        ),
    ] = None,
    *,
    settings: Settings,
    write: Write,
    console: Console,
    pairs: Annotated[
        str | None,
        option(
            "The lines",
            "A CSV with the columns a and b, the checkpoints of each pair, relative to the folder "
            "of the file. Evaluates only these pairs and plots them over the column --x. Also "
            "computes the barrier of each metric: how far it falls below the straight line (or "
            "rises above it, if its higher_is_better is False).",
            "--pairs",
            metavar="FILE",
        ),
    ] = None,
    x: Annotated[
        str | None,
        option(
            "The lines",
            "The column of --pairs with a number for each pair, such as the step at which two "
            "runs were spawned. Pairs with the same number are averaged.",
            "--x",
            metavar="COLUMN",
        ),
    ] = None,
    points: Annotated[
        int,
        option(
            "The lines",
            "Number of evenly spaced values of α on each line, from 0 to 1.",
            "--points",
            metavar="N",
        ),
    ] = 11,
    repair: Annotated[
        bool,
        option(
            "The lines",
            "Correct each point between two checkpoints by REPAIR: each hidden unit's "
            "preactivation gets the mean and the standard deviation between those of both, over "
            "the training examples.",
            "--repair",
        ),
    ] = False,
    disagreement: Annotated[
        bool,
        option(
            "The outputs",
            "Also compute the share of examples on which two checkpoints predict different "
            "classes.",
            "--disagreement",
        ),
    ] = False,
    cka: Annotated[
        bool,
        option(
            "The outputs", "Also compute the linear CKA of the outputs of two checkpoints.", "--cka"
        ),
    ] = False,
) -> None:
    """Find the barriers between all pairs of checkpoints, as a matrix.

    The barrier is the largest height of the loss above the straight line between the losses of both
    ends, for 0 ≤ α ≤ 1. Each checkpoint is read and evaluated once; the losses on all lines are in
    STEM.curves.csv.
    """

    def plan() -> Study:
        from losscli.studies.barriers import Barriers

        return Barriers.plan(
            names,
            settings,
            points=points,
            pairs_file=pairs,
            x=x,
            disagreement=disagreement,
            cka=cka,
            repair=repair,
            ranks=console.ranks,
        )

    names = expand_names(checkpoints or [], console.ranks)
    inputs = [Path(pairs)] if pairs else []
    run_study("barriers", checkpoints or [pairs or ""], plan, write, console, inputs=inputs)


def report(result: Result[BarriersSummary]) -> str:
    """Returns lines of text that describe the result of barriers."""
    summary = result.summary
    names = [printable(c["name"]) for c in summary["checkpoints"]]
    rows = result.table.where("split", result.table["split"][0])
    pairs, column = len(rows.rows), summary["pairs"]
    few = len(names) <= _MATRIX and column is None
    number = {c["name"]: str(t) for t, c in enumerate(summary["checkpoints"], start=1)}
    lines = task_lines(summary, 9)
    lines += [f"{t:>2}  {name}" for t, name in enumerate(names, start=1)] if few else []
    points = len(summary["alphas"])
    length = list(filter(is_finite, rows.floats("distance")))
    far = f"‖B − A‖ from {min(length):.4g} to {max(length):.4g}" if length else "‖B − A‖ not finite"
    lines.append(
        f"{format_count(len(names), 'checkpoint')}, {format_count(pairs, 'pair')}, "
        f"{points:,} points each; {far} over {format_moving(summary)}"
    )
    lines += repair_lines(summary)
    for name, split in summary["splits"].items():
        lines += ["", f"{printable(name)}, {format_examples(summary, name)}"]
        if few:
            lines += [f"  {line}" for line in _matrix(split)]
        if column is not None:
            lines += [f"  {line}" for line in _means(split, column)]
        findings = [
            (f"{which} barrier", _pair_barrier(split[which], number if few else {}))
            for which in ("largest", "smallest")
        ]
        if split["without"]:
            none = f"{split['without']:,} of {format_count(pairs, 'pair')}"
            findings.append((
                "no barrier",
                f"{none}: never above the straight line between the two losses",
            ))
        if split["not_finite"]:
            unknown = f"{split['not_finite']:,} of {format_count(pairs, 'pair')}"
            findings.append(("not known", f"{unknown}: a loss on the line is not finite"))
        if column is None:
            findings += _outputs(result.table.where("split", name))
        lines += [f"  {label:<18}{text}" for label, text in findings]
    return "\n".join(lines) + "\n"


def _means(split: BarriersSplit, column: str) -> list[str]:
    """Returns a table of the means over the pairs with the same number."""
    means = split["means"]
    rows = [
        [
            printable(column),
            "pairs",
            *(printable(name.replace("_", " ")) for name in means[0]["values"]),
        ]
    ]
    for at in means:
        cells = []
        for value in at["values"].values():
            mean = value["mean"]
            cells.append(format_with_error(mean, value["stderr"]) if is_finite(mean) else "nan")
        rows.append([format_number(at["x"], 6), str(at["pairs"]), *cells])
    return align_columns(rows, left=())


def _outputs(rows: Table) -> list[tuple[str, str]]:
    """Describes the ranges of disagreement and CKA over the pairs of a split."""
    findings = []
    for column, label in (("disagreement", "disagreement"), ("cka", "CKA")):
        known = list(filter(is_finite, rows.floats(column))) if column in rows.columns else []
        if known:
            low, high = (format_number(x) for x in (min(known), max(known)))
            findings.append((label, f"{low} to {high}"))
    return findings


def _matrix(split: BarriersSplit) -> list[str]:
    """Returns a table of losses of the checkpoints and, below the diagonal, their barriers."""
    square = split["barriers"]
    size = len(square)
    rows = [["", "loss", "barrier to 1", *(f"to {t}" for t in range(2, size))]]
    for i, row in enumerate(square):
        cells = [format_number(x, 3) if is_finite(x) else "nan" for x in row[:i]]
        loss = split["losses"][i]
        rows.append([
            str(i + 1),
            format_number(loss) if is_finite(loss) else "nan",
            *cells,
            *[""] * (size - 1 - i),
        ])
    return align_columns(rows, left=())


def _pair_barrier(pair: PairBarrier | None, number: Mapping[str, str]) -> str:
    """Describes a barrier and its two checkpoints, by their numbers if they have any."""
    if pair is None:
        return "not known"
    if not pair["height"]:
        return "none"
    a, b = pair["a"], pair["b"]
    between = " and ".join(number.get(name) or printable(name) for name in (a, b))
    at = "" if pair["alpha"] is None else f" at α = {pair['alpha']:.4g}"
    return f"{format_height(pair)}{at}, between {between}"
