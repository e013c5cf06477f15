"""Collects the losses and metrics of a batch at the points of a slice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from losscli.data import Nest
from losscli.evaluation.forward import ScoredModel, mean_over_seeds, scores_in
from losscli.evaluation.losses.built_in import PerExample, causal_lm, function_of, options_of
from losscli.evaluation.losses.example_weights import weights_of
from losscli.evaluation.losses.metrics import perplexity

__all__ = ["OutputCollector", "join_weights"]


class OutputCollector:
    """Collects the losses and the sums of the metrics of one batch.

    Args:
        model: The model with its loss and metrics.
        targets: The targets of the batch, ``[B, …]``, or a nest of them.
        losses: Receives its losses, ``[P, B]``.
        sums: Receives the sums of its metrics, ``[P]`` each; and those of the losses of each of S
            seeds, ``[P, S]``, under None.
        weighs: Whether to compute the weights of the examples.

    Attributes:
        weights: The weights of its examples in the mean of each metric by name, and of the loss
            under None; the same at every point.
    """

    def __init__(
        self,
        model: ScoredModel,
        targets: Nest,
        losses: Tensor,
        sums: Mapping[str | None, Tensor],
        *,
        weighs: bool = True,
    ) -> None:
        self._model = model
        self._targets = targets
        self._losses = losses
        self._sums = sums
        self._weighs = weighs
        self.weights: dict[str | None, Tensor | None] = {}

    def one(self, p: int, outputs: Any) -> None:
        """Records the outputs at one point."""
        if p == 0 and self._weighs:
            self._compute_weights(outputs)
        for name, values in self._all_values(self._values, outputs):
            if name is None:
                self._losses[p] = mean_over_seeds(values)
            if name in self._sums:
                sums = values.to(self._sums[name].dtype).sum(1)
                self._sums[name][p] = sums if name is None else mean_over_seeds(sums)

    def all(self, outputs: Any) -> None:
        """Records the outputs at all points."""
        scores = scores_in(outputs)
        self._compute_weights(scores[0] if isinstance(scores, Tensor) else outputs)
        for name, values in self._all_values(self._mapped, outputs):
            if name is None:
                self._losses[:] = mean_over_seeds(values, 1)
            else:
                sums = values.to(self._sums[name].dtype).sum(2)
                self._sums[name][:] = mean_over_seeds(sums, 1)

    def _compute_weights(self, outputs: Any) -> None:
        functions: dict[str | None, PerExample] = {None: self._model.loss}
        functions.update(self._model.metrics)
        for name, function in functions.items():
            if self._model.batch_loss:
                # Every batch has the same weight.
                self.weights[name] = None
                continue
            self.weights[name] = weights_of(function, scores_in(outputs), self._targets)

    def _all_values(
        self, take: Callable[[PerExample, str, Any], Tensor], outputs: Any
    ) -> Iterator[tuple[str | None, Tensor]]:
        """Computes the loss, under the name None, and every metric."""
        loss = take(self._model.loss, "loss", outputs)
        yield None, loss
        for name, function in self._model.metrics.items():
            # A perplexity with the options of the loss is that loss: not computed twice.
            own, loss_of = function_of(function), self._model.loss
            same = own is perplexity and function_of(loss_of) is causal_lm
            same &= options_of(function) == options_of(loss_of)
            yield name, loss if same else take(function, f"metric {name!r}", outputs)

    def _values(self, function: PerExample, what: str, outputs: Any) -> Tensor:
        return self._model.per_seed(function, outputs, self._targets, what)

    def _mapped(self, function: PerExample, what: str, outputs: Any) -> Tensor:
        mapped: Tensor = vmap(partial(self._values, function, what))(outputs)
        return mapped


def join_weights(
    batches: Sequence[Mapping[str | None, Tensor | None]], name: str | None
) -> Tensor | None:
    """Concatenates the weights of the examples of all batches; None if all are 1."""
    parts = [weights for batch in batches if (weights := batch[name]) is not None]
    if not parts:
        return None
    weights = torch.cat(parts).cpu().double()
    return None if bool((weights == 1).all()) else weights
