"""Planes, from files to tables, against float64 NumPy and the oracle."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import losscli
from losscli.errors import CheckpointError, ModelError, UsageError
from losscli.table import Table
from tests import oracle
from tests.cases import CASES, Case, sample
from tests.studies.sample import SAMPLE


def save(case: Case, folder: Path, *seeds: int) -> list[str]:
    names = []
    for seed in seeds:
        names.append(str(folder / f"{seed}.pt"))
        torch.save(case.state(seed), names[-1])
    return names


def options(case: Case, **more: object) -> dict[str, object]:
    return {
        "model": case.build,
        "data": {"all": (copy.deepcopy(case.inputs), case.targets)},
        "loss": case.loss,
        "metric": ("none",),
        **more,
    }


def vector(state: dict[str, torch.Tensor], names: list[str]) -> np.ndarray:
    return np.concatenate([state[n].double().numpy().ravel() for n in names])


def moving_names(case: Case) -> list[str]:
    a, b = case.state(1), case.state(2)
    names = [n for n, t in a.items() if not torch.equal(t, b[n])]
    if case.name == "attention-tied":
        names.remove("embedding.weight")
    return names


def parameters(case: Case, names: list[str]) -> list[str]:
    buffers = {n for n, _ in case.build().named_buffers()}
    return [n for n in names if n not in buffers]


def loss_at(
    case: Case, base: dict[str, torch.Tensor], names: list[str], there: np.ndarray
) -> float:
    state, at = dict(base), 0
    for n in names:
        size = base[n].numel()
        values = torch.from_numpy(there[at : at + size].copy()).reshape(base[n].shape)
        state[n], at = values, at + size
    if case.name == "attention-tied":
        state["embedding.weight"] = state["head.weight"]
    found = oracle.losses(
        case.build,
        state,
        copy.deepcopy(case.inputs),
        case.targets,
        case.per_example,
        batch_size=len(case.targets),
    )
    return oracle.mean(found)


def grid_of(table: Table) -> list[tuple[float, float, float]]:
    return list(zip(table.floats("x"), table.floats("y"), table.floats("loss"), strict=True))


@pytest.mark.parametrize("case", sample(SAMPLE, 0))
def test_the_plane_through_three_has_the_losses_of_a_plain_float64_loop(
    case: Case, tmp_path: Path
) -> None:
    files = save(case, tmp_path, 1, 2, 3)
    result = losscli.plane(files, points=3, **options(case, dtype="float64"))
    names = moving_names(case)
    a, b, c = (vector(case.state(seed), parameters(case, names)) for seed in (1, 2, 3))
    first = (b - a) / np.linalg.norm(b - a)
    second = (c - a) - ((c - a) @ first) * first
    height = np.linalg.norm(second)
    second /= height
    # Buffers follow the same combination of the corners as the parameters.
    corners = [vector(case.state(seed), names) for seed in (1, 2, 3)]
    for x, y, loss in grid_of(result.table):
        gamma = y / height
        beta = (x - gamma * ((c - a) @ first)) / np.linalg.norm(b - a)
        there = np.array([1 - beta - gamma, beta, gamma]) @ np.stack(corners)
        expected = loss_at(case, case.state(1), names, there)
        np.testing.assert_allclose(loss, expected, rtol=1e-9, atol=1e-11)
    path = result.more["path"]
    assert path["off_plane"] == [0, 0, 0]
    np.testing.assert_allclose(path.floats("x"), [0, (b - a) @ first, (c - a) @ first], rtol=1e-9)
    np.testing.assert_allclose(path.floats("y"), [0, 0, (c - a) @ second], rtol=1e-9)
    for seed, loss in zip((1, 2, 3), path.floats("loss"), strict=True):
        state = case.state(1) | {n: case.state(seed)[n] for n in names}
        if case.name == "attention-tied":
            state["embedding.weight"] = state["head.weight"]
        expected = loss_at(case, state, [], np.empty(0))
        np.testing.assert_allclose(loss, expected, rtol=1e-11)
    assert result.summary["endpoint_difference"] <= 1e-12


@pytest.mark.parametrize(
    "name", sample(["mlp-relu", "cnn-batchnorm", "attention-tied", "lstm"], 1, 2)
)
def test_random_directions_are_filter_normalised_and_orthogonal_and_give_the_losses(
    name: str, tmp_path: Path
) -> None:
    case = next(c for c in CASES if c.name == name)
    (file,) = save(case, tmp_path, 1)
    result = losscli.plane([file], points=3, range=(-1, 1), **options(case, dtype="float64"))
    assert result.summary["plane"] == "random"
    assert result.table.unique("x") == result.table.unique("y") == [-1, 0, 1]
    state = case.state(1)
    at_zero = next(loss for x, y, loss in grid_of(result.table) if x == y == 0)
    assert at_zero == pytest.approx(loss_at(case, state, [], np.empty(0)), rel=1e-11)
    # The losses are those of the directions that the library names for this seed.
    from losscli.weight_space.directions import random_directions

    names = [n for n, t in state.items() if t.ndim > 1 and t.is_floating_point()]
    names = [n for n in names if n in moving_names(case) and "running" not in n]
    u, v = random_directions(state, names, (), 0)
    origin, first, second = (vector(x, names) for x in (state, u, v))
    assert abs(first @ second) < 1e-5 * np.linalg.norm(first) * np.linalg.norm(second)
    for x, y, loss in grid_of(result.table):
        expected = loss_at(case, state, names, origin + x * first + y * second)
        np.testing.assert_allclose(loss, expected, rtol=1e-9, atol=1e-11)


def test_normalisation_parameters_and_buffers_do_not_move_at_random(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "cnn-batchnorm")
    (file,) = save(case, tmp_path, 1)
    result = losscli.plane([file], points=2, **options(case))
    state = case.state(1)
    moved = {n for n, t in state.items() if t.ndim > 1}
    assert result.summary["moving"]["tensors"] == len(moved)
    assert result.summary["moving"]["values"] == sum(state[n].numel() for n in moved)


def path_states(case: Case) -> list[dict[str, torch.Tensor]]:
    a, b, c = (case.state(seed) for seed in (1, 2, 3))
    return [
        {
            n: (t + share * (b[n] - t) + math.sin(3 * share) * (c[n] - t)).to(t.dtype)
            if t.is_floating_point()
            else t
            for n, t in a.items()
        }
        for share in np.linspace(0, 1, 6)
    ]


@pytest.mark.parametrize("name", ["mlp-relu", "mlp-maxout", "cnn-batchnorm"])
def test_the_plane_of_a_path_is_that_of_its_principal_components(name: str, tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == name)
    states, files = path_states(case), []
    for t, state in enumerate(states):
        files.append(str(tmp_path / f"{t}.pt"))
        torch.save(state, files[-1])
    result = losscli.plane(files, pca=True, points=3, **options(case, dtype="float64"))
    names = moving_names(case)
    points = np.stack([vector(state, parameters(case, names)) for state in states])
    rows = points - points[-1]
    left, singular, axes = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    explained = singular**2 / (singular**2).sum()
    found = [axis["explained_variance"] for axis in result.summary["axes"]]
    np.testing.assert_allclose(found, explained[:2], rtol=1e-6)
    path = result.more["path"]
    for axis, column in zip(axes, ("x", "y"), strict=False):
        sign = np.sign(axis @ rows[0]) * np.sign(path.floats(column)[0])
        np.testing.assert_allclose(path.floats(column), sign * (rows @ axis), rtol=1e-9, atol=1e-12)
    rest = rows - (rows @ axes[:2].T) @ axes[:2]
    np.testing.assert_allclose(
        path.floats("off_plane"), np.linalg.norm(rest, axis=1), rtol=1e-6, atol=1e-9
    )
    assert path.floats("x")[-1] == path.floats("y")[-1] == path.floats("off_plane")[-1] == 0
    for t, loss in enumerate(path.floats("loss")):
        expected = loss_at(case, states[t], [], np.empty(0))
        np.testing.assert_allclose(loss, expected, rtol=1e-11)
    # Buffers follow the combination of the checkpoints that the parameters are.
    everything = np.stack([vector(state, names) for state in states])
    mixes = (left / singular).T[:2]
    signs = [np.sign(axes[k] @ rows[0]) * np.sign(path.floats("xy"[k])[0]) for k in range(2)]
    for x, y, loss in grid_of(result.table):
        at = np.array([signs[0] * x, signs[1] * y])
        there = everything[-1] + at @ mixes @ (everything - everything[-1])
        expected = loss_at(case, states[0], names, there)
        np.testing.assert_allclose(loss, expected, rtol=1e-9)
    # The box of the path lies in the grid.
    for column in ("x", "y"):
        values = result.table.floats(column)
        assert min(values) < min(path.floats(column))
        assert max(path.floats(column)) < max(values)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (
            [[2, 0, 0], [0, 2, 0], [0, 0, 2]],
            ["1 and 2 explain 50.00% each: the axes may be turned"],
        ),
        ([[3, 1, 0], [0, 0, 2], [0, 0, 0]], []),
        (
            [
                [5, 0, 0],
                [-5, 0, 0],
                [0, 2, 0],
                [0, -2, 0],
                [0, 0, 2.0004],
                [0, 0, -2.0004],
                [0, 0, 0],
            ],
            ["2 and 3 explain 12.13% each: the plane is arbitrary"],
        ),
        ([[5, 0, 0], [-5, 0, 0], [0, 2, 0], [0, -2, 0], [0, 0, 2.1], [0, 0, -2.1], [0, 0, 0]], []),
    ],
)
def test_components_with_equal_variance_are_noted(
    rows: list[list[float]], told: list[str], tmp_path: Path
) -> None:
    files = []
    for t, row in enumerate(rows):
        files.append(str(tmp_path / f"{t}.pt"))
        torch.save({"weight": torch.tensor([row], dtype=torch.float32)}, files[-1])
    data = {"all": (torch.eye(3), torch.ones(3, 1))}
    result = losscli.plane(
        files, pca=True, points=2, model=lambda: torch.nn.Linear(3, 1, bias=False), data=data,
        loss="mse",
    )  # fmt: skip
    found = [n.removeprefix("principal components ") for n in result.summary["notes"]]
    assert [n.startswith(t) for n, t in zip(found, told, strict=True)] == [True] * len(told)


def test_another_order_of_the_three_gives_the_same_plane(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "mlp-relu")
    a, b, c = save(case, tmp_path, 1, 2, 3)
    there = losscli.plane([a, b, c], points=2, range=(0, 1), **options(case))
    back = losscli.plane([b, a, c], points=2, range=(0, 1), **options(case))
    one, other = there.more["path"], back.more["path"]
    assert one.floats("x")[1] == other.floats("x")[1]
    assert one.floats("y")[2] == pytest.approx(other.floats("y")[2], rel=1e-12)
    assert one.floats("x")[2] + other.floats("x")[2] == pytest.approx(one.floats("x")[1])


def test_the_same_numbers_for_any_batch_size(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "cnn-batchnorm")
    (file,) = save(case, tmp_path, 1)
    tables = [
        losscli.plane([file], points=2, **options(case, batch_size=size)).table
        for size in (1, 7, 99)
    ]
    for table in tables[1:]:
        np.testing.assert_allclose(table.floats("loss"), tables[0].floats("loss"), rtol=1e-6)


def test_seeds_differ_and_leaving_a_tensor_out_changes_no_other(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "mlp-relu")
    (file,) = save(case, tmp_path, 1)
    one, again, other = (
        losscli.plane([file], points=2, **options(case, seed=seed)).table["loss"]
        for seed in (0, 0, 1)
    )
    assert one == again
    assert one != other
    only = losscli.plane([file], points=2, **options(case, only=("layers.0.weight",)))
    assert only.summary["moving"]["tensors"] == 1


@pytest.mark.parametrize("number", [0, 2, 4])
def test_other_numbers_of_checkpoints_are_refused(number: int, tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "mlp-relu")
    files = save(case, tmp_path, *range(1, number + 1))
    with pytest.raises(UsageError, match=f"one checkpoint or three, and got {number}.*--pca"):
        losscli.plane(files, **options(case))


def test_two_checkpoints_do_not_make_a_path(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "mlp-relu")
    files = save(case, tmp_path, 1, 2)
    with pytest.raises(UsageError, match="--pca three checkpoints or more, and got 2"):
        losscli.plane(files, pca=True, **options(case))


def test_two_equal_checkpoints_and_three_on_a_line_span_no_plane(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "mlp-relu")
    a, b = save(case, tmp_path, 1, 2)
    with pytest.raises(UsageError, match="A and C have the same parameters"):
        losscli.plane([a, b, a], **options(case))
    one, two = case.state(1), case.state(2)
    torch.save({n: torch.lerp(one[n], two[n], 0.25) for n in one}, tmp_path / "between.pt")
    with pytest.raises(UsageError, match="on one line"):
        losscli.plane([a, b, str(tmp_path / "between.pt")], **options(case))
    with pytest.raises(UsageError, match="line"):
        losscli.plane([a, str(tmp_path / "between.pt"), b], pca=True, **options(case))


def test_a_single_value_per_coordinate_does_not_make_a_plane(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "mlp-relu")
    (file,) = save(case, tmp_path, 1)
    with pytest.raises(UsageError, match="--points must be at least 2, not 1"):
        losscli.plane([file], points=1, **options(case))


class Remembering(torch.nn.Module):
    """Answers with the first weight that it was run with, for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)
        self.first: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.first:
            self.first.append(self.layer.weight.detach().clone())
        return x @ self.first[0].T + self.layer.bias


