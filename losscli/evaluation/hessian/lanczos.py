"""Extreme eigenvalues of a symmetric operator by the thick-restart Lanczos method."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from losscli.errors import OutOfMemoryError
from losscli.evaluation.hessian.eigenvalues import Eigenpair, eigenpairs

__all__ = ["MIN_PRODUCTS", "LanczosSearch"]

MIN_PRODUCTS = 50
"""Products before a search can be trusted to have reached both ends of the spectrum. After 50 from
a random start, the probability of missing an end by more than 2 % of the spectrum's width is below
1/1000 for up to a million weights: 1.648 √n exp(−√ε (2k − 1)) (Kuczyński & Woźniakowski 1992)."""

# Most vectors in a Krylov basis, and its most bytes. A larger basis saves products, but each takes
# longer to orthogonalise. A basis of more bytes, for many pairs of a large network, is kept in the
# host's memory.
_BASIS = 100
_BASIS_BYTES = 1 << 30

# A vector is orthogonalised again if less than this share of its norm is left (Daniel, Gragg,
# Kaufman & Stewart 1976, Mathematics of Computation 30).
_CANCELLED = math.sqrt(0.5)

# A product with this share of its norm left is a combination of the basis, apart from rounding.
_VANISHED = 1e-14

# Columns of a basis that are replaced at once.
_COLUMNS = 1 << 16


class LanczosSearch:
    """Searches for both ends of the spectrum of a symmetric operator.

    The thick-restart Lanczos method (Wu & Simon 2000, SIAM J. Matrix Anal. Appl. 22(2)): the
    eigenpairs of H projected onto a Krylov space approximate those of H, those at the ends first.
    Pairs that have converged are measured by one more product each.

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

        Returns:
            The pairs by ascending eigenvalue, the same number at each end: fewer than asked for,
            down to a single pair, if ``limit`` is too low; pairs of nan if H is not finite.

        Raises:
            OutOfMemoryError: The basis does not fit into memory.
        """
        width = max(4 * number + 8, min(_BASIS, _BASIS_BYTES // (8 * self._size)))
        # If the whole space is not much larger, take it: then no restart is needed.
        width = self._size if self._size <= 2 * width else width
        krylov = _KrylovSpace(width, self._size, self._device, seed)
        # How far below the tolerance the residuals have to lie by estimate.
        margin, checked = 0.9, 0
        while True:
            image = self._product(krylov.next.to(self._device))
            if not math.isfinite(float(image.norm())):
                return self._measure(image.new_full((2 * number, self._size), math.nan))
            krylov.add(image)
            spent = self._products >= self._limit or krylov.dimension == self._size
            full = krylov.dimension == width
            waits = self._products < MIN_PRODUCTS
            waits |= krylov.dimension - checked <= krylov.dimension // _BASIS
            if waits and not spent and not full:
                continue
            checked = krylov.dimension
            pairs = krylov.ritz_pairs()
            ends = _ends(checked, min(number, max(1, checked // 2)))
            values = pairs.values.abs()
            allowed = (self._tolerance * values[ends]).clamp(self._rounding * values.max())
            close = bool((pairs.residuals[ends] <= margin * allowed).all())
            if spent or (close and not waits):
                measured = self._measure(krylov.combine(pairs.vectors[:, ends]).to(self._device))
                done = spent or self._products >= self._limit
                if done or all(pair.converged for pair in measured):
                    return sorted(measured, key=lambda pair: pair.value)
                # The rounding of a product is larger than `rounding`.
                margin /= 4
            if full:
                krylov.restart(pairs, _ends(width, (2 * number + width) // 4))
                checked = krylov.dimension

    def _product(self, v: Tensor) -> Tensor:
        self._products += 1
        return self._operator(v)

    def _measure(self, vectors: Tensor) -> list[Eigenpair]:
        trusted = self._products >= MIN_PRODUCTS
        return eigenpairs(
            self._product, vectors, self._tolerance, self._rounding, exact=False, trusted=trusted
        )


@dataclass(frozen=True)
class _RitzPairs:
    """Approximate eigenpairs from a Krylov space of dimension m.

    Attributes:
        values: ``[m]``, ascending.
        vectors: The eigenvectors as columns, in the basis of the space, ``[m, m]``.
        residuals: ‖Hv − λv‖ in exact arithmetic, ``[m]``.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor


