"""Results of studies, and their files, which are written atomically."""

from __future__ import annotations

import contextlib
import errno
import glob
import io
import json
import math
import os
import re
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from losscli.errors import OutputError, TableError, UsageError, printable
from losscli.files import create, read_object, read_regular
from losscli.registry import (
    ANIMATIONS,
    COLUMN_TYPES,
    COMMANDS,
    MESH,
    PATH_MESH,
    PICTURES,
    Command,
    command_of,
    further_table_names,
    load,
)
from losscli.results.drawing import FULL, Drawing
from losscli.results.figures import check_panel_count, has_panels
from losscli.results.summaries import from_json
from losscli.settings import PathLike, checked
from losscli.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Draw",
    "Output",
    "Result",
    "Run",
    "check_labels",
    "check_plotly",
    "check_writable",
    "default_stem",
    "draw",
    "label_runs",
    "make_drawing",
    "picture_of",
    "read_summary",
    "refuse_overwriting",
    "render_html",
    "stem_of",
    "tell_apart",
    "to_json",
]

FIGURE_SUFFIXES = (*PICTURES, *ANIMATIONS, MESH)

# The ends of the names of checkpoints that a run makes.
_MADE = re.compile(r"\.(?:bend-[0-9]+|aligned)\.safetensors")

# Non-ASCII characters. json escapes control characters itself; its own newlines are kept.
_NON_ASCII = re.compile(r"[^\n -~]")


S_co = TypeVar("S_co", bound=Mapping[str, object], covariant=True)
"""The type of a summary, see `losscli.results.summaries`."""


@dataclass(frozen=True)
class Run(Generic[S_co]):
    """One run of a command, to draw.

    Attributes:
        table: The main table, STEM.csv.
        summary: The summary, STEM.json; ``{}`` if there is only the CSV.
        label: The name in a figure of several runs; by default its first and last checkpoint.
        more: The further tables by NAME of STEM.NAME.csv, such as ``surface``.
        checkpoint_labels: The names of the `checkpoints` in a figure; by default their own.
        source: The file of the table; empty if there is none.
    """

    table: Table
    summary: S_co
    label: str = ""
    more: Mapping[str, Table] = field(default_factory=dict)
    checkpoint_labels: Sequence[str] = ()
    source: str = ""

    @property
    def command(self) -> Command:
        """The command, by the columns of the table."""
        command = command_of(self.table.columns)
        assert command is not None  # see `losscli.results.runs.check_main`
        return command

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


def tell_apart(runs: Sequence[Run[Any]], names: Sequence[str]) -> list[str]:
    """Returns names of runs, with the file or the number of each after names that are equal.

    Args:
        runs: The runs.
        names: Their names, which may be empty.
    """
    files = [run.source for run in runs]
    distinct = []
    for number, (name, file) in enumerate(zip(names, files, strict=True), start=1):
        which = file if file and files.count(file) == 1 else f"run {number}"
        distinct.append(f"{name} ({which})" if name and names.count(name) > 1 else name)
    return distinct


