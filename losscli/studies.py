"""The studies: from checkpoints and settings to tables and a summary. The library's front door."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from losscli.checkpoint import Checkpoint, read
from losscli.curve import describe, standard_error
from losscli.datasets import Split
from losscli.errors import MismatchError, ModelError, UsageError
from losscli.geometry import Line, grid
from losscli.objective import Evaluation, Objective
from losscli.problem import Problem, float32_precision, prepare
from losscli.results import Result
from losscli.settings import Settings
from losscli.sweep import check, points_that_fit, sweep, sweep_plain
from losscli.table import Cell, Table
from losscli.weights import Weights, cosine, distance, mismatches, norm

__all__ = ["Interpolation", "export", "inspect", "interpolate"]

# Examples after which a sample is first judged: fewer would make its own error a guess.
_FIRST_BLOCK = 512

# Up to this size a second model is built, to hold the first against.
_FRESH_BYTES = 64 << 20

# How far the mean of a first batch may lie from that of the checkpoint loaded plainly.
_TOLERANCE = {"float64": 1e-12, "float32": 1e-6, "bfloat16": 2e-2, "float16": 2e-3}


def interpolate(
    a: str,
    b: str,
    *,
    points: int = 51,
    range: tuple[float, float] = (-0.5, 2.0),  # noqa: A002 - the option's name
    progress: Callable[[float], None] | None = None,
    **settings: Any,
) -> Result:
    """Evaluates the loss along the line through two checkpoints, θ(α) = A + α (B − A).

    After Goodfellow, Vinyals & Saxe 2015, arXiv 1412.6544.

    Args:
        a: The checkpoint at α = 0: a file, ``FILE#KEY``, or ``init:SEED``.
        b: The checkpoint at α = 1.
        points: Evenly spaced values of α; 0 and 1 come besides where the range holds them.
        range: The lowest and the highest α.
        progress: Called with the number of points done so far.
        **settings: The attributes of `losscli.settings.Settings`: ``model``, ``data``, ….

    Returns:
        The result: its table has a row for each point and split.

    Raises:
        LosscliError: Something is missing, broken or does not fit.
    """
    plan = Interpolation.plan(a, b, Settings(**settings), points=points, range_=range)
    return plan.run(progress)


@dataclass(frozen=True)
class Interpolation:
    """A line that is ready to be evaluated.

    Attributes:
        problem: The checkpoints, the model and the data.
        start: All tensors at α = 0.
        end: All tensors at α = 1; those that do not move are those of ``start``.
        moving: The names of the tensors that move.
        alphas: The points, rising.
        range: The lowest and the highest α asked for.
        begun: When planning began, by `time.perf_counter`.
    """

    problem: Problem
    start: Weights
    end: Weights
    moving: tuple[str, ...]
    alphas: tuple[float, ...]
    range: tuple[float, float]
    begun: float

    @classmethod
    def plan(
        cls, a: str, b: str, settings: Settings, *, points: int, range_: tuple[float, float]
    ) -> Interpolation:
        """Reads and matches everything, and evaluates nothing.

        Args:
            a: The checkpoint at α = 0.
            b: The checkpoint at α = 1.
            settings: The settings.
            points: Evenly spaced values of α.
            range_: The lowest and the highest α.

        Returns:
            The plan.

        Raises:
            LosscliError: Something is missing, broken or does not fit.
        """
        begun = time.perf_counter()
        alphas = grid(points, *range_, include=(0.0, 1.0))
        problem = prepare((a, b), settings)
        weights_a, weights_b = (c.weights for c in problem.checkpoints)
        ends_kept = problem.buffers if settings.buffers == "b" else ()
        start = {**weights_a, **{name: weights_b[name] for name in ends_kept}}
        end = {**start, **{name: weights_b[name] for name in problem.moving}}
        # A tensor that is the same at both ends needs no moving, and if it holds infinities, as
        # the masks of attention do, it could not.
        moving = tuple(n for n in problem.moving if not torch.equal(start[n], end[n]))
        return cls(problem, start, end, moving, tuple(alphas), range_, begun)

    @property
    def evaluations(self) -> int:
        """How many points a run evaluates: those asked for, and the ends in any case."""
        return len({0.0, 1.0, *self.alphas})

    @property
    def identity(self) -> str:
        """A digest of everything that settles the numbers: equal for two runs of one command."""
        told = {
            key: value
            for key, value in self.problem.provenance.items()
            if key not in {"device", "device_name", "python", "checkpoints"}
        }
        told["checkpoints"] = [
            c["sha256"] or c["name"] for c in self.problem.provenance["checkpoints"]
        ]
        told |= {"command": "interpolate", "alphas": self.alphas, "range": self.range}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Tells what a run will do.

        Returns:
            The number of points, of examples and of forward passes of an example; the tensors
            that move; the points whose weights are in memory at once, their bytes, and how often
            the data goes by.
        """
        objective = self.problem.objective
        examples = sum(map(len, objective.splits.values()))
        line = self._line()
        chunk = min(points_that_fit(objective, line), len(self.alphas))
        size = sum(objective.tensors[n].nbytes for n in self.moving)
        return {
            **self._origin(),
            "points": len(self.alphas),
            "batch_size": objective.batch_size,
            "forward_passes": len(self.alphas) * examples,
            "points_at_once": chunk,
            "passes_over_data": math.ceil(len(self.alphas) / chunk),
            "bytes_of_weights": chunk * size,
        }

    def run(self, progress: Callable[[float], None] | None = None) -> Result:
        """Evaluates the line.

        The ends are evaluated as anybody would, by ``load_state_dict``; the way in which the
        other points are evaluated is held against them on a first batch.

        Args:
            progress: Called with the number of points done so far.

        Returns:
            The result.

        Raises:
            LosscliError: The model or the loss fails on the data, gives two answers for one
                point, or does not fit into the memory.
        """
        objective = self.problem.objective
        with float32_precision(tf32=self.problem.settings.tf32):
            swept = time.perf_counter()
            line = self._line()
            check(objective, self.start, line, [(alpha,) for alpha in self.alphas])
            difference = self._difference(line)
            stays = self._whole_numbers_matter()
            curves = self._sweep(line, progress or (lambda _: None))
            swept = time.perf_counter() - swept
        metrics = list(objective.metrics)
        sampled = self.problem.settings.sampling_error is not None
        table = Table.build(
            ["alpha", "split", "loss", "loss_stderr", *metrics, *["examples"] * sampled],
            (
                [alpha, name, *curve.row(i, metrics), *[curve.examples] * sampled]
                for i, alpha in enumerate(self.alphas)
                for name, curve in curves.items()
            ),
        )
        splits = {
            name: describe(self.alphas, curve.losses[2:], *curve.losses[:2])
            for name, curve in curves.items()
        }
        examples = {name: curve.examples for name, curve in curves.items()}
        summary = {
            **self._origin(),
            "examples": examples,
            "distance": distance(self.start, self.end, self.moving),
            "splits": splits,
            "endpoint_difference": difference,
            "notes": [*stays, *self._notes(splits), *self._sampled(examples)],
            "seconds": {"sweep": swept, "total": time.perf_counter() - self.begun},
        }
        return Result(table, summary)

    def _origin(self) -> dict[str, Any]:
        values = sum(self.start[name].numel() for name in self.moving)
        return {
            "command": "interpolate",
            "identity": self.identity,
            **self.problem.provenance,
            "range": list(self.range),
            "moving": {"tensors": len(self.moving), "values": values},
        }

    def _line(self) -> Line:
        device = self.problem.objective.device
        a, b = (
            {name: end[name].to(device) for name in self.moving} for end in (self.start, self.end)
        )
        return Line(a, b)

    def _sweep(self, line: Line, tell: Callable[[float], None]) -> dict[str, _Curve]:
        """Evaluates all points on every split, or on as many of its examples as are needed."""
        tolerance = self.problem.settings.sampling_error
        whole = self.problem.objective.splits
        if tolerance is None:
            return self._evaluate(line, whole, tell)
        curves: dict[str, _Curve] = {}
        generator = torch.Generator().manual_seed(self.problem.settings.seed)
        order = {n: torch.randperm(len(s), generator=generator) for n, s in whole.items()}
        size, going = _FIRST_BLOCK, dict(whole)
        while going:
            blocks = {}
            for name, split in going.items():
                seen = curves[name].examples if name in curves else 0
                blocks[name] = split.take(order[name][seen:size].to(split.targets.device))
            for name, block in self._evaluate(line, blocks, tell).items():
                curves[name] = curves[name].extend(block) if name in curves else block
            going = {
                name: split
                for name, split in going.items()
                if size < len(split) and not curves[name].is_known_to(tolerance)
            }
            size *= 2
        return curves

    def _evaluate(
        self, line: Line, splits: Mapping[str, Split], tell: Callable[[float], None]
    ) -> dict[str, _Curve]:
        """Evaluates the ends plainly and the points between and beyond them by a sweep."""
        objective = self.problem.objective
        ends = sweep_plain(objective, [self.start, self.end], splits=splits, progress=tell)
        inner = [alpha for alpha in self.alphas if alpha not in {0.0, 1.0}]
        points = sweep(
            objective,
            line,
            [(alpha,) for alpha in inner],
            splits=splits,
            progress=lambda done: tell(2 + done),
        )
        # The ends come first, whether or not they are among the points, then the points.
        place = {0.0: 0, 1.0: 1} | {alpha: 2 + i for i, alpha in enumerate(inner)}
        order = [0, 1, *(place[alpha] for alpha in self.alphas)]
        return {
            name: _Curve.arrange([*(e[name] for e in ends), points[name]], order) for name in splits
        }

    def _sampled(self, examples: Mapping[str, int]) -> list[str]:
        if self.problem.settings.sampling_error is None:
            return []
        whole = self.problem.objective.splits
        return [
            f"{name}: {count} of {len(whole[name])} examples were looked at"
            for name, count in examples.items()
        ]

    def _difference(self, line: Line) -> float:
        # Compares the sweep's way to evaluate with the plain one, at both ends, on a batch. The
        # point in the middle is there so that there are enough points to share a first layer.
        objective = self.problem.objective
        batches = objective.first_batches()
        ends = sweep_plain(objective, [self.start, self.end], splits=batches)
        found = sweep(objective, line, [(0.0,), (1.0,), (0.5,)], splits=batches)
        worst = 0.0
        for name in batches:
            for p, end in enumerate(ends):
                plain = end[name].losses[0].double().mean()
                here = found[name].losses[p].double().mean()
                if not torch.equal(plain.isfinite(), here.isfinite()):
                    return math.inf
                if plain.isfinite():
                    worst = max(worst, float((here - plain).abs() / plain.abs().clamp(min=1e-12)))
        # A negated comparison, since a difference may be no number.
        if not worst <= _TOLERANCE[self.problem.settings.dtype]:
            raise ModelError(
                "the sweep does not meet the checkpoints: at an end its loss differs from that of "
                f"the checkpoint loaded plainly by {worst:.1e} of it",
                "Does the model keep something from one forward pass to the next?",
            )
        self._hold_against_fresh(batches)
        return worst

    def _hold_against_fresh(self, batches: Mapping[str, Split]) -> None:
        """Makes sure that a model which was never anything but B has the loss found at B."""
        objective = self.problem.objective
        size = sum(tensor.nbytes for tensor in objective.tensors.values())
        if self.problem.fresh is None or size > _FRESH_BYTES:
            return
        with torch.random.fork_rng(devices=[]):
            model = self.problem.fresh()
        anew = Objective(
            model,
            objective.loss,
            {},
            objective.data,
            device=objective.device,
            dtype=objective.dtype,
            batch_size=objective.batch_size,
        )
        here, there = (o.plain(self.end, batches) for o in (objective, anew))
        for name in batches:
            used, new = (e[name].losses[0].double().mean() for e in (here, there))
            if not torch.allclose(used, new, rtol=1e-5, atol=1e-9, equal_nan=True):
                raise ModelError(
                    f"the model has another loss at B ({used:.6g}) after it was at A than one "
                    f"that was never anywhere else ({new:.6g})",
                    "It keeps something from the weights it had before; clear that in eval()",
                )

    def _whole_numbers_matter(self) -> list[str]:
        """Looks whether B's whole-number tensors, which stay at A's, would make a difference."""
        objective = self.problem.objective
        b = self.problem.checkpoints[1].weights
        other = {
            name: b[name]
            for name, tensor in self.end.items()
            if not tensor.is_floating_point() and not torch.equal(tensor, b[name])
        }
        if not other:
            return []
        batches = objective.first_batches()
        with_a, with_b = (objective.plain(w, batches) for w in (self.end, {**self.end, **other}))
        objective.load(self.start)
        if all(torch.equal(with_a[n].losses, with_b[n].losses) for n in batches):
            return []
        name = next(iter(other))
        told = (
            f"whole-number tensors such as {name} stay at A's and matter: the end B of the line is"
        )
        return [f"{told} not the checkpoint B"]

    def _notes(self, splits: Mapping[str, Any]) -> list[str]:
        settings = self.problem.settings
        notes = []
        if not self.moving:
            notes.append("A and B are the same in every tensor that may move: nothing moves")
        kept = {"a": "A", "b": "B"}.get(settings.buffers)
        if kept and self.problem.buffers:
            other = "B" if kept == "A" else "A"
            notes.append(
                f"floating-point buffers stay at {kept}'s: the end {other} of the line is not the "
                f"checkpoint {other}"
            )
        if settings.only or settings.except_:
            notes.append("some tensors stay at A: the end B of the line is not the checkpoint B")
        stored = {str(self.start[n].dtype) for n in self.moving}
        half = sorted(
            d.removeprefix("torch.") for d in stored & {"torch.bfloat16", "torch.float16"}
        )
        if half:
            notes.append(f"tensors stored in {' and '.join(half)} move in float32")
        if settings.buffers == "interpolate" and any(s["not_finite"] for s in splits.values()):
            below = [n for n in self.moving if n in self.problem.buffers and self._sinks(n)]
            if below:
                notes.append(
                    f"beyond the ends {below[0]} falls below 0, which a variance cannot: "
                    "--buffers b keeps B's statistics at every point"
                )
        for name, split in splits.items():
            if split["not_finite"]:
                count = split["not_finite"]
                notes.append(
                    f"{count} point{'s' if count > 1 else ''} of {name} "
                    f"{'have' if count > 1 else 'has'} a loss that is not finite"
                )
        return notes

    def _sinks(self, name: str) -> bool:
        """Whether a buffer that is nowhere below 0 at the ends is so within the range."""
        a, b = self.start[name], self.end[name]
        return bool((a >= 0).all() and (b >= 0).all()) and any(
            bool((Line({}, {}).combine([a, b], (alpha,)) < 0).any()) for alpha in self.range
        )


