"""Averages of checkpoints: soup and export --weights."""

from __future__ import annotations

import json
import math
import statistics
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import losscli as library
from losscli.cli.soup import report
from losscli.errors import ChangedError, OutputError, UsageError
from losscli.models import CNN, MLP
from losscli.results.result import Output, to_json
from losscli.studies.export import parse_weights
from losscli.table import Table
from tests.benchmarks.__main__ import peak
from tests.cases import sample
from tests.checkpoint.test_adapters import adapt, mlp
from tests.conftest import Losscli
from tests.studies.test_inspection import batchnorm, bits, is_refused, state


@pytest.fixture
def three(folder: Path) -> list[str]:
    torch.manual_seed(2)
    torch.save({"state_dict": MLP("6-5-3").state_dict()}, "c.pt")
    return ["a.pt", "b.pt", "c.pt"]


# --- soup ----------------------------------------------------------------------------------------


def test_a_soup_is_the_mean_in_float64_rounded_once(losscli: Losscli, three: list[str]) -> None:
    done = losscli("soup", *three, "-o", "s.safetensors")
    assert (done.status, done.stdout, done.stderr) == (0, "s.safetensors\n", "")
    found, states = load_file("s.safetensors"), [state(name) for name in three]
    assert found.keys() == states[0].keys()
    for name, tensor in found.items():
        columns = zip(*(s[name].double().flatten().tolist() for s in states), strict=True)
        means = torch.tensor([math.fsum(column) / 3 for column in columns]).float()
        assert torch.equal(tensor.flatten(), means)
    assert library.soup(three).metadata["losscli.model"] == "mlp:6-5-3"


