"""The spectral density of a symmetric matrix by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from losscli.data import device_budget, host_budget

__all__ = ["Probe", "SpectralDensity", "basis_size", "draw_probe"]

Floats = NDArray[np.float64]

# The width σ of the Gaussians is this share of the range of the Ritz values; Ghorbani et al. 2019
# (arXiv 1901.10159) take √1e-5 for a range of 1.
_WIDTH = 1 / 300
# A narrower range is widened to this share of the largest |λ|: it may be rounding alone.
_NARROWEST = 1e-3

# Points of the grid per σ, and the number of σ by which it extends beyond the Ritz values.
_POINTS_PER_WIDTH = 4
_MARGIN = 5

# Outliers are more than this number of σ from their neighbours: in between, two Gaussians of equal
# weight fall to 2 % of their height.
_GAP = 6
# Nodes with less weight are rounding, such as copies of a converged one that are about to appear.
_ROUNDING = 1e-15


def basis_size(size: int, steps: int, device: torch.device) -> int:
    """Returns how many vectors of a Krylov basis are kept in memory.

    Args:
        size: The length n of a vector.
        steps: The number of vectors.
        device: The device of the vectors.

    Returns:
        All if they take at most a quarter of the memory of the host, or of the free memory of a
        GPU, in float64; else as many as fit, and at least the last two.
    """
    budget = device_budget(device) or host_budget()
    return min(steps, max(2, budget // (8 * max(1, size))))


def draw_probe(size: int, seed: int, *numbers: int) -> Tensor:
    """Draws a vector of independent signs ±1, so that E vᵀHv = tr H (Hutchinson 1990).

    Args:
        size: Its length n.
        seed: The seed of the run.
        numbers: Identify the probe.

    Returns:
        ``[n]``, float64, on the CPU.
    """
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=numbers))
    signs = generator.integers(0, 2, size, np.int8)
    return torch.from_numpy(2 * signs - 1).double()


@dataclass(frozen=True)
class Probe:
    """The quadrature of one random vector v for the measure with vᵀ f(H) v / ‖v‖² as integrals.

    Attributes:
        ritz: The nodes, which are Ritz values, ``[m]``, ascending; nan if H is not finite.
        weights: Their weights, ``[m]``, with the sum 1.
        errors: Some eigenvalue of H is within this distance of each node, ``[m]``.
        trace: vᵀHv, an estimate of the trace of H: n times the mean of the quadrature.
    """

    ritz: Floats
    weights: Floats
    errors: Floats
    trace: float

    @classmethod
    def run(cls, product: Callable[[Tensor], Tensor], v: Tensor, steps: int, kept: int) -> Self:
        """Runs Lanczos' method (Golub & Welsch 1969).

        Args:
            product: Multiplies H with a vector ``[n]``, float64.
            v: The vector, ``[n]``, of signs.
            steps: The number of products.
            kept: The latest basis vectors against which a new one is orthogonalised. With fewer
                than ``steps`` a converged Ritz value may appear again; the copies share its weight.

        Returns:
            The quadrature, with fewer nodes if v spans an invariant space of H.
        """
        basis = v.new_empty(max(2, min(kept, steps)), len(v))
        diagonal, lower = [], []
        q = v / v.norm()
        for k in range(steps):
            basis[k % len(basis)] = q
            image = product(q)
            diagonal.append(float(q @ image))
            if not bool(image.isfinite().all()):
                nan = np.full(1, math.nan)
                return cls(nan, np.ones(1), nan, math.nan)
            filled = basis[: k + 1]
            # Twice is enough (Parlett 1980).
            for _ in range(2):
                image = image - filled.T @ (filled @ image)
            lower.append(float(image.norm()))
            largest = max(map(abs, (*diagonal, *lower)))
            if lower[-1] <= 10 * math.sqrt(len(v)) * np.finfo(np.float64).eps * largest:
                break
            q = image / lower[-1]
        return cls(*_quadrature(np.array(diagonal), np.array(lower)), len(v) * diagonal[0])

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Returns the arrays of a record."""
        return {name: np.asarray(value) for name, value in vars(self).items()}

    @classmethod
    def from_arrays(cls, arrays: Any) -> Self:
        """Reads the arrays of a record."""
        return cls(arrays["ritz"], arrays["weights"], arrays["errors"], float(arrays["trace"]))


def _quadrature(diagonal: Floats, lower: Floats) -> tuple[Floats, Floats, Floats]:
    """Nodes, weights and errors from a tridiagonal matrix; the last of ``lower`` is beyond it."""
    from scipy.linalg import eigh_tridiagonal

    values, vectors = (np.array(x, np.float64) for x in eigh_tridiagonal(diagonal, lower[:-1]))
    return values, vectors[0] ** 2, lower[-1] * np.abs(vectors[-1])


@dataclass(frozen=True)
class SpectralDensity:
    """The density of the eigenvalues, with Gaussians in place of the nodes of the quadratures.

    φ(λ) = 1/K Σ_k Σ_i w_ki N(λ; θ_ki, σ²), over K probes with nodes θ and weights w.

    Attributes:
        sigma: σ; nan if the matrix is not finite.
        grid: Evenly spaced λ, from 5σ below the nodes to 5σ above; empty if it is not finite.
        density: φ at the grid.
        outliers: Eigenvalues apart from the bulk, in descending order. Nodes with gaps of at most
            6σ form a group, and that with the largest weight is the bulk. Another group is an
            outlier if all probes have nodes there, within σ and with errors of at most σ.
    """

    sigma: float
    grid: Floats
    density: Floats
    outliers: Floats

    @classmethod
    def of(cls, probes: Sequence[Probe]) -> Self:
        """Averages over probes."""
        nodes = np.concatenate([probe.ritz for probe in probes])
        weights = np.concatenate([probe.weights for probe in probes]) / len(probes)
        if not np.isfinite(nodes).all():
            return cls(math.nan, np.zeros(0), np.zeros(0), np.zeros(0))
        low, high = float(nodes.min()), float(nodes.max())
        sigma = _WIDTH * (max(high - low, _NARROWEST * max(abs(low), abs(high))) or 1.0)
        low, high = low - _MARGIN * sigma, high + _MARGIN * sigma
        # A range of whole widths but for rounding has one number of points.
        number = 1 + math.ceil(_POINTS_PER_WIDTH * (high - low) / sigma - 1e-6)
        grid = np.linspace(low, high, number)
        density = np.zeros_like(grid)
        for node, weight in zip(nodes, weights, strict=True):
            density += weight * np.exp(-(((grid - node) / sigma) ** 2) / 2)
        density /= sigma * math.sqrt(2 * math.pi)
        return cls(sigma, grid, density, _outliers(probes, nodes, weights, sigma))


def _outliers(probes: Sequence[Probe], nodes: Floats, weights: Floats, sigma: float) -> Floats:
    errors = np.concatenate([probe.errors for probe in probes])
    owners = np.repeat(np.arange(len(probes)), [len(probe.ritz) for probe in probes])
    order = np.argsort(nodes, kind="stable")
    order = order[weights[order] > _ROUNDING]
    groups = np.split(order, 1 + np.flatnonzero(np.diff(nodes[order]) > _GAP * sigma))
    bulk = max(range(len(groups)), key=lambda i: float(weights[groups[i]].sum()))
    found = [
        float(nodes[group].mean())
        for i, group in enumerate(groups)
        if i != bulk
        and len(set(owners[group])) == len(probes)
        and np.ptp(nodes[group]) <= sigma
        and errors[group].max() <= sigma
    ]
    return np.array(found[::-1])
