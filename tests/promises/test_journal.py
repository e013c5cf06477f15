from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from losscli.errors import OutputError
from losscli.evaluation.journal import Journal, differences, frames
from losscli.evaluation.journal import files as held
from losscli.evaluation.journal import journal as room

Arrays = Mapping[str, NDArray[Any]]

HEAD = 128
TOLD = {"--limit": 100, "the checkpoint b.pt": "b" * 64}


def begin(stem: Path, identity: str = "i", told: Mapping[str, Any] = TOLD) -> Journal:
    return Journal.open(stem, identity, told)


def numbers(i: int) -> dict[str, NDArray[Any]]:
    generator = np.random.default_rng(i)
    losses = generator.standard_normal((2, i + 1)).astype(np.float32)
    losses[0, 0] = [np.nan, np.inf, -0.0][i % 3]
    return {"losses": losses, "state": np.array([i, 2])}


def same(found: Arrays | None, truth: Arrays) -> bool:
    return (
        found is not None
        and list(found) == list(truth)
        and all(
            (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
            for a, b in zip(found.values(), truth.values(), strict=True)
        )
    )


def three(stem: Path) -> tuple[bytes, list[int]]:
    """Writes a journal of three records; returns it, and where it ends after each write."""
    path = stem.with_name(f"{stem.name}.journal")
    ends = []
    with begin(stem) as journal:
        for i in range(3):
            journal.record(f"r{i}", numbers(i))
            ends.append(path.stat().st_size)
    return path.read_bytes(), ends


def frame(before: bytes, description: object, data: bytes = b"") -> bytes:
    """A frame as the module's first lines describe it."""
    told = description if isinstance(description, bytes) else json.dumps(description).encode()
    body = len(told).to_bytes(4, "little") + told + data
    number = len(body).to_bytes(8, "little")
    return number + body + hashlib.sha256(before + number + body).digest()


def by_hand(*records: tuple[object, bytes], told: object = TOLD) -> bytes:
    content = b"losscli journal 1\n".ljust(HEAD)
    seal = hashlib.sha256(b"losscli journal 1\n").digest()
    for description, data in [({"identity": "i", "told": told}, b""), *records]:
        content += frame(seal, description, data)
        seal = content[-32:]
    return content


def files(folder: Path | str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.fixture
def stem(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.journal"


# -- what goes in comes out -------------------------------------------------------------------


def test_a_stopped_run_recalls_its_records(stem: Path, path: Path) -> None:
    with begin(stem) as journal:
        assert journal.recall("r0") is None
        journal.record("r0", numbers(0))
        assert same(journal.recall("r0"), numbers(0))
    with begin(stem) as journal:
        assert (len(journal), journal.restart_reason, journal.changes, journal.truncated) == (
            1,
            None,
            (),
            0,
        )
        assert same(journal.recall("r0"), numbers(0))
        assert journal.recall("r1") is None
        journal.record("r1", numbers(1))
    with begin(stem) as journal:
        assert same(journal.recall("r0"), numbers(0))
        assert same(journal.recall("r1"), numbers(1))
        journal.finish()
    assert not path.exists()
    assert files(path.parent) == []


def test_of_two_records_of_one_key_the_last_counts(stem: Path) -> None:
    with begin(stem) as journal:
        for i in (0, 1):
            journal.record("twice", numbers(i))
            assert same(journal.recall("twice"), numbers(i))
    with begin(stem) as journal:
        assert same(journal.recall("twice"), numbers(1))


_TYPES = ["<f4", "<f8", ">f8", "<f2", "<i8", "<i4", "|u1", "|b1", "<c8", "|i1", ">u2"]


@st.composite
def _arrays(draw: st.DrawFn) -> NDArray[Any]:
    """An array of any bits: nan of any payload, both zeros, subnormal numbers."""
    dtype = np.dtype(draw(st.sampled_from(_TYPES)))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    size = int(np.prod(shape, dtype=int)) * dtype.itemsize
    content = draw(st.one_of(st.just(bytes(size)), st.binary(min_size=size, max_size=size)))
    array = np.frombuffer(content, dtype).reshape(shape)
    if draw(st.booleans()):
        array = np.asfortranarray(array)
    return array[..., ::2] if array.ndim and draw(st.booleans()) else array


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.text(), st.dictionaries(st.text(), _arrays(), max_size=3)), max_size=4)
)
def test_all_arrays_come_back_to_the_bit(records: list[tuple[str, Arrays]]) -> None:
    last = dict(records)
    with tempfile.TemporaryDirectory() as folder:
        with begin(Path(folder) / "run") as journal:
            for key, arrays in records:
                journal.record(key, arrays)
            for key, arrays in last.items():
                assert same(journal.recall(key), arrays)
        with begin(Path(folder) / "run") as journal:
            assert len(journal) == len(last)
            for key, arrays in last.items():
                assert same(journal.recall(key), arrays)


