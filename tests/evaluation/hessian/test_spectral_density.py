"""Stochastic Lanczos quadrature, against matrices with known eigenvalues."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from losscli.evaluation.hessian.spectral_density import (
    Probe,
    SpectralDensity,
    basis_size,
    draw_probe,
)

OUTLIERS = [9.0, 6.5, 6.0, -3.0]


@cache
def matrix() -> tuple[Tensor, NDArray[np.float64]]:
    """A bulk around zero, a few eigenvalues apart from it, and random eigenvectors."""
    generator = np.random.default_rng(0)
    bulk = 0.5 * generator.standard_normal(800)
    values = np.sort(np.concatenate([bulk, OUTLIERS]))
    q, _ = np.linalg.qr(generator.standard_normal((len(values), len(values))))
    return torch.from_numpy(q @ np.diag(values) @ q.T), values


def probes_of(h: Tensor, number: int, steps: int, kept: int | None = None) -> list[Probe]:
    return [
        Probe.run(lambda v: h @ v, draw_probe(len(h), 0, k), steps, kept or steps)
        for k in range(number)
    ]


def test_the_quadrature_is_exact_for_polynomials() -> None:
    h, _ = matrix()
    v = draw_probe(len(h), 0, 0)
    (probe,) = probes_of(h, 1, 8)
    power = v
    for k in range(16):
        expected = float(v @ power) / len(v)
        assert float(probe.weights @ probe.ritz**k) == pytest.approx(expected, rel=1e-9)
        power = h @ power
    assert probe.trace == pytest.approx(float(v @ h @ v), rel=1e-12)


def test_an_eigenvalue_is_within_the_error_of_each_node() -> None:
    h, values = matrix()
    for probe in probes_of(h, 2, 30):
        distances = np.abs(probe.ritz[:, None] - values).min(1)
        assert np.all(distances <= probe.errors + 1e-9)
        assert probe.errors.min() < 1e-6


@pytest.mark.parametrize("kept", [60, 2])
def test_the_density_is_that_of_the_eigenvalues(kept: int) -> None:
    h, values = matrix()
    probes = probes_of(h, 6, 60, kept)
    found = SpectralDensity.of(probes)
    grid, sigma = found.grid, found.sigma
    spacing = np.diff(grid)
    assert spacing.max() <= sigma / 4 * (1 + 1e-9)
    assert np.ptp(spacing) < 1e-12
    nodes = np.concatenate([probe.ritz for probe in probes])
    assert (grid[0], grid[-1]) == pytest.approx(
        (nodes.min() - 5 * sigma, nodes.max() + 5 * sigma), rel=1e-12
    )
    assert np.trapezoid(found.density, grid) == pytest.approx(1, abs=1e-5)
    mean = float(np.trapezoid(found.density * grid, grid))
    traces = [probe.trace for probe in probes]
    assert mean * len(h) == pytest.approx(np.mean(traces), abs=1e-3)
    deviation = np.std(traces, ddof=1) / math.sqrt(len(probes))
    assert abs(np.mean(traces) - values.sum()) < 3 * deviation
    # Smoothed alike, for Lanczos' nodes are fewer than the eigenvalues of the bulk.
    wide = 0.15
    exact = smooth(grid, values, np.full(len(values), 1 / len(values)), wide)
    weights = np.concatenate([probe.weights for probe in probes]) / len(probes)
    assert np.trapezoid(abs(smooth(grid, nodes, weights, wide) - exact), grid) < 0.06
    assert found.outliers == pytest.approx(sorted(OUTLIERS, reverse=True), abs=1e-6)


def smooth(
    grid: NDArray[np.float64],
    nodes: NDArray[np.float64],
    weights: NDArray[np.float64],
    sigma: float,
) -> NDArray[np.float64]:
    bells = np.exp(-(((grid[:, None] - nodes) / sigma) ** 2) / 2)
    return np.asarray(bells @ weights / (sigma * math.sqrt(2 * math.pi)))


def test_without_full_orthogonalisation_the_density_is_the_same() -> None:
    h, _ = matrix()
    whole, part = (SpectralDensity.of(probes_of(h, 2, 120, kept)) for kept in (120, 2))
    assert part.sigma == pytest.approx(whole.sigma, rel=1e-9)
    np.testing.assert_allclose(part.density, whole.density, atol=1e-6 * whole.density.max())
    np.testing.assert_allclose(part.outliers, whole.outliers, rtol=1e-9)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize(
    ("values", "nodes"),
    [([0.0] * 7, [0]), ([2.0] * 7, [2]), ([-1.0] * 6 + [5.0], [-1, 5]), ([3.0], [3])],
)
def test_few_distinct_eigenvalues_need_few_steps(
    values: list[float], nodes: list[float], scale: float
) -> None:
    turned, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((len(values), len(values))))
    h = torch.from_numpy(turned @ np.diag(values) @ turned.T) * scale
    probes = probes_of(h, 3, len(values))
    for probe in probes:
        # What rounding adds has no weight.
        ritz = probe.ritz[probe.weights > 1e-12]
        assert ritz / scale == pytest.approx(nodes, abs=1e-12)
    found = SpectralDensity.of(probes)
    assert np.trapezoid(found.density, found.grid) == pytest.approx(1, abs=1e-5)
    assert len(found.grid) < 2000


def test_a_hessian_that_is_not_finite_has_no_density() -> None:
    h = torch.full((4, 4), math.nan, dtype=torch.float64)
    found = SpectralDensity.of([*probes_of(torch.eye(4).double(), 1, 3), *probes_of(h, 1, 3)])
    assert math.isnan(found.sigma)
    assert found.grid.size == found.density.size == found.outliers.size == 0


def test_each_probe_has_its_own_reproducible_signs() -> None:
    probes = [draw_probe(1000, 7, k) for k in range(3)]
    assert all(set(v.tolist()) == {-1.0, 1.0} for v in probes)
    for k, v in enumerate(probes):
        assert torch.equal(draw_probe(1000, 7, k), v)
        others = [*probes[:k], *probes[k + 1 :], draw_probe(1000, 8, k), draw_probe(1000, 7, k, 0)]
        assert all(abs(float(v @ other)) < 150 for other in others)


def test_the_size_of_a_basis_is_limited_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "losscli.evaluation.hessian.spectral_density.host_budget", lambda: 8 * 1000 * 10
    )
    cpu = torch.device("cpu")
    assert [basis_size(n, 90, cpu) for n in (1, 100, 1000, 10**9)] == [90, 90, 10, 2]
