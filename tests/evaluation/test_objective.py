"""The laws of evaluation, over all cases: the same numbers from every path."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from losscli.data import DataSet, Split
from losscli.errors import LossError, ModelError, NondeterministicModelError, OutOfMemoryError
from losscli.evaluation.losses import metrics
from losscli.evaluation.losses.built_in import LOSSES
from losscli.evaluation.objective import Evaluation, Objective
from losscli.evaluation.strategies.base import Strategy
from losscli.evaluation.strategies.first_layer import FirstLayer
from losscli.evaluation.strategies.replicas import is_stateless
from losscli.evaluation.strategy_choice import find_strategy
from losscli.evaluation.sweep import check, sweep, sweep_plain
from losscli.evaluation.task_checks import check_task
from losscli.evaluation.tasks import Execution
from losscli.weight_space.slices import Line, grid
from tests import foreign, oracle
from tests.cases import CASES, Case, sample

ALPHAS = [-0.5, 0.0, 0.15, 0.5, 1.0, 2.0]
# Where the oracle takes one example at a time; elsewhere it takes all in one batch.
ONE_BY_ONE = 0.15


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Whatever the tests as a whole may use, points are dealt to threads here."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def objective_of(
    case: Case, *, dtype: torch.dtype = torch.float64, batch_size: int | None = None
) -> Objective:
    data = DataSet({"all": Split(case.inputs, case.targets)})
    return Objective(
        case.build(),
        LOSSES[case.loss],
        {},
        data,
        device=torch.device("cpu"),
        dtype=dtype,
        batch_size=batch_size,
    )


def line_of(case: Case, *, seeds: tuple[int, int] = (1, 2)) -> tuple[dict[str, Tensor], Line]:
    a, b = (case.state(seed) for seed in seeds)
    names = [n for n in a if a[n].is_floating_point() and not torch.equal(a[n], b[n])]
    if case.name == "attention-tied":
        names.remove("embedding.weight")
    return a, Line({n: a[n] for n in names}, {n: b[n] for n in names})


def curve(
    case: Case,
    alphas: list[float],
    *,
    dtype: torch.dtype = torch.float64,
    batch_size: int | None = None,
    chunk: int | None = None,
    seeds: tuple[int, int] = (1, 2),
) -> Tensor:
    objective = objective_of(case, dtype=dtype, batch_size=batch_size)
    a, line = line_of(case, seeds=seeds)
    check_task(objective, a)
    return sweep(objective, line, [(x,) for x in alphas], chunk=chunk)["all"].losses


@cache
def whole(case: Case) -> Tensor:
    """The curve in float64, all examples in one batch; read only."""
    return curve(case, ALPHAS, batch_size=1000)


def plain_losses(case: Case, alpha: float, state: oracle.State, dtype: torch.dtype) -> list[float]:
    return oracle.losses(
        case.build,
        state,
        copy.deepcopy(case.inputs),
        case.targets,
        case.per_example,
        dtype=dtype,
        batch_size=1 if alpha == ONE_BY_ONE else len(case.targets),
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_example_at_every_point_has_the_loss_of_a_plain_float64_loop(case: Case) -> None:
    a, b = case.state(1), case.state(2)
    found = curve(case, ALPHAS, batch_size=8)
    for alpha, row in zip(ALPHAS, found, strict=True):
        state = oracle.blend(a, b, alpha)
        state |= {n: t for n, t in a.items() if torch.equal(t, b[n])}
        expected = plain_losses(case, alpha, state, torch.float64)
        np.testing.assert_allclose(row, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", sample(CASES, 0), ids=str)
def test_float32_agrees_with_a_plain_float32_loop(case: Case) -> None:
    objective = objective_of(case, dtype=torch.float32)
    a, line = line_of(case)
    check_task(objective, a)
    found = sweep(objective, line, [(x,) for x in ALPHAS])["all"].losses.double().mean(1)
    states = [{**a, **{n: torch.lerp(line.a[n], line.b[n], x) for n in line.a}} for x in ALPHAS]
    if case.name == "attention-tied":
        states = [{**s, "embedding.weight": s["head.weight"]} for s in states]
    expected = [
        oracle.mean(plain_losses(case, alpha, state, torch.float32))
        for alpha, state in zip(ALPHAS, states, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("case", sample(CASES, 2), ids=str)
def test_swapping_the_ends_mirrors_the_curve(case: Case) -> None:
    back = curve(case, [1 - x for x in reversed(ALPHAS)], seeds=(2, 1))
    torch.testing.assert_close(back.flip(0), whole(case), rtol=1e-12, atol=1e-14, equal_nan=True)


@pytest.mark.parametrize("case", sample(CASES, 0, 5), ids=str)
def test_any_chunk_and_batch_give_the_same_numbers(case: Case) -> None:
    for chunk in (1, 3):
        parts = curve(case, ALPHAS, batch_size=2 * chunk + 1, chunk=chunk)
        torch.testing.assert_close(parts, whole(case), rtol=1e-12, atol=1e-14, equal_nan=True)


@pytest.mark.parametrize("case", sample(CASES, 1, 5), ids=str)
def test_any_batch_gives_the_same_loss_in_float32_to_1e_6(case: Case) -> None:
    whole, *others = (
        curve(case, [-0.5, 0.5, 1.3], dtype=torch.float32, batch_size=size).double().mean(1)
        for size in (1000, 1, 5)
    )
    for other in others:
        np.testing.assert_allclose(other, whole, rtol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_checkpoint_loaded_plainly_has_its_own_loss_to_the_last_bit(case: Case) -> None:
    objective = objective_of(case, dtype=torch.float32, batch_size=10)
    state = case.state(1)
    check_task(objective, state)
    (found,) = sweep_plain(objective, [state])
    model = case.build()
    model.load_state_dict(state)
    model.eval()
    data = objective.data
    expected = []
    with torch.no_grad():
        for start in range(0, len(case.targets), 10):
            batch = Split(copy.deepcopy(case.inputs), case.targets).take(slice(start, start + 10))
            x = data.prepare(batch.inputs, torch.float32)
            outputs = model(**x) if isinstance(x, dict) else model(x)
            expected.append(case.per_example(outputs, batch.targets))
    # Computed in float64, stored in float32.
    assert torch.equal(found["all"].losses[0], torch.cat(expected).float())


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("mlp-relu", True),
        ("mlp-sigmoid", True),
        ("mlp-maxout", True),
        ("cnn-batchnorm", True),
        ("convolving", True),
        ("two-inputs", True),
        ("spoiling", True),
        ("branching", True),
        ("attention-tied", True),
        ("lstm", False),
        ("normalising", False),
        ("functional", False),
    ],
)
def test_a_first_layer_is_shared_where_its_input_is_the_same_at_all_points(
    name: str, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = next(c for c in CASES if c.name == name)
    calls = 0
    output = FirstLayer.output

    def counting(self: FirstLayer, point: Sequence[float]) -> Tensor:
        nonlocal calls
        calls += 1
        return output(self, point)

    objective = objective_of(case, batch_size=1000)
    a, line = line_of(case)
    check_task(objective, a)
    points = [(x,) for x in ALPHAS]
    find_strategy(objective, line, points)
    monkeypatch.setattr(FirstLayer, "output", counting)
    sweep(objective, line, points)
    # All points share it but those where some unit's weights nearly cancel; and code of a user's
    # own, which is never left in the middle of a pass, has run to the end at the one watched.
    watched = 0 if is_stateless(objective) else 1
    assert calls <= len(ALPHAS) - watched
    assert calls >= 5 if shared else calls == 0


# What vmap does one by one (the kernels of attention and LSTM on a CPU) or cannot do: weights
# folded into others, gradients in the forward pass, other threads.
REFUSED = {"attention-tied", "lstm", "folding", "differentiating", "threaded"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("case", sample(CASES, 3, 5), ids=str)
def test_all_points_at_once_give_the_numbers_of_points_in_turn(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = objective_of(case, batch_size=9)
    a, line = line_of(case)
    check_task(objective, a)
    points = [(x,) for x in ALPHAS]
    monkeypatch.setattr(
        "losscli.evaluation.strategy_choice.candidates", lambda _: [Strategy.STACKED]
    )
    find_strategy(objective, line, points)
    assert (objective.strategy or objective.provisional) is (
        Strategy.LOADED if case.name in REFUSED else Strategy.STACKED
    )
    found = sweep(objective, line, points)["all"]
    torch.testing.assert_close(found.losses, whole(case), rtol=1e-10, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("flat", [False, True])
def test_weights_that_cudnn_keeps_in_one_buffer_stay_in_it(
    flat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = next(c for c in CASES if c.name == "lstm")
    monkeypatch.setattr("losscli.evaluation.strategies.points._is_in_cudnn", lambda _: flat)
    monkeypatch.setattr(
        "losscli.evaluation.strategy_choice.candidates", lambda _: [Strategy.SHARED]
    )
    objective = objective_of(case, batch_size=9)
    a, line = line_of(case)
    check_task(objective, a)
    weights = list(objective.model.lstm.parameters())
    head = objective.model.head.weight
    before = [weight.data_ptr() for weight in weights]
    addresses: set[tuple[int, ...]] = set()
    heads: set[int] = set()

    def remember(*_: object) -> None:
        addresses.add(tuple(weight.data_ptr() for weight in weights))
        heads.add(head.data_ptr())

    points = [(x,) for x in ALPHAS]
    find_strategy(objective, line, points)
    objective.model.lstm.register_forward_hook(remember)
    found = sweep(objective, line, points)["all"]
    torch.testing.assert_close(found.losses, whole(case), rtol=1e-10, atol=1e-12)
    assert len(heads) == len(ALPHAS)
    assert len(addresses) == (1 if flat else len(ALPHAS))
    assert [weight.data_ptr() for weight in weights] == before


def test_metrics_of_all_points_at_once_are_those_of_points_in_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = CASES[0]
    found = []
    for ways in ([Strategy.STACKED], [Strategy.BOUND]):
        objective = objective_of(case, batch_size=5)
        objective.metrics = {"accuracy": metrics.accuracy}
        a, line = line_of(case)
        check_task(objective, a)
        monkeypatch.setattr(
            "losscli.evaluation.strategy_choice.candidates", lambda _, ways=ways: ways
        )
        found.append(sweep(objective, line, [(x,) for x in ALPHAS])["all"].metrics["accuracy"])
    assert torch.equal(*found)


def test_ends_in_half_precision_move_in_float32() -> None:
    case = CASES[0]
    a, b = ({n: t.bfloat16() for n, t in case.state(s).items()} for s in (1, 2))
    objective = objective_of(case, dtype=torch.float32)
    check_task(objective, a)
    found = sweep(objective, Line(a, b), [(0.3,)])["all"].losses[0]
    state = oracle.blend(a, b, 0.3)
    expected = oracle.losses(case.build, state, case.inputs, case.targets, case.per_example)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_forward_pass_takes_its_loss_in_float32(dtype: torch.dtype) -> None:
    found = curve(CASES[0], ALPHAS, dtype=dtype)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, whole(CASES[0]).float(), rtol=0.1, atol=0.05)


def test_metrics_are_means_over_examples() -> None:
    case = CASES[0]
    data = DataSet({"all": Split(case.inputs, case.targets)})
    objective = Objective(
        case.build(),
        LOSSES[case.loss],
        {"accuracy": metrics.accuracy},
        data,
        device=torch.device("cpu"),
        batch_size=5,
    )
    a, line = line_of(case)
    check_task(objective, a)
    found = sweep(objective, line, [(0.0,), (0.4,)])["all"].metrics["accuracy"]
    for alpha, value in zip((0.0, 0.4), found, strict=True):
        model = case.build()
        model.load_state_dict({n: torch.lerp(line.a[n], line.b[n], alpha) for n in a})
        right = (model(case.inputs).argmax(1) == case.targets).sum().item()
        assert value.item() == right / len(case.targets)


def test_the_linear_model_with_squared_error_gives_a_parabola() -> None:
    case = next(c for c in CASES if c.name == "mlp-linear-mse")
    alphas = grid(9, -1, 3)
    means = curve(case, alphas).mean(1).numpy()
    fit = np.polynomial.Polynomial.fit(alphas, means, 2)
    np.testing.assert_allclose(fit(np.array(alphas)), means, rtol=1e-12)
    assert fit.convert().coef[2] > 0


def test_progress_reaches_the_number_of_points() -> None:
    objective = objective_of(CASES[0], batch_size=5)
    _, line = line_of(CASES[0])
    told: list[float] = []
    sweep(objective, line, [(x,) for x in ALPHAS], chunk=3, execution=Execution(told.append))
    assert told == sorted(told)
    assert told[-1] == pytest.approx(len(ALPHAS))


class Cramped:
    """An objective's `at` and `plain` that are out of memory above a size."""

    def __init__(self, objective: Objective, *, points: int, batch: int) -> None:
        self.tried: list[tuple[int, int]] = []
        self._objective = objective
        self._limits = points, batch
        self._at, self._plain = objective.at, objective.plain

    def at(
        self, slice_: Line, coordinates: list[tuple[float]], *rest: object
    ) -> dict[str, Evaluation]:
        self._try(len(coordinates))
        return self._at(slice_, coordinates, *rest)  # type: ignore[arg-type]

    def plain(self, weights: dict[str, Tensor], *rest: object) -> dict[str, Evaluation]:
        self._try(1)
        return self._plain(weights, *rest)  # type: ignore[arg-type]

    def _try(self, points: int) -> None:
        self.tried.append((points, self._objective.batch_size))
        if points > self._limits[0] or self._objective.batch_size > self._limits[1]:
            raise torch.OutOfMemoryError("on purpose")


