"""From names to numbers: checkpoints, model, data and device brought together and checked."""

from __future__ import annotations

import copy
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args, overload

import torch
from torch import Tensor, nn

from losscli._version import __version__
from losscli.checkpoint import Checkpoint, CheckpointFile, base_of, read, select_for
from losscli.datasets import DataSet, from_object, host_memory, load
from losscli.errors import (
    CheckpointError,
    DeviceError,
    LosscliError,
    LossError,
    MismatchError,
    ModelError,
    SpecError,
    UsageError,
    one_line,
)
from losscli.losses import LOSSES, METRICS, PerExample, causal_lm, token_cross_entropy
from losscli.models import (
    FROM_FILES,
    HEADLESS,
    MODELS,
    NEEDS_DECODER,
    RUNS_CODE,
    has_config,
    is_headless,
    needs_decoder_inputs,
    scores_of,
)
from losscli.objective import Objective
from losscli.points import tensors_of
from losscli.ranks import current
from losscli.recalibration import Recalibration, layers_of
from losscli.settings import Buffers, DType, Settings
from losscli.spec import Spec, call, look_up, read_toml, unfold
from losscli.weights import Weights, choose

__all__ = ["Problem", "float32_precision", "prepare"]

# Of so many checkpoints that do not match is told why.
_TOLD = 5

_METRIC_OF_TASK = {"classification": "accuracy", "regression": "none", "language": "perplexity"}
# Columns of some study's own.
_COLUMNS = frozenset({
    "alpha", "block", "split", "loss", "loss_stderr", "slope", "curvature", "examples", "step",
    "checkpoint", "projection", "residual", "distance", "turn_degrees", "x", "y", "off_plane",
    "a", "b",
})  # fmt: skip

_LOSS_OF_TASK = {
    "classification": "cross_entropy",
    "regression": "mse",
    "language": "causal_lm",
}


@dataclass(frozen=True)
class _Found:
    """A spec, who named it and what its relative paths are relative to."""

    value: Any
    trusted: bool
    folder: Path | None = None

    @classmethod
    def named(cls, value: Any, *, trusted: bool, folder: Path | None = None) -> _Found:
        """Takes what was named: where that is a TOML file, what the file says."""
        if not isinstance(value, str):
            return cls(value, trusted, folder)
        return cls(*unfold(value, trusted=trusted, folder=folder))


@dataclass(frozen=True)
class Problem:
    """A model, its loss on a data set, and the checkpoints to look at.

    Attributes:
        objective: What is evaluated.
        names: The checkpoints in their order, as named by the user.
        first: The first of them, its names those of the model.
        moving: The tensors that may move, each tied tensor under one name.
        fresh: Builds the model anew; None where it was given as a module.
        buffers: Those of the model's floating-point buffers that any choice of tensors names.
        provenance: Where all of it came from, for the summary.
        settings: The settings that it was made from.
        read: Reads a checkpoint by its name.
    """

    objective: Objective
    names: tuple[str, ...]
    first: Checkpoint
    moving: tuple[str, ...]
    fresh: Callable[[], nn.Module] | None
    buffers: tuple[str, ...]
    provenance: Mapping[str, Any]
    settings: Settings
    read: Callable[[str], Checkpoint]

    def open(self, t: int) -> Checkpoint:
        """Opens a checkpoint; only the first is held.

        Args:
            t: Its place among the names.

        Returns:
            The checkpoint.

        Raises:
            CheckpointError: It can no longer be read.
            MismatchError: It is no longer what it was.
        """
        if t == 0:
            return self.first
        return self.read(self.names[t])

    @property
    def kept(self) -> tuple[str, ...]:
        """The tensors that may not move by the choice of tensors alone."""
        free = replace(self.settings, only=(), except_=())
        moving = set(self.moving)
        return tuple(n for n in _moving(self.objective, self.buffers, free) if n not in moving)

    @property
    def last(self) -> Checkpoint:
        """The last checkpoint, opened."""
        return self.open(len(self.names) - 1)

    @property
    def origin(self) -> Weights:
        """All tensors of the first checkpoint, but the buffers that stay at the last one's."""
        if self.settings.buffers != "b" or not self.buffers:
            return self.first.weights
        last = self.last.weights
        return {**self.first.weights, **{name: last[name] for name in self.buffers}}

    def place(self, weights: Weights) -> Weights:
        """Places a checkpoint: what may not move is the origin's.

        Args:
            weights: All tensors of a checkpoint.

        Returns:
            All tensors of the point that stands for it.
        """
        return {**self.origin, **{name: weights[name] for name in self.moving}}

    def places(self, steps: Sequence[int]) -> Sequence[Weights]:
        """Places checkpoints, each when it is asked for; none is held.

        Args:
            steps: Their places among the names.

        Returns:
            All tensors of the points that stand for them.
        """
        return _Places(self, steps)


