"""The loss around checkpoints, from files to tables, against closed forms and the oracle."""

from __future__ import annotations

import io
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import losscli
from losscli.errors import LosscliError, ModelError, UsageError
from losscli.models import MLP
from losscli.registry import COMMANDS, command_of
from losscli.results.result import Result
from losscli.table import Table
from losscli.weight_space.directions import random_direction
from tests import oracle
from tests.cases import CASES, Case, sample
from tests.conftest import Losscli
from tests.studies.sample import SAMPLE
from tests.studies.test_plane import options, save, vector

CASE = {case.name: case for case in CASES}
LINEAR, TANH, BATCHNORM = CASE["mlp-linear-mse"], CASE["mlp-tanh-bce"], CASE["cnn-batchnorm"]

State = dict[str, Tensor]


def wide(**more: Any) -> dict[str, Any]:
    return {"dtype": "float64", "points": 3, "range": (-1, 1), **more}


def filtered(case: Case) -> list[str]:
    """The tensors with filters: no normalisation parameters, buffers or biases, tied ones once."""
    parameters = dict(case.build().named_parameters())
    return [
        "head.weight" if (case.name, n) == ("attention-tied", "embedding.weight") else n
        for n, t in parameters.items()
        if t.ndim > 1
    ]


def loss_at(case: Case, state: State, step: State, c: float) -> float:
    there = {n: t.double() if t.is_floating_point() else t for n, t in state.items()}
    for name, u in step.items():
        there[name] = there[name] + c * u.double()
    if case.name == "attention-tied":
        there["embedding.weight"] = there["head.weight"]
    found = oracle.losses(case.build, there, case.inputs, case.targets, case.per_example)
    return oracle.mean(found)


