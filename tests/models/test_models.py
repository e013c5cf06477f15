"""The built-in models against NumPy, saved programs, and models of other packages."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from losscli.errors import SpecError
from losscli.models import CNN, MLP, MODELS
from tests.cases import sample
from tests.conftest import Losscli
from tests.forks import child, ended

ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def arrays(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", ["12-3", "12-7-3", "12-7-5-3"])
def test_an_mlp_is_affine_maps_with_activations_between(activation: str, sizes: str) -> None:
    model = MLP(sizes, activation=activation).double()
    state = arrays(model)
    assert sorted(state) == sorted(
        f"layers.{i}.{part}" for i in range(sizes.count("-")) for part in ("weight", "bias")
    )
    x = images(5, 12)
    expected = x.numpy()
    for i in range(sizes.count("-")):
        if i:
            expected = ACTIVATIONS[activation](expected)
        expected = expected @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
    with torch.no_grad():
        np.testing.assert_allclose(model(x), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_a_maxout_unit_is_the_largest_of_its_affine_pieces(pieces: int) -> None:
    model = MLP("6-4-3", activation="maxout", pieces=pieces).double()
    state = arrays(model)
    assert state["layers.0.weight"].shape == (4 * pieces, 6)
    x = images(5, 6)
    hidden = np.empty((5, 4))
    for unit in range(4):
        rows = slice(unit * pieces, (unit + 1) * pieces)
        affine = x.numpy() @ state["layers.0.weight"][rows].T + state["layers.0.bias"][rows]
        hidden[:, unit] = affine.max(1)
    expected = hidden @ state["layers.1.weight"].T + state["layers.1.bias"]
    with torch.no_grad():
        np.testing.assert_allclose(model(x), expected, rtol=1e-12, atol=1e-14)


def test_an_mlp_flattens_images() -> None:
    model = MLP("12-5-2").double()
    x = images(7, 3, 2, 2)
    assert torch.equal(model(x), model(x.reshape(7, 12)))


def test_only_maxout_has_pieces() -> None:
    assert MLP("6-4-3", pieces=5).layers[0].out_features == 4
    assert MLP("6-4-3", activation="maxout").layers[0].out_features == 8


def convolve(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """A 3×3 convolution with a border of zeros, a sum over shifted images."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    height, width = x.shape[2:]
    found = sum(
        np.einsum("nchw,oc->nohw", padded[:, :, i : i + height, j : j + width], weight[:, :, i, j])
        for i in range(3)
        for j in range(3)
    )
    return found if bias is None else found + bias[:, None, None]


