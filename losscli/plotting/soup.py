"""The figure of ``losscli soup --greedy``: the score of the average at every step."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from losscli.plotting.layout import finish_layout
from losscli.plotting.style import (
    INK,
    PALE,
    PALETTE,
    distinct_checkpoints,
    drawable,
    format_number,
    house_style,
    narrow,
    new_figure,
    plain,
    scale_y,
    shorten,
    text_size,
    whole_numbers,
)
from losscli.results.drawing import FULL, Drawing
from losscli.results.result import Run
from losscli.results.summaries import SoupSummary
from losscli.wording import format_count

__all__ = ["draw_soup"]

# The most checkpoints that are named on the axis.
_NAMED = 12

_WIDTH_OF_NAME = 130  # points


def draw_soup(run: Run[SoupSummary], drawing: Drawing = FULL) -> Figure:
    """Draws the score of every average on a linear axis, and which checkpoints were kept."""
    with house_style(drawing):
        table = run.table
        figure = new_figure(drawing, 3.6)
        axes = figure.add_subplot()
        steps = np.array(table.floats("step"))
        scores = np.array(table.floats("score"))
        errors = np.nan_to_num(np.array(table.floats("score_stderr")))
        kept = np.array(table.floats("kept")) > 0
        shown = drawable(scores, log=False)
        best = np.maximum.accumulate(np.where(kept & shown, scores, -np.inf))
        with np.errstate(invalid="ignore"):
            reach = [scores[shown], (scores - errors)[shown], (scores + errors)[shown]]
        scale_y(axes, np.concatenate([*reach, np.empty(0)]), log=False, limits=drawing.ylim)
        finite = np.isfinite(best)
        (line,) = axes.step(steps[finite], best[finite], where="post", color=PALE, lw=1.2)
        axes.vlines(steps, scores - errors, scores + errors, color=INK, lw=1, alpha=0.6)
        marks = [(line, drawing.words("score of the current average", "average"))]
        for chosen, face, label in ((True, PALETTE[0], "kept"), (False, "white", "not kept")):
            at = shown & (kept == chosen)
            (mark,) = axes.plot(
                steps[at], scores[at], "o", mfc=face, mec=PALETTE[0], ls="none", ms=6, zorder=3
            )
            if at.any():
                marks.append((mark, label))
        names = [str(name) for name in table["checkpoint"]]
        distinct, pattern = distinct_checkpoints(run, names, drawing)
        notes = [f"Checkpoints {pattern}"] if pattern else []
        if len(names) <= _NAMED:
            room = narrow(figure, _WIDTH_OF_NAME)
            texts = [shorten(figure, name, room, text_size()) for name in distinct]
            axes.set_xticks(steps, texts, rotation=30, ha="right")
            axes.set_xlabel(drawing.words("checkpoint added (best first)", ""))
        else:
            axes.xaxis.set_major_locator(whole_numbers())
            axes.set_xlabel(drawing.words("step (one checkpoint added, best first)", "step"))
        score = "score"
        for split, found in run.summary.get("splits", {}).items():
            score = f"{plain(found['score'])} on {plain(split)}"
        axes.set_ylabel(shorten(figure, score, narrow(figure, 200), text_size()))
        axes.set_title(
            drawing.words("Greedy soup: score of the average", "greedy soup"), loc="left"
        )
        notes += ["Bars: one standard error of the change by the checkpoint, paired over examples."]
        if missing := int((~shown).sum()):
            notes.append(f"{format_count(missing, 'score')} not drawn: not finite.")
        if np.isfinite(scores[:1]).all():
            notes.append(f"The best single checkpoint has {format_number(scores[0], 4)}.")
        finish_layout(figure, drawing, notes, [marks])
    return figure