def cramped(
    monkeypatch: pytest.MonkeyPatch, *, points: int, batch: int
) -> tuple[Objective, Cramped]:
    objective = objective_of(CASES[0], batch_size=8)
    _, line = line_of(CASES[0])
    find_strategy(objective, line, [(x,) for x in ALPHAS])
    space = Cramped(objective, points=points, batch=batch)
    monkeypatch.setattr(objective, "at", space.at)
    monkeypatch.setattr(objective, "plain", space.plain)
    return objective, space


def test_out_of_memory_halves_the_chunk_and_keeps_finished_points(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objective, space = cramped(monkeypatch, points=2, batch=8)
    _, line = line_of(CASES[0])
    found = sweep(objective, line, [(x,) for x in ALPHAS], chunk=6)["all"].losses
    assert space.tried == [(6, 8), (3, 8), (1, 8), (1, 8), (1, 8), (1, 8), (1, 8), (1, 8)]
    torch.testing.assert_close(found, whole(CASES[0]), rtol=1e-12, atol=0)


def test_then_the_batch_is_halved_down_to_one_example(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, space = cramped(monkeypatch, points=1, batch=1)
    _, line = line_of(CASES[0])
    found = sweep(objective, line, [(0.3,), (0.6,)])["all"].losses
    assert space.tried == [(2, 8), (1, 8), (1, 4), (1, 2), (1, 1), (1, 1)]
    torch.testing.assert_close(found, curve(CASES[0], [0.3, 0.6]), rtol=1e-12, atol=0)


def test_plain_evaluation_halves_its_batch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, space = cramped(monkeypatch, points=1, batch=4)
    sweep_plain(objective, [CASES[0].state(1)])
    assert space.tried == [(1, 8), (1, 4)]


def test_checks_halve_their_batch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = objective_of(CASES[0], batch_size=8)
    a, _ = line_of(CASES[0])
    tried = []

    def checking(*_: object) -> None:
        tried.append(objective.batch_size)
        if objective.batch_size > 2:
            raise torch.OutOfMemoryError("on purpose")

    monkeypatch.setattr("losscli.evaluation.sweep.check_task", checking)
    check(objective, a)
    assert tried == [8, 4, 2]


def test_one_example_that_does_not_fit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, _ = cramped(monkeypatch, points=0, batch=0)
    _, line = line_of(CASES[0])
    with pytest.raises(OutOfMemoryError, match="one point and one example"):
        sweep(objective, line, [(0.3,)])


def test_a_model_that_is_random_in_eval_mode_is_refused() -> None:
    case = Case("random", foreign.Random, torch.rand(9, 4), torch.arange(9) % 3)
    with pytest.raises(NondeterministicModelError, match="random numbers"):
        check_task(objective_of(case), case.state(1))


@pytest.mark.parametrize("label", [-1, 5])
def test_labels_out_of_range_are_found_before_any_kernel_does(label: int) -> None:
    targets = CASES[0].targets.clone()
    targets[20] = label
    case = Case("labels", CASES[0].build, CASES[0].inputs, targets)
    with pytest.raises(LossError, match=f"has the label {label}.*labels 0 to 4"):
        check_task(objective_of(case), case.state(1))


def test_a_loss_that_is_not_one_number_per_example_is_refused() -> None:
    case = CASES[0]
    data = DataSet({"all": Split(case.inputs, case.targets)})
    objective = Objective(case.build(), foreign.batch_mean, {}, data, device=torch.device("cpu"))
    with pytest.raises(LossError, match="reduction=none"):
        check_task(objective, case.state(1))


def test_a_model_that_does_not_take_the_data_says_so() -> None:
    case = Case("wide", CASES[0].build, torch.rand(9, 5), torch.arange(9) % 3)
    with pytest.raises(ModelError, match=r"\[9, 5\].*--data"):
        check_task(objective_of(case), case.state(1))


def test_the_stored_data_is_never_changed() -> None:
    case = next(c for c in CASES if c.name == "spoiling")
    before = case.inputs.clone()
    curve(case, ALPHAS)
    assert torch.equal(case.inputs, before)


@pytest.mark.parametrize(
    ("inputs", "batch"),
    [
        (torch.zeros(1, 784), 2048),
        (torch.zeros(1, 1, 28, 28), 1024),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), 256),
        (torch.zeros(1, 3, 224, 224), 4),
        (torch.zeros(1, 1024, dtype=torch.long), 2),
        ({"x": torch.zeros(1, 2000), "y": torch.zeros(1, 2000)}, 512),
    ],
)
def test_the_default_batch_is_of_a_size_that_fits_the_caches(inputs: object, batch: int) -> None:
    case = Case("sizes", foreign.linear, inputs, torch.zeros(1))
    assert objective_of(case).batch_size == batch


