"""Averages of checkpoints: soup and export --weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import losscli as library
from losscli.errors import ChangedError, UsageError
from losscli.models import MLP
from losscli.studies.export import parse_weights
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


def test_a_count_of_batches_that_one_file_alone_has_is_kept(tmp_path: Path) -> None:
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
    "twice": ("soup a.pt b.pt a.pt", 2, "a.pt is named 2 times. Name each checkpoint once"),
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
def test_what_is_no_average_is_refused(
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
def test_other_text_is_no_weights(text: str) -> None:
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
    ):
        with pytest.raises(UsageError):
            library.export(arguments, **options)  # type: ignore[call-overload]