Draw = Callable[[Sequence[Run[Any]], Drawing], "Figure"]
"""Draws runs of one command."""


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

    def __repr__(self) -> str:
        more = "".join(f", {name}: {table!r}" for name, table in self.more.items())
        return f"<Result of {self.summary.get('command')}: {self.table!r}{more}>"

    @cached_property
    def _picture(self) -> tuple[bytes, dict[str, float]] | None:
        """The figure as a PNG for a notebook, and its size; None if there is no figure."""
        try:
            figure = self.figure()
        except UsageError:  # the state dicts of a file have none
            return None
        png_of = load("losscli.plotting.style:png_of")
        picture: tuple[bytes, dict[str, float]] = png_of(figure, self._drawing({}))
        return picture

    def _repr_png_(self) -> tuple[bytes, dict[str, float]] | None:
        # For what shows no HTML, such as a notebook as a PDF.
        return self._picture

    def _repr_html_(self) -> str:
        picture = ""
        if self._picture:
            png, size = self._picture
            picture = (
                f'<img alt="{self.command.name}" width="{size["width"]:.0f}" '
                f'src="data:image/png;base64,{b64encode(png).decode()}">'
            )
        text = self.command.as_text(self)
        notes: Any = self.summary.get("notes", ())
        text += "".join(f"\nnote: {printable(note)}" for note in notes)
        return f"<div>{picture}<pre>{escape(text)}</pre></div>"

    @property
    def checkpoints(self) -> Mapping[str, Any]:
        """The checkpoints that the run made, by the end of the name of their file, after STEM."""
        return {}

    @property
    def command(self) -> Command:
        """The command."""
        return COMMANDS[str(self.summary["command"])]

    @property
    def run(self) -> Run[S_co]:
        """The result as a run to draw."""
        return Run(self.table, self.summary, more=self.more)

    def _drawing(self, options: Mapping[str, Any]) -> Drawing:
        """Returns how the result is drawn: by the options, else as it was when it was saved."""
        stored: Any = self.summary.get("drawing", {})
        return make_drawing({**stored, **options})

    def with_drawing(self, drawing: Drawing) -> Result[S_co]:
        """Returns the result with a summary that stores how it is drawn."""
        if not drawing.stored and "drawing" not in self.summary:
            return self
        summary: Any = {**self.summary, "drawing": drawing.stored}
        return replace(self, summary=summary)

    @checked(Drawing)
    def figure(self, **drawing: Any) -> Figure:
        """Draws the result.

        Args:
            **drawing: The attributes of `losscli.results.drawing.Drawing`: ``log``, ``size``, ….

        Returns:
            A matplotlib figure.

        Raises:
            UsageError: A value cannot be drawn, or the style sheet cannot be read.
        """
        options = self._drawing(drawing)
        return self.draw(label_runs([self.run], options.label), options)

    @checked(Drawing)
    def html(self, **drawing: Any) -> str:
        """Renders the result as an interactive page.

        Args:
            **drawing: The attributes of `losscli.results.drawing.Drawing`: ``log``, ``label``, ….

        Returns:
            HTML that needs no other file and no network.

        Raises:
            UsageError: Plotly is not installed.
        """
        options = self._drawing(drawing)
        return render_html(label_runs([self.run], options.label), options)

    @checked(Drawing)
    def save(
        self,
        stem: PathLike,
        *,
        figure: tuple[PathLike, ...] = (),
        no_figure: bool = False,
        force: bool = False,
        **drawing: Any,
    ) -> list[Path]:
        """Writes the files that the command line writes; `losscli.load` reads the tables again.

        Args:
            stem: STEM of STEM.csv, STEM.json, STEM.NAME.csv of each further table and STEM.png.
            figure: Figures instead of STEM.png: .png, .svg, .pdf, .html; .gif and .mp4 of a path;
                .vtp of a surface.
            no_figure: Whether to draw no figure.
            force: Whether results of another run may be overwritten.
            **drawing: The attributes of `losscli.results.drawing.Drawing`: ``log``, ``size``, ….

        Returns:
            The files.

        Raises:
            UsageError: The arguments contradict each other, or the result has no such figure.
            OutputError: A file cannot be written, or contains the results of another run. No file
                is changed then.
        """
        if figure and no_figure:
            raise UsageError("figure and no_figure contradict each other", "Give one of them")
        options = self._drawing(drawing)
        output = Output.plan(
            stem_of(str(stem)), [Path(path) for path in figure], draw=not no_figure, force=force
        )
        if any(map(has_panels, output.figures)):
            splits = self.table.unique("split") if "split" in self.table.columns else []
            check_panel_count(
                self.command.panels_with(self.more),
                len(splits),
                len(self.table.metrics),
                "Give no_figure=True",
            )
        own = self.summary.get("identity")
        identity = None if own is None else str(own)
        output.guard(identity, self.command.further_tables)
        made = {
            output.stem.with_name(output.stem.name + suffix): checkpoint
            for suffix, checkpoint in self.checkpoints.items()
        }
        replaces = force or (identity is not None and output.is_of(identity))
        for path in made:
            check_writable(path, force=replaces)
        try:
            for path, checkpoint in made.items():
                checkpoint.save(path, force=True)
            return [*made, *output.save(self.with_drawing(options), options)]
        except (OutputError, UsageError):
            for path in () if replaces else made:
                path.unlink(missing_ok=True)
            raise


