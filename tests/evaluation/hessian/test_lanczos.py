"""The search for both ends of a spectrum, compared with ARPACK on known operators."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from losscli.evaluation.hessian.eigenvalues import Eigenpair
from losscli.evaluation.hessian.lanczos import LanczosSearch

SPECTRA = {
    "even": np.linspace(-1, 3, 2000),
    "cubic": np.linspace(-1, 1, 2000) ** 3,
    "outliers": np.r_[-0.3, np.linspace(-0.01, 0.01, 2000), 7.0, 30.0],
}


def search(
    spectrum: NDArray[np.float64],
    number: int,
    *,
    tolerance: float,
    asymmetry: float = 0.0,
    limit: int = 1000,
) -> tuple[list[Eigenpair], int]:
    """Searches a diagonal operator; returns the pairs and the number of products."""
    diagonal, products = torch.from_numpy(spectrum), 0

    def product(v: Tensor) -> Tensor:
        nonlocal products
        products += 1
        return diagonal * v + asymmetry * v.roll(1)

    found = LanczosSearch(
        product,
        len(spectrum),
        torch.device("cpu"),
        rounding=1e-14,
        tolerance=tolerance,
        limit=limit,
    )
    return found.run(number, seed=0), products


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_a_search_takes_fewer_products_than_arpack(spectrum: NDArray[np.float64]) -> None:
    pairs, products = search(spectrum, 1, tolerance=1e-3)
    assert all(pair.converged for pair in pairs)
    theirs = 0

    def multiply(x: NDArray[np.float64]) -> NDArray[np.float64]:
        nonlocal theirs
        theirs += 1
        return spectrum * x

    operator = LinearOperator((len(spectrum),) * 2, matvec=multiply, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(len(spectrum))
    values = eigsh(operator, 2, which="BE", ncv=100, tol=1e-3, v0=start)[0]
    assert products < theirs
    for pair, value in zip(pairs, np.sort(values), strict=True):
        assert pair.value == pytest.approx(value, abs=2e-3)


@pytest.mark.parametrize("place", ["device", "host"])
def test_a_restart_keeps_what_was_found(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setattr("losscli.evaluation.hessian.lanczos._BASIS", 30)
    monkeypatch.setattr("losscli.evaluation.hessian.lanczos._COLUMNS", 700)
    if place == "host":
        monkeypatch.setattr("losscli.evaluation.hessian.lanczos._BASIS_BYTES", 8 * 2000 * 30 - 1)
    pairs, products = search(SPECTRA["even"], 2, tolerance=1e-6)
    # So many do not fit into a basis of 30.
    assert products > 100
    values = [pair.value for pair in pairs]
    expected = SPECTRA["even"][[0, 1, -2, -1]]
    np.testing.assert_allclose(values, expected, rtol=1e-8)
    vectors = torch.stack([pair.vector for pair in pairs])
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(4).double(), rtol=0, atol=1e-9)


def test_products_with_more_rounding_than_stated_never_converge() -> None:
    pairs, products = search(SPECTRA["outliers"], 1, tolerance=1e-6, asymmetry=1e-3, limit=120)
    assert not any(pair.converged for pair in pairs)
    assert products <= 120 + 2
