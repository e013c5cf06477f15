"""Which tensors move: ``--only`` and ``--except`` in every study, against float64 NumPy."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

import losscli
from losscli.models import MLP
from losscli.weight_space.directions import random_direction, random_directions
from tests import oracle
from tests.cases import CASES, Case, in_turn, sample
from tests.conftest import Losscli

CASE = Case(
    "mlp",
    lambda: MLP("4-3-3-2", activation="tanh"),
    torch.randn(19, 4, generator=torch.Generator().manual_seed(0)),
    torch.arange(19) % 2,
)
NAMES = list(CASE.state(1))
CHOICES: dict[str, dict[str, tuple[str, ...]]] = {
    "only": {"only": ("layers.1.*",)},
    "except": {"except_": ("layers.0.*", "layers.2.*")},
}
CHOSEN = [name for name in NAMES if name.startswith("layers.1.")]

_Vector = NDArray[np.float64]


def study(name: str, folder: Path, seeds: tuple[int, ...], **more: Any) -> losscli.Result:
    files = []
    for seed in seeds:
        files.append(str(folder / f"{seed}.pt"))
        torch.save(CASE.state(seed), files[-1])
    data = {"all": (CASE.inputs, CASE.targets)}
    given = {"model": CASE.build, "data": data, "metric": ("none",), "dtype": "float64", **more}
    found: losscli.Result = getattr(losscli, name)(files, **given)
    return found


def vector(state: dict[str, Tensor]) -> _Vector:
    return np.concatenate([state[n].double().numpy().ravel() for n in CHOSEN])


def loss_at(there: _Vector, base: dict[str, Tensor]) -> float:
    """The loss where the chosen tensors are given, and the others are the first checkpoint's."""
    state, at = dict(base), 0
    for name in CHOSEN:
        size = base[name].numel()
        state[name] = torch.from_numpy(there[at : at + size].copy()).view(base[name].shape)
        at += size
    found = oracle.losses(CASE.build, state, CASE.inputs, CASE.targets, CASE.per_example)
    return oracle.mean(found)


def counted(result: losscli.Result) -> bool:
    size = sum(CASE.state(1)[name].numel() for name in CHOSEN)
    return bool(result.summary["moving"] == {"tensors": len(CHOSEN), "values": size})


