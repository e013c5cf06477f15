"""Exact derivatives of the mean loss along a line, by automatic differentiation.

A derivative that was cut off, or whose formula is wrong, raises no error; so the way to compute
them is held, on a few examples, against what the loss itself does and against the other way.
"""

from __future__ import annotations

import contextlib
import enum
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from losscli.data import Examples, Split
from losscli.errors import LosscliError, ModelError, one_line
from losscli.evaluation.decompositions import Elementary
from losscli.evaluation.differences import (
    CURE,
    DETACHED,
    NEEDED,
    POINTS,
    Comparison,
    Differences,
    Outcome,
    are_verified,
    rules,
    sample_size,
    unverified,
)
from losscli.evaluation.memory import halving
from losscli.evaluation.objective import Objective
from losscli.evaluation.precision import in_float64, narrowest_type
from losscli.evaluation.ranks import Arrays
from losscli.evaluation.records import record_key
from losscli.evaluation.strategies import combining_type
from losscli.evaluation.tasks import ALONE, Execution, Task
from losscli.weight_space.slices import Line
from losscli.weight_space.vectors import Weights, distance, norm, pieces

__all__ = ["Slopes", "slopes", "trial"]

# Examples and points on which the two modes are compared.
_SAMPLE = 64
_PROOF_POINTS = 3

# Its multiples, without their whole parts, are spread evenly, and no point is a special one.
_GOLDEN = 0.6180339887498949

# How far the two ways may be apart, as a share.
_SAME = {torch.float64: 1e-8, torch.float32: 1e-3}
_SAME_IN_HALF = 5e-2

_LONGEST_REASON = 160


@dataclass(frozen=True)
class Slopes:
    """The derivatives of the mean loss of a split at P points of a line.

    Attributes:
        slope: dL/dα, ``[P]``, float64, on the CPU.
        curvature: d²L/dα², ``[P]``, float64, on the CPU.
    """

    slope: Tensor
    curvature: Tensor


def slopes(
    objective: Objective,
    line: Line,
    alphas: Sequence[float],
    splits: Mapping[str, Examples] | None = None,
    execution: Execution = ALONE,
) -> dict[str, Slopes]:
    """Differentiates the mean loss along a line, exactly.

    With θ(α) = A + α d they are dL/dα = ⟨∇L, d⟩ and d²L/dα² = dᵀ H d. Forward mode carries both
    through the model beside the loss (Pearlmutter 1994, Neural Computation 6(1), along one
    direction); where an operator has no formula for that, reverse mode differentiates twice.

    Where a network is piecewise linear or otherwise has kinks (ReLU, max pooling), the slope of
    the loss jumps at them. A second derivative does not see these jumps: the curvature is that
    between the kinks, and its integral is not the change of the slope.

    Args:
        objective: Whose mean loss; it has been checked. Tensors that the line does not move are as
            last loaded, and all are left as they were.
        line: The line, its ends on the objective's device, tied tensors named once. Buffers that
            it moves, such as the statistics of BatchNorm, are differentiated like parameters.
        alphas: The P points.
        splits: The examples; all by default.
        execution: How points are executed. Progress counts points.

    Returns:
        For each split its derivatives at the P points.

    Raises:
        ModelError: The model, or the loss, has no such derivatives, or none that can be trusted.
    """
    splits = objective.splits if splits is None else splits
    if not line.a or not alphas:
        nothing = torch.zeros(2, len(alphas), dtype=torch.float64)
        return {name: Slopes(*nothing.clone().unbind()) for name in splits}
    objective.batch_size = min(execution.gather(objective.batch_size))
    course = _Course(objective, line)
    total = sum(map(len, splits.values()))

    @cache
    def way() -> tuple[_Way, str]:
        return _settle(course, alphas, next(iter(splits.values())))

    def differentiate(alpha: float, tell: Callable[[float], None]) -> Arrays:
        (chosen, doubt), weights, seen = way(), course.at(alpha), 0
        found: dict[str, NDArray[Any]] = {}
        for k, split in enumerate(splits.values()):
            both, weight = torch.zeros(2, dtype=torch.float64), 0.0
            for batch in objective.batches(split):
                sums = course.sums(chosen, weights, batch)
                both += torch.tensor(sums, dtype=torch.float64) / len(split)
                weight += course.weight
                seen += len(batch)
                tell(seen / total)
            if weight != len(split):
                both *= len(split) / weight if weight else math.nan
            found[f"{k}"] = both.numpy()
        if doubt:
            # Noted also by other ranks, and by a run that recalls the point.
            found["unverified"] = np.frombuffer(doubt.encode(), np.uint8)
        return found

    def evaluate(alpha: float, own: Execution) -> Arrays:
        if execution.size == 1:
            # Whoever halves the batch begins anew: all points have one batch size.
            return differentiate(alpha, own.tell)
        return halving(objective, lambda: differentiate(alpha, own.tell))

    key = execution.key(
        lambda: record_key(objective, splits, "slopes", line.ends, objective.batch_size)
    )
    tasks = (Task(1, partial(evaluate, alpha), key, alpha) for alpha in alphas)
    points = list(execution.run(tasks))
    for point in points:
        if "unverified" in point:
            objective.remark(point["unverified"].tobytes().decode())
    found = {
        name: torch.stack([torch.from_numpy(point[f"{k}"]) for point in points], 1)
        for k, name in enumerate(splits)
    }
    return {name: Slopes(*both.unbind()) for name, both in found.items()}


