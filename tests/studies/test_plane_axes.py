"""Planes along eigenvectors of the Hessian, and paths that are projected onto planes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import losscli
from losscli.errors import CheckpointError, LosscliError, ModelError, UsageError
from losscli.evaluation.hessian.curvature import Curvature
from losscli.models import MLP
from losscli.registry import COMMANDS, command_of
from losscli.results.result import Result
from losscli.table import Table
from losscli.weight_space.directions import random_directions
from tests.cases import CASES, Case
from tests.conftest import Losscli
from tests.studies.test_around import cut, derivatives, loss_at
from tests.studies.test_plane import options, parameters, save, vector

CASE = {case.name: case for case in CASES}
LINEAR, TANH, BATCHNORM = CASE["mlp-linear-mse"], CASE["mlp-tanh-bce"], CASE["cnn-batchnorm"]


def grid_losses(result: Result[Any]) -> dict[tuple[float, float], float]:
    table = result.table
    points = zip(table.floats("x"), table.floats("y"), strict=True)
    return dict(zip(points, table.floats("loss"), strict=True))


# --- Eigenvectors of the Hessian -----------------------------------------------------------------


@pytest.mark.parametrize("case", [LINEAR, TANH], ids=str)
def test_the_axes_are_eigenvectors_of_the_dense_hessian(case: Case, tmp_path: Path) -> None:
    (file,) = save(case, tmp_path, 1)
    h = 1e-3
    more = {"axes": "hessian", "points": 3, "range": (-h, h), "dtype": "float64"}
    result = losscli.plane(file, **options(case, **more))
    state, names = case.state(1), list(case.build().state_dict())
    _, hessian = derivatives(case, state, names)
    values, vectors = np.linalg.eigh(hessian)
    losses = grid_losses(result)
    x, y = result.summary["axes"]
    second = {
        letter: (at[0] - 2 * losses[0, 0] + at[1]) / h**2
        for letter, at in (
            ("x", (losses[-h, 0], losses[h, 0])),
            ("y", (losses[0, -h], losses[0, h])),
        )
    }
    for axis, letter, value in ((x, "x", values[-1]), (y, "y", values[0])):
        assert axis["converged"]
        assert axis["eigenvalue"] == pytest.approx(value, rel=1e-9, abs=1e-12)
        assert abs(axis["eigenvalue"] - value) <= axis["error"] + 1e-12
        assert second[letter] == pytest.approx(value, rel=1e-4, abs=1e-7)
    assert (x["name"], y["name"]) == (
        "along the eigenvector of λ_max",
        "along the eigenvector of λ_min",
    )
    if min(values[1] - values[0], values[-1] - values[-2]) > 1e-6:
        u, v = (e * np.sign(e[np.argmax(np.abs(e))]) for e in (vectors[:, -1], vectors[:, 0]))
        for (a, b), loss in losses.items():
            step = cut(a * u + b * v, state, names)
            assert loss == pytest.approx(loss_at(case, state, step, 1.0), rel=1e-9)
    assert result.more["path"].floats("off_plane") == [0]
    assert result.summary["moving"]["values"] == len(values)
    assert result.summary["endpoint_difference"] <= 1e-12


def test_axes_of_one_number_per_batch_are_those_of_the_mean(tmp_path: Path) -> None:
    (file,) = save(TANH, tmp_path, 1)
    given = options(TANH, axes="hessian", points=2, dtype="float64", range=(-1, 1))
    whole = {**given, "loss": lambda o, t: TANH.per_example(o, t).mean(), "batch_loss": True}
    one = losscli.plane(file, **given)
    other = losscli.plane(file, **whole, batch_size=len(TANH.targets))
    for mine, theirs in zip(one.summary["axes"], other.summary["axes"], strict=True):
        assert mine["eigenvalue"] == pytest.approx(theirs["eigenvalue"], rel=1e-9)
    np.testing.assert_allclose(one.table.floats("loss"), other.table.floats("loss"), rtol=1e-9)


def bowl(*curvatures: float) -> dict[str, Any]:
    """A model of as many weights, with half the sum of c w² as its loss, at weights of 1."""
    model = nn.Linear(len(curvatures), 1, bias=False)
    scales = torch.tensor(curvatures, dtype=torch.float64).abs().sqrt()
    signs = torch.tensor(curvatures).sign()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        # Of an example w_i √|c_i|; the mean over examples is the sum over their number.
        return len(curvatures) / 2 * outputs[:, 0].square() * targets

    data = {"all": (torch.diag(scales), signs.double())}
    nn.init.ones_(model.weight)
    given = {"model": model, "data": data, "loss": loss, "metric": "none", "dtype": "float64"}
    return {"names": model.state_dict(), "axes": "hessian", **given}


def test_by_default_the_curvature_changes_the_loss_by_a_tenth() -> None:
    result = losscli.plane(**bowl(100.0, 2.0, -1.0), points=3)
    own = 0.5 * (100 + 2 - 1)
    ranges = result.summary["x_range"], result.summary["y_range"]
    for (low, high), value in zip(ranges, (100.0, -1.0), strict=True):
        # No farther than ‖θ‖.
        reach = min(math.sqrt(0.2 * own / abs(value)), math.sqrt(3))
        assert (low, high) == (-high, pytest.approx(reach, rel=1e-3))
    losses = grid_losses(result)
    x, y = ranges[0][1], ranges[1][1]
    # A saddle: above the checkpoint on average along x, below it along y.
    assert losses[x, 0] + losses[-x, 0] == pytest.approx(2 * own + 100 * x**2)
    assert losses[0, y] + losses[0, -y] == pytest.approx(2 * own - y**2)
    assert any("each axis reaches as far as its curvature" in n for n in result.summary["notes"])
    given = losscli.plane(**bowl(100.0, 2.0, -1.0), points=3, range=(-1.0, 2.0))
    assert given.table.unique("x") == given.table.unique("y") == [-1, 0.5, 2]
    assert not given.summary["notes"]
    # A loss near 0 reaches some way, and so does no curvature.
    near = losscli.plane(**bowl(1e8, -1e8, 0.0), points=3)
    assert near.summary["x_range"][1] == pytest.approx(1e-3 * math.sqrt(3), rel=1e-3)
    flat = losscli.plane(**bowl(1.0, 0.0, 0.5), points=3)
    assert flat.summary["y_range"][1] == pytest.approx(math.sqrt(3), rel=1e-3)


@pytest.mark.parametrize(
    ("curvatures", "ends"),
    [
        ((3.0, 3.0, 1.0), ["largest"]),
        ((3.0, 1.0, 1.0), ["smallest"]),
        ((2.0, 2.0), ["largest", "smallest"]),
        ((3.0, 2.0, 1.0), []),
    ],
)
def test_equal_eigenvalues_are_noted(curvatures: Sequence[float], ends: Sequence[str]) -> None:
    result = losscli.plane(**bowl(*curvatures), points=2, range=(0, 1))
    found = [note for note in result.summary["notes"] if "eigenvalues are equal" in note]
    assert [note.split()[2] for note in found] == list(ends)
    for note in found:
        letter = "x" if "largest" in note else "y"
        assert f": {letter} is one of many directions with this curvature" in note


def test_a_zero_hessian_and_a_single_parameter_give_no_plane() -> None:
    with pytest.raises(ModelError, match=r"Hessian at .* is zero within rounding.*--axes"):
        losscli.plane(**bowl(0.0, 0.0))
    with pytest.raises(UsageError, match="at least two parameters, and only one moves"):
        losscli.plane(**bowl(1.0))
    broken = bowl(1.0, 2.0)
    broken["names"]["weight"][:] = math.nan
    with pytest.raises(CheckpointError, match="weight has weights that are infinite or not a num"):
        losscli.plane(**broken)


def test_axes_are_those_of_the_first_split_and_agree_with_check(folder: Path) -> None:
    (row,) = losscli.check("a.pt", split="test").table.records()
    result = losscli.plane("a.pt", axes="hessian", points=2, split=("test", "train"))
    x, y = result.summary["axes"]
    for axis, name in ((x, "lambda_max"), (y, "lambda_min")):
        assert (axis["eigenvalue"], axis["error"]) == (row[name], row[f"{name}_error"])
    assert "the eigenvectors of test are the directions for all splits" in result.summary["notes"]
    assert result.table.unique("split") == ["test", "train"]
    only = losscli.plane("a.pt", axes="hessian", points=2, only="*.bias", split="test")
    assert only.summary["moving"]["values"] == 8


def test_a_search_that_has_not_converged_says_so(
    folder: Path, losscli: Losscli, monkeypatch: pytest.MonkeyPatch
) -> None:
    extremes = partialmethod(Curvature.extremes, limit=4)
    monkeypatch.setattr("losscli.evaluation.hessian.critical_points.DENSE_LIMIT", 1)
    monkeypatch.setattr("losscli.evaluation.hessian.curvature._SMALL", 1)
    monkeypatch.setattr(Curvature, "extremes", extremes)
    done = losscli("plane", "a.pt", "--axes", "hessian", "--points", 2, "--no-figure", "-o", "x")
    assert done.status == 0, done.stderr
    assert done.stdout.count(", not converged, from") == 2
    for end, letter in (("largest", "x"), ("smallest", "y")):
        assert f"the search for the {end} eigenvalue has not converged" in done.stderr
        assert f"a more extreme curvature than {letter}" in done.stderr
    summary = json.loads(Path("x.json").read_text())
    assert [axis["converged"] for axis in summary["axes"]] == [False, False]


# --- Paths ---------------------------------------------------------------------------------------


def spanning(kind: str, case: Case, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The point at (0, 0) of a plane and its two axes, over these parameters."""
    a, b, c = (vector(case.state(seed), list(names)) for seed in (1, 2, 3))
    if kind == "random":
        filtered = [n for n in names if case.state(1)[n].ndim > 1]
        pair = random_directions(case.state(1), filtered, (), 0)
        whole = [{n: d.get(n, torch.zeros_like(case.state(1)[n])) for n in names} for d in pair]
        return a, np.stack([vector(direction, list(names)) for direction in whole])
    if kind == "hessian":
        _, hessian = derivatives(case, case.state(1), names)
        _, vectors = np.linalg.eigh(hessian)
        pair = vectors[:, -1], vectors[:, 0]
        return a, np.stack([v * np.sign(v[np.argmax(np.abs(v))]) for v in pair])
    first = (b - a) / np.linalg.norm(b - a)
    second = (c - a) - ((c - a) @ first) * first
    return a, np.stack([first, second / np.linalg.norm(second)])


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        ("random", BATCHNORM),
        pytest.param("random", TANH, marks=pytest.mark.stress),
        pytest.param("points", BATCHNORM, marks=pytest.mark.stress),
        ("points", TANH),
        ("hessian", TANH),
    ],
    ids=str,
)
def test_a_path_is_projected_orthogonally(kind: str, case: Case, tmp_path: Path) -> None:
    own = save(case, tmp_path, *((1, 2, 3) if kind == "points" else (1,)))
    path = save(case, tmp_path, 4, 5, 6)
    given = {"points": 3, "dtype": "float64", **({"axes": "hessian"} if kind == "hessian" else {})}
    result = losscli.plane(own, path=path, **options(case, **given))
    names = parameters(case, [n for n, t in case.state(1).items() if t.is_floating_point()])
    origin, axes = spanning(kind, case, names)
    table = result.more["path"]
    assert table.columns[:2] == ("path", "step")
    assert table["path"] == [""] * len(own) + [path[0]] * 3
    assert table["step"] == [*range(len(own)), 0, 1, 2]
    assert table["checkpoint"] == [*own, *path]
    losses = []
    for seed, row in zip((4, 5, 6), table.where("path", path[0]).records(), strict=True):
        step = vector(case.state(seed), names) - origin
        at, *_ = np.linalg.lstsq(axes.T, step, rcond=None)
        off = np.linalg.norm(step - at @ axes)
        # Random directions are float32.
        near = {"rel": 1e-6 if kind == "random" else 1e-9, "abs": 1e-9}
        assert (row["x"], row["y"]) == (pytest.approx(at[0], **near), pytest.approx(at[1], **near))
        assert row["off_plane"] == pytest.approx(off, rel=1e-9)
        losses.append(loss_at(case, case.state(seed), {}, 0.0))
        assert row["loss"] == pytest.approx(losses[-1], rel=1e-9)
    (described,) = result.summary["paths"]
    assert (described["name"], described["checkpoints"]) == (path[0], 3)
    assert described["off_plane"] == max(table.where("path", path[0]).floats("off_plane"))
    # The default range holds all checkpoints.
    for column in ("x", "y"):
        values = result.table.floats(column)
        assert min(values) < min(table.floats(column))
        assert max(values) > max(table.floats(column))
    if kind == "points":
        return
    # It is no smaller than without the path.
    (near,) = result.more["path"].where("path", "").records()
    alone = losscli.plane(own, **options(case, **given))
    for column in ("x", "y"):
        values, others = result.table.floats(column), alone.table.floats(column)
        assert near[column] == 0
        assert min(values) <= min(others) < max(others) <= max(values)


