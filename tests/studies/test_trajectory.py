"""The path of training and its ribbon, from files to tables, against float64 NumPy."""

from __future__ import annotations

import copy
import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import losscli
from losscli.checkpoint import Checkpoint, CheckpointFile, list_checkpoints, read
from losscli.errors import CheckpointError, MismatchError, UsageError
from losscli.models import MLP
from losscli.settings import Settings
from losscli.studies.trajectory import Trajectory
from tests import oracle
from tests.cases import CASES, Case, sample
from tests.studies.sample import SAMPLE

STEPS = 5


def state_at(case: Case, t: int) -> dict[str, torch.Tensor]:
    """A path that bends: between two initialisations, and pushed aside by a third."""
    a, b, c = (case.state(seed) for seed in (1, 2, 3))
    share = t / (STEPS - 1)
    return {
        n: (
            (a[n].double() + share * (b[n].double() - a[n].double()))
            + 0.5 * math.sin(math.pi * share) * (c[n].double() - a[n].double())
        ).to(a[n].dtype)
        if a[n].is_floating_point() and not torch.equal(a[n], b[n])
        else a[n]
        for n in a
    }


def save_path(case: Case, folder: Path) -> tuple[list[str], list[dict[str, torch.Tensor]]]:
    names, states = [], []
    for t in range(STEPS):
        states.append(state_at(case, t))
        path = folder / f"step-{t}.pt"
        torch.save(states[-1], path)
        names.append(str(path))
    return names, states


def options(case: Case) -> dict[str, object]:
    return {
        "model": case.build,
        "data": {"all": (copy.deepcopy(case.inputs), case.targets)},
        "loss": case.loss,
        "metric": ("none",),
    }


def vector(state: dict[str, torch.Tensor], names: list[str]) -> np.ndarray:
    return np.concatenate([state[n].double().numpy().ravel() for n in names])


def moving_names(case: Case, states: list[dict[str, torch.Tensor]]) -> list[str]:
    names = [n for n, t in states[0].items() if not torch.equal(t, states[-1][n])]
    if case.name == "attention-tied":
        names.remove("embedding.weight")
    return names


def parameters(case: Case, names: list[str]) -> list[str]:
    buffers = {n for n, _ in case.build().named_buffers()}
    return [n for n in names if n not in buffers]


