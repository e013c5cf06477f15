"""From what was measured to the README's table and figure."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

__all__ = ["draw", "table"]

_NAMES = {
    "losscli": "losscli",
    "losscli_bfloat16": "losscli --dtype bfloat16",
    "by_hand": "a loop written by hand",
    "sharing_by_hand": "a loop by hand that shares the first layer",
    "loss_landscapes": "loss-landscapes 3.0.6, one batch",
    "loss_landscape_3d": "loss-landscape-3d 0.1.3, DataLoader of 128",
}


def _works(found: Mapping[str, Any]) -> dict[str, str]:
    """The works that were measured, by their titles."""
    size = found["resnet20_work"]
    works = {
        "mlp": "MLP 784-512-512-10, 10,000 examples, 51 points",
        "plane": "plane of 7 × 7 points, the same MLP and examples",
        "ribbon": "surface of a trajectory, 7 steps and 7 points across, the same",
        "resnet20": (f"ResNet-20, {size['examples']:,} images of 32×32, {size['points']} points"),
        "gpt2": "GPT-2 of 124 M parameters, 64 × 1,024 tokens, 11 points",
    }
    return {work: title for work, title in works.items() if work in found}


def table(found: Mapping[str, Any]) -> str:
    """What was measured, as a table in Markdown."""
    machine = found["machine"]
    shares = any(map(_share, (entry for work in _works(found) for entry in found[work].values())))
    column, rule = (" of the product rate |", "---:|") if shares else ("", "")
    lines = [
        f"{machine['name']}, {machine['threads']} threads, PyTorch {machine['torch']}, float32",
        f"where nothing else is said, {machine['rounds']} rounds in turns after one to warm up:",
        "",
        f"| work | with | seconds | times the loop |{column}",
        f"|---|---|---:|---:|{rule}",
    ]
    for work, title in _works(found).items():
        for row, (name, entry) in enumerate(found[work].items()):
            lines.append(
                f"| {'' if row else title} | {_NAMES[name]} | {entry['seconds']:.2f} | "
                f"{entry['times_by_hand']:.2f} × |{_share(entry)}"
            )
    if "hessian" in found:
        lines += _spectrum_table(found["hessian"])
    if "growth" in found:
        points, examples = (found["growth"][of] for of in ("points", "examples"))
        lines += [
            "",
            "| losscli, the MLP on 16,000 examples at 50 points, and | times as long |",
            "|---|---:|",
            f"| twice the points | {points:.2f} |",
            f"| twice the examples | {examples:.2f} |",
        ]
    if "processes" in found:
        several = found["processes"]
        one, two, killed = (several[f"{which}_seconds"] for which in ("one", "two", "killed"))
        once, twice = several["one_sweep_seconds"], several["two_sweep_seconds"]
        share, of_sweep = several["two_times_one"], several["two_times_one_sweep"]
        both = f"{share:.2f} × as fast, {of_sweep:.2f} × the evaluation"
        longer = f"{several['killed_of_two']:.2f} × as long as unbroken"
        lines += [
            "",
            "Several processes of one thread each, the MLP on 32,000 examples at 101 points:",
            "",
            "| started with | seconds | of these evaluation | |",
            "|---|---:|---:|---|",
            f"| `losscli` | {one:.1f} | {once:.1f} | |",
            f"| `torchrun --nproc-per-node=2` | {two:.1f} | {twice:.1f} | {both} |",
            f"| the same, one of the two killed half way | {killed:.1f} | | {longer} |",
        ]
    if "recorder" in found:
        recorder = found["recorder"]
        milliseconds = 1000 * recorder["training_step_seconds"]
        between, saving = (recorder[f"{when}_saves"] for when in ("between", "with"))
        shares = f"{between:.2%} of a step between checkpoints, {saving:.2%} with 30 checkpoints"
        steps = f"2,000 training steps of {milliseconds:.1f} ms of the sample CNN"
        lines += ["", f"The recorder, in {steps}: {shares}."]
    return "\n".join(lines) + "\n"


def _share(entry: Mapping[str, Any]) -> str:
    """The operations a second of a plain loop in the same time, over those of a matrix product."""
    share = entry.get("share_of_product_peak")
    return "" if share is None else f" {share:.2f} |"


def _spectrum_table(found: Mapping[str, Any]) -> list[str]:
    names = {
        "losscli": "losscli",
        "by_hand": "a product written by hand, and SciPy's eigsh",
        "curvlinops": "curvlinops 3.0.1, and SciPy's eigsh",
    }
    lines = [
        "",
        "The smallest and the largest eigenvalue of the Hessian of the MLP 784-128-128-10 on 4,000",
        f"examples, each with ‖Hv − λv‖ of at most {found['residual']:.1g}:",
        "",
        "| with | products | seconds | times losscli |",
        "|---|---:|---:|---:|",
    ]
    for name, entry in found["contenders"].items():
        lines.append(
            f"| {names[name]} | {entry['products']} | {entry['seconds']:.1f} | "
            f"{entry['of_losscli']:.2f} × |"
        )
    return lines


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draws the times as bars."""
    with mpl.rc_context({**mpl.rcParamsDefault, "font.size": 11}):
        works = _works(found)
        rows = math.ceil(len(works) / 2)
        figure = Figure(figsize=(10, 3.4 * rows), layout="constrained")
        panels = figure.subplots(rows, 2, squeeze=False).flatten()
        for axes in panels[len(works) :]:
            axes.remove()
        for axes, (work, title) in zip(panels, works.items(), strict=False):
            names = list(found[work])
            seconds = [found[work][name]["seconds"] for name in names]
            colours = ["#0072B2" if name.startswith("losscli") else "#B0B0B0" for name in names]
            axes.barh(range(len(names)), seconds, color=colours, height=0.65)
            for row, value in enumerate(seconds):
                axes.text(value, row, f" {value:.2f} s", va="center")
            labels = [textwrap.fill(_NAMES[name], 24) for name in names]
            axes.set_yticks(range(len(names)), labels)
            axes.invert_yaxis()
            axes.set_xlim(0, 1.5 * max(seconds))  # room for the longest bar's number
            axes.set_xlabel("seconds")
            axes.set_title(textwrap.fill(title, 32), fontsize=11, loc="left")
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=150)
