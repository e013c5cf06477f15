"""``losscli plane``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from losscli.cli.console import Console
from losscli.cli.options import KeepOrder, Write, argument, option, with_study_options
from losscli.cli.report import (
    format_examples,
    format_moving,
    format_number,
    format_ties,
    format_with_error,
    task_lines,
)
from losscli.cli.run_study import expand_names, run_study
from losscli.errors import printable
from losscli.results.result import Result
from losscli.results.summaries import PlaneAxis, PlaneSummary
from losscli.settings import Settings
from losscli.wording import format_count

if TYPE_CHECKING:
    from losscli.studies.base import Study

__all__ = ["plane", "report"]

_PANEL = "The plane"


@with_study_options
def plane(
    checkpoints: Annotated[
        list[str],
        argument(
            "One checkpoint: random directions. Three: the plane through them. With --pca a "
            "path: its checkpoints, a folder of them, or - for names on stdin."
        ),
    ],
    settings: Settings,
    write: Write,
    console: Console,
    pca: Annotated[
        bool, option(_PANEL, "The plane of a path's first two principal components.", "--pca")
    ] = False,
    axes: Annotated[
        Literal["hessian"] | None,
        option(
            _PANEL,
            "Instead of random directions: the unit eigenvectors of the largest and of the "
            "smallest eigenvalue of the Hessian at the checkpoint, of the first split.",
            "--axes",
        ),
    ] = None,
    path: Annotated[
        list[str] | None,
        option(
            _PANEL,
            "Repeatable. Project these checkpoints onto the plane. Each folder is a path; all "
            "other checkpoints are one more.",
            "--path",
            metavar="CKPT|DIR",
        ),
    ] = None,
    points: Annotated[
        int, option(_PANEL, "Number of values of each coordinate.", "--points", metavar="N")
    ] = 31,
    range_: Annotated[
        tuple[float, float] | None,
        option(
            _PANEL,
            "The lowest and the highest value of both coordinates. Default: a box around the "
            "checkpoints and paths. For one checkpoint without a path: -1 1 for random directions; "
            "for eigenvectors as far as the curvature alone changes the loss by a tenth.",
            "--range",
            metavar="LO HI",
        ),
    ] = None,
    surface: Annotated[
        bool, option(_PANEL, "Draw the surface in 3-D beside the contours.", "--surface")
    ] = False,
    keep_order: KeepOrder = False,
) -> None:
    """Evaluate the loss in a plane of weight space.

    The plane goes through three checkpoints; or from one along two random filter-normalised
    directions or two eigenvectors of its Hessian; or along the principal components of a path. Each
    checkpoint is shown with its true loss and its distance from the plane.
    """

    def plan() -> Study:
        from losscli.studies.plane import Plane

        return Plane.plan(
            names,
            settings,
            pca=pca,
            axes=axes,
            path=path or (),
            points=points,
            range_=range_,
            surface=surface,
            keep_order=keep_order,
            ranks=console.ranks,
        )

    names = expand_names(checkpoints, console.ranks)
    run_study("plane", checkpoints, plan, write, console)


def report(result: Result[PlaneSummary]) -> str:
    """Returns lines of text that describe the result of a plane."""
    summary = result.summary
    projected = sum(path["checkpoints"] for path in summary["paths"])
    spanning = summary["checkpoints"][: len(summary["checkpoints"]) - projected]
    names = [printable(c["name"]) for c in spanning]
    letters = "ABC" if summary["plane"] == "points" else ""
    if letters or len(names) == 1:
        rows = [(letters[t : t + 1] or "at (0, 0)", name) for t, name in enumerate(names)]
    else:
        rows = [("first", names[0]), ("last, at (0, 0)", names[-1])]
    ranges = {"x": summary["x_range"], "y": summary["y_range"]}
    for axis, letter in zip(summary["axes"], ranges, strict=True):
        low, high = ranges[letter]
        rows.append((letter, f"{_axis(axis)}, from {low:g} to {high:g}"))
    rows.append(("moving", format_moving(summary)))
    size = max(abs(x) for values in ranges.values() for x in values)
    if summary["plane"] == "pca":
        rows.append(("off the plane", _distance(summary["off_plane"], size)))
    for path in summary["paths"]:
        number = format_count(path["checkpoints"], "checkpoint")
        off = _distance(path["off_plane"], size)
        rows.append(("path", f"{printable(path['name'])}: {number}, off the plane {off}"))
    lines = [*task_lines(summary, 16), *(f"{label:<16}{text}" for label, text in rows)]
    for name, split in summary["splits"].items():
        lines += ["", f"{printable(name)}, {format_examples(summary, name)}"]
        losses = split["checkpoints"]
        if len(losses) <= len("ABC"):
            findings = [
                (f"loss at {letters[t : t + 1] or '(0, 0)'}", format_number(loss))
                for t, loss in enumerate(losses)
            ]
        else:
            findings = [
                ("loss, first", format_number(losses[0])),
                ("loss, last", format_number(losses[-1])),
            ]
        lowest = split["lowest"]
        if lowest is None:
            findings.append(("lowest seen", "none: no point of the plane has a finite loss"))
        else:
            where = f"({lowest['x']:.4g}, {lowest['y']:.4g})"
            least = f"{format_number(lowest['loss'])} at {where} of the plane"
            findings.append(("lowest seen", least + format_ties(lowest["ties"])))
            findings.append(("highest seen", format_number(split["highest_loss"])))
        lines += [f"  {label:<16}{text}" for label, text in findings]
    return "\n".join(lines) + "\n"


def _axis(axis: PlaneAxis) -> str:
    """Describes an axis with its share of the variance or its eigenvalue."""
    if "eigenvalue" in axis:
        caveat = "" if axis["converged"] else ", not converged"
        return f"{axis['name']} = {format_with_error(axis['eigenvalue'], axis['error'])}{caveat}"
    explained = axis["explained_variance"]
    return axis["name"] + ("" if explained is None else f", {explained:.1%} of the variance")


def _distance(off: float, size: float) -> str:
    """Describes the largest distance from a plane with coordinates up to ``size``."""
    # The axes are float32, so smaller distances are rounding errors.
    return f"up to {off:.4g}" if off > 1e-6 * size else "none"
