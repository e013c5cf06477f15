"""The laws of curvature, over all cases: derivatives against a dense float64 Hessian."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from losscli.data import DataSet, Split
from losscli.errors import ModelError, OutOfMemoryError, UsageError
from losscli.evaluation.hessian.curvature import DENSE_LIMIT, Curvature
from losscli.evaluation.hessian.curvature_check import check_derivatives
from losscli.evaluation.hessian.eigenvalues import Eigenpair, Extremes
from losscli.evaluation.hessian.rounding import add_rounding
from losscli.evaluation.hessian.verdict import verdict
from losscli.evaluation.losses.built_in import LOSSES
from losscli.evaluation.objective import Objective
from losscli.evaluation.precision import in_float64
from losscli.evaluation.task_checks import check_task
from tests import oracle, stopped
from tests.cases import CASES, Case, in_turn, sample
from tests.evaluation.test_objective import objective_of

# What autograd does not see of these, though their loss depends on it.
DETACHED = {
    "threaded": "body.weight, body.bias",
    "folding": "weight, a, b",
    "differentiating": "layer.weight, layer.bias",
}
SEEN = [case for case in CASES if case.name not in DETACHED]
# Large enough that eigenvalues are searched for, and small enough for an oracle.
SEARCHED = [case for case in SEEN if 64 < sum(p.numel() for p in case.build().parameters()) <= 500]
# The dense Hessian of attention takes longest.
LARGER = next(case for case in SEEN if case.name == "attention-tied")
# With squared error.
LINEAR = next(case for case in SEEN if case.name == "mlp-linear-mse")
CPU = torch.device("cpu")


def parameters_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def curvature_of(
    case: Case,
    *,
    dtype: torch.dtype = torch.float64,
    batch_size: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Curvature:
    objective = objective_of(case, dtype=dtype, batch_size=batch_size)
    state = case.state(1)
    check_task(objective, state)
    return Curvature(
        objective, state, parameters_of(objective.model), objective.splits["all"], progress
    )


def curvature_at(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    inputs: Tensor,
    targets: Tensor | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = lambda outputs, _: outputs,
    *,
    dtype: torch.dtype = torch.float64,
    names: Sequence[str] | None = None,
) -> Curvature:
    """The curvature of a model; by default it gives its losses itself."""
    targets = torch.zeros(len(inputs)) if targets is None else targets
    data = DataSet({"all": Split(inputs, targets)})
    objective = Objective(model, loss, {}, data, device=CPU, dtype=dtype, batch_size=4)
    return Curvature(objective, weights, names or list(weights), objective.splits["all"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Oracle:
    """The mean loss as a function of one flat vector; nothing of losscli's own derivatives."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._model = case.build().double().eval()
        self._shapes = {n: p.shape for n, p in self._model.named_parameters()}
        state = case.state(1)
        self._state = {n: t.double() if t.is_floating_point() else t for n, t in state.items()}
        self._model.load_state_dict(self._state)
        self.point = torch.cat([self._state[n].reshape(-1) for n in self._shapes])

    def loss(self, flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in self._shapes.values()])
        named = {n: p.view(self._shapes[n]) for n, p in zip(self._shapes, parts, strict=True)}
        inputs = copy.deepcopy(self._case.inputs)
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
        args = tuple(map(_cast, args))
        kwargs = {k: _cast(x) for k, x in kwargs.items()}
        targets = self._case.targets
        targets = targets.double() if targets.is_floating_point() else targets
        with sdpa_kernel(SDPBackend.MATH):
            outputs = functional_call(self._model, named, args, kwargs)
            return self._case.per_example(outputs, targets).mean()

    def gradient(self) -> Tensor:
        point = self.point.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self.loss(point), point)
        return gradient


def _cast(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


@cache
def hessian_of(case: Case) -> Tensor:
    oracle = Oracle(case)
    hessian = torch.autograd.functional.hessian(oracle.loss, oracle.point, vectorize=True)
    assert isinstance(hessian, Tensor)
    return hessian


@cache
def spectrum_of(case: Case) -> NDArray[np.float64]:
    return np.linalg.eigvalsh(hessian_of(case).numpy())


def times(case: Case, v: Tensor) -> Tensor:
    if len(v) <= 500:
        return hessian_of(case) @ v
    oracle = Oracle(case)
    product = torch.autograd.functional.vhp(oracle.loss, oracle.point, v)[1]
    assert isinstance(product, Tensor)
    return product


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# Derivatives.


@pytest.mark.parametrize("case", sample(SEEN, 1, 2), ids=str)
def test_loss_and_gradient_are_those_of_plain_float64_autograd(case: Case) -> None:
    oracle = Oracle(case)
    curvature = curvature_of(case, batch_size=8)
    assert curvature.loss == pytest.approx(float(oracle.loss(oracle.point)), rel=1e-12)
    assert curvature.gradient().dtype == torch.float64
    assert relative(curvature.gradient(), oracle.gradient()) < 1e-10


@pytest.mark.parametrize("case", sample(SEEN, 1), ids=str)
def test_a_product_is_that_of_the_dense_float64_hessian(case: Case) -> None:
    curvature = curvature_of(case, batch_size=8)
    v = random(curvature.size)
    found = curvature.product(v)
    assert found.dtype == torch.float64
    assert relative(found, times(case, v)) < 1e-10


@pytest.mark.parametrize("case", sample(SEEN, 2), ids=str)
def test_a_product_is_how_the_gradient_changes(case: Case) -> None:
    v, h = random(curvature_of(case).size), 1e-7
    product = curvature_of(case).product(v)
    gradients = []
    for step in (-h, h):
        objective, state = objective_of(case), case.state(1)
        check_task(objective, state)
        names, split = parameters_of(objective.model), objective.splits["all"]
        named = Curvature(objective, state, names, split).named(v)
        moved = {n: state[n].double() + step * d for n, d in named.items()}
        gradients.append(Curvature(objective, moved, names, split).gradient())
    assert relative((gradients[1] - gradients[0]) / (2 * h), product) < 1e-8


@pytest.mark.parametrize("case", sample(SEEN, 1), ids=str)
def test_float32_agrees_with_float64(case: Case) -> None:
    single, double = (curvature_of(case, dtype=t) for t in (torch.float32, torch.float64))
    v = random(single.size)
    assert single.loss == pytest.approx(double.loss, rel=1e-6)
    assert relative(single.gradient(), double.gradient()) < 2e-6
    assert relative(single.product(v), double.product(v)) < 1e-6


@pytest.mark.parametrize("case", sample(SEEN, 0), ids=str)
@pytest.mark.parametrize("sizes", [[5, 36], pytest.param([1, 2, 8], marks=pytest.mark.stress)])
def test_batches_and_the_ragged_last_one_do_not_matter(case: Case, sizes: list[int]) -> None:
    whole = curvature_of(case, batch_size=1000)
    v = random(whole.size)
    gradient, product = whole.gradient(), whole.product(v)
    for batch_size in sizes:
        parts = curvature_of(case, batch_size=batch_size)
        assert parts.loss == pytest.approx(whole.loss, rel=1e-12)
        assert relative(parts.gradient(), gradient) < 1e-10
        assert relative(parts.product(v), product) < 1e-10


def test_gradients_are_computed_inside_no_grad() -> None:
    expected = curvature_of(CASES[0])
    with torch.no_grad():
        found = curvature_of(CASES[0])
        assert torch.equal(found.gradient(), expected.gradient())
        assert torch.equal(found.product(expected.gradient()), expected.product(found.gradient()))


class Tied(nn.Module):
    """f = w² x, by one layer used under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(1, 1, bias=False)
        self.other = self.one

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.one(x)).squeeze(1)


def test_both_uses_of_a_tied_weight_count() -> None:
    x = random(7, 1)
    curvature = curvature_at(Tied(), {"one.weight": torch.full((1, 1), 3.0)}, x)
    mean = float(x.mean())
    assert curvature.gradient().tolist() == pytest.approx([6 * mean], rel=1e-12)
    assert curvature.product(torch.ones(1).double()).tolist() == pytest.approx([2 * mean])


class Fused(nn.Module):
    """Attention by the kernel of its own that has no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unsqueeze(1).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v).flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_differentiated_twice(dtype: torch.dtype) -> None:
    case = Case("fused", Fused, random(9, 5, 8), torch.arange(9) % 3)
    v = random(curvature_of(case).size)
    expected = curvature_of(case).product(v)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    assert relative(curvature_of(case, dtype=dtype).product(v), expected) < tolerance


class WithUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(4, 2)
        self.used = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_parameters_that_are_not_used_are_flat() -> None:
    case = Case("unused", WithUnused, random(9, 4), torch.arange(9) % 3)
    objective, state = objective_of(case), case.state(1)
    curvature = Curvature(objective, state, list(state), objective.splits["all"])
    v = random(curvature.size)
    for vector in (curvature.gradient(), curvature.product(v)):
        parts = curvature.named(vector)
        assert not parts["unused.weight"].any()
        assert not parts["unused.bias"].any()
        assert parts["used.weight"].all()
        assert parts["used.bias"].all()
    # They were moved to make sure, and put back.
    for name, tensor in objective.tensors.items():
        assert torch.equal(tensor, state[name].double())


class Routed(nn.Module):
    """Hard choices by weights that no gradient reaches, and truly so: their loss is a staircase."""

    def __init__(self) -> None:
        super().__init__()
        self.route = nn.Linear(4, 2)
        self.experts = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        choice = self.route(x).argmax(1)
        return self.experts(x).view(-1, 2, 3)[torch.arange(len(x)), choice]


def test_a_hard_choice_is_flat_almost_everywhere() -> None:
    case = Case("routed", Routed, random(99, 4), torch.arange(99) % 3)
    curvature = curvature_of(case)
    assert not curvature.named(curvature.gradient())["route.weight"].any()
    assert torch.equal(curvature_of(case).gradient(), curvature.gradient())


@pytest.mark.parametrize("case", [c for c in CASES if c.name in DETACHED], ids=str)
@pytest.mark.parametrize("derivative", ["gradient", "product"])
def test_weights_that_matter_and_that_no_gradient_reaches_are_refused(
    case: Case, derivative: str
) -> None:
    curvature = curvature_of(case)
    with pytest.raises(ModelError, match=f"depends on {DETACHED[case.name]}, but.*--except"):
        _ = (
            curvature.loss
            if derivative == "gradient"
            else curvature.product(random(curvature.size))
        )


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return 2 * x * g


