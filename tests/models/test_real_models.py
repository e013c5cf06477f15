"""Networks of torchvision and timm as users have them, each compared with a float64 loop."""

from __future__ import annotations

import importlib
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import losscli
from tests import oracle
from tests.cases import sample
from tests.conftest import ROOT


@cache
def packages() -> dict[str, Any]:
    """torchvision and timm, which are imported when they are needed first."""
    # They are installed beside the environment, since transformers would import torchvision, too.
    sys.path.append(str(ROOT / ".venv" / "vision"))
    found: dict[str, Any] = {}
    try:
        found["torchvision"] = importlib.import_module("torchvision")
    except RuntimeError:
        # Its own library needs CUDA. With a build of torch for the CPU, it does not load, and the
        # operators that torchvision expects have to be declared here.
        found["operators"] = torch.library.Library("torchvision", "DEF")
        for schema in ("nms(Tensor a) -> Tensor", "qnms(Tensor a) -> Tensor"):
            found["operators"].define(schema)
        found["torchvision"] = importlib.import_module("torchvision")
    return {**found, "timm": importlib.import_module("timm")}


def create(package: str, name: str, **settings: Any) -> nn.Module:
    found = packages()[package]
    factory = found.create_model if package == "timm" else found.models.get_model
    model: nn.Module = factory(name, num_classes=3, **settings)
    return model


VIT = "vit_tiny_patch16_224"
# Narrow, with every kind of layer that the models as published have.
NARROW: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "narrow_resnet18": (partial(create, "timm", "resnet18", channels=(64, 16, 24, 32)), "fc"),
    "narrow_mobilenet": (
        partial(create, "torchvision", "mobilenet_v3_small", width_mult=0.25),
        "classifier.3",
    ),
    "narrow_vit": (partial(create, "timm", VIT, img_size=32, depth=2, embed_dim=48), "head"),
    "narrow_convnext": (
        partial(create, "timm", "convnext_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)),
        "head.fc",
    ),
}
PUBLISHED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "resnet18": (partial(create, "torchvision", "resnet18"), "fc"),
    "mobilenet_v3_small": (partial(create, "torchvision", "mobilenet_v3_small"), "classifier.3"),
    "vit_tiny": (partial(create, "timm", VIT, img_size=32), "head"),
    "convnext_atto": (partial(create, "timm", "convnext_atto"), "head.fc"),
}
MODELS = NARROW | PUBLISHED


@cache
def state(name: str, seed: int) -> dict[str, Tensor]:
    """Weights as after training: the statistics of BatchNorm are not the initial ones."""
    torch.manual_seed(seed)
    build, _ = MODELS[name]
    model = build()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith("running_var") or (tensor.ndim == 1 and key.endswith("weight")):
                tensor.mul_(1 + 0.3 * torch.rand(tensor.shape))
            elif key.endswith(("running_mean", "bias")):
                tensor.add_(0.1 * torch.randn(tensor.shape))
    return model.state_dict()


@cache
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(5, 3, 32, 32, generator=generator), torch.tensor([0, 2, 1, 0, 2])


def mean_loss(name: str, weights: oracle.State) -> float:
    build, _ = MODELS[name]
    loss = partial(F.cross_entropy, reduction="none")
    return oracle.mean(oracle.losses(build, weights, *data(), loss))


ALL = [*NARROW, *(pytest.param(name, marks=pytest.mark.stress) for name in PUBLISHED)]


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def files(name: str, tmp_path: Path) -> list[str]:
    paths = [str(tmp_path / f"{seed}.pt") for seed in range(3)]
    for seed, path in enumerate(paths):
        torch.save(state(name, seed), path)
    return paths


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def study(name: str) -> dict[str, Any]:
    return {"model": MODELS[name][0], "data": {"t": data()}, "dtype": "float64"}


LINES = {*zip(NARROW, itertools.cycle(["float32", "float64"]))}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(*line, marks=() if line in LINES else pytest.mark.stress)
        for line in itertools.product(MODELS, ("float64", "float32"))
    ],
    indirect=["name"],
)
def test_the_line(name: str, dtype: str, files: list[str]) -> None:
    line = losscli.interpolate(*files[:2], points=3, **study(name) | {"dtype": dtype})
    for alpha, loss in zip(line.table["alpha"], line.table["loss"], strict=True):
        truth = mean_loss(name, oracle.blend(state(name, 0), state(name, 1), float(alpha)))
        assert loss == pytest.approx(truth, rel=1e-10 if dtype == "float64" else 1e-4)


