"""``losscli interpolate``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
    format_ties,
    format_with_error,
    is_finite,
    mark_insignificant,
    repair_lines,
    task_lines,
)
from losscli.cli.run_study import run_study
from losscli.errors import UsageError, printable
from losscli.registry import COMMANDS, command_of
from losscli.results.places import places_not_finite
from losscli.results.result import Result
from losscli.results.summaries import (
    BlockSummary,
    Extremum,
    LineSplit,
    LineSummary,
    LowestOnLine,
    Slope,
)
from losscli.settings import Settings
from losscli.table import Table
from losscli.wording import format_count

if TYPE_CHECKING:
    from losscli.studies.base import Study

__all__ = ["interpolate", "report"]

# Below this slope per unit length B is stationary, the tolerance of `losscli check`.
_STATIONARY = 1e-3

_PART = "the range covers only part of the line"


@with_study_options
def interpolate(
    a: Annotated[
        str,
        argument(
            "The checkpoint at α = 0: FILE, DIR, FILE#KEY, init:SEED, or MODULE=FILE+MODULE=FILE.",
            metavar="A",
        ),
    ],
    b: Annotated[str, argument("The checkpoint at α = 1.", metavar="B")],
    settings: Settings,
    write: Write,
    console: Console,
    points: Annotated[
        int,
        option(
            "The line",
            "Number of evenly spaced values of α; 0 and 1 are added if they lie in the range.",
            "--points",
            metavar="N",
        ),
    ] = 51,
    range_: Annotated[
        tuple[float, float],
        option("The line", "The lowest and the highest α.", "--range", metavar="LO HI"),
    ] = (-0.5, 2.0),
    refine: Annotated[
        float | None,
        option(
            "The line",
            "Add points where the curve bends and around every local minimum and maximum, "
            "until cubics through the points are accurate to TOL times the height of the curve. "
            "Straight lines between the points are less accurate.",
            "--refine",
            metavar="TOL",
        ),
    ] = None,
    derivatives: Annotated[
        bool,
        option(
            "The line",
            "Also compute the exact slope, dL/dα, and curvature, d²L/dα².",
            "--derivatives",
        ),
    ] = False,
    layerwise: Annotated[
        bool,
        option(
            "The line",
            "Also move each block of the network on its own, keeping the others at A.",
            "--layerwise",
        ),
    ] = False,
    repair: Annotated[
        bool,
        option(
            "The line",
            "Correct each point between A and B by REPAIR, with --range 0 1: each hidden unit's "
            "preactivation gets the mean and the standard deviation between those of A and B, over "
            "the training examples.",
            "--repair",
        ),
    ] = False,
    context: Annotated[
        Path | None,
        option(
            "The line",
            "The table of the whole line: the figure shows where this part lies.",
            "--context",
            metavar="CSV",
        ),
    ] = None,
) -> None:
    """Evaluate the loss along the line through two checkpoints, θ(α) = A + α (B − A).

    Writes a CSV, a figure and a JSON summary, and prints a report: the losses at both ends, the
    lowest point, the barrier, the largest rise, and local minima and maxima of the curve.
    """

    def plan() -> Study:
        from losscli.studies.interpolation import Interpolation

        return Interpolation.plan(
            a,
            b,
            settings,
            points=points,
            range_=range_,
            derivatives=derivatives,
            refine=refine,
            context=whole,
            layerwise=layerwise,
            repair=repair,
            ranks=console.ranks,
        )

    whole = None
    if context is not None:
        whole = Table.read(context)
        if command_of(whole.columns) is not COMMANDS["interpolate"]:
            raise UsageError(
                f"--context {context} is not a table of interpolate",
                "Give the CSV of the whole line",
            )
    inputs = [] if context is None else [context]
    run_study("interpolate", [a, b], plan, write, console, inputs=inputs)


def report(result: Result[LineSummary]) -> str:
    """Returns lines of text that describe the result of an interpolation.

    The text calls neither B nor a lower point a minimum, since a line cannot show that.
    """
    summary = result.summary
    a, b = (printable(c["name"]) for c in summary["checkpoints"])
    low, high = summary["range"]
    lines = [
        *task_lines(summary, 9),
        f"A  {a}",
        f"B  {b}",
        (
            f"α from {low:g} to {high:g}; ‖B − A‖ = {summary['distance']:.4g} over "
            f"{format_moving(summary)}"
        ),
        *repair_lines(summary),
    ]
    if refined := summary["refined"]:
        lines.append(
            f"refined to {refined['tolerance']:g} of the height: {refined['points']:,} points, "
            f"where an even grid would take {refined['uniform_points']:,}"
        )
    for name, split in summary["splits"].items():
        lines += ["", f"{printable(name)}, {format_examples(summary, name)}"]
        curve = result.table.where("split", name)
        findings = _line_findings(split, low, high, summary["distance"], curve)
        lines += [f"  {label:<14}{text}" for label, text in findings]
        if blocks := summary.get("blocks"):
            lines += ["  each block on its own, the others at A"]
            lines += [f"    {line}" for line in _blocks(blocks, name, _covers(low, high))]
    return "\n".join(lines) + "\n"


def _covers(low: float, high: float) -> bool:
    """Returns whether a range has the whole line from A to B."""
    return low <= 0 and high >= 1


def _blocks(blocks: Mapping[str, BlockSummary], split: str, covers: bool) -> list[str]:
    """Returns a table of the curves of single blocks."""
    rows = [("block", "values", "‖d‖", "loss at α = 1", "change from A", "lowest seen", "barrier")]
    for name, block in blocks.items():
        curve = block["splits"][split]
        low, barrier = curve["minimum"], curve["barrier"]
        change = "not defined"
        if is_finite(curve["change"]):
            change = format_with_error(curve["change"], curve["change_stderr"])
        rows.append((
            printable(name),
            f"{block['values']:,}",
            f"{block['distance']:.4g}",
            format_number(curve["loss_at_1"]),
            change,
            f"{format_number(low['loss'])} at α = {low['alpha']:.4g}"
            + format_ties(low["ties"], short=True)
            if low
            else "no finite loss",
            "not evaluated"
            if barrier is None
            else f"{format_height(barrier)} at α = {barrier['alpha']:.4g}"
            if barrier["height"] > 0
            else "none"
            if covers
            else "none in the range",
        ))
    return align_columns(rows, left={0, *range(2, len(rows[0]))})


def _line_findings(
    split: LineSplit, low: float, high: float, length: float, curve: Table
) -> list[tuple[str, str]]:
    rows = [
        ("loss at A", format_number(split["loss_a"])),
        ("loss at B", format_number(split["loss_b"])),
    ]
    minimum = split["minimum"]
    if minimum is None:
        return [*rows, ("lowest seen", "none: no point has a finite loss")]
    lowest = _lowest(split, minimum, low, high)
    if number := split["not_finite"]:
        where = places_not_finite(curve.floats("alpha"), curve.floats("loss"))
        lowest += f"; not finite at {format_count(number, 'point')}, {where}"
    rows.append(("lowest seen", lowest))
    rows += [("barrier", _barrier(split, low, high)), ("largest rise", _rise(split, low, high))]
    rows += [
        _extrema("minima", split["local_minima"], low, high),
        _extrema("maxima", split["local_maxima"], low, high),
    ]
    if slope := split.get("slope_at_b"):
        rows.append(("slope at B", _slope_at_b(slope, length)))
    return rows


def _slope_at_b(at: Slope, length: float) -> str:
    """Describes whether B is stationary along the line, which does not imply a critical point."""
    slope = at["slope"] / length if length else 0.0
    text = f"{format_number(at['slope'])}, curvature {format_number(at['curvature'])}; "
    unit = "per unit of length"
    if not math.isfinite(slope):
        return f"{text}whether B is stationary along the line is not known"
    if abs(slope) <= _STATIONARY:
        return f"{text}stationary along the line, to {_STATIONARY:g} {unit}"
    verb = "falls" if slope < 0 else "rises"
    return f"{text}not stationary: the loss {verb} by {format_number(abs(slope))} {unit}"


def _extrema(which: str, extrema: Sequence[Extremum], low: float, high: float) -> tuple[str, str]:
    """Describes the local minima or maxima of a curve, the largest three first."""
    label = f"local {which}"
    if not extrema:
        return label, f"none of the curve between {low:g} and {high:g}"
    minima = which == "minima"
    size = "depth" if minima else "height"
    significant = sum(e["beyond_noise"] for e in extrema)
    mixed = 0 < significant < len(extrema)
    sizes = [
        (e["depth"], e["depth_stderr"], e["alpha"], e["beyond_noise"])
        if minima
        else (e["height"], e["height_stderr"], e["alpha"], e["beyond_noise"])
        for e in extrema
    ]
    largest = "; ".join(
        f"α = {alpha:.4g}, {size} {format_with_error(height, error)}"
        + (" (not significant)" if mixed and not beyond_noise else "")
        for height, error, alpha, beyond_noise in sorted(sizes, key=lambda size: -size[0])[:3]
    )
    more = f"; {len(extrema) - 3} more" if len(extrema) > 3 else ""
    text = "significant (> 2 s.e.)" if significant else "not significant"
    if mixed:
        text = f"of which {significant} {text}"
    return label, f"{len(extrema)}, {text}: {largest}{more}"


def _lowest(split: LineSplit, minimum: LowestOnLine, low: float, high: float) -> str:
    text = f"{format_number(minimum['loss'])} at α = {minimum['alpha']:.4g}"
    text += format_ties(minimum["ties"])
    separator = ", "
    if minimum["alpha"] in {low, high} and minimum["ties"] == 1:
        text += ", where the range ends"
        separator = "; "
    below, error = minimum["below_b"], minimum["below_b_stderr"]
    if is_finite(below) and below > 0:
        text += f"{separator}lower than B by {format_number(below, 3)}"
        text += f" ± {format_number(error, 2)}" if is_finite(error) else ""
        text += mark_insignificant(below, error)
    ends = {"A": split["loss_a"], "B": split["loss_b"]}
    lower = [end for end, loss in ends.items() if is_finite(loss) and loss < minimum["loss"]]
    if lower:
        verb = "is" if len(lower) == 1 else "are"
        text += f"; {' and '.join(lower)}, outside the range, {verb} lower"
    return text


def _barrier(split: LineSplit, low: float, high: float) -> str:
    barrier = split["barrier"]
    if not (is_finite(split["loss_a"]) and is_finite(split["loss_b"])):
        return "not defined: the loss at A or B is not finite"
    if barrier is None:
        return "not evaluated: no point between A and B"
    if barrier["height"] > 0:
        text = f"{format_height(barrier)} at α = {barrier['alpha']:.4g}"
        if barrier["alpha"] in {low, high}:
            return f"{text}, where the range ends"
        return text if _covers(low, high) else f"{text} ({_PART})"
    if not _covers(low, high):
        return _none_in_part(low, high)
    return "none: never above the straight line between the losses at A and B"


def _rise(split: LineSplit, low: float, high: float) -> str:
    rise = split["largest_rise"]
    if rise is None:
        return "not evaluated: no point between A and B"
    if rise["height"] > 0:
        text = f"{format_height(rise)} from α = {rise['alpha_from']:.4g} to {rise['alpha_to']:.4g}"
        return text if _covers(low, high) else f"{text} ({_PART})"
    if not _covers(low, high):
        return _none_in_part(low, high)
    if split["monotonic"]:
        return "none: the loss never increases from A to B at the sampled points"
    return "none at the sampled points"


def _none_in_part(low: float, high: float) -> str:
    return f"none for α from {max(low, 0):g} to {min(high, 1):g} ({_PART})"
