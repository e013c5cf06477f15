"""What was seen of a line so far: the losses of each example, to which points can be added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from losscli.objective import Evaluation
from losscli.sampling import Estimate

__all__ = ["Derivatives", "LineCurve", "Looked"]

Derivatives = tuple[NDArray[np.float64], NDArray[np.float64]]
"""The slope and the curvature at P points, ``[P]`` each."""


@dataclass(frozen=True)
class LineCurve:
    """One split at the two ends and then at the P points.

    Attributes:
        losses: The loss of each example, ``[2 + P, N]``.
        metrics: The mean of each metric, ``[2 + P]``.
    """

    losses: NDArray[Any]
    metrics: Mapping[str, NDArray[np.float64]]

    @classmethod
    def arrange(cls, parts: Sequence[Evaluation], order: Sequence[int]) -> LineCurve:
        """Puts evaluations together.

        Args:
            parts: The evaluations of the split, one behind the other.
            order: Which of their points come first, second, …: the two ends, then the P points.

        Returns:
            The curve.
        """
        losses = torch.cat([part.losses for part in parts])[order]
        metrics = {
            name: torch.cat([part.metrics[name] for part in parts])[order].numpy()
            for name in parts[0].metrics
        }
        return cls(losses.numpy(), metrics)

    @property
    def examples(self) -> int:
        """The number of examples, N."""
        return int(self.losses.shape[1])

    @cached_property
    def estimate(self) -> Estimate:
        """The estimate at the P points."""
        return Estimate.of(self.losses[2:], {n: m[2:] for n, m in self.metrics.items()})

    @property
    def means(self) -> list[float]:
        """The mean losses at the P points."""
        means: list[float] = self.estimate.mean.tolist()
        return means

    def insert(self, found: Evaluation, order: Sequence[int]) -> LineCurve:
        """Adds points.

        Args:
            found: The split there.
            order: Which of the points at hand, followed by these, come first, second, ….

        Returns:
            The curve of all of them.
        """
        places = [0, 1, *(2 + i for i in order)]
        return LineCurve(
            np.concatenate([self.losses, found.losses.numpy()])[places],
            {
                n: np.concatenate([m, found.metrics[n].numpy()])[places]
                for n, m in self.metrics.items()
            },
        )

    def replace(self, places: Sequence[int], losses: NDArray[Any]) -> LineCurve:
        """Puts more precise losses in the place of some.

        Args:
            places: Which rows of ``losses``.
            losses: The loss of each example there, float64.

        Returns:
            The curve with these.
        """
        precise = self.losses.astype(np.float64)
        precise[list(places)] = losses
        return LineCurve(precise, self.metrics)

    def extend(self, more: LineCurve) -> LineCurve:
        """Adds the examples of another block; what is paired needs the loss of each.

        Args:
            more: The same points on these.

        Returns:
            The curve of all examples.
        """
        share = more.examples / (self.examples + more.examples)
        return LineCurve(
            np.concatenate([self.losses, more.losses], axis=1),
            {n: (1 - share) * m + share * more.metrics[n] for n, m in self.metrics.items()},
        )


@dataclass(frozen=True)
class Looked:
    """What was seen of the line so far.

    Attributes:
        alphas: The P points, rising.
        curves: Each split's losses at them.
        slopes: Each split's slopes and curvatures at them, ``[P]`` each; empty where not asked for.
    """

    alphas: tuple[float, ...]
    curves: Mapping[str, LineCurve]
    slopes: Mapping[str, Derivatives]

    def add(
        self,
        alphas: Sequence[float],
        found: Mapping[str, Evaluation],
        slopes_: Mapping[str, Derivatives],
    ) -> Looked:
        """Adds points that lie between those at hand.

        Args:
            alphas: The points.
            found: Each split there.
            slopes_: Each split's slopes and curvatures there, if the others have them.

        Returns:
            What is seen then.
        """
        together = [*self.alphas, *alphas]
        order = sorted(range(len(together)), key=together.__getitem__)
        return Looked(
            tuple(together[i] for i in order),
            {name: curve.insert(found[name], order) for name, curve in self.curves.items()},
            {
                name: (
                    np.concatenate([own[0], slopes_[name][0]])[order],
                    np.concatenate([own[1], slopes_[name][1]])[order],
                )
                for name, own in self.slopes.items()
            },
        )

    def derivatives(self, split: str, alpha: float) -> dict[str, float] | None:
        """Tells the derivatives at a point.

        Args:
            split: The split.
            alpha: The point.

        Returns:
            ``slope`` and ``curvature``; None where the point was not looked at.
        """
        if alpha not in self.alphas:
            return None
        i = self.alphas.index(alpha)
        slope, curvature = self.slopes[split]
        return {"slope": float(slope[i]), "curvature": float(curvature[i])}