class _Haltingly(FileIO):
    """A file of which the system reads and writes no more than a few bytes at a time."""

    def write(self, content: Any) -> int:
        return super().write(memoryview(content)[:7])

    def readinto(self, room: Any) -> int:
        return super().readinto(memoryview(room)[:5])


def test_short_reads_and_writes_are_continued(stem: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "FileIO", _Haltingly)
    three(stem)
    monkeypatch.undo()
    with begin(stem) as journal:
        assert len(journal) == 3
    monkeypatch.setattr(held, "FileIO", _Haltingly)
    with begin(stem) as journal:
        assert all(same(journal.recall(f"r{i}"), numbers(i)) for i in range(3))


def test_recalled_arrays_are_writable(stem: Path) -> None:
    with begin(stem) as journal:
        journal.record("r", numbers(0))
        for _ in range(2):
            found = journal.recall("r")
            assert found is not None
            assert same(found, numbers(0))
            found["losses"][:] = 7


def test_objects_are_not_recorded(stem: Path, path: Path) -> None:
    with begin(stem) as journal:
        journal.record("r", numbers(0))
        before = path.read_bytes()
        with pytest.raises(ValueError, match="x is of object, which is not of numbers"):
            journal.record("s", {"x": np.array([{}])})
        assert path.read_bytes() == before


def test_large_records_are_not_copied(stem: Path) -> None:
    losses = np.zeros((8, 1 << 20), np.float32)
    losses[:] = np.arange(1 << 20)
    with begin(stem) as journal:
        tracemalloc.start()
        try:
            journal.record("large", {"losses": losses})
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert most < losses.nbytes / 4
    tracemalloc.start()
    try:
        with begin(stem) as journal:
            _, most = tracemalloc.get_traced_memory()
            assert most < losses.nbytes / 4
            found = journal.recall("large")
            _, most = tracemalloc.get_traced_memory()
            assert most < 1.25 * losses.nbytes
    finally:
        tracemalloc.stop()
    assert same(found, {"losses": losses})


def test_the_file_is_as_its_description_says(stem: Path, path: Path) -> None:
    truth = {"a": np.array([[1.5, np.nan]]), "b": np.array(3, np.int32)}
    described = {"key": "k", "arrays": [["a", "<f8", [1, 2]], ["b", "<i4", []]]}
    data = truth["a"].tobytes() + truth["b"].tobytes()
    path.write_bytes(by_hand((described, data)))
    with begin(stem) as journal:
        assert same(journal.recall("k"), truth)
    path.unlink()
    with begin(stem) as journal:
        journal.record("k", truth)
    assert path.read_bytes()[HEAD:] == by_hand((described, data))[HEAD:]
    assert path.read_bytes()[:HEAD].startswith(f"losscli journal 1\n{os.getpid()} ".encode())


# -- what is broken is cut off ----------------------------------------------------------------


