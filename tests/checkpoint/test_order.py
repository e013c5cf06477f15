"""The order of a path: numbered files, the first, the last and the best, names from a shell."""

from __future__ import annotations

import csv
import io
import json
import random
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import losscli as library
from losscli.checkpoint import expand_folders, file_names, order_path
from losscli.errors import CheckpointError
from losscli.models import MLP
from tests.checkpoint.test_distributed import put
from tests.conftest import Losscli

STEPS = 12


def state(t: int) -> dict[str, torch.Tensor]:
    """A bent path: no step has the weights of another."""
    torch.manual_seed(0)
    a, b = MLP("6-5-3").state_dict(), MLP("6-5-3").state_dict()
    return {n: a[n] + t * b[n] + t * t * a[n].flip(0) / 10 for n in a}


def save(folder: Path, files: Mapping[str, int]) -> None:
    folder.mkdir(exist_ok=True)
    for name, t in files.items():
        torch.save({"net": state(t), "optimizer": {"x": torch.rand(3)}, "epoch": t}, folder / name)


NUMBERED = {f"step-{t}.pt": t for t in range(STEPS)}
ORDERED = [f"step-{t}.pt" for t in range(STEPS)]


@pytest.mark.parametrize(
    ("more", "expected", "notes"),
    [
        ({}, ORDERED, []),
        (
            {"last.pt": 11},
            ORDERED,
            ["last.pt is left out: it has the same weights as p/step-11.pt"],
        ),
        ({"last.pt": 40}, [*ORDERED, "last.pt"], []),
        # Not the last of the numbered files, but a copy of one of them.
        ({"final.pth": 3}, ORDERED, ["final.pth is left out: it has the same weights as p/step-3"]),
        ({"final.pt": 40}, [*ORDERED, "final.pt"], ["p/final.pt is taken last"]),
        (
            {"final_model.pt": 40, "last.ckpt": 40},
            [*ORDERED, "final_model.pt"],
            ["p/final_model.pt is taken last", "same weights as p/final_model.pt"],
        ),
        ({"best.pt": 40}, ORDERED, ["p/best.pt is left out: the best"]),
        ({"model_best.pth.tar": 5}, ORDERED, ["p/model_best.pth.tar is left out: the best"]),
        ({"best-epoch=3.pt": 5, "best_7.pt": 7}, ORDERED, ["p/best-epoch=3.pt, p/best_7.pt are"]),
        ({"init.pt": 20}, ["init.pt", *ORDERED], []),
        ({"xinit.pt": 20, "init.pt": 21}, ["init.pt", *ORDERED, "xinit.pt"], []),
        (
            {"zz.pt": 20, "initial-7.pt": 21},
            ["initial-7.pt", *ORDERED, "zz.pt"],
            [],
        ),
        (
            {"a.pt": 13, "init_.pt": 20, "last-v1.ckpt": 14, "best.pt": 5},
            ["init_.pt", "a.pt", *ORDERED, "last-v1.ckpt"],
            ["p/best.pt is", "p/init_.pt is taken first and p/last-v1.ckpt is taken last"],
        ),
    ],
)  # fmt: skip
def test_first_last_and_best_files_of_a_numbered_folder(
    more: dict[str, int],
    expected: list[str],
    notes: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    save(Path("p"), {**NUMBERED, **more})
    for name, key in (("p", ""), ("p#net", "#net"), ("p/", "")):
        found, told = order_path([name])
        assert found == [f"p/{file}{key}" for file in expected]
        if not key:
            for text in notes:
                assert any(text in note for note in told), (text, told)
            said = bool({"taken", "left"} & set(" ".join(told).split()))
            assert said or found == expand_folders([name])
    assert order_path(["p"], keep_order=True) == (expand_folders(["p"]), [])


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        # As fairseq, detectron2 and many scripts name them: the words stand elsewhere.
        (
            ["checkpoint1.pt", "checkpoint2.pt", "checkpoint10.pt", "checkpoint_best.pt",
             "checkpoint_last.pt"],
            ["checkpoint1.pt", "checkpoint2.pt", "checkpoint10.pt", "checkpoint_last.pt"],
        ),
        (
            ["model_0004999.pth", "model_0009999.pth", "model_final.pth"],
            ["model_0004999.pth", "model_0009999.pth", "model_final.pth"],
        ),
        # A number that all names share is not a number of a step.
        (
            ["resnet18-best.pt", "resnet18-init.pt", "resnet18-last.pt", "resnet18-e2.pt",
             "resnet18-e10.pt"],
            ["resnet18-init.pt", "resnet18-e2.pt", "resnet18-e10.pt", "resnet18-last.pt"],
        ),
        # A part of a word says nothing, and a number of its own says more than a word.
        (["blast.pt", "e1.pt", "e2-last.pt"], ["blast.pt", "e1.pt", "e2-last.pt"]),
        # Without numbered files nothing is left out.
        (["best.pt", "final.pt", "init.pt", "z.pt"], ["init.pt", "best.pt", "z.pt", "final.pt"]),
        (["last_1.pt", "last_2.pt", "last_10.pt"], ["last_1.pt", "last_2.pt", "last_10.pt"]),
        (["best_1.pt", "best_10.pt"], ["best_1.pt", "best_10.pt"]),
    ],
)  # fmt: skip
def test_names_of_other_tools_are_ordered_too(
    files: list[str], expected: list[str], tmp_path: Path
) -> None:
    save(tmp_path / "p", {name: t for t, name in enumerate(files)})
    found, _ = order_path([str(tmp_path / "p")])
    assert [Path(name).name for name in found] == expected


