"""The barriers between all pairs of checkpoints, against a plain float64 loop and interpolate."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import itertools
import json
import math
import resource
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import losscli
from losscli.cli.barriers import report
from losscli.errors import ModelError
from losscli.evaluation.objective import Objective
from losscli.evaluation.tasks import Execution
from losscli.models import MLP
from losscli.registry import COMMANDS, command_of
from losscli.settings import Settings
from losscli.studies import verification
from losscli.studies.barriers import Barriers
from losscli.table import Table
from tests import oracle
from tests.cases import CASES, Case, in_turn, sample
from tests.conftest import Losscli
from tests.studies.sample import SAMPLE

POINTS = 5
ALPHAS = (0.25, 0.5, 0.75)
RELU = next(c for c in CASES if c.name == "mlp-relu")
BATCHNORM = next(c for c in CASES if c.name == "cnn-batchnorm")


# Between points that were not trained there is hardly ever a hill.
TRAINED = {"mlp-relu", "mlp-sigmoid", "mlp-maxout", "cnn", "cnn-batchnorm"}


def state_of(case: Case, seed: int) -> dict[str, torch.Tensor]:
    if case.name not in TRAINED:
        return case.state(seed)
    return {name: tensor.clone() for name, tensor in trained(case.name, seed).items()}


@functools.cache
def trained(name: str, seed: int) -> dict[str, torch.Tensor]:
    case = next(c for c in CASES if c.name == name)
    model = case.build()
    model.load_state_dict(case.state(seed))
    model.eval()  # BatchNorm's statistics stay
    optimiser = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(40):
        optimiser.zero_grad()
        case.per_example(model(case.inputs), case.targets).mean().backward()
        optimiser.step()
    return model.state_dict()


def save(case: Case, folder: Path, seeds: Sequence[int] = (1, 2, 3)) -> list[str]:
    files = []
    for seed in seeds:
        files.append(str(folder / f"{seed}.pt"))
        torch.save(state_of(case, seed), files[-1])
    return files


def options(case: Case) -> dict[str, Any]:
    return {
        "model": case.build,
        "data": {"all": (copy.deepcopy(case.inputs), case.targets)},
        "loss": case.loss,
        "metric": ("none",),
    }


def losses_at(case: Case, state: dict[str, torch.Tensor]) -> list[float]:
    inputs = copy.deepcopy(case.inputs)
    batch_size = len(case.targets)
    return oracle.losses(
        case.build, state, inputs, case.targets, case.per_example, batch_size=batch_size
    )


@pytest.mark.parametrize("case", sample(SAMPLE, 0))
def test_barriers_are_those_of_a_plain_float64_loop(case: Case, tmp_path: Path) -> None:
    files = save(case, tmp_path)
    result = losscli.barriers(files, **options(case), dtype="float64", points=POINTS)
    states = {file: state_of(case, seed) for file, seed in zip(files, (1, 2, 3), strict=True)}
    own = {file: losses_at(case, state) for file, state in states.items()}
    rows = result.table.records()
    assert [(r["a"], r["b"]) for r in rows] == list(itertools.combinations(files, 2))
    curves = result.more["curves"]
    for row in rows:
        a, b = str(row["a"]), str(row["b"])
        seen = {
            alpha: losses_at(case, oracle.blend(states[a], states[b], alpha)) for alpha in ALPHAS
        }
        above = {
            alpha: [
                x - (1 - alpha) * y - alpha * z
                for x, y, z in zip(found, own[a], own[b], strict=True)
            ]
            for alpha, found in seen.items()
        }
        top = max(ALPHAS, key=lambda alpha: oracle.mean(above[alpha]))
        height = oracle.mean(above[top])
        if height > 0:
            assert row["barrier"] == pytest.approx(height, rel=1e-9, abs=1e-12)
            error = oracle.standard_error(above[top])
            assert row["barrier_stderr"] == pytest.approx(error, rel=1e-9, abs=1e-12)
            assert row["alpha"] == top
        else:
            assert (row["barrier"], row["barrier_stderr"], row["alpha"]) == (0.0, 0.0, None)
        assert row["loss_a"] == pytest.approx(oracle.mean(own[a]), rel=1e-11)
        assert row["loss_b"] == pytest.approx(oracle.mean(own[b]), rel=1e-11)
        curve = curves.where("a", a).where("b", b)
        assert curve["alpha"] == [0.0, *ALPHAS, 1.0]
        expected = [own[a], *(seen[alpha] for alpha in ALPHAS), own[b]]
        np.testing.assert_allclose(
            curve.floats("loss"), [oracle.mean(x) for x in expected], rtol=1e-9, atol=1e-12
        )
        np.testing.assert_allclose(
            curve.floats("loss_stderr"),
            [oracle.standard_error(x) for x in expected],
            rtol=1e-8,
            atol=1e-12,
        )
    if case.name in TRAINED:
        assert min(result.table.floats("barrier")) > 0


@pytest.mark.parametrize(
    ("case", "more"),
    [
        pytest.param(RELU, {}, id="mlp", marks=pytest.mark.stress),
        pytest.param(BATCHNORM, {}, id="batchnorm", marks=pytest.mark.stress),
        pytest.param(BATCHNORM, {"buffers": "recalibrate"}, id="recalibrated"),
        pytest.param(RELU, {"except_": ("layers.0.*",)}, id="except"),
    ],
)
def test_a_pair_has_the_barrier_that_interpolate_finds(
    case: Case, more: dict[str, Any], tmp_path: Path
) -> None:
    # What stays is the first checkpoint's, as it is interpolate's A's: so with --except the pairs
    # of the first alone are comparable, and these are enough for statistics.
    files = save(case, tmp_path)
    given = options(case) | {"dtype": "float64"} | more
    result = losscli.barriers(files, **given, points=6)
    for a, b in itertools.combinations(files, 2):
        if more and a != files[0]:
            continue
        line = losscli.interpolate(a, b, **given, points=6, range=(0.0, 1.0))
        (row,) = result.table.where("a", a).where("b", b).records()
        found = line.summary["splits"]["all"]
        assert row["distance"] == line.summary["distance"]
        assert row["barrier"] == pytest.approx(found["barrier"]["height"], rel=1e-12, abs=1e-14)
        assert row["barrier_stderr"] == pytest.approx(found["barrier"]["stderr"], rel=1e-10)
        assert (row["alpha"] or 0.0) == found["barrier"]["alpha"]
        for end in "ab":
            assert row[f"loss_{end}"] == pytest.approx(found[f"loss_{end}"], rel=1e-13)
        losses = result.more["curves"].where("a", a).where("b", b).floats("loss")
        np.testing.assert_allclose(losses, line.table.floats("loss"), rtol=1e-12)
    if not more:
        assert min(result.table.floats("barrier")) > 0


def test_ends_are_exact_and_shared_by_all_pairs(tmp_path: Path) -> None:
    files = save(RELU, tmp_path)
    result = losscli.barriers(files, **options(RELU))
    own = dict(zip(files, result.summary["splits"]["all"]["losses"], strict=True))
    for row in result.table.records():
        assert (row["loss_a"], row["loss_b"]) == (own[str(row["a"])], own[str(row["b"])])
    for row in result.more["curves"].records():
        if row["alpha"] in {0.0, 1.0}:
            assert row["loss"] == own[str(row["b"] if row["alpha"] else row["a"])]
    for file in files:
        line = losscli.interpolate(file, files[0], **options(RELU), points=2, range=(0.0, 1.0))
        assert line.summary["splits"]["all"]["loss_a"] == own[file]


@pytest.mark.parametrize("case", [pytest.param(RELU, marks=pytest.mark.stress), BATCHNORM], ids=str)
def test_reversing_the_checkpoints_gives_the_same_barriers(case: Case, tmp_path: Path) -> None:
    files = save(case, tmp_path)
    forth, back = (
        losscli.barriers(names, **options(case), dtype="float64") for names in (files, files[::-1])
    )
    assert [(r["b"], r["a"]) for r in back.table.records()[::-1]] == [
        (r["a"], r["b"]) for r in forth.table.records()
    ]
    for column in ("barrier", "barrier_stderr", "distance"):
        np.testing.assert_allclose(
            back.table.floats(column)[::-1], forth.table.floats(column), rtol=1e-11, atol=1e-13
        )
    there, here = (np.array(r.summary["splits"]["all"]["barriers"]) for r in (forth, back))
    np.testing.assert_allclose(here[::-1, ::-1], there, rtol=1e-11, atol=1e-13)
    np.testing.assert_array_equal(there, there.T)
    np.testing.assert_array_equal(np.diagonal(there), 0)


@pytest.mark.parametrize(("name", "points"), in_turn(["threaded", "differentiating"], 3, 4))
def test_few_points_share_no_layer_that_more_points_cannot_share(
    name: str, points: int, tmp_path: Path
) -> None:
    case = next(c for c in CASES if c.name == name)
    files = save(case, tmp_path, (1, 2))
    given = options(case) | {"dtype": "float64"}
    few = losscli.barriers(files, **given, points=points)
    more = losscli.barriers(files, **given, points=2 * points - 1)
    losses = more.more["curves"].floats("loss")[::2]
    np.testing.assert_allclose(few.more["curves"].floats("loss"), losses, rtol=1e-11)


def test_the_summary_says_what_the_table_holds(tmp_path: Path) -> None:
    files = save(RELU, tmp_path, (1, 2, 3, 4))
    result = losscli.barriers(files, **options(RELU))
    split = result.summary["splits"]["all"]
    rows = result.table.records()
    for row in rows:
        i, j = files.index(str(row["a"])), files.index(str(row["b"]))
        assert split["barriers"][i][j] == split["barriers"][j][i] == row["barrier"]
        assert result.summary["distances"][i][j] == row["distance"]
    for which, choose in (("largest", max), ("smallest", min)):
        row = choose(rows, key=lambda r: float(str(r["barrier"])))
        found = split[which]
        assert (found["a"], found["b"], found["height"], found["stderr"], found["alpha"]) == tuple(
            row[c] for c in ("a", "b", "barrier", "barrier_stderr", "alpha")
        )
    assert split["without"] == sum(row["barrier"] == 0 for row in rows)


def test_checkpoints_are_read_before_the_run_and_each_is_evaluated_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = save(RELU, tmp_path)
    names = []
    for k, file in enumerate(files):
        names.append(str(tmp_path / f"copy-{k}.{('pt', 'safetensors')[k % 2]}"))
        if k % 2:
            save_file(torch.load(file, weights_only=True), names[-1])
        else:
            shutil.copy(file, names[-1])
    plan = Barriers.plan(names, Settings(**options(RELU)), points=POINTS)
    for name in names:
        Path(name).unlink()
    whole = 0
    plain = Objective.plain

    def counting(self: Objective, weights: Any, splits: Any = None, progress: Any = None) -> Any:
        nonlocal whole
        whole += splits is self.splits  # checks take first batches
        return plain(self, weights, splits, progress)

    monkeypatch.setattr(Objective, "plain", counting)
    result = plan.run()
    assert whole == len(files)
    assert (
        result.table["barrier"]
        == losscli.barriers(files, **options(RELU), points=POINTS).table["barrier"]
    )


@contextmanager
def few_descriptors(spare: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir()) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + spare, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors as Linux does")
def test_checkpoints_keep_no_file_descriptors_open(tmp_path: Path) -> None:
    case, files = RELU, []
    for seed in range(10):
        files.append(str(tmp_path / f"{seed}.{('pt', 'safetensors')[seed % 2]}"))
        torch.save(case.state(seed), files[-1]) if seed % 2 == 0 else save_file(
            case.state(seed), files[-1]
        )
    losscli.barriers(files[:2], **options(case), points=3)  # whatever is imported late
    with few_descriptors(8):
        result = losscli.barriers(files, **options(case), points=3)
    assert len(result.table.rows) == 10 * 9 // 2


def test_progress_counts_points(tmp_path: Path) -> None:
    files = save(RELU, tmp_path)
    plan = Barriers.plan(files, Settings(**options(RELU)), points=POINTS)
    told: list[float] = []
    plan.run(Execution(told.append))
    assert plan.evaluations == 3 + 3 * 3
    assert told == sorted(told)
    assert told[-1] == pytest.approx(plan.evaluations)
    assert {3, 6, 9} <= {round(done, 6) for done in told}


def test_a_diverged_checkpoint_does_not_stop_the_run(tmp_path: Path) -> None:
    files = save(RELU, tmp_path, (1, 2, 3, 4))
    state = state_of(RELU, 2)
    next(iter(state.values())).view(-1)[0] = math.nan
    torch.save(state, files[1])
    result = losscli.barriers(files, **options(RELU), points=POINTS)
    whole = losscli.barriers([files[0], *files[2:]], **options(RELU), points=POINTS)
    kept = [r for r in result.table.records() if files[1] not in {r["a"], r["b"]}]
    lost = [r for r in result.table.records() if files[1] in {r["a"], r["b"]}]
    assert [r["barrier"] for r in kept] == whole.table["barrier"]
    for row in lost:
        assert all(
            math.isnan(float(str(row[c])))
            for c in ("barrier", "barrier_stderr", "alpha", "distance")
        )
    split = result.summary["splits"]["all"]
    assert split["not_finite"] == 3
    assert split["largest"]["height"] == max(whole.table.floats("barrier"))
    assert "all: the barrier of 3 pairs is not known" in "; ".join(result.summary["notes"])
    assert "nan" in result.table.to_csv()
    table = Table.from_csv(io.StringIO(result.table.to_csv(), newline=""), "x")
    np.testing.assert_array_equal(table.floats("barrier"), result.table.floats("barrier"))


def test_a_line_with_losses_that_are_not_finite_reports_no_barrier(tmp_path: Path) -> None:
    # Far out on either side a loss is not finite; half way between there is one.
    a, b = RELU.state(1), RELU.state(1)
    for sign, state in ((1, a), (-1, b)):
        state["layers.1.bias"] = torch.full_like(state["layers.1.bias"], sign * 3e38)
        state["layers.1.bias"][0] *= -1
    names = [str(tmp_path / name) for name in ("a.pt", "b.pt")]
    for name, state in zip(names, (a, b), strict=True):
        torch.save(state, name)
    result = losscli.barriers(names, **options(RELU), points=POINTS)
    losses = result.more["curves"].floats("loss")
    assert math.isfinite(losses[2])
    assert not math.isfinite(losses[0])
    assert math.isnan(result.table.floats("barrier")[0])
    assert result.summary["splits"]["all"]["largest"] is None


def test_the_same_weights_twice_have_no_barrier(tmp_path: Path) -> None:
    files = save(RELU, tmp_path, (1, 2))
    twin = str(tmp_path / "twin.pt")
    shutil.copy(files[0], twin)
    result = losscli.barriers([files[0], twin, files[1]], **options(RELU), points=POINTS)
    first, one, other = result.table.records()
    assert (first["distance"], first["barrier"], first["alpha"]) == (0.0, 0.0, None)
    assert (one["distance"], one["barrier"]) == (other["distance"], other["barrier"])
    assert "the two checkpoints of 1 pair are the same" in "; ".join(result.summary["notes"])
    assert "  smallest barrier  none\n" in report(result)


def test_examples_are_added_only_until_the_error_is_small(tmp_path: Path) -> None:
    repeats = 3000 // len(RELU.targets) + 1
    data = {"all": (torch.cat([RELU.inputs] * repeats), torch.cat([RELU.targets] * repeats))}
    files = save(RELU, tmp_path)
    given = options(RELU) | {"data": data, "dtype": "float64"}
    whole = losscli.barriers(files, **given)
    some = losscli.barriers(files, **given, sampling_error=0.5)
    assert some.table.unique("examples") == [512]
    assert some.more["curves"].unique("examples") == [512]
    assert 0 < abs(some.table.floats("barrier")[0] - whole.table.floats("barrier")[0]) < 0.1
    # Grown to the last example, it is what it is in one go.
    grown = losscli.barriers(files, **given, sampling_error=1e-9)
    assert grown.table.unique("examples") == [len(data["all"][1])]
    for column in ("barrier", "barrier_stderr", "loss_a"):
        np.testing.assert_allclose(grown.table.floats(column), whole.table.floats(column), 1e-9)


def test_every_checkpoint_is_compared_with_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = save(RELU, tmp_path, (1, 2, 3, 4))
    plan = Barriers.plan(files, Settings(**options(RELU)), points=POINTS)
    sweep = verification.sweep

    def wrong(objective: Any, slice_: Any, coordinates: Any, **more: Any) -> Any:
        found = sweep(objective, slice_, coordinates, **more)
        if torch.equal(slice_.ends[1]["layers.1.bias"], plan.states[3]["layers.1.bias"]):
            return {n: dataclasses.replace(e, losses=1.01 * e.losses) for n, e in found.items()}
        return found

    monkeypatch.setattr(verification, "sweep", wrong)
    with pytest.raises(ModelError, match="the sweep does not reproduce the checkpoints"):
        plan.run()
    assert Barriers.plan(files[:3], Settings(**options(RELU)), points=POINTS).run().table.rows


def test_statistics_that_are_re_estimated_are_noted(tmp_path: Path) -> None:
    files = save(BATCHNORM, tmp_path)
    given = options(BATCHNORM) | {"points": 3}
    moved = losscli.barriers(files, **given)
    estimated = losscli.barriers(files, **given, buffers="recalibrate")
    assert not any("re-estimated at every point" in note for note in moved.summary["notes"])
    assert any("re-estimated at every point" in note for note in estimated.summary["notes"])
    assert moved.table["barrier"] != estimated.table["barrier"]


# --- The command line ----------------------------------------------------------------------------


@pytest.fixture
def several(folder: Path) -> Path:
    """The folder of a.pt and b.pt, with c.pt and d.pt."""
    for seed, name in ((7, "c"), (8, "d")):
        torch.manual_seed(seed)
        torch.save(
            {"state_dict": MLP("6-5-3").state_dict(), "losscli.model": "mlp:6-5-3"},
            folder / f"{name}.pt",
        )
    return folder


@pytest.mark.usefixtures("unlaid")
def test_files_text_and_json(several: Path, losscli: Losscli) -> None:
    done = losscli("barriers", "a.pt", "b.pt", "c.pt", "-o", "out")
    assert done.status == 0
    table = Table.read(several / "out.csv")
    assert command_of(table.columns) is COMMANDS["barriers"]
    assert table.columns == (
        *("a", "b", "split", "distance", "barrier", "barrier_stderr", "alpha"),
        *("loss_a", "loss_b"),
    )
    pairs = [("a.pt", "b.pt"), ("a.pt", "c.pt"), ("b.pt", "c.pt")]
    assert [tuple(row[:3]) for row in table.rows] == [
        (*pair, split) for pair in pairs for split in ("train", "test")
    ]
    curves = Table.read(several / "out.curves.csv")
    assert curves.columns == ("a", "b", "alpha", "split", "loss", "loss_stderr", "accuracy")
    assert len(curves.rows) == 3 * 11 * 2
    assert (several / "out.png").read_bytes()[:4] == b"\x89PNG"
    assert "3 checkpoints, 3 pairs, 11 points each" in done.stdout
    header = " loss  barrier to 1  "
    for word in ("largest barrier", "smallest barrier", "train, 29 examples", "3  c.pt", header):
        assert word in done.stdout
    again = losscli("barriers", "a.pt", "b.pt", "c.pt", "-o", "out", "--no-figure", "--json")
    assert again.status == 0
    assert again.stdout.count("\n") == 1
    summary = json.loads(again.stdout)
    assert summary["command"] == "barriers"
    assert len(summary["splits"]["test"]["barriers"]) == 3
    assert len(summary["alphas"]) == 11
    other = losscli("barriers", "a.pt", "b.pt", "c.pt", "-o", "out", "--points", 5)
    assert other.status == 1
    assert "contains the results of another run" in other.stderr


def test_the_text_of_many_checkpoints_names_them(several: Path, losscli: Losscli) -> None:
    for k in range(11):
        shutil.copy(several / f"{'abcd'[k % 4]}.pt", several / f"many-{k}.pt")
    names = [f"many-{k}.pt" for k in range(11)]
    done = losscli("barriers", *names, "-o", "out", "--no-figure", "--points", 3, "--limit", 5)
    assert done.status == 0
    assert "11 checkpoints, 55 pairs, 3 points each" in done.stdout
    assert "between many-" in done.stdout
    assert "of 55 pairs: never above the straight line between the two losses" in done.stdout
    assert "to 10" not in done.stdout


def test_a_folder_stdin_and_stdout(
    several: Path, losscli: Losscli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"a.pt\nb.pt\n")))
    done = losscli("barriers", "-", "c.pt", "-o", "-", "-q", "--points", 3)
    assert done.status == 0
    table = Table.from_csv(io.StringIO(done.stdout, newline=""), "stdout")
    assert table.unique("a") == ["a.pt", "b.pt"]
    assert table.unique("b") == ["b.pt", "c.pt"]
    (several / "path").mkdir()
    for k in (10, 9):
        shutil.copy("ab"[k - 9] + ".pt", several / "path" / f"step-{k}.pt")
    done = losscli("barriers", "path", "-o", "-", "-q", "--points", 3)
    table = Table.from_csv(io.StringIO(done.stdout, newline=""), "stdout")
    assert {(r["a"], r["b"]) for r in table.records()} == {("path/step-9.pt", "path/step-10.pt")}


def test_a_dry_run_counts_and_evaluates_nothing(several: Path, losscli: Losscli) -> None:
    before = sorted(several.iterdir())
    names = ("a.pt", "b.pt", "c.pt", "d.pt")
    done = losscli("barriers", *names, "--dry-run", "--json")
    plan = json.loads(done.stdout)
    # Each of the four once, and six lines of nine points between their ends, a pass each.
    assert (plan["pairs"], plan["points"], plan["passes_over_data"]) == (6, 4 + 6 * 9, 4 + 6)
    assert plan["forward_passes"] == (4 + 6 * 9) * 40
    text = losscli("barriers", *names, "--dry-run")
    assert text.status == 0
    assert "pairs        6\n" in text.stdout
    assert sorted(several.iterdir()) == before


@pytest.mark.usefixtures("unlaid")
def test_plot_draws_the_same_bytes_again(several: Path, losscli: Losscli) -> None:
    state = torch.load("b.pt", weights_only=True)
    state["state_dict"]["layers.0.bias"][0] = math.nan
    torch.save(state, "bad.pt")
    done = losscli("barriers", "a.pt", "bad.pt", "c.pt", "-o", "out", "--log", "--split", "test")
    assert done.status == 0
    assert "not known" in done.stdout
    done = losscli("plot", "out.csv", "-o", "again", "--log")
    assert done.status == 0
    assert (several / "again.png").read_bytes() == (several / "out.png").read_bytes()


ERRORS = [
    (("barriers", "a.pt"), 2, "needs two checkpoints or more, and got 1"),
    (("barriers", "a.pt", "b.pt", "a.pt"), 2, "a.pt is given 2 times"),
    (("barriers", "a.pt", "b.pt", "--points", 2), 2, "--points 2 leaves no point between"),
    (("barriers", "a.pt", "missing.pt"), 1, "there is no checkpoint missing.pt"),
    (("barriers", "a.pt", "other.pt"), 1, "other.pt does not fit the model"),
    (("barriers", "a.pt", "b.pt", "--metric", "metrics.py:a"), 2, "is that of another column"),
    (("plot", "out.curves.csv"), 1, "is not a table that losscli can draw"),
    (("plot", "out.csv", "out.csv"), 2, "matrices cannot be overlaid"),
    (("plot", "out.csv", "--terminal"), 2, "--terminal draws only tables of interpolate"),
]


@pytest.mark.parametrize(("command", "status", "words"), ERRORS)
def test_errors_are_one_line_and_write_nothing(
    command: tuple[object, ...], status: int, words: str, folder: Path, losscli: Losscli
) -> None:
    torch.save(MLP("3-2").state_dict(), "other.pt")
    Path("metrics.py").write_text("def a(outputs, targets):\n    return targets.float()\n")
    if command[0] == "plot":
        made = losscli("barriers", "a.pt", "b.pt", "-o", "out", "--no-figure", "--points", 3, "-q")
        assert made.status == 0
    before = sorted(folder.iterdir())
    done = losscli(*command)
    assert done.status == status
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout
    assert sorted(folder.iterdir()) == before
