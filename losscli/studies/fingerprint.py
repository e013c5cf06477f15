"""What the numbers of a run depend on: two runs with one fingerprint give the same numbers."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

import losscli
from losscli.evaluation.device import float32_precision
from losscli.evaluation.memory import halving
from losscli.evaluation.sweep import check
from losscli.spec import user_code_digests
from losscli.studies.problem import Problem
from losscli.weight_space.digest import digest

__all__ = ["Fingerprint", "fingerprint_of", "identity_of"]

# Parts of the provenance that change no numbers, or are compared in another form.
_EXCLUDED = {"device", "device_name", "processes", "python", "checkpoints", "sources"}

# The packages of losscli that compute numbers.
_COMPUTING = ("checkpoint", "data", "evaluation", "models", "studies", "weight_space")

# Options, and their names in the provenance.
_OPTIONS = {
    "model": "model",
    "data": "data",
    "loss": "loss",
    "objective": "objective",
    "metric": "metrics",
    "limit": "limit",
    "batch-loss": "batch_loss",
    "stochastic": "stochastic",
    "dtype": "dtype",
    "tf32": "tf32",
    "seed": "seed",
    "sampling-error": "sampling_error",
    "buffers": "buffers",
    "only": "only",
    "except": "except",
    "ignore-unexpected": "ignore_unexpected",
    "allow-missing": "allow_missing",
    "rename": "rename",
}


# What follows from the options of a command, by its name in `Study.options`.
_DERIVED = {
    "alphas": "the grid of α",
    "coefficients": "the grid of coefficients",
    "ts": "the grid of t",
    "xs": "the grid of x",
    "ys": "the grid of y",
    "offsets": "the grid of distances along the residual",
    "plane": "the plane",
    "paths": "--path",
    "measures": "the choice of --disagreement and --cka",
}


class Fingerprint(NamedTuple):
    """What the numbers of a run depend on.

    Attributes:
        identity: A digest of it.
        conditions: The same by name, and what may change the last digits, for `Journal.open`.
    """

    identity: str
    conditions: Mapping[str, Any]


def identity_of(command: str, problem: Problem, options: Mapping[str, Any]) -> str:
    """Returns a digest of everything that a command line determines.

    Args:
        command: The command.
        problem: The checkpoints, the model and the data.
        options: The options of the command itself.

    Returns:
        The digest, equal for two runs of one command.
    """
    parts = {key: value for key, value in problem.provenance.items() if key not in _EXCLUDED}
    parts["checkpoints"] = [_content(c) for c in problem.provenance["checkpoints"]]
    parts |= {"command": command, **options}
    return _digest(parts)


def fingerprint_of(command: str, problem: Problem, options: Mapping[str, Any]) -> Fingerprint:
    """Collects what the numbers depend on; for that, a first batch is evaluated.

    Args:
        command: The command.
        problem: The checkpoints, the model and the data.
        options: The options of the command itself.

    Returns:
        The fingerprint. Runs with the same fingerprint on one machine have the same numbers.

    Raises:
        LosscliError: The model or the loss fails on the data, or gives different numbers for one
            point.
    """
    objective, settings = problem.objective, problem.settings
    provenance: Mapping[str, Any] = problem.provenance
    data = {f"the examples of {n}": split.digest for n, split in objective.splits.items()}
    if objective.recalibration is not None:
        data["the examples of statistics"] = objective.recalibration.split.digest
    with float32_precision(tf32=settings.tf32):
        check(objective, problem.origin)
        tried = halving(objective, lambda: _first_losses(problem))
    # After these calls, which may have imported further code.
    code = {f"the code in {file}": content for file, content in user_code_digests().items()}
    conditions = {
        "the command": command,
        **{f"the checkpoint {c['name']}": _content(c) for c in provenance["checkpoints"]},
        "the list of checkpoints": [c["name"] for c in provenance["checkpoints"]],
        **{f"--{o}": provenance[key] for o, key in _OPTIONS.items()},
        "--split": list(settings.split),
        "--batch-size": settings.batch_size,
        **{
            _DERIVED.get(key, f"--{key.replace('_', '-')}"): value for key, value in options.items()
        },
        **data,
        **code,
        "losscli": provenance["version"],
        "the code of losscli": _own_code(),
        "torch": provenance["torch"],
        "Python": provenance["python"],
        "the device": f"{objective.device.type} ({provenance['device_name']})",
        "the number of processes": provenance["processes"],
        "the number of threads": torch.get_num_threads(),
        "the losses of a first batch": tried,
    }
    parts = [
        *(identity_of(command, problem, options), settings.batch_size, objective.device.type),
        *(data, list(code.values()), tried, _own_code()),
    ]
    return Fingerprint(_digest(parts), conditions)


@functools.cache
def _own_code() -> str:
    """Returns a digest of the code that computes numbers, which may change within a version."""
    root = Path(losscli.__file__).parent
    files = sorted(file for room in _COMPUTING for file in (root / room).rglob("*.py"))
    names = [file.relative_to(root).as_posix() for file in files]
    contents = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return _digest([names, contents])


def _first_losses(problem: Problem) -> str:
    """Returns a digest of the losses of first batches at both ends, if they are reproducible."""
    objective = problem.objective
    batches = objective.first_batches()
    last = problem.place(problem.last.weights)
    found = []
    with objective.first_batch_only():
        for weights in (problem.origin, last, last):
            evaluations = objective.plain(weights, batches)
            values = {f"loss {name}": e.losses for name, e in evaluations.items()}
            for name, evaluation in evaluations.items():
                values |= {f"{m} {name}": v for m, v in evaluation.metrics.items()}
            found.append(digest(values))
    objective.load(problem.origin)
    first, one, other = found
    # Some kernels of a GPU add in any order; then the losses are not reproducible.
    return _digest([first, one] if one == other else [])


def _content(entry: Mapping[str, Any]) -> str:
    """Identifies the content of a checkpoint, also of one of several within a file."""
    name, path, content = entry["name"], entry["path"], entry["sha256"]
    if content is None:
        return str(name)
    file, _, key = name.rpartition("#")
    inside = bool(file) and Path(name) != Path(path)
    return _digest([content, key]) if inside else str(content)


def _digest(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