STEPS = pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.stress)])
"""Of how many bytes one is changed, or of how many lengths one is tried."""


@STEPS
def test_a_truncated_journal_keeps_its_whole_records(step: int, stem: Path, path: Path) -> None:
    content, ends = three(stem)
    around = {end + more for end in ends[:-1] for more in (-1, 0, 1)}
    for cut in sorted({*range(0, len(content), step), *around, len(content) - 1}):
        path.write_bytes(content[:cut])
        whole = sum(end <= cut for end in ends)
        with begin(stem) as journal:
            assert len(journal) == whole
            for i in range(3):
                found = journal.recall(f"r{i}")
                assert same(found, numbers(i)) if i < whole else found is None
            if whole:
                assert journal.truncated == cut - ends[whole - 1]
                assert path.stat().st_size == ends[whole - 1]
            journal.record(f"r{whole}", numbers(whole))
        with begin(stem) as journal:
            assert (len(journal), journal.truncated, journal.restart_reason) == (whole + 1, 0, None)
            assert all(same(journal.recall(f"r{i}"), numbers(i)) for i in range(whole + 1))
            journal.finish()
        assert files(path.parent) == []


@STEPS
def test_no_byte_can_be_changed_into_a_wrong_array(step: int, stem: Path, path: Path) -> None:
    content, ends = three(stem)
    draw = random.Random(0)
    head = len(by_hand())
    for at in range(0, len(content), step):
        for change in (0xFF, 1 << draw.randrange(8)):
            broken = bytearray(content)
            broken[at] ^= change
            path.write_bytes(broken)
            with begin(stem) as journal:
                # Who held it is no part of what was recorded.
                untouched = 18 <= at < HEAD
                whole = 3 if untouched else 0 if at < head else sum(end <= at for end in ends)
                found = [journal.recall(f"r{i}") for i in range(3)]
                assert [f is not None for f in found] == [i < whole for i in range(3)]
                assert all(same(f, numbers(i)) for i, f in enumerate(found) if f is not None)
                if at < head and not untouched:
                    assert journal.restart_reason is not None
                journal.finish()
            for other in path.parent.iterdir():
                other.unlink()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_mutation_gives_a_wrong_array(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        stem = Path(folder) / "run"
        content, _ = three(stem)
        a, b, c, d = sorted(
            data.draw(st.lists(st.integers(0, len(content)), min_size=4, max_size=4))
        )
        pieces = [content[:a], content[a:b], content[b:c], content[c:d], content[d:]]
        noise = data.draw(st.binary(max_size=40))
        order = data.draw(st.permutations([pieces[1], pieces[2], pieces[3], noise]))
        (stem.parent / "run.journal").write_bytes(b"".join([pieces[0], *order, pieces[4]]))
        with begin(stem) as journal:
            for i in range(3):
                found = journal.recall(f"r{i}")
                assert found is None or same(found, numbers(i))


def test_records_that_change_places_do_not_count(stem: Path, path: Path) -> None:
    content, ends = three(stem)
    first, second = content[: ends[0]], content[ends[0] : ends[1]]
    path.write_bytes(first + content[ends[1] :] + second)
    with begin(stem) as journal:
        assert len(journal) == 1
    path.write_bytes(first + second + second)
    with begin(stem) as journal:
        assert len(journal) == 2


def test_zeros_are_not_a_record(stem: Path, path: Path) -> None:
    # Where power is lost, a file may have got its length, and not its content.
    content, ends = three(stem)
    path.write_bytes(content[: ends[1]] + bytes(9000))
    with begin(stem) as journal:
        assert (len(journal), journal.truncated) == (2, 9000)
    path.write_bytes(bytes(HEAD))
    with begin(stem) as journal:
        assert (len(journal), journal.restart_reason) == (0, None)


@pytest.mark.parametrize(
    "record",
    [
        ({"key": "k", "arrays": [["a", "<f8", [1 << 50]]]}, bytes(8)),
        ({"key": "k", "arrays": [["a", "<f8", [1 << 62, 1 << 62]]]}, bytes(8)),
        ({"key": "k", "arrays": [["a", "<f8", [-1]]]}, bytes(8)),
        ({"key": "k", "arrays": [["a", "<f8", [-1, -1]]]}, bytes(8)),
        ({"key": "k", "arrays": [["a", "<f8", [True]]]}, bytes(8)),
        ({"key": "k", "arrays": [["a", "<f8", [1.0]]]}, bytes(8)),
        ({"key": "k", "arrays": [["a", "|O", [1]]]}, bytes(8)),
        ({"key": "k", "arrays": [["a", "<f8,<f8", [1]]]}, bytes(16)),
        ({"key": "k", "arrays": [["a", "<f77", [1]]]}, bytes(77)),
        ({"key": "k", "arrays": [["a", 8, [1]]]}, bytes(8)),
        ({"key": "k", "arrays": [["a", "<f8"]]}, bytes(8)),
        ({"key": "k", "arrays": 7}, b""),
        ({"key": ["k"], "arrays": []}, b""),
        ({"key": "k"}, b""),
        ({"arrays": []}, b""),
        (["k"], b""),
        (b"[" * 100_000, b""),
        (b"\xff", b""),
        (b"9" * 10_000, b""),
    ],
)
def test_a_record_longer_than_the_file_is_cut_off(
    record: tuple[object, bytes], stem: Path, path: Path
) -> None:
    good = ({"key": "good", "arrays": [["a", "|u1", [3]]]}, b"abc")
    path.write_bytes(by_hand(good, record, good))
    with begin(stem) as journal:
        assert len(journal) == 1
        assert same(journal.recall("good"), {"a": np.frombuffer(b"abc", np.uint8)})
        assert journal.truncated > 0
        journal.record("more", numbers(1))
    with begin(stem) as journal:
        assert len(journal) == 2


@pytest.mark.parametrize("length", [(1 << 64) - 1, 1 << 62, 1 << 40, 0, 3])
def test_a_length_beyond_the_file_allocates_nothing(length: int, stem: Path, path: Path) -> None:
    good = by_hand(({"key": "good", "arrays": []}, b""))
    path.write_bytes(good + length.to_bytes(8, "little") + bytes(200))
    tracemalloc.start()
    try:
        with begin(stem) as journal:
            assert len(journal) == 1
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 1 << 20


def test_shapes_beyond_numpy_are_not_recalled(stem: Path, path: Path) -> None:
    for shape in ([0, 1 << 62, 1 << 62], [0] * 100):
        path.write_bytes(by_hand(({"key": "k", "arrays": [["a", "<f8", shape]]}, b"")))
        with begin(stem) as journal:
            assert journal.recall("k") is None


def test_records_damaged_during_the_run_are_evaluated_again(stem: Path, path: Path) -> None:
    _, ends = three(stem)
    with begin(stem) as journal:
        with path.open("r+b") as file:
            file.seek(ends[1] - 40)
            byte = file.read(1)
            file.seek(ends[1] - 40)
            file.write(bytes([byte[0] ^ 1]))
        assert same(journal.recall("r0"), numbers(0))
        assert journal.recall("r1") is None
        assert same(journal.recall("r2"), numbers(2))
        os.truncate(path, ends[1] + 20)
        assert journal.recall("r2") is None


# -- another run ------------------------------------------------------------------------------


def test_a_changed_input_starts_over_and_the_reason_is_reported(stem: Path, path: Path) -> None:
    three(stem)
    now = {"--limit": 200, "the checkpoint b.pt": "c" * 64}
    with begin(stem, "j", now) as journal:
        assert journal.restart_reason == ("--limit was 100 and is 200; the checkpoint b.pt changed")
        assert len(journal) == 0
        assert journal.recall("r0") is None
        journal.record("r0", numbers(5))
    with begin(stem, "j", now) as journal:
        assert journal.restart_reason is None
        assert same(journal.recall("r0"), numbers(5))
    assert files(path.parent) == ["run.journal"]


def test_an_older_journal_stays_until_the_first_new_record(stem: Path, path: Path) -> None:
    _, ends = three(stem)
    with begin(stem, "j", {}) as journal:
        assert journal.restart_reason is not None
    with begin(stem) as journal:
        assert (len(journal), path.stat().st_size) == (3, ends[-1])


def test_a_changed_description_with_the_same_identity_does_not_start_over(stem: Path) -> None:
    three(stem)
    with begin(stem, told={**TOLD, "the device": "NVIDIA H200"}) as journal:
        assert (len(journal), journal.restart_reason) == (3, None)
        assert journal.changes == ("the device was not given",)


def test_another_identity_with_the_same_description_is_another_run(stem: Path) -> None:
    three(stem)
    with begin(stem, "j") as journal:
        assert journal.restart_reason == "it belongs to another run"


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ({"--limit": None}, {"--limit": 5}, ["--limit was not given and is 5"]),
        ({"--limit": 5}, {"--limit": None}, ["--limit was 5 and is not given"]),
        ({"--loss": "mse"}, {"--loss": "bce"}, ["--loss was mse and is bce"]),
        ({"--split": ["a"]}, {"--split": ["a", "b"]}, ['--split was ["a"] and is ["a", "b"]']),
        ({"x": "a" * 64}, {"x": "b" * 64}, ["x changed"]),
        ({"x": "a" * 64}, {}, ["x is no longer given"]),
        ({}, {"x": None}, ["x was not given"]),
        ({"α": list(range(99))}, {"α": [1]}, ["α changed"]),
        ({"x": float("nan")}, {"x": float("nan")}, []),
        ({"x": 1, "y": {"b": 1, "a": 2}}, {"y": {"a": 2, "b": 1}, "x": 1}, []),
        ({"x\x1b[2J": "\n"}, {"x\x1b[2J": "\x07"}, ["x\\x1b[2J was \\n and is \\x07"]),
        ({"x": 1}, {"x": True}, ["x was 1 and is true"]),
    ],
)
def test_differences_are_named(before: Any, now: Any, told: list[str]) -> None:
    assert differences(before, now) == told


