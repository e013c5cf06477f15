"""Results of studies, and their files, which are written atomically."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from glob import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from losscli.drawing import FULL, Drawing
from losscli.errors import OutputError, TableError, UsageError, printable
from losscli.files import create, read_regular
from losscli.registry import COLUMN_TYPES, Command, command_of, load
from losscli.settings import checked
from losscli.summaries import from_json
from losscli.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Draw",
    "Output",
    "Result",
    "Run",
    "check_labels",
    "default_stem",
    "draw",
    "label_runs",
    "picture_of",
    "read_summary",
    "render_html",
    "stem_of",
    "to_json",
]

FIGURE_SUFFIXES = (".png", ".svg", ".pdf", ".html")

# Non-ASCII characters. json escapes control characters itself; its own newlines are kept.
_NON_ASCII = re.compile(r"[^\n -~]")


S_co = TypeVar("S_co", bound=Mapping[str, object], covariant=True)
"""The type of a summary, see `losscli.summaries`."""


@dataclass(frozen=True)
class Run(Generic[S_co]):
    """One run of a command, to draw.

    Attributes:
        table: The main table, STEM.csv.
        summary: The summary, STEM.json; ``{}`` if there is only the CSV.
        label: The name in a figure of several runs; by default its first and last checkpoint.
        more: The further tables by NAME of STEM.NAME.csv, such as ``surface``.
        checkpoint_labels: The names of the `checkpoints` in a figure; by default their own.
    """

    table: Table
    summary: S_co
    label: str = ""
    more: Mapping[str, Table] = field(default_factory=dict)
    checkpoint_labels: Sequence[str] = ()

    @property
    def checkpoints(self) -> list[str]:
        """The names of the checkpoints in their order, as far as they are known."""
        entries: Any = self.summary.get("checkpoints")
        if entries:
            return [str(entry.get("name", "")) for entry in entries]
        columns = [c for c in self.table.columns if COLUMN_TYPES.get(c) == "path"]
        return [str(name) for name in self.table.unique(*columns)] if columns else []

    def label_of(self, name: str) -> str:
        """Returns the label of a checkpoint; empty if it has none."""
        labels = zip(self.checkpoints, self.checkpoint_labels, strict=False)
        return next((label for checkpoint, label in labels if checkpoint == name), "")


class Draw(Protocol):
    """Draws runs of one command."""

    def __call__(self, runs: Sequence[Run[Any]], drawing: Drawing) -> Figure:
        """Draws a figure.

        Args:
            runs: The runs.
            drawing: How.

        Returns:
            A matplotlib figure.
        """


@dataclass(frozen=True)
class Result(Generic[S_co]):
    """The result of a study.

    Attributes:
        table: One row for each evaluated point and split.
        summary: The findings and their origin, in the types of JSON; floats may be non-finite.
        draw: Draws the result; it imports Matplotlib when it is called.
        more: Further tables by NAME of STEM.NAME.csv.
    """

    table: Table
    summary: S_co
    draw: Draw = field(repr=False, compare=False)
    more: Mapping[str, Table] = field(default_factory=dict)

    @property
    def _run(self) -> Run[S_co]:
        return Run(self.table, self.summary, more=self.more)

    @checked()
    def figure(
        self,
        *,
        log: bool = False,
        size: str = "full",
        label: str | Sequence[str] = (),
        ylim: tuple[float, float] | None = None,
        style: str | os.PathLike[str] | None = None,
        no_markers: bool = False,
    ) -> Figure:
        """Draws the result.

        Args:
            log: Whether the loss has a logarithmic axis, or scale of colours.
            size: ``full``, ``paper``, ``slide`` or ``WxH`` in inches.
            label: A name for each checkpoint, in their order; none for their own names.
            ylim: The lowest and the highest loss on its axis or scale of colours.
            style: A Matplotlib style sheet.
            no_markers: Whether curves have no dots and no marks at their ends and extrema.

        Returns:
            A matplotlib figure.

        Raises:
            UsageError: A value cannot be drawn, or the style sheet cannot be read.
        """
        labels: Any = label
        read = load("losscli.plotting.style_sheet:read")
        settings = {} if style is None else read(style)
        drawing = Drawing("", log, size, labels, ylim, settings, no_markers)
        return self.draw_with(drawing)

    def draw_with(self, drawing: Drawing) -> Figure:
        """Draws the result.

        Args:
            drawing: How.

        Returns:
            A matplotlib figure.
        """
        return self.draw(label_runs([self._run], drawing.label), drawing)

    @checked()
    def html(self, *, log: bool = False, label: str | Sequence[str] = ()) -> str:
        """Renders the result as an interactive page.

        Args:
            log: Whether the scale of the loss is logarithmic at first.
            label: A name for each checkpoint, in their order; none for their own names.

        Returns:
            HTML that needs no other file and no network.

        Raises:
            UsageError: Plotly is not installed.
        """
        labels: Any = label
        drawing = Drawing(log=log, label=labels)
        return render_html(label_runs([self._run], drawing.label), drawing)


def check_labels(labels: Sequence[str], number: int, things: str = "checkpoints") -> None:
    """Checks that there is a label for each thing, or none.

    Args:
        labels: The labels.
        number: The number of things.
        things: What they are, in the plural.

    Raises:
        UsageError: There are too many or too few labels.
    """
    if labels and len(labels) != number:
        raise UsageError(
            f"{len(labels)} labels for {number} {things}", "Give --label once for each, in order"
        )


def label_runs(runs: Sequence[Run[Any]], labels: Sequence[str]) -> list[Run[Any]]:
    """Gives labels to runs, or to the checkpoints of a single run.

    Args:
        runs: The runs.
        labels: A label for each of several runs, or for each checkpoint of a single one, or one
            for a single run that can be drawn together with others; none to change nothing.

    Returns:
        The runs.

    Raises:
        UsageError: There are too many or too few labels.
    """
    if not labels:
        return list(runs)
    if len(runs) > 1:
        check_labels(labels, len(runs), "CSV files")
        return [replace(run, label=label) for run, label in zip(runs, labels, strict=True)]
    number = len(runs[0].checkpoints)
    if len(labels) == 1 != number and not _shared_command(runs).not_overlaid:
        return [replace(runs[0], label=labels[0])]
    check_labels(labels, number or 1, "checkpoints" if number else "CSV files")
    return [replace(runs[0], checkpoint_labels=labels)]


def draw(runs: Sequence[Run[Any]], drawing: Drawing = FULL) -> Figure:
    """Draws runs of one command, by the columns of their tables.

    Args:
        runs: One or more, each with the table of a command.
        drawing: How.

    Returns:
        The figure, laid out and ready to be rendered.

    Raises:
        UsageError: The runs are of several commands, or have no figure together.
    """
    return _shared_command(runs).draw(runs, drawing)


def render_html(runs: Sequence[Run[Any]], drawing: Drawing = FULL) -> str:
    """Renders runs of one command as an interactive page, by the columns of their tables.

    Args:
        runs: One or more, each with the table of a command.
        drawing: The title, and whether the scale of the loss is logarithmic at first.

    Returns:
        HTML that needs no other file and no network.

    Raises:
        UsageError: The runs are of several commands or have no figure together, or Plotly is not
            installed.
    """
    _check_plotly()
    return _shared_command(runs).html(runs, drawing)


def _check_plotly() -> None:
    if find_spec("plotly") is None:
        raise UsageError(
            "a figure in .html needs plotly, which is not installed", "pip install 'losscli[html]'"
        )


def _shared_command(runs: Sequence[Run[Any]]) -> Command:
    """Returns the command of all runs."""
    commands = {command.name: command for run in runs if (command := command_of(run.table.columns))}
    if len(commands) > 1:
        raise UsageError(
            f"tables of {' and '.join(sorted(commands))} have no axes in common",
            "Lay tables of one command over each other",
        )
    (command,) = commands.values()
    return command


def to_json(summary: Mapping[str, Any], *, indent: int | None = 2) -> str:
    """Serialises a summary as JSON.

    Args:
        summary: The summary.
        indent: The number of spaces per level; None for a single line.

    Returns:
        Strict JSON, with null for non-finite numbers. Characters that are not printable are
        escaped, so that names from files cannot control a terminal.
    """
    text = json.dumps(_strict(summary), indent=indent, allow_nan=False, ensure_ascii=False)
    return _NON_ASCII.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    character = match[0]
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
    """Derives the default stem from the command and the checkpoints.

    Args:
        command: The command.
        names: The checkpoints as named by the user.

    Returns:
        A stem in the current folder, such as ``interpolate-relu-init-final``: the name of each
        checkpoint, after its folder if that differs from the previous one.
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
    """Parses ``--out``.

    Args:
        out: The value of the option.

    Returns:
        The stem, without the suffix of an output file such as .png.

    Raises:
        UsageError: The value is a folder.
    """
    if not out or out.endswith("/") or Path(out).is_dir():
        raise UsageError(f"--out {out!r} is a folder, not a stem of file names", "Give folder/name")
    path = Path(out)
    has_suffix = path.suffix.lower() in {*FIGURE_SUFFIXES, ".csv", ".json"} and path.stem
    return path.with_suffix("") if has_suffix else path