class Never(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return x.square()


class Applied(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(self.layer(x))


def test_a_function_without_a_second_derivative_is_named() -> None:
    case = Case("once", lambda: Applied(Once), random(9, 4), torch.arange(9) % 3)
    curvature = curvature_of(case)
    assert float(curvature.gradient().norm()) > 0
    with pytest.raises(ModelError, match=r"no second derivative: .*once_differentiable.*twice"):
        curvature.product(random(curvature.size))


def test_a_function_without_a_first_derivative_is_named() -> None:
    case = Case("never", lambda: Applied(Never), random(9, 4), torch.arange(9) % 3)
    with pytest.raises(ModelError, match=r"cannot be differentiated.*: .*backward"):
        curvature_of(case).gradient()


class FusedLoss(nn.Module):
    """Gives its losses itself, by a function that is linear in the gradient that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(self.layer(x)).squeeze(1)


def test_a_fused_loss_without_a_second_derivative_is_not_taken_for_a_flat_one() -> None:
    weights = {"layer.weight": random(1, 4), "layer.bias": random(1)}
    curvature = curvature_at(FusedLoss(), weights, random(9, 4))
    assert float(curvature.gradient().norm()) > 0.1
    with pytest.raises(ModelError, match=r"no second derivative.*once_differentiable"):
        curvature.product(random(5))


def test_a_loss_that_is_linear_in_the_weights_has_no_curvature() -> None:
    x = random(9, 4)
    weights = {"weight": random(1, 4), "bias": random(1)}
    loss: Callable[[Tensor, Tensor], Tensor] = lambda outputs, _: outputs.squeeze(1)  # noqa: E731
    curvature = curvature_at(nn.Linear(4, 1), weights, x, loss=loss)
    expected = torch.cat([x.mean(0), torch.ones(1).double()])
    assert relative(curvature.gradient(), expected) < 1e-14
    assert torch.equal(curvature.product(random(5)), torch.zeros(5).double())


def test_gradients_that_parameters_hold_are_left_to_them() -> None:
    curvature = curvature_of(CASES[0])
    held = [torch.ones_like(p) for p in curvature._parameters]
    for p, g in zip(curvature._parameters, held, strict=True):
        p.grad = g
    curvature.product(curvature.gradient())
    for p, g in zip(curvature._parameters, held, strict=True):
        assert p.grad is g
        assert torch.equal(g, torch.ones_like(g))


def absolute(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.squeeze(1) - targets).abs()


def test_a_loss_of_straight_pieces_has_a_gradient_and_no_curvature() -> None:
    weights = {"weight": random(1, 4), "bias": random(1)}
    curvature = curvature_at(nn.Linear(4, 1), weights, random(9, 4), random(9), absolute)
    assert float(curvature.gradient().norm()) > 0.1
    assert torch.equal(curvature.product(random(5)), torch.zeros(5).double())


# Eigenvalues.


class Diagonal(nn.Module):
    """L = ½ Σ λ θ² with the inputs for λ: its Hessian is the diagonal of the mean inputs."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(n))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.theta.square()).sum(1) / 2


def diagonal(
    spectrum: Sequence[float], *, at: float = 0.0, dtype: torch.dtype = torch.float64
) -> Curvature:
    """Has the spectrum to the last bit: five examples, whose deviations from it are exact."""
    row = torch.tensor(spectrum, dtype=torch.float64)
    inputs = torch.stack([row * factor for factor in (0.5, 1.5, 1, 0.25, 1.75)])
    theta = torch.full((len(row),), at, dtype=torch.float64)
    return curvature_at(Diagonal(len(row)), {"theta": theta}, inputs, dtype=dtype)


SPECTRA: dict[str, NDArray[np.float64]] = {
    "even": np.linspace(-1, 3, 200),
    "one": np.array([2.0]),
    "two": np.array([-3.0, 5.0]),
    "small": np.linspace(-1, 1, 64),
    "just searched": np.linspace(-1, 1, 65),
    "zero": np.zeros(150),
    "flat but one": np.r_[np.zeros(149), 4.0],
    "bulk and outliers": np.r_[-0.3, np.linspace(-0.01, 0.01, 300), 7.0, 30.0],
    "falling": np.linspace(-5, -1, 100),
    "several times": np.repeat([-2.0, -1.0, 1.0, 5.0], 30),
    "three values": np.repeat([-1.0, 0.0, 2.0], 40),
    "identity": np.full(90, 2.0),
    "geometric": 2.0 ** -np.arange(0.0, 30, 0.25),
}


def pairs_of(extremes: Extremes) -> list[Eigenpair]:
    return [*extremes.smallest, *extremes.largest]


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("number", [pytest.param(1, marks=pytest.mark.stress), 3])
def test_the_ends_of_a_known_spectrum_are_found(spectrum: NDArray[np.float64], number: int) -> None:
    curvature = diagonal(spectrum.tolist())
    found = curvature.extremes(number, tolerance=1e-6, seed=0)
    ascending = np.sort(spectrum)
    for pairs in (found.smallest, found.largest):
        vectors = torch.stack([pair.vector for pair in pairs])
        torch.testing.assert_close(vectors @ vectors.T, torch.eye(len(vectors)).double())
    for pairs, expected in (
        (found.smallest, ascending[:number]),
        (found.largest, ascending[::-1][:number]),
    ):
        assert len(pairs) == min(number, len(spectrum))
        for pair, value in zip(pairs, expected, strict=True):
            assert abs(pair.value - value) <= pair.error
            assert pair.converged
            assert pair.error <= 1e-6 * np.abs(spectrum).max()
            assert float(pair.vector.norm()) == pytest.approx(1, rel=1e-14)
            # A residual near rounding has no digits to compare but by the same product.
            image = curvature.product(pair.vector)
            torch.testing.assert_close(
                image, torch.from_numpy(spectrum) * pair.vector, rtol=1e-15, atol=0
            )
            residual = image - pair.value * pair.vector
            assert float(residual.norm()) <= pair.error * (1 + 1e-12)


@pytest.mark.parametrize("case", sample(SEEN, 0, 7), ids=str)
def test_the_whole_hessian_is_that_of_the_oracle(case: Case) -> None:
    curvature = curvature_of(case)
    if curvature.size > DENSE_LIMIT:
        with pytest.raises(UsageError, match=r"1,575 parameters.*1,000 or fewer with --only"):
            curvature.dense()
        return
    dense = curvature.dense()
    expected, spectrum = hessian_of(case).numpy(), spectrum_of(case)
    scale = np.abs(spectrum).max()
    np.testing.assert_allclose(dense.matrix, expected, rtol=0, atol=1e-12 * scale)
    np.testing.assert_array_equal(dense.matrix, dense.matrix.T)
    assert curvature.products == curvature.size
    assert dense.asymmetry < 1e-13 * scale
    assert np.abs(dense.eigenvalues - spectrum).max() <= dense.error
    rebuilt = dense.eigenvectors * dense.eigenvalues @ dense.eigenvectors.T
    np.testing.assert_allclose(rebuilt, dense.matrix, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("case", sample([*SEARCHED, LARGER], 0), ids=str)
def test_searched_eigenvalues_are_the_ends_of_the_dense_spectrum(case: Case) -> None:
    found = curvature_of(case).extremes(2, tolerance=1e-6, seed=0)
    assert not found.exact
    spectrum = spectrum_of(case)
    values = [pair.value for pair in pairs_of(found)]
    expected = [spectrum[0], spectrum[1], spectrum[-1], spectrum[-2]]
    assert all(pair.converged for pair in pairs_of(found))
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-12 * np.abs(spectrum).max())


# `make test` takes every third case with one of the limits.
@pytest.mark.parametrize(
    ("case", "limit"), sample(in_turn([*SEARCHED, LARGER], 70, 3, 40, 10, 1), 0, 15), ids=str
)
def test_an_eigenvalue_lies_within_the_error_even_where_the_search_was_cut_short(
    case: Case, limit: int
) -> None:
    curvature = curvature_of(case)
    found = curvature.extremes(2, tolerance=1e-6, seed=0, limit=limit)
    hessian, spectrum = hessian_of(case).numpy(), spectrum_of(case)
    for pair in pairs_of(found):
        v = pair.vector.numpy()
        assert np.abs(spectrum - pair.value).min() <= pair.error
        scale = np.abs(spectrum).max()
        residual = np.linalg.norm(hessian @ v - pair.value * v)
        assert residual <= pair.error + 1e-15 * scale
        if pair.converged:
            assert pair.error <= max(1e-6 * abs(pair.value), 1e-13 * scale)
    # After so few products nobody knows the ends.
    assert limit >= 50 or not any(pair.converged for pair in pairs_of(found))
    assert found.products == curvature.products <= limit + 4


def test_a_small_basis_is_restarted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("losscli.evaluation.hessian.lanczos._BASIS", 16)
    spectrum = SPECTRA["even"]
    found = diagonal(spectrum.tolist()).extremes(2, tolerance=1e-8, seed=0)
    # The basis has 16 vectors, so there were many restarts, and fewer products than the limit.
    assert 100 < found.products < 1000
    values = [pair.value for pair in pairs_of(found)]
    expected = [spectrum[0], spectrum[1], spectrum[-1], spectrum[-2]]
    np.testing.assert_allclose(values, expected, rtol=1e-12)


def test_a_search_takes_far_fewer_products_than_the_whole_hessian() -> None:
    curvature = diagonal(np.r_[-0.3, np.linspace(-0.01, 0.01, 2000), 30.0].tolist())
    assert curvature.extremes(1, tolerance=1e-3, seed=0).products < 60


def test_a_seed_gives_the_same_numbers_and_another_one_the_same_eigenvalues() -> None:
    case = SEARCHED[0]
    one, same, other = (
        pairs_of(curvature_of(case).extremes(1, tolerance=1e-4, seed=s)) for s in (3, 3, 4)
    )
    for a, b, c in zip(one, same, other, strict=True):
        assert (a.value, a.error) == (b.value, b.error)
        assert torch.equal(a.vector, b.vector)
        assert not torch.equal(a.vector, c.vector)
        assert abs(a.value - c.value) <= a.error + c.error
        assert float(a.vector @ c.vector) > 0.99


def test_the_sign_of_a_vector_is_fixed() -> None:
    for pair in pairs_of(diagonal(SPECTRA["even"].tolist()).extremes(3, tolerance=1e-6, seed=0)):
        assert pair.vector.abs().max() == pair.vector.max()


def test_a_hessian_that_was_made_is_used() -> None:
    curvature = curvature_of(SEARCHED[0])
    spectrum = curvature.dense().eigenvalues
    assert curvature.dense() is curvature.dense()
    found = curvature.extremes(1, tolerance=1e-3, seed=0)
    assert found.exact
    assert found.products == 2
    assert curvature.products == curvature.size + 2
    assert abs(found.smallest[0].value - spectrum[0]) <= found.smallest[0].error


@pytest.mark.parametrize("n", sample([65, 84, 150, 244], 0, 2))
@pytest.mark.parametrize("seeds", [range(1), pytest.param(range(1, 3), marks=pytest.mark.stress)])
def test_an_end_at_zero_is_not_missed(n: int, seeds: range) -> None:
    # A tolerance relative to λ alone would not be met at zero, but by the neighbour.
    for seed in seeds:
        found = diagonal(np.linspace(0, 1, n).tolist()).extremes(1, tolerance=1e-4, seed=seed)
        assert found.smallest[0].converged
        assert abs(found.smallest[0].value) <= found.smallest[0].error


def test_a_basis_that_does_not_fit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    curvature = diagonal(SPECTRA["even"].tolist())
    curvature.gradient()
    monkeypatch.setattr("losscli.evaluation.hessian.lanczos.torch.empty", refusing)
    with pytest.raises(OutOfMemoryError, match=r"200 vectors of 200 weights do not fit.*--only"):
        curvature.extremes(1, tolerance=1e-4, seed=0)


@pytest.mark.parametrize(("number", "limit"), [(0, 9), (1, 0)])
def test_nothing_cannot_be_asked_for(number: int, limit: int) -> None:
    with pytest.raises(UsageError, match="Give 1"):
        diagonal([1.0]).extremes(number, tolerance=1e-3, seed=0, limit=limit)


def test_all_eigenvalues_are_at_both_ends_where_there_are_few() -> None:
    found = diagonal([3.0, -1.0, 2.0]).extremes(5, tolerance=1e-6, seed=0)
    assert [p.value for p in found.smallest] == pytest.approx([-1, 2, 3], rel=1e-14)
    assert [p.value for p in found.largest] == pytest.approx([3, 2, -1], rel=1e-14)


@pytest.mark.parametrize(
    ("name", "dtype"),
    in_turn(
        ["even", "bulk and outliers", "small", "falling", "flat but one"],
        *(torch.float32, torch.bfloat16, torch.float16),
    ),
)
def test_the_error_covers_the_rounding_of_the_forward_type(name: str, dtype: torch.dtype) -> None:
    spectrum = SPECTRA[name]
    found = diagonal(spectrum.tolist(), at=0.3, dtype=dtype).extremes(1, tolerance=1e-6, seed=0)
    for pair, value in zip(pairs_of(found), [spectrum.min(), spectrum.max()], strict=True):
        assert abs(pair.value - value) <= pair.error
        assert pair.error >= torch.finfo(dtype).eps * abs(found.largest[0].value)


@pytest.mark.parametrize(
    ("spectrum", "dtype", "shares"),
    [
        ([1.0, 2.0, 3.0, 0.0, -1.0, -2.0, 0.0, 0.0], torch.float64, (3 / 8, 2 / 8, 3 / 8)),
        ([1.0, 1e-9, -1e-9, -1.0], torch.float64, (0.5, 0.5, 0.0)),
        ([1.0, 1e-9, -1e-9, -1.0], torch.float32, (0.25, 0.25, 0.5)),
        ([0.0, 0.0], torch.float32, (0.0, 0.0, 1.0)),
        ([4.0], torch.float32, (1.0, 0.0, 0.0)),
    ],
)
def test_eigenvalues_within_their_error_have_no_sign(
    spectrum: list[float], dtype: torch.dtype, shares: tuple[float, float, float]
) -> None:
    assert diagonal(spectrum, dtype=dtype).dense().shares == shares


@pytest.mark.parametrize("seeds", [range(2), pytest.param(range(2, 8), marks=pytest.mark.stress)])
def test_the_rounding_of_a_constant_loss_is_not_a_wrong_hessian(seeds: range) -> None:
    """Each score is the same, so that the loss is log 3 everywhere."""

    def constant(outputs: Tensor, targets: Tensor) -> Tensor:
        scores = outputs.square().sum(1, keepdim=True).expand(-1, 3)
        return F.cross_entropy(scores, targets, reduction="none")

    for seed in seeds:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
        targets = torch.arange(9) % 3
        curvature = curvature_at(model, model.state_dict(), random(9, 6), targets, constant)
        assert np.abs(curvature.dense().eigenvalues).max() < 1e-14


@pytest.mark.parametrize("n", [3, 100])
def test_values_that_are_not_finite_give_nan_and_no_verdict(n: int) -> None:
    curvature = diagonal([1.0] * n, at=math.nan)
    poisoned = curvature_at(Diagonal(n), {"theta": torch.zeros(n)}, torch.full((5, n), math.nan))
    assert math.isnan(float(curvature.gradient().norm()))
    found = poisoned.extremes(1, tolerance=1e-3, seed=0)
    for pair in pairs_of(found):
        assert math.isnan(pair.value)
        assert math.isnan(pair.error)
        assert not pair.converged
    dense = poisoned.dense()
    assert all(map(math.isnan, dense.shares))
    assert np.isnan(dense.eigenvalues).all()
    assert verdict(0.0, 1e-3, found.smallest[0], found.largest[0]) == "undecided"


# Comparison with differences, and errors beyond √n ε.


COMPARED = 16


@cache
def ends_of(case: Case) -> dict[str, Tensor]:
    """Vectors near the outermost eigenvectors; any that are near will do."""
    objective, state = objective_of(case), case.state(1)
    check_task(objective, state)
    sample = objective.splits["all"].first(COMPARED)
    with Curvature(objective, state, parameters_of(objective.model), sample) as curvature:
        found = curvature.extremes(1, tolerance=1e-3, seed=0, limit=20)
    return {"λ min": found.smallest[0].vector, "λ max": found.largest[0].vector}


def compare(
    objective: Objective, state: Mapping[str, Tensor], vectors: Mapping[str, Tensor] | None = None
) -> str:
    """Compares derivatives along the vectors and random directions."""
    names = parameters_of(objective.model)
    sample = objective.splits["all"].first(COMPARED)
    precise = in_float64(objective, sample, inside=True) or objective
    return check_derivatives(precise, state, names, sample, vectors or {}, seed=0)


# In float32 a twin in float64 is compared.
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *sample(itertools.product(SEEN, [torch.float64]), 1, 5),
        *sample(itertools.product(SEEN, [torch.float32]), 2, 5),
    ],
    ids=str,
)
def test_right_derivatives_do_not_contradict_differences(case: Case, dtype: torch.dtype) -> None:
    objective = objective_of(case, dtype=dtype)
    state = case.state(1)
    check_task(objective, state)
    # In float64 the twin of float32 has the same eigenvectors.
    compare(objective, state, ends_of(case) if dtype == torch.float64 else None)


