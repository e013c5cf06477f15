"""What the user's own code returns reaches the model unchanged."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import losscli
from losscli.data import DataSet, from_object, load
from losscli.data import objects as objects_
from losscli.data import stream as stream_
from losscli.errors import SpecError
from losscli.evaluation.losses.built_in import cross_entropy
from losscli.evaluation.objective import Objective, recalibrated
from losscli.evaluation.recalibration import Recalibration
from tests.cases import in_turn, sample
from tests.conftest import Losscli

N = 11
LABELS = torch.arange(N) % 3


class Recording(nn.Module):
    """Keeps what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.tensor([0.1, 0.2, 0.4]))
        self.norm = nn.BatchNorm1d(3)
        self.calls: list[tuple[tuple[Tensor, ...], dict[str, Tensor]]] = []

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        self.calls.append((args, kwargs))
        first = next(iter([*args, *kwargs.values()]))
        return self.norm(self.scores.expand(len(first), 3))

    def received(self) -> dict[int | str, Tensor]:
        """All examples, by the position or name of the input."""
        keys: list[int | str] = [*range(len(self.calls[0][0])), *self.calls[0][1]]
        return {
            key: torch.cat([args[key] if type(key) is int else kw[key] for args, kw in self.calls])  # type: ignore[index]
            for key in keys
        }


def received(
    data: DataSet, dtype: torch.dtype = torch.float32, *, training: bool = False
) -> dict[int | str, Tensor]:
    """What a model receives in an evaluation, or where BatchNorm's statistics are estimated."""
    model = Recording()
    plan = Recalibration.plan("data", data.splits["data"], 0) if training else None
    objective = Objective(
        *(model, cross_entropy, {}, data),
        device=torch.device("cpu"),
        dtype=dtype,
        batch_size=4,
        recalibration=plan,
    )
    weights = {name: tensor.clone() for name, tensor in objective.tensors.items()}
    if training:
        recalibrated(objective, weights)
    else:
        objective.plain(weights)
    return model.received()


class Rows(Dataset[Any]):
    def __init__(self, row: Callable[[int], Any]) -> None:
        self.row = row

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        return self.row(i)


class Coming(IterableDataset[Any]):
    def __init__(self, row: Callable[[int], Any]) -> None:
        self.row = row

    def __iter__(self) -> Iterator[Any]:
        return map(self.row, range(N))


def values(dtype: torch.dtype) -> Tensor:
    """``[N, 2, 2, 2]``: images by their shape, with the ends of the type's range."""
    generator = torch.Generator().manual_seed(3)
    if dtype == torch.bool:
        return torch.rand(N, 2, 2, 2, generator=generator) > 0.5
    if dtype.is_floating_point:
        return (torch.rand(N, 2, 2, 2, generator=generator) * 300 - 20).to(dtype)
    info = torch.iinfo(dtype)
    whole = torch.randint(0, 127, (N, 2, 2, 2), generator=generator).numpy()
    whole = whole.astype(str(dtype).removeprefix("torch."))
    whole.reshape(-1)[:2] = info.min, info.max
    return torch.from_numpy(whole)


DTYPES = [
    *(torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32),
    *(torch.int64, torch.uint64, torch.bool),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
]
FEW = {torch.uint8, torch.int64, torch.bool, torch.bfloat16, torch.float32}
OTHER = torch.arange(N * 5).reshape(N, 5)