@pytest.mark.parametrize(
    ("case", "more"),
    [
        pytest.param(BATCHNORM, {}, marks=pytest.mark.stress),
        (BATCHNORM, {"pca": True}),
        (TANH, {"axes": "hessian"}),
    ],
    ids=str,
)
def test_a_path_changes_nothing_on_the_plane(
    case: Case, more: dict[str, Any], tmp_path: Path
) -> None:
    own = save(case, tmp_path, *((1, 2, 3) if "pca" in more else (1,)))
    (tmp_path / "run").mkdir()
    files = save(case, tmp_path / "run", 9, 10)
    given = options(case, points=3, range=(-1, 1), buffers="b", **more)
    alone = losscli.plane(own, **given)
    both = losscli.plane(own, path=[own[0], str(tmp_path / "run")], **given)
    assert both.table == alone.table
    path = both.more["path"]
    assert path.unique("path") == ["", own[0], str(tmp_path / "run")]
    assert path.where("path", str(tmp_path / "run"))["checkpoint"] == files
    spanned = path.where("path", "")
    assert Table(spanned.columns[1:], tuple(row[1:] for row in spanned.rows)) == alone.more["path"]
    own_again = path.where("path", own[0]).floats("off_plane")[0]
    assert own_again == alone.more["path"].floats("off_plane")[0]