class _Places(Sequence[Weights]):
    """Points that stand for checkpoints, opened when they are asked for."""

    def __init__(self, problem: Problem, steps: Sequence[int]) -> None:
        self._problem = problem
        self._steps = steps

    def __len__(self) -> int:
        return len(self._steps)

    @overload
    def __getitem__(self, at: int) -> Weights: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Weights]: ...
    def __getitem__(self, at: int | slice) -> Weights | Sequence[Weights]:
        if isinstance(at, slice):
            return _Places(self._problem, self._steps[at])
        return self._problem.place(self._problem.open(self._steps[at]).weights)


def prepare(names: Sequence[str], settings: Settings) -> Problem:
    """Reads the checkpoints, builds the model, loads the data and makes sure that all fit.

    Args:
        names: The checkpoints: files, or ``init:SEED``.
        settings: The settings.

    Returns:
        The problem, ready to be evaluated.

    Raises:
        LosscliError: Something is missing, broken or does not fit; the text says what and where.
    """
    _check(settings)
    device = _device(settings.device, settings.dtype)
    base = base_of(names)
    file = read(base) if base else None
    with torch.random.fork_rng(devices=[]):
        found = _find("model", settings.model, file)
        if found is None:
            raise UsageError(
                "no model is named, neither by --model nor by the checkpoint's metadata nor by a "
                "losscli.toml beside it",
                "Give --model, for example --model mlp:784-512-10 (losscli list models)",
            )
        torch.manual_seed(settings.seed)
        model = _build(found)
        checkpoints = _Checkpoints(model, found, base)
        entries, first = checkpoints.survey(names)
        whole, data_spec = _data(settings, file)
        data = whole.select(settings.split, None, settings.seed)
        loss, loss_spec = _loss(settings, file, data, model)
        metrics = _metrics(settings, data, loss, model)
        recalibration = _recalibration(model, whole, data, settings)
    objective = Objective(
        model,
        loss,
        metrics,
        data,
        device=device,
        dtype=getattr(torch, settings.dtype),
        batch_size=settings.batch_size,
        recalibration=recalibration,
    )
    buffers = _floating_buffers(objective)
    provenance = {
        "version": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(device),
        "device_name": _device_name(device),
        "dtype": settings.dtype,
        "tf32": settings.tf32,
        "model": _text(found.value),
        "data": data_spec,
        "loss": loss_spec,
        "metrics": list(metrics),
        "seed": settings.seed,
        "limit": settings.limit,
        "sampling_error": settings.sampling_error,
        "buffers": settings.buffers,
        "recalibration": None
        if recalibration is None
        else {
            "split": recalibration.name,
            "examples": len(recalibration),
            "batch_size": recalibration.size,
            "layers": len(objective.batchnorm),
        },
        "only": list(settings.only),
        "except": list(settings.except_),
        "checkpoints": entries,
        "examples": {name: len(split) for name, split in data.splits.items()},
    }
    return Problem(
        objective,
        tuple(names),
        first,
        tuple(_moving(objective, buffers, settings)),
        None if isinstance(found.value, nn.Module) else lambda: _build(found),
        buffers,
        provenance,
        settings,
        checkpoints.open,
    )


