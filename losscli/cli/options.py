"""Options that commands share, each defined once."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from losscli.errors import UsageError
from losscli.results.drawing import Drawing
from losscli.results.figures import check_animated
from losscli.results.result import Output, default_stem, picture_of, stem_of
from losscli.settings import Buffers, DType, Settings

__all__ = [
    "Command",
    "Force",
    "Json",
    "KeepOrder",
    "Write",
    "argument",
    "option",
    "with_console",
    "with_drawing",
    "with_some_settings",
    "with_study_options",
]

Command = Callable[..., None]

_WHAT = "What is evaluated"
_HOW = "How it is evaluated"
_MOVES = "What moves"
_NAMES = "Names in the checkpoints"
_OUTPUT = "Output"
_FIGURE = "The figure"


def argument(help_: str, metavar: str = "CKPT") -> Any:
    """Declares an argument of a command."""
    return typer.Argument(metavar=metavar, help=help_, show_default=False)


def option(panel: str, help_: str, *names: str, **more: Any) -> Any:
    """Declares an option of a command, with a default in its help text if that is not None."""
    return typer.Option(*names, help=help_, rich_help_panel=panel, **more)


def _option(panel: str, help_: str, *names: str, **more: Any) -> Any:
    return option(panel, help_, *names, show_default=False, **more)


_SETTINGS: dict[str, Any] = {
    "model": Annotated[
        str | None,
        _option(
            _WHAT,
            "The architecture: an entry of `losscli list models`, package.module:callable or "
            "path/to/file.py:callable.",
            "-m",
            "--model",
            metavar="SPEC",
        ),
    ],
    "data": Annotated[
        str | None,
        _option(
            _WHAT,
            "The data set: an entry of `losscli list data`, or code as for --model.",
            "-d",
            "--data",
            metavar="SPEC",
        ),
    ],
    "loss": Annotated[
        str | None,
        _option(
            _WHAT,
            "The per-example loss. Default: cross_entropy for integer targets, mse for float "
            "targets, causal_lm for language. Also bce, on logits.",
            "--loss",
            metavar="SPEC",
        ),
    ],
    "objective": Annotated[
        str | None,
        _option(
            _WHAT,
            "Instead of a loss: a function (model, batch) with one number per example, such as a "
            "physics-informed loss; or model, for the loss that the model itself returns, one "
            "number per batch.",
            "--objective",
            metavar="SPEC",
        ),
    ],
    "metric": Annotated[
        list[str] | None,
        _option(
            _WHAT,
            "Repeatable. Default: accuracy for integer targets (not with mse), perplexity for "
            "language; none: no metric (the default with --objective).",
            "--metric",
            metavar="SPEC",
        ),
    ],
    "split": Annotated[
        list[str] | None,
        _option(_WHAT, "Repeatable. A split to evaluate. Default: all.", "--split", metavar="NAME"),
    ],
    "limit": Annotated[
        int | None,
        _option(
            _WHAT,
            "Evaluate N examples of each split (batches with --batch-loss), drawn once and the "
            "same at every point.",
            "--limit",
            metavar="N",
        ),
    ],
    "trust": Annotated[
        bool,
        _option(
            _WHAT,
            "Run code that a losscli.toml names. Not needed in the trusted folders of your "
            "configuration (see the README).",
            "--trust",
        ),
    ],
    "batch_size": Annotated[
        int | None,
        _option(
            _HOW,
            "Examples per forward pass (default: chosen for the device).",
            "--batch-size",
            metavar="N",
        ),
    ],
    "batch_loss": Annotated[
        bool,
        _option(
            _WHAT,
            "The loss is one number per batch. The batches of a DataLoader are kept, with "
            "equal weights; other data are cut into batches of --batch-size.",
            "--batch-loss",
        ),
    ],
    "stochastic": Annotated[
        int | None,
        _option(
            _WHAT,
            "For a model that is random on purpose: every loss is the mean over N fixed seeds, "
            "the same for every batch and point.",
            "--stochastic",
            metavar="N",
        ),
    ],
    "device": Annotated[
        str,
        _option(
            _HOW,
            "auto (the default), cpu, cuda, cuda:I or mps.",
            "--device",
            metavar="NAME",
            envvar="LOSSCLI_DEVICE",
        ),
    ],
    "dtype": Annotated[
        DType,
        _option(
            _HOW, "Type of the forward pass (default: float32); sums are always float64.", "--dtype"
        ),
    ],
    "tf32": Annotated[
        bool,
        _option(_HOW, "Allow TF32 in the float32 matrix products of a GPU.", "--tf32"),
    ],
    "seed": Annotated[
        int, _option(_HOW, "Seed of all random choices (default: 0).", "--seed", metavar="N")
    ],
    "sampling_error": Annotated[
        float | None,
        _option(
            _WHAT,
            "Evaluate random examples until the standard error at every point is below TOL times "
            "the height of the curve.",
            "--sampling-error",
            metavar="TOL",
        ),
    ],
    "buffers": Annotated[
        Buffers,
        _option(
            _MOVES,
            "Floating-point buffers (BatchNorm statistics) move with the parameters (interpolate, "
            "the default), or stay at those of the first (a) or the last (b) checkpoint; "
            "recalibrate re-estimates BatchNorm's statistics at every point, from the split train, "
            "and moves the other buffers.",
            "--buffers",
        ),
    ],
    "only": Annotated[
        list[str] | None,
        _option(
            _MOVES,
            "Repeatable. Only these tensors move. Others stay at those of the first checkpoint; in "
            "around, check and sharpness each checkpoint keeps its own.",
            "--only",
            metavar="GLOB",
        ),
    ],
    "except_": Annotated[
        list[str] | None,
        _option(
            _MOVES,
            "Repeatable. These tensors do not move, and stay as with --only.",
            "--except",
            metavar="GLOB",
        ),
    ],
    "ignore_unexpected": Annotated[
        bool,
        _option(
            _NAMES,
            "Ignore tensors of a checkpoint that the model does not have.",
            "--ignore-unexpected",
        ),
    ],
    "allow_missing": Annotated[
        list[str] | None,
        _option(
            _NAMES,
            "Repeatable. A checkpoint may lack these tensors of the model, which then keep the "
            "model's initial values.",
            "--allow-missing",
            metavar="GLOB",
        ),
    ],
    "rename": Annotated[
        list[str] | None,
        _option(
            _NAMES,
            "Repeatable. In the names of the checkpoints, replace OLD with NEW: a whole name, or "
            "some of its components, such as fc=head for fc.weight.",
            "--rename",
            metavar="OLD=NEW",
        ),
    ],
}

_DRAWING: dict[str, Any] = {
    "log": Annotated[bool, _option(_FIGURE, "Use a logarithmic axis for the loss.", "--log")],
    "size": Annotated[
        str | None,
        _option(
            _FIGURE,
            "paper (3.25 inches wide, text of 8 pt), slide (10 x 5.625 inches) or WxH in inches "
            "(text of 8 pt): axes and a short legend, without notes and file names.",
            "--size",
            metavar="paper|slide|WxH",
        ),
    ],
    "label": Annotated[
        list[str] | None,
        _option(
            _FIGURE,
            "Repeatable: a name for each checkpoint, in their order.",
            "--label",
            metavar="TEXT",
        ),
    ],
    "ylim": Annotated[
        tuple[float, float] | None,
        _option(
            _FIGURE,
            "The limits of the axis of the loss, or of its colours.",
            "--ylim",
            metavar="LO HI",
        ),
    ],
    "style": Annotated[
        Path | None, _option(_FIGURE, "A Matplotlib style sheet.", "--style", metavar="FILE")
    ],
    "no_markers": Annotated[
        bool,
        _option(
            _FIGURE,
            "Draw curves and paths without dots, and without marks of ends and extrema.",
            "--no-markers",
        ),
    ],
    "fps": Annotated[
        float | None,
        _option(
            _FIGURE,
            "The frames per second of a .gif or .mp4. Default: 5.",
            "--fps",
            metavar="N",
        ),
    ],
}

# A summary may hold other values.
_REDRAWING = {
    **_DRAWING,
    "log": Annotated[
        bool | None, _option(_FIGURE, "Use a logarithmic axis for the loss.", "--log/--no-log")
    ],
    "label": Annotated[
        list[str] | None,
        _option(
            _FIGURE,
            "Repeatable: a name for each CSV, or for each checkpoint of a single one.",
            "--label",
            metavar="TEXT",
        ),
    ],
    "no_markers": Annotated[
        bool | None,
        _option(
            _FIGURE,
            "Draw curves and paths without dots, and without marks of ends and extrema.",
            "--no-markers/--markers",
        ),
    ],
}

_OUTPUT_OPTIONS: dict[str, Any] = {
    "out": Annotated[
        str | None,
        _option(
            _OUTPUT,
            "Write STEM.csv, STEM.json and STEM.png; - puts the CSV on stdout and writes no file. "
            "By default a stem named after the command and the checkpoints.",
            "-o",
            "--out",
            metavar="STEM",
        ),
    ],
    "figure": Annotated[
        list[Path] | None,
        _option(
            _OUTPUT,
            "Repeatable. A figure instead of STEM.png: .png, .svg, .pdf, .html; a .gif or .mp4 of "
            "a path; a .vtp of a surface.",
            "--figure",
            metavar="PATH",
        ),
    ],
    "no_figure": Annotated[bool, _option(_OUTPUT, "Draw no figure.", "--no-figure")],
    "force": Annotated[bool, _option(_OUTPUT, "Overwrite the results of another run.", "--force")],
    "json_": Annotated[
        bool, _option(_OUTPUT, "Print the summary as one JSON object instead of text.", "--json")
    ],
    "dry_run": Annotated[
        bool,
        _option(
            _OUTPUT, "Check and count everything, and time one batch, without running.", "--dry-run"
        ),
    ],
}

_CONSOLE: dict[str, Any] = {
    "quiet": Annotated[bool, _option(_OUTPUT, "No progress, notes or warnings.", "-q", "--quiet")],
    "traceback": Annotated[
        bool, _option(_OUTPUT, "Show where in the code an error comes from.", "--traceback")
    ],
}

_REPEATABLE = {"metric", "split", "only", "except_", "allow_missing", "rename"}

# For commands that take a path of checkpoints.
KeepOrder = Annotated[
    bool,
    _option(
        "The path",
        "Keep the given order of the checkpoints, and use all files of a folder.",
        "--keep-order",
    ),
]

# For commands that write one file or none.
Force = Annotated[bool, _option(_OUTPUT, "Overwrite the file.", "--force")]
Json = Annotated[bool, _option(_OUTPUT, "Print one JSON object instead of text.", "--json")]

_DEFAULTS: Mapping[str, Any] = {
    "device": "auto",
    "dtype": "float32",
    "seed": 0,
    "buffers": "interpolate",
    **dict.fromkeys(
        (
            "batch_loss",
            "trust",
            "ignore_unexpected",
            "tf32",
            "no_figure",
            "force",
            "json_",
            "dry_run",
            "quiet",
            "traceback",
        ),
        False,
    ),
}


@dataclass(frozen=True)
class Write:
    """The output options of a command.

    Attributes:
        out: STEM, ``-``, or None for the default.
        figure: The paths of ``--figure``.
        no_figure: Whether no figure is drawn.
        drawing: How the figure is drawn.
        style: The file of its style sheet, if any.
        force: Whether results of another run may be overwritten.
        json: Whether stdout gets the summary as JSON.
        dry_run: Whether to describe the run and time one batch instead.
    """

    out: str | None
    figure: tuple[Path, ...]
    no_figure: bool
    drawing: Drawing
    style: Path | None
    force: bool
    json: bool
    dry_run: bool

    @property
    def to_stdout(self) -> bool:
        """Whether the CSV goes to stdout and no file is written."""
        return self.out == "-"

    def plan(self, command: str, names: Sequence[str]) -> Output | None:
        """Plans the output files and checks that they can be written.

        Args:
            command: The command, for the default stem.
            names: The checkpoints, for the default stem.

        Returns:
            The plan; None if the CSV goes to stdout.

        Raises:
            UsageError: The options contradict each other.
        """
        if self.no_figure and self.figure:
            raise UsageError("--figure and --no-figure contradict each other", "Give one of them")
        if self.to_stdout:
            for given, name in ((self.json, "--json"), (self.figure, "--figure")):
                if given:
                    raise UsageError(
                        f"--out - writes only the CSV, to stdout, so {name} has no effect",
                        "Give --out STEM",
                    )
            figures: Sequence[Path] = ()
        else:
            figures = self.figure or (() if self.no_figure else picture_of(self.out))
        if "fps" in self.drawing.stored:
            check_animated(figures)
        if self.to_stdout:
            return None
        stem = stem_of(self.out) if self.out is not None else Path(default_stem(command, names))
        return Output.plan(stem, figures, draw=not self.no_figure, force=self.force)


def with_some_settings(*names: str) -> Callable[[Command], Command]:
    """Replaces the parameter ``settings`` of a command by options for some of its fields.

    Args:
        *names: The fields of `Settings` with an option; the others have their defaults.

    Returns:
        A decorator of functions with a parameter ``settings``, a `Settings`.
    """

    def gather(values: dict[str, Any]) -> dict[str, Any]:
        for key in _REPEATABLE & values.keys():
            values[key] = tuple(values[key] or ())
        return {"settings": Settings(**values)}

    options = {name: _SETTINGS[name] for name in names}
    return lambda command: _expand(command, "settings", options, gather)


def _with_output(command: Command) -> Command:
    """Replaces the parameter ``write`` of a command, a `Write`, by the output options."""

    def gather(values: dict[str, Any]) -> dict[str, Any]:
        values["figure"] = tuple(values["figure"] or ())
        values["json"] = values.pop("json_")
        style, given = values["style"], {name: values.pop(name) for name in _DRAWING}
        return {"write": Write(**values, style=style, drawing=Drawing(**_given(given)))}

    return _expand(command, "write", _OUTPUT_OPTIONS | _DRAWING, gather)


def with_study_options(command: Command) -> Command:
    """Replaces the parameters ``settings``, ``write`` and ``console`` of the command of a study.

    Args:
        command: A function with these parameters.

    Returns:
        The function with an option per field of `Settings`, and those of output and console.
    """
    return with_console(_with_output(with_some_settings(*_SETTINGS)(command)))


def with_drawing(command: Command) -> Command:
    """Replaces the parameters ``drawing`` and ``style`` of a command by the options of the figure.

    Args:
        command: A function with a parameter ``drawing``, the options that the user gave, and
            ``style``, the file of the style sheet.

    Returns:
        The function with the options instead.
    """

    def gather(values: dict[str, Any]) -> dict[str, Any]:
        return {"drawing": _given(values), "style": values["style"]}

    return _expand(command, "drawing", _REDRAWING, gather)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the options of a figure that the user gave, in the types of `Drawing`."""
    given = {name: value for name, value in values.items() if value not in (None, [])}
    if "style" in given:
        from losscli.plotting.style_sheet import read

        given["style"] = read(given["style"])
    return given