@pytest.mark.parametrize("batchnorm", [False, True])
def test_a_cnn_is_convolutions_with_pooling_between_and_a_mean_at_the_end(batchnorm: bool) -> None:
    model = CNN("4-6", channels=2, classes=3, batchnorm=batchnorm).double().eval()
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(images(*buffer.shape).abs() + (0.1 if "var" in name else 0))
    state = arrays(model)
    x = images(5, 2, 6, 8)
    expected = x.numpy()
    for i in range(2):
        if i:
            blocks = expected.reshape(5, 4, 3, 2, 4, 2)
            expected = blocks.max((3, 5))
        bias = state.get(f"convolutions.{i}.bias")
        assert (bias is None) == batchnorm
        expected = convolve(expected, state[f"convolutions.{i}.weight"], bias)
        if batchnorm:
            mean, variance, gain, shift = (
                state[f"norms.{i}.{part}"][:, None, None]
                for part in ("running_mean", "running_var", "weight", "bias")
            )
            expected = (expected - mean) / np.sqrt(variance + 1e-5) * gain + shift
        expected = np.maximum(expected, 0)
    expected = expected.mean((2, 3)) @ state["head.weight"].T + state["head.bias"]
    with torch.no_grad():
        np.testing.assert_allclose(model(x), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("shape", [(1, 3, 28, 28), (4, 3, 7, 5), (2, 3, 4, 4)], ids=str)
def test_a_cnn_takes_images_of_any_size_that_its_pooling_leaves(shape: tuple[int, ...]) -> None:
    model = MODELS["cnn"]("4-5-6", channels=3, classes=7)
    assert model(torch.zeros(shape)).shape == (shape[0], 7)
    assert len([n for n, _ in model.named_parameters() if n.startswith("convolutions")]) == 6


def test_sizes_may_be_numbers_too() -> None:
    assert [layer.out_features for layer in MLP([4, 5, 6]).layers] == [5, 6]
    assert [layer.out_channels for layer in CNN([8, 9]).convolutions] == [8, 9]


@pytest.mark.parametrize(
    "sizes",
    ["784", "a-b", "0-3", "", "-", "5-", "-5-3", "3--2", "1.5-2", [7.5, 3.0], [3], [], 5, True],
    ids=str,
)
def test_sizes_that_are_not_layers_are_refused_with_an_example(sizes: Any) -> None:
    with pytest.raises(
        SpecError, match=r"not a list of sizes\. Write for example mlp:784"
    ) as caught:
        MLP(sizes)
    assert str(caught.value).startswith(f"mlp: {sizes!r} is")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("model", "arguments", "options", "message"),
    [
        (MLP, "6-3", {"activation": "gelu"}, "'gelu'. Known are relu, sigmoid, tanh, maxout"),
        (MLP, "6-3", {"activation": [1, 2]}, "unknown activation"),
        (MLP, "6-3", {"activation": "maxout", "pieces": 0}, "pieces=0 is not a number of affine"),
        (MLP, "6-3", {"activation": "maxout", "pieces": 1.5}, "pieces=1.5 is not a number"),
        (MLP, "6-3", {"pieces": "two"}, "pieces=two is not a number"),
        (MLP, "-".join(["1"] * 501), {}, "mlp: 501 sizes are more than the 500 it has layers for"),
        (CNN, "", {}, "cnn: '' is not a list of sizes. Write for example cnn:16-32,channels=3"),
        (CNN, "16-0", {}, "cnn: '16-0' is not a list"),
        (CNN, 16, {}, "cnn: 16 is not a list"),
        (CNN, "16", {"channels": 0}, r"cnn: \[0, 10\] is not a list"),
        (CNN, "16", {"channels": 1.5}, "cnn"),
        (CNN, "16", {"channels": float("inf")}, "cnn"),
        (CNN, "16", {"classes": -2}, "cnn"),
        (CNN, "16", {"classes": "ten"}, "cnn"),
        (CNN, "16", {"batchnorm": "False"}, "batchnorm=False must be true or false. Write"),
    ],
)
def test_invalid_keys_of_a_model_are_refused(
    model: type[nn.Module], arguments: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        model(arguments, **options)
    assert "\n" not in str(caught.value)
    assert caught.value.cure


class Exported(nn.Module):
    """A convolution with BatchNorm and dropout, and a head of which one weight has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Dropout(0.5))
        self.head = nn.Linear(3, 3)
        self.twin = nn.Linear(3, 3)
        self.twin.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x.unflatten(1, (1, 2, 3))).mean((2, 3))
        return self.head(x) + self.twin(x.square())


@cache
def exported(*, dynamic: bool = True) -> bytes:
    """A saved program, for batches of any size or of 4 examples."""
    shapes = {"x": {0: torch.export.Dim("examples")}} if dynamic else None
    program = torch.export.export(Exported().eval(), (torch.rand(4, 6),), dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


@pytest.fixture
def program(folder: Path) -> Path:
    """Next to the data of `folder`: a saved program, and two checkpoints of its model."""
    (folder / "model.pt2").write_bytes(exported())
    for seed, name in enumerate("pq"):
        torch.manual_seed(seed)
        torch.save(Exported().state_dict(), folder / f"{name}.pt")
    return folder


EXPORTING = pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:DeprecationWarning")
RUN = ("interpolate", "p.pt", "q.pt", "-m", "pt2:model.pt2", "--points", 4)


@EXPORTING
@pytest.mark.parametrize("dtype", sample(["float32", "float64", "bfloat16"], 1))
def test_a_saved_program_is_a_model_with_the_names_of_the_original(
    dtype: str, program: Path, losscli: Losscli
) -> None:
    # 29 and 11 examples: the last batches are smaller.
    options = ("--dtype", dtype, "--batch-size", 8, "-q", "-o", "-")
    here = losscli(*RUN, *options)
    assert here.status == 0, here.stderr
    (program / "own.py").write_text("from tests.models.test_models import Exported\n")
    there = losscli(*RUN[:3], "-m", "own.py:Exported", *RUN[5:], *options)
    rows = [list(csv.reader(io.StringIO(done.stdout))) for done in (here, there)]
    assert rows[0][0] == rows[1][0]
    tolerance = {"float32": 1e-5, "float64": 1e-12, "bfloat16": 0.05}[dtype]
    for mine, original in zip(*rows, strict=True):
        if mine[0] != "alpha":
            assert mine[:2] == original[:2]
            assert float(mine[2]) == pytest.approx(float(original[2]), rel=tolerance)


@EXPORTING
def test_a_program_for_batches_of_one_size_says_so(program: Path, losscli: Losscli) -> None:
    (program / "model.pt2").write_bytes(exported(dynamic=False))
    done = losscli(*RUN, "-o", "x")
    assert done.status == 1
    told = "model.pt2 was exported for batches of exactly 4 examples, not 29. Export"
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(program.glob("x.*"))
    # Where every batch has that size, it works.
    done = losscli(*RUN, "--batch-size", 4, "--limit", 8, "-q", "-o", "-")
    assert done.status == 0, done.stderr


@EXPORTING
def test_a_program_has_no_initialisation(program: Path, losscli: Losscli) -> None:
    done = losscli("interpolate", "init:0", "init:1", *RUN[3:], "-d", "npz:data.npz", "-o", "x")
    assert done.status == 2
    assert "init:0: a saved program has no initialisation to draw" in done.stderr


@pytest.mark.parametrize("place", ["losscli.toml", "metadata", "model.toml"])
def test_no_file_may_name_a_program(place: str, folder: Path, losscli: Losscli) -> None:
    given: tuple[str, ...] = ()
    state = torch.load("a.pt", weights_only=True)["state_dict"]
    torch.save({"w": state, "losscli.model": "pt2:m.pt2"} if place == "metadata" else state, "c.pt")
    if place == "losscli.toml":
        Path(place).write_text('model = "pt2:m.pt2"\ndata = "npz:data.npz"\n')
    elif place == "model.toml":
        Path(place).write_text('name = "pt2:m.pt2"\n')
        given = ("-m", place)
    done = losscli("interpolate", "c.pt", "c.pt", *given, "-o", "x")
    assert done.status == 1
    source = "checkpoint metadata" if place == "metadata" else place
    trust = "is not trusted" if place == "losscli.toml" else "code is run only when the command"
    assert f"{source} names code to run as its model, 'pt2:m.pt2', and {trust}" in done.stderr
    assert "write --model pt2:m.pt2" in done.stderr
    assert not list(folder.glob("x.*"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("pt2:none.pt2", "there is no file none.pt2. Relative paths start at"),
        ("pt2:data.npz", "data.npz is not a program that torch"),
        ("pt2:a.pt", "a.pt is not a program that torch"),
    ],
)
def test_a_file_that_is_not_a_program_is_reported_in_one_line(
    model: str, message: str, folder: Path, losscli: Losscli
) -> None:
    done = losscli("interpolate", "a.pt", "b.pt", "-m", model, "-o", "x")
    assert done.status == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(folder.glob("x.*"))


@EXPORTING
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_damaged_program_is_refused_in_one_line(program: Path) -> None:
    good = (program / "model.pt2").read_bytes()
    half, other = good[: len(good) // 2], good.replace(b"{", b"[")
    log = program / "log"
    command = ["interpolate", "p.pt", "q.pt", "-m", "pt2:damaged.pt2", "-o", "x", "-q"]
    for content in (good[:-1], half, good[:100], bytes(100) + good[100:], other):
        (program / "damaged.pt2").write_bytes(content)
        # In a process of its own, in case that torch does not survive it.
        assert ended(child(command, log)) == 1
        told = r"losscli: damaged.pt2 is not a program that torch \S+ can load: .*\n"
        assert re.fullmatch(told, log.read_text())
    assert not list(program.glob("x.*"))


STAND_INS = {
    "torchvision/__init__.py": "",
    "torchvision/models.py": """
from torch import nn
def resnet18(*, weights=None, progress=True, num_classes=1000):
    return nn.Sequential(nn.Flatten(), nn.Linear(6, num_classes))
""",
    "timm/__init__.py": """
from torch import nn
def create_model(model_name, pretrained=False, num_classes=1000, **kwargs):
    assert model_name == "resnet18" and not pretrained
    return nn.Sequential(nn.Flatten(), nn.Linear(6, num_classes))
""",
}


@pytest.fixture
def packages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Packages with the names and call forms of the real ones, which need not be installed."""
    for name, code in STAND_INS.items():
        file = folder / "packages" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code)
    names = ("torchvision", "torchvision.models", "timm")
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    monkeypatch.syspath_prepend(folder / "packages")
    yield
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(before)


@pytest.mark.parametrize(
    "spec",
    [
        "torchvision.models:resnet18,num_classes=3",
        "timm:create_model,model_name=resnet18,num_classes=3",
    ],
)
@pytest.mark.usefixtures("packages")
def test_models_of_other_packages_are_called_by_their_names(
    spec: str, folder: Path, losscli: Losscli
) -> None:
    for seed, name in enumerate("pq"):
        torch.manual_seed(seed)
        torch.save(nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).state_dict(), f"{name}.pt")
    out = ("-o", "x", "--no-figure", "--json")
    done = losscli("interpolate", "p.pt", "q.pt", "-m", spec, "--points", 2, *out)
    assert done.status == 0, done.stderr
    assert json.loads(done.stdout)["model"] == spec
