"""Mean losses and their standard errors, from all examples or from as many as are needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from losscli.data import Examples
from losscli.evaluation.losses.built_in import PerExample
from losscli.evaluation.losses.metrics import of_mean
from losscli.evaluation.objective import Evaluation
from losscli.evaluation.tasks import ALONE, Execution
from losscli.table import Cell
from losscli.weight_space.curve import relative

__all__ = ["Estimate", "Sampled", "combine_metrics", "evaluate_until_precise", "sample_order"]

# The first sample: from fewer examples the standard error itself would be too uncertain.
_FIRST_BLOCK = 512

# The same of whole batches, which are fewer: the standard error of 64 is known to 9 %.
_FIRST_BATCHES = 64

_Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """Mean losses at P points on one split, estimated from a sample of examples.

    With weights w the mean is the ratio Σwl/Σw, and an example's distance from the mean m is its
    residual wl − m w (Cochran 1977, "Sampling Techniques", section 6.3).

    Attributes:
        examples: The number of examples.
        mean: The mean losses, ``[P]``.
        squares: The sums of the squared distances from the mean, ``[P]``.
        metrics: The mean of each metric, ``[P]``; for a perplexity that of its logarithm.
        counts: The number of examples that a metric is averaged over, if not all.
        sums: Sums of the weights; None if all of them are 1.
    """

    examples: int
    mean: _Numbers
    squares: _Numbers
    metrics: Mapping[str, _Numbers]
    counts: Mapping[str, float] = field(default_factory=dict)
    sums: _WeightSums | None = None

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
            losses: The loss of each example at each point, ``[P, N]``, or a linear combination of
                losses; as in `Evaluation` times the example's weight over the mean weight.
            metrics: The mean of each metric at each point, ``[P]``.
            weights: The weights of the examples, ``[N]``; None if all are 1.
            counts: The number of examples that a metric is averaged over, if not all.

        Returns:
            The estimate; the losses are not kept.
        """
        own = None if weights is None else relative(weights)
        # Overflow and inf − inf are legitimate results here.
        with np.errstate(all="ignore"):
            mean: _Numbers = np.mean(losses, axis=1, dtype=np.float64)
            # Row by row, so that there is no float64 copy of all losses.
            if weights is None or own is None:
                squares = [np.square(row - m).sum() for row, m in zip(losses, mean, strict=True)]
                return cls(losses.shape[1], mean, np.array(squares), metrics, counts or {})
            total = float(weights.sum())
            scale = total / len(weights)
            residuals = (scale * (row - m * own) for row, m in zip(losses, mean, strict=True))
            pairs = [(np.square(r).sum(), np.dot(r, weights)) for r in residuals]
        squared, products = np.array(pairs).reshape(-1, 2).T
        number = int((weights > 0).sum())
        sums = _WeightSums(total, float(np.square(weights).sum()), products, number)
        return cls(losses.shape[1], mean, squared, metrics, counts or {}, sums)

    @classmethod
    def of_evaluation(cls, evaluation: Evaluation) -> Self:
        """Makes an estimate from the losses and metrics of an evaluation."""
        metrics = {name: values.numpy() for name, values in evaluation.metrics.items()}
        weights = None if evaluation.weights is None else evaluation.weights.numpy()
        return cls.of(evaluation.losses.numpy(), metrics, weights, evaluation.counts)

    @classmethod
    def join(cls, parts: Sequence[Estimate]) -> Self:
        """Concatenates the points of several estimates from the same examples."""
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
        """Adds the same points on other examples (Chan, Golub & LeVeque 1983)."""
        examples = self.examples + more.examples
        metrics, counts = combine_metrics(self, more)
        if self.sums is not None or more.sums is not None:
            return self._extend_weighted(more, metrics, counts)
        share = more.examples / examples
        with np.errstate(all="ignore"):
            difference = more.mean - self.mean
            mean = self.mean + share * difference
            squares = self.squares + more.squares + self.examples * share * np.square(difference)
        return Estimate(examples, mean, squares, metrics, counts)

    def _extend_weighted(
        self, more: Estimate, metrics: Mapping[str, _Numbers], counts: Mapping[str, float]
    ) -> Estimate:
        parts = [(part, part.sums or _WeightSums.of_ones(part)) for part in (self, more)]
        total = sum(sums.total for _, sums in parts)
        # A part with ignored targets only does not contribute to the mean.
        parts = [(part, sums) for part, sums in parts if sums.total] or parts[:1]
        squares, products = np.zeros_like(self.mean), np.zeros_like(self.mean)
        with np.errstate(all="ignore"):
            mean = sum((s.total / (total or 1) * part.mean for part, s in parts), start=0 * squares)
            for part, s in parts:
                # From residuals around the part's mean to those around the common mean.
                shift = part.mean - mean
                squares += part.squares + 2 * shift * s.products + np.square(shift) * s.squares
                products += s.products + shift * s.squares
        sums = _WeightSums(
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

        n does not include examples of weight 0.
        """
        number = self.examples if self.sums is None else self.sums.number
        if number < 2:
            return np.full(len(self.mean), math.nan)
        errors: _Numbers = np.sqrt(self.squares / (number - 1) / number)
        return errors if self.sums is None else errors * (number / self.sums.total)

    def is_known_to(self, tolerance: float) -> bool:
        """Whether every standard error is below a share of the range of the means."""
        if self.sums is not None and not self.sums.total:
            return False
        # More examples do not make a loss finite.
        finite = np.isfinite(self.mean)
        if not finite.any():
            return True
        height = float(np.ptp(self.mean[finite]))
        return bool((self.stderr[finite] < tolerance * height).all())

    def row(self, i: int, metrics: Mapping[str, PerExample]) -> list[Cell]:
        """Returns the cells of a table for a point: the loss, its standard error, the metrics."""
        return [
            float(self.mean[i]),
            float(self.stderr[i]) if self.examples > 1 else None,
            *(of_mean(metric, float(self.metrics[name][i])) for name, metric in metrics.items()),
        ]


@dataclass(frozen=True)
class _WeightSums:
    """Sums over the weights w of examples.

    Attributes:
        total: Σw.
        squares: Σw².
        products: Σ residual · w at each point, ``[P]``.
        number: The number of weights that are not 0.
    """

    total: float
    squares: float
    products: _Numbers
    number: int

    @classmethod
    def of_ones(cls, estimate: Estimate) -> Self:
        number = estimate.examples
        return cls(number, number, np.zeros_like(estimate.mean), number)


class _HasMetrics(Protocol):
    @property
    def examples(self) -> int: ...

    @property
    def metrics(self) -> Mapping[str, _Numbers]: ...

    @property
    def counts(self) -> Mapping[str, float]: ...


def combine_metrics(
    own: _HasMetrics, more: _HasMetrics
) -> tuple[dict[str, _Numbers], dict[str, float]]:
    """Combines the metrics of two sets of examples.

    Args:
        own: The metrics on one set.
        more: The metrics on the other set.

    Returns:
        The means over both sets; and the numbers of examples that they are averaged over, if not
        all.
    """
    metrics, counts = {}, {}
    for name, mean in own.metrics.items():
        one, other = own.counts.get(name, own.examples), more.counts.get(name, more.examples)
        share = other / ((one + other) or 1)
        # The mean over no examples is nan.
        values = [(1 - share, mean, one), (share, more.metrics[name], other)]
        known = [part * value for part, value, number in values if number]
        metrics[name] = sum(known[1:], start=known[0]) if known else mean
        if name in own.counts or name in more.counts:
            counts[name] = one + other
    return metrics, counts


class _Extendable(Protocol):
    @property
    def examples(self) -> int: ...

    def extend(self, more: Self) -> Self: ...

    def is_known_to(self, tolerance: float) -> bool: ...


Sampled = TypeVar("Sampled", bound=_Extendable)


def sample_order(splits: Mapping[str, Examples], seed: int) -> dict[str, torch.Tensor]:
    """Draws the order in which the examples of each split are evaluated, as indices."""
    generator = torch.Generator().manual_seed(seed)
    return {name: split.order(generator) for name, split in splits.items()}


def evaluate_until_precise(
    splits: Mapping[str, Examples],
    tolerance: float | None,
    seed: int,
    evaluate: Callable[[Mapping[str, Examples], Execution], Mapping[str, Sampled]],
    execution: Execution = ALONE,
) -> dict[str, Sampled]:
    """Evaluates whole splits, or as many of their examples as a standard error needs.

    Args:
        splits: The data.
        tolerance: The largest standard error, as a share of the range of the mean losses; None
            evaluates all examples.
        seed: Of the order in which examples are drawn.
        evaluate: Evaluates the given splits.
        execution: How that is executed. Progress is counted as if all examples were needed.

    Returns:
        The result on each split.
    """
    if tolerance is None:
        return dict(evaluate(splits, execution))
    results: dict[str, Sampled] = {}
    order = sample_order(splits, seed)
    in_batches = any(split.in_batches for split in splits.values())
    size, remaining, done_before = _FIRST_BATCHES if in_batches else _FIRST_BLOCK, dict(splits), 0.0
    total = sum(map(len, splits.values()))
    while remaining:
        blocks = {}
        for name, split in remaining.items():
            used = results[name].examples if name in results else 0
            blocks[name] = split.take(order[name][used:size])
        share, most = sum(map(len, blocks.values())) / total, 0.0

        def progress(done: float, before: float = done_before, share: float = share) -> None:
            nonlocal most
            most = max(most, done)
            execution.report(before + share * done)

        for name, block in evaluate(blocks, replace(execution, progress=progress)).items():
            results[name] = results[name].extend(block) if name in results else block
        imprecise = [
            name
            for name, split in remaining.items()
            if size < len(split) and not results[name].is_known_to(tolerance)
        ]
        remaining = {name: remaining[name] for name in execution.decide(imprecise)}
        done_before += share * most
        size *= 2
    return results