@pytest.mark.parametrize("name", sample(ALL, 3, 4), indirect=True)
def test_the_plane_through_three(name: str, files: list[str]) -> None:
    a, b, c = (state(name, seed) for seed in range(3))
    plane = losscli.plane(files, points=2, **study(name))
    origin, *corners = zip(plane.more["path"]["x"], plane.more["path"]["y"], strict=True)
    axes = torch.tensor(corners, dtype=torch.float64) - torch.tensor(origin)
    parameters = [key for key, _ in MODELS[name][0]().named_parameters()]
    for axis, other in zip(axes, (b, c), strict=True):
        squares = [(other[key].double() - a[key].double()).square().sum() for key in parameters]
        assert float(axis.norm()) == pytest.approx(math.sqrt(math.fsum(squares)), rel=1e-10)
    for row in plane.table.records():
        place = torch.tensor([row["x"], row["y"]], dtype=torch.float64) - torch.tensor(origin)
        u, v = torch.linalg.solve(axes.T, place).tolist()
        # Affine in the checkpoints: first along the line from B to C, then from A through there.
        between = oracle.blend(b, c, v / (u + v))
        assert row["loss"] == pytest.approx(
            mean_loss(name, oracle.blend(a, between, u + v)), rel=1e-9
        )


@pytest.mark.parametrize("name", sample(ALL, 2, 4), indirect=True)
def test_the_hessian_of_the_last_biases(name: str, files: list[str]) -> None:
    build, head = MODELS[name]
    checked = losscli.check(files[:1], only=(f"{head}.bias",), **study(name))
    model = build().double().eval()
    model.load_state_dict(state(name, 0))
    images, labels = data()

    def loss(bias: Tensor) -> Tensor:
        outputs = torch.func.functional_call(model, {f"{head}.bias": bias}, images.double())
        return F.cross_entropy(outputs, labels)

    bias = model.get_parameter(f"{head}.bias").detach()
    hessian = torch.autograd.functional.hessian(loss, bias)
    values = torch.linalg.eigvalsh(hessian)
    (found,) = checked.table.records()
    assert found["lambda_max"] == pytest.approx(float(values[-1]), abs=1e-10)
    assert found["lambda_min"] == pytest.approx(float(values[0]), abs=1e-10)
    assert found["gradient_norm"] == pytest.approx(
        float(torch.autograd.functional.jacobian(loss, bias).norm()), rel=1e-10
    )


def permuted(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same ResNet-18 with its hidden channels in another order, blocks and one whole stream."""
    generator = torch.Generator().manual_seed(9)
    new = {key: tensor.clone() for key, tensor in weights.items()}

    def shuffle(writers: list[str], readers: list[str], channels: int) -> None:
        order = torch.randperm(channels, generator=generator)
        for key in new:
            module, _, kind = key.rpartition(".")
            if module in writers and kind != "num_batches_tracked":
                new[key] = new[key][order]
            if module in readers:
                new[key] = new[key][:, order]

    for block in (f"layer{stage}.{k}" for stage in range(1, 5) for k in range(2)):
        channels = len(weights[f"{block}.conv1.weight"])
        shuffle([f"{block}.conv1", f"{block}.bn1"], [f"{block}.conv2"], channels)
    blocks = ["layer1.0", "layer1.1"]
    ends = [f"{block}.{part}" for block in blocks for part in ("conv2", "bn2")]
    starts = [*(f"{block}.conv1" for block in blocks), "layer2.0.conv1", "layer2.0.downsample.0"]
    shuffle(["conv1", "bn1", *ends], starts, len(weights["conv1.weight"]))
    return new


@pytest.mark.parametrize(
    "name", ["narrow_resnet18", pytest.param("resnet18", marks=pytest.mark.stress)]
)
def test_align_finds_a_planted_permutation_of_resnet18(name: str, tmp_path: Path) -> None:
    weights = state(name, 0)
    shuffled = permuted(weights)
    assert mean_loss(name, shuffled) == pytest.approx(mean_loss(name, weights))
    for file, content in (("a", weights), ("b", shuffled)):
        torch.save(content, tmp_path / f"{file}.pt")
    found = losscli.align(tmp_path / "a.pt", tmp_path / "b.pt", **study(name))
    assert found.summary["distance"]["before"] > 1
    assert found.summary["distance"]["after"] == 0
    aligned = found.checkpoint.weights
    assert all(torch.equal(weights[key], aligned[key]) for key in weights)
