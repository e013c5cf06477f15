"""Barriers of pairs from a file, disagreement and CKA, against plain loops and formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import losscli
from losscli.errors import UsageError
from losscli.evaluation.losses.metrics import accuracy, disagreement
from losscli.evaluation.output_comparison import LinearCKA
from losscli.models import MLP
from losscli.table import Table
from tests.conftest import Losscli

GIVEN: dict[str, Any] = {"model": "mlp:6-8-3", "dtype": "float64"}


@pytest.fixture(scope="module")
def data() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    return {"all": (inputs, torch.randint(3, (50,), generator=generator))}


def states(number: int) -> list[dict[str, torch.Tensor]]:
    found = []
    for seed in range(number):
        torch.manual_seed(seed)
        found.append({n: 2 * t for n, t in MLP("6-8-3").state_dict().items()})
    return found


def outputs_of(state: dict[str, torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    model = MLP("6-8-3").double()
    model.load_state_dict(state)
    with torch.no_grad():
        return model(inputs)


def cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """The definition by Gram matrices: HSIC(K, L) / √(HSIC(K, K) HSIC(L, L))."""
    size = len(x)
    centre = torch.eye(size, dtype=torch.float64) - 1 / size
    k, own = (centre @ t.double() @ t.double().T @ centre for t in (x, y))
    return float((k * own).sum() / ((k * k).sum() * (own * own).sum()).sqrt())


def test_disagreement_and_cka_are_those_of_the_outputs(data: Any) -> None:
    own = states(3)
    result = losscli.barriers(own, data=data, points=3, disagreement=True, cka=True, **GIVEN)
    small = losscli.barriers(
        own, data=data, points=3, disagreement=True, cka=True, batch_size=7, **GIVEN
    )
    outputs = [outputs_of(state, data["all"][0]) for state in own]
    split = result.summary["splits"]["all"]
    for (i, j), row, other in zip(
        ((0, 1), (0, 2), (1, 2)), result.table.records(), small.table.records(), strict=True
    ):
        different = (outputs[i].argmax(1) != outputs[j].argmax(1)).double()
        assert 0 < row["disagreement"] == pytest.approx(float(different.mean()), rel=1e-12)
        assert row["disagreement_stderr"] == pytest.approx(
            float(different.std() / len(different) ** 0.5), rel=1e-12
        )
        assert row["cka"] == pytest.approx(cka(outputs[i], outputs[j]), rel=1e-11)
        assert other["cka"] == pytest.approx(row["cka"], rel=1e-12)
        assert other["disagreement"] == row["disagreement"]
        for name in ("disagreement", "cka"):
            assert split[name][i][j] == split[name][j][i] == row[name]
    assert np.diagonal(split["cka"]).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("buffers", ["interpolate", "recalibrate"])
def test_the_statistics_of_batchnorm_are_those_of_each_checkpoint(buffers: str, data: Any) -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    inputs, targets = data["all"]
    own, outputs = [], []
    for seed in range(2):
        torch.manual_seed(seed)
        model = build().double()
        model(3 * inputs[:20] + seed)
        own.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        # All examples are one batch, whose variance is the unbiased one, as in training.
        if buffers == "recalibrate":
            norm = model[1]
            hidden = model[0](inputs)
            norm.running_mean.copy_(hidden.mean(0).detach())
            norm.running_var.copy_(hidden.var(0).detach())
        outputs.append(model.eval()(inputs).detach())
    given: dict[str, Any] = {"model": build, "data": {"train": (inputs, targets)}, "points": 3}
    result = losscli.barriers(
        own, dtype="float64", buffers=buffers, batch_size=50, disagreement=True, cka=True, **given
    )
    (row,) = result.table.records()
    different = (outputs[0].argmax(1) != outputs[1].argmax(1)).double().mean()
    assert row["disagreement"] == pytest.approx(float(different))
    assert row["cka"] == pytest.approx(cka(*outputs), rel=1e-9)


def test_disagreement_and_cka_of_a_permuted_and_a_rotated_copy(data: Any) -> None:
    state = states(1)[0]
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    first, last = (name.rpartition(".")[0] for name in state if name.endswith("weight"))
    permuted = {
        f"{first}.weight": state[f"{first}.weight"][order],
        f"{first}.bias": state[f"{first}.bias"][order],
        f"{last}.weight": state[f"{last}.weight"][:, order],
        f"{last}.bias": state[f"{last}.bias"],
    }
    turn = 3.7 * torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    rotated = {
        **{name: tensor.double() for name, tensor in state.items()},
        f"{last}.weight": turn @ state[f"{last}.weight"].double(),
        f"{last}.bias": turn @ state[f"{last}.bias"].double(),
    }
    result = losscli.barriers(
        [state, permuted, rotated], data=data, points=3, disagreement=True, cka=True, **GIVEN
    )
    to_permuted, to_rotated, _ = result.table.records()
    assert (to_permuted["disagreement"], to_permuted["disagreement_stderr"]) == (0.0, 0.0)
    assert to_permuted["cka"] == pytest.approx(1.0, abs=1e-12)
    assert to_rotated["cka"] == pytest.approx(1.0, abs=1e-6)  # the checkpoint is stored in float32
    assert to_rotated["disagreement"] > 0


@pytest.mark.parametrize("sizes", [(40,), (1, 39), (13, 13, 14), (20, 20)])
def test_cka_is_the_same_however_examples_are_divided(sizes: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    # A common offset of 1e6 is removed by centring, and must cost no digits.
    x, y = (torch.randn(40, p, generator=generator).double() + 1e6 * (p == 4) for p in (4, 7))
    found = LinearCKA()
    for parts in zip(x.split(list(sizes)), y.split(list(sizes)), strict=True):
        found.add(*parts)
    assert found.value == pytest.approx(cka(x - 1e6, y), rel=1e-9)
    turned = torch.linalg.qr(torch.randn(4, 4, generator=generator).double())[0]
    other = LinearCKA()
    other.add(x - 1e6, -2.5 * (x - 1e6) @ turned)
    assert other.value == pytest.approx(1.0, abs=1e-12)


def test_cka_of_constant_outputs_is_not_known() -> None:
    found = LinearCKA()
    found.add(torch.ones(5, 2), torch.randn(5, 2))
    assert np.isnan(found.value)


def test_disagreement_leaves_out_targets_that_are_ignored() -> None:
    generator = torch.Generator().manual_seed(4)
    one, other = (torch.randn(6, 4, 5, generator=generator) for _ in range(2))
    targets = torch.randint(4, (6, 5), generator=generator)
    targets[0] = -100
    targets[1, 2:] = -100
    found = disagreement(accuracy, one, other, targets)
    for row, value in enumerate(found.tolist()):
        counts = targets[row] != -100
        different = (one[row].argmax(0) != other[row].argmax(0))[counts].double()
        assert value == pytest.approx(float(different.mean()) if len(different) else 0.0)
    one[5, 0, 0] = float("nan")
    assert disagreement(accuracy, one, other, targets)[5].isnan()


# --- Pairs of a file -----------------------------------------------------------------------------


@pytest.fixture
def spawned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of four checkpoints and three pairs of them, two at one step."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name, state in zip("abcd", states(4), strict=True):
        torch.save({"state_dict": state, "losscli.model": "mlp:6-8-3"}, f"runs/{name}.pt")
    Path("runs/pairs.csv").write_text(
        "run,a,b,step\nx,a.pt,b.pt,0\ny,c.pt,d.pt,10.0\nz,b.pt,d.pt,1e1\n"
    )
    return tmp_path


def test_barriers_of_pairs_are_those_of_interpolate(spawned: Path, data: Any) -> None:
    given: dict[str, Any] = {"data": data, "dtype": "float64", "points": 5}
    result = losscli.barriers(pairs="runs/pairs.csv", x="step", disagreement=True, **given)
    rows = result.table.records()
    assert result.table.columns[:4] == ("a", "b", "step", "split")
    assert [(r["a"], r["b"], r["step"]) for r in rows] == [
        (f"runs/{a}.pt", f"runs/{b}.pt", step)
        for a, b, step in (("a", "b", 0), ("c", "d", 10), ("b", "d", 10))
    ]
    for row in rows:
        line = losscli.interpolate(str(row["a"]), str(row["b"]), range=(0.0, 1.0), **given)
        found = line.summary["splits"]["all"]["barrier"]
        assert row["barrier"] == pytest.approx(found["height"], rel=1e-11, abs=1e-14)
        assert row["barrier_stderr"] == pytest.approx(found["stderr"], rel=1e-9, abs=1e-14)
        alphas, right = (np.array(line.table.floats(name)) for name in ("alpha", "accuracy"))
        depth = (1 - alphas) * right[0] + alphas * right[-1] - right
        assert row["accuracy_barrier"] == pytest.approx(max(0.0, depth.max()), abs=1e-14)
    assert max(r["accuracy_barrier"] for r in rows) > 0
    at_0, at_10 = result.summary["splits"]["all"]["means"]
    assert (at_0["x"], at_0["pairs"], at_0["values"]["barrier"]["stderr"]) == (0.0, 1, None)
    for name in ("barrier", "accuracy_barrier", "disagreement"):
        values = np.array([r[name] for r in rows[1:]], dtype=float)
        assert at_10["values"][name]["mean"] == pytest.approx(values.mean(), rel=1e-13)
        error = values.std(ddof=1) / 2**0.5
        assert at_10["values"][name]["stderr"] == pytest.approx(error, rel=1e-12)


def margin(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return outputs.gather(1, targets[:, None])[:, 0]


def error(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -margin(outputs, targets)


def test_the_barrier_of_a_metric_is_a_fall_or_a_rise(spawned: Path, data: Any) -> None:
    margin.higher_is_better = None  # type: ignore[attr-defined]  # as torchmetrics: not known
    error.higher_is_better = np.bool_(False)  # type: ignore[attr-defined]
    given: dict[str, Any] = {"data": data, "dtype": "float64", "points": 5}
    metric = [margin, error, accuracy]
    result = losscli.barriers(pairs="runs/pairs.csv", x="step", metric=metric, **given)
    fall, rise = (result.table.floats(f"{name}_barrier") for name in ("margin", "error"))
    assert max(fall) > 0
    assert rise == pytest.approx(fall, rel=1e-13)
    said = [note for note in result.summary["notes"] if "count as better" in note]
    assert said == [
        (
            "higher values of margin count as better: its barrier is its largest fall below the "
            "straight line. If lower values are better, set margin.higher_is_better = False in "
            "your code"
        )
    ]


@pytest.mark.usefixtures("unlaid")
def test_files_text_and_figure_of_pairs(folder: Path, losscli: Losscli) -> None:
    Path("runs").mkdir()
    Path("runs/pairs.csv").write_text("a,b,step\n../a.pt,../b.pt,1\n../a.pt,init:3,2\n")
    pairs = ("--pairs", "runs/pairs.csv", "--x", "step")
    command = ("barriers", *pairs, "--points", 3, "--cka", "--split", "test")
    done = losscli(*command, "-o", "out", "--figure", "out.png", "--figure", "out.html")
    assert done.status == 0
    table = Table.read(folder / "out.csv")
    assert table["step"] == [1, 2]
    assert table.unique("b") == ["runs/../b.pt", "init:3"]
    for word in ("3 checkpoints, 2 pairs", "accuracy barrier", "cka", "step  pairs"):
        assert word in done.stdout
    assert losscli("plot", "out.csv", "-o", "again").status == 0
    assert (folder / "again.png").read_bytes() == (folder / "out.png").read_bytes()
    plan = json.loads(losscli(*command, "--dry-run", "--json").stdout)
    # Each of the three once; two lines with one inner point; and the ends of the two again.
    assert (plan["pairs"], plan["points"], plan["passes_over_data"]) == (2, 3 + 2 + 4, 3 + 2 + 2)


PAIRS = {
    "good.csv": "a,b,step\na.pt,b.pt,0\n",
    "empty.csv": "",
    "header.csv": "a,b,step\n",
    "columns.csv": "first,b,step\na.pt,b.pt,0\n",
    "missing.csv": "a,b,step\na.pt,none.pt,0\n",
    "text.csv": "a,b,epoch\na.pt,b.pt,early\n",
    "infinite.csv": "a,b,epoch\na.pt,b.pt,inf\n",
    "half.csv": "a,b,step\na.pt,b.pt,0.5\n",
    "same.csv": "a,b,step\na.pt,a.pt,0\n",
    "again.csv": "a,b,step\na.pt,b.pt,0\nb.pt,a.pt,1\n",
    "ragged.csv": "a,b,step\na.pt,b.pt\n",
    "blank.csv": "a,b,step\na.pt,,0\n",
    "clash.csv": "a,b,accuracy_barrier\na.pt,b.pt,0\n",
}
ERRORS = [
    (("--pairs", "none.csv", "--x", "step"), "none.csv cannot be read: No such file"),
    (("--pairs", ".", "--x", "step"), "cannot be read"),
    (("--pairs", "empty.csv", "--x", "step"), "needs one column 'a', and is empty"),
    (("--pairs", "header.csv", "--x", "step"), "header.csv has no pairs"),
    (("--pairs", "columns.csv", "--x", "step"), "needs one column 'a', and has first, b, step"),
    (("--pairs", "good.csv", "--x", "epoch"), "needs one column 'epoch', and has a, b, step"),
    (("--pairs", "good.csv", "--x", "split"), "--x split is the name of another column"),
    (("--pairs", "good.csv", "--x", "checkpoint"), "--x checkpoint is the name of another column"),
    (("--pairs", "clash.csv", "--x", "accuracy_barrier"), "is the name of another column"),
    (("--pairs", "missing.csv", "--x", "step"), "there is no checkpoint none.pt"),
    (("--pairs", "text.csv", "--x", "epoch"), "'early' under 'epoch' is not a finite number"),
    (("--pairs", "infinite.csv", "--x", "epoch"), "'inf' under 'epoch' is not a finite number"),
    (("--pairs", "half.csv", "--x", "step"), "'0.5' under 'step' is not a whole number"),
    (("--pairs", "same.csv", "--x", "step"), "record 2 is a pair of a.pt with itself"),
    (("--pairs", "again.csv", "--x", "step"), "record 3 is the pair of record 2 again"),
    (("--pairs", "ragged.csv", "--x", "step"), "record 2: 2 cells for 3 columns"),
    (("--pairs", "blank.csv", "--x", "step"), "record 2 lacks a checkpoint"),
    (("--pairs", "good.csv"), "--pairs needs the name of its column"),
    (("a.pt", "--pairs", "good.csv", "--x", "step"), "and 1 checkpoint is given too"),
    (("a.pt", "b.pt", "--x", "step"), "--x has no effect without --pairs"),
    ((), "needs two checkpoints or more, and got 0"),
    (("a.pt", "b.pt", "-d", "own.py:floats", "--disagreement"), "compares predicted classes"),
    (("a.pt", "b.pt", "--objective", "own.py:own", "--cka"), "the model gives only losses"),
    (
        ("a.pt", "b.pt", "-m", "own.py:Noisy", "--stochastic", 2, "--cka"),
        "those of --stochastic are random",
    ),
    (("a.pt", "b.pt", "-m", "own.py:Tuple", "--loss", "own.py:first", "--cka"), "gives a tuple"),
]


@pytest.mark.parametrize(("command", "words"), ERRORS)
def test_errors_are_one_line_and_write_nothing(
    command: tuple[object, ...], words: str, folder: Path, losscli: Losscli
) -> None:
    for name, text in PAIRS.items():
        Path(name).write_text(text)
    Path("own.py").write_text(
        "import torch\n"
        "from losscli.models import MLP\n"
        "def own(model, batch):\n    return model(batch[0]).square().sum(1)\n"
        "def first(outputs, targets):\n    return outputs[0].square().sum(1)\n"
        "class Tuple(MLP):\n"
        "    def __init__(self):\n        super().__init__('6-5-3')\n"
        "    def forward(self, x):\n        return (super().forward(x), 1)\n"
        "class Noisy(Tuple):\n"
        "    def forward(self, x):\n        return super().forward(x)[0] + torch.rand(1)\n"
        "def floats():\n    return {'test': (torch.randn(5, 6), torch.randn(5, 3))}\n"
    )
    before = sorted(folder.iterdir())
    done = losscli("barriers", *command, "-o", "out")
    assert done.status in {1, 2}
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout
    assert [p for p in sorted(folder.iterdir()) if p.name != "__pycache__"] == before


def test_pairs_other_than_a_path_are_refused() -> None:
    for wrong, what in ((3, "3"), (states(1)[0], "a dict"), ([("a", "b")], "a list")):
        with pytest.raises(UsageError, match=f"^pairs must be a path, not {what}$"):
            losscli.barriers(pairs=wrong, x="step")
