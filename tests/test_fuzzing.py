"""Hostile input: damaged files are read or refused, names never steer a terminal or a path."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from losscli.errors import printable
from losscli.models import MLP
from tests.conftest import ROOT, Losscli
from tests.mutations import CASES, FORMATS

Judge = Callable[[str], dict[str, Any]]

# Reading them takes transformers, which takes its time: so many cases of these.
SLOW = {"config": 250, "tokenizer": 400}


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judge]:
    """Has a batch of damaged files read in a process of its own, of limited memory."""
    servers: dict[str, subprocess.Popen[str]] = {}

    def ask(name: str) -> dict[str, Any]:
        also = "transformers" if name in SLOW else ""
        if also not in servers:
            servers[also] = subprocess.Popen(
                [sys.executable, "-m", "tests.mutations", *also.split()],
                cwd=ROOT,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # One thread, so that it can be forked.
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            )
        server = servers[also]
        assert server.stdin is not None
        assert server.stdout is not None
        place = tmp_path_factory.mktemp("batch")
        server.stdin.write(json.dumps([name, str(place), SLOW.get(name, CASES)]) + "\n")
        server.stdin.flush()
        verdict: dict[str, Any] = json.loads(server.stdout.readline())
        return verdict

    yield ask
    for server in servers.values():
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.close()
        server.stdout.close()
        server.wait(30)


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_are_read_or_refused_and_nothing_else(name: str, judge: Judge) -> None:
    """Of 1,000 files each is read, or refused with the error of its kind, in one line.

    No other error, no warning, nothing printed, no import, no code, no file opened for writing, no
    process, no more than 128 MB, and never as long as five seconds.
    """
    verdict = judge(name)
    assert verdict["faults"] == []
    cases = SLOW.get(name, CASES)
    assert verdict["read"] + verdict["refused"] == cases
    # The damage is such that both happen.
    assert min(verdict["read"], verdict["refused"]) > cases // 100


# Names that would steer a terminal

_STEERING = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")

names = st.text(
    st.one_of(
        st.sampled_from("\x1b\x07\x08\r\x00\x7f\x9b\x90\u202e\u2066\u200f\u2028\x85"),
        st.characters(codec="utf-8"),
        st.sampled_from("abc.[0m$_^{\\%"),
    ),
    min_size=1,
    max_size=12,
)
# Escapes that matter, one of them in each name.
hostile = st.tuples(
    names, st.sampled_from(["\x1b[2J", "\x1b]0;owned\x07", "\x9b31m", "\u202e", "\r"]), names
).map("".join)
quickly = settings(
    max_examples=25,
    phases=[Phase.explicit, Phase.generate],  # to shrink runs of whole commands takes minutes
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def check_harmless(*texts: str) -> None:
    for text in texts:
        found = _STEERING.search(text.replace("\n", ""))
        assert found is None, (found, text)


@quickly
@given(hostile, hostile)
def test_names_of_tensors_and_metadata_never_steer_a_terminal(
    losscli: Losscli, tmp_path: Path, name: str, other: str
) -> None:
    save_file({name: torch.ones(2), "b": torch.ones(1)}, tmp_path / "a.safetensors", {other: name})
    torch.save({"s": {other: torch.ones(2)}, name: other}, tmp_path / "b.pt")
    torch.save({name: {"w": torch.ones(2)}, other: {"w": torch.ones(2)}}, tmp_path / "c.pt")
    (tmp_path / "x.safetensors.index.json").write_text(json.dumps({"weight_map": {name: other}}))
    for arguments in (
        ["inspect", "a.safetensors"],
        ["inspect", "b.pt"],
        ["inspect", "c.pt"],
        ["inspect", "a.safetensors", "b.pt"],
        ["inspect", f"c.pt#{name}"],
        ["inspect", "x.safetensors.index.json"],
        ["interpolate", "a.safetensors", "b.pt", "-m", "mlp:2-2", "-d", "npz:no.npz"],
    ):
        done = losscli(*(str(tmp_path / a) if "." in a and ":" not in a else a for a in arguments))
        check_harmless(done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        assert "fault of losscli" not in done.stderr


@quickly
@given(hostile, hostile)
def test_specs_in_files_never_steer_a_terminal(
    losscli: Losscli, folder: Path, name: str, other: str
) -> None:
    path = folder / "d.pt"
    for key in ("losscli.model", "losscli.data", "losscli.loss"):
        torch.save({"state_dict": MLP("6-5-3").state_dict(), key: f"{name},{other}"}, path)
        done = losscli("interpolate", "d.pt", "b.pt", "-m", "mlp:6-5-3", "-o", "out")
        done = losscli("interpolate", "d.pt", "b.pt", "-o", "out") if done.status == 0 else done
        check_harmless(done.stdout, done.stderr)
        assert "fault of losscli" not in done.stderr
    toml = folder / "losscli.toml"
    before = toml.read_text()
    toml.write_text(f"data = {json.dumps(other)}\n")
    done = losscli("interpolate", "a.pt", "b.pt", "-o", "out")
    toml.write_text(before)
    check_harmless(done.stdout, done.stderr)
    assert "fault of losscli" not in done.stderr


@settings(quickly, max_examples=8)
@given(hostile, hostile)
def test_names_in_data_and_tables_never_steer_a_terminal_nor_stop_a_figure(
    losscli: Losscli, folder: Path, name: str, other: str
) -> None:
    """Splits, checkpoints, columns and labels: through a run, its report, its figures, plot."""
    split = name.replace("_", "").replace("/", "").replace("\0", "") or "x"
    arrays = {f"{split}_inputs": torch.rand(5, 6), f"{split}_targets": torch.arange(5) % 3}
    save_file(arrays, folder / "odd.safetensors")
    data = f"safetensors:{folder / 'odd.safetensors'}"
    run = losscli(
        *("interpolate", "a.pt", "b.pt", "-d", data, "-o", "odd", "--points", 3, "--force"),
        *("--figure", "odd.svg"),
    )
    assert run.status == 0, run.stderr
    summary = json.loads(Path("odd.json").read_text())
    summary["checkpoints"][0]["name"] = other
    Path("odd.json").write_text(json.dumps(summary))
    drawn = losscli("plot", "odd.csv", "--label", other, "--title", name, "--force")
    assert drawn.status == 0, drawn.stderr
    shown = losscli("plot", "odd.csv", "--terminal")
    assert shown.status == 0, shown.stderr
    lines = Path("odd.csv").read_text().split("\n")
    column = json.dumps(other, ensure_ascii=False).replace('\\"', '""')
    Path("no.csv").write_text(lines[0].replace("alpha", column), newline="")
    unread = losscli("plot", "no.csv")
    assert unread.status == 1
    lost = losscli("export", "a.pt", "b.pt", "--best", f"{other}?", "--csv", "odd.csv", "-o",
                   "x.safetensors")  # fmt: skip
    assert lost.status == 2
    for done in (run, drawn, shown, unread, lost):
        check_harmless(done.stdout, done.stderr)


@given(st.text())
def test_printable_text_is_printable_and_else_unchanged(text: str) -> None:
    assert printable(text).isprintable()
    assert text.isprintable() == (printable(text) == text)


# Paths

OUTSIDE = ["../out.safetensors", "/etc/hostname", "sub/x.safetensors", "..", ".", "", "a\0b", "~"]


@pytest.mark.parametrize("place", OUTSIDE)
def test_no_name_in_an_index_leads_out_of_its_folder(
    place: str, losscli: Losscli, tmp_path: Path
) -> None:
    inside = tmp_path / "in"
    (inside / "sub").mkdir(parents=True)
    for where in (tmp_path / "out.safetensors", inside / "sub" / "x.safetensors"):
        save_file({"w": torch.ones(2)}, where)
    index = inside / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": place}}))
    done = losscli("inspect", inside)
    assert done.status == 1
    assert "which is no file of its folder" in done.stderr or "is not there" in done.stderr


@pytest.mark.parametrize(
    "stem",
    ["a b", "-dash", "é中", "per%cent", "$HOME", "semi;colon", "quote'\"", "new\nline", "..x",
     "sub/../flat", "esc\x1b[2J", "x.csv", "a#b", "*?[x]"],
)  # fmt: skip
def test_a_stem_of_odd_characters_is_where_the_files_go_and_nowhere_else(
    stem: str, losscli: Losscli, folder: Path
) -> None:
    (folder / "sub").mkdir()
    before = {p for p in folder.rglob("*") if p.is_file()}
    done = losscli("interpolate", "a.pt", "b.pt", f"--out={stem}", "--points", 3, "--no-figure")
    assert done.status == 0, done.stderr
    after = {p for p in folder.rglob("*") if p.is_file()} - before
    assert after == {(folder / f"{stem}{end}").resolve() for end in (".csv", ".json")}
    check_harmless(done.stdout, done.stderr)
    again = losscli("plot", f"./{stem}.csv")
    assert again.status == 0, again.stderr
    check_harmless(again.stdout.replace(stem, ""), again.stderr)


def test_a_names_default_stem_stays_in_the_folder(losscli: Losscli, folder: Path) -> None:
    names = ["..", "a/../../b", "x\x1b[2J", "\u202ex"]
    for number, name in enumerate(names):
        place = folder / "deep" / name.replace("/", "∕").replace("..", "‥")
        place.mkdir(parents=True)
        torch.save(
            {"state_dict": MLP("6-5-3").state_dict(), "losscli.model": "mlp:6-5-3"},
            place / f"{name.replace('/', '-')}{number}.pt",
        )
        before = {p for p in folder.rglob("*") if p.is_file()}
        file = next(place.iterdir())
        done = losscli("interpolate", file, "b.pt", "--points", 3, "--no-figure", "--force")
        assert done.status == 0, done.stderr
        new = {p for p in folder.rglob("*") if p.is_file()} - before
        assert len(new) == 2
        assert all(p.parent == folder and p.name.startswith("interpolate-") for p in new)
        check_harmless(done.stdout, done.stderr)


# Claims


def claims(content: bytes) -> Iterator[bytes]:
    """Makes each 3 in the pickle of a file of torch a 255: a size, or the count of a storage."""
    if content[:2] != b"PK":
        for found in re.finditer(b"K\x03", content):
            yield content[: found.start()] + b"K\xff" + content[found.end() :]
        return
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    for hurt in claims(entries[name]):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for key, part in {**entries, name: hurt}.items():
                archive.writestr(key, part)
        yield out.getvalue()


def test_a_tensor_that_claims_terabytes_is_refused_before_any_room_is_taken(
    losscli: Losscli, tmp_path: Path
) -> None:
    """Of each format one file whose header says more than its size; nothing is allocated."""
    header = {"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"0" * 64)
    images = struct.pack(">4B3I", 0, 0, 8, 3, 1 << 20, 1 << 10, 1 << 12)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
    labels = struct.pack(">4BI", 0, 0, 8, 1, 1)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(labels + b"\0")
    for legacy in (False, True):
        torch.save({"w": torch.arange(3.0)}, tmp_path / "good.pt",
                   _use_new_zipfile_serialization=not legacy)  # fmt: skip
        told = ""
        for hurt in claims((tmp_path / "good.pt").read_bytes()):
            (tmp_path / "b.pt").write_bytes(hurt)
            told += losscli("inspect", tmp_path / "b.pt").stderr
        assert "claims more than it holds: 1,020 bytes of a tensor that are not in it" in told
        assert "claims more than it holds: a tensor of the shape [255] in 12 bytes" in told
    done = losscli("inspect", tmp_path / "a.safetensors")
    assert done.status == 1
    done = losscli("interpolate", "init:0", "init:1", "-m", "mlp:2-2", "-d", f"mnist:{tmp_path}")
    assert done.status == 1
    assert "0 values for the shape [1048576, 1024, 4096]" in done.stderr


def test_an_archive_that_unpacks_to_more_than_it_can_is_refused(
    losscli: Losscli, tmp_path: Path
) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, inputs=np.ones((3, 2), np.float32), targets=np.zeros(3, np.int64))
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    entries["inputs.npy"] = entries["inputs.npy"].replace(b"(3, 2)", b"(9, 9999999)")
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    done = losscli("interpolate", "init:0", "init:1", "-m", "mlp:2-2", "-d", f"npz:{path}")
    assert done.status == 1
    assert "claims" in done.stderr
    # A compressed part of a .pt would be mapped as it lies, and its bytes taken for numbers.
    torch.save({"w": torch.zeros(1000)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    done = losscli("inspect", tmp_path / "b.pt")
    assert done.status == 1
    assert "is compressed, as torch writes none" in done.stderr


def test_a_model_that_no_memory_holds_is_refused_where_a_file_names_it(
    losscli: Losscli, folder: Path
) -> None:
    Path("losscli.toml").write_text('model = "mlp:6-99999999999-3"\ndata = "npz:data.npz"\n')
    torch.save(MLP("6-5-3").state_dict(), "c.pt")
    done = losscli("interpolate", "c.pt", "c.pt")
    assert done.status == 1
    assert "more than there is memory" in done.stderr
