"""Pickles: what is on the list is built, everything else is refused before it runs."""

from __future__ import annotations

import contextlib
import copyreg
import os
import pickle
import struct
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from losscli.checkpoint.pickles import BrokenPickleError, ForbiddenPickleError, load

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


class Point:
    def __init__(self, x: int, y: int) -> None:
        self.x, self.y = x, y


class StandIn:
    x: int
    y: int


class Call:
    """Pickles as a call of anything."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that hostile pickles make; it must never be there."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


# Letters that some protocol escapes, and of one to four bytes; an alphabet of all takes seconds.
texts = st.text("\0\t\n\r'\"\\ a\x7f\x85é\u2028模🙂\U0010ffff")
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner) | st.dictionaries(texts, inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@settings(max_examples=40)
@given(plain, st.sampled_from(PROTOCOLS))
def test_plain_values_are_read_as_pickle_reads_them(value: Any, protocol: int) -> None:
    assert load(pickle.dumps(value, protocol), {}) == value


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_listed_names_stand_for_what_the_list_says(protocol: int) -> None:
    content = pickle.dumps(Fraction(3, 4), protocol)
    allowed = {("fractions", "Fraction"): lambda *values: ("stand-in", values)}
    kind, values = load(content, allowed)
    assert (kind, [int(v) for v in values]) == ("stand-in", [3, 4])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_instances_are_built_of_the_stand_in(protocol: int) -> None:
    built = load(pickle.dumps(Point(3, 4), protocol), {(__name__, "Point"): StandIn})
    assert type(built) is StandIn
    assert (built.x, built.y) == (3, 4)


def test_an_unknown_escape_is_kept_without_a_warning() -> None:
    assert load(rb"S'a\|b'" + b"\n.", {}) == r"a\|b"


def test_strings_of_python_2_are_decoded_as_asked() -> None:
    content = b"\x80\x02U\x02\xc3\xa9q\x00."  # what Python 2 writes for 'é' in UTF-8
    assert load(content, {}, encoding="bytes") == "é".encode()
    assert load(content, {}, encoding="utf-8") == "é"
    with pytest.raises(BrokenPickleError, match="UnicodeDecodeError"):
        load(content, {})


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_code_is_refused_by_name_and_not_run(protocol: int, canary: Path) -> None:
    for hostile in (
        Call(os.system, f"touch {canary}"),
        {"data": [Call(exec, f"open({str(canary)!r}, 'w')")]},
    ):
        with pytest.raises(ForbiddenPickleError) as caught:
            load(pickle.dumps(hostile, protocol), {(__name__, "Point"): StandIn})
        assert caught.value.wanted.rpartition(".")[2] in {"system", "exec"}


def test_a_listed_name_gives_no_access_to_its_attributes(canary: Path) -> None:
    """Protocol 4 may name a path of attributes, which pickle itself would follow."""
    content = b"\x80\x04\x8c\x02os\x8c\x06a.path\x93."
    with pytest.raises(ForbiddenPickleError, match=r"os\.a\.path"):
        load(content, {("os", "a"): StandIn, ("os", "path"): StandIn})


def test_names_of_other_pythons_are_not_translated() -> None:
    content = b"c__builtin__\neval\n."
    with pytest.raises(ForbiddenPickleError, match=r"__builtin__\.eval"):
        load(content, {("builtins", "eval"): StandIn})
    assert load(content, {("__builtin__", "eval"): StandIn}) is StandIn


def test_extension_codes_are_refused_even_where_the_process_knows_them() -> None:
    copyreg.add_extension("decimal", "Decimal", 200)
    try:
        content = pickle.dumps(Decimal, 2)
        assert pickle.loads(content) is Decimal  # now it is cached, and find_class is not asked
        with pytest.raises(ForbiddenPickleError, match="EXT1"):
            load(content, {})
    finally:
        copyreg.remove_extension("decimal", "Decimal", 200)
        copyreg.clear_extension_cache()


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"Pid\n.", "PERSID"),
        (b"\x80\x02K\x01Q.", "BINPERSID"),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
    ],
)
def test_objects_from_outside_are_refused(content: bytes, wanted: str) -> None:
    with pytest.raises(ForbiddenPickleError, match=wanted):
        load(content, {})


def test_a_pickle_that_is_truncated_anywhere_is_broken() -> None:
    content = pickle.dumps({"data": [1, 2.5, "three", b"four", Point(5, 6)]}, 4)
    allowed = {(__name__, "Point"): StandIn}
    assert load(content + b"more", allowed)["data"][:2] == [1, 2.5]
    for length in range(len(content)):
        with pytest.raises(BrokenPickleError) as caught:
            load(content[:length], allowed)
        assert "\n" not in str(caught.value)


@given(st.binary(max_size=64))
def test_garbage_raises_only_these_errors(content: bytes) -> None:
    with contextlib.suppress(BrokenPickleError, ForbiddenPickleError):
        load(content, {("a", "b"): StandIn})


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.",  # a terabyte of bytes
        b"\x80\x02Nr" + struct.pack("<I", 1 << 31) + b".",  # a memo of 2³¹ objects
        b"Np99999999999\n.",
        b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N.",
    ],
)
def test_huge_lengths_and_indices_are_refused(content: bytes) -> None:
    with pytest.raises(BrokenPickleError):
        load(content, {})


def test_a_failing_stand_in_is_a_broken_pickle() -> None:
    def fail(*_: Any) -> None:
        raise OSError("no\nsuch thing")

    with pytest.raises(BrokenPickleError, match=r"^OSError: no such thing$"):
        load(pickle.dumps(Fraction(1, 2)), {("fractions", "Fraction"): fail})