def trial(objective: Objective, line: Line, split: Examples) -> Callable[[], object]:
    """Prepares to differentiate at one point, so that it can be timed.

    Args:
        objective: Whose mean loss; it has been checked.
        line: The line.
        split: The examples.

    Returns:
        What does it on a first batch.

    Raises:
        ModelError: There are no derivatives that can be trusted.
    """
    course = _Course(objective, line)
    way, _ = _settle(course, [0.25, 0.5, 0.75], split)
    weights = course.at(0.5)
    batch = split.first(objective.batch_size).to(objective.device)
    return lambda: course.sums(way, weights, batch)


class _Way(enum.Enum):
    """How to differentiate, in the order of preference: the mode, and whether by fused kernels."""

    FORWARD = "forward", True
    REVERSE = "reverse", True
    # Fused kernels of recurrent layers have no formulas; what they are fused from has.
    FORWARD_UNFUSED = "forward", False
    REVERSE_UNFUSED = "reverse", False

    def __init__(self, mode: str, fused: bool) -> None:
        self.mode = mode
        self.fused = fused

    @property
    def check(self) -> _Way:
        """Reverse mode, with the same kernels."""
        return _Way.REVERSE if self.fused else _Way.REVERSE_UNFUSED

    @contextlib.contextmanager
    def kernels(self) -> Iterator[None]:
        """Sees to it that operators are used that have derivatives."""
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(warnings.catch_warnings())
                # PyTorch warns of what it does itself: when forward mode is first used, and when
                # oneDNN is left out.
                warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
                warnings.filterwarnings("ignore", "TF32 acceleration", UserWarning)
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
                if not self.fused:
                    stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
                    stack.enter_context(torch.backends.cudnn.flags(enabled=False))
                stack.enter_context(Elementary())
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


