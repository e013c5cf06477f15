"""The line through two checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from losscli.curve import describe
from losscli.datasets import Split
from losscli.geometry import Line, grid
from losscli.objective import Evaluation
from losscli.problem import float32_precision, prepare
from losscli.results import Result
from losscli.sampling import Estimate, grow
from losscli.settings import Settings
from losscli.studies.study import Study, count
from losscli.sweep import check, settle, sweep, sweep_plain
from losscli.table import Table
from losscli.weights import Weights, distance

__all__ = ["Interpolation", "interpolate"]


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
class Interpolation(Study):
    """A line that is ready to be evaluated.

    Attributes:
        start: All tensors at α = 0.
        end: All tensors at α = 1; those that do not move are those of ``start``.
        alphas: The points, rising.
        range: The lowest and the highest α asked for.
    """

    command = "interpolate"

    start: Weights
    end: Weights
    alphas: tuple[float, ...]
    range: tuple[float, float]

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
        start, end = problem.origin, problem.place(problem.last.weights)
        # A tensor that is the same at both ends needs no moving, and if it holds infinities, as
        # the masks of attention do, it could not.
        moving = tuple(n for n in problem.moving if not torch.equal(start[n], end[n]))
        return cls(problem, moving, begun, start, end, tuple(alphas), range_)

    @property
    def settled(self) -> dict[str, Any]:
        """The values of α."""
        return {"alphas": self.alphas, "range": self.range}

    @property
    def slices(self) -> tuple[int, int]:
        """One line."""
        return 1, len(self.alphas)

    @property
    def evaluations(self) -> int:
        """How many points a run evaluates: those asked for, and the ends in any case."""
        return len({0.0, 1.0, *self.alphas})

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
        objective, settings = self.problem.objective, self.problem.settings
        tell = progress or (lambda _: None)
        with float32_precision(tf32=settings.tf32):
            swept = time.perf_counter()
            line = Line(self.on_device(self.start), self.on_device(self.end))
            check(objective, self.start)
            settle(objective, line, [(alpha,) for alpha in self.alphas])
            anchors = [((0.0,), self.start), ((1.0,), self.end)]
            difference = self.meets(line, anchors, [(0.5,)])
            self.hold_against_fresh(self.end)
            stays = self.whole_numbers(self.end, self.problem.last.weights)
            curves = grow(
                objective.splits,
                settings.sampling_error,
                settings.seed,
                lambda splits: self._evaluate(line, splits, tell),
            )
            seconds = self.seconds(swept)
        metrics = list(objective.metrics)
        sampled = settings.sampling_error is not None
        estimates = {name: curve.estimate for name, curve in curves.items()}
        table = Table.build(
            ["alpha", "split", "loss", "loss_stderr", *metrics, *["examples"] * sampled],
            (
                [alpha, name, *estimate.row(i, metrics), *[estimate.examples] * sampled]
                for i, alpha in enumerate(self.alphas)
                for name, estimate in estimates.items()
            ),
        )
        splits = {
            name: describe(self.alphas, curve.losses[2:], *curve.losses[:2])
            for name, curve in curves.items()
        }
        examples = {name: curve.examples for name, curve in curves.items()}
        summary = {
            **self.origin(),
            "range": list(self.range),
            "examples": examples,
            "distance": distance(self.start, self.end, self.moving),
            "splits": splits,
            "endpoint_difference": difference,
            "notes": [*stays, *self._notes(splits), *self.sampled(examples)],
            "seconds": seconds,
        }
        return Result(table, summary)

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

    def words(self, end: str) -> tuple[str, str]:
        """Words for something that stays at one end's.

        Args:
            end: ``first`` or ``last``.

        Returns:
            Whose it stays, and what follows from that.
        """
        kept, other = "AB" if end == "first" else "BA"
        return f"{kept}'s", f"the end {other} of the line is not the checkpoint {other}"

    def _notes(self, splits: Mapping[str, Any]) -> list[str]:
        notes = []
        if not self.moving:
            notes.append("A and B are the same in every tensor that may move: nothing moves")
        notes += self.kept()
        notes += self.stored_types(self.start)
        buffers = self.problem.settings.buffers
        if buffers == "interpolate" and any(s["not_finite"] for s in splits.values()):
            below = [n for n in self.moving if n in self.problem.buffers and self._sinks(n)]
            if below:
                notes.append(
                    f"beyond the ends {below[0]} falls below 0, which a variance cannot: "
                    "--buffers b keeps B's statistics at every point"
                )
        for name, split in splits.items():
            if split["not_finite"]:
                number = split["not_finite"]
                notes.append(
                    f"{count(number, 'point')} of {name} {'have' if number > 1 else 'has'} a loss "
                    "that is not finite"
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

    @property
    def estimate(self) -> Estimate:
        """The estimate at the P points."""
        return Estimate.of(self.losses[2:], {n: m[2:] for n, m in self.metrics.items()})

    def extend(self, more: _Curve) -> _Curve:
        """Adds the examples of another block; what is paired needs the loss of each."""
        share = more.examples / (self.examples + more.examples)
        return _Curve(
            np.concatenate([self.losses, more.losses], axis=1),
            {n: (1 - share) * m + share * more.metrics[n] for n, m in self.metrics.items()},
        )

    def is_known_to(self, tolerance: float) -> bool:
        """Whether every standard error is below a share of the curve's height."""
        return self.estimate.is_known_to(tolerance)
