"""Hostile input: damaged files are read or refused, names never steer a terminal or a path."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import re
import resource
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from losscli.checkpoint import read
from losscli.checkpoint.pickles import BrokenPickleError
from losscli.checkpoint.size_checks import check_sizes
from losscli.errors import printable
from losscli.models import MLP
from tests.cases import sample
from tests.conftest import Losscli
from tests.mutations import CASES, FORMATS, SAMPLE, judge_in_fork

# Transformers, which reads the first two, takes its time, and programs have many parts.
FEWER = {"config": 250, "tokenizer": 400, "program": 250}
# The share that `make test` takes of the sample: all or half of the small ones of these formats, a
# third of the others.
MORE = {"npz": 1, "toml": 1, "torch-legacy": 2}


def _sample(name: str) -> int:
    """How many damaged files ``make test`` takes."""
    return SAMPLE // (6 if name in FEWER else MORE.get(name, 3))


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder in memory where there is such a place: for tens of thousands of small files."""
    shared = Path("/dev/shm")
    with TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.mark.parametrize(
    ("name", "cases"),
    [
        *((name, _sample(name)) for name in FORMATS),
        *(pytest.param(name, FEWER.get(name, CASES), marks=pytest.mark.stress) for name in FORMATS),
    ],
)
@pytest.mark.filterwarnings("default")
def test_damaged_files_are_read_or_refused_and_nothing_else(
    name: str, cases: int, place: Path, request: pytest.FixtureRequest
) -> None:
    """Each is read, or refused with the error of its kind, in one line.

    No other error, no warning, nothing printed, no import, no code, no file opened for writing, no
    process, no more than 128 MB, and never as long as five seconds.
    """
    if cases <= SAMPLE:
        request.getfixturevalue("unlaid")
    verdict = judge_in_fork(name, place, cases)
    assert verdict["faults"] == []
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
    max_examples=5,
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
def test_names_of_tensors_and_metadata_never_control_a_terminal(
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
def test_specs_in_files_never_control_a_terminal(
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


@pytest.mark.usefixtures("unlaid")
@settings(quickly, max_examples=2)
@given(hostile, hostile)
def test_names_in_data_and_tables_never_control_a_terminal_or_prevent_a_figure(
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


@pytest.mark.usefixtures("unlaid")
@pytest.mark.parametrize(
    "command",
    sample(
        [
            ["interpolate", 2, "--points", "3", "--layerwise"],
            ["trajectory", 2, "--residuals", "2", "--random-walk"],
            ["plane", 3, "--points", "2"],
            ["barriers", 3, "--points", "3"],
            ["around", 2, "--points", "3", "--directions", "2"],
            ["sharpness", 2, "--samples", "1"],
            ["check", 1, "--tolerance", "9"],
            ["align", 2],
            ["export", 2, "--alpha", "0.5"],
            ["inspect", 2],
        ],
        0,
        2,
    ),
    ids=lambda command: command[0],
)
def test_names_of_files_splits_and_modules_never_control_a_terminal(
    command: list[Any], losscli: Losscli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a command says: results, notes, progress, errors, its plan, and JSON."""
    monkeypatch.setattr("losscli.progress._INTERVAL", 0.0)
    word, number, *options = command
    odd = "\x1b[2J\x9b31m\u202e\r\x07"
    names = []
    for seed in range(number):
        torch.manual_seed(seed)
        state = {f"{odd}.{n}": t for n, t in MLP("6-5-3").state_dict().items()}
        names.append(f"{odd}{seed}.pt")
        torch.save({odd: MLP("6-5-3").state_dict(), "losscli.model": "mlp:6-5-3"}, names[-1])
        torch.save({odd: state}, f"{odd}other{seed}.pt")
    split = {f"{odd}_inputs": torch.rand(9, 6), f"{odd}_targets": torch.arange(9) % 3}
    save_file(split, folder / f"{odd}.safetensors")
    data = [] if word in {"inspect", "export"} else ["-d", f"safetensors:{odd}.safetensors"]
    file = ".safetensors" if word in {"align", "export"} else ""
    out = [] if word == "inspect" else ["--out", f"{odd}out{file}", "--force"]
    studies = word not in {"align", "export", "inspect"}
    below = ["--out", f"{odd}/out{file}"]
    tries = [
        (names, out),  # with its picture
        ([f"{odd}other{i}.pt" for i in range(number)], out),
        ([odd, *names[1:]], out),
    ]
    if studies:
        tries += [(names, [*below, "--json", "--no-figure"]), (names, ["--dry-run"])]
    else:
        tries += [(names, [*out, "--json"]), *([(names, below)] if out else [])]
    for checkpoints, more in tries:
        done = losscli(word, *checkpoints, *options, *data, *more)
        # The name of its file, as it was given, is what export and align have to say to a script.
        check_harmless(done.stdout.removeprefix(f"{odd}out{file}\n"), done.stderr)
        assert done.stdout + done.stderr
        assert "fault of losscli" not in done.stderr


@given(st.text())
def test_printable_changes_only_text_that_is_not_printable(text: str) -> None:
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
    assert "which is not in its folder" in done.stderr or "is not there" in done.stderr


def test_linked_shards_are_read_and_nothing_is_written_next_to_them(
    losscli: Losscli, folder: Path
) -> None:
    """As in the cache of a hub; whatever a folder of a checkpoint holds, it stays as it was."""
    store, model = folder / "store", folder / "model"
    store.mkdir()
    model.mkdir()
    state = MLP("6-5-3").state_dict()
    save_file(state, store / "blob")
    (model / "one.safetensors").symlink_to("../store/blob")
    (model / "loop.safetensors").symlink_to("loop.safetensors")
    (model / "out.csv").symlink_to("../store/blob")
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(state, "one.safetensors")}))
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    run = ["interpolate", "model", "b.pt", "-m", "mlp:6-5-3", "--points", 3, "--no-figure"]
    assert losscli(*run, "-o", "out").status == 0
    # What is written replaces a link, and not what it leads to.
    assert losscli(*run, "-o", "model/out", "--force").status == 0
    assert (model / "out.csv").read_bytes() == (folder / "out.csv").read_bytes()
    assert not (model / "out.csv").is_symlink()
    del before[model / "out.csv"]
    assert {path: path.read_bytes() for path in before} == before
    index.write_text(json.dumps({"weight_map": dict.fromkeys(state, "loop.safetensors")}))
    done = losscli(*run, "-o", "again")
    assert done.status == 1
    assert done.stderr.count("\n") == 1


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "stem",
    sample(["a b", "-dash", "é中", "per%cent", "$HOME", "semi;colon", "quote'\"", "new\nline",
            "..x", "sub/../flat", "esc\x1b[2J", "x.txt", "a#b", "*?[x]"], 1, 2),
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


def test_a_default_stem_stays_in_the_folder(losscli: Losscli, folder: Path) -> None:
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


def claims(content: bytes, huge: int) -> Iterator[bytes]:
    """Makes each 3 in the pickle of a file of torch another: a size, or the count of a storage."""
    if content[:2] != b"PK":
        number = b"\x8a\x08" + huge.to_bytes(8, "little")
        for found in re.finditer(b"K\x03", content):
            yield content[: found.start()] + number + content[found.end() :]
        return
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    for hurt in claims(entries[name], huge):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for key, part in {**entries, name: hurt}.items():
                archive.writestr(key, part)
        yield out.getvalue()


# Every part that torch looks for in an archive, as it is asked for.
LOOKED_UP = ("version", "byteorder", ".format_version", ".data/serialization_id", "data/0")


def archive_of(parts: list[tuple[str, bytes]], packed: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", packed) as archive:
        warnings.simplefilter("ignore")  # of names that stand twice
        for name, content in parts:
            archive.writestr(name, content)
    return out.getvalue()


def parts_of(content: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def saved(weights: dict[str, torch.Tensor]) -> bytes:
    out = io.BytesIO()
    torch.save(weights, out)
    return out.getvalue()


def refused(losscli: Losscli, path: Path, content: bytes) -> str:
    """Writes a file and returns the one line with which it is refused."""
    path.write_bytes(content)
    done = losscli("inspect", path)
    assert (done.status, done.stdout, done.stderr.count("\n")) == (1, "", 1), done
    assert "fault of losscli" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("spelling", [str.upper, str.title, str.swapcase])
def test_a_pickle_under_another_spelling_is_checked_as_torch_reads_it(
    losscli: Losscli, tmp_path: Path, spelling: Callable[[str], str]
) -> None:
    """torch finds Data.pkl where it looks for data.pkl; so must the check of its claims."""

    def respell(name: str) -> str:
        return "archive/" + spelling(name.partition("/")[2])

    good = saved({"w": torch.arange(3.0)})
    whole = archive_of([(respell(name), part) for name, part in parts_of(good)])
    assert torch.load(io.BytesIO(whole), weights_only=True)["w"].tolist() == [0, 1, 2]
    (tmp_path / "whole.pt").write_bytes(whole)
    assert losscli("inspect", tmp_path / "whole.pt").status == 0
    told = [
        refused(
            losscli,
            tmp_path / "a.pt",
            archive_of([(respell(name), part) for name, part in parts_of(hurt)]),
        )
        for hurt in claims(good, 1 << 42)
        if "of a tensor that are not in it" in _why(hurt)
    ]
    assert told
    assert all("of a tensor that are not in it" in line for line in told)


def _why(content: bytes) -> str:
    try:
        check_sizes(io.BytesIO(content))
    except BrokenPickleError as error:
        return str(error)
    return ""


def test_of_two_parts_of_one_name_the_one_that_torch_reads_is_checked(
    losscli: Losscli, tmp_path: Path
) -> None:
    parts = parts_of(saved({"w": torch.arange(3.0)}))
    others = dict(parts_of(saved({"w": torch.arange(4.0)})))
    hurt = next(
        dict(parts_of(content))["archive/data.pkl"]
        for content in claims(saved({"w": torch.arange(3.0)}), 1 << 42)
        if "of a tensor that are not in it" in _why(content)
    )
    others["archive/data.pkl"] = hurt
    path = tmp_path / "a.pt"
    read_hurt = set()
    for name, first, respell in itertools.product(
        ("data.pkl", *LOOKED_UP), (True, False), (str, str.upper)
    ):
        twin = ("archive/" + respell(name), others[f"archive/{name}"])
        content = archive_of([twin, *parts] if first else [*parts, twin])
        reader: Any = torch._C.PyTorchFileReader(io.BytesIO(content))
        if reader.get_record("data.pkl") == hurt:
            assert "declares more data than it contains" in refused(losscli, path, content)
            read_hurt.add(first)
            continue
        path.write_bytes(content)
        (weights,) = read(str(path)).candidates.values()
        expected = torch.load(io.BytesIO(content), weights_only=True)
        assert torch.equal(weights["w"], expected["w"])
    assert read_hurt


def test_no_part_that_torch_reads_is_larger_than_its_file(losscli: Losscli, tmp_path: Path) -> None:
    """A part that is compressed may be of any size once it is not; and torch reads it whole."""
    parts = parts_of(saved({"w": torch.arange(3.0)}))
    for name in ("data.pkl", *LOOKED_UP):
        for spelled in (name, name.upper()):
            for program in (False, True):
                if program and name != "version":
                    continue  # of a program torch reads no more before it refuses it
                out = io.BytesIO()
                with zipfile.ZipFile(out, "w") as archive:
                    for key, content in parts:
                        same = key == f"archive/{name}"
                        packed = zipfile.ZIP_DEFLATED if same else zipfile.ZIP_STORED
                        archive.writestr(
                            f"archive/{spelled}" if same else key, content + bytes(99), packed
                        )
                    if program:
                        archive.writestr("archive/constants.pkl", b"")
                told = refused(losscli, tmp_path / "a.pt", out.getvalue())
                assert f"'archive/{spelled}' is compressed, which torch never does" in told


def test_an_archive_that_resembles_a_program_is_checked(losscli: Losscli, tmp_path: Path) -> None:
    """torch takes archive/constants.pkl, spelled so, for the mark of a program, and no other."""
    parts = parts_of(next(h for h in claims(saved({"w": torch.arange(3.0)}), 1 << 42) if _why(h)))
    for name in ("archive/x/constants.pkl", "archive/Constants.pkl", "archive//constants.pkl"):
        told = refused(losscli, tmp_path / "a.pt", archive_of([*parts, (name, b"")]))
        assert "declares more data than it contains" in told
    told = refused(losscli, tmp_path / "a.pt", archive_of([*parts, ("archive/constants.pkl", b"")]))
    assert "is a TorchScript program, which is code" in told


def test_an_archive_with_two_directories_is_refused(losscli: Losscli, tmp_path: Path) -> None:
    """Python's reader looks for the directory before its end record, torch's where that says."""
    good, other = (archive_of(parts_of(saved({"w": torch.arange(n)}))) for n in (3.0, 4.0))
    assert good[-22:-18] == b"PK\5\6"
    directory = struct.unpack("<I", good[-6:-2])[0]
    # Behind the directory that the record names there is a second one, of other content.
    two = good[:-22] + other[struct.unpack("<I", other[-6:-2])[0] : -22] + good[-22:]
    told = refused(losscli, tmp_path / "a.pt", two)
    assert "is an ambiguous archive: it has more than one directory of its parts" in told
    # One more, of zip64, which only the other reader follows.
    count = struct.unpack("<H", good[-12:-10])[0]
    record = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, 99, 77)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, len(good) - 22, 1)
    end = good[-22:]
    for hidden in (
        good[:-22] + record + b"between" + locator + end,
        good[:directory] + record + good[directory:-22]
        + struct.pack("<4sIQI", b"PK\6\7", 0, directory, 1) + end,
    ):  # fmt: skip
        refused(losscli, tmp_path / "a.pt", hidden)
    # What torch itself writes has records of 64 bits, and may have bytes behind its end.
    for tail in (b"", b"\n", bytes(1000)):
        (tmp_path / "a.pt").write_bytes(saved({"w": torch.arange(3.0)}) + tail)
        assert losscli("inspect", tmp_path / "a.pt").status == 0


ROOM = 64 << 20


@pytest.fixture
def little_memory(losscli: Losscli, tmp_path: Path) -> Iterator[None]:
    """Leaves this process so many bytes more than it has, once all is imported."""
    torch.save({"w": torch.ones(2)}, tmp_path / "warm.pt")
    save_file({"w": torch.ones(2)}, tmp_path / "warm.safetensors")
    for name in ("warm.pt", "warm.safetensors"):
        assert losscli("inspect", tmp_path / name).status == 0
    losscli("interpolate", "init:0", "init:1", "-m", "mlp:2-2", "-d", f"mnist:{tmp_path}")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def numpy_claim(shape: tuple[int, ...]) -> bytes:
    header = repr({"descr": "<f4", "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + bytes(64)


def claimants(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields of each format a file that says it holds terabytes, and what reads it."""

    def data(spec: str) -> list[str]:
        return ["interpolate", "init:0", "init:1", "-m", "mlp:2-2", "-d", spec]

    header = {"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    text = json.dumps(header).encode()
    for name, content in (
        ("tensor", struct.pack("<Q", len(text)) + text + b"0" * 64),
        ("header", struct.pack("<Q", 1 << 42) + text),
    ):
        path = folder / f"{name}.safetensors"
        path.write_bytes(content)
        yield f"safetensors {name}", ["inspect", str(path)]
        yield f"safetensors {name} of data", data(f"safetensors:{path}")
    for legacy in (False, True):
        good = io.BytesIO()
        torch.save({"w": torch.arange(3.0)}, good, _use_new_zipfile_serialization=not legacy)
        for number, hurt in enumerate(claims(good.getvalue(), 1 << 42)):
            path = folder / f"{number}.pt"
            path.write_bytes(hurt)
            yield f"torch {legacy} {number}", ["inspect", str(path)]
    # A pickle that says that bytes of such a number follow.
    long = b"\x80\x04}\x8c\x04data\x8e" + struct.pack("<Q", 1 << 42) + bytes(64)
    (folder / "long.pt").write_bytes(long)
    yield "pickle", ["inspect", str(folder / "long.pt")]
    (folder / "data_batch_1").write_bytes(long)
    yield "CIFAR", data(f"cifar10:{folder}")
    parts = folder / "parts"
    parts.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"w": torch.arange(3.0)}, checkpoint_id=parts)
    metadata = (parts / ".metadata").read_bytes()
    huge = b"\x8a\x07" + (1 << 42).to_bytes(7, "little")
    for number, found in enumerate(re.finditer(b"K\x03", metadata)):
        place = folder / f"parts{number}"
        shutil.copytree(parts, place)
        (place / ".metadata").write_bytes(
            metadata[: found.start()] + huge + metadata[found.end() :]
        )
        yield f"distributed {number}", ["inspect", str(place)]
    for packed in (False, True):
        place = folder / f"idx{packed}"
        place.mkdir()
        images = struct.pack(">4B3I", 0, 0, 8, 3, 1 << 20, 1 << 10, 1 << 12)
        name = place / f"train-images-idx3-ubyte{'.gz' if packed else ''}"
        name.write_bytes(gzip.compress(images) if packed else images)
        labels = struct.pack(">4BI", 0, 0, 8, 1, 1)
        (place / "train-labels-idx1-ubyte").write_bytes(labels + b"\0")
        yield f"IDX {packed}", data(f"mnist:{place}")
    for packed in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = folder / f"{packed}.npz"
        with zipfile.ZipFile(path, "w", packed) as archive:
            archive.writestr("inputs.npy", numpy_claim((1 << 20, 1 << 20)))
            archive.writestr("targets.npy", numpy_claim((3,)))
        yield f"npz {packed}", data(f"npz:{path}")


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="memory is measured through /proc"
)
def test_a_file_that_claims_terabytes_is_refused_before_memory_is_taken(
    losscli: Losscli, tmp_path: Path, little_memory: None
) -> None:
    """Nor is it taken for a lack of memory: the claim is held against the size of the file."""
    read = []
    for name, arguments in claimants(tmp_path):
        done = losscli(*arguments)
        if done.status == 0:
            # An offset or a stride of what has one element only may be any number.
            assert name.startswith(("torch", "distributed")), name
            read.append(name)
            continue
        assert done.status == 1, (name, done)
        assert done.stderr.count("\n") == 1, name
        for word in ("alloc", "MemoryError", "not enough memory", "fault of losscli"):
            assert word not in done.stderr, (name, done.stderr)
    assert len(read) < 6


def test_a_tensor_larger_than_its_file_is_reported(losscli: Losscli, tmp_path: Path) -> None:
    for legacy in (False, True):
        torch.save({"w": torch.arange(3.0)}, tmp_path / "good.pt",
                   _use_new_zipfile_serialization=not legacy)  # fmt: skip
        told = ""
        for hurt in claims((tmp_path / "good.pt").read_bytes(), 255):
            (tmp_path / "b.pt").write_bytes(hurt)
            told += losscli("inspect", tmp_path / "b.pt").stderr
        assert (
            "declares more data than it contains: 1,020 bytes of a tensor that are not in it"
            in told
        )
        assert (
            "declares more data than it contains: a tensor of the shape [255] in 12 bytes" in told
        )
    images = struct.pack(">4B3I", 0, 0, 8, 3, 1 << 20, 1 << 10, 1 << 12)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
    labels = struct.pack(">4BI", 0, 0, 8, 1, 1)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(labels + b"\0")
    done = losscli("interpolate", "init:0", "init:1", "-m", "mlp:2-2", "-d", f"mnist:{tmp_path}")
    assert done.status == 1
    assert "0 values for the shape [1048576, 1024, 4096]" in done.stderr


def test_an_archive_that_declares_more_than_it_contains_is_refused(
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
    assert "is compressed, which torch never does" in done.stderr


def test_a_model_that_does_not_fit_into_memory_is_refused_if_a_file_names_it(
    losscli: Losscli, folder: Path
) -> None:
    Path("losscli.toml").write_text('model = "mlp:6-99999999999-3"\ndata = "npz:data.npz"\n')
    torch.save(MLP("6-5-3").state_dict(), "c.pt")
    done = losscli("interpolate", "c.pt", "c.pt")
    assert done.status == 1
    assert "more than the memory has" in done.stderr
