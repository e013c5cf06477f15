"""Lines and planes through weight space: points as coordinates on axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import torch
from torch import Tensor

from losscli.errors import UsageError
from losscli.weights import Weights

__all__ = ["Line", "Slice", "grid"]


# Farther out, products with weights leave the range of float32.
_FAR = 1e30


class Slice(Protocol):
    """An affine family of points in weight space, θ(c) for coordinates c.

    Every tensor of θ(c), and so everything that is affine in the tensors of θ(c), is one and the
    same combination of its values at the slice's ends. `combine` is that combination; it serves
    the weights and the outputs of first layers alike.
    """

    @property
    def ends(self) -> tuple[Weights, ...]:
        """The moving tensors that span the slice."""

    @property
    def barycentric(self) -> bool:
        """Whether the combination's coefficients sum to one: what all ends share stays as it is."""

    def combine(
        self, values: Sequence[Tensor], coordinates: Sequence[float], out: Tensor | None = None
    ) -> Tensor:
        """Combines the values at the ends into the value at a point.

        Args:
            values: One tensor for each end, all of one shape and type.
            coordinates: The point.
            out: Where to write the result, of the same shape and type.

        Returns:
            The value at the point.
        """


@dataclass(frozen=True)
class Line:
    """θ(α) = A + α (B − A), exact at both ends (Goodfellow et al. 2015, arXiv 1412.6544).

    Attributes:
        a: The moving tensors at α = 0.
        b: Those at α = 1, of the same names and shapes.
    """

    a: Weights
    b: Weights

    @property
    def ends(self) -> tuple[Weights, Weights]:
        """A and B."""
        return self.a, self.b

    @property
    def barycentric(self) -> bool:
        """Its coefficients are 1 − α and α."""
        return True

    def combine(
        self, values: Sequence[Tensor], coordinates: Sequence[float], out: Tensor | None = None
    ) -> Tensor:
        """Combines the values at A and B into the value at α.

        It works from the nearer end. That makes it exact at both, whatever they hold, and makes
        the line from B to A the mirror of the line from A to B, to the last bit.

        Args:
            values: The value at A and the value at B.
            coordinates: α.
            out: Where to write the result.

        Returns:
            (1 − α) values[0] + α values[1].
        """
        a, b = values
        (alpha,) = coordinates
        if alpha > 0.5:
            a, b, alpha = b, a, 1 - alpha
        if alpha == 0:
            return a.clone() if out is None else out.copy_(a)
        if alpha == 0.5:
            # Both ends are as near, and neither may come first.
            return torch.mul(a, 0.5, out=out).add_(b, alpha=0.5)
        return torch.lerp(a, b, alpha, out=out)


def grid(points: int, low: float, high: float, *, include: Sequence[float] = ()) -> list[float]:
    """Spaces coordinates evenly.

    Args:
        points: How many.
        low: The first.
        high: The last.
        include: Values to have among them, where they lie in the range, beside the even ones.

    Returns:
        The coordinates in rising order, each the float nearest to its exact value, so that a step
        of a twentieth gives 0.15 and not 0.15000000000000002.

    Raises:
        UsageError: There are no points, or the range is empty, reversed or not finite.
    """
    if points < 1:
        raise UsageError(f"--points {points} leaves nothing to evaluate", "Give 1 or more")
    try:
        first, last = Fraction(repr(float(low))), Fraction(repr(float(high)))
    except ValueError:
        raise UsageError(f"--range {low} {high} is not finite", "Give two numbers") from None
    if max(abs(first), abs(last)) > _FAR:
        raise UsageError(f"--range {low} {high} is beyond what float32 can hold")
    if first >= last:
        raise UsageError(
            f"--range {low} {high} is {'empty' if first == last else 'reversed'}",
            "Give the lower end first",
        )
    step = (last - first) / max(points - 1, 1)
    even = {float(first + i * step) for i in range(points)}
    return sorted(even | {float(x) for x in include if low <= x <= high})
