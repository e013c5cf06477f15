"""No command overwrites a file that it reads, also with ``--force``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import losscli as library
from losscli.errors import UsageError
from losscli.settings import Settings
from losscli.studies.inputs import protect_inputs
from tests.conftest import Losscli

OVERWRITING = {
    "a soup of its first": ("soup a.pt b.pt -o a.pt", "a.pt"),
    "a greedy soup of its last": ("soup a.pt b.pt --greedy test -o b.pt", "b.pt"),
    "a point of a line": ("export a.pt b.pt --alpha 0.5 -o b.pt", "b.pt"),
    "an average": ("export a.pt b.pt --weights 1/2-1/2 -o a.pt", "a.pt"),
    "a key of a file": ("export a.pt#state_dict b.pt --alpha 0.5 -o a.pt", "a.pt"),
    "what a link leads to": ("export chain.pt b.pt --alpha 0.5 -o a.pt", "a.pt"),
    "a link between": ("export chain.pt b.pt --alpha 0.5 -o link.pt", "link.pt"),
    "a link": ("export link.pt b.pt --alpha 0.5 -o link.pt", "link.pt"),
    "a point of a plane": ("export --plane plane.csv --at 0 0 -o a.pt", "a.pt"),
    "an alignment": ("align a.pt b.pt -o b.pt", "b.pt"),
    "alignments in their folder": ("align a.pt runs -o runs", "runs/c.safetensors"),
    "a part of a model": (
        "export net=b.pt+other=a.pt net=a.pt+other=b.pt --alpha 1 -o b.pt",
        "b.pt",
    ),
    "the bend of a path": (
        "connect x.bend-1.safetensors b.pt -o x --steps 1",
        "x.bend-1.safetensors",
    ),
    "a bend that its run would remove": (
        "interpolate y.bend-1.safetensors b.pt -o y --points 3",
        "y.bend-1.safetensors",
    ),
    "the table of the whole line": (
        "interpolate a.pt b.pt --context line.csv -o line --range 0 1",
        "line.csv",
    ),
    "the pairs": ("barriers --pairs pairs.csv --x step -o pairs", "pairs.csv"),
    "the data": ("interpolate a.pt b.pt -d text:words.json,context=6 -o words", "words.json"),
    "data with the name of a journal": (
        "interpolate a.pt b.pt -d text:words.journal,context=6 -o words",
        "words.journal",
    ),
    "the data by a TOML file": ("interpolate a.pt b.pt -d data.toml -o words", "words.json"),
    "an image of the data": (
        (
            "interpolate init:0 init:1 -m mlp:12-2 -d imagefolder:images,size=2,flatten=true "
            "--figure images/x/0.png -o x"
        ),
        "images/x/0.png",
    ),
    "a figure over a table": ("plot line.svg --figure line.svg", "line.svg"),
    "a style sheet": ("interpolate a.pt b.pt --style s.svg --figure s.svg -o x", "s.svg"),
    "a style sheet of another figure": ("plot line.csv --style s.svg --figure s.svg", "s.svg"),
    "the table of the lowest loss": (
        "export a.pt b.pt --best test --csv table.pt -o table.pt",
        "table.pt",
    ),
    "a figure over a checkpoint": ("inspect a.svg --figure a.svg", "a.svg"),
}


@pytest.mark.usefixtures("unseen")
def test_no_command_overwrites_a_file_that_it_reads(losscli: Losscli, folder: Path) -> None:
    Path("link.pt").symlink_to("a.pt")
    Path("chain.pt").symlink_to("link.pt")
    Path("runs").mkdir()
    for name in ("runs/c.safetensors", "x.bend-1.safetensors"):
        library.export("a.pt", "b.pt", 0.25).save(name)
    shutil.copy("a.pt", "a.svg")
    Path("pairs.csv").write_text("a,b,step\na.pt,b.pt,0\n")
    for text in ("words.json", "words.journal"):
        Path(text).write_text("abcdefghijkl" * 8)
    Path("data.toml").write_text('name = "text:words.json"\ncontext = 6\n')
    for k in range(4):
        image = Path("images", "xy"[k % 2], f"{k // 2}.png")
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((2, 2, 3), 60 * k, np.uint8)).save(image)
    done = losscli("interpolate", "a.pt", "b.pt", "-o", "line", "--points", 3, "--no-figure")
    assert done.status == 0, done.stderr
    for copy in ("line.svg", "table.pt"):
        shutil.copy("line.csv", copy)
    Path("s.svg").write_text("lines.linewidth: 2\n")
    done = losscli("plane", "a.pt", "-o", "plane", "--points", 2, "--no-figure")
    assert done.status == 0, done.stderr
    done = losscli("connect", "a.pt", "b.pt", "-o", "y", "--steps", 1, "--no-plane", "--no-figure")
    assert done.status == 0, done.stderr
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for case, (command, file) in OVERWRITING.items():
        done = losscli(*command.split(), "--force", "-q")
        words = f"losscli: {file} is an input of this command, which would overwrite it. Choose "
        assert done.stderr == f"{words}another --out or --figure\n", case
        assert done.status == 2, case
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before, case


# A spec and files that it reads, with names that a result can have. Links lead to "here.json".
READ: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a tokenizer": (
        {"data": "text:words.json,tokenizer=tokens"},
        ["tokens/tokenizer.json", "tokens/vocab.json", "words.json"],
    ),
    "the configuration of a model": ({"model": "transformers:hub"}, ["hub/config.json"]),
    "that next to a checkpoint": ({}, ["hub/config.json"]),
    "an exported program": ({"model": "pt2:program.pt"}, ["program.pt"]),
    "code": ({"model": "net.py:net"}, ["here.json"]),
    "a metric": ({"metric": ("net.py:score",)}, ["here.json"]),
    "a TOML file": ({"data": "spec.toml"}, ["here.json"]),
    "images": ({"data": "imagefolder:images"}, ["images/x/0.png", "here.json", "there/2.png"]),
    "a hub's data": ({"data": "hf:hub"}, ["hub/config.json", "here.json"]),
    "texts": ({"data": "text:texts"}, ["here.json"]),
}


@pytest.mark.parametrize("case", READ)
def test_every_file_that_a_spec_reads_is_protected(case: str, folder: Path) -> None:
    for file in ("tokens/tokenizer.json", "tokens/vocab.json", "words.json", "images/x/0.png",
                 "there/2.png", "program.pt"):  # fmt: skip
        Path(file).parent.mkdir(exist_ok=True, parents=True)
        Path(file).write_text("{}")
    Path("here.json").write_text('name = "text:words.json"\n')
    for link in ("net.py", "spec.toml", "images/x/1.png", "hub/data.csv", "texts/train.txt"):
        Path(link).parent.mkdir(exist_ok=True)
        Path(link).symlink_to(folder / "here.json")
    Path("images/x/up").symlink_to(folder / "images")  # leads to one of its parents
    Path("images/y").symlink_to(folder / "there")
    Path("hub/config.json").write_text('{"model_type": "gpt2"}')
    torch.save({"weight": torch.zeros(1)}, "hub/a.pt")  # has no metadata
    Path("free.json").write_text("{}")
    Path("tokens/result.json").write_text('{"command": "interpolate", "identity": "0"}')
    settings, files = READ[case]
    for file in files:
        with pytest.raises(UsageError, match=f"^{file} is an input of this command, which would"):
            protect_inputs([Path(file)], ["hub/a.pt", "b.pt"], Settings(**settings))
    others = {"free.json", "tokens/result.json", "here.json"} - set(files)
    protect_inputs(map(Path, others), ["hub/a.pt", "b.pt"], Settings(**settings))


def test_a_losscli_toml_is_protected(folder: Path) -> None:
    shutil.move("losscli.toml", "mine.json")
    Path("losscli.toml").symlink_to("mine.json")
    with pytest.raises(UsageError, match=r"^mine\.json is an input"):
        protect_inputs([Path("mine.json")], ["a.pt"], Settings())


def test_only_files_that_a_command_reads_are_looked_up(losscli: Losscli, folder: Path) -> None:
    Path("losscli.toml").write_text("broken")
    for command in ("soup a.pt b.pt", "export a.pt b.pt --alpha 0.5"):
        for _ in range(2):
            done = losscli(*command.split(), "-o", "x.safetensors", "--force")
            assert done.status == 0, done.stderr


@pytest.mark.usefixtures("unseen")
def test_results_next_to_their_inputs_are_overwritten(losscli: Losscli, folder: Path) -> None:
    command = ("interpolate", "a.pt", "b.pt", "-o", "a", "--points", 3, "--force")
    for _ in range(2):
        done = losscli(*command, "--figure", "b.svg")
        assert done.status == 0, done.stderr
    assert json.loads(Path("a.json").read_text())["command"] == "interpolate"
