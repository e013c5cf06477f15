"""What a user could write or pick: each takes the same work and returns the mean losses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from losscli.data import DataSet, Split
from losscli.evaluation.losses.built_in import cross_entropy
from losscli.evaluation.objective import Objective
from losscli.evaluation.sweep import sweep
from losscli.weight_space.slices import Line


@dataclass(frozen=True)
class Work:
    """A line to evaluate: a model, its two ends, a data set on its device, and the points.

    ``batch`` is that of the loop written by hand, ``sharing_batch`` that of the one which shares
    the first layer.
    """

    build: Callable[[], nn.Module]
    a: dict[str, Tensor]
    b: dict[str, Tensor]
    inputs: Tensor
    targets: Tensor
    alphas: Sequence[float]
    batch: int = 1000
    sharing_batch: int = 2048

    @property
    def device(self) -> torch.device:
        return self.inputs.device

    @property
    def points(self) -> int:
        return len(self.alphas)


def losscli(work: Work, dtype: torch.dtype = torch.float32) -> list[float]:
    data = DataSet({"all": Split(work.inputs, work.targets)})
    model = work.build().to(work.device)
    objective = Objective(model, cross_entropy, {}, data, device=work.device, dtype=dtype)
    objective.load(work.a)
    names = [n for n, t in work.a.items() if t.is_floating_point()]
    line = Line(*({n: end[n] for n in names} for end in (work.a, work.b)))
    found = sweep(objective, line, [(x,) for x in work.alphas])["all"].losses
    means: list[float] = found.double().mean(1).tolist()
    return means


def losscli_bfloat16(work: Work) -> list[float]:
    return losscli(work, torch.bfloat16)


@torch.no_grad()
def by_hand(work: Work) -> list[float]:
    """The loop of somebody who knows PyTorch well.

    Data resident on the device, weights moved in place by one fused call, buffers too, one
    synchronisation a point.
    """
    model = work.build().to(work.device).eval()
    names = [n for n, t in work.a.items() if t.is_floating_point()]
    tensors = [model.state_dict()[n] for n in names]
    a, b = ([end[n] for n in names] for end in (work.a, work.b))
    found = []
    for alpha in work.alphas:
        torch._foreach_copy_(tensors, a)
        torch._foreach_lerp_(tensors, b, alpha)
        total = torch.zeros((), dtype=torch.float64, device=work.device)
        for start in range(0, len(work.targets), work.batch):
            outputs = model(work.inputs[start : start + work.batch])
            targets = work.targets[start : start + work.batch]
            total += F.cross_entropy(outputs, targets, reduction="sum")
        found.append(total.item() / work.targets.numel())
    return found


@torch.no_grad()
def sharing_by_hand(work: Work) -> list[float]:
    """The fastest loop by hand for a perceptron: its first layer is computed once for all points.

    The input does not depend on α and a linear layer is affine in its weights, so the layer's
    output at a point lies between its outputs at the two ends.
    """
    *hidden, last = zip(
        *[iter(zip(work.a.values(), work.b.values(), strict=True))] * 2, strict=True
    )
    (weights, biases), *hidden = hidden
    totals = torch.zeros(len(work.alphas), dtype=torch.float64, device=work.device)
    for start in range(0, len(work.targets), work.sharing_batch):
        inputs = work.inputs[start : start + work.sharing_batch]
        targets = work.targets[start : start + work.sharing_batch]
        low, high = (F.linear(inputs, w, b) for w, b in zip(weights, biases, strict=True))
        for p, alpha in enumerate(work.alphas):
            x = torch.lerp(low, high, alpha).relu_()
            for weight, bias in hidden:
                x = F.linear(x, torch.lerp(*weight, alpha), torch.lerp(*bias, alpha)).relu_()
            outputs = F.linear(x, *(torch.lerp(*ends, alpha) for ends in last))
            totals[p] += F.cross_entropy(outputs, targets, reduction="sum")
    means: list[float] = (totals / work.targets.numel()).tolist()
    return means


def loss_landscape_3d(work: Work) -> list[float]:
    """loss-landscape-3d with a DataLoader of 128."""
    from loss_landscape_3d import LossLandscapeCalculator
    from torch.utils.data import DataLoader, TensorDataset

    loader = DataLoader(TensorDataset(work.inputs.cpu(), work.targets.cpu()), batch_size=128)
    model = work.build().to(work.device)
    calculator = LossLandscapeCalculator(model, loader, nn.CrossEntropyLoss())
    return [float(x) for x in calculator.calculate_1d_path(work.alphas, work.a, work.b)]


def loss_landscapes(work: Work) -> list[float]:
    """loss-landscapes with all examples in one batch.

    It leaves out the first of its points and moves no buffers, so its ends are chosen such that
    it does the same amount of work on the same line; only for models without buffers are its
    numbers those of the others.
    """
    from loss_landscapes import linear_interpolation
    from loss_landscapes.metrics import Loss

    points = len(work.alphas)
    low, high = work.alphas[0], work.alphas[-1]
    before = low - (high - low) / (points - 1)
    ends = []
    for alpha in (before, high):
        model = work.build().to(work.device).eval()
        state = {n: t + alpha * (work.b[n] - t) for n, t in work.a.items()}
        model.load_state_dict(state)
        ends.append(copy.deepcopy(model))
    metric = Loss(F.cross_entropy, work.inputs, work.targets)
    with torch.no_grad():
        return [float(x) for x in linear_interpolation(*ends, metric, points)]