@dataclass(frozen=True)
class _Curve:
    """One split at the two ends and then at the P points.

    Attributes:
        losses: The loss of each example, ``[2 + P, N]``.
        metrics: The mean of each metric, ``[2 + P]``.
    """

    losses: NDArray[Any]
    metrics: Mapping[str, NDArray[np.float64]]

    @classmethod
    def arrange(cls, parts: Sequence[Evaluation], order: Sequence[int]) -> _Curve:
        losses = torch.cat([part.losses for part in parts])[order]
        metrics = {
            name: torch.cat([part.metrics[name] for part in parts])[order].numpy()
            for name in parts[0].metrics
        }
        return cls(losses.numpy(), metrics)

    @property
    def examples(self) -> int:
        return int(self.losses.shape[1])

    def extend(self, more: _Curve) -> _Curve:
        """Adds the examples of another block."""
        share = more.examples / (self.examples + more.examples)
        return _Curve(
            np.concatenate([self.losses, more.losses], axis=1),
            {n: (1 - share) * m + share * more.metrics[n] for n, m in self.metrics.items()},
        )

    def is_known_to(self, tolerance: float) -> bool:
        """Whether every standard error is below a share of the curve's height."""
        with np.errstate(all="ignore"):
            means = self.losses.mean(axis=1, dtype=np.float64)[2:]
            errors = np.array([standard_error(row) for row in self.losses[2:]])
        # Where a loss is not finite, more examples do not help.
        finite = np.isfinite(means)
        if not finite.any():
            return True
        height = float(np.ptp(means[finite]))
        return bool((errors[finite] < tolerance * height).all())

    def row(self, i: int, metrics: Sequence[str]) -> list[Cell]:
        """The loss at a point, its standard error and the metrics."""
        losses = self.losses[2 + i]
        with np.errstate(all="ignore"):
            mean = float(np.mean(losses, dtype=np.float64))
            error = standard_error(losses)
        return [mean, error, *(float(self.metrics[name][2 + i]) for name in metrics)]


