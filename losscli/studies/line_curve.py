"""The losses of each example on a line, to which points can be added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from losscli.evaluation.objective import Evaluation
from losscli.evaluation.sampling import Estimate, combine_metrics
from losscli.results.summaries import Slope

__all__ = ["Derivatives", "LineCurve", "RefinedCurve"]

Derivatives = tuple[NDArray[np.float64], NDArray[np.float64]]
"""The slope and the curvature at P points, ``[P]`` each."""


@dataclass(frozen=True)
class LineCurve:
    """One split at the two ends and then at the P points.

    Attributes:
        losses: The loss of each example, ``[2 + P, N]``, as in `Evaluation`.
        metrics: The mean of each metric, ``[2 + P]``.
        weights: The weights of the examples, ``[N]``; None where all are 1.
        counts: Over how many examples a metric is the mean, where not over all.
    """

    losses: NDArray[Any]
    metrics: Mapping[str, NDArray[np.float64]]
    weights: NDArray[np.float64] | None = None
    counts: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def arrange(cls, parts: Sequence[Evaluation], order: Sequence[int]) -> LineCurve:
        """Puts evaluations together.

        Args:
            parts: The evaluations of the split.
            order: The indices of their points in the curve: the two ends, then the P points.

        Returns:
            The curve.
        """
        losses = torch.cat([part.losses for part in parts])[order]
        metrics = {
            name: torch.cat([part.metrics[name] for part in parts])[order].numpy()
            for name in parts[0].metrics
        }
        weights = parts[0].weights
        own = None if weights is None else weights.numpy()
        return cls(losses.numpy(), metrics, own, parts[0].counts)

    @property
    def examples(self) -> int:
        """The number of examples, N."""
        return int(self.losses.shape[1])

    @cached_property
    def estimate(self) -> Estimate:
        """The estimate at the P points."""
        metrics = {n: m[2:] for n, m in self.metrics.items()}
        return Estimate.of(self.losses[2:], metrics, self.weights, self.counts)

    @property
    def means(self) -> list[float]:
        """The mean losses at the P points."""
        means: list[float] = self.estimate.mean.tolist()
        return means

    def insert(self, found: Evaluation, order: Sequence[int]) -> LineCurve:
        """Adds points.

        Args:
            found: The split there.
            order: The order of the present points followed by these.

        Returns:
            The curve of all of them.
        """
        places = [0, 1, *(2 + i for i in order)]
        return replace(
            self,
            losses=np.concatenate([self.losses, found.losses.numpy()])[places],
            metrics={
                n: np.concatenate([m, found.metrics[n].numpy()])[places]
                for n, m in self.metrics.items()
            },
        )

    def replace(self, places: Sequence[int], losses: NDArray[Any]) -> LineCurve:
        """Replaces some losses by more precise ones.

        Args:
            places: Which rows of ``losses``.
            losses: The loss of each example there, float64.

        Returns:
            The curve with these.
        """
        precise = self.losses.astype(np.float64)
        precise[list(places)] = losses
        return replace(self, losses=precise)

    def extend(self, more: LineCurve) -> LineCurve:
        """Adds the examples of another block of the data.

        Args:
            more: The same points on these examples.

        Returns:
            The curve of all examples.
        """
        metrics, counts = combine_metrics(self, more)
        parts = [(curve.losses, curve.weights) for curve in (self, more)]
        if self.weights is None and more.weights is None:
            joined = np.concatenate([losses for losses, _ in parts], axis=1)
            return LineCurve(joined, metrics, None, counts)
        weights = [np.ones(losses.shape[1]) if w is None else w for losses, w in parts]
        together = np.concatenate(weights)
        # The losses of a block are divided by its own mean weight; if that is 0, they are NaN.
        scaled = [
            losses * losses.dtype.type(own.mean() / together.mean())
            if own.any()
            else np.zeros_like(losses)
            for (losses, _), own in zip(parts, weights, strict=True)
        ]
        return LineCurve(np.concatenate(scaled, axis=1), metrics, together, counts)


@dataclass(frozen=True)
class RefinedCurve:
    """A line with the points evaluated so far.

    Attributes:
        alphas: The P points, in ascending order.
        curves: Each split's losses at them.
        slopes: Each split's slopes and curvatures at them, ``[P]`` each; empty if not computed.
    """

    alphas: tuple[float, ...]
    curves: Mapping[str, LineCurve]
    slopes: Mapping[str, Derivatives]

    def add(
        self,
        alphas: Sequence[float],
        found: Mapping[str, Evaluation],
        slopes_: Mapping[str, Derivatives],
    ) -> RefinedCurve:
        """Adds points between the present ones.

        Args:
            alphas: The points.
            found: Each split there.
            slopes_: Each split's slopes and curvatures there, if the others have them.

        Returns:
            The line with all points.
        """
        together = [*self.alphas, *alphas]
        order = sorted(range(len(together)), key=together.__getitem__)
        return RefinedCurve(
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

    def derivatives(self, split: str, alpha: float) -> Slope | None:
        """Returns the derivatives at a point.

        Args:
            split: The split.
            alpha: The point.

        Returns:
            ``slope`` and ``curvature``; None if the point was not evaluated.
        """
        if alpha not in self.alphas:
            return None
        i = self.alphas.index(alpha)
        slope, curvature = self.slopes[split]
        return {"slope": float(slope[i]), "curvature": float(curvature[i])}