@pytest.mark.parametrize("case", sample(SEEN, 4, 5), ids=str)
def test_right_derivatives_do_not_contradict_differences_without_float64(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = objective_of(case, dtype=torch.float32)
    monkeypatch.setattr(f"{__name__}.in_float64", lambda *_, **__: None)
    state = case.state(1)
    check_task(objective, state)
    compare(objective, state, ends_of(case))
    kept = objective.model.state_dict()
    assert all(torch.equal(kept[n], t.to(kept[n].dtype)) for n, t in state.items())


@pytest.mark.parametrize("name", sample(stopped.HONEST, 0))
@pytest.mark.parametrize("seeds", [[1], pytest.param([2, 3, 4], marks=pytest.mark.stress)])
def test_kinks_and_jumps_do_not_contradict_differences(name: str, seeds: list[int]) -> None:
    case = stopped.case(stopped.HONEST[name])
    for seed in seeds:
        objective, state = objective_of(case, dtype=torch.float32), case.state(seed)
        check_task(objective, state)
        compare(objective, state, ends_of(case) if seed == 1 else None)
        # Where every hidden unit is at its kink.
        compare(objective, {n: torch.zeros_like(t) for n, t in state.items()})


@pytest.mark.parametrize("name", sample(stopped.STOPPED, 0, 2))
def test_a_gradient_that_is_stopped_in_part_contradicts_differences(name: str) -> None:
    case = stopped.case(stopped.STOPPED[name])
    objective = objective_of(case, dtype=torch.float32)
    state = case.state(1)
    check_task(objective, state)
    with pytest.raises(
        ModelError,
        match=r"detached from autograd: slope along .* by differences of the loss.*--except",
    ):
        compare(objective, state, ends_of(case))


def test_a_constant_weight_of_a_loss_contradicts_differences() -> None:
    case = stopped.case(torch.tanh)
    objective, state = objective_of(case), case.state(1)
    objective.loss = stopped.focal
    with pytest.raises(ModelError, match="detached from autograd"):
        compare(objective, state, ends_of(case))


@pytest.mark.parametrize("case", sample(CASES, 0, 2), ids=str)
def test_a_twin_in_float64_has_the_same_losses_and_no_tensor_of_the_original(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a large model, whose weights are changed a few at a time.
    monkeypatch.setattr("losscli.evaluation.precision._LOADED_BYTES", 100)
    objective = objective_of(case, dtype=torch.float32)
    a, b = case.state(1), case.state(2)
    check_task(objective, a)
    twin = in_float64(objective, objective.splits["all"].first(16))
    kept = objective.model.state_dict()
    assert all(torch.equal(kept[n], t.to(kept[n].dtype)) for n, t in a.items())
    if twin is None:
        # A closure and a wrapped forward are those of the original.
        assert case.name in {"closure", "patched"}
        return
    objective.load(b)
    (found,) = twin.plain(a).values()
    expected = oracle.losses(
        case.build, a, copy.deepcopy(case.inputs), case.targets, case.per_example
    )
    np.testing.assert_allclose(found.losses[0], expected, rtol=1e-12)


class Offset(nn.Module):
    """LayerNorm of features with an offset, in which float32 cancels."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(20, 24), nn.LayerNorm(24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.body(x) + 1000)))


class Shifted(nn.Module):
    """Logits with an offset, which does not change the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(20, 30), nn.Linear(30, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x))) + 1e5