def inspect(names: Sequence[str]) -> Result:
    """Shows what one checkpoint holds, or how far apart two are, tensor by tensor.

    Args:
        names: One checkpoint or two.

    Returns:
        For one checkpoint a table of its tensors' shapes, types and norms; for two of their
        distances, ‖B − A‖, and cosines. The summary says what does not match.

    Raises:
        UsageError: There are not one or two names.
        CheckpointError: A file cannot be read.
    """
    if len(names) not in {1, 2}:
        raise UsageError(f"inspect takes one checkpoint or two, not {len(names)}")
    checkpoints = [read(name).select(None) for name in names]
    first = checkpoints[0]
    summary: dict[str, Any] = {
        "command": "inspect",
        "checkpoints": [
            {
                "name": c.name,
                "path": str(c.path),
                "sha256": c.sha256(),
                "tensors": len(c.weights),
                "values": sum(t.numel() for t in c.weights.values()),
                "bytes": sum(t.nbytes for t in c.weights.values()),
                "norm": norm(_floating(c.weights)),
                "metadata": dict(c.metadata),
            }
            for c in checkpoints
        ],
    }
    columns = ["tensor", "shape", "dtype", "values", "norm"]
    described: dict[str, list[Cell]] = {
        name: [name, "×".join(map(str, t.shape)), str(t.dtype).removeprefix("torch."), t.numel(),
               norm({"": t})]
        for name, t in first.weights.items()
    }  # fmt: skip
    if len(checkpoints) == 1:
        return Result(Table.build(columns, described.values()), summary)
    other = checkpoints[1]
    shared = [
        name
        for name, t in first.weights.items()
        if name in other.weights and other.weights[name].shape == t.shape
    ]
    summary["mismatches"] = mismatches(other.weights, first.weights)
    moving = [n for n in shared if first.weights[n].is_floating_point()]
    summary["distance"] = distance(first.weights, other.weights, moving)
    rows = (
        [
            *described[name],
            norm({"": other.weights[name]}),
            distance({"": first.weights[name]}, {"": other.weights[name]}),
            cosine(first.weights[name], other.weights[name]),
        ]
        for name in shared
    )
    return Result(Table.build([*columns, "norm_b", "distance", "cosine"], rows), summary)