@pytest.mark.parametrize("told", [7, None, ["--limit"]])
def test_a_head_with_an_invalid_description_is_damaged(
    told: object, stem: Path, path: Path
) -> None:
    path.write_bytes(by_hand(told=told))
    with begin(stem) as journal:
        assert journal.restart_reason == "its beginning is damaged"


def test_another_version_starts_over(stem: Path, path: Path) -> None:
    path.write_bytes(b"losscli journal 2\n and something that only version 2 knows")
    with begin(stem) as journal:
        assert journal.restart_reason == "it was written by another version of losscli"
    assert path.read_bytes().startswith(b"losscli journal 2\n")
    with begin(stem) as journal:
        journal.record("r0", numbers(0))
    with begin(stem) as journal:
        assert same(journal.recall("r0"), numbers(0))


@pytest.mark.parametrize("content", [b"Dear diary,\n", bytes(5000), b"losscli"[::-1]])
def test_a_file_that_is_not_a_journal_gets_another_name(
    content: bytes, stem: Path, path: Path
) -> None:
    path.write_bytes(content)
    with begin(stem) as journal:
        assert (
            journal.restart_reason
            == f"it was not a journal of losscli and was renamed to {path}.old"
        )
        journal.record("r0", numbers(0))
        journal.finish()
    assert path.with_name("run.journal.old").read_bytes() == content
    path.write_bytes(content)
    with pytest.raises(OutputError, match=r"renamed to .*\.old, which exists\. Move one") as error:
        begin(stem)
    assert str(path) in str(error.value)
    assert path.read_bytes() == content


