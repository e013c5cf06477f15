"""Is a point critical, and is it a minimum or a saddle? Gradient, eigenvalues, a verdict."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.overrides import TorchFunctionMode

from losscli.curvature import (
    DENSE_LIMIT,
    LEAST,
    PRODUCT_LIMIT,
    Curvature,
    Eigenpair,
    Extremes,
    Verdict,
    verdict,
)
from losscli.curve import standard_error
from losscli.datasets import Examples
from losscli.device import float32_precision
from losscli.errors import UsageError
from losscli.geometry import Line
from losscli.journal import Journal
from losscli.objective import Evaluation
from losscli.pace import Clock, Pace, timed
from losscli.problem import prepare
from losscli.recording import Log
from losscli.results import Result
from losscli.sampling import Estimate
from losscli.settings import Settings
from losscli.studies.study import Study, count
from losscli.sweep import check as check_objective
from losscli.sweep import sweep, sweep_plain
from losscli.table import Cell, Table
from losscli.weights import Weights, norm

__all__ = ["Check", "check"]

# What a residual norm may be, as a share of |λ|, for an eigenvalue to count as found.
_TOLERANCE = 1e-4

# Lengths of steps that are tried, as shares of the norm of the weights.
_STEPS = tuple(2.0**k for k in range(4, -21, -1))

# Points of the escape's curve to either side.
_SIDE = 20

# What is told of a step that gains.
_DESCENT = "distance", "loss", "gain", "gain_stderr"

# Before the names of tensors in a record.
_DOWN = "down "

# Functions with kinks, at which a second derivative does not exist, by their names in torch.
_KINKED = frozenset({
    "abs", "amax", "amin", "clamp", "clip", "hardsigmoid", "hardswish", "hardtanh", "l1_loss",
    "leaky_relu", "max", "max_pool1d", "max_pool2d", "max_pool3d", "maximum", "min", "minimum",
    "prelu", "relu", "relu6", "relu_", "rrelu", "threshold",
})  # fmt: skip


def check(
    names: Sequence[str],
    *,
    tolerance: float = 1e-3,
    eigenvalues: int = 1,
    learning_rate: float | None = None,
    progress: Callable[[float], None] | None = None,
    **settings: Any,
) -> Result:
    """Checks whether checkpoints are critical points, and of which kind.

    Args:
        names: The checkpoints, in the order of training where there are several.
        tolerance: The largest gradient norm of a critical point.
        eigenvalues: How many eigenvalues of either end of the Hessian's spectrum are found.
        learning_rate: That of training, to draw 2 / learning rate beside the eigenvalues.
        progress: Called with the number of checkpoints done so far.
        **settings: The attributes of `losscli.settings.Settings`: ``model``, ``data``, ….

    Returns:
        The result: its table has a row for each checkpoint and split, ``more["spectrum"]`` one for
        each eigenvalue where there are more than two, and ``more["escape"]`` the loss along the
        most negative curvature of the last checkpoint, if it has any.

    Raises:
        LosscliError: Something is missing, broken or does not fit.
    """
    plan = Check.plan(
        names,
        Settings(**settings),
        tolerance=tolerance,
        eigenvalues=eigenvalues,
        learning_rate=learning_rate,
    )
    return plan.run(progress)


@dataclass(frozen=True)
class _Found:
    """What was found at one checkpoint on one split."""

    checkpoint: str
    split: str
    loss: float
    gradient_norm: float
    extremes: Extremes
    minimal_ratio: float | None
    spectrum: Sequence[tuple[float, float]]
    verdict: str
    descent: Mapping[str, Any] | None

    @property
    def smallest(self) -> Eigenpair:
        return self.extremes.smallest[0]

    @property
    def largest(self) -> Eigenpair:
        return self.extremes.largest[0]

    @classmethod
    def recalled(
        cls, checkpoint: str, split: str, known: Mapping[str, NDArray[Any]]
    ) -> tuple[Self, Weights | None]:
        """Takes what `arrays` gave, but for eigenvectors; and the way down, if any."""
        loss, size, *ratio = known["numbers"].tolist()
        products, exact, kind, _ = known["counts"].tolist()
        nothing = torch.empty(0, dtype=torch.float64)
        smallest, largest = (
            tuple(
                Eigenpair(x, error, nothing, bool(sure)) for x, error, sure in known[end].tolist()
            )
            for end in ("smallest", "largest")
        )
        descent = dict(zip(_DESCENT, known["descent"].tolist(), strict=False)) or None
        down = {
            key.removeprefix(_DOWN): torch.from_numpy(array)
            for key, array in known.items()
            if key.startswith(_DOWN)
        }
        one = cls(
            *(checkpoint, split, loss, size),
            Extremes(smallest, largest, products, bool(exact)),
            ratio[0] if ratio else None,
            [(value, error) for value, error in known["spectrum"].tolist()],
            get_args(Verdict)[kind],
            descent,
        )
        return one, down or None

    def arrays(self, down: Weights | None, batch_size: int) -> dict[str, NDArray[Any]]:
        """All that is to be known again, with the way down and the batch that fits."""
        ratio = () if self.minimal_ratio is None else (self.minimal_ratio,)
        ends = {"smallest": self.extremes.smallest, "largest": self.extremes.largest}
        kind = get_args(Verdict).index(self.verdict)
        return {
            "numbers": np.array([self.loss, self.gradient_norm, *ratio]),
            "counts": np.array([self.extremes.products, self.extremes.exact, kind, batch_size]),
            **{
                end: np.array([(pair.value, pair.error, pair.converged) for pair in pairs])
                for end, pairs in ends.items()
            },
            "spectrum": np.array(self.spectrum),
            "descent": np.array([(self.descent or {})[key] for key in _DESCENT if self.descent]),
            **{f"{_DOWN}{key}": t.cpu().numpy() for key, t in (down or {}).items()},
        }

    def row(self) -> list[Cell]:
        return [
            *(self.checkpoint, self.split, self.loss, self.gradient_norm),
            *(self.smallest.value, self.smallest.error),
            *(self.largest.value, self.largest.error),
            *(self.minimal_ratio, self.verdict),
        ]

    def told(self) -> dict[str, Any]:
        """What the table does not hold."""
        return {
            "checkpoint": self.checkpoint,
            "split": self.split,
            "verdict": self.verdict,
            "lambda_min_converged": self.smallest.converged,
            "lambda_max_converged": self.largest.converged,
            "exact": self.extremes.exact,
            "products": self.extremes.products,
            "descent": self.descent,
        }


@dataclass(frozen=True)
class Check(Study):
    """Checkpoints that are ready to be checked.

    Attributes:
        tolerance: The largest gradient norm of a critical point.
        eigenvalues: How many of either end are found.
        learning_rate: That of training, if known.
    """

    command = "check"

    tolerance: float
    eigenvalues: int
    learning_rate: float | None

    @classmethod
    def plan(
        cls,
        names: Sequence[str],
        settings: Settings,
        *,
        tolerance: float,
        eigenvalues: int,
        learning_rate: float | None,
    ) -> Check:
        """Reads and matches everything, and evaluates nothing.

        Args:
            names: The checkpoints.
            settings: The settings.
            tolerance: The largest gradient norm of a critical point.
            eigenvalues: How many of either end will be found.
            learning_rate: That of training.

        Returns:
            The plan.

        Raises:
            LosscliError: Something is missing, broken or does not fit.
        """
        begun = time.perf_counter()
        if not names:
            raise UsageError("check needs a checkpoint", "Give one or more")
        if len(set(names)) < len(names):
            twice = next(name for name in names if list(names).count(name) > 1)
            raise UsageError(f"{twice} is named twice", "Name each checkpoint once")
        if not 0 <= tolerance < math.inf:
            raise UsageError(f"--tolerance {tolerance} is no gradient norm", "Give 1e-3")
        if eigenvalues < 1:
            raise UsageError(f"--eigenvalues {eigenvalues} leaves none", "Give 1 or more")
        if learning_rate is not None and not 1e-12 <= learning_rate <= 1e12:
            raise UsageError(f"--learning-rate {learning_rate} is none", "Give 0.1")
        if settings.sampling_error is not None:
            raise UsageError(
                "a gradient is that of all examples, so --sampling-error has no place in a check",
                "Look at fewer with --limit",
            )
        problem = prepare(names, settings)
        # The loss is a function of the parameters; statistics of BatchNorm are no part of θ here.
        moving = tuple(name for name in problem.moving if name not in problem.buffers)
        if not moving:
            raise UsageError("no parameter is left to differentiate", "Widen --only")
        return cls(problem, moving, begun, tolerance, eigenvalues, learning_rate)

    @property
    def settled(self) -> dict[str, Any]:
        """What decides and how much is found."""
        return {
            "tolerance": self.tolerance,
            "eigenvalues": self.eigenvalues,
            "learning_rate": self.learning_rate,
        }

    def describe(self) -> dict[str, Any]:
        """Tells what a run will do.

        Returns:
            As for every study, and the number of Hessian-vector products, each of which costs a
            few passes over the data.
        """
        told = super().describe()
        size = told["moving"]["values"]
        splits = len(self.problem.objective.splits)
        most = size if size <= DENSE_LIMIT else PRODUCT_LIMIT
        return {**told, "products_at_most": most * splits * len(self.problem.names)}

    def further(self, pace: Pace, clock: Clock, seconds: float) -> dict[str, Any]:
        """Tells what gradients and products with the Hessian take; their number is not known.

        Args:
            pace: How fast points are evaluated.
            clock: The clock.
            seconds: What their evaluation takes.

        Returns:
            ``seconds`` for the fewest products, ``seconds_at_most`` for the most, and what a
            ``product`` takes on all examples of the splits.
        """
        objective = self.problem.objective
        batch = next(iter(objective.splits.values())).first(objective.batch_size)
        batch = batch.to(objective.device)
        with (
            objective.held(),
            Curvature(objective, self.problem.origin, self.moving, batch) as curvature,
        ):
            # Once, so that what is set up is set up.
            v = curvature.gradient()
            took = timed(objective, lambda: curvature.product(v), clock)
        examples = sum(map(len, objective.splits.values()))
        product = took * examples / len(batch)
        number, size = len(self.problem.names), curvature.size
        # A gradient takes no more than a product; and of a whole Hessian many share one.
        fewest, most = (size / 3, size) if size <= DENSE_LIMIT else (LEAST, PRODUCT_LIMIT)
        measured = 1 + 2 * self.eigenvalues
        steps = number * len(_STEPS) + 2 * (len(_STEPS) + _SIDE)
        return {
            "seconds": seconds + number * fewest * product,
            "kind": "at least",
            "seconds_at_most": seconds
            + number * (most + measured) * product
            + steps * examples * pace.plain,
            "product": {"seconds": product},
        }

    @property
    def tables(self) -> tuple[str, ...]:
        """The way out of a saddle, and the eigenvalues."""
        return "escape", "spectrum"

    @property
    def slices(self) -> tuple[int, int]:
        """None is swept by plan; where there is a way down, it is."""
        return 0, 0

    @property
    def evaluations(self) -> int:
        """The checkpoints."""
        return len(self.problem.names)

    @property
    def unit(self) -> str:
        """What progress counts."""
        return "checkpoints"

    def run(
        self, progress: Callable[[float], None] | None = None, journal: Journal | None = None
    ) -> Result:
        """Finds gradients and eigenvalues, and says what follows.

        Args:
            progress: Called with the number of checkpoints done so far.
            journal: Where what is finished is recorded, and recalled from.

        Returns:
            The result.

        Raises:
            LosscliError: The model or the loss fails on the data or has no derivatives, gives two
                answers for one point, or does not fit into the memory.
        """
        objective, tell = self.problem.objective, progress or (lambda _: None)
        found: list[_Found] = []
        escape: Mapping[str, Any] | None = None
        curve: Table | None = None
        saddle = False
        with float32_precision(tf32=self.problem.settings.tf32):
            swept = time.perf_counter()
            check_objective(objective, self.problem.origin)
            heard = self._heard()
            for t, name in enumerate(self.problem.names):
                placed = self.problem.place(self.problem.open(t).weights)
                weights = objective.recalibrated(placed)
                # What is differentiated, and followed, is a function of the parameters alone.
                with objective.held():
                    (losses,) = sweep_plain(objective, [weights], journal=journal)
                    for i, split in enumerate(objective.splits):
                        # A saddle's way out is shown before that of a point which is not critical.
                        last = t == len(self.problem.names) - 1 and not saddle
                        wanted = frozenset(["saddle", *(get_args(Verdict) if last else ())])
                        one, direction = self._look(
                            name, split, weights, losses[split], wanted if i == 0 else (), journal
                        )
                        found.append(one)
                        if direction is not None:
                            saddle = one.verdict == "saddle"
                            escape, curve = self._escape(
                                one, weights, direction, losses[split], journal
                            )
                        tell(t + (i + 1) / len(objective.splits))
            seconds = self.seconds(swept)
        more = {}
        if any(len(one.spectrum) > 2 for one in found):
            more["spectrum"] = Table.build(
                ["checkpoint", "split", "eigenvalue", "error"],
                ([one.checkpoint, one.split, *pair] for one in found for pair in one.spectrum),
            )
        if curve is not None:
            more["escape"] = curve
        table = Table.build(
            [
                *("checkpoint", "split", "loss", "gradient_norm"),
                *("lambda_min", "lambda_min_error", "lambda_max", "lambda_max_error"),
                *("minimal_ratio", "verdict"),
            ],
            (one.row() for one in found),
        )
        summary = {
            **self.origin(),
            "tables": list(more),
            "tolerance": self.tolerance,
            "learning_rate": self.learning_rate,
            "examples": {name: len(split) for name, split in objective.splits.items()},
            "splits": {
                name: {"points": [one.told() for one in found if one.split == name]}
                for name in objective.splits
            },
            "escape": escape,
            "notes": [*self.kept(), *self._notes(heard, found)],
            "seconds": seconds,
        }
        return Result(table, summary, more)

    def _look(
        self,
        name: str,
        split: str,
        weights: Weights,
        losses: Evaluation,
        wanted: Collection[str],
        journal: Journal | None,
    ) -> tuple[_Found, Weights | None]:
        """Looks at one checkpoint on one split; also for a way down, if the verdict is wanted."""
        objective = self.problem.objective
        seed = self.problem.settings.seed
        log = None
        if journal is not None:
            numbers = [list(self.moving), self.eigenvalues, self.tolerance, seed, sorted(wanted)]
            splits = {split: objective.splits[split]}
            log = Log(journal, objective, splits, "check", [weights], numbers)
            known = log.recall("")
            if known is not None:
                journal.skipped += 1 / len(objective.splits)
                objective.batch_size = int(known["counts"][-1])
                return _Found.recalled(name, split, known)
        with Curvature(objective, weights, self.moving, objective.splits[split]) as curvature:
            gradient = curvature.gradient()
            size = float(gradient.norm())
            ratio, spectrum = None, []
            if curvature.size <= DENSE_LIMIT:
                dense = curvature.dense()
                ratio = dense.minimal_ratio
                spectrum = [(float(value), dense.error) for value in dense.eigenvalues]
            extremes = curvature.extremes(self.eigenvalues, tolerance=_TOLERANCE, seed=seed)
            if not spectrum:
                pairs = [*extremes.smallest, *reversed(extremes.largest)]
                spectrum = [(pair.value, pair.error) for pair in pairs]
            smallest, largest = extremes.smallest[0], extremes.largest[0]
            decided = verdict(size, self.tolerance, smallest, largest)
            down = None
            if decided in wanted and smallest.value + smallest.error < 0:
                down = curvature.named(smallest.vector)
            along = curvature.named(-gradient / size) if size > 0 else None
        descent = None
        if decided == "not critical" and along is not None and math.isfinite(size):
            descent = self._descend(
                weights, along, {split: objective.splits[split]}, losses, journal
            )
        estimate = Estimate.of_evaluation(losses)
        one = _Found(
            name,
            split,
            float(estimate.mean[0]),
            size,
            extremes,
            ratio,
            spectrum,
            decided,
            descent,
        )
        if log is not None:
            log.record("", one.arrays(down, objective.batch_size))
        return one, down

    def _along(
        self,
        weights: Weights,
        direction: Weights,
        distances: Sequence[float],
        splits: Mapping[str, Examples],
        journal: Journal | None,
    ) -> Evaluation:
        """Evaluates one split at distances along a direction of length one."""
        objective = self.problem.objective
        start = self.on_device(weights, direction)
        end = {
            name: (start[name] + step.to(start[name].device)).to(
                torch.promote_types(start[name].dtype, torch.float32)
            )
            for name, step in direction.items()
        }
        objective.load(weights)
        points = [(distance,) for distance in distances]
        (found,) = sweep(
            objective, Line(start, end), points, splits=splits, journal=journal
        ).values()
        return found

    def _descend(
        self,
        weights: Weights,
        direction: Weights,
        splits: Mapping[str, Examples],
        here: Evaluation,
        journal: Journal | None,
    ) -> Mapping[str, Any] | None:
        """Tries steps of many lengths; returns the one that gains most."""
        size = norm(weights, self.moving) or 1.0
        distances = [size * share for share in _STEPS]
        found = self._along(weights, direction, distances, splits, journal)
        return _best(distances, found, here)

    def _escape(
        self,
        one: _Found,
        weights: Weights,
        direction: Weights,
        here: Evaluation,
        journal: Journal | None,
    ) -> tuple[Mapping[str, Any], Table]:
        """Follows the most negative curvature both ways, as far as the loss falls and beyond."""
        splits = {one.split: self.problem.objective.splits[one.split]}
        size = norm(weights, self.moving) or 1.0
        tried = [sign * size * share for share in _STEPS for sign in (1, -1)]
        best = _best(tried, self._along(weights, direction, tried, splits, journal), here)
        # Where nothing was gained, the valley is finer than the steps tried.
        reach = 2 * abs(best["distance"]) if best else size * _STEPS[-1]
        steps = [reach * i / _SIDE for i in range(-_SIDE, _SIDE + 1) if i]
        found = self._along(weights, direction, steps, splits, journal)
        lowest = _best(steps, found, here)
        along, own = Estimate.of_evaluation(found), Estimate.of_evaluation(here)
        rows: list[list[Cell]] = [[step, *along.row(i, {})] for i, step in enumerate(steps)]
        rows.insert(_SIDE, [0.0, *own.row(0, {})])
        told = {
            "checkpoint": one.checkpoint,
            "split": one.split,
            "eigenvalue": one.smallest.value,
            **(lowest or {"distance": 0.0, "loss": one.loss, "gain": 0.0, "gain_stderr": 0.0}),
        }
        return told, Table.build(["distance", "loss", "loss_stderr"], rows)

    def _heard(self) -> set[str]:
        """The functions of torch that the model or the loss calls on a first batch."""
        objective = self.problem.objective
        batch = next(iter(objective.first_batches().values()))
        inputs = objective.data.prepare(batch.inputs, objective.dtype)
        with torch.no_grad(), _Listening() as heard:
            outputs = objective.forward(objective.model, inputs)
            objective.per_example(objective.loss, outputs, batch.targets, "loss")
        names: set[str] = heard.names
        return names

    def _notes(self, heard: set[str], found: Sequence[_Found]) -> Iterator[str]:
        model = self.problem.objective.model
        if self.chosen:
            yield (
                f"gradient and Hessian are those of {count(len(self.moving), 'tensor')}, and the "
                "verdict is one on these alone"
            )
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
            yield "BatchNorm is in eval mode: its statistics are constants, not functions of θ"
        if "scaled_dot_product_attention" in heard:
            yield "attention is differentiated by its math kernel: the fused ones cannot be twice"
        if kinks := sorted(heard & _KINKED):
            have = "have" if len(kinks) > 1 else "has"
            yield (
                f"{', '.join(kinks)} {have} kinks: the Hessian is that of the smooth piece around "
                "each checkpoint, and says nothing of the kinks beside it"
            )
        lost = [one for one in found if not math.isfinite(one.smallest.value)]
        if lost:
            yield (
                f"loss or derivatives are not finite at {len(lost)} of {len(found)} points: "
                "nothing is decided there"
            )
        missed = [
            one
            for one in found
            if one not in lost and not (one.smallest.converged and one.largest.converged)
        ]
        if missed:
            yield (
                f"the search for eigenvalues has not converged at {len(missed)} of "
                f"{len(found)} points: no minimum or maximum is claimed there"
            )


class _Listening(TorchFunctionMode):
    """Writes down which functions are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self.names.add(getattr(func, "__name__", "").lstrip("_"))
        return func(*args, **(kwargs or {}))


def _best(
    distances: Sequence[float], found: Evaluation, here: Evaluation
) -> Mapping[str, Any] | None:
    """The distance with the lowest loss, if it is below that at zero; errors are paired."""
    losses, own = found.losses.numpy(), here.losses[0].numpy()
    with np.errstate(all="ignore"):
        means = losses.mean(axis=1, dtype=np.float64)
        mean = float(own.mean(dtype=np.float64))
    finite = [i for i in range(len(means)) if math.isfinite(means[i])]
    best = min(finite, key=means.__getitem__, default=None)
    if best is None or not means[best] < mean:
        return None
    return {
        "distance": float(distances[best]),
        "loss": float(means[best]),
        "gain": mean - float(means[best]),
        "gain_stderr": standard_error(own.astype(np.float64) - losses[best]),
    }
