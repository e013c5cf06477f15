"""Nested inputs and targets, ragged lists and graphs, against a float64 loop over examples."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import losscli
from losscli.data import Split, from_object, leaves, realise
from losscli.errors import DataError, LosscliError, LossError
from tests import oracle
from tests.cases import sample
from tests.conftest import Losscli

N = 13
GENERATOR = torch.Generator().manual_seed(5)
X = torch.randn(N, 4, generator=GENERATOR)
CLASS = X[:, :3].argmax(1)
VALUE = X.sum(1)
SCALE = 1 + torch.arange(N) / N
# Images of three channels and of different sizes, with one to three boxes.
IMAGES = [torch.randn(3, 2 + i % 3, 4, generator=GENERATOR) for i in range(N)]
BOXES = [{"boxes": torch.rand(1 + i % 3, 4, generator=GENERATOR), "id": i} for i in range(N)]
# As many boxes, channels and images, so that lengths alone decide nothing.
SQUARE = [torch.randn(3, 3, 4, generator=GENERATOR) for _ in range(N)]
THREE = [{"boxes": torch.rand(3, 4, generator=GENERATOR), "id": i} for i in range(N)]

Both = namedtuple("Both", ["cls", "reg"])  # noqa: PYI024


class Heads(nn.Module):
    """Two heads: a class and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.cls, self.reg = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.trunk(x).tanh()
        return {"cls": self.cls(hidden), "reg": self.reg(hidden)[:, 0]}


class Parts(Heads):
    """The same from inputs that are nested."""

    def forward(self, point: dict[str, Any], scale: Tensor) -> Any:  # type: ignore[override]
        left, right = point["sides"]
        return super().forward(torch.cat([left, right], 1) * scale[:, None])


class Scaled(Heads):
    """The same from two inputs."""

    def forward(self, x: Tensor, scale: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x * scale[:, None])


class Detector(nn.Module):
    """Takes a list of images, and gives a prediction for each."""

    def __init__(self) -> None:
        super().__init__()
        self.box = nn.Linear(3, 4)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        assert isinstance(images, list | tuple)
        return [{"box": self.box(image.mean((1, 2)))} for image in images]


class Graphs:
    """A batch of graphs: the nodes of all, and the graph of each."""

    def __init__(self, nodes: list[Tensor], y: Tensor | None) -> None:
        self.store = {"x": torch.cat(nodes), "sizes": torch.tensor([len(x) for x in nodes])}
        self.y = y

    def to(self, device: str) -> Graphs:
        raise AssertionError(device)


class GraphNet(nn.Module):
    """Sums over the nodes of each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.node, self.out = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, graphs: Graphs) -> Tensor:
        x, sizes = graphs.store["x"], graphs.store["sizes"]
        index = torch.arange(len(sizes)).repeat_interleave(sizes)
        hidden = self.node(x).tanh()
        return self.out(hidden.new_zeros(len(sizes), 5).index_add(0, index, hidden))


def both(outputs: Any, targets: Any) -> Tensor:
    """The loss of two heads."""
    cls, reg = targets.values() if isinstance(targets, dict) else targets
    return F.cross_entropy(outputs["cls"], cls, reduction="none") + (outputs["reg"] - reg) ** 2


def boxes(outputs: list[dict[str, Tensor]], targets: list[dict[str, Any]]) -> Tensor:
    """The mean squared distance of each image's boxes from its prediction."""
    assert all(isinstance(t["id"], int) for t in targets)
    pairs = zip(outputs, targets, strict=True)
    return torch.stack([((o["box"] - t["boxes"]) ** 2).mean() for o, t in pairs])


class Items(Dataset[Any]):
    def __init__(self, item: Callable[[int], Any], number: int = N) -> None:
        self.item, self.number = item, number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, i: int) -> Any:
        return self.item(i)


class Stream(IterableDataset[Any]):
    def __init__(self, item: Callable[[int], Any]) -> None:
        self.item = item

    def __iter__(self) -> Iterator[Any]:
        return map(self.item, range(N))


def columns(batch: list[Any]) -> tuple[Any, ...]:
    """What torchvision's detection calls collate_fn."""
    return tuple(zip(*batch, strict=True))


def lists(batch: list[Any]) -> dict[str, Any]:
    return {"images": [x for x, _ in batch], "targets": [y for _, y in batch]}


