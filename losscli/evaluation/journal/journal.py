"""The journal of a run: what it has finished, so that it goes on where it was broken off."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import weakref
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any, Self

from numpy.typing import NDArray

from losscli.evaluation.journal.files import (
    explained,
    is_at,
    lock,
    open_regular,
    set_aside,
    sync,
    sync_folder,
)
from losscli.evaluation.journal.frames import (
    FIRST,
    Frame,
    first_seal,
    frames,
    is_journal,
    is_of_another_version,
    read,
    sign,
    write,
)
from losscli.evaluation.journal.messages import differences
from losscli.files import create

__all__ = ["Journal"]


class Journal:
    """What a run has finished, on the disk; made by `Journal.open`.

    A journal is held by one run at a time: others are refused until it is closed or its process
    has ended, in whatever way. Nothing is written but the holder's name before there is a first
    record: a command that fails before that leaves an older journal as it was.

    Attributes:
        path: The file.
        anew: Why what was in the file is not gone on with; None where it is, or nothing was.
        changes: What is told otherwise than by the run that began the journal, each in words.
        cut: The bytes of broken or half-written records that were cut off.
        locked: Whether other runs are kept out; False where the file system has no locks.
        skipped: How much of what progress counts was recalled: whoever recalls it adds to it.
    """

    path: Path
    anew: str | None
    changes: tuple[str, ...]
    cut: int
    locked: bool
    skipped: float

    def __init__(self, path: Path, file: FileIO, head: Mapping[str, Any], *, locked: bool) -> None:
        self.path = path
        self.anew = None
        self.changes = ()
        self.cut = 0
        self.locked = locked
        self.skipped = 0.0
        self._file = file
        self._head = head
        self._index: dict[str, Frame] = {}
        # The last whole frame: behind it the next one goes. None before there is a head.
        self._last: Frame | None = None
        # Whether what is there is of some other run, and stays until this one has a record.
        self._foreign = False
        _HELD.add(self)

    @classmethod
    def open(cls, stem: Path, identity: str, told: Mapping[str, Any]) -> Self:
        """Opens the journal of a run, or begins one.

        Args:
            stem: That of the results: the journal is ``STEM.journal``.
            identity: A digest of all that determines the numbers: records of another identity are
                never recalled.
            told: What the user may know of it, by names that make sense in a sentence, such as
                ``--limit``; made of JSON's types. A digest of a content is written as 64
                hexadecimal digits. It may tell more than goes into the identity.

        Returns:
            The journal, held until it is closed.

        Raises:
            OutputError: Another run holds it, or the file cannot be read or written, or is no
                regular file.
        """
        path = stem.with_name(f"{stem.name}.journal")
        head = {"identity": identity, "told": json.loads(json.dumps(told))}
        aside = None
        with explained(path):
            while True:
                file = open_regular(path)
                mine = False
                try:
                    locked = lock(file, path)
                    # It may have been removed or replaced before the lock was had.
                    if is_at(file, path):
                        if is_journal(file):
                            mine = True
                            journal = cls(path, file, head, locked=locked)
                            journal._read()
                            journal.anew = journal.anew or aside
                            return journal
                        aside = set_aside(path)
                except BaseException:
                    # A full disk leaves no journal that holds nothing.
                    with contextlib.suppress(OSError):
                        if mine and os.fstat(file.fileno()).st_size <= FIRST:
                            path.unlink()
                    file.close()
                    raise
                file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """The number of keys that are recalled."""
        return len(self._index)

    def recall(self, key: str) -> dict[str, NDArray[Any]] | None:
        """Recalls what was recorded, by this run or by the one that was broken off.

        Args:
            key: Of the record; of several the last.

        Returns:
            The arrays, to the bit; None where there is no such record.
        """
        if key not in self._index:
            return None
        with contextlib.suppress(OSError, ValueError):
            found = read(self._file, self._index[key])
            if found is not None:
                return found
        # It was whole when the journal was opened; what has become of it is evaluated anew.
        del self._index[key]
        return None

    def record(self, key: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Records what was evaluated; once this returns, it survives a loss of power.

        Args:
            key: What tells it from all else that this run evaluates.
            arrays: Arrays of numbers by name.

        Raises:
            OutputError: The disk is full, or cannot be written to; what was recorded before stays.
        """
        with explained(self.path):
            if self._last is None:
                self._begin()
            assert self._last is not None
            described = [(name, a.dtype.str, a.shape) for name, a in arrays.items()]
            description = {"key": key, "arrays": described}
            start = self._last.end
            try:
                frame = write(self._file, start, self._last.seal, description, arrays)
                sync(self._file)
            except BaseException:
                # What is half written would be found out, but takes room that may be needed.
                with contextlib.suppress(OSError):
                    self._file.truncate(start)
                raise
            self._last = frame
            self._index[key] = frame

    def finish(self) -> None:
        """Removes the journal, since the results stand; and lets go of it."""
        if sys.platform != "win32":
            # The results have to be there after a loss of power too.
            with contextlib.suppress(OSError):
                sync_folder(self.path.parent)
        self._close(remove=True)
        self._index.clear()

    def close(self) -> None:
        """Lets go of the journal; it stays where it is if there is any record in it."""
        self._close(remove=not self._index and not self._foreign)

    def _close(self, *, remove: bool) -> None:
        if self._file.closed:
            return
        with contextlib.suppress(OSError):
            if remove and is_at(self._file, self.path):
                if sys.platform == "win32":
                    self._file.close()  # what is open cannot be removed there
                self.path.unlink()
        self._file.close()
        _HELD.discard(self)

    def _read(self) -> None:
        """Reads the index, and cuts off what is broken."""
        size = os.fstat(self._file.fileno()).st_size
        if is_of_another_version(self._file, size):
            self.anew = "it was written by another version of losscli"
            self._foreign = True
            return
        self._read_frames(size)
        if self._last is None and not self._foreign:
            self._file.truncate(0)
        sign(self._file)

    def _read_frames(self, size: int) -> None:
        found = frames(self._file, size)
        head = next(found, None)
        told = {} if head is None else head.description.get("told")
        if head is None or not isinstance(told, dict):
            self.anew = "its beginning is damaged" if size > FIRST else None
            return
        self.changes = tuple(differences(told, self._head["told"]))
        if head.description.get("identity") != self._head["identity"]:
            self.anew = "; ".join(self.changes) or "it is of another run"
            self._foreign = True
            return
        self._last = head
        for frame in found:
            try:
                frame.arrays()
                self._index[frame.description["key"]] = frame
            except (ValueError, TypeError, KeyError):
                break
            self._last = frame
        self.cut = size - self._last.end
        if self.cut:
            self._file.truncate(self._last.end)
            sync(self._file)

    def _begin(self) -> None:
        """Writes the head, to a new file that then takes the place of the old one."""
        if sys.platform == "win32":
            self._file.truncate(0)  # what is open cannot be replaced there
            file = self._file
        else:
            # Who holds the journal has this name for itself too; a run that was killed may have
            # left one.
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            temporary.unlink(missing_ok=True)
            file = create(temporary)
        try:
            sign(file)
            frame = write(file, FIRST, first_seal(), self._head, {})
            sync(file)
            if file is not self._file:
                # Held before anybody can find it.
                self.locked = lock(file, self.path)
                temporary.replace(self.path)
                sync_folder(self.path.parent)
        except BaseException:
            if file is not self._file:
                file.close()
                temporary.unlink(missing_ok=True)
            raise
        if file is not self._file:
            self._file, file = file, self._file
            file.close()
        self._last, self._foreign = frame, False


# A forked child, such as a worker that reads data, has the journal too, and with it the lock. It
# must not keep that from the next run when its parent is gone.
_HELD: weakref.WeakSet[Journal] = weakref.WeakSet()


def _let_go() -> None:
    for journal in list(_HELD):
        journal._file.close()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_let_go)