CANCELLING = [
    Case(model.__name__, model, random(60, 20, seed=2).float(), torch.arange(60) % 5)
    for model in (Offset, Shifted)
]


@cache
def two_at_each_end(case: Case, dtype: torch.dtype) -> Extremes:
    return curvature_of(case, dtype=dtype).extremes(2, tolerance=1e-4, seed=0)


COVERED = [LARGER, *CANCELLING, *SEARCHED]


# `make test` takes every third case with one of the types and numbers.
@pytest.mark.parametrize(
    ("case", "dtype", "number"),
    sample(
        in_turn(
            COVERED,
            *((torch.float32, 20), (torch.bfloat16, 60), (torch.float32, 60), (torch.bfloat16, 20)),
        ),
        4,
        12,
    ),
    ids=str,
)
def test_errors_cover_the_distance_from_float64(
    case: Case, dtype: torch.dtype, number: int
) -> None:
    objective, state = objective_of(case, dtype=dtype), case.state(1)
    check_task(objective, state)
    names, split = parameters_of(objective.model), objective.splits["all"]
    sample = split.first(number)
    precise = in_float64(objective, sample)
    if precise is None:
        return
    truth = spectrum_of(case)
    found = two_at_each_end(case, dtype)
    given = found, objective, precise, state, names, sample
    wider = add_rounding(*given, whole=len(sample) == len(split), seed=0)
    for before, after in zip(pairs_of(found), pairs_of(wider), strict=True):
        assert before.value == after.value
        assert before.error <= after.error
        assert np.abs(truth - after.value).min() <= after.error