def test_a_folder_is_a_path_in_the_order_of_training(tmp_path: Path) -> None:
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        for name in ("10", "9", "init"):
            torch.save(TANH.state(1), tmp_path / run / f"{name}.pt")
    given = options(TANH, points=2)
    folders = [str(tmp_path / run) for run in ("b", "a")]
    (file,) = save(TANH, tmp_path, 1)
    result = losscli.plane(file, path=folders, **given)
    found = [p and Path(str(p)).name for p in result.more["path"]["path"]]
    assert found == ["", "b", "b", "b", "a", "a", "a"]
    assert [Path(str(c)).stem for c in result.more["path"]["checkpoint"]][1:4] == [
        "init",
        "9",
        "10",
    ]
    kept = losscli.plane(file, path=folders, keep_order=True, **given)
    assert [Path(str(c)).stem for c in kept.more["path"]["checkpoint"]][1:4] == ["9", "10", "init"]
    # All checkpoints are at (0, 0), so that the plane has the range of one without a path.
    assert result.summary["x_range"] == [-1, 1]
    objects = losscli.plane(TANH.state(1), path=[TANH.state(4), TANH.state(5)], **given)
    assert objects.more["path"]["checkpoint"] == ["checkpoint 0", "checkpoint 1", "checkpoint 2"]
    assert losscli.plane(file, path=TANH.state(4), **given).summary["paths"][0]["checkpoints"] == 1