@contextmanager
def float32_precision(*, tf32: bool) -> Iterator[None]:
    """Lets a GPU compute float32 products in full, or in TF32, and leaves all as it was after.

    Args:
        tf32: Whether TF32 is allowed.

    Yields:
        Nothing.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def _check(settings: Settings) -> None:
    for option, value, known in (
        ("--dtype", settings.dtype, get_args(DType)),
        ("--buffers", settings.buffers, get_args(Buffers)),
    ):
        if value not in known:
            raise UsageError(f"{option} {value} is not known", f"Choose one of {', '.join(known)}")
    if not 0 <= settings.seed < 1 << 63:
        raise UsageError(f"--seed {settings.seed} is no seed", "Give a number from 0 to 2^63 − 1")
    if settings.batch_size is not None and settings.batch_size < 1:
        raise UsageError(f"--batch-size {settings.batch_size} is below 1")
    if settings.sampling_error is not None and not 0 < settings.sampling_error < math.inf:
        raise UsageError(
            f"--sampling-error {settings.sampling_error} is no share of a height", "Give 0.01"
        )
    if settings.limit is not None and settings.limit < 1:
        raise UsageError(f"--limit {settings.limit} leaves no examples", "Give 1 or more")


def _device(name: str, dtype: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available() and dtype != "float64":
            name = "mps"
        else:
            name = "cpu"
    try:
        device = torch.device(name)
        ranks = current()
        if ranks is not None and name == "cuda":
            device = torch.device("cuda", ranks.local)
        # Only an allocation tells whether a device is really there.
        torch.empty(1, dtype=getattr(torch, dtype), device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        there = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        there += ["mps"] if torch.backends.mps.is_available() else []
        raise DeviceError(
            f"the device {name!r} with {dtype} is not to be had here: "
            f"{one_line(error).split('. ')[0]}",
            f"Choose one of auto, cpu{''.join(f', {d}' for d in there)}",
        ) from None
    if device.type not in {"cpu", "cuda", "mps"}:
        raise DeviceError(f"the device {name!r} is not supported", "Choose auto, cpu, cuda or mps")
    return device


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def _find(kind: str, given: Any, first: CheckpointFile | None) -> _Found | None:
    """Finds a spec: the option, then the checkpoint's metadata, then the nearest losscli.toml."""
    if given is not None:
        return _Found.named(given, trusted=True)
    if first is None:
        return None
    folder = first.folder
    # Not resolved: in a hub's cache the files of a folder are links to places elsewhere.
    own = first.path if first.path.is_dir() else first.path.parent
    if f"losscli.{kind}" in first.metadata:
        return _Found.named(first.metadata[f"losscli.{kind}"], trusted=False, folder=folder)
    for place in (folder, *folder.parents):
        file = place / "losscli.toml"
        if file.is_file():
            value = _read_toml(file).get(kind)
            if value is not None:
                return _Found.named(value, trusted=False, folder=place)
        # Beside the checkpoint a config.json of transformers names a model too.
        if kind == "model" and place == folder and has_config(own):
            return _Found(str(Spec(f"transformers:{own}")), trusted=False)
    return None


def _read_toml(file: Path) -> dict[str, str]:
    content = read_toml(file)
    for key, value in content.items():
        if key not in {"model", "data", "loss"} or not isinstance(value, str):
            raise SpecError(
                f"{file}: {key!r} is not understood",
                'It may have the lines model = "…", data = "…" and loss = "…"',
            )
    return content