@pytest.mark.parametrize("case", sample(COVERED, 2, 5), ids=str)
def test_errors_cover_the_distance_from_float64_without_float64(case: Case) -> None:
    objective, state = objective_of(case, dtype=torch.float32), case.state(1)
    check_task(objective, state)
    names, split = parameters_of(objective.model), objective.splits["all"]
    truth, found = spectrum_of(case), two_at_each_end(case, torch.float32)
    wider = add_rounding(found, objective, None, state, names, split, whole=True, seed=0)
    for before, after in zip(pairs_of(found), pairs_of(wider), strict=True):
        assert before.error < after.error
        assert np.abs(truth - after.value).min() <= after.error


@pytest.mark.parametrize(
    ("name", "inside"),
    sample(itertools.product(stopped.SMOOTH, [torch.float32, torch.bfloat16]), 1, 5),
)
def test_right_derivatives_are_verified_with_casts_inside_the_model(
    name: str, inside: torch.dtype
) -> None:
    case = stopped.case(stopped.cast(stopped.SMOOTH[name], inside))
    objective, state = objective_of(case, dtype=torch.float32), case.state(1)
    check_task(objective, state)
    assert not compare(objective, state, ends_of(stopped.case(stopped.SMOOTH[name])))


@pytest.mark.parametrize(
    ("middle", "error", "dtype", "inside"),
    in_turn(
        [
            (stopped.STOPPED["partly detached"], "detached from autograd"),
            (stopped.STOPPED["straight-through rounding"], "detached from autograd"),
            (stopped.lying, "second derivatives? .* wrong"),
        ],
        *reversed(stopped.TYPES),
    ),
)
def test_wrong_derivatives_are_refused_with_casts_inside_the_model(
    middle: Callable[[Tensor], Tensor], error: str, dtype: torch.dtype, inside: torch.dtype
) -> None:
    case = stopped.case(stopped.cast(middle, inside))
    objective, state = objective_of(case, dtype=dtype), case.state(1)
    check_task(objective, state)
    with pytest.raises(ModelError, match=error):
        compare(objective, state)