# What user code returns, and the inputs that it means.
CONTAINERS: dict[str, Callable[[Tensor], tuple[Any, dict[int | str, Tensor]]]] = {
    "a pair": lambda x: ((x, LABELS), {0: x}),
    "two inputs": lambda x: (((x, OTHER), LABELS), {0: x, 1: OTHER}),
    "a mapping": lambda x: ({"x": x, "ids": OTHER, "y": LABELS}, {"x": x, "ids": OTHER}),
    "a mapping in a pair": lambda x: (({"ids": OTHER, "x": x}, LABELS), {"ids": OTHER, "x": x}),
    "a TensorDataset": lambda x: (TensorDataset(x, LABELS), {0: x}),
    "a Dataset": lambda x: (Rows(lambda i: (x[i], LABELS[i])), {0: x}),
    "a loader": lambda x: (DataLoader(Rows(lambda i: (x[i], LABELS[i])), 3), {0: x}),
    "a loader of mappings with workers": lambda x: (
        DataLoader(
            Rows(lambda i: {"x": x[i], "y": LABELS[i]}),
            3,
            num_workers=2,
            multiprocessing_context="fork",
        ),
        {0: x},
    ),
    "a loader of its own batches": lambda x: (
        DataLoader(Rows(lambda i: (x[i : i + 1], LABELS[i : i + 1])), batch_size=None),
        {0: x},
    ),
    "an iterable": lambda x: (Coming(lambda i: (x[i], LABELS[i])), {0: x}),
    "an iterable with a worker": lambda x: (
        DataLoader(
            Coming(lambda i: (x[i], LABELS[i])), 3, num_workers=1, multiprocessing_context="fork"
        ),
        {0: x},
    ),
}


# With workers, which are processes, only bytes, whole numbers, flags and numbers of two sizes.
RECEIVED = [
    (dtype, container)
    for dtype in DTYPES
    for container in CONTAINERS
    if "worker" not in container or dtype in FEW
]
REMAINING = {*itertools.product(DTYPES, CONTAINERS)} - {*RECEIVED}


@pytest.mark.parametrize(
    ("dtype", "container", "streamed"),
    [
        *sample(((*pair, streamed) for pair in RECEIVED for streamed in (False, True)), 0, 5),
        *(
            pytest.param(*pair, streamed, marks=pytest.mark.stress)
            for pair in sorted(REMAINING, key=str)
            for streamed in (False, True)
        ),
    ],
)
def test_a_model_receives_what_the_code_returns(
    dtype: torch.dtype, container: str, streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if streamed:
        monkeypatch.setattr(objects_, "host_budget", lambda: 0)
        monkeypatch.setattr(stream_, "_TINY", 0)
    content, expected = CONTAINERS[container](values(dtype))
    data = from_object({"data": content}, "here")
    found = received(data, torch.float64)
    assert found.keys() == expected.keys()
    for key, x in expected.items():
        # Floating-point inputs have the type of the forward pass, as the weights do.
        right = x.to(torch.float64) if x.is_floating_point() else x
        assert found[key].dtype == right.dtype, key
        assert torch.equal(found[key], right), key
    assert data.notes == ()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_are_estimated_on_what_the_code_returns(dtype: torch.dtype) -> None:
    x = values(dtype)
    data = from_object({"data": (x, LABELS)}, "here")
    found = received(data, training=True)[0]
    order = data.splits["data"].order(torch.Generator().manual_seed(0))
    expected = x.to(torch.float32) if x.is_floating_point() else x
    assert found.dtype == expected.dtype
    # Indexed by NumPy: torch has no indexing for some of the types.
    if dtype.is_floating_point:
        assert torch.equal(found, expected[order])
    else:
        assert np.array_equal(found.numpy(), expected.numpy()[order.numpy()])


def array_file(kind: str, folder: Path, x: Tensor) -> str:
    path = folder / f"data.{kind}"
    if kind == "npz":
        np.savez(path, inputs=x.numpy(), targets=LABELS.numpy())
    elif kind == "safetensors":
        save_file({"inputs": x, "targets": LABELS}, path)
    else:
        import datasets

        columns = {"x": x.tolist(), "y": LABELS.tolist()}
        kinds: dict[int, Any] = {
            2: datasets.Sequence(datasets.Value("uint8")),
            4: datasets.Array3D((2, 2, 2), "uint8"),
        }
        features = {"x": kinds[x.ndim], "y": datasets.Value("int64")}
        whole = datasets.Dataset.from_dict(columns, datasets.Features(features))
        whole.save_to_disk(path)
    return f"{kind}:{path}"


@pytest.mark.parametrize("kind", ["npz", "safetensors", "hf"])
@pytest.mark.parametrize("flat", [False, True], ids=["an image", "a table"])
@pytest.mark.parametrize("scale", ["", ",scale=true", ",scale=false"])
def test_files_of_arrays_scale_bytes_of_three_dimensions_and_say_so(
    kind: str, flat: bool, scale: str, tmp_path: Path
) -> None:
    x = values(torch.uint8)
    x = x.flatten(1) if flat else x
    data = load(array_file(kind, tmp_path, x) + scale, trusted=False)
    scales = scale == ",scale=true" or (not scale and not flat)
    found = received(data)[0]
    assert torch.equal(found, x.float() / 255 if scales else x)
    assert found.dtype == (torch.float32 if scales else torch.uint8)
    # What the user decided needs no note.
    assert data.notes == (
        ("uint8 inputs are scaled from 0…255 to 0…1: scale=false leaves them as they are",)
        if scales and not scale
        else ()
    )


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d not in {torch.uint8, torch.bfloat16}])
def test_files_of_arrays_scale_nothing_else(dtype: torch.dtype, tmp_path: Path) -> None:
    x = values(dtype)
    spec = array_file("npz", tmp_path, x)
    for keys in ("", ",scale=false"):
        found = received(load(spec + keys, trusted=False), torch.float64)[0]
        assert torch.equal(found, x.double() if x.is_floating_point() else x)
    with pytest.raises(SpecError) as caught:
        load(f"{spec},scale=true", trusted=False)
    kind = str(dtype).removeprefix("torch.")
    assert str(caught.value).endswith(
        f"scale=true is for uint8 inputs, and these are {kind}. Leave out scale="
    )


