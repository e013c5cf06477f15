"""A summary in words: what was seen on the line, and never more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from losscli.errors import printable

__all__ = ["inspection", "interpolation", "plan", "plane", "trajectory"]


def interpolation(summary: Mapping[str, Any]) -> str:
    """Tells what a line showed.

    B is the end of training, and a lower point is a lower point seen on this line: whether either
    is a minimum is not for a line to say.

    Args:
        summary: The summary of an interpolation.

    Returns:
        Lines of text.
    """
    a, b = (printable(c["name"]) for c in summary["checkpoints"])
    low, high = summary["range"]
    moving = summary["moving"]
    lines = [
        f"A  {a}",
        f"B  {b}",
        (
            f"α from {low:g} to {high:g}; ‖B − A‖ = {summary['distance']:.4g} over "
            f"{moving['values']:,} values in {moving['tensors']} tensors"
        ),
    ]
    for name, split in summary["splits"].items():
        lines += ["", f"{printable(name)}, {_count(summary['examples'][name], 'example')}"]
        lines += [f"  {label:<14}{text}" for label, text in _findings(split, low, high)]
    return "\n".join(lines) + "\n"


def _findings(split: Mapping[str, Any], low: float, high: float) -> list[tuple[str, str]]:
    found = [("loss at A", _number(split["loss_a"])), ("loss at B", _number(split["loss_b"]))]
    minimum = split["minimum"]
    if minimum is None:
        return [*found, ("lowest seen", "none: no point has a finite loss")]
    found.append(("lowest seen", _lowest(split, low, high)))
    found += [("barrier", _barrier(split)), ("largest rise", _rise(split))]
    minima = split["local_minima"]
    if minima:
        told = "; ".join(
            f"α = {m['alpha']:.4g}, depth {_number(m['depth'])}"
            + (f" ± {_number(m['depth_stderr'], 2)}" if _known(m["depth_stderr"]) else "")
            for m in minima[:3]
        )
        more = f"; {len(minima) - 3} more" if len(minima) > 3 else ""
        found.append(("local minima", f"{len(minima)} of the curve: {told}{more}"))
    else:
        found.append(("local minima", f"none of the curve between {low:g} and {high:g}"))
    return found


def _lowest(split: Mapping[str, Any], low: float, high: float) -> str:
    minimum = split["minimum"]
    text = f"{_number(minimum['loss'])} at α = {minimum['alpha']:.4g}"
    below = minimum["below_b"]
    if _known(below) and below > 0:
        text += f", lower than B by {_number(below, 3)}"
        if _known(minimum["below_b_stderr"]):
            text += f" ± {_number(minimum['below_b_stderr'], 2)}"
    if minimum["alpha"] in {low, high}:
        text += ", where the range ends"
    ends = [split["loss_a"], split["loss_b"]]
    if any(_known(end) and end < minimum["loss"] for end in ends):
        text += "; an end outside the range is lower"
    return text


def _barrier(split: Mapping[str, Any]) -> str:
    barrier = split["barrier"]
    if not (_known(split["loss_a"]) and _known(split["loss_b"])):
        return "not defined: the loss at A or B is not finite"
    if barrier is None:
        return "not looked at: no point between A and B"
    if barrier["height"] > 0:
        return f"{_with_error(barrier)} at α = {barrier['alpha']:.4g}"
    return "none: no point seen lies above the chord from A to B"


def _rise(split: Mapping[str, Any]) -> str:
    rise = split["largest_rise"]
    if rise is None:
        return "not looked at: no point between A and B"
    if rise["height"] > 0:
        return f"{_with_error(rise)} from α = {rise['alpha_from']:.4g} to {rise['alpha_to']:.4g}"
    if split["monotonic"]:
        return "none: from A to B no point seen is above one before it"
    return "none among the points seen"


def trajectory(summary: Mapping[str, Any]) -> str:
    """Tells what a training path showed.

    Args:
        summary: The summary of a trajectory.

    Returns:
        Lines of text.
    """
    names = [printable(c["name"]) for c in summary["checkpoints"]]
    path, moving = summary["path"], summary["moving"]
    length, walked, farthest = path["length"], path["walked"], path["farthest"]
    last = len(names) - 1
    back = path["steps_back"]
    off = farthest["residual"]
    line = f"‖d‖ = {length:.4g} over {moving['values']:,} values"
    walk = f"{_count(last, 'step')}, {walked:.4g} long: {walked / length:.3g} times the line"
    far = f"r = {off:.4g}, {off / length:.2g} ‖d‖, at step {farthest['step']}"
    rows = [
        ("first", names[0]),
        ("last", names[-1]),
        ("straight line", f"{line} in {_count(moving['tensors'], 'tensor')}"),
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
    lines = [f"{label:<16}{text}" for label, text in rows]
    for name, split in summary["splits"].items():
        lines += ["", f"{printable(name)}, {_count(summary['examples'][name], 'example')}"]
        found = [
            ("loss, first", _number(split["loss_first"])),
            ("loss, last", _number(split["loss_last"])),
        ]
        lowest = split["lowest"]
        if lowest is None:
            found.append(("lowest seen", "none: no checkpoint has a finite loss"))
        else:
            at = "" if lowest["step"] == last else f" ({printable(lowest['checkpoint'])})"
            found.append((
                "lowest seen",
                f"{_number(lowest['loss'])} at step {lowest['step']} of {last}{at}",
            ))
        rises = split["rises"]
        found.append((
            "loss rises",
            f"at {rises} of {_count(last, 'step')}" if rises else "at no step",
        ))
        beside = split.get("surface_lowest")
        if beside:
            where = f"p = {beside['projection']:.3g}, residual {beside['residual']:.3g}"
            found.append(("on the surface", f"lowest {_number(beside['loss'])} at {where}"))
        lines += [f"  {label:<16}{text}" for label, text in found]
    return "\n".join(lines) + "\n"


def plane(summary: Mapping[str, Any]) -> str:
    """Tells what a plane showed.

    Args:
        summary: The summary of a plane.

    Returns:
        Lines of text.
    """
    names = [printable(c["name"]) for c in summary["checkpoints"]]
    moving = summary["moving"]
    letters = "ABC" if summary["plane"] == "points" else ""
    if letters or len(names) == 1:
        rows = [(letters[t : t + 1] or "at (0, 0)", name) for t, name in enumerate(names)]
    else:
        rows = [("first", names[0]), ("last, at (0, 0)", names[-1])]
    for axis, letter in zip(summary["axes"], "xy", strict=True):
        low, high = summary[f"{letter}_range"]
        explained = axis["explained_variance"]
        share = "" if explained is None else f", {explained:.1%} of the variance"
        rows.append((letter, f"{axis['name']}{share}, from {low:g} to {high:g}"))
    rows.append((
        "moving",
        f"{moving['values']:,} values in {_count(moving['tensors'], 'tensor')}",
    ))
    if summary["plane"] == "pca":
        rows.append(("off the plane", f"up to {summary['off_plane']:.4g}"))
    lines = [f"{label:<16}{text}" for label, text in rows]
    for name, split in summary["splits"].items():
        lines += ["", f"{printable(name)}, {_count(summary['examples'][name], 'example')}"]
        losses = split["checkpoints"]
        if len(losses) <= len("ABC"):
            told = [
                (f"loss at {letters[t : t + 1] or '(0, 0)'}", _number(loss))
                for t, loss in enumerate(losses)
            ]
        else:
            told = [("loss, first", _number(losses[0])), ("loss, last", _number(losses[-1]))]
        lowest = split["lowest"]
        if lowest is None:
            told.append(("lowest seen", "none: no point of the plane has a finite loss"))
        else:
            where = f"({lowest['x']:.4g}, {lowest['y']:.4g})"
            told.append(("lowest seen", f"{_number(lowest['loss'])} at {where} of the plane"))
            told.append(("highest seen", _number(split["highest_loss"])))
        lines += [f"  {label:<16}{text}" for label, text in told]
    return "\n".join(lines) + "\n"


def plan(description: Mapping[str, Any]) -> str:
    """Tells what a run will do.

    Args:
        description: A plan's description.

    Returns:
        Lines of text.
    """
    d = description
    splits = ", ".join(f"{name} {count:,}" for name, count in d["examples"].items())
    rows = [
        ("checkpoints", _route([c["name"] for c in d["checkpoints"]])),
        ("model", d["model"]),
        ("data", f"{d['data']}: {splits} examples"),
        ("loss", ", ".join([d["loss"], *d["metrics"]])),
        ("device", f"{d['device']}, {d['dtype']}, batches of {d['batch_size']}"),
        ("moving", f"{d['moving']['values']:,} values in {d['moving']['tensors']} tensors"),
        ("points", f"{d['points']}, {d['points_at_once']} at once"),
        ("passes", f"{d['passes_over_data']} over the data, {d['forward_passes']:,} examples"),
        ("weights", f"{d['bytes_of_weights'] / 2**20:,.1f} MiB for the points at once"),
    ]
    return "".join(f"{label:<13}{printable(text)}\n" for label, text in rows)


def inspection(summary: Mapping[str, Any], columns: Sequence[str], rows: Sequence[Any]) -> str:
    """Tells what is in a checkpoint, or how far apart two are.

    Args:
        summary: The summary of an inspection.
        columns: The columns of its table.
        rows: The rows of its table.

    Returns:
        Lines of text.
    """
    lines = []
    for checkpoint in summary["checkpoints"]:
        lines.append(
            f"{printable(checkpoint['name'])}: {_count(checkpoint['values'], 'value')} in "
            f"{_count(checkpoint['tensors'], 'tensor')}, {checkpoint['bytes'] / 2**20:,.1f} MiB, "
            f"‖θ‖ = {checkpoint['norm']:.6g}"
        )
        lines += [
            f"  {printable(f'{key} = {value}')}" for key, value in checkpoint["metadata"].items()
        ]
    if "distance" in summary:
        lines.append(f"‖B − A‖ = {summary['distance']:.6g}")
    lines.append("")
    lines += _aligned([columns, *([_cell(cell) for cell in row] for row in rows)])
    for mismatch in summary.get("mismatches", []):
        lines.append(f"does not match: {printable(mismatch)}")
    return "\n".join(lines) + "\n"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _cell(cell: Any) -> str:
    if isinstance(cell, float):
        return f"{cell:.6g}"
    return f"{cell:,}" if isinstance(cell, int) else printable(str(cell))


def _route(names: Sequence[str]) -> str:
    """The names of a few checkpoints, or the ends of a long path."""
    if len(names) <= 3:
        return " → ".join(names)
    return f"{names[0]} → … → {names[-1]}, {len(names)} in all"


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _with_error(thing: Mapping[str, Any]) -> str:
    error = f" ± {_number(thing['stderr'], 2)}" if _known(thing["stderr"]) else ""
    return _number(thing["height"]) + error


def _number(value: float | None, digits: int = 4) -> str:
    if value is None:
        return "not finite"
    return f"{value:.{digits}g}"
