"""The spectral density, the trace and the curvature of blocks, in addition to verdicts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from losscli.errors import UsageError
from losscli.evaluation.hessian.critical_points import CriticalPointTest
from losscli.evaluation.hessian.curvature import PRODUCT_LIMIT, Curvature
from losscli.evaluation.hessian.curvature_probes import BlockCurvature, CurvatureProbes
from losscli.evaluation.hessian.gauss_newton import GaussNewton
from losscli.evaluation.hessian.lanczos import MIN_PRODUCTS
from losscli.evaluation.hessian.spectral_density import Probe, SpectralDensity
from losscli.evaluation.ranks import Arrays
from losscli.evaluation.tasks import Execution
from losscli.results.summaries import Density
from losscli.studies.layerwise import Block
from losscli.table import Cell
from losscli.weight_space.curve import standard_error
from losscli.weight_space.vectors import Weights

__all__ = ["ADAM", "Part", "ProbedPoint", "Spectra", "SpectraOptions"]

Part = tuple[Literal["probe", "block", "adam"], int]
"""A task at one point on one split: a probe and its number, a block and its index, or `ADAM`."""

ADAM: Part = ("adam", 0)
"""The largest eigenvalue of the Hessian preconditioned by Adam."""

_OPERATORS: Mapping[str, type[Curvature]] = {"hessian": Curvature, "ggn": GaussNewton}

# Ghorbani et al. 2019 (arXiv 1901.10159) take 10 probes of 90 steps for ImageNet.
_PROBES = 10
_STEPS = 90

# Maximum of both: Lanczos' tridiagonal matrix is decomposed as a whole.
_MOST = 10_000


@dataclass(frozen=True)
class SpectraOptions:
    """What is computed in addition to the verdicts.

    Attributes:
        density: Whether to estimate the spectral density.
        blocks: Whether to compute the curvature of each block.
        probes: The number of random vectors.
        steps: The most Lanczos steps with each of them.
        operator: The matrix: ``hessian`` or ``ggn``.
    """

    density: bool
    blocks: bool
    probes: int
    steps: int
    operator: str

    @classmethod
    def plan(
        cls,
        *,
        density: bool,
        blocks: bool,
        probes: int | None,
        lanczos: int | None,
        operator: str | None,
    ) -> Self:
        """Checks options, and completes them by their defaults.

        Args:
            density: ``--density``.
            blocks: ``--blocks``.
            probes: ``--probes``.
            lanczos: ``--lanczos``.
            operator: ``--operator``.

        Returns:
            The options.

        Raises:
            UsageError: An option has no effect or an impossible value.
        """
        for option, value, needed, used in (
            ("--probes", probes, "--density or --blocks", density or blocks),
            ("--operator", operator, "--density or --blocks", density or blocks),
            ("--lanczos", lanczos, "--density", density),
        ):
            if value is not None and not used:
                raise UsageError(f"{option} has no effect without {needed}", f"Add {needed}")
        if operator is not None and operator not in _OPERATORS:
            raise UsageError(
                f"--operator {operator} is not known", f"Choose one of {', '.join(_OPERATORS)}"
            )
        for option, number, least in (("--probes", probes, 1), ("--lanczos", lanczos, 2)):
            if number is not None and not least <= number <= _MOST:
                raise UsageError(
                    f"{option} must be between {least} and {_MOST:,}, not {number:,}",
                    f"Give {_PROBES if option == '--probes' else _STEPS}",
                )
        return cls(density, blocks, probes or _PROBES, lanczos or _STEPS, operator or "hessian")

    @property
    def provenance(self) -> dict[str, Any]:
        """The options by their names in the summary; None where they have no effect."""
        used = self.density or self.blocks
        return {
            "operator": self.operator if used else None,
            "probes": self.probes if used else None,
            "lanczos": self.steps if self.density else None,
        }


@dataclass(frozen=True)
class ProbedPoint:
    """What probes and blocks show of one checkpoint on one split.

    Attributes:
        probes: The probes.
        curvatures: The blocks, if they were asked for.
    """

    probes: Sequence[Probe]
    curvatures: Mapping[Block, BlockCurvature]

    @cached_property
    def density(self) -> SpectralDensity:
        """The spectral density."""
        return SpectralDensity.of(self.probes)

    @property
    def trace(self) -> tuple[float, float | None]:
        """The trace and its standard error over probes; None for one probe.

        Without the density, it is the sum over the blocks.
        """
        if self.probes:
            return _mean(np.array([probe.trace for probe in self.probes]))
        return _mean(np.sum([block.traces for block in self.curvatures.values()], axis=0))

    def summary(self) -> Density:
        """Returns the part of the summary on the density."""
        trace, stderr = self.trace
        return {
            "sigma": self.density.sigma,
            "outliers": self.density.outliers.tolist(),
            "trace": trace,
            "trace_stderr": stderr,
        }

    def density_rows(self) -> Iterator[list[Cell]]:
        """Yields the cells of ``lambda`` and ``density``."""
        for point in zip(self.density.grid.tolist(), self.density.density.tolist(), strict=True):
            yield [*point]

    def block_rows(self) -> Iterator[list[Cell]]:
        """Yields the cells of each block."""
        for block, found in self.curvatures.items():
            yield [
                *(block.name, found.gradient_norm, found.lambda_max, found.lambda_max_error),
                *_mean(found.traces),
            ]


def _mean(values: NDArray[np.float64]) -> tuple[float, float | None]:
    """Returns the mean and its standard error, which one value does not have."""
    return float(values.mean()), standard_error(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Spectra:
    """The tasks of the spectral density and of blocks.

    Attributes:
        options: The options.
        blocks: The blocks of the model; empty if they are not asked for.
        estimator: Evaluates a task.
    """

    options: SpectraOptions
    blocks: Sequence[Block]
    estimator: CurvatureProbes

    @classmethod
    def of(cls, options: SpectraOptions, blocks: Sequence[Block], test: CriticalPointTest) -> Self:
        """Makes the tasks.

        Args:
            options: The options.
            blocks: The blocks of the model.
            test: The `CriticalPointTest` of the same run.

        Returns:
            The tasks.
        """
        operator = _OPERATORS[options.operator]
        estimator = CurvatureProbes(test, operator, options.probes, options.steps)
        return cls(options, blocks if options.blocks else (), estimator)

    @property
    def parts(self) -> list[Part]:
        """The tasks at each point on each split."""
        probes = range(self.options.probes if self.options.density else 0)
        blocks = range(len(self.blocks))
        return [*(("probe", i) for i in probes), *(("block", i) for i in blocks)]

    def products(self, part: Part) -> tuple[int, int]:
        """Returns the fewest and the most products with the matrix that a task takes."""
        name, index = part
        if name == "probe":
            return (self.estimator.kept[1],) * 2
        size = self.estimator.size(self.blocks[index].moving)
        measured = self.options.probes + 1
        return min(MIN_PRODUCTS, size) + measured, min(PRODUCT_LIMIT, size) + measured

    def length(self, part: Part) -> int:
        """Returns about how many products a task takes, for the progress."""
        return self.estimator.steps if part[0] == "probe" else 2 * MIN_PRODUCTS

    def numbers(self, part: Part) -> list[Any]:
        """Returns what a record of a task depends on, in JSON types."""
        name, index = part
        what: object = [self.estimator.steps, index]
        if name == "block":
            what = [list(self.blocks[index].moving), index, self.options.probes]
        return [name, self.options.operator, what]

    def evaluate(
        self, part: Part, placed: Weights, split: str, size: float, execution: Execution
    ) -> Arrays:
        """Evaluates a task.

        Args:
            part: The task.
            placed: The point: all tensors of the model.
            split: The name of the split.
            size: Its size in the unit of progress.
            execution: Its progress counts up to that.

        Returns:
            The record.
        """
        name, index = part
        if name == "probe":
            return self.estimator.probe(placed, split, index, size, execution)
        return self.estimator.block(placed, split, index, self.blocks[index].moving, execution)

    def point(self, records: Mapping[Part, Arrays]) -> ProbedPoint:
        """Reads the records of one checkpoint on one split.

        Args:
            records: The record of each task.

        Returns:
            The point.
        """
        probes = [Probe.from_arrays(r) for (name, _), r in records.items() if name == "probe"]
        curvatures = {
            self.blocks[index]: BlockCurvature.from_arrays(record)
            for (name, index), record in records.items()
            if name == "block"
        }
        return ProbedPoint(probes, curvatures)

    def notes(self, points: Sequence[ProbedPoint]) -> Iterator[str]:
        """Yields notes on what was estimated.

        Args:
            points: All checkpoints on all splits.
        """
        if not self.parts:
            return
        if self.options.operator == "ggn":
            yield (
                "density, trace and blocks are those of the Gauss-Newton matrix; verdicts, λ min "
                "and λ max are those of the Hessian"
            )
        if self.options.probes == 1:
            yield "one probe gives no standard error of the trace: give --probes 2 or more"
        kept, steps = self.estimator.kept
        if self.options.density and kept < steps:
            yield (
                f"{kept} of {steps} Lanczos vectors fit into memory: outliers may appear several "
                "times and share their weight, so the bulk is resolved as by fewer steps"
            )
        found = [one for point in points for one in point.curvatures.values()]
        if missed := sum(math.isfinite(one.lambda_max) and not one.converged for one in found):
            yield (
                f"the search for λ max has not converged in {missed} of {len(found)} blocks: "
                "a larger eigenvalue may exist there"
            )
