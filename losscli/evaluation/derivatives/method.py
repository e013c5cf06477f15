"""Chooses how to differentiate along a line: the first method with derivatives that are right.

A gradient that is cut off, or an operator with a wrong formula, raises no error. So on a few
examples the derivatives are compared with finite differences of the loss, and those of forward mode
with those of reverse mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from losscli.data import Examples, Split
from losscli.errors import ModelError
from losscli.evaluation.derivatives.line import LineDerivatives, Method
from losscli.evaluation.finite_differences import (
    CURE,
    DETACHED,
    NEEDED,
    POINTS,
    Comparison,
    Differences,
    Outcome,
    rules,
    sample_size,
    unverified,
)
from losscli.evaluation.precision import in_float64, narrowest_type
from losscli.weight_space.vectors import Weights, distance, norm

__all__ = ["choose_method"]

# Examples and points on which the two modes are compared.
_SAMPLE = 64

_PROOF_POINTS = 3

# The golden ratio: the fractional parts of its multiples are spread evenly over [0, 1), and special
# points such as 0 or 1/2 are not among them.
_GOLDEN = 0.6180339887498949

# The largest relative difference between the two modes, by the precision of the forward pass.
_MODE_TOLERANCE = {
    "float64": 1e-8,
    "float32": 1e-3,
    **dict.fromkeys(("tf32", "float16", "bfloat16"), 5e-2),
}

_LONGEST_REASON = 160


def choose_method(
    derivatives: LineDerivatives, alphas: Sequence[float], split: Examples
) -> tuple[Method, str]:
    """Chooses the first method that works and gives no wrong derivatives on a few examples.

    Returns:
        The method; and a note on what could not be verified, empty if everything was.

    Raises:
        ModelError: No method gives derivatives that can be trusted.
    """
    objective = derivatives.objective
    sample = split.spread(min(objective.batch_size, _SAMPLE))[0].to(objective.device)
    few = split.spread(min(objective.batch_size, sample_size(objective)))[0]
    few = few.to(objective.device)
    points = [alphas[k * (len(alphas) - 1) // (_PROOF_POINTS - 1)] for k in range(_PROOF_POINTS)]
    points = list(dict.fromkeys(points))
    # Later, and not with the tensors of the comparison of modes in memory.
    test = cache(partial(_DifferenceTest.prepare, derivatives, alphas, few))
    reasons: dict[str, dict[str, None]] = {}
    for method in Method:
        try:
            sums = [derivatives.sums(method, derivatives.at(alpha), sample) for alpha in points]
            reason = note = ""
            if method.mode != "reverse" and not _matches_reverse_mode(
                derivatives, method, points, sample, sums
            ):
                reason = "the results differ from those of reverse mode"
            if not reason:
                reason, note = test().judge(method)
        except ModelError as error:
            reason = error.what[:_LONGEST_REASON]
        if not reason:
            return method, note
        if method is Method.TAYLOR:
            # Forward mode knows more functions of torch.
            continue
        if reason.startswith(DETACHED):
            # A detached part is missing from the graph in both modes.
            raise ModelError(reason, f"{CURE}, or leave out --derivatives")
        reasons.setdefault(reason, {})[method.mode] = None
    failures = (f"in {' and '.join(modes)} mode {reason}" for reason, modes in reasons.items())
    raise ModelError(
        f"the model has no derivatives along the line that can be trusted: {'; '.join(failures)}",
        "Leave out --derivatives, or remove what cannot be differentiated twice (no_grad, a custom "
        "backward) from the model's forward",
    )


@dataclass(frozen=True)
class _DifferenceTest:
    """Compares derivatives along a line with finite differences.

    Attributes:
        line: The derivatives along the line, in float64 where possible.
        alphas: Points of the line, between those that will be evaluated.
        sample: The examples.
        unit: ‖A‖ / ‖d‖, the change of α over which the weights move by their own norm.
        restore: Tensors to load again in the end; empty where the objective is a copy.
    """

    line: LineDerivatives
    alphas: Sequence[float]
    sample: Split
    unit: float
    restore: Weights

    @classmethod
    def prepare(
        cls, derivatives: LineDerivatives, alphas: Sequence[float], sample: Split
    ) -> _DifferenceTest:
        """Chooses the points, and copies the objective to float64 where possible."""
        objective, line = derivatives.objective, derivatives.line
        low, high = min(alphas), max(alphas)
        if low == high:
            low, high = low - 0.05, high + 0.05
        points = [low + (high - low) * math.fmod((k + 1) * _GOLDEN, 1) for k in range(POINTS)]
        length = distance(line.a, line.b, list(line.a))
        unit = (norm(line.a, list(line.a)) or length) / length if length else 1.0
        restore: Weights = {}
        precise = in_float64(objective, sample, inside=True)
        if precise is None or precise is objective:
            restore = {name: objective.tensors[name].detach().clone() for name in line.a}
        else:
            derivatives = LineDerivatives(precise, line)
        return cls(derivatives, points, sample, unit, restore)

    def judge(self, method: Method) -> tuple[str, str]:
        """Compares both derivatives with finite differences.

        Args:
            method: How they are computed.

        Returns:
            Why a derivative is wrong, empty if none is; and a note on unverified derivatives, empty
            if all were verified.
        """
        objective = self.line.objective
        first_rule, second_rule = rules(narrowest_type(objective, self.sample))
        derivatives = cache(partial(self._derivatives, method))
        try:
            first, errors = self._compare(first_rule, self._losses, derivatives, 0)
            if len(errors) >= NEEDED:
                return f"{DETACHED}: slope at {errors[0]} of the loss", ""
            if not first_rule.verifies(first):
                return "", unverified("slope and curvature", "loss")
            slope = partial(self._slope, method)
            second, errors = self._compare(second_rule, slope, derivatives, 1)
            if len(errors) >= NEEDED:
                return f"the second derivative is wrong: curvature at {errors[0]} of the slope", ""
            return "", "" if second_rule.verifies(second) else unverified("curvature", "slope")
        finally:
            if self.restore:
                self.line.objective.load(self.restore)

    def _compare(
        self,
        rule: Differences,
        function: Callable[[float], Tensor],
        derivatives: Callable[[float], Tensor],
        order: int,
    ) -> tuple[Sequence[Comparison], Sequence[str]]:
        """Compares a derivative at as many points as are needed to decide.

        Returns:
            The comparisons; and a phrase for each point at which the derivative is wrong.
        """
        comparisons: list[Comparison] = []
        errors = []
        for alpha in self.alphas:
            if rule.decides(comparisons, len(self.alphas) - len(comparisons)):
                break
            derivative, value = derivatives(alpha)[order], function(alpha)
            # Near a minimum the slope is small, but it has the rounding errors of large terms.
            losses = value if order == 0 else self._losses(alpha)
            size = max(float(terms.mean().abs()) for terms in (losses, value))
            comparison = rule.compare(derivative, size, self._along(function, alpha))
            comparisons.append(comparison)
            if comparison.outcome is Outcome.WRONG:
                assert comparison.limit is not None
                scale = self.unit ** (order + 1)
                computed, limit = (float(x) / scale for x in (derivative, comparison.limit))
                errors.append(f"α = {alpha:.3g} is {computed:.3g}, but {limit:.3g} by differences")
        return comparisons, errors

    def _along(
        self, function: Callable[[float], Tensor], alpha: float
    ) -> Callable[[float], Tensor]:
        return lambda step: function(alpha + step * self.unit)

    def _losses(self, alpha: float) -> Tensor:
        objective = self.line.objective
        return objective.plain(self.line.at(alpha), {"": self.sample})[""].losses[0]

    def _derivatives(self, method: Method, alpha: float) -> Tensor:
        """First and second derivative of the mean loss with respect to α / ``unit``, ``[2]``."""
        slope, curvature = self.line.sums(method, self.line.at(alpha), self.sample)
        scaled = slope * self.unit, curvature * self.unit**2
        return torch.tensor(scaled, dtype=torch.float64) / (self.line.weight or 1)

    def _slope(self, method: Method, alpha: float) -> Tensor:
        """The first derivative alone, ``[1]``."""
        slope = self.line.slope(method, self.line.at(alpha), self.sample)
        value = slope * self.unit / (self.line.weight or 1)
        return torch.tensor([value], dtype=torch.float64)


def _matches_reverse_mode(
    derivatives: LineDerivatives,
    method: Method,
    alphas: Sequence[float],
    sample: Split,
    sums: Sequence[tuple[float, float]],
) -> bool:
    """Whether reverse mode gives the same derivatives, or fails so that they cannot be compared."""
    # PyTorch tests its forward-mode formulas by differentiating once, not twice: in version 2.13
    # the formula of layer norm has a wrong second derivative.
    try:
        truth = [
            derivatives.sums(method.reference, derivatives.at(alpha), sample) for alpha in alphas
        ]
    except (ModelError, torch.OutOfMemoryError, MemoryError):
        return True
    tolerance = _MODE_TOLERANCE[derivatives.objective.precision]
    for forward, reverse in zip(zip(*sums, strict=True), zip(*truth, strict=True), strict=True):
        x, y = (torch.tensor(values, dtype=torch.float64) for values in (forward, reverse))
        finite = y.isfinite()
        x, y = x[finite], y[finite]
        # Also where x is not a number: the comparison is then false.
        if not float((x - y).norm()) <= tolerance * float(y.norm()):
            return False
    return True
