"""Gradient, Hessian-vector products and eigenvalues of the mean loss at one point."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from losscli.data import Examples, Nest, Split, allocations, leaves
from losscli.errors import ModelError, UsageError, one_line
from losscli.evaluation.decompositions import Decomposed
from losscli.evaluation.device import without_cudnn
from losscli.evaluation.hessian.eigenvalues import DenseHessian, Extremes, eigenpairs
from losscli.evaluation.hessian.gradient_graphs import (
    GradientGraphs,
    Gradients,
    graph_budget,
    graph_bytes,
)
from losscli.evaluation.hessian.lanczos import LanczosSearch
from losscli.evaluation.memory import halve_batch
from losscli.evaluation.objective import AGREEMENT, Objective, Progress, is_close
from losscli.weight_space.vectors import Weights, norm, unflatten
from losscli.wording import list_first

__all__ = ["DENSE_LIMIT", "PRODUCT_LIMIT", "ROWS_PER_PASS", "Curvature"]

_T = TypeVar("_T")

DENSE_LIMIT = 1000
"""The most parameters for which the whole Hessian is computed."""

PRODUCT_LIMIT = 1000
"""About how many Hessian-vector products a search for eigenvalues may take."""

ROWS_PER_PASS = 16
"""Rows of a whole Hessian that are computed from one gradient graph of each batch."""

# Up to this size the whole Hessian takes no more products than a search.
_SMALL = 64

# By how much parameters without a gradient are moved, as a share of their root mean square.
_NUDGE = 1 / 16


class Curvature:
    """The first and second derivatives of the mean loss of a split at one point.

    The model is in eval mode, so that BatchNorm uses its running statistics. Derivatives are taken
    batch by batch in the forward type and summed in float64; if memory runs out, the objective's
    batch is halved. From the third product on, the gradients of the first batches are kept with
    their graphs. As a context manager it frees these and restores the parameters'
    ``requires_grad``; the weights stay loaded.

    Args:
        objective: The model, loss and data, checked by ``Objective.check``.
        weights: The point: all tensors of the model.
        names: The parameters to differentiate, each tied parameter under one name. Vectors ``[n]``
            hold them in this order.
        split: The examples.
        progress: Called with the share of a gradient or product done since the last call.
        budget: The most bytes of the graphs that are kept; None chooses for the device.

    Attributes:
        objective, names, split: The arguments.
        device: The device of vectors: the objective's, or the CPU if that has no float64.
        size: n, the number of differentiated weights.
        products: Hessian-vector products made so far.
    """

    def __init__(
        self,
        objective: Objective,
        weights: Weights,
        names: Sequence[str],
        split: Examples,
        progress: Progress | None = None,
        budget: int | None = None,
    ) -> None:
        self.objective = objective
        self.names = list(names)
        self._parameters = [objective.tensors[name] for name in names]
        self.split = split
        self._progress = progress
        # MPS has no float64.
        mps = objective.device.type == "mps"
        self.device = torch.device("cpu") if mps else objective.device
        self._wide = torch.float32 if mps else torch.float64
        self._weight = 0.0
        self._dense: DenseHessian | None = None
        self._budget = budget
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
        self.graphs.release()
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)

    @cached_property
    def graphs(self) -> GradientGraphs:
        """The gradients that are kept with their graphs."""
        device, budget = self.objective.device, self._budget
        threads = torch.get_num_threads() if device.type == "cpu" else 1
        budget = graph_budget(device) if budget is None else budget
        return GradientGraphs(list(self.objective.tensors.values()), budget, threads)

    @property
    def loss(self) -> float:
        """L, the mean loss over all examples of the split."""
        return self._loss_and_gradient[0]

    def gradient(self) -> Tensor:
        """Computes ∇L, once.

        Returns:
            ``[n]``, float64, on the objective's device, or on the CPU if that has no float64.
        """
        return self._loss_and_gradient[1]

    def product(self, v: Tensor) -> Tensor:
        """Multiplies the Hessian with a vector by differentiating twice (Pearlmutter 1994).

        H v = ∇⟨∇L, v⟩. If the gradient is constant, as that of a loss piecewise linear in the
        weights, the product is zero.

        Args:
            v: ``[n]``, or several as ``[K, n]``; float64, rounded to the forward type.

        Returns:
            H v, of the same shape, float64, on the device of the gradient.
        """
        return self._products(v.view(-1, self.size)).view_as(v)

    def squared_jacobian(self, generator: torch.Generator) -> float:
        """Estimates the mean over the examples of ‖∂z/∂θ‖_F², with z the outputs of the model.

        It equals the expectation of ‖∂⟨z, s⟩/∂θ‖² over random signs s (Hutchinson).

        Args:
            generator: Draws the signs.

        Returns:
            The estimate; 0 if the outputs are not a tensor that depends on the weights.
        """
        objective, total = self.objective, 0.0
        for batch in objective.batches(self.split):
            inputs = objective.prepare(batch)
            with self._differentiable():
                outputs = objective.forward(objective.model, inputs)
                if not (isinstance(outputs, Tensor) and outputs.requires_grad):
                    return 0.0
                signs = torch.randint(2, outputs.shape, generator=generator) * 2 - 1
                along = (outputs * signs.to(outputs)).sum()
                parts = torch.autograd.grad(along, self._parameters, allow_unused=True)
            total += float(self._flat(parts).square().sum())
        return total / self.split.rows

    def named(self, v: Tensor) -> dict[str, Tensor]:
        """Splits a vector ``[n]`` into views with the shapes of the parameters."""
        return unflatten(v, self.objective.tensors, self.names)

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
                f"the Hessian of {self.size:,} parameters is too large to be computed as a whole",
                f"Choose {DENSE_LIMIT:,} or fewer with --only",
            )
        if self._dense is None:
            identity = torch.eye(self.size, dtype=torch.float64)
            passes = torch.split(identity, ROWS_PER_PASS)
            rows = torch.cat([self._products(part).cpu() for part in passes])
            point = {name: self.objective.tensors[name].detach() for name in self.names}
            size = abs(self.loss) / (norm(point) ** 2 or 1.0)
            self._dense = DenseHessian.decompose(rows.numpy(), self._rounding, size)
        return self._dense

    def extremes(
        self, number: int, *, tolerance: float, seed: int, limit: int = PRODUCT_LIMIT
    ) -> Extremes:
        """Finds the smallest and the largest eigenvalues, by value and not by magnitude.

        A small Hessian, or one that ``dense`` has computed, is decomposed. Otherwise
        `LanczosSearch` searches for both ends at once.

        The values reported are vᵀHv and ‖Hv − λv‖ from one more product per pair. A Ritz value
        never lies outside the spectrum: the smallest is an upper bound of λ_min. In principle, a
        search from a random start that has converged may still have missed a smaller eigenvalue,
        or further vectors of a multiple one.

        Args:
            number: How many at each end; all of them if there are fewer.
            tolerance: A pair has converged if ‖Hv − λv‖ is at most this share of |λ|, or the
                rounding of the forward type, after 50 products or more.
            seed: Of the start; the same seed gives the same numbers.
            limit: Products after which the search ends, not counting those that measure.

        Returns:
            The two ends; pairs of nan if H is not finite.

        Raises:
            UsageError: ``number`` or ``limit`` is below 1.
        """
        if number < 1 or limit < 1:
            raise UsageError(
                f"{number} eigenvalues and {limit} products were requested",
                "Give 1 or more of each",
            )
        before = self.products
        number = min(number, self.size)
        exact = self._dense is not None or self.size <= max(_SMALL, 4 * number)
        if exact:
            vectors = torch.from_numpy(self.dense().eigenvectors.T).to(self.device)
            if 2 * number < len(vectors):
                vectors = torch.cat([vectors[:number], vectors[-number:]])
            pairs = eigenpairs(
                self.product, vectors, tolerance, self._rounding, exact=True, trusted=True
            )
        else:
            search = LanczosSearch(
                self.product,
                self.size,
                self.device,
                rounding=self._rounding,
                tolerance=tolerance,
                limit=limit,
            )
            pairs = search.run(number, seed)
            number = min(number, max(1, len(pairs) // 2))
        smallest, largest = tuple(pairs[:number]), tuple(pairs[::-1][:number])
        return Extremes(smallest, largest, self.products - before, exact)

    @property
    def _rounding(self) -> float:
        """The rounding of a product, relative to the largest |λ|.

        The rounding of a sum of n terms grows as √n ε, not as n ε (Higham & Mary 2019). The longest
        sum is over the weights or over the examples of a batch. Factors in half precision and in
        TF32 are rounded once, and their products are summed in float32.
        """
        objective = self.objective
        factor = torch.finfo(objective.factor_type).eps
        term = min(torch.finfo(objective.dtype).eps, torch.finfo(torch.float32).eps)
        batch = min(objective.batch_size, len(self.split)) * self.split.rows // len(self.split)
        terms = max(self.size, batch)
        return max(factor, math.sqrt(terms) * term)

    @cached_property
    def _loss_and_gradient(self) -> tuple[float, Tensor]:
        """The mean loss L and its gradient ∇L."""
        reached: set[int] = set()

        def derive(losses: Tensor) -> Tensor:
            gradients = self._differentiate(losses, create_graph=False)
            reached.update(i for i, g in enumerate(gradients) if g is not None)
            total = losses.detach().to(self.device).to(torch.float64).sum()
            return torch.cat([total.view(1), *self._flat_parts(gradients)]).unsqueeze(0)

        sums = torch.zeros(1, 1 + self.size, dtype=torch.float64, device=self.device)
        self._weight = self._add_up(derive, sums)
        self._check_unreached([i for i in range(len(self._parameters)) if i not in reached])
        mean = sums[0].div_(self._weight)
        return float(mean[0]), mean[1:]

    def _products(self, vectors: Tensor) -> Tensor:
        """Multiplies the Hessian with the rows of a matrix, ``[K, n]``."""
        # Checks that the gradient reaches every parameter: otherwise rows of H would be zero.
        _ = self._loss_and_gradient
        dtype, device = self.objective.dtype, self.objective.device
        directions = [list(self.named(v.to(dtype).to(device)).values()) for v in vectors]
        graphs, fresh = self.graphs, torch.zeros(self.size, dtype=torch.float64, device=self.device)

        def derive(losses: Tensor) -> Tensor:
            gradients = self._gradients(losses)
            keeps = graphs.has_room
            rows = self._rows(gradients, directions, self._differentiate_again, keeps=keeps)
            if keeps:
                graphs.batches.append((len(losses), gradients))
                fresh.add_(rows[0])
            return rows

        with self._differentiable():
            graphs.begin(self._graph_bytes)
            sums = self._multiply_kept(directions)
            known = graphs.examples
            self._report(len(vectors) * known)
            self._add_up(derive, sums, known)
            if graphs.examples > known:
                # Passes after that of a batch may have changed tensors that its graph holds.
                again = self._multiply_kept(directions[:1])[0]
                if not is_close(again, fresh, AGREEMENT[self.objective.precision]):
                    graphs.release()
        self.products += len(vectors)
        return sums / self._weight

    def _multiply_kept(self, directions: Sequence[Sequence[Tensor]]) -> Tensor:
        """Sums the products of the kept gradients; if that fails, frees them and returns zeros."""
        shape = len(directions), self.size
        sums = torch.zeros(shape, dtype=torch.float64, device=self.device)

        def multiply(gradients: Gradients) -> Tensor:
            # Modes apply to one thread only.
            with self._differentiable():
                return self._rows(gradients, directions, self._differentiate_kept, keeps=True)

        try:
            for rows in self.graphs.map(multiply):
                sums += rows
        except (RuntimeError, MemoryError):
            self.graphs.release()
            sums.zero_()
        return sums

    def _graph_bytes(self) -> int:
        """Measures the memory of the graph of the first batch."""
        batch = self.split.first(self.objective.batch_size).to(self.objective.device)
        known = [*self.objective.tensors.values(), *leaves([batch.inputs, batch.targets])]
        try:
            return graph_bytes(lambda: self._derive_batch(self._gradients, batch)[0], known)
        except (torch.OutOfMemoryError, MemoryError):
            self.graphs.release()
            return 0

    def _gradients(self, losses: Tensor) -> Gradients:
        """Differentiates the sum of some losses, with a graph."""
        gradients = self._differentiate(losses, create_graph=True)
        return {i: g for i, g in enumerate(gradients) if g is not None}

    def _rows(
        self,
        gradients: Gradients,
        directions: Sequence[Sequence[Tensor]],
        differentiate: Callable[[Sequence[Tensor], bool], Sequence[Tensor | None]],
        *,
        keeps: bool,
    ) -> Tensor:
        """Multiplies the Hessian of a batch with vectors, ``[K, n]``; may keep the graph."""
        rows = []
        for k, direction in enumerate(directions):
            # ⟨∇L, v⟩, and not ∇L with the argument v: for that PyTorch imports SymPy.
            along = [(part * direction[i]).sum() for i, part in gradients.items()]
            retains = keeps or k < len(directions) - 1
            parts = differentiate(along, retains) if along else [None] * len(direction)
            rows.append(self._flat(parts))
        return torch.stack(rows)

    def _add_up(self, derive: Callable[[Tensor], Tensor], total: Tensor, start: int = 0) -> float:
        """Adds a derivative over all batches from a position on; if memory runs out, halves them.

        Returns:
            The sum of the weights of these examples.
        """
        objective, weight = self.objective, 0.0
        while start < len(self.split):
            for batch in objective.batches(self.split.take(slice(start, None))):
                part: Tensor | None = None
                try:
                    with self._differentiable():
                        part, batch_weight = self._derive_batch(derive, batch)
                except (torch.OutOfMemoryError, MemoryError):
                    pass
                # Outside of the handler the error is freed, and with it the graph in its traceback.
                if part is None:
                    if not self.graphs.release():
                        cure = "fewer tensors with --only"
                        halve_batch(objective, "the second derivatives of", cure)
                    break
                total += part
                weight += batch_weight
                start += len(batch)
                self._report(len(total) * len(batch))
        return weight

    def _losses(self, outputs: Any, targets: Nest) -> Tensor:
        """Computes the losses of a batch, ``[B]``, which are differentiated."""
        return self.objective.per_example(self.objective.loss, outputs, targets, "loss")

    def _report(self, examples: int) -> None:
        if self._progress is not None and examples:
            self._progress(examples / len(self.split))

    def _derive_batch(self, derive: Callable[[Tensor], _T], batch: Split) -> tuple[_T, float]:
        """Differentiates the losses of a batch; returns also the sum of its example weights."""
        objective = self.objective
        inputs = objective.prepare(batch)
        with Decomposed():
            outputs = objective.forward(objective.model, inputs)
            losses = self._losses(outputs, batch.targets)
        return derive(losses), objective.weight(outputs, batch.targets)

    def _differentiate(self, losses: Tensor, *, create_graph: bool) -> Sequence[Tensor | None]:
        """Differentiates the sum of some losses with respect to each parameter."""
        if not losses.requires_grad:
            return [None] * len(self._parameters)
        # A function with a derivative that is constant to autograd, such as a fused loss, enters
        # the graph of the gradient only because of this factor. It then raises that it has no
        # second derivative.
        ones = torch.ones_like(losses, requires_grad=create_graph)
        total = (losses * ones).sum(dtype=self._wide)
        try:
            with allocations():
                return torch.autograd.grad(
                    total, self._parameters, create_graph=create_graph, allow_unused=True
                )
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            raise ModelError(
                f"the loss cannot be differentiated with respect to the weights: {one_line(error)}",
                "Remove operations without a derivative from the model's forward or from the loss",
            ) from error

    def _differentiate_again(
        self, along: Sequence[Tensor], retains: bool
    ) -> Sequence[Tensor | None]:
        """Differentiates ⟨∇L, v⟩, given in parts."""
        own = [p.grad for p in self._parameters]
        for p in self._parameters:
            p.grad = None
        try:
            # Not torch.autograd.grad: it prunes nodes that lead to no parameter, and with them the
            # node that raises if a function cannot be differentiated twice. It would return zeros.
            with allocations():
                torch.autograd.backward(along, retain_graph=retains)
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

    def _differentiate_kept(
        self, along: Sequence[Tensor], retains: bool
    ) -> Sequence[Tensor | None]:
        """Differentiates ⟨∇L, v⟩ with a graph that `_differentiate_again` accepted; thread-safe."""
        parts: Sequence[Tensor | None] = torch.autograd.grad(
            along, self._parameters, retain_graph=retains, allow_unused=True
        )
        return parts

    def _flat(self, parts: Sequence[Tensor | None]) -> Tensor:
        """Concatenates the parts of a vector; zeros where a part is None."""
        return torch.cat([*self._flat_parts(parts)])

    def _flat_parts(self, parts: Sequence[Tensor | None]) -> Iterator[Tensor]:
        return (
            torch.zeros(p.numel(), dtype=torch.float64, device=self.device)
            if part is None
            else part.detach().to_dense().reshape(-1).to(self.device).to(torch.float64)
            for part, p in zip(parts, self._parameters, strict=True)
        )

    def _check_unreached(self, unreached: Sequence[int]) -> None:
        """Refuses parameters that the loss depends on without a gradient.

        To autograd, weights used under ``no_grad``, detached, or folded into others in eval mode
        look like unused weights. So these parameters are moved: unused ones change no loss.
        """
        if not unreached:
            return
        objective = self.objective
        generator = torch.Generator().manual_seed(0)
        own, moved = {}, {}
        for i in unreached:
            tensor = self._parameters[i].detach()
            noise = torch.randn(tensor.shape, generator=generator).to(tensor)
            size = float(tensor.float().square().mean().sqrt()) or 1.0
            own[self.names[i]] = tensor.clone()
            moved[self.names[i]] = tensor + _NUDGE * size * noise
        name, split = "reach", self.split.first(objective.batch_size)
        before = objective.plain(own, {name: split})[name]
        after = objective.plain(moved, {name: split})[name]
        objective.load(own)
        # A discrete choice that depends on weights, such as routing, changes a few losses, and its
        # gradient is truly zero.
        changed = ~torch.isclose(before.losses, after.losses, rtol=1e-5, atol=1e-7, equal_nan=True)
        if before.weights is not None:
            changed = changed[:, before.weights != 0]
        if 2 * int(changed.sum()) > changed.numel():
            raise ModelError(
                f"the loss depends on {list_first([*own], 3)}, but no gradient reaches them: the "
                "model detaches them, or folds them into others in eval mode",
                "Leave them out with --except, or let the model's forward use them",
            )

    @contextmanager
    def _differentiable(self) -> Iterator[None]:
        """Uses operators that can be differentiated twice, also in eval mode."""
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self.objective.computing())
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if self._recurrent:
                stack.enter_context(without_cudnn())
            yield