# A model that runs a part of itself in a thread fails there when its points are mapped.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_gives_the_numbers_of_a_plain_float64_loop(case: Case) -> None:
    inputs, targets = (copy.deepcopy(x) for x in (case.inputs, case.targets))
    data = DataSet({"all": Split(inputs, targets)})
    device = torch.device("cuda")
    objective = Objective(
        case.build(), LOSSES[case.loss], {}, data, device=device, dtype=torch.float64, batch_size=9
    )
    a, line = line_of(case)
    check_task(objective, a)
    there = Line(*({n: t.to(device) for n, t in end.items()} for end in line.ends))
    found = sweep(objective, there, [(x,) for x in ALPHAS])["all"].losses
    torch.testing.assert_close(found, whole(case), rtol=1e-9, atol=1e-11, equal_nan=True)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize(
    ("name", "way"), [("mlp-relu", Strategy.STACKED), ("cnn-batchnorm", Strategy.SHARED)]
)
def test_a_gpu_takes_points_at_once_where_nothing_is_convolved(name: str, way: Strategy) -> None:
    case = next(c for c in CASES if c.name == name)
    device = torch.device("cuda")
    data = DataSet({"all": Split(case.inputs, case.targets)})
    objective = Objective(case.build(), LOSSES[case.loss], {}, data, device=device)
    a, line = line_of(case)
    check_task(objective, a)
    there = Line(*({n: t.to(device) for n, t in end.items()} for end in line.ends))
    find_strategy(objective, there, [(x,) for x in ALPHAS])
    assert (objective.strategy or objective.provisional) is way


def test_kernels_have_their_channels_last_and_the_model_gets_its_own_back() -> None:
    case = next(c for c in CASES if c.name == "cnn-batchnorm")
    objective = objective_of(case)
    a, line = line_of(case)
    check_task(objective, a)
    kernels = {n: t for n, t in objective.tensors.items() if t.ndim == 4}
    seen = []
    for module in objective.model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda m, _, out: seen.append(
                    m.weight.is_contiguous(memory_format=torch.channels_last)
                    and out.is_contiguous(memory_format=torch.channels_last)
                )
            )
    sweep(objective, line, [(x,) for x in ALPHAS])
    assert kernels
    assert any(seen)
    assert all(tensor.is_contiguous() for tensor in kernels.values())
