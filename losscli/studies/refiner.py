"""Derivatives on a line, points where it bends, and losses without rounding at extrema."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from losscli.evaluation.derivatives.sweep import MethodChoice, slopes
from losscli.evaluation.memory import halving
from losscli.evaluation.objective import Objective
from losscli.evaluation.precision import in_float64
from losscli.evaluation.sweep import sweep
from losscli.evaluation.tasks import Execution
from losscli.studies.line_curve import Derivatives, LineCurve, RefinedCurve
from losscli.studies.problem import Problem
from losscli.weight_space.curve import near_rounding
from losscli.weight_space.refinement import Curve, propose
from losscli.weight_space.slices import Line
from losscli.weight_space.vectors import Weights

__all__ = ["Refiner"]

# Rounding error of a mean loss, relative to it.
_NOISE = {"float64": 1e-14, "float32": 1e-7, "tf32": 1e-4, "float16": 1e-3, "bfloat16": 1e-2}


@dataclass
class Refiner:
    """Adds derivatives and further points to the losses on a line.

    Attributes:
        problem: What is evaluated.
        start: All tensors at α = 0.
        line: The line, its ends on the device.
        method: The method of slopes and curvatures, the same for all points; None to compute none.
        execution: How further points are executed. Progress counts those beyond what is done.
    """

    problem: Problem
    start: Weights
    line: Line
    method: MethodChoice | None
    execution: Execution

    def slopes(self, alphas: Sequence[float]) -> dict[str, Derivatives]:
        """Computes slopes and curvatures, if there is a ``method``.

        Args:
            alphas: The P points.

        Returns:
            For each split its slopes and curvatures; empty if they are not computed.
        """
        if self.method is None:
            return {}
        objective, method = self.problem.objective, self.method
        found = halving(
            objective,
            lambda: slopes(objective, self.line, alphas, execution=self.execution, choice=method),
        )
        self.execution = self.execution.after(len(alphas))
        return {name: (s.slope.numpy(), s.curvature.numpy()) for name, s in found.items()}

    def refine(self, refined: RefinedCurve, tolerance: float) -> tuple[RefinedCurve, bool]:
        """Adds points until none is proposed.

        A search for an extremum ends at the vertex of a parabola, so that the last digits of the
        losses determine its place: another device, or other chunks on a GPU, move these points, in
        float32 by about 1e-4 of the range. On a CPU the number of processes does not, if all points
        fit into memory at once.

        Args:
            refined: The line so far.
            tolerance: The error to refine to, as a share of the curve's height.

        Returns:
            The refined line, and whether there were more points to add.
        """
        while True:
            curves = {
                name: Curve(
                    curve.means,
                    refined.slopes[name][0].tolist() if refined.slopes else None,
                )
                for name, curve in refined.curves.items()
            }
            proposal = propose(
                refined.alphas, curves, tolerance, noise=_NOISE[self.problem.objective.precision]
            )
            alphas = self.execution.decide(list(proposal.alphas))
            if not alphas:
                return refined, proposal.exhausted
            points = [(alpha,) for alpha in alphas]
            found = sweep(self.problem.objective, self.line, points, execution=self.execution)
            self.execution = self.execution.after(len(points))
            refined = refined.add(alphas, found, self.slopes(alphas))

    def without_rounding(self, refined: RefinedCurve) -> tuple[Mapping[str, LineCurve], int]:
        """Evaluates again, in float64, the points where rounding alone could make an extremum.

        Args:
            refined: The line.

        Returns:
            The curves with these losses, and the number of points.
        """
        objective, precision = self.problem.objective, self.problem.objective.precision
        curves, recomputed = refined.curves, set[float]()
        if precision == "float64":
            return curves, 0
        precise: Objective | None = None
        while True:
            doubted = {
                alpha
                for curve in curves.values()
                for alpha in near_rounding(refined.alphas, curve.means, precision)
            } - recomputed
            order = self.execution.decide(sorted(doubted))
            if not order:
                return curves, len(recomputed)
            if precise is None:
                objective.load(self.start)
                precise = in_float64(objective, next(iter(objective.first_batches().values())))
            # Either all ranks have a float64 copy, or none uses it.
            if not self.execution.decide(precise is not None) or precise is None:
                return curves, len(recomputed)
            points = [(alpha,) for alpha in order]
            found = sweep(precise, self.line, points, execution=self.execution.quiet)
            places = [2 + refined.alphas.index(alpha) for alpha in order]
            curves = {
                name: curve.replace(places, found[name].losses.numpy())
                for name, curve in curves.items()
            }
            recomputed |= set(order)
