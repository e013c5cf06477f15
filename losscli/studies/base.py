"""What all studies share: how they are told of, and how they check themselves."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from losscli.data import Examples, Split
from losscli.errors import CheckpointError, ModelError, UsageError
from losscli.evaluation.cost import Clock, Pace, measure
from losscli.evaluation.device import float32_precision
from losscli.evaluation.journal import Journal
from losscli.evaluation.losses import Doubt
from losscli.evaluation.ranks import apart
from losscli.evaluation.sweep import check, halving, points_at_once, sweep, sweep_plain
from losscli.results import Result
from losscli.spec import own_code
from losscli.studies.problem import Problem
from losscli.summaries import CostEstimate, Description, Origin, Seconds
from losscli.weight_space.digest import digest
from losscli.weight_space.slices import Line, Slice
from losscli.weight_space.vectors import Weights, can_move, dimension, equal, working_type

__all__ = ["FRESH_BYTES", "Basis", "Study", "count", "moving_along", "need_derivatives"]

FRESH_BYTES = 64 << 20
"""Up to this size a second model is built, to hold the first against."""

# How far the mean of a first batch may lie from that of the checkpoint loaded plainly, as a share.
# Of a small cross-entropy rounding takes as large a share as the scores are off: kernels of another
# layout made 1e-6 of it in a small network.
_TOLERANCE = {"float64": 1e-12, "float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-3}

# The same where BatchNorm's statistics are estimated at the point: these are rounded with every
# layer before them, and a small cross-entropy moves by as large a share of itself as the scores
# move, so by some thousand units of rounding in a deep network.
_TOLERANCE_OF_ESTIMATES = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 0.5, "float16": 0.1}


# How often a run evaluates first batches before it begins: each way is held against another one.
_PROOFS = 16

# BatchNorm's statistics matter where they change the loss by more than this share of it.
_MATTERS = 0.05

# Examples that the statistics of a batch are taken of, at least and at most; and checkpoints that
# are looked at.
_FEW, _MANY = 32, 256
_ENDS = 2

# Spectral norms matter where they change the loss by more than this share of it.
_SPECTRAL = 1e-4

# What of provenance changes no numbers, or is compared in another form.
_ELSEWHERE = {"device", "device_name", "processes", "python", "checkpoints", "sources"}

# Options by what provenance calls them.
_OPTIONS = {
    "model": "model",
    "data": "data",
    "loss": "loss",
    "metric": "metrics",
    "limit": "limit",
    "batch-loss": "batch_loss",
    "dtype": "dtype",
    "tf32": "tf32",
    "seed": "seed",
    "sampling-error": "sampling_error",
    "buffers": "buffers",
    "only": "only",
    "except": "except",
}


class Basis(NamedTuple):
    """What the numbers of a run rest on.

    Attributes:
        identity: A digest of it.
        told: It in words, and what may change the last digits, for `Journal.open`.
    """

    identity: str
    told: Mapping[str, Any]


@dataclass(frozen=True)
class Study(ABC):
    """A study that is ready to run: everything is read and matched, and nothing evaluated.

    Attributes:
        problem: The checkpoints, the model and the data.
        moving: The names of the tensors that move.
        begun: When planning began, by `time.perf_counter`.
    """

    command: ClassVar[str]

    problem: Problem
    moving: tuple[str, ...]
    begun: float

    @property
    def counted(self) -> tuple[str, ...]:
        """The parameters that move: every norm, distance, projection and angle is over these."""
        return self.problem.parameters(self.moving)

    @property
    def unit(self) -> str:
        """What a run evaluates, in the plural."""
        return "points"

    @property
    @abstractmethod
    def settled(self) -> dict[str, Any]:
        """What settles the points, beside the checkpoints and the settings."""

    @property
    @abstractmethod
    def slices(self) -> tuple[int, int]:
        """How many slices are swept, and the points in each."""

    @property
    @abstractmethod
    def evaluations(self) -> int:
        """How many points a run evaluates."""

    @property
    def steps(self) -> int:
        """How much progress counts until the end, as far as it is known."""
        return self.evaluations

    @abstractmethod
    def run(
        self, progress: Callable[[float], None] | None = None, journal: Journal | None = None
    ) -> Result[Any]:
        """Evaluates.

        Args:
            progress: Called with the number of points done so far.
            journal: Of this study's `basis`: what is finished is recorded there, and what was is
                recalled.

        Returns:
            The result.

        Raises:
            LosscliError: The model or the loss fails on the data, gives two answers for one
                point, or does not fit into the memory.
        """

    @property
    def identity(self) -> str:
        """A digest of everything that settles the numbers: equal for two runs of one command."""
        told = {
            key: value for key, value in self.problem.provenance.items() if key not in _ELSEWHERE
        }
        told["checkpoints"] = [_content(c) for c in self.problem.provenance["checkpoints"]]
        told |= {"command": self.command, **self.settled}
        return _digest(told)

    @cached_property
    def basis(self) -> Basis:
        """What the numbers of a run rest on; for that, a first batch is evaluated.

        Where it is the same, and the machine too, the numbers are the same.

        Raises:
            LosscliError: The model or the loss fails on the data, or gives two answers for one
                point.
        """
        objective, settings = self.problem.objective, self.problem.settings
        provenance: Mapping[str, Any] = self.problem.provenance
        data = {f"the examples of {n}": split.digest for n, split in objective.splits.items()}
        if objective.recalibration is not None:
            data["the examples of statistics"] = objective.recalibration.split.digest
        with float32_precision(tf32=settings.tf32):
            check(objective, self.problem.origin)
            tried = halving(objective, self._try)
        # Now that all of it was called, which may have imported more.
        code = {f"the code in {file}": content for file, content in own_code().items()}
        told = {
            "the command": self.command,
            **{f"the checkpoint {c['name']}": _content(c) for c in provenance["checkpoints"]},
            "the list of checkpoints": [c["name"] for c in provenance["checkpoints"]],
            **{f"--{o}": provenance[key] for o, key in _OPTIONS.items()},
            "--split": list(settings.split),
            "--batch-size": settings.batch_size,
            **{f"--{key.replace('_', '-')}": value for key, value in self.settled.items()},
            **data,
            **code,
            "losscli": provenance["version"],
            "torch": provenance["torch"],
            "Python": provenance["python"],
            "the device": f"{objective.device.type} ({provenance['device_name']})",
            "the number of processes": provenance["processes"],
            "the number of threads": torch.get_num_threads(),
            "what the model makes of a first batch": tried,
        }
        settles = [
            *(self.identity, settings.batch_size, objective.device.type),
            *(data, list(code.values()), tried),
        ]
        return Basis(_digest(settles), told)

    def _try(self) -> str:
        """A digest of what first batches are at both ends, if that is the same each time."""
        problem, objective = self.problem, self.problem.objective
        batches = objective.first_batches()
        last = problem.place(problem.last.weights)
        found = []
        with objective.brief():
            for weights in (problem.origin, last, last):
                evaluations = objective.plain(weights, batches)
                values = {f"loss {name}": e.losses for name, e in evaluations.items()}
                for name, evaluation in evaluations.items():
                    values |= {f"{m} {name}": v for m, v in evaluation.metrics.items()}
                found.append(digest(values))
        objective.load(problem.origin)
        first, one, other = found
        # Some kernels of a GPU add in any order: then it tells nothing.
        return _digest([first, one] if one == other else [])

    def describe(self) -> Description:
        """Tells what a run will do.

        Returns:
            The number of points, of examples and of forward passes of an example; the tensors
            that move; the points whose weights are in memory at once, their bytes, how often the
            data goes by, and how often the training examples of BatchNorm's statistics; the bytes
            of data in memory, and the splits that are not there but decoded in each pass.
        """
        objective = self.problem.objective
        examples = sum(split.rows for split in objective.splits.values())
        slices, points = self.slices
        chunk = min(points_at_once(objective, self.moving), points) if slices else 1
        passes = self.evaluations - slices * points + slices * math.ceil(points / chunk)
        training = objective.recalibration
        if training is not None:
            examples += len(training)
        streamed = [n for n, split in objective.splits.items() if not isinstance(split, Split)]
        added: Description = {}  # by the studies that override this
        return {
            **self.origin(),
            **added,
            "points": self.evaluations,
            "batch_size": None if objective.batch_loss else objective.batch_size,
            "forward_passes": self.evaluations * examples,
            "points_at_once": chunk,
            "passes_over_data": passes,
            "passes_for_statistics": 0 if training is None else passes,
            "bytes_of_weights": chunk * sum(objective.tensors[n].nbytes for n in self.moving),
            "bytes_of_data": sum(split.nbytes for split in objective.splits.values()),
            "streamed": bool(streamed),
            "streamed_splits": streamed,
        }

    def estimate(self, clock: Clock = time.perf_counter) -> CostEstimate:
        """Tells how long a run will take, from one batch; all else in it is counted.

        Args:
            clock: The clock.

        Returns:
            ``seconds``; of what ``kind`` they are: ``about``, ``at least`` or ``at most``; and the
            ``batch``, its ``examples`` and its ``seconds`` at one point.

        Raises:
            LosscliError: The model or the loss fails on the batch, or one example does not fit.
        """
        with float32_precision(tf32=self.problem.settings.tf32), apart():
            pace = self.pace(clock)
            seconds, sample = self.cost(pace), self.problem.settings.sampling_error
            return {
                "seconds": seconds,
                "kind": "about" if sample is None else "at most",
                "batch": {"examples": pace.examples, "seconds": pace.batch},
                **self.further(pace, clock, seconds),
            }

    def pace(self, clock: Clock) -> Pace:
        """Measures how fast points are evaluated.

        Args:
            clock: The clock.

        Returns:
            The pace.
        """
        slices, points = self.slices
        objective, origin = self.problem.objective, self.problem.origin
        if not (slices and points):
            return measure(objective, origin, None, (), clock)
        fit = points_at_once(objective, self.moving)
        return measure(objective, origin, *self.trial(min(points, fit)), clock)

    def trial(self, number: int) -> tuple[Slice, Sequence[Sequence[float]]]:
        """Lays a slice like those that are swept.

        Args:
            number: How many points are taken at once.

        Returns:
            The slice, and so many points of it.
        """
        first, last = self.problem.origin, self.problem.place(self.problem.last.weights)
        line = Line(self.on_device(first), self.on_device(last))
        return line, [((i + 0.5) / number,) for i in range(number)]

    @property
    def swept(self) -> int:
        """How many points are evaluated by sweeps."""
        slices, points = self.slices
        return slices * points

    def cost(self, pace: Pace) -> float:
        """Adds up what a run evaluates.

        Args:
            pace: How fast that is.

        Returns:
            Seconds.
        """
        objective = self.problem.objective
        passes = self.describe()["passes_over_data"]
        splits = objective.splits.values()
        examples = sum(map(len, splits))
        training = 0 if objective.recalibration is None else len(objective.recalibration)
        plain = self.evaluations - self.swept
        firsts = sum(min(objective.batch_size, len(split)) for split in splits)
        streamed = sum(len(split) for split in splits if not isinstance(split, Split))
        return (
            examples * (plain * pace.plain + self.swept * pace.point)
            + self.swept * pace.making
            + self.evaluations * training * pace.statistics
            + passes * streamed * pace.decoding
            + _PROOFS * firsts * pace.plain
        )

    def further(self, pace: Pace, clock: Clock, seconds: float) -> CostEstimate:  # noqa: ARG002
        """Tells what else takes time.

        Args:
            pace: How fast points are evaluated.
            clock: The clock.
            seconds: What their evaluation takes.

        Returns:
            What an estimate tells otherwise, or beside.
        """
        return {}

    def origin(self) -> Origin:
        """Tells where the numbers come from.

        Returns:
            The first part of the summary.

        Raises:
            ChangedError: A checkpoint is no longer what the numbers were to come from. What is
                mapped changes with its file, so they may be of a mixture.
        """
        self.problem.unchanged()
        counted, left_out = self.counted, self.problem.objective.left_out
        provenance = self.problem.provenance
        return {
            "command": self.command,
            "identity": self.identity,
            **provenance,
            "metrics": [metric for metric in provenance["metrics"] if metric not in left_out],
            "moving": {
                "tensors": len(counted),
                "values": dimension(self.problem.first.weights, counted),
            },
            "moving_buffers": len(self.moving) - len(counted),
        }

    def seconds(self, swept: float) -> Seconds:
        """Tells how long it took.

        Args:
            swept: When the evaluation began.

        Returns:
            Seconds for the evaluation and since planning began.
        """
        now = time.perf_counter()
        return {"sweep": now - swept, "total": now - self.begun}

    def sampled(self, examples: Mapping[str, int]) -> list[str]:
        """Notes on how many examples were looked at.

        Args:
            examples: Their number on each split.

        Returns:
            The notes, where it was not all of them by plan.
        """
        if self.problem.settings.sampling_error is None:
            return []
        whole = self.problem.objective.splits
        return [
            f"{name}: {number} of {len(whole[name])} examples were looked at"
            for name, number in examples.items()
        ]

    def whole_numbers(self, end: Weights, last: Weights) -> list[str]:
        """Notes on whole-number tensors, which stay at the first checkpoint's.

        Args:
            end: All tensors of the point that stands for the last checkpoint.
            last: The last checkpoint.

        Returns:
            The notes, where the last checkpoint's own would make a difference.
        """
        objective = self.problem.objective
        other = {
            name: last[name]
            for name, tensor in end.items()
            if not can_move(tensor) and not torch.equal(tensor, last[name])
        }
        if not other:
            return []
        batches = objective.first_batches()
        with objective.brief():
            kept, own = (objective.plain(w, batches) for w in (end, {**end, **other}))
        objective.load(self.problem.origin)
        if all(torch.equal(kept[n].losses, own[n].losses) for n in batches):
            return []
        whose, but = self.words("first")
        return [
            f"whole-number tensors such as {next(iter(other))} stay at {whose} and matter: {but}"
        ]

    def spectral_norms(self) -> list[str]:
        """Notes on spectral norms, which are computed from the weights at every point.

        Returns:
            The notes: with the largest difference that this makes to the loss of a checkpoint on
            a first batch, where there is one.
        """
        objective = self.problem.objective
        if not objective.spectral:
            return []
        batches = objective.first_batches()
        names = [name for layer in objective.spectral for name in layer.names]
        differences = []
        for t, checkpoint in enumerate(self.problem.names):
            weights = self.weights(t)
            point = {**self.problem.place(weights), **{name: weights[name] for name in names}}
            with objective.as_stored():
                own = objective.plain(point, batches)
            there = objective.plain(point, batches)
            for split in batches:
                one, other = (float(e[split].losses.double().mean()) for e in (own, there))
                differences.append((_gap(one, other), checkpoint, split, one, other))
            del weights, point  # before the next one is opened
        objective.load(self.problem.origin)
        whose = f"of {count(len(objective.spectral), 'spectral norm')} such as {names[0]}"
        note = f"the singular vectors {whose} are computed from the weights at every point"
        gap, checkpoint, split, one, other = max(differences, key=lambda found: found[0])
        if gap > _SPECTRAL * abs(other):
            note += (
                f": on a first batch of {split} {checkpoint} has the loss {one:.4g} with those of "
                f"its file, and {other:.4g} with these"
            )
        return [note]

    def kept(self) -> list[str]:
        """Notes on the order of the checkpoints, the loss, the data, and tensors that stay.

        Returns:
            The notes, with those of the objective.
        """
        problem, settings = self.problem, self.problem.settings
        notes = [*problem.notes, *self._task_notes(), *problem.objective.notes]
        notes += [*self._estimated(), *problem.objective.data.notes]
        for name, split in problem.objective.splits.items():
            notes += [f"{name}: {remark}" for remark in split.remarks]
        if problem.objective.constant:
            notes.append(
                "on a first batch different checkpoints have the same losses to the last bit: does "
                "the forward pass use the tensors that move?"
            )
        unused = [name for name in problem.objective.unused if name in self.moving]
        if unused:
            more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
            notes.append(
                f"no influence on the outputs of a first batch: {unused[0]}{more}; does forward "
                "use a value computed from it before?"
            )
        for name in sorted(problem.objective.unchecked):
            notes.append(
                f"{name}: the model takes no other batch than the first one whole, so it could not "
                "be checked that the loss of an example depends on that example alone"
            )
        end = {"a": "first", "b": "last"}.get(settings.buffers)
        if end and problem.buffers and len(problem.names) > 1:
            whose, but = self.words(end)
            notes.append(f"floating-point buffers stay at {whose}: {but}")
        if masks := self._masks():
            more = f" and {len(masks) - 1} more" if len(masks) > 1 else ""
            whose, _ = self.words("first")
            notes.append(
                f"buffers of 0 and 1 such as masks differ, and between the checkpoints they are "
                f"fractions: {masks[0]}{more}; --buffers a keeps {whose}"
            )
        if self._holds_back():
            whose, but = self.words("first")
            notes.append(f"some tensors stay at {whose}: {but}")
        return notes

    def _masks(self) -> list[str]:
        """Lists the buffers that move and hold nothing but 0 and 1 in all checkpoints."""
        counted = set(self.counted)
        names = [name for name in self.moving if name not in counted]
        for t in range(len(self.problem.names) if names else 0):
            weights = self.weights(t)
            names = [name for name in names if bool(((x := weights[name]) == x.bool()).all())]
            del weights  # before the next one is opened
            if not names:
                break
        return names

    def _task_notes(self) -> list[str]:
        """Notes on a loss that may be the wrong one for the data or the model."""
        default = self.problem.provenance["sources"]["loss"].startswith("default")
        found = self.problem.objective.doubts
        return [d.value for d in Doubt if d in found and (default or d is not Doubt.LABELS)]

    def _holds_back(self) -> bool:
        """Whether a tensor stays by choice that is not the same in all checkpoints."""
        kept, first = self.problem.kept, self.problem.first.weights
        for t in range(1, len(self.problem.names) if kept else 0):
            weights = self.problem.open(t).weights
            if not all(equal(first[name], weights[name]) for name in kept):
                return True
            del weights  # before the next one is opened
        return False

    @property
    def chosen(self) -> bool:
        """Whether the user chose which tensors move."""
        return bool(self.problem.settings.only or self.problem.settings.except_)

    def _estimated(self) -> list[str]:
        """Notes on statistics that are estimated anew."""
        objective = self.problem.objective
        training = objective.recalibration
        if training is None:
            return []
        source = f"from {len(training):,} examples of {training.name}"
        but = "the checkpoints' losses are not those of their files"
        notes = [f"BatchNorm's statistics are re-estimated at every point, {source}: {but}"]
        if objective.idle:
            names = [layer.mean.rpartition(".")[0] for layer in objective.idle]
            whose, _ = self.words("first")
            notes.append(
                f"{count(len(names), 'BatchNorm layer')} such as {names[0]} took no batch: the "
                f"statistics stay at {whose}"
            )
        return notes

    def words(self, end: str) -> tuple[str, str]:
        """Words for something that stays at one end's.

        Args:
            end: ``first`` or ``last``.

        Returns:
            Whose it stays, and what follows from that.
        """
        return f"the {end} checkpoint's", "the losses of the others are not those of their files"

    def weights(self, t: int) -> Weights:
        """Reads a checkpoint.

        Args:
            t: Its place among the names.

        Returns:
            All its tensors.
        """
        return self.problem.open(t).weights

    def mixed_statistics(
        self, ends: Iterable[Weights], between: Callable[[], Weights]
    ) -> list[str]:
        """Notes on BatchNorm's statistics that move along with the parameters.

        The loss of a first batch is compared with the one that the statistics of this batch
        itself give: between the checkpoints, and at those that were trained. There it shows how
        far off the statistics of a batch are by chance.

        Args:
            ends: All tensors of checkpoints.
            between: Makes all tensors of a point between them.

        Returns:
            The notes, where the statistics change the loss between the checkpoints, and less at
            the checkpoints.
        """
        objective = self.problem.objective
        layers = objective.batchnorm
        if self.problem.settings.buffers != "interpolate" or not any(
            name in self.moving for layer in layers for name in layer.names
        ):
            return []
        name, split = next(iter(objective.splits.items()))
        size = min(max(objective.batch_size, _FEW), _MANY, len(split))
        trained = (w for w in ends if not all(layer.is_fresh(w) for layer in layers))
        some = list(itertools.islice(trained, _ENDS))
        if size < 2 or not some:
            return []
        batch = split.first(size).to(objective.device)
        try:
            own = [self._with_statistics(weights, batch) for weights in some]
            moved, there = self._with_statistics(between(), batch)
        except (torch.OutOfMemoryError, MemoryError):
            return []
        finally:
            objective.load(self.problem.origin)
        chance = sum(_gap(*losses) for losses in own) / len(own)
        if math.isfinite(there) and _gap(moved, there) > max(2 * chance, _MATTERS * abs(there)):
            note = (
                "between the checkpoints BatchNorm's statistics are not those of the data: the "
                f"loss of a first batch of {name} is {moved:.4g}, and {there:.4g} with the "
                "statistics of that batch; --buffers recalibrate re-estimates them"
            )
            return [note]
        return []

    def _with_statistics(self, weights: Weights, batch: Split) -> tuple[float, float]:
        """The mean loss of a batch at a point: with its statistics, with those of the batch."""
        objective, batches = self.problem.objective, {"": batch}
        moved = objective.plain(weights, batches)[""].losses
        with objective.estimating_on(batch):
            own = objective.plain(weights, batches)[""].losses
        return float(moved.double().mean()), float(own.double().mean())

    def middle(self, a: Weights, b: Weights) -> Weights:
        """Makes the point in the middle of two.

        Args:
            a: All tensors of the one.
            b: All tensors of the other.

        Returns:
            All tensors of the point.
        """
        line, names = Line({}, {}), [name for name in self.moving if not equal(a[name], b[name])]
        wide = {name: working_type(a[name], b[name]) for name in names}
        return {**a} | {n: line.combine([a[n].to(w), b[n].to(w)], (0.5,)) for n, w in wide.items()}

    def stored_types(self) -> list[str]:
        """Notes on the types that tensors are stored in.

        Returns:
            The notes.
        """
        stored = set[str]()
        for t, _ in enumerate(self.problem.names):
            weights = self.weights(t)
            stored |= {str(weights[n].dtype) for n in self.moving}
            del weights  # before the next one is opened
        half = sorted(
            d.removeprefix("torch.") for d in stored & {"torch.bfloat16", "torch.float16"}
        )
        return [f"tensors stored in {' and '.join(half)} move in float32"] if half else []

    def meets(
        self, slice_: Slice, anchors: Sequence[tuple[Sequence[float], Weights]], more: Sequence[Any]
    ) -> float:
        """Compares the sweep's way to evaluate with the plain one, on a first batch.

        Args:
            slice_: The slice.
            anchors: Points that are known: their coordinates, and all tensors there.
            more: Further points, so that there are enough to share a first layer.

        Returns:
            The largest relative difference of the mean losses.

        Raises:
            ModelError: It is beyond rounding.
        """
        objective, dtype = self.problem.objective, self.problem.settings.dtype
        # The same statistics for both, whatever they are: what differs is the way.
        # And every rank for itself: it may have a device of its own.
        with objective.held(), apart():
            worst = self._apart(slice_, anchors, more, _TOLERANCE[dtype])
        if objective.recalibration is None:
            return worst
        with objective.brief(), apart():
            return max(worst, self._apart(slice_, anchors, more, _TOLERANCE_OF_ESTIMATES[dtype]))

    def _apart(
        self,
        slice_: Slice,
        anchors: Sequence[tuple[Sequence[float], Weights]],
        more: Sequence[Any],
        tolerance: float,
    ) -> float:
        objective = self.problem.objective
        batches = objective.first_batches()
        plain = sweep_plain(objective, [weights for _, weights in anchors], splits=batches)
        coordinates = [*(point for point, _ in anchors), *more]
        found = sweep(objective, slice_, coordinates, splits=batches)
        # A loss of 0 may be that of two networks that both fit the batch.
        objective.constant |= bool(slice_.ends[0]) and all(
            len(plain) > 1
            and bool(end[name].losses.isfinite().all())
            and bool(end[name].losses.any())
            and torch.equal(end[name].losses, plain[0][name].losses)
            for end in plain
            for name in batches
        )
        worst = 0.0
        for name in batches:
            for p, end in enumerate(plain):
                there = end[name].losses[0].double().mean()
                here = found[name].losses[p].double().mean()
                if not torch.equal(there.isfinite(), here.isfinite()):
                    return math.inf
                if there.isfinite():
                    worst = max(worst, float((here - there).abs() / there.abs().clamp(min=1e-12)))
        # A negated comparison, since a difference may be no number.
        if not worst <= tolerance:
            raise ModelError(
                "the sweep does not meet the checkpoints: at an end its loss differs from that of "
                f"the checkpoint loaded plainly by {worst:.1e} of it",
                "Does the model keep something from one forward pass to the next?",
            )
        return worst

    def hold_against_fresh(self, weights: Weights) -> None:
        """Makes sure that a model which was never anything else has the same loss at a point.

        Args:
            weights: All tensors of a point at which the model was not when it was made.

        Raises:
            ModelError: It has another.
        """
        objective = self.problem.objective
        size = sum(tensor.nbytes for tensor in objective.tensors.values())
        if size > FRESH_BYTES:
            return
        with torch.random.fork_rng(devices=[]):
            model = self.problem.fresh()
        anew = objective.twin(model, objective.dtype)
        batches: Mapping[str, Examples] = objective.first_batches()
        estimated = objective.recalibration is not None
        share = _TOLERANCE_OF_ESTIMATES[self.problem.settings.dtype] if estimated else 1e-5
        with objective.brief(), anew.brief():
            here, there = (o.plain(weights, batches) for o in (objective, anew))
        for name in batches:
            used, new = (e[name].losses[0].double().mean() for e in (here, there))
            if not torch.allclose(used, new, rtol=share, atol=1e-9, equal_nan=True):
                raise ModelError(
                    f"the model has another loss at a point ({used:.6g}) after it was at another "
                    f"than one that was never anywhere else ({new:.6g})",
                    "It keeps something from the weights it had before; clear that in eval()",
                )

    def on_device(self, weights: Weights, names: Iterable[str] | None = None) -> Weights:
        """Brings moving tensors to where they are computed with.

        Args:
            weights: A checkpoint.
            names: Which; those that move by default.

        Returns:
            The tensors on the device.
        """
        device = self.problem.objective.device
        return {n: weights[n].to(device) for n in (self.moving if names is None else names)}


def _gap(one: float, other: float) -> float:
    """How far apart two losses are; one that is not finite is infinitely far."""
    return abs(one - other) if math.isfinite(one - other) else math.inf


def _content(entry: Mapping[str, Any]) -> str:
    """Tells one checkpoint's content from that of another, also within one file."""
    name, path, content = entry["name"], entry["path"], entry["sha256"]
    if content is None:
        return str(name)
    file, _, key = name.rpartition("#")
    inside = bool(file) and Path(name) != Path(path)
    return _digest([content, key]) if inside else str(content)


