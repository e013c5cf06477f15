"""Trains the sample checkpoints: ``python sample_checkpoints/train.py [RUN ...]``."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from losscli.models import MODELS
from losscli.spec import Spec, call, look_up

HERE = Path(__file__).parent
BATCH = 64


@dataclass(frozen=True)
class Run:
    """How one run is trained.

    Attributes:
        model: The spec of the model; its weights start as ``init:SEED``.
        optimizer: ``sgd``, ``momentum`` or ``adam``.
        lr: The learning rate.
        steps: The number of minibatches.
        seed: Of the initial weights and of the order of the examples.
        weight_decay: Added to the gradient times the weights.
        suffix: The format of the files.
        path: Into how many stretches the kept checkpoints divide the path; 0 keeps none.
        power: The steps of the path are spaced as this power: 3 is dense at the start.
        data: ``digits`` or ``chebyshev``.
        batch: Examples per step; None for all of them.
        moments: Whether the state of the optimiser is kept.
        spawn: The steps at which two children are spawned, which train on with other orders of the
            examples.
    """

    model: str
    optimizer: str
    lr: float
    steps: int
    seed: int = 0
    weight_decay: float = 1e-4
    suffix: str = ".pt"
    path: int = 0
    power: int = 3
    data: str = "digits"
    batch: int | None = BATCH
    moments: bool = False
    spawn: tuple[int, ...] = ()


RELU = "mlp:64-40-40-10,activation=relu"
TANH = "mlp:1-20-20-1,activation=tanh"
SADDLE = "mlp:64-10-10,activation=tanh"
SPAWN = 0, 16, 99, 303, 901
FULL_BATCH: dict[str, Any] = {
    "weight_decay": 0.0,
    "path": 20,
    "power": 1,
    "data": "chebyshev",
    "batch": None,
}
RUNS = {
    "maxout": Run("mlp:64-40-40-10,activation=maxout,pieces=2", "momentum", 0.05, 2000, path=30),
    "relu": Run(RELU, "momentum", 0.05, 2000, path=30),
    "sigmoid": Run(
        "mlp:64-40-40-10,activation=sigmoid", "momentum", 0.3, 4000, suffix=".safetensors", path=30
    ),
    "cnn": Run(
        "cnn:16-32,channels=1,classes=10,batchnorm=true",
        "momentum",
        0.02,
        2000,
        suffix=".safetensors",
        path=30,
    ),
    # Until the children part, the steps are those of relu.
    "spawned": Run(RELU, "momentum", 0.05, 2000, suffix=".safetensors", spawn=SPAWN),
    "relu-seed1": Run(RELU, "momentum", 0.05, 2000, seed=1),
    "relu-seed2": Run(RELU, "momentum", 0.05, 2000, seed=2),
    "relu-adam": Run(RELU, "adam", 0.002, 2000, path=30),
    "relu-sgd": Run(RELU, "sgd", 0.1, 6000, path=30),
    # Their seeds were searched for: README.md says how, and what the lines of these two show.
    "deep-sigmoid": Run(
        "mlp:64-12-12-12-12-10,activation=sigmoid", "sgd", 6.0, 4000, seed=840, weight_decay=0.0
    ),
    "deep-sigmoid-wide": Run(
        "mlp:64-32-32-32-32-10,activation=sigmoid",
        "momentum",
        0.5,
        10000,
        seed=5,
        weight_decay=0.0,
    ),
    "chebyshev/gd-0.05": Run(TANH, "sgd", 0.05, 4000, suffix=".safetensors", **FULL_BATCH),
    "chebyshev/gd-0.1": Run(TANH, "sgd", 0.1, 4000, suffix=".safetensors", **FULL_BATCH),
    "chebyshev/adam": Run(TANH, "adam", 0.001, 4000, moments=True, **FULL_BATCH),
}


def build(spec: str, seed: int) -> nn.Module:
    parsed = Spec.parse(spec)
    factory, arguments = look_up(parsed, MODELS, "model", trusted=False)
    torch.manual_seed(seed)
    model = call(factory, arguments, parsed.options, spec)
    assert isinstance(model, nn.Module)
    return model


def optimizer_of(run: Run, model: nn.Module) -> torch.optim.Optimizer:
    if run.optimizer == "adam":
        named = model.named_parameters()
        return torch.optim.Adam(named, run.lr, weight_decay=run.weight_decay)
    momentum = {"sgd": 0.0, "momentum": 0.9}[run.optimizer]
    return torch.optim.SGD(
        model.parameters(), run.lr, momentum=momentum, weight_decay=run.weight_decay
    )


def batches(examples: int, size: int | None, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(examples, generator=generator)
        for first in range(0, examples, size or examples):
            yield order[first : first + (size or examples)]


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    loss = mse_loss if targets.is_floating_point() else cross_entropy
    return loss(outputs, targets)


def steps_kept(run: Run) -> set[int]:
    """Spaces the steps of the path as a power."""
    return {round(run.steps * (k / run.path) ** run.power) for k in range(run.path + 1) if run.path}


def save(
    model: nn.Module, run: Run, step: int, path: Path, optimizer: torch.optim.Optimizer
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if run.suffix == ".safetensors":
        metadata = {"losscli.model": run.model, "step": str(step)}
        save_file(model.state_dict(), path, metadata=metadata)
    else:
        content = {"state_dict": model.state_dict(), "step": step, "losscli.model": run.model}
        torch.save(content | ({"optimizer": optimizer.state_dict()} if run.moments else {}), path)


@torch.no_grad()
def measure(model: nn.Module, inputs: Tensor, targets: Tensor) -> str:
    outputs = model.eval()(inputs).double()
    if targets.is_floating_point():
        return f"loss {loss_of(outputs, targets.double()).item():.2g}"
    accuracy = (outputs.argmax(1) == targets).double().mean().item()
    return f"loss {loss_of(outputs, targets).item():.4f}, accuracy {accuracy:.2%}"


def update(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: dict[str, Tensor], rows: Tensor
) -> None:
    inputs, targets = data["train_inputs"], data["train_targets"]
    loss = loss_of(model.train()(inputs[rows]), targets[rows])
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()


def spawn(
    run: Run,
    step: int,
    folder: Path,
    data: dict[str, Tensor],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Trains two copies of a network on to the last step, with other orders of the examples."""
    for child, seed in (("a", 1), ("b", 2)):
        own = copy.deepcopy(model)
        other = optimizer_of(run, own)
        other.load_state_dict(optimizer.state_dict())
        order = batches(len(data["train_inputs"]), run.batch, seed)
        for _ in range(step, run.steps):
            update(own, other, data, next(order))
        save(own, run, run.steps, folder / f"step-{step:05}-{child}{run.suffix}", other)