def _build(found: _Found) -> nn.Module:
    if isinstance(found.value, nn.Module):
        try:
            return copy.deepcopy(found.value)
        except Exception as error:
            raise ModelError(
                f"the model cannot be copied: {one_line(error)}",
                "Give a function that builds it",
            ) from error
    where = f"model {_text(found.value)!r}"
    try:
        if callable(found.value):
            model = found.value()
        else:
            spec = Spec.parse(found.value)
            function, arguments = look_up(
                spec, MODELS, "model", trusted=found.trusted, runs_code=RUNS_CODE
            )
            if function in map(MODELS.get, FROM_FILES):
                arguments = tuple(str(Path(found.folder or "", path)) for path in arguments)
            elif not found.trusted:
                _need_memory(partial(call, function, arguments, spec.options, where), where)
            model = call(function, arguments, spec.options, where)
    except LosscliError:
        raise
    except Exception as error:
        raise ModelError(f"{where} cannot be built: {one_line(error)}") from error
    if isinstance(model, nn.Module):
        _check_tensors(model, where)
    else:
        raise ModelError(
            f"{where} gives a {type(model).__name__}", "Name a function that returns an nn.Module"
        )
    return model


def _need_memory(build: Callable[[], nn.Module], where: str) -> None:
    """Refuses a model that a file names and that no memory here holds, before any is taken."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        size = sum(tensor.nbytes for tensor in build().state_dict().values())
    if size > host_memory():
        raise ModelError(
            f"{where} is of {size / 2**30:,.0f} GiB, more than there is memory",
            "Give the one that was trained with --model",
        )


def _check_tensors(model: nn.Module, where: str) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if nn.parameter.is_lazy(tensor) or tensor.is_meta:
            raise ModelError(
                f"{where}: {name} has no values yet",
                "Give a function that runs lazy layers once, and builds on the CPU",
            )
        if tensor.is_complex():
            raise ModelError(
                f"{where}: {name} is complex, which no line of losscli moves yet",
                "Store it as two real tensors (torch.view_as_real)",
            )


class _Checkpoints:
    """Opens checkpoints by their names, for one model."""

    def __init__(self, model: nn.Module, found: _Found, base: str | None) -> None:
        self._model = model
        self._found = found
        self._base = base  # what adapters change
        self._seen: dict[str, Any] = {}

    def open(self, name: str) -> Checkpoint:
        """Opens one, its tensors under the model's names."""
        with torch.random.fork_rng(devices=[]):
            if name.startswith("init:"):
                return _initialisation(name, self._found)
            file, base = read(name), None
            if file.adapter and self._base:
                base = select_for(read(self._base), self._model)
            checkpoint = select_for(file, self._model, base)
        if checkpoint.path is not None:
            seen = checkpoint.stamp()
            if self._seen.setdefault(name, seen) != seen:
                raise CheckpointError(
                    f"{name} was changed while it was looked at",
                    "Start again once it is left alone",
                )
        return checkpoint

    def survey(self, names: Sequence[str]) -> tuple[list[dict[str, Any]], Checkpoint]:
        """Opens each in turn; what does not match in any of them is one error.

        Args:
            names: Their names.

        Returns:
            What the summary tells of each, and the first of them.

        Raises:
            MismatchError: They do not have the model's tensors.
        """
        told: dict[str, dict[str, Any]] = {}
        first: Checkpoint | None = None
        wrong: list[str] = []
        cures: set[str] = set()
        for name in dict.fromkeys(names):
            try:
                checkpoint = self.open(name)
            except MismatchError as error:
                wrong.append(error.what)
                cures.add(error.cure)
                continue
            path = str(checkpoint.path) if checkpoint.path else None
            told[name] = {"name": name, "path": path, "sha256": checkpoint.sha256()}
            first = first or checkpoint
            del checkpoint  # before the next one is opened
        if wrong:
            wrong = list(dict.fromkeys(wrong))
            more = f" | and {len(wrong) - _TOLD} more" if len(wrong) > _TOLD else ""
            raise MismatchError(
                " | ".join(wrong[:_TOLD]) + more,
                (cures.pop() if len(cures) == 1 else "")
                or f"The model is {_text(self._found.value)}; choose with -m",
            )
        assert first is not None
        return [told[name] for name in names], first