# The files of a folder in the order of training; those that are left out; what a note says.
FOLDERS: list[tuple[str, str, str]] = [
    # Decimals by their values, also those with as many digits.
    ("w_0.1.pt w_0.15.pt w_0.2.pt w_0.25.pt w_1.0.pt w_10.5.pt", "", ""),
    ("0.5.pt 0.75.pt 1.pt 1.5.pt 2.pt 10.pt", "", ""),
    ("alpha=0.05.ckpt alpha=0.10.ckpt alpha=0.50.ckpt", "", ""),
    ("e=1-loss=0.9.ckpt e=2-loss=0.25.ckpt e=10-loss=0.125.ckpt", "", ""),
    # Counted parts: no decimal ends in 0 where others are shorter; versions have two points.
    ("step_1.8.pt step_1.9.pt step_1.10.pt step_1.11.pt", "", ""),
    ("v1.2.9.pt v1.2.10.pt v1.10.0.pt", "", ""),
    # The name without the number is the latest.
    ("checkpoint_1.pth checkpoint_2.pth checkpoint_10.pth checkpoint.pth", "",
     "checkpoint.pth is taken last"),
    ("model-epoch2.pth model-epoch10.pth model.pth", "", "model.pth is taken last"),
    ("ckpt2.pt ckpt10.pt ckpt.pt", "", "ckpt.pt is taken last"),
    ("w_0.1.pt w_0.15.pt w.pt", "", "w.pt is taken last"),
    ("resnet18_2.pth resnet18_10.pth resnet18.pth", "", "resnet18.pth is taken last"),
    ("init.pt model_2.pt model_10.pt model.pt model_last.pt", "model_best.pt",
     "model.pt, p/model_last.pt are taken last"),
    # Other names are not, nor is one without numbered files.
    ("model.pt models_1.pt models_2.pt", "", ""),
    ("a.pt model.pt step_1.pt step_2.pt", "", ""),
    ("model.pt model_x.pt", "", ""),
    # Lightning writes name-v1.ckpt where name.ckpt is there already.
    ("last.ckpt last-v1.ckpt last-v2.ckpt last-v10.ckpt", "", ""),
    ("epoch=1-step=5.ckpt epoch=1-step=5-v1.ckpt epoch=2-step=9.ckpt last.ckpt last-v1.ckpt", "",
     ""),
    ("model.ckpt model-v1.ckpt model-v2.ckpt", "", ""),
    # A word may run into another of these, and not into any letters.
    ("bestiary_1.pt bestiary_2.pt", "", ""),
    ("bestiary_1.pt step_1.pt step_2.pt", "", ""),
    ("finale_1.pt lasting_1.pt step_1.pt", "", ""),
    ("e1.pt e2.pt lastmodel.pt", "bestmodel.pt bestAcc_7.pt model_best_2.pt", "best"),
    ("initial_weights.pt e1.pt e2.pt finalModel.pt", "BEST.pt", "taken first"),
    # A number that all names share, and that is the value of another one too.
    *(
        (" ".join(template.format(t) for t in steps), "", "")
        for template in ("seed1_epoch{}.pt", "model_v1_{}.pt", "lr0.1_epoch{}.pt", "resnet18_{}.pt",
                         "{}_of_180.pt")
        for steps in (range(13), (1, 2, 10), (1, 18, 180))
    ),
    ("seed1_epoch1.pt seed1_epoch10.pt seed1_last.pt", "seed1_best.pt", "best.pt is left out"),
    ("resnet18_1.pt resnet18_18.pt resnet18.pt", "", "resnet18.pt is taken last"),
    ("fold1_2.pt fold2_1.pt", "", ""),
    ("fold1_2-last.pt fold2_1-best.pt fold3_5.pt", "", ""),
    # Exponents by their values, where they are exponents.
    ("step-1e3.pt step-2e3.pt step-1e4.pt step-1.5e4.pt", "", ""),
    ("step-500.pt step-1e3.pt step-1500.pt step-2E+3.pt", "", ""),
    ("lr=1e-05_x.pt lr=2e-5_x.pt lr=1e-04_x.pt", "", ""),
    ("fold1e10.pt fold2e3.pt", "", ""),
    ("1e2_v1.9.pt 1e3_v1.9.pt 1e3_v1.10.pt", "", ""),
    # A metric before the epoch or the step.
    ("val_loss=0.9-epoch=1.ckpt val_loss=0.5-epoch=2.ckpt val_loss=0.7-epoch=10.ckpt last.ckpt", "",
     "in the order of epoch, and not in natural order"),
    ("epoch=1-val_loss=0.9.ckpt val_loss=0.5-epoch=2.ckpt epoch=3-val_loss=0.1.ckpt", "",
     "in the order of epoch"),
    ("acc0.9_epoch1_step5.pt acc0.3_epoch1_step9.pt acc0.2_epoch2_step2.pt", "",
     "in the order of epoch and step"),
    ("loss=0.9-global_step=500.pt loss=0.5-global_step=1e3.pt", "", "in the order of step"),
    ("loss_epoch=0.9-epoch=1.ckpt loss_epoch=0.5-epoch=2.ckpt", "", "in the order of epoch"),
    ("x=9-epoch=1.ckpt x=2-epoch=3.ckpt x=2-epoch=3-v1.ckpt", "", "in the order of epoch"),
    # Several trainings, and words that only end so.
    ("seed1_epoch1.pt seed1_epoch2.pt seed2_epoch1.pt seed2_epoch2.pt", "", ""),
    ("x1_timestep9.pt x2_timestep5.pt", "", ""),
    ("x1_epoch9.pt x2.pt x3_epoch1.pt", "", ""),
]  # fmt: skip