class _Course:
    """A line through an objective's weights: its points, its direction, its derivatives.

    Args:
        objective: The objective.
        line: The line.

    Attributes:
        weight: The sum of the weights of the batch that was differentiated last, by which its sums
            are the derivatives of its mean loss.
    """

    def __init__(self, objective: Objective, line: Line) -> None:
        self.objective = objective
        self.line = line
        self.weight = 0.0
        self._direction = {}
        for name, a in line.a.items():
            own = objective.tensors[name]
            working = combining_type(own)
            self._direction[name] = (line.b[name].to(working) - a.to(working)).to(own.dtype)

    def at(self, alpha: float) -> dict[str, Tensor]:
        """Makes the weights of a point."""
        weights = {}
        for name in self.line.a:
            own = self.objective.tensors[name]
            ends = [end[name].to(combining_type(own)) for end in self.line.ends]
            weights[name] = self.line.combine(ends, (alpha,)).to(own.dtype)
        return weights

    def sums(self, way: _Way, weights: Weights, batch: Split) -> tuple[float, float]:
        """Differentiates the sum of the losses of a batch, once and twice."""
        slope, curvature = self._differentiate(way, weights, batch, twice=True)
        return slope, curvature

    def slope(self, way: _Way, weights: Weights, batch: Split) -> float:
        """Differentiates the sum of the losses of a batch once."""
        return self._differentiate(way, weights, batch, twice=False)[0]

    def _differentiate(
        self, way: _Way, weights: Weights, batch: Split, *, twice: bool
    ) -> tuple[float, ...]:
        differentiate = self._forward if way.mode == "forward" else self._reverse
        try:
            with way.kernels(), self.objective.computing():
                return differentiate(weights, batch, twice)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            reason = error.__cause__ or error if isinstance(error, LosscliError) else error
            told = reason.what if isinstance(reason, LosscliError) else one_line(reason)
            raise ModelError(told) from error

    def _losses(self, model: Callable[..., Any], batch: Split) -> Tensor:
        objective = self.objective
        inputs = objective.data.prepare(batch.inputs, objective.dtype)
        outputs = objective.forward(model, inputs)
        self.weight = objective.weight(outputs, batch.targets)
        return objective.per_example(objective.loss, outputs, batch.targets, "loss")

    @torch.no_grad()
    def _forward(self, weights: Weights, batch: Split, twice: bool) -> tuple[float, ...]:
        def losses(weights: dict[str, Tensor]) -> Tensor:
            def call(*args: Any, **kwargs: Any) -> Any:
                return functional_call(self.objective.model, weights, args, kwargs)

            return self._losses(call, batch)

        def once(weights: dict[str, Tensor]) -> Tensor:
            slope: Tensor = jvp(losses, (weights,), (self._direction,))[1]
            return slope

        # Dual numbers of dual numbers: levels of torch.autograd.forward_ad do not nest.
        at = dict(weights)
        found = jvp(once, (at,), (self._direction,)) if twice else (once(at),)
        return tuple(float(values.cpu().double().sum()) for values in found)

    def _reverse(self, weights: Weights, batch: Split, twice: bool) -> tuple[float, ...]:
        model = self.objective.model
        with self._bound(weights) as leaves, torch.enable_grad():
            total = self._losses(model, batch).sum()
            gradient = _gradient(total, leaves, create_graph=twice)
            if not twice:
                return (self._along(gradient),)
            slope = sum((g * self._direction[n]).sum() for n, g in gradient.items())
            second = (
                _gradient(slope, leaves, create_graph=False) if isinstance(slope, Tensor) else {}
            )
            return self._along(gradient), self._along(second)

    def _along(self, gradient: Weights) -> float:
        # MPS has no float64.
        device = "cpu" if self.objective.device.type == "mps" else self.objective.device
        return math.fsum(
            float(x.dot(y))
            for name, g in gradient.items()
            for x, y in pieces(g.detach().to(device), self._direction[name].to(device))
        )

    @contextlib.contextmanager
    def _bound(self, weights: Weights) -> Iterator[dict[str, Tensor]]:
        """Binds the model's own tensors to a point; so not even a closure misses it."""
        leaves = {name: self.objective.tensors[name] for name in weights}
        own = [(leaf, leaf.data, leaf.requires_grad) for leaf in leaves.values()]
        try:
            for name, leaf in leaves.items():
                leaf.data = weights[name]
                leaf.requires_grad_()
            yield leaves
        finally:
            for leaf, data, requires_grad in own:
                leaf.data = data
                leaf.requires_grad_(requires_grad)


