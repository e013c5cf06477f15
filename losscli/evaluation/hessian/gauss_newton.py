"""Products with the generalised Gauss-Newton matrix of the mean loss at one point."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from losscli.data import Nest
from losscli.errors import UsageError
from losscli.evaluation.forward import Samples, is_registered, scores_in
from losscli.evaluation.hessian.curvature import Curvature
from losscli.evaluation.losses.torch_losses import TorchLoss
from losscli.evaluation.objective import Objective
from losscli.settings import describe

__all__ = ["GaussNewton", "check_outputs"]


def check_outputs(objective: Objective) -> None:
    """Checks on a first batch that the model returns one tensor, as `GaussNewton` needs.

    Raises:
        UsageError: It returns something else, or the loss is not a function of outputs.
    """
    if objective.function is not None:
        raise UsageError(
            "--operator ggn needs a loss of outputs, and --objective is a function of the model",
            "Take --operator hessian",
        )
    if objective.seeds and not (
        is_registered(objective.loss) or isinstance(objective.loss, TorchLoss)
    ):
        raise UsageError(
            "--operator ggn with --stochastic needs a loss of losscli or of torch, which draws no "
            "random numbers",
            "Take --operator hessian",
        )
    batch = next(iter(objective.first_batches().values()))
    with torch.no_grad():
        inputs = objective.prepare(batch)
        outputs = scores_in(objective.forward(objective.model, inputs))
    if not isinstance(outputs, Tensor):
        raise UsageError(
            "--operator ggn needs one tensor of outputs, and the model returns "
            f"{describe(outputs)}",
            "Take --operator hessian",
        )


class GaussNewton(Curvature):
    """The generalised Gauss-Newton matrix of the mean loss of a split at one point.

    G = mean of Jᵀ (∂²l/∂z²) J over the examples, with l the loss as a function of the outputs z of
    the model, and J = ∂z/∂θ (Schraudolph 2002, "Fast curvature matrix-vector products"). It is the
    Hessian without the curvature of the model, and positive semidefinite if l is convex in z.

    G is the Hessian at θ of the quadratic form ½ rᵀ (∂²l/∂z²) r, with r = z − z(θ), so products and
    eigenvalues are computed as those of a Hessian. The form and its gradient are 0 at θ, and so are
    ``loss`` and ``gradient()``.

    It has the arguments of `Curvature`, with an objective that `check_outputs` accepts.
    """

    def _losses(self, outputs: Any, targets: Nest) -> Tensor:
        """Computes ½ rᵀ (∂²l/∂z²) r of each example, the mean over seeds if there are any."""
        samples = outputs.outputs if isinstance(outputs, Samples) else (outputs,)
        return torch.stack([self._forms(scores_in(z), targets) for z in samples]).mean(0)

    def _forms(self, outputs: Tensor, targets: Nest) -> Tensor:
        with torch.enable_grad():
            z = outputs.detach().requires_grad_()
            losses = super()._losses(z, targets)
            # A loss that is linear in z has a constant slope: this factor puts it into the graph.
            ones = torch.ones_like(losses, requires_grad=True)
            (slope,) = torch.autograd.grad((losses * ones).sum(), z, create_graph=True)
            r = outputs - outputs.detach()
            (image,) = torch.autograd.grad(slope, z, r, create_graph=True, materialize_grads=True)
            forms: Tensor = (r * image).flatten(1).sum(1) / 2
            if self.objective.batch_loss:
                forms = forms.sum(0, keepdim=True)
            return forms.to(losses.dtype)
