"""Mean losses and their errors, and how many examples it takes to know them well enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from losscli.datasets import Examples
from losscli.losses import PerExample, of_mean
from losscli.objective import Evaluation
from losscli.ranks import decided
from losscli.table import Cell

__all__ = ["Estimate", "grow"]

# Examples after which a sample is first judged: fewer would make its own error a guess.
_FIRST_BLOCK = 512

_Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """Mean losses at P points on one split, from the examples seen so far.

    Attributes:
        examples: How many.
        mean: The mean losses, ``[P]``.
        squares: The sums of the squared distances from them, ``[P]``.
        metrics: The mean of each metric, ``[P]``; what a perplexity is the exponential of.
    """

    examples: int
    mean: _Numbers
    squares: _Numbers
    metrics: Mapping[str, _Numbers]

    @classmethod
    def of(cls, losses: NDArray[Any], metrics: Mapping[str, _Numbers]) -> Self:
        """Makes an estimate.

        Args:
            losses: The loss of each example at each point, ``[P, N]``.
            metrics: The mean of each metric at each point, ``[P]``.

        Returns:
            The estimate; the losses are not kept.
        """
        # Overflow to inf and inf − inf are answers here, not accidents.
        with np.errstate(all="ignore"):
            mean: _Numbers = np.mean(losses, axis=1, dtype=np.float64)
            # A row at a time, so that no float64 copy of all the losses ever exists.
            squares = [np.square(row - m).sum() for row, m in zip(losses, mean, strict=True)]
        return cls(losses.shape[1], mean, np.array(squares), metrics)

    @classmethod
    def of_evaluation(cls, evaluation: Evaluation) -> Self:
        """Makes an estimate of what an objective found.

        Args:
            evaluation: The losses and metrics.

        Returns:
            The estimate.
        """
        metrics = {name: values.numpy() for name, values in evaluation.metrics.items()}
        return cls.of(evaluation.losses.numpy(), metrics)

    @classmethod
    def join(cls, parts: Sequence[Estimate]) -> Self:
        """Lays the points of several estimates, on the same examples, one after the other.

        Args:
            parts: At least one.

        Returns:
            The estimate at all their points.
        """
        return cls(
            parts[0].examples,
            np.concatenate([part.mean for part in parts]),
            np.concatenate([part.squares for part in parts]),
            {n: np.concatenate([part.metrics[n] for part in parts]) for n in parts[0].metrics},
        )

    def extend(self, more: Estimate) -> Estimate:
        """Adds further examples (Chan, Golub & LeVeque 1983).

        Args:
            more: The same points on other examples.

        Returns:
            The estimate from both.
        """
        examples = self.examples + more.examples
        share = more.examples / examples
        with np.errstate(all="ignore"):
            apart = more.mean - self.mean
            mean = self.mean + share * apart
            squares = self.squares + more.squares + self.examples * share * np.square(apart)
        metrics = {n: (1 - share) * m + share * more.metrics[n] for n, m in self.metrics.items()}
        return Estimate(examples, mean, squares, metrics)

    @property
    def stderr(self) -> _Numbers:
        """The standard error of each mean loss, with n − 1; nan for a single example."""
        if self.examples < 2:
            return np.full(len(self.mean), math.nan)
        errors: _Numbers = np.sqrt(self.squares / (self.examples - 1) / self.examples)
        return errors

    def is_known_to(self, tolerance: float) -> bool:
        """Tells whether every standard error is below a share of the height of the means.

        Args:
            tolerance: The share.

        Returns:
            Whether more examples are not needed, or would not help.
        """
        # Where a loss is not finite, more examples do not help.
        finite = np.isfinite(self.mean)
        if not finite.any():
            return True
        height = float(np.ptp(self.mean[finite]))
        return bool((self.stderr[finite] < tolerance * height).all())

    def row(self, i: int, metrics: Mapping[str, PerExample]) -> list[Cell]:
        """Lists what is known of one point.

        Args:
            i: Which.
            metrics: The metrics to list, by their names.

        Returns:
            The loss, its standard error, and the metrics.
        """
        return [
            float(self.mean[i]),
            float(self.stderr[i]) if self.examples > 1 else None,
            *(of_mean(metric, float(self.metrics[name][i])) for name, metric in metrics.items()),
        ]


class _Grows(Protocol):
    @property
    def examples(self) -> int: ...

    def extend(self, more: Self) -> Self: ...

    def is_known_to(self, tolerance: float) -> bool: ...


_T = TypeVar("_T", bound=_Grows)


def grow(
    splits: Mapping[str, Examples],
    tolerance: float | None,
    seed: int,
    evaluate: Callable[[Mapping[str, Examples], Callable[[float], None]], Mapping[str, _T]],
    progress: Callable[[float], None] | None = None,
) -> dict[str, _T]:
    """Evaluates on whole splits, or on as many of their examples as are needed.

    Args:
        splits: The data.
        tolerance: What the standard error may be, as a share of the height of what is evaluated;
            None for all examples.
        seed: Of the order in which examples are looked at.
        evaluate: Evaluates on the splits it is given, and tells the points done so far.
        progress: Called with the points done so far, counted as if all examples were needed.

    Returns:
        What was found on each split.
    """
    tell = progress or (lambda _: None)
    if tolerance is None:
        return dict(evaluate(splits, tell))
    found: dict[str, _T] = {}
    generator = torch.Generator().manual_seed(seed)
    order = {n: s.order(generator) for n, s in splits.items()}
    size, going, looked = _FIRST_BLOCK, dict(splits), 0.0
    total = sum(map(len, splits.values()))
    while going:
        blocks = {}
        for name, split in going.items():
            seen = found[name].examples if name in found else 0
            blocks[name] = split.take(order[name][seen:size])
        share, most = sum(map(len, blocks.values())) / total, 0.0

        def further(done: float, before: float = looked, share: float = share) -> None:
            nonlocal most
            most = max(most, done)
            tell(before + share * done)

        for name, block in evaluate(blocks, further).items():
            found[name] = found[name].extend(block) if name in found else block
        left = [
            name
            for name, split in going.items()
            if size < len(split) and not found[name].is_known_to(tolerance)
        ]
        going = {name: going[name] for name in decided(left)}
        looked += share * most
        size *= 2
    return found