def train(run: Run, folder: Path, data: dict[str, Tensor]) -> nn.Module:
    model = build(run.model, run.seed)
    optimizer = optimizer_of(run, model)
    order = batches(len(data["train_inputs"]), run.batch, run.seed)
    kept = steps_kept(run)
    for step in range(run.steps + 1):
        if step:
            update(model, optimizer, data, next(order))
        if step in run.spawn:
            spawn(run, step, folder, data, model, optimizer)
        paths = []
        if step in kept:
            paths.append(folder / "path" / f"step-{step:05}{run.suffix}")
        if step in {0, run.steps} and not run.spawn:
            paths.append(folder / f"{'final' if step else 'init'}{run.suffix}")
        for file in paths:
            save(model, run, step, file, optimizer)
    if run.spawn:
        names = [f"step-{step:05}" for step in run.spawn]
        rows = (
            f"{name}-a{run.suffix},{name}-b{run.suffix},{step}"
            for name, step in zip(names, run.spawn, strict=True)
        )
        (folder / "pairs.csv").write_text("\n".join(["a,b,step", *rows, ""]))
    return model


def saddle(folder: Path, data: dict[str, Tensor]) -> None:
    """Makes a critical point that is a saddle: a network that looks at no input.

    Its weights are zero and its last biases the logarithms of how frequent the classes are, so it
    answers with the frequencies. The gradient is zero: each layer's is a product with the weights
    or the outputs of the other, or is zero since the frequencies are right on average.
    """
    model = build(SADDLE, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        share = data["train_targets"].bincount(minlength=10).double() / len(data["train_targets"])
        list(model.parameters())[-1].copy_(share.log())
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": model.state_dict(), "losscli.model": SADDLE}, folder / "saddle.pt")


def chebyshev(folder: Path) -> dict[str, Tensor]:
    """Saves 20 points of the Chebyshev polynomial of degree 3, 4x³ − 3x, and how to load them."""
    x = torch.linspace(-1, 1, 20).view(-1, 1)
    data = {"train_inputs": x, "train_targets": 4 * x**3 - 3 * x}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(data, folder / "chebyshev.safetensors")
    (folder / "losscli.toml").write_text('data = "safetensors:chebyshev.safetensors"\n')
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the sample checkpoints.")
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"{', '.join(RUNS)}; default all")
    parser.add_argument("--out", type=Path, default=HERE, help="the folder for the runs")
    options = parser.parse_args()
    if unknown := set(options.runs) - set(RUNS):
        parser.error(f"no run {', '.join(sorted(unknown))}; there are {', '.join(RUNS)}")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    data = {
        "digits": load_file(HERE / "digits.safetensors"),
        "chebyshev": chebyshev(options.out / "chebyshev"),
    }
    saddle(options.out / "saddle", data["digits"])
    for name in options.runs or RUNS:
        start = time.perf_counter()
        own = data[RUNS[name].data]
        model = train(RUNS[name], options.out / name, own)
        figures = [
            f"{split} {measure(model, own[f'{split}_inputs'], own[f'{split}_targets'])}"
            for split in ("train", "test")
            if f"{split}_inputs" in own
        ]
        print(f"{name}: {'; '.join(figures)} ({time.perf_counter() - start:.1f} s)")


if __name__ == "__main__":
    main()