def _initialisation(name: str, found: _Found) -> Checkpoint:
    try:
        seed = int(name.removeprefix("init:"))
        torch.manual_seed(seed)
    except (ValueError, RuntimeError, OverflowError):
        raise UsageError(f"{name} has no seed", f"Write init:0, or ./{name} for a file") from None
    if isinstance(found.value, nn.Module):
        raise UsageError(
            f"{name}: a module that stands already has no initialisation to draw",
            "Give model= as a spec or a function that builds it",
        )
    if isinstance(found.value, str) and found.value.partition(":")[0] in RUNS_CODE:
        raise UsageError(
            f"{name}: a saved program has no initialisation to draw", "Give a checkpoint file"
        )
    state = {
        key: tensor
        for key, tensor in _build(found).state_dict().items()
        if isinstance(tensor, Tensor)
    }
    return Checkpoint(name, state, {})


def _data(settings: Settings, first: CheckpointFile | None) -> tuple[DataSet, str]:
    found = _find("data", settings.data, first)
    if found is None:
        raise UsageError(
            "no data set is named, neither by --data nor by the checkpoint's metadata nor by a "
            "losscli.toml beside it",
            "Give --data, for example --data mnist:FOLDER (losscli list data)",
        )
    chosen: dict[str, Any] = {
        # Training examples may be needed that no loss is evaluated on.
        "splits": () if settings.buffers == "recalibrate" else settings.split,
        "limit": settings.limit,
        "seed": settings.seed,
    }
    if isinstance(found.value, str):
        data = load(found.value, trusted=found.trusted, folder=found.folder, **chosen)
    else:
        data = from_object(found.value, "data", **chosen)
    return data, _text(found.value)


def _recalibration(
    model: nn.Module, whole: DataSet, data: DataSet, settings: Settings
) -> Recalibration | None:
    """Plans how BatchNorm's statistics are estimated anew, if they are.

    Args:
        model: The model.
        whole: All splits of the data.
        data: What the loss is evaluated on.
        settings: The settings.

    Returns:
        The plan: on the split ``train``, or the only one.

    Raises:
        UsageError: The model has no such statistics, or the data no training examples.
    """
    if settings.buffers != "recalibrate":
        return None
    if not layers_of(model, tensors_of(model)):
        raise UsageError(
            "--buffers recalibrate has nothing to re-estimate: the model has no BatchNorm layer "
            "that tracks statistics",
            "Leave it out",
        )
    name = "train" if "train" in whole.splits else next(iter(whole.splits))
    if name != "train" and len(whole.splits) > 1:
        raise UsageError(
            "--buffers recalibrate takes the split train, and the data's splits are "
            f"{', '.join(whole.splits)}",
            "Give data with a split train, or with no other split than that to take",
        )
    split = data.splits.get(name)
    if split is None:
        split = whole.select((name,), None, settings.seed).splits[name]
    if len(split) < 2:
        raise UsageError(
            f"--buffers recalibrate has no more than one example of {name}, which has no variance",
            "Give more" if settings.limit is None else "Give more with --limit",
        )
    return Recalibration.plan(name, split, settings.seed)


def _loss(
    settings: Settings, first: CheckpointFile | None, data: DataSet, model: nn.Module
) -> tuple[PerExample, str]:
    found = _find("loss", settings.loss, first)
    if found is None:
        name = _language_loss(data, model) if data.language else _LOSS_OF_TASK[data.task]
        found = _Found(name, trusted=True)
    return _per_example(found, LOSSES, "loss"), _text(found.value)


