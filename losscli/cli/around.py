"""``losscli around``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from losscli.cli.console import Console
from losscli.cli.options import Write, argument, option, with_study_options
from losscli.cli.report import (
    format_examples,
    format_moving,
    format_number,
    format_with_error,
    is_finite,
    task_lines,
)
from losscli.cli.run_study import expand_names, run_study
from losscli.errors import printable
from losscli.results.result import Result
from losscli.results.summaries import AroundPoint, AroundSummary, BasinRadius, Derivative
from losscli.settings import Settings
from losscli.wording import format_count

if TYPE_CHECKING:
    from losscli.studies.base import Study

__all__ = ["around", "report"]

# Shares of the range of coefficients at which a mean rise is printed.
_SHARES = (0.25, 0.5, 1.0)

_DIRECTIONS = "The directions"
_BASIN = "The basin"


@with_study_options
def around(
    checkpoints: Annotated[
        list[str],
        argument(
            "One or more; a folder of them, in natural order; - for names on stdin, one per line."
        ),
    ],
    settings: Settings,
    write: Write,
    console: Console,
    directions: Annotated[
        int,
        option(
            _DIRECTIONS,
            "The number of random filter-normalised directions, the same draws for every "
            "checkpoint.",
            "--directions",
            metavar="N",
        ),
    ] = 20,
    along: Annotated[
        Literal["gradient", "hessian"] | None,
        option(
            _DIRECTIONS,
            "Instead of random directions: the gradient, or the Hessian's eigenvectors of the "
            "largest (v1), the second largest (v2) and the smallest eigenvalue (vn), of the first "
            "split. They have length one.",
            "--along",
        ),
    ] = None,
    range_: Annotated[
        tuple[float, float] | None,
        option(
            _DIRECTIONS,
            "The lowest and the highest coefficient c of θ + c d. Default: 0 1 for random "
            "directions, which are as long as the weights that move; -0.5 0.5 for others.",
            "--range",
            metavar="LO HI",
        ),
    ] = None,
    points: Annotated[
        int,
        option(
            _DIRECTIONS,
            "Number of evenly spaced coefficients; 0 is added.",
            "--points",
            metavar="N",
        ),
    ] = 21,
    basin: Annotated[
        float | None,
        option(
            _BASIN,
            "The basin radius is the largest distance up to which the mean loss stays below X "
            "times the loss of the checkpoint. Default: 2.",
            "--basin",
            metavar="X",
        ),
    ] = None,
    basin_loss: Annotated[
        float | None,
        option(
            _BASIN,
            "The same with the loss X as the threshold, instead of --basin.",
            "--basin-loss",
            metavar="X",
        ),
    ] = None,
) -> None:
    """Evaluate the loss around checkpoints along many directions, and compute the basin radius.

    Draws the loss along each direction, its mean and its 10–90 % band over the distance from the
    checkpoint. All random directions of a checkpoint have the same length, so the mean is over
    points at equal distances. The basin radius, with its error over directions, is interpolated by
    parabolas between the points.
    """

    def plan() -> Study:
        from losscli.studies.around import Around

        return Around.plan(
            names,
            settings,
            directions=directions,
            along=along,
            range_=range_,
            points=points,
            basin=basin,
            basin_loss=basin_loss,
            ranks=console.ranks,
        )

    names = expand_names(checkpoints, console.ranks)
    run_study("around", checkpoints, plan, write, console)


def report(result: Result[AroundSummary]) -> str:
    """Returns lines of text that describe the loss around checkpoints."""
    summary = result.summary
    low, high = summary["coefficients"][0], summary["coefficients"][-1]
    number = len(summary["directions"])
    random = f"{format_count(number, 'random direction')}, filter-normalised"
    along = ", ".join(summary["directions"])
    first = next(iter(summary["splits"].values()))
    lines = [
        *task_lines(summary, 16),
        f"{'directions':<16}{along if summary['along'] else random}",
        f"{'coefficients':<16}{len(summary['coefficients']):,} from {low:g} to {high:g}",
        f"{'moving':<16}{format_moving(summary)}",
    ]
    for name, split in summary["splits"].items():
        lines += ["", f"{printable(name)}, {format_examples(summary, name)}"]
        # Derivatives are those of the first split.
        derivatives = summary["derivatives"] if split is first else {}
        for point, size in zip(split["points"], summary["norms"], strict=True):
            lines.append(f"  {printable(point['checkpoint'])}, ‖θ‖ = {size:.4g}")
            findings = [("loss", format_number(point["loss"]))]
            findings += _derivatives(derivatives.get(point["checkpoint"], []))
            if not summary["along"]:
                findings += _mean_rises(point, summary["coefficients"])
            findings += _radii(point, summary)
            lines += [f"    {label:<16}{text}" for label, text in findings]
    return "\n".join(lines) + "\n"


def _derivatives(derivatives: Sequence[Derivative]) -> Iterator[tuple[str, str]]:
    """Describes the directions along which the loss was evaluated."""
    for of in derivatives:
        if "gradient_norm" in of:
            yield "‖∇L‖", format_number(of["gradient_norm"])
        elif not is_finite(of["eigenvalue"]):
            yield f"λ of {of['direction']}", "not finite"
        else:
            caveat = "" if of["converged"] else ", not converged"
            value = format_with_error(of["eigenvalue"], of["error"])
            yield f"λ of {of['direction']}", f"{value}{caveat}"


def _mean_rises(point: AroundPoint, coefficients: Sequence[float]) -> Iterator[tuple[str, str]]:
    """Describes how far the loss rises on average, at some distances."""
    ends = [end for end in (coefficients[0], coefficients[-1]) if end]
    wanted = [share * end for end in ends for share in _SHARES]
    places = [min(range(len(coefficients)), key=lambda p: abs(coefficients[p] - c)) for c in wanted]
    for p in sorted({p for p in places if coefficients[p]}):
        rise, deviation = point["mean"][p] - point["loss"], point["deviation"][p]
        spread = f" ± {format_number(deviation, 2)} (s.d. over directions)"
        text = format_number(rise) if is_finite(rise) else "not finite"
        text += spread if is_finite(deviation) else ""
        relative = f"{point['relative_distances'][p]:.2g} ‖θ‖"
        side = "opposite, " if coefficients[p] < 0 else ""
        yield "mean rise", f"at distance {point['distances'][p]:.3g} ({side}{relative}): {text}"


def _radii(point: AroundPoint, summary: AroundSummary) -> Iterator[tuple[str, str]]:
    """Describes the radius of the basin, over the mean or along each direction."""
    threshold = point["threshold"]
    if threshold is None or not point["radii"]:
        yield "basin radius", "not defined"
        return
    times, basin = "", summary["basin"]
    if basin is not None:
        times = f", {'twice' if basin == 2 else f'{basin:g} times'} the loss at the checkpoint"
    for name, found in point["radii"].items():
        what = "mean loss" if name == "mean" else f"loss along {name}"
        below = "below" if point["loss"] < threshold else "not below"
        yield "basin radius", f"{_radius(found)}: {what} {below} {format_number(threshold)}{times}"


def _radius(found: BasinRadius) -> str:
    bound = f"{found['bound']} " if found["bound"] else ""
    relative = f" ({found['relative']:.2g} ‖θ‖)" if is_finite(found["relative"]) else ""
    return f"{bound}{format_with_error(found['distance'], found['stderr'])}{relative}"
