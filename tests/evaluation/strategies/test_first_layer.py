"""The first layer is shared where that pays, and watched only until it has run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from losscli.data import DataSet, Split
from losscli.evaluation import gpu_thresholds
from losscli.evaluation.losses.built_in import cross_entropy
from losscli.evaluation.objective import Objective
from losscli.evaluation.strategies import first_layer
from losscli.evaluation.strategies.base import Strategy
from losscli.evaluation.strategies.first_layer import FirstLayer, FirstLayerFound, FirstLayerWatcher
from losscli.evaluation.sweep import check
from losscli.weight_space.slices import Line

CPU, CUDA, MPS = "cpu", "cuda", "mps"


class Elsewhere(Tensor):
    """A tensor on the CPU with the name of another device."""

    device: Any = torch.device(CUDA)


def weight_of(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    weight = torch.zeros(shape, dtype=dtype).as_subclass(Elsewhere)
    weight.device = torch.device(device)
    return weight


@pytest.mark.parametrize(
    ("function", "shape", "dtype", "device", "tf32", "pays"),
    [
        (F.linear, (10, 784), torch.float32, CUDA, False, True),
        (F.linear, (10, 784), torch.bfloat16, CUDA, False, True),
        (F.linear, (10, 784), torch.float32, CUDA, True, True),
        (F.linear, (10, 80), torch.float32, CUDA, False, True),
        (F.linear, (10, 79), torch.float64, CUDA, False, False),
        (F.linear, (10, 80), torch.float32, CUDA, True, False),
        (F.linear, (10, 80), torch.float64, CUDA, True, True),
        (F.linear, (10, 80), torch.float32, MPS, True, True),
        # The first layers of ResNet-20 and ResNet-50, and one of many channels.
        (F.conv2d, (16, 3, 3, 3), torch.float32, CUDA, False, False),
        (F.conv2d, (64, 3, 7, 7), torch.float32, CUDA, False, True),
        (F.conv2d, (64, 3, 7, 7), torch.float32, CUDA, True, False),
        (F.conv2d, (64, 3, 7, 7), torch.float16, CUDA, False, False),
        (F.conv2d, (64, 128, 3, 3), torch.float16, CUDA, False, True),
        # An embedding computes nothing, and its weight need not be combined.
        (F.embedding, (100, 8), torch.float16, CUDA, False, True),
        (F.linear, (10, 2), torch.float32, CPU, False, True),
    ],
)
def test_a_layer_is_shared_on_a_gpu_if_its_units_have_many_weights(
    function: Any,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    tf32: bool,
    pays: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    assert first_layer._pays(function, weight_of(shape, dtype, device)) == pays


def convolving() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))


@pytest.mark.parametrize("least", [27, 28])
def test_points_that_share_too_little_take_batches_in_turn_and_have_the_same_losses(
    least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataSet({"all": Split(torch.rand(9, 3, 6, 6), torch.arange(9) % 3)})
    a, b = ({n: t.clone() for n, t in convolving().state_dict().items()} for _ in range(2))
    b = {name: tensor + 0.1 for name, tensor in b.items()}
    points = [(0.0,), (0.2,), (0.7,), (1.0,)]

    def losses(strategy: Strategy) -> Tensor:
        objective = Objective(
            convolving(), cross_entropy, {}, data, device=torch.device(CPU), dtype=torch.float64
        )
        ends = [{name: t.double() for name, t in end.items()} for end in (a, b)]
        check(objective, ends[0])
        objective.strategy = strategy
        found = objective.at(Line(*ends), points)["all"].losses
        # 27 weights belong to each unit of the first layer.
        gpu = first_layer.launches_kernels(objective.device)
        assert objective.takes_points_in_turn(list(a)) == (gpu and least > 27)
        return found

    expected = losses(Strategy.BOUND)
    for module in ("strategies.first_layer", "objective"):
        monkeypatch.setattr(f"losscli.evaluation.{module}.launches_kernels", lambda _: True)
    monkeypatch.setattr(gpu_thresholds, "WORTH_SHARING", least)
    found = losses(Strategy.SHARED)
    if least > 27:
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def first_layer_of(model: nn.Module, inputs: Tensor) -> FirstLayer:
    tensors = dict(model.state_dict(keep_vars=True))
    watcher = FirstLayerWatcher(
        tensors, tensors, Line(tensors, tensors), stops=True, measures=False
    )
    with pytest.raises(FirstLayerFound), torch.no_grad(), watcher:
        model(inputs)
    assert watcher.layer is not None
    return watcher.layer


def test_outputs_at_several_points_have_the_bits_of_each() -> None:
    inputs = torch.rand(2, 4)
    ends = [nn.Linear(4, 5).state_dict(keep_vars=True) for _ in range(2)]
    line = Line(*ends)
    products = [F.linear(inputs, end["weight"], end["bias"]).detach() for end in ends]
    layer = FirstLayer(F.linear, "weight", products, line)
    points = [(0.0,), (0.3,), (0.5,), (0.8,), (1.0,), (1.4,)]
    assert torch.equal(layer.outputs(points), torch.stack([layer.output(p) for p in points]))


def test_after_the_layer_has_run_no_call_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = convolving(), torch.rand(2, 3, 6, 6)
    layer = first_layer_of(model, inputs)
    tensors = model.state_dict(keep_vars=True)
    with torch.no_grad():
        expected = model(inputs)
        monkeypatch.setattr(first_layer, "_uses", None)
        with layer.replay(layer.output((0.5,)), tensors):
            assert torch.equal(model(inputs), expected)


def test_the_first_other_use_of_the_weight_is_the_last_that_is_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = nn.Linear(4, 4)
    model = nn.Sequential(own, nn.ReLU(), own, nn.ReLU(), own)
    inputs = torch.rand(2, 4)
    layer = first_layer_of(model, inputs)
    calls: list[int] = []

    def filling() -> None:
        calls.append(1)
        monkeypatch.setattr(first_layer, "_uses", None)

    with torch.no_grad():
        expected = model(inputs)
        with layer.replay(layer.output((0.5,)), model.state_dict(keep_vars=True), filling):
            assert torch.equal(model(inputs), expected)
    assert calls == [1]
