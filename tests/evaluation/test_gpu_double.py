"""Every command runs with tensors on a GPU, which a double stands for, and gives the same table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import losscli
from losscli.evaluation.strategies.batch_graphs import GraphCapture
from losscli.models import CNN, MLP
from tests.cases import sample
from tests.evaluation.strategies.test_batch_graphs import Double as Graphs
from tests.gpu_double import gpu_double


def mlp() -> nn.Module:
    return MLP("6-5-3")


def cnn() -> nn.Module:
    return CNN("2-3", channels=1, classes=3, batchnorm=True)


class Words(nn.Module):
    """A language model without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = self.head(self.norm(self.layer(self.words(tokens)).relu()))
        return scores


_generator = torch.Generator().manual_seed(0)
_inputs = torch.rand(29, 6, generator=_generator)
_tokens = torch.randint(11, (13, 5), generator=_generator)
DATA = {
    mlp: {"train": (_inputs, torch.arange(29) % 3), "test": (_inputs[:11], torch.arange(11) % 3)},
    cnn: {"train": (torch.rand(17, 1, 6, 6, generator=_generator), torch.arange(17) % 3)},
    Words: {"train": (_tokens, _tokens)},
}


def states_of(build: Callable[[], nn.Module]) -> list[dict[str, Tensor]]:
    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        states.append(build().state_dict())
    return states


Run = tuple[Callable[[], nn.Module], Callable[..., Any], int | None, dict[str, Any]]
"""A model; a command; how many checkpoints it takes in a list, None for two; and its options."""

# `make test` takes each fifth, beginning with the first.
_RUNS: dict[str, Run] = {
    "connect": (mlp, losscli.connect, None, {"points": 3, "steps": 2, "plane": False}),
    "interpolate": (mlp, losscli.interpolate, None, {"points": 5, "derivatives": True}),
    "interpolate, tokens": (Words, losscli.interpolate, None, {"points": 5, "loss": "causal_lm"}),
    "interpolate, blocks": (mlp, losscli.interpolate, None, {"points": 3, "layerwise": True}),
    "connect with a plane": (
        cnn, losscli.connect, None, {"points": 3, "steps": 2, "bends": 2, "kind": "chain"},
    ),
    "interpolate, statistics": (
        cnn, losscli.interpolate, None, {"points": 5, "buffers": "recalibrate"},
    ),
    "interpolate, weights of classes": (
        mlp, losscli.interpolate, None, {"points": 3, "loss": "cross_entropy,weight=0.2-1-5"},
    ),
    "interpolate, some tensors": (
        cnn, losscli.interpolate, None, {"points": 9, "except_": ("*0*",)},
    ),
    "interpolate, a sample": (
        mlp, losscli.interpolate, None, {"points": 3, "sampling_error": 0.5, "batch_size": 4},
    ),
    "check": (mlp, losscli.check, 1, {}),
    "plane": (mlp, losscli.plane, 3, {"points": 4}),
    "plane, components": (cnn, losscli.plane, 3, {"points": 4, "pca": True}),
    "around": (cnn, losscli.around, 1, {"points": 3, "directions": 2}),
    "around, eigenvectors": (mlp, losscli.around, 1, {"points": 3, "along": "hessian"}),
    "barriers": (mlp, losscli.barriers, 3, {"points": 3, "disagreement": True, "cka": True}),
    "soup": (mlp, losscli.soup, 3, {"greedy": "test"}),
    "trajectory": (mlp, losscli.trajectory, 3, {}),
    "sharpness": (mlp, losscli.sharpness, 1, {"samples": 3, "adaptive": True}),
}  # fmt: skip


def result_of(run: Run, device: str) -> Any:
    build, command, number, options = run
    states = states_of(build)
    names = states[:2] if number is None else [states[:number]]
    return command(*names, model=build(), data=DATA[build], device=device, **options)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the double record graphs."""

    def capture(device: torch.device) -> GraphCapture | None:
        return Graphs() if device.type == "cuda" else None

    monkeypatch.setattr("losscli.evaluation.objective.graph_capture", capture)


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("name", sample(_RUNS, 0, 5))
def test_commands_give_the_numbers_of_the_cpu(name: str) -> None:
    with gpu_double():
        found = result_of(_RUNS[name], "cuda")
    expected = result_of(_RUNS[name], "cpu")
    tables = [found.table, expected.table]
    assert tables[0].columns == tables[1].columns
    for column in tables[1].columns:
        one, other = (table[column] for table in tables)
        if other and isinstance(other[0], float):
            assert one == pytest.approx(other, rel=1e-4, abs=1e-6, nan_ok=True)
        else:
            assert one == other


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (mlp, {"loss": "cross_entropy,weight=0.2-1-5", "split": ("train",)}),
        (cnn, {"buffers": "recalibrate"}),
    ],
    ids=["stacked", "statistics"],
)
def test_no_batch_and_no_point_waits_for_the_gpu(
    build: Callable[[], nn.Module], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("losscli.evaluation.objective.graph_capture", lambda _: None)
    monkeypatch.setattr("losscli.evaluation.recalibration.BATCH", 10)
    waits = []
    for points, batch in ((2, 8), (4, 4)):
        own = {"points": points, "batch_size": batch, **options}
        with gpu_double() as found:
            result_of((build, losscli.interpolate, None, own), "cuda")
        waits.append(dict(found))
    assert waits[0]
    assert waits[0] == waits[1]