def grouped(rows: list[Any]) -> tuple[Any, Any]:
    """The collate_fn of the README for examples (x1, x2, y)."""
    *inputs, targets = torch.utils.data.default_collate(rows)
    return tuple(inputs), targets


def pair(batch: list[Any]) -> tuple[Graphs, Tensor]:
    return Graphs([x for x, _ in batch], None), torch.stack([y for _, y in batch])


def graphs(batch: list[Any]) -> Graphs:
    return Graphs([x for x, _ in batch], torch.stack([y for _, y in batch]))


def node(i: int) -> tuple[Tensor, Tensor]:
    return X[: 1 + i % 4] + i / N, CLASS[i]


def nested(i: int) -> Any:
    inputs = {"point": {"sides": (X[i, :1], X[i, 1:])}, "scale": SCALE[i]}
    return inputs, {"cls": CLASS[i], "reg": VALUE[i]}


@dataclass(frozen=True)
class Case:
    """Data in one form.

    Attributes:
        name: Its name.
        data: Makes the data.
        model: The model.
        loss: The loss.
        example: The inputs and the target of an example, as the model and the loss take them.
        options: Further options.
    """

    name: str
    data: Callable[[], Any]
    model: Callable[[], nn.Module]
    loss: Any
    example: Callable[[int, torch.dtype], tuple[tuple[Any, ...], Any]]
    options: Mapping[str, Any] = field(default_factory=dict)


def head_example(i: int, dtype: torch.dtype) -> Any:
    return (X[i : i + 1].to(dtype),), (CLASS[i : i + 1], VALUE[i : i + 1])


def parts_example(i: int, dtype: torch.dtype) -> Any:
    x = X[i : i + 1].to(dtype)
    scale = SCALE[i : i + 1].to(dtype)
    return ({"sides": (x[:, :1], x[:, 1:])}, scale), (CLASS[i : i + 1], VALUE[i : i + 1])


def scaled_example(i: int, dtype: torch.dtype) -> Any:
    rows = slice(i, i + 1)
    return (X[rows].to(dtype), SCALE[rows].to(dtype)), (CLASS[rows], VALUE[rows])


def box_example(i: int, dtype: torch.dtype) -> Any:
    return ([IMAGES[i].to(dtype)],), [BOXES[i]]


def square_example(i: int, dtype: torch.dtype) -> Any:
    return ([SQUARE[i].to(dtype)],), [THREE[i]]


def graph_example(i: int, dtype: torch.dtype) -> Any:
    x, y = node(i)
    return (Graphs([x.to(dtype)], None),), y[None]


DICT = {"cls": CLASS, "reg": VALUE}
HEADS = (Heads, both, head_example)
PARTS = (Parts, both, parts_example)
SCALED = (Scaled, both, scaled_example)
DETECTOR = (Detector, boxes, box_example)
SQUARES = (Detector, boxes, square_example)
GRAPHS = (GraphNet, F.cross_entropy, graph_example)


def loader(item: Callable[[int], Any], **options: Any) -> Callable[[], Any]:
    return lambda: DataLoader(Items(item), **{"batch_size": 3, **options})