def with_console(command: Command) -> Command:
    """Replaces the parameter ``console`` of a command by ``--quiet`` and ``--traceback``.

    Args:
        command: A function with a parameter ``console``, a `Console`.

    Returns:
        The function with the options and typer's context, which has the console, instead.
    """

    def gather(values: dict[str, Any]) -> dict[str, Any]:
        console = values["ctx"].obj
        console.quiet, console.traceback = values["quiet"], values["traceback"]
        if console.quiet and not sys.warnoptions:
            # Warnings of Matplotlib and torch, such as glyphs missing from a font.
            warnings.simplefilter("ignore")
            logging.getLogger("matplotlib").setLevel(logging.ERROR)
        return {"console": console}

    return _expand(command, "console", {"ctx": typer.Context, **_CONSOLE}, gather)


def _expand(
    command: Command,
    parameter: str,
    options: Mapping[str, Any],
    gather: Callable[[dict[str, Any]], dict[str, Any]],
) -> Command:
    """Replaces a parameter of a command by options, in the signature that typer reads."""

    @functools.wraps(command)
    def expanded(**values: Any) -> None:
        rest = {key: value for key, value in values.items() if key not in options}
        command(**rest, **gather({key: values[key] for key in options}))

    original = inspect.signature(command, eval_str=True).parameters.values()
    added = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=annotation,
            default=inspect.Parameter.empty if name == "ctx" else _DEFAULTS.get(name),
        )
        for name, annotation in options.items()
    ]
    # What else is gathered is a parameter with the name of an option.
    parameters = [p for p in original if p.name not in {parameter, *options}] + added
    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    expanded.__annotations__ = {p.name: p.annotation for p in parameters}
    return expanded