def _gradient(
    value: Tensor, leaves: Mapping[str, Tensor], *, create_graph: bool
) -> dict[str, Tensor]:
    """Differentiates a number by those of the leaves that it depends on."""
    if not value.requires_grad:
        return {}
    _refuse_what_is_delayed(value)
    found = torch.autograd.grad(
        value, list(leaves.values()), create_graph=create_graph, allow_unused=True
    )
    return {name: g for name, g in zip(leaves, found, strict=True) if g is not None}


def _refuse_what_is_delayed(value: Tensor) -> None:
    """Finds what `once_differentiable` left in the graph: no gradient by the leaves meets it."""
    seen, nodes = set(), [value.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if node.name().endswith("autograd::Error"):
            raise ModelError("a backward of the model's own cannot be differentiated")
        seen.add(node)
        nodes += [below for below, _ in node.next_functions]


def _settle(course: _Course, alphas: Sequence[float], split: Examples) -> tuple[_Way, str]:
    """Chooses the first way that works, and whose derivatives are not wrong on a few examples.

    Returns:
        The way, and what could not be verified.
    """
    objective = course.objective
    sample = split.spread(min(objective.batch_size, _SAMPLE))[0].to(objective.device)
    few = split.spread(min(objective.batch_size, sample_size(objective.operations)))[0]
    few = few.to(objective.device)
    points = [alphas[k * (len(alphas) - 1) // (_PROOF_POINTS - 1)] for k in range(_PROOF_POINTS)]
    points = list(dict.fromkeys(points))
    trial = _Trial.prepare(course, alphas, few)
    reasons: dict[str, dict[str, None]] = {}
    for way in _Way:
        try:
            found = [course.sums(way, course.at(alpha), sample) for alpha in points]
            reason = ""
            doubt = ""
            if way.mode == "forward":
                reason = _contest(course, way, points, sample, found)
            if not reason:
                reason, doubt = trial.judge(way)
        except ModelError as error:
            reason = error.what[:_LONGEST_REASON]
        if not reason:
            return way, doubt
        if reason.startswith(DETACHED):
            # What is not in the graph is in neither mode.
            raise ModelError(reason, f"{CURE}, or leave out --derivatives")
        reasons.setdefault(reason, {})[way.mode] = None
    told = (f"in {' and '.join(modes)} mode {reason}" for reason, modes in reasons.items())
    raise ModelError(
        f"the model has no derivatives along the line that can be trusted: {'; '.join(told)}",
        "Leave out --derivatives, or take what cannot be differentiated twice (no_grad, a "
        "backward of its own) out of the model's forward",
    )


@dataclass(frozen=True)
class _Trial:
    """Compares derivatives along a line with differences, at points between those asked for.

    Attributes:
        course: The line; in float64 where possible.
        alphas: The points.
        sample: The examples.
        unit: ‖A‖ / ‖d‖: by so much α changes while the weights move by their own norm.
        kept: The tensors that are loaded again in the end; none where the objective is a copy.
    """

    course: _Course
    alphas: Sequence[float]
    sample: Split
    unit: float
    kept: Weights

    @classmethod
    def prepare(cls, course: _Course, alphas: Sequence[float], sample: Split) -> _Trial:
        """Chooses the points, and computes in float64 where possible."""
        objective, line = course.objective, course.line
        low, high = min(alphas), max(alphas)
        if low == high:
            low, high = low - 0.05, high + 0.05
        places = [low + (high - low) * math.fmod((k + 1) * _GOLDEN, 1) for k in range(POINTS)]
        length = distance(line.a, line.b, list(line.a))
        unit = (norm(line.a, list(line.a)) or length) / length if length else 1.0
        kept: Weights = {}
        precise = in_float64(objective, sample, inside=True)
        if precise is None or precise is objective:
            kept = {name: objective.tensors[name].detach().clone() for name in line.a}
        else:
            a, b = ({name: t.double() for name, t in end.items()} for end in line.ends)
            course = _Course(precise, Line(a, b))
        return cls(course, places, sample, unit, kept)

    def judge(self, way: _Way) -> tuple[str, str]:
        """Compares both derivatives with differences.

        Args:
            way: How they are computed.

        Returns:
            What derivative is wrong, if one is; and what could not be verified, if anything.
        """
        objective = self.course.objective
        first_rule, second_rule = rules(narrowest_type(objective, self.sample))
        found = cache(partial(self._derivatives, way))
        try:
            first, told = self._compare(first_rule, self._losses, found, 0)
            if len(told) >= NEEDED:
                return f"{DETACHED}: slope at {told[0]} of the loss", ""
            if not are_verified(first):
                return "", unverified("slope and curvature", "loss")
            slope = partial(self._slope, way)
            second, told = self._compare(second_rule, slope, found, 1)
            if len(told) >= NEEDED:
                return f"the second derivative is wrong: curvature at {told[0]} of the slope", ""
            return "", "" if are_verified(second) else unverified("curvature", "slope")
        finally:
            if self.kept:
                self.course.objective.load(self.kept)

    def _compare(
        self,
        rule: Differences,
        function: Callable[[float], Tensor],
        derivatives: Callable[[float], Tensor],
        order: int,
    ) -> tuple[Sequence[Comparison], Sequence[str]]:
        """Compares a derivative at as many points as decide; and says where it is wrong."""
        compared: list[Comparison] = []
        told = []
        for alpha in self.alphas:
            if rule.decides(compared, len(self.alphas) - len(compared)):
                break
            found, here = derivatives(alpha)[order], function(alpha)
            # A slope is small near a minimum; how large its terms are shows in the loss.
            losses = here if order == 0 else self._losses(alpha)
            size = max(float(terms.mean().abs()) for terms in (losses, here))
            comparison = rule.compare(found, size, here, self._along(function, alpha))
            compared.append(comparison)
            if comparison.outcome is Outcome.WRONG:
                assert comparison.limit is not None
                one, two = (float(x) / self.unit ** (order + 1) for x in (found, comparison.limit))
                told.append(f"α = {alpha:.3g} is {one:.3g}, but {two:.3g} by differences")
        return compared, told

    def _along(
        self, function: Callable[[float], Tensor], alpha: float
    ) -> Callable[[float], Tensor]:
        return lambda step: function(alpha + step * self.unit)

    def _losses(self, alpha: float) -> Tensor:
        objective = self.course.objective
        return objective.plain(self.course.at(alpha), {"": self.sample})[""].losses[0]

    def _derivatives(self, way: _Way, alpha: float) -> Tensor:
        """The first and the second derivative of the mean loss by α / ``unit``, ``[2]``."""
        slope, curvature = self.course.sums(way, self.course.at(alpha), self.sample)
        scaled = slope * self.unit, curvature * self.unit**2
        return torch.tensor(scaled, dtype=torch.float64) / (self.course.weight or 1)

    def _slope(self, way: _Way, alpha: float) -> Tensor:
        """The first, ``[1]``, without the second."""
        slope = self.course.slope(way, self.course.at(alpha), self.sample)
        value = slope * self.unit / (self.course.weight or 1)
        return torch.tensor([value], dtype=torch.float64)


def _contest(
    course: _Course,
    way: _Way,
    alphas: Sequence[float],
    sample: Split,
    found: Sequence[tuple[float, float]],
) -> str:
    """Says whether reverse mode, where there is one, has other derivatives; nothing where not."""
    # PyTorch's formulas for forward mode are tested once through, not twice: in version 2.13 that
    # of layer norm has a second derivative that is wrong.
    try:
        truth = [course.sums(way.check, course.at(alpha), sample) for alpha in alphas]
    except (ModelError, torch.OutOfMemoryError, MemoryError):
        return ""
    same = _SAME.get(course.objective.dtype, _SAME_IN_HALF)
    for one, other in zip(zip(*found, strict=True), zip(*truth, strict=True), strict=True):
        x, y = (torch.tensor(values, dtype=torch.float64) for values in (one, other))
        finite = x.isfinite() & y.isfinite()
        x, y = x[finite], y[finite]
        if float((x - y).norm()) > same * float(y.norm()):
            return "the numbers are not those of reverse mode"
    return ""