def picture_of(out: str | None) -> tuple[Path, ...]:
    """Returns the figure that ``--out`` names.

    Args:
        out: The value of the option; None if it is not given.

    Returns:
        The path of the figure; empty if ``--out`` is a stem.
    """
    path = Path(out or "")
    return (path,) if path.suffix.lower() in FIGURE_SUFFIXES and path.stem else ()


def read_summary(path: Path, command: Command) -> dict[str, Any]:
    """Reads the summary of a run.

    Args:
        path: STEM.json.
        command: The command of the run.

    Returns:
        The summary in the type of the command; ``{}`` if there is none, or if the file is not a
        summary of this command.

    Raises:
        TableError: A value is of another type than the command writes.
    """
    summary = _read_object(path)
    match summary:
        case {
            "command": command.name,
            "checkpoints": [*checkpoints],
            "splits": dict(splits),
            "examples": dict(),
        }:
            named = all(isinstance(c, dict) and isinstance(c.get("name"), str) for c in checkpoints)
            has_tables = isinstance(summary.get("tables", []), list)
            if not (named and has_tables and all(isinstance(s, dict) for s in splits.values())):
                return {}
        case _:
            return {}
    try:
        converted: dict[str, Any] = from_json(summary, load(command.summary))
    except ValueError as fault:
        raise TableError(
            f"{path} does not hold what losscli writes: {printable(str(fault))}",
            "Move it away, or make it again with its CSV",
        ) from None
    return converted


