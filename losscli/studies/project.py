"""A ``losscli.toml`` for a project, tried on a checkpoint before it is written."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace

from losscli.checkpoint import CheckpointFile, find_base, order_path, read
from losscli.evaluation.device import float32_precision
from losscli.evaluation.memory import halving
from losscli.evaluation.objective import Objective
from losscli.evaluation.sweep import check
from losscli.models import RUNS_CODE
from losscli.results.summaries import FirstBatch, ProjectSummary
from losscli.settings import Settings
from losscli.spec import Spec, expand_toml
from losscli.studies.config import FILE_NAME, Config, config_line, needs_trust, texts_of
from losscli.studies.problem import prepare
from losscli.studies.specs import find_specs
from losscli.weight_space.vectors import Weights, dimension

__all__ = ["try_config"]

# Examples of each split that the trial reads, unless the options say how many.
_EXAMPLES = 256

# Settings that losscli.toml has, so that the next command need not.
_STORED = frozenset({"model", "data", "loss", "objective", "metric"})


def try_config(config: Config, checkpoint: str, settings: Settings) -> ProjectSummary:
    """Tries a ``losscli.toml``: matches names and evaluates a batch, as commands will.

    Args:
        config: The file, which is not written yet. Its code is run.
        checkpoint: The checkpoint, or a folder of them, of which the first and the last are tried.
        settings: The settings; their specs are not used.

    Returns:
        What was found.

    Raises:
        LosscliError: Commands would fail; the text says what to change.
    """
    names, notes = order_path([checkpoint])
    tried = list(dict.fromkeys([names[0], names[-1]]))
    trial = replace(settings, model=None, data=None, loss=None, objective=None, metric=())
    if settings.limit is None:
        examples = 1 if settings.batch_loss else settings.batch_size or _EXAMPLES
        trial = replace(trial, limit=examples)
    problem = prepare(tried, trial, notes, planned=config)
    objective = problem.objective
    with float32_precision(tf32=settings.tf32):
        check(objective, problem.origin)
        first_batch = halving(objective, lambda: _first_batch(objective, problem.origin))
    base = find_base(tried)
    unused = list(_unused(config, trial, read(base) if base else None))
    provenance = problem.provenance
    counted = problem.parameters(problem.moving)
    following = _next(names, checkpoint, base, provenance["model"])
    return {
        "command": "init",
        "file": str(config.file),
        "checkpoints": provenance["checkpoints"],
        "model": provenance["model"],
        "moving": {"tensors": len(counted), "values": dimension(problem.first.weights, counted)},
        "data": provenance["data"],
        "loss": provenance["loss"],
        "metrics": [m for m in provenance["metrics"] if m not in objective.left_out],
        "sources": provenance["sources"],
        "first_batch": first_batch,
        "needs_trust": _needs_trust(config),
        "next": " ".join([
            following,
            *_options(settings),
        ]),
        "notes": [
            *problem.notes,
            *unused,
            *_not_stored(settings),
            *_on_start(following, checkpoint),
        ],
    }


def _first_batch(objective: Objective, weights: Weights) -> dict[str, FirstBatch]:
    """Evaluates the first batch of each split."""
    batches = objective.first_batches()
    return {
        name: {
            "examples": batches[name].rows,
            "loss": evaluation.losses[0].double().mean().item(),
        }
        for name, evaluation in objective.plain(weights, batches).items()
    }


def _unused(config: Config, settings: Settings, first: CheckpointFile | None) -> Iterator[str]:
    """Yields a note on each line of the file that a checkpoint or a nearer file overrides."""
    specs = find_specs(settings, None, first, config)
    found = {
        "model": specs.model,
        "data": specs.data,
        # A loss and an objective exclude each other.
        "loss": specs.loss or specs.objective,
        "objective": specs.objective or specs.loss,
        "metric": next(iter(specs.metrics), None),
    }
    for kind, value in config.specs.items():
        spec = found[kind]
        # The source of what a TOML file says is that file.
        if spec is not None and spec.source not in {str(config.file), *texts_of(value)}:
            yield (
                f"the line {config_line(kind, value)} has no effect on this checkpoint: "
                f"{spec.source} comes first"
            )


def _needs_trust(config: Config) -> bool:
    """Says whether commands refuse the file unless it is trusted."""
    folder = config.file.parent
    for kind, value in config.specs.items():
        for text in texts_of(value):
            # A TOML file that a spec names may not name code.
            expanded, trusted, _ = expand_toml(text, trusted=True, folder=folder)
            if text != "none" and trusted and needs_trust(kind, Spec.parse(expanded), folder):
                return True
    return False


def _on_start(command: str, checkpoint: str) -> list[str]:
    """Returns a note if the next command begins at an initialisation and ends at a checkpoint."""
    if checkpoint.startswith("init:") or not command.startswith("losscli interpolate init:0 "):
        return []
    note = "init:0 is a new initialisation, not that of your training"
    return [f"{note}: if you saved a checkpoint before the first step, give it instead of init:0"]


def _next(names: Sequence[str], checkpoint: str, base: str | None, model: str) -> str:
    """Returns a command for the checkpoints, without its options."""
    first, last = names[0], names[-1]
    if len(names) > 2:
        return f"losscli trajectory {shlex.quote(checkpoint)}"
    if first.startswith("init:"):
        seed = int(first.removeprefix("init:"))
        last = f"init:{seed + 1}"
    elif len(names) == 1 and base != first:  # of an adapter
        first = str(base)
    elif len(names) == 1 and model.partition(":")[0] in RUNS_CODE:  # has no initialisation
        return f"losscli around {shlex.quote(first)}"
    elif len(names) == 1:
        first = "init:0"
    return f"losscli interpolate {shlex.quote(first)} {shlex.quote(last)}"


def _not_stored(settings: Settings) -> Iterator[str]:
    """Yields a note on options that shape the results and that the file does not have."""
    options = dict.fromkeys(option.partition(" ")[0] for option in _options(settings))
    if names := [name for name in options if name != "--trust"]:
        pronoun = "it" if len(names) == 1 else "them"
        yield f"{FILE_NAME} does not store {', '.join(names)}: give {pronoun} to each command"


def _options(settings: Settings) -> Iterator[str]:
    """Yields the options of a command line with other values than their defaults."""
    for field in fields(Settings):
        value = getattr(settings, field.name)
        option = f"--{field.name.replace('_', '-')}"
        if field.name in _STORED or value == field.default:
            continue
        if value is True:
            yield option
        else:
            for each in value if isinstance(value, tuple) else (value,):
                yield f"{option} {shlex.quote(str(each))}"
