"""Lines along which one block of a network moves while the others stay at A.

After Adilova et al. 2024, arXiv 2307.06966: where two solutions have a barrier between them, the
lines on which a single layer moves often have none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from losscli.errors import UsageError
from losscli.evaluation.objective import Evaluation, Objective
from losscli.evaluation.sampling import Estimate
from losscli.results.summaries import BlockSplit, Height
from losscli.weight_space.blocks import blocks_of
from losscli.weight_space.curve import lowest

__all__ = ["Block", "BlockCurve", "blocks_among", "moving_blocks", "points_of"]


@dataclass(frozen=True)
class Block:
    """A part of a network that moves on its own.

    Attributes:
        name: The name of its module.
        moving: The names of its tensors that move.
    """

    name: str
    moving: tuple[str, ...]


def blocks_among(objective: Objective, moving: Sequence[str]) -> tuple[Block, ...]:
    """Sorts tensors into the blocks of a model.

    Args:
        objective: The objective with the model.
        moving: The names of the tensors that move.

    Returns:
        The blocks with such tensors, in the order of the model.
    """
    block = blocks_of(objective.model, objective.tensors)
    # A tied tensor moves under its last name; its block is that of its first name.
    found: dict[str, list[str]] = {name: [] for name in block.values()}
    for name in moving:
        found[block[name]].append(name)
    return tuple(
        Block(name, tuple(names))
        for name, names in found.items()
        if any(objective.tensors[n].numel() for n in names)
    )


def moving_blocks(objective: Objective, moving: Sequence[str]) -> tuple[Block, ...]:
    """Finds the blocks of a model that have something to move.

    Args:
        objective: The objective with the model.
        moving: The names of the tensors that move.

    Returns:
        The blocks, in the order of the model.

    Raises:
        UsageError: There are not two of them.
    """
    blocks = blocks_among(objective, moving)
    if len(blocks) < 2:
        what = f"one block to move, {blocks[0].name}" if blocks else "no block that moves"
        raise UsageError(
            f"--layerwise finds {what}, and compares blocks",
            "Leave it out, or choose parts of the network with --only",
        )
    return blocks


def points_of(alphas: Iterable[float]) -> list[float]:
    """Lists the points that are evaluated for each block.

    Args:
        alphas: The points of the line.

    Returns:
        All but α = 0, where every block is at A; and α = 1 in any case.
    """
    return sorted({*alphas, 1.0} - {0.0})


@dataclass(frozen=True)
class BlockCurve:
    """One split on the line of one block, at the P points and then at α = 1.

    The losses of examples are not kept: there are as many curves as blocks.

    Attributes:
        losses: The losses, ``[P + 1]``.
        changes: Their differences from the loss at A, paired over examples.
        excesses: Their heights above the chord from A to α = 1, paired over examples.
    """

    losses: Estimate
    changes: Estimate
    excesses: Estimate

    @classmethod
    def of(cls, alphas: Sequence[float], at_a: Evaluation, found: Evaluation) -> Self:
        """Makes the curve from what was evaluated.

        Args:
            alphas: The P points of the line.
            at_a: The evaluation at A, P = 1.
            found: That at the points of `points_of`.

        Returns:
            The curve.
        """
        place = {alpha: 1 + i for i, alpha in enumerate(points_of(alphas))} | {0.0: 0}
        order = [*alphas, 1.0]
        a = at_a.losses[0].double().numpy()
        end = found.losses[place[1.0] - 1].double().numpy()
        weights = None if at_a.weights is None else at_a.weights.numpy()
        parts = []
        for alpha in order:
            k = place[alpha]
            source, row = (found, k - 1) if k else (at_a, 0)
            losses = source.losses[row].double().numpy()
            metrics = {
                name: values[row : row + 1].numpy() for name, values in source.metrics.items()
            }
            # inf − inf is expected.
            with np.errstate(all="ignore"):
                chord = (1 - alpha) * a + alpha * end
                rows = losses, losses - a, losses - chord
            parts.append([
                Estimate.of(rows[0][None], metrics, weights, at_a.counts),
                *(Estimate.of(row[None], {}, weights) for row in rows[1:]),
            ])
        return cls(*map(Estimate.join, zip(*parts, strict=True)))

    def extend(self, more: BlockCurve) -> BlockCurve:
        """Adds further examples.

        Args:
            more: The same points on other examples.

        Returns:
            The curve from both.
        """
        return BlockCurve(
            self.losses.extend(more.losses),
            self.changes.extend(more.changes),
            self.excesses.extend(more.excesses),
        )

    def describe(self, alphas: Sequence[float]) -> BlockSplit:
        """Describes the curve.

        Args:
            alphas: The P points, in ascending order.

        Returns:
            ``loss_at_1``, the loss with only this block from B, and ``change``, its difference from
            the loss at A; ``minimum``, the lowest point, with ``ties``, the number of points with
            that loss, and ``below_a``, how much it is below A; ``barrier``, the largest height
            above the chord over 0 ≤ α ≤ 1, None if no point between the ends was evaluated or the
            loss at an end is not finite; ``not_finite``, the number of points without a finite
            loss.
        """
        means, end = self.losses.mean, len(alphas)
        change, change_stderr = self.changes.mean, self.changes.stderr
        finite = [i for i in range(end) if math.isfinite(means[i])]
        shared = lowest(means[:end].tolist())
        return {
            "loss_at_1": float(means[end]),
            "change": float(change[end]),
            "change_stderr": float(change_stderr[end]),
            "minimum": None
            if not shared
            else {
                "alpha": alphas[shared[0]],
                "loss": float(means[shared[0]]),
                "ties": len(shared),
                "below_a": float(-change[shared[0]]),
                "below_a_stderr": float(change_stderr[shared[0]]),
            },
            "barrier": self._barrier(alphas),
            "not_finite": end - len(finite),
        }

    def _barrier(self, alphas: Sequence[float]) -> Height | None:
        between = [i for i, alpha in enumerate(alphas) if 0 < alpha < 1]
        # Heights are not finite if the loss at an end is not.
        heights: NDArray[np.float64] = self.excesses.mean
        finite = [i for i in between if math.isfinite(heights[i])]
        if not between or not math.isfinite(self.changes.mean[len(alphas)]):
            return None
        top = max(finite, key=lambda i: heights[i], default=None)
        if top is None or heights[top] <= 0:
            return {"height": 0.0, "stderr": 0.0, "alpha": 0.0}
        stderr = float(self.excesses.stderr[top])
        return {"height": float(heights[top]), "stderr": stderr, "alpha": alphas[top]}