@pytest.mark.parametrize("case", sample(SAMPLE, 1, 3))
def test_the_path_and_the_ribbon_are_those_of_float64_numpy_and_a_plain_loop(
    case: Case, tmp_path: Path
) -> None:
    files, states = save_path(case, tmp_path)
    result = losscli.trajectory(files, **options(case), dtype="float64", residuals=3)
    moving = moving_names(case, states)
    # Lengths and angles are over the parameters; buffers follow the same combinations.
    points = np.stack([vector(s, parameters(case, moving)) for s in states])
    everything = np.stack([vector(s, moving) for s in states])
    x, d = points - points[0], points[-1] - points[0]
    p = x @ d / (d @ d)
    rest = x - p[:, None] * d
    r = np.linalg.norm(rest, axis=1)
    table = result.table
    np.testing.assert_allclose(table.floats("projection"), p, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(table.floats("residual")[1:-1], r[1:-1], rtol=1e-9)
    assert table.floats("residual")[0] == table.floats("residual")[-1] == 0
    assert table.floats("projection")[0] == 0
    assert table.floats("projection")[-1] == 1
    np.testing.assert_allclose(table.floats("distance"), np.linalg.norm(x, axis=1), rtol=1e-10)
    turns = [
        math.degrees(math.acos(min(1, rest[t] @ rest[t - 1] / r[t] / r[t - 1])))
        for t in range(2, STEPS - 1)
    ]
    assert table["turn_degrees"][:2] == [None, None]
    assert table["turn_degrees"][-1] is None
    np.testing.assert_allclose(table.floats("turn_degrees")[2:-1], turns, atol=1e-4)
    for t, (loss, error) in enumerate(
        zip(table.floats("loss"), table.floats("loss_stderr"), strict=True)
    ):
        expected = oracle.losses(
            case.build, states[t], copy.deepcopy(case.inputs), case.targets, case.per_example
        )
        np.testing.assert_allclose(loss, oracle.mean(expected), rtol=1e-11)
        np.testing.assert_allclose(error, oracle.standard_error(expected), rtol=1e-9)

    surface = result.more["surface"]
    offsets = [0, 0.625 * r.max(), 1.25 * r.max()]
    np.testing.assert_allclose(surface.floats("residual"), offsets * STEPS, rtol=1e-9)
    for t in range(STEPS):
        near = min(range(1, STEPS - 1), key=lambda s, t=t: (abs(s - t), s))
        line = everything[-1] - everything[0]
        v = (everything[near] - everything[0] - p[near] * line) / r[near]
        rows = surface.where("step", t)
        assert rows["projection"] == [table.floats("projection")[t]] * 3
        for b, loss in zip(offsets, rows.floats("loss"), strict=True):
            there = everything[0] + p[t] * line + b * v
            state, at = dict(states[0]), 0
            for n in moving:
                size = states[0][n].numel()
                values = torch.from_numpy(there[at : at + size]).reshape(states[0][n].shape)
                state[n], at = values, at + size
            if case.name == "attention-tied":
                state["embedding.weight"] = state["head.weight"]
            expected = oracle.losses(
                case.build,
                state,
                copy.deepcopy(case.inputs),
                case.targets,
                case.per_example,
                batch_size=len(case.targets),
            )
            np.testing.assert_allclose(loss, oracle.mean(expected), rtol=1e-9, atol=1e-12)


def test_the_ribbon_meets_the_path_where_the_residual_is_the_steps_own(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "mlp-relu")
    files, _ = save_path(case, tmp_path)
    # With a reach of 1 the last value of b is the largest residual: that of one of the steps.
    result = losscli.trajectory(files, **options(case), residuals=4, reach=1)
    residuals = result.table.floats("residual")
    t = max(range(STEPS), key=residuals.__getitem__)
    last = result.more["surface"].where("step", t).rows[-1]
    loss = result.more["surface"].columns.index("loss")
    assert last[result.more["surface"].columns.index("residual")] == residuals[t]
    assert last[loss] == pytest.approx(result.table.floats("loss")[t], rel=1e-6)
    for end in (0, STEPS - 1):
        first = result.more["surface"].where("step", end).rows[0]
        assert first[loss] == pytest.approx(result.table.floats("loss")[end], rel=1e-6)


def test_scaling_all_weights_scales_all_lengths(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "mlp-relu")
    files, states = save_path(case, tmp_path)
    scaled = []
    for t, state in enumerate(states):
        scaled.append(str(tmp_path / f"scaled-{t}.pt"))
        torch.save({n: 4 * tensor for n, tensor in state.items()}, scaled[-1])
    one, four = (
        losscli.trajectory(names, **options(case), surface=False).table for names in (files, scaled)
    )
    assert four.floats("projection") == one.floats("projection")
    assert four.floats("residual") == [4 * r for r in one.floats("residual")]
    assert four["turn_degrees"] == one["turn_degrees"]


def test_reversing_the_path_gives_the_same_residuals(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "mlp-sigmoid")
    files, _ = save_path(case, tmp_path)
    forth, back = (
        losscli.trajectory(names, **options(case), surface=False).table
        for names in (files, files[::-1])
    )
    np.testing.assert_allclose(
        back.floats("projection"), 1 - np.array(forth.floats("projection")[::-1]), atol=1e-12
    )
    np.testing.assert_allclose(back.floats("residual"), forth.floats("residual")[::-1], rtol=1e-10)
    assert back["loss"] == forth["loss"][::-1]


def test_small_checkpoints_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in CASES if c.name == "mlp-relu")
    files, _ = save_path(case, tmp_path)
    opened: list[str] = []

    def reading(name: str) -> CheckpointFile:
        opened.append(name)
        return read(name)

    monkeypatch.setattr("losscli.studies.checkpoints.read", reading)
    result = losscli.trajectory(files, **options(case), residuals=3)
    assert sorted(opened) == sorted(files)
    monkeypatch.setattr("losscli.studies.checkpoints._KEPT_BYTES", 0)
    assert losscli.trajectory(files, **options(case), residuals=3).table == result.table
    assert len(opened) > 3 * len(files)


