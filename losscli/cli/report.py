"""Summaries as text, limited to what the evaluated points show."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from losscli.errors import printable
from losscli.results import Result
from losscli.summaries import (
    AlignmentSummary,
    AroundPoint,
    AroundSummary,
    BarriersSplit,
    BarriersSummary,
    BasinRadius,
    BlockSummary,
    CheckSummary,
    CostEstimate,
    Counts,
    Derivative,
    Description,
    Extremum,
    Height,
    InspectionSummary,
    LineSplit,
    LineSummary,
    LowestOnLine,
    Origin,
    PairBarrier,
    PlaneSummary,
    Rise,
    Slope,
    Step,
    Summary,
    TrajectorySummary,
)

__all__ = [
    "alignment",
    "around",
    "barriers",
    "check",
    "inspection",
    "interpolation",
    "plan",
    "plane",
    "trajectory",
]

# Below this slope per unit length B is stationary, the tolerance of `losscli check`.
_STATIONARY = 1e-3

# Shares of the range of coefficients at which a mean rise is printed.
_SHARES = (0.25, 0.5, 1.0)

# Maximum number of checkpoints in a printed matrix, which fits into most terminals.
_MATRIX = 10


def interpolation(result: Result[LineSummary]) -> str:
    """Describes the result of an interpolation.

    The text calls neither B nor a lower point a minimum, since a line cannot show that.

    Args:
        result: The result of an interpolation.

    Returns:
        Lines of text.
    """
    summary = result.summary
    a, b = (printable(c["name"]) for c in summary["checkpoints"])
    low, high = summary["range"]
    lines = [
        *_task(summary, 9),
        f"A  {a}",
        f"B  {b}",
        (
            f"α from {low:g} to {high:g}; ‖B − A‖ = {summary['distance']:.4g} over "
            f"{_moving_counts(summary)}"
        ),
    ]
    if refined := summary["refined"]:
        lines.append(
            f"refined to {refined['tolerance']:g} of the height: {refined['points']:,} points, "
            f"where an even grid would take {refined['uniform_points']:,}"
        )
    for name, split in summary["splits"].items():
        lines += ["", f"{printable(name)}, {_examples(summary, name)}"]
        findings = _line_findings(split, low, high, summary["distance"])
        lines += [f"  {label:<14}{text}" for label, text in findings]
        if blocks := summary.get("blocks"):
            lines += ["  each block alone, all others at A"]
            lines += [f"    {line}" for line in _blocks(blocks, name)]
    return "\n".join(lines) + "\n"


def _task(summary: Summary, width: int, *, metrics: bool = True) -> list[str]:
    """Returns the lines of the loss and the metrics, each with its source."""
    sources = summary["sources"]
    rows = [("loss", summary["loss"], sources["loss"])]
    if metrics:
        rows.append(("metrics", ", ".join(summary["metrics"]) or "none", sources["metrics"]))
    return [printable(f"{label:<{width}}{name} ({source})") for label, name, source in rows]


def _blocks(blocks: Mapping[str, BlockSummary], split: str) -> list[str]:
    """Returns a table of the curves of blocks that move alone."""
    rows = [("block", "values", "‖d‖", "loss at α = 1", "change from A", "lowest seen", "barrier")]
    for name, block in blocks.items():
        curve = block["splits"][split]
        low, barrier = curve["minimum"], curve["barrier"]
        change = "not defined"
        if _is_finite(curve["change"]):
            error = curve["change_stderr"]
            change = _number(curve["change"]) + (
                f" ± {_number(error, 2)}" if _is_finite(error) else ""
            )
        rows.append((
            printable(name),
            f"{block['values']:,}",
            f"{block['distance']:.4g}",
            _number(curve["loss_at_1"]),
            change,
            f"{_number(low['loss'])} at α = {low['alpha']:.4g}{_ties(low['ties'], short=True)}"
            if low
            else "none is finite",
            "not looked at"
            if barrier is None
            else f"{_with_error(barrier)} at α = {barrier['alpha']:.4g}"
            if barrier["height"] > 0
            else "none",
        ))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i == 1 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _moving_counts(summary: Origin) -> str:
    """Returns the numbers of moving values, tensors and buffers."""
    moving, buffers = summary["moving"], summary["moving_buffers"]
    text = f"{moving['values']:,} values in {_count(moving['tensors'], 'tensor')}"
    return (
        f"{text}; {_count(buffers, 'buffer')} move{'s' if buffers == 1 else ''} along"
        if buffers
        else text
    )


def _line_findings(
    split: LineSplit, low: float, high: float, length: float
) -> list[tuple[str, str]]:
    rows = [("loss at A", _number(split["loss_a"])), ("loss at B", _number(split["loss_b"]))]
    minimum = split["minimum"]
    if minimum is None:
        return [*rows, ("lowest seen", "none: no point has a finite loss")]
    rows.append(("lowest seen", _lowest(split, minimum, low, high)))
    rows += [("barrier", _barrier(split)), ("largest rise", _rise(split))]
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
    text = f"{_number(at['slope'])}, curvature {_number(at['curvature'])}; "
    if abs(slope) <= _STATIONARY:
        return f"{text}stationary along the line, to {_STATIONARY:g} a unit of length"
    verb = "falls" if slope < 0 else "rises"
    return f"{text}not stationary: the loss {verb} by {_number(abs(slope))} a unit of length"


def _extrema(which: str, extrema: Sequence[Extremum], low: float, high: float) -> tuple[str, str]:
    """Describes the local minima or maxima of a curve, the largest three first."""
    label = f"local {which}"
    if not extrema:
        return label, f"none of the curve between {low:g} and {high:g}"
    minima = which == "minima"
    size = "depth" if minima else "height"
    sizes = [
        (e["depth"], e["depth_stderr"], e["alpha"])
        if minima
        else (e["height"], e["height_stderr"], e["alpha"])
        for e in extrema
    ]
    largest = "; ".join(
        f"α = {alpha:.4g}, {size} {_number(height)}"
        + (f" ± {_number(error, 2)}" if _is_finite(error) else "")
        for height, error, alpha in sorted(sizes, key=lambda size: -size[0])[:3]
    )
    significant = sum(e["beyond_noise"] for e in extrema)
    more = f"; {len(extrema) - 3} more" if len(extrema) > 3 else ""
    return (
        label,
        f"{len(extrema)} of the curve, {significant} of them beyond noise: {largest}{more}",
    )


def _lowest(split: LineSplit, minimum: LowestOnLine, low: float, high: float) -> str:
    text = f"{_number(minimum['loss'])} at α = {minimum['alpha']:.4g}{_ties(minimum['ties'])}"
    below = minimum["below_b"]
    if _is_finite(below) and below > 0:
        text += f", lower than B by {_number(below, 3)}"
        if _is_finite(minimum["below_b_stderr"]):
            text += f" ± {_number(minimum['below_b_stderr'], 2)}"
    if minimum["alpha"] in {low, high} and minimum["ties"] == 1:
        text += ", where the range ends"
    ends = [split["loss_a"], split["loss_b"]]
    if any(_is_finite(end) and end < minimum["loss"] for end in ends):
        text += "; an end outside the range is lower"
    return text


def _ties(number: int, *, short: bool = False) -> str:
    """Returns a suffix with the number of points that share the loss; empty for one."""
    if number == 1:
        return ""
    return f" and {number - 1} more" if short else f", shared by {number:,} points"


def _barrier(split: LineSplit) -> str:
    barrier = split["barrier"]
    if not (_is_finite(split["loss_a"]) and _is_finite(split["loss_b"])):
        return "not defined: the loss at A or B is not finite"
    if barrier is None:
        return "not looked at: no point between A and B"
    if barrier["height"] > 0:
        return f"{_with_error(barrier)} at α = {barrier['alpha']:.4g}"
    return "none: no point seen lies above the chord from A to B"


def _rise(split: LineSplit) -> str:
    rise = split["largest_rise"]
    if rise is None:
        return "not looked at: no point between A and B"
    if rise["height"] > 0:
        return f"{_with_error(rise)} from α = {rise['alpha_from']:.4g} to {rise['alpha_to']:.4g}"
    if split["monotonic"]:
        return "none: from A to B no point seen is above one before it"
    return "none among the points seen"


def trajectory(result: Result[TrajectorySummary]) -> str:
    """Describes the result of a trajectory.

    Args:
        result: The result of a trajectory.

    Returns:
        Lines of text.
    """
    summary = result.summary
    names = [printable(c["name"]) for c in summary["checkpoints"]]
    path = summary["path"]
    length, walked, farthest = path["length"], path["walked"], path["farthest"]
    last = len(names) - 1
    back = path["steps_back"]
    off = farthest["residual"]
    line = f"‖d‖ = {length:.4g} over {_moving_counts(summary)}"
    walk = f"{_count(last, 'step')}, {walked:.4g} long: {walked / length:.3g} times the line"
    far = f"r = {off:.4g}, {off / length:.2g} ‖d‖, at step {farthest['step']}"
    rows = [
        ("first", names[0]),
        ("last", names[-1]),
        ("straight line", line),
        ("path", walk),
        ("farthest off", f"{far}, where p = {farthest['projection']:.3g}"),
        (
            "projection",
            f"falls at {len(back)} of {_count(last, 'step')}" if back else "rises at every step",
        ),
    ]
    if walks := summary["random_walks"]:
        ends, strays = walks["length"], walks["largest_residual"]
        rows.append((
            "random walks",
            f"end {ends:.4g} from the start and stray {strays:.4g} ({strays / ends:.2g} of that)",
        ))
    lines = [*_task(summary, 16), *(f"{label:<16}{text}" for label, text in rows)]
    for name, split in summary["splits"].items():
        lines += ["", f"{printable(name)}, {_examples(summary, name)}"]
        findings = [
            ("loss, first", _number(split["loss_first"])),
            ("loss, last", _number(split["loss_last"])),
        ]
        lowest = split["lowest"]
        if lowest is None:
            findings.append(("lowest seen", "none: no checkpoint has a finite loss"))
        else:
            at = "" if lowest["step"] == last else f" ({printable(lowest['checkpoint'])})"
            low = f"{_number(lowest['loss'])} at step {lowest['step']} of {last}{at}"
            findings.append(("lowest seen", low + _ties(lowest["ties"])))
        rises = split["rises"]
        findings.append((
            "loss rises",
            f"at {rises} of {_count(last, 'step')}" if rises else "at no step",
        ))
        point = split.get("surface_lowest")
        if point:
            where = f"p = {point['projection']:.3g}, residual {point['residual']:.3g}"
            low = f"lowest {_number(point['loss'])} at {where}{_ties(point['ties'])}"
            findings.append(("on the surface", low))
        lines += [f"  {label:<16}{text}" for label, text in findings]
    return "\n".join(lines) + "\n"


def plane(result: Result[PlaneSummary]) -> str:
    """Describes the result of a plane.

    Args:
        result: The result of a plane.

    Returns:
        Lines of text.
    """
    summary = result.summary
    names = [printable(c["name"]) for c in summary["checkpoints"]]
    letters = "ABC" if summary["plane"] == "points" else ""
    if letters or len(names) == 1:
        rows = [(letters[t : t + 1] or "at (0, 0)", name) for t, name in enumerate(names)]
    else:
        rows = [("first", names[0]), ("last, at (0, 0)", names[-1])]
    ranges = {"x": summary["x_range"], "y": summary["y_range"]}
    for axis, letter in zip(summary["axes"], ranges, strict=True):
        low, high = ranges[letter]
        explained = axis["explained_variance"]
        share = "" if explained is None else f", {explained:.1%} of the variance"
        rows.append((letter, f"{axis['name']}{share}, from {low:g} to {high:g}"))
    rows.append(("moving", _moving_counts(summary)))
    if summary["plane"] == "pca":
        size = max(abs(x) for values in ranges.values() for x in values)
        off = summary["off_plane"]
        # The axes are float32, so smaller distances are rounding errors.
        rows.append(("off the plane", f"up to {off:.4g}" if off > 1e-6 * size else "none"))
    lines = [*_task(summary, 16), *(f"{label:<16}{text}" for label, text in rows)]
    for name, split in summary["splits"].items():
        lines += ["", f"{printable(name)}, {_examples(summary, name)}"]
        losses = split["checkpoints"]
        if len(losses) <= len("ABC"):
            findings = [
                (f"loss at {letters[t : t + 1] or '(0, 0)'}", _number(loss))
                for t, loss in enumerate(losses)
            ]
        else:
            findings = [("loss, first", _number(losses[0])), ("loss, last", _number(losses[-1]))]
        lowest = split["lowest"]
        if lowest is None:
            findings.append(("lowest seen", "none: no point of the plane has a finite loss"))
        else:
            where = f"({lowest['x']:.4g}, {lowest['y']:.4g})"
            least = f"{_number(lowest['loss'])} at {where} of the plane{_ties(lowest['ties'])}"
            findings.append(("lowest seen", least))
            findings.append(("highest seen", _number(split["highest_loss"])))
        lines += [f"  {label:<16}{text}" for label, text in findings]
    return "\n".join(lines) + "\n"


def barriers(result: Result[BarriersSummary]) -> str:
    """Describes the result of barriers.

    Args:
        result: The result of barriers.

    Returns:
        Lines of text.
    """
    summary = result.summary
    names = [printable(c["name"]) for c in summary["checkpoints"]]
    pairs = math.comb(len(names), 2)
    few = len(names) <= _MATRIX
    number = {c["name"]: str(t) for t, c in enumerate(summary["checkpoints"], start=1)}
    lines = _task(summary, 9)
    lines += [f"{t:>2}  {name}" for t, name in enumerate(names, start=1)] if few else []
    points = len(summary["alphas"])
    length = [
        x for i, row in enumerate(summary["distances"]) for x in row[i + 1 :] if _is_finite(x)
    ]
    far = f"‖B − A‖ from {min(length):.4g} to {max(length):.4g}" if length else "‖B − A‖ not finite"
    lines.append(
        f"{_count(len(names), 'checkpoint')}, {_count(pairs, 'pair')}, {points:,} points each; "
        f"{far} over {_moving_counts(summary)}"
    )
    for name, split in summary["splits"].items():
        lines += ["", f"{printable(name)}, {_examples(summary, name)}"]
        if few:
            lines += [f"  {line}" for line in _matrix(split)]
        findings = [
            (f"{which} barrier", _pair_barrier(split[which], number if few else {}))
            for which in ("largest", "smallest")
        ]
        if split["without"]:
            none = f"{split['without']:,} of {_count(pairs, 'pair')}"
            findings.append(("no barrier", f"{none}: no point seen lies above the chord"))
        if split["not_finite"]:
            unknown = f"{split['not_finite']:,} of {_count(pairs, 'pair')}"
            findings.append(("not known", f"{unknown}: a loss on the line is not finite"))
        lines += [f"  {label:<18}{text}" for label, text in findings]
    return "\n".join(lines) + "\n"


def _matrix(split: BarriersSplit) -> list[str]:
    """Returns a table of losses of the checkpoints and, below the diagonal, their barriers."""
    square = split["barriers"]
    size = len(square)
    rows = [["", "loss", *(f"to {t}" for t in range(1, size))]]
    for i, row in enumerate(square):
        cells = [_number(x, 3) if _is_finite(x) else "nan" for x in row[:i]]
        loss = split["losses"][i]
        rows.append([
            str(i + 1),
            _number(loss) if _is_finite(loss) else "nan",
            *cells,
            *[""] * (size - 1 - i),
        ])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _pair_barrier(pair: PairBarrier | None, number: Mapping[str, str]) -> str:
    """Describes a barrier and its two checkpoints, by their numbers if they have any."""
    if pair is None:
        return "none is known"
    a, b = pair["a"], pair["b"]
    between = " and ".join(number.get(name) or printable(name) for name in (a, b))
    at = "" if pair["alpha"] is None else f" at α = {pair['alpha']:.4g}"
    return f"{_with_error(pair) if pair['height'] else 'none'}{at}, between {between}"


def around(result: Result[AroundSummary]) -> str:
    """Describes the loss around checkpoints.

    Args:
        result: The result of around.

    Returns:
        Lines of text.
    """
    summary = result.summary
    low, high = summary["coefficients"][0], summary["coefficients"][-1]
    number = len(summary["directions"])
    random = f"{_count(number, 'random direction')}, filter-normalised"
    along = ", ".join(summary["directions"])
    first = next(iter(summary["splits"].values()))
    lines = [
        *_task(summary, 16),
        f"{'directions':<16}{along if summary['along'] else random}",
        f"{'coefficients':<16}{len(summary['coefficients']):,} from {low:g} to {high:g}",
        f"{'moving':<16}{_moving_counts(summary)}",
    ]
    for name, split in summary["splits"].items():
        lines += ["", f"{printable(name)}, {_examples(summary, name)}"]
        # Derivatives are those of the first split.
        derivatives = summary["derivatives"] if split is first else {}
        for point, size in zip(split["points"], summary["norms"], strict=True):
            lines.append(f"  {printable(point['checkpoint'])}, ‖θ‖ = {size:.4g}")
            findings = [("loss", _number(point["loss"]))]
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
            yield "‖∇L‖", _number(of["gradient_norm"])
        else:
            caveat = "" if of["converged"] else ", not converged"
            value, error = _number(of["eigenvalue"]), _number(of["error"], 2)
            yield f"λ of {of['direction']}", f"{value} ± {error}{caveat}"


def _mean_rises(point: AroundPoint, coefficients: Sequence[float]) -> Iterator[tuple[str, str]]:
    """Describes how far the loss rises on average, at some distances."""
    ends = [end for end in (coefficients[0], coefficients[-1]) if end]
    wanted = [share * end for end in ends for share in _SHARES]
    places = [min(range(len(coefficients)), key=lambda p: abs(coefficients[p] - c)) for c in wanted]
    for p in sorted({p for p in places if coefficients[p]}):
        rise, deviation = point["mean"][p] - point["loss"], point["deviation"][p]
        spread = f" ± {_number(deviation, 2)} (s.d. over directions)"
        text = _number(rise) if _is_finite(rise) else "not finite"
        text += spread if _is_finite(deviation) else ""
        relative = f"{point['relative_distances'][p]:.2g} ‖θ‖"
        side = "opposite, " if coefficients[p] < 0 else ""
        yield "mean rise", f"at distance {point['distances'][p]:.3g} ({side}{relative}): {text}"


def _radii(point: AroundPoint, summary: AroundSummary) -> Iterator[tuple[str, str]]:
    """Describes the radius of the basin, over the mean or along each direction."""
    threshold = point["threshold"]
    if threshold is None or not point["radii"]:
        yield "basin radius", "not defined"
        return
    times = "" if summary["basin"] is None else f", {summary['basin']:g} times the loss"
    for name, found in point["radii"].items():
        what = "mean loss" if name == "mean" else f"loss along {name}"
        below = "below" if point["loss"] < threshold else "not below"
        yield "basin radius", f"{_radius(found)}: {what} {below} {_number(threshold)}{times}"


def _radius(found: BasinRadius) -> str:
    error = f" ± {_number(found['stderr'], 2)}" if _is_finite(found["stderr"]) else ""
    bound = f"{found['bound']} " if found["bound"] else ""
    relative = f" ({found['relative']:.2g} ‖θ‖)" if _is_finite(found["relative"]) else ""
    return f"{bound}{_number(found['distance'])}{error}{relative}"


def check(result: Result[CheckSummary]) -> str:
    """Describes the result of a check for critical points.

    Args:
        result: The result of a check.

    Returns:
        Lines of text.
    """
    summary, rows = result.summary, _rows(result)
    moving, tolerance = summary["moving"], summary["tolerance"]
    lines = [
        *_task(summary, 16, metrics=False),
        f"critical        where ‖∇L‖ is at most {tolerance:g}",
        f"θ               {moving['values']:,} values in {_count(moving['tensors'], 'tensor')}",
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
        number = summary["examples"][row["split"]]
        heading = f"{printable(row['checkpoint'])}, {printable(row['split'])}"
        lines += ["", f"{heading}, {_count(number, 'example')}: {row['verdict']}"]
        findings = [
            *([("because", point["reason"])] if point["reason"] else []),
            ("loss", _number(row["loss"])),
            ("‖∇L‖", _number(row["gradient_norm"])),
            ("λ min", _eigenvalue(row, "lambda_min", converged=point["lambda_min_converged"])),
            ("λ max", _eigenvalue(row, "lambda_max", converged=point["lambda_max_converged"])),
        ]
        if _is_finite(row["positive"]):
            shares = (f"{row[kind]:.2%} {kind}" for kind in ("positive", "negative", "undecided"))
            findings.append(("signs of λ", f"{', '.join(shares)} of {moving['values']:,}"))
            findings.append(("trace", _number(row["trace"])))
        if (predicted := point["predicted"]) and not point["reason"]:
            bound = "by" if predicted["exact"] else "by at most"
            verb = "falls" if row["verdict"] == "minimum" else "rises"
            change = _number(predicted["change"], 2)
            findings.append((
                "predicted",
                f"the loss {verb} {bound} {change} to the {row['verdict']}",
            ))
        if descent := point["descent"]:
            findings.append(("along −∇L", _gain(descent)))
        if row["verdict"] == "saddle" and (sides := point["sides"]):
            steps = (sides["negative"], sides["positive"])
            gains = (_number(step["gain"], 2) for step in steps if step)
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


def _rows(result: Result[Any]) -> Sequence[Mapping[str, Any]]:
    return result.table.records()


def _eigenvalue(row: Mapping[str, Any], which: str, *, converged: bool) -> str:
    error = f" ± {_number(row[f'{which}_error'], 2)}" if _is_finite(row[f"{which}_error"]) else ""
    caveat = "" if converged else ", not converged"
    return f"{_number(row[which])}{error}{caveat}"


def _gain(step: Step) -> str:
    error = f" ± {_number(step['gain_stderr'], 2)}" if _is_finite(step["gain_stderr"]) else ""
    gain = f"{_number(step['gain'])}{error}"
    return f"a step of {_number(abs(step['distance']), 3)} lowers the loss by {gain}"


def plan(description: Description) -> str:
    """Describes a planned run.

    Args:
        description: The description of a study.

    Returns:
        Lines of text.
    """
    d = description
    sizes = d.get("batches", d["examples"])
    splits = ", ".join(f"{name} {count:,}" for name, count in sizes.items())
    batches = f"batches of {d['batch_size']}" if d["batch_size"] else "whole batches"
    statistics, training = d["passes_for_statistics"], d["recalibration"]
    data = f"{d['passes_over_data']:,} over the data"
    if statistics and training:
        data += f", {statistics:,} over {training['split']} for statistics"
    rows = [
        ("checkpoints", _route([c["name"] for c in d["checkpoints"]])),
        ("model", d["model"]),
        ("data", f"{d['data']}: {splits} {'batches' if 'batches' in d else 'examples'}"),
        ("loss", f"{d['loss']} ({d['sources']['loss']})"),
        ("metrics", f"{', '.join(d['metrics']) or 'none'} ({d['sources']['metrics']})"),
        ("device", f"{d['device']}, {d['dtype']}, {batches}"),
        ("moving", _moving_counts(d)),
        *([("blocks", f"{len(d['blocks'])}: {', '.join(d['blocks'])}")] if "blocks" in d else []),
        *([("pairs", f"{d['pairs']:,}")] if "pairs" in d else []),
        ("points", f"{d['points']:,}, {d['points_at_once']:,} at once"),
        ("passes", f"{data}, {d['forward_passes']:,} examples"),
        ("weights", f"{d['bytes_of_weights'] / 2**20:,.1f} MiB for the points at once"),
        ("in memory", ", ".join(_memory(d))),
    ]
    if "products_at_most" in d:
        rows.append(("products", f"with the Hessian, at most about {d['products_at_most']:,}"))
    if "steps_at_most" in d:
        steps = d["steps_at_most"]
        rows.append(("steps", f"down −∇L and along v, at most {steps:,}, each a pass over a split"))
    rows.append(("time", _estimate(d["estimate"], d["device"], d["processes"])))
    return "".join(f"{label:<13}{printable(text)}\n" for label, text in rows)


def _estimate(e: CostEstimate, device: str, processes: int) -> str:
    """Describes the estimated time and the measurements behind it."""
    batch = e["batch"]
    timings = [f"one batch of {batch['examples']:,} took {_duration(batch['seconds'])}"]
    if "product" in e:
        timings.append(f"a product with the Hessian {_duration(e['product']['seconds'])}")
    time = f"{e['kind']} {_duration(e['seconds'])}"
    if "seconds_at_most" in e:
        time = f"about {_duration(e['seconds'])} to {_duration(e['seconds_at_most'])}"
    alone = " for one process alone" if processes > 1 else ""
    return f"{time} on {device}{alone} ({', '.join(timings)})"


def _duration(seconds: float) -> str:
    """Formats a duration, for example ``41 ms``, ``2 min 10 s`` or ``3 h 5 min``."""
    if seconds < 0.0995:
        return f"{1000 * seconds:.2g} ms"
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    for large, small, unit, part in (
        (86400, 3600, "d", "h"),
        (3600, 60, "h", "min"),
        (60, 1, "min", "s"),
    ):
        if whole >= large:
            many, rest = divmod(round(whole / small), large // small)
            return f"{many:,} {unit} {rest} {part}" if rest else f"{many:,} {unit}"
    return f"{whole} s"


def _memory(d: Description) -> Iterator[str]:
    yield f"{d['bytes_of_data'] / 2**20:,.1f} MiB of data"
    if d["streamed"]:
        yield f"not {', '.join(d['streamed_splits'])}: decoded anew in each pass"


def inspection(result: Result[InspectionSummary]) -> str:
    """Describes the tensors or state dicts of a checkpoint, or the distance of two checkpoints.

    Args:
        result: The result of an inspection.

    Returns:
        Lines of text.
    """
    summary, columns, rows = result.summary, result.table.columns, result.table.rows
    lines = []
    several = len(summary.get("state_dicts", ()))
    for checkpoint in summary["checkpoints"]:
        lines.append(
            f"{printable(checkpoint['name'])}: {_count(checkpoint['values'], 'value')} in "
            f"{_count(checkpoint['tensors'], 'tensor')}, {checkpoint['bytes'] / 2**20:,.1f} MiB, "
            + (f"in {several:,} state dicts" if several else f"‖θ‖ = {checkpoint['norm']:.6g}")
        )
        lines += [
            f"  {printable(f'{key} = {value}')}" for key, value in checkpoint["metadata"].items()
        ]
    if "distance" in summary:
        lines.append(f"‖B − A‖ = {summary['distance']:.6g}")
    if buffers := summary.get("buffers"):
        more = f" and {len(buffers) - 1:,} more" if len(buffers) > 1 else ""
        lines.append(printable(f"buffers count in neither norm nor distance: {buffers[0]}{more}"))
    lines.append("")
    if several:
        cells = [[_cell(cell) for cell in (key or "(top level)", *rest)] for key, *rest in rows]
        lines += _aligned([columns, *cells], left=1)
        path = printable(shlex.quote(str(summary["checkpoints"][0]["path"])))
        example = printable(shlex.quote(next(str(key) for key, *_ in rows if key)))
        lines += ["", f"look into one of them with its key: losscli inspect {path}#{example}"]
        return "\n".join(lines) + "\n"
    lines += _aligned([columns, *([_cell(cell) for cell in row] for row in rows)])
    for mismatch in summary.get("mismatches", []):
        lines.append(f"does not match: {printable(mismatch)}")
    return "\n".join(lines) + "\n"


def alignment(summary: AlignmentSummary) -> str:
    """Describes the result of an alignment.

    Args:
        summary: The summary of an alignment.

    Returns:
        Lines of text.
    """
    a, b = (printable(c["name"]) for c in summary["checkpoints"])
    before, after = (summary["distance"][when] for when in ("before", "after"))
    products = [_number(summary["inner_product"][when]) for when in ("before", "after")]
    check = summary["check"]
    groups = _count(len(summary["groups"]), "group")
    over = f"{_count(summary['values'], 'value')} in {_count(summary['tensors'], 'tensor')}"
    examples = _count(check["examples"], "example")
    difference = f"{check['largest_difference']:.1g} of the largest"
    rows = [
        ("A", a),
        ("B", b),
        ("hidden units", f"{summary['units']:,} in {groups}; {summary['moved']:,} change places"),
        ("‖B − A‖", f"{before:.4g}, permuted {after:.4g}, over {over}"),
        ("⟨A, B⟩", f"{products[0]}, permuted {products[1]}"),
        ("function", f"B's: the same outputs on {examples}, to {difference}, in {check['dtype']}"),
    ]
    return "".join(f"{label:<14}{text}\n" for label, text in rows)


def _aligned(rows: Sequence[Sequence[str]], left: int = 3) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _cell(cell: Any) -> str:
    if isinstance(cell, float):
        return f"{cell:.6g}"
    return f"{cell:,}" if isinstance(cell, int) else printable(str(cell))


def _route(names: Sequence[str]) -> str:
    """Returns the names of up to three checkpoints, or the ends of a longer path."""
    if len(names) <= 3:
        return " → ".join(names)
    return f"{names[0]} → … → {names[-1]}, {len(names)} in all"


def _examples(summary: Counts, split: str) -> str:
    """Returns the number of examples of a split, and of its batches with ``--batch-loss``."""
    text = _count(summary["examples"][split], "example")
    if "batches" not in summary:
        return text
    return f"{text} in {_count(summary['batches'][split], 'batch')}"


def _count(number: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def _is_finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _with_error(height: Height | Rise | PairBarrier) -> str:
    error = f" ± {_number(height['stderr'], 2)}" if _is_finite(height["stderr"]) else ""
    return _number(height["height"]) + error


def _number(value: float | None, digits: int = 4) -> str:
    if value is None:
        return "not finite"
    return f"{value:.{digits}g}"
