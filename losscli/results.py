"""Results: tables and a summary, and the files they are written to, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from losscli.errors import OutputError, UsageError
from losscli.files import create, read_regular
from losscli.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Drawing",
    "Output",
    "Result",
    "Run",
    "default_stem",
    "picture_of",
    "stem_of",
    "to_json",
]

FIGURE_SUFFIXES = (".png", ".svg", ".pdf")

# Those below a space are escaped by json itself, all but the ends of its own lines.
_BEYOND_ASCII = re.compile(r"[^\n -~]")


S_co = TypeVar("S_co", bound=Mapping[str, object], covariant=True)
"""The type of the summary, of `losscli.summaries`."""


@dataclass(frozen=True)
class Run(Generic[S_co]):
    """One run of a command, to be drawn.

    Attributes:
        table: Its rows, as in STEM.csv.
        summary: Its JSON, or ``{}`` where only the CSV is at hand.
        label: What to call it beside other runs; by default its first and last checkpoint.
        more: Its further tables by the name in their file: ``surface`` for STEM.surface.csv.
        checkpoint_labels: What to call the checkpoints of a matrix of barriers, in its order;
            by default their names.
    """

    table: Table
    summary: S_co
    label: str = ""
    more: Mapping[str, Table] = field(default_factory=dict)
    checkpoint_labels: Sequence[str] = ()


class Drawing(Protocol):
    """Draws runs of one command."""

    def __call__(self, runs: Sequence[Run[Any]], *, log: bool) -> Figure:
        """Draws.

        Args:
            runs: The runs.
            log: Whether the loss has a logarithmic axis.

        Returns:
            A matplotlib figure.
        """


@dataclass(frozen=True)
class Result(Generic[S_co]):
    """What a study found.

    Attributes:
        table: One row for each evaluated point and split.
        summary: What was found and where it came from, made of JSON's types and floats.
        draw: Draws the result; it imports matplotlib when it is called.
        more: Further tables, by the name that their files have: STEM.NAME.csv.
    """

    table: Table
    summary: S_co
    draw: Drawing = field(repr=False, compare=False)
    more: Mapping[str, Table] = field(default_factory=dict)

    def figure(self, *, log: bool = False) -> Figure:
        """Draws the result.

        Args:
            log: Whether the loss has a logarithmic axis.

        Returns:
            A matplotlib figure.
        """
        return self.draw([Run(self.table, self.summary, more=self.more)], log=log)


def to_json(summary: Mapping[str, Any], *, indent: int | None = 2) -> str:
    """Writes a summary as JSON.

    Args:
        summary: The summary.
        indent: Spaces a level; None puts all into one line.

    Returns:
        Strict JSON: numbers that are not finite, which JSON does not know, are null. Characters
        that are not printable stand as escapes, so that no name from a file steers a terminal.
    """
    text = json.dumps(_strict(summary), indent=indent, allow_nan=False, ensure_ascii=False)
    return _BEYOND_ASCII.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    character = found[0]
    return character if character.isprintable() else json.dumps(character)[1:-1]


def _strict(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value


def default_stem(command: str, names: Sequence[str]) -> str:
    """Names the results after the command and the checkpoints.

    Args:
        command: The command.
        names: The checkpoints as named by the user.

    Returns:
        A stem for the current folder, such as ``interpolate-relu-init-final``: of each
        checkpoint its folder, where it is another than the one before, and its name.
    """
    words, folder = [command], ""
    for name in names:
        path, _, key = name.partition("#")
        parent = Path(path).resolve().parent.name
        if ":" not in name and parent and parent != folder:
            words.append(parent)
            folder = parent
        words += [Path(path).stem, key]
    stem = "-".join(re.sub(r"[^\w.+]+", "-", word).strip("-") for word in words if word)
    return stem[:120]


def stem_of(out: str) -> Path:
    """Reads what ``--out`` says.

    Args:
        out: What it says.

    Returns:
        The stem: without the suffix of a file that a run writes, such as .png.

    Raises:
        UsageError: It is a folder.
    """
    if not out or out.endswith("/") or Path(out).is_dir():
        raise UsageError(f"--out {out!r} is a folder, not a stem of file names", "Give folder/name")
    path = Path(out)
    written = path.suffix.lower() in {*FIGURE_SUFFIXES, ".csv", ".json"} and path.stem
    return path.with_suffix("") if written else path


def picture_of(out: str | None) -> tuple[Path, ...]:
    """Reads which picture ``--out`` names, if any.

    Args:
        out: What it says; None where it is not given.

    Returns:
        The picture; nothing where it is a stem of file names.
    """
    path = Path(out or "")
    return (path,) if path.suffix.lower() in FIGURE_SUFFIXES and path.stem else ()


@dataclass(frozen=True)
class Output:
    """The files that a run writes.

    Attributes:
        stem: Of STEM.csv, STEM.json and STEM.png.
        figures: The pictures to write instead of STEM.png; empty for none at all.
        force: Whether the results of another run may be overwritten.
    """

    stem: Path
    figures: tuple[Path, ...]
    force: bool = False

    @classmethod
    def plan(
        cls, stem: Path, figures: Sequence[Path], *, draw: bool = True, force: bool = False
    ) -> Output:
        """Plans the files and makes sure, before any work is done, that they can be written.

        Args:
            stem: The stem.
            figures: The pictures asked for by name.
            draw: Whether STEM.png is drawn where no picture is named.
            force: Whether results of another run may be overwritten.

        Returns:
            The plan.

        Raises:
            UsageError: A picture has an unknown suffix.
            OutputError: A folder cannot be written to.
        """
        if not figures and draw:
            figures = [stem.with_name(f"{stem.name}.png")]
        for path in figures:
            if path.suffix.lower() not in FIGURE_SUFFIXES:
                raise UsageError(
                    f"{path} has no suffix of a picture",
                    f"Choose one of {', '.join(FIGURE_SUFFIXES)}",
                )
        for parent in {path.parent for path in (stem, *figures)}:
            # What is not there is made when it is written to.
            folder = next(p for p in (parent, *parent.parents) if p.exists())
            if not folder.is_dir():
                raise OutputError(f"{folder} is no folder", "Choose another --out")
            if not os.access(folder, os.W_OK | os.X_OK):
                raise OutputError(
                    f"the folder {folder} cannot be written to", "Choose another with --out"
                )
        return cls(stem, tuple(figures), force)

    def make_folder(self) -> None:
        """Makes the folder of the files, where it is not there yet.

        Raises:
            OutputError: It cannot be made.
        """
        try:
            self.stem.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"the folder {self.stem.parent} cannot be made: {error.strerror}",
                "Choose another --out",
            ) from None

    def guard(self, identity: str, tables: Iterable[str] = ()) -> None:
        """Refuses to overwrite the results of another run.

        Args:
            identity: What tells this run from others.
            tables: The names of further tables that may be written.

        Raises:
            OutputError: A file is in the way that this very run did not write.
        """
        if self.force:
            return
        files = [self._file(".csv"), *(self._file(f".{name}.csv") for name in tables)]
        there = [path for path in (*files, *self.figures) if path.exists()]
        summary = self._file(".json")
        if summary.exists():
            there.append(summary)
        if not there:
            return
        if self._before().get("identity") != identity:
            raise OutputError(
                f"{there[0]} holds the results of another run",
                "Choose another --out, or overwrite it with --force",
            )

    def write(
        self, result: Result[Any], pictures: Mapping[Path, bytes], known_tables: Collection[str]
    ) -> list[Path]:
        """Writes a result: every file under a temporary name first, then all are renamed.

        Args:
            result: The result.
            pictures: What the ``figures`` are to hold.
            known_tables: The names of the further tables that any run may write. One that an
                older run left in the place of this one is removed.

        Returns:
            The files.

        Raises:
            OutputError: A file cannot be written; then none is left behind.
        """
        older = self._before().get("tables")
        summary = f"{to_json(result.summary)}\n".encode()
        # The summary comes first: where this is killed between two files, it tells whose they are.
        # The table comes last: where it stands, so does all else.
        contents = {self._file(".json"): summary}
        for name, table in result.more.items():
            contents[self._file(f".{name}.csv")] = table.to_csv().encode()
        contents |= pictures
        contents[self._file(".csv")] = result.table.to_csv().encode()
        for path in contents:
            # A run that was killed while it wrote has left them.
            for left in path.parent.glob(f".{escape(path.name)}.*.tmp"):
                left.unlink(missing_ok=True)
        replace_all(contents)
        # What an older run left would be taken for this one's.
        for name in older if isinstance(older, list) else ():
            if name in known_tables and name not in result.more:
                self._file(f".{name}.csv").unlink(missing_ok=True)
        more = (self._file(f".{name}.csv") for name in result.more)
        return [self._file(".csv"), *more, *self.figures, self._file(".json")]

    def write_pictures(self, pictures: Mapping[Path, bytes]) -> list[Path]:
        """Writes pictures alone, and overwrites no other picture.

        Args:
            pictures: What the ``figures`` are to hold.

        Returns:
            The files.

        Raises:
            OutputError: A file holds another picture, or cannot be written.
        """
        for path, content in pictures.items():
            if not self.force and path.exists() and _held(path) != content:
                raise OutputError(
                    f"{path} is another picture",
                    "Choose another name, or overwrite it with --force",
                )
        return replace_all(pictures)

    def _before(self) -> dict[str, Any]:
        """The summary of the run whose results are there, if any."""
        try:
            summary = json.loads(read_regular(self._file(".json")).decode())
        except (OSError, ValueError, RecursionError):
            return {}
        return summary if isinstance(summary, dict) else {}

    def _file(self, suffix: str) -> Path:
        return self.stem.with_name(self.stem.name + suffix)


def _held(path: Path) -> bytes | None:
    try:
        return read_regular(path)
    except OSError:
        return None


def replace_all(contents: Mapping[Path, bytes]) -> list[Path]:
    """Writes files whole or not at all.

    Args:
        contents: What to write where.

    Returns:
        The files.

    Raises:
        OutputError: A file cannot be written; then none is changed and nothing is left behind.
    """
    for path in contents:
        # The one thing that a rename fails at after others were renamed already.
        if path.is_dir():
            raise OutputError(f"{path} is a folder", "Move it away, or choose another --out")
    now = next(iter(contents), Path())
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in contents}
    try:
        for now, content in contents.items():
            now.parent.mkdir(parents=True, exist_ok=True)
            temporary[now].unlink(missing_ok=True)  # of a process of this number that was killed
            with io.BufferedWriter(create(temporary[now])) as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for now, written in temporary.items():
            written.replace(now)
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        raise OutputError(
            f"{now} cannot be written: {error.strerror}",
            "Make room" if full else "Choose another --out",
        ) from None
    finally:
        for written in temporary.values():
            with contextlib.suppress(OSError):
                written.unlink()
    return list(contents)
