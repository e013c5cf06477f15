"""Results as text: what the reports of all commands share, and the report of a dry run.

The report of a command is in its own module. It is limited to what the evaluated points show.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from typing import TypeGuard

from losscli.errors import printable
from losscli.results.summaries import (
    BarriersSummary,
    CostEstimate,
    Counts,
    Description,
    Height,
    LineSummary,
    Origin,
    PairBarrier,
    Rise,
    StrategyChoice,
    Summary,
)
from losscli.wording import format_count

__all__ = [
    "align_columns",
    "format_examples",
    "format_height",
    "format_loss",
    "format_moving",
    "format_number",
    "format_ties",
    "format_with_error",
    "is_finite",
    "mark_insignificant",
    "plan",
    "repair_lines",
    "task_lines",
]


def task_lines(summary: Summary, width: int, *, metrics: bool = True) -> list[str]:
    """Returns the lines of the loss and the metrics, each with its source."""
    sources = summary["sources"]
    rows = [("loss", summary["loss"], sources["loss"])]
    if metrics:
        rows.append(("metrics", ", ".join(summary["metrics"]) or "none", sources["metrics"]))
    return [printable(f"{label:<{width}}{name} ({source})") for label, name, source in rows]


def format_moving(summary: Origin) -> str:
    """Returns the numbers of moving values, tensors and buffers."""
    moving, buffers = summary["moving"], summary["moving_buffers"]
    text = f"{moving['values']:,} values in {format_count(moving['tensors'], 'tensor')}"
    return (
        f"{text}; {format_count(buffers, 'buffer')} move{'s' if buffers == 1 else ''} along"
        if buffers
        else text
    )


def format_ties(number: int, *, short: bool = False) -> str:
    """Returns a suffix with the number of points that share the loss; empty for one."""
    if number == 1:
        return ""
    return f" and {number - 1} more" if short else f", shared by {number:,} points"


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
    if repairing := d.get("passes_for_repair"):
        data += f", {repairing:,} over the training examples for REPAIR"
    rows = [
        ("checkpoints", _route([c["name"] for c in d["checkpoints"]])),
        ("model", d["model"]),
        ("data", f"{d['data']}: {splits} {'batches' if 'batches' in d else 'examples'}"),
        ("loss", f"{d['loss']} ({d['sources']['loss']})"),
        ("metrics", f"{', '.join(d['metrics']) or 'none'} ({d['sources']['metrics']})"),
        ("device", f"{d['device']}, {d['dtype']}, {batches}"),
        ("moving", format_moving(d)),
        *([("blocks", f"{len(d['blocks'])}: {', '.join(d['blocks'])}")] if "blocks" in d else []),
        *([("pairs", f"{d['pairs']:,}")] if "pairs" in d else []),
        ("points", f"{d['points']:,}, {d['points_at_once']:,} at once"),
        *([("strategy", _strategy(d["strategy"]))] if "strategy" in d else []),
        ("passes", f"{data}, {d['forward_passes']:,} examples"),
        ("weights", f"{d['bytes_of_weights'] / 2**20:,.1f} MiB for the points at once"),
        ("in memory", ", ".join(_memory(d))),
    ]
    if "products_at_most" in d:
        rows.append(("products", f"with the Hessian, at most about {d['products_at_most']:,}"))
        if "bytes_of_basis" in d:
            rows.append(("basis", f"{d['bytes_of_basis'] / 2**20:,.1f} MiB of Lanczos vectors"))
        graphs = d["bytes_of_graphs_at_most"] / 2**20
        rows.append(("graphs", f"of gradients, kept between products: at most {graphs:,.0f} MiB"))
    if "steps_at_most" in d:
        steps = d["steps_at_most"]
        rows.append((
            "steps",
            f"down −∇L, along v, near extrema: at most {steps:,}, each a pass over a split",
        ))
    if "training_steps" in d:
        size = f"{d['bytes_of_training'] / 2**20:,.1f} MiB of bends, gradients and moments"
        rows.append(("training", f"{d['training_steps']:,} steps, {size}"))
    if "gradients_at_most" in d:
        points = f"{d['points_along_gradients']:,} points along them"
        rows.append(("gradients", f"at most {d['gradients_at_most']:,}, and about {points}"))
    rows.append(("time", _estimate(d["estimate"], d["device"], d["processes"])))
    return "".join(f"{label:<13}{printable(text)}\n" for label, text in rows)


def _strategy(choice: StrategyChoice) -> str:
    """Describes how points are evaluated, and how the losses differ from those of loaded points."""
    difference = choice["difference"]
    if difference is None:
        return f"{choice['name']}, not compared with the plainly loaded model"
    return (
        f"{choice['name']}, losses within {difference:.1g} (relative) of the plainly loaded model"
    )


def _estimate(e: CostEstimate, device: str, processes: int) -> str:
    """Describes the estimated time and the measurements behind it."""
    batch = e["batch"]
    timings = [f"one batch of {batch['examples']:,} took {_duration(batch['seconds'])}"]
    if "product" in e:
        timings.append(f"a product with the Hessian {_duration(e['product']['seconds'])}")
    time = f"{e['kind']} {_duration(e['seconds'])}"
    if "seconds_at_most" in e:
        time = f"about {_duration(e['seconds'])} to {_duration(e['seconds_at_most'])}"
    per_process = " for one process" if processes > 1 else ""
    return f"{time} on {device}{per_process} ({', '.join(timings)})"


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
        yield f"without {', '.join(d['streamed_splits'])}, decoded again in each pass"


def align_columns(rows: Sequence[Sequence[str]], left: Container[int]) -> list[str]:
    """Returns a line for each row, with aligned columns; those in ``left`` are left-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _route(names: Sequence[str]) -> str:
    """Returns the names of up to three checkpoints, or of the ends of a longer path."""
    if len(names) <= 3:
        return " → ".join(names)
    return f"{names[0]} → … → {names[-1]}, {len(names)} in all"


