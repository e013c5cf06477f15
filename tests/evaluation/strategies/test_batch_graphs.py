"""Batches evaluated as graphs have the bits of those that are not, and fall back where they fail.

A double stands for CUDA: it records every operator with the memory of its arguments and results,
and computes the same operators again on the same memory. Like CUDA it refuses what reads a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from losscli.data import DataSet, Split, realise
from losscli.data.nests import Build, Ragged
from losscli.errors import ModelError
from losscli.evaluation import gpu_thresholds, recalibration
from losscli.evaluation.losses.built_in import LOSSES
from losscli.evaluation.losses.metrics import accuracy
from losscli.evaluation.objective import Evaluation, Objective
from losscli.evaluation.recalibration import Recalibration
from losscli.evaluation.strategies import batch_graphs
from losscli.evaluation.strategies.base import Strategy
from losscli.evaluation.strategies.batch_graphs import BatchGraphs, CudaCapture, graph_capture
from losscli.evaluation.strategy_choice import choose_strategy
from losscli.evaluation.sweep import check
from losscli.models import CNN, MLP
from losscli.weight_space.slices import Line
from tests.cases import in_turn

POINTS = [(-0.5,), (0.0,), (0.3,), (1.0,), (1.2,)]


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.overloadpacket in {torch.ops.aten._local_scalar_dense, torch.ops.aten.equal}:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


def _memory(value: Any) -> list[int]:
    return [t.untyped_storage().data_ptr() for t in tree_leaves(value) if isinstance(t, Tensor)]


@dataclass
class Double:
    """Records on the CPU.

    Attributes:
        spoils: The replay from which on results are wrong.
        replays: The number of replays.
    """

    spoils: int | None = None
    replays: int = 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        with _Recording() as recording:
            work()

        def replay() -> None:
            self.replays += 1
            for func, args, kwargs, result in recording.calls:
                given = _memory((args, kwargs))
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    # Views and what is changed in place lie in the memory of an argument.
                    if isinstance(old, Tensor) and not {*_memory(old)} & {*given}:
                        old.copy_(new)
            if self.spoils is not None and self.replays >= self.spoils:
                recording.calls[-1][1][0].add_(1e-7)

        return replay


class Branching(nn.Module):
    """Reads a value from the device, as only code of a user does."""

    def forward(self, x: Tensor) -> Tensor:
        return x if bool(x.isfinite().all()) else torch.zeros_like(x)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3))


CASES: dict[str, tuple[Callable[[], nn.Module], str, bool]] = {
    "mlp": (lambda: MLP("6-5-3"), "cross_entropy", False),
    "layers": (net, "cross_entropy", False),
    "cnn": (lambda: CNN("2-3", channels=1, classes=3, batchnorm=True), "cross_entropy", False),
    "recalibrated": (
        lambda: CNN("2-3", channels=1, classes=3, batchnorm=True),
        "cross_entropy",
        True,
    ),
    "regression": (lambda: MLP("6-5-3"), "mse", False),
}


def evaluated(
    name: str,
    capture: Double | None,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, Evaluation], Objective, Line]:
    """Evaluates points in turn, as on a GPU; the last of three batches is smaller."""
    build, loss, recalibrates = CASES[name]
    monkeypatch.setattr("losscli.evaluation.objective.launches_kernels", lambda _: True)
    monkeypatch.setattr("losscli.evaluation.objective.graph_capture", lambda _: capture)
    monkeypatch.setattr(gpu_thresholds, "LEAST_REPLAYS", 16)
    monkeypatch.setattr(recalibration, "BATCH", 5)
    generator = torch.Generator().manual_seed(3)
    shape = (17, 1, 4, 4) if build in {CASES["cnn"][0], CASES["recalibrated"][0]} else (17, 6)
    inputs = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    targets = torch.rand(17, 3, generator=generator) if loss == "mse" else torch.arange(17) % 3
    split = Split(inputs, targets)
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(build().to(dtype).state_dict())
    objective = Objective(
        build(),
        LOSSES[loss],
        {"accuracy": accuracy} if loss == "cross_entropy" else {},
        DataSet({"all": split, "few": split.first(3)}, scale=True, mean=(0.4,)),
        device=torch.device("cpu"),
        dtype=dtype,
        batch_size=7,
        recalibration=Recalibration.plan("all", split, 0) if recalibrates else None,
    )
    check(objective, states[0])
    names = [n for n, t in states[0].items() if t.is_floating_point()]
    line = Line(*({n: s[n] for n in names} for s in states))
    objective.strategy = Strategy.BOUND
    return objective.at(line, POINTS), objective, line


@pytest.mark.parametrize(("name", "dtype"), in_turn(CASES, torch.float32, torch.float64))
def test_graphs_have_the_bits_of_batches_without(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = Double()
    found, _, _ = evaluated(name, capture, monkeypatch, dtype)
    expected, _, _ = evaluated(name, None, monkeypatch, dtype)
    for split, own in expected.items():
        assert torch.equal(found[split].losses, own.losses)
        assert found[split].metrics.keys() == own.metrics.keys()
        for metric, values in own.metrics.items():
            assert torch.equal(found[split].metrics[metric], values)
    # Four points after the first take batches of 7, 7, 3 and 3; two shapes are compared once, and
    # the batch on which they are recorded is not replayed again. Four training batches are of one
    # shape.
    assert capture.replays == 4 * (4 + (4 if name == "recalibrated" else 0))


def test_few_points_are_evaluated_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    capture = Double()
    _, objective, line = evaluated("mlp", capture, monkeypatch)
    replays = capture.replays
    objective.at(line, POINTS[:4])
    assert capture.replays == replays


def test_graphs_that_give_other_bits_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _, _ = evaluated("layers", None, monkeypatch)
    capture = Double(spoils=1)
    found, _, _ = evaluated("layers", capture, monkeypatch)
    assert torch.equal(found["all"].losses, expected["all"].losses)
    assert capture.replays == 2  # one comparison for each shape


@pytest.mark.parametrize(
    ("capture", "graph"), [(Double(), "used"), (Double(spoils=1), "a graph gives other bits")]
)
def test_the_summary_says_whether_graphs_are_used(
    capture: Double, graph: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, objective, line = evaluated("mlp", capture, monkeypatch)
    objective.strategy = None
    monkeypatch.setattr("losscli.evaluation.strategy_choice.candidates", lambda _: [Strategy.BOUND])
    choose_strategy(objective, line, POINTS)
    assert objective.first_choice == {"name": "bound", "difference": 0.0, "graph": graph}


def test_graphs_that_failed_in_the_comparison_are_not_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capture = Double()
    expected, objective, line = evaluated("mlp", capture, monkeypatch)
    replays = capture.replays
    objective.graph = "a graph gives other bits"
    found = objective.at(line, POINTS)
    assert torch.equal(found["all"].losses, expected["all"].losses)
    assert capture.replays == replays


def test_graphs_that_do_not_fit_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    capture = Double()
    expected, objective, line = evaluated("recalibrated", capture, monkeypatch)
    replays = capture.replays
    splits = objective.splits.values()
    # A batch of seven images of a byte a pixel with its classes, and their activations.
    assert objective.graph_bytes(splits) == 7 * (16 + 8 + 2 * objective.activations)
    for spare in (0, -1):
        budget = objective.graph_bytes(splits) + spare
        monkeypatch.setattr(
            "losscli.evaluation.objective.device_budget", lambda _, budget=budget: budget
        )
        assert bool(objective.why_no_graphs(splits)) is (spare < 0)
    found = objective.at(line, POINTS)
    assert torch.equal(found["all"].losses, expected["all"].losses)
    assert capture.replays == replays
    assert objective.graph == "the graph of a batch takes more than a quarter of the free memory"


def results_of(graphs: BatchGraphs, batches: list[Split]) -> list[float]:
    found = [torch.empty(1) for _ in batches]
    for batch, result in zip(batches, found, strict=True):
        graphs.evaluate(batch, [result])
    return [float(result) for result in found]


def test_inputs_in_another_order_are_another_shape() -> None:
    def evaluate(batch: Split, results: Sequence[Tensor]) -> None:
        results[0].copy_(batch.inputs["x"].sum() - batch.inputs["shift"].sum())

    x, shift, targets = torch.ones(2, 3), torch.zeros(2, 3), torch.zeros(2)
    batches = [
        Split({"x": x, "shift": shift}, targets),
        Split({"shift": shift, "x": x}, targets),
        Split({"x": shift, "shift": x}, targets),
    ]
    capture = Double()
    assert results_of(BatchGraphs(capture, evaluate), batches) == [6, 6, -6]
    assert capture.replays == 3


def test_examples_that_are_not_tensors_are_not_recorded() -> None:
    def evaluate(batch: Split, results: Sequence[Tensor]) -> None:
        # The numbers beside the tensors would be those of the first batch.
        results[0].fill_(sum(len(row) * scale for row, scale in realise(batch.inputs)))

    graphs = BatchGraphs(Double(), evaluate)
    targets = torch.zeros(2)
    batches = [
        Split(Ragged([(torch.ones(3), scale), (torch.ones(2), scale)], Build(list)), targets)
        for scale in (1, 10)
    ]
    assert results_of(graphs, batches) == [5, 50]
    assert graphs.reason == "examples are not only tensors"


class FakeStream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


class FakeCuda:
    """What `CudaCapture` uses of `torch.cuda`: writes down in which order."""

    def __init__(self, log: list[str]) -> None:
        self.log, self.mode = log, "default"
        self.default, self.side = FakeStream("default", log), FakeStream("side", log)
        self.current = self.default

    def current_stream(self) -> FakeStream:
        return self.current

    def get_sync_debug_mode(self) -> str:
        return self.mode

    def set_sync_debug_mode(self, mode: str) -> None:
        self.mode = mode

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(
        self, graph: Any, pool: Any, stream: FakeStream, capture_error_mode: str
    ) -> Iterator[None]:
        self.log.append(f"begin in pool {pool}, {capture_error_mode}")
        # As in PyTorch the stream stays current if the recording cannot be ended.
        self.current = stream
        try:
            yield
        finally:
            if self.mode == "broken":
                raise RuntimeError("operation failed due to a previous error during capture")
            self.current = self.default
        self.log.append("end")

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Graph:
            def pool(self) -> str:
                return "P"

            def replay(self) -> None:
                pass

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
        monkeypatch.setattr(batch_graphs, "_capture_stream", lambda _: self.side)
        for name in ("current_stream", "get_sync_debug_mode", "set_sync_debug_mode"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)


def test_a_recording_follows_a_run_on_its_stream_that_must_not_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []
    cuda = FakeCuda(log)
    cuda.patch(monkeypatch)
    capture = CudaCapture(torch.device("cuda"))
    for _ in range(2):
        capture.record(lambda: log.append(f"work on {cuda.current.name}, {cuda.mode}"))
    one = [
        "side waits for default", "work on side, error", "default waits for side",
        "begin in pool None, thread_local", "work on side, default", "end",
    ]  # fmt: skip
    assert log == one + [line.replace("None", "P") for line in one]
    assert (cuda.current, cuda.mode) == (cuda.default, "default")


def test_work_that_waits_is_refused_before_it_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    cuda = FakeCuda(log)
    cuda.patch(monkeypatch)

    def wait() -> None:
        if cuda.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    graphs = BatchGraphs(CudaCapture(torch.device("cuda")), lambda *_: wait())
    graphs.evaluate(Split(torch.zeros(2, 3), torch.zeros(2)), [])
    assert graphs.reason == "RuntimeError: called a synchronizing CUDA operation"
    assert log == ["side waits for default"]
    assert (cuda.current, cuda.mode) == (cuda.default, "default")


def test_a_recording_that_fails_restores_the_stream_and_names_the_first_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda([])
    cuda.patch(monkeypatch)

    def launch() -> None:
        cuda.mode = "broken"
        raise RuntimeError("operation not permitted when stream is capturing")

    def fail() -> None:
        if cuda.mode == "default" and cuda.current is cuda.side:
            try:
                launch()
            except RuntimeError as error:
                raise ModelError("the model fails") from error

    graphs = BatchGraphs(CudaCapture(torch.device("cuda")), lambda *_: fail())
    graphs.evaluate(Split(torch.zeros(2, 3), torch.zeros(2)), [])
    assert graphs.reason == "RuntimeError: operation not permitted when stream is capturing"
    assert cuda.current is cuda.default


def test_code_of_the_user_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        CASES, "branching", (lambda: nn.Sequential(net(), Branching()), "cross_entropy", False)
    )
    capture = Double()
    _, objective, _ = evaluated("branching", capture, monkeypatch)
    assert capture.replays == 0
    assert objective.graph == "the model or the loss has code of its own"


def test_what_reads_a_value_is_evaluated_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        CASES, "branching", (lambda: nn.Sequential(net(), Branching()), "cross_entropy", False)
    )
    monkeypatch.setattr("losscli.evaluation.objective.is_stateless", lambda _: True)
    expected, _, _ = evaluated("branching", None, monkeypatch)
    capture = Double()
    found, _, _ = evaluated("branching", capture, monkeypatch)
    assert torch.equal(found["all"].losses, expected["all"].losses)
    assert capture.replays == 0


def test_only_cuda_has_graphs() -> None:
    assert graph_capture(torch.device("cpu")) is None
    assert graph_capture(torch.device("mps")) is None
    assert isinstance(graph_capture(torch.device("cuda")), CudaCapture)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("recalibrates", [False, True])
def test_a_gpu_uses_graphs(recalibrates: bool) -> None:
    device = torch.device("cuda")
    split = Split(torch.rand(17, 1, 6, 6), torch.arange(17) % 3)
    ends = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = CNN("2-3", channels=1, classes=3, batchnorm=True)
        ends.append({n: t.to(device) for n, t in model.state_dict().items()})
    names = [n for n, t in ends[0].items() if t.is_floating_point() and "running" not in n]
    found = []
    for graphs in (True, False):
        objective = Objective(
            CNN("2-3", channels=1, classes=3, batchnorm=True), LOSSES["cross_entropy"], {},
            DataSet({"all": split}), device=device, batch_size=7,
            recalibration=Recalibration.plan("all", split, 0) if recalibrates else None,
        )  # fmt: skip
        check(objective, ends[0])
        objective.strategy, objective.proving = Strategy.BOUND, graphs
        line = Line(*({n: end[n] for n in names} for end in ends))
        found.append(objective.at(line, POINTS)["all"].losses)
        assert objective.graph == ("used" if graphs else None)
    assert torch.equal(*found)
