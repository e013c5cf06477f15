"""The journal of a run: records finished tasks, so that an interrupted run can be resumed."""

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
    write,
    write_header,
)
from losscli.evaluation.journal.messages import differences
from losscli.files import create

__all__ = ["Journal"]


class Journal:
    """The records of a run on the disk; opened by `Journal.open`.

    One run at a time holds a journal: others are refused until it is closed or its process ends.
    Before the first record, only the holder's name is written: a command that fails before that
    leaves an older journal unchanged.

    Attributes:
        path: The file.
        restart_reason: Why records in the file are not used; None if they are, or there are none.
        changes: Clauses on how the conditions differ from those of the run that started the
            journal.
        truncated: The bytes of invalid or incomplete records that were removed.
        locked: Whether other runs are locked out; False if the file system has no locks.
        recalled: How much of the progress was recalled; the caller of `recall` adds to it.
    """

    path: Path
    restart_reason: str | None
    changes: tuple[str, ...]
    truncated: int
    locked: bool
    recalled: float

    def __init__(self, path: Path, file: FileIO, head: Mapping[str, Any], *, locked: bool) -> None:
        self.path = path
        self.restart_reason = None
        self.changes = ()
        self.truncated = 0
        self.locked = locked
        self.recalled = 0.0
        self._file = file
        self._head = head
        self._index: dict[str, Frame] = {}
        # The last valid frame, after which the next is written. None before there is a head.
        self._last: Frame | None = None
        # Whether the file has records of another run, which stay until this run has one.
        self._foreign = False
        _HELD.add(self)

    @classmethod
    def open(cls, stem: Path, identity: str, conditions: Mapping[str, Any]) -> Self:
        """Opens the journal of a run, or creates it.

        Args:
            stem: The stem of the results: the journal is ``STEM.journal``.
            identity: A digest of everything that determines the numbers: records of another
                identity are never recalled.
            conditions: The conditions of the run for messages, by names such as ``--limit``; JSON
                types. Digests are 64 hexadecimal digits. They may include more than the identity.

        Returns:
            The journal, held until it is closed.

        Raises:
            OutputError: Another run holds it, or the file cannot be read or written, or is not a
                regular file.
        """
        path = stem.with_name(f"{stem.name}.journal")
        head = {"identity": identity, "told": json.loads(json.dumps(conditions))}
        aside = None
        with explained(path):
            while True:
                file = open_regular(path)
                held = False
                try:
                    locked = lock(file, path)
                    # It may have been removed or replaced before it was locked.
                    if is_at(file, path):
                        if is_journal(file):
                            held = True
                            journal = cls(path, file, head, locked=locked)
                            journal._read()
                            journal.restart_reason = journal.restart_reason or aside
                            return journal
                        aside = set_aside(path)
                except BaseException:
                    # If the disk is full, no empty journal is left behind.
                    with contextlib.suppress(OSError):
                        if held and os.fstat(file.fileno()).st_size <= FIRST:
                            path.unlink()
                    file.close()
                    raise
                file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """The number of records."""
        return len(self._index)

    def recall(self, key: str) -> dict[str, NDArray[Any]] | None:
        """Reads a record of this run, or of the interrupted run that it resumes.

        Args:
            key: The key of the record; of several the last one is read.

        Returns:
            The arrays, bit for bit; None if there is no such record.
        """
        if key not in self._index:
            return None
        with contextlib.suppress(OSError, ValueError):
            arrays = read(self._file, self._index[key])
            if arrays is not None:
                return arrays
        # It was valid when the journal was opened and is damaged now: evaluate it again.
        del self._index[key]
        return None

    def record(self, key: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Writes a record, which survives a loss of power once this returns.

        Args:
            key: A key that is unique in this run.
            arrays: Numeric arrays by name.

        Raises:
            OutputError: The disk is full or cannot be written to; earlier records are kept.
        """
        with explained(self.path):
            if self._last is None:
                self._write_head()
            assert self._last is not None
            described = [(name, a.dtype.str, a.shape) for name, a in arrays.items()]
            description = {"key": key, "arrays": described}
            start = self._last.end
            try:
                frame = write(self._file, start, self._last.seal, description, arrays)
                sync(self._file)
            except BaseException:
                # An incomplete record would be detected, but takes space that may be needed.
                with contextlib.suppress(OSError):
                    self._file.truncate(start)
                raise
            self._last = frame
            self._index[key] = frame

    def finish(self) -> None:
        """Removes the journal, because the results are written, and closes it."""
        if sys.platform != "win32":
            # First make the results survive a loss of power.
            with contextlib.suppress(OSError):
                sync_folder(self.path.parent)
        self._close(remove=True)
        self._index.clear()

    def close(self) -> None:
        """Closes the journal; the file stays if it has any record."""
        self._close(remove=not self._index and not self._foreign)

    def _close(self, *, remove: bool) -> None:
        if self._file.closed:
            return
        with contextlib.suppress(OSError):
            if remove and is_at(self._file, self.path):
                if sys.platform == "win32":
                    self._file.close()  # an open file cannot be removed there
                self.path.unlink()
        self._file.close()
        _HELD.discard(self)

    def _read(self) -> None:
        """Reads the index and removes invalid frames."""
        size = os.fstat(self._file.fileno()).st_size
        if is_of_another_version(self._file, size):
            self.restart_reason = "it was written by another version of losscli"
            self._foreign = True
            return
        self._read_frames(size)
        if self._last is None and not self._foreign:
            self._file.truncate(0)
        write_header(self._file)

    def _read_frames(self, size: int) -> None:
        all_frames = frames(self._file, size)
        head = next(all_frames, None)
        conditions = {} if head is None else head.description.get("told")
        if head is None or not isinstance(conditions, dict):
            self.restart_reason = "its beginning is damaged" if size > FIRST else None
            return
        self.changes = tuple(differences(conditions, self._head["told"]))
        if head.description.get("identity") != self._head["identity"]:
            self.restart_reason = "; ".join(self.changes) or "it belongs to another run"
            self._foreign = True
            return
        self._last = head
        for frame in all_frames:
            try:
                frame.arrays()
                self._index[frame.description["key"]] = frame
            except (ValueError, TypeError, KeyError):
                break
            self._last = frame
        self.truncated = size - self._last.end
        if self.truncated:
            self._file.truncate(self._last.end)
            sync(self._file)

    def _write_head(self) -> None:
        """Writes the head to a new file, which then replaces the old one."""
        if sys.platform == "win32":
            self._file.truncate(0)  # an open file cannot be replaced there
            file = self._file
        else:
            # Only the holder of the journal uses this name; a killed run may have left such a file.
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            temporary.unlink(missing_ok=True)
            file = create(temporary)
        try:
            write_header(file)
            frame = write(file, FIRST, first_seal(), self._head, {})
            sync(file)
            if file is not self._file:
                # Locked before it is visible to other runs.
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


# A forked child, such as a data loading worker, inherits the journal and its lock. It must not keep
# the lock when its parent is gone.
_HELD: weakref.WeakSet[Journal] = weakref.WeakSet()


def _close_in_child() -> None:
    for journal in list(_HELD):
        journal._file.close()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_close_in_child)