def _read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object; ``{}`` if the file is missing or holds none."""
    try:
        value = json.loads(read_regular(path).decode())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class Output:
    """The output files of a run.

    Attributes:
        stem: The stem of STEM.csv and STEM.json.
        figures: The figures; empty for none.
        force: Whether the results of another run may be overwritten.
    """

    stem: Path
    figures: tuple[Path, ...]
    force: bool = False

    @classmethod
    def plan(
        cls, stem: Path, figures: Sequence[Path], *, draw: bool = True, force: bool = False
    ) -> Output:
        """Plans the files and checks, before any work is done, that they can be written.

        Args:
            stem: The stem.
            figures: The figures that the user named.
            draw: Whether to draw STEM.png if ``figures`` is empty.
            force: Whether results of another run may be overwritten.

        Returns:
            The plan.

        Raises:
            UsageError: A figure has an unknown suffix, or needs a package that is not installed.
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
        if any(path.suffix.lower() == ".html" for path in figures):
            _check_plotly()
        for parent in {path.parent for path in (stem, *figures)}:
            # Missing folders are created later, inside the nearest existing one.
            folder = next(p for p in (parent, *parent.parents) if p.exists())
            if not folder.is_dir():
                raise OutputError(f"{folder} is no folder", "Choose another --out")
            if not os.access(folder, os.W_OK | os.X_OK):
                raise OutputError(
                    f"the folder {folder} cannot be written to", "Choose another with --out"
                )
        return cls(stem, tuple(figures), force)

    def make_folder(self) -> None:
        """Creates the folder of the stem if it does not exist.

        Raises:
            OutputError: The folder cannot be created.
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
            identity: The identity of this run.
            tables: The names of further tables that the run may write.

        Raises:
            OutputError: A file of another run exists.
        """
        if self.force:
            return
        files = [self._file(".csv"), *(self._file(f".{name}.csv") for name in tables)]
        existing = [path for path in (*files, *self.figures) if path.exists()]
        summary = self._file(".json")
        if summary.exists():
            existing.append(summary)
        if not existing:
            return
        if _read_object(self._file(".json")).get("identity") != identity:
            raise OutputError(
                f"{existing[0]} holds the results of another run",
                "Choose another --out, or overwrite it with --force",
            )

    def write(
        self, result: Result[Any], pictures: Mapping[Path, bytes], known_tables: Collection[str]
    ) -> list[Path]:
        """Writes a result: all files under temporary names first, then all are renamed.

        Args:
            result: The result.
            pictures: The contents of ``figures``.
            known_tables: The names of all further tables of any command. Those of an older run
                with the same stem are removed.

        Returns:
            The files.

        Raises:
            OutputError: A file cannot be written. No file is changed then.
        """
        old_tables = _read_object(self._file(".json")).get("tables")
        summary = f"{to_json(result.summary)}\n".encode()
        # The summary comes first: if the process is killed in between, it identifies the run. The
        # main table comes last: if it exists, the result is complete.
        contents = {self._file(".json"): summary}
        for name, table in result.more.items():
            contents[self._file(f".{name}.csv")] = table.to_csv().encode()
        contents |= pictures
        contents[self._file(".csv")] = result.table.to_csv().encode()
        for path in contents:
            # Temporary files of runs that were killed.
            for leftover in path.parent.glob(f".{escape(path.name)}.*.tmp"):
                leftover.unlink(missing_ok=True)
        replace_all(contents)
        # Tables of an older run would be taken for tables of this run.
        for name in old_tables if isinstance(old_tables, list) else ():
            if name in known_tables and name not in result.more:
                self._file(f".{name}.csv").unlink(missing_ok=True)
        more = (self._file(f".{name}.csv") for name in result.more)
        return [self._file(".csv"), *more, *self.figures, self._file(".json")]

    def write_pictures(self, pictures: Mapping[Path, bytes]) -> list[Path]:
        """Writes figures only; refuses to overwrite different ones unless ``force``.

        Args:
            pictures: The contents of ``figures``.

        Returns:
            The files.

        Raises:
            OutputError: A file exists with other content, or cannot be written.
        """
        for path, content in pictures.items():
            if not self.force and path.exists() and _read_if_possible(path) != content:
                raise OutputError(
                    f"{path} is another picture",
                    "Choose another name, or overwrite it with --force",
                )
        return replace_all(pictures)

    def _file(self, suffix: str) -> Path:
        return self.stem.with_name(self.stem.name + suffix)


def _read_if_possible(path: Path) -> bytes | None:
    try:
        return read_regular(path)
    except OSError:
        return None


def replace_all(contents: Mapping[Path, bytes]) -> list[Path]:
    """Writes several files: either all or none.

    Args:
        contents: The content of each file.

    Returns:
        The files.

    Raises:
        OutputError: A file cannot be written. No file is changed then, and no temporary file is
            left.
    """
    for path in contents:
        # Checked first, since a rename would fail only after others have succeeded.
        if path.is_dir():
            raise OutputError(f"{path} is a folder", "Move it away, or choose another --out")
    current = next(iter(contents), Path())
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in contents}
    try:
        for current, content in contents.items():
            current.parent.mkdir(parents=True, exist_ok=True)
            temporary[current].unlink(missing_ok=True)  # of a killed process with the same id
            with io.BufferedWriter(create(temporary[current])) as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for current, written in temporary.items():
            written.replace(current)
    except OSError as error:
        is_full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        raise OutputError(
            f"{current} cannot be written: {error.strerror}",
            "Make room" if is_full else "Choose another --out",
        ) from None
    finally:
        for written in temporary.values():
            with contextlib.suppress(OSError):
                written.unlink()
    return list(contents)