# --- The command line ----------------------------------------------------------------------------


@pytest.mark.usefixtures("unlaid")
@pytest.mark.usefixtures("unlaid")
def test_files_text_and_json(folder: Path, losscli: Losscli) -> None:
    run = [
        *("plane", "a.pt", "--axes", "hessian", "--path", "b.pt", "--path", "init:3"),
        *("--points", 3, "--split", "test", "--metric", "none", "-o", "out"),
    ]
    done = losscli(*run)
    assert done.status == 0, done.stderr
    table = Table.read(folder / "out.csv")
    assert command_of(table.columns) is COMMANDS["plane"]
    path = Table.read(folder / "out.path.csv")
    assert path["path"] == ["", "b.pt", "b.pt"]
    for line in (
        "x               along the eigenvector of λ_max = ",
        "y               along the eigenvector of λ_min = ",
        "path            b.pt: 2 checkpoints, off the plane up to ",
    ):
        assert line in done.stdout
    assert "last, at (0, 0)" not in done.stdout
    summary = json.loads((folder / "out.json").read_text())
    names = [checkpoint["name"] for checkpoint in summary["checkpoints"]]
    assert names == ["a.pt", "b.pt", "init:3"]
    drawn = losscli("plot", "out.csv", "-o", "again")
    assert drawn.status == 0
    assert (folder / "again.png").read_bytes() == (folder / "out.png").read_bytes()
    plan = json.loads(losscli(*run, "--dry-run", "--json").stdout)
    assert (plan["points"], plan["products_at_most"]) == (9 + 3, 53)


