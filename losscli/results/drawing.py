"""How a figure is drawn: the options that every study, ``losscli plot`` and Python share."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_type_hints

from losscli.errors import UsageError
from losscli.results.summaries import DrawingSummary
from losscli.settings import convert

__all__ = ["FULL", "Drawing"]

# Widths and heights in inches (None: as high as the panels need), and the size of text in points.
# A column of a paper with two columns; the text area of a 16:9 slide.
_SIZES: Mapping[str, tuple[float, float | None, float]] = {
    "paper": (3.25, None, 8.0),
    "slide": (10.0, 5.625, 14.0),
}
_INCHES = re.compile(r"([0-9]+(?:\.[0-9]+)?)[x×]([0-9]+(?:\.[0-9]+)?)")
_SLOWEST, _FASTEST = 0.1, 50.0  # frames per second; browsers slow a faster GIF down
_SMALLEST, _LARGEST = (2.0, 1.5), (40.0, 40.0)  # inches: width, height


@dataclass(frozen=True)
class Drawing:
    """How a figure is drawn.

    Attributes:
        title: A title above the panels; may be empty.
        log: Whether the loss has a logarithmic axis, or scale of colours.
        size: ``full``: 7.2 inches wide or more, with notes and the names of checkpoints;
            ``paper``, ``slide`` or ``WxH`` in inches: axes and a short legend.
        label: The names of the checkpoints in the figure, in their order.
        ylim: The lowest and the highest loss on its axis or scale of colours; None to show all.
        style: The settings of a Matplotlib style sheet.
        no_markers: Whether curves have no dots and no marks at their ends and extrema.
        fps: How many checkpoints an animation shows per second.
    """

    title: str = ""
    log: bool = False
    size: str = "full"
    label: tuple[str, ...] = ()
    ylim: tuple[float, float] | None = None
    style: Mapping[str, str] = field(default_factory=dict)
    no_markers: bool = False
    fps: float = 5.0

    def __post_init__(self) -> None:
        """Converts values of other types, or rejects them.

        Raises:
            UsageError: A value cannot be drawn.
        """
        for name, hint in _TYPES.items():
            object.__setattr__(self, name, convert(name, getattr(self, name), hint))
        if self.size != "full" and self.size not in _SIZES:
            _check_size(self.size)
        if not _SLOWEST <= self.fps <= _FASTEST:
            raise UsageError(f"--fps {self.fps:g} is not between {_SLOWEST:g} and {_FASTEST:g}")
        if self.ylim is not None:
            low, high = self.ylim
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise UsageError(
                    f"--ylim {low:g} {high:g} is not a range", "Give the lower limit first"
                )
            if self.log and low <= 0:
                raise UsageError(
                    f"--ylim {low:g} {high:g} has no logarithm",
                    "Give a lower limit above 0, or leave --log out",
                )

    @property
    def stored(self) -> DrawingSummary:
        """The options that differ from their defaults, for a summary. A title is not stored."""
        options: Any = {
            f.name: list(value) if isinstance(value, tuple) else value
            for f in fields(self)
            if (value := getattr(self, f.name)) != getattr(FULL, f.name) and f.name != "title"
        }
        stored: DrawingSummary = options
        return stored

    @property
    def compact(self) -> bool:
        """Whether the figure has axes and a short legend only: no notes, no names of files."""
        return self.size != "full"

    @property
    def inches(self) -> tuple[float | None, float | None]:
        """The width and the height; None where the panels determine it."""
        if self.size in _SIZES:
            return _SIZES[self.size][:2]
        found = _INCHES.fullmatch(self.size)
        return (float(found[1]), float(found[2])) if found else (None, None)

    @property
    def points(self) -> float:
        """The size of text in points, unless the style sheet has another."""
        return _SIZES[self.size if self.size in _SIZES else "paper"][2] if self.compact else 10.0

    def words(self, full: str, compact: str) -> str:
        """Returns the text for the size of the figure."""
        return compact if self.compact else full


_TYPES = get_type_hints(Drawing)

FULL = Drawing()
"""The figure of a command without options."""


def _check_size(size: str) -> None:
    """Checks a size in inches.

    Raises:
        UsageError: It is not of the form WxH, or too small or too large.
    """
    found = _INCHES.fullmatch(size)
    if not found:
        raise UsageError(
            f"--size {size!r} is not a size", "Give full, paper, slide or WxH in inches, as in 5x3"
        )
    for side, low, high in zip(map(float, found.groups()), _SMALLEST, _LARGEST, strict=True):
        if not low <= side <= high:
            raise UsageError(
                f"--size {size} is not between {_SMALLEST[0]:g}x{_SMALLEST[1]:g} and "
                f"{_LARGEST[0]:g}x{_LARGEST[1]:g} inches"
            )