CASES = [
    Case("dict", lambda: {"s": (X, DICT)}, *HEADS),
    Case("arrays", lambda: {"s": (X.numpy(), [CLASS.numpy(), VALUE.numpy()])}, *HEADS),
    Case("named tuple", lambda: {"s": (X, Both(CLASS, VALUE))}, *HEADS),
    Case("loader of tuples", loader(lambda i: (X[i], (CLASS[i], VALUE[i])), batch_size=2), *HEADS),
    Case("loader of dicts", loader(lambda i: {"x": X[i], "y": (CLASS[i], VALUE[i])}), *HEADS),
    Case("data set", lambda: {"s": Items(lambda i: (X[i], Both(CLASS[i], VALUE[i])))}, *HEADS),
    Case("iterable", lambda: {"s": Stream(lambda i: (X[i], (CLASS[i], VALUE[i])))}, *HEADS),
    Case("nested inputs", lambda: {"s": ({"point": {"sides": (X[:, :1], X[:, 1:])},
         "scale": SCALE}, DICT)}, *PARTS),
    Case("loader of nested inputs", loader(nested), *PARTS),
    Case("two inputs", lambda: {"s": ((X, SCALE), DICT)}, *SCALED),
    Case("loader of two inputs", loader(lambda i: ((X[i], SCALE[i]), (CLASS[i], VALUE[i])),
         batch_size=2), *SCALED),
    Case("two names", loader(lambda i: {"x": X[i], "scale": SCALE[i], "y": (CLASS[i], VALUE[i])}),
         *SCALED),
    Case("three of a row", loader(lambda i: (X[i], SCALE[i], (CLASS[i], VALUE[i])), batch_size=2,
         collate_fn=grouped), *SCALED),
    Case("ragged lists", lambda: {"s": (IMAGES, BOXES)}, *DETECTOR),
    Case("ragged tuples", loader(lambda i: (IMAGES[i], BOXES[i]), collate_fn=columns), *DETECTOR),
    Case("ragged dict", loader(lambda i: (IMAGES[i], BOXES[i]), collate_fn=lists), *DETECTOR),
    Case("ragged iterable", lambda: DataLoader(Stream(lambda i: (IMAGES[i], BOXES[i])),
         batch_size=4, collate_fn=columns), *DETECTOR),
    Case("equal lengths", loader(lambda i: (SQUARE[i], THREE[i]), collate_fn=columns), *SQUARES),
    Case("graphs", loader(node, collate_fn=graphs), *GRAPHS),
    Case("graphs and targets", loader(node, collate_fn=pair), *GRAPHS),
    Case("iterable of graphs", lambda: DataLoader(Stream(node), batch_size=4, collate_fn=pair),
         *GRAPHS),
    Case("graphs in a worker", loader(node, collate_fn=graphs, num_workers=1), *GRAPHS),
    Case("boxes in a worker", loader(lambda i: (IMAGES[i], BOXES[i]), collate_fn=columns,
         num_workers=1), *DETECTOR),
]  # fmt: skip
IDS = [case.name for case in CASES]


def states(case: Case) -> list[dict[str, Tensor]]:
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(case.model().state_dict())
    return found


def reference(case: Case, alpha: float, rows: range = range(N)) -> list[float]:
    """The loss of each example alone, in float64."""
    loss = case.loss
    model = case.model().double()
    model.load_state_dict(oracle.blend(*states(case), alpha))
    with torch.no_grad():
        losses = []
        for i in rows:
            inputs, targets = case.example(i, torch.float64)
            losses.append(float(loss(model(*inputs), targets).mean()))
    return losses


def run(case: Case, data: Any = None, **options: Any) -> losscli.Result[Any]:
    loss = "cross_entropy" if case.loss is F.cross_entropy else case.loss
    data = case.data() if data is None else data
    options = {"metric": "none", "points": 3, "range": (0, 1), **case.options, **options}
    return losscli.interpolate(*states(case), model=case.model, data=data, loss=loss, **options)


@pytest.mark.parametrize("case", sample(CASES, 1), ids=IDS)
def test_losses_are_those_of_a_loop(case: Case) -> None:
    for dtype, tolerance in (("float64", 1e-12), ("float32", 1e-5)):
        result = run(case, dtype=dtype, batch_size=5)
        for alpha, _, loss, error in result.table.rows:
            truth = reference(case, float(alpha))
            assert loss == pytest.approx(oracle.mean(truth), rel=tolerance)
            assert error == pytest.approx(oracle.standard_error(truth), rel=100 * tolerance)