AXES = "plane a.pt --axes hessian"
ERRORS = [
    (f"{AXES} --pca", 2, "--axes and --pca both choose the axes of the plane"),
    ("plane a.pt b.pt c.pt --axes hessian", 2, "needs one checkpoint, and got 3. Give the others"),
    (f"{AXES} --sampling-error 0.1", 2, "--sampling-error is not available with --axes"),
    (f"{AXES} --only *.x", 2, "the pattern '*.x' matches none"),
    (f"{AXES} --keep-order", 2, "--keep-order has no effect without --pca"),
    (f"{AXES} --range 1 0", 2, "--range 1.0 0.0 is reversed"),
    ("plane a.pt b.pt", 2, "to project a path, give --path"),
    ("plane a.pt --path other.pt", 1, "other.pt does not fit the model"),
    ("plane a.pt --path missing.pt", 1, "there is no checkpoint missing.pt"),
    ("plane a.pt --path nan.pt", 1, "nan.pt: layers.0.weight has weights that are infinite"),
    ("plane a.pt --path run --path run", 2, "--path run is given twice"),
    ("plane a.pt --path empty", 1, "empty"),
]


@pytest.mark.parametrize(("command", "status", "words"), ERRORS, ids=lambda x: str(x)[:40])
def test_errors_are_one_line_and_write_nothing(
    command: str, status: int, words: str, folder: Path, losscli: Losscli
) -> None:
    torch.save(MLP("3-2").state_dict(), "other.pt")
    state = MLP("6-5-3").state_dict()
    Path("run").mkdir()
    Path("empty").mkdir()
    for name in ("c.pt", "run/1.pt"):
        torch.save({"state_dict": state, "losscli.model": "mlp:6-5-3"}, name)
    state["layers.0.weight"][0, 0] = math.nan
    torch.save({"state_dict": state, "losscli.model": "mlp:6-5-3"}, "nan.pt")
    before = sorted(folder.iterdir())
    done = losscli(*command.split())
    assert (done.status, done.stdout) == (status, "")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(folder.iterdir()) == before


def test_other_axes_are_refused() -> None:
    with pytest.raises(LosscliError, match=r"--axes gradient is not known. Give --axes hessian"):
        losscli.plane("a.pt", axes="gradient")