STAYS = (
    "some tensors stay at the first checkpoint's: the losses of the others are not those of their "
    "files"
)


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_a_path_is_measured_and_evaluated_in_the_chosen_tensors(
    choice: dict[str, Any], tmp_path: Path
) -> None:
    result = study("trajectory", tmp_path, (1, 2, 3), residuals=3, **choice)
    base = CASE.state(1)
    x = np.stack([vector(CASE.state(seed)) for seed in (1, 2, 3)])
    d = x[2] - x[0]
    p = (x - x[0]) @ d / (d @ d)
    off = x - x[0] - np.outer(p, d)
    residual = np.linalg.norm(off, axis=1)
    table = result.table
    np.testing.assert_allclose(table.floats("projection"), p, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(table.floats("residual"), residual, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(
        table.floats("distance"), np.linalg.norm(x - x[0], axis=1), rtol=1e-9
    )
    for there, loss in zip(x, table.floats("loss"), strict=True):
        assert loss == pytest.approx(loss_at(there, base), rel=1e-10)
    v = off[1] / residual[1]
    surface = result.more["surface"]
    columns = (surface.floats(name) for name in ("step", "residual", "loss"))
    for step, b, loss in zip(*columns, strict=True):
        there = x[0] + p[int(step)] * d + b * v
        assert loss == pytest.approx(loss_at(there, base), rel=1e-8)
    assert counted(result)
    assert result.summary["notes"][:2] == [
        STAYS,
        "projections, residuals and distances are those of the moving parameters",
    ]


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_a_plane_through_three_lies_in_the_chosen_tensors(
    choice: dict[str, Any], tmp_path: Path
) -> None:
    result = study("plane", tmp_path, (1, 2, 3), points=3, **choice)
    base = CASE.state(1)
    a, b, c = (vector(CASE.state(seed)) for seed in (1, 2, 3))
    first = (b - a) / np.linalg.norm(b - a)
    second = (c - a) - ((c - a) @ first) * first
    second /= np.linalg.norm(second)
    columns = (result.table.floats(name) for name in ("x", "y", "loss"))
    for x, y, loss in zip(*columns, strict=True):
        assert loss == pytest.approx(loss_at(a + x * first + y * second, base), rel=1e-9)
    path = result.more["path"]
    for there, loss in zip((a, b, c), path.floats("loss"), strict=True):
        assert loss == pytest.approx(loss_at(there, base), rel=1e-10)
    assert counted(result)
    assert result.summary["notes"] == [
        STAYS,
        "axes and distances are those of the moving parameters",
    ]


def test_principal_components_are_those_of_the_chosen_tensors(tmp_path: Path) -> None:
    seeds = (1, 2, 3, 4, 5)
    result = study("plane", tmp_path, seeds, pca=True, points=2, only=("layers.1.*",))
    x = np.stack([vector(CASE.state(seed)) for seed in seeds])
    centred = x - x.mean(0)
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    shares = sizes**2 / (sizes**2).sum()
    explained = [axis["explained_variance"] for axis in result.summary["axes"]]
    np.testing.assert_allclose(explained, shares[:2], rtol=1e-5)
    apart = x - x[-1]
    within = apart @ axes[:2].T
    off = np.linalg.norm(apart - within @ axes[:2], axis=1)
    path = result.more["path"]
    np.testing.assert_allclose(np.abs(path.floats("x")), np.abs(within[:, 0]), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(path.floats("off_plane"), off, rtol=1e-4, atol=1e-6)
    for there, loss in zip(x, path.floats("loss"), strict=True):
        assert loss == pytest.approx(loss_at(there, CASE.state(1)), rel=1e-10)


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_random_directions_are_zero_in_all_others(choice: dict[str, Any], tmp_path: Path) -> None:
    result = study("plane", tmp_path, (1,), points=3, **choice)
    base = CASE.state(1)
    u, v = (vector(dict(d)) for d in random_directions(base, CHOSEN, set(), 0))
    columns = (result.table.floats(name) for name in ("x", "y", "loss"))
    for x, y, loss in zip(*columns, strict=True):
        assert loss == pytest.approx(loss_at(vector(base) + x * u + y * v, base), rel=1e-8)
    # Of the chosen tensors the bias has no filters.
    assert result.summary["moving"]["tensors"] == 1
    assert result.summary["notes"] == ["random directions are zero in all but the chosen tensors"]


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_directions_around_checkpoints_are_zero_in_all_others(
    choice: dict[str, Any], tmp_path: Path
) -> None:
    result = study("around", tmp_path, (1, 2), directions=1, points=3, **choice)
    names = [name for name in CHOSEN if name.endswith("weight")]
    rows = result.table.records()
    for seed, of in zip((1, 2), (rows[:3], rows[3:]), strict=True):
        state = CASE.state(seed)
        step = random_direction(state, names, 0, 1)
        step |= {name: torch.zeros_like(state[name]) for name in CHOSEN if name not in names}
        for row in of:
            there = vector(state) + row["coefficient"] * vector(step)
            assert row["loss"] == pytest.approx(loss_at(there, state), rel=1e-11)
    assert STAYS not in result.summary["notes"]


@pytest.mark.parametrize(
    "choice",
    [
        pytest.param(CHOICES["only"], id="only"),
        pytest.param(CHOICES["except"], id="except", marks=pytest.mark.stress),
    ],
)
def test_a_check_differentiates_by_the_chosen_tensors_alone(
    choice: dict[str, Any], tmp_path: Path
) -> None:
    result = study("check", tmp_path, (1, 2), **choice)
    model = CASE.build().double()

    def loss_of(base: dict[str, Tensor], flat: Tensor) -> Tensor:
        parts = zip(CHOSEN, flat.split([base[n].numel() for n in CHOSEN]), strict=True)
        moved = {n: part.view(base[n].shape) for n, part in parts}
        outputs = torch.func.functional_call(model, {**base, **moved}, CASE.inputs.double())
        return F.cross_entropy(outputs, CASE.targets)

    for seed, row in zip((1, 2), result.table.records(), strict=True):
        base = {name: tensor.double() for name, tensor in CASE.state(seed).items()}
        loss = partial(loss_of, base)
        there = torch.from_numpy(vector(CASE.state(seed)))
        gradient = torch.func.grad(loss)(there)
        values = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, there))
        assert row["loss"] == pytest.approx(float(loss(there)), rel=1e-10)
        assert row["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-8)
        assert row["lambda_min"] == pytest.approx(float(values[0]), rel=1e-7)
        assert row["lambda_max"] == pytest.approx(float(values[-1]), rel=1e-7)
    spectrum = result.more["spectrum"].floats("eigenvalue")
    assert len(spectrum) == 2 * sum(base[name].numel() for name in CHOSEN)
    assert counted(result)
    assert result.summary["notes"] == [
        "gradient, Hessian and verdict are those of 2 tensors only",
    ]


@pytest.mark.parametrize(
    ("choice", "moves"),
    [
        ({"only": ("embedding.weight",)}, True),
        ({"except_": ("head.weight",)}, False),
        pytest.param({"only": ("head.weight",)}, True, marks=pytest.mark.stress),
        pytest.param({"except_": ("embedding.weight",)}, False, marks=pytest.mark.stress),
    ],
)
def test_a_tied_tensor_is_selected_by_either_of_its_names(
    choice: dict[str, Any], moves: bool, tmp_path: Path
) -> None:
    case = next(c for c in CASES if c.name == "attention-tied")
    states = [case.state(seed) for seed in (1, 2)]
    for t, state in enumerate(states):
        torch.save(state, tmp_path / f"{t}.pt")
    result = losscli.interpolate(
        *(str(tmp_path / f"{t}.pt") for t in range(2)),
        model=case.build,
        data={"all": (case.inputs, case.targets)},
        dtype="float64",
        points=3,
        range=(0.0, 1.0),
        **choice,
    )
    tied = ["embedding.weight", "head.weight"]
    moving = tied if moves else [n for n in states[0] if n not in tied]
    for alpha, loss in zip((0.0, 0.5, 1.0), result.table.floats("loss"), strict=True):
        state = oracle.blend(*states, alpha, moving)
        expected = oracle.losses(case.build, state, case.inputs, case.targets, case.per_example)
        assert loss == pytest.approx(oracle.mean(expected), rel=1e-10)


COMMANDS = [
    "interpolate a.pt b.pt",
    "trajectory a.pt b.pt c.pt",
    "plane a.pt",
    "plane a.pt b.pt c.pt",
    "plane --pca a.pt b.pt c.pt",
    "sharpness a.pt",
    "check a.pt",
]


def save_third(folder: Path) -> None:
    torch.manual_seed(2)
    state = {"state_dict": MLP("6-5-3").state_dict(), "losscli.model": "mlp:6-5-3"}
    torch.save(state, folder / "c.pt")


@pytest.mark.parametrize(
    ("command", "options", "reported"),
    in_turn(
        COMMANDS,
        ("--only nothing.*", "the pattern 'nothing.*' matches none of the 4 tensors"),
        ("--except nothing.*", "the pattern 'nothing.*' matches none of the 4 tensors"),
        ("--only layers.0.* --except layers.*", "leave no tensor to move"),
    ),
)
def test_a_choice_of_nothing_is_refused(
    command: str, options: str, reported: str, folder: Path, losscli: Losscli
) -> None:
    save_third(folder)
    before = set(folder.iterdir())
    done = losscli(*command.split(), *options.split(), "-o", "x")
    assert (done.status, done.stdout) == (2, "")
    assert reported in done.stderr
    assert done.stderr.count("\n") == 1
    assert set(folder.iterdir()) == before


@pytest.mark.parametrize("command", sample(COMMANDS, 0, 2))
def test_a_choice_is_in_the_plan_and_in_the_summary(
    command: str, folder: Path, losscli: Losscli
) -> None:
    save_third(folder)
    options = "--only", "layers.1.*", "--except", "*.bias"
    plan = losscli(*command.split(), *options, "--dry-run", "--json")
    reported = json.loads(plan.stdout)
    assert reported["moving"] == {"tensors": 1, "values": 15}
    assert (reported["only"], reported["except"]) == (["layers.1.*"], ["*.bias"])


def test_a_check_of_only_buffers_is_refused(folder: Path, losscli: Losscli) -> None:
    from losscli.models import CNN

    torch.save(CNN("4", channels=1, classes=3, batchnorm=True).state_dict(), folder / "n.pt")
    images = {"all_inputs": np.zeros((4, 1, 4, 4), np.float32), "all_targets": np.arange(4) % 3}
    np.savez(folder / "e.npz", **images)  # type: ignore[arg-type]
    model = "cnn:4,channels=1,classes=3,batchnorm=true"
    done = losscli("check", "n.pt", "-m", model, "-d", "npz:e.npz", "--only", "*running*")
    assert done.status == 2
    assert "no parameter is left to differentiate" in done.stderr


@pytest.mark.parametrize(
    ("choice", "same", "noted"),
    [
        ({"only": ["body.*"]}, False, False),
        ({"only": ["body.*"], "except_": ["*.bias"]}, False, True),
        ({"only": ["body.weight"]}, True, False),
        ({"only": ["body.weight"]}, False, True),
    ],
)
def test_tensors_that_stay_are_noted_only_if_they_differ(
    choice: dict[str, Any], same: bool, noted: bool, tmp_path: Path
) -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3, bias=False)
            self.head.weight = self.body.weight

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.head(self.body(x).tanh())
            return scores

    for seed in range(3):
        torch.manual_seed(seed)
        weights = Tied().state_dict()
        if same:
            weights["body.bias"] = torch.ones(3)
        torch.save(weights, tmp_path / f"{seed}.pt")
    files = [str(tmp_path / f"{seed}.pt") for seed in range(3)]
    given: dict[str, Any] = {
        "model": Tied, "data": {"all": (torch.rand(5, 3), torch.arange(5) % 3)}, **choice
    }  # fmt: skip
    line = losscli.interpolate(*files[:2], points=2, **given)
    path = losscli.trajectory(files, surface=False, **given)
    said = [any("some tensors stay" in n for n in r.summary["notes"]) for r in (line, path)]
    assert said == [noted, noted]


FROZEN_NOTE = "frozen parameters (requires_grad=False) count as all others: layers.0.weight"


@pytest.mark.parametrize(
    ("name", "seeds", "frozen", "more", "noted"),
    [
        ("check", (1,), ("layers.0.",), {}, True),
        ("sharpness", (1, 2), ("layers.0.",), {"samples": 2}, True),
        ("around", (1, 2), ("layers.0.",), {"directions": 2, "points": 3}, True),
        ("plane", (1,), ("layers.0.",), {"points": 3}, True),
        ("check", (1,), ("layers.",), {}, False),
        ("check", (1,), ("layers.0.",), {"except_": ("layers.0.*",)}, False),
        ("plane", (1, 2, 3), ("layers.0.",), {"points": 3}, False),
    ],
)
def test_frozen_parameters_are_noted_where_directions_are_not_differences_of_checkpoints(
    name: str,
    seeds: tuple[int, ...],
    frozen: tuple[str, ...],
    more: dict[str, Any],
    noted: bool,
    tmp_path: Path,
) -> None:
    model = CASE.build()
    for parameter, tensor in model.named_parameters():
        tensor.requires_grad_(not parameter.startswith(frozen))
    found = study(name, tmp_path, seeds, model=model, **more).summary["notes"]
    assert any(note.startswith(FROZEN_NOTE) for note in found) is noted


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("check", {"density": True, "blocks": True, "probes": 2, "lanczos": 5}),
        ("sharpness", {"samples": 2}),
        ("around", {"along": "hessian", "points": 3}),
        ("plane", {"axes": "hessian", "points": 3}),
    ],
)
def test_a_parameter_without_values_changes_nothing(
    name: str, more: dict[str, Any], tmp_path: Path
) -> None:
    def build() -> torch.nn.Module:
        model = CASE.build()
        model.register_parameter("empty", torch.nn.Parameter(torch.zeros(0, 3)))
        return model

    data = {"all": (CASE.inputs, CASE.targets)}
    given = {"data": data, "metric": ("none",), "dtype": "float64", **more}
    found, expected = (
        getattr(losscli, name)({**CASE.state(1), **added}, model=model, **given)
        for model, added in ((build, {"empty": torch.zeros(0, 3)}), (CASE.build, {}))
    )
    tables = [{"": result.table, **result.more} for result in (found, expected)]
    assert tables[0].keys() == tables[1].keys()
    for key, table in tables[0].items():
        other = tables[1][key]
        assert (table.columns, len(table.rows)) == (other.columns, len(other.rows))
        for column in table.columns:
            one, two = table[column], other[column]
            if isinstance(one[0], float):
                two = pytest.approx(two, rel=1e-6, abs=1e-9, nan_ok=True)
            assert one == two, (key, column)