def make_drawing(options: Mapping[str, Any]) -> Drawing:
    """Returns the drawing of options, of which ``style`` may be the file of a style sheet.

    Raises:
        UsageError: A value cannot be drawn, or the style sheet cannot be read.
    """
    style = options.get("style")
    if isinstance(style, str | os.PathLike):
        options = {**options, "style": load("losscli.plotting.style_sheet:read")(style)}
    return Drawing(**options)


def check_labels(labels: Sequence[str], number: int, things: str = "checkpoints") -> None:
    """Checks that there are no labels, or one for each of a number of things.

    Raises:
        UsageError: There are too many or too few.
    """
    if labels and len(labels) != number:
        raise UsageError(
            f"{len(labels)} labels for {number} {things}", "Give --label once for each, in order"
        )


def label_runs(runs: Sequence[Run[Any]], labels: Sequence[str]) -> list[Run[Any]]:
    """Returns runs with labels, or a single run with labels of its checkpoints.

    Args:
        runs: The runs.
        labels: A label for each of several runs, or for each checkpoint of a single one, or one
            for a single run that can be drawn together with others; none to change nothing.

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
    """Returns the figure of one or more runs of one command, laid out and ready to be rendered.

    Raises:
        UsageError: The runs are of several commands, or have no figure together.
    """
    return _shared_command(runs).draw(runs, drawing)


def render_html(runs: Sequence[Run[Any]], drawing: Drawing = FULL) -> str:
    """Returns one or more runs of one command as an interactive page.

    The page is HTML that needs no other file and no network.

    Raises:
        UsageError: The runs are of several commands or have no figure together, or Plotly is not
            installed.
    """
    check_plotly()
    views = _shared_command(runs).page_views(runs, drawing)
    page: str = load("losscli.plotting.html:render_page")(views, drawing)
    return page


def check_plotly() -> None:
    """Checks that interactive pages can be rendered.

    Raises:
        UsageError: Plotly is not installed.
    """
    if find_spec("plotly") is None:
        raise UsageError(
            "a figure in .html needs plotly, which is not installed", "pip install 'losscli[html]'"
        )


def _shared_command(runs: Sequence[Run[Any]]) -> Command:
    """Returns the command of all runs."""
    commands = {run.command.name: run.command for run in runs}
    if len(commands) > 1:
        raise UsageError(
            f"tables of {' and '.join(sorted(commands))} have no axes in common",
            "Overlay tables of one command, or write a report: --figure report.html",
        )
    (command,) = commands.values()
    return command


def to_json(summary: Mapping[str, Any], *, indent: int | None = 2) -> str:
    """Returns a summary as strict JSON, with null for numbers that are not finite.

    Characters that are not printable are escaped, so that names from files cannot control a
    terminal. ``indent`` is the number of spaces per level; None for a single line.
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
    """Returns the default stem, in the current folder, of a command with checkpoints.

    An example is ``interpolate-relu-init-final``: the name of each checkpoint, after its folder if
    that differs from the previous one.
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
    """Returns the stem that ``--out`` names, without the suffix of an output file such as .png.

    Raises:
        UsageError: The value is a folder.
    """
    if not out or out.endswith("/") or Path(out).is_dir():
        folder = out.rstrip("/")
        raise UsageError(
            f"--out {out!r} is a folder, not a stem of file names",
            f"Give {folder}/NAME to write into it, or another stem, such as {folder}-1"
            if folder.strip("./")
            else "Give FOLDER/NAME",
        )
    path = Path(out)
    has_suffix = path.suffix.lower() in {*FIGURE_SUFFIXES, ".csv", ".json"} and path.stem
    return path.with_suffix("") if has_suffix else path


def picture_of(out: str | None) -> tuple[Path, ...]:
    """Returns the figure that ``--out`` names; empty if that is a stem or not given."""
    path = Path(out or "")
    return (path,) if path.suffix.lower() in FIGURE_SUFFIXES and path.stem else ()


def read_summary(path: Path, command: Command) -> dict[str, Any]:
    """Returns the summary of a run in STEM.json, in the type of its command.

    It is ``{}`` if there is none, or if the file is not a summary of this command.

    Raises:
        TableError: A value is of another type than the command writes.
    """
    summary = read_object(path)
    match {"splits": {}, "examples": {}, **summary} if command.name == "inspect" else summary:
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
            f"{path} was not written by losscli: {printable(str(fault))}",
            "Move it, or write it again together with its CSV",
        ) from None
    return converted


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
        """Returns the plan of the files, after checking that they can be written.

        Args:
            stem: The stem.
            figures: The figures that the user named.
            draw: Whether to draw STEM.png if ``figures`` is empty.
            force: Whether results of another run may be overwritten.

        Raises:
            UsageError: A figure has an unknown suffix, or needs a package that is not installed.
            OutputError: A folder cannot be written to.
        """
        if not figures and draw:
            figures = [stem.with_name(f"{stem.name}.png")]
        for path in figures:
            if path.suffix.lower() not in FIGURE_SUFFIXES:
                raise UsageError(
                    f"{path} does not have the suffix of a figure",
                    f"Choose one of {', '.join(FIGURE_SUFFIXES)}",
                )
        if any(path.suffix.lower() == ".html" for path in figures):
            check_plotly()
        figures = [
            file
            for path in figures
            for file in (
                # A surface has its path in a second file.
                (path, path.with_suffix(PATH_MESH))
                if path.suffix.lower() == MESH and not path.name.lower().endswith(PATH_MESH)
                else (path,)
            )
        ]
        for parent in {path.parent for path in (stem, *figures)}:
            # Missing folders are created later, inside the nearest existing one.
            folder = next(p for p in (parent, *parent.parents) if p.exists())
            if not folder.is_dir():
                raise OutputError(f"{folder} is not a folder", "Choose another --out")
            if not os.access(folder, os.W_OK | os.X_OK):
                raise OutputError(
                    f"the folder {folder} cannot be written to", "Choose another with --out"
                )
        return cls(stem, tuple(dict.fromkeys(figures)), force)

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

    def guard(self, identity: str | None, tables: Iterable[str] = ()) -> None:
        """Refuses to overwrite the results of another run, and folders.

        Args:
            identity: The identity of this run; None if it has none and nothing is overwritten.
            tables: The names of further tables that the run may write.

        Raises:
            OutputError: A file of another run exists, or a folder has the name of a result.
        """
        paths = self.paths(tables)
        _refuse_folders(paths)
        if self.force:
            return
        existing = [path for path in paths if path.exists()]
        if existing and not self.is_of(identity):
            raise OutputError(
                f"{existing[0]} contains the results of another run",
                "Choose another --out, or overwrite it with --force",
            )

    def paths(self, tables: Iterable[str] = ()) -> list[Path]:
        """Lists the files that a run with further tables may write or remove."""
        suffixes = [".csv", *(f".{name}.csv" for name in tables)]
        written = [*map(self._file, suffixes), *self.figures, self._file(".json")]
        return list(dict.fromkeys([*written, *self._older()]))

    def _older(self) -> list[Path]:
        """Lists the checkpoints and further tables of the run that STEM.json describes."""
        summary = read_object(self._file(".json"))
        made, tables = (
            found if isinstance(found := summary.get(key), list) else []
            for key in ("checkpoint_files", "tables")
        )
        suffixes = [str(suffix) for suffix in made if _MADE.fullmatch(str(suffix))]
        suffixes += [f".{name}.csv" for name in tables if name in further_table_names()]
        return [self._file(suffix) for suffix in suffixes]

    def is_of(self, identity: str | None) -> bool:
        """Whether STEM.json is of the run with an identity."""
        return identity is not None and read_object(self._file(".json")).get("identity") == identity

    def save(self, result: Result[Any], drawing: Drawing = FULL) -> list[Path]:
        """Draws and writes a result: all files under temporary names first, then all are renamed.

        Further tables of an older run with the same stem are removed.

        Returns:
            The files.

        Raises:
            UsageError: The result has no such figure.
            OutputError: A file cannot be written. No file is changed then.
        """
        pictures = self.render(label_runs([result.run], drawing.label), result.draw, drawing)
        older = self._older()
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
            for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
                leftover.unlink(missing_ok=True)
        replace_all(contents)
        # Checkpoints and tables of an older run would be taken for those of this run.
        made = {self._file(suffix) for suffix in result.summary.get("checkpoint_files", ())}
        for path in older:
            if path not in contents and path not in made:
                path.unlink(missing_ok=True)
        more = (self._file(f".{name}.csv") for name in result.more)
        return [self._file(".csv"), *more, *self.figures, self._file(".json")]

    def render(
        self,
        runs: Sequence[Run[Any]],
        draw: Draw,
        drawing: Drawing = FULL,
        page: Callable[[Sequence[Run[Any]], Drawing], str] = render_html,
    ) -> dict[Path, bytes]:
        """Returns the content of each figure.

        Args:
            runs: One or more runs of one command, with their labels.
            draw: Draws them.
            drawing: How.
            page: Renders them as an interactive page.

        Raises:
            UsageError: The runs have no such figure.
        """
        contents = {}
        for path in self.figures:
            suffix = path.suffix.lower()
            if suffix == ".html":
                contents[path] = page(runs, drawing).encode()
            elif suffix in ANIMATIONS:
                contents[path] = _shared_command(runs).animate(runs, drawing, suffix)
            elif suffix == MESH:
                part = PATH_MESH if path.name.lower().endswith(PATH_MESH) else MESH
                contents[path] = _shared_command(runs).write_mesh(runs, drawing)[part].encode()
            else:
                # Rendering modifies a figure, so that each file has its own.
                render = load("losscli.plotting.style:render")
                contents[path] = render(draw(runs, drawing), path.suffix, drawing)
        return contents

    def write_pictures(self, pictures: Mapping[Path, bytes]) -> list[Path]:
        """Writes figures only; refuses to overwrite different ones unless ``force``.

        Returns:
            The files.

        Raises:
            OutputError: A file exists with other content, or cannot be written.
        """
        for path, content in pictures.items():
            if not self.force and path.exists() and _read_if_possible(path) != content:
                raise OutputError(
                    f"{path} is another figure",
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


def _refuse_folders(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir():
            raise OutputError(f"{path} is a folder", "Move it away, or choose another --out")


def replace_all(contents: Mapping[Path, bytes]) -> list[Path]:
    """Writes several files, given by their contents: either all or none.

    Returns:
        The files.

    Raises:
        OutputError: A file cannot be written. No file is changed then, and no temporary file is
            left.
    """
    # Checked first, since a rename would fail only after others have succeeded.
    _refuse_folders(contents)
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


def refuse_overwriting(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Checks that no file to write is a file that the command reads, also with ``--force``.

    Args:
        outputs: The files to write.
        inputs: The files to read, and folders with nothing but such files.

    Raises:
        UsageError: An output is an input.
    """
    inputs = [path for path in inputs if path.exists()]
    for out in outputs:
        if out.exists() and any(_contains(path, out) for path in inputs):
            raise UsageError(
                f"{out} is an input of this command, which would overwrite it",
                "Choose another --out or --figure",
            )


