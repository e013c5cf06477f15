"""Gradient, Hessian-vector products and extreme eigenvalues with their error, at one point.

Whether training stopped at a minimum, at a saddle or somewhere on a slope is a question about
derivatives. Each answer comes with what it is not sure of: the residual norm of an eigenpair, and
the rounding of the type that the network is computed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import signature
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from losscli.data import Examples, Split
from losscli.errors import ModelError, OutOfMemoryError, UsageError, one_line
from losscli.evaluation.decompositions import Elementary
from losscli.evaluation.differences import (
    CURE,
    DETACHED,
    NEEDED,
    POINTS,
    Comparison,
    Differences,
    are_verified,
    finer,
    noise_of,
    rules,
    unverified,
)
from losscli.evaluation.objective import Objective, Progress
from losscli.evaluation.precision import narrowest_type
from losscli.weight_space.vectors import Weights, norm, unflatten

__all__ = [
    "DENSE_LIMIT",
    "LEAST",
    "PRODUCT_LIMIT",
    "ROWS",
    "Curvature",
    "DenseHessian",
    "Eigenpair",
    "Extremes",
    "Verdict",
    "add_rounding",
    "check_derivatives",
    "hessian_rounding",
    "nearby",
    "verdict",
]

DENSE_LIMIT = 1000
"""The most parameters whose Hessian is made as a whole."""

PRODUCT_LIMIT = 1000
"""Hessian-vector products after which the search for eigenvalues ends as far as it came, about."""

ROWS = 16
"""Rows of a whole Hessian for which a batch is differentiated once."""

LEAST = 50
"""Products before a search may be believed to have met both ends. From a random start, 50 of them
miss an end by more than 2 % of the spectrum's width with a probability below 1/1000, for up to a
million weights: 1.648 √n exp(−√ε (2k − 1)) (Kuczyński & Woźniakowski 1992)."""

Verdict = Literal["not critical", "saddle", "maximum", "minimum", "undecided"]

_Matrix = NDArray[np.float64]

# How asymmetric a Hessian may be, as a share of its largest eigenvalue.
_ASYMMETRY = 1e-3

# Below this size the whole Hessian takes no more products than a search.
_SMALL = 64

# Vectors that a search keeps, in the host's memory, and once more where it reads its answer off
# them: more of them save products, as long as there is memory for them.
_BASIS = 100
_BASIS_BYTES = 1 << 30

# A tolerance that everything meets: ARPACK then stops after its first basis.
_ANY = 1e100


# How far from a point derivatives are compared with differences, as a share of its norm.
_AWAY = 0.01

# How far away rounding is measured by its scatter, as a share of the norm of the weights, and how
# many standard deviations bound it. Over so long a step most numbers are rounded differently, and
# a smooth function has no fourth difference above its rounding.
_SPREAD = 1e-3
_SPREAD_IN_FLOAT64 = 1e-7
_DEVIATIONS = 3

# Random vectors by which the rounding of a whole Hessian is measured.
_PROBES = 8

# How far parameters that no gradient reaches are moved, as a share of their size.
_NUDGE = 1 / 16


@dataclass(frozen=True)
class Eigenpair:
    """An approximate eigenvalue of the Hessian.

    Attributes:
        value: λ = vᵀHv.
        error: ‖Hv − λv‖, from a product of its own; no smaller than the rounding of the forward
            type (√n ε times the largest |λ| found). Some eigenvalue of H lies within it of λ, if
            the rounding of Hv is no larger. `add_rounding` adds that rounding as it is measured.
        vector: v, of length 1, ``[n]``, float64, its largest entry positive.
        converged: Whether λ may be taken for the extreme eigenvalue it stands for. Where not, the
            error still holds, but an eigenvalue further out may have been missed.
    """

    value: float
    error: float
    vector: Tensor
    converged: bool


@dataclass(frozen=True)
class Extremes:
    """The two ends of the spectrum of the Hessian.

    Attributes:
        smallest: The smallest eigenvalues, from the smallest up.
        largest: The largest, from the largest down.
        products: Hessian-vector products that finding and measuring them took.
        exact: Whether they were picked from the whole spectrum, so that none further out exists.
    """

    smallest: tuple[Eigenpair, ...]
    largest: tuple[Eigenpair, ...]
    products: int
    exact: bool

    def widened(self, *rounding: float) -> Extremes:
        """Adds rounding to the errors of all pairs, or of each pair: the smallest, the largest."""
        pairs = [*self.smallest, *self.largest]
        wider = tuple(
            replace(pair, error=pair.error + added) if math.isfinite(pair.error) else pair
            for pair, added in zip(pairs, rounding * (len(pairs) // len(rounding)), strict=True)
        )
        number = len(self.smallest)
        return replace(self, smallest=wider[:number], largest=wider[number:])


@dataclass(frozen=True)
class DenseHessian:
    """The whole Hessian.

    Attributes:
        matrix: H, ``[n, n]``, made symmetric.
        asymmetry: The spectral norm of the antisymmetric part that was taken off, which is
            rounding alone.
        eigenvalues: The spectrum, ``[n]``, ascending; nan where H is not finite.
        eigenvectors: Its vectors as columns, ``[n, n]``.
        error: The noise floor of each eigenvalue: the asymmetry, or √n ε times the largest |λ|
            where that is more, ε the rounding unit of the forward type. Rounding that is symmetric,
            such as that of activations which cancel, is not in it: see `hessian_rounding`.
    """

    matrix: _Matrix
    asymmetry: float
    eigenvalues: _Matrix
    eigenvectors: _Matrix
    error: float

    @property
    def shares(self) -> tuple[float, float, float]:
        """The shares of eigenvalues above ``error``, below ``-error``, and undecided between."""
        if math.isnan(self.error):
            return math.nan, math.nan, math.nan
        positive = float(np.mean(self.eigenvalues > self.error))
        negative = float(np.mean(self.eigenvalues < -self.error))
        undecided = float(np.mean(np.abs(self.eigenvalues) <= self.error))
        return positive, negative, undecided

    def newton_change(self, gradient: _Matrix) -> float:
        """Returns ½ gᵀH⁻¹g, by which a quadratic loss falls from here to its critical point."""
        along = self.eigenvectors.T @ gradient
        return float(np.sum(along**2 / self.eigenvalues) / 2)


class Curvature:
    """The first and second derivatives of the mean loss of a split at one point.

    The model is in eval mode, so that BatchNorm uses its running statistics. Derivatives are taken
    batch by batch in the forward type and added up in float64; out of memory, the objective's
    batch is halved. As a context manager it gives the parameters their ``requires_grad`` back; the
    weights stay loaded.

    Args:
        objective: The model, loss and data, checked by ``Objective.check``.
        weights: The point: all tensors of the model.
        names: The parameters that are differentiated, each tied parameter under one name. They
            make up the vectors ``[n]`` in this order.
        split: The examples.
        progress: Told the share of a gradient or product that was done since it was last told.

    Attributes:
        size: n, the number of weights that are differentiated.
        products: Hessian-vector products made so far.
    """

    def __init__(
        self,
        objective: Objective,
        weights: Weights,
        names: Sequence[str],
        split: Examples,
        progress: Progress | None = None,
    ) -> None:
        self._objective = objective
        self._names = list(names)
        self._parameters = [objective.tensors[name] for name in names]
        self._split = split
        self._progress = progress
        # MPS has no float64.
        mps = objective.device.type == "mps"
        self._device = torch.device("cpu") if mps else objective.device
        self._wide = torch.float32 if mps else torch.float64
        self._weight = 0.0
        self._dense: DenseHessian | None = None
        self._recurrent = any(isinstance(m, nn.RNNBase) for m in objective.model.modules())
        self.size = sum(p.numel() for p in self._parameters)
        self.products = 0
        objective.load(weights)
        self._flags = [(p, p.requires_grad) for p in objective.model.parameters()]
        chosen = {id(p) for p in self._parameters}
        for parameter, _ in self._flags:
            parameter.requires_grad_(id(parameter) in chosen)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)

    @property
    def loss(self) -> float:
        """L, the mean loss over all examples of the split."""
        return self._first[0]

    def gradient(self) -> Tensor:
        """Computes ∇L, once.

        Returns:
            ``[n]``, float64, on the objective's device, or the CPU where that has no float64.
        """
        return self._first[1]

    def product(self, v: Tensor) -> Tensor:
        """Multiplies the Hessian with a vector by differentiating twice (Pearlmutter 1994).

        H v = ∇⟨∇L, v⟩. Where the gradient is constant, such as that of a loss which is piecewise
        linear in the weights, the product is zero.

        Args:
            v: ``[n]``, or several as ``[K, n]``; float64, rounded to the forward type.

        Returns:
            H v, of the same shape, float64, on the device of the gradient.
        """
        return self._times(v.view(-1, self.size)).view_as(v)

    def squared_jacobian(self, generator: torch.Generator) -> float:
        """Estimates the mean over the examples of ‖∂z/∂θ‖_F², z the outputs of the model.

        It is that of ‖∂⟨z, s⟩/∂θ‖², the signs s random. Batches are those of a first derivative.

        Args:
            generator: Of the signs.

        Returns:
            The estimate; 0 where the outputs are not a tensor that depends on the weights.
        """
        objective, total = self._objective, 0.0
        for batch in objective.batches(self._split):
            inputs = objective.data.prepare(batch.inputs, objective.dtype)
            with self._differentiable():
                outputs = objective.forward(objective.model, inputs)
                if not (isinstance(outputs, Tensor) and outputs.requires_grad):
                    return 0.0
                signs = torch.randint(2, outputs.shape, generator=generator) * 2 - 1
                along = (outputs * signs.to(outputs)).sum()
                parts = torch.autograd.grad(along, self._parameters, allow_unused=True)
            total += float(self._flat(parts).square().sum())
        return total / len(self._split)

    def named(self, v: Tensor) -> dict[str, Tensor]:
        """Cuts a vector into the tensors that it is made of.

        Args:
            v: ``[n]``.

        Returns:
            Each parameter's part, in its shape, as a view.
        """
        return unflatten(v, self._objective.tensors, self._names)

    def dense(self) -> DenseHessian:
        """Computes the whole Hessian by n products, once.

        Returns:
            The Hessian and its spectrum.

        Raises:
            ModelError: Its second derivatives are not symmetric, and so are wrong.
            UsageError: There are more than ``DENSE_LIMIT`` parameters.
        """
        if self.size > DENSE_LIMIT:
            raise UsageError(
                f"the Hessian of {self.size:,} parameters is too large to be made as a whole",
                f"Choose {DENSE_LIMIT:,} or fewer with --only",
            )
        if self._dense is None:
            identity = torch.eye(self.size, dtype=torch.float64)
            rows = torch.cat([self._times(part).cpu() for part in torch.split(identity, ROWS)])
            self._dense = self._decompose(rows.numpy())
        return self._dense

    def _decompose(self, rows: _Matrix) -> DenseHessian:
        matrix = (rows + rows.T) / 2
        if not np.isfinite(rows).all():
            nothing = np.full(self.size, math.nan)
            return DenseHessian(matrix, math.nan, nothing, np.full_like(matrix, math.nan), math.nan)
        asymmetry = float(np.linalg.norm((rows - rows.T) / 2, 2))
        values, vectors = np.linalg.eigh(matrix)
        largest = float(np.abs(values).max())
        # Rounding is no excuse for so much: some operator's second derivative is wrong.
        if asymmetry > max(_ASYMMETRY, 100 * self._rounding) * largest:
            raise ModelError(
                f"the second derivatives of the model are wrong: its Hessian, with eigenvalues up "
                f"to {largest:.2g}, is asymmetric by {asymmetry:.2g}",
                "Write its operators with a backward of their own in elementary ones",
            )
        error = max(asymmetry, self._rounding * largest)
        return DenseHessian(matrix, asymmetry, values, vectors, error)

    def extremes(
        self, number: int, *, tolerance: float, seed: int, limit: int = PRODUCT_LIMIT
    ) -> Extremes:
        """Finds the largest and the smallest eigenvalues, by their values, not their magnitudes.

        Small Hessians, and one that ``dense`` made before, are decomposed. Else both ends are
        sought at once by ARPACK's implicitly restarted Lanczos method (Lehoucq, Sorensen & Yang
        1998, "ARPACK Users' Guide") in SciPy's ``eigsh``: it asks for nothing but products. A first
        basis of 50 vectors is often enough; a search goes on from it where it is not.

        Each pair is measured by one more product: what is reported is vᵀHv and ‖Hv − λv‖, not what
        the search believes. A Ritz value never lies beyond the spectrum: the smallest one is an
        upper bound of λ_min, and a search from a random start that has settled may, in principle,
        still have missed a smaller eigenvalue, or further vectors of a multiple one.

        Args:
            number: How many of either end; as many as there are where that is less.
            tolerance: A pair has converged where ‖Hv − λv‖ is at most this share of |λ|, or the
                rounding of the forward type, after 50 products or more.
            seed: Of the start; the same seed gives the same numbers.
            limit: Products after which the search ends, beside those that measure; a few more
                where its basis broke down on the way.

        Returns:
            The two ends; where H is not finite, pairs of nan.

        Raises:
            UsageError: ``number`` or ``limit`` is below 1.
        """
        if number < 1 or limit < 1:
            raise UsageError(f"{number} eigenvalues from {limit} products are none", "Give 1 each")
        before = self.products
        number = min(number, self.size)
        exact = self._dense is not None or self.size <= max(_SMALL, 4 * number)
        if exact:
            vectors = torch.from_numpy(self.dense().eigenvectors.T).to(self._device)
            if 2 * number < len(vectors):
                vectors = torch.cat([vectors[:number], vectors[-number:]])
            pairs = self._measure(vectors, tolerance, exact=True, trusted=True)
        else:
            pairs = self._search(number, tolerance, seed, limit)
            number = min(number, max(1, len(pairs) // 2))
        smallest, largest = tuple(pairs[:number]), tuple(pairs[::-1][:number])
        return Extremes(smallest, largest, self.products - before, exact)

    def _search(self, number: int, tolerance: float, seed: int, limit: int) -> list[Eigenpair]:
        """Searches for the pairs of the two ends.

        Returns:
            The pairs by ascending eigenvalue, as many of either end; fewer than asked for, down to
            one, where ``limit`` is too low for more.
        """
        begun = self.products
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(self.size, generator=generator, dtype=torch.float64).to(self._device)
        least = 4 * number + 8
        widest = max(least, min(_BASIS, _BASIS_BYTES // (16 * self.size)))
        # Where not much is missing, all of it: that leaves nothing to restart for.
        widest = self.size if self.size <= 2 * widest else widest
        # A basis takes one product more than it has vectors, and the shift takes another.
        width = min(widest, max(least, LEAST), limit - 2)
        count = 2 * max(0, min(number, (width - 1) // 2))
        vectors = start.unsqueeze(0)
        try:
            if count:
                # With a tolerance that all meet, it ends after one basis and has an answer. The
                # shift is about the Frobenius norm of the Hessian, twice.
                shift = 2 * float(self.product(start).norm()) or 1.0
                found = self._ritz(count, start, width, goal=_ANY, shift=shift, restarts=1)
                vectors = found if len(found) else vectors
            while True:
                trusted = self.products - begun >= LEAST
                pairs = self._measure(vectors, tolerance, exact=False, trusted=trusted)
                pairs.sort(key=lambda pair: pair.value)
                left = limit - (self.products - begun)
                if all(pair.converged for pair in pairs) or left < 2 * widest:
                    return pairs
                goal, shift = self._goal([pair.value for pair in pairs], tolerance)
                restarts = (left - widest - 1) // (widest - count)
                found = self._ritz(count, start, widest, goal=goal, shift=shift, restarts=restarts)
                vectors = _replace(vectors, found)
                start = torch.randn(self.size, generator=generator, dtype=torch.float64)
                start = start.to(self._device)
        except _NotFiniteError:
            nothing = start.new_full((2 * number, self.size), math.nan)
            return self._measure(nothing, tolerance, exact=False, trusted=False)

    def _goal(self, values: Sequence[float], tolerance: float) -> tuple[float, float]:
        """Puts what counts as converged into ARPACK's terms: a residual of goal × |λ + shift|.

        With a shift beyond the spectrum, one residual is asked of all: the smallest that any value
        may have, and half of it. ARPACK knows nothing of rounding; and of values near zero, which
        its relative measure takes for not converged, it would return the neighbours (SciPy 1.17).

        Returns:
            The goal and the shift.
        """
        scale = max(map(abs, values)) or 1.0
        residual = max(tolerance * min(map(abs, values)), self._rounding * scale)
        return residual / 2 / (2 * scale), 2 * scale

    def _ritz(
        self, count: int, start: Tensor, width: int, *, goal: float, shift: float, restarts: int
    ) -> Tensor:
        """Runs ARPACK.

        Returns:
            As rows, the approximate eigenvectors that met the goal: ``count``, or fewer where it
            gave up after so many restarts, of one product a vector of its basis at most.
        """
        from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh

        n = self.size
        # Where a basis is its own image, ARPACK goes on from random vectors. SciPy 1.17 takes their
        # seed; older versions have one generator for the whole process.
        seed: dict[str, Any] = {"rng": 0} if "rng" in signature(eigsh).parameters else {}

        def times(x: _Matrix) -> _Matrix:
            v = torch.from_numpy(x.reshape(n)).to(self._device)
            image = self.product(v) + shift * v
            if not math.isfinite(float(image.norm())):
                raise _NotFiniteError
            return image.cpu().numpy()

        try:
            _, vectors = eigsh(
                LinearOperator((n, n), matvec=times, dtype=np.float64),
                count,
                which="BE",
                v0=start.cpu().numpy(),
                ncv=width,
                maxiter=restarts,
                tol=goal,
                **seed,
            )
        except ArpackNoConvergence as error:
            vectors = error.eigenvectors
        except ArpackError as error:
            raise ModelError(
                f"the search for eigenvalues failed: {one_line(error)}", "Try another --seed"
            ) from error
        except MemoryError as error:
            raise OutOfMemoryError(
                f"{width} vectors of {n:,} weights do not fit into memory",
                "Try fewer tensors with --only",
            ) from error
        return torch.from_numpy(np.ascontiguousarray(vectors.T)).to(self._device)

    def _measure(
        self, vectors: Tensor, tolerance: float, *, exact: bool, trusted: bool
    ) -> list[Eigenpair]:
        """Makes eigenpairs of the rows of a matrix."""
        measured = []
        for vector in vectors.to(torch.float64):
            v = vector / vector.norm()
            v = v * v[v.abs().argmax()].sign()
            image = self.product(v)
            value = v @ image
            measured.append((v, float(value), float((image - value * v).norm())))
        floor = self._rounding * max(abs(value) for _, value, _ in measured)
        pairs = []
        for v, value, residual in measured:
            small = residual <= max(tolerance * abs(value), floor)
            converged = (trusted and small) or (exact and math.isfinite(residual))
            # max(nan, x) is nan, and max(x, nan) is not.
            pairs.append(Eigenpair(value, max(residual, floor), v, converged))
        return pairs

    @property
    def _rounding(self) -> float:
        """The rounding of a product, as a share of the largest |λ|.

        The rounding of a sum of n terms grows as √n ε, not as n ε (Higham & Mary 2019). The longest
        sum is over the weights or over the examples of a batch. Factors in half precision, and in
        TF32, are rounded once, and their products added up in float32.
        """
        objective = self._objective
        factor = torch.finfo(objective.dtype).eps
        if objective.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
            factor = max(factor, 2.0**-10)
        term = min(torch.finfo(objective.dtype).eps, torch.finfo(torch.float32).eps)
        terms = max(self.size, min(objective.batch_size, len(self._split)))
        return max(factor, math.sqrt(terms) * term)

    @cached_property
    def _first(self) -> tuple[float, Tensor]:
        """L and ∇L."""
        reached: set[int] = set()

        def derive(losses: Tensor) -> Tensor:
            gradients = self._differentiate(losses, create_graph=False)
            reached.update(i for i, g in enumerate(gradients) if g is not None)
            total = losses.detach().to(self._device).to(torch.float64).sum()
            return torch.cat([total.view(1), self._flat(gradients)]).unsqueeze(0)

        sums = self._add_up(derive, 1, 1 + self.size)
        self._check_reach([i for i in range(len(self._parameters)) if i not in reached])
        mean = sums[0] / self._weight
        return float(mean[0]), mean[1:]

    def _times(self, vectors: Tensor) -> Tensor:
        """Multiplies the Hessian with the rows of a matrix, ``[K, n]``."""
        # A parameter that no gradient reaches would be flat in every direction.
        _ = self._first
        dtype, device = self._objective.dtype, self._objective.device
        directions = [list(self.named(v.to(dtype).to(device)).values()) for v in vectors]

        def derive(losses: Tensor) -> Tensor:
            gradients = self._differentiate(losses, create_graph=True)
            used = {i: g for i, g in enumerate(gradients) if g is not None}
            sources = list(used.values())
            rows = []
            for k, direction in enumerate(directions):
                parts = self._differentiate_again(
                    sources, [direction[i] for i in used], retain_graph=k < len(directions) - 1
                )
                rows.append(self._flat(parts))
            return torch.stack(rows)

        sums = self._add_up(derive, len(vectors), self.size)
        self.products += len(vectors)
        return sums / self._weight

    def _add_up(self, derive: Callable[[Tensor], Tensor], rows: int, columns: int) -> Tensor:
        """Adds what is derived from the losses of each batch; out of memory, halves the batch."""
        objective = self._objective
        total = torch.zeros(rows, columns, dtype=torch.float64, device=self._device)
        start, weight = 0, 0.0
        while start < len(self._split):
            for batch in objective.batches(self._split.take(slice(start, None))):
                part: Tensor | None = None
                try:
                    with self._differentiable():
                        part, own = self._derived(derive, batch)
                except (torch.OutOfMemoryError, MemoryError):
                    pass
                # Out here the error is gone, and with it the graph that its traceback held.
                if part is None:
                    self._halve_batch()
                    break
                total += part
                weight += own
                start += len(batch)
                if self._progress is not None:
                    self._progress(rows * len(batch) / len(self._split))
        self._weight = weight
        return total

    def _derived(self, derive: Callable[[Tensor], Tensor], batch: Split) -> tuple[Tensor, float]:
        """Derives something from the losses of a batch; and adds up its weights."""
        objective = self._objective
        inputs = objective.data.prepare(batch.inputs, objective.dtype)
        with Elementary():
            outputs = objective.forward(objective.model, inputs)
            losses = objective.per_example(objective.loss, outputs, batch.targets, "loss")
        return derive(losses), objective.weight(outputs, batch.targets)

    def _differentiate(self, losses: Tensor, *, create_graph: bool) -> Sequence[Tensor | None]:
        """Differentiates the sum of some losses with respect to each parameter."""
        if not losses.requires_grad:
            return [None] * len(self._parameters)
        # A function whose derivative does not depend on its argument, as far as autograd sees,
        # enters the graph of the gradient for this factor's sake alone: a fused loss, say, that
        # then tells that it has no second derivative.
        ones = torch.ones_like(losses, requires_grad=create_graph)
        total = (losses * ones).sum(dtype=self._wide)
        try:
            return torch.autograd.grad(
                total, self._parameters, create_graph=create_graph, allow_unused=True
            )
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            raise ModelError(
                f"the loss cannot be differentiated with respect to the weights: {one_line(error)}",
                "Take what has no derivative out of the model's forward, or out of the loss",
            ) from error

    def _differentiate_again(
        self, sources: Sequence[Tensor], direction: Sequence[Tensor], *, retain_graph: bool
    ) -> Sequence[Tensor | None]:
        """Differentiates ⟨∇L, v⟩, with ∇L and v given by their parts."""
        if not sources:
            return [None] * len(self._parameters)
        own = [p.grad for p in self._parameters]
        for p in self._parameters:
            p.grad = None
        try:
            # Not torch.autograd.grad: it leaves out what leads to no parameter, and so the node by
            # which a function tells that it cannot be differentiated twice. Zeros would come back.
            torch.autograd.backward(sources, direction, retain_graph=retain_graph)
            return [p.grad for p in self._parameters]
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            raise ModelError(
                f"the model or its loss has no second derivative: {one_line(error)}",
                "Use operators that can be differentiated twice (attention: the eager kind)",
            ) from error
        finally:
            for p, gradient in zip(self._parameters, own, strict=True):
                p.grad = gradient

    def _flat(self, parts: Sequence[Tensor | None]) -> Tensor:
        """Lays the parts of a vector one after the other; zero where the loss depends on none."""
        flat = [
            torch.zeros(p.numel(), dtype=torch.float64, device=self._device)
            if part is None
            else part.detach().to_dense().reshape(-1).to(self._device).to(torch.float64)
            for part, p in zip(parts, self._parameters, strict=True)
        ]
        return torch.cat(flat)

    def _check_reach(self, unreached: Sequence[int]) -> None:
        """Refuses zeros that are none: the loss depends on a parameter and no gradient says so.

        Weights used under ``no_grad``, detached, or folded into others in eval mode look as flat
        as weights that are not used at all. But these may be moved, and no loss changes.
        """
        if not unreached:
            return
        objective = self._objective
        generator = torch.Generator().manual_seed(0)
        own, moved = {}, {}
        for i in unreached:
            tensor = self._parameters[i].detach()
            noise = torch.randn(tensor.shape, generator=generator).to(tensor)
            size = float(tensor.float().square().mean().sqrt()) or 1.0
            own[self._names[i]] = tensor.clone()
            moved[self._names[i]] = tensor + _NUDGE * size * noise
        name, split = "reach", self._split.first(objective.batch_size)
        before = objective.plain(own, {name: split})[name]
        after = objective.plain(moved, {name: split})[name]
        objective.load(own)
        # A hard choice that weights make, such as a route, changes a few losses: their gradient is
        # zero indeed.
        changed = ~torch.isclose(before.losses, after.losses, rtol=1e-5, atol=1e-7, equal_nan=True)
        if before.weights is not None:
            changed = changed[:, before.weights != 0]
        if 2 * int(changed.sum()) > changed.numel():
            names = list(own)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ModelError(
                f"the loss depends on {', '.join(names[:3])}{more}, but no gradient reaches them: "
                "the model detaches them, or folds them into others in eval mode",
                "Leave them out with --except, or let the model's forward use them",
            )

    def _halve_batch(self) -> None:
        objective = self._objective
        if objective.batch_size == 1:
            raise OutOfMemoryError(
                "the second derivatives of one example do not fit into the memory of "
                f"{objective.device}",
                "Try --device cpu, or fewer tensors with --only",
            )
        objective.batch_size //= 2
        if objective.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def _differentiable(self) -> Iterator[None]:
        """Keeps to operators that can be differentiated twice, also in eval mode."""
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self._objective.computing())
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if self._recurrent:
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            yield


class _NotFiniteError(Exception):
    """Ends a search: a product is not finite."""


def _replace(vectors: Tensor, better: Tensor) -> Tensor:
    """Puts better eigenvectors in place of the rows that are most like them."""
    likeness = (vectors @ better.T).square().sum(1)
    return torch.cat([better, vectors[likeness.argsort()[: max(0, len(vectors) - len(better))]]])


def add_rounding(
    extremes: Extremes,
    objective: Objective,
    precise: Objective | None,
    weights: Weights,
    names: Sequence[str],
    sample: Split,
    *,
    whole: bool,
    seed: int,
) -> Extremes:
    """Adds the rounding of products with the Hessian to the errors of eigenvalues.

    With H the exact Hessian and H' that of the forward type, ‖Hv - λv‖ <= ‖H'v - λv‖ + ‖(H' - H)v‖.
    Where activations cancel, the second term is far above √n ε. It is measured against float64.
    Without that, it is taken from the fourth difference of H'v near the point, which rounding
    changes at random; rounding that is the same at all these points does not show.

    On some of the examples it is not known exactly, and counts twice: rounding that is random is
    smaller on all of them, rounding that is not is the same.

    Args:
        extremes: The eigenvalues, found with products of the forward type.
        objective: Computes in the forward type.
        precise: Computes in float64 what ``objective`` does not, if possible.
        weights: The point: all tensors of the model; they are loaded in the end.
        names: The parameters that are differentiated.
        sample: Some examples.
        whole: Whether these are all examples.
        seed: Of the direction in which points nearby lie.

    Returns:
        The eigenvalues with larger errors.
    """
    pairs = [*extremes.smallest, *extremes.largest]

    def products(objective: Objective, at: Weights) -> Tensor:
        with Curvature(objective, at, names, sample) as curvature:
            return curvature.product(torch.stack([pair.vector for pair in pairs]))

    if precise is None:
        near = nearby(weights, names, objective.dtype, seed)
        off = _scatter([products(objective, at) for at in near])
    else:
        off = (products(objective, weights) - products(precise, weights)).norm(dim=1)
    objective.load(weights)
    off *= 1 if whole else 2
    return extremes.widened(*off.tolist())


def hessian_rounding(
    objective: Objective,
    weights: Weights,
    names: Sequence[str],
    sample: Split,
    *,
    whole: bool,
    seed: int,
) -> float:
    """Estimates how far rounding moves the eigenvalues of a whole Hessian at most.

    No eigenvalue moves by more than ‖E‖₂ <= ‖E‖_F, E = H' - H (Weyl). As E v has a mean square of
    ‖E‖_F² for vectors v of independent standard normal numbers, a few products show it. Their
    rounding is measured as in `add_rounding` without float64.

    Probabilities p of classes are rounded by up to ε whatever p(1 - p) is, and the same nearby
    where they are saturated. So with ∂z/∂θ the Jacobian of the logits, H is known to
    ε ‖∂z/∂θ‖_F² on the mean at best.

    Args:
        objective: Computed the Hessian.
        weights: The point: all tensors of the model; they are loaded in the end.
        names: The parameters that are differentiated.
        sample: Some examples.
        whole: Whether these are all examples.
        seed: Of the vectors, and of the direction in which points nearby lie.

    Returns:
        The bound.
    """
    generator = torch.Generator().manual_seed(seed)
    near: list[Tensor] = []
    saturated = 0.0
    for at in nearby(weights, names, objective.dtype, seed):
        with Curvature(objective, at, names, sample) as curvature:
            if not near:
                shape = _PROBES, curvature.size
                vectors = torch.randn(shape, generator=generator, dtype=torch.float64)
                if sample.has_classes:
                    unit = torch.finfo(objective.dtype).eps
                    saturated = unit * curvature.squared_jacobian(generator)
            near.append(curvature.product(vectors))
    objective.load(weights)
    rounding = float(_scatter(near).square().mean().sqrt())
    return saturated + (rounding if whole else 2 * rounding)


def _scatter(near: Sequence[Tensor]) -> Tensor:
    """Estimates a bound of the rounding of products, ``[K]``, from those at points `nearby`."""
    noise = [noise_of([v[None] for v in row]) for row in zip(*near, strict=True)]
    return _DEVIATIONS * torch.tensor(noise)


def nearby(
    weights: Weights, names: Sequence[str], dtype: torch.dtype, seed: int
) -> Iterator[Weights]:
    """Makes the points between which rounding is measured by its scatter, with `noise_of`.

    Args:
        weights: The point: all tensors of the model.
        names: The parameters that move.
        dtype: The type of the forward pass.
        seed: Of the direction.

    Yields:
        Five evenly spaced points.
    """
    point = {name: weights[name].to(torch.promote_types(dtype, torch.float32)) for name in names}
    way = _step(point, torch.Generator().manual_seed(seed))
    wide = dtype == torch.float64
    step = _SPREAD_IN_FLOAT64 if wide else max(_SPREAD, 4 * torch.finfo(dtype).eps)
    for share in (-1, -0.5, 0, 0.5, 1):
        yield {**weights, **_moved(point, way, share * step)}


def check_derivatives(
    objective: Objective,
    weights: Weights,
    names: Sequence[str],
    sample: Split,
    directions: Mapping[str, Tensor],
    seed: int,
    *,
    twice: bool = True,
) -> str:
    """Compares gradients with differences of the loss, and products with those of gradients.

    The comparison takes place near the point, 1 % of the weights away in a random direction: at
    weights of zero, say, a network has kinks. It is made along each of the directions given and
    along four random ones: an eigenvector of a wrong Hessian may avoid what makes it wrong.

    Args:
        objective: The model, the loss and the data, in float64 where possible.
        weights: The point: all tensors of the model; they are loaded in the end.
        names: The parameters that are differentiated.
        sample: A few examples.
        directions: Vectors ``[n]`` of length one, by what they are called.
        seed: Of the random directions.
        twice: Whether second derivatives are compared too.

    Returns:
        What could not be verified; empty if nothing.

    Raises:
        ModelError: Derivatives contradict differences along two directions or more.
    """
    generator = torch.Generator().manual_seed(seed)
    objective.load(weights)
    first, second = rules(narrowest_type(objective, sample))
    with Curvature(objective, weights, names, sample) as here:
        point = {name: objective.tensors[name].detach().clone() for name in names}
        length = norm(point) or 1.0
        ways = _ways(here, point, directions, generator)

        def gradient(at: Weights) -> Tensor:
            return Curvature(objective, at, names, sample).gradient().unsqueeze(0)

        slopes, bent = _compare_slopes(first, here, point, ways, generator)
        products: list[Comparison] = []
        wrong = []
        verified = are_verified(slopes)
        # Where none is ever found wrong, products could only be verified, and in vain.
        told = twice and len(bent) < NEEDED and (verified or second.wrong < math.inf)
        for name, way, base, flat in _places(here, point, ways, generator) if told else ():
            if name in bent:
                continue
            at = Curvature(objective, base, names, sample)
            product, gradients = at.product(flat), at.gradient()
            size = max(float(gradients.norm()), abs(at.loss) / length)
            one = second.compare(product, size, gradients.unsqueeze(0), _along(gradient, base, way))
            products.append(one)
            if one.limit is not None:
                found, limit = (float(x @ flat) / length**2 for x in (product, one.limit))
                wrong.append(
                    f"{name} is {found:.3g}, but {limit:.3g} by differences of the gradient"
                )
            if second.decides(products, len(ways) - len(bent) - len(products)):
                break
        if len(wrong) >= NEEDED:
            _, bent = _compare_slopes(finer(first), here, point, ways, generator)
    objective.load(weights)
    if len(bent) >= NEEDED:
        raise ModelError(
            f"{DETACHED}: slope along {next(iter(bent.values()))}",
            f"{CURE}, or leave out with --except the tensors that they affect",
        )
    if len(wrong) >= NEEDED:
        raise ModelError(
            f"the second derivative is wrong: curvature along {wrong[0]}",
            "Write operators with a backward of their own in elementary ones",
        )
    if not verified:
        return unverified("gradient and Hessian" if twice else "gradient", "loss")
    return "" if not twice or are_verified(products) else unverified("Hessian", "gradient")


def _compare_slopes(
    rule: Differences,
    here: Curvature,
    point: Weights,
    ways: Mapping[str, Weights],
    generator: torch.Generator,
) -> tuple[Sequence[Comparison], dict[str, str]]:
    """Compares gradients with differences of the loss along as many directions as decide.

    Returns:
        What the differences say; and by the names of directions, how a slope is wrong.
    """
    objective, sample = here._objective, here._split
    length = norm(point) or 1.0

    def losses(at: Weights) -> Tensor:
        return objective.plain(at, {"": sample})[""].losses[0]

    slopes: list[Comparison] = []
    wrong = {}
    for name, way, base, flat in _places(here, point, ways, generator):
        at = Curvature(objective, base, here._names, sample)
        slope, size = at.gradient() @ flat, abs(at.loss)
        one = rule.compare(slope.cpu(), size, losses(base), _along(losses, base, way))
        slopes.append(one)
        if one.limit is not None:
            found, limit = (float(x) / length for x in (slope, one.limit))
            wrong[name] = f"{name} is {found:.3g}, but {limit:.3g} by differences of the loss"
        if rule.decides(slopes, len(ways) - len(slopes)):
            break
    return slopes, wrong


def _along(
    function: Callable[[Weights], Tensor], base: Weights, way: Weights
) -> Callable[[float], Tensor]:
    return lambda step: function(_moved(base, way, step))


def _ways(
    here: Curvature, point: Weights, directions: Mapping[str, Tensor], generator: torch.Generator
) -> dict[str, Weights]:
    """Makes steps as long as the weights: along the directions given, and at random."""
    length = norm(point) or 1.0
    ways: dict[str, Weights] = {
        f"the eigenvector of {name}": {n: t.to(point[n]) * length for n, t in here.named(v).items()}
        for name, v in directions.items()
        if bool(v.isfinite().all())
    }
    return ways | {f"random direction {k + 1}": _step(point, generator) for k in range(POINTS)}


def _places(
    here: Curvature, point: Weights, ways: Mapping[str, Weights], generator: torch.Generator
) -> Iterator[tuple[str, Weights, Weights, Tensor]]:
    """Chooses where to compare along each direction, the same places each time.

    Yields:
        The name of the direction, the direction, the place, and the direction as ``[n]``.
    """
    again = torch.Generator()
    again.set_state(generator.get_state())
    for name, way in ways.items():
        base = _moved(point, _step(point, again), _AWAY)
        flat = torch.cat([t.reshape(-1).double() for t in way.values()])
        yield name, way, base, flat.to(here._device)


def _step(point: Weights, generator: torch.Generator) -> dict[str, Tensor]:
    """Makes a random step as long as the weights, in proportion to the size of each tensor."""
    length = norm(point) or 1.0
    typical = length / math.sqrt(sum(t.numel() for t in point.values()))
    steps = {
        name: torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)
        * (norm({name: t}) / math.sqrt(t.numel()) or typical)
        for name, t in point.items()
        if t.numel()
    }
    return {name: step * (length / (norm(steps) or 1.0)) for name, step in steps.items()}


def _moved(base: Weights, way: Weights, step: float) -> Weights:
    return {name: base[name] + step * t for name, t in way.items()}


def verdict(
    gradient_norm: float, tolerance: float, smallest: Eigenpair, largest: Eigenpair
) -> Verdict:
    """Says what a point of weight space is by its gradient and its eigenvalues alone.

    `losscli.evaluation.critical_points` asks for more: that the loss falls to both sides of a
    saddle, and that a minimum is critical to the accuracy of the loss.

    - ``not critical``: ‖∇L‖ > tolerance. The eigenvalues then say nothing about an extremum.
    - ``saddle``: critical, and λ_min + error < 0: a direction of negative curvature exists, for
      vᵀHv = λ_min is negative beyond its error, whether the search converged or not. This is the
      strict saddle of Lee et al. (2016, arXiv 1602.04915): no λ > 0 is claimed, and a maximum
      that could not be shown to be one is among them.
    - ``maximum``: critical, and λ_max + error < 0 with λ_max converged.
    - ``minimum``: critical, and λ_min − error > 0 with λ_min converged. That no smaller eigenvalue
      exists is certain where the whole Hessian was decomposed. From a search it holds as far as
      the search, from a random start, has met every extreme direction: the residual says only
      that some eigenvalue is near.
    - ``undecided``: all else, and whatever has a nan in it.

    Args:
        gradient_norm: ‖∇L‖.
        tolerance: Up to which gradient norm a point is critical.
        smallest: λ_min.
        largest: λ_max.

    Returns:
        The verdict.
    """
    figures = gradient_norm, tolerance, smallest.value, smallest.error, largest.value, largest.error
    if any(map(math.isnan, figures)):
        return "undecided"
    if gradient_norm > tolerance:
        return "not critical"
    if largest.converged and largest.value + largest.error < 0:
        return "maximum"
    if smallest.value + smallest.error < 0:
        return "saddle"
    if smallest.converged and smallest.value - smallest.error > 0:
        return "minimum"
    return "undecided"