@pytest.mark.parametrize(("ordered", "left_out", "note"), FOLDERS)
def test_a_folder_is_put_into_the_order_of_training(
    ordered: str, left_out: str, note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [*ordered.split(), *left_out.split()]
    save(Path("p"), {name: t for t, name in enumerate(names)})
    found, notes = order_path(["p"])
    assert [Path(name).name for name in found] == ordered.split()
    assert note in " ".join(notes)
    for name in left_out.split():
        assert any(f"p/{name}" in told and "left out" in told for told in notes)
    assert (found == expand_folders(["p"])) == (not notes)


@pytest.mark.parametrize(
    ("ordered", "key"),
    [
        ("step-1e3.pt step-2e3.pt step-1e4.pt", "natural order"),
        ("val_loss=0.9-epoch=1.ckpt val_loss=0.5-epoch=2.ckpt", "the order of epoch"),
    ],
)
def test_names_that_a_shell_lists_are_sorted_by_what_a_folder_is(ordered: str, key: str) -> None:
    names = ordered.split()
    found, notes = order_path(sorted(names))
    assert found == names
    assert f"are taken in {key}: {', '.join(names)}. --keep-order keeps the order" in notes[0]
    assert order_path(sorted(names), keep_order=True) == (sorted(names), [])


def test_the_latest_without_a_number_is_left_out_if_it_equals_a_numbered_one(
    tmp_path: Path,
) -> None:
    save(tmp_path / "p", {"model_1.pt": 1, "model_2.pt": 2, "model.pt": 2})
    found, notes = order_path([str(tmp_path / "p")])
    assert [Path(name).name for name in found] == ["model_1.pt", "model_2.pt"]
    assert f"{tmp_path}/p/model.pt is left out: it has the same weights as" in notes[0]


def test_decimals_that_a_shell_lists_are_in_their_order() -> None:
    given = ["w_0.1.pt", "w_0.15.pt", "w_0.2.pt", "w_10.0.pt", "w_2.5.pt"]
    found, notes = order_path(given)
    assert found == [*given[:3], "w_2.5.pt", "w_10.0.pt"]
    assert "are taken in natural order" in notes[0]
    assert order_path(found) == (found, [])


@pytest.mark.parametrize("change", ["value", "type", "name", "shape"])
def test_a_last_file_is_left_out_only_if_every_weight_is_equal(change: str, tmp_path: Path) -> None:
    save(tmp_path / "p", NUMBERED)
    last = state(11)
    name = next(iter(last))
    if change == "value":
        last[name].view(-1)[-1] += 1e-6
    elif change == "type":
        last[name] = last[name].double()
    elif change == "name":
        last["other"] = last.pop(name)
    else:
        last[name] = last[name][None]
    torch.save({"net": last}, tmp_path / "p" / "last.pt")
    found, notes = order_path([str(tmp_path / "p")])
    assert len(found) == STEPS + 1
    assert Path(found[-1]).name == "last.pt"
    assert [note for note in notes if "left out" in note] == []


def test_folders_that_are_checkpoints_are_compared_too(tmp_path: Path) -> None:
    for name, t in {"checkpoint-500": 1, "checkpoint-1000": 2, "final": 2, "last": 3}.items():
        put({"model": state(t)}, tmp_path / name)
    found, notes = order_path([str(tmp_path)])
    names = [Path(name).name for name in found]
    assert names == ["checkpoint-500", "checkpoint-1000", "last"]
    assert "final is left out" in notes[0]


def test_a_truncated_last_file_is_reported(tmp_path: Path) -> None:
    save(tmp_path / "p", {**NUMBERED, "last.pt": 5})
    file = tmp_path / "p" / "last.pt"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"last\.pt"):
        order_path([str(tmp_path / "p")])


