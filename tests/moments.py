"""Checkpoints with the state of Adam."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from losscli.models import MLP


def train(
    model: nn.Module, x: Tensor, y: Tensor, steps: int, optimizer: torch.optim.Optimizer
) -> None:
    """Takes full-batch steps on the cross entropy of classes, or else on the squared error."""
    for _ in range(steps):
        optimizer.zero_grad()
        if y.is_floating_point():
            loss = (model(x) - y).square().mean()
        else:
            loss = nn.functional.cross_entropy(model(x), y)
        torch.autograd.backward(loss)
        optimizer.step()


def save_trained(path: str | Path, steps: int = 3, *, seed: int = 0, **options: Any) -> None:
    """Saves a small network that Adam has trained, of the form of the fixture ``folder``."""
    torch.manual_seed(seed)
    model = MLP("6-5-3")
    optimizer = torch.optim.Adam(model.named_parameters(), **options)
    train(model, torch.rand(20, 6), torch.arange(20) % 3, steps, optimizer)
    content = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**content, "losscli.model": "mlp:6-5-3"}, path)