def test_scale_is_true_or_false(tmp_path: Path) -> None:
    spec = array_file("npz", tmp_path, values(torch.uint8))
    with pytest.raises(SpecError, match=r"scale=1 must be true or false\. Write scale=true"):
        load(f"{spec},scale=1", trusted=False)


def test_the_readers_of_images_scale_and_say_nothing(tmp_path: Path) -> None:
    from PIL import Image

    pixels = values(torch.uint8)[:3, 0]
    for i, image in enumerate(pixels):
        (tmp_path / "data" / str(i)).mkdir(parents=True)
        Image.fromarray(image.numpy()).save(tmp_path / "data" / str(i) / "1.png")
    data = load(f"imagefolder:{tmp_path / 'data'},grayscale=true", trusted=False)
    assert torch.equal(received(data)[0], pixels.unsqueeze(1).float() / 255)
    assert data.notes == ()


CODE = """
import torch
from tests.data.test_inputs import LABELS, values
def images(dtype="uint8"): return {"data": (values(getattr(torch, dtype)), LABELS)}
def rows(dtype): return {"data": (values(getattr(torch, dtype)).flatten(1), LABELS)}
def rgb(): return {"data": (values(torch.uint8)[:, [0, 1, 1]], LABELS)}
"""


@pytest.fixture
def code(folder: Path) -> str:
    (folder / "mine.py").write_text(CODE)
    return f"{folder}/mine.py:images"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("flatten=true", lambda x: x.flatten(1)),
        ("mean=5-7,std=2", lambda x: (x.double() - torch.tensor([[[5]], [[7]]])) / 2),
        ("std=255,flatten=true", lambda x: x.double().flatten(1) / 255),
    ],
)
def test_the_keys_of_a_spec_apply_to_bytes_as_they_are(
    keys: str, expected: Callable[[Tensor], Tensor], code: str
) -> None:
    data = load(f"{code},{keys}", trusted=True)
    found = received(data, torch.float64)[0]
    right = expected(values(torch.uint8))
    assert found.dtype == right.dtype
    assert torch.equal(found, right)
    note = "mean= and std= are applied to the uint8 inputs as they are, not scaled to 0…1"
    assert data.notes == ((note,) if "std" in keys else ())