def curves(result: Result[Any]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Each checkpoint and direction, with its rows."""
    for checkpoint in result.table.unique("checkpoint"):
        rows = result.table.where("checkpoint", checkpoint)
        for direction in rows.unique("direction"):
            yield str(checkpoint), str(direction), rows.where("direction", direction).records()


# --- Random directions ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", sample(SAMPLE, 1))
def test_every_loss_is_that_of_a_plain_float64_loop(case: Case, tmp_path: Path) -> None:
    files = save(case, tmp_path, 1, 2)
    result = losscli.around(files, directions=2, **options(case, **wide()))
    names = filtered(case)
    for file, direction, rows in curves(result):
        state = case.state(1 + files.index(file))
        step = random_direction(state, names, 0, int(direction))
        length = np.linalg.norm(vector(step, names))
        assert [row["coefficient"] for row in rows] == [-1, 0, 1]
        for row in rows:
            c = row["coefficient"]
            assert row["distance"] == pytest.approx(abs(c) * length, rel=1e-6)
            assert row["loss"] == pytest.approx(loss_at(case, state, step, c), rel=1e-9, abs=1e-11)
    moved = result.summary["moving"]
    assert moved["tensors"] == len(names)
    assert moved["values"] == sum(case.state(1)[n].numel() for n in names)
    assert result.summary["endpoint_difference"] <= 1e-12


def derivatives(case: Case, state: State, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The gradient and the dense Hessian in float64, row by row by torch.autograd.grad."""
    model = case.build().double()
    model.load_state_dict(state)
    tensors = dict(model.named_parameters())
    parameters = [tensors[n] for n in names]
    targets = case.targets
    targets = targets.double() if targets.is_floating_point() else targets
    loss = case.per_example(model(case.inputs.double()), targets).mean()

    def flat(value: Tensor) -> Tensor:
        parts = torch.autograd.grad(value, parameters, create_graph=True, materialize_grads=True)
        return torch.cat([part.reshape(-1) for part in parts])

    gradient = flat(loss)
    rows = torch.stack([flat(entry) for entry in gradient])
    return gradient.detach().numpy(), rows.detach().numpy()


def test_losses_and_radius_of_a_quadratic_loss_are_exact(tmp_path: Path) -> None:
    (file,) = save(LINEAR, tmp_path, 1)
    state = LINEAR.state(1)
    more = {"directions": 5, "basin": 1.5, "points": 9, "range": (0, 4), "dtype": "float64"}
    result = losscli.around(file, **options(LINEAR, **more))
    names = filtered(LINEAR)
    gradient, hessian = derivatives(LINEAR, state, names)
    slopes, bends = [], []
    for _, direction, rows in curves(result):
        u = vector(random_direction(state, names, 0, int(direction)), names)
        slopes.append(gradient @ u)
        bends.append(u @ hessian @ u / 2)
        own = rows[0]["loss"]
        for row in rows:
            c = row["coefficient"]
            expected = own + c * slopes[-1] + c**2 * bends[-1]
            assert row["loss"] == pytest.approx(expected, rel=1e-12)
    (point,) = result.summary["splits"]["all"]["points"]
    assert point["threshold"] == pytest.approx(1.5 * own)

    def crossing(keep: Sequence[int]) -> float:
        a, b = statistics.mean(bends[k] for k in keep), statistics.mean(slopes[k] for k in keep)
        return (math.sqrt(b**2 + 2 * a * own) - b) / (2 * a) * result.summary["lengths"][0]

    everything = list(range(5))
    found = point["radii"]["mean"]
    assert found["distance"] == pytest.approx(crossing(everything), rel=1e-9)
    assert found["relative"] == found["distance"] / result.summary["norms"][0]
    without = [crossing([k for k in everything if k != left]) for left in everything]
    middle = statistics.mean(without)
    error = math.sqrt(4 / 5 * math.fsum((r - middle) ** 2 for r in without))
    assert found["stderr"] == pytest.approx(error, rel=1e-6)
    assert (found["bound"], found["positions"]) == ("", [found["distance"]])


def test_the_summary_says_what_the_table_holds(tmp_path: Path) -> None:
    files = save(TANH, tmp_path, 1, 2)
    result = losscli.around(files, directions=4, **options(TANH, points=4))
    summary = result.summary
    assert summary["coefficients"] == [0, 1 / 3, 2 / 3, 1]
    assert summary["directions"] == ["1", "2", "3", "4"]
    assert (summary["basin"], summary["basin_loss"], summary["along"]) == (2, None, None)
    for file, size, point in zip(
        files, summary["norms"], summary["splits"]["all"]["points"], strict=True
    ):
        assert size == pytest.approx(
            np.linalg.norm(vector(TANH.state(1 + files.index(file)), filtered(TANH)))
        )
        rows = result.table.where("checkpoint", file)
        assert point["checkpoint"] == file
        assert point["threshold"] == 2 * point["loss"]
        for p, c in enumerate(summary["coefficients"]):
            losses = rows.where("coefficient", c).floats("loss")
            assert {*rows.where("coefficient", c)["distance"]} == {point["distances"][p]}
            assert point["relative_distances"][p] == pytest.approx(c)
            if c == 0:
                assert {*losses} == {point["loss"]}
            assert point["mean"][p] == pytest.approx(statistics.mean(losses))
            assert point["deviation"][p] == pytest.approx(statistics.stdev(losses), abs=1e-12)
            tenths = statistics.quantiles(losses, n=10, method="inclusive")
            assert point["low"][p] == pytest.approx(tenths[0])
            assert point["high"][p] == pytest.approx(tenths[-1])


def test_more_directions_do_not_change_the_first(tmp_path: Path) -> None:
    files = save(TANH, tmp_path, 1, 2)
    few = losscli.around(files, directions=1, **options(TANH, points=3))
    more = losscli.around(files[::-1], directions=3, **options(TANH, points=3))
    rows = {(r["checkpoint"], r["direction"], r["coefficient"]): r for r in more.table.records()}
    for row in few.table.records():
        assert rows[row["checkpoint"], row["direction"], row["coefficient"]] == row
    assert "one direction has no spread and no error" in "; ".join(few.summary["notes"])
    (first, _) = few.summary["splits"]["all"]["points"]
    assert all(map(math.isnan, first["deviation"]))


def test_only_chosen_tensors_move_and_statistics_do_not(tmp_path: Path) -> None:
    (file,) = save(BATCHNORM, tmp_path, 1)
    name = filtered(BATCHNORM)[0]
    result = losscli.around(file, directions=1, only=name, **options(BATCHNORM, **wide()))
    state = BATCHNORM.state(1)
    step = random_direction(state, [name], 0, 1)
    for row in result.table.records():
        expected = loss_at(BATCHNORM, state, step, row["coefficient"])
        assert row["loss"] == pytest.approx(expected, rel=1e-9)
    assert result.summary["moving"] == {"tensors": 1, "values": state[name].numel()}
    assert "random directions are zero in all but the chosen" in "; ".join(result.summary["notes"])
    again = losscli.around(
        file, directions=1, buffers="recalibrate", **options(BATCHNORM, points=3)
    )
    assert any("re-estimated at every point" in note for note in again.summary["notes"])


def test_examples_are_added_only_until_the_error_is_small(tmp_path: Path) -> None:
    repeats = 3000 // len(TANH.targets) + 1
    data = {"all": (torch.cat([TANH.inputs] * repeats), torch.cat([TANH.targets] * repeats))}
    (file,) = save(TANH, tmp_path, 1)
    given = options(TANH, **wide(directions=2)) | {"data": data}
    whole = losscli.around(file, **given)
    some = losscli.around(file, **given, sampling_error=0.5)
    grown = losscli.around(file, **given, sampling_error=1e-9)
    assert some.table.unique("examples") == [512]
    assert grown.table.unique("examples") == [len(data["all"][1])]
    np.testing.assert_allclose(grown.table.floats("loss"), whole.table.floats("loss"), 1e-9)


# --- Gradients and eigenvectors ------------------------------------------------------------------


@pytest.mark.parametrize("case", [pytest.param(LINEAR, marks=pytest.mark.stress), TANH], ids=str)
def test_eigenvectors_are_those_of_the_dense_hessian(case: Case, tmp_path: Path) -> None:
    files = save(case, tmp_path, 1, 2)
    more = {"along": "hessian", "range": (-1e-3, 1e-3), "points": 3, "dtype": "float64"}
    result = losscli.around(files, **options(case, **more))
    names = list(case.build().state_dict())
    assert result.summary["lengths"] == [1, 1]
    states = dict(zip(files, map(case.state, (1, 2)), strict=True))
    spectra = {file: np.linalg.eigh(derivatives(case, states[file], names)[1]) for file in files}
    for file, direction, rows in curves(result):
        state = states[file]
        values, vectors = spectra[file]
        at = {"v1": -1, "v2": -2, "vn": 0}[direction]
        told = result.summary["derivatives"][file]
        found = next(d for d in told if d["direction"] == direction)
        assert found["eigenvalue"] == pytest.approx(values[at], rel=1e-9, abs=1e-12)
        assert found["converged"]
        low, own, high = (row["loss"] for row in rows)
        curvature = (low - 2 * own + high) / 1e-6
        assert curvature == pytest.approx(values[at], rel=1e-4, abs=1e-7)
        assert [row["distance"] for row in rows] == [1e-3, 0, 1e-3]
        gap = np.sort(np.abs(np.delete(values, at) - values[at]))[0]
        if gap > 1e-6:
            v = vectors[:, at] * np.sign(vectors[np.argmax(np.abs(vectors[:, at])), at])
            step = cut(v, state, names)
            for row in rows:
                expected = loss_at(case, state, step, row["coefficient"])
                assert row["loss"] == pytest.approx(expected, rel=1e-9)


def test_derivatives_are_those_of_check(folder: Path) -> None:
    found = losscli.around("a.pt", along="hessian", points=3, split="test")
    (row,) = losscli.check("a.pt", eigenvalues=2, split="test").table.records()
    first, *_, last = found.summary["derivatives"]["a.pt"]
    assert (first["eigenvalue"], first["error"]) == (row["lambda_max"], row["lambda_max_error"])
    assert (last["eigenvalue"], last["error"]) == (row["lambda_min"], row["lambda_min_error"])
    found = losscli.around("a.pt", along="gradient", points=3, split="test")
    ((told,),) = found.summary["derivatives"].values()
    assert told["gradient_norm"] == row["gradient_norm"]


def cut(flat: np.ndarray, state: State, names: Sequence[str]) -> State:
    """Divides a vector into tensors."""
    ends = np.cumsum([state[n].numel() for n in names])[:-1]
    parts = zip(np.split(flat, ends), names, strict=True)
    return {n: torch.from_numpy(part.reshape(state[n].shape)) for part, n in parts}


def test_the_gradient_is_that_of_the_first_split_and_points_uphill(tmp_path: Path) -> None:
    files = save(TANH, tmp_path, 1, 2)
    data = {"all": (TANH.inputs, TANH.targets), "half": (TANH.inputs[:9], TANH.targets[:9])}
    more = {"along": "gradient", "points": 3, "dtype": "float64"}
    result = losscli.around(files, **options(TANH, **more) | {"data": data})
    names = list(TANH.build().state_dict())
    for file, direction, rows in curves(result):
        state = TANH.state(1 + files.index(file))
        gradient, _ = derivatives(TANH, state, names)
        size = float(np.linalg.norm(gradient))
        assert direction == "gradient"
        (told,) = result.summary["derivatives"][file]
        assert told["gradient_norm"] == pytest.approx(size, rel=1e-9)
        step = cut(gradient / size, state, names)
        for row in rows:
            if row["split"] == "all":
                expected = loss_at(TANH, state, step, row["coefficient"])
                assert row["loss"] == pytest.approx(expected, rel=1e-9)
    assert result.summary["coefficients"] == [-0.5, 0, 0.5]
    assert "the gradient of all is the direction for all splits" in result.summary["notes"]
    (first, _) = result.summary["splits"]["all"]["points"]
    assert list(first["radii"]) == ["gradient"]
    assert first["mean"] == []


@pytest.mark.parametrize(("inputs", "bias", "names"), [(1, False, ["v1"]), (1, True, ["v1", "vn"])])
def test_a_hessian_has_no_more_eigenvectors_than_parameters(
    inputs: int, bias: bool, names: list[str]
) -> None:
    model = nn.Linear(inputs, 1, bias=bias)
    data = {"all": (torch.arange(8.0)[:, None], torch.ones(8, 1))}
    result = losscli.around(model.state_dict(), model=model, data=data, along="hessian", points=3)
    assert result.summary["directions"] == names


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)).detach() + 0.1 * self.a(x))