def _contains(path: Path, file: Path) -> bool:
    # Writing replaces a link, and not the file that it leads to.
    links = [path]
    while links[-1].is_symlink():
        links.append(links[-1].parent / links[-1].readlink())
    if any(os.path.samestat(link.lstat(), file.lstat()) for link in links):
        return True
    return path.is_dir() and (file.parent.resolve() / file.name).is_relative_to(path.resolve())


def check_writable(out: Path, *, force: bool) -> None:
    """Checks, before any work is done, that a checkpoint can be written.

    Raises:
        UsageError: The path is a folder or has an unknown suffix.
        OutputError: The folder does not exist or is not writable, or the file exists and may not
            be overwritten.
    """
    if not out.name or out.is_dir():
        raise UsageError(f"--out {str(out)!r} is a folder", "Give folder/name.safetensors")
    if out.suffix not in {".safetensors", ".pt", ".pth"}:
        raise UsageError(
            f"{out} is not the name of a safetensors file", f"Write {out.stem}.safetensors or .pt"
        )
    if not out.parent.is_dir():
        raise OutputError(f"there is no folder {out.parent}", f"mkdir -p {out.parent}")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise OutputError(
            f"the folder {out.parent} cannot be written to", "Choose another with --out"
        )
    if out.exists() and not force:
        raise OutputError(f"{out} exists", "Choose another --out, or overwrite it with --force")