@pytest.mark.parametrize(
    ("name", "dtype", "inside", "ends"),
    sample(
        itertools.product(
            stopped.SMOOTH | stopped.WRONG,
            [torch.float32, torch.bfloat16],
            [torch.float32, torch.bfloat16],
            [True, False],
        ),
        0,
        17,
    ),
)
def test_without_float64_derivatives_are_right_or_refused_or_noted(
    name: str,
    dtype: torch.dtype,
    inside: torch.dtype,
    ends: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No right derivative is refused, and no wrong one passes in silence."""
    monkeypatch.setattr(f"{__name__}.in_float64", lambda *_, **__: None)
    wrong = stopped.WRONG
    middle = (stopped.SMOOTH | wrong)[name]
    case = stopped.case(stopped.cast(middle, inside))
    objective, state = objective_of(case, dtype=dtype), case.state(1)
    check_task(objective, state)
    refused, noted = False, ""
    try:
        noted = compare(objective, state, ends_of(case) if ends else None)
    except ModelError:
        refused = True
    assert not refused or name in wrong
    assert refused or noted or name not in wrong


@pytest.mark.parametrize("case", CANCELLING, ids=str)
def test_without_measuring_errors_would_be_too_small_where_activations_cancel(case: Case) -> None:
    objective, state = objective_of(case, dtype=torch.float32), case.state(1)
    check_task(objective, state)
    names, split = parameters_of(objective.model), objective.splits["all"]
    v = torch.nn.functional.normalize(random(sum(t.numel() for t in state.values())), dim=0)
    precise = in_float64(objective, split)
    assert precise is not None
    rough, fine = (Curvature(o, state, names, split) for o in (objective, precise))
    assert float((rough.product(v) - fine.product(v)).norm()) > 0
    largest = rough.extremes(1, tolerance=1e-4, seed=0).largest[0]
    off = float((rough.product(largest.vector) - fine.product(largest.vector)).norm())
    assert off > 3 * rough._rounding * abs(largest.value)


# Verdicts.


def judged(curvature: Curvature, *, tolerance: float = 1e-3, limit: int = 1000) -> str:
    found = curvature.extremes(1, tolerance=1e-6, seed=0, limit=limit)
    norm = float(curvature.gradient().norm())
    return verdict(norm, tolerance, found.smallest[0], found.largest[0])


def test_a_linear_model_with_squared_error_has_the_covariance_of_its_inputs_for_hessian() -> None:
    case = LINEAR
    extended = torch.cat([case.inputs.double(), torch.ones(len(case.inputs), 1)], 1)
    covariance = extended.T @ extended / len(extended)
    found = curvature_of(case, batch_size=8)
    # Two outputs, of which the loss takes the mean: each eigenvalue twice, times 2 / 2.
    expected = np.repeat(np.linalg.eigvalsh(covariance.numpy()), 2)
    np.testing.assert_allclose(found.dense().eigenvalues, expected, rtol=1e-12)
    assert found.dense().shares == (1, 0, 0)
    assert judged(found) == "not critical"
    best = torch.linalg.lstsq(extended, case.targets.double()).solution
    weights = {"layers.0.weight": best[:-1].T, "layers.0.bias": best[-1]}
    objective = objective_of(case)
    assert (
        judged(Curvature(objective, weights, list(weights), objective.splits["all"])) == "minimum"
    )


class DeepLinear(nn.Module):
    """f = θ₁ θ₂ … x: scalars alone."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(depth))

    def forward(self, x: Tensor) -> Tensor:
        return self.theta.prod() * x


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().flatten(1).sum(1)


def deep_linear(depth: int, theta: float) -> tuple[Curvature, float, float]:
    x, y = random(9, 1), random(9, 1, seed=1)
    weights = {"theta": torch.full((depth,), theta, dtype=torch.float64)}
    curvature = curvature_at(DeepLinear(depth), weights, x, y, squared)
    return curvature, float((x * y).mean()), float(x.square().mean())


def test_two_linear_layers_at_zero_are_a_saddle() -> None:
    # L = E[(abx − y)²]: at zero the Hessian is −2 E[xy] off its diagonal and 0 on it.
    curvature, xy, _ = deep_linear(2, 0.0)
    found = curvature.extremes(1, tolerance=1e-6, seed=0)
    assert found.smallest[0].value == pytest.approx(-2 * abs(xy), rel=1e-12)
    assert found.largest[0].value == pytest.approx(2 * abs(xy), rel=1e-12)
    assert curvature.dense().shares == (0.5, 0.5, 0)
    assert judged(curvature) == "saddle"


def test_three_linear_layers_at_zero_are_flat_to_second_order() -> None:
    curvature, _, _ = deep_linear(3, 0.0)
    assert not curvature.dense().matrix.any()
    assert judged(curvature) == "undecided"


def test_the_valley_of_two_linear_layers_is_undecided() -> None:
    # All (a, b) with ab = E[xy] / E[x²] are minima: one eigenvalue is zero.
    _, xy, xx = deep_linear(2, 0.0)
    a = math.sqrt(abs(xy / xx))
    weights = {"theta": torch.tensor([a, math.copysign(a, xy)], dtype=torch.float64)}
    x, y = random(9, 1), random(9, 1, seed=1)
    curvature = curvature_at(DeepLinear(2), weights, x, y, squared)
    found = curvature.extremes(1, tolerance=1e-6, seed=0)
    assert found.largest[0].value == pytest.approx(4 * a * a * xx, rel=1e-12)
    assert judged(curvature) == "undecided"
    assert curvature.dense().shares == (0.5, 0, 0.5)


@pytest.mark.parametrize(
    ("low", "high", "expected", "n"),
    in_turn(
        [
            (1.0, 2.0, "minimum"),
            (-2.0, -1.0, "maximum"),
            (-1.0, 2.0, "saddle"),
            (0.0, 2.0, "undecided"),
            (-2.0, 0.0, "saddle"),
        ],
        *(100, 1, 5),
    ),
)
def test_quadratic_losses_have_their_known_spectra_and_verdicts(
    low: float, high: float, expected: str, n: int
) -> None:
    spectrum = np.linspace(low, high, n).tolist() if n > 1 else [low]
    if n == 1:
        expected = {-2.0: "maximum", -1.0: "maximum", 0.0: "undecided", 1.0: "minimum"}[low]
    assert judged(diagonal(spectrum)) == expected
    assert judged(diagonal(spectrum, at=5.0)) == (
        "undecided" if spectrum == [0.0] else "not critical"
    )


def test_a_search_cut_short_shows_a_saddle_and_never_a_minimum() -> None:
    assert judged(diagonal(np.linspace(1, 2, 100).tolist()), limit=4) == "undecided"
    assert judged(diagonal(np.linspace(-2, -1, 100).tolist()), limit=4) == "saddle"
    assert judged(diagonal(np.linspace(-2, 1, 100).tolist()), limit=8) == "saddle"


def pair(value: float, error: float = 0.1, *, converged: bool = True) -> Eigenpair:
    return Eigenpair(value, error, torch.ones(1), converged)


@pytest.mark.parametrize(
    ("gradient", "smallest", "largest", "expected"),
    [
        (2e-3, pair(1), pair(2), "not critical"),
        (math.inf, pair(1), pair(2), "not critical"),
        (1e-3, pair(1), pair(2), "minimum"),
        (0.0, pair(0.1), pair(2), "undecided"),
        (0.0, pair(0.05), pair(2), "undecided"),
        (0.0, pair(-0.05), pair(2), "undecided"),
        (0.0, pair(-0.1), pair(2), "undecided"),
        (0.0, pair(-0.2), pair(2), "saddle"),
        (0.0, pair(-0.2), pair(0.05), "saddle"),
        (0.0, pair(-0.2), pair(-0.05), "saddle"),
        (0.0, pair(-0.3), pair(-0.2), "maximum"),
        (0.0, pair(1, converged=False), pair(2), "undecided"),
        (0.0, pair(-1, converged=False), pair(2), "saddle"),
        (0.0, pair(-2), pair(-1, converged=False), "saddle"),
        (0.0, pair(-2, converged=False), pair(-1), "maximum"),
        (0.0, pair(1, math.inf), pair(2), "undecided"),
    ],
)
def test_a_verdict_is_never_stronger_than_its_figures(
    gradient: float, smallest: Eigenpair, largest: Eigenpair, expected: str
) -> None:
    assert verdict(gradient, 1e-3, smallest, largest) == expected


@pytest.mark.parametrize("gradient", [0.0, 1.0])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("place", range(6))
def test_nan_anywhere_decides_nothing(gradient: float, sign: int, place: int) -> None:
    figures = [gradient, 1e-3, sign * 1.0, 0.1, sign * 2.0, 0.1]
    figures[place] = math.nan
    g, tolerance, low, low_error, high, high_error = figures
    assert verdict(g, tolerance, pair(low, low_error), pair(high, high_error)) == "undecided"


# Room.


class Cramped:
    """Is out of memory for batches above a size, in the forward pass or in differentiating."""

    def __init__(self, objective: Objective, most: int) -> None:
        self.tried: list[int] = []
        self.most = most
        self.objective = objective

    def wrap(
        self, function: Callable[..., object], error: type[Exception]
    ) -> Callable[..., object]:
        def wrapped(*args: object, **kwargs: object) -> object:
            self.tried.append(self.objective.batch_size)
            if self.objective.batch_size > self.most:
                raise error("on purpose")
            return function(*args, **kwargs)

        return wrapped


@pytest.mark.parametrize(
    ("place", "error"),
    in_turn(["forward", "first", "second"], torch.OutOfMemoryError, MemoryError),
)
def test_out_of_memory_the_batch_is_halved(
    monkeypatch: pytest.MonkeyPatch, place: str, error: type[Exception]
) -> None:
    case = CASES[0]
    expected = curvature_of(case, batch_size=8)
    objective = objective_of(case, batch_size=8)
    names, split = parameters_of(objective.model), objective.splits["all"]
    told: list[float] = []
    curvature = Curvature(objective, case.state(1), names, split, told.append)
    space = Cramped(objective, 2)
    target, name = {
        "forward": (objective, "forward"),
        "first": (torch.autograd, "grad"),
        "second": (torch.autograd, "backward"),
    }[place]
    monkeypatch.setattr(target, name, space.wrap(getattr(target, name), error))
    gradient = curvature.gradient()
    assert space.tried == ([] if place == "second" else [8, 4, *[2] * 19])
    v = random(curvature.size)
    space.tried.clear()
    space.most = 1
    product = curvature.product(v)
    assert space.tried == ([8, 4, 2] if place == "second" else [2]) + [1] * 37
    assert sum(told) == pytest.approx(2)
    monkeypatch.undo()
    assert objective.batch_size == 1
    assert relative(gradient, expected.gradient()) < 1e-10
    assert relative(product, expected.product(v)) < 1e-10


def test_memory_that_runs_out_late_keeps_the_batches_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objective = objective_of(CASES[0], batch_size=8)
    names, split = parameters_of(objective.model), objective.splits["all"]
    curvature = Curvature(objective, CASES[0].state(1), names, split)
    forward, sizes = objective.forward, []

    def failing(model: nn.Module, inputs: Tensor) -> object:
        sizes.append(len(inputs))
        if len(sizes) == 3:
            raise torch.OutOfMemoryError("on purpose")
        return forward(model, inputs)

    monkeypatch.setattr(objective, "forward", failing)
    gradient = curvature.gradient()
    assert sizes == [8, 8, 8, 4, 4, 4, 4, 4, 1]
    assert relative(gradient, curvature_of(CASES[0]).gradient()) < 1e-10


def test_one_example_that_does_not_fit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = objective_of(CASES[0], batch_size=8)
    names, split = parameters_of(objective.model), objective.splits["all"]
    curvature = Curvature(objective, CASES[0].state(1), names, split)
    space = Cramped(objective, 0)
    forward = space.wrap(objective.forward, torch.OutOfMemoryError)
    monkeypatch.setattr(objective, "forward", forward)
    with pytest.raises(OutOfMemoryError, match=r"one example do not fit.*Try --device cpu"):
        curvature.gradient()
    assert space.tried == [8, 4, 2, 1]


def test_progress_is_reported_per_batch_and_adds_up_to_the_products() -> None:
    told: list[float] = []
    curvature = curvature_of(LINEAR, batch_size=8, progress=told.append)
    curvature.gradient()
    assert told == pytest.approx([8 / 37] * 4 + [5 / 37])
    curvature.gradient()
    assert len(told) == 5
    told.clear()
    curvature.product(random(curvature.size))
    assert sum(told) == pytest.approx(1)
    told.clear()
    curvature.dense()
    assert sum(told) == pytest.approx(curvature.size)
    told.clear()
    found = curvature.extremes(1, tolerance=1e-3, seed=0)
    assert sum(told) == pytest.approx(found.products)


# Order.


@pytest.mark.parametrize("case", sample(CASES, 1), ids=str)
def test_model_and_data_are_not_changed(case: Case) -> None:
    objective = objective_of(case, batch_size=8)
    state = case.state(1)
    check_task(objective, state)
    model = objective.model
    flags = [(i % 2 == 0) for i, _ in enumerate(model.parameters())]
    for parameter, flag in zip(model.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)
    inputs = copy.deepcopy(objective.splits["all"].inputs)
    last = parameters_of(model)[-1]
    with Curvature(objective, state, [last], objective.splits["all"]) as curvature:
        assert [n for n, p in model.named_parameters() if p.requires_grad] == [last]
        try:
            curvature.product(curvature.gradient())
        except ModelError:
            assert case.name in DETACHED
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name].to(tensor.dtype))
    left = objective.splits["all"].inputs
    pairs = zip(
        *((x.values() if isinstance(x, dict) else [x]) for x in (inputs, left)), strict=True
    )
    assert all(itertools.starmap(torch.equal, pairs))