def export(a: str, b: str, alpha: float) -> Checkpoint:
    """Makes the checkpoint at a point of the line, θ(α) = A + α (B − A).

    Floating-point tensors move, in float32 or wider, and keep the type they are stored in;
    whole-number tensors are A's.

    Args:
        a: The checkpoint at α = 0.
        b: The checkpoint at α = 1.
        alpha: The point.

    Returns:
        The checkpoint, with A's metadata.

    Raises:
        CheckpointError: A file cannot be read.
        MismatchError: The two do not have the same tensors.
        UsageError: α is not finite.
    """
    if not abs(alpha) <= 1e30:
        raise UsageError(f"--alpha {alpha} is no point of the line", "Give a number")
    first = read(a).select(None)
    second = read(b).select(first.weights)
    if wrong := mismatches(second.weights, first.weights):
        raise MismatchError(f"{b} does not fit {a}: {'; '.join(wrong)}")
    weights = {name: _between(t, second.weights[name], alpha) for name, t in first.weights.items()}
    return Checkpoint(f"{a} + {alpha} ({b} − {a})", weights, first.metadata)


def _between(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    if not a.is_floating_point() or torch.equal(a, b):
        return a.clone()
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return Line({}, {}).combine([a.to(wide), b.to(wide)], (alpha,)).to(a.dtype)


def _floating(weights: Weights) -> Weights:
    return {name: t for name, t in weights.items() if t.is_floating_point()}