# -- one run at a time ------------------------------------------------------------------------

_CHILD = """
import os, signal, sys
from pathlib import Path
import numpy as np
from losscli.evaluation.journal import Journal
assert "torch" not in sys.modules
journal = Journal.open(Path(sys.argv[1]), "i", {})
journal.record("r0", {"x": np.arange(3)})
worker = os.fork()
if not worker:
    print(os.getpid(), flush=True)
signal.pause()
"""


@contextlib.contextmanager
def _python(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent.parent,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_second_run_is_refused_until_the_first_has_ended_or_was_killed(
    stem: Path, path: Path
) -> None:
    with _python(_CHILD, stem) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        try:
            with pytest.raises(OutputError) as error:
                begin(stem, told={})
            assert str(error.value) == (
                f"{path} is in use by another run (process {process.pid}) that writes the same "
                "results. Wait for that run to end, or choose another --out"
            )
            process.send_signal(signal.SIGKILL)
            process.wait()
            # A worker that outlives it does not keep the lock.
            os.kill(worker, 0)
            with begin(stem, told={}) as journal:
                assert same(journal.recall("r0"), {"x": np.arange(3)})
        finally:
            os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("recorded", [False, True])
def test_a_run_is_refused_within_one_process_too(recorded: bool, stem: Path, path: Path) -> None:
    with begin(stem) as journal:
        if recorded:
            journal.record("r0", numbers(0))
        with pytest.raises(OutputError, match=r"in use by another run \(this process\)"):
            begin(stem)
        assert path.exists()
    with begin(stem):
        pass


def test_the_holder_is_named_as_far_as_it_is_known(
    stem: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with begin(stem) as journal:
        journal.record("r0", numbers(0))
        for text, told in ((b"12 far.away\x1b", r" (process 12 on far.away\x1b)"), (b"\xff", "")):
            with path.open("r+b") as file:
                file.seek(18)
                file.write(text.ljust(110))
            with pytest.raises(OutputError) as error:
                begin(stem)
            assert str(error.value).startswith(f"{path} is in use by another run{told} that")


def test_a_file_that_is_removed_before_its_lock_is_had_does_not_fool(
    stem: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = room.lock
    meanwhile = [path.unlink, lambda: other.rename(path)]
    other = path.with_name("other")
    other.write_bytes(by_hand(({"key": "other", "arrays": []}, b"")))

    def lock(file: FileIO, where: Path) -> bool:
        if meanwhile:
            meanwhile.pop(0)()
        return real(file, where)

    three(stem)
    monkeypatch.setattr(room, "lock", lock)
    with begin(stem) as journal:
        assert meanwhile == []
        assert journal.recall("other") == {}
        with pytest.raises(OutputError, match="in use"):
            begin(stem)


def test_an_old_file_is_replaced_by_a_locked_one(
    stem: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.replace
    refused = []

    def replace(self: Path, target: Path) -> Path:
        result = real(self, target)
        with pytest.raises(OutputError, match="in use"):
            begin(stem)
        refused.append(target)
        return result

    three(stem)
    with begin(stem, "j") as journal:
        monkeypatch.setattr(Path, "replace", replace)
        journal.record("new", numbers(0))
    assert refused == [path]


def test_without_locks_a_run_continues_and_says_so(
    stem: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(number: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with begin(stem) as journal:
        assert journal.locked
    monkeypatch.setattr(held, "_lock_now", refuse)
    with begin(stem) as journal:
        journal.record("r0", numbers(0))
        assert not journal.locked
    with begin(stem) as journal:
        assert same(journal.recall("r0"), numbers(0))


def test_a_journal_removes_only_its_own_file(stem: Path, path: Path) -> None:
    with begin(stem) as journal:
        journal.record("r0", numbers(0))
        path.unlink()
        path.write_bytes(b"another's")
        journal.finish()
        journal.finish()
        journal.close()
    assert path.read_bytes() == b"another's"


# -- kill −9 ----------------------------------------------------------------------------------

_KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import numpy as np
from losscli.evaluation.journal import Journal

def numbers(i):
    return {"x": np.arange(i, i + 60_000.0 + 977 * (i % 7))}

stem, draw, most = Path(sys.argv[1]), random.Random(7), 0
for _ in range(int(sys.argv[2])):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with Journal.open(stem, "i", {}) as journal:
            os.write(writer, b".")
            for i in range(len(journal), 10_000):
                journal.record(str(i), numbers(i))
                os.write(writer, b".")
    os.close(writer)
    os.read(reader, 1)
    promised, least = 0, 2 + draw.randrange(3)
    while promised < least:
        promised += len(os.read(reader, 1))
    time.sleep(draw.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while told := os.read(reader, 4096):
        promised += len(told)
    os.close(reader)
    with Journal.open(stem, "i", {}) as journal:
        assert len(journal) >= most + promised, (len(journal), most, promised)
        for i in range(len(journal)):
            assert (journal.recall(str(i))["x"] == numbers(i)["x"]).all()
        most = len(journal)
print(most, *os.listdir(stem.parent))
"""


@pytest.mark.parametrize("kills", [6, pytest.param(60, marks=pytest.mark.stress)])
def test_kill_9_at_any_instant_loses_nothing_that_was_recorded(kills: int, stem: Path) -> None:
    with _python(_KILLED, stem, kills) as process:
        stdout, _ = process.communicate()
    assert process.returncode == 0
    recorded, *left = stdout.split()
    assert int(recorded) > 10
    assert left == ["run.journal"]


# -- disks ------------------------------------------------------------------------------------

_LIMITED = """
import os, resource, sys
from pathlib import Path
import numpy as np
from losscli.errors import OutputError
from losscli.evaluation.journal import Journal

stem, limit = Path(sys.argv[1]), 20_000
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
done = 0
with Journal.open(stem, "i", {}) as journal:
    try:
        while True:
            journal.record(str(done), {"x": np.full(300, done)})
            done += 1
    except OutputError as error:
        print(done, error)
    assert len(journal) == done
    size = journal.path.stat().st_size
    journal.record("small", {"x": np.arange(2)})
"""


def test_a_full_disk_keeps_all_records(stem: Path, path: Path) -> None:
    with _python(_LIMITED, stem) as process:
        stdout, _ = process.communicate()
    assert process.returncode == 0
    done, said = stdout.strip().split(maxsplit=1)
    assert said == (f"{path} cannot be written: File too large. Make room")
    assert int(done) > 3
    with begin(stem, told={}) as journal:
        assert (len(journal), journal.truncated) == (int(done) + 1, 0)
        for i in range(int(done)):
            assert same(journal.recall(str(i)), {"x": np.full(300, i)})
        assert same(journal.recall("small"), {"x": np.arange(2)})


@pytest.mark.parametrize(
    ("module", "where"),
    [(frames, "_put"), (room, "sync"), (room, "sync_folder"), (room, "write")],
)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, None])
def test_no_partial_record_is_read_after_any_failure(
    module: ModuleType,
    where: str,
    number: int | None,
    stem: Path,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every call of the system fails in turn, or Ctrl-C comes; for a first and a second record."""
    real = getattr(module, where)
    error = KeyboardInterrupt() if number is None else OSError(number, os.strerror(number))
    expected = KeyboardInterrupt if number is None else OutputError
    for fails_at in range(30):
        calls = 0

        def failing(*arguments: Any, fails_at: int = fails_at) -> Any:
            nonlocal calls
            calls += 1
            if calls == fails_at + 1:
                if where == "_put":
                    arguments[0].write(arguments[1][: len(arguments[1]) // 2])
                raise error
            return real(*arguments)

        path.write_bytes(by_hand(({"key": "old", "arrays": []}, b"")))
        recorded = []
        journal = begin(stem, "new")
        monkeypatch.setattr(module, where, failing)
        with journal:
            for i in range(2):
                try:
                    journal.record(f"r{i}", numbers(i))
                except expected:
                    continue
                recorded.append(i)
                assert same(journal.recall(f"r{i}"), numbers(i))
        monkeypatch.setattr(module, where, real)
        assert files(path.parent) == ["run.journal"]
        with begin(stem, "new") as journal:
            found = [i for i in range(2) if journal.recall(f"r{i}") is not None]
            assert found == recorded
            assert all(same(journal.recall(f"r{i}"), numbers(i)) for i in found)
            assert journal.truncated == 0
        if calls <= fails_at:
            assert recorded == [0, 1]
            break
    else:
        pytest.fail("it never came through")


def _as_somebody(function: Any) -> None:
    root = os.geteuid() == 0
    if root:  # to whom nothing is forbidden
        os.seteuid(65534)
    try:
        function()
    finally:
        if root:
            os.seteuid(0)


def test_a_folder_without_write_permission_is_an_error() -> None:
    # Not in tmp_path, whose folders are closed to others: only this one may be what is forbidden.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)

        def refuse() -> None:
            with pytest.raises(OutputError) as error:
                begin(Path(folder) / "run")
            assert str(error.value) == (
                f"{folder}/run.journal cannot be written: Permission denied. Choose another --out"
            )

        _as_somebody(refuse)
        assert files(folder) == []


def test_a_removed_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot be written: No such file or directory\. Choose"):
        begin(tmp_path / "gone" / "run")


def test_a_folder_that_is_removed_during_the_run_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with begin(folder / "run") as journal:
        (folder / "run.journal").unlink()
        folder.rmdir()
        with pytest.raises(OutputError, match="cannot be written: No such file or directory"):
            journal.record("r0", numbers(0))
        journal.finish()


# -- what has the name of a journal -----------------------------------------------------------


def test_a_link_is_not_followed(stem: Path, path: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    for content in (b"precious", None):
        if content is None:
            target.unlink()
        else:
            target.write_bytes(content)
        path.unlink(missing_ok=True)
        path.symlink_to(target)
        with pytest.raises(OutputError) as error:
            begin(stem)
        assert str(error.value) == (
            f"{path} is a symbolic link, but a run's journal must be a regular file. "
            "Remove it, or choose another --out"
        )
        assert target.exists() == (content is not None)
    assert path.is_symlink()


def test_a_folder_and_a_pipe_are_not_journals(stem: Path, path: Path) -> None:
    path.mkdir()
    with pytest.raises(OutputError, match="is a folder, but a run's journal"):
        begin(stem)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(OutputError, match="is a pipe, but a run's journal"):
        begin(stem)


@pytest.mark.parametrize(
    "name", ["with space", "two\nlines", "потеря 損失", "-o", "bytes \udcff", "…"]
)
def test_any_name_works(name: str, tmp_path: Path) -> None:
    stem = tmp_path / name
    told = {f"the checkpoint {name}": "a" * 64}
    with begin(stem, "i", told) as journal:
        journal.record(name, {name: np.arange(2)})
        with pytest.raises(OutputError) as error:
            begin(stem, "i", told)
        assert str(error.value).isprintable()
        assert " is in use by" in str(error.value)
    with begin(stem, "i", told) as journal:
        assert same(journal.recall(name), {name: np.arange(2)})
        journal.finish()
    assert files(tmp_path) == []


def test_a_run_that_recorded_nothing_leaves_nothing(stem: Path, path: Path) -> None:
    journal = begin(stem)
    assert files(path.parent) == ["run.journal"]
    with contextlib.suppress(ZeroDivisionError), journal:
        raise ZeroDivisionError
    assert files(path.parent) == []