@pytest.mark.parametrize("along", ["gradient", "hessian"])
def test_wrong_derivatives_are_an_error(along: str) -> None:
    torch.manual_seed(0)
    data = {"all": (torch.randn(40, 4), torch.arange(40) % 3)}
    model = Detached()
    with pytest.raises(ModelError, match="detach"):
        losscli.around(model.state_dict(), model=model, data=data, along=along, points=3)


class Once(torch.autograd.Function):
    """A square that can be differentiated once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class Squaring(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(super().forward(x))


def test_a_gradient_needs_no_second_derivative() -> None:
    torch.manual_seed(0)
    model = Squaring(4, 3)
    given = {"model": model, "data": {"all": (torch.randn(40, 4), torch.arange(40) % 3)}}
    result = losscli.around(model.state_dict(), **given, along="gradient", points=3)
    ((told,),) = result.summary["derivatives"].values()
    assert told["gradient_norm"] > 0
    with pytest.raises(LosscliError):
        losscli.around(model.state_dict(), **given, along="hessian", points=3)


# --- Thresholds and losses that are not finite ---------------------------------------------------


def test_a_loss_of_zero_or_less_gives_no_threshold(tmp_path: Path) -> None:
    (file,) = save(TANH, tmp_path, 1)

    def negative(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs[:, 0] - targets).square() - 9

    given = options(TANH, points=3, directions=2) | {"loss": negative}
    result = losscli.around(file, **given)
    (point,) = result.summary["splits"]["all"]["points"]
    assert point["loss"] < 0
    assert (point["threshold"], point["radii"]) == (None, {})
    (note,) = (note for note in result.summary["notes"] if "no basin radius" in note)
    assert "is not above 0, so 2 times the loss is not a threshold; give --basin-loss" in note
    assert "not defined" in COMMANDS["around"].as_text(result)
    (point,) = losscli.around(file, **given, basin_loss=-5.0).summary["splits"]["all"]["points"]
    assert point["threshold"] == -5
    assert point["radii"]["mean"]["distance"] > 0


def test_a_radius_before_the_first_point_is_a_bound(tmp_path: Path) -> None:
    (file,) = save(TANH, tmp_path, 1)
    result = losscli.around(file, directions=3, range=(0, 50), **options(TANH, points=3))
    (point,) = result.summary["splits"]["all"]["points"]
    found = point["radii"]["mean"]
    assert (found["bound"], found["distance"]) == ("at most", point["distances"][1])
    assert (found["positions"], found["stderr"]) == ([], None)
    assert any("give a smaller --range or more --points" in n for n in result.summary["notes"])
    assert "basin radius    at most " in COMMANDS["around"].as_text(result)


def test_losses_that_are_not_finite_do_not_affect_the_other_numbers(tmp_path: Path) -> None:
    (file,) = save(TANH, tmp_path, 1)

    def overflowing(outputs: Tensor, targets: Tensor) -> Tensor:
        loss = (outputs[:, 0] - targets).square()
        return torch.where(outputs[:, 0].abs() > 1, math.inf, loss)

    given = options(TANH, points=5, directions=3, range=(0, 4)) | {"loss": overflowing}
    result = losscli.around(file, **given, basin_loss=1e6)
    losses = result.table.floats("loss")
    lost = sum(map(math.isinf, losses))
    assert 0 < lost < len(losses)
    (point,) = result.summary["splits"]["all"]["points"]
    assert point["not_finite"] == lost
    assert f"all: the loss of {lost} points is not finite" in result.summary["notes"]
    assert point["radii"]["mean"]["bound"] == "at least"
    text = COMMANDS["around"].as_text(result)
    assert "at least" in text
    assert "not finite" in text
    read = Table.from_csv(io.StringIO(result.table.to_csv(), newline=""), "x")
    assert read.floats("loss") == losses


def test_a_checkpoint_without_a_direction_is_named(tmp_path: Path) -> None:
    state = TANH.state(1)
    zero = {n: torch.zeros_like(t) for n, t in state.items()}
    # A loss that is constant near by has a gradient of 0.
    for of, error, words, more in [
        (zero, UsageError, "has no random direction: filter-normalised directions are zero", {}),
        (zero, ModelError, "is 0, so it has no direction", {"along": "gradient"}),
    ]:
        torch.save(of, tmp_path / "other.pt")
        loss = (lambda o, t: o[:, 0] ** 2 + 1) if more else TANH.loss
        given = options(TANH, points=3, **more) | {"loss": loss}
        with pytest.raises(error, match=words) as raised:
            losscli.around([str(tmp_path / "other.pt")], **given)
        assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("unlaid")
@pytest.mark.parametrize(
    ("more", "last"),
    sample(product(({}, {"along": "hessian"}, {"along": "gradient"}), (False, True)), 0, 2),
    ids=str,
)
def test_a_checkpoint_that_is_not_finite_does_not_affect_the_others(
    more: dict[str, Any], last: bool, tmp_path: Path
) -> None:
    whole, broken = save(TANH, tmp_path, 1, 2)
    state = TANH.state(2)
    state[filtered(TANH)[0]][0, 0] = math.nan
    torch.save(state, broken)
    given = options(TANH, points=3, **(more or {"directions": 2}))
    names = [whole, broken] if last else [broken, whole]
    result = losscli.around(names, **given)
    alone = losscli.around(whole, **given)
    rows = {name: result.table.where("checkpoint", name) for name in names}
    assert rows[whole] == alone.table
    assert len(rows[broken].rows) == len(alone.table.rows)
    assert all(map(math.isnan, rows[broken].floats("loss")))
    notes = "; ".join(result.summary["notes"])
    assert f"the loss of {len(alone.table.rows)} points is not finite" in notes
    assert "no basin radius" not in notes
    assert "has not converged" not in notes
    if more:
        what = "gradient" if more["along"] == "gradient" else "Hessian"
        assert f"{broken}: the {what} is not finite, so there is no direction" in notes
    points = {p["checkpoint"]: p for p in result.summary["splits"]["all"]["points"]}
    assert points[whole] == alone.summary["splits"]["all"]["points"][0]
    assert (points[broken]["threshold"], points[broken]["radii"]) == (None, {})
    text = COMMANDS["around"].as_text(result)
    assert "nan ±" not in text
    assert text.count("not defined") == 1
    assert result.figure() is not None


@pytest.mark.parametrize(
    ("dtype", "reach", "rounded"),
    [
        ("float32", 1e-8, 6),  # no weight is another
        ("float32", 1e-6, 6),  # the losses differ by rounding
        ("float32", 1e-1, 0),
        ("float64", 1e-6, 0),
        ("float64", 1e-17, 6),
    ],
)
def test_points_that_differ_only_by_rounding_are_noted(
    dtype: str, reach: float, rounded: int, tmp_path: Path
) -> None:
    (file,) = save(TANH, tmp_path, 1)
    more = {"directions": 3, "points": 3, "range": (0, reach), "dtype": dtype}
    result = losscli.around(file, **options(TANH, **more))
    (point,) = result.summary["splits"]["all"]["points"]
    assert point["rounded"] == rounded
    notes = [note for note in result.summary["notes"] if "rounding" in note]
    wider = "" if dtype == "float64" else ", or --dtype float64"
    told = f"all: 6 points around {file} differ from it by no more than the rounding of {dtype}"
    assert notes == ([f"{told}: give a larger --range{wider}"] if rounded else [])


@pytest.mark.parametrize(
    ("study", "more", "buffers"),
    [
        (losscli.around, {"along": "gradient", "points": 3}, "a"),
        (losscli.check, {}, "a"),
        (losscli.sharpness, {"samples": 1}, "interpolate"),
        *(
            pytest.param(*case, marks=pytest.mark.stress)
            for case in (
                (losscli.around, {"directions": 2, "points": 3}, "a"),
                (losscli.around, {"directions": 2, "points": 3}, "interpolate"),
                (losscli.around, {"along": "gradient", "points": 3}, "interpolate"),
                (losscli.check, {}, "interpolate"),
                (losscli.sharpness, {"samples": 1}, "a"),
            )
        ),
    ],
)
def test_tensors_that_do_not_move_are_those_of_each_checkpoint(
    study: Any, more: dict[str, Any], buffers: str, tmp_path: Path
) -> None:
    files = save(BATCHNORM, tmp_path, 1, 2)
    given = options(BATCHNORM, only=filtered(BATCHNORM)[-1], buffers=buffers, limit=9, **more)
    both = study(files, **given)
    for file in files:
        same = both.table.where("checkpoint", file) == study(file, **given).table
        # The statistics of BatchNorm alone are those of the first checkpoint with --buffers a.
        assert same == (buffers == "interpolate" or file == files[0])
    stay = [note for note in both.summary["notes"] if "stay at" in note]
    assert len(stay) == (buffers == "a")
    if buffers == "a":
        mixed = {n: t if "running" not in n else BATCHNORM.state(1)[n] for n, t in
                 BATCHNORM.state(2).items()}  # fmt: skip
        torch.save(mixed, files[1])
        mine = study(files[1], **given).table
        assert [row[1:] for row in mine.rows] == [
            row[1:] for row in both.table.where("checkpoint", files[1]).rows
        ]


# --- The command line ----------------------------------------------------------------------------


@pytest.mark.usefixtures("unlaid")
def test_files_text_and_json(folder: Path, losscli: Losscli) -> None:
    run = ["around", "a.pt", "b.pt", "--directions", 3, "--points", 5, "-o", "out"]
    done = losscli(*run)
    assert done.status == 0
    table = Table.read(folder / "out.csv")
    assert command_of(table.columns) is COMMANDS["around"]
    assert table.columns == (
        *("checkpoint", "direction", "coefficient", "distance", "split"),
        *("loss", "loss_stderr", "accuracy"),
    )
    assert len(table.rows) == 2 * 3 * 5 * 2
    assert table.unique("direction") == ["1", "2", "3"]
    assert (folder / "out.png").read_bytes()[:4] == b"\x89PNG"
    for word in (
        "3 random directions, filter-normalised",
        "5 from 0 to 1",
        "train, 29 examples",
        "  b.pt, ‖θ‖ = ",
        "(s.d. over directions)",
        "(0.5 ‖θ‖): ",
        ", twice the loss at the checkpoint\n",
    ):
        assert word in done.stdout
    thrice = losscli(*run[:-1], "thrice", "--basin", 3, "--no-figure")
    assert ", 3 times the loss at the checkpoint\n" in thrice.stdout
    again = losscli(*run, "--no-figure", "--json")
    assert again.stdout.count("\n") == 1
    assert json.loads(again.stdout)["interpolation"] == "quadratic"
    out = losscli("around", "a.pt", "b.pt", "--directions", 3, "--points", 5, "-o", "-", "-q")
    assert out.stdout.encode() == (folder / "out.csv").read_bytes()


@pytest.mark.usefixtures("unlaid")
def test_a_checkpoint_that_is_not_finite_is_written_and_drawn(
    folder: Path, losscli: Losscli
) -> None:
    loaded = torch.load("a.pt", weights_only=True)
    loaded["state_dict"]["layers.0.weight"][0, 0] = math.nan
    torch.save(loaded, "broken.pt")
    run = ["around", "broken.pt", "b.pt", "--directions", 2, "--points", 3, "--split", "test"]
    run += ["-o", "out"]
    done = losscli(*run)
    assert done.status == 0, done.stderr
    table = Table.read(folder / "out.csv")
    assert table.unique("checkpoint") == ["broken.pt", "b.pt"]
    assert json.loads((folder / "out.json").read_text())["norms"][0] is None
    assert losscli("plot", "out.csv", "-o", "again").status == 0
    assert (folder / "again.png").read_bytes() == (folder / "out.png").read_bytes()


def test_text_and_plan_of_eigenvectors(folder: Path, losscli: Losscli) -> None:
    run = ["around", "a.pt", "--along", "hessian", "--points", 5, "-o", "out", "--no-figure"]
    done = losscli(*run, "--basin-loss", 9)
    assert done.status == 0
    assert Table.read(folder / "out.csv").unique("direction") == ["v1", "v2", "vn"]
    assert done.stdout.count("λ of v1 ") == 1  # of the first split alone
    assert "basin radius    at least 0.5 (" in done.stdout
    assert ": loss along vn below 9\n" in done.stdout
    assert "the eigenvectors of train are the directions for all splits" in done.stderr
    low = losscli("around", "a.pt", "--points", 3, "--basin-loss", 0.01, "--no-figure")
    assert "basin radius    0 (0 ‖θ‖): mean loss not below 0.01\n" in low.stdout
    plan = json.loads(losscli(*run, "--dry-run", "--json").stdout)
    assert (plan["points"], plan["products_at_most"]) == (1 + 3 * 4, 53)


ERRORS = [
    ("a.pt a.pt", 2, "a.pt is given 2 times. Give each checkpoint once"),
    ("missing.pt", 1, "there is no checkpoint missing.pt"),
    ("a.pt other.pt", 1, "other.pt does not fit the model"),
    ("a.pt --directions 0", 2, "--directions must be at least 1, not 0"),
    ("a.pt --along gradient --directions 5", 2, "--directions is the number of random directions"),
    ("a.pt --along gradient --sampling-error 0.1", 2, "--sampling-error is not available with"),
    ("a.pt --along hessian --only *.x", 2, "the pattern '*.x' matches none"),
    ("a.pt --only *.bias", 2, "a.pt has no random direction: filter-normalised directions are"),
    ("a.pt --basin 1", 2, "--basin must be above 1, not 1. Give 2"),
    ("a.pt --basin nan", 2, "--basin must be above 1, not nan"),
    ("a.pt --basin-loss inf", 2, "--basin-loss inf is not finite"),
    ("a.pt --basin 2 --basin-loss 1", 2, "--basin and --basin-loss are both thresholds"),
    ("a.pt --points 1", 2, "--points must be at least 2, not 1"),
    ("a.pt --range 0.5 1", 2, "--range 0.5 1 does not include 0, where the checkpoint is"),
    ("a.pt --range 1 0", 2, "--range 1.0 0.0 is reversed"),
]


@pytest.mark.parametrize(("command", "status", "words"), ERRORS, ids=lambda x: str(x)[:40])
def test_errors_are_one_line_and_write_nothing(
    command: str, status: int, words: str, folder: Path, losscli: Losscli
) -> None:
    torch.save(MLP("3-2").state_dict(), "other.pt")
    before = sorted(folder.iterdir())
    done = losscli("around", *command.split())
    assert (done.status, done.stdout) == (status, "")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(folder.iterdir()) == before


def test_an_unknown_direction_is_refused() -> None:
    with pytest.raises(UsageError, match="--along sideways is not known"):
        losscli.around("a.pt", along="sideways")
