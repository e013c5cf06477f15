"""Mean losses and their errors, and how many examples it takes to know them well enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from losscli.data import Examples
from losscli.evaluation.losses import PerExample
from losscli.evaluation.metrics import of_mean
from losscli.evaluation.objective import Evaluation
from losscli.evaluation.tasks import ALONE, Execution
from losscli.table import Cell
from losscli.weight_space.curve import relative

__all__ = ["Estimate", "extended", "grow"]

# Examples after which a sample is first judged: fewer would make its own error a guess.
_FIRST_BLOCK = 512

_Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """Mean losses at P points on one split, from the examples seen so far.

    With weights w the mean is the ratio Σwl/Σw, and an example's distance from the mean m is its
    residual wl − m w (Cochran 1977, "Sampling Techniques", section 6.3).

    Attributes:
        examples: How many.
        mean: The mean losses, ``[P]``.
        squares: The sums of the squared distances from them, ``[P]``.
        metrics: The mean of each metric, ``[P]``; what a perplexity is the exponential of.
        counts: Over how many examples a metric is the mean, where not over all.
        sums: What the weights add up to; None where all of them are 1.
    """

    examples: int
    mean: _Numbers
    squares: _Numbers
    metrics: Mapping[str, _Numbers]
    counts: Mapping[str, float] = field(default_factory=dict)
    sums: _Sums | None = None

    @classmethod
    def of(
        cls,
        losses: NDArray[Any],
        metrics: Mapping[str, _Numbers],
        weights: _Numbers | None = None,
        counts: Mapping[str, float] | None = None,
    ) -> Self:
        """Makes an estimate.

        Args:
            losses: The loss of each example at each point, ``[P, N]``, or a sum of multiples of
                losses; as in `Evaluation` times the example's weight over the mean weight.
            metrics: The mean of each metric at each point, ``[P]``.
            weights: The weights of the examples, ``[N]``; None where all are 1.
            counts: Over how many examples a metric is the mean, where not over all.

        Returns:
            The estimate; the losses are not kept.
        """
        own = None if weights is None else relative(weights)
        # Overflow to inf and inf − inf are answers here, not accidents.
        with np.errstate(all="ignore"):
            mean: _Numbers = np.mean(losses, axis=1, dtype=np.float64)
            # A row at a time, so that no float64 copy of all the losses ever exists.
            if weights is None or own is None:
                squares = [np.square(row - m).sum() for row, m in zip(losses, mean, strict=True)]
                return cls(losses.shape[1], mean, np.array(squares), metrics, counts or {})
            total = float(weights.sum())
            scale = total / len(weights)
            residuals = (scale * (row - m * own) for row, m in zip(losses, mean, strict=True))
            found = [(np.square(r).sum(), np.dot(r, weights)) for r in residuals]
        squared, products = np.array(found).reshape(-1, 2).T
        sums = _Sums(total, float(np.square(weights).sum()), products, int((weights > 0).sum()))
        return cls(losses.shape[1], mean, squared, metrics, counts or {}, sums)

    @classmethod
    def of_evaluation(cls, evaluation: Evaluation) -> Self:
        """Makes an estimate of what an objective found.

        Args:
            evaluation: The losses and metrics.

        Returns:
            The estimate.
        """
        metrics = {name: values.numpy() for name, values in evaluation.metrics.items()}
        weights = None if evaluation.weights is None else evaluation.weights.numpy()
        return cls.of(evaluation.losses.numpy(), metrics, weights, evaluation.counts)

    @classmethod
    def join(cls, parts: Sequence[Estimate]) -> Self:
        """Lays the points of several estimates, on the same examples, one after the other.

        Args:
            parts: At least one.

        Returns:
            The estimate at all their points.
        """
        first = parts[0]
        products = [part.sums.products for part in parts if part.sums is not None]
        return cls(
            first.examples,
            np.concatenate([part.mean for part in parts]),
            np.concatenate([part.squares for part in parts]),
            {n: np.concatenate([part.metrics[n] for part in parts]) for n in first.metrics},
            first.counts,
            first.sums and replace(first.sums, products=np.concatenate(products)),
        )

    def extend(self, more: Estimate) -> Estimate:
        """Adds further examples (Chan, Golub & LeVeque 1983).

        Args:
            more: The same points on other examples.

        Returns:
            The estimate from both.
        """
        examples = self.examples + more.examples
        metrics, counts = extended(self, more)
        if self.sums is not None or more.sums is not None:
            return self._extend_weighted(more, metrics, counts)
        share = more.examples / examples
        with np.errstate(all="ignore"):
            apart = more.mean - self.mean
            mean = self.mean + share * apart
            squares = self.squares + more.squares + self.examples * share * np.square(apart)
        return Estimate(examples, mean, squares, metrics, counts)

    def _extend_weighted(
        self, more: Estimate, metrics: Mapping[str, _Numbers], counts: Mapping[str, float]
    ) -> Estimate:
        parts = [(part, part.sums or _Sums.of_ones(part)) for part in (self, more)]
        total = sum(sums.total for _, sums in parts)
        # What no target counts in says nothing of the mean.
        parts = [(part, sums) for part, sums in parts if sums.total] or parts[:1]
        squares, products = np.zeros_like(self.mean), np.zeros_like(self.mean)
        with np.errstate(all="ignore"):
            mean = sum((s.total / (total or 1) * part.mean for part, s in parts), start=0 * squares)
            for part, s in parts:
                # From the residuals by the own mean to those by the mean of both.
                shift = part.mean - mean
                squares += part.squares + 2 * shift * s.products + np.square(shift) * s.squares
                products += s.products + shift * s.squares
        sums = _Sums(
            total,
            sum(s.squares for _, s in parts),
            products,
            sum(s.number for _, s in parts),
        )
        examples = self.examples + more.examples
        return Estimate(examples, mean, squares, metrics, counts, sums)

    @property
    def stderr(self) -> _Numbers:
        """The standard error of each mean loss, with n − 1; nan for a single example.

        Examples without weight are not among the n.
        """
        number = self.examples if self.sums is None else self.sums.number
        if number < 2:
            return np.full(len(self.mean), math.nan)
        errors: _Numbers = np.sqrt(self.squares / (number - 1) / number)
        return errors if self.sums is None else errors * (number / self.sums.total)

    def is_known_to(self, tolerance: float) -> bool:
        """Tells whether every standard error is below a share of the height of the means.

        Args:
            tolerance: The share.

        Returns:
            Whether more examples are not needed, or would not help.
        """
        if self.sums is not None and not self.sums.total:
            return False
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


@dataclass(frozen=True)
class _Sums:
    """What the weights w of examples add up to.

    Attributes:
        total: Σw.
        squares: Σw².
        products: At each point the sum of the residuals times w, ``[P]``.
        number: How many are not 0.
    """

    total: float
    squares: float
    products: _Numbers
    number: int

    @classmethod
    def of_ones(cls, estimate: Estimate) -> Self:
        number = estimate.examples
        return cls(number, number, np.zeros_like(estimate.mean), number)


class _Counted(Protocol):
    @property
    def examples(self) -> int: ...

    @property
    def metrics(self) -> Mapping[str, _Numbers]: ...

    @property
    def counts(self) -> Mapping[str, float]: ...


def extended(own: _Counted, more: _Counted) -> tuple[dict[str, _Numbers], dict[str, float]]:
    """Adds the metrics of further examples.

    Args:
        own: The metrics so far.
        more: Those on other examples.

    Returns:
        The means of the metrics over both; and over how many examples they are, where not all.
    """
    metrics, counts = {}, {}
    for name, mean in own.metrics.items():
        one, other = own.counts.get(name, own.examples), more.counts.get(name, more.examples)
        share = other / ((one + other) or 1)
        # The mean over no examples is not a number.
        values = [(1 - share, mean, one), (share, more.metrics[name], other)]
        known = [part * value for part, value, number in values if number]
        metrics[name] = sum(known[1:], start=known[0]) if known else mean
        if name in own.counts or name in more.counts:
            counts[name] = one + other
    return metrics, counts


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
    evaluate: Callable[[Mapping[str, Examples], Execution], Mapping[str, _T]],
    execution: Execution = ALONE,
) -> dict[str, _T]:
    """Evaluates on whole splits, or on as many of their examples as are needed.

    Args:
        splits: The data.
        tolerance: What the standard error may be, as a share of the height of what is evaluated;
            None for all examples.
        seed: Of the order in which examples are looked at.
        evaluate: Evaluates on the splits it is given.
        execution: How that is executed. Progress is counted as if all examples were needed.

    Returns:
        What was found on each split.
    """
    if tolerance is None:
        return dict(evaluate(splits, execution))
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
            execution.tell(before + share * done)

        own = replace(execution, progress=further)
        for name, block in evaluate(blocks, own).items():
            found[name] = found[name].extend(block) if name in found else block
        left = [
            name
            for name, split in going.items()
            if size < len(split) and not found[name].is_known_to(tolerance)
        ]
        going = {name: going[name] for name in execution.decide(left)}
        looked += share * most
        size *= 2
    return found