def test_no_more_than_three_large_checkpoints_are_held_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("losscli.studies.checkpoints._KEPT_BYTES", 0)
    case = next(c for c in CASES if c.name == "mlp-relu")
    files, _ = save_path(case, tmp_path)
    seen: list[weakref.ref[torch.Tensor]] = []
    most = 0
    select = CheckpointFile.select

    def selecting(self: CheckpointFile, *arguments: Any, **further: Any) -> Checkpoint:
        nonlocal most
        checkpoint = select(self, *arguments, **further)
        seen.append(weakref.ref(checkpoint.weights["layers.0.weight"]))
        most = max(most, sum(tensor() is not None for tensor in seen))
        return checkpoint

    monkeypatch.setattr(CheckpointFile, "select", selecting)
    plan = Trajectory.plan(
        files, Settings(**options(case)), surface=True, residuals=3, reach=1, random_walk=False
    )
    assert most == 3
    plan.run()
    assert most == 3


def test_random_walks_have_the_step_lengths_of_the_path(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "mlp-relu")
    files, _ = save_path(case, tmp_path)
    one = losscli.trajectory(files, **options(case), surface=False, random_walk=True)
    again = losscli.trajectory(files, **options(case), surface=False, random_walk=True)
    other = losscli.trajectory(files, **options(case), surface=False, random_walk=True, seed=1)
    walk = one.more["walk"]
    ends = [max(walk.where("walk", n).floats("distance")[-1:]) for n in walk.unique("walk")]
    assert one.summary["random_walks"]["length"] == pytest.approx(np.mean(ends))
    strays = [max(walk.where("walk", n).floats("residual")) for n in walk.unique("walk")]
    assert one.summary["random_walks"]["largest_residual"] == pytest.approx(np.mean(strays))
    assert walk == again.more["walk"]
    assert walk != other.more["walk"]
    assert walk.unique("walk") == list(range(10))
    for number in walk.unique("walk"):
        rows = walk.where("walk", number)
        assert rows.floats("projection")[0] == rows.floats("residual")[0] == 0
        assert rows.floats("projection")[-1] == 1
        # The first step is as long as that of the path.
        assert rows.floats("distance")[1] == pytest.approx(one.table.floats("distance")[1])


def test_examples_are_added_only_until_the_error_is_small(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "mlp-relu")
    files, _ = save_path(case, tmp_path)
    repeats = 3000 // len(case.targets) + 1
    data = {
        "all": (torch.cat([case.inputs] * repeats), torch.cat([case.targets] * repeats)),
    }
    given = options(case) | {"data": data, "sampling_error": 0.5}
    result = losscli.trajectory(files, **given, residuals=3)  # type: ignore[arg-type]
    assert result.table.unique("examples") == [512]
    whole = losscli.trajectory(files, **(options(case) | {"data": data}), surface=False)  # type: ignore[arg-type]
    off = np.abs(np.subtract(result.table.floats("loss"), whole.table.floats("loss")))
    assert np.all(off < 5 * np.array(result.table.floats("loss_stderr")))
    assert np.any(off > 0)


def test_tensors_left_out_by_choice_are_not_part_of_the_path(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "cnn-batchnorm")
    files, states = save_path(case, tmp_path)
    result = losscli.trajectory(files, **options(case), surface=False, buffers="b")
    buffers = [n for n in states[0] if "running" in n]
    moving = [n for n in moving_names(case, states) if n not in buffers]
    length = np.linalg.norm(vector(states[-1], moving) - vector(states[0], moving))
    assert result.summary["path"]["length"] == pytest.approx(length, rel=1e-10)
    assert "buffers stay at the last checkpoint's" in result.summary["notes"][0]
    for t in (0, 2):
        state = states[t] | {n: states[-1][n] for n in buffers}
        expected = oracle.losses(
            case.build, state, copy.deepcopy(case.inputs), case.targets, case.per_example
        )
        assert result.table.floats("loss")[t] == pytest.approx(oracle.mean(expected), rel=1e-5)