def shell(names: Sequence[str], folder: Path) -> list[str]:
    """The order in which a shell lists names."""
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    done = subprocess.run(
        ["bash", "-c", "printf '%s\\n' *"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


TEMPLATES = [
    "checkpoint-{}.pth.tar", "ckpt{}.pt", "epoch={}-step={}0-val_loss=0.5.ckpt", "{}.pt",
    "run2/step_{}.pt", "Model_{}-x.pt", "e{}/model.safetensors",
]  # fmt: skip


def letters(name: str) -> str:
    """What the locale en_US compares first."""
    return "".join(filter(str.isalnum, name)).lower()


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("steps", [range(12), [0, 1, 10, 100, 1000, 20, 3], [9, 10], range(3, 31)])
@pytest.mark.parametrize("order", [str, letters])
def test_names_in_the_order_of_a_shell_are_put_into_natural_order(
    order: Callable[[str], str], template: str, steps: Sequence[int]
) -> None:
    natural = [template.format(t, t) for t in sorted(steps)]
    given = sorted(natural, key=order)
    for before, after in (([], []), (["init:0"], []), (["start.pt"], ["end.pt"])):
        found, notes = order_path([*before, *given, *after])
        assert found == [*before, *natural, *after]
        assert bool(notes) == (given != natural)
        # In natural order already, or kept by choice: as given, and not a word.
        assert order_path([*before, *natural, *after]) == ([*before, *natural, *after], [])
        assert order_path([*before, *given, *after], keep_order=True) == (
            [*before, *given, *after],
            [],
        )


def test_files_listed_by_a_real_shell_are_put_into_natural_order(tmp_path: Path) -> None:
    natural = [f"ckpt{t}.pt" for t in range(1, 21)]
    found, notes = order_path(shell(natural, tmp_path / "there"))
    assert found == natural
    assert len(notes) == 1
    assert "natural order: ckpt1.pt, ckpt2.pt, ckpt3.pt and 17 more. --keep-order" in notes[0]


def test_a_chosen_order_is_kept() -> None:
    generator = random.Random(0)
    natural = [f"step-{t}.pt" for t in range(20)]
    for given in (natural[::-1], sorted(natural)[::-1], generator.sample(natural, 20)):
        assert order_path(given) == (given, [])
    # The order of words alone is no order of a shell.
    for given in (["start.pt", "middle.pt", "end.pt"], ["b.pt", "_a.pt"], ["a.pt", "B.pt"]):
        assert order_path(given) == (given, [])


def rows(table: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(table)))


def commands() -> list[tuple[str, list[str], str]]:
    return [
        ("trajectory", ["--no-surface"], "out.csv"),
        ("plane", ["--pca", "--points", "3"], "out.path.csv"),
        ("check", [], "out.csv"),
    ]


@pytest.mark.parametrize(("command", "options"), [case[:2] for case in commands()])
def test_a_dry_run_says_how_a_path_is_ordered(
    command: str, options: list[str], losscli: Losscli, folder: Path
) -> None:
    save(folder / "p", {"e2.pt": 2, "e10.pt": 10, "final.pt": 10, "init.pt": 0})
    dry = losscli(command, "p", *options, "-m", "mlp:6-5-3", "--dry-run")
    assert dry.status == 0, dry.stderr
    for text in ("p/final.pt is left out", "p/init.pt is taken first"):
        assert f"note: {text}" in dry.stderr


@pytest.mark.parametrize(
    ("command", "options", "table"),
    [*commands()[:2], pytest.param(*commands()[2], marks=pytest.mark.stress)],
)
def test_the_commands_that_take_a_path_order_it_and_say_so(
    command: str, options: list[str], table: str, losscli: Losscli, folder: Path
) -> None:
    files = {f"e{t}.pt": t for t in (1, 2, 10)}
    save(folder / "p", {**files, "final.pt": 10, "best.pt": 2, "init.pt": 0})
    arguments = [*options, "-m", "mlp:6-5-3", "--split", "test", "--no-figure", "-o", "out"]
    expected = ["p/init.pt", "p/e1.pt", "p/e2.pt", "p/e10.pt"]
    done = losscli(command, "p", *arguments)
    assert done.status == 0, done.stderr
    assert [row["checkpoint"] for row in rows(Path(table).read_text())] == expected
    for text in ("p/final.pt is left out", "p/best.pt is left out", "p/init.pt is taken first"):
        assert f"note: {text}" in done.stderr
        assert any(text in note for note in json.loads(Path("out.json").read_text())["notes"])
    # A shell's order, and the same kept: another run.
    given = ["p/e1.pt", "p/e10.pt", "p/e2.pt"]
    done = losscli(command, *given, *arguments, "--force")
    assert done.status == 0, done.stderr
    assert [row["checkpoint"] for row in rows(Path(table).read_text())] == expected[1:]
    assert "are taken in natural order: p/e1.pt, p/e2.pt, p/e10.pt" in done.stderr
    done = losscli(command, *given, *arguments, "--keep-order")
    assert done.status == 1
    assert "contains the results of another run" in done.stderr
    done = losscli(command, *given, *arguments, "--keep-order", "--force")
    assert done.status == 0, done.stderr
    assert [row["checkpoint"] for row in rows(Path(table).read_text())] == given
    assert "natural order" not in done.stderr
    done = losscli(command, "p", *arguments, "--keep-order", "--force")
    names = [row["checkpoint"] for row in rows(Path(table).read_text())]
    assert names == [f"p/{n}.pt" for n in ("best", "e1", "e2", "e10", "final", "init")]


def test_a_plane_without_a_path_has_no_order_to_keep(losscli: Losscli, folder: Path) -> None:
    done = losscli("plane", "a.pt", "--keep-order", "--points", 3, "-o", "out")
    assert (done.status, done.stdout) == (2, "")
    assert done.stderr == (
        "losscli: --keep-order has no effect without --pca or --path. Leave it out\n"
    )
    assert not list(folder.glob("out*"))


def test_barriers_are_those_of_a_set_which_is_taken_whole(losscli: Losscli, folder: Path) -> None:
    save(folder / "p", {"e1.pt": 1, "e2.pt": 2, "best.pt": 2, "last.pt": 5})
    done = losscli("barriers", "p", "-m", "mlp:6-5-3", "--points", 3, "-o", "-", "--split", "test")
    assert done.status == 0, done.stderr
    names = {row["a"] for row in rows(done.stdout)} | {row["b"] for row in rows(done.stdout)}
    assert names == {"p/best.pt", "p/e1.pt", "p/e2.pt", "p/last.pt"}
    assert "left out" not in done.stderr


@pytest.mark.parametrize(
    ("function", "times"),
    [
        ("trajectory", (1, 2, 10)),
        pytest.param("check", (2, 10), marks=pytest.mark.stress),
        ("barriers", (1, 2, 10)),
    ],
)
def test_from_python_a_folder_with_a_key_is_its_files(
    function: str, times: Sequence[int], folder: Path
) -> None:
    save(folder / "p", {f"e{t}.pt": t for t in times})
    for name in Path("p").iterdir():
        content = torch.load(name)
        torch.save({**content, "ema": state(30 + content["epoch"])}, name)
    options: dict[str, Any] = {"model": "mlp:6-5-3", "data": "npz:data.npz", "split": ("test",)}
    if function == "trajectory":
        options["surface"] = False
    result = getattr(library, function)(["p#ema"], **options)
    column = "a" if function == "barriers" else "checkpoint"
    assert result.table.unique(column)[0] == f"p/e{times[0]}.pt#ema"
    named = getattr(library, function)([f"p/e{t}.pt#ema" for t in times], **options)
    assert named.table.rows == result.table.rows
    other = getattr(library, function)(["p#net"], **options)
    assert other.table.rows != result.table.rows


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a/x.pt", "a/y.safetensors"], ["x", "y"]),
        (["runs/1/final.pt", "runs/2/final.pt"], ["1-final", "2-final"]),
        (["1/a/x.pt", "2/a/x.pt", "2/b/y.pt"], ["1-a-x", "2-a-x", "2-b-y"]),
        (["f.pt#model", "f.pt#ema"], ["model", "ema"]),
        (["init:1", "init:2"], ["init-1", "init-2"]),
        (["x.pt", "x.bin"], ["x-1", "x-2"]),
        (["step-10.pt", "loss=0.5.pt"], ["step-10", "loss-0.5"]),
        (["../a b.pt", "c\n.pt"], ["a-b", "c"]),
    ],
)
def test_files_of_several_checkpoints_have_different_names(
    names: list[str], expected: list[str]
) -> None:
    assert file_names(names) == expected