def test_a_model_that_caches_the_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(Remembering().state_dict(), tmp_path / "a.pt")
    data = {"all": (torch.rand(9, 4), torch.arange(9) % 3)}
    with pytest.raises(ModelError, match=r"keeps state|does not reproduce"):
        losscli.plane([str(tmp_path / "a.pt")], model=Remembering, data=data, points=3)


def test_checkpoints_too_far_apart_for_float32_are_refused(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "mlp-relu")
    files = []
    for seed in (1, 2, 3):
        files.append(str(tmp_path / f"{seed}.pt"))
        torch.save({n: 1e30 * t for n, t in case.state(seed).items()}, files[-1])
    with pytest.raises(CheckpointError, match="too far apart"):
        losscli.plane(files, **options(case))


@pytest.mark.parametrize(
    ("command", "more", "told"),
    sample(
        [
            (losscli.plane, {"range": (-9.0, 9.0)}, True),
            (losscli.plane, {"range": (-9.0, 9.0), "pca": True}, True),
            (losscli.plane, {"range": (-9.0, 9.0), "buffers": "b"}, False),
            (losscli.plane, {"range": (-9.0, 9.0), "pca": True, "buffers": "recalibrate"}, False),
            (losscli.trajectory, {"reach": 9.0, "residuals": 3}, True),
            (losscli.trajectory, {"reach": 0.01, "residuals": 3}, False),
        ],
        0,
        2,
    ),
)
def test_a_variance_below_zero_is_named_with_its_cures(
    command: Callable[..., Any], more: dict[str, Any], told: bool, tmp_path: Path
) -> None:
    case = next(c for c in CASES if c.name == "cnn-batchnorm")
    given = options(case, points=3) if command is losscli.plane else options(case)
    result = command(save(case, tmp_path, 1, 2, 3), **{**given, **more})
    notes = [note for note in result.summary["notes"] if "running_var becomes negative" in note]
    assert bool(notes) == told
    assert any("not finite" in note for note in result.summary["notes"]) == told
    for note in notes:
        assert "--buffers b keeps the last checkpoint's statistics" in note
        assert "--buffers recalibrate re-estimates BatchNorm's" in note
