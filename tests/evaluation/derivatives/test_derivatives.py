"""Exact derivatives along a line: against differences of a plain float64 loop, and closed forms."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import losscli
from losscli.data import DataSet, Split
from losscli.errors import ModelError
from losscli.evaluation import decompositions as elementary
from losscli.evaluation.derivatives import method as derivative_method
from losscli.evaluation.derivatives import sweep as derivatives
from losscli.evaluation.derivatives.line import LineDerivatives, Method
from losscli.evaluation.derivatives.sweep import Slopes, slopes
from losscli.evaluation.finite_differences import (
    NEEDED,
    POINTS,
    Comparison,
    Differences,
    Outcome,
    rules,
    sample_size,
)
from losscli.evaluation.losses.built_in import LOSSES
from losscli.evaluation.objective import Objective
from losscli.evaluation.sweep import sweep
from losscli.evaluation.task_checks import check_task
from losscli.evaluation.tasks import Execution
from losscli.models import MLP
from losscli.weight_space.slices import Line
from tests import oracle, stopped
from tests.cases import CASES, Case, in_turn, sample
from tests.evaluation.test_objective import line_of, objective_of

ALPHAS = [-0.27, 0.35, 1.6]

# What has no derivative by its weights: it detaches, or keeps weights of another point.
CUT_OFF = {"threaded", "folding", "differentiating"}

WHOLE = [case for case in CASES if case.name not in CUT_OFF]

SEEDS = [range(1, 2), pytest.param(range(2, 11), marks=pytest.mark.stress)]


def ready(case: Case, *, seed: int = 1, **settings: Any) -> tuple[Objective, Line]:
    objective = objective_of(case, **settings)
    a, line = line_of(case, seeds=(seed, seed + 1))
    check_task(objective, a)
    return objective, line


def found_in(case: Case, alphas: list[float] = ALPHAS, **settings: Any) -> Slopes:
    objective, line = ready(case, **settings)
    return slopes(objective, line, alphas)["all"]


@cache
def found_in_float64(case: Case, batch_size: int | None = None) -> Slopes:
    """By default in one batch; in forward mode, without comparing with differences first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(derivatives, "choose_method", lambda *_: (Method.FORWARD, ""))
        return found_in(case, batch_size=batch_size)