def repair_lines(summary: LineSummary | BarriersSummary) -> list[str]:
    """Returns a line that says what ``--repair`` did, if it was given."""
    repair = summary.get("repair")
    if repair is None:
        return []
    text = (
        "the points between two checkpoints are corrected by REPAIR on "
        f"{format_count(repair['examples'], 'example')} of {printable(repair['split'])}, "
        f"{format_count(repair['units'], 'unit')} in {format_count(repair['layers'], 'layer')}: "
        "they are not on the line"
    )
    if skipped := repair["skipped_at_most"]:
        units = format_count(skipped, "unit")
        text += f"; at most {units} at a point had no variance and stayed unchanged"
    return [text]


def format_examples(summary: Counts, split: str) -> str:
    """Returns the number of examples of a split, and of its batches with ``--batch-loss``."""
    examples = summary["examples"][split]
    text = format_count(examples, "example")
    if "batches" not in summary:
        return text
    batches = summary["batches"][split]
    # Where the examples of a batch cannot be counted, they are as many as the batches.
    in_ = f"{text} in " if examples != batches else ""
    return f"{in_}{format_count(batches, 'batch')}"


def is_finite(value: float | None) -> TypeGuard[float]:
    """Returns whether a number is known and finite."""
    return value is not None and math.isfinite(value)


def format_height(height: Height | Rise | PairBarrier) -> str:
    """Returns a height with its standard error, if that is known."""
    return format_with_error(height["height"], height["stderr"])


def format_loss(loss: float, seed_error: float | None) -> str:
    """Returns a loss with its standard error over seeds, if there are several."""
    error = "" if seed_error is None else f" ± {format_number(seed_error, 2)} over the seeds"
    return format_number(loss) + error


def format_with_error(value: float | None, error: float | None) -> str:
    """Returns a number with its error, if that is known and finite."""
    bound = f" ± {format_number(error, 2)}" if is_finite(error) else ""
    return format_number(value) + bound


def mark_insignificant(difference: float, error: float | None) -> str:
    """Returns a suffix for a difference of at most two standard errors; empty for others."""
    insignificant = is_finite(error) and difference <= 2 * error
    return " (not significantly)" if insignificant else ""


def format_number(value: float | None, digits: int = 4) -> str:
    """Formats a number with this number of significant digits."""
    if value is None:
        return "not finite"
    return f"{value:.{digits}g}"
