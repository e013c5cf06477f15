"""Which loss is taken, where it came from, and what is said where it may be the wrong one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import losscli as library
from losscli.errors import LosscliError, LossError
from tests import oracle
from tests.conftest import Losscli

ALPHAS = [0.0, 0.5, 1.0]


class Tagger(nn.Module):
    """Scores [N, *, V] for each token of inputs [N, *]."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens)))


def whole(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(3))


def checkpoints(folder: Path, make: Any) -> list[dict[str, Tensor]]:
    states = []
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        states.append(make().state_dict())
        torch.save(states[-1], folder / f"{name}.pt")
    return states


def line(folder: Path, model: nn.Module, inputs: Tensor, targets: Tensor, **more: Any) -> Any:
    return library.interpolate(
        folder / "a.pt",
        folder / "b.pt",
        model=model,
        data={"all": (inputs, targets)},
        points=3,
        range=(0.0, 1.0),
        **more,
    )


def truth(
    make: Any, states: list[dict[str, Tensor]], inputs: Tensor, targets: Tensor, loss: Any
) -> list[float]:
    return [
        oracle.mean(oracle.losses(make, oracle.blend(*states, x), inputs, targets, loss))
        for x in ALPHAS
    ]


def of_the_last(scores: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, -2), targets.flatten())


