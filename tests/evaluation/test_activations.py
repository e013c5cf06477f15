"""Correlations of hidden units: those of NumPy over the activations that forward hooks see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from losscli.data import Split
from losscli.evaluation.activations import Traces, correlate
from losscli.models import CNN, MLP
from losscli.settings import Settings
from losscli.studies.problem import Problem, prepare

N = 13


def network(seed: int) -> nn.Module:
    """Ten hidden units in two groups; unit 2 of the first has no variance."""
    torch.manual_seed(seed)
    model = MLP("6-5-5-3").eval()
    with torch.no_grad():
        model.layers[0].bias[2] = -100
    return model


def convolutions(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return CNN("4-6", channels=3, batchnorm=True).eval()


def examples(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(N, *shape, generator=torch.Generator().manual_seed(9)), torch.arange(N) % 3


class Rows(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self):
        yield from zip(*examples(6), strict=True)


def problem_of(folder: Path, build, data, **settings) -> tuple[Problem, list[dict[str, Tensor]]]:
    states = [build(seed).state_dict() for seed in (1, 2)]
    names = [str(folder / f"{i}.pt") for i in range(2)]
    for name, state in zip(names, states, strict=True):
        torch.save(state, name)
    chosen = Settings(model=lambda: build(0), data=data, metric=("none",), **settings)
    return prepare(names, chosen, training="--by activations"), states


def traces_of(problem: Problem) -> Traces:
    return Traces(problem.objective, problem.fresh().float().eval())


def found(problem: Problem, traces: Traces):
    weights = [problem.open(t).weights for t in range(2)]
    assert problem.training is not None
    return correlate(problem.objective, traces, *weights, problem.training.examples)


def taken(model: nn.Module, layers: list[nn.Module], x: Tensor) -> list[np.ndarray]:
    """What layers take, ``[units, samples]``, of a model in float64."""
    seen: list[np.ndarray] = []
    for layer in layers:
        layer.register_forward_pre_hook(
            lambda _, args: seen.append(args[0].transpose(0, 1).flatten(1).numpy())
        )
    with torch.no_grad():
        model.double()(x.double())
    return seen


@pytest.mark.parametrize(
    ("build", "kinds", "shape"),
    [(network, nn.Linear, (6,)), (convolutions, nn.Conv2d, (3, 8, 8))],
)
def test_correlations_are_those_of_numpy(build, kinds, shape, tmp_path: Path) -> None:
    x, y = examples(*shape)
    problem, states = problem_of(tmp_path, build, {"train": (x, y)})
    both = []
    for state in states:
        model = build(0)
        model.load_state_dict(state)
        layers = [m for m in model.modules() if isinstance(m, kinds)]
        both.append(taken(model, layers[1:], x))
    compared = 0
    for own, a, b in zip(found(problem, traces_of(problem)), *both, strict=False):
        dead_a, dead_b = (values.std(1) == 0 for values in (a, b))
        assert own.dead_a.tolist() == dead_a.tolist()
        assert own.dead_b.tolist() == dead_b.tolist()
        with np.errstate(invalid="ignore", divide="ignore"):
            expected = np.corrcoef(a, b)[: len(a), len(a) :]
        expected[dead_a] = expected[:, dead_b] = 0
        np.testing.assert_allclose(own.values.numpy(), expected, atol=2e-6)
        compared += int((expected != 0).sum())
    assert compared > 15


def test_batches_and_streams_give_the_same_correlations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Less memory than the examples take.
    monkeypatch.setattr("losscli.data.objects.host_budget", lambda: 64)
    monkeypatch.setattr("losscli.data.stream.host_budget", lambda: 1 << 30)
    whole, _ = problem_of(tmp_path, network, {"train": examples(6)})
    traces = traces_of(whole)
    expected = found(whole, traces)
    for data in ({"train": examples(6)}, {"train": Rows()}):
        problem, _ = problem_of(tmp_path, network, data, batch_size=5)
        assert problem.training is not None
        in_memory = isinstance(problem.training.examples, Split)
        assert in_memory == isinstance(data["train"], tuple)
        for own, other in zip(found(problem, traces), expected, strict=True):
            torch.testing.assert_close(own.values, other.values, rtol=0, atol=1e-6)
            assert torch.equal(own.dead_a, other.dead_a)