def _language_loss(data: DataSet, model: nn.Module) -> str:
    """Chooses the loss of a label for each token, by what the model's scores are those of."""
    scores = scores_of(model)
    if scores == "next":
        return "causal_lm"
    kind = type(model).__name__
    if any(needs_decoder_inputs(model, s.first(1).inputs) for s in data.splits.values()):
        raise LossError(f"{kind} predicts from decoder_input_ids, and has none", NEEDS_DECODER)
    if scores == "own":
        return "token_cross_entropy"
    if is_headless(model):
        raise LossError(f"{kind} has no scores for tokens", HEADLESS)
    raise LossError(
        f"the data have a label for each token, and what {kind} scores is not known",
        "Give --loss: causal_lm, token_cross_entropy, or path/to/file.py:callable",
    )


def _metrics(
    settings: Settings, data: DataSet, loss: PerExample, model: nn.Module
) -> dict[str, PerExample]:
    # Whoever asks for causal_lm means tokens, whatever the data's form.
    default = _METRIC_OF_TASK["language" if loss is causal_lm else data.task]
    next_tokens = loss is causal_lm or scores_of(model) == "next"
    if loss is token_cross_entropy or (data.language and not next_tokens):
        default = "none"
    metrics: dict[str, PerExample] = {}
    for value in settings.metric or (default,):
        if value == "none":
            continue
        found = _Found.named(value, trusted=True)
        name = _column(found.value)
        if name in metrics or name in _COLUMNS:
            raise UsageError(f"the name {name!r} would head two columns", "Rename the metric")
        metrics[name] = _per_example(found, METRICS, "metric")
    return metrics


def _column(metric: Any) -> str:
    """Names a metric's column: an entry's name, or the last name of a path to code."""
    if not isinstance(metric, str):
        return str(getattr(metric, "__name__", type(metric).__name__))
    target = Spec.parse(metric).target
    return target if target in METRICS else target.rpartition(":")[2].rpartition(".")[2]


def _per_example(found: _Found, registry: Mapping[str, PerExample], kind: str) -> PerExample:
    if not isinstance(found.value, str):
        function: PerExample = found.value
        return function
    spec = Spec.parse(found.value)
    function, arguments = look_up(spec, registry, kind, trusted=found.trusted)
    if isinstance(function, type):
        made: PerExample = call(function, arguments, spec.options, f"{kind} {found.value!r}")
        return made
    if arguments:
        raise SpecError(f"{kind} {found.value!r}: {kind} functions take no argument")
    if not spec.options:
        return function
    options = dict(spec.options)
    return lambda outputs, targets: function(outputs, targets, **options)


def _floating_buffers(objective: Objective) -> tuple[str, ...]:
    return tuple(
        name
        for name, tensor in objective.tensors.items()
        if not isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
    )


def _moving(objective: Objective, buffers: Sequence[str], settings: Settings) -> Sequence[str]:
    names = [
        name
        for name, tensor in objective.tensors.items()
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
    ]
    if settings.buffers in {"interpolate", "recalibrate"}:
        estimated = {id(objective.tensors[n]) for x in objective.statistics for n in x.names}
        names += [name for name in buffers if id(objective.tensors[name]) not in estimated]
    # Of the names of a tied tensor, load_state_dict heeds the last.
    last = {id(objective.tensors[name]): name for name in names}
    if not names:
        raise ModelError("the model has no parameters to move")
    # And it is meant by any of them, but stays where one of them stays.
    chosen = choose(names, settings.only, settings.except_)
    stays = set(names) - set(choose(names, (), settings.except_))
    meant, kept = ({id(objective.tensors[name]) for name in some} for some in (chosen, stays))
    ids = {name: id(objective.tensors[name]) for name in names}
    moving = [n for n, i in ids.items() if last[i] == n and i in meant - kept]
    if not moving:
        raise UsageError("--only and --except leave no tensor to move", "Widen the patterns")
    return moving


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, nn.Module):
        return type(value).__qualname__
    return str(getattr(value, "__qualname__", type(value).__qualname__))