def test_a_device_of_the_environment_needs_no_model(
    losscli: Losscli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOSSCLI_DEVICE", "cpu")
    for seed in range(2):
        save_file({"w": torch.full((2,), float(seed))}, f"{seed}.safetensors")
    assert losscli("soup", "0.safetensors", "1.safetensors", "-o", "s.safetensors").status == 0
    assert load_file("s.safetensors")["w"].tolist() == [0.5, 0.5]


def test_a_soup_of_a_folder_is_that_of_its_files(three: list[str], folder: Path) -> None:
    (folder / "run").mkdir()
    for name in three:
        (folder / name).rename(folder / "run" / name)
    found = library.soup("run").weights
    expected = library.soup([f"run/{name}" for name in three]).weights
    assert all(bits(found[name]) == bits(expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_soup_of_two_is_the_middle_of_the_line(dtype: torch.dtype, tmp_path: Path) -> None:
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        tensor = torch.randn(101, 7, generator=generator, dtype=torch.float64).to(dtype)
        save_file({"w": tensor, "n": torch.tensor([seed])}, tmp_path / f"{seed}.safetensors")
    files = [tmp_path / f"{seed}.safetensors" for seed in range(2)]
    found, middle = library.soup(files).weights, library.export(*files, 0.5).weights
    assert all(bits(found[name]) == bits(middle[name]) for name in middle)
    assert found["w"].dtype == dtype


def test_a_soup_of_adapters_is_that_of_the_whole_models(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    save_file(mlp().state_dict(), tmp_path / "base" / "model.safetensors")
    names = [tmp_path / "base"]
    wholes = [mlp().state_dict()]
    for k in (1, 2):
        (tmp_path / str(k)).mkdir()
        wholes.append(adapt(mlp(), tmp_path / str(k), seed=k, r=2, target_modules=["layers.0"]))
        names.append(tmp_path / str(k))
    found = library.soup(names).weights
    assert found.keys() == wholes[0].keys()
    for name, tensor in found.items():
        mean = sum(whole[name].double() for whole in wholes) / 3
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-7)


@pytest.mark.stress
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_bounded_by_three_files(dtype: torch.dtype, tmp_path: Path) -> None:
    """The size of GPT-2 with 124 million parameters, whose largest tensor has 38 million."""
    files = [str(tmp_path / f"{k}.safetensors") for k in range(5)]
    for k, file in enumerate(files):
        tensors = {f"w{i}": torch.full((7_000_000,), k + i / 9, dtype=dtype) for i in range(12)}
        save_file({**tensors, "words": torch.ones(50257, 768, dtype=dtype)}, file)
    out = str(tmp_path / "soup.safetensors")
    done = peak([sys.executable, "-m", "losscli", "soup", *files, "-o", out])
    used = done - peak([sys.executable, "-c", "import torch"])
    assert used < 3 * Path(files[0]).stat().st_size


def normalised(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(spectral_norm(nn.Linear(4, 5)), nn.ReLU(), nn.Linear(5, 3))


def test_a_soup_of_identical_files_is_the_file(tmp_path: Path) -> None:
    states = {"batchnorm": batchnorm(5), "spectral": normalised(1).state_dict()}
    for kind, tensors in states.items():
        files = [tmp_path / f"{kind}-{k}.pt" for k in range(3)]
        for file in files:
            torch.save(tensors, file)
        found = library.soup(files).weights
        assert list(found) == list(tensors)
        assert all(bits(found[name]) == bits(tensors[name]) for name in tensors)


def test_singular_vectors_are_those_of_the_averaged_weights(tmp_path: Path) -> None:
    files = [tmp_path / f"{seed}.pt" for seed in range(3)]
    for seed, file in enumerate(files):
        torch.save(normalised(seed).state_dict(), file)
    model = normalised(9)
    model.load_state_dict(dict(library.soup(files).weights))
    weight = model.eval()[0].weight.detach()
    assert float(torch.linalg.svdvals(weight)[0]) == pytest.approx(1, abs=1e-5)


def test_a_count_of_batches_in_only_one_file_is_kept(tmp_path: Path) -> None:
    files = [tmp_path / f"{seed}.pt" for seed in range(3)]
    for seed, file in enumerate(files):
        tensors = batchnorm(seed)
        if seed != 1:
            del tensors["norms.0.num_batches_tracked"]
        torch.save(tensors, file)
    found = library.soup(files).weights
    assert int(found["norms.0.num_batches_tracked"]) == 1


def test_a_file_that_changes_is_refused(three: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from losscli.studies import export

    def changing(points: list[object], shares: object) -> dict[str, Tensor]:
        torch.save(state("a.pt"), "c.pt")
        points[-1]()  # type: ignore[operator]
        raise AssertionError

    monkeypatch.setattr(export, "average", changing)
    with pytest.raises(ChangedError, match=r"c\.pt was changed while losscli read it"):
        library.soup(three)


REFUSED = {
    "one": ("soup a.pt", 2, "soup needs two checkpoints or more, and got 1"),
    "twice": ("soup a.pt b.pt a.pt", 2, "a.pt is given 2 times. Give each checkpoint once"),
    "absent": ("soup a.pt absent.pt", 1, "absent.pt"),
    "another model": ("soup a.pt other.pt", 1, "other.pt does not fit a.pt"),
    "a folder": ("soup a.pt b.pt -o .", 2, "--out '.' is a folder"),
    "exists": ("soup a.pt b.pt -o a.pt", 1, "a.pt exists"),
    "no suffix": ("soup a.pt b.pt -o x.csv", 2, "x.csv is not the name of a safetensors file"),
    # export
    "count": ("export a.pt b.pt --weights 1-0-0", 2, "3 weights for 2 checkpoints"),
    "sum": (
        "export a.pt b.pt --weights 0.3-0.3",
        2,
        "the sum of the weights is 0.6, and must be 1. A weight may be a fraction, such as 1/3",
    ),
    "no numbers": ("export a.pt b.pt --weights 1,0", 2, "--weights 1,0 is not a list of numbers"),
    "by zero": ("export a.pt b.pt --weights 1/0-1", 2, "--weights 1/0-1 divides by zero"),
    "one with weights": (
        "export a.pt --weights 1",
        2,
        "an average needs two checkpoints or more, and got 1",
    ),
    "three for a line": (
        "export a.pt b.pt c.pt --alpha 0.5",
        2,
        "--alpha needs two checkpoints, A and B, and got 3. For an average of several give",
    ),
    "both": (
        "export a.pt b.pt --alpha 0.5 --weights 1-0",
        2,
        "--alpha and --weights contradict each other",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_do_not_make_an_average_are_refused(
    case: str, losscli: Losscli, folder: Path, three: list[str]
) -> None:
    line, status, message = REFUSED[case]
    torch.save(MLP("6-4-3").state_dict(), "other.pt")
    out = [] if " -o " in line else ["-o", "y.safetensors"]
    is_refused(losscli, folder, [*line.split(), *out], status, message)


# --- export --weights ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.5-0.3-0.2", (0.5, 0.3, 0.2)),
        ("1/3-1/3-1/3", (1 / 3, 1 / 3, 1 / 3)),
        ("1.5--0.5-0", (1.5, -0.5, 0.0)),
        ("1e-3-9.99e-1-.0", (1e-3, 0.999, 0.0)),
        ("-1--1-3", (-1.0, -1.0, 3.0)),
    ],
)
def test_weights_are_read_from_text(text: str, expected: tuple[float, ...]) -> None:
    assert parse_weights(text, 3) == expected


@pytest.mark.parametrize("text", ["", "-", "1-", "1--", "1+0", "nan-1", "inf-1", "1 - 0", "1-0x"])
def test_text_that_is_not_weights_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a list of numbers.*such as 1/2-1/2"):
        parse_weights(text, 2)


def test_a_weighted_average_is_the_sum_in_float64(losscli: Losscli, three: list[str]) -> None:
    done = losscli("export", *three, "--weights", "0.5-0.7--0.2", "-o", "w.safetensors")
    assert (done.status, done.stdout) == (0, "w.safetensors\n")
    found, states = load_file("w.safetensors"), [state(name).items() for name in three]
    for (name, a), (_, b), (_, c) in zip(*states, strict=True):
        expected = 0.5 * a.double() + 0.7 * b.double() - 0.2 * c.double()
        torch.testing.assert_close(found[name].double(), expected, rtol=2**-24, atol=1e-15)
    again = library.export(three, weights=[0.5, 0.7, -0.2]).weights
    assert all(bits(again[name]) == bits(found[name]) for name in found)


def test_the_corners_of_an_average_are_its_files(tmp_path: Path) -> None:
    files = [tmp_path / f"{seed}.pt" for seed in range(3)]
    for seed, file in enumerate(files):
        torch.save(normalised(seed).state_dict(), file)
    for k, file in enumerate(files):
        found = library.export(files, weights=[float(j == k) for j in range(3)]).weights
        expected = torch.load(file, weights_only=True)
        assert all(bits(found[name]) == bits(expected[name]) for name in expected)


def test_misuse_of_export_in_python_is_refused(three: list[str]) -> None:
    for arguments, options in (
        (three, {"weights": [1, 0, 0], "alpha": 0.5}),
        (three, {"weights": "1-0-0"}),
        (three, {}),
        ("a.pt", {"alpha": 0.5}),
        (None, {}),
        (None, {"plane": "p.csv"}),
        (None, {"at": (0, 0)}),
        (three, {"plane": "p.csv", "at": (0, 0)}),
        (None, {"plane": "p.csv", "at": (0, 0), "t": 0.5}),
        (None, {"plane": "p.csv", "at": 0}),
        (three, {"weights": [1, 0, 0], "model": "mlp:6-5-3"}),
    ):
        with pytest.raises(UsageError):
            library.export(arguments, **options)  # type: ignore[call-overload]


# --- soup --greedy -------------------------------------------------------------------------------


@pytest.fixture
def relatives(folder: Path) -> list[str]:
    """Five checkpoints around one: some averages of them are better than others."""
    start = state("a.pt")
    for k in range(5):
        generator = torch.Generator().manual_seed(k)
        near = {
            name: tensor + 0.3 * (1 + k % 3) * torch.randn(tensor.shape, generator=generator)
            for name, tensor in start.items()
        }
        torch.save({"state_dict": near, "losscli.model": "mlp:6-5-3"}, f"{k}.pt")
    return [f"{k}.pt" for k in range(5)]


def losses_by_hand(tensors: dict[str, Tensor], score: str) -> list[float]:
    data = np.load("data.npz")
    model = MLP("6-5-3").double()
    model.load_state_dict(tensors)
    outputs = model(torch.tensor(data["test_inputs"]).double())
    targets = torch.tensor(data["test_targets"])
    if score == "accuracy":
        return [float(int(row.argmax()) == int(t)) for row, t in zip(outputs, targets, strict=True)]
    return [
        float(row[t] - row.logsumexp(0)) for row, t in zip(outputs.detach(), targets, strict=True)
    ]


def greedy_by_hand(names: list[str], score: str) -> tuple[list[tuple[str, int, float, float]], Any]:
    """The search as a plain loop in float64, on weights in float32 as they are stored."""

    def average(kept: list[str]) -> dict[str, Tensor]:
        states = [state(name) for name in kept]
        return {n: (sum(s[n].double() for s in states) / len(kept)).float() for n in states[0]}

    own = {name: statistics.fmean(losses_by_hand(state(name), score)) for name in names}
    first, *others = sorted(names, key=lambda name: -own[name])
    kept, best = [first], losses_by_hand(state(first), score)
    rows = [(first, 1, own[first], math.nan)]
    for name in others:
        scores = losses_by_hand(average([*kept, name]), score)
        mean = statistics.fmean(scores)
        differences = [x - y for x, y in zip(scores, best, strict=True)]
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        keep = mean >= statistics.fmean(best)
        rows.append((name, int(keep), mean, error))
        if keep:
            kept, best = [*kept, name], scores
    return rows, average(kept)


@pytest.mark.usefixtures("unlaid")
@pytest.mark.parametrize("score", ["", "accuracy"])
def test_a_greedy_soup_is_that_of_a_plain_loop(
    score: str, losscli: Losscli, relatives: list[str]
) -> None:
    options = ["--greedy", "test", "--dtype", "float64", *(["--metric", score] if score else [])]
    done = losscli("soup", *relatives, "-o", "s.safetensors", *options)
    assert done.status == 0, done.stderr
    assert done.stderr.endswith("note: wrote s.safetensors, s.csv, s.png, s.json\n")
    rows, weights = greedy_by_hand(relatives, score)
    table = Table.read(Path("s.csv"))
    assert table.columns == ("step", "checkpoint", "kept", "score", "score_stderr")
    assert {row[1] for row in rows} == {0, 1}
    for step, (row, expected) in enumerate(zip(table.rows, rows, strict=True)):
        assert row[:3] == (step, *expected[:2])
        assert row[3] == pytest.approx(expected[2], rel=1e-12)
        error = math.nan if row[4] is None else row[4]
        assert error == pytest.approx(expected[3], rel=1e-9, nan_ok=True)
    found = load_file("s.safetensors")
    assert all(bits(found[name]) == bits(tensor) for name, tensor in weights.items())
    kept = [row[0] for row in rows if row[1]]
    plain = library.soup(kept).weights
    assert all(bits(found[name]) == bits(plain[name]) for name in plain)
    split = json.loads(Path("s.json").read_text())["splits"]["test"]
    assert split["kept"] == kept
    assert split["soup"] >= max(split["checkpoints"])
    assert f"{len(kept)} of 5 checkpoints kept" in done.stdout
    assert losscli("plot", "s.csv", "--figure", "again.png").status == 0
    assert Path("again.png").read_bytes() == Path("s.png").read_bytes()


def test_a_gain_within_two_standard_errors_is_called_insignificant(relatives: list[str]) -> None:
    result = library.soup(relatives[:2], greedy="test")
    for kept, gain, error, marked in (
        (["0.pt", "1.pt"], 0.1, 0.06, True),
        (["0.pt", "1.pt"], 0.1, 0.04, False),
        (["0.pt"], 0.0, 0.0, False),
    ):
        result.summary["splits"]["test"].update(kept=kept, gain=gain, gain_stderr=error)
        text = report(result)
        assert "above the best checkpoint" in text
        assert text.endswith("above the best checkpoint (not significantly)\n") is marked


def wrong(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(1) != targets).float()


def test_a_metric_where_lower_is_better_gives_its_negative_as_score(relatives: list[str]) -> None:
    wrong.higher_is_better = False  # type: ignore[attr-defined]
    found, expected = (
        library.soup(relatives, greedy="test", metric=metric) for metric in (wrong, "accuracy")
    )
    assert found.table["kept"] == expected.table["kept"]
    assert found.table.floats("score") == pytest.approx(
        [score - 1 for score in expected.table.floats("score")], rel=1e-12
    )
    assert "metrics  wrong (" in report(found)
    assert "score    −wrong on test" in report(found)
    assert "score    accuracy on test" in report(expected)


def test_the_score_of_a_perplexity_is_its_negative_logarithm() -> None:
    tokens = torch.arange(12).reshape(3, 4) % 5
    states = [{"weight": factor * torch.eye(5)} for factor in (1, 2)]
    result = library.soup(
        states,
        model=lambda: nn.Embedding(5, 5),
        data={"all": (tokens, tokens)},
        loss="causal_lm",
        metric="perplexity",
        greedy="all",
    )
    losses = [
        nn.functional.cross_entropy(state["weight"][tokens[:, :-1]].mT, tokens[:, 1:])
        for state in states
    ]
    assert result.table["score"][0] == pytest.approx(-float(min(losses)), rel=1e-6)
    assert "score    −log perplexity on all" in report(result)


@pytest.mark.usefixtures("unlaid")
def test_a_result_saves_what_the_command_line_writes(
    losscli: Losscli, relatives: list[str]
) -> None:
    assert losscli("soup", *relatives, "--greedy", "test", "-o", "cli.safetensors").status == 0
    result = library.soup(relatives, greedy="test")
    result.save("py")
    for suffix in (".csv", ".png", ".safetensors"):
        assert Path(f"py{suffix}").read_bytes() == Path(f"cli{suffix}").read_bytes()
    loaded = library.load("py")
    assert loaded.table == result.table
    assert to_json(loaded.summary) == to_json(result.summary)
    with pytest.raises(OutputError, match=r"py\.safetensors exists"):
        result.save("py")
    # The same run may be repeated; another needs --force.
    assert losscli("soup", *relatives, "--greedy", "test", "-o", "cli.safetensors").status == 0
    other = ["soup", *relatives[1:], "--greedy", "test", "-o", "cli.safetensors"]
    done = losscli(*other)
    assert (done.status, done.stdout) == (1, "")
    assert "cli.csv contains the results of another run" in done.stderr
    assert losscli(*other, "--force", "--json").status == 0


def test_a_greedy_soup_takes_objects_too(relatives: list[str]) -> None:
    data = {"held": (torch.rand(9, 6), torch.arange(9) % 3)}
    states = [state(name) for name in relatives]
    done: list[float] = []
    options = {"model": MLP("6-5-3"), "data": data, "greedy": "held", "progress": done.append}
    result = library.soup(states, **options)
    named = library.soup(relatives, **{**options, "progress": None})
    assert result.table["score"] == named.table["score"]
    assert result.table["kept"] == named.table["kept"]
    assert done[-1] == 9
    assert all(
        bits(result.checkpoint.weights[name]) == bits(named.checkpoint.weights[name])
        for name in states[0]
    )


def test_only_the_chosen_tensors_are_averaged(relatives: list[str]) -> None:
    found = library.soup(
        relatives, data={"x": (torch.rand(4, 6), torch.arange(4) % 3)}, only="*bias"
    )
    whole, first = library.soup(relatives), state(relatives[0])
    for name, tensor in found.weights.items():
        expected = whole.weights[name] if name.endswith("bias") else first[name]
        assert bits(tensor) == bits(expected)


def test_a_dry_run_writes_nothing(losscli: Losscli, relatives: list[str], folder: Path) -> None:
    before = sorted(folder.iterdir())
    done = losscli("soup", *relatives, "--greedy", "test", "-o", "s.safetensors", "--dry-run")
    assert done.status == 0
    assert "points       9" in done.stdout
    assert sorted(folder.iterdir()) == before


def test_statistics_are_re_estimated_where_asked(losscli: Losscli, folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(40, 1, 6, 6, generator=generator)
    arrays = {"train_inputs": inputs, "train_targets": torch.arange(40) % 3}
    np.savez("images.npz", **{name: tensor.numpy() for name, tensor in arrays.items()})
    for seed in (1, 2):
        torch.save(batchnorm(seed), f"bn{seed}.pt")
    files, model = ["bn1.pt", "bn2.pt"], CNN("3", channels=1, classes=3, batchnorm=True)
    done = losscli("soup", *files, "-o", "mean.safetensors")
    assert "BatchNorm's statistics are averages; --buffers recalibrate" in done.stderr
    spec = ["-m", "cnn:3,channels=1,classes=3,batchnorm=true", "-d", "npz:images.npz"]
    again = ["--buffers", "recalibrate", "-o", "new.safetensors"]
    done = losscli("soup", *files, *spec, *again)
    assert (done.status, done.stderr) == (0, "")
    mean, new = load_file("mean.safetensors"), load_file("new.safetensors")
    model.load_state_dict(mean)
    torch.optim.swa_utils.update_bn([inputs], model)
    expected = model.state_dict()
    changed = {name for name in new if not torch.equal(new[name], mean[name])}
    assert changed == {"norms.0.running_mean", "norms.0.running_var"}
    for name in changed:
        torch.testing.assert_close(new[name], expected[name], rtol=1e-5, atol=1e-6)


GREEDY = {
    "no split": ("--greedy val", 2, "val"),
    "a split twice": ("--greedy test --split train", 2, ": --split has no effect"),
    "a sample": ("--greedy test --sampling-error 0.1", 2, "--sampling-error has no effect"),
    "no search": ("--figure x.png", 2, "--figure has no effect without --greedy. Leave it out"),
    "no json": ("--json", 2, "--json has no effect without --greedy"),
}


@pytest.mark.parametrize("case", GREEDY)
def test_invalid_options_of_a_search_are_refused(
    case: str, losscli: Losscli, folder: Path, three: list[str]
) -> None:
    options, status, message = GREEDY[case]
    command = ["soup", *three, *options.split(), "-m", "mlp:6-5-3", "-o", "y.safetensors"]
    is_refused(losscli, folder, command, status, message)


@pytest.mark.usefixtures("unseen")
def test_a_checkpoint_without_a_finite_score_is_not_kept(
    losscli: Losscli, three: list[str]
) -> None:
    broken = {name: torch.full_like(tensor, math.nan) for name, tensor in state("a.pt").items()}
    for name in ("nan.pt", "nan2.pt"):
        torch.save({"state_dict": broken, "losscli.model": "mlp:6-5-3"}, name)
    line = ["--greedy", "test", "-o", "y.safetensors"]
    done = losscli("soup", "nan.pt", "nan2.pt", *line)
    assert (done.status, done.stdout) == (1, "")
    assert "no checkpoint has a finite score on test" in done.stderr
    assert not Path("y.csv").exists()
    assert not Path("y.safetensors").exists()
    assert losscli("soup", "nan.pt", *three, *line).status == 0
    assert Table.read(Path("y.csv")).where("checkpoint", "nan.pt")["kept"] == [0]


def test_a_file_to_write_is_needed(losscli: Losscli, folder: Path, three: list[str]) -> None:
    message = "soup needs a file to write. Give -o X.safetensors"
    for out in ([], ["-o", "-"], ["-o", "-", "--greedy", "test"]):
        is_refused(losscli, folder, ["soup", *three, *out], 2, message)


@pytest.mark.usefixtures("unlaid")
def test_a_killed_search_is_resumed(
    losscli: Losscli, relatives: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["soup", *relatives, "--greedy", "test", "-o"]
    assert losscli(*line, "whole.safetensors").status == 0
    # Broken off when the checkpoint is written and the table is not.
    with monkeypatch.context() as patch:
        patch.setattr(Output, "save", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert losscli(*line, "s.safetensors").status == 130
    assert Path("s.safetensors").exists()
    assert not Path("s.csv").exists()
    done = losscli(*line, "s.safetensors")
    assert done.status == 0
    assert "resuming from s.journal" in done.stderr
    for suffix in (".csv", ".safetensors", ".png"):
        assert Path(f"s{suffix}").read_bytes() == Path(f"whole{suffix}").read_bytes()


# --- tied tensors --------------------------------------------------------------------------------


class Shared(nn.Module):
    """A tied weight, and one BatchNorm under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6, bias=False)
        self.norm = nn.BatchNorm1d(6)
        self.again = self.norm
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.again(self.second(self.norm(self.first(x)).tanh()))
        return outputs


@pytest.mark.parametrize(
    ("which", "buffers"),
    sample(product(("soup", "greedy", "plane"), ("interpolate", "recalibrate")), 1, 2),
)
def test_all_names_of_a_tied_tensor_are_written(which: str, buffers: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    names = [str(tmp_path / f"{k}.pt") for k in range(3)]
    for name in names:
        torch.save({"state_dict": Shared().state_dict()}, name)
    data = {"train": (torch.rand(12, 6), torch.arange(12) % 6)}
    options: dict[str, Any] = {"model": Shared(), "data": data, "buffers": buffers}
    if which == "plane":
        library.plane(names, points=2, **options).save(tmp_path / "p", no_figure=True)
        point = library.export(plane=tmp_path / "p.csv", at=(0.5, 0.5), model=Shared(), data=data)
    elif which == "greedy":
        point = library.soup([*names, state(names[0])], greedy="train", **options).checkpoint
    else:
        point = library.soup(names, **options)
    weights, first = point.weights, state(names[0])
    assert weights.keys() == first.keys()
    if which != "greedy":
        assert not torch.equal(weights["first.weight"], first["first.weight"])
    pairs = [("first.weight", "second.weight")]
    pairs += [(name, f"again.{name[5:]}") for name in first if name.startswith("norm.")]
    assert all(torch.equal(weights[a], weights[b]) for a, b in pairs)
    point.save(tmp_path / "x.safetensors")
    assert library.interpolate(tmp_path / "x.safetensors", names[1], points=2, **options).table.rows


# --- export --plane ------------------------------------------------------------------------------


def loss_by_hand(tensors: dict[str, Tensor]) -> float:
    return -statistics.fmean(losses_by_hand(tensors, ""))


PLANES = {
    "points": ["a.pt", "b.pt", "c.pt", "--path", "0.pt"],
    "pca": ["a.pt", "b.pt", "c.pt", "0.pt", "1.pt", "--pca", "--keep-order"],
    "random": ["a.pt", "--seed", "3"],
    "chosen": ["a.pt", "b.pt", "c.pt", "--only", "layers.1*"],
}


@pytest.mark.parametrize("case", sample(PLANES, 1, 2))
def test_a_point_of_a_plane_has_its_loss(
    case: str, losscli: Losscli, three: list[str], relatives: list[str]
) -> None:
    save = ["--points", "3", "-o", "p", "--no-figure"]
    assert losscli("plane", *PLANES[case], *save).status == 0
    table = Table.read(Path("p.csv")).where("split", "test")
    for row in table.records()[::4]:
        at = [f"{row['x']}", f"{row['y']}"]
        line = ["export", "--plane", "p.csv", "--at", *at, "-o", "x.safetensors", "--force"]
        done = losscli(*line)
        assert (done.status, done.stdout) == (0, "x.safetensors\n"), done.stderr
        found = load_file("x.safetensors")
        assert loss_by_hand(found) == pytest.approx(row["loss"], rel=1e-5)
    if case == "chosen":
        first = state("a.pt")
        same = {name for name in found if torch.equal(found[name], first[name])}
        assert same == {name for name in found if not name.startswith("layers.1")}


def test_the_corners_of_a_plane_are_its_checkpoints(losscli: Losscli, three: list[str]) -> None:
    assert losscli("plane", *three, "--points", "2", "-o", "p", "--no-figure").status == 0
    rows = Table.read(Path("p.path.csv")).where("split", "test").records()
    for row, name in zip(rows, three, strict=True):
        line = ["--at", str(row["x"]), str(row["y"]), "-o", "x.safetensors", "--force"]
        assert losscli("export", "--plane", "p.csv", *line).status == 0
        point = load_file("x.safetensors")
        assert all(bits(point[n]) == bits(tensor) for n, tensor in state(name).items())


def test_a_point_of_a_plane_has_the_widest_type(losscli: Losscli, three: list[str]) -> None:
    half = {name: tensor.bfloat16() for name, tensor in state("a.pt").items()}
    torch.save({"state_dict": half, "losscli.model": "mlp:6-5-3"}, "a.pt")
    assert losscli("plane", *three, "--points", "2", "-o", "p", "--no-figure").status == 0
    row = Table.read(Path("p.csv")).where("split", "test").records()[-1]
    at = ["--at", str(row["x"]), str(row["y"]), "-o", "x.safetensors"]
    assert losscli("export", "--plane", "p.csv", *at).status == 0
    found = load_file("x.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert loss_by_hand(found) == pytest.approx(row["loss"], rel=1e-5)


OFF_PLANE = {
    "no point": ("--plane p.csv", 2, "--plane is given without --at"),
    "no plane": ("--at 1 2 a.pt b.pt --alpha 1", 2, "--at is given without --plane"),
    "names": ("a.pt --plane p.csv --at 1 2", 2, "so a.pt has no effect"),
    "a model": (
        "a.pt b.pt --alpha 1 -m mlp:6-5-3",
        2,
        "--model has no effect without --plane. Leave it out",
    ),
    "infinite": ("--plane p.csv --at inf 0", 2, "--at inf 0.0 is not a point of the plane"),
    "another table": ("--plane l.csv --at 0 0", 2, "--plane l.csv is not a table of plane"),
    "alone": ("--plane alone.csv --at 0 0", 1, "alone.csv has no summary alone.json next to it"),
    "another model": (
        "--plane p.csv --at 0 0 -m mlp:6-5-3,activation=tanh",
        1,
        "p.csv is of the model mlp:6-5-3, not of mlp:6-5-3,activation=tanh. Give --model mlp:6-5-3",
    ),
    "eigenvectors": ("--plane h.csv --at 0 0", 2, "the axes of h.csv are eigenvectors"),
    "changed": ("--plane p.csv --at 0 0", 1, "b.pt has changed since p.csv was written"),
}


@pytest.fixture
def planes(losscli: Losscli, folder: Path, three: list[str]) -> Path:
    out = ["--points", "2", "--no-figure", "-o"]
    assert losscli("plane", *three, *out, "p").status == 0
    assert losscli("interpolate", "a.pt", "b.pt", *out, "l").status == 0
    Path("alone.csv").write_bytes(Path("p.csv").read_bytes())
    Path("h.csv").write_bytes(Path("p.csv").read_bytes())
    summary = json.loads(Path("p.json").read_text())
    Path("h.json").write_text(json.dumps({**summary, "plane": "hessian"}))
    return folder


def test_an_invalid_point_of_a_plane_is_refused(losscli: Losscli, planes: Path) -> None:
    for case, (line, status, message) in OFF_PLANE.items():
        if case == "changed":
            torch.save({"state_dict": MLP("6-5-3").state_dict()}, "b.pt")
        command = ["export", *line.split(), "-o", "y.safetensors"]
        is_refused(losscli, planes, command, status, message)