def test_a_straight_path_has_no_surface_and_says_so(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "mlp-relu")
    a, b = case.state(1), case.state(2)
    files = []
    for t, share in enumerate((0, 0.5, 1)):
        files.append(str(tmp_path / f"{t}.pt"))
        torch.save({n: torch.lerp(a[n], b[n], share) for n in a}, files[-1])
    result = losscli.trajectory(files, **options(case))
    assert result.table.floats("residual") == [0, 0, 0]
    assert not result.more
    assert any("straight line" in note for note in result.summary["notes"])


def test_checkpoints_that_differ_only_in_buffers_have_no_path(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "cnn-batchnorm")
    one, other = case.state(1), case.state(2)
    buffers = {n for n, _ in case.build().named_buffers()}
    files = []
    for t in range(3):
        files.append(str(tmp_path / f"{t}.pt"))
        state = {
            n: torch.lerp(x, other[n], t / 2) if n in buffers and x.ndim else x
            for n, x in one.items()
        }
        torch.save(state, files[-1])
    for study, more in (("trajectory", {}), ("plane", {}), ("plane", {"pca": True})):
        with pytest.raises(UsageError, match="the checkpoints differ only in buffers") as caught:
            getattr(losscli, study)(files, **options(case), **more)
        assert "\n" not in str(caught.value)
    line = losscli.interpolate(*files[:2], **options(case), points=2)
    assert line.summary["distance"] == 0
    assert (
        "A and B differ only in buffers: ‖B − A‖, over the parameters, is 0"
        in line.summary["notes"]
    )
    pairs = losscli.barriers(files, **options(case), points=3)
    assert pairs.table.floats("distance") == [0, 0, 0]
    told = "the two checkpoints of 3 pairs differ only in buffers: their distance is 0"
    assert told in pairs.summary["notes"]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_fewer_than_three_checkpoints_are_refused(number: int, tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "mlp-relu")
    files, _ = save_path(case, tmp_path)
    with pytest.raises(UsageError, match=f"three checkpoints or more, and got {number}"):
        losscli.trajectory(files[:number], **options(case))


def test_a_path_that_ends_where_it_began_has_no_line(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "mlp-relu")
    files, _ = save_path(case, tmp_path)
    with pytest.raises(UsageError, match="there is no straight line between them"):
        losscli.trajectory([*files[:2], files[0]], **options(case))


def test_checkpoints_of_different_models_are_one_error_that_names_them(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "mlp-relu")
    files, _ = save_path(case, tmp_path)
    for name in ("other-1", "other-2"):
        torch.save(MLP("3-2").state_dict(), tmp_path / f"{name}.pt")
    bag = [*files[:2], str(tmp_path / "other-1.pt"), str(tmp_path / "other-2.pt"), files[-1]]
    with pytest.raises(MismatchError) as caught:
        losscli.trajectory(bag, **options(case))
    text = str(caught.value)
    assert "other-1" in text
    assert "other-2" in text
    assert "\n" not in text


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "mlp-relu")
    files, states = save_path(case, tmp_path)
    state = states[2]
    next(iter(state.values())).view(-1)[0] = math.nan
    torch.save(state, files[2])
    with pytest.raises(CheckpointError, match=r"step-2\.pt: layers\.0\.weight has weights"):
        losscli.trajectory(files, **options(case))


@pytest.mark.parametrize(
    ("option", "value"), [("residuals", 1), ("reach", 0.0), ("reach", math.nan)]
)
def test_surfaces_of_no_extent_are_refused(option: str, value: float, tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "mlp-relu")
    files, _ = save_path(case, tmp_path)
    with pytest.raises(UsageError, match=f"--{option} {value} is no"):
        losscli.trajectory(files, **options(case), **{option: value})  # type: ignore[arg-type]


def test_a_folder_is_its_checkpoints_in_natural_order(tmp_path: Path) -> None:
    for name in ("step-10.pt", "step-9.pt", "step-100.pt", "a2.ckpt", "a10.ckpt", ".hidden.pt"):
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").touch()
    found = [Path(name).name for name in list_checkpoints(str(tmp_path))]
    assert found == ["a2.ckpt", "a10.ckpt", "step-9.pt", "step-10.pt", "step-100.pt"]
    assert list_checkpoints(str(tmp_path / "step-9.pt")) == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="contains no checkpoints"):
        list_checkpoints(str(tmp_path / "empty"))
