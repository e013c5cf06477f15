"""Extreme eigenvalues of a symmetric operator by ARPACK's implicitly restarted Lanczos method."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from losscli.errors import ModelError, OutOfMemoryError, one_line
from losscli.evaluation.eigenvalues import Eigenpair, eigenpairs

__all__ = ["MIN_PRODUCTS", "LanczosSearch"]

MIN_PRODUCTS = 50
"""Products before a search can be trusted to have reached both ends of the spectrum. After 50 from
a random start, the probability of missing an end by more than 2 % of the spectrum's width is below
1/1000 for up to a million weights: 1.648 √n exp(−√ε (2k − 1)) (Kuczyński & Woźniakowski 1992)."""

# Most vectors in a Krylov basis, and its most bytes. It is kept in the host's memory, and once more
# while eigenvectors are computed. A larger basis saves products.
_BASIS = 100
_BASIS_BYTES = 1 << 30

# A tolerance that every Ritz pair meets: ARPACK then stops after its first basis.
_ANY = 1e100


class LanczosSearch:
    """Searches for both ends of the spectrum of a symmetric operator.

    It runs ARPACK's implicitly restarted Lanczos method (Lehoucq, Sorensen & Yang 1998, "ARPACK
    Users' Guide") through `scipy.sparse.linalg.eigsh` with ``which="BE"``. Each pair is then
    measured by one more product.

    Args:
        product: Multiplies the operator with a vector ``[n]``, float64.
        size: n.
        device: The device of the vectors.
        rounding: The rounding of a product, relative to the largest |λ|.
        tolerance: A pair has converged if ‖Hv − λv‖ is at most this share of |λ|, or the rounding.
        limit: Products after which the search ends, not counting those that measure.
    """

    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        size: int,
        device: torch.device,
        *,
        rounding: float,
        tolerance: float,
        limit: int,
    ) -> None:
        self._operator = product
        self._size = size
        self._device = device
        self._rounding = rounding
        self._tolerance = tolerance
        self._limit = limit
        self._products = 0

    def run(self, number: int, seed: int) -> list[Eigenpair]:
        """Searches for the pairs at both ends.

        Args:
            number: How many at each end.
            seed: Of the start.

        Returns:
            The pairs by ascending eigenvalue, the same number at each end: fewer than asked for,
            down to a single pair, if ``limit`` is too low; pairs of nan if H is not finite.

        Raises:
            ModelError: ARPACK fails.
            OutOfMemoryError: The basis does not fit into memory.
        """
        generator = torch.Generator().manual_seed(seed)
        start = self._random_vector(generator)
        narrowest = 4 * number + 8
        widest = max(narrowest, min(_BASIS, _BASIS_BYTES // (16 * self._size)))
        # If the whole space is not much larger, take it: then there is nothing to restart for.
        widest = self._size if self._size <= 2 * widest else widest
        # A basis takes one product more than it has vectors, and the shift takes another.
        width = min(widest, max(narrowest, MIN_PRODUCTS), self._limit - 2)
        count = 2 * max(0, min(number, (width - 1) // 2))
        vectors = start.unsqueeze(0)
        try:
            if count:
                # A single basis without restarts is often enough. The shift is about twice the
                # Frobenius norm of the Hessian.
                shift = 2 * float(self._product(start).norm()) or 1.0
                ritz = self._ritz(count, start, width, tolerance=_ANY, shift=shift, restarts=1)
                vectors = ritz if len(ritz) else vectors
            while True:
                pairs = self._measure(vectors)
                pairs.sort(key=lambda pair: pair.value)
                left = self._limit - self._products
                if all(pair.converged for pair in pairs) or left < 2 * widest:
                    return pairs
                tolerance, shift = self._arpack_tolerance([pair.value for pair in pairs])
                better = self._ritz(
                    count,
                    start,
                    widest,
                    tolerance=tolerance,
                    shift=shift,
                    restarts=(left - widest - 1) // (widest - count),
                )
                vectors = _replace(vectors, better)
                start = self._random_vector(generator)
        except _NotFiniteError:
            return self._measure(start.new_full((2 * number, self._size), math.nan))

    def _random_vector(self, generator: torch.Generator) -> Tensor:
        vector = torch.randn(self._size, generator=generator, dtype=torch.float64)
        return vector.to(self._device)

    def _product(self, v: Tensor) -> Tensor:
        self._products += 1
        return self._operator(v)

    def _measure(self, vectors: Tensor) -> list[Eigenpair]:
        trusted = self._products >= MIN_PRODUCTS
        return eigenpairs(
            self._product, vectors, self._tolerance, self._rounding, exact=False, trusted=trusted
        )

    def _arpack_tolerance(self, values: Sequence[float]) -> tuple[float, float]:
        """Expresses the tolerance in ARPACK's terms: a residual of tolerance × |λ + shift|.

        With a shift beyond the spectrum, the same residual is asked of all values: half of the
        smallest that any of them may have. ARPACK knows nothing of rounding; and without a shift
        its relative measure never lets values near zero converge, so that it returns their
        neighbours (SciPy 1.17).

        Returns:
            ARPACK's tolerance and the shift.
        """
        scale = max(map(abs, values)) or 1.0
        residual = max(self._tolerance * min(map(abs, values)), self._rounding * scale)
        return residual / 2 / (2 * scale), 2 * scale

    def _ritz(
        self,
        count: int,
        start: Tensor,
        width: int,
        *,
        tolerance: float,
        shift: float,
        restarts: int,
    ) -> Tensor:
        """Runs ARPACK on H + shift.

        Returns:
            The Ritz vectors that met the tolerance, as rows: ``count``, or fewer after so many
            restarts, each of at most one product per vector of the basis.
        """
        from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh

        n = self._size
        # If a basis is invariant, ARPACK continues with random vectors. SciPy 1.17 takes their
        # seed; older versions have one generator for the whole process.
        seed: dict[str, Any] = {"rng": 0} if "rng" in signature(eigsh).parameters else {}

        def matvec(x: NDArray[np.float64]) -> NDArray[np.float64]:
            v = torch.from_numpy(x.reshape(n)).to(self._device)
            image = self._product(v) + shift * v
            if not math.isfinite(float(image.norm())):
                raise _NotFiniteError
            return image.cpu().numpy()

        try:
            _, vectors = eigsh(
                LinearOperator((n, n), matvec=matvec, dtype=np.float64),
                count,
                which="BE",
                v0=start.cpu().numpy(),
                ncv=width,
                maxiter=restarts,
                tol=tolerance,
                **seed,
            )
        except ArpackNoConvergence as error:
            vectors = error.eigenvectors
        except ArpackError as error:
            raise ModelError(
                f"the search for eigenvalues failed: {one_line(error)}", "Try another --seed"
            ) from error
        except MemoryError as error:
            raise OutOfMemoryError(
                f"{width} vectors of {n:,} weights do not fit into memory",
                "Try fewer tensors with --only",
            ) from error
        return torch.from_numpy(np.ascontiguousarray(vectors.T)).to(self._device)


class _NotFiniteError(Exception):
    """Ends a search: a product is not finite."""


def _replace(vectors: Tensor, better: Tensor) -> Tensor:
    """Replaces the rows that are most similar to better eigenvectors by these."""
    similarity = (vectors @ better.T).square().sum(1)
    return torch.cat([better, vectors[similarity.argsort()[: max(0, len(vectors) - len(better))]]])