def test_flags_are_restored_after_an_error() -> None:
    case = Case("once", lambda: Applied(Once), random(9, 4), torch.arange(9) % 3)
    objective = objective_of(case)
    objective.model.requires_grad_(requires_grad=False)
    split = objective.splits["all"]
    with (
        pytest.raises(ModelError),
        Curvature(objective, case.state(1), ["layer.bias"], split) as curvature,
    ):
        curvature.product(random(3))
    assert not any(p.requires_grad for p in objective.model.parameters())


def test_some_of_the_parameters_have_their_block_of_the_hessian() -> None:
    case = CASES[0]
    objective = objective_of(case)
    names = parameters_of(objective.model)
    chosen = [names[2], names[0]]
    curvature = Curvature(objective, case.state(1), chosen, objective.splits["all"])
    sizes = [objective.tensors[n].numel() for n in names]
    starts = np.cumsum([0, *sizes])
    places = np.r_[starts[2] : starts[3], starts[0] : starts[1]]
    expected = hessian_of(case).numpy()[np.ix_(places, places)]
    np.testing.assert_allclose(curvature.dense().matrix, expected, rtol=0, atol=1e-12)
    named = curvature.named(torch.arange(curvature.size))
    assert list(named) == chosen
    assert {n: t.shape for n, t in named.items()} == {n: objective.tensors[n].shape for n in chosen}
    assert torch.equal(
        torch.cat([t.reshape(-1) for t in named.values()]), torch.arange(curvature.size)
    )


@pytest.mark.parametrize("case", SEEN, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_has_the_derivatives_of_a_cpu(case: Case, dtype: torch.dtype) -> None:
    inputs, targets = (copy.deepcopy(x) for x in (case.inputs, case.targets))
    data = DataSet({"all": Split(inputs, targets)})
    device = torch.device("cuda")
    objective = Objective(
        case.build(), LOSSES[case.loss], {}, data, device=device, dtype=dtype, batch_size=9
    )
    state = case.state(1)
    check_task(objective, state)
    names = parameters_of(objective.model)
    found = Curvature(objective, state, names, objective.splits["all"])
    expected = curvature_of(case)
    v = random(found.size)
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-9}[dtype]
    assert relative(found.gradient().cpu(), expected.gradient()) < tolerance
    assert relative(found.product(v).cpu(), expected.product(v)) < tolerance
    pairs = zip(
        *(pairs_of(c.extremes(1, tolerance=1e-5, seed=0)) for c in (found, expected)), strict=True
    )
    for there, here in pairs:
        assert abs(there.value - here.value) <= there.error + here.error