@cache
def ends(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return case.state(1), case.state(2)


def mean_loss(case: Case, alpha: float) -> float:
    a, b = ends(case)
    state = oracle.blend(a, b, alpha)
    state |= {n: t for n, t in a.items() if torch.equal(t, b[n])}
    arguments = case.build, state, copy.deepcopy(case.inputs), case.targets, case.per_example
    return oracle.mean(oracle.losses(*arguments, batch_size=len(case.targets)))


def differences(case: Case, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Slope and curvature by central differences, extrapolated to a step of zero, and their errors.

    Of many steps that is taken around which the extrapolations (Richardson 1911) agree best, three
    in a row: a wide step has kinks of the network within it, a short one rounding.
    """
    middle = mean_loss(case, alpha)
    rows = []
    for k in range(13):
        h = 1e-2 / 2**k
        low, high = (mean_loss(case, alpha + sign * h) for sign in (-1, 1))
        rows.append([(high - low) / (2 * h), (high - 2 * middle + low) / h**2])
    table = np.array(rows)
    table = table[1:] + (table[1:] - table[:-1]) / 3
    steps = np.abs(np.diff(table, axis=0))
    errors = np.maximum(steps[1:], steps[:-1])
    best = errors.argmin(0)
    return table[best + 1, [0, 1]], errors[best, [0, 1]]


@pytest.mark.parametrize("case", sample(WHOLE, 0), ids=str)
@pytest.mark.parametrize("points", [[0, 1], pytest.param([2], marks=pytest.mark.stress)])
def test_derivatives_are_those_of_a_plain_float64_loop(case: Case, points: list[int]) -> None:
    found = found_in_float64(case, 19)
    for i in points:
        expected, errors = differences(case, ALPHAS[i])
        scale = max(1.0, np.abs(expected).max())
        # The nearest kink decides how well differences tell: at worst, well enough to matter.
        assert errors[0] < 1e-6
        assert errors[1] < 1e-3
        assert abs(found.slope[i] - expected[0]) <= 4 * errors[0] + 1e-11 * scale
        assert abs(found.curvature[i] - expected[1]) <= 4 * errors[1] + 1e-9 * scale


@pytest.mark.parametrize("case", sample(WHOLE, 1), ids=str)
def test_forward_and_reverse_mode_agree(case: Case) -> None:
    objective, line = ready(case)
    along = LineDerivatives(objective, line)
    for alpha in ALPHAS:
        forward, reverse = (
            along.sums(method, along.at(alpha), objective.splits["all"])
            for method in (Method.FORWARD, Method.REVERSE)
        )
        np.testing.assert_allclose(forward, reverse, rtol=1e-10, atol=1e-12)


# Transforms of functorch take no tensors that stand for polynomials.
@pytest.mark.parametrize("case", sample([c for c in WHOLE if c.name != "functorch"], 1, 5), ids=str)
def test_taylor_polynomials_agree_with_reverse_mode(case: Case) -> None:
    objective, line = ready(case)
    along = LineDerivatives(objective, line)
    batch = objective.splits["all"]
    for alpha in ALPHAS:
        # With the first layer's outputs kept and without.
        alone, shared = (
            along.sums(Method.TAYLOR, along.at(alpha), batch, key) for key in (None, ("all", alpha))
        )
        reverse = along.sums(Method.REVERSE, along.at(alpha), batch)
        np.testing.assert_allclose(alone, reverse, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(shared, reverse, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "middle",
    [
        lambda h: F.pad(h.tanh()[:, :7], (0, 1), value=0.3),
        lambda h: F.pad(h[:, :7], (0, 1), value=-math.inf).softmax(-1),
        lambda h: F.pad(h.tanh()[:, None, :6], (1, 1), mode="circular")[:, 0],
        lambda h: h.tanh() + torch.div(h, 0.5, rounding_mode="floor") / 10,
        lambda h: h.tanh() + h.div(0.5, rounding_mode="trunc") / 10,
    ],
    ids=["padded", "masked", "circular", "floor", "trunc"],
)
def test_taylor_polynomials_of_operators_that_are_linear_in_some_calls(
    middle: Callable[[Tensor], Tensor],
) -> None:
    objective, line = ready(stopped.case(middle))
    along = LineDerivatives(objective, line)
    for alpha in ALPHAS:
        taylor, reverse = (
            along.sums(method, along.at(alpha), objective.splits["all"])
            for method in (Method.TAYLOR, Method.REVERSE)
        )
        assert np.isfinite(reverse).all()
        np.testing.assert_allclose(taylor, reverse, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("wrong", "compared"), [(1.1, True), (math.nan, True), (1.1, False)])
def test_a_wrong_polynomial_is_not_taken_and_accuses_no_model(
    wrong: float, compared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = LineDerivatives.sums

    def changed(self: LineDerivatives, method: Method, *more: Any) -> tuple[float, float]:
        slope, curvature = sums(self, method, *more)
        return (slope * wrong if method is Method.TAYLOR else slope), curvature

    monkeypatch.setattr(LineDerivatives, "sums", changed)
    if not compared:
        monkeypatch.setattr(derivative_method, "_matches_reverse_mode", lambda *_: True)
    objective, line = ready(CASES[0])
    along = LineDerivatives(objective, line)
    method, _ = derivative_method.choose_method(along, ALPHAS, objective.splits["all"])
    assert method is Method.FORWARD


@pytest.mark.parametrize("case", sample(WHOLE, 0, 5), ids=str)
def test_derivatives_are_verified_in_float64_too(case: Case) -> None:
    objective, line = ready(case)
    found, expected = slopes(objective, line, ALPHAS)["all"], found_in_float64(case)
    assert not objective.notes
    torch.testing.assert_close(found.slope, expected.slope, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(found.curvature, expected.curvature, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("case", sample(WHOLE, 4, 6), ids=str)
def test_float32_is_near_float64(case: Case) -> None:
    single, double = found_in(case, dtype=torch.float32), found_in_float64(case)
    for one, other in ((single.slope, double.slope), (single.curvature, double.curvature)):
        scale = float(other.abs().max())
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5 * scale)


@pytest.mark.parametrize("case", sample(WHOLE, 0), ids=str)
def test_any_batch_gives_the_same_numbers(case: Case) -> None:
    whole, parts = found_in_float64(case), found_in_float64(case, 19)
    torch.testing.assert_close(parts.slope, whole.slope, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(parts.curvature, whole.curvature, rtol=1e-11, atol=1e-13)


def test_a_linear_model_with_squared_error_has_the_derivatives_of_a_parabola() -> None:
    case = next(c for c in CASES if c.name == "mlp-linear-mse")
    found = found_in(case)
    x = torch.cat([case.inputs, torch.ones(len(case.inputs), 1)], 1).double()
    a, b = (
        torch.cat([s["layers.0.weight"], s["layers.0.bias"][:, None]], 1).double()
        for s in (case.state(1), case.state(2))
    )
    along = x @ (b - a).T
    expected = [
        float((2 * along * (x @ (a + t * (b - a)).T - case.targets)).mean()) for t in ALPHAS
    ]
    np.testing.assert_allclose(found.slope, expected, rtol=1e-6)
    np.testing.assert_allclose(found.slope, np.polyval(np.polyfit(ALPHAS, expected, 1), ALPHAS))
    curvature = float((2 * along.square()).mean())
    np.testing.assert_allclose(found.curvature, [curvature] * len(ALPHAS), rtol=1e-6)


def test_a_product_of_two_weights_has_the_derivatives_of_its_polynomial() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u = nn.Parameter(torch.tensor([2.0]))
            self.v = nn.Parameter(torch.tensor([-1.0]))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.u * self.v

    case = Case("product", Product, torch.ones(3, 1), torch.zeros(3, 1), "mse")
    objective = objective_of(case)
    a = {"u": torch.tensor([2.0]), "v": torch.tensor([-1.0])}
    b = {"u": torch.tensor([3.0]), "v": torch.tensor([1.0])}
    check_task(objective, a)
    found = slopes(objective, Line(a, b), ALPHAS)["all"]
    # ((2 + α)(2α − 1))²
    loss = np.poly1d([2, 3, -2]) ** 2
    np.testing.assert_allclose(found.slope, loss.deriv()(ALPHAS), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.curvature, loss.deriv(2)(ALPHAS), rtol=1e-12)


def test_a_layer_with_several_names_is_differentiated_and_put_back() -> None:
    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.Linear(1, 1, bias=False)
            self.layers = nn.ModuleList([layer] * 3)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    case = Case("repeated", Repeated, torch.ones(3, 1), torch.zeros(3, 1), "mse")
    objective = objective_of(case)
    own = objective.model.layers[0].weight  # type: ignore[union-attr, index]
    a, b = ({"layers.0.weight": torch.full((1, 1), value)} for value in (2.0, 3.0))
    check_task(objective, a)
    found = slopes(objective, Line(a, b), ALPHAS)["all"]
    loss = np.poly1d([1, 2]) ** 6
    np.testing.assert_allclose(found.slope, loss.deriv()(ALPHAS), rtol=1e-12)
    np.testing.assert_allclose(found.curvature, loss.deriv(2)(ALPHAS), rtol=1e-12)
    assert objective.model.layers[0].weight is own  # type: ignore[union-attr, index]


def test_moving_buffers_are_differentiated_in_both_modes() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))

    case = Case("smooth", build, CASES[4].inputs, torch.arange(37) % 3)
    objective = objective_of(case)
    a, whole = line_of(case)
    check_task(objective, a)
    names = [n for n in whole.a if "running" in n]
    line = Line({n: whole.a[n] for n in names}, {n: whole.b[n] for n in names})
    h = 1e-3
    means = sweep(objective, line, [(0.4 + k * h,) for k in (-2, -1, 0, 1, 2)])["all"].losses
    low2, low, middle, high, high2 = means.mean(1).tolist()
    objective.load(a)
    slope = (8 * (high - low) - (high2 - low2)) / (12 * h)
    curvature = (16 * (high + low) - (high2 + low2) - 30 * middle) / (12 * h**2)
    found = slopes(objective, line, [0.4])["all"]
    assert abs(slope) > 1e-4
    np.testing.assert_allclose(found.slope, [slope], rtol=1e-8)
    np.testing.assert_allclose(found.curvature, [curvature], rtol=1e-6)
    along = LineDerivatives(objective, line)
    backward = along.sums(Method.REVERSE, along.at(0.4), objective.splits["all"])
    np.testing.assert_allclose(backward, [slope * 37, curvature * 37], rtol=1e-6)


def test_tensors_that_the_line_does_not_move_keep_their_values() -> None:
    case = CASES[0]
    objective = objective_of(case)
    _, whole = line_of(case)
    name = "layers.0.weight"
    line = Line({name: whole.a[name]}, {name: whole.b[name]})
    found = []
    for rest in (case.state(1), case.state(5)):
        check_task(objective, rest)
        found.append(slopes(objective, line, [0.3])["all"].slope)
        h = 1e-6
        low, high = sweep(objective, line, [(0.3 - h,), (0.3 + h,)])["all"].losses.mean(1)
        np.testing.assert_allclose(found[-1], [(high - low) / (2 * h)], rtol=1e-6)
    assert not torch.equal(*found)


@pytest.mark.parametrize(
    ("name", "method"),
    in_turn(
        ["cnn-batchnorm", "attention-tied", "lstm"], Method.TAYLOR, Method.FORWARD, Method.REVERSE
    ),
)
def test_the_model_is_not_changed(
    name: str, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = next(c for c in CASES if c.name == name)
    objective, line = ready(case)
    monkeypatch.setattr(derivatives, "choose_method", lambda *_: (method, ""))
    objective.model.requires_grad_(False)
    next(objective.model.parameters()).requires_grad_(True)
    kept = {n: (id(t), t.data_ptr(), t.clone()) for n, t in objective.tensors.items()}
    flags = {n: t.requires_grad for n, t in objective.tensors.items()}
    fast = torch.backends.mha.get_fastpath_enabled()
    slopes(objective, line, ALPHAS[:2])
    for n, t in objective.model.state_dict(keep_vars=True).items():
        assert (id(t), t.data_ptr()) == kept[n][:2]
        assert torch.equal(t, kept[n][2])
        assert t.requires_grad == flags[n]
        assert t.grad is None
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert not objective.model.training


def test_the_proof_leaves_the_model_as_it_was() -> None:
    objective, line = ready(CASES[0])
    kept = {n: t.clone() for n, t in objective.tensors.items()}
    slopes(objective, line, [0.7])
    assert all(torch.equal(t, kept[n]) for n, t in objective.tensors.items())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("name", sorted(CUT_OFF))
def test_derivatives_that_were_cut_off_are_refused(name: str) -> None:
    case = next(c for c in CASES if c.name == name)
    with pytest.raises(ModelError, match=r"detached from autograd.*--derivatives") as error:
        found_in(case)
    assert "\n" not in str(error.value)


SLOPE = r"slope at α = (\S+) is (\S+), but (\S+) by differences of the loss"


@pytest.mark.parametrize(
    ("name", "dtype"),
    sample(itertools.product(stopped.STOPPED, [torch.float32, torch.float64]), 0, 5),
)
def test_a_gradient_that_is_stopped_in_part_is_refused(name: str, dtype: torch.dtype) -> None:
    case = stopped.case(stopped.STOPPED[name])
    with pytest.raises(ModelError, match=f"detached from autograd: {SLOPE}") as error:
        found_in(case, dtype=dtype)
    assert "\n" not in str(error.value)
    match = re.search(SLOPE, str(error.value))
    assert match is not None
    alpha, found, true = map(float, match.groups())
    assert abs(found - true) > 1e-3 * abs(true)
    # The differences are those of a plain loop over the same examples: all, of so small a model.
    assert len(case.targets) < sample_size(ready(case)[0])
    low, high = (mean_loss(case, alpha + h) for h in (-1e-4, 1e-4))
    assert true == pytest.approx((high - low) / 2e-4, rel=0.05, abs=1e-3)


@pytest.mark.parametrize("dtype", sample([torch.float32, torch.float64], 0, 2))
def test_a_loss_with_a_constant_weight_is_refused(dtype: torch.dtype) -> None:
    objective, line = ready(stopped.case(torch.tanh), dtype=dtype)
    objective.loss = stopped.focal
    with pytest.raises(ModelError, match=f"detached from autograd: {SLOPE}"):
        slopes(objective, line, ALPHAS)
    objective.loss = stopped.whole_focal
    slopes(objective, line, ALPHAS)


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.stress)]
)
@pytest.mark.parametrize("name", sample(stopped.HONEST, 1))
@pytest.mark.parametrize("seeds", SEEDS)
def test_kinks_jumps_and_rounding_are_not_stopped_gradients(
    name: str, dtype: torch.dtype, seeds: range
) -> None:
    for seed in seeds:
        objective, line = ready(stopped.case(stopped.HONEST[name]), dtype=dtype, seed=seed)
        slopes(objective, line, ALPHAS)


@pytest.mark.parametrize("name", stopped.LOSSES)
@pytest.mark.parametrize("seeds", SEEDS)
def test_piecewise_losses_are_not_stopped_gradients(name: str, seeds: range) -> None:
    for seed in seeds:
        objective, line = ready(stopped.case(torch.relu), seed=seed)
        objective.loss = stopped.LOSSES[name]
        slopes(objective, line, ALPHAS)


def test_a_wrong_second_derivative_is_refused() -> None:
    with pytest.raises(ModelError, match=r"second derivative is wrong: curvature at α") as error:
        found_in(stopped.case(stopped.lying))
    assert "\n" not in str(error.value)


class Opaque(torch.autograd.Function):
    """Has a backward, and nothing for forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (1 - x.tanh().square())


class OnceOnly(Opaque):
    """Its backward cannot be differentiated."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return Opaque.backward(ctx, gradient)


def custom(function: type[torch.autograd.Function] | None) -> Case:
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            return self.head(torch.tanh(x) if function is None else function.apply(x))

    generator = torch.Generator().manual_seed(3)
    return Case("custom", Custom, torch.rand(11, 4, generator=generator), torch.arange(11) % 3)


def test_reverse_mode_replaces_forward_mode_for_operators_without_a_formula() -> None:
    found, expected = found_in(custom(Opaque), batch_size=4), found_in(custom(None))
    torch.testing.assert_close(found.slope, expected.slope, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(found.curvature, expected.curvature, rtol=1e-11, atol=1e-13)


def test_a_model_with_neither_is_an_error_of_one_line() -> None:
    with pytest.raises(ModelError, match=r"in forward mode .*in reverse mode .*Leave out") as error:
        found_in(custom(OnceOnly))
    assert "\n" not in str(error.value)


def test_recurrent_layers_with_fused_kernels_are_supported_in_float32() -> None:
    case = next(c for c in CASES if c.name == "lstm")
    objective, line = ready(case, dtype=torch.float32)
    along = LineDerivatives(objective, line)
    weights, split = along.at(0.3), objective.splits["all"]
    with pytest.raises(ModelError, match="forward AD"):
        along.sums(Method.FORWARD, weights, split)
    unfused = along.sums(Method.FORWARD_UNFUSED, weights, split)
    np.testing.assert_allclose(unfused, along.sums(Method.REVERSE, weights, split), rtol=1e-4)


def test_a_second_derivative_that_forward_mode_has_wrong_is_taken_in_reverse(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Without the normalisations made of elementary operators PyTorch's layer norm is used.
    case = stopped.case(lambda h: F.layer_norm(h, (8,)).tanh())
    expected = found_in_float64(case)
    monkeypatch.setattr(elementary, "_DECOMPOSITIONS", {})
    found = found_in(case)
    torch.testing.assert_close(found.curvature, expected.curvature, rtol=1e-10, atol=1e-12)

    def wrong(along: LineDerivatives, method: Method, *rest: Any) -> tuple[float, float]:
        slope, curvature = sums(along, method, *rest)
        return slope, curvature * (1.5 if method.mode == "forward" else 1)

    sums = LineDerivatives.sums
    monkeypatch.setattr(LineDerivatives, "sums", wrong)
    found = found_in(case)
    torch.testing.assert_close(found.curvature, expected.curvature, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_normalisations_made_of_elementary_operators_are_pytorchs(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(dtype)

    x, w, b, mean, var = rand(5, 3, 7), rand(3), rand(3), rand(3), rand(3) + 1
    calls: list[Any] = [
        lambda: F.layer_norm(x, (3, 7), rand_w, rand_b, 1e-3),
        lambda: F.layer_norm(x, (7,)),
        lambda: F.batch_norm(x, mean, var, w, b, False, 0.1, 1e-3),
        lambda: F.batch_norm(x, mean, var),
        lambda: F.batch_norm(x, None, None, w, b, True),
        lambda: F.batch_norm(x[..., 0], mean, var, w),
        lambda: F.instance_norm(x, None, None, w, b),
        lambda: torch._weight_norm(x, rand_g, 0),
        lambda: torch._weight_norm(x, rand_g.view(1, 1, 5)[..., :1], -1),
        lambda: F.embedding(torch.tensor([[0, 2], [1, 0]]), x[:, 0], padding_idx=0),
        lambda: F.instance_norm(x, mean, var, w, b, use_input_stats=False, eps=1e-2),
    ]
    rand_w, rand_b, rand_g = rand(3, 7), rand(3, 7), rand(5, 1, 1)
    for call in calls:
        with elementary.Decomposed():
            found = call()
        assert found.dtype == dtype
        ulp = torch.finfo(dtype).eps
        torch.testing.assert_close(found, call(), rtol=8 * ulp, atol=8 * ulp)


def test_frozen_weights_that_move_are_differentiated() -> None:
    case = CASES[0]
    objective, line = ready(case)
    objective.model.requires_grad_(False)
    along = LineDerivatives(objective, line)
    taylor, forward, reverse = (
        along.sums(method, along.at(0.3), objective.splits["all"])
        for method in (Method.TAYLOR, Method.FORWARD, Method.REVERSE)
    )
    np.testing.assert_allclose(reverse, forward, rtol=1e-12)
    np.testing.assert_allclose(reverse, taylor, rtol=1e-12)
    assert abs(reverse[0]) > 1e-3


def test_each_split_has_its_own_and_progress_reaches_the_number_of_points() -> None:
    case = CASES[0]
    halves = {
        "one": Split(case.inputs[:11], case.targets[:11]),
        "other": Split(case.inputs[11:], case.targets[11:]),
    }
    objective = Objective(
        case.build(),
        LOSSES[case.loss],
        {},
        DataSet(halves),
        device=torch.device("cpu"),
        dtype=torch.float64,
        batch_size=4,
    )
    a, line = line_of(case)
    check_task(objective, a)
    told: list[float] = []
    found = slopes(objective, line, ALPHAS, execution=Execution(told.append))
    assert told == sorted(told)
    assert told[-1] == pytest.approx(len(ALPHAS))
    whole = found_in_float64(case)
    both = (11 * found["one"].slope + 26 * found["other"].slope) / 37
    torch.testing.assert_close(both, whole.slope, rtol=1e-11, atol=1e-13)
    assert not torch.allclose(found["one"].slope, found["other"].slope)
    (only,) = slopes(objective, line, ALPHAS, {"one": halves["one"]}).values()
    assert torch.equal(only.slope, found["one"].slope)


def test_a_line_that_moves_nothing_is_flat() -> None:
    objective, _ = ready(CASES[0])
    found = slopes(objective, Line({}, {}), [0.0, 1.0])["all"]
    assert found.slope.tolist() == found.curvature.tolist() == [0.0, 0.0]


def test_half_precision_gives_roughly_the_same_slopes() -> None:
    case = CASES[1]
    found, expected = found_in(case, dtype=torch.bfloat16), found_in_float64(case)
    scale = float(expected.slope.abs().max())
    np.testing.assert_allclose(found.slope, expected.slope, atol=0.05 * scale)


def test_out_of_memory_is_left_to_who_can_halve_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, line = ready(CASES[0])

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("on purpose")

    monkeypatch.setattr(objective, "forward", full)
    along = LineDerivatives(objective, line)
    with pytest.raises(torch.OutOfMemoryError):
        along.sums(Method.FORWARD, along.at(0.3), objective.splits["all"])


def test_a_relu_network_between_its_kinks_is_as_curved_as_its_loss() -> None:
    # |θ| of one weight that crosses zero at α = 0.5: the slope jumps, the curvature is 0.
    class Absolute(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = MLP("1-1")

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.layer(x)) + torch.relu(-self.layer(x))

    def first(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs[:, 0]

    objective = Objective(
        Absolute(),
        first,
        {},
        DataSet({"all": Split(torch.ones(4, 1), torch.zeros(4, 1))}),
        device=torch.device("cpu"),
        dtype=torch.float64,
    )
    names = ["layer.layers.0.weight", "layer.layers.0.bias"]
    a = {names[0]: torch.tensor([[1.0]]), names[1]: torch.tensor([0.0])}
    check_task(objective, a)
    line = Line({names[0]: a[names[0]]}, {names[0]: -a[names[0]]})
    found = slopes(objective, line, [0.2, 0.8])["all"]
    assert found.slope.tolist() == [-2.0, 2.0]
    assert found.curvature.tolist() == [0.0, 0.0]


def test_a_gradient_that_is_stopped_only_for_the_last_examples_is_refused() -> None:
    """Sorted data begin with examples of one class, whose gradients may be right."""

    def stopped(outputs: Tensor, targets: Tensor) -> Tensor:
        losses = F.cross_entropy(outputs, targets, reduction="none")
        return torch.where(targets == 2, losses.detach(), losses)

    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)) for _ in range(2)]
    data = {"all": (torch.randn(90, 6), (torch.arange(90) % 3).sort().values)}
    with pytest.raises(ModelError, match="detached from autograd"):
        losscli.interpolate(
            *(model.state_dict() for model in models),
            model=models[0],
            data=data,
            loss=stopped,
            points=3,
            derivatives=True,
        )


@pytest.mark.parametrize(
    ("study", "dtype"), in_turn(["interpolate", "check"], torch.bfloat16, torch.float16)
)
def test_rounding_to_half_precision_inside_is_not_a_stopped_gradient(
    study: str, dtype: torch.dtype
) -> None:
    class Rounding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).to(dtype).to(x.dtype)

    torch.manual_seed(0)
    models = [Rounding() for _ in range(2)]
    given: dict[str, Any] = {
        "model": models[0],
        "data": {"all": (torch.randn(30, 6), torch.arange(30) % 3)},
    }
    states = [model.state_dict() for model in models]
    if study == "interpolate":
        losscli.interpolate(*states, points=3, derivatives=True, **given)
    else:
        losscli.check(states[0], **given)


INSIDE = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(
    ("name", "inside"), sample(itertools.product(stopped.SMOOTH, INSIDE), 0, 5)
)
def test_right_derivatives_are_verified_with_casts_inside_the_model(
    name: str, inside: torch.dtype
) -> None:
    middle = stopped.SMOOTH[name]
    case = stopped.case(stopped.cast(middle, inside))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        objective, line = ready(case, dtype=dtype)
        found = slopes(objective, line, ALPHAS)["all"]
        assert not objective.notes
        if (name, inside, dtype) == ("tanh", torch.float32, torch.float64):
            expected = [differences(stopped.case(middle), alpha)[0] for alpha in ALPHAS]
            np.testing.assert_allclose(found.slope, np.array(expected)[:, 0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("middle", "error", "dtype", "inside"),
    in_turn(
        [
            (stopped.STOPPED["partly detached"], "detached from autograd"),
            (stopped.STOPPED["straight-through rounding"], "detached from autograd"),
            (stopped.lying, "second derivative is wrong"),
        ],
        *stopped.TYPES,
    ),
)
def test_wrong_derivatives_are_refused_with_casts_inside_the_model(
    middle: Any, error: str, dtype: torch.dtype, inside: torch.dtype
) -> None:
    objective, line = ready(stopped.case(stopped.cast(middle, inside)), dtype=dtype)
    with pytest.raises(ModelError, match=error):
        slopes(objective, line, ALPHAS)


@pytest.mark.parametrize(
    ("name", "dtype"),
    sample(
        itertools.product(stopped.SMOOTH | stopped.WRONG, [torch.float32, torch.bfloat16]), 0, 5
    ),
)
def test_without_float64_derivatives_are_right_or_refused_or_noted(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No right derivative is refused, and no wrong one passes in silence."""
    monkeypatch.setattr(derivative_method, "in_float64", lambda *_, **__: None)
    wrong = stopped.WRONG
    objective, line = ready(stopped.case((stopped.SMOOTH | wrong)[name]), dtype=dtype)
    refused = False
    try:
        slopes(objective, line, ALPHAS)
    except ModelError as error:
        refused = "detached" in error.what
    noted = any("not verified" in note for note in objective.notes)
    assert not refused or name in wrong
    assert refused or noted or name not in wrong
    if dtype == torch.bfloat16:
        # Its rounding hides all differences.
        assert noted


@pytest.mark.parametrize(
    ("outcomes", "verified"),
    [
        ([], [True, True]),
        ([Outcome.NOT_FINITE] * 4, [True, True]),
        ([Outcome.RIGHT, Outcome.NOT_FINITE], [True, True]),
        ([Outcome.RIGHT, Outcome.HIDDEN], [False, False]),
        ([Outcome.RIGHT, Outcome.HIDDEN, Outcome.RIGHT], [True, True]),
        ([Outcome.RIGHT, Outcome.RIGHT, Outcome.WRONG, Outcome.RIGHT], [True, False]),
    ],
)
def test_two_points_verify_a_derivative_and_in_float32_none_may_contradict_it(
    outcomes: list[Outcome], verified: list[bool]
) -> None:
    compared = [Comparison(outcome) for outcome in outcomes]
    types = (torch.float64, torch.float32)
    assert [rules(narrowest)[0].verifies(compared) for narrowest in types] == verified


@pytest.mark.parametrize("narrowest", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seen", range(5))
def test_points_are_left_out_only_where_they_change_no_verdict(
    narrowest: torch.dtype, seen: int
) -> None:
    def verdict(rule: Differences, outcomes: tuple[Outcome, ...]) -> str:
        if outcomes.count(Outcome.WRONG) >= NEEDED:
            return "wrong"
        return "right" if rule.verifies(map(Comparison, outcomes)) else "unverified"

    for rule in rules(narrowest):
        possible = [o for o in Outcome if o is not Outcome.WRONG or rule.wrong < math.inf]
        for begun in itertools.product(possible, repeat=seen):
            if rule.decides([*map(Comparison, begun)], POINTS - seen):
                ends = itertools.product(possible, repeat=POINTS - seen)
                assert {verdict(rule, begun + end) for end in ends} == {verdict(rule, begun)}
        fewest = NEEDED if rule.wrong == math.inf else POINTS - 1 if rule.precise else POINTS
        assert rule.decides([Comparison(Outcome.RIGHT)] * seen, POINTS - seen) == (seen >= fewest)