def _digest(told: object) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def count(number: int, thing: str) -> str:
    """Counts things in words.

    Args:
        number: How many.
        thing: What, in the singular.

    Returns:
        For example ``1 point`` or ``3 points``.
    """
    return f"{number} {thing}{'' if number == 1 else 's'}"


def moving_along(problem: Problem) -> tuple[str, ...]:
    """Finds the tensors that are not the same in all checkpoints, one checkpoint at a time.

    Args:
        problem: The checkpoints.

    Returns:
        Their names.

    Raises:
        CheckpointError: One of them is not finite in some checkpoint.
    """
    # What never moves may hold infinities, as the masks of attention do.
    first = problem.first.weights
    still = set(problem.moving)
    for t in range(1, len(problem.names)):
        weights = problem.open(t).weights
        still = {name for name in still if equal(first[name], weights[name])}
        _need_finite(problem.names[t], weights, set(problem.moving) - still)
        del weights  # before the next one is opened
    moving = tuple(name for name in problem.moving if name not in still)
    _need_finite(problem.names[0], first, moving)
    return moving


def need_derivatives(problem: Problem, moving: Iterable[str], option: str) -> None:
    """Refuses to differentiate what autograd would differentiate wrongly.

    Args:
        problem: What is evaluated.
        moving: The tensors that move.
        option: What needs derivatives.

    Raises:
        UsageError: A tensor that moves is complex; or it is spectrally normalised: its singular
            vectors are functions of it, and constants to autograd.
    """
    names = set(moving)
    if some := [n for n in moving if problem.objective.tensors[n].is_complex()]:
        raise UsageError(
            f"{option} differentiates real parameters, and {some[0]} is complex",
            f"Leave it out with --except {some[0]!r}",
        )
    found = [n for layer in problem.objective.spectral for n in layer.sources if n in names]
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise UsageError(
            f"{option} cannot differentiate {found[0]}{more} twice: autograd takes the singular "
            "vectors of a spectral norm for constants",
            f"Leave such weights out with --except {found[0]!r}",
        )


def _need_finite(name: str, weights: Weights, moving: Iterable[str]) -> None:
    for tensor in moving:
        if not weights[tensor].isfinite().all():
            raise CheckpointError(
                f"{name}: {tensor} has weights that are infinite or not a number, and lies nowhere "
                "in weight space",
                "Leave this checkpoint out",
            )