def test_the_statistics_of_imagenet_are_refused_for_bytes_that_are_not_scaled(code: str) -> None:
    with pytest.raises(SpecError) as caught:
        load(f"{code.replace(':images', ':rgb')},std=imagenet", trusted=True)
    assert str(caught.value).endswith(
        "the statistics of imagenet are of pixels 0…1, and the inputs are uint8 that are not "
        "scaled. Return x.float() / 255 from your code; for files of arrays write scale=true"
    )


def test_notes_of_the_data_are_notes_of_the_run(losscli: Losscli, folder: Path) -> None:
    x = values(torch.uint8).flatten(2)[:, :, :3]
    np.savez(folder / "bytes.npz", inputs=x.numpy(), targets=LABELS.numpy())
    arguments = ("interpolate", "a.pt", "b.pt", "--points", 3, "--no-figure", "-o", "c")
    outcome = losscli(*arguments, "-d", "npz:bytes.npz,flatten=true")
    assert outcome.status == 0, outcome.stderr
    note = "uint8 inputs are scaled from 0…255 to 0…1: scale=false leaves them as they are"
    assert note in (folder / "c.json").read_text(encoding="utf-8")
    assert note in outcome.stderr
    scaled = losses(folder / "c.csv")
    outcome = losscli(*arguments, "--force", "-d", "npz:bytes.npz,flatten=true,scale=true")
    assert outcome.status == 0, outcome.stderr
    assert note not in outcome.stderr
    assert losses(folder / "c.csv") == scaled


def losses(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8") as file:
        return [row["loss"] for row in csv.DictReader(file)]


WHOLE: Mapping[str, str] = {
    "uint8": "x.float() / 255, or for npz, safetensors and hf scale=true",
    "int64": "x.float()",
    "bool": "x.float()",
}


@pytest.mark.parametrize("dtype", WHOLE)
def test_a_model_that_takes_no_whole_numbers_names_the_cure(
    dtype: str, losscli: Losscli, code: str, folder: Path
) -> None:
    before = sorted(folder.iterdir())
    outcome = losscli(
        *("interpolate", "init:0", "init:1", "--points", 3, "--no-figure", "-o", "c"),
        *("-m", "mlp:8-3", "-d", f"{code.replace(':images', ':rows')}:{dtype}"),
    )
    assert outcome.status == 1
    assert outcome.stderr.count("\n") == 1
    assert outcome.stderr.endswith(
        f"Inputs of the type {dtype} reach the model unchanged: convert them in its forward or in "
        f"the code of --data, for example {WHOLE[dtype]}\n"
    )
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("dtype", "container"),
    in_turn(
        [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64],
        *("tensors", "dataset", "loader"),
    ),
)
def test_targets_of_code_reach_its_loss_in_their_own_type(
    dtype: torch.dtype, container: str
) -> None:
    seen: set[torch.dtype] = set()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.add(targets.dtype)
        # Of a bool ~ is not, and of a whole number it is −1 − n.
        return (~targets) * outputs[:, 0].square() + targets * (outputs[:, 0] - 1).square()

    inputs = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    targets = (torch.arange(12) % 2).to(dtype)
    pairs = TensorDataset(inputs, targets)
    data: Any = {
        "tensors": {"all": (inputs, targets)},
        "dataset": pairs,
        "loader": DataLoader([*pairs], batch_size=5),
    }[container]
    torch.manual_seed(0)
    models = [nn.Linear(4, 2).double() for _ in range(2)]
    states = [model.state_dict() for model in models]
    found = losscli.interpolate(
        *states, model=models[0], data=data, loss=loss, dtype="float64", points=2
    )
    assert seen == {dtype}
    expected = loss(models[0](inputs.double()), targets).mean().item()
    assert found.table["loss"][found.table["alpha"].index(0)] == pytest.approx(expected)
    # Losses of losscli and of torch take them for classes.
    for own in ("cross_entropy", nn.CrossEntropyLoss()):
        found = losscli.interpolate(
            *states, model=models[0], data=data, loss=own, dtype="float64", points=2
        )
        expected = F.cross_entropy(models[0](inputs.double()), targets.long()).item()
        assert found.table["loss"][found.table["alpha"].index(0)] == pytest.approx(expected)