@pytest.mark.parametrize("name", ["dict", "ragged tuples", "graphs"])
def test_parts_of_nested_data(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[IDS.index(name)]
    whole = run(case, dtype="float64").table.rows
    # A limit that takes all, sampling that ends with all, and data that do not fit in memory.
    assert run(case, dtype="float64", limit=N).table.rows == whole
    for row, other in zip(
        run(case, dtype="float64", sampling_error=1e-9).table.rows, whole, strict=True
    ):
        assert row[2:4] == pytest.approx(other[2:4], rel=1e-12)
    monkeypatch.setattr("losscli.data.objects.host_budget", lambda: 0)
    for row, other in zip(run(case, dtype="float64").table.rows, whole, strict=True):
        assert row[2:4] == pytest.approx(other[2:4], rel=1e-12)


@pytest.mark.parametrize("name", ["dict", "ragged tuples", "graphs"])
def test_batches_of_nested_data_are_kept(name: str) -> None:
    case = CASES[IDS.index(name)]
    options = {} if isinstance(case.data(), DataLoader) else {"batch_size": 3}
    result = run(case, dtype="float64", batch_loss=True, **options)
    for alpha, _, loss, _ in result.table.rows:
        truth = reference(case, float(alpha))
        means = [oracle.mean(truth[i : i + 3]) for i in range(0, N, 3)]
        assert loss == pytest.approx(oracle.mean(means), rel=1e-12)


@pytest.mark.parametrize("name", sample(["nested inputs", "ragged lists", "graphs"], 1))
def test_hessians_of_nested_data(name: str) -> None:
    case = CASES[IDS.index(name)]
    loss = "cross_entropy" if case.loss is F.cross_entropy else case.loss
    found = losscli.check(
        states(case)[0], model=case.model, data=case.data(), loss=loss, dtype="float64"
    )
    row = dict(zip(found.table.columns, found.table.rows[0], strict=True))
    model = case.model().double()
    model.load_state_dict(states(case)[0])
    names = list(dict(model.named_parameters()))
    vector = torch.nn.utils.parameters_to_vector(model.parameters()).detach()

    def mean(flat: Tensor) -> Tensor:
        parts = flat.split([p.numel() for p in model.parameters()])
        state = {n: x.view_as(p) for n, x, p in zip(names, parts, model.parameters(), strict=True)}
        each = []
        for i in range(N):
            inputs, targets = case.example(i, torch.float64)
            outputs = torch.func.functional_call(model, state, inputs)
            each.append(case.loss(outputs, targets).mean())
        return torch.stack(each).mean()

    eigenvalues = torch.linalg.eigvalsh(torch.autograd.functional.hessian(mean, vector))
    assert row["lambda_max"] == pytest.approx(float(eigenvalues[-1]), rel=1e-4)


def test_the_user_gets_the_types_of_the_loader() -> None:
    seen: list[tuple[type, type]] = []

    def loss(outputs: Any, targets: Any) -> Tensor:
        seen.append((type(targets), type(targets[0])))
        return both(outputs, targets) if len(targets[0]) else torch.zeros(0)

    case = replace(CASES[IDS.index("named tuple")], loss=loss)
    run(case)
    assert set(seen) == {(Both, Tensor)}
    split = from_object({"s": (IMAGES, tuple(BOXES))}, "here").splits["s"].first(2)
    assert isinstance(realise(split.targets), tuple)
    assert isinstance(realise(split.inputs), list)


@pytest.mark.parametrize("images", [list, tuple])
def test_as_many_examples_as_channels_and_boxes(images: type) -> None:
    case = CASES[IDS.index("equal lengths")]
    data = {"s": (images(SQUARE[:3]), THREE[:3])}
    for alpha, _, loss, _ in run(case, data, dtype="float64").table.rows:
        truth = oracle.mean(reference(case, float(alpha), range(3)))
        assert loss == pytest.approx(truth, rel=1e-12)


def test_nested_data_move_to_a_device() -> None:
    for name in ("dict", "nested inputs", "ragged tuples", "graphs"):
        split = next(iter(from_object(CASES[IDS.index(name)].data(), "here").splits.values()))
        assert isinstance(split, Split)
        moved = split.first(4).to(torch.device("meta"))
        devices = {leaf.device.type for leaf in leaves([moved.inputs, moved.targets])}
        assert devices == {"meta"}
        assert {leaf.device.type for leaf in leaves(realise(moved.take(slice(1, 3)).inputs))} == {
            "meta"
        }
        assert split.is_on(torch.device("cpu"))


def test_a_resumed_run_recognises_nested_data() -> None:
    digests = [
        from_object(CASES[IDS.index(name)].data(), "here").splits.popitem()[1].digest  # type: ignore[attr-defined]
        for name in ("ragged tuples", "ragged tuples", "graphs", "graphs", "dict")
    ]
    assert digests[0] == digests[1]
    assert digests[2] == digests[3]
    assert len(set(digests)) == 3


class Plain:
    """An object that is neither a batch nor a tensor."""


class Locked(Graphs):
    """A batch that cannot be copied."""

    def __init__(self, nodes: list[Tensor], y: Tensor) -> None:
        super().__init__(nodes, y)
        self.lock = lambda: 0


BAD: list[tuple[Any, type[LosscliError], str]] = [
    ({"s": (X, {"cls": CLASS, "reg": VALUE[:5]})}, DataError,
     "split 's': 13 inputs for 13 and 5 targets. Give one target per example"),
    ({"s": (IMAGES, BOXES[:4])}, DataError, "split 's': 13 inputs for 4 targets"),
    ({"s": ({"a": X, "b": IMAGES[:6]}, DICT)}, DataError, "13 and 6 inputs for 13 and 13 targets"),
    ({"s": (IMAGES, torch.rand(4))}, DataError, "13 inputs for 4 targets"),
    ({"s": (X, {"cls": [1] * N})}, DataError, "'cls' is a list, not a dense tensor"),
    ({"s": (Plain(), CLASS)}, DataError, "'inputs' is a Plain, not a dense tensor"),
    ({"s": Graphs([X], None)}, DataError, "a batch of the type Graphs has no attribute for its"),
    (DataLoader(Items(node), collate_fn=lambda b: Locked(*zip(*b, strict=True))), DataError,
     "in the data cannot be copied"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "kind", "text"), BAD)
def test_bad_nests_are_refused(data: Any, kind: type[LosscliError], text: str) -> None:
    with pytest.raises(kind) as caught:
        run(CASES[0], data, batch_size=2)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "the targets of the split 's' are a dict, which has no default loss. Give --loss "),
        (("--loss", "mse"), "the loss takes a tensor of targets, and the data give a dict. Give a"),
        (("--loss", "net.py:both", "--metric", "accuracy", "-m", "net.py:Other"),
         "the metric 'accuracy' takes a tensor of targets, and the data give a dict"),
        (("--loss", "net.py:both", "-d", "net.py:uneven"),
         "split 's': 13 inputs for 13 and 5 targets. Give one target per example"),
    ],
)  # fmt: skip
def test_targets_and_losses_that_do_not_fit_a_nest_are_refused_in_one_line(
    arguments: tuple[str, ...], text: str, losscli: Losscli, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(
        "from tests.studies.test_nested_data import DICT, X, Heads, both\n"
        "class Net(Heads):\n"
        "    def forward(self, x): return super().forward(x)['cls']\n"
        "class Other(Heads): pass\n"
        "def data(): return {'s': (X, DICT)}\n"
        "def uneven(): return {'s': (X, {'cls': DICT['cls'], 'reg': X[:5, 0]})}\n"
    )
    before = set(tmp_path.iterdir())
    outcome = losscli("interpolate", "init:0", "init:1", "-m", "net.py:Net", "-d", "net.py:data",
                      "-o", "x", *arguments)  # fmt: skip
    assert (outcome.status, outcome.stderr.count("\n")) == (1, 1)
    assert text in outcome.stderr
    assert set(tmp_path.iterdir()) - before <= {tmp_path / "__pycache__"}


class NodeNet(GraphNet):
    def forward(self, graphs: Graphs) -> Tensor:
        return self.out(self.node(graphs.store["x"]).tanh())


def test_targets_of_nodes_need_a_loss_per_batch() -> None:
    def nodes(batch: list[Any]) -> Graphs:
        return Graphs([x for x, _ in batch], torch.cat([x[:, :3].argmax(1) for x, _ in batch]))

    case = replace(CASES[IDS.index("graphs")], model=NodeNet)
    data = DataLoader(Items(node), batch_size=4, collate_fn=nodes)
    with pytest.raises(LossError, match=r"gives shape \[31\] for a batch of 13 .*--batch-loss"):
        run(case, data)
    result = run(case, data, batch_loss=True, dtype="float64", metric=())
    for alpha, _, loss, _, accuracy in result.table.rows:
        model = NodeNet().double()
        model.load_state_dict(oracle.blend(*states(case), float(alpha)))
        means, shares = [], []
        for start in range(0, N, 4):
            x = torch.cat([node(i)[0] for i in range(start, min(N, start + 4))]).double()
            outputs = model.out(model.node(x).tanh()).detach()
            classes = x[:, :3].argmax(1)
            means.append(float(F.cross_entropy(outputs, classes)))
            shares.append(float((outputs.argmax(1) == classes).double().mean()))
        assert accuracy == pytest.approx(oracle.mean(shares), rel=1e-12)
        assert loss == pytest.approx(oracle.mean(means), rel=1e-12)


def test_a_loss_per_batch_of_ragged_data_names_the_option() -> None:
    case = CASES[IDS.index("ragged lists")]
    mean = replace(case, loss=lambda outputs, targets: boxes(outputs, targets).mean()[None])
    with pytest.raises(LossError, match=r"gives shape \[1\] for a batch of 13 .*--batch-loss"):
        run(mean)
