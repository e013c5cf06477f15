"""Eigenvalues of a Hessian with their errors: of the whole matrix, or its extreme ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from losscli.errors import ModelError

__all__ = ["DenseHessian", "Eigenpair", "Extremes", "eigenpairs"]

_Matrix = NDArray[np.float64]

# The largest asymmetry of a Hessian, as a share of its largest eigenvalue.
_ASYMMETRY = 1e-3


@dataclass(frozen=True)
class Eigenpair:
    """An approximate eigenvalue of the Hessian.

    Attributes:
        value: λ = vᵀHv.
        error: The residual norm ‖Hv − λv‖, and at least the rounding of the forward type (√n ε
            times the largest |λ| of the search). Some eigenvalue of H lies within the error of λ if
            the rounding of Hv is no larger; `add_rounding` adds that rounding as measured.
        vector: v, of length 1, ``[n]``, float64, its largest entry positive.
        converged: Whether λ may be taken for the extreme eigenvalue. If not, the error still holds,
            but an eigenvalue further out may have been missed.
    """

    value: float
    error: float
    vector: Tensor
    converged: bool


@dataclass(frozen=True)
class Extremes:
    """The two ends of the spectrum of the Hessian.

    Attributes:
        smallest: The smallest eigenvalues, ascending.
        largest: The largest eigenvalues, descending.
        products: The number of Hessian-vector products that the search took.
        exact: Whether they were taken from the whole spectrum, so that none further out exists.
    """

    smallest: tuple[Eigenpair, ...]
    largest: tuple[Eigenpair, ...]
    products: int
    exact: bool

    def widened(self, *rounding: float) -> Extremes:
        """Adds to the error of every pair: one number for all, or one each, smallest first."""
        pairs = [*self.smallest, *self.largest]
        wider = tuple(
            replace(pair, error=pair.error + added) if math.isfinite(pair.error) else pair
            for pair, added in zip(pairs, rounding * (len(pairs) // len(rounding)), strict=True)
        )
        number = len(self.smallest)
        return replace(self, smallest=wider[:number], largest=wider[number:])


@dataclass(frozen=True)
class DenseHessian:
    """The whole Hessian.

    Attributes:
        matrix: The symmetric part of H, ``[n, n]``.
        asymmetry: The spectral norm of the antisymmetric part, which is rounding alone.
        eigenvalues: The spectrum, ``[n]``, ascending; nan if H is not finite.
        eigenvectors: The eigenvectors as columns, ``[n, n]``.
        error: The noise floor of each eigenvalue: the larger of the asymmetry and √n ε times the
            largest |λ|, with ε the rounding unit of the forward type. It excludes symmetric
            rounding, such as that of activations that cancel: see `hessian_rounding`.
    """

    matrix: _Matrix
    asymmetry: float
    eigenvalues: _Matrix
    eigenvectors: _Matrix
    error: float

    @classmethod
    def decompose(cls, rows: _Matrix, rounding: float, size: float) -> Self:
        """Computes the spectrum.

        Args:
            rows: H as computed row by row, ``[n, n]``.
            rounding: The rounding of a row, relative to the largest |λ|.
            size: |L| / ‖θ‖². Where L is constant, all |λ| are rounding, relative to this.

        Returns:
            The Hessian and its spectrum.

        Raises:
            ModelError: H is asymmetric beyond rounding, so that some second derivative is wrong.
        """
        matrix = (rows + rows.T) / 2
        if not np.isfinite(rows).all():
            values = np.full(len(rows), math.nan)
            return cls(matrix, math.nan, values, np.full_like(matrix, math.nan), math.nan)
        asymmetry = float(np.linalg.norm((rows - rows.T) / 2, 2))
        values, vectors = np.linalg.eigh(matrix)
        largest = float(np.abs(values).max())
        if asymmetry > max(_ASYMMETRY * largest, 100 * rounding * max(largest, size)):
            raise ModelError(
                f"the second derivatives of the model are wrong: its Hessian, with eigenvalues up "
                f"to {largest:.2g}, is asymmetric by {asymmetry:.2g}",
                "Write its operators with a custom backward in elementary operations",
            )
        return cls(matrix, asymmetry, values, vectors, max(asymmetry, rounding * largest))

    @property
    def shares(self) -> tuple[float, float, float]:
        """The shares of eigenvalues above ``error``, below ``-error``, and in between."""
        if math.isnan(self.error):
            return math.nan, math.nan, math.nan
        positive = float(np.mean(self.eigenvalues > self.error))
        negative = float(np.mean(self.eigenvalues < -self.error))
        undecided = float(np.mean(np.abs(self.eigenvalues) <= self.error))
        return positive, negative, undecided

    def newton_change(self, gradient: _Matrix) -> float:
        """Returns ½ gᵀH⁻¹g: the decrease of a quadratic loss from here to its critical point."""
        along = self.eigenvectors.T @ gradient
        return float(np.sum(along**2 / self.eigenvalues) / 2)


def eigenpairs(
    product: Callable[[Tensor], Tensor],
    vectors: Tensor,
    tolerance: float,
    rounding: float,
    *,
    exact: bool,
    trusted: bool,
) -> list[Eigenpair]:
    """Measures approximate eigenvectors, each by one product of its own.

    Args:
        product: Multiplies H with a vector ``[n]``, float64.
        vectors: The approximate eigenvectors, ``[K, n]``.
        tolerance: The largest residual of a converged pair, as a share of |λ|.
        rounding: The rounding of a product, relative to the largest |λ|.
        exact: Whether the vectors are those of the whole matrix: all finite pairs have converged.
        trusted: Whether pairs with a small residual may count as converged.

    Returns:
        The pairs, in the order of the vectors.
    """
    measured = []
    for vector in vectors.to(torch.float64):
        v = vector / vector.norm()
        v = v * v[v.abs().argmax()].sign()
        image = product(v)
        value = v @ image
        measured.append((v, float(value), float((image - value * v).norm())))
    floor = rounding * max(abs(value) for _, value, _ in measured)
    pairs = []
    for v, value, residual in measured:
        small = residual <= max(tolerance * abs(value), floor)
        converged = (trusted and small) or (exact and math.isfinite(residual))
        # max(nan, x) is nan, but max(x, nan) is x.
        pairs.append(Eigenpair(value, max(residual, floor), v, converged))
    return pairs