def of_the_second(scores: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(scores, targets)


def share_of_the_last(scores: Tensor, targets: Tensor) -> Tensor:
    return (scores.argmax(-1) == targets).double().mean()


def share_of_the_second(scores: Tensor, targets: Tensor) -> Tensor:
    return (scores.argmax(1) == targets).double().mean()


@pytest.mark.parametrize(
    ("shape", "classes"),
    [((9, 5), 3), ((9, 5), 6), ((9, 2, 3), 3), ((9, 2, 3), 2), ((9, 3, 3), 4), ((9, 1), 3)],
    ids=str,
)
@pytest.mark.parametrize("derivatives", [False, True])
def test_scores_of_tokens_are_read_along_their_last_dimension(
    tmp_path: Path, shape: tuple[int, ...], classes: int, *, derivatives: bool
) -> None:
    def make() -> nn.Module:
        return Tagger(classes)

    states = checkpoints(tmp_path, make)
    inputs, targets = whole(7, *shape), whole(classes, *shape)
    found = line(tmp_path, make(), inputs, targets, dtype="float64", derivatives=derivatives)
    expected = truth(make, states, inputs, targets, of_the_last)
    np.testing.assert_allclose(found.table["loss"], expected, rtol=1e-12)
    expected = truth(make, states, inputs, targets, share_of_the_last)
    np.testing.assert_allclose(found.table["accuracy"], expected, rtol=1e-6)
    if derivatives:
        alpha = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        a, b = ({name: t.double() for name, t in state.items()} for state in states)
        point = {name: a[name] + alpha * (b[name] - a[name]) for name in a}
        outputs = torch.func.functional_call(make().double(), point, inputs)
        (slope,) = torch.autograd.grad(of_the_last(outputs, targets), alpha)
        np.testing.assert_allclose(found.table["slope"][1], float(slope), rtol=1e-10)


@pytest.mark.parametrize("shape", [(9, 4), (9, 4, 4)], ids=str)
@pytest.mark.parametrize(
    ("loss", "per_example", "right"),
    [
        ("token_cross_entropy", of_the_last, share_of_the_last),
        ("cross_entropy,dim=-1", of_the_last, share_of_the_last),
        ("cross_entropy,dim=1", of_the_second, share_of_the_second),
    ],
)
def test_where_both_readings_fit_an_option_chooses_one_and_accuracy_follows(
    tmp_path: Path, shape: tuple[int, ...], loss: str, per_example: Any, right: Any
) -> None:
    def make() -> nn.Module:
        return Tagger(4)

    states = checkpoints(tmp_path, make)
    inputs, targets = whole(7, *shape), whole(4, *shape)
    with pytest.raises(LossError, match="in dimension 1 as well as in the last") as refused:
        line(tmp_path, make(), inputs, targets)
    assert "--loss cross_entropy,dim=1 for outputs [N, C, " in str(refused.value)
    assert "--loss token_cross_entropy for outputs [N, T" in str(refused.value)
    found = line(
        tmp_path, make(), inputs, targets, loss=loss, metric=("accuracy",), dtype="float64"
    )
    expected = truth(make, states, inputs, targets, per_example)
    np.testing.assert_allclose(found.table["loss"], expected, rtol=1e-12)
    expected = truth(make, states, inputs, targets, right)
    np.testing.assert_allclose(found.table["accuracy"], expected, rtol=1e-6)


def test_an_ambiguous_shape_is_one_line_and_nothing_is_written(
    losscli: Losscli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoints(tmp_path, lambda: Tagger(4))
    Path("mine.py").write_text(
        "import torch\n"
        "from tests.test_task import Tagger, whole\n"
        "def net():\n    return Tagger(4)\n"
        "def data():\n    return {'all': (whole(7, 9, 4), whole(4, 9, 4))}\n"
    )
    before = sorted(tmp_path.iterdir())
    there = ("a.pt", "b.pt", "-m", "mine.py:net", "-d", "mine.py:data", "-o", "line")
    refused = losscli("interpolate", *there)
    assert refused.status == 1
    assert refused.stderr.count("\n") == 1
    assert "--loss token_cross_entropy" in refused.stderr
    assert sorted(p for p in tmp_path.iterdir() if p.name != "__pycache__") == before
    done = losscli("interpolate", *there, "--loss", "cross_entropy,dim=1", "--points", 3)
    assert done.status == 0
    assert json.loads(Path("line.json").read_text())["loss"] == "cross_entropy,dim=1"


@pytest.mark.parametrize("label", [-1, 5])
def test_labels_of_tokens_are_held_against_the_number_of_scores(tmp_path: Path, label: int) -> None:
    checkpoints(tmp_path, lambda: Tagger(5))
    targets = whole(5, 9, 3)
    targets[7, 1] = label
    with pytest.raises(LossError, match=f"has the label {label}.*5 outputs.*labels 0 to 4"):
        line(tmp_path, Tagger(5), whole(7, 9, 3), targets)


def test_a_dimension_that_is_none_of_classes_is_refused(tmp_path: Path) -> None:
    checkpoints(tmp_path, lambda: Tagger(5))
    with pytest.raises(LosscliError, match=r"dim=2 is not a dimension of classes\. Give dim=1"):
        line(tmp_path, Tagger(5), whole(7, 9, 3), whole(5, 9, 3), loss="cross_entropy,dim=2")


def test_the_curvature_of_scores_of_tokens_is_that_of_their_loss(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return Tagger(3)

    (state, _), inputs, targets = checkpoints(tmp_path, make), whole(7, 9, 5), whole(3, 9, 5)
    found = library.check(
        [tmp_path / "a.pt"], model=make(), data={"all": (inputs, targets)}, dtype="float64"
    )
    model = make().double()
    names = list(state)

    def loss(*values: Tensor) -> Tensor:
        outputs = torch.func.functional_call(model, dict(zip(names, values, strict=True)), inputs)
        return of_the_last(outputs, targets)

    values = tuple(state[name].double() for name in names)
    rows = torch.autograd.functional.hessian(loss, values)
    flat = torch.cat([
        torch.cat([block.reshape(v.numel(), -1) for block in row], 1)
        for v, row in zip(values, rows, strict=True)
    ])
    eigenvalues = torch.linalg.eigvalsh(flat)
    assert found.table["lambda_max"][0] == pytest.approx(float(eigenvalues[-1]), rel=1e-9)
    assert found.table["lambda_min"][0] == pytest.approx(float(eigenvalues[0]), rel=1e-9)
