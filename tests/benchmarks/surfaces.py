"""Surfaces of the loss: planes and ribbons, by losscli, a loop by hand and another tool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from losscli.data import DataSet, Split
from losscli.evaluation.losses.built_in import cross_entropy
from losscli.evaluation.objective import Objective
from losscli.evaluation.sweep import sweep
from losscli.models import MLP
from losscli.weight_space.slices import Line, Slice, Span

_State = dict[str, Tensor]

_SIDE = 7  # points of a side


@dataclass(frozen=True)
class Sheet:
    """The points O + x u + y v of a part of a surface."""

    origin: _State
    first: _State
    second: _State
    xs: Sequence[float]
    ys: Sequence[float]


@dataclass(frozen=True)
class Surface:
    """A surface to evaluate: a plane is one sheet, a ribbon one of a single x for each step."""

    build: Callable[[], nn.Module]
    sheets: Sequence[Sheet]
    inputs: Tensor
    targets: Tensor
    batch: int = 1000

    @property
    def points(self) -> int:
        return sum(len(sheet.xs) * len(sheet.ys) for sheet in self.sheets)


def plane(device: torch.device) -> Surface:
    """Two random directions at one checkpoint."""
    side = torch.linspace(-1, 1, _SIDE, dtype=torch.float64).tolist()
    return _surface(device, [Sheet(*_states(3, device), side, side)])


def ribbon(device: torch.device) -> Surface:
    """Across a path of checkpoints, at each along the direction of its residual."""
    side = torch.linspace(-1, 1, _SIDE, dtype=torch.float64).tolist()
    origins, directions = _states(_SIDE, device), _states(_SIDE, device)
    still = {name: torch.zeros_like(tensor) for name, tensor in origins[0].items()}
    sheets = [
        Sheet(origin, still, v, [0.0], side) for origin, v in zip(origins, directions, strict=True)
    ]
    return _surface(device, sheets)


def losscli(work: Surface) -> list[float]:
    """As `losscli plane` and `losscli trajectory` do."""
    data = DataSet({"all": Split(work.inputs, work.targets)})
    device = work.inputs.device
    objective = Objective(work.build().to(device), cross_entropy, {}, data, device=device)
    losses: list[float] = []
    for sheet in work.sheets:
        objective.load(sheet.origin)
        points: list[tuple[float, ...]]
        if len(sheet.xs) > 1:
            slice_: Slice = Span(sheet.origin, sheet.first, sheet.second)
            points = [(x, y) for x in sheet.xs for y in sheet.ys]
        else:
            ends = (
                {n: t + sign * sheet.second[n] for n, t in sheet.origin.items()} for sign in (-1, 1)
            )
            slice_ = Line(*ends)
            points = [((1 + y) / 2,) for y in sheet.ys]
        found = sweep(objective, slice_, points)["all"].losses
        losses += found.double().mean(1).tolist()
    return losses


@torch.no_grad()
def by_hand(work: Surface) -> list[float]:
    """The loop of somebody who knows PyTorch well, as for a line."""
    model = work.build().to(work.inputs.device).eval()
    losses = []
    for sheet in work.sheets:
        tensors = [model.state_dict()[name] for name in sheet.origin]
        origin, first, second = map(_tensors, (sheet.origin, sheet.first, sheet.second))
        for x in sheet.xs:
            for y in sheet.ys:
                torch._foreach_copy_(tensors, origin)
                torch._foreach_add_(tensors, first, alpha=x)
                torch._foreach_add_(tensors, second, alpha=y)
                total = torch.zeros((), dtype=torch.float64, device=work.inputs.device)
                for start in range(0, len(work.targets), work.batch):
                    outputs = model(work.inputs[start : start + work.batch])
                    targets = work.targets[start : start + work.batch]
                    total += F.cross_entropy(outputs, targets, reduction="sum")
                losses.append(total.item() / work.targets.numel())
    return losses


def loss_landscape_3d(work: Surface) -> list[float]:
    """loss-landscape-3d with a DataLoader of 128; its grid with one x makes a ribbon."""
    from loss_landscape_3d import LossLandscapeCalculator
    from torch.utils.data import DataLoader, TensorDataset

    loader = DataLoader(TensorDataset(work.inputs.cpu(), work.targets.cpu()), batch_size=128)
    model = work.build().to(work.inputs.device)
    calculator = LossLandscapeCalculator(model, loader, nn.CrossEntropyLoss())
    grids = [calculator.calculate(s.xs, s.ys, s.first, s.second, s.origin) for s in work.sheets]
    return [float(loss) for grid in grids for loss in grid.flatten()]


def _surface(device: torch.device, sheets: Sequence[Sheet]) -> Surface:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.rand(10_000, 784, generator=generator).to(device)
    targets = torch.randint(10, (10_000,), generator=generator).to(device)
    return Surface(_build, sheets, inputs, targets)


def _build() -> nn.Module:
    return MLP("784-512-512-10")


def _states(number: int, device: torch.device) -> list[_State]:
    states = []
    for seed in range(number):
        torch.manual_seed(seed)
        states.append(_build().to(device).state_dict())
    return states


def _moved(sheet: Sheet, distance: float) -> _State:
    return {n: t + distance * sheet.second[n] for n, t in sheet.origin.items()}


def _tensors(state: _State) -> list[Tensor]:
    return list(state.values())
