"""How models take mappings, and what of their outputs losses and metrics take."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import losscli
from losscli.data import from_object
from losscli.data import objects as objects_
from losscli.errors import ModelError
from losscli.evaluation.losses.built_in import bce, cross_entropy, mse
from losscli.evaluation.losses.metrics import accuracy
from losscli.evaluation.objective import Objective
from losscli.evaluation.strategies.base import Strategy
from losscli.evaluation.task_checks import check_task
from tests.cases import in_turn, sample
from tests.conftest import Losscli

N = 13
GENERATOR = torch.Generator().manual_seed(0)
X = torch.rand(N, 4, generator=GENERATOR)
MASK = torch.rand(N, 4, generator=GENERATOR) > 0.3
Y = torch.arange(N) % 3
SOFT = torch.rand(N, 3, generator=GENERATOR)


class Net(nn.Module):
    """What each model below computes, whatever its forward is like."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.second = nn.Linear(5, 3)

    def scores(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x if mask is None else x * mask
        return self.second(torch.tanh(self.first(x)))


class Whole(Net):
    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.scores(batch["x"], batch.get("mask"))


class WholeWithOptions(Net):
    def forward(self, features: Any, scale: float = 1.0, *, verbose: bool = False) -> Tensor:
        return scale * self.scores(features["x"], features.get("mask"))


class ByName(Net):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.scores(x, mask)


class ByNameAlone(Net):
    def forward(self, *, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.scores(x, mask)


class AnyName(Net):
    def forward(self, **batch: Tensor) -> Tensor:
        return self.scores(batch["x"], batch.get("mask"))


class WholeOrNamed(Net):
    """Names that fit win."""

    def forward(self, x: Any, mask: Any = None) -> Tensor:
        if isinstance(x, Mapping):
            raise TypeError("names fit")
        return self.scores(x, mask)


class OtherName(Net):
    """A single input goes by its position, whatever its name."""

    def forward(self, images: Tensor) -> Tensor:
        return self.scores(images)


class Positions(Net):
    def forward(self, *args: Tensor) -> Tensor:
        return self.scores(*args)


BOTH = {"x": X, "mask": MASK}
ONE = {"x": X}
MODELS: dict[str, tuple[Callable[[], Net], dict[str, Tensor]]] = {
    f"{model.__name__}, {len(inputs)}": (model, inputs)
    for model, inputs in (
        *((m, i) for m in (Whole, WholeWithOptions, ByName, ByNameAlone) for i in (BOTH, ONE)),
        *((m, i) for m in (AnyName, WholeOrNamed) for i in (BOTH, ONE)),
        (OtherName, ONE),
        (Positions, ONE),
    )
}


def state(model: Callable[[], Net], seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return dict(model().state_dict())


def right(inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
    """The losses of a plain float64 loop."""
    net = Net().double()
    net.load_state_dict(weights)
    with torch.no_grad():
        return torch.stack([
            F.cross_entropy(
                net.scores(X[i : i + 1].double(), MASK[i : i + 1] if "mask" in inputs else None),
                Y[i : i + 1],
            )
            for i in range(N)
        ])


@pytest.mark.parametrize(("name", "paired"), in_turn(MODELS, False, True))
def test_a_mapping_goes_to_the_model_as_its_forward_takes_it(
    name: str, paired: bool, tmp_path: Path
) -> None:
    model, inputs = MODELS[name]
    files = []
    for seed in range(2):
        files.append(tmp_path / f"{seed}.pt")
        torch.save(state(model, seed), files[-1])
    data = {"all": (inputs, Y) if paired else {**inputs, "y": Y}}
    result = losscli.interpolate(
        *map(str, files), model=model, data=data, points=3, range=(0, 1), dtype="float64"
    )
    a, b = (torch.load(file, weights_only=True) for file in files)
    for row in result.table.records():
        alpha = float(row["alpha"])  # type: ignore[arg-type]
        weights = {key: (1 - alpha) * a[key].double() + alpha * b[key].double() for key in a}
        assert row["loss"] == pytest.approx(right(inputs, weights).mean().item(), rel=1e-12)


def objective_of(
    model: nn.Module,
    data: Any,
    loss: Any = cross_entropy,
    metrics: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Objective:
    return Objective(
        *(model, loss, metrics or {}, from_object({"all": data}, "here")),
        device=torch.device("cpu"),
        dtype=dtype,
    )


def weights_of(objective: Objective) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in objective.tensors.items()}


def test_units_of_a_model_that_takes_a_mapping_are_aligned(tmp_path: Path) -> None:
    files = []
    for seed in range(2):
        files.append(tmp_path / f"{seed}.pt")
        torch.save(state(Whole, seed), files[-1])
    result = losscli.align(*map(str, files), model=Whole, data={"all": (BOTH, Y)})
    aligned, before = result.checkpoint.weights, state(Whole, 1)
    assert torch.allclose(right(BOTH, aligned), right(BOTH, before), rtol=1e-6)
    assert [group["units"] for group in result.summary["groups"]] == [5]


def test_a_model_that_does_not_accept_a_mapping_fails_with_its_own_error() -> None:
    class Wrong(Net):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("the first failure" if isinstance(x, Tensor) else "the second")

    objective = objective_of(Wrong(), {"ids": X, "y": Y})
    with pytest.raises(ModelError, match=r"shape \[13, 4\]: RuntimeError: the first failure\."):
        check_task(objective, weights_of(objective))


def test_the_form_in_which_a_model_takes_its_input_is_chosen_once() -> None:
    class Failing(Net):
        fails = False

        def forward(self, x: Any) -> Tensor:
            if self.fails and isinstance(x, Tensor):
                raise RuntimeError("later")
            return torch.zeros(len(X), 3) + self.second.bias

    objective = objective_of(Failing(), {"ids": X, "y": Y}, dtype=torch.float32)
    objective.plain(weights_of(objective))
    objective.model.fails = True  # type: ignore[assignment]
    with pytest.raises(ModelError, match="RuntimeError: later"):
        objective.plain(weights_of(objective))


# Outputs


class Wrapped(Net):
    """Returns a mapping with more than its scores."""

    def __init__(self, kind: type = dict) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        hidden = torch.tanh(self.first(x))
        return self.kind(hidden=hidden, logits=self.second(hidden))


class Bare(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x)


OWN = {
    "cross_entropy": (cross_entropy, Y),
    "mse": (mse, SOFT),
    "bce": (bce, SOFT),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", OWN)
def test_losses_and_metrics_take_the_logits_of_a_mapping(loss: str, dtype: torch.dtype) -> None:
    function, targets = OWN[loss]
    metrics = {"accuracy": accuracy} if loss == "cross_entropy" else {}
    torch.manual_seed(0)
    weights = Bare().state_dict()
    found = []
    for model in (Bare(), Wrapped()):
        objective = objective_of(model, (X, targets), function, metrics, dtype)
        check_task(objective, weights)
        found.append(objective.plain(weights)["all"])
    assert torch.equal(found[0].losses, found[1].losses)
    assert found[0].metrics == found[1].metrics
    assert found[0].losses.unique().numel() > 1


@pytest.mark.parametrize(
    "way", [Strategy.STACKED, Strategy.SHARED, Strategy.BOUND, Strategy.LOADED]
)
def test_every_way_takes_the_logits_of_a_mapping(way: Strategy) -> None:
    from losscli.weight_space.slices import Line

    a, b = state(Bare, 0), state(Bare, 1)
    line = Line(a, b)
    losses = []
    for model in (Bare(), Wrapped()):
        objective = objective_of(model, (X, Y), metrics={"accuracy": accuracy})
        check_task(objective, a)
        objective.strategy = way
        losses.append(objective.at(line, [(0.0,), (0.4,), (1.0,)])["all"].losses)
    assert torch.equal(*losses)
    assert losses[0].shape == (3, N)


CODE = """
import torch
from tests.evaluation.test_outputs import SOFT, X, Y, Wrapped, Whole
def data(): return {"all": (X, Y)}
def named(): return {"all": {"x": X, "y": Y}}
def soft(): return {"all": (X, SOFT)}
def ids(dtype="float32"): return {"all": (X, Y.to(getattr(torch, dtype)))}
def spoiled(value="nan", place=5, column=1, count=1):
    soft = torch.cat([SOFT] * int(count))
    soft[int(place), int(column)] = float(value)
    return {"test": (X, SOFT), "train": (torch.cat([X] * int(count)), soft)}
class Rows(torch.utils.data.Dataset):
    def __init__(self, pair): self.pair = pair
    def __len__(self): return len(self.pair[0])
    def __getitem__(self, i): return tuple(part[i] for part in self.pair)
class Coming(torch.utils.data.IterableDataset):
    def __init__(self, pair): self.pair = pair
    def __iter__(self): return zip(*self.pair)
def rows(**keys): return {name: Rows(pair) for name, pair in spoiled(**keys).items()}
def coming(**keys): return {name: Coming(pair) for name, pair in spoiled(**keys).items()}
def masked(outputs, targets):
    return torch.nan_to_num(outputs["logits"] - targets).square().mean(1)
def unmasked(outputs, targets):
    return (outputs["logits"] - targets).square().mean(1)
def halves(): return {"all": (X, Y + 0.5)}
def negative(): return {"all": (X, Y - 1.0)}
def own(outputs, targets): return outputs["hidden"].mean(1)
def broken(outputs, targets): return outputs.mean(1)
class Nothing(Wrapped):
    def forward(self, x): return {"hidden": super().forward(x)["hidden"]}
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(CODE)
    for seed, name in enumerate("ab"):
        torch.save(state(Bare, seed), tmp_path / f"{name}.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(losscli: Losscli, *words: object) -> Any:
    return losscli(
        *("interpolate", "a.pt", "b.pt", "--points", 3, "--range", 0, 1, "--no-figure"),
        *("-o", "c", "--dtype", "float64", *words),
    )


def test_the_default_loss_and_metric_take_logits(losscli: Losscli, code: Path) -> None:
    done = run(losscli, "-m", "mine.py:Wrapped", "-d", "mine.py:data")
    assert done.status == 0, done.stderr
    with (code / "c.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    expected = right(ONE, torch.load("a.pt", weights_only=True))
    assert float(rows[0]["loss"]) == pytest.approx(expected.mean().item(), rel=1e-12)
    net = Net()
    net.load_state_dict(torch.load("a.pt", weights_only=True))
    share = (net.scores(X).argmax(1) == Y).double().mean().item()
    assert float(rows[0]["accuracy"]) == pytest.approx(share)


def test_a_user_defined_loss_receives_the_whole_mapping(losscli: Losscli, code: Path) -> None:
    words = ("-m", "mine.py:Wrapped", "-d", "mine.py:data", "--metric", "none")
    done = run(losscli, *words, "--loss", "mine.py:own")
    assert done.status == 0, done.stderr
    done = run(losscli, *words, "--force", "-o", "d", "--loss", "mine.py:broken")
    assert done.status == 1
    assert done.stderr == (
        "losscli: the loss fails: AttributeError: 'dict' object has no attribute 'mean'. It "
        "receives the mapping that the model returns, with the keys hidden, logits\n"
    )
    assert not list(code.glob("d*"))


def test_a_mapping_without_logits_is_refused(losscli: Losscli, code: Path) -> None:
    done = run(losscli, "-m", "mine.py:Nothing", "-d", "mine.py:data")
    assert done.status == 1
    assert done.stderr == (
        "losscli: the model returns a dict, and the loss takes a tensor. Give a --loss of your own "
        "that takes it, or a model that returns its scores, alone or under the key logits\n"
    )
    assert not list(code.glob("c*"))


CURE = (
    "The targets are whole numbers: if they are classes, convert them with .long(), or store "
    "integers in the file\n"
)


@pytest.mark.parametrize("loss", [(), ("--loss", "bce"), ("--loss", "cross_entropy")], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_classes_stored_as_floating_point_numbers_name_the_cure(
    dtype: str, loss: tuple[str, ...], losscli: Losscli, code: Path
) -> None:
    done = run(losscli, "-m", "mine.py:Wrapped", "-d", f"mine.py:ids,dtype={dtype}", *loss)
    assert done.status == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith(f"not float64 [13, 3] and {dtype} [13]. {CURE}")
    assert not list(code.glob("c*"))


@pytest.mark.parametrize("data", ["halves", "negative"])
def test_other_targets_are_not_taken_for_classes(data: str, losscli: Losscli, code: Path) -> None:
    done = run(losscli, "-m", "mine.py:Wrapped", "-d", f"mine.py:{data}")
    assert done.status == 1
    assert done.stderr.endswith("Choose another --loss, or a model with one output per target\n")


@pytest.mark.parametrize("loss", sample(["mse", "bce", "mine.py:unmasked"], 0))
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_target_that_is_not_finite_is_named(
    value: str, loss: str, losscli: Losscli, code: Path
) -> None:
    words = ("-m", "mine.py:Wrapped", "--loss", loss, "--batch-size", 4)
    for place in (0, 5, 12):
        done = run(losscli, *words, "-d", f"mine.py:spoiled,value={value},place={place}")
        assert done.status == 1
        assert done.stdout == ""
        assert done.stderr == (
            f"losscli: the split 'train': the target of example {place} (counted from 0) is "
            f"{value}. Leave the example out, or give your own --loss that skips it\n"
        )
        assert not list(code.glob("c*"))
    done = run(losscli, *words, "-d", f"mine.py:spoiled,value={value}", "--split", "test")
    assert done.status == 0, done.stderr


def test_a_loss_may_leave_targets_out_that_are_not_finite(losscli: Losscli, code: Path) -> None:
    words = ("-m", "mine.py:Wrapped", "--loss", "mine.py:masked", "-d", "mine.py:spoiled")
    done = run(losscli, *words, "--split", "train")
    assert done.status == 0, done.stderr
    with (code / "c.csv").open(newline="", encoding="utf-8") as file:
        first = next(csv.DictReader(file))
    net = Net().double()
    net.load_state_dict(torch.load("a.pt", weights_only=True))
    with torch.no_grad():
        errors = (net.scores(X.double()) - SOFT.double()).square()
    errors[5, 1] = 0
    assert float(first["loss"]) == pytest.approx(errors.mean().item(), rel=1e-12)


@pytest.mark.parametrize(
    ("form", "limit"), in_turn(["rows", "coming"], [], ["--limit", 25]), ids=str
)
def test_a_target_that_is_not_finite_is_found_in_a_stream(
    form: str, limit: list[object], losscli: Losscli, code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects_, "host_budget", lambda: 0)
    words = ("-m", "mine.py:Wrapped", "--loss", "mse", "--batch-size", 4, *limit)
    seen = 0
    # At every place of a batch.
    for place in (6, 11, 16, 21):
        done = run(losscli, *words, "--force", "-d", f"mine.py:{form},place={place},count=2")
        if done.status == 0:
            # Then it is not among those that the limit leaves.
            assert limit
            continue
        seen += 1
        assert (done.status, done.stdout) == (1, "")
        assert done.stderr.startswith(
            f"losscli: the split 'train': the target of example {place} (counted from 0) is nan. "
        )
    assert seen >= 3