class _KrylovSpace:
    """An orthonormal basis of a Krylov space, and the operator projected onto it.

    Args:
        width: The most vectors.
        size: n.
        device: Where products are computed.
        seed: Of the first vector, and of those that continue an invariant space.

    Attributes:
        dimension: The number m of vectors so far.
        next: The next vector of the basis, ``[n]``, float64: to be multiplied with the operator.

    Raises:
        OutOfMemoryError: The basis does not fit into memory.
    """

    def __init__(self, width: int, size: int, device: torch.device, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        home = device if 8 * width * size <= _BASIS_BYTES else torch.device("cpu")
        try:
            self._basis = torch.empty(width, size, dtype=torch.float64, device=home)
        except (RuntimeError, MemoryError) as error:
            raise OutOfMemoryError(
                f"{width} vectors of {size:,} weights do not fit into memory",
                "Try fewer tensors with --only",
            ) from error
        # ⟨vᵢ, Hvⱼ⟩ for i ≤ j.
        self._projected = torch.zeros(width, width, dtype=torch.float64)
        self._rest = 0.0
        self.dimension = 0
        self.next = self._random_vector()

    def add(self, image: Tensor) -> None:
        """Adds `next` to the basis; ``image`` is its product with the operator, ``[n]``."""
        self._basis[self.dimension] = self.next
        self.dimension += 1
        before = float(image.norm())
        rest, coefficients = self._orthogonalise(image.to(self._basis))
        self._projected[: self.dimension, self.dimension - 1] = coefficients
        self._rest = float(rest.norm())
        if self._rest <= _VANISHED * before:
            # The space is invariant, so that other vectors are needed to continue.
            self._rest = 0.0
            self.next = self._random_vector()
        else:
            self.next = rest / self._rest

    def ritz_pairs(self) -> _RitzPairs:
        """Returns the eigenpairs of the projected operator."""
        m = self.dimension
        values, vectors = torch.linalg.eigh(self._projected[:m, :m], UPLO="U")
        return _RitzPairs(values, vectors, self._rest * vectors[-1].abs())

    def combine(self, columns: Tensor) -> Tensor:
        """Returns linear combinations of the basis, ``[K, n]``, for coefficients ``[m, K]``."""
        combinations: Tensor = columns.T.to(self._basis) @ self._basis[: self.dimension]
        return combinations

    def restart(self, pairs: _RitzPairs, kept: Tensor) -> None:
        """Replaces the basis by the approximate eigenvectors with the indices ``kept``."""
        number, columns = len(kept), pairs.vectors[:, kept].T.to(self._basis)
        for part in torch.split(self._basis, _COLUMNS, dim=1):
            part[:number] = columns @ part
        self._projected.zero_()
        self._projected.diagonal()[:number] = pairs.values[kept]
        self.dimension = number

    def _random_vector(self) -> Tensor:
        size = self._basis.shape[1]
        vector = torch.randn(size, generator=self._generator, dtype=torch.float64)
        rest, _ = self._orthogonalise(vector.to(self._basis))
        unit: Tensor = rest / rest.norm()
        return unit

    def _orthogonalise(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the part of a vector orthogonal to the basis, and its coefficients, ``[m]``."""
        basis = self._basis[: self.dimension]
        coefficients = vector.new_zeros(len(basis))
        # Apart from rounding, the product of a vector of the basis has parts along two of them.
        for first in (max(0, len(basis) - 2), 0, 0):
            before = vector.norm()
            parts = basis[first:] @ vector
            vector = vector - parts @ basis[first:]
            coefficients[first:] += parts
            if first == 0 and bool(vector.norm() >= _CANCELLED * before):
                break
        return vector, coefficients.cpu()


def _ends(length: int, number: int) -> Tensor:
    """Returns the indices of the first and the last few entries, all if they overlap."""
    index = torch.arange(length)
    return index[(index < number) | (index >= length - number)]
