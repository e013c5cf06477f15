"""``losscli init``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from losscli.cli.console import Console
from losscli.cli.options import Force, Json, argument, with_console, with_some_settings
from losscli.cli.report import format_number
from losscli.errors import OutputError, UsageError, printable
from losscli.results.result import replace_all, to_json
from losscli.results.summaries import ProjectSummary
from losscli.settings import Settings
from losscli.wording import format_count

__all__ = ["init", "report"]

_CHECKPOINT = "Checkpoint to try it on, or a folder of them (Enter: none yet):"
_QUESTIONS = {
    "model": "Model, as file.py:callable, package.module:callable or a name that `losscli list "
    "models` shows (Enter: the checkpoint names it):",
    "data": "Data, as file.py:callable, package.module:callable or a name that `losscli list data` "
    "shows:",
    "loss": "Loss, as file.py:callable or a name that `losscli list losses` shows (Enter: the "
    "default for the targets):",
}


@with_console
@with_some_settings(
    "model",
    "data",
    "loss",
    "objective",
    "metric",
    "batch_loss",
    "stochastic",
    "limit",
    "trust",
    "batch_size",
    "device",
    "seed",
    "ignore_unexpected",
    "allow_missing",
    "rename",
)
def init(
    settings: Settings,
    console: Console,
    checkpoint: Annotated[
        str | None,
        argument(
            "The checkpoint to try it on, or a folder of them. By default init:0, the model "
            "as its code initialises it."
        ),
    ] = None,
    force: Force = False,
    json_: Json = False,
) -> None:
    """Write a losscli.toml for the project in the current folder, so that commands need no options.

    The settings are tried first: the checkpoint is loaded, its tensors are compared with the
    model's, and the loss is evaluated on one batch. Nothing is written if this fails. On a
    terminal, it asks for missing options.
    """
    from losscli.studies.config import FILE_NAME, Config, config_content

    file = Path.cwd() / FILE_NAME
    if (file.exists() or file.is_symlink()) and not force:
        raise OutputError(f"{file} exists", "Edit it, or overwrite it with --force")
    given = {kind: getattr(settings, kind) for kind in ("model", "data", "loss", "objective")}
    if (settings.model is None or settings.data is None) and console.can_ask:
        checkpoint = checkpoint or console.ask(_CHECKPOINT)
        for kind, question in _QUESTIONS.items():
            if given[kind] is None and not (kind == "loss" and given["objective"]):
                given[kind] = console.ask(question) or None
    specs: dict[str, str | list[str]] = {k: text for k, text in given.items() if text is not None}
    if settings.metric:
        metrics = list(settings.metric)
        specs["metric"] = metrics if len(metrics) > 1 else metrics[0]
    if not specs:
        raise UsageError(
            "init has nothing to write: no model and no data are given",
            "Give --model and --data, such as --model mine.py:net --data mine.py:data",
        )
    content = config_content(specs)
    from losscli.studies.project import try_config
    from losscli.studies.trust import cure_for_distrust

    with console.guard_stdout():
        summary = try_config(Config(file, specs), checkpoint or "init:0", settings)
    replace_all({file: content})
    console.written = True
    if not settings.trust and summary["needs_trust"]:
        summary["needs_trust"] = bool(cure_for_distrust(file, trust=False))
        if summary["needs_trust"]:
            summary["next"] += " --trust"
            console.note(
                f"{FILE_NAME} names code, or data on the hub: commands need --trust, unless your "
                "configuration lists this folder (see the README)"
            )
    for note in summary["notes"]:
        console.note(note)
    if json_:
        console.result(f"{to_json(summary, indent=None)}\n")
    else:
        console.result(report(summary))
    console.note(f"wrote {file}")


def report(summary: ProjectSummary) -> str:
    """Describes the trial of a ``losscli.toml``.

    Returns:
        Lines of text, the last of them the next command.
    """
    moving, sources = summary["moving"], summary["sources"]
    size = f"{moving['values']:,} parameters in {format_count(moving['tensors'], 'tensor')}"
    names = list(dict.fromkeys(c["name"] for c in summary["checkpoints"]))
    losses = ", ".join(
        f"{name} {format_number(found['loss'])} ({format_count(found['examples'], 'example')})"
        for name, found in summary["first_batch"].items()
    )
    rows = [
        ("checkpoint", f"{' and '.join(names)}: {'fits' if len(names) == 1 else 'fit'} the model"),
        ("model", f"{summary['model']}: {size}"),
        ("data", summary["data"]),
        ("loss", f"{summary['loss']} ({sources['loss']})"),
        ("metrics", f"{', '.join(summary['metrics']) or 'none'} ({sources['metrics']})"),
        ("first batch", f"loss of {losses}" + f" at {names[0]}" * (len(names) > 1)),
        ("next", summary["next"]),
    ]
    return "".join(f"{label:<13}{printable(text)}\n" for label, text in rows)
